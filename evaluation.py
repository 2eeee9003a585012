"""One pass over a data loader, the metrics of its predictions, and the figures of an evaluation.

Metrics are plain data. Every `plot_*` function takes plain data and, last, the path of the picture to write.
Figures are built without pyplot: they need no display, ignore the user's own style, change no global state.

Letters: N samples, C classes, B batch, L tokens, D latent width.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:  # plotting libraries are imported where they are used: importing this module is quick
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PathLike = str | os.PathLike
Device = str | torch.device
Batch = Mapping[str, Any]

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#7F7F7F"  # told apart by colour-blind readers too
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "figure.titlesize": 10, "figure.titleweight": "bold", "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E5E5E5",
    "text.parse_math": False,  # a class may be called "$"
}  # fmt: skip
# Asked in this order for what DejaVu Sans lacks (Korean, Chinese, Japanese); Linux, Windows, macOS
MORE_FONTS = (
    "Noto Sans CJK KR", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans KR", "NanumGothic", "Malgun Gothic",
    "Microsoft YaHei", "Yu Gothic", "Apple SD Gothic Neo", "PingFang SC", "Hiragino Sans", "Arial Unicode MS",
)  # fmt: skip
FEW_CLASSES = 20  # up to here each class is written out, above only some are


# ------------------------------------------------------------------------------------- one pass over the data


@contextmanager
def evaluating(model: nn.Module, device: Device, amp_dtype: torch.dtype | None) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode that it was in before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    autocast = torch.autocast(torch.device(device).type, dtype=amp_dtype, enabled=amp_dtype is not None)
    try:
        with torch.inference_mode(), autocast:
            yield
    finally:
        for module, training in modes:
            module.training = training


def model_inputs(batch: Batch, device: Device) -> tuple[Any, Any]:
    """Input and mask on the device, for each modality if there are several; no mask where a whole batch is real."""
    if isinstance(batch["input"], dict):
        names = batch["input"].keys()
        pairs = [model_inputs({key: batch[key][name] for key in ("input", "mask")}, device) for name in names]
        return tuple(dict(zip(names, values, strict=True)) for values in zip(*pairs, strict=True))
    mask = batch["mask"]
    x = batch["input"].to(device, non_blocking=True)
    return x, None if mask.all() else mask.to(device, non_blocking=True)


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
            logits.append(model(*model_inputs(batch, device)).float())
            labels.append(batch["label"])
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
        latents = [model.pooled_latents(*model_inputs(batch, device)).float() for batch in loader]
    return torch.cat(latents).cpu().numpy()


def collect_attention(model: nn.Module, batch: Batch, device: Device = "cpu") -> list[np.ndarray]:
    """Cross-attention weights of one batch: (B, heads, latents, L) float32 for each cross-attend."""
    with evaluating(model, device, None):
        _, maps = model(*model_inputs(batch, device), return_attention=True)
    return [weights.float().cpu().numpy() for weights in maps]


# ---------------------------------------------------------------------------------------------------- metrics


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.as_tensor(logits, dtype=torch.float64), dim=-1).numpy()


def _confidences(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
    confidence, correct = _confidences(logits, labels)
    predicted = logits.argmax(1)
    of_label = np.take_along_axis(logits, labels[:, None], 1)
    ahead = (logits > of_label) | ((logits == of_label) & (np.arange(classes) < labels[:, None]))
    every = range(classes)
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
            **{f"top_{k}_accuracy": (ahead.sum(1) < k).mean() for k in top_k if k < classes},
            "majority_baseline": support.max() / len(labels),
            "negative_log_likelihood": -np.take_along_axis(log_p, labels[:, None], 1).mean(),
            "brier_score": np.square(np.exp(log_p) - np.eye(classes)[labels]).sum(1).mean(),
            "expected_calibration_error": _calibration_error(reliability_table(confidence, correct)),
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


def _calibration_error(rows: Sequence[dict]) -> float:
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


def most_confident_mistakes(
    logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str], limit: int = 16
) -> list[dict]:
    """The wrong predictions of highest confidence, highest first; `index` is the place among the `labels`."""
    p, predicted = np.exp(_log_probabilities(logits)), logits.argmax(1)
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
    """What an analysis adds: `reliability`, `accuracy_by_length` and `most_confident_mistakes`."""
    confidence, correct = _confidences(logits, labels)
    return {
        "reliability": reliability_table(confidence, correct),
        "accuracy_by_length": accuracy_by_length(lengths, correct),
        "most_confident_mistakes": most_confident_mistakes(logits, labels, class_names),
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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def evaluation_figures(
    logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> dict[str, Callable[[Path], None]]:
    """The three figures of every evaluation: file name -> function that draws it to a path."""
    from sklearn.metrics import confusion_matrix

    matrix = confusion_matrix(labels, logits.argmax(1), labels=range(len(class_names)))
    confidence, correct = _confidences(logits, labels)
    return {
        "confusion_matrix.png": partial(plot_confusion_matrix, matrix, class_names),
        "confidence_histogram.png": partial(plot_confidence_histogram, confidence, correct),
        "confidence_analysis.png": partial(plot_confidence_analysis, confidence, correct),
    }


def save_evaluation(
    output_dir: PathLike, results: Mapping[str, Any], figures: Mapping[str, Callable[[Path], None]]
) -> None:
    """Write results.json, then draw each figure (file name -> function of its path) into `output_dir`.

    A figure that fails costs neither the results nor the other figures. It leaves no picture, not even one of
    an earlier run, and at the end an ExceptionGroup names those that failed and holds their exceptions.
    """
    output_dir = Path(output_dir)
    write_results(output_dir / "results.json", results)
    errors = {}
    for name, draw in figures.items():
        try:
            draw(output_dir / name)
        except Exception as error:
            (output_dir / name).unlink(missing_ok=True)
            error.add_note(f"while drawing {name}")
            errors[name] = error
    if errors:
        message = f"{output_dir / 'results.json'} is complete, but these figures failed: {', '.join(errors)}"
        raise ExceptionGroup(message, list(errors.values()))


# -------------------------------------------------------------------------------------------- drawing: basics


@contextmanager
def _style() -> Iterator[None]:
    """The one style of all figures; the user's own is back afterwards."""
    import matplotlib.style
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    fonts = {"font.family": ["DejaVu Sans", *(name for name in MORE_FONTS if name in installed)]}
    with matplotlib.style.context(["default", STYLE | fonts]):
        yield


