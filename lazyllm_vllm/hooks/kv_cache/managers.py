"""Block managers: how many blocks a request is given, in the scheduler's process.

They ask vLLM's shared block pool for what a request's plan says, and nothing else.
"""

from weakref import WeakKeyDictionary

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from lazyllm_vllm.hooks.kv_cache.specs import PromptSpec, SharedStageSpec, StageSpec
from lazyllm_vllm.hooks.kv_cache.watchdog import Watchdog
from lazyllm_vllm.plan.request_plan import RequestPlan

# The plans of the requests of each block pool: all its managers see one plan for a request.
_PLANS: WeakKeyDictionary[BlockPool, dict[str, RequestPlan]] = WeakKeyDictionary()
# What requests set for themselves (vLLM's ``extra_args``), if they do, until they leave.
_EXTRA_ARGS: WeakKeyDictionary[BlockPool, dict[str, dict]] = WeakKeyDictionary()

_WATCHDOGS: WeakKeyDictionary[BlockPool, Watchdog] = WeakKeyDictionary()


def note_request(pool: BlockPool, request: Request) -> None:
    """Called with every request before blocks are asked for it."""
    if (extra := _EXTRA_ARGS.get(pool)) is None:
        return
    params = request.sampling_params
    if params is not None and params.extra_args:
        extra[request.request_id] = params.extra_args
    _WATCHDOGS.setdefault(pool, Watchdog()).asks(
        pool, request, _PLANS[pool].get(request.request_id)
    )


class _PlannedManager(FullAttentionManager):
    """Allocates what the request's plan says.

    The plan is made when the scheduler asks whether the whole request fits, which it does before it
    first allocates anything for it (``scheduler_reserve_full_isl``): that call alone is told all of
    the tokens to be prefilled, the prompt and, after a preemption, what had been generated.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.plans = _PLANS.setdefault(self.block_pool, {})
        self.extra_args = _EXTRA_ARGS.setdefault(self.block_pool, {})

    def required_blocks(self, plan: RequestPlan, num_tokens: int) -> int:
        """Blocks for a request of ``num_tokens`` tokens so far."""
        raise NotImplementedError

    def _missing_blocks(self, request_id: str, num_tokens: int) -> int:
        held = len(self.req_to_blocks.get(request_id, ()))
        return max(self.required_blocks(self.plans[request_id], num_tokens) - held, 0)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args, apply_admission_cap: bool = False, **kwargs
    ) -> int:
        if apply_admission_cap and not self.req_to_blocks.get(request_id):
            plan = self.plans.get(request_id)
            if plan is None or plan.num_prompt != num_tokens:
                schedule = self.kv_cache_spec.needs.schedule
                setting = schedule.setting(self.extra_args.get(request_id))
                self.plans[request_id] = schedule.plan(num_tokens, setting)
        return self._missing_blocks(request_id, num_tokens)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        missing = self._missing_blocks(request_id, num_tokens)
        if missing == 0:  # most steps
            return []
        blocks = self.block_pool.get_new_blocks(missing)
        self.req_to_blocks[request_id].extend(blocks)
        return blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.plans.pop(request_id, None)
        self.extra_args.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def cache_blocks(self, *args, **kwargs) -> None:
        """Nothing is shared between requests: a stage's keys depend on the whole prompt."""


class StageManager(_PlannedManager):
    def required_blocks(self, plan: RequestPlan, num_tokens: int) -> int:
        num_tokens = max(num_tokens, plan.num_prompt)  # from the first chunk on
        return cdiv(num_tokens - plan.slots_saved[self.kv_cache_spec.stage], self.block_size)


class SharedStageManager(FullAttentionManager):
    """vLLM's own, but that a prompt's last tokens, which score the others, always run."""

    @classmethod
    def find_longest_cache_hit(cls, block_hashes, max_length: int, *args, **kwargs):
        schedule = kwargs["kv_cache_spec"].needs.schedule
        if schedule.may_prune(max_length + 1):
            max_length -= schedule.config.score_window - 1
        return super().find_longest_cache_hit(block_hashes, max(max_length, 0), *args, **kwargs)


class PromptManager(_PlannedManager):
    def required_blocks(self, plan: RequestPlan, num_tokens: int) -> int:
        return self.kv_cache_spec.needs.prompt_blocks(plan)


def register_managers() -> None:
    """Tell vLLM which manager serves which spec. Safe to call again."""
    # vLLM registers its own specs only while nothing else is registered, so it must go first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(StageSpec, StageManager, uniform_type_base_spec=StageSpec)
    KVCacheSpecRegistry.register(
        SharedStageSpec, SharedStageManager, uniform_type_base_spec=SharedStageSpec
    )
    KVCacheSpecRegistry.register(PromptSpec, PromptManager, uniform_type_base_spec=PromptSpec)
