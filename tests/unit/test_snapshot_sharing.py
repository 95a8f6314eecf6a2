"""What requests that go on from a snapshot share, and what becomes of it: full blocks have any
number of readers, are freed once, and take with them every snapshot that they are part of."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from harness.block_sets import blocks_add_up, ids, shared_sets, snapshots_of
from harness.blocks import BLOCK, admit, grow, manager_of, needs_of, request_of

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request, RequestStatus

from lazyllm_vllm.hooks.kv_cache import managers, reuse
from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.schedule import Schedule

LONGEST = 300
CUTS = [{"layer": 2, "keep": 0.5}, {"layer": 4, "keep": 0.25}]
FIELDS = {"prune": CUTS, "min_prompt_tokens": 60, "last_tokens": 8, "score_window": 8}
CONFIG = LazyLLMConfig(**FIELDS, revive_per_turn=1, reuse="deep")
NEEDS = needs_of(Schedule.build(CONFIG, 6))
DOCUMENT = list(range(1000, 1160))
# Of its 160 tokens stage 1 keeps 80 and stage 2 keeps 40: five blocks that are full, and two.
FULL = {1: 5, 2: 2}


@pytest.fixture
def manager() -> KVCacheManager:
    """Of an engine that has answered the document alone, with one token that has not run."""
    manager = manager_of(NEEDS, LONGEST, 600, caches=True)
    begin(manager, "document", DOCUMENT)
    end(manager, "document")
    return manager


def begin(manager: KVCacheManager, name: str, prompt: list[int]) -> Request:
    """Admit a request, alone in its step, whole."""
    request = request_of(name, prompt)
    assert admit(manager, request)
    reuse.hand_over(manager, [SimpleNamespace(req_id=name)])
    manager.of_test = getattr(manager, "of_test", {}) | {name: request}
    blocks_add_up(manager)
    return request


def end(manager: KVCacheManager, *names: str) -> None:
    for name in names:
        request = manager.of_test.pop(name)
        request.status = RequestStatus.FINISHED_STOPPED
        manager.free(request)
        blocks_add_up(manager)


def question(i: int, length: int = 30) -> list[int]:
    return [*DOCUMENT, *[i] * length]


def groups_of(stage: int) -> int:
    return cdiv(NEEDS.stage_pages[stage], NEEDS.pages)


def test_many_hold_a_documents_blocks_once(manager):
    """Of N requests at once each has blocks of its own for what is not full and for what comes
    behind; the document's full blocks, of stage 0 too, are held once."""
    pool, count = manager.block_pool, 8
    free = pool.get_num_free_blocks()
    for i in range(count):
        begin(manager, f"r{i}", question(i))
    plan, tokens = NEEDS.schedule.plan(len(DOCUMENT)), len(DOCUMENT) + 30
    shared = sum(groups_of(stage) * full for stage, full in FULL.items())
    shared += groups_of(0) * (len(DOCUMENT) // BLOCK)
    alone = NEEDS.total_of(plan, tokens)
    assert free - pool.get_num_free_blocks() == shared + count * (alone - shared)
    assert shared > alone / 2
    for group in range(len(manager.kv_cache_config.kv_cache_groups)):
        stage = getattr(manager.kv_cache_config.kv_cache_groups[group].kv_cache_spec, "stage", None)
        tables = [ids(manager.get_blocks(f"r{i}").blocks[group]) for i in range(count)]
        same = FULL.get(stage, 0) if stage != 0 else len(DOCUMENT) // BLOCK
        assert len({tuple(table[:same]) for table in tables}) == 1
        behind = [block for table in tables for block in table[same:]]
        assert len(set(behind)) == len(behind)
    end(manager, *(f"r{i}" for i in range(count)))
    assert pool.get_num_free_blocks() == free


def hand_out(manager: KVCacheManager, block) -> None:
    """That block, and no other."""
    pool = manager.block_pool
    others = [b for b in pool.free_block_queue.get_all_free_blocks() if b is not block]
    pool.touch(others)
    assert pool.get_new_blocks(1) == [block]
    pool.free_blocks([block, *others])


def turns(manager: KVCacheManager) -> list:
    """Snapshots of the document, of a question about it, and of another that goes on from there."""
    begin(manager, "first", question(7))
    end(manager, "first")
    begin(manager, "second", [*question(7), *range(40)])
    end(manager, "second")
    snapshots = sorted(snapshots_of(manager), key=lambda each: each.num_tokens)
    assert [each.num_tokens for each in snapshots] == [160, 190, 230]
    return snapshots


@pytest.mark.parametrize("part, left", ((0, []), (1, [160]), (2, [160, 190])))
def test_a_block_that_is_handed_out_takes_every_snapshot_that_has_it(manager, part, left):
    longest = turns(manager)[-1]
    assert len(longest.full) == 3
    hand_out(manager, longest.full[part].blocks[-1])
    assert sorted(each.num_tokens for each in snapshots_of(manager)) == left
    assert sorted(each.num_tokens for each in manager_snapshots(manager)) == left


def manager_snapshots(manager: KVCacheManager) -> set:
    """Those that some set of blocks still knows."""
    return {snapshot for each in shared_sets(manager) for snapshot in each.snapshots}


def test_the_rest_of_a_snapshot_takes_it_alone(manager):
    snapshots = turns(manager)
    hand_out(manager, snapshots[1].rest.blocks[0])
    assert {each.num_tokens for each in snapshots_of(manager)} == {160, 230}
    begin(manager, "third", [*question(7), *range(40), 5, 6])
    assert snapshots_of_taken(manager, "third").num_tokens == 230


def snapshots_of_taken(manager: KVCacheManager, name: str):
    return managers.planned_managers(manager)[0].snapshots.taken[name].snapshot


def test_what_more_depend_on_is_handed_out_later(manager):
    """Each snapshot goes with its rest, before a block that others have too."""
    pool, left = manager.block_pool, []
    longest = turns(manager)[-1]
    begin(manager, "other", question(9))
    end(manager, "other")
    last = next(each for each in snapshots_of(manager) if 9 in each.tail)
    in_order = [last.rest, last.full[1], longest.full[0]]
    in_order = [block for each in in_order for block in ids(each.blocks)]
    assert ids(pool.free_block_queue.get_all_free_blocks())[-len(in_order) :] == in_order
    while (count := len(snapshots_of(manager))) > 0:
        if not left or left[-1] != count:
            left.append(count)
        pool.get_new_blocks(1)
    assert left == [4, 3, 2, 1]


def test_who_reads_a_snapshots_blocks_keeps_them(manager):
    """Also when the snapshot is gone, and all other blocks are somebody's."""
    pool = manager.block_pool
    (snapshot,) = snapshots_of(manager)
    begin(manager, "reader", question(1))
    begin(manager, "other reader", question(2))
    full = snapshot.full[0].blocks
    others = pool.get_new_blocks(pool.get_num_free_blocks())
    assert snapshots_of(manager) == [] and set(ids(full)).isdisjoint(ids(others))
    assert {block.ref_cnt for block in full} == {2}
    pool.free_blocks(others)
    for i, name in enumerate(("reader", "other reader")):
        end(manager, name)
        assert {block.ref_cnt for block in full} == {1 - i}
    assert {each.num_tokens for each in snapshots_of(manager)} == {190}


@pytest.mark.parametrize("has_snapshot", (False, True))
def test_who_leaves_nothing_lets_go_of_what_it_shares(manager, has_snapshot):
    """Withdrawn before it has run what the snapshot has. Its blocks are the last to be handed out
    if a snapshot has them, and else the first."""
    pool, free = manager.block_pool, manager.block_pool.get_num_free_blocks()
    (snapshot,) = snapshots_of(manager)
    request = begin(manager, "aborted", question(1))
    request.num_computed_tokens = 150
    if not has_snapshot:
        hand_out(manager, snapshot.rest.blocks[0])
    request.status = RequestStatus.FINISHED_ABORTED
    manager.free(request)
    blocks_add_up(manager)
    assert pool.get_num_free_blocks() == free
    assert len(snapshots_of(manager)) == has_snapshot
    full = ids(snapshot.full[0].blocks)
    in_order = ids(pool.free_block_queue.get_all_free_blocks())
    last = in_order[-len(full) :] if has_snapshot else in_order[: len(full)]
    assert set(last) == set(full)


def test_a_preempted_request_shares_again_what_it_shared(manager):
    """It takes over what is its own alone, and leaves all to others when it ends."""
    request = begin(manager, "preempted", question(1))
    others = begin(manager, "beside", question(2))
    assert grow(manager, request, 5)
    tables = manager.get_block_ids("preempted")
    manager.free(request)
    blocks_add_up(manager)
    request.append_output_token_ids(6)
    assert admit(manager, request)
    blocks_add_up(manager)
    again = manager.get_block_ids("preempted")
    planned = [each.kv_cache_group_id for each in managers.planned_managers(manager)]
    for group in planned:
        assert again[group][: len(tables[group])] == tables[group]
    end(manager, "preempted")
    manager.free(others)
    assert {each.num_tokens for each in snapshots_of(manager)} >= {160, 192}


def test_a_document_that_stays_forgets_the_questions_that_went(manager):
    """Whatever is asked of it, its blocks know the snapshots that there are, and no others."""
    (document,) = snapshots_of(manager)
    for i in range(60):
        begin(manager, f"r{i}", question(i, 90))
        end(manager, f"r{i}")
    there = snapshots_of(manager)
    assert document in there and len(there) < 40
    assert document.full[0].snapshots == set(there)


def test_least_of_what_a_share_of_scores_keeps():
    """With ``keep_mass`` the plan has the most that is kept; the least is 20 tokens."""
    config = LazyLLMConfig(**FIELDS, keep_mass=0.9, min_keep_tokens=20)
    needs = needs_of(Schedule.build(config, 6))
    plan = needs.schedule.plan(160)
    assert [needs.full_blocks(plan, 2, n) for n in (160, 171, 172, 187, 188)] == [1, 1, 2, 2, 3]
    without = replace(needs, schedule=NEEDS.schedule)
    assert [without.full_blocks(plan, 2, n) for n in (160, 167, 168)] == [2, 2, 3]


@pytest.mark.parametrize("ranks", (1, 2))
def test_ranks_have_room_for_the_scores_of_all(ranks):
    """The buffer that they are reduced in is as large as the cache is for who shares nothing. Here
    is room for many: little is a request's own."""
    schedule = Schedule.build(LazyLLMConfig(**FIELDS, reuse="deep", revive_reserve=0), 6)
    needs = replace(needs_of(schedule, vector=24), ranks=ranks)
    document, longest = list(range(1000)), 1100
    num_blocks = needs.total(longest, longest) * 2
    manager = manager_of(needs, longest, num_blocks, caches=True)
    begin(manager, "document", document)
    end(manager, "document")
    most, live = needs.most_pruned_tokens(num_blocks) // len(document), []
    while admit(manager, request := request_of(f"r{len(live)}", [*document, len(live)])):
        live.append(request)
        reuse.hand_over(manager, [SimpleNamespace(req_id=request.request_id)])
    assert len(live) == most if ranks == 2 else len(live) > most
    manager.free(request)
    manager.free(live.pop())
    assert admit(manager, request)
