"""Runs that are killed, stopped and resumed against unbroken ones, and everything else that can end a run."""

import errno
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from running import ROOT, before_step, end, output, stamp, succeed, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn
from torch.nn import functional as F

import evaluation
import files
import plots
import progress
import run_log
import train
from checkpoint import BEST, LAST, build_model, load_checkpoint
from config import DATASET_DEFAULTS, Settings
from data_utils import EpochBatchSampler, load_splits
from perceiver_model import PerceiverModel
from progress import FINAL_RATE, Progress, Schedule, average_decay, moving_average, parameter_groups
from tasks import Classification

MODEL = (
    "--model_size=tiny --d_model=16 --num_heads=2 --num_latents=4 --num_cross_attention_layers=1 "
    "--num_self_attention_layers=1"
)
SEQUENCES = f"--dataset=synthetic --num_samples=60 --seq_len_range 5 12 --feature_dim=4 --num_classes=3 {MODEL}"
DIGITS = f"--dataset=digits --patch_size=4 {MODEL}"
NOT_COMPARED = {"run_name", "seconds", "samples_per_second"}  # what the clock decides


# --- Comparison ------------------------------------------------------------------------------------------------------


def assert_same(a, b, where=""):
    """Equal to the last bit, in types, keys and their order, but for what the clock decides."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for name in a.keys() - NOT_COMPARED:
            assert_same(a[name], b[name], f"{where}.{name}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert a.numpy().tobytes() == b.numpy().tobytes(), where
    else:
        assert a == b, where


def files_of(folder):
    """Name -> hash and time of every file below a folder."""
    return {
        str(file.relative_to(folder)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file()
    }


def log_of(folder):
    return log_of_file(folder / "checkpoints" / "log.jsonl")


def log_of_file(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_run(folder, other):
    """Two finished runs with the same settings: weights, optimizer, history, best, random state, log, files."""
    for name in (LAST, BEST):
        a, b = (load_checkpoint(place / "checkpoints" / name) for place in (folder, other))
        assert_same(a, b, name)
    assert_same(log_of(folder), log_of(other), "log")
    for place in (folder, other):
        assert not list(place.rglob("*.tmp"))
        assert (place / "checkpoints" / "training_curves.png").stat().st_size > 0


# --- Killed at any moment --------------------------------------------------------------------------------------------


def run_killed(start, folder, flags, moments):
    """Run to the end through a SIGKILL at each of the moments; returns the number of kills.

    A moment is (kind, delay in seconds): 'start' counts from the start of the process, 'step' from the first
    change of a checkpoint or of the log, 'save' from the first sight of a file that is being written.
    """
    checkpoints = folder / "checkpoints"
    last, log = checkpoints / LAST, checkpoints / "log.jsonl"
    kills = 0
    for moment in [*moments, None]:
        before = stamp(last), stamp(log)
        left = set(checkpoints.glob("*.tmp"))  # of an earlier kill
        process = start(folder, "--resume" if last.exists() else flags)
        if moment:
            kind, delay = moment
            conditions = {
                "start": lambda: True,
                "step": lambda before=before: (stamp(last), stamp(log)) != before,
                "save": lambda left=left: set(checkpoints.glob("*.pth.*.tmp")) - left,
            }
            wait_until(conditions[kind], process)
            process.join(delay)
            process.kill()
        status = end(process)
        assert status in ([0, -signal.SIGKILL] if moment else [0]), output(folder)
        kills += status != 0
        if last.exists():
            load_checkpoint(last)
    return kills


SMALL_BATCHES = f"{SEQUENCES} --epochs=4 --batch_size=6"
BUCKETS = f"{SMALL_BATCHES} --bucket_by_length"
AUGMENTED = f"{DIGITS} --epochs=3 --batch_size=256"
HIDDEN = f"{BUCKETS} --task=reconstruct"
TAGGED = f"{BUCKETS} --task=tagging"
TARGETS = f"--dataset=text --data_path={ROOT}/tests/data/targets.jsonl {MODEL} --epochs=4 --batch_size=8"
NUMBERS = f"{TARGETS} --task=regression --label_column=parts"
LABELS = f"{TARGETS} --task=multilabel --label_column=names --tune_thresholds --class_weights=balanced"
MOMENTS = st.lists(
    st.tuples(st.just("step"), st.floats(0, 0.4))
    | st.tuples(st.just("save"), st.floats(0, 0.003))
    | st.tuples(st.just("start"), st.floats(0, 1)),
    min_size=5,
    max_size=5,
)
OPTIONS = st.fixed_dictionaries({
    "data": st.sampled_from([BUCKETS, SMALL_BATCHES, AUGMENTED, HIDDEN, TAGGED, NUMBERS, LABELS]),
    "dropout": st.sampled_from([0.0, 0.3]),
    "attention_dropout": st.sampled_from([0.0, 0.2]),
    "accumulation_steps": st.sampled_from([1, 2, 3]),
    "ema_decay": st.sampled_from([0.0, 0.5]),
    "amp": st.sampled_from(["off", "bf16"]),
    "num_workers": st.sampled_from([0, 1]),
    "save_every": st.integers(0, 3),
    "seed": st.integers(0, 5),
})  # fmt: skip
ALL_ON = {
    "data": HIDDEN, "dropout": 0.3, "attention_dropout": 0.2, "accumulation_steps": 2, "amp": "bf16",
    "ema_decay": 0.5, "num_workers": 1, "save_every": 2, "seed": 1,
}  # fmt: skip
IMAGES = ALL_ON | {"data": AUGMENTED, "num_workers": 0, "save_every": 1}


def flags_of(options):
    return options["data"] + "".join(f" --{name}={value}" for name, value in options.items() if name != "data")


def test_a_killed_run_ends_as_the_unbroken_one(start, tmp_path_factory, pytestconfig):
    wanted = pytestconfig.getoption("--kills")
    kills = 0

    drawn = math.ceil(wanted / 5) - 4  # beside these four

    @settings(
        max_examples=max(1, drawn), deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow],
        phases=[Phase.explicit, Phase.generate][: 1 + (drawn > 0)],
    )  # fmt: skip
    @example(ALL_ON, [("save", 0.0), ("step", 0.1), ("start", 0.3), ("save", 0.001), ("step", 0.3)])
    @example(IMAGES, [("step", 0.05), ("save", 0.0), ("step", 0.2), ("save", 0.002), ("step", 0.0)])
    @example(ALL_ON | {"data": NUMBERS}, [("step", 0.0), ("save", 0.001), ("step", 0.2), ("start", 0.5), ("save", 0.0)])
    @example(ALL_ON | {"data": LABELS}, [("save", 0.001), ("step", 0.1), ("save", 0.0), ("step", 0.3), ("start", 0.8)])
    @given(OPTIONS, MOMENTS)
    def check(options, moments):
        nonlocal kills
        folder = tmp_path_factory.mktemp("run")
        with ThreadPoolExecutor() as threads:  # both at once
            unbroken = threads.submit(succeed, start, folder / "unbroken", flags_of(options))
            killed = threads.submit(run_killed, start, folder / "killed", flags_of(options), moments)
            unbroken.result()
            kills += killed.result()
        assert_same_run(folder / "unbroken", folder / "killed")

    check()
    assert kills >= 0.8 * wanted  # a run may end before a late moment comes


# --- In this process -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two folders of SMALL_BATCHES: 'finished' (2 epochs) and 'stopped' in the middle of epoch 2."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("finished", "stopped")}
    for name, folder in folders.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(run_log, "tensorboard_writer", lambda *_: None)
            if name == "stopped":
                before_step(patch, 13, lambda: signal.raise_signal(signal.SIGINT))
            status = train.main(f"{SMALL_BATCHES} --epochs=2".split())
            assert status == (130 if name == "stopped" else 0)
    return folders


@pytest.fixture(params=["finished"])
def copy(made, tmp_path, request):
    """The test's own copy of a run's folder, in which it then works: the checkpoints folder."""
    shutil.copytree(made[request.param], tmp_path, dirs_exist_ok=True)
    return tmp_path / "checkpoints"


stopped = pytest.mark.parametrize("copy", ["stopped"], indirect=True)


# --- Stopped by a signal ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "send", "workers", "batches"),
    [
        pytest.param(signal.SIGINT, os.killpg, 1, 1, marks=pytest.mark.slow),
        (signal.SIGINT, os.killpg, 1, 20),
        pytest.param(signal.SIGTERM, os.killpg, 1, 20, marks=pytest.mark.slow),
        (signal.SIGTERM, os.kill, 0, 1),
        (signal.SIGHUP, os.killpg, 2, 1),
    ],
    ids=["Ctrl-C", "Ctrl-C in a step of many batches", "SIGTERM to the group", "SIGTERM", "SIGHUP to the group"],
)
def test_a_signal_finishes_the_step_and_saves(start, tmp_path, number, send, workers, batches):
    """A terminal sends Ctrl-C to the whole group, the workers included, whose batches the step still needs."""
    flags = f"{SEQUENCES} --num_samples=400 --batch_size=2 --epochs=1 --dropout=0.2 --num_workers={workers}"
    flags += f" --accumulation_steps={batches}"
    checkpoints = tmp_path / "stopped" / "checkpoints"
    process = start(tmp_path / "stopped", flags)
    assert wait_until((checkpoints / LAST).exists, process)
    process.join(0.3)
    send(process.pid, number)
    assert end(process) == 128 + number, output(tmp_path / "stopped")
    checkpoint = load_checkpoint(checkpoints / LAST)
    step = checkpoint["step"]
    assert checkpoint["progress"]["batch"] == step * batches < 180
    assert output(tmp_path / "stopped").endswith(
        f"{number.name}: saved checkpoints/{LAST} at step {step}. "
        f"Continue with: python train.py --resume checkpoints/{LAST}\n"
    )
    with ThreadPoolExecutor() as threads:
        unbroken = threads.submit(succeed, start, tmp_path / "unbroken", flags)
        succeed(start, tmp_path / "stopped", f"--resume checkpoints/{LAST}")
        unbroken.result()
    assert f"step {step}," in output(tmp_path / "stopped")
    assert_same_run(tmp_path / "unbroken", tmp_path / "stopped")


@pytest.mark.parametrize("step", [1, 9, 18])
def test_a_signal_in_any_step(run, monkeypatch, tmp_path, made, step):
    """Also in the first step, in the last of an epoch and in the last of all."""
    with monkeypatch.context() as patch:
        before_step(patch, step, lambda: signal.raise_signal(signal.SIGTERM))
        assert run(f"{SMALL_BATCHES} --epochs=2").status == 143
    assert load_checkpoint(tmp_path / "checkpoints" / LAST)["step"] == step
    assert run("--resume").status == 0
    assert_same_run(tmp_path, made["finished"])


def test_a_batch_size_changed_at_the_end_of_an_epoch_repeats_no_sample(run, monkeypatch, tmp_path):
    """Stopped after the last of the 9 batches of 6, before the validation: 54 samples are done, in any batch size."""
    with monkeypatch.context() as patch:
        before_step(patch, 9, lambda: signal.raise_signal(signal.SIGTERM))
        assert run(f"{SMALL_BATCHES} --epochs=1").status == 143
    result = run("--resume --batch_size=10")
    assert result.status == 0 and "batch_size changed from 6 to 10" in result.out
    assert [(line["epoch"], line["step"]) for line in log_of(tmp_path)] == [(1, 9)]


def test_a_second_signal_ends_at_once(run, monkeypatch, tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before_step(monkeypatch, 3, twice)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    result = run(f"{SMALL_BATCHES} --save_every=1")
    signal.signal(signal.SIGINT, before)
    assert result.status == 130
    assert "nothing was written" not in result.out
    assert load_checkpoint(tmp_path / "checkpoints" / LAST)["step"] == 2


# --- What is left to do ----------------------------------------------------------------------------------------------


def test_a_finished_run_has_nothing_left(copy, run, tmp_path):
    before = files_of(tmp_path)
    result = run("--resume")
    assert result.status == 0
    assert "nothing is left to do" in result.out and "2 of 2 epochs" in result.out and "--epochs" in result.out
    assert files_of(tmp_path) == before


def test_a_run_killed_before_its_curves_draws_them(copy, run, tmp_path):
    (copy / "training_curves.png").unlink()
    result = run("--resume")
    assert result.status == 0 and "test accuracy" in result.out
    assert (copy / "training_curves.png").exists()
    assert len(log_of(tmp_path)) == 2


@pytest.mark.parametrize("moment", ["before the curves", "in the curves", "in the test", "before it says so"])
def test_a_run_killed_at_its_end_is_ended_by_resume(run, monkeypatch, tmp_path, made, moment):
    """That a run has ended is said by its checkpoint, not by the files that it leaves."""

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "in the curves":
            patch.setattr(plots, "plot_training_curves", lambda history, path, *_: (path.write_text("half"), kill()))
        elif moment == "in the test":
            patch.setattr(train, "equipped_model", kill)
        elif moment == "before it says so":
            patch.setattr(run_log.RunLog, "close", kill)
        else:
            patch.setattr(train, "finish", kill)
        assert run(f"{SMALL_BATCHES} --epochs=2").status == 130
    ended = load_checkpoint(tmp_path / "checkpoints" / LAST)["progress"]["test"]
    assert bool(ended) == (moment == "before it says so")
    result = run("--resume")
    assert result.status == 0
    assert "nothing is left to do" in result.out if ended else "test accuracy" in result.out
    assert_same_run(tmp_path, made["finished"])
    progress = load_checkpoint(tmp_path / "checkpoints" / LAST)["progress"]
    assert progress["test"]["epoch"] == progress["best"]["epoch"] and progress["test"]["num_samples"] == 12
    assert "nothing is left to do" in run("--resume").out


def test_a_run_that_goes_on_has_not_ended(copy, run, monkeypatch, tmp_path):
    """Killed before its new end, it is ended by the next resume; the curves of fewer epochs are gone meanwhile."""
    with monkeypatch.context() as patch:
        before_step(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))
        assert run("--resume --epochs=3").status == 143
    assert not (copy / "training_curves.png").exists()
    assert load_checkpoint(copy / LAST)["progress"]["test"] == {}
    drawn = []
    plot = lambda history, path, *_: (path.write_text("curves"), drawn.append(len(history)))  # noqa: E731
    monkeypatch.setattr(plots, "plot_training_curves", plot)
    result = run("--resume")
    assert result.status == 0 and "test accuracy" in result.out and drawn == [3]


def test_a_picture_that_a_kill_or_a_full_disk_cut_off_is_drawn_again(start, tmp_path):
    """The real picture, in a process that is killed while it is written."""
    folder = tmp_path / "run"
    assert end(start(folder, f"{SMALL_BATCHES} --epochs=1", change=die_in_savefig)) == -signal.SIGKILL
    assert not (folder / "checkpoints" / "training_curves.png").exists()
    assert list((folder / "checkpoints").glob("training_curves.png.*.tmp"))
    succeed(start, folder, "--resume")
    assert "test accuracy" in output(folder) and "nothing is left" not in output(folder)
    with Image.open(folder / "checkpoints" / "training_curves.png") as picture:
        picture.load()
    assert sorted(os.listdir(folder / "checkpoints")) == sorted(run_log.RUN_FILES)


def die_in_savefig():
    from matplotlib.figure import Figure

    def savefig(self, file, **kwargs):
        file.write(b"\x89PNG\r\n\x1a\n")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    Figure.savefig = savefig


def test_more_epochs_never_raise_the_rate(copy, run, tmp_path):
    """R28: the rate stays where the first schedule ended, until the longer one falls below it."""
    result = run("--resume --epochs=6")
    assert result.status == 0
    assert re.search(r"note: num_epochs changed from 2 to 6", result.out), result.out
    rates = [line["learning_rate"] for line in log_of(tmp_path)]
    assert len(rates) == 6
    assert rates == sorted(rates, reverse=True)
    assert rates[2:] == [FINAL_RATE * DATASET_DEFAULTS["synthetic"]["learning_rate"]] * 4


def test_the_best_score_is_remembered(copy, run, tmp_path):
    """R29."""
    contents = torch.load(copy / LAST, weights_only=True)
    contents["best"]["val_accuracy"] = contents["progress"]["best"]["val_accuracy"] = 0.999
    torch.save(contents, copy / LAST)
    before = files_of(copy)[BEST]
    result = run("--resume --epochs=3")
    assert result.status == 0
    assert files_of(copy)[BEST] == before
    assert "best validation accuracy 0.999" in result.out
    assert "validation accuracy 0.9990" in result.out
    assert load_checkpoint(copy / LAST)["best"]["val_accuracy"] == 0.999


def test_epochs_differ_in_their_order(copy):
    """R31: the order of an epoch is its own."""
    orders = [EpochBatchSampler(54, 6, shuffle=True).batches(epoch) for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize(("first", "then"), [(0.0, 0.5), (0.5, 0.0)])
def test_weight_decay_changed_on_resume_has_its_effect(run, tmp_path, first, then):
    run(f"{SMALL_BATCHES} --epochs=1 --weight_decay={first}")
    result = run(f"--resume --epochs=2 --weight_decay={then}")
    assert result.status == 0 and f"weight_decay changed from {first} to {then}" in result.out
    groups = load_checkpoint(tmp_path / "checkpoints" / LAST)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [then, 0.0]


def test_an_earlier_run_is_kept(copy, run):
    """A new run in the folder of another moves its files aside."""
    before = {hashed for hashed, _ in files_of(copy).values()}
    result = run(f"{SMALL_BATCHES} --epochs=1")
    assert result.status == 0 and "was moved to" in result.out
    (kept,) = copy.glob("run_until_*")
    assert {hashed for hashed, _ in files_of(kept).values()} == before


def test_runs_set_aside_are_numbered_whatever_the_clock_says(copy, run, monkeypatch):
    before = {hashed for hashed, _ in files_of(copy).values()}
    strftime = time.strftime
    monkeypatch.setattr(time, "strftime", lambda form, *when: "now" if when else strftime(form))
    for seed in (1, 2):
        assert run(f"{SMALL_BATCHES} --epochs=1 --seed={seed}").status == 0
    assert [folder.name for folder in sorted(copy.glob("run_until_*"))] == ["run_until_now", "run_until_now_2"]
    assert {hashed for hashed, _ in files_of(copy / "run_until_now").values()} == before
    assert load_checkpoint(copy / "run_until_now_2" / LAST)["settings"]["seed"] == 1


# --- What lies in the folder beside the checkpoint -------------------------------------------------------------------


def hashes(folder):
    return {name: hashed for name, (hashed, _) in files_of(folder).items()}


def test_what_came_after_the_checkpoint_is_set_aside(copy, run, tmp_path):
    """--resume best_model.pth of an earlier epoch: the later ones are announced and kept."""
    assert load_checkpoint(copy / BEST)["epoch"] == 1 and load_checkpoint(copy / LAST)["epoch"] == 2
    before = hashes(copy)
    result = run(f"--resume checkpoints/{BEST} --epochs=3")
    assert result.status == 0, result.err
    (kept,) = copy.glob("run_until_*")
    assert re.search(
        rf"note: the run continues from checkpoints/{BEST} \(epoch 1, step 9\); .* moved to checkpoints/{kept.name}",
        result.out,
    )
    moved = hashes(kept)
    assert moved == {name: before[name] for name in before.keys() - {BEST}}
    assert [line["epoch"] for line in log_of(tmp_path)] == [1, 2, 3]
    assert not list(copy.glob("run_until_*/run_until_*"))


def test_an_older_copy_of_the_checkpoint_is_an_older_run(run, made, monkeypatch, tmp_path):
    """Under a name of its own, or put back as last_model.pth: what is beyond it is set aside."""
    assert run(f"{SMALL_BATCHES} --epochs=4").status == 0
    checkpoints = tmp_path / "checkpoints"
    older = made["finished"] / "checkpoints" / LAST  # the same run after 2 epochs, but for its schedule and name
    contents = torch.load(older, weights_only=True)
    contents["progress"]["run_name"] = load_checkpoint(checkpoints / LAST)["progress"]["run_name"]
    shutil.copy(checkpoints / LAST, checkpoints / BEST)  # as if its last epoch were its best
    before = hashes(checkpoints)
    for name in ("copy.pth", LAST):
        folder = tmp_path / name
        shutil.copytree(checkpoints, folder)
        torch.save(contents, folder / name)
        result = run(f"--resume {name}/{name} --epochs=3")
        assert result.status == 0, result.err
        (kept,) = folder.glob("run_until_*")
        expected = {BEST, "log.jsonl", "settings.json", "training_curves.png"} | ({LAST} if name != LAST else set())
        assert hashes(kept) == {file: before[file] for file in expected}
        assert "held beyond that" in result.out
        assert load_checkpoint(folder / LAST)["epoch"] == 3


def test_files_of_another_run_are_set_aside(copy, run, tmp_path, made):
    """A checkpoint that was copied into the folder of another run."""
    assert run(f"{SMALL_BATCHES} --epochs=1 --seed=3 --checkpoint_dir=other").status == 0
    other = tmp_path / "other"
    before = hashes(other)
    shutil.copy(copy / LAST, other / "mine.pth")
    result = run("--resume other/mine.pth --epochs=3")
    assert result.status == 0, result.err
    (kept,) = other.glob("run_until_*")
    assert hashes(kept) == before


def test_a_folder_whose_best_model_is_gone(copy, run, tmp_path):
    """Only last_model.pth was moved: the run ends with curves and test figures of what there is, and says so."""
    assert load_checkpoint(copy / LAST)["best"]["epoch"] == 1
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(copy / LAST, moved)
    contents = torch.load(moved / LAST, weights_only=True)
    contents["progress"]["best"] |= {"val_accuracy": 2.0}  # no later epoch is better
    contents["progress"]["test"] = {}
    torch.save(contents, moved / LAST)
    result = run(f"--resume moved/{LAST} --epochs=3")
    assert result.status == 0, result.err
    assert f"note: moved/{BEST} no longer holds this run's best model (epoch 1)" in result.out
    last = log_of_file(moved / "log.jsonl")[-1]
    assert f"last epoch 3: validation accuracy {last['val_accuracy']:.4f}, test accuracy " in result.out
    assert f"python inference.py --model_path moved/{LAST}" in result.out
    assert (moved / "training_curves.png").exists() and not (moved / BEST).exists()
    assert load_checkpoint(moved / LAST)["progress"]["test"]["epoch"] == 3
    assert "nothing is left to do" in run(f"--resume moved/{LAST}").out


@pytest.mark.parametrize("progress", [{"run_name": "another"}, {}, None, "text"])
def test_the_closing_lines_are_about_the_best_model_of_this_run(copy, run, made, monkeypatch, progress):
    """Not about one that was put in its place."""
    foreign = torch.load(copy / BEST, weights_only=True)
    foreign["progress"] = progress

    def replace():
        torch.save(foreign, copy / BEST)

    contents = torch.load(copy / LAST, weights_only=True)
    contents["progress"]["best"] |= {"val_accuracy": 2.0}
    torch.save(contents, copy / LAST)
    before_step(monkeypatch, 2, replace)
    result = run("--resume --epochs=3")
    assert result.status == 0 and "no longer holds this run's best model" in result.out and "last epoch 3" in result.out


# --- Two runs in one folder ------------------------------------------------------------------------------------------


def test_a_second_run_in_the_folder_is_refused(start, run, tmp_path):
    """Nothing of the first one is touched, and nothing of the second is left."""
    process = start(tmp_path, f"{SMALL_BATCHES} --epochs=2000")
    log = tmp_path / "checkpoints" / "log.jsonl"
    assert wait_until(log.exists, process)
    before = set(os.listdir(tmp_path / "runs"))
    for second in (f"{SMALL_BATCHES} --epochs=1 --seed=7", "--resume", f"--resume checkpoints/{LAST} --epochs=70"):
        result = run(second)
        assert result.status == 2
        assert result.err.count("\n") == 1 and f"process {process.pid} on " in result.err
        assert "error: checkpoints belongs to a run that is still going" in result.err
        assert "--checkpoint_dir" in result.err
    assert process.is_alive() and set(os.listdir(tmp_path / "runs")) == before
    assert not list((tmp_path / "checkpoints").glob("run_until_*"))
    other = run(f"{SMALL_BATCHES} --epochs=1 --checkpoint_dir=other")
    assert other.status == 0
    process.terminate()
    assert end(process) == 143
    assert run("--resume --epochs=1").status == 0
    assert [line["epoch"] for line in log_of(tmp_path)] == list(range(1, len(log_of(tmp_path)) + 1))


# --- Other threads, another clock ------------------------------------------------------------------------------------


def test_another_number_of_threads_is_noted(copy, run):
    assert load_checkpoint(copy / LAST)["threads"] == torch.get_num_threads()
    result = run("--resume --epochs=3")
    assert "threads" not in result.out
    contents = torch.load(copy / LAST, weights_only=True)
    contents["threads"] += 1
    torch.save(contents, copy / LAST)
    result = run("--resume --epochs=4 --device=cpu")
    now = torch.get_num_threads()
    assert result.status == 0 and f"note: threads changed from {now + 1} to {now} (OMP_NUM_THREADS)" in result.out


def test_an_older_checkpoint_goes_on(copy, run, tmp_path):
    """Of a version that did not store how a run ended, nor its threads."""
    contents = torch.load(copy / LAST, weights_only=True)
    del contents["threads"], contents["progress"]["test"]
    torch.save(contents, copy / LAST)
    result = run("--resume")
    assert result.status == 0 and "test accuracy" in result.out and "threads" not in result.out
    assert run("--resume --epochs=3").status == 0
    assert len(log_of(tmp_path)) == 3


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def curves(folder):
    """Scalars of the only run below a folder, and of its parts: name -> (steps, values)."""
    (place,) = (folder / "runs").iterdir()
    curves = {}
    for part in run_log.PARTS:
        events = EventAccumulator(str(place / part), size_guidance={"scalars": 0, "tensors": 0, "images": 0}).Reload()
        for name in events.Tags()["scalars"]:
            points = events.Scalars(name)
            curves[f"{part}/{name}".lstrip("/")] = [e.step for e in points], [e.value for e in points]
        if part == "":
            assert len(events.Tensors("settings/text_summary")) == 1
            images = [event.step for event in events.Images("val/confusion_matrix")]
            assert images == sorted(set(images))
    return curves


def assert_same_curves(folder, other):
    ours, theirs = curves(folder), curves(other)
    assert list(ours["step/loss"][0]) == list(range(1, len(theirs["step/loss"][0]) + 1))
    for ones in (ours, theirs):
        ones.pop("step/samples_per_second")
    assert ours == theirs


def test_the_curves_on_the_disk_are_never_behind_the_checkpoint(monkeypatch, tmp_path):
    """At the moment at which a checkpoint takes the place of the one before, the points of its steps are all there.

    TensorBoard writes in a thread of its own, which is slowed down here to a disk that is busy.
    """
    monkeypatch.chdir(tmp_path)
    replace, write, compared = os.replace, RecordWriter.write, []
    monkeypatch.setattr(RecordWriter, "write", lambda *args: (time.sleep(0.01), write(*args)))

    def watching(source, target):
        replace(source, target)
        if Path(target).name == LAST and (step := load_checkpoint(target)["step"]):
            events = EventAccumulator(str(next((tmp_path / "runs").iterdir())), {"scalars": 0}).Reload()
            compared.append([event.step for event in events.Scalars("step/loss")] == list(range(1, step + 1)))

    monkeypatch.setattr(os, "replace", watching)
    assert train.main(f"{SMALL_BATCHES} --epochs=1 --save_every=3".split()) == 0
    assert compared == [True] * 4  # after 3, 6 and 9 steps, and at the end


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder of an unbroken run of 3 epochs of 9 steps, with its curves."""
    folder = tmp_path_factory.mktemp("drawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main(f"{SMALL_BATCHES} --epochs=3".split()) == 0
    return folder


@pytest.mark.parametrize(
    ("save_every", "where"),
    [(0, "step 5"), (4, "step 14"), (9, "step 19"), (9, "save 4"), (3, "save 8")],
    ids=["before a save", "middle of an epoch", "after an epoch", "save after an epoch", "end of epoch 2"],
)
def test_curves_go_on_without_doubles(monkeypatch, tmp_path, drawn, save_every, where):
    """R36, R28: broken off after the points reached the disk and before the checkpoint did."""
    monkeypatch.chdir(tmp_path)
    kind, number = where.split()
    number = int(number)
    writers = []

    def kill():
        writers[0].flush()
        raise Killed

    with monkeypatch.context() as patch:
        make = run_log.tensorboard_writer
        patch.setattr(run_log, "tensorboard_writer", lambda *args: writers.append(make(*args)) or writers[0])
        if kind == "step":
            before_step(patch, number, kill)
        else:
            saves = []
            save = train.save_checkpoint
            patch.setattr(
                train, "save_checkpoint",
                lambda *args: kill() if len(saves) == number else saves.append(save(*args)),
            )  # fmt: skip
        with pytest.raises(Killed):
            train.main(f"{SMALL_BATCHES} --epochs=3 --save_every={save_every}".split())
        writers[0].close()
    assert train.main(["--resume"]) == 0
    assert_same_curves(tmp_path, drawn)


def test_curves_have_no_gaps_after_a_kill(start, tmp_path, drawn):
    """What is before the checkpoint is on the disk when the process is killed."""
    folder = tmp_path / "killed"
    last = folder / "checkpoints" / LAST
    for flags in (f"{SMALL_BATCHES} --epochs=3 --save_every=2", "--resume"):
        before = stamp(last)
        process = start(folder, flags)
        assert wait_until(lambda before=before: last.exists() and stamp(last) != before, process)
        process.join(0.1)
        process.kill()
        assert end(process) == -signal.SIGKILL
    succeed(start, folder, "--resume")
    assert_same_curves(folder, drawn)


def test_a_clock_that_was_set_back_leaves_the_curves_in_order(monkeypatch, tmp_path, drawn):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 12, lambda: raise_killed())
        train.main(f"{SMALL_BATCHES} --epochs=3".split())
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 25 * 3600)
    assert train.main(["--resume"]) == 0
    assert_same_curves(tmp_path, drawn)


