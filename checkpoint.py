"""The checkpoint file: what is in it, how it is written (atomically), read (safely) and turned back into a model.

A checkpoint is a torch file that holds only tensors and plain Python values, so that it loads with
`weights_only=True`. Besides what training needs to continue (optimizer, step, random state, ...; see progress.py), it
holds:

    format, format_version    "perceiver-checkpoint", 3
    model                     the weights (their average, with --ema_decay), without any wrapper's prefix
    model_args                the arguments of PerceiverModel
    settings                  every setting of the run (config.py)
    data                      what the data are: task, adapters (normalisation, patch size, ...), see data_utils.py
    epoch, step, best         epochs and optimizer steps done; the log's line of the best epoch
    versions                  of Python and the libraries

The checkpoint of several models that answer together (folds.py) holds their weights under names that begin with
"members.0.", "members.1.", ..., the arguments that all of them have, and

    members                   of each its fold, its task, its best line and the number of samples that validated it
    test                      figures of the test data

The file from which such a run is resumed has no weights: those of each model lie in a folder of its own.
"""

import copy
import os
import pickletools
import platform
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, NotRequired, TypedDict, get_type_hints

import numpy
import torch
from torch import Tensor, nn

import tasks
from adapters import Adapter, from_description
from config import CANDIDATES, FIELDS, LAST_CHECKPOINT, MODEL_SETTINGS, Settings, check_settings, has_effect
from ensemble import Ensemble
from files import remedy, written_whole
from messages import UserError
from perceiver_model import MODEL_SIZES, OutputQueries, PerceiverEncoder, PerceiverModel
from schema import read, shown
from token_features import TokenFeatures

BEST, LAST = "best_model.pth", LAST_CHECKPOINT
FORMAT, FORMAT_VERSION = "perceiver-checkpoint", 3  # 3 has a task; 2 is read as classification
CLASSES = ("torch ", "torch.", "collections OrderedDict")  # needed for tensors; torch allows more, some of any size
WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile

SCALARS = (bool, int, float, str, type(None))


def _is_plain(value: Any) -> bool:
    return type(value) in SCALARS or (type(value) in (list, tuple) and all(type(item) in SCALARS for item in value))


def _are_distinct(names: list[str]) -> bool:
    return len(set(names)) == len(names) > 0


Repeats = Annotated[int, lambda number: 1 <= number <= 1000, "a whole number from 1 to 1000"]
Name = Annotated[str, str.isidentifier, "a name"]  # of a modality; it becomes part of a figure's file name


class SplitSizes(TypedDict):
    train: int
    val: int
    test: int


CHOSEN = {name for known in CANDIDATES.values() for values in known.values() for name in values}


class Candidate(TypedDict):
    """What --select auto may choose: settings under a name, which is that of a folder."""

    name: Name
    settings: dict[Annotated[str, CHOSEN.__contains__, "a setting that is chosen"], Annotated[Any, _is_plain, "plain"]]


class SelectionRow(Candidate):
    """What a candidate came to, over folds of the training data."""

    metric: str
    mean: float | None
    std: float | None
    n: int
    loss: float
    seconds: float
    chosen: bool


class Data(TypedDict):
    """What a checkpoint knows about the data, see data_utils.load_splits."""

    task: dict[str, Any]
    num_outputs: int
    class_names: NotRequired[Annotated[list[str], _are_distinct, "a list of different names"]]
    head: NotRequired[dict[str, int | str]]
    adapters: dict[Name, dict[str, Any]]
    features: NotRequired[dict[Name, dict[str, int | str | list[int]]]]
    dataset_type: NotRequired[str]
    notes: NotRequired[list[str]]
    split_sizes: NotRequired[SplitSizes]
    split_seed: NotRequired[int]
    fingerprints: NotRequired[dict[str, str]]
    code: NotRequired[dict[str, str]]  # name and checksum of a file of the user's own, see own_data.py
    selection: NotRequired[list[SelectionRow]]  # what --select auto has chosen between, see selection.py


class Member(TypedDict):
    """What the checkpoint of several models knows about one of them."""

    fold: int
    task: dict[str, Any]
    best: dict[str, float | str | None]
    num_samples: int


MOST_MEMBERS = FIELDS["folds"].metadata["at_most"]
Members = Annotated[list[Member], lambda members: len(members) <= MOST_MEMBERS, f"a list of {MOST_MEMBERS} at most"]


class Contents(TypedDict):
    """What every checkpoint holds, see above; progress.py reads the rest."""

    model: dict[str, Any]
    model_args: dict[str, Any]
    settings: dict[str, Annotated[Any, _is_plain, "a plain value"]]
    data: Data
    epoch: int
    step: int
    best: dict[str, float | str | None]
    members: NotRequired[Members]
    test: NotRequired[dict[str, float | str | None]]
    candidates: NotRequired[list[Candidate]]  # of a run that is still choosing between them


