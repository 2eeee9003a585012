"""Data and modalities of the user's own, given in Python: by a file that --dataset names, or to `train.train`.

    python train.py --dataset path/to/my_data.py

The file holds one function, and may hold settings that take the place of the defaults:

    DEFAULTS = {"model_size": "tiny", "num_epochs": 20}

    def load_data(settings):
        return {"train": [{"input": ..., "label": ...}, ...], "class_names": ["falls", "rises"]}

What it returns has these keys, which are also what `train.train` takes:

    train         a list of items, a `torch.utils.data.Dataset` of them, or an iterable that can be run through again
    val, test     likewise; one that is missing is split off train (not off an iterable)
    class_names   of classes 0, 1, ... (or of several labels, or of the numbers of a regression); without, labels are
                  taken as the names themselves
    adapters      what makes tokens of an item's 'input', where it is not tokens (L, C) yet: an adapter, or a class of
                  adapters, which is fitted on the training items; for inputs of several modalities a dict of these

An item is as in batches.py, or a pair (input, label). It may have an 'id', its name in tables; and a 'group', such as a
patient: items of one group are never on both sides of a split.

A list is prepared once and kept in memory. A Dataset is asked for an item whenever a batch needs it, so it may be
larger than memory, and may draw its training items anew in each epoch. Both are read through once at the start, to
find what is wrong with an item before anything is trained. Of an iterable, see `Stream`, only the labels are.

Code runs only where the user names its file. A checkpoint knows the file's name and checksum, and adapters as plain
data: it is opened again with the same file.
"""

import copy
import hashlib
import importlib.util
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

import adapters as adapters_module
from adapters import (
    ADAPTERS,
    Adapter,
    ImageAdapter,
    SeriesAdapter,
    Source,
    TensorAdapter,
    TextAdapter,
    describe,
)
from batches import ONLY, Item, for_tokens, to_sample
from config import FIELDS, PYTHON, Settings, check_settings
from data_files import Items
from messages import UserError, as_utf8, refuse_together, with_progress
from tasks import Task

SPLITS = ("train", "val", "test")
FUNCTION, DEFAULTS = "load_data", "DEFAULTS"
OURS = (__file__, adapters_module.__file__)  # of a traceback, what is not the user's code
STANDARD = os.path.dirname(os.__file__)  # of Python's own library

_loaded: set[Path] = set()  # the files that were loaded as modules


# --- The user's code --------------------------------------------------------------------------------------------------


@dataclass
class OwnData:
    """Where data come from that are given in Python.

    Args:
        name: what the data set is called: the file's name, or 'python'.
        load: gives the data, see above.
        path: the file, as the user named it; None where there is none.
        checksum: of its bytes.
        defaults: settings that take the place of the defaults.
        classes: the user's own classes of adapters, by name.
    """

    name: str
    load: Callable[[Settings], Any]
    path: str | None = None
    checksum: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, type[Adapter]] = field(default_factory=dict)

    def changed(self, info: Mapping[str, Any]) -> list[str]:
        """A note where the file is not the one that the data of a checkpoint came from."""
        known = info.get("code", {}).get("checksum")
        if self.checksum in (None, known):
            return []
        return [f"{self.path} has changed since this checkpoint was trained"]


@contextmanager
def running(place: str) -> Iterator[None]:
    """The user's code runs within the block. An exception becomes a UserError that says where in it it was raised."""
    try:
        yield
    except MemoryError:
        raise
    except UserError as error:
        raise (error if place in str(error) else UserError(f"{place}: {error}")) from error.__cause__
    except (Exception, SystemExit) as error:  # also where it ends the program, with whatever status
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [one for one in frames if one.filename not in OURS and not _is_library(one.filename)]
        told = [f"{place}: {type(error).__name__}", *str(error).strip().splitlines()[:1]]
        where = [f", raised at {one.filename}, line {one.lineno}, in {one.name}: {one.line}" for one in theirs[-1:]]
        raise UserError(": ".join(told) + "".join(where)) from error


def _is_library(file: str) -> bool:
    return "site-packages" in file or file.startswith((STANDARD, "<frozen"))


