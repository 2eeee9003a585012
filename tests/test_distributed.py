"""Runs of several processes against those of one. Everything here starts real groups by torchrun, on loopback.

Starting one takes seconds, so a group makes several runs, one after another, in a process each (`worker`, below).
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the processes of torchrun have no conftest.py

from running import children  # noqa: E402

import distributed  # noqa: E402
import evaluation  # noqa: E402
import inference  # noqa: E402
import run_log  # noqa: E402
import train  # noqa: E402
from checkpoint import BEST, LAST, load_checkpoint  # noqa: E402
from data_utils import EpochBatchSampler, loaded_of, share_of, unshared  # noqa: E402
from files import owned  # noqa: E402
from messages import UserError  # noqa: E402
from perceiver_model import PerceiverModel  # noqa: E402
from progress import STOP_SIGNALS  # noqa: E402

PATIENCE = 300  # seconds, after which a group counts as hung
MODEL = (
    "--model_size=tiny --d_model=16 --num_heads=2 --num_latents=4 --num_cross_attention_layers=1 "
    "--num_self_attention_layers=1"
)
SEQUENCES = f"--dataset=synthetic --num_samples=60 --seq_len_range 5 12 --feature_dim=4 --num_classes=3 {MODEL}"
EXACT = f"{SEQUENCES} --dropout=0 --lr=5e-3 --epochs=2"
TEN = f"{EXACT} --num_samples=12 --num_classes=2"  # 10 to train, 2 to validate: fewer than three processes
TARGETS = f"--dataset=text --data_path={ROOT}/tests/data/targets.jsonl {MODEL} --dropout=0 --epochs=2 --amp=off"
DROPOUT = f"{SEQUENCES} --epochs=2 --batch_size=7 --dropout=0.3 --attention_dropout=0.2 --save_every=2"

# name: (flags, what is changed in the processes). Batches of 7 of 54 samples; 5 in the last one.
EQUAL = {
    "uneven": (f"{EXACT} --batch_size=7", {"double"}),
    "a process without a sample": (f"{TEN} --batch_size=4", {"double"}),  # 2 in the last batch
    "accumulation": (f"{TEN} --batch_size=4 --accumulation_steps=2 --label_smoothing=0.1", {"double"}),
    "average of buckets": (f"{EXACT} --batch_size=8 --bucket_by_length --ema_decay=0.5", {"double"}),
    "checkpointing": (f"{EXACT} --batch_size=7 --gradient_checkpointing --accumulation_steps=3", {"double"}),
    "compiled": (
        f"{EXACT} --batch_size=14 --epochs=1 --seq_len_range 8 8 --compile --gradient_checkpointing",
        {"double", "quick compiler"},
    ),
    "bf16": (f"{EXACT} --batch_size=7 --amp=bf16", set()),
    "a class for each token": (f"{EXACT} --batch_size=7 --task=tagging", {"double"}),
    "numbers": (f"{TARGETS} --batch_size=7 --task=regression --label_column=parts", set()),
    "several labels": (
        f"{TARGETS} --batch_size=7 --task=multilabel --label_column=names --tune_thresholds --class_weights=balanced",
        set(),
    ),
    "hidden tokens": (f"{TEN} --batch_size=4 --task=reconstruct --gradient_checkpointing", {"double"}),
}


# --- In a process of torchrun ----------------------------------------------------------------------------------------


@contextmanager
def changed(changes, rank=0):
    """A run in which what `changes` names is different, and that leaves records of what it did in its folder."""
    with pytest.MonkeyPatch.context() as patch:
        inputs, metrics, iterate = train.model_inputs, evaluation.class_metrics, EpochBatchSampler.__iter__
        forward, steps = PerceiverModel.forward, -1  # the rehearsal is none
        actions = {int(step): act for change in changes if "@" in change for act, _, step in [change.partition("@")]}

        def double_inputs(*args):
            x, mask = inputs(*args)
            return x.double(), mask

        def recorded_metrics(rows, names):
            note("validated.txt", rows["label"].tolist())
            return metrics(rows, names)

        def recorded_batches(self):
            batches = list(iterate(self))
            note(f"{'train' if self.shuffle else 'other'}_{rank}.txt", batches)
            return iter(batches)

        def eventful_forward(self, *args, **kwargs):
            nonlocal steps
            steps += self.training
            if self.training and steps in actions:
                act(actions[steps])
            return forward(self, *args, **kwargs)

        if "double" in changes:
            torch.set_default_dtype(torch.float64)
            patch.setattr(train, "model_inputs", double_inputs)
        if "quick compiler" in changes:
            patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        patch.setattr(evaluation, "class_metrics", recorded_metrics)
        patch.setattr(EpochBatchSampler, "__iter__", recorded_batches)
        patch.setattr(train, "CHECKPOINT_OF_THIS_LAUNCH", os.getcwd())  # a run that begins is the first of its launch
        if actions:
            patch.setattr(PerceiverModel, "forward", eventful_forward)
        if "no data" in changes:
            patch.setattr(train, "load_splits", lambda *_: act("mistake"))
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
            torch._dynamo.reset()
            for number, handler in handlers.items():
                signal.signal(number, handler)


def note(name, value):
    with open(name, "a") as file:
        print(json.dumps(value), file=file)


def act(name):
    if name == "mistake":
        raise UserError("no such thing")
    if name == "fault":
        raise RuntimeError("a fault of ours")
    signal.raise_signal(signal.Signals[name])


def worker(runs):
    """Make the runs: [folder, flags, changes, {rank: further changes}], each as a start of train.py."""
    with distributed.processes():
        rank = distributed.rank()
        for folder, flags, changes, of_ranks in runs:
            if rank == 0 and os.path.exists(f"{folder}/checkpoints"):  # the second run of this name
                shutil.copytree(folder, f"{folder} before", dirs_exist_ok=True)
            distributed.barrier()
            os.makedirs(folder, exist_ok=True)
            os.chdir(folder)
            with changed({*changes, *of_ranks.get(str(rank), [])}, rank):
                note(f"status_{rank}.txt", train.main(flags.split()))
            distributed.barrier()


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
    sys.exit()


# --- Groups of processes ---------------------------------------------------------------------------------------------


class Group:
    """A torchrun with `size` processes in a folder, its output so far in `text()`."""

    def __init__(self, folder, size, *words, options=()):
        folder.mkdir(exist_ok=True)
        self.output = folder / "output.txt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                [*command, *map(str, words)], cwd=folder, env=environment, stdout=output, stderr=output
            )
        self.until = time.monotonic() + PATIENCE

    def text(self):
        return self.output.read_text()

    def wait_for(self, words, times=1):
        while self.text().count(words) < times:
            if self.process.poll() is not None or time.monotonic() > self.until:
                self.end()
                pytest.fail(f"no {words!r} in\n{self.text()}")
            time.sleep(0.01)

    def workers(self):
        """The processes that torchrun started; they have process groups of their own."""
        return [pid for pid in children(self.process.pid) if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def end(self):
        """The exit status; a group that does not end by itself is killed."""
        try:
            return self.process.wait(max(0.1, self.until - time.monotonic()))
        except subprocess.TimeoutExpired:
            for pid in [*children(self.process.pid), self.process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            pytest.fail(f"the group hangs:\n{self.text()}")


def make_runs(folder, size, runs):
    """Make the runs (name, flags, changes, further changes of ranks) below a folder with one group."""
    described = [[str(folder / name), flags, sorted(changes), *more] for name, flags, changes, *more in runs]
    group = Group(folder, size, __file__, json.dumps(described))
    return group, group.end()


def records(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The runs of EQUAL by a single process, without torchrun: a folder for each."""
    folder = tmp_path_factory.mktemp("one")
    for name, (flags, changes) in EQUAL.items():
        (folder / name).mkdir()
        with pytest.MonkeyPatch.context() as patch, changed(changes):
            patch.chdir(folder / name)
            patch.setattr(run_log, "tensorboard_writer", lambda *_: None)
            assert train.main(flags.split()) == 0
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same by two processes, and runs that are stopped."""
    runs = [(name, *run, {}) for name, run in EQUAL.items()]
    runs += [
        ("unbroken", DROPOUT, set(), {}),
        ("stopped", DROPOUT, set(), {"1": ["SIGTERM@5"]}),
        ("stopped", "--resume", set(), {}),
        ("moved", EQUAL["uneven"][0], {"double"}, {"0": ["SIGINT@11"]}),
    ]
    folder = tmp_path_factory.mktemp("two")
    group, status = make_runs(folder, 2, runs)
    assert status == 0, group.text()
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory, two):
    """The same by three, which also go on with a run of two."""
    folder = tmp_path_factory.mktemp("three")
    shutil.copytree(two / "moved", folder / "moved")
    runs = [(name, *run, {}) for name, run in EQUAL.items() if name != "compiled"]
    runs += [("moved", "--resume", {"double"}, {})]
    group, status = make_runs(folder, 3, runs)
    assert status == 0, group.text()
    return folder


@pytest.fixture(params=["two", pytest.param("three", marks=pytest.mark.slow)])
def several(request):
    return request.getfixturevalue(request.param)


# --- Several processes are one ---------------------------------------------------------------------------------------


def assert_equal_runs(folder, other, tolerance=1e-9):
    for name in (LAST, BEST):
        a, b = (load_checkpoint(place / "checkpoints" / name) for place in (folder, other))
        assert list(a["model"]) == list(b["model"])
        for key in a["model"]:
            torch.testing.assert_close(a["model"][key], b["model"][key], rtol=0, atol=tolerance)
        assert (a["epoch"], a["step"]) == (b["epoch"], b["step"])
        assert len(a["progress"]["history"]) == len(b["progress"]["history"])
        for ours, theirs in zip(a["progress"]["history"], b["progress"]["history"], strict=True):
            for key in ours.keys() - {"seconds", "samples_per_second"}:
                assert ours[key] == pytest.approx(theirs[key], abs=1e-6 if tolerance < 1e-6 else 0.1), key


@pytest.mark.parametrize(
    ("several", "name"),
    [("two", name) for name in EQUAL]
    + [pytest.param("three", name, marks=pytest.mark.slow) for name in EQUAL if name != "compiled"],
    indirect=["several"],
)
def test_several_processes_end_with_the_weights_of_one(one, several, name):
    flags, changes = EQUAL[name]
    # In float32 AdamW makes whole steps of gradients that are little more than rounding
    assert_equal_runs(several / name, one / name, 1e-9 if "double" in changes else 2e-2 if "bf16" in flags else 1e-3)


def test_one_process_of_torchrun_is_a_plain_run(one, tmp_path):
    from test_resume import assert_same

    name = "uneven"
    group, status = make_runs(tmp_path, 1, [(name, *EQUAL[name], {})])
    assert status == 0, group.text()
    assert_same(*(load_checkpoint(folder / name / "checkpoints" / LAST) for folder in (one, tmp_path)))


@pytest.mark.parametrize("name", ["uneven", "a process without a sample"])
def test_each_sample_is_validated_once(one, several, name):
    """The labels that every evaluation was made of: the rehearsal, each epoch, the test."""
    ours, theirs = (records(folder / name, "validated.txt") for folder in (several, one))
    assert ours == theirs
    assert [len(labels) for labels in ours[1:]] == ([6, 6, 12] if name == "uneven" else [2, 2, 3])


def test_every_epoch_has_an_order_of_its_own_and_shards_cover_it(several):
    """R43."""
    ranks = [records(several / "uneven", file.name) for file in sorted((several / "uneven").glob("train_*.txt"))]
    assert len(ranks) == (3 if several.name.startswith("three") else 2)
    orders = []
    for epoch in range(2):
        loaded = [[number for batch in rank[epoch] for number in batch] for rank in ranks]
        assert sorted(sum(loaded, [])) == list(range(54))
        assert len({len(rank[epoch]) for rank in ranks}) == 1
        orders.append(loaded)
    assert orders[0] != orders[1]


def test_only_the_first_process_writes(two):
    """R41: one event file, one settings file, one checkpoint, without a wrapper's prefix; nothing aside."""
    folder = two / "unbroken"
    assert len(list(folder.rglob("events.out*"))) == 3 * len(list(folder.rglob("settings.json"))) == 3
    assert {file.name for file in (folder / "checkpoints").iterdir()} == set(run_log.RUN_FILES)
    for name, (flags, _) in EQUAL.items():
        weights = load_checkpoint(two / name / "checkpoints" / LAST)["model"]
        assert not [key for key in weights if key.startswith(("module.", "_orig_mod."))], flags
    text = (two / "output.txt").read_text()
    for words in ("\ndata    ", "device  cpu", "best epoch"):
        assert text.count(words) == len(EQUAL) + 4 - 2 * (words == "best epoch"), words  # two were stopped
    assert "; 2 processes, 3 or 4 of the 7 samples of a batch each" in text
    assert "; 2 processes, 4 of the 8 samples of a batch each" in text


