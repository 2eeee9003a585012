"""Random changes to training series and images that leave their class as it was. Each is a function of (seed, epoch,
sample).

    change = SeriesAugmentation(shift=0.1, scale=0.1)
    change(tokens, random_stream("series augmentation", seed, epoch, number))      # (L, C) -> (L, C)
    ImageAugmentation(flip=True)(images, streams)                                  # (B, H, W, C) -> (B, H, W, C)

Shifts and flips of images, which are made a batch at a time, are in adapters.py; mixtures of two samples of any
modality, whose classes are mixed with them, in batches.py (`Mixed`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from config import Settings

WARP_KNOTS = 5  # points of time between which the speed of a warped series changes linearly


@dataclass(frozen=True)
class SeriesAugmentation:
    """What is done to a standardised series. Its length stays the same.

    All changes of time are one map from the new steps to places between the old ones, so a series is interpolated
    once, linearly. Um, Pfister et al. 2017 (wearable sensors) and Le Guennec et al. 2016 describe them.

    Args:
        shift: largest shift in time, either way, as a share of the length; the first or last value is held.
        circular: the series is closed: it starts anywhere, and what a shift moves out comes in at the other end.
        warp: standard deviation of the logarithm of the speed, at each of WARP_KNOTS points.
        crop: largest share cut off, at both ends together; what is left is stretched to the whole length.
        scale: standard deviation of the logarithm of a factor of all values.
        jitter: standard deviation of noise on each value [standard deviations of the channel].
        share: of the series that are changed, drawn anew in each epoch; the others stay as they are.
    """

    shift: float = 0.0
    circular: bool = False
    warp: float = 0.0
    crop: float = 0.0
    scale: float = 0.0
    jitter: float = 0.0
    share: float = 1.0

    def __bool__(self) -> bool:
        return any(value for name, value in vars(self).items() if name != "share")

    def __str__(self) -> str:
        """For the first lines of a run."""
        parts = [f"{n} {value:g}" for n, value in vars(self).items() if value and n not in ("circular", "share")]
        parts += [f"{self.share:.0%} of them"] * (self.share < 1)
        return ", ".join(["started anywhere (circular)"] * self.circular + parts) if self else "not changed"

    def places(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Where among the old steps each new one lies, float64 (length,); outside 0 to length - 1 where shifted."""
        speeds = np.exp(self.warp * rng.standard_normal(WARP_KNOTS))
        left, start, offset, turn = rng.random(4)
        last = length - 1
        between = (np.arange(last) + 0.5) / max(1, last) * (WARP_KNOTS - 1)  # of the steps, in knots
        time = np.concatenate([[0.0], np.cumsum(np.interp(between, np.arange(WARP_KNOTS), speeds))])
        places = time * (last / time[-1]) if last else time
        left = 1 - self.crop * left
        places = places * left + start * (1 - left) * last
        places = places + (2 * offset - 1) * self.shift * length
        return (places + turn * length) % length if self.circular else places

    def __call__(self, tokens: Tensor, rng: np.random.Generator, flagged: tuple[int, ...] = ()) -> Tensor:
        """tokens float32 (L, C + flags) of a `SeriesAdapter`, whose channels `flagged` have a flag each -> the same.

        A channel that lacks values takes the nearest step instead of interpolating, and a missing value stays one.
        """
        return self.with_labels(tokens, None, rng, flagged)[0]

    def with_labels(
        self, tokens: Tensor, labels: np.ndarray | None, rng: np.random.Generator, flagged: tuple[int, ...] = ()
    ) -> tuple[Tensor, np.ndarray | None]:
        """The same, and the labels of the new steps where each step has one (L,): those of the nearest ones."""
        if self.share < 1 and rng.random() >= self.share:
            return tokens, labels
        values, channels = tokens.double().numpy(), tokens.size(1) - len(flagged)
        length = len(values)
        if self.shift or self.circular or self.warp or self.crop:
            places = self.places(length, rng)
            low = np.floor(places).astype(int)
            share = (places - low)[:, None]
            steps = [low % length, (low + 1) % length]
            if not self.circular:
                steps = [np.minimum(np.maximum(step, 0), length - 1) for step in (low, low + 1)]
            moved = values[steps[0]] * (1 - share) + values[steps[1]] * share
            if whole := [*flagged, *range(channels, values.shape[1])]:
                moved[:, whole] = np.where(share < 0.5, *(values[step][:, whole] for step in steps))
            values = moved
            if labels is not None:
                labels = np.where(share[:, 0] < 0.5, labels[steps[0]], labels[steps[1]])
        missing = np.zeros((length, channels), bool)
        missing[:, list(flagged)] = values[:, channels:] > 0
        factor = np.exp(self.scale * rng.standard_normal())
        changed = values[:, :channels] * factor
        if self.jitter:
            changed += self.jitter * rng.standard_normal((length, channels))
        changed[missing] = 0
        return torch.from_numpy(np.concatenate([changed, values[:, channels:]], 1, dtype=np.float32)), labels


