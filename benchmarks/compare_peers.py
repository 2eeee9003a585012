"""This Perceiver against those of transformers and of perceiver-pytorch: seconds and memory of forward + backward.

    python benchmarks/compare_peers.py
    python benchmarks/compare_peers.py --cases image million --repeats 3
    python benchmarks/compare_peers.py --cases fourier language --repeats 3

All are float32, without dropout. "fourier" and "language" are the published Perceivers of these names at their full
size, which both read from one folder with random weights: a forward pass in evaluation mode, and forward + backward. In
the other cases all have the width, heads, latents, layers and MLP ratio of the base preset, no position features, the
same raw tokens, and end in the mean over the latents and a linear classifier with cross-entropy. What differs there:

    transformers       queries, keys and values are as wide as the latents, as ours, but have biases
    perceiver-pytorch  its MLP is a GEGLU, whose first layer is twice as wide: 3 instead of 2 products of D x 4 D
    separate           ours, but with keys and values made for every token, where it folds their projections

Idle is a process with parameters, their gradients and data in place. "At least" is what this project has set itself to
reach: times as fast, times less memory.
"""

import tempfile
from typing import Any, NamedTuple

import measure

TRANSFORMERS, LUCIDRAINS, SEPARATE = "transformers", "perceiver-pytorch", "separate"
WIDTH, HEADS, LATENTS, LAYERS, MLP_RATIO, CLASSES = 512, 8, 256, 6, 4, 5  # the base preset


class Case(NamedTuple):
    batch: int
    tokens: int
    channels: int
    cross_heads: int
    peers: dict[str, tuple[float, ...]]  # to be reached: times as fast, times less memory

    def __str__(self) -> str:
        heads = "1 cross-attention head" if self.cross_heads == 1 else f"{self.cross_heads} cross-attention heads"
        return f"{self.batch} x {self.tokens:,} tokens x {self.channels} channels, {heads}"


CASES = {
    "batch": Case(16, 200, 64, 8, {TRANSFORMERS: (1.15,), LUCIDRAINS: ()}),
    "image": Case(1, 50_176, 32, 8, {TRANSFORMERS: (2.3, 15), LUCIDRAINS: (2.3, 15), SEPARATE: ()}),
    "one_head": Case(1, 50_176, 64, 1, {TRANSFORMERS: (2, 5), LUCIDRAINS: (2, 5), SEPARATE: ()}),
    "long": Case(1, 200_000, 32, 8, {LUCIDRAINS: (5, 30)}),
    "million": Case(1, 1_000_000, 32, 8, {SEPARATE: ()}),
}


PUBLISHED = {  # what is read; to be reached: times as fast, times less memory
    "fourier": ("1 image of 224 x 224 pixels", (1, 1.67)),
    "language": ("1 text of 2,048 bytes", (1,)),
}
PASSES = {"forward": "forward", "backward": "forward + backward"}


def make_ours(case: Case, separate: bool = False) -> Any:
    from perceiver_model import MultiHeadAttention, create_perceiver_model

    if separate:
        MultiHeadAttention._folding_is_cheaper = lambda *_: False
    return create_perceiver_model(
        case.channels, CLASSES, "base", num_cross_attention_heads=case.cross_heads, use_positions=False
    )


def make_transformers(case: Case) -> Any:
    from torch import nn
    from transformers import PerceiverConfig, PerceiverModel

    config = PerceiverConfig(
        num_latents=LATENTS,
        d_latents=WIDTH,
        d_model=case.channels,
        num_self_attends_per_block=LAYERS,
        num_self_attention_heads=HEADS,
        num_cross_attention_heads=case.cross_heads,
        qk_channels=WIDTH,
        v_channels=WIDTH,
        self_attention_widening_factor=MLP_RATIO,
        cross_attention_widening_factor=MLP_RATIO,
        attention_probs_dropout_prob=0.0,
    )

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.perceiver, self.norm = PerceiverModel(config), nn.LayerNorm(WIDTH)
            self.classifier = nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            return self.classifier(self.norm(self.perceiver(x).last_hidden_state).mean(1))

    return Classifier()


def make_lucidrains(case: Case) -> Any:
    from perceiver_pytorch import Perceiver

    return Perceiver(
        num_freq_bands=0,
        max_freq=1.0,
        fourier_encode_data=False,
        input_axis=1,
        input_channels=case.channels,
        num_classes=CLASSES,
        num_latents=LATENTS,
        latent_dim=WIDTH,
        depth=1,
        self_per_cross_attn=LAYERS,
        cross_heads=case.cross_heads,
        cross_dim_head=WIDTH // case.cross_heads,
        latent_heads=HEADS,
        latent_dim_head=WIDTH // HEADS,
    )


