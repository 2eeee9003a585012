"""Who speaks at each step: utterances of JapaneseVowels joined at random, for --task tagging.

    python benchmarks/joined_speakers.py FOLDER speakers/
    python train.py --dataset sequences --task tagging --data_path speakers/train.npz --test_path speakers/test.npz \
        --group_column fold --seed 0

FOLDER holds JapaneseVowels_TRAIN.ts and JapaneseVowels_TEST.ts of the UEA archive: 270 and 370 utterances of 7 to 29
steps and 12 channels, by nine speakers. Training series are joined of utterances of the first file, test series of
those of the second, each of which is in one test series. An utterance is in several training series, but only in those
of its fold, of which there are ten: --group_column fold keeps the folds of validation out of training.

Printed are the accuracies, per step of the test series, of always answering the most frequent speaker and of a
logistic regression that sees the single step.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_files import read_series

FOLDS, PER_FOLD = 10, 40  # of the training utterances; series of each
JOINED = (4, 8)  # fewest and most utterances of a series


def join(utterances: list[np.ndarray], speakers: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the series (L, C), the speaker of each step (L,)) of these utterances, one after the other."""
    parts = [utterances[i] for i in numbers]
    return np.concatenate(parts), np.repeat(speakers[numbers], [len(part) for part in parts])


def save(path: Path, series: list[tuple[np.ndarray, np.ndarray]], **more: list) -> None:
    x, y = (np.concatenate(parts) for parts in zip(*series, strict=True))
    np.savez(path, x=x.astype(np.float32), y=y, lengths=[len(labels) for _, labels in series], **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the .ts files are")
    parser.add_argument("output", type=Path, help="where train.npz and test.npz are written")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    known, new = (read_series(args.folder / f"JapaneseVowels_{name}.ts") for name in ("TRAIN", "TEST"))
    args.output.mkdir(parents=True, exist_ok=True)

    speakers, training, fold_of = np.array(known.labels), [], []
    fold = np.empty(len(speakers), int)
    for speaker in np.unique(speakers):  # every fold has as many utterances of each
        members = rng.permutation(np.flatnonzero(speakers == speaker))
        fold[members] = np.arange(len(members)) % FOLDS
    for number in range(FOLDS):
        for _ in range(PER_FOLD):
            chosen = rng.permutation(np.flatnonzero(fold == number))[: rng.integers(*JOINED, endpoint=True)]
            training.append(join(known.values, speakers, chosen))
            fold_of.append(number)
    save(args.output / "train.npz", training, fold=fold_of)

    order, test = rng.permutation(len(new.values)), []
    while len(order):
        count = rng.integers(*JOINED, endpoint=True)
        test.append(join(new.values, np.array(new.labels), order[:count]))
        order = order[count:]
    save(args.output / "test.npz", test, fold=[FOLDS] * len(test))  # one of its own

    x, y = (np.concatenate(parts) for parts in zip(*training, strict=True))
    x_test, y_test = (np.concatenate(parts) for parts in zip(*test, strict=True))
    names, counts = np.unique(y, return_counts=True)
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x, y)
    print(f"{len(training)} training series of {len(y):,} steps, {len(test)} test series of {len(y_test):,} steps")
    print(f"most frequent speaker of training  {(y_test == names[counts.argmax()]).mean():.4f}")
    print(f"logistic regression of one step    {regression.score(x_test, y_test):.4f}")


if __name__ == "__main__":
    main()
