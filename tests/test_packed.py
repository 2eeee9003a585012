"""Series and texts in one array: the same items as one by one, the bits of NumPy's statistics, maps into memory."""

import pickle
import zlib

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from user_files import quick

import packed
import series_files
from adapters import SeriesAdapter, Source
from config import Settings
from data_files import read_series, read_texts
from data_utils import load_splits
from messages import UserError
from packed import PackedSeries, PackedTexts, Steps


def one_by_one(series):
    """What each series is without its padding, or None where it is refused; plainly, a step at a time."""
    found = []
    for one in series:
        one = one.astype(np.float64)
        while len(one) and np.isnan(one[-1]).all():
            one = one[:-1]
        found.append(None if not one.size or np.isinf(one).any() else one)
    return found


@quick
@given(st.data())
def test_series_of_an_npz_are_those_of_its_arrays(tmp_path, data):
    seed, form = data.draw(st.integers(0, 2**20)), data.draw(st.sampled_from(["plain", "padded", "joined"]))
    dtype = data.draw(st.sampled_from([np.float32, np.float64, np.float16, np.longdouble, np.int16]))
    rng = np.random.default_rng(seed)
    number, steps, channels = rng.integers(1, 30), rng.integers(1, 9), rng.integers(1, 4)
    x = rng.integers(-9, 9, (number, steps, channels)).astype(dtype)
    if dtype != np.int16:
        x[rng.random(x.shape) < data.draw(st.sampled_from([0, 0.3, 0.9]))] = np.nan
        x[rng.random(x.shape) < data.draw(st.sampled_from([0, 0.02]))] = np.inf
    lengths = rng.integers(0, steps + 1, number) if form == "padded" else np.full(number, steps)
    arrays = {"x": x, "y": np.arange(number) % 2, "lengths": lengths}
    if form == "plain":
        del arrays["lengths"]
    if form == "joined":
        arrays["lengths"] = lengths = rng.multinomial(number * steps, np.full(number, 1 / number))
        arrays["x"] = x = x.reshape(-1, channels)
    series = np.split(x, np.cumsum(lengths)[:-1]) if form == "joined" else [a[:n] for a, n in zip(x, lengths)]  # noqa: B905
    expected = one_by_one(series)
    np.savez(tmp_path / "a.npz", **arrays)
    errors = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(series_files, "VALUES", data.draw(st.sampled_from([1, 20, 10**6])))
        items = read_series(tmp_path / "a.npz", on_error=errors.append)
    good = [row for row, one in enumerate(expected) if one is not None]
    assert items.ids == [str(row + 1) for row in good] and len(errors) == number - len(good)
    assert items.labels == [row % 2 for row in good]
    for value, row in zip(items.values, good, strict=True):
        assert value.dtype == np.float64
        np.testing.assert_array_equal(value, expected[row])
    for error, row in zip(errors, sorted(set(range(number)) - set(good)), strict=True):
        assert str(error).startswith(f"{tmp_path / 'a.npz'}, row {row + 1}")


@quick
@given(st.integers(0, 2**20), st.sampled_from([1, 2, 5]), st.sampled_from([0, 0.2]), st.sampled_from([None, 30]))
def test_statistics_are_numpys_to_the_last_bit(seed, channels, share, most):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 90, rng.integers(1, 60))
    data = (rng.standard_normal((lengths.sum(), channels)) * 10 ** rng.uniform(-3, 6, channels)).astype(np.float32)
    data[rng.random(data.shape) < share] = np.nan
    data[0] = 1.5
    ends = np.cumsum(lengths)
    order = rng.permutation(len(lengths))
    series = PackedSeries(data, ends - lengths, ends).subset(order)
    whole = np.concatenate([np.split(data, ends[:-1])[i].astype(np.float64)[:most] for i in order])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "VALUES", 256)
        found = [Steps(each, most).statistics() for each in (series, [series[i] for i in range(len(series))])]
        low, high = series.extremes()
    for one in found:
        for name, function in {"mean": np.nanmean, "std": np.nanstd, "low": np.nanmin, "high": np.nanmax}.items():
            np.testing.assert_array_equal(one[name], function(whole, 0), strict=True)
        np.testing.assert_array_equal(one["missing"], np.isnan(whole).sum(0))
    np.testing.assert_array_equal([low, high], [np.nanmin(data, 0), np.nanmax(data, 0)])


def test_a_large_npz_is_mapped_and_kept_in_its_type(tmp_path, monkeypatch):
    monkeypatch.setattr(series_files, "_MAPPED", 1)
    x = np.random.default_rng(0).normal(size=(300, 5, 2)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(300) % 3)
    np.savez_compressed(tmp_path / "b.npz", x=x, y=np.arange(300) % 3)
    np.savez(tmp_path / "c.npz", x=np.asfortranarray(x), y=np.arange(300) % 3)
    values = {name: read_series(tmp_path / f"{name}.npz").values for name in "abc"}
    assert values["a"].mapped is not None and values["b"].mapped is None is values["c"].mapped
    for series in values.values():
        assert series.data.dtype == np.float32
        np.testing.assert_array_equal(np.stack(list(series)), x.astype(np.float64))
    # A worker that does not inherit the memory maps the file again; a subset takes no copy
    part = values["a"].subset(np.array([7, 3]))
    assert np.shares_memory(part.data, values["a"].data) and part.mapped is not None
    again = pickle.loads(text := pickle.dumps(part))
    assert len(text) < 2000 and again.mapped is not None
    np.testing.assert_array_equal(np.stack(list(again)), x[[7, 3]])

    damaged = bytearray((tmp_path / "a.npz").read_bytes())
    damaged[1000] ^= 1
    (tmp_path / "a.npz").write_bytes(damaged)
    with pytest.raises(UserError, match="a.npz: not plain NumPy arrays: Bad CRC-32"):
        read_series(tmp_path / "a.npz")


