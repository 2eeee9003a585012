"""Users' own files: values, order and labels as they stand there; mistakes by file, line, value and remedy."""

import csv
import json
import os
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from user_files import image_file, message, quick, write

from config import Settings
from data_files import (
    read_manifest,
    read_series,
    read_texts,
    without_effect,
)
from messages import UserError
from series_files import read_one_series
from tables import read_table

numbers = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(min_size=1).filter(str.strip)  # any Unicode but surrogates
labels = texts.map(str.strip)


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


# --- Series: values --------------------------------------------------------------------------------------------------

HEADER = "@problemName Speakers of vowels\n@timeStamps false\n@univariate false\n@classLabel true a b\n"


def test_ts(tmp_path):
    path = write(tmp_path / "a.TS", "# about\n" + HEADER + "# more\n@DATA\n"
                 "1,?,3:4,NaN,6e-1:b\n\n# within\n 7 : 8 : a\r\n")
    items = read_series(path)
    same(items.values, [np.array([[1, 4], [np.nan, np.nan], [3, 0.6]]), np.array([[7.0, 8.0]])])
    assert items.labels == ["b", "a"] and items.ids == ["1", "2"]
    assert items.places == [f"{path}, line 8", f"{path}, line 11"]


def test_ts_comments_of_any_encoding(tmp_path):
    path = write(tmp_path / "a.ts", ("#60–100 bpm\n%Sources\n" + HEADER + "@data\n% more\n1:a\n").encode("cp1252"))
    items = read_series(path)
    assert items.labels == ["a"] and items.places == [f"{path}, line 9"]


def test_ts_without_labels(tmp_path):
    """The labels of a file that has them are split off; one that has none is read whole."""
    for name, label in (("true a b", ":z"), ("false", "")):
        path = write(tmp_path / "a.ts", f"@dimension 2\n@classlabel {name}\n@data\n1,2:3,4{label}\n")
        items = read_series(path, labelled=False)
        same(items.values, [np.array([[1.0, 3.0], [2.0, 4.0]])])
        assert items.labels is None


def test_long_table(tmp_path):
    path = write(tmp_path / "a.csv", "when,id,label,x\n1,b,up,5\n1,a,down, 6\n?,b,up,NA\n3,b, up ,\n")
    items = read_series(path)
    same(items.values, [np.array([[1.0, 5], [np.nan, np.nan], [3, np.nan]]), np.array([[1.0, 6]])])
    assert (items.ids, items.labels, items.columns) == (["b", "a"], ["up", "down"], ["when", "x"])
    assert items.places == [f"{path}, line 2", f"{path}, line 3"]
    unlabelled = read_series(path, labelled=False)
    same(unlabelled.values, items.values)
    assert unlabelled.labels is None and unlabelled.columns == ["when", "x"]


def test_npz(tmp_path):
    path, x = tmp_path / "a.npz", np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    np.savez(path, x=x, y=np.array([1.0, 0.0]), lengths=[2, 4], id=["p", "q"])
    items = read_series(path)
    same(items.values, [x[0, :2].astype(float), x[1].astype(float)])
    assert (items.labels, items.ids, items.places[1]) == ([1.0, 0.0], ["p", "q"], f"{path}, row 2")
    np.savez(path, x=x[0], lengths=[1, 3], y=np.array(["not looked at", None], object))
    same(read_series(path, labelled=False).values, [x[0, :1].astype(float), x[0, 1:].astype(float)])
    np.savez(path, x=x[0], y=np.array([b"u", b"v", b"u", b"u"]))
    items = read_series(path)
    same(items.values, [row[:, None].astype(float) for row in x[0]])
    assert items.labels == ["u", "v", "u", "u"] and items.ids == ["1", "2", "3", "4"]


def test_arff(tmp_path):
    """Univariate, as Weka and the UCR archive write it; the labels are in the last attribute or the named one."""
    head = "% about 60–100\n@relation 'a b'\n@ATTRIBUTE att0 numeric\n@attribute 'att 1' REAL\n"
    text = head + "@attribute target {1, 'two words'}\n\n@DATA\n% more\n0.5,?,1\n2, 3,'two words'\n"
    path = write(tmp_path / "a.arff", text.encode("cp1252"))
    items = read_series(path)
    same(items.values, [np.array([[0.5]]), np.array([[2.0], [3.0]])])
    assert items.labels == ["1", "two words"] and items.places == [f"{path}, line 9", f"{path}, line 10"]
    assert read_series(path, labelled=False).labels is None
    moved = "@attribute kind {a,b}\n@attribute id string\n@attribute x0 numeric\n@attribute x1 numeric\n@data\n"
    items = read_series(write(tmp_path / "b.arff", moved + "b,'q 1',1,2\n"), Settings(label_column="kind"))
    assert items.labels == ["b"] and items.ids == ["q 1"]
    same(items.values, [np.array([[1.0], [2.0]])])


