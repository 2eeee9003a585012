"""--select auto: what it chooses between, by which figures, and that it is resumed without repeating what is done."""

import io
import json
import math
import re
import shutil
import signal
import statistics
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import before_step, called
from test_folds import quick
from test_resume import SEQUENCES, assert_same, log_of_file

import folds
import inference
import selection
import train
from checkpoint import BEST, LAST, load_checkpoint
from config import CANDIDATES, FIELDS, Settings, resolve
from messages import UserError
from tasks import Classification

SHORT = f"{SEQUENCES} --epochs=2 --batch_size=8 --amp=off"
SELECT = f"{SHORT} --select=auto --select_share=0.5"  # 3 candidates x 3 folds x 1 epoch of 5 steps


def names(steps=100, **flags):
    settings, sources = resolve(flags=flags)
    train = SimpleNamespace(lengths=np.array([1, steps, 500]))
    return {one["name"]: one["settings"] for one in selection.candidates(settings, sources, train)}


def test_the_candidates_are_those_of_the_table_and_keep_what_was_given():
    found = names(dataset_type="sequences")
    assert list(found) == list(CANDIDATES["sequences"]) and found["windows_unplaced"]["series_window"] == 16
    assert all(one["num_epochs"] == 32 and one["epoch_samples"] == 1600 for one in found.values())
    found = names(dataset_type="sequences", num_epochs=7, series_shift=0.3)
    assert all("num_epochs" not in one and "series_shift" not in one for one in found.values())
    # A token that was given is everybody's, and what then is the same is left out
    found = names(dataset_type="sequences", series_window=4)
    assert not any(selection.TOKENS & set(one) for one in found.values())
    assert list(found) == ["unplaced", "circular", "windows_unplaced"]
    assert list(names(dataset_type="sequences", series_window=4, augment=False)) == ["windows_unplaced", "circular"]
    assert list(names(dataset_type="text", dropout=0.2)) == ["conv", "bytes", "mixup"]
    with pytest.raises(UserError, match="select: what was given leaves nothing to choose between"):
        names(dataset_type="text", stem="conv", dropout=0.2, mixup=0.1)


def test_short_series_have_candidates_of_their_own():
    assert list(names(99, dataset_type="sequences")) == ["unchanged", "unplaced_unchanged", "unplaced"]
    assert "unchanged" not in names(100, dataset_type="sequences")
    assert list(names(99, dataset_type="sequences", augment=False)) == ["unchanged", "unplaced_unchanged"]
    assert list(names(99, dataset_type="text")) == list(names(100, dataset_type="text"))


@pytest.mark.parametrize("steps", [99, 100])
@pytest.mark.parametrize("dataset", ["sequences", "images", "text", "multimodal", "digits", "synthetic"])
def test_every_candidate_is_a_run_that_can_be_started_by_flags(dataset, steps):
    settings, sources = resolve(flags={"dataset_type": dataset})
    for one in selection.candidates(settings, sources, SimpleNamespace(lengths=np.array([steps]))):
        short = selection.short_run(settings, one, 2)
        assert (short.fold, short.folds, short.select) == (2, 3, "none")
        assert {name: getattr(short, name) for name in one["settings"] if name != "num_epochs"} == {
            name: value for name, value in one["settings"].items() if name != "num_epochs"
        }
        epochs = one["settings"].get("num_epochs", settings.num_epochs)
        assert short.num_epochs == round(epochs / 5) and short.select_by == "last"
        given = re.findall(r"--(\S+)", selection.flags_of(one))
        changed = [name for name, value in one["settings"].items() if value != FIELDS[name].default]
        assert len(given) == len(changed)


def test_the_best_mean_wins_then_the_lower_loss():
    task, figures = Classification(["a", "b"]), [(0.5, 1), (0.7, 2), (0.7, 1), (None, 0)]
    rows = [{"metric": "accuracy", "mean": mean, "std": 0.0, "loss": loss, "n": 3} for mean, loss in figures]
    assert selection.best(rows, task) == (rows[2], "the best")
    rows = [{"metric": "loss", "mean": mean, "std": None, "loss": mean, "n": 3} for mean in (0.5, 0.3, 0.4)]
    assert selection.best(rows, task) == (rows[1], "the best")
    rows[1]["n"] = 1  # left out after the first fold
    assert selection.best(rows, task) == (rows[2], "the best")


