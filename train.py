"""Train a Perceiver.

    python train.py --dataset digits                                    # real 8x8 images, minutes on a laptop CPU
    python train.py --dataset synthetic --epochs 10 --batch_size 16     # sequences of different lengths
    python train.py --dataset cifar10 --model_size small --epochs 100 --lr 1e-4
    python train.py --dataset cifar10 --config config.json --lr 2e-4    # a flag goes over the file
    python train.py --resume                                            # go on from checkpoints/last_model.pth
    torchrun --standalone --nproc_per_node=2 train.py --dataset digits  # the same run on two devices (distributed.py)

A run writes into --checkpoint_dir: best_model.pth (best on validation data), last_model.pth (for --resume),
settings.json, log.jsonl (a line per epoch) and training_curves.png; and TensorBoard events under --log_dir.
"""

import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import distributed
import evaluation
import plots
from checkpoint import (
    BEST,
    LAST,
    build_model,
    check_model_arguments,
    check_weights,
    load_checkpoint,
    load_weights,
    model_arguments,
    save_checkpoint,
)
from config import (
    FIELDS,
    OWN_DATA,
    Settings,
    UserError,
    changed_settings,
    check_folder,
    check_memory,
    choose_device,
    choose_precision,
    exit_on_user_error,
    flag_of,
    format_settings,
    has_effect,
    make_parser,
    memory_advice,
    print_note,
    printable,
    quoted,
    resolve,
    unused_settings,
)
from data_utils import (
    CIFAR10_FILES,
    create_dataloader,
    load_splits,
    loaded_of,
    random_stream,
    set_epoch,
    share_of,
    unshared,
)
from files import disk_advice, owned
from perceiver_model import PerceiverModel
from progress import (
    STOP_SIGNALS,
    Progress,
    Schedule,
    StopRequest,
    begin_worker,
    check_run,
    moving_average,
    random_state,
    restore_optimizer,
    restore_scaler,
    set_random_state,
)
from run_log import CURVES, StepLog, log_end, log_epoch, open_run, print_run, progress_bar, say
from schema import shown

CHECKPOINT_OF_THIS_LAUNCH = "checkpoint"  # what processes that torchrun starts anew go on from
READ_EVERY = 20  # optimizer steps; on a CPU, where reading costs nothing, every one


# --- Weight decay and memory ------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: the weight matrices of linear layers decay; biases, norms and the latents do not."""
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in matrices], "weight_decay": 0.0},
    ]


GO_ON = "; the last checkpoint is whole, go on from it with --resume"


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
    """The settings of this data set that make it smaller."""
    names = ("num_samples", "seq_len_range", "feature_dim", "image_size")
    sizes = [flag_of(name) for name in names if has_effect(settings, name)]
    return [
        *([f"a smaller {' or '.join(sizes)}"] if sizes else []),
        *(["fewer items"] if settings.dataset_type in OWN_DATA else []),
        *(["fewer processes (each holds the data)"] if distributed.size() > 1 else []),
        "closing other programs",
    ]


MODEL_REMEDIES = (
    "a smaller --model_size",
    "a smaller --d_model, --num_latents, --mlp_ratio or --cross_attention_dim",
    "fewer --num_self_attention_layers",
    "another --device",
)


