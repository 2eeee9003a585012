"""A checkpoint is a file that anybody may have written: each entry forged in turn, on every way that one is read.

`pytest tests/test_untrusted.py --forgeries 50` tries every wrong value in every place, which takes half an hour; by
default each place is given one of them, another one on each way.
"""

import json
import math
import os
import re
import shutil
import signal
import zipfile
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import pytest
import torch
from running import called

import inference
import plots
import run_log
import tasks
import train
from checkpoint import LAST, build_model, load_checkpoint
from inference import load_model, predict
from messages import UserError
from perceiver_model import PerceiverModel
from progress import parameter_groups, restore_optimizer, restore_scaler
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
        patch.setattr(plots, "plot_training_curves", lambda history, path, *_: path.write_text("curves"))
        patch.setattr(tasks.Classification, "figures", lambda *_: {})
        patch.setattr(torch, "compile", lambda model, **_: model)
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
        if self.training and steps == 8:  # the first is that of the rehearsal
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
        done = called(capsys, main, flags)
        assert done.status in (0, 2)
        if done.status == 2:
            assert_clear(done.err)
            assert all(line.startswith("error: ") for line in done.err.splitlines()), done.err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["of"]  # nothing was written outside the folder
        assert sorted(path.name for path in work.parent.iterdir()) == ["run"]
        return done

    return call


def assert_clear(message):
    """What a terminal may be shown, and a person can read: no codes, no tensor written out."""
    assert message.strip() and all(line.isprintable() and len(line) < 2000 for line in message.rstrip().split("\n"))
    assert "tensor(" not in message


def number_of_forgeries(config, default=1):
    return config.getoption("--forgeries") or default


READ_BY_ALL = {"model", "model_args", "settings", "data", "epoch", "step", "best", "format", "format_version"}


@pytest.mark.slow
def test_any_forged_entry_is_refused_by_load_model_or_changes_no_answer(contents, tmp_path, pytestconfig):
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


@pytest.mark.slow
def test_any_forged_entry_is_refused_by_inference_or_leaves_it_whole(contents, run, pytestconfig):
    refused = 0
    for place, name, other in forgeries(contents, READ_BY_ALL, 7, number_of_forgeries(pytestconfig)):
        torch.save(other, "forged.pth")
        done = run(inference.main, "--model_path", "forged.pth")
        refused += done.status == 2
        if done.status == 0:
            results = json.loads(Path("results/results.json").read_text())
            assert results["num_samples"] > 0 and 0 <= results["accuracy"] <= 1, (place, name)
    assert refused > 30


@pytest.mark.slow
def test_any_forged_entry_is_refused_on_resume_or_leaves_the_run_whole(contents, folder, run, pytestconfig):
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


# --- Forgeries of more than one entry, and what was tried before -----------------------------------------------------