def load_file(path: str) -> OwnData:
    """Run a file of the user's. Raises UserError for one that cannot be read, fails, or lacks the function."""
    file = Path(path)
    try:
        code = file.read_bytes()
    except OSError as error:
        raise UserError(f"dataset: {path} cannot be read: {error.strerror}; name a file such as my_data.py") from error
    module = _module(file, code, path)
    load = getattr(module, FUNCTION, None)
    if not callable(load):
        raise UserError(f"{path}: it has no function {FUNCTION}(settings), which gives the data; define it")
    defaults = getattr(module, DEFAULTS, {})
    if not isinstance(defaults, dict):
        raise UserError(f"{path}: {DEFAULTS} is a {type(defaults).__name__}; it must be a dict of settings")
    check_settings(defaults, lambda name: f"{path}: {DEFAULTS}: {name}")
    if "dataset_type" in defaults:
        raise UserError(f"{path}: {DEFAULTS}: dataset_type is this file itself; remove it")
    checksum, classes = hashlib.sha256(code).hexdigest(), own_classes(vars(module).values())
    return OwnData(file.name, load, path, checksum, defaults, classes)


def _module(file: Path, code: bytes, path: str) -> Any:
    """The file as a module, which workers, its neighbours and pickle find by its name, as if it had been imported."""
    name, there = file.stem, None
    if name.isidentifier():
        there = importlib.util.find_spec(name)
    if not name.isidentifier() or (there and Path(there.origin or "").resolve() not in {file.resolve(), *_loaded}):
        other = f"{there.origin or 'of Python'} has the same name" if there else "it must be a name of a Python module"
        raise UserError(f"dataset: {path} cannot be called so: {other}; rename the file")
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    module = importlib.util.module_from_spec(spec)
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    sys.modules[name] = module
    _loaded.add(file.resolve())
    try:
        compiled = compile(code, path, "exec")
    except (SyntaxError, ValueError) as error:  # ValueError: null bytes
        line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
        text = (getattr(error, "text", None) or "").strip()
        told = f"{type(error).__name__}: {getattr(error, 'msg', error)}" + (f": {text}" if text else "")
        raise UserError(f"{path}{line}: {told}") from error
    with running(path):
        exec(compiled, vars(module))
    return module


def own_classes(values: Any) -> dict[str, type[Adapter]]:
    """The user's own classes of adapters among these values, by name."""
    ours = {Adapter, *ADAPTERS.values()}
    classes = (value if isinstance(value, type) else type(value) for value in values)
    return {one.__name__: one for one in classes if issubclass(one, Adapter) and one not in ours}


def of_python(data: Any, class_names: Sequence[str] | None = None, adapters: Any = None) -> OwnData:
    """The data that `train.train` is given."""
    if not isinstance(data, Mapping):
        raise UserError(f"data is a {type(data).__name__}; it must be a dict: data={{'train': items, 'test': items}}")
    for name, value in {"class_names": class_names, "adapters": adapters}.items():
        if value is not None and name in data:
            raise UserError(f"{name}: given twice, in data and beside it; give it once")
    given = {**data, **({} if class_names is None else {"class_names": class_names})}
    given |= {} if adapters is None else {"adapters": adapters}
    parts = adapters.values() if isinstance(adapters, Mapping) else [adapters]
    return OwnData(PYTHON, lambda settings: given, classes=own_classes(parts))


# --- What it gives ----------------------------------------------------------------------------------------------------


@dataclass
class Given:
    """What the user's code returned, checked."""

    sources: dict[str, Any]  # of a split, the list or Dataset
    class_names: list[str] | None
    adapters: dict[str, Adapter | type[Adapter]]  # none where inputs are tokens