def build_published(spec: measure.Spec) -> tuple[measure.Step, measure.Step, measure.Spec]:
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    pixels, numbers = torch.randn(1, 3, 224, 224), torch.randint(262, (1, 2048))
    if spec["name"] == TRANSFORMERS:
        import parity

        model, x = parity.load_peer(spec["folder"]), pixels if spec["case"] == "fourier" else numbers
    else:
        from pretrained import load_pretrained

        model = load_pretrained(spec["folder"])
        x = pixels.flatten(2).mT.contiguous() if spec["case"] == "fourier" else numbers[..., None].float()
    x, training = x.to(spec["device"]), spec["pass"] == "backward"
    model.to(spec["device"]).train(training)
    label = torch.randint(262, (1 if spec["case"] == "fourier" else 2048,), device=spec["device"])

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.inference_mode(not training):
            logits = model(x)
        logits = logits if isinstance(logits, torch.Tensor) else logits.logits
        if training:
            F.cross_entropy(logits.flatten(0, -2), label).backward()

    return run, run, {"parameters": sum(p.numel() for p in model.parameters())}


def build(spec: measure.Spec) -> tuple[measure.Step, measure.Step, measure.Spec]:
    import torch
    import torch.nn.functional as F

    if spec["case"] in PUBLISHED:
        return build_published(spec)
    case, name = CASES[spec["case"]], spec["name"]
    torch.manual_seed(0)
    if name == TRANSFORMERS:
        model = make_transformers(case)
    elif name == LUCIDRAINS:
        model = make_lucidrains(case)
    else:
        model = make_ours(case, separate=name == SEPARATE)
    model.to(spec["device"]).train()
    x = torch.randn(case.batch, case.tokens, case.channels, device=spec["device"])
    label = torch.randint(CLASSES, (case.batch,), device=spec["device"])

    def run(x: torch.Tensor = x) -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), label).backward()

    return lambda: run(x[:, :16]), run, {"parameters": sum(p.numel() for p in model.parameters())}


WIDTHS = (18, 11, 19, 6, 19, 17, 9)
COLUMNS = ("parameters", "seconds", "GiB", "times as fast", "times less memory", "at least")


def compare(specs: list[measure.Spec], reach: list[tuple[float, ...]], repeats: int, title: str, heading: Any) -> None:
    """Run the contestants by turns and print a table; the first is ours, to which `reach` of the others is said."""
    ours, *peers = contestants = measure.by_turns(specs, repeats)
    heading.show(ours)
    print(f"{title}; medians of {repeats} alternating runs (range)")
    measure.print_row(("", *COLUMNS), WIDTHS)
    for spec, contestant, bounds in zip(specs, contestants, [(), *reach], strict=True):
        cells = [spec["name"], f"{contestant.facts['parameters']:,}", measure.spread(contestant.seconds)]
        cells += [f"{contestant.memory / measure.GIB:.3f}"]
        if contestant in peers:
            cells += [measure.spread(measure.ratios(contestant, ours)), f"{contestant.memory / ours.memory:.1f}"]
            cells += [", ".join(map(str, bounds))]
        measure.print_row(cells, WIDTHS)
    print()


def main() -> None:
    chosen = [name for name in CASES if name != "million"]
    args = measure.parse_args(__doc__, [*CASES, *PUBLISHED], chosen, repeats=5)
    heading = measure.Heading("transformers", "perceiver-pytorch")
    for name in args.cases:
        spec = {"case": name, "device": args.device}
        if name in CASES:
            case = CASES[name]
            specs = [spec | {"name": peer} for peer in ("ours", *case.peers)]
            compare(specs, list(case.peers.values()), args.repeats, f"{name}: {case}", heading)
            continue
        import parity

        what, reach = PUBLISHED[name]
        with tempfile.TemporaryDirectory() as folder:
            parity.write_published(name, folder, attention_probs_dropout_prob=0.0)
            for each, passes in PASSES.items():
                specs = [spec | {"name": peer, "folder": folder, "pass": each} for peer in ("ours", TRANSFORMERS)]
                compare(specs, [reach], args.repeats, f"{name}: {what}, {passes}", heading)


if __name__ == "__main__":
    measure.serve(build)
    main()
