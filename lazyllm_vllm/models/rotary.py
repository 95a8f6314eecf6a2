"""A layer's rotary embedding, taken out of it: its attention rotates on the way to the KV cache."""

import torch

from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding


class _LeftToAttention(torch.nn.Module):
    def forward(self, positions, query, key):
        return query, key


def take_rotary(layer: torch.nn.Module, path: str | None) -> RotaryEmbedding | None:
    """The rotary embedding of a decoder layer, which from now on does nothing there.

    None, and the layer as it was, where the layer has none or does more with the rotated queries,
    and where it is of a kind that ``kernels.rotary`` does not do: other styles than NeoX's, and
    classes that change what vLLM's base class does.

    vLLM shares one module among layers and models, so that the layer gets another, not the module
    another behaviour.

    Args:
        path: of the module in the layer; None: it is to stay.
    """
    if path is None:
        return None
    parent, _, name = path.rpartition(".")
    attention = layer.get_submodule(parent)
    module = getattr(attention, name, None)
    scales_queries = getattr(attention, "do_llama_4_scaling", False)  # after it, by position
    if scales_queries or not isinstance(module, RotaryEmbedding) or not _is_plain(module):
        return None
    setattr(attention, name, _LeftToAttention())
    return module


def _is_plain(module: RotaryEmbedding) -> bool:
    same = all(
        getattr(type(module), name) is getattr(RotaryEmbedding, name)
        for name in ("forward_cuda", "forward_native", "forward_static")
    )
    return same and module.is_neox_style
