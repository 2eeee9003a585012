"""Data: items and batches, order and augmentation, bad data by name, the three data sets and their splits."""

import hashlib
import io
import json
import pickle
import tarfile
import urllib.error
import urllib.request
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10

import data_utils
from adapters import ImageAdapter, from_description, prepare_images
from batches import ClassTargets
from config import DATASET_DEFAULTS, Settings
from data_utils import (
    EpochBatchSampler,
    ImageDataset,
    SequenceDataset,
    collate,
    create_cifar10_sequence_dataset,
    create_dataloader,
    create_synthetic_sequence_dataloader,
    load_splits,
    make_synthetic,
    set_epoch,
    shift_and_flip,
    stratified_split,
)
from messages import UserError

quick = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
SMALL = {"num_samples": 60, "seq_len_range": (3, 9), "feature_dim": 4}


class Items(Dataset):
    """A custom data set; remembers which of its items were read."""

    def __init__(self, items):
        self.items, self.read = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, number):
        self.read.append(number)
        return self.items[number]


def numbered(lengths, channels=2, classes=2):
    """A data set whose sample i holds the number i in every token."""
    return Items([
        {"input": torch.full((length, channels), float(i)), "label": i % classes, "mask": torch.ones(length)}
        for i, length in enumerate(lengths)
    ])


def numbers_of(loader):
    return [batch["input"][:, 0, 0].int().tolist() for batch in loader]


