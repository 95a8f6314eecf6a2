"""Attention of decode rows, from what programs found that each saw a part of the keys.

out = sum_split exp(lse_split) * out_split / (sum_split exp(lse_split) + exp(sink))
"""

from dataclasses import dataclass

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.layer_form import LOG2_E, LayerForm
from lazyllm_vllm.kernels.paged import StageKeys
from lazyllm_vllm.kernels.selection import DecodeRows, Selection

MOST_SPLITS = tl.constexpr(64)
_AT_ONCE = tl.constexpr(16)  # splits; one size for all steps, so that none waits for the compiler


@dataclass(frozen=True)
class Partial:
    """Attributes:
    out: ``[rows, heads, splits, head_dim]`` fp32, each split's attention by itself.
    lse: ``[rows, heads, splits]`` fp32, log of its denominator, to base 2.
    """

    out: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def make(cls, rows: int, heads: int, splits: int, head_dim: int, device) -> "Partial":
        out = torch.empty(rows, heads, splits, head_dim, dtype=torch.float32, device=device)
        return cls(out, torch.empty(rows, heads, splits, dtype=torch.float32, device=device))


@step_jit
def _combine_kernel(
    out_ptr,  # [rows, heads, head_dim]
    out_stride_row,
    lse_ptr,  # [batch, heads] fp32, of the current rows
    partial_ptr,  # [rows, heads, splits, head_dim] fp32
    partial_lse_ptr,  # [rows, heads, splits] fp32, to base 2
    sinks_ptr,  # [heads]
    v_scale,
    num_keys_ptr,
    row_request_ptr,
    num_decodes,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    IDENTITY: tl.constexpr,  # nothing is revived (stage 0)
    SINKS: tl.constexpr,
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
            valid = tl.load(row_request_ptr + row) >= 0
    if not valid:
        tl.store(out_at, tl.zeros([HEAD_PAD], out_ptr.dtype.element_ty), mask=d_valid)
        return

    first = (row * NUM_HEADS + head) * num_splits
    every = tl.arange(0, MOST_SPLITS)
    lse_at = partial_lse_ptr + first + every
    lse = tl.load(lse_at, mask=every < num_splits, other=float("-inf"))
    highest = tl.max(lse, 0)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        highest = tl.maximum(highest, sink)
    total = tl.sum(tl.exp2(lse - highest), 0)
    if SINKS:
        total += tl.exp2(sink - highest)
    out = tl.zeros([HEAD_PAD], tl.float32)
    for split0 in range(0, num_splits, _AT_ONCE):
        split = split0 + tl.arange(0, _AT_ONCE)
        s_valid, at = split < num_splits, first + split
        weight = tl.load(partial_lse_ptr + at, mask=s_valid, other=float("-inf"))
        weight = tl.exp2(weight - highest)
        partial = tl.load(
            partial_ptr + at[:, None] * HEAD_DIM + d[None, :],
            mask=s_valid[:, None] & d_valid[None, :],
            other=0.0,
        )
        out += tl.sum(partial * weight[:, None], 0)
    out = out / total * v_scale
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=d_valid)
    if row < num_decodes:
        tl.store(lse_ptr + row * NUM_HEADS + head, (highest + tl.log2(total)) / LOG2_E)


def combine_splits(
    out: torch.Tensor,
    lse: torch.Tensor,
    partial: Partial,
    keys: StageKeys,
    decodes: DecodeRows,
    form: LayerForm,
    s: Selection,
) -> None:
    """The second half of ``paged_attention``, on a GPU: the same arguments, but for ``q``."""
    num_rows, num_heads, head_dim = out.shape
    splits = partial.lse.shape[2]
    assert out.stride(1) == head_dim and out.stride(2) == 1 and lse.is_contiguous()
    has_sinks = form.sinks is not None
    _combine_kernel[(num_rows, num_heads)](
        out,
        out.stride(0),
        lse,
        partial.out,
        partial.lse,
        form.sinks if has_sinks else lse,  # an address that is never read
        keys.v_scale,
        keys.length,
        decodes.rows.request,
        decodes.num_decodes,
        splits,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        HEAD_PAD=triton.next_power_of_2(head_dim),
        IDENTITY=keys.stage == 0,
        SINKS=has_sinks,
        num_warps=1,
    )
