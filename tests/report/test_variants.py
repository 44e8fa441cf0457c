"""Rows of one recipe are named by the settings in which they differ, and by nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rft.report.variants import variants


def named(*documents):
    return variants([("vanilla", document) for document in documents])


def test_one_setting_has_no_name():
    assert named({"optim": {"lr": 1}}, {"optim": {"lr": 1.0}}, {"optim": {"lr": 1}}) == [""] * 3


def test_a_name_is_the_setting_and_its_value():
    assert named({"optim": {"lr": 1e-5}}, {"optim": {"lr": 3e-5}}, {"optim": {"lr": 1e-5}}) == [
        "lr 1e-05",
        "lr 3e-05",
        "lr 1e-05",
    ]


def test_recipes_do_not_share_their_settings():
    assert variants([("vanilla", {"lr": 1}), ("no-mask", {"lr": 2})]) == ["", ""]


def test_settings_of_one_name_in_two_groups_have_their_groups():
    assert named({"a": {"rate": 1}, "b": {"rate": 1}}, {"a": {"rate": 2}, "b": {"rate": 3}}) == [
        "a.rate 1, b.rate 1",
        "a.rate 2, b.rate 3",
    ]


def test_every_row_has_all_that_any_row_differs_in():
    assert named({"lr": 1, "wd": 1}, {"lr": 2, "wd": 1}, {"lr": 1, "wd": 2}) == [
        "lr 1, wd 1",
        "lr 2, wd 1",
        "lr 1, wd 2",
    ]


def test_an_option_of_a_newer_version_is_none_in_an_older():
    assert named({}, {"lr": 1}) == ["lr none", "lr 1"]


def test_more_than_a_name_holds_is_counted_and_numbered():
    first = dict.fromkeys("abcde", 0)
    assert named(first, {**first, "d": 1}, {**first, "e": 1}) == [
        "d 0, e 0",
        "d 1, e 0",
        "d 0, e 1",
    ]
    assert named(first, dict.fromkeys("abcde", 1), {**first, "d": 1}) == [
        "a 0, b 0, c 0, and 2 more",
        "a 1, b 1, c 1, and 2 more",
        "a 0, b 0, c 0, and 2 more #2",
    ]


def test_names_and_values_of_strangers_are_short_and_printable():
    (one, other) = named({"\x1b[31m" * 100: "x" * 1000}, {})
    assert one.isprintable()
    assert len(one) < 150
    assert other.endswith("none")


leaves = st.one_of(st.integers(0, 2), st.sampled_from(["", "a"]), st.none(), st.booleans())
documents = st.recursive(
    leaves, lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=6
)


@pytest.mark.slow
@given(st.lists(st.dictionaries(st.sampled_from("abc"), documents), min_size=1, max_size=5))
def test_rows_have_one_name_if_and_only_if_their_settings_are_equal(found):
    names = named(*found)

    def same(one, other):
        # an absent option equals null
        return _without_none(one) == _without_none(other)

    for one, name in zip(found, names, strict=True):
        for other, other_name in zip(found, names, strict=True):
            assert (name == other_name) == same(one, other)


def _without_none(document):
    if not isinstance(document, dict):
        return document
    return {key: _without_none(value) for key, value in document.items() if value is not None}
