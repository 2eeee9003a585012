"""Data and adapters of the user's own code: a file that --dataset names, and `train.train` from Python."""

import re
import shutil
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from running import ROOT, before_step, end, in_two_processes, output, succeed, wait_until
from sklearn.linear_model import LinearRegression
from sklearn.metrics import mean_absolute_error
from test_resume import assert_same, assert_same_run, log_of
from torch.utils.data import Dataset, get_worker_info

import inference
import own_data
from adapters import Adapter, ImageAdapter, SeriesAdapter, TextAdapter, describe, from_description
from checkpoint import BEST, LAST, load_checkpoint, save_checkpoint
from config import PYTHON, Settings
from data_utils import create_dataloader, load_splits
from inference import evaluate, load_model, predict
from messages import UserError
from train import train

SMALL = {
    "model_size": "tiny", "d_model": 16, "num_heads": 2, "num_latents": 4, "num_self_attention_layers": 1, "amp": "off",
    "num_epochs": 1,
}  # fmt: skip
FLAGS = " ".join(f"--{name.replace('num_epochs', 'epochs')}={value}" for name, value in SMALL.items())

STEPS = '''
from dataclasses import dataclass
import numpy as np
from adapters import Adapter

DEFAULTS = {"model_size": "tiny", "num_epochs": 2, "batch_size": 16, "learning_rate": 2e-3}

@dataclass(frozen=True)
class Steps(Adapter):
    """A walk (T,) as its steps, scaled."""
    modality = "walk"
    scale: float

    @classmethod
    def fit(cls, raw, settings):
        return cls(float(np.std(np.concatenate([np.diff(walk) for walk in raw]))))

    @property
    def features(self):
        return {"input_dim": 1}

    def __call__(self, walk):
        return np.diff(walk)[:, None] / self.scale

def load_data(settings):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80)
    walks = [np.cumsum(rng.normal(0.5 - label, 1, rng.integers(8, 20))) for label in labels]
    return {"train": [{"input": w, "label": n} for w, n in zip(walks, labels)], "class_names": ["up", "down"],
            "adapters": Steps}
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("run_log.tensorboard_writer", lambda *_: None)
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which the folder of the user's file is added
    return tmp_path


def ramps(number, seed=0, channels=2):
    """Items of class 0, which rise, and 1, which fall, of different lengths."""
    rng, items = np.random.default_rng(seed), []
    for label in rng.integers(0, 2, number):
        ramp = np.linspace(-1, 1, rng.integers(6, 12))[:, None] * (1 - 2 * label)
        noisy = ramp + rng.normal(0, 0.2, (len(ramp), channels))
        items.append({"input": noisy.astype(np.float32), "label": int(label)})
    return items


class Items(Dataset):
    """A Dataset of the user's."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, number):
        return self.items[number]


def inference_of(*flags):
    try:
        return inference.main([*flags])
    except SystemExit as stopped:
        return stopped.code


# --- A file that --dataset names -------------------------------------------------------------------------------------


def documented():
    """The example of docs/data.md."""
    return re.search(r'```python\n("""my_data.py""".*?)```', (ROOT / "docs/data.md").read_text("utf-8"), re.S)[1]


def test_the_documented_example_learns_and_is_evaluated_and_predicts(folder, run, capsys):
    (folder / "my_data.py").write_text(documented())
    result = run("--dataset my_data.py --amp=off --epochs=4")
    assert result.status == 0 and result.err == ""
    assert "data    my_data.py: 216 training, 24 validation, 60 test samples; 3 classes; audio tokens" in result.out
    assert f"next:   python inference.py --model_path checkpoints/{BEST} --dataset my_data.py --analyze" in result.out
    assert re.search(r"learning_rate +0.002 \[per step\] +data set", result.out)
    assert inference_of("--model_path", f"checkpoints/{BEST}", "--dataset", "my_data.py", "--analyze") == 0
    shown = capsys.readouterr().out
    assert float(re.search(r"^accuracy +(\S+)$", shown, re.M)[1]) > 0.9 and "note:" not in shown
    files = {"results.json", "items.csv", "confusion_matrix.png", "attention.png", "latents.png"}
    assert files <= {path.name for path in Path("results").iterdir()}
    assert Path("results/items.csv").read_text().count("whistle ") == 60

    import my_data  # the module that the command loaded

    model, _ = load_model(f"checkpoints/{BEST}", adapters=[my_data.AudioAdapter])
    items = my_data.load_data(None)["train"]
    answers = predict(model, [item["input"] for item in items[:30]])
    right = [answer["label"] == item["label"] for answer, item in zip(answers, items, strict=False)]
    assert np.mean(right) > 0.9 and list(answers[0]["probabilities"]) == ["stays", "rises", "falls"]


def test_a_checkpoint_never_makes_code_run(folder, run, capsys):
    """Not by the name it remembers, not by a path that is forged into it; neither does a file of settings."""
    code = folder / "walks.py"
    code.write_text(STEPS)
    assert run(f"--dataset {code} {FLAGS}").status == 0
    checkpoint = load_checkpoint(f"checkpoints/{LAST}")
    assert checkpoint["settings"]["dataset_type"] == checkpoint["data"]["code"]["name"] == "walks.py"
    assert checkpoint["data"]["adapters"]["walk"].keys() == {"kind", "class", "scale"}
    assert str(folder) not in str({name: checkpoint[name] for name in ("settings", "data", "progress")})
    for name in ("walks.py", "steps.py", "Steps.py"):
        (folder / name).write_text("open('it_ran', 'w')\nraise SystemExit(0)")
    sys.modules.pop("walks")
    checkpoint["settings"]["dataset_type"] = str(code)
    save_checkpoint("checkpoints/forged.pth", {n: v for n, v in checkpoint.items() if n not in ("format", "versions")})
    checkpoint["data"]["adapters"]["walk"]["class"] = "walks.Steps"
    for name in (BEST, LAST, "forged.pth"):
        path = f"checkpoints/{name}"
        says = "error: dataset: the data come from walks.py, a file of your code, which runs only where you name it: "
        assert inference_of("--model_path", path) == 2
        assert capsys.readouterr().err == f"{says}add --dataset path/to/walks.py\n"
        assert run(f"--resume {path} --epochs=2").err == f"{says}add --dataset path/to/walks.py\n"
        (folder / "new.npy").write_bytes(b"")
        assert inference_of("--model_path", path, "--input", "new.npy") == 2
        error = capsys.readouterr().err
        assert "is 'Steps', a class of the user's own code" in error and "--dataset path/to/my_data.py" in error
        with pytest.raises(UserError, match=r"a class of the user's own code.*adapters=\[...\]"):
            load_model(path)
        with pytest.raises(UserError, match="'Steps', a class of the user's own code, there is only Other"):
            load_model(path, adapters=[type("Other", (Adapter,), {})])
    result = run("--config checkpoints/settings.json")
    assert result.status == 2
    assert "settings.json: dataset_type: walks.py is code, which a file of settings does not run" in result.err
    assert not (folder / "it_ran").exists()


def test_a_file_that_changed_is_noted_and_other_data_are_not_resumed(folder, run, capsys):
    Path("walks.py").write_text(STEPS)
    assert run(f"--dataset walks.py {FLAGS}").status == 0
    path = f"checkpoints/{LAST}"
    quiet = run(f"--resume {path} --dataset walks.py --epochs=2")
    assert quiet.status == 0 and "changed since" not in quiet.out
    Path("walks.py").write_text(STEPS + "# a remark\n")
    noted = run(f"--resume {path} --dataset walks.py --epochs=3")
    assert noted.status == 0 and "note: walks.py has changed since this checkpoint was trained\n" in noted.out
    again = run(f"--resume {path} --dataset walks.py --epochs=4")
    assert again.status == 0 and "has changed" not in again.out  # the run goes on with the file as it is
    Path("walks.py").write_text(STEPS.replace("normal(0.5", "normal(0.7"))
    refused = run(f"--resume {path} --dataset walks.py --epochs=5")
    assert refused.status == 2 and "error: the data have changed (fingerprints were" in refused.err
    assert inference_of("--model_path", path, "--dataset", "walks.py") == 0
    shown = capsys.readouterr().out
    assert "note: walks.py has changed" in shown and "note: these are not the samples of training's test split" in shown
    shutil.copy("walks.py", "renamed.py")
    assert inference_of("--model_path", path, "--dataset", "renamed.py") == 0
    assert "note: the model was trained with walks.py; renamed.py takes its place" in capsys.readouterr().out
    assert "dataset_type: cannot change on resume" in run(f"--resume {path} --dataset renamed.py").err


def test_new_items_are_predicted_from_files_where_the_adapter_reads_them(folder, run, capsys):
    """Tokens need no code of the user's; an adapter of theirs says how its files are read, or that it does not."""
    Path("ramps.py").write_text(f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
from test_own_code import ramps
def load_data(settings):
    return {{"train": ramps(60), "class_names": ["rises", "falls"]}}
""")
    assert run(f"--dataset ramps.py {FLAGS} --epochs=6 --lr=5e-3").status == 0
    new = ramps(20, seed=3)
    x = np.concatenate([item["input"] for item in new])
    np.savez("new.npz", x=x, lengths=[len(item["input"]) for item in new])
    assert inference_of("--model_path", f"checkpoints/{BEST}", "--input", "new.npz") == 0
    rows = Path("results/predictions.csv").read_text().splitlines()
    answers = predict(load_model(f"checkpoints/{BEST}")[0], [item["input"] for item in new])
    assert [row.split(",")[1] for row in rows[1:]] == [answer["class"] for answer in answers]
    Path("walks.py").write_text(STEPS)
    assert run(f"--dataset walks.py {FLAGS} --checkpoint_dir=walks").status == 0
    capsys.readouterr()
    assert inference_of("--model_path", f"walks/{BEST}", "--input", "new.npz", "--dataset", "walks.py") == 2
    assert capsys.readouterr().err == "error: new.npz: Steps does not say how files are read\n"


def test_a_killed_run_resumes_bit_for_bit(start, tmp_path):
    """The user's code is loaded again by the command, in a new process; with a worker."""
    code = tmp_path / "walks.py"
    code.write_text(STEPS)
    flags = f"--dataset={code} {FLAGS} --epochs=6 --dropout=0.2 --save_every=2 --num_workers=1"
    last = tmp_path / "killed/checkpoints" / LAST
    process = start(tmp_path / "killed", flags)
    assert wait_until(lambda: last.exists() and "epoch 2/6" in output(tmp_path / "killed"), process)
    process.kill()
    assert end(process) == -signal.SIGKILL
    assert 0 < load_checkpoint(last)["progress"]["epoch"] < 6
    succeed(start, tmp_path / "killed", f"--resume --dataset={code}")
    succeed(start, tmp_path / "unbroken", flags)
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")


def test_a_run_that_is_stopped_says_how_to_go_on(start, tmp_path):
    (tmp_path / "my walks.py").write_text(STEPS)
    process = start(tmp_path, "--dataset=walks.py --epochs=500")
    assert end(process) == 2 and "walks.py cannot be read: No such file" in output(tmp_path)
    (tmp_path / "walks.py").write_text(STEPS)
    process = start(tmp_path, f"--dataset=walks.py {FLAGS} --epochs=500")
    assert wait_until(lambda: "epoch   1/500" in output(tmp_path), process)
    process.terminate()
    assert end(process) == 128 + signal.SIGTERM
    assert f"python train.py --resume checkpoints/{LAST} --dataset walks.py\n" in output(tmp_path)


@pytest.mark.slow
def test_two_processes_train_the_same_run(folder, run):
    Path("walks.py").write_text(STEPS)
    flags = f"--dataset walks.py {FLAGS} --dropout=0 --epochs=2 --class_weights=balanced --device=cpu"
    assert run(f"{flags} --checkpoint_dir=one/checkpoints").status == 0
    shown = in_two_processes(f"{flags} --checkpoint_dir=two/checkpoints")
    assert shown.count("data    walks.py: ") == shown.count("weights up ") == 1
    for one, two in zip(log_of(folder / "one"), log_of(folder / "two"), strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
        assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)
    infos = [load_checkpoint(folder / name / "checkpoints" / LAST)["data"] for name in ("one", "two")]
    assert_same(*infos)


# --- From Python -----------------------------------------------------------------------------------------------------


def test_lists_and_datasets_give_the_same_run_with_any_number_of_workers(folder):
    """The result is what the files hold, ready for `predict` and `evaluate`."""
    items, test = ramps(60), ramps(30, seed=1)
    logs = []
    for number, (make, workers) in enumerate([(list, 0), (Items, 0), (Items, 2)]):
        settings = Settings(**SMALL, num_workers=workers, checkpoint_dir=f"{number}/checkpoints")
        settings = replace(settings, num_epochs=3, learning_rate=5e-3)
        result = train(settings, data={"train": make(items), "test": make(test)}, class_names=["rises", "falls"])
        logs.append(log_of(folder / str(number)))
        assert_same(result.history, logs[-1])
    for log in logs[1:]:
        assert_same(log, logs[0])
    checkpoint = load_checkpoint("2/checkpoints/best_model.pth")
    assert checkpoint["data"]["split_sizes"] == {"train": 54, "val": 6, "test": 30}
    assert result.checkpoint == Path("2/checkpoints/best_model.pth") and result.stopped is None
    assert result.best == max(result.history, key=lambda line: (line["val_accuracy"], -line["val_loss"]))
    assert_same(dict(result.model.state_dict()), checkpoint["model"])
    assert evaluate(result.model, test)["accuracy"] == result.test["accuracy"]
    results = evaluate(result.model, result.splits["test"], analyze=True, output_dir="results")
    assert results["accuracy"] == result.test["accuracy"] and Path("results/attention.png").exists()
    answers = predict(result.model, [item["input"] for item in test])
    assert np.mean([answer["label"] == item["label"] for answer, item in zip(answers, test, strict=True)]) == (
        result.test["accuracy"]
    )
    assert answers == predict(load_model(result.checkpoint)[0], [item["input"] for item in test])


class Passes:
    """An iterable without a length that gives each of several workers a part, as a webdataset does."""

    def __init__(self, *passes):
        self.passes, self.number = passes, -1  # the items of each pass; the last ones again and again

    def __iter__(self):
        self.number += 1
        info = get_worker_info()
        share = slice(info.id, None, info.num_workers) if info else slice(None)
        yield from self.passes[min(self.number, len(self.passes) - 1)][share]


def prepared(data, **options):
    """The splits of data that are given in Python."""
    keys = {name: options.pop(name) for name in ("class_names", "adapters") if name in options}
    return load_splits(Settings(dataset_type=PYTHON, **options), own=own_data.of_python(data, **keys))


@pytest.mark.parametrize(("adapters", "options", "unused"), [
    (SeriesAdapter, {"stem": "conv"}, []),
    (SeriesAdapter, {"series_window": 4, "series_stride": 2}, []),
    (SeriesAdapter([0.0, 0.0], [1.0, 1.0]), {"stem": "conv"}, ["stem"]),
    (None, {"series_window": 4}, ["series_window"]),
])  # fmt: skip
def test_tokens_are_as_the_settings_say_or_a_note_says_that_they_are_not(adapters, options, unused):
    data, keys = {"train": ramps(40)}, {} if adapters is None else {"adapters": adapters}
    _, info = prepared(data, **keys, **options)
    assert [note.split()[0] for note in info["notes"] if "has no effect" in note] == unused
    (adapter,) = info["adapters"].values()
    assert (adapter.get("stem") is not None) == (not unused)


def test_an_iterable_is_trained_in_its_order_and_resumed_within_an_epoch(folder, monkeypatch):
    """With another number of workers, of which one reads it."""
    items, test = ramps(40), ramps(12, seed=1)
    settings = Settings(**(SMALL | {"num_epochs": 2}), batch_size=6, dropout=0.2)

    def trained(place, **options):
        data = {"train": Passes(items), "val": iter(test), "test": Passes(test)}
        own = {"checkpoint_dir": f"{place}/checkpoints"} | options.pop("own", {})
        return train(replace(settings, **own), data, **options)

    unbroken = trained("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, 10, lambda: signal.raise_signal(signal.SIGINT))  # the fourth of the second epoch
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        assert trained("broken").stopped == signal.SIGINT
        signal.signal(signal.SIGINT, before)
    resumed = trained("broken", own={"num_workers": 2}, resume=f"broken/checkpoints/{LAST}")
    assert_same(resumed.history, unbroken.history)
    assert_same(dict(resumed.model.state_dict()), dict(unbroken.model.state_dict()))
    loader = create_dataloader(unbroken.splits["train"], 6, shuffle=True, targets=unbroken.model.task)
    labels = [int(label) for batch in loader for label in batch["label"]]
    assert labels == [item["label"] for item in items]
    assert any("train is an iterable" in note for note in load_checkpoint(unbroken.checkpoint)["data"]["notes"])


def test_an_iterable_may_give_another_order_each_time(folder):
    """The label of an item goes with it."""
    first, second = ramps(20), ramps(20)[::-1]
    splits, info = prepared({"train": Passes(first, second), "val": ramps(9), "test": ramps(9)})
    splits["train"].set_epoch(1)
    for number, item in enumerate(second):
        found = splits["train"][number]
        assert found["label"] == item["label"]
        np.testing.assert_array_equal(found["input"], item["input"])
    again = prepared({"train": Passes(second), "val": ramps(9), "test": ramps(9)})[1]
    assert again["fingerprints"]["train"] == info["fingerprints"]["train"]


def test_what_is_wrong_with_an_iterable_is_said(folder):
    others, items = {"val": ramps(9), "test": ramps(9)}, ramps(20)

    def failing():
        yield from items[:3]
        raise OSError("shard 2 is gone")

    class Failing:
        __iter__ = staticmethod(failing)

    wrong = [
        ({"train": iter(items)} | others, "data: train is a list_iterator, which can be run through only once"),
        ({"train": Passes(items), "val": items}, "data: train is an iterable, .*: give test too"),
        ({"train": Passes([])} | others, "train is empty; give it items"),
        ({"train": Passes(items[:2] + [{"input": [[1.0, 2.0]]}])} | others, r"train\[2\]: it has no 'label'"),
        ({"train": Failing()} | others, "train: OSError: shard 2 is gone, raised at .*test_own_code.py"),
    ]
    for data, text in wrong:
        with pytest.raises(UserError, match=text):
            prepared(data)
    with pytest.raises(UserError, match="mixup: not of an iterable"):
        prepared({"train": Passes(items)} | others, mixup=0.2)
    train_set = prepared({"train": Passes(items, items[:7])} | others)[0]["train"]
    train_set.set_epoch(1)
    with pytest.raises(UserError, match="data: train gave 7 items in this pass, 20 in the first one"):
        train_set[7]


class Table:
    """What this project uses of a `datasets.Dataset` of Hugging Face: an item by its number, a column by its name."""

    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: column[key] for name, column in self.columns.items()}

    def rename_column(self, old, new):
        return Table({new if name == old else name: column for name, column in self.columns.items()})


def test_a_table_of_hugging_face_is_a_data_set(folder):
    texts = [f"{'good' if number % 2 else 'bad'} {number}" for number in range(30)]
    table = Table({"text": texts, "label": [number % 2 for number in range(30)]}).rename_column("text", "input")
    items = [{"input": text, "label": number % 2} for number, text in enumerate(texts)]
    found, expected = (prepared({"train": data}, class_names=["bad", "good"], adapters=TextAdapter())[0]
                       for data in (table, items))  # fmt: skip
    for name, split in expected.items():
        assert len(found[name]) == len(split)
        for one, other in zip(found[name], split, strict=True):
            assert_same(one, other)


def test_a_run_is_continued_from_python(folder):
    settings = Settings(**SMALL, dropout=0.2)
    data = {"train": ramps(40)}

    def trained(epochs, place, **options):
        own = replace(settings, num_epochs=epochs, checkpoint_dir=f"{place}/checkpoints")
        return train(own, data=data, **options)

    unbroken = trained(3, "unbroken")
    assert unbroken.model.task.class_names == ["0", "1"]  # labels are the names
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.fit", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trained(3, "broken")
    broken = trained(3, "broken", resume=f"broken/checkpoints/{LAST}")
    assert_same(log_of(folder / "broken"), log_of(folder / "unbroken"))
    assert_same(dict(broken.model.state_dict()), dict(unbroken.model.state_dict()))
    ended = trained(3, "broken", resume=f"broken/checkpoints/{LAST}")  # nothing is left to do
    assert_same(ended.history, broken.history)
    assert ended.test == broken.test
    assert evaluate(ended.model, ended.splits["test"])["accuracy"] == ended.test["accuracy"]
    assert len(trained(4, "broken", resume=f"broken/checkpoints/{LAST}").history) == 4
    with pytest.raises(UserError, match="seed: cannot change on resume, the checkpoint has 0"):
        train(replace(settings, seed=1, checkpoint_dir="broken/checkpoints"), data, resume=f"broken/checkpoints/{LAST}")
    with pytest.raises(UserError, match="were given to train\\(\\) in Python; give them again there"):
        train(replace(settings, checkpoint_dir="broken/checkpoints"), resume=f"broken/checkpoints/{LAST}")
    assert inference_of("--model_path", f"broken/checkpoints/{BEST}") == 2


def test_a_signal_stops_a_run_in_python(folder, monkeypatch, capsys):
    """As the button "interrupt" of a notebook does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    before_step(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGINT))
    result = train(Settings(**(SMALL | {"num_epochs": 9}), batch_size=10), data={"train": ramps(40)})
    signal.signal(signal.SIGINT, before)
    assert result.stopped == signal.SIGINT and result.test == {} and 1 <= len(result.history) < 9
    assert f"Continue with: train(settings, data=..., resume='checkpoints/{LAST}')" in capsys.readouterr().out
    assert predict(result.model, [ramps(1)[0]["input"]])[0]["class"] in ("0", "1")


def test_numbers_are_learnt_from_python(folder):
    """The mean of a series and twice its last value, against scikit-learn's linear model of the two answers."""
    rng = np.random.default_rng(0)
    series = [rng.normal(rng.normal(0, 2), 0.1, (8, 1)) for _ in range(300)]
    items = [{"input": one, "label": np.array([100 + one.mean(), 3 * one.mean()])} for one in series]
    settings = Settings(**(SMALL | {"num_epochs": 25, "learning_rate": 5e-3}), task="regression", dropout=0.0)
    result = train(settings, {"train": items[:240], "test": items[240:]}, class_names=["mean", "triple"])
    metrics = evaluate(result.model, items[240:])
    truth = np.array([item["label"] for item in items])
    features = np.array([one.mean(1, keepdims=True).ravel() for one in series])
    linear = LinearRegression().fit(features[:240], truth[:240]).predict(features[240:])
    assert np.abs(linear - truth[240:]).max() < 1e-9  # the answer is known
    answers = predict(result.model, [item["input"] for item in items[240:]])
    assert list(answers[0]["values"]) == ["mean", "triple"]
    found = np.array([list(answer["values"].values()) for answer in answers])
    for row, column in zip(metrics["per_target"], range(2), strict=True):
        assert row["mae"] == pytest.approx(mean_absolute_error(truth[240:, column], found[:, column]), rel=1e-4)
        assert row["r2"] > 0.9


@pytest.mark.parametrize("form", ["names", "numbers"])
def test_several_labels_are_learnt_from_python(folder, form):
    rng, items = np.random.default_rng(0), []
    for _ in range(60):
        there = rng.integers(0, 2, 3)
        label = there if form == "numbers" else [name for name, one in zip("abc", there, strict=True) if one]
        items.append({"input": (there + rng.normal(0, 0.1, (5, 3))), "label": label})
    names = list("abc") if form == "numbers" else None
    settings = Settings(**(SMALL | {"num_epochs": 16, "learning_rate": 1e-2}), task="multilabel", checkpoint_dir=form)
    result = train(settings, {"train": items}, class_names=names)
    assert result.model.task.class_names == ["a", "b", "c"]
    assert result.test["macro_f1"] > 0.9 and result.test["num_samples"] >= 10
    assert predict(result.model, [np.ones((5, 3))])[0]["labels"] == ["a", "b", "c"]


def test_the_adapters_of_the_repository_take_items_of_python(folder):
    """Texts, images and series at once, some missing; and pairs of an image and a class, as torchvision gives them."""
    rng, items = np.random.default_rng(0), []
    for number in range(40):
        label = number % 2
        inputs = {"text": ["yes", "no"][label], "image": np.full((10, 12, 3), 100 + 100 * label, np.uint8),
                  "series": rng.normal(label, 1, (5, 2))}  # fmt: skip
        inputs.pop(["text", "image", "series", "none"][number % 4], None)
        items.append({"input": inputs, "label": ["yes", "no"][label]})
    adapters = {"text": TextAdapter(), "image": ImageAdapter, "series": SeriesAdapter}
    settings = Settings(**SMALL, image_size=8, patch_size=4)
    result = train(settings, {"train": items}, adapters=adapters)
    assert list(result.model.adapters) == ["text", "image", "series"]
    assert result.model.adapters["image"].image_shape == [8, 8, 3]
    seen = [item["input"]["series"] for item in items if "series" in item["input"]]
    assert abs(result.model.adapters["series"].mean[0] - np.concatenate(seen)[:, 0].mean()) < 0.3
    assert predict(result.model, [items[3]["input"]])[0]["class"] in ("yes", "no")
    pairs = [(np.full((4, 4), 200 * label, np.uint8), label) for label in (0, 1) * 20]
    result = train(replace(settings, checkpoint_dir="pairs"), {"train": Items(pairs)}, adapters=ImageAdapter)
    assert predict(result.model, [pairs[0][0]])[0]["class"] in ("0", "1")


def test_only_training_items_are_drawn_anew(folder):
    """`set_epoch` of a Dataset from which the validation items come too."""

    class Drawn(Items):
        def set_epoch(self, epoch):
            self.epoch = epoch
            told.append(epoch)

        def __getitem__(self, number):
            item = self.items[number]
            return item | {"input": item["input"] * np.float32(1 + self.epoch)}

    told = []
    drawn = train(Settings(**(SMALL | {"num_epochs": 3})), {"train": Drawn(ramps(40)), "test": ramps(10)})
    assert {0, 1, 2} <= set(told)
    settings = Settings(**(SMALL | {"num_epochs": 3}), checkpoint_dir="again")
    half = train(replace(settings, num_epochs=2), {"train": Drawn(ramps(40)), "test": ramps(10)})
    again = train(settings, {"train": Drawn(ramps(40)), "test": ramps(10)}, resume=half.checkpoint.parent / LAST)
    assert len(again.history) == len(drawn.history) == 3
    plain = train(replace(settings, checkpoint_dir="plain"), {"train": ramps(40), "test": ramps(10)})
    assert drawn.history[0]["val_loss"] == plain.history[0]["val_loss"]  # epoch 0 multiplies by one
    assert drawn.history[1]["train_loss"] != plain.history[1]["train_loss"]


def test_groups_stay_together_and_ids_name_items(folder):
    items = [item | {"group": f"patient {n // 4}", "id": f"visit {n}"} for n, item in enumerate(ramps(80))]
    result = train(Settings(**SMALL), {"train": items})
    assert any(note.startswith("groups: ") for note in result.model.data_info["notes"])
    from data_utils import load_splits
    from own_data import of_python

    splits, _ = load_splits(Settings(dataset_type="python"), own=of_python({"train": items}))
    groups = {name: {int(id.split()[1]) // 4 for id in split.ids} for name, split in splits.items()}
    assert sum(map(len, groups.values())) == len(set().union(*groups.values())) == 20 and all(groups.values())


# --- Mistakes --------------------------------------------------------------------------------------------------------


FILES = {
    "def load_data(settings)\n    pass": r"bad.py, line 1: SyntaxError: expected ':': def load_data\(settings\)",
    "x = 1\n": r"bad.py: it has no function load_data\(settings\), which gives the data",
    "load_data = 3": r"bad.py: it has no function load_data\(settings\)",
    "import numpy\nnumpy.nothing": "bad.py: AttributeError: .*, raised at bad.py, line 2, in <module>: numpy.no",
    "DEFAULTS = 3\ndef load_data(s): pass": "bad.py: DEFAULTS is a int; it must be a dict of settings",
    "DEFAULTS = {'epoch': 3}\ndef load_data(s): pass": "bad.py: DEFAULTS: .epoch.: unknown setting, the nearest valid",
    "DEFAULTS = {'batch_size': 'x'}\ndef load_data(s): pass": "bad.py: DEFAULTS: batch_size: expected a whole number",
    "DEFAULTS = {'dataset_type': 'digits'}\ndef load_data(s): pass": "DEFAULTS: dataset_type is this file itself",
    "def load_data(settings):\n    return {}['x']": "load_data: KeyError: 'x', raised at bad.py, line 2, in load_data",
    "def load_data(): pass": "bad.py: load_data: TypeError: load_data.. takes 0 positional arguments but 1 was given",
    "def load_data(s): pass": "bad.py: load_data returned None; it must be a dict with 'train', and may have val, test",
    "def load_data(s): return {'tain': []}": "load_data returned a dict of tain; it must be a dict with 'train'",
    "def load_data(s): return {'train': []}": "bad.py: load_data: train is empty; give it items",
    "def load_data(s): return {'train': 3}": "train is a int; it must be a list of items, or a Dataset that has",
    "def load_data(s): return {'train': [[[1.0]]] * 9}": r"bad.py: train\[0\]: an item must be a dict with 'input' and",
    "def load_data(s): return {'train': [{'input': [[1.0]]}] * 9}": r"bad.py: train\[0\]: it has no 'label'",
    "def load_data(s): return {'train': [{'input': [[1.0]], 'label': i} for i in range(9)], 'adapters': int}":
        "bad.py: load_data: <class 'int'> is no adapter; write a subclass of adapters.Adapter",
    "import sys\ndef load_data(s): sys.exit(0)": "bad.py: load_data: SystemExit: 0, raised at bad.py, line 2",
    "class Rows:\n    lengths, labels = [1, 2], [0] * 5\n    def __len__(self): return 5\n"
    "    def __getitem__(self, i): return {'input': [[1.0]], 'label': 0}\n"
    "def load_data(s): return {'train': Rows()}": "bad.py: train: it has 2 lengths for 5 items; give one for each",
    "class Rows:\n    def __len__(self): return 5\n    def __getitem__(self, i): return 1 / 0\n"
    "def load_data(s): return {'train': Rows()}":
        r"bad.py: train\[0\]: ZeroDivisionError: division by zero, raised at bad.py, line 3, in __getitem__: def",
}  # fmt: skip


@pytest.mark.parametrize("code", FILES)
def test_a_mistake_in_the_file_is_named_by_its_place(folder, run, code):
    Path("bad.py").write_text(code)
    result = run("--dataset bad.py")
    assert result.status == 2 and re.search(FILES[code], result.err), result.err
    assert result.err.startswith("error: ") and "own_data.py" not in result.err
    assert not Path("checkpoints").exists() or not any(Path("checkpoints").iterdir())


def test_a_file_may_not_take_the_name_of_another_module(folder, run):
    for name in ("tasks.py", "json.py", "two.parts.py", "3.py"):
        Path(name).write_text("def load_data(settings): pass")
        result = run(f"--dataset {name}")
        assert result.status == 2 and f"dataset: {name} cannot be called so" in result.err
    assert "there" not in sys.modules and run("--dataset there.py").err.startswith("error: dataset: there.py cannot be")
    Path("helper.py").write_text("RATE = 3")
    Path("uses.py").write_text("from helper import RATE\nraise ValueError(RATE)")
    assert "uses.py: ValueError: 3" in run("--dataset uses.py").err  # its neighbours are found


GOOD = {"input": np.zeros((3, 2)), "label": 0}
DATA = {
    "another width": ({"input": np.zeros((3, 5)), "label": 1}, {}, r"train\[7\]: 5 channels of series, the items"),
    "one axis": ({"input": np.zeros(3), "label": 1}, {}, r"train\[7\]: the input has shape \(3,\), it must be"),
    "NaN": ({"input": np.full((3, 2), np.nan), "label": 1}, {}, r"train\[7\]: the input holds NaN"),
    "words": ({"input": "words", "label": 1}, {}, r"train\[7\]: the input is not an array of numbers"),
    "empty": ({"input": np.zeros((0, 2)), "label": 1}, {}, r"train\[7\]: empty, no real token"),
    "mask": ({**GOOD, "mask": [1, 1]}, {}, r"train\[7\]: the mask has shape \(2,\), it must be \(3,\)"),
    "class beyond": ({**GOOD, "label": 2}, {"class_names": ["a", "b"]}, r"train: sample 7: label 2 is not in 0..1"),
    "part of a class": ({**GOOD, "label": 0.5}, {"class_names": ["a", "b"]}, r"train\[7\]: label 0.5 is not a whole"),
    "unknown class": ({**GOOD, "label": "c"}, {"class_names": ["a", "b"]}, r"train\[7\]: label 'c' does not occur"),
    "fraction": ({**GOOD, "label": 0.5}, {}, r"train\[7\]: label 0.5"),
    "modalities": ({"input": {"audio": np.zeros((3, 2))}, "label": 1}, {"adapters": SeriesAdapter},
                   r"train\[7\]: there is no adapter of audio, only of series"),
    "slip": ({**GOOD, "groups": 1}, {}, r"train\[7\]: 'groups' is not read; if it is meant to be 'group', call it so"),
    "adapter's": ({"input": np.full((3, 2), np.inf), "label": 1}, {"adapters": SeriesAdapter.fit([GOOD["input"]])},
                  r"train\[7\]: the series holds infinity"),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_an_item_that_cannot_be_used_is_named(folder, case):
    item, options, says = DATA[case]
    items = [{**GOOD, "label": number % 2} for number in range(12)]
    items[7] = item
    for make in (list, Items):
        with pytest.raises(UserError, match=says):
            train(Settings(**SMALL), {"train": make(items)}, **options)
    assert not Path("checkpoints").exists() or not any(Path("checkpoints").iterdir())


def test_arguments_that_do_not_go_together_are_refused(folder):
    items = ramps(20)
    for says, arguments in {
        "data is a list; it must be a dict: data={'train': items": {"data": items},
        "data is a dict of trian": {"data": {"trian": items}},
        "class_names must be a list of different names": {"data": {"train": items}, "class_names": ["a", "a"]},
        "class_names, adapters: they go with data": {"class_names": ["a", "b"]},
        "class_names: given twice": {"data": {"train": items, "class_names": ["a", "b"]}, "class_names": ["c", "d"]},
        "val is empty; give it items, or leave it out": {"data": {"train": items, "val": []}},
        "modality must be a name such as 'audio'": {"data": {"train": items}, "adapters": {"the text": TextAdapter()}},
    }.items():
        with pytest.raises(UserError, match=re.escape(says)):
            train(Settings(**SMALL), **arguments)
    with pytest.raises(UserError, match="dataset_type is digits, and data are given"):
        train(Settings(**SMALL, dataset_type="digits"), {"train": items})
    with pytest.raises(UserError, match=r"label 1 is no list of names; give class_names for numbers 0 and 1"):
        train(Settings(**SMALL, task="multilabel"), {"train": [{**item, "label": 1} for item in items]})


def test_an_adapter_must_be_plain_data(folder):
    @dataclass(frozen=True)
    class Scaled(Adapter):
        modality = "audio"
        scale: float
        names: list[str]
        table: dict[str, float]

        @property
        def features(self):
            return {"input_dim": 2}

        def __call__(self, raw):
            return raw * self.scale

    good = Scaled(2.0, ["a"], {"x": 1.5})
    assert from_description(describe(good), own={"Scaled": Scaled}) == good
    wrong = {
        np.float32(2.0): "Scaled.scale must be a finite number, not a float32",
        torch.tensor(2.0): "Scaled.scale must be a finite number, not a Tensor",
        "two": "Scaled.scale must be a finite number, not 'two'",
    }
    for value, says in wrong.items():
        with pytest.raises(UserError, match=f"{says}; an adapter is stored as plain data"):
            train(Settings(**SMALL), {"train": ramps(20)}, adapters=Scaled(value, [], {}))
    result = train(Settings(**SMALL), {"train": ramps(20)}, adapters=good)
    assert result.model.adapters == {"audio": good}
    forged = load_checkpoint(result.checkpoint)
    forged["data"]["adapters"]["audio"]["scale"] = "much"
    save_checkpoint("forged.pth", {n: v for n, v in forged.items() if n not in ("format", "versions")})
    with pytest.raises(UserError, match="the checkpoint's adapter of audio.scale must be a finite number, not 'much'"):
        load_model("forged.pth", adapters=[Scaled])
