"""One pass over a data loader, the metrics of its predictions as plain data, and the files of an evaluation.

Letters: N samples, C classes, B batch, L tokens, D latent width.
"""

import codecs
import copy
import csv
import io
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batches import Batch, Device, asked, inputs_for, mapped, token_counts
from files import PathLike, written_whole
from messages import as_utf8, memory_advice, spreadsheet_cell

WAITING = 2**22  # how many numbers of outputs may wait on the device before they are read

# --- One pass over the data ------------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module, device: Device, amp_dtype: torch.dtype | None) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is back in its own mode.

    A model that is already in evaluation mode is not touched, so any number of threads may use it at once. A model in
    training mode is switched, which its other users see: give threads the result of `in_evaluation_mode` instead.
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
    """The model itself, or, if a part of it is in training mode, a copy in evaluation mode that shares its weights."""
    if not any(module.training for module in model.modules()):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()


def collect(
    model: nn.Module, loader: Iterable[Batch], task: Any, device: Device = "cpu", amp_dtype: torch.dtype | None = None
) -> dict[str, np.ndarray]:
    """Run the model, which is on `device`, once over `loader`.

    Returns:
        in the loader's order, what the task keeps of each sample (`Task.rows`), and `tokens` (N,) int64, the number of
        real tokens of each.

    Raises:
        ValueError: the loader yields nothing.
    """
    parts: list[dict[str, np.ndarray]] = []
    waiting: list[tuple[Any, Any, Tensor]] = []  # read a few at a time, since reading waits for the device

    def read() -> None:
        for outputs, targets, tokens in waiting:
            parts.append({**task.rows(mapped(Tensor.cpu, outputs), targets), "tokens": tokens.numpy()})
        waiting.clear()

    held = 0
    with evaluating(model, device, amp_dtype):
        for batch in loader:
            outputs = mapped(Tensor.float, model(*inputs_for(model, batch, device), **asked(batch, device)))
            # A copy, since a tensor from a worker holds a file descriptor as long as it is kept
            waiting.append((outputs, mapped(Tensor.clone, batch["label"]), token_counts(batch)))
            held += sum(each.numel() for each in (outputs.values() if isinstance(outputs, dict) else [outputs]))
            if held > WAITING:
                read()
                held = 0
        read()
    if not parts:
        raise ValueError("there is nothing to evaluate: the data loader yields no batch")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def outputs_of(model: nn.Module, batch: Batch, device: Device = "cpu") -> Any:
    """The outputs for one batch, float32 on the CPU."""
    with evaluating(model, device, None):
        outputs = model(*inputs_for(model, batch, device), **asked(batch, device))
    return mapped(lambda part: part.float().cpu(), outputs)


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


# --- Metrics of classes ----------------------------------------------------------------------------------------------


