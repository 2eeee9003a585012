"""Processes that load data, and signals: whatever goes wrong, a run ends with its message and its status, and nothing
of it is left."""

import ctypes
import multiprocessing
import os
import pty
import re
import resource
import select
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from running import alive, before_step, children, end, output, wait_until
from test_resume import SEQUENCES

import data_utils
import evaluation
import progress
from checkpoint import LAST, load_checkpoint
from data_utils import create_dataloader
from messages import UserError, worker_advice
from perceiver_model import PerceiverModel
from progress import STOP_SIGNALS, StopRequest, begin_worker
from tasks import Classification

LONG = f"{SEQUENCES} --num_samples=3000 --batch_size=8 --epochs=200"
PROMPT = 30  # seconds from an error to the end of its process, also on a busy machine; a hang lasts for ever


class Given(torch.utils.data.Dataset):
    """Sequences whose reader does what a test wants in epoch 2; `lengths` says that they are not read at the start."""

    lengths = None

    def __init__(self, num_samples, act):
        self.labels, self.act, self.epoch = np.arange(num_samples) % 3, act, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, number):
        tokens = torch.full((5, 4), float(self.labels[number]))
        return {"input": self.act(tokens, number) if self.epoch == 1 else tokens, "label": self.labels[number]}


def unreadable(tokens, number):
    raise OSError(5, "Input/output error")


def not_finite(tokens, number):
    return tokens / 0 if number == 7 else tokens


def slow(tokens, number, seen=[]):  # noqa: B006 (of one worker in one epoch)
    seen.append(number)
    if len(seen) > 8:  # its first batch is there, so the step can fail
        time.sleep(60)
    return tokens


def reading(act):
    """Called in the process: its training data are `Given`."""
    load = data_utils.DATASETS["synthetic"]

    def load_given(settings, info=None):
        splits, description = load(settings, info)
        return splits | {"train": Given(64, act)}, description

    data_utils.DATASETS["synthetic"] = load_given


def read_unreadable():
    reading(unreadable)


def read_not_finite():
    reading(not_finite)


def fail_in_step():
    """Called in the process: a step of epoch 2 fails, the first one where an epoch has 8 steps."""

    def fail():
        raise RuntimeError("a fault in a step")

    before_step(pytest.MonkeyPatch(), 9, fail)


def fail_while_workers_are_busy():
    reading(slow)
    fail_in_step()


def of_both(start, folder, flags, **options):
    """A run with one worker and a run with two, at once: (process, folder) of each."""
    folders = [folder / f"{number}" for number in (1, 2)]
    return [
        (start(place, f"{flags} --num_workers={number}", **options), place)
        for number, place in enumerate(folders, start=1)
    ]


def end_promptly(process, folder, says):
    """The exit status; the process ends within PROMPT seconds after it says something, and its workers with it."""
    workers = set()

    def said():
        workers.update(children(process.pid))
        return says in output(folder) if (folder / "output.txt").exists() else False

    wait_until(said, process)
    status = end(process, PROMPT)
    assert says in output(folder)
    until = time.monotonic() + PROMPT
    while any(map(alive, workers)):
        assert time.monotonic() < until
        time.sleep(0.01)
    return status


def test_a_worker_that_is_ended_while_it_begins_ends():
    """The signal may come before `begin_worker`, when the handlers are still those of the trainer."""

    def worker(over):
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGTERM)  # taken for a request to stop
            assert stop.agreed == signal.SIGTERM
            begin_worker(over, 0)
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(
        target=worker, args=(multiprocessing.RawValue(ctypes.c_bool, True),)
    )
    process.start()
    process.join(PROMPT)
    process.kill()
    assert process.exitcode == 0


SHORT = f"{SEQUENCES} --num_samples=70 --batch_size=8 --epochs=3"  # 64 training samples, 8 steps an epoch


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        (read_unreadable, 1, "OSError: "),
        (read_not_finite, 2, " of the batch: the input holds NaN or infinity"),
        (fail_in_step, 1, "RuntimeError: a fault in a step"),
        (fail_while_workers_are_busy, 1, "RuntimeError: a fault in a step"),
    ],
    ids=["a data set that raises", "a bad item", "a fault in a step", "a fault while workers are busy"],
)
def test_an_error_ends_the_run_and_its_workers(start, tmp_path, change, status, says):
    for process, folder in of_both(start, tmp_path, SHORT, change=change):
        assert end_promptly(process, folder, says) == status
        text = output(folder)
        assert len(re.findall("^error: ", text, re.MULTILINE)) == (status == 2)
        assert ("Traceback" in text) == (status == 1)
        assert load_checkpoint(folder / "checkpoints" / LAST)["epoch"] == 1


def test_a_killed_worker_ends_the_run(start, tmp_path):
    """As the system kills a process when memory runs out."""
    for process, folder in of_both(start, tmp_path, LONG):
        log = folder / "checkpoints" / "log.jsonl"
        assert wait_until(lambda log=log, process=process: log.exists() and children(process.pid), process)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        assert end_promptly(process, folder, "error: DataLoader worker (pid") == 2
        (line,) = re.findall("^error: .*", output(folder), re.MULTILINE)
        assert "--num_workers" in line and "--shm-size" in line and "--resume" in line
        assert "Traceback" not in output(folder)


