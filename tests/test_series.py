"""Tokens of series and their augmentation: exact under padding, shown in the user's time, and repeatable."""

import json
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from running import before_step

import inference
import plots
import run_log
import train
from adapters import (
    AugmentedSeries,
    ImageAdapter,
    SequenceDataset,
    SeriesAdapter,
    Source,
    TextAdapter,
    attention_by_step,
    describe,
    from_description,
)
from augmentation import SeriesAugmentation, series_augmentation
from batches import Mixed, create_dataloader, random_stream, set_epoch
from checkpoint import load_checkpoint
from config import Settings, resolve, unused_settings
from messages import UserError
from perceiver_model import PerceiverModel
from tasks import Classification, MultiLabel, Regression
from token_features import MaskedBatchNorm, SequenceConvStem, WindowStem, window_steps

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SMALL = {"d_model": 16, "num_heads": 2, "num_latents": 3, "num_cross_attention_layers": 1,
         "num_self_attention_layers": 1}  # fmt: skip
windows = st.integers(1, 9).flatmap(lambda window: st.tuples(st.just(window), st.integers(1, window)))
stems = windows.map(lambda pair: {"stem": "windows", "window": pair[0], "stride": pair[1]}) | st.integers(1, 6).map(
    lambda stride: {"stem": "conv", "stride": stride, "stem_dim": 6}
)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Stems ------------------------------------------------------------------------------------------------------------


@quick
@given(stems, st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 9), st.integers(0, 99))
def test_a_padded_batch_gives_every_sample_the_logits_it_gets_alone(stem, lengths, more, seed):
    torch.manual_seed(seed)
    model = PerceiverModel(2, 3, **SMALL, **stem).double().eval()
    series = [normal(seed + number, length, 2) for number, length in enumerate(lengths)]
    x = torch.full((len(lengths), max(lengths) + more, 2), torch.nan, dtype=torch.float64)
    for row, one in zip(x, series, strict=True):
        row[: len(one)] = one
    mask = torch.arange(x.size(1)) < torch.tensor(lengths)[:, None]
    logits, (attention,) = model(x, mask, return_attention=True)
    for number, one in enumerate(series):
        alone, (own,) = model(one[None], return_attention=True)
        torch.testing.assert_close(logits[number], alone[0], rtol=1e-9, atol=1e-9)
        tokens = own.size(-1)
        torch.testing.assert_close(attention[number, ..., :tokens], own[0], rtol=1e-9, atol=1e-9)
        assert (attention[number, ..., tokens:] == 0).all()


