"""One pass over a data loader, the metrics of its predictions, and the figures of an evaluation.

Metrics and analysis functions take and return plain data; every `plot_*` function takes plain data and, last, the path of the
picture to write. Figures are built without pyplot, so they need no display, and nothing global (back end, rcParams, seeds,
warning filters) is changed by them.

Letters: N samples, C classes, B batch, L tokens, D latent width.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if (
    TYPE_CHECKING
):  # plotting libraries are imported where they are used, so that importing this module stays quick
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG, NEUTRAL = (
    "#0072B2",
    "#D55E00",
    "#7F7F7F",
)  # blue and vermilion stay apart for colour-blind readers
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "text.parse_math": False,  # a class may be called "$"
}
CALIBRATION_BINS = 15
MAX_ANNOTATED_CLASSES = 20


# ---------------------------------------------------------------------------------------------- one pass over the data


@contextmanager
def _evaluating(
    model: nn.Module, device: torch.device | str, amp_dtype: torch.dtype | None
) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    autocast = torch.autocast(torch.device(device).type, dtype=amp_dtype, enabled=amp_dtype is not None)
    try:
        with torch.inference_mode(), autocast:
            yield
    finally:
        for module, training in modes:
            module.training = training


def _inputs(
    batch: Mapping[str, torch.Tensor], device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Input and mask on the device; the mask is None where the whole batch has full length."""
    mask = batch["mask"]
    x = batch["input"].to(device, non_blocking=True)
    return x, None if mask.all() else mask.to(device, non_blocking=True)


def collect_predictions(
    model: nn.Module, loader, device: torch.device | str = "cpu", amp_dtype: torch.dtype | None = None
) -> dict[str, np.ndarray]:
    """Run the model once over `loader`.

    Returns one entry per sample, in the loader's order: `logits` (N, C) float32, `labels` (N,) int64 and `lengths` (N,)
    int64, the number of real tokens. Raises ValueError where the loader yields nothing.
    """
    logits, labels, lengths = [], [], []
    with _evaluating(model, device, amp_dtype):
        for batch in loader:
            logits.append(model(*_inputs(batch, device)).float())
            labels.append(batch["label"])
            lengths.append(batch["mask"].sum(1))
    if not logits:
        raise ValueError("there is nothing to evaluate: the data loader yields no batch")
    parts = {"logits": logits, "labels": labels, "lengths": lengths}
    return {name: torch.cat(part).cpu().numpy() for name, part in parts.items()}


def collect_latents(
    model: nn.Module, loader, device: torch.device | str = "cpu", amp_dtype: torch.dtype | None = None
) -> np.ndarray:
    """Pooled latents (N, D) float32 of every sample of `loader`, in its order."""
    with _evaluating(model, device, amp_dtype):
        latents = [model.pooled_latents(*_inputs(batch, device)).float() for batch in loader]
    return torch.cat(latents).cpu().numpy()


def collect_attention(
    model: nn.Module, batch: Mapping[str, torch.Tensor], device: torch.device | str = "cpu"
) -> list[np.ndarray]:
    """Cross-attention weights of one batch: an array (B, heads, latents, L) float32 per cross-attend."""
    with _evaluating(model, device, None):
        _, maps = model(*_inputs(batch, device), return_attention=True)
    return [weights.float().cpu().numpy() for weights in maps]


# ------------------------------------------------------------------------------------------------- metrics, plain data


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.as_tensor(logits, dtype=torch.float64), dim=-1).numpy()


