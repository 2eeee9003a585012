"""Users' own files: values, order and labels as they stand there; mistakes by file, line, value and remedy."""

import csv
import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from config import UserError
from data_files import (
    class_order,
    read_manifest,
    read_one_series,
    read_series,
    read_table,
    read_texts,
)

quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(min_size=1).filter(str.strip)  # any Unicode but surrogates
labels = texts.map(str.strip)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def message(read, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        read(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def image_file(path, colour="red", size=(3, 2), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


# -- series: values -------------------------------------------------------------------------------------------

HEADER = "@problemName Speakers of vowels\n@timeStamps false\n@univariate false\n@classLabel true a b\n"


def test_ts(tmp_path):
    path = write(tmp_path / "a.TS", "# about\n" + HEADER + "# more\n@DATA\n"
                 "1,?,3:4,NaN,6e-1:b\n\n# within\n 7 : 8 : a\r\n")
    items = read_series(path)
    same(items.values, [np.array([[1, 4], [np.nan, np.nan], [3, 0.6]]), np.array([[7.0, 8.0]])])
    assert items.labels == ["b", "a"] and items.ids == ["1", "2"]
    assert items.places == [f"{path}, line 8", f"{path}, line 11"]


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
    assert (items.ids, items.labels, items.features) == (["b", "a"], ["up", "down"], ["when", "x"])
    assert items.places == [f"{path}, line 2", f"{path}, line 3"]
    unlabelled = read_series(path, labelled=False)
    same(unlabelled.values, items.values)
    assert unlabelled.labels is None and unlabelled.features == ["when", "x"]


def test_npz(tmp_path):
    path, x = tmp_path / "a.npz", np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    np.savez(path, x=x, y=np.array([1.0, 0.0]), lengths=[2, 4], id=["p", "q"])
    items = read_series(path)
    same(items.values, [x[0, :2].astype(float), x[1].astype(float)])
    assert (items.labels, items.ids, items.places[1]) == (["1", "0"], ["p", "q"], f"{path}, row 2")
    np.savez(path, x=x[0], lengths=[1, 3], y=np.array(["not looked at", None], object))
    same(read_series(path, labelled=False).values, [x[0, :1].astype(float), x[0, 1:].astype(float)])
    np.savez(path, x=x[0], y=np.array([b"u", b"v", b"u", b"u"]))
    items = read_series(path)
    same(items.values, [row[:, None].astype(float) for row in x[0]])
    assert items.labels == ["u", "v", "u", "u"] and items.ids == ["1", "2", "3", "4"]


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


# -- series: mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, expected", [
    ("@classLabel true a\n1:a\n@data\n", "a.ts, line 2: '1:a' is none of the tags"),
    ("@classLabel true a\n", "no line @data"),
    ("@timeStamps true\n@classLabel true a\n@data\n", "line 1: '@timeStamps true': series with time stamps"),
    ("@targetLabel true\n@data\n1:2\n", "line 1: '@targetLabel true': a regression target"),
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
    ("id,label,x\n1,,2\n", "line 2: the label is empty"),
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
    ({"x": np.ones((2, 3)), "y": [0, 0.5]}, "row 2: label 0.5 is no class"),
    ({"x": np.ones((2, 3)), "y": np.array(["a", "b"], object)}, "save labels as y.astype(str)"),
    ({"x": np.ones((2, 3)), "y": [0, 1], "id": ["a", ""]}, "row 2: the id is empty"),
    ({"x": np.ones((2, 3)), "y": [b"a", b"\xff"]}, "y is not UTF-8"),
    ({"x": np.ones((2, 3)), "y": ["a", ""]}, "row 2: the label is empty"),
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
    ("x,y\n1,2\n1\n", "line 3: 1 fields, 2 in line 1"),
    ("1,2\n1,a\n", "line 2, column 2: 'a' is not a finite number"),
    ("inf,inf\n1,2\n", "line 1, column 1: 'inf' is not a finite number"),
    ("x,y\n", "a.csv: the series is empty"),
    ("x\n1,2\n", "line 2: 2 fields, 1 in line 1"),
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
    (read_series, "a.xlsx", "unknown extension '.xlsx'; convert it to one of .ts, .npz, .csv, .tsv"),
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
@given(st.binary(max_size=200), st.sampled_from(["", "id,label,x\n1,a,", "@classLabel true a\n@data\n", '{"text": ']))
def test_garbage_is_a_users_mistake(tmp_path, garbage, start):
    np.savez(tmp_path / "good.npz", x=np.ones((2, 3)), y=[0, 1])
    np.save(tmp_path / "good.npy", np.ones(3))
    starts = {"npz": (tmp_path / "good.npz").read_bytes(), "npy": (tmp_path / "good.npy").read_bytes()}
    reads = {read_series: "ts npz npy csv tsv", read_texts: "csv tsv jsonl txt", read_one_series: "npy csv",
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


# -- texts ----------------------------------------------------------------------------------------------------


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
        assert items.values == [text for text, _ in rows] and items.labels == [label for _, label in rows]
        assert items.ids == [str(n + 1) for n in range(len(rows))]
    write(tmp_path / "a.txt", rows[0][0])
    assert read_texts(tmp_path / "a.txt", labelled=False).values == [rows[0][0].removeprefix("\ufeff")]


def test_a_row_is_named_by_its_first_line(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\r\n"two\r\nlines",a\r\n\r\nthird,b\r\n" ",b\r\n')
    errors = []
    items = read_texts(path, on_error=errors.append)
    assert items.values == ["two\r\nlines", "third"] and items.ids == ["1", "2"]
    assert items.places == [f"{path}, line 2", f"{path}, line 5"]
    assert str(errors[0]).startswith(f"{path}, line 6, column 'text': it is empty")


def test_labels_as_text(tmp_path):
    values = ["x", 1, 1.0, True, False, " y ", 10**20]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": "t", "label": value}) for value in values))
    assert read_texts(path).labels == ["x", "1", "1", "true", "false", "y", "1" + "0" * 20]
    assert read_texts(write(tmp_path / "a.csv", "text,label\nt,1.0\n")).labels == ["1.0"]
    assert read_texts(write(tmp_path / "b.csv", "text\nt\n"), labelled=False).labels is None


@pytest.mark.parametrize("line, expected", [
    ("{", "line 3: column 2: Expecting property name"),
    ("[1]", "line 3: [1] is no object; write one object per line"),
    ('{"text": "a", "text": "b"}', "line 3: key 'text' is there more than once"),
    ('{"text": 3, "label": "a"}', "line 3, column 'text': it is 3, not text"),
    ('{"label": "a"}', "line 3, column 'text': it is empty"),
    ('{"text": "a"}', "line 3: the label is empty"),
    ('{"text": "a", "label": 0.5}', "line 3: label 0.5 is no class"),
    ('{"text": "a", "label": ["b"]}', "line 3: label ['b'] is no class"),
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
    assert read_texts(write(tmp_path / "a.csv", f"text,label\n{text},x\n")).values == [text]
    names = ",".join(f"c{n}" for n in range(25))
    path = write(tmp_path / "b.csv", f"{names}\n{names}\n")
    assert "c18, c19 and 5 more" in message(read_texts, path)


def test_class_order():
    assert class_order(["10", "9", "-1", "9"]) == ["-1", "9", "10"]
    assert class_order(["10", "9", "b", "a"]) == ["10", "9", "a", "b"]
    assert class_order(["2", "1", "nan"]) == ["1", "2", "nan"]
    assert class_order(["1.0", "01", "1"]) == ["01", "1", "1.0"]


# -- manifests ------------------------------------------------------------------------------------------------

COLUMNS = {"image": "photo", "text": "text", "series": "series"}


def test_manifest(tmp_path):
    image, series = image_file(tmp_path / "p/1.png"), write(tmp_path / "s.csv", "1\n")
    expected = [{"image": image, "text": " hi "}, {"series": series}]
    table = write(tmp_path / "m.csv", f"photo,text,series,label\np/1.png, hi ,,a\n,,{series},b\n")
    rows = [{"photo": "p/1.png", "text": " hi ", "label": "a"}, {"photo": None, "series": "s.csv", "label": "b"}]
    for path in (table, write(tmp_path / "m.jsonl", "\n".join(map(json.dumps, rows)))):
        items = read_manifest(path, COLUMNS)
        assert items.values == expected and items.labels == ["a", "b"] and items.ids == ["1", "2"]
    assert read_manifest(table, {"text": "text"}, on_error=lambda error: None).values == [{"text": " hi "}]
    assert "none of the columns words; rename one of photo, text" in message(read_manifest, table, {"text": "words"})


@pytest.mark.parametrize("row, expected", [
    ("no.png,a,,x", "line 2, column 'photo': there is no file"),
    (", ,,x", "line 2: photo, text, series empty"),
    (",a,,", "line 2: the label is empty"),
    ("," + "a" * 5000 + "/,nothing\0there,x", "line 2, column 'series': there is no file"),
    ("a" * 5000 + ",,,x", "line 2, column 'photo': there is no file"),
])
def test_manifest_mistakes(tmp_path, row, expected):
    path = write(tmp_path / "m.csv", f"photo,text,series,label\n{row}\n")
    assert expected in message(read_manifest, path, COLUMNS)