@contextmanager
def boxes_for_missing_glyphs() -> Iterator[None]:
    """A character that no font here has is drawn as a box, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure (sizes in inches) with an Agg canvas of its own, unknown to pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: PathLike) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with boxes_for_missing_glyphs():
        figure.savefig(path, dpi=150, bbox_inches="tight")


@contextmanager
def _page(path: PathLike, width: float, height: float) -> Iterator[Figure]:
    """A new figure in our style, written to `path` at the end of the block."""
    with _style():
        figure = _new_figure(width, height)
        yield figure
        _save(figure, path)


def _short(name: str, limit: int = 18) -> str:
    """The name; where it is longer than `limit` characters, its middle is left out."""
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[-(limit - limit // 2 - 1) :]}"


def _tick_names(class_names: Sequence[str], most: int) -> tuple[np.ndarray, list[str]]:
    """The class numbers to label, at most `most` where there are many, and their short and distinct names."""
    names = [_short(str(name)) for name in class_names]
    if len(set(names)) < len(names):
        names = [f"{i}: {name}" for i, name in enumerate(names)]
    step = 1 if len(names) <= FEW_CLASSES else -(-len(names) // most)
    return np.arange(0, len(names), step), names[::step]


def _columns(rows: Sequence[Mapping[str, Any]], *keys: str) -> list[np.ndarray]:
    return [np.array([row[key] for row in rows]) for key in keys]


def _interval(share: np.ndarray, count: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a share that was measured on `count` samples."""
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return np.minimum(centre - half, share), np.maximum(centre + half, share)


