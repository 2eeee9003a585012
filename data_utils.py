"""Data: data sets of tokens, the batches made of them and the splits.

An item of a data set is {'input': (L, C), 'label': int} with an optional 'mask': (L,); every loader yields

    {'input': float32 (B, L, C), 'mask': bool (B, L), 'label': int64 (B,)}

with B samples, L tokens (of the longest sample) and C channels. The mask is True at real tokens and False at padding,
which is zero. With several modalities, 'input' and 'mask' are dicts of these by modality, in items and in batches; an
item leaves out a modality that it lacks. Any `torch.utils.data.Dataset` of such items can be used:

    loader = create_dataloader(my_dataset, batch_size=32, shuffle=True, num_classes=10)

To add a data set by name, write a function like `load_digits_splits`, enter it in `DATASETS` and give it its defaults
in config.DATASET_DEFAULTS.
"""

import hashlib
import math
import os
import re
import shutil
import unicodedata
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.client import HTTPException
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from adapters import (
    Adapter,
    ImageAdapter,
    SeriesAdapter,
    TensorAdapter,
    TextAdapter,
    as_numbers,
    check_patch_size,
    describe,
    from_description,
    naming,
    square_pixels,
)
from config import FIELDS, OWN_DATA, Settings, UserError, as_utf8, check_memory, printable
from data_files import Items, read_manifest, read_series, read_texts, without_effect
from image_files import PURPOSES, depth, find_splits, read_images
from labels import ClassNumbers, class_order, read_labels, slips
from series_files import read_named_series, read_one_series
from tables import FileFinder, listed

Batch = dict[str, Any]
Item = dict[str, Any]


def random_stream(purpose: str, *key: int) -> np.random.Generator:
    """Random numbers that depend on the purpose and the key (whole numbers >= 0) alone."""
    return np.random.default_rng((zlib.crc32(purpose.encode()), *key))


# -- items and batches ----------------------------------------------------------------------------------------


def _to_label(value: Any, where: str) -> int:
    label = np.asarray(value)
    with np.errstate(invalid="ignore"):  # NaN, infinity and what int64 cannot hold come out different
        whole = label.ndim == 0 and label.dtype.kind in "biuf" and label.astype(np.int64) == label
    if not whole:
        raise UserError(f"{where}: label {value!r} is not a whole number; number the classes 0, 1, 2, ...")
    return int(label)


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
    with naming(where):
        tokens = torch.from_numpy(as_numbers(tokens, "input", np.float32))
    shape = tuple(tokens.shape)
    if len(shape) != 2 or not shape[1]:
        raise UserError(f"{where}: the input has shape {shape}, it must be (tokens, channels)")
    real = _to_mask(mask, len(tokens), where)
    tokens, real = tokens[:max_seq_len], real[:max_seq_len]
    if mask is not None:
        tokens = tokens.masked_fill(~real[:, None], 0)
    if tokens.numel():
        lowest, highest = tokens.aminmax()  # NaN if one is
        if not -math.inf < lowest <= highest < math.inf:
            raise UserError(f"{where}: the input holds NaN or infinity; replace it, or hide those tokens with a mask")
    return tokens, real


Sample = tuple[dict[str, tuple[Tensor, Tensor]], int | None]
ONLY = "input"  # what errors and samples call the modality of data that have just one


def to_sample(item: Item, where: str, max_seq_len: int | None) -> Sample:
    """An item, checked: ({modality: (input float32 (L, C), mask bool (L,))}, label or None).

    `where` names it in an error. A modality without a real token counts as missing; one at least must have some.
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
        place = where if name == ONLY else f"{where}, {name}"
        tokens, mask = _to_tokens(tokens, (masks or {}).get(name), place, max_seq_len)
        if mask.any():
            parts[name] = tokens, mask
    if not parts:
        shapes = ", ".join(str(tuple(np.shape(tokens))) for tokens in inputs.values())
        raise UserError(f"{where}: empty, no real token (input {shapes}); remove the sample")
    return parts, _to_label(item["label"], where) if "label" in item else None


def collate(items: Sequence[Item] | Batch, max_seq_len: int | None = None) -> Batch:
    """The batch of a list of items; sequences longer than max_seq_len are cut to it.

    A batch that the data set assembled itself (`__getitems__`) is passed on. Items without a label give a batch without
    one. Tokens hidden by an item's mask become zeros, as padding is. A modality that no item has is not in the batch.
    Raises UserError for an item that cannot be used.
    """
    if isinstance(items, dict):
        return items
    samples = [to_sample(item, f"item {i} of the batch", max_seq_len) for i, item in enumerate(items)]
    inputs, masks = {}, {}
    for name in dict.fromkeys(name for parts, _ in samples for name in parts):
        widths = {parts[name][0].size(1) for parts, _ in samples if name in parts}
        if len(widths) > 1:
            raise UserError(f"the batch mixes sequences of {sorted(widths)} channels; all must have the same number")
        missing = torch.zeros(0, *widths), torch.zeros(0, dtype=torch.bool)
        tokens, real = zip(*(parts.get(name, missing) for parts, _ in samples), strict=True)
        masks[name] = pad_sequence(real, batch_first=True)
        inputs[name] = pad_sequence(tokens, batch_first=True)
    several = isinstance(items[0]["input"], dict)
    batch = {"input": inputs, "mask": masks} if several else {"input": inputs[ONLY], "mask": masks[ONLY]}
    labels = [label for _, label in samples]
    if labels != [None] * len(labels):
        batch["label"] = torch.tensor(labels)
    return batch


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raise UserError that names the first sample whose label is not in 0..num_classes-1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        from_one = labels.min() == 1 and labels.max() == num_classes
        hint = "they seem to count from 1, subtract 1" if from_one else "correct it, or the number of classes"
        raise UserError(f"sample {wrong[0]}: label {labels[wrong[0]]} is not in 0..{num_classes - 1}; {hint}")


def check_items(dataset: Dataset, max_seq_len: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read every item once. Returns (lengths in tokens, labels), int64; raises UserError that names a bad sample."""
    lengths, labels, widths = [], [], {}
    for number in range(len(dataset)):
        where = f"sample {number}"
        parts, label = to_sample(dataset[number], where, max_seq_len)
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
    return np.array(lengths, np.int64), np.array(labels, np.int64)


# -- loaders --------------------------------------------------------------------------------------------------


def share_of(batch: list[int], rank: int, size: int) -> list[int]:
    """What process `rank` of `size` computes of a batch: disjoint parts, equal in size within one sample."""
    return batch[rank::size]


def loaded_of(batch: list[int], rank: int, size: int) -> list[int]:
    """What that process loads: its share, or the first sample as a stand-in where a short batch leaves it none."""
    return share_of(batch, rank, size) or batch[:1]


