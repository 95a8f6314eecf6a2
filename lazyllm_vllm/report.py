"""The block that the log shows at start: schedule, what was switched off, room in the cache."""

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
from vllm.v1.kv_cache_interface import KVCacheConfig

from lazyllm_vllm.kv_cache.specs import StageSpec
from lazyllm_vllm.schedule import Schedule

logger = init_logger("vllm.lazyllm")


def log_start(vllm_config: VllmConfig, schedule: Schedule, kv_cache_config: KVCacheConfig) -> None:
    """Log the block once the KV cache is as large as it will be."""
    if vllm_config.cache_config.num_gpu_blocks != kv_cache_config.num_blocks:
        return  # the small cache of vLLM's CUDA graph memory profile
    ours, stock = cache_room(vllm_config, schedule, kv_cache_config)
    switched_off = vllm_config.additional_config.get("lazyllm_switched_off", [])
    config = schedule.config
    lines = ["LazyLLM is on"]
    for stage, keep in enumerate(schedule.keeps):
        layers = schedule.stage_layers(stage)
        lines.append(
            f"  stage {stage}: layers {layers[0] + 1} to {layers[-1] + 1}, "
            f"keep {keep:g} of the prompt"
        )
    aux = f"{config.revive_budget} rows a step" if schedule.has_aux else "off, no Aux Cache"
    lines += [
        f"  decode: {config.decode}; revival: {aux}; prompts under "
        f"{config.min_prompt_tokens} tokens are not pruned",
        f"  switched off: {', '.join(switched_off) or 'nothing'}",
        f"  KV cache: room for {ours:,} tokens in prompts of the greatest length; "
        f"stock vLLM has room for {stock:,} ({ours / stock:.2f}x)",
    ]
    logger.info("\n".join(lines))


def cache_room(
    vllm_config: VllmConfig, schedule: Schedule, kv_cache_config: KVCacheConfig
) -> tuple[int, int]:
    """Tokens that fit in the KV cache, in prompts of ``max_model_len``: with LazyLLM (as vLLM
    counts them), and in the same bytes without."""
    ours, _ = get_kv_cache_capacity(vllm_config, kv_cache_config)
    specs = [g.kv_cache_spec for g in kv_cache_config.kv_cache_groups]
    stage = next(spec for spec in specs if isinstance(spec, StageSpec))
    group_layers = max(len(g.layer_names) for g in kv_cache_config.kv_cache_groups)
    pages = kv_cache_config.num_blocks * group_layers
    longest = vllm_config.model_config.max_model_len
    pages_per_request = cdiv(longest, stage.block_size) * schedule.num_layers
    return ours, int(pages / pages_per_request * longest)
