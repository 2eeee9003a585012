"""A class for each step beside what else makes or moves tokens: stems, random changes, other models, own code."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import export
import train
from adapters import AugmentedSeries, PretrainedTextAdapter, TextAdapter
from augmentation import SeriesAugmentation
from batches import UNLABELLED
from checkpoint import BEST, load_checkpoint
from config import Settings
from inference import load_model, predict
from messages import UserError
from perceiver_model import PerceiverModel

STEMS = [
    {"stem": "windows", "window": 4, "stride": 1}, {"stem": "windows", "window": 7, "stride": 3},
    {"stem": "conv", "stride": 4},
]  # fmt: skip
SMALL = {"d_model": 16, "num_heads": 2, "num_latents": 4, "num_self_attention_layers": 1}
TINY = {"model_size": "tiny", **SMALL, "ema_decay": 0.0, "learning_rate": 5e-3, "amp": "off", "num_epochs": 2}


@pytest.mark.parametrize("stem", STEMS)
def test_every_step_is_answered_whatever_the_stem_and_the_padding(stem):
    torch.manual_seed(0)
    model = PerceiverModel(3, 5, head="tokens", **SMALL, **stem).double().eval()
    x, mask = torch.randn(2, 23, 3).double(), torch.ones(2, 23, dtype=torch.bool)
    for length in range(1, 23):
        mask[1] = torch.arange(23) < length
        answers = model(x, mask)
        assert answers.shape == (2, 23, 5) and (answers[1, length:] == 0).all()
        torch.testing.assert_close(answers[1, :length], model(x[1:, :length])[0])


@pytest.mark.parametrize("stem", STEMS)
def test_the_token_of_a_step_is_that_whose_middle_is_nearest(stem):
    model = PerceiverModel(3, 5, head="tokens", **SMALL, **stem)
    (features,) = model.modalities.values()
    found = features.stem.answering(20, features.num_tokens(20))[0].numpy()
    window = stem.get("window", stem["stride"])
    middles = np.arange(features.num_tokens(20)) * stem["stride"] + (window - 1) / 2
    distances = np.abs(np.arange(20)[:, None] - middles)
    assert (distances[np.arange(20), found] == distances.min(1)).all()


def test_labels_move_with_their_steps():
    """The values are the labels themselves, so they must agree after a change of time."""
    labels = np.repeat([0, 1, 2], 8)
    change = SeriesAugmentation(shift=0.3, warp=0.5, crop=0.2)
    data = AugmentedSeries([torch.from_numpy(labels).float()[:, None]], np.empty(1, object), ["a"], change, (), 0, True)
    data.labels[0] = labels
    moved = set()
    for epoch in range(10):
        data.set_epoch(epoch)
        item = data[0]
        assert len(item["label"]) == 24
        assert (np.abs(item["input"][:, 0].numpy() - item["label"]) <= 0.5 + 1e-6).all()
        moved.add(tuple(item["label"]))
    assert len(moved) > 5


def test_the_published_tokens_answer_for_each_character():
    """Also for those of a special symbol that a text spells out."""
    adapter, text = PretrainedTextAdapter(), "Zoë [MASK] 서울"
    target = np.arange(len(text)) % 4
    target[4:10] = 2  # the symbol has one answer
    tokens = adapter(text)
    of_tokens = adapter.of_tokens(text, target)
    assert len(of_tokens) == len(tokens) and of_tokens[0] == of_tokens[-1] == UNLABELLED
    assert (of_tokens != UNLABELLED).sum() == len(text) - 5
    assert adapter.of_units(tokens, of_tokens).tolist() == target.tolist()
    assert adapter.shown_text(tokens) == text == TextAdapter().shown_text(TextAdapter()(text))


def series(number=60, length=12):
    rng = np.random.default_rng(0)
    labels = [np.repeat(rng.integers(0, 2, length // 4), 4) for _ in range(number)]
    return [{"input": label[:, None] + rng.normal(0, 0.3, (length, 2)), "label": label} for label in labels]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_own_items_have_a_label_for_each_token():
    settings = Settings(task="tagging", max_seq_len=10, **TINY)
    items = series()
    result = train.train(replace(settings, num_epochs=12), {"train": items}, class_names=["low", "high"])
    assert result.test["accuracy"] > 0.8
    answers = predict(result.model, [items[0]["input"], np.zeros((3, 2))])
    assert [len(answer["classes"]) for answer in answers] == [10, 3]
    assert result.splits["train"][0]["label"].shape == (10,)
    for item in items:
        item["label"] = ["low" if one == 0 else "high" for one in item["label"]]
    again = train.train(settings, {"train": items})
    assert again.model.task.class_names == ["high", "low"]
    with pytest.raises(UserError, match=r"train\[0\]: label 1 is no list; --task tagging needs a label for each token"):
        train.train(settings, {"train": [{"input": np.zeros((3, 2)), "label": 1}] * 20})
    items[3]["label"] = items[3]["label"][:-1]
    with pytest.raises(UserError, match=r"train\[3\]: 11 labels of 12 tokens"):
        train.train(settings, {"train": items})


def test_own_items_are_reconstructed_without_labels_and_a_run_starts_from_that():
    items = [{"input": item["input"]} for item in series()]
    found = train.train(Settings(task="reconstruct", checkpoint_dir="first", **TINY), {"train": items})
    assert found.model.head == "hidden" and "relative_error" in found.test
    words = "--dataset sequences --data_path a.npz --epochs 2 --amp off --ema_decay 0"
    x, y = np.stack([item["input"] for item in series()]), np.stack([item["label"] for item in series()])
    np.savez("a.npz", x=x, y=y[:, 0])
    np.savez("b.npz", x=x, y=y)
    assert train.main([*words.split(), "--task=reconstruct", "--checkpoint_dir=second", "--d_model=16"]) == 0
    start = ["--init_from", f"second/{BEST}"]
    assert train.main([*words.split(), *start, "--checkpoint_dir", "third"]) == 0
    old, new = (load_checkpoint(f"{folder}/{BEST}") for folder in ("second", "third"))
    assert new["model_args"]["head"] == "mean" and "output.queries" not in new["model"]
    assert new["model"]["encoder.latents"].shape == old["model"]["encoder.latents"].shape
    frozen = [*words.split(), *start, "--freeze", "encoder", "--checkpoint_dir", "fourth"]
    frozen += ["--task", "tagging", "--data_path", "b.npz"]
    assert train.main(frozen) == 0
    kept = load_checkpoint(f"fourth/{BEST}")["model"]
    assert torch.equal(kept["encoder.latents"], old["model"]["encoder.latents"])


def test_windows_and_convolutions_answer_for_each_step(capsys):
    x, y = np.stack([item["input"] for item in series()]), np.stack([item["label"] for item in series()])
    np.savez("b.npz", x=x, y=y)
    words = "--dataset sequences --data_path b.npz --task tagging --epochs 2 --amp off --ema_decay 0 --d_model 16"
    for number, stem in enumerate(["--series_window=4", "--stem=conv"]):
        changes = ["--series_shift=0.2", "--epoch_samples=80"]
        assert train.main([*words.split(), stem, *changes, "--checkpoint_dir", f"c{number}"]) == 0
        model, _ = load_model(f"c{number}/{BEST}")
        answers = predict(model, [x[0], x[1, :5]])
        assert [len(answer["classes"]) for answer in answers] == [12, 5]
        assert export.main(["--model_path", f"c{number}/{BEST}", "--output", "m.pt2", "--overwrite"]) == 0
        assert ("it takes series of 5 tokens or more; pad shorter" in capsys.readouterr().out) == (number == 0)
        log = [json.loads(line) for line in Path(f"c{number}/log.jsonl").read_text().splitlines()]
        assert 0 <= log[-1]["val_accuracy"] <= 1
    with pytest.raises(SystemExit):
        train.main([*words.split(), "--task=reconstruct", "--series_window=4", "--checkpoint_dir", "d"])
    assert "reconstruct asks for single tokens, which --stem conv and --series_window join" in capsys.readouterr().err
