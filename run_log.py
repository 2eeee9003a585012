"""What a training run shows and writes beside its checkpoints: the screen, log.jsonl, TensorBoard, its folders."""

import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import distributed
import evaluation
import plots
from checkpoint import BEST, LAST, load_checkpoint
from config import FIELDS, Settings, UserError, print_note, printable
from files import disk_advice, make_folder, new_folder, replace, written_whole
from progress import STOP_SIGNALS, Progress, StopRequest

CURVES = "training_curves.png"
RUN_FILES = (BEST, LAST, "settings.json", "log.jsonl", CURVES)


# --- Steps ------------------------------------------------------------------------------------------------------------


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


def say(text: str) -> None:
    """Print a line of a run that is under way: it does not end because its terminal was closed or its reader left."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


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
    say(
        f"epoch {record['epoch']:>{len(str(settings.num_epochs))}}/{settings.num_epochs}  "
        f"train loss {record['train_loss']:.4f} accuracy {record['train_accuracy']:.4f}  "
        f"val loss {record['val_loss']:.4f} accuracy {record['val_accuracy']:.4f}  "
        f"lr {record['learning_rate']:.2e}  {record['samples_per_second']:,.0f} samples/s  {record['seconds']:.1f} s"
        + ("  best" if progress.best["epoch"] == record["epoch"] else "")
    )
    write_log(folder, progress)
    if writer:
        for name in ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "val_balanced_accuracy"):
            part, _, figure = name.partition("_")
            writer.add_scalar(f"epoch/{figure}", record[name], record["step"], part)
        writer.add_scalar("step/samples_per_second", record["samples_per_second"], record["step"])
        if matrix:
            from torch.utils.tensorboard import summary

            figure = plots.confusion_matrix_figure(matrix, class_names)
            with plots.missing_glyphs_noted():
                figure.canvas.draw()
            picture = np.asarray(figure.canvas.buffer_rgba())  # (H, W, 4)
            writer.add(summary.image("val/confusion_matrix", picture, dataformats="HWC"), record["step"])
        writer.flush()


@disk_advice()
def write_log(folder: Path, progress: Progress) -> None:
    """Write log.jsonl from the whole history, so that a resumed run leaves neither gaps nor doubles.

    One that another program holds is written at the next epoch: the run does not end for it.
    """
    try:
        with written_whole(folder / "log.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in progress.history)
    except PermissionError as error:
        log = printable(str(folder / "log.jsonl"))
        say(f"note: cannot write {log} ({error.strerror}); it is written again after the next epoch")


# --- TensorBoard ------------------------------------------------------------------------------------------------------

PARTS = ("", "train", "val")  # folders of a run: TensorBoard draws what has one name in several of them as one chart
FINAL = ("best/val_accuracy", "best/val_loss", "best/test_accuracy")  # of the best epoch; the first ones in HPARAMS


class EventWriter:
    """The event files of a run: its own for steps, settings and final figures, one in train/ and one in val/.

    torch's SummaryWriter writes from a thread, whose errors (a full disk) appear as tracebacks, and names its files by
    the clock. TensorBoard reads them in the order of their names, so here each new one comes behind those there are,
    whatever the clock says.
    """

    def __init__(self, folder: Path, first_step: int):
        """Points of earlier files from `first_step` on are void."""
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._folder = event_pb2.Event, summary_pb2.Summary, folder
        self._files = {part: _event_file(folder / part) for part in PARTS}
        self._records = {part: RecordWriter(file) for part, file in self._files.items()}
        for part in PARTS:
            self._write(part, first_step, file_version="brain.Event:2")
            self._write(part, first_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def _write(self, part: str, step: int, **contents: Any) -> None:
        event = self._event(wall_time=time.time(), step=step, **contents)
        with disk_advice(self._folder):
            self._records[part].write(event.SerializeToString())

    def add(self, summary: Any, step: int, part: str = "") -> None:
        """Add what torch.utils.tensorboard.summary makes: a text, an image, hyperparameters."""
        self._write(part, step, summary=summary)

    def add_scalar(self, name: str, value: float, step: int, part: str = "") -> None:
        self.add(self._summary(value=[self._summary.Value(tag=name, simple_value=value)]), step, part)

    def flush(self) -> None:
        with disk_advice(self._folder):
            for file in self._files.values():
                file.flush()

    def close(self) -> None:
        with disk_advice(self._folder):
            for file in self._files.values():
                file.close()


def _event_file(folder: Path) -> IO:
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [name.split(".")[3] for name in os.listdir(folder) if name.startswith("events.out.tfevents.")]
    number = max([int(time.time()), *(int(number) + 1 for number in numbers if number.isdecimal())])
    return open(folder / f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}", "xb")


@disk_advice()
def tensorboard_writer(folder: Path, settings: Settings, step: int | None) -> EventWriter | None:
    """The writer of a run that goes on after `step` (None: a new run), or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import summary
    except ImportError:
        print_note("tensorboard is not installed, so no curves are written for it (pip install tensorboard)")
        return None
    writer = EventWriter(folder, 0 if step is None else step + 1)  # what is later comes again
    if step is None:
        cells = {name: printable(str(value)).replace("|", "\\|") for name, value in settings.to_dict().items()}
        rows = [f"| {name} | {value} |" for name, value in cells.items()]
        writer.add(summary.text("settings", "\n".join(["| setting | value |", "|---|---|", *rows])), 0)
        # Without a list of all settings, HPARAMS makes one in which those that differ between runs come first
        _, start, _ = summary.hparams(_hyperparameters(settings), {})
        writer.add(start, 0)
    return writer


