"""One pass over a data loader, the metrics of its predictions as plain data, and the files of an evaluation.

Letters: N samples, C classes, B batch, L tokens, D latent width.
"""

import copy
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from config import as_utf8, memory_advice, spreadsheet_cell
from files import PathLike, written_whole

Device = str | torch.device
Batch = Mapping[str, Any]

# ------------------------------------------------------------------------------------- one pass over the data


@contextmanager
def evaluating(model: nn.Module, device: Device, amp_dtype: torch.dtype | None) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode that it was in before.

    Nothing of a model in evaluation mode is changed, so any number of threads may use it at once. One that trains is
    switched over, which its other users see: give threads what `in_evaluation_mode` makes of it.
    """
    switched = [module for module in model.modules() if module.training]
    if switched:
        model.eval()
    autocast = torch.autocast(torch.device(device).type, dtype=amp_dtype, enabled=amp_dtype is not None)
    try:
        with torch.inference_mode(), autocast:
            yield
    finally:
        for module in switched:
            module.training = True


def in_evaluation_mode(model: nn.Module) -> nn.Module:
    """The model, or, where a part of it trains, a copy in evaluation mode that has the same weights in common."""
    if not any(module.training for module in model.modules()):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()


def model_inputs(batch: Batch, device: Device) -> tuple[Any, Any]:
    """Input and mask on the device, for each modality if there are several; no mask where a whole batch is real."""
    if isinstance(batch["input"], dict):
        names = batch["input"].keys()
        pairs = [model_inputs({key: batch[key][name] for key in ("input", "mask")}, device) for name in names]
        return tuple(dict(zip(names, values, strict=True)) for values in zip(*pairs, strict=True))
    mask = batch["mask"]
    x = batch["input"].to(device, non_blocking=True)
    return x, None if mask.all() else mask.to(device, non_blocking=True)


def inputs_for(model: nn.Module, batch: Batch, device: Device) -> tuple[Any, Any]:
    """`model_inputs` in the precision of the weights; but numbers of tokens stay float32, which keeps them whole."""
    x, mask = model_inputs(batch, device)
    dtype = next((weights.dtype for weights in model.parameters()), torch.float32)
    if dtype == torch.float32:
        return x, mask
    features = {name for name, tokens in model.modalities.items() if tokens.embedding is None}
    if isinstance(x, dict):
        return {name: values.to(dtype) if name in features else values for name, values in x.items()}, mask
    return x.to(dtype) if features else x, mask


def token_counts(batch: Batch) -> torch.Tensor:
    """Real tokens of each sample, (B,) int64, of all modalities together."""
    masks = batch["mask"].values() if isinstance(batch["mask"], dict) else [batch["mask"]]
    return sum(mask.sum(1) for mask in masks)


def collect_predictions(
    model: nn.Module, loader, device: Device = "cpu", amp_dtype: torch.dtype | None = None
) -> dict[str, np.ndarray]:
    """Run the model, which is on `device`, once over `loader`.

    Returns, in the loader's order, `logits` (N, C) float32, `labels` (N,) int64 and `lengths` (N,) int64, the
    numbers of real tokens. Raises ValueError where the loader yields nothing.
    """
    logits, labels, lengths = [], [], []
    with evaluating(model, device, amp_dtype):
        for batch in loader:
            logits.append(model(*inputs_for(model, batch, device)).float())
            labels.append(batch["label"].clone())  # what a worker sent holds a file descriptor as long as it is kept
            lengths.append(token_counts(batch))
    if not logits:
        raise ValueError("there is nothing to evaluate: the data loader yields no batch")
    parts = {"logits": logits, "labels": labels, "lengths": lengths}
    return {name: torch.cat(part).cpu().numpy() for name, part in parts.items()}


def collect_latents(
    model: nn.Module, loader, device: Device = "cpu", amp_dtype: torch.dtype | None = None
) -> np.ndarray:
    """Pooled latents (N, D) float32 of the samples of `loader`, in its order."""
    with evaluating(model, device, amp_dtype):
        latents = [model.pooled_latents(*inputs_for(model, batch, device)).float() for batch in loader]
    return torch.cat(latents).cpu().numpy()


def collect_attention(model: nn.Module, batch: Batch, device: Device = "cpu") -> list[np.ndarray]:
    """Cross-attention weights of one batch: (B, heads, latents, L) float32 for each cross-attend."""
    with evaluating(model, device, None):
        _, maps = model(*inputs_for(model, batch, device), return_attention=True)
    return [weights.float().cpu().numpy() for weights in maps]


# ---------------------------------------------------------------------------------------------------- metrics


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.as_tensor(logits, dtype=torch.float64), dim=-1).numpy()


def _ahead(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes have a higher logit than the true one, (N,); of equal ones the lower class number is ahead."""
    of_label = np.take_along_axis(logits, labels[:, None], 1)
    return ((logits > of_label) | ((logits == of_label) & (np.arange(logits.shape[1]) < labels[:, None]))).sum(1)


