"""The classes of a head or a set are compared by identity, never by number."""

import json
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rft.classes import Classes, check_head, compare, compare_prompts, mismatch
from rft.clip.classifier import build_classifier, load_state, save_classifier, save_state
from rft.runs import header
from rft.storage import documents
from tests.conftest import build_model

ANIMALS = Classes(ids=("n01", "n02", "n03"), names=("cat", "dog", "crane"), prompts_sha256="a" * 64)
PRINTABLE = st.characters(exclude_categories=("C", "Zl", "Zp"))
NAMES = st.lists(st.text(PRINTABLE, min_size=1, max_size=4), min_size=1, max_size=6, unique=True)


def of(ids: str, names: str) -> Classes:
    return Classes(ids=tuple(ids.split()), names=tuple(names.split()))


@given(NAMES, st.data())
def test_only_the_same_order_agrees(names, data):
    listed = Classes(ids=tuple(names), names=tuple(f"a {name}" for name in names))
    assert mismatch(listed, listed) is None
    order = data.draw(st.permutations(range(len(names))))
    other = Classes(
        ids=tuple(listed.ids[n] for n in order), names=tuple(listed.names[n] for n in order)
    )
    composed = [unicodedata.normalize("NFC", name) for name in names]
    moved = [n for n, m in enumerate(order) if composed[n] != composed[m]]
    assert mismatch(listed, other) == (moved[0] if moved else None)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        # the first class that differs, not the number of classes
        (of("a b c", "A B C"), of("a b d", "A B D"), 2),
        (of("a b c", "A B C"), of("a b", "A B"), 2),
        (of("a b", "A B"), of("", "A B"), None),  # a manifest without ids: names decide
        (of("", "B A"), of("a b", "A B"), 0),
        (of("a b", "A B"), of("a b", "A Bee"), None),  # a renamed class
        (of("a b", "A B"), of("a bee", "A B"), None),
        (of("a b", "A B"), of("a bee", "A Bee"), 1),
        (of("a b", "A B"), of("a bee", "Ae B"), None),  # each class keeps one of the two
        # numbers are positions and identify nothing
        (of("0 1 2", "red green blue"), of("0 1 2", "car bus boat"), 0),
        (of("0 1 2", "red green blue"), of("0 1 2", "red green navy"), 2),
        (of("0 1 2", "red green blue"), of("1 2 3", "red green blue"), 0),
        # an unambiguous new name of two equal ones has not moved
        (of("a b", "crane crane"), of("a b", "crane heron"), None),
        (of("a b c", "crane crane X"), of("a b c", "crane X crane"), 1),
        # equal ids with exchanged names, and the reverse: one of the two lists is wrong
        (of("0 1", "cat dog"), of("0 1", "dog cat"), 0),
        (of("0 1", "cat dog"), of("1 0", "cat dog"), 0),
        (of("a b c", "A B C"), of("a b c", "A C D"), 1),
        # two classes with one name, like ImageNet's missile: the ids decide
        (of("a b", "missile missile"), of("b a", "missile missile"), 0),
        (of("a b", "missile missile"), of("a b", "missile missile"), None),
    ],
)
def test_the_first_class_that_differs(one, other, expected):
    assert mismatch(one, other) == expected
    assert mismatch(other, one) == expected


def test_a_mismatch_names_the_class_and_both_values():
    other = Classes(ids=("n01", "n03", "n02"), names=("cat", "crane", "dog"))
    with pytest.raises(ValueError, match="have different classes") as caught:
        compare(ANIMALS, "runs/a", other, "data/test")
    assert str(caught.value) == (
        "runs/a and data/test have different classes: class 1 is 'n02' ('dog') in the first, "
        "'n03' ('crane') in the second (the same classes in a different order)"
    )
    more = Classes(ids=(*ANIMALS.ids, "n04"), names=(*ANIMALS.names, "cow"))
    with pytest.raises(ValueError, match=r"class 3 is missing in the first, 'n04' \('cow'\)"):
        compare(ANIMALS, "a", more, "b")


