"""Images a second from JPEG files against torchvision, and what it costs to start on a large folder.

    python benchmarks/image_loading.py                       # images a second at 224 x 224, 2 workers
    python benchmarks/image_loading.py --cases 0 1 2 4       # with so many workers
    python benchmarks/image_loading.py --start 100000        # a folder of so many small JPEGs: first and second start

The first: photos of 500 x 375 pixels (noise and soft colours, JPEG of quality 90, made in a temporary folder) are
scaled, cropped about the centre to 224 x 224 and normalised, by the loader that train.py makes, with --cache none, and
by torchvision's ImageFolder with Resize, CenterCrop, ToTensor and Normalize in a DataLoader of torch. Both have the
same batches and workers, which are started for each pass. The loader of this project cuts its images into patches, too.

The second: the time from the start of `train.prepare` (reading the folder, the check of every file, the model, a
rehearsal of a step) to its end, then 20 batches; in a process of its own each time. Memory is the highest resident
memory of that process beyond what it has after `import torch`, and what its workers have for themselves.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

OURS, TORCHVISION = "this project", "torchvision ImageFolder"
SIDE, BATCH = 224, 32
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def make_photos(folder: Path, count: int, size: tuple[int, int], classes: int = 10) -> None:
    """JPEGs in class folders; a few hundred different ones, each several times."""
    import numpy as np
    from PIL import Image

    rng, (width, height), pool = np.random.default_rng(0), size, []
    for _ in range(min(count, 300)):
        colours = rng.integers(256, size=(height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
        soft = np.asarray(Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC), np.int16)
        noisy = soft + rng.normal(0, 6, soft.shape).astype(np.int16)
        pool.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    for number in range(classes):
        (folder / f"class{number}").mkdir(parents=True)
    for number, image in enumerate(pool):
        image.save(folder / f"class{number % classes}" / f"{number}.jpg", quality=90)
    for number in range(len(pool), count):
        like = number % len(pool)
        source = folder / f"class{like % classes}" / f"{like}.jpg"
        (folder / f"class{number % classes}" / f"{number}.jpg").write_bytes(source.read_bytes())


# --- Images a second -------------------------------------------------------------------------------------------------


def build(spec: measure.Spec) -> tuple[measure.Step, measure.Step, measure.Spec]:
    import torch

    torch.set_num_threads(1)  # in the process without workers, as torch sets it in workers
    folder, workers = spec["folder"], spec["workers"]
    if spec["name"] == OURS:
        from batches import create_dataloader
        from config import Settings
        from data_utils import load_splits

        settings = Settings(dataset_type="images", data_path=folder, image_size=SIDE, patch_size=16, cache="none",
                            augment=False, val_fraction=0.01, test_fraction=0.01)  # fmt: skip
        splits, _ = load_splits(settings)
        loader = create_dataloader(splits["train"], BATCH, shuffle=True, num_workers=workers)
    else:
        from torch.utils.data import DataLoader
        from torchvision import datasets, transforms

        bicubic = transforms.InterpolationMode.BICUBIC
        steps = [transforms.Resize(SIDE, bicubic), transforms.CenterCrop(SIDE), transforms.ToTensor()]
        transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])
        loader = DataLoader(datasets.ImageFolder(folder, transform), BATCH, shuffle=True, num_workers=workers)

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch, epoch, {"images": len(loader.dataset), "tokens": (SIDE, SIDE, 3)}


def compare(args: measure.argparse.Namespace, folder: str) -> None:
    heading = measure.Heading("torchvision", "numpy", "pillow")
    widths = (26, 28, 24)
    for workers in map(int, args.cases):
        common = {"folder": folder, "workers": workers, "device": "cpu"}
        contestants = measure.by_turns([{"name": name, **common} for name in (OURS, TORCHVISION)], args.repeats)
        heading.show(contestants[0])
        print(f"{args.images:,} JPEGs of 500 x 375 at {SIDE} x {SIDE}, batches of {BATCH}, {workers} workers; medians "
              f"of {args.repeats} alternating runs (range)")  # fmt: skip
        measure.print_row(("", "images a second", "times as many"), widths)
        rates = [[each.facts["images"] / seconds for seconds in each.seconds] for each in contestants]
        times = [ours / theirs for ours, theirs in zip(*rates, strict=True)]
        measure.print_row((OURS, measure.spread(rates[0], ",.0f"), measure.spread(times)), widths)
        measure.print_row((TORCHVISION, measure.spread(rates[1], ",.0f")), widths)
        print(f"At least 0.9 times as many; median {statistics.median(times):.2f}\n")


# --- The start -------------------------------------------------------------------------------------------------------


def memory(process: str, *names: str) -> int:
    """Bytes that the system counts for a process under these names, of status or smaps_rollup (Linux)."""
    file = Path("/proc", process, "status" if names[0].startswith("Vm") else "smaps_rollup")
    rows = (line.split() for line in file.read_text().splitlines())
    return sum(1024 * int(row[1]) for row in rows if row[0].rstrip(":") in names)


def start(words: list[str]) -> None:
    """In a process of its own: start a run, read 20 batches, and print what that cost."""
    import torch

    torch.set_num_threads(1)
    torch.ones(8, 8) @ torch.ones(8, 8)
    before, began = memory("self", "VmRSS"), time.perf_counter()

    import train
    from config import make_parser, resolve

    settings, _ = resolve(make_parser("").parse_args(words).flags)
    run = train.prepare(settings)
    seconds, of_processor = time.perf_counter() - began, time.process_time()
    loader, workers = iter(run.loaders["train"]), []
    for _ in range(20):
        next(loader)
    if children := Path("/proc/self/task", str(os.getpid()), "children").read_text().split():
        workers = [memory(child, "Private_Clean", "Private_Dirty") for child in children]
    found = {"seconds": seconds, "cpu": of_processor, "bytes": memory("self", "VmHWM") - before, "workers": workers}
    print(json.dumps(found))


def starts(count: int, folder: str, words: list[str]) -> None:
    for turn in ("first", "second"):
        command = [sys.executable, __file__, "--one_start", "--dataset=images", f"--data_path={folder}",
                   f"--checkpoint_dir={folder}.run", f"--log_dir={folder}.log", "--model_size=tiny",
                   *words]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        workers = ", ".join(f"{each / 2**20:,.0f} MiB" for each in found["workers"]) or "none"
        print(f"{turn} start on {count:,} images: {found['seconds']:,.1f} s ({found['cpu']:,.1f} s of "
              f"processor time), {found['bytes'] / 2**20:,.0f} MiB beyond "
              f"torch; workers have of their own: {workers}", flush=True)  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--one_start"]:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        start(sys.argv[2:])
        return
    number = {"type": int, "metavar": "N"}
    args = measure.parse_args(
        __doc__, ["0", "1", "2", "3", "4", "8", "16"], ["2"], repeats=5,
        images=number | {"default": 1000, "help": "JPEGs that are read in a run (default: 1000)"},
        start=number | {"help": "make so many JPEGs of 64 x 64 and start twice on them"},
        settings={"nargs": "+", "default": [], "help": "of the starts, without their dashes: image_size=224"},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if args.start:
            make_photos(Path(folder, "photos"), args.start, (64, 64))
            starts(args.start, f"{folder}/photos", [f"--{word}" for word in args.settings])
        else:
            make_photos(Path(folder, "photos"), args.images, (500, 375))
            compare(args, f"{folder}/photos")


if __name__ == "__main__":
    measure.serve(build)
    main()
