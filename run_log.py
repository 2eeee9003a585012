"""What a training run shows and writes beside its checkpoints: the screen, log.jsonl, TensorBoard, its folders.

Nothing is decided here: `RunLog` is told what happens.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from tqdm import tqdm

import distributed
import evaluation
import plots
from checkpoint import BEST, LAST, load_checkpoint
from config import FIELDS, PYTHON, Settings, has_effect
from files import disk_advice, make_folder, new_folder, replace, written_whole
from messages import UserError, figure_text, print_note, printable, quoted
from progress import Progress
from tasks import LAST_EPOCH, Task

CURVES = "training_curves.png"
RUN_FILES = (BEST, LAST, "settings.json", "log.jsonl", CURVES)


class RunLog:
    """The screen, log.jsonl and TensorBoard of a run. Only the first process shows and writes."""

    def __init__(self, settings: Settings, task: Task, progress: Progress):
        self.settings, self.task, self.progress = settings, task, progress
        self.folder = Path(settings.checkpoint_dir)
        self.writer: EventWriter | None = None
        self.bar: tqdm | None = None

    # --- Before the first step ---

    def start(
        self, data: dict[str, Any], model_args: dict[str, Any], parameters: tuple[int, int, int], device: torch.device,
        precision: torch.dtype,
    ) -> None:  # fmt: skip
        """Data, model and device in a few lines; `parameters` with weight decay, without, and frozen."""
        settings, sizes = self.settings, data["split_sizes"]
        decayed, plain, frozen = parameters
        repeated = f" {model_args['num_blocks']} times" if model_args.get("num_blocks", 1) > 1 else ""
        print(
            f"data    {settings.dataset_type}: {sizes['train']} training, {sizes['val']} validation, {sizes['test']} "
            f"test samples; {self.task.about()}; {describe_tokens(data['features'])}\n"
            + "".join(f"{line}\n" for line in data.get("about", [])) +
            "model   {num_latents} latents of {d_model}, {num_heads} heads, {num_cross_attention_layers} cross- and "
            "{num_self_attention_layers} self-attention layers".format(**model_args)
            + f"{repeated}; {sum(parameters):,} parameters, {decayed:,} with weight decay, {plain:,} without"
            + (f", {frozen:,} frozen\n" if frozen else "\n") +
            f"device  {device}, {str(precision).removeprefix('torch.')}"
            + (", compiled" if settings.compile else "") + share_of_a_batch(settings)
        )
        if weights := self.task.weights_text():
            print(f"weights {weights}")
        print(f"loss    {losses(self.task, settings)}")
        if "augmentation" in data:
            print(f"images  in training {data['augmentation']}")
        for note in data["notes"]:
            print_note(note)

    def open(self, resumed: Path | None, part: bool = False) -> None:
        """Make the folders and first files of a run, or bring them to where it continues.

        Args:
            resumed: the checkpoint, in the run's folder, from which it continues; None for a new run.
            part: whether the run is a part of another one, which has seen to what was in the folder.
        """
        if not distributed.is_first():
            return
        progress, folder = self.progress, make_folder(self.folder)
        log_dir = make_folder(self.settings.log_dir)
        import seaborn  # noqa: F401 (if it is broken, the run ends here, before anything is moved)

        with suppress(ImportError):  # see tensorboard_writer
            import torch.utils.tensorboard  # noqa: F401
        for name in RUN_FILES:
            for left in folder.glob(f"{name}*.tmp"):  # by a killed process
                left.unlink(missing_ok=True)
        if resumed is None:
            if not part and (kept := set_aside(folder, run_files(folder))):
                print_note(f"the earlier run in {folder} was moved to {kept}")
            progress.run_name = new_folder(log_dir, progress.run_name).name
        else:
            if kept := set_aside(folder, files_beyond(folder, resumed, progress)):
                print_note(
                    f"the run continues from {resumed} (epoch {progress.epoch}, step {progress.step}); what {folder} "
                    f"held beyond that, or of another run, was moved to {kept}"
                )
            with disk_advice(), suppress(PermissionError):  # open in a viewer: replaced at the end
                (folder / CURVES).unlink(missing_ok=True)  # it lacks the epochs to come
            write_log(folder, progress)
        with disk_advice():
            evaluation.write_results(folder / "settings.json", self.settings.to_dict())
        step = None if resumed is None else progress.step
        self.writer = tensorboard_writer(log_dir / progress.run_name, self.settings, step)

    # --- While it trains ---

    def begin_epoch(self, batches: int) -> None:
        """An epoch begins, with so many batches left: a bar on a terminal, nothing elsewhere."""
        progress = self.progress
        self.started, self.samples_before = time.perf_counter(), progress.totals.get("samples", 0)
        self.bar = tqdm(
            desc=f"epoch {progress.epoch + 1}/{self.settings.num_epochs}",
            initial=progress.batch,
            total=progress.batch + batches,
            unit="batch",
            leave=False,
            dynamic_ncols=True,
            disable=not (distributed.is_first() and sys.stderr.isatty()),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining}{postfix}",  # all of it fits into 80 columns
        )

    @disk_advice()
    def steps(self, steps: Iterable[Mapping[str, float]]) -> None:
        """Steps whose sums were read from the device."""
        steps = list(steps)
        if self.writer:
            for step in steps:
                loss = step["loss"] / step["samples"]
                shown = {"loss": loss, "gradient_norm": step["norm"], "learning_rate": step["rate"]}
                for name, value in shown.items():
                    self.writer.add_scalar(f"step/{name}", value, step["step"])
        if steps and self.bar is not None and not self.bar.disable:
            totals, rate = self.progress.totals, self.progress.schedule(max(0, self.progress.step - 1))
            values = {"loss": totals["loss"] / totals["samples"], **self.task.train_figures(totals)}
            names = [name.removeprefix("train_").replace("accuracy", "acc")[:8] for name in values]  # in 80 columns
            shown = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, values.values(), strict=True))
            speed = self._samples() / (time.perf_counter() - self.started)
            self.bar.set_postfix_str(f"{shown}, lr {rate:.1e}, {speed:,.0f} samples/s")

    def advance(self, batches: int) -> None:
        self.bar.update(batches)

    def end_steps(self) -> None:
        self.bar.close()
        self.bar, self.seconds = None, time.perf_counter() - self.started
        self.speed = self._samples() / self.seconds

    def _samples(self) -> int:
        """Samples trained on since the epoch began or was resumed."""
        return self.progress.totals.get("samples", 0) - self.samples_before

    def line(self, validation: Mapping[str, float]) -> dict[str, float]:
        """The line of log.jsonl for the epoch that ends: its steps and its validation."""
        progress, totals = self.progress, self.progress.totals
        line = {"epoch": progress.epoch + 1, "step": progress.step, "train_loss": totals["loss"] / totals["samples"]}
        objective = totals["objective"] / totals["samples"]
        if objective != line["train_loss"]:  # smoothed labels or weighted classes
            line["train_objective"] = objective
        return {
            **line,
            **self.task.train_figures(totals),
            **validation,
            "learning_rate": progress.schedule(progress.step - 1),
            "gradient_norm": totals.get("norm", 0) / max(1, totals.get("steps", 0)),
            "samples_per_second": self.speed,
            "seconds": self.seconds,
        }

    @disk_advice()
    def epoch(self, metrics: Mapping[str, Any], is_best: bool) -> None:
        """The epoch that has ended: on the screen, in log.jsonl and in TensorBoard, the best one with a figure."""
        if not distributed.is_first():
            return
        line, headline, epochs = self.progress.history[-1], self.task.headline, self.settings.num_epochs

        def part(name: str) -> str:
            value = line.get(f"{name}_{headline}")
            label = headline.replace("_", " ")
            there = f"{name}_{headline}" in line
            return f"{name} loss {figure_text(line[f'{name}_loss'])}" + f" {label} {figure_text(value)}" * there

        say(
            f"epoch {line['epoch']:>{len(str(epochs))}}/{epochs}  {part('train')}  {part('val')}{self._chosen(line)}  "
            f"lr {line['learning_rate']:.2e}  {line['samples_per_second']:,.0f} samples/s  {line['seconds']:.1f} s"
            + ("  best" if is_best and self._kept == "best" else "")
        )
        write_log(self.folder, self.progress)
        if not self.writer:
            return
        for name, value in line.items():
            group, _, figure = name.partition("_")
            if group in ("train", "val") and value is not None:
                self.writer.add_scalar(f"epoch/{figure}", value, line["step"], group)
        self.writer.add_scalar("step/samples_per_second", line["samples_per_second"], line["step"])
        if is_best and "confusion_matrix" in metrics:
            from torch.utils.tensorboard import summary

            figure = plots.confusion_matrix_figure(metrics["confusion_matrix"], self.task.class_names)
            with plots.missing_glyphs_noted():
                figure.canvas.draw()
            picture = np.asarray(figure.canvas.buffer_rgba())  # (H, W, 4)
            self.writer.add(summary.image("val/confusion_matrix", picture, dataformats="HWC"), line["step"])
        self.writer.flush()

    def flush(self) -> None:
        if self.writer:
            with disk_advice():
                self.writer.flush()

    def _chosen(self, line: Mapping[str, Any]) -> str:
        """The score of a line of the log that picks the best epoch, ' balanced accuracy 0.87'; '' where it is shown."""
        name = self.settings.select_by
        if name in (None, LAST_EPOCH, "loss", self.task.headline):
            return ""
        return f" {name.replace('_', ' ')} {figure_text(line[f'val_{name}'])}"

    # --- After the last step ---

    def draw_curves(self) -> None:
        if distributed.is_first():
            with disk_advice():
                history, best = self.progress.history, self.progress.best["epoch"]
                plots.plot_training_curves(history, self.folder / CURVES, best, self.task.headline)

    def end(self, tested: Mapping[str, Any], model: Path, is_best: bool, options: str = "") -> None:
        """The closing lines: the epoch whose model was tested, and its file; `options` that opening it needs."""
        progress, headline = self.progress, self.task.headline
        label, test = headline.replace("_", " "), progress.test
        beside = f"the training mean as answer: {figure_text(test['baseline'])}; " if "baseline" in test else ""
        self._say_if_early()
        print(
            f"{self._kept if is_best else 'last'} epoch {tested['epoch']}: validation {label} "
            f"{figure_text(tested[f'val_{headline}'])}{self._chosen(tested)}, test {label} "
            f"{figure_text(test[headline])} ({beside}{test['num_samples']} samples, touched only now)\n"
            f"curves: {printable(str(self.folder / CURVES))}\n"
            f"next:   {next_step(self.settings, model, options)}"
        )

    def end_fold(self) -> None:
        """The closing lines of one of several models."""
        best, headline = self.progress.best, self.task.headline
        self._say_if_early()
        print(
            f"{self._kept} epoch {best['epoch']}: validation {headline.replace('_', ' ')} "
            f"{figure_text(best[f'val_{headline}'])}\n"
            f"curves: {printable(str(self.folder / CURVES))}"
        )
        if self.writer:
            self.writer.close()

    @property
    def _kept(self) -> str:
        """Which epoch's model the run keeps, in a word."""
        return "last" if self.settings.select_by == LAST_EPOCH else "best"

    def _say_if_early(self) -> None:
        if self.progress.epoch < self.settings.num_epochs:
            print(f"stopped early: no better epoch for {self.settings.early_stopping_patience} epochs")

    def close(self) -> None:
        """The final metrics, for HPARAMS: one step late, so that a run that continues drops them."""
        if not self.writer:
            return
        from torch.utils.tensorboard import summary

        progress, headline = self.progress, self.task.headline
        tested = progress.history[progress.test["epoch"] - 1]
        final = {f"val_{headline}": tested[f"val_{headline}"], "val_loss": tested["val_loss"]}
        final[f"test_{headline}"] = progress.test[headline]
        for name, value in final.items():
            if value is None:
                continue
            self.writer.add_scalar(f"best/{name}", value, progress.step + 1)
        self.writer.add(summary.hparams({}, {})[2], progress.step + 1)
        self.writer.close()


