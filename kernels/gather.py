"""Hidden states across a boundary: kept rows on, dropped rows to the Aux Cache, revived rows out.

The Aux Cache's slot p of a request belongs to position p. A block of the cache's group has
``pages`` pages, each with room for ``per_page`` whole vectors:

    slot -> block table[slot // (pages * per_page)], page (slot // per_page) % pages,
            vector slot % per_page
"""

from dataclasses import dataclass

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.jit import step_jit


@dataclass(frozen=True)
class AuxPages:
    """Where the Aux Cache's vectors lie in the KV cache's backing buffer.

    Attributes:
        buffer: the backing buffer, flat, in the model's dtype.
        block_table: ``[batch, width]`` int32 of the Aux group.
        offset, page_stride, block_stride: elements to the first page, and between pages of a
            block, and between blocks.
        pages: pages a block.
        per_page: vectors a page.
        hidden_size: elements a vector.
    """

    buffer: torch.Tensor
    block_table: torch.Tensor
    offset: int
    page_stride: int
    block_stride: int
    pages: int
    per_page: int
    hidden_size: int

    @property
    def tokens_per_block(self) -> int:
        return self.pages * self.per_page

    def addresses(self, request: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """First element of each vector, int64; ``request`` holds batch indices."""
        position = position.long()
        block = self.block_table[request.long(), position // self.tokens_per_block].long()
        page = position // self.per_page % self.pages
        return (
            self.offset
            + block * self.block_stride
            + page * self.page_stride
            + position % self.per_page * self.hidden_size
        )


@triton.jit
def _aux_address(
    block_table_ptr, block_table_stride, request, position, offset, page_stride, block_stride,
    PAGES: tl.constexpr, PER_PAGE: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    block = tl.load(block_table_ptr + request * block_table_stride + position // (PAGES * PER_PAGE))
    page = (position // PER_PAGE) % PAGES
    return (
        offset
        + block.to(tl.int64) * block_stride
        + page.to(tl.int64) * page_stride
        + (position % PER_PAGE) * HIDDEN
    )


@step_jit
def _move_kernel(
    out_ptr,  # [rows after, hidden]
    hidden_ptr,  # [rows before, hidden]
    dst_row_ptr,
    request_ptr,
    position_ptr,
    aux_ptr,
    block_table_ptr,
    block_table_stride,
    offset,
    page_stride,
    block_stride,
    first_row,
    HAS_AUX: tl.constexpr,
    PAGES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = first_row + tl.program_id(0).to(tl.int64)
    dst = tl.load(dst_row_ptr + row).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = i < HIDDEN
    if dst >= 0:
        x = tl.load(hidden_ptr + row * HIDDEN + i, mask=valid)
        tl.store(out_ptr + dst * HIDDEN + i, x, mask=valid)
    elif HAS_AUX:
        x = tl.load(hidden_ptr + row * HIDDEN + i, mask=valid)
        at = _aux_address(
            block_table_ptr, block_table_stride, tl.load(request_ptr + row),
            tl.load(position_ptr + row), offset, page_stride, block_stride, PAGES, PER_PAGE, HIDDEN,
        )  # fmt: skip
        tl.store(aux_ptr + at + i, x, mask=valid)


@step_jit
def _store_kernel(
    hidden_ptr,
    request_ptr,
    position_ptr,
    aux_ptr,
    block_table_ptr,
    block_table_stride,
    offset,
    page_stride,
    block_stride,
    first_row,
    PAGES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = first_row + tl.program_id(0).to(tl.int64)
    request = tl.load(request_ptr + row)
    if request < 0:
        return
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = i < HIDDEN
    at = _aux_address(
        block_table_ptr, block_table_stride, request, tl.load(position_ptr + row),
        offset, page_stride, block_stride, PAGES, PER_PAGE, HIDDEN,
    )  # fmt: skip
    tl.store(aux_ptr + at + i, tl.load(hidden_ptr + row * HIDDEN + i, mask=valid), mask=valid)


@step_jit
def _load_kernel(
    out_ptr,
    hidden_ptr,
    request_ptr,
    position_ptr,
    aux_ptr,
    block_table_ptr,
    block_table_stride,
    offset,
    page_stride,
    block_stride,
    num_decodes,
    PAGES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = i < HIDDEN
    request = tl.load(request_ptr + row)
    x = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    if row < num_decodes:
        x = tl.load(hidden_ptr + row * HIDDEN + i, mask=valid)
    elif request >= 0:
        at = _aux_address(
            block_table_ptr, block_table_stride, request, tl.load(position_ptr + row),
            offset, page_stride, block_stride, PAGES, PER_PAGE, HIDDEN,
        )  # fmt: skip
        x = tl.load(aux_ptr + at + i, mask=valid)
    tl.store(out_ptr + row * HIDDEN + i, x, mask=valid)


def move_prefill_rows_triton(out, hidden, move, first_row, num_rows, aux):
    assert out.is_contiguous() and hidden.is_contiguous()
    size = hidden.shape[1]
    block = min(2048, triton.next_power_of_2(size))
    # Without an Aux Cache the kernel is given addresses that it never reads.
    table = aux.block_table if aux else move.dst_row
    _move_kernel[(num_rows, triton.cdiv(size, block))](
        out, hidden, move.dst_row, move.request, move.position,
        aux.buffer if aux else hidden, table, table.stride(0),
        aux.offset if aux else 0, aux.page_stride if aux else 0, aux.block_stride if aux else 0,
        first_row, HAS_AUX=aux is not None, PAGES=aux.pages if aux else 1,
        PER_PAGE=aux.per_page if aux else 1, HIDDEN=size, BLOCK=block,
    )  # fmt: skip


def move_prefill_rows_reference(out, hidden, move, first_row, num_rows, aux):
    rows = torch.arange(first_row, first_row + num_rows, device=hidden.device)
    dst = move.dst_row[rows].long()
    out[dst[dst >= 0]] = hidden[rows[dst >= 0]]
    if aux:
        _aux_write(hidden, rows[dst < 0], move, aux)


def _aux_write(hidden, rows, owner, aux):
    at = aux.addresses(owner.request[rows], owner.position[rows])
    i = torch.arange(aux.hidden_size, device=hidden.device)
    aux.buffer[at[:, None] + i] = hidden[rows]


def _pages(aux):
    """Arguments and constants of a kernel that copies vectors to or from the Aux Cache."""
    block = min(2048, triton.next_power_of_2(aux.hidden_size))
    addresses = (
        aux.buffer, aux.block_table, aux.block_table.stride(0),
        aux.offset, aux.page_stride, aux.block_stride,
    )  # fmt: skip
    constants = {
        "PAGES": aux.pages, "PER_PAGE": aux.per_page, "HIDDEN": aux.hidden_size, "BLOCK": block
    }  # fmt: skip
    return addresses, constants, triton.cdiv(aux.hidden_size, block)


def store_aux_triton(hidden, rows, first_row, num_rows, aux):
    assert hidden.is_contiguous()
    addresses, constants, parts = _pages(aux)
    _store_kernel[(num_rows, parts)](
        hidden, rows.request, rows.position, *addresses, first_row, **constants
    )


def store_aux_reference(hidden, rows, first_row, num_rows, aux):
    at = torch.arange(first_row, first_row + num_rows, device=hidden.device)
    _aux_write(hidden, at[rows.request[at] >= 0], rows, aux)


def load_aux_triton(out, hidden, rows, num_decodes, num_rows, aux):
    assert hidden.is_contiguous() and out.is_contiguous()
    addresses, constants, parts = _pages(aux)
    _load_kernel[(num_rows, parts)](
        out, hidden, rows.request, rows.position, *addresses, num_decodes, **constants
    )


def load_aux_reference(out, hidden, rows, num_decodes, num_rows, aux):
    out[:num_decodes] = hidden[:num_decodes]
    out[num_decodes:num_rows] = 0
    at = torch.arange(num_decodes, num_rows, device=hidden.device)
    used = at[rows.request[at] >= 0]
    i = torch.arange(aux.hidden_size, device=hidden.device)
    out[used] = aux.buffer[aux.addresses(rows.request[used], rows.position[used])[:, None] + i]


def move_prefill_rows(
    out: torch.Tensor,
    hidden: torch.Tensor,
    move,
    first_row: int,
    num_rows: int,
    aux: AuxPages | None,
) -> None:
    """Carry prefill rows over a boundary.

    Args:
        out: ``[rows after, hidden]``, kept rows written.
        hidden: ``[rows before, hidden]``.
        move: ``kernels.state.PrefillMove``; ``dst_row`` -1 goes to the Aux Cache.
        first_row, num_rows: the prefill rows before.
        aux: None: dropped rows are forgotten.
    """
    run = move_prefill_rows_triton if hidden.is_cuda else move_prefill_rows_reference
    run(out, hidden, move, first_row, num_rows, aux)


def store_aux(hidden: torch.Tensor, rows, first_row: int, num_rows: int, aux: AuxPages) -> None:
    """Write rows ``first_row .. first_row + num_rows - 1`` of ``hidden`` (``[rows, hidden]``) to
    their Aux slots; ``rows`` (``kernels.state.Rows``) says whose they are, -1: nobody's."""
    run = store_aux_triton if hidden.is_cuda else store_aux_reference
    run(hidden, rows, first_row, num_rows, aux)


def load_aux(
    out: torch.Tensor, hidden: torch.Tensor, rows, num_decodes: int, num_rows: int, aux: AuxPages
) -> None:
    """Fill rows ``0 .. num_rows - 1`` of ``out``: the decodes' from ``hidden``, the revived ones'
    from their Aux slots; unused rows become zeros."""
    run = load_aux_triton if hidden.is_cuda else load_aux_reference
    run(out, hidden, rows, num_decodes, num_rows, aux)
