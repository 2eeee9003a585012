"""Regression and multilabel, from the numbers of the model to the files of an evaluation."""

import csv
import io
import json
import signal
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics as reference
import torch
from hypothesis import given
from hypothesis import settings as options
from hypothesis import strategies as st
from running import ROOT, before_step, called
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import LinearRegression
from sklearn.utils.class_weight import compute_class_weight
from test_resume import assert_same_run

import evaluation
import inference
import plots
import train
from adapters import ImageAdapter, ImageDataset
from batches import collate
from checkpoint import BEST, LAST, load_checkpoint
from config import Settings
from inference import load_model, predict
from tasks import MultiLabel, Regression

DATA = ROOT / "tests" / "data" / "targets.jsonl"  # how often 'ping' and 'pong' stand in a text
MODEL = (
    "--model_size=tiny --d_model=16 --num_heads=2 --num_latents=4 --num_cross_attention_layers=1 "
    "--num_self_attention_layers=1"
)
TEXTS = f"--dataset=text --data_path={DATA} {MODEL} --amp=off --device=cpu --batch_size=8 --lr=5e-3"
FLAGS = {
    "number": f"{TEXTS} --task=regression --label_column=score",
    "numbers": f"{TEXTS} --task=regression --label_column=parts",
    "labels": f"{TEXTS} --task=multilabel --label_column=names --tune_thresholds --class_weights=balanced",
}
FIGURES = {
    "number": {"predicted_against_true.png", "residuals.png", "residual_histogram.png"},
    "labels": {"precision_recall.png", "precision_recall_curves.png", "calibration.png"},
}
FIGURES["numbers"] = FIGURES["number"]


# --- Metrics ---------------------------------------------------------------------------------------------------------


@options(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(1, 3), st.sampled_from([1.0, 1e9, 1e-9]), st.integers(0, 99))
def test_metrics_of_numbers_equal_scikit_learn(samples, count, scale, seed):
    rng = np.random.default_rng(seed)
    train_targets, true = rng.normal(3, 2, (20, count)) * scale, rng.normal(3, 2, (samples, count)) * scale
    predicted, std = true + rng.normal(0, scale, true.shape), train_targets.std(0)
    names = [f"n{k}" for k in range(count)]
    found = evaluation.regression_metrics(true, predicted, train_targets.mean(0), std, names)
    constant = DummyRegressor().fit(np.zeros((20, 1)), train_targets).predict(np.zeros((samples, 1)))
    functions = {
        "mae": reference.mean_absolute_error, "rmse": reference.root_mean_squared_error,
        "median_absolute_error": reference.median_absolute_error, "r2": reference.r2_score,
    }  # fmt: skip
    for prefix, answers in (("", predicted), ("baseline_", constant.reshape(true.shape))):
        for name, function in functions.items():
            expected = function(true, answers, multioutput="raw_values")
            ours = [row[prefix + name] for row in found["per_target"]]
            np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9 * scale)
            if count == 1:
                assert found[prefix + name] == ours[0]
    if count > 1:
        for name in ("mae", "rmse"):  # in standard deviations of training
            expected = functions[name]((true / std).ravel(), (predicted / std).ravel())
            assert found[name] == pytest.approx(expected, rel=1e-9)
        assert found["r2"] == pytest.approx(reference.r2_score(true, predicted), rel=1e-9)
    expected = reference.mean_squared_error((true / std).ravel(), (predicted / std).ravel())
    assert found["mean_squared_standardised_error"] == pytest.approx(expected, rel=1e-9)


def test_metrics_of_one_sample_are_numbers_or_none():
    found = evaluation.regression_metrics(np.array([[2.0]]), np.array([[3.0]]), [0.0], [1.0], ["a"])
    assert (found["rmse"], found["r2"], found["baseline_r2"], found["baseline_mae"]) == (1, None, None, 2)


