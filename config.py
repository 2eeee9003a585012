"""The one list of settings: names, types, defaults, units, checks, the JSON file and the command-line flags.

Default < data set's default < model of init_from < config file < flag: each overrides the one before. On resume the
checkpoint's settings take the place of the defaults. A new setting is one more line in `Settings`.

    args = make_parser("Train a Perceiver.").parse_args()        # args.flags, args.file, args.resume
    settings, sources = resolve(args.flags, args.file)
    print(format_settings(settings, sources, {}))
"""

import argparse
import dataclasses
import difflib
import functools
import json
import math
import os
import shutil
import sys
import textwrap
import typing
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from messages import UserError, printable

# Defaults that depend on the data set; the keys are the names that --dataset takes.
DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    "synthetic": {"model_size": "tiny", "num_epochs": 20, "learning_rate": 5e-4},
    "cifar10": {"model_size": "base", "num_epochs": 100, "patch_size": 4, "flip": True},
    "digits": {
        "model_size": "tiny",
        "patch_size": 2,
        "num_epochs": 80,
        "learning_rate": 1e-3,
        "label_smoothing": 0.1,
        "ema_decay": 0.995,
        "select_by": "last",
    },
    "images": {"model_size": "small", "patch_size": 8, "num_epochs": 50},
    "sequences": {
        "model_size": "tiny",
        "num_epochs": 100,
        "learning_rate": 1e-3,
        "label_smoothing": 0.1,
        "ema_decay": 0.995,
    },
    "text": {
        "model_size": "tiny",
        "num_epochs": 40,
        "learning_rate": 5e-4,
        "label_smoothing": 0.1,
        "ema_decay": 0.98,
        "max_seq_len": 2048,
        "stem": "conv",
    },
    "multimodal": {"model_size": "tiny", "patch_size": 8, "num_epochs": 50, "max_seq_len": 2048},
}
# Defaults of series_recipe, over those of the data set sequences.
SERIES_RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "strong": {
        "stem": "conv",
        "series_shift": 0.1,
        "series_warp": 0.2,
        "series_scale": 0.1,
        "num_epochs": 40,
        "epoch_samples": 1600,
    },
}
# Defaults of image_recipe, which says itself what is done to an image.
IMAGE_RECIPES: dict[str, dict[str, Any]] = {"plain": {}, "strong": {"mixup": 0.2, "cutmix": 1.0}}
# What --select auto chooses between: of each candidate a name, and the settings that it changes. What is given as a
# flag or in a file holds for all of them.
_STEPS = {"num_epochs": 32, "epoch_samples": 1600}  # 1,600 steps or more for all, so that tokens are compared
_UNPLACED = _STEPS | {"stem": "conv", "use_positions": False, "series_warp": 0.2, "series_scale": 0.1}
SHORT_SERIES = 100  # steps: where the median length is below this, the candidates are those of "short series"
CANDIDATES: dict[str, dict[str, dict[str, Any]]] = {  # of equally good ones the first is taken
    "sequences": {
        "unplaced": _UNPLACED,
        "circular": _STEPS | {"stem": "conv", "series_circular": True, "series_warp": 0.2, "series_scale": 0.1},
        "windows_unplaced": _STEPS | {"series_window": 16, "use_positions": False},
    },
    "short series": {
        "unchanged": _STEPS | {"stem": "conv"},
        "unplaced_unchanged": _STEPS | {"stem": "conv", "use_positions": False},
        "unplaced": _UNPLACED,
    },
    **dict.fromkeys(("images", "cifar10", "digits"), {
        "patches": {},
        "conv": {"stem": "conv"},
        "strong": {"image_recipe": "strong"} | IMAGE_RECIPES["strong"],
        "strong_conv": {"image_recipe": "strong", "stem": "conv"} | IMAGE_RECIPES["strong"],
    }),
    "text": {"conv": {}, "bytes": {"stem": "none"}, "dropout": {"dropout": 0.3}, "mixup": {"mixup": 0.2}},
    "others": {"plain": {}, "dropout": {"dropout": 0.3}, "mixup": {"mixup": 0.2}},
}  # fmt: skip
_BEFORE = {"stem": "none"}  # what older runs did that do not say so, where new ones of their data do otherwise
OWN_DATA = ("images", "sequences", "text", "multimodal")  # data sets that are read from data_path
PYTHON = "python"  # the data set that is given to train.train(); one of a file such as my_data.py is called as the file
LAST_CHECKPOINT = "last_model.pth"  # what --resume without a path reads, in checkpoint_dir
_LAST = object()  # --resume without a path, until checkpoint_dir is known
_TOO_LARGE = 2**31  # upper bound of every integer setting
MOST_WORKERS = 16  # that are chosen without being asked for
_NAMED = 20  # unknown names that get a line each; finding the nearest valid one takes time


def _setting(default: Any, help: str, unit: str = "", *, group: str, on_resume: str, **rules: Any) -> Any:
    """A field of `Settings`.

    on_resume: what happens when a resumed run changes the value. 'free': the training stays the same; 'inexact':
        allowed, but the result is no longer that of an unbroken run; 'fixed': refused.
    rules: `flag` (if it differs from the name), `choices`, the limits `at_least`, `at_most`, `above` and `below`,
        `applies` ({other setting: the values with which this one has an effect}) and `metavar` (for --help). Sizes
        have an upper limit far above any use, so that a typing error or a forged file is refused and not computed for
        hours.
    """
    metadata = {"help": help, "unit": unit, "group": group, "on_resume": on_resume, **rules}
    return dataclasses.field(default=default, metadata=metadata)


_data = functools.partial(_setting, group="Data", on_resume="fixed")
_column = functools.partial(_setting, group="Data", on_resume="free")
_model = functools.partial(_setting, group="Model", on_resume="fixed")
_start = functools.partial(_setting, group="Start", on_resume="fixed")
_training = functools.partial(_setting, group="Training", on_resume="inexact")
_files = functools.partial(_setting, group="Files", on_resume="free")

