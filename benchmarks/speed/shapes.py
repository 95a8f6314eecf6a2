"""What is measured: model shapes, since timing needs no more of a model, and configurations."""

from dataclasses import dataclass

from benchmarks.speed.family_shapes import FAMILY_SHAPES
from lazyllm_vllm.plan import grouping
from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.operations import full_layers, head_dim

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
    "Llama-3.1-70B": _LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
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
MEASURED = CONSERVATIVE  # of the presets, the one that every case is measured with
DEEP_ENDS = ", deep"  # the name of an engine that reuses deeply
DEEP = Pruning(f"{MEASURED.name}{DEEP_ENDS}", MEASURED.config | {"reuse": "deep"})


def parked_pages(shape: dict) -> int:
    """Those of ``plan.grouping``."""
    kv_heads = shape["num_key_value_heads"]
    return grouping.parked_pages(shape["hidden_size"], kv_heads, head_dim(shape))