@options(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 99))
def test_metrics_of_several_labels_equal_scikit_learn(samples, count, seed):
    rng = np.random.default_rng(seed)
    true = rng.random((samples, count)) < rng.random(count)  # some labels on no sample, some on all
    logits, thresholds = rng.normal(0, 2, true.shape), rng.uniform(0.2, 0.8, count)
    names = [f"n{k}" for k in range(count)]
    found = evaluation.multilabel_metrics(logits, true, thresholds, names)
    p = 1 / (1 + np.exp(-logits))
    predicted = p >= thresholds
    for k, row in enumerate(found["per_class"]):
        report = reference.precision_recall_fscore_support(
            true[:, k], predicted[:, k], labels=[True], zero_division=np.nan
        )
        ours = [row[name] for name in ("precision", "recall", "f1", "support")]
        np.testing.assert_allclose(np.array(ours, float), np.array(report, float)[:, 0])
        expected = reference.average_precision_score(true[:, k], p[:, k]) if true[:, k].any() else None
        assert row["average_precision"] == (expected if expected is None else pytest.approx(expected))
        assert (row["class"], row["threshold"]) == (names[k], thresholds[k])
    assert found["hamming_loss"] == pytest.approx(1 - reference.accuracy_score(true.ravel(), predicted.ravel()))
    assert found["subset_accuracy"] == pytest.approx((true == predicted).all(1).mean())
    assert found["binary_cross_entropy"] == pytest.approx(reference.log_loss(true.ravel(), p.ravel(), labels=[0, 1]))
    if count > 1:
        assert found["hamming_loss"] == pytest.approx(reference.hamming_loss(true, predicted))
        assert found["subset_accuracy"] == pytest.approx(reference.accuracy_score(true, predicted))
        if true.any() or predicted.any():
            assert found["micro_f1"] == pytest.approx(reference.f1_score(true, predicted, average="micro"))
        if (true.any(0) | predicted.any(0)).all():
            assert found["macro_f1"] == pytest.approx(reference.f1_score(true, predicted, average="macro"))
        if true.any(0).all():
            assert found["mean_average_precision"] == pytest.approx(reference.average_precision_score(true, p))


def test_labels_on_no_sample_are_undefined_and_left_out_of_means():
    true = np.array([[1, 0], [0, 0]], bool)
    found = evaluation.multilabel_metrics(np.array([[3.0, -3], [-3, -3]]), true, [0.5, 0.5], ["a", "b"])
    assert found["macro_f1"] == found["mean_average_precision"] == 1 and found["per_class"][1]["f1"] is None
    nothing = evaluation.multilabel_metrics(np.full((2, 1), -3.0), np.zeros((2, 1), bool), [0.5], ["a"])
    assert nothing["macro_f1"] is None is nothing["micro_f1"]


@pytest.mark.parametrize("seed", range(8))
def test_thresholds_are_those_of_the_highest_f1(seed):
    rng = np.random.default_rng(seed)
    true, p = rng.random((30, 3)) < 0.3, rng.random((30, 3))
    true[:, 2] = False
    best = evaluation.best_thresholds(p, true)
    assert best[2] == 0.5
    for k in range(2):
        every = [reference.f1_score(true[:, k], p[:, k] >= t) for t in [0.5, *p[:, k], *(p[:, k] + 1e-9)]]
        assert reference.f1_score(true[:, k], p[:, k] >= best[k]) == pytest.approx(max(every))


# --- Losses ----------------------------------------------------------------------------------------------------------


def test_the_loss_of_numbers_is_the_mean_square_of_standardised_errors():
    targets = np.array([[1.0, 1e9], [2, 3e9], [6, 2e9]])
    task = Regression(["a", "b"]).learn(targets, Settings())
    outputs = torch.tensor([[0.5, -1.0], [0, 1], [2, 0]])
    z = (targets - targets.mean(0)) / targets.std(0)
    expected = np.square(outputs.numpy() - z).mean(1).sum()
    assert task.objective(outputs, task.stack(targets), Settings()).item() == pytest.approx(expected, rel=1e-6)
    assert task.step_sums(outputs, task.stack(targets)).tolist() == pytest.approx([expected], rel=1e-6)