def assert_same_batches(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


# --- Order -----------------------------------------------------------------------------------------------------------


@quick
@given(
    size=st.integers(1, 300),
    batch_size=st.integers(1, 40),
    shuffle=st.booleans(),
    bucketed=st.booleans(),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    data=st.data(),
)
def test_an_epoch_holds_every_sample_once(size, batch_size, shuffle, bucketed, seed, epoch, data):
    lengths = np.random.default_rng(seed).integers(1, 200, size) if bucketed else None
    sampler = EpochBatchSampler(size, batch_size, shuffle, seed, lengths)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(sum(batches, [])) == list(range(size))
    assert len(batches) == len(sampler) == -(-size // batch_size)
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1)

    again = EpochBatchSampler(size, batch_size, shuffle, seed, lengths)
    first = data.draw(st.integers(0, len(batches)))
    again.set_epoch(epoch, first)
    assert list(again) == batches[first:]


@pytest.mark.parametrize("lengths", [None, np.arange(1, 12)])
def test_order_differs_by_epoch_and_seed(lengths):
    sampler = EpochBatchSampler(11, 2, shuffle=True, seed=1, lengths=lengths)
    orders = [sampler.batches(epoch) for epoch in range(4)]
    orders.append(EpochBatchSampler(11, 2, shuffle=True, seed=2, lengths=lengths).batches(0))
    assert len({str(order) for order in orders}) == 5
    assert EpochBatchSampler(11, 20).batches(7) == [list(range(11))]


@quick
@given(seed=st.integers(0, 1000))
def test_buckets_hold_similar_lengths_in_random_order(seed):
    lengths = np.random.default_rng(seed).integers(50, 201, 1000)

    def padding(batches):
        return sum(len(batch) * lengths[batch].max() - lengths[batch].sum() for batch in batches)

    bucketed = EpochBatchSampler(1000, 16, True, seed, lengths).batches(0)
    assert padding(bucketed) < 0.15 * padding(EpochBatchSampler(1000, 16, True, seed).batches(0))
    means = [lengths[batch].mean() for batch in bucketed]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5


def test_every_pass_is_the_next_epoch():
    loader = create_dataloader(numbered([3] * 11), 4, shuffle=True, seed=5)
    passes = [numbers_of(loader) for _ in range(3)]
    assert passes[0] != passes[1] != passes[2]
    set_epoch(loader, 1)
    assert numbers_of(loader) == passes[1]


def test_a_start_within_the_epoch_reads_nothing_of_the_batches_before():
    dataset = numbered([3] * 11)
    loader = create_dataloader(dataset, 4, shuffle=True, seed=5)
    set_epoch(loader, 2)
    whole = numbers_of(loader)
    dataset.read.clear()
    set_epoch(loader, 2, first_batch=1)
    assert numbers_of(loader) == whole[1:]
    assert dataset.read == sum(whole[1:], [])
    assert len(numbers_of(loader)) == len(loader) == 3
    with pytest.raises(ValueError, match="first_batch 4 is not in 0..3"):
        set_epoch(loader, 2, first_batch=4)


def test_iterating_leaves_the_global_random_numbers_alone():
    loader = create_synthetic_sequence_dataloader(**SMALL)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    list(loader)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


def augmented_digits():
    return load_splits(Settings(dataset_type="digits", patch_size=2))[0]["train"]


def test_augmentation_follows_the_loaders_epoch_and_the_seed():
    loader = create_dataloader(augmented_digits(), 400)
    passes = [next(iter(loader))["input"] for _ in range(2)]
    set_epoch(loader, 0)
    assert torch.equal(next(iter(loader))["input"], passes[0])
    assert not torch.equal(*passes)
    seeds = [load_splits(Settings(dataset_type="digits", patch_size=2, seed=seed))[0]["train"] for seed in (0, 1)]
    assert not np.array_equal(seeds[0].offsets, seeds[1].offsets)


@pytest.mark.parametrize("make", [augmented_digits, lambda: numbered(range(1, 60))], ids=["images", "custom"])
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(make, workers):
    loaders = [create_dataloader(make(), 16, shuffle=True, seed=3, num_workers=n) for n in (0, workers)]
    for _ in range(2):
        assert_same_batches(*loaders)
    for loader in loaders:
        set_epoch(loader, 1, first_batch=2)
    assert_same_batches(*loaders)


def test_spawned_workers_change_nothing():
    loaders = [create_dataloader(augmented_digits(), 128, shuffle=True, seed=3, num_workers=n) for n in (0, 2)]
    loaders[1].multiprocessing_context = "spawn"
    for loader in loaders:
        set_epoch(loader, 4)
    assert_same_batches(*loaders)


class Noise(Dataset):
    """Draws from the global random numbers, as careless data sets do."""

    lengths = [1] * 8

    def __len__(self):
        return 8

    def __getitem__(self, number):
        return {"input": np.array([[torch.rand(()).item(), np.random.rand()]]), "label": 0}


def test_workers_draw_different_and_repeatable_numbers():
    loader = create_dataloader(Noise(), 2, num_workers=2)
    epochs = [torch.cat([batch["input"] for batch in loader]) for _ in range(2)]
    assert all(len(values.unique()) == 16 for values in epochs)
    assert not torch.equal(*epochs)
    set_epoch(loader, 0)
    assert torch.equal(torch.cat([batch["input"] for batch in loader]), epochs[0])


def test_everything_a_worker_needs_can_be_pickled():
    splits, _ = load_splits(Settings(**SMALL))
    for dataset in (augmented_digits(), splits["train"], numbered([2, 3])):
        loader = create_dataloader(dataset, 2, shuffle=True, max_seq_len=5)
        for part in (loader.dataset, loader.collate_fn, loader.batch_sampler):
            pickle.loads(pickle.dumps(part))


# --- Items and batches -----------------------------------------------------------------------------------------------

MASK_TYPES = ["bool", "uint8", "int32", "int64", "float16", "float32", "float64"]


@quick
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    mask_type=st.sampled_from([None, *MASK_TYPES]),
    input_type=st.sampled_from(["float16", "float32", "float64", "int64", "uint8"]),
    tensors=st.booleans(),
    max_seq_len=st.none() | st.integers(1, 12),
)
def test_collate_pads_masks_and_cuts(lengths, mask_type, input_type, tensors, max_seq_len):
    convert = torch.from_numpy if tensors else np.asarray
    rng = np.random.default_rng(len(lengths))
    arrays = [rng.integers(0, 9, (length, 3)).astype(input_type) for length in lengths]
    items = [{"input": convert(array), "label": i} for i, array in enumerate(arrays)]
    if mask_type:
        for item, length in zip(items, lengths, strict=True):
            item["mask"] = convert(np.ones(length, mask_type))
    batch = collate(items, max_seq_len)

    kept = np.minimum(lengths, max_seq_len or 99)
    assert {key: value.dtype for key, value in batch.items()} == {
        "input": torch.float32, "mask": torch.bool, "label": torch.int64,
    }  # fmt: skip
    assert batch["input"].shape == (len(items), kept.max(), 3)
    assert batch["mask"].tolist() == (np.arange(kept.max()) < kept[:, None]).tolist()
    assert batch["label"].tolist() == list(range(len(items)))
    for row, array, length in zip(batch["input"].numpy(), arrays, kept, strict=True):
        assert np.array_equal(row[:length], array[:length].astype("f4"))
        assert not row[length:].any()