def series_augmentation(settings: Settings, split: str) -> SeriesAugmentation:
    """What is done to the series of a split."""
    if split != "train" or not settings.augment or settings.cache_features:
        return SeriesAugmentation()
    return SeriesAugmentation(**{name: getattr(settings, f"series_{name}") for name in vars(SeriesAugmentation())})


# --- Images ----------------------------------------------------------------------------------------------------------

SMALLEST_CROP = 0.5  # share of the area; 0.08 as for ImageNet leaves little of a small image
ERASED = 0.25  # probability that a rectangle is erased (Zhong et al. 2017)
OPERATIONS, MAGNITUDE = 2, 9  # of RandAugment (Cubuk et al. 2019)


class ImageAugmentation:
    """The strong recipe for images, of torchvision: a random resized crop, a mirror image, RandAugment, and an erased
    rectangle.

    Args:
        flip: whether half of the images are mirrored.
        white: the largest value of a pixel, which RandAugment is told as 255.
    """

    def __init__(self, flip: bool, white: int = 255):
        self.flip, self.white = flip, white

    def __str__(self) -> str:
        """For the first lines of a run."""
        mirrored = "half of them mirrored (--no_flip)" if self.flip else "not mirrored (--flip)"
        return f"cropped, {mirrored}, RandAugment, a rectangle erased in {ERASED:.0%} of them"

    def __call__(self, images: np.ndarray, streams: Sequence[np.random.Generator]) -> np.ndarray:
        """Images uint8 (B, H, W, C), each with random numbers of its own. Those of torch stay as they were."""
        scaled = torch.from_numpy(images).permute(0, 3, 1, 2)  # (B, C, H, W)
        if self.white != 255:
            scaled = (scaled.float() * (255 / self.white)).round().to(torch.uint8)
        change = self.transforms(*images.shape[1:3])
        with torch.random.fork_rng(devices=[]):  # which torchvision draws from
            changed = torch.empty_like(scaled)
            for number, rng in enumerate(streams):
                torch.manual_seed(int(rng.integers(2**63)))
                changed[number] = change(scaled[number])
        if self.white != 255:
            changed = (changed.float() * (self.white / 255)).round().to(torch.uint8)
        return np.ascontiguousarray(changed.permute(0, 2, 3, 1).numpy())

    def transforms(self, height: int, width: int) -> Callable[[Tensor], Tensor]:
        """For an image uint8 (C, H, W)."""
        from torchvision.transforms import v2

        bilinear = v2.InterpolationMode.BILINEAR
        return v2.Compose([
            v2.RandomResizedCrop((height, width), (SMALLEST_CROP, 1.0), interpolation=bilinear, antialias=True),
            v2.RandomHorizontalFlip(0.5 * self.flip),
            v2.RandAugment(OPERATIONS, MAGNITUDE, interpolation=bilinear),
            v2.RandomErasing(ERASED),
        ])  # fmt: skip
