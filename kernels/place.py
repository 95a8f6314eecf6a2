"""Physical slots of a stage's rows, and which position's key each slot holds."""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.paged import physical_slots
from lazyllm_vllm.kernels.selection import Rows


@step_jit
def _place_kernel(
    slot_mapping_ptr,
    slot_position_ptr,
    row_request_ptr,
    row_slot_ptr,
    row_position_ptr,
    block_table_ptr,
    block_table_stride,
    num_rows,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < num_rows
    request = tl.load(row_request_ptr + row, mask=valid, other=-1)
    placed = valid & (request >= 0)
    slot = tl.load(row_slot_ptr + row, mask=placed, other=0)
    block = tl.load(
        block_table_ptr + request * block_table_stride + slot // BLOCK_SIZE, mask=placed, other=0
    ).to(tl.int64)
    physical = block * BLOCK_SIZE + slot % BLOCK_SIZE
    position = tl.load(row_position_ptr + row, mask=placed, other=0)
    tl.store(slot_mapping_ptr + row, tl.where(placed, physical, -1), mask=valid)
    tl.store(slot_position_ptr + physical, position.to(tl.int32), mask=placed)


def place_rows_triton(slot_mapping, slot_position, rows, block_table, num_rows, block_size):
    _place_kernel[(triton.cdiv(num_rows, 256),)](
        slot_mapping,
        slot_position,
        rows.request,
        rows.slot,
        rows.position,
        block_table,
        block_table.stride(0),
        num_rows,
        BLOCK_SIZE=block_size,
        BLOCK=256,
    )


def place_rows_reference(slot_mapping, slot_position, rows, block_table, num_rows, block_size):
    slot_mapping[:num_rows] = -1
    request = rows.request[:num_rows]
    for i in request[request >= 0].unique().tolist():
        mine = (request == i).nonzero()[:, 0]
        physical = physical_slots(block_table[i], rows.slot[mine], block_size)
        slot_mapping[mine] = physical
        slot_position[physical] = rows.position[mine].to(torch.int32)


def place_rows(
    slot_mapping: torch.Tensor,
    slot_position: torch.Tensor,
    rows: Rows,
    block_table: torch.Tensor,
    num_rows: int,
    block_size: int,
) -> None:
    """Turn each row's slot in a stage into its physical slot in one of the stage's groups.

    Args:
        slot_mapping: ``[rows]`` int64, written; -1 for unused rows.
        slot_position: ``[physical slots]`` int32, written: the position of the key put there.
        block_table: ``[batch, width]`` int32 of the group.
    """
    run = place_rows_triton if slot_mapping.is_cuda else place_rows_reference
    run(slot_mapping, slot_position, rows, block_table, num_rows, block_size)