@quick
@given(mask=st.lists(st.booleans(), min_size=2, max_size=9).filter(any), dtype=st.sampled_from(MASK_TYPES))
def test_hidden_tokens_are_padding_whatever_they_hold(mask, dtype):
    values = np.arange(2.0 * len(mask)).reshape(-1, 2) + 1
    values[~np.array(mask)] = np.nan
    batch = collate([{"input": values, "label": 0, "mask": np.array(mask, dtype)}])
    assert batch["mask"].tolist() == [mask]
    assert torch.equal(batch["input"][0].any(1), torch.tensor(mask))


def test_arrays_of_every_kind_are_read():
    rows = [[1.0, 2.0], [3.0, 4.0]]
    frozen = np.array(rows)
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kinds = [np.array(rows[::-1])[::-1], np.array(rows, ">f8"), torch.tensor(rows).t().t(), pd.DataFrame(rows)]
        kinds += [torch.tensor(rows).bfloat16(), torch.tensor(rows).half(), np.ma.array(rows)]
        for value in (rows, frozen, *kinds):
            assert collate([{"input": value, "label": 0}])["input"].tolist() == [rows]


def test_items_without_labels_give_a_batch_for_prediction():
    assert collate([{"input": np.ones((2, 3))}]).keys() == {"input", "mask"}


def item(tokens=3, channels=2, label=1, **rest):
    return {"input": np.ones((tokens, channels)), "label": label, **rest}


BAD_ITEMS = {
    "empty": (item(0), "empty"),
    "no channels": (item(channels=0), r"the input has shape \(3, 0\), it must be \(tokens, channels\)"),
    "all hidden": (item(mask=np.zeros(3)), "no real token"),
    "nan": ({"input": np.array([[1.0, np.nan]]), "label": 0}, "NaN or infinity"),
    "infinite": ({"input": np.array([[1.0, -np.inf]]), "label": 0}, "NaN or infinity"),
    "too large": ({"input": np.array([[1.0, 1e300]]), "label": 0}, "NaN or infinity"),
    "ragged width": (item(channels=3), "3 channels.* 2"),
    "one axis": ({"input": np.ones(3), "label": 0}, r"\(3,\).*\(tokens, channels\)"),
    "text": ({"input": [["a"]], "label": 0}, "not an array of numbers"),
    "complex": ({"input": torch.ones(2, 2, dtype=torch.complex64), "label": 0}, "it holds complex numbers"),
    "masked": ({"input": np.ma.array([[1.0, 2.0]], mask=[[False, True]]), "label": 0}, "NaN or infinity"),
    "mask too short": (item(mask=np.ones(2)), r"mask has shape \(2,\).*\(3,\)"),
    "mask with other values": (item(mask=np.array([1, 2, 1])), "other values than 1"),
    "mask with nan": (item(mask=np.array([1, np.nan, 1])), "other values than 1"),
    "half a label": (item(label=0.5), "0.5 is not a whole number"),
    "label nan": (item(label=float("nan")), "nan is not a whole number"),
    "label beyond int64": (item(label=1e300), "1e.300 is not a whole number"),
    "label of text": (item(label="cat"), "'cat' is not a whole number"),
    "one-hot label": (item(label=np.array([0, 1])), "not a whole number"),
    "label too large": (item(label=2), r"label 2 is not in 0\.\.1"),
    "negative label": (item(label=-1), r"label -1 is not in 0\.\.1"),
    "no label": ({"input": np.ones((3, 2))}, "no 'label'"),
    "a pair": ((np.ones((3, 2)), 0), "must be a dict .* a tuple"),
    "other names": ({"x": np.ones((3, 2)), "label": 0}, r"must be a dict .* \['x', 'label'\]"),
}


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("bad, message", BAD_ITEMS.values(), ids=BAD_ITEMS)
def test_bad_items_are_named_before_the_first_batch(bad, message, batch_size):
    items = [item(label=0), item(), bad, item()]
    with pytest.raises(UserError, match=f"^sample 2: .*{message}") as caught:
        create_dataloader(Items(items), batch_size, num_classes=2)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("name", ["empty", "nan", "mask too short", "half a label", "ragged width"])
