"""Attention of prefill rows with a sliding window, which counts positions: of a prompt whose rows
are the tokens that were kept, a row sees fewer than the window has positions.

    out[row] = softmax_j(q[row] . k_j * scale  |  position[row] - window < position_j
                                                  <= position[row]) @ v

with j of the row's own prompt. Rows rise in position, so that what a block of them sees is one run
of rows, from one found by counting.
"""

from dataclasses import dataclass

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.layer_form import LOG2_E, LayerForm, attend, is_seen

NEVER = tl.constexpr(2**31 - 1)  # a position after all others


@dataclass(frozen=True)
class KeptRows:
    """The rows of several prompts, one after the other.

    Attributes:
        positions: ``[rows or more]`` int64, rising within a prompt.
        starts: ``[prefills + 1]`` int32, first row of each prompt.
        longest: most rows of a prompt.
    """

    positions: torch.Tensor
    starts: torch.Tensor
    longest: int


@triton.jit
def _rows_up_to(positions, first, end, limit, BLOCK: tl.constexpr):
    """How many of the rows first .. end - 1 are at positions up to the limit."""
    count = 0
    # Summed block by block: of what starts at a loop's result summed, Triton 3.6 does not know that
    # addresses are aligned, and copies it neither in vectors nor ahead.
    for i0 in range(first, end, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        position = tl.load(positions + i, mask=i < end, other=NEVER)
        count += tl.sum((position <= limit).to(tl.int32), 0)
    return count


@triton.jit
def _add_keys(
    highest,  # [M] of the logits so far, to base 2
    total,  # [M] of exp2(logits - highest)
    acc,  # [M, HEAD_PAD], values by these weights
    q,
    row_position,
    k_ptr,
    k_stride_row,
    v_ptr,
    v_stride_row,
    positions,
    start,  # of the keys, with ``end``
    end,
    num_rows,
    to_log2,
    MASKED: tl.constexpr,  # else every row sees every key
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The keys of a run of the prompt's rows more in the running softmax."""
    d = tl.arange(0, HEAD_PAD)
    for j0 in range(start, end, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        at = j.to(tl.int64)[:, None]
        mask = (d < HEAD_DIM)[None, :]
        if MASKED:
            mask = mask & (j < num_rows)[:, None]
        k = tl.load(k_ptr + at * k_stride_row + d[None, :], mask=mask, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * to_log2
        if MASKED:
            position = tl.load(positions + j, mask=j < num_rows, other=NEVER).to(tl.int32)
            seen = is_seen(position[None, :], row_position[:, None], WINDOW)
            logits = tl.where(seen, logits, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        p = tl.exp2(logits - new_highest[:, None])
        rescale = tl.exp2(highest - new_highest)
        total = total * rescale + tl.sum(p, 1)
        v = tl.load(v_ptr + at * v_stride_row + d[None, :], mask=mask, other=0.0)
        acc = acc * rescale[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        highest = new_highest
    return highest, total, acc


# Numbers that change from step to step there are none; these two may begin anywhere in a buffer.
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "starts_ptr"])
def _window_attention_kernel(
    out_ptr,  # [rows, heads, head_dim]
    out_stride_row,
    q_ptr,
    q_stride_row,
    k_ptr,  # [rows, kv_heads, head_dim]
    k_stride_row,
    v_ptr,
    v_stride_row,
    positions_ptr,  # [rows]
    starts_ptr,  # [prefills + 1]
    sinks_ptr,  # [heads]
    scale,
    GROUP: tl.constexpr,  # query heads per KV head
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,  # positions that are counted together
):
    head = tl.program_id(0)
    first_row = tl.load(starts_ptr + tl.program_id(1)).to(tl.int64)
    num_rows = tl.load(starts_ptr + tl.program_id(1) + 1) - first_row.to(tl.int32)
    # The last rows first: the first ones, which see little, fill the gaps at the end.
    m0 = (tl.num_programs(2) - 1 - tl.program_id(2)) * BLOCK_M
    if m0 >= num_rows:
        return
    m = m0 + tl.arange(0, BLOCK_M)
    m_valid = m < num_rows
    last = tl.minimum(m0 + BLOCK_M, num_rows) - 1
    m = tl.minimum(m, last)  # rows beyond are its copies
    positions = positions_ptr + first_row
    row_position = tl.load(positions + m).to(tl.int32)

    # Of the rows before the block: those that its first row sees, and those that its last one does.
    lowest = tl.maximum(m0 - WINDOW + 1, 0)
    first_limit = tl.load(positions + m0) - WINDOW
    last_limit = tl.load(positions + last) - WINDOW
    first = lowest + _rows_up_to(positions, lowest, m0, first_limit, BLOCK)
    all_see = first + _rows_up_to(positions, first, m0, last_limit, BLOCK)
    # Blocks of keys between these two are seen by all rows whole.
    whole = first + tl.cdiv(all_see - first, BLOCK_N) * BLOCK_N
    partly = whole + tl.maximum(m0 - whole, 0) // BLOCK_N * BLOCK_N

    d = tl.arange(0, HEAD_PAD)
    d_valid = (d < HEAD_DIM)[None, :]
    at = first_row + m
    q = tl.load(
        q_ptr + at[:, None] * q_stride_row + head * HEAD_DIM + d[None, :], mask=d_valid, other=0.0
    )
    k_ptr += first_row * k_stride_row + head // GROUP * HEAD_DIM
    v_ptr += first_row * v_stride_row + head // GROUP * HEAD_DIM
    # No logit is as low, and a number can be subtracted from itself.
    highest = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        highest = tl.zeros([BLOCK_M], tl.float32) + sink
        total += 1.0
    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    for part in tl.static_range(3):
        start = first if part == 0 else whole if part == 1 else partly
        end = whole if part == 0 else partly if part == 1 else last + 1
        highest, total, acc = _add_keys(
            highest,
            total,
            acc,
            q,
            row_position,
            k_ptr,
            k_stride_row,
            v_ptr,
            v_stride_row,
            positions,
            start,
            end,
            num_rows,
            scale * LOG2_E,
            MASKED=part != 1,
            WINDOW=WINDOW,
            HEAD_DIM=HEAD_DIM,
            HEAD_PAD=HEAD_PAD,
            BLOCK_N=BLOCK_N,
        )
    out_at = out_ptr + at[:, None] * out_stride_row + head * HEAD_DIM + d[None, :]
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_at, out, mask=m_valid[:, None] & d_valid)


def window_attention_triton(out, q, k, v, rows, form):
    num_heads, head_dim = q.shape[1:]
    assert all(x.stride(1) == head_dim and x.stride(2) == 1 for x in (out, q, k, v))
    head_pad = max(16, triton.next_power_of_2(head_dim))
    block_m = 128
    has_sinks = form.sinks is not None
    prefills, blocks = len(rows.starts) - 1, triton.cdiv(rows.longest, block_m)
    _window_attention_kernel[(num_heads, prefills, blocks)](
        out,
        out.stride(0),
        q,
        q.stride(0),
        k,
        k.stride(0),
        v,
        v.stride(0),
        rows.positions,
        rows.starts,
        form.sinks if has_sinks else rows.starts,  # an address that is never read
        form.scale,
        GROUP=num_heads // k.shape[1],
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad,
        WINDOW=form.window,
        SINKS=has_sinks,
        BLOCK_M=block_m,
        BLOCK_N=64,
        BLOCK=1024,
        num_warps=8,
        num_stages=3 if head_pad <= 128 else 2,  # what shared memory holds of 16-bit numbers
    )


def window_attention_reference(out, q, k, v, rows, form):
    bounds = rows.starts.tolist()
    for start, end in zip(bounds, bounds[1:]):
        for row in range(start, end, 128):  # few at a time: no logits of a long prompt by itself
            mine = slice(row, min(row + 128, end))
            keys = slice(max(start, row - form.window + 1), mine.stop)
            seen = form.sees(rows.positions[mine], rows.positions[keys])
            out[mine] = attend(q[mine], k[keys], v[keys], seen, form)[0].to(out.dtype)


def window_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: KeptRows,
    form: LayerForm,
) -> None:
    """Causal attention of each prompt's kept tokens in a layer with a window.

    Args:
        out: ``[rows, heads, head_dim]``, written; as in q, k and v, rows may lie apart, heads lie
            side by side.
        q: ``[rows, heads, head_dim]``.
        k, v: ``[rows, kv_heads, head_dim]``.
    """
    run = window_attention_triton if q.is_cuda else window_attention_reference
    run(out, q, k, v, rows, form)