_SYNTHETIC = {"dataset_type": ("synthetic",)}
_CIFAR10 = {"dataset_type": ("cifar10",)}
_OUR_IMAGES = {"dataset_type": ("cifar10", "digits", "images", "multimodal")}
_IMAGES = {"dataset_type": (*_OUR_IMAGES["dataset_type"], PYTHON)}
_OWN_IMAGES = {"dataset_type": ("images", "multimodal", PYTHON)}
_IMAGE_FILES = {"dataset_type": ("images", "multimodal")}
_SEQUENCES = {"dataset_type": ("synthetic", "sequences", "text", "multimodal", PYTHON)}
_FILES = {"dataset_type": OWN_DATA}
_OWN = {"dataset_type": (*OWN_DATA, PYTHON)}
_TABLES = {"dataset_type": ("sequences", "text", "multimodal")}
_SERIES = {"dataset_type": ("sequences",)}
_STEMS = {"dataset_type": ("cifar10", "digits", "images", "sequences", "text", "multimodal", PYTHON)}
_WINDOWS = {"dataset_type": ("sequences", "multimodal", PYTHON)}
_OWN_SERIES = {"dataset_type": ("sequences", "multimodal")}
_MULTIMODAL = {"dataset_type": ("multimodal",)}
_CLASSES = {"task": ("classification", "multilabel", "tagging")}
_OF_ITEMS = ("classification", "regression", "multilabel")  # one answer for a sample
_NOT_CACHED = {"cache_features": (False,)}


def _augment(help: str, unit: str = "") -> Any:
    """A change of training series at random: off by default, whether it is a share or a switch."""
    limits = {"at_least": 0, "below": 1} if unit else {}
    applies = _OWN_SERIES | _NOT_CACHED | {"augment": (True,)}
    return _data(0.0 if unit else False, help, unit, applies=applies, on_resume="inexact", **limits)


