"""Raw items as tokens: one adapter for each modality, the same in training, evaluation and prediction.

An adapter turns a raw item into the tokens (L, C) that the model reads, and knows what the model has to be told:

    adapter = SeriesAdapter.fit(training_series)          # or TextAdapter(), ImageAdapter(...), TensorAdapter(...)
    adapter(series)                                       # (L, C), float32
    create_perceiver_model({"series": adapter.features}, num_classes=9)

It is plain data: `describe` gives what a checkpoint stores, `from_description` the adapter again. `UserError` says what
is wrong with an item; who calls adds which item it is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from config import FIELDS, UserError, printable
from image_files import open_image, to_bytes, to_rgb, upright
from schema import Positive, Size, read, shown
from series_files import not_as_trained, read_one_series
from tables import FileFinder, nfc, repeated

LARGEST = FIELDS["image_size"].metadata["at_most"]
Side = Annotated[int, lambda pixels: 1 <= pixels <= LARGEST, f"a side of 1 to {LARGEST} pixels"]


@contextmanager
def naming(place: str) -> Iterator[None]:
    """A UserError within the block says at which place it was, if it does not yet."""
    try:
        yield
    except UserError as error:
        if place in str(error):
            raise
        raise UserError(f"{place}: {error}") from error


# -- any tensor -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorAdapter:
    """Tokens that need no preparation: float (L, input_dim), of which the first max_seq_len are taken."""

    input_dim: Size
    max_seq_len: Size | None = None

    @property
    def features(self) -> dict[str, Any]:
        return {"input_dim": self.input_dim}

    def __call__(self, item: Any) -> Tensor:
        tokens = as_numbers(item, "input", np.float32)
        if tokens.ndim != 2 or tokens.shape[1] != self.input_dim:
            raise UserError(f"the input has shape {tokens.shape}, it must be (tokens, {self.input_dim})")
        if not len(tokens):
            raise UserError(f"the input is empty, it has shape {tokens.shape}")
        if not np.isfinite(tokens).all():
            raise UserError("the input holds NaN or infinity; replace it")
        return torch.from_numpy(tokens[: self.max_seq_len])


def as_numbers(item: Any, what: str, dtype: type = np.float64) -> np.ndarray:
    """A writable array of its own; NaN where a masked array or a table of pandas has no value."""
    try:
        if isinstance(item, Tensor):
            item = item.detach().cpu()
            item = item.float() if item.is_floating_point() and item.itemsize < 4 else item  # NumPy has no bfloat16
        table = hasattr(item, "iloc")  # a DataFrame or a Series
        array = None if table else np.asanyarray(item)
        kinds = [column.kind for column in np.atleast_1d(item.dtypes)] if table else [array.dtype.kind]
        for kind, name in {"c": "complex numbers", "M": "dates", "m": "times"}.items():
            if kind in kinds:
                raise TypeError(f"it holds {name}")
        if table:
            array = item.to_numpy(np.float64, na_value=np.nan)
        elif isinstance(array, np.ma.MaskedArray):
            array = array.astype(np.float64).filled(np.nan)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which every adapter refuses
            return np.require(array, dtype, ["C", "W"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the {what} is not an array of numbers: {error}".splitlines()[0]) from error


# -- text -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextAdapter:
    """Text as its UTF-8 bytes, one token each, for the model to embed: no tokenizer, any language.

    As in Perceiver IO (section 4.1). Of a longer text the first max_seq_len bytes are taken.
    """

    max_seq_len: Size | None = None

    @property
    def features(self) -> dict[str, Any]:
        return {"vocab_size": 256}

    def __call__(self, text: str) -> Tensor:
        """(L, 1), float32: the bytes, 0..255."""
        if not isinstance(text, str):
            raise UserError(f"a text is expected, this is of type {type(text).__name__}")
        if not text.strip():
            raise UserError("the text is empty")
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text holds {text[error.start]!r}, half a character; it has no UTF-8 form") from error
        return torch.from_numpy(np.frombuffer(data[: self.max_seq_len], np.uint8).astype(np.float32))[:, None]


# -- series ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeriesAdapter:
    """A time series (L, C), standardised per channel with the statistics of the training series.

    A missing value (NaN) becomes 0, the channel's mean; a channel of which the training series lack values has a flag
    beside it, 1 where the value is missing. Of a longer series the first max_seq_len steps are taken.

    Args:
        mean, std: per channel (C).
        flagged: numbers of the channels with a flag.
        names: of the columns of the training data, in order; None where they had none. They are those of the channels
            or, where table_rows is 'series', of the steps.
        table_rows: what a row of the table of training data was, 'steps' or 'series'; None where they were no table.
    """

    mean: list[float]
    std: list[Positive]
    flagged: list[int] = field(default_factory=list)
    max_seq_len: Size | None = None
    names: list[str] | None = None
    table_rows: str | None = None

    def __post_init__(self) -> None:
        channels = len(self.mean)
        if len(self.std) != channels or not channels:
            raise UserError(f"{channels} means and {len(self.std)} deviations; there must be one of each per channel")
        if sorted(set(self.flagged) & set(range(channels))) != sorted(self.flagged):
            raise UserError(f"the flagged channels must be different ones of the {channels} that there are")
        if self.channels is not None and len(self.channels) != channels:
            raise UserError(f"{len(self.channels)} names of {channels} channels")
        if self.table_rows not in (None, "steps", "series"):
            raise UserError(f"table_rows must be steps, series or none, not {shown(self.table_rows)}")

    @classmethod
    def fit(
        cls,
        series: Sequence[np.ndarray],
        max_seq_len: int | None = None,
        names: list[str] | None = None,
        table_rows: str | None = None,
    ) -> "SeriesAdapter":
        """The adapter of training series, float arrays (L, C) each; a constant channel keeps its scale."""
        steps = np.concatenate([as_numbers(one, "series")[:max_seq_len] for one in series])  # (all steps, C)
        missing = np.isnan(steps)
        for channel in np.flatnonzero(missing.all(0)):
            raise UserError(f"channel {channel + 1} has no value in any training series; remove it")
        with np.errstate(over="ignore", invalid="ignore"):
            mean, std = np.nanmean(steps, 0), np.nanstd(steps, 0)
        for channel in np.flatnonzero(~np.isfinite(std)):
            raise UserError(f"channel {channel + 1} has values too large to be squared; scale them, or mark as missing")
        varies = (np.nanmin(steps, 0) < np.nanmax(steps, 0)) & (std > 0)  # of a constant, std may be a rounding error
        flagged = np.flatnonzero(missing.any(0)).tolist()
        return cls(mean.tolist(), np.where(varies, std, 1.0).tolist(), flagged, max_seq_len, names, table_rows)

    @property
    def features(self) -> dict[str, Any]:
        return {"input_dim": len(self.mean) + len(self.flagged)}

    @property
    def channels(self) -> list[str] | None:
        """The names of the channels, if they are known."""
        return None if self.table_rows == "series" else self.names

    def __call__(self, series: Any) -> Tensor:
        """(L, C + flags), float32, of an array (L, C), or (L,) of one channel, or the path of a file of one series.

        Rows of a DataFrame are steps; its columns, and those of a file, are brought into the order of training by name.
        """
        if isinstance(series, (str, Path)):
            series = read_one_series(series, known=self.channels)
        elif hasattr(series, "columns") and self.channels is not None:
            series = self._in_order(series)
        values = as_numbers(series, "series")
        values = values[:, None] if values.ndim == 1 else values
        if values.ndim != 2 or values.shape[1] != len(self.mean):
            transposed = values.ndim == 2 and len(values) == len(self.mean)
            raise UserError(f"the series has shape {values.shape}, it must be (steps, {len(self.mean)})"
                            + "; transpose it" * transposed)
        if not len(values):
            raise UserError(f"the series is empty, it has shape {values.shape}")
        if np.isinf(values).any():
            raise UserError("the series holds infinity; replace it")
        values = values[: self.max_seq_len]
        missing = np.isnan(values)
        with np.errstate(over="ignore"):
            scaled = np.where(missing, 0, (values - self.mean) / self.std)
            tokens = np.concatenate([scaled, missing[:, self.flagged]], 1, dtype=np.float32)
        if not np.isfinite(tokens).all():
            raise UserError("the series holds values too far from those of training for float32; correct them")
        return torch.from_numpy(tokens)

    def _in_order(self, frame: Any) -> Any:
        """The columns of a DataFrame in the order of training. Raises UserError for missing ones and others."""
        names = {nfc(str(column)): column for column in frame.columns}
        fault = not_as_trained(list(names), self.channels)
        if twice := repeated(nfc(str(column)) for column in frame.columns):
            fault = f"column {twice!r} is there more than once"
        if fault:
            raise UserError(f"a DataFrame of a series: {fault}; rename its columns, or drop what is no feature")
        return frame[[names[name] for name in self.channels]]


# -- images ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageAdapter:
    """An image as a sequence of square patches, normalised per channel.

    Args:
        image_shape: (H, W, channels).
        patch_size: side of a patch, divides H and W [pixels].
        mean, std: per channel, in units of the stored pixels.
        any_size: images of any size and mode become RGB, upright (EXIF), scaled and cropped about the centre to
            (H, W); without it only arrays of image_shape are taken, as they were stored in training.
        bits: of the training images' grey where it has more than 8: white is 2**bits - 1, also in arrays of whole
            numbers wider than 8 bits. None where they had none; grey of 16 bits is then taken to use them all.
    """

    image_shape: Annotated[list[Side], lambda shape: len(shape) == 3, "[height, width, channels]"]
    patch_size: Size
    mean: list[float]
    std: list[Positive]
    any_size: bool = False
    bits: int | None = None

    def __post_init__(self) -> None:
        height, width, channels = self.image_shape
        check_patch_size(self.patch_size, height, width)
        if not len(self.mean) == len(self.std) == channels:
            raise UserError(f"{len(self.mean)} means and {len(self.std)} deviations of {channels} channels")
        if self.any_size and (height, channels) != (width, 3):
            raise UserError(f"images of any size become squares of 3 channels, not {height} x {width} x {channels}")

    @classmethod
    def fit(
        cls, images: np.ndarray, patch_size: int, any_size: bool = False, bits: int | None = None
    ) -> "ImageAdapter":
        """The adapter of training images (N, H, W) or (N, H, W, channels) of whole numbers 0..255."""
        if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4):
            images = np.stack([_stored_pixels(image) for image in images])
        return cls(list(images.shape[1:]), patch_size, *channel_statistics(images), any_size, bits)

    @property
    def grid_shape(self) -> list[int]:
        return [side // self.patch_size for side in self.image_shape[:2]]

    @property
    def features(self) -> dict[str, Any]:
        return {"input_dim": self.patch_size**2 * self.image_shape[2], "grid_shape": self.grid_shape}

    def __call__(self, image: Any) -> Tensor:
        """(L, C), float32, of a PIL image, an array (H, W) or (H, W, channels), or the path of a file."""
        return self.tokens(self.pixels(image)[None])[0]

    def tokens(self, images: np.ndarray) -> Tensor:
        """uint8 (B, H, W, channels) -> float32 (B, L, C)."""
        return prepare_images(images, self.mean, self.std, self.patch_size)

    def pixels(self, image: Any) -> np.ndarray:
        """The image as it is kept: uint8 (H, W, channels)."""
        image = FileFinder()(Path(image)) if isinstance(image, (str, Path)) else image
        if self.any_size:
            return square_pixels(image, self.image_shape[0], self.bits)
        return _stored_pixels(open_image(image) if isinstance(image, Path) else image, tuple(self.image_shape))

    def images(self, tokens: Tensor) -> np.ndarray:
        """The stored images, float (B, H, W, channels), of which `tokens` (B, L, C) were made."""
        size = self.patch_size
        patches = tokens.unflatten(1, self.grid_shape).unflatten(3, (size, size, -1)).transpose(2, 3)
        pixels = patches.reshape(len(tokens), *self.image_shape).double().numpy()
        return (pixels * np.array(self.std) + self.mean).round()


def _stored_pixels(image: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """uint8 (H, W, channels) of an array; without a shape, of any size and 1 to 4 channels."""
    values = as_numbers(image, "image")
    values = values[..., None] if values.ndim == 2 else values
    if shape is not None and values.shape != shape:
        raise UserError(f"an image of shape {values.shape}; the model takes {shape}")
    if values.ndim != 3 or not values.size or (shape is None and values.shape[2] > 4):
        raise UserError(f"an image of shape {values.shape}; it must be (H, W) or (H, W, 1 to 4 channels)")
    if _number_kind(image) in "bf" and 0 < values.max() <= 1:  # among them black and white, which are whole numbers
        raise UserError("pixels from 0 to 1; give whole numbers from 0 to 255 as they are stored, such as "
                        "(image * 255).astype('uint8')")  # fmt: skip
    with np.errstate(invalid="ignore"):
        pixels = values.astype(np.uint8)
    if not np.array_equal(pixels, values):
        raise UserError("pixels must be whole numbers from 0 to 255, as they are stored")
    return pixels


def _number_kind(array: Any) -> str:
    """NumPy's letter for the kind of numbers: b (bool), i, u, f; for uint8, which is what pixels are stored as, 8."""
    if isinstance(array, Tensor):
        return "f" if array.is_floating_point() else {torch.bool: "b", torch.uint8: "8"}.get(array.dtype, "i")
    try:
        dtype = np.asarray(array).dtype
    except ValueError:  # rows of different lengths; `_numbers` says so
        return "O"
    return "8" if dtype == np.uint8 else dtype.kind


