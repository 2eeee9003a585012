"""The Perceiver (Jaegle et al. 2021, arXiv 2103.03206) and Perceiver IO (2107.14795), in the order of the data flow.

A Perceiver reads any number of input tokens through a small set of learned latents. In a cross-attend, the latents
collect what they need from the input; self-attention layers then work on the latents, and a head reads the answer out
of them. Time and memory grow as O(L N) with the input. Keys and values come straight from the input channels.

    x (B, L, features) -> + positions -> [cross-attend, self-attention layers] x repeats -> latents -> head -> logits

Several modalities are read at once, as tokens one after another, padded to the same channels by learned encodings.

Letters used for shapes in this file:

    B  batch              C  input channels: features + position features     N  latents
    L  input tokens       D  latent width (d_model)                           H  heads
    O  output queries     Q  channels of an output query
    E  attention width: H heads of E // H channels each

Masks are True (or 1) at real tokens and False (or 0) at padding, everywhere; latents need none.
"""

import inspect
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from token_features import (
    SequenceStem,
    TokenFeatures,
    check_effects,
    check_names,
    check_shares,
    check_sizes,
    check_switches,
)

MAX_FUSED_WIDTH = 256  # widest head that CUDA's fast attention kernels take; wider ones take ten times as long
# On a CPU, the backward pass of attention takes longer in bfloat16 than in float32 where heads are narrower than this,
# or attend to no more tokens than that; for 32 tokens ten times as long (benchmarks/precision_on_cpu.py)
WIDTH_FOR_BFLOAT16, TOKENS_FOR_BFLOAT16 = 64, 256
CPU_THREADS = torch.get_num_threads()  # read once, since a compiled forward pass cannot ask for it


# --- Attention -------------------------------------------------------------------------------------------------------


