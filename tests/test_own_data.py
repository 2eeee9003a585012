"""Data of one's own through the real commands: images, series, texts, several at once; new files; mistakes."""

import csv
import json
import math
import os
import re
import subprocess
import sys
import unicodedata
from contextlib import chdir
from functools import partial
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from running import run_in as run
from sklearn.datasets import load_digits

import adapters
import inference
import plots
import run_log
import tasks
import train
from adapters import from_description
from checkpoint import BEST, LAST, load_checkpoint
from config import Settings
from data_files import read_manifest
from data_utils import load_splits
from inference import load_model, predict

ROOT = Path(train.__file__).parent
LANGUAGES = Path(__file__).parent / "data" / "languages.csv"
TINY = (
    "--model_size=tiny", "--d_model=16", "--num_heads=2", "--num_latents=4", "--num_cross_attention_layers=1",
    "--num_self_attention_layers=1", "--ema_decay=0", "--lr=5e-3", "--epochs=2",
)  # fmt: skip
SMALL_IMAGES = ("--image_size=8", "--patch_size=4")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Without TensorBoard and pictures, which cost more than the tiny runs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(run_log, "tensorboard_writer", lambda *_: None)
        patch.setattr(plots, "plot_training_curves", lambda history, path, *_: path.write_text("curves"))
        patch.setattr(tasks.Classification, "figures", lambda *_: {})
        yield


def trained(folder, *words):
    done = run(train.main, folder, *TINY, *words)
    assert done.status == 0 and done.err == "", done.err
    return done


def infer(folder, *words):
    return run(inference.main, folder, "--model_path", f"checkpoints/{BEST}", *words)


def results_of(folder):
    return json.loads((folder / "results" / "results.json").read_text())


def check_inference_repeats(folder, done, classes):
    """What training logged, without any data flag."""
    found = re.search(r"best epoch (\d+): validation accuracy (\S+), test accuracy (\S+) \((\d+) samples", done.out)
    epoch, test, number = int(found[1]), float(found[3]), int(found[4])
    line = json.loads((folder / "checkpoints" / "log.jsonl").read_text().splitlines()[epoch - 1])
    assert infer(folder).status == 0
    results = results_of(folder)
    assert results["accuracy"] == pytest.approx(test, abs=5e-5) and results["num_samples"] == number
    assert [row["class"] for row in results["per_class"]] == classes
    done = infer(folder, "--split", "val")
    assert done.status == 0 and done.err == "" and "note" not in done.out
    results = results_of(folder)
    assert results["accuracy"] == pytest.approx(line["val_accuracy"], abs=1e-9)
    assert results["negative_log_likelihood"] == pytest.approx(line["val_loss"], abs=1e-6)


# --- The data --------------------------------------------------------------------------------------------------------


def picture(level, number, seed=0):
    """An image of about this brightness, of a mode and size of its own."""
    rng = np.random.default_rng((seed, number, level))
    shape = (int(rng.integers(5, 30)), int(rng.integers(5, 30)), 3)
    image = Image.fromarray(np.clip(level + rng.normal(0, 25, shape), 0, 255).astype(np.uint8))
    return image.convert(("RGB", "L", "RGBA", "P", "CMYK", "LA", "1")[number % 7])


def save_picture(path, level, number, seed=0):
    """Returns the path, which gets an extension that holds the image's mode."""
    image = picture(level, number, seed)
    path = path.with_suffix({"CMYK": ".jpg", "P": ".gif", "RGB": ".JPEG"}.get(image.mode, ".png"))
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = number % 8 + 1
    image.save(path, **({} if image.mode == "P" else {"exif": exif}))
    return path


LEVELS = {"night & fog": 50, "日中": 200}  # class folders need not be ASCII


def make_images(folder, count=12, seed=0):
    for name, level in LEVELS.items():
        for number in range(count):
            save_picture(folder / name / f"{number}", level, number, seed)
    return folder


def make_series(count=24, seed=0, channels=2):
    """(series, labels): rising or falling, of different lengths, some values missing."""
    rng = np.random.default_rng(seed)
    series, labels = [], []
    for number in range(count):
        length = int(rng.integers(4, 12))
        slope = 1 if number % 2 else -1
        one = 5 + slope * np.linspace(-1, 1, length)[:, None] * [[1, 10]] + rng.normal(0, 0.1, (length, channels))
        one[rng.random(one.shape) < 0.1] = np.nan
        one[-1, 0] = 5 + slope  # the last step is real
        series.append(one)
        labels.append("rise" if number % 2 else "fall")
    return series, labels


def write_ts(path, series, labels, header=""):
    lines = [f"@problemName Slopes\n@timeStamps false\n{header}@classLabel true rise fall\n@data"]
    for one, label in zip(series, labels, strict=True):
        cells = [",".join("?" if math.isnan(value) else repr(value) for value in channel) for channel in one.T.tolist()]
        lines.append(":".join([*cells, label]))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_npz(path, series, labels=None):
    arrays = {"x": np.concatenate(series), "lengths": np.array([len(one) for one in series])}
    np.savez(path, **arrays, **({} if labels is None else {"y": np.array(labels)}))
    return path


def write_long(path, series, labels=None, names=("id", "label")):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([names[0], *([] if labels is None else [names[1]]), *(f"c{c}" for c in range(2))])
        for number, one in enumerate(series):
            for step in one.tolist():
                cells = ["" if math.isnan(value) else repr(value) for value in step]
                writer.writerow([f"s{number}", *([] if labels is None else [labels[number]]), *cells])
    return path


def make_texts(count=30):
    """(texts, labels): of digits or of letters, with what a table must quote."""
    rng = np.random.default_rng(0)
    texts, labels = [], []
    for number in range(count):
        alphabet = "0123456789" if number % 2 else 'ab,"ż한\t\n🙂'
        texts.append("".join(rng.choice(list(alphabet), int(rng.integers(3, 20)))) + alphabet[0])
        labels.append("digits" if number % 2 else "letters")
    return texts, labels