def raise_killed():
    raise Killed


def test_runs_begun_in_the_same_second_have_curves_of_their_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    for seed in range(2):
        assert train.main(f"{SMALL_BATCHES} --epochs=1 --seed={seed} --checkpoint_dir=c{seed}".split()) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


# --- Refused on resume -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--d_model=32", ["d_model", "16", "32"]),
        ("--seed=5", ["seed", "0", "5"]),
        ("--num_classes=4", ["num_classes", "3", "4"]),  # R35
        ("--dataset=digits", ["dataset_type", "synthetic", "digits"]),
        ("--checkpoint_dir=elsewhere", ["--checkpoint_dir", "elsewhere", "checkpoints"]),
    ],
)
def test_a_fixed_setting_is_refused_with_both_values(copy, run, tmp_path, flags, parts):
    before = files_of(tmp_path)
    result = run(f"--resume checkpoints/{LAST} --epochs=4 {flags}")
    assert result.status == 2
    assert all(part in result.err for part in parts)
    assert files_of(tmp_path) == before


def test_a_setting_that_breaks_exactness_is_named(copy, run):
    result = run("--resume --epochs=3 --dropout=0.25 --batch_size=9 --save_every=3")
    assert result.status == 0
    assert "note: dropout changed from 0.1 to 0.25" in result.out
    assert "note: batch_size changed from 6 to 9" in result.out
    assert "save_every changed" not in result.out


