"""Training, resuming and evaluating on a CUDA card through the real commands, in this process."""

import copy
import json
import os
import signal

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import inference
import train
from checkpoint import BEST, LAST, load_checkpoint
from config import Settings, resolve
from data_utils import create_dataloader, load_splits
from inference import evaluate, load_model
from perceiver_model import create_perceiver_model

pytestmark = pytest.mark.cuda

DATA = "--dataset=synthetic --num_samples=300 --seq_len_range 5 30 --feature_dim=8 --num_classes=3 --lr=3e-3"
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "off": "float32"}
MODEL = "--model_size=tiny --dropout=0.1 --bucket_by_length"


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(main, flags) -> what it printed; results lie in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(main, flags):
        status = main(flags.split())
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    return run


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("amp", PRECISIONS)
def test_a_run_learns_and_is_evaluated_alike_on_either_device(call, tmp_path, amp):
    out = call(train.main, f"{DATA} {MODEL} --epochs=8 --device=cuda --amp={amp}")
    assert f"device  cuda, {PRECISIONS[amp]}" in out
    assert log_of(tmp_path / "checkpoints")[-1]["val_accuracy"] > 0.6  # chance is a third
    found = {}
    for device in ("cuda", "cpu"):
        flags = f"--model_path=checkpoints/{BEST} --device={device} --amp=off --analyze --output_dir={device}"
        call(inference.main, flags)
        found[device] = json.loads((tmp_path / device / "results.json").read_text())
    assert found["cuda"]["accuracy"] == pytest.approx(found["cpu"]["accuracy"], abs=0.02)
    assert found["cuda"]["negative_log_likelihood"] == pytest.approx(found["cpu"]["negative_log_likelihood"], rel=0.01)


@pytest.mark.parametrize("amp", PRECISIONS)
def test_a_stopped_run_goes_on_as_the_unbroken_one(call, monkeypatch, tmp_path, amp):
    """On CUDA sums by atomics differ in their last bits from run to run, so the two agree only nearly."""
    flags = f"{DATA} {MODEL} --epochs=4 --device=cuda --amp={amp} --ema_decay=0.9 --accumulation_steps=2"
    call(train.main, f"{flags} --checkpoint_dir=unbroken")
    clip, steps = torch.nn.utils.clip_grad_norm_, iter(range(1000))

    def stopped_in_the_third_epoch(*args):
        if next(steps) == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", stopped_in_the_third_epoch)
        assert train.main(f"{flags} --checkpoint_dir=stopped".split()) == 128 + signal.SIGTERM
    at = load_checkpoint(f"stopped/{LAST}")
    assert (at["epoch"], at["step"]) < (3, 20)
    call(train.main, f"--resume=stopped/{LAST}")
    one, other = (load_checkpoint(f"{name}/{LAST}") for name in ("unbroken", "stopped"))
    assert one["step"] == other["step"] and one["scaler"] == other["scaler"]
    for line, again in zip(log_of(tmp_path / "unbroken"), log_of(tmp_path / "stopped"), strict=True):
        assert line["train_loss"] == pytest.approx(again["train_loss"], rel=0.02)
        assert line["learning_rate"] == again["learning_rate"]


def test_a_run_goes_on_from_cuda_on_a_cpu_and_back(call, tmp_path):
    call(train.main, f"{DATA} {MODEL} --epochs=2 --device=cuda --amp=off")
    call(train.main, "--resume --epochs=3 --device=cpu")
    call(train.main, "--resume --epochs=4 --device=cuda")
    log = log_of(tmp_path / "checkpoints")
    assert [line["epoch"] for line in log] == [1, 2, 3, 4]
    assert log[-1]["train_loss"] < log[0]["train_loss"]


def test_the_limit_of_the_gradient_is_the_same_in_every_precision(call, tmp_path):
    norms = {}
    for amp in PRECISIONS:
        call(train.main, f"{DATA} {MODEL} --epochs=1 --device=cuda --amp={amp} --dropout=0 --checkpoint_dir={amp}")
        norms[amp] = log_of(tmp_path / amp)[0]["gradient_norm"]
    assert norms["bf16"] == pytest.approx(norms["off"], rel=0.1)
    assert norms["fp16"] == pytest.approx(norms["off"], rel=0.1)


def test_a_compiled_run_is_nearly_the_plain_one(call, tmp_path):
    flags = f"{DATA} {MODEL} --epochs=2 --device=cuda --amp=off --dropout=0"
    call(train.main, f"{flags} --checkpoint_dir=plain")
    call(train.main, f"{flags} --checkpoint_dir=compiled --compile")
    for line, other in zip(log_of(tmp_path / "plain"), log_of(tmp_path / "compiled"), strict=True):
        assert other["train_loss"] == pytest.approx(line["train_loss"], rel=0.02)


def test_memory_that_runs_out_gives_the_remedies(call, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    long = "--dataset=synthetic --num_samples=600 --seq_len_range 900 1000"
    fraction = 300 * 2**20 / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(fraction)
    try:
        with pytest.raises(SystemExit, match="2"):
            train.main(f"{long} --model_size=small --epochs=1 --batch_size=256 --device=cuda".split())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    err = capsys.readouterr().err
    assert "out of memory with batch_size 256" in err and "--batch_size 128" in err


def test_an_evaluation_gives_each_sample_what_it_gets_alone(call):
    call(train.main, f"{DATA} {MODEL} --epochs=2 --device=cuda --amp=off")
    model, settings = load_model(f"checkpoints/{BEST}", "cuda")
    splits, _ = load_splits(Settings.from_dict(settings))
    results = [evaluate(model, splits["test"], batch_size=size)["negative_log_likelihood"] for size in (1, 7, 60)]
    assert results == pytest.approx([results[0]] * 3, abs=1e-3)  # matrix products in TF32, as in training


def test_batches_made_ahead_are_the_same(call):
    """On CUDA a thread makes the next batch while the card computes."""
    splits, _ = load_splits(resolve(flags={"dataset_type": "synthetic", "num_samples": 100})[0])
    plain, ahead = (
        create_dataloader(splits["train"], 7, shuffle=True, num_classes=5, pin_memory=pin) for pin in (False, True)
    )
    for _ in range(2):  # epochs
        for one, other in zip(plain, ahead, strict=True):
            assert other["input"].is_pinned()
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_gradients_pass_through_nccl():
    torch.manual_seed(0)
    model = create_perceiver_model(8, 3, "tiny").cuda()
    x, label = torch.randn(4, 20, 8, device="cuda"), torch.arange(4, device="cuda") % 3
    F.cross_entropy(model(x), label).backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters()}
    store = dist.HashStore()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    try:
        replica = DistributedDataParallel(copy.deepcopy(model), gradient_as_bucket_view=True)
        replica.zero_grad()
        F.cross_entropy(replica(x), label).backward()
        for name, value in replica.module.named_parameters():
            torch.testing.assert_close(value.grad, expected[name], rtol=1e-2, atol=1e-4)
    finally:
        dist.destroy_process_group()
