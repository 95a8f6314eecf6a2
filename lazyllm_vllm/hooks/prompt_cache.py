"""The KV cache group of what is private to a pruned prompt: its state and its Aux Cache."""

from typing import NamedTuple

import torch

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables

from lazyllm_vllm.hooks.attention_backend import LazyAttentionBackend
from lazyllm_vllm.hooks.attention_layer import StagedAttention
from lazyllm_vllm.hooks.kv_cache.specs import PromptSpec
from lazyllm_vllm.kernels.paged import FP8
from lazyllm_vllm.kernels.prompt_pages import AuxCache, Pages, PromptState
from lazyllm_vllm.plan.config import ConfigError
from lazyllm_vllm.plan.grouping import layers_per_group
from lazyllm_vllm.plan.schedule import Schedule


class PromptPage(torch.nn.Module, AttentionLayerBase):
    """A layer to vLLM's eyes: one page of each block of the group. ``kv_cache`` is bound to the raw
    backing buffer."""

    impl = None

    def __init__(self, like: StagedAttention) -> None:
        super().__init__()
        self._like = (like,)  # in a tuple, so as not to become a submodule

    @property
    def is_fp8(self) -> bool:
        """Whether keys, values and hidden states are stored in FP8."""
        return self._like[0].impl.is_fp8

    def get_attn_backend(self) -> type[LazyAttentionBackend]:
        return LazyAttentionBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> PromptSpec:
        needs = self._like[0].get_kv_cache_spec(vllm_config).needs
        if needs.slots_per_page == 0:  # refused before, unless vLLM made the block size smaller
            raise ConfigError(
                f"lazyllm: a page of the KV cache holds {needs.page_size} bytes, less than a "
                f"hidden state ({needs.vector_size}); raise --block-size"
            )
        return PromptSpec(block_size=needs.block_size, needs=needs)


def add_prompt_pages(vllm_config: VllmConfig, like: StagedAttention, schedule: Schedule) -> None:
    """Register the pseudo-layers of the group beside the model's attention layers."""
    layers = vllm_config.compilation_config.static_forward_context
    for page in range(layers_per_group(schedule.stage_sizes)):
        layers[f"lazyllm.prompt.{page}"] = PromptPage(like)


class PromptCache(NamedTuple):
    state: PromptState | None
    aux: AuxCache | None


def prompt_cache(
    kv_cache_config: KVCacheConfig,
    block_tables: BlockTables,
    layers: dict,
    num_prompt: torch.Tensor,
    dtype: torch.dtype,
) -> PromptCache:
    """Views of the backing buffer.

    Args:
        layers: vLLM's, by name; the group's are bound to the buffer.
        num_prompt: ``[batch]`` int32.
        dtype: of hidden states; an FP8 cache has them in FP8 too.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    group = next((at for at, spec in enumerate(specs) if isinstance(spec, PromptSpec)), None)
    if group is None:
        return PromptCache(None, None)
    needs = specs[group].needs
    names = kv_cache_config.kv_cache_groups[group].layer_names
    tensor = next(t for t in kv_cache_config.kv_cache_tensors if t.layers[0] in names)
    raw = layers[names[0]].kv_cache

    def pages(size: int) -> Pages:
        return Pages(
            block_table=block_tables.input_block_tables[group],
            pages=needs.pages,
            per_page=needs.slots_per_page,
            slot_size=needs.vector_size // size,
            positions_per_slot=needs.positions_per_slot,
            page_stride=tensor.layer_stride // size,
            block_stride=tensor.block_stride // size,
        )

    words = raw.view(torch.int32)[tensor.offset // 4 :]
    state = PromptState.of_buffer(words, pages(4))
    if not needs.schedule.has_aux:
        return PromptCache(state, None)
    dtype = FP8 if layers[names[0]].is_fp8 else dtype
    size = get_dtype_size(dtype)
    vectors = raw.view(dtype)[tensor.offset // size :]
    return PromptCache(state, AuxCache(vectors, num_prompt, pages(size), state))