def test_of_candidates_within_a_standard_error_of_the_best_the_first_is_taken():
    task = Classification(["a", "b"])

    def taken(means, deviations, metric="accuracy"):
        pairs = zip(means, deviations, strict=True)
        rows = [{"metric": metric, "mean": mean, "std": std, "loss": 1 - (mean or 0), "n": 3} for mean, std in pairs]
        chosen, why = selection.best(rows, task)
        top = (max if task.higher_is_better[metric] else min)(mean for mean in means if mean is not None)
        assert (why == "the best") == (chosen["mean"] == top)
        return rows.index(chosen)

    error = math.sqrt((0.03**2 + 0.05**2 + 0.01**2) / 3 / 3)  # 0.0197
    assert taken([0.80 - 0.9 * error, 0.80 - 0.5 * error, 0.80], [0.03, 0.05, 0.01]) == 0
    assert taken([0.80 - 1.1 * error, 0.80 - 0.5 * error, 0.80], [0.03, 0.05, 0.01]) == 1
    assert taken([0.80 - 1.1 * error, 0.80 - 1.2 * error, 0.80], [0.03, 0.05, 0.01]) == 2
    assert taken([0.52, 0.50, None], [0.1, 0.1, None], "loss") == 0
    assert taken([0.70, 0.50, 0.51], [0.1, 0.1, 0.1], "loss") == 1


def test_the_better_half_of_many_goes_on():
    task, means = Classification(["a", "b"]), [0.5, 0.9, None, 0.9, 0.6, 0.6]
    rows = [{"name": str(n), "metric": "accuracy", "mean": mean, "loss": n} for n, mean in enumerate(means)]
    assert selection.better_half(rows, task) == {"1", "3", "4"}
    assert selection.better_half(rows[:5], task) == {"1", "3", "4"}


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """(the folder of a run that was never stopped, what it printed, how often test data were looked at)."""
    folder, looked = tmp_path_factory.mktemp("chosen"), []
    tested = train.test
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        patch.chdir(folder)
        patch.setattr(train, "test", lambda *args: looked.append(args[2].select_share) or tested(*args))
        with redirect_stdout(io.StringIO()) as shown:
            assert train.main(SELECT.split()) == 0
    return folder, shown.getvalue(), len(looked)


def test_the_table_is_printed_and_stored_and_the_best_is_trained(chosen, run, monkeypatch, capsys):
    folder, shown, looked = chosen
    assert looked == 1  # test data, by the final run alone
    checkpoint = load_checkpoint(folder / "checkpoints" / BEST)
    rows = checkpoint["data"]["selection"]
    assert [one["name"] for one in rows] == list(CANDIDATES["others"]) and [one["n"] for one in rows] == [3, 3, 3]
    for one in rows:
        lines = [
            log_of_file(folder / "checkpoints" / "select" / one["name"] / f"fold_{fold}" / "log.jsonl")
            for fold in (1, 2, 3)
        ]
        assert [len(line) for line in lines] == [1, 1, 1]
        values = [line[-1]["val_accuracy"] for line in lines]
        assert one["mean"] == pytest.approx(statistics.mean(values))
        assert one["std"] == pytest.approx(statistics.stdev(values))
        assert re.search(rf"^{one['name']} +{one['mean']:.4f} +{one['std']:.4f} +3 +\d+\.\d$", shown, re.M)
    (best,) = [one for one in rows if one["chosen"]]
    assert best["mean"] == max(one["mean"] for one in rows)
    assert f"chosen: {best['name']} (" in shown
    assert not list((folder / "checkpoints" / "select").rglob("*.pth"))
    for name, value in best["settings"].items():
        assert checkpoint["settings"][name] == value

    # The final run is the one that the flags of the candidate start
    flags = [f"--{name}={value}" for name, value in best["settings"].items()]
    assert run(f"{SHORT} --select_by=last {' '.join(flags)}").status == 0
    alone = load_checkpoint(f"checkpoints/{LAST}")
    for part in ("model", "optimizer"):
        assert_same(alone[part], load_checkpoint(folder / "checkpoints" / LAST)[part], part)
    monkeypatch.chdir(folder)
    assert called(capsys, inference.main, ["--model_path", f"checkpoints/{BEST}"]).status == 0
    results = json.loads(Path("results/results.json").read_text())
    assert results["selection"] == rows
    shutil.rmtree("results")
    done = called(capsys, train.main, ["--resume"])
    assert done.status == 0 and "nothing is left to do" in done.out


