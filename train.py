"""Train a Perceiver.

    python train.py --dataset digits                                    # real 8x8 images, minutes on a laptop CPU
    python train.py --dataset synthetic --epochs 10 --batch_size 16     # sequences of different lengths
    python train.py --dataset cifar10 --model_size small --epochs 100 --lr 1e-4
    python train.py --dataset cifar10 --config config.json --lr 2e-4    # a flag goes over the file
    python train.py --resume                                            # go on from checkpoints/last_model.pth

A run writes into --checkpoint_dir: best_model.pth (best on validation data), last_model.pth (for --resume),
settings.json, log.jsonl (a line per epoch) and training_curves.png; and TensorBoard events under --log_dir.
"""

import dataclasses
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import evaluation
from checkpoint import BEST, LAST, build_model, load_checkpoint, load_weights, model_arguments, save_checkpoint
from config import (
    Settings,
    UserError,
    changed_settings,
    choose_device,
    choose_precision,
    exit_on_user_error,
    format_settings,
    make_parser,
    resolve,
    unused_settings,
)
from data_utils import create_dataloader, load_splits, set_epoch
from perceiver_model import PerceiverModel

CURVES = "training_curves.png"
RUN_FILES = (BEST, LAST, "settings.json", "log.jsonl", CURVES)
READ_EVERY = 20  # optimizer steps; on a CPU, where reading costs nothing, every one
FINAL_RATE = 0.01  # the cosine ends at this share of the peak, so that a run that is prolonged still learns


# --- Learning rate and weight decay ----------------------------------------------------------------------------------


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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: the weight matrices of linear layers decay; biases, norms and the latents do not."""
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in matrices], "weight_decay": 0.0},
    ]


# --- State -----------------------------------------------------------------------------------------------------------


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


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag that the loop looks at between two steps; a second one ends at once."""

    def __enter__(self) -> "StopRequest":
        self.signal: int | None = None
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.signal = number
        self.__exit__()


def leave_signals_to_the_trainer(worker: int) -> None:
    """In a worker of a loader: Ctrl-C reaches it too, and the trainer still needs the batches of its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


# --- One step's checks -----------------------------------------------------------------------------------------------


@contextmanager
def disk_advice() -> Iterator[None]:
    """Turn a file that cannot be written into a UserError with the remedy; checkpoint.py does so for its own."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or 'a log'}: {error.strerror or error}; free space, "
            "then go on with --resume; the last checkpoint is whole"
        ) from error


class StepLog:
    """Figures of the optimizer steps, left on the device and read a few steps at a time, since reading waits for it.

    A step's figures are the sum of its losses, the number of right answers, and the norm of its gradient.
    """

    def __init__(self, progress: Progress, writer: Any, scaled: bool):
        self.progress, self.writer, self.scaled = progress, writer, scaled
        self.pending: list[tuple[int, float, list[int], Tensor]] = []

    def add(self, rate: float, samples: list[int], figures: Tensor) -> None:
        self.pending.append((self.progress.step, rate, samples, figures))

    @disk_advice()
    def read(self) -> None:
        """Add what is pending to the epoch's totals. Raises UserError at the first loss or gradient not finite."""
        if not self.pending:
            return
        values = torch.stack([figures for *_, figures in self.pending]).tolist()
        for (step, rate, samples, _), (loss, correct, norm) in zip(self.pending, values, strict=True):
            # With a gradient scaler, an infinite gradient is a matter of course: the step is left out.
            if not math.isfinite(loss) or not (self.scaled or math.isfinite(norm)):
                shown = ", ".join(map(str, samples[:16])) + (", ..." if len(samples) > 16 else "")
                what = "gradient" if math.isfinite(loss) else "loss"
                raise UserError(
                    f"the {what} of step {step} is not finite (learning rate {rate:.3g}, training samples {shown}); "
                    "the saved checkpoints are still good: look at these samples, lower --lr, keep --grad_clip 1, "
                    "or use --amp off"
                )
            totals = self.progress.totals
            totals["loss"] += loss
            totals["correct"] += correct
            totals["samples"] += len(samples)
            if math.isfinite(norm):
                totals["norm"] += norm
                totals["steps"] += 1
            if self.writer:
                for name, value in {"loss": loss / len(samples), "gradient_norm": norm, "learning_rate": rate}.items():
                    self.writer.add_scalar(f"step/{name}", value, step)
        self.pending.clear()

    def summary(self) -> str:
        """The epoch so far, for the progress bar."""
        totals = self.progress.totals
        return (
            f"loss {totals['loss'] / totals['samples']:.3f}, acc {totals['correct'] / totals['samples']:.3f}, "
            f"lr {self.progress.schedule(self.progress.step - 1):.1e}"
        )


