"""What a training step costs on many GPUs, on paper: computation, gradient bytes, all-reduce, efficiency.

    python benchmarks/cost_model.py
    python benchmarks/cost_model.py --tokens 50176 --channels 3 --batch 8
    python benchmarks/cost_model.py --peak 312 --nvlink 300 --nic 25 --gpus 8 64

Nothing is measured here but what is counted: the parameters of the presets, and the FLOPs of their layers, which
tests/test_cost_model.py compares with torch's counter. Everything else is an assumption that a flag can change:

- A GPU has --peak TFLOP/s (H100 SXM, bf16, dense: 989), of which a step uses --utilisation.
- Training: each product costs twice as much again in the backward pass, fused attention 2.5 times (it recomputes).
- Gradients are float32. DistributedDataParallel sends them in buckets of 25 MiB while the backward pass still runs; the
  last bucket is ready when it ends. Buckets come at even distances.
- An all-reduce of V bytes over n GPUs takes the shorter of
      ring  2 (n - 1) / n  V / bandwidth + 2 (n - 1) latency        tree  2 V / bandwidth + 2 log2(n) latency
  per bucket. The bandwidth is --nvlink GB/s within a machine of 8 GPUs; between machines at most that of their --nics
  network cards of --nic GB/s together; of both --efficiency is reached. The latency of a hop is --latency microseconds.
- Every GPU computes --batch samples, whatever their number is (--batch_size of train.py is that times the GPUs).
- A parameter takes 16 bytes on every GPU: weight 4, gradient 4, AdamW 8. Sharding (FSDP2) divides them by the number
  of GPUs and sends half as much again: the weights are gathered in both passes, the gradients scattered.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from perceiver_model import create_perceiver_model  # noqa: E402

PRESETS = ("small", "base", "large")
BUCKET = 25 * 2**20
STATE = 16  # bytes of a parameter: weight, gradient, AdamW's two moments, float32


class Work(NamedTuple):
    """FLOPs (two for a multiply-add) of a forward pass over a batch: in matrix products, and inside attention."""

    products: float
    attention: float

    @property
    def forward(self) -> float:
        return self.products + self.attention

    @property
    def backward(self) -> float:
        return 2 * self.products + 2.5 * self.attention


def build(preset: str, channels: int, tokens: int, classes: int) -> Any:
    """A preset for data of so many channels, without memory for its weights; square images where tokens allow it."""
    side = math.isqrt(tokens)
    with torch.device("meta"):
        return create_perceiver_model(channels, classes, preset, grid_shape=(side, side) if side**2 == tokens else None)


def forward_work(model: Any, batch: int, tokens: int) -> Work:
    """B samples of L tokens and, with positions, C channels; N latents of width D; attention of width E, H heads."""
    encoder, products, attention = model.encoder, 0.0, 0.0
    latents, width = encoder.latents.shape
    queries = 1  # the first queries are the same for every sample
    for repeat, depth in enumerate(encoder.depths):
        block = encoder.cross_attention[min(repeat, len(encoder.cross_attention) - 1)]
        inner, channels = block.attention.key.weight.shape  # E, C
        products += 2 * queries * latents * width * inner  # queries
        if block.attention._folding_is_cheaper(latents, torch.empty(batch, tokens, channels, device="meta")):
            padded = channels + -channels % 8
            products += 2 * latents * inner * padded * (queries + batch)  # folded key, folded value
            attention += 4 * batch * block.attention.num_heads * latents * tokens * padded
        else:
            products += 4 * batch * tokens * channels * inner  # keys, values
            attention += 4 * batch * latents * tokens * inner
        products += 2 * batch * latents * inner * width  # output
        hidden = block.mlp[0].out_features
        products += 4 * batch * latents * width * hidden  # MLP
        for layer in encoder.self_attention[0 if encoder.share_weights else repeat][:depth]:
            products += 8 * batch * latents * width * width  # queries, keys, values, output
            products += 4 * batch * latents * width * layer.mlp[0].out_features
            attention += 4 * batch * latents * latents * width
        queries = batch
    return Work(products + 2 * batch * width * model.classifier.out_features, attention)


def all_reduce_seconds(volume: float, gpus: int, bandwidth: float, latency: float) -> float:
    """Of `volume` bytes at `bandwidth` bytes/s, with `latency` seconds a hop."""
    if gpus == 1:
        return 0.0
    ring = 2 * (gpus - 1) / gpus * volume / bandwidth + 2 * (gpus - 1) * latency
    tree = 2 * volume / bandwidth + 2 * math.log2(gpus) * latency
    return min(ring, tree)


def exposed_seconds(gradients: float, gpus: int, bandwidth: float, latency: float, backward: float) -> tuple:
    """(all-reduce of the gradients, the part of it that the backward pass of `backward` seconds does not hide)."""
    buckets = math.ceil(gradients / BUCKET)
    bucket = all_reduce_seconds(gradients / buckets, gpus, bandwidth, latency)
    # Bucket i is ready at backward i / buckets, and sent when the one before it is through
    end = 0.0
    for i in range(1, buckets + 1):
        end = max(end, backward * i / buckets) + bucket
    return buckets * bucket, end - backward


def step(model: Any, batch: int, tokens: int, gpus: int, args: argparse.Namespace) -> dict[str, float]:
    """The figures of a step: seconds, bytes, efficiency."""
    work = forward_work(model, batch, tokens)
    rate = args.peak * 1e12 * args.utilisation
    gradients = 4 * sum(parameter.numel() for parameter in model.parameters())
    network = args.nics * args.nic if gpus > 8 else math.inf
    bandwidth = min(args.nvlink, network) * 1e9 * args.efficiency
    compute, backward = (work.forward + work.backward) / rate, work.backward / rate
    reduce, exposed = exposed_seconds(gradients, gpus, bandwidth, args.latency * 1e-6, backward)
    return {
        "flops": work.forward + work.backward,
        "gradients": gradients,
        "compute": compute,
        "all_reduce": reduce,
        "exposed": exposed,
        "efficiency": compute / (compute + exposed),
    }


def enough_samples(model: Any, tokens: int, gpus: int, args: argparse.Namespace, efficiency: float = 0.9) -> int:
    """The fewest samples per GPU at which the exchange leaves this efficiency."""
    batch = 1
    while step(model, batch, tokens, gpus, args)["efficiency"] < efficiency:
        batch += 1
    return batch


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default, help in (
        ("tokens", int, 64, "of a sample (CIFAR-10 in patches of 4 x 4)"),
        ("channels", int, 48, "of a token, without positions"),
        ("classes", int, 10, "of the data"),
        ("batch", int, 32, "samples of a step on each GPU"),
        ("peak", float, 989.0, "TFLOP/s of a GPU"),
        ("utilisation", float, 0.35, "share of it that a step reaches"),
        ("nvlink", float, 450.0, "GB/s of a GPU to the others of its machine, one way"),
        ("nics", int, 8, "network cards of a machine"),
        ("nic", float, 50.0, "GB/s of a network card, one way"),
        ("efficiency", float, 0.8, "share of these bandwidths that an all-reduce reaches"),
        ("latency", float, 10.0, "microseconds of a hop"),
        ("memory", float, 80.0, "GB of a GPU"),
        ("activations", float, 0.5, "share of the memory that is left to activations"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{help} (default: {default})")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512], help="(default: 8 64 512)")
    return parser.parse_args(words)


def main() -> None:
    args = parse_args()
    print(f"{args.batch} samples of {args.tokens} tokens x {args.channels} channels (and positions) on each GPU\n")
    print("| preset | parameters | gradients | FLOP a GPU | computation ", end="")
    print("| GPUs | all-reduce | not hidden | efficiency | 90 % from |\n" + "|---" * 10 + "|")
    for preset in PRESETS:
        model = build(preset, args.channels, args.tokens, args.classes)
        for gpus in args.gpus:
            found = step(model, args.batch, args.tokens, gpus, args)
            cells = (
                preset, f"{found['gradients'] // 4:,}", f"{found['gradients'] / 1e6:.1f} MB",
                f"{found['flops'] / 1e12:.2f} T", f"{1e3 * found['compute']:.2f} ms", gpus,
                f"{1e3 * found['all_reduce']:.2f} ms", f"{1e3 * found['exposed']:.2f} ms", f"{found['efficiency']:.0%}",
                f"{enough_samples(model, args.tokens, gpus, args)} samples",
            )  # fmt: skip
            print(f"| {' | '.join(map(str, cells))} |")
    limit = args.memory * 1e9 * (1 - args.activations) / STATE
    large = build("large", args.channels, args.tokens, args.classes)
    parameters = sum(parameter.numel() for parameter in large.parameters())
    width = large.encoder.latents.size(1) * math.sqrt(limit / parameters)
    print(f"\nState of large on every GPU: {parameters * STATE / 1e9:.2f} GB at {STATE} bytes a parameter.")
    print(f"Sharding is needed from {limit / 1e9:.1f} billion parameters on, {limit / parameters:.0f} times large: at")
    print(f"its depth a width of {width:,.0f}. {args.activations:.0%} of {args.memory:.0f} GB are left to activations.")


if __name__ == "__main__":
    main()