@dataclass(frozen=True)
class Settings:
    """All settings of a run. Every value is checked, so a `Settings` that exists is valid.

    `resolve` applies the data set's defaults; calling the class itself does not.

    Raises:
        UserError: a line for each wrong value.
    """

    dataset_type: str = _data(
        "synthetic", "data set: built in, of your files (--data_path), or a file of your code (docs/data.md)",
        flag="dataset", choices=tuple(DATASET_DEFAULTS))
    data_path: str | None = _data(None, "your data, a file or folder", applies=_OWN, on_resume="free")
    test_path: str | None = _data(
        None, "your test data; none = the folder test/, or test_fraction", applies=_FILES, on_resume="free")
    test_fraction: float = _data(
        0.2, "share of your data kept for the test where there is no test data", "fraction", above=0, below=1,
        applies=_OWN | {"test_path": (None,)})
    task: str = _data(
        "classification", "what is predicted: classification, regression, multilabel, tagging, reconstruct "
        "(docs/tasks.md)", metavar="NAME")  # tasks.py knows which there are
    mask_ratio: float = _data(
        0.5, "tokens of each sample that are hidden", "fraction", above=0, below=1,
        applies={"task": ("reconstruct",)})
    id_column: str = _column("id", "column of an item's name", applies=_TABLES)
    text_column: str = _column("text", "column of the text", applies={"dataset_type": ("text", "multimodal")})
    image_column: str = _column("image", "column of the image's file", applies=_MULTIMODAL)
    series_column: str = _column("series", "column of the series' file", applies=_MULTIMODAL)
    label_column: str = _column(
        "label", "column of the label; of numbers, and of labels that are 1 or 0, several: price,weight; of text to "
        "tag: spans", applies=_TABLES)
    feature_columns: str | None = _column(
        None, "columns of the features, in this order: acc,gyro; none = all others", applies=_SERIES)
    ignore_columns: str | None = _column(None, "columns to leave out of the features: time,station", applies=_SERIES)
    table_rows: str = _column(
        "auto", "what a row of a table is: a step of a series, or a whole series; auto = decided from the table",
        choices=("auto", "steps", "series"), applies=_SERIES)
    delimiter: str | None = _column(
        None, "what separates the cells of a table, such as ';' or tab; none = found out", metavar="CHARACTER",
        applies=_TABLES)
    encoding: str | None = _column(
        None, "of text files, such as cp949; none = UTF-8, or what their first bytes say", metavar="NAME",
        applies=_TABLES)
    quoting: str = _column(
        "auto", "quotes in a table: excel = as Excel writes them, none = plain text; auto = excel, except in a file "
        "with tabs where they make no sense", choices=("auto", "excel", "none"), applies=_TABLES)
    max_unpacking: int = _column(
        100, "how large an unpacked .npz may be (256 MiB are always read)", "times its size", at_least=1,
        applies=_SERIES)
    group_column: str | None = _data(
        None, "column of groups that a split must not divide: patient, speaker, device", applies=_FILES)
    group_pattern: str | None = _data(
        None, "the same, as a regular expression in an item's id or path: '(patient[0-9]+)'", applies=_OWN)
    data_dir: str = _data("data", "folder of the downloaded data", applies=_CIFAR10, on_resume="free")
    num_samples: int = _data(
        2000, "to generate for training and validation; the test set is a fifth as many", "sequences",
        at_least=1, applies=_SYNTHETIC)
    seq_len_range: tuple[int, int] = _data(
        (50, 200), "shortest and longest sequence", "tokens", at_least=1, applies=_SYNTHETIC)
    feature_dim: int = _data(64, "width of a token", "features", at_least=1, applies=_SYNTHETIC)
    num_classes: int = _data(5, "number of classes", "classes", at_least=2, applies=_SYNTHETIC)
    max_seq_len: int | None = _data(
        None, "longer sequences are cut to this; none = no limit", "tokens", at_least=1, applies=_SEQUENCES)
    image_size: int = _data(
        64, "side of the square to which your images are scaled and cropped", "pixels", at_least=1, at_most=16_384,
        applies=_OWN_IMAGES)
    image_bits: int | None = _data(
        None, "bits in use of your 16-bit grey images; none = what the training images need", "bits",
        at_least=8, at_most=16, applies=_OWN_IMAGES)
    patch_size: int = _data(4, "side of a square patch, one token", "pixels", at_least=1,
        applies=_IMAGES | {"stem": ("none",)})
    series_recipe: str = _data(
        "plain", "defaults for series: strong = convolutions, random changes, at least 2,000 steps",
        choices=tuple(SERIES_RECIPES), applies=_SERIES)
    stem: str = _data(
        "none", "what the encoder reads: convolutions over the steps of series, the bytes of text and the pixels of "
        "images, or these themselves (windows, patches)", choices=("none", "conv"), applies=_STEMS)
    series_window: int | None = _data(
        None, "consecutive steps of a series that make a token; none = one, or what the stem makes of them", "steps",
        at_least=1, at_most=10_000, applies=_WINDOWS)
    series_stride: int | None = _data(
        None, "from a token of a series to the next; none = a quarter of the window, or of the stem conv as many as "
        "make 64 tokens of half of the series", "steps", at_least=1, at_most=10_000, applies=_WINDOWS)
    augment: bool = _data(
        True, "change training samples at random, as the next settings say; images are moved, too",
        applies=_NOT_CACHED, on_resume="inexact")
    flip: bool = _data(
        False, "mirror training images at random, half of them",
        applies=_OUR_IMAGES | _NOT_CACHED | {"augment": (True,)},
        on_resume="inexact")
    image_recipe: str = _data(
        "plain", "how training images are changed: plain = shifted; strong = cropped, RandAugment, erased in part, "
        "mixup and CutMix", choices=tuple(IMAGE_RECIPES), applies=_OUR_IMAGES | _NOT_CACHED | {"augment": (True,)},
        on_resume="inexact")
    series_shift: float = _augment("shift training series in time by up to this, either way", "share of its length")
    series_circular: bool = _augment("training series are closed, as an outline is: start them anywhere")
    series_warp: float = _augment("warp time of training series", "deviation of the log of the speed")
    series_crop: float = _augment("cut up to this off training series and stretch the rest", "share of its length")
    series_scale: float = _augment("scale the values of training series", "deviation of the log of the factor")
    series_jitter: float = _augment("add noise to the values of training series", "deviations of the channel")
    series_share: float = _data(
        1.0, "how many training series are so changed, drawn anew in each epoch", "share", above=0, at_most=1,
        applies=_OWN_SERIES | _NOT_CACHED | {"augment": (True,)}, on_resume="inexact")
    mixup: float = _data(
        0.0, "mix each training sample with another, in shares from this Beta distribution; 0 = off", "alpha",
        at_least=0, applies=_NOT_CACHED | {"augment": (True,), "task": _OF_ITEMS}, on_resume="inexact")
    cutmix: float = _data(
        0.0, "put a part of another image into each training image, as large as this Beta distribution says; 0 = off",
        "alpha", at_least=0, applies=_NOT_CACHED | {"augment": (True,), "task": _OF_ITEMS,
        "dataset_type": ("cifar10", "digits", "images")}, on_resume="inexact")
    val_fraction: float = _data(
        0.1, "training data kept for validation", "fraction", above=0, below=1, applies={"folds": (None,)})
    folds: int | None = _data(
        None, "train so many models, each on all but a part of the training data, which validates it, and answer with "
        "their mean (docs/small_data.md); none = one model", "models", at_least=2, at_most=100)
    fold: int | None = _data(None, "train only the model of this fold; none = all of them", "from 1", at_least=1)
    select: str = _data(
        "none", "choose tokens, random changes or dropout by folds of the training data (docs/small_data.md): auto = "
        "the best of a few candidates", choices=("none", "auto"), applies={"fold": (None,)})
    select_share: float = _data(
        0.2, "how long each of these candidates is trained", "share of its epochs", above=0, at_most=1,
        applies={"select": ("auto",)})
    bucket_by_length: bool = _data(
        False, "batch sequences of similar length: less padding", applies=_SEQUENCES, on_resume="inexact")
    num_workers: int | None = _data(
        None, "processes that load data; 0 = the training process; none = 0, and for images that are read from files "
        "one for each processor core, at most 16", "processes", at_least=0, at_most=1024, on_resume="free")
    cache: str = _data(
        "auto", "where the pixels of your images are kept once they were read: memory, a file on disk, or none; auto = "
        "memory up to 0.75 GiB, else none", choices=("auto", "memory", "disk", "none"), applies=_IMAGE_FILES,
        on_resume="free")
    cache_dir: str | None = _data(
        None, "folder of what is remembered about your images; none = hidden files beside them",
        applies=_IMAGE_FILES, on_resume="free")

    init_from: str | None = _start(
        None, "another model whose weights a new run starts from: a checkpoint, or a published one")
    init_checksum: str | None = _start(
        None, "of the file of init_from, written by the run; if given, another file is refused",
        "SHA-256", metavar="HEX")
    freeze: str = _start(
        "none", "what keeps the weights of init_from; encoder = all but the last linear layer",
        choices=("none", "encoder"))
    cache_features: bool = _start(
        False, "encode the data once and train the last layer on that: the same answers, sooner",
        applies={"freeze": ("encoder",)})
    lr_encoder_scale: float = _start(
        1.0, "learning rate of all but the last linear layer", "times learning_rate", above=0,
        applies={"freeze": ("none",)})

    model_size: str = _model(
        "base", "preset of the model", choices=("tiny", "small", "base", "large"), applies={"init_from": (None,)})
    d_model: int | None = _model(
        None, "width of a latent; none = the preset's", "features", at_least=1, at_most=100_000)
    num_heads: int | None = _model(None, "heads of an attention; none = the preset's", "heads", at_least=1)
    num_latents: int | None = _model(
        None, "number of latents; none = the preset's", "latents", at_least=1, at_most=100_000)
    num_cross_attention_layers: int | None = _model(
        None, "how often the latents read the input; none = the preset's", "layers", at_least=1, at_most=1000)
    num_self_attention_layers: int | None = _model(
        None, "self-attention layers in all; none = the preset's", "layers", at_least=1, at_most=1000)
    num_cross_attention_heads: int | None = _model(
        None, "heads of a cross-attention; none = num_heads", "heads", at_least=1)
    cross_attention_dim: int | None = _model(
        None, "width inside a cross-attention; none = d_model", "features", at_least=1, at_most=100_000)
    mlp_ratio: int = _model(4, "hidden width of an MLP", "times its input", at_least=1, at_most=1000)
    dropout: float = _model(
        0.1, "dropout of block outputs in training", "fraction", at_least=0, below=1, on_resume="inexact")
    attention_dropout: float = _model(
        0.0, "dropout of attention weights in training", "fraction", at_least=0, below=1, on_resume="inexact")
    share_weights: bool = _model(False, "share weights between the repeats of cross- and self-attention")
    use_positions: bool = _model(True, "add position features to the input")
    num_frequency_bands: int | None = _model(
        None, "frequencies per axis of the position features; none = chosen from the data", "bands",
        at_least=1, at_most=10_000, applies={"use_positions": (True,)})
    gradient_checkpointing: bool = _model(
        False, "recompute activations: less memory, more time, same result", on_resume="free")

    num_epochs: int = _training(
        100, "passes over the training data, see epoch_samples", "epochs", flag="epochs", at_least=1, on_resume="free")
    epoch_samples: int = _training(
        0, "smallest epoch: fewer training items are passed over again and again until they are as many; 0 = one pass",
        "samples", at_least=0, at_most=1_000_000, applies=_OWN, on_resume="fixed")
    batch_size: int = _training(32, "size of a batch", "samples", at_least=1)
    learning_rate: float = _training(3e-4, "highest rate of the schedule", "per step", flag="lr", above=0)
    weight_decay: float = _training(0.05, "AdamW's decay of weight matrices", "times the rate", at_least=0)
    warmup_fraction: float = _training(
        0.1, "steps during which the learning rate rises", "fraction of all steps", at_least=0, below=1,
        on_resume="fixed")
    label_smoothing: float = _training(
        0.0, "share of the target spread over all classes", "fraction", at_least=0, below=1,
        applies={"task": ("classification", "tagging")})
    class_weights: str = _training(
        "none", "weights of the classes in the loss; balanced = rare classes weigh more", choices=("none", "balanced"),
        applies=_CLASSES, on_resume="fixed")
    select_by: str | None = _training(
        None, "validation score that picks the best epoch: loss, balanced_accuracy, macro_f1, mae, ...; last = the "
        "last epoch, whatever its score; none = the task's own: accuracy, rmse, macro_f1, span_f1 of texts",
        metavar="SCORE", on_resume="fixed")
    tune_thresholds: bool = _training(
        False, "choose on validation data from which probability a label is predicted; else 0.5",
        applies={"task": ("multilabel",)}, on_resume="fixed")
    grad_clip: float = _training(1.0, "largest gradient of a step; 0 = no limit", "L2 norm", at_least=0)
    ema_decay: float = _training(
        0.0, "evaluate and keep a moving average of the weights; 0 = the weights themselves",
        "share kept in a step, at most (1 + steps) / (10 + steps)", at_least=0, below=1)
    accumulation_steps: int = _training(1, "batches in an optimizer step", "batches", at_least=1)
    amp: str = _training(
        "auto", "mixed precision; auto = where the hardware is good at it",
        choices=("auto", "bf16", "fp16", "off"))
    compile: bool = _training(False, "torch.compile the model: slower start, faster steps", applies=_NOT_CACHED)
    device: str = _training(
        "auto", "device to train on; auto = the best there is", choices=("auto", "cuda", "mps", "cpu"))
    early_stopping_patience: int = _training(
        0, "stop after this long without a better validation score; 0 = never", "epochs",
        at_least=0, on_resume="free")
    seed: int = _training(0, "seed of all random numbers", at_least=0, on_resume="fixed")

    checkpoint_dir: str = _files("checkpoints", "folder of best_model.pth and last_model.pth")
    log_dir: str = _files("runs", "folder of the logs")
    save_every: int = _files(
        0, "steps between two saves; 0 = only at the end of an epoch", "optimizer steps", at_least=0)

    def __post_init__(self) -> None:
        checked, problems = _check(vars(self))
        _refuse(problems)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types: a tuple becomes a list."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Settings":
        """The settings that `to_dict` wrote; a missing one takes its default, or what runs did before it was there.

        Raises:
            UserError: a line for each unknown name and each wrong value.
        """
        return resolve(file=_BEFORE | {**values})[0]


