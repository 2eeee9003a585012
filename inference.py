"""Evaluate a checkpoint on the data that it was trained for, predict new items, or use it in a notebook.

    python inference.py --model_path checkpoints/best_model.pth
    python inference.py --model_path checkpoints/best_model.pth --analyze --output_dir results/
    python inference.py --model_path checkpoints/best_model.pth --input new_images/
    python inference.py --pretrained path/to/vision-perceiver-conv/ --input photos/
    python inference.py --model_path checkpoints/best_model.pth --dataset path/to/my_data.py    # trained with this file

The first two write results.json, items.csv (each item with its true and its predicted answer) and the figures of the
task; for a classifier, these are confusion_matrix.png, confidence_histogram.png and confidence_analysis.png. --analyze
adds calibration, results by length, the worst mistakes, attention maps and a projection of the latents. --test_path
evaluates all of another labelled set, without the training data. --input writes predictions.csv: the id and the answer
of each item. It takes what the model was trained on (a folder of images, a .ts, .npz or .csv of series, a table of
texts, a manifest; no labels needed) or a single image, .txt or .npy. Data set, preprocessing and model come from the
checkpoint, or with --pretrained from the folder of a published model (pretrained.py): classes of ImageNet, or texts
whose [MASK] is filled.

    from inference import load_model, predict
    model, settings = load_model("checkpoints/best_model.pth")
    predict(model, [image_or_series_or_text, ...])
"""

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

import evaluation
import folds
import own_data
import plots
from adapters import Adapter, ImageAdapter
from batches import Item, check_batch_size, collate, create_dataloader, inputs_for
from checkpoint import equipped_model, load_checkpoint
from config import (
    FIELDS,
    OWN_DATA,
    PYTHON,
    Parser,
    Settings,
    check_cache,
    check_folder,
    choose_device,
    choose_precision,
    is_code,
    resolve,
    unused_settings,
    usable_device,
)
from data_files import Items, without_effect
from data_utils import CIFAR10_FILES, load_splits, read_items
from distributed import refuse_processes
from messages import (
    UserError,
    as_utf8,
    exit_on_user_error,
    figure_text,
    memory_advice,
    naming,
    print_note,
    printable,
    with_progress,
)
from own_data import OwnData
from perceiver_model import PerceiverModel
from pixels import in_threads
from pretrained import fill_masks, load_pretrained
from tables import FileFinder

COLUMNS = ("id_column", "text_column", "image_column", "series_column", "label_column")
FEATURES = ("feature_columns", "ignore_columns", "table_rows")
LOOKS = ("delimiter", "encoding", "quoting")  # true of one file, not of the next
# Settings that may differ from those of training
OVERRIDES = (
    "data_path", "test_path", *COLUMNS, *FEATURES, *LOOKS, "max_unpacking", "data_dir", "num_workers", "batch_size",
    "amp", "device", "cache", "cache_dir",
)  # fmt: skip
COMMON = {"Settings": ("data_path", "test_path", "label_column", "batch_size", "num_workers", "amp", "device")}
EXAMPLES = 3  # samples whose attention maps are drawn
REPORTED = 10  # how many unreadable items are named; the rest are only counted
READING_REMEDIES = ("fewer items", "--max_unpacking", "closing other programs")
MEMORY_REMEDIES = ("a smaller --batch_size", "--amp bf16", "--device cpu", "closing other programs")
NOT_FINITE = "the model's answers are not all finite: its numbers overflow; use float32 (model.float(), --amp off)"


# --- In a notebook ---------------------------------------------------------------------------------------------------


def load_model(
    path: str, device: str | torch.device = "cpu", adapters: Sequence[type[Adapter]] = ()
) -> tuple[PerceiverModel, dict[str, Any]]:
    """The model of a checkpoint, ready for prediction, and the settings that it was trained with.

    adapters: classes of your own that it was trained with; a checkpoint does not load their code by itself.

    `model.data_info` describes the data (class names, splits, ...; see data_utils.py), `model.adapters` prepares raw
    items of each modality (see adapters.py), `model.task` knows what an answer is (see tasks.py).

    Raises:
        UserError: (a ValueError) the file is missing, damaged or no checkpoint of this project, or the device is not
            available.
    """
    checkpoint = load_checkpoint(path)
    Settings.from_dict(checkpoint["settings"])
    own = own_data.own_classes(adapters)
    return equipped_model(checkpoint, usable_device(device), own), checkpoint["settings"]


