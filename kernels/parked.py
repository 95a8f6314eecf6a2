"""Hidden states across the first boundary: every token's is parked beside its keys in stage 0.

Pages of stage 0's KV cache groups hold them, as if they were layers, so that whoever shares a
prefix's keys shares its hidden states too. A page has one part of the hidden state of each of its
block's tokens: dimensions ``first .. first + width - 1``. In FP8 each state has a scale:

    scale = max |x| / 448        448: the largest number of e4m3
"""

from dataclasses import dataclass

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.selection import Rows
from lazyllm_vllm.kernels.write_kv import FP8_MAX, stored, to_stored


@dataclass(frozen=True)
class ParkedPage:
    """Attributes:
    cache: ``[blocks, block_size, width]``, of the model's dtype or FP8 (e4m3).
    block_table: ``[batch, width]`` int32, of the page's KV cache group, the ``group``-th.
    first: the first of its dimensions.
    """

    cache: torch.Tensor
    block_table: torch.Tensor
    group: int
    first: int


@dataclass(frozen=True)
class ParkedStates:
    """Attributes:
    pages: in order of dimension.
    scale: ``[physical slots]`` fp32, by the slot in the first page's group; None: not in FP8.
    """

    pages: list[ParkedPage]
    scale: torch.Tensor | None

    @property
    def block_size(self) -> int:
        return self.pages[0].cache.shape[1]


