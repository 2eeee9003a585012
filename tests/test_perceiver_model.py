"""The Perceiver: against plain NumPy, torch's and transformers' own modules, and what its docstrings promise."""

import copy
import inspect
import io
import itertools
import math
import pickle
import pydoc
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import perceiver_model
import token_features
from perceiver_model import (
    MODEL_SIZES,
    MultiHeadAttention,
    PerceiverDecoder,
    PerceiverEncoder,
    PerceiverModel,
    create_perceiver_model,
)
from token_features import grid_positions, sequence_positions

SMALL = {
    "d_model": 16,
    "num_heads": 4,
    "num_latents": 6,
    "num_cross_attention_layers": 2,
    "num_self_attention_layers": 3,
    "mlp_ratio": 2,
}
PAPER = {
    "input_dim": 3,
    "num_classes": 1000,
    "grid_shape": (224, 224),
    "d_model": 1024,
    "num_heads": 8,
    "num_latents": 512,
    "num_cross_attention_layers": 8,
    "num_cross_attention_heads": 1,
    "cross_attention_dim": 261,
    "num_self_attention_layers": 48,
    "mlp_ratio": 1,
}
PATHS = pytest.mark.parametrize("folded", [False, True], ids=["separate", "folded"])
SEEDS = st.integers(0, 2**16)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def repeatable(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@contextmanager
def path_taken(folded, threads=2):
    """Make every cross-attend take the folded or the separate path, as on a CPU with so many threads; None leaves the
    choice to the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perceiver_model, "CPU_THREADS", threads)
        if folded is not None:
            patch.setattr(MultiHeadAttention, "_folding_is_cheaper", lambda *_: folded)
        yield


def randomised(module):
    """The module with no parameter left at a value, such as a bias of 0, behind which a mistake could hide."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module


def small_model(input_dim=5, num_classes=3, **changes):
    return randomised(PerceiverModel(input_dim, num_classes, **SMALL | changes).double())


def length_mask(lengths, total=None):
    return torch.arange(total or max(lengths)) < torch.tensor(lengths)[:, None]


def gradients(module):
    """Of all parameters that are not frozen; an error where there is none."""
    return {name: each.grad.clone() for name, each in module.named_parameters() if each.requires_grad}


def loss_and_gradients(model, *args):
    model.zero_grad()
    logits = model(*args)
    F.cross_entropy(logits.float(), torch.arange(len(logits)) % logits.size(1)).backward()
    return logits.detach(), gradients(model)


def assert_close(actual, expected, tolerance):
    """Equal up to tolerance times the size of what is expected, or times 1 where that is less."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other, tolerance)
        return
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


# --- The same computation in plain NumPy, a sample at a time and without its padding ---------------------------------


def plain_norm(x, weights):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weights["weight"] + weights["bias"]


def plain_linear(x, weights):
    return x @ weights["weight"].T + weights.get("bias", 0.0)


def plain_mlp(x, weights):
    hidden = plain_linear(x, weights["0"])
    return plain_linear(hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2, weights["2"])


def plain_attention(weights, heads, queries, tokens):
    """queries (N, D), tokens (L, C) -> results (N, D), attention weights (H, N, L), one number at a time."""
    q, k, v = (plain_linear(x, weights[n]) for x, n in ((queries, "query"), (tokens, "key"), (tokens, "value")))
    width = q.shape[1] // heads
    attended, maps = np.zeros_like(q), np.zeros((heads, len(q), len(k)))
    for head, n in itertools.product(range(heads), range(len(q) if len(k) else 0)):
        part = slice(head * width, (head + 1) * width)
        scores = [sum(q[n, part] * k[token, part]) / math.sqrt(width) for token in range(len(k))]
        exponentials = [math.exp(score - max(scores)) for score in scores]
        maps[head, n] = [value / sum(exponentials) for value in exponentials]
        attended[n, part] = sum(maps[head, n, token] * v[token, part] for token in range(len(k)))
    return plain_linear(attended, weights["output"]), maps


def nested(module):
    """The module's parameters as a tree of float64 arrays."""
    tree = {}
    for name, value in module.state_dict().items():
        *parents, leaf = name.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value.double().numpy()
    return tree


def plain_sequence_positions(length, bands):
    angles = [[index / 10000 ** (band / bands) for band in range(bands)] for index in range(length)]
    return np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)


def plain_grid_positions(rows, cols, bands):
    table = []
    for row, col in itertools.product(range(rows), range(cols)):
        coordinates = [2 * row / (rows - 1) - 1, 2 * col / (cols - 1) - 1]
        angles = [
            math.pi * coordinate * (1 + (size / 2 - 1) * band / (bands - 1))
            for coordinate, size in zip(coordinates, (rows, cols), strict=True)
            for band in range(bands)
        ]
        table.append([*coordinates, *map(math.sin, angles), *map(math.cos, angles)])
    return np.array(table, dtype=np.float32)


def plain_model(model, layers, heads, cross_heads, x, mask, positions):
    """Logits and maps; layers names the blocks in the order in which the latents meet them."""
    weights = nested(model)
    encoder = weights["encoder"]
    all_logits, all_maps = [], []
    for sample, real in zip(x.numpy(), mask.numpy(), strict=True):
        tokens = np.concatenate([sample, positions], 1)[real]
        latents, maps = encoder["latents"], []
        for layer in layers:
            kind, *numbers = layer.split(".")
            block = encoder[f"{kind}_attention"]
            for number in numbers:
                block = block[number]
            if kind == "cross":
                inputs = plain_norm(tokens, block["input_norm"])
                queries = plain_norm(latents, block["latent_norm"])
                result, compact = plain_attention(block["attention"], cross_heads, queries, inputs)
                maps.append(np.zeros((*compact.shape[:2], len(real))))
                maps[-1][:, :, real] = compact
            else:
                inputs = plain_norm(latents, block["attention_norm"])
                result, _ = plain_attention(block["attention"], heads, inputs, inputs)
            latents = latents + result
            latents = latents + plain_mlp(plain_norm(latents, block["mlp_norm"]), block["mlp"])
        all_logits.append(plain_linear(plain_norm(latents, weights["norm"]).mean(0), weights["classifier"]))
        all_maps.append(maps)
    return np.array(all_logits), [np.array(maps) for maps in zip(*all_maps, strict=True)]


# --- Attention -------------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("input_dim, attention_dim", [(None, None), (7, None), (7, 24), (32, 8)])
def test_attention_is_the_textbook_loop(input_dim, attention_dim, masked, folded):
    attention = randomised(MultiHeadAttention(12, 4, input_dim, attention_dim).double())
    queries = torch.randn(3, 5, 12, dtype=torch.float64)
    inputs = None if input_dim is None else torch.randn(3, 6, input_dim, dtype=torch.float64)
    tokens = queries if inputs is None else inputs
    mask = torch.rand(3, tokens.size(1)) < 0.6 if masked else torch.ones(3, tokens.size(1), dtype=torch.bool)
    mask[2] = not masked  # no token at all
    with torch.no_grad(), path_taken(folded):
        results, maps = attention(queries, inputs, mask if masked else None, return_attention=True)
    for sample in range(3):
        real = mask[sample].numpy()
        expected, compact = plain_attention(nested(attention), 4, queries[sample].numpy(), tokens[sample].numpy()[real])
        assert_close(results[sample], expected, 1e-13)
        assert_close(maps[sample][:, :, real], compact, 1e-14)
        assert not maps[sample][:, :, ~real].any()


@PATHS
@pytest.mark.parametrize("input_dim", [None, 7])
def test_attention_is_torchs_module(input_dim, folded):
    ours = randomised(MultiHeadAttention(16, 4, input_dim).double())
    theirs = nn.MultiheadAttention(16, 4, kdim=input_dim, vdim=input_dim, batch_first=True, dtype=torch.float64)
    projections = [ours.query.weight, ours.key.weight, ours.value.weight]
    with torch.no_grad():
        if input_dim is None:
            theirs.in_proj_weight.copy_(torch.cat(projections))
        else:
            for mine, name in zip(projections, ("q", "k", "v"), strict=True):
                getattr(theirs, f"{name}_proj_weight").copy_(mine)
        theirs.in_proj_bias.zero_()
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    queries = torch.randn(3, 5, 16, dtype=torch.float64)
    tokens = queries if input_dim is None else torch.randn(3, 9, input_dim, dtype=torch.float64)
    mask = length_mask([1, 4, tokens.size(1)])
    with path_taken(folded):
        results = ours(queries, None if input_dim is None else tokens, mask, return_attention=True)
    expected = theirs(queries, tokens, tokens, key_padding_mask=~mask, average_attn_weights=False)
    assert_close(results, expected, 1e-13)
    for result, _ in (results, expected):
        result.sin().sum().backward()
    if input_dim is None:
        peers = theirs.in_proj_weight.grad.chunk(3)
    else:
        peers = [getattr(theirs, f"{name}_proj_weight").grad for name in ("q", "k", "v")]
    assert_close([weight.grad for weight in projections], peers, 1e-12)
    assert_close(gradients(ours.output), gradients(theirs.out_proj), 1e-12)


@pytest.mark.parametrize(("tokens", "width"), [(20, 64), (300, 32)])
def test_short_and_narrow_attention_is_trained_as_exactly_as_bfloat16_can_tell(tokens, width):
    """Weights, sums and gradients in float32, rounded once: what is computed in bfloat16 is off by several units."""
    shapes = [(2, 4, 8, width), (2, 4, tokens, width), (2, 4, tokens, width)]
    rounded = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    allowed = length_mask([tokens, 7])[:, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        result = perceiver_model._attend(*rounded, allowed, 0.0, 0.3)
    expected = F.scaled_dot_product_attention(*exact, allowed, scale=0.3)
    assert result.dtype == torch.bfloat16
    slope = torch.randn(expected.shape).bfloat16()
    result.backward(slope)
    expected.backward(slope.double())
    for ours, theirs in [(result, expected), *((x.grad, y.grad) for x, y in zip(rounded, exact, strict=True))]:
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=2e-6)


# --- Folded projections ----------------------------------------------------------------------------------------------


@st.composite
def attention_problems(draw):
    heads = draw(st.integers(1, 4))
    batch, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    rows = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    return SimpleNamespace(
        heads=heads,
        batch=batch,
        tokens=tokens,
        latents=draw(st.integers(1, 6)),
        channels=draw(st.integers(1, 19)),
        width=heads * draw(st.integers(1, 6)),
        values=heads * draw(st.integers(1, 6)),
        bias=draw(st.booleans()),
        d_model=draw(st.integers(1, 12)),
        mask=draw(st.none() | st.lists(rows, min_size=batch, max_size=batch).map(torch.tensor)),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.4])),
        one_query=draw(st.booleans()),
        want_maps=draw(st.booleans()),
        threads=draw(st.sampled_from([1, 2, 3, 4, 64])),
        seed=draw(SEEDS),
    )


@given(attention_problems())
@repeatable(150)
def test_folded_and_separate_projections_are_one_function(problem):
    torch.manual_seed(problem.seed)
    attention = MultiHeadAttention(
        problem.d_model,
        problem.heads,
        problem.channels,
        problem.width,
        problem.dropout,
        value_dim=problem.values,
        query_bias=problem.bias,
    )
    attention = randomised(attention.double())
    queries = torch.randn(1 if problem.one_query else problem.batch, problem.latents, problem.d_model).double()
    inputs = torch.randn(problem.batch, problem.tokens, problem.channels).double()
    outcomes = []
    for folded in (False, True):
        attention.zero_grad()
        leaves = [queries.clone().requires_grad_(), inputs.clone().requires_grad_()]
        torch.manual_seed(problem.seed)  # dropout draws the same weights
        with path_taken(folded, problem.threads):
            result = attention(*leaves, problem.mask, problem.want_maps)
        result, maps = result if problem.want_maps else (result, torch.zeros(()))
        (result.sin().sum() + maps.square().sum()).backward()
        outcomes.append([result, maps, *(leaf.grad for leaf in leaves), *gradients(attention).values()])
    assert all(tensor.isfinite().all() for tensor in outcomes[0])
    assert_close(outcomes[1], outcomes[0], 1e-12)


