"""The commands and the notebook interface from end to end, as a user meets them."""

import errno
import json
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from fcntl import ioctl
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from running import called
from sklearn.datasets import load_digits
from torch.utils.data import Subset

import evaluation
import inference
import plots
import run_log
import tasks
import train
from adapters import ImageAdapter, SeriesAdapter, TensorAdapter, TextAdapter, describe, from_description
from batches import collate, create_dataloader, model_inputs
from checkpoint import BEST, LAST, load_checkpoint, save_checkpoint
from config import Settings
from data_utils import load_splits
from inference import evaluate, load_model, predict
from messages import UserError
from perceiver_model import PerceiverModel

ROOT = Path(train.__file__).parent
MODEL = (
    "--model_size=tiny --d_model=16 --num_heads=2 --num_latents=4 --num_cross_attention_layers=1 "
    "--num_self_attention_layers=1"
)
SEQUENCES = f"--dataset=synthetic --num_samples=60 --seq_len_range 5 12 --feature_dim=4 --num_classes=3 {MODEL}"
DIGITS = f"--dataset=digits --patch_size=4 {MODEL}"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1"}
FIGURES = {"confusion_matrix.png", "confidence_histogram.png", "confidence_analysis.png"}


def files_below(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def strict_json(text):
    def refuse(word):
        raise AssertionError(f"{word} is not strict JSON")

    return json.loads(text, parse_constant=refuse)


def log_of(folder):
    return [strict_json(line) for line in (folder / "checkpoints" / "log.jsonl").read_text().splitlines()]


# --- Real processes --------------------------------------------------------------------------------------------------
# They run one after the other in the background, beside the tests that need no process of their own; the tests that
# wait for them come last.


def command(folder, *words, unset=(), **environment):
    """Run python with these words in `folder`."""
    environment = os.environ | ENVIRONMENT | environment
    environment = {name: value for name, value in environment.items() if name not in unset}
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def train_digits(folder):
    """As in a cell of a notebook that lives in another environment."""
    notebook = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    return command(folder, ROOT / "train.py", *DIGITS.split(), "--epochs=2", "--lr=5e-3", **notebook)


def infer_without_display(folder):
    words = ("--model_path", "checkpoints/best_model.pth", "--analyze", "--output_dir", "new/sub/folder")
    return command(folder, ROOT / "inference.py", *words, unset=("DISPLAY",), MPLBACKEND="TkAgg")


def tour(folder):
    return command(folder, ROOT / "example_usage.py")


IMPORT = """
import json, logging, os, random, signal, sys, threading, warnings
import matplotlib, numpy as np, torch

def state():
    return {
        "style": dict(dict.items(matplotlib.rcParams)),  # as stored: reading it would choose a backend
        "torch": torch.get_rng_state().tolist(), "numpy": str(np.random.get_state()), "random": str(random.getstate()),
        "threads": (torch.get_num_threads(), threading.active_count()), "dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(), "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(), "errors": np.geterr(),
        "warnings": list(warnings.filters), "environment": dict(os.environ), "hook": sys.excepthook,
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "handlers": list(logging.getLogger().handlers), "folder": os.getcwd(),
    }

before = state()
sys.path.insert(0, sys.argv[1])
import inference
after = state()
print([name for name in before if before[name] != after[name]], "train" in sys.modules)
"""


def import_only(folder):
    return command(folder, "-c", IMPORT, ROOT)


def without_tensorboard(folder):
    """train.py --help, one epoch and inference.py, where importing TensorBoard fails."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['tensorboard'] = None\n")
    path = str(folder)
    work = folder / "work"
    return [
        command(work, ROOT / "train.py", "--help", PYTHONPATH=path),
        command(work, ROOT / "train.py", *SEQUENCES.split(), "--epochs=1", PYTHONPATH=path),
        command(work, ROOT / "inference.py", "--model_path", "checkpoints/best_model.pth", PYTHONPATH=path),
    ]


def on_a_terminal(folder, columns=80):
    """What one epoch of train.py shows on a terminal of so many columns, and its exit status."""
    folder.mkdir()
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *DIGITS.split(), "--epochs=1"],
        cwd=folder, env=os.environ | ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError as error:  # the other end is closed
        assert error.errno == errno.EIO
    finally:
        os.close(ours)
    return SimpleNamespace(returncode=process.wait(60), stdout=shown.decode())


PROCESSES = (train_digits, infer_without_display, tour, import_only, without_tensorboard, on_a_terminal)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """process(function) gives its result and the folder that it ran in."""
    folders = {function: tmp_path_factory.mktemp("processes") / function.__name__ for function in PROCESSES}
    folders[infer_without_display] = folders[train_digits]
    with ThreadPoolExecutor(1) as pool:
        futures = {function: pool.submit(function, folders[function]) for function in PROCESSES}
        yield lambda function: (futures[function].result(), folders[function])
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def digits_run(processes):
    """A run of train.py on the digits: what it printed, its folder."""
    result, folder = processes(train_digits)
    assert result.returncode == 0, result.stderr
    return result, folder


@pytest.fixture(scope="module")
def digits(digits_run):
    return digits_run[1] / "checkpoints" / BEST


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """The best checkpoint of a run on sequences of different lengths, trained in this process."""
    folder = tmp_path_factory.mktemp("sequences")
    places = [f"--checkpoint_dir={folder / 'checkpoints'}", f"--log_dir={folder / 'runs'}"]
    assert train.main([*SEQUENCES.split(), "--epochs=3", "--lr=1e-2", *places]) == 0
    return folder / "checkpoints" / BEST


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(main, flags) runs a command in an empty folder, in this process: its status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(main, flags):
        return called(capsys, main, flags.split() if isinstance(flags, str) else flags)

    return run


@pytest.fixture
def quick(monkeypatch):
    """Without TensorBoard and pictures, which cost more than the tiny runs here."""
    monkeypatch.setattr(run_log, "tensorboard_writer", lambda *_: None)
    monkeypatch.setattr(plots, "plot_training_curves", lambda history, path, *_: path.write_text("curves"))
    monkeypatch.setattr(tasks.Classification, "figures", lambda *_: {})


# --- Training, then evaluation ---------------------------------------------------------------------------------------

BEST_LINE = re.compile(
    r"(?:best|last) epoch (\d+): validation accuracy (\d\.\d{4}), test accuracy (\d\.\d{4}) \((\d+) samples"
)


def best_line(text):
    epoch, val, test, number = BEST_LINE.search(text).groups()
    return int(epoch), float(val), float(test), int(number)


def test_training_says_what_it_wrote(digits_run):
    result, folder = digits_run
    assert result.stderr == "" and "\r" not in result.stdout
    checkpoints = {f"checkpoints/{name}" for name in (BEST, LAST, "settings.json", "log.jsonl", "training_curves.png")}
    events = [name for name in files_below(folder) - checkpoints if name.startswith("runs/")]
    assert checkpoints <= files_below(folder) and all("events.out.tfevents" in name for name in events)
    assert sorted(name.split("/")[2] for name in events if name.count("/") == 3) == ["train", "val"]
    assert len(events) == 3
    lines = log_of(folder)
    assert [line["epoch"] for line in lines] == [1, 2]
    epoch, val, _, number = best_line(result.stdout)
    kept = lines[-1]  # of digits the last one is kept
    assert epoch == kept["epoch"] == load_checkpoint(folder / "checkpoints" / BEST)["epoch"]
    assert val == pytest.approx(kept["val_accuracy"], abs=5e-5)
    assert "\nlast epoch 2: " in result.stdout and "best\n" not in result.stdout
    for line in lines:
        (shown,) = re.findall(rf"^epoch {line['epoch']}/2 .*", result.stdout, re.MULTILINE)
        assert f"val loss {line['val_loss']:.4f} accuracy {line['val_accuracy']:.4f}" in shown
        speed, seconds = line["samples_per_second"], line["seconds"]
        assert speed * seconds == pytest.approx(1295)
    assert number == 359 and "1295 training, 143 validation, 359 test samples" in result.stdout
    assert "next:   python inference.py --model_path checkpoints/best_model.pth" in result.stdout


def test_the_printed_settings_are_those_stored(digits_run):
    result, folder = digits_run
    stored = strict_json((folder / "checkpoints" / "settings.json").read_text())
    assert stored == load_checkpoint(folder / "checkpoints" / BEST)["settings"]
    rows = re.findall(r"^  (\w+) +(.+?) {2,}(default|data set|flag)$", result.stdout, re.MULTILINE)
    printed = {name: value.partition(" [")[0] for name, value, _ in rows}
    text = {name: str(value).lower() if value is None or value is True or value is False else str(value)
            for name, value in stored.items()}  # fmt: skip
    assert printed == {name: text[name] for name in printed}
    assert {name for name, _, source in rows if source == "flag"} == {
        "dataset_type", "patch_size", "model_size", "d_model", "num_heads", "num_latents", "num_epochs",
        "learning_rate", "num_cross_attention_layers", "num_self_attention_layers",
    }  # fmt: skip
    assert {name for name, _, source in rows if source != "flag"} == {"label_smoothing", "ema_decay", "select_by"}


def test_the_losses_on_the_screen_are_said_to_be_of_which_weights(digits_run):
    (line,) = re.findall(r"^loss +(.*)$", digits_run[0].stdout, re.MULTILINE)
    assert line == ("cross-entropy without label smoothing; train: with each step's weights and dropout; "
                    "val: with the moving average of the weights")  # fmt: skip


def test_tensorboard_holds_the_run(digits_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, lines = digits_run[1], log_of(digits_run[1])
    (place,) = (folder / "runs").iterdir()
    events, *parts = (
        EventAccumulator(str(place / part), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
        for part in ("", "train", "val")
    )
    figures = [
        {"loss": "train_loss", "objective": "train_objective", "accuracy": "train_accuracy"},
        {"loss": "val_loss", "accuracy": "val_accuracy", "balanced_accuracy": "val_balanced_accuracy"},
    ]  # those of one name are drawn in one chart
    for part, names in zip(parts, figures, strict=True):
        assert set(part.Tags()["scalars"]) == {f"epoch/{name}" for name in names}
        for name, key in names.items():
            points = part.Scalars(f"epoch/{name}")
            assert [point.step for point in points] == [line["step"] for line in lines] == [41, 82]
            assert [point.value for point in points] == pytest.approx([line[key] for line in lines], rel=1e-6)
    for name in ("step/loss", "step/gradient_norm", "step/learning_rate"):
        assert [point.step for point in events.Scalars(name)] == list(range(1, 83))
    assert events.Scalars("step/learning_rate")[-1].value == pytest.approx(lines[-1]["learning_rate"])
    norms = [point.value for point in events.Scalars("step/gradient_norm")]
    assert np.mean(norms[41:]) == pytest.approx(lines[1]["gradient_norm"], rel=1e-5)
    speeds = [(point.step, point.value) for point in events.Scalars("step/samples_per_second")]
    assert speeds == [(line["step"], pytest.approx(line["samples_per_second"])) for line in lines]
    epoch, val, test, _ = best_line(digits_run[0].stdout)
    best = {name: events.Scalars(f"best/{name}") for name in ("val_accuracy", "val_loss", "test_accuracy")}
    assert all(len(points) == 1 for points in best.values())
    assert best["val_loss"][0].value == pytest.approx(lines[epoch - 1]["val_loss"])
    assert best["val_accuracy"][0].value == pytest.approx(val, abs=5e-5)
    assert best["test_accuracy"][0].value == pytest.approx(test, abs=5e-5)
    (picture,) = events.Images("val/confusion_matrix")[-1:]
    assert picture.width > 300 and picture.height > 300
    (text,) = events.Tensors("settings/text_summary")[0].tensor_proto.string_val
    assert "| learning_rate | 0.005 |" in text.decode() and "| dataset_type | digits |" in text.decode()


def test_tensorboard_compares_runs_by_settings_and_figures(tmp_path, call):
    """What its HPARAMS page asks for, through the code behind that page: settings that differ come first."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    results = []
    for number, extra in enumerate(("--lr=0.01", "--lr=0.02 --num_latents=8 --dropout=0.2")):
        done = call(train.main, f"{SEQUENCES} --epochs=1 --checkpoint_dir=c{number} {extra}")
        assert done.status == 0, done.err
        results.append(best_line(done.out))
    events = EventMultiplexer().AddRunsFromDirectory("runs").Reload()
    context = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(events, "runs")))
    request, content = RequestContext(), context.hparams_metadata(RequestContext(), "")
    page = context.experiment_from_metadata(request, "", True, content, [])
    names = [info.name for info in page.hparam_infos]
    assert names[:4] == ["checkpoint_dir", "dropout", "learning_rate", "num_latents"]
    stored = json.loads(Path("c0/settings.json").read_text())
    assert set(names) == stored.keys()
    names = [(info.name.group, info.name.tag) for info in page.metric_infos]
    assert [tag for _, tag in names[:3]] == ["best/test_accuracy", "best/val_accuracy", "best/val_loss"]
    assert ("train", "epoch/loss") in names and ("val", "epoch/loss") in names
    asked = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=10, allowed_statuses=[api_pb2.STATUS_SUCCESS],
        col_params=[api_pb2.ColParams(metric=info.name) for info in page.metric_infos],
    )  # fmt: skip
    groups = list_session_groups.Handler(request, context, "", asked).run().session_groups
    assert len(groups) == 2
    for group in groups:
        number = int(group.hparams["learning_rate"].number_value == 0.02)
        assert group.hparams["dropout"].number_value == (0.2 if number else 0.1)
        assert group.hparams["num_latents"].string_value == ("8" if number else "4")
        assert group.hparams["test_path"].string_value == "None"
        found = {value.name.tag: value.value for value in group.metric_values if not value.name.group}
        assert found["best/val_accuracy"] == pytest.approx(results[number][1], abs=5e-5)
        assert found["best/test_accuracy"] == pytest.approx(results[number][2], abs=5e-5)