@quick
@given(stems, st.integers(0, 99))
def test_padded_texts_have_the_logits_and_gradients_that_they_get_alone(stem, seed):
    """What is padding must not reach the stem as the embedding of a byte 0."""
    torch.manual_seed(seed)
    model = PerceiverModel({"text": {"vocab_size": 9, "embedding_dim": 3, **stem}}, 3, **SMALL).double()
    text = torch.randint(9, (1, 11, 1), generator=torch.Generator().manual_seed(seed)).double()
    found = []
    for x, mask in ((text, None), (F.pad(text, (0, 0, 0, 7), value=torch.nan), torch.arange(18)[None] < 11)):
        model.zero_grad()
        logits = model({"text": x}, None if mask is None else {"text": mask})
        logits.square().sum().backward()
        found.append([logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for alone, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, alone, rtol=1e-8, atol=1e-9)


@quick
@given(stems, st.integers(0, 99))
def test_padding_moves_no_gradient_of_a_stem(stem, seed):
    torch.manual_seed(seed)
    model = PerceiverModel(2, 3, **SMALL, **stem).double()  # in training, where batch norm counts the real tokens
    series = normal(seed, 1, 11, 2)
    padded = F.pad(series, (0, 0, 0, 7), value=torch.inf)
    gradients = []
    for x, mask in ((series, None), (padded, torch.arange(18)[None] < 11)):
        model.zero_grad()
        model(x, mask).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for alone, in_batch in zip(*gradients, strict=True):
        torch.testing.assert_close(in_batch, alone, rtol=1e-8, atol=1e-9)


@quick
@given(windows, st.integers(1, 50))
def test_every_step_is_in_a_token_and_no_token_is_without_a_step_of_its_own(window, length):
    steps = window_steps(length, *window)
    held = [set(range(*pair)) for pair in steps]
    assert set.union(*held) == set(range(length))
    assert all(one - set().union(*held[:number]) for number, one in enumerate(held))


@quick
@given(windows, st.lists(st.booleans(), min_size=1, max_size=40))
def test_a_token_is_real_where_it_holds_a_real_step_that_no_token_before_it_holds(window, mask):
    stem = WindowStem(1, *window)
    found = stem.token_mask(torch.tensor([mask]))[0].tolist()
    seen, expected = set(), []
    for first, last in window_steps(len(mask), *window):
        expected.append(any(mask[step] for step in range(first, last) if step not in seen))
        seen |= set(range(first, last))
    assert found == expected


@quick
@given(windows, st.integers(1, 20), st.integers(0, 99))
def test_windows_hold_their_steps(window, length, seed):
    x = normal(seed, 2, length, 3)
    tokens, mask = WindowStem(3, *window)(x, None)
    assert mask is None
    for number, (first, last) in enumerate(window_steps(length, *window)):
        expected = torch.zeros(2, window[0], 3, dtype=torch.float64)
        expected[:, : last - first] = x[:, first:last]
        assert torch.equal(tokens[:, number], expected.flatten(1))


@quick
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 40), st.integers(0, 99))
def test_convolutions_against_sums_written_out(stride, scale, length, seed):
    torch.manual_seed(seed)
    stem = SequenceConvStem(2, 6, stride, kernel_scale=scale).double().eval()
    assert [one.kernel_size[0] for one in stem.layers[0]] == [size * scale + (scale == 2) for size in (7, 15, 31)]
    for norm in stem.norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = normal(seed, length, 2)
    tokens, _ = stem(x[None], None)

    def convolved(values, convolution, places):
        half = convolution.kernel_size[0] // 2
        rows = []
        for place in places:
            near = [(tap, place + tap - half) for tap in range(convolution.kernel_size[0])]
            terms = [convolution.weight[:, :, tap] @ values[step] for tap, step in near if 0 <= step < len(values)]
            rows.append(sum(terms))
        return torch.stack(rows)

    def layer(values, number, places):
        y = torch.cat([convolved(values, one, places) for one in stem.layers[number]], 1)
        norm = stem.norms[number]
        y = (y - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        return y * (1 + torch.erf(y / 2**0.5)) / 2

    first = layer(x, 0, range(0, length, stride))
    torch.testing.assert_close(tokens[0], first + layer(first, 1, range(len(first))), rtol=1e-9, atol=1e-9)


@quick
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4).filter(lambda lengths: sum(lengths) > 2), st.integers(0, 99))
def test_batch_norm_of_real_tokens_is_that_of_torch(lengths, seed):
    real = torch.cat([normal(seed + i, length, 3) for i, length in enumerate(lengths)])
    padded = torch.nn.utils.rnn.pad_sequence(real.split(lengths), batch_first=True, padding_value=1e6)
    mask = torch.arange(padded.size(1)) < torch.tensor(lengths)[:, None]
    ours, torchs = MaskedBatchNorm(3).double(), torch.nn.BatchNorm1d(3).double()
    for norm in (ours, torchs):
        torch.nn.init.constant_(norm.weight, 1.5)
        torch.nn.init.constant_(norm.bias, -0.5)
    close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)
    for _ in range(2):
        close(ours(padded, mask)[mask], torchs(real))
    close(ours(real[None], None)[0], torchs(real))
    for name, value in torchs.state_dict().items():
        close(ours.state_dict()[name], value)
    close(ours.eval()(padded, mask)[mask], torchs.eval()(real))


def test_batch_norm_leaves_a_batch_without_any_series_out():
    torch.manual_seed(0)
    modalities = {"series": {"input_dim": 2, "stem": "conv", "stem_dim": 6}, "text": {"vocab_size": 256}}
    model = PerceiverModel(modalities, 2, **SMALL)
    before = [buffer.clone() for buffer in model.buffers()]
    model({"text": torch.full((3, 4, 1), 65.0)}).sum().backward()
    assert all(torch.equal(buffer, value) for buffer, value in zip(model.buffers(), before, strict=True))
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_stem_makes_long_series_cheaper():
    model = PerceiverModel(1, 2, **SMALL, stem="conv", stride=8, stem_dim=6)
    _, (attention,) = model(torch.randn(1, 800, 1), return_attention=True)
    assert attention.shape[-1] == 100