def _attention_weights(q: Tensor, k: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """(B, H, N, L), each row 1 in all, of queries (B, H, N, E) and keys (B, H, L, E)."""
    scores = (q * scale) @ k.mT
    return (scores if allowed is None else scores.masked_fill(~allowed, -math.inf)).softmax(-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, dropout: float, scale: float) -> Tensor:
    """(B, H, N, V): F.scaled_dot_product_attention, where every query is allowed some token."""
    if q.device.type == "cpu" and q.size(-1) != v.size(-1):
        # No fused kernel has values of another width, and torch's own fallback looks for queries without a token
        return F.dropout(_attention_weights(q, k, allowed, scale), dropout) @ v
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if slow and (k.size(3) < WIDTH_FOR_BFLOAT16 or k.size(2) <= TOKENS_FOR_BFLOAT16):  # last: a program has open sizes
        with torch.autocast("cpu", enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            return F.scaled_dot_product_attention(q, k, v, allowed, dropout, scale=scale).bfloat16()
    return F.scaled_dot_product_attention(q, k, v, allowed, dropout, scale=scale)


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2), self or cross, with torch's fused kernels.

    Args:
        d_model: channels of the queries and of the result (D).
        num_heads: H.
        input_dim: channels of the tokens attended to (C); default d_model.
        attention_dim: total width of the heads' queries and keys (E), a multiple of num_heads; default d_model.
        dropout: probability of dropping an attention weight in training. Above 0, the CPU has no fused kernel, and the
            (N, L) weights are held in memory.
        value_dim: total width of the heads' values (V), a multiple of num_heads; default E.
        query_bias: whether the queries have a bias (those of the published Perceiver IO models have).

    Keys and values need no bias. The score of a key with a bias, q (k + b)^T = q k^T + q b^T, adds the same number to
    every score of a query, which softmax ignores. The bias of the values passes through the attention weights, which
    sum to 1, into the bias of the output projection: W (sum a (v + b)) + c = W (sum a v) + (W b + c).

    **Folded projections.** In a cross-attend the tokens are many and their channels few, while the queries are few.
    With X (L, C) the tokens, q (N, E/H) the queries of one head, Wk (C, E/H) and Wv (C, V/H) its projections,

        scores   q (X Wk)^T = (q Wk^T) X^T          result   softmax(.) (X Wv) = (softmax(.) X) Wv

    so keys and values need not be made: C-wide queries of all heads attend to the one shared X, and Wv acts on the N
    results. Parameters and function are the same, including dropout of attention weights. What changes is the cost:
    2 H N C multiply-adds per token instead of (E + V) (C + N). `forward` takes the cheaper form; on CUDA, where these
    are not what takes the time, the form that was measured to be faster.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 8,
        input_dim: int | None = None,
        attention_dim: int | None = None,
        dropout: float = 0.0,
        value_dim: int | None = None,
        query_bias: bool = False,
    ):
        super().__init__()
        input_dim, attention_dim = input_dim or d_model, attention_dim or d_model
        value_dim = value_dim or attention_dim
        for name, width in {"attention_dim": attention_dim, "value_dim": value_dim}.items():
            if width % num_heads:
                raise ValueError(f"{name}={width} is not divisible by num_heads={num_heads}")
        check_shares(attention_dropout=dropout)
        self.num_heads, self.dropout = num_heads, dropout
        self.scale = (attention_dim // num_heads) ** -0.5
        self.query = nn.Linear(d_model, attention_dim, bias=query_bias)
        self.key = nn.Linear(input_dim, attention_dim, bias=False)
        self.value = nn.Linear(input_dim, value_dim, bias=False)
        self.output = nn.Linear(value_dim, d_model)

    def forward(
        self, queries: Tensor, inputs: Tensor | None = None, mask: Tensor | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from `queries` to `inputs`, or to themselves.

        Args:
            queries: (B, N, D), or (1, N, D) to put the same queries to every sample of `inputs`.
            inputs: (B, L, C) tokens to attend to; None for self-attention.
            mask: bool (B, L), True at tokens that may be attended to. A sample without any attends to nothing: its
                result is the bias of the output projection.
            return_attention: also return the attention weights, before dropout.

        Returns:
            (B, N, D), and with `return_attention` the weights (B, H, N, L): rows sum to 1 over the tokens of the
            mask and are exactly 0 elsewhere.
        """
        folded = inputs is not None and self._layers_are_plain() and self._folding_is_cheaper(queries.size(1), inputs)
        q, k, v = self._fold(queries, inputs) if folded else self._project(queries, inputs)
        q = q.expand(k.size(0), -1, -1, -1)
        allowed = None
        if mask is not None:
            empty = ~mask.any(1)  # (B,) softmax over no token is NaN: let such samples see all, then zero the result
            allowed = (mask | empty[:, None])[:, None, None]  # (B, 1, 1, L)
        dropout = self.dropout if self.training else 0.0
        attended = _attend(q, k, v, allowed, dropout, self.scale)
        if mask is not None:
            attended = attended.masked_fill(empty[:, None, None, None], 0)
        attended = self._unfold(attended) if folded else attended  # (B, H, N, V/H)
        result = self.output(attended.transpose(1, 2).flatten(2))
        if not return_attention:
            return result
        weights = _attention_weights(q, k, allowed, self.scale)
        weights = weights.reshape(k.size(0), self.num_heads, queries.size(1), k.size(2))  # (B, H, N, L)
        return result, weights if mask is None else weights.masked_fill(empty[:, None, None, None], 0)

    def _project(self, queries: Tensor, inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Queries (B or 1, H, N, E/H), keys (B, H, L, E/H), values (B, H, L, V/H), in as few products as pays off.

        One product for all copies their weights, which the backward pass keeps: too dear for fewer rows than columns.
        """
        together = [self.query, self.key, self.value] if inputs is None else [self.key, self.value]
        source = queries if inputs is None else inputs
        few = not torch.compiler.is_exporting() and source.size(0) * source.size(1) < source.size(2)
        if few or not self._layers_are_plain():
            parts = self.query(queries), self.key(source), self.value(source)
        else:
            weight = torch.cat([layer.weight for layer in together])
            bias = None
            if inputs is None and self.query.bias is not None:
                bias = F.pad(self.query.bias, (0, weight.size(0) - self.query.out_features))
            parts = F.linear(source, weight, bias)
            parts = parts.split([layer.out_features for layer in together], -1)
            if inputs is not None:
                parts = self.query(queries), *parts
        return tuple(self._split_heads(part) for part in parts)

    def _fold(self, queries: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B or 1, G, H N / G, C) in G groups, and the tokens (B, G, L, C) as keys and as values.

        C is padded with zeros to a multiple of 8, which fused CUDA kernels need.
        """
        q = self._split_heads(self.query(queries))  # (B or 1, H, N, E/H)
        q = q @ _filled_up(self._head_weight(self.key))  # (B or 1, H, N, C)
        groups = self._query_groups(inputs, q.size(1) * q.size(2))
        tokens = _filled_up(inputs)[:, None].expand(-1, groups, -1, -1)
        return q.flatten(1, 2).unflatten(1, (groups, -1)), tokens, tokens

    def _unfold(self, attended: Tensor) -> Tensor:
        """Weighted sums of tokens (B, G, H N / G, C) -> of values (B, H, N, V/H)."""
        attended = attended.flatten(1, 2).unflatten(1, (self.num_heads, -1))
        return attended @ _filled_up(self._head_weight(self.value)).mT

    def _folding_is_cheaper(self, num_queries: int, inputs: Tensor) -> bool:
        tokens, channels = inputs.shape[1:]
        keys, values = self.key.out_features, self.value.out_features
        head_width = max(keys, values) // self.num_heads
        if inputs.device.type == "cuda" and max(head_width, channels) <= MAX_FUSED_WIDTH:
            # benchmarks/on_cuda.py, H200: attention to C channels costs as much as to heads of that width, and folding
            # the queries as much as projecting as many tokens
            return channels <= head_width and tokens >= num_queries
        if inputs.device.type == "cuda" and channels <= MAX_FUSED_WIDTH:
            return True
        return 2 * self.num_heads * num_queries * channels < (keys + values) * (channels + num_queries)

    def _layers_are_plain(self) -> bool:
        """Whether the projections are nothing but their weights, so that a product with these can replace calling the
        layers: no hooks (pruning, FSDP), no replacement (LoRA, quantisation), no parametrisation."""
        return all(
            type(layer) is nn.Linear
            and "forward" not in vars(layer)
            and not (layer._forward_hooks or layer._forward_pre_hooks)
            and not (layer._backward_hooks or layer._backward_pre_hooks)
            for layer in (self.query, self.key, self.value)
        )

    @staticmethod
    def _query_groups(inputs: Tensor, num_queries: int) -> int:
        """The number of groups G into which the folded queries are split, as if each group were a head.

        In the backward pass, the CPU kernel gives each thread one head of one sample, so a small batch needs a few
        groups to keep the threads busy. Each group costs the memory of a gradient of the keys and one of the values,
        (L, C), which does not pay for fewer than 512 queries.
        """
        wanted = 1
        if inputs.device.type == "cpu" and not torch.compiler.is_exporting():  # which leaves the batch size open
            wanted = max(1, min(4, num_queries // 512, -(-CPU_THREADS // max(1, inputs.size(0)))))
        return max(groups for groups in range(1, wanted + 1) if num_queries % groups == 0)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, N, E) -> (B, H, N, E/H)

    def _head_weight(self, projection: nn.Linear) -> Tensor:
        return projection.weight.unflatten(0, (self.num_heads, -1))  # (E, C) -> (H, E/H, C)


def _filled_up(x: Tensor) -> Tensor:
    """x with its last dimension padded with zeros to a multiple of 8."""
    missing = -x.size(-1) % 8
    return F.pad(x, (0, missing)) if missing else x


# --- Blocks ----------------------------------------------------------------------------------------------------------


class MLP(nn.Sequential):
    """The position-wise MLP of a Transformer block with GELU; (..., D) -> (..., D)."""

    def __init__(self, d_model: int, ratio: int):
        super().__init__(nn.Linear(d_model, ratio * d_model), nn.GELU(), nn.Linear(ratio * d_model, d_model))


class CrossAttentionBlock(nn.Module):
    """Input -> latents: pre-norm cross-attention and MLP, each added to the latents (paper section 3.1, figure 1).

    Args:
        d_model: latent width D.
        input_dim: input channels C.
        num_heads, attention_dim, attention_dropout, and further arguments: see `MultiHeadAttention`.
        mlp_ratio: hidden width of the MLP over D.
        dropout: probability of dropping a channel of what either branch adds.
        query_residual: whether the attended values are added to the latents or replace them.
    """

    def __init__(
        self,
        d_model: int,
        input_dim: int,
        num_heads: int = 8,
        attention_dim: int | None = None,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        query_residual: bool = True,
        **attention: Any,
    ):
        super().__init__()
        self.query_residual = query_residual
        self.latent_norm = nn.LayerNorm(d_model)
        # Normalising a single channel would give a constant, whatever the token holds
        self.input_norm = nn.LayerNorm(input_dim) if input_dim > 1 else nn.Identity()
        self.attention = MultiHeadAttention(
            d_model, num_heads, input_dim, attention_dim, dropout=attention_dropout, **attention
        )
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model, mlp_ratio)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, latents: Tensor, inputs: Tensor, mask: Tensor | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """latents (B or 1, N, D), inputs (B, L, C), mask bool (B, L) -> latents (B, N, D) [, weights (B, H, N, L)]."""
        attended = self.attention(self.latent_norm(latents), self.input_norm(inputs), mask, return_attention)
        attended, weights = attended if return_attention else (attended, None)
        attended = self.dropout(attended)
        latents = latents + attended if self.query_residual else attended
        latents = latents + self.dropout(self.mlp(self.mlp_norm(latents)))
        return (latents, weights) if return_attention else latents


class SelfAttentionBlock(nn.Module):
    """Latents -> latents: pre-norm self-attention and MLP, each added to the latents (a GPT-2 block without mask).

    Arguments as for `CrossAttentionBlock`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 8,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        **attention: Any,
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = MultiHeadAttention(d_model, num_heads, dropout=attention_dropout, **attention)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model, mlp_ratio)
        self.dropout = nn.Dropout(dropout)

    def forward(self, latents: Tensor) -> Tensor:
        """latents (B, N, D) -> (B, N, D)."""
        latents = latents + self.dropout(self.attention(self.attention_norm(latents)))
        return latents + self.dropout(self.mlp(self.mlp_norm(latents)))


# --- Encoder ---------------------------------------------------------------------------------------------------------


def check_heads(*rows: tuple[str, int | None, str, int]) -> None:
    """Check that each width is divisible by its heads; rows are (name, width, name of the heads, heads).

    Raises:
        ValueError: names the width that is not.
    """
    for name, width, heads_name, heads in rows:
        if width is not None:
            check_sizes(**{name: width})
            if width % heads:
                raise ValueError(f"{name}={width} is not divisible by {heads_name}={heads}")


class PerceiverEncoder(nn.Module):
    """Learned latents that cross-attend to the input and then to each other, repeatedly (paper section 3.1).

    The self-attention layers are distributed over the cross-attends as evenly as possible, in order: 2 and 8 give
    cross, 4 self, cross, 4 self; 2 and 3 give cross, 2 self, cross, 1 self.

    Args:
        input_dim: input channels C.
        d_model, num_heads, num_latents: D, H and N.
        num_cross_attention_layers: cross-attends.
        num_self_attention_layers: self-attention layers in total.
        num_cross_attention_heads: heads of the cross-attends; default num_heads (the paper uses 1).
        cross_attention_dim, cross_attention_value_dim: widths E and V of the cross-attends; default d_model (the paper
            uses C), and E.
        self_attention_dim, self_attention_value_dim: widths E and V of the self-attention; default d_model, and E.
        num_blocks: how often the self-attention layers after a cross-attend run, one block after another with the same
            weights (Perceiver IO reads once and runs 8 blocks of 6 layers on ImageNet).
        query_bias: see `MultiHeadAttention`.
        share_weights: the repeats share their weights, except for the first cross-attend, as in the paper.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        mlp_ratio, dropout, attention_dropout: see `CrossAttentionBlock`.

    Raises:
        ValueError: a size that is not a whole number of 1 or more, a width that its heads do not divide, weights
            shared between repeats of unequal depth.
    """

    def __init__(
        self,
        input_dim: int,
        d_model: int = 512,
        num_heads: int = 8,
        num_latents: int = 256,
        num_cross_attention_layers: int = 1,
        num_self_attention_layers: int = 6,
        num_cross_attention_heads: int | None = None,
        cross_attention_dim: int | None = None,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        share_weights: bool = False,
        gradient_checkpointing: bool = False,
        cross_attention_value_dim: int | None = None,
        self_attention_dim: int | None = None,
        self_attention_value_dim: int | None = None,
        num_blocks: int = 1,
        query_bias: bool = False,
    ):
        super().__init__()
        cross_heads = num_heads if num_cross_attention_heads is None else num_cross_attention_heads
        heads_name = "num_heads" if num_cross_attention_heads is None else "num_cross_attention_heads"
        check_sizes(
            d_model=d_model,
            num_heads=num_heads,
            num_latents=num_latents,
            num_cross_attention_layers=num_cross_attention_layers,
            num_self_attention_layers=num_self_attention_layers,
            num_cross_attention_heads=cross_heads,
            num_blocks=num_blocks,
            mlp_ratio=mlp_ratio,
        )
        check_shares(dropout=dropout, attention_dropout=attention_dropout)
        check_switches(
            query_bias=query_bias, share_weights=share_weights, gradient_checkpointing=gradient_checkpointing
        )
        check_heads(
            ("d_model", d_model, "num_heads", num_heads if self_attention_dim is None else 1),
            ("self_attention_dim", self_attention_dim, "num_heads", num_heads),
            ("self_attention_value_dim", self_attention_value_dim, "num_heads", num_heads),
            ("d_model", d_model, heads_name, cross_heads if cross_attention_dim is None else 1),
            ("cross_attention_dim", cross_attention_dim, heads_name, cross_heads),
            ("cross_attention_value_dim", cross_attention_value_dim, heads_name, cross_heads),
        )
        repeats, layers = num_cross_attention_layers, num_self_attention_layers
        if share_weights and layers % repeats:
            raise ValueError(
                f"share_weights needs as many self-attention layers after every cross-attend: "
                f"num_self_attention_layers={layers} is not divisible by num_cross_attention_layers={repeats}"
            )
        self.depths = [layers // repeats + (repeat < layers % repeats) for repeat in range(repeats)]
        self.share_weights, self.gradient_checkpointing = share_weights, gradient_checkpointing
        self.num_blocks = num_blocks
        # Truncated normal, sigma 0.02, cut at +-2 (paper appendix C).
        self.latents = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_latents, d_model), std=0.02))
        common = {"d_model": d_model, "mlp_ratio": mlp_ratio, "query_bias": query_bias}
        common |= {"dropout": dropout, "attention_dropout": attention_dropout}
        cross = {"num_heads": cross_heads, "attention_dim": cross_attention_dim, "value_dim": cross_attention_value_dim}
        own = {"num_heads": num_heads, "attention_dim": self_attention_dim, "value_dim": self_attention_value_dim}
        self.cross_attention = nn.ModuleList(
            CrossAttentionBlock(input_dim=input_dim, **common, **cross)
            for _ in range(min(repeats, 2) if share_weights else repeats)
        )
        self.self_attention = nn.ModuleList(
            nn.ModuleList(SelfAttentionBlock(**common, **own) for _ in range(depth))
            for depth in (self.depths[:1] if share_weights else self.depths)
        )

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """inputs (B, L, C), mask bool (B, L) -> latents (B, N, D) [, one (B, H, N, L) of weights per cross-attend]."""
        recompute = self.gradient_checkpointing and self.training
        run = partial(checkpoint, use_reentrant=False) if recompute else lambda block, *args: block(*args)
        latents = self.latents[None]  # (1, N, D): the first queries are the same for every sample, so made once
        maps = []
        for repeat in range(len(self.depths)):
            cross = self.cross_attention[min(repeat, len(self.cross_attention) - 1)]
            latents = run(cross, latents, inputs, mask, return_attention)  # (B, N, D)
            if return_attention:
                latents, weights = latents
                maps.append(weights)
            layers = self.self_attention[0 if self.share_weights else repeat]
            for layer in itertools.chain.from_iterable(itertools.repeat(layers, self.num_blocks)):
                latents = run(layer, latents)  # (B, N, D)
        return (latents, maps) if return_attention else latents


