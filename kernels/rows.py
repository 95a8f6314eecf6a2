"""Whose rows they are, and where their keys go: the start of a step, physical slots, the write."""

import torch

from vllm.triton_utils import tl, triton
from vllm.v1.attention.backends import fa_utils

from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.state import Rows, Selection


@step_jit
def _begin_step_kernel(
    num_prompt_ptr,
    is_pruned_ptr,
    active_ptr,  # [stages, max batch]
    limit_ptr,  # [stages, max batch]
    req_index_ptr,
    table_ptr,
    table_stride,
    positions_ptr,  # [rows of stage 0] int64
    share_ptr,
    key_len_ptr,  # [stages, max batch]
    num_revived_ptr,  # [stages, max batch]
    row_position_ptr,  # [stages, max rows] int64
    row_request_ptr,
    row_slot_ptr,
    max_batch,
    max_rows,
    num_decodes,
    revive_rows,
    always,
    num_stages,
):
    batch = tl.program_id(0)
    index = tl.load(req_index_ptr + batch)
    state = table_ptr + tl.maximum(index, 0) * table_stride
    num_prompt = tl.load(state)
    if index < 0:
        num_prompt = 0
    pruned = (tl.load(state + num_stages) < num_prompt).to(tl.int32)
    tl.store(num_prompt_ptr + batch, num_prompt)
    tl.store(is_pruned_ptr + batch, pruned)

    if batch >= num_decodes:
        for stage in range(1, num_stages):
            kept = tl.load(state + 1 + stage)
            drops = (pruned != 0) & (kept < tl.load(state + stage))
            tl.store(active_ptr + stage * max_batch + batch, drops.to(tl.int32))
        return

    position = tl.load(positions_ptr + batch)
    if index < 0:
        position = position * 0
    share = tl.load(share_ptr)
    for stage in range(num_stages):
        at = stage * max_batch + batch
        prompt_keys = tl.load(state + 1 + 2 * num_stages + stage)
        slot = prompt_keys + position.to(tl.int32) - num_prompt
        tl.store(key_len_ptr + at, tl.where(index < 0, 0, slot + 1))
        tl.store(num_revived_ptr + at, 0)
        row = stage * max_rows + batch
        tl.store(row_position_ptr + row, position)
        tl.store(row_request_ptr + row, tl.where(index < 0, -1, batch))
        tl.store(row_slot_ptr + row, slot)
        if stage > 0:
            room = tl.load(state + 1 + num_stages + stage) - prompt_keys
            limit = 0
            if revive_rows > 0:
                limit = tl.minimum(share, tl.maximum(room, 0))
            active = (pruned != 0) & ((always != 0) | (limit > 0))
            tl.store(limit_ptr + at, limit)
            tl.store(active_ptr + at, active.to(tl.int32))
            # Rows set aside for revived tokens are nobody's until a token is chosen.
            for unused in range(batch, revive_rows, num_decodes):
                row = stage * max_rows + num_decodes + unused
                tl.store(row_request_ptr + row, -1)
                tl.store(row_position_ptr + row, position * 0)


def begin_step_triton(
    s, rows, positions, share, num_decodes, batch, revive_rows, always, num_stages
):
    _begin_step_kernel[(batch,)](
        s.num_prompt, s.is_pruned, s.active, s.limit, s.req_index, s.table, s.table.stride(0),
        positions, share, rows.key_len, rows.num_revived, rows.position, rows.request, rows.slot,
        s.active.shape[1], rows.position.shape[1], num_decodes, revive_rows, int(always),
        num_stages, num_warps=1,
    )  # fmt: skip