@pytest.mark.parametrize("arguments, words", [
    ({"stem": "windows"}, ["window"]),
    ({"stem": "windows", "window": 4, "stride": 5}, ["stride 5", "windows of 4"]),
    ({"stem": "windows", "window": 4, "grid_shape": (4, 4)}, ["windows", "grid_shape"]),
    ({"stem": "windows", "window": 4, "stem_dim": 8}, ["stem_dim=8", "no effect"]),
    ({"stem": "conv", "window": 4}, ["window=4", "no effect"]),
    ({"stem": "conv", "stem_dim": 64}, ["stem_dim", "64"]),
    ({"stem": "conv", "stride": 0}, ["stride", "0"]),
    ({"stem": "conv", "grid_shape": (8, 8), "stride": 2}, ["stride=2", "no effect"]),
    ({"stride": 2}, ["stride=2", "no effect"]),
    ({"stem": "conv", "kernel_scale": 0}, ["kernel_scale", "0"]),
    ({"stem": "windows", "window": 4, "kernel_scale": 2}, ["kernel_scale=2", "no effect"]),
])  # fmt: skip
def test_stems_that_cannot_be(arguments, words):
    with pytest.raises(ValueError) as caught:
        PerceiverModel(3, 2, **SMALL, **arguments)
    assert all(word in str(caught.value) for word in words)


# --- The adapter ------------------------------------------------------------------------------------------------------

SERIES = [np.random.default_rng(number).normal(size=(length, 2)) for number, length in enumerate((30, 300, 310, 900))]


def test_the_adapter_tells_the_model_of_its_stem():
    plain = SeriesAdapter.fit(SERIES)
    assert plain.features == {"input_dim": 2} and plain.token_steps(3).tolist() == [[0, 1], [1, 2], [2, 3]]
    conv = SeriesAdapter.fit(SERIES, stem="conv")  # the median is 305 steps, 8 of which make at most 64 tokens
    assert conv.features == {"input_dim": 2, "stem": "conv", "stride": 8}
    assert conv.token_steps(20).tolist() == [[0, 8], [8, 16], [16, 20]]
    assert SeriesAdapter.fit(SERIES, 100, stem="conv").stride == 2  # of what is left of them
    assert SeriesAdapter.fit(SERIES, stem="conv", stride=3).stride == 3
    long = SeriesAdapter.fit(SERIES[-1:], stem="conv")
    assert long.features == {"input_dim": 2, "stem": "conv", "stride": 16, "kernel_scale": 2}
    assert SeriesAdapter.fit([one[:20] for one in SERIES], stem="conv").stride == 1
    window = SeriesAdapter.fit(SERIES, stem="windows", window=8)
    assert window.features == {"input_dim": 2, "stem": "windows", "window": 8, "stride": 2}
    assert window.token_steps(11).tolist() == [[0, 8], [2, 10], [4, 11]]
    for adapter in (conv, window):
        assert from_description(json.loads(json.dumps(describe(adapter)))) == adapter
        model = PerceiverModel({"series": adapter.features}, 2, **SMALL)
        for length in (1, 7, 8, 9, 100):
            tokens = model.token_ranges({"series": torch.zeros(1, length, 2)})["series"]
            assert len(adapter.token_steps(length)) == tokens.stop


@pytest.mark.parametrize("length, stem", [(1000, {}), (20_000, {}), (300, {"stride": 100})])
def test_convolutions_leave_no_step_of_a_long_series_out(length, stem):
    adapter = SeriesAdapter.fit([np.random.default_rng(0).normal(size=(length, 1))], stem="conv", **stem)
    model, series = PerceiverModel(num_classes=2, **adapter.features, **SMALL), torch.randn(1, length, 1)
    series.requires_grad_()
    model.eval()(series).square().sum().backward()
    assert series.grad.ne(0).all()


def test_the_adapter_of_text_tells_the_model_of_its_stem():
    texts = ["a" * length for length in (30, 300, 610, 3000)]
    conv = TextAdapter.fit(texts, Settings(dataset_type="text", stem="conv"))  # half of them have at most 256 tokens
    assert conv.features == {"vocab_size": 256, "stem": "conv", "stride": 2}
    assert conv.token_steps(5).tolist() == [[0, 2], [2, 4], [4, 5]]
    assert TextAdapter.fit(texts, Settings(dataset_type="text", stem="conv", max_seq_len=100)).stride == 1
    assert TextAdapter.fit(texts, Settings(dataset_type="text", stem="none")).features == {"vocab_size": 256}
    assert from_description(json.loads(json.dumps(describe(conv)))) == conv
    for stem in ({"stem": "windows"}, {"stride": 2}, {"stem": "conv", "stride": 0}):
        with pytest.raises(UserError):
            from_description({"kind": "text", **stem})