def load(own: OwnData, settings: Settings) -> Given:
    """Ask the user's code for the data. Raises UserError for what it does not take."""
    where = f"{own.path}: {FUNCTION}" if own.path else "data"
    with running(where):
        found = own.load(settings)
    keys = (*SPLITS, "class_names", "adapters")
    if not isinstance(found, Mapping) or "train" not in found or not set(found) <= set(keys):
        told = f"{found!r:.60}"
        if isinstance(found, Mapping):
            told = f"a dict of {', '.join(map(str, found)) or 'nothing'}"
        does = "returned" if own.path else "is"
        raise UserError(f"{where} {does} {told}; it must be a dict with 'train', and may have "
                        f"{', '.join(keys[1:])}")  # fmt: skip
    names, adapters = found.get("class_names"), found.get("adapters")
    if names is not None:
        texts = isinstance(names, (list, tuple)) and all(isinstance(one, str) for one in names)
        if not texts or len(set(names)) != len(names) or not names:
            raise UserError(f"{where}: class_names must be a list of different names, not {names!r:.60}")
    sources = {}
    for name in SPLITS:
        if (source := found.get(name)) is None and name != "train":
            continue
        indexed = hasattr(source, "__len__") and hasattr(source, "__getitem__")
        if isinstance(source, (str, Mapping)) or not (indexed or hasattr(source, "__iter__")):
            raise UserError(f"{where}: {name} is a {type(source).__name__}; it must be a list of items, or a Dataset "
                            "that has a length, or an iterable")  # fmt: skip
        if isinstance(source, IterableDataset) or not indexed:
            with running(f"{where}: {name}"):
                source = Stream(source, f"{where}: {name}") if name == "train" else list(source)
        elif not len(source):
            raise UserError(f"{where}: {name} is empty; give it items, or leave it out" * (name != "train")
                            or f"{where}: train is empty; give it items")  # fmt: skip
        sources[name] = source
    if isinstance(sources["train"], Stream) and (absent := [name for name in SPLITS if name not in sources]):
        raise UserError(f"{where}: train is an iterable, of which nothing can be set aside: give "
                        f"{' and '.join(absent)} too")  # fmt: skip
    if adapters is not None and not isinstance(adapters, Mapping):
        adapters = {getattr(adapters, "modality", ONLY): adapters}
    for name, adapter in (adapters or {}).items():
        kind = adapter if isinstance(adapter, type) else type(adapter)
        if not issubclass(kind, Adapter):
            raise UserError(f"{where}: {adapter!r:.60} is no adapter; write a subclass of adapters.Adapter")
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(f"{where}: {kind.__name__}.modality must be a name such as 'audio', not {name!r:.60}")
    return Given(sources, None if names is None else list(names), dict(adapters or {}))


class Stream:
    """An iterable as a list that is read forward: of training items in the order in which it gives them.

    Each pass runs through it from the start. It may give its items in another order each time, but as many as in the
    first pass. It is not known what comes later, so nothing is shuffled, and to get to an item those before it are
    read: a resume in mid-epoch reads what it skips, and each process reads all.
    """

    in_order = True
    lengths = None  # not known before an item is there

    def __init__(self, source: Any, where: str):
        if iter(source) is source:
            raise UserError(f"{where} is a {type(source).__name__}, which can be run through only once; give a list, "
                            "or an iterable that starts again, such as an object with __iter__")  # fmt: skip
        self.source, self.where, self.count = source, where, 0
        self.items, self.read, self.item = None, 0, None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"items": None, "item": None}

    def __len__(self) -> int:
        """Items of the first pass, once that has ended."""
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.items = None
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)

    def numbers(self) -> Iterator[int]:
        """The first pass: the numbers of the items, as long as there are some."""
        while self._read_to(self.count):
            yield self.count
            self.count += 1

    def __getitem__(self, number: int) -> Any:
        if not self._read_to(number):
            raise UserError(f"{self.where} gave {self.read} items in this pass, {self.count} in the first one; it must "
                            "give as many each time")  # fmt: skip
        return self.item

    def _read_to(self, number: int) -> bool:
        """Read up to this item. False if they end before it."""
        if self.items is None or number < self.read - 1:
            self.items, self.read = iter(self.source), 0
        while self.read <= number:
            try:
                self.item = next(self.items)
            except StopIteration:
                return False
            self.read += 1
        return True


Place = tuple[Any, int]  # (list or Dataset, number of the item)


