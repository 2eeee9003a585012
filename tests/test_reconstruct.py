"""--task reconstruct: what hidden tokens hold, learnt without labels."""

import json
import math
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from running import before_step
from running import run_in as run

import inference
import train
from adapters import SeriesAdapter
from batches import UNLABELLED, HidingDataset, choose_hidden, create_dataloader, random_stream, set_epoch
from checkpoint import BEST, LAST, equipped_model, load_checkpoint
from config import Settings
from data_utils import load_splits
from inference import load_model, predict
from messages import UserError
from perceiver_model import PerceiverModel
from tasks import Contents, Reconstruct, describe, from_description

TINY = (
    "--model_size=tiny --d_model=16 --num_heads=2 --num_latents=4 --num_cross_attention_layers=1 "
    "--num_self_attention_layers=1 --ema_decay=0 --lr=5e-3 --amp=off"
)
SYNTHETIC = f"--dataset=synthetic --task=reconstruct --num_samples=40 --seq_len_range 12 20 --feature_dim=4 {TINY}"


pytestmark = pytest.mark.usefixtures("without_curves")


# --- The model -------------------------------------------------------------------------------------------------------

MODALITIES = {"series": {"input_dim": 3}, "text": {"vocab_size": 256}}


def model_of(modalities, **arguments):
    torch.manual_seed(0)
    width = sum(each.get("vocab_size", each.get("input_dim", 1)) for each in modalities.values())
    sizes = {"d_model": 16, "num_heads": 2, "num_latents": 4, "num_cross_attention_layers": 1}
    model = PerceiverModel(modalities, width, head="hidden", num_self_attention_layers=1, **sizes, **arguments)
    return model.double().eval()


def test_an_answer_is_the_decoders_to_the_position_alone():
    """Against the formulas of Perceiver IO (section 3.2, figure 3), written out with plain matrices."""
    model, x = model_of({"series": {"input_dim": 3}}), torch.randn(2, 7, 3, dtype=torch.float64)
    hidden = torch.tensor([[1, 4], [6, -1]])
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, [1, 4]], mask[1, 6] = False, False
    latents, block = model.encode(x, mask), model.output.decoder.cross_attention
    positions = model.modalities["series"].positions(x)[hidden.clamp(min=0)]
    queries = model.output.query["series"](positions)
    attention = block.attention
    q, k, v = attention.query(block.latent_norm(queries)), *(
        layer(block.input_norm(latents)) for layer in (attention.key, attention.value)
    )
    hidden_layer = queries + attention.output((q @ k.mT / q.size(-1) ** 0.5).softmax(-1) @ v)
    hidden_layer = hidden_layer + block.mlp(block.mlp_norm(hidden_layer))
    expected = model.content["series"](hidden_layer)
    answers = model(x, hidden={"series": hidden})["series"]
    torch.testing.assert_close(answers[hidden >= 0], expected[hidden >= 0], rtol=0, atol=1e-12)


def test_what_is_hidden_reaches_no_answer_and_what_is_seen_does():
    model = model_of(MODALITIES)
    x = {"series": torch.randn(2, 5, 3, dtype=torch.float64), "text": torch.randint(0, 256, (2, 6, 1)).double()}
    hidden = {"series": torch.tensor([[0, 3], [2, -1]]), "text": torch.tensor([[5], [1]])}
    expected = model(x, hidden=hidden)
    other = {name: values.clone() for name, values in x.items()}
    other["series"][0, [0, 3]], other["series"][1, 2] = torch.nan, math.inf
    other["text"][0, 5], other["text"][1, 1] = 17, 3
    changed = model(other, hidden=hidden)
    for name in hidden:
        there = hidden[name] >= 0
        torch.testing.assert_close(changed[name][there], expected[name][there], rtol=0, atol=0)
    sum(part.square().sum() for part in changed.values()).backward()
    assert all(weights.grad.isfinite().all() for weights in model.parameters() if weights.grad is not None)
    other["series"][:, 1] += 1
    assert not torch.allclose(model(other, hidden=hidden)["text"], expected["text"])


