"""Labels: what is one class, what is none, and what looks like a slip."""

import math
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import Settings
from labels import ClassNumbers, class_name, class_order, read_labels, slips
from messages import UserError
from tasks import Classification


def message(cell):
    with pytest.raises(UserError) as caught:
        class_name(cell, "a.csv, line 3")
    assert str(caught.value).startswith("a.csv, line 3: ") and "\n" not in str(caught.value)
    return str(caught.value)


def names_of(cells, **options):
    names, errors = read_labels(cells, [f"line {n}" for n in range(len(cells))], **options)
    return names, [str(error) for error in errors]


def notes(cells, **options):
    names, errors = names_of(cells)
    assert errors == []
    return slips(cells, names, **options)


@pytest.mark.parametrize("cell, name", [
    ("x", "x"), (" y\u00a0", "y"), (1, "1"), (1.0, "1"), ("1.0", "1"), ("1.", "1"), ("-1.00", "-1"),
    ("2.0000000e+00", "2"), ("1e+02", "100"), (True, "true"), (False, "false"), ("True", "True"),
    (10**20, "1" + "0" * 20), (-0.0, "0"),
    ("12345678901234567890.0", "12345678901234567890"), ("01", "01"), ("1e5", "1e5"), ("v1.5", "v1.5"),
    ("1.2.3", "1.2.3"), ("NA", "NA"), ("nan", "nan"), ("2024-01", "2024-01"), ("e\u0301", "é"), ("a\0b", "a\0b"),
    ("1e999999999", "1e999999999"),
])  # fmt: skip
def test_classes(cell, name):
    assert class_name(cell, "") == name


@pytest.mark.parametrize("cell, part", [
    (None, "the label is empty"), ("", "the label is empty"), (" \t", "the label is empty"),
    (math.nan, "the label is empty"),
    (0.5, "label 0.5 is not a class: for numbers say --task regression"),
    ("0.333", "label '0.333' is not a class: for numbers say --task regression"), ("1.5e-3", "--task regression"),
    ("1e-05", "--task regression"), (".5", "--task regression"), ("0,5", "--task regression"),
    ("1,2", "if it is a list, separate its names by ';' and say --task multilabel"), (math.inf, "--task regression"),
    (["a", "b"], "label ['a', 'b'] is not a class; give one, as text or a whole number, or for items with any number"),
    ({"a": 1}, "--task multilabel"), (b"a", "write text"), ("\ud83d", "half a surrogate pair"),
    ("\u200b", "no visible characters"), ("\0", "no visible characters"),
    ("x" * 1001, "has 1001 characters; name the column by --label_column"),
])  # fmt: skip
def test_what_is_no_class(cell, part):
    assert part in message(cell)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.one_of(st.text(), st.floats(), st.integers(), st.booleans(), st.none(), st.lists(st.text())))
def test_any_cell_is_a_class_or_is_refused(cell):
    """A class is text that UTF-8 can hold, and it is the class of its own name."""
    try:
        name = class_name(cell, "here")
    except UserError as error:
        assert str(error).startswith("here: ")
    else:
        assert name and name.encode() and class_name(name, "") == name
        assert unicodedata.is_normalized("NFC", name)


def test_missing_beside_numbers_is_missing():
    """As NaN in an array is; beside words it may be one, and in a known class it is none."""
    names, errors = names_of(["1", "nan", "0", "None", "1"])
    assert names == ["1", None, "0", None, "1"]
    assert errors == [f"line {n}: label {text!r} among numbers is a missing value; fill it in, or remove the row"
                      for n, text in ((1, "nan"), (3, "None"))]  # fmt: skip
    remedy = "label 'None' among numbers is a missing value; fill it in, or remove the row"
    for cells in (["1", "None"], ["None", "None"]):  # once the classes are known, it is still no class of other data
        assert f"line 1: {remedy}" in names_of(cells, known=["0", "1"])[1]
    assert names_of(["1", "nan"], known=["1", "nan"]) == (["1", "nan"], [])
    assert names_of(["yes", "None"])[1] == []
    assert names_of(["1", "NA"])[1] == []


def test_bad_labels_are_all_named():
    names, errors = names_of(["a", "", "0.5", "b"])
    assert names == ["a", None, None, "b"] and [error.split(":")[0] for error in errors] == ["line 1", "line 2"]


def test_class_order():
    assert class_order(["10", "9", "-1", "9"]) == ["-1", "9", "10"]
    assert class_order(["10", "9", "b", "a"]) == ["10", "9", "a", "b"]
    assert class_order(["2", "1", "nan"]) == ["1", "2", "nan"]
    assert class_order(["1.0", "01", "1"]) == ["01", "1", "1.0"]