# --- Lines on the screen ---------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print a line. The run does not end because its terminal was closed or the reader of a pipe left."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def next_step(settings: Settings, model: Path, options: str) -> str:
    """How the model of this file is evaluated; `options` that opening it needs."""
    if settings.dataset_type == PYTHON:
        return "from inference import evaluate, predict; evaluate(result.model, result.splits['test'])"
    return f"python inference.py --model_path {quoted(model)}{options} --analyze --output_dir results/"


def describe_tokens(features: dict[str, dict[str, Any]]) -> str:
    """'image 8 x 8 tokens of 48 features, text tokens of 256 kinds'."""
    parts = []
    for name, known in features.items():
        grid = " x ".join(map(str, known["grid_shape"])) + " " if "grid_shape" in known else ""
        kind, number = ("kind", known["vocab_size"]) if "vocab_size" in known else ("feature", known["input_dim"])
        parts.append(f"{name} {grid}tokens of {number} {kind}{'s' * (number > 1)}")
    return ", ".join(parts)


def losses(task: Task, settings: Settings) -> str:
    """What the losses of an epoch's line are: both the same figure, of other weights."""
    extras = {"label smoothing": has_effect(settings, "label_smoothing") and settings.label_smoothing,
              "class weights": has_effect(settings, "class_weights") and settings.class_weights != "none"}  # fmt: skip
    without = " or ".join(name for name, is_on in extras.items() if is_on)
    dropout = " and dropout" if settings.dropout or settings.attention_dropout else ""
    val = "the moving average of the weights" if settings.ema_decay else "the weights at the epoch's end"
    without = f" without {without}" if without else ""
    return f"{task.loss_name}{without}; train: with each step's weights{dropout}; val: with {val}"