try:
    from hypothesis import given
    from hypothesis import strategies as st
except ImportError:
    pass
else:

    @given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 7), st.integers(0, 3))
    def test_shares_are_disjoint_and_cover_the_data(num_samples, batch_size, size, epoch):
        samplers = [EpochBatchSampler(num_samples, batch_size, True, share=(rank, size)) for rank in range(size)]
        batches = samplers[0].batches(epoch)
        for sampler in samplers:
            sampler.set_epoch(epoch)
        loaded = [list(sampler) for sampler in samplers]
        assert all(len(own) == len(batches) and all(own) for own in loaded)
        for number, batch in enumerate(batches):
            shares = [share_of(batch, rank, size) for rank in range(size)]
            assert sorted(sum(shares, [])) == sorted(batch)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            assert [own[number] for own in loaded] == [loaded_of(batch, rank, size) for rank in range(size)]
        in_order = EpochBatchSampler(num_samples, batch_size).batches(0)
        parts = [
            {"numbers": np.array([n for batch in in_order for n in loaded_of(batch, rank, size)])}
            for rank in range(size)
        ]
        assert unshared(parts, in_order)["numbers"].tolist() == list(range(num_samples))


# --- Stopped and resumed ---------------------------------------------------------------------------------------------


def test_a_signal_to_one_process_stops_all_after_the_same_step(two):
    for name, status, step in (("stopped before", 143, 5), ("moved", 130, 11)):
        assert [records(two / name, f"status_{rank}.txt") for rank in range(2)] == [[status]] * 2
        assert load_checkpoint(two / name / "checkpoints" / LAST)["step"] == step
    assert (
        f"SIGTERM: saved checkpoints/{LAST} at step 5. "
        f"Continue with: torchrun --standalone --nproc_per_node=2 train.py --resume checkpoints/{LAST}\n"
    ) in (two / "output.txt").read_text()


