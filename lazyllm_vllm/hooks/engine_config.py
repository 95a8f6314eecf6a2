"""Where an engine's LazyLLM configuration is kept: vLLM's ``additional_config``."""

import difflib
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.utils.torch_utils import get_dtype_size, kv_cache_dtype_str_to_dtype

from lazyllm_vllm.plan.blocks import BlockNeeds
from lazyllm_vllm.plan.config import ConfigError, LazyLLMConfig, parse_config
from lazyllm_vllm.plan.grouping import parked_pages, part_width
from lazyllm_vllm.plan.schedule import Schedule

KEY = "lazyllm"
SWITCHED_OFF = "lazyllm_switched_off"  # what was switched off for it, for the log
# Tokens a block of the KV cache, at least, unless the user says how many. vLLM hashes, finds, holds
# and frees blocks one by one on the CPU, and here a prompt has blocks in several groups. With
# vLLM's 16 that takes longer than the GPU does for a question about a long document.
BLOCK_SIZE = 64


def given_config(additional_config: Any) -> LazyLLMConfig | None:
    """The LazyLLM configuration in an ``additional_config``; None: LazyLLM is off.

    Raises:
        ConfigError: it cannot be used, or a key looks like a misspelt ``lazyllm``.
    """
    if not isinstance(additional_config, dict):
        return None
    for key in additional_config:
        plain = str(key).lower().replace("_", "").replace("-", "")
        alike = difflib.SequenceMatcher(None, plain, KEY).ratio() > 0.8
        if key not in (KEY, SWITCHED_OFF) and alike:
            raise ConfigError(f"lazyllm: additional_config has the key {key!r}; use {KEY!r}")
    if KEY not in additional_config:
        return None
    return parse_config(additional_config[KEY])


def lazyllm_config(vllm_config: VllmConfig) -> LazyLLMConfig | None:
    """That of an engine; None: LazyLLM is off."""
    return given_config(vllm_config.additional_config)


def schedule_of(vllm_config: VllmConfig) -> Schedule:
    """That of an engine with LazyLLM on."""
    model = vllm_config.model_config
    num_layers = model.get_num_layers(vllm_config.parallel_config)
    config = lazyllm_config(vllm_config)
    if model.is_moe and "revive_budget" not in config.model_fields_set:
        # Each revived row reads experts of its own, and a step's time is that of reading experts.
        config = config.model_copy(update={"revive_budget": 0})
    num_kv_heads = model.get_num_kv_heads(vllm_config.parallel_config)
    pages = parked_pages(parked_width(vllm_config), num_kv_heads, model.get_head_size())
    return Schedule.build(config, num_layers, full_layers(model), pages)


def block_size(vllm_config: VllmConfig) -> int:
    """Tokens a block of the KV cache, with LazyLLM on. vLLM sets it when the model is there, as
    ``LazyAttentionBackend`` prefers."""
    cache = vllm_config.cache_config
    asked_for = cache.user_specified_block_size
    return cache.block_size if asked_for else max(cache.block_size, BLOCK_SIZE)


def block_needs(vllm_config: VllmConfig) -> BlockNeeds:
    """Those of an engine with LazyLLM on."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    # Keys and hidden states are stored in one dtype.
    size = get_dtype_size(kv_cache_dtype_str_to_dtype(cache.cache_dtype, model))
    heads = model.get_num_kv_heads(vllm_config.parallel_config)
    tokens = block_size(vllm_config)
    return BlockNeeds(
        schedule_of(vllm_config),
        tokens,
        tokens * 2 * heads * model.get_head_size() * size,
        parked_width(vllm_config) * size,
        vllm_config.parallel_config.tensor_parallel_size,
    )


def parked_width(vllm_config: VllmConfig) -> int:
    """Numbers of a hidden state that each rank of tensor parallelism parks."""
    ranks = vllm_config.parallel_config.tensor_parallel_size
    return part_width(vllm_config.model_config.get_hidden_size(), ranks)


def full_layers(model: ModelConfig) -> tuple[int, ...] | None:
    """The decoder layers that attend to all tokens, counted from 1; None: all do.

    Raises:
        ConfigError: all layers have a sliding window.
    """
    window = model.get_sliding_window()
    if window is None:
        return None
    kinds = getattr(model.hf_text_config, "layer_types", None) or ()
    full = tuple(n for n, kind in enumerate(kinds, 1) if kind == "full_attention")
    if not full:
        raise ConfigError(
            f"lazyllm: every layer of this model sees the last {window} tokens alone, and none can "
            "tell which of a prompt's tokens matter; --disable-sliding-window runs it with "
            f"--max-model-len {window}"
        )
    return full
