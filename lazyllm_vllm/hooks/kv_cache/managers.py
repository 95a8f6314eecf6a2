"""Block managers: how many blocks a request is given, in the scheduler's process.

They ask vLLM's shared block pool for what a request's plan says, and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from lazyllm_vllm.hooks.kv_cache.snapshots import Snapshots
from lazyllm_vllm.hooks.kv_cache.specs import PromptSpec, SharedStageSpec, StageSpec
from lazyllm_vllm.hooks.kv_cache.watchdog import Watchdog
from lazyllm_vllm.plan.request_plan import RequestPlan
from lazyllm_vllm.plan.request_setting import DEFAULT, RequestSetting


class Found(NamedTuple):
    """What a prompt that is not pruned found in the prefix cache when it began.

    Attributes:
        tokens: those with keys in the first stage.
        whole: of these, those with keys in all stages.
        is_behind: whether its later stages may be behind until all of it has run; else they have
            caught up after its first chunk.
    """

    tokens: int
    whole: int
    is_behind: bool


@dataclass
class _OfPool:
    """What all managers of a block pool know.

    Attributes:
        plans: of its requests: every manager sees one plan for a request.
        settings: what requests set for themselves, until they leave.
        found: by request that is not pruned, see ``catch_up``.
        new: ids of the later stages' blocks that went to the prefix cache in the step that is being
            scheduled, which runs the last of their tokens.
        ran: rows that have run in each stage, of prompts whose later stages run in several steps
            (``spread``).
        snapshots: what requests that ended have left, and who goes on from it.
    """

    plans: dict[str, RequestPlan] = field(default_factory=dict)
    settings: dict[str, RequestSetting] = field(default_factory=dict)
    found: dict[str, Found] = field(default_factory=dict)
    new: set[int] = field(default_factory=set)
    ran: dict[str, tuple[int, ...]] = field(default_factory=dict)
    snapshots: Snapshots = field(default_factory=Snapshots)
    watchdog: Watchdog = field(default_factory=Watchdog)


_OF_POOLS: WeakKeyDictionary[BlockPool, _OfPool] = WeakKeyDictionary()


class PlannedManager(FullAttentionManager):
    """Allocates what the request's plan says.

    The plan is made when the scheduler asks whether the whole request fits, which it does before it
    first allocates anything for it (``scheduler_reserve_full_isl``): that call alone is told all of
    the tokens to be prefilled, the prompt and, after a preemption, what had been generated. A
    request that goes on from a snapshot has the plan of the prompt that was pruned, the snapshot's
    full blocks, and either its other ones or new ones, into which they are copied.

    Attributes:
        enough_for: tokens for which the blocks that a request holds suffice. Most steps ask for no
            more, and every request is asked about twice a step.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        shared = _OF_POOLS.setdefault(self.block_pool, _OfPool())
        self.plans, self.settings, self.found = shared.plans, shared.settings, shared.found
        self.ran, self.snapshots, self.watchdog = shared.ran, shared.snapshots, shared.watchdog
        self.new = shared.new
        self.enough_for: dict[str, float] = {}

    def required_blocks(self, plan: RequestPlan, num_tokens: int) -> int:
        """Blocks for a request of ``num_tokens`` tokens so far."""
        raise NotImplementedError

    def full_blocks(self, plan: RequestPlan, num_tokens: int) -> int:
        """Of these those that are never written again."""
        return 0

    def most_tokens(self, plan: RequestPlan, num_blocks: int) -> float:
        """For which so many blocks suffice, once a request has its first ones."""
        raise NotImplementedError

    def hashes(self, request: Request) -> Sequence[BlockHash]:
        """vLLM's, of a request's full blocks."""
        hash_size = self.block_pool.hash_block_size
        return resolve_block_hashes(request.block_hashes, hash_size, self.block_size)

    def _missing_blocks(self, request_id: str, num_tokens: int, num_found: int = 0) -> int:
        """``num_found``: blocks that a request found which has none yet."""
        held = num_found + len(self.req_to_blocks.get(request_id, ()))
        if (taken := self.snapshots.taken.get(request_id)) is not None:
            num_tokens = max(num_tokens, taken.snapshot.num_tokens)
            held = held or taken.num_given(self.kv_cache_group_id)
        return max(self.required_blocks(self.plans[request_id], num_tokens) - held, 0)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args,
        apply_admission_cap: bool = False,
        **kwargs,
    ) -> int:
        if num_tokens <= self.enough_for.get(request_id, -1):
            return 0
        is_held, taken = self.req_to_blocks.get(request_id), self.snapshots.taken.get(request_id)
        if apply_admission_cap and not is_held:
            plan = self.plans.get(request_id)
            if taken is not None:
                self.plans[request_id] = taken.plan
            elif plan is None or plan.num_prompt != num_tokens:
                schedule = self.kv_cache_spec.needs.schedule
                setting = self.settings.get(request_id, DEFAULT)
                self.plans[request_id] = schedule.plan(num_tokens, setting)
        missing = self._missing_blocks(request_id, num_tokens, len(new_computed_blocks))
        missing += self._get_num_evictable_blocks(new_computed_blocks)
        if taken is None or is_held:
            return missing
        return missing + taken.num_free(self.kv_cache_group_id)

    def add_local_computed_blocks(self, request_id: str, *args, **kwargs) -> None:
        """Called for all groups before blocks are allocated for any: hold what is taken."""
        super().add_local_computed_blocks(request_id, *args, **kwargs)
        if (taken := self.snapshots.taken.get(request_id)) is None:
            return
        snapshot, group = taken.snapshot, self.kv_cache_group_id
        full, rest = snapshot.full_of(group), snapshot.rest.by_group[group]
        self.block_pool.touch(full)
        self.block_pool.touch(rest)
        self.req_to_blocks[request_id] += full
        if taken.adopts:
            self.snapshots.forget(snapshot)
            self.req_to_blocks[request_id] += rest
        else:
            taken.sources[group] = rest

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        if num_tokens <= self.enough_for.get(request_id, -1):
            return []
        missing, blocks = self._missing_blocks(request_id, num_tokens), []
        if missing:
            blocks = self.block_pool.get_new_blocks(missing)
            self.req_to_blocks[request_id].extend(blocks)
            if (taken := self.snapshots.taken.get(request_id)) is not None:
                pairs = zip(taken.sources.pop(self.kv_cache_group_id, ()), blocks)
                taken.copies += [(theirs.block_id, own.block_id) for theirs, own in pairs]
        held = len(self.req_to_blocks.get(request_id, ()))
        self.enough_for[request_id] = self.most_tokens(self.plans[request_id], held)
        return blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.plans.pop(request_id, None)
        self.settings.pop(request_id, None)
        self.snapshots.taken.pop(request_id, None)
        self.ran.pop(request_id, None)
        self.found.pop(request_id, None)
        self.enough_for.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def give_up(self, request_id: str, num_tokens: int, num_shared: int) -> tuple[list, list]:
        """The blocks that hold what a request has of so many tokens, which are its own no more:
        behind those that it shares, the ones that are full, and the rest."""
        blocks, plan = self.req_to_blocks[request_id], self.plans[request_id]
        full, count = self.full_blocks(plan, num_tokens), self.required_blocks(plan, num_tokens)
        self.drop(request_id, count)
        return blocks[num_shared:full], blocks[full:count]

    def drop(self, request_id: str, count: int) -> None:
        """Forget that a request has its first blocks."""
        self.enough_for.pop(request_id, None)
        self.req_to_blocks[request_id] = self.req_to_blocks[request_id][count:]

    def cache_blocks(self, *args, **kwargs) -> None:
        """Nothing of a prompt that is pruned goes to the prefix cache."""


