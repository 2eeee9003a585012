"""One class for each modality: how its items are read, fitted, turned into tokens, measured and drawn.

An adapter turns a raw item into the tokens (L, C) that the model reads, and knows what the model must be told about
them:

    adapter = SeriesAdapter.fit(training_series)          # or TextAdapter(), ImageAdapter(...), TensorAdapter(...)
    adapter(series)                                       # (L, C), float32
    create_perceiver_model({"series": adapter.features}, num_classes=9)

It is plain data, the same in training, evaluation and prediction: `describe` gives what a checkpoint stores,
`from_description` rebuilds the adapter. A `UserError` says what is wrong with an item; the caller adds which item.

To add a modality, write a subclass of `Adapter` and enter it in ADAPTERS; or leave it in a file of your own, see
own_data.py.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

import plots
from augmentation import ImageAugmentation, SeriesAugmentation, series_augmentation
from batches import UNLABELLED, Batch, ClassTargets, Item, Targets, as_numbers, random_stream
from config import FIELDS, Settings
from data_files import Items, OnError, chosen_of, read_series, read_texts
from image_files import depth, open_image, read_images, to_bytes, to_rgb, upright
from messages import UserError, naming, printable, refuse_together
from packed import PackedSeries, PackedTexts, Steps
from pixels import COLOUR, GREY, Check, ImageFiles, statistics
from schema import Positive, Size, read, shown
from series_files import not_as_trained, read_named_series, read_one_series
from tables import FileFinder, listed, nfc, repeated
from token_features import conv_grid, window_steps

STEM_TOKENS, TEXT_TOKENS = 64, 256  # of half of the series and texts at most, with the default stride of convolutions
LARGEST = FIELDS["image_size"].metadata["at_most"]
Side = Annotated[int, lambda pixels: 1 <= pixels <= LARGEST, f"a side of 1 to {LARGEST} pixels"]


# --- What all modalities have in common ------------------------------------------------------------------------------


def each(function: Callable[[Any], Any], values: Sequence[Any], places: Sequence[str]) -> list[Any]:
    """function(value) for each value, in threads, since files are read and decoded in C. Errors name the place."""

    def call(value: Any, place: str) -> Any:
        try:
            with naming(place):
                return function(value)
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(call, values, places))
    refuse_together(result for result in results if isinstance(result, UserError))
    return results


def each_of(
    function: Callable[[Any], Any], values: dict[str, Sequence[Any]], places: dict[str, Sequence[str]]
) -> dict[str, list[Any]]:
    """`each` over the values of every split, so that the bad ones of all splits are named at once."""
    pairs = [pair for name in values for pair in zip(values[name], places[name], strict=True)]
    results = iter(each(function, [value for value, _ in pairs], [place for _, place in pairs]))
    return {name: [next(results) for _ in part] for name, part in values.items()}


def _ids(ids: Sequence[str] | None, count: int) -> np.ndarray:
    """The names of a data set's samples; without names, their numbers."""
    return np.array([str(number) for number in range(count)] if ids is None else ids, object)


class SequenceDataset(Dataset):
    """Sequences in memory, or made when they are asked for.

    Args:
        sequences: N arrays (L, C).
        labels: a label for each, such as its class number.
        ids: their names; by default their numbers.
        lengths: tokens of each, int64 (N,), where sequences and labels have been checked.
    """

    def __init__(
        self, sequences: Sequence[np.ndarray], labels: Sequence[Any], ids: Sequence[str] | None = None,
        lengths: np.ndarray | None = None,
    ):  # fmt: skip
        self.sequences, self.labels, self.ids = sequences, np.asarray(labels), _ids(ids, len(sequences))
        if lengths is not None:
            self.lengths = lengths

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, number: int) -> Item:
        return {"input": self.sequences[number], "label": self.labels[number]}

    def subset(self, numbers: np.ndarray) -> "SequenceDataset":
        lengths = self.lengths[numbers] if hasattr(self, "lengths") else None
        return SequenceDataset(chosen_of(self.sequences, numbers), self.labels[numbers], self.ids[numbers], lengths)


class Tokens(Sequence):
    """The tokens of raw items, made when they are asked for."""

    def __init__(self, adapter: "Adapter", raw: Sequence[Any]):
        self.adapter, self.raw = adapter, raw

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, number: int) -> Tensor:
        return self.adapter(self.raw[number])

    def subset(self, numbers: np.ndarray) -> "Tokens":
        return Tokens(self.adapter, chosen_of(self.raw, numbers))


class AugmentedSeries(SequenceDataset):
    """Training series, changed anew in each epoch.

    Args:
        change: see augmentation.SeriesAugmentation; `flagged` are the channels with a flag for missing values.
        seed: of the changes, which depend on it, the epoch and the sample's number alone.
        per_step: whether each step has a label, which moves with it.
    """

    def __init__(
        self,
        sequences: Sequence[Tensor],
        labels: Sequence[Any],
        ids: Sequence[str],
        change: SeriesAugmentation,
        flagged: Sequence[int],
        seed: int,
        per_step: bool = False,
        lengths: np.ndarray | None = None,
    ):
        super().__init__(sequences, labels, ids, lengths)
        self.change, self.flagged, self.seed, self.per_step, self.epoch = change, tuple(flagged), seed, per_step, 0

    @property
    def augmentation(self) -> str:
        """What is done to the series, in words, for the first lines of a run."""
        return f"changed at random: {self.change} (--no_augment)"

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, number: int) -> Item:
        rng = random_stream("series augmentation", self.seed, self.epoch, number)
        label = self.labels[number]
        tokens, moved = self.change.with_labels(
            self.sequences[number], label if self.per_step else None, rng, self.flagged
        )
        return {"input": tokens, "label": moved if self.per_step else label}

    def subset(self, numbers: np.ndarray) -> "AugmentedSeries":
        plain = super().subset(numbers)
        return AugmentedSeries(
            plain.sequences, plain.labels, plain.ids, self.change, self.flagged, self.seed, self.per_step,
            getattr(plain, "lengths", None),
        )  # fmt: skip