@contextmanager
def compiler_advice() -> Iterator[None]:
    """Turn what torch.compile cannot do on this machine, mostly for lack of a compiler, into a UserError."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, TorchDynamoException) and "torch.compile is not supported" not in str(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"--compile: {reason}; install what is missing, or train with --no_compile") from error


# --- Training --------------------------------------------------------------------------------------------------------


def train(settings: Settings, checkpoint: dict[str, Any] | None = None, resumed: Path | None = None) -> int:
    """Run, or go on with, a training run. Returns the exit status: 0, or 128 + the signal that stopped it.

    Args:
        checkpoint: what to go on from, and `resumed` its file; neither for a new run.

    Raises:
        UserError: a mistake in settings or data, a file that cannot be written, memory or numbers that ran out.
    """
    rank, size = distributed.rank(), distributed.size()
    device = distributed.own_device(choose_device(settings.device))
    amp_dtype = choose_precision(settings.amp, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(settings.seed)

    batch_size, remedies = f"with batch_size {settings.batch_size}", step_remedies(settings)

    # A model that cannot be is refused before any data is read or downloaded
    with torch.device("meta"), memory_advice("for a model of this size", MODEL_REMEDIES):
        sketch = new_model(settings, {"features": {"any": {"input_dim": 1}}, "num_classes": 2})
    number = sum(parameter.numel() for parameter in sketch.parameters())
    check_memory(16 * number, f"weights, gradients and AdamW of {number:,} parameters", device)

    # Data, model, optimizer
    with distributed.in_turn(), memory_advice("while reading the data", data_remedies(settings)):
        splits, data = load_splits(settings, checkpoint and checkpoint["data"])
    if checkpoint:
        for what in ("split_sizes", "fingerprints"):
            if data[what] != checkpoint["data"][what]:
                raise UserError(
                    f"the data have changed ({what} were {checkpoint['data'][what]}, now {data[what]}); bring the old "
                    "data back in their old order, or start a new run without --resume"
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
            share=(rank, size),
        )
        for name in ("train", "val")
    }
    model_args = model_arguments(settings, data)
    if checkpoint:
        check_model(checkpoint, settings, data, len(loaders["train"]))
    with memory_advice("for a model of this size", MODEL_REMEDIES):
        model = new_model(settings, data).to(device)
        # What is evaluated and kept: the weights, or their moving average, which steps over the noise of a high rate
        average = moving_average(model, settings.ema_decay) if settings.ema_decay else None
    run_model = model
    if settings.compile:
        with compiler_advice():
            run_model = compiled(model, device, settings.accumulation_steps)
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
        progress.test = {}  # until it has ended again
        load_weights(model, checkpoint.get("trained_model", checkpoint["model"]))
        if average:
            load_weights(average.module, checkpoint["model"])
            average.n_averaged.fill_(progress.step)
        restore_optimizer(optimizer, checkpoint)
        restore_scaler(scaler, checkpoint["scaler"])
        steps_left = (settings.num_epochs - progress.epoch) * steps_per_epoch
        steps_left -= math.ceil(progress.batch / settings.accumulation_steps)
        progress.schedule = progress.schedule.changed(progress.step, settings.learning_rate, progress.step + steps_left)

    # A rehearsal: what would break in the first epoch breaks now, before any file is written or moved
    with compiler_advice() if settings.compile else nullcontext():
        if settings.compile:
            print("compiling the model, which may take minutes", flush=True)
        validate(evaluated, loaders["val"], settings, data, device, amp_dtype, 2)
        rehearse(run_model, loaders["train"], progress.epoch, settings, device, amp_dtype)
    with memory_advice("for the exchange of gradients", MODEL_REMEDIES):
        replica = distributed.replicate(run_model)
    folder = Path(settings.checkpoint_dir)
    writer = open_run(settings, folder, progress, resumed) if rank == 0 else None
    stop = StopRequest()
    for loader in loaders.values():
        loader.worker_init_fn = partial(begin_worker, stop.over)
    log = StepLog(progress, writer, scaler.is_enabled(), stop)

    # Random numbers from here on are dropout's. Each process draws its own, the first one those of a single process
    states = [checkpoint["random_state"], *checkpoint.get("other_random_states", [])] if checkpoint else []
    if rank < len(states):
        set_random_state(states[rank])
    elif rank > 0:
        torch.manual_seed(int(random_stream("process", settings.seed, rank, progress.step).integers(2**63)))

    def save(name: str) -> None:
        """Called in all processes, since each has a part of the state; the first one writes."""
        log.read()  # nothing is saved before it is known to be finite
        if not all(weights.isfinite().all() for weights in model.parameters()):
            raise UserError(
                f"the weights after step {progress.step} are not finite (learning rate "
                f"{progress.schedule(progress.step - 1):.3g}); the saved checkpoints are still good: lower --lr"
            )
        states = distributed.gather(random_state())
        if rank > 0:
            return
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
            "random_state": states[0],
            "other_random_states": states[1:],
            "threads": torch.get_num_threads(),
        }
        save_checkpoint(folder / name, contents)
        if name == LAST:
            distributed.remember(CHECKPOINT_OF_THIS_LAUNCH, str(folder / LAST))

    if checkpoint is None:
        save(LAST)

    with stop:
        while not (stop.agreed or is_finished(settings, progress)):
            # One epoch; its order and augmentation depend on seed and epoch alone
            model.train()
            set_epoch(loaders["train"], progress.epoch, progress.batch)
            # The sample numbers of every batch still to come, of which each process computes its share
            order = loaders["train"].batch_sampler.batches(progress.epoch)[progress.batch :]
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
                figures = torch.zeros(2 + len(STOP_SIGNALS), device=device)  # see StepLog
                for numbers in group:
                    batch = next(batches)
                    own = len(share_of(numbers, rank, size))  # 0: the batch is a stand-in, of which nothing counts
                    exchange = nullcontext() if numbers is group[-1] else distributed.gradients_stay(replica)
                    tokens = f"{batch_size} and samples of up to {evaluation.token_counts(batch).max()} tokens"
                    with memory_advice(tokens, remedies, GO_ON), exchange:
                        x, mask = evaluation.model_inputs(batch, device)
                        label = batch["label"][:own].to(device, non_blocking=True)
                        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                            logits = replica(x, mask)[:own]  # (own, num_classes)
                            loss = F.cross_entropy(
                                logits, label, label_smoothing=settings.label_smoothing, reduction="sum"
                            )
                        scaler.scale(loss * size / len(samples)).backward()  # the processes' mean is the step's
                    figures[:2] += torch.stack([loss.detach(), (logits.detach().argmax(1) == label).sum()])
                if stop.signal:
                    figures[2 + STOP_SIGNALS.index(stop.signal)] = 1
                distributed.add_up(figures)
                scaler.unscale_(optimizer)  # before clipping, so that the limit and the logged norm are the true ones
                norm = nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf)
                with memory_advice(f"{batch_size} and the optimizer's state", remedies, GO_ON):
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
                if stop.agreed:
                    break
            del batches  # and the processes that loaded them
            bar.close()
            log.read()
            seconds = time.perf_counter() - started
            if stop.agreed:
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
            if rank == 0:
                log_epoch(folder, writer, settings, progress, matrix if better else None, data["class_names"])
            if better:
                save(BEST)
            save(LAST)

        if stop.agreed:
            save(LAST)
            say(
                f"{signal.Signals(stop.agreed).name}: saved {printable(str(folder / LAST))} at step {progress.step}. "
                f"Go on with: {distributed.launcher()} train.py --resume {quoted(folder / LAST)}"
            )
            distributed.wait_for_all()
            return 0 if distributed.is_started_again() else 128 + stop.agreed

    finish(settings, folder, progress, evaluated, splits["test"], data, device, amp_dtype)
    save(LAST)  # with the test figures: the run has ended
    log_end(writer, progress)
    return 0


def compiled(model: nn.Module, device: torch.device, accumulation_steps: int = 1) -> nn.Module:
    """The model, compiled, with the random numbers of the plain one. On CUDA batches of one shape run as CUDA graphs,
    one launch instead of hundreds.

    A graph leaves its gradients in memory that its next run uses again, so they cannot be accumulated or exchanged.
    """
    options = {"fallback_random": True}  # torch's own kernel for dropout, which also makes 4 numbers at a time
    if device.type == "cuda" and accumulation_steps == 1 and distributed.size() == 1:
        options |= {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True}
    return torch.compile(model, options=options)


def new_model(settings: Settings, data: dict[str, Any]) -> PerceiverModel:
    try:
        return PerceiverModel(**model_arguments(settings, data))
    except ValueError as error:
        raise UserError(str(error)) from error


def rehearse(
    model: nn.Module, loader: Any, epoch: int, settings: Settings, device: torch.device, amp_dtype: Any
) -> None:
    """The passes of a training step over the first batch of an epoch, which leave no trace: neither in the gradients
    nor in the random numbers."""
    numbers = loaded_of(loader.batch_sampler.batches(epoch)[0], distributed.rank(), distributed.size())
    cards = [torch.cuda.current_device()] if device.type == "cuda" else []
    advice = memory_advice(f"with batch_size {settings.batch_size}", step_remedies(settings))
    with torch.random.fork_rng(cards), advice:
        (batch,) = DataLoader(loader.dataset, batch_sampler=[numbers], collate_fn=loader.collate_fn)
        model.train()
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(*evaluation.model_inputs(batch, device))
            F.cross_entropy(logits, batch["label"].to(device)).backward()
    model.zero_grad(set_to_none=True)


def check_model(checkpoint: dict[str, Any], settings: Settings, data: dict[str, Any], batches: int) -> None:
    """Raise UserError, before memory is taken for it, unless settings, data and weights are those of one model."""
    old, new = checkpoint["model_args"], model_arguments(settings, data)
    check_model_arguments(old)
    for name in (name for name in old if name not in FIELDS or FIELDS[name].metadata["on_resume"] == "fixed"):
        if old[name] != new.get(name):
            raise UserError(
                f"the checkpoint's model and its settings and data do not agree about {name}: "
                f"{shown(old[name])} and {shown(new.get(name))}"
            )
    with torch.device("meta"):
        check_weights(new_model(settings, data), checkpoint["model"])
    if (done := checkpoint["progress"]["batch"]) > batches:
        raise UserError(f"the checkpoint has done {done} batches of an epoch that has {batches}")


def collect(
    model: nn.Module, loader: Any, device: torch.device, amp_dtype: Any, batches: int | None = None
) -> dict[str, np.ndarray]:
    """evaluation.collect_predictions over the first `batches` of a loader, of all processes; to be had in the first."""
    parts = distributed.gather(evaluation.collect_predictions(model, islice(loader, batches), device, amp_dtype))
    return unshared(parts, loader.batch_sampler.batches(0)[:batches]) if parts else {}


def metrics_of(found: dict[str, np.ndarray], data: dict[str, Any], split: str) -> dict[str, Any]:
    """The metrics of what `collect` found, in all processes. Raises UserError where the logits are not finite."""
    compute = evaluation.compute_metrics
    try:
        return distributed.from_first(lambda: compute(found["logits"], found["labels"], data["class_names"]))
    except ValueError as error:
        raise UserError(f"{split}: {error}; lower --lr or use --amp off, then go on with --resume") from error


def validate(
    model: nn.Module, loader: Any, settings: Settings, data: dict[str, Any], device: torch.device, amp_dtype: Any,
    batches: int | None = None,
) -> tuple[dict[str, float], list[list[int]]]:  # fmt: skip
    """Loss, accuracy and balanced accuracy over a loader, named val_..., and the confusion matrix."""
    when = f"in validation with batch_size {settings.batch_size}"
    with memory_advice(when, step_remedies(settings), "" if batches else GO_ON):
        found = collect(model, loader, device, amp_dtype, batches)
    metrics = metrics_of(found, data, "validation")
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
    settings: Settings, folder: Path, progress: Progress, model: nn.Module, test_set: Any, data: dict[str, Any],
    device: torch.device, amp_dtype: Any,
) -> None:  # fmt: skip
    """Draw the curves, test the best model, and say what to do next. `model` is that of the last epoch."""
    best, tested, name = progress.best, progress.best, BEST
    with memory_advice("at the end", ("a smaller --batch_size", "closing other programs"), GO_ON):
        if distributed.is_first():
            with disk_advice():
                plots.plot_training_curves(progress.history, folder / CURVES, best["epoch"])
        checkpoint = distributed.from_first(best_checkpoint, folder, progress)
        if checkpoint:
            model = build_model(checkpoint).to(device)
        else:
            tested, name = progress.history[-1], LAST
            print_note(
                f"{folder / BEST} does not hold this run's best model (epoch {best['epoch']}) any more; what "
                f"follows is about the last one, {folder / LAST}"
            )
        share = distributed.rank(), distributed.size()
        loader = create_dataloader(test_set, settings.batch_size, share=share)
        metrics = metrics_of(collect(model, loader, device, amp_dtype), data, "test")
    progress.test = {"epoch": tested["epoch"], "accuracy": metrics["accuracy"], "num_samples": metrics["num_samples"]}
    if progress.epoch < settings.num_epochs:
        print(f"stopped early: no better epoch for {settings.early_stopping_patience} epochs")
    print(
        f"{'best' if checkpoint else 'last'} epoch {tested['epoch']}: "
        f"validation accuracy {tested['val_accuracy']:.4f}, test accuracy {metrics['accuracy']:.4f} "
        f"({metrics['num_samples']} samples, touched only now)\n"
        f"curves: {printable(str(folder / CURVES))}\n"
        f"next:   python inference.py --model_path {quoted(folder / name)} --analyze --output_dir results/"
    )


def best_checkpoint(folder: Path, progress: Progress) -> dict[str, Any] | None:
    """The checkpoint of this run's best epoch, or None where its file is gone, damaged or another one."""
    try:
        checkpoint = load_checkpoint(folder / BEST)
        found = checkpoint["progress"]["run_name"], checkpoint["epoch"]
    except (UserError, KeyError, TypeError):  # nothing that a run has written
        return None
    return checkpoint if found == (progress.run_name, progress.best["epoch"]) else None


