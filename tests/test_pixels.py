"""Pixels of files: the same bits whatever reads and keeps them; a check that is made once and notices every change."""

import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from running import before_step
from torchvision.datasets import ImageFolder
from user_files import message, write

import adapters
import config
import inference
import messages
import pixels
from adapters import ImageDataset, MultimodalDataset, SequenceDataset, square_pixels
from batches import create_dataloader, set_epoch
from config import Settings, check_cache, choose_workers, resolve
from data_utils import load_splits
from messages import UserError, with_progress
from pixels import Kept, statistics

SIDE = 16
CACHES = ("auto", "memory", "disk", "none")


@pytest.fixture
def folder(tmp_path):
    """Images of two classes, of many sizes, kinds and modes, 16-bit grey among them."""
    rng = np.random.default_rng(0)
    for number in range(40):
        shape = rng.integers(10, 40, 2)
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.{('jpg', 'png', 'gif')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(*shape, 3), dtype=np.uint8)).save(path)
        if number % 10 == 0:
            deep = rng.integers(4096, size=shape, dtype=np.uint16)
            Image.fromarray(deep).save(path.with_name(f"deep{number}.png"))
    return tmp_path / "photos"


@pytest.fixture
def remembered(monkeypatch):
    """So few images are remembered too."""
    monkeypatch.setattr(pixels, "REMEMBERED", 1)


@pytest.fixture
def decoded(monkeypatch):
    """The names of files that are decoded in this process, as they are."""
    names = []

    def watched(path, *args, **kwargs):
        names.append(path.name)
        return square_pixels(path, *args, **kwargs)

    monkeypatch.setattr(adapters, "square_pixels", watched)
    return names


def loaded(folder, info=None, only=None, **settings):
    settings = {"dataset_type": "images", "data_path": str(folder), "image_size": SIDE, "flip": True} | settings
    return load_splits(Settings(**settings), info, only)


def same(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- The same bits ---------------------------------------------------------------------------------------------------


def test_pixels_are_the_same_bits_whatever_reads_and_keeps_them(folder, remembered):
    found = {cache: loaded(folder, cache=cache) for cache in CACHES}
    splits, info = found["none"]
    bits = info["adapters"]["image"]["bits"]
    assert bits == 12
    for name, data in splits.items():  # as all of them in memory, which are decoded here
        whole = np.stack([square_pixels(path, SIDE, bits) for path in data.images.paths])
        plain = ImageDataset(whole, data.labels, data.adapter, data.margin, data.flip, data.seed)
        expected = list(create_dataloader(plain, 8, shuffle=True, seed=3))
        np.testing.assert_array_equal(data.images, whole)
        for cache, (others, other_info) in found.items():
            assert {**other_info, "about": 0} == {**info, "about": 0}
            for workers in (0, 2) if cache != "auto" and name == "train" else (0,):
                loader = create_dataloader(others[name], 8, shuffle=True, seed=3, num_workers=workers)
                for _ in range(2):  # the second time from where they are kept
                    set_epoch(loader, 0)
                    same(loader, expected)
    train = splits["train"]
    values = np.stack([square_pixels(path, SIDE, bits) for path in train.images.paths]).reshape(-1, 3).astype(float)
    np.testing.assert_allclose(train.adapter.mean, values.mean(0), rtol=1e-14)
    np.testing.assert_allclose(train.adapter.std, values.std(0), rtol=1e-13)


def test_workers_that_start_afresh_read_the_same(folder, remembered):
    for cache in ("memory", "disk"):
        data = loaded(folder, cache=cache)[0]["test"]
        same(create_dataloader(pickle.loads(pickle.dumps(data)), 4), create_dataloader(data, 4))


def test_images_are_indexed_as_an_array(folder):
    images = loaded(folder)[0]["train"].images
    whole = np.asarray(images)
    for index in (3, -1, slice(2, 9, 3), [4, 4, 0], np.array([7])):
        np.testing.assert_array_equal(images[index], whole[index])
    np.testing.assert_array_equal(images.subset(np.array([5, 5, 1])), whole[[5, 5, 1]])
    assert images.shape == whole.shape and len(images) == len(whole)


def test_statistics_are_exact():
    rng = np.random.default_rng(1)
    values = rng.integers(250, 256, (10_000, 3))
    mean, std = statistics(len(values), values.sum(0), (values**2).sum(0))
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-15)
    np.testing.assert_allclose(std, values.std(0), rtol=1e-12)
    assert statistics(9, [9 * 255], [9 * 255**2]) == ([255.0], [1.0])


