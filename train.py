"""Train a Perceiver.

    python train.py --dataset digits                                    # real 8x8 images, minutes on a laptop CPU
    python train.py --dataset synthetic --epochs 10 --batch_size 16     # sequences of different lengths
    python train.py --dataset cifar10 --model_size small --epochs 100 --lr 1e-4
    python train.py --dataset cifar10 --config config.json --lr 2e-4    # flags override the file
    python train.py --dataset path/to/my_data.py                        # data of your own code (own_data.py)
    python train.py --resume                                            # continue from checkpoints/last_model.pth
    python train.py --dataset images --data_path photos/ --init_from path/to/vision-perceiver-fourier/ --freeze encoder
    torchrun --standalone --nproc_per_node=2 train.py --dataset digits  # the same run on two devices (distributed.py)

A run writes into --checkpoint_dir: best_model.pth (best on validation data), last_model.pth (for --resume),
settings.json, log.jsonl (a line per epoch) and training_curves.png; and TensorBoard events under --log_dir.

    from train import train                                             # the same from Python, see `train`
    result = train(Settings(...), data={"train": items}, class_names=["falls", "rises"])
"""

import dataclasses
import io
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import distributed
import evaluation
import finetune
import folds
import own_data
import selection
import tasks
from batches import (
    Mixed,
    asked,
    create_dataloader,
    first_samples,
    hide,
    loaded_of,
    mapped,
    mix_inputs,
    model_inputs,
    moved,
    set_epoch,
    share_of,
    token_counts,
    unshared,
)
from checkpoint import (
    BEST,
    LAST,
    check_model_arguments,
    check_weights,
    equip,
    equipped_model,
    load_checkpoint,
    model_arguments,
    save_checkpoint,
)
from config import (
    FIELDS,
    PYTHON,
    SHORT_SERIES,
    Settings,
    changed_settings,
    check_cache,
    check_folder,
    check_memory,
    choose_device,
    choose_precision,
    flag_of,
    format_settings,
    has_effect,
    is_code,
    make_parser,
    resolve,
    unused_settings,
)
from data_utils import CIFAR10_FILES, load_splits
from files import owned
from messages import (
    UserError,
    exit_on_user_error,
    figure_text,
    memory_advice,
    naming,
    print_note,
    printable,
    quoted,
    with_progress,
)
from own_data import OwnData
from perceiver_model import MODEL_SIZES, PerceiverModel
from progress import (
    STOP_SIGNALS,
    Progress,
    RunState,
    Schedule,
    StepSums,
    StopRequest,
    begin_worker,
    check_run,
    restore_random_numbers,
)
from run_log import CURVES, RunLog, next_step, open_whole, say
from schema import shown
from tasks import LAST_EPOCH, Task

CHECKPOINT_OF_THIS_LAUNCH = "checkpoint"  # what processes that torchrun restarts continue from
# Fewer samples choose noise: the strong recipe for series and --select auto then keep the last epoch, and no candidate
# is dropped after such a fold
SMALL_VALIDATION = 50
FEW_STEPS = 2000  # of a run on series; with fewer, a plain run is told of --select auto
READ_EVERY = 20  # how many steps' sums are copied from a CUDA device at once (a copy waits for it); on a CPU, 1


# --- What helps when memory runs out ---------------------------------------------------------------------------------

GO_ON = "; the last checkpoint is whole, continue from it with --resume"
MODEL_REMEDIES = (
    "a smaller --model_size",
    "a smaller --d_model, --num_latents, --mlp_ratio or --cross_attention_dim",
    "fewer --num_self_attention_layers",
    "another --device",
)