def unshared(parts: Sequence[dict[str, np.ndarray]], batches: Sequence[list[int]]) -> dict[str, np.ndarray]:
    """Results of the shares that the processes computed of `batches`, in the order of the sample numbers.

    parts: for each process arrays with a row per sample that its loader gave. A stand-in's row is left out.
    """
    ranks, size = range(len(parts)), len(parts)
    loaded = [number for rank in ranks for batch in batches for number in loaded_of(batch, rank, size)]
    _, rows = np.unique(loaded, return_index=True)  # the first row of each number: a stand-in's own comes before it
    return {name: np.concatenate([part[name] for part in parts])[rows] for name in parts[0]}


def check_batch_size(batch_size: Any) -> None:
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be a whole number of at least 1")


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of sample numbers, in an order that depends on (seed, epoch) alone.

    Args:
        shuffle: a new random order each epoch; without it, the order of the data set.
        lengths: tokens per sample. If given, batches hold samples of similar length: within every POOL batches of the
            epoch's order the samples are sorted by length, and the batches are shuffled.
        share: (rank, size), to yield of each batch what one of several processes loads, see `loaded_of`; all of them
            make the same number of steps.
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
        """Yield the batches of `epoch` from now on, without its first `first_batch` ones."""
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
        """The sample numbers of every batch of an epoch, those of all processes."""
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

    The data set is told which epoch begins (its `set_epoch`, if it has one). Worker processes start anew with each
    pass, so they never hold an older epoch. Iterating takes nothing from torch's global random numbers, and those of
    the workers depend on (seed, epoch, worker) alone. Batches for a CUDA device that no worker makes are made by a
    thread, one ahead, while the device computes.
    """

    def __iter__(self) -> Iterator[Batch]:
        sampler = self.batch_sampler
        self.generator.manual_seed(int(random_stream("workers", sampler.seed, sampler.epoch).integers(2**63)))
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(sampler.epoch)
        batches = super().__iter__()
        sampler.set_epoch(sampler.epoch + 1)
        if self.num_workers:
            return _with_plain_errors(batches)
        by_thread = self.pin_memory and torch.cuda.is_available()
        return _one_ahead(batches) if by_thread else batches


def _one_ahead(iterator: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; while one is used, a thread makes and pins the next."""
    device = torch.cuda.current_device()  # a new thread starts with device 0
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,)) as thread:
        coming = thread.submit(next, iterator, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, iterator, None)
            yield batch