@stopped
def test_a_smaller_batch_goes_on_at_the_same_sample(copy, run):
    result = run("--resume --batch_size=3 --accumulation_steps=2")
    assert result.status == 0
    assert "note: batch_size changed from 6 to 3" in result.out


@stopped
@pytest.mark.parametrize("flag", ["--batch_size=7", "--bucket_by_length"])
def test_the_order_cannot_change_in_an_epoch(copy, run, tmp_path, flag):
    before = files_of(tmp_path)
    result = run(f"--resume {flag}")
    assert result.status == 2
    assert flag[2:].split("=")[0] in result.err and "samples into an epoch" in result.err
    assert files_of(tmp_path) == before


@stopped
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[: len(data) // 2], "truncated or damaged"),
        (lambda data: data[:60000] + bytes([data[60000] ^ 1]) + data[60001:], "truncated or damaged"),
        (lambda data: b"", "truncated or damaged"),
        (lambda data: b"something else", "is not a checkpoint"),
    ],
    ids=["truncated", "a bit flipped", "empty", "foreign"],
)
def test_a_damaged_checkpoint_never_starts_afresh(copy, run, tmp_path, damage, says):
    (copy / LAST).write_bytes(damage((copy / LAST).read_bytes()))
    before = files_of(tmp_path)
    result = run("--resume")
    assert result.status == 2
    assert f"checkpoints/{LAST}" in result.err and says in result.err
    assert f"checkpoints/{BEST} (after 1 epochs) is whole and can be used instead" in result.err
    assert files_of(tmp_path) == before
    assert run(f"--resume checkpoints/{BEST}").status == 0


