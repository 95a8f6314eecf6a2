"""Model shapes and schedules that are measured. Timing needs no more of a model than its shape."""

from dataclasses import dataclass

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
    """A schedule, named for tables: ``(layer, keep)`` after which, and how much."""

    name: str
    prune: tuple[tuple[int, float], ...]

    @property
    def config(self) -> dict:
        return {"prune": [{"layer": layer, "keep": keep} for layer, keep in self.prune]}


HALVES = Pruning("8/8/8/8 at 1, 1/2, 1/4, 1/8", ((8, 0.5), (16, 0.25), (24, 0.125)))
WHOLE = Pruning("keep 1", ((8, 1.0), (16, 1.0), (24, 1.0)))
TENTH = Pruning("4/12/16 at 1, 0.3, 0.1", ((4, 0.3), (16, 0.1)))
# Steeper than TENTH: the same early cut, and the deep layers, which the paper finds to need the
# fewest tokens (figure 4 there), begin four layers sooner and keep half as many.
TWENTIETH = Pruning("4/8/20 at 1, 0.25, 0.05", ((4, 0.25), (12, 0.05)))


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