def test_as_many_processes_resume_bit_for_bit(two):
    from test_resume import assert_same

    for name in (LAST, BEST):
        a, b = (load_checkpoint(two / run / "checkpoints" / name) for run in ("unbroken", "stopped"))
        assert len(a["other_random_states"]) == 1
        assert_same(a, b, name)


@pytest.mark.slow
def test_any_number_of_processes_resume_a_run(one, two, three, tmp_path, monkeypatch, capsys):
    """Begun by two, stopped in the second epoch, ended by three, and by one."""
    assert_equal_runs(three / "moved", one / "uneven")
    assert "note: processes changed from 2 to 3: " in (three / "output.txt").read_text()
    shutil.copytree(two / "moved", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_log, "tensorboard_writer", lambda *_: None)
    with changed({"double"}):
        assert train.main(["--resume"]) == 0
    assert "note: processes changed from 2 to 1: " in capsys.readouterr().out
    assert_equal_runs(tmp_path, one / "uneven")


@pytest.mark.slow
def test_a_killed_process_is_started_anew_and_goes_on(tmp_path):
    """And where none is started anew any more, all end. No earlier run is taken for this one."""
    flags = f"{SEQUENCES} --epochs=500 --batch_size=20"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / LAST).write_text("of an earlier run")
    group = Group(tmp_path, 2, ROOT / "train.py", *flags.split(), options=["--max-restarts=1"])
    group.wait_for("epoch   2/500")
    os.kill(group.workers()[1], signal.SIGKILL)
    group.wait_for("resuming")
    done = int(re.search(r"resuming checkpoints/last_model.pth: (\d+) of 500 epochs done", group.text())[1])
    assert done >= 1
    group.wait_for(f"epoch {done + 3:>3}/500")
    killed = time.monotonic()
    os.kill(group.workers()[0], signal.SIGKILL)
    assert group.end() != 0 and time.monotonic() - killed < 20
    text = group.text()
    assert text.count("note: torchrun restarted the processes") == text.count("the earlier run in checkpoints") == 1
    for start in text.split("note: torchrun restarted"):  # the other process may be ended before it can say so
        assert start.count("error: ") == start.count("error: lost another process of the run") <= 1, text
    assert "exitcode  : -9" in text and "RuntimeError" not in text
    epochs = [int(number) for number in re.findall(r"^epoch +(\d+)/500", text, re.MULTILINE)]
    before = len(epochs) - (epochs[-1] - done)  # of them one may have been logged and not saved
    assert before in (done, done + 1) and epochs == [*range(1, before + 1), *range(done + 1, epochs[-1] + 1)]


