"""A checkpoint is a file that anybody may have written: each entry forged in turn, on every way that one is read.

`pytest tests/test_untrusted.py --forgeries 50` tries every wrong value in every place, which takes half an hour; by
default each place is given one of them, another one on each way.
"""

import json
import math
import shutil
import signal
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import inference
import plots
import run_log
import train
from checkpoint import BEST, LAST, load_checkpoint
from config import UserError
from inference import load_model, predict
from perceiver_model import PerceiverModel
from schema import Positive, Size, read

MODEL = (
    "--model_size=tiny --d_model=12 --num_heads=2 --num_latents=3 --num_cross_attention_layers=1 "
    "--num_self_attention_layers=1 --num_cross_attention_heads=3 --num_frequency_bands=2 --amp=off --device=cpu"
)
SEQUENCES = f"--dataset=synthetic --num_samples=40 --seq_len_range 3 6 --feature_dim=2 --num_classes=2 {MODEL}"
ITEMS = [np.linspace(-1, 1, 8).reshape(4, 2), np.ones((7, 2))]

# --- What is put in the place of an entry ----------------------------------------------------------------------------

GONE = object()  # the entry is taken out


def shared_lists(depth=60):
    """A few bytes in a file, and more than anybody can walk through."""
    value = []
    for _ in range(depth):
        value = [value] * 4
    return value


def endless_list():
    value = []
    value.append(value)
    return value


WRONG = {
    "gone": GONE,
    "none": None,
    "true": True,
    "minus one": -1,
    "zero": 0,
    "a half": 0.5,
    "a billion": 10**9,
    "too large for 64 bits": 2**70,
    "too large to be written": 10**5000,
    "nan": math.nan,
    "infinity": math.inf,
    "no text": "",
    "text": "text",
    "a way out": "../../outside",
    "codes for a terminal": "\x1b[31mone\nerror: two\x07",
    "half a character": "\ud800",
    "empty list": [],
    "list": ["a", "a"],
    "endless list": endless_list(),
    "shared lists": shared_lists(),
    "empty dict": {},
    "dict": {"a": 1},
    "dict of numbers": {1: 2},
    "bytes": bytearray(b"abc"),
    "complex number": 1j,
    "a tensor of 3": torch.zeros(3),
    "a tensor of no number": torch.zeros(0),
    "a whole number in a tensor": torch.tensor(2),
    "a huge tensor of one number": torch.zeros(1).expand(2**40),
}


def tensors_like(tensor):
    """Wrong tensors in the place of this one, most of them of its shape."""
    real = tensor.float()
    values = {
        "not a number": torch.full_like(real, math.nan),
        "infinite": torch.full_like(real, math.inf),
        "far below zero": torch.full_like(real, -1e30),
        "too large for float32": torch.full_like(real, 1e300, dtype=torch.float64),
        "complex": torch.complex(real, real),
        "whole": torch.ones_like(real, dtype=torch.int64),
        "bytes of zero": torch.zeros_like(tensor, dtype=torch.uint8),
        "on the meta device": torch.empty(tensor.shape, device="meta"),
        "one number everywhere": torch.zeros(()).expand(tensor.shape),
        "a dimension more": torch.zeros(*tensor.shape, 2),
    }
    if tensor.dim():
        values |= {"sparse": real.to_sparse(), "flat": real.flatten()[None], "shorter": tensor[:-1].clone()}
    return values


