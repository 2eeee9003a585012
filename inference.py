"""Evaluate a checkpoint on the data that it was trained for, or use it in a notebook.

    python inference.py --model_path checkpoints/best_model.pth
    python inference.py --model_path checkpoints/best_model.pth --analyze --output_dir results/

writes results.json, confusion_matrix.png, confidence_histogram.png and confidence_analysis.png; --analyze adds the
calibration table, accuracy by length, the most confident mistakes, attention maps and a projection of the latents.
Data set, preprocessing and model come from the checkpoint.

    from inference import load_model, predict
    model, settings = load_model("checkpoints/best_model.pth")
    predict(model, [image_or_sequence, ...])
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

import evaluation
from checkpoint import build_model, load_checkpoint
from config import (
    Parser,
    UserError,
    choose_device,
    choose_precision,
    exit_on_user_error,
    resolve,
    unused_settings,
)
from data_utils import Batch, collate, create_dataloader, load_splits, prepare_images, to_sample
from perceiver_model import PerceiverModel

OVERRIDES = ("data_dir", "num_workers", "batch_size", "amp", "device")  # settings that evaluation may choose anew
EXAMPLES = 3  # samples whose attention maps are drawn


# --- In a notebook ---------------------------------------------------------------------------------------------------


def load_model(path: str, device: str | torch.device = "cpu") -> tuple[PerceiverModel, dict[str, Any]]:
    """The model of a checkpoint, ready for prediction, and the settings that it was trained with.

    ``model.data_info`` describes the data: class names, normalisation, patch size, length limit (see data_utils.py).
    Raises UserError (a ValueError) for a file that is missing, damaged or no checkpoint of this project.
    """
    checkpoint = load_checkpoint(path)
    return _model(checkpoint, device), checkpoint["settings"]


def _model(checkpoint: dict[str, Any], device: str | torch.device) -> PerceiverModel:
    model = build_model(checkpoint).to(device)
    model.data_info = checkpoint["data"]
    return model


def predict(model: PerceiverModel, items: Sequence[Any], batch_size: int = 64) -> list[dict[str, Any]]:
    """Classify raw items with a model from :func:`load_model`.

    Args:
        items: sequences, float arrays (length, channels) of any length; or for an image model images as stored, whole
            numbers 0..255 (of the digits 0..16), arrays (H, W) or (H, W, channels).
        batch_size: items at a time; it changes no result.

    Returns:
        for each item {'label': class number, 'class': its name, 'confidence': its probability,
        'probabilities': {class name: probability}}.

    Raises:
        UserError: an item that the model cannot take.
    """
    device = next(model.parameters()).device
    names = model.data_info["class_names"]
    answers = []
    with evaluation.evaluating(model, device, None):
        for first in range(0, len(items), batch_size):
            batch = _batch(items[first : first + batch_size], first, model.data_info)
            for row in model(*evaluation.model_inputs(batch, device)).cpu().double().softmax(1):
                label, probabilities = int(row.argmax()), row.tolist()
                answers.append(
                    {
                        "label": label,
                        "class": names[label],
                        "confidence": probabilities[label],
                        "probabilities": dict(zip(names, probabilities, strict=True)),
                    }
                )
    return answers


def _batch(items: Sequence[Any], first: int, data: dict[str, Any]) -> Batch:
    """A batch of raw items, the first of which has the number `first` in error messages."""
    if data["image_shape"] is None:
        sequences = []
        for i, item in enumerate(items, first):
            tokens, _, _ = to_sample({"input": item}, f"item {i}", data["max_seq_len"])
            if tokens.size(1) != data["input_dim"]:
                raise UserError(f"item {i}: tokens of {tokens.size(1)} channels; the model takes {data['input_dim']}")
            sequences.append({"input": tokens})
        return collate(sequences)
    shape = tuple(data["image_shape"])
    images = np.empty((len(items), *shape), np.uint8)
    for i, item in enumerate(items):
        try:
            image = np.asarray(item, np.float64)
        except (TypeError, ValueError) as error:
            raise UserError(f"item {first + i}: the image is not an array of numbers: {error}") from error
        image = image[..., None] if image.ndim == 2 else image
        if image.shape != shape:
            raise UserError(f"item {first + i}: an image of shape {image.shape}; the model takes {shape}")
        with np.errstate(invalid="ignore"):
            images[i] = image
        if not np.array_equal(images[i], image):
            raise UserError(f"item {first + i}: pixels must be whole numbers from 0 to 255, as they are stored")
    tokens = prepare_images(images, data["mean"], data["std"], data["patch_size"])
    return {"input": tokens, "mask": torch.ones(tokens.shape[:2], dtype=torch.bool)}


def evaluate(
    model: PerceiverModel,
    dataset: Dataset,
    batch_size: int = 32,
    amp_dtype: torch.dtype | None = None,
    num_workers: int = 0,
    analyze: bool = False,
    output_dir: str | Path | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Metrics of a model from :func:`load_model` over a labelled data set, as plain data (see evaluation.py).

    Args:
        analyze: add calibration, accuracy by length and the most confident mistakes.
        output_dir: where to write results.json and the figures; None writes nothing.
        about: put first into the results.
    """
    data, device = model.data_info, next(model.parameters()).device
    names = data["class_names"]
    loader = create_dataloader(
        dataset, batch_size, num_classes=len(names), max_seq_len=data["max_seq_len"], num_workers=num_workers
    )
    found = evaluation.collect_predictions(model, loader, device, amp_dtype)
    logits, labels, lengths = found["logits"], found["labels"], found["lengths"]
    results = {**(about or {}), **evaluation.compute_metrics(logits, labels, names)}
    figures = evaluation.evaluation_figures(logits, labels, names)
    if analyze:
        results["analysis"] = evaluation.analyze_predictions(logits, labels, lengths, names)
    if output_dir is not None:
        if analyze:
            figures |= _analysis_figures(model, dataset, loader, found, results["analysis"], amp_dtype)
        results["figures"] = list(figures)
        evaluation.save_evaluation(output_dir, results, figures)
    return results