@pytest.mark.slow
def test_a_killed_loader_worker_starts_the_processes_again(tmp_path):
    """As where memory runs out: its trainer ends, so that torchrun sees it."""
    flags = f"{SEQUENCES} --num_samples=600 --epochs=500 --batch_size=20 --num_workers=1"
    group = Group(tmp_path, 2, ROOT / "train.py", *flags.split(), options=["--max-restarts=1"])
    group.wait_for("epoch   2/500")
    trainer = group.workers()[1]
    while not (loaders := children(trainer)):  # there is none between two epochs
        assert time.monotonic() < group.until
    os.kill(loaders[0], signal.SIGKILL)
    group.wait_for("resuming")
    done = int(re.search(r"resuming checkpoints/last_model.pth: (\d+) of 500 epochs done", group.text())[1])
    group.wait_for(f"epoch {done + 1:>3}/500")
    assert "error: DataLoader worker (pid" in group.text()
    group.process.send_signal(signal.SIGTERM)
    assert group.end() != 0 and "SIGTERM: saved" in group.text()


# --- Ends promptly, with one message ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_control_c_of_torchrun_saves_and_ends(tmp_path):
    group = Group(tmp_path, 2, ROOT / "train.py", *f"{SEQUENCES} --epochs=500".split())
    group.wait_for("epoch   2/500")
    sent = time.monotonic()
    group.process.send_signal(signal.SIGINT)
    assert group.end() != 0
    assert time.monotonic() - sent < 20
    text = group.text()
    step = load_checkpoint(tmp_path / "checkpoints" / LAST)["step"]
    assert text.count(f"SIGINT: saved checkpoints/{LAST} at step {step}. Continue with: torchrun") == 1, text
    assert "error: " not in text and "Error" not in text.replace("SignalException", "")


