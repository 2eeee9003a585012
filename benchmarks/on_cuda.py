"""Everything that has to be seen on a CUDA card, in one command that needs no network and writes each result at once.

    python benchmarks/on_cuda.py --minutes 9 --out on_cuda/
    python benchmarks/on_cuda.py --minutes 2 --out on_cuda/ --steps rates peers
    python benchmarks/on_cuda.py --device cpu --quick --out on_cpu/        # does the script itself work?

It takes these steps in order, each in a process of its own with a time limit that is a share of --minutes:

    checks    `pytest -m cuda`, and training through the real commands in bf16, fp16 and float32, with and without
              --compile: killed, resumed, evaluated with --analyze; two runs of one seed; torchrun on nccl
    rates     what the card can do: the rate of a large matrix product, the bandwidth of a copy
    presets   a training step of each preset, eager and compiled: samples/s, FLOP/s, share of the rate, peak memory
    peers     forward + backward against transformers and perceiver-pytorch, by turns
    folding   folded against separate projections over channels, heads and latents; the kernel that each shape takes
    loader    the share of a training step that waits for its batch

`results.jsonl` has a line for each result, `log.txt` what the steps printed, `summary.txt` the tables. What fails
costs its own result only, a step that runs out of time its remaining ones; the exit status is then 1.

A training step is that of train.py without its log: forward under autocast, cross-entropy, backward, clipping, fused
AdamW. FLOPs are those that torch counts for an eager step: products and attention, forward and backward. Seconds are
wall-clock time with the device synchronised before and after a turn, medians over the turns.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import compare_peers
import measure

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"checks": 0.4, "rates": 0.03, "presets": 0.21, "peers": 0.14, "folding": 0.08, "loader": 0.14}
MARK = "PERCEIVER_ON_CUDA"  # in the environment of every process of a step
PRECISIONS = ("bf16", "fp16", "off")
MODES = ("eager", "compiled")  # compiled: as train.py --compile does

# name: (preset, samples, tokens, features, arguments of the model)
CIFAR10 = {"grid_shape": (8, 8)}
ONE_HEAD = {"num_cross_attention_heads": 1}
PRESETS = {
    "base, CIFAR-10": ("base", 512, 64, 48, CIFAR10),
    "base, 16 x 200 x 64": ("base", 16, 200, 64, {}),
    "base, 1 x 50,176 x 32": ("base", 1, 50_176, 32, {}),
    "base, 1 x 1,000,000 x 64, one head": ("base", 1, 1_000_000, 64, ONE_HEAD),
    "small, CIFAR-10": ("small", 512, 64, 48, CIFAR10),
    "large, CIFAR-10": ("large", 256, 64, 48, CIFAR10),
    "small, 16 x 200 x 64": ("small", 16, 200, 64, {}),
    "large, 16 x 200 x 64": ("large", 16, 200, 64, {}),
}
COMPILED = ("base, CIFAR-10", "base, 16 x 200 x 64", "base, 1 x 50,176 x 32", "large, CIFAR-10")
QUICK_PRESETS = {"tiny, 2 x 20 x 8": ("tiny", 2, 20, 8, {})}


class Run:
    """What a step is told: the device, how thorough to be, and where its results go."""

    def __init__(self, args: argparse.Namespace, step: str):
        self.device, self.quick, self.step, self.out = args.device, args.quick, step, Path(args.out)

    def report(self, **row: Any) -> None:
        """Write a result, at once."""
        with open(self.out / "results.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step, **row}) + "\n")
        print(self.step, json.dumps(row), flush=True)

    @contextmanager
    def attempt(self, **row: Any) -> Iterator[None]:
        """Report what fails in the block, such as running out of memory, and continue after it."""
        try:
            yield
        except Exception as error:  # each result stands for itself
            message = str(error).strip()
            self.report(**row, failed=f"{type(error).__name__}: {message.splitlines()[0] if message else ''}"[:300])
        finally:
            if self.device == "cuda":
                import torch

                torch.cuda.empty_cache()


# --- Checks ----------------------------------------------------------------------------------------------------------


def command(run: Run, *words: str, env: dict[str, str] | None = None) -> subprocess.Popen:
    """Start a Python command in the root of the project, its output in a file beside the results."""
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, list[str]]:
    """(exit status, the lines that it printed)."""
    output, _ = process.communicate()
    return process.returncode, output.strip().splitlines()


def log_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train_flags(run: Run, name: str, *flags: str) -> list[str]:
    folder = str(run.out / "runs" / name)
    data = "--dataset digits --epochs 8"
    if run.quick:
        data = "--dataset synthetic --num_samples 60 --seq_len_range 5 12 --d_model 16 --num_heads 2 --epochs 3"
    return [
        "train.py", *data.split(), "--device", run.device, "--checkpoint_dir", folder, "--log_dir", folder, *flags
    ]  # fmt: skip


def check_run(run: Run, amp: str, compiled: bool) -> None:
    """Train, kill after the first epoch, resume, evaluate."""
    name = f"{amp}{'_compiled' if compiled else ''}"
    folder, started = run.out / "runs" / name, time.monotonic()
    process = command(run, *train_flags(run, name, "--amp", amp, *(["--compile"] if compiled else [])))
    while process.poll() is None and not log_of(folder):
        time.sleep(0.05)
    killed = process.poll() is None
    process.kill()
    status, lines = finish(process)
    at = len(log_of(folder))
    row = {"check": f"train {name}", "killed_after_epoch": at if killed else None}
    if killed:
        status, lines = finish(command(run, "train.py", "--resume", str(folder / "last_model.pth")))
    if status == 0:
        row |= {"seconds": time.monotonic() - started, "validation": log_of(folder)[-1]["val_accuracy"]}
        row["closing"] = next(line for line in lines if "test accuracy" in line)
        model = str(folder / "best_model.pth")
        status, lines = finish(
            command(run, "inference.py", "--model_path", model, "--device", run.device, "--analyze",
                    "--output_dir", str(folder / "results"))
        )  # fmt: skip
    row |= {"status": status, "end": lines[-1][-300:] if lines else ""}
    run.report(**row)


def check_repeat(run: Run) -> None:
    """Two runs of one seed: by how much do the weights and the losses differ?"""
    import torch

    names = ("seed_first", "seed_second")
    ended = [finish(command(run, *train_flags(run, name, "--seed", "3", "--amp", "bf16"))) for name in names]
    if any(status for status, _ in ended):
        run.report(check="two runs of one seed", status=max(status for status, _ in ended), end=ended[0][1][-1][-300:])
        return
    weights = [torch.load(run.out / "runs" / name / "last_model.pth", weights_only=True, map_location="cpu")["model"]
               for name in names]  # fmt: skip
    largest = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
    logs = [log_of(run.out / "runs" / name) for name in names]
    run.report(
        check="two runs of one seed",
        status=0,
        largest_difference_of_weights=largest,
        losses=[[line["train_loss"] for line in log] for log in logs],
        validation=[log[-1]["val_accuracy"] for log in logs],
    )


def check_torchrun(run: Run) -> None:
    flags = train_flags(run, "torchrun", "--amp", "bf16")
    status, lines = finish(command(run, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", *flags))
    run.report(check="torchrun, one process", status=status, end=lines[-1][-300:] if lines else "")


def check_tests(run: Run) -> None:
    status, lines = finish(command(run, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests"))
    failures = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    run.report(check="pytest -m cuda", status=status, end=lines[-1][-300:] if lines else "", failures=failures)
    print("\n".join(lines), flush=True)


def warm_compiler(run: Run, step: str, case: str) -> None:
    """Compile what a later step times, so that it finds its kernels in the cache on the disk."""
    words = (__file__, "--step", step, "--out", str(run.out), "--device", run.device, "--warm_up", case)
    status, lines = finish(command(run, *words, env={"TORCHINDUCTOR_COMPILE_THREADS": "4"}))
    if status:
        print(f"compiling {case} for {step}:", *lines[-20:], sep="\n", flush=True)


def checks(run: Run) -> None:
    jobs: list[tuple] = [(check_tests,)]
    for amp in PRECISIONS:
        if amp == "fp16" and run.device == "cpu":
            continue
        jobs.append((check_run, amp, False))
        if not run.quick:
            jobs.append((check_run, amp, True))
    jobs += [(check_repeat,), (check_torchrun,)]
    if not run.quick:
        jobs += [(warm_compiler, "presets", case) for case in COMPILED]
        jobs += [(warm_compiler, "peers", case) for case in COMPILED_PEERS]

    def attempt(job: tuple) -> None:
        with run.attempt(check=" ".join(map(str, (job[0].__name__, *job[1:])))):
            job[0](run, *job[1:])

    with ThreadPoolExecutor(2 if run.quick else len(jobs)) as pool:
        list(pool.map(attempt, jobs))


# --- Rates -----------------------------------------------------------------------------------------------------------


def timed(function: Callable[[], Any], device: str, repeats: int, turns: int = 3) -> float:
    """Median seconds of a call, over turns of `repeats` calls each, after one call for warming up."""
    import torch

    def turn() -> None:
        for _ in range(repeats):
            function()

    function()
    return statistics.median(measure.seconds(turn, torch.device(device)) for _ in range(turns)) / repeats


def matmul_rate(device: str, quick: bool) -> float:
    """FLOP/s of a large square product of random bf16 numbers."""
    import torch

    size = 512 if quick else 8192
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / timed(lambda: a @ b, device, 2 if quick else 20)


def rates(run: Run) -> None:
    import torch

    facts = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if run.device == "cuda":
        facts |= {"cuda": torch.version.cuda, "capability": torch.cuda.get_device_capability()}
    run.report(device=measure.device_name(torch.device(run.device)), **facts)
    run.report(bf16_product_tflops=matmul_rate(run.device, run.quick) / 1e12)
    source = torch.empty(2**20 if run.quick else 2**31, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), run.device, 5)
    run.report(copy_gigabytes_per_second=2 * source.numel() / seconds / 1e9)
    one = torch.zeros(1, device=run.device)
    run.report(microseconds_a_launch=1e6 * timed(lambda: one.add_(1), run.device, 1000))


# --- Presets ---------------------------------------------------------------------------------------------------------


def in_mode(model: Any, mode: str, device: str) -> Any:
    import torch

    import train

    return train.compiled(model, torch.device(device)) if mode == "compiled" else model


def make_step(run: Run, case: str, mode: str) -> tuple[Callable[[], None], int]:
    """(a training step, its samples)."""
    import torch

    from perceiver_model import create_perceiver_model

    preset, samples, tokens, features, arguments = (QUICK_PRESETS if run.quick else PRESETS)[case]
    torch.manual_seed(0)
    model = create_perceiver_model(features, 10, preset, dropout=0.1, **arguments).to(run.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(samples, tokens, features, device=run.device)
    label = torch.randint(10, (samples,), device=run.device)
    run_model = in_mode(model, mode, run.device)
    return lambda: measure.training_step(run_model, optimizer, x, label, torch.bfloat16), samples


def presets(run: Run, warm_up: str | None = None) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    if warm_up:
        make_step(run, warm_up, "compiled")[0]()
        return
    rate = matmul_rate(run.device, run.quick)
    for case in QUICK_PRESETS if run.quick else PRESETS:
        flops = None
        for mode in MODES if case in COMPILED else ("eager",):
            with run.attempt(case=case, mode=mode):
                torch._dynamo.reset()
                step, samples = make_step(run, case, mode)
                if flops is None:
                    with FlopCounterMode(display=False) as counter:
                        step()
                    flops = counter.get_total_flops()
                for _ in range(2):  # graphs are recorded at the second step
                    step()
                memory = occupied(step) if run.device == "cuda" else 0
                seconds = timed(step, run.device, 1 if run.quick else 10)
                run.report(
                    case=case,
                    mode=mode,
                    milliseconds=1e3 * seconds,
                    samples_per_second=samples / seconds,
                    gflop=flops / 1e9,
                    tflops=flops / seconds / 1e12,
                    share_of_product=flops / seconds / rate,
                    peak_gib=memory / measure.GIB,
                    kernels=where_the_time_goes(step) if run.device == "cuda" else None,
                )
            step = None


def where_the_time_goes(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds on the card of products, attention and the rest of a step, and of its slowest other kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    totals = {"products": 0.0, "attention": 0.0, "other": 0.0}
    others = {}
    for event in profiled.key_averages():
        name, milliseconds = event.key, event.device_time_total / 3e3
        if re.search("flash|fmha|cudnn.*(sdpa|attention)|attention", name, re.I):
            totals["attention"] += milliseconds
        elif re.search("gemm|cutlass|nvjet|xmma|cublas|splitK", name, re.I):
            totals["products"] += milliseconds
        else:
            totals["other"] += milliseconds
            others[name[:80]] = round(milliseconds, 3)
    slowest = sorted(others.items(), key=lambda pair: -pair[1])[:8]
    return {name: round(value, 3) for name, value in totals.items()} | {"slowest": dict(slowest)}


def occupied(step: Callable[[], None]) -> int:
    """Bytes of CUDA memory at the height of a step, parameters and optimizer included."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