def _images(tokens: torch.Tensor, data: dict[str, Any]) -> np.ndarray:
    """The images (B, H, W, C) as stored, of which `prepare_images` made these tokens."""
    rows, columns = data["grid_shape"]
    size = data["patch_size"]
    patches = tokens.reshape(len(tokens), rows, columns, size, size, -1).transpose(2, 3)
    pixels = patches.reshape(len(tokens), *data["image_shape"]).numpy()
    return (pixels * np.array(data["std"]) + data["mean"]).round()


def _analysis_figures(
    model: PerceiverModel, dataset: Dataset, loader: Any, found: dict, analysis: dict, amp_dtype: torch.dtype | None
) -> dict[str, Callable[[Path], None]]:
    """The figures of an analysis; what they need beyond the predictions is computed when they are drawn."""
    data, device = model.data_info, next(model.parameters()).device
    names, labels, predicted = data["class_names"], found["labels"], found["logits"].argmax(1)

    def latents(path: Path) -> None:
        pooled = evaluation.collect_latents(model, loader, device, amp_dtype)
        evaluation.plot_latent_projection(pooled, labels, names, path)

    def attention(path: Path) -> None:
        chosen = np.sort(np.unique(labels, return_index=True)[1][:EXAMPLES])  # the first sample of a few classes
        captions = [f"true {names[labels[i]]}, predicted {names[predicted[i]]}" for i in chosen]
        batch = collate([dataset[i] for i in chosen], data["max_seq_len"])
        maps = evaluation.collect_attention(model, batch, device)
        if data["image_shape"]:
            images = _images(batch["input"], data)
            evaluation.plot_image_attention(images, maps, data["grid_shape"], captions, path)
        else:
            evaluation.plot_sequence_attention(batch["input"].numpy(), batch["mask"].numpy(), maps, captions, path)

    def mistakes(path: Path) -> None:
        rows = analysis["most_confident_mistakes"]
        tokens = [dataset[row["index"]]["input"] for row in rows]
        evaluation.plot_mistakes(rows, _images(torch.stack(tokens), data) if rows else [], path)

    figures = {"attention.png": attention, "latents.png": latents}
    if analysis["accuracy_by_length"]:
        figures["accuracy_by_length.png"] = partial(evaluation.plot_accuracy_by_length, analysis["accuracy_by_length"])
    if data["image_shape"]:
        figures["mistakes.png"] = mistakes
    return figures