def refusal(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert_clear(str(caught.value))
    return str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("optimizer", "state", 0, "exp_avg"), torch.zeros(3), "exp_avg of parameter 0 is (3,) where the model has"),
        (("optimizer", "state", 0, "exp_avg_sq"), -1, "negative"),
        (("optimizer", "state"), {}, "missing exp_avg of parameter 0"),
        (("optimizer",), GONE, "optimizer is missing"),
        (("model_args", "other"), 1, "the checkpoint's model arguments are refused: 'other' is unknown"),
        (("progress", "batch"), 10**9, "has done 1000000000 batches of an epoch that has 5"),
        (("progress", "epoch"), 10**9, "must be those of the 1000000000 epochs"),
        (("progress", "run_name"), "../../outside", "progress.run_name must be the name of a folder"),
        (("progress", "run_name"), "..", "progress.run_name must be the name of a folder"),
        (("progress", "run_name"), "C:outside", "progress.run_name must be the name of a folder"),
        (("progress", "run_name"), "/tmp/outside", "progress.run_name must be the name of a folder"),
        (("settings", "log_dir"), "/tmp/outside", 'log_dir: the checkpoint would write into "/tmp/outside"'),
        (("settings", "log_dir"), "runs/../../outside", "outside the current folder; if that is right, say so with"),
        (("data", "fingerprints"), GONE, "data.fingerprints is missing"),
        (("data", "split_sizes", "train"), GONE, "data.split_sizes.train is missing"),
        (("data", "adapters"), GONE, "data.adapters is missing"),
        (("data", "task", "class_names"), GONE, "class_names is missing"),
        (("random_state", "cpu"), torch.zeros(5056, dtype=torch.uint8), "cannot be resumed: "),
        (("random_state", "cpu"), torch.zeros(7, dtype=torch.uint8), "RNG state"),
        (("random_state",), GONE, "random_state is missing"),
        (("threads",), [[[]] * 9], "threads must be a whole number"),
        (("trained_model",), GONE, "trained_model is missing"),
        (("settings", "num_heads"), 3, "do not agree about num_heads: 2 and 3"),
        (("step",), 3, "epoch and step are not those of progress"),
    ],
)
def test_a_forged_run_is_refused(contents, run, place, value, says):
    """A6 and A14 among them: shapes that lead a fused kernel out of its memory, names that lead out of the folder."""
    state = contents["optimizer"]["state"][0]
    if isinstance(value, int) and value == -1:
        value, says = torch.full_like(state["exp_avg_sq"], -1), "exp_avg_sq of parameter 0 is not in 0..inf"
    torch.save(forged(contents, place, value), f"checkpoints/{LAST}")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    done = run(train.main, "--resume")
    assert done.status == 2 and says in done.err, done.err
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["fingerprints", "split_sizes", "split_seed"])
def test_an_evaluation_needs_no_more_of_the_data_than_it_says(contents, run, name):
    torch.save(forged(contents, ("data", name), GONE), "forged.pth")
    assert run(inference.main, "--model_path", "forged.pth").status == 0


def test_the_optimizers_state_may_lie_in_memory_as_it_likes(contents):
    """The fused kernels take it for one stretch of memory: what is not would be read, and written, beyond its end.

    Where the file holds as many bytes as the tensors claim, they may still be those of another tensor.
    """

    def resumed(state):
        model = build_model(contents)
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.1, fused=True)
        restore_optimizer(optimizer, forged(contents, ("optimizer", "state"), deepcopy(state)))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for known in optimizer.state.values():
            assert all(tensor.untyped_storage().nbytes() >= tensor.nbytes for tensor in known.values())
        return [parameter.detach() for parameter in model.parameters()]

    def with_averages(change):
        return {number: known | {"exp_avg": change(number, known["exp_avg"])} for number, known in plain.items()}

    plain = contents["optimizer"]["state"]
    turned = with_averages(lambda _, values: values.t().contiguous().t() if values.dim() == 2 else values)
    for one, other in zip(resumed(plain), resumed(turned), strict=True):
        assert torch.equal(one, other)
    # All but the first of one number each, and of that one a storage that pays for all
    paying = torch.zeros(10**6)[: plain[0]["exp_avg"].numel()].view_as(plain[0]["exp_avg"])
    one_number = with_averages(lambda number, values: torch.ones(1).expand(values.shape) if number else paying)
    full = with_averages(lambda number, values: torch.ones(values.shape) if number else torch.zeros(values.shape))
    for one, other in zip(resumed(one_number), resumed(full), strict=True):
        assert torch.equal(one, other)


def test_the_scaler_of_float16_is_restored_or_begins_anew():
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)

    used, weights = scaler(), torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([weights], 0.1)
    for _ in range(4):
        used.scale(weights.sum()).backward()
        used.step(optimizer)
        used.update()
    restored = torch.amp.GradScaler("cpu", growth_interval=3)
    restore_scaler(restored, used.state_dict())
    assert restored.state_dict() == used.state_dict() | {"_growth_tracker": 1, "scale": 16.0}
    for saved in ({}, {"scale": 4.0, "_growth_tracker": 1}):  # a run that was not in float16, one that no longer is
        fresh, off = scaler(), torch.amp.GradScaler("cpu", enabled=False)
        restore_scaler(off, saved)
        assert off.state_dict() == {}
        restore_scaler(fresh, saved)
        assert fresh.get_scale() == saved.get("scale", 8.0)
    for wrong in ({"scale": 0.0, "_growth_tracker": 1}, {"scale": -1.0, "_growth_tracker": 1}, {"scale": 2.0},
                  {"scale": 2.0, "_growth_tracker": -1}, {"scale": 2.0, "_growth_tracker": 0.5}):  # fmt: skip
        assert "scaler" in refusal(restore_scaler, scaler(), wrong)


