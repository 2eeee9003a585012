"""The checkpoint file: written so that a whole one is there at every moment, and read so that no bytes can do harm."""

import builtins
import errno
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

import checkpoint
import files
import run_log
import train
from checkpoint import BEST, LAST, build_model, load_checkpoint, load_weights, save_checkpoint
from config import Settings
from inference import load_model, predict
from messages import UserError
from perceiver_model import PerceiverModel

ROOT = Path(__file__).resolve().parent.parent
MODEL_ARGS = {
    "input_dim": 2, "d_model": 4, "num_heads": 2, "num_latents": 2, "num_cross_attention_layers": 1,
    "num_self_attention_layers": 1, "num_classes": 2, "num_frequency_bands": 1, "mlp_ratio": 1,
}  # fmt: skip


def contents_of(number):
    """The contents of a checkpoint, told apart by a number."""
    model = PerceiverModel(**MODEL_ARGS)
    torch.manual_seed(number)
    weights = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    data = {
        "task": {"kind": "classification", "class_names": ["a", "b"], "class_weights": None}, "num_outputs": 2,
        "adapters": {"input": {"kind": "tensor", "input_dim": 2, "max_seq_len": None}},
    }  # fmt: skip
    parts = {"settings": Settings().to_dict(), "data": data, "best": {}}
    return {"model": weights, "model_args": MODEL_ARGS, "epoch": number, "step": 10 * number, **parts}


OLD, NEW = contents_of(1), contents_of(2)


def same(a, b):
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def holds(path, contents):
    loaded = load_checkpoint(path)
    return same({name: loaded[name] for name in contents}, contents)


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / LAST, OLD)
    return tmp_path / LAST


several = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# --- Writing ---------------------------------------------------------------------------------------------------------


class Limited:
    """A file opened for writing that calls `fail` when it is to hold more than so many bytes."""

    def __init__(self, path, mode, limit, fail):
        self.file, self.left, self.fail = builtins.open(path, mode), limit, fail  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        data = memoryview(data).cast("B")
        written = self.file.write(data[: self.left])
        self.left -= written
        if written < len(data):
            self.file.flush()
            self.fail()
        return written


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def limit_writing(patch, limit, fail):
    patch.setattr(files, "open", lambda path, mode: Limited(path, mode, limit, fail), raising=False)


SIZE = 2**15  # more than a checkpoint of these has


@several
@example(limit=0)
@example(limit=1)
@given(limit=st.integers(0, SIZE))
def test_a_write_that_fails_after_any_number_of_bytes(tmp_path, limit):
    path = tmp_path / LAST
    save_checkpoint(path, OLD)
    size = path.stat().st_size
    with pytest.MonkeyPatch.context() as patch:
        limit_writing(patch, limit, no_space)
        if limit < size:
            with pytest.raises(UserError, match=f"cannot save {path}: No space left on device; {path} still holds"):
                save_checkpoint(path, NEW)
        else:
            save_checkpoint(path, NEW)
    assert holds(path, OLD if limit < size else NEW)
    assert os.listdir(tmp_path) == [LAST]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES])