def test_inference_repeats_the_figures_of_training(digits_run, digits, call, quick):
    """R48: without a data flag."""
    epoch, _, test, number = best_line(digits_run[0].stdout)
    logged = log_of(digits_run[1])[epoch - 1]
    for split, accuracy in (("test", test), ("val", logged["val_accuracy"])):
        done = call(inference.main, ["--model_path", digits, "--split", split])
        assert done.status == 0, done.err
        results = strict_json(Path("results/results.json").read_text())
        assert results["split"] == split and results["epoch"] == epoch and results["dataset"] == "digits"
        assert results["accuracy"] == pytest.approx(accuracy, abs=5e-5 if split == "test" else 1e-6)
        assert re.search(rf"^accuracy +{results['accuracy']:.4f}$", done.out, re.MULTILINE)
    assert results["negative_log_likelihood"] == pytest.approx(logged["val_loss"], abs=1e-6)
    assert results["split_sizes"] == {"train": 1295, "val": 143, "test": number} and results["split_seed"] == 0


def test_a_split_is_one_of_three(sequences, call, quick):
    sizes = load_checkpoint(sequences)["data"]["split_sizes"]
    for split in ("train", "val", "test"):
        assert call(inference.main, ["--model_path", sequences, "--split", split]).status == 0
        assert strict_json(Path("results/results.json").read_text())["num_samples"] == sizes[split]
    done = call(inference.main, ["--model_path", sequences, "--split", "all", "--output_dir", "other"])
    assert done.status == 2 and done.err.count("\n") == 1 and "'all'" in done.err and "val" in done.err
    assert not Path("other").exists()


