"""The checkpoint file: what is in it, how it is written (atomically), read (safely) and turned back into a model.

A checkpoint is a torch file that holds tensors and plain Python values only, so that it loads with
``weights_only=True``. Beside what training needs to go on (optimizer, step, random state, ...; see train.py) it has:

    format, format_version    "perceiver-checkpoint", 2
    model                     the weights (with --ema_decay their average), without any wrapper's prefix
    model_args                the arguments of PerceiverModel
    settings                  every setting of the run (config.py)
    data                      what the data are: class names, adapters (normalisation, patch size, ...; data_utils.py)
    epoch, step, best         epochs and optimizer steps done; epoch and figures of the best validation
    versions                  of Python and the libraries
"""

import os
import platform
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy
import torch

from config import LAST_CHECKPOINT, Settings, UserError
from files import remedy, written_whole
from perceiver_model import MODEL_SIZES, PerceiverModel

BEST, LAST = "best_model.pth", LAST_CHECKPOINT
FORMAT, FORMAT_VERSION = "perceiver-checkpoint", 2  # 2: the data are described by adapters
CONTENTS = {"model": dict, "model_args": dict, "settings": dict, "data": dict, "epoch": int, "step": int, "best": dict}
WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile

MODEL_SETTINGS = (
    *MODEL_SIZES["base"],
    "num_cross_attention_heads",
    "cross_attention_dim",
    "mlp_ratio",
    "dropout",
    "attention_dropout",
    "share_weights",
    "use_positions",
    "num_frequency_bands",
    "gradient_checkpointing",
)


def model_arguments(settings: Settings, data: dict[str, Any]) -> dict[str, Any]:
    """The arguments of PerceiverModel that settings and data ask for: the preset's, and over them what is set."""
    chosen = {name: getattr(settings, name) for name in MODEL_SETTINGS if getattr(settings, name) is not None}
    if not settings.use_positions:
        chosen.pop("num_frequency_bands", None)
    return MODEL_SIZES[settings.model_size] | chosen | {
        "input_dim": data["features"],
        "num_classes": data["num_classes"],
    }


def save_checkpoint(path: str | os.PathLike, contents: dict[str, Any]) -> None:
    """Write a checkpoint so that at every moment the old file or the new one is whole.

    Nothing is left behind by a write that fails.

    Raises:
        UserError: the file cannot be written; the old one is untouched.
    """
    path = Path(path)
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": numpy.__version__}
    contents = {"format": FORMAT, "format_version": FORMAT_VERSION, "versions": versions, **contents}
    try:
        with written_whole(path) as file:
            torch.save(contents, file)
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch wraps it in a RuntimeError
        if not isinstance(cause, OSError):
            raise
        kept = f"; {path} still holds the one before" if path.exists() else ""
        raise UserError(
            f"cannot save {path}: {cause.strerror or cause}{kept}; "
            f"{remedy(cause)} or choose another --checkpoint_dir, then go on with --resume"
        ) from error


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint on the CPU, wherever it was made, and make sure that it is a whole one of ours.

    Nothing in the file is executed: it is read with ``weights_only=True``, after its checksums were found right.

    Raises:
        UserError: there is no such file, it is damaged, foreign, or holds other objects than tensors and plain
            values. A good checkpoint in the same folder is named.
    """
    try:
        return _read(Path(path))
    except UserError as error:
        raise UserError(f"{error}{_alternative(Path(path))}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    if start and start != b"PK":  # a torch file is a zip file
        raise UserError(f"{path} is not a checkpoint of this project")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            # torch reads nothing, without a word, from an entry that is marked as a folder
            damaged = damaged or next((entry.filename for entry in archive.infolist() if entry.external_attr), None)
        if damaged:
            raise zipfile.BadZipFile(f"checksum of {damaged}")
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # the checksums are right, so it was made like this
        raise UserError(f"{path} holds other objects than tensors and plain values; refused, none was run") from error
    except Exception as error:  # what damaged bytes make zipfile and torch raise has no common class
        raise UserError(f"{path} is truncated or damaged ({error})".splitlines()[0]) from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project")
    if contents.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {contents.get('format_version')}, this code reads {FORMAT_VERSION}; "
            "use the version of the code that wrote it"
        )
    for name, kind in CONTENTS.items():
        if not isinstance(contents.get(name), kind):
            raise UserError(f"{path} is no whole checkpoint: {name!r} is missing or not of type {kind.__name__}")
    return contents


def _alternative(path: Path) -> str:
    for other in (path.parent / LAST, path.parent / BEST):
        if other != path:
            try:
                epoch = _read(other)["epoch"]
            except UserError:
                continue
            return f"; {other} (after {epoch} epochs) is whole and can be used instead"
    return "; no other usable checkpoint lies beside it"


def build_model(checkpoint: dict[str, Any]) -> PerceiverModel:
    """The model of a checkpoint, on the CPU, in evaluation mode.

    Raises:
        UserError: weights are missing, not expected, or of another shape; each is listed.
    """
    try:
        model = PerceiverModel(**checkpoint["model_args"])
    except (TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's model arguments are refused: {error}") from error
    load_weights(model, checkpoint["model"])
    return model.eval()


def load_weights(model: PerceiverModel, weights: dict[str, torch.Tensor]) -> None:
    """Load weights, saved from the plain model or from any nesting of wrappers. Raises UserError as build_model."""
    names = [_unwrapped(name) for name in weights]
    weights = dict(zip(names, weights.values(), strict=True))
    expected = model.state_dict()
    problems = [f"twice {name}" for name in weights if names.count(name) > 1]
    problems += [f"missing {name}" for name in expected.keys() - weights.keys()]
    problems += [f"unexpected {name}" for name in weights.keys() - expected.keys()]
    problems += [f"{name} is no tensor" for name, value in weights.items() if not isinstance(value, torch.Tensor)]
    problems += [
        f"{name} is {tuple(weights[name].shape)} where the model has {tuple(expected[name].shape)}"
        for name in expected.keys() & weights.keys()
        if isinstance(weights[name], torch.Tensor) and weights[name].shape != expected[name].shape
    ]
    if problems:
        raise UserError("the checkpoint's weights do not fit its model: " + ", ".join(sorted(problems)))
    model.load_state_dict(weights)


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name[name.index(".") + 1 :]
    return name