@PATHS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_queries_of_one_sample_serve_the_whole_batch(folded, dropout):
    attention = randomised(MultiHeadAttention(12, 3, 7, dropout=dropout).double())
    queries = torch.randn(1, 5, 12, dtype=torch.float64, requires_grad=True)
    inputs, mask = torch.randn(4, 9, 7, dtype=torch.float64), length_mask([9, 3, 0, 1])
    outcomes = []
    for given_queries in (queries, queries.expand(4, -1, -1)):
        attention.zero_grad()
        queries.grad = None
        torch.manual_seed(1)
        with path_taken(folded):
            result, maps = attention(given_queries, inputs, mask, return_attention=True)
        (result.sin().sum() + maps.square().sum()).backward()
        outcomes.append([result, maps, queries.grad, *gradients(attention).values()])
    assert_close(outcomes[0], outcomes[1], 1e-13)


@given(attention_problems())
@repeatable(40)
def test_the_path_with_the_fewer_multiply_adds_is_taken(problem):
    """Counted by torch for a very long input; channels stay multiples of 8, where folding pads nothing."""
    channels, tokens = 8 * problem.channels, 10**6
    with torch.device("meta"):
        attention = MultiHeadAttention(problem.d_model, problem.heads, channels, problem.width)
        queries, inputs = torch.empty(1, problem.latents, problem.d_model), torch.empty(1, tokens, channels)
    counts = []
    for folded in (False, True, None):
        with path_taken(folded), FlopCounterMode(display=False) as counter:
            attention(queries, inputs)
        counts.append(counter.get_total_flops() / tokens)
    separate, folded, chosen = counts
    assert abs(separate - 4 * problem.width * (channels + problem.latents)) < 0.1  # a multiply-add is two
    assert abs(folded - 4 * problem.heads * problem.latents * channels) < 0.1
    assert chosen == min(separate, folded)


def test_a_long_input_is_never_projected_to_the_latent_width():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            for tensor in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return result

    tokens, width = 4096, 128
    model = PerceiverModel(3, 2, **SMALL | {"d_model": width, "num_latents": 2, "num_frequency_bands": 2})
    with Largest() as largest:
        model(torch.randn(1, tokens, 3), torch.ones(1, tokens)).sum().backward()
    assert tokens * 7 <= largest.numbers < tokens * width / 4


@PATHS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_bfloat16_autocast_is_close_on_both_paths(folded, dropout):
    model = create_perceiver_model(13, 4, "tiny", attention_dropout=dropout)
    x, mask = torch.randn(6, 20, 13), length_mask([20, 20, 11, 7, 1, 0])
    outcomes = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with path_taken(folded), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits, grads = loss_and_gradients(model, x, mask)
        outcomes.append((logits, torch.cat([grad.flatten() for grad in grads.values()])))
    (logits, grads), (half_logits, half_grads) = outcomes
    assert_close(half_logits, logits, 0.03)
    assert half_grads.isfinite().all()
    assert F.cosine_similarity(grads, half_grads, dim=0) > 0.99


@pytest.mark.parametrize("folded, checkpointing", [(False, False), (True, True)], ids=["separate", "folded-recomputed"])
def test_compiled_model_is_the_eager_one(folded, checkpointing):
    model = small_model(gradient_checkpointing=checkpointing)
    x, mask = torch.randn(3, 7, 5, dtype=torch.float64), length_mask([7, 4, 0])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with path_taken(folded):
        expected = loss_and_gradients(model, x, mask)
        model.zero_grad()
        logits = compiled(x, mask)
        F.cross_entropy(logits.float(), torch.arange(3)).backward()
    assert_close(logits, expected[0], 1e-12)
    assert_close(gradients(model), expected[1], 1e-12)


# --- Layers that are more than their weights -------------------------------------------------------------------------


class Adapted(nn.Module):
    """A layer with a low-rank addition (LoRA), as adapter libraries put in the place of a linear one."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight = layer, layer.weight
        self.out_features, rank = layer.out_features, 2
        self.down = nn.Parameter(torch.randn(rank, layer.in_features, dtype=layer.weight.dtype))
        self.up = nn.Parameter(torch.randn(layer.out_features, rank, dtype=layer.weight.dtype))

    def forward(self, x):
        return self.layer(x) + x @ self.down.T @ self.up.T


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def add_hook(layer):
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


def add_input_hook(layer):
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return layer


def pruned(layer):
    return prune.random_unstructured(layer, "weight", 0.5)


def parametrised(layer):
    return parametrize.register_parametrization(layer, "weight", Doubled())


def replace_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: 3 * forward(x)
    return layer


@pytest.mark.parametrize("wrap", [Adapted, add_hook, add_input_hook, pruned, parametrised, replace_forward])
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_a_wrapped_projection_does_what_it_does_alone(wrap, name, cross):
    """Its result must not be bypassed by a product with the layer's weight; the reference calls the layers."""
    attention = randomised(MultiHeadAttention(8, 2, 5 if cross else None).double())
    setattr(attention, name, wrap(getattr(attention, name)))
    queries = torch.randn(2, 3, 8, dtype=torch.float64)
    inputs = torch.randn(2, 9, 5, dtype=torch.float64) if cross else queries
    q, k, v = (
        layer(x).unflatten(2, (2, 4)).transpose(1, 2)
        for layer, x in ((attention.query, queries), (attention.key, inputs), (attention.value, inputs))
    )
    expected = attention.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    with path_taken(True):
        assert_close(attention(queries, inputs if cross else None), expected, 1e-12)


def test_a_quantised_model_uses_its_quantised_projections():
    model = create_perceiver_model(6, 3, "tiny").eval()
    x = torch.randn(2, 9, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own module
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    layers = [module for module in quantised.modules() if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)]
    called = []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: called.append(id(module)))
    with torch.no_grad():
        assert_close(quantised(x), model(x), 0.1)
    assert set(called) == {id(layer) for layer in layers}


# --- Calls leave nothing behind --------------------------------------------------------------------------------------


def test_calls_from_several_threads_get_their_own_positions():
    model, lengths = small_model().eval(), [3, 50, 7, 200, 1, 90] * 20
    inputs = [torch.randn(1, length, 5, dtype=torch.float64) for length in lengths]
    with torch.no_grad():
        expected = [copy.deepcopy(model)(x) for x in inputs]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda x: model(x), inputs))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-12)


def test_a_call_with_fake_tensors_leaves_nothing_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, x = small_model().eval(), torch.randn(2, 30, 5, dtype=torch.float64)
    expected = copy.deepcopy(model)(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(x)).shape == expected.shape
    assert_close(model(x), expected, 1e-12)


def test_a_model_filled_after_it_was_made_without_memory_knows_its_positions():
    real = small_model(grid_shape=(3, 4)).float()
    with torch.device("meta"):
        empty = small_model(grid_shape=(3, 4)).float()
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(real.state_dict())
    x = torch.randn(2, 12, 5)
    assert_close(filled(x), real(x), 1e-6)


@pytest.mark.parametrize(
    "heads, num_queries, tokens, channels, folds",
    [
        (8, 256, 50_176, 32, True),  # measured: 1.2 times as fast
        (8, 256, 50_176, 64, True),
        (8, 256, 50_176, 96, False),  # 0.9
        (8, 256, 64, 32, False),  # 0.87
        (1, 256, 50_176, 96, True),  # heads of 512 channels have no fast kernel
        (8, 256, 50_176, 384, False),  # nor have tokens of 384: 0.08
    ],
)
def test_folding_on_cuda_follows_what_was_measured(heads, num_queries, tokens, channels, folds):
    attention = MultiHeadAttention(512, heads, channels)
    inputs = SimpleNamespace(device=torch.device("cuda"), shape=(1, tokens, channels))
    assert attention._folding_is_cheaper(num_queries, inputs) == folds


# --- The whole model -------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize(
    "changes, layers",
    [
        ({}, "cross.0 self.0.0 self.0.1 cross.1 self.1.0"),
        (
            {"num_cross_attention_layers": 3, "num_self_attention_layers": 6, "share_weights": True},
            "cross.0 self.0.0 self.0.1 cross.1 self.0.0 self.0.1 cross.1 self.0.0 self.0.1",
        ),
        (
            {"num_cross_attention_heads": 1, "cross_attention_dim": 9, "grid_shape": (3, 4), "num_frequency_bands": 2},
            "cross.0 self.0.0 self.0.1 cross.1 self.1.0",
        ),
        (
            {"use_positions": False, "num_cross_attention_layers": 1, "num_self_attention_layers": 1},
            "cross.0 self.0.0",
        ),
    ],
    ids=["sequence", "shared", "grid", "bare"],
)
def test_model_is_the_plain_one(changes, layers, folded):
    model = small_model(**changes).eval()
    x = torch.randn(3, 12, 5, dtype=torch.float64)
    mask = torch.rand(3, 12) < torch.tensor([[0.9], [0.5], [0.0]])
    if "grid_shape" in changes:
        positions = plain_grid_positions(3, 4, 2)
    else:
        positions = plain_sequence_positions(12, 8) if changes.get("use_positions", True) else np.zeros((12, 0))
    with torch.no_grad(), path_taken(folded):
        logits, maps = model(x, mask, return_attention=True)
        pooled = model.pooled_latents(x, mask)
    heads = changes.get("num_cross_attention_heads", 4)
    expected, expected_maps = plain_model(model, layers.split(), 4, heads, x, mask, positions)
    assert_close(logits, expected, 1e-12)
    assert_close(maps, expected_maps, 1e-12)
    assert_close(model.classifier(pooled), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_masks_of_every_type_mean_the_same(dtype):
    model, x = small_model(), torch.randn(3, 7, 5, dtype=torch.float64)
    mask = length_mask([7, 4, 0])
    expected = model(x, mask)
    assert torch.equal(model(x, mask.to(dtype)), expected)
    assert_close(model(x, torch.ones(3, 7, dtype=dtype)), model(x), 1e-13)
    assert (model(x) - expected).abs()[1:].amin() > 1e-4  # and the mask does something


@pytest.mark.parametrize("shape", [(7,), (3, 6), (3, 8), (7, 3), (1, 7), (3, 7, 1), (3, 1, 7)])
def test_mask_of_a_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError) as error:
        small_model()(torch.randn(3, 7, 5, dtype=torch.float64), torch.ones(shape))
    assert str(shape) in str(error.value) and "(3, 7)" in str(error.value)


@pytest.mark.parametrize("value", [2, -1, 0.5, math.nan, -math.inf])
def test_mask_of_other_numbers_is_refused(value):
    mask = torch.ones(3, 7)
    mask[1, 2] = value
    with pytest.raises(ValueError, match=r"1 \(real token\) and 0 \(padding\)"):
        small_model()(torch.randn(3, 7, 5, dtype=torch.float64), mask)


@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 4), (3, 0, 5), (3, 1, 7, 5)])
def test_input_of_a_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError) as error:
        small_model()(torch.randn(shape, dtype=torch.float64))
    assert str(shape) in str(error.value) and "5" in str(error.value)


@PATHS
def test_a_batch_without_samples_gives_no_logits(folded):
    with path_taken(folded):
        logits, maps = small_model()(torch.empty(0, 7, 5).double(), torch.ones(0, 7), return_attention=True)
    assert logits.shape == (0, 3)
    assert [each.shape for each in maps] == [(0, 4, 6, 7)] * 2


# --- Padding ---------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e300]),
    st.sampled_from([None, False, True]),
    st.booleans(),
    SEEDS,
)
@repeatable(50)
def test_what_padding_holds_changes_nothing(lengths, rubbish, folded, train, seed):
    torch.manual_seed(seed)
    model = small_model(dropout=0.2, attention_dropout=0.2).train(train)
    mask = length_mask(lengths, 9)
    x = torch.randn(len(lengths), 9, 5, dtype=torch.float64)
    outcomes = []
    for padding in (0.0, rubbish):
        torch.manual_seed(seed)
        leaf = x.masked_fill(~mask[..., None], padding).requires_grad_()
        with path_taken(folded):
            outcomes.append((*loss_and_gradients(model, leaf, mask), leaf.grad))
    (logits, grads, x_grad), (other_logits, other_grads, other_x_grad) = outcomes
    assert logits.isfinite().all() and torch.equal(logits, other_logits)
    assert all(grad.isfinite().all() and torch.equal(grad, other_grads[name]) for name, grad in grads.items())
    assert torch.equal(x_grad, other_x_grad) and not x_grad[~mask].any()