# --- Peers -----------------------------------------------------------------------------------------------------------


PEERS = {
    "ours": compare_peers.make_ours,
    compare_peers.TRANSFORMERS: compare_peers.make_transformers,
    compare_peers.LUCIDRAINS: compare_peers.make_lucidrains,
}
PEER_CASES = {**compare_peers.CASES, "images": compare_peers.Case(8, 50_176, 32, 8, {})}
QUICK_PEER_CASES = {"quick": compare_peers.Case(2, 20, 8, 8, {})}
COMPILED_PEERS = ("image",)


def peers(run: Run, warm_up: str | None = None) -> None:
    """The cases of compare_peers.py in bf16, all contestants in this process: torch counts CUDA's memory."""
    import torch
    import torch.nn.functional as F

    cases = QUICK_PEER_CASES if run.quick else PEER_CASES
    rounds = [(name, case, ("eager",)) for name, case in cases.items()]
    compiled = [(name, cases[name], MODES) for name in COMPILED_PEERS if name in cases]
    if warm_up:
        rounds, compiled = [], [(warm_up, cases[warm_up], ("compiled",))]
    for case_name, case, modes in rounds + compiled:
        contestants = [(name, mode) for mode in modes for name in PEERS]
        x = torch.randn(case.batch, case.tokens, case.channels, device=run.device)
        label = torch.randint(compare_peers.CLASSES, (case.batch,), device=run.device)
        steps, memory = {}, {}
        for name, mode in contestants:
            with run.attempt(case=case_name, name=name, mode=mode):
                model = in_mode(PEERS[name](case).to(run.device).train(), mode, run.device)

                def step(model: Any = model, x: Any = x, label: Any = label) -> None:
                    model.zero_grad(set_to_none=True)
                    with torch.autocast(run.device, torch.bfloat16):
                        loss = F.cross_entropy(model(x), label)
                    loss.backward()

                for _ in range(1 if warm_up else 3):  # graphs are recorded at the second run
                    step()
                model.zero_grad(set_to_none=True)
                if mode == "eager":  # the memory of a CUDA graph is all taken when it is recorded
                    memory[name] = measure.peak_memory(step, torch.device(run.device))
                steps[name, mode] = step
        if warm_up:
            return
        turns: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
        for _ in range(1 if run.quick else 5):
            for key, step in steps.items():
                turns[key].append(timed(step, run.device, 3, turns=1))
        for (name, mode), seconds in turns.items():
            row = {"case": case_name, "shape": str(case), "name": name, "mode": mode}
            row |= {"milliseconds": 1e3 * statistics.median(seconds)}
            row["range"] = [1e3 * min(seconds), 1e3 * max(seconds)]
            for own in MODES:
                if ours := turns.get(("ours", own)):
                    row[f"ours_{own}_is_times_as_fast"] = statistics.median(
                        other / mine for mine, other in zip(ours, seconds, strict=True)
                    )
            if mode == "eager":
                row |= {"gib": memory[name] / measure.GIB, "ours_takes_times_less": memory[name] / memory["ours"]}
            run.report(**row)
        steps.clear()
        model = step = None


