"""The script that measures on a CUDA card works from end to end, tried on a CPU with tiny sizes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ON_CUDA = ROOT / "benchmarks" / "on_cuda.py"
OUT = "FOLDER_OF_THE_TEST"  # in the environment of every process of a call


def call(out, *flags):
    command = [sys.executable, str(ON_CUDA), "--device=cpu", "--quick", f"--out={out}", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", OUT: str(out)}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    results = out / "results.jsonl"
    return result, [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


@pytest.mark.slow
def test_every_step_gives_its_results(tmp_path):
    result, rows = call(tmp_path, "--minutes=20")
    assert result.returncode == 0, result.stdout + (tmp_path / "log.txt").read_text()[-3000:]
    found = {step: [row for row in rows if row["step"] == step] for step in {row["step"] for row in rows}}
    assert found.keys() == {"checks", "rates", "presets", "peers", "folding", "loader"}
    assert not any("failed" in row for row in rows)
    checks = {row["check"]: row for row in found["checks"]}
    assert checks["train bf16"]["killed_after_epoch"] == 1 and "test accuracy" in checks["train bf16"]["closing"]
    assert checks["two runs of one seed"]["largest_difference_of_weights"] == 0
    assert {row["name"] for row in found["peers"]} == {"ours", "transformers", "perceiver-pytorch"}
    assert found["folding"][0]["folded_kernels"] and found["presets"][0]["gflop"] > 0
    summary = (tmp_path / "summary.txt").read_text()
    assert all(f"\n{step}\n" in summary for step in found)


def test_a_step_that_runs_out_of_time_leaves_no_process_and_is_named(tmp_path):
    result, _ = call(tmp_path, "--minutes=0.05", "--steps=checks")  # 3 s, and the training of the step needs more
    assert result.returncode == 1 and "checks: did not end within" in result.stdout
    end = time.monotonic() + 20  # a killed process may take a moment to go
    while processes_of(tmp_path) and time.monotonic() < end:
        time.sleep(0.1)
    assert not processes_of(tmp_path)


def processes_of(out):
    """Folders of the living processes that `call` has started, by their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{OUT}={out}\0".encode() in (folder / "environ").read_bytes():
                found.append(folder)
        except OSError:  # it has ended meanwhile
            continue
    return found