@contextmanager
def memory_advice(settings: Settings, longest: str) -> Iterator[None]:
    """Turn running out of memory into a UserError with the remedies, the most helpful first."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        half = max(1, settings.batch_size // 2)
        raise UserError(
            f"out of memory with batch_size {settings.batch_size} and {longest}; in the order that helps: --batch_size "
            f"{half} --accumulation_steps {2 * settings.accumulation_steps} (the same training), --amp bf16, "
            "--gradient_checkpointing, --max_seq_len (sequences) or a larger --patch_size (images), "
            "a smaller --model_size; the last checkpoint is whole, go on from it with --resume"
        ) from error


# --- Training --------------------------------------------------------------------------------------------------------


def train(settings: Settings, checkpoint: dict[str, Any] | None = None) -> int:
    """Run, or go on with, a training run. Returns the exit status: 0, or 128 + the signal that stopped it.

    Raises:
        UserError: a mistake in settings or data, a file that cannot be written, memory or numbers that ran out.
    """
    device = choose_device(settings.device)
    amp_dtype = choose_precision(settings.amp, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(settings.seed)

    # Data, model, optimizer
    with torch.device("meta"):  # a model that cannot be is refused before any data is read or downloaded
        new_model(settings, {"features": {"any": {"input_dim": 1}}, "num_classes": 2})
    splits, data = load_splits(settings, checkpoint and checkpoint["data"])
    if checkpoint and data["split_sizes"] != checkpoint["data"]["split_sizes"]:
        raise UserError(
            f"the data have changed: the checkpoint has {checkpoint['data']['split_sizes']} samples, these are "
            f"{data['split_sizes']}; bring the old data back, or start a new run without --resume"
        )
    loaders = {
        name: create_dataloader(
            splits[name],
            settings.batch_size,
            num_classes=data["num_classes"],
            shuffle=name == "train",
            bucket_by_length=settings.bucket_by_length and name == "train",
            seed=settings.seed,
            num_workers=settings.num_workers,
            pin_memory=device.type == "cuda",
        )
        for name in ("train", "val")
    }
    for loader in loaders.values():
        loader.worker_init_fn = leave_signals_to_the_trainer
    model = new_model(settings, data).to(device)
    model_args = model_arguments(settings, data)
    run_model = torch.compile(model) if settings.compile else model
    # What is evaluated and kept: the weights, or their moving average, which steps over the noise of a high rate
    moving_average = get_ema_multi_avg_fn(settings.ema_decay)
    average = AveragedModel(model, multi_avg_fn=moving_average) if settings.ema_decay else None
    evaluated = average.module if average else run_model
    groups = parameter_groups(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    print_run(settings, data, model_args, groups, device, amp_dtype)

    # How far the run is
    steps_per_epoch = math.ceil(len(loaders["train"]) / settings.accumulation_steps)
    if checkpoint is None:
        total_steps = settings.num_epochs * steps_per_epoch
        warmup_steps = round(settings.warmup_fraction * total_steps)
        name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{settings.dataset_type}_{settings.model_size}"
        progress = Progress(name, Schedule(settings.learning_rate, warmup_steps, total_steps))
    else:
        progress = Progress.from_dict(checkpoint["progress"])
        load_weights(model, checkpoint.get("trained_model", checkpoint["model"]))
        if average:
            load_weights(average.module, checkpoint["model"])
            average.n_averaged.fill_(progress.step)
        optimizer.load_state_dict(checkpoint["optimizer"])
        for loaded, group in zip(optimizer.param_groups, groups, strict=True):
            loaded["weight_decay"] = group["weight_decay"]
        scaler.load_state_dict(checkpoint["scaler"])
        steps_left = (settings.num_epochs - progress.epoch) * steps_per_epoch
        steps_left -= math.ceil(progress.batch / settings.accumulation_steps)
        progress.schedule = progress.schedule.changed(progress.step, settings.learning_rate, progress.step + steps_left)

    # A rehearsal: what would break at the end of the first epoch breaks now, before any file is written
    validate(evaluated, islice(loaders["val"], 2), settings, data, device, amp_dtype)
    folder, log_dir = make_folder(settings.checkpoint_dir), make_folder(settings.log_dir)
    if checkpoint is None:
        set_aside(folder)
    else:
        write_log(folder, progress)
        set_random_state(checkpoint["random_state"])
    with disk_advice():
        evaluation.write_results(folder / "settings.json", settings.to_dict())
    if checkpoint is None:
        progress.run_name = new_folder(log_dir, progress.run_name).name
    writer = tensorboard_writer(log_dir / progress.run_name, settings, progress.step if checkpoint else None)
    log = StepLog(progress, writer, scaler.is_enabled())

    def save(name: str) -> None:
        log.read()  # nothing is saved before it is known to be finite
        if not all(weights.isfinite().all() for weights in model.parameters()):
            raise UserError(
                f"the weights after step {progress.step} are not finite (learning rate "
                f"{progress.schedule(progress.step - 1):.3g}); the saved checkpoints are still good: lower --lr"
            )
        if writer:
            with disk_advice():
                writer.flush()  # the curves are never behind the checkpoint
        contents = {
            "model": dict((average.module if average else model).state_dict()),
            **({"trained_model": dict(model.state_dict())} if average else {}),
            "model_args": model_args,
            "settings": settings.to_dict(),
            "data": data,
            "epoch": progress.epoch,
            "step": progress.step,
            "best": progress.best,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "progress": asdict(progress),
            "random_state": random_state(),
        }
        save_checkpoint(folder / name, contents)

    if checkpoint is None:
        save(LAST)

    with StopRequest() as stop:
        while not (stop.signal or is_finished(settings, progress)):
            # One epoch; its order and augmentation depend on seed and epoch alone
            model.train()
            set_epoch(loaders["train"], progress.epoch, progress.batch)
            order = list(loaders["train"].batch_sampler)  # the sample numbers of every batch still to come
            batches = iter(loaders["train"])
            started, samples_before = time.perf_counter(), progress.totals["samples"]
            bar = progress_bar(settings, progress, len(order))
            for first in range(0, len(order), settings.accumulation_steps):
                # One optimizer step, on the mean loss of the samples of one or more batches
                group = order[first : first + settings.accumulation_steps]
                samples = [number for batch in group for number in batch]
                rate = progress.schedule(progress.step)
                for parameters in optimizer.param_groups:
                    parameters["lr"] = rate
                figures = torch.zeros(2, device=device)  # sum of losses, right answers
                for _ in group:
                    batch = next(batches)
                    with memory_advice(settings, f"samples of up to {evaluation.token_counts(batch).max()} tokens"):
                        x, mask = evaluation.model_inputs(batch, device)
                        label = batch["label"].to(device, non_blocking=True)
                        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                            logits = run_model(x, mask)  # (B, num_classes)
                            loss = F.cross_entropy(
                                logits, label, label_smoothing=settings.label_smoothing, reduction="sum"
                            )
                        scaler.scale(loss / len(samples)).backward()
                    figures += torch.stack([loss.detach(), (logits.detach().argmax(1) == label).sum()])
                scaler.unscale_(optimizer)  # before clipping, so that the limit and the logged norm are the true ones
                norm = nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf)
                with memory_advice(settings, "the optimizer's state"):
                    scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                if average:
                    average.update_parameters(model)

                progress.step += 1
                progress.batch += len(group)
                log.add(rate, samples, torch.cat([figures, norm[None]]))
                bar.update(len(group))
                if device.type == "cpu" or progress.step % READ_EVERY == 0:
                    log.read()
                    seconds = time.perf_counter() - started
                    speed = (progress.totals["samples"] - samples_before) / seconds
                    bar.set_postfix_str(f"{log.summary()}, {speed:,.0f} samples/s")
                if settings.save_every and progress.step % settings.save_every == 0 and group[-1] is not order[-1]:
                    save(LAST)
                if stop.signal:
                    break
            bar.close()
            log.read()
            seconds = time.perf_counter() - started
            if stop.signal:
                break

            # Validation, and the epoch's line in the log
            metrics, matrix = validate(evaluated, loaders["val"], settings, data, device, amp_dtype)
            totals = progress.totals
            record = {
                "epoch": progress.epoch + 1,
                "step": progress.step,
                "train_loss": totals["loss"] / totals["samples"],
                "train_accuracy": totals["correct"] / totals["samples"],
                **metrics,
                "learning_rate": progress.schedule(progress.step - 1),
                "gradient_norm": totals["norm"] / max(1, totals["steps"]),
                "samples_per_second": (totals["samples"] - samples_before) / seconds,
                "seconds": seconds,
            }
            better = progress.end_epoch(record)
            log_epoch(folder, writer, settings, progress, matrix if better else None, data["class_names"])
            if better:
                save(BEST)
            save(LAST)

    if stop.signal:
        save(LAST)
        print(
            f"{signal.Signals(stop.signal).name}: saved {folder / LAST} at step {progress.step}. "
            f"Go on with: python train.py --resume {folder / LAST}"
        )
        return 128 + stop.signal
    finish(settings, folder, progress, splits["test"], data, device, amp_dtype)
    return 0


def new_model(settings: Settings, data: dict[str, Any]) -> PerceiverModel:
    try:
        return PerceiverModel(**model_arguments(settings, data))
    except ValueError as error:
        raise UserError(str(error)) from error


def validate(
    model: nn.Module, loader: Any, settings: Settings, data: dict[str, Any], device: torch.device, amp_dtype: Any
) -> tuple[dict[str, float], list[list[int]]]:
    """Loss, accuracy and balanced accuracy over a loader, named val_..., and the confusion matrix."""
    with memory_advice(settings, "the validation data's sequences"):
        found = evaluation.collect_predictions(model, loader, device, amp_dtype)
    try:
        metrics = evaluation.compute_metrics(found["logits"], found["labels"], data["class_names"])
    except ValueError as error:
        raise UserError(f"validation: {error}; lower --lr or use --amp off, then go on with --resume") from error
    names = {"loss": "negative_log_likelihood", "accuracy": "accuracy", "balanced_accuracy": "balanced_accuracy"}
    return {f"val_{name}": metrics[key] for name, key in names.items()}, metrics["confusion_matrix"]


def is_finished(settings: Settings, progress: Progress) -> bool:
    """Whether all epochs are done, or none was better for as long as early stopping waits.

    Patience counts from the end of the warm-up: before it the rate still rises.
    """
    if progress.epoch >= settings.num_epochs or not settings.early_stopping_patience:
        return progress.epoch >= settings.num_epochs
    warming = sum(line["step"] <= progress.schedule.warmup_steps for line in progress.history)
    return progress.epoch - max(progress.best.get("epoch", 0), warming) >= settings.early_stopping_patience


def finish(
    settings: Settings, folder: Path, progress: Progress, test_set: Any, data: dict[str, Any], device: torch.device,
    amp_dtype: Any,
) -> None:  # fmt: skip
    """Draw the curves, test the best model, and say what to do next."""
    with disk_advice():
        evaluation.plot_training_curves(progress.history, folder / CURVES, progress.best["epoch"])
    best = build_model(load_checkpoint(folder / BEST)).to(device)
    loader = create_dataloader(test_set, settings.batch_size)
    found = evaluation.collect_predictions(best, loader, device, amp_dtype)
    metrics = evaluation.compute_metrics(found["logits"], found["labels"], data["class_names"])
    if progress.epoch < settings.num_epochs:
        print(f"stopped early: no better epoch for {settings.early_stopping_patience} epochs")
    print(
        f"best epoch {progress.best['epoch']}: validation accuracy {progress.best['val_accuracy']:.4f}, "
        f"test accuracy {metrics['accuracy']:.4f} ({metrics['num_samples']} samples, touched only now)\n"
        f"curves: {folder / CURVES}\n"
        f"next:   python inference.py --model_path {folder / BEST} --analyze --output_dir results/"
    )


# --- What a person sees ----------------------------------------------------------------------------------------------


def print_run(
    settings: Settings, data: dict[str, Any], model_args: dict[str, Any], groups: list[dict], device: torch.device,
    amp_dtype: torch.dtype | None,
) -> None:  # fmt: skip
    sizes = data["split_sizes"]
    decayed, plain = (sum(p.numel() for p in group["params"]) for group in groups)
    precision = str(amp_dtype or torch.float32).removeprefix("torch.")
    print(
        f"data    {settings.dataset_type}: {sizes['train']} training, {sizes['val']} validation, {sizes['test']} test "
        f"samples; {data['num_classes']} classes; {describe_tokens(data['features'])}\n"
        "model   {num_latents} latents of {d_model}, {num_heads} heads, {num_cross_attention_layers} cross- and "
        "{num_self_attention_layers} self-attention layers; ".format(**model_args)
        + f"{decayed + plain:,} parameters, {decayed:,} with weight decay, {plain:,} without\n"
        f"device  {device}, {precision}" + (", compiled" if settings.compile else "")
    )
    for note in data["notes"]:
        print(f"note: {note}")


def describe_tokens(features: dict[str, dict[str, Any]]) -> str:
    """'image 8 x 8 tokens of 48 features, text tokens of 256 kinds'."""
    parts = []
    for name, known in features.items():
        grid = " x ".join(map(str, known["grid_shape"])) + " " if "grid_shape" in known else ""
        kind = f"{known['vocab_size']} kinds" if "vocab_size" in known else f"{known['input_dim']} features"
        parts.append(f"{name} {grid}tokens of {kind}")
    return ", ".join(parts)


def progress_bar(settings: Settings, progress: Progress, batches_left: int) -> tqdm:
    """A bar of the epoch's batches on a terminal; nothing elsewhere."""
    return tqdm(
        desc=f"epoch {progress.epoch + 1}/{settings.num_epochs}",
        initial=progress.batch,
        total=progress.batch + batches_left,
        unit="batch",
        leave=False,
        dynamic_ncols=True,
        disable=not sys.stderr.isatty(),
        bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining}{postfix}",  # all of it fits into 80 columns
    )


