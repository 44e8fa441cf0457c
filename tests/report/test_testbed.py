"""A testbed file is a line, or an error that names its line."""

import pytest
from scipy.special import expit, logit

from rft.report import testbed
from rft.report.testbed import read_line


def test_a_line_goes_through_its_models_on_the_logit_scale(tmp_path):
    path = tmp_path / "testbed.csv"
    ids = [55.0, 62.5, 70.0, 81.0]
    lines = [f"m{n},x,{x},{100 * expit(1.2 * logit(x / 100) - 0.7)}" for n, x in enumerate(ids)]
    path.write_text("\n".join(["\ufeffmodel,other,id,ood", *lines]), encoding="utf-8")
    line = read_line(path)
    assert (line.slope, line.intercept) == pytest.approx((1.2, -0.7))
    assert line.r_squared == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no column id, model, ood"),
        ("model,id\na,1\n", "it has no column ood"),
        ("model,id,ood\na,50,40\nb,60\n", "line 3: ood is None; it must be a percentage"),
        ("model,id,ood\na,x,40\n", "line 2: id is 'x'"),
        ("model,id,ood\na,nan,40\n", "line 2: id is 'nan'"),
        ("model,id,ood\na,100,40\n", "line 2: id is '100'"),
        ("model,id,ood\na,50,40\n", "a testbed needs at least 3 models, it has 1"),
        ("model,id,ood\na,50,40\nb,50,41\nc,50,42\n", "the same ID accuracy"),
        ("model,id,ood\n" + "a,50,40\n" * 21, "more than 20 models"),
        ('model,id,ood\n"a,50,40\n', "unexpected end of data"),
        (b"\xff\xfe", "can't decode"),
    ],
)
def test_other_files_are_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(testbed, "MODELS", 20)
    path = tmp_path / "testbed.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_line(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "testbed.csv"
    with path.open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(ValueError, match=r"testbed.csv: it has more than 1,048,576"):
        read_line(path)
