"""With few labels: from scratch, and from a model that has first filled in hidden tokens of all training inputs.

    python benchmarks/few_labels.py digits
    python benchmarks/few_labels.py languages --seeds 2 --shares 5 --mask_ratio 0.25 --validation
    python benchmarks/few_labels.py vowels --data JapaneseVowels_TRAIN.ts JapaneseVowels_TEST.ts

For each seed the training data lose a tenth of their items for validation; this split is the same for all runs of a
seed, so with few labels there are more of them in validation than in training, in both ways alike. A run has so many
labels of each class (the share of the training items, at least one of each class), 500 steps of 32 items or those of
the data set's default epochs, whichever is more, and keeps its best epoch on validation data. `pretrained` starts with
--init_from a run of --task reconstruct on the inputs of all training items, with the data set's default epochs times
--length. Both read the bytes of a text, since hidden ones are asked for one by one; `convolutions` is a run from
scratch that reads them through convolutions, the default. Accuracies are those on the test data, or with --validation
on validation data.
"""

import argparse
import contextlib
import io
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train as training  # noqa: E402
from adapters import SeriesAdapter, TextAdapter  # noqa: E402
from config import Settings, resolve  # noqa: E402
from data_files import read_series, read_texts  # noqa: E402
from data_utils import random_stream, stratified_split  # noqa: E402

sys.stdout.reconfigure(line_buffering=True)
STEPS, BATCH = 500, 32
EPOCH = 800  # samples at least, so that a few items do not make an epoch, with its validation, of every step
Parts = dict[str, tuple[list[Any], np.ndarray]]  # split -> (inputs, class numbers)


def taken(inputs: Sequence[Any], labels: np.ndarray, numbers: np.ndarray) -> tuple[list[Any], np.ndarray]:
    return [inputs[i] for i in numbers], labels[numbers]


def digits(_: list[str]) -> Parts:
    from sklearn.datasets import load_digits

    found = load_digits()
    rest, test = stratified_split(found.target, 0.2, random_stream("digits test set"))
    images = found.images * 15  # 0..240
    return {name: taken(images, found.target, numbers) for name, numbers in (("train", rest), ("test", test))}


def vowels(paths: list[str]) -> Parts:
    read = [read_series(path, Settings(dataset_type="sequences")) for path in paths]
    names = sorted(set(map(str, read[0].labels)))
    return {
        name: (items.values, np.array([names.index(str(label)) for label in items.labels]))
        for name, items in zip(("train", "test"), read, strict=True)
    }  # fmt: skip


def languages(_: list[str]) -> Parts:
    settings = Settings(dataset_type="text")
    items = read_texts(ROOT / "tests/data/languages.csv", settings)
    labels = np.unique(list(map(str, items.labels)), return_inverse=True)[1]
    rest, test = stratified_split(labels, 0.2, random_stream("test set"))
    return {name: taken(items.values, labels, numbers) for name, numbers in (("train", rest), ("test", test))}


SETS = {"digits": digits, "vowels": vowels, "languages": languages}
KINDS = {"digits": "images", "vowels": "sequences", "languages": "text"}
OWN_FLAGS = {"digits": {"image_size": 8, "patch_size": 2, "model_size": "tiny", "learning_rate": 1e-3,
                        "num_epochs": 80, "label_smoothing": 0.1, "ema_decay": 0.995}}  # those of --dataset digits