def test_nothing_to_resume_from(run, tmp_path):
    result = run(f"{SMALL_BATCHES} --resume")
    assert result.status == 2
    assert f"checkpoints/{LAST}" in result.err and "No such file" in result.err
    assert not list(tmp_path.iterdir())


# --- Numbers, memory and disks that run out --------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["1e30", "1e39"])
def test_a_loss_that_is_not_finite_ends_the_run(run, tmp_path, rate):
    result = run(f"{SMALL_BATCHES} --lr={rate} --warmup_fraction=0 --save_every=1")
    assert result.status == 2
    assert re.search(r"step \d .*\(learning rate [\d.]+e\+\d\d", result.err) and "--lr" in result.err
    for name in (LAST, BEST):
        if (tmp_path / "checkpoints" / name).exists():
            weights = load_checkpoint(tmp_path / "checkpoints" / name)["model"]
            assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_the_step_and_its_samples_are_named(run, monkeypatch, tmp_path, part):
    step = 12  # the third of the second epoch
    if part == "loss":
        function, count = F.cross_entropy, -1  # the rehearsal is none

        def broken(*args, **kwargs):
            nonlocal count
            count += torch.is_grad_enabled()  # the one whose gradient is taken, not the one that is shown
            return function(*args, **kwargs) * (math.nan if count == step else 1)

        monkeypatch.setattr(F, "cross_entropy", broken)
    else:
        function, count = nn.utils.clip_grad_norm_, 0

        def broken(*args, **kwargs):
            nonlocal count
            count += 1
            return function(*args, **kwargs) * (math.inf if count == step else 1)

        monkeypatch.setattr(nn.utils, "clip_grad_norm_", broken)
    result = run(f"{SMALL_BATCHES} --save_every=1 --lr=0.01 --warmup_fraction=0 --seed=5")
    samples = EpochBatchSampler(54, 6, shuffle=True, seed=5).batches(1)[2]
    rate = Schedule(0.01, 0, 36)(step - 1)
    assert result.status == 2
    assert f"the {part} of step {step} is not finite" in result.err
    assert f"learning rate {rate:.3g}, training samples {', '.join(map(str, samples))})" in result.err
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / LAST)
    assert checkpoint["step"] == step - 1
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())


