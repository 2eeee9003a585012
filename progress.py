"""The whole state of a training run, and how it is stored in a checkpoint and restored from one.

    RunState        model, average of its weights, optimizer, gradient scaler, progress, random numbers
    Progress        how far the run is: epochs, steps, sums of the epoch, best epoch, history
    Schedule        the learning rate of a step
    StepSums        sums of each step, read from the device a few steps at a time; one that is not finite ends the run
    StopRequest     signals that stop a run between two steps
"""

import ctypes
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import distributed
from batches import follow_parent, random_stream
from checkpoint import Contents, Data, SplitSizes, listed, load_weights, tensor_problems
from messages import UserError
from schema import Positive, read, shown

FINAL_RATE = 0.01  # the cosine ends at this share of the peak, so that a run given more epochs still learns


@dataclass
class Schedule:
    """The learning rate as a function of the step alone: a linear warm-up, then a cosine to FINAL_RATE of the peak.

    `cap` is infinite until a resumed run changes total_steps or the peak after the warm-up. From then on it is the rate
    at that moment: the rate stays there until the new cosine falls below it, so it never rises again.
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
        """The schedule of a run that is resumed before step `step` with another peak or length."""
        if (peak, total_steps) == (self.peak, self.total_steps):
            return self
        cap = self(step) if step >= self.warmup_steps else self.cap
        return Schedule(peak, self.warmup_steps, total_steps, cap)


def average_decay(decay: float, updates: int) -> float:
    """How much of the moving average of the weights a step keeps after t updates: min(decay, (1 + t) / (10 + t)).

    With the full decay from the start, 0.995 ** 200 = 37 % of the average after 200 steps would still be the untrained
    weights. So the average begins with the weights after the first step and spans about the last tenth of the run,
    until that tenth is as long as 1 / (1 - decay) steps (the rule of TensorFlow's ExponentialMovingAverage).
    """
    return min(decay, (1 + updates) / (10 + updates))


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model for the moving average of its weights. The first update copies the weights.

    Frozen weights are their own average: both models have them in common.
    """

    def update(averages: Any, weights: Any, _: Any) -> None:
        kept = average_decay(decay, int(average.n_averaged))  # the counter is on the CPU: no wait for the device
        pairs = [pair for pair in zip(averages, weights, strict=True) if pair[0].data_ptr() != pair[1].data_ptr()]
        get_ema_multi_avg_fn(kept)(*map(list, zip(*pairs, strict=True)), None)

    average = AveragedModel(model, multi_avg_fn=update)
    for kept, weights in zip(average.module.parameters(), model.parameters(), strict=True):
        if not weights.requires_grad:
            kept.data = weights.data
    return average


# --- Progress --------------------------------------------------------------------------------------------------------

IN_A_LINE = ("epoch", "step", "train_loss", "val_loss", "learning_rate")


def _is_whole_line(line: dict[str, Any]) -> bool:
    return all(isinstance(line.get(name), (int, float)) for name in IN_A_LINE)


def _is_file_name(name: str) -> bool:
    return name.isprintable() and name not in ("", ".", "..") and not set(name) & set('/\\:*?"<>|') and len(name) < 200


Line = dict[str, float | str | None]
WholeLine = Annotated[Line, _is_whole_line, f"a line of the log with {', '.join(IN_A_LINE)}"]


@dataclass
class Progress:
    """How far a run is."""

    run_name: Annotated[str, _is_file_name, "the name of a folder, without a path"]
    schedule: Schedule
    epoch: int = 0  # whole epochs done
    batch: int = 0  # batches of the current epoch done
    step: int = 0  # optimizer steps done
    totals: dict[str, float] = field(default_factory=dict)  # sums over the steps of the current epoch
    best: Line = field(default_factory=dict)  # the log's line of the best epoch
    history: list[WholeLine] = field(default_factory=list)  # the log: a line per epoch
    test: dict[str, Any] = field(default_factory=dict)  # metrics of the test split: the run has ended

    def __post_init__(self) -> None:
        epochs = range(1, self.epoch + 1)  # not made into a list: a forged epoch may be huge
        if len(self.history) != self.epoch or any(line["epoch"] != epochs[i] for i, line in enumerate(self.history)):
            raise UserError(f"the lines of the history must be those of the {self.epoch} epochs")
        if self.epoch and not (_is_whole_line(self.best) and self.best["epoch"] in epochs):
            raise UserError(f"best must be the line of one of the {self.epoch} epochs")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """The progress that a checkpoint holds.

        Raises:
            UserError: no run has written this.
        """
        return read(values, cls, "the checkpoint's progress")

    def add(self, **sums: float) -> None:
        """Add to the sums over the epoch."""
        for name, value in sums.items():
            self.totals[name] = self.totals.get(name, 0) + value

    def end_epoch(self, line: dict[str, Any], score: Callable[[dict[str, Any]], tuple]) -> bool:
        """Count an epoch, with its line of the log. Returns whether its score is the highest so far."""
        self.epoch, self.batch, self.totals = self.epoch + 1, 0, {}
        self.history.append(line)
        better = not self.best or score(line) > score(self.best)
        if better:
            self.best = line
        return better

    def is_finished(self, num_epochs: int, patience: int) -> bool:
        """Whether all epochs are done, or `patience` epochs have passed without a better one (0: no early stopping).

        Patience counts from the end of the warm-up: until then the rate still rises.
        """
        if self.epoch >= num_epochs or not patience:
            return self.epoch >= num_epochs
        warming = sum(line["step"] <= self.schedule.warmup_steps for line in self.history)
        return self.epoch - max(self.best.get("epoch", 0), warming) >= patience


class StepSums:
    """Sums of the optimizer steps, left on the device and read a few steps at a time, since reading waits for it.

    Args:
        names: of the sums over the samples of a step; the first one is its objective.
        scaled: whether there is a gradient scaler. Now and then it skips a step with an infinite gradient.
    """

    def __init__(self, progress: Progress, names: Sequence[str], scaled: bool, stop: "StopRequest"):
        self.progress, self.names, self.scaled, self.stop = progress, names, scaled, stop
        self.pending: list[tuple[int, float, list[int], Tensor]] = []

    def add(self, rate: float, samples: list[int], sums: Tensor) -> None:
        """Add a step on these samples: its named sums, a count for each of STOP_SIGNALS, its gradient norm."""
        self.pending.append((self.progress.step, rate, samples, sums))

    def read(self) -> list[dict[str, float]]:
        """Add the pending steps to the totals of the epoch and return them: step, rate, samples, norm and sums of each.

        All processes read the same sums after the same steps.

        Raises:
            UserError: the first objective or gradient that is not finite.
        """
        if not self.pending:
            return []
        values, steps = torch.stack([sums for *_, sums in self.pending]).tolist(), []
        for (step, rate, samples, _), (*sums, norm) in zip(self.pending, values, strict=True):
            sums, told = sums[: len(self.names)], sums[len(self.names) :]
            if not math.isfinite(sums[0]) or not (self.scaled or math.isfinite(norm)):
                shown = ", ".join(map(str, samples[:16])) + (", ..." if len(samples) > 16 else "")
                what = "gradient" if math.isfinite(sums[0]) else "loss"
                raise UserError(
                    f"the {what} of step {step} is not finite (learning rate {rate:.3g}, training samples {shown}); "
                    "the saved checkpoints are still good: look at these samples, lower --lr, keep --grad_clip 1, "
                    "or use --amp off"
                )
            for number, count in zip(STOP_SIGNALS, told, strict=True):
                if count:
                    self.stop.agreed = number
            named = dict(zip(self.names, sums, strict=True))
            self.progress.add(**named, samples=len(samples))
            if math.isfinite(norm):
                self.progress.add(norm=norm, steps=1)
            steps.append({"step": step, "rate": rate, "samples": len(samples), "norm": norm, **named})
        self.pending.clear()
        return steps


# --- The rest of a run, from a checkpoint ----------------------------------------------------------------------------
# Anybody may have written the file. Above all, its optimizer state must not be loaded unchecked: the fused kernels
# trust its shapes and write beyond the end of a tensor that is too short.


class AdamState(TypedDict):
    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Group(TypedDict):
    lr: float  # of the last step; everything else in a group comes from the settings


class OptimizerState(TypedDict):
    state: dict[int, AdamState]  # by the number of the parameter
    param_groups: list[Group]


Bytes = Annotated[Tensor, lambda tensor: tensor.dtype == torch.uint8 and tensor.dim() == 1, "a tensor of bytes"]


class RandomState(TypedDict):
    cpu: Bytes
    cuda: list[Bytes]  # one for each card


class RunData(Data):
    split_sizes: SplitSizes
    fingerprints: dict[str, str]


class Run(Contents):
    """What a checkpoint needs to be resumed."""

    data: RunData
    trained_model: NotRequired[dict[str, Any]]  # where the model is an average
    optimizer: OptimizerState
    scaler: dict[str, float]
    progress: Progress
    random_state: RandomState
    other_random_states: list[RandomState]
    threads: NotRequired[int]


def check_run(checkpoint: dict[str, Any], path: Any) -> None:
    """Check that the checkpoint of this path can be resumed.

    Raises:
        UserError: it cannot.
    """
    if "progress" not in checkpoint:
        raise UserError(f"{path} has no training state to resume from")
    try:
        run = read(checkpoint, Run, "")
        for state in (run["random_state"], *run["other_random_states"]):
            torch.Generator().set_state(state["cpu"])
        if (run["epoch"], run["step"]) != (run["progress"].epoch, run["progress"].step):
            raise UserError("epoch and step are not those of progress")
        if run["settings"].get("ema_decay") and "trained_model" not in run:
            raise UserError("trained_model is missing: its model is the average, not what was trained")
    except (UserError, RuntimeError) as error:  # RuntimeError: random_state is no state of a generator
        raise UserError(f"{path} cannot be resumed: {error}".splitlines()[0]) from error


def restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: dict[str, Any]) -> None:
    """Give the optimizer its state.

    Raises:
        UserError: it does not fit the model; nothing is loaded then.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state, step = checkpoint["optimizer"]["state"], checkpoint["step"]
    may_be_empty = step == 0 or checkpoint["scaler"]  # a scaler skips steps, and may have skipped all of them
    numbers = range(len(parameters) if state or not may_be_empty else 0)
    expected = {"step": [torch.empty(())] * len(parameters), "exp_avg": parameters, "exp_avg_sq": parameters}
    limits = {"step": (0, step), "exp_avg": (-math.inf, math.inf), "exp_avg_sq": (0, math.inf)}
    problems = []
    for name, (low, high) in limits.items():
        named = f"{name} of parameter {{}}".format
        found = {named(number): known[name] for number, known in state.items()}
        unfit = tensor_problems(found, {named(number): expected[name][number] for number in numbers})
        problems += unfit or [
            f"{where} is not in {low}..{high}" for where, values in found.items() if not _within(values, low, high)
        ]
    if problems:
        raise UserError("the checkpoint's optimizer state does not fit its model: " + listed(problems))
    groups, saved = optimizer.state_dict()["param_groups"], checkpoint["optimizer"]["param_groups"]
    if len(groups) != len(saved):
        raise UserError(f"the checkpoint's optimizer has {len(saved)} groups of parameters, its model {len(groups)}")
    groups = [own | {"lr": known["lr"]} for own, known in zip(groups, saved, strict=True)]
    # As one stretch of memory each: strides of 0 or of a transposed tensor are not looked at by the fused kernels
    state = {number: {name: values.contiguous() for name, values in known.items()} for number, known in state.items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _within(values: Tensor, low: float, high: float) -> bool:
    return bool(((values >= low) & (values <= high)).all())


def restore_scaler(scaler: torch.amp.GradScaler, saved: dict[str, float]) -> None:
    """Give the scaler its state; a run that had no scaler begins with a new one.

    Raises:
        UserError: the state is not that of a scaler.
    """
    if not (saved and scaler.is_enabled()):
        return
    scale, tracker = saved.get("scale"), saved.get("_growth_tracker")
    if not (scale and scale > 0) or type(tracker) is not int or tracker < 0:
        raise UserError(f"the checkpoint's scaler has scale {shown(scale)} and _growth_tracker {shown(tracker)}")
    scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "_growth_tracker": tracker})


def random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():  # another number of cards is another machine
        try:
            torch.cuda.set_rng_state_all(state["cuda"])
        except RuntimeError as error:
            raise UserError(f"the checkpoint's random state of CUDA is refused: {error}".splitlines()[0]) from error


# --- The whole state -------------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, weight_decay: float, encoder_scale: float = 1.0) -> list[dict[str, Any]]:
    """Optimizer groups: the weights of linear layers and of convolutions over time decay; biases, norms and
    the latents do not.

    With an encoder_scale they are two pairs: the readout's, and then all else's, whose rate is so many times as high.
    """
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv1d))}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = {1.0: parameters}
    if encoder_scale != 1:
        readout = {id(parameter) for parameter in model.readout.parameters()}
        parts = {1.0: [p for p in parameters if id(p) in readout]}
        parts[encoder_scale] = [p for p in parameters if id(p) not in readout]
    groups = []
    for scale, part in parts.items():
        decayed, plain = ([p for p in part if (id(p) in matrices) is decays] for decays in (True, False))
        groups.append({"params": decayed, "weight_decay": weight_decay, "lr_scale": scale})
        groups.append({"params": plain, "weight_decay": 0.0, "lr_scale": scale})
    return groups


class RunState:
    """The whole state of a run. `state` gives what a checkpoint stores, `restore` takes it back.

    Args:
        model: the one that is trained, on its device.
        decay: of the moving average of the weights; 0 for none.
        scaled: whether gradients are scaled, as float16 needs.
        encoder_scale: see `parameter_groups`.
    """

    def __init__(
        self,
        model: nn.Module,
        progress: Progress,
        rate: float,
        weight_decay: float,
        decay: float,
        scaled: bool,
        encoder_scale: float = 1.0,
    ):
        self.model, self.progress = model, progress
        self.average = moving_average(model, decay) if decay else None
        self.groups = parameter_groups(model, weight_decay, encoder_scale)
        self.optimizer = torch.optim.AdamW(self.groups, lr=rate, fused=True)
        device = next(model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=scaled)

    @property
    def kept(self) -> nn.Module:
        """The model that is evaluated and kept: the moving average of the weights, which smooths the noise of a high
        learning rate, or the weights themselves."""
        return self.average.module if self.average else self.model

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]

    def parameter_counts(self) -> tuple[int, int, int]:
        """(with weight decay, without, frozen)."""
        decayed, plain = (
            sum(p.numel() for group in self.groups[first::2] for p in group["params"]) for first in (0, 1)
        )
        return decayed, plain, sum(p.numel() for p in self.model.parameters()) - decayed - plain

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores. All processes call this, since each has a part of it."""
        if not all(weights.isfinite().all() for weights in self.model.parameters()):
            rate = self.progress.schedule(max(0, self.progress.step - 1))
            raise UserError(
                f"the weights after step {self.progress.step} are not finite (learning rate {rate:.3g}); the saved "
                "checkpoints are still good: lower --lr"
            )
        random_states = distributed.gather(random_state()) or [{}]
        return {
            "model": dict(self.kept.state_dict()),
            **({"trained_model": dict(self.model.state_dict())} if self.average else {}),
            "epoch": self.progress.epoch,
            "step": self.progress.step,
            "best": self.progress.best,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "random_state": random_states[0],
            "other_random_states": random_states[1:],
            "threads": torch.get_num_threads(),
        }

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Take the state of a checkpoint, except the random numbers (see `restore_random_numbers`).

        Raises:
            UserError: something does not fit; the optimizer is then left as it was.
        """
        load_weights(self.model, checkpoint.get("trained_model", checkpoint["model"]))
        if self.average:
            load_weights(self.average.module, checkpoint["model"])
            self.average.n_averaged.fill_(self.progress.step)
        restore_optimizer(self.optimizer, checkpoint)
        restore_scaler(self.scaler, checkpoint["scaler"])


def restore_random_numbers(checkpoint: dict[str, Any] | None, seed: int, step: int) -> None:
    """Set the random numbers of this process, which dropout draws from here on.

    The first process keeps the generator of a single-process run; each other one gets a seed of its own.
    """
    states = [checkpoint["random_state"], *checkpoint.get("other_random_states", [])] if checkpoint else []
    rank = distributed.rank()
    if rank < len(states):
        set_random_state(states[rank])
    elif rank > 0:
        torch.manual_seed(int(random_stream("process", seed, rank, step).integers(2**63)))


# --- Requests to stop ------------------------------------------------------------------------------------------------

STOP_SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
HANG_UP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has none


class StopRequest:
    """Turns SIGINT, SIGTERM and SIGHUP into a flag that the loop looks at between two steps.

    The same signal a second time ends the run at once, except SIGHUP: a terminal that closes may send several. If
    SIGHUP is ignored (nohup), it stays ignored. Outside the main thread Python allows no handlers, so there are none.

    With several processes, any of them may get a signal at any moment. Signals are summed together with the loss, so
    every process sees the same ones after the same step, and all end together, whatever else they are sent: torchrun
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
    """In a loader's worker: end with the trainer, but leave its signals to it, which still needs the batches of its
    step.

    Signals reach workers too: Ctrl-C reaches all processes of a terminal, SLURM's SIGTERM all of a job. But Python also
    uses SIGTERM to end the workers when the trainer exits on an error, and then waits for them. So a worker obeys it
    once `over` is true, the shared flag of a StopRequest that has ended. A worker that begins only then may have been
    sent it before, when it still had the trainer's handlers, which took it for a request to stop.
    """

    def leave(number: int, frame: object) -> None:
        if over.value:
            os._exit(0)

    for number in STOP_SIGNALS:
        signal.signal(number, leave if number == signal.SIGTERM else signal.SIG_IGN)
    leave(signal.SIGTERM, None)
    follow_parent(worker)