def read_items(
    sources: Mapping[str, Any], own: OwnData, labelled: bool = True, max_errors: int = 20
) -> dict[str, Items]:
    """Labels, names and groups of the items of each split; their values are places, from which the items are read.

    What has attributes `lengths` and `labels` is taken at its word and not read (as in `batches.create_dataloader`).
    """
    splits, errors = {}, []
    for name, source in sources.items():
        where = f"{own.path}: {name}" if own.path else name
        found = splits[name] = Items([], [], [], [])
        if hasattr(source, "lengths") and hasattr(source, "labels"):
            for known in ("lengths", "labels"):
                if (values := getattr(source, known)) is not None and len(values) != len(source):
                    raise UserError(f"{where}: it has {len(values)} {known} for {len(source)} items; give one for each")
            found.places = [f"{where}[{number}]" for number in range(len(source))]
            found.values = [(source, number) for number in range(len(source))]
            found.labels = [plain_label(label) for label in source.labels]
            found.ids = [as_utf8(str(id)) for id in getattr(source, "ids", range(len(source)))]
            continue
        groups = []
        if hasattr(source, "set_epoch"):
            source.set_epoch(0)
        numbers = source.numbers() if isinstance(source, Stream) else range(len(source))
        numbers = iter(with_progress(numbers, f"reading {name}"))
        while len(errors) <= max_errors:
            with running(where):  # a stream may fail where it is asked whether there is another item
                if (number := next(numbers, None)) is None:
                    break
            found.places.append(place := f"{where}[{number}]")
            found.values.append((source, number))
            try:
                item = item_of(source, number, place)
                if labelled and "label" not in item:
                    raise UserError(f"{place}: it has no 'label'")
                found.labels.append(plain_label(item.get("label")))
                found.ids.append(as_utf8(str(item.get("id", number))))
                groups.append(item.get("group"))
            except UserError as error:
                if error.__cause__:  # an exception of the user's code, which is likely the same for every item
                    raise
                errors.append(error)
        if not found.places:
            raise UserError(f"{where} is empty; give it items")
        if not errors and any(group is not None for group in groups):
            found.groups = ["" if group is None else str(plain_label(group)) for group in groups]
            refuse_together(UserError(f"{place}: it has no 'group', others have one; give it one")
                            for place, group in zip(found.places, found.groups, strict=True) if not group)  # fmt: skip
    refuse_together(errors)
    return splits


KEYS = ("input", "label", "mask", "id", "group")  # of an item


def item_of(source: Any, number: int, where: str) -> Item:
    """An item of the user's as a dict."""
    with running(where):
        item = source[number]
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return {"input": item[0], "label": item[1]}
    if not isinstance(item, dict) or "input" not in item:
        found = f"a dict of {list(item)}" if isinstance(item, dict) else f"a {type(item).__name__}"
        raise UserError(f"{where}: an item must be a dict with 'input' and 'label', or a pair of both; this is {found}")
    for name in item.keys() - KEYS:  # what an item holds beside them is its own affair, but a slip is not
        if meant := get_close_matches(str(name), KEYS, 1, 0.8):
            raise UserError(f"{where}: {name!r} is not read; if it is meant to be {meant[0]!r}, call it so, otherwise "
                            "call it something else")  # fmt: skip
    return item


def plain_label(label: Any) -> Any:
    """Python's own numbers and lists in the place of NumPy's and torch's."""
    if isinstance(label, (Tensor, np.ndarray, np.generic)):
        return label.tolist()
    return [plain_label(part) for part in label] if isinstance(label, (list, tuple)) else label


def is_name(label: Any) -> bool:
    """Whether a label names classes, rather than giving their numbers."""
    if isinstance(label, (list, tuple)):
        return all(isinstance(part, str) for part in label)
    return label is None or isinstance(label, str)


def read_targets(task: Task, found: Items) -> tuple[list[Any], list[UserError]]:
    """(the targets of labels that are names of the task's classes, or numbers as its loss takes them; errors)."""
    named = [number for number, label in enumerate(found.labels) if is_name(label)]
    values, errors = task.read([found.labels[i] for i in named], [found.places[i] for i in named])
    targets = dict(zip(named, [] if values is None else values, strict=False))
    for number, (label, place) in enumerate(zip(found.labels, found.places, strict=True)):
        if number not in targets and not is_name(label):
            try:
                targets[number] = task.target(label, place)
            except UserError as error:
                errors.append(error)
    return [targets.get(number) for number in range(len(found.labels))], errors


def target_of(task: Task, label: Any, place: str) -> Any:
    """The target of one label, as `read_targets` makes it. Raises UserError."""
    (target,), errors = read_targets(task, Items([""], [place], [None], [plain_label(label)]))
    refuse_together(errors)
    return target


