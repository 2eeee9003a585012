"""Files of series, each format read into parts: (id, place, a function that gives the series and its label cell).

    table_series    .csv, .tsv, .parquet: a row per time step, or per series (with a header, or as in the UCR archive)
    ucr_series      .txt: a line per series, its label first, as in older forms of the UCR archive
    ts_series       .ts and
    arff_series     .arff: as in the UEA and UCR archives
    npz_series      .npz
    read_one_series .npy, .csv, .tsv: a file of one series

A series is float64 (L, C), NaN where a value is missing. The function of a part raises the UserError of its own item.
Those of an .npz are not taken apart: they stay in its arrays (packed.py).
`known` are the feature columns of the training data: columns are put into that order, and others are refused.
"""

import csv
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from config import FIELDS, Settings
from labels import class_name, is_unlabelled, label_parts, same_label
from messages import UserError
from packed import VALUES, Packed, PackedSeries
from tables import (
    DEFAULTS,
    Cells,
    FileFinder,
    Table,
    check_regular,
    comma_is_point,
    csv_reader,
    extension_of,
    joined,
    label_cells,
    label_columns,
    listed,
    named,
    names_in,
    nfc,
    note_comma,
    numbered_lines,
    read_cells,
    read_parquet,
    read_text,
    repeated,
    shown,
)

Make = Callable[[], tuple[Any, Any]]  # gives (value, label cell), or raises UserError
Part = tuple[str, str, Make] | tuple[str, str, Make, str]  # id, place, function and, if the file has groups, the group


@dataclass
class Whole:
    """All items of a file that was read at once, and the errors of those that cannot be used, by number."""

    ids: list[str]
    places: list[str]
    values: Packed
    labels: list[Any] | None
    groups: list[str] | None
    faults: dict[int, UserError]


@dataclass
class SeriesFile:
    parts: Iterable[Part] | Whole
    names: list[str] | None = None  # of the channels, or of the steps if a row of the table is a series
    table_rows: str | None = None  # what a row of the table is: 'steps' or 'series'; None if the file is no table
    notes: list[str] = field(default_factory=list)


# --- Values ----------------------------------------------------------------------------------------------------------

# Spellings of a missing value, as in pandas and R; float() itself knows nan
_MISSING = {"", "?", "NA", "N/A", "n/a", "#N/A", "#NA", "<NA>", "NULL", "Null", "null", "None", "none"}


def _number(cell: str, comma: bool = False) -> float:
    cell = cell.strip()
    if comma and "." in cell:  # 1.234 may be a thousand
        raise ValueError
    cell = cell.replace(",", ".") if comma else cell
    if "_" in cell:  # float("1_000") would be 1000
        raise ValueError
    return math.nan if cell in _MISSING else float(cell)


def _is_text(cell: str, comma: bool = False) -> bool:
    try:
        return _number(cell, comma) is None
    except ValueError:
        return True


def _numbers(cells: Sequence[str], comma: bool = False) -> np.ndarray:
    """Float64, NaN where a value is missing, infinity where a cell is not a number, which `_checked` refuses."""
    try:
        return np.array([_number(cell, comma) for cell in cells])
    except ValueError:
        return np.array([math.inf if _is_text(cell, comma) else _number(cell, comma) for cell in cells])


def _checked(
    values: np.ndarray, place: str, cell: Callable[[int, int], str] | None = None, labels: Sequence[Any] | None = None
) -> np.ndarray:
    """The series float64 (L, C) without the padding at its end: steps of which neither a value is there nor, where
    each step has one, the label. `cell` shows the value at (step, channel)."""
    values = values.astype(np.float64)
    infinite = np.argwhere(np.isinf(values))
    if len(infinite):
        t, c = infinite[0]
        found = cell(t, c) if cell else f"{place}, step {t + 1}, channel {c + 1}: {values[t, c]}"
        raise UserError(f"{found} is not a finite number; correct it, or mark it as missing (nan)")
    if not values.size:
        raise UserError(f"{place}: the series is empty, it has shape {values.shape}; remove it")
    real = np.flatnonzero(~np.isnan(values).all(axis=1))
    if not len(real):
        raise UserError(f"{place}: all {values.size} values of the series are missing; remove it")
    last = max([int(real[-1]), *(t for t, label in enumerate(labels or ()) if not is_unlabelled(label))])
    return values[: last + 1]


# --- Tables ----------------------------------------------------------------------------------------------------------


def table_series(path: Path, settings: Settings, labelled: bool, known: Sequence[str] | None) -> SeriesFile:
    """The series of a .csv, .tsv or .parquet. What a row is, is said by settings.table_rows, or decided from the file.
    """
    if path.suffix.lower() == ".parquet":
        table = read_parquet(path)
        table.rows = [tuple(map(_as_cell, row)) for row in table.rows]
        return _series_of(table, settings, labelled, known)
    cells = read_cells(path, settings)
    if not cells.rows:
        raise UserError(f"{path}: is empty; its first line must name the columns")
    if _has_header(cells, _others(settings)):
        return _series_of(named(cells), settings, labelled, known)
    if labelled and settings.task == "tagging":
        raise UserError(f"{path}, line {cells.lines[0]}: names no columns; --task tagging needs a row for each step, "
                        "below a line that names the columns (id, label, ...)")  # fmt: skip
    archive = settings.table_rows == "auto" and labelled and path.suffix.lower() == ".tsv"
    if archive or settings.table_rows == "series":
        return _label_first(cells, settings)
    if labelled:
        raise UserError(f"{path}, line {cells.lines[0]}: {shown(cells.rows[0][-1])} is a number, not a column's name; "
                        "write a line above that names the columns (id, label, ...); or, if each line is a whole "
                        "series with its label first, say --table_rows series")
    return SeriesFile([(path.name, str(path), lambda: (_one_by_position(cells), None))], notes=cells.notes)


