"""--task tagging: a class for each step of a series and for each character of a text."""

import csv
import json
import signal

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from running import before_step
from running import run_in as run

import evaluation
import inference
import train
from adapters import SeriesAdapter, TextAdapter
from batches import UNLABELLED, collate, create_dataloader
from checkpoint import BEST, LAST, equipped_model, load_checkpoint
from config import Settings
from data_files import read_series, read_texts, spans_to_labels
from data_utils import load_splits
from inference import load_model, predict
from messages import UserError
from perceiver_model import PerceiverModel
from tasks import Tagging, describe, from_description

TINY = (
    "--model_size=tiny --d_model=16 --num_heads=2 --num_latents=4 --num_cross_attention_layers=1 "
    "--num_self_attention_layers=1 --ema_decay=0 --lr=5e-3 --amp=off"
)
SYNTHETIC = f"--dataset=synthetic --task=tagging --num_samples=40 --seq_len_range 20 40 --feature_dim=4 {TINY}"
STEPS = Settings(dataset_type="sequences", task="tagging")
SPANS = Settings(dataset_type="text", task="tagging")


pytestmark = pytest.mark.usefixtures("without_curves")


# --- The model -------------------------------------------------------------------------------------------------------


def model_of(**arguments):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "num_heads": 2, "num_latents": 4, "num_cross_attention_layers": 1}
    return PerceiverModel(3, 5, head="tokens", num_self_attention_layers=1, **sizes, **arguments).double().eval()


def test_an_answer_is_the_decoders_to_the_tokens_own_features():
    """Against the formulas of Perceiver IO (section 3.2, figure 3), written out with plain matrices."""
    model, x = model_of(num_decoder_heads=2), torch.randn(2, 7, 3, dtype=torch.float64)
    tokens, _ = model.modalities["input"](x)
    latents, block = model.encode(x), model.output.decoder.cross_attention
    queries = model.output.query(tokens)
    attention, heads = block.attention, 2
    q, k, v = (
        layer(values).unflatten(2, (heads, -1)).transpose(1, 2)
        for layer, values in ((attention.query, block.latent_norm(queries)),
                              (attention.key, block.input_norm(latents)), (attention.value, block.input_norm(latents)))
    )  # fmt: skip
    weights = (q @ k.mT / (q.size(-1) ** 0.5)).softmax(-1)
    hidden = queries + attention.output((weights @ v).transpose(1, 2).flatten(2))
    hidden = hidden + block.mlp(block.mlp_norm(hidden))
    torch.testing.assert_close(model(x), model.output.decoder.output(hidden), rtol=0, atol=1e-12)


def test_padding_and_neighbours_in_the_batch_change_nothing():
    model, lengths = model_of(), (7, 3, 1)
    sequences = [torch.randn(length, 3, dtype=torch.float64) for length in lengths]
    x = torch.full((3, 9, 3), torch.nan, dtype=torch.float64)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        x[i, : len(sequence)], mask[i, : len(sequence)] = sequence, True
    answers = model(x, mask)
    for i, sequence in enumerate(sequences):
        torch.testing.assert_close(answers[i, : len(sequence)], model(sequence[None])[0], rtol=0, atol=1e-12)
        assert not answers[i, len(sequence) :].any()
    model(x, mask).sum().backward()
    assert all(weights.grad is None or weights.grad.isfinite().all() for weights in model.parameters())


def test_recomputed_and_compiled_steps_are_the_plain_one():
    x, labels = torch.randn(2, 7, 3, dtype=torch.float64), torch.randint(0, 5, (2, 7))

    def gradients(model, call):
        F.cross_entropy(call(x).mT, labels).backward()
        return {name: weights.grad for name, weights in model.named_parameters()}

    plain, recomputing, compiled = (model_of(gradient_checkpointing=value).train() for value in (False, True, False))
    expected = gradients(plain, plain)
    for model, call in ((recomputing, recomputing), (compiled, torch.compile(compiled, backend="aot_eager"))):
        for name, gradient in gradients(model, call).items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12)


