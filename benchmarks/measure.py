"""What the benchmarks share: a process for each contestant, runs by turns, seconds, peak memory, the heading.

A contestant runs in a process of its own that imports only what it needs. There it is built and warmed up on a small
input, so that gradients, optimizer states and the buffers of the libraries exist. What its process occupies then is
called idle. Its first full run measures memory, the highest occupation above idle, and is the warm-up of the timed
runs (and compiles, where something is compiled). These are made by turns, A B A B, so that a change in the load of the
machine meets all alike, and figures are compared turn by turn.

Memory is the resident memory of the process on a CPU (VmHWM of Linux, reset before the run; where it cannot be reset,
the growth of ru_maxrss, which misses what stays below an earlier peak) and what torch has allocated on CUDA.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

GIB = 2**30
Spec = dict[str, Any]  # what a contestant is made from, plain values
Step = Callable[[], Any]  # one run


def parse_args(text: str | None, cases: Sequence[str], chosen: Sequence[str], repeats: int, **flags: dict) -> Any:
    """The command line: --device, --repeats, --cases of `cases` (default `chosen`), and `flags` (name: options)."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--repeats", type=_positive, default=repeats, help=f"timed turns (default: {repeats})")
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=cases,
        default=list(chosen),
        metavar="CASE",
        help=f"of {', '.join(cases)} (default: {', '.join(chosen)})",
    )
    for name, options in flags.items():
        parser.add_argument(f"--{name}", **options)
    return parser.parse_args()


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


# --- In the process of a contestant ----------------------------------------------------------------------------------


def serve(build: Callable[[Spec], tuple[Step, Step, Spec]]) -> None:
    """Where this process was started for a contestant, be that contestant and exit; otherwise do nothing.

    Args:
        build: makes (warm-up, run, facts) from the contestant's spec; facts are plain values to print.
    """
    if len(sys.argv) != 3 or sys.argv[1] != "--contestant":
        return
    answers = os.fdopen(os.dup(1), "w")  # what libraries print must not be taken for an answer
    os.dup2(2, 1)
    spec = json.loads(sys.argv[2])
    import torch

    device = torch.device(spec["device"])
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    warm_up, run, facts = build(spec)
    warm_up()
    facts |= {"memory": peak_memory(run, device), "threads": torch.get_num_threads(), "device": device_name(device)}
    print(json.dumps(facts), file=answers, flush=True)
    for _ in sys.stdin:  # a line asks for a run
        print(json.dumps(seconds(run, device)), file=answers, flush=True)
    sys.exit()


def seconds(run: Step, device: Any) -> float:
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def peak_memory(run: Step, device: Any) -> float:
    """The highest occupation during a run above that before it, in bytes."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        idle = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - idle
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back to the system, and counts if used again
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        idle = _status("VmRSS")
        run()
        return _status("VmHWM") - idle
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle)


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def device_name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores"


def training_step(model: Any, optimizer: Any, x: Any, label: Any, dtype: Any = None) -> None:
    """A step of train.py without its data loading and logging; autocast to dtype if that is not float32."""
    import torch
    import torch.nn.functional as F

    with torch.autocast(x.device.type, dtype, enabled=dtype not in (None, torch.float32)):
        loss = F.cross_entropy(model(x), label)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# --- In the process that was called ----------------------------------------------------------------------------------


class Contestant:
    """A process of the running script that measures one thing; `launcher`, words after `python`, starts it.

    Attributes:
        seconds: of the timed runs so far.
        memory: peak above idle, bytes; None where it was not measured.
        facts: what `build` told about it.
    """

    def __init__(self, launcher: Sequence[str] = (), **spec: Any):
        command = [sys.executable, *launcher, sys.argv[0], "--contestant", json.dumps(spec)]
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        self.facts = self._answer()
        self.memory = self.facts.get("memory")
        self.seconds: list[float] = []

    def run(self) -> None:
        print(file=self.process.stdin, flush=True)
        self.seconds.append(self._answer())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a contestant ended with status {self.process.wait()}: {self.process.args[-1]}")
        return json.loads(line)


def by_turns(specs: Sequence[Spec], repeats: int) -> list[Contestant]:
    """Build the contestants, one after another, let each run once a turn, and end them."""
    contestants = [Contestant(**spec) for spec in specs]
    for _ in range(repeats):
        for contestant in contestants:
            contestant.run()
    for contestant in contestants:
        contestant.close()
    return contestants


class Heading:
    """Prints machine and versions, once, when the first contestant has told on what it runs."""

    def __init__(self, *packages: str):
        self.packages, self.printed = ("torch", *packages), False

    def show(self, contestant: Contestant) -> None:
        if self.printed:
            return
        self.printed = True
        facts = contestant.facts
        versions = ", ".join(f"{package} {version(package)}" for package in self.packages)
        print(f"Machine: {facts['device']}, {facts['threads']} threads, {platform.system()} {platform.machine()}")
        print(f"Versions: Python {platform.python_version()}, {versions}")
        if hasattr(os, "getloadavg"):
            print(f"Load average now, this benchmark included: {os.getloadavg()[0]:.1f}")
        print(flush=True)


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median and range: '1.52 (1.48-1.60)'."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def ratios(above: Contestant, below: Contestant) -> list[float]:
    """Seconds over seconds, turn by turn."""
    return [a / b for a, b in zip(above.seconds, below.seconds, strict=True)]


def print_row(cells: Sequence[object], widths: Sequence[int]) -> None:
    """A row of a table, the first cell to the left and the others to the right."""
    first, *others = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False)]
    print("  ".join([first.strip().ljust(widths[0]), *others]), flush=True)