@given(st.lists(st.integers(1, 12), min_size=2, max_size=6), st.integers(0, 5), st.booleans(), st.booleans(), SEEDS)
@repeatable(40)
def test_a_sample_gets_the_same_logits_alone_and_in_any_batch(lengths, more, train, single, seed):
    torch.manual_seed(seed)
    model = small_model().train(train)
    mask = length_mask(lengths, max(lengths) + more)
    x = torch.randn(*mask.shape, 5, dtype=torch.float64)
    if single:
        model, x = model.float(), x.float()
    with torch.no_grad():
        together = model(x, mask)
        alone = torch.cat([model(sample[None, :length]) for sample, length in zip(x, lengths, strict=True)])
        reversed_batch = model(x.flip(0), mask.flip(0)).flip(0)
    tolerance = 1e-5 if single else 1e-12
    assert_close(together, alone, tolerance)
    assert_close(reversed_batch, alone, tolerance)


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_preset_in_float32_gives_a_padded_sample_its_own_logits(size):
    model, lengths = create_perceiver_model(32, 10, size).eval(), [200, 131, 50, 1]
    x = torch.randn(4, 200, 32)
    with torch.no_grad():
        together = model(x, length_mask(lengths))
        alone = torch.cat([model(sample[None, :length]) for sample, length in zip(x, lengths, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@PATHS
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_a_sample_without_tokens_disturbs_no_other(folded, train, autocast):
    model = small_model().float().train(train)
    x, mask, labels = torch.randn(4, 9, 5), length_mask([9, 3, 0, 6]), torch.tensor([0, 1, 2, 0])
    keep = torch.tensor([0, 1, 3])
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with path_taken(folded), context:
        logits = model(x, mask)
        F.cross_entropy(logits[keep].float(), labels[keep]).backward()  # its own loss is left out
        left_out = gradients(model)
        model.zero_grad()
        others = model(x[keep], mask[keep])
        F.cross_entropy(others.float(), labels[keep]).backward()
        without = gradients(model)
        model.zero_grad()
        F.cross_entropy(model(x, mask).float(), labels).backward()
    assert logits.isfinite().all() and all(grad.isfinite().all() for grad in gradients(model).values())
    assert_close(logits[keep].detach(), others.detach(), 0.03 if autocast else 1e-5)
    assert_close(left_out, without, 0.03 if autocast else 1e-5)


@PATHS
def test_a_sample_without_tokens_does_not_rely_on_the_kernel(folded, monkeypatch):
    """Releases of torch differ in what attention over no token gives; here it is the NaN of the plain formula."""
    model, x, mask = small_model(), torch.randn(4, 9, 5, dtype=torch.float64), length_mask([9, 3, 0, 6])

    def plain_kernel(q, k, v, allowed, dropout, scale):
        scores = q @ k.mT * scale
        return (scores if allowed is None else scores.masked_fill(~allowed, -math.inf)).softmax(-1) @ v

    with path_taken(folded):
        expected = loss_and_gradients(model, x, mask)
        monkeypatch.setattr(F, "scaled_dot_product_attention", plain_kernel)
        assert_close(loss_and_gradients(model, x, mask), expected, 1e-12)


def test_a_sample_without_tokens_gets_the_logits_of_the_latents_alone():
    model = small_model()
    first = model(torch.randn(2, 9, 5, dtype=torch.float64), torch.zeros(2, 9))
    assert_close(first, model(100 * torch.randn(2, 4, 5, dtype=torch.float64), torch.zeros(2, 4)), 1e-12)


# --- Attention maps --------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_attention_maps_are_distributions_over_real_tokens(folded, dtype, train):
    model = small_model(num_cross_attention_heads=2, attention_dropout=0.5).train(train)
    x, mask = torch.randn(4, 9, 5, dtype=torch.float64), length_mask([9, 3, 0, 1])
    context = torch.autocast("cpu", dtype) if dtype is torch.bfloat16 else nullcontext()
    if dtype is not torch.float64:
        model, x = model.float(), x.float()
    with path_taken(folded), context:
        torch.manual_seed(1)
        plain = model(x, mask)
        torch.manual_seed(1)
        logits, maps = model(x, mask, return_attention=True)
        (logits.float().sum() + sum(each.float().square().sum() for each in maps)).backward()
    assert_close(logits.detach(), plain.detach(), 1e-12 if dtype is torch.float64 else 1e-5)
    assert len(maps) == 2 and all(each.shape == (4, 2, 6, 9) for each in maps)
    for each in maps:
        sums = each.double().sum(-1)
        assert (sums[[0, 1, 3]] - 1).abs().max() < (0.01 if dtype is torch.bfloat16 else 1e-6)
        assert (each >= 0).all() and not each.masked_select(~mask[:, None, None]).any()
    assert (maps[0] - maps[1]).abs().max() > 1e-3
    assert all(grad.isfinite().all() for grad in gradients(model).values())


# --- Positions -------------------------------------------------------------------------------------------------------


def test_sequence_positions_are_accurate_far_out():
    table = sequence_positions(10**6, 8).double().numpy()
    indices = np.array([0, 1, 2, 49_999, 500_000, 999_999])
    angles = indices[:, None] * np.float64(10000) ** -(np.arange(8) / 8)
    np.testing.assert_allclose(table[indices], np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=1e-7)


@pytest.mark.parametrize("bands", [1, 3, 8])
def test_sequence_positions_of_a_prefix_are_a_prefix(bands):
    table = sequence_positions(300, bands)
    for length in (1, 2, 50, 299):
        assert torch.equal(sequence_positions(length, bands), table[:length])


def test_sequence_positions_tell_tokens_apart_and_stay_below_nyquist():
    table = sequence_positions(5000, 8)
    assert len(table.unique(dim=0)) == 5000
    steps = torch.atan2(*(table[1:2].T.reshape(2, 8)))  # angle from one token to the next, band by band
    assert (steps > 0).all() and (steps < math.pi).all() and steps.max() / steps.min() > 1000


@pytest.mark.parametrize("rows, cols", [(1, 1), (1, 9), (2, 2), (4, 4), (8, 8), (5, 11), (32, 32)])
def test_grid_positions_tell_tokens_apart(rows, cols):
    model = PerceiverModel(3, 2, **SMALL, grid_shape=(rows, cols))
    table = model.modalities["input"].positions(torch.zeros(1, rows * cols, 3))
    assert table.isfinite().all()
    assert len(table.unique(dim=0)) == rows * cols


def test_grid_bands_run_from_one_to_the_nyquist_frequency_of_each_axis():
    rows, cols, bands = 10, 6, 5
    table = grid_positions(rows, cols, bands).view(rows, cols, -1).double()
    assert table[0, 0, :2].tolist() == [-1, -1] and table[-1, -1, :2].tolist() == [1, 1]
    assert torch.equal(table[..., 0].std(1), torch.zeros(rows).double())  # the first coordinate is the row's
    for axis, size in enumerate((rows, cols)):
        coordinate = table[..., axis]
        for band, frequency in enumerate(np.linspace(1, size / 2, bands)):
            column = 2 + axis * bands + band
            assert_close(table[..., column], (math.pi * frequency * coordinate).sin(), 1e-6)
            assert_close(table[..., column + 2 * bands], (math.pi * frequency * coordinate).cos(), 1e-6)


@pytest.mark.parametrize(
    "grid_shape, bands", [((8, 8), 4), ((4, 16), 8), ((16, 4), 8), ((3, 3), 1), ((224, 224), 64), (None, 8)]
)
def test_default_number_of_bands(grid_shape, bands):
    with torch.device("meta"):
        default, explicit = (
            PerceiverModel(3, 2, **SMALL, grid_shape=grid_shape, num_frequency_bands=number) for number in (None, bands)
        )
    inputs, same = (model.encoder.cross_attention[0].attention.key.in_features for model in (default, explicit))
    assert inputs == same == 3 + (2 * bands if grid_shape is None else 4 * bands + 2)


@pytest.mark.parametrize("grid_shape", [None, (4, 3)])
def test_positions_do_not_depend_on_content(grid_shape):
    model, seen = small_model(grid_shape=grid_shape), []
    model.modalities["input"].positions.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    x = torch.randn(3, 12, 5, dtype=torch.float64)
    for batch in (x, 2 * x, x[:1], x.flip(1)):
        model(batch)
    model(x, length_mask([1, 5, 12]))
    assert len(seen) == 5 and all(torch.equal(each, seen[0]) for each in seen)


@pytest.mark.parametrize("grid_shape", [None, (4, 3)])
@pytest.mark.parametrize("use_positions", [False, True])
def test_order_matters_exactly_when_positions_are_on(grid_shape, use_positions):
    model = small_model(grid_shape=grid_shape, use_positions=use_positions).eval()
    x, order = torch.randn(3, 12, 5, dtype=torch.float64), torch.randperm(12)
    difference = (model(x) - model(x[:, order])).abs()
    assert (difference.amax(1) > 1e-4).all() if use_positions else difference.max() < 1e-12


def test_any_length_works_and_the_table_is_made_once(monkeypatch):
    model, x = small_model().eval(), torch.randn(2, 40, 5, dtype=torch.float64)
    fresh = {length: copy.deepcopy(model)(x[:, :length]) for length in (3, 40, 17)}
    made = []
    original = token_features.sequence_positions
    monkeypatch.setattr(token_features, "sequence_positions", lambda *args: made.append(args[0]) or original(*args))
    for length in (3, 40, 17, 40):
        assert_close(model(x[:, :length]), fresh[length if length in fresh else 40], 1e-13)
    assert made == [3, 40]
    model(x.repeat(1, 2, 1)[:, :41])
    assert made == [3, 40, 80]  # grows by doubling


@pytest.mark.parametrize("tokens", [1, 11, 13, 24])
def test_grid_refuses_another_number_of_tokens_and_goes_on(tokens):
    model, x = small_model(grid_shape=(4, 3)), torch.randn(2, 12, 5, dtype=torch.float64)
    expected = model(x)
    with pytest.raises(ValueError) as error:
        model(torch.randn(2, tokens, 5, dtype=torch.float64))
    for part in (f"{tokens} tokens", "4 x 3", "12", "grid_shape"):
        assert part in str(error.value)
    assert torch.equal(model(x), expected)


def test_evaluation_first_then_training():
    """What inference mode leaves behind (the table of positions) must be fit for gradients."""
    model, x = small_model(), torch.randn(2, 7, 5, dtype=torch.float64)
    fresh = loss_and_gradients(copy.deepcopy(model), x)
    with torch.inference_mode():
        model.eval()(x)
    assert_close(loss_and_gradients(model.train(), x), fresh, 1e-13)


def test_precision_may_change_after_use():
    model, x = small_model().float(), torch.randn(2, 7, 5)
    single = model(x)
    double = copy.deepcopy(model).double()(x.double())
    assert double.dtype == torch.float64
    assert_close(single.detach(), double.detach(), 1e-5)
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert_close(half.detach(), double.detach(), 0.1)
    assert_close(model.double()(x.double()).detach(), double.detach(), 0.1)  # weights were rounded, the table anew


# --- The paper's and transformers' Perceiver -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer():
    from transformers import PerceiverConfig
    from transformers.models.perceiver import modeling_perceiver

    return SimpleNamespace(config=PerceiverConfig, modules=modeling_perceiver)


def peer_layer(block):
    """The parameters of one of our blocks under the names of transformers' PerceiverLayer."""
    names = {
        "attention_norm": "attention.self.layernorm1",
        "latent_norm": "attention.self.layernorm1",
        "input_norm": "attention.self.layernorm2",
        "attention.query": "attention.self.query",
        "attention.key": "attention.self.key",
        "attention.value": "attention.self.value",
        "attention.output": "attention.output.dense",
        "mlp_norm": "layernorm",
        "mlp.0": "mlp.dense1",
        "mlp.2": "mlp.dense2",
    }
    parameters = {}
    for name, value in block.state_dict().items():
        module, kind = name.rsplit(".", 1)
        parameters[f"{names[module]}.{kind}"] = value
        if module in ("attention.query", "attention.key", "attention.value") and kind == "weight":
            parameters.setdefault(f"{names[module]}.bias", value.new_zeros(len(value)))
    if (bias := block.attention.query.bias) is not None:
        parameters["attention.self.query.bias"] = bias.detach()
    return parameters


PUBLISHED = {  # what the published models have and ours by default have not
    "query_bias": True,
    "num_blocks": 2,
    "self_attention_dim": 8,
    "self_attention_value_dim": 12,
    "cross_attention_dim": 8,
    "cross_attention_value_dim": 20,
}


@PATHS
@pytest.mark.parametrize(
    "channels, heads, cross_heads, width, ratio, more",
    [
        (10, 4, 4, None, 4, {}),
        (10, 4, 1, None, 2, {}),
        (9, 2, 1, 9, 1, {}),  # as in the paper: width of the input
        (10, 4, 2, 8, 1, PUBLISHED),
    ],
)
def test_encoder_is_transformers(peer, folded, channels, heads, cross_heads, width, ratio, more):
    arguments = {"num_cross_attention_heads": cross_heads, "cross_attention_dim": width, "mlp_ratio": ratio} | more
    ours = PerceiverEncoder(channels, 16, heads, 6, 1, 3, **arguments)
    ours = randomised(ours.double()).eval()
    config = peer.config(
        num_latents=6,
        d_latents=16,
        d_model=channels,
        num_blocks=ours.num_blocks,
        num_self_attends_per_block=3,
        num_self_attention_heads=heads,
        num_cross_attention_heads=cross_heads,
        cross_attention_shape_for_attention="q" if width is None else "kv",
        self_attention_widening_factor=ratio,
        cross_attention_widening_factor=ratio,
        attn_implementation="eager",
    )
    theirs = peer.modules.PerceiverModel(config)
    if more:  # their configuration has one pair of widths for both kinds of attention
        for block in (theirs.encoder.cross_attention, *theirs.encoder.self_attends):
            cross = block is theirs.encoder.cross_attention
            widths = "cross_attention" if cross else "self_attention"
            block.attention = peer.modules.PerceiverAttention(
                config,
                is_cross_attention=cross,
                qk_channels=more[f"{widths}_dim"],
                v_channels=more[f"{widths}_value_dim"],
                num_heads=cross_heads if cross else heads,
                q_dim=16,
                kv_dim=channels if cross else 16,
                use_query_residual=True,
            )
            if not cross:
                block.attention.output.dense = nn.Linear(more["self_attention_value_dim"], 16)
    theirs = theirs.double().eval()
    parameters = {"embeddings.latents": ours.latents.detach()}
    layers = {"encoder.cross_attention": ours.cross_attention[0]}
    layers |= {f"encoder.self_attends.{number}": layer for number, layer in enumerate(ours.self_attention[0])}
    for prefix, block in layers.items():
        parameters |= {f"{prefix}.{name}": value for name, value in peer_layer(block).items()}
    theirs.load_state_dict(parameters)
    x, mask = torch.randn(3, 11, channels, dtype=torch.float64), length_mask([11, 6, 1])
    with torch.no_grad(), path_taken(folded):
        latents, maps = ours(x, mask, return_attention=True)
        expected = theirs(inputs=x, attention_mask=mask.long(), output_attentions=True)
    assert_close(latents, expected.last_hidden_state, 1e-12)
    assert_close(maps, list(expected.cross_attentions), 1e-12)


def test_biases_of_keys_and_values_fold_into_the_output():
    """Keys with a bias attend as without; a bias of the values is one of the output (see MultiHeadAttention)."""
    attention = randomised(MultiHeadAttention(12, 3, 7, 6, value_dim=9, query_bias=True).double())
    key_bias, value_bias = torch.randn(6, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    queries, inputs = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 8, 7, dtype=torch.float64)
    q, k, v = (
        part.unflatten(2, (3, -1)).transpose(1, 2)
        for part in (attention.query(queries), attention.key(inputs) + key_bias, attention.value(inputs) + value_bias)
    )
    expected = attention.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    with torch.no_grad():
        attention.output.bias += attention.output.weight @ value_bias
    assert_close(attention(queries, inputs), expected, 1e-12)


# --- Decoder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("heads, width, values", [(1, None, None), (2, 8, 6)])
def test_decoder_is_transformers(peer, residual, heads, width, values):
    ours = PerceiverDecoder(
        10, 16, 5, heads, residual, mlp_ratio=2, attention_dim=width, value_dim=values, query_bias=True
    )
    ours = randomised(ours.double()).eval()
    config = peer.config(d_latents=16, attn_implementation="eager")
    theirs = peer.modules.PerceiverBasicDecoder(
        config,
        output_num_channels=5,
        position_encoding_type="trainable",
        output_index_dims=7,
        num_channels=10,
        qk_channels=ours.cross_attention.attention.key.out_features,
        v_channels=ours.cross_attention.attention.value.out_features,
        num_heads=heads,
        widening_factor=2,
        use_query_residual=residual,
        trainable_position_encoding_kwargs={"num_channels": 10, "index_dims": 7},
    )
    theirs = theirs.double().eval()
    parameters = {f"decoding_cross_attention.{k}": v for k, v in peer_layer(ours.cross_attention).items()}
    parameters |= {f"final_layer.{name}": value for name, value in ours.output.state_dict().items()}
    parameters["output_position_encodings.position_embeddings"] = torch.zeros(7, 10)
    theirs.load_state_dict(parameters)
    queries, latents = torch.randn(3, 7, 10, dtype=torch.float64), torch.randn(3, 6, 16, dtype=torch.float64)
    with torch.no_grad():
        answers, maps = ours(queries, latents, return_attention=True)
        expected = theirs(queries, latents, output_attentions=True)
    assert_close(answers, expected.logits, 1e-12)
    assert_close(maps, expected.cross_attentions[0], 1e-12)


@given(seed=SEEDS, lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4))
@repeatable(20)
def test_masked_queries_answer_zero_and_reach_no_gradient(seed, lengths):
    torch.manual_seed(seed)
    decoder = randomised(PerceiverDecoder(10, 16, 5, 2, attention_dim=8).double())
    mask = length_mask(lengths, 6)
    queries, latents = torch.randn(len(lengths), 6, 10).double(), torch.randn(len(lengths), 4, 16).double()
    outcomes = []
    for content in (0.0, math.nan, 1e300):
        decoder.zero_grad()
        answers = decoder(queries.masked_fill(~mask[..., None], content), latents, mask)
        answers.square().sum().backward()
        outcomes.append([answers, *gradients(decoder).values()])
    assert not outcomes[0][0][~mask].any()
    assert_close(outcomes[1], outcomes[0], 0)
    assert_close(outcomes[2], outcomes[0], 0)
    for number, length in enumerate(lengths):
        alone = decoder(queries[number : number + 1, :length], latents[number : number + 1])
        assert_close(outcomes[0][0][number, :length], alone[0], 1e-12)


def test_answers_cost_in_proportion_to_the_queries_and_not_to_the_input():
    """Twice the queries, twice the products; nothing in a decoder sees the input."""
    decoder = PerceiverDecoder(32, 64, 5, 4)
    flops = []
    for queries in (10, 20, 40):
        with FlopCounterMode(display=False) as counter:
            decoder(torch.randn(2, queries, 32), torch.randn(2, 8, 64))
        flops.append(counter.get_total_flops())
    assert flops[2] - flops[1] == 2 * (flops[1] - flops[0])


@pytest.mark.parametrize("rows, cols, bands", [(8, 8, 4), (16, 16, 8), (5, 11, 3), (32, 32, 16), (224, 224, 64)])
def test_grid_positions_are_transformers(peer, rows, cols, bands):
    encoding = peer.modules.PerceiverFourierPositionEncoding(bands, (rows, cols))
    ours = grid_positions(rows, cols, bands)
    single = encoding((rows, cols), 1, torch.device("cpu"), torch.float32)[0]
    torch.testing.assert_close(ours, single, rtol=0, atol=1e-4)  # their angles, up to 352, are float32
    axes = [torch.linspace(-1, 1, size, dtype=torch.float64) for size in (rows, cols)]
    coordinates = torch.cartesian_prod(*axes)[None]
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        exact = encoding((rows, cols), 1, torch.device("cpu"), torch.float64, pos=coordinates)[0]
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(ours, exact.float())


@pytest.mark.parametrize("shared, parameters", [(True, 44_894_304), (False, 326_090_184)])
def test_imagenet_model_of_the_paper_is_a_configuration(shared, parameters):
    with torch.device("meta"):
        model = PerceiverModel(**PAPER, share_weights=shared)
        logits = model(torch.empty(1, 224 * 224, 3))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert logits.shape == (1, 1000)


@pytest.mark.parametrize(
    "size, parameters, depths",
    [("tiny", 578_922, [2]), ("small", 3_085_418, [3]), ("base", 21_718_122, [6]), ("large", 69_046_474, [4, 4])],
)
def test_presets_have_exactly_these_parameters(size, parameters, depths):
    with torch.device("meta"):
        model = create_perceiver_model(32, 10, size)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert [len(layers) for layers in model.encoder.self_attention] == depths
    assert len(model.encoder.cross_attention) == len(depths)
    assert list(MODEL_SIZES) == ["tiny", "small", "base", "large"]


# --- Depth and shared weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cross, layers, expected",
    [
        (2, 8, "C SSSS C SSSS"),
        (2, 3, "C SS C S"),
        (3, 8, "C SSS C SSS C SS"),
        (3, 2, "C S C S C"),
        (1, 1, "C S"),
        (4, 4, "C S C S C S C S"),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_layers_run_in_the_documented_order(cross, layers, expected, shared):
    changes = {"num_cross_attention_layers": cross, "num_self_attention_layers": layers, "share_weights": shared}
    if shared and layers % cross:
        with pytest.raises(ValueError, match=f"={layers} is not divisible by .*={cross}"):
            small_model(**changes)
        return
    model, order = small_model(**changes), []
    for module in model.modules():
        kind = {"CrossAttentionBlock": "C", "SelfAttentionBlock": "S"}.get(type(module).__name__)
        if kind:
            module.register_forward_hook(lambda *_, kind=kind: order.append(kind))
    model(torch.randn(1, 4, 5, dtype=torch.float64))
    assert "".join(order) == expected.replace(" ", "")


def test_parameters_grow_with_depth_unless_shared():
    def count(repeats, shared):
        model = small_model(
            num_cross_attention_layers=repeats, num_self_attention_layers=2 * repeats, share_weights=shared
        )
        return len({id(parameter) for parameter in model.parameters()})

    one, two, four = (count(repeats, False) for repeats in (1, 2, 4))
    assert four - two == 2 * (two - one) > 0
    cross_attend = len(list(small_model().encoder.cross_attention[0].parameters()))
    assert count(1, True) == one
    assert count(2, True) == count(4, True) == one + cross_attend  # the first cross-attend keeps its own


@pytest.mark.parametrize(
    "edited, copies",
    [
        ("encoder.self_attention.0.1.mlp.2.bias", [f"encoder.self_attention.{n}.1.mlp.2.bias" for n in range(3)]),
        ("encoder.cross_attention.1.mlp.0.bias", [f"encoder.cross_attention.{n}.mlp.0.bias" for n in (1, 2)]),
        ("encoder.cross_attention.0.mlp.0.bias", ["encoder.cross_attention.0.mlp.0.bias"]),
    ],
)
def test_editing_a_shared_weight_changes_all_its_repeats(edited, copies):
    sizes = {"num_cross_attention_layers": 3, "num_self_attention_layers": 6}
    shared, untied = small_model(**sizes, share_weights=True), small_model(**sizes)
    weights = shared.state_dict()
    for name in untied.state_dict().keys() - weights.keys():
        _, kind, _, rest = name.split(".", 3)
        weights[name] = weights[f"encoder.{kind}.{0 if kind == 'self_attention' else 1}.{rest}"]
    for repeat in (1, 2):  # self-attention, of which the shared model has one set
        for name in [name for name in weights if name.startswith(f"encoder.self_attention.{repeat}.")]:
            weights[name] = weights[name.replace(f"self_attention.{repeat}", "self_attention.0")]
    untied.load_state_dict(weights)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    before = shared(x)
    assert_close(before, untied(x), 1e-12)
    with torch.no_grad():
        for model, names in ((shared, [edited]), (untied, copies)):
            for name in names:
                model.get_parameter(name)[0] += 1
    assert (shared(x) - before).abs().max() > 1e-4
    assert_close(shared(x), untied(x), 1e-12)


# --- Gradient checkpointing ------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen-latents"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_checkpointing_changes_no_gradient(folded, frozen, autocast):
    model = small_model(dropout=0.3, attention_dropout=0.3).float()
    model.encoder.latents.requires_grad_(not frozen)  # frozen: nothing that enters the first block needs a gradient
    x, mask = torch.randn(4, 9, 5), length_mask([9, 4, 1, 0])
    outcomes = []
    for model.encoder.gradient_checkpointing in (False, True):
        torch.manual_seed(3)
        with warnings.catch_warnings(), path_taken(folded), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            warnings.simplefilter("error")
            outcomes.append(loss_and_gradients(model, x, mask))
    assert_close(outcomes[1], outcomes[0], 1e-7)
    assert all(grad.any() for name, grad in outcomes[0][1].items())


def test_checkpointing_saves_memory_in_training_only():
    def numbers_kept(checkpointing, train):
        torch.manual_seed(0)
        model = small_model(num_self_attention_layers=8, gradient_checkpointing=checkpointing).train(train)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            logits = model(torch.randn(4, 9, 5, dtype=torch.float64))
        logits.sum().backward()
        return sum(kept)

    assert numbers_kept(True, True) < numbers_kept(False, True) / 5
    assert numbers_kept(True, False) == numbers_kept(False, False)


# --- Dropout ---------------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("setting", ["dropout", "attention_dropout"])
def test_dropout_acts_in_training_only(setting, folded):
    model, plain = small_model(**{setting: 0.3}), small_model()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    with path_taken(folded):
        assert (model(x) - model(x)).abs().max() > 1e-4
        assert torch.equal(model.eval()(x), plain(x))


def test_dropout_of_everything_leaves_the_latents_as_they_are():
    model = small_model(dropout=1.0)
    latents = model.encoder(torch.randn(2, 9, 21, dtype=torch.float64))
    assert torch.equal(latents, model.encoder.latents.expand(2, -1, -1))


# --- Factory ---------------------------------------------------------------------------------------------------------


def test_examples_work_as_written():
    model = create_perceiver_model(input_dim=32, num_classes=10, model_size="base")
    with torch.no_grad():
        logits = model(torch.randn(4, 100, 32))
    assert logits.shape == (4, 10) and logits.isfinite().all() and logits.std(0).min() > 1e-3
    model = PerceiverModel(
        input_dim=128,
        d_model=512,
        num_heads=8,
        num_cross_attention_layers=2,
        num_self_attention_layers=8,
        num_latents=512,
        num_classes=1000,
    )
    with torch.no_grad():
        logits = model(torch.randn(1, 10, 128))
    assert logits.shape == (1, 1000) and logits.isfinite().all() and logits.std() > 0.1


def test_defaults_are_the_base_preset():
    with torch.device("meta"):
        models = [
            create_perceiver_model(32, 10),
            create_perceiver_model(32, 10, "base"),
            PerceiverModel(32, 10),
            create_perceiver_model(32, 10, "tiny", **MODEL_SIZES["base"]),
        ]
    assert len({repr(model) for model in models}) == 1
    assert len({model.encoder.latents.shape for model in models}) == 1


@pytest.mark.parametrize(
    "override, nearest",
    [
        ("num_latent", "num_latents"),
        ("d_modle", "d_model"),
        ("heads", "num_heads"),
        ("cross_attention_heads", "num_cross_attention_heads"),
        ("share_weight", "share_weights"),
        ("gridshape", "grid_shape"),
        ("checkpointing", "gradient_checkpointing"),
        ("positions", "use_positions"),
    ],
)
def test_unknown_argument_is_refused_with_the_nearest_name(override, nearest):
    for make in (create_perceiver_model, PerceiverModel):
        with pytest.raises(TypeError, match=f"'{override}'.*'{nearest}'"):
            make(32, 10, **{override: 1})


def test_a_misspelt_argument_of_a_modality_is_refused_with_the_nearest_name():
    with pytest.raises(TypeError, match="'image'.*'grid_shap'.*'grid_shape'"):
        PerceiverModel({"image": {"input_dim": 3, "grid_shap": (2, 2)}}, 10)


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ({"use_positions": "no"}, ["use_positions", "'no'"]),
        ({"share_weights": 1}, ["share_weights", "1"]),
        ({"gradient_checkpointing": "false"}, ["gradient_checkpointing", "'false'"]),
        ({"dropout": "a"}, ["dropout", "'a'"]),
        ({"dropout": math.nan}, ["dropout", "nan"]),
        ({"attention_dropout": 1.5}, ["attention_dropout", "1.5"]),
        ({"attention_dropout": True}, ["attention_dropout", "True"]),
        ({"embedding_dim": 8}, ["embedding_dim", "vocab_size"]),
        ({"use_positions": False, "num_frequency_bands": 4}, ["num_frequency_bands", "use_positions"]),
    ],
)
def test_an_argument_of_a_wrong_kind_or_without_effect_is_refused(arguments, parts):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, parts))):
        PerceiverModel(32, 10, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_dim": 1, "use_positions": False},
        {"input_dim": 1, "use_positions": False, "grid_shape": (3, 3)},
        {"input_dim": {"text": {"vocab_size": 9, "embedding_dim": 1, "use_positions": False}}},
        {"input_dim": {name: {"use_positions": False} for name in ("one", "other")}},
    ],
    ids=["sequence", "grid", "embedding", "several"],
)
def test_tokens_of_one_channel_are_told_apart(arguments):
    """The layer norm of one channel would give 0 whatever it holds."""
    model = small_model(**arguments).eval()
    x = torch.randint(9, (4, 9, 1)).double()
    x = dict.fromkeys(arguments["input_dim"], x) if isinstance(arguments["input_dim"], dict) else x
    logits = model(x)
    assert (logits[1:] - logits[:1]).abs().amax(1).min() > 1e-4