def class_rows(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """What the metrics need of each sample, from logits float (N, C) and labels (N,); probabilities in float64.

    `finite`: whether the logits are; `label` and `predicted`: class numbers; `confidence`: the probability of the
    predicted class; `probability_of_true`; `ahead`: how many classes have a higher logit than the true one (of equal
    logits, the lower class number comes first); the sample's terms of `negative_log_likelihood` and `brier_score`.
    """
    every, labels = np.arange(len(labels)), np.asarray(labels)
    with np.errstate(invalid="ignore"):
        log_p = torch.log_softmax(torch.as_tensor(logits, dtype=torch.float64), dim=-1).numpy()
        p, predicted, of_label = np.exp(log_p), logits.argmax(1), logits[every, labels][:, None]
        before = np.arange(logits.shape[1]) < labels[:, None]
        return {
            "finite": np.isfinite(logits).all(1),
            "label": labels,
            "predicted": predicted,
            "confidence": p[every, predicted],
            "probability_of_true": p[every, labels],
            "ahead": ((logits > of_label) | ((logits == of_label) & before)).sum(1),
            "negative_log_likelihood": np.abs(log_p[every, labels]),  # 0.0 instead of -0.0
            "brier_score": np.square(p - np.eye(logits.shape[1])[labels]).sum(1),
        }


def class_metrics(
    rows: Mapping[str, np.ndarray], class_names: Sequence[str], top_k: Sequence[int] = (3, 5)
) -> dict[str, Any]:
    """Metrics of `class_rows`, in float64, as plain data; what is undefined is None.

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
    """
    from sklearn.metrics import precision_recall_fscore_support

    labels, predicted, classes = rows["label"], rows["predicted"], len(class_names)
    correct = predicted == labels
    per_class = precision_recall_fscore_support(labels, predicted, labels=range(classes), zero_division=np.nan)
    _, recall, f1, support = per_class
    keys = ("class", "precision", "recall", "f1", "support")
    table = zip(class_names, *per_class, strict=True)
    return plain(
        {
            "num_samples": len(labels),
            "num_classes": classes,
            "accuracy": correct.mean(),
            "balanced_accuracy": np.nanmean(recall),
            "macro_f1": np.nanmean(f1),
            **{f"top_{k}_accuracy": (rows["ahead"] < k).mean() for k in top_k if k < classes},
            "majority_baseline": support.max() / len(labels),
            "negative_log_likelihood": rows["negative_log_likelihood"].mean(),
            "brier_score": rows["brier_score"].mean(),
            "expected_calibration_error": calibration_error(reliability_table(rows["confidence"], correct)),
            "mean_confidence": rows["confidence"].mean(),
            "per_class": [dict(zip(keys, row, strict=True)) for row in table],
            "confusion_matrix": confusion_matrix(rows, classes),
        }
    )


def confusion_matrix(rows: Mapping[str, np.ndarray], classes: int) -> np.ndarray:
    """Counts (C, C) of `class_rows`; rows are true classes, columns predicted ones."""
    import sklearn.metrics

    return sklearn.metrics.confusion_matrix(rows["label"], rows["predicted"], labels=range(classes))


def compute_metrics(
    logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str], top_k: Sequence[int] = (3, 5)
) -> dict[str, Any]:
    """`class_metrics` of logits (N, C) against labels (N,).

    Raises:
        ValueError: shapes that do not fit, labels outside 0..C-1, or logits that are not finite.
    """
    logits, labels, classes = np.asarray(logits), np.asarray(labels), len(class_names)
    if labels.ndim != 1 or len(labels) == 0 or logits.shape != (len(labels), classes):
        raise ValueError(
            f"logits {logits.shape} and labels {labels.shape} do not fit {classes} class names: "
            f"expected (N, {classes}) and (N,) with N > 0"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}; expected 0 to {classes - 1}")
    rows = class_rows(logits, labels)
    if broken := int((~rows["finite"]).sum()):
        raise ValueError(f"the logits of {broken} of {len(labels)} samples are not finite")
    return class_metrics(rows, class_names, top_k)


def reliability_table(confidence: np.ndarray, correct: np.ndarray, num_bins: int = 15) -> list[dict]:
    """Rows `low, high, count, confidence, accuracy` of equally wide bins (low, high]; an empty bin has None."""
    index = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    rows = []
    for i in range(num_bins):
        inside = index == i
        row = {"low": i / num_bins, "high": (i + 1) / num_bins, "count": inside.sum()}
        means = (confidence[inside].mean(), correct[inside].mean()) if inside.any() else (None, None)
        rows.append(row | dict(zip(("confidence", "accuracy"), means, strict=True)))
    return plain(rows)


def calibration_error(rows: Sequence[dict]) -> float:
    """The expected calibration error of a `reliability_table`."""
    gaps = [row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows if row["count"]]
    return sum(gaps) / sum(row["count"] for row in rows)


def by_length(lengths: np.ndarray, num_bins: int = 8, **values: np.ndarray) -> list[dict]:
    """Rows `shortest, longest, count` and the mean of each of `values` (N,) in bins of about equal count.

    [] if all lengths are the same.
    """
    if lengths.min() == lengths.max():
        return []
    starts = np.unique(np.quantile(lengths, np.arange(num_bins) / num_bins, method="higher"))
    index = np.searchsorted(starts, lengths, side="right") - 1
    rows = []
    for i in range(len(starts)):
        inside = index == i
        row = {"shortest": lengths[inside].min(), "longest": lengths[inside].max(), "count": inside.sum()}
        rows.append(row | {name: each[inside].mean() for name, each in values.items()})
    return plain(rows)


# --- Metrics of spans ------------------------------------------------------------------------------------------------


def spans_of(classes: np.ndarray, outside: int | None = None) -> list[tuple[int, int, int]]:
    """(start, end, class) of each longest stretch of one class in (L,), the end excluded; none of class `outside`."""
    changes = np.flatnonzero(np.diff(classes)) + 1
    starts, ends = [0, *changes.tolist()][: len(classes)], [*changes.tolist(), len(classes)]
    spans = zip(starts, ends, strict=False)
    return [(start, end, int(classes[start])) for start, end in spans if classes[start] != outside]