@pytest.mark.parametrize("content, expected", [
    ("@relation a\n", "there is no series after a line @data"),
    ("@attribute x real\n@data\n", "there is no series after a line @data"),
    ("@data\n1\n", "there is no @attribute before @data"),
    ("@attribute x real\n@attribute y real\n@data\n1,2\n", "no nominal attribute"),
    ("@attribute x real\n@attribute x {a}\n@data\n1,a\n", "line 2: '@attribute x {a}' is there twice"),
    ("@attribut x real\n@data\n1,a\n", "line 1: '@attribut x real' is none of @relation, @attribute"),
    ("@attribute x real\n@attribute c {a,b}\n@data\n1,c\n", "line 4: label 'c' is not one of @attribute c, a, b"),
    ("@attribute x real\n@attribute c {a,'b}\n@data\n1,c\n", "a.arff: @attribute c \"{a,'b}\": unexpected end of data"),
    ("@attribute x real\n@attribute c {a}\n@data\n1,2,a\n", "line 4: 3 values for 2 attributes; make them equal"),
    ("@attribute x real\n@attribute c {a}\n@data\n{0 1, 1 a}\n", "line 4: sparse rows are not read"),
    ("@attribute x real\n@attribute c {a}\n@data\n'1,a\n", "line 4: unexpected end of data; close each quote"),
    ("@attribute x real\n@attribute c {a}\n@data\noops,a\n", "line 4, column 'x': 'oops' is not a finite number"),
    ("@attribute b relational\n@attribute x real\n@attribute c {a}\n@data\n", "there is no series after"),
    ("@attribute b relational\n@end b\n@attribute x real\n@attribute c {a}\n@data\n'1',2,a\n", "beside a relational"),
])
def test_arff_mistakes(tmp_path, content, expected):
    assert expected in message(read_series, write(tmp_path / "a.arff", content))


def test_a_missing_label_of_an_arff_is_none(tmp_path):
    path = write(tmp_path / "a.arff", "@attribute x real\n@attribute c {a}\n@data\n1,?\n2,a\n")
    assert read_series(path).labels == [None, "a"]


@pytest.mark.parametrize("quote", ["'", '"'])
def test_arff_of_several_channels(tmp_path, quote):
    """A relational attribute, whose lines are the channels."""
    head = "@relation a\n@attribute bag relational\n  @attribute t0 numeric\n  @attribute t1 numeric\n@end bag\n"
    head += "@attribute target {up,down}\n@data\n"
    path = write(tmp_path / "a.arff", head + f"{quote}1,2\\n3,?{quote},up\n{quote}5,6\\n7,8{quote},down\n")
    items = read_series(path)
    same(items.values, [np.array([[1.0, 3.0], [2.0, np.nan]]), np.array([[5.0, 7.0], [6.0, 8.0]])])
    assert items.labels == ["up", "down"] and items.ids == ["1", "2"]
    ragged = write(tmp_path / "b.arff", head + "'1,2\\n3',up\n")
    assert "line 8: ragged, its dimensions have 1, 2 values" in message(read_series, ragged)


@pytest.mark.parametrize("name, delimiter", [("a.tsv", "\t"), ("a.txt", "  "), ("b.txt", ",")])
def test_a_line_per_series_without_a_header(tmp_path, name, delimiter):
    """The UCR archive: the label first; unequal lengths are filled up with NaN."""
    rows = [["1", "0.5", "-1"], ["-1", "2.5", "NaN"], ["1.0000000e+00", "1.5", "0"]]
    path = write(tmp_path / name, "".join(delimiter.join(row) + "\n" for row in rows))
    items = read_series(path)
    same(items.values, [np.array([[0.5], [-1.0]]), np.array([[2.5]]), np.array([[1.5], [0.0]])])
    assert items.labels == ["1", "-1", "1.0000000e+00"] and items.table_rows == "series"
    assert len(items.notes) == 1 and "each line is read as a series, its label first" in items.notes[0]
    told = Settings(table_rows="series")
    same(read_series(path, told, labelled=False).values, items.values)
    assert "line 2, field 3: 'x' is not" in message(read_series, write(path, path.read_text().replace("NaN", "x")))


def test_labels_that_are_words_without_a_header(tmp_path):
    path = write(tmp_path / "a.tsv", "walk\t0.5\t0.1\nrun\t1\t2\n")
    assert read_series(path).labels == ["walk", "run"]
    wide = write(tmp_path / "b.tsv", "label\t0\t0.5\t1\nwalk\t0.5\t0.1\t3\n")  # times are names: they rise
    same(read_series(wide, Settings(table_rows="series")).values, [np.array([[0.5], [0.1], [3.0]])])
    wide = write(tmp_path / "b.tsv", "label\t2\t1\t0\nwalk\t0.5\t0.1\t3\n")  # the name of the column of labels
    same(read_series(wide, Settings(table_rows="series")).values, [np.array([[3.0], [0.1], [0.5]])])


