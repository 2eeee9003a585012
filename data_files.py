"""Users' own files: series, texts, images and tables of them, read into raw items.

    read_series     .ts, .arff, .npz, .npy, .csv, .tsv, .txt    float64 (L, C), NaN where a value is missing
    read_texts      .csv, .tsv, .jsonl, .txt                    str
    read_images     a folder of class folders, or one image     Path; open_image and to_rgb make pixels of it
    read_manifest   .csv, .tsv, .jsonl that names files         {'image': Path, 'text': str, 'series': Path}

L is the steps of a series, C its channels. Three arguments are the same everywhere:

    settings    the columns, encoding, delimiter, ... (see config.py); by default its defaults
    labelled    True: each item needs a label, which is handed on as it stands; labels.py makes classes of them.
                False: labels may be missing and are not looked at.
    on_error    called with the UserError of an item that cannot be used; if it returns, the item is left out.
                By default it raises. What is wrong with the file as a whole always raises UserError.

A message names the file and line (or row) as the user gave it, the value and the remedy. What had to be guessed is in
`notes`, with the flag that overrides it. Nothing is unpickled.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from config import Settings, UserError
from series_files import (
    Part,
    SeriesFile,
    arff_series,
    npz_series,
    read_named_series,
    table_series,
    ts_series,
    ucr_series,
)
from tables import DEFAULTS, FileFinder, Table, extension_of, listed, read_table, read_text, shown


@dataclass
class Items:
    """Raw items of a file or folder, in its order."""

    ids: list[str]  # what predictions call them: row number from 1, series id, or file name relative to the folder
    places: list[str]  # for error messages: "train.csv, line 12" or "pets/cats/7.png"
    values: list[Any]
    labels: list[Any] | None  # one for each, as it stands in the file; None where they were not asked for
    features: list[str] | None = None  # names of the columns of features, where the file has them
    notes: list[str] = field(default_factory=list)  # what was guessed or left out and is no mistake, to be shown
    table_rows: str | None = None  # what a row of a table of series is: 'steps' or 'series'

    def subset(self, numbers: Iterable[int]) -> "Items":
        """The items of these numbers, in their order."""
        chosen = ([column[i] for i in numbers] for column in (self.ids, self.places, self.values, self.labels))
        return Items(*chosen, self.features, self.notes, self.table_rows)


OnError = Callable[[UserError], None]


def stop(error: UserError) -> None:
    """The default on_error."""
    raise error


def _gather(parts: Iterable[Part], labelled: bool, on_error: OnError, **about: Any) -> Items:
    items = Items([], [], [], [] if labelled else None, **about)
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


_COLUMNS = {"id_column", "text_column", "image_column", "series_column", "label_column", "encoding"}
_OF_FORMATS = {  # settings that say how a file of this kind is read
    ".ts": {"encoding"},
    ".txt": {"encoding"},
    ".arff": {"encoding", "id_column", "label_column", "feature_columns", "ignore_columns"},
    ".npz": {"max_unpacking"},
    ".npy": set(),
    ".jsonl": _COLUMNS,
    ".csv": _COLUMNS | {"feature_columns", "ignore_columns", "table_rows", "delimiter", "quoting"},
}
_OF_FORMATS[".tsv"] = _OF_FORMATS[".csv"]


def without_effect(paths: Iterable[Path], given: Iterable[str]) -> list[str]:
    """A note for each of the given settings that says nothing to files of these kinds, but would to others."""
    kinds = sorted({path.suffix.lower() for path in paths})
    if not all(kind in _OF_FORMATS for kind in kinds):
        return []
    used = set().union(*(_OF_FORMATS[kind] for kind in kinds))
    known = set().union(*_OF_FORMATS.values())
    return [f"{name} has no effect: {' and '.join(kinds)} files have no such thing"
            for name in given if name in known and name not in used]


# -- series ---------------------------------------------------------------------------------------------------


def read_series(
    path: str | Path,
    settings: Settings = DEFAULTS,
    labelled: bool = True,
    on_error: OnError = stop,
    known: Sequence[str] | None = None,
) -> Items:
    """Series, float64 (L, C), NaN where a value is missing.

    Steps at the end at which every channel is missing are padding and are cut off. A series without a step, one whose
    values are all missing, and infinity are refused. The formats:

    .ts         as in the UEA and UCR archives: a header of @tags, then a line per series, dimensions separated by ':',
                values by ',', the label last; missing: ? or NaN. What the header says must be true (@missing apart).
    .arff       as there: a row per series, of numeric attributes and a nominal label; or a relational attribute, of
                which each line is a channel, and a label.
    .tsv, .txt  without a header, as in the UCR archive: a line per series, its label first.
    .npz        x: (N, L, C), or (N, L) for one channel; y: (N,) labels, numbers or text; id: (N,) optional.
                lengths: (N,) optional: with x (N, L, C) the steps that count of each series; with x (T, C) the
                series lie one after the other and their lengths sum to T.
    .npy        one series (L, C) or (L,), without label.
    .csv, .tsv  a line per time step: columns of series id and label, all others are features. The steps of a series
                are in file order and may lie between those of others; its label is the same in all its rows.
                Missing: an empty cell, ?, nan, NA, null and the like. Without labels, a file that has no column of
                series id is one series.
                Or a line per series, of one channel: columns of label and steps, and one of ids if there is one.

    Args:
        known: names of the columns of features of the training data. They are brought into this order, and missing
            ones and others are refused; a file without names is taken by place.
    """
    path = Path(path)
    extension = extension_of(path, [".ts", ".arff", ".npz", ".csv", ".tsv", ".txt"], labelled, ".npy")
    if extension == ".npy":
        found = SeriesFile([(path.name, str(path), lambda: (read_named_series(path)[0], None))])
    elif extension in (".csv", ".tsv"):
        found = table_series(path, settings, labelled, known)
    else:
        read = {".ts": ts_series, ".arff": arff_series, ".npz": npz_series, ".txt": ucr_series}[extension]
        found = read(path, settings, labelled)
    if known and found.names is None:
        found.notes.append(f"{path}: names no columns, so they are taken in the order of training: {listed(known)}")
    about = {"features": found.names, "notes": found.notes, "table_rows": found.table_rows}
    return _gather(found.parts, labelled, on_error, **about)


# -- texts ----------------------------------------------------------------------------------------------------


def read_texts(
    path: str | Path, settings: Settings = DEFAULTS, labelled: bool = True, on_error: OnError = stop
) -> Items:
    """Texts, as they stand in the file: one per row of a .csv, .tsv or .jsonl, or a whole .txt (without label).

    Their ids are in the column of ids, if there is one, else the numbers of the rows.
    """
    path = Path(path)
    if extension_of(path, [".csv", ".tsv", ".jsonl"], labelled, ".txt") == ".txt":
        notes: list[str] = []
        text = read_text(path, settings, notes)
        part = path.name, str(path), lambda: (_text(text, f"{path}: it"), None)
        return _gather([part], False, on_error, notes=notes)
    table = read_table(path, settings)
    texts = table.column(settings.text_column)

    def text_of(row: int) -> str:
        return _text(texts[row], f"{table.place(row)}, column {settings.text_column!r}: it")

    return _rows_of(table, text_of, settings, labelled, on_error)


def _rows_of(
    table: Table, value_of: Callable[[int], Any], settings: Settings, labelled: bool, on_error: OnError
) -> Items:
    """The items of a table with one row each; `value_of` is given the row's index."""
    labels = table.column(settings.label_column) if labelled else None
    named = table.has(settings.id_column)
    ids = table.column(settings.id_column) if named else range(1, len(table.rows) + 1)

    def make(row: int) -> tuple[Any, Any]:
        if row in table.faults:
            raise UserError(table.faults[row])
        return value_of(row), labels[row] if labelled else None

    parts = ((str(ids[row]), table.place(row), partial(make, row)) for row in range(len(table.rows)))
    return _gather(parts, labelled, on_error, notes=table.notes)


# -- tables that name files -----------------------------------------------------------------------------------


def read_manifest(
    path: str | Path,
    columns: dict[str, str],
    settings: Settings = DEFAULTS,
    labelled: bool = True,
    on_error: OnError = stop,
) -> Items:
    """Items of several modalities, one per row of a .csv, .tsv or .jsonl: {'image': Path, 'text': str, 'series': Path}.

    Args:
        columns: the column of each modality. Those that the file does not have are left out; it must have one.

    A path is relative to the folder of the manifest. A blank cell or null is a modality that the item lacks; an item
    without any is refused, and so is a file that does not exist.
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


def open_image(path: str | Path) -> Image.Image:
    """The image (of several frames the first), decoded, turned as its EXIF orientation says. Raises UserError."""
    if not os.path.isfile(path):  # a pipe would wait for ever
        raise UserError(f"{path}: there is no such file; correct the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
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