@disk_advice()
def log_epoch(
    folder: Path, writer: Any, settings: Settings, progress: Progress, matrix: Any, class_names: list[str]
) -> None:
    """The epoch on the screen, in log.jsonl and in TensorBoard (with the confusion matrix where it is given)."""
    record = progress.history[-1]
    print(
        f"epoch {record['epoch']:>{len(str(settings.num_epochs))}}/{settings.num_epochs}  "
        f"train loss {record['train_loss']:.4f} accuracy {record['train_accuracy']:.4f}  "
        f"val loss {record['val_loss']:.4f} accuracy {record['val_accuracy']:.4f}  "
        f"lr {record['learning_rate']:.2e}  {record['samples_per_second']:,.0f} samples/s  {record['seconds']:.1f} s"
        + ("  best" if progress.best["epoch"] == record["epoch"] else ""),
        flush=True,
    )
    write_log(folder, progress)
    if writer:
        for name in ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "val_balanced_accuracy"):
            writer.add_scalar(name.replace("_", "/", 1), record[name], record["step"])
        writer.add_scalar("train/samples_per_second", record["samples_per_second"], record["step"])
        if matrix:
            figure = evaluation.confusion_matrix_figure(matrix, class_names)
            with evaluation.boxes_for_missing_glyphs():
                writer.add_figure("val/confusion_matrix", figure, record["step"])
        writer.flush()


