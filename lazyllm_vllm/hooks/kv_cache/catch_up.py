"""Prompts that are not pruned, and what the prefix cache has of them.

Of such a prompt later stages' keys depend on what comes before a token and on nothing else, as the
first stage's do, so that requests share them, too. But they need not be there for all that the
first stage's are there for: prompts that were pruned leave none. Then the later stages must still
run on the rest of what was found: the prompt catches up.

Workers run no more of that in a step than a step has tokens, but for the prompt's last chunk, with
which they run all that is left (``Prefills.later_end``). Here chunks are made so small that the
last one leaves no more than the others, where a step has ``_STEP`` tokens or more.
"""

from itertools import islice, takewhile

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.request import Request

from lazyllm_vllm.hooks.kv_cache.managers import Found, PlannedManager, StageManager

_STEP = 2048


def cut(found: tuple, num_blocks: int, block_size: int) -> tuple:
    """The first blocks of what vLLM's ``get_computed_blocks`` finds; never vLLM's own empty
    ones, for which it would not tell the managers of an admission."""
    blocks, _, *others = found
    kept = KVCacheBlocks(tuple(list(of_group[:num_blocks]) for of_group in blocks.blocks))
    return kept, num_blocks * block_size, *others


def with_later_stages(
    planned: list[PlannedManager], request: Request, found: tuple
) -> tuple[tuple, int]:
    """What vLLM's ``get_computed_blocks`` finds for a request, with the blocks of later stages that
    others left of the same tokens; and how many tokens have keys in all stages."""
    first, size = planned[0], planned[0].block_size
    groups = [each.kv_cache_group_id for each in planned if isinstance(each, StageManager)]
    hashes = islice(first.hashes(request), found[1] // size)
    of_hashes = (first.block_pool.get_cached_block(each, groups) for each in hashes)
    shared = list(takewhile(lambda blocks: blocks is not None, of_hashes))
    if len(shared) * size < found[1]:  # it catches up, which comes first in a step
        ran = (first.new.isdisjoint(block.block_id for block in of_one) for of_one in shared)
        shared = shared[: sum(takewhile(bool, ran))]
    if not shared:
        return found, 0
    blocks = list(found[0].blocks)
    for group, of_group in zip(groups, zip(*shared)):
        blocks[group] = list(of_group)
    return (KVCacheBlocks(tuple(blocks)), *found[1:]), len(shared) * size


def begin_unpruned(planned: PlannedManager, request: Request, found: tuple, whole: int) -> tuple:
    """Note what a request found that begins and is not pruned.

    Args:
        found, whole: as ``with_later_stages`` returns them.

    Returns:
        ``found``, less so many blocks that there is a new token for each step that the request
        needs. Its chunks go by what is left.
    """
    hit, size = found[1], planned.block_size
    missing = cdiv(request.num_tokens - whole, _STEP) - (request.num_tokens - hit)
    if hit - whole > _STEP and missing > 0:
        found = cut(found, hit // size - cdiv(missing, size), size)
    tokens, whole = found[1], min(whole, found[1])
    planned.found[request.request_id] = Found(tokens, whole, is_behind=whole < tokens)
    return found


def catch_up_chunk(planned: PlannedManager, request: Request, size: int, budget: int) -> int:
    """Tokens of a chunk, if vLLM would give it ``size``.

    Args:
        budget: tokens that a step has.
    """
    found = planned.found.get(request.request_id)
    if found is None or not found.is_behind:
        return size
    if found.tokens - found.whole <= budget:
        planned.found[request.request_id] = found._replace(is_behind=False)
        return size
    # Steps, each of which runs ``budget`` tokens.
    before_last = cdiv(request.num_tokens - found.whole, budget) - 1
    return min(size, max((request.num_tokens - found.tokens - 1) // before_last, 1))