def test_text_of_another_run_keeps_its_tokens_where_they_suit():
    def taken(adapter, **options):
        source = Source({"train": ["a" * 2000]}, {"train": [""]})
        return adapter.taken_over(source, Settings(**({"dataset_type": "text"} | options)))

    coarse, single, plain = TextAdapter(stem="conv", stride=4), TextAdapter(stem="conv"), TextAdapter()
    assert taken(coarse, stem="conv") == coarse and taken(single, stem="conv") == single
    assert taken(plain) == plain and taken(coarse) == plain
    assert taken(plain, stem="conv") == TextAdapter(stem="conv", stride=8)  # now fitted
    assert taken(coarse, stem="conv", task="tagging") == single  # each character is asked for
    assert taken(plain, stem="conv", dataset_type="multimodal") == plain  # the stem is the one of the images


def test_attention_to_text_is_shown_by_byte(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(plots, "plot_text_attention", lambda bytes, mask, attention, *_: drawn.update(found=attention))
    adapter, weights = TextAdapter(stem="conv", stride=2), np.array([[[[0.25, 0.5, 0.25]]]])  # of one text of 5 bytes
    adapter.draw_attention(torch.zeros(1, 5, 1), np.ones((1, 5), bool), [weights], ["a"], tmp_path / "x.png")
    np.testing.assert_allclose(drawn["found"][0][0, 0, 0], [0.125, 0.125, 0.25, 0.25, 0.25])


@pytest.mark.parametrize("stem", [
    {"stem": "deep"}, {"stem": "windows"}, {"window": 3}, {"stem": "conv", "window": 3}, {"stride": 2},
    {"kernel_scale": 2},
    {"stem": "windows", "window": 2, "stride": 3}, {"stem": "conv", "stride": 0}, {"stem": "windows", "window": 0},
])  # fmt: skip
def test_descriptions_of_stems_that_cannot_be(stem):
    with pytest.raises(UserError):
        from_description({"kind": "series", "mean": [0.0], "std": [1.0], **stem})


@quick
@given(windows, st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(0, 99))
def test_attention_is_shown_by_step(window, lengths, seed):
    adapter = SeriesAdapter([0.0], [1.0], stem="windows", window=window[0], stride=window[1])
    steps = adapter.token_steps(max(lengths))
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    real = WindowStem(1, *window).token_mask(torch.from_numpy(mask)).numpy()
    weights = np.random.default_rng(seed).random((len(lengths), 2, 3, len(steps))) * real[:, None, None]
    found = attention_by_step(weights, steps, mask)
    expected = np.zeros((len(lengths), 2, 3, max(lengths)))
    for sample, length in enumerate(lengths):
        for token in np.flatnonzero(real[sample]):
            places = [step for step in range(*steps[token]) if step < length]
            expected[sample][..., places] += weights[sample][..., [token]] / len(places)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.sum(-1), weights.sum(-1), rtol=1e-9)


def test_the_figure_of_attention_is_in_steps(monkeypatch, tmp_path):
    drawn = {}

    def draw(inputs, mask, attention, captions, path):
        drawn["shapes"] = inputs.shape, [weights.shape for weights in attention]

    monkeypatch.setattr(plots, "plot_sequence_attention", draw)
    adapter = SeriesAdapter.fit(SERIES, stem="conv", stride=7)
    weights = np.full((1, 4, 5, 43), 1 / 43)
    adapter.draw_attention(torch.zeros(1, 300, 2), np.ones((1, 300), bool), [weights], ["one"], tmp_path / "a.png")
    assert drawn["shapes"] == ((1, 300, 2), [(1, 4, 5, 300)])


def test_images_may_have_the_stem_too(monkeypatch, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 13, 17, 3), np.uint8)
    adapter = ImageAdapter.fit(images, 4, stem="conv")  # of any size: no patch has to fit
    assert adapter.features == {"input_dim": 3, "grid_shape": [13, 17], "stem": "conv"}
    assert from_description(json.loads(json.dumps(describe(adapter)))) == adapter
    model = PerceiverModel({"image": adapter.features}, 2, **SMALL).eval()
    tokens = adapter.tokens(images[:2])
    _, (attention,) = model({"image": tokens}, return_attention=True)
    drawn = []
    monkeypatch.setattr(plots, "plot_image_attention", lambda pictures, maps, grid, *_: drawn.append((pictures, grid)))
    adapter.draw_attention(tokens, None, [attention.detach().numpy()], ["", ""], tmp_path / "a.png")
    ((pictures, (rows, cols)),) = drawn
    np.testing.assert_array_equal(pictures, images[:2])
    assert rows * cols == attention.shape[-1] == 3 * 4
    for stem in ({"stem": "conv"}, {"stem": "deep", "patch_size": 1}):
        with pytest.raises(UserError):
            from_description(describe(ImageAdapter.fit(images[:, :12, :16], 4)) | stem)