def span_metrics(
    true: Sequence[np.ndarray], predicted: Sequence[np.ndarray], class_names: Sequence[str], outside: int
) -> dict[str, Any]:
    """Precision, recall and F1 of spans of classes (L,) of each sample, as plain data; what is undefined is None.

    A span is right if its start, end and class are those of a true one. The figures are over all spans, and
    `per_span_class` over those of each class.
    """
    sides = [
        {(number, *span) for number, classes in enumerate(side) for span in spans_of(classes, outside)}
        for side in (true, predicted)
    ]
    sets = {"true": sides[0], "predicted": sides[1], "right": sides[0] & sides[1]}
    counts = {
        name: np.bincount([span[-1] for span in spans], minlength=len(class_names)) for name, spans in sets.items()
    }

    def scores(true: int, predicted: int, right: int) -> dict[str, float]:
        precision, recall = (right / number if number else math.nan for number in (predicted, true))
        f1 = 2 * right / (true + predicted) if true + predicted else math.nan
        return {"precision": precision, "recall": recall, "f1": f1}

    total = scores(*(counts[name].sum() for name in ("true", "predicted", "right")))
    per_class = [
        {"class": name, **scores(*(counts[side][number] for side in ("true", "predicted", "right"))),
         "support": counts["true"][number]}
        for number, name in enumerate(class_names) if number != outside
    ]  # fmt: skip
    return plain({"num_spans": counts["true"].sum(), **{f"span_{name}": value for name, value in total.items()},
                  "per_span_class": per_class})  # fmt: skip


# --- Metrics of numbers ----------------------------------------------------------------------------------------------


def regression_metrics(
    true: np.ndarray, predicted: np.ndarray, mean: Sequence[float], std: Sequence[float], names: Sequence[str]
) -> dict[str, Any]:
    """Metrics of numbers (N, K), in float64 and in their own units, as plain data; what is undefined is None.

    For each number: `mae`, `rmse`, `median_absolute_error` and `r2` (against the mean of `true`), and, as
    `baseline_...`, the same for always answering the training mean `mean`.

    With one number, these are the totals too. With several, the total `mae` and `rmse` are in units of the training
    deviations `std` (mean and root mean square over the numbers), so that the baseline is about 1; `r2` is the mean.
    """
    true, predicted, mean, std = (np.asarray(values, np.float64) for values in (true, predicted, mean, std))
    sides = {"": predicted, "baseline_": np.broadcast_to(mean, true.shape)}
    columns = {"target": list(names)}
    for prefix, answers in sides.items():
        columns |= {f"{prefix}{name}": values for name, values in _errors(true, answers).items()}
    per_target = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    together = {name: values[0] for name, values in columns.items() if name != "target"}
    if len(names) > 1:
        together = {}
        for prefix, answers in sides.items():
            scaled = (answers - true) / std
            together[f"{prefix}mae"] = np.abs(scaled).mean()
            together[f"{prefix}rmse"] = np.sqrt(np.square(scaled).mean())
            together[f"{prefix}r2"] = np.mean(columns[f"{prefix}r2"])
    return plain(
        {
            "num_samples": len(true),
            "num_targets": len(names),
            **together,
            "mean_squared_standardised_error": np.square((predicted - true) / std).mean(),
            "per_target": per_target,
        }
    )


