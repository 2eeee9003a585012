"""What the encoder reads of a token: its features, its position and, with several modalities, its modality.

    tokens (B, L, features) -> [embedding] -> [stem] -> + positions -> [+ encoding of the modality] -> (B, L, C)

Letters used for shapes, as in perceiver_model.py:

    B  batch        L  input tokens        C  input channels: features + position features [+ encoding]

A stem may turn the L tokens it is given into fewer; behind it, L is how many there are then.
"""

import difflib
import inspect
import itertools
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# --- Checks of arguments ---------------------------------------------------------------------------------------------


def check_sizes(**sizes: int) -> None:
    """Check that each size is a whole number of 1 or more.

    Raises:
        ValueError: names the one that is not.
    """
    for name, value in sizes.items():
        if not (isinstance(value, Integral) and value >= 1):
            raise ValueError(f"{name} must be a whole number of 1 or more, not {value!r}")


def check_shares(**shares: float) -> None:
    """Check that each share is a number from 0 to 1.

    Raises:
        ValueError: names the one that is not.
    """
    for name, value in shares.items():
        if isinstance(value, bool) or not (isinstance(value, Real) and 0 <= value <= 1):
            raise ValueError(f"{name} must be a number from 0 to 1, not {value!r}")


def check_switches(**switches: bool) -> None:
    """Check that each switch is True or False.

    Raises:
        ValueError: names the one that is not.
    """
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, not {value!r}")


def check_grids(**grids: tuple[int, int] | None) -> None:
    """Check that each grid is (rows, cols), whole numbers of 1 or more, or None.

    Raises:
        ValueError: names the one that is not.
    """
    for name, grid in grids.items():
        if grid is None:
            continue
        if not (isinstance(grid, (tuple, list)) and len(grid) == 2):
            raise ValueError(f"{name} must be (rows, cols), not {grid!r}")
        check_sizes(**dict(zip((f"rows of {name}", f"cols of {name}"), grid, strict=True)))


def check_names(given: Iterable[str], valid: Iterable[str], where: str) -> None:
    """Check that all names are valid.

    Raises:
        TypeError: names the first that is not, and the nearest valid ones.
    """
    for name in sorted(map(str, set(given) - set(valid))):
        nearest = difflib.get_close_matches(name, valid, 2, 0.7) or difflib.get_close_matches(name, valid, 1, 0)
        raise TypeError(f"{where} got an unknown argument {name!r}; did you mean {' or '.join(map(repr, nearest))}?")


# --- Positions -------------------------------------------------------------------------------------------------------


def sequence_positions(length: int, num_bands: int, device: torch.device | str = "cpu") -> Tensor:
    """Sines and cosines of the token's index at num_bands frequencies 10000^(-k / num_bands) (Vaswani et al. 2017,
    section 3.5): wavelengths from 2 pi tokens, above the Nyquist limit of 2, to nearly 20000 pi.

    A row depends on its index alone, so any length works and a prefix is the table of a shorter sequence.

    Returns:
        float32 (length, 2 num_bands); angles are computed in float64, float32 would lose them at a million tokens.
    """
    exact = {"dtype": torch.float64, "device": device}
    frequencies = 10000.0 ** -(torch.arange(num_bands, **exact) / num_bands)
    angles = torch.arange(length, **exact)[:, None] * frequencies  # (length, num_bands)
    return torch.cat([angles.sin().float(), angles.cos().float()], 1)


def grid_positions(
    rows: int,
    cols: int,
    num_bands: int,
    device: torch.device | str = "cpu",
    max_resolution: tuple[int, int] | None = None,
) -> Tensor:
    """The 2-D Fourier features of the paper (section 3.2): coordinates in [-1, 1] from edge to edge, and their sines
    and cosines at num_bands frequencies from 1 to the Nyquist frequency of each axis, half its number of tokens (or
    half of max_resolution).

    Returns:
        float32 (rows * cols, 4 num_bands + 2) in row-major order: the coordinates, all sines, all cosines.
    """
    exact = {"dtype": torch.float64, "device": device}
    axes = [torch.linspace(-1, 1, size, **exact) for size in (rows, cols)]
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)  # (rows cols, 2)
    bands = [torch.linspace(1, max(1, size / 2), num_bands, **exact) for size in max_resolution or (rows, cols)]
    angles = math.pi * (coordinates[:, :, None] * torch.stack(bands)).flatten(1)  # (rows cols, 2 num_bands)
    return torch.cat([coordinates, angles.sin(), angles.cos()], 1).float()


