"""What is measured: model shapes, since timing needs no more of a model, and configurations."""

from dataclasses import dataclass

from benchmarks.speed.family_shapes import FAMILY_SHAPES
from lazyllm_vllm.plan import grouping
from lazyllm_vllm.plan.config import LazyLLMConfig

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}

# What config.json says of each; Llama-2's context is stretched, since only the shape matters.
SHAPES = {
    "Llama-3.1-8B": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
    "Llama-2-7B": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
    },
    **FAMILY_SHAPES,
}


@dataclass(frozen=True)
class Pruning:
    """A configuration, named for tables."""

    name: str
    config: dict

    def cuts(self, shape: dict) -> tuple[tuple[int, float], ...]:
        """``(layer, keep)`` in a model of this shape."""
        boundaries = LazyLLMConfig(**self.config).boundaries(
            shape["num_hidden_layers"], full_layers(shape), parked_pages(shape)
        )
        return tuple((b.layer, b.keep) for b in boundaries)


BALANCED, CONSERVATIVE, AGGRESSIVE = (
    Pruning(preset, {"preset": preset}) for preset in ("balanced", "conservative", "aggressive")
)


def full_layers(shape: dict) -> tuple[int, ...] | None:
    """The layers that attend to all tokens, counted from 1; None: all do."""
    kinds = shape.get("layer_types")
    if not (kinds and shape.get("sliding_window")):
        return None
    return tuple(layer for layer, kind in enumerate(kinds, 1) if kind == "full_attention")


def parked_pages(shape: dict) -> int:
    """Those of ``plan.grouping``."""
    kv_heads = shape["num_key_value_heads"]
    return grouping.parked_pages(shape["hidden_size"], kv_heads, _head_dim(shape))


def _head_dim(shape: dict) -> int:
    return shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]


def flops(
    shape: dict, prune: tuple[tuple[int, float], ...], num_tokens: int, cached: int = 0
) -> float:
    """Floating-point operations of a prefill: linear layers and causal attention, by stage.

    A multiplication and an addition count as two; attention is so many pairs of tokens, for the
    logits and again for the values. Of a token's experts those that it is routed to count, and the
    router. The language model's head runs on one token. What the first stage has of the first
    ``cached`` tokens was there before.
    """
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    heads, kv = (shape[f"num_{x}_heads"] * _head_dim(shape) for x in ("attention", "key_value"))
    weights = hidden * (2 * heads + 2 * kv) + _mlp_weights(shape)
    full = full_layers(shape)
    total = 2.0 * hidden * shape["vocab_size"]
    bounds = [(0, 1.0), *prune, (layers, 0.0)]
    for (first, keep), (last, _) in zip(bounds, bounds[1:]):
        n, before = keep * num_tokens, cached if first == 0 else 0
        total += (last - first) * 2 * (n - before) * weights
        for layer in range(first + 1, last + 1):
            has_window = full is not None and layer not in full
            reach = keep * shape["sliding_window"] if has_window else n
            total += 4 * heads * (_pairs(n, reach) - _pairs(before, reach))
    return total


def _mlp_weights(shape: dict) -> int:
    """Weights of a layer's MLP that a token meets."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    experts = shape.get("num_experts") or shape.get("num_local_experts")
    if not experts:
        return 3 * hidden * inner
    inner = shape.get("moe_intermediate_size", inner)
    return shape["num_experts_per_tok"] * 3 * hidden * inner + hidden * experts


def _pairs(n: float, reach: float) -> float:
    """Pairs of a token and one that it attends to, itself or earlier: of n tokens, at most
    ``reach`` back. In a later stage a window holds its share of what was kept, on average."""
    reach = min(n, reach)
    return reach * (n - reach / 2)


def flop_bound(shape: dict, prune: tuple[tuple[int, float], ...], num_tokens: int) -> float:
    """How many times fewer operations than stock vLLM a prefill takes."""
    return flops(shape, (), num_tokens) / flops(shape, prune, num_tokens)
