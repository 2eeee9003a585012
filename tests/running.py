"""Commands for the tests, in this process, and in real ones that are started, watched and ended.

Each of those that `server` starts runs train.py as __main__. They are forked from a process that has the libraries
loaded, which saves seconds apiece.
"""

import io
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from perceiver_model import PerceiverModel

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 120  # seconds, after which a process counts as hung
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
PRELOADED = [
    "train", "torch._dynamo", "torch.utils.tensorboard", "seaborn", "matplotlib.pyplot", "sklearn.metrics",
    "sklearn.datasets", "hypothesis", "pytest",
]  # fmt: skip


def run_train(folder, flags, file_limit=None, change=None, terminal=None):
    """In the new process: train.py with these flags (a text) in `folder`.

    Args:
        file_limit: bytes that any file may have, a full disk for whatever is larger.
        change: a function that is called first.
        terminal: the device on which the process runs; without one its output goes to output.txt.
    """
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    if terminal:
        screen = os.open(terminal, os.O_RDWR)  # the first one that a session opens is its own
        os.dup2(screen, 0)
    else:
        screen = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    if terminal:  # the streams of the process still take it for what the server's output was, a file with a position
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # the default one
    if change:
        change()
    sys.argv = ["train.py", *flags.split()]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def server():
    """start(folder, flags) starts a process of train.py; see run_train."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def start(folder, flags, **options):
        process = context.Process(target=run_train, args=(folder, flags), kwargs=options)
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        first = context.Process(target=int)  # the server inherits the environment of this moment
        first.start()
        first.join()
    return start


def end(process, patience=PATIENCE):
    """The exit status of a process that ends by itself."""
    process.join(patience)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)  # and its workers
        pytest.fail("the process hangs")
    return process.exitcode


def output(folder):
    return (folder / "output.txt").read_text()


def succeed(start, folder, flags):
    assert end(start(folder, flags)) == 0, output(folder)


def wait_until(condition, process):
    """Whether the condition came true before the process ended."""
    until = time.monotonic() + PATIENCE
    while process.is_alive():
        if condition():
            return True
        assert time.monotonic() < until
        time.sleep(0.0005)
    return False


def called(capsys, main, words):
    """A command in this process: its status and what it printed."""
    capsys.readouterr()
    try:
        status = main([str(word) for word in words])
    except SystemExit as stopped:
        status = stopped.code
    printed = capsys.readouterr()
    return SimpleNamespace(status=status, out=printed.out, err=printed.err)


def run_in(main, folder, *words):
    """A command in `folder`, in this process: its status and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with chdir(folder), redirect_stdout(out), redirect_stderr(err):
        try:
            status = main([str(word) for word in words])
        except SystemExit as stopped:
            status = stopped.code
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def in_two_processes(flags):
    """What torchrun shows of train.py in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "train.py"), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def children(pid):
    """The processes that a process started and that are still there; [] if it has ended itself."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid):
    """Whether there is such a process that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def before_step(monkeypatch, number, act):
    """Call `act` in the forward pass of training step `number` (one batch a step) of this process's next run."""
    forward, count = PerceiverModel.forward, -1  # the rehearsal is none

    def counting(self, *args, **kwargs):
        nonlocal count
        count += self.training
        if self.training and count == number:
            act()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(PerceiverModel, "forward", counting)


def stamp(file):
    return file.stat().st_mtime_ns if file.exists() else None