class MultimodalDataset(Dataset):
    """Several modalities of the same samples.

    Args:
        parts: for each modality, a data set of the samples that have it, and (N,) the number of each sample in that
            data set, -1 if the sample lacks the modality.
        labels: N labels, such as class numbers.
        ids: names of the samples; by default their numbers.
    """

    def __init__(
        self, parts: dict[str, tuple[Dataset, np.ndarray]], labels: np.ndarray, ids: Sequence[str] | None = None
    ):
        self.parts, self.labels, self.ids = parts, labels, _ids(ids, len(labels))

    @property
    def reads_files(self) -> bool:
        return any(getattr(dataset, "reads_files", False) for dataset, _ in self.parts.values())

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, (N,), of all modalities together."""
        total = np.zeros(len(self), np.int64)
        for dataset, places in self.parts.values():
            own = getattr(dataset, "lengths", None)
            own = np.array([len(dataset[i]["input"]) for i in range(len(dataset))] if own is None else own, np.int64)
            total[places >= 0] += own[places[places >= 0]]
        return total

    def set_epoch(self, epoch: int) -> None:
        for dataset, _ in self.parts.values():
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)

    def subset(self, numbers: np.ndarray) -> "MultimodalDataset":
        parts = {}
        for name, (dataset, places) in self.parts.items():
            there = places[numbers] >= 0
            places = np.where(there, np.cumsum(there) - 1, -1)
            parts[name] = dataset.subset(self.parts[name][1][numbers][there]), places
        return MultimodalDataset(parts, self.labels[numbers], self.ids[numbers])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> Item:
        there = {name: (data, numbers[number]) for name, (data, numbers) in self.parts.items() if numbers[number] >= 0}
        inputs = {name: data[own]["input"] for name, (data, own) in there.items()}
        return {"input": inputs, "label": self.labels[number]}


@dataclass
class Source:
    """The raw values of one modality by split, as they were read from files, and notes about them."""

    values: dict[str, Sequence[Any]]
    places: dict[str, list[str]]  # for messages, see data_files.Items
    names: list[str] | None = None  # of the columns of the training data, where the file has them
    table_rows: str | None = None
    notes: list[str] = field(default_factory=list)  # for the user; added to
    data: Path | None = None  # the file or folder that they were read from
    remember: bool = False  # whether what is found out about files may be written beside them
    check: Check | None = None  # of images


@dataclass(frozen=True)
class Adapter(ABC):
    """The base of all adapters. A subclass defines `features` and `__call__`, and overrides what it does differently.

    It is a frozen dataclass, whose fields are what a checkpoint stores: numbers, text, and lists and dicts of these,
    each with its type, by which it is checked when it is read (see schema.py).
    """

    modality: ClassVar[str]

    @property
    @abstractmethod
    def features(self) -> dict[str, Any]:
        """What the model is told about a token: arguments of token_features.TokenFeatures."""

    @abstractmethod
    def __call__(self, raw: Any) -> Tensor:
        """The tokens of a raw item, float32 (L, C).

        Raises:
            UserError: the item cannot be used.
        """

    @classmethod
    def fit(cls, raw: Sequence[Any], settings: Settings) -> "Adapter":
        """The adapter for the raw items of the training split."""
        raise UserError(f"{cls.__name__} has no method fit; write one, or give an adapter in the place of the class")

    @classmethod
    def read_items(
        cls, path: Path, settings: Settings, labelled: bool, on_error: OnError, trained: Any = None
    ) -> Items:
        """The items of a file or folder of this modality.

        trained: the adapter or the items of training, if they are known.
        """
        raise UserError(f"{path}: {cls.__name__} does not say how files are read")

    @classmethod
    def load(cls, source: Source, settings: Settings, known: "Adapter | None") -> tuple["Adapter", dict[str, Any]]:
        """(the adapter, fitted on the training split if it is not known; the raw items of each split)."""
        return known or cls.fit(source.values["train"], settings), source.values

    def taken_over(self, source: Source, settings: Settings) -> "Adapter | None":
        """This adapter for a run that starts from the model that it was made for, with what these settings change.

        None where the data are others than it knows; a note of the source says why.
        """
        return replace(self, max_seq_len=settings.max_seq_len)

    def datasets(
        self, raw: dict[str, Any], source: Source, labels: dict[str, np.ndarray], ids: dict[str, Sequence[str]],
        settings: Settings, targets: Targets,
    ) -> dict[str, Dataset]:  # fmt: skip
        """The data set of each split, whose tokens are made when a batch needs them. The bad items of all splits are
        named at once."""
        lengths = self.checked_lengths(raw, source.places)
        return {
            split: SequenceDataset(Tokens(self, raw[split]), labels[split], ids[split], lengths[split]) for split in raw
        }

    def checked_lengths(
        self, raw: dict[str, Sequence[Any]], places: dict[str, Sequence[str]]
    ) -> dict[str, np.ndarray]:
        """Tokens of each raw item of each split, int64 (N,). Raises UserError, which names all bad items."""
        lengths = each_of(lambda item: len(self(item)), raw, places)
        return {split: np.array(found, np.int64) for split, found in lengths.items()}

    def length(self, raw: Any) -> int | None:
        """Steps of a raw item (bytes of a text) before it is cut to max_seq_len; None if nothing is ever cut."""
        return None

    def lengths(self, raw: Sequence[Any]) -> np.ndarray:
        """That of each, int64 (N,); 0 where nothing is cut."""
        return np.array([self.length(item) or 0 for item in raw], np.int64)

    def token_steps(self, length: int) -> np.ndarray:
        """The steps that each token which the encoder reads stands for: int64 (tokens, 2), the first one and the one
        after the last, of an item of `length` steps. Without a stem every step is a token."""
        return np.stack([np.arange(length), np.arange(1, length + 1)], 1)

    def about(self, raw: Sequence[Any], source: Source) -> list[str]:
        """Lines about the training items for the start of a run. May add notes to the source."""
        limit = getattr(self, "max_seq_len", None)
        cut = int((self.lengths(raw) > (limit or math.inf)).sum())
        if cut:
            source.notes.append(f"{cut} of {len(raw)} training items are cut to max_seq_len {limit} ({self.modality})")
        return []

    # Where an answer is given for each token, a user's item has U units that are told apart, such as the steps of a
    # series. These two say which tokens answer for which units; nothing else knows.

    def of_tokens(self, raw: Any, targets: np.ndarray) -> np.ndarray:
        """Targets (L,) of the tokens of a raw item, from those of its units (U,)."""
        return targets[: getattr(self, "max_seq_len", None)]

    def of_units(self, tokens: Tensor, answers: Any) -> Any:
        """Answers (U, ...) for the units of an item, from those for its tokens (L, C), (L, ...)."""
        return answers

    def contents(self, tokens: Tensor) -> Tensor:
        """What is asked of hidden tokens (..., C): float (..., C), NaN where it is not known; of tokens that are
        embedded, their numbers, int64 (...)."""
        return tokens[..., 0].long() if "vocab_size" in self.features else tokens.clone()

    def draw_attention(
        self, tokens: Tensor, mask: np.ndarray, attention: Sequence[np.ndarray], captions: Sequence[str], path: Path
    ) -> None:
        """Draw cross-attention to the tokens (B, L, C) of a few items, see plots.plot_sequence_attention."""
        plots.plot_sequence_attention(tokens.numpy(), mask, attention, captions, path)

    def draw_tags(
        self, tokens: Sequence[Tensor], true: Sequence[np.ndarray], predicted: Sequence[np.ndarray],
        class_names: Sequence[str], outside: bool, captions: Sequence[str], path: Path,
    ) -> None:  # fmt: skip
        """Draw true and predicted classes (U,) of the units of a few items of tokens (L, C); negative: none."""
        plots.plot_sequence_tags([each.numpy() for each in tokens], true, predicted, class_names, captions, path)

    def draw_contents(
        self, tokens: Sequence[Tensor], hidden: Sequence[np.ndarray], answers: Sequence[Tensor],
        captions: Sequence[str], path: Path,
    ) -> None:  # fmt: skip
        """Draw a few items of tokens (L, C): which are hidden, bool (L,), and what was answered for these, (L, C)."""
        if "vocab_size" in self.features:  # the answers are logits
            answers = [each.argmax(1, keepdim=True) for each in answers]
        parts = [each.numpy() for each in tokens], hidden, [each.numpy() for each in answers]
        plots.plot_sequence_contents(*parts, captions, path)


# --- Any tensor ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorAdapter(Adapter):
    """Tokens that need no preparation: float (L, input_dim), cut to max_seq_len."""

    modality = "series"

    input_dim: Size
    max_seq_len: Size | None = None

    @property
    def features(self) -> dict[str, Any]:
        return {"input_dim": self.input_dim}

    @classmethod
    def read_items(
        cls, path: Path, settings: Settings, labelled: bool, on_error: OnError, trained: Any = None
    ) -> Items:
        return read_series(path, settings, labelled, on_error)

    def __call__(self, item: Any) -> Tensor:
        tokens = as_numbers(item, "input", np.float32)
        if tokens.ndim != 2 or tokens.shape[1] != self.input_dim:
            raise UserError(f"the input has shape {tokens.shape}, it must be (tokens, {self.input_dim})")
        if not len(tokens):
            raise UserError(f"the input is empty, it has shape {tokens.shape}")
        if not np.isfinite(tokens).all():
            raise UserError("the input holds NaN or infinity; replace it")
        return torch.from_numpy(tokens[: self.max_seq_len])


# --- Text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextAdapter(Adapter):
    """Text as its UTF-8 bytes, one token each, for the model to embed: no tokenizer, any language.

    As in Perceiver IO (section 4.1). A longer text is cut to max_seq_len bytes.

    Args:
        stem: what the encoder reads: None, each byte; 'conv', convolutions over their embeddings.
        stride: bytes from a token to the next behind the stem.
    """

    modality = "text"

    max_seq_len: Size | None = None
    stem: str | None = None
    stride: Size = 1

    def __post_init__(self) -> None:
        if self.stem not in (None, "conv") or (self.stem is None and self.stride > 1):
            raise UserError(f"the stem of text must be conv, with a stride, or none, not {shown(self.stem)} with "
                            f"stride {self.stride}")  # fmt: skip

    @classmethod
    def read_items(
        cls, path: Path, settings: Settings, labelled: bool, on_error: OnError, trained: Any = None
    ) -> Items:
        return read_texts(path, settings, labelled, on_error)

    @classmethod
    def fit(cls, raw: Sequence[str], settings: Settings) -> "TextAdapter":
        """The stem of the settings has the power of two as stride with which half of the texts have at most TEXT_TOKENS
        tokens, or 1 where each character is asked for."""
        adapter = cls(settings.max_seq_len)
        if settings.stem != "conv":
            return adapter
        if settings.task == "tagging":
            return replace(adapter, stem="conv")
        lengths = np.minimum(adapter.lengths(raw), settings.max_seq_len or np.inf)
        return replace(adapter, stem="conv", stride=stride_for(lengths, TEXT_TOKENS))

    def taken_over(self, source: Source, settings: Settings) -> "TextAdapter":
        """Of several modalities the stem may be another one's, so bytes without one stay as they are."""
        if self.stem is None and settings.dataset_type == "multimodal":
            return super().taken_over(source, settings)
        too_coarse = settings.task == "tagging" and self.stride > 1
        if too_coarse or (self.stem or "none") != settings.stem:
            return self.fit(source.values["train"], settings)
        return super().taken_over(source, settings)

    @property
    def features(self) -> dict[str, Any]:
        return {"vocab_size": 256} | ({"stem": self.stem, "stride": self.stride} if self.stem else {})

    def token_steps(self, length: int) -> np.ndarray:
        return np.array(window_steps(length, self.stride, self.stride))

    def __call__(self, text: str) -> Tensor:
        """(L, 1), float32: the bytes, 0..255."""
        if not isinstance(text, str):
            raise UserError(f"a text is expected, this is of type {type(text).__name__}")
        if not text.strip():
            raise UserError("the text is empty")
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text holds {text[error.start]!r}, half a character; it has no UTF-8 form") from error
        return torch.from_numpy(np.frombuffer(data[: self.max_seq_len], np.uint8).astype(np.float32))[:, None]

    def checked_lengths(
        self, raw: dict[str, Sequence[str]], places: dict[str, Sequence[str]]
    ) -> dict[str, np.ndarray]:
        """Texts in one buffer were checked when they were read."""
        if type(self) is TextAdapter and all(isinstance(texts, PackedTexts) for texts in raw.values()):
            return {split: np.minimum(texts.lengths, self.max_seq_len or np.inf).astype(np.int64)
                    for split, texts in raw.items()}  # fmt: skip
        return super().checked_lengths(raw, places)

    def about(self, raw: Sequence[str], source: Source) -> list[str]:
        super().about(raw, source)
        lengths = self.lengths(raw)
        low, high, median = lengths.min(), lengths.max(), int(np.median(lengths))
        shown = f"{low} to {high} bytes (median {median})" if low < high else "1 byte" if low == 1 else f"{low} bytes"
        every = "byte" if self.stride == 1 else f"{self.stride} bytes"
        return [f"text    {shown}; {f'convolutions, a token every {every}' if self.stem else 'each a token'}"]

    def length(self, raw: str) -> int:
        return len(raw.encode())

    def lengths(self, raw: Sequence[str]) -> np.ndarray:
        return raw.lengths if isinstance(raw, PackedTexts) else super().lengths(raw)

    def characters(self, tokens: Tensor) -> np.ndarray:
        """How many characters each token (L, 1) answers for, (L,): one byte of a character, its first, for all."""
        return _starts(tokens[:, 0].numpy().astype(np.uint8)).astype(np.int64)

    def of_tokens(self, raw: str, targets: np.ndarray) -> np.ndarray:
        """A token has the target of its first character, if it answers for one."""
        numbers = self.characters(self(raw))
        first = np.cumsum(numbers) - numbers
        return np.where(numbers > 0, targets[first.clip(max=len(targets) - 1)], UNLABELLED)

    def of_units(self, tokens: Tensor, answers: Any) -> Any:
        return answers[np.repeat(np.arange(len(tokens)), self.characters(tokens))]

    def bytes(self, numbers: Tensor) -> np.ndarray:
        """Numbers of tokens (L,) as bytes, uint8."""
        return numbers.numpy().astype(np.uint8)

    def shown_text(self, tokens: Tensor) -> str:
        """The text that tokens (L, 1) stand for, as many characters as they answer for."""
        return self.bytes(tokens[:, 0]).tobytes().decode(errors="replace")

    def draw_contents(
        self, tokens: Sequence[Tensor], hidden: Sequence[np.ndarray], answers: Sequence[Tensor],
        captions: Sequence[str], path: Path,
    ) -> None:  # fmt: skip
        """The answers are logits (L, vocab_size)."""
        texts = [self.bytes(each[:, 0]) for each in tokens]
        plots.plot_text_contents(texts, hidden, [self.bytes(each.argmax(1)) for each in answers], captions, path)

    def draw_tags(
        self, tokens: Sequence[Tensor], true: Sequence[np.ndarray], predicted: Sequence[np.ndarray],
        class_names: Sequence[str], outside: bool, captions: Sequence[str], path: Path,
    ) -> None:  # fmt: skip
        plots.plot_text_tags([self.shown_text(each) for each in tokens], true, predicted, class_names, captions, path)

    def draw_attention(
        self, tokens: Tensor, mask: np.ndarray, attention: Sequence[np.ndarray], captions: Sequence[str], path: Path
    ) -> None:
        attention = [attention_by_step(weights, self.token_steps(mask.shape[1]), mask) for weights in attention]
        plots.plot_text_attention(tokens[..., 0].numpy(), mask, attention, captions, path)