# --- Command line ----------------------------------------------------------------------------------------------------


def print_results(results: dict[str, Any]) -> None:
    """The metrics, and a line per class where they are few enough to read."""
    for name, value in results.items():
        if isinstance(value, (int, float)) and name not in ("epoch", "split_seed", "num_classes"):
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            print(f"{name.replace('_', ' '):<28}{shown:>8}")
    rows = results["per_class"]
    if len(rows) <= 20:
        width = max(len("class"), *(len(row["class"]) for row in rows))
        print(f"\n{'class':<{width}}  precision  recall      f1  support")
        for row in rows:
            figures = ["-" if row[key] is None else f"{row[key]:.4f}" for key in ("precision", "recall", "f1")]
            print(f"{row['class']:<{width}}  {figures[0]:>9}  {figures[1]:>6}  {figures[2]:>6}  {row['support']:>7}")


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, usage="%(prog)s --model_path FILE [--analyze] [--output_dir DIR] [...]")
    parser.add_argument("--model_path", metavar="FILE", required=True, help="the checkpoint")
    parser.add_argument("--analyze", action="store_true", help="write the analysis too, and its figures")
    parser.add_argument("--output_dir", metavar="DIR", default="results", help="folder of results (default results)")
    parser.add_argument("--split", metavar="{test,val,train}", choices=("test", "val", "train"), default="test",
                        help="what to evaluate on (default test); train is taken without augmentation")  # fmt: skip
    parser.add_settings(OVERRIDES, default="as in training; device and data are looked for here")
    args = parser.parse_args(argv)

    checkpoint = load_checkpoint(args.model_path)
    here = {"device": "auto", "augment": False}  # the device of training may not exist here
    settings, sources = resolve(base={**checkpoint["settings"], **here}, flags=args.flags)
    for note in unused_settings(settings, sources):
        print(f"note: {note}")
    device = choose_device(settings.device)
    if settings.amp == "fp16" and device.type != "cuda" and "amp" not in args.flags:
        print(f"note: trained in fp16, which needs CUDA; evaluating in float32 on {device.type}")
        amp_dtype = None
    else:
        amp_dtype = choose_precision(settings.amp, device)
    model = _model(checkpoint, device)
    splits, _ = load_splits(settings, model.data_info)
    about = {
        "model_path": args.model_path,
        "epoch": checkpoint["epoch"],
        "dataset": settings.dataset_type,
        "split": args.split,
        "split_sizes": model.data_info["split_sizes"],
        "split_seed": model.data_info["split_seed"],
    }
    print(f"{args.model_path}: {settings.dataset_type}, {args.split} split, on {device}")
    try:
        results = evaluate(
            model, splits[args.split], settings.batch_size, amp_dtype, settings.num_workers, args.analyze,
            args.output_dir, about,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"cannot write into {args.output_dir}: {error.strerror}; take another --output_dir") from error
    except ExceptionGroup as error:  # of figures
        unwritten, faults = error.split(OSError)
        if faults:
            raise
        raise UserError(f"{error.message}: {unwritten.exceptions[0].strerror}; take another --output_dir") from error
    print_results(results)
    print(f"\nwrote {', '.join(['results.json', *results['figures']])} into {args.output_dir}")
    return 0


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files; a notebook hands down a backend that may not exist here
    sys.exit(main())