def test_the_loss_of_several_labels_is_weighted_by_scikit_learns_rule():
    targets = np.array([[1, 0], [0, 1], [0, 1], [1, 1], [0, 1]], np.float32)
    task = MultiLabel(["a", "b"]).learn(targets, Settings(task="multilabel", class_weights="balanced"))
    for k, pair in enumerate(task.weights):
        assert pair == pytest.approx(compute_class_weight("balanced", classes=np.array([0, 1]), y=targets[:, k]))
    logits = torch.linspace(-2, 2, 10).reshape(5, 2)
    p, weights = 1 / (1 + np.exp(-logits.numpy())), np.array(task.weights)
    of_each = -np.where(targets > 0, np.log(p) * weights[:, 1], np.log(1 - p) * weights[:, 0])
    found = task.objective(logits, torch.from_numpy(targets), Settings())
    assert found.item() == pytest.approx(of_each.mean(1).sum(), rel=1e-5)
    plain = -np.where(targets > 0, np.log(p), np.log(1 - p)).mean(1).sum()
    right = ((logits.numpy() > 0) == (targets > 0)).mean(1).sum()
    assert task.step_sums(logits, torch.from_numpy(targets)).tolist() == pytest.approx([plain, right], rel=1e-5)


def test_items_of_images_are_stacked_as_their_batches_are():
    """A ConcatDataset asks for items, a loader for batches: the targets are standardised once in both."""
    targets = np.array([[1.0], [2], [6]])
    task = Regression(["a"]).learn(targets, Settings())
    adapter = ImageAdapter.fit(np.arange(48, dtype=np.uint8).reshape(3, 4, 4, 1), 2)
    data = ImageDataset(np.arange(48, dtype=np.uint8).reshape(3, 4, 4, 1), targets, adapter, targets=task)
    assert [item["label"].tolist() for item in map(data.__getitem__, range(3))] == targets.tolist()
    batch, whole = collate([data[0], data[1], data[2]], targets=task), data.__getitems__([0, 1, 2])
    assert torch.equal(batch["label"], whole["label"]) and torch.equal(batch["input"], whole["input"])
    assert batch["label"].dtype == torch.float32 and abs(batch["label"].mean()) < 1e-6