# Each run begins with a rehearsal, which is counted, too, but for the first one
@pytest.mark.parametrize(("call", "runs", "steps"), [(3 * 6 + 2, 3, 3 * 5 + 2), (9 * 6 + 3, 9, 9 * 5 + 3)])
def test_a_run_that_is_stopped_does_not_repeat_what_is_done(chosen, run, monkeypatch, call, runs, steps):
    """In the second fold's first run, and in the final run."""
    folder, _, _ = chosen
    with monkeypatch.context() as patch:
        before_step(patch, call, lambda: signal.raise_signal(signal.SIGINT))
        done = run(SELECT)
    assert done.status == 130 and f"train.py --resume checkpoints/{LAST}" in done.out, done.err
    done_before = [log.parent for log in Path("checkpoints/select").glob("*/fold_*/log.jsonl")]
    stamps = {place: (place / "log.jsonl").stat().st_mtime_ns for place in done_before}
    assert len(stamps) == runs
    made, add = [], train.StepSums.add
    with monkeypatch.context() as patch:
        patch.setattr(train.StepSums, "add", lambda self, *args: made.append(1) or add(self, *args))
        done = run("--resume")
    assert done.status == 0, done.err
    assert len(made) == 9 * 5 + 2 * 7 - steps  # the final run has 7 steps in each of its two epochs
    assert {place: (place / "log.jsonl").stat().st_mtime_ns for place in stamps} == stamps
    for name in (BEST, LAST):
        pair = [load_checkpoint(place / "checkpoints" / name) for place in (Path(), folder)]
        assert_same(*pair, name)


def test_the_models_of_folds_are_chosen_too(run):
    done = run(f"{SELECT} --folds=2")
    assert done.status == 0, done.err
    assert "select: 3 candidates on 2 folds of the training data, each for 0.5 of its epochs\n" in done.out
    checkpoint = load_checkpoint(f"checkpoints/{BEST}")
    assert len(checkpoint["members"]) == 2 and [one["n"] for one in checkpoint["data"]["selection"]] == [2, 2, 2]
    assert "all of them together: test accuracy" in done.out
    again = run(f"{SHORT} --select=auto --fold=1 --folds=2")
    assert again.status == 0 and "select (flag) has no effect: it needs fold none, not 1" in again.out
    assert "note: the earlier run in checkpoints was moved to" in again.out
    (kept,) = Path("checkpoints").glob("run_until_*")
    assert (kept / "select").is_dir() and not Path("checkpoints/select").exists()
    once_more = run(SELECT)
    assert once_more.status == 0 and once_more.out.count("note: the earlier run in checkpoints was moved to") == 1


def test_the_worse_half_is_trained_on_the_first_fold_alone_where_a_fold_says_enough(run, monkeypatch):
    monkeypatch.setattr(selection, "FEW", 2)
    few = run(SELECT)
    assert few.status == 0 and "of its epochs\n" in few.out
    rows = load_checkpoint(f"checkpoints/{BEST}")["data"]["selection"]
    assert [one["n"] for one in rows] == [3, 3, 3]
    monkeypatch.setattr(train, "SMALL_VALIDATION", 10)  # a third of the training samples are more
    done = run(SELECT)
    assert done.status == 0, done.err
    assert "of its epochs,\n        of which the better half goes on after the first fold\n" in done.out
    rows = load_checkpoint(f"checkpoints/{BEST}")["data"]["selection"]
    assert sorted(one["n"] for one in rows) == [1, 3, 3]
    logs = [log.parent.parent.name for log in Path("checkpoints/select").glob("*/fold_*/log.jsonl")]
    for one in rows:
        assert (
            logs.count(one["name"]) == one["n"]
            and len(re.findall(rf"^ +\d  {one['name']} ", done.out, re.M)) == one["n"]
        )
        if one["n"] == 1:
            first = log_of_file(Path("checkpoints/select") / one["name"] / "fold_1" / "log.jsonl")[-1]["val_accuracy"]
            assert one["mean"] == first and one["std"] is None and not one["chosen"]
    again = run("--resume")
    assert again.status == 0 and "nothing is left to do" in again.out


