"""Labels of regression and multilabel in every format: read alike, and refused by file, place, value and remedy."""

import csv
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as options
from hypothesis import strategies as st

from config import resolve
from data_files import read_series
from data_utils import load_splits
from labels import class_names_of, number_of, same_label
from messages import UserError
from tables import label_columns, names_in
from tasks import Classification, MultiLabel, Regression, from_description

N = 24
PRICES = [-1 + n / 4 for n in range(N)]
WEIGHTS = [1e9 * n for n in range(N)]
NAMES = [["b", "a"] * (n % 2) + ["c"] * (n % 3 == 0) for n in range(N)]
HOT = [[int(name in names) for name in "abc"] for names in NAMES]
SERIES = np.random.default_rng(0).standard_normal((N, 5, 1))


def settings_of(path, dataset, **given):
    return resolve(file={"dataset_type": dataset, "data_path": str(path), **given})[0]


def loaded(path, dataset="text", **given):
    """(the task, the targets of all samples by id, notes)"""
    splits, info = load_splits(settings_of(path, dataset, **given))
    targets = {id: label for split in splits.values() for id, label in zip(split.ids, split.labels, strict=True)}
    return from_description(info["task"]), targets, info["notes"]


def message(path, dataset="text", **given):
    with pytest.raises(UserError) as caught:
        load_splits(settings_of(path, dataset, **given))
    return str(caught.value)


def table(path, head, rows, delimiter=","):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([head, *rows])
    path.write_text(text.getvalue())
    return path


def texts(path, labels, names=("label",), **more):
    """A table of texts with these labels, one or several to a row."""
    rows = [[f"text {n}", *(cell if isinstance(cell, (list, tuple)) else [cell])] for n, cell in enumerate(labels)]
    return table(path, ["text", *names], rows, **more)


def objects(path, labels):
    path.write_text("\n".join(json.dumps({"text": f"text {n}", "label": label}) for n, label in enumerate(labels)))
    return path


def ts(path, labels, head="@targetLabel true"):
    lines = [",".join(map(repr, SERIES[n, :, 0].tolist())) + f":{label}" for n, label in enumerate(labels)]
    path.write_text("\n".join(["@problemName x", "@timeStamps false", head, "@data", *lines]))
    return path


# -- numbers --------------------------------------------------------------------------------------------------


def of_texts(folder, numbers):
    return texts(folder / "a.csv", numbers), {"dataset": "text"}


def of_objects(folder, numbers):
    return objects(folder / "a.jsonl", numbers), {"dataset": "text"}


def of_npz(folder, numbers):
    np.savez(folder / "a.npz", x=SERIES, y=np.array(numbers))
    return folder / "a.npz", {"dataset": "sequences"}


def of_npz_column(folder, numbers):
    np.savez(folder / "a.npz", x=SERIES, y=np.array(numbers)[:, None])
    return folder / "a.npz", {"dataset": "sequences"}


def of_npz_text(folder, numbers):
    np.savez(folder / "a.npz", x=SERIES, y=np.array(list(map(repr, numbers))))
    return folder / "a.npz", {"dataset": "sequences"}


def of_ts(folder, numbers):
    return ts(folder / "a.ts", numbers), {"dataset": "sequences"}


def of_classes_of_a_ts(folder, numbers):
    return ts(folder / "a.ts", numbers, "@classLabel true " + " ".join(map(repr, numbers))), {"dataset": "sequences"}


def of_arff(folder, numbers):
    rows = [",".join(map(repr, [*SERIES[n, :, 0].tolist(), number])) for n, number in enumerate(numbers)]
    head = ["@relation r", *(f"@attribute t{i} numeric" for i in range(5)), "@attribute label numeric", "@data"]
    (folder / "a.arff").write_text("\n".join([*head, *rows]))
    return folder / "a.arff", {"dataset": "sequences"}


def of_steps(folder, numbers):
    rows = [[n + 1, number, value] for n, number in enumerate(numbers) for value in SERIES[n, :, 0]]
    return table(folder / "a.csv", ["id", "label", "x"], rows), {"dataset": "sequences"}


def of_rows(folder, numbers):
    rows = [[number, *SERIES[n, :, 0]] for n, number in enumerate(numbers)]
    return table(folder / "a.tsv", ["label", *(f"t{i}" for i in range(5))], rows, "\t"), {"dataset": "sequences"}


