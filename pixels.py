"""The pixels of image files, read when their batch needs them: checked once, which is remembered, and kept if they fit.

    check = Check({"train": paths, "test": others}, names, prepare, 64, None, settings, folder, remember=True)
    images = check.files(bits=None)["train"]
    images[[3, 1]]                       # uint8 (2, 64, 64, 3), what an array of all of them would give

The check decodes every file as training will, so that bad ones are named before anything is trained, and notes what is
needed later: the checksum of its bytes, the bits that a 16-bit file uses, and the sums that mean and deviation follow
from. The notes are the record, a file beside the data (or in cache_dir): a file of the same name, size and times is not
checked again. Several processes check a share each and exchange their notes.

Pixels may be kept (`Kept`), in memory that the workers of a loader share, or in one memory-mapped file.
"""

import mmap
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from torch.utils.data import get_worker_info

import distributed
from config import Settings, cache_path, check_memory, choose_workers, memory_of
from files import checksum_of, make_folder, written_whole
from image_files import depth
from messages import UserError, naming, print_note, refuse_together, with_progress

REMEMBERED = 1000  # images at least; fewer are checked at every start, which takes seconds
AUTO_MEMORY = 0.75 * 2**30  # bytes of pixels at most that are kept in memory without being asked to
AT_ONCE = 256  # files that are handed to the threads at a time
SAVE_EVERY = 300  # seconds of a check, so that a killed one need not begin again

Prepare = Callable[..., np.ndarray]  # (file, bits=those of 16-bit grey) -> uint8 (side, side, 3)

ROW = np.dtype([
    ("size", "<i8"), ("modified", "<i8"), ("changed", "<i8"),  # of the file [bytes, ns, ns]; size -1: not checked
    ("checksum", "<u4"),  # crc32 of its bytes
    ("kind", "u1"), ("used", "u1"),  # of 16 bits: GREY or COLOUR, and how many the largest value needs; else 0
    ("bits", "u1"),  # of what was taken for white in a file of GREY; else 0
    ("sums", "<i8", 3), ("squares", "<i8", 3),  # of its pixels, by channel
])  # fmt: skip
MARK, SEAL = b"seal", 8  # what stands behind kept pixels, and its bytes in all
STAT = ["size", "modified", "changed"]
GREY, COLOUR = 1, 2


def statistics(count: int, sums: Sequence[int], squares: Sequence[int]) -> tuple[list[float], list[float]]:
    """(mean, standard deviation) per channel of `count` whole numbers each, from their exact sums and sums of squares,
    so that neither depends on an order; a constant channel has deviation 1."""
    means = [int(each) / count for each in sums]
    variances = [(count * int(b) - int(a) ** 2) / count**2 for a, b in zip(sums, squares, strict=True)]
    return means, [variance**0.5 or 1.0 for variance in variances]


# --- Pixels that are kept --------------------------------------------------------------------------------------------


