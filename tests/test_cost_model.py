"""The cost model of a step on many GPUs counts what the model really does."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import cost_model

from perceiver_model import create_perceiver_model


@pytest.mark.parametrize("preset", cost_model.PRESETS)
@pytest.mark.parametrize(("tokens", "channels"), [(64, 48), (50, 64), (1024, 3)])
def test_the_flops_are_those_that_torch_counts(preset, tokens, channels):
    """Without fused attention, whose backward pass recomputes, each product costs twice as much again backwards."""
    model = cost_model.build(preset, channels, tokens, 10)
    batch = 3
    work = cost_model.forward_work(model, batch, tokens)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        logits = model(torch.empty(batch, tokens, channels, device="meta"))
    assert forward.get_total_flops() == work.forward
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert backward.get_total_flops() == 2 * work.forward


@pytest.mark.parametrize("preset", cost_model.PRESETS)
def test_gradient_bytes_are_those_of_the_real_model(preset):
    real = create_perceiver_model(48, 10, preset, grid_shape=(8, 8))
    figures = cost_model.step(cost_model.build(preset, 48, 64, 10), 32, 64, 8, cost_model.parse_args([]))
    assert figures["gradients"] == sum(p.numel() * p.element_size() for p in real.parameters())


def test_the_all_reduce():
    """By hand: 8 GPUs, 800 MB at 1 GB/s; ring 2 * 7 / 8 * 0.8 s; of small messages the tree's latency."""
    assert cost_model.all_reduce_seconds(8e8, 1, 1e9, 0) == 0
    assert cost_model.all_reduce_seconds(8e8, 8, 1e9, 0) == pytest.approx(1.4)
    assert cost_model.all_reduce_seconds(0, 512, 1e9, 1e-5) == pytest.approx(2 * 9 * 1e-5)


def test_the_backward_pass_hides_all_but_the_last_bucket_or_what_is_too_much():
    gradients = 4 * cost_model.BUCKET
    whole, exposed = cost_model.exposed_seconds(gradients, 2, 1e9, 0, backward=1000.0)
    assert exposed == pytest.approx(whole / 4)
    whole, exposed = cost_model.exposed_seconds(gradients, 2, 1e9, 0, backward=0.0)
    assert exposed == pytest.approx(whole) and math.isclose(whole, gradients / 1e9)
