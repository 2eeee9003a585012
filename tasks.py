"""What a model answers: one class of several, numbers, several labels at once, a class for each token, or what
hidden tokens hold. Each task is a class; nothing outside this module knows which one it is.

A task is made from the labels of the training data and decides everything that depends on what an answer is:

    targets    what a label means, and what is wrong with one; how targets are stacked and split (`Targets`, batches.py)
    outputs    how many numbers the model's head gives, once or for each token
    training   what is minimised, and what is summed over a step
    rows       the few numbers that an evaluation keeps of each sample, so that shares of processes just add up
    metrics    computed from these rows; which one decides the best epoch, and the baseline that it must beat
    answers    what `predict` returns, and the columns of predictions.csv and items.csv
    figures    what inference.py draws

A task is plain data: `describe` gives what a checkpoint stores, `from_description` rebuilds the task. To add one, write
a subclass of `LabelledTask` (of `Task` if it asks for no labels) and enter it in TASKS.

Letters: B batch, N samples, L tokens, U steps or characters, C classes, K numbers in an answer.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import evaluation
import plots
from batches import UNLABELLED, Batch, ClassTargets, by_modality
from config import Settings
from labels import (
    OUTSIDE,
    ClassNumbers,
    class_names_of,
    class_order,
    is_unlabelled,
    is_zero,
    label_parts,
    number_of,
    read_labels,
    slips,
)
from messages import UserError, figure_text, printable
from schema import Positive, read, shown
from tables import label_columns, listed

Rows = dict[str, np.ndarray]
Figures = dict[str, Callable[[Path], None]]  # file name -> function that draws it
LAST_EPOCH = "last"  # what --select_by says to take the last epoch, whatever its score
TOP = 3  # classes of an item in predictions.csv


@dataclass(frozen=True)
class Task(ABC):
    """The base of all tasks: what each must say for itself is abstract, the rest is what most have in common."""

    kind: ClassVar[str]
    per_token: ClassVar[bool] = False  # whether there is an answer for each token
    head: ClassVar[dict[str, Any]] = {}  # what the model is told of its head, beside num_outputs
    headline: ClassVar[str]  # the metric beside the loss on the screen, in curves and in the closing lines
    loss_name: ClassVar[str]  # what the loss of a sample is, on the screen
    step_names: ClassVar[tuple[str, ...]]  # what `step_sums` gives; the first is "loss"
    higher_is_better: ClassVar[dict[str, bool]]  # what --select_by may name; the first one is the default

    # --- Training ---

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """How many numbers the model's head gives."""

    @abstractmethod
    def about(self) -> str:
        """A few words for the start of a run: '10 classes'."""

    def weights_text(self) -> str:
        """The weights of classes in what is minimised, for the first lines of a run; '' without."""
        return ""

    @abstractmethod
    def objective(
        self, outputs: Tensor, targets: Tensor, settings: Settings, weights: Tensor | None = None
    ) -> Tensor:
        """What is minimised, summed over the samples: outputs (B, num_outputs), targets from `stack` -> ().

        weights: (B,), of each sample in this sum; None = 1.
        """

    @abstractmethod
    def step_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sums over the samples named in `step_names`, (len(step_names),), on the device of the outputs."""

    @abstractmethod
    def train_figures(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Training metrics of an epoch, named train_..., from the sums over its steps and their number of samples."""

    # --- Evaluation ---

    @abstractmethod
    def rows(self, outputs: Tensor, targets: Tensor) -> Rows:
        """What an evaluation keeps of each sample, as columns: from outputs float32 (B, num_outputs) and targets, both
        on the CPU.

        'finite' (B,) bool says whether the outputs are finite numbers; the other columns are up to the task.
        """

    @abstractmethod
    def metrics(self, rows: Rows) -> dict[str, Any]:
        """Metrics as plain data, computed in float64.

        Raises:
            ValueError: some outputs are not finite.
        """

    @abstractmethod
    def epoch_figures(self, metrics: Mapping[str, Any], select_by: str | None) -> dict[str, float]:
        """The validation metrics that the log keeps of an epoch, named val_..."""

    def score(self, line: Mapping[str, float], select_by: str | None) -> tuple[float, ...]:
        """The score of a line of the log; the highest is the best epoch. The lower loss decides a tie."""
        if select_by == LAST_EPOCH:
            return (line["epoch"],)
        name = select_by or next(iter(self.higher_is_better))
        value = line[f"val_{name}"]
        if value is None:  # undefined: there was nothing to find, and nothing was found
            value = math.inf if self.higher_is_better[name] else -math.inf
        return value if self.higher_is_better[name] else -value, -line["val_loss"]

    def tuned(self, rows: Rows) -> "Task":
        """The task with what it chooses on validation data, from the rows of the validation split."""
        return self

    # --- Several models that answer together (ensemble.py) ---

    def of_members(self, members: Sequence["Task"]) -> "Task":
        """This task, learnt from all training data, with what models of parts of them have chosen on their folds."""
        return self

    def mean_output(self, outputs: Sequence[Tensor], members: Sequence["Task"]) -> Tensor:
        """The output (B, ...) that stands for the mean of the answers of several models, whose outputs and tasks these
        are."""
        raise UserError(f"several models cannot answer {self.kind} together")

    @abstractmethod
    def items(self, rows: Rows) -> dict[str, Sequence[Any]]:
        """The columns of items.csv, from which every metric can be recomputed."""

    @abstractmethod
    def analysis(self, rows: Rows, items: Sequence[Mapping[str, Any]]) -> dict[str, list[dict]]:
        """What --analyze adds to the results; `items` are the rows of items.csv."""

    @abstractmethod
    def worst(self, rows: Rows, limit: int = 16) -> np.ndarray:
        """The numbers of the samples whose answers are most wrong, the worst first."""

    @abstractmethod
    def figures(self, rows: Rows) -> Figures:
        """What inference.py draws of a split."""

    def analysis_figures(self, analysis: Mapping[str, list[dict]]) -> Figures:
        return {}

    def examples(self, rows: Rows, limit: int = 4) -> np.ndarray:
        """Places of samples that `draw_examples` shows; none where the task draws no examples."""
        return np.zeros(0, int)

    def draw_examples(  # noqa: B027 (few tasks draw examples)
        self, batch: Batch, outputs: Any, captions: Sequence[str], name: str, adapter: Any, path: Path
    ) -> None:
        """Draw one modality of a batch of a few samples, and what was answered; `adapter` made its tokens."""

    @abstractmethod
    def caption(self, rows: Rows, number: int) -> str:
        """A few words on the answer for a sample, below its picture."""

    @abstractmethod
    def mistake(self, rows: Rows, number: int) -> list[str]:
        """Lines about a wrong answer."""

    @abstractmethod
    def colours(self, rows: Rows) -> tuple[np.ndarray, list[str] | None]:
        """What samples are coloured by in a scatter plot: (class numbers (N,), their names) or (numbers (N,), None)."""

    def colour_meaning(self) -> str:
        """Of what these numbers are."""
        return "truth"