def test_a_system_call_that_fails(path, monkeypatch, function, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        patch.setattr(files, "PATIENCE", 0.1)
        with pytest.raises(UserError) as error:
            save_checkpoint(path, NEW)
    for part in (str(path), os.strerror(number), "still holds the previous one", "--checkpoint_dir", "--resume"):
        assert part in str(error.value)
    assert holds(path, OLD)
    assert os.listdir(path.parent) == [LAST]


def test_a_first_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    limit_writing(monkeypatch, 1000, no_space)
    with pytest.raises(UserError, match="No space left") as error:
        save_checkpoint(tmp_path / LAST, OLD)
    assert "still holds" not in str(error.value)
    assert not os.listdir(tmp_path)


def test_a_folder_that_cannot_be_written(path, monkeypatch):
    """Simulated, for an administrator may write everywhere."""

    def refuse(name, mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", refuse, raising=False)
        with pytest.raises(UserError, match=f"cannot save {path}: Permission denied"):
            save_checkpoint(path, NEW)
    assert holds(path, OLD)


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(UserError, match="cannot save .*gone.*: No such file or directory"):
        save_checkpoint(tmp_path / "gone" / LAST, OLD)
    assert not os.listdir(tmp_path)


def test_a_folder_in_the_place_of_the_file(tmp_path):
    (tmp_path / LAST).mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        save_checkpoint(tmp_path / LAST, OLD)
    assert os.listdir(tmp_path) == [LAST]


@pytest.mark.parametrize("error", [KeyboardInterrupt, pickle.PicklingError, RuntimeError])
def test_other_exceptions_pass_and_leave_no_part(path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error):
        save_checkpoint(path, NEW)
    assert holds(path, OLD)
    assert os.listdir(path.parent) == [LAST]


def in_a_process(function, *args):
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def save_and_die(path, moment):
    """In a process of its own: killed after so many bytes, or on entering or on leaving a system call."""
    patch = pytest.MonkeyPatch()
    if isinstance(moment, int):
        limit_writing(patch, moment, kill)
    else:
        when, name = moment.split()
        call = getattr(os, name)
        patch.setattr(os, name, kill if when == "before" else lambda *args: (call(*args), kill()))
    save_checkpoint(path, NEW)


@pytest.mark.parametrize("moment", [0, 1, 500, 5000, "before fsync", "after fsync", "before replace", "after replace"])
def test_killed_in_a_save(path, moment):
    process = in_a_process(save_and_die, path, moment)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert holds(path, NEW if moment == "after replace" else OLD)
    save_checkpoint(path, NEW)
    assert holds(path, NEW)
    left = [] if moment == "after replace" else [f"{LAST}.{process.pid}.tmp"]  # the next run in the folder removes it
    assert sorted(os.listdir(path.parent)) == [LAST, *left]


def save_in_turn(path):
    for _ in range(60):
        save_checkpoint(path, OLD)
        save_checkpoint(path, NEW)


def test_a_whole_file_is_there_at_every_moment(path):
    process = in_a_process(save_in_turn, path)
    seen = {load_checkpoint(path)["epoch"] for _ in iter(process.is_alive, False)}
    assert process.exitcode == 0
    assert seen == {1, 2}


# --- Damaged and foreign files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a good checkpoint."""
    path = tmp_path_factory.mktemp("good") / "model.pth"
    save_checkpoint(path, OLD)
    return path.read_bytes()


def assert_named_or_right(path, data):
    path.write_bytes(data)
    try:
        assert holds(path, OLD)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)  # noqa: PT017


@several
@given(st.data())
def test_truncated(tmp_path, good, data):
    length = data.draw(st.integers(0, len(good) - 1))
    (tmp_path / "model.pth").write_bytes(good[:length])
    with pytest.raises(UserError, match="model.pth is (truncated or damaged|not a checkpoint)"):
        load_checkpoint(tmp_path / "model.pth")


@several
@given(st.data())
def test_bits_flipped(tmp_path, good, data):
    damaged = bytearray(good)
    for position in data.draw(st.sets(st.integers(0, 8 * len(good) - 1), min_size=1, max_size=3)):
        damaged[position // 8] ^= 1 << position % 8
    assert_named_or_right(tmp_path / "model.pth", bytes(damaged))


@several
@given(st.data())
def test_a_stretch_overwritten(tmp_path, good, data):
    start = data.draw(st.integers(0, len(good) - 1))
    other = data.draw(st.binary(min_size=1, max_size=64) | st.integers(1, 4096).map(bytes))
    assert_named_or_right(tmp_path / "model.pth", good[:start] + other + good[start + len(other) :])


@pytest.mark.slow
def test_every_byte_of_the_end_damaged(tmp_path, good):
    """The end holds the archive's table of contents, whose bytes have no checksum."""
    rng = random.Random(0)
    path = tmp_path / "model.pth"
    for position in range(max(0, len(good) - 4096), len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1 << rng.randrange(8)
        assert_named_or_right(path, bytes(damaged))


def test_an_entry_marked_as_a_folder(tmp_path, good):
    """One bit, which no checksum covers, and which makes torch read nothing and return whatever memory holds."""
    path = tmp_path / "model.pth"
    position = good.index(b"PK\x01\x02")  # the first entry of the table of contents
    while good[position : position + 4] == b"PK\x01\x02":
        damaged = bytearray(good)
        damaged[position + 38] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="model.pth is truncated or damaged"):
            load_checkpoint(path)
        position += 46 + sum(int.from_bytes(good[position + i : position + i + 2], "little") for i in (28, 30, 32))


def test_every_length_of_the_end(tmp_path, good):
    for length in range(len(good) - 300, len(good)):
        (tmp_path / "model.pth").write_bytes(good[:length])
        with pytest.raises(UserError, match="truncated or damaged"):
            load_checkpoint(tmp_path / "model.pth")


class Payload:
    """Unpickled, it would leave a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


FOREIGN = {
    "zip": write_zip,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("PK, said the text\n"),
    "other text": lambda path: path.write_text("hello\n"),
    "state_dict": lambda path: torch.save(OLD["model"], path),
    "list": lambda path: torch.save([1, 2, 3], path),
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "other format": lambda path: torch.save(OLD | {"format": "lightning", "format_version": 1}, path),
    "folder": lambda path: path.mkdir(),
    "missing": lambda path: None,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_named(tmp_path, kind):
    path = tmp_path / "other.pth"
    FOREIGN[kind](path)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert str(error.value).endswith("no other usable checkpoint lies beside it")
    if kind in ("state_dict", "list", "tensor", "other text", "other format"):
        assert "is not a checkpoint of this project" in str(error.value)


@pytest.mark.parametrize("read", [load_checkpoint, load_model])
@pytest.mark.parametrize("kind", ["zip", "hidden in a checkpoint", "raw pickle", "old torch format"])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, kind, read):
    path, marker = tmp_path / "model.pth", tmp_path / "ran"
    if kind == "zip":
        torch.save(Payload(marker), path)
    elif kind == "hidden in a checkpoint":
        save_checkpoint(path, OLD | {"best": {"epoch": Payload(marker)}})
    elif kind == "raw pickle":
        path.write_bytes(pickle.dumps(Payload(marker)))
    else:
        torch.save(Payload(marker), path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="refused, none was run|is not a checkpoint") as error:
        read(path)
    assert str(path) in str(error.value)
    assert not marker.exists()
    torch.load(path, weights_only=False) if kind != "raw pickle" else pickle.loads(path.read_bytes())
    assert marker.exists()  # the payload would have worked


def test_a_future_version_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 4)
    save_checkpoint(tmp_path / "model.pth", OLD)
    monkeypatch.undo()
    with pytest.raises(UserError, match="model.pth has format version 4, this code reads 3"):
        load_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize("name", sorted(checkpoint.Contents.__required_keys__))
def test_a_part_that_is_missing_is_named(tmp_path, name):
    path = tmp_path / "model.pth"
    for contents in ({part: OLD[part] for part in OLD if part != name}, OLD | {name: None}, OLD | {name: "text"}):
        save_checkpoint(path, contents)
        with pytest.raises(UserError, match=f"^{path} is not a whole checkpoint: {name} (is missing|must be )"):
            load_checkpoint(path)


@pytest.mark.parametrize(("bad", "whole"), [(LAST, BEST), (BEST, LAST), ("epoch_3.pth", LAST)])
def test_the_usable_alternative_is_named(tmp_path, bad, whole):
    save_checkpoint(tmp_path / whole, NEW)
    (tmp_path / bad).write_bytes(b"PK damaged")
    with pytest.raises(UserError, match=f"{bad} is truncated or damaged.*{whole} .after 2 epochs. is whole"):
        load_checkpoint(tmp_path / bad)
    (tmp_path / whole).write_bytes(b"PK damaged, too")
    with pytest.raises(UserError, match=f"{bad} is truncated or damaged.*no other usable checkpoint"):
        load_checkpoint(tmp_path / bad)


# --- Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_of_any_wrapper(path, prefix):
    save_checkpoint(path, OLD | {"model": {prefix + name: tensor for name, tensor in OLD["model"].items()}})
    model = build_model(load_checkpoint(path))
    assert same(dict(model.state_dict()), OLD["model"])
    assert not model.training


def test_weights_of_real_wrappers():
    """The names that torch.compile and DataParallel give are those that are taken off."""
    inner = PerceiverModel(**MODEL_ARGS)
    wrapped = torch.nn.DataParallel(torch.compile(inner))
    model = PerceiverModel(**MODEL_ARGS)
    load_weights(model, wrapped.state_dict())
    assert same(dict(model.state_dict()), dict(inner.state_dict()))


def test_weights_that_do_not_fit_are_all_listed(path):
    weights = dict(OLD["model"])
    missing, reshaped, no_tensor = list(weights)[1:4]
    shape = tuple(weights[reshaped].shape)
    del weights[missing]
    weights |= {reshaped: torch.zeros(7, 7), "encoder.extra": torch.zeros(1), no_tensor: 3}
    before = PerceiverModel(**MODEL_ARGS)
    kept = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    for load in (lambda: build_model(OLD | {"model": weights}), lambda: load_weights(before, weights)):
        with pytest.raises(UserError) as error:
            load()
        for part in (
            f"missing {missing}", "unexpected 'encoder.extra'", f"{reshaped} is (7, 7) where the model has {shape}",
            f"{no_tensor} is not a tensor",
        ):  # fmt: skip
            assert part in str(error.value)
    assert same(dict(before.state_dict()), kept)


def test_a_weight_given_twice_is_refused():
    """Once plain and once with a wrapper's prefix: neither is taken silently."""
    name = next(iter(OLD["model"]))
    with pytest.raises(UserError, match=name):
        build_model(OLD | {"model": OLD["model"] | {f"module.{name}": torch.zeros(1)}})


@pytest.mark.parametrize("args", [{"d_model": 5}, {"d_modell": 4}, {"num_heads": None}])
def test_model_arguments_that_are_refused(args):
    with pytest.raises(UserError, match="model arguments are refused"):
        build_model(OLD | {"model_args": MODEL_ARGS | args})


# --- What a real run writes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["synthetic", "digits"])
def written(tmp_path_factory, request):
    """The checkpoints folder of a real run."""
    folder = tmp_path_factory.mktemp("run")
    data = {"synthetic": "--num_samples=24 --seq_len_range 3 5 --feature_dim=2 --num_classes=2", "digits": ""}
    flags = (
        f"--dataset={request.param} {data[request.param]} --epochs=1 --batch_size=256 --model_size=tiny --d_model=8 "
        "--num_heads=2 --num_latents=2 --num_cross_attention_layers=1 --num_self_attention_layers=1"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(run_log, "tensorboard_writer", lambda *_: None)
        assert train.main(flags.split()) == 0
    return folder / "checkpoints"


def assert_plain(value, where="checkpoint"):
    if type(value) is dict:
        for name, part in value.items():
            assert type(name) in (str, int), f"{where}: key {name!r}"
            assert_plain(part, f"{where}.{name}")
    elif type(value) in (list, tuple):
        for i, part in enumerate(value):
            assert_plain(part, f"{where}[{i}]")
    elif type(value) is torch.Tensor:
        assert value.device.type == "cpu" and not value.requires_grad, where
    else:
        assert type(value) in (str, int, float, bool, type(None)), f"{where}: {type(value)}"


@pytest.mark.parametrize("name", [LAST, BEST])
def test_a_real_checkpoint_holds_plain_values(written, name):
    contents = torch.load(written / name, weights_only=True)
    assert_plain(contents)
    assert contents["format_version"] == checkpoint.FORMAT_VERSION
    assert {"python", "torch", "numpy"} <= contents["versions"].keys()
    data = contents["data"]
    assert len(data["class_names"]) == data["num_outputs"]
    assert {"features", "adapters", "split_sizes", "split_seed"} <= data.keys()
    assert Settings.from_dict(contents["settings"]).to_dict() == contents["settings"]
    assert not any(key.startswith(checkpoint.WRAPPERS) for key in contents["model"])
    assert build_model(contents).classifier.out_features == data["num_outputs"]


def test_a_real_checkpoint_loads_where_the_folder_was_moved(written, tmp_path):
    path = tmp_path / "elsewhere.pth"
    path.write_bytes((Path(written) / BEST).read_bytes())
    model, *_ = load_model(path)
    assert same(dict(model.state_dict()), load_checkpoint(path)["model"])


# --- A run of an earlier format --------------------------------------------------------------------------------------


FORMAT_2 = Path(__file__).parent / "data" / "format_2"  # digits, stopped by a signal at step 28 of 42


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """A copy of the folder of a run that an earlier version of the code began, as ./checkpoints."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FORMAT_2, "checkpoints")


def test_a_model_of_format_2_gives_the_same_answers(old_run):
    model, settings = load_model(Path("checkpoints") / BEST)
    assert settings["dataset_type"] == "digits" and model.task.kind == "classification"
    answers = predict(model, load_digits().images[:3])
    assert [answer["class"] for answer in answers] == ["7", "4", "6"]
    # What the earlier version printed
    assert [answer["confidence"] for answer in answers] == pytest.approx([0.158914, 0.137199, 0.1877], abs=2e-6)


def test_a_run_of_format_2_goes_on_as_if_nothing_had_happened(old_run):
    command = [sys.executable, ROOT / "train.py", "--resume", Path("checkpoints") / LAST, "--log_dir", "runs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, (Path("checkpoints") / "log.jsonl").read_text().splitlines())
    assert first["val_loss"] == pytest.approx(2.253832296598443)
    # The uninterrupted run of the earlier version
    assert second["val_loss"] == pytest.approx(2.239855446824155, rel=1e-4)
    assert second["train_objective"] == pytest.approx(2.3271159345118697, rel=1e-4)
    assert second["step"] == 42
    assert load_checkpoint(Path("checkpoints") / LAST)["format_version"] == checkpoint.FORMAT_VERSION