@step_jit
def _park_kernel(
    hidden_ptr,  # [rows, HIDDEN]
    residual_ptr,
    slot_ptr,  # [rows] int64
    cache_ptr,
    cache_stride,
    scale_ptr,
    first,
    HIDDEN: tl.constexpr,
    HIDDEN_PAD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + row)
    if slot < 0:
        return
    i = tl.arange(0, WIDTH_PAD)
    valid = (i < WIDTH) & (first + i < HIDDEN)
    x = tl.load(hidden_ptr + row * HIDDEN + first + i, mask=valid, other=0.0)
    if HAS_RESIDUAL:
        y = tl.load(residual_ptr + row * HIDDEN + first + i, mask=valid, other=0.0)
        x = (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    if dtype == tl.float8e4nv:
        j = tl.arange(0, HIDDEN_PAD)
        whole = tl.load(hidden_ptr + row * HIDDEN + j, mask=j < HIDDEN, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            more = tl.load(residual_ptr + row * HIDDEN + j, mask=j < HIDDEN, other=0.0)
            whole = (whole + more.to(tl.float32)).to(x.dtype).to(tl.float32)
        highest = tl.max(tl.abs(whole), 0)
        scale = tl.where(highest > 0, tl.div_rn(highest, FP8_MAX), 1.0)
        tl.store(scale_ptr + slot, scale, mask=first == 0)
        x = to_stored(x, scale, dtype)
    at = cache_ptr + slot // BLOCK_SIZE * cache_stride + slot % BLOCK_SIZE * WIDTH
    tl.store(at + i, x, mask=valid)


@step_jit
def _fetch_kernel(
    out_ptr,  # [rows of stage 1, HIDDEN]
    hidden_ptr,  # [rows of stage 0, HIDDEN]
    row_source_ptr,
    row_request_ptr,
    row_position_ptr,
    cache_ptr,
    cache_stride,
    block_table_ptr,
    block_table_stride,
    scale_ptr,
    scale_table_ptr,  # of the first page's group
    first,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH_PAD)
    valid = (i < WIDTH) & (first + i < HIDDEN)
    source = tl.load(row_source_ptr + row).to(tl.int64)
    request = tl.load(row_request_ptr + row).to(tl.int64)
    x = tl.zeros([WIDTH_PAD], out_ptr.dtype.element_ty)
    if source >= 0:
        x = tl.load(hidden_ptr + source * HIDDEN + first + i, mask=valid)
    elif request >= 0:
        position = tl.load(row_position_ptr + row)
        in_table = request * block_table_stride + position // BLOCK_SIZE
        block = tl.load(block_table_ptr + in_table).to(tl.int64)
        at = cache_ptr + block * cache_stride + position % BLOCK_SIZE * WIDTH
        parked = tl.load(at + i, mask=valid)
        if cache_ptr.dtype.element_ty == tl.float8e4nv:
            first_block = tl.load(scale_table_ptr + in_table).to(tl.int64)
            scale = tl.load(scale_ptr + first_block * BLOCK_SIZE + position % BLOCK_SIZE)
            parked = parked.to(tl.float32) * scale
        x = parked.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * HIDDEN + first + i, x, mask=valid)


def _constants(page: ParkedPage, hidden: torch.Tensor) -> dict:
    width, size = page.cache.shape[2], hidden.shape[1]
    pad = triton.next_power_of_2(width)
    return {"HIDDEN": size, "WIDTH": width, "WIDTH_PAD": pad, "BLOCK_SIZE": page.cache.shape[1]}


def park_tokens_triton(hidden, residual, slot_mappings, parked):
    assert hidden.is_contiguous() and (residual is None or residual.is_contiguous())
    for page in parked.pages:
        _park_kernel[(len(hidden),)](
            hidden,
            hidden if residual is None else residual,
            slot_mappings[page.group],
            page.cache,
            page.cache.stride(0),
            slot_mappings if parked.scale is None else parked.scale,
            page.first,
            HIDDEN_PAD=triton.next_power_of_2(hidden.shape[1]),
            HAS_RESIDUAL=residual is not None,
            **_constants(page, hidden),
        )


def park_tokens_reference(hidden, residual, slot_mappings, parked):
    states = hidden if residual is None else hidden + residual
    scale = torch.ones(len(states), 1, device=states.device)
    if parked.scale is not None:
        highest = states.float().abs().amax(1, keepdim=True)
        scale = (highest / FP8_MAX.value).where(highest > 0, 1.0)
        slots = slot_mappings[parked.pages[0].group][: len(states)]
        parked.scale[slots[slots >= 0]] = scale[slots >= 0, 0]
    for page in parked.pages:
        slots = slot_mappings[page.group][: len(states)]
        rows = (slots >= 0).nonzero()[:, 0]
        part = states[rows, page.first : page.first + page.cache.shape[2]]
        block, place = slots[rows] // parked.block_size, slots[rows] % parked.block_size
        page.cache[block, place, : part.shape[1]] = stored(part, scale[rows], page.cache.dtype)


def fetch_tokens_triton(out, hidden, rows, parked):
    assert hidden.is_contiguous() and out.is_contiguous()
    for page in parked.pages:
        _fetch_kernel[(len(out),)](
            out,
            hidden,
            rows.source,
            rows.request,
            rows.position,
            page.cache,
            page.cache.stride(0),
            page.block_table,
            page.block_table.stride(0),
            rows.source if parked.scale is None else parked.scale,
            parked.pages[0].block_table,
            page.first,
            **_constants(page, hidden),
        )


def fetch_tokens_reference(out, hidden, rows, parked):
    source, request = rows.source[: len(out)].long(), rows.request[: len(out)].long()
    out.zero_()
    from_row = (source >= 0).nonzero()[:, 0]
    out[from_row] = hidden[source[from_row]]
    at = ((source < 0) & (request >= 0)).nonzero()[:, 0]
    request, position, size = request[at], rows.position[at], parked.block_size
    for page in parked.pages:
        block = page.block_table[request, position // size].long()
        part = page.cache[block, position % size].to(torch.float32)
        if parked.scale is not None:
            table = parked.pages[0].block_table[request, position // size].long()
            part = part * parked.scale[table * size + position % size][:, None]
        last = min(page.first + part.shape[1], out.shape[1])
        out[at, page.first : last] = part[:, : last - page.first].to(out.dtype)


def park_tokens(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    slot_mappings: torch.Tensor,
    parked: ParkedStates,
) -> None:
    """Park the rows of stage 0.

    Args:
        hidden, residual: ``[rows, hidden]``, what the layers hand on; residual None: it is in
            ``hidden``. Their sum is parked.
        slot_mappings: ``[groups, rows]`` int64, physical slots; -1: not parked.
    """
    run = park_tokens_triton if hidden.is_cuda else park_tokens_reference
    run(hidden, residual, slot_mappings, parked)


def fetch_tokens(out: torch.Tensor, hidden: torch.Tensor, rows: Rows, parked: ParkedStates) -> None:
    """Fill every row of ``out`` (``[rows of stage 1, hidden]``) from the row of stage 0 that
    ``rows.source`` names or, where that is -1, from where its token is parked; unused rows become
    zeros.

    Args:
        hidden: ``[rows of stage 0, hidden]``.
    """
    run = fetch_tokens_triton if hidden.is_cuda else fetch_tokens_reference
    run(out, hidden, rows, parked)
