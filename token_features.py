"""What the encoder reads of a token: its features, its position and, among several modalities, which one it is.

    tokens (B, L, features) -> [embedding of whole numbers] -> + positions -> + encoding of the modality -> (B, L, C)

Letters used for shapes, as in perceiver_model.py:

    B  batch        L  input tokens        C  input channels: features + position features [+ encoding]
"""

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real

import torch
from torch import Tensor, nn

# --- Checks of arguments ---------------------------------------------------------------------------------------------


def check_sizes(**sizes: int) -> None:
    """Refuse by name, with a ValueError, a size that is not a whole number of 1 or more."""
    for name, value in sizes.items():
        if not (isinstance(value, Integral) and value >= 1):
            raise ValueError(f"{name} must be a whole number of 1 or more, not {value!r}")


def check_shares(**shares: float) -> None:
    """Refuse by name, with a ValueError, a share that is not a number from 0 to 1."""
    for name, value in shares.items():
        if isinstance(value, bool) or not (isinstance(value, Real) and 0 <= value <= 1):
            raise ValueError(f"{name} must be a number from 0 to 1, not {value!r}")


def check_switches(**switches: bool) -> None:
    """Refuse by name, with a ValueError, a switch that is neither True nor False."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, not {value!r}")


def check_names(given: Iterable[str], valid: Iterable[str], where: str) -> None:
    """Refuse, with a TypeError, a name that is not valid; the nearest valid one is given."""
    for name in sorted(set(given) - set(valid), key=str):
        nearest = difflib.get_close_matches(str(name), valid, 1, 0)[0]
        raise TypeError(f"{where} got an unknown argument {name!r}; did you mean {nearest!r}?")


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


def grid_positions(rows: int, cols: int, num_bands: int, device: torch.device | str = "cpu") -> Tensor:
    """The 2-D Fourier features of the paper (section 3.2): coordinates in [-1, 1] from edge to edge, and their sines
    and cosines at num_bands frequencies from 1 to the Nyquist frequency of each axis, half its number of tokens.

    Returns:
        float32 (rows * cols, 4 num_bands + 2) in row-major order: the coordinates, all sines, all cosines.
    """
    exact = {"dtype": torch.float64, "device": device}
    axes = [torch.linspace(-1, 1, size, **exact) for size in (rows, cols)]
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)  # (rows cols, 2)
    bands = [torch.linspace(1, max(1, size / 2), num_bands, **exact) for size in (rows, cols)]
    angles = math.pi * (coordinates[:, :, None] * torch.stack(bands)).flatten(1)  # (rows cols, 2 num_bands)
    return torch.cat([coordinates, angles.sin(), angles.cos()], 1).float()


class PositionFeatures(nn.Module):
    """Position features of a sequence or of a grid; they have no parameters, and are kept once made.

    Args:
        grid_shape: (rows, cols) of an image's tokens in row-major order; None for a sequence of any length.
        num_bands: frequencies; each is a sine and a cosine per axis and token, and costs what two features do. Default
            8 for sequences; for grids one per whole frequency up to the Nyquist limit, at most 64 (as on ImageNet).
    """

    def __init__(self, grid_shape: tuple[int, int] | None = None, num_bands: int | None = None):
        super().__init__()
        if num_bands is None:
            num_bands = 8 if grid_shape is None else min(max(1, max(grid_shape) // 2), 64)
        check_sizes(num_frequency_bands=num_bands)
        self.grid_shape, self.num_bands = grid_shape, num_bands
        self.num_channels = 2 * self.num_bands if grid_shape is None else 4 * self.num_bands + 2
        self.table = torch.empty(0, self.num_channels)

    def _make(self, length: int, device: torch.device) -> Tensor:
        exact = "cpu" if device.type == "mps" else device  # MPS has no float64
        if self.grid_shape:
            return grid_positions(*self.grid_shape, self.num_bands, exact).to(device)
        return sequence_positions(length, self.num_bands, exact).to(device)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, features) -> (L, num_channels) on its device and in its dtype; of x nothing else is looked at."""
        length, table = x.size(1), self.table
        fits = table.size(0) >= length and table.device == x.device
        if torch.compiler.is_compiling() and not (fits and self.grid_shape):
            table = self._make(length, x.device)  # in the graph, which a table of one length would tie to that length
        elif not fits:
            table = self._make(max(length, 2 * table.size(0)), x.device)
            if type(table) is Tensor:  # not one of a FakeTensorMode, which must leave nothing behind
                self.table = table
        return table[:length].to(x)