def share_of_a_batch(settings: Settings) -> str:
    """How many samples of a batch each of several processes computes."""
    size, batch = distributed.size(), settings.batch_size
    if size == 1:
        return ""
    each = f"{batch // size} or {batch // size + 1}" if batch % size else f"{batch // size}"
    return f"; {size} processes, {each} of the {batch} samples of a batch each"


@disk_advice()
def write_log(folder: Path, progress: Progress) -> None:
    """Write log.jsonl from the whole history, so that a resumed run leaves neither gaps nor duplicates.

    If another program holds the file, it is written at the next epoch; the run does not end because of that.
    """
    try:
        with written_whole(folder / "log.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in progress.history)
    except PermissionError as error:
        log = printable(str(folder / "log.jsonl"))
        say(f"note: cannot write {log} ({error.strerror}); it is written again after the next epoch")


# --- TensorBoard -----------------------------------------------------------------------------------------------------

PARTS = ("", "train", "val")  # folders of a run: TensorBoard draws a name that is in several of them as one chart


class EventWriter:
    """The event files of a run: one for steps, settings and final metrics, one in train/ and one in val/.

    torch's SummaryWriter writes from a thread, whose errors (a full disk) appear as tracebacks, and names its files by
    the clock. TensorBoard reads them in the order of their names, so here a new file's name always comes after the
    existing ones, whatever the clock says.
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
        """Add a summary from torch.utils.tensorboard.summary: a text, an image, hyperparameters."""
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
    """The writer of a run that continues after `step` (None: a new run), or None if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import summary
    except ImportError:
        print_note("tensorboard is not installed, so no curves are written for it (pip install tensorboard)")
        return None
    writer = EventWriter(folder, 0 if step is None else step + 1)  # later points will be written again
    if step is None:
        cells = {name: printable(str(value)).replace("|", "\\|") for name, value in settings.to_dict().items()}
        rows = [f"| {name} | {value} |" for name, value in cells.items()]
        writer.add(summary.text("settings", "\n".join(["| setting | value |", "|---|---|", *rows])), 0)
        # Without a list of all settings, HPARAMS makes its own, in which those that differ between runs come first
        _, start, _ = summary.hparams(_hyperparameters(settings), {})
        writer.add(start, 0)
    return writer


def _hyperparameters(settings: Settings) -> dict[str, float | str]:
    """Numbers as numbers, so that HPARAMS can sort and plot them; a setting that may be none as text in all runs."""
    numbers = {name for name, field in FIELDS.items() if field.type in (int, float)}
    return {name: value if name in numbers else printable(str(value)) for name, value in settings.to_dict().items()}


# --- Files -----------------------------------------------------------------------------------------------------------


def files_beyond(folder: Path, resumed: Path, progress: Progress) -> list[str]:
    """The files in `folder` that a run resumed from the checkpoint `resumed` would overwrite without repeating them."""

    def position(name: str) -> tuple[str, int, int] | None:
        """(run, epoch, step) of a checkpoint; one that cannot be read belongs to no run."""
        if resumed.name == name or not (folder / name).exists():
            return None
        try:
            found = load_checkpoint(folder / name)
            return found["progress"]["run_name"], found["epoch"], found["step"]
        except (UserError, KeyError, TypeError):
            return "", 0, 0

    beyond = []
    if last := position(LAST):
        run, _, step = last
        if run != progress.run_name or step > progress.step:
            beyond = [LAST, "log.jsonl", "settings.json", CURVES]
    elif (folder / "log.jsonl").exists():
        # One line more than the checkpoint has epochs: killed between the two writes, this epoch comes again
        with open(folder / "log.jsonl", "rb") as log:
            if sum(1 for _ in log) > progress.epoch + 1:
                beyond = ["log.jsonl", "settings.json", CURVES]
    if best := position(BEST):
        run, epoch, _ = best
        repeated = progress.epoch + 1 if resumed.name == LAST else None
        if run != progress.run_name or epoch not in (progress.best.get("epoch"), repeated):
            beyond.append(BEST)
    return beyond


def run_files(folder: Path) -> list[str]:
    """The names that a run may have left in `folder`: files, and the folders of the models of its folds and of what it
    has chosen between."""
    parts = {last.relative_to(folder).parts[0] for last in folder.glob(f"fold_*/{LAST}")}
    parts |= {file.relative_to(folder).parts[0] for file in folder.glob("select/*/fold_*/settings.json")}
    return [*RUN_FILES, *sorted(parts)]


def open_whole(settings: Settings, new: bool) -> None:
    """Make the folder of a run of several models, whose runs have folders of their own in it."""
    folder = make_folder(settings.checkpoint_dir)
    if new and (kept := set_aside(folder, run_files(folder))):
        print_note(f"the earlier run in {folder} was moved to {kept}")
    with disk_advice():
        evaluation.write_results(folder / "settings.json", settings.to_dict())


def set_aside(folder: Path, names: Iterable[str]) -> Path | None:
    """Move the files of these names, if there are any, into a new folder below `folder`; returns the new folder."""
    files = [folder / name for name in names if (folder / name).exists()]
    if not files:
        return None
    with disk_advice():
        newest = time.localtime(max(file.stat().st_mtime for file in files))
        kept = new_folder(folder, f"run_until_{time.strftime('%Y-%m-%d_%H-%M-%S', newest)}")
        for file in files:
            replace(file, kept / file.name)
    return kept
