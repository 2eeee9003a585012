"""A training step on a CPU in bfloat16, with short attention in float32 and without, against one in float32.

    python benchmarks/precision_on_cpu.py
    python benchmarks/precision_on_cpu.py --cases 16 1024 --size small

A batch of 32 sequences of so many tokens (the case) of 16 channels, preset tiny, or --size. Of a CPU without matrix
units for bfloat16 (AMX), for which train.py --amp auto takes float32, the figures say how much slower it would be.
"""

import measure

CASES = ["16", "64", "256", "1024"]
KINDS = {"float32": "float32", "bfloat16": "bfloat16, attention too", "mixed": "bfloat16"}


def build(spec: measure.Spec) -> tuple[measure.Step, measure.Step, measure.Spec]:
    import torch

    import perceiver_model

    if spec["kind"] == "bfloat16":
        perceiver_model.WIDTH_FOR_BFLOAT16 = perceiver_model.TOKENS_FOR_BFLOAT16 = 0
    torch.manual_seed(0)
    model = perceiver_model.create_perceiver_model({"series": {"input_dim": 16}}, 5, spec["size"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x, labels = torch.randn(32, spec["tokens"], 16), torch.arange(32) % 5
    dtype = torch.float32 if spec["kind"] == "float32" else torch.bfloat16

    def step() -> None:
        measure.training_step(model, optimizer, x, labels, dtype)

    return step, step, {}


def main() -> None:
    size = {"choices": ("tiny", "small", "base", "large"), "default": "tiny", "help": "preset (default: tiny)"}
    args = measure.parse_args(__doc__, CASES, CASES, repeats=9, size=size)
    heading, widths = measure.Heading(), (24, 26, 22)
    for case in args.cases:
        specs = [{"device": "cpu", "kind": kind, "tokens": int(case), "size": args.size} for kind in KINDS]
        contestants = measure.by_turns(specs, args.repeats)
        heading.show(contestants[0])
        print(f"32 x {case} x 16, {args.size}; medians of {args.repeats} alternating steps (range)")
        measure.print_row(("", "milliseconds a step", "times as fast"), widths)
        for kind, contestant in zip(KINDS.values(), contestants, strict=True):
            per_step = measure.spread([1000 * seconds for seconds in contestant.seconds])
            faster = measure.spread(measure.ratios(contestants[0], contestant))
            measure.print_row((kind, per_step, faster), widths)
        print()


if __name__ == "__main__":
    measure.serve(build)
    main()