def test_a_score_that_is_not_a_number_is_never_best(run, monkeypatch, tmp_path):
    collect, count = evaluation.collect, 0

    def broken(*args):
        nonlocal count
        count += 1
        found = collect(*args)
        if count == 3:  # the rehearsal, epoch 1, epoch 2
            found["finite"][0] = False
        return found

    monkeypatch.setattr(evaluation, "collect", broken)
    result = run(SMALL_BATCHES)
    assert result.status == 2
    assert "validation" in result.err and "--lr" in result.err
    assert load_checkpoint(tmp_path / "checkpoints" / BEST)["epoch"] == 1
    assert load_checkpoint(tmp_path / "checkpoints" / LAST)["epoch"] == 1


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: you tried")],
    ids=["cuda", "python", "cpu"],
)
@pytest.mark.parametrize("place", ["forward", "optimizer"])
def test_out_of_memory(run, monkeypatch, tmp_path, made, error, place):
    """R24."""

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        if place == "forward":
            before_step(patch, 5, fail)
        else:
            patch.setattr(torch.optim.AdamW, "step", fail)
        result = run(f"{SMALL_BATCHES} --epochs=2 --save_every=3")
    assert result.status == 2
    assert "out of memory with batch_size 6" in result.err
    assert place != "forward" or re.search(r"up to \d+ tokens", result.err)
    remedies = ["--batch_size 3 --accumulation_steps 2", "--amp", "--gradient_checkpointing", "--max_seq_len"]
    remedies += ["--model_size"]
    places = [result.err.index(remedy) for remedy in remedies]
    assert places == sorted(places)
    assert load_checkpoint(tmp_path / "checkpoints" / LAST)["step"] == (3 if place == "forward" else 0)
    assert run("--resume").status == 0
    assert_same(
        load_checkpoint(tmp_path / "checkpoints" / LAST)["model"],
        load_checkpoint(made["finished"] / "checkpoints" / LAST)["model"],
    )