def test_a_series_per_row_below_a_header(tmp_path):
    expected = [np.array([[1.0], [2.0], [3.0]]), np.array([[4.0], [np.nan], [6.0]])]
    path = write(tmp_path / "a.csv", "label,t0,t1,t2\nup,1,2,3\ndown,4,,6\n")
    items = read_series(path)
    same(items.values, expected)
    assert (items.ids, items.labels, items.columns) == (["1", "2"], ["up", "down"], ["t0", "t1", "t2"])
    assert "columns t0 to t2: each row is read as a whole series (--table_rows steps" in items.notes[0]
    told = Settings(table_rows="series")
    path = write(tmp_path / "b.csv", "id,t10,t9,label,t11\np,2,1,up,3\nq,,4,down,6\n")  # sorted as text
    items = read_series(path, told)
    same(items.values, expected)
    assert items.ids == ["p", "q"]
    assert items.notes == [f"{path}: its columns are read in the order of their numbers, t9 to t11"]
    same(read_series(path, told, known=["t9", "t10", "t11"]).values, expected)
    assert "id 'p' is in several rows; if they are its steps" in message(
        read_series, write(tmp_path / "c.csv", "id,label,x\np,a,1\np,a,2\n"), told
    )
    assert "line 3, column 't1': 'x' is not a finite" in message(
        read_series, write(tmp_path / "d.csv", "label,t0,t1,t2\nup,1,2,3\ndown,4,x,6\n")
    )


def test_a_row_is_no_series_without_a_word(tmp_path):
    path = write(tmp_path / "a.csv", "name,label,x,y\n1,a,2,3\n")
    assert "if each row is a whole series, say --table_rows series" in message(read_series, path)
    path = write(tmp_path / "b.csv", "1,0.5,0.25\n2,0.5,0.75\n")
    found = message(read_series, path)
    assert "line 1: '0.25' is a number, not a column's name" in found and "--table_rows series" in found
    items = read_series(path, Settings(table_rows="series"))
    assert items.labels == ["1", "2"] and items.values[1].tolist() == [[0.5], [0.75]]


def test_names_that_pandas_counts_are_no_step(tmp_path):
    """DataFrame(array).to_csv(index=False), and with its index."""
    for content in ("0,1\n0.5,1.5\n2.5,3.5\n", ",0,1\n0,0.5,1.5\n1,2.5,3.5\n"):
        same([read_one_series(write(tmp_path / "a.csv", content))], [np.array([[0.5, 1.5], [2.5, 3.5]])])
    same([read_one_series(write(tmp_path / "a.csv", "0,1\n2,3\n"))], [np.array([[0.0, 1.0], [2.0, 3.0]])])


def test_features_are_chosen_and_ordered_by_name(tmp_path):
    path = write(tmp_path / "a.csv", 'id,when,"a,b",x,label\n1,09:00,5,6,up\n1,09:01,7,8,up\n')
    found = message(read_series, path)
    assert "line 2, column 'when': '09:00' is not" in found and "--ignore_columns when" in found
    items = read_series(path, Settings(ignore_columns="when"))
    same(items.values, [np.array([[5.0, 6], [7, 8]])])
    assert items.columns == ["a,b", "x"]
    for chosen, expected in (('x,"a,b"', [[6.0, 5], [8, 7]]), ("x", [[6.0], [8]])):
        same(read_series(path, Settings(feature_columns=chosen)).values, [np.array(expected)])
    same(read_series(path, Settings(ignore_columns="when"), known=["x", "a,b"]).values, [np.array([[6.0, 5], [8, 7]])])


def test_a_column_that_counts_the_rows_is_noted(tmp_path):
    path = write(tmp_path / "a.csv", "id,index,t,label,x\n1,0,0,a,5\n1,1,1,a,6\n2,2,0,b,6\n2,3,1,b,9\n")
    expected = f"{path}: column 'index' counts the rows; if it is no feature, leave it out: --ignore_columns index"
    assert read_series(path).notes == [expected]
    assert read_series(path, Settings(ignore_columns="index")).notes == []


@pytest.mark.parametrize("told, expected", [
    ({"feature_columns": "z"}, "no column 'z', which --feature_columns names; there are id, label, x, y"),
    ({"ignore_columns": "z"}, "no column 'z', which --ignore_columns names"),
    ({"feature_columns": "x,label"}, "feature_columns: 'label' is the id, the label or in ignore_columns"),
    ({"feature_columns": "x", "ignore_columns": "x"}, "feature_columns: 'x' is the id, the label or in ignore_columns"),
    ({"feature_columns": "x,x"}, "feature_columns: 'x' is there more than once"),
    ({"ignore_columns": "x,y"}, "no column beside 'id' and 'label'"),
])
def test_features_that_cannot_be(tmp_path, told, expected):
    path = write(tmp_path / "a.csv", "id,label,x,y\n1,a,2,3\n")
    assert expected in message(read_series, path, Settings(**told))


@pytest.mark.parametrize("header, expected", [
    ("id,label,x", "its columns are not those of the training data (x, y): y missing; rename the columns"),
    ("id,label,x,z", "y missing, z not among them; rename the columns, or leave out what is no feature: "
                     "--ignore_columns z"),
    ("id,label,x,y,z", "(x, y): z not among them; rename"),
    ("id,label,x,Y", "y missing, Y not among them"),
])
@pytest.mark.parametrize("labelled", [True, False])
def test_other_features_than_those_of_training(tmp_path, header, expected, labelled):
    rows = ["0"] * header.count(",")
    path = write(tmp_path / "a.csv", f"{header}\n1,{','.join(rows)}\n")
    assert expected in message(read_series, path, labelled=labelled, known=["x", "y"])
    path = write(tmp_path / "one.csv", header.removeprefix("id,label,") + "\n" + ",".join(rows[1:]) + "\n")
    assert expected in message(read_one_series, path, known=["x", "y"])