def places(value, place=()):
    """The way to every entry of nested dicts and lists; of a long list, many weights or their states only to three."""
    keys = list(value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ())
    if len(keys) > 10 and (isinstance(value, list) or isinstance(value[keys[0]], (torch.Tensor, dict))):
        keys = [keys[0], keys[len(keys) // 2], keys[-1]]
    for key in keys:
        yield (*place, key)
        yield from places(value[key], (*place, key))


def forged(contents, place, value):
    """A copy of the contents with another entry at this place."""
    copied = contents.copy()
    if len(place) > 1:
        copied[place[0]] = forged(contents[place[0]], place[1:], value)
    elif value is GONE:
        del copied[place[0]]
    else:
        copied[place[0]] = value
    return copied


def forgeries(contents, parts, start, most):
    """(place, name of the wrong value, the contents with it): up to so many for each place within these parts."""
    for number, place in enumerate(place for place in places(contents) if place[0] in parts):
        value = contents
        for key in place:
            value = value[key]
        kinds = list((WRONG | tensors_like(value) if isinstance(value, torch.Tensor) else WRONG).items())
        for turn in range(min(most, len(kinds))):
            name, wrong = kinds[(start + 11 * number + turn) % len(kinds)]
            if (place, name) != (("settings", "num_epochs"), "a billion"):  # no mistake, and endless
                yield place, name, forged(contents, place, wrong)


# --- A run to forge the checkpoint of --------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Without TensorBoard, pictures and a compiler, which cost more than the tiny runs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log, "tensorboard_writer", lambda *_: None)
        patch.setattr(plots, "plot_training_curves", lambda history, path, best: path.write_text("curves"))
        patch.setattr(plots, "evaluation_figures", lambda *_: {})
        patch.setattr(torch, "compile", lambda model: model)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run with an average of the weights, stopped in the middle of its second epoch."""
    folder = tmp_path_factory.mktemp("place") / "of" / "run"
    folder.mkdir(parents=True)
    forward, steps = PerceiverModel.forward, 0

    def stopping(self, *args):
        nonlocal steps
        steps += self.training
        if self.training and steps == 7:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(PerceiverModel, "forward", stopping)
        assert train.main(f"{SEQUENCES} --epochs=2 --batch_size=8 --ema_decay=0.5".split()) == 130
    return folder


@pytest.fixture(scope="module")
def contents(folder):
    contents = torch.load(folder / "checkpoints" / LAST, weights_only=True)
    assert contents["progress"]["batch"] == 2 and contents["epoch"] == 1 and contents["trained_model"]
    return contents


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    """run(main, flags) in a folder of its own, a copy of the run's: status, output and errors, which it checks."""
    work = tmp_path / "of" / "run"
    shutil.copytree(folder, work)
    monkeypatch.chdir(work)

    def call(main, *flags):
        capsys.readouterr()
        try:
            status = main([str(flag) for flag in flags])
        except SystemExit as stopped:
            status = stopped.code
        printed = capsys.readouterr()
        assert status in (0, 2)
        if status == 2:
            assert_clear(printed.err)
            assert all(line.startswith("error: ") for line in printed.err.splitlines()), printed.err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["of"]  # nothing was written outside the folder
        assert sorted(path.name for path in work.parent.iterdir()) == ["run"]
        return SimpleNamespace(status=status, out=printed.out, err=printed.err)

    return call


def assert_clear(message):
    """What a terminal may be shown, and a person can read: no codes, no tensor written out."""
    assert message.strip() and all(line.isprintable() and len(line) < 2000 for line in message.rstrip().split("\n"))
    assert "tensor(" not in message


def number_of_forgeries(config, default=1):
    return config.getoption("--forgeries") or default


READ_BY_ALL = {"model", "model_args", "settings", "data", "epoch", "step", "best", "format", "format_version"}
OTHER_CLASS = ("data", "class_names")  # another name is another answer


def test_load_model(contents, tmp_path, pytestconfig):
    path = tmp_path / "forged.pth"
    torch.save(contents, path)
    right = [answer["probabilities"] for answer in predict(load_model(path)[0], ITEMS)]
    refused = 0
    for place, name, other in forgeries(contents, READ_BY_ALL, 3, number_of_forgeries(pytestconfig, 3)):
        torch.save(other, path)
        try:
            answers = predict(load_model(path)[0], ITEMS)
        except UserError as error:
            assert_clear(str(error))
            refused += 1
            continue
        found = [list(answer["probabilities"].values()) for answer in answers]
        assert np.isfinite(found).all() and np.allclose(np.sum(found, 1), 1), (place, name)
        # Without its own number the heads of a cross-attend are those of the others: a checkpoint of another model
        if place[0] != "model" and place != ("model_args", "num_cross_attention_heads"):
            np.testing.assert_array_equal(found, [list(one.values()) for one in right], err_msg=f"{place} {name}")
    assert refused > 100


def test_evaluation(contents, run, pytestconfig):
    refused = 0
    for place, name, other in forgeries(contents, READ_BY_ALL, 7, number_of_forgeries(pytestconfig)):
        torch.save(other, "forged.pth")
        done = run(inference.main, "--model_path", "forged.pth")
        refused += done.status == 2
        if done.status == 0:
            results = json.loads(Path("results/results.json").read_text())
            assert results["num_samples"] > 0 and 0 <= results["accuracy"] <= 1, (place, name)
    assert refused > 30


def test_resume(contents, folder, run, pytestconfig):
    refused = 0
    for place, name, other in forgeries(contents, contents.keys(), 0, number_of_forgeries(pytestconfig)):
        shutil.rmtree("checkpoints")
        shutil.copytree(folder / "checkpoints", "checkpoints")
        torch.save(other, f"checkpoints/{LAST}")
        done = run(train.main, "--resume")
        refused += done.status == 2
        if done.status == 0:
            weights = load_checkpoint(f"checkpoints/{LAST}")["model"]
            assert all(tensor.isfinite().all() for tensor in weights.values()), (place, name)
    assert refused > 80
