"""evaluation.py and plots.py: metrics against scikit-learn and plain computations, results.json, figures."""

import csv
import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference
from torch import nn

import evaluation as ev
import messages
import plots
from tables import read_table
from tasks import Classification

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("error")


def made_up(samples, classes, skill=2.0, seed=0):
    """Logits that favour the label, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, samples)
    logits = rng.normal(size=(samples, classes))
    logits[np.arange(samples), labels] += skill
    return logits.astype(np.float32), labels


def names(classes):
    return [f"class {i}" for i in range(classes)]


TASK = Classification(names(4))


def rows_of(logits, labels, lengths=None):
    """What `collect` gives of these logits."""
    tokens = np.ones(len(labels), int) if lengths is None else lengths
    return {**ev.class_rows(np.asarray(logits), labels), "tokens": tokens}


def items_of(rows, ids, class_names, split=""):
    return ev.item_rows(ids, split, Classification(class_names).items(rows), rows["tokens"])


class Toy(nn.Module):
    """A masked mean and a linear layer; remembers the masks that it was given."""

    def __init__(self):
        super().__init__()
        self.dropout, self.frozen, self.linear = nn.Dropout(0.5), nn.Dropout(0.5).eval(), nn.Linear(3, 4)
        self.masks = []

    def pooled_latents(self, x, mask=None):
        assert not self.training and torch.is_inference_mode_enabled()
        self.masks.append(mask)
        weight = torch.ones(x.shape[:2]) if mask is None else mask.float()
        return (x * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)

    def forward(self, x, mask=None, return_attention=False):
        logits = self.linear(self.frozen(self.dropout(self.pooled_latents(x, mask))))
        return (logits, [torch.ones(len(x), 2, 5, x.shape[1]) / x.shape[1]]) if return_attention else logits


def batches(batch_size, lengths=(5, 3, 5, 5, 1, 4, 5)):
    """Seven samples, padded to the longest of their batch."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(length, 3, generator=generator) for length in lengths]
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        inputs = nn.utils.rnn.pad_sequence(part, batch_first=True)
        mask = torch.arange(inputs.shape[1]) < torch.tensor([[len(x)] for x in part])
        yield {"input": inputs, "mask": mask, "label": torch.arange(start, start + len(part)) % 4}


# ------------------------------------------------------------------------------ one pass over the data


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_predictions_do_not_depend_on_the_batch_size(batch_size):
    model = Toy()
    expected, found = ev.collect(model, batches(3), TASK), ev.collect(model, batches(batch_size), TASK)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], atol=1e-6)
    np.testing.assert_array_equal(found["label"], [0, 1, 2, 3, 0, 1, 2])
    np.testing.assert_array_equal(found["tokens"], [5, 3, 5, 5, 1, 4, 5])
    assert found["label"].dtype == found["tokens"].dtype == np.int64
    latents = torch.from_numpy(ev.collect_latents(model, batches(batch_size)))
    logits = model.linear(latents).detach().numpy()
    again = ev.class_rows(logits, found["label"])
    np.testing.assert_allclose(again["confidence"], expected["confidence"], atol=1e-5)


def test_the_mode_of_each_module_is_restored_even_after_an_error():
    model = Toy().train()
    model.frozen.eval()

    def broken():
        yield next(batches(2))
        raise RuntimeError("disk gone")

    ev.collect(model, batches(2), TASK)
    with pytest.raises(RuntimeError, match="disk gone"):
        ev.collect(model, broken(), TASK)
    assert model.training and model.dropout.training and not model.frozen.training
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_a_batch_of_full_length_is_run_without_mask():
    model = Toy()
    ev.collect(model, batches(1), TASK)
    assert model.masks == [None] * 7
    ev.collect(model, batches(7), TASK)
    assert model.masks[-1].shape == (7, 5)


def test_an_empty_loader_is_an_error_and_reduced_precision_gives_float32():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        ev.collect(Toy(), [], TASK)
    model = Toy()
    seen = []

    class Watching(Classification):
        def rows(self, outputs, targets):
            seen.append(outputs)
            return super().rows(outputs, targets)

    for dtype in (torch.bfloat16, None):
        ev.collect(model, batches(7), Watching(TASK.class_names), amp_dtype=dtype)
    low, full = seen
    assert low.dtype == torch.float32 and (low != full).any()
    np.testing.assert_allclose(low, full, atol=0.05)