_PLANNED: WeakKeyDictionary[KVCacheManager, list[PlannedManager]] = WeakKeyDictionary()


def planned_managers(manager: KVCacheManager) -> list[PlannedManager]:
    """Those of the groups that are private to a request; none: nothing is pruned."""
    if (found := _PLANNED.get(manager)) is None:
        of_groups = manager.coordinator.single_type_managers
        found = [each for each in of_groups if isinstance(each, PlannedManager)]
        _PLANNED[manager] = found
    return found


class StageManager(PlannedManager):
    def required_blocks(self, plan: RequestPlan, num_tokens: int) -> int:
        num_tokens = max(num_tokens, plan.num_prompt)  # from the first chunk on
        return cdiv(num_tokens - plan.slots_saved[self.kv_cache_spec.stage], self.block_size)

    def full_blocks(self, plan: RequestPlan, num_tokens: int) -> int:
        return self.kv_cache_spec.needs.full_blocks(plan, self.kv_cache_spec.stage, num_tokens)

    def most_tokens(self, plan: RequestPlan, num_blocks: int) -> float:
        return num_blocks * self.block_size + plan.slots_saved[self.kv_cache_spec.stage]

    def cache_blocks(self, request: Request, num_tokens: int, *args, **kwargs) -> None:
        """Share the blocks of a prompt that is not pruned, as vLLM's manager does; but none whose
        later stages may not run in this step."""
        name, plan = request.request_id, self.plans[request.request_id]
        if plan.is_pruned:
            return
        if self.found[name].is_behind and request.num_computed_tokens < plan.num_prompt:
            return
        num_cached, num_full = self.num_cached_block.get(name, 0), num_tokens // self.block_size
        if num_cached < num_full:
            blocks, group = self.req_to_blocks[name], self.kv_cache_group_id
            counts = num_cached, num_full, self.block_size
            self.block_pool.cache_full_blocks(request, blocks, *counts, group)
            self.new.update(block.block_id for block in blocks[num_cached:num_full])
            self.num_cached_block[name] = num_full