def check_pictures(folder, expected):
    assert files_below(folder) == {"results.json", "items.csv", *expected}
    for name in expected:
        with Image.open(folder / name) as picture:
            picture.load()
            assert 400 <= picture.width <= 3000 and 300 <= picture.height <= 3000, (name, picture.size)
            assert len(set(picture.convert("L").resize((200, 200)).tobytes())) > 5, f"{name} is blank"


def test_analysis_of_sequences(sequences, call):
    done = call(inference.main, ["--model_path", sequences, "--analyze", "--output_dir", "a/b"])
    assert done.status == 0, done.err
    figures = {*FIGURES, "attention.png", "latents.png", "accuracy_by_length.png"}
    check_pictures(Path("a/b"), figures)
    results = strict_json(Path("a/b/results.json").read_text())
    assert sum(row["count"] for row in results["analysis"]["accuracy_by_length"]) == results["num_samples"] == 12
    for row in results["analysis"]["most_confident_mistakes"]:
        assert row["true"] != row["predicted"] and row["probability_of_true"] <= row["confidence"]


def test_the_batch_size_changes_nothing(sequences, call, quick):
    """R11."""
    found, rows = [], []
    model, settings = load_model(sequences)
    data = load_splits(Settings.from_dict(settings), model.data_info)[0]["train"]
    assert len({len(data[i]["input"]) for i in range(len(data))}) > 3
    for size in (1, 7, 64):
        flags = ["--model_path", sequences, "--batch_size", size, "--analyze", "--split", "train"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inference, "_analysis_figures", lambda *_: {})
            assert call(inference.main, flags).status == 0
        found.append(strict_json(Path("results/results.json").read_text()))
        rows.append(evaluation.collect(model, create_dataloader(data, size), model.task))
    for results, answers in zip(found[1:], rows[1:], strict=True):
        for name, values in answers.items():
            np.testing.assert_allclose(values, rows[0][name], atol=1e-5)
        assert results["confusion_matrix"] == found[0]["confusion_matrix"]
        for name, value in found[0].items():
            if isinstance(value, (int, float)):
                assert results[name] == pytest.approx(value, abs=1e-5), name
        mistakes = [row["id"] for row in results["analysis"]["most_confident_mistakes"]]
        assert mistakes == [row["id"] for row in found[0]["analysis"]["most_confident_mistakes"]]


def foreign(path):
    torch.save({"weights": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    ("flags", "make", "parts"),
    [
        ("", None, ["--model_path"]),
        ("--model_path gone.pth", None, ["gone.pth"]),
        ("--model_path text.pth", lambda: Path("text.pth").write_text("hello"), ["text.pth"]),
        ("--model_path foreign.pth", lambda: foreign("foreign.pth"), ["foreign.pth"]),
        ("--model_path folder", lambda: Path("folder").mkdir(), ["folder"]),
        ("--model_path .", None, ["checkpoint .: Is a directory"]),
        ("--model_path {} --analyse", None, ["--analyse", "nearest", "--analyze"]),
        ("--model_path {} --lr 1", None, ["--lr: unknown flag"]),
        ("--model_path {} --batch_size 0", None, ["--batch_size", "at least 1", "got 0"]),
        ("--model_path {} --device cuda", None, ["cuda is not available here"]),
        ("--model_path {} --amp fp16 --device cpu", None, ["fp16 needs a CUDA device"]),
        ("--model_path {} --output_dir taken", lambda: Path("taken").write_text("mine"), ["taken"]),
        ("--model_path {} --output_dir taken/sub", lambda: Path("taken").write_text("mine"), ["taken"]),
    ],
)
def test_bad_input_to_inference(sequences, call, quick, flags, make, parts):
    if make:
        make()
    before = files_below(Path())
    done = call(inference.main, flags.format(sequences))
    assert done.status == 2
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert all(part in done.err for part in parts), done.err
    assert files_below(Path()) == before and not Path("results").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("a fault")])