def _as_cell(value: Any) -> str:
    """What a value would be in a .csv; numbers keep all their digits."""
    return "" if value is None else str(int(value) if isinstance(value, bool) else value)


def _has_header(cells: Cells, expected: Sequence[str]) -> bool:
    """Whether the first row names columns: it holds text, or numbers the columns from 0 above cells with a point.

    A word followed by numbers that do not rise is a label and a series, unless the word is one of the expected names.
    """
    first = [cell.strip() for cell in cells.rows[0]]
    if not {nfc(name) for name in expected}.isdisjoint(map(nfc, first)):
        return True
    is_text = partial(_is_text, comma=comma_is_point(cells.delimiter, first))
    if not any(map(is_text, first)):
        counting = first[1:] if first[0] == "" else first
        return (len(counting) > 1 and counting == [str(number) for number in range(len(counting))]
                and any("." in cell or "," in cell for row in cells.rows[1:2] for cell in row))
    if len(first) < 3 or any(map(is_text, first[1:])) or "" in first[1:]:
        return True
    numbers = _numbers(first[1:], comma_is_point(cells.delimiter, first))
    return bool((np.diff(numbers) > 0).all())


def _series_of(table: Table, settings: Settings, labelled: bool, known: Sequence[str] | None) -> SeriesFile:
    path, id_column = table.path, settings.id_column
    if not table.rows:
        raise UserError(f"{path}: holds no row; write them below the header")
    rows = settings.table_rows
    if labelled and settings.task == "tagging":
        if rows == "series":
            raise UserError(f"{path}: a row that is a whole series has one label; --task tagging needs one for each "
                            "step")  # fmt: skip
        rows = "steps"
    if rows == "auto" and labelled and not table.has(id_column):
        features = [name for name in table.columns if name not in map(nfc, _others(settings))]
        if not _numbered(features) or not all(map(table.has, label_columns(settings))):
            try:
                table.column(id_column)
            except UserError as error:
                raise UserError(f"{error}; or, if each row is a whole series, say --table_rows series") from None
        table.notes.append(f"{path}: no column {id_column!r}, and columns {listed([features[0]])} to "
                           f"{listed([features[-1]])}: each row is read as a whole series (--table_rows steps with "
                           "--id_column overrides)")
        rows = "series"
    if rows == "series":
        return _series_per_row(table, settings, labelled, known)
    if not labelled and not table.has(id_column):
        values, names = _one_by_name(table, settings, known, _others(settings))
        return SeriesFile([(path.name, str(path), lambda: (values, None))], names, "steps", table.notes)
    return _step_per_row(table, settings, labelled, known)


def _numbered(names: list[str]) -> list[int] | None:
    """The numbers in names such as t0, t1, t2, at least three; None for other names."""
    found = [re.fullmatch(r"(\D*)(\d{1,9})", name) for name in names]
    if len(names) < 3 or not all(found) or len({match[1] for match in found}) > 1:
        return None
    numbers = [int(match[2]) for match in found]
    return numbers if len(set(numbers)) == len(numbers) else None


def groups_of(table: Table, settings: Settings) -> list[list[str]]:
    """For each row [its group], or [] if the table has no such column; an empty cell is an empty group."""
    if settings.group_column is None or not table.has(settings.group_column):
        return [[]] * len(table.rows)
    return [["" if cell is None else str(cell).strip()] for cell in table.column(settings.group_column)]


def _others(settings: Settings) -> list[str]:
    """The columns of a table of series that are not features: id, label, group."""
    groups = [settings.group_column] if settings.group_column else []
    return [settings.id_column, *label_columns(settings), *groups]


def _features(table: Table, settings: Settings, known: Sequence[str] | None, others: Sequence[str]) -> list[str]:
    """The feature columns, in order: without `others` (id, label) and those that the settings leave out."""
    path, others = table.path, [nfc(name) for name in others]
    chosen, ignored = names_in(settings.feature_columns), names_in(settings.ignore_columns)
    for setting, names in ("feature_columns", chosen), ("ignore_columns", ignored if known is None else []):
        absent = [name for name in names if not table.has(name)]
        if absent:
            raise UserError(f"{path}: no column {absent[0]!r}, which --{setting} names; there are "
                            f"{listed(table.columns)}")
    if clash := [name for name in chosen if name in ignored or name in others]:
        raise UserError(f"feature_columns: {clash[0]!r} is the id, the label or in ignore_columns; leave it out of one")
    if twice := repeated(chosen):
        raise UserError(f"feature_columns: {twice!r} is there more than once; leave out one")
    without = {*others, *ignored}
    names = chosen or [name for name in table.columns if name not in without and name != table.index]
    if table.index and not chosen:
        table.notes.append(f"{path}: column {table.index!r} counts the rows, so it is left out")
    if not names:
        beside = f" beside {' and '.join(map(repr, others))}" if others else ""
        raise UserError(f"{path}: no column{beside}; add the features")
    if known is None:
        return names
    if fault := not_as_trained(names, known):
        foreign = sorted(set(names).difference(known))
        remedy = f", or leave out what is no feature: --ignore_columns {','.join(foreign[:3])}" if foreign else ""
        raise UserError(f"{path}: {fault}; rename the columns{remedy}")
    return list(known)


