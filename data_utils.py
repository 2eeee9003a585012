"""Data sets by name, built in and your own: {'train', 'val', 'test'} of items, and what a checkpoint knows of them.

What an item and a batch are is said in batches.py; the names from there can also be imported from here. To add a data
set by name, write a function like `load_digits_splits`, enter it in `DATASETS` and give it its defaults in
config.DATASET_DEFAULTS.
"""

import hashlib
import math
import os
import re
import shutil
import unicodedata
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

import distributed
import own_data
import tasks
from adapters import (  # noqa: F401
    MODALITIES,
    Adapter,
    AugmentedSeries,
    ImageAdapter,
    ImageDataset,
    MultimodalDataset,
    SequenceDataset,
    Source,
    TensorAdapter,
    augmentation_of,
    check_patch_size,
    check_patches,
    describe,
    each,
    from_description,
    image_stem,
    shift_and_flip,
)
from batches import (  # noqa: F401 (for those who import them from here)
    EpochBatchSampler,
    EpochDataLoader,
    HidingDataset,
    Item,
    check_items,
    collate,
    create_dataloader,
    loaded_of,
    random_stream,
    set_epoch,
    share_of,
    to_sample,
    unshared,
)
from config import FIELDS, OWN_DATA, PYTHON, Settings, check_memory, is_code
from data_files import Items, OnError, raise_it, read_manifest, without_effect
from files import checksum_of
from image_files import PURPOSES, find_splits
from messages import UserError, as_utf8, naming, refuse_together
from own_data import OwnData
from packed import Packed
from tables import FileFinder
from tasks import Classification, Task

Splits = dict[str, Dataset]
Info = dict[str, Any]  # see load_splits


# --- Splits ----------------------------------------------------------------------------------------------------------


