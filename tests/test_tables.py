"""Text files and tables: encodings, delimiters, quoting and headers as programs write them; what is guessed is said."""

import csv
import io
import json
import os
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from user_files import message, write

from config import Settings
from messages import UserError
from tables import FileFinder, nfc, read_cells, read_table, read_text

quick = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
KOREAN = [("text", "label"), ("좋은 영화, 1", "긍정"), ("나쁜\n영화", "부정"), ('"둘째"', "긍정"), ("끝", "부정")]


def as_csv(rows, delimiter=",", line_end="\r\n", **options):
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter, lineterminator=line_end, **options).writerows(rows)
    return stream.getvalue()


def rows_of(path, **told):
    return read_cells(path, Settings(**told)).rows


# --- Encodings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_the_file_shows(tmp_path, encoding):
    assert rows_of(write(tmp_path / "a.csv", as_csv(KOREAN).encode(encoding))) == KOREAN


@pytest.mark.parametrize("encoding", ["cp949", "euc-kr", "utf-16-le", "utf-16-be"])
def test_encodings_that_must_be_told(tmp_path, encoding):
    path = write(tmp_path / "a.csv", as_csv(KOREAN).encode(encoding))
    assert "--encoding" in message(read_cells, path)
    assert rows_of(path, encoding=encoding) == KOREAN