def test_a_log_folder_elsewhere_is_used_where_the_run_is_in_it_or_where_it_is_named(contents, run, tmp_path):
    elsewhere = tmp_path / "of" / "run" / "here" / "runs"
    torch.save(forged(contents, ("settings", "log_dir"), str(elsewhere)), f"checkpoints/{LAST}")
    Path("here").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        Path("work").mkdir()
        patch.chdir("work")
        last = f"../checkpoints/{LAST}"
        assert run(train.main, "--resume", last).status == 2
        (elsewhere / contents["progress"]["run_name"]).mkdir(parents=True)
        assert run(train.main, "--resume", last).status == 0
        torch.save(forged(contents, ("settings", "log_dir"), str(tmp_path / "of" / "run" / "new")), last)
        assert run(train.main, "--resume", last, "--log_dir", "../new").status == 0


def test_a_pipe_is_no_checkpoint(tmp_path):
    """It would be waited for without end."""
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in refusal(load_model, tmp_path / "pipe")


@pytest.mark.parametrize("make", tensors_like(torch.zeros(3, 12)))
def test_weights_that_are_no_finite_real_numbers(contents, tmp_path, make):
    latents = contents["model"]["encoder.latents"]
    torch.save(forged(contents, ("model", "encoder.latents"), tensors_like(latents)[make]), tmp_path / "forged.pth")
    if make == "far below zero":  # numbers like any others
        assert np.isfinite(predict(load_model(tmp_path / "forged.pth")[0], ITEMS)[0]["confidence"])
    else:
        said = refusal(load_model, tmp_path / "forged.pth")
        assert said.startswith("the checkpoint's weights do not fit its model: ") and said.count(",") < 9
        assert "encoder.latents" in said or "they claim" in said


def test_half_precision_weights_are_weights(contents, tmp_path):
    """A file that was made smaller: its model computes in float32."""
    halves = {name: tensor.half() for name, tensor in contents["model"].items()}
    torch.save(contents | {"model": halves}, tmp_path / "half.pth")
    model, _ = load_model(tmp_path / "half.pth")
    assert {weights.dtype for weights in model.parameters()} == {torch.float32}
    assert all(torch.equal(weights, halves[name].float()) for name, weights in model.state_dict().items())


