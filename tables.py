"""Text files and the tables in them: rows of a .csv or .tsv, objects of a .jsonl.

    read_text    the text of a file, in the encoding of the settings or the one that its first bytes show
    read_cells   .csv, .tsv: rows of cells as they stand, and the line of each
    read_table   .csv, .tsv, .jsonl, .parquet: a Table, whose columns have names

Delimiter and quoting are guessed from the file if they are not given. A guess is mentioned in `notes`, with the flag
that overrides it; if none is good enough, it is an error. Column names are compared in Unicode's NFC, in which an "é"
of one character equals one of two.
"""

import codecs
import csv
import io
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import Settings
from messages import OUR_TABLES, UserError, from_spreadsheet_cell

DEFAULTS = Settings()
DELIMITERS = {"\t": "tabs", ";": "semicolons", "|": "pipes", ",": "commas"}  # those that may be guessed
SAMPLE = 1 << 16  # characters of a file from which its delimiter is guessed


def nfc(text: str) -> str:
    """The composed form, in which names are compared; macOS and some editors write the decomposed one."""
    return unicodedata.normalize("NFC", text)


def shown(value: Any) -> str:
    """A value for a message, short and on one line."""
    try:
        text = repr(value[:80] if isinstance(value, (str, bytes)) else value)
    except RecursionError:
        text = f"a {type(value).__name__}, deeply nested"
    return text if len(text) <= 60 else text[:57] + "..."


def listed(names: Iterable[str]) -> str:
    names = list(names)
    few = [name if name.isprintable() and len(name) <= 40 else shown(name) for name in names[:20]]
    return ", ".join(few) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


# --- Files -----------------------------------------------------------------------------------------------------------


class FileFinder:
    """Finds files whose names are in another normal form of Unicode than the given path.

    "é" is one character in names from Windows and Linux and two in many from macOS; both look the same.
    """

    def __init__(self) -> None:
        self.folders: dict[str, dict[str, str]] = {}  # for each folder, its entries by their composed form

    def __call__(self, path: Path) -> Path:
        """The path under which the file exists, or else the given path."""
        if str(path).isascii() or os.path.exists(path):
            return path
        for form in ("NFC", "NFD"):
            other = Path(unicodedata.normalize(form, str(path)))
            if os.path.exists(other):
                return other
        found = Path(path.anchor)
        for part in path.parts[bool(path.anchor) :]:
            found /= part if os.path.exists(found / part) else self._entries(str(found)).get(nfc(part), part)
        return found if os.path.exists(found) else path

    def _entries(self, folder: str) -> dict[str, str]:
        if folder not in self.folders:
            try:
                self.folders[folder] = {nfc(name): name for name in os.listdir(folder or ".")}
            except OSError:  # not a folder, or not readable: the file is not there
                self.folders[folder] = {}
        return self.folders[folder]


