"""Keys and values of prefills out of the paged cache, one request's after the other's.

FlashAttention reads them so at a higher rate than through a block table of small blocks, which pays
for the copy where many rows attend to them.
"""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.paged import StageKeys, load_positions


@step_jit
def _gather_keys_kernel(
    k_ptr,  # [keys, HEADS, HEAD_DIM]
    v_ptr,
    positions_ptr,  # [keys]
    starts_ptr,  # [requests + 1]
    kv_ptr,  # [blocks, kv_heads, block_size, 2 * HEAD_DIM]
    kv_stride_block,
    kv_stride_head,
    kv_stride_slot,
    block_table_ptr,
    block_table_stride,
    slot_position_ptr,
    k_scale,
    v_scale,
    first_request,
    first_head,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IDENTITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(1)
    head = tl.program_id(2)
    start = tl.load(starts_ptr + request)
    num_keys = tl.load(starts_ptr + request + 1) - start
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK >= num_keys:
        return
    valid = j < num_keys
    table = block_table_ptr + (first_request + request) * block_table_stride
    block, position = load_positions(table, slot_position_ptr, j, valid, BLOCK_SIZE, IDENTITY)
    if head == 0:
        tl.store(positions_ptr + start + j, position.to(tl.int64), mask=valid)
    d = tl.arange(0, HEAD_PAD)
    mask = valid[:, None] & (d < HEAD_DIM)[None, :]
    slot = block * kv_stride_block + (j % BLOCK_SIZE) * kv_stride_slot
    at = kv_ptr + slot[:, None] + (first_head + head) * kv_stride_head + d[None, :]
    k = tl.load(at, mask=mask, other=0.0)
    v = tl.load(at + HEAD_DIM, mask=mask, other=0.0)
    if kv_ptr.dtype.element_ty == tl.float8e4nv:
        k, v = k.to(tl.float32) * k_scale, v.to(tl.float32) * v_scale
    row = (start + j).to(tl.int64) * HEADS + head
    to = row[:, None] * HEAD_DIM + d[None, :]
    tl.store(k_ptr + to, k.to(k_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + to, v.to(v_ptr.dtype.element_ty), mask=mask)


def gather_keys_triton(keys, batch, starts, longest, heads, k, v, positions):
    block = 32
    _gather_keys_kernel[(triton.cdiv(longest, block), len(batch), len(heads))](
        k,
        v,
        positions,
        starts,
        *keys.kernel_args[:6],
        keys.position,
        keys.k_scale,
        keys.v_scale,
        batch.start,
        heads.start,
        HEADS=len(heads),
        HEAD_DIM=k.shape[2],
        HEAD_PAD=triton.next_power_of_2(k.shape[2]),
        **keys.kernel_constants,
        BLOCK=block,
    )


def gather_keys_reference(keys, batch, starts, longest, heads, k, v, positions):
    mine = slice(heads.start, heads.stop)
    for request, start, end in zip(batch, starts.tolist(), starts[1:].tolist()):
        own = slice(start, end)
        k[own], v[own] = (x[: end - start, mine].to(k.dtype) for x in keys.gather(request))
        positions[own] = keys.positions(request)[: end - start]


def gather_keys(
    keys: StageKeys,
    batch: range,
    starts: torch.Tensor,
    num_keys: int,
    longest: int,
    dtype: torch.dtype,
    heads: range | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first keys of each request of ``batch``, from slot 0 on.

    Args:
        starts: ``[requests + 1]`` int32, where each request's begin in what is returned.
        num_keys, longest: of them all together, and of the one with most.
        dtype: of what is returned; numbers of an FP8 cache are multiplied by their scales.
        heads: KV heads; None: all.

    Returns:
        Keys and values ``[num_keys, heads, head_dim]``; positions ``[num_keys]`` int64.
    """
    heads = range(keys.num_heads) if heads is None else heads
    device = keys.kv_cache.device
    k = torch.empty(num_keys, len(heads), keys.kv_cache.shape[3] // 2, dtype=dtype, device=device)
    v, positions = torch.empty_like(k), torch.empty(num_keys, dtype=torch.int64, device=device)
    if num_keys:
        run = gather_keys_triton if k.is_cuda else gather_keys_reference
        run(keys, batch, starts, longest, heads, k, v, positions)
    return k, v, positions
