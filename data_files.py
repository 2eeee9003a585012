"""Users' own files: series, texts, images and tables of them, read into raw items.

    read_series     .ts (UEA / UCR archive), .npz, .npy, .csv, .tsv    float64 (L, C), NaN where a value is missing
    read_texts      .csv, .tsv, .jsonl, .txt                           str
    read_images     a folder of class folders, or one image            Path; open_image and to_rgb make pixels of it
    read_manifest   .csv, .tsv, .jsonl that names files                {'image': Path, 'text': str, 'series': Path}

L is the steps of a series, C its channels. Two arguments are the same everywhere:

    labelled   True: each item needs a label, as text. False: labels may be missing and are not looked at.
    on_error   called with the UserError of an item that cannot be used; if it returns, the item is left out.
               By default it raises. What is wrong with the file as a whole always raises UserError.

A message names the file and line (or row) as the user gave it, the value and the remedy. Nothing is unpickled.
"""

import codecs
import csv
import io
import json
import math
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from config import UserError


@dataclass
class Items:
    """Raw items of a file or folder, in its order."""

    ids: list[str]  # what predictions call them: row number from 1, series id, or file name relative to the folder
    places: list[str]  # for error messages: "train.csv, line 12" or "pets/cats/7.png"
    values: list[Any]
    labels: list[str] | None  # one for each; None where they were not asked for
    features: list[str] | None = None  # names of the channels, where the file has them
    notes: list[str] = field(default_factory=list)  # what was left out and is no mistake, to be shown

    def subset(self, numbers: Iterable[int]) -> "Items":
        """The items of these numbers, in their order."""
        chosen = ([column[i] for i in numbers] for column in (self.ids, self.places, self.values, self.labels))
        return Items(*chosen, self.features, self.notes)


OnError = Callable[[UserError], None]
Part = tuple[str, str, Callable[[], tuple[Any, str | None]]]  # id, place, what makes (value, label) or raises UserError


def stop(error: UserError) -> None:
    """The default on_error."""
    raise error


def _gather(parts: Iterable[Part], labelled: bool, on_error: OnError, features: list[str] | None = None) -> Items:
    items = Items([], [], [], [] if labelled else None, features)
    for id, place, make in parts:
        try:
            value, label = make()
        except UserError as error:
            on_error(error)
            continue
        items.ids.append(id)
        items.places.append(place)
        items.values.append(value)
        if labelled:
            items.labels.append(label)
    return items


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _extension(path: Path, valid: list[str], labelled: bool = False, unlabelled: str = "") -> str:
    """The lower-case extension: one of `valid`, or `unlabelled`, of files that hold no label."""
    extension = path.suffix.lower()
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file ({', '.join(valid)})")
    if labelled and extension == unlabelled:
        raise UserError(f"{path}: a {extension} file holds no label; for labelled data use {' or '.join(valid)}")
    if not extension or extension not in (*valid, unlabelled):
        known = ", ".join(filter(None, (*valid, *([] if labelled else [unlabelled]))))
        raise UserError(f"{path}: unknown extension {extension!r}; convert it to one of {known}")
    return extension


# -- labels ---------------------------------------------------------------------------------------------------


def _label(value: Any, where: str) -> str:
    """A class as text: '1' for 1 and 1.0, 'true' for True. Fractions are measurements, not classes."""
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        value = str(int(value))
    elif value is not None and not isinstance(value, str):
        raise UserError(f"{where}: label {_shown(value)} is no class; write text, a whole number, true or false")
    return _text(value, f"{where}: the label").strip()


def _text(value: Any, where: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{where} is empty; fill it in, or remove the row")
    if not isinstance(value, str):
        raise UserError(f"{where} is {_shown(value)}, not text; write it in quotes")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud83d" in JSON
        raise UserError(f"{where} {_shown(value)} holds half a surrogate pair; write the whole character") from error
    return value


def class_order(labels: Iterable[str]) -> list[str]:
    """The distinct labels: by number if all of them are numbers, otherwise as text."""
    distinct = sorted(set(labels))
    try:
        return sorted(distinct, key=float) if all(math.isfinite(float(label)) for label in distinct) else distinct
    except ValueError:
        return distinct


# -- text files and tables ------------------------------------------------------------------------------------


def _read_utf8(path: Path) -> str:
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8).decode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; correct the path or its permissions") from error
    except UnicodeDecodeError as error:
        place = f"{path}, line {error.object[: error.start].count(10) + 1}"  # 10 is the newline
        raise UserError(f"{place}: byte 0x{error.object[error.start]:02x} is not UTF-8; save it as UTF-8") from error