def begin_step_reference(
    s, rows, positions, share, num_decodes, batch, revive_rows, always, num_stages
):
    real = s.req_index[:batch] >= 0
    state = s.table[s.req_index[:batch].clamp(min=0).long()]
    kept, room, prompt_keys = state[:, 1:].view(batch, 3, num_stages).unbind(1)
    s.num_prompt[:batch] = state[:, 0] * real
    s.is_pruned[:batch] = (kept[:, -1] < state[:, 0]) & real
    pruned = s.is_pruned[:batch].bool()
    s.active[1:, num_decodes:batch] = ((kept[:, 1:] < kept[:, :-1]) & pruned[:, None])[
        num_decodes:
    ].T.int()
    if num_decodes == 0:
        return
    n = num_decodes
    position = positions[:n] * real[:n]
    slot = (prompt_keys[:n].T + position - s.num_prompt[:n]).int()
    rows.key_len[:, :n] = (slot + 1) * real[:n]
    rows.num_revived[:, :n] = 0
    rows.position[:, :n] = position
    rows.request[:, :n] = torch.arange(n, device=real.device).where(real[:n], -1).int()
    rows.slot[:, :n] = slot
    most = int(share) if revive_rows else 0
    s.limit[1:, :n] = (room - prompt_keys)[:n, 1:].T.clamp(0, most)
    s.active[1:, :n] = (pruned[:n] & ((s.limit[1:, :n] > 0) | bool(always))).int()
    rows.request[1:, n : n + revive_rows] = -1
    rows.position[1:, n : n + revive_rows] = 0


def begin_step(
    s: Selection,
    rows: Rows,
    positions: torch.Tensor,
    share: torch.Tensor,
    num_decodes: int,
    batch: int,
    revive_rows: int,
    always: bool,
    num_stages: int,
) -> None:
    """What the boundaries of a step go by: fills ``num_prompt``, ``is_pruned``, ``active`` and
    ``limit`` of ``s``, and the current rows of the decodes in every stage.

    Args:
        rows: of all stages; revived rows are left to nobody.
        positions: ``[rows]`` int64, of stage 0.
        share: ``[1]`` int32, most tokens each decode may revive at a boundary.
        num_decodes: the first of the ``batch`` requests.
        revive_rows: rows set aside for revived tokens; 0: nothing is revived in this step.
        always: decodes select at every boundary, though nothing may be revived.
    """
    run = begin_step_triton if positions.is_cuda else begin_step_reference
    run(s, rows, positions, share, num_decodes, batch, revive_rows, always, num_stages)


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
        slot_mapping, slot_position, rows.request, rows.slot, rows.position,
        block_table, block_table.stride(0), num_rows, BLOCK_SIZE=block_size, BLOCK=256,
    )  # fmt: skip


def place_rows_reference(slot_mapping, slot_position, rows, block_table, num_rows, block_size):
    request = rows.request[:num_rows].long()
    slot_mapping[:num_rows] = -1
    at = (request >= 0).nonzero()[:, 0]
    slot = rows.slot[at].long()
    physical = block_table[request[at], slot // block_size].long() * block_size + slot % block_size
    slot_mapping[at] = physical
    slot_position[physical] = rows.position[at].to(torch.int32)


def place_rows(slot_mapping, slot_position, rows, block_table, num_rows, block_size) -> None:
    """Turn each row's slot in a stage into its physical slot in one of the stage's groups.

    Args:
        slot_mapping: ``[rows]`` int64, written; -1 for unused rows.
        slot_position: ``[physical slots]`` int32, written: the position of the key put there.
        rows: ``kernels.state.Rows`` of the stage.
        block_table: ``[batch, width]`` int32 of the group.
    """
    run = place_rows_triton if slot_mapping.is_cuda else place_rows_reference
    run(slot_mapping, slot_position, rows, block_table, num_rows, block_size)


def write_kv(layer, kv_cache, k, v, slot_mapping) -> None:
    """Store keys and values (``[rows, kv_heads, head_dim]``) at physical slots (``[rows]`` int64,
    -1: nowhere) of ``[blocks, kv_heads, block_size, 2 * head_dim]``."""
    if k.is_cuda:
        key_cache, value_cache = kv_cache.transpose(1, 2).chunk(2, dim=-1)
        fa_utils.reshape_and_cache_flash(
            k, v, key_cache, value_cache, slot_mapping, "auto", layer._k_scale, layer._v_scale
        )
        return
    at = (slot_mapping >= 0).nonzero()[:, 0]
    slot = slot_mapping[at]
    block_size = kv_cache.shape[2]
    kv_cache[slot // block_size, :, slot % block_size] = torch.cat([k[at], v[at]], -1)
