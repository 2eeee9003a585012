"""How far a training run is: learning rate, epochs, steps, best score, history, random numbers, a request to stop.

Together with weights, optimizer and scaler this is all that a run is made of, and what a checkpoint holds of it.
"""

import ctypes
import math
import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass, field
from typing import Annotated, Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import distributed
from checkpoint import Contents, Data, SplitSizes, listed, tensor_problems
from config import UserError
from schema import Positive, read, shown

FINAL_RATE = 0.01  # the cosine ends at this share of the peak, so that a run that is prolonged still learns


@dataclass
class Schedule:
    """The learning rate as a function of the step alone: a linear warm-up, then a cosine to FINAL_RATE of the peak.

    cap is infinite until a resumed run changes total_steps or the peak after the warm-up; from then on it is the rate
    that was in force at that moment. The rate stays there until the new cosine falls below it, so it never rises.
    """

    peak: Positive
    warmup_steps: int
    total_steps: int
    cap: Annotated[Any, lambda rate: type(rate) is float and rate > 0, "a number above 0, or infinity"] = math.inf

    def __call__(self, step: int) -> float:
        """The rate of optimizer step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * min(1.0, done))) / 2
        return min(self.cap, self.peak * (FINAL_RATE + (1 - FINAL_RATE) * cosine))

    def changed(self, step: int, peak: float, total_steps: int) -> "Schedule":
        """The schedule of a run resumed before `step` with another peak or length."""
        if (peak, total_steps) == (self.peak, self.total_steps):
            return self
        cap = self(step) if step >= self.warmup_steps else self.cap
        return Schedule(peak, self.warmup_steps, total_steps, cap)


def average_decay(decay: float, updates: int) -> float:
    """How much of the moving average of the weights a step keeps, after so many updates: min(d, (1 + t) / (10 + t)).

    With the full decay from the start, 0.995 ** 200 = 37 % of the average after 200 steps would be the untrained
    weights. So the average begins with the weights after the first step and spans about the last tenth of the run,
    until that is as long as 1 / (1 - decay) steps (the rule of TensorFlow's ExponentialMovingAverage).
    """
    return min(decay, (1 + updates) / (10 + updates))


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model for the moving average of its weights; its first update is the weights themselves."""

    def update(averages: Any, weights: Any, _: Any) -> None:
        kept = average_decay(decay, int(average.n_averaged))  # counted on the CPU: the device is not waited for
        get_ema_multi_avg_fn(kept)(averages, weights, None)

    average = AveragedModel(model, multi_avg_fn=update)
    return average


NOTHING_YET = {"loss": 0.0, "correct": 0, "samples": 0, "norm": 0.0, "steps": 0}
IN_A_LINE = ("epoch", "step", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate")


def _is_whole_line(line: dict[str, Any]) -> bool:
    return all(isinstance(line.get(name), (int, float)) for name in IN_A_LINE)


def _is_file_name(name: str) -> bool:
    return name.isprintable() and name not in ("", ".", "..") and not set(name) & set('/\\:*?"<>|') and len(name) < 200


Line = dict[str, float | str | None]
WholeLine = Annotated[Line, _is_whole_line, f"a line of the log with {', '.join(IN_A_LINE)}"]


@dataclass
class Progress:
    """How far a run is. Weights, optimizer, scaler, random state and this are all that a run is made of."""

    run_name: Annotated[str, _is_file_name, "the name of a folder, without the way to it"]
    schedule: Schedule
    epoch: int = 0  # whole epochs done
    batch: int = 0  # batches of the current epoch done
    step: int = 0  # optimizer steps done
    totals: dict[str, float] = field(default_factory=lambda: dict(NOTHING_YET))  # sums over the current epoch
    best: Line = field(default_factory=dict)  # the log's line of the best epoch
    history: list[WholeLine] = field(default_factory=list)  # the log: a line per epoch
    test: dict[str, Any] = field(default_factory=dict)  # the test figures: the run has ended, its figures are drawn

    def __post_init__(self) -> None:
        if self.totals.keys() != NOTHING_YET.keys():
            raise UserError(f"totals must have {', '.join(NOTHING_YET)}")
        epochs = range(1, self.epoch + 1)  # compared line by line: a forged one may be endless
        if len(self.history) != self.epoch or any(line["epoch"] != epochs[i] for i, line in enumerate(self.history)):
            raise UserError(f"the lines of the history must be those of the {self.epoch} epochs")
        if self.epoch and not (_is_whole_line(self.best) and self.best["epoch"] in epochs):
            raise UserError(f"best must be the line of one of the {self.epoch} epochs")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """Raises UserError for what no run has written."""
        return read(values, cls, "the checkpoint's progress")

    def end_epoch(self, record: dict[str, Any]) -> bool:
        """Count an epoch, whose line in the log is `record`. Returns whether it is the best so far: the highest
        validation accuracy, or the same at a lower loss."""
        self.epoch, self.batch, self.totals = self.epoch + 1, 0, dict(NOTHING_YET)
        self.history.append(record)
        score = lambda line: (line["val_accuracy"], -line["val_loss"])  # noqa: E731
        better = not self.best or score(record) > score(self.best)
        if better:
            self.best = record
        return better


# --- What else a run is made of, out of a checkpoint ------------------------------------------------------------------
# A checkpoint may come from anybody. Its optimizer state above all is not to be loaded as it stands: the fused kernels
# write where its shapes lead them.


class AdamState(TypedDict):
    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Group(TypedDict):
    lr: float  # that of the last step; what else a group has comes from the settings


class OptimizerState(TypedDict):
    state: dict[int, AdamState]  # by the number of the parameter
    param_groups: list[Group]


class RandomState(TypedDict):
    cpu: Annotated[Tensor, lambda state: state.dtype == torch.uint8 and state.dim() == 1, "bytes"]
    cuda: list[Annotated[Tensor, lambda state: state.dtype == torch.uint8 and state.dim() == 1, "bytes"]]


class RunData(Data):
    split_sizes: SplitSizes
    fingerprints: dict[str, str]


class Run(Contents):
    """What a checkpoint holds that a run can go on from."""

    data: RunData
    trained_model: NotRequired[dict[str, Any]]  # where the model is an average
    optimizer: OptimizerState
    scaler: dict[str, float]
    progress: Progress
    random_state: RandomState
    other_random_states: list[RandomState]


def check_run(checkpoint: dict[str, Any], path: Any) -> None:
    """Raise UserError unless a run can go on from the checkpoint of this path."""
    if "progress" not in checkpoint:
        raise UserError(f"{path} has no training state to go on from")
    try:
        run = read(checkpoint, Run, "")
        for state in (run["random_state"], *run["other_random_states"]):
            torch.Generator().set_state(state["cpu"])
        if (run["epoch"], run["step"]) != (run["progress"].epoch, run["progress"].step):
            raise UserError("epoch and step are not those of progress")
        if run["settings"].get("ema_decay") and "trained_model" not in run:
            raise UserError("trained_model is missing, of which the model is the average")
    except (UserError, RuntimeError) as error:  # RuntimeError: no state of a generator
        raise UserError(f"{path} cannot be gone on from: {error}".splitlines()[0]) from error


def restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: dict[str, Any]) -> None:
    """Give the optimizer its state. Raises UserError, before anything is loaded, where it does not fit the model."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state, step = checkpoint["optimizer"]["state"], checkpoint["step"]
    # No step was taken yet, or all were left out by the scaler
    numbers = range(len(parameters) if state or (step and not checkpoint["scaler"]) else 0)
    expected = {"step": [torch.empty(())] * len(parameters), "exp_avg": parameters, "exp_avg_sq": parameters}
    limits = {"step": (0, step), "exp_avg": (-math.inf, math.inf), "exp_avg_sq": (0, math.inf)}
    problems = []
    for name, (low, high) in limits.items():
        place = f"{name} of parameter {{}}".format
        found = {place(number): known[name] for number, known in state.items()}
        unfit = tensor_problems(found, {place(number): expected[name][number] for number in numbers})
        problems += unfit or [
            f"{where} is not in {low}..{high}" for where, values in found.items() if not _within(values, low, high)
        ]
    if problems:
        raise UserError("the checkpoint's optimizer state does not fit its model: " + listed(problems))
    groups, saved = optimizer.state_dict()["param_groups"], checkpoint["optimizer"]["param_groups"]
    if len(groups) != len(saved):
        raise UserError(f"the checkpoint's optimizer has {len(saved)} groups of parameters, its model {len(groups)}")
    groups = [own | {"lr": known["lr"]} for own, known in zip(groups, saved, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _within(values: Tensor, low: float, high: float) -> bool:
    return bool(((values >= low) & (values <= high)).all())


def restore_scaler(scaler: torch.amp.GradScaler, saved: dict[str, float]) -> None:
    """Give the scaler its state; a run that had none begins with a new one. Raises UserError."""
    if not (saved and scaler.is_enabled()):
        return
    scale, tracker = saved.get("scale"), saved.get("_growth_tracker")
    if not scale or type(tracker) is not int:
        raise UserError(f"the checkpoint's scaler has scale {shown(scale)} and _growth_tracker {shown(tracker)}")
    scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "_growth_tracker": tracker})


def random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():  # another machine has no use for the states of this one's cards
        try:
            torch.cuda.set_rng_state_all(state["cuda"])
        except RuntimeError as error:
            raise UserError(f"the checkpoint's random state of CUDA is refused: {error}".splitlines()[0]) from error


STOP_SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
HANG_UP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has none


class StopRequest:
    """Turns SIGINT, SIGTERM and SIGHUP into a flag that the loop looks at between two steps.

    The same signal a second time ends the run at once, but for SIGHUP: a terminal that closes may send several. Where
    SIGHUP is ignored (nohup), it stays so. Outside the main thread Python allows no handlers, and there are none.

    With several processes any of them may get a signal, at any moment. Each adds what it was sent to the figures of
    its step, so that all see the same sum after the same step and end together, whatever else they are sent: torchrun
    signals the others as soon as one has ended, and kills what does not end within 30 seconds.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # what this process was sent
        self.agreed: int | None = None  # what the run ends for
        self.over = multiprocessing.RawValue(ctypes.c_bool, False)  # for begin_worker
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            ignored = {HANG_UP} if HANG_UP and signal.getsignal(HANG_UP) == signal.SIG_IGN else set()
            self._before = {number: signal.signal(number, self._note) for number in {*STOP_SIGNALS} - ignored}
        return self

    def __exit__(self, *exception: object) -> None:
        self.over.value = True
        for number in self._before:
            self._handle(number, signal.SIG_IGN if self.agreed and distributed.size() > 1 else self._before[number])

    def _note(self, number: int, frame: object) -> None:
        self.signal = self.signal or number
        if distributed.size() == 1:
            self.agreed = self.signal
            self._handle(number, signal.SIG_IGN if number == HANG_UP else self._before[number])

    @staticmethod
    def _handle(number: int, handler: Any) -> None:
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that Python did not set


def begin_worker(over: Any, worker: int) -> None:
    """In a loader's worker: leave the signals to the trainer, which still needs the batches of its step.

    They reach workers too: Ctrl-C those of a terminal, SLURM's SIGTERM all processes of a job. But SIGTERM is also what
    Python ends workers with when the trainer exits on an error, and then waits for them: it is obeyed once the
    StopRequest, of which `over` is shared memory, is over.
    """

    def leave(number: int, frame: object) -> None:
        if over.value:
            os._exit(0)

    for number in STOP_SIGNALS:
        signal.signal(number, leave if number == signal.SIGTERM else signal.SIG_IGN)