def chosen(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Numbers of the items whose labels are known: of each class its share, at least one."""
    rng = random_stream("few labels", seed)
    numbers = []
    for label in np.unique(labels):
        there = rng.permutation(np.flatnonzero(labels == label))
        numbers += there[: max(1, round(share / 100 * len(there)))].tolist()
    return np.sort(numbers)


def run(name: str, parts: Parts, place: Path, adapter: Any = None, **changes: Any) -> training.Result:
    """A run of train.train() on these parts, in the folder `place`."""
    kind = KINDS[name]
    settings = resolve({"dataset_type": kind, "stem": "none", **OWN_FLAGS.get(name, {}), **changes})[0].to_dict()
    settings |= {"checkpoint_dir": str(place / "checkpoints"), "log_dir": str(place / "runs"), "batch_size": BATCH}
    if settings["task"] != "reconstruct":
        items = len(parts["train"][0])
        samples = max(STEPS * BATCH, settings["num_epochs"] * items)
        settings["num_epochs"] = math.ceil(samples / max(EPOCH, items))
        settings |= {"epoch_samples": EPOCH, "select_by": "accuracy"}
    data = None
    if kind == "images":
        settings["data_path"] = str(place / "images")
        for split, (images, labels) in parts.items():
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                folder = place / "images" / split / str(label)
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.astype(np.uint8)).save(folder / f"{number}.png")
    else:
        settings |= {"dataset_type": "python", "data_path": None}
        data = {split: [{"input": value, "label": int(label)} for value, label in zip(*part, strict=True)]
                for split, part in parts.items()}  # fmt: skip
    return training.train(Settings.from_dict(settings), data, adapters=adapter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETS)
    parser.add_argument("--data", nargs=2, metavar="FILE", help="of vowels: the training and the test file")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--shares", type=float, nargs="+", default=[1, 5, 25], help="of the labels [percent]")
    parser.add_argument("--mask_ratio", type=float, default=0.5)
    parser.add_argument("--length", type=float, default=1.0, help="of pretraining, in default numbers of epochs")
    parser.add_argument("--validation", action="store_true", help="show accuracies on validation data: to choose by")
    args = parser.parse_args()
    found = SETS[args.name](args.data)
    table: dict[tuple[float, str], list[float]] = {}
    labels: dict[float, list[int]] = {}
    begin = time.process_time()
    for seed in range(args.seeds):
        inputs, numbers = found["train"]
        kept, held_out = stratified_split(numbers, 0.1, random_stream("validation", seed))
        split = {"train": taken(inputs, numbers, kept), "val": taken(inputs, numbers, held_out), "test": found["test"]}
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
            place = Path(place)
            adapter = {"vowels": {"series": SeriesAdapter}, "languages": {"text": TextAdapter}}.get(args.name)
            epochs = resolve({"dataset_type": KINDS[args.name], **OWN_FLAGS.get(args.name, {})})[0].num_epochs
            before = run(args.name, split, place / "before", adapter, seed=seed, task="reconstruct",
                         mask_ratio=args.mask_ratio, num_epochs=max(1, round(epochs * args.length)))  # fmt: skip
            if adapter:
                adapter = before.model.adapters  # the statistics of all inputs, in both ways
            for share in args.shares:
                some = chosen(split["train"][1], share, seed)
                parts = split | {"train": taken(*split["train"], some)}
                labels.setdefault(share, []).append(len(some))
                ways = {"scratch": {}, "pretrained": {"init_from": str(before.checkpoint)}}
                if args.name == "languages":
                    ways["convolutions"] = {"stem": "conv"}
                for way, changes in ways.items():
                    reader = {"text": TextAdapter} if "stem" in changes else adapter
                    result = run(args.name, parts, place / f"{share:g} {way}", reader, seed=seed, **changes)
                    value = result.best["val_accuracy"] if args.validation else result.test["accuracy"]
                    table.setdefault((share, way), []).append(value)
                    print(f"seed {seed}: {share:g} % of the labels ({len(some)}), {way}: {value:.4f}", file=sys.stderr)
    what = "validation" if args.validation else "test"
    print(f"{args.name}, {what} accuracy, mask_ratio {args.mask_ratio:g}, length {args.length:g}, {args.seeds} seeds, "
          f"{(time.process_time() - begin) / args.seeds:.0f} s of the processors a seed")  # fmt: skip
    print(f"{'labels':>16}{'way':>12}{'mean':>8}{'std':>8}  each")
    for (share, way), values in table.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = " ".join(f"{value:.4f}" for value in values)
        print(f"{f'{share:g} % ({labels[share][0]})':>16}{way:>12}{statistics.mean(values):8.4f}{spread:8.4f}  {each}")


if __name__ == "__main__":
    main()