# --- Slips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [
    ["a", "b"], ["1", "2", "3"], [1, 2], [True, False], ["NA", "DE", "KR"], ["hot dog", "dog", "cat"],
    ["C", "C++", "C#"], ["R&B", "rock"], ["drum & bass", "bass"], ["-1", "1"], ["New York", "York"], ["Ärger", "arger"],
    ["A+", "A", "B"],
    ["1.0", "2.0"], ["Tom, Jr.", "Ann"],
])  # fmt: skip
def test_good_labels_are_not_questioned(cells):
    assert notes(cells * 3) == []


def test_one_class_in_two_spellings_is_said():
    assert notes(["1", "1.0", "0", "0.0", "1"]) == [
        "labels that are written in several ways are one class: '0' and '0.0', '1' and '1.0'"
    ]
    assert "one class: '1' and '1.0'" in notes([1, 1.0, "a"])[0]
    assert "one class: 'é' and 'é'" in unicodedata.normalize("NFC", notes(["é", "e\u0301", "a"])[0])


@pytest.mark.parametrize("one, other", [
    ("pos", "Pos"), ("STRASSE", "straße"), ("pos", "pos\u200b"), ("a b", "a  b"), ("a b", "a\u00a0b"),
    ("1", "01"), ("+1", "1"), ("１", "1"), ("\ufeffx", "x"), ("0", "00"), ("soft\u00adhyphen", "softhyphen"),
])  # fmt: skip
def test_labels_that_look_alike_are_said(one, other):
    (note,) = notes([one, other, other, "z"])
    assert f"{one!r} (1)" in note and f"{other!r} (2)" in note and "classes of their own" in note
    numbers = ClassNumbers([one, "z"])
    assert numbers.get(other) is None and numbers.nearest(other) == f" (there is {one!r})"
    assert numbers.nearest("y") == ""


@pytest.mark.parametrize("missing", ["nan", "NaN", "None", "none", "null", "N/A", "<NA>", "?", "-"])
def test_labels_that_look_missing_are_said(missing):
    (note,) = notes(["yes", missing, "no"])
    assert f"{missing!r} (1)" in note and "missing value" in note
    assert notes([missing, missing]) == []  # the only label


def test_na_is_a_class_of_countries_but_odd_beside_numbers():
    assert notes(["NA", "DE"]) == []
    assert "'NA' (1)" in notes(["NA", "1", "2"])[0]


@pytest.mark.parametrize("cells", [
    ["action", "comedy", "action|comedy"], ["a;b", "b;c", "a;c"], ["a, b", "b, c", "c, a"],
    ["['a']", "['b']", "['a', 'b']"], ["rain/sun", "sun", "rain"], ["0 2", "0", "2"], ["1|2", "1", "2"],
])  # fmt: skip
def test_several_names_in_a_cell_are_said(cells):
    (note,) = notes(cells * 2)
    assert "seems to hold several names" in note and "say --task multilabel" in note


def test_what_helps_is_said_where_it_is_needed():
    cells = ["ok"] * 95 + ["fault"] * 5
    said = "the classes are unequal: 'ok' has 95 of 100 training items, 'fault' 5; look at the balanced accuracy"
    assert notes(cells) == [said]
    assert notes(cells, remedies=["--one", "--other"]) == [f"{said}, and see --one and --other"]
    places = [f"line {n}" for n in range(len(cells))]
    for flags, left in (
        ({}, ", and see --class_weights balanced and --select_by balanced_accuracy"),
        ({"class_weights": "balanced"}, ", and see --select_by balanced_accuracy"),
        ({"class_weights": "balanced", "select_by": "balanced_accuracy"}, ""),
    ):
        assert Classification.fit(cells, places, Settings(**flags))[1] == [said + left]
    assert notes(["ok"] * 90 + ["fault"] * 10) == []
    (note,) = notes([str(1000 + n) for n in range(30)])
    assert "30 classes for 30 items" in note and "if the labels are measurements, say --task regression" in note


# --- Numbers ---------------------------------------------------------------------------------------------------------


def test_classes_are_found_under_the_names_of_an_older_checkpoint():
    """Which knew '1.0', decomposed letters and fractions as they stood."""
    old = ["0.0", "1.0", unicodedata.normalize("NFD", "café"), "0.5"]
    numbers = ClassNumbers(old)
    names, errors = names_of(["0.0", "1", 1.0, "café", "0.5", "2"], known=old)
    assert errors == [] and [numbers.get(name) for name in names] == [0, 1, 1, 2, 3, None]
    both = ["1", "1.0"]
    names, _ = names_of(["1", "1.0", 1], known=both)
    assert [ClassNumbers(both).get(name) for name in names] == [0, 1, 0]