@dataclass
class Table:
    """Rows of a .csv, .tsv or .jsonl file; a row always has one cell for each column (None: not in its object)."""

    path: Path
    columns: list[str]
    rows: list[tuple[Any, ...]]
    lines: list[int]  # the first line of each row
    faults: dict[int, str]  # what is wrong with a row: the message, by its index

    def place(self, row: int) -> str:
        return f"{self.path}, line {self.lines[row]}"

    def column(self, name: str) -> list[Any]:
        """The cells of a column. Raises UserError that lists the columns there are."""
        if name not in self.columns:
            delimiter = "; its delimiter seems to be another one" if set(";\t,") & set("".join(self.columns)) else ""
            raise UserError(f"{self.path}: no column {name!r}; there are {_listed(self.columns)}: name the right one "
                            f"by its flag (--id_column, --text_column, --label_column){delimiter}")
        position = self.columns.index(name)
        return [row[position] for row in self.rows]


def read_table(path: str | Path) -> Table:
    """A .csv or .tsv file whose first line names the columns, or a .jsonl file of one object per line; UTF-8.

    Quoting is Excel's, in .tsv too; blank lines are skipped. Raises UserError; a row that cannot be used is a fault.
    """
    path = Path(path)
    table = _jsonl_table(path) if _extension(path, [".csv", ".tsv", ".jsonl"]) == ".jsonl" else _csv_table(path)
    if not table.rows:
        raise UserError(f"{path}: holds no row; write one per item" + " below the header" * bool(table.columns))
    return table


