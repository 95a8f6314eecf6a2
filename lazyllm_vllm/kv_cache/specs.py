"""KV cache specs: one kind of group for a stage's keys and values, one for the Aux Cache."""

from dataclasses import dataclass, field, replace
from typing import Self

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from lazyllm_vllm.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class StageSpec(FullAttentionSpec):
    """Keys and values of one decoder layer of a stage, with slots by need."""

    stage: int
    schedule: Schedule = field(repr=False)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for layers of one stage; AssertionError for layers of several, which is how
        vLLM learns that they need groups of their own."""
        assert all(spec == specs[0] for spec in specs), "layers of different stages do not merge"
        return replace(specs[0])

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())

    def slots_saved(self, num_prompt: int) -> int:
        """Slots fewer than tokens that a request with such a prompt needs, however long it gets."""
        return num_prompt - self.schedule.slots(self.stage, num_prompt, num_prompt)

    def num_blocks(self, num_prompt: int, num_total: int) -> int:
        """Blocks for a request of ``num_total`` tokens, ``num_prompt`` of them prefilled."""
        return cdiv(self.schedule.slots(self.stage, num_prompt, num_total), self.block_size)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of one layer for a prompt of the greatest length. A short prompt that grows as
        long while decoding takes more; it is preempted, and then prefilled as a long one."""
        longest = vllm_config.model_config.max_model_len
        return self.num_blocks(longest, longest) * self.page_size_bytes


@dataclass(frozen=True, kw_only=True)
class AuxSpec(KVCacheSpec):
    """One page of the Aux Cache's blocks, filled with whole hidden vectors.

    Attributes:
        page_size: bytes; a page of the stages' layers.
        pages: pages a block, the number of layers in a stage's group.
        vector_size: bytes of a hidden state.
    """

    page_size: int
    pages: int
    vector_size: int
    schedule: Schedule = field(repr=False)

    @property
    def per_page(self) -> int:
        """Vectors a page."""
        return self.page_size // self.vector_size

    @property
    def tokens_per_block(self) -> int:
        return self.pages * self.per_page

    def num_blocks(self, num_prompt: int) -> int:
        """Blocks for a prompt of ``num_prompt`` tokens."""
        return cdiv(self.schedule.aux_slots(num_prompt), self.tokens_per_block)

    # A page is laid out by us (kernels/gather.py), so vLLM is told of one opaque state a page.
    num_heads = 1
    tokens_per_state = 0
    has_layer_views = False
    uses_slot_mapping = False
    prefix_cacheable = False

    @property
    def state_content_size_bytes(self) -> int:
        return self.page_size

    @property
    def page_size_bytes(self) -> int:
        return self.page_size

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return self.num_blocks(vllm_config.model_config.max_model_len) * self.page_size

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        return cdiv(max_len, self.tokens_per_block)