def test_nothing_of_skipped_batches_is_read(folder, decoded):
    data = loaded(folder, cache="none")[0]["train"]
    loader = create_dataloader(data, 8, shuffle=True, seed=1)
    set_epoch(loader, 2, first_batch=3)
    decoded.clear()
    read = [batch["label"] for batch in loader]
    left = sum(loader.batch_sampler.batches(2)[3:], [])
    assert len(read) == len(loader) - 3
    assert sorted(decoded) == sorted(data.images.paths[number].name for number in left)


def test_a_file_that_goes_bad_after_the_check_is_named_by_the_batch_that_needs_it(folder):
    data = loaded(folder, cache="none")[0]["train"]
    bad = data.images.paths[5]
    bad.write_bytes(b"damaged")
    for workers in (0, 1):
        text = message(lambda number: list(create_dataloader(data, 8, num_workers=number)), workers)
        assert f"{bad.name}: not an image that can be read" in text


# --- What is kept ----------------------------------------------------------------------------------------------------


def test_what_workers_read_is_kept_for_all(folder, remembered):
    loaded(folder)
    for cache in ("memory", "disk"):
        data = loaded(folder, cache=cache, augment=False)[0]["train"]  # remembered, so that nothing was read yet
        loader = create_dataloader(data, 8, num_workers=2)
        first = list(loader)
        hidden = folder.rename(folder.with_name("hidden"))
        same(loader, first)
        same(create_dataloader(data, 8), first)
        hidden.rename(folder)


def test_pixels_on_disk_are_found_by_the_next_run_and_never_those_of_another_file(folder, decoded):
    expected = np.asarray(loaded(folder, cache="disk")[0]["train"].images)
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        f".perceiver_{name}-16-pillow{pixels.PIL.__version__}" for name in ("images", "pixels")
    ]
    # ImageFolder, which takes every folder for a class, hidden ones too
    assert ImageFolder(folder).classes == sorted(path.name for path in folder.iterdir() if path.is_dir())
    decoded.clear()
    images = loaded(folder, cache="disk")[0]["train"].images
    np.testing.assert_array_equal(images, expected)
    assert decoded == []
    first = images.paths[0]
    Image.new("RGB", (20, 20), "blue").save(first)
    changed = loaded(folder, cache="disk")[0]["train"].images
    np.testing.assert_array_equal(changed[0], np.broadcast_to([0, 0, 255], (SIDE, SIDE, 3)) if first.suffix == ".png"
                                  else square_pixels(first, SIDE))  # fmt: skip
    np.testing.assert_array_equal(changed[1:], expected[1:])
    assert decoded == [first.name]