def _brier_scores(log_p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.square(np.exp(log_p) - np.eye(log_p.shape[1])[labels]).sum(1)


def confidences(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the predicted class (N,), and whether that class is the true one (N,)."""
    return np.exp(_log_probabilities(logits).max(1)), logits.argmax(1) == labels


def compute_metrics(
    logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str], top_k: Sequence[int] = (3, 5)
) -> dict[str, Any]:
    """Metrics of logits (N, C) against labels (N,), in float64, as plain data; what is undefined is None.

    - `balanced_accuracy`: mean recall over the classes that occur among the labels.
    - `macro_f1`: mean F1 over the classes that occur among the labels or the predictions.
    - `top_K_accuracy` for each K of `top_k` below C; of equal logits the lower class number comes first.
    - `majority_baseline`: the accuracy of always answering the most frequent label.
    - `negative_log_likelihood`: mean of -log p(true class), in nats.
    - `brier_score`: mean over samples of the sum over classes of (p - one-hot)^2, from 0 to 2.
    - `expected_calibration_error`: |accuracy - confidence| of the predicted class in 15 equally wide bins of
      confidence, averaged over the samples.
    - `per_class`: one row per class in the order of `class_names`; a class that does not occur has support 0.
    - `confusion_matrix`: counts (C, C); rows are true classes, columns predicted ones.

    Raises ValueError for shapes that do not fit, labels outside 0..C-1 and logits that are not finite.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    logits, labels, classes = np.asarray(logits), np.asarray(labels), len(class_names)
    if labels.ndim != 1 or len(labels) == 0 or logits.shape != (len(labels), classes):
        raise ValueError(
            f"logits {logits.shape} and labels {labels.shape} do not fit {classes} class names: "
            f"expected (N, {classes}) and (N,) with N > 0"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}; expected 0 to {classes - 1}")
    if broken := int((~np.isfinite(logits)).any(1).sum()):
        raise ValueError(f"the logits of {broken} of {len(labels)} samples are not finite")

    log_p = _log_probabilities(logits)
    confidence, correct = confidences(logits, labels)
    predicted = logits.argmax(1)
    ahead, every = _ahead(logits, labels), range(classes)
    per_class = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=np.nan)
    _, recall, f1, support = per_class
    keys = ("class", "precision", "recall", "f1", "support")
    rows = zip(class_names, *per_class, strict=True)
    return _plain(
        {
            "num_samples": len(labels),
            "num_classes": classes,
            "accuracy": correct.mean(),
            "balanced_accuracy": np.nanmean(recall),
            "macro_f1": np.nanmean(f1),
            **{f"top_{k}_accuracy": (ahead < k).mean() for k in top_k if k < classes},
            "majority_baseline": support.max() / len(labels),
            "negative_log_likelihood": -np.take_along_axis(log_p, labels[:, None], 1).mean(),
            "brier_score": _brier_scores(log_p, labels).mean(),
            "expected_calibration_error": calibration_error(reliability_table(confidence, correct)),
            "mean_confidence": confidence.mean(),
            "per_class": [dict(zip(keys, row, strict=True)) for row in rows],
            "confusion_matrix": confusion_matrix(labels, predicted, labels=every),
        }
    )


def reliability_table(confidence: np.ndarray, correct: np.ndarray, num_bins: int = 15) -> list[dict]:
    """Rows `low, high, count, confidence, accuracy` of equal bins (low, high]; an empty bin has None."""
    index = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    rows = []
    for i in range(num_bins):
        inside = index == i
        row = {"low": i / num_bins, "high": (i + 1) / num_bins, "count": inside.sum()}
        means = (confidence[inside].mean(), correct[inside].mean()) if inside.any() else (None, None)
        rows.append(row | dict(zip(("confidence", "accuracy"), means, strict=True)))
    return _plain(rows)


def calibration_error(rows: Sequence[dict]) -> float:
    """The expected calibration error of a `reliability_table`."""
    gaps = [row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows if row["count"]]
    return sum(gaps) / sum(row["count"] for row in rows)


def accuracy_by_length(lengths: np.ndarray, correct: np.ndarray, num_bins: int = 8) -> list[dict]:
    """Rows `shortest, longest, count, accuracy` of bins of about equal count; [] if there is one length."""
    if lengths.min() == lengths.max():
        return []
    starts = np.unique(np.quantile(lengths, np.arange(num_bins) / num_bins, method="higher"))
    index = np.searchsorted(starts, lengths, side="right") - 1
    rows = []
    for i in range(len(starts)):
        inside = lengths[index == i]
        accuracy = correct[index == i].mean()
        row = {"shortest": inside.min(), "longest": inside.max(), "count": len(inside), "accuracy": accuracy}
        rows.append(row)
    return _plain(rows)


def item_rows(
    logits: np.ndarray,
    labels: np.ndarray,
    lengths: np.ndarray,
    class_names: Sequence[str],
    ids: Sequence[str],
    split: str = "",
) -> list[dict[str, Any]]:
    """A row for each item, in their order, from which every metric and every analysis can be computed again.

    `confidence` is the probability of the predicted class; `rank_of_true` is 1 where that is the true one;
    `negative_log_likelihood` and `brier_score` are the item's terms of the means of `compute_metrics`; `tokens` is its
    length.
    """
    log_p = _log_probabilities(logits)
    p, predicted, every = np.exp(log_p), logits.argmax(1), np.arange(len(labels))
    columns = {
        "id": [as_utf8(str(id)) for id in ids],
        "split": [split] * len(labels),
        "true": [class_names[label] for label in labels],
        "predicted": [class_names[number] for number in predicted],
        "confidence": p[every, predicted],
        "probability_of_true": p[every, labels],
        "rank_of_true": 1 + _ahead(logits, labels),
        "negative_log_likelihood": np.abs(log_p[every, labels]),  # of -0.0
        "brier_score": _brier_scores(log_p, labels),
        "tokens": lengths,
    }
    rows = zip(*(_plain(list(column)) for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def most_confident_mistakes(logits: np.ndarray, labels: np.ndarray, limit: int = 16) -> np.ndarray:
    """Places among the `labels` of the wrong predictions of highest confidence, highest first."""
    p, predicted = np.exp(_log_probabilities(logits)), logits.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    return wrong[np.argsort(-p[wrong, predicted[wrong]], kind="stable")][:limit]


def analyze_predictions(
    logits: np.ndarray, labels: np.ndarray, lengths: np.ndarray, items: Sequence[dict[str, Any]]
) -> dict[str, list[dict]]:
    """What an analysis adds: `reliability`, `accuracy_by_length` and `most_confident_mistakes`; items: `item_rows`."""
    confidence, correct = confidences(logits, labels)
    shown = ("id", "true", "predicted", "confidence", "probability_of_true")
    return {
        "reliability": reliability_table(confidence, correct),
        "accuracy_by_length": accuracy_by_length(lengths, correct),
        "most_confident_mistakes": [
            {key: items[place][key] for key in shown} for place in most_confident_mistakes(logits, labels)
        ],
    }


# ---------------------------------------------------------------------------------------------- files written


def _plain(value: Any) -> Any:
    """The same in the types of JSON: arrays become lists, NumPy scalars numbers, NaN and infinity None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_results(path: PathLike, results: Mapping[str, Any]) -> None:
    """Write strict JSON, the whole file or none; numbers stay numbers, NaN and infinity become null."""
    text = json.dumps(_plain(results), indent=2, allow_nan=False, ensure_ascii=False)
    text = re.sub(r"\[\n[^\[\]{}]*\]", lambda row: re.sub(r"\n *", " ", row[0]), text)  # matrix rows
    write_file(path, f"{text}\n".encode())


def write_file(path: PathLike, data: bytes) -> None:
    """Write a file, with its folders, so that the old one or the whole new one is there at every moment."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, "wb") as file:
        file.write(data)


def write_rows(path: PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a .csv file that names its columns, the whole of it or nothing, for spreadsheets and for `read_table`.

    Beyond ASCII it begins with a byte order mark, without which Excel takes another encoding. What a spreadsheet would
    run as a formula gets an apostrophe before it, which `tables.read_table` takes off. Numbers are exact.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerows([rows[0].keys(), *([spreadsheet_cell(str(cell)) for cell in row.values()] for row in rows)])
    data = as_utf8(text.getvalue())
    write_file(path, data.encode("utf-8" if data.isascii() else "utf-8-sig"))


def save_evaluation(
    output_dir: PathLike,
    results: Mapping[str, Any],
    items: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Callable[[Path], None]],
) -> None:
    """Write results.json and items.csv, then draw each figure (file name -> function of its path) into `output_dir`.

    A figure that fails costs neither the results nor the other figures. It leaves no picture, not even one of
    an earlier run, and at the end an ExceptionGroup names those that failed and holds their exceptions.
    """
    output_dir = Path(output_dir)
    write_results(output_dir / "results.json", results)
    write_rows(output_dir / "items.csv", items)
    errors = {}
    for name, draw in figures.items():
        try:
            with memory_advice("while drawing it", ("a smaller --batch_size", "closing other programs")):
                draw(output_dir / name)
        except Exception as error:
            (output_dir / name).unlink(missing_ok=True)
            error.add_note(f"while drawing {name}")
            errors[name] = error
    if errors:
        message = f"{output_dir / 'results.json'} is complete, but these figures failed: {', '.join(errors)}"
        raise ExceptionGroup(message, list(errors.values()))