def model_arguments(settings: Settings, data: dict[str, Any], base: dict[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of PerceiverModel for these settings and data: those of the preset, unless set otherwise.

    base: the arguments of another model, which take the place of the preset's.
    """
    chosen = {name: getattr(settings, name) for name in MODEL_SETTINGS if has_effect(settings, name)}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    known = base["input_dim"] if base else {}  # by modality, such as learned positions: what neither of them says
    known = {name: {key: value for key, value in own.items() if key not in chosen} for name, own in known.items()}
    features = {name: known.get(name, {}) | own for name, own in data["features"].items()}
    given = {"input_dim": features, "num_classes": data["num_outputs"], **data.get("head", {})}
    return (base or MODEL_SIZES[settings.model_size]) | chosen | given


def save_checkpoint(path: str | os.PathLike, contents: dict[str, Any]) -> None:
    """Write a checkpoint so that at every moment either the old file or the new one is whole.

    A write that fails leaves nothing behind.

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
        cause = error if isinstance(error, OSError) else error.__context__  # torch wraps an OSError in a RuntimeError
        if not isinstance(cause, OSError):
            raise
        kept = f"; {path} still holds the previous one" if path.exists() else ""
        raise UserError(
            f"cannot save {path}: {cause.strerror or cause}{kept}; "
            f"{remedy(cause)} or choose another --checkpoint_dir, then continue with --resume"
        ) from error


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, wherever it was made, and check that it is a whole one of this project.

    Nothing in the file is executed: its checksums are verified, then it is read with `weights_only=True`. Its parts
    have the types of `Contents`; `build_model` compares weights and arguments of the model.

    Raises:
        UserError: the file is missing, damaged or foreign, or holds objects other than tensors and plain values. A good
            checkpoint in the same folder is named.
    """
    try:
        return _read(Path(path))
    except UserError as error:
        raise UserError(f"{error}{_alternative(Path(path))}") from error


def _read(path: Path) -> dict[str, Any]:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is not a file")  # reading a pipe would wait forever
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    if start and start != b"PK":  # a torch file is a zip file
        raise UserError(f"{path} is not a checkpoint of this project")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # A torch file is not compressed: parts that claim more bytes than the file has would fill the memory
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise zipfile.BadZipFile("its parts are larger than the file")
            damaged = archive.testzip()
            # From an entry that is marked as a folder, torch silently reads nothing
            damaged = damaged or next((entry.filename for entry in entries if entry.external_attr), None)
            if damaged:
                raise zipfile.BadZipFile(f"checksum of {damaged}")
            foreign = [name for entry in entries if entry.filename.endswith("/data.pkl")
                       for name in _classes(archive.read(entry)) if not name.startswith(CLASSES)]  # fmt: skip
        if foreign:
            raise UnpicklingError(foreign[0])
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # the checksums are right, so the file was made like this
        raise UserError(f"{path} holds objects other than tensors and plain values; refused, none was run") from error
    except Exception as error:  # damaged bytes make zipfile and torch raise many kinds of exception
        raise UserError(f"{path} is truncated or damaged ({error})".splitlines()[0]) from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project")
    version = contents.get("format_version")
    if type(version) is int and version == 2:
        _upgrade(contents)
    elif type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {shown(version)}, this code reads {FORMAT_VERSION}; "
            "use the version of the code that wrote it"
        )
    try:
        return read(contents, Contents, "")
    except UserError as error:
        raise UserError(f"{path} is not a whole checkpoint: {error}") from error


def _classes(pickled: bytes) -> Iterator[str]:
    """The names that the pickle asks for, as "module name"."""
    return (argument for code, argument, _ in pickletools.genops(pickled) if code.name == "GLOBAL")


def _upgrade(contents: dict[str, Any]) -> None:
    """Make format 2, whose only task was classification, into format 3."""
    data = contents.get("data")
    if isinstance(data, dict) and "class_names" in data:
        data["task"] = {"kind": "classification", "class_names": data["class_names"], "class_weights": None}
        data["num_outputs"] = data.pop("num_classes", len(data["class_names"]))
    progress = contents.get("progress")
    totals = progress.get("totals") if isinstance(progress, dict) else None
    if isinstance(totals, dict) and "loss" in totals:  # of smoothed labels, where the settings smooth them
        totals["objective"] = totals["loss"]


def _alternative(path: Path) -> str:
    for other in (path.parent / LAST, path.parent / BEST):
        if other != path:
            try:
                found = _read(other)
            except UserError:
                continue
            if not found["model"]:  # a run of several models continues from it, which no model can
                continue
            epoch = found["epoch"]
            return f"; {other} (after {epoch} epochs) is whole and can be used instead"
    return "; no other usable checkpoint lies beside it"


def build_model(checkpoint: dict[str, Any]) -> PerceiverModel | Ensemble:
    """The model of a checkpoint, or the several that answer together, on the CPU, in evaluation mode.

    It is first made on the meta device, without memory, and compared with the weights.

    Raises:
        UserError: the arguments are not those of a model; or weights are missing, unexpected, of another shape or not
            finite, all of which are listed.
    """
    arguments, members = checkpoint["model_args"], checkpoint.get("members")
    if members is not None and (len(members) < 2 or not checkpoint["model"]):
        raise UserError("the checkpoint is one from which a run of several models is resumed (--resume) and holds none "
                        f"of them; when the run has ended, what it has come to is {BEST} beside it")  # fmt: skip
    try:
        check_model_arguments(arguments)
        with torch.device("meta"):
            model = PerceiverModel(**arguments)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:  # also a taken name, or sizes beyond int64
        raise UserError(f"the checkpoint's model arguments are refused: {error}".splitlines()[0]) from error
    told, given = checkpoint["data"]["num_outputs"], arguments["num_classes"]
    if told != given:
        raise UserError(f"the checkpoint's task has {told} outputs, its model {given}")
    if members is None:
        weights = check_weights(model, checkpoint["model"])
        model.to_empty(device="cpu").load_state_dict(weights)  # without drawing initial values, which would take long
        return model.eval()
    expected = {member_weight(i, name): like for i in range(len(members)) for name, like in model.state_dict().items()}
    if problems := tensor_problems(checkpoint["model"], expected):
        raise UserError("the checkpoint's weights do not fit its models: " + listed(problems, 10))
    made = []
    for number in range(len(members)):
        weights = {name: checkpoint["model"][member_weight(number, name)] for name in model.state_dict()}
        made.append(copy.deepcopy(model).to_empty(device="cpu"))
        made[-1].load_state_dict(weights)
    return Ensemble(made).eval()


def member_weight(number: int, name: str) -> str:
    """The name of a weight of one of several models in their checkpoint."""
    return f"members.{number}.{name}"


def equipped_model(
    checkpoint: dict[str, Any], device: str | torch.device = "cpu", own: Mapping[str, type[Adapter]] | None = None
) -> PerceiverModel:
    """The model of a checkpoint with what prediction needs of it: its `data_info`, `task` and `adapters`.

    Args:
        own: the user's own classes of adapters, by name; see `adapters.from_description`.

    Raises:
        UserError: as `build_model`; or model, task and adapters do not agree.
    """
    model, data = build_model(checkpoint), checkpoint["data"]
    equip(model, data, own)
    if isinstance(model, Ensemble):
        _equip_members(model, checkpoint["members"])
    if model.task.num_outputs != data["num_outputs"]:
        told, names = data["num_outputs"], model.task.num_outputs
        raise UserError(f"the checkpoint's task names {names} outputs, its model has {told}")
    if (model.head if model.head in ("tokens", "hidden") else None) != model.task.head.get("head"):
        raise UserError(f"the checkpoint's task is {model.task.kind}, which its model's head {model.head!r} is not for")
    if model.head == "hidden":
        known = {name: contents.width for name, contents in model.task.modalities.items()}
        answered = {name: layer.out_features for name, layer in model.content.items()}
        if known != answered:
            raise UserError(f"the checkpoint's task knows contents of {known}, its model answers {answered}")
    made = {name: adapter.features for name, adapter in model.adapters.items()}
    if data.get("features", made) != made:
        raise UserError(f"the checkpoint's adapters make {made}, its features are {data['features']}")
    taken = checkpoint["model_args"]["input_dim"]
    taken = taken if isinstance(taken, dict) else dict.fromkeys(model.modalities, {"input_dim": taken})
    for name in sorted(made.keys() | taken.keys()):
        makes, takes = made.get(name, {}), taken.get(name, {})
        if not makes or any(_as_list(takes.get(what)) != value for what, value in makes.items()):
            raise UserError(f"the checkpoint's adapter of {shown(name)} makes {makes}, its model takes {takes}")
    return model.to(device)


def _equip_members(model: Ensemble, members: list[Member]) -> None:
    """Tell the models how they answer together.

    Raises:
        UserError: the tasks of the members are not like the one of all.
    """
    told = [tasks.from_description(member["task"], f"the task of member {i}") for i, member in enumerate(members)]
    alike = all(type(task) is type(model.task) and task.num_outputs == model.task.num_outputs for task in told)
    model.mean_output = partial(model.task.mean_output, members=told)
    try:
        nothing = torch.zeros(1, model.task.num_outputs)
        if not alike or model.mean_output([nothing] * len(told)).shape != nothing.shape:
            raise ValueError
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("the checkpoint's members do not answer what its task asks") from error


def equip(model: PerceiverModel, data: dict[str, Any], own: Mapping[str, type[Adapter]] | None = None) -> None:
    """Give a model its `data_info`, the `task` that knows what an answer is, and the `adapters` of raw items."""
    model.data_info, model.task = data, tasks.from_description(data["task"], "the checkpoint's task")
    model.adapters = {
        name: from_description(known, f"the checkpoint's adapter of {name}", own)
        for name, known in data["adapters"].items()
    }


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_model_arguments(arguments: dict[str, Any]) -> None:
    """Check that each argument is known, of its declared type and within the limits of its setting.

    Raises:
        UserError: one is not.
    """
    tokens = get_type_hints(TokenFeatures.__init__)
    model = get_type_hints(OutputQueries.__init__) | get_type_hints(PerceiverEncoder.__init__) | tokens
    model |= {"input_dim": int | dict[Name, dict[str, Any]], "num_classes": int, "num_blocks": Repeats}
    model |= {"head": str, "tie_embedding": bool}
    read_arguments(arguments, model)
    if isinstance(arguments.get("input_dim"), dict):
        for name, own in arguments["input_dim"].items():
            read_arguments(own, tokens, f"input_dim[{shown(name)}].")
    check_settings({name: value for name, value in arguments.items() if name in MODEL_SETTINGS})


def read_arguments(arguments: dict[str, Any], kinds: dict[str, Any], where: str = "") -> None:
    for name, value in arguments.items():
        if name not in kinds:
            raise UserError(f"{where}{shown(name)} is unknown")
        read(value, kinds[name], f"{where}{name}")


def load_weights(model: PerceiverModel, weights: dict[str, Tensor]) -> None:
    """Load weights that were saved from the plain model or from any nesting of wrappers.

    Raises:
        UserError: they do not fit, see `build_model`.
    """
    model.load_state_dict(check_weights(model, weights))


def check_weights(model: PerceiverModel, weights: dict[str, Any]) -> dict[str, Tensor]:
    """The weights by the names of the plain model, which may be on the meta device.

    Raises:
        UserError: they do not fit, see `build_model`.
    """
    names = [_unwrapped(name) for name in weights]
    problems = [f"twice {shown(name)}" for name, count in Counter(names).items() if count > 1]
    weights = dict(zip(names, weights.values(), strict=True))
    problems += tensor_problems(weights, model.state_dict())
    if problems:
        raise UserError("the checkpoint's weights do not fit its model: " + listed(problems))
    return weights


def tensor_problems(tensors: dict[str, Any], expected: dict[str, Tensor]) -> list[str]:
    """Why the tensors of a file cannot replace the expected ones, which may be on the meta device; [] if they can.

    They must be real (whole where the expected ones are), finite and of the same shapes. Nothing is computed, and no
    memory is used, before the file is known to hold as many bytes as they claim: tensors with stride 0, or many on one
    storage, may claim any size.
    """
    problems = [f"missing {name}" for name in expected.keys() - tensors.keys()]
    problems += [f"unexpected {shown(name)}" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        tensor, shape = tensors[name], expected[name].shape
        if not isinstance(tensor, Tensor):
            problems.append(f"{name} is not a tensor")
        elif not (_is_real(tensor) or _is_count(tensor, expected[name])):
            problems.append(f"{name} is {_kind(tensor)}, not real numbers")
        elif tensor.shape != shape:
            problems.append(f"{name} is {tuple(tensor.shape)} where the model has {tuple(shape)}")
    if problems:
        return problems
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    claimed, held = sum(tensor.nbytes for tensor in tensors.values()), sum(storages.values())
    if claimed > held:
        return [f"they claim {claimed:,} bytes of the {held:,} that the file holds"]
    return [
        f"{name} holds NaN or infinity"
        for name, tensor in tensors.items()
        if not tensor.to(expected[name].dtype).isfinite().all()
    ]


def _is_real(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_nested and not tensor.is_meta
    return plain and tensor.layout == torch.strided and tensor.is_floating_point()


def _is_count(tensor: Tensor, expected: Tensor) -> bool:
    """Whether it is the number of batches that a batch norm has seen."""
    return type(tensor) is Tensor and not tensor.is_meta and expected.dtype == tensor.dtype == torch.int64


def _kind(tensor: Tensor) -> str:
    words = [tensor.layout if tensor.layout != torch.strided else "", "meta" if tensor.is_meta else "", tensor.dtype]
    return " ".join(str(word).removeprefix("torch.") for word in words if word)


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name[name.index(".") + 1 :]
    return name


def listed(problems: Iterable[str], most: int = 20) -> str:
    problems = sorted(problems)
    more = f", and {len(problems) - most} more" if len(problems) > most else ""
    return ", ".join(problems[:most]) + more
