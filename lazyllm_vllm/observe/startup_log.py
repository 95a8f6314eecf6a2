"""The block that the log shows at start: schedule, what was switched off, room in the cache."""

from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig

from lazyllm_vllm.hooks.engine_config import SWITCHED_OFF, full_layers
from lazyllm_vllm.hooks.kv_cache.specs import StageSpec
from lazyllm_vllm.plan.blocks import BlockNeeds, ceil_div
from lazyllm_vllm.plan.schedule import Schedule

logger = init_logger("vllm.lazyllm")


def log_start(vllm_config: VllmConfig, schedule: Schedule, kv_cache_config: KVCacheConfig) -> None:
    """Log the block once the KV cache is as large as it will be."""
    if vllm_config.cache_config.num_gpu_blocks != kv_cache_config.num_blocks:
        return  # the small cache of vLLM's CUDA graph memory profile
    longest, blocks = vllm_config.model_config.max_model_len, kv_cache_config.num_blocks
    specs = (group.kv_cache_spec for group in kv_cache_config.kv_cache_groups)
    needs = next(spec for spec in specs if isinstance(spec, StageSpec)).needs
    ours, stock = cache_room(needs, blocks, longest, layer_windows(vllm_config.model_config))
    switched_off = vllm_config.additional_config.get(SWITCHED_OFF, [])
    config = schedule.config
    lines = ["LazyLLM is on"]
    for stage, keep in enumerate(schedule.keeps):
        layers = schedule.stage_layers(stage)
        lines.append(
            f"  stage {stage}: layers {layers[0] + 1} to {layers[-1] + 1}, "
            f"keep {keep:g} of the prompt"
        )
    for name, keeps in schedule.others:
        shares = ", ".join(f"{keep:g}" for keep in keeps)
        lines.append(f"  requests may choose {name}: keep {shares} by stage")
    aux = f"{config.revive_budget} rows a step" if schedule.has_aux else "off, no Aux Cache"
    lines += [
        f"  decode: {config.decode}; revival: {aux}; prompts under "
        f"{config.min_prompt_tokens} tokens are not pruned",
        f"  switched off: {', '.join(switched_off) or 'nothing'}",
        f"  KV cache: room for {ours:,} tokens in prompts of the greatest length; "
        f"stock vLLM has room for {stock:,} ({ours / stock:.2f}x)",
    ]
    unpruned = needs.longest_unpruned(blocks - 1)  # vLLM keeps one back
    if unpruned < min(longest, config.min_prompt_tokens - 1):
        lines.append(
            f"  prompts of {unpruned + 1:,} to {config.min_prompt_tokens - 1:,} tokens are "
            "refused: they are too short to be pruned and too long for this KV cache"
        )
    logger.info("\n".join(lines))


def layer_windows(model: ModelConfig) -> list[int]:
    """The sliding window of each layer that has one."""
    full = full_layers(model)
    num_windows = 0 if full is None else model.get_total_num_hidden_layers() - len(full)
    return [model.get_sliding_window()] * num_windows


def cache_room(
    needs: BlockNeeds, num_blocks: int, longest: int, windows: list[int]
) -> tuple[int, int]:
    """Tokens that fit in the KV cache, in prompts of ``longest`` tokens: with LazyLLM, and in the
    same bytes without.

    Args:
        windows: of the layers that have one, of which stock vLLM keeps no more tokens.
    """
    ours = num_blocks / needs.total(longest, longest) * longest
    held = [longest] * (needs.schedule.num_layers - len(windows))
    held += [min(window, longest) for window in windows]
    pages_per_request = sum(ceil_div(tokens, needs.block_size) for tokens in held)
    stock = num_blocks * needs.pages / pages_per_request * longest
    return int(ours), int(stock)