# --- Labels of steps -------------------------------------------------------------------------------------------------

CHANGING = "id,label,a,b\n1,walk,0.5,1\n1,walk,1,2\n1,run,2,3\n2,run,1,1\n2,,4,2\n2,walk,0,3\n"


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_label_that_changes_within_a_series(tmp_path):
    path = write(tmp_path / "steps.csv", CHANGING)
    with pytest.raises(UserError, match=r"line 4: label 'run' of series '1', .*say --task tagging"):
        read_series(path, Settings(dataset_type="sequences"))
    items = read_series(path, STEPS)
    assert items.labels == [["walk", "walk", "run"], ["run", "", "walk"]]
    task, notes = Tagging.fit(items.labels, items.places, STEPS)
    assert task.class_names == ["run", "walk"] and not task.outside and notes == []
    targets, errors = task.read(items.labels, items.places)
    assert [list(each) for each in targets] == [[1, 1, 0], [0, UNLABELLED, 1]] and errors == []


def test_labels_of_steps_that_cannot_be_are_named(tmp_path):
    path = write(tmp_path / "steps.csv", CHANGING.replace("2,walk", "2,0.5"))
    items = read_series(path, STEPS)
    task, _ = Tagging.fit(items.labels, items.places, STEPS)
    targets, errors = task.read(items.labels, items.places)
    assert targets is None and "steps.csv, line 5, step 3: label '0.5' is not a class" in str(errors[0])
    targets, errors = task.read([["run", "jump"]], ["new.csv, line 2"])
    assert targets is None and "new.csv, line 2, step 2: label 'jump' does not occur" in str(errors[0])


@pytest.mark.parametrize("labels", [np.array([[3, 3, 7], [7, -100, -100]]), np.array([["a", "a", "b"], ["b", "", ""]])])
def test_labels_of_steps_in_an_npz(tmp_path, labels):
    """Padded with and without lengths, and one series after the other."""
    x = np.arange(12.0).reshape(2, 3, 2)
    x[1, 2] = np.nan
    lengths = [3, 2]
    flat = {"x": np.concatenate([x[0], x[1, :2]]), "y": np.concatenate([labels[0], labels[1, :2]]), "lengths": lengths}
    forms = {"padded": {"x": x, "y": labels}, "long": {"x": x, "y": labels, "lengths": lengths}, "flat": flat}
    for name, arrays in forms.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        items = read_series(tmp_path / f"{name}.npz", STEPS)
        assert [len(value) for value in items.values] == lengths
        assert items.labels == [labels[0].tolist(), labels[1, :2].tolist()]
    with pytest.raises(UserError, match=r"y is .*--task tagging"):
        read_series(tmp_path / "padded.npz", Settings(dataset_type="sequences"))
    np.savez(tmp_path / "short.npz", x=x, y=labels[:, 0])
    with pytest.raises(UserError, match=r"y is \S+ \(2,\); --task tagging needs .* \(2, 3\)"):
        read_series(tmp_path / "short.npz", STEPS)


def test_a_labelled_step_without_values_at_the_end_is_kept(tmp_path):
    path = write(tmp_path / "steps.csv", "id,label,a\n1,x,1\n1,y,\n1,,\n2,y,\n2,x,2\n2,,\n")
    items = read_series(path, STEPS)
    assert items.labels == [["x", "y"], ["y", "x"]] and [len(value) for value in items.values] == [2, 2]


@pytest.mark.parametrize(("name", "text"), [
    ("a.ts", "@classLabel true a b\n@data\n1,2:a\n"),
    ("a.txt", "1 0.5 0.7\n"),
    ("a.tsv", "1\t0.5\t0.7\n"),
])  # fmt: skip
def test_files_of_one_label_a_series_are_refused(tmp_path, name, text):
    with pytest.raises(UserError, match="--task tagging needs"):
        read_series(write(tmp_path / name, text), STEPS)