@dataclass(frozen=True)
class LabelledTask(Task):
    """A task that is learnt from labels."""

    # --- Targets (see batches.Targets) ---

    @classmethod
    @abstractmethod
    def fit(cls, cells: Sequence[Any], places: Sequence[str], settings: Settings) -> tuple["Task", list[str]]:
        """(the task for these labels of the training data, cells as they stand in the file; notes for the user).

        Impossible labels are skipped: `read` says what is wrong with them.
        """

    def check_names(self, path: str | None) -> None:  # noqa: B027 (most tasks ask for nothing)
        """Check that the labels of the training data at `path` are enough for this task.

        Raises:
            UserError: they are not.
        """

    @abstractmethod
    def read(self, cells: Sequence[Any], places: Sequence[str]) -> tuple[np.ndarray | None, list[UserError]]:
        """(the targets (N, ...) of these cells, None if some are wrong; an error for each wrong one)."""

    def texts(self, targets: np.ndarray) -> list[str]:
        """A text for each target, from which the fingerprint of the data is made."""
        return [str(target.tolist()) for target in targets]

    @abstractmethod
    def strata(self, targets: np.ndarray) -> np.ndarray:
        """(N,) int: the stratum of each sample. A split takes the same share of every stratum."""

    def absent(self, targets: np.ndarray) -> str | None:
        """A note on what is missing among the targets of a split; None if nothing is."""
        return None

    def learn(self, targets: np.ndarray, settings: Settings) -> "Task":
        """The task with what it takes from the targets of the training split. Raises UserError."""
        return self

    def unlike_training(self, targets: np.ndarray, places: Sequence[str]) -> list[UserError]:
        """What is wrong with targets of a split, beside those that it has learnt from."""
        return []

    # --- Evaluation ---

    @abstractmethod
    def sides(self, rows: Rows, number: int) -> tuple[str, str]:
        """(the true answer, the predicted one) of a sample, as text."""

    def caption(self, rows: Rows, number: int) -> str:
        true, predicted = self.sides(rows, number)
        return f"true {true}, predicted {predicted}"

    def mistake(self, rows: Rows, number: int) -> list[str]:
        true, predicted = self.sides(rows, number)
        return [f"true {true}", f"predicted {predicted}"]

    # --- Answers ---

    @abstractmethod
    def answer(self, output: Tensor) -> dict[str, Any]:
        """What `predict` returns for an item, from its output float64 (num_outputs,)."""

    @abstractmethod
    def records(self, answer: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rows of predictions.csv of an item, at least one: their columns after the item's id."""


def _absent(numbers: np.ndarray, names: Sequence[str], what: str) -> str | None:
    """The note of `Task.absent` on these numbers of names, with {} in the place of the split."""
    if not len(numbers):
        return None
    return f"{len(numbers)} of {len(names)} {what} {{}} sample, the first is {names[numbers[0]]}"


def _total(loss: Callable[..., Tensor], weights: Tensor | None) -> Tensor:
    """The sum over samples of a loss of torch's, `loss(reduction=...)`, each times its weight where (B,) are given."""
    if weights is None:
        return loss(reduction="sum")
    return (loss(reduction="none").reshape(len(weights), -1).sum(1) * weights).sum()


def _weights_of(names: Sequence[str], weights: Sequence[str], most: int = 12) -> str:
    """'cat 0.5, dog 2'; of many classes the first ones."""
    pairs = [f"{printable(name)} {weight}" for name, weight in zip(names, weights, strict=False)]
    more = f", and {len(pairs) - most} more" if len(pairs) > most else ""
    return ", ".join(pairs[:most]) + more


def log_mean_probability(outputs: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean of the probabilities of classes that several logits (..., C) give."""
    return torch.stack(list(outputs)).log_softmax(-1).logsumexp(0) - math.log(len(outputs))


def _refuse_infinite(rows: Rows) -> None:
    if broken := int((~rows["finite"]).sum()):
        raise ValueError(f"the outputs of {broken} of {len(rows['finite'])} samples are not finite")


# --- One class of several --------------------------------------------------------------------------------------------


def _are_distinct(names: list[str]) -> bool:
    return len(set(names)) == len(names) > 0


Names = Annotated[list[str], _are_distinct, "a list of different names"]


@dataclass(frozen=True)
class Classification(LabelledTask, ClassTargets):
    """One class an item.

    Args:
        class_names: in the order of the class numbers.
        class_weights: of each class in the loss; None = all alike.
    """

    kind = "classification"
    headline = "accuracy"
    loss_name = "cross-entropy"
    step_names = ("loss", "correct")
    higher_is_better = {"accuracy": True, "balanced_accuracy": True, "macro_f1": True, "loss": False}

    class_names: Names
    class_weights: list[Positive] | None = None

    def __post_init__(self) -> None:
        if self.class_weights is not None and len(self.class_weights) != len(self.class_names):
            raise UserError(f"{len(self.class_weights)} class weights of {len(self.class_names)} classes")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    num_outputs = num_classes

    def about(self) -> str:
        return f"{self.num_classes} classes"

    @classmethod
    def fit(cls, cells: Sequence[Any], places: Sequence[str], settings: Settings) -> tuple["Classification", list[str]]:
        names, _ = read_labels(cells, places)
        good = [(cell, name) for cell, name in zip(cells, names, strict=True) if name is not None]
        if not good:
            return cls([]), []
        cells, names = zip(*good, strict=True)
        remedies = ["--class_weights balanced"] * (settings.class_weights == "none")
        remedies += ["--select_by balanced_accuracy"] * (settings.select_by is None)
        return cls(class_order(names)), slips(cells, names, remedies=remedies)

    def check_names(self, path: str | None) -> None:
        if len(self.class_names) < 2:
            only = self.class_names[0]
            raise UserError(f"{path}: every item has the label {only!r}; at least two classes are needed")

    def texts(self, targets: np.ndarray) -> list[str]:
        return [self.class_names[number] for number in targets]

    def read(self, cells: Sequence[Any], places: Sequence[str]) -> tuple[np.ndarray | None, list[UserError]]:
        names, errors = read_labels(cells, places, self.class_names)
        numbers = ClassNumbers(self.class_names)
        targets = [None if name is None else numbers.get(name) for name in names]
        errors += [
            UserError(
                f"{place}: label {name!r} does not occur in the training data{numbers.nearest(name)}; correct or "
                "remove it"
            )
            for name, number, place in zip(names, targets, places, strict=True)
            if name is not None and number is None
        ]
        return (None if errors else np.array(targets, np.int64)), errors

    def strata(self, targets: np.ndarray) -> np.ndarray:
        return targets

    def absent(self, targets: np.ndarray) -> str | None:
        return _absent(np.setdiff1d(np.arange(self.num_classes), targets), self.class_names, "classes have no")

    def learn(self, targets: np.ndarray, settings: Settings) -> "Classification":
        return replace(self, class_weights=_class_weights(targets, self.num_classes, settings))

    # --- Training ---

    def weights_text(self) -> str:
        return _weights_of(self.class_names, [f"{weight:.4g}" for weight in self.class_weights or ()])

    def objective(
        self, outputs: Tensor, targets: Tensor, settings: Settings, weights: Tensor | None = None
    ) -> Tensor:
        of_classes = None
        if self.class_weights is not None:
            dtype = torch.promote_types(outputs.dtype, torch.float32)  # that of the loss, also under autocast
            outputs = outputs.to(dtype)
            of_classes = torch.tensor(self.class_weights, dtype=dtype, device=outputs.device)
        smoothing = settings.label_smoothing
        return _total(partial(F.cross_entropy, outputs, targets, of_classes, label_smoothing=smoothing), weights)

    def step_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs.float(), targets, reduction="sum")
        return torch.stack([loss, (outputs.argmax(1) == targets).sum()])

    def train_figures(self, totals: Mapping[str, float]) -> dict[str, float]:
        return {"train_accuracy": totals["correct"] / totals["samples"]}

    # --- Evaluation ---

    def mean_output(self, outputs: Sequence[Tensor], members: Sequence[Task]) -> Tensor:
        return log_mean_probability(outputs)

    def rows(self, outputs: Tensor, targets: Tensor) -> Rows:
        return evaluation.class_rows(outputs.numpy(), targets.numpy())

    def metrics(self, rows: Rows) -> dict[str, Any]:
        _refuse_infinite(rows)
        return evaluation.class_metrics(rows, self.class_names)

    def epoch_figures(self, metrics: Mapping[str, Any], select_by: str | None) -> dict[str, float]:
        names = {"loss": "negative_log_likelihood", "accuracy": "accuracy", "balanced_accuracy": "balanced_accuracy"}
        if select_by == "macro_f1":
            names["macro_f1"] = "macro_f1"
        return {f"val_{name}": metrics[key] for name, key in names.items()}

    def items(self, rows: Rows) -> dict[str, Sequence[Any]]:
        return {
            "true": [self.class_names[number] for number in rows["label"]],
            "predicted": [self.class_names[number] for number in rows["predicted"]],
            "confidence": rows["confidence"],
            "probability_of_true": rows["probability_of_true"],
            "rank_of_true": 1 + rows["ahead"],
            "negative_log_likelihood": rows["negative_log_likelihood"],
            "brier_score": rows["brier_score"],
        }

    def analysis(self, rows: Rows, items: Sequence[Mapping[str, Any]]) -> dict[str, list[dict]]:
        correct = rows["predicted"] == rows["label"]
        keys = ("id", "true", "predicted", "confidence", "probability_of_true")
        return {
            "reliability": evaluation.reliability_table(rows["confidence"], correct),
            "accuracy_by_length": evaluation.by_length(rows["tokens"], accuracy=correct),
            "most_confident_mistakes": [{key: items[number][key] for key in keys} for number in self.worst(rows)],
        }

    def worst(self, rows: Rows, limit: int = 16) -> np.ndarray:
        wrong = np.flatnonzero(rows["predicted"] != rows["label"])
        return wrong[np.argsort(-rows["confidence"][wrong], kind="stable")][:limit]

    def figures(self, rows: Rows) -> Figures:
        confidence, correct = rows["confidence"], rows["predicted"] == rows["label"]
        matrix = evaluation.confusion_matrix(rows, self.num_classes)
        table = evaluation.reliability_table(confidence, correct)
        return {
            "confusion_matrix.png": partial(plots.plot_confusion_matrix, matrix, self.class_names),
            "confidence_histogram.png": partial(plots.plot_confidence_histogram, confidence, correct),
            "confidence_analysis.png": partial(
                plots.plot_confidence_analysis, table, evaluation.calibration_error(table), confidence, correct
            ),
        }

    def analysis_figures(self, analysis: Mapping[str, list[dict]]) -> Figures:
        by_length = analysis["accuracy_by_length"]
        return {"accuracy_by_length.png": partial(plots.plot_accuracy_by_length, by_length)} if by_length else {}

    def sides(self, rows: Rows, number: int) -> tuple[str, str]:
        return tuple(plots.short(self.class_names[rows[name][number]]) for name in ("label", "predicted"))

    def mistake(self, rows: Rows, number: int) -> list[str]:
        return [*super().mistake(rows, number), f"confidence {rows['confidence'][number]:.1%}"]

    def colours(self, rows: Rows) -> tuple[np.ndarray, list[str] | None]:
        return rows["label"], self.class_names

    # --- Answers ---

    def answer(self, output: Tensor) -> dict[str, Any]:
        probabilities = output.softmax(0)
        label, shares = int(probabilities.argmax()), probabilities.tolist()
        return {
            "label": label,
            "class": self.class_names[label],
            "confidence": shares[label],
            "probabilities": dict(zip(self.class_names, shares, strict=True)),
        }

    def records(self, answer: Mapping[str, Any]) -> list[dict[str, Any]]:
        best = sorted(answer["probabilities"].items(), key=lambda pair: -pair[1])[:TOP]
        row = {}
        for rank, (name, share) in enumerate(best, 1):
            suffix = f"_{rank}" if rank > 1 else ""
            row |= {f"class{suffix}": name, f"confidence{suffix}": f"{share:.6f}"}
        return [row]


def _class_weights(labels: np.ndarray, num_classes: int, settings: Settings) -> list[float] | None:
    """Of each class in the loss, by settings.class_weights; None = all alike."""
    if settings.class_weights == "none":
        return None
    from sklearn.utils.class_weight import compute_class_weight

    there = np.unique(labels)
    weights = np.ones(num_classes)
    weights[there] = compute_class_weight("balanced", classes=there, y=labels)
    return weights.tolist()


# --- Numbers ---------------------------------------------------------------------------------------------------------

BINS = 10  # strata of the first number; a split takes the same share of each
FARTHEST = 1e15  # standard deviations from the mean; float32 still holds the square


@dataclass(frozen=True)
class Regression(LabelledTask):
    """Numbers, standardised inside with the training split's statistics, shown in the user's units.

    Args:
        target_names: of the K numbers.
        mean, std: of each over the training split; a constant one keeps its scale.
    """

    kind = "regression"
    headline = "rmse"
    loss_name = "squared error in units of the training deviation"
    step_names = ("loss",)
    higher_is_better = {"rmse": False, "mae": False, "loss": False}

    target_names: Names
    mean: list[float] = field(default_factory=list)
    std: list[Positive] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) <= len(self.target_names):
            known = f"{len(self.mean)} means and {len(self.std)} deviations"
            raise UserError(f"{known} of {len(self.target_names)} numbers")

    @property
    def num_outputs(self) -> int:
        return len(self.target_names)

    def about(self) -> str:
        names = ", ".join(map(plots.short, self.target_names))
        if self.num_outputs > 1:
            return f"{self.num_outputs} numbers ({names}); rmse and mae of all in units of their standard deviations"
        mean, deviation = (figure_text(values[0]) for values in (self.mean, self.std))
        return f"1 number ({names}, in training {mean} with a standard deviation of {deviation})"

    # --- Targets ---

    @classmethod
    def fit(cls, cells: Sequence[Any], places: Sequence[str], settings: Settings) -> tuple["Regression", list[str]]:
        names = label_columns(settings)
        first = next((cell for cell in cells if cell is not None), None)
        if isinstance(first, dict):
            names = list(first)
        elif isinstance(first, (list, tuple)) and len(first) != 1:
            names = [f"{names[0]} {number}" for number in range(1, len(first) + 1)]
        return cls(names), []

    def check_names(self, path: str | None) -> None:
        if not self.target_names:
            raise UserError(f"{path}: the first label holds no number; write one, or a list of several")

    def read(self, cells: Sequence[Any], places: Sequence[str]) -> tuple[np.ndarray | None, list[UserError]]:
        values, errors = np.zeros((len(cells), self.num_outputs)), []
        named = any(isinstance(cell, dict) for cell in cells)
        for number, (cell, place) in enumerate(zip(cells, places, strict=True)):
            try:
                if named and isinstance(cell, (list, tuple)):
                    raise UserError(f"{place}: the label is a list, other labels are objects; write all as objects")
                values[number] = self.target(cell, place)
            except UserError as error:
                errors.append(error)
        return (None if errors else values), errors

    def target(self, label: Any, where: str) -> np.ndarray:
        """float64 (K,), in the user's units."""
        if isinstance(label, dict):
            if label.keys() != set(self.target_names):
                raise UserError(f"{where}: the label holds {listed(label)}; it must hold {listed(self.target_names)}")
            return np.array([number_of(label[name], f"{where}, {name!r}") for name in self.target_names])
        parts = list(label) if isinstance(label, (tuple, list)) or getattr(label, "ndim", 0) == 1 else [label]
        if len(parts) != self.num_outputs:
            count = f"{len(parts)} number{'s' * (len(parts) != 1)}"
            raise UserError(f"{where}: the label is {count}; there must be {self.num_outputs}, of "
                            f"{listed(self.target_names)}")
        return np.array([number_of(part, where) for part in parts])

    def stack(self, targets: Sequence[np.ndarray]) -> Tensor:
        """float32 (B, K), standardised."""
        return torch.from_numpy(self._standardised(targets)).float()

    def _standardised(self, targets: Sequence[np.ndarray]) -> np.ndarray:
        values = np.asarray(targets, np.float64).reshape(len(targets), self.num_outputs)
        return (values - self.mean) / self.std

    def check(self, targets: Sequence[np.ndarray], for_training: bool) -> None:
        values = np.asarray(targets, np.float64).reshape(len(targets), self.num_outputs)
        for name, column in zip(self.target_names, values.T, strict=True):
            if for_training and (column == column[0]).all():
                raise UserError(f"{name} is {column[0]:g} in all {len(column)} training samples, so there is nothing "
                                "to learn; leave it out, or add samples")

    def strata(self, targets: np.ndarray) -> np.ndarray:
        """The samples ranked by their first number, in tenths."""
        ranks = targets[:, 0].argsort(kind="stable").argsort(kind="stable")
        return ranks * max(1, min(BINS, len(targets) // BINS)) // len(targets)

    def learn(self, targets: np.ndarray, settings: Settings) -> "Regression":
        mean, std = targets.mean(0), targets.std(0)
        varies = targets.min(0) < targets.max(0)
        if (lost := varies & ~(std > 0)).any():
            name = self.target_names[int(lost.argmax())]
            raise UserError(f"{name} differs by less than a computer can square; write it in a smaller unit")
        return replace(self, mean=mean.tolist(), std=np.where(varies, std, 1.0).tolist())

    def unlike_training(self, targets: np.ndarray, places: Sequence[str]) -> list[UserError]:
        far = np.abs(self._standardised(targets)) > FARTHEST
        return [
            UserError(f"{places[row]}: {self.target_names[k]} is {targets[row, k]:g}, in training {self.mean[k]:.4g} "
                      f"with a standard deviation of {self.std[k]:.4g}; correct it, or remove the row")
            for row, k in np.argwhere(far)
        ]  # fmt: skip

    # --- Training ---

    def objective(
        self, outputs: Tensor, targets: Tensor, settings: Settings, weights: Tensor | None = None
    ) -> Tensor:
        return _total(partial(F.mse_loss, outputs.float(), targets), weights) / self.num_outputs

    def step_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (F.mse_loss(outputs.float(), targets, reduction="sum") / self.num_outputs)[None]

    def train_figures(self, totals: Mapping[str, float]) -> dict[str, float]:
        return {"train_rmse": math.sqrt(totals["loss"] / totals["samples"]) * self._unit}

    @property
    def _unit(self) -> float:
        """The unit of the headline: the user's own for one number, the training standard deviations for several."""
        return self.std[0] if self.num_outputs == 1 else 1.0

    # --- Evaluation ---

    def mean_output(self, outputs: Sequence[Tensor], members: Sequence["Regression"]) -> Tensor:
        """The mean of the numbers, each of which a member has in units of its own training data."""
        own, total = (np.array(self.mean), np.array(self.std)), 0
        for output, member in zip(outputs, members, strict=True):
            scale, shift = member.std / own[1], (member.mean - own[0]) / own[1]
            total = total + output * output.new_tensor(scale) + output.new_tensor(shift)
        return total / len(outputs)

    def rows(self, outputs: Tensor, targets: Tensor) -> Rows:
        scale = np.array(self.std)
        return {
            "finite": outputs.isfinite().all(1).numpy(),
            "true": targets.double().numpy() * scale + self.mean,
            "predicted": outputs.double().numpy() * scale + self.mean,
        }

    def metrics(self, rows: Rows) -> dict[str, Any]:
        _refuse_infinite(rows)
        return evaluation.regression_metrics(rows["true"], rows["predicted"], self.mean, self.std, self.target_names)

    def epoch_figures(self, metrics: Mapping[str, Any], select_by: str | None) -> dict[str, float]:
        names = {"loss": "mean_squared_standardised_error", "rmse": "rmse", "mae": "mae"}
        return {f"val_{name}": metrics[key] for name, key in names.items()}

    def items(self, rows: Rows) -> dict[str, Sequence[Any]]:
        columns = {}
        for number, name in enumerate(self.target_names):
            suffix = f" {name}" if self.num_outputs > 1 else ""
            for side in ("true", "predicted"):
                columns[side + suffix] = [self._written(value, number) for value in rows[side][:, number].tolist()]
        return columns

    def _written(self, value: float, number: int) -> float:
        """The shortest decimal that standardises to the same float32: the label as it stood in the file."""
        mean, std = self.mean[number], self.std[number]
        standardised = np.float32((value - mean) / std)
        first = -math.ceil(math.log10(max(abs(value), abs(mean), std)))  # from here on, places after the point
        shorter = (round(value, places) + 0.0 for places in range(first, first + 18))  # 0.0 instead of -0.0
        return next((short for short in shorter if np.float32((short - mean) / std) == standardised), value)

    def _errors(self, rows: Rows) -> np.ndarray:
        """Root mean square of the errors of a sample, in units of the headline, (N,)."""
        return np.sqrt(np.square((rows["predicted"] - rows["true"]) / self.std).mean(1)) * self._unit

    def analysis(self, rows: Rows, items: Sequence[Mapping[str, Any]]) -> dict[str, list[dict]]:
        errors = self._errors(rows)
        return {
            "error_by_length": evaluation.by_length(rows["tokens"], mean_error=errors),
            "largest_errors": [
                {**{key: value for key, value in items[number].items() if key not in ("split", "tokens")},
                 "error": float(errors[number])}
                for number in self.worst(rows)
            ],
        }  # fmt: skip

    def worst(self, rows: Rows, limit: int = 16) -> np.ndarray:
        return np.argsort(-self._errors(rows), kind="stable")[:limit]

    def figures(self, rows: Rows) -> Figures:
        arguments = rows["true"], rows["predicted"], self.target_names
        return {
            "predicted_against_true.png": partial(plots.plot_predicted_against_true, *arguments),
            "residuals.png": partial(plots.plot_residuals, *arguments),
            "residual_histogram.png": partial(plots.plot_residual_histogram, *arguments),
        }

    def analysis_figures(self, analysis: Mapping[str, list[dict]]) -> Figures:
        by_length = analysis["error_by_length"]
        return {"error_by_length.png": partial(plots.plot_error_by_length, by_length)} if by_length else {}

    def sides(self, rows: Rows, number: int) -> tuple[str, str]:
        return tuple(" ".join(f"{value:.4g}" for value in rows[name][number]) for name in ("true", "predicted"))

    def colours(self, rows: Rows) -> tuple[np.ndarray, list[str] | None]:
        return rows["true"][:, 0], None

    def colour_meaning(self) -> str:
        return f"true {self.target_names[0]}"

    # --- Answers ---

    def answer(self, output: Tensor) -> dict[str, Any]:
        values = (output.numpy() * self.std + self.mean).tolist()
        return {"value": values[0], "values": dict(zip(self.target_names, values, strict=True))}

    def records(self, answer: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{name: self._written(answer["values"][name], i) for i, name in enumerate(self.target_names)}]


# --- Several labels at once ------------------------------------------------------------------------------------------

FREQUENT = 10  # samples that a combination of labels needs to be a stratum of its own
Share = Annotated[float, lambda share: 0 <= share <= 1, "a number from 0 to 1"]


@dataclass(frozen=True)
class MultiLabel(LabelledTask):
    """Any number of labels for an item, each present or not.

    Args:
        class_names: of the labels.
        thresholds: the probability from which a label counts as there, for each.
        weights: of the items without and with a label in its loss, for each; None = all alike.
    """

    kind = "multilabel"
    headline = "macro_f1"
    loss_name = "binary cross-entropy, mean of the labels"
    step_names = ("loss", "right")
    higher_is_better = {
        "macro_f1": True, "micro_f1": True, "mean_average_precision": True, "subset_accuracy": True, "loss": False,
    }  # fmt: skip

    class_names: Names
    thresholds: list[Share] = field(default_factory=list)
    weights: list[tuple[Positive, Positive]] | None = None

    def __post_init__(self) -> None:
        if divided := next((name for name in self.class_names if ";" in name), None):
            raise UserError(f"label {shown(divided)} holds ';', which stands between labels in tables; rename it")
        if not self.thresholds:
            object.__setattr__(self, "thresholds", [0.5] * len(self.class_names))
        for name in ("thresholds", "weights"):
            if (values := getattr(self, name)) is not None and len(values) != len(self.class_names):
                raise UserError(f"{len(values)} {name} of {len(self.class_names)} labels")

    @property
    def num_outputs(self) -> int:
        return len(self.class_names)

    def about(self) -> str:
        return f"{self.num_outputs} labels, any number of them on an item"

    # --- Targets ---

    @classmethod
    def fit(cls, cells: Sequence[Any], places: Sequence[str], settings: Settings) -> tuple["MultiLabel", list[str]]:
        parts, found = [], []
        for cell, place in zip(cells, places, strict=True):
            with suppress(UserError):
                names = class_names_of(cell, place)
                parts += names if isinstance(cell, dict) else label_parts(cell)
                found += names
        in_columns = [cell for cell in cells if isinstance(cell, dict)]
        columns = list(in_columns[0]) if in_columns else []
        for name in columns:
            if all(is_zero(cell.get(name)) for cell in in_columns):
                raise UserError(f"{settings.data_path}: no training item has the label {name!r}; leave its column out, "
                                "or add items that have it")
        return cls(columns or class_order(found)), slips(parts, found, several=True)

    def check_names(self, path: str | None) -> None:
        if not self.class_names:
            raise UserError(f"{path}: no training item has a label; separate several ones by ';'")

    def read(self, cells: Sequence[Any], places: Sequence[str]) -> tuple[np.ndarray | None, list[UserError]]:
        numbers = ClassNumbers(self.class_names)
        targets, errors = np.zeros((len(cells), self.num_outputs), np.float32), []
        for row, (cell, place) in enumerate(zip(cells, places, strict=True)):
            try:
                if isinstance(cell, dict) and (more := [name for name in cell if numbers.get(name) is None]):
                    raise UserError(f"{place}: label {more[0]!r} does not occur in the training data"
                                    f"{numbers.nearest(more[0])}; correct it, or leave its column out")
                for name in class_names_of(cell, place):
                    if (number := numbers.get(name)) is None:
                        raise UserError(
                            f"{place}: label {name!r} does not occur in the training data{numbers.nearest(name)}; "
                            "correct or remove it"
                        )
                    targets[row, number] = 1
            except UserError as error:
                errors.append(error)
        return (None if errors else targets), errors

    def target(self, label: Any, where: str) -> np.ndarray:
        """float32 (C,) of 0 and 1."""
        value = np.asarray(label, np.float32) if np.asarray(label).dtype.kind in "biuf" else np.full(1, np.nan)
        if value.shape != (self.num_outputs,) or not np.isin(value, (0, 1)).all():
            raise UserError(f"{where}: a label must be {self.num_outputs} numbers 0 or 1, one for each name")
        return value

    def stack(self, targets: Sequence[np.ndarray]) -> Tensor:
        """float32 (B, C)"""
        return torch.from_numpy(np.asarray(targets, np.float32).reshape(len(targets), self.num_outputs))

    def check(self, targets: Sequence[np.ndarray], for_training: bool) -> None:
        values = np.asarray(targets)
        if for_training and (values == values[0]).all():
            raise UserError(f"all {len(values)} training samples have the same labels; nothing can be learnt")

    def strata(self, targets: np.ndarray) -> np.ndarray:
        """Each frequent combination of labels is a stratum. All other samples are put together by their rarest label:
        if each rare combination were a stratum, far more samples than asked for would be held out.
        """
        _, strata, counts = np.unique(targets, axis=0, return_inverse=True, return_counts=True)
        frequency = np.where(targets > 0, targets.sum(0), np.inf)
        rarest = np.where(targets.any(1), frequency.argmin(1), self.num_outputs)
        return np.where(counts[strata] >= FREQUENT, strata, len(counts) + rarest)

    def absent(self, targets: np.ndarray) -> str | None:
        return _absent(np.flatnonzero(~targets.any(0)), self.class_names, "labels are on no")

    def learn(self, targets: np.ndarray, settings: Settings) -> "MultiLabel":
        if settings.class_weights == "none":
            return replace(self, weights=None)
        there, total = targets.sum(0), len(targets)  # scikit-learn's rule for each label: n / (2 n_c)
        pairs = [(total / (2 * max(1, total - n)), total / (2 * max(1, n))) for n in there.tolist()]
        return replace(self, weights=pairs)

    # --- Training ---

    def weights_text(self) -> str:
        pairs = _weights_of(self.class_names, [f"{without:.4g}/{there:.4g}" for without, there in self.weights or ()])
        return f"without/with the label: {pairs}" if pairs else ""

    def objective(
        self, outputs: Tensor, targets: Tensor, settings: Settings, weights: Tensor | None = None
    ) -> Tensor:
        of_labels = None
        if self.weights is not None:
            without, with_label = torch.tensor(self.weights, dtype=torch.float32, device=outputs.device).T
            of_labels = torch.where(targets > 0, with_label, without)
        loss = partial(F.binary_cross_entropy_with_logits, outputs.float(), targets, of_labels)
        return _total(loss, weights) / self.num_outputs

    def step_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(outputs.float(), targets, reduction="sum") / self.num_outputs
        return torch.stack([loss, ((outputs > 0) == (targets > 0)).sum() / self.num_outputs])

    def train_figures(self, totals: Mapping[str, float]) -> dict[str, float]:
        return {"train_hamming_loss": 1 - totals["right"] / totals["samples"]}

    # --- Evaluation ---

    def rows(self, outputs: Tensor, targets: Tensor) -> Rows:
        return {
            "finite": outputs.isfinite().all(1).numpy(),
            "true": targets.numpy() > 0,
            "logit": outputs.double().numpy(),
        }

    def _probabilities(self, rows: Rows) -> np.ndarray:
        return torch.from_numpy(rows["logit"]).sigmoid().numpy()

    def metrics(self, rows: Rows) -> dict[str, Any]:
        _refuse_infinite(rows)
        return evaluation.multilabel_metrics(rows["logit"], rows["true"], self.thresholds, self.class_names)

    def epoch_figures(self, metrics: Mapping[str, Any], select_by: str | None) -> dict[str, float]:
        names = {"loss": "binary_cross_entropy"} | {name: name for name in self.higher_is_better if name != "loss"}
        return {f"val_{name}": metrics[key] for name, key in names.items()}

    def of_members(self, members: Sequence["MultiLabel"]) -> "MultiLabel":
        """The threshold of a label is the mean of those of the members."""
        return replace(self, thresholds=np.mean([member.thresholds for member in members], 0).tolist())

    def mean_output(self, outputs: Sequence[Tensor], members: Sequence["MultiLabel"]) -> Tensor:
        """The logits of the mean of the probabilities."""
        logits = torch.stack(list(outputs))
        return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)

    def tuned(self, rows: Rows) -> "MultiLabel":
        thresholds = evaluation.best_thresholds(self._probabilities(rows), rows["true"])
        return replace(self, thresholds=thresholds)

    def _names(self, there: np.ndarray) -> str:
        return ";".join(name for name, is_there in zip(self.class_names, there, strict=True) if is_there)

    def items(self, rows: Rows) -> dict[str, Sequence[Any]]:
        probabilities = self._probabilities(rows)
        columns = {
            "true": [self._names(there) for there in rows["true"]],
            "predicted": [self._names(there) for there in probabilities >= self.thresholds],
        }
        return columns | {f"probability {name}": probabilities[:, i] for i, name in enumerate(self.class_names)}

    def analysis(self, rows: Rows, items: Sequence[Mapping[str, Any]]) -> dict[str, list[dict]]:
        probabilities, true = self._probabilities(rows), rows["true"]
        right = (probabilities >= self.thresholds) == true
        confidence = np.where(probabilities >= 0.5, probabilities, 1 - probabilities)
        sure_right = (probabilities >= 0.5) == true
        keys = ("id", "true", "predicted")
        return {
            "reliability": evaluation.reliability_table(confidence.ravel(), sure_right.ravel()),
            "accuracy_by_length": evaluation.by_length(rows["tokens"], accuracy=right.mean(1)),
            "worst_items": [{key: items[number][key] for key in keys} for number in self.worst(rows)],
        }

    def worst(self, rows: Rows, limit: int = 16) -> np.ndarray:
        probabilities = self._probabilities(rows)
        wrong = ((probabilities >= self.thresholds) != rows["true"]).any(1)
        distance = np.abs(probabilities - rows["true"]).max(1)
        return np.flatnonzero(wrong)[np.argsort(-distance[wrong], kind="stable")][:limit]

    def figures(self, rows: Rows) -> Figures:
        probabilities, true = self._probabilities(rows), rows["true"]
        per_class = self.metrics(rows)["per_class"]
        return {
            "precision_recall.png": partial(plots.plot_precision_recall_bars, per_class),
            "precision_recall_curves.png": partial(
                plots.plot_precision_recall_curves, probabilities, true, self.thresholds, self.class_names
            ),
            "calibration.png": partial(
                plots.plot_label_calibration, evaluation.reliability_table(probabilities.ravel(), true.ravel())
            ),
        }

    def analysis_figures(self, analysis: Mapping[str, list[dict]]) -> Figures:
        by_length = analysis["accuracy_by_length"]
        return {"accuracy_by_length.png": partial(plots.plot_accuracy_by_length, by_length)} if by_length else {}

    def sides(self, rows: Rows, number: int) -> tuple[str, str]:
        predicted = self._probabilities(rows)[number] >= self.thresholds
        return tuple(plots.short(self._names(there)) or "none" for there in (rows["true"][number], predicted))

    def colours(self, rows: Rows) -> tuple[np.ndarray, list[str] | None]:
        return rows["true"].sum(1), None

    def colour_meaning(self) -> str:
        return "number of true labels"

    # --- Answers ---

    def answer(self, output: Tensor) -> dict[str, Any]:
        probabilities = output.sigmoid().tolist()
        pairs = list(zip(self.class_names, probabilities, strict=True))
        there = [name for (name, share), least in zip(pairs, self.thresholds, strict=True) if share >= least]
        return {"labels": there, "probabilities": dict(pairs)}

    def records(self, answer: Mapping[str, Any]) -> list[dict[str, Any]]:
        shares = {f"probability {name}": f"{share:.6f}" for name, share in answer["probabilities"].items()}
        return [{"labels": ";".join(answer["labels"]), **shares}]


# --- A class for each token ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Tagging(LabelledTask):
    """A class for each step of a series, or for each character of a text.

    A target is int64 (L,), a class number for each token and UNLABELLED where none is asked for: at steps without a
    label, and at the bytes of a character behind its first one, which answers for all of them.

    Args:
        class_names: in the order of the class numbers.
        outside: whether the first class is that of what is in no span.
        class_weights: of each class in the loss; None = all alike.
        tokens_per_sample: labelled tokens of a training sample, on average. Losses are sums over tokens divided by it,
            so that their means over samples are means over tokens, however the samples are batched.
    """

    kind = "tagging"
    per_token = True
    head = {"head": "tokens"}
    headline = "accuracy"
    loss_name = "cross-entropy of a token"
    step_names = ("loss", "correct", "labelled")

    class_names: Names
    outside: bool = False
    class_weights: list[Positive] | None = None
    tokens_per_sample: Positive = 1.0

    def __post_init__(self) -> None:
        if self.class_weights is not None and len(self.class_weights) != len(self.class_names):
            raise UserError(f"{len(self.class_weights)} class weights of {len(self.class_names)} classes")

    @property
    def higher_is_better(self) -> dict[str, bool]:
        spans = {"span_f1": True} if self.outside else {}
        return spans | {"accuracy": True, "balanced_accuracy": True, "macro_f1": True, "loss": False}

    @property
    def num_outputs(self) -> int:
        return len(self.class_names)

    def about(self) -> str:
        return f"a class for each {self._unit}, of {self.num_outputs}"

    @property
    def _unit(self) -> str:
        return "character" if self.outside else "step"

    # --- Targets ---

    @classmethod
    def fit(cls, cells: Sequence[Any], places: Sequence[str], settings: Settings) -> tuple["Tagging", list[str]]:
        names, _ = cls._read_cells(cells, places, "")
        pairs = [(cell, names[cell]) for item in cells for cell in item if names.get(cell) is not None]
        if not pairs:
            return cls([]), []
        outside = settings.dataset_type == "text"
        order = class_order(name for _, name in pairs if not (outside and name == OUTSIDE))
        notes = slips(*zip(*pairs, strict=True), of_steps=True)
        if "-1" in order:
            notes.append(f"-1 is a class of its own; what has no label is {UNLABELLED}, or empty")
        return cls([OUTSIDE] * outside + order, outside), notes

    @staticmethod
    def _read_cells(
        cells: Sequence[Sequence[Any]], places: Sequence[str], unit: str, known: Sequence[str] = ()
    ) -> tuple[dict[Any, str | None], list[UserError]]:
        """(the class of each label that occurs; what is wrong with one, at its first place)."""
        first: dict[Any, str] = {}
        for item, place in zip(cells, places, strict=True):
            for number, cell in enumerate(item):
                if cell not in first and not is_unlabelled(cell):
                    first[cell] = f"{place}, {unit} {number + 1}"
        names, errors = read_labels(list(first), list(first.values()), known)
        return dict(zip(first, names, strict=True)), errors

    def check_names(self, path: str | None) -> None:
        if len(self.class_names) < 2:
            only = f"has the label {self.class_names[0]!r}" if self.class_names else "is without a label"
            raise UserError(f"{path}: every {self._unit} {only}; at least two classes are needed")

    def read(self, cells: Sequence[Any], places: Sequence[str]) -> tuple[np.ndarray | None, list[UserError]]:
        names, errors = self._read_cells(cells, places, self._unit, self.class_names)
        numbers, classes = ClassNumbers(self.class_names), {}
        for cell, name in names.items():
            if name is not None:
                classes[cell] = numbers.get(name)
        targets = ragged([[classes.get(cell, UNLABELLED) for cell in item] for item in cells])
        for item, place in zip(cells, places, strict=True):
            unknown = next((i for i, cell in enumerate(item) if classes.get(cell, UNLABELLED) is None), None)
            if unknown is not None:
                name = names[item[unknown]]
                errors.append(UserError(f"{place}, {self._unit} {unknown + 1}: label {name!r} does not occur in the "
                                        f"training data{numbers.nearest(name)}; correct or remove it"))  # fmt: skip
        return (None if errors else targets), errors

    def target(self, label: Any, where: str) -> np.ndarray:
        """int64 (L,)"""
        value = np.asarray(label)
        with np.errstate(invalid="ignore"):
            whole = value.ndim == 1 and value.dtype.kind in "biuf" and (value.astype(np.int64) == value).all()
        if not whole:
            raise UserError(f"{where}: a label must be whole numbers, one for each token, {UNLABELLED} where there is "
                            f"none; this is {value.dtype} {value.shape}")  # fmt: skip
        return value.astype(np.int64)

    def stack(self, targets: Sequence[np.ndarray]) -> Tensor:
        """int64 (B, L), UNLABELLED at padding."""
        return pad_sequence([torch.as_tensor(each) for each in targets], batch_first=True, padding_value=UNLABELLED)

    def check(self, targets: Sequence[np.ndarray], for_training: bool) -> None:
        for number, each in enumerate(targets):
            wrong = np.flatnonzero((each != UNLABELLED) & ((each < 0) | (each >= self.num_outputs)))
            if wrong.size:
                raise UserError(f"sample {number}, token {wrong[0]}: label {each[wrong[0]]} is not in "
                                f"0..{self.num_outputs - 1}, nor {UNLABELLED} for none")  # fmt: skip
        found = np.unique(np.concatenate(list(targets)))
        found = found[found != UNLABELLED]
        if not found.size:
            raise UserError(f"no token of the {len(targets)} samples has a label")
        if for_training and found.size == 1:
            raise UserError(f"all labelled tokens of the {len(targets)} training samples are "
                            f"{self.class_names[found[0]]!r}; give at least two classes")  # fmt: skip

    def _most_frequent(self, targets: Sequence[np.ndarray]) -> np.ndarray:
        """(N,) the class that most tokens of each sample have, of spans if it has one; 0 where none is labelled."""
        counts = np.stack([np.bincount(each[each != UNLABELLED], minlength=self.num_outputs) for each in targets])
        if self.outside:
            counts[:, 0] = counts[:, 1:].max(1) == 0
        return counts.argmax(1)

    def strata(self, targets: np.ndarray) -> np.ndarray:
        """The most frequent class of each sample; those that occur once are one stratum together."""
        strata = self._most_frequent(targets)
        counts = np.bincount(strata)
        return np.where(counts[strata] > 1, strata, len(counts))

    def absent(self, targets: np.ndarray) -> str | None:
        absent = np.setdiff1d(np.arange(self.num_outputs), np.concatenate(list(targets)))
        if not len(absent):
            return None
        first = self.class_names[absent[0]]
        return f"{len(absent)} of {self.num_outputs} classes are in no {{}} sample, the first is {first}"

    def learn(self, targets: np.ndarray, settings: Settings) -> "Tagging":
        labels = np.concatenate(list(targets))
        labels = labels[labels != UNLABELLED]
        learnt = replace(self, tokens_per_sample=max(1, len(labels)) / len(targets))
        return replace(learnt, class_weights=_class_weights(labels, self.num_outputs, settings))

    # --- Training ---

    def weights_text(self) -> str:
        return _weights_of(self.class_names, [f"{weight:.4g}" for weight in self.class_weights or ()])

    def objective(self, outputs: Tensor, targets: Tensor, settings: Settings) -> Tensor:
        """outputs (B, L, C), targets (B, L) -> ()"""
        weights = None
        if self.class_weights is not None:
            dtype = torch.promote_types(outputs.dtype, torch.float32)  # that of the loss, also under autocast
            weights, outputs = torch.tensor(self.class_weights, dtype=dtype, device=outputs.device), outputs.to(dtype)
        smoothing = settings.label_smoothing
        loss = F.cross_entropy(outputs.mT, targets, weights, label_smoothing=smoothing, reduction="sum")
        return loss / self.tokens_per_sample

    def step_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs.float().mT, targets, reduction="sum") / self.tokens_per_sample
        return torch.stack([loss, (outputs.argmax(2) == targets).sum(), (targets != UNLABELLED).sum()])

    def train_figures(self, totals: Mapping[str, float]) -> dict[str, float]:
        return {"train_accuracy": totals["correct"] / max(1, totals["labelled"])}

    # --- Evaluation ---

    def rows(self, outputs: Tensor, targets: Tensor) -> Rows:
        """Of each sample the labelled tokens, as `evaluation.class_rows` has them, as an array of arrays."""
        samples = []
        for logits, labels in zip(outputs, targets, strict=True):
            asked = labels != UNLABELLED
            row = evaluation.class_rows(logits[asked].numpy(), labels[asked].numpy())
            row |= {name: values.astype(np.float32) for name, values in row.items() if values.dtype == np.float64}
            samples.append(row)
        columns = {name: ragged([row[name] for row in samples]) for name in samples[0]}
        return columns | {"finite": np.array([row["finite"].all() for row in samples])}

    def metrics(self, rows: Rows) -> dict[str, Any]:
        _refuse_infinite(rows)
        names = ("label", "predicted", "confidence", "ahead", "negative_log_likelihood", "brier_score")
        tokens = {name: np.concatenate(list(rows[name])) for name in names}
        number = len(tokens["label"])
        if not number:  # the first batches of a split may be without a label
            return dict.fromkeys(self.epoch_names(), math.nan)
        tokens = {name: values.astype(np.float64) if values.dtype == np.float32 else values
                  for name, values in tokens.items()}  # fmt: skip
        spans = {}
        if self.outside:
            spans = evaluation.span_metrics(rows["label"], rows["predicted"], self.class_names, outside=0)
        metrics = evaluation.class_metrics(tokens, self.class_names) | {"num_samples": len(rows["label"])}
        return {"num_samples": metrics.pop("num_samples"), "num_labelled_tokens": number, **spans, **metrics}

    def mean_output(self, outputs: Sequence[Tensor], members: Sequence[Task]) -> Tensor:
        """Of outputs (B, L, C), or (L, C) of one item."""
        return log_mean_probability(outputs)

    def epoch_names(self) -> dict[str, str]:
        """metric -> its name in the log."""
        names = {"negative_log_likelihood": "loss"}
        return names | {name: name for name in self.higher_is_better if name != "loss"}

    def epoch_figures(self, metrics: Mapping[str, Any], select_by: str | None) -> dict[str, float]:
        values = {name: metrics[key] for key, name in self.epoch_names().items()}
        return {f"val_{name}": 0.0 if value is None else value for name, value in values.items()}  # F1 without spans

    def _right(self, rows: Rows) -> np.ndarray:
        """Share of the labelled tokens of each sample that are right, (N,); 1 where none is labelled."""
        pairs = zip(rows["label"], rows["predicted"], strict=True)
        return np.array([(label == predicted).mean() if len(label) else 1.0 for label, predicted in pairs])

    def items(self, rows: Rows) -> dict[str, Sequence[Any]]:
        def mean(values: np.ndarray) -> float | str:
            return float(values.mean(dtype=np.float64)) if len(values) else ""

        return {
            "labelled": [len(labels) for labels in rows["label"]],
            "right": [int((a == b).sum()) for a, b in zip(rows["label"], rows["predicted"], strict=True)],
            "negative_log_likelihood": [mean(values) for values in rows["negative_log_likelihood"]],
            "mean_confidence": [mean(values) for values in rows["confidence"]],
        }

    def analysis(self, rows: Rows, items: Sequence[Mapping[str, Any]]) -> dict[str, list[dict]]:
        confidence = np.concatenate(list(rows["confidence"])).astype(np.float64)
        correct = np.concatenate(list(rows["label"])) == np.concatenate(list(rows["predicted"]))
        keys = ("id", "labelled", "right")
        return {
            "reliability": evaluation.reliability_table(confidence, correct),
            "accuracy_by_length": evaluation.by_length(rows["tokens"], accuracy=self._right(rows)),
            "worst_items": [{key: items[place][key] for key in keys} for place in self.worst(rows)],
        }

    def worst(self, rows: Rows, limit: int = 16) -> np.ndarray:
        right = self._right(rows)
        order = np.argsort(right, kind="stable")[:limit]
        return order[right[order] < 1]

    def figures(self, rows: Rows) -> Figures:
        flat = {name: np.concatenate(list(rows[name])) for name in ("label", "predicted", "confidence")}
        confidence, correct = flat["confidence"].astype(np.float64), flat["label"] == flat["predicted"]
        table = evaluation.reliability_table(confidence, correct)
        matrix = evaluation.confusion_matrix(flat, self.num_outputs)
        error = evaluation.calibration_error(table)
        return {
            "confusion_matrix.png": partial(plots.plot_confusion_matrix, matrix, self.class_names),
            "confidence_analysis.png": partial(
                plots.plot_confidence_analysis, table, error, confidence, correct, unit="tokens"
            ),
        }

    def analysis_figures(self, analysis: Mapping[str, list[dict]]) -> Figures:
        by_length = analysis["accuracy_by_length"]
        return {"accuracy_by_length.png": partial(plots.plot_accuracy_by_length, by_length)} if by_length else {}

    def examples(self, rows: Rows, limit: int = 4) -> np.ndarray:
        """From the worst to the best."""
        return _at_equal_distances(np.argsort(self._right(rows), kind="stable"), limit)

    def draw_examples(
        self, batch: Batch, outputs: Tensor, captions: Sequence[str], name: str, adapter: Any, path: Path
    ) -> None:
        tokens, true, predicted = [], [], []
        for values, real, labels, output in zip(batch["input"], batch["mask"], batch["label"], outputs, strict=True):
            tokens.append(values[real])
            true.append(adapter.of_units(tokens[-1], labels[real].numpy()))
            predicted.append(adapter.of_units(tokens[-1], output[real].argmax(1).numpy()))
        adapter.draw_tags(tokens, true, predicted, self.class_names, self.outside, captions, path)

    def caption(self, rows: Rows, place: int) -> str:
        return f"{self._right(rows)[place]:.0%} of {len(rows['label'][place])} right"

    def sides(self, rows: Rows, place: int) -> tuple[str, str]:
        pair = (self._most_frequent([rows[name][place]])[0] for name in ("label", "predicted"))
        return tuple(f"mostly {plots.short(self.class_names[number])}" for number in pair)

    def colours(self, rows: Rows) -> tuple[np.ndarray, list[str] | None]:
        return self._most_frequent(rows["label"]), self.class_names

    # --- Answers ---

    def answer(self, output: Tensor) -> dict[str, Any]:
        """Of the outputs (U, C) of its steps or characters."""
        probabilities = output.softmax(1)
        classes = probabilities.argmax(1).numpy()
        spans = []
        for start, end, number in evaluation.spans_of(classes, 0 if self.outside else None):
            confidence = probabilities[start:end, number].mean().item()
            spans.append({"start": start, "end": end, "class": self.class_names[number], "confidence": confidence})
        return {"classes": [self.class_names[number] for number in classes], "spans": spans}

    def records(self, answer: Mapping[str, Any]) -> list[dict[str, Any]]:
        nothing = dict.fromkeys(("start", "end", "class", "confidence"), "")
        return [{**span, "confidence": f"{span['confidence']:.6f}"} for span in answer["spans"]] or [nothing]


def _at_equal_distances(order: np.ndarray, limit: int) -> np.ndarray:
    """As many of the ordered places, the first and the last among them."""
    return order[np.unique(np.linspace(0, len(order) - 1, limit).round().astype(int))]


def ragged(arrays: Sequence[Any]) -> np.ndarray:
    """An array of arrays, (N,), whatever their lengths."""
    result = np.empty(len(arrays), object)
    for number, values in enumerate(arrays):
        result[number] = np.asarray(values)
    return result


# --- What hidden tokens hold -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """What is known of the contents of a modality's tokens, from the training split.

    Args:
        hidden: hidden tokens of a training sample, on average.
        mean, std: of each number of a token; a constant one keeps its scale.
        shares: of each byte among all, where tokens are bytes and no numbers.
    """

    hidden: Positive
    mean: list[float] = field(default_factory=list)
    std: list[Positive] = field(default_factory=list)
    shares: list[Positive] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or bool(self.mean) == bool(self.shares):
            shares = len(self.shares)
            raise UserError(f"{len(self.mean)} means, {len(self.std)} deviations and {shares} shares of bytes")

    @classmethod
    def of(cls, dataset: Any, name: str, kinds: int = 256) -> "Contents":
        """Of the tokens of a training split, a HidingDataset, as they are augmented in epoch 0.

        kinds: of tokens that are embedded, such as bytes.
        """
        contents, hidden, seen, sums, counts = dataset.contents[name], 0, 0, 0.0, 0.0
        for first in range(0, len(dataset), 32):
            batch = dataset.__getitems__(list(range(first, min(first + 32, len(dataset)))))
            if name not in batch["hidden"]:
                continue
            hidden += int((batch["hidden"][name] >= 0).sum())
            inputs, masks = (by_modality(batch[key], name) for key in ("input", "mask"))
            values = contents(inputs[masks])
            if not values.is_floating_point():
                counts = counts + values.bincount(minlength=kinds).double()
                continue
            values = values.double()
            known = ~values.isnan()
            values = values.where(known, 0)
            counts = counts + known.sum(0)
            sums = sums + torch.stack([values, values**2]).sum(1)
            seen += 1
        if not hidden:
            raise UserError(f"{name}: every training sample has one token, so that none can be hidden")
        hidden = hidden / len(dataset)
        if not seen:
            return cls(hidden, shares=((counts + 1) / (counts + 1).sum()).tolist())
        mean, square = sums / counts.clamp(min=1)
        std = (square - mean**2).clamp(min=0).sqrt()
        return cls(hidden, mean.tolist(), std.where(std > 1e-6 * (1 + mean.abs()), 1.0).tolist())

    @property
    def width(self) -> int:
        return len(self.mean) or len(self.shares)

    def errors(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden tokens: (error, that of the baseline, whether anything is asked), (B, O) each.

        The error of numbers (B, O, W) is the mean of the squares over those that are known, in units of their deviation
        in training; the baseline answers their mean. That of bytes (B, O) is the cross-entropy, in nats; the baseline
        answers how frequent they are.
        """
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.shares:
            log_shares = torch.tensor(self.shares, device=output.device).log()
            asked = target != UNLABELLED
            error = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
            return error, torch.where(asked, -log_shares[target.clamp(min=0)], 0), asked
        known = ~target.isnan()
        scaled = (target - torch.tensor(self.mean, device=output.device)) / torch.tensor(self.std, device=output.device)
        number = known.sum(-1)
        error = torch.where(known, output - scaled, 0).square().sum(-1) / number.clamp(min=1)
        baseline = torch.where(known, scaled, 0).square().sum(-1) / number.clamp(min=1)
        return error, baseline, number > 0


@dataclass(frozen=True)
class Reconstruct(Task):
    """What hidden tokens hold, of each modality; no label is needed.

    A target is a dict by modality of what the hidden tokens of a sample hold, see batches.HidingDataset. The loss is
    the sum over the modalities of the mean error of their hidden tokens.
    """

    kind = "reconstruct"
    head = {"head": "hidden"}
    headline = "relative_error"
    loss_name = "squared error in units of the training deviation, of bytes cross-entropy; sum of the modalities"
    step_names = ("loss",)
    higher_is_better = {"relative_error": False, "loss": False}

    modalities: dict[str, Contents]

    @property
    def num_outputs(self) -> int:
        return sum(contents.width for contents in self.modalities.values())

    def about(self) -> str:
        return f"the contents of hidden tokens ({', '.join(self.modalities)})"

    # --- Targets: they come stacked, see batches.HidingDataset ---

    def check(self, targets: Sequence[Any], for_training: bool) -> None:
        pass

    # --- Training ---

    def _losses(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        total = sum(output.float().sum() * 0 for name, output in outputs.items() if name not in targets)
        for name, target in targets.items():
            error, _, asked = self.modalities[name].errors(outputs[name], target)
            total = total + torch.where(asked, error, 0).sum() / self.modalities[name].hidden
        return total

    def objective(self, outputs: dict[str, Tensor], targets: dict[str, Tensor], settings: Settings) -> Tensor:
        """outputs and targets of each modality (B, O, ...) -> ()"""
        return self._losses(outputs, targets)

    def step_sums(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        return self._losses(outputs, targets)[None]

    def train_figures(self, totals: Mapping[str, float]) -> dict[str, float]:
        return {}

    # --- Evaluation ---

    def rows(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Rows:
        """Of each sample and modality the sums over its hidden tokens of error, baseline, and right bytes."""
        number = len(next(iter(targets.values())))
        rows = {"finite": np.ones(number, bool)}
        for name, contents in self.modalities.items():
            nothing = {what: np.zeros(number) for what in ("hidden", "error", "baseline", "right", "most frequent")}
            if name in targets:
                target, output = targets[name], outputs[name]
                error, baseline, asked = contents.errors(output, target)
                sums = {"hidden": asked, "error": error, "baseline": baseline}
                if contents.shares:
                    sums["right"] = output.argmax(-1) == target
                    sums["most frequent"] = target == int(np.argmax(contents.shares))
                for what, values in sums.items():
                    nothing[what] = torch.where(asked, values.double(), 0).sum(1).numpy()
                rows["finite"] &= np.isfinite(nothing["error"])
            rows |= {f"{name} {what}": values for what, values in nothing.items()}
        return rows

    def metrics(self, rows: Rows) -> dict[str, Any]:
        _refuse_infinite(rows)
        metrics, relative, loss = {"num_samples": len(rows["finite"])}, [], 0.0
        for name, contents in self.modalities.items():
            number, *sums = (rows[f"{name} {what}"].sum() for what in
                             ("hidden", "error", "baseline", "right", "most frequent"))  # fmt: skip
            error, baseline, right, frequent = (value / number if number else math.nan for value in sums)
            what = "cross_entropy" if contents.shares else "squared_error"
            metrics |= {f"{name}_hidden_tokens": int(number), f"{name}_{what}": error}
            metrics[f"baseline_{name}_{what}"] = baseline
            if contents.shares:
                metrics |= {f"{name}_accuracy": right, f"baseline_{name}_accuracy": frequent}
            if number:
                relative.append(error / baseline if baseline else math.nan)
                loss += error
        return evaluation.plain(metrics | {"relative_error": np.mean(relative) if relative else math.nan, "loss": loss})

    def epoch_figures(self, metrics: Mapping[str, Any], select_by: str | None) -> dict[str, float]:
        values = {name: metrics[name] for name in metrics if name not in ("num_samples", "relative_error")}
        values = {name: value for name, value in values.items() if not name.endswith("_hidden_tokens")}
        relative = math.inf if metrics["relative_error"] is None else metrics["relative_error"]
        return {"val_relative_error": relative} | {f"val_{name}": value for name, value in values.items()}

    def _relative(self, rows: Rows) -> np.ndarray:
        """Error of each sample over the baseline's, the mean of its modalities, (N,)."""
        parts = []
        for name in self.modalities:
            baseline = rows[f"{name} baseline"]
            parts.append(rows[f"{name} error"] / np.where(baseline > 0, baseline, np.nan))
        there = ~np.isnan(parts)
        return np.where(there, parts, 0).sum(0) / np.maximum(there.sum(0), 1)

    def items(self, rows: Rows) -> dict[str, Sequence[Any]]:
        columns: dict[str, Any] = {"relative_error": self._relative(rows)}
        for name in self.modalities:
            number = rows[f"{name} hidden"]
            columns[f"{name} hidden"] = number.astype(int)
            for what in ("error", "baseline"):
                columns[f"{name} {what}"] = rows[f"{name} {what}"] / np.maximum(number, 1)
        return columns

    def analysis(self, rows: Rows, items: Sequence[Mapping[str, Any]]) -> dict[str, list[dict]]:
        relative = self._relative(rows)
        return {
            "error_by_length": evaluation.by_length(rows["tokens"], mean_error=relative),
            "largest_errors": [{key: items[i][key] for key in ("id", "relative_error")} for i in self.worst(rows)],
        }

    def worst(self, rows: Rows, limit: int = 16) -> np.ndarray:
        return np.argsort(-self._relative(rows), kind="stable")[:limit]

    def figures(self, rows: Rows) -> Figures:
        pairs = {}
        for name in self.modalities:
            number = np.maximum(rows[f"{name} hidden"], 1)
            pairs[name] = rows[f"{name} baseline"] / number, rows[f"{name} error"] / number
        return {"reconstruction_error.png": partial(plots.plot_error_against_baseline, pairs)}

    def analysis_figures(self, analysis: Mapping[str, list[dict]]) -> Figures:
        by_length = analysis["error_by_length"]
        return {"error_by_length.png": partial(plots.plot_error_by_length, by_length)} if by_length else {}

    def examples(self, rows: Rows, limit: int = 4) -> np.ndarray:
        """From the best to the worst."""
        return _at_equal_distances(np.argsort(self._relative(rows), kind="stable"), limit)

    def draw_examples(
        self, batch: Batch, outputs: dict[str, Tensor], captions: Sequence[str], name: str, adapter: Any, path: Path
    ) -> None:
        contents = self.modalities[name]
        tokens, hidden, answers, texts = [], [], [], []
        masks, inputs = by_modality(batch["mask"], name), by_modality(batch["input"], name)
        for real, values, numbers, output, text in zip(
            masks, inputs, batch["hidden"][name], outputs[name], captions, strict=True
        ):
            if not real.any():  # it lacks the modality
                continue
            places = numbers[numbers >= 0]
            output = output[numbers >= 0]
            if not contents.shares:
                output = output * torch.tensor(contents.std) + torch.tensor(contents.mean)
            gone = torch.zeros(len(real), dtype=torch.bool)
            gone[places] = True
            answer = output.new_zeros(len(real), output.size(1))
            answer[places] = output
            for part, value in ((tokens, values), (hidden, gone), (answers, answer)):
                part.append(value[real])
            texts.append(text)
        adapter.draw_contents(tokens, [each.numpy() for each in hidden], answers, texts, path)

    def caption(self, rows: Rows, place: int) -> str:
        return f"{self._relative(rows)[place]:.2f} of the baseline's error"

    def mistake(self, rows: Rows, place: int) -> list[str]:
        return [self.caption(rows, place)]

    def colours(self, rows: Rows) -> tuple[np.ndarray, list[str] | None]:
        return self._relative(rows), None


# --- Descriptions ----------------------------------------------------------------------------------------------------

TASKS: dict[str, type[Task]] = {
    task.kind: task for task in (Classification, Regression, MultiLabel, Tagging, Reconstruct)
}


def task_named(name: str) -> type[Task]:
    """The class of a task by settings.task. Raises UserError for a name that there is not."""
    if name not in TASKS:
        raise UserError(f"task: expected one of {', '.join(TASKS)}, got {shown(name)}")
    return TASKS[name]


def describe(task: Task) -> dict[str, Any]:
    """Plain values that a checkpoint can store."""
    return {"kind": task.kind, **asdict(task)}


def from_description(description: Any, where: str = "the task") -> Task:
    """The task that `describe` described.

    Raises:
        UserError: `describe` never writes this; the message begins with `where`.
    """
    values = read(description, dict[str, Any], where)
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in TASKS:
        raise UserError(f"{where}: its kind is {shown(kind)}; it must be one of {', '.join(TASKS)}")
    return read({name: value for name, value in values.items() if name != "kind"}, TASKS[kind], where)