def stratified_split(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(sample numbers kept, sample numbers held out), sorted.

    Of each class the fraction is held out, rounded, but at least one sample, and at least one is kept.
    """
    held_out = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held_out.extend(members[: min(max(1, round(fraction * len(members))), len(members) - 1)])
    if not held_out:
        if len(labels) == 1:
            raise UserError("1 sample cannot be split; more are needed")
        raise UserError(f"{len(labels)} samples, one of each class, cannot be split; more of a class are needed")
    return np.setdiff1d(np.arange(len(labels)), held_out), np.sort(held_out)


def grouped_split(
    labels: np.ndarray, groups: Sequence[str], fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """As `stratified_split`, but the samples of a group are all kept or all held out.

    Several random choices of groups are tried; the one that comes nearest to the fraction in every class is taken. Of a
    class that is in several groups, at least one group is held out and at least one is kept.
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
    """Which groups to hold out, bool (groups,): in this order, each that brings the classes nearer to the fraction."""
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
    for number in range(len(missing)):  # a class with nothing held out yet gives its smallest group that may go
        if not there[held, number].any():
            any(hold_out(one) for one in smallest if there[one, number])
    return held


def fold_split(
    strata: np.ndarray, groups: Sequence[str] | None, settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
    """(sample numbers kept, those of the fold settings.fold), sorted. Without a fold all are kept.

    The folds are scikit-learn's: of each stratum about the same share is in each fold, and a group is in one fold only.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if settings.fold is None:
        return np.arange(len(strata)), np.zeros(0, int)
    number, what = settings.folds, "samples"
    if groups:
        splitter, what = StratifiedGroupKFold(number), "groups"
        _, groups = np.unique(groups, return_inverse=True)
    else:
        seed = int(random_stream("folds", settings.seed).integers(2**31))
        splitter = StratifiedKFold(number, shuffle=True, random_state=seed)
    there = len(strata) if groups is None else len(np.unique(groups))
    most = min(there, np.unique(strata, return_counts=True)[1].max())
    if number > most:
        raise UserError(f"folds: {there} {what}, of which no class has more than {most} samples, cannot be parted into "
                        f"{number} folds; " + (f"take at most --folds {most}" if most > 1 else "leave --folds out"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a class has fewer samples than there are folds
        folds = list(splitter.split(np.zeros(len(strata)), strata, groups))
    if any(len(part) == 0 for fold in folds for part in fold):
        raise UserError(f"folds: the {there} groups cannot be parted into {number} folds; take fewer --folds")
    kept, held_out = folds[settings.fold - 1]
    return np.sort(kept), np.sort(held_out)


def _split_off_validation(labels: np.ndarray, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    if settings.folds:
        return fold_split(labels, None, settings)
    return stratified_split(labels, settings.val_fraction, random_stream("validation", settings.seed))


# --- Descriptions ----------------------------------------------------------------------------------------------------


def known_adapters(info: Info | None, own: Mapping[str, type[Adapter]] | None = None) -> dict[str, Adapter]:
    """The adapters of a description made in training; {} without one. own: see `adapters.from_description`."""
    known = info["adapters"] if info else {}
    return {name: from_description(one, f"the checkpoint's adapter of {name}", own) for name, one in known.items()}


def _known_adapter(info: Info | None, kind: type[Adapter]) -> Any:
    """The trained adapter of data of one modality; None without the description of a training.

    Raises:
        UserError: the adapter is for other data.
    """
    if not info or "task" not in info:
        return None
    known = known_adapters(info)
    if list(known) != [kind.modality]:
        raise UserError(f"the model was trained on {', '.join(known)}; these data are for {kind.modality}")
    if not isinstance(known[kind.modality], kind):
        made = type(known[kind.modality]).__name__
        raise UserError(f"the checkpoint's adapter of {kind.modality} is a {made}, made for other data")
    return known[kind.modality]


def known_task(info: Info | None) -> Task | None:
    return tasks.from_description(info["task"], "the checkpoint's task") if info and "task" in info else None


def description(task: Task, adapters: dict[str, Adapter], notes: Sequence[str] = (), **more: Any) -> Info:
    """What a checkpoint stores about data: task, adapters, and what the model is told about them."""
    return {
        "task": tasks.describe(task),
        "num_outputs": task.num_outputs,
        **({"head": task.head} if task.head else {}),
        **({"class_names": list(task.class_names)} if hasattr(task, "class_names") else {}),
        "features": {name: adapter.features for name, adapter in adapters.items()},
        "adapters": {name: describe(adapter) for name, adapter in adapters.items()},
        "notes": [as_utf8(note) for note in notes],
        **more,
    }


# --- Synthetic sequences ---------------------------------------------------------------------------------------------

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


def make_synthetic(settings: Settings, split: str, num_samples: int) -> SequenceDataset:
    """Sequences whose class is a temporal pattern. Each one depends only on (seed, split, number).

    Class c is a pattern of `PATTERNS` at its own rate (0.03 to 0.25 cycles per token). It reaches the channels one
    after another, within LAG tokens; phase, amplitude, gains of the channels, offsets, noise and length are random.
    Every channel of the pattern is scaled to mean 0 and variance 1 over the sequence, so that neither mean, variance
    nor length gives the class away.
    """
    shortest, longest = settings.seq_len_range
    tokens = num_samples * (shortest + longest) / 2 + 16 * longest  # kept ones, and float64 copies while one is made
    check_memory(
        4 * settings.feature_dim * tokens,
        f"{num_samples:,} sequences of {shortest:,} to {longest:,} tokens of {settings.feature_dim:,} features",
    )
    if settings.task == "tagging":
        pairs = [_synthetic_changes(settings, split, number) for number in range(num_samples)]
        sequences, labels = zip(*pairs, strict=True)
        return SequenceDataset(sequences, tasks.ragged(labels))
    sequences = [_synthetic_sequence(settings, split, number) for number in range(num_samples)]
    return SequenceDataset(sequences, np.arange(num_samples) % settings.num_classes)


def _synthetic_sequence(settings: Settings, split: str, number: int) -> np.ndarray:
    rng = random_stream(f"synthetic {split}", settings.seed, number)
    label, channels = number % settings.num_classes, settings.feature_dim
    rate = _rate(label, rng)
    length = rng.integers(*settings.seq_len_range, endpoint=True)
    wave = _wave(label, rate, length, channels, rng)
    return _noisy(wave, rng)


SEGMENT = (15, 60)  # tokens of a stretch of one pattern, where it changes within a sequence


def _synthetic_changes(settings: Settings, split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(a sequence whose pattern changes every SEGMENT tokens, the class of each token)."""
    rng = random_stream(f"synthetic changes {split}", settings.seed, number)
    length = rng.integers(*settings.seq_len_range, endpoint=True)
    waves, labels, label = [], [], number % settings.num_classes
    while len(labels) < length:
        steps = rng.integers(*SEGMENT, endpoint=True)
        waves.append(_wave(label, _rate(label, rng), steps, settings.feature_dim, rng))
        labels += [label] * steps
        label = (label + rng.integers(1, settings.num_classes)) % settings.num_classes
    return _noisy(np.concatenate(waves)[:length], rng), np.array(labels[:length], np.int64)


def _rate(label: int, rng: np.random.Generator) -> float:
    """Cycles per token; by the golden ratio, so that those of the classes are spread evenly."""
    return 0.03 * (0.25 / 0.03) ** ((label + 0.5) * 0.618 % 1) * rng.uniform(0.95, 1.05)


def _wave(label: int, rate: float, length: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """The pattern of a class, (length, channels), of mean 0 and variance 1 in every channel."""
    pattern = list(PATTERNS.values())[label % len(PATTERNS)]
    time = np.arange(length)[:, None] - np.linspace(0, LAG, channels)  # (L, C) tokens
    wave = pattern(rate * time + rng.uniform(0, 8))
    return (wave - wave.mean(0)) / np.maximum(wave.std(0), 1e-6)


def _noisy(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    length, channels = wave.shape
    gains = rng.uniform(0.5, 1.5) * rng.uniform(0, 2, channels)
    noise = rng.uniform(0.5, 1.5) * rng.standard_normal((length, channels))
    return (gains * wave + noise + rng.normal(0, 0.3, channels)).astype(np.float32)


def load_synthetic_splits(settings: Settings, info: Info | None = None) -> tuple[Splits, Info]:
    """num_samples sequences for training and validation, and a fifth as many for the test set."""
    data = make_synthetic(settings, "train", settings.num_samples)
    test = make_synthetic(settings, "test", math.ceil(settings.num_samples / 5))
    adapter = _known_adapter(info, TensorAdapter) or TensorAdapter(settings.feature_dim, settings.max_seq_len)
    first = np.arange(settings.num_samples) % settings.num_classes  # the class that a sequence has, or begins with
    train, val = _split_off_validation(first, settings)  # refuses more classes than samples
    rounds = range(math.ceil(settings.num_classes / len(PATTERNS)))
    names = [name + (f" {i + 1}" if i else "") for i in rounds for name in PATTERNS][: settings.num_classes]
    splits = {"train": data.subset(train), **({"val": data.subset(val)} if len(val) else {}), "test": test}
    for split in splits.values():
        split.sequences = [adapter(sequence) for sequence in split.sequences]
        if settings.task == "tagging":
            split.labels = tasks.ragged([labels[: settings.max_seq_len] for labels in split.labels])
    task = known_task(info) or (
        tasks.Tagging(names) if settings.task == "tagging" else Classification(names)
    ).learn(splits["train"].labels, settings)
    return splits, description(task, {"series": adapter})


def _classes(names: Sequence[str], labels: np.ndarray, settings: Settings, info: Info | None) -> Task:
    """The task of a data set that comes with class numbers."""
    return known_task(info) or Classification(list(names)).learn(labels, settings)


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


# --- Built-in images -------------------------------------------------------------------------------------------------


def _image_splits(
    images: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    ids: dict[str, Sequence[str]],
    class_names: Sequence[str],
    settings: Settings,
    info: Info | None,
    margin: int,
    white: int = 255,
) -> tuple[Splits, Info]:
    """The splits of built-in images {'train': ..., 'test': ...}; the validation images are taken from 'train'."""
    kept, held_out = _split_off_validation(labels["train"], settings)
    parts = {"train": ("train", kept), "val": ("train", held_out), "test": ("test", slice(None))}
    if not len(held_out):
        del parts["val"]
    whole = images["train"]
    images, labels, ids = (
        {name: np.asarray(values[source])[numbers] for name, (source, numbers) in parts.items()}
        for values in (images, labels, ids)
    )
    adapter = _known_adapter(info, ImageAdapter)
    if not adapter:
        fitted_on = whole if settings.folds else images["train"]
        adapter = ImageAdapter.fit(fitted_on, settings.patch_size, stem=image_stem(settings))
        start = known_adapters(info).get("image")
        if start and len(start.mean) == len(adapter.mean):
            adapter = replace(adapter, mean=start.mean, std=start.std)
    splits = {}
    for name in images:
        augmentation = augmentation_of(settings, name, margin, white)
        splits[name] = ImageDataset(images[name], labels[name], adapter, **augmentation, ids=ids[name])
    task = _classes(class_names, labels["train"], settings, info)
    return splits, description(task, {"image": adapter}, augmentation=splits["train"].augmentation)


def load_digits_splits(settings: Settings, info: Info | None = None) -> tuple[Splits, Info]:
    """The 1,797 digits of 8 x 8 pixels, values 0 to 16, that come with scikit-learn.

    The test set is the same stratified fifth for every seed.
    """
    from sklearn.datasets import load_digits

    check_patches(settings, 8, 8)
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
        white=16,
    )


CIFAR10_FILES = ("cifar-10-batches-py", "cifar-10-python.tar.gz")  # unpacked, and as downloaded


def load_cifar10_splits(settings: Settings, info: Info | None = None) -> tuple[Splits, Info]:
    """CIFAR-10: 50,000 training and 10,000 test images of 32 x 32 pixels, downloaded into data_dir if missing."""
    check_patches(settings, 32, 32)
    with distributed.first_process_first():
        train, test = _open_cifar10(Path(settings.data_dir))
    images, labels = {"train": train.data, "test": test.data}, {"train": train.targets, "test": test.targets}
    ids = {name: np.arange(len(numbers)).astype(str) for name, numbers in labels.items()}
    return _image_splits(images, labels, ids, train.classes, settings, info, margin=4)


def _open_cifar10(folder: Path) -> tuple[Any, Any]:
    """torchvision's (training set, test set), every file verified. There is no network access if the folder has them.

    Raises:
        UserError: the archive is damaged, or cannot be downloaded; no part of a download stays behind.
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
                f"{archive} is incomplete or damaged ({archive.stat().st_size} bytes); delete it to download it again, "
                f"or {remedy}"
            )
        return CIFAR10(folder, train=True, download=True), CIFAR10(folder, train=False)
    except (OSError, HTTPException) as error:
        raise UserError(f"cannot get CIFAR-10 as {archive}: {error}; {remedy}") from error


def _download(url: str, path: Path, md5: str) -> None:
    """Download to a file that appears only when it is complete and verified.

    Raises:
        OSError, HTTPException: the download failed, or its checksum is wrong.
    """
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
    return create_dataloader(splits[split], batch_size, split == "train", seed, num_workers, info["num_outputs"])


# --- Your own data ---------------------------------------------------------------------------------------------------

MODALITY_OF = {"images": "image", "sequences": "series", "text": "text"}  # of data sets of one modality
MANIFESTS = (".csv", ".tsv", ".jsonl", ".parquet")


def read_items(
    path: Path,
    settings: Settings,
    labelled: bool,
    on_error: OnError,
    known: dict[str, Adapter] | None = None,
    trained: Items | None = None,
) -> Items:
    """The items of a user's file or folder; their values are dicts by modality.

    It is read as settings.dataset_type says. Without labels, a model of several modalities also takes a single image,
    text or series.

    Args:
        known: the adapters of a checkpoint.
        trained: without a checkpoint, the training items, once they have been read.
    """
    known = known or {}
    modality = MODALITY_OF.get(settings.dataset_type)
    if modality is None and (labelled or path.suffix.lower() in MANIFESTS):
        columns = {name: getattr(settings, f"{name}_column") for name in known or MODALITIES}
        items = read_manifest(path, columns, settings, labelled, on_error)
        if not labelled:
            lacking = [name for name in columns if name not in items.modalities()]
            items.notes += [f"{path}: no item has an entry for {name} (column {columns[name]!r})" for name in lacking]
        return items
    if modality is None and len(known) == 1:
        (modality,) = known
    elif modality is None:
        modality = {".txt": "text", ".npy": "series"}.get(path.suffix.lower(), "image")
    reader = type(known[modality]) if modality in known else MODALITIES[modality]
    items = reader.read_items(path, settings, labelled, on_error, known.get(modality) or trained)
    items.modality = modality
    return items


def load_own_splits(settings: Settings, info: Info | None = None, only: str | None = None) -> tuple[Splits, Info]:
    """The user's images, series, texts, or several of these at once (a manifest).

    Splits that are not given (by test_path, or by the folders train, val and test of images) are split off, the test
    set the same for every seed. If `only` one split is asked for and needs no other, it alone is read.
    """
    if settings.dataset_type in ("images", "multimodal"):
        check_patches(settings, settings.image_size, settings.image_size)
    info, start = (None, known_adapters(info)) if info and "task" not in info else (info, {})
    known = known_adapters(info)
    if info and settings.dataset_type in MODALITY_OF:
        _known_adapter(info, MODALITIES[MODALITY_OF[settings.dataset_type]])
    paths, notes = _paths(settings, info, only)
    errors: list[UserError] = []
    items: dict[str, Items] = {}
    for name, path in paths.items():
        items[name] = _read(path, settings, errors.append, known, items.get("train"))
    notes += [note for found in items.values() for note in found.notes]
    given = [name for name in FIELDS if getattr(settings, name) != FIELDS[name].default]
    notes += without_effect(paths.values(), given)

    if settings.task == "reconstruct":
        refuse_together(errors)
        task, targets = _classes_if_there(items)
    else:
        task, targets, more = _targets(items, known_task(info), settings, errors, settings.data_path)
        notes += more
    fold = None
    if "train" in items:
        more, fold = _split_off(items, targets, task, settings, str(settings.data_path))
        notes += more

    home = FileFinder()(Path(settings.data_path if "train" in items else settings.test_path or settings.data_path))
    loaded = {}
    for modality in _modalities(items, known, settings, notes):
        found = {name: split.of(modality) for name, split in items.items()}
        there = {name: numbers for name, (numbers, _) in found.items()}
        train = items.get("train")
        source = Source(
            {name: values for name, (_, values) in found.items()},
            {name: [items[name].places[i] for i in numbers] for name, numbers in there.items()},
            train and train.columns,
            train and train.table_rows,
            data=home,
            remember=not info,
        )
        adapter = known.get(modality)
        if modality in start:
            adapter = start[modality].taken_over(source, settings)
        kind = type(adapter) if adapter else MODALITIES[modality]
        loaded[modality] = there, source, *kind.load(source, settings, adapter)
    if task.per_token:
        ((_, source, adapter, _),) = loaded.values()
        for name, values in targets.items():
            of_tokens = []
            for value, target, place in zip(source.values[name], values, source.places[name], strict=True):
                with naming(place):
                    of_tokens.append(adapter.of_tokens(value, target))
            targets[name] = tasks.ragged(of_tokens)
    if fold:
        _take_out_fold(fold, items, targets, loaded)
    if not info and settings.task != "reconstruct":
        task = task.learn(targets["train"], settings)
    refuse_together(error for name in items for error in task.unlike_training(targets[name], items[name].places))
    absent = {name: task.absent(values) for name, values in targets.items() if settings.task != "reconstruct"}
    notes += [text.format(name) for name, text in absent.items() if text]

    adapters, parts, about, augmentation = {}, {}, [], {}
    for modality, (there, source, adapter, raw) in loaded.items():
        labels = {name: targets[name][numbers] for name, numbers in there.items()}
        ids = {name: [items[name].ids[i] for i in numbers] for name, numbers in there.items()}
        adapters[modality], made = adapter, adapter.datasets(raw, source, labels, ids, settings, task)
        if "train" in items:
            about += adapter.about(raw["train"], source)
            if isinstance(made["train"], ImageDataset):
                augmentation = {"augmentation": made["train"].augmentation}
            elif isinstance(made["train"], AugmentedSeries):
                about.append(f"{modality}  in training {made['train'].augmentation}")
        notes += source.notes
        for name, data in made.items():
            numbers = np.full(len(items[name].values), -1)
            numbers[there[name]] = np.arange(len(there[name]))
            parts.setdefault(name, {})[modality] = data, numbers
    if settings.dataset_type in MODALITY_OF:
        splits = {name: data for name, ((data, _),) in ((name, part.values()) for name, part in parts.items())}
    else:
        splits = {name: MultimodalDataset(part, targets[name], items[name].ids) for name, part in parts.items()}
    labels = {name: task.texts(values) for name, values in targets.items()}
    if settings.task == "reconstruct":  # of data without labels
        labels = {name: [""] * len(values) for name, values in labels.items()}
    checksums = {}
    for _, source, _, _ in loaded.values():
        checksums |= source.check.checksums() if source.check else {}
    prints = _fingerprints(items, labels, info, checksums)
    return splits, description(task, adapters, notes, about=about, fingerprints=prints, **augmentation)


def _read(
    place: Path, settings: Settings, on_error: OnError, known: dict[str, Adapter], trained: Items | None
) -> Items:
    """The items of a split. To reconstruct them no label is needed; classes are read where there are some."""
    if settings.task != "reconstruct":
        return read_items(place, settings, True, on_error, known, trained)
    with suppress(UserError):
        classes = replace(settings, task="classification")
        return read_items(place, classes, True, raise_it, known, trained)
    return read_items(place, settings, False, on_error, known, trained)


def _classes_if_there(items: dict[str, Items]) -> tuple[Task, dict[str, np.ndarray]]:
    """(a classification, its targets) of items that are to be reconstructed, so that they are split as for a run that
    classifies them. Of labels that are no classes all items are one."""
    cells = {name: found.labels for name, found in items.items()}
    if "train" in items and all(cells.values()):
        task, _ = Classification.fit(cells["train"], items["train"].places, Settings())
        targets, errors = {}, []
        for name, found in items.items():
            targets[name], wrong = task.read(found.labels, found.places)
            errors += wrong
        if not errors:
            return task, targets
    return _one_class(items)


def _one_class(items: dict[str, Items]) -> tuple[Task, dict[str, np.ndarray]]:
    return Classification(["item"]), {name: np.zeros(len(found.values), int) for name, found in items.items()}


def _targets(
    items: dict[str, Items], known: Task | None, settings: Settings, errors: list[UserError], where: str | None
) -> tuple[Task, dict[str, np.ndarray], list[str]]:
    """(the task, the targets of each split, notes on labels). where: names the data in messages.

    Raises:
        UserError: the `errors` of reading and those of impossible labels, together.
    """
    task, notes = known, []
    if task is None:
        train = items["train"]
        task, notes = tasks.task_named(settings.task).fit(train.labels, train.places, settings)
    targets = {}
    for name, found in items.items():
        targets[name], wrong = task.read(found.labels, found.places)
        errors = errors + wrong
    refuse_together(errors)
    if known is None:
        task.check_names(where)
    return task, targets, notes


def _modalities(
    items: dict[str, Items], known: dict[str, Adapter], settings: Settings, notes: list[str]
) -> list[str]:
    """The modalities of the training items, in their order. Adds a note on modalities that only other items have."""
    there = set(known or items["train"].modalities())
    if not known and settings.dataset_type == "multimodal":
        for name in MODALITIES:
            column = getattr(settings, f"{name}_column")
            if name not in there and column != FIELDS[f"{name}_column"].default:
                raise UserError(f"{name}_column: no training item has a column {column!r}; correct it, or leave it out")
    modalities = [name for name in MODALITIES if name in there]
    for found in items.values():
        for number in range(0 if found.modality in modalities else len(found.values)):
            item = found.by_modality(number)
            if item.keys().isdisjoint(modalities):
                raise UserError(f"{found.places[number]}: it has only {', '.join(item)}, which no training item has; "
                                "remove the row")  # fmt: skip
    unseen = {name for found in items.values() for name in found.modalities()}.difference(modalities)
    notes += [f"no training item has an entry for {name}, so it is not looked at" for name in sorted(unseen)]
    return modalities


def _paths(settings: Settings, info: Info | None, only: str | None) -> tuple[dict[str, Path], list[str]]:
    """({split: the file or folder that holds it}, notes)."""
    if settings.data_path is None:
        raise UserError(f"data_path: the data set {settings.dataset_type} needs --data_path, your file or folder")
    find, paths, notes = FileFinder(), {}, []
    path = find(Path(settings.data_path))
    if settings.test_path is not None:
        paths["test"] = find(Path(settings.test_path))
        if paths["test"].resolve() == path.resolve():
            raise UserError(f"test_path: {path} is the training data itself; leave it out to set a part of them aside")
        if settings.dataset_type == "images":
            splits, notes = find_splits(paths["test"])
            if len(splits) > 1:
                shown = ", ".join(map(str, splits.values()))
                raise UserError(f"test_path: {paths['test']} holds several splits; name one of {shown}")
            paths["test"] = splits["train"]
        if info and only == "test":
            return paths, notes
    if info and not path.exists():
        raise UserError(f"{path}: the training data are not there; say with --data_path where they are now, or "
                        "evaluate another labelled set with --test_path")  # fmt: skip
    if settings.dataset_type == "images":
        splits, more = find_splits(path)
        paths, notes = splits | paths, notes + more
    else:
        paths = {"train": path} | paths
    if info and only in paths and only != "train":
        paths = {only: paths[only]}
    return paths, notes


def _split_off(
    items: dict[str, Items], targets: dict[str, np.ndarray], task: Task, settings: Settings, where: str
) -> tuple[list[str], dict[str, np.ndarray] | None]:
    """Take missing test and validation items out of the training items. where: names the data in messages.

    Returns:
        (notes; with settings.fold {'train', 'val'}, the numbers of training items that `_take_out_fold` parts later)
    """
    for found in items.values():
        found.groups = _group_names(found, settings)
    _refuse_shared_groups(items)
    streams = {  # the test set first: it is the same for every seed
        "test": (settings.test_fraction, random_stream("test set")),
        "val": (settings.val_fraction, random_stream("validation", settings.seed)),
    }
    if settings.folds:
        del streams["val"]
        if "val" in items:
            raise UserError(f"folds: {where} has items of its own for validation, and each fold validates a model; put "
                            "them among those for training, or leave --folds out")  # fmt: skip
    notes, shares = [], []
    for name, (fraction, rng) in streams.items():
        if name in items:
            given = name == "test" and settings.test_path  # unused_settings has a note on that
            if fraction != FIELDS[f"{name}_fraction"].default and not given:
                there = "there is a folder" if settings.dataset_type == "images" else "there are items of their own"
                notes.append(f"{name}_fraction has no effect: {there} for {PURPOSES[name]}")
            continue
        train, values = items["train"], targets["train"]
        with naming(f"{where}, to set aside data for {PURPOSES[name]}"):
            strata = task.strata(values)
            if train.groups:
                kept, held_out = grouped_split(strata, train.groups, fraction, rng)
            else:
                kept, held_out = stratified_split(strata, fraction, rng)
        items[name], items["train"] = train.subset(held_out), train.subset(kept)
        targets[name], targets["train"] = values[held_out], values[kept]
        shares.append(f"{name}_fraction {fraction:g} became {len(held_out) / len(values):.3f}")
    groups, fold = {name: found.groups for name, found in items.items() if found.groups}, None
    if settings.fold:
        train = items["train"]
        kept, held_out = fold_split(task.strata(targets["train"]), train.groups, settings)
        fold = {"train": kept, "val": held_out}
        if train.groups:
            groups |= {name: [train.groups[i] for i in numbers] for name, numbers in fold.items()}
    if items["train"].groups:
        counts = ", ".join(f"{len(set(groups.get(name, ())))} for {PURPOSES[name]}" for name in PURPOSES)
        notes.append("; ".join([f"groups: {counts}, none of them in two", *shares]))
    return notes, fold


def _take_out_fold(
    fold: dict[str, np.ndarray], items: dict[str, Items], targets: dict[str, np.ndarray], loaded: dict[str, tuple]
) -> None:
    """Part the training items by the numbers of `fold`. They have been loaded as one, so that what prepares the inputs
    is fitted on all of them and the models of all folds read the same tokens."""

    def parted(values: dict[str, Any], numbers: dict[str, np.ndarray]) -> dict[str, Any]:
        whole = values["train"]
        chosen = {
            name: whole[those] if isinstance(whole, np.ndarray) else [whole[i] for i in those]
            for name, those in numbers.items()
        }
        return values | chosen

    train = items["train"]
    items |= {name: train.subset(numbers) for name, numbers in fold.items()}
    targets |= parted(targets, fold)
    for modality, (there, source, adapter, raw) in loaded.items():
        places = np.full(len(train.values), -1)  # of the training items among those with the modality
        places[there["train"]] = np.arange(len(there["train"]))
        those = {name: places[numbers][places[numbers] >= 0] for name, numbers in fold.items()}
        there = there | {name: np.flatnonzero(places[numbers] >= 0).tolist() for name, numbers in fold.items()}
        source = replace(source, values=parted(source.values, those), places=parted(source.places, those))
        loaded[modality] = there, source, adapter, parted(raw, those)


def _group_names(found: Items, settings: Settings) -> list[str] | None:
    """The group of each item, as the settings say; None if they name no groups.

    Names that look the same to a person are one group: 7 and 7.0, P7 and p7. Separating what belongs together would be
    worse than joining what does not.

    Raises:
        UserError: some items have no group, or the settings are wrong.
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


def _fingerprints(
    items: dict[str, Items], labels: dict[str, list[str]], info: Info | None, checksums: Mapping[Path, int]
) -> dict[str, str]:
    """A checksum of the samples of each split in their order: ids, labels, texts, series, file names.

    If there are files, a checksum of all their bytes follows after a "-", made from that of each file: `checksums`
    has those that are known. Names may be in another normal form of Unicode than in the checkpoint, since data may have
    moved between systems.
    """
    known = (info or {}).get("fingerprints", {})

    def of_names(found: Items, texts: list[str], in_form: Callable[[str], str]) -> str:
        result = 0
        packed = isinstance(found.values, Packed)
        for number, (id, label) in enumerate(zip(found.ids, texts, strict=True)):
            parts = [found.values.contents(number)] if packed else found.by_modality(number).values()
            parts = [in_form(part.name) if isinstance(part, Path) else part for part in parts]
            for part in (in_form(id), label, *parts):
                data = as_utf8(part).encode() if isinstance(part, str) else np.ascontiguousarray(part)
                result = zlib.crc32(data, result)
        return f"{result:08x}"

    def of_files(found: Items) -> str:
        if isinstance(found.values, Packed):
            return ""
        values = [found.by_modality(number).values() for number in range(len(found.values))]
        files = [(part, place) for parts, place in zip(values, found.places, strict=True)
                 for part in parts if isinstance(part, Path)]  # fmt: skip
        if not files:
            return ""
        unknown = {path: place for path, place in files if path not in checksums}
        read = dict(zip(unknown, each(checksum_of, [*unknown], [*unknown.values()]), strict=True))
        sums = [checksums[path] if path in checksums else read[path] for path, _ in files]
        return f"-{zlib.crc32(np.array(sums, '<u4').tobytes()):08x}"

    def fingerprint(found: Items, texts: list[str], before: str) -> str:
        names = of_names(found, texts, str)
        if before and before != names:
            others = (of_names(found, texts, partial(unicodedata.normalize, form)) for form in ("NFC", "NFD"))
            names = before if before in others else names
        return names + of_files(found)

    return {
        name: fingerprint(found, labels[name], known.get(name, "").partition("-")[0]) for name, found in items.items()
    }


# --- Data given in Python --------------------------------------------------------------------------------------------


def load_given_splits(
    settings: Settings, info: Info | None = None, only: str | None = None, own: OwnData | None = None
) -> tuple[Splits, Info]:
    """What the user's own code gives, see own_data.py; what it does not give is split off as by `load_own_splits`."""
    with distributed.first_process_first():  # the user's code may download, too
        given = own_data.load(own, settings)
    sources = given.sources
    if info and only in sources and only != "train":
        sources = {only: sources[only]}
    labelled = settings.task != "reconstruct"
    streamed = isinstance(sources.get("train"), own_data.Stream)
    if streamed and (not labelled or settings.mixup):
        what = "mixup" if labelled else "task: reconstruct"
        raise UserError(f"{what}: not of an iterable; give the training items as a list or a Dataset")
    items = own_data.read_items(sources, own, labelled)
    if labelled:
        task, targets, notes = _given_targets(items, known_task(info), given.class_names, settings, own)
    else:
        task, targets, notes = *_one_class(items), []
    fold = None
    if "train" in items:
        more, fold = _split_off(items, targets, task, settings, own.path or "data")
        notes += more
    if streamed:
        notes.append("train is an iterable: its items are not shuffled here, only their labels were checked, and "
                     "--resume is exact only if it gives the same items in the same order again")  # fmt: skip

    notes += [] if info else own_data.without_effect(given, settings)
    fitted = known_adapters(info, own.classes) if info and given.adapters else {}
    fitted = fitted or (given.adapters and own_data.fit_adapters(given, items["train"], settings, own))
    if fold:
        _take_out_fold(fold, items, targets, {})
    splits = {
        name: own_data.PreparedDataset(
            found.values, found.places, found.ids, targets[name], fitted, settings.max_seq_len, name == "train",
            f"preparing {name}", task.per_token, partial(own_data.target_of, task),
        )
        for name, found in items.items()
    }  # fmt: skip
    if labelled:
        if not info:
            task = task.learn(splits["train"].labels, settings)
        absent = {name: task.absent(data.labels) for name, data in splits.items()}
        notes += [text.format(name) for name, text in absent.items() if text]
    adapters = fitted or known_adapters(info, own.classes) or {
        name: TensorAdapter(width, settings.max_seq_len) for name, width in splits["train"].widths.items()
    }
    for name, data in splits.items():
        for modality, width in data.widths.items():
            own_data.check_width(modality, width, adapters, items[name].places[0])
    prints = {name: own_data.fingerprint(data, task.texts(targets[name])) for name, data in splits.items()}
    code = {"code": {"name": own.name, "checksum": own.checksum}} if own.path else {}
    return splits, description(task, adapters, notes, fingerprints=prints, **code)


def _given_targets(
    items: dict[str, Items], known: Task | None, class_names: list[str] | None, settings: Settings, own: OwnData
) -> tuple[Task, dict[str, Any], list[str]]:
    """As `_targets`. Where names are given, labels are numbers of classes, or names; else they are the names."""
    where = own.path or "data"
    if tasks.task_named(settings.task).per_token:
        refuse_together(
            UserError(f"{place}: label {label!r:.40} is no list; --task {settings.task} needs a label for each token")
            for found in items.values()
            for label, place in zip(found.labels, found.places, strict=True)
            if not isinstance(label, list)
        )
    if class_names is None:
        if settings.task == "multilabel":
            refuse_together(
                UserError(f"{place}: label {label!r:.40} is no list of names; give class_names for numbers 0 and 1")
                for found in items.values()
                for label, place in zip(found.labels, found.places, strict=True)
                if not own_data.is_name(label)
            )
        return _targets(items, known, settings, [], where)
    task = known or tasks.task_named(settings.task)(class_names)
    if getattr(task, "class_names", class_names) != class_names:
        raise UserError(f"{where}: class_names are {class_names}, the checkpoint's {task.class_names}")
    targets, errors = {}, []
    for name, found in items.items():
        targets[name], wrong = own_data.read_targets(task, found)
        errors += wrong
    refuse_together(errors)
    for name, values in targets.items():
        targets[name] = tasks.ragged(values) if task.per_token else np.array(values)
        with naming(f"{where}: {name}"):
            task.check(targets[name], for_training=False)
    return task, targets, []


# --- Hidden tokens ---------------------------------------------------------------------------------------------------


def _hidden(
    splits: Splits, specific: Info, settings: Settings, info: Info | None, own: OwnData | None
) -> tuple[Splits, Info]:
    """The same splits and description, of data of which tokens are to be reconstructed."""
    adapters = known_adapters(specific, own and own.classes)
    contents = {name: adapter.contents for name, adapter in adapters.items()}
    splits = {
        name: HidingDataset(data, settings.mask_ratio, contents, settings.seed, name) for name, data in splits.items()
    }
    task = known_task(info)
    if task is None:
        kinds = {name: adapter.features.get("vocab_size", 0) for name, adapter in adapters.items()}
        train = splits["train"]
        task = tasks.Reconstruct({name: tasks.Contents.of(train, name, number) for name, number in kinds.items()})
    described = description(task, adapters, specific["notes"])
    more = {name: value for name, value in specific.items() if name not in described and name != "class_names"}
    return splits, described | more


# --- By name ---------------------------------------------------------------------------------------------------------

DATASETS: dict[str, Callable[..., tuple[Splits, Info]]] = {
    "synthetic": load_synthetic_splits,
    "cifar10": load_cifar10_splits,
    "digits": load_digits_splits,
    **dict.fromkeys(OWN_DATA, load_own_splits),
}


BUILT_IN = {  # what can be answered about the data sets that are not the user's
    "synthetic": ("classification", "tagging", "reconstruct"),
    **dict.fromkeys(("cifar10", "digits"), ("classification", "reconstruct")),
}
NOT_OFFERED = {"images": ("tagging",), "multimodal": ("tagging",)}  # of the user's files


def check_task(settings: Settings) -> None:
    """Raise UserError for a task that cannot be asked of the data set."""
    tasks.task_named(settings.task)
    refused = NOT_OFFERED.get(settings.dataset_type, ())
    offered = BUILT_IN.get(settings.dataset_type, [name for name in tasks.TASKS if name not in refused])
    if settings.task not in offered:
        raise UserError(f"task: {settings.task} is not offered for {settings.dataset_type}; choose one of "
                        f"{', '.join(offered)}")  # fmt: skip
    if settings.folds and settings.task == "reconstruct":
        name = "select" if settings.select == "auto" else "folds"
        raise UserError(f"{name}: --task reconstruct has no folds, since what is hidden has no answers to take the "
                        f"mean of; leave --{name} out")  # fmt: skip
    if settings.fold and settings.fold > (settings.folds or 0):
        raise UserError(f"fold: {settings.fold} of {settings.folds or 'no'} folds; give --folds, and a --fold up to "
                        "that number")  # fmt: skip


def load_splits(
    settings: Settings, info: Info | None = None, only: str | None = None, own: OwnData | None = None
) -> tuple[Splits, Info]:
    """The data sets {'train', 'val', 'test'} of settings.dataset_type and their description.

    The description holds plain values that a checkpoint can store: dataset_type; the task (see tasks.py) with
    num_outputs and, if it has classes, class_names; for each modality the adapter (see adapters.py) and its features,
    which the model is told; split_sizes, split_seed and notes for the user; for images, how the training images are
    augmented; for the user's own data, a fingerprint of the samples of each split.

    Args:
        info: a description made in training; its adapters and its task are then used. One with nothing but adapters is
            that of the model that a new run starts from: what they know is used where the data are of their kind.
        only: the split that is asked for. Of the user's own data, it alone is read unless it is part of another one.
        own: the user's own code, run for a data set of that name; no name makes code run by itself.
    """
    check_task(settings)
    if is_code(settings.dataset_type) or settings.dataset_type == PYTHON:
        own_data.require(own, settings.dataset_type)
        splits, specific = load_given_splits(settings, info, only, own)
    else:
        asked = {"only": only} if settings.dataset_type in OWN_DATA else {}
        splits, specific = DATASETS[settings.dataset_type](settings, info, **asked)
    if settings.task == "reconstruct":
        splits, specific = _hidden(splits, specific, settings, info, own)
    if only and only not in splits:
        raise UserError(f"split: the mean of {settings.folds} models has no {PURPOSES[only]} data of its own; name the "
                        "model of a fold, such as fold_1/best_model.pth")  # fmt: skip
    sizes = {name: len(splits[name]) for name in ("train", "val", "test") if name in splits}
    if "train" in splits and "val" not in splits:
        sizes["val"] = 0
    prints, known = specific.get("fingerprints", {}), (info or {}).get("fingerprints", {})
    # Earlier versions used file names only: if these are the same, nothing more can be said
    prints = {name: known[name] if text.partition("-")[0] == known.get(name) else text for name, text in prints.items()}
    return splits, {
        "dataset_type": settings.dataset_type,
        **specific,
        "fingerprints": prints,
        "split_sizes": (info or {}).get("split_sizes", {}) | sizes,
        "split_seed": settings.seed,
    }