def of_ucr(folder, numbers):
    lines = [" ".join(map(repr, [number, *SERIES[n, :, 0].tolist()])) for n, number in enumerate(numbers)]
    (folder / "a.txt").write_text("\n".join(lines))
    return folder / "a.txt", {"dataset": "sequences"}


def of_manifest(folder, numbers):
    for n in range(N):
        np.save(folder / f"{n}.npy", SERIES[n])
    rows = [[f"{n}.npy", f"text {n}", number] for n, number in enumerate(numbers)]
    return table(folder / "a.csv", ["series", "text", "label"], rows), {"dataset": "multimodal"}


FORMATS = [of_texts, of_objects, of_npz, of_npz_column, of_npz_text, of_ts, of_classes_of_a_ts, of_arff, of_steps,
           of_rows, of_ucr, of_manifest]  # fmt: skip


@pytest.mark.parametrize("write", FORMATS)
def test_numbers_are_the_same_in_every_format(tmp_path, write):
    path, given = write(tmp_path, PRICES)
    task, targets, _ = loaded(path, task="regression", **given)
    assert task.target_names == ["label"]
    assert {id: target.tolist() for id, target in targets.items()} == {str(n + 1): [p] for n, p in enumerate(PRICES)}


@pytest.mark.parametrize("write", [write for write in FORMATS if write is not of_classes_of_a_ts])
def test_fractions_without_the_task_are_refused_with_its_name(tmp_path, write):
    path, given = write(tmp_path, PRICES)
    assert "--task regression" in message(path, **given)


@pytest.mark.parametrize("write", FORMATS)
def test_a_word_among_numbers_is_named_by_place(tmp_path, write):
    numbers = [*map(repr, PRICES[:7]), "heavy", *map(repr, PRICES[8:])]
    path, given = write(tmp_path, [type("Bare", (str,), {"__repr__": str.__str__})(n) for n in numbers])
    text = message(path, task="regression", **given)
    place = {of_texts: "line 9", of_manifest: "line 9", of_objects: "line 8", of_ts: "line 12", of_arff: "line 16",
             of_classes_of_a_ts: "line 12", of_steps: "line 37", of_rows: "line 9", of_ucr: "line 8"}  # fmt: skip
    where = f"{path}, {place.get(write, 'row 8')}" + ", 'label'" * (write is of_arff)
    if write is of_npz_column:
        assert f"{path}: y is <U" in text and "it must be numbers" in text
    else:
        assert text == f"{where}: label 'heavy' is not a number; correct it, or remove the row"


def of_columns(folder):
    return texts(folder / "a.csv", zip(PRICES, WEIGHTS, strict=True), ("price", "weight")), "text"


def of_named_columns_of_npz(folder):
    y = np.stack([PRICES, WEIGHTS], 1)
    np.savez(folder / "a.npz", x=SERIES, y=y, target_names=["price", "weight"])
    return folder / "a.npz", "sequences"


def of_dicts(folder):
    pairs = zip(PRICES, WEIGHTS, strict=True)
    return objects(folder / "a.jsonl", [{"price": p, "weight": w} for p, w in pairs]), "text"


@pytest.mark.parametrize("write", [of_columns, of_named_columns_of_npz, of_dicts])
def test_several_numbers(tmp_path, write):
    path, dataset = write(tmp_path)
    given = {"label_column": "price, weight"} if write is of_columns else {}
    task, targets, _ = loaded(path, dataset, task="regression", **given)
    assert task.target_names == ["price", "weight"]
    for n, pair in enumerate(zip(PRICES, WEIGHTS, strict=True)):
        assert tuple(targets[str(n + 1)]) == pair


def test_several_numbers_without_names(tmp_path):
    lists = [list(pair) for pair in zip(PRICES, WEIGHTS, strict=True)]
    np.savez(tmp_path / "a.npz", x=SERIES, y=np.array(lists))
    for path, dataset in ((objects(tmp_path / "a.jsonl", lists), "text"), (tmp_path / "a.npz", "sequences")):
        task, targets, _ = loaded(path, dataset, task="regression")
        assert task.target_names == ["label 1", "label 2"] and targets["3"].tolist() == lists[2]


