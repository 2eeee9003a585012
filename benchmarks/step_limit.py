"""The training step of the base preset over the time of its bare matrix products and attention calls.

    python benchmarks/step_limit.py
    python benchmarks/step_limit.py --device cuda --cases cifar10 --amp bf16 --compile

The step is forward, cross-entropy, backward, clipping and fused AdamW, as in train.py without data loading and logging.

The limit is made of every matrix product and every attention call that one such step makes, forward and backward, and
of nothing else. They are recorded as an uncompiled step hands them to the kernels: aten mm, addmm, bmm, and
scaled_dot_product_attention and its backward. They are then called again, in the same order, on the very tensors they
were given, so shapes, layouts and values are the step's; addmm as mm, without its bias. What is not counted is what the
ratio shows: norms, GELU, biases, residuals, copies, casts, the loss, clipping, the optimizer, Python. The aim for
sequences in float32 is at most 1.10. The process of the limit holds all those tensors: 2 GiB for sequences.

The third row is one large square product in the same precision, as a measure of the rate that the machine can reach.
"""

import statistics
from typing import Any, NamedTuple

import measure

STEP, LIMIT, SQUARE = "step", "products and attention", "square product"
PRODUCTS = ("mm", "addmm", "bmm")
UNCOUNTED = ("baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "convolution", "_scaled_mm", "linear")


class Case(NamedTuple):
    batch: int
    tokens: int
    channels: int
    grid_shape: tuple[int, int] | None


CASES = {"sequences": Case(16, 200, 64, None), "cifar10": Case(32, 64, 48, (8, 8))}


def record(run: measure.Step) -> list[tuple[Any, tuple, dict]]:
    """The products and attention calls of a run: (operator, arguments, keyword arguments) each."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name, kwargs = func.overloadpacket.__name__, kwargs or {}
            if name == "addmm":
                calls.append((torch.ops.aten.mm.default, args[1:], {}))
            elif name in PRODUCTS or "scaled_dot_product" in name or "_attention_" in name:
                calls.append((func, args, kwargs))
            elif name in UNCOUNTED:
                raise RuntimeError(f"the step makes a product that is not counted, so the limit would be wrong: {func}")
            return func(*args, **kwargs)

    with Recorder():
        run()
    return calls


def multiply_adds(operator: Any, args: tuple) -> int:
    """Of a product, or of attention: 2 products forward, 5 backward."""
    name = operator.overloadpacket.__name__
    if name in PRODUCTS:
        return args[0].numel() * args[1].size(-1)
    backward = name.endswith("backward")
    queries, keys = args[1:3] if backward else args[:2]
    return (5 if backward else 2) * queries.numel() * keys.size(2)


def build(spec: measure.Spec) -> tuple[measure.Step, measure.Step, measure.Spec]:
    import torch

    from perceiver_model import create_perceiver_model

    case, device = CASES[spec["case"]], spec["device"]
    dtype = torch.bfloat16 if spec["amp"] == "bf16" else torch.float32
    torch.manual_seed(0)
    if spec["name"] == SQUARE:
        size = 8192 if device.startswith("cuda") else 2048
        a, b = torch.randn(2, size, size, device=device, dtype=dtype)
        return lambda: a @ b, lambda: a @ b, {"multiply_adds": size**3}

    model = create_perceiver_model(case.channels, 10, "base", grid_shape=case.grid_shape).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(case.batch, case.tokens, case.channels, device=device)
    label = torch.randint(10, (case.batch,), device=device)
    run_model = torch.compile(model) if spec["compile"] and spec["name"] == STEP else model

    def step() -> None:
        measure.training_step(run_model, optimizer, x, label, dtype)

    if spec["name"] == STEP:
        return step, step, {}
    calls = record(step)

    @torch.no_grad()
    def products() -> None:
        for operator, args, kwargs in calls:
            operator(*args, **kwargs)

    total = sum(multiply_adds(operator, args) for operator, args, _ in calls)
    return products, products, {"multiply_adds": total, "calls": len(calls)}


def main() -> None:
    flags = {
        "amp": {"choices": ("off", "bf16"), "default": "off", "help": "precision (default: off, float32)"},
        "compile": {"action": "store_true", "help": "compile the step's model"},
    }
    args = measure.parse_args(__doc__, list(CASES), ["sequences"], repeats=9, **flags)
    heading = measure.Heading()
    widths = (22, 22, 10, 10)
    for name in args.cases:
        case = CASES[name]
        common = {"case": name, "device": args.device, "amp": args.amp, "compile": args.compile}
        names = (STEP, LIMIT, SQUARE)
        contestants = measure.by_turns([{"name": contestant, **common} for contestant in names], args.repeats)
        step, limit, square = contestants
        heading.show(step)
        print(f"{name}: base, {case.batch} x {case.tokens} tokens x {case.channels} channels and positions;", end=" ")
        print(f"medians of {args.repeats} alternating runs (range)")
        measure.print_row(("", "seconds", "GFLOP/s", "of square"), widths)
        rates = []
        for contestant in contestants:
            work = square if contestant is square else limit
            rates.append(2e-9 * work.facts["multiply_adds"] / statistics.median(contestant.seconds))
        for label, contestant, rate in zip(names, contestants, rates, strict=True):
            cells = (label, measure.spread(contestant.seconds, ".4f"), f"{rate:,.0f}", f"{rate / rates[2]:.2f}")
            measure.print_row(cells, widths)
        speed = case.batch / statistics.median(step.seconds)
        print(f"Step over its {limit.facts['calls']} products and attention calls:", end=" ")
        print(f"{measure.spread(measure.ratios(step, limit), '.3f')}; {speed:,.1f} samples/s\n")


if __name__ == "__main__":
    measure.serve(build)
    main()
