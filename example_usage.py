"""A tour of the repository in numbered examples; all of them run, in under a minute on two CPU cores.

    python example_usage.py

Nothing is left behind: what is saved goes into a temporary folder.
"""

import io
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

from adapters import Adapter, ImageAdapter, TextAdapter, describe
from config import Settings, resolve
from data_utils import (
    create_cifar10_sequence_dataset,
    create_dataloader,
    create_synthetic_sequence_dataloader,
    load_splits,
)
from inference import evaluate, load_model, predict
from messages import UserError
from perceiver_model import MODEL_SIZES, create_perceiver_model
from train import Result, train


def model_from_a_preset() -> None:
    model = create_perceiver_model(input_dim=32, num_classes=10, model_size="base")
    logits = model(torch.randn(4, 100, 32))  # (4, 10)
    print(f"   input (4, 100, 32) -> logits {tuple(logits.shape)}")
    for size in MODEL_SIZES:
        parameters = sum(p.numel() for p in create_perceiver_model(32, 10, size).parameters())
        print(f"   {size:<6} {parameters:>12,} parameters   {MODEL_SIZES[size]}")


def variable_lengths_with_a_mask() -> None:
    model = create_perceiver_model(32, 10, "tiny").eval()
    long, short = torch.randn(120, 32), torch.randn(45, 32)
    x = torch.full((2, 120, 32), float("nan"))  # what padding holds does not matter
    x[0], x[1, :45] = long, short
    mask = torch.zeros(2, 120)
    mask[0], mask[1, :45] = 1, 1
    with torch.inference_mode():
        apart = (model(x, mask)[1] - model(short[None])[0]).abs().max()
    print(f"   the short sequence, padded and alone: logits differ by {apart:.1e}")


def attention_maps() -> None:
    model = create_perceiver_model(4, 10, "tiny", grid_shape=(4, 4), num_cross_attention_layers=2).eval()
    with torch.inference_mode():
        logits, maps = model(torch.randn(3, 16, 4), return_attention=True)
    print(f"   {len(maps)} cross-attends, each with maps (batch, heads, latents, tokens) {tuple(maps[0].shape)}")
    print(f"   every row sums to 1: {maps[0].sum(-1).min():.6f} to {maps[0].sum(-1).max():.6f}")


def data_sets() -> None:
    synthetic = create_synthetic_sequence_dataloader(batch_size=32, num_samples=100, seq_len_range=(50, 200))
    digits = load_splits(resolve({"dataset_type": "digits"})[0])[0]["train"]
    for name, loader in {"synthetic": synthetic, "digits": create_dataloader(digits, 32)}.items():
        batch = next(iter(loader))
        print(f"   {name:<10}" + ", ".join(f"{key} {tuple(value.shape)}" for key, value in batch.items()))
    if Path("data/cifar-10-batches-py").exists():
        batch = next(iter(create_cifar10_sequence_dataset(batch_size=32, patch_size=8)))
        print(f"   cifar10   input {tuple(batch['input'].shape)}")
    else:
        print("   cifar10   not downloaded yet: create_cifar10_sequence_dataset(patch_size=8) would fetch 170 MB")


class Ramps(Dataset):
    """A data set of your own: class 0 rises, class 1 falls. Items may differ in length."""

    def __init__(self, num_samples: int, seed: int):
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(0, 2, num_samples)
        self.data = []
        for label in self.labels:
            ramp = np.linspace(-1, 1, rng.integers(10, 40))[:, None] * (1 - 2 * label)
            self.data.append((ramp * [1, 0.5, 2] + rng.normal(0, 0.5, (len(ramp), 3))).astype(np.float32))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict:
        return {"input": self.data[i], "label": self.labels[i], "mask": torch.ones(len(self.data[i]))}


