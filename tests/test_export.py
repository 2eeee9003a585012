"""export.py: what it writes answers as the model does, at any size; what cannot be exported is said in one line."""

import csv
import itertools
import json
import math
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from running import called

import adapters
import export
import inference
import perceiver_model
import tasks
from checkpoint import save_checkpoint
from config import Settings
from perceiver_model import PerceiverModel, create_perceiver_model

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
TINY = {"d_model": 16, "num_heads": 2, "num_latents": 4, "num_self_attention_layers": 1}
IMAGE = adapters.ImageAdapter([4, 6, 1], 2, [7.0], [3.0])
SERIES = adapters.SeriesAdapter([1.0, 2.0], [0.5, 3.0], flagged=[1], max_seq_len=50)
TEXT = adapters.TextAdapter(max_seq_len=100)
CLASSES = tasks.Classification(["가", "two", "=3"])
NUMBERS = tasks.Regression(["price", "weight"], [10.0, -1.0], [2.0, 0.5])
LABELS = tasks.MultiLabel(["a", "b"], [0.3, 0.6])


def write_checkpoint(path, parts, task, settings=None, **arguments):
    """A checkpoint of a model that has learnt nothing."""
    torch.manual_seed(0)
    arguments = {"input_dim": {name: adapter.features for name, adapter in parts.items()},
                 "num_classes": task.num_outputs, **TINY, **arguments}  # fmt: skip
    model = PerceiverModel(**arguments)
    data = {
        "task": tasks.describe(task),
        "num_outputs": task.num_outputs,
        "adapters": {name: adapters.describe(adapter) for name, adapter in parts.items()},
        "features": arguments["input_dim"],
        "dataset_type": "digits",
        "fingerprints": {},
    }
    save_checkpoint(path, {"model": model.state_dict(), "model_args": arguments, "data": data, "epoch": 1, "step": 1,
                           "settings": (settings or Settings()).to_dict(), "best": {"epoch": 1}})  # fmt: skip
    return inference.load_model(path)[0]


def command(capsys, *words):
    """export.py in this process: status, what it printed, its errors."""
    done = called(capsys, export.main, words)
    return done.status, done.out, done.err


def session_of(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def printed_difference(out):
    return float(re.search(r"largest difference (\S+)", out)[1])


# --- The whole way ----------------------------------------------------------------------------------------------------


def test_the_script_of_the_docs_writes_the_predictions_of_inference(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 9, 3)), np.array(["walk", "run", "sit", "lie"])[np.arange(40) % 4]
    x[:, :, 0] += np.arange(40)[:, None] % 4
    np.savez(tmp_path / "train.npz", x=x, y=y)
    np.savez(tmp_path / "new.npz", x=5 * rng.normal(size=(11, 14, 3)))  # other lengths than in training
    flags = " ".join(f"--{name} {value}" for name, value in TINY.items())
    assert run(f"--dataset sequences --data_path train.npz --epochs 2 --amp off --device cpu {flags}").status == 0
    status, out, err = command(capsys, "--model_path", "checkpoints/best_model.pth", "--output", "model.onnx")
    assert (status, err) == (0, "")
    assert "wrote model.onnx" in out and 0 < printed_difference(out) < 1e-5

    inference.main(["--model_path", "checkpoints/best_model.pth", "--input", "new.npz", "--output_dir", "ours"])
    (script,) = re.findall(r"```python\n(.*?onnxruntime.*?)```", PAGE, re.S)
    assert len([line for line in script.splitlines() if line.strip()]) <= 15
    absent = "".join(f"sys.modules[{name!r}] = None\n" for name in ("torch", "export", "tasks", "pandas", "onnx"))
    Path("script.py").write_text(f"import sys\n{absent}{script}", encoding="utf-8")
    subprocess.run([sys.executable, "script.py"], check=True)
    texts = [Path(path).read_text() for path in ("predictions.csv", "ours/predictions.csv")]
    theirs, ours = (list(csv.DictReader(text.splitlines())) for text in texts)
    assert len(ours) == 11 and len({row["class"] for row in ours}) > 1
    assert [list(row) for row in theirs] == [list(row) for row in ours]
    for one, other in zip(theirs, ours, strict=True):
        for name, cell in one.items():
            if name.startswith("confidence"):
                assert abs(float(cell) - float(other[name])) < 2e-6
            else:
                assert cell == other[name]


