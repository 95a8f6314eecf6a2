"""vLLM's norms, SiLU and rotary embedding, compiled where that is faster.

A staged model runs eagerly, and vLLM then takes its own kernels for these ops. What Inductor makes
of vLLM's PyTorch forms of them, as stock vLLM does with the whole model, is faster at the few rows
of a decode step, and for rotary embedding at many rows too. A compiled function costs more time to
call, so that it stands where the call is recorded in a CUDA graph or its rows hide it.
"""

from collections.abc import Callable

import torch

from vllm import ir
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

# From this many rows on, the GPU takes longer than the call.
MANY_ROWS = 2048


class SmallOps:
    """The compiled forms of a model's small ops.

    Attributes:
        recorded: whether what runs is recorded in a CUDA graph, or readies one.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.recorded = False
        forms = {RMSNorm: _norm_forms(), SiluAndMul: _silu_forms()}
        rotary = _rotary_forms()
        for module in model.modules():
            if isinstance(module, RotaryEmbedding):
                if type(module).forward_cuda is RotaryEmbedding.forward_cuda:
                    self._choose(module, rotary, MANY_ROWS)
            elif type(module) in forms and _is_plain(module):
                self._choose(module, forms[type(module)], None)

    def _choose(self, module, compiled: Callable, many_rows: int | None) -> None:
        usual = module._forward_method  # what vLLM's CustomOp dispatched to

        def forward(*args):
            many = many_rows is not None and args[-1].shape[0] >= many_rows
            return compiled(module, *args) if self.recorded or many else usual(*args)

        module._forward_method = forward


def _is_plain(module) -> bool:
    return not isinstance(module, RMSNorm) or (
        module.has_weight and module.variance_size_override is None
    )


def _norm_forms() -> Callable:
    norm = torch.compile(ir.ops.rms_norm.impls["native"].impl_fn)
    add_norm = torch.compile(ir.ops.fused_add_rms_norm.impls["native"].impl_fn)

    def forward(module, x, residual=None):
        if residual is None:
            return norm(x, module.weight, module.variance_epsilon)
        return add_norm(x, residual, module.weight, module.variance_epsilon)

    return forward


def _silu_forms() -> Callable:
    silu = torch.compile(SiluAndMul.forward_native)
    return lambda module, x: silu(x)


def _rotary_forms() -> Callable:
    rotary = torch.compile(RotaryEmbedding.forward_static)

    def forward(module, positions, query, key):
        cache = module._match_cos_sin_cache_dtype(query)
        return rotary(
            positions, query, key, module.head_size, module.rotary_dim, cache, module.is_neox_style
        )

    return forward