def test_columns_of_series_are_no_features(tmp_path):
    """Neither in training nor in what is to be predicted."""
    rows = [[n, PRICES[n], WEIGHTS[n], value] for n in range(N) for value in SERIES[n, :, 0]]
    path = table(tmp_path / "a.csv", ["id", "price", "weight", "x"], rows)
    settings = settings_of(path, "sequences", task="regression", label_column="price,weight")
    for labelled in (True, False):
        items = read_series(path, settings, labelled)
        assert items.columns == ["x"] and items.values[0].shape == (5, 1)
    assert read_series(ts(tmp_path / "a.ts", PRICES), settings, False).values[0].shape == (5, 1)


def test_rows_of_a_series_may_write_its_number_in_several_ways(tmp_path):
    rows = [[n, text, n % 7] for n in range(N) for text in (f"{n}.5", f"{n}.50", f"{n}5e-1")]
    assert loaded(table(tmp_path / "a.csv", ["id", "label", "x"], rows), "sequences", task="regression")[1]["3"] == 3.5
    rows[4][1] = "1.6"
    assert "a.csv, line 6: label '1.6' of series '1', but '1.5' in line 5" in message(
        table(tmp_path / "a.csv", ["id", "label", "x"], rows), "sequences", task="regression")  # fmt: skip


def test_a_decimal_comma_where_semicolons_separate_the_cells(tmp_path):
    """As in the columns of features."""
    path = texts(tmp_path / "a.csv", [f"{n},5" for n in range(N)], delimiter=";")
    _, targets, notes = loaded(path, task="regression")
    assert targets["4"] == 3.5 and f"{path}: a comma is the decimal point in it" in notes
    mixed = [f"{n},5" for n in range(N - 1)] + ["1.234"]  # may be a thousand
    assert "line 2: label '0,5' is not a number; write it with a decimal point" in message(
        texts(tmp_path / "a.csv", mixed, delimiter=";"), task="regression")  # fmt: skip


def test_arff_takes_the_last_attribute_and_says_so(tmp_path):
    path, _ = of_arff(tmp_path, PRICES)
    path.write_text(path.read_text().replace("attribute label", "attribute price"))
    task, targets, notes = loaded(path, "sequences", task="regression")
    assert task.target_names == ["price"] and targets["2"] == PRICES[1]
    assert notes == [f"{path}: its last attribute, price, is taken for the label (--label_column overrides)"]
    for task in ("regression", "classification"):
        text = message(path, "sequences", label_column="weight", task=task)
        assert "no attribute 'weight', which --label_column names; there are t0, t1" in text


MISSING, ALONE = "a missing value; fill it in", "write the number alone, without a unit"
WORD, INFINITE = "is not a number", "is not a finite number"
POINT = "with a decimal point, and without a separator of thousands"


@pytest.mark.parametrize("cell, part", [
    ("", "the label is empty; fill it in"), ("nan", MISSING), ("NA", MISSING), ("?", MISSING), ("null", MISSING),
    ("inf", INFINITE), ("-Infinity", INFINITE), ("1e400", INFINITE),
    ("1,5", POINT), ("1,234.5", POINT), ("1.234,5", POINT), ("1 234", POINT), ("1'234", POINT), ("1_000", POINT),
    ("1\u202f234", POINT), ("12 kg", ALONE), ("50%", ALONE), ("$5", ALONE), ("0x10", ALONE), ("True", WORD),
    ("1e200", "beyond 1e+100"), (None, "is empty"), (True, WORD), (float("nan"), "is empty"),
    (10**400, INFINITE), ([1], WORD), ({"a": 1}, WORD), (b"1", WORD),
])  # fmt: skip
def test_what_is_no_number(cell, part):
    with pytest.raises(UserError) as caught:
        number_of(cell, "a.csv, line 3")
    assert str(caught.value).startswith("a.csv, line 3: ") and part in str(caught.value)


@options(max_examples=200, deadline=None, derandomize=True)
@given(st.one_of(st.text(), st.floats(), st.integers(), st.booleans(), st.none(), st.lists(st.floats())))
def test_any_cell_is_a_number_or_is_refused(cell):
    try:
        number = number_of(cell, "here")
    except UserError as error:
        assert str(error).startswith("here: ") and "\n" not in str(error)
    else:
        assert abs(number) <= 1e100 and (isinstance(cell, str) or number == cell)