# --- The commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FLAGS)
def trained(request, tmp_path_factory):
    """A run of three epochs: its kind, its folder, and what it printed."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with redirect_stdout(io.StringIO()) as printed:
            assert train.main(f"{FLAGS[request.param]} --epochs=3".split()) == 0
    return SimpleNamespace(kind=request.param, folder=folder, printed=printed.getvalue())


def infer(folder, *words):
    words = ["--model_path", folder / "checkpoints" / BEST, "--device", "cpu", *words]
    assert inference.main([str(word) for word in words]) == 0


def rows_of(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def results_of(folder):
    return json.loads((folder / "results.json").read_text(), parse_constant=lambda word: pytest.fail(word))


def test_an_evaluation_repeats_the_test_of_training_and_writes_all(trained, tmp_path, capsys):
    infer(trained.folder, "--analyze", "--output_dir", tmp_path)
    printed, results = capsys.readouterr().out, results_of(tmp_path)
    tested = load_checkpoint(trained.folder / "checkpoints" / LAST)["progress"]["test"]
    headline = "macro_f1" if trained.kind == "labels" else "rmse"
    assert results[headline] == pytest.approx(tested[headline], rel=1e-5)
    assert results["samples_as_in_training"] and results["num_samples"] == tested["num_samples"] >= 10
    more = {"attention.png", "latents.png", f"{'accuracy' if trained.kind == 'labels' else 'error'}_by_length.png"}
    assert set(results["figures"]) == FIGURES[trained.kind] | more
    assert all((tmp_path / name).stat().st_size > 5000 for name in results["figures"])
    if headline == "rmse":
        assert tested["baseline"] == pytest.approx(results["baseline_rmse"], rel=1e-6)
        assert f"{'rmse':<33}{results['rmse']:>10.4f}   baseline {results['baseline_rmse']:.4f}\n" in printed
    else:
        assert f"{'hamming loss':<33}{results['hamming_loss']:>10.4f}   baseline " in printed
        assert [row["class"] for row in results["per_class"]] == ["long", "ping", "pong"]


def test_the_metrics_can_be_computed_again_from_the_table_of_items(trained, tmp_path):
    infer(trained.folder, "--output_dir", tmp_path)
    rows, results = rows_of(tmp_path / "items.csv"), results_of(tmp_path)
    truth = {line["id"]: line for line in map(json.loads, DATA.read_text().splitlines())}
    if trained.kind == "labels":
        for row in rows:
            assert set(filter(None, row["true"].split(";"))) == set(truth[row["id"]]["names"])
        there = np.array([[name in row["true"].split(";") for name in ("long", "ping", "pong")] for row in rows])
        said = np.array([[name in row["predicted"].split(";") for name in ("long", "ping", "pong")] for row in rows])
        p = np.array([[float(row[f"probability {name}"]) for name in ("long", "ping", "pong")] for row in rows])
        thresholds = load_model(trained.folder / "checkpoints" / BEST)[0].task.thresholds
        assert (said == (p >= thresholds)).all()
        assert [row["threshold"] for row in results["per_class"]] == thresholds
        assert results["hamming_loss"] == pytest.approx(reference.hamming_loss(there, said))
    else:
        names = [""] if trained.kind == "number" else [" parts 1", " parts 2"]
        for k, name in enumerate(names):
            true = [float(row[f"true{name}"]) for row in rows]
            answers = [truth[row["id"]]["score" if trained.kind == "number" else "parts"] for row in rows]
            assert true == (answers if trained.kind == "number" else [pair[k] for pair in answers])
            predicted = [float(row[f"predicted{name}"]) for row in rows]
            expected = reference.root_mean_squared_error(true, predicted)
            assert results["per_target"][k]["rmse"] == pytest.approx(expected, rel=1e-5)


def test_any_batch_size_and_bf16_give_the_same(trained, tmp_path):
    for name, words in {"1": ["--batch_size=1"], "7": ["--batch_size=7"], "bf16": ["--amp=bf16"]}.items():
        infer(trained.folder, *words, "--output_dir", tmp_path / name)
    first, other, bf16 = (results_of(tmp_path / name) for name in ("1", "7", "bf16"))
    for name, value in first.items():
        if isinstance(value, float):
            assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    loss = "binary_cross_entropy" if trained.kind == "labels" else "mean_squared_standardised_error"
    assert bf16[loss] == pytest.approx(first[loss], rel=0.1)


def test_new_items_are_answered_as_in_the_notebook(trained, tmp_path):
    """--input, of a file with labels in it, which are not looked at."""
    lines = [json.loads(line) for line in DATA.read_text().splitlines()][:9]
    for line in lines:
        line["score"] = line["parts"] = line["names"] = {"no": "label"}
    path = tmp_path / "new.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    infer(trained.folder, "--input", path, "--output_dir", tmp_path)
    rows = rows_of(tmp_path / "predictions.csv")
    model, _ = load_model(trained.folder / "checkpoints" / BEST)
    answers = predict(model, [line["text"] for line in lines], batch_size=2)
    assert [row["id"] for row in rows] == [line["id"] for line in lines]
    for row, answer in zip(rows, answers, strict=True):
        if trained.kind == "labels":
            assert row["labels"].split(";") == (answer["labels"] or [""])
            for name, share in answer["probabilities"].items():
                assert float(row[f"probability {name}"]) == pytest.approx(share, abs=1e-5)
        else:
            names = ["score"] if trained.kind == "number" else ["parts 1", "parts 2"]
            assert list(row) == ["id", *names] and list(answer["values"]) == names
            assert answer["value"] == answer["values"][names[0]]
            for name, std in zip(names, model.task.std, strict=True):
                assert float(row[name]) == pytest.approx(answer["values"][name], abs=1e-5 * std)


def test_another_labelled_set_is_evaluated(trained, tmp_path, capsys):
    lines = DATA.read_text().splitlines()[:5]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    infer(trained.folder, "--test_path", tmp_path / "test.jsonl", "--output_dir", tmp_path)
    assert results_of(tmp_path)["num_samples"] == 5
    column = {"number": "score", "numbers": "parts", "labels": "names"}[trained.kind]
    bad = {"number": "five", "numbers": [1, "five"], "labels": ["ping", "pang"]}[trained.kind]
    lines[3] = json.dumps(json.loads(lines[3]) | {column: bad})
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    with pytest.raises(SystemExit) as stopped:
        infer(trained.folder, "--test_path", tmp_path / "test.jsonl", "--output_dir", tmp_path)
    wrong = "'pang' does not occur in the training data" if trained.kind == "labels" else "'five' is not a number"
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"error: {tmp_path / 'test.jsonl'}, line 4: label {wrong}" in error


def test_what_training_shows(trained):
    lines = trained.printed.splitlines()
    data = next(line for line in lines if line.startswith("data "))
    last = next(line for line in lines if line.startswith("best epoch"))
    if trained.kind == "number":
        assert "1 number (score, in training " in data and "the training mean as answer: " in last
    elif trained.kind == "numbers":
        assert "2 numbers (parts 1, parts 2); rmse and mae of all in units of their standard deviations" in data
    else:
        assert "3 labels, any number of them on an item" in data and "test macro f1 " in last
    assert (trained.folder / "checkpoints" / "training_curves.png").stat().st_size > 5000


@pytest.mark.parametrize("kind", FLAGS)
def test_a_stopped_run_ends_as_the_unbroken_one(kind, run, monkeypatch, tmp_path):
    flags = f"{FLAGS[kind]} --epochs=2 --dropout=0.3 --ema_decay=0.5 --save_every=2 --accumulation_steps=2 --amp=bf16"
    for name in ("unbroken", "stopped"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with monkeypatch.context() as patch:
            if name == "stopped":
                before_step(patch, 9, lambda: signal.raise_signal(signal.SIGTERM))  # in the second epoch
            assert run(flags).status == (143 if name == "stopped" else 0)
    assert run("--resume").status == 0
    assert_same_run(tmp_path / "unbroken", tmp_path / "stopped")


@pytest.mark.parametrize("labels, says", [
    ([5] * 30, "label is 5 in all 22 training samples, so there is nothing to learn"),
    ([[n, 5] for n in range(30)], "label 2 is 5 in all 22 training samples"),
])  # fmt: skip
def test_constant_numbers_are_refused(run, tmp_path, labels, says):
    lines = [json.dumps({"text": f"text {n}", "label": label}) for n, label in enumerate(labels)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = run(f"--dataset=text --data_path=a.jsonl --task=regression --epochs=1 {MODEL}")
    assert found.status == 2 and found.err.startswith("error: ") and says in found.err


def test_the_same_labels_on_all_are_refused(run, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"text {n},a;b\n" for n in range(30)))
    found = run(f"--dataset=text --data_path=a.csv --task=multilabel --epochs=1 {MODEL}")
    assert found.status == 2 and "all 22 training samples have the same labels; nothing can be learnt" in found.err


# --- Figures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been written, to look into."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    return figures


@pytest.mark.parametrize("values, unit, shown", [
    ([1.0, -2, 3], "", [1, -2, 3]), ([1e9, -2e9, 3e9], " [1e9]", [1, -2, 3]), ([1e-9, 2e-9], " [1e-9]", [1, 2]),
    ([1e9, 1e9 + 4, 1e9 + 9], " − 1000000000", [0, 4, 9]), ([0.0, 0, 0], "", [0, 0, 0]),
])  # fmt: skip
def test_numbers_are_drawn_in_a_unit_that_can_be_read(drawn, values, unit, shown):
    values = np.array(values)[:, None]
    plots.plot_predicted_against_true(values, values, ["price"], "unused")
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == f"true{unit}" and axes.get_title(loc="left") == "price"
    np.testing.assert_allclose(axes.collections[0].get_offsets()[:, 0], shown, atol=1e-6)
    diagonal = axes.lines[0]
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == list(axes.get_xlim()) == list(axes.get_ylim())


def test_residuals_are_what_the_prediction_is_above_the_truth(drawn):
    true, predicted = np.array([[1.0, 5], [2, 5], [3, 8]]), np.array([[2.0, 5], [2, 5], [1, 9]])
    plots.plot_residuals(true, predicted, ["a", "b"], "unused")
    assert drawn[0].axes[0].collections[0].get_offsets().tolist() == [[2, 1], [2, 0], [1, -2]]
    plots.plot_residual_histogram(true, predicted, ["a", "b"], "unused")
    first, second = drawn[1].axes
    assert sum(bar.get_height() for bar in first.patches) == 3 and first.get_title(loc="left") == "a: median 0"
    assert second.get_xlabel() == "predicted − true"


@pytest.mark.parametrize("count", [1, 3, 5, 40])
def test_figures_of_any_number_of_answers(tmp_path, count):
    rng = np.random.default_rng(0)
    names = [f"a name that goes on and on, number {k}" for k in range(count)]
    true = rng.random((50, count)) < 0.3
    true[:, -1] = False  # on no sample
    logits = rng.normal(0, 2, true.shape)
    task = MultiLabel(names)
    figures = task.figures({"true": true, "logit": logits, "finite": np.ones(50, bool)})
    if count <= 5:
        numbers = Regression(names, [0.0] * count, [1.0] * count)
        figures |= numbers.figures({"true": logits * 1e9, "predicted": logits * 1e9 + 1e8})
    for name, draw in figures.items():
        draw(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000


def test_curves_show_the_average_precision_and_the_threshold(drawn):
    true, p = np.array([[1], [0], [1], [0]], bool), np.array([[0.9], [0.8], [0.7], [0.1]])
    plots.plot_precision_recall_curves(p, true, [0.75], ["a"], "unused")
    (axes,) = drawn[0].axes
    assert axes.get_legend_handles_labels()[1] == [f"a ({reference.average_precision_score(true[:, 0], p[:, 0]):.3f})"]
    assert [line.get_xydata().tolist() for line in axes.lines][1] == [[0.5, 0.5]]


def test_an_undefined_score_is_no_worse_than_false_alarms():
    """Of validation data without a positive: none found is right, so the loss decides among such epochs."""
    task = MultiLabel(["a", "b"])
    true = np.zeros((4, 2), bool)

    def score(logit):
        rows = {"true": true, "logit": np.full((4, 2), logit), "finite": np.ones(4, bool)}
        return task.score(task.epoch_figures(task.metrics(rows), None), None)

    assert score(-2.0) > score(-1.0) > score(1.0)


# --- A known answer --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_linear_answer_is_found(tmp_path, monkeypatch, capsys):
    """A weighted mean over the steps of a series, 100 ± 23, under noise of 2: a linear model that is told the means of
    the channels makes an error of 2.05 on the test items. Ours, told nothing, made 2.28."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 8, 3))
    y = 100 + 10 * np.sqrt(8) * x.mean(1) @ [2, -1, 0.5] + rng.normal(0, 2, 600)
    np.savez("linear.npz", x=x, y=y)
    flags = "--dataset=sequences --task=regression --data_path=linear.npz --epochs=40 --amp=off --device=cpu"
    assert called(capsys, train.main, flags.split()).status == 0
    result = called(capsys, inference.main, [f"--model_path=checkpoints/{BEST}", "--device=cpu"])
    assert result.status == 0, result.err
    with open("results/items.csv", newline="", encoding="utf-8-sig") as file:
        test = [int(row["id"]) - 1 for row in csv.DictReader(file)]  # series are numbered from 1
    rest = np.setdiff1d(np.arange(600), test)
    linear = LinearRegression().fit(x[rest].mean(1), y[rest]).predict(x[test].mean(1))
    results = json.loads((tmp_path / "results/results.json").read_text())
    assert results["rmse"] < 1.25 * np.sqrt(np.mean((linear - y[test]) ** 2))
    assert results["baseline_rmse"] == pytest.approx(np.std(y[test]), rel=0.05)
