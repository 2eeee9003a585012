"""What a training run shows and writes beside its checkpoints: the screen, log.jsonl, TensorBoard, its folders."""

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import distributed
import evaluation
import plots
from checkpoint import BEST, LAST
from config import Settings, UserError, print_note, printable
from progress import STOP_SIGNALS, Progress, StopRequest

CURVES = "training_curves.png"
RUN_FILES = (BEST, LAST, "settings.json", "log.jsonl", CURVES)


# --- Steps ------------------------------------------------------------------------------------------------------------


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

    A step's figures are the sum of its losses, the number of right answers, the numbers of processes that each of
    STOP_SIGNALS was sent to, and the norm of its gradient.
    """

    def __init__(self, progress: Progress, writer: Any, scaled: bool, stop: StopRequest):
        self.progress, self.writer, self.scaled, self.stop = progress, writer, scaled, stop
        self.pending: list[tuple[int, float, list[int], Tensor]] = []

    def add(self, rate: float, samples: list[int], figures: Tensor) -> None:
        self.pending.append((self.progress.step, rate, samples, figures))

    @disk_advice()
    def read(self) -> None:
        """Add what is pending to the epoch's totals. Raises UserError at the first loss or gradient not finite.

        All processes read the same figures after the same steps."""
        if not self.pending:
            return
        values = torch.stack([figures for *_, figures in self.pending]).tolist()
        for (step, rate, samples, _), (loss, correct, *stops, norm) in zip(self.pending, values, strict=True):
            # With a gradient scaler, an infinite gradient is a matter of course: the step is left out.
            if not math.isfinite(loss) or not (self.scaled or math.isfinite(norm)):
                shown = ", ".join(map(str, samples[:16])) + (", ..." if len(samples) > 16 else "")
                what = "gradient" if math.isfinite(loss) else "loss"
                raise UserError(
                    f"the {what} of step {step} is not finite (learning rate {rate:.3g}, training samples {shown}); "
                    "the saved checkpoints are still good: look at these samples, lower --lr, keep --grad_clip 1, "
                    "or use --amp off"
                )
            for number, told in zip(STOP_SIGNALS, stops, strict=True):
                if told:
                    self.stop.agreed = number
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


# --- What a person sees -----------------------------------------------------------------------------------------------


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
        + "".join(f"{line}\n" for line in data.get("about", [])) +
        "model   {num_latents} latents of {d_model}, {num_heads} heads, {num_cross_attention_layers} cross- and "
        "{num_self_attention_layers} self-attention layers; ".format(**model_args)
        + f"{decayed + plain:,} parameters, {decayed:,} with weight decay, {plain:,} without\n"
        f"device  {device}, {precision}" + (", compiled" if settings.compile else "") + share_of_a_batch(settings)
    )
    if "augmentation" in data:
        print(f"images  in training {data['augmentation']}")
    for note in data["notes"]:
        print_note(note)


def describe_tokens(features: dict[str, dict[str, Any]]) -> str:
    """'image 8 x 8 tokens of 48 features, text tokens of 256 kinds'."""
    parts = []
    for name, known in features.items():
        grid = " x ".join(map(str, known["grid_shape"])) + " " if "grid_shape" in known else ""
        kind = f"{known['vocab_size']} kinds" if "vocab_size" in known else f"{known['input_dim']} features"
        parts.append(f"{name} {grid}tokens of {kind}")
    return ", ".join(parts)


def share_of_a_batch(settings: Settings) -> str:
    """What each of several processes computes of --batch_size."""
    size, batch = distributed.size(), settings.batch_size
    if size == 1:
        return ""
    each = f"{batch // size} or {batch // size + 1}" if batch % size else f"{batch // size}"
    return f"; {size} processes, {each} of the {batch} samples of a batch each"


def progress_bar(settings: Settings, progress: Progress, batches_left: int) -> tqdm:
    """A bar of the epoch's batches on a terminal; nothing elsewhere."""
    return tqdm(
        desc=f"epoch {progress.epoch + 1}/{settings.num_epochs}",
        initial=progress.batch,
        total=progress.batch + batches_left,
        unit="batch",
        leave=False,
        dynamic_ncols=True,
        disable=not (distributed.is_first() and sys.stderr.isatty()),
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
            figure = plots.confusion_matrix_figure(matrix, class_names)
            with plots.missing_glyphs_noted():
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
        print_note("tensorboard is not installed, so no curves are written for it (pip install tensorboard)")
        return None
    writer = SummaryWriter(str(folder), purge_step=None if step is None else step + 1)  # what is later comes again
    if step is None:
        cells = {name: printable(str(value)).replace("|", "\\|") for name, value in settings.to_dict().items()}
        rows = [f"| {name} | {value} |" for name, value in cells.items()]
        writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]), 0)
    return writer


# --- Files ------------------------------------------------------------------------------------------------------------


def open_run(settings: Settings, folder: Path, progress: Progress, is_new: bool) -> Any:
    """Make the folders and first files of a run, or bring them to where it goes on; TensorBoard's writer or None."""
    make_folder(settings.checkpoint_dir)
    log_dir = make_folder(settings.log_dir)
    if is_new:
        set_aside(folder)
    else:
        write_log(folder, progress)
    with disk_advice():
        evaluation.write_results(folder / "settings.json", settings.to_dict())
    if is_new:
        progress.run_name = new_folder(log_dir, progress.run_name).name
    return tensorboard_writer(log_dir / progress.run_name, settings, None if is_new else progress.step)


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
        print_note(f"the earlier run in {folder} was moved to {kept}")
