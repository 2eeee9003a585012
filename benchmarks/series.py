"""Accuracy on series of the UEA / UCR archive: the mean of some seeds on the test files, or over folds of training.

    python benchmarks/series.py data/ ArrowHead OSULeaf                       # data/ArrowHead_TRAIN.ts and _TEST.ts
    python benchmarks/series.py data/ ArrowHead OSULeaf --folds 4             # looks at no test file
    python benchmarks/series.py data/ ArrowHead --folds 4 -- --series_shift 0 # flags of train.py after --

A run is a process of train.py with the defaults and the flags given. Its accuracy is the one that train.py tells of the
test data; with folds, these are the fold that the model was not trained on. Seconds are those of the processors.
"""

import argparse
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import load_checkpoint  # noqa: E402
from config import Settings  # noqa: E402
from data_files import read_series  # noqa: E402

sys.stdout.reconfigure(line_buffering=True)


def folds_of(path: Path, count: int, folder: Path) -> Iterator[tuple[Path, Path]]:
    """(training part, the rest) of a file of labelled series, as two .npz each; of each class about the same share."""

    def stop(error: Exception) -> None:
        raise error

    items = read_series(path, Settings(dataset_type="sequences"), True, stop)
    labels, rng = np.array(list(map(str, items.labels))), np.random.default_rng(0)
    order = np.concatenate([rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)])
    fold = np.empty(len(labels), int)
    fold[order] = np.arange(len(labels)) % count
    for number in range(count):
        parts = []
        for name, chosen in (("train", np.flatnonzero(fold != number)), ("rest", np.flatnonzero(fold == number))):
            series = [items.values[i] for i in chosen]
            parts.append(folder / f"{name}_{number}.npz")
            lengths = np.array([len(one) for one in series])
            np.savez(parts[-1], x=np.concatenate(series), y=labels[chosen], lengths=lengths)
        yield tuple(parts)


def accuracy(train: Path, test: Path, seed: int, flags: list[str], folder: Path) -> tuple[float, float]:
    """(accuracy on the test data, seconds of the processors) of a run of train.py."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / "train.py"), "--dataset", "sequences", "--data_path", str(train),
               "--test_path", str(test), "--seed", str(seed), "--checkpoint_dir", str(folder / "checkpoints"),
               "--log_dir", str(folder / "runs"), *flags]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    last = load_checkpoint(folder / "checkpoints" / "last_model.pth")
    return last.get("progress", last)["test"]["accuracy"], seconds  # of several models it is in the file itself


def main() -> None:
    own, _, flags = " ".join(map(shlex.quote, sys.argv[1:])).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where NAME_TRAIN.ts and NAME_TEST.ts are")
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--folds", type=int, default=0, help="of the training file, instead of the test file")
    parser.add_argument("--seeds", type=int, default=3, help="runs on the test file (default: 3)")
    args = parser.parse_args(shlex.split(own))
    print(f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}; train.py {flags or 'with its defaults'}")
    print(f"{'':<20}{'mean':>8}{'std':>8}{'n':>4}{'seconds':>9}  each")
    for name in args.names:
        found = []
        with tempfile.TemporaryDirectory() as place:
            place, train = Path(place), args.folder / f"{name}_TRAIN.ts"
            runs = [(train, args.folder / f"{name}_TEST.ts", seed) for seed in range(args.seeds)]
            if args.folds:
                runs = [(*parts, 0) for parts in folds_of(train, args.folds, place)]
            for number, run in enumerate(runs):
                found.append(accuracy(*run, shlex.split(flags), place / str(number)))
        values, seconds = zip(*found, strict=True)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name:<20}{statistics.mean(values):8.3f}{spread:8.3f}{len(values):4}{statistics.mean(seconds):9.0f}  "
              + " ".join(f"{value:.3f}" for value in values))  # fmt: skip


if __name__ == "__main__":
    main()