def write_table(path, columns):
    rows = list(zip(*columns.values(), strict=True))
    if path.suffix == ".jsonl":
        lines = (json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([columns, *rows])
    return path


def make_manifest(folder, count=24):
    """A manifest of images, texts and series, some of each missing."""
    series, _ = make_series(count)
    (folder / "files").mkdir(parents=True)
    columns = {"image": [], "text": [], "series": [], "label": []}
    for number in range(count):
        image = save_picture(folder / "files" / f"{number}", 200 if number % 2 else 50, number)
        np.save(folder / "files" / f"{number}.npy", series[number])
        cells = [f"files/{image.name}", "day" if number % 2 else "dark night", f"files/{number}.npy"]
        if number % 4 == 3:
            cells[number // 4 % 3] = ""
        for name, cell in zip(columns, [*cells, "up" if number % 2 else "down"], strict=True):
            columns[name].append(cell)
    return write_table(folder / "all.csv", columns)


@pytest.fixture(scope="module")
def images_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    make_images(folder / "data")
    done = trained(folder, "--dataset=images", "--data_path=data", *SMALL_IMAGES)
    return folder, done


@pytest.fixture(scope="module")
def series_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    write_ts(folder / "train.ts", *make_series())
    write_ts(folder / "test.ts", *make_series(10, 1))
    done = trained(folder, "--dataset=sequences", "--data_path=train.ts", "--test_path=test.ts")
    return folder, done


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    texts, labels = make_texts()
    write_table(folder / "data.jsonl", {"kind": labels, "note": [None] * 30, "words": texts})
    done = trained(folder, "--dataset=text", "--data_path=data.jsonl", "--text_column=words", "--label_column=kind")
    return folder, done


@pytest.fixture(scope="module")
def multimodal_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multimodal")
    make_manifest(folder / "data")
    done = trained(folder, "--dataset=multimodal", "--data_path=data/all.csv", *SMALL_IMAGES)
    return folder, done


RUNS = ("images_run", "series_run", "text_run", "multimodal_run")

# --- Training, then inference ----------------------------------------------------------------------------------------

CLASSES = {
    "images_run": sorted(LEVELS),
    "series_run": ["fall", "rise"],
    "text_run": ["digits", "letters"],
    "multimodal_run": ["down", "up"],
}


@pytest.mark.parametrize("kind", RUNS)
def test_inference_repeats_the_figures_of_training(kind, request):
    folder, done = request.getfixturevalue(kind)
    check_inference_repeats(folder, done, CLASSES[kind])


@pytest.mark.parametrize("kind", RUNS)
def test_the_test_set_is_the_same_for_every_seed(kind, request):
    folder, _ = request.getfixturevalue(kind)
    settings = Settings.from_dict(load_checkpoint(folder / "checkpoints" / BEST)["settings"]).to_dict()

    def members(seed):
        with chdir(folder):
            splits, info = load_splits(Settings.from_dict(settings | {"seed": seed}), known)
        items = {name: [data[number] for number in range(len(data))] for name, data in splits.items()}
        return {name: [str((item["input"], item["label"])) for item in items[name]] for name in ("val", "test")}

    known = load_checkpoint(folder / "checkpoints" / BEST)["data"]  # so that tokens can be compared
    splits = [members(seed) for seed in range(4)]
    assert all(split["test"] == splits[0]["test"] for split in splits)
    assert len({str(split["val"]) for split in splits}) > 1


@pytest.mark.slow
def test_real_processes(tmp_path):
    """Both commands as a person gives them, pictures and all."""
    make_images(tmp_path / "data", 8)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1"}

    def command(name, *words):
        words = [sys.executable, ROOT / name, *words]
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    done = command("train.py", *TINY, "--dataset=images", "--data_path=data", *SMALL_IMAGES)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    done = command("inference.py", f"--model_path=checkpoints/{BEST}", "--analyze")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert {"results.json", "attention.png", "mistakes.png"} <= {file.name for file in (tmp_path / "results").iterdir()}
    save_picture(tmp_path / "new" / "a", 50, 0)
    done = command("inference.py", f"--model_path=checkpoints/{BEST}", "--input=new", "--output_dir=out")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert [row["id"] for row in predictions(tmp_path / "out")] == ["a.JPEG"]
    done = command("train.py", "--dataset=images", "--data_path=nowhere")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr


def test_folders_of_train_val_and_test(tmp_path):
    for seed, split in enumerate(("train", "val", "test")):
        make_images(tmp_path / "data" / split, 6 + seed, seed)
    done = trained(tmp_path, "--dataset=images", "--data_path=data", *SMALL_IMAGES)
    assert "12 training, 14 validation, 16 test samples; 2 classes" in done.out
    check_inference_repeats(tmp_path, done, sorted(LEVELS))


def test_images_of_a_test_path(tmp_path):
    make_images(tmp_path / "data", 10)
    make_images(tmp_path / "more", 3, 1)
    done = trained(tmp_path, "--dataset=images", "--data_path=data", "--test_path=more", *SMALL_IMAGES)
    assert "18 training, 2 validation, 6 test samples" in done.out
    check_inference_repeats(tmp_path, done, sorted(LEVELS))
    make_images(tmp_path / "other", 4, 2)
    assert infer(tmp_path, "--test_path=other").status == 0
    assert results_of(tmp_path)["num_samples"] == 8


def test_data_that_changed_since_training_are_noted(tmp_path):
    make_images(tmp_path / "data", 8)
    trained(tmp_path, "--dataset=images", "--data_path=data", *SMALL_IMAGES)
    save_picture(tmp_path / "data" / "日中" / "more", 200, 0)
    assert "note: these are not the samples of training's" in infer(tmp_path).out
    make_images(tmp_path / "other", 3, 2)
    assert "note: these are not the samples of training's" in infer(tmp_path, "--data_path=other").out


def test_what_is_no_image_is_noted(tmp_path):
    make_images(tmp_path / "data", 8)
    (tmp_path / "data" / "日中" / "notes.md").write_text("sunny")
    done = trained(tmp_path, "--dataset=images", "--data_path=data", *SMALL_IMAGES)
    assert "note: data: left out as no images: 1 .md; the first is data/日中/notes.md" in done.out


def same_data(one, other):
    (splits, info), (others, other_info) = one, other

    def common(info):  # ids, and whether columns have names, differ from format to format
        adapters = {name: known | {"names": None, "table_rows": None} for name, known in info["adapters"].items()}
        return info | {"fingerprints": {}, "about": [], "adapters": adapters}

    assert common(info) == common(other_info)
    for name, data in splits.items():
        assert len(data) == len(others[name])
        for number in range(len(data)):
            item, twin = data[number], others[name][number]
            assert torch.equal(item["input"], twin["input"]) and item["label"] == twin["label"]


def test_the_same_series_in_every_format(tmp_path):
    series, labels = make_series()
    paths = [
        write_ts(tmp_path / "a.ts", series, labels, "@missing true\n@univariate false\n@dimension 2\n"),
        write_npz(tmp_path / "a.npz", series, labels),
        write_long(tmp_path / "a.csv", series, labels),
    ]
    loaded = [load_splits(Settings(dataset_type="sequences", data_path=str(path))) for path in paths]
    for other in loaded[1:]:
        same_data(loaded[0], other)
    assert loaded[0][1]["features"]["series"]["input_dim"] == 4  # two channels, both with a flag
    moved = write_long(tmp_path / "b.csv", series, labels, names=("patient", "way"))
    columns = {"id_column": "patient", "label_column": "way"}
    same_data(loaded[0], load_splits(Settings(dataset_type="sequences", data_path=str(moved), **columns)))


@pytest.mark.parametrize("name", ["a.npz", "a.csv"])
def test_series_of_other_formats_are_trained_on(name, tmp_path):
    (write_npz if name.endswith("npz") else write_long)(tmp_path / name, *make_series())
    done = trained(tmp_path, "--dataset=sequences", f"--data_path={name}")
    assert "series tokens of 4 features" in done.out
    check_inference_repeats(tmp_path, done, ["fall", "rise"])


def test_the_same_texts_in_every_format(tmp_path):
    texts, labels = make_texts()
    table = {"kind": labels, "words": texts}
    paths = [write_table(tmp_path / f"a.{extension}", table) for extension in ("csv", "tsv", "jsonl")]
    columns = {"text_column": "words", "label_column": "kind"}
    loaded = [load_splits(Settings(dataset_type="text", data_path=str(path), **columns)) for path in paths]
    for other in loaded[1:]:
        same_data(loaded[0], other)
    tokens = [bytes(data[number]["input"][:, 0].int().tolist()).decode() for data in loaded[0][0].values()
              for number in range(len(data))]  # fmt: skip
    assert sorted(tokens) == sorted(texts)


def weights(folder):
    return load_checkpoint(folder / "checkpoints" / LAST)["model"]


@pytest.mark.parametrize("kind", ["sequences", "text", "multimodal"])
def test_workers_buckets_and_a_limit_of_length(kind, tmp_path):
    if kind == "multimodal":
        path = make_manifest(tmp_path / "data")
    elif kind == "text":
        texts, labels = make_texts()
        path = write_table(tmp_path / "a.csv", {"text": texts, "label": labels})
    else:
        path = write_ts(tmp_path / "a.ts", *make_series())
    words = [f"--dataset={kind}", f"--data_path={path}", "--max_seq_len=6", "--batch_size=4", "--epochs=1"]
    words += SMALL_IMAGES if kind == "multimodal" else ()
    runs = {"plain": (), "buckets": ("--bucket_by_length",), "workers": ("--bucket_by_length", "--num_workers=2")}
    for name, flags in runs.items():
        (tmp_path / name).mkdir()
        trained(tmp_path / name, *words, *flags)
    found = {name: weights(tmp_path / name) for name in runs}
    assert all(torch.equal(found["buckets"][key], value) for key, value in found["workers"].items())
    assert not all(torch.equal(found["buckets"][key], value) for key, value in found["plain"].items())
    checkpoint = load_checkpoint(tmp_path / "plain" / "checkpoints" / LAST)
    splits, _ = load_splits(Settings.from_dict(checkpoint["settings"]), checkpoint["data"])
    items = [data[number]["input"] for data in splits.values() for number in range(len(data))]
    parts = [(name, tokens) for item in items for name, tokens in
             (item.items() if isinstance(item, dict) else [(kind, item)])]  # fmt: skip
    lengths = [len(tokens) for name, tokens in parts if name != "image"]
    assert max(lengths) == 6 and min(lengths) < 6


# --- Several modalities are worth more than one ----------------------------------------------------------------------

WORDS = ("calm sea", "strong wind", "hot sand")


def write_hard_digits(folder, name, numbers):
    """A manifest of digits of which no modality alone says enough: an image in noise, two words, misspelt, for d // 4,
    and a ramp of slope d % 4 in noise. A tenth of each is missing."""
    digits, rng = load_digits(), np.random.default_rng(len(numbers))
    (folder / name).mkdir()
    columns = {"image": [], "text": [], "series": [], "label": []}
    for number in numbers:
        image, label = digits.images[number], int(digits.target[number])
        noisy = np.clip(image * 8 + rng.normal(60, 75, image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / name / f"{number}.png")
        words = list(WORDS[label // 4])
        words[rng.integers(len(words))] = rng.choice(list("abcxyz"))
        ramp = np.linspace(-1, 1, 8) * (label % 4 - 1.5) + rng.normal(0, 0.3, 8)
        np.save(folder / name / f"{number}.npy", ramp)
        cells = [f"{name}/{number}.png", "".join(words), f"{name}/{number}.npy"]
        if (lacking := int(rng.integers(10))) < 3:
            cells[lacking] = ""
        for column, cell in zip(columns.values(), [*cells, str(label)], strict=True):
            column.append(cell)
    return columns


@pytest.mark.slow
def test_several_modalities_beat_the_best_one_and_need_not_all_be_there(tmp_path):
    numbers = np.random.default_rng(0).permutation(1100)
    tables = {"train": write_hard_digits(tmp_path, "train", numbers[:800]),
              "test": write_hard_digits(tmp_path, "test", numbers[800:])}  # fmt: skip
    accuracy = {}
    for modality in ("all", "image", "text", "series"):
        folder = tmp_path / modality
        for split, table in tables.items():
            there = [row for row, cell in enumerate(table.get(modality, table["label"])) if cell]
            kept = {name: [cells[row] for row in there] for name, cells in table.items()
                    if modality == "all" or name in (modality, "label")}  # fmt: skip
            write_table(tmp_path / f"{modality}_{split}.csv", kept)
        folder.mkdir()
        done = run(
            train.main, folder, "--dataset=multimodal", f"--data_path={tmp_path}/{modality}_train.csv",
            f"--test_path={tmp_path}/{modality}_test.csv", "--image_size=8", "--patch_size=2", "--d_model=64",
            "--num_latents=16", "--epochs=15", "--lr=3e-3", "--no_augment", "--seed=0",
        )  # fmt: skip
        assert done.status == 0, done.err
        assert infer(folder).status == 0
        accuracy[modality] = results_of(folder)["accuracy"]
    print("test accuracy, trained on", accuracy)
    assert accuracy["all"] > max(accuracy[name] for name in ("image", "text", "series")) + 0.2, accuracy

    model, settings = load_model(tmp_path / "all" / "checkpoints" / BEST)
    columns = {name: name for name in ("image", "text", "series")}
    items = read_manifest(tmp_path / "all_test.csv", columns)
    for left_out in columns:
        rest = [{name: value for name, value in item.items() if name != left_out} for item in items.values]
        there = [number for number, item in enumerate(rest) if item]
        answers = predict(model, [rest[number] for number in there])
        right = [answer["class"] == items.labels[number] for answer, number in zip(answers, there, strict=True)]
        print(f"without the {left_out} at prediction {np.mean(right):.3f}")
        assert np.mean(right) > 0.25, left_out  # chance: 0.1


@pytest.mark.slow
def test_languages_are_told_apart(tmp_path):
    with open(LANGUAGES, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    counts = {name: sum(row["label"] == name for row in rows) for name in {row["label"] for row in rows}}
    assert len(counts) == 8 and min(counts.values()) >= 60 and len({row["text"] for row in rows}) == len(rows)
    assert all(20 <= len(row["text"]) <= 90 for row in rows)
    chosen = [row for row in rows if row["label"] in ("English", "German", "Polish", "Russian", "Greek", "Korean")]
    write_table(tmp_path / "a.csv", {name: [row[name] for row in chosen] for name in ("text", "label")})
    done = run(train.main, tmp_path, "--dataset=text", "--data_path=a.csv", "--epochs=15", "--lr=1e-3", "--seed=0")
    assert done.status == 0, done.err
    check_inference_repeats(tmp_path, done, ["English", "German", "Greek", "Korean", "Polish", "Russian"])
    assert float(re.search(r"test accuracy (\S+)", done.out)[1]) >= 0.9
    model, _ = load_model(tmp_path / "checkpoints" / BEST)
    unseen = {"Korean": "안녕하세요, 만나서 반갑습니다.", "Greek": "Καλημέρα σας, τι κάνετε;",
              "Russian": "Как вас зовут?"}  # fmt: skip
    assert [answer["class"] for answer in predict(model, list(unseen.values()))] == list(unseen)


# --- New items -------------------------------------------------------------------------------------------------------


def predictions(folder):
    with open(folder / "predictions.csv", encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def check_predictions(folder, output, ids, items):
    """predictions.csv holds what `predict` says of the raw items."""
    model, _ = load_model(folder / "checkpoints" / BEST)
    rows = predictions(output)
    assert [row["id"] for row in rows] == ids
    for row, answer in zip(rows, predict(model, items), strict=True):
        best = sorted(answer["probabilities"].items(), key=lambda pair: -pair[1])[:3]
        assert list(row) == ["id", "class", "confidence", "class_2", "confidence_2"]  # of two classes
        assert [row["class"], row["class_2"]] == [name for name, _ in best]
        shares = [float(row["confidence"]), float(row["confidence_2"])]
        assert shares == pytest.approx([share for _, share in best], abs=2e-6)


def new_pictures(folder):
    make_images(folder / "new", 4, 9)
    (folder / "new" / "readme.txt").write_text("no image")
    files = sorted(path for path in (folder / "new").rglob("*") if path.suffix not in ("", ".txt"))
    return "new", [path.relative_to(folder / "new").as_posix() for path in files], files


def one_picture(folder):
    path = save_picture(folder / "one", 90, 3)
    with Image.open(path) as image:
        return path.name, [path.name], [image.copy()]


def new_series(write, folder):
    """As arrays, among them one without a missing value and one with a missing step."""
    series = make_series(7, 5)[0]
    series[0] = np.full((4, 2), 5.0)
    series[1][0] = np.nan
    if write is write_ts:
        path = folder / "new.ts"
        lines = (":".join(",".join(map(str, channel)) for channel in one.T.tolist()) for one in series)
        path.write_text("@problemName New\n@data\n" + "\n".join(lines).replace("nan", "NaN") + "\n")
    else:
        path = write(folder / ("new.npz" if write is write_npz else "new.csv"), series)
    ids = [f"s{i}" if write is write_long else str(i + 1) for i in range(7)]
    return path.name, ids, series


def one_series(name, folder):
    series = make_series(1, 6)[0][0]
    if name.endswith(".npy"):
        np.save(folder / name, series)
    else:
        (folder / name).write_text("\n".join(",".join(map(str, step)) for step in series.tolist()))
    return name, [name], [series]


def new_texts(extension, folder):
    texts = ["12, 34", "ż한", "🙂🙂 \"x\"", "5\n6"]
    path = write_table(folder / f"new.{extension}", {"words": texts, "more": ["?"] * 4})
    return path.name, ["1", "2", "3", "4"], texts


def one_text(folder):
    (folder / "a.txt").write_text("12 34\n", encoding="utf-8")
    return "a.txt", ["a.txt"], ["12 34\n"]


def new_manifest(columns, folder):
    make_manifest(folder / "more", 12)
    with open(folder / "more" / "all.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if any(row[name] for name in columns)]
    write_table(folder / "more" / "new.tsv", {name: [row[name] for row in rows] for name in columns})
    series = make_series(12)[0]
    items = []
    for row in rows:
        item = {name: row[name] for name in columns if row[name]}
        if "image" in item:
            item["image"] = folder / "more" / item["image"]
        if "series" in item:
            item["series"] = series[int(Path(item["series"]).stem)]
        items.append(item)
    return "more/new.tsv", [str(number + 1) for number in range(len(rows))], items


def of_one(make, modality, folder):
    path, ids, items = make(folder)
    return path, ids, [{modality: item} for item in items]


@pytest.mark.parametrize("kind, make", [
    ("images_run", new_pictures),
    ("images_run", one_picture),
    ("series_run", partial(new_series, write_ts)),
    ("series_run", partial(new_series, write_npz)),
    ("series_run", partial(new_series, write_long)),
    ("series_run", partial(one_series, "a.npy")),
    ("series_run", partial(one_series, "a.csv")),
    ("text_run", partial(new_texts, "csv")),
    ("text_run", partial(new_texts, "tsv")),
    ("text_run", partial(new_texts, "jsonl")),
    ("text_run", one_text),
    ("multimodal_run", partial(new_manifest, ("image", "text", "series"))),
    ("multimodal_run", partial(new_manifest, ("text", "series"))),
    ("multimodal_run", partial(new_manifest, ("image",))),
    ("multimodal_run", partial(of_one, new_pictures, "image")),
    ("multimodal_run", partial(of_one, one_picture, "image")),
    ("multimodal_run", partial(of_one, one_text, "text")),
    ("multimodal_run", partial(of_one, partial(one_series, "a.npy"), "series")),
])  # fmt: skip
def test_predictions_of_files_are_those_of_raw_items(kind, make, request, tmp_path):
    folder, _ = request.getfixturevalue(kind)
    path, ids, items = make(tmp_path)
    done = run(inference.main, tmp_path, f"--model_path={folder}/checkpoints/{BEST}", f"--input={path}")
    assert done.status == 0 and done.err == "", done.err
    assert f"{len(ids)} prediction{'s' * (len(ids) > 1)}\n" in done.out
    check_predictions(folder, tmp_path / "results", ids, items)
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["predictions.csv"]


def test_labels_are_not_needed_but_may_be_there(text_run, series_run):
    for folder, path, count in ((text_run[0], "data.jsonl", 30), (series_run[0], "test.ts", 10)):
        done = infer(folder, f"--input={path}", "--output_dir=labelled")
        assert done.status == 0 and len(predictions(folder / "labelled")) == count, done.err


def test_a_column_that_no_item_has_is_noted(multimodal_run, tmp_path):
    folder, _ = multimodal_run
    new_manifest(("text",), tmp_path)
    done = infer(folder, f"--input={tmp_path}/more/new.tsv", "--output_dir=text only")
    assert done.status == 0 and "no item has an entry for image (column 'image')" in done.out and "'series'" in done.out


def broken_picture(folder):
    path, ids, items = new_pictures(folder)
    (folder / "new" / "z.png").write_bytes(b"no image")
    Image.new("F", (3, 3), 7.0).save(folder / "new" / "zz.tif")
    return path, ids, items, ["new/z.png: not an image", "new/zz.tif: mode F with values 7.0"]


def broken_series(folder):
    series = make_series(4, 5)[0]
    lines = [":".join(",".join(map(str, channel)) for channel in one.T.tolist()) for one in series]
    lines.insert(2, "1,2:3")
    lines.insert(4, "1,2:3,x")
    lines.insert(5, "1,2:3,1e300")
    (folder / "new.ts").write_text("@problemName New\n@data\n" + "\n".join(lines).replace("nan", "NaN") + "\n")
    return "new.ts", ["1", "2", "4", "7"], series, [
        "new.ts, line 5: ragged",
        "new.ts, line 7, dimension 2, value 2: 'x'",
        "new.ts, line 8: the series holds values too far",
    ]


def broken_texts(folder):
    (folder / "new.csv").write_text('words\n"one"\n" "\nthree\nfour,4\n')
    return "new.csv", ["1", "3"], ["one", "three"], ["new.csv, line 3", "new.csv, line 5: 2 fields for 1 columns"]


def broken_manifest(folder):
    (folder / "bad.png").write_bytes(b"no image")
    np.save(folder / "wide.npy", np.zeros((3, 5)))
    rows = "calm,\n,nowhere.png\n,bad.png\nx,wide.npy\nwindy,\n"
    (folder / "new.csv").write_text("text,series\n" + rows.replace("nowhere.png", "nowhere.npy"))
    return "new.csv", ["1", "5"], [{"text": "calm"}, {"text": "windy"}], [
        "new.csv, line 3, column 'series': there is no file nowhere.npy",
        "new.csv, line 4",
        "new.csv, line 5: the series has shape (3, 5), it must be (steps, 2)",
    ]


@pytest.mark.parametrize("kind, make", [
    ("images_run", broken_picture),
    ("series_run", broken_series),
    ("text_run", broken_texts),
    ("multimodal_run", broken_manifest),
])  # fmt: skip
def test_an_unreadable_item_is_reported_and_the_others_are_there(kind, make, request, tmp_path):
    folder, _ = request.getfixturevalue(kind)
    path, ids, items, errors = make(tmp_path)
    done = run(inference.main, tmp_path, f"--model_path={folder}/checkpoints/{BEST}", f"--input={path}")
    assert done.status == 0, done.err
    lines = done.err.splitlines()
    assert len(lines) == len(errors)
    for line, start in zip(lines, errors, strict=True):
        assert line.startswith(f"error: {start}") and line.count(f"{start.partition(':')[0]}:") <= 1, line
    assert f"{len(ids)} predictions; {len(errors)} could not be read" in done.out
    check_predictions(folder, tmp_path / "results", ids, items)


def test_of_many_unreadable_items_a_few_are_named_and_the_others_counted(text_run, tmp_path):
    folder, _ = text_run
    (tmp_path / "a.csv").write_text("words\n" + '" "\n' * 12 + "good\n" + '" "\n')
    done = run(inference.main, tmp_path, f"--model_path={folder}/checkpoints/{BEST}", "--input=a.csv")
    *named, last = done.err.splitlines()
    assert [line.partition(",")[0] for line in named] == ["error: a.csv"] * 10
    assert "line 2," in named[0] and "line 11," in named[-1] and last == "error: and 3 more"
    assert done.status == 0 and "1 prediction; 13 could not be read" in done.out


@pytest.mark.parametrize("kind, name, content, part", [
    ("images_run", "new/a.png", "no image", "new/a.png"),
    ("images_run", "a.png", "no image", "a.png"),
    ("images_run", "new/a.txt", "no image", "no image in it"),
    ("series_run", "a.csv", "1,2\n3,x\n", "a.csv, line 2, column 2: 'x'"),
    ("series_run", "a.npy", "no array", "a.npy"),
    ("series_run", "a.xls", "no table", "'.xls'"),
    ("text_run", "a.csv", "text\nx\n", "no column 'words'; there are text"),
    ("text_run", "a.csv", 'words\n" "\n', "a.csv, line 2"),
    ("text_run", "a.txt", " \n", "a.txt"),
    ("multimodal_run", "a.csv", "picture,label\nx.png,up\n", "image"),
    ("multimodal_run", "a.csv", "image,label\nx.png,up\n", "a.csv, line 2, column 'image': there is no file x.png"),
    ("text_run", None, "", "nowhere"),
    ("images_run", None, "", "nowhere"),
    ("series_run", None, "", "nowhere"),
    ("multimodal_run", None, "", "nowhere"),
])  # fmt: skip
def test_nothing_to_predict(kind, name, content, part, request, tmp_path):
    folder, _ = request.getfixturevalue(kind)
    if name:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    path = (name or "nowhere.csv").partition("/")[0]
    done = run(inference.main, tmp_path, f"--model_path={folder}/checkpoints/{BEST}", f"--input={path}")
    assert done.status == 2 and part in done.err and "Traceback" not in done.err, done.err
    assert not (tmp_path / "results").exists()


def test_analysis_of_new_items_is_refused(text_run):
    done = infer(text_run[0], "--input=data.jsonl", "--analyze", "--output_dir=never")
    assert done.status == 2 and done.err.count("\n") == 1 and "--analyze" in done.err and "--input" in done.err
    assert not (text_run[0] / "never").exists()


def test_predictions_that_cannot_be_written(text_run, tmp_path):
    (tmp_path / "file").write_text("")
    done = infer(text_run[0], "--input=data.jsonl", f"--output_dir={tmp_path}/file")
    assert done.status == 2 and done.err.count("\n") == 1 and f"{tmp_path}/file: it is a file" in done.err


def test_prediction_of_several_modalities(multimodal_run, tmp_path):
    """Items may lack any of them; the batch size and the neighbours change nothing."""
    model, _ = load_model(multimodal_run[0] / "checkpoints" / BEST)
    image, series, text = picture(90, 0), make_series(1, 3)[0][0], "dark night"
    items = [{"image": image, "text": text, "series": series}, {"text": text}, {"image": np.asarray(image)},
             {"series": series}, {"series": series.tolist(), "text": text}]  # fmt: skip
    answers = predict(model, items)
    for size in (1, 2):
        for answer, other in zip(answers, predict(model, items, size), strict=True):
            assert answer["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
    with pytest.raises(ValueError, match="item 1: an item must be a dict with some of image, text, series"):
        predict(model, [items[0], text])
    with pytest.raises(ValueError, match="item 0: .*sound"):
        predict(model, [{"sound": series}])
    with pytest.raises(ValueError, match="item 0"):
        predict(model, [{}])


def test_manifests_of_one_column(tmp_path):
    """Trained on and predicted as manifests, though there is one modality."""
    make_manifest(tmp_path / "data", 36)
    with open(tmp_path / "data" / "all.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("image", "text", "series"):
        there = [row for row in rows if row[name]]
        (tmp_path / name).mkdir()
        path = write_table(tmp_path / "data" / f"{name}.csv", {key: [row[key] for row in there]
                                                               for key in (name, "label")})  # fmt: skip
        done = trained(tmp_path / name, "--dataset=multimodal", f"--data_path={path}", *SMALL_IMAGES)
        check_inference_repeats(tmp_path / name, done, ["down", "up"])
        done = infer(tmp_path / name, f"--input={path}")
        assert done.status == 0 and len(predictions(tmp_path / name / "results")) == len(there), done.err


def test_analysis_where_a_modality_is_missing_throughout(multimodal_run, tmp_path):
    folder, _ = multimodal_run
    write_table(tmp_path / "text.csv", {"text": ["day", "dark night"], "label": ["up", "down"]})
    done = infer(folder, "--analyze", f"--test_path={tmp_path}/text.csv", "--output_dir=analysis")
    assert done.status == 0 and done.err == "", done.err
    pictures = {file.name for file in (folder / "analysis").iterdir() if file.name.startswith("attention")}
    assert pictures == {"attention_text.png"}


def test_attention_to_a_modality_is_shown_as_a_share_and_where_within_it(multimodal_run, monkeypatch):
    """All modalities together get 1. A figure shows one of them: 1 is all that it gets, and the share is named."""
    drawn = {}
    for kind in (adapters.ImageAdapter, adapters.TextAdapter, adapters.SeriesAdapter):
        monkeypatch.setattr(kind, "draw_attention", lambda self, *given: drawn.update({type(self): given}))
    folder, _ = multimodal_run
    infer(folder, "--analyze", "--output_dir=shares")
    assert len(drawn) == 3
    for _, _, maps, captions, _ in drawn.values():
        for weights in maps:
            np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        shares = [int(re.search(r", (\d+)% of the attention$", caption)[1]) for caption in captions]
        assert all(0 < share < 100 for share in shares)


def test_a_modality_that_training_lacks_is_noted(tmp_path):
    write_table(tmp_path / "a.csv", {"text": ["x", "y"] * 5, "label": ["a", "b"] * 5})
    write_table(tmp_path / "b.csv", {"text": ["x", "y"], "series": ["s.npy", ""], "label": ["a", "b"]})
    np.save(tmp_path / "s.npy", np.zeros((3, 1)))
    done = trained(tmp_path, "--dataset=multimodal", "--data_path=a.csv", "--test_path=b.csv")
    assert "note: no training item has an entry for series" in done.out


# --- Names are part of the data --------------------------------------------------------------------------------------


def write_named(path, columns, count=24, seed=0):
    """A table of series with channels acc and gyro, which tell the class by which of them is the larger."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        for _ in range(4):
            a = (3 if number % 2 else -3) + rng.normal(0, 0.3)
            cells = {"id": f"s{number}", "label": "AB"[number % 2], "acc": f"{a:.3f}", "gyro": f"{-a:.3f}"}
            rows.append([{**cells, "spin": cells["gyro"], "station": "north"}[name] for name in columns])
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@pytest.fixture(scope="module")
def named_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("named")
    write_named(folder / "train.csv", ["id", "acc", "gyro", "label"])
    write_named(folder / "test.csv", ["id", "acc", "gyro", "label"], 16, 1)
    write_named(folder / "reordered.csv", ["gyro", "label", "id", "acc"], 16, 1)
    write_named(folder / "renamed.csv", ["id", "acc", "spin", "label"], 16, 1)
    write_named(folder / "more.csv", ["id", "acc", "gyro", "station", "label"], 16, 1)
    words = ("--dataset=sequences", "--data_path=train.csv", "--epochs=6", "--lr=1e-2")
    done = trained(folder, *words, "--test_path=test.csv")
    return folder, done, words


def test_features_in_another_order_are_the_same_test_data(named_run, tmp_path):
    folder, done, words = named_run
    assert "series  4 steps, 2 channels: acc, gyro\n" in done.out
    assert re.search(r"test accuracy (\S+)", done.out)[1] == "1.0000"
    for name in ("train.csv", "reordered.csv"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    again = trained(tmp_path, *words, "--test_path=reordered.csv")
    assert re.search(r"test accuracy (\S+)", again.out)[1] == "1.0000"
    accuracy = []
    for name in ("test.csv", "reordered.csv"):
        assert infer(folder, f"--test_path={name}").status == 0
        accuracy.append(results_of(folder)["negative_log_likelihood"])
    assert accuracy[0] == accuracy[1]


@pytest.mark.parametrize("name, part", [
    ("renamed.csv", "gyro missing, spin not among them; rename the columns"),
    ("more.csv", "station not among them; rename the columns, or leave out what is no feature: --ignore_columns stat"),
])  # fmt: skip
def test_other_features_are_refused_wherever_they_come(name, part, named_run):
    folder, _, words = named_run
    for done in (
        infer(folder, f"--test_path={name}"),
        infer(folder, f"--input={name}", "--output_dir=never"),
        run(train.main, folder, *TINY, *words, f"--test_path={name}", "--checkpoint_dir=never"),
    ):
        assert done.status == 2 and done.err.count("\n") == 1 and part in done.err, done.err
    assert not (folder / "never").exists()
    if name == "more.csv":
        done = infer(folder, f"--test_path={name}", "--ignore_columns", "station")
        assert done.status == 0 and results_of(folder)["accuracy"] == 1.0


def test_new_items_with_features_in_another_order(named_run):
    folder, *_ = named_run
    found = {}
    for name in ("test.csv", "reordered.csv"):
        assert infer(folder, f"--input={name}", f"--output_dir={name}.out").status == 0
        found[name] = (folder / f"{name}.out" / "predictions.csv").read_text()
    assert found["test.csv"] == found["reordered.csv"] and "A" in found["test.csv"]
    (folder / "one.csv").write_text("gyro,acc\n-3,3\n-3,3\n")  # a file of one series
    assert infer(folder, "--input=one.csv").status == 0
    assert predictions(folder / "results")[0]["class"] == "B"
    (folder / "bare.csv").write_text("3,-3\n3,-3\n")
    done = infer(folder, "--input=bare.csv")
    assert "note: bare.csv: names no columns, so they are taken in the order of training: acc, gyro" in done.out
    assert predictions(folder / "results")[0]["class"] == "B"


def test_data_frames_are_taken_by_the_names_of_their_columns(named_run):
    """Their rows are steps; a frame in place of the list is refused, since iterating it gives the names."""
    folder, *_ = named_run
    model, _ = load_model(folder / "checkpoints" / BEST)
    frame = pandas.DataFrame({"acc": [3.0, 3.1], "gyro": [-3.0, -3.1]})
    array, named, turned = predict(model, [frame.to_numpy(), frame, frame[["gyro", "acc"]]])
    assert array == named == turned and array["class"] == "B"
    for wrong, part in (
        (frame.rename(columns={"gyro": "spin"}), "gyro missing, spin not among them"),
        (frame.assign(time=[0, 1]), "time not among them; rename its columns, or drop what is no feature"),
        (frame[["acc"]], "gyro missing"),
        (frame[["acc", "gyro", "gyro"]], "column 'gyro' is there more than once"),
    ):
        with pytest.raises(ValueError, match="item 1: a DataFrame of a series: .*" + re.escape(part)):
            predict(model, [frame, wrong])
    with pytest.raises(ValueError, match=r"items must be a list, this is one DataFrame.*predict\(model, \[frame\]\)"):
        predict(model, frame)
    with pytest.raises(ValueError, match=r"an array of shape \(251, 1\); if it is one series, write predict\("):
        predict(model, np.zeros((251, 1)))


def test_series_files_of_a_manifest_are_ordered_by_name(tmp_path):
    rows = []
    for number in range(20):
        a = 3 if number % 2 else -3
        columns, values = ("x,y", f"{a},{-a}") if number % 4 < 2 or number >= 16 else ("y,x", f"{-a},{a}")
        (tmp_path / f"{number}.csv").write_text(f"{columns}\n" + f"{values}\n" * 3)
        rows.append((f"{number}.csv", "AB"[number % 2]))
    write_table(tmp_path / "all.csv", dict(zip(("series", "label"), zip(*rows, strict=True), strict=True)))
    splits, info = load_splits(Settings(dataset_type="multimodal", data_path=str(tmp_path / "all.csv")))
    items = [(data[n]["input"]["series"], data[n]["label"]) for data in splits.values() for n in range(len(data))]
    adapter = from_description(info["adapters"]["series"])
    x = adapter.names.index("x")
    assert len(items) == 20 and all((tokens[:, x] > 0).all() == (label == 1) for tokens, label in items)
    assert torch.equal(adapter(tmp_path / "3.csv"), adapter(tmp_path / "1.csv"))
    (tmp_path / "7.csv").write_text("x,z\n1,2\n")
    with pytest.raises(ValueError, match="y missing, z not among them"):
        load_splits(Settings(dataset_type="multimodal", data_path=str(tmp_path / "all.csv")))


def labelled_in(kind, folder, labels):
    """Items with these labels (text), in this format: the settings that read them."""
    dataset, path = "text", folder / f"data.{kind}"
    if kind in ("csv", "tsv", "jsonl"):
        write_table(path, {"text": [f"text {n}" for n in range(len(labels))], "label": labels})
    elif kind == "manifest":
        dataset = "multimodal"
        path = write_table(folder / "m.csv", {"text": [f"text {n}" for n in range(len(labels))], "label": labels})
    elif kind == "folders":
        dataset, path = "images", folder / "data"
        for number, label in enumerate(labels):
            save_picture(path / label / f"{number}", 50, number)
    else:
        dataset = "sequences"
        if kind == "npz":
            np.savez(path, x=np.zeros((len(labels), 3)), y=np.array(labels))
        elif kind == "ts":
            lines = [f"0,1,2:{label}" for label in labels]
            path.write_text("\n".join([f"@classLabel true {' '.join(sorted(set(labels)))}", "@data", *lines]))
        elif kind == "arff":
            classes = ",".join(sorted(set(labels)))
            head = f"@attribute a numeric\n@attribute b numeric\n@attribute c {{{classes}}}\n@data\n"
            path.write_text(head + "".join(f"0,1,{label}\n" for label in labels))
        else:
            path = folder / "long.csv"
            rows = "".join(f"s{n},{label},1\n" for n, label in enumerate(labels))
            path.write_text("id,label,x\n" + rows)
    return Settings(dataset_type=dataset, data_path=str(path), image_size=8, patch_size=4)


FORMATS = ("csv", "tsv", "jsonl", "manifest", "folders", "npz", "ts", "arff", "long")


@pytest.mark.parametrize("kind", FORMATS)
def test_labels_mean_the_same_in_every_format(kind, tmp_path):
    def notes(name, labels):
        folder = tmp_path / name
        folder.mkdir()
        _, info = load_splits(labelled_in(kind, folder, labels))
        return info["class_names"], [note for note in info["notes"] if "label" in note]

    assert notes("floats", ["1", "1.0", "0", "0.0"] * 3) == (
        ["0", "1"], ["labels that are written in several ways are one class: '0' and '0.0', '1' and '1.0'"]
    )  # fmt: skip
    names, (note,) = notes("case", ["pos", "Pos", "neg"] * 3)
    assert names == ["Pos", "neg", "pos"] and "differ only in case" in note
    names, (note,) = notes("missing", ["nan", "pos", "neg"] * 3)
    assert names == ["nan", "neg", "pos"] and "looks like a missing value" in note
    assert notes("countries", ["NA", "DE", "KR"] * 3) == (["DE", "KR", "NA"], [])
    names, (note,) = notes("several", ["a|b", "a", "b"] * 3)
    assert names == ["a", "a|b", "b"] and "for items with any number of labels say --task multilabel" in note
    for name, labels, part in (
        ("fraction", ["0.5", "1.5", "1"] * 3, "label '0.5' is not a class: for numbers say --task regression"),
        ("gap", ["1", "nan", "0"] * 3, "label 'nan' among numbers is a missing value"),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=part):
            load_splits(labelled_in(kind, tmp_path / name, labels))


def test_labels_of_test_data_are_found_by_what_they_mean(tmp_path):
    apart = unicodedata.normalize("NFD", "é")
    train_labels, test_labels = ["1", "0", "é"] * 4, ["1.0", "0.0", apart]
    write_table(tmp_path / "a.csv", {"text": list("abcdefghijkl"), "label": train_labels})
    write_table(tmp_path / "b.csv", {"text": list("xyz"), "label": test_labels})
    paths = {"data_path": str(tmp_path / "a.csv"), "test_path": str(tmp_path / "b.csv")}
    splits, info = load_splits(Settings(dataset_type="text", **paths))
    assert info["class_names"] == ["0", "1", "é"] and splits["test"].labels.tolist() == [1, 0, 2]
    (tmp_path / "b.csv").write_text(f"text;label\nx;1.0\ny;0.0\nz;{apart}\n")
    notes = load_splits(Settings(dataset_type="text", **paths))[1]["notes"]
    assert any("b.csv: its cells seem to be separated by semicolons" in note for note in notes)
    write_table(tmp_path / "b.csv", {"text": list("xyz"), "label": ["1", "É", "2"]})
    with pytest.raises(ValueError) as caught:
        load_splits(Settings(dataset_type="text", **paths))
    assert [line.split(": ", 1)[1] for line in str(caught.value).splitlines()] == [
        "label 'É' does not occur in the training data (there is 'é'); correct or remove it",
        "label '2' does not occur in the training data; correct or remove it",
    ]


def test_class_folders_are_the_same_in_either_form(tmp_path):
    for form, folder in (("NFC", "train"), ("NFD", "test")):
        for name, level in (("개", 50), ("고양이", 200)):
            for number in range(8):
                save_picture(tmp_path / folder / unicodedata.normalize(form, name) / f"{number}", level, number)
    done = trained(tmp_path, "--dataset=images", "--data_path=train", "--test_path=test", *SMALL_IMAGES)
    check_inference_repeats(tmp_path, done, ["개", "고양이"])
    (tmp_path / "train").rename(tmp_path / "before")
    for path in list((tmp_path / "before").iterdir()):  # the data move to another system
        path.rename(tmp_path / "before" / unicodedata.normalize("NFD", path.name))
    assert infer(tmp_path, "--data_path=before", "--split=train").status == 0
    assert results_of(tmp_path)["samples_as_in_training"] is True


def test_classes_of_an_older_checkpoint_are_found(tmp_path):
    """It knew '1.0' as it stood, and no names of columns."""
    write_table(tmp_path / "a.csv", {"text": [f"text {n}" for n in range(20)], "label": ["0.0", "1.0"] * 10})
    settings = Settings(dataset_type="text", data_path=str(tmp_path / "a.csv"))
    _, info = load_splits(settings)

    def with_classes(names):
        return info | {"task": info["task"] | {"class_names": names}}

    _, again = load_splits(settings, with_classes(["0.0", "1.0"]))
    assert info["class_names"] == ["0", "1"] and again["class_names"] == ["0.0", "1.0"]
    write_table(tmp_path / "a.csv", {"text": [f"text {n}" for n in range(20)], "label": ["0.5", "None"] * 10})
    splits, again = load_splits(settings, with_classes(["0.5", "None"]))
    assert splits["test"].labels.tolist().count(0) == 2 and not any("label" in note for note in again["notes"])
    known = {"kind": "series", "mean": [0.0], "std": [1.0], "flagged": [], "max_seq_len": None}
    assert from_description(known)([[2.0]]).tolist() == [[2.0]]


def test_a_header_again_is_named_in_training_and_left_out_of_predictions(text_run, tmp_path):
    (tmp_path / "a.csv").write_text("words,kind\n1,a\n2,b\nwords,kind\n3,a\n")
    columns = ("--text_column=words", "--label_column=kind")
    done = run(train.main, tmp_path, *TINY, "--dataset=text", "--data_path=a.csv", *columns)
    assert done.status == 2 and done.err == "error: a.csv, line 4: is the header again; remove it\n"
    done = infer(text_run[0], f"--input={tmp_path}/a.csv", "--output_dir=again")
    assert done.status == 0 and "3 predictions; 1 could not be read" in done.out


# --- Tables as other programs write them -----------------------------------------------------------------------------


def ucr_rows(count, seed):
    rng = np.random.default_rng(seed)
    labels = [n % 2 * 2 - 1 for n in range(count)]
    return [[str(label), *(f"{value:.3f}" for value in label + rng.normal(0, 0.2, 8))] for label in labels]


@pytest.mark.parametrize("kind", ["ucr", "wide"])
def test_a_series_per_row_through_the_commands(kind, tmp_path):
    """Trained on, evaluated elsewhere and predicted: each file is read as that of training was."""
    rows, more = ucr_rows(24, 0), ucr_rows(10, 1)
    if kind == "ucr":
        names = ["train.tsv", "test.tsv"]
        for name, lines in zip(names, (rows, more), strict=True):
            (tmp_path / name).write_text("".join("\t".join(line) + "\n" for line in lines))
    else:
        names = ["train.csv", "test.csv"]
        steps = [f"t{n}" for n in range(8)]
        write_table(tmp_path / "train.csv", dict(zip(["label", *steps], zip(*rows, strict=True), strict=True)))
        backward = [[row[0], *row[:0:-1]] for row in more]  # the last step first
        write_table(tmp_path / "test.csv", dict(zip(["label", *steps[::-1]], zip(*backward, strict=True), strict=True)))
    done = trained(tmp_path, "--dataset=sequences", f"--data_path={names[0]}", f"--test_path={names[1]}", "--epochs=4")
    assert f"note: {names[0]}: " in done.out and "series  8 steps, 1 channel\n" in done.out
    check_inference_repeats(tmp_path, done, ["-1", "1"])
    done = infer(tmp_path, f"--input={names[1]}")
    assert done.status == 0 and done.err == "", done.err
    model, _ = load_model(tmp_path / "checkpoints" / BEST)
    answers = predict(model, [np.array(row[1:], float) for row in more])
    assert [row["class"] for row in predictions(tmp_path / "results")] == [answer["class"] for answer in answers]


def test_a_table_of_another_encoding_and_delimiter_through_the_commands(tmp_path):
    rows = "".join(f"{'좋은' if n % 2 else '나쁜'} 영화 {n};{'긍정' if n % 2 else '부정'}\n" for n in range(20))
    (tmp_path / "a.csv").write_bytes(("text;label\n" + rows).encode("cp949"))
    done = run(train.main, tmp_path, *TINY, "--dataset=text", "--data_path=a.csv")
    assert done.status == 2 and "a.csv, line 2: byte 0xb3 is not UTF-8" in done.err
    done = trained(tmp_path, "--dataset=text", "--data_path=a.csv", "--encoding=cp949", "--delimiter=;")
    assert "semicolons" not in done.out  # it was told
    check_inference_repeats(tmp_path, done, ["긍정", "부정"])
    (tmp_path / "new.csv").write_text("text,note\n좋은 영화,x\n", encoding="utf-8")  # looks are each file's own
    done = infer(tmp_path, "--input=new.csv")
    model, _ = load_model(tmp_path / "checkpoints" / BEST)
    (answer,) = predict(model, ["좋은 영화"])
    assert done.status == 0 and float(predictions(tmp_path / "results")[0]["confidence"]) == pytest.approx(
        answer["confidence"], abs=2e-6
    )


def test_what_the_looks_of_series_say(tmp_path):
    def notes(name, **told):
        _, info = load_splits(Settings(dataset_type="sequences", data_path=str(tmp_path / name), **told))
        return info["about"], [note for note in info["notes"] if "transpose" in note or "one step" in note]

    y = np.arange(20) % 2
    x = np.random.default_rng(0).normal(size=(20, 6, 3))
    np.savez(tmp_path / "a.npz", x=x, y=y)
    np.savez(tmp_path / "b.npz", x=x.transpose(0, 2, 1), y=y)
    np.savez(tmp_path / "c.npz", x=x[:, :1], y=y)
    assert notes("a.npz") == (["series  6 steps, 3 channels"], [])
    about, (note,) = notes("b.npz")
    assert about == ["series  3 steps, 6 channels"]
    assert note.startswith("the series have 3 steps and 6 channels; if it is the other way round, transpose them")
    assert "the series have 1 step and 3 channels" in notes("c.npz")[1][0]
    np.savez(tmp_path / "d.npz", x=x[:, :1, :1], y=y)
    assert "the series have 1 step and 1 channel;" in notes("d.npz")[1][0]
    rows = "".join(f"s{n},{n % 2},1,{n},3\n" for n in range(20))
    (tmp_path / "a.csv").write_text("id,label,t0,t1,t2\n" + rows)
    _, (note,) = notes("a.csv")
    assert "every series has one step, of 3 channels; if each row" in note and "--table_rows series" in note
    assert notes("a.csv", table_rows="series") == (["series  3 steps, 1 channel"], [])


def test_settings_that_say_nothing_to_the_file_are_noted(series_run, tmp_path):
    folder, _ = series_run
    (tmp_path / "train.ts").write_bytes((folder / "train.ts").read_bytes())
    done = trained(tmp_path, "--dataset=sequences", "--data_path=train.ts", "--label_column=kind")
    assert "note: label_column has no effect on .ts files" in done.out
    done = infer(folder, "--input=test.ts", "--id_column=name")
    assert "note: id_column has no effect on .ts files" in done.out


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 7 TiB"), RuntimeError("can't allocate memory: x")])
def test_memory_that_runs_out_while_data_are_read(error, text_run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(adapters, "read_texts", fail)
    (tmp_path / "a.csv").write_text(FIVE)
    for done in (
        run(train.main, tmp_path, *TINY, "--dataset=text", "--data_path=a.csv"),
        infer(text_run[0], f"--input={tmp_path}/a.csv", "--output_dir=never"),
    ):
        assert done.status == 2 and done.err.count("\n") == 1, done.err
        assert "out of memory while reading the data" in done.err and "fewer items" in done.err
    monkeypatch.setattr(adapters, "read_texts", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(train.main, tmp_path, *TINY, "--dataset=text", "--data_path=a.csv")


# --- Mistakes --------------------------------------------------------------------------------------------------------


def bad_image(folder):
    make_images(folder / "data", 6)
    (folder / "data" / "日中" / "9.png").write_bytes(b"no image")
    return ["--dataset=images", "--data_path=data"], ["data/日中/9.png", "not an image"]


def no_classes(folder):
    save_picture(folder / "data" / "a", 50, 0)
    return ["--dataset=images", "--data_path=data"], ["data", "no class folder"]


def one_class_folder(folder):
    save_picture(folder / "data" / "dogs" / "a", 50, 0)
    return ["--dataset=images", "--data_path=data"], ["data", "'dogs'", "two classes"]


def unknown_class_folder(folder):
    make_images(folder / "data", 6)
    path = save_picture(folder / "more" / "dusk" / "1", 50, 1)
    return ["--dataset=images", "--data_path=data", "--test_path=more"], [f"more/dusk/{path.name}", "'dusk'"]


def patches_that_do_not_fit(folder):
    make_images(folder / "data", 6)
    return ["--dataset=images", "--data_path=data", "--image_size=30", "--patch_size=8"], ["patch_size 8", "30"]


def table_of(content, *flags, parts, dataset="text", name="a.csv"):
    def make(folder):
        (folder / name).write_text(content, encoding="utf-8")
        return [f"--dataset={dataset}", f"--data_path={name}", *flags], parts

    return make


FIVE = "text,label\nx,a\ny,b\nz,a\nu,b\n"
LONG = "id,label,v\n1,a,1\n1,a,2\n2,b,3\n2,b,4\n3,a,1\n4,b,2\n"


def unknown_class_in_test(folder):
    (folder / "a.csv").write_text(FIVE)
    (folder / "b.csv").write_text("text,label\nx,a\ny,c\n")
    return ["--dataset=text", "--data_path=a.csv", "--test_path=b.csv"], ["b.csv, line 3", "'c'"]


def lying_header(header, part, folder):
    write_ts(folder / "a.ts", *make_series(), header)
    return ["--dataset=sequences", "--data_path=a.ts"], ["a.ts, line", part]


def infinite_value(folder):
    write_ts(folder / "a.ts", [np.array([[1, 2.0], [3, np.inf]])], ["rise"])
    return ["--dataset=sequences", "--data_path=a.ts"], ["a.ts, line 5", "inf", "finite"]


def channel_without_values(folder):
    series, labels = make_series()
    for one in series:
        one[:, 1] = np.nan
    write_npz(folder / "a.npz", series, labels)
    return ["--dataset=sequences", "--data_path=a.npz"], ["a.npz", "channel 2", "no value"]


def other_width(folder):
    write_ts(folder / "a.ts", *make_series())
    write_ts(folder / "b.ts", [np.zeros((3, 1))], ["rise"])
    return ["--dataset=sequences", "--data_path=a.ts", "--test_path=b.ts"], ["b.ts, line 5", "(3, 1)", "2)"]


def manifest(change, parts, folder):
    path = make_manifest(folder)
    change(folder)
    return ["--dataset=multimodal", f"--data_path={path.name}", *SMALL_IMAGES], parts


def only_what_training_lacks(folder):
    (folder / "a.csv").write_text(FIVE)
    (folder / "b.csv").write_text("text,series,label\nx,,a\n,s.npy,b\n")
    np.save(folder / "s.npy", np.zeros((3, 1)))
    return ["--dataset=multimodal", "--data_path=a.csv", "--test_path=b.csv"], ["b.csv, line 3", "only series"]


def edit(old, new):
    def change(folder):
        text = (folder / "all.csv").read_text()
        assert old in text
        (folder / "all.csv").write_text(text.replace(old, new, 1))

    return change


BAD = [
    bad_image, no_classes, one_class_folder, unknown_class_folder, patches_that_do_not_fit, unknown_class_in_test,
    table_of('text,label\nx,a\n"",b\n', parts=["a.csv, line 3", "'text'", "empty"]),
    table_of("text,label\nx,a\ny,b,c\n", parts=["a.csv, line 3", "3 fields for 2 columns"]),
    table_of("text,label\nx,a\ny,\n", parts=["a.csv, line 3", "label"]),
    table_of("text,label\nx,a\ny,a\n", parts=["a.csv", "'a'", "two classes"]),
    table_of("text,label\n", parts=["a.csv", "no row"]),
    table_of("text,label\nx,a\ny,b\n", parts=["2 samples, one of each class"]),
    table_of("words,label\nx,a\ny,b\n", parts=["a.csv", "no column 'text'", "words, label"]),
    table_of(FIVE, "--label_column=kind", parts=["a.csv", "no column 'kind'"]),
    table_of(FIVE, "--test_path=nowhere.csv", parts=["nowhere.csv"]),
    table_of(FIVE, parts=["a.txt", "holds no label"], name="a.txt"),
    table_of(FIVE, parts=["'.xlsx'"], name="a.xlsx"),
    table_of('{"text": "x", "label": "a"}\n{"text": 7, "label": "b"}\n', parts=["a.jsonl, line 2", "7"],
             name="a.jsonl"),
    table_of('{"text": "x", "label": 0.5}\n', parts=["a.jsonl, line 1", "0.5"], name="a.jsonl"),
    table_of(LONG.replace("2,b,4", "2,b,four"), dataset="sequences", parts=["a.csv, line 5", "'v'", "'four'"]),
    table_of(LONG.replace("2,b,4", "2,a,4"), dataset="sequences", parts=["a.csv, line 5", "'a'"]),
    table_of(LONG.replace("2,b,4", "2,b"), dataset="sequences", parts=["a.csv, line 5", "2 fields for 3"]),
    table_of(LONG.replace("2,b,4", ",b,4"), dataset="sequences", parts=["a.csv, line 5", "id"]),
    table_of(LONG, "--id_column=name", dataset="sequences", parts=["a.csv", "'name'"]),
    table_of(LONG, dataset="sequences", parts=["'.json'"], name="a.json"),
    partial(lying_header, "@univariate true\n", "@univariate"),
    partial(lying_header, "@dimensions 3\n", "3 by @dimensions"),
    partial(lying_header, "@equalLength true\n@seriesLength 5\n", "5 by @seriesLength"),
    infinite_value, channel_without_values, other_width, only_what_training_lacks,
    partial(manifest, edit("files/4.npy", "files/x.npy"), ["all.csv, line 6", "'series'", "files/x.npy"]),
    partial(manifest, lambda folder: (folder / "files/4.npy").write_text("no array"),
            ["all.csv, line 6", "files/4.npy"]),
    partial(manifest, lambda folder: np.save(folder / "files/4.npy", np.zeros((2, 5))), ["all.csv, line", "channels"]),
    partial(manifest, lambda folder: next((folder / "files").glob("4.*g*")).write_text("no image"),
            ["all.csv, line 6", "files/4."]),
    partial(manifest, edit("image,text,series", "picture,words,wave"), ["all.csv", "image, text, series"]),
    partial(manifest, edit("image,text,series,label", "image,text,series,kind"),
            ["all.csv", "no column 'label'", "series, kind"]),
    lambda folder: (["--dataset=text"], ["--data_path", "text"]),
    lambda folder: (["--dataset=images", "--data_path=nowhere"], ["nowhere"]),
    lambda folder: (["--dataset=sequences", "--data_path=nowhere.ts"], ["nowhere.ts"]),
    lambda folder: (["--dataset=text", "--data_path=nowhere.csv"], ["nowhere.csv"]),
    lambda folder: (["--dataset=multimodal", "--data_path=nowhere.csv"], ["nowhere.csv"]),
]  # fmt: skip


@pytest.mark.parametrize("make", BAD)
def test_bad_data_is_named_line_by_line(make, tmp_path):
    words, parts = make(tmp_path)
    before = set(tmp_path.rglob("*"))
    done = run(train.main, tmp_path, *TINY, *words)
    assert done.status == 2, done.out
    lines = done.err.splitlines()  # one for each bad item, up to ten
    assert 1 <= len(lines) <= 11 and all(line.startswith("error: ") for line in lines), done.err
    assert all(part in done.err for part in parts), done.err
    assert set(tmp_path.rglob("*")) == before  # nothing half-written


def test_resuming_with_other_data_is_refused(tmp_path):
    texts, labels = make_texts()
    write_table(tmp_path / "a.csv", {"text": texts, "label": labels})
    trained(tmp_path, "--dataset=text", "--data_path=a.csv")
    before = (tmp_path / "checkpoints" / LAST).read_bytes()
    write_table(tmp_path / "a.csv", {"text": texts + ["x"] * 9, "label": labels + ["letters"] * 9})
    done = run(train.main, tmp_path, "--resume", "--epochs=3")
    assert done.status == 2 and done.err.count("\n") == 1 and "the data have changed" in done.err
    assert (tmp_path / "checkpoints" / LAST).read_bytes() == before
    write_table(tmp_path / "a.csv", {"text": texts, "label": labels})
    assert run(train.main, tmp_path, "--resume", "--epochs=3").status == 0


def test_what_is_known_of_the_data_is_stored(series_run, multimodal_run):
    for (folder, _), names in ((series_run, ["series"]), (multimodal_run, ["image", "text", "series"])):
        data = load_checkpoint(folder / "checkpoints" / BEST)["data"]
        assert list(data["adapters"]) == list(data["features"]) == names
        for name, known in data["adapters"].items():
            adapter = from_description(json.loads(json.dumps(known)))
            assert adapter.features == data["features"][name]


def test_the_same_samples_in_another_order_are_noticed(tmp_path):
    """What was set aside by its place in the file is another part then: training data could pass for test data."""
    rows = [f"{kind} number {number},{kind}" for number in range(10) for kind in ("cat", "dog")]
    table = tmp_path / "a.csv"
    table.write_text("\n".join(["text,label", *rows]))
    done = trained(tmp_path, "--dataset=text", "--data_path=a.csv")
    again = infer(tmp_path)
    assert done.status == 0 and "note" not in again.out
    assert json.loads((tmp_path / "results" / "results.json").read_text())["samples_as_in_training"] is True
    table.write_text("\n".join(["text,label", *reversed(rows)]))
    assert "note: these are not the samples of training's test split" in infer(tmp_path).out
    assert json.loads((tmp_path / "results" / "results.json").read_text())["samples_as_in_training"] is False
    refused = run(train.main, tmp_path, "--resume", "--epochs=3")
    assert refused.status == 2 and "the data have changed" in refused.err and refused.err.count("\n") == 1


def test_all_bad_items_are_named_at_once_and_many_are_counted(tmp_path):
    rows = [f"word {number},{'ab'[number % 2]}" if number % 3 else f",{'ab'[number % 2]}" for number in range(60)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]))
    done = run(train.main, tmp_path, *TINY, "--dataset=text", "--data_path=a.csv")
    lines = done.err.splitlines()
    assert done.status == 2 and len(lines) == 11 and lines[-1] == "error: and 10 more like these"
    assert [line.split(", column")[0] for line in lines[:2]] == ["error: a.csv, line 2", "error: a.csv, line 5"]


def spoilt_images(folder):
    for number, colour in enumerate(["red", "blue"] * 6):
        (folder / "a" / colour).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(folder / "a" / colour / f"{number}.png")
    bad = ["a/blue/3.png", "a/red/4.png", "a/red/8.png"]
    for name in bad:
        (folder / name).write_bytes(b"no image")
    return ["--dataset=images", "--data_path=a", "--image_size=8"], bad


def spoilt_series(folder):
    """One value too far from the others for float32, in three series: found only when they become tokens."""
    rows = [f"s{i},{'ab'[i % 2]},{step},{i + step}" for i in range(40) for step in range(3)]
    lines = ["id,label,x,y", *rows]
    test = ["id,label,x,y", *(f"t{i},{'ab'[i % 2]},1,{'1e300' if i % 2 else i}" for i in range(6))]
    (folder / "a.csv").write_text("\n".join(lines))
    (folder / "t.csv").write_text("\n".join(test))
    return ["--dataset=sequences", "--data_path=a.csv", "--test_path=t.csv"], [f"t.csv, line {n}" for n in (3, 5, 7)]


def strange_labels(folder):
    (folder / "a.csv").write_text("text,label\n" + "one,x\ntwo,y\n" * 8)
    (folder / "t.csv").write_text("text,label\na,x\nb,z\nc,y\nd,w\n")
    return ["--dataset=text", "--data_path=a.csv", "--test_path=t.csv"], ["t.csv, line 3", "t.csv, line 5"]


def missing_files(folder):
    rows = [f"some words,{'gone.png' if i in (2, 5) else ''},{'xy'[i % 2]}" for i in range(20)]
    (folder / "a.csv").write_text("\n".join(["text,image,label", *rows]))
    return ["--dataset=multimodal", "--data_path=a.csv"], ["a.csv, line 4", "a.csv, line 7"]


def spoilt_files_of_a_manifest(folder):
    spoilt_images(folder)
    rows = [f"some words,a/{('red', 'blue')[i % 2]}/{i}.png,{'xy'[i % 2]}" for i in range(12)]
    (folder / "a.csv").write_text("\n".join(["text,image,label", *rows]))
    words = ["--dataset=multimodal", "--data_path=a.csv", "--image_size=8"]
    return words, ["a.csv, line 5", "a.csv, line 6", "a.csv, line 10"]


MAKERS = [spoilt_images, spoilt_series, strange_labels, missing_files, spoilt_files_of_a_manifest]


@pytest.mark.parametrize("make", MAKERS)
def test_every_bad_item_is_named_wherever_it_is_found_out(make, tmp_path):
    words, bad = make(tmp_path)
    done = run(train.main, tmp_path, *TINY, *words)
    assert done.status == 2 and len(done.err.splitlines()) == len(bad), done.err
    assert all(line.startswith("error: ") for line in done.err.splitlines())
    assert all(f"error: {place}: " in done.err or f"error: {place}, " in done.err for place in bad), done.err


def test_the_training_file_is_no_test_file(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "a,x\nb,y\n" * 5)
    done = run(train.main, tmp_path, *TINY, "--dataset=text", "--data_path=a.csv", "--test_path=./a.csv")
    assert done.status == 2 and "test_path: a.csv is the training data itself" in done.err