def not_as_trained(names: Sequence[str], known: Sequence[str]) -> str:
    """How these feature names differ from those of the training data, apart from their order; '' if they do not."""
    found, wanted = set(names), set(known)
    missing, foreign = [name for name in known if name not in found], [name for name in names if name not in wanted]
    faults = [f"{listed(missing)} missing"] if missing else []
    faults += [f"{listed(foreign)} not among them"] if foreign else []
    return f"its columns are not those of the training data ({listed(known)}): {', '.join(faults)}" if faults else ""


def _matrix(table: Table, names: list[str]) -> np.ndarray:
    """Float64 (rows, names), infinity where a cell is not a number.

    With ';' as delimiter, the comma may be the decimal point, and then it is so in the whole table.
    """
    columns = [table.column(name) for name in names]
    values = np.stack([_numbers(cells) for cells in columns], axis=1)
    wrong = np.isinf(values)
    comma = comma_is_point(table.delimiter, (columns[c][row] for row, c in np.argwhere(wrong)))
    if comma:
        note_comma(table)
        values = np.stack([_numbers(cells, comma=True) for cells in columns], axis=1)
        wrong = np.isinf(values)
    for c in np.flatnonzero(wrong.any(0) & ~np.isfinite(values).any(0))[:1]:
        row = int(np.flatnonzero(wrong[:, c])[0])
        name, cell = names[c], columns[c][row]
        remedy = f"leave it out if it is no feature: --ignore_columns {name}"
        if re.fullmatch(r"\s*[+-]?[\d.,]*\d,\d[\d.,]*\s*", cell):
            remedy = "write numbers with a decimal point, and without a separator of thousands"
        elif comma and "." in cell:
            remedy = "in other cells of the table a comma is the decimal point; write all its numbers alike"
        raise UserError(f"{table.place(row)}, column {name!r}: {shown(cell)} is not a finite number, nor is any other "
                        f"cell of the column; {remedy}")
    return values


def _step_per_row(table: Table, settings: Settings, labelled: bool, known: Sequence[str] | None) -> SeriesFile:
    id_column = settings.id_column
    ids = table.column(id_column)
    labels = label_cells(table, settings) if labelled else None
    per_step = labelled and settings.task == "tagging"
    groups = groups_of(table, settings)
    names = _features(table, settings, known, _others(settings))
    numbers = _matrix(table, names)
    if known is None:
        table.notes.extend(_counting(table, names, numbers, ids))
    rows_of: dict[str, list[int]] = {}
    for row, id in enumerate(ids):
        # A row without an id is an item of its own, which will be refused
        rows_of.setdefault(id.strip() or f"\n{row}", []).append(row)

    def make(rows: list[int]) -> tuple[np.ndarray, Any]:
        first = table.place(rows[0])
        _refuse_faults(table, rows)
        if not ids[rows[0]].strip():
            raise UserError(f"{first}: the series id in column {id_column!r} is empty; fill it in, or remove the row")
        label = labels[rows[0]] if labelled else None
        for row in rows[1:] if labelled and not per_step else ():
            if labels[row] != label and not same_label(labels[row], label):
                more = ", or say --task tagging if each step has its own" * (settings.task == "classification")
                raise UserError(f"{table.place(row)}: label {shown(labels[row])} of series {shown(ids[row])}, but "
                                f"{shown(label)} in line {table.lines[rows[0]]}; give all its rows the same{more}")
        for row in rows[1:]:
            if groups[row] != groups[rows[0]]:
                raise UserError(f"{table.place(row)}: {settings.group_column} {shown(*groups[row])} of series "
                                f"{shown(ids[row])}, but {shown(*groups[rows[0]])} in line {table.lines[rows[0]]}; "
                                "give all its rows the same")
        own = [labels[row] for row in rows] if per_step else None
        series = _checked(numbers[rows], first, lambda t, c: _cell(table, rows[t], names[c]), own)
        return series, own[: len(series)] if per_step else label

    parts = ((id, table.place(rows[0]), partial(make, rows), *groups[rows[0]]) for id, rows in rows_of.items())
    return SeriesFile(parts, names, "steps", table.notes)


def _counting(table: Table, names: list[str], numbers: np.ndarray, ids: list[str]) -> list[str]:
    """Notes on columns that count the rows of the file across several series: an index rather than a feature."""
    if len(set(ids)) < 2:
        return []
    rows = np.arange(len(numbers))[:, None]
    counting = (numbers == rows).all(0) | (numbers == rows + 1).all(0)
    return [f"{table.path}: column {names[c]!r} counts the rows; if it is no feature, leave it out: --ignore_columns "
            f"{names[c]}" for c in np.flatnonzero(counting)]


def _series_per_row(table: Table, settings: Settings, labelled: bool, known: Sequence[str] | None) -> SeriesFile:
    id_column = settings.id_column
    labels = label_cells(table, settings) if labelled else None
    ids = table.column(id_column) if table.has(id_column) else [str(row + 1) for row in range(len(table.rows))]
    if (twice := repeated(ids)) is not None:
        raise UserError(f"{table.path}: id {shown(twice)} is in several rows; if they are its steps, say --table_rows "
                        "steps")
    groups = groups_of(table, settings)
    names = _features(table, settings, known, _others(settings))
    numbers = _numbered(names)
    if known is None and not settings.feature_columns and numbers and numbers != sorted(numbers):
        names = [name for _, name in sorted(zip(numbers, names, strict=True))]
        table.notes.append(f"{table.path}: its columns are read in the order of their numbers, {names[0]} to "
                           f"{names[-1]}")
    values = _matrix(table, names)

    def make(row: int) -> tuple[np.ndarray, Any]:
        _refuse_faults(table, [row])
        series = _checked(values[row][:, None], table.place(row), lambda t, _: _cell(table, row, names[t]))
        return series, labels[row] if labelled else None

    parts = ((ids[row], table.place(row), partial(make, row), *groups[row]) for row in range(len(ids)))
    return SeriesFile(parts, names, "series", table.notes)