def test_padding_and_neighbours_in_the_batch_change_nothing():
    model, lengths = model_of({"series": {"input_dim": 3}}), (7, 4)
    sequences = [torch.randn(length, 3, dtype=torch.float64) for length in lengths]
    x, mask = torch.full((2, 9, 3), torch.nan, dtype=torch.float64), torch.zeros(2, 9)
    for i, sequence in enumerate(sequences):
        x[i, : len(sequence)], mask[i, : len(sequence)] = sequence, 1
    hidden = torch.tensor([[0, 2, 6], [3, -1, -1]])
    answers = model(x, mask, hidden={"series": hidden})["series"]
    for i, sequence in enumerate(sequences):
        own = hidden[i][hidden[i] >= 0]
        alone = model(sequence[None], hidden={"series": own[None]})["series"][0]
        torch.testing.assert_close(answers[i, : len(own)], alone, rtol=0, atol=1e-12)


def test_a_modality_that_a_batch_lacks_has_gradients_of_zero():
    """So that several processes exchange the same parameters, whatever their samples have."""
    model = model_of(MODALITIES)
    x, hidden = torch.randn(2, 5, 3, dtype=torch.float64), torch.tensor([[0], [1]])
    answers = model({"series": x}, hidden={"series": hidden})
    assert answers["text"].shape == (2, 0, 256)
    task = Reconstruct({"series": Contents(1.0, [0.0] * 3, [1.0] * 3), "text": Contents(1.0, shares=[1 / 256] * 256)})
    task.objective(answers, {"series": x[:, :1]}, Settings()).backward()
    for name in ("content.text.weight", "output.query.text.weight"):
        assert not model.get_parameter(name).grad.any()


def test_recomputed_and_compiled_steps_are_the_plain_one():
    x, hidden = torch.randn(2, 7, 3, dtype=torch.float64), torch.tensor([[1, 4], [6, -1]])

    def gradients(model, call):
        call(x, hidden={"series": hidden})["series"][hidden >= 0].square().sum().backward()
        return {name: weights.grad for name, weights in model.named_parameters()}

    plain, recomputing, compiled = (
        model_of({"series": {"input_dim": 3}}, gradient_checkpointing=value).train() for value in (False, True, False)
    )
    expected = gradients(plain, plain)
    for model, call in ((recomputing, recomputing), (compiled, torch.compile(compiled, backend="aot_eager"))):
        for name, gradient in gradients(model, call).items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("arguments", "says"), [
    ({"input_dim": {"a": {"input_dim": 3, "use_positions": False}}}, "a must have use_positions"),
    ({"input_dim": 3, "num_classes": 4}, "num_classes=3"),
    ({"input_dim": {"a": {"input_dim": 3, "grid_shape": (8, 8), "stem": "conv"}}}, "no stem that joins tokens"),
])  # fmt: skip
def test_models_that_cannot_be(arguments, says):
    small = {"d_model": 8, "num_heads": 1, "num_latents": 2, "num_self_attention_layers": 1}
    with pytest.raises(ValueError, match=says):
        PerceiverModel(**{"num_classes": 3} | small | arguments, head="hidden")
    with pytest.raises(ValueError, match="hidden has no effect with head='mean'"):
        PerceiverModel(3, 2, **small)(torch.zeros(1, 4, 3), hidden={"input": torch.zeros(1, 1, dtype=torch.long)})


# --- What is hidden --------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=80)
def test_the_share_that_is_hidden(length, ratio):
    chosen = choose_hidden(length, ratio, np.random.default_rng(0))
    assert len(chosen) == min(max(1, round(ratio * length)), length - 1)
    assert len(set(chosen)) == len(chosen) and sorted(chosen) == chosen.tolist()


class Sequences(torch.utils.data.Dataset):
    """Sequences whose values say which sample and token they are of."""

    def __init__(self, lengths):
        self.of = lengths

    def __len__(self):
        return len(self.of)

    def __getitem__(self, number):
        return {"input": np.array([[number, token] for token in range(self.of[number])], np.float32)}