def test_pictures_that_cannot_be_written(sequences, call, monkeypatch, error):
    """A full disk is named in one line; a fault of ours keeps its traceback. The results are whole in both cases."""

    def fail(*_):
        raise error

    for name in ("plot_confusion_matrix", "plot_confidence_histogram", "plot_confidence_analysis"):
        monkeypatch.setattr(plots, name, fail)
    if isinstance(error, OSError):
        done = call(inference.main, ["--model_path", sequences])
        assert done.status == 2 and done.err.count("\n") == 1, done.err
        assert "results.json is complete" in done.err and "confusion_matrix.png" in done.err
        assert "No space left on device" in done.err
    else:
        with pytest.raises(ExceptionGroup, match="confusion_matrix.png"):
            call(inference.main, ["--model_path", sequences])
    assert files_below(Path()) == {"results/results.json", "results/items.csv"}
    strict_json(Path("results/results.json").read_text())


def test_a_flag_without_effect_is_named(sequences, call, quick):
    done = call(inference.main, ["--model_path", sequences, "--data_dir", "elsewhere"])
    assert done.status == 0 and "note: data_dir (flag) has no effect" in done.out


def test_interrupted_predictions_are_kept_beside_the_whole_ones(sequences, call, quick, monkeypatch):
    x = np.random.default_rng(0).normal(size=(30, 5, 4))
    np.savez("new.npz", x=x)
    np.savez("old.npz", x=x[:3])
    flags = ["--model_path", str(sequences), "--batch_size", "8", "--input"]
    assert call(inference.main, [*flags, "old.npz"]).status == 0
    whole, partial = Path("results/predictions.csv"), Path("results/predictions.partial.csv")
    old, prepare = whole.read_bytes(), inference._prepare

    def interrupted(model, item, where):
        if where.endswith("row 20"):  # in the third batch
            raise KeyboardInterrupt
        return prepare(model, item, where)

    with monkeypatch.context() as patch:
        patch.setattr(inference, "_prepare", interrupted)
        done = call(inference.main, [*flags, "new.npz"])
    assert done.status == 128 + signal.SIGINT and "16 of 30 items were predicted: results/predictions.par" in done.out
    assert done.err == "interrupted\n" and whole.read_bytes() == old
    kept = partial.read_text().splitlines()
    done = call(inference.main, [*flags, "new.npz"])
    assert done.status == 0 and "30 predictions" in done.out
    assert whole.read_text().splitlines()[:17] == kept and files_below(Path("results")) == {str(whole.name)}


def test_flags_without_effect_on_new_items_are_named(sequences, call, quick):
    np.save("item.npy", GOOD)
    plain = call(inference.main, ["--model_path", sequences, "--input", "item.npy"])
    assert plain.status == 0 and "note" not in plain.out
    table = Path("results/predictions.csv").read_bytes()
    flags = {"--amp": "bf16", "--split": "val", "--num_workers": "2", "--data_dir": "elsewhere", "--test_path": "t"}
    words = ["--model_path", sequences, "--input", "item.npy", *(word for pair in flags.items() for word in pair)]
    done = call(inference.main, words)
    assert done.status == 0 and Path("results/predictions.csv").read_bytes() == table
    for flag in flags:
        assert f"note: {flag[2:]} has no effect with --input" in done.out
    assert call(inference.main, ["--model_path", sequences, "--input", "item.npy", "--amp", "fp16"]).status == 0


# --- Notebook --------------------------------------------------------------------------------------------------------


def probabilities(answers):
    return np.array([list(answer["probabilities"].values()) for answer in answers])


def test_prediction_on_sequences(sequences):
    model, settings = load_model(sequences)
    assert not model.training and settings["dataset_type"] == "synthetic"
    assert model.data_info["features"] == {"series": {"input_dim": 4}} and len(model.data_info["class_names"]) == 3
    items = [np.random.default_rng(i).normal(size=(length, 4)) for i, length in enumerate([3, 30, 1, 12, 7])]
    answers = predict(model, items)
    with torch.inference_mode():
        alone = [model(torch.tensor(item, dtype=torch.float32)[None])[0].softmax(0).numpy() for item in items]
    np.testing.assert_allclose(probabilities(answers), alone, atol=1e-5)
    for answer, expected in zip(answers, alone, strict=True):
        assert answer["label"] == expected.argmax()
        assert answer["class"] == model.data_info["class_names"][answer["label"]]
        assert answer["confidence"] == max(answer["probabilities"].values()) == answer["probabilities"][answer["class"]]
        assert sum(answer["probabilities"].values()) == pytest.approx(1, rel=1e-14)  # float64
    json.dumps(answers, allow_nan=False)
    for size in (1, 2, 5):
        np.testing.assert_allclose(probabilities(predict(model, items, batch_size=size)), alone, atol=1e-5)
    tensors = [torch.tensor(item, dtype=torch.float32) for item in items]
    lists = [item.tolist() for item in items]
    for same in (tensors, lists):
        np.testing.assert_allclose(probabilities(predict(model, same)), alone, atol=1e-5)
    assert predict(model, []) == []


def test_prediction_on_images(digits):
    model, settings = load_model(digits)
    test = load_splits(Settings.from_dict(settings), model.data_info)[0]["test"]
    images = test.images[:20]  # uint8 (20, 8, 8, 1)
    with torch.no_grad():
        batch = next(iter(create_dataloader(test, 20)))
        expected = model(*model_inputs(batch, "cpu")).double().softmax(1).numpy()
    kinds = [images, images[..., 0], images.astype(np.float32), images.astype(np.int64)[..., 0], list(images),
             [torch.tensor(image) for image in images], images[..., 0].tolist()]  # fmt: skip
    for items in kinds:
        for size in (1, 7, 64):
            np.testing.assert_allclose(probabilities(predict(model, items, size)), expected, atol=1e-5)
    assert [answer["class"] for answer in predict(model, images)] == [str(n) for n in expected.argmax(1)]
    stored = load_digits()
    assert any((stored.images == images[0, ..., 0]).all((1, 2)))  # as scikit-learn gives them


GOOD = np.zeros((5, 4))


