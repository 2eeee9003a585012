"""Throughput of a training step against the number of processes that share it.

    python benchmarks/processes.py
    python benchmarks/processes.py --device cuda --processes 1 2 4 8 --cases base large --batch 256

A contestant is a group of processes started by torchrun: gloo on a CPU, nccl on CUDA with a card each. A step is that
of train.py without data loading and logging, float32: forward, cross-entropy, backward with the exchange of the
gradients, clipping, fused AdamW, on random CIFAR-10 batches (64 tokens of 48 channels). Each process computes with
--threads threads.

    same batch    --batch samples over all processes, what --batch_size means: every process has less to do
    same share    --batch samples in every process: the batch grows with them
    separate      as many single processes at the same moment, --batch samples each, that exchange nothing: what a CPU
                  can give, whose cores share memory and power, and which others use too

Efficiency is samples/s over those of the separate ones; on CUDA, over those of one process times their number.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import measure

STEPS = 4  # in a timed run
TOKENS, CHANNELS, GRID = 64, 48, (8, 8)


def contestant() -> None:
    """In a process of a group: make a run for every line that the first one reads, and tell its seconds."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import distributed
    from perceiver_model import create_perceiver_model

    spec = json.loads(sys.argv[2])
    torch.set_num_threads(spec["threads"])
    with distributed.processes():
        rank, size = distributed.rank(), distributed.size()
        device = distributed.own_device(torch.device(spec["device"]))
        torch.manual_seed(0)
        model = create_perceiver_model(CHANNELS, 10, spec["preset"], grid_shape=GRID).to(device).train()
        replica = distributed.replicate(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        own = len(range(spec["batch"])[rank::size]) if spec["shared"] else spec["batch"]
        x = torch.randn(own, TOKENS, CHANNELS, device=device)
        label = torch.randint(10, (own,), device=device)

        def run(steps: int = STEPS) -> None:
            for _ in range(steps):
                measure.training_step(replica, optimizer, x, label)

        run()
        facts = {"threads": torch.get_num_threads(), "device": measure.device_name(device)}
        print(json.dumps(facts), flush=True)
        while distributed.broadcast(sys.stdin.readline):
            distributed.barrier()
            run(1)  # warms up after the wait for the others' turns
            distributed.barrier()
            seconds = measure.seconds(run, device)
            print(json.dumps(max(distributed.gather(seconds) or [seconds])), flush=True)


class Groups:
    """Groups of processes that run at the same moment; usually there is one."""

    def __init__(self, processes: int, separate: bool, **spec: Any):
        size, count = (1, processes) if separate else (processes, 1)
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}")
        self.groups = [measure.Contestant(launcher, **spec) for _ in range(count)]
        self.seconds: list[float] = []

    def run(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(measure.Contestant.run, self.groups))
        self.seconds.append(max(group.seconds[-1] for group in self.groups))


def main() -> None:
    number = {"type": int, "default": 1}
    flags = {
        "processes": {"type": int, "nargs": "+", "default": [1, 2], "help": "sizes of the groups (default: 1 2)"},
        "batch": {**number, "default": 32, "help": "samples (default: 32)"},
        "threads": {**number, "help": "of a process (default: 1)"},
    }
    args = measure.parse_args(__doc__, ["tiny", "small", "base", "large"], ["tiny", "small"], 5, **flags)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    heading = measure.Heading()
    widths = (12, 10, 6, 22, 20, 18)
    for preset in args.cases:
        kinds = [("same batch", n) for n in args.processes]
        more = ("same share", "separate") if args.device == "cpu" else ("same share",)
        kinds += [(kind, n) for kind in more for n in args.processes if n > 1]
        common = {"preset": preset, "device": args.device, "batch": args.batch, "threads": args.threads}
        rows = {
            (kind, n): Groups(n, kind == "separate", shared=kind == "same batch", **common) for kind, n in kinds
        }
        for _ in range(args.repeats):
            for row in rows.values():
                row.run()
        for row in rows.values():
            for group in row.groups:
                group.close()
        base = rows[kinds[0]]
        heading.show(base.groups[0])
        print(f"{preset}, {args.batch} samples; medians of {args.repeats} alternating runs of {STEPS} steps (range)")
        measure.print_row(("", "processes", "batch", "samples/s", "times the first row", "efficiency"), widths)
        for (kind, count), row in rows.items():
            batch = args.batch * (1 if kind == "same batch" else count)
            speed = [STEPS * batch / seconds for seconds in row.seconds]
            gain = [batch / args.batch * ratio for ratio in measure.ratios(base, row)]
            limit = rows.get(("separate", count), base)
            most = [STEPS * args.batch * count / seconds for seconds in limit.seconds]
            efficiency = [a / b for a, b in zip(speed, most, strict=True)]
            cells = (kind, count, batch, measure.spread(speed, ",.1f"), measure.spread(gain))
            measure.print_row((*cells, measure.spread(efficiency)), widths)
        print()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contestant"]:
        contestant()
    else:
        main()
