"""The attention backend, as vLLM sees one."""

from dataclasses import dataclass

from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
)

from lazyllm_vllm.hooks.engine_config import BLOCK_SIZE
from lazyllm_vllm.runtime.boundary import Boundary
from lazyllm_vllm.runtime.step import Step


@dataclass(frozen=True)
class StageMetadata:
    """What the layers of one KV cache group are told in a step.

    Attributes:
        group: the KV cache group, which has its own block table and slots.
        last_layer: name of the stage's last layer.
    """

    step: Step
    boundary: Boundary
    stage: int
    group: int
    last_layer: str


class LazyAttentionBackend(AttentionBackend):
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls():
        from lazyllm_vllm.hooks.stage_attention import StageAttention

        return StageAttention

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return max(default_block_size, BLOCK_SIZE)

    @staticmethod
    def get_builder_cls() -> type["LazyMetadataBuilder"]:
        return LazyMetadataBuilder


class LazyMetadataBuilder(AttentionMetadataBuilder[StageMetadata]):
    """Says that decode batches run in full CUDA graphs; the metadata itself is built for all
    groups at once by ``LazyModelState.prepare_attn``."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> StageMetadata:
        raise NotImplementedError("LazyModelState.prepare_attn builds the metadata")