# --- Command line ----------------------------------------------------------------------------------------------------


def keep_place(checkpoint: dict[str, Any], inexact: dict[str, tuple[Any, Any]], settings: Settings) -> None:
    """Count the batches done of a begun epoch in the new batch size; the samples and their order stay the same."""
    progress, size = checkpoint["progress"], settings.batch_size
    old_size = Settings.from_dict(checkpoint["settings"]).batch_size
    num_samples = checkpoint["data"]["split_sizes"]["train"]
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
    checkpoint = distributed.from_first(load_checkpoint, path)
    check_run(checkpoint, path)
    asked = {**args.file, **args.flags}
    if Path(asked.get("checkpoint_dir", path.parent)).resolve() != path.parent.resolve():
        raise UserError(
            f"--checkpoint_dir {asked['checkpoint_dir']}: a resumed run goes on in the folder of its checkpoint, "
            f"{path.parent}; leave --checkpoint_dir out"
        )
    settings, sources = resolve(args.flags, args.file, base=checkpoint["settings"])
    settings = dataclasses.replace(settings, checkpoint_dir=str(path.parent))
    if distributed.is_first():
        check_folder("log_dir", settings, sources, checkpoint["progress"]["run_name"])
        check_folder("data_dir", settings, sources, *CIFAR10_FILES)
    changes = changed_settings(checkpoint["settings"], settings)
    inexact = changes["inexact"]
    keep_place(checkpoint, inexact, settings)
    for name, (old, new) in inexact.items():
        print_note(f"{name} changed from {old} to {new}: the run is no longer the one that began")
    old, new = 1 + len(checkpoint.get("other_random_states", [])), distributed.size()
    if old != new:
        print_note(f"processes changed from {old} to {new}: the same batches, other draws of dropout")
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
    return settings, sources, checkpoint