def hidden_in(dataset, loader, epoch):
    """{sample: the numbers of its hidden tokens}, by the batches of an epoch; the contents are compared, too."""
    set_epoch(loader, epoch)
    found = {}
    for batch in loader:
        for numbers, contents in zip(batch["hidden"]["series"], batch["label"]["series"], strict=True):
            there = numbers >= 0
            assert contents[~there].isnan().all()
            assert torch.equal(contents[there][:, 1].long(), numbers[there])
            found[int(contents[0, 0])] = numbers[there].tolist()
    assert len(found) == len(dataset)
    return found


def test_what_is_hidden_depends_on_seed_epoch_and_sample_alone():
    class Labelled(Sequences):
        def __getitem__(self, number):
            return super().__getitem__(number) | {"label": 0}

    lengths = [9, 14, 5, 20, 7]

    def of(split, batch_size, seed=0, epochs=(0, 1, 0), **options):
        data = HidingDataset(Labelled(lengths), 0.4, {"series": lambda tokens: tokens.clone()}, seed, split)
        task = Reconstruct({"series": Contents(1.0, [0.0], [1.0])})
        loader = create_dataloader(data, batch_size, targets=task, **options)
        return [hidden_in(data, loader, epoch) for epoch in epochs]

    first, second, again = of("train", 2, shuffle=True)
    assert first == again != second
    assert of("train", 5) == [first, second, first] and of("train", 2, seed=1)[0] != first
    assert of("train", 2, epochs=[1], num_workers=1) == [second]
    fixed = of("val", 2)
    assert fixed[0] == fixed[1] != first
    assert {number: len(chosen) for number, chosen in first.items()} == dict(enumerate([4, 6, 2, 8, 3]))


def test_missing_values_and_their_flags_are_not_asked_for():
    series = np.arange(12.0).reshape(6, 2)
    series[1, 0] = np.nan
    adapter = SeriesAdapter.fit([series])
    contents = adapter.contents(adapter(series))
    assert contents.shape == (6, 3) and contents[:, 2].isnan().all()
    assert contents[:, 0].isnan().tolist() == [False, True, False, False, False, False]
    assert not contents[:, 1].isnan().any()


# --- Errors and their baselines --------------------------------------------------------------------------------------


def test_errors_of_numbers_by_hand():
    contents = Contents(2.0, [1.0, -2.0], [2.0, 0.5])
    target = torch.tensor([[[3.0, -2.0], [1.0, math.nan], [math.nan, math.nan]]])
    output = torch.tensor([[[0.5, 1.0], [2.0, 9.0], [7.0, 7.0]]])
    error, baseline, asked = contents.errors(output, target)
    assert error.tolist() == [[(0.5**2 + 1) / 2, 4.0, 0.0]]  # against (1, 0), (0, -)
    assert baseline.tolist() == [[0.5, 0.0, 0.0]] and asked.tolist() == [[True, True, False]]


def test_errors_of_bytes_are_cross_entropies():
    shares = np.arange(1.0, 257) / np.arange(1.0, 257).sum()
    contents, output = Contents(2.0, shares=shares.tolist()), torch.randn(2, 3, 256)
    target = torch.tensor([[65, 0, UNLABELLED], [255, UNLABELLED, UNLABELLED]])
    error, baseline, asked = contents.errors(output, target)
    assert asked.tolist() == [[True, True, False], [True, False, False]]
    expected = F.cross_entropy(output[asked], target[asked], reduction="none")
    torch.testing.assert_close(error[asked], expected)
    np.testing.assert_allclose(baseline[asked], -np.log(shares[target[asked]]), rtol=1e-6)


