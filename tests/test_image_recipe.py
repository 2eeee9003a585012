"""--image_recipe strong, mixup and CutMix of images: against torchvision, and as functions of seed, epoch, sample."""

import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import before_step
from test_resume import DIGITS, assert_same_run
from torchvision.transforms import v2

from adapters import ImageAdapter, ImageDataset
from augmentation import ERASED, MAGNITUDE, OPERATIONS, SMALLEST_CROP, ImageAugmentation
from batches import Mixed, create_dataloader, random_stream, rectangle, set_epoch
from checkpoint import BEST, LAST, load_checkpoint, save_checkpoint
from config import Settings, resolve
from data_utils import load_splits
from tasks import Classification

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 16, 20, 3), dtype=np.uint8)
ADAPTER = ImageAdapter.fit(IMAGES, 4)
TASK = Classification([str(n) for n in range(12)])


def data(strong=True, seed=3, images=IMAGES):
    change = ImageAugmentation(flip=True) if strong else None
    return ImageDataset(images, np.arange(len(images)), ADAPTER, seed=seed, strong=change)


def test_the_changes_are_those_of_torchvision():
    dataset = data()
    dataset.set_epoch(4)
    found = dataset.pixels([5, 2])
    bilinear = v2.InterpolationMode.BILINEAR
    reference = v2.Compose([
        v2.RandomResizedCrop((16, 20), (SMALLEST_CROP, 1), interpolation=bilinear), v2.RandomHorizontalFlip(0.5),
        v2.RandAugment(OPERATIONS, MAGNITUDE, interpolation=bilinear), v2.RandomErasing(ERASED),
    ])  # fmt: skip
    for number, pixels in zip((5, 2), found, strict=True):
        torch.manual_seed(int(random_stream("image augmentation", 3, 4, number).integers(2**63)))
        expected = reference(torch.from_numpy(IMAGES[number]).permute(2, 0, 1)).permute(1, 2, 0)
        np.testing.assert_array_equal(pixels, expected.numpy())