def _errors(true: np.ndarray, answers: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics (K,) of answers (N, K), one for each number."""
    error, spread = answers - true, np.square(true - true.mean(0)).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "mae": np.abs(error).mean(0),
            "rmse": np.sqrt(np.square(error).mean(0)),
            "median_absolute_error": np.median(np.abs(error), 0),
            "r2": 1 - np.square(error).sum(0) / np.where(spread > 0, spread, np.nan),
        }


# --- Metrics of several labels ---------------------------------------------------------------------------------------


def multilabel_metrics(
    logits: np.ndarray, true: np.ndarray, thresholds: Sequence[float], class_names: Sequence[str]
) -> dict[str, Any]:
    """Metrics of logits float64 (N, C) against labels bool (N, C), as plain data; what is undefined is None.

    A label is predicted if its probability reaches its threshold. Means over the labels leave out those that are on no
    sample (for `macro_f1`: neither on a sample nor predicted). `average_precision` does not depend on the threshold.
    """
    from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support

    probabilities = torch.from_numpy(logits).sigmoid().numpy()
    predicted, support = probabilities >= thresholds, true.sum(0)
    columns = list(zip(true.T, predicted.T, strict=True))  # one at a time: scikit-learn takes a single one for classes
    options = {"average": "binary", "zero_division": np.nan}
    per_class = [precision_recall_fscore_support(*column, **options)[:3] for column in columns]
    average_precision = [
        average_precision_score(there, p) if there.any() else np.nan
        for there, p in zip(true.T, probabilities.T, strict=True)
    ]
    columns = {
        "class": class_names, **dict(zip(("precision", "recall", "f1"), zip(*per_class, strict=True), strict=True)),
        "average_precision": average_precision, "support": support, "threshold": thresholds,
    }  # fmt: skip
    loss = np.logaddexp(0, logits) - logits * true
    return plain(
        {
            "num_samples": len(true),
            "num_classes": len(class_names),
            "macro_f1": _mean(columns["f1"]),
            "micro_f1": f1_score(true.ravel(), predicted.ravel(), zero_division=np.nan),
            "mean_average_precision": _mean(average_precision),
            "subset_accuracy": (predicted == true).all(1).mean(),
            "hamming_loss": (predicted != true).mean(),
            "baseline_hamming_loss": np.minimum(true.mean(0), 1 - true.mean(0)).mean(),
            "binary_cross_entropy": loss.mean(),
            "per_class": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
        }
    )


def _mean(values: Sequence[float]) -> float:
    """The mean of the defined values."""
    values = np.asarray(values, np.float64)
    return np.nan if np.isnan(values).all() else float(np.nanmean(values))


def best_thresholds(probabilities: np.ndarray, true: np.ndarray) -> list[float]:
    """For each label, the threshold on its probabilities (N, C) that gives the highest F1; 0.5 if no sample has it.

    It lies half-way between two probabilities, or at 0.5 if that is between them; of several equally good ones, it is
    the one nearest to 0.5.
    """
    from sklearn.metrics import precision_recall_curve

    thresholds = []
    for p, there in zip(probabilities.T, true.T, strict=True):
        best = 0.5
        if there.any():
            precision, recall, values = precision_recall_curve(there, p)  # predicted from each of the values on
            f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
            below = np.append(0.0, values[:-1])
            between = np.where((below < 0.5) & (values >= 0.5), 0.5, (below + values) / 2)
            highest = between[f1[:-1] >= f1[:-1].max() - 1e-12]
            best = float(highest[np.abs(highest - 0.5).argmin()])
        thresholds.append(best)
    return thresholds


# --- Files -----------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """The value in JSON types: arrays become lists, NumPy scalars numbers, NaN and infinity None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def item_rows(
    ids: Sequence[Any], split: str, columns: Mapping[str, Sequence[Any]], tokens: np.ndarray
) -> list[dict[str, Any]]:
    """The rows of items.csv, in the order of the items: id, split, the task's columns, length in tokens."""
    columns = {"id": [as_utf8(str(id)) for id in ids], "split": [split] * len(ids), **columns, "tokens": tokens}
    rows = zip(*(plain(list(column)) for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def write_results(path: PathLike, results: Mapping[str, Any]) -> None:
    """Write strict JSON, the whole file or nothing; NaN and infinity become null."""
    text = json.dumps(plain(results), indent=2, allow_nan=False, ensure_ascii=False)
    text = re.sub(r"\[\n[^\[\]{}]*\]", lambda row: re.sub(r"\n *", " ", row[0]), text)  # matrix rows
    write_file(path, f"{text}\n".encode())


def write_file(path: PathLike, data: bytes) -> None:
    """Write a file and its folders. At every moment, either the old file or the whole new one is there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, "wb") as file:
        file.write(data)


@contextmanager
def written_rows(path: PathLike, partial: PathLike | None = None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that adds a row to a .csv file, which replaces `path` at the end of the block. Without rows nothing is
    written.

    The file has a header and is for spreadsheets and for `read_table`. If it is not all ASCII, it begins with a byte
    order mark, without which Excel assumes another encoding. A cell that a spreadsheet would run as a formula gets an
    apostrophe, which `tables.read_table` removes. Numbers are exact.

    partial: where the rows so far are kept if the block raises; the old file is then untouched. None drops them.
    """
    path, mark, file = Path(path), b"", None
    with ExitStack() as stack:

        def add(row: Mapping[str, Any]) -> None:
            nonlocal mark, file
            text = io.StringIO(newline="")
            writer = csv.writer(text)
            if file is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))  # rows wait there, not in memory
                writer.writerow(row.keys())
            writer.writerow([spreadsheet_cell(str(cell)) for cell in row.values()])
            line = as_utf8(text.getvalue())
            mark = mark if line.isascii() else codecs.BOM_UTF8
            file.write(line.encode())

        def save(target: PathLike) -> None:
            if file is not None:
                file.seek(0)
                with written_whole(target, "wb") as whole:
                    whole.write(mark)
                    shutil.copyfileobj(file, whole)

        try:
            yield add
        except BaseException:
            if partial is not None:
                save(partial)
            raise
        save(path)


def write_rows(path: PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a .csv file, the whole file or nothing, see `written_rows`."""
    with written_rows(path) as add:
        for row in rows:
            add(row)


def save_evaluation(
    output_dir: PathLike,
    results: Mapping[str, Any],
    items: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Callable[[Path], None]],
) -> None:
    """Write results.json and items.csv, then draw each figure (file name -> function of its path) into `output_dir`.

    A figure that fails costs neither the results nor the other figures. Its file is removed, even one from an earlier
    run.

    Raises:
        ExceptionGroup: names the figures that failed and holds their exceptions; everything else has been written.
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
