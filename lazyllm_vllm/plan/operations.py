"""Arithmetic of a prefill, from what ``config.json`` says of a model."""

from collections.abc import Sequence
from typing import Any

Shape = dict[str, Any]  # of config.json


def full_layers(shape: Shape) -> tuple[int, ...] | None:
    """The layers that attend to all tokens, counted from 1; None: all do."""
    kinds = shape.get("layer_types")
    if not (kinds and shape.get("sliding_window")):
        return None
    return tuple(layer for layer, kind in enumerate(kinds, 1) if kind == "full_attention")


def head_dim(shape: Shape) -> int:
    return shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]


def flops(
    shape: Shape, prune: Sequence[tuple[int, float]], num_tokens: int, cached: int = 0
) -> float:
    """Floating-point operations of a prefill: linear layers and causal attention, by stage.

    A multiplication and an addition count as two; attention is so many pairs of tokens, for the
    logits and again for the values. Of a token's experts those that it is routed to count, and the
    router. The language model's head runs on one token. What the first stage has of the first
    ``cached`` tokens was there before.

    Args:
        prune: ``(layer, keep)``: after so many layers, that share of the tokens is left.
    """
    layers = shape["num_hidden_layers"]
    total = 2.0 * shape["hidden_size"] * shape["vocab_size"]
    bounds = [(0, 1.0), *prune, (layers, 0.0)]
    for (first, keep), (last, _) in zip(bounds, bounds[1:]):
        before = cached if first == 0 else 0
        for layer in range(first + 1, last + 1):
            total += _layer_flops(shape, layer, before, keep * num_tokens, keep)
    return total


def extension_flops(
    shape: Shape,
    prune: Sequence[tuple[int, float]],
    num_before: int,
    num_more: int,
    drops: bool = False,
) -> float:
    """Floating-point operations, counted as in ``flops``, of ``num_more`` tokens that go on from a
    pruned prompt of ``num_before`` tokens: they run through all layers, or, if they are dropped
    too, as many as ``prune`` says, and attend to what each layer kept."""
    layers = shape["num_hidden_layers"]
    total = 2.0 * shape["hidden_size"] * shape["vocab_size"]
    bounds = [(0, 1.0), *prune, (layers, 0.0)]
    for (first, keep), (last, _) in zip(bounds, bounds[1:]):
        before, more = keep * num_before, num_more * (keep if drops else 1)
        for layer in range(first + 1, last + 1):
            total += _layer_flops(shape, layer, before, before + more, keep)
    return total


def _layer_flops(shape: Shape, layer: int, before: float, n: float, keep: float) -> float:
    """Of a layer, counted from 1, that has ``before`` tokens, up to ``n``; of those in a window it
    has the share ``keep``."""
    hidden, full = shape["hidden_size"], full_layers(shape)
    heads, kv = (shape[f"num_{x}_heads"] * head_dim(shape) for x in ("attention", "key_value"))
    weights = hidden * (2 * heads + 2 * kv) + _mlp_weights(shape, layer)
    has_window = full is not None and layer not in full
    reach = keep * shape["sliding_window"] if has_window else n
    pairs = _pairs(n, reach) - _pairs(before, reach)
    return 2 * (n - before) * weights + 4 * heads * pairs


def flop_bound(shape: Shape, prune: Sequence[tuple[int, float]], num_tokens: int) -> float:
    """How many times fewer operations than stock vLLM a prefill takes."""
    return flops(shape, (), num_tokens) / flops(shape, prune, num_tokens)


def _mlp_weights(shape: Shape, layer: int) -> int:
    """Weights that a token meets in the MLP of a layer, counted from 1."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next(filter(None, map(shape.get, names)), 0)
    if not experts or layer <= (shape.get("first_k_dense_replace") or 0):
        return 3 * hidden * inner
    inner = shape.get("moe_intermediate_size") or inner
    met = shape["num_experts_per_tok"] + (shape.get("n_shared_experts") or 0)
    return met * 3 * hidden * inner + hidden * experts


def _pairs(n: float, reach: float) -> float:
    """Pairs of a token and one that it attends to, itself or earlier: of n tokens, at most
    ``reach`` back. In a later stage a window holds its share of what was kept, on average."""
    reach = min(n, reach)
    return reach * (n - reach / 2)