def _bars(axes: Axes, x: np.ndarray, share: np.ndarray, count: np.ndarray, width: float, at=None) -> None:
    """Bars of accuracies with their 95 % intervals, which stand at `at` (by default in the middle)."""
    low, high = _interval(share, count)
    axes.bar(x, share, width, color=BLUE, alpha=0.55, edgecolor="white")
    dots = {"fmt": "o", "color": "black", "markersize": 3, "linewidth": 1, "capsize": 2, "clip_on": False}
    label = "accuracy with 95 % interval"
    axes.errorbar(x if at is None else at, share, (share - low, high - share), label=label, **dots)
    axes.set(ylabel="accuracy", ylim=(0, 1))


# -------------------------------------------------------------------------------- figures of every evaluation


def confusion_matrix_figure(matrix: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Counts (C, C), coloured by share of the true class; on an Agg canvas, as TensorBoard needs it."""
    import seaborn
    from matplotlib.colors import PowerNorm

    matrix = np.asarray(matrix)
    classes, total, right = len(matrix), matrix.sum(), np.trace(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    few = classes <= FEW_CLASSES
    side = np.clip(0.45 * classes, 2.6, 9)
    ticks, names = _tick_names(class_names, most=50)
    with _style():
        figure = _new_figure(side + 2, side + 1.2)
        axes = figure.subplots()
        seaborn.heatmap(
            shares, ax=axes, cmap="Blues", norm=PowerNorm(0.5, 0, 1), square=True,
            linewidths=0.5 if few else 0, annot=matrix if few else None, fmt="d", annot_kws={"fontsize": 8},
            cbar_kws={"label": "share of the true class", "fraction": 0.05, "pad": 0.02},
        )  # fmt: skip
        for text in axes.texts:
            text.set_alpha(0.4 if text.get_text() == "0" else 1)
        fontsize = 9 if few else 6.5
        level = few and max(map(len, names)) * 0.085 < side / classes  # inches per character
        axes.set_xticks(ticks + 0.5, names, rotation=0 if level else 90, fontsize=fontsize)
        axes.set_yticks(ticks + 0.5, names, rotation=0, fontsize=fontsize)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.set_title(f"{right:,} of {total:,} right ({right / max(total, 1):.1%})")
    return figure


def plot_confusion_matrix(matrix: np.ndarray, class_names: Sequence[str], path: PathLike) -> None:
    """Write `confusion_matrix_figure`."""
    with _style():
        _save(confusion_matrix_figure(matrix, class_names), path)


def plot_confidence_histogram(confidence: np.ndarray, correct: np.ndarray, path: PathLike) -> None:
    """Confidences (N,) of the right predictions above, of the wrong ones below, each on its own scale."""
    from matplotlib.ticker import MaxNLocator

    with _page(path, 6, 4.5) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True)
        parts = ((upper, "Right", correct, BLUE), (lower, "Wrong", ~correct, VERMILION))
        for axes, name, chosen, colour in parts:
            values = confidence[chosen]
            title = f"{name}: {len(values):,} of {len(confidence):,} predictions ({chosen.mean():.1%})"
            axes.hist(values, bins=20, range=(0, 1), color=colour, edgecolor="white")
            axes.set(ylabel="samples", xlim=(0, 1))
            axes.set_ylim(top=None if len(values) else 1)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            if len(values):
                axes.axvline(np.median(values), color="black", linestyle="--", linewidth=1)
                title += f", median {np.median(values):.3f}"
            axes.set_title(title)
        lower.set_xlabel("confidence (probability of the predicted class)")


def plot_confidence_analysis(confidence: np.ndarray, correct: np.ndarray, path: PathLike) -> None:
    """Reliability diagram with the count of each bin; accuracy if only the most confident are answered."""
    table = reliability_table(confidence, correct)
    rows = [row for row in table if row["count"]]
    start, count, mean, accuracy = _columns(rows, "low", "count", "confidence", "accuracy")
    width = 1 / len(table)
    centre = start + width / 2
    order = np.argsort(-confidence, kind="stable")
    answered = np.arange(1, len(order) + 1)
    share = np.cumsum(correct[order]) / answered
    last = np.append(np.diff(confidence[order]) != 0, True)  # equally confident samples are answered together
    share, answered = share[last], answered[last]
    coverage = answered / len(order)
    low, high = _interval(share, answered)

    with _page(path, 10, 5) as figure:
        left, right = figure.subfigures(1, 2)
        diagram, counts = left.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _bars(diagram, centre, accuracy, count, width, at=mean)
        diagram.plot([0, 1], [0, 1], "--", color=VERMILION, linewidth=1, label="perfectly calibrated")
        diagram.set_title(f"Reliability: expected calibration error {_calibration_error(table):.3f}")
        counts.bar(centre, count, width, color=GREY, edgecolor="white")
        for x, number in zip(centre, count, strict=True):
            counts.text(x, number, f"{number}", ha="center", va="bottom", fontsize=6.5)
        counts.set(xlabel="confidence (probability of the predicted class)", ylabel="samples", xlim=(0, 1))
        counts.set_ylim(0, 1.2 * count.max())
        left.legend(*diagram.get_legend_handles_labels(), loc="outside lower center", ncols=2)

        axes = right.subplots()
        axes.fill_between(coverage, low, high, color=BLUE, alpha=0.2, linewidth=0, label="95 % interval")
        axes.plot(coverage, share, color=BLUE, marker="o" if len(share) == 1 else None, label="accuracy")
        axes.axhline(share[-1], color=GREY, linestyle="--", label=f"all answered: {share[-1]:.3f}")
        axes.set_title("Accuracy against coverage, most confident first")
        axes.set(xlabel="share of samples answered", ylabel="accuracy", xlim=(0, 1))
        axes.set_ylim(min(share.min(), low[coverage >= 0.2].min()) - 0.01, 1.002)
        right.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


# ------------------------------------------------------------------------------------- figures of an analysis


def plot_accuracy_by_length(rows: Sequence[dict], path: PathLike) -> None:
    """The rows of `accuracy_by_length` as bars."""
    count, accuracy = _columns(rows, "count", "accuracy")
    x = np.arange(len(rows))
    with _page(path, 7, 3.6) as figure:
        axes = figure.subplots()
        _bars(axes, x, accuracy, count, width=0.8)
        mean = accuracy @ count / count.sum()
        axes.axhline(mean, color=VERMILION, linestyle="--", linewidth=1, label=f"all lengths: {mean:.3f}")
        axes.set_xticks(x, [f"{row['shortest']}–{row['longest']}\nn = {row['count']}" for row in rows])
        axes.set(xlabel="length (real tokens)")
        axes.set_title("Accuracy by sequence length")
        axes.grid(axis="x", visible=False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def _unit_range(images: np.ndarray) -> np.ndarray:
    """Images of any scale from 0 (0..255, 0..16, 0..1) as floats in [0, 1]."""
    images = np.asarray(images, dtype=np.float64)
    return np.clip(images / max(images.max(initial=0), 1e-12), 0, 1)


def _show_image(axes: Axes, image: np.ndarray) -> None:
    """Draw an image (H, W, 1 or 3) in [0, 1]."""
    axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()


def plot_mistakes(mistakes: Sequence[dict], images: np.ndarray, path: PathLike) -> None:
    """The images (M, H, W, 1 or 3), before normalisation, of M `most_confident_mistakes`, in their order."""
    rows = -(-len(mistakes) // 4)
    with _page(path, 7.6, 2.25 * rows + 0.4) as figure:
        figure.suptitle("Most confident mistakes" if mistakes else "No mistakes")
        if not mistakes:
            return
        grid = figure.subplots(rows, 4, squeeze=False).ravel()
        for axes in grid[len(mistakes) :]:
            axes.set_axis_off()
        for axes, mistake, image in zip(grid[: len(mistakes)], mistakes, _unit_range(images), strict=True):
            _show_image(axes, image)
            true, predicted = _short(mistake["true"]), _short(mistake["predicted"])
            title = f"true {true}\npredicted {predicted}\nconfidence {mistake['confidence']:.1%}"
            axes.set_title(title, fontsize=7.5, weight="normal")


def _distinct_rows(rows: np.ndarray, number: int) -> list[int]:
    """The most peaked row of (latents, L), then again and again the one farthest from those chosen."""
    chosen = [int(rows.max(1).argmax())]
    while len(chosen) < number:
        distance = np.min([np.abs(rows - rows[i]).sum(1) for i in chosen], axis=0)
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return chosen


def plot_image_attention(
    images: np.ndarray, attention: Sequence[np.ndarray], grid_shape: Sequence[int], captions: Sequence[str],
    path: PathLike,
) -> None:  # fmt: skip
    """Cross-attention over a few images: its mean over heads and latents, then the latents that differ most.

    Args:
        images: (B, H, W, 1 or 3), before normalisation.
        attention: for each cross-attend (B, heads, latents, rows * columns), as from `collect_attention`.
        grid_shape: (rows, columns) of the patch grid.
        captions: a text per image, such as "true cat, predicted dog"; each part gets a line.
    """
    images = _unit_range(images)
    height, width = images.shape[1:3]
    singles = min(4, attention[0].shape[2])
    lines = [(i, number) for i in range(len(images)) for number in range(len(attention))]
    with _page(path, 1.65 * (2 + singles), 1.8 * len(lines) + 0.4) as figure:
        figure.suptitle("Cross-attention, mean over heads, as a multiple of uniform attention")
        grid = figure.subplots(len(lines), 2 + singles, squeeze=False)
        for panels, (i, number) in zip(grid, lines, strict=True):
            latents = attention[number][i].mean(0) * attention[number].shape[-1]
            chosen = _distinct_rows(latents, singles)
            maps = {"mean": latents.mean(0)} | {f"latent {k}": latents[k] for k in chosen}
            _show_image(panels[0], images[i])
            caption = captions[i].split(", ") + [f"cross-attend {number + 1}"] * (len(attention) > 1)
            panels[0].set_title("\n".join(_short(line, 24) for line in caption), fontsize=7)
            for axes, (name, values) in zip(panels[1:], maps.items(), strict=True):
                _show_image(axes, 0.3 + 0.4 * images[i].mean(-1, keepdims=True))
                extent = (-0.5, width - 0.5, height - 0.5, -0.5)
                picture = axes.imshow(values.reshape(grid_shape), cmap="viridis", alpha=0.7, extent=extent)
                axes.set_title(name, fontsize=7.5, weight="normal")
                bar = figure.colorbar(picture, ax=axes, shrink=0.8, fraction=0.05, pad=0.02)
                bar.ax.tick_params(labelsize=6)


def plot_sequence_attention(
    inputs: np.ndarray, masks: np.ndarray, attention: Sequence[np.ndarray], captions: Sequence[str],
    path: PathLike,
) -> None:  # fmt: skip
    """Cross-attention over time for a few sequences, a column each: input, latents x time without padding.

    Args:
        inputs: (B, L, C).
        masks: bool (B, L), True at real tokens.
        attention: for each cross-attend (B, heads, latents, L), as from `collect_attention`.
        captions: a text per sequence, such as its true and its predicted class.
    """
    rows = 1 + len(attention)
    with _page(path, 0.8 + 3.6 * len(inputs), 2 + 2.4 * len(attention)) as figure:
        ratios = [1.8] + [2.4] * len(attention)
        columns = figure.subplots(rows, len(inputs), squeeze=False, sharex="col", height_ratios=ratios).T

        def heat_map(axes: Axes, values: np.ndarray, label: str, **kwargs: Any) -> None:
            picture = axes.imshow(values, aspect="auto", interpolation="nearest", **kwargs)
            axes.grid(False)
            figure.colorbar(picture, ax=axes, label=label)

        for i, (top, *below) in enumerate(columns):
            signal = inputs[i][masks[i]]
            if signal.shape[1] <= 8:
                top.plot(signal, linewidth=1)
                top.set_ylabel("input")
            else:
                limit = np.abs(signal).max()
                heat_map(top, signal.T, "value", cmap="RdBu_r", vmin=-limit, vmax=limit)
                top.set_ylabel("input channel")
            top.set_title(captions[i].replace(", ", "\n") if len(captions[i]) > 40 else captions[i])
            for number, (axes, weights) in enumerate(zip(below, attention, strict=True), start=1):
                latents = weights[i].mean(0)[:, masks[i]] * len(signal)
                order = np.argsort(latents.argmax(1), kind="stable")
                heat_map(axes, latents[order], "multiple of uniform", cmap="viridis", vmin=0)
                axes.set_ylabel(f"latents of cross-attend {number}\n(in order of their peaks)")
            below[-1].set_xlabel("time (tokens)")


def plot_text_attention(
    texts: np.ndarray, masks: np.ndarray, attention: Sequence[np.ndarray], captions: Sequence[str], path: PathLike,
) -> None:  # fmt: skip
    """Cross-attention over the characters of a few texts: its mean over heads, latents and cross-attends.

    Args:
        texts: (B, L), the bytes of each text in UTF-8.
        masks, attention, captions: as for `plot_sequence_attention`.
    """
    most = 12  # lines of a text
    width = int(min(64, masks.sum(1).max()))  # characters in a line
    shown = []
    for i, (data, mask) in enumerate(zip(texts, masks, strict=True)):
        data = data[mask].astype(np.uint8)
        share = np.mean([weights[i].mean((0, 1))[mask] for weights in attention], axis=0)  # of each byte
        starts = np.flatnonzero((data & 0xC0) != 0x80)  # the bytes that begin a character
        share = np.add.reduceat(share, starts) if len(starts) else share[:0]
        ends = [*starts[1:], len(data)]
        characters = [bytes(data[a:b]).decode(errors="replace") for a, b in zip(starts, ends, strict=True)]
        shown.append((characters[: width * most], (share * len(share))[: width * most]))
    lines = [max(1, -(-len(characters) // width)) for characters, _ in shown]
    with _page(path, max(6, 1.2 + 0.14 * width), 0.5 + sum(0.5 + 0.25 * number for number in lines)) as figure:
        figure.suptitle("Cross-attention to each character, as a multiple of uniform attention")
        panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=[1 + number for number in lines])[:, 0]
        for axes, (characters, share), number, caption in zip(panels, shown, lines, captions, strict=True):
            grid = np.full(number * width, np.nan)
            grid[: len(share)] = share
            picture = axes.imshow(grid.reshape(number, width), cmap="Oranges", vmin=0, aspect="auto", alpha=0.6)
            for place, character in enumerate(characters):
                row, column = divmod(place, width)
                character = character if character.isprintable() else "·"
                axes.text(column, row, character, ha="center", va="center", fontsize=7)
            axes.set_axis_off()
            axes.set_title(caption, fontsize=8)
            figure.colorbar(picture, ax=axes, fraction=0.02, pad=0.01)


def plot_latent_projection(
    latents: np.ndarray, labels: np.ndarray, class_names: Sequence[str], path: PathLike
) -> None:
    """Pooled latents (N, D) of classes (N,) on their first four principal components, two to a panel."""
    import seaborn
    from matplotlib.colors import ListedColormap
    from matplotlib.patheffects import withStroke
    from sklearn.decomposition import PCA

    latents, classes = np.asarray(latents, dtype=np.float64), len(class_names)
    pca = PCA(min(4, *latents.shape), svd_solver="full")
    with np.errstate(invalid="ignore", divide="ignore"):  # equal latents have no variance to share out
        points = pca.fit_transform(latents)
        share = np.nan_to_num(pca.explained_variance_ratio_)
    missing = max(0, 2 - len(share))
    points, share = np.pad(points, ((0, 0), (0, missing))), np.pad(share, (0, missing))
    pairs = [(0, 1), (2, 3)][: len(share) // 2]
    colours = ListedColormap(seaborn.color_palette("colorblind" if classes <= 10 else "husl", classes))
    ticks, names = _tick_names(class_names, most=25)
    with _page(path, 4.4 * len(pairs) + 1.6, 4.6) as figure:
        figure.suptitle(f"Pooled latents of {len(points):,} samples, projected by PCA")
        panels = figure.subplots(1, len(pairs), squeeze=False)[0]
        for axes, (a, b) in zip(panels, pairs, strict=True):
            dots = axes.scatter(
                points[:, a], points[:, b], c=labels, cmap=colours, vmin=-0.5, vmax=classes - 0.5,
                s=np.clip(6000 / len(points), 3, 30), alpha=0.7, linewidths=0,
            )  # fmt: skip
            axes.set_xlabel(f"component {a + 1} ({share[a]:.1%} of the variance)")
            axes.set_ylabel(f"component {b + 1} ({share[b]:.1%})")
            for number in np.unique(labels) if classes <= 10 else ():
                x, y = np.median(points[labels == number][:, [a, b]], axis=0)
                outline = [withStroke(linewidth=2.5, foreground="white")]
                name = _short(str(class_names[number]), 12)
                axes.text(x, y, name, ha="center", va="center", path_effects=outline)
        bar = figure.colorbar(dots, ax=panels, fraction=0.05, pad=0.01, label="true class")
        bar.solids.set_alpha(1)
        bar.set_ticks(ticks, labels=names)
        bar.ax.invert_yaxis()
        bar.ax.minorticks_off()


# --------------------------------------------------------------------------------------------------- training


def plot_training_curves(
    history: Sequence[Mapping[str, Any]], path: PathLike, best_epoch: int | None = None
) -> None:
    """Loss, accuracy and learning rate over the epochs.

    Args:
        history: a dict per epoch: epoch, train_loss, train_accuracy, val_loss, val_accuracy, learning_rate.
        best_epoch: the epoch to mark; by default the first with the highest val_accuracy.
    """
    from matplotlib.ticker import MaxNLocator

    keys = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate")
    series = {key: [entry[key] for entry in history] for key in keys}
    epochs = series["epoch"]
    best = epochs.index(best_epoch) if best_epoch is not None else int(np.argmax(series["val_accuracy"]))
    marker = "o" if len(epochs) <= 20 else None
    with _page(path, 11, 3.4) as figure:
        loss, accuracy, rate = figure.subplots(1, 3)
        for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
            for part, label, colour in (("train", "training", GREY), ("val", "validation", BLUE)):
                values = series[f"{part}_{name}"]
                axes.plot(epochs, values, color=colour, marker=marker, markersize=3, label=label)
            value = series[f"val_{name}"][best]
            label = f"best epoch {epochs[best]}: {value:.4f}"
            axes.plot(epochs[best], value, "*", color=VERMILION, markersize=11, label=label)
            axes.set_title(name.capitalize())
            axes.legend()
        rate.plot(epochs, series["learning_rate"], color=BLUE, marker=marker, markersize=3)
        rate.set_title("Learning rate")
        rate.yaxis.set_major_formatter("{x:.3g}")
        for axes in (loss, rate):
            axes.set_ylim(0, 1.03 * axes.get_ylim()[1])
        for axes in (loss, accuracy, rate):
            axes.axvline(epochs[best], color=VERMILION, linewidth=0.8, linestyle=":")
            axes.set(xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
