"""Adapters: against NumPy in float64, over every kind of item; what they refuse; their descriptions."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw
from user_files import message

from adapters import (
    ImageAdapter,
    SeriesAdapter,
    TensorAdapter,
    TextAdapter,
    describe,
    from_description,
    square_pixels,
)
from config import Settings
from data_utils import load_splits
from messages import UserError
from perceiver_model import create_perceiver_model

quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
ULP = 2.0**-23  # of float32, at 1


def through_json(adapter):
    return from_description(json.loads(json.dumps(describe(adapter), allow_nan=False)))


ANY_SIZE = ImageAdapter([8, 8, 3], 4, [0.0] * 3, [1.0] * 3, any_size=True)


@pytest.mark.parametrize("adapter", [
    TensorAdapter(3),
    TensorAdapter(3, 7),
    TextAdapter(),
    TextAdapter(5),
    SeriesAdapter([0.1, -1e9], [1e-9, 3.0]),
    SeriesAdapter([0.1, 2.0], [1 / 3, 3.0], [1], 6),
    ImageAdapter([8, 4, 1], 2, [1 / 3], [2 / 3]),
    ImageAdapter([8, 8, 3], 4, [0.0] * 3, [1.0] * 3, True, 12),
    ANY_SIZE,
], ids=str)  # fmt: skip
def test_descriptions_are_plain_and_come_back(adapter):
    again = through_json(adapter)
    assert again == adapter and type(again) is type(adapter) and again.features == adapter.features
    model = create_perceiver_model({"any": adapter.features}, 2, "tiny")  # the model can be told of them
    assert model.modalities["any"].input_dim == adapter.features.get("input_dim", 1)


def test_fitted_descriptions_are_plain():
    rng = np.random.default_rng(0)
    series = SeriesAdapter.fit([np.where(rng.random((9, 2)) < 0.2, np.nan, rng.normal(size=(9, 2))) for _ in "abc"])
    image = ImageAdapter.fit(rng.integers(0, 256, (4, 6, 4, 3), np.uint8), 2)
    for adapter in (series, image):
        assert through_json(adapter) == adapter


# --- Tensors ---------------------------------------------------------------------------------------------------------


@quick
@given(arrays(np.float64, st.tuples(st.integers(1, 9), st.just(3)), elements=st.floats(-1e30, 1e30)),
       st.none() | st.integers(1, 12))  # fmt: skip
def test_tensors_are_taken_as_they_are(values, limit):
    adapter = TensorAdapter(3, limit)
    for item in (values, values.tolist(), torch.tensor(values), np.asfortranarray(values), values[::-1][::-1]):
        tokens = adapter(item)
        assert tokens.dtype == torch.float32
        np.testing.assert_array_equal(tokens.numpy(), values[:limit].astype(np.float32))


@pytest.mark.parametrize("item, expected", [
    (np.zeros((2, 2)), "shape (2, 2), it must be (tokens, 3)"),
    (np.zeros(3), "shape (3,)"),
    (np.zeros((0, 3)), "empty"),
    ([[0, 1, math.nan]], "NaN or infinity"),
    ([[0, 1, 1e39]], "NaN or infinity"),  # in float32
    ([[1j, 0, 0]], "complex"),
    ([[1, 2, 3], [4]], "not an array of numbers"),
    ("abc", "not an array of numbers"),
])  # fmt: skip
def test_tensors_that_cannot_be_used(item, expected):
    assert expected in message(TensorAdapter(3), item)


# --- Text ------------------------------------------------------------------------------------------------------------


@quick
@given(st.text(min_size=1).filter(str.strip), st.none() | st.integers(1, 40))
def test_text_is_its_bytes(text, limit):
    tokens = TextAdapter(limit)(text)
    assert tokens.dtype == torch.float32 and tokens.shape[1:] == (1,)
    assert bytes(tokens[:, 0].int().tolist()) == text.encode("utf-8")[:limit]


@pytest.mark.parametrize("text, length", [
    ("Zażółć gęślą jaźń", 26), ("한국어", 9), ("Ελληνικά", 16), ("שלום", 8), ("नमस्ते", 18), ("👩‍👩‍👧", 18), ("a\0b", 3),
    ("e\u0301", 3), ("\ufeffx", 4),
])  # fmt: skip
def test_no_language_is_changed_or_normalised(text, length):
    tokens = TextAdapter()(text)
    assert len(tokens) == length and bytes(tokens[:, 0].int().tolist()).decode() == text


@pytest.mark.parametrize("text, expected", [
    ("", "empty"), (" \n\t", "empty"), (None, "NoneType"), (7, "int"), (b"abc", "bytes"),
    ("x\ud83d", "half a character"),
])  # fmt: skip
def test_texts_that_cannot_be_used(text, expected):
    assert expected in message(TextAdapter(), text)


# --- Series ----------------------------------------------------------------------------------------------------------


def plain_statistics(series, limit):
    """Of each channel (mean, deviation, whether a value is missing), with math.fsum."""
    for channel in range(series[0].shape[1]):
        column = [value for one in series for value in one[:limit, channel].tolist()]
        there = [value for value in column if not math.isnan(value)]
        mean = math.fsum(there) / len(there)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in there) / len(there))
        yield mean, deviation if len(set(there)) > 1 else 1.0, len(there) < len(column)


@st.composite
def some_series(draw, channels=None):
    channels = channels or draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    scale = 10.0 ** rng.integers(-6, 7, channels)
    missing = rng.choice([0, 0.3], channels)
    series = [scale * (rng.normal(size=(length, channels)) + rng.normal(size=channels)) for length in lengths]
    for one in series:
        one[rng.random(one.shape) < missing] = np.nan
    series[0][0] = scale  # each channel has a value
    return series


@quick
@given(some_series(), st.none() | st.integers(1, 9))
def test_series_are_standardised_with_their_statistics(series, limit):
    adapter = SeriesAdapter.fit(series, limit)
    mean, deviation, lacking = map(np.array, zip(*plain_statistics(series, limit), strict=True))
    assert adapter.flagged == np.flatnonzero(lacking).tolist()
    assert adapter.features == {"input_dim": len(mean) + lacking.sum()}
    for one in series:
        values = one[:limit]
        missing = np.isnan(values)
        expected = np.where(missing, 0, (values - mean) / deviation)
        tokens = adapter(one)
        assert tokens.dtype == torch.float32 and tokens.shape == (len(values), adapter.features["input_dim"])
        np.testing.assert_allclose(tokens[:, : len(mean)], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(tokens[:, len(mean) :], missing[:, lacking])
    np.testing.assert_array_equal(adapter(torch.tensor(series[0])), adapter(series[0].tolist()))


@quick
@given(st.floats(-1e12, 1e12), st.integers(1, 30), st.floats(-100, 100))
def test_a_constant_channel_keeps_its_scale(value, length, change):
    """Also where rounding leaves it a deviation, such as 0.1 ten times."""
    adapter = SeriesAdapter.fit([np.full((length, 1), value)])
    assert adapter.std == [1.0] and adapter.mean[0] == pytest.approx(value, rel=1e-14)
    assert adapter([[value + change]]).item() == pytest.approx(change, rel=1e-5, abs=max(1e-5, 1e-14 * abs(value)))


def test_one_channel_may_come_flat_and_from_a_file(tmp_path):
    adapter = SeriesAdapter([1.0], [2.0])
    np.save(tmp_path / "a.npy", np.array([1.0, 3.0, 7.0]))
    (tmp_path / "a.csv").write_text("value\n1\n3\n7\n")
    for item in (np.array([1.0, 3.0, 7.0]), [[1], [3], [7]], tmp_path / "a.npy", tmp_path / "a.csv"):
        assert adapter(item).tolist() == [[0.0], [1.0], [3.0]]


def test_a_channel_that_lacks_values_only_later_is_the_mean_there():
    adapter = SeriesAdapter.fit([np.array([[1.0, 5.0], [3.0, np.nan]])])
    assert adapter.flagged == [1]
    assert adapter([[np.nan, np.nan]]).tolist() == [[0.0, 0.0, 1.0]]


@pytest.mark.parametrize("item, expected", [
    (np.zeros((4, 3)), "shape (4, 3), it must be (steps, 2)"),
    (np.zeros(4), "it must be (steps, 2)"),
    (np.zeros((1, 4, 2)), "shape (1, 4, 2)"),
    (np.zeros((0, 2)), "empty"),
    ([[0, math.inf]], "infinity"),
    ([[0, 1e300]], "too far from the training values"),  # would be infinite in float32
    ([[0, 1j]], "complex"),
    ([[1, 2], [3]], "not an array of numbers"),
    ([["a", "b"]], "not an array of numbers"),
    (None, "shape ()"),
])  # fmt: skip
def test_series_that_cannot_be_used(item, expected):
    assert expected in message(SeriesAdapter([0.0, 0.0], [1.0, 1.0]), item)


def test_series_without_statistics():
    gap = np.array([[1.0, np.nan], [2.0, np.nan]])
    assert "channel 2 has no value" in message(SeriesAdapter.fit, [gap, gap])
    assert "channel 2 has no value" in message(SeriesAdapter.fit, [np.array([[1.0, np.nan], [2.0, 3.0]])], 1)
    assert "channel 1 has values too large" in message(SeriesAdapter.fit, [np.array([[1e300], [-1e300]])])


# --- Images ----------------------------------------------------------------------------------------------------------


@st.composite
def some_images(draw):
    size, rows, cols, channels = (draw(st.integers(1, 4)) for _ in range(4))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    top = draw(st.sampled_from([1, 2, 256]))  # 1: constant
    return rng.integers(0, top, (draw(st.integers(1, 3)), rows * size, cols * size, channels)).astype(np.uint8), size


@quick
@given(some_images())
def test_images_are_normalised_patches_and_come_back(problem):
    images, size = problem
    adapter = ImageAdapter.fit(images, size)
    flat = images.reshape(-1, images.shape[-1]).astype(np.float64)
    deviation = np.where(flat.std(0) > 0, flat.std(0), 1)
    np.testing.assert_allclose(adapter.mean, flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(adapter.std, deviation, rtol=1e-6)
    normal = (images - flat.mean(0)) / deviation
    for image, expected in zip(images, normal, strict=True):
        tokens = adapter(image)
        patches = [
            expected[row : row + size, col : col + size].ravel()
            for row in range(0, image.shape[0], size)
            for col in range(0, image.shape[1], size)
        ]
        assert tokens.dtype == torch.float32 and tokens.shape == (len(patches), adapter.features["input_dim"])
        assert math.prod(adapter.features["grid_shape"]) == len(patches)
        bound = 4 * ULP * (256 / deviation.min() + 1)
        np.testing.assert_allclose(tokens, patches, atol=bound)
    np.testing.assert_array_equal(adapter.images(adapter.tokens(images)), images)


def test_stored_images_of_every_kind(tmp_path):
    adapter = ImageAdapter([4, 6, 1], 2, [3.0], [2.0])
    grey = np.random.default_rng(0).integers(0, 256, (4, 6), np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    expected = adapter(grey)
    for item in (grey[..., None], grey.astype(float), grey.tolist(), torch.tensor(grey), Image.fromarray(grey),
                 tmp_path / "a.png"):  # fmt: skip
        assert torch.equal(adapter(item), expected)


def test_images_of_every_mode_and_size():
    rng = np.random.default_rng(0)
    for mode in sorted(set(Image.MODES) - {"LAB"}):  # older Pillows cannot convert it
        for size in ((1, 1), (3, 50), (50, 3), (8, 8), (40, 33)):
            pixels = square_pixels(Image.new(mode, size), 8)
            assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8, (mode, size)
    noise = rng.integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(noise)
    for other in (image, image.convert("RGBA"), Image.merge("RGBX", [*image.split(), image.split()[0]])):
        np.testing.assert_array_equal(square_pixels(other, 8), noise)
    grey = noise[..., 0]
    for other in (Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 257),
                  Image.fromarray(grey.astype(np.int32) * 257), Image.fromarray((grey / 255).astype(np.float32)),
                  Image.merge("LA", [Image.fromarray(grey), Image.new("L", (8, 8), 255)])):  # fmt: skip
        np.testing.assert_array_equal(square_pixels(other, 8), np.stack([grey] * 3, -1), err_msg=other.mode)


def test_arrays_are_images_of_their_channels():
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (8, 8, 4), np.uint8)
    for channels, mode in ((1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")):
        part = array[..., :channels]
        expected = square_pixels(Image.fromarray(part[..., 0] if channels == 1 else part, mode), 8)
        for item in (part, part.astype(np.float64), torch.tensor(part), part.tolist()):
            np.testing.assert_array_equal(square_pixels(item, 8), expected)
    np.testing.assert_array_equal(square_pixels(array[..., 0], 8), np.stack([array[..., 0]] * 3, -1))


@pytest.mark.parametrize("item, expected", [
    (np.full((4, 4, 3), 0.5), "pixels from 0 to 1; give whole numbers from 0 to 255"),
    (np.linspace(0, 1, 16).reshape(4, 4), "pixels from 0 to 1"),
    (np.eye(4), "pixels from 0 to 1"),  # black and white
    (np.eye(4, dtype=np.float32)[..., None], "pixels from 0 to 1"),
    (torch.eye(4), "pixels from 0 to 1"),
    (torch.eye(4, dtype=torch.float16), "pixels from 0 to 1"),
    (np.eye(4).tolist(), "pixels from 0 to 1"),
    (np.linspace(0, 2, 16).reshape(4, 4), "whole numbers from 0 to 255"),
    (np.full((4, 4), 256), "whole numbers"),
    (np.full((4, 4), -1), "whole numbers"),
    (np.full((4, 4), np.nan), "whole numbers"),
    (np.zeros((3, 20, 20)), "shape (3, 20, 20); it must be (H, W) or (H, W, 1 to 4 channels)"),
    (np.zeros((1, 4, 4, 3)), "shape (1, 4, 4, 3)"),
    (np.zeros(16), "shape (16,)"),
    (np.zeros((0, 4, 3)), "shape (0, 4, 3)"),
    (np.zeros((4, 4, 0)), "shape (4, 4, 0)"),
    (None, "shape ()"),
    ([[1, 2], [3]], "not an array of numbers"),
    ([[1j]], "complex"),
    ("cat.png", "there is no such file"),
    (Image.new("F", (2, 2), 7.0), "mode F with values 7.0"),
])  # fmt: skip
def test_images_that_cannot_be_used(item, expected):
    assert expected in message(ANY_SIZE, item)


def test_black_and_white_is_what_its_type_says():
    """As a file or a PIL image of one bit; never all but black."""
    mask = np.eye(8, dtype=bool)
    expected = np.stack([mask * 255] * 3, -1)
    one_bit = Image.new("1", (8, 8))
    one_bit.putdata([int(value) * 255 for value in mask.ravel()])
    floating = Image.fromarray(mask.astype(np.float32))
    for item in (mask, mask[..., None], torch.tensor(mask), mask.tolist(), one_bit, floating, np.asarray(one_bit),
                 mask * np.uint8(255), mask * 255.0):  # fmt: skip
        np.testing.assert_array_equal(square_pixels(item, 8), expected)
    np.testing.assert_array_equal(square_pixels(np.zeros((8, 8)), 8), 0)
    for fit in (np.eye(8)[None], [np.eye(8)], mask[None]):
        assert "pixels from 0 to 1" in message(ImageAdapter.fit, fit, 2)
    stored = ImageAdapter([8, 8, 1], 2, [3.0], [2.0])
    for item in (np.eye(8), mask, one_bit, torch.eye(8)):
        assert "pixels from 0 to 1" in message(stored, item)
    assert stored(np.eye(8, dtype=int)).shape == (16, 4)  # whole numbers 0 and 1 are stored values


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_grey_of_the_training_images_bits_in_every_form(tmp_path, bits):
    """As file, PIL image and array; black and white are where training has them."""
    white = 2**bits - 1
    deep = (np.linspace(0, 1, 64).reshape(8, 8) * white).round().astype(np.uint16)
    expected = np.stack([(deep * (255 / white)).round()] * 3, -1).astype(np.uint8)
    assert expected.min() == 0 and expected.max() == 255
    Image.fromarray(deep).save(tmp_path / "a.png")
    Image.fromarray(deep).save(tmp_path / "a.tif")
    adapter = ImageAdapter([8, 8, 3], 4, [0.0] * 3, [1.0] * 3, any_size=True, bits=bits)
    for item in (tmp_path / "a.png", str(tmp_path / "a.tif"), Image.fromarray(deep),
                 Image.fromarray(deep.astype(np.int32)),
                 deep, deep[..., None], deep.astype(np.int64), torch.tensor(deep.astype(np.int32)), deep.tolist(),
                 np.stack([deep] * 3, -1)):  # fmt: skip
        np.testing.assert_array_equal(adapter.pixels(item), expected, strict=True)
    eight = (expected[..., 0]).astype(np.uint8)
    for item in (eight, Image.fromarray(eight), eight * 1.0, torch.tensor(eight)):  # of 8 bits: as they are
        np.testing.assert_array_equal(adapter.pixels(item), expected)
    if bits < 16:
        for item in (deep + white, Image.fromarray(deep + white)):
            text = message(adapter, item)
            assert f"they must be in 0..{white}, the {bits} bits of the training images (--image_bits)" in text
    plain = ImageAdapter([8, 8, 3], 4, [0.0] * 3, [1.0] * 3, any_size=True)
    assert "whole numbers from 0 to 255" in message(plain, deep)
    np.testing.assert_array_equal(plain.pixels(tmp_path / "a.png"), square_pixels(Image.fromarray(deep), 8))


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    Image.new("F", (2, 2), 7.0).save(tmp_path / "b.tif")
    for name in ("a.png", "b.tif", "c.png"):
        assert str(tmp_path / name) in message(ANY_SIZE, tmp_path / name)


# What a viewer does with each EXIF orientation, as an index of the stored array
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_upright_once(orientation, tmp_path):
    stored = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    expected = UPRIGHT[orientation](stored)
    np.testing.assert_array_equal(square_pixels(tmp_path / "a.png", 8), expected)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(square_pixels(image, 8), expected)


@pytest.mark.parametrize("width, height", [(90, 30), (30, 90), (30, 30), (61, 30)])
def test_the_centre_is_cut_out_and_its_proportions_kept(width, height):
    image = Image.new("RGB", (width, height), "red")
    side, x, y = min(width, height), width / 2, height / 2
    draw = ImageDraw.Draw(image)
    draw.rectangle([x - side / 2, y - side / 2, x + side / 2 - 1, y + side / 2 - 1], "white")
    draw.ellipse([x - side / 4, y - side / 4, x + side / 4 - 1, y + side / 4 - 1], "black")
    pixels = square_pixels(image, 60).astype(int)
    assert (pixels[3:-3, 3:-3, 0] - pixels[3:-3, 3:-3, 1] < 3).all()  # nothing of the red beside the centre
    black = pixels[..., 0] < 128
    rows, cols = np.flatnonzero(black.any(1)), np.flatnonzero(black.any(0))
    assert len(rows) == pytest.approx(30, abs=2) and len(cols) == pytest.approx(30, abs=2)  # a circle stays one
    assert rows.mean() == pytest.approx(29.5, abs=1.1) and cols.mean() == pytest.approx(29.5, abs=1.1)


def test_a_ramp_stays_a_ramp():
    """Against linear interpolation of the centre, which is exact on a ramp."""
    ramp = np.broadcast_to(np.arange(80, dtype=np.uint8) * 3, (40, 80))
    expected = 3 * (20 + (np.arange(10) + 0.5) * 4 - 0.5)
    np.testing.assert_allclose(square_pixels(ramp, 10)[:, 1:-1, 0], np.tile(expected, (10, 1))[:, 1:-1], atol=1)


# --- Statistics ------------------------------------------------------------------------------------------------------


def test_statistics_come_from_the_training_split_only(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 5, 2)), np.arange(60) % 2
    np.savez(tmp_path / "a.npz", x=x, y=y, id=np.arange(60))
    fit = Settings(dataset_type="sequences", data_path=str(tmp_path / "a.npz"))
    splits, info = load_splits(fit)
    adapter = from_description(info["adapters"]["series"])
    assert sum(map(len, splits.values())) == 60
    assert torch.cat([*splits["train"].sequences]).mean(0).abs().max() < 1e-6
    assert (torch.cat([*splits["train"].sequences]).std(0, correction=0) - 1).abs().max() < 1e-5
    held_out = torch.cat([*splits["val"].sequences, *splits["test"].sequences])
    assert held_out.mean(0).abs().max() > 1e-3
    back = held_out.numpy() * adapter.std + adapter.mean  # the same adapter made them
    assert all(np.isclose(x.reshape(-1, 2), row, atol=1e-5).all(1).any() for row in back)

    # What is held out may be anything: the adapter stays, and with a description the training data may be too
    test = [np.flatnonzero(np.isclose(x, one.numpy() * adapter.std + adapter.mean, atol=1e-5).all((1, 2)))[0]
            for one in splits["test"].sequences]  # fmt: skip
    x[test] = 1000
    np.savez(tmp_path / "a.npz", x=x, y=y)
    assert load_splits(fit)[1]["adapters"] == info["adapters"]
    np.savez(tmp_path / "a.npz", x=x + 7, y=y)
    assert load_splits(fit)[1]["adapters"] != info["adapters"]
    assert load_splits(fit, info)[1]["adapters"] == info["adapters"]


def test_statistics_of_images_come_from_the_training_split_only(tmp_path):
    for split, levels in {"train": (10, 30), "val": (200, 210), "test": (250, 255)}.items():
        for name, level in zip("ab", levels, strict=True):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (9, 9), (level, 0, 7)).save(tmp_path / split / name / f"{number}.png")
    chosen = Settings(dataset_type="images", data_path=str(tmp_path), image_size=4, patch_size=2)
    _, info = load_splits(chosen)
    adapter = from_description(info["adapters"]["image"])
    assert adapter.mean == [20, 0, 7] and adapter.std == [10, 1, 1] and adapter.any_size


def test_images_are_fitted_in_every_form_that_predict_takes():
    images = np.random.default_rng(0).integers(0, 17, (5, 8, 8), dtype=np.uint8)
    expected = ImageAdapter.fit(images[..., None], 2)
    for same in (images, images.astype(float), list(images), images[..., None].tolist()):
        assert ImageAdapter.fit(same, 2) == expected
    with pytest.raises(UserError, match="pixels from 0 to 1; give whole numbers from 0 to 255"):
        ImageAdapter.fit(images / 16, 2)