@pytest.mark.parametrize("argument", ["d_model", "num_latents", "mlp_ratio", "num_frequency_bands"])
def test_a_model_too_large_for_its_file_takes_no_memory(contents, tmp_path, argument, monkeypatch):
    """Weights of the shapes of a model of terabytes, each of one stored number: found out on the meta device."""
    largest = {"mlp_ratio": 1000, "num_frequency_bands": 10_000}
    arguments = contents["model_args"] | {argument: largest.get(argument, 60_000)}
    with torch.device("meta"):
        shapes = {name: weights.shape for name, weights in PerceiverModel(**arguments).state_dict().items()}
    one = torch.zeros(1)
    weights = {name: one.expand(shape.numel()).view(shape) for name, shape in shapes.items()}
    torch.save(contents | {"model_args": arguments, "model": weights}, tmp_path / "forged.pth")
    assert (tmp_path / "forged.pth").stat().st_size < 100_000
    made = []
    monkeypatch.setattr(PerceiverModel, "load_state_dict", lambda *args: made.append(args))
    said = refusal(load_model, tmp_path / "forged.pth")
    assert re.search(r"they claim [\d,]+ bytes of the 4 that the file holds", said)
    assert not made


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("num_self_attention_layers", 10**9, "at most 1000"),
        ("num_cross_attention_layers", 10**9, "at most 1000"),
        ("num_blocks", 10**9, "from 1 to 1000"),
        ("d_model", 2**40, "d_model: expected a whole number"),
        ("num_classes", 3, "task has 2 outputs, its model 3"),
        ("num_heads", 5, "d_model=12 is not divisible by num_heads=5"),
        ("dropout", 7.0, "below 1"),
        ("input_dim", {}, "no modality"),
        ("input_dim", {"series": {"input_dim": 2**52}}, "do not fit"),
        ("input_dim", {"series": {"vocab_size": 2**52, "embedding_dim": 2**52}}, "refused"),
        ("input_dim", {"series": {"input_dim": 2, "grid_shape": [1, 2, 3]}}, "a list of 2"),
        ("input_dim", {"series": {"input_dim": 2, "\x1b[31m": 1}}, "is unknown"),
        ("input_dim", {"../up": {"input_dim": 2}}, "must be a name"),
        ("input_dim", {"keys": {"input_dim": 2}}, "refused"),
        ("\x1b[31m", 1, "is unknown"),
    ],
)
def test_arguments_that_no_model_has(contents, tmp_path, argument, value, says):
    torch.save(contents | {"model_args": contents["model_args"] | {argument: value}}, tmp_path / "forged.pth")
    assert says in refusal(load_model, tmp_path / "forged.pth")


@pytest.mark.parametrize(
    "adapters",
    [
        {},
        {"../series": {"kind": "tensor", "input_dim": 2}},
        {"image": {"kind": "tensor", "input_dim": 2}},
        {"series": {"kind": "tensor", "input_dim": 3}},
        {"series": {"kind": "text"}},
        {"series": {"kind": "no such"}},
        {"series": {"kind": ["tensor"]}},
        {"series": {"kind": "tensor", "input_dim": 2, "colour": 1}},
        {"series": {"kind": "series", "mean": [0.0], "std": [1.0]}},
        {"series": {"kind": "series", "mean": [0.0, 1.0], "std": [1.0]}},
        {"series": {"kind": "series", "mean": [0.0, 1.0], "std": [1.0, 0.0]}},
        {"series": {"kind": "series", "mean": [0.0, math.nan], "std": [1.0, 1.0]}},
        {"series": {"kind": "series", "mean": [0.0], "std": [1.0], "flagged": [7]}},
        {"series": {"kind": "image", "image_shape": [1, 2, 1], "patch_size": 1, "mean": [0.0], "std": [1.0]}},
        {"series": {"kind": "image", "image_shape": [4, 4], "patch_size": 1, "mean": [0.0], "std": [1.0]}},
        {"series": {"kind": "image", "image_shape": [2**31, 2, 1], "patch_size": 1, "mean": [0.0], "std": [1.0]}},
        {"series": {"kind": "image", "image_shape": [4, 4, 1], "patch_size": 3, "mean": [0.0], "std": [1.0]}},
        {"series": {"kind": "image", "image_shape": [4, 4, 2], "patch_size": 2, "mean": [0.0], "std": [1.0]}},
    ],
)
def test_adapters_that_do_not_fit(contents, tmp_path, adapters):
    data = {name: value for name, value in contents["data"].items() if name != "features"} | {"adapters": adapters}
    torch.save(contents | {"data": data}, tmp_path / "forged.pth")
    assert "adapter" in refusal(load_model, tmp_path / "forged.pth")


@pytest.mark.parametrize("dataset", ["digits", "images", "text", "multimodal"])
def test_settings_of_other_data_than_the_adapters(contents, run, dataset):
    Path("t.csv").write_text("text,label\na,x\nb,x\nc,y\nd,y\ne,x\nf,y\n")
    settings = contents["settings"] | {"dataset_type": dataset, "data_path": "t.csv", "image_size": 8, "patch_size": 2}
    torch.save(contents | {"settings": settings}, "forged.pth")
    assert run(inference.main, "--model_path", "forged.pth").status == 2