@pytest.mark.parametrize("y, names, says", [
    (np.zeros((7, 2)), None, "y is float64 (7, 2); it must be numbers (24, columns), a row for each series"),
    (np.zeros((2, N)), None, "y is float64 (2, 24)"), (np.zeros(7), None, "y is float64 (7,); it must be numbers, one"),
    (np.zeros((N, 2, 2)), None, "y is float64 (24, 2, 2)"), (np.zeros((N, 0)), None, "y is float64 (24, 0)"),
    (np.array(3.0), None, "y is float64 ()"), (np.zeros(N) * 1j, None, "y is complex128 (24,)"),
    (np.zeros((N, 2)), ["p"], "target_names is p; it must be 2 different names, one for each column of y (24, 2)"),
    (np.zeros((N, 2)), ["p", "p"], "target_names is p, p; it must be 2 different"),
    (np.zeros((N, 2)), [1, 2], "target_names is int64 (2,); it must be text"),
])  # fmt: skip
def test_targets_of_the_wrong_shape(tmp_path, y, names, says):
    np.savez(tmp_path / "a.npz", x=SERIES, y=y, **({} if names is None else {"target_names": names}))
    assert says in message(tmp_path / "a.npz", "sequences", task="regression")


def test_bad_numbers_of_several_are_named_by_column(tmp_path):
    y = np.stack([PRICES, WEIGHTS], 1)
    y[4, 1], y[9, 0] = np.inf, np.nan
    np.savez(tmp_path / "a.npz", x=SERIES, y=y, target_names=["price", "weight"])
    assert message(tmp_path / "a.npz", "sequences", task="regression").split("\n") == [
        f"{tmp_path / 'a.npz'}, row 5, 'weight': label inf is not a finite number; correct it, or remove the row",
        f"{tmp_path / 'a.npz'}, row 10, 'price': the label is empty; fill it in, or remove the row",
    ]
    lists = [[1, n] for n in range(N - 2)] + [[1], 3]
    text = message(objects(tmp_path / "a.jsonl", lists), task="regression")
    assert "line 23: the label is 1 number; there must be 2, of label 1, label 2" in text and "line 24: " in text


@pytest.mark.parametrize("given, says", [
    ({"label_column": "price,wieght"}, "no column 'wieght'; there are text, price, weight"),
    ({"label_column": "price,price"}, "label_column: 'price,price': 'price' is there more than once"),
    ({"label_column": ","}, "label_column: ',': names no column; write for example price,weight"),
])  # fmt: skip
def test_columns_that_are_not_there(tmp_path, given, says):
    assert says in message(of_columns(tmp_path)[0], task="regression", **given)


def test_the_names_of_columns():
    settings = resolve(file={"label_column": 'a, "price, net",b', "task": "regression"})[0]
    assert label_columns(settings) == ["a", "price, net", "b"] == names_in(settings.label_column)
    assert label_columns(resolve(file={"label_column": "a, b"})[0]) == ["a, b"]


@pytest.mark.parametrize("labels, says", [
    ([1.5], "1 sample cannot be split; more are needed"), ([1.5, 2], "1 sample cannot be split"),
])  # fmt: skip
def test_too_few_samples(tmp_path, labels, says):
    assert says in message(texts(tmp_path / "a.csv", labels), task="regression")


def test_a_number_of_another_world_in_the_test_data(tmp_path):
    """Its square would be infinite, when the test comes at last."""
    path, test = texts(tmp_path / "a.csv", PRICES), texts(tmp_path / "b.csv", [1, 2, 1e30])
    text = message(path, task="regression", test_path=str(test))
    assert text.startswith(f"{test}, line 4: label is 1e+30, in training 1.8") and "correct it" in text


@pytest.mark.parametrize("scale, offset", [(1, 0), (1e9, 0), (1e-9, 0), (1, 1e9), (-1e9, 1e12)])
def test_numbers_of_any_scale_are_written_as_they_were(tmp_path, scale, offset):
    numbers = [round(offset + scale * n, 12) for n in range(-9, 15)]
    task, targets, _ = loaded(texts(tmp_path / "a.csv", numbers), task="regression")
    values = np.stack(list(targets.values()))
    standardised = task.stack(values)
    assert standardised.dtype.is_floating_point and standardised.abs().max() < 4
    rows = task.rows(standardised, standardised)
    assert task.items(rows)["true"] == [value[0] for value in targets.values()]


# -- several labels -------------------------------------------------------------------------------------------


def names_in_cells(folder):
    return texts(folder / "a.csv", [" ; ".join(names) for names in NAMES]), {}


def names_in_lists(folder):
    return objects(folder / "a.jsonl", [names or None for names in NAMES]), {}


