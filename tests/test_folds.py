"""Models of several folds: who validates whom, what they answer together, and runs that are stopped or killed."""

import csv
import json
import re
import shutil
import signal
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import before_step, called, end, in_two_processes, output, stamp, wait_until
from test_resume import MODEL, SEQUENCES, assert_same, log_of_file

import export
import inference
import plots
import run_log
import train
from checkpoint import BEST, LAST, build_model, load_checkpoint
from config import Settings
from data_utils import fold_split, load_splits
from ensemble import Ensemble
from inference import load_model, predict
from messages import UserError
from tasks import Classification, MultiLabel, Regression, Tagging

FOLDS = f"{SEQUENCES} --epochs=2 --batch_size=8 --amp=off --folds=3"  # 40 training samples: 5 steps an epoch
ITEMS = [np.random.default_rng(0).normal(size=(length, 4)).astype(np.float32) for length in (5, 9, 12)]
NAMES = [f"fold_{fold}" for fold in (1, 2, 3)]


# --- The folds -------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_each_sample_validates_one_model_and_a_group_is_never_on_both_sides(data):
    number = data.draw(st.integers(2, 5))
    strata = np.repeat(np.arange(3), data.draw(st.tuples(*[st.integers(number, 15)] * 3)))
    groups = None
    if data.draw(st.booleans()):
        groups = [f"group {i % data.draw(st.just(3 * number))}" for i in range(len(strata))]
    parts = [fold_split(strata, groups, Settings(folds=number, fold=1 + i)) for i in range(number)]
    held_out = np.concatenate([held for _, held in parts])
    assert sorted(held_out) == list(range(len(strata)))
    for kept, held in parts:
        assert sorted([*kept, *held]) == list(range(len(strata)))
        if groups:
            assert not {groups[i] for i in kept} & {groups[i] for i in held}
        else:
            for stratum in range(3):
                share = (strata == stratum).sum() / number
                assert share - 1 < (strata[held] == stratum).sum() < share + 1


def write_series(path, labels, groups=None, channels=2):
    """A table of series of 6 steps, whose values tell the item's number."""
    rng = np.random.default_rng(0)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *[f"x{c}" for c in range(channels)], "label", *(["patient"] if groups else [])])
        for number, label in enumerate(labels):
            for _ in range(6):
                values = rng.normal(number, 1, channels).round(3)
                writer.writerow([f"s{number}", *values, label, *([groups[number]] if groups else [])])