def no_memory(*_, **__):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 16000000000000 bytes.")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("model", "out of memory for a model of this size (14,901.2 GiB more were asked for); .*--model_size"),
        ("device", "out of memory for a model of this size (14,901.2 GiB more were asked for); .*--num_latents"),
        ("average", "out of memory for a model of this size (14,901.2 GiB more were asked for); .*--model_size"),
        ("data", "out of memory while reading the data (5 GiB more were asked for); .*a smaller --num_samples or "),
        ("rehearsal", "out of memory with batch_size 6 .*--batch_size 3 --accumulation_steps 2 (the same training)"),
        ("validation", "out of memory in validation with batch_size 6 .*--batch_size 3"),
        ("curves", "out of memory at the end .*--batch_size.*; the last checkpoint is whole, continue from it with"),
        ("test", "out of memory at the end .*--batch_size.*; the last checkpoint is whole, continue from it with"),
        ("elsewhere", "out of memory on this machine .*--batch_size"),
    ],
)
def test_out_of_memory_wherever_it_happens(run, monkeypatch, tmp_path, place, says):
    """And what happens before the first step writes nothing."""

    def no_array(*_):
        raise MemoryError("Unable to allocate 5. GiB for an array with shape (9, 2000000000) and data type float64")

    with monkeypatch.context() as patch:
        owner, name, act = {
            "model": (nn.Linear, "reset_parameters", no_memory),
            "device": (PerceiverModel, "to", no_memory),
            "average": (progress, "moving_average", no_memory),
            "data": (train, "load_splits", no_array),
            "rehearsal": (torch.Tensor, "backward", no_memory),
            "validation": (evaluation, "collect", no_memory),
            "curves": (plots, "plot_training_curves", no_memory),
            "test": (train, "equipped_model", no_memory),
            "elsewhere": (run_log.RunLog, "start", no_memory),
        }[place]
        patch.setattr(owner, name, act)
        result = run(f"{SMALL_BATCHES} --epochs=1 --ema_decay=0.5")
    assert result.status == 2 and result.err.count("\n") == 1
    parts = says.split(".*")
    places = [result.err.find(part) for part in parts]
    assert -1 not in places and places == sorted(places), result.err
    if place in ("curves", "test"):
        assert run("--resume").status == 0
    else:
        assert not list(tmp_path.iterdir())


def test_what_is_no_lack_of_memory_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(run_log.RunLog, "start", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(SMALL_BATCHES)


def test_no_compiler(start, tmp_path, made):
    """Said in a line, before anything of an earlier run is touched."""
    folder = tmp_path / "run"
    shutil.copytree(made["finished"], folder)
    before = files_of(folder)
    assert end(start(folder, f"{SMALL_BATCHES} --epochs=1 --compile", change=without_compiler)) == 2
    after = files_of(folder)
    after.pop("output.txt")
    assert after == before
    (line,) = re.findall("^error: .*", output(folder), re.MULTILINE)
    assert "--compile: InvalidCxxCompiler: No working C++ compiler found" in line and "--no_compile" in line
    assert output(folder).endswith(f"{line}\n") and "Traceback" not in output(folder)


def test_a_python_that_torch_compile_does_not_support(run, monkeypatch, tmp_path):
    def unsupported(*_, **__):
        raise RuntimeError("torch.compile is not supported on Python 3.15+")

    monkeypatch.setattr(torch, "compile", unsupported)
    result = run(f"{SMALL_BATCHES} --compile")
    assert result.status == 2 and not list(tmp_path.iterdir())
    assert "error: --compile: torch.compile is not supported on Python 3.15+; " in result.err
    assert "--no_compile" in result.err


def without_compiler():
    os.environ |= {"CXX": "/nonexistent/g++", "PATH": "/nonexistent"}


def test_a_step_is_rehearsed_without_a_trace(run, monkeypatch, tmp_path, saved):
    """What fails in the first step fails before an earlier run is moved; and no random number is used up."""
    flags = f"{SMALL_BATCHES} --epochs=1 --dropout=0.5 --seed=3"
    assert run(flags).status == 0
    assert run(f"{flags} --checkpoint_dir=other").status == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "rehearse", lambda *_: None)
        assert run(f"{flags} --checkpoint_dir=plain").status == 0
    a, b = (load_checkpoint(tmp_path / folder / LAST) for folder in ("other", "plain"))
    for part in ("model", "optimizer", "random_state", "progress"):
        assert_same(a[part], b[part], part)
    before = files_of(tmp_path)

    def fail(*_, **__):
        raise RuntimeError("a fault in the first step")

    monkeypatch.setattr(F, "cross_entropy", fail)
    with pytest.raises(RuntimeError, match="a fault in the first step"):
        run(SMALL_BATCHES)
    assert files_of(tmp_path) == before


def test_a_log_that_another_program_holds_ends_no_run(run, monkeypatch, tmp_path):
    """As on Windows; it is written when it is free again."""
    replace = os.replace
    refused = []

    def held(source, target):
        if Path(target).name == "log.jsonl" and len(refused) < 1:
            refused.append(target)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(files, "PATIENCE", 0)
    result = run(f"{SMALL_BATCHES} --epochs=2")
    assert result.status == 0 and len(refused) == 1
    assert "note: cannot write checkpoints/log.jsonl (Permission denied)" in result.out
    assert [line["epoch"] for line in log_of(tmp_path)] == [1, 2]


