"""The figures of training and evaluation. Every `plot_*` function takes plain data and, last, the path to write.

Figures are built without pyplot: they need no display, ignore the user's own style and change no global state.

Letters: N samples, C classes, B batch, L tokens, D latent width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from files import PathLike, written_whole
from messages import figure_text, print_note, printable

if TYPE_CHECKING:  # plotting libraries are imported where they are used: importing this module is quick
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#7F7F7F"  # told apart by colour-blind readers too
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "figure.titlesize": 10, "figure.titleweight": "bold", "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E5E5E5",
    "text.parse_math": False,  # a class may be called "$"
}  # fmt: skip
# Where DejaVu Sans, which comes with matplotlib, has no glyph: Korean, Chinese, Japanese and others
OTHER_FONTS = (
    "Noto Sans CJK KR", "Noto Sans CJK JP", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo",
    "Microsoft YaHei", "PingFang SC", "Hiragino Sans", "Arial Unicode MS",
)  # fmt: skip
FEW_CLASSES = 20  # up to here each class is written out, above only some are


# --- Drawing: basics -------------------------------------------------------------------------------------------------


@contextmanager
def _style() -> Iterator[None]:
    """The one style of all figures; afterwards the user's own is back."""
    import matplotlib.style
    from matplotlib.font_manager import fontManager

    fonts = ["DejaVu Sans", *(name for name in OTHER_FONTS if name in set(fontManager.get_font_names()))]
    with matplotlib.style.context(["default", STYLE, {"font.family": fonts}]):
        yield


@contextmanager
def missing_glyphs_noted() -> Iterator[None]:
    """Say once that characters which no font has are drawn as boxes, instead of warning about each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    glyphs = [each for each in caught if "missing from font" in str(each.message)]
    if glyphs:
        _note_boxes()
    for other in (each for each in caught if each not in glyphs):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)


@lru_cache  # once in a process
def _note_boxes() -> None:
    print_note(
        "some characters are drawn as boxes in the figures: no font here has them; install one that does, such as "
        f"{OTHER_FONTS[0]}"
    )


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure (sizes in inches) with its own Agg canvas, unknown to pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: PathLike) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with missing_glyphs_noted(), written_whole(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or None, dpi=150, bbox_inches="tight")


@contextmanager
def _page(path: PathLike, width: float, height: float) -> Iterator[Figure]:
    """A new figure in our style, written to `path` at the end of the block."""
    with _style():
        figure = _new_figure(width, height)
        yield figure
        _save(figure, path)


def short(name: str, limit: int = 18) -> str:
    """The name in printable characters; if it is longer than `limit`, its middle is left out."""
    name = printable(name)
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[-(limit - limit // 2 - 1) :]}"


def _tick_names(class_names: Sequence[str], most: int) -> tuple[np.ndarray, list[str]]:
    """The class numbers to label, at most `most` if there are many, and their short and distinct names."""
    names = [short(str(name)) for name in class_names]
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


def _bars(
    axes: Axes, x: np.ndarray, share: np.ndarray, count: np.ndarray, width: float, at=None, of: str = "accuracy"
) -> None:
    """Bars of shares with their 95 % intervals, drawn at `at` (by default in the middle)."""
    low, high = _interval(share, count)
    axes.bar(x, share, width, color=BLUE, alpha=0.55, edgecolor="white")
    dots = {"fmt": "o", "color": "black", "markersize": 3, "linewidth": 1, "capsize": 2, "clip_on": False}
    label = f"{of} with 95 % interval"
    reach = [(share - low).tolist(), (high - share).tolist()]
    axes.errorbar(x if at is None else at, share, reach, label=label, **dots)
    axes.set(ylabel=of, ylim=(0, 1))


# --- Figures of every evaluation -------------------------------------------------------------------------------------


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
    """Confidences (N,) of the right predictions above and of the wrong ones below, each on its own scale."""
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


def plot_confidence_analysis(
    table: Sequence[Mapping[str, Any]], error: float, confidence: np.ndarray, correct: np.ndarray, path: PathLike,
    unit: str = "samples",
) -> None:  # fmt: skip
    """Reliability diagram with the count of each bin; accuracy if only the most confident are answered.

    Args:
        table, error: `evaluation.reliability_table` and `calibration_error` of the predictions.
        confidence, correct: of each prediction, (N,).
    """
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
        diagram.set_title(f"Reliability: expected calibration error {error:.3f}")
        counts.bar(centre, count, width, color=GREY, edgecolor="white")
        for x, number in zip(centre, count, strict=True):
            counts.text(x, number, f"{number}", ha="center", va="bottom", fontsize=6.5)
        counts.set(xlabel="confidence (probability of the predicted class)", ylabel=unit, xlim=(0, 1))
        counts.set_ylim(0, 1.2 * count.max())
        left.legend(*diagram.get_legend_handles_labels(), loc="outside lower center", ncols=2)

        axes = right.subplots()
        axes.fill_between(coverage, low, high, color=BLUE, alpha=0.2, linewidth=0, label="95 % interval")
        axes.plot(coverage, share, color=BLUE, marker="o" if len(share) == 1 else None, label="accuracy")
        axes.axhline(share[-1], color=GREY, linestyle="--", label=f"all answered: {share[-1]:.3f}")
        axes.set_title("Accuracy against coverage, most confident first")
        axes.set(xlabel=f"share of {unit} answered", ylabel="accuracy", xlim=(0, 1))
        axes.set_ylim(min(share.min(), low[coverage >= 0.2].min()) - 0.01, 1.002)
        right.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


# --- Figures of an analysis ------------------------------------------------------------------------------------------


def _length_ticks(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the lengths and the number of samples under each bar of `evaluation.by_length`."""
    ranges = ["–".join(dict.fromkeys((str(row["shortest"]), str(row["longest"])))) for row in rows]
    labels = [f"{span}\nn = {row['count']}" for span, row in zip(ranges, rows, strict=True)]
    axes.set_xticks(np.arange(len(rows)), labels)
    axes.set(xlabel="length (real tokens)")
    axes.grid(axis="x", visible=False)


