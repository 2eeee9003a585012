"""A tour of the repository in numbered examples; all of them run, in under a minute on two CPU cores.

    python example_usage.py

Nothing is left behind: what example 7 saves goes into a temporary folder.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

from adapters import ImageAdapter, TensorAdapter, TextAdapter, describe
from checkpoint import model_arguments, save_checkpoint
from config import resolve
from data_utils import (
    collate,
    create_cifar10_sequence_dataset,
    create_dataloader,
    create_synthetic_sequence_dataloader,
    load_splits,
)
from inference import evaluate, load_model, predict
from messages import UserError
from perceiver_model import MODEL_SIZES, PerceiverModel, create_perceiver_model


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


def a_few_training_steps() -> PerceiverModel:
    torch.manual_seed(0)
    model = create_perceiver_model(3, 2, "tiny").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = create_dataloader(Ramps(200, seed=0), batch_size=16, shuffle=True, num_classes=2)
    for epoch in range(4):
        for batch in loader:
            loss = F.cross_entropy(model(batch["input"], batch["mask"]), batch["label"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"   epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")
    return model


def saving_loading_and_prediction(trained: PerceiverModel) -> None:
    settings, _ = resolve({"model_size": "tiny", "use_positions": True})
    adapter = TensorAdapter(input_dim=3)
    data = {"class_names": ["rises", "falls"], "num_classes": 2}
    data |= {"features": {"series": adapter.features}, "adapters": {"series": describe(adapter)}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ramps.pth"
        contents = {"model": trained.state_dict(), "model_args": model_arguments(settings, data)}
        contents |= {"settings": asdict(settings), "data": data, "epoch": 4, "step": 52, "best": {}}
        save_checkpoint(path, contents)
        model, _ = load_model(path)
    results = evaluate(model, Ramps(100, seed=1))
    print(f"   100 new ramps: accuracy {results['accuracy']:.2f}, majority baseline {results['majority_baseline']:.2f}")
    for length in (12, 35):
        answer = predict(model, [np.linspace(1, -1, length)[:, None] * [1, 0.5, 2]])[0]
        print(f"   a falling ramp of {length} steps: {answer['class']} with confidence {answer['confidence']:.3f}")


def several_modalities() -> None:
    """Digits as a noisy image and as a word that is right half of the time: together they tell more than each alone."""
    rng, digits = np.random.default_rng(0), load_digits()
    pixels = (digits.images + rng.normal(0, 6, digits.images.shape)).clip(0, 16).astype(np.uint8)[..., None]
    said = np.where(rng.random(len(pixels)) < 0.5, digits.target, rng.integers(0, 10, len(pixels)))
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    image, text = ImageAdapter.fit(pixels[:1400], patch_size=2), TextAdapter()
    items = [
        {"input": {"image": image(pixels[i]), "text": text(words[said[i]])}, "label": digits.target[i]}
        for i in range(len(pixels))
    ]
    model = create_perceiver_model({"image": image.features, "text": text.features}, num_classes=10, model_size="tiny")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = create_dataloader(items[:1400], batch_size=32, shuffle=True, num_classes=10)
    for _ in range(8):
        for batch in loader:
            F.cross_entropy(model(batch["input"], batch["mask"]), batch["label"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    test = collate(items[1400:])
    with torch.inference_mode():
        for names in (["image", "text"], ["image"], ["text"]):  # a modality that is left out counts as missing
            logits = model({name: test["input"][name] for name in names}, {name: test["mask"][name] for name in names})
            right = (logits.argmax(1) == test["label"]).double().mean()
            print(f"   {' and '.join(names):<15}{right:.2f} of {len(logits)} test samples are right")


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
    print("5. A data set of your own")
    custom_data_set()
    print("6. A few training steps")
    model = a_few_training_steps()
    print("7. Saving, loading, evaluation and prediction")
    saving_loading_and_prediction(model)
    print("8. Several modalities at once")
    several_modalities()
    print("Train for real with: python train.py --dataset digits")


if __name__ == "__main__":
    main()
