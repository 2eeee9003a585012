"""Items and the batches made of them: tokens, padding, masks, targets, their order, and the shares of processes.

An item of a data set is {'input': (L, C), 'label': ...} with an optional 'mask': (L,); every loader yields

    {'input': float32 (B, L, C), 'mask': bool (B, L), 'label': ...}

with B samples, L tokens (of the longest sample) and C channels. The mask is True at real tokens and False at padding,
which is zero. With several modalities, 'input' and 'mask' are dicts by modality, in items and in batches; an item
leaves out a modality that it lacks. What a label is and how labels are stacked is up to the task (tasks.py): int64 (B,)
for classes. Any `torch.utils.data.Dataset` of such items can be used:

    loader = create_dataloader(my_dataset, batch_size=32, shuffle=True, num_classes=10)
"""

import math
import multiprocessing
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from config import choose_workers
from messages import UserError, naming

Batch = dict[str, Any]
Item = dict[str, Any]
Device = str | torch.device


def random_stream(purpose: str, *key: int) -> np.random.Generator:
    """Random numbers that depend only on the purpose and the key (whole numbers >= 0)."""
    return np.random.default_rng((zlib.crc32(purpose.encode()), *key))


# --- Targets ---------------------------------------------------------------------------------------------------------


UNLABELLED = -100  # the target of a token that is not asked for; torch's cross_entropy leaves it out, too


class Targets(Protocol):
    """What a loader must know about the labels of its items; every task is one (tasks.py)."""

    per_token: bool  # whether a target has a value for each token of its item, and is cut and hidden with them

    def target(self, label: Any, where: str) -> Any:
        """The label of an item as the loss needs it.

        Raises:
            UserError: the label is impossible; the message begins with `where`.
        """

    def stack(self, targets: Sequence[Any]) -> Tensor:
        """The targets of a batch."""

    def check(self, targets: Sequence[Any], for_training: bool) -> None:
        """Check all targets of a data set.

        Raises:
            UserError: names the first sample with an impossible target, or says why nothing could be learnt.
        """


class ClassTargets:
    """One class for each item, a whole number from 0 to num_classes - 1.

    Args:
        num_classes: None for as many as occur.
    """

    per_token = False

    def __init__(self, num_classes: int | None = None):
        self.num_classes = num_classes

    def target(self, label: Any, where: str) -> int:
        if isinstance(label, np.integer):
            return int(label)
        value = np.asarray(label)
        with np.errstate(invalid="ignore"):  # NaN, infinity and numbers too large for int64 change when converted
            whole = value.ndim == 0 and value.dtype.kind in "biuf" and value.astype(np.int64) == value
        if not whole:
            raise UserError(f"{where}: label {label!r} is not a whole number; number the classes 0, 1, 2, ...")
        return int(value)

    def stack(self, targets: Sequence[int]) -> Tensor:
        """int64 (B,)"""
        return torch.as_tensor(np.asarray(targets, np.int64))

    def check(self, targets: Sequence[int], for_training: bool) -> None:
        labels = np.asarray(targets)
        classes = self.num_classes or max(2, labels.max() + 1)
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if wrong.size:
            from_one = labels.min() == 1 and labels.max() == classes
            hint = "they seem to count from 1, subtract 1" if from_one else "correct it, or the number of classes"
            raise UserError(f"sample {wrong[0]}: label {labels[wrong[0]]} is not in 0..{classes - 1}; {hint}")
        if for_training and len(labels) < (self.num_classes or 0):
            raise UserError(f"{len(labels)} training samples are fewer than the {classes} classes; add samples")
        if for_training and (labels == labels[0]).all():
            raise UserError(f"all training samples have label {labels[0]}; give at least two classes")


# --- Items and batches -----------------------------------------------------------------------------------------------