# --- Decoder ---------------------------------------------------------------------------------------------------------


class PerceiverDecoder(nn.Module):
    """Output queries that cross-attend to the latents: one answer for each query (Perceiver IO, section 3.2).

    An answer depends on its own query and on the latents, not on other queries, so O answers cost O N.

    Args:
        query_dim: channels of a query (Q), and the width of the block.
        d_model: latent width D.
        num_outputs: numbers in an answer; None leaves the Q channels as they are.
        query_residual: whether the query is added to the attended values (in the paper, for classification but not for
            language).
        num_heads, mlp_ratio, dropout, and further arguments: see `CrossAttentionBlock`.
    """

    def __init__(
        self,
        query_dim: int,
        d_model: int,
        num_outputs: int | None,
        num_heads: int = 1,
        query_residual: bool = True,
        mlp_ratio: int = 1,
        **block: Any,
    ):
        super().__init__()
        self.cross_attention = CrossAttentionBlock(
            query_dim, d_model, num_heads, mlp_ratio=mlp_ratio, query_residual=query_residual, **block
        )
        self.output = nn.Identity() if num_outputs is None else nn.Linear(query_dim, num_outputs)

    def forward(
        self, queries: Tensor, latents: Tensor, mask: Tensor | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Answer the queries.

        Args:
            queries: (B, O, Q), or (1, O, Q) to put the same queries to every sample.
            latents: (B, N, D).
            mask: bool (B, O), True at real queries. The others affect no gradient, and their answers are 0.
            return_attention: also return the attention weights.

        Returns:
            (B, O, outputs), and with `return_attention` the weights (B, H, O, N).
        """
        if mask is not None:
            queries = queries.masked_fill(~mask[..., None], 0)
        answered = self.cross_attention(queries, latents, return_attention=return_attention)
        answered, weights = answered if return_attention else (answered, None)
        answers = self.output(answered)  # (B, O, outputs)
        if mask is not None:
            answers = answers.masked_fill(~mask[..., None], 0)
        return (answers, weights) if return_attention else answers


class OutputQueries(nn.Module):
    """Output queries and the decoder that answers them; (B, N, D) -> (B, O, outputs).

    Args:
        d_model: latent width D.
        num_outputs, query_residual: see `PerceiverDecoder`.
        token_dim: None for queries that are learned; else they are made of tokens of so many channels C, by a linear
            layer (Perceiver IO, section 3.2: queries that hold the features of the input, as for optical flow; there
            the channels are the query), or by one for each modality where it is a dict.
        num_queries: how many are learned.
        query_dim: channels of a query (Q); default d_model (with head "hidden" 3/8 of it).
        num_decoder_heads, decoder_dim, decoder_value_dim: heads H and widths E (default Q) and V (default E) of the
            decoder's attention.
        decoder_mlp_ratio: hidden width of the decoder's MLP over Q.
        block: dropout, attention_dropout and query_bias, see `CrossAttentionBlock`.
    """

    def __init__(
        self,
        d_model: int,
        num_outputs: int | None,
        query_residual: bool,
        token_dim: int | dict[str, int] | None = None,
        num_queries: int = 1,
        query_dim: int | None = None,
        num_decoder_heads: int = 1,
        decoder_dim: int | None = None,
        decoder_value_dim: int | None = None,
        decoder_mlp_ratio: int = 1,
        **block: Any,
    ):
        super().__init__()
        query_dim = d_model if query_dim is None else query_dim
        check_sizes(
            num_queries=num_queries, num_decoder_heads=num_decoder_heads, decoder_mlp_ratio=decoder_mlp_ratio
        )
        check_heads(
            ("query_dim", query_dim, "num_decoder_heads", num_decoder_heads if decoder_dim is None else 1),
            ("decoder_dim", decoder_dim, "num_decoder_heads", num_decoder_heads),
            ("decoder_value_dim", decoder_value_dim, "num_decoder_heads", num_decoder_heads),
        )
        if isinstance(token_dim, dict):
            self.query = nn.ModuleDict({name: nn.Linear(width, query_dim) for name, width in token_dim.items()})
        elif token_dim is None:
            self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_queries, query_dim), std=0.02))
        else:
            self.query = nn.Linear(token_dim, query_dim)
        self.decoder = PerceiverDecoder(
            query_dim,
            d_model,
            num_outputs,
            num_decoder_heads,
            query_residual,
            decoder_mlp_ratio,
            attention_dim=decoder_dim,
            value_dim=decoder_value_dim,
            **block,
        )

    def forward(self, latents: Tensor, num_queries: int | None = None) -> Tensor:
        """latents (B, N, D) -> the answers (B, O, outputs) to the first num_queries queries, by default to all."""
        return self.decoder(self.queries[None, :num_queries], latents)

    def of_tokens(self, latents: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """latents (B, N, D), tokens (B, O, C), mask bool (B, O) -> (B, O, outputs), 0 where the mask is False."""
        return self.decoder(self.query(tokens), latents, mask)

    def of_modalities(self, latents: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """As `of_tokens`, of the tokens (B, O_m, C_m) of each modality, one after another, O in all."""
        queries = torch.cat([self.query[name](values) for name, values in tokens.items()], 1)  # (B, O, Q)
        return self.decoder(queries, latents)


# --- Model -----------------------------------------------------------------------------------------------------------

HEADS = ("mean", "query", "positions", "tokens", "hidden")
MODALITY_CHANNELS = 4  # learned channels of the widest of several modalities; the others are padded to its width
Modal = Tensor | dict[str, Tensor]  # one modality, or several by name


def keyword_arguments(of: Callable, *without: str) -> dict[str, inspect.Parameter]:
    """The arguments of a class or function that can be given by name, without some and without its `**kwargs`."""
    return {
        name: argument.replace(kind=argument.KEYWORD_ONLY)
        for name, argument in inspect.signature(of).parameters.items()
        if name not in without and argument.kind is not argument.VAR_KEYWORD
    }


def naming(arguments: dict[str, inspect.Parameter]) -> Callable[[Callable], Callable]:
    """Decorator: help and completion show these arguments instead of the function's `**kwargs`."""

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        own = [argument for argument in signature.parameters.values() if argument.kind is not argument.VAR_KEYWORD]
        function.__signature__ = signature.replace(parameters=[*own, *arguments.values()])
        return function

    return decorate


FEATURES = keyword_arguments(TokenFeatures, "input_dim")
ENCODER = keyword_arguments(PerceiverEncoder, "input_dim")
DECODER = keyword_arguments(OutputQueries, "d_model", "num_outputs", "query_residual", "token_dim")


class PerceiverModel(nn.Module):
    """A Perceiver: token features, encoder, and a head that reads the answer out of the latents.

    The tokens of several modalities follow one another; each modality has its own positions, and its channels are
    padded to a common width by a learned encoding (as in the paper, for audio and video).

    Args:
        input_dim: features of a token; or, for several modalities, a dict from the name of each to its arguments of
            `TokenFeatures`, such as {"image": {"input_dim": 48, "grid_shape": (8, 8)}, "text": {"vocab_size":
            256}}.
        num_classes: logits of an answer.
        head: how the latents become logits.

            - "mean": mean over the normalised latents, linear layer; (B, num_classes), as in the Perceiver paper.
            - "query": the answer to one learned query; (B, num_classes), as Perceiver IO classifies.
            - "positions": the answers to a learned query for each position, num_queries in total; (B, L, num_classes),
              as in Perceiver IO's masked language model. Masked positions are answered too.
            - "tokens": the answers to a query made of each token's own features and position; (B, L, num_classes), L
              over all modalities, and 0 where the mask is 0. Where a stem makes tokens of the steps of a sequence, a
              step has the answer of the token whose middle is nearest.
            - "hidden": the contents of some tokens of each modality, which the encoder does not see, as answers to
              queries made of their positions alone: {modality: (B, O, vocab_size or input_dim)}; num_classes is the
              sum of these widths.
        tie_embedding: with head "positions", the logits of an answer are its products with the embeddings of the
            vocabulary, plus a bias.
        features_encoder_decoder: the other arguments are described where they are used. Those of tokens, in
            `TokenFeatures`, are for the modalities that do not give their own. Those of the encoder are in
            `PerceiverEncoder`; by default it is that of the base preset. Those of the decoder, which all heads
            but "mean" have, are in `OutputQueries`; it shares dropouts and query_bias.

    Raises:
        ValueError: a value that one of these classes refuses; arguments that contradict each other or have no effect.
        TypeError: an unknown argument; the nearest valid name is given.
    """

    @naming(FEATURES | ENCODER | DECODER)
    def __init__(
        self,
        input_dim: int | dict[str, dict],
        num_classes: int,
        *,
        head: str = "mean",
        tie_embedding: bool = False,
        **features_encoder_decoder: Any,
    ):
        super().__init__()
        check_sizes(num_classes=num_classes)
        check_switches(tie_embedding=tie_embedding)
        check_names(features_encoder_decoder, inspect.signature(PerceiverModel).parameters, "PerceiverModel()")
        features, encoder, decoder = (
            {name: value for name, value in features_encoder_decoder.items() if name in group}
            for group in (FEATURES, ENCODER, DECODER)
        )
        modalities = input_dim if isinstance(input_dim, dict) else {"input": {"input_dim": input_dim}}
        if not modalities:
            raise ValueError("input_dim is a dict of no modality; it needs at least one")
        for name, own in modalities.items():
            check_names(own, ["input_dim", *FEATURES], f"the modality {name!r}")
        check_effects(features, modalities)
        self.modalities = nn.ModuleDict({name: TokenFeatures(**features | own) for name, own in modalities.items()})
        width = max(tokens.num_channels for tokens in self.modalities.values())
        if len(self.modalities) > 1:
            width += MODALITY_CHANNELS
            for tokens in self.modalities.values():
                tokens.pad_channels(width)
        self.encoder = PerceiverEncoder(width, **encoder)
        d_model = self.encoder.latents.size(1)
        self.head, self.tie_embedding = head, tie_embedding
        self._check_head(num_classes, decoder)
        if head == "mean":
            self.norm = nn.LayerNorm(d_model)
            self.classifier = nn.Linear(d_model, num_classes)
        else:
            shared = {n: encoder[n] for n in ("dropout", "attention_dropout", "query_bias") if n in encoder}
            num_outputs = None if tie_embedding else num_classes
            residual, token_dim = head in ("query", "tokens", "hidden"), width if head == "tokens" else None
            if head == "hidden":
                token_dim = {name: tokens.positions.num_channels for name, tokens in self.modalities.items()}
                # Narrower than a latent, since there may be nearly as many queries as tokens, see
                # benchmarks/hidden_tokens.py
                decoder.setdefault("query_dim", max(1, 3 * d_model // 8))
                num_outputs = None
            self.output = OutputQueries(d_model, num_outputs, residual, token_dim, **decoder, **shared)
        if head == "hidden":
            widths = {name: tokens.content_width for name, tokens in self.modalities.items()}
            if num_classes != sum(widths.values()):
                raise ValueError(f"head='hidden' needs num_classes={sum(widths.values())}, the sum of {widths}")
            width = decoder["query_dim"]
            self.content = nn.ModuleDict({name: nn.Linear(width, number) for name, number in widths.items()})
        if tie_embedding:
            self.output_bias = nn.Parameter(torch.zeros(num_classes))
        self.is_frozen = False
        self.apply(initialise)

    def _check_head(self, num_classes: int, decoder: dict[str, Any]) -> None:
        if self.head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, not {self.head!r}")
        for name, value in decoder.items():
            used_by = ("positions",) if name == "num_queries" else ("query", "positions", "tokens", "hidden")
            if self.head not in used_by and value != DECODER[name].default:
                raise ValueError(f"{name}={value!r} has no effect with head={self.head!r}")
        if self.head == "positions" and "num_queries" not in decoder:
            raise ValueError("head='positions' needs num_queries, the tokens of the longest input")
        if self.head == "positions" and len(self.modalities) > 1:
            raise ValueError(f"head='positions' is for one modality, not for {', '.join(self.modalities)}")
        for name, tokens in self.modalities.items() if self.head == "hidden" else ():
            joined = isinstance(tokens.stem, SequenceStem) or tokens.token_grid != tokens.grid_shape
            if tokens.positions is None or joined:
                raise ValueError(f"head='hidden' asks for tokens by their positions: {name} must have use_positions, "
                                 "and no stem that joins tokens")  # fmt: skip
        for name, tokens in self.modalities.items() if self.head == "tokens" else ():
            if tokens.token_grid != tokens.grid_shape:
                raise ValueError(f"head='tokens' is not for the stem of {name}, which joins tokens of a grid")
        if self.tie_embedding:
            embedding = next(iter(self.modalities.values())).embedding
            if self.head != "positions" or embedding is None:
                raise ValueError("tie_embedding=True needs head='positions' and vocab_size")
            needed = {"num_classes": num_classes, "query_dim": decoder.get("query_dim", self.encoder.latents.size(1))}
            for (name, value), size in zip(needed.items(), embedding.weight.shape, strict=True):
                if value != size:
                    raise ValueError(f"tie_embedding=True needs {name}={size}, as the embedding has it, not {value}")

    def forward(
        self,
        x: Modal,
        mask: Modal | None = None,
        return_attention: bool = False,
        hidden: dict[str, Tensor] | None = None,
        mix: tuple[Modal, Modal | None, Tensor] | None = None,
    ) -> Modal | tuple[Modal, list[Tensor]]:
        """Answer a batch.

        Args:
            x: float (B, L, input_dim), or a dict of these by modality. Its values at padding (NaN and infinity
                included) affect no result. A modality that the dict lacks is missing in every sample.
            mask: (B, L) of bool or of 1 and 0 in any dtype, True at real tokens, or a dict of these; None if all are
                real. A sample lacks a modality if its mask is 0 throughout; a sample without any real token gets the
                logits of the latents alone.
            return_attention: also return the cross-attention maps.
            hidden: with head "hidden", of each modality the numbers of tokens that are hidden from the encoder and
                asked for, int64 (B, O), -1 where there are fewer than O, whose answers mean nothing. A modality that it
                lacks is seen as it is.
            mix: for training, other samples (x and mask, as above, B of them) and the weights (B,) from 0 to 1 of those
                of x beside them: the features of each two are mixed before the stem (of text, the embeddings).

        Returns:
            logits (B, num_classes), with head "positions" or "tokens" (B, L, num_classes); and with
            `return_attention` one map (B, H, N, L) per cross-attend, whose rows sum to 1 over real tokens and are 0
            at padding. L runs over the modalities in the order of the model; that of the maps as they leave their
            stems.

        Raises:
            ValueError: x or mask has a wrong shape or an unknown modality; the mask holds other numbers than 1 and 0.
        """
        if hidden is not None:
            mask = self._without(x, mask, hidden)
        tokens, token_mask = self._tokens(x, mask, mix)
        encoded = self.encoder(tokens, token_mask, return_attention)
        latents, *maps = encoded if return_attention else (encoded,)
        if self.head == "hidden":
            logits = self._contents(latents, self._by_modality(x, "input"), hidden or {})
        else:
            logits = self._read_out(latents, tokens, token_mask)
        if self.head == "tokens" and any(isinstance(one.stem, SequenceStem) for one in self.modalities.values()):
            logits = self._by_step(logits, token_mask, x, mask)
        return (logits, *maps) if return_attention else logits

    def encode(self, x: Modal, mask: Modal | None = None) -> Tensor:
        """The latents (B, N, D) that the head reads. Arguments as for forward."""
        return self.encoder(*self._tokens(x, mask))

    def pooled_latents(self, x: Modal, mask: Modal | None = None) -> Tensor:
        """One vector per sample. Arguments as for forward.

        Returns:
            the input of the last linear layer: with head "mean", the mean over the normalised latents (B, D); with
            "query", the answered query (B, Q). With the others, which have no such vector, the mean over the latents.
        """
        return self._pool(self.encode(x, mask))

    @property
    def readout(self) -> nn.Module:
        """What makes logits of the vector of `pooled_latents`, a linear layer; with head "positions" the decoder."""
        if self.head == "mean":
            return self.classifier
        return self.output.decoder.output if self.head == "query" else self.output

    def freeze_encoder(self) -> None:
        """From now on the readout alone learns: all else keeps its weights and stays in evaluation mode."""
        self.requires_grad_(False)
        self.readout.requires_grad_(True)
        self.is_frozen = True

    def train(self, mode: bool = True) -> "PerceiverModel":
        super().train(mode and not self.is_frozen)
        self.readout.train(mode)
        self.training = mode
        return self

    def _pool(self, latents: Tensor) -> Tensor:
        """latents (B, N, D) -> (B, D or Q)."""
        if self.head == "mean":
            return self.norm(latents).mean(1)
        if self.head == "query":
            return self.output.decoder.cross_attention(self.output.queries[None], latents)[:, 0]
        return latents.mean(1)

    def _read_out(self, latents: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """latents (B, N, D), tokens (B, L, C), mask (B, L) -> logits (B, num_classes) or (B, L, num_classes)."""
        if self.head == "mean":
            return self.classifier(self._pool(latents))
        if self.head == "query":
            return self.output(latents)[:, 0]
        if self.head == "tokens":
            answer = self.output.of_tokens
            if self.encoder.gradient_checkpointing and self.training:  # there is a query for every token
                answer = partial(checkpoint, answer, use_reentrant=False)
            return answer(latents, tokens, mask)
        length, longest = tokens.size(1), self.output.queries.size(0)
        if length > longest:
            raise ValueError(f"the input has {length} tokens, but the model has queries for {longest} (num_queries)")
        answers = self.output(latents, length)
        if not self.tie_embedding:
            return answers
        (features,) = self.modalities.values()
        return F.linear(answers, features.embedding.weight, self.output_bias)

    def _by_step(self, answers: Tensor, real: Tensor | None, x: Modal, mask: Modal | None) -> Tensor:
        """Answers (B, L, K) of the tokens behind the stems, real (B, L) -> those of the tokens in front of them."""
        parts, given = [], self._inputs(x, mask)
        for name, place in self.token_ranges(x).items():
            part, stem, (values, there) = answers[:, place], self.modalities[name].stem, given[name]
            if isinstance(stem, SequenceStem):
                index = stem.answering(values.size(1), part.size(1) if real is None else real[:, place])
                part = part.gather(1, index.to(part.device)[..., None].expand(part.size(0), -1, part.size(2)))
                part = part if there is None else part.masked_fill(~there[..., None], 0)
            parts.append(part)
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _without(self, x: Modal, mask: Modal | None, hidden: dict[str, Tensor]) -> dict[str, Tensor]:
        """The masks (B, L) of the modalities, False at the hidden tokens too."""
        if self.head != "hidden":
            raise ValueError(f"hidden has no effect with head={self.head!r}")
        x, mask = self._by_modality(x, "input"), self._by_modality({} if mask is None else mask, "mask")
        masks = {}
        for name, values in x.items():
            real = mask.get(name)
            real = values.new_ones(values.shape[:2], dtype=torch.bool) if real is None else real.bool()
            if name in hidden:
                numbers = hidden[name].masked_fill(hidden[name] < 0, real.size(1))  # a place behind the last token
                real = F.pad(real, (0, 1)).scatter(1, numbers, False)[:, :-1]
            masks[name] = real
        return masks

    def _contents(
        self, latents: Tensor, x: dict[str, Tensor], hidden: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """latents (B, N, D), hidden int64 (B, O) of each modality -> what these tokens hold, (B, O, its width)."""
        nothing = torch.empty(len(latents), 0, dtype=torch.long, device=latents.device)
        numbers = {name: hidden.get(name, nothing) for name in self.modalities}
        positions = {}
        for name, tokens in self.modalities.items():
            table = tokens.positions(x[name] if name in x else latents[:, :1])  # (L, P)
            positions[name] = table[numbers[name].clamp(min=0)]  # (B, O, P); what is answered to -1, no one looks at
        answer = self.output.of_modalities
        if self.encoder.gradient_checkpointing and self.training:
            answer = partial(checkpoint, answer, use_reentrant=False)
        answers = answer(latents, positions).split([each.size(1) for each in numbers.values()], 1)
        return {name: self.content[name](part) for name, part in zip(self.modalities, answers, strict=True)}

    def token_ranges(self, x: Modal) -> dict[str, slice]:
        """Where the tokens of each modality lie along the dimension L of the attention maps of this input."""
        x, start, ranges = self._by_modality(x, "input"), 0, {}
        for name, tokens in self.modalities.items():
            length = tokens.num_tokens(x[name].size(1) if name in x else tokens.missing_length)
            ranges[name] = slice(start, start := start + length)
        return ranges

    def _tokens(
        self, x: Modal, mask: Modal | None, mix: tuple[Modal, Modal | None, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The encoder's input (B, L, C) and its mask (B, L), which is None if nothing can be masked."""
        several, given = len(self.modalities) > 1, self._inputs(x, mask)
        others = self._inputs(*mix[:2]) if mix else {}
        inputs, masks = [], []
        for name, tokens in self.modalities.items():
            mixed = (*others[name], mix[2]) if mix else None
            values, real = tokens(*given[name], mixed)  # (B, L of this modality, C), (B, L of this modality)
            if several and real is None:
                real = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
            inputs.append(values)
            masks.append(real)
        return (torch.cat(inputs, 1), torch.cat(masks, 1)) if several else (inputs[0], masks[0])

    def _inputs(self, x: Modal, mask: Modal | None) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Of every modality the values (B, L, input_dim) and the mask, bool (B, L) or None, checked."""
        x, mask = self._by_modality(x, "input"), self._by_modality({} if mask is None else mask, "mask")
        if not x:
            raise ValueError(f"input has no modality; give some of {', '.join(self.modalities)}")
        like, inputs = next(iter(x.values())), {}
        if any(values.shape[:1] != like.shape[:1] for values in x.values()):
            sizes = {name: values.size(0) for name, values in x.items()}
            raise ValueError(f"the modalities of a batch must have the same number of samples, these have {sizes}")
        for name, tokens in self.modalities.items():
            values, real = x.get(name), mask.get(name)
            shown = name if len(self.modalities) > 1 else "input"
            if values is None:  # missing in every sample: one path for all, as if by the mask
                values = like.new_zeros(like.size(0), tokens.missing_length, tokens.input_dim)
                real = torch.zeros(values.shape[:2], dtype=torch.bool, device=like.device)
            tokens.check(values, shown)
            inputs[name] = values, None if real is None else _as_bool(real, values.shape, shown)
        return inputs

    def _by_modality(self, values: Modal, what: str) -> dict[str, Tensor]:
        if not isinstance(values, dict):
            if len(self.modalities) > 1:
                raise ValueError(f"{what} must be a dict with the modalities {', '.join(self.modalities)}")
            return {next(iter(self.modalities)): values}
        for name in values.keys() - self.modalities.keys():
            raise ValueError(f"{what} has the modality {name!r}; the model knows {', '.join(self.modalities)}")
        return values


def _as_bool(mask: Tensor, input_shape: torch.Size, name: str) -> Tensor:
    if mask.shape != input_shape[:2]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, but the {name} needs {tuple(input_shape[:2])}")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"mask of the {name} holds other numbers than 1 (real token) and 0 (padding)")
    return mask.bool()


def initialise(module: nn.Module) -> None:
    """Weights from a truncated normal with variance 1 / inputs (LeCun; as in the authors' code), biases 0."""
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        inputs = module.weight[0].numel()
        sigma = inputs**-0.5 / 0.87962566  # cutting a normal at two sigma leaves 0.88 of its deviation
        nn.init.trunc_normal_(module.weight, std=sigma, a=-2 * sigma, b=2 * sigma)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# --- Presets ---------------------------------------------------------------------------------------------------------

_FIELDS = ("d_model", "num_heads", "num_latents", "num_cross_attention_layers", "num_self_attention_layers")
MODEL_SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(zip(_FIELDS, (128, 4, 32, 1, 2), strict=True)),  # for CPUs and small data sets
    "small": dict(zip(_FIELDS, (256, 4, 128, 1, 3), strict=True)),
    "base": dict(zip(_FIELDS, (512, 8, 256, 1, 6), strict=True)),
    "large": dict(zip(_FIELDS, (768, 12, 512, 2, 8), strict=True)),
}


@naming(keyword_arguments(PerceiverModel, "input_dim", "num_classes"))
def create_perceiver_model(
    input_dim: int | dict[str, dict], num_classes: int, model_size: str = "base", **overrides
) -> PerceiverModel:
    """Make a Perceiver from a preset.

    Args:
        input_dim: features of a token, or a dict of modalities, see `PerceiverModel`.
        num_classes: logits.
        model_size: a name in MODEL_SIZES.
        overrides: any argument of `PerceiverModel`, instead of the preset's.

    Raises:
        ValueError: an unknown model_size, or a value that the model refuses.
        TypeError: an unknown override; the nearest valid name is given.
    """
    if model_size not in MODEL_SIZES:
        raise ValueError(f"unknown model_size {model_size!r}; choose from {', '.join(MODEL_SIZES)}")
    return PerceiverModel(input_dim, num_classes, **MODEL_SIZES[model_size] | overrides)