def test_a_fault_of_ours_keeps_its_traceback(run, monkeypatch):
    def fail():
        raise RuntimeError("a fault of ours")

    before_step(monkeypatch, 2, fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run(SMALL_BATCHES)


def test_a_validation_that_cannot_work_fails_before_the_first_epoch(run, monkeypatch, tmp_path):
    """Not after it, which may be an hour later; and before a file is written or an earlier run moved."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / BEST).write_text("an earlier run")

    def fail(*_):
        raise RuntimeError("a metric that fails")

    steps = []
    before_step(monkeypatch, 1, lambda: steps.append(1))
    monkeypatch.setattr(evaluation, "class_metrics", fail)
    with pytest.raises(RuntimeError, match="a metric that fails"):
        run(SMALL_BATCHES)
    assert not steps
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["checkpoints", f"checkpoints/{BEST}"]


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["checkpoint", "log", "curves", "tensorboard", "folder gone"])
def test_a_disk_that_fills_up_during_a_run(run, monkeypatch, tmp_path, made, what):
    """The old checkpoint stays good, nothing half-written stays, and the run can go on."""
    checkpoints = tmp_path / "checkpoints"
    aside = tmp_path / "aside"

    def half(contents, file):
        file.write(b"PK")
        full()

    with monkeypatch.context() as patch:
        if what == "checkpoint":
            before_step(patch, 12, lambda: patch.setattr(torch, "save", half))
        elif what == "log":
            before_step(patch, 12, lambda: patch.setattr(os, "fsync", full))  # the first file to be written is the log
        elif what == "curves":
            patch.setattr(plots, "plot_training_curves", full)
        elif what == "tensorboard":
            writer = SimpleNamespace(
                add_scalar=lambda *_: None, add=lambda *_: None, flush=lambda: None, close=lambda: None
            )
            patch.setattr(run_log, "tensorboard_writer", lambda *_: writer)
            before_step(patch, 12, lambda: setattr(writer, "flush", full))
        else:
            before_step(patch, 12, lambda: checkpoints.rename(aside))
        result = run(f"{SMALL_BATCHES} --epochs=2")
    if what == "folder gone":
        assert not checkpoints.exists()
        aside.rename(checkpoints)
    assert result.status == 2
    assert "--resume" in result.err
    assert "No space left on device" in result.err or what == "folder gone"
    assert not list(tmp_path.rglob("*.tmp"))
    assert load_checkpoint(checkpoints / LAST)["epoch"] == (2 if what == "curves" else 1)
    assert run("--resume").status == 0
    assert_same_run(tmp_path, made["finished"])


def test_a_disk_that_is_full_for_tensorboard(start, tmp_path):
    """A line, without a traceback, in which the place is text; the run goes on when there is space."""
    folder = tmp_path / "run"
    assert end(start(folder, f"{SMALL_BATCHES} --epochs=3", change=fill_the_disk_in_step_12)) == 2
    (line,) = re.findall("^error: .*", output(folder), re.MULTILINE)
    assert re.match(r"error: cannot write runs/[\w-]+: File too large; free space, then continue with --resume", line)
    assert "Traceback" not in output(folder) and "Exception" not in output(folder)
    assert load_checkpoint(folder / "checkpoints" / LAST)["epoch"] == 1
    succeed(start, folder, "--resume")
    assert len(log_of(folder)) == 3


def fill_the_disk_in_step_12():
    import resource

    def fill():
        size = max(file.stat().st_size for file in Path("runs").rglob("events*"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    before_step(pytest.MonkeyPatch(), 12, fill)


def test_a_disk_too_small_for_a_checkpoint(start, tmp_path):
    folder = tmp_path / "run"
    assert end(start(folder, SMALL_BATCHES, file_limit=20_000)) == 2
    assert f"cannot save checkpoints/{LAST}: File too large" in output(folder)
    assert "Traceback" not in output(folder)
    assert sorted(file.name for file in (folder / "checkpoints").iterdir()) == ["settings.json"]


# --- Small and uneven data -------------------------------------------------------------------------------------------


@pytest.fixture
def saved(monkeypatch):
    """The contents of every checkpoint that is saved."""
    contents = []
    save = train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda path, c: contents.append(deepcopy(c)) or save(path, c))
    return contents


def plain_gradient_descent(monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, fused: torch.optim.SGD(groups, lr))


def flat(weights):
    return torch.cat([tensor.flatten() for tensor in weights.values()])


def test_fewer_samples_than_a_batch(run, saved):
    """R23."""
    result = run(f"{SEQUENCES} --num_samples=24 --batch_size=64 --epochs=2")
    assert result.status == 0
    assert saved[-1]["step"] == 2
    assert not torch.equal(flat(saved[0]["model"]), flat(saved[-1]["model"]))
    assert all(line["train_loss"] > 0 for line in saved[-1]["progress"]["history"])


TEN = f"{SEQUENCES} --num_samples=12 --num_classes=2 --epochs=1 --weight_decay=0 --dropout=0 --warmup_fraction=0"
TEN += " --amp=off"  # some CPUs take bf16


@pytest.mark.parametrize(
    ("whole", "accumulated"),
    [
        ("--batch_size=8", "--batch_size=4 --accumulation_steps=2"),
        ("--batch_size=10", "--batch_size=6 --accumulation_steps=2"),
    ],
    ids=["a short last step", "batches of 6 and 4 samples in a step"],
)
def test_accumulation_is_the_larger_batch(run, monkeypatch, saved, whole, accumulated):
    """R25: 10 samples, each of which weighs the same in its step, whatever the size of its batch."""
    plain_gradient_descent(monkeypatch)
    runs = []
    for sizes in (whole, accumulated):
        assert run(f"{TEN} --lr=0.1 --grad_clip=0 {sizes}").status == 0
        runs.append(saved[-1])
    assert runs[0]["data"]["split_sizes"]["train"] == 10
    assert runs[0]["step"] == runs[1]["step"] == (2 if whole == "--batch_size=8" else 1)
    torch.testing.assert_close(flat(runs[0]["model"]), flat(runs[1]["model"]), rtol=0, atol=1e-6)
    for name in ("train_loss", "gradient_norm", "train_accuracy"):
        assert math.isclose(*(one["progress"]["history"][0][name] for one in runs), rel_tol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_that_of_smoothed_labels(run, saved, smoothing):
    """Against the formula in float64, with the weights before each epoch of one step."""
    flags = f"{TEN} --batch_size=64 --epochs=5 --lr=0.03 --label_smoothing={smoothing}"
    assert run(flags).status == 0
    before = {state["epoch"]: build_model(state).double() for state in saved}
    train_set = load_splits(Settings.from_dict(saved[0]["settings"]))[0]["train"]
    for line in saved[-1]["progress"]["history"]:
        losses, smoothed, right = [], [], []
        for number in range(len(train_set)):
            item = train_set[number]
            log_p = before[line["epoch"] - 1](torch.as_tensor(item["input"]).double()[None])[0].log_softmax(0)
            losses.append(-log_p[item["label"]])
            smoothed.append((1 - smoothing) * losses[-1] + smoothing * -log_p.mean())
            right.append(log_p.argmax().item() == item["label"])
        assert line["train_loss"] == pytest.approx(sum(losses).item() / len(losses), rel=1e-5)
        objective = line.get("train_objective", line["train_loss"])
        assert objective == pytest.approx(sum(smoothed).item() / len(smoothed), rel=1e-5)
        assert line["train_accuracy"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_seed_decides_everything_whatever_was_drawn_before(run, saved, workers):
    ends = {}
    for number, seed in enumerate([3, 3, 4]):
        torch.manual_seed(number)  # a process that has drawn other numbers
        np.random.seed(number)
        random.seed(number)
        saved.clear()
        assert run(f"{TEN} --batch_size=4 --dropout=0.3 --num_workers={workers} --seed={seed}").status == 0
        ends.setdefault(seed, []).append((flat(saved[0]["model"]), flat(saved[-1]["model"])))
    for first, again in zip(*ends[3], strict=True):
        assert torch.equal(first, again)
    for first, other in zip(ends[3][0], ends[4][0], strict=True):
        assert not torch.equal(first, other)


def test_the_kept_weights_are_the_moving_average(run, saved):
    """Of the weights after each step; the first ones, untrained, have no part in it."""
    assert run(f"{TEN} --batch_size=4 --save_every=1 --ema_decay=0.24").status == 0
    steps = {state["step"]: state for state in saved}
    assert sorted(steps) == [0, 1, 2, 3]
    average = flat(steps[1]["trained_model"])
    torch.testing.assert_close(flat(steps[1]["model"]), average, rtol=0, atol=0)
    for step, decay in ((2, 2 / 11), (3, 0.24)):  # (1 + t) / (10 + t) after t = 1 and 2 updates: 0.18 and 0.25
        average = decay * average + (1 - decay) * flat(steps[step]["trained_model"])
        torch.testing.assert_close(flat(steps[step]["model"]), average)
    assert not torch.equal(flat(steps[3]["model"]), flat(steps[3]["trained_model"]))


@settings(deadline=None)
@given(st.floats(0, 0.9999), st.integers(1, 60), st.integers(0, 2**32))
def test_the_average_of_constant_weights_is_these_weights(decay, steps, seed):
    """At every step, whatever the model held at the start."""
    model = nn.Linear(3, 2)
    average = moving_average(model, decay)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    for _ in range(steps):
        average.update_parameters(model)
        for kept, parameter in zip(average.module.parameters(), model.parameters(), strict=True):
            assert torch.equal(kept, parameter)


@settings(deadline=None)
@given(st.floats(0, 0.9999), st.lists(st.floats(-5, 5), min_size=1, max_size=60))
def test_the_average_is_the_weighted_mean_of_the_weights(decay, values):
    """Against float64: the part of each step is (1 - its decay) times the decays of all later steps."""
    model = nn.Linear(1, 1, bias=False)
    average = moving_average(model, decay)
    for value in values:
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
    decays = [0.0] + [min(decay, (1 + t) / (10 + t)) for t in range(1, len(values))]
    parts = [(1 - kept) * math.prod(decays[i + 1 :]) for i, kept in enumerate(decays)]
    assert math.isclose(sum(parts), 1)
    expected = sum(part * value for part, value in zip(parts, values, strict=True))
    assert average.module.weight.item() == pytest.approx(expected, abs=1e-5)


def test_short_runs_forget_the_untrained_weights():
    """With decay 0.995 throughout, 37 % of an average is where it began, 200 steps before."""
    part = math.prod(average_decay(0.995, t) for t in range(1, 200))
    assert part < 1e-14 and math.isclose(0.995**200, 0.367, abs_tol=1e-3)
    assert average_decay(0.995, 1789) < 0.995 == average_decay(0.995, 1790)


def test_the_gradient_is_clipped_at_its_true_norm(run, monkeypatch, saved):
    """R17: with SGD at rate 1 the change of the weights is the clipped gradient."""
    plain_gradient_descent(monkeypatch)
    changes, logged = [], []
    for clip in (0, 0.01, 1000):
        saved.clear()
        assert run(f"{TEN} --lr=1 --batch_size=16 --grad_clip={clip}").status == 0
        changes.append((flat(saved[-1]["model"]) - flat(saved[0]["model"])).norm().item())
        logged.append(saved[-1]["progress"]["history"][0]["gradient_norm"])
    assert changes[0] > 0.05
    assert math.isclose(changes[1], 0.01, rel_tol=1e-3)
    assert changes[0] == changes[2]
    assert logged[0] == logged[1] == logged[2] and math.isclose(logged[0], changes[0], rel_tol=1e-3)


def test_two_runs_of_one_seed(start, tmp_path):
    """Also with workers, which load the same data in the same order."""
    flags = f"{DIGITS} --epochs=2 --batch_size=256 --dropout=0.3"
    with ThreadPoolExecutor() as threads:
        workers = threads.submit(succeed, start, tmp_path / "two", f"{flags} --num_workers=2")
        succeed(start, tmp_path / "none", f"{flags} --num_workers=0")
        workers.result()
    for name in (LAST, BEST):
        a, b = (load_checkpoint(tmp_path / place / "checkpoints" / name) for place in ("none", "two"))
        for part in a.keys() - {"settings"}:
            assert_same(a[part], b[part], part)


def test_the_command_on_a_cpu_gives_no_deprecation_warning(tmp_path):
    """R18, through the command as it is typed."""
    result = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-W", "error::DeprecationWarning:__main__",
         ROOT / "train.py", *SMALL_BATCHES.split(), "--amp=bf16", "--epochs=1"],
        cwd=tmp_path, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    assert result.stdout.count("bfloat16") == 1
    assert (tmp_path / "checkpoints" / BEST).exists()


# --- The learning rate and the optimizer's groups --------------------------------------------------------------------

RATES = st.floats(1e-6, 1)
LENGTHS = st.integers(1, 300)


@given(RATES, LENGTHS, st.floats(0, 0.9))
def test_schedule(peak, total, warmup_fraction):
    warmup = round(warmup_fraction * total)
    schedule = Schedule(peak, warmup, total)
    rates = [schedule(step) for step in range(total)]
    assert rates == [Schedule(peak, warmup, total)(step) for step in range(total)]  # a function of the step alone
    assert min(rates) > 0 and math.isclose(max(rates), peak)
    assert rates[:warmup] == pytest.approx([peak * (step + 1) / warmup for step in range(warmup)])
    falling = rates[max(0, warmup - 1) :]
    assert all(a >= b or math.isclose(a, b) for a, b in zip(falling, falling[1:], strict=False))
    assert math.isclose(schedule(total), FINAL_RATE * peak) or warmup == total
    assert schedule(10 * total) == pytest.approx(FINAL_RATE * peak)


def test_the_rate_in_figures():
    """A warm-up of 4 steps, then half a cosine from the peak to a hundredth of it."""
    schedule = Schedule(2.0, 4, 104)
    assert [schedule(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    for step, expected in {4: 2.0, 29: 1.71003571, 54: 1.01, 79: 0.30996429, 104: 0.02, 1000: 0.02}.items():
        assert schedule(step) == pytest.approx(expected, rel=1e-7)


def test_the_best_epoch_has_the_highest_accuracy_and_of_those_the_lowest_loss():
    task, progress = Classification(["a", "b"]), Progress("run", Schedule(1.0, 0, 10))
    epochs = [(0.5, 1.0, True), (0.5, 0.9, True), (0.5, 0.9, False), (0.5, 1.1, False), (0.4, 0.1, False),
              (0.6, 3.0, True), (0.6, 2.9, True)]  # fmt: skip
    for number, (accuracy, loss, better) in enumerate(epochs, 1):
        record = {"epoch": number, "val_accuracy": accuracy, "val_loss": loss}
        assert progress.end_epoch(record, partial(task.score, select_by=None)) is better, number
    assert progress.best["epoch"] == 7 and len(progress.history) == progress.epoch == 7


@given(RATES, LENGTHS, st.floats(0, 0.5), st.lists(st.tuples(LENGTHS, RATES, LENGTHS), max_size=4))
def test_a_changed_schedule_never_rises(peak, total, warmup_fraction, changes):
    """Each change: so many steps later, a new peak, so many steps left."""
    schedule = Schedule(peak, round(warmup_fraction * total), total)
    step, rates, jumps = 0, [], []
    for after, new_peak, left in [*changes, (300, None, None)]:
        rates += [schedule(number) for number in range(step, step + after)]
        step += after
        if new_peak:
            assert schedule.changed(step, schedule.peak, schedule.total_steps) is schedule
            schedule = schedule.changed(step, new_peak, step + left)
            jumps.append(step)
    decayed = [i for i in range(len(rates)) if i >= max(schedule.warmup_steps, 1)]
    for i in decayed:
        if i not in jumps or i > schedule.warmup_steps:
            assert rates[i] <= rates[i - 1] * (1 + 1e-9), i
    assert max(rates) <= max([peak, *(new for _, new, _ in changes)]) * (1 + 1e-9)


@pytest.mark.parametrize("share_weights", [False, True])
@pytest.mark.parametrize("grid_shape", [None, (2, 2)])
def test_every_parameter_is_in_one_group(share_weights, grid_shape):
    model = PerceiverModel(
        input_dim=5, d_model=16, num_heads=2, num_cross_attention_layers=2, num_self_attention_layers=4, num_latents=3,
        num_classes=4, grid_shape=grid_shape, share_weights=share_weights,
    )  # fmt: skip
    decayed, plain = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    ids = [id(parameter) for group in (decayed, plain) for parameter in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(parameter) for parameter in model.parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(parameter.ndim == 2 and names[id(parameter)].endswith("weight") for parameter in decayed["params"])
    others = [parameter for parameter in plain["params"] if parameter.ndim > 1]
    assert [names[id(parameter)].split(".")[-1] for parameter in others] == ["latents"]