def _hyperparameters(settings: Settings) -> dict[str, float | str]:
    """Numbers as numbers, so that HPARAMS can sort and plot them; what may be none as text, one type in all runs."""
    numbers = {name for name, field in FIELDS.items() if field.type in (int, float)}
    return {name: value if name in numbers else str(value) for name, value in settings.to_dict().items()}


def log_end(writer: EventWriter | None, progress: Progress) -> None:
    """The final figures, for HPARAMS: one step late, so that they are void when the run goes on."""
    if writer:
        from torch.utils.tensorboard import summary

        tested = progress.history[progress.test["epoch"] - 1]
        figures = (tested["val_accuracy"], tested["val_loss"], progress.test["accuracy"])
        for name, value in zip(FINAL, figures, strict=True):
            writer.add_scalar(name, value, progress.step + 1)
        writer.add(summary.hparams({}, {})[2], progress.step + 1)
        writer.close()


# --- Files ------------------------------------------------------------------------------------------------------------


def open_run(settings: Settings, folder: Path, progress: Progress, resumed: Path | None) -> Any:
    """Make the folders and first files of a run, or bring them to where it goes on; TensorBoard's writer or None.

    Args:
        resumed: the checkpoint, in `folder`, from which the run goes on; None for a new run.
    """
    make_folder(folder)
    log_dir = make_folder(settings.log_dir)
    import seaborn  # noqa: F401 (what an epoch's figures need breaks now, before anything is moved)

    with suppress(ImportError):  # see tensorboard_writer
        import torch.utils.tensorboard  # noqa: F401
    for name in RUN_FILES:
        for left in folder.glob(f"{name}*.tmp"):  # by a killed process
            left.unlink(missing_ok=True)
    if resumed is None:
        if kept := set_aside(folder, RUN_FILES):
            print_note(f"the earlier run in {folder} was moved to {kept}")
        progress.run_name = new_folder(log_dir, progress.run_name).name
    else:
        if kept := set_aside(folder, files_beyond(folder, resumed, progress)):
            print_note(
                f"the run goes on from {resumed} (epoch {progress.epoch}, step {progress.step}); what {folder} "
                f"held beyond that, or of another run, was moved to {kept}"
            )
        with disk_advice(), suppress(PermissionError):  # one that is open in a viewer is replaced at the end
            (folder / CURVES).unlink(missing_ok=True)  # it shows fewer epochs than there will be
        write_log(folder, progress)
    with disk_advice():
        evaluation.write_results(folder / "settings.json", settings.to_dict())
    return tensorboard_writer(log_dir / progress.run_name, settings, None if resumed is None else progress.step)


def files_beyond(folder: Path, resumed: Path, progress: Progress) -> list[str]:
    """The files in `folder` that a run going on from the checkpoint `resumed` would overwrite and does not repeat."""

    def place(name: str) -> tuple[str, int, int] | None:
        """(run, epoch, step) of a checkpoint; one that cannot be read belongs to no run."""
        if resumed.name == name or not (folder / name).exists():
            return None
        try:
            found = load_checkpoint(folder / name)
            return found["progress"]["run_name"], found["epoch"], found["step"]
        except (UserError, KeyError, TypeError):
            return "", 0, 0

    beyond = []
    if last := place(LAST):
        run, _, step = last
        if run != progress.run_name or step > progress.step:
            beyond = [LAST, "log.jsonl", "settings.json", CURVES]
    elif (folder / "log.jsonl").exists():
        # A line more than the checkpoint has epochs: killed between the two, the same epoch comes again
        with open(folder / "log.jsonl", "rb") as log:
            if sum(1 for _ in log) > progress.epoch + 1:
                beyond = ["log.jsonl", "settings.json", CURVES]
    if best := place(BEST):
        run, epoch, _ = best
        repeated = progress.epoch + 1 if resumed.name == LAST else None
        if run != progress.run_name or epoch not in (progress.best.get("epoch"), repeated):
            beyond.append(BEST)
    return beyond


def set_aside(folder: Path, names: Iterable[str]) -> Path | None:
    """Move those of the files that exist into a new folder below `folder`, which is returned."""
    files = [folder / name for name in names if (folder / name).exists()]
    if not files:
        return None
    with disk_advice():
        newest = time.localtime(max(file.stat().st_mtime for file in files))
        kept = new_folder(folder, f"run_until_{time.strftime('%Y-%m-%d_%H-%M-%S', newest)}")
        for file in files:
            replace(file, kept / file.name)
    return kept
