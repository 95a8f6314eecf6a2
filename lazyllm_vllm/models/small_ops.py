"""vLLM's norms and SiLU, compiled where that is faster.

A staged model runs eagerly, and vLLM then takes its own kernels for these ops. What Inductor makes
of vLLM's PyTorch forms of them, as stock vLLM does with the whole model, is faster at the few rows
of a decode step, and for SiLU at very many. A compiled function costs more time to call (0.1 ms),
so that it stands where the call is recorded in a CUDA graph or its rows hide it.
"""

from collections.abc import Callable

import torch

from vllm import ir
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

# From this many rows on, the GPU takes longer than the call.
MANY_ROWS = 8192


class SmallOps:
    """The compiled forms of a model's small ops.

    Attributes:
        recorded: whether what runs is recorded in a CUDA graph, or readies one.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.recorded = False
        norm = torch.compile(ir.ops.rms_norm.impls["native"].impl_fn)
        add_norm = torch.compile(ir.ops.fused_add_rms_norm.impls["native"].impl_fn)
        silu = torch.compile(SiluAndMul.forward_native)

        def run_norm(module: RMSNorm, x, residual=None):
            if residual is None:
                return norm(x, module.weight, module.variance_epsilon)
            return add_norm(x, residual, module.weight, module.variance_epsilon)

        for module in model.modules():
            if type(module) is SiluAndMul:
                self._choose(module, lambda module, x: silu(x), MANY_ROWS)
            elif type(module) is RMSNorm and module.has_weight:
                if module.variance_size_override is None:
                    self._choose(module, run_norm, None)

    def _choose(self, module, compiled: Callable, many_rows: int | None) -> None:
        usual = module._forward_method  # what vLLM's CustomOp dispatched to

        def forward(x, *args):
            many = many_rows is not None and x.shape[0] >= many_rows
            return compiled(module, x, *args) if self.recorded or many else usual(x, *args)

        module._forward_method = forward