def test_images_have_no_steps(tmp_path):
    done = run(train.main, tmp_path, "--dataset=digits", "--task=tagging")
    assert done.status == 2 and "task: tagging is not offered for digits; choose one of classification" in done.err


# --- Spans of texts --------------------------------------------------------------------------------------------------

TEXT = "Zoe\u0301 \U0001f469\u200d\U0001f680 \uc11c\uc6b8 ok"  # combining accent, emoji of three, Korean


def line(text, spans):
    return json.dumps({"text": text, "spans": spans}) + "\n"


def test_spans_count_characters_whatever_their_bytes(tmp_path):
    spans = [[0, 4, "PERSON"], [5, 8, "JOB"], [9, 11, "CITY"]]
    items = read_texts(write(tmp_path / "a.jsonl", line(TEXT, spans)), SPANS)
    labels = items.labels[0]
    assert len(labels) == len(TEXT)
    assert labels[:4] == ["PERSON"] * 4 and labels[4] == "outside" and labels[9:11] == ["CITY"] * 2
    task, _ = Tagging.fit(items.labels, items.places, SPANS)
    assert task.class_names == ["outside", "CITY", "JOB", "PERSON"] and task.outside
    (target,), _ = task.read(items.labels, items.places)
    of_bytes = TextAdapter().of_tokens(TEXT, target)
    assert len(of_bytes) == len(TEXT.encode())
    place = 0
    for character, number in zip(TEXT, target, strict=True):
        width = len(character.encode())
        assert of_bytes[place] == number and (of_bytes[place + 1 : place + width] == UNLABELLED).all()
        place += width
    tokens = TextAdapter()(TEXT)
    assert TextAdapter().of_units(tokens, of_bytes).tolist() == target.tolist()
    answer = task.answer(F.one_hot(torch.from_numpy(target), 4).double() * 20)
    assert [[span["start"], span["end"], span["class"]] for span in answer["spans"]] == spans
    cut = TextAdapter(6).of_tokens(TEXT, target)
    assert cut.tolist() == of_bytes[:6].tolist()


@pytest.mark.parametrize(("spans", "says"), [
    ([[0, 2, "A"], [1, 3, "B"]], r"line 1, spans, span 2, \[1, 3, 'B'\], overlaps \[0, 2, 'A'\]"),
    ([[3, 1, "A"]], "span 1, .* ends before it starts"),
    ([[1, 1, "A"]], "span 1, .* is empty"),
    ([[0, 40, "A"]], "span 1, .* is not within the 14 characters"),
    ([[-1, 2, "A"]], "span 1, .* is not within"),
    ([[0, 2]], r"span 1 is \[0, 2\]; write \[start, end"),
    ([[0, 2.5, "A"]], "span 1 is "),
    ([[0, 2, "outside"]], "'outside' is the name of what is in no span"),
    ([[0, 2, 0.5]], "span 1: label 0.5 is not a class"),
    (None, "spans is None; write a list"),
    ("x", "spans is 'x'"),
])  # fmt: skip
def test_spans_that_cannot_be_are_named_by_place(tmp_path, spans, says):
    with pytest.raises(UserError, match=says):
        read_texts(write(tmp_path / "a.jsonl", line(TEXT, spans)), SPANS)


def test_spans_need_a_jsonl(tmp_path):
    with pytest.raises(UserError, match=r'spans of characters, which a .jsonl holds; write a line \{"text"'):
        read_texts(write(tmp_path / "a.csv", "text,label\nhello,a\n"), SPANS)
    with pytest.raises(UserError, match="no column 'spans'"):
        read_texts(write(tmp_path / "a.jsonl", '{"text": "hello"}\n'), SPANS)