def fit_adapters(given: Given, train: Items, settings: Settings, own: OwnData) -> dict[str, Adapter]:
    """The adapters of the training items: as given, or of the given class, fitted."""
    made = {}
    for name, adapter in given.adapters.items():
        if isinstance(adapter, type):
            source = Source({"train": []}, {"train": []})
            for place, value in zip(train.places, train.values, strict=True):
                inputs = by_modality(item_of(*value, place), given.adapters, place)
                if name in inputs:
                    source.values["train"].append(inputs[name])
                    source.places["train"].append(place)
            if not source.values["train"]:
                raise UserError(f"{own.path or 'data'}: no training item has an input for {name}")
            with running(f"{own.path or 'data'}: {adapter.__name__}.fit"):
                adapter, _ = adapter.load(source, settings, None)
        describe(adapter)  # what cannot be stored is refused here
        made[name] = adapter
    return made


def without_effect(given: Given, settings: Settings) -> list[str]:
    """A note for each setting of tokens that no class among the adapters is fitted with."""
    classes = [adapter for adapter in given.adapters.values() if isinstance(adapter, type)]
    readers = {"stem": (ImageAdapter, SeriesAdapter, TextAdapter), "series_window": SeriesAdapter,
               "series_stride": SeriesAdapter}  # fmt: skip
    return [
        f"{name} has no effect: it is for adapters that the run fits, given as classes such as SeriesAdapter"
        for name, kinds in readers.items()
        if getattr(settings, name) != FIELDS[name].default and not any(issubclass(one, kinds) for one in classes)
    ]


