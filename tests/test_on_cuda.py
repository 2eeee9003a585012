"""The script that measures on a CUDA card works from end to end, tried on a CPU with tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ON_CUDA = ROOT / "benchmarks" / "on_cuda.py"


def call(out, *flags):
    command = [sys.executable, str(ON_CUDA), "--device=cpu", "--quick", f"--out={out}", *flags]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
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
    result, _ = call(tmp_path, "--minutes=0.03", "--steps=rates")
    assert result.returncode == 1 and "rates: did not end within" in result.stdout