def stride_for(lengths: np.ndarray, tokens: int) -> int:
    """The power of two with which half of the sequences of these lengths have at most so many tokens."""
    return 2 ** max(0, math.ceil(math.log2(max(1, np.median(lengths)) / tokens)))


def _starts(data: np.ndarray) -> np.ndarray:
    """Which bytes (L,) of a text in UTF-8 begin a character, bool."""
    return (data & 0xC0) != 0x80


SYMBOLS = ("[PAD]", "[BOS]", "[EOS]", "[MASK]", "[CLS]", "[SEP]")  # 0 to 5, in transformers' code; then come the bytes


@dataclass(frozen=True)
class PretrainedTextAdapter(TextAdapter):
    """A text as DeepMind's language model reads it (pretrained.py): [CLS], its UTF-8 bytes and [SEP], a token each.

    Numbers 0 to 5 are special symbols, 6 to 261 the bytes. A special symbol that the text spells out, such as [MASK],
    is one token. A longer text is cut to max_seq_len tokens, [CLS] and [SEP] included.

    Args:
        symbols: how the special symbols are spelt, in the order of SYMBOLS.
    """

    symbols: list[str] = field(default_factory=lambda: list(SYMBOLS))

    def __post_init__(self) -> None:
        if len(set(self.symbols)) != len(SYMBOLS) or len(self.symbols) != len(SYMBOLS) or "" in self.symbols:
            raise UserError(f"the special symbols must be six different words, not {self.symbols}")
        if self.max_seq_len is not None and self.max_seq_len < 2:
            raise UserError(f"the longest text must have 2 tokens or more, not {self.max_seq_len}")
        if self.stem is not None or self.stride > 1:
            raise UserError(f"the published model reads bytes: its stem must be none, not {shown(self.stem)} with "
                            f"stride {self.stride}")  # fmt: skip

    def taken_over(self, source: Source, settings: Settings) -> "PretrainedTextAdapter":
        if settings.stem == "conv":
            raise UserError("stem: the published model of text reads bytes; leave --stem conv out")
        return Adapter.taken_over(self, source, settings)

    def about(self, raw: Sequence[str], source: Source) -> list[str]:
        return Adapter.about(self, raw, source)

    @property
    def features(self) -> dict[str, Any]:
        return {"vocab_size": len(SYMBOLS) + 256}

    def __call__(self, text: str) -> Tensor:
        """(L, 1), float32: numbers below the vocab_size."""
        TextAdapter()(text)  # refuses what is no text
        numbers = self.numbers(text)
        if self.max_seq_len and len(numbers) > self.max_seq_len:
            numbers = [*numbers[: self.max_seq_len - 1], numbers[-1]]
        return torch.tensor(numbers).float()[:, None]

    def length(self, raw: str) -> int:
        return len(self.numbers(raw))

    def lengths(self, raw: Sequence[str]) -> np.ndarray:
        return Adapter.lengths(self, raw)

    def numbers(self, text: str) -> list[int]:
        """All of [CLS], text and [SEP], however long."""
        numbers = [SYMBOLS.index("[CLS]")]
        for piece in re.split(f"({'|'.join(map(re.escape, self.symbols))})", text):
            special = piece in self.symbols
            numbers += [self.symbols.index(piece)] if special else [len(SYMBOLS) + byte for byte in piece.encode()]
        return [*numbers, SYMBOLS.index("[SEP]")]

    def text(self, numbers: Sequence[int]) -> str:
        """The text of these numbers; bytes that are not UTF-8 together become U+FFFD."""
        offset = len(SYMBOLS)
        pieces = [self.symbols[number].encode() if number < offset else bytes([number - offset]) for number in numbers]
        return b"".join(pieces).decode(errors="replace")

    def characters(self, tokens: Tensor) -> np.ndarray:
        """As for any text; a special symbol that is spelt out answers for all its characters, the added ones for none.
        """
        numbers = tokens[:, 0].long().numpy()
        lengths = np.array([len(symbol) for symbol in self.symbols])
        found = np.where(numbers < len(SYMBOLS), lengths[numbers.clip(max=len(SYMBOLS) - 1)],
                         _starts(numbers - len(SYMBOLS)))  # fmt: skip
        found[[0, -1]] = 0
        return found

    def bytes(self, numbers: Tensor) -> np.ndarray:
        """A special symbol is a byte that says nothing."""
        numbers = numbers.long().numpy()
        return np.where(numbers < len(SYMBOLS), 0, numbers - len(SYMBOLS)).astype(np.uint8)

    def shown_text(self, tokens: Tensor) -> str:
        return self.text(tokens[1:-1, 0].long().tolist())

    def draw_attention(
        self, tokens: Tensor, mask: np.ndarray, attention: Sequence[np.ndarray], captions: Sequence[str], path: Path
    ) -> None:
        texts = self.bytes(tokens[..., 0])
        plots.plot_text_attention(texts, mask, attention, captions, path)


