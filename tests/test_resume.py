"""Runs that are killed, stopped and resumed against unbroken ones, and everything else that can end a run."""

import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import evaluation
import train
from checkpoint import BEST, LAST, load_checkpoint
from config import UserError
from perceiver_model import PerceiverModel, create_perceiver_model

ROOT = Path(train.__file__).parent
MODEL = (
    "--model_size tiny --d_model 16 --num_heads 2 --num_latents 4 --num_cross_attention_layers 1 "
    "--num_self_attention_layers 1"
).split()
SEQUENCES = "--dataset synthetic --num_samples 60 --seq_len_range 5 12 --feature_dim 4 --num_classes 3".split() + MODEL
DIGITS = "--dataset digits --patch_size 4 --batch_size 256".split() + MODEL
NOT_COMPARED = {"run_name", "seconds", "samples_per_second"}  # what the clock decides
PATIENCE = 120  # seconds, after which a process counts as hung


# --- Real processes --------------------------------------------------------------------------------------------------
# Each is a process of its own that runs train.py as __main__. Most are forked from a server that has the libraries
# loaded, which saves seconds apiece.


def run_train(folder, flags, file_limit=None):
    """In the new process: train.py with these flags in `folder`, with its output in output.txt."""
    os.setsid()
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if file_limit:  # bytes that any file may have: a full disk for whatever is larger
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = ["train.py", *flags]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


@pytest.fixture(scope="session")
def start():
    """start(folder, *flags) starts a process of train.py."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([
        "train", "torch._dynamo", "torch.utils.tensorboard", "seaborn", "matplotlib.pyplot", "sklearn.metrics",
        "sklearn.datasets", "hypothesis", "pytest",
    ])  # fmt: skip

    def start_process(folder, *flags, **options):
        process = context.Process(target=run_train, args=(folder, flags), kwargs=options)
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        first = context.Process(target=int)  # the server inherits the environment of this moment
        first.start()
        first.join()
    return start_process


def end(process):
    """The exit status of a process that ends by itself."""
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        pytest.fail("the process hangs")
    return process.exitcode


def output(folder):
    return (folder / "output.txt").read_text()


def succeed(start, folder, *flags):
    assert end(start(folder, *flags)) == 0, output(folder)


def wait_until(condition, process):
    """Whether the condition came true before the process ended."""
    until = time.monotonic() + PATIENCE
    while process.is_alive():
        if condition():
            return True
        assert time.monotonic() < until
        time.sleep(0.0005)
    return False


def stamp(file):
    return file.stat().st_mtime_ns if file.exists() else None


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
    return [json.loads(line) for line in (folder / "checkpoints" / "log.jsonl").read_text().splitlines()]


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
        process = start(folder, *(["--resume"] if last.exists() else flags))
        if moment:
            kind, delay = moment
            conditions = {
                "start": lambda: True,
                "step": lambda before=before: (stamp(last), stamp(log)) != before,
                "save": lambda left=left: set(checkpoints.glob("*.pth.tmp")) - left,
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


MOMENTS = st.lists(
    st.tuples(st.just("step"), st.floats(0, 0.4))
    | st.tuples(st.just("save"), st.floats(0, 0.003))
    | st.tuples(st.just("start"), st.floats(0, 1)),
    min_size=5,
    max_size=5,
)
OPTIONS = st.fixed_dictionaries({
    "data": st.sampled_from([[*SEQUENCES, "--bucket_by_length"], SEQUENCES, DIGITS]),
    "dropout": st.sampled_from([0.0, 0.3]),
    "attention_dropout": st.sampled_from([0.0, 0.2]),
    "accumulation_steps": st.sampled_from([1, 2, 3]),
    "amp": st.sampled_from(["off", "bf16"]),
    "num_workers": st.sampled_from([0, 1]),
    "save_every": st.integers(0, 3),
    "seed": st.integers(0, 5),
})  # fmt: skip
ALL_ON = {
    "data": [*SEQUENCES, "--bucket_by_length"], "dropout": 0.3, "attention_dropout": 0.2, "accumulation_steps": 2,
    "amp": "bf16", "num_workers": 1, "save_every": 2, "seed": 1,
}  # fmt: skip
AUGMENTED = ALL_ON | {"data": DIGITS, "num_workers": 0, "save_every": 1}


def flags_of(options):
    flags = [f"--{name}={value}" for name, value in options.items() if name != "data"]
    return [*options["data"], "--epochs=4", *([] if "--batch_size" in options["data"] else ["--batch_size=6"]), *flags]


def test_a_killed_run_ends_as_the_unbroken_one(start, tmp_path_factory, pytestconfig):
    wanted = pytestconfig.getoption("--kills")
    kills = 0

    @settings(
        max_examples=math.ceil(wanted / 5), deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    @example(ALL_ON, [("save", 0.0), ("step", 0.1), ("start", 0.3), ("save", 0.001), ("step", 0.3)])
    @example(AUGMENTED, [("step", 0.05), ("save", 0.0), ("step", 0.2), ("save", 0.002), ("step", 0.0)])
    @given(OPTIONS, MOMENTS)
    def check(options, moments):
        nonlocal kills
        folder = tmp_path_factory.mktemp("run")
        with ThreadPoolExecutor() as threads:  # both at once
            unbroken = threads.submit(succeed, start, folder / "unbroken", *flags_of(options))
            killed = threads.submit(run_killed, start, folder / "killed", flags_of(options), moments)
            unbroken.result()
            kills += killed.result()
        assert_same_run(folder / "unbroken", folder / "killed")

    check()
    assert kills >= wanted