def _confidences(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the predicted class (N,) and whether that class is the true one (N,)."""
    return np.exp(_log_probabilities(logits).max(1)), logits.argmax(1) == labels


def compute_metrics(
    logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str], top_k: Sequence[int] = (3, 5)
) -> dict[str, Any]:
    """Metrics of logits (N, C) against labels (N,), in float64, as plain data; what is undefined is None.

    - `balanced_accuracy`: mean recall over the classes that occur in the labels.
    - `macro_f1`: mean F1 over the classes that occur in the labels or among the predictions.
    - `top_K_accuracy`: for each K of `top_k` below C; of equal logits the lower class number comes first.
    - `majority_baseline`: accuracy of always answering the most frequent label.
    - `negative_log_likelihood`: mean of -log p(true class), in nats.
    - `brier_score`: mean over samples of the sum over classes of (p - one-hot)^2, from 0 to 2.
    - `expected_calibration_error`: |accuracy - confidence| of the predicted class, averaged over 15 equal bins of confidence.
    - `per_class`: a row per class, also for classes that do not occur (support 0, recall None).
    - `confusion_matrix`: counts (C, C), rows are true classes, columns predictions.

    Raises ValueError for shapes that do not fit, labels outside 0..C-1, and logits that are not finite.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    logits, labels = np.asarray(logits), np.asarray(labels)
    num_classes = len(class_names)
    if labels.ndim != 1 or len(labels) == 0 or logits.shape != (len(labels), num_classes):
        raise ValueError(
            f"logits {logits.shape} and labels {labels.shape} do not fit {num_classes} class names: "
            f"expected (N, {num_classes}) and (N,) with N > 0"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}; expected 0 to {num_classes - 1}")
    if broken := int((~np.isfinite(logits)).any(1).sum()):
        raise ValueError(
            f"the logits of {broken} of {len(labels)} samples are not finite; the model has diverged"
        )

    log_p = _log_probabilities(logits)
    confidence, correct = _confidences(logits, labels)
    predicted = logits.argmax(1)
    true_logit = np.take_along_axis(logits, labels[:, None], 1)
    ahead = (logits > true_logit) | ((logits == true_logit) & (np.arange(num_classes) < labels[:, None]))
    rank = ahead.sum(1)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=range(num_classes), zero_division=np.nan
    )
    bins = [row for row in reliability_table(confidence, correct) if row["count"]]
    rows = zip(class_names, precision, recall, f1, support, strict=True)
    return _plain(
        {
            "num_samples": len(labels),
            "num_classes": num_classes,
            "accuracy": correct.mean(),
            "balanced_accuracy": np.nanmean(recall),
            "macro_f1": np.nanmean(f1),
            **{f"top_{k}_accuracy": (rank < k).mean() for k in top_k if k < num_classes},
            "majority_baseline": support.max() / len(labels),
            "negative_log_likelihood": -np.take_along_axis(log_p, labels[:, None], 1).mean(),
            "brier_score": np.square(np.exp(log_p) - np.eye(num_classes)[labels]).sum(1).mean(),
            "expected_calibration_error": _calibration_error(bins),
            "mean_confidence": confidence.mean(),
            "per_class": [
                dict(zip(("class", "precision", "recall", "f1", "support"), row, strict=True)) for row in rows
            ],
            "confusion_matrix": confusion_matrix(labels, predicted, labels=range(num_classes)),
        }
    )


def reliability_table(
    confidence: np.ndarray, correct: np.ndarray, num_bins: int = CALIBRATION_BINS
) -> list[dict]:
    """Rows of `low`, `high`, `count`, `confidence` and `accuracy` (means; None in an empty bin) over bins (low, high]."""
    index = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    return [
        {
            "low": number / num_bins,
            "high": (number + 1) / num_bins,
            "count": int(inside.sum()),
            "confidence": float(confidence[inside].mean()) if inside.any() else None,
            "accuracy": float(correct[inside].mean()) if inside.any() else None,
        }
        for number in range(num_bins)
        for inside in [index == number]
    ]


def _calibration_error(rows: Sequence[dict]) -> float:
    total = sum(row["count"] for row in rows)
    return sum(
        row["count"] / total * abs(row["accuracy"] - row["confidence"]) for row in rows if row["count"]
    )


def accuracy_by_length(lengths: np.ndarray, correct: np.ndarray, num_bins: int = 8) -> list[dict]:
    """Rows of `shortest`, `longest`, `count`, `accuracy` over bins of about equal count; [] where all lengths are equal."""
    if lengths.min() == lengths.max():
        return []
    starts = np.unique(np.quantile(lengths, np.arange(num_bins) / num_bins, method="higher"))
    index = np.searchsorted(starts, lengths, side="right") - 1
    return [
        {
            "shortest": int(lengths[inside].min()),
            "longest": int(lengths[inside].max()),
            "count": int(inside.sum()),
            "accuracy": float(correct[inside].mean()),
        }
        for number in range(len(starts))
        for inside in [index == number]
    ]