def test_what_prepares_the_inputs_is_the_same_in_all_folds_and_targets_are_learnt_from_the_rest(tmp_path):
    groups = [f"p{number // 3}" for number in range(36)]
    write_series(tmp_path / "s.csv", [number * 1.5 for number in range(36)], groups)
    asked = Settings(dataset_type="sequences", data_path=str(tmp_path / "s.csv"), task="regression", folds=3,
                     group_column="patient", augment=True, series_shift=0.1)  # fmt: skip
    whole, about = load_splits(asked)
    assert set(whole) == {"train", "test"} and about["split_sizes"] == {"train": 27, "test": 9, "val": 0}
    tokens = dict(zip(whole["train"].ids, whole["train"].sequences, strict=True))
    seen = []
    for fold in (1, 2, 3):
        splits, known = load_splits(Settings(**{**vars(asked), "fold": fold}))
        assert known["adapters"] == about["adapters"]
        ids = {name: list(split.ids) for name, split in splits.items()}
        assert sorted(ids["train"] + ids["val"]) == sorted(tokens) and ids["test"] == list(whole["test"].ids)
        patients = {name: {int(one[1:]) // 3 for one in found} for name, found in ids.items()}
        assert not patients["train"] & patients["val"] and not patients["test"] & patients["val"]
        assert any("none of them in two" in note for note in known["notes"])
        labels = [1.5 * int(one[1:]) for one in ids["train"]]
        assert known["task"]["mean"] == [pytest.approx(np.mean(labels))]  # the fold's own labels say nothing
        for one, sequence in zip(splits["val"].ids, splits["val"].sequences, strict=True):
            assert torch.equal(sequence, tokens[one])
        assert [float(label[0]) for label in splits["val"].labels] == [1.5 * int(one[1:]) for one in ids["val"]]
        assert hasattr(splits["train"], "change") and not hasattr(splits["val"], "change")  # augmented, and not
        seen += ids["val"]
    assert sorted(seen) == sorted(tokens)


def test_samples_that_lack_a_modality_keep_what_they_have(tmp_path):
    texts = [f"text number {number}" if number % 3 else "" for number in range(30)]
    for number in range(30):
        np.save(tmp_path / f"{number}.npy", np.full((4, 1), number, np.float32))
    lines = [{"id": f"s{n}", "text": texts[n] or None, "series": f"{n}.npy", "label": "ab"[n % 2]} for n in range(30)]
    lines = [{key: value for key, value in line.items() if value is not None} for line in lines]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen = {"dataset_type": "multimodal", "data_path": str(tmp_path / "all.jsonl"), "folds": 4}
    adapter = load_splits(Settings(**chosen))[1]["adapters"]["series"]
    for fold in (1, 2, 3, 4):
        splits, _ = load_splits(Settings(**chosen, fold=fold))
        for split in splits.values():
            for id, item in zip(split.ids, (split[i] for i in range(len(split))), strict=True):
                number = int(id[1:])
                value = item["input"]["series"][0, 0] * adapter["std"][0] + adapter["mean"][0]
                assert float(value) == pytest.approx(number, abs=1e-3)
                found = item["input"].get("text")
                assert (found is None) == (not texts[number])
                assert found is None or bytes(found[:, 0].byte().tolist()).decode() == texts[number]
                assert item["label"] == number % 2


# --- What the models answer together ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3), (4, 7, 3)])
def test_the_mean_of_probabilities_of_classes(shape):
    logits = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    task = (Tagging if len(shape) == 3 else Classification)(["a", "b", "c"])
    found = task.mean_output(list(logits), [task] * 5)
    torch.testing.assert_close(found.softmax(-1), logits.softmax(-1).mean(0))
    torch.testing.assert_close(found.exp(), found.softmax(-1))


def test_the_mean_of_probabilities_of_labels_and_of_their_thresholds():
    logits = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 8
    task = MultiLabel(["a", "b"])
    torch.testing.assert_close(task.mean_output(list(logits), [task] * 3).sigmoid(), logits.sigmoid().mean(0))
    members = [MultiLabel(["a", "b"], [0.1, 0.5]), MultiLabel(["a", "b"], [0.3, 0.6])]
    assert task.of_members(members).thresholds == [pytest.approx(0.2), pytest.approx(0.55)]


def test_the_mean_of_numbers_that_are_standardised_by_different_data():
    members = [Regression(["x", "y"], [1.0, -50.0], [2.0, 0.1]), Regression(["x", "y"], [3.0, -51.0], [0.5, 0.2])]
    whole = Regression(["x", "y"], [2.0, -50.4], [1.5, 0.15])
    outputs = [torch.randn(4, 2, dtype=torch.float64) for _ in members]
    numbers = [output.numpy() * task.std + task.mean for output, task in zip(outputs, members, strict=True)]
    found = whole.rows(whole.mean_output(outputs, members), torch.zeros(4, 2))["predicted"]
    np.testing.assert_allclose(found, np.mean(numbers, 0), rtol=1e-12)


# --- A run -----------------------------------------------------------------------------------------------------------


def quick(patch):
    patch.setattr(run_log, "tensorboard_writer", lambda *_: None)
    patch.setattr(plots, "plot_training_curves", lambda history, path, *_: path.write_text("curves"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of three folds that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        patch.chdir(folder)
        assert train.main(FOLDS.split()) == 0
    return folder


def assert_same_folds(folder, other):
    """Two runs of all folds that have ended, to the last bit."""
    for name in (*NAMES, "."):
        for file in (BEST, LAST):
            assert_same(*(load_checkpoint(place / "checkpoints" / name / file) for place in (folder, other)), file)
    for name in NAMES:
        assert_same(*(log_of_file(place / "checkpoints" / name / "log.jsonl") for place in (folder, other)))
        assert (folder / "checkpoints" / name / "training_curves.png").exists()


def test_the_answer_is_the_mean_of_models_that_are_ordinary_runs(whole, run, capsys):
    together = load_model(whole / "checkpoints" / BEST)[0]
    members = [load_model(whole / "checkpoints" / name / BEST)[0] for name in NAMES]
    assert isinstance(together, Ensemble)
    shares = [[list(one["probabilities"].values()) for one in predict(model, ITEMS)] for model in members]
    found = [list(one["probabilities"].values()) for one in predict(together, ITEMS)]
    np.testing.assert_allclose(found, np.mean(shares, 0), rtol=1e-5)
    x = torch.from_numpy(ITEMS[1])[None]
    maps = [model(x, return_attention=True)[1] for model in (together, *members)]
    torch.testing.assert_close(maps[0][0], torch.stack([each[0] for each in maps[1:]]).mean(0))
    torch.testing.assert_close(together.pooled_latents(x), torch.cat([model.pooled_latents(x) for model in members], 1))

    program = export.trace(together, False).module()
    torch.testing.assert_close(program(x, torch.ones(1, 9, dtype=torch.bool)), together(x))

    alone = run(f"{FOLDS} --fold=2")  # the model of one fold is also a run of its own
    assert alone.status == 0 and "test accuracy" not in alone.out
    a, b = (load_checkpoint(path)["model"] for path in (Path("checkpoints", BEST), whole / "checkpoints/fold_2" / BEST))
    assert_same(a, b)


def test_the_estimate_stands_beside_the_test_figure(whole, monkeypatch, capsys):
    monkeypatch.chdir(whole)
    values = []
    for name in NAMES:
        lines = log_of_file(whole / "checkpoints" / name / "log.jsonl")
        best = max(lines, key=lambda line: (line["val_accuracy"], -line["val_loss"]))
        values.append(best["val_accuracy"])
        progress = load_checkpoint(whole / "checkpoints" / name / LAST)["progress"]
        assert progress["test"] == {} and progress["best"]["epoch"] == best["epoch"]  # no fold is tested by itself
    done = called(capsys, train.main, ["--resume"])
    assert done.status == 0 and "nothing is left to do: all 3 models have done 2 epochs" in done.out
    done = called(capsys, inference.main, ["--model_path", f"checkpoints/{BEST}", "--analyze"])
    assert done.status == 0, done.err
    results = json.loads(Path("results/results.json").read_text())
    assert results["folds"]["values"] == values and results["folds"]["metric"] == "accuracy"
    assert results["folds"]["mean"] == pytest.approx(statistics.mean(values))
    assert results["folds"]["std"] == pytest.approx(statistics.stdev(values))
    assert f"accuracy {results['folds']['mean']:.4f}, standard deviation {results['folds']['std']:.4f}" in done.out
    assert results["accuracy"] == load_checkpoint(f"checkpoints/{LAST}")["test"]["accuracy"]
    assert {"attention.png", "latents.png"} <= {path.name for path in Path("results").iterdir()}
    done = called(capsys, inference.main, ["--model_path", f"checkpoints/{BEST}", "--split", "val"])
    assert done.status == 2 and "the mean of 3 models has no validation data of its own" in done.err
    done = called(capsys, inference.main, ["--model_path", f"checkpoints/fold_2/{BEST}", "--split", "val"])
    assert done.status == 0 and json.loads(Path("results/results.json").read_text())["accuracy"] == values[1]
    done = called(capsys, inference.main, ["--model_path", f"checkpoints/{LAST}"])
    assert done.status == 2 and "is one from which a run of several models is resumed" in done.err
    shutil.rmtree("results")


@pytest.mark.parametrize("step", [3, 15, 29])
def test_a_run_that_is_stopped_in_any_fold_ends_as_the_unbroken_one(whole, run, monkeypatch, tmp_path, step):
    with monkeypatch.context() as patch:
        before_step(patch, step, lambda: signal.raise_signal(signal.SIGINT))
        done = run(FOLDS)
        assert done.status == 130 and f"train.py --resume checkpoints/{LAST}" in done.out
    fold = 1 + step // 10
    assert done.out.rstrip().splitlines()[-1].startswith(f"SIGINT: saved checkpoints/fold_{fold}/{LAST}")
    done = run("--resume")
    assert done.status == 0, done.err
    assert done.out.count("its run has ended") == fold - 1
    assert_same_folds(tmp_path, whole)


def test_a_run_that_is_killed_ends_as_the_unbroken_one(whole, start, tmp_path):
    folder, flags = tmp_path / "killed", FOLDS
    for name in ("fold_1", "fold_3"):
        last = folder / "checkpoints" / name / LAST
        before = stamp(last)
        process = start(folder, flags)
        wait_until(lambda last=last, before=before: stamp(last) != before, process)
        process.kill()
        assert end(process) == -signal.SIGKILL, output(folder)
        flags = "--resume"
    assert end(start(folder, "--resume")) == 0, output(folder)
    assert_same_folds(folder, whole)


def test_a_longer_run_goes_on_in_all_folds_and_a_new_one_moves_the_old_aside(whole, run, tmp_path, capsys):
    shutil.copytree(whole / "checkpoints", "checkpoints")
    before = load_checkpoint(f"checkpoints/{BEST}")
    longer = run("--resume --epochs=3")
    assert longer.status == 0 and longer.out.count("num_epochs changed from 2 to 3") == 3
    after = load_checkpoint(f"checkpoints/{BEST}")
    assert after["epoch"] > before["epoch"] and after["settings"]["num_epochs"] == 3
    refused = run("--resume --folds=4")
    assert refused.status == 2 and "folds: cannot change on resume, the checkpoint has 3, the flag 4" in refused.err
    single = run(f"{SEQUENCES} --epochs=1 --amp=off")
    assert single.status == 0
    (kept,) = Path("checkpoints").glob("run_until_*")
    assert {BEST, LAST, "settings.json", *NAMES} <= {path.name for path in kept.iterdir()}
    assert not [name for name in NAMES if Path("checkpoints", name).exists()]
    moved = called(capsys, inference.main, ["--model_path", kept / BEST])
    assert moved.status == 0


@pytest.mark.slow
def test_two_processes_train_the_same_models(whole, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shown = in_two_processes(f"{FOLDS} --dropout=0")
    assert shown.count("fold 3 of 3") == 1
    monkeypatch.chdir(whole)
    alone = tmp_path / "alone"
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        assert train.main([*FOLDS.split(), "--dropout=0", f"--checkpoint_dir={alone}", f"--log_dir={tmp_path}/r"]) == 0
    a, b = (load_checkpoint(folder / BEST) for folder in (tmp_path / "checkpoints", alone))
    assert [one["best"]["val_accuracy"] for one in a["members"]] == [
        one["best"]["val_accuracy"] for one in b["members"]
    ]
    for name, weights in a["model"].items():
        torch.testing.assert_close(weights, b["model"][name], rtol=1e-3, atol=1e-4)


# --- Tasks, and the user's own data ----------------------------------------------------------------------------------


def test_numbers_are_answered_in_the_users_units(run, capsys):
    write_series("s.csv", [number * 1.5 + 100 for number in range(40)])
    done = run(f"--dataset=sequences --data_path=s.csv --task=regression {MODEL} --epochs=1 --amp=off --folds=2")
    assert done.status == 0, done.err
    assert re.search(r"each on its own fold: validation rmse \d.*, standard deviation .* over 2 folds", done.out)
    assert re.search(r"all of them together: test rmse .*the training mean as answer: ", done.out)
    models = [load_model(Path("checkpoints", name, BEST))[0] for name in (".", "fold_1", "fold_2")]
    series = np.random.default_rng(1).normal(20, 1, (6, 2))
    whole, *members = (predict(model, [series])[0]["value"] for model in models)
    assert whole == pytest.approx(np.mean(members), rel=1e-5)
    done = called(capsys, inference.main, ["--model_path", f"checkpoints/{BEST}", "--input", "s.csv"])
    assert done.status == 0 and len(Path("results/predictions.csv").read_text().splitlines()) == 41


def test_labels_and_steps_are_answered_too(run):
    rng = np.random.default_rng(0)
    true = rng.random((60, 2)) < 0.5
    np.savez("labels.npz", x=rng.normal(0, 1, (60, 4, 2)) + true[:, None], y=true.astype(int))
    flags = f"--dataset=sequences --data_path=labels.npz --task=multilabel --tune_thresholds {MODEL} --epochs=1"
    done = run(f"{flags} --amp=off --folds=2")
    assert done.status == 0 and "validation macro f1" in done.out
    checkpoint = load_checkpoint(f"checkpoints/{BEST}")
    own = [one["task"]["thresholds"] for one in checkpoint["members"]]
    np.testing.assert_allclose(checkpoint["data"]["task"]["thresholds"], np.mean(own, 0))
    done = run(f"{SEQUENCES} --task=tagging --epochs=1 --amp=off --folds=2")
    assert done.status == 0, done.err
    (answer,) = predict(load_model(f"checkpoints/{BEST}")[0], ITEMS[:1])
    assert len(answer["classes"]) == 5


def test_from_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    items = [{"input": np.full((5, 1), n % 2, np.float32), "label": n % 2} for n in range(24)]
    small = {"model_size": "tiny", "d_model": 16, "num_heads": 2, "num_latents": 4, "num_self_attention_layers": 1}
    asked = Settings(**small, num_epochs=1, folds=2, amp="off")
    result = train.train(asked, data={"train": items}, class_names=["falls", "rises"])
    assert isinstance(result.model, Ensemble) and result.checkpoint == Path("checkpoints", BEST)
    assert [line["fold"] for line in result.history] == [1, 2] and len(result.best["values"]) == 2
    assert set(result.splits) == {"train", "test"} and 0 <= result.test["accuracy"] <= 1
    assert len(predict(result.model, [items[0]["input"]])) == 1
    with pytest.raises(UserError, match="folds: data has items of its own for validation"):
        train.train(asked, data={"train": items, "val": items[:4]}, class_names=["falls", "rises"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--folds=3 --task=reconstruct", "folds: --task reconstruct has no folds"),
        ("--fold=1", "fold: 1 of no folds; give --folds"),
        ("--folds=3 --fold=4", "fold: 4 of 3 folds"),
        ("--folds=1", "--folds: expected a whole number (models) of at least 2 and at most 100"),
        ("--folds=30", "folds: 60 samples, of which no class has more than 20 samples, cannot be parted into 30 folds; "
                       "take at most --folds 20"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_a_line(run, flags, says):
    done = run(f"{SEQUENCES} --epochs=1 {flags}")
    assert done.status == 2 and says in done.err and len(done.err.splitlines()) == 1
    assert not Path("checkpoints").exists()


def test_too_few_groups_and_no_effect_of_val_fraction(run):
    write_series("s.csv", [f"c{n % 2}" for n in range(24)], [f"p{n // 6}" for n in range(24)])
    flags = f"--dataset=sequences --data_path=s.csv --group_column=patient {MODEL} --epochs=1"
    done = run(f"{flags} --folds=4")
    assert done.status == 2 and "cannot be parted into 4 folds; take at most --folds 3" in done.err
    done = run(f"{flags} --folds=3 --val_fraction=0.3")
    assert done.status == 0 and "val_fraction (flag) has no effect: it needs folds none, not 3" in done.out


# --- Files that anybody may have written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(members=c["members"] * 40), "members must be a list of 100 at most"),
        (lambda c: c.update(members=c["members"][:2]), "unexpected 'members.2."),
        (lambda c: c.update(members=c["members"][:1]), "is one from which a run of several models is resumed"),
        (lambda c: c.update(members="many"), "members must be a list"),
        (lambda c: c["members"][1].pop("task"), "members[1].task is missing"),
        (lambda c: c["members"][1].update(task={"kind": "regression", "target_names": ["x"]}), "do not answer what"),
        (lambda c: c["members"][1].update(task={"kind": "classification", "class_names": ["a", "b"]}), "do not answer"),
        (lambda c: c["model"].pop("members.1.classifier.bias"), "missing members.1.classifier.bias"),
        (lambda c: c["model"].update({"members.1.classifier.bias": torch.full((3,), torch.nan)}), "NaN or infinity"),
        (lambda c: c["model"].update({n: c["model"][n.replace("members.1.", "members.0.")] for n in c["model"]}),
         "they claim"),
        (lambda c: c["model_args"].update(d_model=100_000), "do not fit its models"),
        (lambda c: c.pop("members"), "do not fit its model"),
    ],
)  # fmt: skip
def test_a_forged_mean_of_models_is_refused(whole, tmp_path, change, says):
    contents = torch.load(whole / "checkpoints" / BEST, weights_only=True)
    change(contents)
    torch.save(contents, tmp_path / "forged.pth")
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "forged.pth")
    assert says in str(caught.value) and len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["data"].pop("fingerprints"), "data.fingerprints is missing"),
        (lambda c: c.pop("test"), "test is missing"),
        (lambda c: c["settings"].update(folds=None), "it holds the mean of several models"),
        (lambda c: c["settings"].update(fold=1), "it holds the mean of several models"),
        (lambda c: c["settings"].update(log_dir="/tmp/outside"), "outside the current folder"),
        (lambda c: c["data"]["split_sizes"].update(train=41), "the data have changed (split_sizes were"),
    ],
)
def test_a_forged_place_to_resume_from_is_refused(whole, run, change, says):
    shutil.copytree(whole / "checkpoints", "checkpoints")
    contents = torch.load(f"checkpoints/{LAST}", weights_only=True)
    change(contents)
    torch.save(contents, f"checkpoints/{LAST}")
    done = run("--resume")
    assert done.status == 2 and says in done.err, done.err
    done = run(f"--resume checkpoints/{BEST}")
    assert done.status == 2 and f"the run is resumed from {LAST}" in done.err


def test_a_new_run_starts_from_one_of_the_models(whole, run):
    done = run(f"{SEQUENCES} --epochs=1 --init_from={whole / 'checkpoints' / BEST}")
    assert done.status == 2 and "is the mean of several models; name the model of one fold, such as" in done.err
    done = run(f"{SEQUENCES} --epochs=1 --amp=off --folds=2 --init_from={whole / 'checkpoints' / 'fold_1' / BEST}")
    assert done.status == 0, done.err
    assert build_model(load_checkpoint(f"checkpoints/{BEST}"))
