"""Cost of learning without labels: a training step of --task reconstruct against one of --task classification.

    python benchmarks/hidden_tokens.py
    python benchmarks/hidden_tokens.py --cases tiny base --device cuda

One sample of 50,176 tokens of 32 channels, of which a reconstruct step hides 25 %: the encoder passes over them, and
their contents are answered to queries of their positions. A step is forward, loss, backward, clipping and fused AdamW,
in float32. The cases are presets of the model.
"""

import statistics

import measure

TOKENS, CHANNELS, RATIO = 50_176, 32, 0.25


def build(spec: measure.Spec) -> tuple[measure.Step, measure.Step, measure.Spec]:
    import torch

    from perceiver_model import create_perceiver_model

    torch.manual_seed(0)
    device, outputs, head = spec["device"], 5, "mean"
    if spec["task"] == "reconstruct":
        outputs, head = CHANNELS, "hidden"
    model = create_perceiver_model({"series": {"input_dim": CHANNELS}}, outputs, spec["size"], head=head)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(1, TOKENS, CHANNELS, device=device)
    label = torch.zeros(1, dtype=torch.long, device=device)

    def reconstruct(x: torch.Tensor) -> None:
        """As measure.training_step."""
        length = x.size(1)
        numbers = torch.randperm(length, device=device)[: round(RATIO * length)].sort().values[None]  # (1, O)
        answers = model(x, hidden={"series": numbers})["series"]  # (1, O, C)
        (answers - x[:, numbers[0]]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def classify(x: torch.Tensor) -> None:
        measure.training_step(model, optimizer, x, label)

    step = reconstruct if spec["task"] == "reconstruct" else classify
    return lambda: step(x[:, :16]), lambda: step(x), {}


def main() -> None:
    args = measure.parse_args(__doc__, ["tiny", "small", "base", "large"], ["base"], repeats=5)
    heading, widths = measure.Heading(), (8, 16, 22, 8)
    for size in args.cases:
        specs = [{"task": task, "size": size, "device": args.device} for task in ("classification", "reconstruct")]
        contestants = measure.by_turns(specs, args.repeats)
        heading.show(contestants[0])
        measure.print_row(("preset", "task", "seconds (range)", "GiB"), widths)
        for spec, contestant in zip(specs, contestants, strict=True):
            cells = size, spec["task"], measure.spread(contestant.seconds), f"{contestant.memory / measure.GIB:.3f}"
            measure.print_row(cells, widths)
        classified, reconstructed = contestants
        times = measure.ratios(reconstructed, classified)
        memory = reconstructed.memory / classified.memory
        print(f"reconstruct over classification: {statistics.median(times):.2f} times the time "
              f"({min(times):.2f}-{max(times):.2f}), {memory:.2f} times the memory")  # fmt: skip


if __name__ == "__main__":
    measure.serve(build)
    main()
