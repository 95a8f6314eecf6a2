"""What the KV cache has beside keys and values: pages of stage 0 in which hidden states are parked,
and the group of what is private to a pruned prompt, its state and its Aux Cache."""

from typing import NamedTuple

import torch

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables

from lazyllm_vllm.hooks.attention_backend import LazyAttentionBackend
from lazyllm_vllm.hooks.attention_layer import StagedAttention
from lazyllm_vllm.hooks.kv_cache.specs import PromptSpec, SharedStageSpec
from lazyllm_vllm.kernels.paged import FP8
from lazyllm_vllm.kernels.parked import ParkedPage, ParkedStates
from lazyllm_vllm.kernels.prompt_pages import AuxCache, Pages, PromptState
from lazyllm_vllm.plan.config import ConfigError


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


class ParkedStatesPage(torch.nn.Module, AttentionLayerBase):
    """A layer of stage 0 to vLLM's eyes, which has parts of hidden states for keys and values."""

    impl = None

    def __init__(self, like: StagedAttention) -> None:
        super().__init__()
        self._like = (like,)

    def get_attn_backend(self) -> type[LazyAttentionBackend]:
        return LazyAttentionBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> SharedStageSpec:
        return self._like[0].get_kv_cache_spec(vllm_config)


def add_pages(vllm_config: VllmConfig, like: StagedAttention) -> None:
    """Register the pseudo-layers beside the model's attention layers, of which ``like`` is the
    first."""
    layers = vllm_config.compilation_config.static_forward_context
    needs = like.get_kv_cache_spec(vllm_config).needs
    for page in range(needs.parked_pages):
        layers[f"{_PARKED}{page}"] = ParkedStatesPage(like)
    for page in range(needs.pages):
        layers[f"lazyllm.prompt.{page}"] = PromptPage(like)


_PARKED = "lazyllm.parked."


class PromptCache(NamedTuple):
    """Attributes:
    blocks: ``[blocks, pages, words]`` int32, all that a block has, whichever group it is in.
    """

    state: PromptState | None
    aux: AuxCache | None
    blocks: torch.Tensor | None


def parked_states(
    kv_cache_config: KVCacheConfig, block_tables: BlockTables, layers: dict, width: int
) -> ParkedStates | None:
    """Views of the parked pages; None: there are none.

    Args:
        layers: vLLM's, by name; those of the pages are bound to their part of the KV cache.
        width: numbers of a hidden state that this rank parks.
    """
    found = {}
    for group, of_group in enumerate(kv_cache_config.kv_cache_groups):
        found |= {name: group for name in of_group.layer_names if name.startswith(_PARKED)}
    pages, first = [], 0
    for name in (f"{_PARKED}{page}" for page in range(len(found))):
        kv_cache, group = layers[name].kv_cache, found[name]
        if kv_cache.dtype == torch.uint8:
            kv_cache = kv_cache.view(FP8)
        blocks, heads, block_size, size = kv_cache.shape
        page_width = heads * size
        strides = kv_cache.stride(0), page_width, 1
        cache = kv_cache.as_strided((blocks, block_size, page_width), strides)
        pages.append(ParkedPage(cache, block_tables.input_block_tables[group], group, first))
        first += page_width
    if not pages:
        return None
    assert first >= width > first - pages[-1].cache.shape[2]
    scale = None
    if pages[0].cache.dtype == FP8:
        num_slots = kv_cache_config.num_blocks * pages[0].cache.shape[1]
        scale = torch.zeros(num_slots, device=pages[0].cache.device)
    return ParkedStates(pages, scale)


def prompt_cache(
    kv_cache_config: KVCacheConfig,
    block_tables: BlockTables,
    layers: dict,
    num_prompt: torch.Tensor,
    state_room: torch.Tensor,
    dtype: torch.dtype,
) -> PromptCache:
    """Views of the backing buffer.

    Args:
        layers: vLLM's, by name; the group's are bound to the buffer.
        num_prompt, state_room: ``[batch]`` int32, as in ``AuxCache``.
        dtype: of hidden states; an FP8 cache has them in FP8 too.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    group = next((at for at, spec in enumerate(specs) if isinstance(spec, PromptSpec)), None)
    if group is None:
        return PromptCache(None, None, None)
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
    shape = kv_cache_config.num_blocks, needs.pages, needs.page_size // 4
    blocks = words.as_strided(shape, (tensor.block_stride // 4, tensor.layer_stride // 4, 1))
    if needs.schedule.num_stages == 2:
        return PromptCache(state, None, blocks)
    dtype = FP8 if layers[names[0]].is_fp8 else dtype
    size = get_dtype_size(dtype)
    vectors = raw.view(dtype)[tensor.offset // size :]
    aux = AuxCache(vectors, num_prompt, state_room, pages(size), state)
    return PromptCache(state, aux, blocks)