def test_attention_is_collected_per_cross_attend():
    (weights,) = ev.collect_attention(Toy(), next(batches(3)))
    assert weights.shape == (3, 2, 5, 5) and weights.dtype == np.float32


# --------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(("samples", "classes"), [(30, 2), (300, 10), (2000, 100)])
def test_metrics_equal_scikit_learn(samples, classes):
    logits, labels = made_up(samples, classes)
    found = ev.compute_metrics(logits, labels, names(classes))
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    predicted, every = logits.argmax(1), range(classes)
    assert found["num_samples"] == samples and found["num_classes"] == classes
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(labels, predicted))
    assert found["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(reference.f1_score(labels, predicted, average="macro"))
    assert found["negative_log_likelihood"] == pytest.approx(reference.log_loss(labels, p, labels=every))
    assert found["majority_baseline"] == pytest.approx(np.bincount(labels).max() / samples)
    for k in (3, 5):
        if k < classes:
            expected = reference.top_k_accuracy_score(labels, p, k=k, labels=every)
            assert found[f"top_{k}_accuracy"] == pytest.approx(expected)
        else:
            assert f"top_{k}_accuracy" not in found
    np.testing.assert_array_equal(found["confusion_matrix"], reference.confusion_matrix(labels, predicted))
    for name, score in (("precision", reference.precision_score), ("recall", reference.recall_score)):
        expected = score(labels, predicted, average=None, labels=every, zero_division=np.nan)
        np.testing.assert_allclose([row[name] for row in found["per_class"]], expected)
    assert [row["support"] for row in found["per_class"]] == np.bincount(labels, minlength=classes).tolist()


def test_metrics_are_computed_in_float64_whatever_the_logits_are():
    """Sums of 20,000 probabilities, to more digits than float32 has."""
    logits, labels = made_up(20_000, 7, seed=4)
    logits = logits.astype(np.float32)
    exact = logits.astype(np.longdouble)
    log_p = exact - np.log(np.exp(exact).sum(1, keepdims=True))
    found = ev.compute_metrics(logits, labels, names(7))
    assert found["negative_log_likelihood"] == pytest.approx(float(-log_p[np.arange(20_000), labels].mean()), rel=1e-12)
    assert found["mean_confidence"] == pytest.approx(float(np.exp(log_p).max(1).mean()), rel=1e-12)
    one_hot = np.eye(7)[labels]
    assert found["brier_score"] == pytest.approx(float(((np.exp(log_p) - one_hot) ** 2).sum(1).mean()), rel=1e-12)


def test_brier_score_and_calibration_error_equal_a_loop_over_samples():
    logits, labels = made_up(200, 4, seed=3)
    brier, bins = 0.0, {}
    for row, label in zip(logits.astype(float).tolist(), labels.tolist(), strict=True):
        total = sum(np.exp(value) for value in row)
        p = [np.exp(value) / total for value in row]
        brier += sum((value - (c == label)) ** 2 for c, value in enumerate(p)) / len(labels)
        bins.setdefault(int(np.ceil(max(p) * 15)), []).append((max(p), p.index(max(p)) == label))
    error = sum(abs(sum(conf - right for conf, right in rows)) for rows in bins.values()) / len(labels)
    found = ev.compute_metrics(logits, labels, names(4))
    assert found["brier_score"] == pytest.approx(brier)
    assert found["expected_calibration_error"] == pytest.approx(error)


def test_imbalanced_data_shows_that_only_the_majority_is_predicted():  # R26
    labels = np.array([0] * 90 + [1] * 10)
    found = ev.compute_metrics(np.tile([3.0, 0.0], (100, 1)), labels, ["common", "rare"])
    assert found["accuracy"] == found["majority_baseline"] == 0.9
    assert found["balanced_accuracy"] == 0.5
    rare = found["per_class"][1]
    assert rare == {"class": "rare", "precision": None, "recall": 0.0, "f1": 0.0, "support": 10}


def test_absent_classes_keep_their_rows_and_names():  # R44
    labels, predicted = np.array([0, 2, 2, 0]), np.array([0, 2, 1, 0])
    found = ev.compute_metrics(np.eye(4)[predicted], labels, ["a", "b", "c", "d"])
    assert found["confusion_matrix"] == [[2, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    a, b, c, d = found["per_class"]
    assert [row["class"] for row in (a, b, c, d)] == ["a", "b", "c", "d"]
    assert (b["support"], b["precision"], b["recall"], b["f1"]) == (0, 0.0, None, 0.0)
    assert (c["support"], c["precision"], c["recall"]) == (2, 1.0, 0.5)
    assert d == {"class": "d", "precision": None, "recall": None, "f1": None, "support": 0}
    assert found["balanced_accuracy"] == 0.75  # classes a and c
    assert found["macro_f1"] == pytest.approx((1 + 0 + 2 / 3) / 3)  # classes a, b and c


def test_top_k_breaks_ties_as_argmax_does():
    found = ev.compute_metrics(np.zeros((6, 6)), np.arange(6), names(6), top_k=(1, 3, 6))
    assert found["top_1_accuracy"] == found["accuracy"] == pytest.approx(1 / 6)
    assert found["top_3_accuracy"] == 0.5 and "top_6_accuracy" not in found


def test_extreme_logits_and_a_single_sample_give_finite_numbers():
    found = ev.compute_metrics(np.array([[1e4, -1e4, 0.0]], dtype=np.float32), np.array([1]), names(3))
    assert found["negative_log_likelihood"] == 2e4 and found["brier_score"] == 2.0
    assert found["expected_calibration_error"] == found["mean_confidence"] == 1.0


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((3, 4)), [0, 1, 2], r"\(3, 4\).*5 class names"),
        (np.zeros((3, 5)), [0, 1], r"\(3, 5\) and labels \(2,\)"),
        (np.zeros((0, 5)), [], r"N > 0"),
        (np.zeros((3, 5)), [0, 1, 5], "from 0 to 5; expected 0 to 4"),
        (np.zeros((2, 5)), [-1, 1], "from -1 to 1"),
        (np.array([[0, 0, np.nan, 0, 0], [0] * 5]), [1, 1], "1 of 2 samples are not finite"),
    ],
)
def test_wrong_input_is_named(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        ev.compute_metrics(logits, np.array(labels), names(5))


def test_reliability_table_holds_every_sample_once():
    confidence = np.array([0.0, 1 / 15, 0.2, 0.2001, 0.99, 1.0])
    correct = np.array([False, True, True, False, True, False])
    table = ev.reliability_table(confidence, correct)
    assert [row["count"] for row in table] == [2, 0, 1, 1] + [0] * 10 + [2]
    assert table[0]["accuracy"] == 0.5 and table[14]["confidence"] == pytest.approx(0.995)
    assert table[1]["accuracy"] is None and (table[1]["low"], table[1]["high"]) == (1 / 15, 2 / 15)


def test_accuracy_by_length_covers_all_samples_in_order():
    rng = np.random.default_rng(0)
    lengths, correct = rng.integers(50, 201, 500), rng.random(500) < 0.7
    rows = ev.by_length(lengths, accuracy=correct)
    assert len(rows) == 8 and sum(row["count"] for row in rows) == 500
    assert all(a["longest"] < b["shortest"] for a, b in zip(rows, rows[1:], strict=False))
    for row in rows:
        inside = (lengths >= row["shortest"]) & (lengths <= row["longest"])
        assert row["count"] == inside.sum() and row["accuracy"] == pytest.approx(correct[inside].mean())
    assert ev.by_length(np.full(9, 16), accuracy=np.ones(9, bool)) == []
    short, long = ev.by_length(np.array([1, 100]), accuracy=np.array([True, False]))
    assert (short["count"], short["accuracy"], long["count"], long["accuracy"]) == (1, 1.0, 1, 0.0)


def test_most_confident_mistakes_come_first():
    task = Classification(["no", "yes"])
    rows = rows_of(np.log(np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])), np.array([0, 0, 1, 1]))
    assert task.worst(rows).tolist() == [1, 2]
    items = items_of(rows, ["a", "b", "c", "d"], task.class_names)
    first, second = task.analysis(rows, items)["most_confident_mistakes"]
    assert first == {"id": "b", "true": "no", "predicted": "yes"} | {
        "confidence": pytest.approx(0.8), "probability_of_true": pytest.approx(0.2)
    }  # fmt: skip
    assert second["id"] == "c"
    assert len(Classification(names(5)).worst(rows_of(*made_up(300, 5, skill=0)), limit=7)) == 7