# --- Augmentation -----------------------------------------------------------------------------------------------------

RAMP = torch.arange(40.0)[:, None]
ALL = SeriesAugmentation(0.1, False, 0.2, 0.2, 0.1, 0.05)


def changed(tokens, flagged=(), seed=0, **change):
    return SeriesAugmentation(**change)(tokens, random_stream("test", seed), flagged)


@quick
@given(st.integers(1, 60), st.integers(1, 3), st.integers(0, 99), st.booleans())
def test_a_changed_series_has_the_shape_of_its_own(length, channels, seed, circular):
    tokens = normal(seed, length, channels).float()
    change = SeriesAugmentation(0.2, circular, 0.3, 0.3, 0.2, 0.1)
    found = change(tokens, random_stream("test", seed))
    assert found.shape == tokens.shape and found.dtype == torch.float32 and found.isfinite().all()
    assert torch.equal(found, change(tokens, random_stream("test", seed)))
    unchanged = SeriesAugmentation()
    assert not unchanged and torch.equal(unchanged(tokens, random_stream("test", seed)), tokens)


@quick
@given(st.integers(2, 60), st.integers(0, 99))
def test_each_change_is_what_its_name_says(length, seed):
    ramp = torch.arange(float(length))[:, None]
    moved = changed(ramp, seed=seed, shift=0.25)[:, 0]
    offset = moved - ramp[:, 0]
    inside = (moved > 0) & (moved < length - 1)
    assert (offset[inside] - offset[inside].mean()).abs().max() < 1e-4 if inside.any() else True
    assert (offset.abs() <= 0.25 * length + 1e-4).all()
    warped = changed(ramp, seed=seed, warp=0.4)[:, 0]
    assert warped[0] == 0 and abs(warped[-1] - (length - 1)) < 1e-4 and (warped.diff() > 0).all()
    part = changed(ramp, seed=seed, crop=0.5)[:, 0]
    assert part.min() >= 0 and part.max() <= length - 1 + 1e-4 and part.max() - part.min() >= 0.5 * (length - 1) - 1e-4
    torch.testing.assert_close(part.diff(), part.diff()[:1].expand(length - 1), rtol=0, atol=1e-4)
    factor = changed(ramp, seed=seed, scale=0.3)[1:, 0] / ramp[1:, 0]
    torch.testing.assert_close(factor, factor[:1].expand(length - 1))
    noise = changed(torch.zeros(4000, 1), seed=seed, jitter=0.1)
    assert abs(noise.std() - 0.1) < 0.01 and abs(noise.mean()) < 0.01


@quick
@given(st.integers(3, 60), st.integers(0, 99))
def test_a_closed_series_is_turned(length, seed):
    angles = 2 * torch.pi * torch.arange(length) / length
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    turned = changed(circle, seed=seed, circular=True)
    # Between two steps the interpolation runs along the chord, everywhere at the same place of it
    radius = turned.norm(dim=1)
    torch.testing.assert_close(radius, radius[:1].expand(length), rtol=0, atol=1e-5)
    steps = torch.atan2(turned[:, 1], turned[:, 0]).diff() % (2 * torch.pi)
    torch.testing.assert_close(steps, torch.full((length - 1,), 2 * torch.pi / length), rtol=0, atol=1e-4)


@quick
@given(st.integers(0, 99), st.booleans())
def test_missing_values_stay_missing_and_are_never_mixed_with_others(seed, circular):
    rng = np.random.default_rng(seed)
    missing = rng.random(50) < 0.3
    values = np.where(missing, 0, rng.integers(1, 9, 50)).astype(np.float32)
    tokens = torch.from_numpy(np.stack([rng.normal(size=50).astype(np.float32), values, missing], 1))
    found = changed(tokens, (1,), seed, shift=0.2, warp=0.3, circular=circular)
    assert set(found[:, 2].tolist()) <= {0.0, 1.0}
    assert torch.equal(found[:, 1] == 0, found[:, 2] == 1)
    assert set(found[:, 1].tolist()) <= set(values.tolist())
    noisy = changed(tokens, (1,), seed, scale=0.3, jitter=0.2)
    assert torch.equal(noisy[:, 1] == 0, found.new_tensor(missing) == 1) and torch.equal(noisy[:, 2], tokens[:, 2])