def test_damaged_pixels_on_disk_are_read_again(folder):
    expected = np.asarray(loaded(folder, cache="disk")[0]["train"].images)
    (file,) = folder.glob(".perceiver_pixels-*")
    data = bytearray(file.read_bytes())
    for place in range(100, len(data), 777):
        data[place] ^= 1
    for damaged in (data, data[: len(data) // 2], b""):
        file.write_bytes(damaged)
        np.testing.assert_array_equal(loaded(folder, cache="disk")[0]["train"].images, expected)


def _fill(path, seed):
    kept, rng = Kept(8, 3 * 64**2, path), np.random.default_rng(seed)
    while True:
        key = int(rng.integers(50))
        kept.put(rng.integers(8), key, np.full(3 * 64**2, key, np.uint8))


def test_two_processes_that_write_at_once_and_are_killed_leave_no_wrong_pixels(tmp_path):
    context, found = multiprocessing.get_context("fork"), 0
    for turn in range(3):
        both = [context.Process(target=_fill, args=(tmp_path / "pixels", 2 * turn + i)) for i in (0, 1)]
        for process in both:
            process.start()
        until = time.monotonic() + 0.3
        kept = Kept(8, 3 * 64**2, tmp_path / "pixels")
        while time.monotonic() < until or any(process.is_alive() for process in both):
            if time.monotonic() >= until:
                for process in both:
                    os.kill(process.pid, signal.SIGKILL)
                    process.join()
            for place in range(8):
                for key in range(50):
                    if (values := kept.get(place, key)) is not None:
                        assert (values == key).all()
                        found += 1
    assert found


def test_a_disk_that_is_too_small_is_refused_at_once(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    text = message(loaded, folder, cache="disk")
    assert "MiB more, and 0.0 MiB are free" in text and "--cache_dir" in text


def test_nothing_is_written_where_a_link_leads(folder, tmp_path):
    victim = write(tmp_path / "victim", "as it was")
    for name in ("images", "pixels"):
        (folder / f".perceiver_{name}-16-pillow{pixels.PIL.__version__}").symlink_to(victim)
    assert "cannot be used" in message(loaded, folder, cache="disk")
    assert victim.read_text() == "as it was"


def test_a_checkpoint_names_no_folder_for_pixels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    base = Settings(dataset_type="images", data_path="../photos", cache="disk").to_dict()
    settings, sources = resolve(base=base)
    assert "--cache_dir" in message(check_cache, settings, sources)
    check_cache(*resolve(base=base, flags={"cache_dir": "../mine"}))
    check_cache(*resolve(base=base, flags={"data_path": "../photos"}))
    write(tmp_path / "photos/.perceiver_images-16", "")  # it has been in use
    check_cache(settings, sources)


# --- The check and its record ----------------------------------------------------------------------------------------


def test_a_check_is_made_once_and_notices_what_changed(folder, remembered, decoded):
    first = loaded(folder, cache="none")
    assert len(decoded) == 44
    decoded.clear()
    again = loaded(folder, cache="none")
    assert decoded == [] and again[1] == first[1]
    path = folder / "a/0.jpg"
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-3] ^= 1  # within the picture: the same size and, set back by hand, the same time
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = loaded(folder, cache="none")
    assert decoded == ["0.jpg"] and changed[1]["fingerprints"] != first[1]["fingerprints"]
    Image.new("RGB", (9, 9)).save(folder / "a/new.png")
    (folder / "b/1.png").unlink()
    decoded.clear()
    loaded(folder, cache="none")
    assert decoded == ["new.png"]


def test_few_images_are_checked_at_every_start_and_leave_no_file(folder, decoded):
    for _ in range(2):
        decoded.clear()
        loaded(folder)
        assert len(decoded) == 44 and os.listdir(folder) in (["a", "b"], ["b", "a"])


def test_bad_files_are_named_and_the_good_ones_need_no_second_check(folder, remembered, decoded):
    bad = [write(folder / "a/bad.png", "text"), write(folder / "b/worse.jpg", "")]
    with pytest.raises(UserError) as caught:
        loaded(folder)
    assert all(f"{path}: not an image that can be read" in str(caught.value) for path in bad)
    for path in bad:
        path.unlink()
    decoded.clear()
    loaded(folder)
    assert decoded == []


def test_a_check_that_is_interrupted_goes_on(folder, remembered, decoded, monkeypatch):
    def interrupted(items, *args):
        for number, item in enumerate(items):
            yield item
            if number == 20:
                raise KeyboardInterrupt

    monkeypatch.setattr(pixels, "AT_ONCE", 10)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pixels, "with_progress", interrupted)
        loaded(folder)
    before = len(decoded)
    loaded(folder)
    assert 15 < before < 44 and len(set(decoded)) == 44 and len(decoded) < 44 + before


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY", "cut", "other"])
def test_a_record_that_cannot_be_read_is_made_again(folder, remembered, content):
    first = loaded(folder)
    (file,) = folder.glob(".perceiver_images-*")
    whole = file.read_bytes()
    if content == "other":
        with open(file, "wb") as other:
            np.save(other, np.frombuffer(b"a\0b", np.uint8))
            np.save(other, np.zeros(2))
    else:
        file.write_bytes(whole[:-50] if content == "cut" else content)
    again = loaded(folder)
    assert again[1]["fingerprints"] == first[1]["fingerprints"] and file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_to_is_told_about(folder, remembered, capsys):
    (folder / f".perceiver_images-16-pillow{pixels.PIL.__version__}").mkdir()  # in its place
    loaded(folder)
    assert "note: the check of the images is not remembered: cannot write" in capsys.readouterr().out
    loaded(folder, cache_dir=str(folder.parent / "mine/cache"))
    assert list((folder.parent / "mine/cache").iterdir()) and not capsys.readouterr().out


def test_a_pipe_in_the_place_of_the_record_is_not_waited_for(folder, remembered):
    os.mkfifo(folder / f".perceiver_images-16-pillow{pixels.PIL.__version__}")
    loaded(folder)


def test_evaluation_uses_the_record_and_writes_none(folder, remembered, decoded):
    _, info = loaded(folder)
    decoded.clear()
    loaded(folder, info, "test")
    assert decoded == []
    (record,) = folder.glob(".perceiver_*")
    record.unlink()
    loaded(folder, info, "test")
    assert decoded and not record.exists()


def test_processes_check_a_share_each_and_know_all(folder, remembered, monkeypatch, decoded):
    one = threading.local()
    both, exchanged = threading.Barrier(2, timeout=20), [None, None]

    def all_gather(value):
        exchanged[one.rank] = value
        both.wait()
        values = list(exchanged)
        both.wait()
        return values

    plain, found = loaded(shutil.copytree(folder, folder.parent / "copy")), {}
    for name, of in {"rank": lambda: one.rank, "size": lambda: 2, "is_first": lambda: one.rank == 0,
                     "all_gather": all_gather}.items():  # fmt: skip
        monkeypatch.setattr(pixels.distributed, name, of)

    def process(rank):
        one.rank = rank
        try:
            found[rank] = loaded(folder, cache="none")
        except UserError as error:
            found[rank] = str(error)

    def together():
        threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found[0], found[1]

    decoded.clear()
    first, second = together()
    assert len(decoded) == 44 and first[1] == second[1]
    assert first[1]["adapters"] == plain[1]["adapters"] and first[1]["fingerprints"] == plain[1]["fingerprints"]
    write(folder / "a/bad.png", "text")
    first, second = together()
    assert first == second and "bad.png: not an image" in first


# --- Commands --------------------------------------------------------------------------------------------------------


def test_a_stopped_run_with_pixels_on_disk_ends_as_one_in_memory(folder, run, tmp_path, monkeypatch):
    words = f"--dataset=images --data_path={folder} --image_size=16 --model_size=tiny --batch_size=8 --save_every=2"
    first = run(f"{words} --epochs=2 --checkpoint_dir=0")
    assert "images  44 files to 16 x 16 pixels, read, kept in memory: 0.0 MiB (--cache)" in first.out, first.err
    before_step(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))
    stopped = run(f"{words} --epochs=2 --checkpoint_dir=1 --num_workers=2 --cache=disk")
    assert "read when a batch needs them by 2 processes (--num_workers), kept in" in stopped.out
    assert stopped.status == 143 and run("--resume=1/last_model.pth --cache=none").status == 0
    ends = [torch.load(tmp_path / f"{number}/last_model.pth", weights_only=True)["model"] for number in (0, 1)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert inference.main(["--model_path=1/best_model.pth", "--cache=disk", "--num_workers=1"]) == 0


def test_lengths_of_several_modalities_need_no_image(folder, decoded):
    data = loaded(folder, cache="none")[0]["train"]
    series = SequenceDataset([np.zeros((3, 2)), np.zeros((5, 2))], np.zeros(2))
    decoded.clear()
    several = MultimodalDataset({"image": (data, np.array([0, -1, 1])), "series": (series, np.array([0, 1, -1]))},
                                np.array([0, 1, 1]))  # fmt: skip
    tokens = data.lengths[0]
    assert several.lengths.tolist() == [tokens + 3, 5, tokens] and several.reads_files
    create_dataloader(several, 2, num_workers=0)
    assert decoded == []


def test_processes_load_until_all_is_in_memory(folder, remembered):
    loaded(folder)
    data = loaded(folder, augment=False)[0]["train"]
    assert data.reads_files
    loader = create_dataloader(data, 8, num_workers=None)
    started = loader.num_workers
    first = list(loader)
    assert not data.reads_files
    same(loader, first)
    assert started == choose_workers(None, True) and loader.num_workers == 0
    assert loaded(folder, cache="disk")[0]["train"].reads_files and loaded(folder, cache="none")[0]["train"].reads_files


def test_how_many_processes_load(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    assert choose_workers(None, False) == 0 and choose_workers(3, False) == 3 and choose_workers(0, True) == 0
    assert choose_workers(None, True) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose_workers(None, True) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert choose_workers(None, True) == 0
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(99), raising=False)
    assert choose_workers(None, True) == config.MOST_WORKERS


# --- Progress --------------------------------------------------------------------------------------------------------


def test_a_log_file_gets_a_line_at_the_start_and_one_at_the_end(monkeypatch, capsys):
    assert list(with_progress(range(3), "checking images")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")  # it took no time
    monkeypatch.setattr(messages, "QUIET", -1)
    assert list(with_progress(iter("abc"), "checking images", 3)) == ["a", "b", "c"]
    first, last = capsys.readouterr().out.splitlines()
    assert first == "checking images: 1 of 3, about 0 s left" and last == "checking images: 3 in 0 s"
    list(with_progress(range(3), "validating", lines=False))
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(messages, "QUIET", 0)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    list(with_progress(range(3), "checking images"))
    printed = capsys.readouterr()
    assert "checking images: " in printed.err and printed.out == ""