# --- Folding ---------------------------------------------------------------------------------------------------------


def kernels_of(function: Callable[[], Any]) -> list[str]:
    """The attention operators that a call hands to torch: which of its kernels ran."""
    from torch.utils._python_dispatch import TorchDispatchMode

    names = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if "scaled_dot_product" in name or name == "_softmax":
                names.append(name.removeprefix("_scaled_dot_product_"))
            return func(*args, **(kwargs or {}))

    with Recorder():
        function()
    return list(dict.fromkeys(names))


def attention_step(
    run: Run, width: int, heads: int, latents: int, channels: int, batch: int, tokens: int, masked: bool, folded: bool
) -> Callable[[], None]:
    """Forward and backward of a cross-attend in bf16, one way or the other."""
    import torch

    from perceiver_model import MultiHeadAttention

    attention = MultiHeadAttention(width, heads, channels).to(run.device)
    attention._folding_is_cheaper = lambda *_: folded
    queries = torch.randn(1, latents, width, device=run.device, requires_grad=True)
    inputs = torch.randn(batch, tokens, channels, device=run.device, requires_grad=True)
    mask = None
    if masked:
        lengths = torch.linspace(tokens // 2, tokens, batch, device=run.device)
        mask = torch.arange(tokens, device=run.device) < lengths[:, None]

    def step() -> None:
        with torch.autocast(run.device, torch.bfloat16):
            attention(queries, inputs, mask).float().sum().backward()

    return step


def on_the_card_alone(step: Callable[[], None], device: str) -> Callable[[], None]:
    """The step as a CUDA graph, so that its time is the card's and not that of launching its kernels."""
    import torch

    if device == "cpu":
        return step
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def folding(run: Run) -> None:
    import torch

    from perceiver_model import create_perceiver_model

    models = [(32, 4, 8)] if run.quick else [(512, 8, 256), (512, 1, 256), (768, 12, 512), (128, 4, 32)]
    shapes = [(2, 20)] if run.quick else [(1, 50_176), (256, 64), (16, 200), (4, 50_176)]
    channel_counts = [8, 32] if run.quick else [16, 32, 64, 96, 128, 192, 256, 384]
    cases = [
        (*model, channels, *shape, masked)
        for model in models
        for shape in shapes
        for channels in channel_counts
        for masked in ((False, True) if model == models[0] and shape[0] > 1 else (False,))
    ]
    for case in cases:
        row = dict(zip(("width", "heads", "latents", "channels", "samples", "tokens", "masked"), case, strict=True))
        with run.attempt(**row):
            for way, folded in {"folded": True, "separate": False}.items():
                step = attention_step(run, *case, folded)
                row[f"{way}_kernels"] = kernels_of(step)
                row[f"{way}_ms"] = 1e3 * timed(on_the_card_alone(step, run.device), run.device, 5)
            run.report(**row)
    for case, (preset, samples, tokens, features, arguments) in (QUICK_PRESETS if run.quick else PRESETS).items():
        model = create_perceiver_model(features, 10, preset, **arguments).to(run.device)
        x = torch.randn(min(samples, 16), tokens, features, device=run.device)
        with run.attempt(case=case), torch.autocast(run.device, torch.bfloat16):
            run.report(case=case, kernels=kernels_of(lambda m=model, x=x: m(x)))


# --- Loader ----------------------------------------------------------------------------------------------------------


def loader(run: Run) -> None:
    """An epoch with its loader against the same steps on batches that already lie on the device, by turns."""
    import numpy as np
    import torch

    from adapters import ImageAdapter, ImageDataset
    from batches import create_dataloader, model_inputs
    from config import resolve
    from data_utils import load_splits
    from perceiver_model import MODEL_SIZES, PerceiverModel

    rng = np.random.default_rng(0)
    images = 512 if run.quick else 6_000
    adapter = ImageAdapter([32, 32, 3], 4, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
    pixels = rng.integers(256, size=(images, 32, 32, 3), dtype=np.uint8)
    cifar10 = ImageDataset(pixels, rng.integers(10, size=images), adapter, margin=4, flip=True)
    cases: dict[str, tuple[Any, dict, int, str]] = {}
    for name in ("digits", "synthetic"):
        splits, data = load_splits(resolve(flags={"dataset_type": name})[0])
        cases[f"{name}, tiny, 32"] = (splits["train"], data["features"], 32, "tiny")
    cases |= {
        "CIFAR-10-sized, small, 128": (cifar10, {"image": adapter.features}, 128, "small"),
        "CIFAR-10-sized, base, 512": (cifar10, {"image": adapter.features}, 512, "base"),
    }
    for case, (dataset, features, batch_size, preset) in cases.items():
        if run.quick and "base" in case:
            continue
        for mode in MODES if "digits" in case and not run.quick else ("eager",):
            with run.attempt(case=case, mode=mode):
                torch._dynamo.reset()
                batches = create_dataloader(
                    dataset, batch_size, shuffle=True, num_classes=10, pin_memory=run.device == "cuda"
                )
                model = PerceiverModel(features, 10, **MODEL_SIZES[preset]).to(run.device).train()
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
                run_model = in_mode(model, mode, run.device)

                def step(x: Any, mask: Any, label: Any, model: Any = model, optimizer: Any = optimizer,
                         run_model: Any = run_model) -> None:  # fmt: skip
                    with torch.autocast(run.device, torch.bfloat16):
                        loss = torch.nn.functional.cross_entropy(run_model(x, mask), label)
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

                def on_device(batch: dict) -> tuple:
                    return *model_inputs(batch, run.device), batch["label"].to(run.device, non_blocking=True)

                def epoch(source: Any, place: Callable) -> float:
                    def turn() -> None:
                        for batch in source:
                            step(*place(batch))

                    return measure.seconds(turn, torch.device(run.device))

                resident = [on_device(batch) for batch in batches]
                epoch(resident, lambda batch: batch)  # compiles
                turns = 1 if run.quick else 3
                pairs = [(epoch(batches, on_device), epoch(resident, lambda batch: batch)) for _ in range(turns)]
                run.report(
                    case=case,
                    mode=mode,
                    batches=len(resident),
                    milliseconds_a_batch=1e3 * statistics.median(a for a, _ in pairs) / len(resident),
                    milliseconds_without_loading=1e3 * statistics.median(b for _, b in pairs) / len(resident),
                    share_waited=statistics.median(1 - b / a for a, b in pairs),
                )


# --- The command -----------------------------------------------------------------------------------------------------

STEPS: dict[str, Callable[..., None]] = {
    function.__name__: function for function in (checks, rates, presets, peers, folding, loader)
}


def summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The results as aligned text, a table a step."""
    for step in STEPS:
        own = [{k: v for k, v in row.items() if k != "step"} for row in rows if row["step"] == step]
        if not own:
            continue
        yield f"\n{step}"
        for row in own:
            cells = []
            for key, value in row.items():
                if isinstance(value, float):
                    value = f"{value:.4g}"
                elif isinstance(value, list):
                    value = "[" + " ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value) + "]"
                cells.append(f"{key}={value}")
            yield "  " + "  ".join(cells)


def run_step(args: argparse.Namespace, step: str, limit: float) -> str | None:
    """Run a step in a process group of its own, for `limit` seconds at most. Returns what went wrong, if anything."""
    words = [sys.executable, __file__, "--step", step, "--out", args.out, "--device", args.device]
    words += ["--minutes", str(args.minutes), *(["--quick"] if args.quick else [])]
    mark = f"{os.getpid()} {step}"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with open(Path(args.out) / "log.txt", "a") as log:
        print(f"\n===== {step}, at most {limit:.0f} s, load {os.getloadavg()[0]:.1f}", file=log, flush=True)
        process = subprocess.Popen(words, stdout=log, stderr=log, env={**env, MARK: mark})
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"did not end within {limit:.0f} s"
        finally:
            end_all(mark)
    return f"ended with status {status}" if status else None


def end_all(mark: str) -> None:
    """Kill every process that a step has left, also those with a session of their own, by their environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}\0".encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:  # it has ended, or is another user's
            continue


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="for all steps together (default: 9)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, once each: to try the script itself")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS), metavar="STEP",
                        help=f"of {', '.join(STEPS)} (default: all)")  # fmt: skip
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)  # in the process of a step
    parser.add_argument("--warm_up", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = str(Path(args.out).resolve())
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.step:
        import torch

        torch.set_float32_matmul_precision("high")
        STEPS[args.step](Run(args, args.step), *([args.warm_up] if args.warm_up else []))
        return 0

    results = Path(args.out) / "results.jsonl"
    results.unlink(missing_ok=True)
    (Path(args.out) / "log.txt").unlink(missing_ok=True)
    failed, end = {}, time.monotonic() + 60 * args.minutes
    for number, step in enumerate(args.steps):
        started = time.monotonic()  # what a step leaves of its time is for those after it
        share = SHARES[step] / sum(SHARES[later] for later in args.steps[number:])
        problem = run_step(args, step, share * (end - started))
        print(f"{step}: {problem or 'done'}, {time.monotonic() - started:.0f} s", flush=True)
        if problem:
            failed[step] = problem
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    text = "\n".join([*summary(rows), *(f"\n{step}: {problem}" for step, problem in failed.items())])
    (Path(args.out) / "summary.txt").write_text(text + "\n")
    print(text)
    wrong = [row for row in rows if "failed" in row or row.get("status")]
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