def test_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'huge'.*tiny, small, base, large"):
        create_perceiver_model(32, 10, "huge")


@pytest.mark.parametrize(
    "size",
    [
        "input_dim",
        "num_classes",
        "d_model",
        "num_heads",
        "num_latents",
        "num_cross_attention_layers",
        "num_self_attention_layers",
        "num_cross_attention_heads",
        "cross_attention_dim",
        "mlp_ratio",
        "num_frequency_bands",
    ],
)
@pytest.mark.parametrize("value", [0, -4, 8.0, 2.5, "8", math.nan])
def test_bad_size_is_refused_by_name_and_value(size, value):
    with torch.device("meta"), pytest.raises(ValueError) as error:
        create_perceiver_model(**{"input_dim": 32, "num_classes": 10, "model_size": "tiny", size: value})
    assert size in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize("size", ["d_model", "num_heads", "num_latents", "num_self_attention_layers", "mlp_ratio"])
def test_size_that_has_no_default_to_fall_back_on_must_be_given(size):
    with torch.device("meta"), pytest.raises(ValueError, match=f"{size} .*None"):
        create_perceiver_model(32, 10, "tiny", **{size: None})


@pytest.mark.parametrize("grid_shape", [(0, 4), (4, -1), (4,), (2, 2, 2), (2.0, 2), ("4", "4"), 4])
def test_bad_grid_is_refused_by_name_and_value(grid_shape):
    with torch.device("meta"), pytest.raises(ValueError) as error:
        create_perceiver_model(3, 10, "tiny", grid_shape=grid_shape)
    assert "grid_shape" in str(error.value)