def test_fingerprints_are_those_of_single_items(tmp_path):
    """As in earlier versions, so that their checkpoints find their data: ids, classes and float64 values, in order."""
    x, y = np.random.default_rng(0).normal(size=(40, 5, 2)).astype(np.float32), np.arange(40) % 2
    settings = Settings(dataset_type="sequences", data_path=str(tmp_path / "a.npz"))

    def prints():
        np.savez(tmp_path / "a.npz", x=x, y=y)
        return load_splits(settings)

    splits, info = prints()
    for name, split in splits.items():
        result = 0
        for id, label in zip(split.ids, split.labels, strict=True):
            for part in (id.encode(), str(label).encode(), x[int(id) - 1].astype(np.float64).tobytes()):
                result = zlib.crc32(part, result)
        assert info["fingerprints"][name] == f"{result:08x}"
    x[7, 4, 1] = np.nextafter(x[7, 4, 1], np.float32(9))
    changed = prints()[1]["fingerprints"]
    assert sum(changed[name] != before for name, before in info["fingerprints"].items()) == 1


def test_series_out_of_reach_are_named(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 4, 2))
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(20) % 2)
    x[3, 2, 1], x[11, 0, 0] = 1e300, -1e300
    np.savez(tmp_path / "b.npz", x=x, y=np.arange(20) % 2)
    settings = Settings(
        dataset_type="sequences", data_path=str(tmp_path / "a.npz"), test_path=str(tmp_path / "b.npz")
    )
    with pytest.raises(UserError) as caught:
        load_splits(settings)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and "b.npz, row 4: the series holds values too far" in lines[0] and "row 12" in lines[1]
    adapter = SeriesAdapter.fit(list(x[:3]))
    series = read_series(tmp_path / "a.npz").values
    lengths = adapter.checked_lengths({"test": series}, {"test": [""] * 20})
    assert lengths["test"].tolist() == [4] * 20
    narrow = SeriesAdapter.fit([one[:, :1] for one in x[:3]])
    with pytest.raises(UserError, match="must be \\(steps, 1\\)"):
        narrow.datasets({"test": series}, Source({}, {"test": ["a"] * 20}), {}, {}, settings, None)


def test_texts_lie_in_one_buffer(tmp_path):
    rows = ["plain", "é 날씨", " blank at both ends ", "x" * 500]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f'"{text}",a\n' for text in rows), encoding="utf-8")
    items = read_texts(tmp_path / "a.csv")
    assert isinstance(items.values, PackedTexts) and list(items.values) == rows
    assert items.values.lengths.tolist() == [len(text.encode()) for text in rows]
    part = items.subset([2, 1])
    assert list(part.values) == [rows[2], rows[1]] and part.values.data is items.values.data
    (tmp_path / "b.csv").write_text("text,label\nfine,a\n ,b\nmore,c,d\nlast,e\n")
    errors = []
    items = read_texts(tmp_path / "b.csv", on_error=errors.append)
    assert list(items.values) == ["fine", "last"] and items.labels == ["a", "e"] and items.ids == ["1", "4"]
    assert ["line 3, column 'text': it is empty" in str(errors[0]), "line 4: 3 fields" in str(errors[1])] == [True] * 2


# --- .parquet --------------------------------------------------------------------------------------------------------


def test_parquet_holds_what_a_csv_does(tmp_path):
    frame = pandas.DataFrame({"id": [7, 7, 9], "label": ["a", "a", "b"], "x": [0.1, np.nan, 1e-17], "n": [1, 2, 3]})
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    found, expected = (read_series(tmp_path / f"a.{kind}") for kind in ("parquet", "csv"))
    assert (found.ids, found.labels, found.columns) == (expected.ids, expected.labels, expected.columns)
    for one, other in zip(found.values, expected.values, strict=True):
        np.testing.assert_array_equal(one, other)
    frame = pandas.DataFrame({"text": ["one", None, "three"], "label": [1, 0, 1], "more": [[1, 2], [], [3]]})
    frame.to_parquet(tmp_path / "b.parquet")
    errors = []
    items = read_texts(tmp_path / "b.parquet", on_error=errors.append)
    assert list(items.values) == ["one", "three"] and items.labels == [1, 1]
    assert "b.parquet, row 2, column 'text': it is empty" in str(errors[0])
    (tmp_path / "c.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="c.parquet: is no .parquet file: .*; save it again"):
        read_texts(tmp_path / "c.parquet")


def test_parquet_without_its_package_is_one_line(tmp_path, monkeypatch):
    def refuse(path):
        raise ImportError("Unable to find a usable engine; tried using: 'pyarrow', 'fastparquet'.\nA suitable version")

    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setattr(pandas, "read_parquet", refuse)
    with pytest.raises(UserError, match="a.parquet: to read .parquet, .*: pip install pyarrow; or save it") as caught:
        read_texts(tmp_path / "a.parquet")
    assert "\n" not in str(caught.value)
