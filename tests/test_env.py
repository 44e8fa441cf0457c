"""The output of `python -m rft.env`, including for a mixture of Pillow and Pillow-SIMD."""

import subprocess
import sys

import PIL
import pytest
import torch

from rft import env


@pytest.mark.slow
def test_it_prints_what_is_in_use():
    result = subprocess.run(
        [sys.executable, "-m", "rft.env"], capture_output=True, text=True, check=True
    )
    assert PIL.__version__ in result.stdout
    assert torch.__version__ in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("imported", "installed", "problem"),
    [
        ("13.0.0", {"pillow": "13.0.0"}, None),
        ("12.1.1.post0", {"pillow-simd": "12.1.1.post0"}, None),
        ("13.0.0", {"pillow": "13.0.0", "pillow-simd": "12.1.1.post0"}, "over each other"),
        ("12.1.1.post0", {"pillow": "13.0.0"}, "the package list says pillow 13.0.0"),
        ("13.0.0", {}, "the package list says none"),
    ],
)
def test_a_mixture_is_seen(imported, installed, problem):
    found = env.image_core_problem(imported, installed)
    assert (found is None) == (problem is None)
    assert problem is None or problem in found


def test_both_packages_over_each_other_end_with_one_line(tmp_path, monkeypatch, capsys):
    """A second package's metadata before the real one, as left by pip."""
    folder = tmp_path / "pillow_simd-12.1.1.post0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: pillow-simd\nVersion: 12.1.1.post0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        env.show()
    assert stopped.value.code == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert "over each other" in shown


@pytest.mark.parametrize(
    ("imported", "warned"),
    [("12.1.1.post0", True), ("9.5.0", True), ("13.0.0", False), ("13.0.0.post1", False)],
)
def test_an_image_library_with_known_holes_is_warned_of(imported, warned, monkeypatch, capsys):
    monkeypatch.setattr(PIL, "__version__", imported)
    monkeypatch.setattr(env, "installed_image_packages", lambda: {"pillow": imported})
    env.show()
    shown = capsys.readouterr().err
    assert ("] WARNING: " in shown) == warned
    assert shown.count("\n") == warned
    assert not warned or f"PIL {imported} lacks the security fixes of Pillow 13.0.0" in shown


def test_avx2_is_seen_in_the_code_itself():
    multiply_ymm = bytes.fromhex("c5fdf5c1")  # vpmaddwd ymm0, ymm0, ymm1
    multiply_xmm = bytes.fromhex("c5f9f5c1")  # the same on 128 bits, which needs no AVX2
    assert env.uses_avx2(b"code" + 40 * multiply_ymm)
    assert not env.uses_avx2(b"code" + 40 * multiply_xmm)
    assert not env.uses_avx2(b"code" + multiply_ymm)


def test_pillow_has_no_avx2_and_its_formats_are_told(monkeypatch):
    found = env.image_core()
    assert PIL.__version__ in found
    assert ("with AVX2" in found) == (".post" in PIL.__version__)
    monkeypatch.setattr(env.features, "check", lambda name: name != "webp")
    assert "cannot read WebP" in env.image_core()