@given(st.lists(st.integers(0, 11), min_size=1, max_size=6), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_an_image_depends_on_seed_epoch_and_number_alone(numbers, epoch):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for dataset in (data(), Mixed(data(), 0.2, 3, TASK, cutmix=1.0)):
        dataset.set_epoch(epoch)
        together = dataset.__getitems__(numbers)
        for place, number in enumerate(numbers):
            alone = dataset.__getitems__([number])
            assert torch.equal(together["input"][place], alone["input"][0])
            if "mix" in alone:
                assert torch.equal(together["mix"]["input"][place], alone["mix"]["input"][0])
                assert torch.equal(together["mix"]["weight"][place], alone["mix"]["weight"][0])
    assert torch.equal(torch.get_rng_state(), before)  # dropout draws what it would have drawn


def test_every_epoch_and_seed_has_changes_of_its_own_and_validation_none():
    first, second, other = data(), data(), data(seed=4)
    second.set_epoch(1)
    shown = [one.pixels(range(12)) for one in (first, second, other)]
    assert all((a != b).any((1, 2, 3)).mean() > 0.9 for a, b in zip(shown, shown[1:] + shown[:1], strict=True))
    splits, info = load_splits(Settings(dataset_type="digits", image_recipe="strong", patch_size=2))
    assert splits["train"].strong and not splits["val"].strong and not splits["test"].strong
    assert info["augmentation"] == "cropped, not mirrored (--flip), RandAugment, a rectangle erased in 25% of them"
    assert splits["train"].subset(np.arange(4)).strong is splits["train"].strong


def test_images_that_are_not_stored_as_bytes_are_changed_as_if_they_were():
    """Digits go up to 16: RandAugment would take them for black."""
    digits = load_splits(Settings(dataset_type="digits", image_recipe="strong", patch_size=2))[0]["train"]
    numbers = list(range(64))
    found = digits.pixels(numbers)
    assert found.max() == 16 and found.dtype == np.uint8
    similar = np.corrcoef(found.reshape(64, -1).mean(1), digits.images[numbers].reshape(64, -1).mean(1))[0, 1]
    assert similar > 0.1 and 2 < found.mean() < 8


@given(st.integers(0, 10**6), st.floats(0.1, 5), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_a_rectangle_is_at_most_half_of_the_image(seed, alpha, height, width):
    rows, columns = rectangle(np.random.default_rng(seed), alpha, height, width)
    assert 0 <= rows.start <= rows.stop <= height and 0 <= columns.start <= columns.stop <= width
    side = 0.5**0.5
    assert rows.stop - rows.start <= side * height + 1 and columns.stop - columns.start <= side * width + 1


def test_cutmix_pastes_a_rectangle_and_shares_the_label():
    flat = np.repeat(np.arange(12, dtype=np.uint8) * 20, 16 * 20 * 3).reshape(12, 16, 20, 3)
    dataset = Mixed(data(strong=False, images=flat), 0.0, 3, TASK, cutmix=1.0)
    batch = dataset.__getitems__(list(range(12)))
    images = ADAPTER.images(batch["input"])
    shares = []
    for number in range(12):
        other, weight = int(batch["mix"]["label"][number]), float(batch["mix"]["weight"][number])
        own = (images[number, ..., 0] == number * 20).mean()
        assert set(np.unique(images[number])) <= {number * 20, other * 20}
        assert weight == pytest.approx(own if other != number else weight)
        shares.append(weight)
    assert torch.equal(batch["input"], batch["mix"]["input"]) and batch["label"].tolist() == list(range(12))
    assert min(shares) < 0.9 and min(shares) >= 0.5 - 0.06


def test_one_of_mixup_and_cutmix_is_taken_by_chance():
    dataset = Mixed(data(strong=False), 0.2, 3, TASK, cutmix=1.0)
    batch = dataset.__getitems__(list(range(12)))
    pasted = (batch["input"] == batch["mix"]["input"]).flatten(1).all(1)
    assert 0 < pasted.sum() < 12
    plain = Mixed(data(strong=False), 0.2, 3, TASK).__getitems__(list(range(12)))  # without it, as it was before
    untouched = ~pasted
    assert torch.equal(plain["mix"]["weight"][untouched], batch["mix"]["weight"][untouched])
    assert torch.equal(plain["input"][untouched], batch["input"][untouched])


def test_workers_load_the_same_images():
    dataset = Mixed(data(), 0.2, 3, TASK, cutmix=1.0)
    batches = []
    for workers in (0, 1):
        loader = create_dataloader(dataset, 4, targets=TASK, shuffle=True, seed=1, num_workers=workers)
        set_epoch(loader, 2)
        batches.append([batch["input"] for batch in loader])
    for own, loaded in zip(*batches, strict=True):
        assert torch.equal(own, loaded)


def test_the_recipe_sets_mixtures_and_flags_override_it():
    chosen, sources = resolve(flags={"dataset_type": "digits", "image_recipe": "strong", "cutmix": 0.5})
    assert (chosen.mixup, chosen.cutmix) == (0.2, 0.5) and sources["mixup"] == "recipe" and sources["cutmix"] == "flag"
    assert resolve(flags={"dataset_type": "digits"})[0].mixup == 0


@pytest.mark.slow
def test_a_stopped_run_with_the_strong_recipe_ends_as_the_unbroken_one(run, monkeypatch, tmp_path):
    flags = f"{DIGITS} --epochs=1 --batch_size=256 --image_recipe=strong --flip"  # 6 steps
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    done = run(flags)
    assert done.status == 0, done.err
    assert "images  in training cropped, half of them mirrored (--no_flip), RandAugment" in done.out
    (tmp_path / "stopped").mkdir()
    monkeypatch.chdir(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        before_step(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert run(flags).status == 130
    assert run("--resume --num_workers=1").status == 0
    for name in (BEST, LAST):
        path = tmp_path / "stopped" / "checkpoints" / name
        contents = load_checkpoint(path)
        contents["settings"]["num_workers"] = None
        save_checkpoint(path, contents)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
