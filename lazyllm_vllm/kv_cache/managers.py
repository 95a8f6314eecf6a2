"""Block managers: how many blocks a request is given, in the scheduler's process.

Both ask vLLM's shared block pool for what the arithmetic of ``schedule`` says, and nothing else.
A request's prompt length is what its first allocation asks for, since prompts are prefilled in one
piece; after preemption the prompt and what was generated are prefilled anew, as one prompt.
"""

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from lazyllm_vllm.kv_cache.specs import AuxSpec, StageSpec


class _ByNeedManager(FullAttentionManager):
    """Allocates ``required_blocks(num_prompt, num_total)`` blocks for a request."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.num_prompt: dict[str, int] = {}

    def required_blocks(self, num_prompt: int, num_total: int) -> int:
        raise NotImplementedError

    def _missing_blocks(self, request_id: str, num_tokens: int) -> int:
        num_prompt = self.num_prompt.get(request_id, num_tokens)
        held = len(self.req_to_blocks.get(request_id, ()))
        return max(self.required_blocks(num_prompt, num_tokens) - held, 0)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args, **kwargs) -> int:
        return self._missing_blocks(request_id, num_tokens)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        self.num_prompt.setdefault(request_id, num_tokens)
        blocks = self.block_pool.get_new_blocks(self._missing_blocks(request_id, num_tokens))
        self.req_to_blocks[request_id].extend(blocks)
        return blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.num_prompt.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def cache_blocks(self, *args, **kwargs) -> None:
        """Nothing is shared between requests: a stage's keys depend on the whole prompt."""


class StageManager(_ByNeedManager):
    def required_blocks(self, num_prompt: int, num_total: int) -> int:
        return self.kv_cache_spec.num_blocks(num_prompt, num_total)


class AuxManager(_ByNeedManager):
    def required_blocks(self, num_prompt: int, num_total: int) -> int:
        return self.kv_cache_spec.num_blocks(num_prompt)


def register_managers() -> None:
    """Tell vLLM which manager serves which spec. Safe to call again."""
    # vLLM registers its own specs only while nothing else is registered, so it must go first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(StageSpec, StageManager, uniform_type_base_spec=StageSpec)
    KVCacheSpecRegistry.register(AuxSpec, AuxManager, uniform_type_base_spec=AuxSpec)