def check_regular(path: Path) -> None:
    """Refuse a pipe, a device or a socket, which might be read forever.

    Raises:
        UserError: the path is one of these.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: is a pipe, a device or a folder; save its contents as a file, and name that")


# --- Text ------------------------------------------------------------------------------------------------------------


def read_text(
    path: Path, settings: Settings = DEFAULTS, notes: list[str] | None = None, comments: tuple[bytes, ...] = ()
) -> str:
    """The text of a file, without a byte order mark.

    The encoding is settings.encoding; by default UTF-8, or UTF-16 or UTF-32 if the file begins with their mark.

    Args:
        notes: gets a note if the encoding may be wrong.
        comments: the bytes that begin a comment; such a line may be in any encoding, and becomes empty.
    """
    check_regular(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; correct the path or its permissions") from error
    encoding = settings.encoding or _marked_encoding(raw)
    if not settings.encoding and len(raw) >= 16 and {any(raw[:16:2]), any(raw[1:16:2])} == {True, False}:
        raise UserError(f"{path}: every other byte is zero, it seems to be UTF-16; say --encoding utf-16-le (or -be)")
    if comments and encoding == "utf-8":
        raw = b"\n".join(b"" if line.lstrip()[:1] in comments else line for line in raw.split(b"\n"))
    try:
        text = raw.decode(encoding)
    except LookupError as error:
        raise UserError(f"encoding: {encoding!r} is not a text encoding; give for example cp949 or cp1252") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].decode(encoding, "ignore").count("\n") + 1
        remedy = "save it as UTF-8, or name its encoding: --encoding cp949 (Korean), cp1252 (Western), ..."
        if settings.encoding:
            remedy = "correct --encoding, or save it as UTF-8"
        name = "UTF-8" if encoding == "utf-8" else encoding
        raise UserError(f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not {name}; {remedy}") from error
    except UnicodeError as error:
        raise UserError(f"{path}: is not {encoding}: {error}; correct --encoding, or save it as UTF-8") from error
    if notes is not None and settings.encoding and not text.isascii() and _is_utf8(raw):
        notes.append(f"{path} is read as {settings.encoding}, as --encoding says, but is valid UTF-8 too")
    return text.removeprefix("\ufeff")


def _marked_encoding(raw: bytes) -> str:
    """The encoding by the mark at the start. UTF-32 is tried first: its little-endian mark begins with UTF-16's."""
    for encoding, marks in {
        "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
        "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    }.items():
        if raw.startswith(marks):
            return encoding
    return "utf-8"


def _is_utf8(raw: bytes) -> bool:
    try:
        return not raw.isascii() and raw.decode() != ""
    except UnicodeDecodeError:
        return False


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """(number from 1, stripped line) of the lines that are not blank, with the line ends of any system."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


# --- Rows of cells ---------------------------------------------------------------------------------------------------


@dataclass
class Cells:
    """Rows of a .csv or .tsv as they stand, without blank ones."""

    path: Path
    delimiter: str
    rows: list[tuple[str, ...]]
    lines: list[int]  # the first line of each row
    notes: list[str] = field(default_factory=list)


def read_cells(path: Path, settings: Settings = DEFAULTS) -> Cells:
    """The cells of a .csv or .tsv file, by settings.delimiter and .quoting; Excel's line `sep=;` is obeyed.

    Quoting is Excel's by default. If quotes make no sense that way, or would swallow rows, they are read as plain text
    in a file with tabs; in any other file that is an error.
    """
    notes: list[str] = []
    text, first_line = read_text(path, settings, notes), 1
    default = "\t" if path.suffix.lower() == ".tsv" else ","
    delimiter = _told_delimiter(settings.delimiter)
    if told := re.match(r'"?sep=([^\r\n])"?(\r\n|\r|\n)', text, re.IGNORECASE):
        delimiter = delimiter or told[1]
        text, first_line = text[told.end() :], 2
    if delimiter is None:
        delimiter = _delimiter_by_looking(text[:SAMPLE], default)
        if delimiter != default:
            notes.append(f"{path}: its cells seem to be separated by {DELIMITERS[delimiter]} (--delimiter overrides)")
    cells = Cells(path, delimiter, [], [], notes)
    if settings.quoting == "none":
        cells.rows, cells.lines = _parse(text, delimiter, first_line, literal=True)
        return cells
    may_be_literal = settings.quoting == "auto" and delimiter == "\t"
    try:
        cells.rows, cells.lines = _parse(text, delimiter, first_line)
        if settings.quoting == "excel" or (doubt := _swallowed(cells, text, first_line)) is None:
            return cells
        line, what, serious = doubt
        if not serious:
            notes.append(f"{path}, line {line}: {what}; --quoting none if its quotes are plain text")
            return cells
        remedy = "--quoting none if quotes are plain text there, --quoting excel if not"
    except csv.Error as error:
        line, what = error.args
        remedy = "close each quote, and double a quote within quotes; or --quoting none if quotes are plain text"
    if not may_be_literal:
        raise UserError(f"{path}, line {line}: {what}; {remedy}")
    notes.append(f"{path}: quotes are read as plain text, since in line {line} {what} (--quoting excel overrides)")
    cells.rows, cells.lines = _parse(text, delimiter, first_line, literal=True)
    return cells


def _told_delimiter(told: str | None) -> str | None:
    if told is None or told in ("tab", "\\t"):
        return told and "\t"
    if len(told) != 1 or told in '"\r\n':
        raise UserError(f"delimiter: {shown(told)} is not one character; give for example ';', '|' or tab")
    return told


def _delimiter_by_looking(sample: str, default: str) -> str:
    """The delimiter that occurs in the header and equally often in most rows; the comma, common in texts, comes last.
    """
    if len(sample) == SAMPLE:
        sample = sample[: sample.rfind("\n") + 1] or sample
    found = {}
    for delimiter in DELIMITERS:
        counts = [len(row) for row in csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter) if row][:200]
        if counts and counts[0] > 1:
            found[delimiter] = counts.count(counts[0]) / len(counts)
    best = max(found, key=found.get, default=default)  # the first of the best
    return best if found.get(best, 0) > 0.5 else default


_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d*,\d+([eE][+-]?\d+)?\s*")


def comma_is_point(delimiter: str, cells: Iterable[str]) -> bool:
    """Whether the comma is the decimal point of a table, which is possible if ';' separates the cells."""
    return delimiter == ";" and any(map(_DECIMAL_COMMA.fullmatch, cells))


def csv_reader(lines: Iterable[str], **options: Any) -> Any:
    csv.field_size_limit(2**31 - 1)  # csv's own limit is 128 KiB per cell
    return csv.reader(lines, **options)


def _physical_lines(text: str) -> Iterator[str]:
    """The lines of a text with their ends, those of any system, without a copy of the whole text."""
    return (match[0] for match in re.finditer(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text))


def _parse(text: str, delimiter: str, line: int, literal: bool = False) -> tuple[list[tuple[str, ...]], list[int]]:
    """(rows, first line of each).

    Raises:
        csv.Error: with two arguments, the line and what is wrong.
    """
    quoting = csv.QUOTE_NONE if literal else csv.QUOTE_MINIMAL
    reader = csv_reader(_physical_lines(text), delimiter=delimiter, strict=True, quoting=quoting)
    rows, lines, before = [], [], line - 1
    try:
        for row in reader:
            if row:
                rows.append(tuple(row))  # a million lists would keep the garbage collector busy
                lines.append(line)
            line = before + reader.line_num + 1
    except csv.Error as error:
        raise csv.Error(line, str(error)) from error
    return rows, lines


def _swallowed(cells: Cells, text: str, first_line: int) -> tuple[int, str, bool] | None:
    """(line, what, whether it is serious) of a quoted cell that spans several lines, each of which could be a row.

    A line could be a row if it has as many cells as the header, none of them empty. It is serious if, in some column,
    all these lines have values that occur in other rows, such as labels. If it is not serious, it is ignored when more
    than one in a hundred lines of the file would not be a row without quoting.
    """
    multiline = [i for i, row in enumerate(cells.rows) if i and any("\n" in cell or "\r" in cell for cell in row)]
    if not multiline:
        return None
    physical, width = [*_physical_lines(text)], len(cells.rows[0])
    ends = [*cells.lines[1:], first_line + len(physical)]
    others = sorted(set(range(1, len(cells.rows))).difference(multiline))
    values: dict[int, set[str]] = {}  # by column, those of the other rows
    doubt = None
    for i in multiline:
        lines = physical[cells.lines[i] - first_line : ends[i] - first_line]
        rows, _ = _parse("".join(lines), cells.delimiter, 1, literal=True)
        if len(rows) < 2 or any(len(row) != width or not all(map(str.strip, row)) for row in rows):
            continue
        for column in range(width):
            if column not in values:
                values[column] = {cells.rows[other][column] for other in others if column < len(cells.rows[other])}
            if all(row[column] in values[column] for row in rows):
                return cells.lines[i], f"a quote would swallow {len(rows) - 1} lines like rows of their own", True
        doubt = doubt or (cells.lines[i], f"a quoted cell spans {len(rows)} lines, each of which could be a row", False)
    rows = _parse(text, cells.delimiter, 1, literal=True)[0] if doubt else []
    return doubt if sum(len(row) != width for row in rows) <= len(rows) / 100 else None


# --- Tables ----------------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """Rows with named columns. A row is a tuple of cells (text; of a .parquet what it holds) or the object itself
    (.jsonl)."""

    path: Path
    keys: dict[str, Any]  # for each column name, its position or the key in the objects
    rows: list[tuple[str, ...]] | list[dict[str, Any]]
    lines: list[int]  # the first line of each row
    faults: dict[int, str]  # messages about bad rows, by the row's index
    delimiter: str = ""
    notes: list[str] = field(default_factory=list)
    index: str | None = None  # a column that only counts the rows
    unit: str = "line"  # what the numbers in `lines` count

    @property
    def columns(self) -> list[str]:
        return list(self.keys)

    def has(self, name: str) -> bool:
        return nfc(name) in self.keys

    def place(self, row: int) -> str:
        return f"{self.path}, {self.unit} {self.lines[row]}"

    def column(self, name: str) -> list[Any]:
        """The cells of a column; None where an object lacks it.

        Raises:
            UserError: there is no such column; the message lists the columns.
        """
        key = self.keys.get(nfc(name))
        if key is None:
            hint, characters = "", set("".join(self.columns)[:1000])
            if characters & {";", "\t", ",", "|"}:
                hint = "; if another character separates its cells, say which with --delimiter"
            elif not all(name.isprintable() and len(name) <= 40 for name in self.columns):
                hint = "; its first line must name the columns"
            raise UserError(f"{self.path}: no column {name!r}; there are {listed(self.columns)}: name the right one "
                            f"by its flag (--id_column, --text_column, --label_column){hint}")
        if isinstance(key, int):
            return [row[key] for row in self.rows]
        return [row.get(key) for row in self.rows]


def read_table(path: str | Path, settings: Settings = DEFAULTS) -> Table:
    """A .csv or .tsv file whose first line names the columns, a .jsonl file of one object per line, or a .parquet.

    Blank lines are skipped. A row that cannot be used becomes a fault of the table.

    Raises:
        UserError: the file as a whole cannot be used.
    """
    path = Path(path)
    extension = extension_of(path, [".csv", ".tsv", ".jsonl", ".parquet"])
    if extension == ".jsonl":
        table = _read_objects(path, settings)
    elif extension == ".parquet":
        table = read_parquet(path)
    else:
        table = named(read_cells(path, settings))
    if not table.rows:
        raise UserError(f"{path}: holds no row; write one per item" + " below the header" * bool(table.keys))
    return table


def extension_of(path: Path, valid: list[str], labelled: bool = False, unlabelled: str = "") -> str:
    """The lower-case extension: one of `valid`, or `unlabelled`, which is that of files without labels."""
    extension = path.suffix.lower()
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file ({', '.join(valid)})")
    if labelled and extension == unlabelled:
        raise UserError(f"{path}: a {extension} file holds no label; for labelled data use {' or '.join(valid)}")
    if not extension or extension not in (*valid, unlabelled):
        known = ", ".join(filter(None, (*valid, *([] if labelled else [unlabelled]))))
        raise UserError(f"{path}: unknown extension {extension!r}; convert it to one of {known}")
    return extension


def named(cells: Cells) -> Table:
    """The table of cells whose first row names the columns.

    A first column without a name that counts the rows from 0 is an index written by pandas and is left out (called
    "Unnamed: 0" if it was read and written again). A column without name and cells is left out too.
    """
    path, rows, lines, notes = cells.path, cells.rows[1:], cells.lines[1:], cells.notes
    if not cells.rows:
        raise UserError(f"{path}: is empty; its first line must name the columns")
    if any(cells.rows[0][: len(ours)] == ours for ours in OUR_TABLES):
        rows = [tuple(map(from_spreadsheet_cell, row)) for row in rows]
    header = [nfc(name.strip()) for name in cells.rows[0]]
    where, faults = f"{path}, line {cells.lines[0]}", {}
    for index, row in enumerate(rows):
        if len(row) != len(header):
            faults[index] = (f"{path}, line {lines[index]}: {len(row)} fields for {len(header)} columns; "
                             "make them equal, and quote a field that holds the delimiter")
            rows[index] = (row + ("",) * len(header))[: len(header)]
        elif len(row) > 1 and row[0].strip() == header[0] and [nfc(cell.strip()) for cell in row] == header:
            faults[index] = f"{path}, line {lines[index]}: is the header again; remove it"
    counts_rows = bool(rows) and all(row[0] == str(index) for index, row in enumerate(rows))
    keys: dict[str, int] = {}
    for position, name in enumerate(header):
        if name == "":
            if position == 0 and counts_rows:
                notes.append(f"{path}: its first column has no name and counts the rows, so it is left out")
                continue
            if rows and not any(row[position].strip() for row in rows):
                notes.append(f"{path}: column {position + 1} has neither name nor cells, so it is left out")
                continue
            raise UserError(f"{where}: column {position + 1} has no name; name it, or remove it (an index of pandas: "
                            "to_csv(index=False))")
        if name in keys:
            raise UserError(f"{where}: column {shown(name)} is there more than once; rename one")
        keys[name] = position
    if not keys:
        raise UserError(f"{where}: no column has a name; name them")
    index = "Unnamed: 0" if counts_rows and header[0] == "Unnamed: 0" else None
    return Table(path, keys, rows, lines, faults, cells.delimiter, notes, index)


def read_parquet(path: Path) -> Table:
    """The rows of a .parquet file, which pandas reads: numbers, text, true and false, lists; None where one is missing.

    An index with a name is a column.
    """
    check_regular(path)
    import pandas

    try:
        frame = pandas.read_parquet(path)
    except ImportError as error:
        raise UserError(f"{path}: to read .parquet, pandas needs a package more: pip install pyarrow; or save it as "
                        ".csv or .jsonl") from error  # fmt: skip
    except MemoryError:
        raise
    except OSError as error:
        told = error.strerror or error
        raise UserError(f"{path}: cannot be read: {told}; correct the path, or save it again") from error
    except Exception as error:  # damaged bytes raise several kinds of exception
        first = next(iter(str(error).splitlines()), "")
        raise UserError(f"{path}: is no .parquet file: {first}; save it again") from error
    if any(frame.index.names):
        frame = frame.reset_index()
    names = [nfc(str(name)) for name in frame.columns]
    if (twice := repeated(names)) is not None:
        raise UserError(f"{path}: column {shown(twice)} is there more than once; rename one")
    columns = [column.astype(object).where(column.notna(), None).tolist() for _, column in frame.items()]
    rows = [tuple(map(_plain, row)) for row in zip(*columns, strict=True)]
    keys = {name: position for position, name in enumerate(names)}
    return Table(path, keys, rows, list(range(1, len(rows) + 1)), {}, unit="row")


def _plain(cell: Any) -> Any:
    return cell.tolist() if hasattr(cell, "tolist") else cell  # a list comes as an array


def note_comma(table: Table) -> None:
    note = f"{table.path}: a comma is the decimal point in it"
    if note not in table.notes:
        table.notes.append(note)


def names_in(text: str | None) -> list[str]:
    """'a,b' -> ['a', 'b']; a name that contains a comma is in double quotes."""
    return [nfc(name.strip()) for name in next(csv_reader([text], skipinitialspace=True))] if text else []


def joined(names: Iterable[str]) -> str:
    """The text from which `names_in` makes the names."""
    return ",".join(f'"{name}"' if "," in name else name for name in names)


def label_columns(settings: Settings) -> list[str]:
    """The columns of the labels: one for classes; for numbers, and for labels of 1 or 0, there may be several."""
    if settings.task in ("classification", "tagging"):
        return [settings.label_column]
    names = [name for name in names_in(settings.label_column) if name]
    if not names or (twice := repeated(names)) is not None:
        what = f"{twice!r} is there more than once" if names else "names no column"
        raise UserError(f"label_column: {settings.label_column!r}: {what}; write for example price,weight")
    return names


def label_cells(table: Table, settings: Settings) -> list[Any]:
    """The label of each row as it stands in the file; for several columns, a dict of their cells by name."""
    columns = {name: table.column(name) for name in label_columns(settings)}
    if settings.task == "regression":
        columns = {name: _with_points(table, cells) for name, cells in columns.items()}
    if len(columns) == 1:
        return next(iter(columns.values()))
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _with_points(table: Table, cells: list[Any]) -> list[Any]:
    """Numbers with a decimal comma, which is possible if ';' separates the cells, written with a point."""
    if not comma_is_point(table.delimiter, cells) or any("." in cell for cell in cells):  # 1.234 may be a thousand
        return cells
    note_comma(table)
    return [cell.replace(",", ".") for cell in cells]


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {sys.intern(nfc(key)): value for key, value in pairs}  # all rows share the text of a key
    if len(found) < len(pairs):
        raise ValueError(f"key {shown(repeated(nfc(key) for key, _ in pairs))} is there more than once")
    return found


def _read_objects(path: Path, settings: Settings) -> Table:
    notes: list[str] = []
    objects, lines, faults, keys = [], [], {}, {}
    decoder = json.JSONDecoder(object_pairs_hook=_json_object)
    for number, match in enumerate(re.finditer("[^\n]*\n|[^\n]+$", read_text(path, settings, notes)), 1):
        line = match[0].removesuffix("\n")
        if not line.strip():
            continue
        try:
            value = decoder.decode(line) if line[0] != "\ufeff" else json.loads(line)  # which names that mark
            if not isinstance(value, dict):
                raise ValueError(f"{shown(value)} is not an object")
        except (ValueError, RecursionError) as error:
            what = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else error
            faults[len(lines)] = f'{path}, line {number}: {what}; write one object per line: {{"text": "..."}}'
            value = {}
        if not value.keys() <= keys.keys():
            keys.update(zip(value, value, strict=True))
        objects.append(value)
        lines.append(number)
    if objects and not keys:
        raise UserError(faults.get(0) or f"{path}, line {lines[0]}: the object is empty; give it keys")
    return Table(path, keys, objects, lines, faults, notes=notes)