def predict(model: PerceiverModel, items: Sequence[Any], batch_size: int = 64) -> list[dict[str, Any]]:
    """Answer raw items with a model from `load_model`.

    Args:
        items: a list of texts (a str is a text); of series, float arrays (length, channels) of any length, NaN or
            masked where a value is missing, or DataFrames of a row for each step, whose columns are put in order by
            name; or of images, PIL images or arrays (H, W) or (H, W, channels) of whole numbers 0..255, of any size
            where the model was trained on the user's own images, else as stored (of the digits 0..16). A series or an
            image may also be the path of its file. For a model of several modalities, dicts by modality, without the
            missing ones.
        batch_size: items at a time; it changes no result.

    The model may be in half, bfloat16 or double precision, and in training mode: it answers as in evaluation, and is
    not changed. Any number of threads may call this at once.

    Returns:
        for each item a dict, depending on the task that the model was trained for:

        classification  {'label': class number, 'class': its name, 'confidence': its probability,
                        'probabilities': {class name: probability}}
        regression      {'value': the first number, 'values': {name: number}}, in the units of the training data
        multilabel      {'labels': [names], 'probabilities': {name: probability}}
        tagging         {'classes': [the name of each step or character], 'spans': [{'start', 'end' (excluded), 'class',
                        'confidence': the mean probability}], of what is in no span none}

    Raises:
        UserError: the model cannot take an item, an answer is not finite, or batch_size is below 1.
    """
    if isinstance(items, (str, bytes, dict)):
        raise UserError(f"items must be a list, this is one {type(items).__name__}; write predict(model, [item])")
    if hasattr(items, "columns"):  # iterating it would give the names of its columns
        raise UserError("items must be a list, this is one DataFrame, whose rows are the time steps of a series; write "
                        "predict(model, [frame]), [part for _, part in frame.groupby('id')] or list(frame['text'])")
    if len(shape := getattr(items, "shape", ())) == 2 and shape[1] == 1:  # it would be series of one step each
        raise UserError(f"items must be a list, this is an array of shape {tuple(shape)}; if it is one series, write "
                        "predict(model, [series]), and predict(model, list(items)) if each row is one")  # fmt: skip
    check_batch_size(batch_size)
    if not hasattr(model, "task"):
        raise UserError("this model fills in [MASK]: use pretrained.fill_masks(model, text)")
    check_answers(model)
    prepared = (_prepare(model, item, f"item {number}") for number, item in enumerate(items))
    return list(_answers(model, prepared, batch_size))


def check_answers(model: PerceiverModel) -> None:
    """Raise UserError for a model that answers nothing about new items."""
    if model.head == "hidden":
        raise UserError("a model of --task reconstruct answers what hidden tokens hold, and nothing about new items; "
                        "train one for another task")  # fmt: skip


def _prepare(model: PerceiverModel, item: Any, where: str) -> Item:
    """The tokens of a raw item, by modality."""
    adapters = model.adapters
    if len(adapters) == 1 and not isinstance(item, dict):
        item = dict.fromkeys(adapters, item)
    if not isinstance(item, dict) or not item or item.keys() - adapters.keys():
        found = f"one of {list(item)}" if isinstance(item, dict) else f"a {type(item).__name__}"
        raise UserError(f"{where}: an item must be a dict with some of {', '.join(adapters)}, this is {found}")
    tokens = {}
    for name, value in item.items():
        with naming(where):
            tokens[name] = adapters[name](value)
    return {"input": tokens}


def _answers(model: PerceiverModel, items: Iterator[Item], batch_size: int) -> Iterator[dict[str, Any]]:
    task, model = model.task, evaluation.in_evaluation_mode(model)
    device = next(model.parameters()).device
    while batch := list(islice(items, batch_size)):
        with evaluation.evaluating(model, device, None):
            outputs = model(*inputs_for(model, collate(batch), device)).cpu().double()
        if not outputs.isfinite().all():
            raise UserError(NOT_FINITE)
        if task.per_token:
            ((name, adapter),) = model.adapters.items()
            tokens = [item["input"][name] for item in batch]
            outputs = [adapter.of_units(each, out[: len(each)]) for each, out in zip(tokens, outputs, strict=True)]
        yield from map(task.answer, outputs)