def _csv_rows(path: Path) -> tuple[list[tuple[str, ...]], list[int]]:
    """(rows, first line of each)"""
    rows, lines, line = [], [], 1
    csv.field_size_limit(2**31 - 1)  # csv's own limit is 128 KiB a cell
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(_read_utf8(path), newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if row:
                rows.append(tuple(row))  # a million lists would keep the garbage collector busy
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: {error}; close each quote, and double a quote within quotes") from error
    return rows, lines


def _csv_table(path: Path) -> Table:
    rows, lines = _csv_rows(path)
    if not rows:
        raise UserError(f"{path}: is empty; its first line must name the columns")
    columns, faults = [name.strip() for name in rows.pop(0)], {}
    where = f"{path}, line {lines.pop(0)}"
    if "" in columns:
        raise UserError(f"{where}: column {columns.index('') + 1} has no name; name it, or remove it")
    if twice := _repeated(columns):
        raise UserError(f"{where}: column {twice!r} is there more than once; rename one")
    for index, row in enumerate(rows):
        if len(row) != len(columns):
            faults[index] = (f"{path}, line {lines[index]}: {len(row)} fields for {len(columns)} columns; "
                             f"make them equal, and quote a field that holds the delimiter")
            rows[index] = (row + ("",) * len(columns))[: len(columns)]
    return Table(path, columns, rows, lines, faults)


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = _repeated(key for key, _ in pairs)
    if twice is not None:
        raise ValueError(f"key {twice!r} is there more than once")
    return dict(pairs)


def _jsonl_table(path: Path) -> Table:
    objects, lines, faults, columns = [], [], {}, {}
    for number, line in enumerate(_read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_json_object)
            if not isinstance(value, dict):
                raise ValueError(f"{_shown(value)} is no object")
        except (ValueError, RecursionError) as error:
            what = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else error
            faults[len(lines)] = f'{path}, line {number}: {what}; write one object per line: {{"text": "..."}}'
            value = {}
        columns.update(dict.fromkeys(value))
        objects.append(value)
        lines.append(number)
    if objects and not columns:
        raise UserError(faults.get(0) or f"{path}, line {lines[0]}: the object is empty; give it keys")
    return Table(path, list(columns), [tuple(map(row.get, columns)) for row in objects], lines, faults)


def _rows_of(
    table: Table, value_of: Callable[[int], Any], id_column: str, label_column: str, labelled: bool, on_error: OnError
) -> Items:
    """The items of a table with one row each; `value_of` is given the row's index."""
    labels = table.column(label_column) if labelled else None
    ids = table.column(id_column) if id_column in table.columns else range(1, len(table.rows) + 1)

    def make(row: int) -> tuple[Any, str | None]:
        if row in table.faults:
            raise UserError(table.faults[row])
        return value_of(row), _label(labels[row], table.place(row)) if labelled else None

    parts = ((str(ids[row]), table.place(row), partial(make, row)) for row in range(len(table.rows)))
    return _gather(parts, labelled, on_error)


# -- series ---------------------------------------------------------------------------------------------------


def read_series(
    path: str | Path,
    id_column: str = "id",
    label_column: str = "label",
    labelled: bool = True,
    on_error: OnError = stop,
) -> Items:
    """Series, float64 (L, C), NaN where a value is missing.

    Steps at the end at which every channel is missing are padding and are cut off. A series without a step, one whose
    values are all missing, and infinity are refused. The formats:

    .ts         as in the UEA and UCR archives: a header of @tags, then a line per series, dimensions separated by ':',
                values by ',', the label last; missing: ? or NaN. What the header says must be true (@missing apart).
    .npz        x: (N, L, C), or (N, L) for one channel; y: (N,) labels, numbers or text; id: (N,) optional.
                lengths: (N,) optional: with x (N, L, C) the steps that count of each series; with x (T, C) the
                series lie one after the other and their lengths sum to T.
    .npy        one series (L, C) or (L,), without label.
    .csv, .tsv  a line per time step: columns of series id and label, all others are features. The steps of a series
                are in file order and may lie between those of others; its label is the same in all its rows.
                Missing: an empty cell, ?, nan or NA. Without labels, a file that has no column of series id is one
                series, see `read_one_series`.
    """
    path = Path(path)
    extension = _extension(path, [".ts", ".npz", ".csv", ".tsv"], labelled, ".npy")
    if extension == ".npy" or (extension in (".csv", ".tsv") and not labelled and not _has_column(path, id_column)):
        return Items([path.name], [str(path)], [read_one_series(path)], None)
    if extension in (".csv", ".tsv"):
        return _read_long_table(path, id_column, label_column, labelled, on_error)
    return _gather((_ts_parts if extension == ".ts" else _npz_parts)(path, labelled), labelled, on_error)


def _has_column(path: Path, name: str) -> bool:
    rows, _ = _csv_rows(path)
    return bool(rows) and name in [cell.strip() for cell in rows[0]]


def read_one_series(path: str | Path) -> np.ndarray:
    """One series, float64 (L, C): .npy, or .csv / .tsv of numbers alone, a line per step, a header line optional."""
    path = Path(path)
    if _extension(path, [".npy", ".csv", ".tsv"]) == ".npy":
        array = _load_numpy(path)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf" or array.ndim not in (1, 2):
            raise UserError(f"{path}: holds {_kind(array)}; it must be numbers (steps, channels) or (steps,)")
        return _checked(array if array.ndim == 2 else array[:, None], str(path))
    rows, lines = _csv_rows(path)
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(rows[0]):
            raise UserError(f"{path}, line {line}: {len(row)} fields, {len(rows[0])} in line {lines[0]}; "
                            "make them equal")
    if rows and all(_is_text(cell) for cell in rows[0]):
        del rows[0], lines[0]
    values = np.array([_numbers(row) for row in rows], ndmin=2)
    return _checked(values, str(path), lambda t, c: f"{path}, line {lines[t]}, column {c + 1}: {_shown(rows[t][c])}")


def _number(cell: str) -> float:
    cell = cell.strip()
    if "_" in cell:  # float would take 1_000 for 1000
        raise ValueError
    return math.nan if cell in ("", "?", "NA") else float(cell)


def _is_text(cell: str) -> bool:
    try:
        return _number(cell) is None
    except ValueError:
        return True


def _numbers(cells: list[str]) -> np.ndarray:
    """Float64, NaN where a value is missing, infinity where a cell is no number: `_checked` refuses that."""
    try:
        return np.array(list(map(_number, cells)))
    except ValueError:
        return np.array([math.inf if _is_text(cell) else _number(cell) for cell in cells])


def _checked(values: np.ndarray, place: str, cell: Callable[[int, int], str] | None = None) -> np.ndarray:
    """The series float64 (L, C) without the padding at its end; `cell` shows the value at (step, channel)."""
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
    return values[: real[-1] + 1]


def _read_long_table(path: Path, id_column: str, label_column: str, labelled: bool, on_error: OnError) -> Items:
    table = read_table(path)
    ids = table.column(id_column)
    labels = table.column(label_column) if labelled else None
    features = [name for name in table.columns if name not in (id_column, label_column)]
    if not features:
        raise UserError(f"{path}: no column beside {id_column!r} and {label_column!r}; add the features")
    columns = {name: table.column(name) for name in features}
    numbers = np.stack([_numbers(cells) for cells in columns.values()], axis=1)
    rows_of: dict[str, list[int]] = {}
    for row, id in enumerate(ids):
        # A row without an id is an item of its own, and a bad one.
        rows_of.setdefault(id.strip() or f"\n{row}", []).append(row)

    def make(rows: list[int]) -> tuple[np.ndarray, str | None]:
        first = table.place(rows[0])
        faults = [table.faults[row] for row in rows if row in table.faults]
        if faults:
            raise UserError(faults[0])
        _text(ids[rows[0]], f"{first}: the series id in column {id_column!r}")
        label = _label(labels[rows[0]], first) if labelled else None
        for row in rows if labelled else ():
            if labels[row].strip() != label:
                raise UserError(f"{table.place(row)}: label {_shown(labels[row])} of series {ids[row]!r}, but "
                                f"{label!r} in line {table.lines[rows[0]]}; give all its rows the same")

        def cell(t: int, c: int) -> str:
            name = features[c]
            return f"{table.place(rows[t])}, column {name!r}: {_shown(columns[name][rows[t]])}"

        return _checked(numbers[rows], first, cell), label

    parts = ((id, table.place(rows[0]), partial(make, rows)) for id, rows in rows_of.items())
    return _gather(parts, labelled, on_error, features)


# -- series: .ts ----------------------------------------------------------------------------------------------

_TS_TAGS = {"@problemname": str, "@timestamps": bool, "@missing": bool, "@univariate": bool, "@dimensions": int,
            "@equallength": bool, "@serieslength": int, "@classlabel": bool, "@targetlabel": bool}


def _ts_parts(path: Path, labelled: bool) -> Iterator[Part]:
    lines = [(number, line.strip()) for number, line in enumerate(_read_utf8(path).split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    start = next((index for index, (_, line) in enumerate(lines) if line.lower() == "@data"), None)
    if start is None:
        raise UserError(f"{path}: there is no line @data; write it between the header and the series")
    header, classes = _ts_header(path, lines[:start])
    if labelled and not classes:
        raise UserError(f"{path}: its header has no @classLabel true; add it with the labels if the series have them")
    if not lines[start + 1 :]:
        raise UserError(f"{path}: there is no series after @data; write one per line")
    for index, (number, line) in enumerate(lines[start + 1 :], 1):
        place = f"{path}, line {number}"
        yield str(index), place, partial(_ts_series, line, place, header, classes, labelled)


def _ts_header(path: Path, lines: list[tuple[int, str]]) -> tuple[dict[str, Any], list[str]]:
    """(value of each tag, the class labels)"""
    header, classes = {}, []
    for number, line in lines:
        tag, *words = line.split()
        word, where = "".join(words[:1]).lower(), f"{path}, line {number}: {_shown(line)}"
        tag = {"@dimension": "@dimensions"}.get(tag.lower(), tag.lower())
        if tag not in _TS_TAGS or tag in header:
            twice = "is there twice, keep one" if tag in header else f"is none of the tags {', '.join(_TS_TAGS)}"
            raise UserError(f"{where} {twice}; series come after @data")
        if _TS_TAGS[tag] is bool and word not in ("true", "false"):
            raise UserError(f"{where} must say true or false")
        if _TS_TAGS[tag] is int and not (word.isdecimal() and len(word) < 10 and int(word)):
            raise UserError(f"{where} must give a whole number of at least 1")
        header[tag] = word == "true" if _TS_TAGS[tag] is bool else int(word) if _TS_TAGS[tag] is int else words
        if tag in ("@timestamps", "@targetlabel") and header[tag]:
            kind = {"@timestamps": "series with time stamps", "@targetlabel": "a regression target"}[tag]
            raise UserError(f"{where}: {kind} cannot be used; convert it to plain values and @classLabel")
        if tag == "@classlabel" and header[tag]:
            classes = words[1:]
            if not classes:
                raise UserError(f"{where} must name the labels: @classLabel true a b")
    return header, classes


def _ts_series(
    line: str, place: str, header: dict[str, Any], classes: list[str], labelled: bool
) -> tuple[np.ndarray, str | None]:
    """(series, label) of a line. The first series fixes in `header` what it left open."""
    dimensions = line.split(":")
    label = dimensions.pop().strip() if classes else None
    if labelled and label not in classes:
        raise UserError(f"{place}: label {_shown(label)} is not one of @classLabel, {_listed(classes)}; "
                        "correct it, or add it there")
    if header.get("@univariate") and len(dimensions) > 1:
        raise UserError(f"{place}: {len(dimensions)} dimensions, the header says @univariate true; correct one of them")
    if len(dimensions) != header.get("@dimensions", len(dimensions)):
        raise UserError(f"{place}: {len(dimensions)} dimensions, {header['@dimensions']} by @dimensions or the first "
                        "series; all must have the same")
    cells = [dimension.split(",") for dimension in dimensions]
    lengths = sorted({len(values) for values in cells})
    if len(lengths) != 1:
        raise UserError(f"{place}: ragged, its dimensions have {_listed(map(str, lengths))} values; make them equal")
    if lengths[0] != header.get("@serieslength", lengths[0]):
        raise UserError(f"{place}: {lengths[0]} steps, {header['@serieslength']} by @seriesLength or the first series "
                        "and @equalLength; correct the header or the line")
    values = np.stack([_numbers(values) for values in cells], axis=1)
    series = _checked(values, place, lambda t, c: f"{place}, dimension {c + 1}, value {t + 1}: {_shown(cells[c][t])}")
    header.setdefault("@dimensions", len(dimensions))
    if header.get("@equallength"):
        header.setdefault("@serieslength", lengths[0])
    return series, label


# -- series: NumPy --------------------------------------------------------------------------------------------

_NPZ_KEYS = ("x", "y", "lengths", "id")


def _load_numpy(path: Path, unread: str = "") -> np.ndarray | dict[str, np.ndarray]:
    """The array of an .npy file, or those of an .npz file by key, without the one that is `unread`."""
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else {
                key: loaded[key] for key in loaded.files if key != unread}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; correct the path, or save anew") from error
    except Exception as error:  # damaged bytes come out as a dozen kinds
        raise UserError(f"{path}: not plain NumPy arrays: {error}; objects (pickled) are not read, save labels as "
                        "y.astype(str), and series of unequal length as one array x and their lengths") from error


def _kind(array: Any) -> str:
    return f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"


def _npz_parts(path: Path, labelled: bool) -> Iterator[Part]:
    arrays = _load_numpy(path, unread="" if labelled else "y")
    needed = ("x", "y") if labelled else ("x",)
    if not isinstance(arrays, dict) or not set(needed) <= set(arrays) <= set(_NPZ_KEYS):
        raise UserError(f"{path}: holds {_listed(arrays) if isinstance(arrays, dict) else 'no keys'}; it must hold "
                        f"{' and '.join(needed)}, and of other keys only {', '.join(_NPZ_KEYS[len(needed):])}")
    series = _npz_series(path, arrays["x"], arrays.get("lengths"))

    def column(key: str, kinds: str) -> list[Any]:
        return _per_series(path, key, arrays[key], kinds, len(series))

    labels = column("y", "biufUS") if labelled else None
    ids = [str(id) for id in (column("id", "iuUS") if "id" in arrays else range(1, len(series) + 1))]
    twice = _repeated(ids)
    if twice is not None:
        raise UserError(f"{path}: id {_shown(twice)} is there more than once; give each series its own")

    def make(row: int, place: str) -> tuple[np.ndarray, str | None]:
        _text(ids[row], f"{place}: the id")
        return _checked(series[row], place), _label(labels[row], place) if labelled else None

    for row, id in enumerate(ids):
        place = f"{path}, row {row + 1}"
        yield id, place, partial(make, row, place)


def _npz_series(path: Path, x: np.ndarray, lengths: np.ndarray | None) -> Sequence[np.ndarray]:
    """The series (L, C) in x; the formats are those of `read_series`."""
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "biuf" or x.ndim not in (2, 3) or not len(x):
        raise UserError(f"{path}: x is {_kind(x)}; it must be numbers (series, steps, channels)")
    if lengths is None:
        return x if x.ndim == 3 else x[:, :, None]
    ends = np.cumsum(_per_series(path, "lengths", lengths, "iu", len(x) if x.ndim == 3 else None))
    if lengths.min() < 0 or (x.ndim == 3 and lengths.max() > x.shape[1]):
        raise UserError(f"{path}: lengths go from {lengths.min()} to {lengths.max()}; x {x.shape} has no such steps")
    if x.ndim == 3:
        return [steps[:length] for steps, length in zip(x, lengths, strict=True)]
    if ends[-1] != len(x):
        raise UserError(f"{path}: lengths sum to {ends[-1]}, x (steps, channels) has {len(x)} steps; make them equal, "
                        "or give x as (series, steps, channels)")
    return np.split(x, ends[:-1])


def _per_series(path: Path, key: str, array: np.ndarray, kinds: str, count: int | None) -> list[Any]:
    """The elements of an array with one value per series, of these dtype kinds."""
    fits = isinstance(array, np.ndarray) and array.dtype.kind in kinds and array.ndim == 1 and array.size
    if not fits or len(array) != (count or len(array)):
        meaning = "whole numbers" + " or text" * ("U" in kinds)
        raise UserError(f"{path}: {key} is {_kind(array)}; it must be {meaning}, one for each of the "
                        f"{count or 'stored'} series")
    try:
        return (np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array).tolist()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {key} is not UTF-8; save it as text") from error


# -- texts ----------------------------------------------------------------------------------------------------


def read_texts(
    path: str | Path,
    text_column: str = "text",
    label_column: str = "label",
    labelled: bool = True,
    on_error: OnError = stop,
    id_column: str = "id",
) -> Items:
    """Texts, as they stand in the file: one per row of a .csv, .tsv or .jsonl, or a whole .txt (without label).

    Their ids are in the column of ids, if there is one, else the numbers of the rows.
    """
    path = Path(path)
    if _extension(path, [".csv", ".tsv", ".jsonl"], labelled, ".txt") == ".txt":
        text = _read_utf8(path)
        return _gather([(path.name, str(path), lambda: (_text(text, f"{path}: it"), None))], False, on_error)
    table = read_table(path)
    texts = table.column(text_column)

    def text_of(row: int) -> str:
        return _text(texts[row], f"{table.place(row)}, column {text_column!r}: it")

    return _rows_of(table, text_of, id_column, label_column, labelled, on_error)


# -- tables that name files -----------------------------------------------------------------------------------


def read_manifest(
    path: str | Path,
    columns: dict[str, str],
    label_column: str = "label",
    labelled: bool = True,
    on_error: OnError = stop,
    id_column: str = "id",
) -> Items:
    """Items of several modalities, one per row of a .csv, .tsv or .jsonl: {'image': Path, 'text': str, 'series': Path}.

    Args:
        columns: the column of each modality. Those that the file does not have are left out; it must have one.

    A path is relative to the folder of the manifest. A blank cell or null is a modality that the item lacks; an item
    without any is refused, and so is a file that does not exist.
    """
    table = read_table(path)
    there = {modality: table.column(name) for modality, name in columns.items() if name in table.columns}
    if not there:
        raise UserError(f"{path}: none of the columns {_listed(columns.values())}; "
                        f"rename one of {_listed(table.columns)}")

    def values(row: int) -> dict[str, Any]:
        found = {}
        for modality, cells in there.items():
            if cells[row] is None or not str(cells[row]).strip():
                continue
            where = f"{table.place(row)}, column {columns[modality]!r}:"
            found[modality] = _text(cells[row], f"{where} it")
            if modality != "text":
                found[modality] = table.path.parent / found[modality].strip()
                if not os.path.isfile(found[modality]):
                    raise UserError(f"{where} there is no file {found[modality]}; correct the path")
        if not found:
            raise UserError(f"{table.place(row)}: {_listed(columns[modality] for modality in there)} empty; "
                            "give one of them, or remove the row")
        return found

    return _rows_of(table, values, id_column, label_column, labelled, on_error)


# -- images ---------------------------------------------------------------------------------------------------

Image.init()
# EPS runs another program, Ghostscript; the others are recognised by Pillow but not read without one more.
_FORMATS = sorted(set(Image.OPEN) - {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"})
_IMAGE_EXTENSIONS = {extension for extension, format in Image.registered_extensions().items() if format in _FORMATS}


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _IMAGE_EXTENSIONS


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, by name, without what is hidden."""
    try:
        return [folder / name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}; correct the path or its permissions") from error


def _files(folder: Path, seen: set[str]) -> Iterator[Path]:
    """The files of a folder at any depth. Links are followed, but each folder is read once, so a cycle ends."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _files(entry, seen)
        else:
            yield entry


def read_images(path: str | Path, labelled: bool = True) -> Items:
    """Paths of images, in the order of their names: of a folder with a sub-folder per class, which may have more.

    Without labels, of any folder, or of one image file. Hidden files and folders are skipped; files that are not images
    by their extension are counted in `notes`. The images are not opened here. Raises UserError.
    """
    path = Path(path)
    if not labelled and path.is_file():
        if not _is_image(path):
            raise UserError(f"{path}: {path.suffix!r} is no image's extension; use .png, .jpg or another Pillow reads")
        return Items([path.name], [str(path)], [path], None)
    folders = [entry for entry in _entries(path) if entry.is_dir()] if labelled else [path]
    if not folders:
        raise UserError(f"{path}: no class folder in it; put the images of each class into a folder of its own")
    found = {folder: list(_files(folder, set())) for folder in folders}
    images = {folder: [file for file in files if _is_image(file)] for folder, files in found.items()}
    empty = [folder for folder in folders if not images[folder]]
    if empty:
        raise UserError(f"{empty[0]}: there is no image in it; add some, or remove the folder")
    beside = [entry for entry in _entries(path) if labelled and entry not in folders]
    stray = [file for file in beside if _is_image(file)]
    if stray:
        raise UserError(f"{stray[0]}: the image is in no class folder; move it into that of its class")
    others = beside + [file for files in found.values() for file in files if not _is_image(file)]
    values = [file for files in images.values() for file in files]
    notes = [f"{path}: {len(others)} files that are not images were left out, first {file}" for file in others[:1]]
    labels = [folder.name for folder, files in images.items() for _ in files] if labelled else None
    ids = [_text(file.relative_to(path).as_posix(), f"{path}: the file name") for file in values]
    return Items(ids, [str(file) for file in values], values, labels, notes=notes)


def split_folders(path: str | Path) -> dict[str, Path] | None:
    """{'train': ..., 'val': ..., 'test': ...}, the last two if there, of a folder with train/ above the classes.

    None where the folder holds the classes themselves: without train/, or with images and no folder in train/.
    """
    names = {"train": "train", "val": "val", "validation": "val", "test": "test"}
    folders = [entry for entry in _entries(Path(path)) if entry.is_dir()]
    train = [folder for folder in folders if folder.name.lower() == "train"]
    if not any(entry.is_dir() for folder in train for entry in _entries(folder)):
        return None
    splits: dict[str, Path] = {}
    for folder in folders:
        split = names.get(folder.name.lower())
        if split is None or split in splits:
            raise UserError(f"{folder}: beside {splits.get(split, train[0])}, it is not clear what it is; "
                            "keep one each of train, val and test, or only class folders")
        splits[split] = folder
    return splits


_WARNING_FILTERS = threading.Lock()  # the filters of warnings are one for all threads, which would restore each other's


def open_image(path: str | Path) -> Image.Image:
    """The image (of several frames the first), decoded, turned as its EXIF orientation says. Raises UserError."""
    if not os.path.isfile(path):  # a pipe would wait for ever
        raise UserError(f"{path}: there is no such file; correct the path")
    try:
        with _WARNING_FILTERS, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=_FORMATS)  # reads the header; the pixels are decoded below
        with image:
            return ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: more than {Image.MAX_IMAGE_PIXELS} pixels; make the image smaller") from error
    except Exception as error:  # damaged bytes come out as a dozen kinds
        kind = type(error).__name__
        raise UserError(f"{path}: not an image that can be read ({kind}); replace or remove it") from error


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """The image as 8-bit RGB, whatever its mode; what is transparent lies over white.

    16-bit grey (0..65535) is divided by 257, floating-point grey (0..1) multiplied by 255; values outside raise
    UserError with this name.
    """
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow itself would clip at 255
        values, top = np.asarray(image), 1 if image.mode == "F" else 65535
        if not ((values >= 0) & (values <= top)).all():
            raise UserError(f"{name}: mode {image.mode} with values {values.min()} to {values.max()}; "
                            f"they must be in 0..{top}, scale them or save as 8 bit")
        grey = np.round(values * (255 / top)).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    try:
        return image.convert("RGB")
    except ValueError as error:  # LAB in older Pillows
        raise UserError(f"{name}: mode {image.mode} cannot be converted to RGB; save it as RGB") from error