# ------------------------------------------------------------------------------------------- items.csv


@pytest.mark.parametrize(("samples", "classes", "skill"), [(400, 7, 2.0), (50, 2, 1.0), (30, 4, 40.0)])
def test_every_figure_can_be_computed_again_from_the_table_of_items(tmp_path, samples, classes, skill):
    """With pandas and scikit-learn from the file alone; also where a probability is 1 to the last digit."""
    logits, labels = made_up(samples, classes, skill)
    logits[:5] = logits[0, 0]  # ties
    lengths = np.random.default_rng(3).integers(1, 40, samples)
    class_names = [f"class {i}" for i in range(classes)]
    results = ev.compute_metrics(logits, labels, class_names)
    rows = rows_of(logits, labels, lengths)
    items = items_of(rows, [f"i{n}.png" for n in range(samples)], class_names, "test")
    analysis = Classification(class_names).analysis(rows, items)
    ev.save_evaluation(tmp_path, results, items, {})
    table = pandas.read_csv(tmp_path / "items.csv")
    assert list(table.id) == [f"i{n}.png" for n in range(samples)] and set(table.split) == {"test"}

    true, predicted = table.true, table.predicted
    right = true == predicted
    matrix = reference.confusion_matrix(true, predicted, labels=class_names)
    report = reference.classification_report(
        true, predicted, labels=class_names, output_dict=True, zero_division=np.nan
    )
    expected = {
        "num_samples": len(table),
        "accuracy": right.mean(),
        "balanced_accuracy": np.nanmean([report[name]["recall"] for name in class_names]),
        "macro_f1": np.nanmean([report[name]["f1-score"] for name in class_names]),
        "majority_baseline": true.value_counts().max() / len(table),
        "negative_log_likelihood": table.negative_log_likelihood.mean(),
        "brier_score": table.brier_score.mean(),
        "mean_confidence": table.confidence.mean(),
        **{f"top_{k}_accuracy": (table.rank_of_true <= k).mean() for k in (3, 5) if k < classes},
    }
    bins = np.ceil(table.confidence * 15).clip(1, 15)
    gaps = [abs(right[bins == n].mean() - table.confidence[bins == n].mean()) * (bins == n).mean() for n in set(bins)]
    expected["expected_calibration_error"] = sum(gaps)
    for name, value in expected.items():
        assert results[name] == pytest.approx(value, abs=1e-12), name
    assert results["confusion_matrix"] == matrix.tolist()
    assert set(results) == set(expected) | {"num_classes", "per_class", "confusion_matrix"}
    for row in results["per_class"]:
        found = report[row["class"]]
        assert row["support"] == found["support"]
        for name, key in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert row[name] == pytest.approx(found[key]) or (row[name] is None and np.isnan(found[key]))
    for row in analysis["accuracy_by_length"]:
        inside = table.tokens.between(row["shortest"], row["longest"])
        assert row["count"] == inside.sum() and row["accuracy"] == pytest.approx(right[inside].mean())
    wrong = table[~right].sort_values("confidence", ascending=False, kind="stable")[:16]
    assert [row["id"] for row in analysis["most_confident_mistakes"]] == list(wrong.id)
    assert ((table.probability_of_true > 0) == (np.exp(-table.negative_log_likelihood) > 0)).all()
    np.testing.assert_allclose(table.probability_of_true, np.exp(-table.negative_log_likelihood), rtol=1e-12)
    assert (table.confidence >= table.probability_of_true).all() and ((table.rank_of_true == 1) == right).all()