# --- Tokens ----------------------------------------------------------------------------------------------------------


class TokenFeatures(nn.Module):
    """What the encoder reads of one modality's tokens: features, positions and, among several, which modality it is.

    Args:
        input_dim: features of a token.
        vocab_size: tokens are whole numbers below it (bytes: 256), each with a learned embedding, as Perceiver IO reads
            text (section 4.1); input_dim is then 1. None for tokens that are features already.
        embedding_dim: width of that embedding.
        grid_shape: (rows, cols) when the tokens are an image's, in row-major order; None for sequences.
        use_positions: concatenate position features; off for data that carries its own.
        num_frequency_bands: see :class:`PositionFeatures`.

    Raises:
        ValueError: a size that is not a whole number of 1 or more, or that does not fit another.
    """

    def __init__(
        self,
        input_dim: int = 1,
        vocab_size: int | None = None,
        embedding_dim: int = 64,
        grid_shape: tuple[int, int] | None = None,
        use_positions: bool = True,
        num_frequency_bands: int | None = None,
    ):
        super().__init__()
        check_sizes(input_dim=input_dim, embedding_dim=embedding_dim)
        check_switches(use_positions=use_positions)
        if grid_shape is not None:
            if not (isinstance(grid_shape, (tuple, list)) and len(grid_shape) == 2):
                raise ValueError(f"grid_shape must be (rows, cols), not {grid_shape!r}")
            check_sizes(**dict(zip(("rows of grid_shape", "cols of grid_shape"), grid_shape, strict=True)))
        self.input_dim, self.grid_shape, self.embedding = input_dim, grid_shape, None
        if vocab_size is not None:
            check_sizes(vocab_size=vocab_size)
            if input_dim != 1:
                raise ValueError(f"with vocab_size a token is one whole number: input_dim must be 1, not {input_dim}")
            # From a unit normal, as large as the position features beside it: the layer norm is over both
            self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.positions = PositionFeatures(grid_shape, num_frequency_bands) if use_positions else None
        self.num_channels = input_dim if vocab_size is None else embedding_dim
        self.num_channels += self.positions.num_channels if use_positions else 0
        self.missing_length = math.prod(grid_shape) if grid_shape else 1  # tokens of a modality that is not there
        self.encoding = None

    def pad_channels(self, width: int) -> None:
        """Fill up to `width` channels with a learned encoding of the modality (as in the paper, audio and video)."""
        self.encoding = nn.Parameter(nn.init.trunc_normal_(torch.empty(width - self.num_channels), std=0.02))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, L, input_dim), mask bool (B, L) -> (B, L, C)."""
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)  # 0 * NaN is NaN: padding must go before the first product
        features = [x if self.embedding is None else self.embedding(x[..., 0].long())]  # (B, L, features)
        if self.positions is not None:
            features.append(self.positions(features[0]).expand(x.size(0), -1, -1))
        if self.encoding is not None:
            features.append(self.encoding.expand(*x.shape[:2], -1))
        return torch.cat(features, -1) if len(features) > 1 else features[0]

    def check(self, x: Tensor, name: str) -> None:
        """Raise ValueError if x is no batch of these tokens."""
        if x.dim() != 3 or x.size(2) != self.input_dim or not x.size(1):
            shape = tuple(x.shape)
            raise ValueError(f"{name} has shape {shape}, but the model takes (batch, tokens, {self.input_dim})")
        if self.grid_shape and x.size(1) != math.prod(self.grid_shape):
            rows, cols = self.grid_shape
            raise ValueError(f"{name} has {x.size(1)} tokens, but grid_shape {rows} x {cols} needs {rows * cols}")
