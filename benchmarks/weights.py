"""Weights for a model that has none, whose attention tells tokens apart."""

import math

import torch

from vllm.model_executor.layers.layernorm import GemmaRMSNorm

# Queries, keys and what experts are chosen by are so many times as large as what they are made of.
_SHARPER, _ROUTER = 1.5, 2.0
# Of attention's sinks, mean and spread: some heads leave much of their attention to them.
_SINKS = 4.0, 2.0
_BIAS = 0.02
# The largest FP8 number stands for so many standard deviations.
_FP8_REACH = 6.0


def randomize(model: torch.nn.Module) -> None:
    """Fill a vLLM model, loaded, with weights of a real model's spread. vLLM's dummy weights are
    so small that every score ties and nothing is ever revived.

    Weights may be FP8, with one scale a tensor or an expert, as vLLM makes them of others, or with
    one a block of them, as some are published. Needs memory for one layer's FP8 weight in bf16.
    """
    torch.manual_seed(0)
    sharper = _SHARPER / _yarn_scale(model)
    head = getattr(getattr(model, "lm_head", None), "weight", None)
    for name, weight in model.named_parameters():
        path, _, own = name.rpartition(".")
        module, values = model.get_submodule(path), weight.data
        if "scale" in own:  # set beside its weight
            continue
        if own == "sinks":
            values.normal_(*_SINKS)
        elif own.endswith("bias"):
            values.normal_(0, _BIAS)
        elif "norm" in path:
            size = sharper if path.endswith(("q_norm", "k_norm")) else 1.0
            values.fill_(size - isinstance(module, GemmaRMSNorm))
        elif "embed" in name and weight is not head:
            values.normal_(0, 1.0)
        elif weight.dim() > 1:
            spread = _fan_in(module, values) ** -0.5
            if "qkv" in name:
                spread *= sharper
            elif path.endswith((".gate", ".router")):
                spread *= _ROUTER
            if values.dtype.itemsize == 1:
                scale = getattr(module, f"{own}_scale_inv", None)  # of blocks
                scale = getattr(module, f"{own}_scale") if scale is None else scale
                _fill_fp8(values, scale.data, spread)
            else:
                values.normal_(0, spread)


def _yarn_scale(model: torch.nn.Module) -> float:
    """What YaRN multiplies queries and keys by."""
    rope = getattr(getattr(model, "config", None), "rope_parameters", None) or {}
    return 0.1 * math.log(rope["factor"]) + 1 if rope.get("rope_type") == "yarn" else 1.0


def _fan_in(module: torch.nn.Module, weight: torch.Tensor) -> int:
    """Inputs that each output adds up. FP8 weights of linear layers are transposed; experts' are
    ``[experts, outputs, inputs]``."""
    return getattr(module, "input_size_per_partition", None) or weight.shape[-1]


def _fill_fp8(weight: torch.Tensor, scale: torch.Tensor, spread: float) -> None:
    most = torch.finfo(weight.dtype).max
    values = torch.empty_like(weight, dtype=torch.bfloat16)
    weight.copy_(values.normal_(0, most / _FP8_REACH).clamp_(-most, most))
    scale.fill_(spread * _FP8_REACH / most)