def most_confident_mistakes(
    logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str], limit: int = 16
) -> list[dict]:
    """The wrong predictions of highest confidence, highest first; `index` is the sample's place in the loader's order."""
    p = np.exp(_log_probabilities(logits))
    predicted = logits.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    order = wrong[np.argsort(-p[wrong, predicted[wrong]], kind="stable")][:limit]
    return [
        {
            "index": int(i),
            "true": class_names[labels[i]],
            "predicted": class_names[predicted[i]],
            "confidence": float(p[i, predicted[i]]),
            "probability_of_true": float(p[i, labels[i]]),
        }
        for i in order
    ]


def analyze_predictions(
    logits: np.ndarray, labels: np.ndarray, lengths: np.ndarray, class_names: Sequence[str]
) -> dict[str, list[dict]]:
    """What an analysis adds to the results: `reliability`, `accuracy_by_length` and `most_confident_mistakes`."""
    confidence, correct = _confidences(logits, labels)
    return {
        "reliability": reliability_table(confidence, correct),
        "accuracy_by_length": accuracy_by_length(lengths, correct),
        "most_confident_mistakes": most_confident_mistakes(logits, labels, class_names),
    }


# ------------------------------------------------------------------------------------------------------- files written


def _plain(value: Any) -> Any:
    """The same data in JSON's own types: arrays become lists, array scalars numbers, NaN and infinities None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_results(path: str | os.PathLike, results: Mapping[str, Any]) -> None:
    """Write strict JSON (no NaN, plain numbers), whole or not at all; missing folders are made."""
    text = json.dumps(_plain(results), indent=2, allow_nan=False, ensure_ascii=False)
    text = re.sub(
        r"\[\n[^\[\]{}]*?\n *\]", lambda match: re.sub(r"\n *", " ", match[0]), text
    )  # flat lists on one line
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def evaluation_figures(
    logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> dict[str, Callable[[Path], None]]:
    """The three figures of every evaluation, as file name -> function that draws it to a path."""
    matrix = np.zeros((len(class_names), len(class_names)), dtype=np.int64)
    np.add.at(matrix, (labels, logits.argmax(1)), 1)
    confidence, correct = _confidences(logits, labels)
    return {
        "confusion_matrix.png": partial(plot_confusion_matrix, matrix, class_names),
        "confidence_histogram.png": partial(plot_confidence_histogram, confidence, correct),
        "confidence_analysis.png": partial(plot_confidence_analysis, confidence, correct),
    }


def save_evaluation(
    output_dir: str | os.PathLike, results: Mapping[str, Any], figures: Mapping[str, Callable[[Path], None]]
) -> None:
    """Write results.json, then draw every figure (file name -> function of its path) into `output_dir`.

    A figure that fails stops neither the results nor the other figures: its old picture is removed, and an ExceptionGroup
    that names each failed figure is raised at the end.
    """
    output_dir = Path(output_dir)
    write_results(output_dir / "results.json", results)
    errors = []
    for name, draw in figures.items():
        (output_dir / name).unlink(missing_ok=True)
        try:
            draw(output_dir / name)
        except Exception as error:
            error.add_note(f"while drawing {output_dir / name}")
            errors.append((name, error))
    if errors:
        names = ", ".join(name for name, _ in errors)
        raise ExceptionGroup(
            f"could not draw {names}; {output_dir / 'results.json'} is complete",
            [error for _, error in errors],
        )


# ------------------------------------------------------------------------------------------------------ drawing: basics


@contextmanager
def _styled() -> Iterator[None]:
    """The one style of all figures, whatever the user's own; theirs is back afterwards."""
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        yield


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure (inches) with a canvas of its own, unknown to pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def _page(path: str | os.PathLike, width: float, height: float) -> Iterator[Figure]:
    """A styled figure that is written to `path` at the end of the block."""
    with _styled():
        figure = _new_figure(width, height)
        yield figure
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _short(name: str, limit: int = 18) -> str:
    """The name, its middle left out where it is longer than `limit` characters."""
    return name if len(name) <= limit else f"{name[: (limit - 1) // 2 + 1]}…{name[-(limit // 2 - 1) :]}"


