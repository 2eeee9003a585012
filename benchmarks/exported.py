"""Which to take for predictions on a CPU: torch, a program of torch.export, or onnxruntime, in float32 and in int8.

    python benchmarks/exported.py
    python benchmarks/exported.py --cases 1 --size base

The model is that of digits (preset tiny, 16 tokens of 4 features, or --size), with untrained weights, which take as
long. A run is a number of calls one after another with a batch (the case) of whole images; seconds are per call.
"""

import statistics
import tempfile
from pathlib import Path

import measure

CASES = ["1", "64"]
KINDS = {"torch": "torch", "pt2": "torch.export", "onnx": "onnxruntime", "int8": "onnxruntime, int8"}
CALLS = 256  # samples of a run, in batches


def build(spec: measure.Spec) -> tuple[measure.Step, measure.Step, measure.Spec]:
    import torch

    import export
    from perceiver_model import create_perceiver_model

    torch.manual_seed(0)
    model = create_perceiver_model({"image": {"input_dim": 4, "grid_shape": (4, 4)}}, 10, spec["size"]).eval()
    x, mask = torch.randn(spec["batch"], 16, 4), torch.ones(spec["batch"], 16, dtype=torch.bool)
    if spec["kind"] == "torch":
        call = lambda: model(x)  # noqa: E731 (what a batch without padding is given in prediction)
    else:
        program = export.trace(model, attention=False)
        if spec["kind"] == "pt2":
            exported = program.module()
            call = lambda: exported(x, mask)  # noqa: E731
        else:
            data = export.to_onnx(model, program, False, "{}")
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "model.onnx")
                path.write_bytes(export.to_int8(data) if spec["kind"] == "int8" else data)
                session = export.OnnxModel(str(path), model).session
            feeds = {"input": x.numpy(), "mask": mask.numpy()}
            call = lambda: session.run(None, feeds)  # noqa: E731

    def run() -> None:
        with torch.inference_mode():
            for _ in range(max(1, CALLS // spec["batch"])):
                call()

    return run, run, {}


def main() -> None:
    size = {"choices": ("tiny", "small", "base", "large"), "default": "tiny", "help": "preset (default: tiny)"}
    args = measure.parse_args(__doc__, CASES, CASES, repeats=9, size=size)
    heading, widths = measure.Heading("onnxruntime"), (28, 26, 22)
    for case in args.cases:
        batch = int(case)
        specs = [{"device": "cpu", "kind": kind, "batch": batch, "size": args.size} for kind in KINDS]
        contestants = dict(zip(KINDS, measure.by_turns(specs, args.repeats), strict=True))
        heading.show(contestants["torch"])
        calls = max(1, CALLS // batch)
        print(f"Batches of {batch}, {args.size}; medians of {args.repeats} alternating runs of {calls} calls (range)")
        measure.print_row(("", "milliseconds a call", "times as fast"), widths)
        for kind, contestant in contestants.items():
            per_call = measure.spread([1000 * seconds / calls for seconds in contestant.seconds])
            faster = measure.spread(measure.ratios(contestants["torch"], contestant))
            measure.print_row((KINDS[kind], per_call, faster), widths)
        fastest = min(contestants, key=lambda kind: statistics.median(contestants[kind].seconds))
        print(f"Take {KINDS[fastest]}.\n")


if __name__ == "__main__":
    measure.serve(build)
    main()