def test_a_download_into_a_folder_that_only_the_file_names(contents, run, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("a download")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    settings = contents["settings"] | {"dataset_type": "cifar10", "data_dir": str(tmp_path / "of")}
    torch.save(contents | {"settings": settings}, "forged.pth")
    assert "data_dir: the checkpoint would write into" in run(inference.main, "--model_path", "forged.pth").err


def test_a_compressed_file_is_not_unpacked(contents, tmp_path):
    """torch writes without compression, but reads what has some: a few kilobytes may claim any size."""
    torch.save(contents | {"zeros": torch.zeros(2**20)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(zipfile.ZipInfo(entry.filename), plain.read(entry), zipfile.ZIP_DEFLATED)
    assert torch.load(tmp_path / "packed.pth", weights_only=True)["epoch"] == 1
    assert "its parts are larger than the file" in refusal(load_model, tmp_path / "packed.pth")


class Memory:
    """Unpickled, it takes a terabyte."""

    def __reduce__(self):
        return bytearray, (2**40,)


@pytest.mark.parametrize("value", [Memory(), bytearray(b"abc"), {1, 2}, 1j, b"bytes", Counter("abc")])
def test_what_is_neither_tensor_nor_plain_is_refused_before_it_is_made(contents, tmp_path, value, monkeypatch):
    torch.save(contents | {"more": value}, tmp_path / "forged.pth")
    monkeypatch.setattr(torch, "load", None)
    assert "holds objects other than tensors and plain values" in refusal(load_model, tmp_path / "forged.pth")


# --- The reader of plain data ----------------------------------------------------------------------------------------


@dataclass
class Inner:
    size: Size
    share: Positive = 1.0


class Outer(TypedDict):
    names: list[str]
    inner: Inner
    pair: NotRequired[tuple[int, float] | None]
    table: NotRequired[dict[str, dict[int, bool]]]


FIVE_THOUSAND = "not a number of 5001 bits"


def test_plain_data_are_read_as_their_type():
    value = {"names": ["a"], "inner": {"size": 2}, "pair": [1, 2], "table": {"x": {1: True}}, "more": object()}
    found = read(value, Outer, "the file")
    assert found == value | {"inner": Inner(2), "pair": (1, 2)} and found["inner"].share == 1.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"names": GONE}, "the file.names is missing"),
        ({"names": "a"}, "the file.names must be a list, not 'a'"),
        ({"names": ["a", 1]}, "the file.names[1] must be text, not 1"),
        ({"inner": {}}, "the file.inner.size is missing"),
        ({"inner": {"size": 0}}, "the file.inner.size must be a whole number of 1 or more, not 0"),
        ({"inner": {"size": True}}, "the file.inner.size must be a whole number, not True"),
        ({"inner": {"size": 2, "share": 0}}, "the file.inner.share must be a finite number above 0, not 0"),
        ({"inner": {"size": 2, "share": math.inf}}, "the file.inner.share must be a finite number, not inf"),
        ({"inner": {"size": 2, "colour": "red"}}, "the file.inner: unknown 'colour'"),
        ({"inner": {"size": 2, "share": 2**5000}}, f"the file.inner.share must be a finite number, {FIVE_THOUSAND}"),
        ({"inner": {"size": 2, "share": math.nan}}, "the file.inner.share must be a finite number, not nan"),
        ({"pair": [1]}, "the file.pair must be a list of 2, not a list"),
        ({"pair": [1, "\x1b[1m"]}, r"the file.pair[1] must be a finite number, not '\x1b[1m'"),
        ({"pair": 10**5000}, "the file.pair must be a list of 2 or none, not a number of 16610 bits"),
        ({"table": {"x": {"1": True}}}, "a key of the file.table['x'] must be a whole number, not '1'"),
        ({"table": {"x": {1: 1}}}, "the file.table['x'][1] must be true or false, not 1"),
        ({"table": {"\ud800": {}}}, r"a key of the file.table must be text, not '\ud800'"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(change, says):
    value = {"names": ["a"], "inner": {"size": 2}} | change
    value = {name: part for name, part in value.items() if part is not GONE}
    assert refusal(read, value, Outer, "the file") == says
