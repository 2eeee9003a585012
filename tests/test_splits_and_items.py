"""Through the real commands: which items stand in which split and what is said of each of them afterwards."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_own_data import (
    ROOT,
    SMALL_IMAGES,
    TINY,
    infer,
    make_images,
    make_manifest,
    make_series,
    predictions,
    quick,  # noqa: F401
    results_of,
    run,
    save_picture,
    trained,
    write_long,
    write_npz,
    write_table,
    write_ts,
)

import inference
import plots
import train
from adapters import from_description
from checkpoint import BEST, LAST, load_checkpoint
from config import Settings
from data_utils import grouped_split, load_splits
from inference import evaluate, load_model, predict
from messages import UserError, printable
from run_log import tensorboard_writer
from tables import read_table


def rows_of(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def splits_of(folder, **changes):
    """The data sets of the run in `folder`, as it saw them, and their description."""
    with chdir(folder):
        checkpoint = load_checkpoint(f"checkpoints/{LAST}")
        return load_splits(Settings.from_dict(checkpoint["settings"] | changes), checkpoint["data"])


# --- Folders of splits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names, wrapper", [
    (("Training", "Testing"), ""), (("Training", "Test"), ""), (("train", "valid", "test"), ""),
    (("seg_train", "seg_test"), ""), (("TRAIN", "TEST"), "Dataset/brain/"),
])  # fmt: skip
def test_training_on_the_usual_layouts(tmp_path, names, wrapper):
    for seed, name in enumerate(names):
        make_images(tmp_path / "data" / wrapper / name, 6 + seed, seed)
    done = trained(tmp_path, "--dataset=images", "--data_path=data", "--epochs=1", *SMALL_IMAGES)
    sizes = {"train": 12, "val": 14, "test": 16} if len(names) == 3 else {"train": 10, "val": 2, "test": 14}
    assert f"{sizes['train']} training, {sizes['val']} validation, {sizes['test']} test samples; 2 classes" in done.out
    (note,) = re.findall("note: data: the splits are (.*)", done.out)
    assert f"data/{wrapper}{names[0]} for training" in note and f"data/{wrapper}{names[-1]} for the test" in note
    assert infer(tmp_path).status == 0 and results_of(tmp_path)["num_samples"] == sizes["test"]
    assert {row["id"].split("/")[0] for row in rows_of(tmp_path / "results/items.csv")} == {"night & fog", "日中"}


def test_fractions_without_effect_are_noted(tmp_path):
    for seed, name in enumerate(("train", "val", "test")):
        make_images(tmp_path / "data" / name, 4, seed)
    words = ["--dataset=images", "--data_path=data", "--epochs=1", *SMALL_IMAGES]
    done = trained(tmp_path, *words, "--val_fraction=0.9", "--test_fraction=0.9")
    assert "note: val_fraction has no effect: there is a folder for validation" in done.out
    assert "note: test_fraction has no effect: there is a folder for the test" in done.out
    assert "no effect" not in trained(tmp_path, *words).out


def test_a_test_path_of_splits_is_refused_with_their_names(tmp_path):
    make_images(tmp_path / "data", 6)
    for name in ("Training", "Testing"):
        make_images(tmp_path / "more" / name, 3)
    words = ["--dataset=images", "--data_path=data", "--epochs=1", *SMALL_IMAGES]
    done = run(train.main, tmp_path, *words, "--test_path=more")
    assert done.status == 2 and "more/Testing" in done.err and "several splits" in done.err
    assert trained(tmp_path, *words, "--test_path=more/Testing")


# --- What a run says of images ---------------------------------------------------------------------------------------


def arrows(folder):
    for number in range(24):
        kind = ("left", "right")[number % 2]
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[2:6, :4 if kind == "left" else None] = 200
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / kind / f"{number}.png")


def test_own_images_are_not_mirrored_unless_asked(tmp_path):
    arrows(tmp_path / "data")
    words = ["--dataset=images", "--data_path=data", *SMALL_IMAGES]
    shown = "\nimages  in training moved by up to 1 pixel, "
    assert shown + "not mirrored (--flip)\n" in trained(tmp_path, *words).out
    assert not splits_of(tmp_path)[0]["train"].flip
    assert shown + "half of them mirrored (--no_flip)\n" in trained(tmp_path, *words, "--flip").out
    data = splits_of(tmp_path)[0]
    assert data["train"].flip and data["train"].flips.any() and not data["test"].flip
    assert "\nimages  in training neither moved nor mirrored\n" in trained(tmp_path, *words, "--no_augment").out
    assert Settings.from_dict({"dataset_type": "cifar10"}).flip


def test_mirroring_of_a_manifest_is_said_too(tmp_path):
    make_manifest(tmp_path / "data")
    done = trained(tmp_path, "--dataset=multimodal", "--data_path=data/all.csv", *SMALL_IMAGES, "--flip", "--epochs=1")
    assert "images  in training moved by up to 1 pixel, half of them mirrored (--no_flip)" in done.out


def deep_images(folder, most, count=20, kind="png"):
    """Grey of 16 bits, dark or bright within 0..most."""
    rng = np.random.default_rng(most)
    for number in range(count):
        name = ("dark", "light")[number % 2]
        low = 0.6 * most * (number % 2)
        values = rng.uniform(low, low + 0.4 * most, (9, 9))
        values[0, 0] = most
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(np.uint16)).save(folder / name / f"{number}.{kind}")


@pytest.mark.parametrize("most, bits", [(1000, 10), (4000, 12), (16000, 14), (60000, 16), (200, 8)])
def test_the_range_of_16_bits_is_what_the_training_images_use(tmp_path, most, bits):
    deep_images(tmp_path / "data", most)
    done = trained(tmp_path, "--dataset=images", "--data_path=data", "--epochs=12", *SMALL_IMAGES, "--lr=2e-2")
    white = 2**bits - 1
    assert f"0 is taken for black, {white} for white (--image_bits {bits})" in done.out
    described = load_checkpoint(tmp_path / "checkpoints" / BEST)["data"]["adapters"]["image"]
    known = from_description(json.loads(json.dumps(described)))
    assert known.bits == bits and 40 < known.mean[0] < 215
    assert infer(tmp_path).status == 0 and results_of(tmp_path)["accuracy"] == 1
    # New images are read alike as files, PIL images and arrays
    deep_images(tmp_path / "new", most, 4)
    assert infer(tmp_path, "--input=new").status == 0
    found = {row["id"]: row for row in predictions(tmp_path / "results")}
    model, _ = load_model(tmp_path / "checkpoints" / BEST)
    for id, row in found.items():
        with Image.open(tmp_path / "new" / id) as image:
            answers = predict(model, [image.copy(), np.array(image), tmp_path / "new" / id])
        assert {answer["class"] for answer in answers} == {row["class"]} == {id.split("/")[0]}
        assert all(float(row["confidence"]) == pytest.approx(answer["confidence"], abs=2e-6) for answer in answers)
    if bits < 16:
        deep_images(tmp_path / "brighter", 4 * most, 4)
        done = infer(tmp_path, "--input=brighter")
        assert done.status == 2 and f"they must be in 0..{white}, the {bits} bits of the training images" in done.err


def test_bits_that_the_user_gives(tmp_path):
    deep_images(tmp_path / "data", 3000)
    done = trained(tmp_path, "--dataset=images", "--data_path=data", "--epochs=1", *SMALL_IMAGES, "--image_bits=14")
    assert "16383 for white (--image_bits 14)" in done.out
    done = run(train.main, tmp_path, "--dataset=images", "--data_path=data", *SMALL_IMAGES, "--image_bits=10")
    assert done.status == 2 and "they must be in 0..1023" in done.err
    # of a checkpoint made before there was such a setting, all 16 bits are used
    described = load_checkpoint(tmp_path / "checkpoints" / BEST)["data"]["adapters"]["image"]
    del described["bits"]
    deep = np.full((8, 8), 32768, np.uint16)
    assert from_description(described).pixels(Image.fromarray(deep)).max() == 128


def test_bits_of_a_manifest(tmp_path):
    deep_images(tmp_path / "files", 4000)
    names = [f"files/{('dark', 'light')[number % 2]}/{number}.png" for number in range(20)]
    write_table(tmp_path / "all.csv", {"image": names, "label": [name.split("/")[1] for name in names]})
    done = trained(tmp_path, "--dataset=multimodal", "--data_path=all.csv", "--epochs=1", *SMALL_IMAGES)
    assert "4095 for white (--image_bits 12)" in done.out
    assert load_checkpoint(tmp_path / "checkpoints" / BEST)["data"]["adapters"]["image"]["bits"] == 12


def test_images_that_do_not_fit_into_memory_are_refused_at_once(tmp_path):
    make_images(tmp_path / "data", 300)
    words = "--dataset=images", "--data_path=data", "--image_size=16376", "--patch_size=8", "--batch_size=300"
    done = run(train.main, tmp_path, *words)
    assert done.status == 2 and "(--batch_size, --image_size) would take 1,124 GiB, and cpu has" in done.err
    done = run(train.main, tmp_path, *words[:-1], "--batch_size=1", "--cache=memory")
    assert done.status == 2 and "--cache memory: the pixels of 600 images of 16,376 x 16,376 would take" in done.err
    done = run(train.main, tmp_path, "--dataset=images", "--data_path=data", "--image_size=2147483640")
    assert done.status == 2 and "--image_size: expected a whole number (pixels)" in done.err


def test_photos_in_heic_count_as_unread(tmp_path):
    make_images(tmp_path / "data", 6)
    trained(tmp_path, "--dataset=images", "--data_path=data", "--epochs=1", *SMALL_IMAGES)
    for number in range(3):
        (tmp_path / "data/日中" / f"IMG_{number}.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    done = infer(tmp_path, "--input=data")
    assert done.status == 0 and "12 predictions; 3 could not be read" in done.out
    assert done.err.count("IMG_") == 3
    done = run(train.main, tmp_path, "--dataset=images", "--data_path=data", *SMALL_IMAGES)
    assert done.status == 2 and "IMG_" in done.err


# --- Another labelled set --------------------------------------------------------------------------------------------


def test_another_labelled_set_needs_the_checkpoint_alone(tmp_path):
    table = {"text": [f"{('good', 'bad')[n % 2]} {n}" for n in range(40)], "label": ["pos", "neg"] * 20}
    write_table(tmp_path / "train.csv", table)
    trained(tmp_path, "--dataset=text", "--data_path=train.csv")
    write_table(tmp_path / "new.csv", {name: cells[:15] for name, cells in table.items()})
    (tmp_path / "train.csv").rename(tmp_path / "away.csv")
    done = infer(tmp_path)
    assert done.status == 2 and "--data_path" in done.err and "--test_path" in done.err
    for words in ((), ("--data_path=new.csv",)):
        done = infer(tmp_path, "--test_path=new.csv", *words)
        assert done.status == 0 and "note: all 15 items of new.csv are evaluated" in done.out, done.err
        assert ("data_path has no effect" in done.out) == bool(words)
        results = results_of(tmp_path)
        assert results["num_samples"] == 15 and results["samples_as_in_training"] is False
        assert results["split_sizes"] == {"train": 28, "val": 4, "test": 15}
    assert len(rows_of(tmp_path / "results/items.csv")) == 15
    (tmp_path / "away.csv").rename(tmp_path / "train.csv")
    done = infer(tmp_path, "--test_path=./train.csv")
    assert done.status == 2 and "is the training data itself" in done.err


def test_another_labelled_set_of_every_kind(tmp_path):
    series, labels = make_series(40)
    write_ts(tmp_path / "a.ts", series[:30], labels[:30])
    write_npz(tmp_path / "b.npz", series[30:], labels[30:])
    make_images(tmp_path / "images", 6)
    make_images(tmp_path / "others/wrapped", 3, 1)
    make_manifest(tmp_path / "one")
    make_manifest(tmp_path / "two", 12)
    for kind, data, test, count in (("sequences", "a.ts", "b.npz", 10), ("images", "images", "others", 6),
                                    ("multimodal", "one/all.csv", "two/all.csv", 12)):  # fmt: skip
        work = tmp_path / f"run of {kind}"
        work.mkdir()
        small = () if kind == "sequences" else SMALL_IMAGES
        trained(work, f"--dataset={kind}", f"--data_path=../{data}", "--epochs=1", *small)
        place = tmp_path / data.split("/")[0]
        place.rename(tmp_path / "away")
        done = infer(work, f"--test_path=../{test}", "--analyze")
        assert done.status == 0 and results_of(work)["num_samples"] == count, done.err
        (tmp_path / "away").rename(place)


def test_the_test_set_of_training_needs_no_data_of_training(tmp_path):
    """Given by --test_path, or a folder of its own."""
    for split in ("train", "val", "test"):
        make_images(tmp_path / "data" / split, 4)
    trained(tmp_path, "--dataset=images", "--data_path=data", "--epochs=1", *SMALL_IMAGES)
    (tmp_path / "data/train/日中/broken.png").write_bytes(b"no image")
    for split in ("test", "val"):
        done = infer(tmp_path, f"--split={split}")
        assert done.status == 0 and results_of(tmp_path)["samples_as_in_training"] is True, done.err
    assert infer(tmp_path, "--split=train").status == 2


# --- Which items -----------------------------------------------------------------------------------------------------


def test_items_are_named_by_file(tmp_path, monkeypatch):
    make_images(tmp_path / "data", 20)
    for number in range(12):  # label noise, to have mistakes
        save_picture(tmp_path / "data/日中" / f"wrong{number}", 50, number)
    trained(tmp_path, "--dataset=images", "--data_path=data", "--epochs=8", *SMALL_IMAGES)
    drawn = []
    monkeypatch.setattr(plots, "plot_mistakes", lambda images, titles, path: drawn.append(titles))
    assert infer(tmp_path, "--analyze", "--amp=off").status == 0
    rows, results = rows_of(tmp_path / "results/items.csv"), results_of(tmp_path)
    assert len(rows) == results["num_samples"] and {row["split"] for row in rows} == {"test"}
    assert all((tmp_path / "data" / row["id"]).is_file() and row["id"].startswith(row["true"]) for row in rows)
    wrong = [row for row in rows if row["true"] != row["predicted"]]
    mistakes = results["analysis"]["most_confident_mistakes"]
    assert wrong and {row["id"] for row in wrong} == {row["id"] for row in mistakes}
    assert [title[0] for title in drawn[0]] == [plots.short(row["id"], 28) for row in mistakes]
    assert np.mean([row["true"] == row["predicted"] for row in rows]) == pytest.approx(results["accuracy"])
    # each row is what prediction says of that file
    model, _ = load_model(tmp_path / "checkpoints" / BEST)
    for row, answer in zip(rows, predict(model, [tmp_path / "data" / row["id"] for row in rows]), strict=True):
        assert row["predicted"] == answer["class"]
        assert float(row["confidence"]) == pytest.approx(answer["confidence"], abs=1e-5)
        assert float(row["probability_of_true"]) == pytest.approx(answer["probabilities"][row["true"]], abs=1e-5)
    assert infer(tmp_path, "--split=val").status == 0
    others = rows_of(tmp_path / "results/items.csv")
    assert {row["split"] for row in others} == {"val"}
    assert not {row["id"] for row in others} & {row["id"] for row in rows}


def test_items_are_named_by_the_id_of_their_table(tmp_path):
    series, labels = make_series(20)
    write_long(tmp_path / "a.csv", series, labels)
    trained(tmp_path, "--dataset=sequences", "--data_path=a.csv", "--epochs=1")
    assert infer(tmp_path).status == 0
    rows = rows_of(tmp_path / "results/items.csv")
    for row in rows:
        number = int(row["id"].removeprefix("s"))
        assert row["true"] == labels[number] and int(row["tokens"]) == len(series[number])
    names = [f"=n{n}" for n in range(20)]
    write_table(tmp_path / "b.csv", {"name": names, "text": ["x", "y"] * 10, "label": ["=1+1", "b"] * 10})
    trained(tmp_path, "--dataset=text", "--data_path=b.csv", "--epochs=1", "--id_column=name")
    for words in ((), ("--input=b.csv",)):
        assert infer(tmp_path, *words).status == 0
    for name, column in (("items", "true"), ("predictions", "class")):
        rows = rows_of(tmp_path / f"results/{name}.csv")
        assert rows and all(row["id"].startswith("'=n") for row in rows)
        assert {row[column] for row in rows} <= {"'=1+1", "b"}
    table = read_table(tmp_path / "results/items.csv")
    assert all(id.startswith("=n") for id in table.column("id")) and set(table.column("true")) == {"=1+1", "b"}


def test_items_of_built_in_data_and_of_a_data_set_of_ones_own(tmp_path):
    from sklearn.datasets import load_digits

    trained(tmp_path, "--dataset=digits", "--patch_size=4", "--epochs=1")
    assert infer(tmp_path).status == 0
    rows, digits = rows_of(tmp_path / "results/items.csv"), load_digits()
    assert len(rows) > 300 and all(str(digits.target[int(row["id"])]) == row["true"] for row in rows)
    model, _ = load_model(tmp_path / "checkpoints" / BEST)
    items = [{"input": model.adapters["image"](digits.images[n]), "label": int(digits.target[n])} for n in range(6)]
    evaluate(model, items, output_dir=tmp_path / "own")
    assert [row["id"] for row in rows_of(tmp_path / "own/items.csv")] == list("012345")


# --- Groups ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 2)), min_size=4, max_size=60),
       st.sampled_from([0.1, 0.2, 0.5]))  # fmt: skip
def test_a_group_is_never_on_both_sides(items, fraction):
    groups, labels = [f"g{group}" for group, _ in items], np.array([label for _, label in items])
    try:
        kept, held_out = grouped_split(labels, groups, fraction, np.random.default_rng(0))
    except UserError:  # each group is the only one of some class
        of = {label: {group for group, other in items if other == label} for label in set(labels.tolist())}
        alone = set().union(*(found for found in of.values() if len(found) == 1))
        assert alone == {group for group, _ in items}
        return
    assert sorted([*kept, *held_out]) == list(range(len(items)))
    sides = [{groups[number] for number in numbers} for numbers in (kept, held_out)]
    assert not sides[0] & sides[1] and all(sides)
    assert set(labels[kept]) == set(labels)  # each class can be learnt
    again = grouped_split(labels, groups, fraction, np.random.default_rng(0))
    np.testing.assert_array_equal(held_out, again[1])


def test_fractions_are_as_near_as_groups_allow():
    labels, groups = np.repeat([0, 1] * 10, 10), np.repeat(np.arange(20), 10).astype(str)
    for fraction in (0.1, 0.2, 0.5):
        _, held_out = grouped_split(labels, groups, fraction, np.random.default_rng(1))
        assert np.bincount(labels[held_out]).tolist() == [round(100 * fraction)] * 2
    sizes = np.random.default_rng(0).integers(1, 30, 60)
    labels, groups = np.repeat(np.arange(60) % 3, sizes), np.repeat(np.arange(60), sizes).astype(str)
    _, held_out = grouped_split(labels, groups, 0.2, np.random.default_rng(1))
    shares = np.bincount(labels[held_out]) / np.bincount(labels)
    assert np.abs(shares - 0.2).max() < 0.01
    # two groups of a class: one of them is held out, however large
    _, held_out = grouped_split(np.array([0] * 6 + [1] * 6), list("aaabbbcccddd"), 0.1, np.random.default_rng(1))
    assert len(held_out) == 6


PATIENTS = 8


def patients(folder, kind):
    """Data of eight patients with five items each, and the words that name the groups; a patient's items are alike."""
    rng = np.random.default_rng(0)
    names = [f"p{patient}" for patient in range(PATIENTS) for _ in range(5)]
    labels = ["ill" if int(name[1:]) % 2 else "well" for name in names]
    order = rng.permutation(len(names))
    names, labels = [names[i] for i in order], [labels[i] for i in order]
    if kind == "images":
        for number, (name, label) in enumerate(zip(names, labels, strict=True)):
            save_picture(folder / "data" / label / f"{name}_{number}", 20 * int(name[1:]), number)
        return "data", [r"--group_pattern=(p\d)_"]
    series = [np.full((4, 2), float(name[1:])) + rng.normal(0, 0.1, (4, 2)) for name in names]
    if kind == "npz":
        np.savez(folder / "a.npz", x=np.stack(series), y=np.array(labels), who=np.array(names),
                 id=np.array([f"{name}-{n}" for n, name in enumerate(names)]))  # fmt: skip
        return "a.npz", ["--group_column=who"]
    if kind == "ids":
        ids = [f"{number}/{name}" for number, name in enumerate(names)]
        np.savez(folder / "a.npz", x=np.stack(series), y=np.array(labels), id=np.array(ids))
        return "a.npz", ["--group_pattern=p[0-9]"]
    if kind == "long":
        with open(folder / "a.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "who", "label", "x", "y"])
            for number, (name, label, one) in enumerate(zip(names, labels, series, strict=True)):
                writer.writerows([[f"{name}-{number}", name, label, *step] for step in one.tolist()])
        return "a.csv", ["--group_column=who"]
    ids = [f"{name}-{number}" for number, name in enumerate(names)]
    table = {"id": ids, "who": names, "text": [f"{name} says" for name in names], "label": labels}
    if kind == "jsonl":
        table["who"] = [int(name[1:]) for name in names]
    write_table(folder / f"a.{'jsonl' if kind == 'jsonl' else 'csv'}", table)
    return f"a.{'jsonl' if kind == 'jsonl' else 'csv'}", ["--group_column=who"]


GROUPED = {"images": "images", "npz": "sequences", "ids": "sequences", "long": "sequences", "text": "text",
           "jsonl": "text", "manifest": "multimodal"}  # fmt: skip


@pytest.mark.parametrize("kind", GROUPED)
def test_items_of_a_group_stand_in_one_split(tmp_path, kind):
    path, words = patients(tmp_path, kind)
    data = [f"--dataset={GROUPED[kind]}", f"--data_path={path}", "--epochs=1"]
    data += SMALL_IMAGES if kind in ("images", "manifest") else []
    done = trained(tmp_path, *data, *words)
    assert "note: groups: 4 for training, 2 for validation, 2 for the test, none of them in two" in done.out
    assert "test_fraction 0.2 became 0.250" in done.out and "val_fraction 0.1 became 0.333" in done.out
    if kind == "long":
        assert "series tokens of 2 features" in done.out  # the group is none
    assert infer(tmp_path).status == 0 and results_of(tmp_path)["samples_as_in_training"] is True

    def groups(**changes):
        splits, _ = splits_of(tmp_path, **changes)
        return {name: {re.search(r"p\d", id)[0] for id in data.ids} for name, data in splits.items()}

    found = [groups(seed=seed) for seed in range(4)]
    for parts in found:
        assert sum(map(len, parts.values())) == PATIENTS == len(set.union(*parts.values()))
        assert parts["test"] == found[0]["test"]  # the same for every seed
    assert len({str(sorted(parts["val"])) for parts in found}) > 1
    if kind not in ("npz", "long"):  # whose groups must be named
        done = trained(tmp_path, *data)  # without groups they are mixed
        assert "groups" not in done.out.partition("data    ")[2]
        assert not groups()["train"].isdisjoint(groups()["test"])


def test_groups_of_given_test_data_must_be_others(tmp_path):
    path, words = patients(tmp_path, "text")
    rows = rows_of(tmp_path / path)
    for name, wanted in (("train", "01234567"), ("test", "67")):
        chosen = [row for row in rows if row["who"][1:] in wanted]
        write_table(tmp_path / f"{name}.csv", {key: [row[key] for row in chosen] for key in rows[0]})
    data = ["--dataset=text", "--data_path=train.csv", "--test_path=test.csv", "--epochs=1"]
    done = run(train.main, tmp_path, *data, *words)
    assert done.status == 2 and done.err.count("\n") == 1
    assert re.search(r"its group 'p[67]' is in the data for (training|the test) too", done.err)
    chosen = [row for row in rows if row["who"][1:] in "012345"]
    write_table(tmp_path / "train.csv", {key: [row[key] for row in chosen] for key in rows[0]})
    assert "note: groups: " in trained(tmp_path, *data, *words).out
    # evaluating elsewhere needs no groups
    write_table(tmp_path / "new.csv", {key: [row[key] for row in rows] for key in ("text", "label")})
    assert infer(tmp_path, "--test_path=new.csv").status == 0 and results_of(tmp_path)["num_samples"] == 40
    assert infer(tmp_path, "--input=new.csv").status == 0


def test_groups_that_look_the_same_are_one(tmp_path):
    """A leak that nobody would see: however a name is written, its items stand in one split."""
    forms = [("7", "7.0"), ("p1", "P1"), ("\uac1c", "\u1100\u1162"), ("a b", "a\u200b b"), ("8", "8."), ("q", " q "),
             ("r", "r"), ("s", "s")]  # fmt: skip
    who = [form for _ in range(5) for pair in forms for form in pair]
    table = {"text": [f"item {n}" for n in range(80)], "who": who, "label": ["ill", "ill", "well", "well"] * 20}
    write_table(tmp_path / "a.csv", table)
    done = trained(tmp_path, "--dataset=text", "--data_path=a.csv", "--group_column=who", "--epochs=1")
    found = re.search(r"groups: (\d+) for training, (\d+) for validation, (\d+) for the test", done.out)
    assert sum(map(int, found.groups())) == 8


@pytest.mark.parametrize("kind, words, part", [
    ("text", ["--group_column=whom"], "a.csv, line 2: there is no column 'whom'"),
    ("images", ["--group_column=who"], "find the groups in the ids of the items with --group_pattern"),
    ("text", ["--group_column=who", "--group_pattern=p"], "give one of them"),
    ("text", ["--group_pattern=(p"], "'(p' is no regular expression"),
    ("text", ["--group_pattern=q"], "group_pattern 'q' finds no group in it"),
    ("text", ["--group_pattern=(q)?"], "finds no group in it"),
    ("text", ["--group_pattern=^"], "finds no group in it"),
    ("npz", [], "holds x, y, who, id; it must hold x and y, and of other keys only lengths, id and the --group_column"),
    ("text", ["--group_column=label"], "groups cannot be split"),
])  # fmt: skip
def test_groups_that_cannot_be_used(tmp_path, kind, words, part):
    path, _ = patients(tmp_path, kind)
    done = run(train.main, tmp_path, f"--dataset={GROUPED[kind]}", f"--data_path={path}", *SMALL_IMAGES, *words)
    assert done.status == 2 and part in done.err and "Traceback" not in done.err, done.err
    assert not (tmp_path / "checkpoints").exists()


def test_a_series_or_a_row_without_its_group(tmp_path):
    path, words = patients(tmp_path, "long")
    text = (tmp_path / path).read_text()
    line = text.splitlines()[2]
    (tmp_path / path).write_text(text.replace(line, line.replace(",p", ",q", 1), 1))
    done = run(train.main, tmp_path, "--dataset=sequences", f"--data_path={path}", *words)
    assert done.status == 2 and "a.csv, line 3: who 'q" in done.err and "give all its rows the same" in done.err
    path, words = patients(tmp_path, "text")
    text = (tmp_path / path).read_text()
    line = text.splitlines()[2]
    (tmp_path / path).write_text(text.replace(line, re.sub(",p.,", ",,", line, count=1), 1))
    done = run(train.main, tmp_path, "--dataset=text", f"--data_path={path}", *words)
    assert done.status == 2 and "a.csv, line 3" in done.err and "the group is empty" in done.err


# --- Data that changed -----------------------------------------------------------------------------------------------


def changed_picture(folder):
    make_images(folder / "data", 8)

    def change():
        for number, file in enumerate(sorted((folder / "data").rglob("*.*"))):
            with Image.open(file) as image:
                other = Image.eval(image.convert("RGB"), lambda value: 255 - value)
            other.convert("L").save(file) if number % 2 else other.save(file)

    return ["--dataset=images", "--data_path=data", *SMALL_IMAGES], change


def one_pixel(folder):
    words, _ = changed_picture(folder)

    def change():
        for file in (folder / "data").rglob("*.png"):
            with Image.open(file) as image:
                image.load()
            image.putpixel((0, 0), 1 if image.mode == "1" else image.getpixel((1, 1)))
            image.info["comment"] = "x"
            image.save(file, compress_level=0)

    return words, change


def changed_series(folder):
    make_manifest(folder / "data")

    def change():
        for file in (folder / "data").rglob("*.npy"):
            np.save(file, np.load(file) + 1e-6)

    return ["--dataset=multimodal", "--data_path=data/all.csv", *SMALL_IMAGES], change


@pytest.mark.parametrize("make", [changed_picture, one_pixel, changed_series])
def test_files_that_changed_under_their_names_are_noticed(tmp_path, make):
    words, change = make(tmp_path)
    trained(tmp_path, *words)
    done = infer(tmp_path)
    assert "these are not the samples" not in done.out and results_of(tmp_path)["samples_as_in_training"] is True
    assert run(train.main, tmp_path, "--resume", "--epochs=3").status == 0
    change()
    done = infer(tmp_path)
    assert "note: these are not the samples of training's test split" in done.out, done.err
    assert results_of(tmp_path)["samples_as_in_training"] is False
    done = run(train.main, tmp_path, "--resume", "--epochs=6")
    assert done.status == 2 and "the data have changed (fingerprints" in done.err


def test_a_checkpoint_that_knows_the_names_of_files_alone_goes_on(tmp_path):
    """As earlier versions wrote them; a changed name is still noticed."""
    make_images(tmp_path / "data", 8)
    trained(tmp_path, "--dataset=images", "--data_path=data", *SMALL_IMAGES)
    for name in (BEST, LAST):
        checkpoint = torch.load(tmp_path / "checkpoints" / name, weights_only=True)
        known = checkpoint["data"]["fingerprints"]
        assert all(re.fullmatch("[0-9a-f]{8}-[0-9a-f]{8}", text) for text in known.values())
        checkpoint["data"]["fingerprints"] = {split: text.partition("-")[0] for split, text in known.items()}
        torch.save(checkpoint, tmp_path / "checkpoints" / name)
    assert infer(tmp_path).status == 0 and results_of(tmp_path)["samples_as_in_training"] is True
    assert run(train.main, tmp_path, "--resume", "--epochs=3").status == 0
    first = min((tmp_path / "data/日中").iterdir())
    first.rename(first.with_name("0renamed" + first.suffix))
    assert run(train.main, tmp_path, "--resume", "--epochs=4").status == 2


# --- Screens and names -----------------------------------------------------------------------------------------------


def on_screen(encoding, main, folder, *words):
    """A command in `folder` whose screen is a pipe of this encoding: its status and what it printed, as bytes."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, "strict") for _ in range(2))
    with chdir(folder), redirect_stdout(out), redirect_stderr(err):
        try:
            status = main([str(word) for word in words])
        except SystemExit as stopped:
            status = stopped.code
    out.flush()
    err.flush()
    return SimpleNamespace(status=status, out=out.buffer.getvalue(), err=err.buffer.getvalue())


@pytest.fixture(scope="module")
def korean_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("korean")
    labels = ["기쁨", "café ☕", "\x1b[31mONE\x1b[0m"]
    write_table(folder / "데이터.csv", {"text": [f"{'abc'[n % 3]} {n}" for n in range(45)], "label": labels * 15})
    trained(folder, "--dataset=text", "--data_path=데이터.csv")
    return folder


@pytest.mark.parametrize("encoding", ["cp949", "cp1252", "ascii", "utf-8"])
def test_what_a_screen_cannot_show_is_escaped(korean_run, tmp_path, encoding):
    words = [f"--model_path=checkpoints/{BEST}", f"--output_dir={tmp_path}"]
    done = on_screen(encoding, inference.main, korean_run, *words)
    assert done.status == 0 and done.err == b"", done.err
    shown = done.out.decode(encoding)
    korean, accent = encoding in ("cp949", "utf-8"), encoding in ("cp1252", "utf-8")
    assert ("기쁨" in shown) == korean and ("\\uae30\\uc068" in shown) == (not korean)
    assert ("café" in shown) == accent and ("caf\\xe9" in shown) == (not accent)
    assert "\\x1b[31mONE" in shown and "\x1b" not in shown
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["per_class"][1]["class"] == "café ☕"


def test_training_and_errors_on_a_screen_without_the_characters(korean_run, tmp_path):
    words = [*TINY, "--dataset=text", "--epochs=1", "--checkpoint_dir=한", "--log_dir=로그"]
    done = on_screen("cp1252", train.main, tmp_path, *words, f"--data_path={korean_run}/데이터.csv")
    assert done.status == 0 and b"\\ud55c" in done.out, done.err
    done = on_screen("cp1252", train.main, tmp_path, *words, "--data_path=없음.csv")
    assert done.status == 2 and done.err.startswith(b"error: \\uc5c6\\uc74c.csv"), done.err


def test_a_real_process_on_such_a_screen(korean_run, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "cp949:strict"}
    words = [sys.executable, ROOT / "inference.py", f"--model_path=checkpoints/{BEST}", f"--output_dir={tmp_path}"]
    done = subprocess.run(words, cwd=korean_run, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert "기쁨" in done.stdout.decode("cp949") and b"caf\\xe9" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf_8(tmp_path):
    """As an archive of a Korean Windows leaves them: nothing is lost, everything is shown."""
    make_images(tmp_path / "data", 8)
    folder = os.path.join(os.fsencode(tmp_path), b"data", b"\xb3\xb7")
    os.rename(tmp_path / "data" / "日中", folder)
    first = sorted(os.listdir(folder))[0]
    os.rename(os.path.join(folder, first), os.path.join(folder, b"\xb0\xa1" + first))
    with open(os.path.join(folder, b"\xb0.txt"), "w") as file:
        file.write("no image")
    done = on_screen("utf-8", train.main, tmp_path, *TINY, "--dataset=images", "--data_path=data", *SMALL_IMAGES)
    assert done.status == 0, done.err
    assert rb"left out as no images: 1 .txt; the first is data/\xb3\xb7/\xb0.txt" in done.out
    assert load_checkpoint(tmp_path / "checkpoints" / BEST)["data"]["class_names"] == ["\\xb3\\xb7", "night & fog"]
    done = on_screen("utf-8", inference.main, tmp_path, f"--model_path=checkpoints/{BEST}", "--input=data")
    assert done.status == 0, done.err
    assert {row["id"] for row in predictions(tmp_path / "results")} >= {f"\\xb3\\xb7/\\xb0\\xa1{os.fsdecode(first)}"}
    odd = os.fsdecode(b"\xb0\xa1")
    os.rename(tmp_path / "checkpoints", tmp_path / odd)
    done = on_screen("utf-8", inference.main, tmp_path, f"--model_path={odd}/{BEST}", f"--output_dir={odd}/out")
    assert done.status == 0 and rb"\xb0\xa1/best_model.pth: images, test split" in done.out, done.err
    assert b"into \\xb0\\xa1/out" in done.out
    done = on_screen("utf-8", inference.main, tmp_path, f"--model_path={odd}x/{BEST}")
    assert done.status == 2 and done.err.startswith(rb"error: cannot read the checkpoint \xb0\xa1x/"), done.err


HOSTILE = "\x1b]0;owned\x07\x9b31m\u202e\u200b"


def test_text_from_files_is_shown_escaped(tmp_path):
    """In notes, errors and tables, of class folders, files and columns."""
    make_images(tmp_path / "data", 6)
    (tmp_path / "data/日中").rename(tmp_path / "data" / HOSTILE)
    (tmp_path / "data" / HOSTILE / f"{HOSTILE}.txt").write_text("x")
    done = trained(tmp_path, "--dataset=images", "--data_path=data", "--epochs=1", *SMALL_IMAGES)
    shown = done.out + infer(tmp_path, "--analyze").out
    (tmp_path / "data" / HOSTILE / f"new\n{HOSTILE}.png").write_bytes(b"no image")
    done = infer(tmp_path, "--input=data")
    assert done.err.count("\n") == 1 and "new\\n\\x1b]0;owned" in done.err
    shown += done.out + done.err
    done = run(train.main, tmp_path, "--dataset=images", "--data_path=data", "--epochs=1", *SMALL_IMAGES)
    shown += done.err
    (tmp_path / "a.csv").write_text(f"text,{HOSTILE}\nx,y\n", encoding="utf-8")
    shown += run(train.main, tmp_path, "--dataset=text", "--data_path=a.csv", f"--label_column=a{HOSTILE}").err
    (tmp_path / f"{HOSTILE}.csv").write_text(f"text,label\nx,{HOSTILE}\ny,b\n", encoding="utf-8")
    shown += run(train.main, tmp_path, "--dataset=text", f"--data_path={HOSTILE}.csv").err
    shown += run(train.main, tmp_path, f"--data_set={HOSTILE}").err
    assert shown.count("\\x1b]0;owned\\x07") > 6
    assert all(character.isprintable() or character == "\n" for character in shown), ascii(shown)


def test_tensorboard_shows_text_escaped(tmp_path):
    hostile = Settings(dataset_type="text", label_column="a|b\x1b[0m", data_path="x\ny")
    tensorboard_writer(tmp_path, hostile, None).close()
    (events,) = tmp_path.glob("events*")
    shown = events.read_bytes()
    assert b"| label_column | a\\|b\\x1b[0m |" in shown and b"| data_path | x\\ny |" in shown
    assert b"\x1b[0m" not in shown


def test_ids_that_no_file_can_hold(tmp_path):
    """Half a character, as JSON may have it, in an id: escaped wherever it is written."""
    lines = [json.dumps({"id": f"\ud83d{n}", "text": "xy"[n % 2], "label": "ab"[n % 2]}) for n in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    trained(tmp_path, "--dataset=text", "--data_path=a.jsonl", "--epochs=1")
    assert infer(tmp_path, "--analyze").status == 0 and infer(tmp_path, "--input=a.jsonl").status == 0
    assert {row["id"] for row in predictions(tmp_path / "results")} == {f"\\ud83d{n}" for n in range(12)}


def test_printable_text_is_left_as_it_is():
    for text in ("", "plain", "日中 　ㅋ", "é ☕ 🙂", "a\\b 'c' \"d\""):
        assert printable(text) == text
    assert printable("a\tb\nc\x00\udcb0\udd00\xa0") == "a\\tb\\nc\\x00\\xb0\\udd00\\xa0"
    assert str(UserError("two\nlines \x1b[0m")) == "two\nlines \\x1b[0m"


def test_commands_to_copy_are_quoted(tmp_path):
    folder = tmp_path / "체크 포인트's"
    folder.mkdir()
    make_images(tmp_path / "data", 6)
    done = trained(tmp_path, "--dataset=images", "--data_path=data", "--epochs=1", *SMALL_IMAGES,
                   f"--checkpoint_dir={folder}/c d")  # fmt: skip
    (line,) = re.findall(r"next:   python (inference.py .*)", done.out)
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout.splitlines()
    assert words[:3] == ["inference.py", "--model_path", f"{folder}/c d/{BEST}"]
    assert run(inference.main, tmp_path, *words[1:]).status == 0