def test_what_cannot_be_compared_is_said():
    assert compare(ANIMALS, "a", ANIMALS, "b") == []
    (line,) = compare(None, "old.safetensors", ANIMALS, "data/test")
    assert line.startswith("old.safetensors: the file does not list the classes of its head")
    assert "those of data/test" in line
    (line,) = compare(ANIMALS, "a", None, "b")
    assert "those of a" in line
    (line,) = compare(None, "a", None, "b")
    assert line.startswith("a and b: ")
    renamed = Classes(ids=ANIMALS.ids, names=("cat", "dog", "heron"))
    (line,) = compare(ANIMALS, "a", renamed, "b")
    assert "name 1 of 3 classes differently (first: 'n03' ('crane') and 'n03' ('heron'))" in line


def test_a_silent_head_must_have_as_many_classes():
    assert len(check_head(None, 3, "old", ANIMALS, "data/test")) == 1
    with pytest.raises(ValueError, match="old has a 4-class head, data/test has 3 classes"):
        check_head(None, 4, "old", ANIMALS, "data/test")


def test_different_prompts_are_said():
    other = Classes(ids=ANIMALS.ids, names=ANIMALS.names, prompts_sha256="b" * 64)
    unknown = Classes(ids=ANIMALS.ids, names=ANIMALS.names)
    assert compare_prompts(ANIMALS, "a", ANIMALS, "b") == []
    assert compare_prompts(ANIMALS, "a", unknown, "b") == []
    assert compare_prompts(None, "a", ANIMALS, "b") == []
    (line,) = compare_prompts(ANIMALS, "a", other, "b")
    assert line == "the heads of a and b were built from different prompts"


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {"ids": ["a"]},
        {"names": "ab"},
        {"names": ["a", 1]},
        {"names": ["a", "b"], "ids": ["a"]},
        {"names": ["a"], "ids": ["a"], "prompts_sha256": 7},
    ],
)
def test_documents_that_are_no_classes(document):
    with pytest.raises(ValueError, match=r"class|names|prompts"):
        documents.decode(json.dumps(document).encode(), Classes, "classes")


def test_a_weights_file_carries_its_classes(tmp_path):
    path = tmp_path / "m.safetensors"
    known = Classes(ids=tuple("abcde"), names=tuple("ABCDE"), prompts_sha256="a" * 64)
    save_classifier(str(path), build_model(), {"step": "3"}, known)
    saved = load_state(path)
    assert saved.classes == header.read_entries(path).classes == known
    assert saved.metadata == {"step": "3"}
    save_classifier(str(path), build_model(), {"step": "3"}, None)
    assert load_state(path).classes is None
    assert header.read_entries(path).classes is None


def test_a_header_of_another_number_of_classes_is_damaged(tmp_path):
    path = tmp_path / "m.safetensors"
    model = build_model()
    known = Classes(ids=(), names=tuple("ABCDE"))
    save_classifier(str(path), model, {"step": "3"}, known)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entries = json.loads(header["__metadata__"]["rft"])
    entries["classes"]["names"] = ["A"]
    header["__metadata__"]["rft"] = json.dumps(entries)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ValueError, match="its header names 1 classes, but its head has 5"):
        load_state(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["head.weight", "visual.proj"])
def test_weights_that_are_not_finite_are_refused(tmp_path, name, value):
    path = tmp_path / "m.safetensors"
    model = build_model()
    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    state[name][1, 2] = value
    save_state(str(path), state, model.architecture, {"step": "3"}, None)
    with pytest.raises(ValueError, match=f"1 of .* weights of {name} are not finite"):
        load_state(path)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 7, b"\xff" * 8 + b"{}", b"\x02" + b"\0" * 7 + b"[]", b"a" * 40]
)
def test_headers_that_are_none(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        header.read_entries(path)


def test_names_are_compared_in_one_spelling():
    composed, apart = "caf\u00e9", "cafe\u0301"
    one, other = Classes(ids=(composed,), names=(composed,)), Classes(ids=(apart,), names=(apart,))
    assert mismatch(one, other) is None


def test_the_logits_do_not_change(tmp_path):
    path = tmp_path / "m.safetensors"
    model = build_model().eval()
    known = Classes(ids=(), names=tuple("ABCDE"))
    save_classifier(str(path), model, {"step": "0"}, known)
    saved = load_state(path)
    again = build_classifier(saved.state, saved.architecture)
    images_BCHW = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert torch.equal(again(images_BCHW), model(images_BCHW))