def test_features_of_one_series_are_ordered_by_name(tmp_path):
    path = write(tmp_path / "a.csv", "y,x\n1,2\n3,4\n")
    expected = np.array([[2.0, 1.0], [4.0, 3.0]])
    same([read_one_series(path, known=["x", "y"]), *read_series(path, labelled=False, known=["x", "y"]).values],
         [expected, expected])
    same(read_series(write(tmp_path / "a.tsv", "1\t2\n3\t4\n"), labelled=False).values, [np.array([[1.0, 2], [3, 4]])])
    path = write(tmp_path / "b.csv", "1,2\n3,4\n")
    items = read_series(path, labelled=False, known=["x", "y"])
    assert items.notes == [f"{path}: names no columns, so they are taken in the order of training: x, y"]


def test_decimal_commas(tmp_path):
    """Of a file with semicolons, and of the whole of it: 1.234 would be a thousand there."""
    path = write(tmp_path / "a.csv", "id;x;y;label\n1;-1,5;2;a\n1;,25;;a\n")
    items = read_series(path)
    same(items.values, [np.array([[-1.5, 2], [0.25, np.nan]])])
    assert items.notes[1] == f"{path}: a comma is the decimal point in it"
    path = write(path, "id;x;y;label\n1;-1,5;2;a\n1;1.234;4;a\n")
    assert "line 3, column 'x': '1.234' is not a finite number" in message(read_series, path)
    path = write(path, "id;x;y;label\n1;-1,5;2.5;a\n1;1,25;4.5;a\n")
    assert "in other cells of the table a comma is the decimal point; write all" in message(read_series, path)
    path = write(path, 'id,x,label\n1,"1,5",a\n')
    assert "write numbers with a decimal point" in message(read_series, path)
    same([read_one_series(write(path, "1,5;2\n3;4,5\n"))], [np.array([[1.5, 2], [3, 4.5]])])


@pytest.mark.parametrize("cell", ["", "?", "NA", "NaN", "nan", "NULL", "null", "None", "N/A", "#N/A", "<NA>", " "])
def test_cells_that_are_missing(tmp_path, cell):
    path = write(tmp_path / "a.csv", f"id,label,x,y\n1,a,{cell},1\n1,a,2,3\n")
    same(read_series(path).values, [np.array([[np.nan, 1], [2, 3]])])


def test_an_index_that_was_read_and_written_again_is_no_feature(tmp_path):
    path = write(tmp_path / "a.csv", "Unnamed: 0,id,label,x\n0,1,a,5\n1,1,a,6\n")
    items = read_series(path)
    assert items.columns == ["x"]
    assert items.notes == [f"{path}: column 'Unnamed: 0' counts the rows, so it is left out"]
    assert read_series(path, Settings(feature_columns="Unnamed: 0,x")).columns == ["Unnamed: 0", "x"]
    path = write(path, "Unnamed: 0,id,label,x\n0.5,1,a,5\n1,1,a,6\n")
    assert read_series(path).columns == ["Unnamed: 0", "x"]


def test_the_rows_of_a_series_may_spell_its_label_in_two_ways(tmp_path):
    path = write(tmp_path / "a.csv", "id,label,x\n1,1,2\n1,1.0,3\n")
    assert read_series(path).labels == ["1"]
    path = write(tmp_path / "a.ts", "@classLabel true 1 2\n@data\n5:1.0\n6:2\n")
    assert read_series(path).labels == ["1.0", "2"]


def test_archives_that_unpack_beyond_the_limit(tmp_path):
    x = np.zeros((300, 1000, 120))  # 288 MB in 0.3 MB
    np.savez_compressed(tmp_path / "a.npz", x=x, y=np.arange(300) % 2)
    found = message(read_series, tmp_path / "a.npz")
    assert "unpacks to 0.3 GiB" in found and "raise --max_unpacking (now 100)" in found
    assert len(read_series(tmp_path / "a.npz", Settings(max_unpacking=2000)).values) == 300
    np.savez_compressed(tmp_path / "b.npz", x=x[:20], y=np.arange(20) % 2)  # small enough for any ratio
    assert len(read_series(tmp_path / "b.npz").values) == 20


def test_what_an_archive_holds_beside_is_not_unpacked(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((2, 3)), y=[0, 1], z=np.array([object()]))
    assert "holds x, y, z; it must hold x and y" in message(read_series, tmp_path / "a.npz")


