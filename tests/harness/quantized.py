"""A tiny Llama whose linear layers are quantized, rounded to nearest, as checkpoints store them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from harness import families

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight weights lies in which four bits
CONFIGS = {
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "version": "gemm",
        "zero_point": True,
    },
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
    },
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel",
                    "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
    },
}


def save_quantized(method: str, folder: Path) -> Path:
    """Write a checkpoint in one of ``CONFIGS``."""
    families.save_tiny("llama", folder)
    weights = load_file(folder / "model.safetensors")
    quantized = {}
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        if "_proj" in layer and kind == "weight":
            parts = _PACK[method](weight)
            quantized |= {f"{layer}.{part}": value for part, value in parts.items()}
        else:
            quantized[name] = weight
    save_file({name: value.contiguous() for name, value in quantized.items()}, _file(folder))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = CONFIGS[method]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _file(folder: Path) -> Path:
    return folder / "model.safetensors"


def _channels(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Eight bits, a scale for each output; of 255 numbers 15 are used, so that rounding shows."""
    scale = weight.abs().amax(1, keepdim=True) / 7
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def _groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Four bits around 8, ``[in, out]``, and a scale for each group of inputs."""
    grouped = weight.T.unflatten(0, (-1, GROUP))
    scale = grouped.abs().amax(1) / 7
    return ((grouped / scale[:, None]).round() + 8).clamp(0, 15).int().flatten(0, 1), scale


def _packed(numbers: torch.Tensor, dim: int, order=tuple(range(8))) -> torch.Tensor:
    """Eight numbers of four bits to each int32, along a dimension."""
    eights = numbers.long().unflatten(dim, (-1, 8))
    shifts = torch.tensor([4 * order.index(i) for i in range(8)])
    shape = [1] * eights.dim()
    shape[dim + 1] = 8
    words = (eights << shifts.view(shape)).sum(dim + 1)
    return (words & 0xFFFFFFFF).where(words < 2**31, words - 2**32).int()


def _awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    numbers, scale = _groups(weight)
    zeros = torch.full(scale.shape, 8)
    return {
        "qweight": _packed(numbers, 1, AWQ_ORDER),
        "qzeros": _packed(zeros, 1, AWQ_ORDER),
        "scales": scale,
    }


def _gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    numbers, scale = _groups(weight)
    zeros = torch.full(scale.shape, 7)  # one less is stored
    return {
        "qweight": _packed(numbers, 0),
        "qzeros": _packed(zeros, 1),
        "scales": scale,
        "g_idx": torch.arange(len(numbers), dtype=torch.int32) // GROUP,
    }


_PACK = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _channels}
