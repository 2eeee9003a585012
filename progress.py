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
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import distributed

FINAL_RATE = 0.01  # the cosine ends at this share of the peak, so that a run that is prolonged still learns


@dataclass
class Schedule:
    """The learning rate as a function of the step alone: a linear warm-up, then a cosine to FINAL_RATE of the peak.

    cap is infinite until a resumed run changes total_steps or the peak after the warm-up; from then on it is the rate
    that was in force at that moment. The rate stays there until the new cosine falls below it, so it never rises.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    cap: float = math.inf

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


@dataclass
class Progress:
    """How far a run is. Weights, optimizer, scaler, random state and this are all that a run is made of."""

    run_name: str
    schedule: Schedule
    epoch: int = 0  # whole epochs done
    batch: int = 0  # batches of the current epoch done
    step: int = 0  # optimizer steps done
    totals: dict[str, float] = field(default_factory=lambda: dict(NOTHING_YET))  # sums over the current epoch
    best: dict[str, Any] = field(default_factory=dict)  # the log's line of the best epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # the log: a line per epoch
    test: dict[str, Any] = field(default_factory=dict)  # the test figures: the run has ended, its figures are drawn

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        return cls(**values | {"schedule": Schedule(**values["schedule"])})

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


def random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():  # another machine has no use for the states of this one's cards
        torch.cuda.set_rng_state_all(state["cuda"])


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