def _with_plain_errors(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, of workers. A UserError has its own message again, which torch hides in the traceback of the
    worker; and a worker that died while it handed over a batch is said to have died, as at any other moment."""
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
    """Let the loader's next pass be that of `epoch` (order and augmentation), from batch `first_batch` on.

    Nothing of the batches before is read. Without this call every pass is the next epoch.
    """
    loader.batch_sampler.set_epoch(epoch, first_batch)


def create_dataloader(
    dataset: Dataset,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    num_classes: int | None = None,
    max_seq_len: int | None = None,
    bucket_by_length: bool = False,
    pin_memory: bool = False,
    share: tuple[int, int] = (0, 1),
) -> DataLoader:
    """A loader of the batches described above; the last one may be short. Same batches for any num_workers.

    Every item is read and checked once, here. A data set with an attribute `lengths` (tokens per sample, or None if
    they are not known) is taken at its word and not read: for data too large to be read twice. Its items are then
    checked when their batch is made.

    Args:
        shuffle: for training: a new order each epoch, and data from which nothing can be learnt is refused.
        seed: of the order.
        num_classes: labels must be in 0..num_classes-1.
        max_seq_len: longer sequences are cut to this many tokens.
        bucket_by_length: batches of samples of similar length, see `EpochBatchSampler`.
        pin_memory: for fast copies to a CUDA device.
        share: (rank, size), for one of several processes that share each batch, see `EpochBatchSampler`.

    A data set that draws random numbers of its own should draw them from (seed, epoch, sample number); if it has a
    method `set_epoch(epoch)`, it is called before each pass.

    Raises UserError that names the sample, what is wrong with it and the remedy.
    """
    if max_seq_len is not None and max_seq_len < 1:
        raise UserError(f"max_seq_len is {max_seq_len}; it must be at least 1, or None for no limit")
    if hasattr(dataset, "lengths"):
        lengths, labels = dataset.lengths, getattr(dataset, "labels", None)
        lengths = lengths if lengths is None else np.minimum(lengths, max_seq_len or np.inf)
    else:
        lengths, labels = check_items(dataset, max_seq_len)
    if bucket_by_length and lengths is None:
        raise UserError("bucket_by_length needs the lengths of the samples; give the data set an attribute `lengths`")
    sampler = EpochBatchSampler(len(dataset), batch_size, shuffle, seed, lengths if bucket_by_length else None, share)
    if labels is not None:
        labels = np.asarray(labels)
        check_labels(labels, num_classes or max(2, labels.max() + 1))
        if shuffle and len(labels) < (num_classes or 0):
            raise UserError(f"{len(labels)} training samples are fewer than the {num_classes} classes; add samples")
        if shuffle and (labels == labels[0]).all():
            raise UserError(f"all {len(labels)} training samples have label {labels[0]}; give at least two classes")
    return EpochDataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=partial(collate, max_seq_len=max_seq_len),
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )


# -- splits ---------------------------------------------------------------------------------------------------

Splits = dict[str, Dataset]
Info = dict[str, Any]


def stratified_split(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(sample numbers kept, sample numbers held out), sorted.

    Of each class the fraction is held out, rounded, but at least one sample, and at least one is kept.
    """
    held_out = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held_out.extend(members[: min(max(1, round(fraction * len(members))), len(members) - 1)])
    if not held_out:
        raise UserError(f"{len(labels)} samples, one of each class, cannot be split; more of a class are needed")
    return np.setdiff1d(np.arange(len(labels)), held_out), np.sort(held_out)


def grouped_split(
    labels: np.ndarray, groups: Sequence[str], fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """As `stratified_split`, but the samples of a group are all kept or all held out.

    Of some random choices of groups the one whose shares of the classes are nearest to the fraction. Of each class that
    is in several groups, at least one is held out, and at least one is kept.
    """
    names, group = np.unique(groups, return_inverse=True)
    classes, label = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(names), len(classes)))
    np.add.at(counts, (group, label), 1)
    shares = counts / counts.sum(0)  # (groups, classes): how much of a class is in a group

    def distance(held: np.ndarray) -> float:
        return np.square(shares[held].sum(0) - fraction).sum()

    tries = max(1, min(100, 100_000 // len(names)))
    held = min((_hold_out(shares, fraction, rng.permutation(len(names))) for _ in range(tries)), key=distance)
    if not held.any():
        raise UserError(f"{len(names)} groups cannot be split; of a class at least two must have samples")
    return np.flatnonzero(~held[group]), np.flatnonzero(held[group])


def _hold_out(shares: np.ndarray, fraction: float, order: np.ndarray) -> np.ndarray:
    """Which groups to hold out, bool (groups,): in this order, those that bring the classes nearer to the fraction."""
    there = shares > 0
    held, left = np.zeros(len(shares), bool), there.sum(0)  # left: of each class, the groups that are kept
    missing = np.full(shares.shape[1], fraction)

    def hold_out(one: int) -> bool:
        if held[one] or (left[there[one]] == 1).any():
            return False
        held[one] = True
        left[there[one]] -= 1
        missing[:] -= shares[one]
        return True

    for one in order:
        if np.square(missing - shares[one]).sum() < np.square(missing).sum():
            hold_out(one)
    smallest = order[np.argsort(shares[order].sum(1), kind="stable")]
    for number in range(len(missing)):  # a class that has none held out gives the smallest group that can go
        if not there[held, number].any():
            any(hold_out(one) for one in smallest if there[one, number])
    return held


MODALITIES: dict[str, tuple[type, ...]] = {
    "image": (ImageAdapter,),
    "text": (TextAdapter,),
    "series": (SeriesAdapter, TensorAdapter),
}


def _known(info: Info | None, modality: str) -> Any:
    """The adapter of a description made in training; None without one."""
    if not info:
        return None
    if modality not in info["adapters"]:
        raise UserError(f"the model was trained on {', '.join(info['adapters'])}; these data are for {modality}")
    adapter = from_description(info["adapters"][modality], f"the checkpoint's adapter of {modality}")
    if not isinstance(adapter, MODALITIES[modality]):
        raise UserError(f"the checkpoint's adapter of {modality} is a {type(adapter).__name__}, made for other data")
    return adapter


def _describe(adapters: dict[str, Adapter], class_names: Sequence[str], notes: Sequence[str] = ()) -> Info:
    return {
        "class_names": list(class_names),
        "features": {name: adapter.features for name, adapter in adapters.items()},
        "adapters": {name: describe(adapter) for name, adapter in adapters.items()},
        "notes": list(notes),
    }


def _split_off_validation(labels: np.ndarray, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    return stratified_split(labels, settings.val_fraction, random_stream("validation", settings.seed))


# -- synthetic sequences --------------------------------------------------------------------------------------

# A pattern is a function of the phase in cycles, (L,) or (L, C), which grows along axis 0.
PATTERNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sine": lambda u: np.sin(2 * np.pi * u),
    "square": lambda u: np.where(u % 1 < 0.5, 1.0, -1.0),
    "sawtooth": lambda u: 2 * (u % 1) - 1,
    "chirp": lambda u: np.sin(np.pi * (u % 2) ** 2),
    "bursts": lambda u: np.exp(-((u % 2 - 1) ** 2) * 30) * np.sin(4 * np.pi * u),
    "trend": lambda u: u * 3 / (np.ptp(u) or 1) + np.sin(2 * np.pi * u),
}
LAG = 6.0  # tokens between a pattern's arrival at the first and at the last channel


def _ids(ids: Sequence[str] | None, count: int) -> np.ndarray:
    """The names of a data set's samples; without, their numbers."""
    return np.array([str(number) for number in range(count)] if ids is None else ids, object)


class SequenceDataset(Dataset):
    """Sequences in memory: `sequences` holds arrays (L, C), `labels` a class number for each, `ids` a name."""

    def __init__(self, sequences: Sequence[np.ndarray], labels: Sequence[int], ids: Sequence[str] | None = None):
        self.sequences, self.labels, self.ids = sequences, np.asarray(labels), _ids(ids, len(sequences))

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, number: int) -> Item:
        return {"input": self.sequences[number], "label": self.labels[number]}

    def subset(self, numbers: np.ndarray) -> "SequenceDataset":
        return SequenceDataset([self.sequences[i] for i in numbers], self.labels[numbers], self.ids[numbers])


def make_synthetic(settings: Settings, split: str, num_samples: int) -> SequenceDataset:
    """Sequences in which the class is a temporal pattern, each a function of (seed, split, number) alone.

    Class c is a pattern of `PATTERNS` at a rate of its own (0.03 to 0.25 cycles per token). It passes the channels one
    after another, within LAG tokens; phase, amplitude, gains of the channels, offsets, noise and length are random.
    Every channel of the pattern is scaled to mean 0 and variance 1 over the sequence, so that neither these nor the
    length tell the class.
    """
    shortest, longest = settings.seq_len_range
    tokens = num_samples * (shortest + longest) / 2 + 16 * longest  # those kept, and the float64s while one is made
    check_memory(
        4 * settings.feature_dim * tokens,
        f"{num_samples:,} sequences of {shortest:,} to {longest:,} tokens of {settings.feature_dim:,} features",
    )
    sequences = [_synthetic_sequence(settings, split, number) for number in range(num_samples)]
    return SequenceDataset(sequences, np.arange(num_samples) % settings.num_classes)


def _synthetic_sequence(settings: Settings, split: str, number: int) -> np.ndarray:
    rng = random_stream(f"synthetic {split}", settings.seed, number)
    label, channels = number % settings.num_classes, settings.feature_dim
    pattern = list(PATTERNS.values())[label % len(PATTERNS)]
    rate = 0.03 * (0.25 / 0.03) ** ((label + 0.5) * 0.618 % 1) * rng.uniform(0.95, 1.05)  # golden ratio: spread evenly
    length = rng.integers(*settings.seq_len_range, endpoint=True)
    time = np.arange(length)[:, None] - np.linspace(0, LAG, channels)  # (L, C) tokens
    wave = pattern(rate * time + rng.uniform(0, 8))
    wave = (wave - wave.mean(0)) / np.maximum(wave.std(0), 1e-6)
    gains = rng.uniform(0.5, 1.5) * rng.uniform(0, 2, channels)
    noise = rng.uniform(0.5, 1.5) * rng.standard_normal((length, channels))
    return (gains * wave + noise + rng.normal(0, 0.3, channels)).astype(np.float32)


def load_synthetic_splits(settings: Settings, info: Info | None = None) -> tuple[Splits, Info]:
    """Validation comes out of num_samples sequences; a fifth as many more are the test set."""
    data = make_synthetic(settings, "train", settings.num_samples)
    test = make_synthetic(settings, "test", math.ceil(settings.num_samples / 5))
    train, val = _split_off_validation(data.labels, settings)
    rounds = range(math.ceil(settings.num_classes / len(PATTERNS)))
    names = [name + (f" {i + 1}" if i else "") for i in rounds for name in PATTERNS][: settings.num_classes]
    adapter = _known(info, "series") or TensorAdapter(settings.feature_dim, settings.max_seq_len)
    splits = {"train": data.subset(train), "val": data.subset(val), "test": test}
    for split in splits.values():
        split.sequences = [adapter(sequence) for sequence in split.sequences]
    return splits, _describe({"series": adapter}, names)


def create_synthetic_sequence_dataloader(
    batch_size: int = 32,
    num_samples: int = 1000,
    seq_len_range: tuple[int, int] = (50, 200),
    feature_dim: int = 64,
    num_classes: int = 5,
    seed: int = 0,
    shuffle: bool = True,
    num_workers: int = 0,
) -> DataLoader:
    """A loader of num_samples synthetic sequences of seq_len_range tokens, see `make_synthetic`."""
    settings = Settings(
        batch_size=batch_size,
        num_samples=num_samples,
        seq_len_range=seq_len_range,
        feature_dim=feature_dim,
        num_classes=num_classes,
        seed=seed,
    )
    data = make_synthetic(settings, "train", num_samples)
    return create_dataloader(data, batch_size, shuffle, seed, num_workers, num_classes)


# -- images ---------------------------------------------------------------------------------------------------


def shift_and_flip(images: np.ndarray, offsets: np.ndarray, flips: np.ndarray, margin: int) -> np.ndarray:
    """Images uint8 (B, H, W, C), mirrored where `flips` (B,) is true and moved over a black ground.

    offsets: (B, 2), 0..2*margin, row and column of the crop in the image padded by `margin`; (margin, margin) moves
    nothing.
    """
    num, height, width, channels = images.shape
    pixel = np.dtype((np.void, channels))  # the channels of a pixel, moved as a whole
    padded = np.zeros((num, height + 2 * margin, width + 2 * margin), pixel)
    images[flips] = torch.from_numpy(images[flips]).flip(2).numpy()
    padded[:, margin : margin + height, margin : margin + width] = images.view(pixel)[..., 0]
    shape = (num, 2 * margin + 1, 2 * margin + 1, height, width)  # every crop, as a view
    windows = np.ndarray(shape, pixel, padded, strides=padded.strides + padded.strides[1:])
    return windows[np.arange(num), *offsets.T].view(np.uint8).reshape(images.shape)


class ImageDataset(Dataset):
    """Images kept as bytes; a batch of them is augmented and cut into patches as a whole.

    Args:
        images: uint8 (N, H, W, C).
        labels: N class numbers.
        adapter: makes the tokens.
        margin: training images are moved by up to so many pixels (0: not).
        flip: half of the training images are mirrored.
        seed: of margin and flip, which are drawn for each epoch.
        ids: names of the samples; without, their numbers.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        adapter: ImageAdapter,
        margin: int = 0,
        flip: bool = False,
        seed: int = 0,
        ids: Sequence[str] | None = None,
    ):
        self.images = np.ascontiguousarray(images)
        self.labels = np.array([_to_label(label, f"sample {i}") for i, label in enumerate(labels)])
        self.adapter, self.margin, self.flip, self.seed = adapter, margin, flip, seed
        self.ids = _ids(ids, len(images))
        self.lengths = np.full(len(images), math.prod(adapter.grid_shape))
        self.set_epoch(0)

    @property
    def augmentation(self) -> str:
        """What is done to the images, in words, for the first lines of a run."""
        if not (self.margin or self.flip):
            return "neither moved nor mirrored"
        moved = f"moved by up to {self.margin} pixel{'s' * (self.margin > 1)}" if self.margin else "not moved"
        return f"{moved}, {'half of them mirrored (--no_flip)' if self.flip else 'not mirrored (--flip)'}"

    def set_epoch(self, epoch: int) -> None:
        rng = random_stream("augmentation", self.seed, epoch)
        self.offsets = rng.integers(0, 2 * self.margin, (len(self), 2), endpoint=True)
        self.flips = (rng.random(len(self)) < 0.5) & self.flip

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, numbers: list[int]) -> Batch:
        numbers = np.array(numbers)
        images = self.images[numbers]
        if self.margin or self.flip:
            images = shift_and_flip(images, self.offsets[numbers], self.flips[numbers], self.margin)
        tokens = self.adapter.tokens(images)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
        return {"input": tokens, "mask": mask, "label": torch.from_numpy(self.labels[numbers])}

    def __getitem__(self, number: int) -> Item:
        return {name: values[0] for name, values in self.__getitems__([number]).items()}


def _image_splits(
    images: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    ids: dict[str, Sequence[str]],
    class_names: Sequence[str],
    settings: Settings,
    info: Info | None,
    margin: int,
) -> tuple[Splits, Info]:
    """The splits of built-in images {'train': ..., 'test': ...}; validation comes out of 'train'."""
    kept, held_out = _split_off_validation(labels["train"], settings)
    parts = {"train": ("train", kept), "val": ("train", held_out), "test": ("test", slice(None))}
    images, labels, ids = (
        {name: np.asarray(values[source])[numbers] for name, (source, numbers) in parts.items()}
        for values in (images, labels, ids)
    )
    adapter = _known(info, "image") or ImageAdapter.fit(images["train"], settings.patch_size)
    splits = {
        name: ImageDataset(images[name], labels[name], adapter, **_augmentation(settings, name, margin), ids=ids[name])
        for name in images
    }
    return splits, _describe({"image": adapter}, class_names) | {"augmentation": splits["train"].augmentation}


def _augmentation(settings: Settings, split: str, margin: int) -> dict[str, Any]:
    """What `ImageDataset` is told to do to the images of a split."""
    if split != "train" or not settings.augment:
        return {}
    return {"margin": margin, "flip": settings.flip, "seed": settings.seed}


def load_digits_splits(settings: Settings, info: Info | None = None) -> tuple[Splits, Info]:
    """The 1,797 digits of 8 x 8 pixels, values 0 to 16, that come with scikit-learn.

    The test set is the same stratified fifth for every seed.
    """
    from sklearn.datasets import load_digits

    check_patch_size(settings.patch_size, 8, 8)
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8)[..., None], digits.target
    rest, test = stratified_split(labels, 0.2, random_stream("digits test set"))
    parts = {"train": rest, "test": test}
    return _image_splits(
        {name: images[numbers] for name, numbers in parts.items()},
        {name: labels[numbers] for name, numbers in parts.items()},
        {name: numbers.astype(str) for name, numbers in parts.items()},
        [str(name) for name in digits.target_names],
        settings,
        info,
        margin=1,
    )


CIFAR10_FILES = ("cifar-10-batches-py", "cifar-10-python.tar.gz")  # unpacked, and as downloaded


def load_cifar10_splits(settings: Settings, info: Info | None = None) -> tuple[Splits, Info]:
    """CIFAR-10: 50,000 training and 10,000 test images of 32 x 32 pixels, downloaded into data_dir if not there."""
    check_patch_size(settings.patch_size, 32, 32)
    train, test = _open_cifar10(Path(settings.data_dir))
    images, labels = {"train": train.data, "test": test.data}, {"train": train.targets, "test": test.targets}
    ids = {name: np.arange(len(numbers)).astype(str) for name, numbers in labels.items()}
    return _image_splits(images, labels, ids, train.classes, settings, info, margin=4)


def _open_cifar10(folder: Path) -> tuple[Any, Any]:
    """torchvision's (training set, test set), every file verified; no network access if they are in the folder.

    Raises UserError if the archive is damaged or cannot be had; no part of a download stays behind.
    """
    from torchvision.datasets import CIFAR10

    try:
        return CIFAR10(folder, train=True), CIFAR10(folder, train=False)
    except RuntimeError:  # not there, or not intact
        pass
    archive = folder / CIFAR10.filename
    remedy = f"put {CIFAR10.url} there by hand, or use --dataset digits or synthetic"
    try:
        if not archive.exists():
            print(f"Downloading CIFAR-10 (170 MB) to {archive}", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            _download(CIFAR10.url, archive, CIFAR10.tgz_md5)
        if _md5(archive) != CIFAR10.tgz_md5:
            raise UserError(
                f"{archive} is incomplete or damaged ({archive.stat().st_size} bytes); delete it to download it anew, "
                f"or {remedy}"
            )
        return CIFAR10(folder, train=True, download=True), CIFAR10(folder, train=False)
    except (OSError, HTTPException) as error:
        raise UserError(f"cannot get CIFAR-10 as {archive}: {error}; {remedy}") from error


def _download(url: str, path: Path, md5: str) -> None:
    """Download to a file that appears when it is complete and verified. Raises OSError or HTTPException."""
    partial_file = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(partial_file, "wb") as file:
            shutil.copyfileobj(response, file)
        if _md5(partial_file) != md5:
            raise OSError(f"{url} gave {partial_file.stat().st_size} bytes that fail the md5 check")
        os.replace(partial_file, path)
    finally:
        partial_file.unlink(missing_ok=True)


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def create_cifar10_sequence_dataset(
    batch_size: int = 32,
    patch_size: int = 8,
    split: str = "train",
    data_dir: str = "data",
    augment: bool = True,
    seed: int = 0,
    num_workers: int = 0,
) -> DataLoader:
    """A loader of CIFAR-10 as patch sequences.

    split: 'train' (90 %, shuffled and, if `augment`, augmented), 'val' (10 %) or 'test'.
    """
    if split not in ("train", "val", "test"):
        raise UserError(f"split is {split!r}; it must be 'train', 'val' or 'test'")
    settings = Settings(
        dataset_type="cifar10",
        batch_size=batch_size,
        patch_size=patch_size,
        data_dir=data_dir,
        augment=augment,
        flip=augment,
        seed=seed,
    )
    splits, info = load_splits(settings)
    return create_dataloader(splits[split], batch_size, split == "train", seed, num_workers, info["num_classes"])


# -- your own data --------------------------------------------------------------------------------------------


class MultimodalDataset(Dataset):
    """Several modalities of the same samples.

    Args:
        parts: for each modality a data set of the samples that have it, and (N,) each sample's number in it, -1 where
            it lacks the modality.
        labels: N class numbers.
        ids: names of the samples; without, their numbers.
    """

    def __init__(
        self, parts: dict[str, tuple[Dataset, np.ndarray]], labels: np.ndarray, ids: Sequence[str] | None = None
    ):
        self.parts, self.labels, self.ids = parts, labels, _ids(ids, len(labels))

    def set_epoch(self, epoch: int) -> None:
        for dataset, _ in self.parts.values():
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> Item:
        there = {name: (data, numbers[number]) for name, (data, numbers) in self.parts.items() if numbers[number] >= 0}
        inputs = {name: data[place]["input"] for name, (data, place) in there.items()}
        return {"input": inputs, "label": self.labels[number]}


OwnSplits = tuple[dict[str, Items], dict[str, np.ndarray], list[str], list[str]]
# Given the path, on_error, and the items of training where they have been read
Read = Callable[[Path, Callable[[UserError], None], Items | None], Items]


def _own_splits(settings: Settings, info: Info | None, only: str | None, read: Read) -> OwnSplits:
    """(items, class numbers) of each split of the user's data, the names of the classes, and notes for the user.

    What data_path does not say itself (test_path, or the folders train, val and test of images) is split off, the same
    test set for every seed. Where `only` one split is asked for and needs no other, it is read alone.
    """
    places, notes = _places(settings, info, only)
    errors: list[UserError] = []
    items: dict[str, Items] = {}
    for name, place in places.items():
        items[name] = read(place, errors.append, items.get("train"))
    notes += [note for found in items.values() for note in found.notes]
    given = [name for name in FIELDS if getattr(settings, name) != FIELDS[name].default]
    notes += without_effect(places.values(), given)
    class_names, more = _name_classes(items, info and info["class_names"], settings.data_path, errors)
    notes += more
    numbers = {name: number for number, name in enumerate(class_names)}
    if "train" in items:
        notes += _split_off(items, numbers, settings)
    labels = {name: np.array([numbers[label] for label in found.labels]) for name, found in items.items()}
    for name, present in labels.items():
        absent = np.setdiff1d(np.arange(len(class_names)), present)
        if len(absent):
            first = class_names[absent[0]]
            notes.append(f"{len(absent)} of {len(class_names)} classes have no {name} sample, the first is {first}")
    return items, labels, class_names, notes


def _name_classes(
    items: dict[str, Items], known: list[str] | None, path: str, errors: list[UserError]
) -> tuple[list[str], list[str]]:
    """(the names of the classes, notes on labels); the labels of the items become names of classes.

    known: the names that a checkpoint has. Raises UserError for `errors` of reading and what is no label, together.
    """
    names = {}
    for split, found in items.items():
        names[split], wrong = read_labels(found.labels, found.places, known or ())
        errors = errors + wrong
    refuse_together(errors)
    class_names = known or class_order(names["train"])
    if len(class_names) < 2:
        raise UserError(f"{path}: every item has the label {class_names[0]!r}; at least two classes are needed")
    numbers = ClassNumbers(class_names)
    refuse_together(
        UserError(f"{place}: label {name!r} does not occur in the training data{numbers.nearest(name)}; correct or "
                  "remove it")
        for split, found in items.items()
        for place, name in zip(found.places, names[split], strict=True)
        if numbers.get(name) is None
    )  # fmt: skip
    notes = [] if known else slips(items["train"].labels, names["train"])
    for split, found in items.items():
        found.labels = [class_names[numbers.get(name)] for name in names[split]]
    return class_names, notes


def _places(settings: Settings, info: Info | None, only: str | None) -> tuple[dict[str, Path], list[str]]:
    """({split: the file or folder that holds it}, notes)."""
    if settings.data_path is None:
        raise UserError(f"data_path: the data set {settings.dataset_type} needs --data_path, the place of your data")
    find, places, notes = FileFinder(), {}, []
    path = find(Path(settings.data_path))
    if settings.test_path is not None:
        places["test"] = find(Path(settings.test_path))
        if places["test"].resolve() == path.resolve():
            raise UserError(f"test_path: {path} is the training data itself; leave it out to set a part of them aside")
        if settings.dataset_type == "images":
            splits, notes = find_splits(places["test"])
            if len(splits) > 1:
                shown = ", ".join(map(str, splits.values()))
                raise UserError(f"test_path: {places['test']} holds several splits; name one of {shown}")
            places["test"] = splits["train"]
        if info and only == "test":
            return places, notes
    if info and not path.exists():
        raise UserError(f"{path}: the data of training are not there; say with --data_path where they are now, or "
                        "evaluate another labelled set with --test_path")  # fmt: skip
    if settings.dataset_type == "images":
        splits, more = find_splits(path)
        places, notes = splits | places, notes + more
    else:
        places = {"train": path} | places
    if info and only in places and only != "train":
        places = {only: places[only]}
    return places, notes


def _split_off(items: dict[str, Items], numbers: dict[str, int], settings: Settings) -> list[str]:
    """Take the test and validation items that there are not yet out of those of training. Returns notes."""
    for found in items.values():
        found.groups = _group_names(found, settings)
    _refuse_shared_groups(items)
    streams = {  # the test set first: it is the same for every seed
        "test": (settings.test_fraction, random_stream("test set")),
        "val": (settings.val_fraction, random_stream("validation", settings.seed)),
    }
    notes, shares = [], []
    for name, (fraction, rng) in streams.items():
        if name in items:
            given = name == "test" and settings.test_path  # of which unused_settings tells
            if fraction != FIELDS[f"{name}_fraction"].default and not given:
                notes.append(f"{name}_fraction has no effect: there is a folder for {PURPOSES[name]}")
            continue
        train = items["train"]
        labels = np.array([numbers[label] for label in train.labels])
        with naming(f"{settings.data_path}, to set aside data for {PURPOSES[name]}"):
            if train.groups:
                kept, held_out = grouped_split(labels, train.groups, fraction, rng)
            else:
                kept, held_out = stratified_split(labels, fraction, rng)
        items[name], items["train"] = train.subset(held_out), train.subset(kept)
        shares.append(f"{name}_fraction {fraction:g} became {len(held_out) / len(labels):.3f}")
    if items["train"].groups:
        counts = ", ".join(f"{len(set(items[name].groups))} for {purpose}" for name, purpose in PURPOSES.items())
        notes.append("; ".join([f"groups: {counts}, none of them in two", *shares]))
    return notes


def _group_names(found: Items, settings: Settings) -> list[str] | None:
    """The group of each item, by the settings; None where they name none. Raises UserError for items without.

    Names that look the same to a person are one group: 7 and 7.0, P7 and p7. To part what belongs together would be
    worse than to join what does not.
    """
    column, pattern = settings.group_column, settings.group_pattern
    if column and pattern:
        raise UserError("group_column, group_pattern: both say what the groups are; give one of them")
    if column and found.groups is None:
        raise UserError(f"group_column: {found.places[0]}: there is no column {column!r}; correct it, or find the "
                        "groups in the ids of the items with --group_pattern")  # fmt: skip
    groups, missing = found.groups, "the group is empty; fill it in"
    if pattern:
        try:
            matches = [re.search(pattern, id) for id in found.ids]
        except re.error as error:
            raise UserError(f"group_pattern: {pattern!r} is no regular expression: {error}") from error
        groups = [match and match[1 if match.re.groups else 0] for match in matches]
        missing = f"group_pattern {pattern!r} finds no group in it; every item needs one"
    if groups:
        refuse_together(
            UserError(f"{place} (id {id!r}): {missing}")
            for place, id, group in zip(found.places, found.ids, groups, strict=True)
            if not group
        )
        groups = [unicodedata.normalize("NFKC", group).casefold() for group in groups]
        groups = [re.sub(r"^(\d+)\.0*$", r"\1", "".join(c for c in group if c.isprintable())) for group in groups]
    return groups


def _refuse_shared_groups(items: dict[str, Items]) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for name, found in items.items():
        for group, place in zip(found.groups or [], found.places, strict=False):
            split, first = seen.setdefault(group, (name, place))
            if split != name:
                raise UserError(f"{place}: its group {group!r} is in the data for {PURPOSES[split]} too, first "
                                f"{first}; move all items of a group to one side")  # fmt: skip


def refuse_together(errors: Iterable[UserError], most: int = 10) -> None:
    """Raise one UserError with a line for each of the first errors and the number of the others; nothing for none."""
    lines = [str(error) for error in errors]
    if lines:
        more = [f"and {len(lines) - most} more like these"] if len(lines) > most else []
        raise UserError("\n".join(lines[:most] + more))


def _fingerprints(items: dict[str, Items], info: Info | None) -> dict[str, str]:
    """A checksum of the samples of each split in their order: ids, labels, texts, series, names of files.

    Where there are files, one of all their bytes follows after a "-". They were read a moment ago, for their pixels, so
    the system still has them in memory: it costs little beside decoding them. Names may be in another normal form of
    Unicode than those of the checkpoint: data may have moved between systems.
    """
    known = info["fingerprints"] if info else {}

    def of_names(found: Items, in_form: Callable[[str], str]) -> str:
        result = 0
        for id, label, value in zip(found.ids, found.labels, found.values, strict=True):
            parts = value.values() if isinstance(value, dict) else [value]
            parts = [in_form(part.name) if isinstance(part, Path) else part for part in parts]
            for part in (in_form(id), label, *parts):
                result = zlib.crc32(as_utf8(part).encode() if isinstance(part, str) else part.tobytes(), result)
        return f"{result:08x}"

    def of_files(found: Items) -> str:
        values = [list(value.values()) if isinstance(value, dict) else [value] for value in found.values]
        files = [(part, place) for parts, place in zip(values, found.places, strict=True)
                 for part in parts if isinstance(part, Path)]  # fmt: skip
        if not files:
            return ""
        sums = _each(_file_checksum, *map(list, zip(*files, strict=True)))
        return f"-{zlib.crc32(np.array(sums, '<u4').tobytes()):08x}"

    def fingerprint(found: Items, before: str) -> str:
        names = of_names(found, str)
        if before and before != names:
            others = (of_names(found, partial(unicodedata.normalize, form)) for form in ("NFC", "NFD"))
            names = before if before in others else names
        return names + of_files(found)

    return {name: fingerprint(found, known.get(name, "").partition("-")[0]) for name, found in items.items()}


def _file_checksum(path: Path) -> int:
    result = 0
    try:
        with open(path, "rb") as file:
            while data := file.read(2**20):
                result = zlib.crc32(data, result)
    except OSError as error:
        raise UserError(f"{printable(str(path))}: cannot be read: {error.strerror}") from error
    return result


def _each(function: Callable[[Any], Any], values: Sequence[Any], places: Sequence[str]) -> list[Any]:
    """function(value) of each, in threads (files are read and decoded in C); errors say at which places."""

    def call(value: Any, place: str) -> Any:
        try:
            with naming(place):
                return function(value)
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(call, values, places))
    refuse_together(result for result in results if isinstance(result, UserError))
    return results


def _each_of(
    function: Callable[[Any], Any], values: dict[str, Sequence[Any]], places: dict[str, Sequence[str]]
) -> dict[str, list[Any]]:
    """`_each` of the values of every split, so that the bad ones of all of them are named at once."""
    pairs = [pair for name in values for pair in zip(values[name], places[name], strict=True)]
    results = iter(_each(function, [value for value, _ in pairs], [place for _, place in pairs]))
    return {name: [next(results) for _ in part] for name, part in values.items()}


def _columns(items: dict[str, Items]) -> tuple[dict[str, list[Any]], dict[str, list[str]]]:
    """(values, places) of each split."""
    return {name: found.values for name, found in items.items()}, {name: found.places for name, found in items.items()}


def _cut_note(modality: str, lengths: Sequence[int], limit: int | None) -> list[str]:
    """What to tell the user of training items that the length limit cuts."""
    count = sum(length > (limit or math.inf) for length in lengths)
    return [f"{count} of {len(lengths)} training items are cut to max_seq_len {limit} ({modality})"] * bool(count)


def load_images_splits(
    settings: Settings, info: Info | None = None, only: str | None = None
) -> tuple[Splits, Info]:
    """The user's images: a folder of a folder for each class, or of train, val and test above those.

    They are kept in memory as bytes, image_size x image_size x 3 each.
    """
    check_patch_size(settings.patch_size, settings.image_size, settings.image_size)
    items, labels, class_names, notes = _own_splits(settings, info, only, lambda path, *_: read_images(path))
    known = _known(info, "image")
    size = known.image_shape[0] if known else settings.image_size
    bits = known.bits if known else _bits(items["train"].values, items["train"].places, settings, notes)
    images = _read_pixels(*_columns(items), size, bits)
    adapter = known or ImageAdapter.fit(images["train"], settings.patch_size, any_size=True, bits=bits)
    splits = {}
    for name, found in items.items():
        augmentation = _augmentation(settings, name, size // 8)
        splits[name] = ImageDataset(images[name], labels[name], adapter, **augmentation, ids=found.ids)
    return splits, _describe({"image": adapter}, class_names, notes) | {
        "fingerprints": _fingerprints(items, info),
        **({"augmentation": splits["train"].augmentation} if "train" in splits else {}),
    }


def _read_pixels(
    files: dict[str, Sequence[Path]], places: dict[str, Sequence[str]], size: int, bits: int | None
) -> dict[str, np.ndarray]:
    """uint8 (N, size, size, 3) of each split. Raises UserError for more than this machine's memory."""
    number = sum(map(len, files.values()))
    check_memory(3 * number * size**2, f"{number:,} images of {size:,} x {size:,} pixels (--image_size)")
    pixels = {name: np.empty((len(paths), size, size, 3), np.uint8) for name, paths in files.items()}

    def read(place: tuple[np.ndarray, int, Path]) -> None:
        images, number, file = place
        images[number] = square_pixels(file, size, bits)

    _each_of(read, {name: [(pixels[name], *pair) for pair in enumerate(files[name])] for name in files}, places)
    return pixels


def _bits(files: Sequence[Path], places: Sequence[str], settings: Settings, notes: list[str]) -> int | None:
    """The bits in use of the training images' grey, None if it has no more than 8. Adds a note of what is assumed.

    A camera of 10 or 12 bits stores them in files of 16, where they would be all but black.
    """
    used = {"grey": [], "colour": []}  # bits of each image
    for found in _each(depth, files, places):
        if found:
            used[found[0]].append(found[1])
    if used["colour"] and max(used["colour"]) <= 14:
        raise UserError(f"{settings.data_path}: {len(used['colour'])} training images have colours of 16 bits, but use "
                        f"{max(used['colour'])} of them at most, and only the upper 8 are read; save them as 8 bit")
    if not used["grey"]:
        return settings.image_bits
    most = max(used["grey"])
    bits = settings.image_bits or next((bits for bits in (8, 10, 12, 14) if bits >= most), 16)
    notes.append(f"{len(used['grey'])} of {len(files)} training images are grey of 16 bits and use {most} of them: "
                 f"0 is taken for black, {2**bits - 1} for white (--image_bits {bits})")  # fmt: skip
    return bits


def read_series_as(
    trained: SeriesAdapter | Items | None, path: Path, settings: Settings, **options: Any
) -> Items:
    """Series whose features are those of training: of its adapter, or of its items; None where these are training's."""
    if trained is None:
        return read_series(path, settings, **options)
    names = trained.names if isinstance(trained, SeriesAdapter) else trained.features
    if trained.table_rows and settings.table_rows == "auto":
        settings = replace(settings, table_rows=trained.table_rows)
    items = read_series(path, settings, **options, known=names)
    if names is None and len(items.features or ()) > 1 and items.table_rows == "steps":
        items.notes.append(f"{path}: the training data name no columns, so these are taken in their order: "
                           f"{', '.join(items.features)}")
    return items


def load_sequences_splits(
    settings: Settings, info: Info | None = None, only: str | None = None
) -> tuple[Splits, Info]:
    """The user's series: a file that `read_series` takes, standardised with the training split's statistics."""
    known = _known(info, "series")

    def read(path: Path, on_error: Callable[[UserError], None], train: Items | None) -> Items:
        named = known and (known.names or known.table_rows)  # an older checkpoint has neither
        return read_series_as(known if named else train, path, settings, on_error=on_error)

    items, labels, class_names, notes = _own_splits(settings, info, only, read)
    train = items.get("train")
    adapter = known or _fit_series(train.values, train.places, settings, train.features, train.table_rows)
    splits = {
        name: SequenceDataset(tokens, labels[name], items[name].ids)
        for name, tokens in _each_of(adapter, *_columns(items)).items()
    }
    about = []
    if train:
        about, more = _about_series(train.values, adapter)
        notes += [*more, *_cut_note("series", [len(series) for series in train.values], adapter.max_seq_len)]
    description = _describe({"series": adapter}, class_names, notes) | {"about": about}
    return splits, description | {"fingerprints": _fingerprints(items, info)}


def _about_series(series: Sequence[np.ndarray], adapter: SeriesAdapter) -> tuple[list[str], list[str]]:
    """(a line on steps and channels of the training series; notes where they seem to be exchanged)."""
    lengths, width = [len(one) for one in series], len(adapter.mean)
    low, high, median = min(lengths), max(lengths), int(np.median(lengths))
    steps, channels = f"{median} step{'s' * (median > 1)}", f"{width} channel{'s' * (width > 1)}"
    names = f": {listed(adapter.channels)}" if adapter.channels else ""
    line = f"series  {steps if low == high else f'{low} to {high} steps (median {median})'}, {channels}{names}"
    if high == 1 and adapter.table_rows == "steps":
        return [line], [f"every series has one step, of {channels}; if each row of the table is a whole series, say "
                        "--table_rows series"]
    if high == 1 or median < width:
        return [line], [f"the series have {steps} and {channels}; if it is the other way round, transpose them: "
                        "x of an .npz is (series, steps, channels)"]
    return [line], []


def load_text_splits(settings: Settings, info: Info | None = None, only: str | None = None) -> tuple[Splits, Info]:
    """The user's texts: a .csv, .tsv or .jsonl file."""
    items, labels, class_names, notes = _own_splits(
        settings, info, only, lambda path, on_error, _: read_texts(path, settings, on_error=on_error)
    )
    adapter = _known(info, "text") or TextAdapter(settings.max_seq_len)
    splits = {
        name: SequenceDataset(tokens, labels[name], items[name].ids)
        for name, tokens in _each_of(adapter, *_columns(items)).items()
    }
    if "train" in items:
        notes += _cut_note("text", [len(text.encode()) for text in items["train"].values], adapter.max_seq_len)
    return splits, _describe({"text": adapter}, class_names, notes) | {"fingerprints": _fingerprints(items, info)}


def load_multimodal_splits(
    settings: Settings, info: Info | None = None, only: str | None = None
) -> tuple[Splits, Info]:
    """The user's manifest: a .csv, .tsv or .jsonl file whose columns name an image, a text, a series and a label."""
    check_patch_size(settings.patch_size, settings.image_size, settings.image_size)
    columns = {name: getattr(settings, f"{name}_column") for name in ("image", "text", "series")}
    items, labels, class_names, notes = _own_splits(
        settings, info, only, lambda path, on_error, _: read_manifest(path, columns, settings, on_error=on_error)
    )
    if info:
        known = [name for name in columns if name in info["adapters"]]
    else:
        there = {name for item in items["train"].values for name in item}
        for name, column in columns.items():
            if name not in there and column != FIELDS[f"{name}_column"].default:
                raise UserError(f"{name}_column: no training item has a column {column!r}; correct it, or leave it out")
        known = [name for name in columns if name in there]
    for found in items.values():
        for item, place in zip(found.values, found.places, strict=True):
            if item.keys().isdisjoint(known):
                raise UserError(f"{place}: it has only {', '.join(item)}, which no training item has; remove the row")
    unseen = {name for found in items.values() for item in found.values for name in item}.difference(known)
    notes += [f"no training item has an entry for {name}, so it is not looked at" for name in sorted(unseen)]
    adapters, parts, about = {}, {name: {} for name in items}, {}
    for modality in known:
        have = {name: [i for i, item in enumerate(found.values) if modality in item] for name, found in items.items()}
        raw = {name: [items[name].values[i][modality] for i in numbers] for name, numbers in have.items()}
        places = {name: [items[name].places[i] for i in numbers] for name, numbers in have.items()}
        adapter = _known(info, modality)
        if modality == "image":
            size = adapter.image_shape[0] if adapter else settings.image_size
            bits = adapter.bits if adapter else _bits(raw["train"], places["train"], settings, notes)
            raw = _read_pixels(raw, places, size, bits)
            adapter = adapter or ImageAdapter.fit(raw["train"], settings.patch_size, any_size=True, bits=bits)
        elif modality == "series":
            names = adapter.channels if adapter else _series_names(raw["train"])
            raw = _each_of(partial(read_one_series, known=names), raw, places)
            adapter = adapter or _fit_series(raw["train"], places["train"], settings, names)
        else:
            adapter = adapter or TextAdapter(settings.max_seq_len)
        adapters[modality] = adapter
        tokens = {} if modality == "image" else _each_of(adapter, raw, places)
        for name, found in items.items():
            numbers, its_labels = np.full(len(found.values), -1), labels[name][have[name]]
            numbers[have[name]] = np.arange(len(have[name]))
            if modality == "image":
                data = ImageDataset(raw[name], its_labels, adapter, **_augmentation(settings, name, size // 8))
            else:
                data = SequenceDataset(tokens[name], its_labels)
            parts[name][modality] = data, numbers
        if modality == "image" and "train" in items:
            about["augmentation"] = parts["train"]["image"][0].augmentation
        elif "train" in items:
            lengths = [len(one.encode() if modality == "text" else one) for one in raw["train"]]
            notes += _cut_note(modality, lengths, adapter.max_seq_len)
        if modality == "series" and raw.get("train"):
            about["about"], more = _about_series(raw["train"], adapter)
            notes += more
    splits = {name: MultimodalDataset(parts[name], labels[name], found.ids) for name, found in items.items()}
    return splits, _describe(adapters, class_names, notes) | about | {"fingerprints": _fingerprints(items, info)}


def _series_names(files: Sequence[Path]) -> list[str] | None:
    """The names of the channels of series in files of their own: those of the first table."""
    table = next((file for file in files if file.suffix.lower() in (".csv", ".tsv")), None)
    return read_named_series(table)[1] if table else None


def _fit_series(
    series: list[np.ndarray],
    places: list[str],
    settings: Settings,
    names: list[str] | None,
    table_rows: str | None = None,
) -> SeriesAdapter:
    """The adapter of the training series; an error says where they lie."""
    width = series[0].shape[1]
    for one, place in zip(series, places, strict=True):
        if one.shape[1] != width:
            raise UserError(f"{place}: the series has {one.shape[1]} channels, that of {places[0]} {width}; "
                            "all must have the same")
    with naming(str(settings.data_path)):
        return SeriesAdapter.fit(series, settings.max_seq_len, names, table_rows)


@contextmanager
def reading_advice() -> Iterator[None]:
    """Turn running out of memory while data are read into a UserError with the remedies, the most helpful first."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"out of memory while the data are read ({error}); in the order that helps: fewer processes on this "
            "machine (each holds the data), a smaller --image_size, --max_seq_len, --feature_columns, a file of fewer "
            "items; or a Dataset of your own that reads items when they are needed"
        ) from error


# -- by name --------------------------------------------------------------------------------------------------

DATASETS: dict[str, Callable[..., tuple[Splits, Info]]] = {
    "synthetic": load_synthetic_splits,
    "cifar10": load_cifar10_splits,
    "digits": load_digits_splits,
    "images": load_images_splits,
    "sequences": load_sequences_splits,
    "text": load_text_splits,
    "multimodal": load_multimodal_splits,
}


def load_splits(
    settings: Settings, info: Info | None = None, only: str | None = None
) -> tuple[Splits, Info]:
    """The data sets {'train', 'val', 'test'} of settings.dataset_type and their description.

    The description holds plain values that a checkpoint can store: dataset_type, class_names, num_classes, for each
    modality the adapter (see adapters.py) and the features that the model is told of, split_sizes, split_seed, and
    notes for the user, of images what is done to those of training (augmentation), and for the user's own data a
    fingerprint of the samples of each split.

    info: a description made in training. Its adapters and classes are then used.
    only: the split that is asked for. Of the user's own data it alone is read if it is not a part of another one.
    """
    asked = {"only": only} if settings.dataset_type in OWN_DATA else {}
    with reading_advice():
        splits, specific = DATASETS[settings.dataset_type](settings, info, **asked)
    sizes = {name: len(splits[name]) for name in ("train", "val", "test") if name in splits}
    prints, known = specific.get("fingerprints", {}), info["fingerprints"] if info else {}
    # Earlier versions looked at the names of files alone: where these are the same, no more can be told
    prints = {name: known[name] if text.partition("-")[0] == known.get(name) else text for name, text in prints.items()}
    return splits, {
        "dataset_type": settings.dataset_type,
        "num_classes": len(specific["class_names"]),
        **specific,
        "fingerprints": prints,
        "split_sizes": (info["split_sizes"] if info else {}) | sizes,
        "split_seed": settings.seed,
    }