def as_numbers(item: Any, what: str, dtype: type = np.float64) -> np.ndarray:
    """The item as a writable array of its own; NaN where a masked array or a pandas table has no value.

    Raises:
        UserError: it is no array of numbers.
    """
    if type(item) is np.ndarray and item.dtype == dtype and item.flags.carray:  # as most are
        return item
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
        with np.errstate(over="ignore"):  # too large for float32 becomes infinity, which every adapter refuses
            return np.require(array, dtype, ["C", "W"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the {what} is not an array of numbers: {error}".splitlines()[0]) from error


def _to_mask(value: Any, length: int, where: str) -> Tensor:
    if value is None:
        return torch.ones(length, dtype=torch.bool)
    mask = torch.as_tensor(value)
    if mask.shape != (length,):
        raise UserError(f"{where}: the mask has shape {tuple(mask.shape)}, it must be ({length},), one value per token")
    real = mask.bool()
    if not torch.equal(real.double(), mask.double()):
        raise UserError(f"{where}: the mask holds other values than 1 (real token) and 0 (padding)")
    return real


def _to_tokens(tokens: Any, mask: Any, where: str, max_seq_len: int | None) -> tuple[Tensor, Tensor]:
    """(input float32 (L, C), zero where hidden; mask bool (L,)) of one modality."""
    plain = type(tokens) is Tensor and tokens.dtype == torch.float32 and tokens.layout == torch.strided
    if not plain or not tokens.is_cpu or tokens.requires_grad:
        with naming(where):
            tokens = torch.from_numpy(as_numbers(tokens, "input", np.float32))
    shape = tuple(tokens.shape)
    if len(shape) != 2 or not shape[1]:
        raise UserError(f"{where}: the input has shape {shape}, it must be (tokens, channels)")
    real = _to_mask(mask, len(tokens), where)
    tokens, real = tokens[:max_seq_len], real[:max_seq_len]
    if mask is not None:
        tokens = tokens.masked_fill(~real[:, None], 0)
    return tokens, real


def _is_finite(values: Tensor) -> bool:
    if not values.numel():
        return True
    lowest, highest = values.aminmax()  # both NaN if any value is
    return -math.inf < lowest.item() <= highest.item() < math.inf


Sample = tuple[dict[str, tuple[Tensor, Tensor]], Any]
ONLY = "input"  # the key of the modality where there is only one


def to_sample(
    item: Item, where: str, max_seq_len: int | None = None, targets: Targets | None = None, check_values: bool = True
) -> Sample:
    """A checked item: ({modality: (input float32 (L, C), mask bool (L,))}, target or None).

    A modality without a real token counts as missing; at least one modality must have some. Without `check_values` the
    input may hold NaN and infinity.

    Raises:
        UserError: the item cannot be used; the message begins with `where`.
    """
    if not isinstance(item, dict) or "input" not in item:
        found = list(item) if isinstance(item, dict) else f"a {type(item).__name__}"
        raise UserError(f"{where}: an item must be a dict with 'input' and 'label', this is {found}")
    inputs, masks = item["input"], item.get("mask")
    if not isinstance(inputs, dict):
        inputs, masks = {ONLY: inputs}, {ONLY: masks}
    elif masks is not None and not isinstance(masks, dict):
        raise UserError(f"{where}: the input is a dict of modalities, so the mask must be one too")
    parts = {}
    for name, tokens in inputs.items():
        part = where if name == ONLY else f"{where}, {name}"
        given = (masks or {}).get(name)
        tokens, mask = _to_tokens(tokens, given, part, max_seq_len)
        if check_values and not _is_finite(tokens):
            raise UserError(f"{part}: the input holds NaN or infinity; replace it, or hide those tokens with a mask")
        if len(tokens) and (given is None or mask.any()):
            parts[name] = tokens, mask
    if not parts:
        shapes = ", ".join(str(tuple(np.shape(tokens))) for tokens in inputs.values())
        raise UserError(f"{where}: empty, no real token (input {shapes}); remove the sample")
    targets = targets or ClassTargets()
    target = targets.target(item["label"], where) if "label" in item else None
    if target is not None and targets.per_token:
        target = for_tokens(target, inputs, parts, where)
    return parts, target


def for_tokens(
    target: np.ndarray, inputs: dict[str, Any], parts: dict[str, tuple[Tensor, Tensor]], where: str
) -> np.ndarray:
    """The targets (L,) of the tokens that are left of an item, UNLABELLED at those that a mask hides."""
    if len(inputs) > 1:
        raise UserError(f"{where}: a label for each token is for one modality, not for {', '.join(inputs)}")
    ((name, given),) = inputs.items()
    if len(target) != len(given):
        raise UserError(f"{where}: {len(target)} labels of {len(given)} tokens; give one for each")
    tokens, real = parts[name]
    return np.where(real.numpy(), target[: len(tokens)], UNLABELLED)


def collate(
    items: Sequence[Item] | Batch, max_seq_len: int | None = None, targets: Targets | None = None
) -> Batch:
    """The batch of a list of items. Sequences longer than max_seq_len are cut.

    A batch that the data set assembled itself (`__getitems__`) is passed on. Items without a label give a batch without
    one. Tokens hidden by an item's mask become zeros, like padding. A modality that no item has is not in the batch.

    Raises:
        UserError: an item cannot be used.
    """
    if isinstance(items, dict):
        return items
    targets = targets or ClassTargets()
    places = [f"item {i} of the batch" for i in range(len(items))]
    pairs = list(zip(items, places, strict=True))
    samples = [to_sample(item, place, max_seq_len, targets, check_values=False) for item, place in pairs]
    inputs, masks = {}, {}
    for name in dict.fromkeys(name for parts, _ in samples for name in parts):
        widths = {parts[name][0].size(1) for parts, _ in samples if name in parts}
        if len(widths) > 1:
            raise UserError(f"the batch mixes sequences of {sorted(widths)} channels; all must have the same number")
        missing = torch.zeros(0, *widths), torch.zeros(0, dtype=torch.bool)
        tokens, real = zip(*(parts.get(name, missing) for parts, _ in samples), strict=True)
        masks[name] = pad_sequence(real, batch_first=True)
        inputs[name] = pad_sequence(tokens, batch_first=True)
    if not all(map(_is_finite, inputs.values())):  # all at once, which is cheaper
        for item, place in pairs:
            to_sample(item, place, max_seq_len, targets)  # raises for the first one
    several = isinstance(items[0]["input"], dict)
    batch = {"input": inputs, "mask": masks} if several else {"input": inputs[ONLY], "mask": masks[ONLY]}
    labels = [label for _, label in samples]
    if all(label is not None for label in labels):
        batch["label"] = targets.stack(labels)
    return batch


def check_items(
    dataset: Dataset, max_seq_len: int | None = None, targets: Targets | None = None
) -> tuple[np.ndarray, list[Any]]:
    """Read every item once. Returns (lengths in tokens int64, targets).

    Raises:
        UserError: names the first bad sample.
    """
    targets = targets or ClassTargets()
    lengths, labels, widths = [], [], {}
    for number in range(len(dataset)):
        where = f"sample {number}"
        parts, label = to_sample(dataset[number], where, max_seq_len, targets)
        if label is None:
            raise UserError(f"{where}: it has no 'label'")
        for name, (tokens, _) in parts.items():
            width = widths.setdefault(name, tokens.size(1))
            if tokens.size(1) != width:
                raise UserError(
                    f"{where}: {tokens.size(1)} channels, the samples before it have {width}; make them equal"
                )
        lengths.append(sum(len(tokens) for tokens, _ in parts.values()))
        labels.append(label)
    return np.array(lengths, np.int64), labels


def model_inputs(batch: Batch, device: Device) -> tuple[Any, Any]:
    """Input and mask on the device, by modality if there are several. The mask is None if all tokens are real."""
    if isinstance(batch["input"], dict):
        names = batch["input"].keys()
        pairs = [model_inputs({key: batch[key][name] for key in ("input", "mask")}, device) for name in names]
        return tuple(dict(zip(names, values, strict=True)) for values in zip(*pairs, strict=True))
    mask = batch["mask"]
    x = batch["input"].to(device, non_blocking=True)
    return x, None if mask.all() else mask.to(device, non_blocking=True)


def mix_inputs(batch: Batch, device: Device) -> dict[str, Any]:
    """The argument `mix` of the model where the samples of the batch are to be mixed with others, see `Mixed`."""
    if "mix" not in batch:
        return {}
    return {"mix": (*model_inputs(batch["mix"], device), batch["mix"]["weight"].to(device, non_blocking=True))}


def inputs_for(model: nn.Module, batch: Batch, device: Device) -> tuple[Any, Any]:
    """`model_inputs` in the precision of the weights, except token numbers (bytes of text), which stay float32."""
    x, mask = model_inputs(batch, device)
    dtype = next((weights.dtype for weights in model.parameters()), torch.float32)
    if dtype == torch.float32:
        return x, mask
    measured = {name for name, tokens in model.modalities.items() if tokens.embedding is None}  # channels, not numbers
    if isinstance(x, dict):
        return {name: values.to(dtype) if name in measured else values for name, values in x.items()}, mask
    return x.to(dtype) if measured else x, mask


def asked(batch: Batch, device: Device) -> dict[str, Any]:
    """What a model is asked beside its input, on the device: the tokens that are hidden, see `HidingDataset`."""
    return {"hidden": moved(batch["hidden"], device)} if "hidden" in batch else {}


def mapped(function: Callable[[Tensor], Any], values: Any) -> Any:
    """The function's value of a tensor, or of each of a dict."""
    if isinstance(values, dict):
        return {name: function(part) for name, part in values.items()}
    return function(values)


def moved(values: Any, device: Device) -> Any:
    """A tensor, or a dict of them, on the device."""
    return mapped(lambda part: part.to(device, non_blocking=True), values)


def first_samples(values: Any, number: int) -> Any:
    """The first samples of a tensor, or of each of a dict."""
    return mapped(lambda part: part[:number], values)


def by_modality(values: Any, name: str) -> Any:
    """That of a modality; data of one have no dict of them."""
    return values[name] if isinstance(values, dict) else values


def hide(batch: Batch) -> None:
    """Let nothing of the batch count, not even in the statistics of a batch norm."""
    for part in (batch, batch.get("mix", {})):
        masks = part.get("mask", {})
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            mask.zero_()


def token_counts(batch: Batch) -> torch.Tensor:
    """Real tokens of each sample, (B,) int64, of all modalities together."""
    masks = batch["mask"].values() if isinstance(batch["mask"], dict) else [batch["mask"]]
    return sum(mask.sum(1) for mask in masks)


# --- Hidden tokens ---------------------------------------------------------------------------------------------------


def choose_hidden(length: int, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """The numbers of the tokens to hide, in order: of so many tokens this share, rounded, but at least 1 is hidden and
    1 is seen; none of a single token."""
    number = min(max(1, round(ratio * length)), length - 1)
    return np.sort(rng.permutation(length)[:number])


class HidingDataset(Dataset):
    """Batches of another data set in which some tokens of each sample are hidden, and their contents asked for.

    To the batch of the samples comes 'hidden', of each modality int64 (B, O), the numbers of these tokens, -1 where a
    sample has fewer; and its 'label' is what they hold, of each modality (B, O, ...), as `contents` says. The input is
    whole: the model leaves out what is hidden.

    Args:
        ratio: share of the tokens of each modality.
        contents: of each modality, what tokens (..., C) hold: float (..., W), NaN where it is not known; or int64.
        seed, split: with the sample's number and, in 'train', the epoch they decide what is hidden.
    """

    def __init__(
        self, dataset: Dataset, ratio: float, contents: dict[str, Callable[[Tensor], Tensor]], seed: int, split: str
    ):
        self.dataset, self.ratio, self.contents, self.seed, self.split = dataset, ratio, contents, seed, split
        self.lengths = getattr(dataset, "lengths", None)
        if self.lengths is None:
            self.lengths, _ = check_items(dataset)
        self.ids = getattr(dataset, "ids", np.arange(len(dataset)))
        self.epoch = 0

    @property
    def reads_files(self) -> bool:
        return getattr(self.dataset, "reads_files", False)

    def set_epoch(self, epoch: int) -> None:
        if self.split == "train":  # evaluation hides the same in every epoch
            self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def subset(self, numbers: np.ndarray) -> "HidingDataset":
        return HidingDataset(self.dataset.subset(numbers), self.ratio, self.contents, self.seed, self.split)

    def __getitem__(self, number: int) -> Item:
        """The whole item."""
        return self.dataset[number]

    def __getitems__(self, numbers: list[int]) -> Batch:
        if hasattr(self.dataset, "__getitems__"):
            batch = self.dataset.__getitems__(numbers)
        else:
            batch = collate([self.dataset[number] for number in numbers])
        inputs, masks = batch["input"], batch["mask"]
        if not isinstance(inputs, dict):
            (name,) = self.contents
            inputs, masks = {name: inputs}, {name: masks}
        streams = [random_stream(f"hidden {self.split}", self.seed, self.epoch, number) for number in numbers]
        hidden, labels = {}, {}
        for name in (name for name in self.contents if name in inputs):  # in this order, for they share the streams
            chosen = []
            for real, rng in zip(masks[name], streams, strict=True):
                (there,) = torch.nonzero(real, as_tuple=True)
                chosen.append(there[choose_hidden(len(there), self.ratio, rng)])
            hidden[name] = pad_sequence(chosen, batch_first=True, padding_value=-1)  # (B, O)
            index = hidden[name].clamp(min=0)[..., None].expand(-1, -1, inputs[name].size(2))
            content = self.contents[name](inputs[name].gather(1, index))  # (B, O[, W])
            nothing = torch.nan if content.is_floating_point() else UNLABELLED
            content[hidden[name] < 0] = nothing
            labels[name] = content
        return batch | {"hidden": hidden, "label": labels}


class Mixed(Dataset):
    """A data set whose samples are to be mixed with others of it, each with one that is drawn anew in each epoch.

    Its batches have beside their own samples the others, in 'mix': 'input', 'mask' and 'label' of their own, and
    'weight' float32 (B,), the share of the sample itself, from 0.5 to 1. The model mixes, since it has the embeddings.

    With `cutmix` (Yun et al. 2019) a rectangle of the other image takes the place of that of the sample; 'weight' is
    what is left of the sample, and both inputs are this image, so that to mix them changes nothing. Of mixup and CutMix
    each sample has one, by chance.

    Args:
        alpha: of the Beta distribution that the shares come from; the larger, the more even; 0 for no mixup.
        seed: of the draws, which depend on it, the epoch and the sample's number alone.
        targets: what labels are.
        cutmix: the alpha of CutMix, for data with `pixels`, see adapters.ImageDataset; 0 for none.
    """

    def __init__(self, dataset: Dataset, alpha: float, seed: int, targets: Targets, cutmix: float = 0.0):
        self.dataset, self.alpha, self.seed, self.targets, self.cutmix = dataset, alpha, seed, targets, cutmix
        if hasattr(dataset, "lengths"):  # it is not to be read for a check, see `create_dataloader`
            self.lengths, self.labels = dataset.lengths, getattr(dataset, "labels", None)
        self.set_epoch(0)

    @property
    def reads_files(self) -> bool:
        return getattr(self.dataset, "reads_files", False)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Item:
        return self.dataset[number]

    def __getitems__(self, numbers: list[int]) -> Batch:
        streams = [random_stream("mixup", self.seed, self.epoch, number) for number in numbers]
        others = [int(rng.integers(len(self))) for rng in streams]
        shares = np.array([rng.beta(self.alpha, self.alpha) if self.alpha else 1.0 for rng in streams])
        weight = torch.from_numpy(np.maximum(shares, 1 - shares)).float()
        if not self.cutmix:
            return self._batch(numbers) | {"mix": self._batch(others) | {"weight": weight}}
        images, pasted = self.dataset.pixels(numbers), self.dataset.pixels(others)
        for i, rng in enumerate(streams):
            if self.alpha and rng.random() < 0.5:
                continue
            rows, columns = rectangle(rng, self.cutmix, *images.shape[1:3])
            images[i, rows, columns] = pasted[i, rows, columns]
            pasted[i] = images[i]
            weight[i] = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / math.prod(images.shape[1:3])
        mixed = self.dataset.__getitems__(others, pasted) | {"weight": weight}
        return self.dataset.__getitems__(numbers, images) | {"mix": mixed}

    def _batch(self, numbers: list[int]) -> Batch:
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(numbers)
        return collate([self.dataset[number] for number in numbers], targets=self.targets)


def rectangle(rng: np.random.Generator, alpha: float, height: int, width: int) -> tuple[slice, slice]:
    """(rows, columns) of CutMix: its area is a share from Beta(alpha, alpha), at most half of the image, and its middle
    is anywhere, so that the edge may cut it."""
    share = rng.beta(alpha, alpha)
    side = math.sqrt(min(share, 1 - share))
    (y, x), (h, w) = rng.random(2) * (height, width), (side * height, side * width)
    top, bottom, left, right = (round(edge) for edge in (y - h / 2, y + h / 2, x - w / 2, x + w / 2))
    return slice(max(0, top), min(height, bottom)), slice(max(0, left), min(width, right))


# --- Shares of processes ---------------------------------------------------------------------------------------------


def share_of(batch: list[int], rank: int, size: int) -> list[int]:
    """The samples of a batch that process `rank` of `size` computes: disjoint parts, whose sizes differ by at most one.
    """
    return batch[rank::size]


def loaded_of(batch: list[int], rank: int, size: int) -> list[int]:
    """The samples that this process loads: its share, or, if a short batch leaves it none, the first sample of the
    batch as a dummy that does not count, so that all processes make the same steps."""
    return share_of(batch, rank, size) or batch[:1]


def unshared(parts: Sequence[dict[str, np.ndarray]], batches: Sequence[list[int]]) -> dict[str, np.ndarray]:
    """The results that the processes computed for their shares of `batches`, in the order of the sample numbers.

    parts: for each process, arrays with a row for each sample that it loaded. Rows of dummies are dropped.

    Example: with 3 processes and batches [0, 1, 2], [3], the processes load 0, 3 and 1, 3 and 2, 3. Of the three rows
    for sample 3, the first is kept. It is never a dummy's, since process 0 computes the first sample of every batch.
    """
    ranks, size = range(len(parts)), len(parts)
    loaded = [number for rank in ranks for batch in batches for number in loaded_of(batch, rank, size)]
    _, rows = np.unique(loaded, return_index=True)  # the first row of each number
    return {name: np.concatenate([part[name] for part in parts])[rows] for name in parts[0]}


# --- Loaders ---------------------------------------------------------------------------------------------------------


def check_batch_size(batch_size: Any) -> None:
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be a whole number of at least 1")


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of sample numbers, in an order that depends only on (seed, epoch).

    Args:
        shuffle: a new random order each epoch; without it, the order of the data set.
        lengths: tokens per sample. If given, batches hold samples of similar length: within every POOL batches of the
            epoch's order the samples are sorted by length, and the batches are shuffled.
        share: (rank, size) of one of several processes: yield only the part of each batch that it loads, see
            `loaded_of`. All processes make the same number of steps.
    """

    POOL = 50

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        share: tuple[int, int] = (0, 1),
    ):
        if num_samples < 1:
            raise UserError("the data set is empty; it must hold at least one sample")
        check_batch_size(batch_size)
        if lengths is not None and len(lengths) != num_samples:
            raise UserError(f"{len(lengths)} lengths for {num_samples} samples; give one per sample")
        self.num_samples, self.batch_size, self.shuffle, self.seed = num_samples, batch_size, shuffle, seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.share = share
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Make the next pass that of `epoch`, without its first `first_batch` batches."""
        if not 0 <= first_batch <= len(self):
            raise ValueError(f"first_batch {first_batch} is not in 0..{len(self)}, the batches of an epoch")
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return math.ceil(self.num_samples / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.batches(self.epoch)[self.first_batch :]
        return iter([loaded_of(batch, *self.share) for batch in batches])

    def batches(self, epoch: int) -> list[list[int]]:
        """The sample numbers of every batch of an epoch, for all processes together."""
        rng = random_stream("order", self.seed, epoch)
        order = rng.permutation(self.num_samples) if self.shuffle else np.arange(self.num_samples)
        if self.lengths is not None:
            pool = np.arange(self.num_samples) // (self.POOL * self.batch_size)
            order = order[np.lexsort((self.lengths[order], pool))]
        batches = [order[i : i + self.batch_size].tolist() for i in range(0, self.num_samples, self.batch_size)]
        if self.lengths is not None and self.shuffle:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches


class EpochDataLoader(DataLoader):
    """A DataLoader over an `EpochBatchSampler`: every pass is the next epoch.

    spare_workers: whether a pass over data of which no file is left to read does without the workers.

    The data set is told which epoch begins (its `set_epoch`, if it has one). Worker processes are started for each
    pass, so they never hold an older epoch. Iterating draws nothing from torch's global generator, and the random
    numbers of a worker depend only on (seed, epoch, worker). For a CUDA device without workers, a thread makes the next
    batch while the device computes.
    """

    spare_workers = False

    def __iter__(self) -> Iterator[Batch]:
        sampler = self.batch_sampler
        if self.spare_workers and not self.dataset.reads_files:
            self.num_workers = 0
        self.generator.manual_seed(int(random_stream("workers", sampler.seed, sampler.epoch).integers(2**63)))
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(sampler.epoch)
        batches = super().__iter__()
        sampler.set_epoch(sampler.epoch + 1)
        if self.num_workers:
            return _with_plain_errors(batches)
        by_thread = self.pin_memory and torch.cuda.is_available()
        return _one_ahead(batches) if by_thread else batches


def follow_parent(worker: int) -> None:
    """In a loader's worker: end as soon as the process that started it is gone, whatever ended it.

    torch's own watch looks between two batches whether the parent changed, so it misses one that was killed while the
    worker began, and such a worker would wait for batches for ever.
    """

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()


def _one_ahead(iterator: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches. While one is used, a thread makes and pins the next."""
    device = torch.cuda.current_device()  # a new thread starts with device 0
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,)) as thread:
        coming = thread.submit(next, iterator, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, iterator, None)
            yield batch


def _with_plain_errors(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, made by workers. A UserError gets its own message back, which torch buries in the worker's
    traceback. A worker that dies while handing over a batch is reported as dead, as at any other moment."""
    try:
        yield from batches
    except UserError as error:
        name = f"{UserError.__module__}.{UserError.__qualname__}: "
        raise UserError(str(error).rpartition(name)[2].strip()) from None
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        if str(error).startswith("Caught "):  # by torch, in the data set
            raise
        raise RuntimeError("DataLoader worker (pid unknown) exited unexpectedly") from error


def set_epoch(loader: DataLoader, epoch: int, first_batch: int = 0) -> None:
    """Make the loader's next pass that of `epoch` (order and augmentation), starting with batch `first_batch`.

    The batches before it are not read. Without this call, every pass is the next epoch.
    """
    loader.batch_sampler.set_epoch(epoch, first_batch)


def create_dataloader(
    dataset: Dataset,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    num_workers: int | None = 0,
    num_classes: int | None = None,
    max_seq_len: int | None = None,
    bucket_by_length: bool = False,
    pin_memory: bool = False,
    share: tuple[int, int] = (0, 1),
    targets: Targets | None = None,
) -> DataLoader:
    """A loader of the batches described above; the last one may be short. The batches are the same for any num_workers.

    Every item is read and checked once, here. A data set with an attribute `lengths` (tokens per sample, or None if
    they are not known) is trusted and not read, which is for data too large to be read twice; its items are checked
    when their batch is made.

    Args:
        shuffle: for training: a new order each epoch; data from which nothing can be learnt are refused.
        seed: of the order.
        num_workers: processes that load data, at most one of what is read in order (an iterable); None for as many as
            config.choose_workers says.
        num_classes: labels must be in 0..num_classes-1.
        targets: a task (tasks.py), if the labels are not classes.
        max_seq_len: longer sequences are cut to this many tokens.
        bucket_by_length: batches of samples of similar length, see `EpochBatchSampler`.
        pin_memory: for fast copies to a CUDA device.
        share: (rank, size) of one of several processes that share each batch, see `EpochBatchSampler`.

    A data set that uses random numbers should derive them from (seed, epoch, sample number). If it has a method
    `set_epoch(epoch)`, it is called before each pass.

    Raises:
        UserError: names the sample, what is wrong with it and the remedy.
    """
    if max_seq_len is not None and max_seq_len < 1:
        raise UserError(f"max_seq_len is {max_seq_len}; it must be at least 1, or None for no limit")
    targets = targets or ClassTargets(num_classes)
    if hasattr(dataset, "lengths"):
        lengths, labels = dataset.lengths, getattr(dataset, "labels", None)
        lengths = lengths if lengths is None else np.minimum(lengths, max_seq_len or np.inf)
    else:
        lengths, labels = check_items(dataset, max_seq_len, targets)
    if bucket_by_length and lengths is None:
        raise UserError("bucket_by_length needs the lengths of the samples; give the data set an attribute `lengths`")
    in_order = getattr(dataset, "in_order", False)  # a stream
    mixed = shuffle and not in_order
    sampler = EpochBatchSampler(len(dataset), batch_size, mixed, seed, lengths if bucket_by_length else None, share)
    if labels is not None:
        targets.check(labels, for_training=shuffle)
    reads_files = getattr(dataset, "reads_files", False)
    workers = choose_workers(num_workers, reads_files)
    if in_order:  # each worker would read all of it, and webdataset and others give each of several a part
        workers = min(workers, 1)
    loader = EpochDataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=partial(collate, max_seq_len=max_seq_len, targets=targets),
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=follow_parent,
    )
    loader.spare_workers = num_workers is None and reads_files
    return loader