def _refuse_faults(table: Table, rows: Sequence[int]) -> None:
    for row in rows:
        if row in table.faults:
            raise UserError(table.faults[row])


def _cell(table: Table, row: int, name: str) -> str:
    return f"{table.place(row)}, column {name!r}: {shown(table.rows[row][table.keys[name]])}"


def _label_first(cells: Cells, settings: Settings) -> SeriesFile:
    """Lines without a header: label, then the values of one channel."""
    path = cells.path
    comma = comma_is_point(cells.delimiter, (cell for row in cells.rows for cell in row[1:]))

    def make(row: tuple[str, ...], place: str) -> tuple[np.ndarray, Any]:
        values = _numbers(row[1:], comma)[:, None]
        label = row[0].replace(",", ".") if comma and settings.task == "regression" and "." not in row[0] else row[0]
        return _checked(values, place, lambda t, _: f"{place}, field {t + 2}: {shown(row[t + 1])}"), label

    if settings.table_rows == "auto":
        cells.notes.append(f"{path}: has no header; each line is read as a series, its label first (as in the UCR "
                           "archive)")
    places = [f"{path}, line {line}" for line in cells.lines]
    parts = ((str(number), place, partial(make, row, place))
             for number, (row, place) in enumerate(zip(cells.rows, places, strict=True), 1))
    return SeriesFile(parts, None, "series", cells.notes)


def ucr_series(path: Path, settings: Settings, labelled: bool) -> SeriesFile:
    """The series of a .txt: cells separated by blanks or commas, the label first."""
    cells = Cells(path, " ", [], [])
    for number, line in numbered_lines(read_text(path, settings, cells.notes)):
        cells.rows.append(tuple(re.split(r"\s*,\s*|\s+", line)))
        cells.lines.append(number)
    if not cells.rows:
        raise UserError(f"{path}: is empty; write a line per series, its label first")
    return _label_first(cells, settings)


# --- One series ------------------------------------------------------------------------------------------------------


def read_one_series(path: str | Path, settings: Settings = DEFAULTS, known: Sequence[str] | None = None) -> np.ndarray:
    """One series, float64 (L, C): .npy, or .csv / .tsv of numbers alone, a line per step, a header line optional."""
    return read_named_series(path, settings, known)[0]


def read_named_series(
    path: str | Path, settings: Settings = DEFAULTS, known: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str] | None]:
    """(series, names of its channels) of a file of one series; None for the names where it has no header."""
    path = FileFinder()(Path(path))
    if extension_of(path, [".npy", ".csv", ".tsv"]) == ".npy":
        array = load_numpy(path)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf" or array.ndim not in (1, 2):
            raise UserError(f"{path}: holds {_kind(array)}; it must be numbers (steps, channels) or (steps,)")
        return _checked(array if array.ndim == 2 else array[:, None], str(path)), None
    cells = read_cells(path, settings)
    if cells.rows and _has_header(cells, []):
        return _one_by_name(named(cells), settings, known, [])
    return _one_by_position(cells), None


def _one_by_position(cells: Cells) -> np.ndarray:
    path, rows, lines = cells.path, cells.rows, cells.lines
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(rows[0]):
            raise UserError(f"{path}, line {line}: {len(row)} fields, {len(rows[0])} in line {lines[0]}; "
                            "make them equal")
    comma = comma_is_point(cells.delimiter, (cell for row in rows for cell in row))
    values = np.array([_numbers(row, comma) for row in rows], ndmin=2)
    return _checked(values, str(path), lambda t, c: f"{path}, line {lines[t]}, column {c + 1}: {shown(rows[t][c])}")


