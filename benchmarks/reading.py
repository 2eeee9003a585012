"""What it costs to read a large file: seconds of one core and memory, up to the first batch that the model is given.

    python benchmarks/reading.py
    python benchmarks/reading.py --against path/to/another/checkout --repeats 3
    python benchmarks/reading.py --cases series --size 0.1        # a tenth of the items

The cases are made in a temporary folder, from random numbers with a seed:

    series    100,000 series of 100 steps and 8 channels, float32, in an .npz as np.savez writes it (320 MB)
    packed    the same from np.savez_compressed, which cannot be mapped into memory
    csv       200,000 texts of about 120 characters (25 MB)
    jsonl     the same, an object per line

Each run is a process of its own on one thread, train.py with the preset tiny. Seconds are processor time and memory
the highest resident memory (VmHWM of Linux), both from when train.py has been imported, with what torch imports for
its first optimizer, until the model is first called. Pages of a file that is mapped into memory count. With --against,
runs of the two checkouts alternate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np
import torch

SERIES, TEXTS = 100_000, 200_000
HERE = Path(__file__).resolve().parent.parent


# --- The files -------------------------------------------------------------------------------------------------------


def series(path: Path, size: float, save: Callable = np.savez) -> None:
    rng, number = np.random.default_rng(0), round(size * SERIES)
    x, y = rng.standard_normal((number, 100, 8), np.float32), rng.integers(0, 5, number)
    x += y[:, None, None].astype(np.float32)
    save(path, x=x, y=y)


def texts(path: Path, size: float) -> None:
    rng, number = np.random.default_rng(0), round(size * TEXTS)
    words = np.array(["".join(map(chr, rng.integers(97, 123, rng.integers(2, 10)))) for _ in range(3000)])
    with open(path, "w", encoding="utf-8") as file:
        if path.suffix == ".csv":
            file.write("text,label\n")
        for chosen in rng.integers(0, 3000, (number, 18)):
            text, name = " ".join(words[chosen]), ("news", "sport", "law", "art")[chosen[0] % 4]
            row = f"{text},{name}" if path.suffix == ".csv" else json.dumps({"text": text, "label": name})
            file.write(row + "\n")


CASES: dict[str, tuple[str, str, Callable]] = {  # what --dataset says, the file, what makes it
    "series": ("sequences", "series.npz", series),
    "packed": ("sequences", "packed.npz", lambda path, size: series(path, size, np.savez_compressed)),
    "csv": ("text", "texts.csv", texts),
    "jsonl": ("text", "texts.jsonl", texts),
}


# --- A run -----------------------------------------------------------------------------------------------------------


def to_the_first_step(checkout: str, dataset: str, file: str) -> None:
    """In a process of its own: print seconds and bytes, and exit when the model is first called."""
    sys.path[0] = checkout
    import perceiver_model
    import train

    def stop(*_: object, **__: object) -> None:
        seconds, memory = time.process_time() - start, measure._status("VmHWM") - idle
        print(json.dumps({"seconds": seconds, "memory": memory}), file=sys.stderr, flush=True)
        os._exit(0)

    perceiver_model.PerceiverModel.forward = stop
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports torch's compiler, 160 MB
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    idle, start = measure._status("VmRSS"), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        places = ["--checkpoint_dir", f"{folder}/checkpoints", "--log_dir", f"{folder}/runs"]
        train.main(["--dataset", dataset, "--data_path", file, "--model_size", "tiny", "--device", "cpu", *places])


def run(checkout: Path, dataset: str, file: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--run", str(checkout), dataset, str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(HERE / "benchmarks")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: {done.stderr}")
    return json.loads(done.stderr.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="PATH", help="another checkout of this project")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--size", type=float, default=1.0, help="share of the items (default: 1)")
    args = parser.parse_args()
    checkouts = [HERE] + ([args.against.resolve()] if args.against else [])
    widths = (16, 16, 22, 22, 16)
    print(f"{measure.device_name(torch.device('cpu'))}; medians of {args.repeats} runs (range)")
    measure.print_row(("case", "checkout", "seconds of one core", "MB above the start", "times the file"), widths)
    with tempfile.TemporaryDirectory() as folder:
        for case in args.cases:
            dataset, name, make = CASES[case]
            make(file := Path(folder, name), args.size)
            found = {checkout: [] for checkout in checkouts}
            for _ in range(args.repeats):
                for checkout in checkouts:
                    found[checkout].append(run(checkout, dataset, file))
            bytes_of_file = file.stat().st_size
            for checkout, runs in found.items():
                seconds, memory = ([each[key] for each in runs] for key in ("seconds", "memory"))
                name = f"{case}, {bytes_of_file / 1e6:.0f} MB"
                figures = measure.spread(seconds), measure.spread([each / 1e6 for each in memory], ".0f")
                times = measure.spread([each / bytes_of_file for each in memory], ".1f")
                measure.print_row((name, checkout.name, *figures, times), widths)
            if args.against:
                ours, theirs = (statistics.median(each["seconds"] for each in found[one]) for one in checkouts)
                print(f"{ours / theirs:.2f} of the time\n")
            file.unlink()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        to_the_first_step(*sys.argv[2:])
    else:
        main()