@pytest.mark.parametrize(
    ("flags", "of_ranks", "says", "traceback"),
    [
        pytest.param(f"{SEQUENCES} --checkpoint_dir=taken", {},
                     "error: taken belongs to a run that is still going (", False, marks=pytest.mark.slow),
        (f"{SEQUENCES} --batch_size=7", {"1": ["mistake@3"]}, "error: no such thing", False),
        (f"{SEQUENCES} --batch_size=7", {"1": ["fault@3"]}, "RuntimeError: a fault of ours", True),
        pytest.param(f"{SEQUENCES} --batch_size=7", {"0": ["no data"]}, "error: no such thing", False,
                     marks=pytest.mark.slow),
        pytest.param("--lr=x", {}, 'error: --lr: expected a number (per step) above 0, got "x"', False,
                     marks=pytest.mark.slow),
    ],
    ids=["another run's folder", "a mistake that one meets", "a fault that one meets", "no data, others wait",
         "a mistake that all make"],
)  # fmt: skip
def test_an_error_ends_all_with_one_message(tmp_path, flags, of_ranks, says, traceback):
    started = time.monotonic()
    with owned(tmp_path / "run" / "taken"):
        group, status = make_runs(tmp_path, 3 if "0" in of_ranks else 2, [("run", flags, set(), of_ranks)])
    assert status != 0 and time.monotonic() - started < 60
    text = group.text()
    ours = text[: text.index("torch/distributed/run.py")]  # what follows is torchrun's own report
    ours = ours[: ours.rindex("Traceback")]
    assert ours.count(says) == 1, text
    assert ours.count("error: ") == (not traceback) and ours.count("Traceback") == traceback, text


