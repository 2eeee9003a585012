"""A run that starts from another model: a checkpoint of ours, whatever its task, or a published Perceiver.

    start = read_start("path/to/vision-perceiver-fourier/")     # or checkpoints/best_model.pth
    start.settings                                              # the defaults of the new run
    take_over(model, start, data)                               # what fits by name and shape

The architecture and the preprocessing of that model become the defaults of the new run; the weights that fit by name
and shape are taken, all others begin anew and are named. The last linear layer is taken where the answers are the same
ones. From then on the run is like any other: it goes on from its own checkpoints and needs that model no more.

With --freeze encoder only the last linear layer learns, on the pooled latents. These never change then, so with
--cache_features each item is encoded once, and the layer trained on what was found.
"""

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import distributed
from adapters import ImageAdapter, SeriesAdapter, from_description
from batches import Batch, Device, inputs_for, token_counts, unshared
from checkpoint import BEST, build_model, listed, load_checkpoint
from config import FIELDS, MODEL_SETTINGS, OWN_DATA, Settings
from evaluation import evaluating
from messages import UserError, naming, with_progress
from perceiver_model import DECODER, FEATURES, PerceiverModel
from pretrained import WEIGHTS, find_folder, read_pretrained, weights_file
from token_features import PositionFeatures

# --- The other model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """The model that a run starts from.

    Attributes:
        path: of its file or folder, as the user gave it.
        checksum: SHA-256 of the file of its weights.
        given: the arguments of its PerceiverModel.
        weights: by name.
        data: its adapters and, where it has one, its task, see data_utils.load_splits.
    """

    path: str
    checksum: str
    given: dict[str, Any]
    weights: dict[str, Tensor]
    data: dict[str, Any]

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments of a model that takes over its weights.

        Those of tokens stand at their modality, and name the frequencies of positions on a grid: on another grid it is
        these that the weights know. Answers for each position become one for all, from the mean over the latents.
        """
        shared = {name: value for name, value in self.given.items() if name in FEATURES}
        others = {name: value for name, value in self.given.items() if name not in (*FEATURES, "input_dim")}
        with torch.device("meta"):
            model = PerceiverModel(**self.given)
        modalities = self.given["input_dim"]
        modalities = modalities if isinstance(modalities, dict) else {}
        features = {name: shared | own for name, own in modalities.items()}
        for name, own in features.items():
            positions = model.modalities[name].positions
            if isinstance(positions, PositionFeatures) and positions.grid_shape:
                bands, grid = positions.num_bands, list(positions.max_resolution)
                own.update(num_frequency_bands=bands, max_resolution=grid)
        if model.head not in ("mean", "query"):
            of_answers = {*DECODER, "tie_embedding"}
            others = {name: value for name, value in others.items() if name not in of_answers} | {"head": "mean"}
        return {**others, "input_dim": features}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What it says about a run that starts from it: settings by name."""
        usual = inspect.signature(PerceiverModel).parameters
        known = self.given | {"head": self.arguments.get("head", "mean")}
        found = {name: known.get(name, usual[name].default) for name in MODEL_SETTINGS}
        del found["gradient_checkpointing"]  # says nothing about what was learnt
        for adapter in self.adapters.values():
            if isinstance(adapter, ImageAdapter):
                found |= {"image_size": adapter.image_shape[0], "patch_size": adapter.patch_size}
            else:
                found["max_seq_len"] = getattr(adapter, "max_seq_len", None)
            if isinstance(adapter, SeriesAdapter):
                found |= {"series_window": adapter.window, "series_stride": adapter.stride if adapter.window else None}
        convolved = any(getattr(adapter, "stem", None) == "conv" for adapter in self.adapters.values())
        found["stem"] = "conv" if convolved else "none"
        return found | {"init_checksum": self.checksum}

    @cached_property
    def adapters(self) -> dict[str, Any]:
        return {
            name: from_description(known, f"{self.path}: its adapter of {name}")
            for name, known in self.data["adapters"].items()
        }

    @property
    def known(self) -> dict[str, Any]:
        """For data_utils.load_splits."""
        return {"adapters": self.data["adapters"]}

    def differences(self, settings: Settings, sources: Mapping[str, str]) -> list[str]:
        """A line for each setting that a flag or the file makes other than it is in this model."""
        values = vars(settings)
        return [
            f"{name} {values[name]} ({sources[name]}) is not that of {self.path}, {known}"
            for name, known in self.settings.items()
            if sources[name] in ("file", "flag", "given") and values[name] != known
            and FIELDS[name].metadata["on_resume"] == "fixed"
        ]  # fmt: skip

    def check(self, settings: Settings) -> None:
        """Raise UserError where the settings ask for positions that the model has not learned, or name another file."""
        if settings.init_checksum not in (None, self.checksum):
            raise UserError(f"init_checksum: {self.path} is another file, its SHA-256 is {self.checksum}; bring back "
                            "the one that is named, or leave --init_checksum out")  # fmt: skip
        for name, own in self.arguments["input_dim"].items():
            if not own.get("learned_positions") or settings.dataset_type not in OWN_DATA:
                continue
            if "grid_shape" in own:
                grid, side = list(own["grid_shape"]), settings.image_size // settings.patch_size
                if name == "image" and grid != [side, side]:
                    raise UserError(
                        f"image_size {settings.image_size}, patch_size {settings.patch_size}: {self.path} has learned "
                        f"a vector for each position of {grid[0]} x {grid[1]} and knows none for {side} x {side}; "
                        "leave them out, or start from a model whose positions are computed"
                    )
            elif not (settings.max_seq_len or 2**31) <= own["max_length"]:
                raise UserError(f"max_seq_len {settings.max_seq_len}: {self.path} has learned positions of "
                                f"{own['max_length']} tokens and knows no others; leave it out")  # fmt: skip


def read_start(source: str) -> Start:
    """Read a checkpoint of ours, the folder of a run (its best model), or the folder or hub name of a published model.

    Raises:
        UserError: there is none, it is damaged or of another kind, see `load_checkpoint` and `read_pretrained`.
    """
    path = Path(source)
    path = path.parent if path.name in WEIGHTS else path
    published = (path / "config.json").exists()
    if path.is_dir() and not published:
        path = path / BEST
        if not path.exists():
            raise UserError(f"init_from: {source} holds neither config.json, as a published model does, nor {BEST}")
    with naming("init_from"):
        if path.is_file() or path.suffix in (".pth", ".pt"):
            checkpoint = load_checkpoint(path)
            if "members" in checkpoint:
                raise UserError(f"{source} is the mean of several models; name the model of one fold, such as "
                                f"{path.parent / 'fold_1' / BEST}")  # fmt: skip
            model = build_model(checkpoint)
            given, weights, data = checkpoint["model_args"], model.state_dict(), checkpoint["data"]
        else:
            path = find_folder(path)
            given, weights, data = read_pretrained(path)
            path = weights_file(path)
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return Start(source, checksum, given, weights, {name: data[name] for name in ("adapters", "task") if name in data})


# --- The new model ----------------------------------------------------------------------------------------------------


def check_settings(settings: Settings, start: Start | None) -> None:
    """Raise UserError where an encoder is to be frozen that knows nothing, or features cached that would change, or
    `start` is not for these settings."""
    if start:
        start.check(settings)
    if settings.freeze != "none" and settings.init_from is None:
        raise UserError(f"freeze: {settings.freeze}: it would keep the random weights of a new model; say with "
                        "--init_from where it learned something, or leave --freeze out")  # fmt: skip
    if settings.cache_features and settings.freeze == "none":
        raise UserError("cache_features: the features change as long as the encoder learns; add --freeze encoder")


def begin(model: PerceiverModel, settings: Settings, start: Start | None, data: dict[str, Any]) -> list[str]:
    """Make a new model what the settings ask for: `start` gives its weights, and what is to be frozen is.

    Returns:
        lines about it for the user.

    Raises:
        UserError: no weights fit, or a part that is to be frozen has none.
    """
    lines = []
    if start:
        lines = take_over(model, start, data, settings.freeze == "encoder")
        start.weights.clear()  # not to be held twice
    if settings.cache_features and model.head not in ("mean", "query"):
        raise UserError("cache_features: it is for one answer an item; leave it out")
    if settings.freeze == "encoder":
        if model.head == "hidden":
            raise UserError("freeze: encoder: with --task reconstruct the encoder learns; leave --freeze out")
        model.freeze_encoder()
    return lines


def take_over(model: PerceiverModel, start: Start, data: dict[str, Any], freeze: bool = False) -> list[str]:
    """Give the model the weights of `start` that fit by name and shape. Arguments and results as those of `begin`."""
    own, there = model.state_dict(), start.weights
    same_answers = _answers(data) == _answers(start.data)
    readout = {f"{_name_of(model, model.readout)}.{name}" for name in model.readout.state_dict()}
    last = {name for name in readout if model.head != "tokens" or name.startswith("output.decoder.output.")}
    fitting = {
        name: weights
        for name, weights in there.items()
        if name in own and own[name].shape == weights.shape and (same_answers or name not in last)
    }
    parameters = {name for name, _ in model.named_parameters()}
    if not fitting.keys() & parameters:
        raise UserError(f"init_from: of the {len(there)} weights of {start.path} none fits this model by name and "
                        "shape; leave out the flags that change the architecture, or --init_from")  # fmt: skip
    model.load_state_dict(fitting, strict=False)
    new, left = sorted(own.keys() - fitting.keys()), sorted(there.keys() - fitting.keys())
    if freeze and (unknown := [name for name in new if name not in readout and not _is_norm(model, name)]):
        raise UserError("freeze: encoder: these weights did not come from init_from and would stay random: "
                        f"{listed(unknown)}; leave out --freeze, or what makes the model another one")  # fmt: skip
    taken = sum(own[name].numel() for name in fitting)
    lines = [f"start   {len(fitting)} of {len(own)} tensors, {taken:,} of {sum(map(Tensor.numel, own.values())):,} "
             f"numbers, from {start.path}"]  # fmt: skip
    for what, names, tensors in (("begin anew", new, own), ("not taken over", left, there)):
        if names:
            shown = (f"{name} {_shape(tensors[name])}" for name in names)
            lines.append(f"        {len(names)} {what}: {listed(shown)}")
    if not same_answers and last & there.keys():
        lines.append("        the answers are others than there, so the last layer begins anew")
    return lines


def _answers(data: dict[str, Any]) -> list[Any]:
    return [data.get("task", {}).get(what) for what in ("kind", "class_names", "target_names")]


def _name_of(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _is_norm(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.LayerNorm)  # a new one changes nothing


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "1"


# --- Cached features --------------------------------------------------------------------------------------------------


class Readout(nn.Module):
    """The last layer of a model as a model of its own: pooled latents as a token (B, 1, D) -> logits."""

    def __init__(self, model: PerceiverModel):
        super().__init__()
        self.layer = model.readout

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.layer(x[:, 0])


class CachedFeatures(Dataset):
    """Pooled latents of the items of another data set, a token each.

    Args:
        latents: float32 (N, D).
        targets: (N, ...), as a loader yields them.
        lengths: tokens of the items that were encoded, (N,).
    """

    def __init__(self, latents: np.ndarray, targets: np.ndarray, lengths: np.ndarray):
        self.latents, self.targets = torch.from_numpy(latents), torch.from_numpy(targets)
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.latents)

    def __getitems__(self, numbers: list[int]) -> Batch:
        tokens = self.latents[numbers][:, None]  # (B, 1, D)
        return {"input": tokens, "mask": torch.ones(len(numbers), 1, dtype=torch.bool), "label": self.targets[numbers]}


def encode(
    model: PerceiverModel, loader: DataLoader, what: str, device: Device, amp_dtype: torch.dtype | None
) -> CachedFeatures:
    """The pooled latents of all items of a loader in the order of their numbers; processes share the work."""
    parts: dict[str, list[Tensor]] = {"latents": [], "targets": [], "lengths": []}
    with evaluating(model, device, amp_dtype):
        for batch in with_progress(loader, f"encoding {what}"):
            latents = model.pooled_latents(*inputs_for(model, batch, device))
            for name, values in zip(parts, (latents.float(), batch["label"], token_counts(batch)), strict=True):
                parts[name].append(values.cpu().clone())
    found = distributed.gather({name: torch.cat(values).numpy() for name, values in parts.items()})
    return CachedFeatures(**distributed.broadcast(lambda: unshared(found, loader.batch_sampler.batches(0))))
