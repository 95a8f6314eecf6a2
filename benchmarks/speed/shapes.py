"""What is measured: model shapes, since timing needs no more of a model, and configurations."""

from dataclasses import dataclass

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
}


@dataclass(frozen=True)
class Pruning:
    """A configuration, named for tables."""

    name: str
    config: dict

    def cuts(self, num_layers: int) -> tuple[tuple[int, float], ...]:
        """``(layer, keep)`` in a model of so many decoder layers."""
        boundaries = LazyLLMConfig(**self.config).boundaries(num_layers)
        return tuple((b.layer, b.keep) for b in boundaries)


BALANCED, CONSERVATIVE, AGGRESSIVE = (
    Pruning(preset, {"preset": preset}) for preset in ("balanced", "conservative", "aggressive")
)
WHOLE = Pruning("keep 1", {"prune": [{"layer": layer, "keep": 1.0} for layer in (8, 16, 24)]})


def flops(shape: dict, prune: tuple[tuple[int, float], ...], num_tokens: int) -> float:
    """Floating-point operations of a prefill: linear layers and causal attention, by stage.

    A multiplication and an addition count as two; attention over n tokens is n * n / 2 pairs, for
    the logits and again for the values. The language model's head runs on one token.
    """
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    head_dim = hidden // shape["num_attention_heads"]
    kv = shape["num_key_value_heads"] * head_dim
    weights = hidden * (2 * hidden + 2 * kv) + 3 * hidden * shape["intermediate_size"]
    total = 2.0 * hidden * shape["vocab_size"]
    bounds = [(0, 1.0), *prune, (layers, 0.0)]
    for (first, keep), (last, _) in zip(bounds, bounds[1:]):
        n = keep * num_tokens
        total += (last - first) * (2 * n * weights + 2 * n * n * hidden)
    return total


def flop_bound(shape: dict, prune: tuple[tuple[int, float], ...], num_tokens: int) -> float:
    """How many times fewer operations than stock vLLM a prefill takes."""
    return flops(shape, (), num_tokens) / flops(shape, prune, num_tokens)