@pytest.mark.parametrize("script", ["train.py", "inference.py"])
@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, r"one of several processes \(RANK=0, WORLD_SIZE=2\).*unset both"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, r"RANK=1, WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2"}, r"RANK=None, WORLD_SIZE=2"),
        ({"RANK": "3"}, r"RANK=3, WORLD_SIZE=None"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, r"RANK=1, WORLD_SIZE=1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a whole number"),
        ({"WORLD_SIZE": ""}, None),
        ({"WORLD_SIZE": " ", "RANK": ""}, None),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}, None),
    ],
)
def test_processes_without_torchrun_are_refused(monkeypatch, tmp_path, capsys, script, environment, says):
    """A cluster that sets the variables and starts the plain script: none trains the whole run by itself."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    main = train.main if script == "train.py" else inference.main
    flags = "--resume none.pth" if script == "train.py" else "--model_path none.pth"  # goes no further than this
    with pytest.raises(SystemExit) as ended:
        main(flags.split())
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert re.search(says or "cannot read the checkpoint none.pth", error)
    if says and script == "train.py" and "two" not in says:
        assert "torchrun --nnodes=$WORLD_SIZE --node_rank=$RANK --nproc_per_node=1 " in error
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_the_command_for_a_cluster_makes_one_group_of_its_processes(tmp_path):
    """Two 'machines' with the variables that it sets, each with the command that the refusal names."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"exec {sys.executable} -m torch.distributed.run {distributed.AS_TORCHRUN.partition(' ')[2]} "
    command += f"{ROOT / 'train.py'} {EXACT}"
    machines = []
    for rank in range(2):
        variables = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {name: str(value) for name, value in variables.items()}
        with open(tmp_path / f"{rank}.txt", "w") as output:
            machines.append(subprocess.Popen(
                ["bash", "-c", command], cwd=tmp_path, env=environment, stdout=output, stderr=output
            ))  # fmt: skip
    assert [machine.wait(PATIENCE) for machine in machines] == [0, 0]
    texts = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert "2 processes, 16 of the 32 samples of a batch each" in texts[0] and "best epoch" in texts[0]
    assert "epoch" not in texts[1]


@pytest.mark.parametrize(
    ("device", "says"),
    [("cuda", "4 processes on a machine with 1 CUDA cards; .*--nproc_per_node=1"), ("mps", "add --device cpu")],
)
def test_devices_that_the_processes_cannot_share(monkeypatch, device, says):
    monkeypatch.setattr(distributed, "size", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        distributed.own_device(torch.device(device))
    assert distributed.own_device(torch.device("cpu")) == torch.device("cpu")