FORMULAS = ["=1+1", '=HYPERLINK("http://x","y")', "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "\r=1", "\n=1",
            " =1", "'=1", "''+a", "\uff1d1+1", "-", "=", "@me, you"]  # fmt: skip
HARMLESS = ["a=1", "-1", "+1.5e-3", "'", "'a", "1-2", "", "x@y.z", "'1", "3"]


@pytest.mark.parametrize("cell", FORMULAS + HARMLESS)
def test_no_cell_is_run_by_a_spreadsheet_and_all_are_read_back(tmp_path, cell):
    for columns in messages.OUR_TABLES:
        rows = [dict.fromkeys(columns, cell) | {"more": "x"}] * 2
        ev.write_rows(tmp_path / "a.csv", rows)
        with open(tmp_path / "a.csv", encoding="utf-8-sig", newline="") as file:
            _, *stored = csv.reader(file)
        assert all(row[0] == ("'" + cell if cell in FORMULAS else cell) for row in stored)
        if cell.strip():
            table = read_table(tmp_path / "a.csv")
            assert [table.column(name) for name in columns] == [[cell] * 2] * len(columns)
    (tmp_path / "own.csv").write_text('text,label\n"\'=1",a\n')
    assert read_table(tmp_path / "own.csv").column("text") == ["'=1"]  # a text of the user's stays as it is


