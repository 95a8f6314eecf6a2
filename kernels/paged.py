"""The keys and values of a stage in vLLM's paged KV cache.

physical slot of slot j = block_table[j // block_size] * block_size + j % block_size
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from vllm.triton_utils import tl, triton
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class StageKeys:
    """What one layer of a stage has of every request in the batch.

    Attributes:
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, keys then values; of the
            model's dtype or FP8 (e4m3).
        block_table: ``[batch, width]`` int32, of the layer's KV cache group.
        length: ``[batch]`` int32, keys of each request; 0: no request.
        position: ``[physical slots]`` int32, position of the key in each slot; not read in stage
            0, where slot j holds position j.
        k_scale, v_scale: what the numbers in an FP8 cache are to be multiplied by; else 1.
    """

    kv_cache: torch.Tensor
    block_table: torch.Tensor
    length: torch.Tensor
    position: torch.Tensor
    stage: int
    k_scale: float = 1.0
    v_scale: float = 1.0

    @property
    def num_heads(self) -> int:
        return self.kv_cache.shape[1]

    @property
    def block_size(self) -> int:
        return self.kv_cache.shape[2]

    @cached_property
    def kernel_args(self) -> tuple:
        """``kv, kv_stride_block, kv_stride_head, kv_stride_slot, block_table, block_table_stride,
        length, slot_position``, as kernels take them."""
        assert self.kv_cache.stride(3) == 1
        strides = (self.kv_cache.stride(i) for i in range(3))
        table = self.block_table
        return self.kv_cache, *strides, table, table.stride(0), self.length, self.position

    @cached_property
    def for_flash(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as FlashAttention takes them, ``[blocks, block_size, kv_heads,
        head_dim]`` each."""
        k, v = self.kv_cache.transpose(1, 2).chunk(2, dim=-1)
        return canonicalize_singleton_dim_strides(k), canonicalize_singleton_dim_strides(v)

    @cached_property
    def kernel_constants(self) -> dict:
        return {"BLOCK_SIZE": self.block_size, "IDENTITY": self.stage == 0}

    def gather(self, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A request's keys and values, two ``[length, kv_heads, head_dim]``; those of an FP8 cache
        in fp32, multiplied by their scales."""
        slots = torch.arange(int(self.length[request]), device=self.kv_cache.device)
        block = self.block_table[request][slots // self.block_size].long()
        k, v = self.kv_cache[block, :, slots % self.block_size].chunk(2, dim=-1)
        if self.kv_cache.dtype == FP8:
            k, v = k.float() * self.k_scale, v.float() * self.v_scale
        return k, v

    def positions(self, request: int) -> torch.Tensor:
        """``[length]`` int64: the position of each of a request's keys."""
        slots = torch.arange(int(self.length[request]), device=self.kv_cache.device)
        if self.stage == 0:
            return slots
        return self.position[
            physical_slots(self.block_table[request], slots, self.block_size)
        ].long()


def physical_slots(block_table_row, slots, block_size) -> torch.Tensor:
    """Physical slots of a request's slots; int64, shaped as ``slots``."""
    return block_table_row[slots // block_size].long() * block_size + slots % block_size


@triton.jit
def load_positions(
    block_table_row, slot_position_ptr, j, mask, BLOCK_SIZE: tl.constexpr, IDENTITY: tl.constexpr
):
    """Block (int64) and position of the keys in a request's slots j."""
    block = tl.load(block_table_row + j // BLOCK_SIZE, mask=mask, other=0).to(tl.int64)
    if IDENTITY:
        position = j
    else:
        at = slot_position_ptr + block * BLOCK_SIZE + j % BLOCK_SIZE
        position = tl.load(at, mask=mask, other=0)
    return block, position