def test_items_read_late_are_checked_in_their_batch(name):
    dataset = Items([item(), item(), BAD_ITEMS[name][0], item()])
    dataset.lengths = None
    loader = create_dataloader(dataset, 4, num_classes=2)
    assert dataset.read == []
    with pytest.raises(UserError, match="batch"):
        next(iter(loader))
    with pytest.raises(UserError, match="attribute `lengths`"):
        create_dataloader(dataset, 4, bucket_by_length=True)


def test_a_data_set_with_known_lengths_is_bucketed_unread():
    dataset = numbered(range(1, 33))
    dataset.lengths = list(range(1, 33))
    loader = create_dataloader(dataset, 4, shuffle=True, bucket_by_length=True)
    assert dataset.read == []
    assert all(np.ptp(numbers) == 3 for numbers in numbers_of(loader))


@quick
@given(
    labels=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    convert=st.sampled_from([int, float, np.int32, np.uint8, np.float32, np.int64, torch.tensor]),
)
def test_whole_labels_of_any_type_become_int64(labels, convert):
    batch = next(iter(create_dataloader(Items([item(label=convert(n)) for n in labels]), 8, num_classes=10)))
    assert batch["label"].dtype == torch.int64
    assert batch["label"].tolist() == labels


@quick
@given(labels=st.lists(st.integers(-3, 12), min_size=1, max_size=20), classes=st.integers(1, 10))
def test_labels_outside_the_classes_are_named(labels, classes):
    wrong = [i for i, label in enumerate(labels) if not 0 <= label < classes]
    if not wrong:
        ClassTargets(classes).check(np.array(labels), for_training=False)
        return
    with pytest.raises(UserError, match=rf"^sample {wrong[0]}: label {labels[wrong[0]]} is not in 0\.\.{classes - 1};"):
        ClassTargets(classes).check(np.array(labels), for_training=False)


def test_labels_that_count_from_one_are_recognised():
    with pytest.raises(UserError, match=r"sample 9: label 10 is not in 0\.\.9; .* count from 1, subtract 1"):
        create_dataloader(Items([item(label=n) for n in range(1, 11)]), 4, num_classes=10)


def test_training_data_that_teaches_nothing_is_refused():
    one_class = Items([item(label=1) for _ in range(5)])
    with pytest.raises(UserError, match="all training samples have label 1"):
        create_dataloader(one_class, 2, shuffle=True)
    assert len(list(create_dataloader(one_class, 2))) == 3  # evaluation of such data is fine
    with pytest.raises(UserError, match="4 training samples are fewer than the 5 classes"):
        create_synthetic_sequence_dataloader(num_samples=4, num_classes=5)
    with pytest.raises(UserError, match="empty"):
        create_dataloader(Items([]), 2)
    with pytest.raises(UserError, match="batch_size is 0"):
        create_dataloader(one_class, 0)


def test_fewer_samples_than_the_batch_are_one_short_batch():
    batches = list(create_dataloader(numbered([3] * 5), 64, shuffle=True))
    assert [len(batch["label"]) for batch in batches] == [5]