def test_a_header_that_claims_more_than_there_is(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    assert "mmap length is greater than file size" in message(read_one_series, tmp_path / "a.npy")


@pytest.mark.parametrize("name", ["a.ts", "a.npz", "a.npy", "a.csv", "a.arff", "a.txt"])
def test_devices_are_not_read(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/zero")
    assert "is a pipe, a device or a folder" in message(read_series, tmp_path / name, labelled=False)


def test_settings_that_say_nothing_to_a_file_are_noted():
    given = ["id_column", "encoding", "max_unpacking", "batch_size"]
    assert without_effect([Path("a.ts")], given) == [
        "id_column has no effect on .ts files",
        "max_unpacking has no effect on .ts files",
    ]
    assert without_effect([Path("a.csv"), Path("b.npz")], given) == []
    assert without_effect([Path("folder")], given) == []


def test_padding_at_the_end_is_cut(tmp_path):
    np.save(tmp_path / "a.npy", [[np.nan, np.nan], [1, np.nan], [np.nan, 2], [np.nan, np.nan]])
    [values] = read_series(tmp_path / "a.npy", labelled=False).values
    same([values], [np.array([[np.nan, np.nan], [1, np.nan], [np.nan, 2]])])


@pytest.mark.parametrize("content", ["x,y\n1,2\n,4\n", "1,2\n?,4\n", "\ufeff1,2\r\nnan,4\r\n"])
def test_one_series(tmp_path, content):
    for name, text in (("a.csv", content), ("a.tsv", content.replace(",", "\t"))):
        same([read_one_series(write(tmp_path / name, text))], [np.array([[1.0, 2], [np.nan, 4]])])
    np.save(tmp_path / "a.npy", np.array([1, 2]))
    same([read_one_series(tmp_path / "a.npy")], [np.array([[1.0], [2]])])


@st.composite
def series_sets(draw):
    channels = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    values = st.one_of(numbers, st.just(np.nan))
    found = [np.array(draw(st.lists(st.lists(values, min_size=channels, max_size=channels), min_size=n, max_size=n)))
             for n in lengths]
    assume(all(not np.isnan(steps[-1]).all() for steps in found))
    return found, draw(st.lists(labels, min_size=len(lengths), max_size=len(lengths)))


@quick
@given(series_sets())
def test_series_come_back(tmp_path, data):
    series, names = data
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *(f"channel {c}" for c in range(series[0].shape[1])), "label"])
        writer.writerows([n, *map(repr, step.tolist()), names[n]] for n, steps in enumerate(series) for step in steps)
    np.savez(tmp_path / "a.npz", x=np.concatenate(series), y=np.array(names, object).astype(str),
             lengths=[len(steps) for steps in series])
    for name in ("a.csv", "a.npz"):
        items = read_series(tmp_path / name)
        same(items.values, series)
        assert name == "a.npz" or items.labels == names  # NumPy drops NUL at the end of a text
    lines = [":".join([*(",".join(map(repr, channel)) for channel in steps.T.tolist()), str(n % 2)])
             for n, steps in enumerate(series)]
    write(tmp_path / "a.ts", "\n".join(["@classLabel true 0 1", "@data", *lines]))
    items = read_series(tmp_path / "a.ts")
    same(items.values, series)
    assert items.labels == [str(n % 2) for n in range(len(series))]


# --- Series: mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, expected", [
    ("@classLabel true a\n1:a\n@data\n", "a.ts, line 2: '1:a' is none of the tags"),
    ("@classLabel true a\n", "no line @data"),
    ("@timeStamps true\n@classLabel true a\n@data\n", "line 1: '@timeStamps true': series with time stamps"),
    ("@targetLabel true\n@data\n1:2\n", "@targetLabel true, so its labels are numbers; say --task regression"),
    ("@targetLabel true\n@classLabel true a\n@data\n1:2\n", "@classLabel and @targetLabel; say false of one"),
    ("@classLabel true 1\n@data\n1\n", "line 3: there is no ':' between series and label"),
    ("@classLabel false\n@data\n1\n", "no @classLabel true"),
    ("@classLabel true\n@data\n1\n", "line 1: '@classLabel true' must name the labels"),
    ("@univariate maybe\n@data\n", "line 1: '@univariate maybe' must say true or false"),
    ("@dimensions none\n@data\n", "line 1: '@dimensions none' must give a whole number"),
    ("@missing true\n@missing true\n@data\n", "line 2: '@missing true' is there twice"),
    ("@classLabel true a\n@data\n# nothing\n", "no series after @data"),
    ("@dimensions 2\n@classLabel true a\n@data\n1:2:3:a\n", "line 4: 3 dimensions, 2 by @dimensions"),
    ("@univariate true\n@classLabel true a\n@data\n1:2:a\n", "line 4: 2 dimensions, the header says @univariate true"),
    ("@seriesLength 3\n@classLabel true a\n@data\n1,2:a\n", "line 4: 2 steps, 3 by @seriesLength"),
    ("@equalLength true\n@classLabel true a\n@data\n1,2:a\n1:a\n", "line 5: 1 steps, 2 by"),
    ("@classLabel true a\n@data\n1:2:a\n1:a\n", "line 4: 1 dimensions, 2 by"),
    ("@classLabel true a b\n@data\n1:2:c\n", "line 3: label 'c' is not one of @classLabel, a, b"),
    ("@classLabel true a\n@data\n1,2:3:a\n", "line 3: ragged, its dimensions have 1, 2 values"),
    ("@classLabel true a\n@data\n1,2:3,x:a\n", "line 3, dimension 2, value 2: 'x' is not a finite number"),
    ("@classLabel true a\n@data\n1,inf:a\n", "line 3, dimension 1, value 2: 'inf' is not a finite number"),
    ("@classLabel true a\n@data\n?,?:a\n", "line 3: all 2 values of the series are missing"),
    (b"@data\n1:\xff\n", "line 2: byte 0xff is not UTF-8"),
])
def test_ts_mistakes(tmp_path, content, expected):
    assert expected in message(read_series, write(tmp_path / "a.ts", content))


