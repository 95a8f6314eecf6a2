"""A tiny model with random weights of every family, as a folder that Hugging Face and vLLM load."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from harness.tiny import SIZES

SHAPE = SIZES | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
# A context 16 times as long as the one before, which most prompts of the tests exceed.
YARN = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


def _config(model_class: str, **changes) -> Callable[[], PretrainedConfig]:
    return lambda: getattr(transformers, f"{model_class}Config")(**SHAPE | changes)


@dataclass(frozen=True)
class Family:
    """Attributes:
    config: makes the model's configuration.
    boundaries: layers to prune after; each sees all positions.
    edits: what config.json says instead; None: it says nothing.
    has_row: whether LazyLLM's table of families has it; if not, a user must allow it.
    """

    config: Callable[[], PretrainedConfig]
    boundaries: tuple[int, int] = (2, 4)
    edits: dict = field(default_factory=dict)
    has_row: bool = True


FAMILIES = {
    "llama": Family(_config("Llama")),
    "llama_old_name": Family(_config("Llama"), edits={"architectures": ["LLaMAForCausalLM"]}),
    "llama_no_name": Family(_config("Llama"), edits={"architectures": None}),
    "mistral": Family(_config("Mistral", sliding_window=None)),
    "ministral3": Family(
        _config(
            "Ministral3",
            rope_parameters=YARN
            | {
                "rope_theta": 1e6,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
            # The same for vLLM, which does not look into rope_parameters.
            llama_4_scaling={"beta": 0.1, "original_max_position_embeddings": 256},
        )
    ),
    "qwen2": Family(_config("Qwen2", hidden_size=128)),  # which gives heads of 32
    "qwen3": Family(_config("Qwen3")),
    "phi3": Family(_config("Phi3", hidden_size=128)),
    "granite": Family(
        _config(
            "Granite",
            hidden_size=128,
            embedding_multiplier=1.5,
            residual_multiplier=0.7,
            attention_multiplier=0.2,
            logits_scaling=0.5,
        )
    ),
    "glm4": Family(
        _config(
            "Glm4",
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        )
    ),
    "qwen3_moe": Family(_config("Qwen3Moe", num_experts=8, norm_topk_prob=True, **EXPERTS)),
    "mixtral": Family(_config("Mixtral", num_local_experts=4, num_experts_per_tok=2)),
    "glm4_moe": Family(
        _config(
            "Glm4Moe",
            n_routed_experts=8,
            n_shared_experts=1,
            first_k_dense_replace=1,
            routed_scaling_factor=1.5,
            use_qk_norm=True,
            attention_bias=True,
            num_mtp_layers=0,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
            **EXPERTS,
        )
    ),
    "gemma3": Family(
        _config(
            "Gemma3Text",
            num_hidden_layers=9,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 3,
            sliding_window=64,
            query_pre_attn_scalar=32,
            tie_word_embeddings=True,
        ),
        boundaries=(3, 6),
    ),
    "ernie45": Family(_config("Ernie4_5", use_bias=False), has_row=False),
    "gpt_oss": Family(
        _config(
            "GptOss",
            head_dim=64,
            intermediate_size=64,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention"] * 3,
            sliding_window=64,
            rope_parameters=YARN | {"rope_theta": 150000.0, "truncate": False},
        )
    ),
}
NAMES = tuple(FAMILIES)


def boundaries(name: str) -> tuple[int, int]:
    """Layers to prune after."""
    return FAMILIES[name].boundaries


def save_tiny(name: str, folder: Path) -> Path:
    """Write the family's checkpoint, in fp32, the same each time."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = AutoModelForCausalLM.from_config(family.config(), dtype=torch.float32)
    randomize(model)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for key, value in family.edits.items():
        config[key] = value
        if value is None:
            del config[key]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Weights of a real model's spread, with attention that tells tokens apart, and nothing that
    could be left out unnoticed: norms are not one, biases not zero, sinks as heavy as good keys."""
    tied = model.config.tie_word_embeddings
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            weight.normal_(8, 2)
        elif "bias" in name:
            weight.normal_(0, 0.1)
        elif "norm" in name:  # as it was made: ones, or zeros where one is added to it
            gain = torch.empty_like(weight).normal_(1, 0.1)
            weight += gain * (2 if "q_norm" in name or "k_norm" in name else 1) - 1
        else:
            peaked = any(part in name for part in ("q_proj", "k_proj", "qkv_proj"))
            spread = 1 if "embed" in name and not tied else weight.shape[-1] ** -0.5
            weight.normal_(0, spread * (2 if peaked else 1))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)