def names_in_npz(folder):
    np.savez(folder / "a.npz", x=SERIES, y=np.array([";".join(names) for names in NAMES]))
    return folder / "a.npz", {"dataset": "sequences"}


def names_in_ts(folder):
    return ts(folder / "a.ts", map(";".join, NAMES), "@classLabel true a b c"), {"dataset": "sequences"}


def columns_of_npz(folder, dtype=np.int64):
    np.savez(folder / "a.npz", x=SERIES, y=np.array(HOT, dtype), class_names=list("abc"))
    return folder / "a.npz", {"dataset": "sequences"}


def columns_of_bools(folder):
    return columns_of_npz(folder, bool)


def columns_of_floats(folder):
    return columns_of_npz(folder, np.float32)


def columns_of_a_table(folder):
    return texts(folder / "a.csv", HOT, "abc"), {"label_column": "a,b,c"}


def objects_of_labels(folder):
    return objects(folder / "a.jsonl", [dict(zip("abc", map(bool, hot), strict=True)) for hot in HOT]), {}


@pytest.mark.parametrize("write", [
    names_in_cells, names_in_lists, names_in_npz, names_in_ts, columns_of_npz, columns_of_bools, columns_of_floats,
    columns_of_a_table, objects_of_labels,
])  # fmt: skip
def test_several_labels_are_the_same_in_every_format(tmp_path, write):
    path, given = write(tmp_path)
    task, targets, notes = loaded(path, task="multilabel", **given)
    assert task.class_names == ["a", "b", "c"] and notes == []
    assert {id: target.tolist() for id, target in targets.items()} == {str(n + 1): hot for n, hot in enumerate(HOT)}


def test_columns_without_names(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=SERIES, y=np.array(HOT))
    assert loaded(path, "sequences", task="multilabel")[0].class_names == ["label 1", "label 2", "label 3"]
    assert "for several labels of a series, 1 or 0 each, say --task multilabel" in message(path, "sequences")


@pytest.mark.parametrize("row, column, value", [(2, 1, 2), (5, 0, 0.5), (7, 2, np.nan), (7, 2, -1)])
def test_columns_of_other_values_than_0_and_1(tmp_path, row, column, value):
    y = np.array(HOT, float)
    y[row, column] = value
    np.savez(tmp_path / "a.npz", x=SERIES, y=y, class_names=list("abc"))
    place = f"{tmp_path / 'a.npz'}, row {row + 1}, {'abc'[column]!r}: "
    text = message(tmp_path / "a.npz", "sequences", task="multilabel")
    assert text.startswith(place) and "is neither 1 (the item has the label) nor 0; correct it" in text


@pytest.mark.parametrize("cell", ["", "2", "yes"])
def test_cells_of_a_column_that_are_neither(tmp_path, cell):
    rows = [*HOT[:3], [1, cell, 0], *HOT[4:]]
    path = texts(tmp_path / "a.csv", rows, "abc")
    text = message(path, task="multilabel", label_column="a,b,c")
    assert text == f"{path}, line 5, 'b': {cell!r} is neither 1 (the item has the label) nor 0; correct it"


def test_a_label_that_no_training_item_has(tmp_path):
    y = np.array(HOT)
    y[:, 1] = 0
    np.savez(tmp_path / "a.npz", x=SERIES, y=y, class_names=list("abc"))
    for path, dataset in ((tmp_path / "a.npz", "sequences"), (texts(tmp_path / "a.csv", y.tolist(), "abc"), "text")):
        columns = {"label_column": "a,b,c"} if dataset == "text" else {}
        assert f"{path}: no training item has the label 'b'; leave its column out" in message(
            path, dataset, task="multilabel", **columns)  # fmt: skip
    assert "no training item has a label; separate several ones by ';'" in message(
        texts(tmp_path / "a.csv", [""] * N), task="multilabel")  # fmt: skip


def test_a_label_must_not_look_like_several(tmp_path):
    lines = "\n".join(json.dumps({"text": f"t {n}", "label": [["a;b"], ["c"]][n % 2]}) for n in range(N))
    (tmp_path / "a.jsonl").write_text(lines)
    assert message(tmp_path / "a.jsonl", task="multilabel") == (
        "label 'a;b' holds ';', which stands between labels in tables; rename it"
    )