def command(argv: list[str] | None) -> int:
    args = make_parser(__doc__).parse_args(argv)
    if earlier := distributed.recall(CHECKPOINT_OF_THIS_LAUNCH):
        print_note("torchrun started the processes anew")
        args.resume = earlier
    if args.resume:
        folder = Path(args.resume).parent
        writable = os.access(folder, os.W_OK)  # what is not may hold a finished run
        with owned_by_first(folder) if writable else nullcontext():
            return resume(args)
    settings, sources = resolve(args.flags, args.file)
    with owned_by_first(settings.checkpoint_dir):
        return run(settings, sources)


def owned_by_first(folder: str | Path) -> AbstractContextManager:
    """The folder of a run belongs to its first process, which alone writes there."""
    return owned(folder) if distributed.is_first() else nullcontext()


def resume(args: Any) -> int:
    """Go on with a run, unless it has ended."""
    settings, sources, checkpoint = resumed(args)
    progress = Progress.from_dict(checkpoint["progress"])
    curves = Path(settings.checkpoint_dir, CURVES)  # drawn again if they were removed
    if is_finished(settings, progress) and progress.test and distributed.from_first(curves.exists):
        more = "--epochs" if progress.epoch >= settings.num_epochs else "--early_stopping_patience"
        print(
            f"nothing is left to do: {printable(args.resume)} has done {progress.epoch} of {settings.num_epochs} "
            f"epochs; to go on, raise {more}"
        )
        return 0
    print(
        f"resuming {printable(args.resume)}: {progress.epoch} of {settings.num_epochs} epochs done, batch "
        f"{progress.batch} of the next, step {progress.step}, best validation accuracy "
        + (f"{progress.best['val_accuracy']:.4f}" if progress.best else "none yet")
    )
    return run(settings, sources, checkpoint, Path(args.resume))


def run(
    settings: Settings, sources: dict[str, str], checkpoint: dict[str, Any] | None = None, resumed: Path | None = None
) -> int:
    """Show the settings and train."""
    print(format_settings(settings, sources))
    for note in unused_settings(settings, sources):
        print_note(note)
    try:
        return train(settings, checkpoint, resumed)
    except KeyboardInterrupt:  # before the first step, after the last, or the second one
        print("interrupted; --resume goes on from the last checkpoint, if one was saved")
        return 128 + signal.SIGINT


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    with distributed.processes():
        return command(argv)


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files; a notebook hands down a backend that may not exist here
    sys.exit(main())
