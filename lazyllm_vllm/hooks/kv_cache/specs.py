"""KV cache specs: one kind of group for a stage's keys and values, one for what is private to a
pruned prompt."""

from dataclasses import dataclass, field, replace
from typing import Self

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from lazyllm_vllm.plan.blocks import BlockNeeds
from lazyllm_vllm.plan.request_plan import RequestPlan


def neediest_plan(needs: BlockNeeds, vllm_config: VllmConfig) -> RequestPlan:
    """The prompt whose blocks, over all groups, a KV cache must hold for the engine to start.

    A request that outgrows the cache is preempted and prefilled anew with what it has, so that to
    hold a prompt of every length is enough. Who sets the number of blocks gets it if the longest
    prompt fits: a prompt that does not is refused by itself (``requests.RequestChecks``).
    """
    longest = vllm_config.model_config.max_model_len
    if vllm_config.cache_config.num_gpu_blocks_override is not None:
        return needs.schedule.plan(longest)
    return needs.schedule.plan(needs.neediest_prompt(longest))


@dataclass(frozen=True, kw_only=True)
class StageSpec(FullAttentionSpec):
    """Keys and values of one decoder layer of a stage, with slots by need."""

    stage: int
    needs: BlockNeeds = field(repr=False)

    @property
    def prefix_cacheable(self) -> bool:
        """Not to vLLM, whose lookup would find no more of the first stage than of this one; see
        ``catch_up.with_later_stages``."""
        return False

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for layers of one stage; AssertionError for layers of several, which is how
        vLLM learns that they need groups of their own."""
        assert all(spec == specs[0] for spec in specs), "layers of different stages do not merge"
        return replace(specs[0])

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        plan = neediest_plan(self.needs, vllm_config)
        return self.needs.stage_blocks(plan, self.stage, plan.num_prompt) * self.page_size_bytes


@dataclass(frozen=True, kw_only=True)
class SharedStageSpec(StageSpec):
    """The same where keys and values depend on what comes before a token and on nothing else, so
    that requests share them: in stage 0, and in every stage if no prompt is pruned."""

    @property
    def prefix_cacheable(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class PromptSpec(KVCacheSpec):
    """One page of the blocks that hold a pruned prompt's state and its Aux Cache."""

    needs: BlockNeeds = field(repr=False)

    # A page is laid out by us (kernels/prompt_pages.py), so vLLM is told of one opaque state each.
    num_heads = 1
    tokens_per_state = 0
    has_layer_views = False
    uses_slot_mapping = False
    prefix_cacheable = False

    @property
    def state_content_size_bytes(self) -> int:
        return self.needs.page_size

    @property
    def page_size_bytes(self) -> int:
        return self.needs.page_size

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        plan = neediest_plan(self.needs, vllm_config)
        return self.needs.prompt_blocks(plan) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        return self.needs.most_prompt_blocks(max_len)