class SharedStageManager(FullAttentionManager):
    """vLLM's own, but that a prompt's last tokens, which score the others, always run."""

    @classmethod
    def find_longest_cache_hit(cls, block_hashes, max_length: int, *args, **kwargs):
        schedule = kwargs["kv_cache_spec"].needs.schedule
        if schedule.may_prune(max_length + 1):
            max_length -= schedule.config.score_window - 1
        return super().find_longest_cache_hit(block_hashes, max(max_length, 0), *args, **kwargs)


class PromptManager(PlannedManager):
    """Ranks of tensor parallelism put the scores of all prompts side by side, in a buffer for as
    many as there is room for if nobody shares (``most_pruned_tokens``). Where sharing makes room
    for more, they wait."""

    def get_num_blocks_to_allocate(self, request_id: str, *args, **kwargs) -> int:
        missing = super().get_num_blocks_to_allocate(request_id, *args, **kwargs)
        needs, plan = self.kv_cache_spec.needs, self.plans.get(request_id)
        if needs.ranks == 1 or self.req_to_blocks.get(request_id) or not (plan and plan.is_pruned):
            return missing
        prompts = [self.plans[name] for name, blocks in self.req_to_blocks.items() if blocks]
        tokens = sum(other.num_prompt for other in (*prompts, plan))
        all_blocks = self.block_pool.num_gpu_blocks
        return missing if tokens <= needs.most_pruned_tokens(all_blocks) else all_blocks

    def required_blocks(self, plan: RequestPlan, num_tokens: int) -> int:
        return self.kv_cache_spec.needs.prompt_blocks(plan)

    def most_tokens(self, plan: RequestPlan, num_blocks: int) -> float:
        return float("inf")


def register_managers() -> None:
    """Tell vLLM which manager serves which spec. Safe to call again."""
    # vLLM registers its own specs only while nothing else is registered, so it must go first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(StageSpec, StageManager, uniform_type_base_spec=StageSpec)
    KVCacheSpecRegistry.register(
        SharedStageSpec, SharedStageManager, uniform_type_base_spec=SharedStageSpec
    )
    KVCacheSpecRegistry.register(PromptSpec, PromptManager, uniform_type_base_spec=PromptSpec)
