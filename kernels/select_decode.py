"""Selection for decodes: where the current token's key goes, and which tokens are revived.

The k best of the prompt are this step's selection; those of it that have no keys in the stage yet
are revived, best first, as far as the request's share and the stage's room reach.
"""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.state import Rows, Selection
from lazyllm_vllm.kernels.top_k import (
    NO_CANDIDATE,
    best_mask,
    home_slot,
    home_slots,
    kth_key,
    take_best,
)


@triton.jit
def _select_decode_kernel(
    token_key_ptr,
    level_ptr,
    selected_ptr,
    position_table_ptr,
    position_table_stride,
    table_ptr,  # [requests, 1 + 3 * stages]: num_prompt, kept, room, prompt_keys by stage
    table_stride,
    req_index_ptr,
    is_pruned_ptr,
    positions_ptr,  # [rows] int64
    share_ptr,
    key_len_ptr,
    num_revived_ptr,
    row_position_ptr,
    row_request_ptr,
    row_slot_ptr,
    num_decodes,
    num_stages,
    STAGE: tl.constexpr,
    REVIVES: tl.constexpr,
    STRICT: tl.constexpr,
    MARKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0)
    index = tl.load(req_index_ptr + batch)
    if index < 0:
        tl.store(row_request_ptr + batch, -1)
        tl.store(row_position_ptr + batch, 0)
        tl.store(key_len_ptr + batch, 0)
        tl.store(num_revived_ptr + batch, 0)
        return

    state = table_ptr + index * table_stride
    num_prompt = tl.load(state)
    k = tl.load(state + 1 + STAGE)
    prompt_keys_at = state + 1 + 2 * num_stages + STAGE
    prompt_keys = tl.load(prompt_keys_at)
    position = tl.load(positions_ptr + batch).to(tl.int32)
    own_slot = prompt_keys + position - num_prompt
    tl.store(row_request_ptr + batch, batch)
    tl.store(row_position_ptr + batch, position.to(tl.int64))
    tl.store(row_slot_ptr + batch, own_slot)

    revived = 0
    limit = 0
    if REVIVES:
        share = tl.load(share_ptr)
        room = tl.load(state + 1 + num_stages + STAGE)
        limit = tl.minimum(share, tl.maximum(room - prompt_keys, 0))
    if (tl.load(is_pruned_ptr + batch) != 0) & (MARKS | (limit > 0)):
        table = position_table_ptr + batch * position_table_stride
        threshold, ties = kth_key(token_key_ptr, table, num_prompt, k, BLOCK_SIZE, BLOCK)
        met = 0
        missing = 0
        for p0 in range(0, num_prompt, BLOCK):
            p = p0 + tl.arange(0, BLOCK)
            valid = p < num_prompt
            home = home_slot(table, p, valid, BLOCK_SIZE)
            key = tl.load(token_key_ptr + home, mask=valid, other=-1)
            taken, met = take_best(key, threshold, ties, met)
            if MARKS:
                marked = taken
                if STAGE == 1:
                    marked = valid
                depth = tl.where(taken, STAGE, 0).to(tl.int8)
                tl.store(selected_ptr + home, depth, mask=marked)
            if REVIVES:
                level = tl.load(level_ptr + home, mask=taken, other=127)
                absent = taken & (level == STAGE)
                # From here on the keys rank what may be revived.
                tl.store(token_key_ptr + home, tl.where(absent, key, -1), mask=valid)
                missing += tl.sum(absent.to(tl.int32), 0)
        if REVIVES:
            revived = tl.minimum(missing, limit)
            if revived > 0:
                tl.debug_barrier()  # the keys just stored are read by other threads
                threshold, ties = kth_key(
                    token_key_ptr, table, num_prompt, revived, BLOCK_SIZE, BLOCK
                )
                met = 0
                done = 0
                first_row = num_decodes + batch * tl.load(share_ptr)
                for p0 in range(0, num_prompt, BLOCK):
                    p = p0 + tl.arange(0, BLOCK)
                    valid = p < num_prompt
                    home = home_slot(table, p, valid, BLOCK_SIZE)
                    key = tl.load(token_key_ptr + home, mask=valid, other=-1)
                    taken, met = take_best(key, threshold, ties, met)
                    nth = done + tl.cumsum(taken.to(tl.int32), 0) - 1
                    tl.store(row_position_ptr + first_row + nth, p.to(tl.int64), mask=taken)
                    tl.store(row_request_ptr + first_row + nth, batch, mask=taken)
                    tl.store(row_slot_ptr + first_row + nth, own_slot + 1 + nth, mask=taken)
                    tl.store(level_ptr + home, STAGE + 1, mask=taken)
                    done += tl.sum(taken.to(tl.int32), 0)
                tl.store(prompt_keys_at, prompt_keys + revived)
    tl.store(num_revived_ptr + batch, revived)
    tl.store(key_len_ptr + batch, own_slot + 1 + revived)