def test_longer_sequences_are_cut():
    loader = create_dataloader(numbered([2, 9, 5]), 3, max_seq_len=5)
    assert next(iter(loader))["mask"].sum(1).tolist() == [2, 5, 5]
    with pytest.raises(UserError, match="max_seq_len is 0"):
        create_dataloader(numbered([2, 9, 5]), 3, max_seq_len=0)


# --- Splits ----------------------------------------------------------------------------------------------------------


@quick
@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=200),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 99),
)
def test_stratified_split(labels, fraction, seed):
    labels = np.array(labels)
    counts = np.bincount(labels)
    if counts.max() < 2:
        with pytest.raises(UserError, match="cannot be split"):
            stratified_split(labels, fraction, np.random.default_rng(seed))
        return
    kept, held_out = stratified_split(labels, fraction, np.random.default_rng(seed))
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        held = (labels[held_out] == label).sum()
        assert held == 0 if count < 2 else 1 <= held < count
        assert abs(held - fraction * count) <= 1


def fingerprints(dataset):
    return {tuple(dataset[i]["input"].ravel().tolist()) for i in range(len(dataset))}


@pytest.mark.parametrize("seed", [0, 1])
def test_synthetic_splits_are_disjoint_and_repeatable(seed):
    (splits, info), (again, _) = (load_splits(Settings(seed=seed, **SMALL)) for _ in range(2))
    sets = {name: fingerprints(split) for name, split in splits.items()}
    assert info["split_sizes"] == {"train": 55, "val": 5, "test": 12} == {n: len(s) for n, s in sets.items()}
    assert len(set.union(*sets.values())) == 72
    assert sets == {name: fingerprints(split) for name, split in again.items()}
    assert sets["val"] != fingerprints(load_splits(Settings(seed=seed + 1, **SMALL))[0]["val"])


@pytest.mark.parametrize("name", ["synthetic", "digits"])
def test_the_description_is_complete_and_plain(name):
    _, info = load_splits(Settings(dataset_type=name, patch_size=2, max_seq_len=7, **SMALL))
    assert json.loads(json.dumps(info)) == info
    assert info.keys() == {
        "dataset_type", "task", "class_names", "num_outputs", "features", "adapters", "notes", "split_sizes",
        "split_seed", "fingerprints", *(["augmentation"] if name == "digits" else []),
    }  # fmt: skip
    assert info["num_outputs"] == len(set(info["class_names"])) == {"synthetic": 5, "digits": 10}[name]


def test_a_stored_description_sets_the_length_limit():
    _, info = load_splits(Settings(max_seq_len=7, **SMALL))
    splits, again = load_splits(Settings(**SMALL), info)
    assert again == info
    assert max(len(item["input"]) for split in splits.values() for item in split) == 7


def test_every_data_set_of_the_settings_can_be_loaded():
    assert data_utils.DATASETS.keys() == DATASET_DEFAULTS.keys()


# --- Synthetic sequences ---------------------------------------------------------------------------------------------


def test_a_synthetic_sequence_depends_on_seed_split_and_number_alone():
    few, many = (make_synthetic(Settings(**SMALL), "train", n) for n in (3, 9))
    assert all(np.array_equal(few[i]["input"], many[i]["input"]) for i in range(3))
    for other in (make_synthetic(Settings(**SMALL), "test", 3), make_synthetic(Settings(seed=1, **SMALL), "train", 3)):
        assert not fingerprints(few) & fingerprints(other)


