"""Many series or texts in one array, of which each is made when it is asked for.

A hundred thousand small arrays or strings take more time and memory than what they hold. Here they lie one after
another, in the type of their file: float32 stays float32, a text its bytes in UTF-8. A file that was mapped into memory
is not copied, and all processes of a machine share its pages.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

VALUES = 1 << 19  # that are looked at together, so that copies of them stay small
WIDTH = 64  # steps that are compared side by side


class Packed(Sequence):
    """A sequence of parts of one array.

    Args:
        data: (T, ...); a memory map must begin where its array does.
        starts, ends: int64 (N,), where each part begins, and the place after its end.
    """

    def __init__(self, data: np.ndarray, starts: np.ndarray, ends: np.ndarray):
        self.mapped = data if getattr(data, "filename", None) else None
        self.data, self.starts, self.ends = np.asarray(data), starts, ends  # a plain array is sliced in less time

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        return self.ends - self.starts

    def subset(self, numbers: Any) -> "Packed":
        """The parts of these numbers, in their order, without a copy."""
        data = self.data if self.mapped is None else self.mapped
        return type(self)(data, self.starts[numbers], self.ends[numbers])

    def part(self, number: int) -> np.ndarray:
        return self.data[self.starts[number] : self.ends[number]]

    def contents(self, number: int) -> np.ndarray:
        """What a checksum is made of."""
        return self.part(number)

    def __getstate__(self) -> dict[str, Any]:
        """A worker process that does not inherit the memory maps the file again."""
        data = self.data
        if self.mapped is not None:
            data = self.mapped.filename, data.dtype, "r", self.mapped.offset, data.shape
        return {"data": data, "starts": self.starts, "ends": self.ends}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["data"], tuple):
            state["data"] = np.memmap(*state["data"])
        self.__init__(**state)


class PackedSeries(Packed):
    """Series float64 (L, C) from numbers (T, C) of any type, without infinity."""

    def __getitem__(self, number: int) -> np.ndarray:
        return self.part(number).astype(np.float64)

    contents = __getitem__  # the same whatever the type of the file

    @property
    def channels(self) -> int:
        return self.data.shape[1]

    def extremes(self) -> np.ndarray:
        """The lowest and the highest value of each channel, float64 (2, C); NaN where a channel has none."""
        return _merged([_extremes(part) for part in Steps(self, dtype=self.data.dtype)]).astype(np.float64)


class PackedTexts(Packed):
    """Texts from their bytes in UTF-8, uint8 (T,)."""

    @classmethod
    def of(cls, texts: Iterable[bytes]) -> "PackedTexts":
        data, ends = bytearray(), [0]
        for text in texts:
            data += text
            ends.append(len(data))
        return cls(np.frombuffer(data, np.uint8), np.array(ends[:-1]), np.array(ends[1:]))

    def __getitem__(self, number: int) -> str:
        return self.part(number).tobytes().decode()


def _extremes(part: np.ndarray) -> np.ndarray:
    """The lowest and the highest value of each channel of (T, C), (2, C); NaN where there is none."""
    rows = len(part) // WIDTH  # of many steps each, so that NumPy compares many numbers at once
    whole, rest = part[: rows * WIDTH], part[rows * WIDTH :]
    wide = whole.reshape(rows, WIDTH * part.shape[1])
    low, high = (choose.reduce(wide).reshape(-1, part.shape[1]) if rows else rest for choose in (np.fmin, np.fmax))
    return np.stack([np.fmin.reduce(np.concatenate([low, rest])), np.fmax.reduce(np.concatenate([high, rest]))])


def _merged(found: Sequence[np.ndarray]) -> np.ndarray:
    """The extremes of all parts from those of each."""
    return np.stack([np.fmin.reduce([low for low, _ in found]), np.fmax.reduce([high for _, high in found])])


class Steps:
    """The steps of series one after another, (T, C), of which only a part is in memory at a time.

    Args:
        series: arrays (L, C) each, of which `most` steps count.
    """

    def __init__(self, series: Sequence[np.ndarray], most: int | None = None, dtype: Any = np.float64):
        self.dtype = dtype
        lengths = series.lengths if isinstance(series, Packed) else np.array([len(one) for one in series])
        self.series, self.lengths = series, np.minimum(lengths, most or np.inf).astype(np.int64)
        self.ends = np.cumsum(self.lengths)
        self.channels = series.channels if isinstance(series, PackedSeries) else np.shape(series[0])[1]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __iter__(self) -> Iterator[np.ndarray]:
        """All steps, in parts of about VALUES numbers."""
        size = max(1, VALUES // self.channels)
        return (self.part(start, min(start + size, len(self))) for start in range(0, len(self), size))

    def part(self, start: int, stop: int) -> np.ndarray:
        """The steps from `start` to before `stop`, a copy."""
        first, last = np.searchsorted(self.ends, [start, stop - 1], "right")
        of = self.series.part if isinstance(self.series, Packed) else self.series.__getitem__
        lengths = self.lengths[first : last + 1].tolist()
        steps = np.concatenate([of(i)[:length] for i, length in enumerate(lengths, first)], dtype=self.dtype)
        skipped = start - (self.ends[first] - self.lengths[first])
        return steps[skipped : skipped + stop - start]

    def total(self, change: Any = lambda part: part) -> np.ndarray:
        """The sum of all steps, (C,), after `change` of each part: the bits of numpy.sum of all of them at once.

        NumPy adds the steps of several channels in their order, and those of one channel by halves.
        `change` may write into its part.
        """
        if self.channels == 1:
            return self._by_halves(change, 0, len(self))
        total = None
        for part in self:
            part = change(part)
            if total is not None:
                part[0] += total
            total = np.add.reduce(part)
        return total

    def _by_halves(self, change: Any, start: int, stop: int) -> np.ndarray:
        if stop - start <= VALUES:
            return np.add.reduce(change(self.part(start, stop)))
        half = (stop - start) // 2
        half -= half % 8
        return self._by_halves(change, start, start + half) + self._by_halves(change, start + half, stop)

    def statistics(self) -> dict[str, np.ndarray]:
        """Of each channel (C,): 'missing' values, their number; 'mean' and 'std' of those that are there, 'low' and
        'high', as numpy.nanmean, nanstd, nanmin and nanmax give them."""
        missing, extremes = np.zeros(self.channels, np.int64), []

        def known(part: np.ndarray) -> np.ndarray:
            lacks = np.isnan(part)
            extremes.append(_extremes(part))
            if lacks.any():
                missing[:] += lacks.sum(0)
                part[lacks] = 0
            return part

        def squared(part: np.ndarray) -> np.ndarray:
            lacks = np.isnan(part) if missing.any() else None
            part -= mean
            if lacks is not None:
                part[lacks] = 0
            return np.square(part, out=part)

        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            mean = self.total(known) / (len(self) - missing)
            std = np.sqrt(self.total(squared) / (len(self) - missing))
        low, high = _merged(extremes)
        return {"missing": missing, "mean": mean, "std": std, "low": low, "high": high}