@pytest.mark.parametrize("content, expected", [
    ("", "a.csv: is empty; its first line must name the columns"),
    ("id,label,x\n", "a.csv: holds no row"),
    ("id,label,x,x\n1,a,2,3\n", "line 1: column 'x' is there more than once"),
    (",id,label,x\n1,1,a,2\n", "line 1: column 1 has no name"),
    ("id,labels,x\n1,a,2\n", "no column 'label'; there are id, labels, x: name the right one"),
    ("name,label,x\n1,a,2\n", "no column 'id'"),
    ("id,label\n1,a\n", "no column beside 'id' and 'label'"),
    ("id,label,x\n1,a,2\n1,a\n", "line 3: 2 fields for 3 columns"),
    ("id,label,x\n1,a,2,3\n", "line 2: 4 fields for 3 columns"),
    ("id,label,x\n1,a,2\n\n1,a,b\n", "line 4, column 'x': 'b' is not a finite number"),
    ("id,label,x\n1,a,1_000\n", "line 2, column 'x': '1_000' is not"),
    ("id,label,x\n1,a,-inf\n", "line 2, column 'x': '-inf' is not a finite number"),
    ("id,label,x\n1,a,2\n1,b,2\n", "line 3: label 'b' of series '1', but 'a' in line 2"),
    ("id,label,x\n ,a,2\n", "line 2: the series id in column 'id' is empty"),
    ("id,label,x\n1,a,\n1,a,?\n", "line 2: all 2 values of the series are missing"),
    ('id,label,x\n1,a,"2\n', "line 2: unexpected end of data; close each quote"),
    ("id,label,x\n1,a,2\n\r\n2,\xff,1\n".encode("latin-1"), "line 4: byte 0xff is not UTF-8"),
])
def test_long_table_mistakes(tmp_path, content, expected):
    assert expected in message(read_series, write(tmp_path / "a.csv", content))


@pytest.mark.parametrize("arrays, expected", [
    ({"x": np.ones((2, 3))}, "holds x; it must hold x and y"),
    ({"X": np.ones((2, 3)), "y": [0, 1]}, "holds X, y; it must hold x and y"),
    ({"x": np.ones((2, 3)), "y": [0, 1], "z": [0]}, "holds x, y, z; it must hold x and y, and of other"),
    ({"x": np.ones(3), "y": [0, 1, 2]}, "x is float64 (3,); it must be numbers (series, steps, channels)"),
    ({"x": np.array(["a"]), "y": [0]}, "x is <U1 (1,)"),
    ({"x": np.array([[1], [1, 2]], object), "y": [0, 1]}, "series of unequal length as one array x and"),
    ({"x": np.ones((2, 3)), "y": [0, 1, 2]}, "y is int64 (3,); it must be whole numbers or text, one for each"),
    ({"x": np.ones((2, 3, 1)), "y": [0, 1], "lengths": [3, 4]}, "lengths go from 3 to 4; x (2, 3, 1) has no"),
    ({"x": np.ones((2, 3, 1)), "y": [0, 1], "lengths": [-1, 3]}, "lengths go from -1 to 3"),
    ({"x": np.ones((2, 3, 1)), "y": [0, 1], "lengths": [1.0, 3]}, "lengths is float64 (2,); it must be whole numbers"),
    ({"x": np.ones((5, 1)), "y": [0, 1], "lengths": [1, 3]}, "lengths sum to 4, x (steps, channels) has 5 steps"),
    ({"x": np.ones((2, 3)), "y": [0, 1], "id": ["a", "a"]}, "id 'a' is there more than once"),
    ({"x": np.ones((2, 3)), "y": np.array(["a", "b"], object)}, "save labels as y.astype(str)"),
    ({"x": np.ones((2, 3)), "y": [0, 1], "id": ["a", ""]}, "row 2: the id is empty"),
    ({"x": np.ones((2, 3)), "y": [b"a", b"\xff"]}, "y is not UTF-8"),
    ({"x": np.array([[1, 2], [np.inf, 1]]), "y": [0, 1]}, "row 2, step 1, channel 1: inf is not a finite number"),
    ({"x": np.ones((2, 3, 1)), "y": [0, 1], "lengths": [3, 0]}, "row 2: the series is empty, it has shape (0, 1)"),
])
def test_npz_mistakes(tmp_path, arrays, expected):
    np.savez(tmp_path / "a.npz", **arrays)
    assert expected in message(read_series, tmp_path / "a.npz")


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "bomb"),)

    write(tmp_path / "a.npy", pickle.dumps(Bomb()))
    np.save(tmp_path / "b.npy", np.array([Bomb()], object), allow_pickle=True)
    np.savez(tmp_path / "c.npz", x=np.array([Bomb()], object))
    for name in ("a.npy", "b.npy", "c.npz"):
        assert "(pickled) are not read" in message(read_series, tmp_path / name, labelled=False)
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("content, expected", [
    ("x,y\n1,2\n1\n", "line 3: 1 fields for 2 columns"),
    ("1,2\n1\n", "line 2: 1 fields, 2 in line 1"),
    ("1,2\n1,a\n", "line 2, column 2: 'a' is not a finite number"),
    ("inf,inf\n1,2\n", "line 1, column 1: 'inf' is not a finite number"),
    ("x,y\n", "a.csv: the series is empty"),
    ("x\n1,2\n", "line 2: 2 fields for 1 columns"),
    ("", "a.csv: the series is empty"),
])
def test_one_series_mistakes(tmp_path, content, expected):
    assert expected in message(read_one_series, write(tmp_path / "a.csv", content))