@disk_advice()
def write_log(folder: Path, progress: Progress) -> None:
    """log.jsonl is written anew from the history, so that a resumed run leaves neither gaps nor doubles."""
    temporary = folder / "log.jsonl.tmp"
    try:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in progress.history))
        os.replace(temporary, folder / "log.jsonl")
    finally:
        temporary.unlink(missing_ok=True)


@disk_advice()
def tensorboard_writer(folder: Path, settings: Settings, step: int | None) -> Any:
    """A SummaryWriter that goes on after `step` (None: of a new run), or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("note: tensorboard is not installed, so no curves are written for it (pip install tensorboard)")
        return None
    writer = SummaryWriter(str(folder), purge_step=None if step is None else step + 1)  # what is later comes again
    if step is None:
        rows = [f"| {name} | {value} |" for name, value in settings.to_dict().items()]
        writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]), 0)
    return writer


# --- Files -----------------------------------------------------------------------------------------------------------


def make_folder(path: str) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return Path(path)
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error.strerror}; choose another folder") from error


def new_folder(parent: Path, name: str) -> Path:
    """A new folder of this name, with a number after it where other runs began in the same second."""
    for number in count(1):
        folder = parent / (name if number == 1 else f"{name}_{number}")
        with disk_advice(), suppress(FileExistsError):
            folder.mkdir()
            return folder


@disk_advice()
def set_aside(folder: Path) -> None:
    """Move the files of an earlier run in `folder` into a folder of their own below it."""
    earlier = [folder / name for name in RUN_FILES if (folder / name).exists()]
    if earlier:
        newest = time.localtime(max(file.stat().st_mtime for file in earlier))
        kept = folder / f"run_until_{time.strftime('%Y-%m-%d_%H-%M-%S', newest)}"
        kept.mkdir(exist_ok=True)
        for file in earlier:
            file.rename(kept / file.name)
        print(f"note: the earlier run in {folder} was moved to {kept}")


# --- Command line ----------------------------------------------------------------------------------------------------


def keep_place(checkpoint: dict[str, Any], inexact: dict[str, tuple[Any, Any]], settings: Settings) -> None:
    """Count the batches done of a begun epoch in the new batch size; the samples and their order stay the same."""
    progress, size = checkpoint["progress"], settings.batch_size
    old_size, num_samples = checkpoint["settings"]["batch_size"], checkpoint["data"]["split_sizes"]["train"]
    done = min(progress["batch"] * old_size, num_samples)
    if done == 0 or not inexact.keys() & {"batch_size", "bucket_by_length"}:
        return
    if "bucket_by_length" in inexact or settings.bucket_by_length or (done % size and done < num_samples):
        raise UserError(
            f"batch_size or bucket_by_length: cannot change {done} samples into an epoch; resume without it, or with "
            f"--no_bucket_by_length and a batch_size that divides {done}"
        )
    progress["batch"] = math.ceil(done / size)


def resumed(args: Any) -> tuple[Settings, dict[str, str], dict[str, Any]]:
    """Settings, where they came from, and the checkpoint of a run that goes on."""
    path = Path(args.resume)
    checkpoint = load_checkpoint(path)
    if "progress" not in checkpoint:
        raise UserError(f"{path} has no training state to go on from")
    asked = {**args.file, **args.flags}
    if Path(asked.get("checkpoint_dir", path.parent)).resolve() != path.parent.resolve():
        raise UserError(
            f"--checkpoint_dir {asked['checkpoint_dir']}: a resumed run goes on in the folder of its checkpoint, "
            f"{path.parent}; leave --checkpoint_dir out"
        )
    settings, sources = resolve(args.flags, args.file, base=checkpoint["settings"])
    settings = dataclasses.replace(settings, checkpoint_dir=str(path.parent))
    changes = changed_settings(checkpoint["settings"], settings)
    inexact = changes["inexact"]
    keep_place(checkpoint, inexact, settings)
    for name, (old, new) in inexact.items():
        print(f"note: {name} changed from {old} to {new}: the run is no longer the one that began")
    if "num_epochs" in changes["free"]:
        old, new = changes["free"]["num_epochs"]
        print(
            f"note: num_epochs changed from {old} to {new}: the learning rate follows the new length from here on, but "
            "does not rise"
        )
    return settings, sources, checkpoint


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = make_parser(__doc__).parse_args(argv)
    checkpoint = None
    if args.resume:
        settings, sources, checkpoint = resumed(args)
        progress = Progress.from_dict(checkpoint["progress"])
        # The curves are the last file of a run; without them it was killed after its last epoch
        if is_finished(settings, progress) and Path(settings.checkpoint_dir, CURVES).exists():
            more = "--epochs" if progress.epoch >= settings.num_epochs else "--early_stopping_patience"
            print(
                f"nothing is left to do: {args.resume} has done {progress.epoch} of {settings.num_epochs} epochs; "
                f"to go on, raise {more}"
            )
            return 0
        print(
            f"resuming {args.resume}: {progress.epoch} of {settings.num_epochs} epochs done, batch {progress.batch} of "
            f"the next, step {progress.step}, best validation accuracy {progress.best.get('val_accuracy')}"
        )
    else:
        settings, sources = resolve(args.flags, args.file)
    print(format_settings(settings, sources))
    for note in unused_settings(settings, sources):
        print(f"note: {note}")
    try:
        return train(settings, checkpoint)
    except KeyboardInterrupt:  # before the first step, after the last, or the second one
        print("interrupted; --resume goes on from the last checkpoint, if one was saved")
        return 128 + signal.SIGINT


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files; a notebook hands down a backend that may not exist here
    sys.exit(main())