# --- Series ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeriesAdapter(Adapter):
    """A time series (L, C), standardised per channel with the statistics of the training series.

    A missing value (NaN) becomes 0, the channel's mean. A channel that lacks values in the training series gets a flag
    beside it, 1 where the value is missing. A longer series is cut to max_seq_len steps.

    Args:
        mean, std: per channel (C).
        flagged: numbers of the channels with a flag.
        names: of the columns of the training data, in order; None if they had none. They name the channels or, if
            table_rows is 'series', the steps.
        table_rows: what a row was in the table of training data, 'steps' or 'series'; None if it was no table.
        stem: what the encoder reads: None, each step; 'windows' of consecutive steps; 'conv', convolutions over them.
        window: steps of a token of the stem 'windows'.
        stride: steps from a token to the next.
        kernel_scale: of the convolutions, see `TokenFeatures`; 1 in older checkpoints, whatever the stride.
    """

    modality = "series"

    mean: list[float]
    std: list[Positive]
    flagged: list[int] = field(default_factory=list)
    max_seq_len: Size | None = None
    names: list[str] | None = None
    table_rows: str | None = None
    stem: str | None = None
    window: Size | None = None
    stride: Size = 1
    kernel_scale: Size = 1

    def __post_init__(self) -> None:
        channels = len(self.mean)
        if len(self.std) != channels or not channels:
            raise UserError(f"{channels} means and {len(self.std)} deviations; there must be one of each per channel")
        if sorted(set(self.flagged) & set(range(channels))) != sorted(self.flagged):
            raise UserError(f"the flagged channels must be different ones of the {channels} that there are")
        if self.channels is not None and len(self.channels) != channels:
            raise UserError(f"{len(self.channels)} names of {channels} channels")
        if self.table_rows not in (None, "steps", "series"):
            raise UserError(f"table_rows must be steps, series or none, not {shown(self.table_rows)}")
        if self.stem not in (None, "conv", "windows"):
            raise UserError(f"the stem of series must be conv, windows or none, not {shown(self.stem)}")
        if (self.window is not None) != (self.stem == "windows") or (self.stem is None and self.stride > 1):
            raise UserError(f"window {self.window} and stride {self.stride} do not go with the stem {shown(self.stem)}")
        if self.stem != "conv" and self.kernel_scale > 1:
            raise UserError(f"kernel_scale {self.kernel_scale} does not go with the stem {shown(self.stem)}")
        if self.window is not None and self.stride > self.window:
            raise UserError(f"series_stride {self.stride} is larger than series_window {self.window} and would leave "
                            "steps out; make it smaller")  # fmt: skip

    @classmethod
    def fit(
        cls,
        series: Sequence[np.ndarray],
        max_seq_len: int | None = None,
        names: list[str] | None = None,
        table_rows: str | None = None,
        stem: str | None = None,
        window: int | None = None,
        stride: int | None = None,
    ) -> "SeriesAdapter":
        """The adapter for training series, float arrays (L, C) each. A constant channel keeps its scale.

        stride: by default a quarter of the window; of the stem 'conv', the power of two with which half of the series
        have at most STEM_TOKENS tokens.
        """
        series = series if isinstance(series, PackedSeries) else [as_numbers(one, "series") for one in series]
        steps = Steps(series, max_seq_len)
        if stride is None and stem == "conv":
            stride = stride_for(steps.lengths, STEM_TOKENS)
        elif stride is None:
            stride = max(1, (window or 1) // 4)
        # The smallest kernels, of 7 steps, would leave most of the steps between tokens out if these are far apart
        kernel_scale = max(1, stride // 8) if stem == "conv" else 1
        found = steps.statistics()
        for channel in np.flatnonzero(found["missing"] == len(steps)):
            raise UserError(f"channel {channel + 1} has no value in any training series; remove it")
        mean, std = found["mean"], found["std"]
        for channel in np.flatnonzero(~np.isfinite(std)):
            raise UserError(f"channel {channel + 1} has values too large to be squared; scale them, or mark as missing")
        varies = (found["low"] < found["high"]) & (std > 0)  # a constant's std may be a rounding error
        flagged = np.flatnonzero(found["missing"]).tolist()
        std = np.where(varies, std, 1.0).tolist()
        return cls(mean.tolist(), std, flagged, max_seq_len, names, table_rows, stem, window, stride, kernel_scale)

    @property
    def features(self) -> dict[str, Any]:
        stem = {"stem": self.stem, "window": self.window, "stride": self.stride} if self.stem else {}
        stem |= {"kernel_scale": self.kernel_scale} if self.kernel_scale > 1 else {}
        given = {name: value for name, value in stem.items() if value is not None}
        return {"input_dim": len(self.mean) + len(self.flagged)} | given

    def token_steps(self, length: int) -> np.ndarray:
        return np.array(window_steps(length, self.window or self.stride, self.stride))

    @property
    def channels(self) -> list[str] | None:
        """The names of the channels, if they are known."""
        return None if self.table_rows == "series" else self.names

    def __call__(self, series: Any) -> Tensor:
        """(L, C + flags), float32, for an array (L, C), an array (L,) of one channel, or the path of a series' file.

        Rows of a DataFrame are steps; its columns, and those of a file, are put into the training order by name.
        """
        if isinstance(series, (str, Path)):
            series = read_one_series(series, known=self.channels)
        elif hasattr(series, "columns") and self.channels is not None:
            series = self._in_order(series)
        values = as_numbers(series, "series")
        values = values[:, None] if values.ndim == 1 else values
        if values.ndim != 2 or values.shape[1] != len(self.mean):
            transposed = values.ndim == 2 and len(values) == len(self.mean)
            raise UserError(f"the series has shape {values.shape}, it must be (steps, {len(self.mean)})"
                            + "; transpose it" * transposed)
        if not len(values):
            raise UserError(f"the series is empty, it has shape {values.shape}")
        if np.isinf(values).any():
            raise UserError("the series holds infinity; replace it")
        values = values[: self.max_seq_len]
        missing = np.isnan(values)
        with np.errstate(over="ignore"):
            scaled = np.where(missing, 0, (values - self.mean) / self.std)
            tokens = np.concatenate([scaled, missing[:, self.flagged]], 1, dtype=np.float32)
        if not np.isfinite(tokens).all():
            raise UserError("the series holds values too far from the training values for float32; correct them")
        return torch.from_numpy(tokens)

    @classmethod
    def read_items(
        cls, path: Path, settings: Settings, labelled: bool, on_error: OnError, trained: Any = None
    ) -> Items:
        """Series with the columns of training, see `data_files.read_series`."""
        options = {"labelled": labelled, "on_error": on_error}
        names = trained.names if isinstance(trained, SeriesAdapter) else getattr(trained, "columns", None)
        table_rows = getattr(trained, "table_rows", None)
        if trained is None or (isinstance(trained, SeriesAdapter) and not names and not table_rows):
            return read_series(path, settings, **options)  # also for an older adapter, which knows neither
        if table_rows and settings.table_rows == "auto":
            settings = replace(settings, table_rows=table_rows)
        items = read_series(path, settings, **options, known=names)
        if names is None and len(items.columns or ()) > 1 and items.table_rows == "steps":
            items.notes.append(f"{path}: the training data name no columns, so these are taken in their order: "
                               f"{', '.join(items.columns)}")
        return items

    @classmethod
    def load(
        cls, source: Source, settings: Settings, known: "SeriesAdapter | None"
    ) -> tuple["SeriesAdapter", dict[str, list[np.ndarray]]]:
        raw, names = source.values, source.names
        in_files = (value for values in raw.values() if not isinstance(values, PackedSeries) for value in values)
        if any(isinstance(value, Path) for value in in_files):  # a file each
            names = known.channels if known else _series_names(raw["train"])
            raw = each_of(partial(read_one_series, known=names), raw, source.places)
        if known:
            return known, raw
        series, places = raw["train"], source.places["train"]
        width = series[0].shape[1]
        for one, place in () if isinstance(series, PackedSeries) else zip(series, places, strict=True):
            if one.shape[1] != width:
                raise UserError(f"{place}: the series has {one.shape[1]} channels, that of {places[0]} {width}; "
                                "all must have the same")
        with naming(str(settings.data_path)):
            return cls.fit(series, settings.max_seq_len, names, source.table_rows, *_series_stem(settings)), raw

    def datasets(
        self, raw: dict[str, Any], source: Source, labels: dict[str, np.ndarray], ids: dict[str, Sequence[str]],
        settings: Settings, targets: Targets,
    ) -> dict[str, Dataset]:  # fmt: skip
        made = super().datasets(raw, source, labels, ids, settings, targets)
        for split, data in made.items():
            if change := series_augmentation(settings, split):
                made[split] = AugmentedSeries(
                    data.sequences, data.labels, data.ids, change, self.flagged, settings.seed, targets.per_token,
                    data.lengths,
                )  # fmt: skip
        return made

    def taken_over(self, source: Source, settings: Settings) -> "SeriesAdapter | None":
        stem, window, stride = _series_stem(settings)
        if (stem, window, stride or self.stride) != (self.stem, self.window, self.stride):
            source.notes.append("the tokens of the series are not those of init_from (stem, series_window, "
                                "series_stride): they are standardised by these data")  # fmt: skip
            return None
        values = source.values["train"]
        in_files = isinstance(values[0], Path)
        names = _series_names(values) if in_files else source.names
        series = read_one_series(values[0]) if in_files else values[0]
        new = SeriesAdapter([0.0] * series.shape[1], [1.0] * series.shape[1], [], None, names, source.table_rows)
        unnamed = new.channels is None or self.channels is None
        if len(new.mean) == len(self.mean) and (unnamed or new.channels == self.channels):
            return replace(self, max_seq_len=settings.max_seq_len, names=names, table_rows=source.table_rows)
        found, known = (listed(one.channels) if one.channels else f"{len(one.mean)} without names"
                        for one in (new, self))  # fmt: skip
        source.notes.append(f"the channels of the series are {found}, those of init_from {known}: they are "
                            "standardised by these data")  # fmt: skip
        if not unnamed and sorted(new.channels) == sorted(self.channels):
            source.notes[-1] += f"; to take them in the same order: --feature_columns {','.join(self.channels)}"
        return None

    def checked_lengths(
        self, raw: dict[str, Sequence[np.ndarray]], places: dict[str, Sequence[str]]
    ) -> dict[str, np.ndarray]:
        """Of series in one array each only those of a split are looked at of which some cannot be used."""
        doubtful = {split: series for split, series in raw.items() if not self._takes(series)}
        lengths = super().checked_lengths(doubtful, {split: places[split] for split in doubtful})
        fine = {split: np.minimum(series.lengths, self.max_seq_len or np.inf).astype(np.int64)
                for split, series in raw.items() if split not in doubtful}  # fmt: skip
        return lengths | fine

    def _takes(self, series: Sequence[np.ndarray]) -> bool:
        """Whether it is seen at once that every series can be used: of each channel the lowest and the highest value
        are standardised to finite numbers, so what lies between them is too."""
        if not isinstance(series, PackedSeries) or series.channels != len(self.mean):
            return False
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = ((series.extremes() - self.mean) / self.std).astype(np.float32)
        return not np.isinf(scaled).any()

    def length(self, raw: np.ndarray) -> int:
        return len(raw)

    def lengths(self, raw: Sequence[np.ndarray]) -> np.ndarray:
        return raw.lengths if isinstance(raw, PackedSeries) else super().lengths(raw)

    def about(self, raw: Sequence[np.ndarray], source: Source) -> list[str]:
        lengths, width = self.lengths(raw), len(self.mean)
        low, high, median = lengths.min(), lengths.max(), int(np.median(lengths))
        steps, channels = f"{median} step{'s' * (median > 1)}", f"{width} channel{'s' * (width > 1)}"
        if high == 1 and self.table_rows == "steps":
            source.notes.append(f"every series has one step, of {channels}; if each row of the table is a whole "
                                "series, say --table_rows series")
        elif high == 1 or median < width:
            source.notes.append(f"the series have {steps} and {channels}; if it is the other way round, transpose "
                                "them: x of an .npz is (series, steps, channels)")
        super().about(raw, source)
        names = f": {listed(self.channels)}" if self.channels else ""
        shown = steps if low == high else f"{low} to {high} steps (median {median})"
        kind = {"conv": "convolutions", "windows": f"windows of {self.window} steps"}.get(self.stem)
        every = "step" if self.stride == 1 else f"{self.stride} steps"
        read = f"; {kind}, a token every {every}" if kind else ""
        return [f"series  {shown}, {channels}{names}{read}"]

    def draw_attention(
        self, tokens: Tensor, mask: np.ndarray, attention: Sequence[np.ndarray], captions: Sequence[str], path: Path
    ) -> None:
        attention = [attention_by_step(weights, self.token_steps(mask.shape[1]), mask) for weights in attention]
        plots.plot_sequence_attention(tokens.numpy(), mask, attention, captions, path)

    def contents(self, tokens: Tensor) -> Tensor:
        """Without the flags, and without values that are missing."""
        values, channels = tokens.clone(), len(self.mean)
        for number, channel in enumerate(self.flagged):
            values[..., channel].masked_fill_(tokens[..., channels + number] > 0, torch.nan)
        values[..., channels:] = torch.nan
        return values

    def draw_contents(
        self, tokens: Sequence[Tensor], hidden: Sequence[np.ndarray], answers: Sequence[Tensor],
        captions: Sequence[str], path: Path,
    ) -> None:  # fmt: skip
        channels = len(self.mean)
        values = [self.contents(each)[:, :channels] for each in tokens]
        super().draw_contents(values, hidden, [each[:, :channels] for each in answers], captions, path)

    def _in_order(self, frame: Any) -> Any:
        """The columns of a DataFrame in the order of training.

        Raises:
            UserError: a column is missing, or there are others.
        """
        names = {nfc(str(column)): column for column in frame.columns}
        fault = not_as_trained(list(names), self.channels)
        if twice := repeated(nfc(str(column)) for column in frame.columns):
            fault = f"column {twice!r} is there more than once"
        if fault:
            raise UserError(f"a DataFrame of a series: {fault}; rename its columns, or drop what is no feature")
        return frame[[names[name] for name in self.channels]]


def _series_stem(settings: Settings) -> tuple[str | None, int | None, int | None]:
    """(stem, window, stride) that the settings ask for. Raises UserError where these do not go together."""
    stem, window, stride = settings.stem, settings.series_window, settings.series_stride
    if stem == "conv" and window is not None:
        raise UserError("series_window: the stem conv reads no windows; leave series_window out, or say --stem none")
    if stem == "none" and window is None and stride is not None:
        raise UserError("series_stride: without a stem every step is a token; add --series_window or --stem conv")
    return {"conv": "conv"}.get(stem, "windows" if window is not None else None), window, stride


def attention_by_step(weights: np.ndarray, steps: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Attention to tokens, shared out evenly among the real steps that each stands for; the sums stay the same.

    Args:
        weights: (B, ..., tokens).
        steps: of each token, (tokens, 2), see `Adapter.token_steps`.
        mask: bool (B, steps), True at real steps.

    Returns:
        (B, ..., steps) float.
    """
    number = np.arange(mask.shape[1])
    holds = (steps[:, :1] <= number) & (number < steps[:, 1:])  # (tokens, steps)
    shares = (holds & mask[:, None]).astype(weights.dtype)  # (B, tokens, steps)
    shares /= np.maximum(shares.sum(2, keepdims=True), 1)
    return np.einsum("b...t,bts->b...s", weights, shares)


def _series_names(files: Sequence[Path]) -> list[str] | None:
    """The names of the channels if each series is a file of its own: those of the first table."""
    table = next((file for file in files if file.suffix.lower() in (".csv", ".tsv")), None)
    return read_named_series(table)[1] if table else None


# --- Images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageAdapter(Adapter):
    """An image as a sequence of square patches, normalised per channel.

    Args:
        image_shape: (H, W, channels).
        patch_size: side of a patch, divides H and W [pixels].
        mean, std: per channel, in units of the stored pixels.
        any_size: images of any size and mode become RGB, upright (EXIF), scaled and cropped about the centre to
            (H, W). Without it, only arrays of image_shape are taken, stored as in training.
        bits: in use of grey training images of more than 8 bits: white is 2**bits - 1, also in arrays of integers wider
            than 8 bits. None if there were no such images; 16-bit grey then counts as using all 16.
        crop: with any_size, the side of the square in the middle that is seen, as a share of the image's shorter side,
            which the published models leave a margin around (pretrained.py). None for all of it.
        stem: 'conv' for convolutions over the pixels, with patch_size 1; None for the patches themselves.
    """

    modality = "image"

    image_shape: Annotated[list[Side], lambda shape: len(shape) == 3, "[height, width, channels]"]
    patch_size: Size
    mean: list[float]
    std: list[Positive]
    any_size: bool = False
    bits: int | None = None
    crop: Annotated[float, lambda share: 0 < share <= 1, "a number above 0 and at most 1"] | None = None
    stem: str | None = None

    def __post_init__(self) -> None:
        height, width, channels = self.image_shape
        if self.stem not in (None, "conv") or (self.stem == "conv" and self.patch_size != 1):
            raise UserError(f"the stem of images must be conv with patch_size 1, or none, not {shown(self.stem)} with "
                            f"patch_size {self.patch_size}")  # fmt: skip
        check_patch_size(self.patch_size, height, width)
        if not len(self.mean) == len(self.std) == channels:
            raise UserError(f"{len(self.mean)} means and {len(self.std)} deviations of {channels} channels")
        if self.any_size and (height, channels) != (width, 3):
            raise UserError(f"images of any size become squares of 3 channels, not {height} x {width} x {channels}")

    @classmethod
    def fit(
        cls,
        images: np.ndarray,
        patch_size: int,
        any_size: bool = False,
        bits: int | None = None,
        stem: str | None = None,
    ) -> "ImageAdapter":
        """The adapter for training images (N, H, W) or (N, H, W, channels) of whole numbers 0..255.

        With the stem 'conv' it is pixels that the stem reads: patch_size is then 1, whatever is given.
        """
        patch_size = 1 if stem else patch_size
        if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4):
            images = np.stack([_stored_pixels(image) for image in images])
        return cls(list(images.shape[1:]), patch_size, *channel_statistics(images), any_size, bits, stem=stem)

    @property
    def grid_shape(self) -> list[int]:
        return [side // self.patch_size for side in self.image_shape[:2]]

    @property
    def features(self) -> dict[str, Any]:
        stem = {"stem": self.stem} if self.stem else {}
        return {"input_dim": self.patch_size**2 * self.image_shape[2], "grid_shape": self.grid_shape} | stem

    def __call__(self, image: Any) -> Tensor:
        """(L, C), float32, for a PIL image, an array (H, W) or (H, W, channels), or the path of a file."""
        return self.tokens(self.pixels(image)[None])[0]

    @classmethod
    def read_items(
        cls, path: Path, settings: Settings, labelled: bool, on_error: OnError, trained: Any = None
    ) -> Items:
        return read_images(path, labelled)

    @classmethod
    def load(
        cls, source: Source, settings: Settings, known: "ImageAdapter | None"
    ) -> tuple["ImageAdapter", dict[str, ImageFiles]]:
        """Every file is checked; pixels are read when they are needed, see pixels.py."""
        if known:
            source.check = source.check or _check(source, known.image_shape[0], known.crop, settings)
            return known, source.check.files(known.bits)
        side, stem = settings.image_size, image_stem(settings)
        check_patches(settings, side, side)
        if source.data is None:  # of the user's own code, which keeps its images: arrays, PIL images and files
            pixels, (values, places) = [], (source.values["train"], source.places["train"])
            used = [found[1] for value in values if (found := depth(value)) and found[0] == "grey"]
            bits = settings.image_bits or max(used, default=None)
            for value, place in zip(values, places, strict=True):
                with naming(place):
                    pixels.append(square_pixels(value, side, bits))
            return cls.fit(np.stack(pixels), settings.patch_size, True, bits, stem), {}
        source.check = _check(source, side, None, settings)
        bits = _bits(source, settings)
        raw = source.check.files(bits)
        patch_size = 1 if stem else settings.patch_size
        return cls([side, side, 3], patch_size, *raw["train"].statistics(), True, bits, stem=stem), raw

    def taken_over(self, source: Source, settings: Settings) -> "ImageAdapter | None":
        side = settings.image_size
        if len(self.mean) != 3:
            source.notes.append(f"your images have 3 channels, those of init_from {len(self.mean)}: they are "
                                "normalised by these data")  # fmt: skip
            return None
        check_patches(settings, side, side)
        source.check = _check(source, side, self.crop, settings)
        bits = self.bits or _bits(source, settings)
        stem = image_stem(settings)
        patch_size = 1 if stem else settings.patch_size
        return replace(self, image_shape=[side, side, 3], patch_size=patch_size, any_size=True, bits=bits, stem=stem)

    def datasets(
        self, raw: dict[str, ImageFiles], source: Source, labels: dict[str, np.ndarray], ids: dict[str, Sequence[str]],
        settings: Settings, targets: Targets,
    ) -> dict[str, Dataset]:  # fmt: skip
        made = {}
        for split, images in raw.items():
            augmentation = augmentation_of(settings, split, margin=self.image_shape[0] // 8)
            made[split] = ImageDataset(images, labels[split], self, **augmentation, ids=ids[split], targets=targets)
        return made

    def about(self, raw: Sequence[Any], source: Source) -> list[str]:
        return [source.check.about()] if source.check else []  # one about the augmentation follows, see ImageDataset

    def draw_attention(
        self, tokens: Tensor, mask: np.ndarray, attention: Sequence[np.ndarray], captions: Sequence[str], path: Path
    ) -> None:
        grid, length = self.grid_shape, attention[0].shape[-1]
        if math.prod(grid) != length:  # a convolution has made fewer tokens of a square image
            grid = [math.isqrt(length)] * 2
        if self.stem:
            grid = conv_grid(self.grid_shape)
        plots.plot_image_attention(self.images(tokens), attention, grid, captions, path)

    def draw_contents(
        self, tokens: Sequence[Tensor], hidden: Sequence[np.ndarray], answers: Sequence[Tensor],
        captions: Sequence[str], path: Path,
    ) -> None:  # fmt: skip
        originals, answered = torch.stack(list(tokens)), torch.stack(list(answers))
        gone = np.stack(hidden)  # (B, L)
        whole = torch.where(torch.from_numpy(gone)[..., None], answered, originals)
        gone = gone.reshape(-1, *self.grid_shape).repeat(self.patch_size, 1).repeat(self.patch_size, 2)  # (B, H, W)
        plots.plot_image_contents(self.images(originals), gone, self.images(whole), captions, path)

    def tokens(self, images: np.ndarray) -> Tensor:
        """uint8 (B, H, W, channels) -> float32 (B, L, C)."""
        return prepare_images(images, self.mean, self.std, self.patch_size)

    def pixels(self, image: Any) -> np.ndarray:
        """The image as it is kept in memory: uint8 (H, W, channels)."""
        image = FileFinder()(Path(image)) if isinstance(image, (str, Path)) else image
        if self.any_size:
            return square_pixels(image, self.image_shape[0], self.bits, self.crop)
        return _stored_pixels(open_image(image) if isinstance(image, Path) else image, tuple(self.image_shape))

    def images(self, tokens: Tensor) -> np.ndarray:
        """The stored images, float (B, H, W, channels), from which `tokens` (B, L, C) were made."""
        size = self.patch_size
        patches = tokens.unflatten(1, self.grid_shape).unflatten(3, (size, size, -1)).transpose(2, 3)
        pixels = patches.reshape(len(tokens), *self.image_shape).double().numpy()
        return (pixels * np.array(self.std) + self.mean).round()


def shift_and_flip(images: np.ndarray, offsets: np.ndarray, flips: np.ndarray, margin: int) -> np.ndarray:
    """Images uint8 (B, H, W, C), mirrored where `flips` (B,) is true and shifted on a black background.

    offsets: (B, 2), 0..2*margin, row and column of the crop in the image padded by `margin`; (margin, margin) is no
    shift.
    """
    num, height, width, channels = images.shape
    pixel = np.dtype((np.void, channels))  # the channels of a pixel, moved as a whole
    padded = np.zeros((num, height + 2 * margin, width + 2 * margin), pixel)
    images[flips] = torch.from_numpy(images[flips]).flip(2).numpy()
    padded[:, margin : margin + height, margin : margin + width] = images.view(pixel)[..., 0]
    shape = (num, 2 * margin + 1, 2 * margin + 1, height, width)  # every crop, as a view
    windows = np.ndarray(shape, pixel, padded, strides=padded.strides + padded.strides[1:])
    return windows[np.arange(num), *offsets.T].view(np.uint8).reshape(images.shape)


class ImageDataset(Dataset):
    """Images as bytes, in memory or in files. A batch is augmented and cut into patches as a whole.

    Args:
        images: uint8 (N, H, W, C), or files that are read as such.
        labels: N labels, such as class numbers.
        adapter: makes the tokens.
        margin: images are shifted by up to this many pixels; 0 for none.
        flip: whether half of the images are mirrored.
        seed: of shifts and flips, which are drawn for each epoch.
        ids: names of the samples; by default their numbers.
        targets: a task (tasks.py), if the labels are not classes.
        strong: changes the images in the place of shifts and flips.
    """

    def __init__(
        self,
        images: np.ndarray | ImageFiles,
        labels: np.ndarray,
        adapter: ImageAdapter,
        margin: int = 0,
        flip: bool = False,
        seed: int = 0,
        ids: Sequence[str] | None = None,
        targets: Targets | None = None,
        strong: ImageAugmentation | None = None,
    ):
        self.strong = strong
        self.images = images if isinstance(images, ImageFiles) else np.ascontiguousarray(images)
        self.targets = targets or ClassTargets()
        self.labels = np.array([self.targets.target(label, f"sample {i}") for i, label in enumerate(labels)])
        self.adapter, self.margin, self.flip, self.seed = adapter, margin, flip, seed
        self.ids = _ids(ids, len(images))
        self.lengths = np.full(len(images), math.prod(adapter.grid_shape))
        self.set_epoch(0)

    @property
    def reads_files(self) -> bool:
        return isinstance(self.images, ImageFiles) and self.images.reads_files

    @property
    def augmentation(self) -> str:
        """How the images are augmented, in words, for the start of a run."""
        if self.strong:
            return str(self.strong)
        if not (self.margin or self.flip):
            return "neither moved nor mirrored"
        moved = f"moved by up to {self.margin} pixel{'s' * (self.margin > 1)}" if self.margin else "not moved"
        return f"{moved}, {'half of them mirrored (--no_flip)' if self.flip else 'not mirrored (--flip)'}"

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        rng = random_stream("augmentation", self.seed, epoch)
        self.offsets = rng.integers(0, 2 * self.margin, (len(self), 2), endpoint=True)
        self.flips = (rng.random(len(self)) < 0.5) & self.flip

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, numbers: np.ndarray) -> "ImageDataset":
        images = self.images.subset(numbers) if isinstance(self.images, ImageFiles) else self.images[numbers]
        return ImageDataset(images, self.labels[numbers], self.adapter, self.margin, self.flip, self.seed,
                            self.ids[numbers], self.targets, self.strong)  # fmt: skip

    def pixels(self, numbers: Sequence[int]) -> np.ndarray:
        """Images of these numbers as they are in this epoch, uint8 (B, H, W, C)."""
        numbers = np.array(numbers)
        images = self.images[numbers]
        if self.strong:
            streams = [random_stream("image augmentation", self.seed, self.epoch, number) for number in numbers]
            images = self.strong(images, streams)
        elif self.margin or self.flip:
            images = shift_and_flip(images, self.offsets[numbers], self.flips[numbers], self.margin)
        return images

    def __getitems__(self, numbers: list[int], images: np.ndarray | None = None) -> Batch:
        """A batch of these numbers; `images` take the place of their own."""
        images = self.pixels(numbers) if images is None else images
        tokens = self.adapter.tokens(images)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
        return {"input": tokens, "mask": mask, "label": self.targets.stack(self.labels[np.array(numbers)])}

    def __getitem__(self, number: int) -> Item:
        item = {name: values[0] for name, values in self.__getitems__([number]).items()}
        return item | {"label": self.labels[number]}  # as it is before `stack`, which collate calls


def image_stem(settings: Settings) -> str | None:
    return "conv" if settings.stem == "conv" else None


def augmentation_of(settings: Settings, split: str, margin: int, white: int = 255) -> dict[str, Any]:
    """The arguments of `ImageDataset` for augmenting the images of a split, whose pixels go up to `white`."""
    if split != "train" or not settings.augment or settings.cache_features:
        return {}
    if settings.image_recipe == "strong":
        return {"strong": ImageAugmentation(settings.flip, white), "seed": settings.seed}
    return {"margin": margin, "flip": settings.flip, "seed": settings.seed}


def _check(source: Source, side: int, crop: float | None, settings: Settings) -> Check:
    prepare = partial(square_pixels, size=side, crop=crop)
    return Check(source.values, source.places, prepare, side, crop, settings, source.data, source.remember)


def _bits(source: Source, settings: Settings) -> int | None:
    """The bits in use in grey training images; None if they have no more than 8. Adds a note on what is assumed.

    A camera of 10 or 12 bits stores them in 16-bit files, which would look almost black.
    """
    grey, colour = (source.check.sixteen_bits("train", kind) for kind in (GREY, COLOUR))
    if len(colour) and colour.max() <= 14:
        raise UserError(f"{settings.data_path}: {len(colour)} training images have colours of 16 bits, but use "
                        f"{colour.max()} of them at most, and only the upper 8 are read; save them as 8 bit")
    if not len(grey):
        return settings.image_bits
    most = int(grey.max())
    bits = settings.image_bits or next((bits for bits in (8, 10, 12, 14) if bits >= most), 16)
    source.notes.append(f"{len(grey)} of {len(source.values['train'])} training images are grey of 16 bits and use "
                        f"{most} of them: 0 is taken for black, {2**bits - 1} for white (--image_bits {bits})")
    return bits


def _stored_pixels(image: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """uint8 (H, W, channels) from an array of this shape or, without one, of any size and 1 to 4 channels."""
    values = as_numbers(image, "image")
    values = values[..., None] if values.ndim == 2 else values
    if shape is not None and values.shape != shape:
        raise UserError(f"an image of shape {values.shape}; the model takes {shape}")
    if values.ndim != 3 or not values.size or (shape is None and values.shape[2] > 4):
        raise UserError(f"an image of shape {values.shape}; it must be (H, W) or (H, W, 1 to 4 channels)")
    if _number_kind(image) in "bf" and 0 < values.max() <= 1:  # among them black and white, which are whole numbers
        raise UserError("pixels from 0 to 1; give whole numbers from 0 to 255 as they are stored, such as "
                        "(image * 255).astype('uint8')")  # fmt: skip
    with np.errstate(invalid="ignore"):
        pixels = values.astype(np.uint8)
    if not np.array_equal(pixels, values):
        raise UserError("pixels must be whole numbers from 0 to 255, as they are stored")
    return pixels


def _number_kind(array: Any) -> str:
    """NumPy's letter for the kind of numbers: b (bool), i, u, f; but 8 for uint8, the type in which pixels are stored.
    """
    if isinstance(array, Tensor):
        return "f" if array.is_floating_point() else {torch.bool: "b", torch.uint8: "8"}.get(array.dtype, "i")
    try:
        dtype = np.asarray(array).dtype
    except ValueError:  # rows of different lengths, which `as_numbers` refuses
        return "O"
    return "8" if dtype == np.uint8 else dtype.kind


def _array_image(array: Any, bits: int | None) -> Image.Image:
    """A PIL image from an array (H, W) or (H, W, 1 to 4 channels), whose type says what its numbers mean.

    bool: True is white. Integers wider than 8 bits: white is 2**bits - 1, if the training images had `bits`. Everything
    else: 0..255; values that all lie between 0 and 1 are refused.
    """
    kind = _number_kind(array)
    if kind == "b":
        array = (as_numbers(array, "image") * 255).astype(np.uint8)
    elif bits and kind in "iu":
        array = to_bytes(as_numbers(array, "image"), 2**bits - 1, "the image")
    pixels = _stored_pixels(array)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def square_pixels(image: Any, size: int, bits: int | None = None, crop: float | None = None) -> np.ndarray:
    """uint8 (size, size, 3) from an image of any size and mode: a path, a PIL image or an array (H, W[, channels]).

    bits, crop: see `ImageAdapter`.
    """
    name = printable(str(image)) if isinstance(image, Path) else "the image"
    if isinstance(image, Path):
        image = open_image(image)
    else:
        image = upright(image) if isinstance(image, Image.Image) else _array_image(image, bits)
    image = to_rgb(image, name, bits or 16)
    if crop:  # to whole pixels, as transformers' PerceiverImageProcessor does
        side = max(1, int(crop * min(image.size)))
        left, top = ((length - side) // 2 for length in image.size)
        square = image.crop((left, top, left + side, top + side))
        return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def check_patch_size(patch_size: int, height: int, width: int) -> None:
    """Check that patches of this size (pixels) tile the image.

    Raises:
        UserError: they do not.
    """
    if patch_size < 1 or height % patch_size or width % patch_size:
        valid = [size for size in range(1, height + 1) if not height % size and not width % size]
        raise UserError(f"patch_size {patch_size} does not divide the image of {height} x {width}; valid are {valid}")


def check_patches(settings: Settings, height: int, width: int) -> None:
    """The same of the settings; a stem reads pixels, whatever patch_size is."""
    if image_stem(settings) is None:
        check_patch_size(settings.patch_size, height, width)


def prepare_images(images: np.ndarray, mean: Sequence[float], std: Sequence[float], patch_size: int) -> Tensor:
    """Images as sequences of patches, normalised.

    Args:
        images: uint8 (B, H, W, C).
        mean, std: per channel (C), in units of the stored pixels.
        patch_size: P, divides H and W.

    Returns:
        float32 (B, H/P * W/P, P*P*C). Patches run along the rows of the image; inside a patch the order is row, column,
        channel.

    Raises:
        UserError: another type or shape.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(f"images must be uint8 (B, H, W, C), these are {images.dtype} {images.shape}")
    (num, height, width, channels), size = images.shape, patch_size
    check_patch_size(size, height, width)
    strip = np.dtype((np.void, size * channels))  # one row of a patch, moved as a whole
    strips = np.ascontiguousarray(images).reshape(num, height // size, size, -1).view(strip)
    patches = strips.swapaxes(2, 3).copy().view(np.uint8)  # (B, H/P, W/P, P*P*C)
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), height * width)
    pixels = torch.from_numpy(patches).view(num, -1).float()
    return torch.addcmul(shift, pixels, scale, out=pixels).view(num, -1, size * size * channels)


@lru_cache
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], pixels: int) -> tuple[Tensor, Tensor]:
    """scale and shift with (value - mean) / std = value * scale + shift, for all values of an image, (pixels * C,)."""
    scale = 1 / torch.tensor(std)
    return scale.repeat(pixels), (-torch.tensor(mean) * scale).repeat(pixels)


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """(mean, standard deviation) per channel of uint8 (N, H, W, C); a constant channel has deviation 1."""
    planes = [torch.from_numpy(images[..., c].ravel()) for c in range(images.shape[-1])]
    counts = np.stack([plane.bincount(minlength=256) for plane in planes])  # (C, 256)
    values = np.arange(256)
    return statistics(images[..., 0].size, counts @ values, counts @ values**2)


