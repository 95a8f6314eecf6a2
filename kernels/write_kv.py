"""Keys and values to the paged cache, as they are or, in an FP8 cache, divided by its scales."""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.paged import FP8, StageKeys

FP8_MAX = tl.constexpr(448.0)  # what is above has no FP8 number, and would be stored as NaN


@triton.jit
def to_stored(x, scale, dtype: tl.constexpr):
    """What a cache of ``dtype`` holds for x."""
    if dtype == tl.float8e4nv:
        x = tl.div_rn(x.to(tl.float32), scale)
        x = tl.minimum(tl.maximum(x, -FP8_MAX), FP8_MAX)
    return x.to(dtype)


def stored(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """The same in PyTorch."""
    if dtype == FP8:
        x = (x.float() / scale).clamp(-FP8_MAX.value, FP8_MAX.value)
    return x.to(dtype)


def write_kv(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, keys: StageKeys) -> None:
    """Store the rows' keys and values; a reference, and the CPU's path (vLLM has a kernel).

    Args:
        k, v: ``[rows, kv_heads, head_dim]``, of the model's dtype.
        slots: ``[rows or more]`` int64, physical slots, no two alike; -1: not stored.
        keys: whose ``kv_cache`` is written.
    """
    at = (slots[: len(k)] >= 0).nonzero()[:, 0]
    slot, dtype = slots[at], keys.kv_cache.dtype
    both = [stored(k[at], keys.k_scale, dtype), stored(v[at], keys.v_scale, dtype)]
    keys.kv_cache[slot // keys.block_size, :, slot % keys.block_size] = torch.cat(both, -1)
