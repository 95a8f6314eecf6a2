"""A prompt that is not pruned, and of which the prefix cache has much, over several steps.

The cache has its first stage alone: the later ones, which are its own, must still run on all that
was found. Workers run no more of that in a step than a step has tokens, but for the prompt's last
chunk, with which they run all that is left (``Prefills.later_end``). Here chunks are made so small
that the last one leaves no more than the others, where a step has ``_STEP`` tokens or more.
"""

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.request import Request

from lazyllm_vllm.hooks.kv_cache.managers import PlannedManager
from lazyllm_vllm.plan.request_setting import DEFAULT

_STEP = 2048


def cut(found: tuple, num_blocks: int, block_size: int) -> tuple:
    """The first blocks of what vLLM's ``get_computed_blocks`` finds; never vLLM's own empty
    ones, for which it would not tell the managers of an admission."""
    blocks, _, *others = found
    kept = KVCacheBlocks(tuple(list(of_group[:num_blocks]) for of_group in blocks.blocks))
    return kept, num_blocks * block_size, *others


def leave_tokens(planned: PlannedManager, request: Request, found: tuple) -> tuple:
    """What vLLM's ``get_computed_blocks`` finds for a request that begins, less so many blocks that
    there is a new token for each step that it needs. Its chunks go by what is left."""
    hit, size = found[1], planned.block_size
    missing = cdiv(request.num_tokens, _STEP) - (request.num_tokens - hit)
    if hit > _STEP and missing > 0 and _catches_up(planned, request):
        found = cut(found, hit // size - cdiv(missing, size), size)
    planned.hits[request.request_id] = found[1]
    return found


def catch_up_chunk(planned: PlannedManager, request: Request, size: int, budget: int) -> int:
    """Tokens of a chunk, if vLLM would give it ``size``.

    Args:
        budget: tokens that a step has.
    """
    hit, num_tokens = planned.hits.get(request.request_id, 0), request.num_tokens
    if hit <= budget or not _catches_up(planned, request):
        return size
    before_last = cdiv(num_tokens, budget) - 1  # steps, each of which runs ``budget`` tokens
    return min(size, max((num_tokens - hit - 1) // before_last, 1))


def _catches_up(planned: PlannedManager, request: Request) -> bool:
    schedule = planned.kv_cache_spec.needs.schedule
    setting = planned.settings.get(request.request_id, DEFAULT)
    return schedule.prunes and not schedule.plan(request.num_tokens, setting).is_pruned