def test_numbers_by_place_and_by_name_are_not_mixed(tmp_path):
    rows = [{"price": 1000 + n, "weight": n / 10} if n % 2 == 0 else [1000 + n, n / 10] for n in range(N)]
    objects(tmp_path / "a.jsonl", rows)
    errors = message(tmp_path / "a.jsonl", task="regression").split("\n")
    assert f"{tmp_path / 'a.jsonl'}, line 2: the label is a list, other labels are objects; write all as" in errors[0]
    assert len(errors) == 11 and errors[-1] == "and 2 more like these"


def test_numbers_too_close_to_be_squared(tmp_path):
    path = texts(tmp_path / "a.csv", [f"{n}e-170" for n in range(N)])
    assert "label differs by less than a computer can square" in message(path, task="regression")


def test_a_label_of_the_test_data_that_training_does_not_know(tmp_path):
    path, _ = names_in_cells(tmp_path)
    test = texts(tmp_path / "b.csv", ["a;b", "a;D;c", "C", ""])
    assert message(path, task="multilabel", test_path=str(test)).split("\n") == [
        f"{test}, line 3: label 'D' does not occur in the training data; correct or remove it",
        f"{test}, line 4: label 'C' does not occur in the training data (there is 'c'); correct or remove it",
    ]
    assert f"{ts(tmp_path / 'a.ts', ['a;x'], '@classLabel true a b')}, line 5: label 'x' is not one of" in message(
        tmp_path / "a.ts", "sequences", task="multilabel")  # fmt: skip


@pytest.mark.parametrize("y, names, says", [
    (np.zeros((7, 3)), None, "y is float64 (7, 3); it must be numbers (24, columns)"),
    (np.array(HOT).T, None, "y is int64 (3, 24)"), (np.zeros((N, 2, 2)), None, "y is float64 (24, 2, 2)"),
    (np.array(HOT), list("ab"), "class_names is a, b; it must be 3 different names"),
    (np.array(HOT)[:, 0], list("ab"), "y is int64 (24,); it must be numbers (24, columns), a row for each series; "
                                      "class_names names the columns"),
])  # fmt: skip
def test_labels_of_the_wrong_shape(tmp_path, y, names, says):
    np.savez(tmp_path / "a.npz", x=SERIES, y=y, **({} if names is None else {"class_names": names}))
    assert says in message(tmp_path / "a.npz", "sequences", task="multilabel")


def test_slips_in_several_labels_are_said(tmp_path):
    def notes(cells):
        return "\n".join(loaded(texts(tmp_path / "a.csv", cells * 6), task="multilabel")[2])

    assert "'a|b' seems to hold several names" in notes(["a|b", "a", "b", "c"]) and "by ';'" in notes(["a|b", "a", "b"])
    assert "differ only in case" in notes(["a;b", "A", "b"]) and "missing value" in notes(["a;nan", "b", "c"])


def test_a_split_holds_out_what_was_asked_of_many_combinations(tmp_path):
    """Each of them is rare, yet of every label that several items have, training keeps one."""
    rng = np.random.default_rng(0)
    cells = [";".join(f"l{i:02}" for i in np.flatnonzero(rng.random(12) < 0.3)) for _ in range(400)] + ["rare"]
    path = texts(tmp_path / "a.csv", cells)
    splits, info = load_splits(settings_of(path, "text", task="multilabel"))
    sizes, task = info["split_sizes"], from_description(info["task"])
    assert 74 <= sizes["test"] <= 90 and 28 <= sizes["val"] <= 40
    assert splits["train"].labels.any(0).all() and splits["train"].labels[:, task.class_names.index("rare")].sum() == 1


# -- all ------------------------------------------------------------------------------------------------------


def test_cells_mean_the_same():
    for one, other in ((1, "1.0"), ("0.5", 0.50), ({"a": 1, "b": "x"}, {"a": "1.0", "b": "x"})):
        assert same_label(one, other)
    for one, other in (("0.5", "0.6"), ({"a": 1}, {"b": 1}), ("a", None), ({"a": 1}, {"a": 2})):
        assert not same_label(one, other)
    assert class_names_of("b; a;;", "") == ["b", "a"] and class_names_of({"a": 0, "b": "1"}, "") == ["b"]


@pytest.mark.parametrize("kind", [Classification, Regression, MultiLabel])
@pytest.mark.parametrize("bad", [["x"] * 2, [None] * 2])
def test_labels_of_which_none_can_be_used(tmp_path, kind, bad):
    """What is wrong is said even where there is nothing to make a task of."""
    path = objects(tmp_path / "a.jsonl", bad)
    assert str(path) in message(path, task=kind.kind)