class Kept:
    """A place for the pixels of each image, filled by whoever reads it first, for all processes that load data.

    What lies in a place counts only if the checksum behind it is that of these pixels and of the file they came from.
    So it does not matter who wrote it and when, whether two did so at once, or whether one was killed meanwhile.

    Args:
        places: how many.
        size: bytes of an image.
        path: a file, which is made if it is not there. None for memory; processes that are forked share it, and those
            that start afresh (on Windows and macOS) have none of it.
    """

    def __init__(self, places: int, size: int, path: Path | None = None):
        self.places, self.size, self.path = places, size, path
        self._open()

    def _open(self) -> None:
        total, self.file = self.places * (self.size + SEAL), None
        if self.path is None:
            self.map = mmap.mmap(-1, total)
            return
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        self.file = os.fdopen(os.open(self.path, flags, 0o666), "r+b", buffering=0)
        if os.fstat(self.file.fileno()).st_size < total:  # never cut off: another process may need it longer
            self.file.seek(total - 1)
            self.file.write(b"\0")
        self.map = mmap.mmap(self.file.fileno(), total)

    def __getstate__(self) -> dict[str, Any]:
        return {"places": self.places, "size": self.size, "path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, map=None, file=None)
        if self.path is not None:
            self._open()

    def get(self, place: int, key: int) -> np.ndarray | None:
        """The pixels (size,) in a place; None if it holds none of a file with this key."""
        if self.map is None:
            return None
        start = int(place) * (self.size + SEAL)
        pixels, seal = self.map[start : start + self.size], self.map[start + self.size : start + self.size + SEAL]
        return np.frombuffer(pixels, np.uint8) if seal == _seal(pixels, key) else None

    def all_filled(self, places: np.ndarray) -> bool:
        """Whether these places have been filled, as far as is known without reading them: none of a file is."""
        if self.map is None or self.path is not None:
            return False
        marks = np.ndarray(self.places, f"S{len(MARK)}", self.map, self.size, self.size + SEAL)
        return bool((marks[places] == MARK).all())

    def put(self, place: int, key: int, pixels: np.ndarray) -> None:
        if self.map is None:
            return
        data = pixels.tobytes()
        data += _seal(data, key)
        start = int(place) * len(data)
        if self.file is not None and hasattr(os, "pwrite"):
            with suppress(OSError):  # a full disk, on which writing to the map would kill the process
                os.pwrite(self.file.fileno(), data, start)
        else:
            self.map[start : start + len(data)] = data


def _seal(pixels: bytes, key: int) -> bytes:
    return MARK + zlib.crc32(pixels, key).to_bytes(4, "little")


# --- Files -----------------------------------------------------------------------------------------------------------


class ImageFiles:
    """The pixels of files, uint8 (N, side, side, 3), indexed like an array along N, which reads them.

    Args:
        paths: the files.
        names: what they are called in messages.
        rows: what the check found, ROW (N,).
        places: where each lies in `kept`, (N,).
        kept: None where nothing is kept.
        prepare: makes the pixels of a file.
        side: of the square [pixels].
    """

    def __init__(
        self, paths: Sequence[Path], names: Sequence[str], rows: np.ndarray, places: np.ndarray, kept: Kept | None,
        prepare: Callable[[Path], np.ndarray], side: int,
    ):  # fmt: skip
        self.paths, self.names, self.rows, self.places, self.kept = paths, names, rows, places, kept
        self.prepare, self.side = prepare, side
        self.shape = len(paths), side, side, 3

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def reads_files(self) -> bool:
        """Whether files are still to be read; else all pixels lie in memory."""
        return not (self.kept and self.kept.all_filled(self.places))

    def statistics(self) -> tuple[list[float], list[float]]:
        """(mean, standard deviation) per channel."""
        sums, squares = (self.rows[name].astype(object).sum(0) for name in ("sums", "squares"))  # of Python's integers
        return statistics(len(self) * self.side**2, sums, squares)

    def subset(self, numbers: np.ndarray) -> "ImageFiles":
        paths, names = ([values[number] for number in numbers] for values in (self.paths, self.names))
        return ImageFiles(paths, names, self.rows[numbers], self.places[numbers], self.kept, self.prepare, self.side)

    def __getitem__(self, index: Any) -> np.ndarray:
        numbers = np.arange(len(self))[index] if isinstance(index, slice) else np.asarray(index)
        if numbers.ndim == 0:
            return self[[index]][0]
        images, missing = np.empty((len(numbers), *self.shape[1:]), np.uint8), []
        for image, number in zip(images, numbers, strict=True):
            kept = self.kept.get(self.places[number], _key(self.rows[number])) if self.kept else None
            if kept is None:
                missing.append((image, number))
            else:
                image[:] = kept.reshape(image.shape)
        alone = get_worker_info() or len(missing) < 2  # workers themselves run at once
        read = map(self._read, missing) if alone else in_threads(self._read, missing, AT_ONCE)
        refuse_together(filter(None, read))
        return images

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def _read(self, job: tuple[np.ndarray, int]) -> UserError | None:
        (image, number), row = job, self.rows[job[1]]
        try:
            with naming(self.names[number]):
                image[:] = self.prepare(self.paths[number])
        except UserError as error:
            return error
        if self.kept and _stat(self.paths[number]) == row[STAT].item():  # else it has changed since the check
            self.kept.put(self.places[number], _key(row), image)
        return None


def _key(row: np.void) -> int:
    """What the pixels of a file depend on, but for what the name of the file of pixels says."""
    return zlib.crc32(repr(row[[*STAT, "checksum", "bits"]].item()).encode())


def _stat(path: Path) -> tuple[int, int, int]:
    """(bytes, time of the contents, time of the entry), which changes also where a program sets the other one back."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return -1, 0, 0
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def in_threads(function: Callable[[Any], Any], values: Sequence[Any], at_once: int) -> Iterator[Any]:
    """function(value) of each value, in order; so many are begun at a time. Files are read and decoded in C, which
    lets threads run at once."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(values), at_once):
            yield from pool.map(function, values[start : start + at_once])


# --- The check and its record ----------------------------------------------------------------------------------------


class Record:
    """What is known of files by name: two arrays in a file, the names and ROWs. One that cannot be read is empty.

    A name keeps its number, which is also its place in the file of pixels.
    """

    def __init__(self, path: Path | None):
        self.path, self.names, self.rows = path, [], np.zeros(0, ROW)
        if path is None:
            return
        if not os.path.isfile(path):  # there may be a pipe, which would be waited for
            return
        with suppress(OSError, ValueError, EOFError, MemoryError), open(path, "rb") as file:
            text, rows = (np.load(file, allow_pickle=False) for _ in range(2))
            names = text.tobytes().decode("utf-8", "surrogateescape").split("\0")
            if rows.dtype == ROW and rows.shape == (len(names),) and len(set(names)) == len(names):
                self.names, self.rows = names, rows

    def numbers_of(self, names: Sequence[str]) -> np.ndarray:
        """The number of each name, int64 (N,). A new name gets one and a row that was not checked."""
        known = {name: number for number, name in enumerate(self.names)}
        numbers = np.array([known.setdefault(name, len(known)) for name in names], np.int64)
        new = np.zeros(len(known) - len(self.names), ROW)
        new["size"] = -1
        self.names, self.rows = list(known), np.concatenate([self.rows, new])
        return numbers

    def write(self) -> None:
        """Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.path) as file:
            np.save(file, np.frombuffer("\0".join(self.names).encode("utf-8", "surrogateescape"), np.uint8))
            np.save(file, self.rows)


class Check:
    """The check of the files of a data set: made by this call and, once the bits of grey are known, by `files`.

    Args:
        paths: of each split, the files.
        names: of each split, what they are called in messages.
        prepare: makes the pixels of a file.
        side, crop: of these, see adapters.ImageAdapter.
        data: the folder or the manifest that they came from.
        remember: whether the record may be written.
    """

    def __init__(
        self, paths: dict[str, Sequence[Path]], names: dict[str, Sequence[str]], prepare: Prepare, side: int,
        crop: float | None, settings: Settings, data: Path, remember: bool,
    ):  # fmt: skip
        ends = np.cumsum([len(part) for part in paths.values()])
        self.ranges = {split: slice(end - len(paths[split]), end) for split, end in zip(paths, ends, strict=True)}
        self.paths = [path for part in paths.values() for path in part]
        self.names = [name for part in names.values() for name in part]
        self.prepare, self.side, self.settings = prepare, side, settings
        together = min(settings.batch_size, len(self.paths))  # as bytes, and as tokens of four
        check_memory(15 * together * side**2, f"a batch of {together:,} images of {side:,} x {side:,} pixels "
                                              "(--batch_size, --image_size)")  # fmt: skip
        few, on_disk = len(self.paths) < REMEMBERED, settings.cache == "disk"
        self.share = (0, 1) if few else (distributed.rank(), distributed.size())  # few are sooner read than exchanged
        # Another version of Pillow may make other pixels
        called = f"{side}{f'-crop{crop:g}' if crop else ''}-pillow{PIL.__version__}"
        self.pixels_path = cache_path(settings, f"pixels-{called}", data)
        self.record = Record(None if few and not on_disk else cache_path(settings, f"images-{called}", data))
        self.writes = (remember or on_disk) and self.record.path is not None

        root = os.path.join(data if data.is_dir() else data.parent, "")
        self.numbers = self.record.numbers_of([str(path).removeprefix(root) for path in self.paths])
        self.rows = self.record.rows[self.numbers]
        stats = np.array([_stat(path) for path in self.paths], np.int64).reshape(-1, len(STAT))
        self.done = np.all([self.rows[name] == found for name, found in zip(STAT, stats.T, strict=True)], 0)
        self.done &= stats[:, 0] >= 0
        self.rows[~self.done] = np.zeros((), ROW)
        for name, found in zip(STAT, stats.T, strict=True):
            self.rows[name] = found
        self.errors: dict[int, UserError] = {}  # by number of the file
        self.places = self.numbers if on_disk else np.arange(len(self.paths))
        self.kept = self._kept()
        self._pass(self._look, ~self.done)

    def _kept(self) -> Kept | None:
        """Where pixels are kept, as the settings say."""
        count, size, cache = len(self.paths), 3 * self.side**2, self.settings.cache
        if not count:
            return None
        if cache == "disk":
            places, path = len(self.record.names), self.pixels_path
            with naming("--cache_dir"):
                make_folder(path.parent)
            there = getattr(path.stat(), "st_blocks", 0) * 512 if path.exists() else 0
            needed, free = places * (size + 8) - there, shutil.disk_usage(path.parent).free
            if needed > free:
                raise UserError(f"cache: {path} needs {needed / 2**20:,.1f} MiB more, and {free / 2**20:,.1f} MiB are "
                                "free; free some, or choose another --cache_dir or --cache none")  # fmt: skip
            try:
                return Kept(places, size, path)
            except (OSError, ValueError) as error:
                raise UserError(f"cache: {path} cannot be used: {error}; remove it, or choose another --cache_dir, or "
                                "--cache none") from error  # fmt: skip
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each has memory of its own
        what = f"--cache memory: the pixels of {count:,} images of {self.side:,} x {self.side:,}"
        if cache == "memory":
            check_memory(processes * count * size, what)
        elif cache == "none" or processes * count * size > min(AUTO_MEMORY, memory_of("cpu") / 4):
            return None
        return Kept(count, size)

    # --- Its passes ---

    def _look(self, number: int) -> None:
        """The first look at a file. The pixels of 16-bit grey wait until it is known what is white."""
        row = self.rows[number]
        if found := depth(self.paths[number]):
            row["kind"], row["used"] = GREY if found[0] == "grey" else COLOUR, found[1]
        if row["kind"] == GREY:
            row["checksum"] = checksum_of(self.paths[number])
        else:
            self._prepare(None, number)

    def _prepare(self, bits: int | None, number: int) -> None:
        path, row = self.paths[number], self.rows[number]
        pixels = self.prepare(path, bits=bits)
        row["checksum"], row["bits"] = checksum_of(path), (bits or 16) * (row["kind"] == GREY)
        values = pixels.reshape(-1, 3)
        row["sums"] = values.sum(0, dtype=np.int64)
        row["squares"] = np.square(values, dtype=np.uint16).sum(0, dtype=np.int64)
        if self.kept:
            self.kept.put(self.places[number], _key(row), pixels)

    def _pass(self, look: Callable[[int], None], wanted: np.ndarray) -> None:
        """look(number) at the wanted files in threads: this process at its share of them. Then all know all of it."""
        rank, size = self.share
        wanted = [number for number in np.flatnonzero(wanted).tolist() if number % size == rank]
        saved = time.monotonic()

        def at(number: int) -> None:
            try:
                with naming(self.names[number]):
                    look(number)
                self.done[number] = True
            except UserError as error:
                self.errors[number], self.done[number] = error, False

        try:
            for _ in with_progress(in_threads(at, wanted, AT_ONCE), "checking images", len(wanted)):
                if time.monotonic() > saved + SAVE_EVERY:
                    self._remember()
                    saved = time.monotonic()
        except BaseException:
            self._remember()
            raise
        if size > 1:
            mine = slice(rank, None, size)
            parts = distributed.all_gather((self.rows[mine], self.done[mine], self.errors))
            for other, (rows, done, errors) in enumerate(parts):
                self.rows[other::size], self.done[other::size] = rows, done
                self.errors |= errors

    def _remember(self) -> None:
        if not self.writes or not distributed.is_first():
            return
        rows = self.rows.copy()
        rows["size"][~self.done] = -1
        if np.array_equal(self.record.rows[self.numbers], rows):
            return
        self.record.rows[self.numbers] = rows
        try:
            self.record.write()
        except OSError as error:
            self.writes = False
            print_note(f"the check of the images is not remembered: cannot write {self.record.path}: {error.strerror}; "
                       "name a folder with --cache_dir")  # fmt: skip

    # --- What it found ---

    def sixteen_bits(self, split: str, kind: int) -> np.ndarray:
        """The bits in use of each file of 16 bits of the kind, GREY or COLOUR, in a split."""
        rows = self.rows[self.ranges[split]]
        return rows["used"][rows["kind"] == kind]

    def files(self, bits: int | None) -> dict[str, ImageFiles]:
        """The files of each split, all of them good.

        bits: of 16-bit grey, 2**bits - 1 of which is white; None for 16.

        Raises:
            UserError: the bad files of all splits.
        """
        grey = (self.rows["kind"] == GREY) & (self.rows["bits"] != (bits or 16))
        self._pass(partial(self._prepare, bits), grey & self.done)
        self._remember()
        refuse_together(self.errors[number] for number in sorted(self.errors))
        prepare = partial(self.prepare, bits=bits)
        return {
            split: ImageFiles(self.paths[part], self.names[part], self.rows[part], self.places[part], self.kept,
                              prepare, self.side)
            for split, part in self.ranges.items()
        }  # fmt: skip

    def checksums(self) -> dict[Path, int]:
        """crc32 of the bytes of each file."""
        return dict(zip(self.paths, self.rows["checksum"].tolist(), strict=True))

    def about(self) -> str:
        """Where pixels come from, in words, for the first lines of a run."""
        size = len(self.paths) * 3 * self.side**2
        kept = f"kept in {self.kept.path or 'memory'}" if self.kept else "not kept"
        read = self.kept is not None and self.kept.all_filled(self.places)
        workers = choose_workers(self.settings.num_workers, True)
        by = f"{workers} processes (--num_workers)" if workers else "this process (--num_workers 0)"
        held = f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
        return (f"images  {len(self.paths):,} files to {self.side} x {self.side} pixels, "
                f"{'read' if read else f'read when a batch needs them by {by}'}, {kept}: "
                f"{held} (--cache)")  # fmt: skip