def _array_image(array: Any, bits: int | None) -> Image.Image:
    """A PIL image of an array (H, W) or (H, W, 1 to 4 channels), whose type says what its numbers mean.

    Of bool, True is white. Whole numbers wider than 8 bits reach 2**bits - 1 where the training images had `bits`. All
    others are 0..255; from 0 to 1 is refused, whatever is between.
    """
    kind = _number_kind(array)
    if kind == "b":
        array = (as_numbers(array, "image") * 255).astype(np.uint8)
    elif bits and kind in "iu":
        array = to_bytes(as_numbers(array, "image"), 2**bits - 1, "the image")
    pixels = _stored_pixels(array)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def square_pixels(image: Any, size: int, bits: int | None = None) -> np.ndarray:
    """uint8 (size, size, 3) of an image of any size and mode: a path, a PIL image or an array (H, W[, channels])."""
    name = printable(str(image)) if isinstance(image, Path) else "the image"
    if isinstance(image, Path):
        image = open_image(image)
    else:
        image = upright(image) if isinstance(image, Image.Image) else _array_image(image, bits)
    image = to_rgb(image, name, bits or 16)
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def check_patch_size(patch_size: int, height: int, width: int) -> None:
    """Raise UserError if patches of this size (pixels) do not tile the image."""
    if patch_size < 1 or height % patch_size or width % patch_size:
        valid = [size for size in range(1, height + 1) if not height % size and not width % size]
        raise UserError(f"patch_size {patch_size} does not divide the image of {height} x {width}; valid are {valid}")


