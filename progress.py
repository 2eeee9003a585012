"""How far a training run is: learning rate, epochs, steps, best score, history, random numbers, a request to stop.

Together with weights, optimizer and scaler this is all that a run is made of, and what a checkpoint holds of it.
"""

import math
import signal
from dataclasses import dataclass, field
from typing import Any

import torch

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


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag that the loop looks at between two steps; a second one ends at once.

    Of several processes any may get one, at any moment. What each was sent goes into the figures of its step; what is
    found in the sum is agreed by all after the same step. Then they end together, whatever else they are sent: torchrun
    signals the others as soon as one has ended, and kills what does not end within 30 seconds.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # what this process was sent
        self.agreed: int | None = None  # what the run ends for

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.agreed and distributed.size() > 1 else handler)

    def _note(self, number: int, frame: object) -> None:
        self.signal = number
        if distributed.size() == 1:
            self.agreed = number
            self.__exit__()


def leave_signals_to_the_trainer(worker: int) -> None:
    """In a worker of a loader: Ctrl-C reaches it too, and the trainer still needs the batches of its step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