FIELDS: dict[str, dataclasses.Field] = {field.name: field for field in dataclasses.fields(Settings)}
MODEL_SETTINGS = [name for name, field in FIELDS.items() if field.metadata["group"] == "Model" and name != "model_size"]


# --- One value -------------------------------------------------------------------------------------------------------


def flag_of(name: str) -> str:
    """The flag of a setting: 'learning_rate' -> '--lr'."""
    return "--" + FIELDS[name].metadata.get("flag", name)


def is_code(dataset: Any) -> bool:
    """Whether a data set is a file of the user's own Python code, which own_data.py reads."""
    return isinstance(dataset, str) and dataset.endswith(".py")


def _is_optional(field: dataclasses.Field) -> bool:
    return type(None) in typing.get_args(field.type)


def _kind(field: dataclasses.Field) -> type:
    """bool, int, float, str or tuple."""
    if _is_optional(field):
        return typing.get_args(field.type)[0]
    return typing.get_origin(field.type) or field.type


def _number(kind: type, rules: Mapping[str, Any], value: Any) -> int | float:
    """`value` as int or float within the limits; an int may be written as a whole float (1e5).

    Raises:
        ValueError, TypeError, OverflowError: it is something else, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError
    number = kind(value)
    if kind is int and (number != value or number >= _TOO_LARGE):
        raise ValueError
    if not rules.get("at_least", -math.inf) <= number < rules.get("below", math.inf):
        raise ValueError
    if number > rules.get("at_most", math.inf):
        raise ValueError
    if number <= rules.get("above", -math.inf):
        raise ValueError
    return number


def _convert(field: dataclasses.Field, value: Any) -> Any:
    """`value` in the declared type.

    Raises:
        ValueError, TypeError, OverflowError: it is of another type, or out of range.
    """
    kind, rules = _kind(field), field.metadata
    if value is None and _is_optional(field):
        return None
    if field.name.endswith("_columns") and isinstance(value, (list, tuple)):  # names, as a JSON file may list them
        value = ",".join(f'"{name}"' if "," in name else name for name in value)
    if kind in (int, float):
        return _number(kind, rules, value)
    if kind is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError
        low, high = (_number(int, rules, item) for item in value)
        if low > high:
            raise ValueError
        return low, high
    of_code = field.name == "dataset_type" and (is_code(value) or value == PYTHON)
    if not isinstance(value, kind) or (value not in rules.get("choices", [value]) and not of_code):
        raise ValueError
    if kind is str and (not value or any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value)):
        raise ValueError  # an empty path, or one that cannot be written as UTF-8
    return value


def _from_text(field: dataclasses.Field, text: str) -> Any:
    """The value that a text stands for in the field's type; the text itself if it stands for none."""
    if text.lower() == "none" and _is_optional(field):
        return None
    readers = {bool: ({"true": True, "false": False}.__getitem__,), str: ()}
    for read in readers.get(_kind(field), (int, float)):
        try:
            return read(text)
        except (ValueError, KeyError):
            continue
    return text


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _shown(value: Any) -> str:
    """A refused value as JSON writes it, cut to a readable length."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to print very long ones
        return f"a whole number of {value.bit_length()} bits"
    text = json.dumps(value, ensure_ascii=False, default=repr)
    text = text if text.isprintable() else json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def _expected(field: dataclasses.Field, none: str) -> str:
    """What a valid value looks like: 'a whole number (epochs) of at least 1'."""
    kind, rules = _kind(field), field.metadata
    if "choices" in rules:
        file = ", or a file of yours such as my_data.py" if field.name == "dataset_type" else ""
        return "one of " + ", ".join(rules["choices"]) + file
    nouns = {int: "a whole number", float: "a number", tuple: "two whole numbers"}
    text = nouns.get(kind, "text" if kind is str else "true or false")
    text += f" ({rules['unit']})" if rules["unit"] else ""
    limits = {"at_least": "of at least", "at_most": "at most", "above": "above", "below": "below"}
    text += " and".join(f" {limits[rule]} {rules[rule]}" for rule in limits if rule in rules)
    text += ", the lower first" if kind is tuple else ""
    return text + (f", or {none}" if _is_optional(field) else "")


def _nearest(word: str, valid: Iterable[str]) -> str:
    """The valid word most like `word`; if some begin with it, one of those."""
    word = word.lower().lstrip("-")[:80]  # comparing a long one would take minutes
    longer = [candidate for candidate in valid if candidate.startswith(word)]
    return difflib.get_close_matches(word, longer or list(valid), n=1, cutoff=0.0)[0]


def _unknown_name(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{_shown(name)}: unknown setting; settings are not nested, move what is inside to the top"
    spellings = {word: setting for setting in FIELDS for word in (setting, flag_of(setting)[2:])}
    nearest = spellings[_nearest(str(name), spellings)]
    return f"{_shown(name)}: unknown setting, the nearest valid name is {nearest}"


def _check(
    values: Mapping[str, Any], place: Callable[[str], str] = str, none: str = "null"
) -> tuple[dict[str, Any], list[str]]:
    """(the valid values in their declared types, a line for each unknown name and each refused value).

    place: turns a name into the words that say where the value was given.
    none: how None is written there.
    """
    unknown = [(name, value) for name, value in values.items() if name not in FIELDS]
    checked, problems = {}, [place(_unknown_name(*pair)) for pair in unknown[:_NAMED]]
    if len(unknown) > _NAMED:
        problems.append(place(f"{len(unknown) - _NAMED} more unknown settings"))
    for name, value in values.items():
        if name not in FIELDS:
            continue
        field = FIELDS[name]
        try:
            checked[name] = _convert(field, value)
        except (ValueError, TypeError, OverflowError):
            remark = ""
            if isinstance(value, str) and _from_text(field, value) != value:
                remark = " (text: write it without the quotes)"
            elif isinstance(value, (int, float)) and value >= _TOO_LARGE:
                remark = " (too large)"
            expected = _expected(field, none)
            problems.append(f"{place(name)}: expected {expected}, got {_shown(value)}{remark}")
    return checked, problems


def check_settings(values: Mapping[str, Any], place: Callable[[str], str] = str) -> None:
    """Check settings by name.

    Raises:
        UserError: a line for each unknown or wrong one.
    """
    _refuse(_check(values, place)[1])


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UserError("\n".join(problems))


# --- Where values come from ------------------------------------------------------------------------------------------


def load_json(path: str) -> dict[str, Any]:
    """The checked settings of a JSON file.

    Raises:
        UserError: a line for each problem, with the file's name.
    """
    repeated = []

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        repeated.extend(sorted(name for name, count in counts.items() if count > 1))
        return dict(pairs)

    try:
        with open(path, encoding="utf-8-sig") as file:
            values = json.load(file, object_pairs_hook=to_dict)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: not JSON: {error.msg} at {where}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f'{path}: expected an object such as {{"batch_size": 32}}, got {_shown(values)}')
    checked, problems = _check(values, lambda name: f"{path}: {name}")
    twice = [f"{path}: {_shown(name)}: given more than once, keep one" for name in repeated[:_NAMED]]
    if len(repeated) > _NAMED:
        twice.append(f"{path}: {len(repeated) - _NAMED} more names are given more than once")
    _refuse(twice + problems)
    return checked


def resolve(
    flags: Mapping[str, Any] | None = None,
    file: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
    own: Mapping[str, Any] | None = None,
    start: Mapping[str, Any] | None = None,
) -> tuple[Settings, dict[str, str]]:
    """(the settings in force, where each came from: 'default', 'data set', 'recipe', 'init_from', 'checkpoint', 'file'
    or 'flag').

    Args:
        flags, file: the settings given there, by name.
        base: the settings of the checkpoint to resume from; they take the place of the defaults, and a change to one
            that is 'fixed' on resume is refused.
        own: the defaults of a data set of the user's own code.
        start: what the model that a new run starts from says about it.

    Raises:
        UserError: a line for each problem.
    """
    flags, file, checkpoint = flags or {}, file or {}, _BEFORE | {**base} if base else {}
    _refuse(_check(checkpoint, "checkpoint: {}".format)[1] + _check(file)[1] + _check(flags)[1])
    defaults = {name: field.default for name, field in FIELDS.items()}
    chosen = ChainMap(flags, file, checkpoint, defaults)
    dataset = DATASET_DEFAULTS.get(chosen["dataset_type"], own or {})
    # Defaults that give way: a stem where tokens are asked for by their positions, the last epoch where a score ends it
    gives_way = {"stem": chosen["task"] == "reconstruct", "select_by": chosen["early_stopping_patience"] != 0}
    dataset = {name: value for name, value in dataset.items() if not gives_way.get(name)}
    recipe = SERIES_RECIPES[chosen["series_recipe"]] if chosen["dataset_type"] == "sequences" else {}
    if chosen["dataset_type"] in _OUR_IMAGES["dataset_type"]:
        recipe = IMAGE_RECIPES[chosen["image_recipe"]]
    layers = {"default": defaults, "data set": dataset, "recipe": recipe, "init_from": start or {}}
    layers |= {"checkpoint": checkpoint, "file": file, "flag": flags}
    values, sources = {}, {}
    for source, layer in layers.items():
        values.update(layer)
        sources.update(dict.fromkeys(layer, source))
    settings = Settings(**values)
    if base is not None:
        _refuse([
            f"{name}: cannot change on resume, the checkpoint has {_text(old)}, the {sources[name]} "
            f"{_text(new)}; leave it out, or start a new run without --resume"
            for name, (old, new) in changed_settings(base, settings)["fixed"].items()
        ])
    return settings, sources


def has_effect(settings: Settings, name: str) -> bool:
    """Whether a setting has an effect in this run: num_samples, say, has none on images."""
    conditions = FIELDS[name].metadata.get("applies", {})
    in_force = _in_force(settings)
    return all(in_force[other] in values for other, values in conditions.items())


def _in_force(settings: Settings) -> dict[str, Any]:
    return vars(settings) | ({"dataset_type": PYTHON} if is_code(settings.dataset_type) else {})


def unused_settings(settings: Settings, sources: Mapping[str, str]) -> list[str]:
    """A line for each setting that was given in the file or as a flag and has no effect in this run."""
    notes, in_force = [], _in_force(settings)
    for name, field in FIELDS.items():
        if sources[name] in ("file", "flag", "given") and not has_effect(settings, name):
            for other, values in field.metadata["applies"].items():
                if in_force[other] in values:
                    continue
                needed = " or ".join("FILE.py" if value == PYTHON else _text(value) for value in values)
                notes.append(f"{name} ({sources[name]}) has no effect: it needs {other} {needed}, "
                             f"not {_text(getattr(settings, other))}")
    changes = [name for name in FIELDS if name.startswith("series_") and FIELDS[name].default in (0.0, False)]
    shared = has_effect(settings, "series_share") and settings.series_share < 1
    if shared and not any(getattr(settings, name) for name in changes):
        notes.append("series_share has no effect: no change of series is on, such as --series_warp 0.2")
    return notes


def changed_settings(base: Mapping[str, Any], settings: Settings) -> dict[str, dict[str, tuple[Any, Any]]]:
    """What differs from a checkpoint's settings: {'free' | 'inexact' | 'fixed': {name: (old, new)}}.

    A setting without effect in this run counts as unchanged.
    """
    old, changes = Settings.from_dict(base), {"free": {}, "inexact": {}, "fixed": {}}
    for name, field in FIELDS.items():
        pair = getattr(old, name), getattr(settings, name)
        if pair[0] != pair[1] and has_effect(settings, name):
            changes[field.metadata["on_resume"]][name] = pair
    return changes


def check_folder(name: str, settings: Settings, sources: Mapping[str, str], *signs: str) -> None:
    """Check the folder that a checkpoint, which anybody may have written, wants written into.

    It may be one within the current folder, or one that has been in use: it holds a file or folder named in `signs`.

    Raises:
        UserError: it is neither.
    """
    if sources[name] != "checkpoint" or not has_effect(settings, name):
        return
    folder = Path(os.path.abspath(getattr(settings, name)))
    if not folder.is_relative_to(Path.cwd()) and not any((folder / sign).exists() for sign in signs):
        raise UserError(f"{name}: the checkpoint would write into {_shown(str(folder))}, outside the current folder; "
                        f"if that is right, say so with {flag_of(name)}")


def cache_path(settings: Settings, name: str, data: Path | None = None) -> Path:
    """The file of what is remembered about images under this name. data: their folder or manifest, data_path or
    test_path, in or beside which it lies without a cache_dir: hidden, and a file, since to other programs that read
    folders of images another folder would be another class."""
    if settings.cache_dir:
        return Path(settings.cache_dir, name)
    data = data or Path(settings.data_path)
    return (data if data.is_dir() else data.parent) / f".perceiver_{name}"


def check_cache(settings: Settings, sources: Mapping[str, str]) -> None:
    """`check_folder` of the pixels on disk: where a checkpoint names the place, they are put there if it is in use."""
    if not has_effect(settings, "cache") or settings.cache != "disk" or settings.data_path is None:
        return
    named_by_checkpoint = sources["cache_dir" if settings.cache_dir else "data_path"] == "checkpoint"
    path = Path(os.path.abspath(cache_path(settings, "images-")))
    in_use = any(path.parent.glob(f"{path.name}*"))
    if named_by_checkpoint and not path.is_relative_to(Path.cwd()) and not in_use:
        raise UserError(f"cache: the checkpoint would write into {_shown(str(path.parent))}, outside the current "
                        "folder; if that is right, say so with --cache_dir")  # fmt: skip


def format_settings(settings: Settings, sources: Mapping[str, str], in_force: Mapping[str, Any]) -> str:
    """The settings that were given or are not at their default, aligned, with unit and source.

    in_force: what `auto` and `none` stand for in this run, by name.
    """
    rows = []
    for name, field in FIELDS.items():
        value, unit = getattr(settings, name), field.metadata["unit"]
        if sources[name] in ("default", "checkpoint") and value == field.default and name != "dataset_type":
            continue
        if has_effect(settings, name):
            shown = _text(value)
            if value in ("auto", None):
                shown += f" = {in_force.get(name) or _meaning(field, shown)}"
            elif unit:
                shown += f" [{unit}]"
            rows.append((name, printable(shown), sources[name]))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {name:<{widths[0]}}  {shown:<{widths[1]}}  {source}" for name, shown, source in rows)


def _meaning(field: dataclasses.Field, word: str) -> str:
    """What the help says that `auto` or `none` is: 'no limit' of '...; none = no limit'."""
    return field.metadata["help"].partition(f"{word} = ")[2].partition(";")[0].partition(",")[0] or "none"


# --- What "auto" means on this machine -------------------------------------------------------------------------------


def choose_device(device: str) -> torch.device:
    """The device that the setting names; auto is the first available of cuda, mps, cpu.

    Raises:
        UserError: it is not available here.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [name for name in there if there[name]]
    if device == "auto":
        return torch.device(usable[0])
    if device not in usable:
        raise UserError(f"device: {device} is not available here; choose one of auto, {', '.join(usable)}")
    return torch.device(device)


