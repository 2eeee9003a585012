"""Tests import the modules that lie in the root of the repository, and compute with one thread."""

import ctypes
import os
import pathlib
import sys
import time

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny: a second thread costs more than it saves
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=20, help="how many training processes test_resume.py kills, at least")
    text = "how many wrong values test_untrusted.py puts in each place of a checkpoint"
    parser.addoption("--forgeries", type=int, default=0, help=text)


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def start():
    from running import server

    return server()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(flags) trains in an empty folder, in this process, without pictures: status and what was printed."""
    from running import called

    import plots
    import run_log
    import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_log, "tensorboard_writer", lambda *_: None)
    monkeypatch.setattr(plots, "plot_training_curves", lambda history, path, *_: path.write_text("curves"))

    def call(flags):
        return called(capsys, train.main, flags.split())

    return call


@pytest.fixture(scope="module")
def without_curves():
    """On the CPU, without TensorBoard and curves, which cost more than tiny runs."""
    import torch

    import plots
    import run_log

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(run_log, "tensorboard_writer", lambda *_: None)
        patch.setattr(plots, "plot_training_curves", lambda history, path, *_: path.write_text("curves"))
        yield


def descendants(pid):
    """Process number -> command of all processes below this one, but for the two of multiprocessing's own."""
    from multiprocessing.forkserver import _forkserver

    from running import alive, children

    found = {}
    for child in filter(alive, children(pid)):
        command = pathlib.Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        if child != _forkserver._forkserver_pid and "multiprocessing.resource_tracker" not in command:
            found[child] = command
        found |= descendants(child)
    return found


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left():
    """When all tests are done, so is every process that they started, also one whose parent was killed: on Linux such
    a process becomes a child of this one, which asks for that."""
    if not sys.platform.startswith("linux"):
        yield
        return
    PR_SET_CHILD_SUBREAPER = 36
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    until = time.monotonic() + 10
    while left := descendants(os.getpid()):
        assert time.monotonic() < until, f"processes that outlive the tests: {left}"
        time.sleep(0.1)