def by_modality(item: Item, known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The inputs of an item; `known`: the modalities there are, none where any will do."""
    inputs = item["input"]
    if not isinstance(inputs, dict):
        if len(known) > 1:
            raise UserError(f"{where}: the input must be a dict with some of {', '.join(known)}")
        return {next(iter(known), TensorAdapter.modality): inputs}
    for name in inputs:
        if known and name not in known:
            raise UserError(f"{where}: there is no adapter of {name}, only of {', '.join(known)}")
    return inputs


class PreparedDataset(Dataset):
    """Items of the user's as the model reads them: made into tokens, cut to max_seq_len, checked, with targets.

    Args:
        places: where each item is read.
        names: of each item, for messages.
        adapters: none where inputs are tokens.
        training: whether each epoch may draw the items anew; else they are those of epoch 0.
        per_token: whether a label has a value for each token, or what the adapter makes tokens of.
        target_of: of a `Stream`, the target of an item's label and its place.
    """

    def __init__(
        self, places: Sequence[Place], names: Sequence[str], ids: Sequence[str], labels: Sequence[Any],
        adapters: Mapping[str, Adapter], max_seq_len: int | None, training: bool, show: str = "",
        per_token: bool = False, target_of: Callable[[Any, str], Any] | None = None,
    ):  # fmt: skip
        self.places, self.names, self.ids, self.given = places, names, np.array(ids, object), labels
        self.labels, self.per_token = copy.copy(labels), per_token  # as the loss needs them; as they were given
        self.adapters, self.max_seq_len, self.training = adapters, max_seq_len, training
        source = places[0][0]
        self.source, self.ready, self.target_of = source, None, target_of
        self.in_order = isinstance(source, Stream)
        self.set_epoch(0)
        if isinstance(source, (list, tuple)):
            self.ready = [self._prepare(number) for number in self._shown(show)]
        if hasattr(source, "lengths"):
            lengths = [source.lengths[number] for _, number in places] if source.lengths is not None else None
            self.lengths = None if lengths is None else np.minimum(lengths, max_seq_len or np.inf)
            self.widths = {name: tokens.size(1) for name, tokens in self._by_name(self[0]["input"]).items()}
        else:
            self.lengths, self.widths = np.zeros(len(places), np.int64), {}
            for number in range(len(places)) if self.ready else self._shown(show):
                item = self[number]
                self.labels[number] = item["label"]
                for name, tokens in self._by_name(item["input"]).items():
                    self.lengths[number] += len(tokens)
                    width = self.widths.setdefault(name, tokens.size(1))
                    if width != tokens.size(1):
                        raise UserError(f"{names[number]}: {tokens.size(1)} channels of {name}, the items before it "
                                        f"have {width}; make them equal")  # fmt: skip

    def _by_name(self, tokens: Any) -> dict[str, Tensor]:
        return tokens if isinstance(tokens, dict) else {next(iter(self.adapters), TensorAdapter.modality): tokens}

    def _shown(self, show: str) -> Any:
        return with_progress(range(len(self)), show) if show else range(len(self))

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch if self.training else 0)

    def subset(self, numbers: np.ndarray) -> "PreparedDataset":
        part = copy.copy(self)
        for name in ("places", "names", "ready"):
            values = getattr(self, name)
            setattr(part, name, values and [values[number] for number in numbers])
        for name in ("ids", "labels", "given", "lengths"):
            values = getattr(self, name)
            setattr(part, name, None if values is None else values[numbers])
        return part

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Item:
        return self.ready[number] if self.ready else self._prepare(number)

    def _prepare(self, number: int) -> Item:
        where = self.names[number]
        item = item_of(*self.places[number], where)
        label = self.target_of(item.get("label"), where) if self.in_order else self.given[number]
        inputs = by_modality(item, self.adapters, where)
        if self.adapters:
            with running(where):
                if self.per_token and len(inputs) == 1:
                    ((name, value),) = inputs.items()
                    label = self.adapters[name].of_tokens(value, label)
                inputs = {name: self.adapters[name](value) for name, value in inputs.items()}
        several, masks = isinstance(item["input"], dict), item.get("mask")
        known = {"input": inputs if several else next(iter(inputs.values())), "mask": masks}
        parts, _ = to_sample(known, where, self.max_seq_len)
        if self.per_token:
            label = for_tokens(label, known["input"] if several else {ONLY: known["input"]}, parts, where)
        if not several:
            ((tokens, mask),) = parts.values()
            return {"input": tokens, "mask": mask, "label": label}
        tokens, masks = ({name: part[place] for name, part in parts.items()} for place in (0, 1))
        return {"input": tokens, "mask": masks, "label": label}


def check_width(name: str, width: int, adapters: Mapping[str, Adapter], where: str) -> None:
    """Raise UserError unless the model is told of tokens of this width of the modality."""
    told = adapters[name].features.get("input_dim") if name in adapters else None
    told = 1 if told is None and name in adapters else told  # numbers of tokens to be embedded
    if told != width:
        raise UserError(f"{where}: its tokens of {name} have {width} channels, the model takes "
                        f"{told or ' and '.join(adapters)}; make them alike")  # fmt: skip


def require(own: OwnData | None, dataset: str) -> None:
    """Raise UserError where a data set of the user's own code is asked for and the code is not given."""
    if own is not None:
        return
    if dataset == PYTHON:
        raise UserError("dataset: its data were given to train() in Python; give them again there: "
                        "train(settings, data=..., resume=...) or evaluate(model, dataset)")  # fmt: skip
    raise UserError(f"dataset: the data come from {Path(dataset).name}, a file of your code, which runs only where you "
                    f"name it: add --dataset path/to/{Path(dataset).name}")  # fmt: skip


def fingerprint(data: PreparedDataset, labels: Sequence[str]) -> str:
    """A checksum of the names and labels of items; of a list, also of what they hold. A Dataset may draw its own; of a
    `Stream`, whose order may change, how often each label occurs."""
    if data.in_order:
        return f"{zlib.crc32(as_utf8(chr(0).join(sorted(labels))).encode()):08x}"
    result = 0
    for number, (id, label) in enumerate(zip(data.ids, labels, strict=True)):
        parts = [id, label]
        if data.ready:
            inputs = item_of(*data.places[number], "")["input"]
            parts += inputs.values() if isinstance(inputs, dict) else [inputs]
        for part in parts:
            result = zlib.crc32(_contents(part), result)
    return f"{result:08x}"


def _contents(value: Any) -> bytes:
    """Of text, an image, or numbers; nothing of what else a list may hold, of which bytes are no measure."""
    if isinstance(value, (str, Path)):
        return as_utf8(getattr(value, "name", value)).encode()
    if hasattr(value, "tobytes"):
        return value.tobytes()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        return b""
    return array.tobytes() if array.dtype.kind in "biufc" else b""