@pytest.mark.parametrize("size", [1, 2, 64])
@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        (np.zeros((5, 3)), ["(5, 3)", "4"]),
        (np.zeros(5), ["(5,)"]),
        (np.zeros((2, 5, 4)), ["(2, 5, 4)"]),
        (np.zeros((0, 4)), ["empty"]),
        (np.full((5, 4), np.nan), ["NaN"]),
        ([["a", "b"]], ["not an array of numbers"]),
        ([[1, 2], [3]], ["not an array of numbers"]),
        (None, []),
    ],
)
def test_a_bad_sequence_is_named(sequences, bad, parts, size):
    model, _ = load_model(sequences)
    with pytest.raises(UserError, match="^item 3: ") as caught:
        predict(model, [GOOD, GOOD, GOOD, bad, GOOD], size)
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)


BLACK = np.zeros((8, 8))


@pytest.mark.parametrize("size", [1, 2, 64])
@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        (np.zeros((8, 9)), ["(8, 9, 1)", "(8, 8, 1)"]),
        (np.zeros((8, 8, 3)), ["(8, 8, 3)", "(8, 8, 1)"]),
        (np.zeros((1, 8, 8)), ["(1, 8, 8)"]),
        (np.zeros(64), ["(64,)"]),
        (BLACK + 0.5, ["whole numbers from 0 to 255"]),
        (BLACK - 1, ["whole numbers"]),
        (np.full((8, 8), 300), ["whole numbers"]),
        (BLACK + np.nan, ["whole numbers"]),
        (BLACK + np.inf, ["whole numbers"]),
        ([["a"] * 8] * 8, ["not an array of numbers"]),
        ([[1, 2], [3]], ["not an array of numbers"]),
        (None, []),
    ],
)
def test_a_bad_image_is_named(digits, bad, parts, size):
    model, _ = load_model(digits)
    with pytest.raises(UserError, match="^item 3: ") as caught:
        predict(model, [BLACK, BLACK, BLACK, bad, BLACK], size)
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)


def test_evaluation_in_a_notebook_equals_the_command(sequences, call, quick):
    model, settings = load_model(sequences)
    model.train()
    test = load_splits(Settings.from_dict(settings), model.data_info)[0]["test"]
    results = evaluate(model, test)
    assert model.training and files_below(Path()) == set()
    assert call(inference.main, ["--model_path", sequences, "--amp", "off"]).status == 0
    written = strict_json(Path("results/results.json").read_text())
    assert results == {name: written[name] for name in results} == json.loads(json.dumps(results, allow_nan=False))
    assert written.keys() - results.keys() == {
        "model_path", "epoch", "dataset", "split", "split_sizes", "split_seed", "figures",
        "samples_as_in_training",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["sequences", "digits"])
def test_a_subset_without_some_classes(kind, request, tmp_path):
    """R44: any data set of the right items will do, with fewer classes too."""
    model, settings = load_model(request.getfixturevalue(kind))
    names = model.data_info["class_names"]
    test = load_splits(Settings.from_dict(settings), model.data_info)[0]["test"]
    labels = np.array([test[i]["label"] for i in range(len(test))])
    chosen = Subset(test, np.flatnonzero((labels == 0) | (labels == 2)).tolist())
    results = evaluate(model, chosen, analyze=True, output_dir=tmp_path)
    assert [row["class"] for row in results["per_class"]] == names
    support = [(labels == number).sum() * (number in (0, 2)) for number in range(len(names))]
    assert [row["support"] for row in results["per_class"]] == support
    assert np.shape(results["confusion_matrix"]) == (len(names), len(names))
    assert strict_json((tmp_path / "results.json").read_text()) == results
    assert files_below(tmp_path) == {"results.json", "items.csv", *results["figures"]}
    one = evaluate(model, Subset(test, np.flatnonzero(labels == 1).tolist()))
    assert one["majority_baseline"] == 1 and one["per_class"][0]["recall"] is None
    inference.print_results(one)


def test_drawn_images_are_those_stored(digits):
    model, settings = load_model(digits)
    test = load_splits(Settings.from_dict(settings), model.data_info)[0]["test"]
    tokens = collate(test.__getitems__(list(range(50))))["input"]
    assert np.array_equal(from_description(model.data_info["adapters"]["image"]).images(tokens), test.images[:50])


def test_labels_that_the_model_does_not_know(sequences):
    model, _ = load_model(sequences)
    with pytest.raises(UserError, match="sample 1: label 3 is not in 0..2"):
        evaluate(model, [{"input": GOOD, "label": 0}, {"input": GOOD, "label": 3}])
    with pytest.raises(UserError, match="sample 0: it has no 'label'"):
        evaluate(model, [{"input": GOOD}])


# --- Precisions, kinds of items, threads -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["sequences", "digits"])
def test_prediction_and_evaluation_in_other_precisions(kind, dtype, request):
    path = request.getfixturevalue(kind)
    model, settings = load_model(path)
    test = load_splits(Settings.from_dict(settings), model.data_info)[0]["test"]
    items = list(test.images[:20]) if kind == "digits" else [np.asarray(test[i]["input"]) for i in range(12)]
    expected, accuracy = probabilities(predict(model, items)), evaluate(model, test)["accuracy"]
    model.to(dtype)
    close = {"atol": 1e-6} if dtype == torch.float64 else {"atol": 0.03}
    np.testing.assert_allclose(probabilities(predict(model, items)), expected, **close)
    assert evaluate(model, test)["accuracy"] == pytest.approx(accuracy, abs=0.1)
    assert {weights.dtype for weights in model.parameters()} == {dtype}


def made_model(path, adapters, classes=("no", "yes"), **arguments):
    """The model of a checkpoint made here, with the weights that it began with."""
    task = {"kind": "classification", "class_names": list(classes), "class_weights": None}
    data = {"task": task, "num_outputs": len(classes), "class_names": list(classes)}
    data["adapters"] = {name: describe(one) for name, one in adapters.items()}
    arguments = {
        "input_dim": {name: one.features for name, one in adapters.items()}, "num_classes": len(classes), "d_model": 16,
        "num_heads": 2, "num_latents": 4, "num_cross_attention_layers": 1, "num_self_attention_layers": 1, **arguments,
    }  # fmt: skip
    torch.manual_seed(0)
    contents = {"model": PerceiverModel(**arguments).state_dict(), "model_args": arguments, "data": data}
    save_checkpoint(path, contents | {"settings": Settings().to_dict(), "epoch": 0, "step": 0, "best": {}})
    return load_model(path)[0]