def step_remedies(settings: Settings) -> list[str]:
    half = max(1, settings.batch_size // 2)
    return [
        f"--batch_size {half} --accumulation_steps {2 * settings.accumulation_steps} (the same training)",
        "--amp bf16",
        "--gradient_checkpointing",
        "--max_seq_len (sequences) or a larger --patch_size (images)",
        "a smaller --model_size",
    ]


def data_remedies(settings: Settings) -> list[str]:
    """What makes this data set smaller."""
    names = ("num_samples", "seq_len_range", "feature_dim", "image_size")
    sizes = [flag_of(name) for name in names if has_effect(settings, name)]
    return [
        *([f"a smaller {' or '.join(sizes)}"] if sizes else []),
        *(["fewer items"] if has_effect(settings, "task") else []),
        *(["fewer processes (each holds the data)"] if distributed.size() > 1 else []),
        "closing other programs",
    ]


@contextmanager
def compiler_advice() -> Iterator[None]:
    """Turn a failure of torch.compile on this machine, usually a missing compiler, into a UserError."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, TorchDynamoException) and "torch.compile is not supported" not in str(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"--compile: {reason}; install what is missing, or train with --no_compile") from error


# --- A run -----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training run: what `prepare` makes for `fit` and `finish`."""

    settings: Settings
    data: dict[str, Any]  # its description, see data_utils.load_splits
    task: Task
    splits: dict[str, Any]
    loaders: dict[str, Any]  # of 'train' and 'val'
    device: torch.device
    amp_dtype: torch.dtype | None  # of autocast; None for float32 throughout
    model_args: dict[str, Any]
    state: RunState
    replica: nn.Module  # the model as a step calls it: compiled, and with several processes in DistributedDataParallel
    evaluated: nn.Module  # what is validated: the average of the weights, if one is kept
    sums: StepSums
    log: RunLog
    stop: StopRequest
    own: OwnData | None  # the user's own code, where the data come from there
    resumed_from: Path  # what --resume continues it from; of a run that is part of another one, that of the whole

    @property
    def folder(self) -> Path:
        return Path(self.settings.checkpoint_dir)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def read_sums(self) -> None:
        """Read the sums of the steps from the device. A sum that is not finite ends the run here."""
        self.log.steps(self.sums.read())

    def save(self, name: str) -> None:
        """Write a checkpoint. All processes call this, since each has a part of the state; the first one writes."""
        self.read_sums()  # nothing is saved before it is known to be finite
        state = self.state.state()
        self.log.flush()  # the curves are never behind the checkpoint
        if distributed.is_first():
            about = {"model_args": self.model_args, "settings": self.settings.to_dict(), "data": self.data}
            save_checkpoint(self.folder / name, about | state)
            if name == LAST:
                distributed.remember(CHECKPOINT_OF_THIS_LAUNCH, str(self.resumed_from))


def execute(run: Run) -> None:
    """Train, and test what was trained. A signal ends it earlier: `run.stop.agreed` is that signal.

    Raises:
        UserError: a file that cannot be written, memory that ran out, a loss that is not finite.
    """
    with run.stop:
        fit(run)
        if run.stop.agreed:
            stopped(run)
            return
    finish(run)


# --- Before the first step -------------------------------------------------------------------------------------------


def prepare(
    settings: Settings,
    checkpoint: dict[str, Any] | None = None,
    resumed: Path | None = None,
    own: OwnData | None = None,
    start: finetune.Start | None = None,
    whole: "Whole | None" = None,
) -> Run:
    """Read the data, make the model and everything else, and rehearse a step before any file is written or moved.

    Args:
        checkpoint, resumed: what to continue from, and its file; None for a new run.
        own: the user's own code, for data that come from there.
        start: the model of settings.init_from.
        whole: the run that this one is a part of.

    Raises:
        UserError: a mistake in settings or data, memory that ran out, an output or gradient that is not finite.
    """
    device = distributed.own_device(choose_device(settings.device))
    amp_dtype = choose_precision(settings.amp, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(settings.seed)

    tasks.task_named(settings.task)
    joins = any(has_effect(settings, name) and getattr(settings, name) not in (None, "none")
                for name in ("stem", "series_window"))  # fmt: skip
    if settings.task == "reconstruct" and joins:
        raise UserError("task: reconstruct asks for single tokens, which --stem conv and --series_window join: say "
                        "--stem none and --series_window none")  # fmt: skip
    finetune.check_settings(settings, start)
    base = checkpoint["model_args"] if checkpoint and settings.init_from else start and start.arguments
    check_size(settings, device, base)
    with memory_advice("while reading the data", data_remedies(settings)):
        splits, data = load_splits(settings, checkpoint["data"] if checkpoint else start and start.known, None, own)
    known = checkpoint["data"] if checkpoint else whole.data if whole else {}
    data |= {"selection": known["selection"]} if "selection" in known else {}
    task = tasks.from_description(data["task"])
    if settings.select_by not in (None, LAST_EPOCH, *task.higher_is_better):
        raise UserError(f"select_by: {settings.select_by} is no score of {task.kind}; choose one of "
                        f"{', '.join(task.higher_is_better)}, {LAST_EPOCH}")  # fmt: skip
    if settings.select_by == LAST_EPOCH and settings.early_stopping_patience:
        raise UserError("early_stopping_patience: the run takes its last epoch (--select_by last), whatever the "
                        "validation says; name a score with --select_by, or leave one of the two out")  # fmt: skip
    if chooses_noise(settings, len(splits["val"])):
        settings = dataclasses.replace(settings, select_by=LAST_EPOCH)
        print_note(f"{len(splits['val'])} validation samples are too few to choose an epoch by: the last one is kept "
                   f"(--select_by {next(iter(task.higher_is_better))} chooses)")  # fmt: skip
    training = splits["train"]
    if (passes := passes_of(settings, len(training))) > 1:
        training = training.subset(np.tile(np.arange(len(training)), passes))
    mixup, cutmix = (has_effect(settings, name) * getattr(settings, name) for name in ("mixup", "cutmix"))
    if mixup or cutmix:
        training = Mixed(training, mixup, settings.seed, task, cutmix)
    parts = {"train": training, "val": splits["val"]}
    loaders = {name: new_loader(part, settings, task, device, name == "train") for name, part in parts.items()}
    if checkpoint:
        check_data(checkpoint, data)
        check_model(checkpoint, settings, data, len(loaders["train"]))

    steps_per_epoch = math.ceil(len(loaders["train"]) / settings.accumulation_steps)
    steps = settings.num_epochs * steps_per_epoch
    if checkpoint is None and not whole and is_plain_series(settings) and steps < FEW_STEPS:
        print_note(f"{len(training)} training series and {steps} steps are few: --select auto finds out, by folds of "
                   "them, which tokens and random changes suit them (docs/small_data.md)")  # fmt: skip
    progress = progress_of(checkpoint) if checkpoint else new_progress(settings, steps_per_epoch)
    with memory_advice("for a model of this size", MODEL_REMEDIES):
        model = new_model(settings, data, base).to(device)
        origin = finetune.begin(model, settings, start, data)
        scaled = amp_dtype == torch.float16
        rate, decay = settings.learning_rate, settings.ema_decay
        scale = settings.lr_encoder_scale if has_effect(settings, "lr_encoder_scale") else 1.0
        state = RunState(model, progress, rate, settings.weight_decay, decay, scaled, scale)
    model_args, precision = model_arguments(settings, data, base), amp_dtype or torch.float32
    log = RunLog(settings, task, progress)
    log.start(data, model_args, state.parameter_counts(), device, precision)
    print(*origin, sep="\n", end="\n" * bool(origin))
    if checkpoint:
        state.restore(checkpoint)
        left = (settings.num_epochs - progress.epoch) * steps_per_epoch
        left -= math.ceil(progress.batch / settings.accumulation_steps)
        progress.schedule = progress.schedule.changed(progress.step, settings.learning_rate, progress.step + left)

    run_model = model
    if compiles := has_effect(settings, "compile") and settings.compile:
        with compiler_advice():
            run_model = compiled(model, device, settings.accumulation_steps)
    evaluated = state.kept if state.average else run_model
    if settings.cache_features:
        found = {name: finetune.encode(model, loader, name, device, amp_dtype) for name, loader in loaders.items()}
        loaders = {name: new_loader(data, settings, task, device, name == "train") for name, data in found.items()}
        run_model, evaluated = finetune.Readout(model), finetune.Readout(state.kept)
    stop = StopRequest()
    sums = StepSums(progress, ("objective", *task.step_names), scaled, stop)
    last = whole.last if whole else Path(settings.checkpoint_dir, LAST)
    run = Run(settings, data, task, splits, loaders, device, amp_dtype, model_args, state, run_model, evaluated, sums,
              log, stop, own, last)  # fmt: skip
    # A rehearsal: what would break in the first epoch breaks now, before any file is written or moved
    with compiler_advice() if compiles else nullcontext():
        if compiles:
            print("compiling the model, which may take minutes", flush=True)
        validate(run, batches=2)
        rehearse(run)
    if distributed.size() > 1 and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        print_note("the batch norm of --stem conv for images counts the images of each process by themselves, so the "
                   "run is not quite that of one process")  # fmt: skip
    with memory_advice("for the exchange of gradients", MODEL_REMEDIES):
        run.replica = distributed.replicate(run_model)
    if whole:
        whole.begin()
    log.open(resumed, part=whole is not None)
    for loader in loaders.values():
        loader.worker_init_fn = partial(begin_worker, stop.over)
    restore_random_numbers(checkpoint, settings.seed, progress.step)
    return run


def new_loader(dataset: Any, settings: Settings, task: Task, device: torch.device, training: bool) -> DataLoader:
    return create_dataloader(
        dataset,
        settings.batch_size,
        targets=task,
        shuffle=training,
        bucket_by_length=settings.bucket_by_length and training,
        seed=settings.seed,
        num_workers=settings.num_workers,
        pin_memory=device.type == "cuda",
        share=(distributed.rank(), distributed.size()),
    )


def check_size(settings: Settings, device: torch.device, base: dict[str, Any] | None) -> None:
    """Check that the model can be built and fits the device, before any data is read or downloaded.

    Raises:
        UserError: it cannot, or does not.
    """
    with torch.device("meta"), memory_advice("for a model of this size", MODEL_REMEDIES):
        sketch = new_model(settings, {"features": {"any": {"input_dim": 1}}, "num_outputs": 2}, base)
    number = sum(parameter.numel() for parameter in sketch.parameters())
    check_memory(16 * number, f"weights, gradients and AdamW of {number:,} parameters", device)


def chooses_noise(settings: Settings, num_validation: int) -> bool:
    """Whether the best epoch would be one of many that so few validation samples cannot tell apart.

    Of 50 samples the accuracy has a standard deviation of up to 7 points, and the best of 40 epochs is mostly luck.
    """
    chosen = settings.select_by is None and not settings.early_stopping_patience
    strong = settings.dataset_type == "sequences" and settings.series_recipe == "strong"
    return chosen and (strong or settings.select == "auto") and num_validation < SMALL_VALIDATION


def is_plain_series(settings: Settings) -> bool:
    """Whether series are read step by step and as they are, as nobody has asked for anything else."""
    plain = Settings(dataset_type="sequences")
    names = ("dataset_type", "task", "series_recipe", "stem", "series_window", "epoch_samples", "folds", "select")
    return all(getattr(settings, name) == getattr(plain, name) for name in names)


def passes_of(settings: Settings, num_samples: int) -> int:
    """How often an epoch passes over so many training items, see epoch_samples."""
    return max(1, math.ceil(settings.epoch_samples / num_samples)) if has_effect(settings, "epoch_samples") else 1


def new_progress(settings: Settings, steps_per_epoch: int) -> Progress:
    total_steps = settings.num_epochs * steps_per_epoch
    schedule = Schedule(settings.learning_rate, round(settings.warmup_fraction * total_steps), total_steps)
    kind = settings.model_size if has_effect(settings, "model_size") else "finetuned"
    fold = f"_fold_{settings.fold}" if settings.fold else ""
    return Progress(f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{settings.dataset_type}_{kind}{fold}", schedule)


def progress_of(checkpoint: dict[str, Any]) -> Progress:
    progress = Progress.from_dict(checkpoint["progress"])
    progress.test = {}  # the run is open again until it ends
    return progress


def new_model(settings: Settings, data: dict[str, Any], base: dict[str, Any] | None = None) -> PerceiverModel:
    try:
        return PerceiverModel(**model_arguments(settings, data, base))
    except ValueError as error:
        raise UserError(str(error)) from error


def check_data(checkpoint: dict[str, Any], data: dict[str, Any]) -> None:
    """Check that the data are those of the run so far.

    Raises:
        UserError: they are not.
    """
    for what in ("split_sizes", "fingerprints"):
        if data[what] != checkpoint["data"][what]:
            raise UserError(
                f"the data have changed ({what} were {checkpoint['data'][what]}, now {data[what]}); bring the old data "
                "back in their old order, or start a new run without --resume"
            )


def check_model(checkpoint: dict[str, Any], settings: Settings, data: dict[str, Any], batches: int) -> None:
    """Check that settings, data and weights belong to one model, before memory is taken for it.

    Raises:
        UserError: they do not.
    """
    old = checkpoint["model_args"]
    with naming("the checkpoint's model arguments are refused"):
        check_model_arguments(old)
    base = old if settings.init_from else None
    new = model_arguments(settings, data, base)
    for name in (name for name in old if name not in FIELDS or FIELDS[name].metadata["on_resume"] == "fixed"):
        if old[name] != new.get(name):
            raise UserError(
                f"the checkpoint's model and its settings and data do not agree about {name}: "
                f"{shown(old[name])} and {shown(new.get(name))}"
            )
    with torch.device("meta"):
        check_weights(new_model(settings, data, base), checkpoint["model"])
    if (done := checkpoint["progress"]["batch"]) > batches:
        raise UserError(f"the checkpoint has done {done} batches of an epoch that has {batches}")


def compiled(model: nn.Module, device: torch.device, accumulation_steps: int = 1) -> nn.Module:
    """The compiled model, which draws the same random numbers as the plain one. On CUDA, batches of one shape run as
    CUDA graphs: one launch instead of hundreds.

    A graph leaves its gradients in memory that its next run overwrites, so they cannot be accumulated or exchanged.
    """
    options = {"fallback_random": True}  # dropout by torch's own kernel, as in the plain model
    if device.type == "cuda" and accumulation_steps == 1 and distributed.size() == 1:
        options |= {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True}
    return torch.compile(model, options=options)


def rehearse(run: Run) -> None:
    """Forward and backward pass over the first batch of the epoch. They leave no trace: neither in gradients nor in the
    statistics of a batch norm nor in random numbers.
    """
    model, loader, device = run.replica, run.loaders["train"], run.device
    first = loader.batch_sampler.batches(run.state.progress.epoch)[0]
    numbers = loaded_of(first, distributed.rank(), distributed.size())
    cards = [torch.cuda.current_device()] if device.type == "cuda" else []
    advice = memory_advice(f"with batch_size {run.settings.batch_size}", step_remedies(run.settings))
    before = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng(cards), advice:
        (batch,) = DataLoader(loader.dataset, batch_sampler=[numbers], collate_fn=loader.collate_fn)
        model.train()
        with run.autocast():
            outputs = model(*model_inputs(batch, device), **asked(batch, device), **mix_inputs(batch, device))
            objective(run, outputs, moved(batch["label"], device), batch).backward()
    model.zero_grad(set_to_none=True)
    for buffer, values in zip(model.buffers(), before, strict=True):
        buffer.copy_(values)


# --- The loop --------------------------------------------------------------------------------------------------------


def fit(run: Run) -> None:
    """Train until all epochs are done, early stopping ends it, or a signal asks to stop."""
    settings, task, device = run.settings, run.task, run.device
    state, progress, stop = run.state, run.state.progress, run.stop
    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    parameters = list(model.parameters())
    rank, size = distributed.rank(), distributed.size()
    batch_size, remedies = f"with batch_size {settings.batch_size}", step_remedies(settings)

    while not (stop.agreed or progress.is_finished(settings.num_epochs, settings.early_stopping_patience)):
        # One epoch. Its order and augmentation depend on seed and epoch alone
        model.train()
        set_epoch(run.loaders["train"], progress.epoch, progress.batch)
        # The sample numbers of every batch still to come; each process computes its share of them
        order = run.loaders["train"].batch_sampler.batches(progress.epoch)[progress.batch :]
        batches = iter(run.loaders["train"])
        run.log.begin_epoch(len(order))
        for first in range(0, len(order), settings.accumulation_steps):
            # One optimizer step, on the mean loss of the samples of one or more batches
            group = order[first : first + settings.accumulation_steps]
            samples = [number for batch in group for number in batch]
            rate = progress.schedule(progress.step)
            state.set_rate(rate)
            sums = torch.zeros(1 + len(task.step_names), device=device)
            for numbers in group:
                batch = next(batches)
                # 0 if a short last batch leaves this process none: it then computes a dummy sample that does not count,
                # so that all processes call backward
                own = len(share_of(numbers, rank, size))
                exchange = nullcontext() if numbers is group[-1] else distributed.no_sync(run.replica)
                if not own:
                    hide(batch)
                longest = f"samples of up to {token_counts(batch).max()} tokens"
                with memory_advice(f"{batch_size} and {longest}", remedies, GO_ON), exchange:
                    x, mask = model_inputs(batch, device)
                    targets = moved(first_samples(batch["label"], own), device)
                    with run.autocast():
                        outputs = run.replica(x, mask, **asked(batch, device), **mix_inputs(batch, device))
                        outputs = first_samples(outputs, own)  # (own, num_outputs)
                        total = objective(run, outputs, targets, batch)  # summed over the samples
                    # DistributedDataParallel takes the mean over the processes, so scale by their number
                    scaler.scale(total * size / len(samples)).backward()
                    with torch.no_grad():
                        step_sums = task.step_sums(mapped(Tensor.detach, outputs), targets)
                        sums += torch.cat([total.detach()[None], step_sums])
            signals = torch.tensor([float(number == stop.signal) for number in STOP_SIGNALS])
            sums = torch.cat([sums, signals.to(device, non_blocking=True)])  # without waiting for the card
            distributed.all_reduce(sums)
            scaler.unscale_(optimizer)  # before clipping, so that the limit and the logged norm are the true ones
            norm = nn.utils.clip_grad_norm_(parameters, settings.grad_clip or math.inf)
            with memory_advice(f"{batch_size} and the optimizer's state", remedies, GO_ON):
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if state.average:
                state.average.update_parameters(model)

            progress.step += 1
            progress.batch += len(group)
            run.sums.add(rate, samples, torch.cat([sums, norm[None]]))
            if device.type == "cpu" or progress.step % READ_EVERY == 0:
                run.read_sums()
            run.log.advance(len(group))
            if settings.save_every and progress.step % settings.save_every == 0 and group[-1] is not order[-1]:
                run.save(LAST)
            if stop.agreed:
                break
        del batches  # and the processes that loaded them
        run.read_sums()
        run.log.end_steps()
        if stop.agreed:
            break

        # Validation, and the epoch's line in the log
        metrics, figures = validate(run)
        line = run.log.line(figures)
        better = progress.end_epoch(line, partial(task.score, select_by=settings.select_by))
        run.log.epoch(metrics, better)
        if better:
            run.save(BEST)
        run.save(LAST)


def objective(run: Run, outputs: Any, targets: Any, batch: dict[str, Any]) -> Tensor:
    """What is minimised, summed over the first samples of the batch, of which these are the outputs and targets; where
    samples are mixed, that of the labels of both, by their shares."""
    task, settings = run.task, run.settings
    if "mix" not in batch:
        return task.objective(outputs, targets, settings)
    mix = {name: moved(first_samples(batch["mix"][name], len(outputs)), outputs.device) for name in ("weight", "label")}
    own, others = mix["weight"], 1 - mix["weight"]
    return task.objective(outputs, targets, settings, own) + task.objective(outputs, mix["label"], settings, others)


def stopped(run: Run) -> None:
    """Save the run that a signal stopped, and say how to continue it."""
    run.save(LAST)
    command = f"{distributed.launcher()} train.py --resume {quoted(run.resumed_from)}{named_again(run.own)}"
    if run.settings.dataset_type == PYTHON:
        command = f"train(settings, data=..., resume={str(run.resumed_from)!r})"
    say(
        f"{signal.Signals(run.stop.agreed).name}: saved {printable(str(run.folder / LAST))} at step "
        f"{run.state.progress.step}. Continue with: {command}"
    )
    distributed.barrier()


def named_again(own: OwnData | None) -> str:
    """What a command needs that opens a checkpoint of the user's own code again."""
    return f" --dataset {quoted(own.path)}" if own and own.path else ""


# --- Evaluation ------------------------------------------------------------------------------------------------------


def collect(
    model: nn.Module, loader: Any, task: Task, device: torch.device, amp_dtype: torch.dtype | None, what: str,
    batches: int | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The rows of `evaluation.collect` over the first `batches` of a loader, gathered in the first process; {} in the
    others. what: is done, for a bar on a terminal."""
    some = with_progress(islice(loader, batches), what, batches or len(loader), lines=False)
    found = evaluation.collect(model, some, task, device, amp_dtype)
    parts = distributed.gather(found)
    return unshared(parts, loader.batch_sampler.batches(0)[:batches]) if parts else {}


def metrics_of(task: Task, rows: dict[str, np.ndarray], split: str) -> dict[str, Any]:
    """The metrics of the rows from `collect`, in all processes.

    Raises:
        UserError: some outputs are not finite.
    """
    try:
        return distributed.broadcast(lambda: task.metrics(rows))
    except ValueError as error:
        raise UserError(f"{split}: {error}; lower --lr or use --amp off, then continue with --resume") from error


def validate(run: Run, batches: int | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """(all metrics of the validation split or of its first batches, those that the log keeps)."""
    settings = run.settings
    when = f"in validation with batch_size {settings.batch_size}"
    with memory_advice(when, step_remedies(settings), "" if batches else GO_ON):
        rows = collect(run.evaluated, run.loaders["val"], run.task, run.device, run.amp_dtype, "validating", batches)
    task = run.task
    if settings.tune_thresholds:
        task = distributed.broadcast(lambda: task.tuned(rows))
    if batches is None:
        run.task, run.data["task"] = task, tasks.describe(task)
    metrics = metrics_of(task, rows, "validation")
    return metrics, task.epoch_figures(metrics, settings.select_by)


# --- After the last step ---------------------------------------------------------------------------------------------


AT_THE_END = ("a smaller --batch_size", "closing other programs")  # what helps where memory runs out


def finish(run: Run) -> None:
    """Draw the curves, test the best model, record that the run has ended, and say what to do next.

    The model of a fold is not tested: the test data are looked at once, by all of them together."""
    progress = run.state.progress
    with memory_advice("at the end", AT_THE_END, GO_ON):
        run.log.draw_curves()
        if run.settings.fold:
            run.log.end_fold()
            return
        model, tested, file = best_model(run)
        progress.test = {"epoch": tested["epoch"]} | test(model, run.splits, run.settings, run.device, run.amp_dtype)
    run.log.end(tested, file, file.name == BEST, named_again(run.own))
    run.save(LAST)  # with the test figures: the run has ended
    run.log.close()


def test(
    model: nn.Module, splits: dict[str, Any], settings: Settings, device: torch.device, amp_dtype: torch.dtype | None
) -> dict[str, Any]:
    """The headline metric of the test split, its baseline where it has one, and the number of samples."""
    task, share = model.task, (distributed.rank(), distributed.size())
    loader = create_dataloader(splits["test"], settings.batch_size, share=share, targets=task,
                               num_workers=settings.num_workers)  # fmt: skip
    metrics = metrics_of(task, collect(model, loader, task, device, amp_dtype, "testing"), "test")
    figures = {task.headline: metrics[task.headline], "num_samples": metrics["num_samples"]}
    if (baseline := metrics.get(f"baseline_{task.headline}")) is not None:
        figures["baseline"] = baseline
    return figures


def best_model(run: Run) -> tuple[PerceiverModel, dict[str, Any], Path]:
    """(the model of the best epoch, the log's line of that epoch, its file); else those of the last one."""
    progress, folder, own = run.state.progress, run.folder, run.own.classes if run.own else None
    if checkpoint := distributed.broadcast(best_checkpoint, folder, progress):
        return equipped_model(checkpoint, run.device, own), progress.best, folder / BEST
    model = run.state.kept
    equip(model, run.data, own)
    if progress.best:
        print_note(
            f"{folder / BEST} no longer holds this run's best model (epoch {progress.best['epoch']}); the last one, "
            f"{folder / LAST}, is tested instead"
        )
    return model, progress.history[-1] if progress.history else {}, folder / LAST


def best_checkpoint(folder: Path, progress: Progress) -> dict[str, Any] | None:
    """The checkpoint of this run's best epoch, or None if its file is gone, damaged or of another run."""
    try:
        checkpoint = load_checkpoint(folder / BEST)
        found = checkpoint["progress"]["run_name"], checkpoint["epoch"]
    except (UserError, KeyError, TypeError):  # not written by a run
        return None
    return checkpoint if found == (progress.run_name, progress.best.get("epoch")) else None


# --- The models of several folds -------------------------------------------------------------------------------------


class Whole:
    """A run of several models, each of which is trained by a run in a folder of its own.

    Args:
        settings: of the whole; each model has them, too.
        data: the description of all training data.
        new: whether this begins; else it is resumed.
        place: more of what it is resumed from, see folds.save_place.
    """

    def __init__(self, settings: Settings, data: dict[str, Any], new: bool, **place: Any):
        self.settings, self.data, self.new, self.begun, self.place = settings, data, new, False, place
        self.last, self.screen = Path(settings.checkpoint_dir, LAST), sys.stdout

    def begin(self) -> None:
        """Before the first file of a model is written, write what the whole is resumed from."""
        if not self.begun and distributed.is_first():
            with redirect_stdout(self.screen):  # also where the lines of a model are not shown
                open_whole(self.settings, self.new)
            folds.save_place(self.settings, self.data, **self.place)
            distributed.remember(CHECKPOINT_OF_THIS_LAUNCH, str(self.last))
        self.begun = True


def train_folds(
    settings: Settings,
    sources: dict[str, str],
    checkpoint: dict[str, Any] | None = None,
    changes: tuple[dict[str, Any], dict[str, Any]] = ({}, {}),
    own: OwnData | None = None,
    start: finetune.Start | None = None,
) -> Run | None:
    """Train the models of all folds, and test their mean. A signal ends it earlier, in the run that is returned.

    Args:
        checkpoint: what to continue from, see folds.save_place; None for a new run.
        changes: with it, the settings that are given anew, as flags and in a file.
    """
    show_settings(settings, sources, start)
    with distributed.first_process_first(), memory_advice("while reading the data", data_remedies(settings)):
        splits, data = load_splits(settings, checkpoint["data"] if checkpoint else start and start.known, None, own)
    if checkpoint:
        check_data(checkpoint, data)
        data |= {"selection": known["selection"]} if "selection" in (known := checkpoint["data"]) else {}
    whole, run = Whole(settings, data, new=checkpoint is None), None
    for fold in range(1, settings.folds + 1):
        member = folds.member(settings, fold)
        say(f"\nfold {fold} of {settings.folds}, in {printable(member.checkpoint_dir)}")
        run = train_fold(member, whole, changes, own, start) or run
        if run and run.stop.agreed:
            return run
    ended = checkpoint and checkpoint["test"] and not whole.begun
    if ended and distributed.broadcast(whole.last.with_name(BEST).exists):
        print(f"\nnothing is left to do: all {settings.folds} models have done {settings.num_epochs} epochs; to train "
              "longer, raise --epochs")  # fmt: skip
        return None
    finish_folds(whole, splits, own)
    return run


def train_fold(
    settings: Settings, whole: Whole, changes: tuple[dict, dict], own: OwnData | None, start: finetune.Start | None
) -> Run | None:
    """Begin or continue the model of a fold, unless its run has ended."""
    last = Path(settings.checkpoint_dir, LAST)
    if not distributed.broadcast(last.exists) or (whole.new and not whole.begun):
        return train_one(settings, None, None, own, start_again(settings, start), whole)
    flags, file = ({n: v for n, v in given.items() if n != "checkpoint_dir"} for given in changes)
    checkpoint = distributed.broadcast(load_checkpoint, last)
    settings, _ = resumed(SimpleNamespace(resume=str(last), flags=flags, file=file), own, checkpoint)
    if has_ended(settings, Progress.from_dict(checkpoint["progress"])):
        say("its run has ended")
        return None
    return train_one(settings, checkpoint, last, own, whole=whole)


def train_selected(
    settings: Settings,
    sources: dict[str, str],
    checkpoint: dict[str, Any] | None = None,
    changes: tuple[dict[str, Any], dict[str, Any]] = ({}, {}),
    own: OwnData | None = None,
    start: finetune.Start | None = None,
) -> Run | None:
    """Choose the best candidate by folds of the training data, and train with it. Arguments as for `train_folds`."""
    if checkpoint is None or "candidates" in checkpoint:
        settings, sources, checkpoint, run = select(settings, sources, checkpoint, changes, own, start)
        if run:
            return run
    if distributed.is_first():
        for weights in Path(settings.checkpoint_dir, selection.FOLDER).glob("*/fold_*/*.pth"):
            weights.unlink()  # logs and curves stay
    if folds.of_folds(settings):
        return train_folds(settings, sources, checkpoint, changes, own, start)
    whole = Whole(settings, checkpoint["data"], new=False)
    whole.begun = True  # its folder is ready, and what is resumed is the run itself from its first save on
    show_settings(settings, sources, None)
    return train_one(settings, None, None, own, start_again(settings, start), whole)


def select(
    settings: Settings, sources: dict[str, str], checkpoint: dict[str, Any] | None,
    changes: tuple[dict[str, Any], dict[str, Any]], own: OwnData | None, start: finetune.Start | None,
) -> tuple[Settings, dict[str, str], dict[str, Any], Run | None]:  # fmt: skip
    """(the settings with the best candidate, and where they come from; what the run is resumed from; None, or the run
    of a candidate that a signal ended)."""
    show_settings(settings, sources, start)
    start = start_again(settings, start)
    number = settings.folds or selection.FOLDS
    on_folds = dataclasses.replace(settings, folds=number, fold=None)
    with distributed.first_process_first(), memory_advice("while reading the data", data_remedies(settings)):
        splits, data = load_splits(on_folds, checkpoint["data"] if checkpoint else start and start.known, None, own)
    if checkpoint:
        check_data(checkpoint, data)
        found = selection.checked(checkpoint["candidates"])
        selection.check_changes(found, {name for given in changes for name in given})
    else:
        found = selection.candidates(settings, sources, splits["train"])
    task = tasks.from_description(data["task"])
    metric = selection.metric_of(settings, task)
    whole = Whole(settings, data, new=checkpoint is None, candidates=found)
    free = {name for name, field in FIELDS.items() if field.metadata["on_resume"] == "free"} - {"num_epochs"}
    flags, file = ({name: value for name, value in given.items() if name in free} for given in changes)
    halved = len(found) > selection.FEW and data["split_sizes"]["train"] // number >= SMALL_VALIDATION
    half = ",\n        of which the better half goes on after the first fold" if halved else ""
    about = f" for short series (fewer than {SHORT_SERIES} steps)" * selection.are_short(settings, splits["train"])
    say(
        f"\nselect: {len(found)} candidates{about} on {number} folds of the training data, each for "
        f"{settings.select_share:g} of its epochs{half}\n{selection.run_heading(found, metric)}"
    )
    going, results = found, {one["name"]: [] for one in found}  # of each run (its line of the log, its seconds)
    for fold in range(1, number + 1):
        for one in going:
            short = selection.short_run(settings, one, fold)
            shown = io.StringIO()  # its bar is seen, its lines are not
            with naming(f"candidate {one['name']}"), redirect_stdout(shown):
                run = train_fold(short, whole, (flags, file), own, start)
            if run and run.stop.agreed:
                say(shown.getvalue().rstrip().splitlines()[-1] if distributed.is_first() else "")
                return settings, sources, {}, run
            progress = distributed.broadcast(load_checkpoint, Path(short.checkpoint_dir, LAST))["progress"]
            results[one["name"]].append((progress["best"], sum(line["seconds"] for line in progress["history"])))
            say(selection.run_line(selection.row(one, metric, results[one["name"]][-1:]), fold, found))
        rows = [selection.row(one, metric, results[one["name"]]) for one in found]
        if fold == 1 and halved:
            better = selection.better_half(rows, task)
            going = [one for one in found if one["name"] in better]
    say("\n".join(["", selection.heading(found, metric), *(selection.line(one, found) for one in rows)]))
    chosen, why = selection.best(rows, task)
    chosen["chosen"] = True
    say(f"chosen: {chosen['name']} ({selection.flags_of(chosen)}), {why}\n")
    taken = {name: value for name, value in chosen["settings"].items() if not any(name in given for given in changes)}
    settings, sources = dataclasses.replace(settings, **taken), sources | dict.fromkeys(taken, "select")
    _, data = load_splits(dataclasses.replace(on_folds, **taken), start and start.known, None, own)
    data["selection"] = rows
    if distributed.is_first():
        open_whole(settings, new=False)
        folds.save_place(settings, data)
    distributed.barrier()
    return settings, sources, {"data": data, "test": {}}, None


def start_again(settings: Settings, start: finetune.Start | None) -> finetune.Start | None:
    """The model that a run starts from, for another run, which takes its weights out."""
    if settings.init_from and start is None:  # a resumed run, of which a part has not begun
        start = distributed.broadcast(finetune.read_start, settings.init_from)
    return start and dataclasses.replace(start, weights=dict(start.weights))


def finish_folds(whole: Whole, splits: dict[str, Any], own: OwnData | None) -> None:
    """Put the models together into one checkpoint, and test their mean."""
    settings, file = whole.settings, Path(whole.settings.checkpoint_dir, BEST)
    device = distributed.own_device(choose_device(settings.device))
    amp_dtype = choose_precision(settings.amp, device)
    with memory_advice("at the end", AT_THE_END, GO_ON):
        if distributed.is_first():
            kept = [kept_checkpoint(Path(folds.member(settings, 1 + i).checkpoint_dir)) for i in range(settings.folds)]
            save_checkpoint(file, folds.together(settings, whole.data, kept))
        checkpoint = distributed.broadcast(load_checkpoint, file)
        model = equipped_model(checkpoint, device, own.classes if own else None)
        figures = test(model, splits, settings, device, amp_dtype)
    members, task = checkpoint["members"], model.task
    if distributed.is_first():
        save_checkpoint(file, {**checkpoint, "test": figures})
        folds.save_place(settings, whole.data, members, figures)
    label, found = task.headline.replace("_", " "), folds.estimate(task, members)
    beside = f"the training mean as answer: {figure_text(figures['baseline'])}; " if "baseline" in figures else ""
    print(
        f"\n{folds.table(task, members)}\n"
        f"each on its own fold: validation {label} {folds.estimate_text(found)}\n"
        f"all of them together: test {label} {figure_text(figures[task.headline])} ({beside}"
        f"{figures['num_samples']} samples, touched only now)\n"
        f"next:   {next_step(settings, file, named_again(own))}"
    )


def kept_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the checkpoint of the best epoch of the run in this folder, the log's line of that epoch); else of the last."""
    last = load_checkpoint(folder / LAST)
    progress = Progress.from_dict(last["progress"])
    if best := best_checkpoint(folder, progress):
        return best, progress.best
    print_note(f"{folder / BEST} no longer holds this run's best model; the last one, {folder / LAST}, takes its place")
    return last, progress.history[-1]


# --- From Python ------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What `train` returns.

    Args:
        model: of the best epoch on validation data, on the device of training; for `inference.predict` and `evaluate`.
        history: a dict per epoch, as in log.jsonl: train_loss, val_loss, val_accuracy, ...; of several folds one after
            the other, each with its 'fold'.
        best: that of the best epoch; of several folds their estimate, see `folds.estimate`.
        test: figures of the best model on the test data; empty where the run was stopped.
        checkpoint: the model's file, for `inference.load_model`.
        splits: the data sets 'train', 'val' and 'test' as the model read them, for `inference.evaluate`.
        stopped: the signal that stopped the run (in a notebook, the button "interrupt": SIGINT), or None.
    """

    model: PerceiverModel
    history: list[dict[str, Any]]
    best: dict[str, Any]
    test: dict[str, Any]
    checkpoint: Path
    splits: dict[str, Any]
    stopped: int | None


def train(
    settings: Settings,
    data: dict[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    adapters: Any = None,
    resume: str | Path | None = None,
) -> Result:
    """Train from Python, in a notebook or a script, as the command does: the same checks, splits, files and figures.

        settings = Settings(model_size="tiny", num_epochs=20)
        result = train(settings, data={"train": items}, class_names=["falls", "rises"])
        predict(result.model, [array])

    Args:
        settings: of the run, `task` among them. `config.resolve({...})[0]` gives those with a data set's defaults.
        data: {'train': ..., 'val': ..., 'test': ...}, each a list of items or a `Dataset`, see own_data.py; a missing
            val or test is split off. None for a data set by name, settings.dataset_type.
        class_names: of classes 0, 1, ...; None where labels are the names.
        adapters: what makes tokens of the items' inputs, where these are not tokens (L, C).
        resume: the checkpoint to continue from, with the same settings and data.

    Raises:
        UserError: as `prepare` and `execute`.
    """
    own = None
    if data is not None:
        if settings.dataset_type not in (Settings.dataset_type, PYTHON):
            raise UserError(f"dataset_type is {settings.dataset_type}, and data are given; leave one of them out")
        settings = dataclasses.replace(settings, dataset_type=PYTHON)
        own = own_data.of_python(data, class_names, adapters)
    elif class_names is not None or adapters is not None:
        raise UserError("class_names, adapters: they go with data, which is not given")
    with distributed.processes():
        if resume is None:
            default = {name for name, value in vars(settings).items() if value == FIELDS[name].default}
            sources = {name: "default" if name in default else "given" for name in FIELDS}
            start = distributed.broadcast(finetune.read_start, settings.init_from) if settings.init_from else None
            run = begin(settings, sources, own, start)
            last = Path(settings.checkpoint_dir, LAST)
        else:
            earlier = load_checkpoint(resume)
            known = earlier["settings"]
            chosen = {name for one in earlier["data"].get("selection", []) if one["chosen"] for name in one["settings"]}
            if settings.select_by is None and known.get("select_by") == LAST_EPOCH:
                chosen.add("select_by")  # by the run itself, see `chooses_noise`
            changes = {
                name: value for name, value in settings.to_dict().items()
                if known.get(name) != value and name not in chosen
            }  # fmt: skip
            run = resume_run(SimpleNamespace(resume=str(resume), flags=changes, file={}), own)
            last = Path(resume)
        if folds.of_folds(settings) and not (run and run.stop.agreed):
            return result_of_folds(last.parent, settings, own)
        last = run.folder / LAST if run else Path(resume)
        checkpoint = distributed.broadcast(load_checkpoint, last)
        progress = Progress.from_dict(checkpoint["progress"])
        best = distributed.broadcast(best_checkpoint, last.parent, progress)
    device = run.device if run else distributed.own_device(choose_device(settings.device))
    model = equipped_model(best or checkpoint, device, own and own.classes)
    file = last.parent / BEST if best else last
    splits = run.splits if run else load_splits(settings, checkpoint["data"], None, own)[0]
    return Result(model, progress.history, progress.best, progress.test, file, splits, run and run.stop.agreed)


def result_of_folds(folder: Path, settings: Settings, own: OwnData | None) -> Result:
    """The result of a run of all folds that has ended."""
    checkpoint = distributed.broadcast(load_checkpoint, folder / BEST)
    model = equipped_model(checkpoint, distributed.own_device(choose_device(settings.device)), own and own.classes)
    history = [
        {"fold": one["fold"], **line}
        for one in checkpoint["members"]
        for line in load_checkpoint(folder / f"fold_{one['fold']}" / LAST)["progress"]["history"]
    ]
    best = folds.estimate(model.task, checkpoint["members"])
    splits, _ = load_splits(Settings.from_dict(checkpoint["settings"]), model.data_info, None, own)
    return Result(model, history, best, checkpoint["test"], folder / BEST, splits, None)


# --- Command line ----------------------------------------------------------------------------------------------------


def keep_place(checkpoint: dict[str, Any], inexact: dict[str, tuple[Any, Any]], settings: Settings) -> None:
    """Recount the batches done in an unfinished epoch by the new batch size; the samples and their order stay."""
    progress, size = checkpoint["progress"], settings.batch_size
    old_size = Settings.from_dict(checkpoint["settings"]).batch_size
    num_samples = checkpoint["data"]["split_sizes"]["train"]
    num_samples *= passes_of(settings, num_samples)
    done = min(progress["batch"] * old_size, num_samples)
    if done == 0 or not inexact.keys() & {"batch_size", "bucket_by_length"}:
        return
    if "bucket_by_length" in inexact or settings.bucket_by_length or (done % size and done < num_samples):
        raise UserError(
            f"batch_size or bucket_by_length: cannot change {done} samples into an epoch; resume without it, or with "
            f"--no_bucket_by_length and a batch_size that divides {done}"
        )
    progress["batch"] = math.ceil(done / size)


def settings_again(
    args: Any, checkpoint: dict[str, Any], own: OwnData | None, *runs: str
) -> tuple[Settings, dict[str, str]]:
    """(the settings of a resumed run, where they came from). runs: names of folders below log_dir that show whose it
    is."""
    path = Path(args.resume)
    if is_code(dataset := checkpoint["settings"].get("dataset_type")) or dataset == PYTHON:
        own_data.require(own, dataset)
    for note in own.changed(checkpoint["data"]) if own else []:
        print_note(note)
    asked = {**args.file, **args.flags}
    if Path(asked.get("checkpoint_dir", path.parent)).resolve() != path.parent.resolve():
        raise UserError(
            f"--checkpoint_dir {asked['checkpoint_dir']}: a resumed run stays in the folder of its checkpoint, "
            f"{path.parent}; leave --checkpoint_dir out"
        )
    settings, sources = resolve(args.flags, args.file, base=checkpoint["settings"])
    settings = dataclasses.replace(settings, checkpoint_dir=str(path.parent))
    if distributed.is_first():
        check_folder("log_dir", settings, sources, *runs)
        check_folder("data_dir", settings, sources, *CIFAR10_FILES)
        check_cache(settings, sources)
    return settings, sources


def resumed(args: Any, own: OwnData | None, checkpoint: dict[str, Any]) -> tuple[Settings, dict[str, str]]:
    """(the settings of the run that this checkpoint continues, where they came from)."""
    check_run(checkpoint, args.resume)
    settings, sources = settings_again(args, checkpoint, own, checkpoint["progress"]["run_name"])
    changes = changed_settings(checkpoint["settings"], settings)
    inexact = changes["inexact"]
    keep_place(checkpoint, inexact, settings)
    for name, (old, new) in inexact.items():
        print_note(f"{name} changed from {old} to {new}: the result is no longer that of an unbroken run")
    old, new = 1 + len(checkpoint.get("other_random_states", [])), distributed.size()
    if old != new:
        print_note(f"processes changed from {old} to {new}: the batches stay the same, dropout draws other masks")
    old, new = checkpoint.get("threads"), torch.get_num_threads()
    if old not in (None, new) and choose_device(settings.device).type == "cpu":
        print_note(
            f"threads changed from {old} to {new} (OMP_NUM_THREADS): sums are added in another order, so the weights "
            "will differ in their last digits from those of an unbroken run"
        )
    if "num_epochs" in changes["free"]:
        old, new = changes["free"]["num_epochs"]
        print_note(
            f"num_epochs changed from {old} to {new}: the learning rate follows the new length from here on, but does "
            "not rise"
        )
    return settings, sources


def command(argv: list[str] | None) -> int:
    args = make_parser(__doc__).parse_args(argv)
    if earlier := distributed.recall(CHECKPOINT_OF_THIS_LAUNCH):
        print_note("torchrun restarted the processes")
        args.resume = earlier
    own = own_code(args)
    try:
        run = resume_run(args, own) if args.resume else new_run(args, own)
    except KeyboardInterrupt:  # before the first step, after the last, or the second one
        print("interrupted; --resume continues from the last checkpoint, if one was saved")
        return 128 + signal.SIGINT
    if run is None or not run.stop.agreed or distributed.is_started_again():
        return 0
    return 128 + run.stop.agreed


def own_code(args: Any) -> OwnData | None:
    """The file of the user's own code that --dataset names. Code runs where the command names it, and nowhere else."""
    dataset = args.flags.get("dataset_type")
    if dataset is None and is_code(args.file.get("dataset_type")):
        name = Path(args.file["dataset_type"]).name
        raise UserError(f"{args.config}: dataset_type: {name} is code, which a file of settings does not run; name it "
                        f"on the command line: --dataset path/to/{name}")  # fmt: skip
    if not is_code(dataset):
        return None
    own = own_data.load_file(dataset)
    args.flags["dataset_type"] = own.name
    return own


def new_run(args: Any, own: OwnData | None) -> Run:
    asked = {**args.file, **args.flags}
    start = distributed.broadcast(finetune.read_start, asked["init_from"]) if asked.get("init_from") else None
    settings, sources = resolve(args.flags, args.file, own=own and own.defaults, start=start and start.settings)
    return begin(settings, sources, own, start)


def begin(
    settings: Settings, sources: dict[str, str], own: OwnData | None, start: finetune.Start | None
) -> Run | None:
    """Begin a new run, or that of all folds."""
    with owned_by_first(settings.checkpoint_dir):
        train_it = train_folds if folds.of_folds(settings) else show_and_train
        if settings.select == "auto" and settings.fold is None:
            train_it = train_selected
        return train_it(settings, sources, own=own, start=start)


def owned_by_first(folder: str | Path) -> AbstractContextManager:
    """Own the folder of a run, in the first process, which alone writes there."""
    return owned(folder) if distributed.is_first() else nullcontext()


def resume_run(args: Any, own: OwnData | None) -> Run | None:
    """Continue a run, unless it has ended."""
    folder = Path(args.resume).parent
    if folder.name.startswith("fold_") and (folder.parent / LAST).exists():  # a run of all folds may be at work on it
        folder = folder.parent
    writable = os.access(folder, os.W_OK)  # a finished run may lie in a folder that is not
    with owned_by_first(folder) if writable else nullcontext():
        checkpoint = distributed.broadcast(load_checkpoint, args.resume)
        if "members" not in checkpoint:
            return _resume(args, own, checkpoint)
        runs = distributed.broadcast(folds.check_place, checkpoint, args.resume)
        settings, sources = settings_again(args, checkpoint, own, *runs)
        train_it = train_selected if settings.select == "auto" else train_folds
        return train_it(settings, sources, checkpoint, (args.flags, args.file), own)


def _resume(args: Any, own: OwnData | None, checkpoint: dict[str, Any]) -> Run | None:
    settings, sources = resumed(args, own, checkpoint)
    progress = Progress.from_dict(checkpoint["progress"])
    if has_ended(settings, progress):
        more = "--epochs" if progress.epoch >= settings.num_epochs else "--early_stopping_patience"
        print(
            f"nothing is left to do: {printable(args.resume)} has done {progress.epoch} of {settings.num_epochs} "
            f"epochs; to train longer, raise {more}"
        )
        return None
    headline = tasks.from_description(checkpoint["data"]["task"], "the checkpoint's task").headline
    print(
        f"resuming {printable(args.resume)}: {progress.epoch} of {settings.num_epochs} epochs done, batch "
        f"{progress.batch} of the next, step {progress.step}, best validation {headline.replace('_', ' ')} "
        + (figure_text(progress.best[f"val_{headline}"]) if progress.best else "none yet")
    )
    return show_and_train(settings, sources, checkpoint, Path(args.resume), own)


def has_ended(settings: Settings, progress: Progress) -> bool:
    """Whether nothing is left to do of a run: it was tested, unless it is one of several folds, and has its curves."""
    finished = progress.is_finished(settings.num_epochs, settings.early_stopping_patience)
    tested = progress.test or settings.fold
    curves = Path(settings.checkpoint_dir, CURVES)  # drawn again if they were removed
    return bool(finished and tested and distributed.broadcast(curves.exists))


def show_and_train(
    settings: Settings,
    sources: dict[str, str],
    checkpoint: dict[str, Any] | None = None,
    resumed: Path | None = None,
    own: OwnData | None = None,
    start: finetune.Start | None = None,
) -> Run:
    """Show the settings and train."""
    show_settings(settings, sources, start)
    return train_one(settings, checkpoint, resumed, own, start)


def show_settings(settings: Settings, sources: dict[str, str], start: finetune.Start | None) -> None:
    file = Path(settings.checkpoint_dir, "settings.json")
    print(f"settings that are not at their default, or were given (all of them: {printable(str(file))})")
    print(format_settings(settings, sources, in_force(settings)))
    for note in [*unused_settings(settings, sources), *(start.differences(settings, sources) if start else [])]:
        print_note(note)


def train_one(
    settings: Settings,
    checkpoint: dict[str, Any] | None = None,
    resumed: Path | None = None,
    own: OwnData | None = None,
    start: finetune.Start | None = None,
    whole: Whole | None = None,
) -> Run:
    """Begin or continue one run. Arguments as for `prepare`."""
    run = prepare(settings, checkpoint, resumed, own, start, whole)
    if checkpoint is None:
        run.save(LAST)  # what --resume continues from if the run ends before its first save
    execute(run)
    return run


def in_force(settings: Settings) -> dict[str, Any]:
    """What `auto` and `none` stand for on this machine and in this model."""
    device = choose_device(settings.device)
    preset = MODEL_SIZES[settings.model_size]
    width, heads = settings.d_model or preset["d_model"], settings.num_heads or preset["num_heads"]
    amp = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(choose_precision(settings.amp, device), "off")
    others = {"cross_attention_dim": width, "num_cross_attention_heads": heads}
    return {**preset, **others, "device": device.type, "amp": amp}


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    with distributed.processes():
        return command(argv)


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files; a notebook hands down a backend that may not exist here
    sys.exit(main())