@given(st.text(min_size=1))
def test_any_text_comes_back_from_a_cell(text):
    assert messages.from_spreadsheet_cell(messages.spreadsheet_cell(text)) == text


def test_tables_have_a_byte_order_mark_where_excel_needs_it(tmp_path):
    row = dict.fromkeys(messages.OUR_TABLES[1], "a")
    ev.write_rows(tmp_path / "a.csv", [row])
    assert (tmp_path / "a.csv").read_bytes() == b"id,class,confidence\r\na,a,a\r\n"
    ev.write_rows(tmp_path / "b.csv", [row | {"class": "부정"}])
    assert (tmp_path / "b.csv").read_bytes() == b"\xef\xbb\xbf" + "id,class,confidence\r\na,부정,a\r\n".encode()
    assert read_table(tmp_path / "b.csv").column("class") == ["부정"]
    assert list(pandas.read_csv(tmp_path / "b.csv")) == list(row)


# ---------------------------------------------------------------------------------------- results.json


def strict(path):
    def fail(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=fail)


def test_results_are_strict_json(tmp_path):  # R47
    path = tmp_path / "new" / "results.json"
    tricky = 'a [ 1,\n 2 ] "quoted" 고양이'
    ev.write_results(path, {
        "nan": float("nan"), "inf": np.float32(np.inf), "f": np.float32(0.5), "i": np.int64(3), "b": np.True_,
        "array": np.array([[1.0, np.nan], [2.0, 3.0]]), "rows": [{"names": [tricky, "b"]}], "empty": [],
        "t": (1, 2),
    })  # fmt: skip
    assert strict(path) == {
        "nan": None, "inf": None, "f": 0.5, "i": 3, "b": True, "array": [[1.0, None], [2.0, 3.0]],
        "rows": [{"names": [tricky, "b"]}], "empty": [], "t": [1, 2],
    }  # fmt: skip
    assert "[ 2.0, 3.0 ]" in path.read_text(encoding="utf-8")  # a row of a matrix is one line


def test_results_of_a_one_class_subset_are_strict_json(tmp_path):  # R47
    ev.write_results(tmp_path / "r.json", ev.compute_metrics(np.eye(3)[[0, 0]], np.array([0, 0]), names(3)))
    assert [row["recall"] for row in strict(tmp_path / "r.json")["per_class"]] == [1.0, None, None]


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    ev.write_results(path, {"accuracy": 1.0})
    with pytest.raises(TypeError):
        ev.write_results(path, {"accuracy": object()})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        ev.write_results(path, {"accuracy": 0.0})
    assert strict(path) == {"accuracy": 1.0} and list(tmp_path.iterdir()) == [path]