@pytest.mark.parametrize("classes, shortest, longest, channels", [(2, 1, 1, 1), (5, 1, 3, 1), (100, 50, 60, 3)])
def test_synthetic_sequences_of_any_size(classes, shortest, longest, channels):
    loader = create_synthetic_sequence_dataloader(16, 200, (shortest, longest), channels, classes)
    batches = list(loader)
    lengths = torch.cat([batch["mask"].sum(1) for batch in batches])
    assert (lengths.min(), lengths.max()) == (shortest, longest)
    assert torch.cat([batch["label"] for batch in batches]).bincount().tolist() == [200 // classes] * classes
    assert batches[0]["input"].shape[2] == channels


@pytest.mark.parametrize(
    "wrong", [{"num_samples": 0}, {"seq_len_range": (9, 3)}, {"num_classes": 1}, {"batch_size": 0}], ids=str
)
def test_wrong_sizes_of_synthetic_data_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        create_synthetic_sequence_dataloader(**wrong)


def held_out_accuracy(features, labels):
    features = (features - features.mean(0)) / features.std(0)
    half = len(labels) // 2
    model = LogisticRegression(C=0.1, max_iter=300).fit(features[:half], labels[:half])
    return model.score(features[half:], labels[half:])


def test_mean_variance_and_length_do_not_tell_the_class_but_time_does():
    data = make_synthetic(Settings(), "train", 2000)
    inputs, labels = data.sequences, data.labels
    moments = [[*x.mean(0), *x.var(0), x.mean(), x.var(), len(x)] for x in inputs]
    assert held_out_accuracy(np.array(moments), labels) < 0.27  # chance is 0.2
    spectra = [np.log(abs(np.fft.rfft(x[:, ::16].mean(1) - x[:, ::16].mean(), 400)) + 1e-6)[:160] for x in inputs]
    assert held_out_accuracy(np.array(spectra), labels) > 0.8


# --- Images ----------------------------------------------------------------------------------------------------------


def random_images(num=6, height=8, width=12, channels=3):
    return np.random.default_rng(0).integers(0, 256, (num, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_normalised_pixels_in_the_documented_order(patch, channels):
    images = random_images(channels=channels)
    mean, std = [100.0, 120.0, 140.0][:channels], [50.0, 60.0, 70.0][:channels]
    tokens = prepare_images(images, mean, std, patch)
    assert tokens.dtype == torch.float32 and tokens.is_contiguous()
    expected = np.array([
        [
            [(image[y + i, x + j, c] - mean[c]) / std[c]
             for i in range(patch) for j in range(patch) for c in range(channels)]
            for y in range(0, 8, patch) for x in range(0, 12, patch)
        ]
        for image in images
    ])  # fmt: skip
    np.testing.assert_allclose(tokens.numpy(), expected, atol=1e-5)


def test_images_of_another_type_or_patch_size_are_refused():
    for images in (random_images() / 255, random_images()[0]):
        with pytest.raises(UserError, match=r"must be uint8 \(B, H, W, C\)"):
            prepare_images(images, [0.0] * 3, [1.0] * 3, 4)
    with pytest.raises(UserError, match=r"patch_size 3 does not divide the image of 8 x 12; valid are \[1, 2, 4\]"):
        prepare_images(random_images(), [0.0] * 3, [1.0] * 3, 3)


@quick
@given(margin=st.integers(0, 4), channels=st.sampled_from([1, 3, 4]), seed=st.integers(0, 99))
def test_shift_and_flip_is_a_padded_crop_of_each_image(margin, channels, seed):
    rng = np.random.default_rng(seed)
    images = random_images(channels=channels)
    offsets, flips = rng.integers(0, 2 * margin + 1, (6, 2)), rng.random(6) < 0.5
    result = shift_and_flip(images.copy(), offsets, flips, margin)
    for image, (row, col), flip, moved in zip(images, offsets, flips, result, strict=True):
        padded = np.pad(image[:, ::-1] if flip else image, ((margin, margin), (margin, margin), (0, 0)))
        assert np.array_equal(moved, padded[row : row + 8, col : col + 12])


def image_dataset(**augmentation):
    images = random_images(40)
    return ImageDataset(images, np.arange(40) % 10, ImageAdapter([8, 12, 3], 4, [0.0] * 3, [1.0] * 3), **augmentation)


def test_augmentation_depends_on_seed_epoch_and_sample_alone():
    dataset = image_dataset(margin=2, flip=True, seed=1)
    originals = dataset.images.copy()
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append(dataset.__getitems__(list(range(40)))["input"])
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], image_dataset(margin=2, flip=True, seed=2).__getitems__(list(range(40)))["input"])
    some = dataset.__getitems__([7, 3])
    assert torch.equal(some["input"], epochs[0][[7, 3]]) and some["label"].tolist() == [7, 3]
    assert torch.equal(dataset[7]["input"], epochs[0][7]) and dataset[7]["label"] == 7
    assert np.array_equal(dataset.images, originals)


def test_half_of_the_images_are_mirrored_and_every_place_is_as_frequent():
    """Of 4,000 images that tell their left from their right: half to within four standard deviations."""
    images = np.zeros((4000, 6, 6, 1), np.uint8)
    images[:, 3, 2] = 255
    adapter = ImageAdapter([6, 6, 1], 6, [0.0], [1.0])
    mirrored, places = [], []
    dataset = ImageDataset(images, np.arange(4000) % 2, adapter, margin=1, flip=True, seed=5)
    for batch in create_dataloader(dataset, 500):
        rows, columns = np.divmod(batch["input"][:, 0].argmax(1).numpy(), 6)
        assert set(columns) == {1, 2, 3, 4} and set(rows) == {2, 3, 4}
        places += list(rows)
    plain = ImageDataset(images, np.arange(4000) % 2, adapter, flip=True, seed=5)
    for batch in create_dataloader(plain, 500):
        mirrored += [place == 3 * 6 + 3 for place in batch["input"][:, 0].argmax(1).tolist()]
    assert len(mirrored) == 4000 and abs(np.mean(mirrored) - 0.5) < 4 * 0.5 / 4000**0.5
    assert abs(np.bincount(places)[2:] / 4000 - 1 / 3).max() < 4 * 0.472 / 4000**0.5


def test_only_training_images_are_augmented():
    for augment in (True, False):
        splits, info = load_splits(Settings(dataset_type="digits", patch_size=2, augment=augment))
        for name, split in splits.items():
            plain = from_description(info["adapters"]["image"]).tokens(split.images[:50])
            seen = next(iter(create_dataloader(split, 50)))
            assert torch.equal(seen["input"], plain) == (name != "train" or not augment)
            assert seen["mask"].all() and seen["mask"].shape == (50, 16)


# --- Digits ----------------------------------------------------------------------------------------------------------


def test_digits_splits():
    (splits, info), (other, other_info) = (
        load_splits(Settings(dataset_type="digits", patch_size=2, seed=seed, val_fraction=0.2)) for seed in (0, 1)
    )
    assert sum(info["split_sizes"].values()) == 1797 and abs(info["split_sizes"]["test"] - 359) <= 5
    assert np.array_equal(splits["test"].images, other["test"].images)
    assert not np.array_equal(splits["val"].images, other["val"].images)
    assert info["features"] == {"image": {"input_dim": 4, "grid_shape": [4, 4]}}
    assert info["adapters"]["image"]["image_shape"] == [8, 8, 1]
    shares = [np.bincount(split.labels) / len(split) for split in splits.values()]
    assert np.ptp(shares, 0).max() < 0.01
    tokens = from_description(info["adapters"]["image"]).tokens(splits["train"].images)
    assert abs(tokens.mean()) < 1e-4 and abs(tokens.std() - 1) < 1e-3

    known = other_info["adapters"]["image"] | {"mean": [1.0], "std": [2.0], "patch_size": 4}
    evaluated, again = load_splits(
        Settings(dataset_type="digits", patch_size=2), other_info | {"adapters": {"image": known}}
    )
    assert again["adapters"] == {"image": known}
    assert again["features"] == {"image": {"input_dim": 16, "grid_shape": [2, 2]}}
    assert evaluated["test"][0]["input"].shape == (4, 16)


# --- CIFAR-10 --------------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(monkeypatch):
    """The bytes of an archive in CIFAR-10's own format, with few images; there is no network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    rng = np.random.default_rng(0)

    def batch():
        return {"data": rng.integers(0, 256, (40, 3072), dtype=np.uint8), "labels": (np.arange(40) % 10).tolist()}

    files = {name: pickle.dumps(batch()) for name, _ in CIFAR10.train_list + CIFAR10.test_list}
    files["batches.meta"] = pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, md5[name]] for name, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(stream.getvalue()).hexdigest())
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return stream.getvalue()


def load_cifar10(folder, **rest):
    return load_splits(Settings(dataset_type="cifar10", data_dir=str(folder), **rest))


def test_cifar10_from_a_good_archive_works_offline(archive, tmp_path, capfd):
    path = tmp_path / CIFAR10.filename
    path.write_bytes(archive)
    splits, info = load_cifar10(tmp_path, patch_size=4)
    assert info["split_sizes"] == {"train": 180, "val": 20, "test": 40}
    assert info["class_names"][3] == "class 3"
    assert info["features"] == {"image": {"input_dim": 48, "grid_shape": [8, 8]}}
    assert info["adapters"]["image"]["image_shape"] == [32, 32, 3]
    assert np.array_equal(splits["test"].images, CIFAR10(tmp_path, train=False).data)
    train, val = fingerprints(splits["train"]), fingerprints(splits["val"])
    assert len(train) == 180 and len(val) == 20 and not train & val

    path.unlink()  # the verified files are enough
    batch = next(iter(create_cifar10_sequence_dataset(data_dir=str(tmp_path))))
    assert batch["input"].shape == (32, 16, 192)
    assert len(create_cifar10_sequence_dataset(8, 1, "val", str(tmp_path))) == 3
    with pytest.raises(UserError, match="split is 'valid'"):
        create_cifar10_sequence_dataset(split="valid", data_dir=str(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_cifar10_is_downloaded_verified_and_announced_in_one_line(archive, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: io.BytesIO(archive))
    load_cifar10(tmp_path / "new")
    out, err = capfd.readouterr()
    assert out.startswith("Downloading CIFAR-10") and out.count("\n") == 1 and not err


class Broken(io.BytesIO):
    def read(self, *args):
        raise TimeoutError("the host is silent")


@pytest.mark.parametrize("response", [None, Broken, lambda: io.BytesIO(b"<html>")], ids=["none", "broken", "foreign"])
def test_cifar10_that_cannot_be_had_is_explained(archive, tmp_path, monkeypatch, response):
    if response:
        monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: response())
    path = tmp_path / CIFAR10.filename
    with pytest.raises(UserError, match="by hand, or use --dataset digits or synthetic") as caught:
        load_cifar10(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_cifar10_archive_is_named(archive, tmp_path):
    path = tmp_path / CIFAR10.filename
    path.write_bytes(archive[:1000])
    with pytest.raises(UserError, match=r"incomplete or damaged \(1000 bytes\); delete it") as caught:
        load_cifar10(tmp_path)
    assert str(path) in str(caught.value)
    path.write_bytes(archive)
    load_cifar10(tmp_path)


def test_damaged_cifar10_files_are_unpacked_again(archive, tmp_path):
    (tmp_path / CIFAR10.filename).write_bytes(archive)
    first, _ = load_cifar10(tmp_path)
    (tmp_path / CIFAR10.base_folder / "data_batch_2").write_bytes(b"damaged")
    again, _ = load_cifar10(tmp_path)
    assert np.array_equal(first["train"].images, again["train"].images)


@pytest.mark.parametrize("patch_size", [5, 64])
def test_a_patch_size_that_does_not_fit_is_refused_before_any_download(archive, tmp_path, patch_size):
    with pytest.raises(UserError, match=f"patch_size {patch_size} does not divide the image of 32 x 32"):
        create_cifar10_sequence_dataset(patch_size=patch_size, data_dir=str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_sequences_in_memory_are_a_custom_data_set():
    data = SequenceDataset([np.ones((n, 2), np.float32) for n in (3, 1, 2)], [0, 1, 1])
    batch = next(iter(create_dataloader(data, 3)))
    assert batch["mask"].sum(1).tolist() == [3, 1, 2] and batch["label"].tolist() == [0, 1, 1]