ALL_KINDS = {
    "image": ImageAdapter([4, 4, 3], 2, [100.0] * 3, [50.0] * 3, any_size=True),
    "text": TextAdapter(),
    "series": SeriesAdapter([0.0, 1.0], [1.0, 2.0], [1]),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kinds", [["text"], ["image"], ["image", "text", "series"]])
def test_bytes_of_a_text_stay_whole_in_other_precisions(tmp_path, dtype, kinds):
    """A number of a token is none that may be rounded: bfloat16 has 8 bits for it, no more than a byte needs."""
    model = made_model(tmp_path / "m.pth", {name: ALL_KINDS[name] for name in kinds})
    whole = {"image": np.arange(48).reshape(4, 4, 3), "text": "\u00ff\u00fe aé한글", "series": np.ones((3, 2))}
    items = [{name: whole[name] for name in kinds}]
    expected, seen = probabilities(predict(model, items)), []
    if "text" in kinds:
        model.modalities["text"].embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten()))
    np.testing.assert_allclose(probabilities(predict(model.to(dtype), items)), expected, atol=0.03)
    assert not seen or seen[0].tolist() == list(whole["text"].encode())


def test_an_answer_that_is_not_finite_is_none(tmp_path):
    model = made_model(tmp_path / "m.pth", {"series": SeriesAdapter([0.0], [1.0])})
    with torch.no_grad():
        model.classifier.weight.fill_(6e4)
        model.norm.bias.fill_(6e4)
    assert predict(model, [np.ones(3)])[0]["confidence"] == pytest.approx(0.5)
    with pytest.raises(UserError, match="not all finite.*float32"):
        predict(model.half(), [np.ones(3)])
    with pytest.raises(UserError, match="not all finite"):
        evaluate(model, [{"input": np.ones((3, 1)), "label": 0}])


def test_masked_arrays_and_tables_and_half_tensors_are_series(tmp_path):
    model = made_model(tmp_path / "m.pth", {"series": ALL_KINDS["series"]})
    values = np.array([[0.5, 2.0], [-1.0, 3.5], [2.0, -0.25]])
    missing = np.array([[False, True], [False, False], [True, True]])
    expected = probabilities(predict(model, [values]))
    for same in (torch.tensor(values).bfloat16(), torch.tensor(values).half(), pd.DataFrame(values, columns=["b", "a"]),
                 np.ma.array(values), pd.DataFrame(values).astype("Float64")):  # fmt: skip
        np.testing.assert_array_equal(probabilities(predict(model, [same])), expected)
    expected = probabilities(predict(model, [np.where(missing, np.nan, values)]))
    whole = np.ma.array((values * 4).astype(np.int64), mask=missing)
    table = pd.DataFrame(values).mask(missing).astype("Float64")
    for same in (np.ma.array(values, mask=missing), np.ma.array(values.astype(np.float32), mask=missing), table):
        np.testing.assert_array_equal(probabilities(predict(model, [same])), expected)
    assert table.isna().to_numpy().sum() == 3 and np.isfinite(probabilities(predict(model, [whole]))).all()
    np.testing.assert_array_equal(
        probabilities(predict(model, [whole])), probabilities(predict(model, [np.where(missing, np.nan, values * 4)]))
    )
    series = np.ma.stack([np.ma.array(values, mask=missing)] * 3)  # three at once, as one masked array
    # A processor may add the numbers of a larger batch in another order
    np.testing.assert_allclose(probabilities(predict(model, series)), np.repeat(expected, 3, 0), rtol=1e-6)


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (np.ma.array(np.ones((3, 2)), mask=True), "NaN"),  # a model of plain tokens knows no missing values
        (pd.DataFrame({"a": ["x", "y"], "b": [1, 2]}), "not an array of numbers"),
        (pd.DataFrame({"a": pd.to_datetime(["2024-01-01"]), "b": [1]}), "not an array of numbers"),
        (np.array([["2024-01-01", "2024-01-02"]], "M8[D]"), "it holds dates"),
        (torch.ones(3, 2).to_sparse(), "not an array of numbers"),
        (torch.ones(3, 2, dtype=torch.complex64).conj(), "not an array of numbers"),
        (torch.ones(3, 2, device="meta"), "not an array of numbers"),
    ],
)
def test_items_that_are_no_numbers(tmp_path, item, says):
    model = made_model(tmp_path / "m.pth", {"series": TensorAdapter(2)})
    with pytest.raises(UserError, match="^item 1: ") as caught:
        predict(model, [np.ones((3, 2)), item])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_masked_pixels_are_none(tmp_path):
    model = made_model(tmp_path / "m.pth", {"image": ALL_KINDS["image"]})
    image = np.ma.array(np.ones((4, 4, 3), np.uint8), mask=np.eye(4, dtype=bool)[..., None].repeat(3, 2))
    with pytest.raises(UserError, match="item 0: pixels must be whole numbers"):
        predict(model, [image])


@pytest.mark.parametrize("size", [0, -1, 2.5, "4", None, True])
def test_batch_sizes_that_are_none(sequences, size):
    model, settings = load_model(sequences)
    for use, items in ((predict, [GOOD] * 3), (evaluate, [{"input": GOOD, "label": 0}])):
        with pytest.raises(UserError, match=f"batch_size is {size}; it must be a whole number of at least 1"):
            use(model, items, size)
    assert len(predict(model, [GOOD] * 3, np.int64(2))) == 3


def test_one_item_is_no_list(sequences):
    model, _ = load_model(sequences)
    with pytest.raises(UserError, match=r"this is one DataFrame, .*; write predict\(model, \[frame\]\)"):
        predict(model, pd.DataFrame(GOOD))


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "mps", "gpu", "cpu:x", torch.device("cuda", 99), 7.5])
def test_a_device_that_is_not_there(sequences, device):
    if device == "cuda" and torch.cuda.is_available():
        device = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UserError, match="device: .* cannot be used here") as caught:
        load_model(sequences, device)
    assert "\n" not in str(caught.value)


STATE = [
    lambda: list(warnings.filters), lambda: torch.get_rng_state().tolist(), np.geterr, torch.is_grad_enabled,
    torch.get_default_dtype, lambda: str(np.random.get_state()), random.getstate, torch.is_inference_mode_enabled,
]  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
def test_any_number_of_threads_may_predict_with_one_model(tmp_path, training):
    """Also with one that is being trained: its mode is another thread's, and dropout no part of an answer."""
    model = made_model(tmp_path / "m.pth", ALL_KINDS, dropout=0.5, attention_dropout=0.5).train(training)
    photo = tmp_path / "photo.png"
    Image.new("RGB", (9, 7), "orange").save(photo)
    items = [
        {"image": photo, "text": "some words" * (i + 1), "series": np.arange(2.0 * (i % 5 + 1)).reshape(-1, 2)}
        for i in range(24)
    ]
    expected, before = probabilities(predict(model, items)), [read() for read in STATE]
    watched, done = [], threading.Event()

    def watch():
        while not done.is_set():
            watched.append({module.training for module in model.modules()})

    def work(number):
        with torch.inference_mode(number % 2 == 0):
            return predict(model, items, batch_size=number + 1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(16)))
    done.set()
    watcher.join()
    for answers in found:
        np.testing.assert_allclose(probabilities(answers), expected, atol=1e-6)
    assert watched and all(modes == {training} for modes in watched)
    assert [read() for read in STATE] == before
    for name, adapter in model.adapters.items():
        assert adapter == ALL_KINDS[name]


