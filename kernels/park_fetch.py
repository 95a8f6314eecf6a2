"""Hidden states across a boundary: parked in the Aux Cache, fetched for the rows that go on.

Each row of the stage after a boundary says where its state comes from: a row of the stage before
(``Rows.source``), or, where that is -1, the Aux Cache.
"""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.prompt_pages import AuxCache, aux_at
from lazyllm_vllm.kernels.selection import Rows


@step_jit
def _park_kernel(
    hidden_ptr,  # [rows, hidden]
    row_request_ptr,
    row_position_ptr,
    is_pruned_ptr,
    aux_ptr,
    num_prompt_ptr,
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
    if tl.load(is_pruned_ptr + request) == 0:
        return
    at = aux_at(
        block_table_ptr + request * block_table_stride,
        tl.load(num_prompt_ptr + request),
        tl.load(row_position_ptr + row),
        page_stride,
        block_stride,
        PAGES,
        PER_PAGE,
        SLOT_SIZE,
        PER_SLOT,
    )
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = i < SLOT_SIZE
    x = tl.load(hidden_ptr + row * SLOT_SIZE + i, mask=valid)
    tl.store(aux_ptr + at + i, x, mask=valid)


@step_jit
def _fetch_kernel(
    out_ptr,  # [rows of the stage, hidden]
    hidden_ptr,  # [rows of the stage before, hidden]
    row_source_ptr,
    row_request_ptr,
    row_position_ptr,
    aux_ptr,
    num_prompt_ptr,
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
            at = aux_at(
                block_table_ptr + request * block_table_stride,
                tl.load(num_prompt_ptr + request),
                tl.load(row_position_ptr + row),
                page_stride,
                block_stride,
                PAGES,
                PER_PAGE,
                SLOT_SIZE,
                PER_SLOT,
            )
            x = tl.load(aux_ptr + at + i, mask=valid)
    tl.store(out_ptr + row * SLOT_SIZE + i, x, mask=valid)


def _blocks(size: int) -> tuple[int, int]:
    """Elements a program copies of a row of ``size``, and programs a row."""
    block = min(2048, triton.next_power_of_2(size))
    return block, triton.cdiv(size, block)


def park_triton(hidden, rows, batch, is_pruned, aux):
    assert hidden.is_contiguous()
    block, parts = _blocks(hidden.shape[1])
    _park_kernel[(len(batch), parts)](
        hidden,
        rows.request,
        rows.position,
        is_pruned,
        aux.buffer,
        aux.num_prompt,
        *aux.pages.kernel_args,
        batch.start,
        BLOCK=block,
        **aux.pages.kernel_constants,
    )


def park_reference(hidden, rows, batch, is_pruned, aux):
    at = torch.arange(batch.start, batch.stop, device=hidden.device)
    request = rows.request[at]
    at = at[(request >= 0) & (is_pruned[request.clamp(min=0).long()] != 0)]
    element = torch.arange(hidden.shape[1], device=hidden.device)
    address = aux.at(rows.request[at], rows.position[at])
    aux.buffer[address[:, None] + element] = hidden[at]


def fetch_triton(out, hidden, rows, aux):
    assert hidden.is_contiguous() and out.is_contiguous()
    block, parts = _blocks(hidden.shape[1])
    if aux is None:  # the kernel is given addresses that it never reads
        where = (hidden, rows.source, rows.source, 0, 0, 0)
        constants = dict.fromkeys(("PAGES", "PER_PAGE", "PER_SLOT"), 1)
        constants["SLOT_SIZE"] = hidden.shape[1]
    else:
        where = (aux.buffer, aux.num_prompt, *aux.pages.kernel_args)
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
        address = aux.at(rows.request[from_aux], rows.position[from_aux])
        out[from_aux] = aux.buffer[address[:, None] + element]


def park(
    hidden: torch.Tensor, rows: Rows, which: range, is_pruned: torch.Tensor, aux: AuxCache
) -> None:
    """Write the rows ``which`` of ``hidden`` (``[rows, hidden]``) to the Aux Cache.

    Args:
        rows: of the same stage: whose they are, -1: nobody's, and their positions.
        is_pruned: ``[batch]`` int32; rows of other requests have no place there.
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
