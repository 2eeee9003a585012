"""What helps with unbalanced classes, through the commands and against scikit-learn: --class_weights, --select_by and
--tune_thresholds."""

import csv
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from running import before_step, in_two_processes
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss, recall_score
from sklearn.utils.class_weight import compute_class_weight
from test_resume import assert_same_run, log_of

import inference
from checkpoint import BEST, LAST, load_checkpoint
from config import Settings
from tasks import Classification, MultiLabel

MODEL = "--model_size=tiny --d_model=16 --num_heads=2 --num_latents=4 --num_self_attention_layers=1 --amp=off --lr=5e-3"
CLASSES = f"--dataset=sequences --data_path=classes.npz {MODEL} --label_smoothing=0 --ema_decay=0"
LABELS = f"--dataset=sequences --data_path=labels.npz --task=multilabel {MODEL} --ema_decay=0"


@pytest.fixture
def data(run):
    """`run`, in a folder with a set of overlapping classes of 300, 75 and 25 items, and one of three labels."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], [300, 75, 25])
    np.savez("classes.npz", x=rng.normal(0, 1.6, (400, 4, 1)) + y[:, None, None] * 0.8, y=np.array(["a", "b", "c"])[y])
    true = rng.random((300, 3)) < [0.5, 0.2, 0.08]
    np.savez("labels.npz", x=rng.normal(0, 1, (300, 4, 3)) + true[:, None], y=true.astype(int),
             class_names=np.array(["often", "less", "rare"]))  # fmt: skip
    return run


def evaluated(capsys, split="test", model=BEST):
    """The rows of items.csv of a split, and results.json."""
    assert inference.main(["--model_path", f"checkpoints/{model}", "--split", split]) == 0
    capsys.readouterr()
    with open("results/items.csv", newline="") as file:
        return list(csv.DictReader(file)), json.loads(Path("results/results.json").read_text())


def labels_of(split, run_folder="checkpoints"):
    """The class names, or the labels, of the items of a split, by the ids that an evaluation writes."""
    inference.main(["--model_path", f"{run_folder}/{LAST}", "--split", split, "--output_dir", "labels"])
    with open("labels/items.csv", newline="") as file:
        return [row["true"] for row in csv.DictReader(file)]


# --- Class weights ---------------------------------------------------------------------------------------------------


def test_balanced_weights_are_those_of_scikit_learn_and_help_the_rare_class(data, capsys):
    plain = data(f"{CLASSES} --epochs=8")
    rows, _ = evaluated(capsys, "train")
    recall = {"plain": recall_score([r["true"] for r in rows], [r["predicted"] for r in rows], average=None)}
    assert plain.status == 0 and not re.search("^weights ", plain.out, re.M)
    assert "train_objective" not in log_of(Path())[0] and "loss    cross-entropy; train" in plain.out
    result = data(f"{CLASSES} --epochs=8 --class_weights=balanced")
    assert result.status == 0, result.err
    truth = labels_of("train")
    weights = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=truth)
    task = load_checkpoint(f"checkpoints/{BEST}")["data"]["task"]
    assert task["class_weights"] == pytest.approx(weights, rel=1e-12)
    shown = ", ".join(f"{name} {weight:.4g}" for name, weight in zip("abc", weights, strict=True))
    assert f"\nweights {shown}\nloss    cross-entropy without class weights; train: with" in result.out
    assert re.search(r"class_weights +balanced +flag", result.out)
    rows, results = evaluated(capsys, "train")
    true = [row["true"] for row in rows]
    recall["balanced"] = recall_score(true, [row["predicted"] for row in rows], average=None)
    assert recall["balanced"][2] > recall["plain"][2] + 0.1
    assert results["balanced_accuracy"] == pytest.approx(recall["balanced"].mean())
    losses = [float(row["negative_log_likelihood"]) for row in rows]
    assert results["negative_log_likelihood"] == pytest.approx(np.mean(losses))  # unweighted
    for line in log_of(Path()):
        assert line["train_objective"] != line["train_loss"]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_objective_is_the_weighted_cross_entropy(smoothing):
    """Against float64 NumPy; the weights stay whole under autocast."""
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(50, 3)), rng.integers(0, 3, 50)
    settings = Settings(class_weights="balanced", label_smoothing=smoothing)
    task = Classification(["a", "b", "c"]).learn(targets, settings)
    weights = compute_class_weight("balanced", classes=np.arange(3), y=targets)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    share = (1 - smoothing) * np.eye(3)[targets] + smoothing / 3
    expected = -(share * weights * log_p).sum()
    found = task.objective(torch.tensor(logits), torch.tensor(targets), settings)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        low = task.objective(torch.tensor(logits).bfloat16(), torch.tensor(targets), settings)
    exact = task.objective(torch.tensor(logits).bfloat16().double(), torch.tensor(targets), settings)
    assert low.item() == pytest.approx(exact.item(), rel=1e-5)


def test_the_weights_of_several_labels_are_those_of_scikit_learn(data):
    result = data(f"{LABELS} --epochs=1 --class_weights=balanced")
    assert result.status == 0, result.err
    names = ["often", "less", "rare"]
    there = np.array([[name in cell.split(";") for name in names] for cell in labels_of("train")]).astype(int)
    task = load_checkpoint(f"checkpoints/{LAST}")["data"]["task"]
    assert task["class_names"] == names
    for column, pair in zip(there.T, task["weights"], strict=True):
        assert pair == pytest.approx(compute_class_weight("balanced", classes=np.array([0, 1]), y=column))
    shown = ", ".join(f"{name} {w:.4g}/{v:.4g}" for name, (w, v) in zip(names, task["weights"], strict=True))
    assert f"\nweights without/with the label: {shown}\n" in result.out
    outputs, targets = torch.randn(8, 3, dtype=torch.float64), torch.tensor(there[:8], dtype=torch.float32)
    log_p, log_q = (torch.nn.functional.logsigmoid(one).numpy() for one in (outputs, -outputs))
    weights = np.array(task["weights"])
    expected = -(there[:8] * weights[:, 1] * log_p + (1 - there[:8]) * weights[:, 0] * log_q).sum() / 3
    found = MultiLabel(names, weights=task["weights"]).objective(outputs, targets, Settings())
    assert found.item() == pytest.approx(expected, rel=1e-5)


# --- Which epoch is best ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["accuracy", "balanced_accuracy", "macro_f1", "loss"])
def test_the_best_epoch_has_the_best_score_of_validation(data, capsys, score):
    chosen = "" if score == "accuracy" else f"--select_by={score}"
    result = data(f"{CLASSES} --epochs=6 --val_fraction=0.3 {chosen}")
    assert result.status == 0, result.err
    lines, sign = log_of(Path()), -1 if score == "loss" else 1
    best = max(lines, key=lambda line: (sign * line[f"val_{score}"], -line["val_loss"]))
    assert load_checkpoint(f"checkpoints/{BEST}")["epoch"] == best["epoch"]
    shown = f"best epoch {best['epoch']}: validation accuracy {best['val_accuracy']:.4f}"
    if score in ("balanced_accuracy", "macro_f1"):  # what picks the best epoch is seen
        shown += f" {score.replace('_', ' ')} {best[f'val_{score}']:.4f}"
    assert f"{shown}, test accuracy" in result.out
    rows, _ = evaluated(capsys, "val")
    true, predicted = ([row[name] for row in rows] for name in ("true", "predicted"))
    reference = {
        "accuracy": np.mean(np.array(true) == predicted),
        "balanced_accuracy": balanced_accuracy_score(true, predicted),
        "macro_f1": f1_score(true, predicted, average="macro"),
        "loss": np.mean([float(row["negative_log_likelihood"]) for row in rows]),
    }
    assert best[f"val_{score}"] == pytest.approx(reference[score], rel=1e-6)


def test_a_score_that_the_task_has_not_is_refused(data):
    result = data(f"{CLASSES} --select_by=rmse")
    assert result.status == 2 and result.err == (
        "error: select_by: rmse is no score of classification; choose one of accuracy, balanced_accuracy, macro_f1, "
        "loss, last\n"
    )
    assert data(f"{LABELS} --select_by=accuracy").err.startswith("error: select_by: accuracy is no score of multilabel")
    assert data(f"{CLASSES} --epochs=1 --select_by=loss").status == 0
    assert "select_by: cannot change on resume" in data("--resume --select_by=accuracy --epochs=2").err


# --- Thresholds ------------------------------------------------------------------------------------------------------


def test_thresholds_have_the_best_f1_of_validation_and_are_used_ever_after(data, capsys):
    result = data(f"{LABELS} --epochs=5 --tune_thresholds --val_fraction=0.3")
    assert result.status == 0, result.err
    checkpoint = load_checkpoint(f"checkpoints/{BEST}")
    names, thresholds = (checkpoint["data"]["task"][key] for key in ("class_names", "thresholds"))
    assert thresholds != [0.5] * 3
    rows, _ = evaluated(capsys, "val")
    for name, threshold in zip(names, thresholds, strict=True):
        p = np.array([float(row[f"probability {name}"]) for row in rows])
        there = np.array([name in row["true"].split(";") for row in rows])
        highest = max(f1_score(there, p >= one, zero_division=0) for one in p)
        assert f1_score(there, p >= threshold, zero_division=0) == pytest.approx(highest)
    rows, results = evaluated(capsys)
    for row in rows:
        shares = [float(row[f"probability {name}"]) for name in names]
        over = [name for name, share, least in zip(names, shares, thresholds, strict=True) if share >= least]
        assert row["predicted"] == ";".join(over)
    test = float(re.search(r"test macro f1 (\d\.\d{4})", result.out)[1])
    assert test == pytest.approx(results["macro_f1"], abs=5e-5)
    columns = ([[name in row[key].split(";") for name in names] for row in rows] for key in ("true", "predicted"))
    true, predicted = columns
    assert results["macro_f1"] == pytest.approx(f1_score(true, predicted, average="macro", zero_division=0))
    model, _ = inference.load_model(f"checkpoints/{BEST}")
    series = np.load("labels.npz")["x"][:40]
    for answer in inference.predict(model, list(series)):
        pairs = zip(names, answer["probabilities"].values(), thresholds, strict=True)
        assert answer["labels"] == [name for name, share, least in pairs if share >= least]


def test_a_run_with_thresholds_and_weights_resumes_bit_for_bit(data, monkeypatch, tmp_path):
    flags = f"{LABELS} --epochs=3 --tune_thresholds --class_weights=balanced --select_by=micro_f1 --save_every=2"
    for place in ("unbroken", "broken"):
        with monkeypatch.context() as patch:
            if place == "broken":
                before_step(patch, 9, lambda: signal.raise_signal(signal.SIGTERM))
            status = data(f"{flags} --checkpoint_dir={place}/checkpoints").status
        assert status == (143 if place == "broken" else 0)
    assert data(f"--resume broken/checkpoints/{LAST}").status == 0
    for place in ("unbroken", "broken"):  # what differs on purpose: the folder
        for name in (BEST, LAST):
            path = tmp_path / place / "checkpoints" / name
            contents = torch.load(path, weights_only=True)
            contents["settings"]["checkpoint_dir"] = "checkpoints"
            torch.save(contents, path)
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


@pytest.mark.slow
def test_two_processes_find_the_same_thresholds_and_weights(data):
    flags = f"{LABELS} --epochs=2 --tune_thresholds --class_weights=balanced --dropout=0 --device=cpu"
    assert data(f"{flags} --checkpoint_dir=one").status == 0
    shown = in_two_processes(f"{flags} --checkpoint_dir=two")
    assert shown.count("weights without/with the label: ") == 1
    one, two = (load_checkpoint(f"{place}/{LAST}")["data"]["task"] for place in ("one", "two"))
    assert one["weights"] == two["weights"] and one["class_names"] == two["class_names"]
    assert two["thresholds"] == pytest.approx(one["thresholds"], abs=1e-3)


def test_the_loss_of_validation_is_scikit_learns(data, capsys):
    """Unweighted and unsmoothed, as it is said on the screen."""
    result = data(f"{CLASSES} --epochs=2 --class_weights=balanced --label_smoothing=0.1")
    assert "cross-entropy without label smoothing or class weights; train: " in result.out
    rows, _ = evaluated(capsys, "val")
    model, _ = inference.load_model(f"checkpoints/{BEST}")
    series = {f"{i + 1}": one for i, one in enumerate(np.load("classes.npz")["x"])}
    answers = inference.predict(model, [series[row["id"]] for row in rows])
    p = [list(answer["probabilities"].values()) for answer in answers]
    best = load_checkpoint(f"checkpoints/{BEST}")["epoch"]
    expected = log_loss([row["true"] for row in rows], p, labels=["a", "b", "c"])
    assert log_of(Path())[best - 1]["val_loss"] == pytest.approx(expected, rel=1e-5)
