"""Attention of decode rows over a stage's paged keys.

    out[row] = softmax_j(q[row] . k_j * scale  |  position_j <= position[row]) @ v

A request has one current row and, in stages after the first, rows revived in this step; they share
the reads of its keys. Keys arrive out of order of position, so each is masked by its own position;
``strict`` also masks prompt keys that this step did not select (paper, section 3.2).
"""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.jit import step_jit


@step_jit
def _attention_kernel(
    partial_ptr,  # [rows, heads, splits, head_dim] fp32
    partial_lse_ptr,  # [rows, heads, splits] fp32, to base 2
    q_ptr,  # [rows, heads, head_dim]
    q_stride_row,
    kv_ptr,  # [blocks, kv_heads, block_size, 2 * head_dim]
    kv_stride_block,
    kv_stride_head,
    kv_stride_slot,
    block_table_ptr,  # [batch, width]
    block_table_stride,
    position_table_ptr,  # block table of stage 0, for `selected`
    position_table_stride,
    key_len_ptr,  # [batch]
    num_revived_ptr,  # [batch]
    share_ptr,  # [1] rows reserved for each request's revived tokens
    row_position_ptr,  # [rows]
    slot_position_ptr,  # [physical slots]
    selected_ptr,  # [physical slots of stage 0]
    num_prompt_ptr,  # [batch]
    num_decodes,
    scale,
    stage,
    num_splits,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IDENTITY: tl.constexpr,  # slot j holds position j (stage 0)
    STRICT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = tl.program_id(0)
    num_kv_heads: tl.constexpr = NUM_HEADS // GROUP
    kv_head = tl.program_id(1) % num_kv_heads
    tile = tl.program_id(1) // num_kv_heads
    split = tl.program_id(2)

    key_len = tl.load(key_len_ptr + batch)
    num_rows = 1
    if not IDENTITY:
        num_rows += tl.load(num_revived_ptr + batch)
    if key_len == 0 or tile * BLOCK_M >= num_rows * GROUP:
        return

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    nth = m // GROUP  # 0: the current row, then the revived ones
    head = kv_head * GROUP + m % GROUP
    m_valid = nth < num_rows
    row = tl.where(nth == 0, batch, num_decodes + batch * tl.load(share_ptr) + nth - 1)
    row_position = tl.load(row_position_ptr + row, mask=m_valid, other=0)

    d = tl.arange(0, HEAD_PAD)
    d_valid = d < HEAD_DIM
    q = tl.load(
        q_ptr + row[:, None].to(tl.int64) * q_stride_row + head[:, None] * HEAD_DIM + d[None, :],
        mask=m_valid[:, None] & d_valid[None, :],
        other=0.0,
    )

    num_prompt = tl.load(num_prompt_ptr + batch)
    to_log2 = scale * 1.4426950408889634  # exp2 is what the hardware has
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    per_split = tl.cdiv(tl.cdiv(key_len, BLOCK_N), num_splits) * BLOCK_N
    start = split * per_split
    end = tl.minimum(start + per_split, key_len)
    for j0 in range(start, end, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        j_valid = j < end
        block = tl.load(
            block_table_ptr + batch * block_table_stride + j // BLOCK_SIZE, mask=j_valid, other=0
        ).to(tl.int64)
        if IDENTITY:
            position = j
        else:
            position = tl.load(
                slot_position_ptr + block * BLOCK_SIZE + j % BLOCK_SIZE, mask=j_valid, other=0
            )
        k_at = (
            kv_ptr
            + block * kv_stride_block
            + kv_head * kv_stride_head
            + (j % BLOCK_SIZE) * kv_stride_slot
        )
        kv_mask = j_valid[:, None] & d_valid[None, :]
        k = tl.load(k_at[:, None] + d[None, :], mask=kv_mask, other=0.0)
        attended = j_valid[None, :] & (position[None, :] <= row_position[:, None])
        if STRICT:
            in_prompt = j_valid & (position < num_prompt)
            home = tl.load(
                position_table_ptr + batch * position_table_stride + position // BLOCK_SIZE,
                mask=in_prompt,
                other=0,
            ).to(tl.int64)
            depth = tl.load(
                selected_ptr + home * BLOCK_SIZE + position % BLOCK_SIZE, mask=in_prompt, other=127
            )
            attended = attended & (depth >= stage)[None, :]
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * to_log2
        logits = tl.where(attended, logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        safe = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        p = tl.exp2(logits - safe[:, None])
        rescale = tl.exp2(highest - safe)
        total = total * rescale + tl.sum(p, 1)
        v = tl.load(k_at[:, None] + HEAD_DIM + d[None, :], mask=kv_mask, other=0.0)
        acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        highest = new_highest

    at = (row.to(tl.int64) * NUM_HEADS + head) * num_splits + split
    lse = tl.where(total > 0, highest + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(partial_lse_ptr + at, lse, mask=m_valid)
    tl.store(
        partial_ptr + at[:, None] * HEAD_DIM + d[None, :],
        acc / tl.where(total > 0, total, 1.0)[:, None],
        mask=m_valid[:, None] & d_valid[None, :],
    )


@step_jit
def _combine_kernel(
    out_ptr,  # [rows, heads, head_dim]
    out_stride_row,
    lse_ptr,  # [batch, heads] fp32, of the current rows
    partial_ptr,
    partial_lse_ptr,
    key_len_ptr,
    num_revived_ptr,
    share_ptr,
    num_decodes,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    IDENTITY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, HEAD_PAD)
    d_valid = d < HEAD_DIM
    out_at = out_ptr + row * out_stride_row + head * HEAD_DIM + d

    if row < num_decodes:
        valid = tl.load(key_len_ptr + row) > 0
    else:
        valid = False
        if not IDENTITY:
            share = tl.load(share_ptr)
            nth = row - num_decodes
            batch = nth // tl.maximum(share, 1)
            if (share > 0) & (batch < num_decodes):
                revived = tl.load(num_revived_ptr + batch)
                valid = (nth % tl.maximum(share, 1)) < revived
    if not valid:
        tl.store(out_at, tl.zeros([HEAD_PAD], out_ptr.dtype.element_ty), mask=d_valid)
        return

    split = tl.arange(0, SPLITS_PAD)
    s_valid = split < num_splits
    at = (row * NUM_HEADS + head) * num_splits + split
    lse = tl.load(partial_lse_ptr + at, mask=s_valid, other=float("-inf"))
    highest = tl.max(lse, 0)
    weight = tl.exp2(lse - highest)
    total = tl.sum(weight, 0)
    partial = tl.load(
        partial_ptr + at[:, None] * HEAD_DIM + d[None, :],
        mask=s_valid[:, None] & d_valid[None, :],
        other=0.0,
    )
    out = tl.sum(partial * weight[:, None], 0) / total
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=d_valid)
    if row < num_decodes:
        tl.store(lse_ptr + row * NUM_HEADS + head, (highest + tl.log2(total)) * 0.6931471805599453)


def paged_attention_triton(
    out, lse, q, kv_cache, block_table, position_table, key_len, num_revived, share,
    row_position, slot_position, selected, num_prompt, num_decodes, max_revived, scale, stage,
    strict,
):  # fmt: skip
    num_rows, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = kv_cache.shape
    group = num_heads // num_kv_heads
    assert q.stride(1) == head_dim and q.stride(2) == 1 and kv_cache.stride(3) == 1
    assert out.stride(1) == head_dim and out.stride(2) == 1 and lse.is_contiguous()
    head_pad = triton.next_power_of_2(head_dim)
    tile_rows = (1 + max_revived) * group
    block_m = min(64, max(16, triton.next_power_of_2(tile_rows)))
    tiles = triton.cdiv(tile_rows, block_m)
    # Programs for each of a large GPU's processors: two with few rows, which leave room for it.
    programs = 256 if block_m <= 32 else 128
    splits = max(2, min(64, programs // (num_decodes * num_kv_heads * tiles)))
    # Keys and values read together, in the shared memory of a processor several times over.
    block_n = max(16, min(128, 65536 // (2 * head_pad * q.element_size())))
    partial = torch.empty(
        num_rows, num_heads, splits, head_dim, dtype=torch.float32, device=q.device
    )
    partial_lse = torch.empty(num_rows, num_heads, splits, dtype=torch.float32, device=q.device)
    identity = stage == 0
    _attention_kernel[(num_decodes, num_kv_heads * tiles, splits)](
        partial, partial_lse, q, q.stride(0),
        kv_cache, kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
        block_table, block_table.stride(0), position_table, position_table.stride(0),
        key_len, num_revived, share, row_position, slot_position, selected, num_prompt,
        num_decodes, scale, stage, splits,
        NUM_HEADS=num_heads, GROUP=group, HEAD_DIM=head_dim, HEAD_PAD=head_pad,
        BLOCK_SIZE=block_size, IDENTITY=identity,
        STRICT=strict and not identity, BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _combine_kernel[(num_rows, num_heads)](
        out, out.stride(0), lse, partial, partial_lse, key_len, num_revived, share, num_decodes,
        splits, NUM_HEADS=num_heads, HEAD_DIM=head_dim, HEAD_PAD=head_pad,
        SPLITS_PAD=triton.next_power_of_2(splits), IDENTITY=identity, num_warps=1,
    )  # fmt: skip


def gather_keys(kv_cache, block_table_row, length):
    """Keys and values of slots 0 .. length - 1: two ``[length, kv_heads, head_dim]``."""
    block_size = kv_cache.shape[2]
    j = torch.arange(length, device=kv_cache.device)
    kv = kv_cache[block_table_row[j // block_size].long(), :, j % block_size]
    return kv.chunk(2, dim=-1)


def physical_slots(block_table_row, slots, block_size):
    """``block * block_size + offset`` of a request's slots; int64, as ``slots``."""
    return block_table_row[slots // block_size].long() * block_size + slots % block_size


def paged_attention_reference(
    out, lse, q, kv_cache, block_table, position_table, key_len, num_revived, share,
    row_position, slot_position, selected, num_prompt, num_decodes, max_revived, scale, stage,
    strict,
):  # fmt: skip
    block_size = kv_cache.shape[2]
    group = q.shape[1] // kv_cache.shape[1]
    out.zero_()
    for i in range(num_decodes):
        length = int(key_len[i])
        if length == 0:
            continue
        rows = [i]
        if stage > 0:
            first = num_decodes + i * int(share)
            rows += range(first, first + int(num_revived[i]))
        slots = torch.arange(length, device=q.device)
        if stage == 0:
            position = slots
        else:
            position = slot_position[physical_slots(block_table[i], slots, block_size)].long()
        attended = position[None, :] <= row_position[rows][:, None]
        if strict and stage > 0:
            in_prompt = position < num_prompt[i]
            home = physical_slots(position_table[i], position.where(in_prompt, 0), block_size)
            attended &= ~in_prompt | (selected[home] >= stage)
        k, v = gather_keys(kv_cache, block_table[i], length)
        grouped = q[rows].float().unflatten(1, (-1, group))
        logits = torch.einsum("rkgd,jkd->rkgj", grouped, k.float()) * scale
        logits.masked_fill_(~attended[:, None, None, :], float("-inf"))
        result = torch.einsum("rkgj,jkd->rkgd", logits.softmax(-1), v.float())
        out[rows] = result.flatten(1, 2).to(out.dtype)
        lse[i] = logits[0].logsumexp(-1).flatten()


def paged_attention(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    position_table: torch.Tensor,
    key_len: torch.Tensor,
    num_revived: torch.Tensor,
    share: torch.Tensor,
    row_position: torch.Tensor,
    slot_position: torch.Tensor,
    selected: torch.Tensor,
    num_prompt: torch.Tensor,
    num_decodes: int,
    max_revived: int,
    scale: float,
    stage: int,
    strict: bool,
) -> None:
    """Attention of the current rows ``0 .. num_decodes - 1`` and of the revived rows after them.

    Request i's revived rows start at ``num_decodes + i * share``; their keys are in the cache.
    Rows of no request come out as zeros.

    Args:
        out: ``[rows, heads, head_dim]``, written.
        lse: ``[batch, heads]`` fp32, written: log of the softmax's denominator, current rows.
        q: ``[rows, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, keys then values.
        block_table: ``[batch, width]`` int32, of the stage's group.
        position_table: the same of stage 0 (read when ``strict``).
        key_len: ``[batch]`` int32, keys of each request in the stage; 0: no request.
        num_revived: ``[batch]`` int32, at most ``max_revived``.
        share: ``[1]`` int32.
        row_position: ``[rows]`` int64.
        slot_position: ``[physical slots]`` int32, position of each key (unused in stage 0).
        selected: ``[physical slots]`` int8, depth of each prompt position's selection.
        num_prompt: ``[batch]`` int32.
    """
    run = paged_attention_triton if q.is_cuda else paged_attention_reference
    run(
        out, lse, q, kv_cache, block_table, position_table, key_len, num_revived, share,
        row_position, slot_position, selected, num_prompt, num_decodes, max_revived, scale, stage,
        strict,
    )  # fmt: skip