def _one_by_name(
    table: Table, settings: Settings, known: Sequence[str] | None, others: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    _refuse_faults(table, sorted(table.faults))
    names = _features(table, settings, known, others)
    if not table.rows:
        raise UserError(f"{table.path}: the series is empty; write its steps below the header")
    values = _matrix(table, names)
    return _checked(values, str(table.path), lambda t, c: _cell(table, t, names[c])), names


# --- .ts -------------------------------------------------------------------------------------------------------------

_TS_TAGS = {"@problemname": str, "@timestamps": bool, "@missing": bool, "@univariate": bool, "@dimensions": int,
            "@equallength": bool, "@serieslength": int, "@classlabel": bool, "@targetlabel": bool}


def ts_series(path: Path, settings: Settings, labelled: bool) -> SeriesFile:
    """The series of a .ts file. Comments begin with # or %, and may be in any encoding.

    Of the archives of classification with @classLabel, of those of regression with @targetLabel.
    """
    notes: list[str] = []
    lines = numbered_lines(read_text(path, settings, notes, comments=(b"#", b"%")))
    lines = [(number, line) for number, line in lines if line[0] not in "#%"]
    return SeriesFile(_ts_parts(path, lines, settings.task, labelled), notes=notes)


def _ts_parts(path: Path, lines: list[tuple[int, str]], task: str, labelled: bool) -> Iterator[Part]:
    start = next((index for index, (_, line) in enumerate(lines) if line.lower() == "@data"), None)
    if start is None:
        raise UserError(f"{path}: there is no line @data; write it between the header and the series")
    header, classes = _ts_header(path, lines[:start])
    is_number = header.get("@targetlabel", False)
    if classes and is_number:
        raise UserError(f"{path}: its header has @classLabel and @targetLabel; say false of one of them")
    if labelled and is_number and task != "regression":
        raise UserError(f"{path}: its header has @targetLabel true, so its labels are numbers; say --task regression")
    if labelled and not classes and not is_number:
        wanted = "@targetLabel true" if task == "regression" else "@classLabel true"
        raise UserError(f"{path}: its header has no {wanted}; add it with the labels if the series have them")
    if not lines[start + 1 :]:
        raise UserError(f"{path}: there is no series after @data; write one per line")
    for index, (number, line) in enumerate(lines[start + 1 :], 1):
        place = f"{path}, line {number}"
        yield str(index), place, partial(_ts_series, line, place, header, classes, task, labelled)


def _ts_header(path: Path, lines: list[tuple[int, str]]) -> tuple[dict[str, Any], list[str]]:
    """(value of each tag, the class labels)"""
    header, classes = {}, []
    for number, line in lines:
        tag, *words = line.split()
        word, where = "".join(words[:1]).lower(), f"{path}, line {number}: {shown(line)}"
        tag = {"@dimension": "@dimensions"}.get(tag.lower(), tag.lower())
        if tag not in _TS_TAGS or tag in header:
            twice = "is there twice, keep one" if tag in header else f"is none of the tags {', '.join(_TS_TAGS)}"
            raise UserError(f"{where} {twice}; series come after @data")
        if _TS_TAGS[tag] is bool and word not in ("true", "false"):
            raise UserError(f"{where} must say true or false")
        if _TS_TAGS[tag] is int and not (word.isdecimal() and len(word) < 10 and int(word)):
            raise UserError(f"{where} must give a whole number of at least 1")
        header[tag] = word == "true" if _TS_TAGS[tag] is bool else int(word) if _TS_TAGS[tag] is int else words
        if tag == "@timestamps" and header[tag]:
            raise UserError(f"{where}: series with time stamps cannot be used yet; convert it to plain values")
        if tag == "@classlabel" and header[tag]:
            classes = words[1:]
            if not classes:
                raise UserError(f"{where} must name the labels: @classLabel true a b")
    return header, classes


def _ts_series(
    line: str, place: str, header: dict[str, Any], classes: list[str], task: str, labelled: bool
) -> tuple[np.ndarray, str | None]:
    """(series, label) of a line. The first series fixes in `header` what it left open."""
    dimensions = line.split(":")
    label = dimensions.pop().strip() if classes or header.get("@targetlabel") else None
    if labelled and classes:
        _check_declared(label, classes, task, place, "@classLabel")
    if header.get("@univariate") and len(dimensions) > 1:
        raise UserError(f"{place}: {len(dimensions)} dimensions, the header says @univariate true; correct one of them")
    if not dimensions:
        raise UserError(f"{place}: there is no ':' between series and label; correct it, or remove the line")
    if len(dimensions) != header.get("@dimensions", len(dimensions)):
        raise UserError(f"{place}: {len(dimensions)} dimensions, {header['@dimensions']} by @dimensions or the first "
                        "series; all must have the same")
    cells = [dimension.split(",") for dimension in dimensions]
    values = _channels(cells, place)
    if len(values) != header.get("@serieslength", len(values)):
        raise UserError(f"{place}: {len(values)} steps, {header['@serieslength']} by @seriesLength or the first series "
                        "and @equalLength; correct the header or the line")
    series = _checked(values, place, partial(_value, place, cells))
    header.setdefault("@dimensions", len(dimensions))
    if header.get("@equallength"):
        header.setdefault("@serieslength", len(values))
    return series, label


def _check_declared(label: str, classes: Sequence[str], task: str, place: str, declared: str) -> None:
    """Refuse a label that is not declared in the file; of several, each of them."""
    for part in label_parts(label) if task == "multilabel" else [label]:
        if part in classes:
            continue
        name = class_name(part, place)
        if not any(same_label(name, known) for known in classes):
            raise UserError(f"{place}: label {shown(part)} is not one of {declared}, {listed(classes)}; "
                            "correct it, or add it there")


def _value(place: str, cells: list[list[str]], t: int, c: int) -> str:
    return f"{place}, dimension {c + 1}, value {t + 1}: {shown(cells[c][t])}"


def _channels(cells: list[list[str]], place: str) -> np.ndarray:
    """Float64 (L, C) of the cells of each dimension."""
    lengths = sorted({len(values) for values in cells})
    if len(lengths) != 1:
        raise UserError(f"{place}: ragged, its dimensions have {listed(map(str, lengths))} values; make them equal")
    return np.stack([_numbers(values) for values in cells], axis=1)


# --- .arff -----------------------------------------------------------------------------------------------------------

_ATTRIBUTE = re.compile(r"@attribute\s+('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\S+)\s+(.+)", re.IGNORECASE)


def arff_series(path: Path, settings: Settings, labelled: bool) -> SeriesFile:
    """The series of an .arff file, one per row: its steps are the numeric attributes, or it is a relational attribute
    with a line for each channel. The label is the attribute named by settings.label_column, or else the last one if it
    is nominal (for regression, whatever its type).
    """
    notes: list[str] = []
    lines = numbered_lines(read_text(path, settings, notes, comments=(b"%",)))
    lines = [(number, line) for number, line in lines if line[0] != "%"]
    start = next((index for index, (_, line) in enumerate(lines) if line.lower() == "@data"), None)
    if start is None or start + 1 == len(lines):
        raise UserError(f"{path}: there is no series after a line @data; write one per line")
    attributes = _arff_attributes(path, lines[:start])
    names = list(attributes)
    labels = _arff_labels(path, attributes, settings, labelled, notes)
    relational = [name for name in names if attributes[name] == "relational"]
    if relational and len(names) - len(relational) - len(labels):
        raise UserError(f"{path}: attributes beside a relational one and the label cannot be read; remove them")
    rows, faults, places = [], {}, []
    for index, (number, line) in enumerate(lines[start + 1 :]):
        places.append(number)
        try:
            rows.append(_arff_row(line, len(names)))
        except ValueError as error:
            faults[index] = f"{path}, line {number}: {error}"
            rows.append(("",) * len(names))
    table = Table(path, {name: position for position, name in enumerate(names)}, rows, places, faults, notes=notes)
    declared = {label: _arff_classes(path, label, attributes[label]) for label in labels}
    by_name = settings.task == "regression" or len(labels) > 1  # so that an answer is called as its attribute

    def checked(part: Part) -> Part:
        id, place, make, *group = part

        def make_checked() -> tuple[Any, Any]:
            value, cell = make()
            cells = cell if len(labels) > 1 else dict.fromkeys(labels, cell)
            cells = {label: None if found == "?" else found for label, found in cells.items()}
            for label, found in cells.items() if labelled else ():
                if found is not None and declared[label]:
                    _check_declared(found, declared[label], settings.task, place, f"@attribute {label}")
            return value, cells if by_name else next(iter(cells.values()), None)

        return id, place, make_checked, *group

    if labels:
        settings = replace(settings, label_column=joined(labels) if settings.task != "classification" else labels[0])
    if relational:
        parts = _relational_parts(table, relational[0], settings, labelled)
    else:
        parts = _series_per_row(table, settings, labelled, None).parts
    return SeriesFile(map(checked, parts), notes=notes)


def _arff_labels(
    path: Path, attributes: dict[str, str], settings: Settings, labelled: bool, notes: list[str]
) -> list[str]:
    """The attributes of the label; [] if there are none and none are needed."""
    asked = [nfc(name) for name in label_columns(settings)]
    there = [name for name in asked if name in attributes]
    if there == asked:
        return asked
    if there or settings.label_column != FIELDS["label_column"].default:
        absent = next(name for name in asked if name not in there)
        raise UserError(f"{path}: no attribute {absent!r}, which --label_column names; there are {listed(attributes)}")
    last = list(attributes)[-1]
    if attributes[last].startswith("{"):
        return [last]
    if settings.task == "regression" and attributes[last] != "relational":
        notes.append(f"{path}: its last attribute, {last}, is taken for the label (--label_column overrides)")
        return [last]
    if labelled:
        raise UserError(f"{path}: no nominal attribute, such as @attribute class {{a,b}}, at its end; name the one of "
                        "the labels by --label_column, and for numbers say --task regression")
    return []


def _arff_classes(path: Path, label: str, declared: str) -> list[str]:
    """The classes of a nominal attribute; [] for another one."""
    try:
        return _arff_cells(declared.strip("{} ")) if declared.startswith("{") else []
    except ValueError as error:
        raise UserError(f"{path}: @attribute {label} {shown(declared)}: {error}") from error


def _arff_attributes(path: Path, lines: list[tuple[int, str]]) -> dict[str, str]:
    """{name: type} of the attributes; those within a relational one are skipped."""
    attributes: dict[str, str] = {}
    within = False
    for number, line in lines:
        where = f"{path}, line {number}: {shown(line)}"
        keyword = line.split()[0].lower()
        match = _ATTRIBUTE.fullmatch(line)
        if keyword == "@end":
            within = False
        elif keyword == "@relation" or within:
            continue
        elif match is None:
            raise UserError(f"{where} is none of @relation, @attribute NAME TYPE, @end, @data; correct it")
        else:
            name = nfc(match[1].strip("'\""))
            kind = match[2].strip()
            kind = kind if kind.startswith("{") else kind.lower()
            if name in attributes:
                raise UserError(f"{where} is there twice; rename one")
            attributes[name] = kind
            within = kind == "relational"
    if not attributes:
        raise UserError(f"{path}: there is no @attribute before @data; write one for each cell of a row")
    return attributes


def _arff_cells(text: str) -> list[str]:
    """The cells of a line, quoted by ' or " (whichever comes first); the \\n in a relational cell is left alone."""
    quote = next((c for c in text if c in "'\""), "'")
    try:
        cells = next(csv_reader([text], quotechar=quote, skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise ValueError(f"{error}; close each quote") from error
    return [cell.strip() for cell in cells]


def _arff_row(line: str, width: int) -> tuple[str, ...]:
    if line.startswith("{"):
        raise ValueError("sparse rows are not read; write every value")
    cells = _arff_cells(line)
    if len(cells) != width:
        raise ValueError(f"{len(cells)} values for {width} attributes; make them equal")
    return tuple(cells)


def _relational_parts(table: Table, name: str, settings: Settings, labelled: bool) -> Iterator[Part]:
    bags = table.column(name)
    labels = label_cells(table, settings) if labelled else None

    def make(row: int) -> tuple[np.ndarray, Any]:
        _refuse_faults(table, [row])
        place = table.place(row)
        cells = [channel.split(",") for channel in bags[row].split("\\n")]
        values = _channels(cells, place)
        series = _checked(values, place, partial(_value, place, cells))
        return series, labels[row] if labels else None

    for row in range(len(bags)):
        yield str(row + 1), table.place(row), partial(make, row)


# --- NumPy -----------------------------------------------------------------------------------------------------------

_NPZ_NAMES = {"regression": "target_names", "multilabel": "class_names"}  # of the columns of y
_SMALL = 1 << 28  # bytes that an archive may always unpack to
_MAPPED = 1 << 24  # bytes of an array from which it is mapped into memory where it can be, rather than read


def load_numpy(path: Path, wanted: Sequence[str] = (), most: int = 100) -> np.ndarray | dict[str, np.ndarray]:
    """The array of an .npy file, or the arrays of an .npz file by key: the `wanted` ones, and None for others.

    An archive may unpack to `most` times its size.
    """
    check_regular(path)
    try:
        with open(path, "rb") as file:
            is_archive = file.read(2) == b"PK"
        if is_archive:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > max(_SMALL, most * path.stat().st_size):
                times = unpacked // path.stat().st_size
                raise UserError(f"{path}: unpacks to {unpacked / 2**30:.1f} GiB, {times} times its size; if that is "
                                f"right, raise --max_unpacking (now {most})")
            with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as loaded:
                mapped = {key: _mapped(path, archive, f"{key}.npy") for key in wanted if key in loaded.files}
                arrays = {key: loaded[key] if array is None else array for key, array in mapped.items()}
                return dict.fromkeys(loaded.files) | arrays
        return np.load(path, mmap_mode="r", allow_pickle=False)  # refuses a header that claims more than there is
    except (UserError, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; correct it, or save it again") from error
    except Exception as error:  # damaged bytes raise a dozen kinds of exception
        raise UserError(f"{path}: not plain NumPy arrays: {error}; objects (pickled) are not read, save labels as "
                        "y.astype(str), and series of unequal length as one array x and their lengths") from error


def _mapped(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray | None:
    """The array of an archive that stores it as it is, mapped into memory; None of one that is small or compressed."""
    entry = archive.NameToInfo.get(name)
    if entry is None or entry.compress_type != zipfile.ZIP_STORED or entry.file_size < _MAPPED:
        return None
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in headers:
            return None
        shape, fortran, dtype = headers[version](file)
        header = file.tell()
    if dtype.hasobject or header + math.prod(shape) * dtype.itemsize != entry.file_size:
        return None  # np.load says what is wrong
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)  # lengths of the name and of what follows it, before the contents
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    if zlib.crc32(np.memmap(path, np.uint8, "r", start, (entry.file_size,))) != entry.CRC:
        raise zipfile.BadZipFile(f"Bad CRC-32 for file {name!r}")
    return np.memmap(path, dtype, "r", start + header, shape, "F" if fortran else "C")


def _kind(array: Any) -> str:
    return f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"


def npz_series(path: Path, settings: Settings, labelled: bool) -> SeriesFile:
    group_column = settings.group_column
    of_labels = ["y", *_NPZ_NAMES.values()]  # ignored if labels are not asked for
    wanted = ["x", "lengths", "id", group_column] + of_labels * labelled
    arrays = load_numpy(path, wanted, settings.max_unpacking)
    needed = ["x"] + ["y"] * labelled
    others = ["lengths", "id"] + ([_NPZ_NAMES[settings.task]] if labelled and settings.task in _NPZ_NAMES else [])
    unused = [] if labelled else of_labels
    if not isinstance(arrays, dict) or not set(needed) <= set(arrays) <= {*needed, *others, *unused, group_column}:
        raise UserError(f"{path}: holds {listed(arrays) if isinstance(arrays, dict) else 'no keys'}; it must hold "
                        f"{' and '.join(needed)}, and of other keys only {', '.join(others)} and the --group_column")
    series = _packed(path, arrays["x"], arrays.get("lengths"))

    def column(key: str, kinds: str) -> list[Any]:
        return _per_series(path, key, arrays[key], kinds, len(series))

    per_step = labelled and settings.task == "tagging"
    if per_step:
        labels = _labels_of_steps(path, arrays["y"], arrays["x"], arrays.get("lengths"))
    else:
        labels = _npz_labels(path, arrays, settings.task, len(series)) if labelled else None
    groups = column(group_column, "iuUS") if group_column in arrays else None
    ids = [str(id) for id in (column("id", "iuUS") if "id" in arrays else range(1, len(series) + 1))]
    if (twice := repeated(ids)) is not None:
        raise UserError(f"{path}: id {shown(twice)} is there more than once; give each series its own")

    places = [f"{path}, row {row}" for row in range(1, len(ids) + 1)]
    faults = {row: UserError(f"{places[row]}: the id is empty; fill it in, or remove the row")
              for row, id in enumerate(ids) if not id.strip()}  # fmt: skip
    ends, doubtful = _without_padding(series, per_step)
    for row in doubtful:
        try:
            values = _checked(series.part(row), places[row], labels=labels[row] if per_step else None)
            ends[row] = series.starts[row] + len(values)
        except UserError as error:
            faults.setdefault(row, error)
    series.ends = ends
    if per_step:
        labels = [label[:length] for label, length in zip(labels, series.lengths, strict=True)]
    groups = None if groups is None else list(map(str, groups))
    return SeriesFile(Whole(ids, places, series, labels, groups, faults))


def _without_padding(series: PackedSeries, per_step: bool) -> tuple[np.ndarray, list[int]]:
    """(the end of each series without the padding, see `_checked`; the numbers of those that it must look at).

    per_step: whether each step has a label, so that `_checked` decides what is padding.
    """
    starts, ends = series.starts, series.ends.copy()
    doubtful = (ends == starts) | (series.channels == 0)
    if series.data.dtype.kind != "f" or not series.data.size:
        return ends, np.flatnonzero(doubtful).tolist()
    first, room = 0, max(1, VALUES // series.channels)
    while first < len(series):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + room, "right")))
        part = series.data[starts[first] : ends[last - 1]]
        if not np.isfinite(part).all():
            missing = np.isnan(part).all(1)
            infinite = np.concatenate([[0], np.cumsum(np.isinf(part).any(1))])
            real = np.concatenate([[-1], np.maximum.accumulate(np.where(missing, -1, np.arange(len(part))))])
            begin, end = starts[first:last] - starts[first], ends[first:last] - starts[first]
            end_of_real = real[end] + 1
            wrong = (infinite[end] > infinite[begin]) | (end_of_real <= begin)
            doubtful[first:last] |= wrong | (per_step & (end_of_real < end))
            ends[first:last] = starts[first] + np.where(wrong, end, end_of_real)
        first = last
    return ends, np.flatnonzero(doubtful).tolist()


def _packed(path: Path, x: np.ndarray, lengths: np.ndarray | None) -> PackedSeries:
    """The series (L, C) in x, in the forms that `data_files.read_series` describes."""
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "biuf" or x.ndim not in (2, 3) or not len(x):
        raise UserError(f"{path}: x is {_kind(x)}; it must be numbers (series, steps, channels)")
    if x.dtype.itemsize > 8:  # of values that float64 may not hold
        with np.errstate(over="ignore"):
            x = x.astype(np.float64)
    if lengths is None or x.ndim == 3:
        channels = x.shape[2] if x.ndim == 3 else 1
        starts = np.arange(len(x)) * x.shape[1]
        steps = x.reshape(len(x) * x.shape[1], channels)
    if lengths is None:
        return PackedSeries(steps, starts, starts + x.shape[1])
    sizes = np.array(_per_series(path, "lengths", lengths, "iu", len(x) if x.ndim == 3 else None))
    if lengths.min() < 0 or (x.ndim == 3 and lengths.max() > x.shape[1]):
        raise UserError(f"{path}: lengths go from {lengths.min()} to {lengths.max()}; x {x.shape} has no such steps")
    if x.ndim == 3:
        return PackedSeries(steps, starts, starts + sizes)
    ends = np.cumsum(sizes)
    if ends[-1] != len(x):
        raise UserError(f"{path}: lengths sum to {ends[-1]}, x (steps, channels) has {len(x)} steps; make them equal, "
                        "or give x as (series, steps, channels)")
    return PackedSeries(x, ends - sizes, ends)


def _labels_of_steps(path: Path, y: Any, x: np.ndarray, lengths: np.ndarray | None) -> list[list[Any]]:
    """The labels of the steps of each series: y has the shape of x without its channels."""
    steps = x.shape[:2] if lengths is None or x.ndim == 3 else x.shape[:1]
    if not isinstance(y, np.ndarray) or y.dtype.kind not in "biufUS" or y.shape != steps:
        raise UserError(f"{path}: y is {_kind(y)}; --task tagging needs whole numbers or text {steps}, one for each "
                        "step of x, and -100 or '' where there is none")  # fmt: skip
    y = np.char.decode(y, "utf-8") if y.dtype.kind == "S" else y
    if lengths is None:
        return y.tolist()
    if x.ndim == 3:
        return [row[:length].tolist() for row, length in zip(y, lengths, strict=True)]
    return [part.tolist() for part in np.split(y, np.cumsum(lengths)[:-1])]


def _npz_labels(path: Path, arrays: dict[str, np.ndarray], task: str, count: int) -> list[Any]:
    """The label of each series; for y (N, K) of numbers, or of 1 and 0, a dict by the names of its columns."""
    y, key = arrays["y"], _NPZ_NAMES.get(task, "")
    if key not in arrays and (task == "classification" or np.ndim(y) != 2):
        return _per_series(path, "y", y, "biufUS", count, task)
    if task == "regression" and np.ndim(y) == 1:
        y = y[:, None]
    fits = isinstance(y, np.ndarray) and y.dtype.kind in "biuf" and y.ndim == 2
    if not fits or len(y) != count or not y.shape[1]:
        raise UserError(f"{path}: y is {_kind(arrays['y'])}; it must be numbers ({count}, columns), a row for each "
                        "series" + f"; {key} names the columns" * (key in arrays))
    if key not in arrays and task == "regression" and y.shape[1] == 1:
        return y[:, 0].tolist()
    names = [f"label {number}" for number in range(1, y.shape[1] + 1)]
    if key in arrays:
        names = [nfc(name).strip() for name in _per_series(path, key, arrays[key], "US", None, task)]
        if len(names) != y.shape[1] or repeated(names) is not None or "" in names:
            raise UserError(f"{path}: {key} is {listed(names)}; it must be {y.shape[1]} different names, one for each "
                            f"column of y {y.shape}")
    return [dict(zip(names, row, strict=True)) for row in y.tolist()]


def _per_series(path: Path, key: str, array: np.ndarray, kinds: str, count: int | None, task: str = "") -> list[Any]:
    """The elements of an array with one value per series, of these dtype kinds."""
    fits = isinstance(array, np.ndarray) and array.dtype.kind in kinds and array.ndim == 1 and array.size
    if not fits or len(array) != (count or len(array)):
        meaning = "text" if kinds == "US" else "whole numbers" + " or text" * ("U" in kinds)
        meaning = "numbers" if task == "regression" and key == "y" else meaning
        of = "" if key in _NPZ_NAMES.values() else f", one for each of the {count or 'stored'} series"
        several = ""
        if key == "y" and np.ndim(array) == 2:
            several = ("; for several labels of a series, 1 or 0 each, say --task multilabel, for numbers --task "
                       "regression, for one of each step --task tagging; one of several classes is y.argmax(1)")
        raise UserError(f"{path}: {key} is {_kind(array)}; it must be {meaning}{of}{several}")
    try:
        return (np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array).tolist()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {key} is not UTF-8; save it as text") from error