def test_a_failed_figure_loses_nothing_and_is_reported(tmp_path):  # R45, R47
    def broken(path):
        assert strict(path.parent / "results.json") == {"accuracy": 0.5}  # results come first
        raise RuntimeError("no ink")

    (tmp_path / "bad.png").write_text("the picture of an earlier run")
    figures = {"bad.png": broken, **Classification(names(3)).figures(rows_of(*made_up(30, 3)))}
    with pytest.raises(ExceptionGroup, match="bad.png") as caught:
        ev.save_evaluation(tmp_path, {"accuracy": 0.5}, [{"id": "a"}], figures)
    (error,) = caught.value.exceptions
    assert str(error) == "no ink" and "bad.png" in error.__notes__[0] and error.__traceback__ is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "confidence_analysis.png", "confidence_histogram.png", "confusion_matrix.png", "items.csv", "results.json",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------- figures


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been written, to look into."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    return figures


@pytest.mark.parametrize("top, white", [(60, 255), (255, 255), (16, 16), (1, 1)])
def test_mistakes_show_the_item_as_bright_as_it_is(drawn, top, white):
    plots.plot_mistakes(np.full((1, 4, 4, 1), top), [["cat.png", "true cat", "confidence 98.8%"]], "unused")
    axes = drawn[0].axes[0]
    assert axes.get_title(loc="left") == "cat.png\ntrue cat\nconfidence 98.8%"
    shown = axes.images[0]
    assert shown.get_array().max() == pytest.approx(top / white) and shown.get_clim() == (0, 1)


@pytest.mark.parametrize("classes", [2, 10, 20, 21, 100])
def test_confusion_matrix_is_annotated_in_every_cell_or_not_at_all(classes):  # R45
    matrix = np.arange(classes**2).reshape(classes, classes)
    figure = plots.confusion_matrix_figure(matrix, names(classes))
    axes = figure.axes[0]
    texts = [text.get_text() for text in axes.texts]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    if classes <= 20:
        assert texts == [str(i) for i in matrix.ravel()] and labels == names(classes)
    else:
        assert texts == [] and len(labels) <= 50 and set(labels) <= set(names(classes))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    width, height = figure.get_size_inches()
    assert 3 < height < width < 12 and width / height < 1.5


def test_confusion_matrix_of_absent_classes_and_awkward_names():
    matrix = [[2, 0, 0], [0, 0, 0], [0, 1, 1]]
    stem = "a very long name of a class, the same as "
    figure = plots.confusion_matrix_figure(matrix, [stem + "one", stem + "two", "$x_{"])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == list("200000011")
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(labels)) == 3 and max(map(len, labels)) <= 21 and labels[0].endswith("one")
    figure.canvas.draw()  # "$x_{" is not taken for mathematics
    axes = plots.confusion_matrix_figure(np.eye(2, dtype=int), ["start " + "x" * 40 + " end"] * 2).axes[0]
    assert len({label.get_text() for label in axes.get_yticklabels()}) == 2


def test_tensorboard_takes_the_confusion_matrix(tmp_path):
    from torch.utils.tensorboard._utils import figure_to_image

    image = figure_to_image(plots.confusion_matrix_figure(np.eye(3, dtype=int), names(3)))
    assert image.shape[0] == 3 and min(image.shape[1:]) > 200 and image.std() > 10


def test_confidence_figures_show_their_numbers(drawn):
    logits, labels = made_up(500, 4)
    metrics = ev.compute_metrics(logits, labels, names(4))
    for draw in TASK.figures(rows_of(logits, labels)).values():
        draw("unused")
    _, histogram, analysis = drawn
    right, wrong = histogram.axes
    counts = [sum(bar.get_height() for bar in axes.patches) for axes in (right, wrong)]
    assert counts == pytest.approx([metrics["accuracy"] * 500, 500 - metrics["accuracy"] * 500])
    assert right.get_title(loc="left").startswith("Right") and "confidence" in wrong.get_xlabel()
    diagram, bins, coverage = analysis.axes
    assert f"{metrics['expected_calibration_error']:.3f}" in diagram.get_title(loc="left")
    assert sum(int(text.get_text()) for text in bins.texts) == 500
    answered, accuracy = coverage.lines[0].get_data()
    assert answered[-1] == 1 and accuracy[-1] == pytest.approx(metrics["accuracy"])