def test_gaps_and_spans_that_touch(tmp_path):
    path = write(tmp_path / "a.jsonl", line("abcdef", [[4, 5, "X"], [0, 2, None], [3, 4, "X"]]))
    items = read_texts(path, SPANS)
    assert items.labels == [[None, None, "outside", "X", "X", "outside"]]
    assert any("spans of one name that touch" in note for note in items.notes)


PIECES = st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["outside", "A", "B"])), min_size=1, max_size=8)


@given(PIECES)
@settings(deadline=None, max_examples=60)
def test_spans_there_and_back(pieces):
    classes = np.concatenate([np.full(length, ("outside", "A", "B").index(name)) for length, name in pieces])
    spans = evaluation.spans_of(classes, 0)
    labels, _ = spans_to_labels([[start, end, "?AB"[number]] for start, end, number in spans][::-1], len(classes), "x")
    assert labels == [("outside", "A", "B")[number] for number in classes]
    assert [span for span in evaluation.spans_of(classes) if span[2]] == spans


# --- Targets, loss, metrics ------------------------------------------------------------------------------------------

CLASSES = ["a", "b", "c"]


def items_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"input": rng.standard_normal((length, 2)).astype(np.float32),
         "label": np.where(rng.random(length) < 0.2, UNLABELLED, rng.integers(0, 3, length))}
        for length in lengths
    ]  # fmt: skip


def test_targets_are_cut_padded_and_hidden_with_their_tokens():
    items = items_of([5, 3])
    items[1]["mask"] = np.array([1, 0, 1])
    batch = collate(items, max_seq_len=4, targets=Tagging(CLASSES))
    assert batch["input"].shape == (2, 4, 2) and batch["label"].dtype == torch.int64
    assert batch["label"][0].tolist() == items[0]["label"][:4].tolist()
    label = items[1]["label"]
    assert batch["label"][1].tolist() == [label[0], UNLABELLED, label[2], UNLABELLED]


@pytest.mark.parametrize(("label", "says"), [
    ([0, 1], "2 labels of 3 tokens"), ([0, 1, 0.5], "must be whole numbers"), ([[0], [1], [2]], "one for each token"),
    ([0, 1, 3], "sample 1, token 2: label 3 is not in 0..2"), ([0, -1, 1], "sample 1, token 1: label -1"),
])  # fmt: skip
def test_labels_of_tokens_that_cannot_be(label, says):
    items = [*items_of([4]), {"input": np.zeros((3, 2)), "label": label}]
    with pytest.raises(UserError, match=says):
        create_dataloader(items, 2, shuffle=True, targets=Tagging(CLASSES))


@pytest.mark.parametrize(("labels", "says"), [
    ([UNLABELLED] * 4, "no token of the 1 samples has a label"),
    ([1, 1, UNLABELLED, 1], "all labelled tokens of the 1 training samples are 'b'"),
])  # fmt: skip
def test_labels_from_which_nothing_can_be_learnt(labels, says):
    with pytest.raises(UserError, match=says):
        create_dataloader([{"input": np.zeros((4, 2)), "label": labels}], 2, shuffle=True, targets=Tagging(CLASSES))


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(1, 4))
@settings(deadline=None, max_examples=30)
def test_the_mean_over_samples_is_the_mean_over_tokens_in_any_batches(lengths, batch_size):
    items = items_of(lengths)
    items[0]["label"][0] = 0
    targets = [item["label"] for item in items]
    task = Tagging(CLASSES).learn(targets, Settings())
    outputs = [torch.from_numpy(item["input"]) @ torch.eye(2, 3) for item in items]
    labels = np.concatenate(targets)
    expected = F.cross_entropy(torch.cat(outputs), torch.from_numpy(labels), ignore_index=UNLABELLED)
    total = 0.0
    for first in range(0, len(items), batch_size):
        part = slice(first, first + batch_size)
        padded = torch.nn.utils.rnn.pad_sequence(outputs[part], batch_first=True)
        total += task.objective(padded, task.stack(targets[part]), Settings())
    torch.testing.assert_close(total / len(items), expected)