def test_losses_and_metrics_are_means_over_hidden_tokens_in_any_batches():
    """The loss of an epoch, the same at any batch size, and the metrics of rows that were collected in any parts."""
    splits, info = load_splits(Settings(task="reconstruct", num_samples=30, seq_len_range=(6, 11), feature_dim=3))
    data, task = splits["train"], from_description(info["task"])
    assert describe(task)["kind"] == "reconstruct" and info["num_outputs"] == 3 and "class_names" not in info

    def answer(batch):
        return {"series": batch["hidden"]["series"][..., None].expand(-1, -1, 3).float() / 10}

    errors, baselines = [], []
    for number in range(len(data)):
        batch = data.__getitems__([number])
        scaled = (batch["label"]["series"][0].numpy() - task.modalities["series"].mean) / task.modalities["series"].std
        errors += np.square(scaled - answer(batch)["series"][0].numpy()).mean(1).tolist()
        baselines += np.square(scaled).mean(1).tolist()
    for batch_size in (1, 4, 27):
        total, parts = 0.0, []
        for first in range(0, len(data), batch_size):
            batch = data.__getitems__(list(range(first, min(first + batch_size, len(data)))))
            total += float(task.objective(answer(batch), batch["label"], Settings()))
            parts.append(task.rows(answer(batch), batch["label"]))
        metrics = task.metrics({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
        assert total / len(data) == pytest.approx(np.mean(errors), rel=1e-5)
        assert metrics["series_squared_error"] == metrics["loss"] == pytest.approx(np.mean(errors), rel=1e-5)
        assert metrics["baseline_series_squared_error"] == pytest.approx(np.mean(baselines), rel=1e-5)
        assert metrics["relative_error"] == pytest.approx(np.mean(errors) / np.mean(baselines), rel=1e-5)
        assert metrics["series_hidden_tokens"] == len(errors)


def test_the_baseline_of_training_is_the_variance():
    splits, info = load_splits(Settings(task="reconstruct", num_samples=60, feature_dim=3, mask_ratio=0.5))
    known = info["task"]["modalities"]["series"]
    tokens = torch.cat([splits["train"][i]["input"] for i in range(len(splits["train"]))]).double()
    np.testing.assert_allclose(known["mean"], tokens.mean(0), atol=1e-5)
    np.testing.assert_allclose(known["std"], tokens.std(0, correction=0), rtol=1e-5)
    lengths = [len(splits["train"][i]["input"]) for i in range(len(splits["train"]))]
    hidden = [choose_hidden(length, 0.5, random_stream("x")) for length in lengths]
    assert known["hidden"] == np.mean([len(each) for each in hidden])


# --- Whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    done = run(train.main, folder, *SYNTHETIC.split(), "--epochs=3", "--batch_size=8")
    assert done.status == 0 and done.err == "", done.err
    return folder, done.out


def test_an_evaluation_repeats_what_training_said_and_draws(synthetic):
    folder, out = synthetic
    assert "the contents of hidden tokens (series)" in out and "validation relative error" in out
    best = load_checkpoint(folder / "checkpoints" / BEST)["best"]
    done = run(inference.main, folder, "--model_path", f"checkpoints/{BEST}", "--split=val", "--analyze")
    assert done.status == 0, done.err
    results = json.loads((folder / "results" / "results.json").read_text())
    assert results["relative_error"] == pytest.approx(best["val_relative_error"], rel=1e-6)
    assert results["loss"] == pytest.approx(best["val_loss"], rel=1e-6)
    assert {"reconstruction_error.png", "examples.png", "attention.png", "latents.png"} <= set(results["figures"])
    assert all((folder / "results" / name).stat().st_size > 5000 for name in results["figures"])


def test_a_model_of_contents_predicts_nothing(synthetic):
    model, _ = load_model(synthetic[0] / "checkpoints" / BEST)
    with pytest.raises(UserError, match="a model of --task reconstruct .* train one for another task"):
        predict(model, [np.zeros((4, 4))])


def test_a_checkpoint_whose_task_is_of_other_modalities_is_refused(synthetic):
    checkpoint = load_checkpoint(synthetic[0] / "checkpoints" / BEST)
    modalities = checkpoint["data"]["task"]["modalities"]
    modalities["text"] = modalities.pop("series")
    with pytest.raises(UserError, match=r"knows contents of \{'text': 4\}, its model answers \{'series': 4\}"):
        equipped_model(checkpoint)


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
    assert run(train.main, tmp_path, "--resume", "--mask_ratio=0.25").status == 2


def test_regular_series_are_learnt_without_labels(tmp_path):
    """A file without a column of labels: hidden steps of waves are answered far better than by the mean."""
    rng, lines = np.random.default_rng(0), ["id,a,b"]
    for number in range(120):
        phase = rng.uniform(0, 2 * np.pi)
        lines += [f"{number},{math.sin(phase + t / 3):.4f},{math.cos(phase + t / 3):.4f}" for t in range(20)]
    (tmp_path / "waves.csv").write_text("\n".join(lines) + "\n")
    words = "--dataset=sequences --task=reconstruct --data_path=waves.csv --mask_ratio=0.3 --epochs=25 --d_model=32"
    done = run(train.main, tmp_path, *TINY.split(), *words.split())
    assert done.status == 0 and done.err == "", done.err
    test = load_checkpoint(tmp_path / "checkpoints" / LAST)["progress"]["test"]
    assert test["relative_error"] < 0.3


def test_texts_are_answered_byte_by_byte(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "aaaaaaaaaaaa\nbbbbbbbbbbbb\ncccccccccccc\n" * 20)
    words = "--dataset=text --task=reconstruct --data_path=a.csv --epochs=12 --batch_size=8"
    assert run(train.main, tmp_path, *TINY.split(), *words.split()).status == 0
    done = run(inference.main, tmp_path, "--model_path", f"checkpoints/{BEST}")
    assert done.status == 0, done.err
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["text_accuracy"] > 0.9 > 0.5 > results["baseline_text_accuracy"]
    assert results["text_cross_entropy"] < 0.5 * results["baseline_text_cross_entropy"]
    assert (tmp_path / "results" / "examples.png").stat().st_size > 5000


def test_several_modalities_have_errors_of_their_own(tmp_path):
    rng, lines = np.random.default_rng(0), ["image,text"]
    for number in range(24):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png," if number % 3 == 0 else f",word {number}" if number % 3 == 1 else
                     f"{number}.png,word {number}")  # fmt: skip
    (tmp_path / "all.csv").write_text("\n".join(lines) + "\n")
    words = "--dataset=multimodal --task=reconstruct --data_path=all.csv --epochs=1 --image_size=8 --patch_size=4"
    done = run(train.main, tmp_path, *TINY.split(), *words.split(), "--batch_size=2")
    assert done.status == 0 and done.err == "", done.err
    done = run(inference.main, tmp_path, "--model_path", f"checkpoints/{BEST}", "--split=train")
    assert done.status == 0, done.err
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert {"examples_image.png", "examples_text.png"} <= set(results["figures"])
    assert results["loss"] == pytest.approx(results["image_squared_error"] + results["text_cross_entropy"])


def test_labels_decide_the_split_and_nothing_else(tmp_path):
    """The items held out are those that a classification holds out; the same data without labels are the same data."""
    rng, rows = np.random.default_rng(0), []
    for number in range(40):
        rows += [(number, "ab"[number % 4 == 0], f"{rng.normal():.3f}") for _ in range(6)]
    (tmp_path / "labelled.csv").write_text("id,label,x\n" + "".join(f"{i},{c},{x}\n" for i, c, x in rows))
    (tmp_path / "bare.csv").write_text("id,x\n" + "".join(f"{i},{x}\n" for i, _, x in rows))

    def ids(name, task):
        path = str(tmp_path / f"{name}.csv")
        splits, _ = load_splits(Settings(dataset_type="sequences", task=task, data_path=path))
        return {split: list(data.ids) for split, data in splits.items()}

    classified = ids("labelled", "classification")
    assert ids("labelled", "reconstruct") == classified != ids("bare", "reconstruct")