def test_a_worker_that_dies_while_a_destructor_runs_is_one_line(monkeypatch):
    class Dying:
        def __del__(self):
            raise RuntimeError(self.text)

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: told.append(str(found.exc_value)))
    with pytest.raises(UserError, match="DataLoader worker .pid 7. is killed"), worker_advice():
        for text in ("DataLoader worker (pid 7) is killed by signal: Killed. ", "another"):
            Dying().text = text
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert told == ["another"]


def begin_slowly():
    """Called in the process: a worker that has just begun does nothing yet."""
    begin = progress.begin_worker

    def later(over, worker):
        time.sleep(2)
        begin(over, worker)

    progress.begin_worker = later


@pytest.mark.parametrize("change", [None, begin_slowly], ids=["at work", "as its workers begin"])
def test_a_killed_run_leaves_neither_workers_nor_a_lock(start, tmp_path, change):
    process = start(tmp_path / "run", f"{LONG} --num_workers=2", change=change)
    log = tmp_path / "run" / "checkpoints" / "log.jsonl"
    assert wait_until(lambda: log.exists() and len(children(process.pid)) == 2, process)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    again = start(tmp_path / "run", "--resume --epochs=1")  # at once, while the workers notice
    assert end(again) == 0, output(tmp_path / "run")
    until = time.monotonic() + PROMPT
    while any(map(alive, workers)):
        assert time.monotonic() < until
        time.sleep(0.01)


# --- Signals ---------------------------------------------------------------------------------------------------------


def test_a_second_signal_of_another_kind_changes_nothing(run, monkeypatch, tmp_path):
    """Systems send SIGTERM and SIGHUP in a row, a closing terminal SIGHUP twice: the run still saves."""
    pairs = ((signal.SIGTERM, signal.SIGINT), (signal.SIGHUP, signal.SIGHUP), (signal.SIGTERM, signal.SIGHUP))
    given = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    for first, second in pairs:

        def send(first=first, second=second):
            signal.raise_signal(first)
            time.sleep(0.01)  # of two at once Python handles that of the lower number first
            signal.raise_signal(second)

        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        with monkeypatch.context() as patch:
            before_step(patch, 3, send)
            result = run(f"{SEQUENCES} --batch_size=6")
        assert result.status == 128 + first
        assert result.out.endswith(f"train.py --resume checkpoints/{LAST}\n")
        assert f"{first.name}: saved checkpoints/{LAST} at step 3. " in result.out
        assert load_checkpoint(tmp_path / "checkpoints" / LAST)["step"] == 3
        assert before == {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGHUP, given)


def test_an_ignored_hang_up_stays_ignored(run, monkeypatch, tmp_path):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGHUP))
        assert run(f"{SEQUENCES} --epochs=1").status == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_closed(start, tmp_path):
    """The run saves and ends, although nothing can be shown any more, and goes on later."""
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)
    folder = tmp_path / "run"
    process = start(folder, f"{LONG} --num_workers=1", terminal=name)
    shown = b""
    while b"epoch   2/200" not in shown:
        assert process.is_alive(), shown.decode()
        if select.select([ours], [], [], 1)[0]:
            shown += os.read(ours, 65536)
    os.close(theirs)
    os.close(ours)
    assert end(process, 30) == 128 + signal.SIGHUP
    checkpoint = load_checkpoint(folder / "checkpoints" / LAST)
    epoch, batch = checkpoint["progress"]["epoch"], checkpoint["progress"]["batch"]
    assert epoch >= 2 and checkpoint["step"] == 338 * epoch + batch
    assert end(start(folder, f"--resume --epochs={epoch + 1}")) == 0, output(folder)
    assert f"{epoch} of {epoch + 1} epochs done, batch {batch} of the next" in output(folder)


def test_a_terminal_may_hang_up_twice():
    """Closing it sends SIGHUP to the group and to the shell, which passes it on; other signals end a run at once."""
    seen = []
    before = {number: signal.signal(number, lambda number, frame: seen.append(number)) for number in STOP_SIGNALS}
    try:
        for number in STOP_SIGNALS:
            with StopRequest() as stop:
                signal.raise_signal(number)
                assert stop.agreed == number and seen == []
                signal.raise_signal(number)
                assert seen == ([] if number == signal.SIGHUP else [number])
            seen.clear()
            signal.raise_signal(number)
            assert seen == [number]  # what was there before is there again
            seen.clear()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_training_in_a_thread(run, tmp_path, capsys):
    """Python handles signals in the main thread alone; workers included."""
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    results = []
    thread = threading.Thread(target=lambda: results.append(run(f"{SEQUENCES} --epochs=2 --num_workers=1")))
    thread.start()
    thread.join(100)
    assert results[0].status == 0, results[0].err
    assert load_checkpoint(tmp_path / "checkpoints" / LAST)["epoch"] == 2
    assert handlers == [signal.getsignal(number) for number in STOP_SIGNALS]


# --- Descriptors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pass_over", ["collect", "collect_latents"])
def test_an_evaluation_holds_no_descriptors_of_its_batches(pass_over):
    """1,000 batches of a worker, each tensor of which comes with a descriptor."""
    model = PerceiverModel(4, 3, d_model=8, num_heads=1, num_latents=2, num_self_attention_layers=1)
    loader = create_dataloader(Given(1000, None), 1, num_workers=1)
    arguments = [Classification(["a", "b", "c"])] if pass_over == "collect" else []
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 100, before[1]))
    try:
        found = getattr(evaluation, pass_over)(model, loader, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    if arguments:
        assert found["label"].tolist() == [number % 3 for number in range(1000)]
        assert found["tokens"].tolist() == [5] * 1000
    else:
        assert found.shape == (1000, 8)
