"""What ``lazyllm check`` finds out, the way ``vllm serve`` begins: flags, then configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vllm
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

import lazyllm_vllm
from lazyllm_vllm.hooks.engine_config import (
    KEY,
    SWITCHED_OFF,
    block_needs,
    lazyllm_config,
)
from lazyllm_vllm.hooks.kv_cache.specs import neediest_plan
from lazyllm_vllm.hooks.patches import is_installed
from lazyllm_vllm.models.families import FAMILIES
from lazyllm_vllm.models.registry import PREFIX
from lazyllm_vllm.observe.startup_log import cache_room, layer_windows
from lazyllm_vllm.plan.blocks import BlockNeeds
from lazyllm_vllm.plan.config import ConfigError
from lazyllm_vllm.plan.operations import flops
from lazyllm_vllm.plan.presets import DEFAULT
from lazyllm_vllm.plan.schedule import Schedule

LENGTHS = (4096, 32768)
GIB = 2**30
PER_GIB, GPU = "each GiB", "this GPU"  # what the room of the KV cache is told of
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")  # vLLM loads the first of these that there is


def diagnose(serve: Sequence[str], lengths: Sequence[int] | None) -> dict[str, Any]:
    """Everything that ``lazyllm check`` prints.

    Args:
        serve: what stands behind ``vllm serve``, the model first. Without a LazyLLM configuration
            among it the default preset is taken.
        lengths: prompts, in tokens; None: ``LENGTHS`` and the longest.

    Returns:
        ``error``, the one why ``vllm serve`` would not start, or None; ``versions``; ``gpu``, its
        ``name`` and ``bytes``, or None; and if it would start ``model``, ``config``,
        ``switched_off``, ``schedule``, ``kv_cache`` and ``lengths``. Layers are counted from 1.
    """
    versions = {"vllm": vllm.__version__, "lazyllm-vllm": lazyllm_vllm.__version__}
    found = {"error": None, "versions": versions, "gpu": _gpu()}
    try:
        config = _create_config(serve)
        longest = config.model_config.max_model_len
        if lengths is None:
            lengths = sorted({*(n for n in LENGTHS if n < longest), longest})
        if wrong := [n for n in lengths if not 1 <= n <= longest]:
            raise ConfigError(f"lazyllm: --lengths: {wrong[0]} is not in 1 to {longest}")
        needs = block_needs(config)
        room = _room(config, needs, found["gpu"])
    except Exception as error:  # whatever vLLM raises, this is where it would have ended
        return found | {"error": str(error) or type(error).__name__}
    return found | {
        "model": _model(config),
        "config": lazyllm_config(config).model_dump(mode="json", exclude_unset=True),
        "switched_off": config.additional_config[SWITCHED_OFF],
        "schedule": _schedule(needs.schedule),
        "kv_cache": room,
        "lengths": [_prompt(config, needs, n) for n in lengths],
    }


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> None:
        raise ConfigError(message)


def _create_config(serve: Sequence[str]) -> VllmConfig:
    """As ``vllm serve`` makes it. Raises whatever that raises."""
    load_general_plugins()
    if not is_installed():
        raise ConfigError(
            "lazyllm: vLLM does not load the plugin; install lazyllm-vllm where vLLM is, and "
            "leave VLLM_PLUGINS out or name lazyllm in it"
        )
    command, parser = ServeSubcommand(), _Parser()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", *serve])
    command.validate(args)
    args.model = args.model_tag
    if args.lazyllm_config is None and KEY not in (args.additional_config or {}):
        args.lazyllm_config = {"preset": DEFAULT}
    engine_args = AsyncEngineArgs.from_cli_args(args)
    return engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


def _gpu() -> dict[str, Any] | None:
    if not current_platform.is_cuda():
        return None
    memory = current_platform.get_device_total_memory()
    return {"name": current_platform.get_device_name(), "bytes": memory}


def _model(config: VllmConfig) -> dict[str, Any]:
    model = config.model_config
    name = model.architectures[0].removeprefix(PREFIX)
    return {
        "name": model.model,
        "class": name,
        "tested": any(family.name == name for family in FAMILIES),
        "layers": model.get_total_num_hidden_layers(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": model.max_model_len,
    }


def _schedule(schedule: Schedule) -> dict[str, Any]:
    config = schedule.config
    stages = [
        {"layers": [layers[0] + 1, layers[-1] + 1], "keep": keep}
        for layers, keep in zip(
            map(schedule.stage_layers, range(schedule.num_stages)), schedule.keeps
        )
    ]
    return {
        "stages": stages,
        "choices": {name: list(keeps) for name, keeps in schedule.others},
        "decode": config.decode,
        "revives": schedule.has_aux,
        "revive_budget": config.revive_budget,
        "min_prompt_tokens": config.min_prompt_tokens,
    }


def _room(config: VllmConfig, needs: BlockNeeds, gpu: dict[str, Any] | None) -> dict[str, Any]:
    """How many tokens the KV cache holds, in prompts of the greatest length.

    Raises:
        ConfigError: not one of these, with which vLLM would not start.
    """
    cache, model = config.cache_config, config.model_config
    weights = _weights(Path(model.model)) // config.parallel_config.tensor_parallel_size
    if cache.num_gpu_blocks_override is not None:
        of, num_bytes = "--num-gpu-blocks-override", None
    elif cache.kv_cache_memory_bytes:
        of, num_bytes = "the memory set for it", cache.kv_cache_memory_bytes
    elif gpu and weights:
        of, num_bytes = GPU, int(gpu["bytes"] * cache.gpu_memory_utilization) - weights
    else:
        of, num_bytes = PER_GIB, GIB
    blocks = cache.num_gpu_blocks_override
    if num_bytes is not None:
        blocks = max(num_bytes, 0) // (needs.pages * needs.page_size)
    plan = neediest_plan(needs, config)
    needed = needs.total_of(plan, plan.num_prompt)
    fits_itself = model.original_max_model_len == -1  # --max-model-len auto
    if blocks < needed and of != PER_GIB and not fits_itself:
        raise ConfigError(
            f"lazyllm: a prompt of {plan.num_prompt} tokens needs {needed} blocks of the KV cache, "
            f"and by {of} there are at most {blocks}; lower --max-model-len"
        )
    ours, stock = cache_room(needs, blocks, model.max_model_len, layer_windows(model))
    return {
        "of": of,
        "block_size": needs.block_size,
        "blocks": blocks,
        "tokens": ours,
        "stock_tokens": stock,
        "ratio": ours / stock,
    }


def _weights(folder: Path) -> int:
    """Bytes of a model's weights; 0: they are not here."""
    sizes = (sum(file.stat().st_size for file in folder.glob(kind)) for kind in WEIGHTS)
    return next(filter(None, sizes), 0)


def _prompt(config: VllmConfig, needs: BlockNeeds, num_prompt: int) -> dict[str, Any]:
    """A prompt alone, by the engine's own schedule."""
    schedule = needs.schedule
    plan = schedule.plan(num_prompt)
    shape = config.model_config.hf_text_config.to_dict()
    cuts = [(at, kept / num_prompt) for at, kept in zip(schedule.starts[1:-1], plan.kept[1:])]
    ours, stock = flops(shape, cuts, num_prompt), flops(shape, (), num_prompt)
    return {
        "tokens": num_prompt,
        "pruned": plan.is_pruned,
        "kept": list(plan.kept),
        "blocks": needs.total_of(plan, num_prompt),
        "operations": ours,
        "stock_operations": stock,
        "ratio": stock / ours,
    }