def test_equally_confident_samples_are_answered_together(drawn):
    confidence, correct = np.array([0.9, 0.5, 0.9, 0.5]), np.array([True, True, False, False])
    table = ev.reliability_table(confidence, correct)
    plots.plot_confidence_analysis(table, ev.calibration_error(table), confidence, correct, "unused")
    answered, accuracy = drawn[0].axes[2].lines[0].get_data()
    assert answered.tolist() == [0.5, 1.0] and accuracy.tolist() == [0.5, 0.5]


def test_sequence_attention_leaves_padding_out(drawn):
    rng = np.random.default_rng(0)
    masks = np.arange(9) < np.array([[9], [4]])
    attention = [rng.random((2, 2, 6, 9)) for _ in range(2)]
    plots.plot_sequence_attention(rng.normal(size=(2, 9, 12)), masks, attention, ["one", "two"], "unused")
    panels = [axes for axes in drawn[0].axes if axes.get_label() != "<colorbar>"]
    shapes = sorted(axes.images[0].get_array().shape for axes in panels)
    assert shapes == [(6, 4), (6, 4), (6, 9), (6, 9), (12, 4), (12, 9)]
    shown = next(axes for axes in panels if axes.images[0].get_array().shape == (6, 4)).images[0].get_array()
    expected = 4 * attention[0][1].mean(0)[:, :4]
    np.testing.assert_allclose(np.sort(shown.data, axis=0), np.sort(expected, axis=0))
    assert (np.diff(shown.argmax(1)) >= 0).all()


def test_image_attention_lies_over_the_image(drawn):
    attention = [np.random.default_rng(0).dirichlet(np.ones(8), size=(1, 2, 5))]
    plots.plot_image_attention(np.full((1, 8, 16, 3), 200), attention, (2, 4), ["true a, predicted b"], "unused")
    panels = [axes for axes in drawn[0].axes if axes.get_label() != "<colorbar>"]
    assert [len(axes.images) for axes in panels] == [1, 2, 2, 2, 2, 2]
    assert panels[0].get_title(loc="left") == "true a\npredicted b"
    mean = panels[1].images[1]
    np.testing.assert_allclose(mean.get_array(), 8 * attention[0][0].mean((0, 1)).reshape(2, 4))
    assert mean.get_extent() == list(panels[1].images[0].get_extent()) == [-0.5, 15.5, 7.5, -0.5]
    assert len({axes.get_title(loc="left") for axes in panels[2:]}) == 4


def test_latent_projection_says_what_it_shows(drawn):
    logits, labels = made_up(60, 3)
    plots.plot_latent_projection(np.repeat(logits, 4, axis=1), labels, names(3), "unused")
    figure = drawn[0]
    assert "PCA" in figure.get_suptitle() and "60 samples" in figure.get_suptitle()
    assert "% of the variance" in figure.axes[0].get_xlabel()
    assert [text.get_text() for text in figure.axes[0].texts] == names(3)
    assert [label.get_text() for label in figure.axes[-1].get_yticklabels()] == names(3)


def history(epochs):
    return [
        {"epoch": i, "train_loss": 2 / i, "train_accuracy": 1 - 0.9 / i, "val_loss": 2.1 / i,
         "val_accuracy": min(1 - 0.9 / i, 0.9), "learning_rate": 1e-3 / i} for i in range(1, epochs + 1)
    ]  # fmt: skip


def test_training_curves_mark_the_best_epoch(drawn):
    plots.plot_training_curves(history(200), "unused", 150, "accuracy")
    plots.plot_training_curves(history(1), "unused", 1, "accuracy")
    for figure, best in zip(drawn, (150, 1), strict=True):
        loss, accuracy, rate = figure.axes
        assert [axes.get_title(loc="left") for axes in figure.axes] == ["Loss", "Accuracy", "Learning rate"]
        assert loss.lines[2].get_xdata() == accuracy.lines[2].get_xdata() == best
        assert f"kept: epoch {best}, " in accuracy.get_legend().get_texts()[2].get_text()
        assert all(tick == int(tick) for tick in rate.get_xticks()) and loss.get_ylim()[0] == 0


