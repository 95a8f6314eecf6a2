"""Attention of decode rows over a stage's paged keys.

    out[row] = softmax_j(q[row] . k_j * scale  |  position_j <= position[row]) @ v

A request has one current row and, in stages after the first, rows revived in this step; they share
the reads of its keys. Keys arrive out of order of position, so each is masked by its own position,
as a layer's window demands too; ``strict`` also masks prompt keys that this step did not select
(paper, section 3.2). A request's keys are shared among programs, and ``combine_splits`` puts
together what each found.
"""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.combine_splits import MOST_SPLITS, Partial, combine_splits
from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.layer_form import LOG2_E, LayerForm, attend, is_seen
from lazyllm_vllm.kernels.paged import StageKeys, load_positions
from lazyllm_vllm.kernels.prompt_pages import state_at
from lazyllm_vllm.kernels.selection import DecodeRows, Selection


@triton.jit
def _add_keys(
    highest,  # [M] of the logits so far, to base 2
    total,  # [M] of exp2(logits - highest)
    acc,  # [M, HEAD_PAD], values by these weights
    q,
    k_at,  # [N] addresses of the keys
    read,  # [N] which of them are wanted
    seen,  # [M, N]
    to_log2,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """A block of keys more in the running softmax."""
    d = tl.arange(0, HEAD_PAD)
    at = k_at[:, None] + d[None, :]
    mask = read[:, None] & (d < HEAD_DIM)[None, :]
    k = tl.load(at, mask=mask, other=0.0).to(q.dtype)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * to_log2
    logits = tl.where(seen, logits, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(logits, 1))
    safe = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    p = tl.exp2(logits - safe[:, None])
    rescale = tl.exp2(highest - safe)
    total = total * rescale + tl.sum(p, 1)
    v = tl.load(at + HEAD_DIM, mask=mask, other=0.0).to(q.dtype)
    acc = acc * rescale[:, None] + tl.dot(p.to(q.dtype), v, input_precision="ieee")
    return new_highest, total, acc


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
    first_row_ptr,  # [batch] the first of each request's revived tokens
    num_prompt_ptr,  # [batch]
    is_pruned_ptr,  # [batch]
    selected_ptr,  # a plane of the prompt state
    state_table_ptr,
    state_table_stride,
    page_stride,
    block_stride,
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
    WINDOW: tl.constexpr,  # 0: none
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
    row = tl.where(nth == 0, batch, tl.load(first_row_ptr + batch) + nth - 1)
    row_position = tl.load(row_position_ptr + row, mask=m_valid, other=0)

    d = tl.arange(0, HEAD_PAD)
    d_valid = d < HEAD_DIM
    q = tl.load(
        q_ptr + row[:, None].to(tl.int64) * q_stride_row + head[:, None] * HEAD_DIM + d[None, :],
        mask=m_valid[:, None] & d_valid[None, :],
        other=0.0,
    )

    # Of a prompt that is not pruned every token is seen.
    num_prompt = tl.load(num_prompt_ptr + batch) * tl.load(is_pruned_ptr + batch)
    keys_table = keys_table_ptr + batch * keys_table_stride
    state_table = state_table_ptr + batch * state_table_stride
    to_log2 = scale * LOG2_E
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    first = 0
    if IDENTITY and WINDOW > 0:
        first_seen = tl.maximum(tl.load(row_position_ptr + batch).to(tl.int32) - WINDOW + 1, 0)
        first = first_seen // BLOCK_N * BLOCK_N
    per_split = tl.cdiv(tl.cdiv(num_keys - first, BLOCK_N), num_splits) * BLOCK_N
    start = first + split * per_split
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
        seen = j_valid[None, :] & is_seen(position[None, :], row_position[:, None], WINDOW)
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
            seen = seen & (depth >= stage)[None, :]
        if WINDOW == 0 or IDENTITY:
            read = j_valid
            if WINDOW > 0:
                read = read & (j >= first_seen)
            highest, total, acc = _add_keys(
                highest, total, acc, q, k_at, read, seen, to_log2, HEAD_DIM, HEAD_PAD
            )
        else:  # most keys may be out of sight, and whole blocks of them
            read = tl.max((seen & m_valid[:, None]).to(tl.int32), 0) > 0
            if tl.max(read.to(tl.int32), 0) > 0:
                highest, total, acc = _add_keys(
                    highest, total, acc, q, k_at, read, seen, to_log2, HEAD_DIM, HEAD_PAD
                )

    at = (row.to(tl.int64) * NUM_HEADS + head) * num_splits + split
    lse = tl.where(total > 0, highest + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(partial_lse_ptr + at, lse, mask=m_valid)
    tl.store(
        partial_ptr + at[:, None] * HEAD_DIM + d[None, :],
        acc / tl.where(total > 0, total, 1.0)[:, None],
        mask=m_valid[:, None] & d_valid[None, :],
    )


def paged_attention_triton(out, lse, q, keys, decodes, form, s):
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, rows, n = keys.num_heads, decodes.rows, decodes.num_decodes
    group = num_heads // num_kv_heads
    assert q.stride(1) == head_dim and q.stride(2) == 1
    head_pad = triton.next_power_of_2(head_dim)
    tile_rows = (1 + decodes.max_revived) * group
    block_m = min(64, max(16, triton.next_power_of_2(tile_rows)))
    tiles = triton.cdiv(tile_rows, block_m)
    # Programs for each of a large GPU's processors: two with few rows, which leave room for it.
    programs = 256 if block_m <= 32 else 128
    splits = max(2, min(MOST_SPLITS.value, programs // (n * num_kv_heads * tiles)))
    # Keys and values read together, in the shared memory of a processor several times over.
    block_n = max(16, min(128, 65536 // (2 * head_pad * q.element_size())))
    if form.window is not None and keys.stage > 0:  # read if seen, and so through registers
        block_n = min(block_n, 64)
    partial = Partial.make(num_rows, num_heads, splits, head_dim, q.device)
    _attention_kernel[(n, num_kv_heads * tiles, splits)](
        partial.out,
        partial.lse,
        q,
        q.stride(0),
        *keys.kernel_args,
        rows.num_revived,
        rows.position,
        s.first_row,
        s.num_prompt,
        s.is_pruned,
        s.state.selected,
        *s.state.pages.kernel_args,
        form.scale * keys.k_scale,
        keys.stage,
        splits,
        NUM_HEADS=num_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad,
        STRICT=decodes.strict and keys.stage > 0,
        WINDOW=form.window or 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
        num_stages=3,
        **keys.kernel_constants,
        **s.state.pages.kernel_constants,
    )
    combine_splits(out, lse, partial, keys, decodes, form, s)


def paged_attention_reference(out, lse, q, keys, decodes, form, s):
    rows, n = decodes.rows, decodes.num_decodes
    out.zero_()
    for i in range(n):
        if keys.length[i] == 0:
            continue
        mine = [i]
        if keys.stage > 0:
            first = int(s.first_row[i])
            mine += range(first, first + int(rows.num_revived[i]))
        position = keys.positions(i)
        seen = form.sees(rows.position[mine], position)
        if decodes.strict and keys.stage > 0 and s.is_pruned[i]:
            in_prompt = position < s.num_prompt[i]
            at = s.state.at(i, position.where(in_prompt, 0))
            seen &= ~in_prompt | (s.state.selected[at] >= keys.stage)
        result, all_lse = attend(q[mine], *keys.gather(i), seen, form)
        out[mine], lse[i] = result.to(out.dtype), all_lse[0]


def paged_attention(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    keys: StageKeys,
    decodes: DecodeRows,
    form: LayerForm,
    s: Selection,
) -> None:
    """Attention of the current and the revived rows of a step's decodes, whose keys are in the
    cache. Rows of no request come out as zeros.

    Args:
        out: ``[rows, heads, head_dim]``, written.
        lse: ``[batch, heads]`` fp32, written: log of the softmax's denominator, sinks included, of
            the current rows.
        q: ``[rows, heads, head_dim]``.
        s: of which ``first_row`` is read and, when strict, this step's selection.
    """
    run = paged_attention_triton if q.is_cuda else paged_attention_reference
    run(out, lse, q, keys, decodes, form, s)
