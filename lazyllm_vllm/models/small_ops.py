"""vLLM's norms and activations, compiled where that is faster.

A staged model runs eagerly, and vLLM then takes its own kernels for these ops. What Inductor makes
of vLLM's PyTorch forms of them, as stock vLLM does with the whole model, is faster at the few rows
of a decode step, and for activations at very many. A compiled function costs more time to call
(0.1 ms), so that it stands where the call is recorded in a CUDA graph or its rows hide it. Modules
of other classes than these run as vLLM has them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from vllm import ir
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

# From this many rows on, the GPU takes longer than the call.
MANY_ROWS = 8192


class SmallOps:
    """The compiled forms of a model's small ops.

    Attributes:
        recorded: whether what runs is recorded in a CUDA graph, or readies one.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.recorded = False
        forms = _compiled_forms()
        for parent in list(model.modules()):
            for name, module in parent.named_children():
                form = forms.get(type(module))
                if form is not None and form.fits(module):
                    # vLLM shares activations among layers and models: ours is another module.
                    setattr(parent, name, self._either(copy.copy(module), form))

    def _either(self, module: CustomOp, form: "_Form") -> CustomOp:
        """``module``, which takes its compiled form where that is faster."""
        usual, run = module._forward_method, form.compiled(module)

        def forward(x, *args):
            many = form.for_many_rows and x.shape[0] >= MANY_ROWS
            return run(x, *args) if self.recorded or many else usual(x, *args)

        module._forward_method = forward
        return module


@dataclass(frozen=True)
class _Form:
    """Attributes:
    compiled: makes what runs for a module.
    fits: whether that does what the module does.
    for_many_rows: whether it is faster at very many rows too.
    """

    compiled: Callable[[CustomOp], Callable]
    fits: Callable[[CustomOp], bool] = lambda module: True
    for_many_rows: bool = False


def _compiled_forms() -> dict[type, _Form]:
    """By the exact class, since another may do something else. Compiled once, for all modules."""
    rms_norm = ir.ops.rms_norm.impls["native"].impl_fn
    add_rms_norm = ir.ops.fused_add_rms_norm.impls["native"].impl_fn

    def norms(to_weight: Callable) -> Callable[[CustomOp], Callable]:
        @torch.compile
        def norm(x, weight, epsilon):
            return rms_norm(x, to_weight(weight), epsilon)

        @torch.compile
        def add_norm(x, residual, weight, epsilon):
            return add_rms_norm(x, residual, to_weight(weight), epsilon)

        def of(module):
            def run(x, residual=None):
                weight, epsilon = module.weight, module.variance_epsilon
                if residual is None:
                    return norm(x, weight, epsilon)
                return add_norm(x, residual, weight, epsilon)

            return run

        return of

    silu = torch.compile(SiluAndMul.forward_native)
    gelu = torch.compile(_gelu_and_mul)
    return {
        RMSNorm: _Form(
            norms(lambda weight: weight),
            lambda module: module.has_weight and module.variance_size_override is None,
        ),
        GemmaRMSNorm: _Form(norms(lambda weight: weight.float() + 1.0)),
        SiluAndMul: _Form(lambda module: silu, for_many_rows=True),
        GeluAndMul: _Form(lambda module: partial(gelu, module.approximate), for_many_rows=True),
    }


def _gelu_and_mul(approximate: str, x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate=approximate) * up