def rows_of(task, items, batch_size):
    parts = []
    for first in range(0, len(items), batch_size):
        batch = collate(items[first : first + batch_size], targets=task)
        parts.append(task.rows(batch["input"] @ torch.eye(2, 3) * 2, batch["label"]))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_metrics_are_those_of_scikit_learn_over_all_labelled_tokens():
    items, task = items_of([9, 1, 30, 14]), Tagging(CLASSES)
    metrics = task.metrics(rows_of(task, items, 2))
    labels = np.concatenate([item["label"] for item in items])
    logits = np.concatenate([item["input"] for item in items]) @ np.eye(2, 3) * 2
    asked = labels != UNLABELLED
    predicted = logits.argmax(1)
    assert metrics["num_samples"] == 4 and metrics["num_labelled_tokens"] == asked.sum()
    assert metrics["accuracy"] == pytest.approx((predicted == labels)[asked].mean())
    assert metrics["macro_f1"] == pytest.approx(
        sklearn.metrics.f1_score(labels[asked], predicted[asked], average="macro")
    )
    probabilities = torch.from_numpy(logits).softmax(1).numpy()
    loss = sklearn.metrics.log_loss(labels[asked], probabilities[asked], labels=range(3))
    assert metrics["negative_log_likelihood"] == pytest.approx(loss, abs=1e-6)
    assert metrics["majority_baseline"] == np.bincount(labels[asked]).max() / asked.sum()
    for batch_size in (1, 4):
        assert task.metrics(rows_of(task, items, batch_size)) == metrics


def test_a_split_whose_first_batches_have_no_label_is_no_fault():
    task = Tagging(["outside", "X"], outside=True)
    rows = task.rows(torch.zeros(1, 2, 2), torch.full((1, 2), UNLABELLED))
    figures = task.epoch_figures(task.metrics(rows), None)
    assert set(figures) == {"val_loss", "val_span_f1", "val_accuracy", "val_balanced_accuracy", "val_macro_f1"}


SIDES = st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12), min_size=1)


@given(SIDES)
@settings(deadline=None, max_examples=60)
def test_span_scores_by_counting(samples):
    """Against counting spans one by one, with another way to find them."""

    def spans(classes):
        found, start = [], None
        for place, number in enumerate([*classes, 0]):
            if start is not None and number != classes[start]:
                found.append((start, place, classes[start]))
                start = None
            if start is None and number:
                start = place
        return found

    true, predicted = ([[pair[side] for pair in sample] for sample in samples] for side in (0, 1))
    pairs = [(spans(a), spans(b)) for a, b in zip(true, predicted, strict=True)]
    right = sum(len(set(a) & set(b)) for a, b in pairs)
    wanted, given_ = sum(len(a) for a, _ in pairs), sum(len(b) for _, b in pairs)
    metrics = evaluation.span_metrics([*map(np.array, true)], [*map(np.array, predicted)], ["outside", "A", "B"], 0)
    assert metrics["num_spans"] == wanted
    assert metrics["span_f1"] == (2 * right / (wanted + given_) if wanted + given_ else None)
    assert metrics["span_recall"] == (right / wanted if wanted else None)
    assert sum(row["support"] for row in metrics["per_span_class"]) == wanted


def test_class_weights_are_balanced_over_tokens():
    targets = [np.array([0, 0, 0, UNLABELLED]), np.array([1])]
    task = Tagging(CLASSES).learn(targets, Settings(class_weights="balanced"))
    assert task.tokens_per_sample == 2 and task.class_weights == pytest.approx([4 / 6, 2, 1])
    assert from_description(describe(task)) == task


# --- Whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    done = run(train.main, folder, *SYNTHETIC.split(), "--epochs=3", "--batch_size=8")
    assert done.status == 0 and done.err == "", done.err
    return folder, done.out