@pytest.mark.parametrize("array, found", [(np.ones((2, 3, 4)), "float64 (2, 3, 4)"), (np.array(["a"]), "<U1 (1,)")])
def test_npy_mistakes(tmp_path, array, found):
    np.save(tmp_path / "a.npy", array)
    assert f"a.npy: holds {found}; it must be numbers" in message(read_one_series, tmp_path / "a.npy")


def test_prediction_reports_and_goes_on(tmp_path):
    path = write(tmp_path / "a.csv", "id,x\na,1\nb,?\nc,oops\nd,1\nd,1,1\ne,2\n")
    errors = []
    items = read_series(path, labelled=False, on_error=errors.append)
    assert items.ids == ["a", "e"] and len(errors) == 3
    assert "line 3" in str(errors[0]) and "line 4" in str(errors[1]) and "line 6" in str(errors[2])
    write(tmp_path / "a.ts", "@classLabel true a\n@data\n1,2:3:a\n5:6:a\n7:a\n")
    errors.clear()
    items = read_series(tmp_path / "a.ts", on_error=errors.append)
    assert items.ids == ["2"] and len(errors) == 2  # a bad first series does not decide on the channels


@pytest.mark.parametrize("read, name, expected", [
    (read_series, "a.xlsx", "unknown extension '.xlsx'; convert it to one of .ts, .arff, .npz, .csv, .tsv, .txt"),
    (read_series, "a", "unknown extension ''"),
    (read_series, "a.npy", "a .npy file holds no label"),
    (read_texts, "a.txt", "a .txt file holds no label"),
    (read_texts, "a.json", "unknown extension '.json'; convert it to one of .csv, .tsv, .jsonl"),
    (read_series, "a.ts", "cannot be read: No such file or directory"),
    (read_series, "a.npz", "cannot be read: No such file or directory"),
    (read_one_series, "a.csv", "cannot be read: No such file or directory"),
    (read_texts, "a.jsonl", "cannot be read: No such file or directory"),
])
def test_files_that_cannot_be_read(tmp_path, read, name, expected):
    assert expected in message(read, tmp_path / name)


@settings(quick, max_examples=30)
@given(st.binary(max_size=200), st.sampled_from([
    "", "id,label,x\n1,a,", "@classLabel true a\n@data\n", '{"text": ', "@attribute c {a,'b}\n@data\n",
    "@attribute a real\n@attribute c {a,b}\n@data\n1,",
]))
def test_garbage_is_a_users_mistake(tmp_path, garbage, start):
    np.savez(tmp_path / "good.npz", x=np.ones((2, 3)), y=[0, 1])
    np.save(tmp_path / "good.npy", np.ones(3))
    starts = {"npz": (tmp_path / "good.npz").read_bytes(), "npy": (tmp_path / "good.npy").read_bytes()}
    reads = {read_series: "ts arff npz npy csv tsv txt", read_texts: "csv tsv jsonl txt", read_one_series: "npy csv",
             read_table: "csv tsv jsonl"}
    for read, extensions in reads.items():
        for extension in extensions.split():
            content = start.encode() + garbage if start else garbage
            if start and extension in starts:
                content = starts[extension][: 10 * len(garbage)] + garbage
            path = write(tmp_path / f"a.{extension}", content)
            for options in [{"labelled": True}, {"labelled": False}] if read in (read_series, read_texts) else [{}]:
                try:
                    read(path, **options)
                except UserError as error:
                    assert str(path) in str(error)


# --- Texts -----------------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.tuples(texts, labels), min_size=1, max_size=5), st.booleans())
def test_texts_come_back(tmp_path, rows, bom):
    encoding = "utf-8-sig" if bom else "utf-8"
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="", encoding=encoding) as file:
            csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    with open(tmp_path / "a.jsonl", "w", newline="", encoding=encoding) as file:
        file.writelines(json.dumps({"label": label, "text": text}, ensure_ascii=bom) + "\n" for text, label in rows)
    for name in ("a.csv", "a.tsv", "a.jsonl"):
        items = read_texts(tmp_path / name)
        assert list(items.values) == [text for text, _ in rows] and items.labels == [label for _, label in rows]
        assert items.ids == [str(n + 1) for n in range(len(rows))]
    write(tmp_path / "a.txt", rows[0][0])
    assert read_texts(tmp_path / "a.txt", labelled=False).values == [rows[0][0].removeprefix("\ufeff")]