def test_a_change_depends_on_seed_epoch_and_sample_alone():
    def data(seed):
        return AugmentedSeries([RAMP] * 6, np.arange(6) % 2, None, ALL, (), seed)

    def epochs(seed, workers, batch_size=4):
        loader = create_dataloader(data(seed), batch_size, shuffle=True, num_workers=workers, num_classes=2)
        return [[batch["input"] for batch in loader] for _ in range(2)]

    first, second = epochs(0, 0)
    for workers in (1, 2):
        for plain, by_workers in zip((first, second), epochs(0, workers), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(plain, by_workers, strict=True))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0], epochs(1, 0)[0][0])
    one = data(0)
    assert not torch.equal(one[0]["input"], one[1]["input"])  # of the same series
    loader = create_dataloader(data(0), 4, shuffle=True, num_classes=2)
    set_epoch(loader, 1, 1)  # as a resumed run does
    assert torch.equal(next(iter(loader))["input"], second[1])


def test_a_share_of_the_series_is_changed_anew_in_each_epoch():
    change = SeriesAugmentation(jitter=0.1, share=0.3)
    data = AugmentedSeries([RAMP] * 1000, np.arange(1000) % 2, None, change, (), 0)
    moved = []
    for epoch in (0, 1):
        data.set_epoch(epoch)
        moved.append(np.array([not torch.equal(data[number]["input"], RAMP) for number in range(1000)]))
        assert 0.25 < moved[-1].mean() < 0.35  # standard deviation 0.014
    assert 0.15 < (moved[0] & moved[1]).mean() / moved[0].mean() < 0.45
    assert str(change) == "jitter 0.1, 30% of them"
    assert not SeriesAugmentation(share=0.3)
    settings, sources = resolve(flags={"dataset_type": "sequences", "series_share": 0.5})
    assert any("series_share has no effect" in note for note in unused_settings(settings, sources))
    settings, sources = resolve(flags={"dataset_type": "sequences", "series_share": 0.5, "series_circular": True})
    assert not unused_settings(settings, sources)


def test_only_training_series_are_changed_and_augment_is_the_switch():
    given_ = Settings(dataset_type="sequences", series_shift=0.1, series_jitter=0.2)
    assert series_augmentation(given_, "train") == SeriesAugmentation(shift=0.1, jitter=0.2)
    assert not series_augmentation(given_, "val") and not series_augmentation(given_, "test")
    assert not series_augmentation(Settings(dataset_type="sequences", series_shift=0.1, augment=False), "train")


# --- Mixtures ---------------------------------------------------------------------------------------------------------

MODALITIES = {
    "series": {"input_dim": 2, "stem": "conv", "stride": 2, "stem_dim": 6},
    "image": {"input_dim": 3, "grid_shape": (2, 3)},
    "text": {"vocab_size": 256, "embedding_dim": 5},
}


@pytest.mark.parametrize("name", MODALITIES)
@quick
@given(st.lists(st.integers(1, 9), min_size=2, max_size=2), st.integers(0, 99))
def test_two_samples_are_mixed_before_the_stem(name, lengths, seed):
    """Against the sum written out: of features, of embeddings of text; what one of both lacks counts as zeros."""
    torch.manual_seed(seed)
    model = PerceiverModel({name: MODALITIES[name]}, 3, **SMALL).double().eval()
    tokens = model.modalities[name]
    lengths = [6, 6] if name == "image" else lengths
    x, other = (normal(seed + i, 1, length, tokens.input_dim) for i, length in enumerate(lengths))
    if name == "text":
        x, other = ((values.abs() * 50).round() for values in (x, other))
    weight, longest = 0.7, max(lengths)
    features = [x, other]
    if tokens.embedding is not None:
        features = [tokens.embedding(values[..., 0].long()) for values in features]
    first, second = (F.pad(one, (0, 0, 0, longest - one.size(1))) for one in features)
    mixed = weight * first + (1 - weight) * second
    seen = []
    tokens.register_forward_hook(lambda module, _, output: seen.append(output))
    logits = model({name: x}, mix=({name: other}, None, torch.tensor([weight], dtype=torch.float64)))
    behind = mixed if tokens.stem is None else tokens.stem(mixed, None)[0]
    torch.testing.assert_close(seen[0][0][..., : behind.size(2)], behind, rtol=1e-9, atol=1e-9)
    # The same in a padded batch, with all modalities of the model there or not
    padded = [F.pad(values, (0, 0, 0, 4), value=float("nan")) for values in (x, other)]
    masks = [torch.arange(length + 4)[None] < length for length in lengths]
    if name != "image":
        mix = {name: padded[1]}, {name: masks[1]}, torch.tensor([weight], dtype=torch.float64)
        again = model({name: padded[0]}, {name: masks[0]}, mix=mix)
        torch.testing.assert_close(again, logits, rtol=1e-9, atol=1e-9)
    alone = model({name: x}, mix=({name: other[:, : lengths[0]]}, None, torch.ones(1, dtype=torch.float64)))
    if lengths[1] <= lengths[0]:
        torch.testing.assert_close(alone, model({name: x}), rtol=1e-9, atol=1e-9)