def select_decode_triton(
    s, rows, positions, share, num_decodes, stage, num_stages, revives, strict, marks
):
    table = s.position_table
    _select_decode_kernel[(num_decodes,)](
        s.token_key, s.level, s.selected, table, table.stride(0), s.table, s.table.stride(0),
        s.req_index, s.is_pruned, positions, share, rows.key_len, rows.num_revived,
        rows.position, rows.request, rows.slot, num_decodes, num_stages,
        STAGE=stage, REVIVES=revives, STRICT=strict, MARKS=strict or marks, BLOCK_SIZE=s.block_size,
        BLOCK=1024, num_warps=8,
    )  # fmt: skip


def select_decode_reference(
    s, rows, positions, share, num_decodes, stage, num_stages, revives, strict, marks
):
    for i in range(num_decodes):
        index = int(s.req_index[i])
        if index < 0:
            rows.request[i] = -1
            rows.position[i] = rows.key_len[i] = rows.num_revived[i] = 0
            continue
        state = s.table[index]
        num_prompt = int(state[0])
        k, room, prompt_keys = state[1:].view(3, num_stages)[:, stage].tolist()
        own_slot = prompt_keys + int(positions[i]) - num_prompt
        rows.request[i] = i
        rows.position[i] = positions[i]
        rows.slot[i] = own_slot
        revived = 0
        limit = min(int(share), max(room - prompt_keys, 0)) if revives else 0
        if s.is_pruned[i] and (strict or marks or limit > 0):
            home = home_slots(s, i)
            key = s.token_key[home]
            best = best_mask(key, k)
            if strict or marks:
                marked = torch.ones_like(best) if stage == 1 else best
                s.selected[home[marked]] = (stage * best[marked]).to(torch.int8)
            absent = best & (s.level[home] == stage)
            revived = min(int(absent.sum()), limit)
            chosen = best_mask(key.where(absent, NO_CANDIDATE), revived).nonzero()[:, 0]
            first = num_decodes + i * int(share)
            mine = slice(first, first + revived)
            rows.position[mine] = chosen
            rows.request[mine] = i
            rows.slot[mine] = own_slot + 1 + torch.arange(revived, device=rows.slot.device).int()
            s.level[home[chosen]] = stage + 1
            state[1 + 2 * num_stages + stage] += revived
        rows.num_revived[i] = revived
        rows.key_len[i] = own_slot + 1 + revived


def select_decode(
    s: Selection,
    rows: Rows,
    positions: torch.Tensor,
    share: torch.Tensor,
    num_decodes: int,
    stage: int,
    num_stages: int,
    revives: bool,
    strict: bool,
    marks: bool,
) -> None:
    """Place each decode's current row in ``stage`` and choose the tokens to revive there.

    Fills the decode and revived parts of ``rows`` (whose ``request`` must hold -1 for revived rows
    beforehand), and updates ``level``, ``selected`` and the requests' ``prompt_keys``.

    Args:
        positions: ``[rows]`` int64 of the current tokens.
        share: ``[1]`` int32, most tokens each request may revive here.
        revives: whether there is an Aux Cache to revive from.
        marks: write ``selected`` even when not ``strict``.
    """
    run = select_decode_triton if s.token_key.is_cuda else select_decode_reference
    run(s, rows, positions, share, num_decodes, stage, num_stages, revives, strict, marks)
