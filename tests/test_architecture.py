"""The house keeps its shape: the model needs torch alone, and a task is one class (imports: test_readme.py)."""

import ast
import csv
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from running import ROOT

import inference
import tasks
from messages import UserError
from tasks import LabelledTask

# --- Imports ---------------------------------------------------------------------------------------------------------


def imported(path):
    """The names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_the_model_needs_torch_alone():
    for name in ("perceiver_model", "token_features"):
        others = {module.partition(".")[0] for module in imported(ROOT / f"{name}.py")}
        assert others - sys.stdlib_module_names <= {"torch", "token_features"}


# --- A task is one class ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts(LabelledTask):
    """How often something happens, 0, 1, 2, ...: one output, the logarithm of a Poisson distribution's mean."""

    kind = "counts"
    headline = "deviance"
    loss_name = "Poisson negative log likelihood"
    step_names = ("loss",)
    higher_is_better = {"deviance": False, "loss": False}

    mean: float = 0.0
    num_outputs = 1

    @classmethod
    def fit(cls, cells, places, settings):
        return cls(), []

    def read(self, cells, places):
        targets, errors = [], []
        for cell, place in zip(cells, places, strict=True):
            try:
                targets.append(self.target(cell, place))
            except UserError as error:
                errors.append(error)
        return (None if errors else np.array(targets)), errors

    def target(self, label, where):
        if not str(label).isdecimal():
            raise UserError(f"{where}: label {label!r} is no count; write 0, 1, 2, ...")
        return int(label)

    def stack(self, targets):
        return torch.tensor(np.asarray(targets), dtype=torch.float32)

    def check(self, targets, for_training):
        pass

    def strata(self, targets):
        return np.minimum(targets, 3)

    def learn(self, targets, settings):
        return Counts(float(np.mean(targets)))

    def about(self):
        return f"counts of {self.mean:.2f} on average"

    def objective(self, outputs, targets, settings):
        return torch.nn.functional.poisson_nll_loss(outputs[:, 0].float(), targets, reduction="sum")

    def step_sums(self, outputs, targets):
        return self.objective(outputs, targets, None)[None]

    def train_figures(self, totals):
        return {}

    def rows(self, outputs, targets):
        finite = outputs.isfinite().all(1).numpy()
        return {"finite": finite, "true": targets.double().numpy(), "mean": outputs[:, 0].double().exp().numpy()}

    def metrics(self, rows):
        from sklearn.metrics import mean_poisson_deviance

        deviance = mean_poisson_deviance(rows["true"], rows["mean"])
        baseline = mean_poisson_deviance(rows["true"], np.full(len(rows["true"]), self.mean))
        loss = float(np.mean(rows["mean"] - rows["true"] * np.log(rows["mean"])))
        return {"num_samples": len(rows["true"]), "deviance": deviance, "baseline_deviance": baseline, "loss": loss}

    def epoch_figures(self, metrics, select_by):
        return {"val_loss": metrics["loss"], "val_deviance": metrics["deviance"]}

    def items(self, rows):
        return {"true": rows["true"].astype(int), "mean": rows["mean"]}

    def worst(self, rows, limit=16):
        return np.argsort(-np.abs(rows["true"] - rows["mean"]))[:limit]

    def analysis(self, rows, items):
        return {"furthest": [items[place] for place in self.worst(rows)]}

    def figures(self, rows):
        return {}

    def sides(self, rows, place):
        return str(int(rows["true"][place])), f"{rows['mean'][place]:.2f}"

    def colours(self, rows):
        return rows["true"], None

    def answer(self, output):
        return {"mean": math.exp(output[0])}

    def records(self, answer):
        return [{"mean": f"{answer['mean']:.4f}"}]


def test_a_task_is_one_class(run, monkeypatch, capsys):
    """Entered in TASKS, it trains, resumes, is evaluated and predicts through the commands; nothing else knows it."""
    monkeypatch.setitem(tasks.TASKS, "counts", Counts)
    rng = np.random.default_rng(0)
    with open("events.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "rate", "label"])
        for number in range(200):
            rate = rng.uniform(-1, 1)
            count = rng.poisson(np.exp(1.5 * rate))
            writer.writerows([f"s{number}", rate, count] for _ in range(4))
    small = "--model_size=tiny --d_model=16 --num_heads=2 --num_latents=4 --num_self_attention_layers=1 --amp=off"
    flags = f"--dataset=sequences --data_path=events.csv --task=counts {small} --ema_decay=0 --lr=5e-3"
    result = run(f"{flags} --epochs=14")
    assert result.status == 0, result.err
    assert "; counts of " in result.out and "loss    Poisson negative log likelihood; train: " in result.out
    assert re.search(r"best epoch \d+: validation deviance \d", result.out)
    resumed = run("--resume --epochs=15")
    assert resumed.status == 0
    lines = [json.loads(line) for line in Path("checkpoints/log.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["val_deviance"])["epoch"]
    assert len(lines) == 15 and f"best epoch {best}: validation deviance " in resumed.out
    assert inference.main(["--model_path", "checkpoints/best_model.pth", "--analyze"]) == 0
    assert re.search(r"^deviance +\d", capsys.readouterr().out, re.M)
    results = json.loads(Path("results/results.json").read_text())
    assert results["deviance"] < 0.8 * results["baseline_deviance"]  # it has learnt
    assert len(results["analysis"]["furthest"]) == 16
    assert {"attention.png", "latents.png", "items.csv"} <= {path.name for path in Path("results").iterdir()}
    assert inference.main(["--model_path", "checkpoints/best_model.pth", "--input", "events.csv"]) == 0
    with open("results/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "mean"] and len(rows) == 200 and float(rows[0]["mean"]) > 0

    bad = run(f"{flags} --task=countz")
    assert bad.status == 2
    names = "classification, regression, multilabel, tagging, reconstruct, counts"
    assert bad.err == f"error: task: expected one of {names}, got 'countz'\n"
    Path("events.csv").write_text("id,rate,label\n" + "".join(f"s{n},0.5,{n if n else 'often'}\n" for n in range(20)))
    assert "events.csv, line 2: label 'often' is no count" in run(flags).err