def custom_data_set() -> None:
    loader = create_dataloader(Ramps(200, seed=0), batch_size=16, shuffle=True, num_classes=2)
    batch = next(iter(loader))
    lengths = batch["mask"].sum(1).tolist()
    print(f"   {len(loader)} batches; the first: input {tuple(batch['input'].shape)}, lengths {lengths}")
    try:
        create_dataloader([{"input": np.zeros((0, 3)), "label": 0}], batch_size=1)
    except UserError as error:
        print(f"   a mistake is named: {error}")


def a_loop_of_your_own() -> None:
    model = create_perceiver_model(3, 2, "tiny").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = create_dataloader(Ramps(200, seed=0), batch_size=16, shuffle=True, num_classes=2)
    for epoch in range(2):
        for batch in loader:
            loss = F.cross_entropy(model(batch["input"], batch["mask"]), batch["label"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"   epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")


def trained(folder: str, data: dict, **options) -> Result:
    """`train.train` with a small model, whose files go into `folder`; what it prints is left out here."""
    names = {name: options.pop(name) for name in ("class_names", "adapters") if name in options}
    places = {"checkpoint_dir": f"{folder}/checkpoints", "log_dir": f"{folder}/runs"}
    settings = Settings(model_size="tiny", num_latents=16, learning_rate=1e-3, **places, **options)
    with redirect_stdout(io.StringIO()):
        return train(settings, data=data, **names)


def training_on_your_own_data(folder: str) -> None:
    """The checks, splits, files and figures of train.py, from Python. Validation data are split off."""
    data = {"train": Ramps(200, seed=0), "test": Ramps(100, seed=1)}
    result = trained(folder, data, class_names=["rises", "falls"], num_epochs=2)
    for line in result.history:
        print("   epoch {epoch}: train loss {train_loss:.3f}, val loss {val_loss:.3f}, ".format(**line)
              + f"val accuracy {line['val_accuracy']:.2f}")  # fmt: skip
    results = evaluate(result.model, Ramps(100, seed=2))
    print(f"   100 new ramps: accuracy {results['accuracy']:.2f}, majority baseline {results['majority_baseline']:.2f}")
    model, _ = load_model(result.checkpoint)  # the same model, from its file
    for length in (12, 35):
        answer = predict(model, [np.linspace(1, -1, length)[:, None] * [1, 0.5, 2]])[0]
        print(f"   a falling ramp of {length} steps: {answer['class']} with confidence {answer['confidence']:.3f}")


def numbers_as_answers(folder: str) -> None:
    """Regression: how steep a ramp is, in the units of the labels."""
    rng, items = np.random.default_rng(0), []
    for slope in rng.uniform(-30, 30, 300):
        times = np.linspace(0, 1, rng.integers(10, 20))
        heights = slope * times / 10 + rng.normal(0, 0.1, len(times))
        items.append({"input": np.stack([times, heights], 1), "label": slope})
    result = trained(folder, {"train": items}, task="regression", num_epochs=5)
    answer = predict(result.model, [np.stack([times, -2 * times], 1)])[0]["value"]
    print(f"   RMSE {result.test['rmse']:.1f} on {result.test['num_samples']} test items from -30 to 30")
    print(f"   a slope of -20 is answered by {answer:.1f}")


@dataclass(frozen=True)
class AudioAdapter(Adapter):
    """A modality of your own: a waveform (T,) as the log-power spectrum of its frames, standardised.

    Its fields are what a checkpoint stores. In a file my_data.py beside a function load_data, such a class trains with
    `python train.py --dataset my_data.py`: see docs/data.md.
    """

    modality = "audio"

    frame: int
    mean: float
    std: float

    @classmethod
    def fit(cls, raw: list, settings: Settings) -> "AudioAdapter":
        spectra = torch.cat([spectrum(wave, frame=64) for wave in raw])
        return cls(64, float(spectra.mean()), float(spectra.std()))

    @property
    def features(self) -> dict:
        return {"input_dim": self.frame // 2 + 1}

    def __call__(self, wave: np.ndarray) -> torch.Tensor:
        return (spectrum(wave, self.frame) - self.mean) / self.std  # (T // frame, frame // 2 + 1)


def spectrum(wave: np.ndarray, frame: int) -> torch.Tensor:
    frames = torch.as_tensor(wave, dtype=torch.float32).unfold(0, frame, frame)
    return torch.fft.rfft(frames * torch.hann_window(frame)).abs().square().add(1e-6).log()


def whistle(turn: float, rng: np.random.Generator) -> np.ndarray:
    """A second or less at 4000 samples a second, whose pitch moves by `turn` Hz up or down."""
    length = rng.integers(1000, 2000)
    pitch = rng.uniform(700, 1100) + turn * np.linspace(-0.5, 0.5, length)
    return np.sin(2 * np.pi * np.cumsum(pitch) / 4000) + rng.normal(0, 0.3, length)


def a_modality_of_your_own(folder: str) -> None:
    rng, names = np.random.default_rng(0), {"stays": 0, "rises": 1000, "falls": -1000}
    items = [{"input": whistle(turn, rng), "label": name} for _ in range(80) for name, turn in names.items()]
    result = trained(folder, {"train": items}, adapters=AudioAdapter, num_epochs=4)
    print(f"   test accuracy {result.test['accuracy']:.2f} of {result.test['num_samples']} whistles")
    print(f"   stored in the checkpoint: {describe(result.model.adapters['audio'])}")
    model, _ = load_model(result.checkpoint, adapters=[AudioAdapter])  # whose code it does not run by itself
    print(f"   a whistle that falls by 900 Hz: {predict(model, [whistle(-900, rng)])[0]['class']}")


def several_modalities(folder: str) -> None:
    """Digits as a noisy image and as a word that is right half of the time: together they tell more than each alone."""
    rng, digits = np.random.default_rng(0), load_digits()
    pixels = (digits.images + rng.normal(0, 6, digits.images.shape)).clip(0, 16).astype(np.uint8)[..., None]
    said = np.where(rng.random(len(pixels)) < 0.5, digits.target, rng.integers(0, 10, len(pixels)))
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    items = [
        {"input": {"image": image, "text": words[word]}, "label": label}
        for image, word, label in zip(pixels, said, digits.target.tolist(), strict=True)
    ]
    adapters = {"image": ImageAdapter.fit(pixels[:1400], patch_size=2), "text": TextAdapter()}
    data = {"train": items[:1400], "test": items[1400:]}
    model = trained(folder, data, class_names=words, adapters=adapters, num_epochs=4).model
    for names in (["image", "text"], ["image"], ["text"]):  # a modality that is left out counts as missing
        answers = predict(model, [{name: item["input"][name] for name in names} for item in items[1400:]])
        right = np.mean([answer["label"] == item["label"] for answer, item in zip(answers, items[1400:], strict=True)])
        print(f"   {' and '.join(names):<15}{right:.2f} of {len(answers)} test samples are right")


def main() -> None:
    torch.manual_seed(0)
    print("1. A model from a preset")
    model_from_a_preset()
    print("2. Sequences of different lengths, with a mask")
    variable_lengths_with_a_mask()
    print("3. Cross-attention maps")
    attention_maps()
    print("4. The built-in data sets")
    data_sets()
    print("5. A data set of your own, and a training loop of your own")
    custom_data_set()
    a_loop_of_your_own()
    with tempfile.TemporaryDirectory() as folder:
        print("6. Training, evaluation and prediction on your own data")
        training_on_your_own_data(f"{folder}/ramps")
        print("7. Numbers as answers")
        numbers_as_answers(f"{folder}/slopes")
        print("8. A modality of your own")
        a_modality_of_your_own(f"{folder}/whistles")
        print("9. Several modalities at once")
        several_modalities(f"{folder}/digits")
    print("Train for real with: python train.py --dataset digits")


if __name__ == "__main__":
    main()