def usable_device(device: str | torch.device) -> torch.device:
    """Any device of torch's, such as 'cuda:1'.

    Raises:
        UserError: there is no such device, or not here.
    """
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # no such word, no driver, no such card
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"device: {device!s} cannot be used here: {reason}; choose_device('auto') finds one") from error


def memory_of(device: torch.device | str) -> float:
    """The whole memory of the device [bytes]; infinity where it cannot be known."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if torch.device(device).type == "cpu" and hasattr(os, "sysconf"):  # not on Windows
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return math.inf


def check_memory(needed: float, what: str, device: torch.device | str = "cpu") -> None:
    """Check that so many bytes are no more than the whole memory of the device, if that can be known.

    Raises:
        UserError: they are more.
    """
    if needed > (there := memory_of(device)):
        raise UserError(f"{what} would take {needed / 2**30:,.0f} GiB, and {device} has {there / 2**30:,.0f} GiB")


def choose_workers(num_workers: int | None, reads_files: bool) -> int:
    """How many processes load data; None is 0, and for data that are read from files one for each core of this process.

    Decoding keeps a core busy, and on a single one another process would only take turns with this one.
    """
    if num_workers is not None or not reads_files:
        return num_workers or 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's processes on this machine
    return min(cores, MOST_WORKERS) if cores > 1 else 0


def choose_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for float32 throughout.

    auto: bf16 on CUDA cards from compute capability 8.0 on, fp16 on older ones; bf16 on a CPU with matrix units
    for it (AMX; with AVX-512 instructions alone it is slower than float32); float32 elsewhere. fp16 needs a
    gradient scaler and is for CUDA only.

    Raises:
        UserError: fp16 on another device than CUDA.
    """
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    elif amp == "auto" and device.type == "cpu":
        # If PyTorch is too old to tell, the CPU counts as one without matrix units.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        amp = "bf16" if capabilities.get("amx_bf16") else "off"
    if amp == "fp16" and device.type != "cuda":
        raise UserError(f"amp: fp16 needs a CUDA device, not {device.type}; choose one of auto, bf16, off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


# --- The command line ------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A command line that takes settings. Mistakes are UserErrors; "-" in a flag's name is read as "_".

    `parse_args` adds two things to its result, checked and ready for `resolve`: `flags`, the settings given as flags,
    and `file`, the settings in the file that `--config` names.
    """

    def __init__(self, common: Mapping[str, Iterable[str]] | None = None, **kwargs: Any) -> None:
        """common: settings that most people use, by purpose. --help shows only these, --help_all shows all."""
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, add_help=False, **kwargs)
        self.common, self.default = common or {}, ""
        self.add_argument("-h", "--help", nargs=0, action=_Help, help="show the settings that most people use")
        self.add_argument("--help_all", nargs=0, action=_Help, help="show all settings")

    def add_settings(self, names: Iterable[str] = tuple(FIELDS), default: str = "") -> None:
        """Add the flags of these settings by group. Their help shows `default` instead of each one's own, if given."""
        groups: dict[str, Any] = {}
        self.default = default
        for name in names:
            field, flag, kind = FIELDS[name], flag_of(name), _kind(FIELDS[name])
            title = field.metadata["group"]
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
            options["help"] = _help(field, default)
            if kind is bool:
                groups[title].add_argument(flag, f"--no_{flag[2:]}", nargs=0, action=_Switch, **options)
            elif kind is tuple:
                groups[title].add_argument(flag, nargs=2, metavar=("LOW", "HIGH"), **options)
            else:
                choices = ",".join(field.metadata.get("choices", ()))
                text = "NAME" if name.endswith("_column") else field.metadata.get("metavar", "PATH")
                metavar = f"{{{choices}}}" if choices else {int: "N", float: "X", str: text}[kind]
                if name.endswith("_columns"):  # several words are taken as well as one of several names
                    options |= {"nargs": "+", "action": _Names}
                    metavar = "NAME"
                groups[title].add_argument(flag, metavar=metavar, **options)

    def format_common_help(self) -> str:
        """What --help shows: the first lines of the description, and the common settings by purpose."""
        first = "\n\n".join(self.description.split("\n\n")[:2])
        parts = [f"usage: {self.usage % {'prog': self.prog}}\n\n{first.strip()}"]
        groups = {"": [(_flag(action), action.help) for action in self._actions if action.dest not in FIELDS]}
        flags = {action.dest: _flag(action) for action in self._actions}
        for purpose, names in self.common.items():
            groups[purpose] = [(flags[name], _brief_help(FIELDS[name], not self.default)) for name in names]
        width = 2 + max(len(flag) for rows in groups.values() for flag, _ in rows)
        columns = min(120, shutil.get_terminal_size().columns)
        for purpose, rows in groups.items():
            default = f" (default {self.default})" if self.default else ""
            lines = [f"{purpose}{default}:"] if purpose else []
            for flag, text in rows:
                wrap = {"initial_indent": f"  {flag:<{width}}", "subsequent_indent": " " * (width + 2)}
                lines += textwrap.wrap(text, max(columns, width + 40), break_on_hyphens=False, **wrap)
            parts.append("\n".join(lines))
        return "\n\n".join(parts) + "\n"

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        words = []
        for word in sys.argv[1:] if args is None else args:
            flag, equals, value = word.partition("=")
            if word.startswith("--"):
                word = "--" + flag[2:].replace("-", "_") + equals + value
            words.append(word)
        if len(words) > 2000:  # argparse takes time that grows with the square of their number
            raise UserError(f"{len(words)} words on the command line; put the settings into a file: --config FILE")
        return super().parse_known_args(words, namespace)

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        parsed, rest = self.parse_known_args(args, namespace)
        given = {name: vars(parsed).pop(name) for name in FIELDS if name in parsed}
        for name, words in given.items():
            if isinstance(words, str):
                given[name] = _from_text(FIELDS[name], words)
            elif isinstance(words, list):
                given[name] = [_from_text(FIELDS[name], word) for word in words]
        parsed.flags, problems = _check(given, flag_of, none="none")
        problems = self._unknown(rest) + problems
        parsed.file = {}
        if getattr(parsed, "config", None) is not None:
            try:
                parsed.file = load_json(parsed.config)
            except UserError as error:
                problems.append(str(error))
        _refuse(problems)
        if getattr(parsed, "resume", None) is _LAST:
            folders = {"checkpoint_dir": Settings.checkpoint_dir, **parsed.file, **parsed.flags}
            parsed.resume = os.path.join(folders["checkpoint_dir"], LAST_CHECKPOINT)
        return parsed

    def _unknown(self, words: list[str]) -> list[str]:
        """A line for each word that is no flag; a word after an unknown flag counts as its value."""
        valid = {option.lstrip("-"): option for option in self._option_string_actions}
        valid |= {name: flag_of(name) for name in FIELDS if flag_of(name) in valid.values()}
        problems, more, is_value = [], 0, False
        for word in words:
            flag = word.partition("=")[0]
            if len(problems) == _NAMED:
                more += word.startswith("-") or not is_value
            elif word.startswith("-"):
                nearest = valid[_nearest(flag, valid)]
                problems.append(f"{flag}: unknown flag, the nearest valid flag is {nearest}")
            elif not is_value:
                problems.append(f"{_shown(word)}: unexpected argument, a setting is written --NAME VALUE")
            is_value = word.startswith("-") and word == flag
        return problems + [f"{more} more unknown flags or unexpected arguments"] * bool(more)

    def error(self, message: str) -> typing.NoReturn:
        message = message.removeprefix("argument ")
        for name, field in FIELDS.items():
            if message.startswith(f"{flag_of(name)}: expected"):
                message += f": {_expected(field, 'none')}"
        raise UserError(message)


class _Help(argparse.Action):
    """--help and --help_all."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        everything = option_string == "--help_all" or not parser.common
        sys.stdout.write(parser.format_help() if everything else parser.format_common_help())
        parser.exit()


class _Names(argparse.Action):
    """--name a b and --name a,b set 'a,b'."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, ",".join(values))


class _Switch(argparse.Action):
    """--name sets True, --no_name sets False."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


def _help(field: dataclasses.Field, default: str) -> str:
    """'highest rate of the schedule [per step] (default 0.0003; digits 0.001)'."""
    unit = f" [{field.metadata['unit']}]" if field.metadata["unit"] else ""
    if not default:
        own = {name: values.get(field.name, field.default) for name, values in DATASET_DEFAULTS.items()}
        others = [f"; {name} {_text(value)}" for name, value in own.items() if value != field.default]
        default = _text(field.default) + "".join(others)
    return f"{field.metadata['help']}{unit} (default {default})"


def _flag(action: argparse.Action) -> str:
    """'--batch_size N'; of a choice and a switch the name alone."""
    if isinstance(action, _Switch) or action.nargs == 0:
        return ", ".join(option for option in action.option_strings if not option.startswith("--no_"))
    metavar = " ".join(action.metavar) if isinstance(action.metavar, tuple) else str(action.metavar)
    if metavar.startswith("{") and action.dest in FIELDS:  # whose help names the choices
        metavar = "NAME"
    return f"{action.option_strings[0]} " + (f"[{metavar}]" if action.nargs == "?" else metavar)


def _brief_help(field: dataclasses.Field, with_default: bool) -> str:
    """'what is answered: classification, regression, multilabel (default classification)'."""
    text = field.metadata["help"].partition(";")[0]
    text = text if field.name == "task" else text.partition(":")[0]
    if "choices" in field.metadata:
        text += f": {', '.join(field.metadata['choices'])}" + ", or FILE.py" * (field.name == "dataset_type")
    differs = any(values.get(field.name, field.default) != field.default for values in DATASET_DEFAULTS.values())
    if not with_default or (field.default is None and not differs):
        return text
    return f"{text} (default {'by data set' if differs else _text(field.default)})"


# What most people set, by purpose: what --help shows
COMMON = {
    "Data": ("dataset_type", "data_path", "test_path", "label_column", "task", "max_seq_len", "image_size"),
    "Model": ("model_size", "num_latents"),
    "Training": (
        "num_epochs", "batch_size", "learning_rate", "class_weights", "select_by", "early_stopping_patience", "seed",
        "checkpoint_dir",
    ),
    "Speed": ("device", "amp", "compile", "num_workers"),
}  # fmt: skip


def make_parser(description: str) -> Parser:
    """The parser of the training command: every setting, --config and --resume.

    Its `parse_args` gives, beside `flags` and `file`, `resume`: the checkpoint to resume from, or None.
    """
    usage = "%(prog)s [--config FILE] [--resume [FILE]] [--SETTING VALUE ...]"
    parser = Parser(COMMON, description=description, usage=usage)
    parser.add_argument("--config", metavar="FILE", help="JSON file of settings; flags override it")
    parser.add_argument("--resume", metavar="FILE", nargs="?", const=_LAST,
                        help="continue from this checkpoint, or from the last one in checkpoint_dir")
    parser.add_settings()
    return parser