def test_the_call_of_a_program_in_the_docs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = write_checkpoint("c.pth", {"series": adapters.TensorAdapter(3)}, CLASSES)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    figures = export.export(model, Path("model.pt2"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert figures["float32"]["difference"] <= 1e-6
    (script,) = re.findall(r"```python\n(import torch\n.*?)```", PAGE, re.S)
    names = {}
    exec(script, names)
    assert names["logits"].shape == (8, 3)
    about = json.loads(names["about"]["perceiver.json"])
    assert about["task"] == tasks.describe(CLASSES) and about["versions"]["torch"] == version("torch")


# --- Every modality and task, at any size -----------------------------------------------------------------------------

MODELS = {
    "all three": ({"image": IMAGE, "text": TEXT, "series": SERIES}, NUMBERS, {"num_cross_attention_layers": 2}),
    "text": ({"text": TEXT}, LABELS, {}),
}


def inputs_of(model, samples, lengths, rng):
    """{name: array} for a file, as the docs describe them, and the same for the model; padding holds NaN."""
    several, feeds, x, mask = len(model.modalities) > 1, {}, {}, {}
    for name, length in lengths.items():
        length = 6 if name == "image" else length
        width = model.modalities[name].input_dim
        shape = samples, length, width
        tokens = rng.integers(0, 256, shape) if name == "text" else rng.normal(size=shape)
        real = rng.random((samples, length)) < 0.6
        real[-1] = False
        tokens = np.where(real[..., None], tokens, np.nan).astype(np.float32)
        suffix = f"_{name}" if several else ""
        feeds |= {f"input{suffix}": tokens, f"mask{suffix}": real}
        x[name], mask[name] = torch.from_numpy(tokens), torch.from_numpy(real)
    return feeds, x, mask


@pytest.mark.parametrize("kind", MODELS)
def test_an_onnx_file_answers_as_the_model_at_any_size(kind, tmp_path, capsys):
    parts, task, arguments = MODELS[kind]
    model = write_checkpoint(tmp_path / "c.pth", parts, task, **arguments)
    path = tmp_path / "made" / "model.onnx"
    status, out, err = command(capsys, "--model_path", tmp_path / "c.pth", "--output", path, "--attention")
    assert (status, err) == (0, "")
    assert list(path.parent.iterdir()) == [path]
    session, rng = session_of(path), np.random.default_rng(0)
    maps = arguments.get("num_cross_attention_layers", 1)
    assert [each.name for each in session.get_outputs()] == ["output", *(f"attention_{i + 1}" for i in range(maps))]
    for samples, text, series in ((1, 1, 1), (4, 100, 3), (2, 5, 400), (7, 1, 2)):
        lengths = {name: {"text": text, "series": series}.get(name) for name in parts}
        feeds, x, mask = inputs_of(model, samples, lengths, rng)
        with torch.no_grad():
            logits, expected = model(x, mask, return_attention=True)
        for found, wanted in zip(session.run(None, feeds), [logits, *expected], strict=True):
            np.testing.assert_allclose(found, wanted.numpy(), atol=2e-6)
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert [(each.domain, each.version) for each in file.opset_import] == [("", export.OPSET)] == [("", 18)]
    about = json.loads(session.get_modelmeta().custom_metadata_map["perceiver"])
    assert tasks.from_description(about["task"]) == task
    assert {name: adapters.from_description(each) for name, each in about["adapters"].items()} == parts
    packages = ("torch", "onnx", "onnxscript", "onnxruntime")
    assert {name: about["versions"][name] for name in packages} == {name: version(name) for name in packages}
    assert about["quantized"] is None
    shapes = {each.name: (each.type, each.shape) for each in session.get_inputs()}
    if kind == "text":
        assert shapes == {"input": ("tensor(float)", ["batch", "length", 1]),
                          "mask": ("tensor(bool)", ["batch", "length"])}  # fmt: skip
    else:
        assert shapes["input_image"] == ("tensor(float)", ["batch", 6, 4])
        assert shapes["mask_series"] == ("tensor(bool)", ["batch", "length_series"])
        assert shapes["input_text"] == ("tensor(float)", ["batch", "length_text", 1])


@pytest.mark.parametrize(
    "arguments",
    [
        {"head": "query", "use_positions": False, "share_weights": True, "num_cross_attention_layers": 2,
         "num_self_attention_layers": 2, "num_blocks": 2},
        {"head": "positions", "num_queries": 20},
        {"learned_positions": True, "max_length": 20},
        {"learned_positions": True, "max_length": 1},
        {"grid_shape": (8, 8), "stem": "conv"},
        {"stem": "windows", "window": 4, "stride": 2},
        {"stem": "conv", "stride": 4, "stem_dim": 6},
        {"stem": "conv"},
        {"vocab_size": 20, "input_dim": 1, "embedding_dim": 16, "head": "positions", "num_queries": 9,
         "tie_embedding": True, "num_classes": 20},
    ],
    ids=lambda arguments: " ".join(arguments),
)  # fmt: skip
def test_programs_of_every_head_stem_and_position(arguments):
    model = PerceiverModel(**{"input_dim": 3, "num_classes": 4, **TINY, **arguments}).eval()
    program = export.trace(model, attention=True).module()
    lengths = [math.prod(arguments["grid_shape"])] if "grid_shape" in arguments else [5, 6, 7, 8, 9, 16, 300]
    longest = arguments.get("max_length", arguments.get("num_queries", 300))
    for samples, length in itertools.product((1, 3), [length for length in lengths if length <= longest] or [1]):
        x = torch.rand(samples, length, model.modalities["input"].input_dim)
        mask = torch.rand(samples, length) < 0.5
        mask[0] = False
        with torch.no_grad():
            expected, maps = model(x, mask, return_attention=True)
            found, found_maps = program(x, mask)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(found_maps, maps, atol=1e-6, rtol=0)


def test_a_program_is_not_tied_to_the_threads_of_the_machine(monkeypatch):
    monkeypatch.setattr(perceiver_model, "CPU_THREADS", 8)
    model = create_perceiver_model(3, 4, "tiny", num_latents=128, num_heads=8).eval()  # 1024 folded queries: 2 groups
    program = export.trace(model, attention=False).module()
    for samples in (1, 5):
        x, mask = torch.rand(samples, 7, 3), torch.ones(samples, 7, dtype=torch.bool)
        with torch.no_grad():
            torch.testing.assert_close(program(x, mask), model(x, mask), atol=1e-6, rtol=0)


def test_the_random_inputs_are_what_the_comparison_says():
    model = PerceiverModel({name: adapter.features for name, adapter in MODELS["all three"][0].items()}, 2, **TINY)
    x, mask = export.random_inputs(model, 5, 30, True, torch.Generator().manual_seed(0))
    assert {name: tokens.shape for name, tokens in x.items()} == {"image": (5, 6, 4), "text": (5, 31, 1),
                                                                  "series": (5, 32, 3)}  # fmt: skip
    assert not any(real[0].any() for real in mask.values())
    assert not any(list(mask.values())[number][1 + number].any() for number in range(3))
    assert all(real[4].any() for real in mask.values()) and not mask["text"][4].all()
    for name in x:
        assert torch.equal(x[name].isnan().any(-1), ~mask[name])
    assert set(x["text"][mask["text"]].flatten().tolist()) <= set(range(256))


# --- int8 -------------------------------------------------------------------------------------------------------------


def test_int8_tells_the_accuracy_before_and_after(run, tmp_path, capsys):
    flags = " ".join(f"--{name} {value}" for name, value in TINY.items())
    assert run(f"--dataset digits --epochs 1 --lr 5e-3 --amp off --device cpu {flags}").status == 0
    words = ["--model_path", "checkpoints/best_model.pth", "--output", "small.onnx", "--quantize", "int8"]
    status, out, err = command(capsys, *words, "--batch_size", "100")
    assert (status, err) == (0, "")
    model, settings = inference.load_model("checkpoints/best_model.pth")
    splits, _ = export.load_splits(Settings.from_dict(settings), model.data_info, "test")
    before = inference.evaluate(model, splits["test"])["accuracy"]
    session, right, differences = session_of("small.onnx"), 0, []
    for start in range(0, len(splits["test"]), 100):  # activations are scaled by those of the whole batch
        batch = splits["test"].__getitems__(range(start, min(start + 100, len(splits["test"]))))
        (logits,) = session.run(None, {name: batch[name].numpy() for name in ("input", "mask")})
        right += (logits.argmax(1) == batch["label"].numpy()).sum()
        with torch.no_grad():
            differences.append(np.abs(logits - model(batch["input"]).numpy()).max())
    assert re.findall(r"test accuracy (\S+)", out) == [f"{before:.4f}", f"{right / len(splits['test']):.4f}"]
    assert 1e-4 < max(differences) < 1
    about = json.loads(session.get_modelmeta().custom_metadata_map["perceiver"])
    assert about["quantized"] == "int8"
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    stored = sum(len(each.raw_data) for each in onnx.load("small.onnx").graph.initializer)
    assert stored < 0.5 * weights


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_checkpoint("c.pth", {"series": SERIES}, CLASSES)


def refused(capsys, *words):
    """The one line of an export that is refused; nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}
    status, _, err = command(capsys, *words)
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()} == before
    return err


@pytest.mark.parametrize("name", ["model.onx", "model", "model.pth", "folder.onnx"])
def test_outputs_that_are_no_export(name, checkpoint, capsys):
    Path("folder.onnx").mkdir()
    assert f"--output: {name}" in refused(capsys, "--model_path", "c.pth", "--output", name)


def test_a_file_is_not_overwritten_by_surprise(checkpoint, capsys):
    Path("model.pt2").write_text("mine")
    assert "--overwrite" in refused(capsys, "--model_path", "c.pth", "--output", "model.pt2")
    words = ["--model_path", "c.pth", "--output", "model.pt2", "--overwrite", "--batch_size", "3"]
    status, out, _ = command(capsys, *words)
    assert status == 0 and Path("model.pt2").read_bytes()[:2] == b"PK"
    assert "note: batch_size has no effect without --quantize" in out
    Path("c.pth").rename("c.pt2")
    assert "the checkpoint itself" in refused(
        capsys, "--model_path", "c.pt2", "--output", "../" + Path().resolve().name + "/c.pt2", "--overwrite"
    )


@pytest.mark.parametrize("found", [None, "0.1"])
def test_missing_packages_are_named_with_their_remedy(found, checkpoint, capsys, monkeypatch):
    def of(name):
        if name != "onnxscript":
            return version(name)
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(export, "version", of)
    err = refused(capsys, "--model_path", "c.pth", "--output", "model.onnx")
    assert 'pip install "onnxscript>=' in err and "onnxruntime" not in err
    refused(capsys, "--model_path", "gone.pth", "--output", "model.pt2")  # needs none of them, and gets further


def test_the_packages_are_those_of_the_docs_and_of_the_tests():
    wanted = [f"{name}>={lowest}" for name, lowest in export.PACKAGES.items()]
    assert " ".join(["pip install", *(f'"{each}"' for each in wanted)]) in PAGE
    assert set(wanted) <= set((ROOT / "tests" / "requirements.txt").read_text().split())


@pytest.mark.parametrize("perturb", [1e-3, math.nan])
def test_a_file_that_answers_otherwise_is_not_kept(perturb, checkpoint, capsys, monkeypatch):
    trace = export.trace

    def of_another(model, attention):
        other = inference.load_model("c.pth")[0]
        other.classifier.bias.data += perturb
        return trace(other, attention)

    monkeypatch.setattr(export, "trace", of_another)
    if perturb < 1:
        Path("model.pt2").write_text("mine")  # which `refused` wants to be there afterwards
    err = refused(capsys, "--model_path", "c.pth", "--output", "model.pt2", "--overwrite")
    assert f"model.pt2 differ from the model's by up to {perturb:.2g}" in err


def test_other_refusals(checkpoint, capsys):
    err = refused(capsys, "--model_path", "c.pth", "--output", "model.pt2", "--quantize", "int8")
    assert "--quantize: int8 is for .onnx files" in err
    assert "gone.pth" in refused(capsys, "--model_path", "gone.pth", "--output", "model.pt2")
    torch.save({"model": {}}, "foreign.pth")
    assert "foreign.pth" in refused(capsys, "--model_path", "foreign.pth", "--output", "model.pt2")
    Path("file").write_text("")
    assert "cannot write into file" in refused(capsys, "--model_path", "c.pth", "--output", "file/model.pt2")
    assert "--lr: unknown flag" in refused(capsys, "--model_path", "c.pth", "--output", "m.onnx", "--lr", "1")


def test_a_disk_that_is_full(checkpoint, capsys, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("files.os.fsync", full)
    assert "cannot write model.pt2: No space left" in refused(capsys, "--model_path", "c.pth", "--output", "model.pt2")


def test_a_model_too_large_for_onnx(checkpoint, monkeypatch):
    monkeypatch.setattr(export, "LARGEST", 10_000)
    with pytest.raises(ValueError, match=r"2 GiB at most.*\.pt2"):
        export.export(checkpoint, Path("model.onnx"))
    assert not Path("model.onnx").exists()