def test_a_mixture_of_modalities_that_not_every_sample_has():
    torch.manual_seed(0)
    model = PerceiverModel(MODALITIES, 3, **SMALL).eval()
    x = {"series": torch.randn(2, 5, 2), "image": torch.randn(2, 6, 3)}
    other = {"text": torch.full((2, 4, 1), 65.0), "image": torch.randn(2, 6, 3)}
    logits = model(x, mix=(other, None, torch.tensor([0.6, 1.0])))
    assert logits.isfinite().all() and logits.shape == (2, 3)
    assert not torch.allclose(logits[0], model(x)[0])


def classes(number):
    return Classification([str(i) for i in range(number)])


TASKS = [
    (classes(3), torch.tensor([0, 2, 1, 1])),
    (replace(classes(3), class_weights=[1.0, 2.0, 0.5]), torch.tensor([0, 2, 1, 1])),
    (Regression(["a", "b"], [0.0, 0.0], [1.0, 1.0]), torch.randn(4, 2)),
    (MultiLabel(["a", "b", "c"]), torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])),
]


@pytest.mark.parametrize("task, targets", TASKS, ids=["classes", "weighted", "numbers", "labels"])
def test_a_weighted_objective_is_the_sum_over_samples(task, targets):
    outputs, weights = torch.randn(4, task.num_outputs), torch.tensor([0.2, 1.0, 0.0, 0.7])
    given_ = Settings(label_smoothing=0.1)
    each = [task.objective(outputs[[i]], targets[[i]], given_) for i in range(4)]
    expected = sum(weight * one for weight, one in zip(weights, each, strict=True))
    torch.testing.assert_close(task.objective(outputs, targets, given_, weights), expected)
    torch.testing.assert_close(task.objective(outputs, targets, given_), sum(each))


def test_the_partners_of_a_mixture_depend_on_seed_epoch_and_sample_alone():
    data = SequenceDataset([torch.full((3 + number, 1), float(number)) for number in range(9)], np.arange(9) % 2)

    def batches(seed, size, workers=0):
        loader = create_dataloader(Mixed(data, 0.4, seed, classes(2)), size, num_workers=workers, num_classes=2)
        found = []
        for _ in range(2):
            rows = {}
            for batch in loader:
                mix = batch["mix"]
                for i, own in enumerate(batch["input"][:, 0, 0].tolist()):
                    partner = int(mix["input"][i, 0, 0])
                    assert int(mix["mask"][i].sum()) == 3 + partner and int(mix["label"][i]) == partner % 2
                    rows[own] = partner, float(mix["weight"][i])
            found.append(rows)
        return found

    first, second = batches(0, 4)
    assert batches(0, 2) == batches(0, 4, workers=2) == [first, second]
    assert first != second and first != batches(1, 4)[0]
    assert all(0.5 <= share <= 1 for _, share in first.values()) and len({partner for partner, _ in first.values()}) > 2


def test_the_recipe_is_a_layer_of_defaults():
    plain, _ = resolve({"dataset_type": "sequences"})
    assert (plain.stem, plain.num_epochs, plain.epoch_samples, plain.series_shift) == ("none", 100, 0, 0.0)
    strong, sources = resolve({"dataset_type": "sequences", "series_recipe": "strong"}, {"series_shift": 0.3})
    assert (strong.stem, strong.num_epochs, strong.epoch_samples, strong.series_shift) == ("conv", 40, 1600, 0.3)
    assert (sources["stem"], sources["series_shift"], sources["learning_rate"]) == ("recipe", "file", "data set")
    again, _ = resolve({}, {}, base=strong.to_dict())
    assert again == strong
    text, _ = resolve({"dataset_type": "text", "series_recipe": "strong"})
    assert text == replace(resolve({"dataset_type": "text"})[0], series_recipe="strong")


# --- A run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Twelve series of two classes, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("own.npz", x=rng.normal(size=(12, 20, 2)).astype(np.float32), y=np.arange(12) % 2)
    monkeypatch.setattr(run_log, "tensorboard_writer", lambda *_: None)
    monkeypatch.setattr(plots, "plot_training_curves", lambda *given: given[1].write_text("curves"))
    return tmp_path