def _interval(share: np.ndarray, count: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a share measured on `count` samples."""
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return centre - half, centre + half


def _error_bars(axes: Axes, x: np.ndarray, share: np.ndarray, count: np.ndarray) -> None:
    low, high = _interval(share, count)
    errors = np.maximum([share - low, high - share], 0)  # rounding can leave -1e-17 at a share of 0 or 1
    axes.errorbar(
        x, share, errors, fmt="none", ecolor="black", elinewidth=1, capsize=2, label="95 % interval"
    )


# ------------------------------------------------------------------------------------------- figures of every evaluation


def confusion_matrix_figure(matrix: np.ndarray, class_names: Sequence[str]) -> Figure:
    """A figure (Agg canvas, as TensorBoard's add_figure takes it) of counts (C, C), coloured by share of the true class."""
    import seaborn

    matrix = np.asarray(matrix)
    count, right = matrix.sum(), np.trace(matrix)
    classes = len(matrix)
    few = classes <= MAX_ANNOTATED_CLASSES
    side = np.clip(0.45 * classes, 2.4, 9)
    ticks = np.arange(0, classes, 1 if few else -(-classes // 50))
    names = [_short(str(class_names[i])) for i in ticks]
    with _styled():
        figure = _new_figure(side + 2, side + 1.2)
        axes = figure.subplots()
        seaborn.heatmap(
            matrix / np.maximum(matrix.sum(1, keepdims=True), 1),
            ax=axes, vmin=0, vmax=1, cmap="Blues", square=True, linewidths=0.5 if few else 0,
            annot=matrix if few else None, fmt="d", annot_kws={"fontsize": 8},
            cbar_kws={"label": "share of the true class", "fraction": 0.05, "pad": 0.02},
        )  # fmt: skip
        for text in axes.texts:
            if text.get_text() == "0":
                text.set_alpha(0.4)
        size = 9 if few else 7
        upright = max(map(len, names)) <= 3 if few else False
        axes.set_xticks(ticks + 0.5, names, rotation=0 if upright else 90, fontsize=size)
        axes.set_yticks(ticks + 0.5, names, rotation=0, fontsize=size)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.set_title(f"Confusion matrix: {right:,} of {count:,} right ({right / max(count, 1):.1%})")
    return figure


def plot_confusion_matrix(matrix: np.ndarray, class_names: Sequence[str], path: str | os.PathLike) -> None:
    """Write `confusion_matrix_figure`."""
    with _styled():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        confusion_matrix_figure(matrix, class_names).savefig(path)


def plot_confidence_histogram(confidence: np.ndarray, correct: np.ndarray, path: str | os.PathLike) -> None:
    """Confidences (N,) of right predictions above, of wrong ones below, each on its own scale of counts."""
    from matplotlib.ticker import MaxNLocator

    with _page(path, 6, 4.5) as figure:
        parts = [("Right", confidence[correct], RIGHT), ("Wrong", confidence[~correct], WRONG)]
        for axes, (name, values, colour) in zip(figure.subplots(2, 1, sharex=True), parts, strict=True):
            axes.hist(values, bins=20, range=(0, 1), color=colour, edgecolor="white")
            axes.set_title(
                f"{name}: {len(values):,} of {len(confidence):,} predictions ({len(values) / len(confidence):.1%})"
            )
            axes.set(ylabel="samples", xlim=(0, 1))
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            if len(values):
                median = np.median(values)
                axes.axvline(median, color="black", linestyle="--", linewidth=1, label=f"median {median:.3f}")
                axes.legend(loc="upper left")
            else:
                axes.set(ylim=(0, 1))
        axes.set_xlabel("confidence (probability of the predicted class)")


def plot_confidence_analysis(confidence: np.ndarray, correct: np.ndarray, path: str | os.PathLike) -> None:
    """Reliability diagram with the count of each bin, and accuracy where only the most confident share is answered."""
    table = reliability_table(confidence, correct)
    rows = [row for row in table if row["count"]]
    count = np.array([row["count"] for row in rows])
    accuracy = np.array([row["accuracy"] for row in rows])
    mean = np.array([row["confidence"] for row in rows])
    centre = np.array([(row["low"] + row["high"]) / 2 for row in rows])
    width = 1 / len(table)

    with _page(path, 10, 5) as figure:
        left, right = figure.subfigures(1, 2)
        diagram, counts = left.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        diagram.bar(centre, accuracy, width, color=RIGHT, edgecolor="white", label="accuracy")
        diagram.plot([0, 1], [0, 1], "--", color=NEUTRAL, label="perfectly calibrated")
        diagram.plot(
            mean, accuracy, "o", color=WRONG, markeredgecolor="white", label="at the mean confidence"
        )
        _error_bars(diagram, mean, accuracy, count)
        diagram.set_title(f"Reliability: expected calibration error {_calibration_error(rows):.3f}")
        diagram.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
        diagram.legend(loc="upper left")
        counts.bar(centre, count, width, color=NEUTRAL, edgecolor="white")
        for x, number in zip(centre, count, strict=True):
            counts.text(x, number, f"{number}", ha="center", va="bottom", fontsize=6.5)
        counts.set(
            xlabel="confidence (probability of the predicted class)",
            ylabel="samples",
            ylim=(0, 1.2 * count.max()),
        )

        order = np.argsort(-confidence, kind="stable")
        answered = np.arange(1, len(order) + 1)
        share = np.cumsum(correct[order]) / answered
        last = np.append(
            np.diff(confidence[order]) != 0, True
        )  # samples of equal confidence are answered together
        coverage, share, answered = (answered / len(order))[last], share[last], answered[last]
        axes = right.subplots()
        low, high = _interval(share, answered)
        axes.fill_between(coverage, low, high, color=RIGHT, alpha=0.2, linewidth=0, label="95 % interval")
        axes.plot(
            coverage,
            share,
            color=RIGHT,
            marker="o" if len(share) == 1 else None,
            label="accuracy of the answered",
        )
        axes.axhline(
            share[-1], color=NEUTRAL, linestyle="--", linewidth=1, label=f"all answered: {share[-1]:.3f}"
        )
        axes.set_title("Accuracy against coverage (most confident first)")
        axes.set(xlabel="share of samples answered", ylabel="accuracy", xlim=(0, 1), ylim=(None, 1.005))
        axes.legend(loc="lower left")


# ------------------------------------------------------------------------------------------------ figures of an analysis


def plot_accuracy_by_length(rows: Sequence[dict], path: str | os.PathLike) -> None:
    """Bars of `accuracy_by_length` with the count and the 95 % interval of each."""
    accuracy, count = np.array([row["accuracy"] for row in rows]), np.array([row["count"] for row in rows])
    x = np.arange(len(rows))
    with _page(path, 7, 3.6) as figure:
        axes = figure.subplots()
        axes.bar(x, accuracy, color=RIGHT, width=0.8)
        _error_bars(axes, x, accuracy, count)
        axes.axhline(
            accuracy @ count / count.sum(), color=WRONG, linestyle="--", linewidth=1, label="all lengths"
        )
        axes.set_xticks(x, [f"{row['shortest']}–{row['longest']}\nn = {row['count']}" for row in rows])
        axes.set(xlabel="length (real tokens)", ylabel="accuracy", ylim=(0, 1.02))
        axes.set_title("Accuracy by sequence length")
        axes.grid(axis="x", visible=False)
        axes.legend(loc="lower right", frameon=True)


def _show_image(axes: Axes, image: np.ndarray, **kwargs: Any) -> None:
    """Draw an image (H, W, C) in [0, 1], grey or RGB, without axes."""
    axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1, **kwargs)
    axes.set_axis_off()


def _unit_range(images: np.ndarray) -> np.ndarray:
    """Images of any non-negative scale (0..255, 0..16, 0..1) as floats in [0, 1]."""
    images = np.asarray(images, dtype=np.float64)
    return np.clip(images / max(images.max(initial=0), 1e-12), 0, 1)


def plot_mistakes(mistakes: Sequence[dict], images: np.ndarray, path: str | os.PathLike) -> None:
    """The images (M, H, W, 1 or 3), not normalised, of M `most_confident_mistakes`, in their order."""
    columns = 4
    rows = max(1, -(-len(mistakes) // columns))
    with _page(path, 1.9 * columns, 2.25 * rows + 0.4) as figure:
        figure.suptitle(
            "Most confident mistakes" if mistakes else "No mistakes", fontweight="bold", fontsize=10
        )
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for axes, mistake, image in zip(grid, mistakes, _unit_range(images), strict=False):
            _show_image(axes, image)
            text = f"true {_short(mistake['true'])}\npredicted {_short(mistake['predicted'])}\n{mistake['confidence']:.1%}"
            axes.set_title(text, fontsize=7.5, fontweight="normal")


def _distinct_rows(rows: np.ndarray, number: int) -> list[int]:
    """The most peaked row of (N, L), then again and again the one farthest from those chosen."""
    chosen = [int(rows.max(1).argmax())]
    while len(chosen) < min(number, len(rows)):
        distance = np.min([np.abs(rows - rows[i]).sum(1) for i in chosen], axis=0)
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return chosen


def plot_image_attention(
    images: np.ndarray, attention: Sequence[np.ndarray], grid_shape: Sequence[int], captions: Sequence[str],
    path: str | os.PathLike, num_latents: int = 4,
) -> None:  # fmt: skip
    """Cross-attention over a few images: the mean over heads and latents, and single latents that differ most.

    Args:
        images: (B, H, W, 1 or 3), not normalised.
        attention: per cross-attend (B, heads, latents, rows * columns), as from `collect_attention`.
        grid_shape: (rows, columns) of the patch grid.
        captions: a line per image, such as true and predicted class.
    """
    images = _unit_range(images)
    height, width = images.shape[1:3]
    num_latents = min(num_latents, attention[0].shape[2])
    lines = [(i, number) for i in range(len(images)) for number in range(len(attention))]
    with _page(path, 1.7 * (2 + num_latents), 1.95 * len(lines) + 0.5) as figure:
        figure.suptitle("Cross-attention, as a multiple of uniform attention", fontweight="bold", fontsize=10)
        grid = figure.subplots(len(lines), 2 + num_latents, squeeze=False)
        for panels, (i, number) in zip(grid, lines, strict=True):
            latents = attention[number][i].mean(0) * attention[number].shape[-1]
            chosen = _distinct_rows(latents, num_latents)
            maps = [("mean", latents.mean(0)), *((f"latent {k}", latents[k]) for k in chosen)]
            _show_image(panels[0], images[i])
            caption = captions[i] if len(attention) == 1 else f"{captions[i]}\ncross-attend {number + 1}"
            panels[0].set_title(caption, fontsize=7.5)
            for axes, (name, values) in zip(panels[1:], maps, strict=True):
                _show_image(axes, images[i].mean(-1, keepdims=True))
                picture = axes.imshow(
                    values.reshape(grid_shape),
                    cmap="viridis",
                    alpha=0.7,
                    extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                )
                axes.set_title(name, fontsize=7.5, fontweight="normal")
                figure.colorbar(picture, ax=axes, shrink=0.8, fraction=0.05, pad=0.02).ax.tick_params(
                    labelsize=6
                )


def plot_sequence_attention(
    inputs: np.ndarray, masks: np.ndarray, attention: Sequence[np.ndarray], captions: Sequence[str],
    path: str | os.PathLike,
) -> None:  # fmt: skip
    """Cross-attention over time for a few sequences, a column each: the input above, then latents x time, padding left out.

    Args:
        inputs: (B, L, C); masks: bool (B, L), True at real tokens.
        attention: per cross-attend (B, heads, latents, L), as from `collect_attention`.
        captions: a line per sequence, such as true and predicted class.
    """
    batch, channels = len(inputs), inputs.shape[-1]
    with _page(path, 0.8 + 3.6 * batch, 1.8 + 2.4 * len(attention)) as figure:
        grid = figure.subplots(
            1 + len(attention),
            batch,
            squeeze=False,
            sharex="col",
            height_ratios=[1.6] + [2.4] * len(attention),
        )
        for i in range(batch):
            signal, length = inputs[i][masks[i]], int(masks[i].sum())
            axes = grid[0, i]
            if channels <= 8:
                axes.plot(signal, linewidth=1)
                axes.set_ylabel("input")
            else:
                limit = max(np.abs(signal).max(), 1e-12)
                picture = axes.imshow(
                    signal.T, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
                )
                axes.grid(False)
                axes.set_ylabel("input channel")
                figure.colorbar(picture, ax=axes, label="value")
            axes.set_title(captions[i])
            for number, weights in enumerate(attention):
                latents = weights[i].mean(0)[:, masks[i]] * length
                axes = grid[1 + number, i]
                order = np.argsort(latents.argmax(1), kind="stable")
                picture = axes.imshow(
                    latents[order], aspect="auto", cmap="viridis", vmin=0, interpolation="nearest"
                )
                axes.grid(False)
                axes.set_ylabel(f"latents, cross-attend {number + 1}\n(by time of their peak)")
                figure.colorbar(picture, ax=axes, label="x uniform")
            axes.set_xlabel("time (tokens)")


def plot_latent_projection(
    latents: np.ndarray, labels: np.ndarray, class_names: Sequence[str], path: str | os.PathLike
) -> None:
    """Pooled latents (N, D) of classes (N,) on their first four principal components, two panels of two."""
    import seaborn
    from matplotlib.colors import ListedColormap
    from matplotlib.patheffects import withStroke
    from sklearn.decomposition import PCA

    latents = np.asarray(latents, dtype=np.float64)
    pca = PCA(min(4, *latents.shape), svd_solver="full")
    with np.errstate(
        invalid="ignore", divide="ignore"
    ):  # latents that are all equal have no variance to share out
        points = pca.fit_transform(latents)
        share = np.nan_to_num(pca.explained_variance_ratio_)
    missing = max(0, 2 - points.shape[1])
    points, share = np.pad(points, ((0, 0), (0, missing))), np.pad(share, (0, missing))
    pairs = [(0, 1), (2, 3)][: points.shape[1] // 2]
    classes = len(class_names)
    few = classes <= MAX_ANNOTATED_CLASSES
    colours = ListedColormap(seaborn.color_palette("colorblind" if classes <= 10 else "husl", classes))
    with _page(path, 4.4 * len(pairs) + 1.6, 4.6) as figure:
        figure.suptitle(
            f"Pooled latents of {len(points):,} samples, projected by PCA", fontweight="bold", fontsize=10
        )
        panels = figure.subplots(1, len(pairs), squeeze=False)[0]
        for axes, (a, b) in zip(panels, pairs, strict=True):
            dots = axes.scatter(
                points[:, a], points[:, b], c=labels, cmap=colours, vmin=-0.5, vmax=classes - 0.5,
                s=np.clip(6000 / len(points), 3, 30), alpha=0.7, linewidths=0,
            )  # fmt: skip
            axes.set_xlabel(f"component {a + 1} ({share[a]:.1%} of the variance)")
            axes.set_ylabel(f"component {b + 1} ({share[b]:.1%})")
            for number in np.unique(labels) if few else ():
                x, y = np.median(points[labels == number][:, [a, b]], axis=0)
                outline = [withStroke(linewidth=2.5, foreground="white")]
                axes.text(
                    x, y, _short(str(class_names[number]), 10), ha="center", va="center", path_effects=outline
                )
        ticks = np.arange(0, classes, 1 if few else -(-classes // 25))
        bar = figure.colorbar(dots, ax=panels, fraction=0.05, pad=0.01, label="true class")
        bar.solids.set_alpha(1)
        bar.set_ticks(ticks, labels=[_short(str(class_names[i])) for i in ticks])
        bar.ax.minorticks_off()


# ------------------------------------------------------------------------------------------------------------- training


def plot_training_curves(
    history: Sequence[Mapping[str, Any]], path: str | os.PathLike, best_epoch: int | None = None
) -> None:
    """Loss, accuracy and learning rate over the epochs.

    Args:
        history: a dict per epoch: epoch, train_loss, train_accuracy, val_loss, val_accuracy, learning_rate.
        best_epoch: the epoch to mark; by default the first of the highest val_accuracy.
    """
    from matplotlib.ticker import MaxNLocator

    epochs = [entry["epoch"] for entry in history]
    if best_epoch is None:
        best_epoch = max(history, key=lambda entry: entry["val_accuracy"])["epoch"]
    best = history[epochs.index(best_epoch)]
    marker = "o" if len(epochs) <= 20 else None
    with _page(path, 11, 3.4) as figure:
        loss, accuracy, rate = figure.subplots(1, 3)
        for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
            for part, label, colour in (("train", "training", NEUTRAL), ("val", "validation", RIGHT)):
                values = [entry[f"{part}_{name}"] for entry in history]
                axes.plot(epochs, values, color=colour, marker=marker, markersize=3, label=label)
            label = f"best epoch {best_epoch}: {best[f'val_{name}']:.4f}"
            axes.plot(best_epoch, best[f"val_{name}"], "*", color=WRONG, markersize=11, label=label)
            axes.set_title(name.capitalize())
            axes.legend()
        rate.plot(
            epochs, [entry["learning_rate"] for entry in history], color=RIGHT, marker=marker, markersize=3
        )
        rate.set_title("Learning rate")
        rate.set_ylim(bottom=0)
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        for axes in (loss, accuracy, rate):
            axes.axvline(best_epoch, color=WRONG, linewidth=0.8, linestyle=":")
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
