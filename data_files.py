"""Users' own files of series and texts, and tables that name files, read into raw items. Images: image_files.py.

    read_series     .ts, .arff, .npz, .npy, .csv, .tsv, .parquet, .txt    float64 (L, C), NaN where a value is missing
    read_texts      .csv, .tsv, .jsonl, .parquet, .txt                    str
    read_manifest   .csv, .tsv, .jsonl, .parquet that names files         {'image': Path, 'text': str, 'series': Path}

Letters: L steps of a series, C channels. Three arguments are the same everywhere:

    settings    the columns, encoding, delimiter, ... (see config.py); by default, the default settings
    labelled    True: each item needs a label, which is passed on as it stands; tasks.py makes targets of them.
                False: labels may be missing and are ignored.
    on_error    called with the UserError of an item that cannot be used; if it returns, the item is left out.
                By default it raises. A fault of the file as a whole always raises UserError.

A message names the file and line (or row) as the user gave it, the value and the remedy. Guesses are in `notes`, with
the flag that overrides them. Nothing is unpickled.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from config import FIELDS, Settings
from labels import OUTSIDE, class_name
from messages import UserError
from packed import Packed, PackedTexts
from series_files import (
    Part,
    SeriesFile,
    Whole,
    arff_series,
    groups_of,
    npz_series,
    read_named_series,
    table_series,
    ts_series,
    ucr_series,
)
from tables import DEFAULTS, FileFinder, Table, extension_of, label_cells, listed, read_table, read_text, shown


@dataclass
class Items:
    """Raw items of a file or folder, in its order."""

    ids: list[str]  # their names in predictions: row number from 1, series id, or file name relative to the folder
    places: list[str]  # for error messages: "train.csv, line 12" or "pets/cats/7.png"
    values: Sequence[Any]  # a list, or packed.Packed; of a manifest, dicts by modality
    labels: list[Any] | None  # one for each, as it stands in the file; None if they were not asked for
    columns: list[str] | None = None  # names of the feature columns, if the file has them
    notes: list[str] = field(default_factory=list)  # for the user: what was guessed or left out without being wrong
    groups: list[str] | None = None  # what each item belongs to (a patient, a device), if the file says it
    table_rows: str | None = None  # what a row of a table of series is: 'steps' or 'series'
    modality: str | None = None  # of all values; None where each is a dict by modality

    def subset(self, numbers: Sequence[int]) -> "Items":
        """The items of these numbers, in their order."""
        columns = (self.ids, self.places, self.values, self.labels, self.groups)
        *chosen, groups = (chosen_of(column, numbers) if column else column for column in columns)
        return Items(*chosen, self.columns, self.notes, groups, self.table_rows, self.modality)

    def by_modality(self, number: int) -> dict[str, Any]:
        """The value of an item, by modality."""
        return {self.modality: self.values[number]} if self.modality else self.values[number]

    def modalities(self) -> list[str]:
        """Those that any item has."""
        return [self.modality] if self.modality else [*dict.fromkeys(name for value in self.values for name in value)]

    def of(self, modality: str) -> tuple[np.ndarray, Sequence[Any]]:
        """(the numbers of the items that have a modality, their values of it)."""
        if self.modality:
            there = self.modality == modality
            return np.arange(len(self.values) * there), self.values if there else []
        numbers = [number for number, value in enumerate(self.values) if modality in value]
        return np.array(numbers, int), [self.values[number][modality] for number in numbers]


def chosen_of(values: Sequence[Any], numbers: Sequence[int]) -> Sequence[Any]:
    """The values of these numbers, in their order."""
    return values.subset(numbers) if isinstance(values, Packed) else [values[number] for number in numbers]


OnError = Callable[[UserError], None]


def raise_it(error: UserError) -> None:
    """The default on_error."""
    raise error


def _gather(parts: Iterable[Part] | Whole, labelled: bool, on_error: OnError, **about: Any) -> Items:
    if isinstance(parts, Whole):
        for _, error in sorted(parts.faults.items()):
            on_error(error)
        items = Items(parts.ids, parts.places, parts.values, parts.labels, groups=parts.groups, **about)
        good = [number for number in range(len(items.ids)) if number not in parts.faults]
        return items.subset(good) if parts.faults else items
    items, groups = Items([], [], [], [] if labelled else None, **about), []
    for id, place, make, *group in parts:
        try:
            value, label = make()
        except UserError as error:
            on_error(error)
            continue
        items.ids.append(id)
        items.places.append(place)
        items.values.append(value)
        groups += group
        if labelled:
            items.labels.append(label)
    items.groups = groups or None
    return items


def _text(value: Any, where: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{where} is empty; fill it in, or remove the row")
    if not isinstance(value, str):
        raise UserError(f"{where} is {shown(value)}, not text; write it in quotes")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud83d" in JSON
        raise UserError(f"{where} {shown(value)} holds half a surrogate pair; write the whole character") from error
    return value


_COLUMNS = {f"{name}_column" for name in ("id", "text", "image", "series", "label", "group")} | {"encoding"}
_OF_FORMATS = {  # settings that say how a file of this kind is read
    ".ts": {"encoding"},
    ".txt": {"encoding"},
    ".arff": {"encoding", "id_column", "label_column", "group_column", "feature_columns", "ignore_columns"},
    ".npz": {"max_unpacking", "group_column"},
    ".npy": set(),
    ".jsonl": _COLUMNS,
    ".csv": _COLUMNS | {"feature_columns", "ignore_columns", "table_rows", "delimiter", "quoting"},
}
_OF_FORMATS[".tsv"] = _OF_FORMATS[".csv"]
_OF_FORMATS[".parquet"] = _OF_FORMATS[".csv"] - {"encoding", "delimiter", "quoting"}


def without_effect(paths: Iterable[Path], given: Iterable[str]) -> list[str]:
    """A note for each of the given settings that means nothing for files of these kinds, but does for others."""
    kinds = sorted({path.suffix.lower() for path in paths})
    if not all(kind in _OF_FORMATS for kind in kinds):
        return []
    used = set().union(*(_OF_FORMATS[kind] for kind in kinds))
    known = set().union(*_OF_FORMATS.values())
    return [f"{name} has no effect on {' and '.join(kinds)} files"
            for name in given if name in known and name not in used]


# --- Series ----------------------------------------------------------------------------------------------------------


def read_series(
    path: str | Path,
    settings: Settings = DEFAULTS,
    labelled: bool = True,
    on_error: OnError = raise_it,
    known: Sequence[str] | None = None,
) -> Items:
    """Series, float64 (L, C), NaN where a value is missing.

    Steps at the end in which every channel is missing are padding and are cut off. A series without a step, one whose
    values are all missing, and infinity are refused. The formats:

    .ts         as in the UEA and UCR archives: a header of @tags, then a line per series, dimensions separated by ':',
                values by ',', the label last; missing: ? or NaN. The header must be true (except @missing).
    .arff       as in these archives: a row per series with numeric attributes and a nominal label, or with a relational
                attribute, a line for each channel, and a label.
    .tsv, .txt  without a header, as in the UCR archive: a line per series, its label first.
    .npz        x: (N, L, C), or (N, L) for one channel; y: (N,) labels, numbers or text, or (N, K) of numbers, or of
                several labels that are 1 or 0, named by target_names or class_names (K,), optional; id: (N,) optional;
                the groups (N,), numbers or text, under the name settings.group_column, optional.
                lengths: (N,) optional: with x (N, L, C), how many steps of each series count; with x (T, C), the series
                follow one another and their lengths sum to T.
                With settings.task tagging y has the shape of x without channels, a label for each step.
    .npy        one series (L, C) or (L,), without label.
    .csv, .tsv, .parquet
                a line per time step: columns of series id, label and group, all others are features. The steps of a
                series are in file order and may lie between those of others; its label and group are the same in all
                its rows.
                Missing: an empty cell, ?, nan, NA, null and the like. Without labels, a file that has no column of
                series id is one series.
                Or a line per series, of one channel: columns of label and steps, and one of ids if there is one.
                With settings.task tagging each line has the label of its step, or none (labels.is_unlabelled).

    Args:
        known: names of the feature columns of the training data. Columns are put into this order; missing ones and
            others are refused. A file without names is taken in its own order.
    """
    path = Path(path)
    valid = [".ts", ".arff", ".npz", ".csv", ".tsv", ".txt", ".parquet"]
    extension = extension_of(path, valid, labelled, ".npy")
    if labelled and settings.task == "tagging" and extension in (".ts", ".arff", ".txt"):
        raise UserError(f"{path}: {extension} files have one label for a series; --task tagging needs one for each "
                        "step: a .csv of a row for each step, or an .npz")  # fmt: skip
    if extension == ".npy":
        found = SeriesFile([(path.name, str(path), lambda: (read_named_series(path)[0], None))])
    elif extension in (".csv", ".tsv", ".parquet"):
        found = table_series(path, settings, labelled, known)
    else:
        read = {".ts": ts_series, ".arff": arff_series, ".npz": npz_series, ".txt": ucr_series}[extension]
        found = read(path, settings, labelled)
    if known and found.names is None:
        found.notes.append(f"{path}: names no columns, so they are taken in the order of training: {listed(known)}")
    about = {"columns": found.names, "notes": found.notes, "table_rows": found.table_rows}
    return _gather(found.parts, labelled, on_error, **about)


# --- Texts -----------------------------------------------------------------------------------------------------------


def read_texts(
    path: str | Path, settings: Settings = DEFAULTS, labelled: bool = True, on_error: OnError = raise_it
) -> Items:
    """Texts as they stand in the file: one per row of a .csv, .tsv, .jsonl or .parquet, or (no label) a whole .txt.

    Their ids come from the column of ids, if there is one, otherwise they are the numbers of the rows. With
    settings.task tagging the label of a text is a list of those of its characters, from the spans of a .jsonl (see
    `spans_to_labels`).
    """
    path = Path(path)
    if extension_of(path, [".csv", ".tsv", ".jsonl", ".parquet"], labelled, ".txt") == ".txt":
        notes: list[str] = []
        text = read_text(path, settings, notes)
        part = path.name, str(path), lambda: (_text(text, f"{path}: it"), None)
        return _gather([part], False, on_error, notes=notes)
    table = read_table(path, settings)
    texts = table.column(settings.text_column)

    def text_of(row: int) -> str:
        return _text(texts[row], f"{table.place(row)}, column {settings.text_column!r}: it")

    if labelled and settings.task == "tagging":
        return _rows_of(table, text_of, settings, True, on_error, *_spans_of(table, settings))
    faults = {row: UserError(text) for row, text in table.faults.items()}

    def contents() -> Iterator[bytes]:
        for row, text in enumerate(texts):
            found = _encoded(text)
            if found is None:
                try:
                    text_of(row)
                except UserError as error:
                    faults.setdefault(row, error)
            yield found or b""

    values = PackedTexts.of(contents())
    labels = label_cells(table, settings) if labelled else None
    groups = [group for row in groups_of(table, settings) for group in row] or None
    ids, places = [*map(str, _ids(table, settings))], [*map(table.place, range(len(texts)))]
    whole = Whole(ids, places, values, labels, groups, faults)
    return _gather(whole, labelled, on_error, notes=table.notes)


def _encoded(text: Any) -> bytes | None:
    """The text in UTF-8; None for what `_text` refuses."""
    try:
        return text.encode() if isinstance(text, str) and text.strip() else None
    except UnicodeEncodeError:
        return None


def _ids(table: Table, settings: Settings) -> Sequence[Any]:
    """The ids of the rows, by default their numbers."""
    return table.column(settings.id_column) if table.has(settings.id_column) else range(1, len(table.rows) + 1)


SPANS = "spans"  # the column of spans, where --label_column names no other


def _spans_of(table: Table, settings: Settings) -> tuple[list[Any], Callable[[Any, str, str], list[str | None]]]:
    """(the cells of spans of a table of texts, what makes labels of the characters of a text of them)."""
    path, default = table.path, FIELDS["label_column"].default
    column = SPANS if settings.label_column == default else settings.label_column
    if path.suffix.lower() != ".jsonl":
        raise UserError(f"{path}: --task tagging needs spans of characters, which a .jsonl holds; write a line "
                        '{"text": "...", "spans": [[start, end, "NAME"], ...]} for each text')  # fmt: skip
    table.column(column)  # is there
    touching: set[str] = set()

    def labels(cell: Any, text: str, where: str) -> list[str | None]:
        classes, joined = spans_to_labels(cell, len(text), f"{where}, {column}")
        if joined and not touching:
            touching.add(where)
            table.notes.append(f"{where}: spans of one name that touch, such as {shown(joined)}, are one span")
        return classes

    return table.column(column), labels


def spans_to_labels(spans: Any, length: int, where: str) -> tuple[list[str | None], list[Any] | None]:
    """(the label of each character of a text of this length, a span that touches one of its name before it).

    spans: [[start, end, name], ...] in characters (code points, as Python counts them), the end excluded, in any order.
        Characters whose name is null have no label (None), those in no span have OUTSIDE.

    Raises UserError for spans that overlap, are empty, reversed, or not within the text.
    """
    if not isinstance(spans, list):
        raise UserError(f'{where} is {shown(spans)}; write a list [[start, end, "NAME"], ...], [] where there is none')
    labels: list[str | None] = [OUTSIDE] * length
    joined, taken = None, [-1] * length
    for number, span in enumerate(spans):
        place = f"{where}, span {number + 1}"
        if not (isinstance(span, list) and len(span) == 3 and all(type(edge) is int for edge in span[:2])):
            raise UserError(f'{place} is {shown(span)}; write [start, end, "NAME"], whole numbers of characters')
        start, end, name = span
        if start > end:
            raise UserError(f"{place}, {shown(span)}, ends before it starts; exchange the two")
        if not 0 <= start < end <= length:
            what = "is empty" if start == end else f"is not within the {length} characters of the text"
            raise UserError(f"{place}, {shown(span)}, {what}; characters are counted from 0, and the end is excluded")
        if name is not None:
            name = class_name(name, place)
            if name == OUTSIDE:
                raise UserError(f"{place}: {OUTSIDE!r} is the name of what is in no span; take another")
        if (other := next((taken[i] for i in range(start, end) if taken[i] >= 0), None)) is not None:
            raise UserError(f"{place}, {shown(span)}, overlaps {shown(spans[other])}; a character has one name")
        labels[start:end] = [name] * (end - start)
        taken[start:end] = [number] * (end - start)
    for i in range(1, length):
        if taken[i - 1] >= 0 and taken[i] >= 0 and taken[i] != taken[i - 1] and labels[i] == labels[i - 1] is not None:
            joined = spans[taken[i]]
    return labels, joined


def _rows_of(
    table: Table, value_of: Callable[[int], Any], settings: Settings, labelled: bool, on_error: OnError,
    labels: list[Any] | None = None, label_of: Callable[[Any, Any, str], Any] = lambda cell, value, where: cell,
) -> Items:  # fmt: skip
    """The items of a table, one per row; `value_of` gets the row's index.

    labels: the label cells, where they are not those of the column of labels; `label_of` makes the label of one, of the
        item's value and its place.
    """
    labels = label_cells(table, settings) if labelled and labels is None else labels
    groups, ids = groups_of(table, settings), _ids(table, settings)

    def make(row: int) -> tuple[Any, Any]:
        if row in table.faults:
            raise UserError(table.faults[row])
        value = value_of(row)
        return value, label_of(labels[row], value, table.place(row)) if labelled else None

    parts = ((str(ids[row]), table.place(row), partial(make, row), *groups[row]) for row in range(len(table.rows)))
    return _gather(parts, labelled, on_error, notes=table.notes)


# --- Tables that name files ------------------------------------------------------------------------------------------


def read_manifest(
    path: str | Path,
    columns: dict[str, str],
    settings: Settings = DEFAULTS,
    labelled: bool = True,
    on_error: OnError = raise_it,
) -> Items:
    """Items of several modalities, one per row of a .csv, .tsv, .jsonl or .parquet: {'image': Path, 'text': str,
    'series': Path}.

    Args:
        columns: the column of each modality. The file must have at least one of them.

    A path is relative to the folder of the manifest. An empty cell or null means that the item lacks the modality. An
    item without any modality is refused, and so is a file that does not exist.
    """
    table, find = read_table(path, settings), FileFinder()
    there = {modality: table.column(name) for modality, name in columns.items() if table.has(name)}
    if not there:
        raise UserError(f"{path}: none of the columns {listed(columns.values())}; "
                        f"rename one of {listed(table.columns)}")

    def values(row: int) -> dict[str, Any]:
        found = {}
        for modality, cells in there.items():
            if cells[row] is None or not str(cells[row]).strip():
                continue
            where = f"{table.place(row)}, column {columns[modality]!r}:"
            found[modality] = _text(cells[row], f"{where} it")
            if modality != "text":
                found[modality] = find(table.path.parent / found[modality].strip())
                if not os.path.isfile(found[modality]):
                    raise UserError(f"{where} there is no file {found[modality]}; correct the path")
        if not found:
            raise UserError(f"{table.place(row)}: {listed(columns[modality] for modality in there)} empty; "
                            "give one of them, or remove the row")
        return found

    return _rows_of(table, values, settings, labelled, on_error)