@pytest.mark.parametrize(("steps", "expected"), [(99, "short series"), (100, "sequences")])
def test_the_length_of_the_training_series_says_which_candidates_there_are(run, steps, expected):
    series = np.random.default_rng(0).normal(size=(12, steps, 1)).astype(np.float32)
    np.savez("series.npz", x=series, y=np.arange(12) % 2)
    np.savez("test.npz", x=series.repeat(3, 1), y=np.arange(12) % 2)
    done = run("--dataset=sequences --data_path=series.npz --test_path=test.npz --select=auto --epochs=1 --batch_size=8"
               " --epoch_samples=8 --d_model=16 --num_latents=4 --num_heads=2 --amp=off")  # fmt: skip
    assert done.status == 0, done.err
    rows = load_checkpoint(f"checkpoints/{BEST}")["data"]["selection"]
    assert [one["name"] for one in rows] == list(CANDIDATES[expected])
    told = "select: 3 candidates for short series (fewer than 100 steps) on 3 folds" in done.out
    assert told == (expected == "short series")


def test_a_resumed_choice_takes_no_setting_that_it_is_choosing(run, monkeypatch):
    with monkeypatch.context() as patch:
        before_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert run(SELECT).status == 130
    done = run("--resume --mixup=0.0")
    assert done.status == 2
    assert "mixup: cannot be given on resume, --select auto is choosing it; start again with it" in done.err
    assert run("--resume --epochs=1").status == 0  # the length of the final run may change, as that of any run


def test_the_command_that_is_told_continues_a_choice_whose_folders_lie_elsewhere(run, monkeypatch, tmp_path_factory):
    place = tmp_path_factory.mktemp("elsewhere")
    with monkeypatch.context() as patch:
        before_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        stopped = run(f"{SELECT} --checkpoint_dir={place}/checkpoints --log_dir={place}/logs")
    told = re.search(r"Continue with: python train.py (.*)", stopped.out)[1]
    done = run(told)
    assert done.status == 0 and "test accuracy" in done.out, done.err


def test_weights_of_candidates_that_a_killed_run_has_left_are_removed(chosen, tmp_path, monkeypatch, capsys):
    shutil.copytree(chosen[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    checkpoint = load_checkpoint(f"checkpoints/{LAST}")
    settings = Settings.from_dict(checkpoint["settings"])
    folds.save_place(settings, checkpoint["data"])  # as a run that is killed just after its choice
    left = Path("checkpoints/select/plain/fold_1") / LAST
    shutil.copy(chosen[0] / "checkpoints" / LAST, left)
    quick(monkeypatch)
    done = called(capsys, train.main, ["--resume"])
    assert done.status == 0 and not left.exists(), done.err


def test_what_is_hidden_has_no_candidates(run):
    done = run("--dataset=digits --select=auto --task=reconstruct")
    assert done.status == 2 and "select: --task reconstruct has no folds" in done.err and "--select out" in done.err


def test_from_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    items = [{"input": np.full((5, 1), n % 2, np.float32), "label": n % 2} for n in range(30)]
    small = {"model_size": "tiny", "d_model": 16, "num_heads": 2, "num_latents": 4, "num_self_attention_layers": 1}
    asked = Settings(**small, num_epochs=1, select="auto", amp="off", dropout=0.2)
    result = train.train(asked, data={"train": items}, class_names=["falls", "rises"])
    rows = result.model.data_info["selection"]
    assert [one["name"] for one in rows] == ["plain", "mixup"]  # the dropout was given
    more = train.train(Settings(**{**vars(asked), "num_epochs": 2}), data={"train": items},
                       class_names=["falls", "rises"], resume="checkpoints/last_model.pth")  # fmt: skip
    assert len(more.history) == 2 and more.model.data_info["selection"] == rows


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["candidates"][0].update(name="../../outside"), "must be a name"),
        (lambda c: c["candidates"][0].update(settings={"log_dir": "/tmp/outside"}), "must be a setting that is chosen"),
        (lambda c: c["candidates"][0].update(settings={"dropout": 7}), "dropout: expected a number"),
        (lambda c: c.update(candidates=[]), "nothing to choose between"),
        (lambda c: c["data"].update(selection=[{"name": "a"}]), "is missing"),
    ],
)
def test_a_forged_place_to_resume_from_is_refused(run, monkeypatch, change, says):
    with monkeypatch.context() as patch:
        before_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert run(SELECT).status == 130
    contents = torch.load(f"checkpoints/{LAST}", weights_only=True)
    change(contents)
    torch.save(contents, f"checkpoints/{LAST}")
    done = run("--resume")
    assert done.status == 2 and says in done.err, done.err
