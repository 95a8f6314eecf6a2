"""Rotary position embedding of a layer's queries and keys, and the keys and values to the cache,
in one pass over the rows.

    first half  <- first * cos - second * sin
    second half <- second * cos + first * sin        (NeoX style; angles by position)

The halves are of the first ``rotary_dim`` dimensions of a head; others, if any, stay as they are.
"""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.paged import StageKeys
from lazyllm_vllm.kernels.write_kv import to_stored, write_kv


@triton.jit
def _halves(
    row_ptr,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    """Addresses of the first half of each head of a row, and which of them there are."""
    head = tl.arange(0, HEADS_PAD)[:, None]
    i = tl.arange(0, HALF_PAD)[None, :]
    return row_ptr + head * HEAD_DIM + i, (head < HEADS) & (i < HALF)


@triton.jit
def _rotate(first, second, cos, sin):
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


# Numbers that change from step to step there are none; these two may begin anywhere in a buffer.
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _rotate_and_write_kernel(
    q_ptr,
    q_stride_row,
    k_ptr,
    k_stride_row,
    v_ptr,
    v_stride_row,
    cos_sin_ptr,  # [positions, 2 * HALF]
    positions_ptr,
    slots_ptr,
    kv_ptr,
    kv_stride_block,
    kv_stride_head,
    kv_stride_slot,
    k_scale,
    v_scale,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KV_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    HALF: tl.constexpr,  # of the dimensions that are rotated
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + row)
    slot = tl.load(slots_ptr + row)

    # All that the row reads is asked for before anything is stored: stores would hold loads back.
    q_row, k_row = q_ptr + row * q_stride_row, k_ptr + row * k_stride_row
    q_at, q_valid = _halves(q_row, HEADS, HEADS_PAD, HEAD_DIM, HALF, HALF_PAD)
    k_at, k_valid = _halves(k_row, KV_HEADS, KV_PAD, HEAD_DIM, HALF, HALF_PAD)
    v_head = tl.arange(0, KV_PAD)[:, None]
    v_i = tl.arange(0, HEAD_PAD)[None, :]
    v_valid = (v_head < KV_HEADS) & (v_i < HEAD_DIM)
    rest_valid = v_valid & (v_i >= 2 * HALF)
    q_first = tl.load(q_at, mask=q_valid)
    q_second = tl.load(q_at + HALF, mask=q_valid)
    k_first = tl.load(k_at, mask=k_valid)
    k_second = tl.load(k_at + HALF, mask=k_valid)
    v = tl.load(v_ptr + row * v_stride_row + v_head * HEAD_DIM + v_i, mask=v_valid)
    if HEAD_DIM > 2 * HALF:
        k_rest = tl.load(k_row + v_head * HEAD_DIM + v_i, mask=rest_valid)
    i = tl.arange(0, HALF_PAD)
    angle_ptr = cos_sin_ptr + position * (2 * HALF) + i
    cos = tl.load(angle_ptr, mask=i < HALF)
    sin = tl.load(angle_ptr + HALF, mask=i < HALF)
    cos, sin = cos.to(tl.float32)[None, :], sin.to(tl.float32)[None, :]

    q_first, q_second = _rotate(q_first, q_second, cos, sin)
    tl.store(q_at, q_first, mask=q_valid)
    tl.store(q_at + HALF, q_second, mask=q_valid)
    k_first, k_second = _rotate(k_first, k_second, cos, sin)
    tl.store(k_at, k_first, mask=k_valid)
    tl.store(k_at + HALF, k_second, mask=k_valid)
    if slot < 0:
        return
    kv_at = kv_ptr + slot // BLOCK_SIZE * kv_stride_block + slot % BLOCK_SIZE * kv_stride_slot
    kv_at += v_head.to(tl.int64) * kv_stride_head
    dtype = kv_ptr.dtype.element_ty
    tl.store(kv_at + i[None, :], to_stored(k_first, k_scale, dtype), mask=k_valid)
    tl.store(kv_at + HALF + i[None, :], to_stored(k_second, k_scale, dtype), mask=k_valid)
    if HEAD_DIM > 2 * HALF:
        tl.store(kv_at + v_i, to_stored(k_rest, k_scale, dtype), mask=rest_valid)
    tl.store(kv_at + HEAD_DIM + v_i, to_stored(v, v_scale, dtype), mask=v_valid)


def rotate_and_write_triton(q, k, v, cos_sin, positions, slots, keys):
    num_rows, heads, head_dim = q.shape
    kv_heads, half = k.shape[1], cos_sin.shape[1] // 2
    kv_cache = keys.kv_cache
    assert all(x.stride(1) == head_dim and x.stride(2) == 1 for x in (q, k, v))
    assert kv_cache.stride(3) == 1 and cos_sin.is_contiguous() and 2 * half <= head_dim
    heads_pad, kv_pad, half_pad = (triton.next_power_of_2(n) for n in (heads, kv_heads, half))
    # Two full vectors of each half of q a thread; but no more threads than elements of k, since
    # an element that two threads hold may be read by one when the other has rotated it.
    num_warps = min(heads_pad * half_pad // 512, kv_pad * half_pad // 32, 8)
    _rotate_and_write_kernel[(num_rows,)](
        q,
        q.stride(0),
        k,
        k.stride(0),
        v,
        v.stride(0),
        cos_sin,
        positions,
        slots,
        kv_cache,
        *kv_cache.stride()[:3],
        keys.k_scale,
        keys.v_scale,
        HEADS=heads,
        HEADS_PAD=heads_pad,
        KV_HEADS=kv_heads,
        KV_PAD=kv_pad,
        HEAD_DIM=head_dim,
        HEAD_PAD=triton.next_power_of_2(head_dim),
        HALF=half,
        HALF_PAD=half_pad,
        BLOCK_SIZE=keys.block_size,
        num_warps=max(1, num_warps),
    )


def rotate_and_write_reference(q, k, v, cos_sin, positions, slots, keys):
    cos, sin = cos_sin[positions[: len(q)]].float()[:, None].chunk(2, -1)
    for x in (q, k):
        rotated = x[..., : cos_sin.shape[1]]
        first, second = rotated.float().chunk(2, -1)
        rotated.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], -1))
    write_kv(k, v, slots, keys)


def rotate_and_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: StageKeys,
) -> None:
    """Rotate ``q`` and ``k`` in place, in fp32 and rounded once, and store the rotated keys, and
    the values, in the cache.

    Args:
        q: ``[rows, heads, head_dim]``; as k and v, rows may lie apart, heads lie side by side.
        k, v: ``[rows, kv_heads, head_dim]``.
        cos_sin: ``[positions, rotary_dim]``, cosines in the first half, sines in the second.
        positions: ``[rows or more]`` int64.
        slots: ``[rows or more]`` int64, physical slots, no two alike; -1: not stored.
        keys: whose ``kv_cache`` is written.
    """
    run = rotate_and_write_triton if q.is_cuda else rotate_and_write_reference
    run(q, k, v, cos_sin, positions, slots, keys)