def evaluate(
    model: PerceiverModel,
    dataset: Dataset,
    batch_size: int = 32,
    amp_dtype: torch.dtype | None = None,
    num_workers: int | None = 0,
    analyze: bool = False,
    output_dir: str | Path | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Metrics of a model from `load_model` over a labelled data set, as plain data (see evaluation.py).

    Args:
        dataset: its attribute `ids`, if it has one, names the samples; otherwise they are numbered.
        analyze: add calibration, accuracy by length and the most confident mistakes.
        output_dir: where to write results.json, items.csv and the figures; None writes nothing.
        about: goes first into the results.
    """
    model = evaluation.in_evaluation_mode(model)
    task, device, about = model.task, next(model.parameters()).device, about or {}
    loader = create_dataloader(dataset, batch_size, targets=task, num_workers=num_workers)
    rows = evaluation.collect(model, with_progress(loader, "evaluating"), task, device, amp_dtype)
    if not rows["finite"].all():
        raise UserError(NOT_FINITE)
    results = {**about, **task.metrics(rows)}
    ids = getattr(dataset, "ids", range(len(rows["tokens"])))
    items = evaluation.item_rows(ids, about.get("split", ""), task.items(rows), rows["tokens"])
    figures = task.figures(rows)
    if analyze:
        results["analysis"] = task.analysis(rows, items)
    if output_dir is not None:
        figures |= _example_figures(model, dataset, rows)
        if analyze:
            figures |= _analysis_figures(model, dataset, loader, rows, results["analysis"], amp_dtype)
        results["figures"] = list(figures)
        evaluation.save_evaluation(output_dir, results, items, figures)
    return results


def _example_figures(
    model: PerceiverModel, dataset: Dataset, rows: dict[str, np.ndarray]
) -> dict[str, Callable[[Path], None]]:
    """A few items with what was answered about their tokens, a figure for each modality."""
    task, adapters, ids = model.task, model.adapters, getattr(dataset, "ids", range(len(rows["tokens"])))
    chosen = task.examples(rows).tolist()
    if not chosen:
        return {}

    def draw(modality: str, path: Path) -> None:
        if hasattr(dataset, "__getitems__"):
            batch = dataset.__getitems__(chosen)
        else:
            batch = collate([dataset[number] for number in chosen], targets=task)
        outputs = evaluation.outputs_of(model, batch, next(model.parameters()).device)
        captions = [f"{plots.short(printable(str(ids[i])), 28)}: {task.caption(rows, i)}" for i in chosen]
        task.draw_examples(batch, outputs, captions, modality, adapters[modality], path)

    several = len(adapters) > 1
    return {f"examples{f'_{name}' * several}.png": partial(draw, name) for name in adapters}


def _analysis_figures(
    model: PerceiverModel, dataset: Dataset, loader: Any, rows: dict[str, np.ndarray], analysis: dict[str, list[dict]],
    amp_dtype: torch.dtype | None,
) -> dict[str, Callable[[Path], None]]:  # fmt: skip
    """The figures of an analysis. What they need beyond the rows is computed when they are drawn."""
    task, device, adapters = model.task, next(model.parameters()).device, model.adapters
    only = next(iter(adapters)) if len(adapters) == 1 else None
    samples, (colours, names) = range(len(rows["tokens"])), task.colours(rows)

    def by_modality(number: int) -> dict[str, Any]:
        tokens = dataset[number]["input"]
        return tokens if isinstance(tokens, dict) else {only: tokens}

    def latents(path: Path) -> None:
        pooled = evaluation.collect_latents(model, with_progress(loader, "reading latents"), device, amp_dtype)
        plots.plot_latent_projection(pooled, colours, names, path, task.colour_meaning())

    def attention(modality: str, path: Path) -> None:
        examples = {}  # colour -> its first sample with the modality
        for number in samples:
            if colours[number] not in examples and modality in by_modality(number):
                examples[colours[number]] = number
            if len(examples) == EXAMPLES:
                break
        chosen = list(examples.values())
        batch = collate([{"input": by_modality(i)} for i in chosen])
        maps, tokens = evaluation.collect_attention(model, batch, device), batch["input"][modality]
        maps = [weights[..., model.token_ranges(batch["input"])[modality]] for weights in maps]
        captions = [task.caption(rows, i) for i in chosen]
        if not only:
            shares = [np.mean([weights[i].sum(-1).mean() for weights in maps]) for i in range(len(chosen))]
            captions = [f"{text}, {share:.0%} of the attention" for text, share in zip(captions, shares, strict=True)]
            maps = [weights / weights.sum(-1, keepdims=True) for weights in maps]
        adapters[modality].draw_attention(tokens, batch["mask"][modality].numpy(), maps, captions, path)

    def mistakes(path: Path) -> None:
        worst = task.worst(rows)
        tokens = [dataset[number]["input"] for number in worst]
        images = adapters[only].images(torch.stack(tokens)) if tokens else []
        ids = getattr(dataset, "ids", samples)
        titles = [[plots.short(printable(str(ids[i])), 28), *task.mistake(rows, i)] for i in worst]
        plots.plot_mistakes(images, titles, path)

    there = [name for name in adapters if any(name in by_modality(number) for number in samples)]
    figures = {f"attention_{name}.png": partial(attention, name) for name in there}
    if only:
        figures = {"attention.png": partial(attention, only)}
    figures["latents.png"] = latents
    figures |= task.analysis_figures(analysis)
    if isinstance(adapters.get(only), ImageAdapter):
        figures["mistakes.png"] = mistakes
    return figures


# --- New items -------------------------------------------------------------------------------------------------------


def write_predictions(
    model: PerceiverModel, items: Items, batch_size: int, path: Path, on_error: Callable[[UserError], None]
) -> int:
    """Write a table of ids and answers, or of texts with their masks filled. Returns how many items were answered.

    The first rows are shown. An item that the model cannot take is passed to on_error and left out. Rows are written as
    they are made. The table replaces an older one when it is whole; if it is interrupted, what there is of it is kept
    beside that, and a note says where.
    """
    done = deque()  # ids, in the order of the answers

    def attempt(number: int) -> Item | UserError:
        try:
            return _prepare(model, items.by_modality(number), items.places[number])
        except UserError as error:
            return error

    def prepared() -> Iterator[Item]:
        ahead = in_threads(attempt, range(len(items.ids)), 2 * batch_size)
        for id, item in zip(items.ids, with_progress(ahead, "predicting", len(items.ids)), strict=True):
            if isinstance(item, UserError):
                on_error(item)
                continue
            done.append(id)
            yield item

    def filled() -> Iterator[list[dict[str, Any]]]:
        for number, (id, place) in enumerate(zip(items.ids, items.places, strict=True)):
            try:
                with naming(place):
                    yield [{"id": id, "text": fill_masks(model, items.by_modality(number)["text"])}]
            except UserError as error:
                on_error(error)

    def answered() -> Iterator[list[dict[str, Any]]]:
        for answer in _answers(model, prepared(), batch_size):
            id = done.popleft()
            yield [{"id": id, **row} for row in model.task.records(answer)]

    first, count, partial = [], 0, path.with_stem(f"{path.stem}.partial")
    try:
        with evaluation.written_rows(path, partial) as add:
            for rows in answered() if hasattr(model, "task") else filled():
                for row in rows:
                    add(row)
                first += rows[: REPORTED - len(first)]
                count += 1
    except BaseException as error:
        if count and not isinstance(error, OSError):
            print_note(f"{count:,} of {len(items.ids):,} items were predicted: {partial}")
        raise
    partial.unlink(missing_ok=True)  # of an earlier run
    for row in first:
        print("  ".join(printable(str(cell)) for cell in list(row.values())[:3]))
    return count


# --- Command line ----------------------------------------------------------------------------------------------------


def print_results(results: dict[str, Any]) -> None:
    """Print the metrics, and a line per class or target if they are few enough to read."""

    def shown(value: Any) -> str:
        return figure_text(value) if value is None or isinstance(value, float) else printable(str(value))

    hidden = ("epoch", "split_seed", "num_classes", "num_targets")
    if results.get("num_targets", 1) > 1:
        print("mae and rmse of all numbers are in units of their standard deviations in training")
    for name, value in results.items():
        if type(value) in (int, float) and name not in hidden and not name.startswith("baseline_"):
            beside = f"   baseline {shown(baseline)}" if (baseline := results.get(f"baseline_{name}")) else ""
            print(f"{name.replace('_', ' '):<33}{shown(value):>10}{beside}")
    for rows in (value for name, value in results.items() if name.startswith("per_")):
        if len(rows) > 20 or results.get("num_targets") == 1:
            continue
        header = list(rows[0])
        cells = [[shown(row[name]) for name in header] for row in rows]
        words = [name.split("_") for name in header]  # a line each, so that columns stay narrow
        height = max(map(len, words))
        titles = [list(line) for line in zip(*([""] * (height - len(each)) + each for each in words), strict=True)]
        widths = [max(6 * (i > 0), *(len(line[i]) for line in [*titles, *cells])) for i in range(len(header))]
        print()
        for first, *others in [*titles, *cells]:
            more = "  ".join(f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
            print(f"{first:<{widths[0]}}  {more}")


def predict_files(
    model: PerceiverModel, path: str, settings: Settings, output_dir: str, given: Collection[str] = ()
) -> int:
    """Write predictions.csv for a file or folder. An item that cannot be read is reported and does not stop the others.

    given: names of the settings that were given as flags.
    """
    check_answers(model)
    errors = []

    def report(error: UserError) -> None:
        errors.append(error)
        if len(errors) <= REPORTED:
            print(f"error: {error}", file=sys.stderr)

    table = Path(output_dir) / "predictions.csv"
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise UserError(f"cannot write into {output_dir}: it is a file; take another --output_dir")
    source = FileFinder()(Path(path))
    with memory_advice("while reading the data", READING_REMEDIES):
        items = read_items(source, settings, False, report, model.adapters)
    for note in [*items.notes, *without_effect([source], given)]:
        print_note(note)
    try:
        count = write_predictions(model, items, settings.batch_size, table, report)
    except OSError as error:
        raise UserError(f"cannot write {table}: {error.strerror}; take another --output_dir") from error
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    if len(errors) > REPORTED:
        print(f"error: and {len(errors) - REPORTED} more", file=sys.stderr)
    left_out = f"; {len(errors)} could not be read" if errors else ""
    if not count:
        raise UserError(f"{path}: no item could be read, so no predictions were written")
    print(f"wrote {printable(str(table))}: {count} {'prediction' if count == 1 else 'predictions'}{left_out}")
    return 0


def note_without_effect(args: Any) -> None:
    """Notes on flags that say nothing about --input."""
    names = [name for name in ("data_path", "test_path", "data_dir", "num_workers") if name in args.flags]
    names += ["split"] * (args.split is not None)
    names += ["amp"] * (args.flags.get("amp", "auto") not in ("off", "auto"))
    for name in names:
        print_note(f"{name} has no effect with --input" + " (predictions are made in float32)" * (name == "amp"))


def predict_pretrained(args: Any) -> int:
    """--input with a published model."""
    if args.input is None:
        raise UserError("--pretrained: say with --input what to predict, an image or text, or many of them")
    model = load_pretrained(args.pretrained)
    here = {"dataset_type": "images" if "image" in model.adapters else "text", "batch_size": 4}  # they are large
    settings, sources = resolve(base={**Settings().to_dict(), **here}, flags=args.flags)
    for note in unused_settings(settings, sources):
        print_note(note)
    note_without_effect(args)
    return predict_files(model.to(choose_device(settings.device)), args.input, settings, args.output_dir, args.flags)


def code_again(path: str | None, checkpoint: dict[str, Any], for_data: bool) -> OwnData | None:
    """The file of the user's own code that a checkpoint was trained with, named again; None where it needs none."""
    dataset = checkpoint["settings"].get("dataset_type")
    of_code = is_code(dataset) or dataset == PYTHON
    if path is None:
        if of_code and for_data:
            own_data.require(None, dataset)
        return None
    if not of_code:
        raise UserError(f"dataset: the model was trained on {dataset}, which needs no file of yours; leave it out")
    if not is_code(path):
        raise UserError(f"dataset: {path} is no file of Python code, such as my_data.py")
    own = own_data.load_file(path)
    if is_code(dataset) and own.name != dataset:
        print_note(f"the model was trained with {dataset}; {path} takes its place")
    for note in own.changed(checkpoint["data"]) if own.name == dataset else []:
        print_note(note)
    return own


@exit_on_user_error
@memory_advice("in evaluation", MEMORY_REMEDIES)
def main(argv: list[str] | None = None) -> int:
    usage = "%(prog)s --model_path FILE [--analyze] [--output_dir DIR] [--SETTING VALUE ...]"
    parser = Parser(COMMON, description=__doc__, usage=usage)
    parser.add_argument("--model_path", metavar="FILE", help="the checkpoint")
    parser.add_argument("--pretrained", metavar="FOLDER", help="a published model, in the place of --model_path")
    parser.add_argument("--analyze", action="store_true", help="add the analysis and its figures")
    parser.add_argument("--output_dir", metavar="DIR", default="results", help="folder of results (default results)")
    parser.add_argument("--split", metavar="{test,val,train}", choices=("test", "val", "train"),
                        help="what to evaluate on (default test); train is read without augmentation")  # fmt: skip
    parser.add_argument("--dataset", dest="code", metavar="FILE.py",
                        help="the file of your own code that the model was trained with")  # fmt: skip
    parser.add_argument("--input", metavar="PATH", help="predict these items, instead of evaluating")
    parser.add_settings(OVERRIDES, default="as in training; device and data are looked for here")
    args = parser.parse_args(argv)
    if args.input is not None and args.analyze:
        raise UserError("--analyze: it needs labels, and --input takes none; leave one of them out")
    refuse_processes("inference.py runs in one process, start it with python")
    if (args.model_path is None) is (args.pretrained is None):
        raise UserError("--model_path: name a checkpoint, or with --pretrained the folder of a published model instead")
    if args.pretrained is not None:
        return predict_pretrained(args)

    checkpoint = load_checkpoint(args.model_path)
    own = code_again(args.code, checkpoint, for_data=args.input is None)
    # A test file of the user's own can be evaluated without the training data
    new_data = "test_path" in args.flags and args.split in (None, "test") and args.input is None
    new_data = new_data and checkpoint["settings"].get("dataset_type") in OWN_DATA
    if new_data and args.flags.pop("data_path", None):
        print_note("data_path has no effect: all of test_path is evaluated")
    # The training device may not exist on this machine; pixels are put on its disk where that is asked for here
    here = {"device": "auto", "augment": False, "cache": "auto"}
    if args.input is not None or new_data:
        here |= {name: FIELDS[name].default for name in LOOKS}
    settings, sources = resolve(base={**checkpoint["settings"], **here}, flags=args.flags)
    for note in unused_settings(settings, sources):
        print_note(note)
    device = choose_device(settings.device)
    if args.input is not None:
        note_without_effect(args)
        model = equipped_model(checkpoint, device, own and own.classes)
        return predict_files(model, args.input, settings, args.output_dir, args.flags)
    split = args.split or "test"
    if settings.amp == "fp16" and device.type != "cuda" and "amp" not in args.flags:
        print_note(f"trained in fp16, which needs CUDA; evaluating in float32 on {device.type}")
        amp_dtype = None
    else:
        amp_dtype = choose_precision(settings.amp, device)
    model = equipped_model(checkpoint, device, own and own.classes)
    check_folder("data_dir", settings, sources, *CIFAR10_FILES)
    check_cache(settings, sources)
    with memory_advice("while reading the data", READING_REMEDIES):
        splits, data = load_splits(settings, model.data_info, split, own)
    for note in data["notes"]:
        print_note(note)
    about = {
        "model_path": as_utf8(args.model_path),
        "epoch": checkpoint["epoch"],
        "dataset": settings.dataset_type,
        "split": split,
        "split_sizes": data["split_sizes"],
        "split_seed": data["split_seed"],
    }
    if selection := model.data_info.get("selection"):
        about["selection"] = selection
    if "members" in checkpoint:
        about["folds"] = folds.estimate(model.task, checkpoint["members"])
    known, found = (info.get("fingerprints", {}).get(split) for info in (model.data_info, data))
    about["samples_as_in_training"] = known == found
    if new_data:
        print_note(f"all {len(splits['test'])} items of {settings.test_path} are evaluated")
    elif known != found:
        print_note(
            f"these are not the samples of training's {split} split (other data, or in another order); if it was split "
            "off data_path, it may now hold samples that the model was trained on"
        )
    print(f"{printable(args.model_path)}: {settings.dataset_type}, {split} split, on {device}")
    try:
        with memory_advice("in evaluation", MEMORY_REMEDIES):
            results = evaluate(
                model, splits[split], settings.batch_size, amp_dtype, settings.num_workers, args.analyze,
                args.output_dir, about,
            )  # fmt: skip
    except OSError as error:
        raise UserError(f"cannot write into {args.output_dir}: {error.strerror}; take another --output_dir") from error
    except ExceptionGroup as error:  # of figures
        known, faults = error.split((OSError, UserError))
        if faults:
            raise
        first = known.exceptions[0]
        reason = f"{first.strerror}; take another --output_dir" if isinstance(first, OSError) else first
        raise UserError(f"{error.message}: {reason}") from error
    print_results(results)
    if found := results.get("folds"):
        metric = found["metric"].replace("_", " ")
        print(f"\n{len(found['values'])} models answer together; each on its own fold of the training data: {metric} "
              f"{folds.estimate_text(found)}")  # fmt: skip
    print(f"\nwrote {', '.join(['results.json', 'items.csv', *results['figures']])} into {printable(args.output_dir)}")
    return 0


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files; a notebook hands down a backend that may not exist here
    sys.exit(main())