RUN = (
    "--dataset sequences --data_path own.npz --d_model 16 --num_heads 2 --num_latents 3 --epochs 2 --batch_size 4 "
    "--epoch_samples 20 --amp off --device cpu --series_shift 0.1 --series_circular --series_warp 0.2 "
    "--series_crop 0.1 --series_scale 0.1 --series_jitter 0.1 --series_share 0.6 --mixup 0.4 --series_recipe strong"
)


def run(*words):
    return train.main(RUN.split() + list(words))


def weights(folder):
    return load_checkpoint(f"{folder}/last_model.pth")["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_on_series_ends_as_the_unbroken_one(files, monkeypatch, workers):
    assert run("--checkpoint_dir", "whole") == 0
    with monkeypatch.context() as patch:
        before_step(patch, 7, lambda: signal.raise_signal(signal.SIGTERM))  # in the middle of the second epoch
        assert run("--checkpoint_dir", "broken", "--num_workers", str(workers)) == 128 + signal.SIGTERM
    progress = load_checkpoint("broken/last_model.pth")["progress"]
    assert progress["epoch"] == 1 and 0 < progress["batch"] < 5
    assert not same(weights("broken"), weights("whole"))
    assert train.main(["--resume", "broken/last_model.pth"]) == 0
    assert same(weights("broken"), weights("whole"))


def test_what_a_run_on_series_says(files, capsys):
    assert run("--series_stride", "2") == 0
    text = capsys.readouterr()
    assert "series  20 steps, 2 channels; convolutions, a token every 2 steps" in text.out
    assert "series  in training changed at random: started anywhere (circular), shift 0.1, warp 0.2" in text.out
    assert "too few to choose an epoch by" in text.out + text.err
    checkpoint = load_checkpoint("checkpoints/best_model.pth")
    assert checkpoint["epoch"] == 2 and checkpoint["settings"]["select_by"] == "last"
    # 8 of 12 are left for training: three passes make the 20 samples, 24 in 6 batches
    assert checkpoint["data"]["split_sizes"]["train"] == 8 and checkpoint["progress"]["step"] == 12
    assert inference.main(["--model_path", "checkpoints/best_model.pth", "--analyze", "--device", "cpu"]) == 0
    assert (files / "results" / "attention.png").stat().st_size > 0


@pytest.mark.parametrize(("flags", "steps"), [
    ("--epochs 2", 4), ("--epochs 1 --accumulation_steps 2", 1), ("--epochs 1 --stem conv", None),
])  # fmt: skip
def test_few_series_read_step_by_step_are_told_of_the_choice(files, capsys, flags, steps):
    plain = "--dataset sequences --data_path own.npz --d_model 16 --num_heads 2 --num_latents 3 --batch_size 4"
    assert train.main([*plain.split(), *flags.split()]) == 0
    hints = [line for line in "".join(capsys.readouterr()).splitlines() if "--select auto" in line]
    assert len(hints) == (steps is not None)
    assert all(f"8 training series and {steps} steps are few" in line for line in hints)


@pytest.mark.parametrize("words, expected", [
    ("--series_window 4", "series_window: the stem conv reads no windows"),
    ("--stem none --series_stride 2", "series_stride: without a stem every step is a token"),
    ("--stem none --series_window 4 --series_stride 5", "series_stride 5 is larger than series_window 4"),
    ("--select_by last --early_stopping_patience 3", "early_stopping_patience"),
    ("--series_shift 1", "--series_shift: expected a number"),
    ("--mixup -1", "--mixup: expected a number"),
])  # fmt: skip
def test_settings_of_series_that_do_not_go_together(files, capsys, words, expected):
    with pytest.raises(SystemExit) as caught:
        train.main([*RUN.split(), *words.split()])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert expected in error and len(error.splitlines()) == 1
    assert not (files / "checkpoints").exists() or not list((files / "checkpoints").glob("*.pth"))


@pytest.mark.parametrize("words, features", [
    ("--stem none --series_window 4", {"input_dim": 2, "stem": "windows", "window": 4, "stride": 1}),
    ("--stem none", {"input_dim": 2}),
    ("--stem conv --series_stride 3", {"input_dim": 2, "stem": "conv", "stride": 3}),
])  # fmt: skip
def test_the_flags_of_tokens_reach_the_model(files, words, features):
    assert run("--epochs", "1", "--epoch_samples", "0", *words.split()) == 0
    assert load_checkpoint("checkpoints/last_model.pth")["data"]["features"] == {"series": features}