def prepare_images(images: np.ndarray, mean: Sequence[float], std: Sequence[float], patch_size: int) -> Tensor:
    """Images as sequences of patches, normalised.

    Args:
        images: uint8 (B, H, W, C).
        mean, std: per channel (C), in units of the stored pixels.
        patch_size: P, divides H and W.

    Returns:
        float32 (B, H/P * W/P, P*P*C). Patches run along the rows of the image; inside a patch the order is row, column,
        channel.

    Raises UserError for another type or shape.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(f"images must be uint8 (B, H, W, C), these are {images.dtype} {images.shape}")
    (num, height, width, channels), size = images.shape, patch_size
    check_patch_size(size, height, width)
    strip = np.dtype((np.void, size * channels))  # one row of a patch, moved as a whole
    strips = np.ascontiguousarray(images).reshape(num, height // size, size, -1).view(strip)
    patches = strips.swapaxes(2, 3).copy().view(np.uint8)  # (B, H/P, W/P, P*P*C)
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), height * width)
    pixels = torch.from_numpy(patches).view(num, -1).float()
    return torch.addcmul(shift, pixels, scale, out=pixels).view(num, -1, size * size * channels)


@lru_cache
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], pixels: int) -> tuple[Tensor, Tensor]:
    """(value - mean) / std as value * scale + shift, for all the values of an image, (pixels * C,) each."""
    scale = 1 / torch.tensor(std)
    return scale.repeat(pixels), (-torch.tensor(mean) * scale).repeat(pixels)


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """(mean, standard deviation) per channel of uint8 (N, H, W, C); a constant channel has deviation 1."""
    planes = [torch.from_numpy(images[..., c].ravel()) for c in range(images.shape[-1])]
    share = np.stack([plane.bincount(minlength=256) / len(plane) for plane in planes])  # (C, 256)
    values = np.arange(256)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(1))
    return mean.tolist(), np.where(std > 0, std, 1.0).tolist()


# -- descriptions ---------------------------------------------------------------------------------------------

Adapter = TensorAdapter | TextAdapter | SeriesAdapter | ImageAdapter
KINDS: dict[str, type] = {"tensor": TensorAdapter, "text": TextAdapter, "series": SeriesAdapter, "image": ImageAdapter}


def describe(adapter: Adapter) -> dict[str, Any]:
    """Plain values that a checkpoint can store."""
    kind = next(name for name, cls in KINDS.items() if type(adapter) is cls)
    return {"kind": kind, **asdict(adapter)}


def from_description(description: dict[str, Any], where: str = "the adapter") -> Adapter:
    """The adapter that `describe` described. Raises UserError, which begins with `where`, for what it never writes."""
    kind = description.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{where}: its kind is {shown(kind)}; it must be one of {', '.join(KINDS)}")
    return read({name: value for name, value in description.items() if name != "kind"}, KINDS[kind], where)