def test_a_byte_that_does_not_fit_is_named_by_its_line(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\ncafé,a\n".encode("latin-1"))
    assert f"{path}, line 2: byte 0xe9 is not UTF-8" in message(read_cells, path)
    path = write(tmp_path / "b.csv", b"text,label\nx,a\n\xff\xff,b\n")
    assert f"{path}, line 3: byte 0xff is not cp949; correct --encoding" in message(
        read_cells, path, Settings(encoding="cp949")
    )
    wide = "text,label\nx,a\n".encode("utf-16-le") + b"\x00\xd8\x20\x00"  # half a surrogate pair
    assert "line 3" in message(read_cells, write(tmp_path / "c.csv", wide), Settings(encoding="utf-16-le"))


def test_utf_16_without_its_mark_is_recognised(tmp_path):
    """Its ASCII characters are UTF-8 too, with zeros between."""
    for encoding in ("utf-16-le", "utf-16-be"):
        path = write(tmp_path / "a.csv", "text,label\nx,a\n".encode(encoding))
        assert "it seems to be UTF-16; say --encoding utf-16-le (or -be)" in message(read_cells, path)


@pytest.mark.parametrize("encoding", ["klingon", "rot13", "hex", "데이터"])
def test_what_is_no_encoding_of_text(tmp_path, encoding):
    path = write(tmp_path / "a.csv", "text\nx\n")
    assert f"encoding: '{encoding}' is not a text encoding" in message(read_cells, path, Settings(encoding=encoding))


def test_utf_8_that_is_read_as_something_else_is_noted(tmp_path):
    """The same bytes are other letters there, and nothing would be refused."""
    path = write(tmp_path / "a.csv", "text,label\ncafé,a\n")
    cells = read_cells(path, Settings(encoding="cp1252"))
    assert cells.rows[1] == ("cafÃ©", "a")
    assert cells.notes == [f"{path} is read as cp1252, as --encoding says, but is valid UTF-8 too"]
    assert read_cells(write(tmp_path / "b.csv", "text\nplain\n"), Settings(encoding="cp1252")).notes == []


def test_comments_may_be_in_any_encoding(tmp_path):
    path = write(tmp_path / "a.ts", "# 60–100 bpm\n 5\n%é\n".encode("cp1252"))
    assert read_text(path, comments=(b"#", b"%")) == "\n 5\n\n"
    assert "line 1" in message(read_text, path)


# --- Files -----------------------------------------------------------------------------------------------------------


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.csv", "zero.jsonl"):
        assert f"{name}: is a pipe, a device or a folder" in message(read_table, tmp_path / name)


@pytest.mark.parametrize("there", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD", "mixed"])
def test_a_file_is_found_under_either_form_of_its_name(tmp_path, there, asked):
    path = write(tmp_path / unicodedata.normalize(there, "개") / unicodedata.normalize(there, "é.csv"), "x\n")
    names = ["개", "é.csv"]
    forms = {"mixed": ["NFC", "NFD"]}.get(asked, [asked, asked])
    wanted = tmp_path.joinpath(*(unicodedata.normalize(form, name) for form, name in zip(forms, names, strict=True)))
    assert FileFinder()(wanted).read_text() == "x\n" and FileFinder()(wanted).samefile(path)
    absent = tmp_path / "개" / "è.csv"
    assert FileFinder()(absent) == absent and FileFinder()(tmp_path / "é" / "x") == tmp_path / "é" / "x"


# --- Delimiters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter, name", [(";", "semicolons"), ("\t", "tabs"), ("|", "pipes"), (",", "")])
@pytest.mark.parametrize("extension", ["csv", "tsv"])
def test_delimiters_are_told_apart(tmp_path, delimiter, name, extension):
    rows = [*KOREAN, ("a, b; c | d\te", "긍정")]
    path = write(tmp_path / f"a.{extension}", as_csv(rows, delimiter))
    cells = read_cells(path)
    assert cells.rows == rows and cells.delimiter == delimiter
    expected = delimiter != ("\t" if extension == "tsv" else ",")
    note = f"{path}: its cells seem to be separated by {name or 'commas'} (--delimiter overrides)"
    assert cells.notes == [note] * expected


def test_a_delimiter_that_is_told(tmp_path):
    path = write(tmp_path / "a.csv", "a b\n1 2\n")
    assert rows_of(path) == [("a b",), ("1 2",)]
    assert rows_of(path, delimiter=" ") == [("a", "b"), ("1", "2")]
    path = write(tmp_path / "b.csv", "a;b\tc\n1;2\t3\n")
    for told in ("tab", "\\t", "\t"):
        assert rows_of(path, delimiter=told) == [("a;b", "c"), ("1;2", "3")]
    for wrong in ("ab", '"', "\n"):
        assert "delimiter: " in message(read_cells, path, Settings(delimiter=wrong))


def test_a_line_that_tells_excel_the_delimiter_is_obeyed(tmp_path):
    path = write(tmp_path / "a.csv", "sep=;\r\ntext;label\r\nx,y;a\r\n")
    cells = read_cells(path)
    assert cells.rows == [("text", "label"), ("x,y", "a")] and cells.lines == [2, 3] and cells.notes == []
    assert rows_of(path, delimiter=",") == [("text;label",), ("x", "y;a")]


def test_commas_in_texts_do_not_make_a_column(tmp_path):
    texts = [(f"one{', two' * (n % 4)}",) for n in range(20)]
    path = write(tmp_path / "a.tsv", as_csv([("text",), *texts], "\t"))
    assert rows_of(path) == [("text",), *texts]
    path = write(tmp_path / "b.tsv", "a text, as it is\nx\ny\nz\n")  # the header alone has a comma
    assert rows_of(path)[0] == ("a text, as it is",)


def test_a_column_that_is_not_there_hints_at_the_cause(tmp_path):
    path = write(tmp_path / "a.csv", "text~label\nx~a\n")
    assert "no column 'text'; there are text~label: name the right one" in message(read_table(path).column, "text")
    path = write(tmp_path / "b.csv", "text;label\nx\ny\nz\n")
    found = message(read_table(path).column, "text")
    assert "if another character separates its cells, say which with --delimiter" in found
    path = write(tmp_path / "c.csv", '"a film\nof note",good\n"x",bad\n')
    assert "'a film\\nof note', good" in (found := message(read_table(path).column, "text"))
    assert "its first line must name the columns" in found


# --- Quoting ---------------------------------------------------------------------------------------------------------


def corpus(delimiter):
    """As GLUE, KorNLI and KorSTS are: quotes stand as they come, here one that closes ten rows later."""
    texts = [f"film number {n}" for n in range(60)]
    texts[10], texts[20], texts[33] = f'"{texts[10]}', f'{texts[20]}"', f'a "quoted" word in {texts[33]}'
    rows = [("text", "label"), *((text, "pos" if n % 2 else "neg") for n, text in enumerate(texts))]
    return rows, "".join(delimiter.join(row) + "\n" for row in rows)


def test_a_quote_in_a_file_of_tabs_swallows_no_rows(tmp_path):
    rows, text = corpus("\t")
    path = write(tmp_path / "a.tsv", text)
    cells = read_cells(path)
    assert cells.rows == rows and cells.lines == list(range(1, 62))
    assert len(cells.notes) == 1 and "in line 12 a quote would swallow 10 lines" in cells.notes[0]
    assert rows_of(path, quoting="none") == rows
    assert len(rows_of(path, quoting="excel")) == 51


def test_a_quote_in_a_file_of_commas_is_an_error_that_names_both_remedies(tmp_path):
    rows, text = corpus(",")
    path = write(tmp_path / "a.csv", text)
    found = message(read_cells, path)
    assert found.startswith(f"{path}, line 12: a quote would swallow 10 lines")
    assert "--quoting none" in found and "--quoting excel" in found
    assert rows_of(path, quoting="none") == rows and len(rows_of(path, quoting="excel")) == 51


@pytest.mark.parametrize("text", ['"Yes" he said\t1\n', '"never closed\t1\n', '"a" "b"\t0\n'])
def test_quotes_that_make_no_sense_are_literal_in_a_file_of_tabs(tmp_path, text):
    path = write(tmp_path / "a.tsv", "text\tlabel\nplain\t0\n" + text + "more\t1\n")
    cells = read_cells(path)
    assert cells.rows[2] == tuple(text.rstrip("\n").split("\t")) and len(cells.rows) == 4
    assert "quotes are read as plain text, since in line 3" in cells.notes[0]
    assert "close each quote" in message(read_cells, path, Settings(quoting="excel"))
    path = write(tmp_path / "a.csv", path.read_text().replace("\t", ","))
    assert "line 3" in (found := message(read_cells, path)) and "--quoting none" in found
    assert rows_of(path, quoting="none") == [tuple(cell for cell in row) for row in cells.rows]


def test_a_cell_over_lines_that_might_be_rows_is_noted(tmp_path):
    """Where nothing tells: the ids are other ones in each row."""
    path = write(tmp_path / "a.csv", 'id,text\n1,good\n2,"good\n3,bad"\n4,fine\n')
    cells = read_cells(path)
    assert cells.rows == [("id", "text"), ("1", "good"), ("2", "good\n3,bad"), ("4", "fine")]
    assert "line 3: a quoted cell spans 2 lines, each of which could be a row; --quoting none" in cells.notes[0]
    assert read_cells(write(tmp_path / "b.csv", 'id,text\n1,"good\nfilm"\n')).notes == []


printable = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=6)


@quick
@given(st.lists(st.tuples(printable, printable), min_size=1, max_size=6), st.sampled_from(",;\t|"))
def test_what_was_quoted_comes_back(tmp_path, rows, delimiter):
    """Whatever the cells hold, if each is quoted: a wrong guess would be an error or said, never other cells."""
    rows = [("text", "label"), *rows]
    path = write(tmp_path / "a.csv", as_csv(rows, delimiter, quoting=csv.QUOTE_ALL))
    told = Settings(delimiter=delimiter, quoting="excel")
    assert read_cells(path, told).rows == rows
    try:
        cells = read_cells(path)
    except UserError as error:
        assert "--quoting" in str(error)
    else:
        assert cells.rows == rows or cells.notes


# --- Headers ---------------------------------------------------------------------------------------------------------


def test_the_index_of_pandas_is_left_out(tmp_path):
    path = write(tmp_path / "a.csv", ",text,label\n0,x,a\n1,y,b\n")
    table = read_table(path)
    assert table.columns == ["text", "label"] and table.column("text") == ["x", "y"]
    assert table.notes == [f"{path}: its first column has no name and counts the rows, so it is left out"]
    path = write(tmp_path / "b.csv", ",text\n7,x\n8,y\n")
    found = message(read_table, path)
    assert "line 1: column 1 has no name; name it, or remove it (an index of pandas: to_csv(index=False))" in found
    table = read_table(write(tmp_path / "c.csv", "text,label,\nx,a,\ny,b,\n"))  # a delimiter at the end of each line
    assert table.columns == ["text", "label"] and "column 3 has neither name nor cells" in table.notes[0]


def test_a_header_that_stands_there_again_is_a_fault(tmp_path):
    """Tables that were put together."""
    path = write(tmp_path / "a.csv", "text,label\nx,a\n text ,label\ny,b\n")
    assert read_table(path).faults == {1: f"{path}, line 3: is the header again; remove it"}
    assert read_table(write(tmp_path / "b.csv", "text\ntext\n")).faults == {}  # may well be a text


def test_names_of_columns_are_compared_composed(tmp_path):
    composed, apart = nfc("é"), unicodedata.normalize("NFD", "é")
    for name, content in (("a.csv", f"{apart},b\n1,2\n"), ("a.jsonl", json.dumps({apart: "1", "b": "2"}) + "\n")):
        table = read_table(write(tmp_path / name, content))
        for wanted in (composed, apart):
            assert table.has(wanted) and table.column(wanted) == ["1"]
    twice = write(tmp_path / "b.csv", f"{composed},{apart}\n1,2\n")
    assert "is there more than once" in message(read_table, twice)
    twice = write(tmp_path / "b.jsonl", json.dumps({composed: 1, apart: 2}, ensure_ascii=False) + "\n")
    assert "key 'é' is there more than once" in message(read_table, twice)


def test_objects_lack_what_others_have(tmp_path):
    table = read_table(write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"b": [2]}\n'))
    assert (table.column("a"), table.column("b"), table.lines) == ([1, None], [None, [2]], [1, 3])


# --- Size ------------------------------------------------------------------------------------------------------------




def test_the_cost_is_linear_in_columns_and_keys(tmp_path):
    """A hundred thousand columns, and objects that share no key: each is looked up, none is compared with all."""
    names = ",".join(f"c{n}" for n in range(100_000))
    wide = write(tmp_path / "a.csv", names + "\n" + ",".join(["1"] * 100_000) + "\n")
    table = read_table(wide)
    assert [table.column(name) for name in table.columns[::100]] == [["1"]] * 1000
    own = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": "x", f"k{n}": n}) + "\n" for n in range(30_000)))
    table = read_table(own)
    assert len(table.columns) == 30_001 and table.column("text") == ["x"] * 30_000
    assert sum(len(row) for row in table.rows) == 60_000  # and not a cell for each column


def test_cells_of_any_size_are_shown_short(tmp_path):
    path = write(tmp_path / "a.csv", "x" * 10**6 + "\n" + "y" * 10**6 + "\n")
    assert read_table(path).column("x" * 10**6) == ["y" * 10**6]
    assert len(message(read_table(path).column, "text")) < 400
