"""The Aux Cache: hidden states of dropped tokens, in blocks of vLLM's own pool."""

import torch

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.kv_cache_interface import KVCacheConfig

from lazyllm_vllm.attention import LazyAttentionBackend, StagedAttention
from lazyllm_vllm.config import ConfigError
from lazyllm_vllm.grouping import layers_per_group
from lazyllm_vllm.kernels.gather import AuxPages
from lazyllm_vllm.kv_cache.specs import AuxSpec
from lazyllm_vllm.schedule import Schedule


class AuxPage(torch.nn.Module, AttentionLayerBase):
    """A layer to vLLM's eyes: one page of each Aux block. ``kv_cache`` is bound to the raw
    backing buffer."""

    impl = None

    def __init__(self, like: StagedAttention, schedule: Schedule) -> None:
        super().__init__()
        self._like = (like,)  # in a tuple, so as not to become a submodule
        self.schedule = schedule

    def get_attn_backend(self) -> type[LazyAttentionBackend]:
        return LazyAttentionBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> AuxSpec:
        config = vllm_config.model_config
        like = self._like[0].get_kv_cache_spec(vllm_config)
        vector_size = config.get_hidden_size() * get_dtype_size(config.dtype)
        if vector_size > like.page_size_bytes:
            raise ConfigError(
                f"lazyllm: a page of the KV cache holds {like.page_size_bytes} bytes, less than a "
                f"hidden state ({vector_size}); raise --block-size, or set revive_budget to 0"
            )
        return AuxSpec(
            block_size=like.block_size,
            page_size=like.page_size_bytes,
            pages=layers_per_group(self.schedule.stage_sizes),
            vector_size=vector_size,
            schedule=self.schedule,
        )


def add_aux_pages(vllm_config: VllmConfig, like: StagedAttention, schedule: Schedule) -> None:
    """Register the pseudo-layers of the Aux group beside the model's attention layers."""
    layers = vllm_config.compilation_config.static_forward_context
    for page in range(layers_per_group(schedule.stage_sizes)):
        layers[f"lazyllm.aux.{page}"] = AuxPage(like, schedule)


def aux_pages(
    kv_cache_config: KVCacheConfig,
    group: int,
    block_table: torch.Tensor,
    layers: dict,
    dtype: torch.dtype,
) -> AuxPages:
    """Where the Aux group's vectors lie in the backing buffer."""
    names = kv_cache_config.kv_cache_groups[group].layer_names
    spec: AuxSpec = kv_cache_config.kv_cache_groups[group].kv_cache_spec
    tensor = next(t for t in kv_cache_config.kv_cache_tensors if t.layers[0] in names)
    size = get_dtype_size(dtype)
    return AuxPages(
        buffer=layers[names[0]].kv_cache.view(dtype),
        block_table=block_table,
        offset=tensor.offset // size,
        page_stride=tensor.layer_stride // size,
        block_stride=tensor.block_stride // size,
        pages=spec.pages,
        per_page=spec.per_page,
        hidden_size=spec.vector_size // size,
    )