def test_loading_and_predicting_change_no_global_state(sequences):
    before = [read() for read in STATE]
    model, _ = load_model(sequences)
    predict(model, [GOOD])
    evaluate(model, [{"input": GOOD, "label": 0}])
    assert [read() for read in STATE] == before


# --- Mistakes on the command line of train.py ------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a download")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        ("--dataset=synthetic --d_model=100 --num_heads=8", [["100", "num_heads=8"]]),
        ("--dataset=cifar10 --d_model=100 --num_heads=8", [["100", "num_heads=8"]]),
        ("--dataset=cifar10 --patch_size=5", [["patch_size 5", "32 x 32", "[1, 2, 4, 8, 16, 32]"]]),
        ("--dataset=digits --patch_size=3", [["patch_size 3", "8 x 8", "[1, 2, 4, 8]"]]),
        (f"{SEQUENCES} --share_weights --num_cross_attention_layers=2", [["share_weights", "=1", "=2"]]),
        ("--dataset=digits --patch_size=2147483647", [["patch_size 2147483647", "8 x 8", "[1, 2, 4, 8]"]]),
        (f"{SEQUENCES} --d_model=2000000", [["--d_model", "at most 100000", "2000000"]]),
        (f"{SEQUENCES} --num_latents=2000000000", [["--num_latents", "at most 100000"]]),
        (f"{SEQUENCES} --mlp_ratio=2000000000", [["--mlp_ratio", "at most 1000"]]),
        (f"{SEQUENCES} --num_self_attention_layers=2000000000", [["--num_self_attention_layers", "at most 1000"]]),
        ("--dataset=cifar10 --d_model=100000 --num_heads=1", [["weights, gradients and AdamW", "GiB, and cpu has"]]),
        (f"{SEQUENCES} --num_samples=2000000000 --seq_len_range 5 2000000000", [["2,000,000,000 tokens", "GiB"]]),
        (f"{SEQUENCES} --feature_dim=2000000000 --num_samples=2000000000", [["2,000,000,000 features", "GiB"]]),
        (f"{SEQUENCES} --num_classes=2000000000", [["60 samples", "more of a class"]]),
        ("--device=cuda", [["device: cuda is not available here"]]),
        ("--device=cpu --amp=fp16", [["fp16 needs a CUDA device"]]),
        (f"{SEQUENCES} --num_samples=5 --num_classes=8", [["5 samples", "more of a class"]]),
        (f"{SEQUENCES} --num_samples=2", [["2 samples"]]),
        ("--config=gone.json", [["gone.json", "No such file"]]),
        ("--learning_rte=1", [["--learning_rte", "nearest", "--lr"]]),
        ("--seq_len_range 9 2 --lr=fast --epochs=2.5", [["--seq_len_range"], ["--lr", '"fast"'], ["--epochs", "2.5"]]),
        ("--dataset=mnist stray", [["stray"], ["--dataset", "synthetic, cifar10, digits", "mnist"]]),
    ],
)
def test_bad_flags_of_training(call, no_network, flags, lines):
    done = call(train.main, flags)
    assert done.status == 2
    shown = done.err.splitlines()
    assert len(shown) == len(lines), done.err
    for parts in lines:
        assert any(line.startswith("error: ") and all(part in line for part in parts) for line in shown), done.err
    assert list(Path().rglob("*")) == []


def test_a_bad_file_of_training(call):
    values = {"batch_size": "32", "num_epochs": 2.5, "bach_size": 3, "compile": "false", "seq_len_range": [9, 2]}
    Path("c.json").write_text(json.dumps(values))
    done = call(train.main, "--config=c.json --lr=-1")
    assert done.status == 2 and done.err.count("\n") == 6 == done.err.count("error: "), done.err
    assert all(name in done.err for name in [*values, "--lr", "batch_size"])
    assert files_below(Path()) == {"c.json"}


@pytest.mark.parametrize("flag", ["--checkpoint_dir", "--log_dir"])
@pytest.mark.parametrize("place", ["taken", "taken/sub"])
def test_folders_that_cannot_be_written(call, quick, flag, place):
    Path("taken").write_text("mine")
    Path("checkpoints").mkdir()
    Path("checkpoints/best_model.pth").write_text("an earlier run")
    done = call(train.main, f"{SEQUENCES} --epochs=1 {flag}={place}")
    assert done.status == 2 and done.err.count("\n") == 1
    assert done.err.startswith(f"error: cannot write into {place}: ")
    assert files_below(Path()) == {"taken", "checkpoints/best_model.pth"} and Path("taken").read_text() == "mine"


def test_the_example_file_with_flags_over_it(call, monkeypatch):
    """The longest command that the README has, up to where it needs the data."""

    def no_data(*_):
        raise UserError("no data here")

    monkeypatch.setattr(train, "load_splits", no_data)
    command = "--dataset cifar10 --model_size large --batch_size 64 --epochs 200 --lr 2e-4 --config"
    done = call(train.main, f"{command} {ROOT / 'config.json'}")
    assert (done.status, done.err) == (2, "error: no data here\n")
    notes = [line for line in done.out.splitlines() if line.startswith("note: ")]
    assert [note.split()[1] for note in notes] == ["num_samples", "seq_len_range"]
    assert all("(file) has no effect: it needs dataset_type synthetic, not cifar10" in note for note in notes)
    expected = [("batch_size", "64", "flag"), ("num_epochs", "200", "flag"), ("learning_rate", "0.0002", "flag"),
                ("weight_decay", "0.0001", "file"), ("flip", "true", "data")]  # fmt: skip
    for name, value, source in expected:
        assert re.search(rf"^  {name} +{re.escape(value)} .* {source}", done.out, re.MULTILINE), name


# --- Ways to train ---------------------------------------------------------------------------------------------------