def test_synthetic_patterns_change_within_the_sequence():
    splits, info = load_splits(Settings(task="tagging", num_samples=20, seq_len_range=(80, 120), feature_dim=3))
    item = splits["train"][0]
    assert info["head"] == {"head": "tokens"} and info["task"]["class_names"] == info["class_names"]
    assert len(item["label"]) == len(item["input"]) and len(set(item["label"].tolist())) > 1
    cut, _ = load_splits(Settings(task="tagging", num_samples=20, max_seq_len=10, feature_dim=3))
    assert all(len(cut["test"][i]["label"]) == len(cut["test"][i]["input"]) == 10 for i in range(4))


def test_an_evaluation_repeats_what_training_said_and_draws(synthetic):
    folder, out = synthetic
    last = json.loads((folder / "checkpoints" / "log.jsonl").read_text().splitlines()[-1])
    assert "a class for each step, of 5" in out and {"train_accuracy", "val_accuracy", "val_macro_f1"} <= last.keys()
    best = load_checkpoint(folder / "checkpoints" / BEST)["best"]
    done = run(inference.main, folder, "--model_path", f"checkpoints/{BEST}", "--split=val", "--analyze")
    assert done.status == 0, done.err
    results = json.loads((folder / "results" / "results.json").read_text())
    assert results["accuracy"] == pytest.approx(best["val_accuracy"], abs=1e-9)
    assert results["negative_log_likelihood"] == pytest.approx(best["val_loss"], abs=1e-6)
    assert "num labelled tokens" in done.out and "majority baseline" in done.out
    figures = {"confusion_matrix.png", "confidence_analysis.png", "examples.png", "attention.png", "latents.png"}
    assert figures <= set(results["figures"])
    assert all((folder / "results" / name).stat().st_size > 5000 for name in results["figures"])
    with open(folder / "results" / "items.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["right"]) for row in rows) / sum(int(row["labelled"]) for row in rows) == pytest.approx(
        results["accuracy"]
    )


