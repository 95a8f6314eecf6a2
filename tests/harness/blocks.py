"""vLLM's own KV cache manager with LazyLLM's groups, small enough for random lives of requests."""

import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from hypothesis import strategies as st

from vllm import EngineArgs, SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request

from harness.tiny import tiny_model
from lazyllm_vllm.hooks.kv_cache.reuse import chunk_size
from lazyllm_vllm.hooks.kv_cache.specs import PromptSpec, SharedStageSpec, StageSpec
from lazyllm_vllm.plan.blocks import BlockNeeds
from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.schedule import Schedule

try:  # vLLM 0.33 asks for the groups first
    from vllm.v1.core.kv_cache_planning import get_global_kv_cache_groups, get_kv_cache_configs
except ImportError:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    get_global_kv_cache_groups = None

BLOCK = 16
HEADS, SIZE = 2, 8
PAGE = BLOCK * HEADS * SIZE * 2 * 4
VECTOR = 100  # twenty of them fill a page, and leave some of it
STATE = 24  # bytes of a position's state

init_none_hash(sha256)


def needs_of(schedule: Schedule, vector: int = VECTOR) -> BlockNeeds:
    return BlockNeeds(schedule, BLOCK, PAGE, vector)


def specs_of(needs: BlockNeeds) -> dict:
    """As an engine's layers give them."""
    schedule = needs.schedule

    def spec(stage: int) -> StageSpec:
        is_shared = stage == 0 or not schedule.prunes
        return (SharedStageSpec if is_shared else StageSpec)(
            block_size=BLOCK,
            num_kv_heads=HEADS,
            head_size=SIZE,
            dtype=torch.float32,
            stage=stage,
            needs=needs,
        )

    specs = {f"layers.{i}": spec(schedule.stage_of(i)) for i in range(schedule.num_layers)}
    assert specs["layers.0"].page_size_bytes == PAGE
    if schedule.prunes:
        specs |= {f"parked.{i}": spec(0) for i in range(needs.parked_pages)}
        prompt = PromptSpec(block_size=BLOCK, needs=needs)
        specs |= {f"prompt.{i}": prompt for i in range(needs.pages)}
    return specs


@cache
def _stock_config():
    with tempfile.TemporaryDirectory() as folder:
        args = EngineArgs(
            model=str(tiny_model(Path(folder))), skip_tokenizer_init=True, dtype="float32"
        )
        config = args.create_engine_config()
    config.cache_config.kv_cache_layout = "LBNHC"  # as the engine core resolves it
    return config


def _manager(
    specs: dict, longest: int, num_blocks: int, pages: int, caches: bool, hash_size: int = BLOCK
):
    vllm_config = _stock_config()
    vllm_config.model_config.max_model_len = longest
    memory = num_blocks * pages * PAGE
    groups = (
        [get_global_kv_cache_groups(vllm_config, [specs])] if get_global_kv_cache_groups else []
    )
    (config,) = get_kv_cache_configs(vllm_config, [specs], [memory], *groups)
    assert config.num_blocks == num_blocks
    return KVCacheManager(
        config,
        longest,
        scheduler_block_size=BLOCK,
        hash_block_size=hash_size,
        enable_caching=caches,
    )


def manager_of(
    needs: BlockNeeds,
    longest: int,
    num_blocks: int,
    caches: bool = False,
    hash_size: int = BLOCK,
) -> KVCacheManager:
    """vLLM's own, for a cache of so many blocks. Raises ValueError as an engine's start does.

    Args:
        caches: whether prefixes are shared; hash_size: tokens of a hash (``prefix_match_unit``).
    """
    return _manager(specs_of(needs), longest, num_blocks, needs.pages, caches, hash_size)


def stock_manager(longest: int, num_blocks: int) -> KVCacheManager:
    """One for a model of one layer without LazyLLM, that shares prefixes."""
    spec = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=HEADS, head_size=SIZE, dtype=torch.float32
    )
    return _manager({"layers.0": spec}, longest, num_blocks, 1, True)


def request_of(name: str, prompt: int | list[int], hash_size: int = BLOCK) -> Request:
    """
    Args:
        prompt: its tokens, or how many.
        hash_size: tokens of a hash.
    """
    return Request(
        name,
        prompt_token_ids=prompt if isinstance(prompt, list) else [1] * prompt,
        sampling_params=SamplingParams(max_tokens=10**6),
        pooling_params=None,
        block_hasher=get_request_block_hasher(hash_size, sha256),
    )


def hit_of(manager: KVCacheManager, request: Request) -> int:
    """Tokens that a waiting request would find."""
    return manager.get_computed_blocks(request)[1]


def admit(
    manager: KVCacheManager, request: Request, chunk: int = 10**6, budget: int | None = None
) -> bool:
    """Its first chunk, as the scheduler does with a waiting request that runs alone.

    Args:
        budget: tokens of a step, if the request's chunks go by ``reuse.chunk_size``, which must
            leave this one as it is.
    """
    request.num_computed_tokens = 0
    found, hit, *_ = manager.get_computed_blocks(request)
    size = min(chunk, request.num_tokens - hit)
    if budget is not None:
        parts = {"running": [], "waiting": [], "kv_holding_waiting": [], "max_num_running_reqs": 8}
        config = SimpleNamespace(max_num_batched_tokens=budget)
        scheduler = SimpleNamespace(kv_cache_manager=manager, scheduler_config=config, **parts)
        assert chunk_size(scheduler, request, hit, size) == size
    blocks = manager.allocate_slots(
        request, size, hit, found, full_sequence_must_fit=True, has_scheduled_reqs=False
    )
    if blocks is not None:
        request.num_computed_tokens = hit + size
    return blocks is not None


def go_on(manager: KVCacheManager, request: Request, chunk: int = 10**6) -> bool:
    """One more chunk, as the scheduler does with a running request."""
    size = min(chunk, request.num_tokens - request.num_computed_tokens)
    assert size > 0
    blocks = manager.allocate_slots(request, size)
    if blocks is not None:
        request.num_computed_tokens += size
    return blocks is not None


def grow(manager: KVCacheManager, request: Request, token: int = 1) -> bool:
    """One more token."""
    request.append_output_token_ids(token)
    return go_on(manager, request)


@st.composite
def schedules(draw) -> Schedule:
    num_layers = draw(st.integers(2, 12))
    cuts = draw(st.lists(st.integers(1, num_layers - 1), max_size=3, unique=True).map(sorted))
    keeps = draw(st.lists(st.integers(1, 100), min_size=3, max_size=3).map(sorted))[::-1]
    last_tokens = draw(st.integers(1, 80))
    config = LazyLLMConfig(
        prune=tuple({"layer": n, "keep": k / 100} for n, k in zip(cuts, keeps)),
        min_prompt_tokens=draw(st.integers(1, 500)),
        first_tokens=draw(st.integers(0, 20)),
        last_tokens=last_tokens,
        score_window=draw(st.integers(1, last_tokens)),
        revive_budget=draw(st.sampled_from([64, 0])),
        revive_reserve=draw(st.sampled_from([0.1, 0, 1, 0.5])),
    )
    return Schedule.build(config, num_layers)


# Bytes of a hidden state, of which a block's fill one page, two, and four.
vectors = st.sampled_from([VECTOR, 250, 500])
