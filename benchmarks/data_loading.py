"""Images a second: CIFAR-10 training batches of this project against torchvision's transforms image by image.

    python benchmarks/data_loading.py
    python benchmarks/data_loading.py --cases 4 --batch_size 128

Both loaders shuffle, crop with a margin of 4 pixels, flip, normalise and cut into patches, in one process, no workers.
The other one is the usual: a data set that makes a PIL image of each array (as torchvision.datasets.CIFAR10 does),
RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor, Normalize and a reshape into patches, and a DataLoader with
its default collate function. The images are random bytes in the shape of CIFAR-10's; nothing is downloaded. Batches
are made on the CPU; with --device cuda they are pinned and copied to the device as well.
"""

import statistics

import measure

OURS, PER_IMAGE = "this project", "torchvision, per image"
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # of CIFAR-10, in units of the bytes
IMAGES = {OURS: 50_000, PER_IMAGE: 5_000}  # in a run


def build(spec: measure.Spec) -> tuple[measure.Step, measure.Step, measure.Spec]:
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, Dataset

    images, patch_size = IMAGES[spec["name"]], spec["patch_size"]
    pin_memory = spec["device"].startswith("cuda")
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(images, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(10, size=images)

    if spec["name"] == OURS:
        from adapters import ImageAdapter, ImageDataset
        from batches import create_dataloader

        adapter = ImageAdapter([32, 32, 3], patch_size, MEAN, STD)
        dataset = ImageDataset(pixels, labels, adapter, margin=4, flip=True)
        loader = create_dataloader(dataset, spec["batch_size"], shuffle=True, num_classes=10, pin_memory=pin_memory)
    else:
        from PIL import Image
        from torchvision import transforms

        def patches(image: torch.Tensor) -> torch.Tensor:
            tiles = image.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size)
            return tiles.permute(1, 2, 3, 4, 0).reshape(-1, 3 * patch_size**2)

        transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([value / 255 for value in MEAN], [value / 255 for value in STD]),
                patches,
            ]
        )

        class Cifar(Dataset):
            def __len__(self) -> int:
                return images

            def __getitem__(self, number: int):
                return transform(Image.fromarray(pixels[number])), int(labels[number])

        loader = DataLoader(Cifar(), spec["batch_size"], shuffle=True, pin_memory=pin_memory)

    def epoch() -> None:
        for batch in loader:
            tokens = batch["input"] if isinstance(batch, dict) else batch[0]
            tokens.to(spec["device"], non_blocking=True)

    shape = (images, (32 // patch_size) ** 2, 3 * patch_size**2)
    return epoch, epoch, {"tokens": shape}


def main() -> None:
    sizes = {"type": int, "default": 32, "metavar": "N", "help": "images in a batch (default: 32)"}
    args = measure.parse_args(__doc__, ["2", "4", "8"], ["4", "8"], repeats=5, batch_size=sizes)
    heading = measure.Heading("torchvision", "numpy", "pillow")
    widths = (24, 26, 24)
    for patch_size in map(int, args.cases):
        common = {"patch_size": patch_size, "batch_size": args.batch_size, "device": args.device}
        contestants = measure.by_turns([{"name": name, **common} for name in IMAGES], args.repeats)
        heading.show(contestants[0])
        print(f"Patches of {patch_size} x {patch_size} pixels, batches of {args.batch_size}, one process;", end=" ")
        print(f"medians of {args.repeats} alternating runs (range)")
        measure.print_row(("", "images a second", "times as many"), widths)
        rates = {
            name: [IMAGES[name] / seconds for seconds in contestant.seconds]
            for name, contestant in zip(IMAGES, contestants, strict=True)
        }
        times = [a / b for a, b in zip(rates[OURS], rates[PER_IMAGE], strict=True)]
        measure.print_row((OURS, measure.spread(rates[OURS], ",.0f"), measure.spread(times, ".1f")), widths)
        measure.print_row((PER_IMAGE, measure.spread(rates[PER_IMAGE], ",.0f")), widths)
        print(f"At least 20 times as many; median {statistics.median(times):.1f}\n")


if __name__ == "__main__":
    measure.serve(build)
    main()