def scripted(monkeypatch, accuracies):
    """Let the validations (after the rehearsal) give these accuracies."""
    validate, values = train.validate, iter([0.0, *accuracies])

    def give(*args, **options):
        metrics, figures = validate(*args, **options)
        return metrics, figures | {"val_accuracy": next(values)}

    monkeypatch.setattr(train, "validate", give)


@pytest.mark.parametrize(
    ("accuracies", "warmup", "epochs", "best"),
    [
        ([0.5, 0.6, 0.5, 0.6, 0.7], 0.1, 4, 2),  # an equal accuracy may be better by its loss, see below
        ([0.5, 0.4, 0.3, 0.4, 0.5, 0.4, 0.3, 0.2], 0.5, 7, 1),  # the warm-up is 5 epochs
        ([0.5, 0.4, 0.3, 0.4, 0.6, 0.4, 0.3, 0.2], 0.5, 7, 5),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], 0.1, 10, 10),
    ],
)
def test_early_stopping(call, quick, monkeypatch, accuracies, warmup, epochs, best):
    accuracies = [value - i * 1e-9 for i, value in enumerate(accuracies)]
    scripted(monkeypatch, accuracies)
    flags = f"{SEQUENCES} --epochs=10 --early_stopping_patience=2 --warmup_fraction={warmup} --amp=off"
    done = call(train.main, flags)
    assert done.status == 0 and len(log_of(Path())) == epochs, done.out
    assert best_line(done.out)[0] == best
    assert ("stopped early: no better epoch for 2 epochs" in done.out) == (epochs < 10)


def test_the_best_model_is_tested_not_the_last(call, quick, monkeypatch):
    """The first epoch is made the best one; both models are then tested by the other command."""
    scripted(monkeypatch, [0.9, 0.2, 0.1, 0.3])
    done = call(train.main, f"{SEQUENCES} --num_samples=300 --epochs=4 --lr=0.01 --amp=off --device=cpu")
    epoch, validation, test, number = best_line(done.out)
    assert (epoch, validation, number) == (1, 0.9, 60)
    accuracies = {}
    for name in (BEST, LAST):
        assert call(inference.main, f"--model_path checkpoints/{name} --device cpu").status == 0
        accuracies[name] = strict_json(Path("results/results.json").read_text())["accuracy"]
    assert test == pytest.approx(accuracies[BEST], abs=5e-5) and accuracies[LAST] != accuracies[BEST]


def weights_after(call, folder, flags):
    done = call(train.main, f"{SEQUENCES} --epochs=1 --amp=off --checkpoint_dir={folder} {flags}")
    assert done.status == 0, done.err
    return load_checkpoint(Path(folder) / LAST)["model"], done.out


def test_gradient_checkpointing_gives_the_same_weights(call, quick):
    flags = "--dropout=0.3 --attention_dropout=0.2"
    plain, _ = weights_after(call, "plain", flags)
    saving, _ = weights_after(call, "saving", f"{flags} --gradient_checkpointing")
    assert all(torch.equal(plain[name], saving[name]) for name in plain)


def test_a_compiled_model_gives_the_same_weights(call, quick, monkeypatch):
    """With a backend that generates no code, which alone would take half a minute."""
    plain, _ = weights_after(call, "plain", "--dropout=0")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled, out = weights_after(call, "compiled", "--dropout=0 --compile")
    assert "compiled" in out and plain.keys() == compiled.keys()
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], atol=1e-5, rtol=1e-4)
    assert call(inference.main, f"--model_path compiled/{BEST}").status == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_a_quick_run_learns(call, quick, seed):
    """R05."""
    done = call(
        train.main,
        "--dataset=synthetic --num_samples=600 --seq_len_range 20 40 --feature_dim=16 --num_classes=3 "
        f"--model_size=tiny --d_model=64 --num_latents=16 --val_fraction=0.2 --epochs=6 --lr=3e-3 --seed={seed}",
    )
    assert done.status == 0
    assert best_line(done.out)[1] > 0.6, done.out  # the majority class has a third


# --- What a person sees: last, since these wait for their processes --------------------------------------------------


def test_analysis_of_images_without_a_display(processes, digits_run):
    """R45, R47, with the command as it is typed."""
    result, folder = processes(infer_without_display)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    figures = {*FIGURES, "attention.png", "latents.png", "mistakes.png"}
    check_pictures(folder / "new" / "sub" / "folder", figures)
    results = strict_json((folder / "new" / "sub" / "folder" / "results.json").read_text())
    assert set(results["figures"]) == figures
    assert results["accuracy"] == pytest.approx(best_line(digits_run[0].stdout)[2], abs=5e-5)
    assert all(name in result.stdout.splitlines()[-1] for name in figures)
    assert results["analysis"]["accuracy_by_length"] == []
    assert sum(row["count"] for row in results["analysis"]["reliability"]) == 359


def test_importing_changes_nothing(processes):
    result, folder = processes(import_only)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[] False\n", "")
    assert not files_below(folder)


def test_the_tour(processes):
    result, folder = processes(tour)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert re.findall(r"^(\d)\. ", result.stdout, re.MULTILINE) == list("123456789")
    assert files_below(folder) == set()


@pytest.mark.slow
def test_without_tensorboard(processes):
    """R51."""
    (help_text, trained, evaluated), folder = processes(without_tensorboard)
    assert help_text.returncode == 0 and "--checkpoint_dir" in help_text.stdout and help_text.stderr == ""
    assert trained.returncode == 0 and trained.stderr == "", trained.stderr
    assert [line for line in trained.stdout.splitlines() if "tensorboard" in line] == [
        "note: tensorboard is not installed, so no curves are written for it (pip install tensorboard)"
    ]
    assert "\r" not in trained.stdout and (folder / "work" / "checkpoints" / BEST).exists()
    assert evaluated.returncode == 0 and "tensorboard" not in evaluated.stdout + evaluated.stderr


def test_the_progress_bar_of_a_terminal(processes):
    result, _ = processes(on_a_terminal)
    assert result.returncode == 0, result.stdout
    bars = [part for part in re.split(r"[\r\n]+", result.stdout) if part.startswith("epoch 1/1") and "|" in part]
    full = re.compile(r"loss \d\.\d+, acc \d\.\d+, lr \d\.\d+e-\d\d, [\d,]+ samples/s$")
    complete = [bar for bar in bars if full.search(bar)]
    assert len(complete) > 5 and len(complete) >= len(bars) - 2, bars[-3:]
    assert all(len(bar) <= 80 for bar in bars)
    assert re.search(r"^epoch 1/1  train loss", result.stdout.replace("\r", "\n"), re.MULTILINE)
