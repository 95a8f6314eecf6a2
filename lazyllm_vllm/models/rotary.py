"""A layer's rotary embedding, taken out of it: its attention rotates on the way to the KV cache."""

import torch

from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding


class _LeftToAttention(torch.nn.Module):
    def forward(self, positions, query, key):
        return query, key


def take_rotary(layer: torch.nn.Module) -> RotaryEmbedding | None:
    """The rotary embedding of a decoder layer, which from now on does nothing there; None, and the
    layer as it was, if it is of a kind that ``kernels.rotary`` does not do.

    vLLM shares one module among layers and models, so that the layer gets another, not the module
    another behaviour.
    """
    for name, module in layer.named_modules():
        if isinstance(module, RotaryEmbedding) and _is_plain(module):
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, _LeftToAttention())
            return module
    return None


def _is_plain(module: RotaryEmbedding) -> bool:
    same = all(
        getattr(type(module), name) is getattr(RotaryEmbedding, name)
        for name in ("forward_cuda", "forward_native", "forward_static")
    )
    return same and module.is_neox_style and module.rotary_dim == module.head_size
