"""What must hold of the blocks of a KV cache, whoever has them."""

from collections import Counter
from collections.abc import Iterable

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from lazyllm_vllm.hooks.kv_cache.managers import planned_managers
from lazyllm_vllm.hooks.kv_cache.snapshots import BlockSet, Snapshot


def ids(blocks: Iterable[KVCacheBlock]) -> list[int]:
    return [block.block_id for block in blocks]


def snapshots_of(manager: KVCacheManager) -> list[Snapshot]:
    """All that a request may go on from."""
    planned = planned_managers(manager)
    return [each for alike in planned[0].snapshots._by_name.values() for each in alike]


def shared_sets(manager: KVCacheManager) -> set[BlockSet]:
    """Sets of full blocks, of snapshots and of requests that went on from one."""
    planned = planned_managers(manager)
    snapshots = snapshots_of(manager)
    for name, taken in planned[0].snapshots.taken.items():
        if planned[0].req_to_blocks.get(name):
            snapshots.append(taken.snapshot)
    return {each for snapshot in snapshots for each in snapshot.full}


def blocks_add_up(manager: KVCacheManager, others: Iterable[KVCacheBlock] = ()) -> None:
    """A block is free, or as many hold it as it counts. Behind stage 0 it has one holder, but full
    blocks of a snapshot, which are held by all that went on from it, first in their tables, and
    those of prompts that are not pruned, which are no snapshot's.

    Args:
        others: blocks held by nobody's table, once for each time.
    """
    pool, holders, own, unpruned = manager.block_pool, Counter(ids(others)), [], set()
    for each in manager.coordinator.single_type_managers:
        for name, blocks in each.req_to_blocks.items():
            held = ids(blocks)
            holders.update(held)
            if each.kv_cache_spec.prefix_cacheable:
                continue
            if blocks and not each.plans[name].is_pruned:
                unpruned.update(held)
                continue
            taken = each.snapshots.taken.get(name) if blocks else None
            given = ids(taken.snapshot.full_of(each.kv_cache_group_id)) if taken else []
            assert held[: len(given)] == given, f"{name} does not hold what it shares"
            own += held[len(given) :]
    free = ids(pool.free_block_queue.get_all_free_blocks())
    assert len(free) == len(set(free)), "a block was freed twice"
    assert len(free) == pool.get_num_free_blocks(), "the queue of free blocks miscounts"
    free = set(free)
    for block in pool.blocks:
        held = holders[block.block_id]
        if block is pool.null_block:
            assert not held and block.block_id not in free, "vLLM's null block is handed out"
            continue
        assert block.ref_cnt == held, f"{block} is held by {held}"
        assert (held == 0) == (block.block_id in free), f"{block} is lost, or free and held"
    shared = [block for block in own if holders[block] != 1]
    assert not shared, f"blocks {shared} of a stage are not one request's own"
    assert unpruned.isdisjoint(own), "a pruned request's block is shared"
    _snapshots_are_whole(manager, unpruned | set(own))


def _snapshots_are_whole(manager: KVCacheManager, own: set[int]) -> None:
    """Each block of a snapshot is in one set, and nobody's own; it is forgotten with any of them.
    A set's blocks are all free, or all held."""
    pool, snapshots = manager.block_pool, snapshots_of(manager)
    sets = shared_sets(manager) | {snapshot.rest for snapshot in snapshots}
    blocks = [block for each in sets for block in ids(each.blocks)]
    assert len(blocks) == len(set(blocks)), "a block is in two sets"
    assert own.isdisjoint(blocks), "a request's own block is a snapshot's too"
    for each in sets:
        assert len({block.ref_cnt for block in each.blocks}) <= 1, "a set is held in part"
        assert each.snapshots <= set(snapshots), "a snapshot that is forgotten is not"
    for snapshot in snapshots:
        for each in snapshot.sets:
            assert snapshot in each.snapshots
            assert pool._reuse_watchers.keys() >= set(ids(each.blocks)), "blocks are not watched"