@pytest.mark.parametrize("setting", ["dropout", "attention_dropout"])
@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_bad_dropout_is_refused_when_the_model_is_made(setting, value):
    with torch.device("meta"), pytest.raises(ValueError, match=str(value)):
        create_perceiver_model(3, 10, "tiny", **{setting: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": 100, "num_heads": 8},
        {"d_model": 96, "num_cross_attention_heads": 5},
        {"cross_attention_dim": 18, "num_heads": 4},
        {"cross_attention_dim": 18, "num_cross_attention_heads": 4},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_width_that_the_heads_do_not_divide_is_refused_by_names_and_numbers(changes):
    with torch.device("meta"), pytest.raises(ValueError) as error:
        create_perceiver_model(32, 10, "tiny", **changes)
    for name, value in changes.items():
        assert name in str(error.value) and str(value) in str(error.value)


# --- Copies and files ------------------------------------------------------------------------------------------------


def through_state_dict(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = small_model(grid_shape=model.modalities["input"].grid_shape)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize("copied", [copy.deepcopy, through_state_dict, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("grid_shape", [None, (4, 3)])
@pytest.mark.parametrize("used", [False, True])
def test_copies_compute_the_same_and_are_apart(copied, grid_shape, used):
    model, x = small_model(grid_shape=grid_shape), torch.randn(2, 12, 5, dtype=torch.float64)
    if used:
        with torch.inference_mode():
            model(x)
    other = copied(model)
    expected = loss_and_gradients(model, x)
    assert_close(loss_and_gradients(other, x), expected, 0.0)
    with torch.no_grad():
        other.encoder.latents.add_(1)
    assert torch.equal(model(x), expected[0])


@pytest.mark.parametrize("grid_shape", [None, (4, 3)])
def test_state_dict_holds_the_parameters_and_nothing_else_whatever_the_path(grid_shape):
    shapes = []
    for folded in (False, True):
        model = small_model(grid_shape=grid_shape)
        with path_taken(folded):
            model(torch.randn(2, 12, 5, dtype=torch.float64))
        assert model.state_dict().keys() == dict(model.named_parameters()).keys()
        shapes.append({name: value.shape for name, value in model.state_dict().items()})
    assert shapes[0] == shapes[1]


# --- Initialisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_fresh_model_starts_at_a_sane_scale(size):
    model = create_perceiver_model(32, 10, size, num_latents=16).eval()  # fewer latents: as deep, but quick
    x = torch.randn(20, 30, 32)
    with torch.no_grad():
        logits = model(x)
    assert 0.4 < logits.std() < 1.6
    assert F.cross_entropy(logits, torch.arange(20) % 10) < math.log(10) + 1
    assert logits.std(0).mean() > 0.1  # the input reaches the logits


def test_latents_start_from_a_truncated_normal_of_two_hundredths():
    latents = create_perceiver_model(3, 2, "base", num_self_attention_layers=1).encoder.latents
    assert abs(latents.mean()) < 0.0005
    assert abs(latents.std() / 0.02 - 1) < 0.02
    assert abs(((latents / 0.02) ** 4).mean() / 3 - 1) < 0.1  # a normal, hardly truncated


def test_linear_layers_start_from_lecuns_truncated_normal():
    """Variance 1 / inputs after the truncation, as the authors' initialiser (VarianceScaling) makes it."""
    model = create_perceiver_model(30, 10, "base", num_self_attention_layers=1, num_cross_attention_layers=1)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(layers) == 13
    for name, layer in layers.items():
        scaled = layer.weight * layer.in_features**0.5
        count = scaled.numel()
        assert abs(scaled.mean()) < 5 / count**0.5, name
        assert abs(scaled.std() - 1) < 4 / count**0.5, f"{name}: {scaled.std():.3f} / sqrt(inputs)"
        assert scaled.abs().max() < 2.3, name
        assert layer.bias is None or not layer.bias.any(), name


def test_one_seed_makes_one_model():
    models = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        models.append(create_perceiver_model(8, 3, "tiny"))
    x = torch.randn(2, 7, 8)
    first, same, other = (model(x) for model in models)
    assert torch.equal(first, same)
    assert (first - other).abs().max() > 1e-3


# --- Training: what the mask hides, and half precision ---------------------------------------------------------------


def hidden_signal(samples, generator):
    """Three classes told by three real tokens anywhere; padding shouts the wrong class. Also returns where they are."""
    labels = torch.randint(3, (samples,), generator=generator)
    mask = torch.arange(12) < torch.randint(4, 13, (samples, 1), generator=generator)
    signal = torch.zeros_like(mask)
    chosen = torch.rand(samples, 12, generator=generator).masked_fill(~mask, -1).topk(3).indices
    signal[torch.arange(samples)[:, None], chosen] = True
    x = torch.randn(samples, 12, 6, generator=generator)
    x[..., :3] += 3 * F.one_hot(labels, 3)[:, None] * signal[..., None]
    x[..., :3] += 3 * F.one_hot((labels + 1) % 3, 3)[:, None] * ~mask[..., None]
    return x, mask, labels, signal


@pytest.fixture(scope="module")
def trained():
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    model = PerceiverModel(6, 3, **SMALL | {"num_cross_attention_layers": 1, "num_self_attention_layers": 1})
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(150):
        x, mask, labels, _ = hidden_signal(64, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x, mask), labels).backward()
        optimizer.step()
    return SimpleNamespace(model=model.eval(), data=hidden_signal(1000, generator))


def test_mask_decides_what_is_seen(trained):
    x, mask, labels, signal = trained.data

    def accuracy(mask):
        with torch.no_grad():
            return (trained.model(x, mask).argmax(1) == labels).double().mean().item()

    assert accuracy(mask) > 0.95
    assert 0.2 < accuracy(mask & ~signal) < 0.47  # chance is a third
    assert accuracy(torch.ones_like(mask)) < 0.8  # padding does mislead where it is seen


def check_half_precision(trained, device, dtype):
    model, (x, mask, labels) = copy.deepcopy(trained.model).to(device), (each.to(device) for each in trained.data[:3])
    x, mask = x.clone(), mask.clone()
    mask[:10] = False  # a few samples without any token
    x[~mask] = math.nan
    with torch.no_grad():
        full = model(x, mask)
    with torch.autocast(device, dtype):
        logits = model(x, mask)
        loss = F.cross_entropy(logits, labels)
    loss.backward()
    assert logits.dtype == dtype
    assert loss.isfinite() and all(grad.isfinite().all() for grad in gradients(model).values())
    assert all(grad.any() for grad in gradients(model).values())
    assert (logits.argmax(1) == full.argmax(1)).double().mean() > 0.99


@PATHS
def test_bfloat16_predicts_the_same(trained, folded):
    with path_taken(folded):
        check_half_precision(trained, "cpu", torch.bfloat16)


@pytest.mark.cuda
class TestCuda:
    @PATHS
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_predicts_the_same(self, trained, folded, dtype):
        with path_taken(folded):
            check_half_precision(trained, "cuda", dtype)

    @PATHS
    @pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
    def test_scaled_step_is_finite_and_moves_every_parameter(self, folded, checkpointing):
        model = create_perceiver_model(13, 4, "tiny", dropout=0.1, gradient_checkpointing=checkpointing).cuda()
        before = copy.deepcopy(model.state_dict())
        x, mask = torch.randn(8, 50, 13, device="cuda"), length_mask([50, 50, 33, 9, 8, 7, 1, 0]).cuda()
        optimizer, scaler = torch.optim.AdamW(model.parameters(), 1e-3), torch.amp.GradScaler("cuda", 2.0**10)
        with path_taken(folded):
            with torch.autocast("cuda", torch.float16):
                loss = F.cross_entropy(model(x, mask), torch.arange(8, device="cuda") % 4)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        assert loss.isfinite()
        for name, value in model.state_dict().items():
            assert value.isfinite().all() and not torch.equal(value, before[name]), name

    def test_float64_paths_and_devices_agree(self):
        model, x, mask = small_model(), torch.randn(4, 9, 5).double(), length_mask([9, 4, 1, 0])
        expected = loss_and_gradients(model, x, mask)
        model.cuda()  # after use: the table of positions follows
        for folded in (False, True):
            with path_taken(folded):
                model.zero_grad()
                logits = model(x.cuda(), mask.cuda())
                F.cross_entropy(logits.float(), torch.arange(4, device="cuda") % 3).backward()
            assert_close(logits.detach().cpu(), expected[0], 1e-11)
            grads = {name: grad.cpu() for name, grad in gradients(model).items()}
            assert_close(grads, expected[1], 1e-6)  # the loss is taken in float32

    @pytest.mark.parametrize("masked", [False, True])
    def test_odd_channels_still_run_on_a_fused_kernel(self, masked):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        attention = MultiHeadAttention(64, 4, 19).cuda()
        queries, inputs = torch.randn(1, 8, 64, device="cuda"), torch.randn(2, 203, 19, device="cuda")
        mask = length_mask([203, 60]).cuda() if masked else None
        fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
        with path_taken(True), sdpa_kernel(fused), torch.autocast("cuda", torch.float16):
            attention(queries, inputs, mask).sum().backward()  # an error where no fused kernel applies
        assert all(grad.isfinite().all() for grad in gradients(attention).values())


# --- Heads, stems and learned positions ------------------------------------------------------------------------------

LANGUAGE = {
    "vocab_size": 20,
    "embedding_dim": 12,
    "learned_positions": True,
    "max_length": 144,
    "add_positions": True,
    "head": "positions",
    "num_queries": 144,
    "query_dim": 12,
    "num_decoder_heads": 3,
    "decoder_dim": 6,
    "tie_embedding": True,
}
VARIANTS = {  # changes of the small model, features of a token
    "query": ({"head": "query", "decoder_value_dim": 6, "query_bias": True}, 5),
    "positions": ({"head": "positions", "num_queries": 150, "query_dim": 10, "num_decoder_heads": 2}, 5),
    "language": (LANGUAGE | {"num_classes": 20}, 1),
    "linear": ({"stem": "linear", "stem_dim": 7, "learned_positions": True, "project_positions": True}
               | {"grid_shape": (12, 12)}, 5),
    "conv": ({"stem": "conv", "stem_dim": 4, "grid_shape": (12, 12), "head": "query"}, 3),
}  # fmt: skip
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def variant_of(name, **changes):
    arguments, features = VARIANTS[name]
    return small_model(features, **arguments | changes)


def variant_inputs(name, samples=3, tokens=144):
    """x, and a mask with all tokens, a few, and none."""
    features = VARIANTS[name][1]
    x = torch.randint(20, (samples, tokens, 1)) if name == "language" else torch.randn(samples, tokens, features)
    return x.double(), length_mask([tokens, 30, 0], tokens)[:samples]


def variant_loss(model, *args):
    model.zero_grad()
    logits = model(*args)
    logits.sin().sum().backward()
    return logits.detach(), gradients(model)


def test_help_and_completion_show_every_argument_by_name():
    classes = (token_features.TokenFeatures, PerceiverEncoder, perceiver_model.OutputQueries)
    # Of the decoder, which PerceiverModel gives it
    hidden = {"d_model", "num_outputs", "query_residual", "block", "token_dim"}
    for function, first in ((PerceiverModel, 2), (create_perceiver_model, 3)):
        parameters = inspect.signature(function).parameters
        assert list(parameters)[:first] == ["input_dim", "num_classes", "model_size"][:first]
        assert not any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        for cls in classes:
            for name, argument in inspect.signature(cls).parameters.items():
                if name != "input_dim" and not (cls is classes[2] and name in hidden):
                    assert parameters[name].default == argument.default
                    assert parameters[name].annotation == argument.annotation
        shown = pydoc.plain(pydoc.render_doc(function))
        assert all(f"{name}: " in shown for name in parameters)


def test_arguments_keep_their_places():
    """Those that users may have given by position."""
    for cls, names in {
        MultiHeadAttention: "d_model num_heads input_dim attention_dim dropout",
        PerceiverEncoder: "input_dim d_model num_heads num_latents num_cross_attention_layers "
        "num_self_attention_layers num_cross_attention_heads cross_attention_dim mlp_ratio dropout attention_dropout "
        "share_weights gradient_checkpointing",
        token_features.TokenFeatures: "input_dim vocab_size embedding_dim grid_shape use_positions num_frequency_bands",
        token_features.PositionFeatures: "grid_shape num_bands",
        grid_positions: "rows cols num_bands device",
    }.items():
        assert list(inspect.signature(cls).parameters)[: len(names.split())] == names.split()


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_a_query_in_the_place_of_the_mean_has_exactly_these_parameters(size):
    """Six matrices of D x D; 14 vectors of width D: query, norms, biases; the mean has the 2 of its norm."""
    with torch.device("meta"):
        models = [create_perceiver_model(32, 10, size, head=head) for head in ("query", "mean")]
    query, mean = (sum(parameter.numel() for parameter in model.parameters()) for model in models)
    width = MODEL_SIZES[size]["d_model"]
    assert query - mean == 6 * width**2 + 8 * width


def test_heads_read_the_latents_as_described():
    x, mask = variant_inputs("query")
    for name in ("query", "positions"):
        model = variant_of(name).eval()
        latents = model.encode(x, mask)
        queries = model.output.queries.expand(3, -1, -1)
        answered = model.output.decoder.cross_attention(queries, latents)
        answers = model.output.decoder.output(answered)
        logits = model(x, mask)
        if name == "query":
            assert_close(logits, answers[:, 0], 1e-12)
            assert_close(model.pooled_latents(x, mask), answered[:, 0], 1e-12)
        else:
            assert_close(logits, answers[:, :144], 1e-12)  # one for each token
            assert_close(model.pooled_latents(x, mask), latents.mean(1), 1e-12)
    model = variant_of("language").eval()
    x, mask = variant_inputs("language")
    answers = model.output.decoder(model.output.queries[None], model.encode(x, mask))
    embedding = model.modalities["input"].embedding.weight
    assert_close(model(x, mask), answers @ embedding.T + model.output_bias, 1e-12)
    model = small_model().eval()
    x, mask = variant_inputs("query")
    assert_close(model.pooled_latents(x, mask), model.norm(model.encode(x, mask)).mean(1), 1e-12)


@EVERY_VARIANT
@PATHS
def test_what_padding_holds_changes_nothing_in_any_variant(variant, folded):
    model = variant_of(variant).eval()
    x, mask = variant_inputs(variant)
    outcomes = []
    for rubbish in (0.0, math.nan, math.inf, 7.0):
        leaf = x.masked_fill(~mask[..., None], rubbish).requires_grad_()
        with path_taken(folded):
            outcomes.append([*variant_loss(model, leaf, mask)])
    assert outcomes[0][0].isfinite().all() and all(each.isfinite().all() for each in outcomes[0][1].values())
    for other in outcomes[1:]:
        assert_close(other, outcomes[0], 0)


@pytest.mark.parametrize("variant", ["query", "positions", "language"])
def test_a_sample_of_any_variant_gets_its_own_logits_in_a_batch(variant):
    model = variant_of(variant).eval()
    x, mask = variant_inputs(variant)
    logits = model(x, mask)
    for sample, length in enumerate([144, 30]):
        alone = model(x[sample : sample + 1, :length])[0]
        assert_close(logits[sample] if variant == "query" else logits[sample, :length], alone, 1e-12)


@EVERY_VARIANT
def test_every_parameter_of_any_variant_gets_a_gradient(variant):
    _, grads = variant_loss(variant_of(variant).train(), *variant_inputs(variant))
    idle = [name for name, grad in grads.items() if not grad.any() or not grad.isfinite().all()]
    assert not idle


@EVERY_VARIANT
def test_a_recomputed_variant_is_the_plain_one(variant):
    plain, saving = variant_of(variant), variant_of(variant, gradient_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x, mask = variant_inputs(variant)
    assert_close(variant_loss(saving.train(), x, mask), variant_loss(plain.train(), x, mask), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["language", "conv"])
def test_a_compiled_variant_is_the_plain_one(variant):
    model = variant_of(variant).eval()
    x, mask = variant_inputs(variant)
    logits, grads = variant_loss(model, x, mask)
    torch._dynamo.reset()
    found = variant_loss(torch.compile(model, backend="aot_eager"), x, mask)
    assert_close(found[0], logits, 1e-12)
    assert_close(list(found[1].values()), list(grads.values()), 1e-12)


@EVERY_VARIANT
def test_a_variant_in_bfloat16_is_close(variant):
    model = variant_of(variant).float().eval()
    x, mask = variant_inputs(variant)
    expected = model(x.float(), mask)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x.float(), mask)
    logits.float().sum().backward()
    assert_close(logits.float().detach(), expected.detach(), 0.05)
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@EVERY_VARIANT
def test_maps_of_a_variant_are_distributions_over_what_its_stem_leaves(variant):
    model = variant_of(variant).eval()
    x, mask = variant_inputs(variant)
    logits, maps = model(x, mask, return_attention=True)
    assert_close(logits, model(x, mask), 1e-12)
    length = 4 if variant == "conv" else 144
    assert model.token_ranges(x) == {"input": slice(0, length)}
    for each in maps:
        assert each.shape == (3, 4, 6, length)
        assert_close(each.sum(3)[:2], torch.ones(2, 4, 6), 1e-12)
        assert not each[2].any()


def test_a_stem_of_one_modality_stands_beside_others():
    model = several_model({
        "image": {"input_dim": 3, "grid_shape": (9, 13), "stem": "conv", "stem_dim": 6},
        "series": {"input_dim": 2, "stem": "linear"},
        "text": {"vocab_size": 20, "learned_positions": True, "max_length": 5},
    }).eval()  # fmt: skip
    x = {
        "image": torch.randn(2, 117, 3).double(),
        "series": torch.randn(2, 4, 2).double(),
        "text": torch.randint(20, (2, 5, 1)).double(),
    }
    assert model.token_ranges(x) == {"image": slice(0, 6), "series": slice(6, 10), "text": slice(10, 15)}
    mask = {name: torch.ones(values.shape[:2]) for name, values in x.items()}
    assert_close(model(x, mask), model(x), 1e-12)
    mask["image"][1] = 0
    logits, maps = model(x, mask, return_attention=True)
    assert not maps[0][1, ..., :6].any() and maps[0][0, ..., :6].all()
    assert_close(logits[0], model(x)[0], 1e-12)
    without = {name: values[1:] for name, values in x.items() if name != "image"}
    assert_close(logits[1:], model(without), 1e-12)


@pytest.mark.parametrize("rows, cols, grid", [(5, 5, (1, 1)), (9, 12, (2, 2)), (32, 64, (7, 15)), (224, 224, (55, 55))])
def test_a_convolution_leaves_this_grid(rows, cols, grid):
    with torch.device("meta"):
        model = PerceiverModel(3, 2, stem="conv", grid_shape=(rows, cols), **SMALL)
        tokens, _ = model.modalities["input"](torch.empty(1, rows * cols, 3))
    assert model.modalities["input"].token_grid == grid and tokens.shape[1] == math.prod(grid)


def test_positions_of_a_given_resolution_keep_their_frequencies():
    """The edges of an image of twice the size are where those of the smaller one are."""
    small, large = grid_positions(8, 6, 4), grid_positions(16, 12, 4, max_resolution=(8, 6))
    assert torch.equal(small, grid_positions(8, 6, 4, max_resolution=(8, 6)))
    for corner, other in ((0, 0), (5, 11), (-6, -12), (-1, -1)):
        assert torch.equal(small[corner], large[other])
    assert not torch.equal(grid_positions(16, 12, 4), large)


def test_variants_start_at_a_sane_scale():
    x = torch.randn(20, 64, 3)
    for arguments in ({"head": "query"}, {"stem": "linear", "learned_positions": True}, {"stem": "conv"}):
        model = create_perceiver_model(3, 10, "tiny", grid_shape=(8, 8), **arguments).eval()
        with torch.no_grad():
            logits = model(x)
        assert 0.4 < logits.std() < 1.6 and logits.std(0).mean() > 0.1
    tokens = token_features.TokenFeatures(1, 262, 32, learned_positions=True, max_length=50, add_positions=True)
    assert 0.015 < tokens.positions.table.std() < 0.025 and 0.015 < tokens.embedding.weight.std() < 0.025


@pytest.mark.parametrize("variant, tokens, parts", [
    ("language", 145, ["145 tokens", "144 positions"]),
    ("positions", 151, ["151 tokens", "150", "num_queries"]),
    ("linear", 143, ["143 tokens", "12 x 12"]),
    ("conv", 145, ["145 tokens", "12 x 12"]),
])  # fmt: skip
def test_an_input_that_is_too_long_is_refused(variant, tokens, parts):
    model = variant_of(variant)
    with pytest.raises(ValueError) as caught:
        model(variant_inputs(variant, tokens=tokens)[0])
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("arguments, parts", [
    ({"head": "median"}, ["head", "mean, query, positions", "'median'"]),
    ({"query_dim": 8}, ["query_dim=8", "no effect", "head='mean'"]),
    ({"num_decoder_heads": 2}, ["num_decoder_heads=2", "no effect", "head='mean'"]),
    ({"num_queries": 4, "head": "query"}, ["num_queries=4", "no effect", "head='query'"]),
    ({"head": "positions"}, ["positions", "num_queries"]),
    ({"head": "positions", "num_queries": 0}, ["num_queries", "0"]),
    ({"head": "query", "query_dim": 9, "num_decoder_heads": 2}, ["query_dim=9", "num_decoder_heads=2"]),
    ({"head": "query", "decoder_dim": 9, "num_decoder_heads": 2}, ["decoder_dim=9", "num_decoder_heads=2"]),
    ({"head": "query", "decoder_value_dim": 9, "num_decoder_heads": 2}, ["decoder_value_dim=9", "num_decoder_heads=2"]),
    ({"head": "query", "decoder_mlp_ratio": 0}, ["decoder_mlp_ratio", "0"]),
    ({"tie_embedding": True}, ["tie_embedding", "positions", "vocab_size"]),
    ({"tie_embedding": 1}, ["tie_embedding", "True or False"]),
    ({"tie_embedding": True, "head": "positions", "num_queries": 9}, ["tie_embedding", "vocab_size"]),
    (LANGUAGE | {"input_dim": 1}, ["tie_embedding", "num_classes=20", "not 3"]),
    (LANGUAGE | {"input_dim": 1, "num_classes": 20, "query_dim": 15}, ["tie_embedding", "query_dim=12", "not 15"]),
    ({"input_dim": {"a": {}, "b": {}}, "head": "positions", "num_queries": 9}, ["positions", "one modality", "a, b"]),
    ({"stem": "deep"}, ["stem", "'linear', 'conv', 'windows' or None", "'deep'"]),
    ({"stem": "conv", "grid_shape": (4, 9)}, ["conv", "5 rows", "(4, 9)"]),
    ({"stem": "linear", "stem_dim": 0}, ["stem_dim", "0"]),
    ({"stem_dim": 8}, ["stem_dim=8", "no effect", "stem"]),
    ({"input_dim": 1, "vocab_size": 9, "stem": "linear"}, ["vocab_size", "stem='linear'"]),
    ({"learned_positions": True}, ["max_length", "None"]),
    ({"learned_positions": True, "max_length": 9, "grid_shape": (3, 3)}, ["max_length=9", "no effect", "sequence"]),
    ({"max_length": 9}, ["max_length=9", "no effect", "learned_positions"]),
    ({"add_positions": True}, ["add_positions", "no effect", "learned_positions"]),
    ({"project_positions": True}, ["project_positions", "no effect", "learned_positions"]),
    ({"learned_positions": True, "max_length": 9, "use_positions": False}, ["learned_positions", "use_positions"]),
    ({"learned_positions": True, "max_length": 9, "num_frequency_bands": 3}, ["num_frequency_bands=3", "computed"]),
    ({"max_resolution": (4, 4)}, ["max_resolution=(4, 4)", "no effect", "grid"]),
    ({"grid_shape": (3, 3), "max_resolution": (4,)}, ["max_resolution", "(4,)"]),
    ({"grid_shape": (3, 3), "max_resolution": (4, 0)}, ["cols of max_resolution", "0"]),
    ({"learned_positions": "yes", "max_length": 9}, ["learned_positions", "'yes'"]),
    ({"input_dim": {"a": {"stem_dim": 3}, "b": {"stem": "linear"}}}, ["stem_dim=3", "no effect"]),
])  # fmt: skip
def test_arguments_that_do_not_go_together_are_refused_by_name(arguments, parts):
    with pytest.raises(ValueError) as caught:
        PerceiverModel(**{"input_dim": 3, "num_classes": 3, **SMALL, **arguments})
    assert all(part in str(caught.value) for part in parts), caught.value


def test_an_argument_that_modalities_share_needs_an_effect_in_one_of_them():
    modalities = {"a": {"input_dim": 2, "stem": "linear"}, "b": {"input_dim": 3}}
    assert several_model(modalities, stem_dim=9).modalities["a"].stem.out_features == 9


# --- Several modalities ----------------------------------------------------------------------------------------------

SEVERAL = {
    "image": {"input_dim": 6, "grid_shape": (2, 3)},
    "text": {"vocab_size": 20, "embedding_dim": 7},
    "series": {"input_dim": 2, "use_positions": False},
}
LENGTHS = {"image": 6, "text": 5, "series": 4}


def several_model(modalities=SEVERAL, **changes):
    return small_model(modalities, **changes)


def several_inputs(samples=3, lengths=LENGTHS):
    """x and mask, all tokens real: dicts by modality."""
    x = {
        "image": torch.randn(samples, lengths["image"], 6).double(),
        "text": torch.randint(0, 20, (samples, lengths["text"], 1)).double(),
        "series": torch.randn(samples, lengths["series"], 2).double(),
    }
    return x, {name: torch.ones(values.shape[:2], dtype=torch.bool) for name, values in x.items()}


def ragged_inputs():
    """Three samples of different lengths; the second lacks the text, the third has only a series."""
    x, mask = several_inputs()
    mask["text"] = length_mask([5, 0, 0])
    mask["image"][2] = False
    mask["series"] = length_mask([2, 4, 1], 4)
    return x, mask


def plain_tokens(model, x):
    """The matrix (B, L, C) that the encoder reads, by hand in NumPy, from the modalities in x."""
    parts, width = [], 7 + 16 + 4  # the widest is the text: embedding, 8 bands; and the learned channels
    for name, values in x.items():
        weights, values = nested(model.modalities[name]), values.numpy()
        if name == "image":
            features = np.concatenate([values, np.tile(plain_grid_positions(2, 3, 3), (len(values), 1, 1))], 2)
        elif name == "text":
            features = weights["embedding"]["weight"][values[..., 0].astype(int)]
            positions = plain_sequence_positions(values.shape[1], 8)
            features = np.concatenate([features, np.tile(positions, (len(values), 1, 1))], 2)
        else:
            features = values
        encoding = weights["encoding"]
        assert features.shape[2] + len(encoding) == width
        parts.append(np.concatenate([features, np.tile(encoding, (*features.shape[:2], 1))], 2))
    return torch.tensor(np.concatenate(parts, 1))


@PATHS
def test_several_modalities_are_one_matrix_of_tokens(folded):
    model = several_model({**SEVERAL, "image": SEVERAL["image"] | {"num_frequency_bands": 3}})
    x, mask = ragged_inputs()
    with path_taken(folded), torch.no_grad():
        logits, maps = model(x, mask, return_attention=True)
        latents, expected = model.encoder(plain_tokens(model, x), torch.cat(list(mask.values()), 1), True)
        assert_close(logits, model.classifier(model.norm(latents).mean(1)), 1e-7)  # positions are float32
        assert_close(maps, expected, 1e-7)
        assert_close(model.pooled_latents(x, mask), model.norm(latents).mean(1), 1e-7)
        shuffled = {name: x[name] for name in ("series", "image", "text")}  # the order is the model's
        assert torch.equal(model(shuffled, mask), logits)
        whole = model(x)
        assert_close(whole, model(x, several_inputs()[1]), 0)  # no mask: all tokens are real


def check_missing(model, name, samples, rubbish):
    """The ways to say that these of the three samples lack a modality."""
    x, mask = ragged_inputs()
    mask[name][samples] = False
    expected = model(x, mask)
    assert expected.isfinite().all()
    hidden = {**x, name: x[name].clone()}
    hidden[name][samples] = rubbish
    assert torch.equal(model(hidden, mask), expected)
    if len(samples) == 3:
        without = {other: values for other, values in x.items() if other != name}
        assert_close(model(without, {other: mask[other] for other in without}), expected, 1e-12)


@PATHS
@pytest.mark.parametrize("name", SEVERAL)
def test_a_missing_modality_is_one_thing_however_it_is_said(name, folded):
    model = several_model().eval()
    with path_taken(folded), torch.no_grad():
        for samples in ([0], [0, 1], [0, 1, 2]):
            for rubbish in (0.0, 7.0, -3.0, math.nan, math.inf):
                check_missing(model, name, samples, rubbish)


@pytest.mark.parametrize("name", SEVERAL)
def test_left_out_is_the_same_bits_as_hidden(name):
    """To the bit where as many tokens are hidden as stand for what is left out, else but for the order of sums."""
    for dtype in (torch.float64, torch.float32):
        model = several_model().to(dtype).eval()
        for length in (6,) if name == "image" else (1, 2, 5, 9):
            x, mask = several_inputs(lengths=LENGTHS | {name: length})
            x = {other: values.to(dtype) for other, values in x.items()}
            mask[name][:] = False
            without = {other: values for other, values in x.items() if other != name}
            with torch.no_grad():
                given_, left_out = model(x, mask), model(without)
            if length == model.modalities[name].missing_length:
                assert torch.equal(given_, left_out)
            assert_close(given_, left_out, 1e-12 if dtype == torch.float64 else 1e-5)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.data(), st.booleans(), SEEDS)
def test_a_sample_does_not_depend_on_what_its_neighbours_have(data, folded, seed):
    torch.manual_seed(seed)
    model = several_model().eval()
    samples = data.draw(st.integers(2, 4))
    x, mask = several_inputs(samples, {"image": 6, "text": data.draw(st.integers(1, 7)), "series": 3})
    for name in mask:
        for sample in range(samples):
            length = data.draw(st.integers(0, mask[name].size(1)))
            mask[name][sample, length if name != "image" else 6 * (length > 2) :] = False
    with path_taken(folded), torch.no_grad():
        logits = model(x, mask)
        for sample in range(samples):
            there = [name for name in x if mask[name][sample].any()]
            if not there:  # a batch must have a modality
                there = ["image"]
            alone = {name: x[name][sample : sample + 1] for name in there}
            real = {name: mask[name][sample : sample + 1] for name in there}
            for name in set(there) - {"image"} if real[there[0]].any() else ():  # without the padding, too
                length = int(real[name].sum())
                alone[name], real[name] = alone[name][:, :length], real[name][:, :length]
            assert_close(model(alone, real), logits[sample : sample + 1], 1e-12)


@pytest.mark.parametrize("features", [{"input_dim": 6, "grid_shape": (2, 3)}, {"vocab_size": 20}, {"input_dim": 2}])
def test_a_dict_of_one_modality_is_the_plain_model(features):
    width = features.get("input_dim", 1)
    plain = small_model(width, **{name: value for name, value in features.items() if name != "input_dim"})
    named = small_model({"some": features})
    state = {key.replace("modalities.input", "modalities.some"): value for key, value in plain.state_dict().items()}
    named.load_state_dict(state)  # strict: no weight more
    x, mask = torch.randint(0, 20, (2, 6, width)).double(), length_mask([6, 4])
    logits, maps = plain(x, mask, return_attention=True)
    for inputs, masks in (({"some": x}, {"some": mask}), (x, mask), ({"some": x}, mask)):
        got, got_maps = named(inputs, masks, return_attention=True)
        assert torch.equal(got, logits) and all(map(torch.equal, got_maps, maps))
    assert named.token_ranges({"some": x}) == named.token_ranges(x) == {"some": slice(0, 6)}


@PATHS
@pytest.mark.parametrize("absent", [(), ("image",), ("text",), ("image", "series")])
def test_every_parameter_gets_a_gradient_whatever_is_absent(absent, folded):
    model = several_model().train()
    x, mask = ragged_inputs()
    mask = {name: real.clone().fill_(True) for name, real in mask.items()}
    with path_taken(folded):
        x = {name: values for name, values in x.items() if name not in absent}
        _, grads = loss_and_gradients(model, x, {name: mask[name] for name in x})
    assert grads.keys() == dict(model.named_parameters()).keys()  # so that DistributedDataParallel finds them all
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
        assert grad.any() != any(f"modalities.{other}." in name for other in absent), name


@PATHS
def test_token_ranges_are_those_of_the_maps(folded):
    model = several_model().eval()
    x, mask = ragged_inputs()
    ranges = model.token_ranges(x)
    assert ranges == {"image": slice(0, 6), "text": slice(6, 11), "series": slice(11, 15)}
    with path_taken(folded):
        _, maps = model(x, mask, return_attention=True)
        for weights in maps:
            assert weights.shape[3] == 15
            assert_close(weights.sum(3), torch.ones(weights.shape[:3]), 1e-12)
            for name, columns in ranges.items():
                real = mask[name][:, None, None].expand_as(weights[..., columns])
                assert (weights[..., columns][real] > 0).all() and not weights[..., columns][~real].any()
        del x["text"], mask["text"]
        _, maps = model(x, mask, return_attention=True)
    ranges = model.token_ranges(x)
    assert ranges == {"image": slice(0, 6), "text": slice(6, 7), "series": slice(7, 11)}
    for weights in maps:
        assert weights.shape[3] == 11 and not weights[..., ranges["text"]].any()
        assert_close(weights.sum(3), torch.ones(weights.shape[:3]), 1e-12)


@pytest.mark.parametrize("change, parts", [
    (lambda x, mask: ({**x, "sound": x["image"]}, mask), ["'sound'", "image, text, series"]),
    (lambda x, mask: (x, {**mask, "sound": mask["image"]}), ["mask", "'sound'"]),
    (lambda x, mask: (x["image"], mask), ["input must be a dict", "image, text, series"]),
    (lambda x, mask: (x, mask["image"]), ["mask must be a dict", "image, text, series"]),
    (lambda x, mask: ({**x, "text": x["text"][:2]}, None), ["same number of samples", "'text': 2", "'image': 3"]),
    (lambda x, mask: ({**x, "series": x["series"][..., :1]}, mask), ["series", "(3, 4, 1)", "2)"]),
    (lambda x, mask: ({**x, "image": x["image"][:, :5]}, None), ["image", "5 tokens", "2 x 3"]),
    (lambda x, mask: ({**x, "text": x["text"][:, :0]}, None), ["text", "(3, 0, 1)"]),
    (lambda x, mask: ({**x, "text": x["text"][..., 0]}, mask), ["text", "(3, 5)"]),
    (lambda x, mask: (x, {**mask, "text": mask["text"][:, :2]}), ["mask", "(3, 2)", "text", "(3, 5)"]),
    (lambda x, mask: (x, {**mask, "text": mask["text"] * 2}), ["mask", "text", "other numbers"]),
    (lambda x, mask: ({}, None), ["input has no modality", "image, text, series"]),
])  # fmt: skip
def test_bad_batches_of_several_modalities_are_refused_by_name(change, parts):
    model = several_model()
    with pytest.raises(ValueError) as caught:
        model(*change(*several_inputs()))
    assert all(part in str(caught.value) for part in parts), caught.value


def test_masks_of_several_modalities_may_be_of_any_type_and_some_left_out():
    model = several_model().eval()
    x, mask = ragged_inputs()
    expected = model(x, mask)
    assert torch.equal(model(x, {name: real.float() for name, real in mask.items()}), expected)
    assert torch.equal(model(x, {name: real.long() for name, real in mask.items()}), expected)
    del mask["image"]
    assert torch.equal(model(x, mask), model(x, mask | {"image": torch.ones(3, 6)}))


@pytest.mark.parametrize("missing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["all", "some"])
def test_compiled_model_of_several_modalities_is_the_eager_one(missing):
    model = several_model().eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    x, mask = ragged_inputs()
    if missing:
        del x["text"], mask["text"]
    with torch.no_grad():
        assert_close(compiled(x, mask), model(x, mask), 1e-12)
    model.train()
    expected = loss_and_gradients(model, x, mask)
    model.zero_grad()
    logits = compiled(x, mask)
    F.cross_entropy(logits.float(), torch.arange(3) % 3).backward()
    assert_close(logits.detach(), expected[0], 1e-12)
    assert_close(gradients(model), expected[1], 1e-6)


@PATHS
def test_checkpointing_of_several_modalities_changes_no_gradient(folded):
    plain = several_model(dropout=0.0).train()
    saving = several_model(dropout=0.0, gradient_checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    with path_taken(folded):
        for x, mask in (several_inputs(), ragged_inputs()):
            expected, got = loss_and_gradients(plain, x, mask), loss_and_gradients(saving, x, mask)
            assert torch.equal(got[0], expected[0])
            assert_close(got[1], expected[1], 1e-12)


@pytest.mark.parametrize("arguments, parts", [
    ({"input_dim": 3, "vocab_size": 256}, ["vocab_size", "input_dim must be 1, not 3"]),
    ({"input_dim": {"text": {"input_dim": 2, "vocab_size": 9}}}, ["vocab_size", "not 2"]),
    ({"input_dim": {}}, ["no modality"]),
    ({"input_dim": {"text": {"vocab_size": 0}}}, ["vocab_size", "0"]),
    ({"input_dim": {"text": {"vocab_size": 9, "embedding_dim": 0}}}, ["embedding_dim", "0"]),
    ({"input_dim": {"series": {"input_dim": 0}, "text": {"vocab_size": 9}}}, ["input_dim", "0"]),
])  # fmt: skip
def test_modalities_that_cannot_be_are_refused(arguments, parts):
    with pytest.raises(ValueError) as caught:
        PerceiverModel(num_classes=3, **SMALL, **arguments)
    assert all(part in str(caught.value) for part in parts)


def test_arguments_beside_the_dict_are_those_of_all_that_do_not_give_their_own():
    model = several_model(use_positions=False)
    assert model.modalities["image"].positions is None and model.modalities["text"].positions is None
    model = several_model({**SEVERAL, "image": {"input_dim": 6, "grid_shape": (2, 3), "use_positions": True}},
                          use_positions=False)  # fmt: skip
    assert model.modalities["image"].positions is not None and model.modalities["text"].positions is None
    assert several_model(num_frequency_bands=2).modalities["text"].num_channels == 7 + 4


def test_fresh_tokens_tell_the_modalities_apart():
    """The learned encodings start as the paper's, and the channels of all modalities are as many."""
    model = PerceiverModel(SEVERAL, 3, **SMALL)
    widths = {name: tokens.num_channels + len(tokens.encoding) for name, tokens in model.modalities.items()}
    assert set(widths.values()) == {max(tokens.num_channels for tokens in model.modalities.values()) + 4}
    encodings = torch.cat([tokens.encoding for tokens in model.modalities.values()])
    assert 0.015 < encodings.std() < 0.025
    x = {name: values.float() for name, values in several_inputs()[0].items()}
    assert model(x).isfinite().all()


@pytest.mark.parametrize("rows", [63, 64])
def test_few_rows_are_projected_without_a_copy_of_all_weights(rows):
    """From as many rows as columns on, query, key and value are one product, whose weight the backward pass keeps."""
    torch.manual_seed(0)
    attention, x = MultiHeadAttention(64, 4).double(), torch.randn(1, rows, 64).double().requires_grad_()
    kept, layers = [], (attention.query, attention.key, attention.value)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        found = attention(x)
    q, k, v = (layer(x).unflatten(-1, (4, 16)).transpose(1, 2) for layer in layers)
    weights = (q @ k.mT / 4).softmax(-1)
    torch.testing.assert_close(found, attention.output((weights @ v).transpose(1, 2).flatten(2)), rtol=0, atol=1e-12)
    assert any(192 in shape and 64 in shape and len(shape) == 2 for shape in kept) == (rows >= 64)
