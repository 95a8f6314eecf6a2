"""Attention of decode rows over a stage's paged keys.

    out[row] = softmax_j(q[row] . k_j * scale  |  position_j <= position[row]) @ v

A request has one current row and, in stages after the first, rows revived in this step; they share
the reads of its keys. Keys arrive out of order of position, so each is masked by its own position;
``strict`` also masks prompt keys that this step did not select (paper, section 3.2).
"""

from dataclasses import dataclass

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.paged import StageKeys, load_positions
from lazyllm_vllm.kernels.prompt_pages import state_at
from lazyllm_vllm.kernels.selection import Rows, Selection


@dataclass(frozen=True)
class DecodeRows:
    """Rows ``0 .. num_decodes - 1`` are the current ones; request i's revived rows start at
    ``num_decodes + i * quota``.

    Attributes:
        rows: of the stage.
        max_revived: most that a request may have, whatever the quota.
        strict: prompt tokens are attended to only if this step selected them for the stage.
    """

    rows: Rows
    num_decodes: int
    max_revived: int
    strict: bool


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
    keys_table_ptr,  # [batch, width]
    keys_table_stride,
    num_keys_ptr,  # [batch]
    slot_position_ptr,  # [physical slots]
    num_revived_ptr,  # [batch]
    row_position_ptr,  # [rows]
    quota_ptr,  # [1] rows set aside for each request's revived tokens
    num_prompt_ptr,  # [batch]
    selected_ptr,  # a plane of the prompt state
    state_table_ptr,
    state_table_stride,
    page_stride,
    block_stride,
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
    PAGES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    SLOT_SIZE: tl.constexpr,
    PER_SLOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = tl.program_id(0)
    num_kv_heads: tl.constexpr = NUM_HEADS // GROUP
    kv_head = tl.program_id(1) % num_kv_heads
    tile = tl.program_id(1) // num_kv_heads
    split = tl.program_id(2)

    num_keys = tl.load(num_keys_ptr + batch)
    num_rows = 1
    if not IDENTITY:
        num_rows += tl.load(num_revived_ptr + batch)
    if num_keys == 0 or tile * BLOCK_M >= num_rows * GROUP:
        return

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    nth = m // GROUP  # 0: the current row, then the revived ones
    head = kv_head * GROUP + m % GROUP
    m_valid = nth < num_rows
    row = tl.where(nth == 0, batch, num_decodes + batch * tl.load(quota_ptr) + nth - 1)
    row_position = tl.load(row_position_ptr + row, mask=m_valid, other=0)

    d = tl.arange(0, HEAD_PAD)
    d_valid = d < HEAD_DIM
    q = tl.load(
        q_ptr + row[:, None].to(tl.int64) * q_stride_row + head[:, None] * HEAD_DIM + d[None, :],
        mask=m_valid[:, None] & d_valid[None, :],
        other=0.0,
    )

    num_prompt = tl.load(num_prompt_ptr + batch)
    keys_table = keys_table_ptr + batch * keys_table_stride
    state_table = state_table_ptr + batch * state_table_stride
    to_log2 = scale * 1.4426950408889634  # exp2 is what the hardware has
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    per_split = tl.cdiv(tl.cdiv(num_keys, BLOCK_N), num_splits) * BLOCK_N
    start = split * per_split
    end = tl.minimum(start + per_split, num_keys)
    for j0 in range(start, end, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        j_valid = j < end
        block, position = load_positions(
            keys_table, slot_position_ptr, j, j_valid, BLOCK_SIZE, IDENTITY
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
            at = state_at(
                state_table,
                position,
                in_prompt,
                page_stride,
                block_stride,
                PAGES,
                PER_PAGE,
                SLOT_SIZE,
                PER_SLOT,
            )
            depth = tl.load(selected_ptr + at, mask=in_prompt, other=127)
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
    num_keys_ptr,
    num_revived_ptr,
    quota_ptr,
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
        valid = tl.load(num_keys_ptr + row) > 0
    else:
        valid = False
        if not IDENTITY:
            quota = tl.load(quota_ptr)
            nth = row - num_decodes
            batch = nth // tl.maximum(quota, 1)
            if (quota > 0) & (batch < num_decodes):
                revived = tl.load(num_revived_ptr + batch)
                valid = (nth % tl.maximum(quota, 1)) < revived
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


def paged_attention_triton(out, lse, q, keys, decodes, scale, s):
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, rows, n = keys.num_heads, decodes.rows, decodes.num_decodes
    group = num_heads // num_kv_heads
    assert q.stride(1) == head_dim and q.stride(2) == 1
    assert out.stride(1) == head_dim and out.stride(2) == 1 and lse.is_contiguous()
    head_pad = triton.next_power_of_2(head_dim)
    tile_rows = (1 + decodes.max_revived) * group
    block_m = min(64, max(16, triton.next_power_of_2(tile_rows)))
    tiles = triton.cdiv(tile_rows, block_m)
    # Programs for each of a large GPU's processors: two with few rows, which leave room for it.
    programs = 256 if block_m <= 32 else 128
    splits = max(2, min(64, programs // (n * num_kv_heads * tiles)))
    # Keys and values read together, in the shared memory of a processor several times over.
    block_n = max(16, min(128, 65536 // (2 * head_pad * q.element_size())))
    partial = torch.empty(
        num_rows, num_heads, splits, head_dim, dtype=torch.float32, device=q.device
    )
    partial_lse = torch.empty(num_rows, num_heads, splits, dtype=torch.float32, device=q.device)
    heads = {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "HEAD_PAD": head_pad}
    _attention_kernel[(n, num_kv_heads * tiles, splits)](
        partial,
        partial_lse,
        q,
        q.stride(0),
        *keys.kernel_args,
        rows.num_revived,
        rows.position,
        s.quota,
        s.num_prompt,
        s.state.selected,
        *s.state.pages.kernel_args,
        n,
        scale,
        keys.stage,
        splits,
        GROUP=group,
        STRICT=decodes.strict and keys.stage > 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
        num_stages=3,
        **heads,
        **keys.kernel_constants,
        **s.state.pages.kernel_constants,
    )
    _combine_kernel[(num_rows, num_heads)](
        out,
        out.stride(0),
        lse,
        partial,
        partial_lse,
        keys.length,
        rows.num_revived,
        s.quota,
        n,
        splits,
        SPLITS_PAD=triton.next_power_of_2(splits),
        IDENTITY=keys.stage == 0,
        num_warps=1,
        **heads,
    )


def paged_attention_reference(out, lse, q, keys, decodes, scale, s):
    group = q.shape[1] // keys.num_heads
    rows, n = decodes.rows, decodes.num_decodes
    out.zero_()
    for i in range(n):
        if keys.length[i] == 0:
            continue
        mine = [i]
        if keys.stage > 0:
            first = n + i * int(s.quota)
            mine += range(first, first + int(rows.num_revived[i]))
        position = keys.positions(i)
        attended = position[None, :] <= rows.position[mine][:, None]
        if decodes.strict and keys.stage > 0:
            in_prompt = position < s.num_prompt[i]
            at = s.state.at(i, position.where(in_prompt, 0))
            attended &= ~in_prompt | (s.state.selected[at] >= keys.stage)
        k, v = keys.gather(i)
        grouped = q[mine].float().unflatten(1, (-1, group))
        logits = torch.einsum("rkgd,jkd->rkgj", grouped, k.float()) * scale
        logits.masked_fill_(~attended[:, None, None, :], float("-inf"))
        result = torch.einsum("rkgj,jkd->rkgd", logits.softmax(-1), v.float())
        out[mine] = result.flatten(1, 2).to(out.dtype)
        lse[i] = logits[0].logsumexp(-1).flatten()


def paged_attention(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    keys: StageKeys,
    decodes: DecodeRows,
    scale: float,
    s: Selection,
) -> None:
    """Attention of the current and the revived rows of a step's decodes, whose keys are in the
    cache. Rows of no request come out as zeros.

    Args:
        out: ``[rows, heads, head_dim]``, written.
        lse: ``[batch, heads]`` fp32, written: log of the softmax's denominator, current rows.
        q: ``[rows, heads, head_dim]``.
        s: of which ``quota`` is read and, when strict, this step's selection.
    """
    run = paged_attention_triton if q.is_cuda else paged_attention_reference
    run(out, lse, q, keys, decodes, scale, s)