def test_a_stopped_run_goes_on_exactly(synthetic, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        before_step(patch, 7, lambda: signal.raise_signal(signal.SIGTERM))
        done = run(train.main, tmp_path, *SYNTHETIC.split(), "--epochs=3", "--batch_size=8")
    assert done.status == 143, done.err
    assert run(train.main, tmp_path, "--resume").status == 0
    ours, theirs = (load_checkpoint(place / "checkpoints" / LAST) for place in (tmp_path, synthetic[0]))
    assert ours["step"] == theirs["step"] > 7
    for name, weights in theirs["model"].items():
        assert torch.equal(weights, ours["model"][name]), name


def series_csv(path, count, labelled=True, seed=0):
    """Series that are high while the label is 'up' and low while it is 'down', with a gap of labels here and there."""
    rng, lines = np.random.default_rng(seed), ["id,label,value" if labelled else "id,value"]
    truth = {}
    for number in range(count):
        classes = np.repeat(rng.integers(0, 2, 4), rng.integers(2, 6, 4))
        truth[str(number)] = classes
        for step, up in enumerate(classes):
            label = ["" if step == 1 else ("down", "up")[up]] if labelled else []
            lines.append(",".join([str(number), *label, f"{up * 2 - 1 + rng.normal(0, 0.1):.3f}"]))
    write(path, "\n".join(lines) + "\n")
    return truth


def predictions(folder):
    with open(folder / "results" / "predictions.csv", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def test_series_end_to_end(tmp_path):
    """Trained with gaps and a cut; the predictions of new series name their steps."""
    series_csv(tmp_path / "train.csv", 40)
    words = ["--dataset=sequences", "--task=tagging", "--data_path=train.csv", "--max_seq_len=12", "--epochs=30"]
    done = run(train.main, tmp_path, *words, *TINY.split(), "--label_smoothing=0")
    assert done.status == 0 and done.err == "", done.err
    truth = series_csv(tmp_path / "new.csv", 5, labelled=False, seed=1)
    done = run(inference.main, tmp_path, "--model_path", f"checkpoints/{BEST}", "--input=new.csv")
    assert done.status == 0 and "5 predictions" in done.out, done.err
    rows = predictions(tmp_path)
    assert list(rows[0]) == ["id", "start", "end", "class", "confidence"]
    for id, classes in truth.items():
        own = [row for row in rows if row["id"] == id]
        steps = np.concatenate([np.full(int(row["end"]) - int(row["start"]), row["class"] == "up") for row in own])
        assert own[0]["start"] == "0" and len(steps) == min(12, len(classes))
        assert (steps == classes[:12]).mean() > 0.9
    model, _ = load_model(tmp_path / "checkpoints" / BEST)
    (answer,) = predict(model, [np.array([[1.0], [1.1], [-1.0]])])
    assert answer["classes"] == ["up", "up", "down"]
    assert [(span["start"], span["end"], span["class"]) for span in answer["spans"]] == [(0, 2, "up"), (2, 3, "down")]


def texts_jsonl(path, count, seed=0):
    rng, lines = np.random.default_rng(seed), []
    for _ in range(count):
        words = [str(word) for word in rng.choice(["\uc11c\uc6b8", "ab", "\U0001f600c", "12", "407"], 5)]
        text, spans = "", []
        for word in words:
            if word.isdigit():
                spans.append([len(text), len(text) + len(word), "NUMBER"])
            text += word + " "
        lines.append(line(text, spans))
    return write(path, "".join(lines))


def test_texts_end_to_end(tmp_path):
    texts_jsonl(tmp_path / "train.jsonl", 60)
    words = ["--dataset=text", "--task=tagging", "--data_path=train.jsonl", "--epochs=30", "--label_smoothing=0"]
    done = run(train.main, tmp_path, *words, *TINY.split())
    assert done.status == 0 and "a class for each character, of 2" in done.out, done.err
    best = load_checkpoint(tmp_path / "checkpoints" / BEST)["best"]
    assert best["val_span_f1"] == max(
        json.loads(text)["val_span_f1"] for text in (tmp_path / "checkpoints" / "log.jsonl").read_text().splitlines()
    )
    assert best["val_span_f1"] > 0.9
    done = run(inference.main, tmp_path, "--model_path", f"checkpoints/{BEST}")
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["span_f1"] > 0.9 and (tmp_path / "results" / "examples.png").stat().st_size > 5000
    assert [row["class"] for row in results["per_span_class"]] == ["NUMBER"]
    write(tmp_path / "new.jsonl", line("\U0001f600c 407 \uc11c\uc6b8 12 ", []) + line("ab ab ab ab ab ", []))
    assert run(inference.main, tmp_path, "--model_path", f"checkpoints/{BEST}", "--input=new.jsonl").status == 0
    rows = [(row["id"], row["start"], row["end"], row["class"]) for row in predictions(tmp_path)]
    assert rows == [("1", "3", "6", "NUMBER"), ("1", "10", "12", "NUMBER"), ("2", "", "", "")]


def test_a_checkpoint_whose_head_is_another_is_refused(synthetic):
    checkpoint = load_checkpoint(synthetic[0] / "checkpoints" / BEST)
    del checkpoint["data"]["head"]
    checkpoint["data"]["task"] = {"kind": "classification", "class_names": checkpoint["data"]["class_names"]}
    with pytest.raises(UserError, match="the checkpoint's task is classification, which its model's head 'tokens'"):
        equipped_model(checkpoint)


def test_a_series_adapter_answers_for_each_step():
    adapter = SeriesAdapter.fit([np.arange(6.0).reshape(3, 2)])
    answers = np.arange(3)
    assert adapter.of_units(torch.zeros(3, 2), answers) is answers
    assert SeriesAdapter([0.0], [1.0], max_seq_len=2).of_tokens(None, answers).tolist() == [0, 1]
