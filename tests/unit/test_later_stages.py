"""Blocks of later stages that prompts share which are not pruned, by hand: who finds how much."""

import itertools
from types import SimpleNamespace

import pytest
from harness.block_sets import blocks_add_up
from harness.blocks import BLOCK, admit, go_on, grow, manager_of, needs_of, request_of

from vllm.v1.request import Request, RequestStatus

from lazyllm_vllm.hooks.kv_cache import reuse
from lazyllm_vllm.hooks.kv_cache.managers import planned_managers
from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.schedule import Schedule

LONGEST = 300
DOCUMENT, OTHER = ([1000 * which + i for i in range(LONGEST)] for which in (1, 2))


def needs(**fields):
    config = LazyLLMConfig(
        prune=[{"layer": 2, "keep": 0.5}, {"layer": 4, "keep": 0.25}],
        min_prompt_tokens=100,
        score_window=8,
        revive_budget=0,
        **fields,
    )
    return needs_of(Schedule.build(config, 6))


class World:
    """Args:
    spare: blocks that there are for requests.

    Attributes:
        told: what workers are told of each request: tokens with keys in all stages.
        is_in_step: whether requests begin in one step.
    """

    def __init__(self, mode: str = "exact", spare: int = 400, hash_size: int = BLOCK) -> None:
        size = {"caches": True, "hash_size": hash_size}
        self.manager = manager_of(needs(reuse=mode), LONGEST, 401, **size)
        self.others = self.manager.block_pool.get_new_blocks(400 - spare)
        self.names, self.told, self.hash_size = itertools.count(), {}, hash_size
        self.is_in_step = False

    def begin(
        self, prompt: list[int], chunk: int = 1000, by_engine: bool = True, off: bool = False
    ) -> Request:
        """Its first chunk, as the scheduler does, in a step of its own unless ``is_in_step``.

        Args:
            by_engine: whether chunks go by ``reuse.chunk_size``, as in an engine whose steps have
                8,192 tokens.
            off: whether it asks not to be pruned.
        """
        request = request_of(f"r{next(self.names)}", prompt, self.hash_size)
        if off:
            request.sampling_params.extra_args = {"lazyllm": "off"}
        return self._admit(request, chunk, by_engine)

    def again(self, request: Request) -> Request:
        """Preempt it, and have it begin again."""
        self.manager.free(request)
        request.num_preemptions = 1
        return self._admit(request, 1000, True)

    def _admit(self, request: Request, chunk: int, by_engine: bool) -> Request:
        manager = self.manager
        assert admit(manager, request, chunk, budget=8192 if by_engine else None)
        if not self.is_in_step:
            data = SimpleNamespace(req_id=request.request_id)
            reuse.hand_over(manager, [data])
            self.told[request] = getattr(data, reuse.WHOLE, None)
        blocks_add_up(manager, self.others)
        return request

    def end(self, request: Request) -> None:
        request.status = RequestStatus.FINISHED_STOPPED
        self.manager.free(request)

    def found(self, request: Request) -> tuple[int, int]:
        """Tokens with keys in the first stage, and in all."""
        return planned_managers(self.manager)[0].found[request.request_id][:2]

    def plan(self, request: Request):
        return planned_managers(self.manager)[0].plans[request.request_id]

    def held(self, request: Request) -> list[list]:
        """Its blocks in each group of a stage."""
        return [of for of in self.manager.get_blocks(request.request_id).blocks if of]


def test_a_prompt_finds_what_one_before_left_in_all_stages():
    """80 tokens and 8 that were generated, of which the last has no keys: five blocks of 16."""
    world = World()
    first = world.begin(DOCUMENT[:80])
    assert world.told[first] is None
    for token in DOCUMENT[80:88]:
        assert grow(world.manager, first, token)
    blocks = world.held(first)
    assert len(blocks) == 4, "two groups of stage 0, one of each other"
    world.end(first)
    second = world.begin(DOCUMENT[:90])
    assert second.num_computed_tokens == 90 and world.told[second] == 80
    for mine, theirs in zip(world.held(second), blocks):
        assert mine[:5] == theirs[:5] and mine[5] is not theirs[5]


def test_what_a_pruned_prompt_left_is_the_first_stages():
    """The next runs later stages on all of it, and shares that from its first chunk on."""
    world = World()
    world.end(world.begin(DOCUMENT[:120]))
    second = world.begin(DOCUMENT[:90], chunk=2)
    assert second.num_computed_tokens == 82 and world.told[second] is None
    third = world.begin(DOCUMENT[:80] + OTHER[:9], chunk=2)
    assert third.num_computed_tokens == 82 and world.told[third] == 80


