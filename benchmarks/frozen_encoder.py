"""The last layer of a frozen encoder trained twice: encoding in every epoch, and on features that are cached once.

    python benchmarks/frozen_encoder.py
    python benchmarks/frozen_encoder.py --images 200 --epochs 5 --full          # the published size, hours on a CPU

Both are runs of train.py from one folder with random weights, on the same images and without augmentation; they end
with the same weights up to rounding, which is checked. By default the model is vision-perceiver-fourier made small
(64 x 64 pixels, 64 latents of 128, 2 x 2 layers), so that the slow way ends within minutes. Seconds are of the whole
process, from its start to the test figures; those of the CPU do not depend on what else the machine does.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import parity
import transformers
from measure import print_row

from checkpoint import LAST, load_checkpoint

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
SMALL = {"num_latents": 64, "d_latents": 128, "num_blocks": 2, "num_self_attends_per_block": 2}
WAYS = {"encoding in every epoch": [], "--cache_features": ["--cache_features"]}


def write_images(folder: Path, number: int, side: int) -> None:
    """So many images of noise in 4 classes, each brighter in another corner."""
    rng = np.random.default_rng(0)
    for i in range(number):
        pixels = rng.integers(0, 156, (side, side, 3), np.uint8)
        row, column, half = i % 4 // 2, i % 2, side // 2
        pixels[row * half : (row + 1) * half, column * half : (column + 1) * half] += 100
        (folder / str(i % 4)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / str(i % 4) / f"{i}.png")


def train(folder: Path, words: list[str]) -> tuple[float, float]:
    """(seconds on the clock, seconds of the CPU) of a run."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, str(TRAIN), *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="how many there are (default 1000)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the features (default 20)")
    parser.add_argument("--full", action="store_true", help="the published size, images of 224 x 224 pixels")
    args = parser.parse_args()
    side = 224 if args.full else 64
    print(f"torch {torch.__version__}, {os.cpu_count()} CPU cores; {args.images} images of {side} x {side} pixels, "
          f"{args.epochs} epochs")  # fmt: skip
    widths, weights = (26, 10, 12), []
    print_row(("", "seconds", "CPU seconds"), widths)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_images(folder / "images", args.images, side)
        parity.write_published("fourier", folder / "model", **({} if args.full else SMALL))
        crop = {"height": side * 8 // 7, "width": side * 8 // 7}
        size = {"height": side, "width": side}
        transformers.PerceiverImageProcessor(size=size, crop_size=crop).save_pretrained(folder / "model")
        for number, (name, more) in enumerate(WAYS.items()):
            words = ["--dataset", "images", "--data_path", "images", "--init_from", "model", "--freeze", "encoder"]
            words += ["--no_augment", "--amp", "off", "--device", "cpu", "--epochs", str(args.epochs), *more]
            seconds, of_cpu = train(folder, [*words, "--checkpoint_dir", str(number)])
            print_row((name, f"{seconds:.0f}", f"{of_cpu:.0f}"), widths)
            weights.append(load_checkpoint(folder / str(number) / LAST)["model"])
    apart = max((values - weights[1][key]).abs().max().item() for key, values in weights[0].items())
    print(f"greatest difference between the weights of the two: {apart:.1e}")


if __name__ == "__main__":
    main()