# --- Descriptions ----------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, type[Adapter]] = {
    "tensor": TensorAdapter, "text": TextAdapter, "pretrained_text": PretrainedTextAdapter, "series": SeriesAdapter,
    "image": ImageAdapter,
}  # fmt: skip
MODALITIES: dict[str, type[Adapter]] = {"image": ImageAdapter, "text": TextAdapter, "series": SeriesAdapter}  # of files


OWN = "own"  # the kind of the user's own classes


def describe(adapter: Adapter) -> dict[str, Any]:
    """Plain values that a checkpoint can store. Raises UserError for a class of the user's that holds others."""
    kind = next((name for name, cls in ADAPTERS.items() if type(adapter) is cls), None)
    if kind is not None:
        return {"kind": kind, **asdict(adapter)}
    cls = type(adapter)
    described = {"kind": OWN, "class": cls.__name__, **asdict(adapter)}
    rule = "an adapter is stored as plain data: numbers, text, and lists and dicts of these, as its fields declare"
    try:
        again = from_description(described, cls.__name__, {cls.__name__: cls})
    except UserError as error:
        raise UserError(f"{error}; {rule}") from error
    if again != adapter:
        raise UserError(f"{cls.__name__} is not the same when it is read again from its fields; {rule}")
    return described


def from_description(
    description: dict[str, Any], where: str = "the adapter", own: Mapping[str, type[Adapter]] | None = None
) -> Adapter:
    """The adapter that `describe` described.

    own: the user's own classes, by name. No other code of theirs is run, whatever the description says.

    Raises:
        UserError: `describe` never writes this; the message begins with `where`.
    """
    kind, fields = description.get("kind"), {name: value for name, value in description.items() if name != "kind"}
    if kind == OWN:
        name = fields.pop("class", None)
        if not isinstance(name, str) or name not in (own or {}):
            there = f"there is only {', '.join(own)}" if own else "which a checkpoint does not run by itself"
            raise UserError(f"{where} is {shown(name)}, a class of the user's own code, {there}; name its file with "
                            "--dataset path/to/my_data.py (train.py, inference.py), or in Python give load_model the "
                            "class: adapters=[...]")
        return read(fields, own[name], where)
    if not isinstance(kind, str) or kind not in ADAPTERS:
        raise UserError(f"{where}: its kind is {shown(kind)}; it must be one of {', '.join(ADAPTERS)}")
    return read(fields, ADAPTERS[kind], where)