def test_a_row_is_named_by_its_first_line(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\r\n"two\r\nlines",a\r\n\r\nthird,b\r\n" ",b\r\n')
    errors = []
    items = read_texts(path, on_error=errors.append)
    assert list(items.values) == ["two\r\nlines", "third"] and items.ids == ["1", "2"]
    assert items.places == [f"{path}, line 2", f"{path}, line 5"]
    assert str(errors[0]).startswith(f"{path}, line 6, column 'text': it is empty")


def test_labels_are_handed_on_as_they_stand(tmp_path):
    values = ["x", 1, 1.0, True, None, " y ", [1], 0.5]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": "t", "label": value}) for value in values))
    assert read_texts(path).labels == values
    assert read_texts(write(tmp_path / "a.csv", "text,label\nt,1.0\n")).labels == ["1.0"]
    assert read_texts(write(tmp_path / "b.csv", "text\nt\n"), labelled=False).labels is None


@pytest.mark.parametrize("line, expected", [
    ("{", "line 3: column 2: Expecting property name"),
    ("[1]", "line 3: [1] is not an object; write one object per line"),
    ('{"text": "a", "text": "b"}', "line 3: key 'text' is there more than once"),
    ('{"text": 3, "label": "a"}', "line 3, column 'text': it is 3, not text"),
    ('{"label": "a"}', "line 3, column 'text': it is empty"),
    ('{"text": "\\ud83d", "label": "a"}', "line 3, column 'text': it '\\ud83d' holds half a surrogate pair"),
    ("[" * 100_000, "line 3: "),
    ('{"text": ' + "1" * 5000 + "}", "line 3: Exceeds the limit"),
])
def test_jsonl_mistakes(tmp_path, line, expected):
    path = write(tmp_path / "a.jsonl", '{"text": "fine", "label": "a", "more": 1}\n\n' + line + "\n")
    assert expected in message(read_texts, path)
    errors = []
    assert read_texts(path, on_error=errors.append).ids == ["1"] and len(errors) == 1


@pytest.mark.parametrize("content, expected", [
    ("", "a.jsonl: holds no row"),
    ("\n{}\n", "a.jsonl, line 2: the object is empty"),
    ("oops\n3\n", "a.jsonl, line 1: column 1: Expecting value"),
    ('{"txt": "a"}', "no column 'text'; there are txt: name the right one"),
])
def test_jsonl_files_of_no_use(tmp_path, content, expected):
    path = write(tmp_path / "a.jsonl", content)
    assert expected in message(read_texts, path, on_error=lambda error: None)


def test_long_cells_and_many_columns(tmp_path):
    text = "a" * 300_000  # csv's own limit is 131,072
    assert read_texts(write(tmp_path / "a.csv", f"text,label\n{text},x\n")).values[0] == text
    names = ",".join(f"c{n}" for n in range(25))
    path = write(tmp_path / "b.csv", f"{names}\n{names}\n")
    assert "c18, c19 and 5 more" in message(read_texts, path)


# --- Manifests -------------------------------------------------------------------------------------------------------

COLUMNS = {"image": "photo", "text": "text", "series": "series"}


def test_manifest(tmp_path):
    image, series = image_file(tmp_path / "p/1.png"), write(tmp_path / "s.csv", "1\n")
    expected = [{"image": image, "text": " hi "}, {"series": series}]
    table = write(tmp_path / "m.csv", f"photo,text,series,label\n p/1.png , hi ,,a\n,,{series},b\n")
    rows = [{"photo": "p/1.png", "text": " hi ", "label": "a"}, {"photo": None, "series": "s.csv", "label": "b"}]
    for path in (table, write(tmp_path / "m.jsonl", "\n".join(map(json.dumps, rows)))):
        items = read_manifest(path, COLUMNS)
        assert items.values == expected and items.labels == ["a", "b"] and items.ids == ["1", "2"]
    assert read_manifest(table, {"text": "text"}, on_error=lambda error: None).values == [{"text": " hi "}]
    assert "none of the columns words; rename one of photo, text" in message(read_manifest, table, {"text": "words"})


@pytest.mark.parametrize("there, named", [("NFC", "NFD"), ("NFD", "NFC")])
def test_files_of_a_manifest_are_found_under_either_form(tmp_path, there, named):
    image = image_file(tmp_path / unicodedata.normalize(there, "개/é.png"))
    table = write(tmp_path / "m.csv", unicodedata.normalize(named, "photo,label\n개/é.png,a\n"))
    [value] = read_manifest(table, COLUMNS).values
    assert value["image"].samefile(image) and value["image"].read_bytes() == image.read_bytes()


@pytest.mark.parametrize("row, expected", [
    ("no.png,a,,x", "line 2, column 'photo': there is no file"),
    (", ,,x", "line 2: photo, text, series empty"),
    ("," + "a" * 5000 + "/,nothing\0there,x", "line 2, column 'series': there is no file"),
    ("a" * 5000 + ",,,x", "line 2, column 'photo': there is no file"),
])
def test_manifest_mistakes(tmp_path, row, expected):
    path = write(tmp_path / "m.csv", f"photo,text,series,label\n{row}\n")
    assert expected in message(read_manifest, path, COLUMNS)
