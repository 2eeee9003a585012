"""Cost of long inputs: seconds and memory of a training step of the base preset, positions on, over the tokens.

    python benchmarks/long_input.py
    python benchmarks/long_input.py --cross_heads 1 --separate
    python benchmarks/long_input.py --cases 10000 100000 --repeats 9

One sample of 32 channels, to which the model adds the features of its positions. A step is forward, cross-entropy,
backward, clipping and fused AdamW, in float32. Idle is a process with parameters, optimizer states and data in place,
but no gradients (83 MiB). The exponents are the slopes of straight lines through log(seconds) and log(memory) over
log(tokens), by least squares, over the cases from 10,000 tokens on.
"""

import math
import statistics

import measure

TOKENS = ["1000", "2000", "5000", "10000", "20000", "50000", "100000", "200000", "500000", "1000000"]
CHANNELS = 32


def build(spec: measure.Spec) -> tuple[measure.Step, measure.Step, measure.Spec]:
    import torch

    from perceiver_model import MultiHeadAttention, create_perceiver_model

    if spec["separate"]:
        MultiHeadAttention._folding_is_cheaper = lambda *_: False
    torch.manual_seed(0)
    model = create_perceiver_model(CHANNELS, 5, "base", num_cross_attention_heads=spec["cross_heads"])
    model.to(spec["device"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(1, spec["tokens"], CHANNELS, device=spec["device"])
    label = torch.zeros(1, dtype=torch.long, device=spec["device"])
    return (
        lambda: measure.training_step(model, optimizer, x[:, :16], label),
        lambda: measure.training_step(model, optimizer, x, label),
        {"position_channels": model.modalities["input"].positions.num_channels},
    )


def exponent(tokens: list[int], costs: list[float]) -> float:
    return statistics.linear_regression([math.log(n) for n in tokens], [math.log(cost) for cost in costs]).slope


def main() -> None:
    heads = {"type": int, "default": 8, "metavar": "N", "help": "of the cross-attend (default: 8)"}
    separate = {"action": "store_true", "help": "the longest case also with keys and values made for every token"}
    args = measure.parse_args(__doc__, TOKENS, TOKENS, repeats=5, cross_heads=heads, separate=separate)
    tokens = sorted(map(int, args.cases))
    common = {"device": args.device, "cross_heads": args.cross_heads}
    specs = [{"tokens": n, "separate": False, **common} for n in tokens]
    if args.separate:
        specs.append({"tokens": tokens[-1], "separate": True, **common})
    contestants = measure.by_turns(specs, args.repeats)

    measure.Heading().show(contestants[0])
    channels = f"{CHANNELS} + {contestants[0].facts['position_channels']} channels"
    print(f"{channels}, cross-attention heads: {args.cross_heads}; medians of {args.repeats} alternating runs (range)")
    widths = (20, 22, 18, 8)
    measure.print_row(("tokens", "seconds", "microseconds/token", "GiB"), widths)
    for spec, contestant in zip(specs, contestants, strict=True):
        label = f"{spec['tokens']:,}{' separate' if spec['separate'] else ''}"
        per_token = 1e6 * statistics.median(contestant.seconds) / spec["tokens"]
        cells = (label, measure.spread(contestant.seconds, ".3f"), f"{per_token:.2f}")
        measure.print_row((*cells, f"{contestant.memory / measure.GIB:.3f}"), widths)
    print()
    if args.separate:
        *_, folded, other = contestants
        faster, less = measure.spread(measure.ratios(other, folded)), other.memory / folded.memory
        print(f"Folded against separate projections: {faster} times as fast, {less:.1f} times less memory")
    fitted = {n: contestant for n, contestant in zip(tokens, contestants, strict=False) if n >= 10_000}
    if len(fitted) > 1:
        time = exponent(list(fitted), [statistics.median(contestant.seconds) for contestant in fitted.values()])
        memory = exponent(list(fitted), [contestant.memory for contestant in fitted.values()])
        print(f"Exponents from {min(fitted):,} to {max(fitted):,} tokens (at most 1.05):", end=" ")
        print(f"seconds {time:.3f}, memory {memory:.3f}")


if __name__ == "__main__":
    measure.serve(build)
    main()
