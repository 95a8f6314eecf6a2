"""Hidden states across the boundaries after the first (see ``parked`` for that one): parked in the
Aux Cache, fetched for the rows that go on.

Each row of the stage after a boundary says where its state comes from: a row of the stage before
(``Rows.source``), or, where that is -1, the Aux Cache. One in FP8 has a scale for each state:

    scale = max |x| / 448        448: the largest number of e4m3
"""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.paged import FP8
from lazyllm_vllm.kernels.prompt_pages import AuxCache, aux_at, state_at
from lazyllm_vllm.kernels.selection import Rows
from lazyllm_vllm.kernels.write_kv import FP8_MAX, stored, to_stored


@step_jit
def _park_kernel(
    hidden_ptr,  # [rows, hidden]
    row_request_ptr,
    row_position_ptr,
    is_pruned_ptr,
    aux_ptr,
    scale_ptr,  # planes of the prompt state: scale, fp32, for FP8
    place_ptr,
    num_prompt_ptr,
    state_room_ptr,
    block_table_ptr,
    block_table_stride,
    page_stride,
    block_stride,
    first_row,
    PAGES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    SLOT_SIZE: tl.constexpr,
    PER_SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = first_row + tl.program_id(0).to(tl.int64)
    request = tl.load(row_request_ptr + row)
    if request < 0:
        return
    num_prompt = tl.load(num_prompt_ptr + request)
    position = tl.load(row_position_ptr + row)
    if (tl.load(is_pruned_ptr + request) == 0) | (position >= num_prompt):
        return
    block_table = block_table_ptr + request * block_table_stride
    dtype: tl.constexpr = aux_ptr.dtype.element_ty
    where, at = _addresses(
        block_table,
        tl.load(state_room_ptr + request),
        position,
        place_ptr,
        page_stride,
        block_stride,
        PAGES,
        PER_PAGE,
        SLOT_SIZE,
        PER_SLOT,
        32 // dtype.primitive_bitwidth,
    )
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = i < SLOT_SIZE
    x = tl.load(hidden_ptr + row * SLOT_SIZE + i, mask=valid, other=0.0)
    if dtype == tl.float8e4nv:  # one program has the whole row
        highest = tl.max(tl.abs(x.to(tl.float32)), 0)
        scale = tl.where(highest > 0, highest / FP8_MAX, 1.0)
        tl.store(scale_ptr + where, scale)
        tl.store(aux_ptr + at + i, to_stored(x, scale, dtype), mask=valid)
    else:
        tl.store(aux_ptr + at + i, x, mask=valid)


@triton.jit
def _addresses(
    block_table_row,
    state_room,
    position,
    place_ptr,
    page_stride,
    block_stride,
    PAGES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    SLOT_SIZE: tl.constexpr,
    PER_SLOT: tl.constexpr,
    PER_WORD: tl.constexpr,
):
    """Where a position is in each plane of the prompt state, and its hidden state's first element;
    so many elements make four bytes, a plane's unit."""
    where = state_at(
        block_table_row,
        position,
        position >= 0,
        page_stride // PER_WORD,
        block_stride // PER_WORD,
        PAGES,
        PER_PAGE,
        SLOT_SIZE // PER_WORD,
        PER_SLOT,
    )
    at = aux_at(
        block_table_row,
        state_room,
        tl.load(place_ptr + where),
        page_stride,
        block_stride,
        PAGES,
        PER_PAGE,
        SLOT_SIZE,
        PER_SLOT,
    )
    return where, at


@step_jit
def _fetch_kernel(
    out_ptr,  # [rows of the stage, hidden]
    hidden_ptr,  # [rows of the stage before, hidden]
    row_source_ptr,
    row_request_ptr,
    row_position_ptr,
    aux_ptr,
    scale_ptr,
    place_ptr,
    state_room_ptr,
    block_table_ptr,
    block_table_stride,
    page_stride,
    block_stride,
    HAS_AUX: tl.constexpr,
    PAGES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    SLOT_SIZE: tl.constexpr,
    PER_SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = i < SLOT_SIZE
    source = tl.load(row_source_ptr + row).to(tl.int64)
    x = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    if source >= 0:
        x = tl.load(hidden_ptr + source * SLOT_SIZE + i, mask=valid)
    elif HAS_AUX:
        request = tl.load(row_request_ptr + row)
        if request >= 0:
            block_table = block_table_ptr + request * block_table_stride
            where, at = _addresses(
                block_table,
                tl.load(state_room_ptr + request),
                tl.load(row_position_ptr + row),
                place_ptr,
                page_stride,
                block_stride,
                PAGES,
                PER_PAGE,
                SLOT_SIZE,
                PER_SLOT,
                32 // aux_ptr.dtype.element_ty.primitive_bitwidth,
            )
            parked = tl.load(aux_ptr + at + i, mask=valid)
            if aux_ptr.dtype.element_ty == tl.float8e4nv:
                parked = parked.to(tl.float32) * tl.load(scale_ptr + where)
            x = parked.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * SLOT_SIZE + i, x, mask=valid)


def _blocks(size: int) -> tuple[int, int]:
    """Elements a program copies of a row of ``size``, and programs a row."""
    block = min(2048, triton.next_power_of_2(size))
    return block, triton.cdiv(size, block)


def park_triton(hidden, rows, batch, is_pruned, aux):
    assert hidden.is_contiguous()
    block, parts = _blocks(hidden.shape[1])
    if aux.buffer.dtype == FP8:
        block, parts = triton.next_power_of_2(hidden.shape[1]), 1
    _park_kernel[(len(batch), parts)](
        hidden,
        rows.request,
        rows.position,
        is_pruned,
        aux.buffer,
        aux.state.scale,
        aux.state.place,
        aux.num_prompt,
        aux.state_room,
        *aux.pages.kernel_args,
        batch.start,
        BLOCK=block,
        **aux.pages.kernel_constants,
    )


def park_reference(hidden, rows, batch, is_pruned, aux):
    at = torch.arange(batch.start, batch.stop, device=hidden.device)
    request = rows.request[at]
    real = request.clamp(min=0).long()
    in_prompt = rows.position[at] < aux.num_prompt[real]
    at = at[(request >= 0) & (is_pruned[real] != 0) & in_prompt]
    element = torch.arange(hidden.shape[1], device=hidden.device)
    address = aux.at(rows.request[at], rows.position[at])
    states = hidden[at]
    if aux.buffer.dtype == FP8:
        highest = states.float().abs().amax(1)
        scale = (highest / FP8_MAX.value).where(highest > 0, 1.0)
        aux.state.scale[aux.state.at(rows.request[at].long(), rows.position[at].long())] = scale
        states = stored(states, scale[:, None], FP8)
    aux.buffer[address[:, None] + element] = states


def fetch_triton(out, hidden, rows, aux):
    assert hidden.is_contiguous() and out.is_contiguous()
    block, parts = _blocks(hidden.shape[1])
    if aux is None:  # the kernel is given addresses that it never reads
        where = (hidden, hidden, rows.source, rows.source, rows.source, 0, 0, 0)
        constants = dict.fromkeys(("PAGES", "PER_PAGE", "PER_SLOT"), 1)
        constants["SLOT_SIZE"] = hidden.shape[1]
    else:
        where = (aux.buffer, aux.state.scale, aux.state.place, aux.state_room)
        where += aux.pages.kernel_args
        constants = aux.pages.kernel_constants
    _fetch_kernel[(len(out), parts)](
        out,
        hidden,
        rows.source,
        rows.request,
        rows.position,
        *where,
        HAS_AUX=aux is not None,
        BLOCK=block,
        **constants,
    )


def fetch_reference(out, hidden, rows, aux):
    source, request = rows.source[: len(out)].long(), rows.request[: len(out)]
    out.zero_()
    from_row = (source >= 0).nonzero()[:, 0]
    out[from_row] = hidden[source[from_row]]
    if aux is not None:
        from_aux = ((source < 0) & (request >= 0)).nonzero()[:, 0]
        element = torch.arange(hidden.shape[1], device=hidden.device)
        request, position = rows.request[from_aux].long(), rows.position[from_aux].long()
        states = aux.buffer[aux.at(request, position)[:, None] + element]
        if aux.buffer.dtype == FP8:
            states = states.float() * aux.state.scale[aux.state.at(request, position)][:, None]
        out[from_aux] = states.to(out.dtype)


def park(
    hidden: torch.Tensor, rows: Rows, which: range, is_pruned: torch.Tensor, aux: AuxCache
) -> None:
    """Write the rows ``which`` of ``hidden`` (``[rows, hidden]``) to the Aux Cache.

    Args:
        rows: of the same stage: whose they are, -1: nobody's, and their positions.
        is_pruned: ``[batch]`` int32; rows of other requests have no place there, nor have tokens
            after the prompt.
    """
    run = park_triton if hidden.is_cuda else park_reference
    run(hidden, rows, which, is_pruned, aux)


def fetch(out: torch.Tensor, hidden: torch.Tensor, rows: Rows, aux: AuxCache | None) -> None:
    """Fill every row of ``out`` (``[rows of a stage, hidden]``) from where ``rows.source`` says;
    unused rows become zeros.

    Args:
        hidden: ``[rows of the stage before, hidden]``.
        aux: None: nothing comes from there.
    """
    run = fetch_triton if hidden.is_cuda else fetch_reference
    run(out, hidden, rows, aux)