def plot_accuracy_by_length(rows: Sequence[dict], path: PathLike) -> None:
    """The rows of `evaluation.by_length` of accuracies as bars."""
    count, accuracy = _columns(rows, "count", "accuracy")
    x = np.arange(len(rows))
    with _page(path, 7, 3.6) as figure:
        axes = figure.subplots()
        _bars(axes, x, accuracy, count, width=0.8)
        mean = accuracy @ count / count.sum()
        axes.axhline(mean, color=VERMILION, linestyle="--", linewidth=1, label=f"all lengths: {mean:.3f}")
        _length_ticks(axes, rows)
        axes.set_title("Accuracy by sequence length")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)


# --- Figures of numbers ----------------------------------------------------------------------------------------------


def _columns_of_panels(names: Sequence[str]) -> int:
    return len(names) if len(names) <= 4 else 3


def _panels(figure: Figure, names: Sequence[str]) -> list[Axes]:
    """A panel for each of the numbers."""
    columns = _columns_of_panels(names)
    grid = figure.subplots(-(-len(names) // columns), columns, squeeze=False).ravel()
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(grid, names, strict=False):
        axes.set_title(short(str(name), 30))
    return list(grid[: len(names)])


def _page_of_numbers(path: PathLike, names: Sequence[str]) -> AbstractContextManager[Figure]:
    columns = _columns_of_panels(names)
    return _page(path, 4.4 * columns, 4 * -(-len(names) // columns))


def _dots(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    axes.scatter(x, y, s=np.clip(4000 / len(x), 3, 25), color=BLUE, alpha=0.55, linewidths=0)


def _in_unit(*values: np.ndarray) -> tuple[str, list[np.ndarray]]:
    """(what to add to the name of an axis, the values as it shows them): large and small ones in powers of 1000; of
    values that lie close together, far from 0, the distance from a round number."""
    low, high = min(each.min() for each in values), max(each.max() for each in values)
    base, label = 0.0, ""
    if 0 < high - low < 1e-4 * max(abs(low), abs(high)):
        step = 10.0 ** np.ceil(np.log10(high - low))
        base = np.round((low + high) / 2 / step) * step
        label, values = f" − {base:.15g}".replace("− -", "+ "), [each - base for each in values]
    largest = max(abs(low - base), abs(high - base))
    if largest == 0 or 1e-2 <= largest < 1e5:
        return label, list(values)
    power = 3 * int(np.floor(np.log10(largest) / 3))
    return f"{label} [1e{power}]", [each / 10.0**power for each in values]


def _few_ticks(axes: Axes, which: str = "both") -> None:
    axes.locator_params(axis=which, nbins=6, steps=[1, 2, 5, 10])


def plot_predicted_against_true(
    true: np.ndarray, predicted: np.ndarray, names: Sequence[str], path: PathLike
) -> None:
    """Predicted against true numbers, (N, K) each, a panel per target, with the diagonal of equality."""
    with _page_of_numbers(path, names) as figure:
        for axes, x, y in zip(_panels(figure, names), true.T, predicted.T, strict=True):
            unit, (x, y) = _in_unit(x, y)
            _dots(axes, x, y)
            low, high = min(x.min(), y.min()), max(x.max(), y.max())
            margin = 0.03 * ((high - low) or 1)
            ends = (low - margin, high + margin)
            axes.plot(ends, ends, "--", color=VERMILION, linewidth=1)  # where they are equal
            axes.set(xlabel=f"true{unit}", ylabel=f"predicted{unit}", xlim=ends, ylim=ends, aspect="equal")
            _few_ticks(axes)


def plot_residuals(true: np.ndarray, predicted: np.ndarray, names: Sequence[str], path: PathLike) -> None:
    """Residuals (predicted - true) against predicted numbers, (N, K) each."""
    with _page_of_numbers(path, names) as figure:
        for axes, x, y in zip(_panels(figure, names), predicted.T, (predicted - true).T, strict=True):
            (x_unit, (x,)), (y_unit, (y,)) = _in_unit(x), _in_unit(y)
            _dots(axes, x, y)
            axes.axhline(0, color=VERMILION, linestyle="--", linewidth=1)
            axes.set(xlabel=f"predicted{x_unit}", ylabel=f"predicted − true{y_unit}")
            _few_ticks(axes)


def plot_residual_histogram(true: np.ndarray, predicted: np.ndarray, names: Sequence[str], path: PathLike) -> None:
    """A histogram of the residuals (predicted - true) of numbers (N, K)."""
    from matplotlib.ticker import MaxNLocator

    with _page_of_numbers(path, names) as figure:
        for axes, name, residuals in zip(_panels(figure, names), names, (predicted - true).T, strict=True):
            unit, (residuals,) = _in_unit(residuals)
            axes.hist(residuals, bins=min(40, max(8, int(len(residuals) ** 0.5))), color=BLUE, edgecolor="white")
            axes.axvline(0, color="black", linewidth=1)
            median = np.median(residuals)
            axes.axvline(median, color=VERMILION, linestyle="--", linewidth=1)
            axes.set_title(f"{short(str(name), 24)}: median {median:.3g}{unit}")
            axes.set(xlabel=f"predicted − true{unit}", ylabel="samples")
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
            _few_ticks(axes, "x")


def plot_error_by_length(rows: Sequence[dict], path: PathLike) -> None:
    """The rows of `evaluation.by_length` of mean errors as bars."""
    count, error = _columns(rows, "count", "mean_error")
    mean = error @ count / count.sum()
    unit, (error, mean) = _in_unit(error, mean)
    with _page(path, 7, 3.6) as figure:
        axes = figure.subplots()
        axes.bar(np.arange(len(rows)), error, 0.8, color=BLUE, alpha=0.55, edgecolor="white")
        axes.axhline(mean, color=VERMILION, linestyle="--", linewidth=1, label=f"all lengths: {mean:.3g}")
        _length_ticks(axes, rows)
        axes.set(ylabel=f"mean error{unit}")
        axes.set_title("Error by sequence length")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center")


# --- Figures of several labels ---------------------------------------------------------------------------------------


def plot_precision_recall_bars(per_class: Sequence[Mapping[str, Any]], path: PathLike) -> None:
    """Precision, recall and F1 of each label, the rows `per_class` of `evaluation.multilabel_metrics`."""
    ticks, names = _tick_names([row["class"] for row in per_class], most=75)
    y = np.arange(len(per_class))
    height = np.clip((0.32 if len(per_class) <= FEW_CLASSES else 0.18) * len(per_class), 1.6, 14)
    with _page(path, 7, height + 1.2) as figure:
        axes = figure.subplots()
        for offset, (key, colour) in enumerate({"precision": BLUE, "recall": VERMILION, "f1": GREY}.items()):
            values = [row[key] or 0 for row in per_class]
            axes.barh(y + 0.25 * (offset - 1), values, 0.25, color=colour, alpha=0.75, label=key.replace("f1", "F1"))
        axes.set_yticks(ticks, names, fontsize=9 if len(per_class) <= FEW_CLASSES else 7)
        axes.set_ylim(len(per_class) - 0.5, -0.5)
        axes.set(xlim=(0, 1), xlabel="share")
        axes.grid(axis="y", visible=False)
        axes.set_title("Precision and recall of each label")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def plot_precision_recall_curves(
    probabilities: np.ndarray, true: np.ndarray, thresholds: Sequence[float], class_names: Sequence[str], path: PathLike
) -> None:
    """Precision against recall of each label as its threshold moves; a dot where the threshold is.

    Args:
        probabilities: (N, C).
        true: bool (N, C). Labels that are on no sample are left out; of many the 12 most frequent are drawn.
    """
    import seaborn
    from sklearn.metrics import average_precision_score, precision_recall_curve

    support = true.sum(0)
    shown = [i for i in np.argsort(-support, kind="stable")[:12] if support[i]]
    palette = seaborn.color_palette("colorblind" if len(shown) <= 10 else "husl", max(1, len(shown)))
    with _page(path, 7.5, 4.6) as figure:
        axes = figure.subplots()
        for colour, i in zip(palette, sorted(shown), strict=False):
            precision, recall, _ = precision_recall_curve(true[:, i], probabilities[:, i])
            label = f"{short(str(class_names[i]))} ({average_precision_score(true[:, i], probabilities[:, i]):.3f})"
            axes.plot(recall, precision, color=colour, drawstyle="steps-post", label=label)
            predicted = probabilities[:, i] >= thresholds[i]
            if predicted.any():
                hits = (predicted & true[:, i]).sum()
                axes.plot(hits / support[i], hits / predicted.sum(), "o", color=colour, markersize=5, clip_on=False)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        few = len(shown) == len(class_names)
        what = "Precision and recall" if few else f"The {len(shown)} most frequent of {len(class_names)} labels"
        axes.set_title(f"{what} (dots: at the thresholds)")
        title = "average precision" if shown else None
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", title=title)


def plot_label_calibration(table: Sequence[Mapping[str, Any]], path: PathLike) -> None:
    """How often a label is there, against the probability that was answered, over all labels.

    table: rows `low, high, count, confidence, accuracy` of bins of probability, as of `evaluation.reliability_table`.
    """
    rows = [row for row in table if row["count"]]
    start, count, mean, share = _columns(rows, "low", "count", "confidence", "accuracy")
    width = 1 / len(table)
    with _page(path, 5.5, 5) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _bars(upper, start + width / 2, share, count, width, at=mean, of="share")
        upper.plot([0, 1], [0, 1], "--", color=VERMILION, linewidth=1, label="perfectly calibrated")
        upper.set(ylabel="share with the label", xlim=(0, 1))
        upper.set_title("Calibration over all labels")
        lower.bar(start + width / 2, count, width, color=GREY, edgecolor="white")
        lower.set(xlabel="probability of a label", ylabel="answers", yscale="log")
        lower.yaxis.set_major_formatter("{x:,.0f}")
        lower.minorticks_off()
        figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=2)


# --- Figures of images, series and texts -----------------------------------------------------------------------------


def _unit_range(images: np.ndarray) -> np.ndarray:
    """Images whose values go up to 1, 16 or 255 (the smallest of these that fits) as floats in [0, 1]."""
    images = np.asarray(images, dtype=np.float64)
    top = next(top for top in (1, 16, 255, np.inf) if images.max(initial=0) <= top)
    return np.clip(images / top, 0, 1)


def _show_image(axes: Axes, image: np.ndarray) -> None:
    """Draw an image (H, W, 1 or 3) in [0, 1]."""
    axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()


def plot_mistakes(images: np.ndarray, titles: Sequence[Sequence[str]], path: PathLike) -> None:
    """The images (M, H, W, 1 or 3), before normalisation, of the M worst answers, the worst first.

    titles: for each image the lines above it.
    """
    rows = -(-len(titles) // 4)
    with _page(path, 7.6, 2.4 * rows + 0.4) as figure:
        figure.suptitle("Worst answers" if titles else "No mistakes")
        if not titles:
            return
        grid = figure.subplots(rows, 4, squeeze=False).ravel()
        for axes in grid[len(titles) :]:
            axes.set_axis_off()
        for axes, lines, image in zip(grid[: len(titles)], titles, _unit_range(images), strict=True):
            _show_image(axes, image)
            axes.set_title("\n".join(lines), fontsize=7.5, weight="normal")


def _distinct_rows(rows: np.ndarray, number: int) -> list[int]:
    """The most peaked row of (latents, L), then repeatedly the one farthest from those chosen."""
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
            panels[0].set_title("\n".join(short(line, 24) for line in caption), fontsize=7)
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
            below[-1].set_xlabel("time (steps)")


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
            for position, character in enumerate(characters):
                row, column = divmod(position, width)
                character = character if character.isprintable() else "·"
                axes.text(column, row, character, ha="center", va="center", fontsize=7)
            axes.set_axis_off()
            axes.set_title(caption, fontsize=8)
            figure.colorbar(picture, ax=axes, fraction=0.02, pad=0.01)


def _class_colours(number: int, outside: bool = False) -> np.ndarray:
    """RGB (number, 3) of classes; the first one is light grey where it is that of what is in no span."""
    import seaborn

    palette = seaborn.color_palette("colorblind" if number - outside <= 10 else "husl", number - outside)
    return np.array([(0.9, 0.9, 0.9)] * outside + list(palette))


def _tags_legend(figure: Figure, used: np.ndarray, class_names: Sequence[str], colours: np.ndarray) -> None:
    from matplotlib.patches import Patch

    shown = used[:FEW_CLASSES]
    handles = [Patch(color=colours[number], label=short(str(class_names[number]))) for number in shown]
    if len(used) > len(shown):
        handles.append(Patch(color="white", label=f"and {len(used) - len(shown)} more"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))


def _used(*sides: Sequence[np.ndarray]) -> np.ndarray:
    classes = np.unique(np.concatenate([each for side in sides for each in side]))
    return classes[classes >= 0]


def plot_sequence_tags(
    inputs: Sequence[np.ndarray], true: Sequence[np.ndarray], predicted: Sequence[np.ndarray],
    class_names: Sequence[str], captions: Sequence[str], path: PathLike,
) -> None:  # fmt: skip
    """A few series with a strip of the true and one of the predicted class of each step below.

    Args:
        inputs: of each series (L, C).
        true, predicted: class numbers (L,), negative where there is none (white).
        captions: a text per series.
    """
    colours = _class_colours(len(class_names))
    with _page(path, 9, 0.6 + 2.1 * len(inputs)) as figure:
        for i, part in enumerate(figure.subfigures(len(inputs), 1, squeeze=False)[:, 0]):
            signal, *strips = part.subplots(3, 1, sharex=True, height_ratios=(5, 1, 1))
            values = inputs[i]
            if values.shape[1] <= 12:
                signal.plot(values, linewidth=0.8)
            else:
                limit = np.abs(values).max()
                signal.imshow(values.T, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=-limit, vmax=limit)
                signal.grid(False)
            signal.set_title(captions[i])
            signal.set_ylabel("input" if values.shape[1] <= 12 else "channel")
            for axes, name, side in zip(strips, ("true", "predicted"), (true[i], predicted[i]), strict=True):
                picture = np.where(side[:, None] >= 0, colours[np.maximum(side, 0)], 1.0)
                axes.imshow(picture[None], aspect="auto", interpolation="nearest")
                axes.set_yticks([0], [name])
                axes.grid(False)
            strips[-1].set_xlabel("step")
        _tags_legend(figure, _used(true, predicted), class_names, colours)


def plot_text_tags(
    texts: Sequence[str], true: Sequence[np.ndarray], predicted: Sequence[np.ndarray], class_names: Sequence[str],
    captions: Sequence[str], path: PathLike,
) -> None:  # fmt: skip
    """A few texts; under each line a strip of the true and one of the predicted class of its characters.

    Args:
        true, predicted: class numbers of the characters, negative where there is none (white). The first class is that
            of what is in no span.
        captions: a text per text.
    """
    most = 8  # lines of a text
    colours = _class_colours(len(class_names), outside=True)
    width = min(80, max(map(len, texts)))
    lines = [min(most, max(1, -(-len(text) // width))) for text in texts]
    with _page(path, max(6, 1.4 + 0.13 * width), 0.8 + sum(0.45 + 0.42 * number for number in lines)) as figure:
        panels = figure.subplots(len(texts), 1, squeeze=False, height_ratios=[1 + number for number in lines])[:, 0]
        for axes, text, number, caption, *sides in zip(panels, texts, lines, captions, true, predicted, strict=True):
            picture = np.ones((3 * number, width, 3))  # of each line: characters, true, predicted
            for place, character in enumerate(text[: width * number]):
                row, column = divmod(place, width)
                character = character if character.isprintable() else "·"
                axes.text(column, 3 * row, character, ha="center", va="center", fontsize=7)
                for below, side in enumerate(sides, 1):
                    if side[place] >= 0:
                        picture[3 * row + below, column] = colours[side[place]]
            axes.imshow(picture, aspect="auto", interpolation="nearest")
            ticks = [3 * row + below for row in range(number) for below in (1, 2)]
            axes.set_yticks(ticks, ["true", "predicted"] * number, fontsize=5.5)
            axes.set_xticks([])
            axes.tick_params(length=0)
            axes.grid(False)
            axes.spines[:].set_visible(False)
            axes.set_title(caption + (" (its beginning)" if len(text) > width * number else ""), fontsize=8)
        _tags_legend(figure, _used(true, predicted), class_names, colours)


def plot_latent_projection(
    latents: np.ndarray, values: np.ndarray, class_names: Sequence[str] | None, path: PathLike, meaning: str = "truth"
) -> None:
    """Pooled latents (N, D) on their first four principal components, two to a panel.

    values: class numbers (N,) that colour them, or other numbers where class_names is None; `meaning` says of what.
    """
    import seaborn
    from matplotlib.colors import ListedColormap
    from matplotlib.patheffects import withStroke
    from sklearn.decomposition import PCA

    latents = np.asarray(latents, dtype=np.float64)
    pca = PCA(min(4, *latents.shape), svd_solver="full")
    with np.errstate(invalid="ignore", divide="ignore"):  # equal latents have no variance to share out
        points = pca.fit_transform(latents)
        share = np.nan_to_num(pca.explained_variance_ratio_)
    missing = max(0, 2 - len(share))
    points, share = np.pad(points, ((0, 0), (0, missing))), np.pad(share, (0, missing))
    pairs = [(0, 1), (2, 3)][: len(share) // 2]
    classes = len(class_names or ())
    look = {"cmap": "viridis"}
    if class_names:
        palette = seaborn.color_palette("colorblind" if classes <= 10 else "husl", classes)
        look = {"cmap": ListedColormap(palette), "vmin": -0.5, "vmax": classes - 0.5}
    with _page(path, 4.4 * len(pairs) + 1.6, 4.6) as figure:
        figure.suptitle(f"Pooled latents of {len(points):,} samples, projected by PCA")
        panels = figure.subplots(1, len(pairs), squeeze=False)[0]
        for axes, (a, b) in zip(panels, pairs, strict=True):
            size = np.clip(6000 / len(points), 3, 30)
            dots = axes.scatter(points[:, a], points[:, b], c=values, s=size, alpha=0.7, linewidths=0, **look)
            axes.set_xlabel(f"component {a + 1} ({share[a]:.1%} of the variance)")
            axes.set_ylabel(f"component {b + 1} ({share[b]:.1%})")
            for number in np.unique(values) if 0 < classes <= 10 else ():
                x, y = np.median(points[values == number][:, [a, b]], axis=0)
                outline = [withStroke(linewidth=2.5, foreground="white")]
                name = short(str(class_names[number]), 12)
                axes.text(x, y, name, ha="center", va="center", path_effects=outline)
        label = "true class" if classes else short(meaning, 40)
        bar = figure.colorbar(dots, ax=panels, fraction=0.05, pad=0.01, label=label)
        bar.solids.set_alpha(1)
        if class_names:
            ticks, names = _tick_names(class_names, most=25)
            bar.set_ticks(ticks, labels=names)
            bar.ax.invert_yaxis()
        bar.ax.minorticks_off()


# --- Figures of hidden tokens ----------------------------------------------------------------------------------------


def plot_error_against_baseline(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], path: PathLike) -> None:
    """Of each modality, by name, the errors of the samples (N,) against those of the baseline, which come first."""
    with _page_of_numbers(path, list(pairs)) as figure:
        for axes, (x, y) in zip(_panels(figure, list(pairs)), pairs.values(), strict=True):
            _dots(axes, x, y)
            top = 1.03 * (max(x.max(), y.max()) or 1)
            axes.plot([0, top], [0, top], "--", color=VERMILION, linewidth=1, label="no better than the baseline")
            below = (y < x).mean()
            axes.plot([], [], " ", label=f"{below:.0%} of the samples are below the line")
            axes.set(xlabel="mean error of the baseline", ylabel="mean error of a hidden token", xlim=(0, top))
            axes.set_ylim(0, top)
            axes.legend(loc="upper left")


def plot_sequence_contents(
    values: Sequence[np.ndarray], hidden: Sequence[np.ndarray], answers: Sequence[np.ndarray],
    captions: Sequence[str], path: PathLike,
) -> None:  # fmt: skip
    """A few series, in columns: the original, what was seen, and that with the answers in the hidden steps.

    Args:
        values, answers: of each series (L, C), NaN where a value is missing.
        hidden: of each, bool (L,).
    """
    few = values[0].shape[1] <= 6
    with _page(path, 3.3 * len(values), 5.2) as figure:
        grid = figure.subplots(3, len(values), squeeze=False, sharex="col")
        for i, (truth, gone, answer) in enumerate(zip(values, hidden, answers, strict=True)):
            seen = np.where(gone[:, None], np.nan, truth)
            filled = np.where(gone[:, None], answer, truth)
            limit = np.nanmax(np.abs(truth)) or 1
            for axes, name, picture in zip(grid[:, i], ("original", "seen", "answered"), (truth, seen, filled),
                                           strict=True):  # fmt: skip
                if few:
                    for channel in range(truth.shape[1]):
                        colour = f"C{channel}"
                        if name == "answered":
                            axes.plot(truth[:, channel], color=colour, linewidth=0.7, alpha=0.4)
                            axes.plot(np.flatnonzero(gone), answer[gone, channel], ".", color=colour, markersize=4)
                        else:
                            axes.plot(picture[:, channel], color=colour, linewidth=0.9, marker="." if name == "seen"
                                      else None, markersize=2)  # fmt: skip
                    low, high = np.nanmin(truth), np.nanmax(truth)
                    axes.set_ylim(low - 0.08 * (high - low or 1), high + 0.08 * (high - low or 1))
                else:
                    axes.imshow(picture.T, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=-limit,
                                vmax=limit)  # fmt: skip
                    axes.set_facecolor("black")  # hidden
                    axes.yaxis.get_major_locator().set_params(integer=True)
                    axes.grid(False)
                if i == 0:
                    axes.set_ylabel(name + ("" if few else "\nchannel"))
            grid[0, i].set_title(captions[i], fontsize=8)
            grid[-1, i].set_xlabel("step")


def plot_text_contents(
    texts: Sequence[np.ndarray], hidden: Sequence[np.ndarray], answers: Sequence[np.ndarray],
    captions: Sequence[str], path: PathLike,
) -> None:  # fmt: skip
    """A few texts, line by line: the original, what was seen, and what was answered: right in blue, wrong in red.

    Args:
        texts, answers: of each text its bytes (L,), uint8.
        hidden: of each, bool (L,).
    """
    width, most = 64, 4  # bytes in a line; lines of a text
    lines = [min(most, -(-len(text) // width)) for text in texts]
    with _page(path, 9, 0.4 + sum(0.45 + 0.62 * number for number in lines)) as figure:
        panels = figure.subplots(len(texts), 1, squeeze=False, height_ratios=[1 + number for number in lines])[:, 0]
        for axes, text, gone, answer, number, caption in zip(
            panels, texts, hidden, answers, lines, captions, strict=True
        ):
            for place in range(min(len(text), width * number)):
                row, column = divmod(place, width)
                right = answer[place] == text[place]
                shown = (
                    (text[place], "black"), (None, GREY) if gone[place] else (text[place], "black"),
                    (answer[place], BLUE if right else VERMILION) if gone[place] else (text[place], "#BBBBBB"),
                )  # fmt: skip
                for below, (byte, colour) in enumerate(shown):
                    character = "▯" if byte is None else chr(byte) if 32 <= byte < 127 else "·"
                    axes.text(column, 3.6 * row + below, character, color=colour, ha="center", va="center", fontsize=7,
                              family="monospace")  # fmt: skip
            axes.set(xlim=(-1, width), ylim=(3.6 * number - 0.6, -0.8))
            ticks = [3.6 * row + below for row in range(number) for below in range(3)]
            axes.set_yticks(ticks, ["original", "seen", "answered"] * number, fontsize=6)
            axes.set_xticks([])
            axes.tick_params(length=0)
            axes.grid(False)
            axes.spines[:].set_visible(False)
            axes.set_title(caption + (" (its beginning)" if len(text) > width * number else ""), fontsize=8)


def plot_image_contents(
    images: np.ndarray, hidden: np.ndarray, answered: np.ndarray, captions: Sequence[str], path: PathLike
) -> None:
    """A few images, in columns: the original, what was seen, and that with the answers in the hidden patches.

    Args:
        images, answered: (B, H, W, 1 or 3), before normalisation.
        hidden: bool (B, H, W).
    """
    top = next(top for top in (1, 16, 255, np.inf) if images.max(initial=0) <= top)
    originals, filled = (np.clip(part / top, 0, 1) for part in (images, answered))
    grey = np.repeat(originals, 3 // originals.shape[-1], -1)
    seen = np.where(hidden[..., None], np.array([0.84, 0.37, 0.0]), grey)  # VERMILION, which no grey image has
    with _page(path, 1.9 * len(images), 6) as figure:
        grid = figure.subplots(3, len(images), squeeze=False)
        for i in range(len(images)):
            for axes, picture in zip(grid[:, i], (originals[i], seen[i], filled[i]), strict=True):
                _show_image(axes, picture)
            grid[0, i].set_title(captions[i].replace(": ", "\n"), fontsize=7.5, weight="normal")
        for axes, name in zip(grid[:, 0], ("original", "seen", "answered"), strict=True):
            axes.set_axis_on()
            axes.set(ylabel=name, xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(False)


# --- Training --------------------------------------------------------------------------------------------------------


def plot_training_curves(
    history: Sequence[Mapping[str, Any]], path: PathLike, best_epoch: int, headline: str = "accuracy"
) -> None:
    """Loss, another metric and learning rate over the epochs.

    Args:
        history: a dict per epoch: epoch, train_loss, val_loss, val_<headline> and, if there is one,
            train_<headline>, learning_rate.
        best_epoch: the epoch to mark.
    """
    from matplotlib.ticker import MaxNLocator

    epochs = [line["epoch"] for line in history]
    best, marker = epochs.index(best_epoch), "o" if len(epochs) <= 20 else None
    labels = {"train": ("training, with dropout", GREY), "val": ("validation", BLUE)}
    with _page(path, 11, 3.4) as figure:
        loss, headlines, rate = figure.subplots(1, 3)
        for axes, name in ((loss, "loss"), (headlines, headline)):
            for part, (label, colour) in labels.items():
                if f"{part}_{name}" in history[0]:
                    values = np.array([line[f"{part}_{name}"] for line in history], float)  # None becomes NaN
                    axes.plot(epochs, values, color=colour, marker=marker, markersize=3, label=label)
            value = history[best][f"val_{name}"]
            star = {"color": VERMILION, "markersize": 11, "label": f"kept: epoch {epochs[best]}, {figure_text(value)}"}
            axes.plot(epochs[best], np.nan if value is None else value, "*", **star)
            words = name.replace("_", " ")
            axes.set_title("RMSE" if words == "rmse" else words[:1].upper() + words[1:].replace("f1", "F1"))
            axes.legend()
        rates = [line["learning_rate"] for line in history]
        rate.plot(epochs, rates, color=BLUE, marker=marker, markersize=3)
        rate.set_title("Learning rate")
        rate.yaxis.set_major_formatter("{x:.3g}")
        for axes in (loss, rate):
            axes.set_ylim(0, 1.03 * axes.get_ylim()[1])
        for axes in (loss, headlines, rate):
            axes.axvline(epochs[best], color=VERMILION, linewidth=0.8, linestyle=":")
            axes.set(xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
