"""Block managers: how many blocks a request is given, in the scheduler's process.

Both ask vLLM's shared block pool for what the arithmetic of ``schedule`` says, and nothing else.
A request's prompt length is what its first allocation asks for, since prompts are prefilled in one
piece; after preemption the prompt and what was generated are prefilled anew, as one prompt.
"""

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from lazyllm_vllm.kv_cache.specs import AuxSpec, StageSpec


class _ByNeedManager(FullAttentionManager):
    """Allocates what a request needs. It is asked for every running request in every step, so the
    arithmetic of a prompt's length is done once a prefill, in ``plan``."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.plans: dict[str, int] = {}

    def plan(self, num_prompt: int) -> int:
        """What to remember of a prompt of ``num_prompt`` tokens."""
        raise NotImplementedError

    def required_blocks(self, plan: int, num_tokens: int) -> int:
        """Blocks for a request of ``num_tokens`` tokens so far."""
        raise NotImplementedError

    def _missing_blocks(self, request_id: str, plan: int, num_tokens: int) -> int:
        held = len(self.req_to_blocks.get(request_id, ()))
        return max(self.required_blocks(plan, num_tokens) - held, 0)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args, **kwargs) -> int:
        plan = self.plans.get(request_id)
        if plan is None:  # not admitted yet
            plan = self.plan(num_tokens)
        return self._missing_blocks(request_id, plan, num_tokens)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        if request_id not in self.plans:
            self.plans[request_id] = self.plan(num_tokens)
        missing = self._missing_blocks(request_id, self.plans[request_id], num_tokens)
        if missing == 0:  # most steps
            return []
        blocks = self.block_pool.get_new_blocks(missing)
        self.req_to_blocks[request_id].extend(blocks)
        return blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.plans.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def cache_blocks(self, *args, **kwargs) -> None:
        """Nothing is shared between requests: a stage's keys depend on the whole prompt."""


class StageManager(_ByNeedManager):
    def plan(self, num_prompt: int) -> int:
        return self.kv_cache_spec.slots_saved(num_prompt)

    def required_blocks(self, plan: int, num_tokens: int) -> int:
        return cdiv(num_tokens - plan, self.block_size)


class AuxManager(_ByNeedManager):
    def plan(self, num_prompt: int) -> int:
        return self.kv_cache_spec.num_blocks(num_prompt)

    def required_blocks(self, plan: int, num_tokens: int) -> int:
        return plan


def register_managers() -> None:
    """Tell vLLM which manager serves which spec. Safe to call again."""
    # vLLM registers its own specs only while nothing else is registered, so it must go first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(StageSpec, StageManager, uniform_type_base_spec=StageSpec)
    KVCacheSpecRegistry.register(AuxSpec, AuxManager, uniform_type_base_spec=AuxSpec)