def test_who_catches_up_reads_what_ran_in_steps_before():
    """Of a pruned prompt's first stage 112 tokens are found. Who runs 96 of them in all stages
    shares these in the same step with one who finds no more. With one who does, and so catches up,
    not before the next: catching up comes before the others' rows."""
    world = World()
    world.end(world.begin(DOCUMENT[:120]))
    world.is_in_step = True
    world.begin(DOCUMENT[:96])
    assert world.found(world.begin(DOCUMENT[:98])) == (96, 96)
    longer = DOCUMENT[:120]
    first = world.begin(longer, off=True)
    assert world.found(first) == (112, 0)
    reuse.hand_over(world.manager, [])
    world.end(first)
    assert world.found(world.begin(longer, off=True)) == (112, 112)


def test_nobody_reads_what_may_not_have_run():
    """Where nobody knows that a prompt has caught up, it shares later stages' blocks once its first
    token is generated."""
    world = World()
    world.end(world.begin(DOCUMENT[:120]))
    second = world.begin(DOCUMENT[:90], chunk=1, by_engine=False)
    assert world.told[world.begin(DOCUMENT[:89])] is None
    assert go_on(world.manager, second, 9)
    assert world.told[world.begin(DOCUMENT[:88])] is not None, "the one before has caught up"
    assert grow(world.manager, second, 7)
    assert world.told[world.begin(DOCUMENT[:87])] == 80


@pytest.mark.parametrize("mode, goes_on", (("exact", False), ("deep", True)))
def test_who_would_be_pruned_goes_on_from_prompts_that_were_not(mode, goes_on):
    """96 of 110 tokens have keys in all stages: 14 in four layers are 56 pairs, and a pruned prompt
    keeps 55 and 28 in two layers each, 166. Of 138 tokens 42 are left, 168 pairs, and 69 and 35
    would be kept, 208; of 180 it is 336 and 270."""
    for length, is_near in ((110, True), (138, True), (180, False)):
        world = World(mode)
        world.end(world.begin(DOCUMENT[:96]))
        request = world.begin(DOCUMENT[:length])
        assert world.plan(request).is_pruned != (goes_on and is_near)
        assert world.told[request] == (96 if goes_on and is_near else None)


@pytest.mark.parametrize("mode", ("exact", "deep"))
def test_who_was_not_pruned_is_not_after_a_preemption(mode):
    """90 tokens, and 14 that were generated. A prompt of so many is pruned with ``exact``, also one
    that finds them."""
    world = World(mode)
    request = world.begin(DOCUMENT[:90])
    for token in DOCUMENT[90:104]:
        assert grow(world.manager, request, token)
    other = world.begin(DOCUMENT[:104])
    assert world.plan(other).is_pruned == (mode == "exact")
    assert not world.plan(world.again(request)).is_pruned
    assert world.told[request] == 96


def test_it_does_not_where_there_is_no_room_for_all():
    """110 tokens are seven blocks in each of four groups; pruned they need fewer."""
    least = max(needs().total(110, 110), 24)  # that one, and the one before it
    assert least < 28
    for spare in range(least, 32):
        world = World("deep", spare)
        world.end(world.begin(DOCUMENT[:96]))
        assert world.plan(world.begin(DOCUMENT[:110])).is_pruned == (spare < 28)


def test_it_goes_on_from_where_more_tokens_have_run():
    """A snapshot of 120 tokens; or a prompt of 96 that was not pruned, and what it generated: of 30
    or 34 tokens all but one have keys, 112 or 128 in whole blocks."""
    for generated, from_snapshot in ((30, True), (34, False)):
        world = World("deep")
        world.end(world.begin(DOCUMENT[:120]))
        unpruned = world.begin(DOCUMENT[:96])
        for token in DOCUMENT[96:][:generated]:
            assert grow(world.manager, unpruned, token)
        world.end(unpruned)
        request = world.begin(DOCUMENT[:150])
        taken = planned_managers(world.manager)[0].snapshots.taken
        assert (request.request_id in taken) == from_snapshot
        assert (world.told[request] is None) == from_snapshot


def test_a_chunk_that_is_taken_back_promises_nothing():
    """Behind stage 0 also what it was to catch up with."""
    world = World()
    world.end(world.begin(DOCUMENT[:120]))
    request = world.begin(DOCUMENT[:90])
    first, *later = (len(blocks) for blocks in world.held(request)[1:])
    assert (first, *later) == (6, 6, 6)
    request.num_computed_tokens = 80
    promised = reuse.promised_blocks(world.manager, request)
    expected = {block.block_id for blocks in world.held(request)[:2] for block in blocks[5:]}
    expected |= {block.block_id for blocks in world.held(request)[2:] for block in blocks}
    assert promised == expected


@pytest.mark.parametrize("hash_size", (8, 16))
def test_hashes_of_less_than_a_block_name_whole_blocks(hash_size):
    """Who agrees with a snapshot of 104 tokens in the first half and at the end does not go on."""
    world = World("deep", hash_size=hash_size)
    world.end(world.begin(DOCUMENT[:104]))
    alike = world.begin(DOCUMENT[:104] + OTHER[:9])
    other = world.begin(DOCUMENT[:60] + OTHER[60:96] + DOCUMENT[96:104] + OTHER[:9])
    taken = planned_managers(world.manager)[0].snapshots.taken
    assert alike.request_id in taken and other.request_id not in taken