def every_figure(folder, samples=30, classes=3):
    """Draw one of each kind into `folder`."""
    logits, labels = made_up(samples, classes)
    rng = np.random.default_rng(1)
    task = Classification(names(classes))
    rows = rows_of(logits, labels, np.arange(samples) % 40 + 1)
    analysis = task.analysis(rows, items_of(rows, range(samples), task.class_names))
    for name, draw in {**task.figures(rows), **task.analysis_figures(analysis)}.items():
        draw(folder / name)
    titles = [task.mistake(rows, place) for place in task.worst(rows)]
    plots.plot_mistakes(rng.integers(0, 17, (len(titles), 8, 8, 1)), titles, folder / "mistakes.png")
    weights = rng.dirichlet(np.ones(16), size=(1, 2, 5))
    plots.plot_image_attention(rng.random((1, 8, 8, 3)), [weights], (4, 4), ["true a"], folder / "image.png")
    inputs, mask = rng.normal(size=(1, 16, 2)), np.ones((1, 16), dtype=bool)
    plots.plot_sequence_attention(inputs, mask, [weights], ["true a"], folder / "sequence.png")
    plots.plot_latent_projection(rng.normal(size=(samples, 8)), labels, names(classes), folder / "latents.png")
    plots.plot_training_curves(history(2), folder / "curves.png", 2, "accuracy")


@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (10_000, 100)])
def test_every_figure_is_a_picture_of_sensible_size(tmp_path, samples, classes):
    every_figure(tmp_path, samples, classes)
    for path in tmp_path.iterdir():
        height, width, _ = matplotlib.image.imread(path).shape
        if path.name != "mistakes.png":  # a line of text where there is no mistake
            assert 300 < height < 2500 and 300 < width < 2500 and 0.4 < width / height < 6, path.name
        assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("correct", [True, False])
def test_figures_of_one_kind_of_answer_and_of_equal_latents(tmp_path, correct):
    confidence = np.full(5, 1.0)
    plots.plot_confidence_histogram(confidence, np.full(5, correct), tmp_path / "a.png")
    table = ev.reliability_table(confidence, np.full(5, correct))
    plots.plot_confidence_analysis(table, 0.0, confidence, np.full(5, correct), tmp_path / "b.png")
    plots.plot_latent_projection(np.ones((5, 3)), np.arange(5), names(5), tmp_path / "c.png")
    plots.plot_mistakes(np.zeros((0, 8, 8, 1)), [], tmp_path / "d.png")
    assert len(list(tmp_path.iterdir())) == 4


def test_nothing_global_changes_and_the_users_style_is_ignored(tmp_path):
    import matplotlib.pyplot as plt
    import seaborn  # noqa: F401  imported by the figures; registers its colour maps

    def state():
        plotting = dict(matplotlib.rcParams), matplotlib.get_backend(), plt.get_fignums()
        seeds = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        return plotting, seeds, warnings.filters[:], torch.get_num_threads()

    before = state()
    (tmp_path / "plain").mkdir()
    every_figure(tmp_path / "plain")
    assert state() == before
    (tmp_path / "dark").mkdir()
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 20, "savefig.dpi": 44}):
        every_figure(tmp_path / "dark")
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "dark" / path.name).read_bytes(), path.name


def run(code, tmp_path, **environment):
    env = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, timeout=120)


def test_figures_need_no_display(tmp_path):  # R45
    code = """
from pathlib import Path
import evaluation as ev, numpy as np
from tasks import Classification
figures = Classification(["a", "b"]).figures(ev.class_rows(np.eye(2), np.array([0, 1])))
ev.save_evaluation("new/sub/dir", {}, [{"id": "a"}], figures)
assert len(list(Path("new/sub/dir").iterdir())) == 5
import sys, matplotlib.pyplot as plt
assert not plt.get_fignums() and "tkinter" not in sys.modules
"""
    run(code, tmp_path, MPLBACKEND="TkAgg")


def test_importing_is_light(tmp_path):
    code = "import sys, evaluation, plots; assert not {'matplotlib', 'seaborn', 'sklearn'} & set(sys.modules)"
    run(code, tmp_path)