class PositionFeatures(nn.Module):
    """Position features of a sequence or of a grid; they have no parameters, and are kept once made.

    Args:
        grid_shape: (rows, cols) of an image's tokens in row-major order; None for a sequence of any length.
        num_bands: frequencies; each is a sine and a cosine per axis and token, and costs what two features do. Default
            8 for sequences; for grids one per whole frequency up to the Nyquist limit, at most 64 (as on ImageNet).
        max_resolution: (rows, cols) of the grid whose Nyquist limits end the bands; default grid_shape. A model that
            reads images of another size than those it was trained on keeps the frequencies that it knows.
    """

    def __init__(
        self,
        grid_shape: tuple[int, int] | None = None,
        num_bands: int | None = None,
        max_resolution: tuple[int, int] | None = None,
    ):
        super().__init__()
        max_resolution = max_resolution or grid_shape
        if num_bands is None:
            num_bands = 8 if grid_shape is None else min(max(1, max(max_resolution) // 2), 64)
        check_sizes(num_frequency_bands=num_bands)
        self.grid_shape, self.num_bands, self.max_resolution = grid_shape, num_bands, max_resolution
        self.num_channels = 2 * self.num_bands if grid_shape is None else 4 * self.num_bands + 2
        self.table = torch.empty(0, self.num_channels)

    def _make(self, length: int, device: torch.device) -> Tensor:
        exact = "cpu" if device.type == "mps" else device  # MPS has no float64
        if self.grid_shape:
            return grid_positions(*self.grid_shape, self.num_bands, exact, self.max_resolution).to(device)
        return sequence_positions(length, self.num_bands, exact).to(device)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, features) -> (L, num_channels) on its device and in its dtype; the values of x do not matter."""
        length, table = x.size(1), self.table
        fits = table.size(0) >= length and table.device == x.device
        if torch.compiler.is_compiling() and not (fits and self.grid_shape):
            table = self._make(length, x.device)  # in the graph, which a table of one length would tie to that length
        elif not fits:
            table = self._make(max(length, 2 * table.size(0)), x.device)
            if type(table) is Tensor:  # not one of a FakeTensorMode, which must leave nothing behind
                self.table = table
        return table[:length].to(x)


class LearnedPositions(nn.Module):
    """A learned vector for each position, optionally through a linear layer (Perceiver IO's learned features).

    Args:
        num_positions: positions there are vectors for.
        num_channels: of a vector.
        project: pass the vectors through a linear layer of the same width.
    """

    def __init__(self, num_positions: int, num_channels: int, project: bool = False):
        super().__init__()
        self.num_channels = num_channels
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_positions, num_channels), std=0.02))
        self.projection = nn.Linear(num_channels, num_channels) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, features) -> (L, num_channels); only the length of x matters."""
        return self.projection(self.table[: x.size(1)])


# --- Stems -----------------------------------------------------------------------------------------------------------


class LinearStem(nn.Linear):
    """A linear layer over the features of each token; for pixels, a 1 x 1 convolution."""

    @property
    def num_channels(self) -> int:
        return self.out_features

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (B, L, features), mask bool (B, L) -> (B, L, channels), mask (B, L)."""
        return super().forward(x), mask


def num_windows(length: int, window: int, stride: int) -> int:
    """How many windows, one every `stride` steps, it takes to hold all of `length` steps."""
    return (max(0, length - window) + stride - 1) // stride + 1


def window_steps(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """(first step, step after the last) of each of these windows."""
    starts = [number * stride for number in range(num_windows(length, window, stride))]
    return [(start, min(start + window, length)) for start in starts]


class SequenceStem(nn.Module):
    """The base of stems for sequences: token i stands for the steps i * stride to i * stride + window - 1.

    Args:
        num_channels: of a token.
        window: steps of a token; the last token's may lie beyond the last step.
        stride: steps from the start of a token to that of the next.

    Raises:
        ValueError: the stride is larger than the window, so that steps would be left out.
    """

    def __init__(self, num_channels: int, window: int, stride: int):
        super().__init__()
        check_sizes(stride=stride)
        if stride > window:
            raise ValueError(f"stride {stride} leaves out steps between windows of {window}; make it {window} at most")
        self.num_channels, self.window, self.stride = num_channels, window, stride

    def num_tokens(self, length: int) -> int:
        return num_windows(length, self.window, self.stride)

    def windows(self, values: Tensor) -> Tensor:
        """(B, steps, ...) -> (B, L, window, ...), zero (False) beyond the last step."""
        length = values.size(1)
        padded = torch.cat([values, values.new_zeros(values.size(0), self.window, *values.shape[2:])], 1)
        # Chosen by number, since slices of a view would tie an exported program to the lengths that leave no rest
        first = self.stride * torch.arange(self.num_tokens(length), device=values.device)
        return padded[:, first[:, None] + torch.arange(self.window, device=values.device)]

    def answering(self, length: int, real: Tensor | int) -> Tensor:
        """Which token answers for each of `length` steps: of the real ones (B, L), the one whose middle is nearest.
        Without a mask `real` is their number. int64 (B, length), or (1, length)."""
        device = real.device if isinstance(real, Tensor) else None
        middle = 2 * torch.arange(length, device=device) + 1 - self.window  # twice the step, from that of token 0
        nearest = (middle + self.stride).div(2 * self.stride, rounding_mode="floor").clamp(min=0)[None]
        if not isinstance(real, Tensor):
            return nearest.clamp(max=real - 1)
        last = (real * torch.arange(real.size(1), device=device)).amax(1, keepdim=True)  # (B, 1)
        return torch.minimum(nearest, last)

    def token_mask(self, mask: Tensor | None) -> Tensor | None:
        """bool (B, steps) -> (B, L). A token is real where it holds a real step that no token before it holds, so that
        a sequence has the same tokens whatever padding follows."""
        if mask is None:
            return None
        real = self.windows(mask)  # (B, L, window)
        new = torch.arange(self.window, device=mask.device) >= self.window - self.stride
        first = torch.arange(real.size(1), device=mask.device) == 0
        return (real & (new | first[:, None])).any(2)


class WindowStem(SequenceStem):
    """Windows of consecutive steps, the features of their steps side by side: local shape, without any weight.

    Args:
        input_dim: features of a step.
        window, stride: see :class:`SequenceStem`.
    """

    def __init__(self, input_dim: int, window: int, stride: int):
        super().__init__(window * input_dim, window, stride)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (B, steps, features), mask bool (B, steps) -> tokens (B, L, window * features), mask (B, L)."""
        return self.windows(x).flatten(2), self.token_mask(mask)


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch norm over the real tokens alone, those of all processes of a run together.

    In evaluation it is a fixed scale and shift of each channel. In training it ties the samples of a batch together, so
    batches accumulated into one step differ from a larger batch.
    """

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, L, channels), mask bool (B, L) -> (B, L, channels)."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var = self.running_mean, self.running_var
        if self.training:
            real = values.new_ones(values.shape[:2]) if mask is None else mask.to(values.dtype)
            count = _summed(real.sum())
            there = count > 0  # not where every sample of a batch lacks this modality
            count = count.clamp(min=1)
            mean = _summed(torch.einsum("blc,bl->c", values, real)) / count
            var = _summed(torch.einsum("blc,bl->c", (values - mean).square(), real)) / count
            with torch.no_grad():
                unbiased = var * count / (count - 1).clamp(min=1)
                for kept, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                    kept.lerp_(new.to(kept.dtype), self.momentum * there.to(kept.dtype))
                self.num_batches_tracked += there
        values = (values - mean) * (self.weight * (var + self.eps).rsqrt()) + self.bias
        return values.to(x.dtype)


def _summed(values: Tensor) -> Tensor:
    """The sum over the processes of a run; gradients pass through it."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values
    from torch.distributed.nn.functional import all_reduce  # which not every build of torch has

    return all_reduce(values.contiguous())


class SequenceConvStem(SequenceStem):
    """Convolutions over the steps of a sequence: layers of kernels of several sizes side by side, as in InceptionTime
    (Fawaz et al. 2020, section 3), each followed by batch norm and GELU; all but the first are residual.

    The first layer has the stride: a token stands for that many steps, and a long sequence costs the less. In every
    layer what is not there counts as zeros, and no norm counts it. So in evaluation the tokens of a sample depend
    neither on its padding nor on the samples beside it.

    Args:
        input_dim: features of a step.
        num_channels: of a token, divisible by the number of kernel sizes.
        stride: steps of a token.
        kernels: their sizes, odd, so that each has a middle: steps in the first layer, then tokens.
        kernel_scale: times the sizes of the first layer, so that tokens far apart leave no step out.
    """

    LAYERS = 2

    def __init__(
        self, input_dim: int, num_channels: int, stride: int, kernels: tuple[int, ...] = (7, 15, 31),
        kernel_scale: int = 1,
    ):  # fmt: skip
        super().__init__(num_channels, stride, stride)
        each, rest = divmod(num_channels, len(kernels))
        if rest:
            raise ValueError(f"stem='conv' has kernels of {len(kernels)} sizes; stem_dim must be divisible by that, "
                             f"{num_channels} is not")  # fmt: skip
        check_sizes(kernel_scale=kernel_scale)
        first = [size * kernel_scale // 2 * 2 + 1 for size in kernels]
        shapes = [(input_dim, stride, first)] + [(num_channels, 1, kernels)] * (self.LAYERS - 1)
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Conv1d(inputs, each, size, step, size // 2, bias=False) for size in sizes)
            for inputs, step, sizes in shapes
        )
        self.norms = nn.ModuleList(MaskedBatchNorm(num_channels) for _ in shapes)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (B, steps, features), zero where hidden; mask bool (B, steps) -> tokens (B, L, channels), mask (B, L)."""
        mask = self.token_mask(mask)
        for number, (convolutions, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            y = torch.cat([convolution(x.mT) for convolution in convolutions], 1).mT  # (B, L, channels)
            y = F.gelu(norm(y, mask))
            x = x + y if number else y
            if mask is not None:
                x = x.masked_fill(~mask[..., None], 0)
        return x, mask


def conv_grid(grid_shape: tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) of the tokens behind a :class:`ConvStem` of so many pixels."""
    rows, cols = (((side + 1) // 2 - 1) // 2 for side in grid_shape)
    return rows, cols


class ConvStem(nn.Module):
    """Perceiver IO's convolutional preprocessing of images: 7 x 7 convolution of stride 2, batch norm, ReLU and 3 x 3
    max pooling of stride 2, so that one token stands for about 4 x 4 (224 x 224 pixels become 55 x 55 tokens).

    Padding is that of transformers' PerceiverForImageClassificationConvProcessing, whose results these are: 3 zeros on
    every side before the convolution and none before the pooling. (The authors' JAX code pads 2 and 3 zeros, and
    the pooling by one row and column at the end, and so has 56 x 56 tokens.)

    Args:
        input_dim: channels of a pixel.
        num_channels: channels of a token.
        grid_shape: (rows, cols) of the pixels, 5 or more each.
    """

    def __init__(self, input_dim: int, num_channels: int, grid_shape: tuple[int, int]):
        super().__init__()
        if min(grid_shape) < 5:
            raise ValueError(f"stem='conv' needs 5 rows and columns or more, grid_shape is {tuple(grid_shape)}")
        self.grid_shape, self.num_channels = tuple(grid_shape), num_channels
        self.token_grid = conv_grid(grid_shape)
        self.convolution = nn.Conv2d(input_dim, num_channels, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(num_channels)
        self.pool = nn.MaxPool2d(3, stride=2)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (B, rows * cols, features), mask bool -> tokens (B, L, channels), mask (B, L).

        A token is real where it sees a real pixel. In training, batch norm counts the pixels of masked images, too.
        """
        pixels = x.mT.unflatten(2, self.grid_shape)  # (B, features, rows, cols)
        tokens = self.pool(self.norm(self.convolution(pixels)).relu()).flatten(2).mT  # (B, L, channels)
        if mask is not None:
            seen = mask[:, None].unflatten(2, self.grid_shape).to(x.dtype)  # (B, 1, rows, cols)
            mask = self.pool(F.max_pool2d(seen, 7, stride=2, padding=3)).flatten(1) > 0  # (B, L)
        return tokens, mask


# --- Mixtures of two samples ------------------------------------------------------------------------------------------


def mixture(
    x: Tensor, mask: Tensor | None, other: Tensor, other_mask: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor | None]:
    """weight * x + (1 - weight) * other, where what is hidden or beyond the end of one counts as zeros (mixup, Zhang et
    al. 2018; of embedded text as Guo et al. 2019).

    Args:
        x, other: (B, L, features) each, L of its own.
        mask, other_mask: bool (B, L), or None.
        weight: (B,).

    Returns:
        (B, longer L, features), and bool (B, longer L), True where one of both is real; None if neither has a mask and
        their lengths are the same.
    """
    longest = max(x.size(1), other.size(1))
    masks = []
    if mask is not None or other_mask is not None or x.size(1) != other.size(1):
        for values, real in ((x, mask), (other, other_mask)):
            real = values.new_ones(values.shape[:2], dtype=torch.bool) if real is None else real
            masks.append(F.pad(real, (0, longest - values.size(1))))
    parts = [F.pad(values, (0, 0, 0, longest - values.size(1))) for values in (x, other)]
    if masks:
        parts = [values.masked_fill(~real[..., None], 0) for values, real in zip(parts, masks, strict=True)]
    weight = weight.to(x.dtype)[:, None, None]
    return weight * parts[0] + (1 - weight) * parts[1], masks[0] | masks[1] if masks else None


# --- Tokens ----------------------------------------------------------------------------------------------------------


class TokenFeatures(nn.Module):
    """What the encoder reads of one modality's tokens: features, positions and, with several modalities, an encoding.

    Args:
        input_dim: features of a token.
        vocab_size: tokens are whole numbers below it (bytes: 256), each with a learned embedding, as Perceiver IO reads
            text (section 4.1); input_dim is then 1. None for tokens that are features already.
        embedding_dim: width of that embedding.
        grid_shape: (rows, cols) when the tokens are an image's, in row-major order; None for sequences.
        use_positions: tell the encoder where each token stands; off for data that carries its own positions.
        num_frequency_bands, max_resolution: of computed positions, see `PositionFeatures`.
        stem: a first layer for the features, or for the embeddings. "linear": `LinearStem`; "conv": `ConvStem` for
            images, `SequenceConvStem` for sequences; "windows": `WindowStem`, for sequences.
        stem_dim: features of a token behind a linear or convolutional stem; default 64, of "conv" for sequences 96.
        window: steps of a token of the stem "windows".
        stride: steps from a token to the next behind the stem "windows" or, for sequences, "conv"; default 1.
        kernel_scale: times the kernel sizes of the first layer of "conv" for sequences; default 1, of embeddings the
            stride.
        learned_positions: learn a vector for each position, as wide as the features, instead of computing one.
        max_length: tokens of the longest sequence that positions are learned for; a longer one is refused.
        add_positions: add the learned positions to the features instead of concatenating them.
        project_positions: pass the learned positions through a linear layer.

    Raises:
        ValueError: a size that is not a whole number of 1 or more, or arguments that do not go together.
    """

    def __init__(
        self,
        input_dim: int = 1,
        vocab_size: int | None = None,
        embedding_dim: int = 64,
        grid_shape: tuple[int, int] | None = None,
        use_positions: bool = True,
        num_frequency_bands: int | None = None,
        max_resolution: tuple[int, int] | None = None,
        stem: str | None = None,
        stem_dim: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        kernel_scale: int | None = None,
        learned_positions: bool = False,
        max_length: int | None = None,
        add_positions: bool = False,
        project_positions: bool = False,
    ):
        super().__init__()
        check_sizes(input_dim=input_dim, embedding_dim=embedding_dim)
        check_switches(
            use_positions=use_positions,
            learned_positions=learned_positions,
            add_positions=add_positions,
            project_positions=project_positions,
        )
        check_grids(grid_shape=grid_shape, max_resolution=max_resolution)
        self.input_dim, self.grid_shape, self.token_grid = input_dim, grid_shape, grid_shape
        self.content_width = vocab_size or input_dim  # numbers of an answer that says what a token holds
        self.embedding = self.stem = self.positions = self.encoding = None
        width = input_dim
        if vocab_size is not None:
            check_sizes(vocab_size=vocab_size)
            if input_dim != 1:
                raise ValueError(f"with vocab_size a token is one whole number: input_dim must be 1, not {input_dim}")
            if stem == "linear":
                raise ValueError("with vocab_size the embedding makes the features: stem='linear' would add nothing")
            width = embedding_dim
            # From a unit normal, as large as the computed positions beside it: the layer norm is over both
            self.embedding = nn.Embedding(vocab_size, width)
            if add_positions:  # as small as the learned positions that it is added to
                nn.init.trunc_normal_(self.embedding.weight, std=0.02)
        if stem is not None:
            self.stem = _make_stem(
                stem, width, vocab_size is not None, stem_dim, window, 1 if stride is None else stride, kernel_scale,
                grid_shape,
            )  # fmt: skip
            width = self.stem.num_channels
            self.token_grid = getattr(self.stem, "token_grid", grid_shape)  # (rows, cols) behind the stem
        self.num_channels = width
        if learned_positions:
            if grid_shape is not None:
                max_length = math.prod(self.token_grid)
            check_sizes(max_length=max_length)
            self.positions = LearnedPositions(max_length, width, project_positions)
        elif use_positions:
            self.positions = PositionFeatures(self.token_grid, num_frequency_bands, max_resolution)
        self.max_length, self.add_positions = max_length, add_positions
        if self.positions is not None and not add_positions:
            self.num_channels += self.positions.num_channels
        self.missing_length = math.prod(grid_shape) if grid_shape else 1  # tokens that stand for a missing modality

    def pad_channels(self, width: int) -> None:
        """Pad to `width` channels with a learned encoding of the modality (as in the paper, for audio and video)."""
        self.encoding = nn.Parameter(nn.init.trunc_normal_(torch.empty(width - self.num_channels), std=0.02))

    def num_tokens(self, length: int) -> int:
        """How many tokens the encoder reads where `length` are given."""
        if self.token_grid:
            return math.prod(self.token_grid)
        return self.stem.num_tokens(length) if isinstance(self.stem, SequenceStem) else length

    def forward(
        self, x: Tensor, mask: Tensor | None = None, mix: tuple[Tensor, Tensor | None, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the encoder reads.

        Args:
            x: (B, L, input_dim).
            mask: bool (B, L), or None.
            mix: (other samples, their mask, weight (B,) of x beside them), see `PerceiverModel`.

        Returns:
            (B, L, C) and its mask (B, L), L after the stem.
        """
        x = self._features(x, mask)
        if mix is not None:
            other, other_mask, weight = mix
            x, mask = mixture(x, mask, self._features(other, other_mask), other_mask, weight)
        if self.stem is not None:
            x, mask = self.stem(x, mask)  # (B, L, features), (B, L)
        features = [x]
        if self.positions is not None:
            positions = self.positions(x)  # (L, channels)
            if self.add_positions:
                features = [x + positions]
            else:
                features.append(positions.expand(x.size(0), -1, -1))
        if self.encoding is not None:
            features.append(self.encoding.expand(*x.shape[:2], -1))
        return torch.cat(features, -1) if len(features) > 1 else features[0], mask

    def _features(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, input_dim) -> (B, L, features) before the stem, zero where hidden if a stem or a product follows."""
        hidden = None if mask is None else ~mask[..., None]
        if hidden is not None:
            x = x.masked_fill(hidden, 0)  # 0 * NaN is NaN: padding must go before the first product
        if self.embedding is None:
            return x
        x = self.embedding(x[..., 0].long())
        return x if hidden is None or self.stem is None else x.masked_fill(hidden, 0)

    def check(self, x: Tensor, name: str) -> None:
        """Check that x is a batch of these tokens.

        Raises:
            ValueError: it is not.
        """
        if x.dim() != 3 or x.size(2) != self.input_dim or not x.size(1):
            shape = tuple(x.shape)
            raise ValueError(f"{name} has shape {shape}, but the model takes (batch, tokens, {self.input_dim})")
        if self.grid_shape and x.size(1) != math.prod(self.grid_shape):
            rows, cols = self.grid_shape
            raise ValueError(f"{name} has {x.size(1)} tokens, but grid_shape {rows} x {cols} needs {rows * cols}")
        if self.max_length and not self.grid_shape and x.size(1) > self.max_length:
            raise ValueError(f"{name} has {x.size(1)} tokens, but the model has learned {self.max_length} positions")


def _make_stem(
    kind: str, input_dim: int, embedded: bool, num_channels: int | None, window: int | None, stride: int,
    kernel_scale: int | None, grid: tuple[int, int] | None,
) -> nn.Module:  # fmt: skip
    if kind not in ("linear", "conv", "windows"):
        raise ValueError(f"stem must be 'linear', 'conv', 'windows' or None, not {kind!r}")
    if kind == "windows":
        if grid is not None:
            raise ValueError("stem='windows' is for sequences, not for the tokens of a grid (grid_shape)")
        check_sizes(window=window)
        return WindowStem(input_dim, window, stride)
    sequence = kind == "conv" and grid is None
    num_channels = (96 if sequence else 64) if num_channels is None else num_channels
    check_sizes(stem_dim=num_channels)
    if kind == "linear":
        return LinearStem(input_dim, num_channels)
    if not sequence:
        return ConvStem(input_dim, num_channels, grid)
    # Of bytes, what says most is which few stand side by side
    kernels, scale = ((3, 5, 7), stride) if embedded else ((7, 15, 31), 1)
    return SequenceConvStem(input_dim, num_channels, stride, kernels, scale if kernel_scale is None else kernel_scale)


NEEDS = {  # arguments of TokenFeatures that have an effect only beside others: (those, whether they are given)
    "embedding_dim": ("vocab_size", lambda given: given["vocab_size"] is not None),
    "stem_dim": ("stem='linear' or 'conv'", lambda given: given["stem"] in ("linear", "conv")),
    "window": ("stem='windows'", lambda given: given["stem"] == "windows"),
    "stride": (
        "stem='windows', or stem='conv' of a sequence",
        lambda given: given["stem"] == "windows" or (given["stem"] == "conv" and given["grid_shape"] is None),
    ),
    "kernel_scale": (
        "stem='conv' of a sequence",
        lambda given: given["stem"] == "conv" and given["grid_shape"] is None,
    ),
    "num_frequency_bands": (
        "computed positions (use_positions)",
        lambda given: given["use_positions"] and not given["learned_positions"],
    ),
    "max_resolution": (
        "computed positions of a grid (use_positions, grid_shape)",
        lambda given: given["grid_shape"] and given["use_positions"] and not given["learned_positions"],
    ),
    "learned_positions": ("use_positions", lambda given: given["use_positions"]),
    "max_length": (
        "learned_positions of a sequence",
        lambda given: given["learned_positions"] and given["grid_shape"] is None,
    ),
    "add_positions": ("learned_positions", lambda given: given["learned_positions"]),
    "project_positions": ("learned_positions", lambda given: given["learned_positions"]),
}
_DEFAULTS = {name: each.default for name, each in inspect.signature(TokenFeatures).parameters.items()}


def check_effects(shared: dict[str, Any], modalities: dict[str, dict[str, Any]]) -> None:
    """Check that every argument of TokenFeatures has an effect: a modality's own ones in this modality, and the shared
    ones in at least one.

    Raises:
        ValueError: names one that has none.
    """
    complete = {name: _DEFAULTS | shared | own for name, own in modalities.items()}
    groups = [(shared, list(complete.values()))]
    groups += [(own, [complete[name]]) for name, own in modalities.items()]
    for (given, where), (name, (needed, has_effect)) in itertools.product(groups, NEEDS.items()):
        value = given.get(name)
        if value is not None and value is not False and not any(map(has_effect, where)):
            raise ValueError(f"{name}={value!r} has no effect without {needed}")
