"""The start of a step: whose rows there are in stage 0, and what each boundary will do."""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.selection import Rows, Segments, Selection


@step_jit
def _begin_step_kernel(
    num_prompt_ptr,
    is_pruned_ptr,
    state_room_ptr,
    revivable_ptr,
    active_ptr,  # [stages, max batch]
    limit_ptr,  # [stages, max batch]
    turn_limit_ptr,  # [stages, max batch]
    turn_row_ptr,
    turn_end_ptr,
    index_ptr,
    prompts_ptr,  # the columns of PromptCounts
    rooms_ptr,
    kept_ptr,
    capacity_ptr,
    prompt_keys_ptr,
    counts_stride,
    positions_ptr,  # [rows of stage 0] int64
    quota_ptr,
    first_row_ptr,
    num_keys_ptr,  # [stages, max batch]
    num_revived_ptr,  # [stages, max batch]
    row_position_ptr,  # [stages, max rows] int64
    row_request_ptr,
    row_slot_ptr,
    row_source_ptr,
    start_ptr,  # [prefills + 1]
    prefill_base,
    max_batch,
    max_rows,
    num_decodes,
    num_turns,
    turn_quota,
    revive_rows,
    marks_always,
    num_stages,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0)
    index = tl.load(index_ptr + batch)
    counts = tl.maximum(index, 0).to(tl.int64) * counts_stride
    num_prompt = tl.load(prompts_ptr + counts)
    if index < 0:
        num_prompt = 0
    last = tl.load(kept_ptr + counts + num_stages - 1)
    pruned = (last < num_prompt).to(tl.int32)

    if batch >= num_decodes:
        if tl.program_id(1) == 0:
            tl.store(num_prompt_ptr + batch, num_prompt)
            tl.store(is_pruned_ptr + batch, pruned)
            tl.store(state_room_ptr + batch, tl.load(rooms_ptr + counts))
            tl.store(revivable_ptr + batch, num_prompt)
        nth = batch - num_decodes
        start = tl.load(start_ptr + nth)
        end = tl.load(start_ptr + nth + 1)
        step = tl.num_programs(1) * BLOCK
        for j0 in range(start + tl.program_id(1) * BLOCK, end, step):
            row = prefill_base + j0 + tl.arange(0, BLOCK)
            valid = row < prefill_base + end
            position = tl.load(positions_ptr + row, mask=valid)
            tl.store(row_position_ptr + row, position, mask=valid)
            tl.store(row_request_ptr + row, tl.where(index < 0, -1, batch), mask=valid)
        return

    if tl.program_id(1) > 0:
        return
    tl.store(num_prompt_ptr + batch, num_prompt)
    tl.store(is_pruned_ptr + batch, pruned)
    tl.store(state_room_ptr + batch, tl.load(rooms_ptr + counts))
    position = tl.load(positions_ptr + batch)
    if index < 0:
        position = position * 0
    quota = tl.load(quota_ptr)
    more = tl.minimum(batch, num_turns) * (turn_quota - quota)
    tl.store(first_row_ptr + batch, num_decodes + batch * quota + more)
    is_turn = batch < num_turns
    turn_row = tl.load(turn_row_ptr + batch, mask=is_turn, other=-1)
    is_elsewhere = turn_row >= 0
    turn_end = tl.load(turn_end_ptr + batch, mask=is_turn, other=0)
    tl.store(revivable_ptr + batch, tl.where(is_turn, turn_end, num_prompt))
    any_active = 0
    for stage in range(num_stages):
        at = stage * max_batch + batch
        prompt_keys = tl.load(prompt_keys_ptr + counts + stage)
        slot = prompt_keys + position.to(tl.int32) - num_prompt
        turn_limit = tl.load(turn_limit_ptr + at, mask=is_turn, other=0)
        slot += turn_limit  # what a turn revives stands before its tokens
        is_none = (index < 0) | (is_elsewhere & (stage == 0))
        tl.store(num_keys_ptr + at, tl.where(is_none, 0, slot + 1))
        tl.store(num_revived_ptr + at, 0)
        row = stage * max_rows + batch
        tl.store(row_position_ptr + row, position)
        tl.store(row_request_ptr + row, tl.where(index < 0, -1, batch))
        tl.store(row_slot_ptr + row, slot)
        tl.store(row_source_ptr + row, tl.where(is_elsewhere & (stage == 1), turn_row, batch))
        if stage > 0:
            left = tl.load(capacity_ptr + counts + stage) - prompt_keys
            limit = 0
            if revive_rows > 0:
                limit = tl.minimum(quota, tl.maximum(left, 0))
                limit = tl.where(is_turn, turn_limit, limit)
            active = (pruned != 0) & ((marks_always != 0) | (limit > 0))
            tl.store(limit_ptr + at, limit)
            tl.store(active_ptr + at, active.to(tl.int32))
            any_active |= active.to(tl.int32)
            # Rows set aside for revived tokens are nobody's until a token is chosen.
            for unused in range(batch, revive_rows, num_decodes):
                row = stage * max_rows + num_decodes + unused
                tl.store(row_request_ptr + row, -1)
                tl.store(row_position_ptr + row, position * 0)
                tl.store(row_source_ptr + row, -1)
    tl.store(active_ptr + batch, any_active)


def begin_step_triton(s, rows, positions, segments, num_decodes, turns, revive_rows, marks_always):
    num_turns, turn_quota = turns
    block, splits = 1024, 1
    if segments.count:
        splits = max(1, min(64, triton.cdiv(len(positions), block * segments.count)))
    counts = s.counts
    _begin_step_kernel[(num_decodes + segments.count, splits)](
        s.num_prompt,
        s.is_pruned,
        s.state_room,
        s.revivable,
        s.active,
        s.limit,
        s.turn_limit,
        s.turn_row,
        s.turn_end,
        s.index,
        counts.num_prompt,
        counts.state_room,
        counts.kept,
        counts.capacity,
        counts.prompt_keys,
        counts.stride,
        positions,
        s.quota,
        s.first_row,
        rows.num_keys,
        rows.num_revived,
        rows.position,
        rows.request,
        rows.slot,
        rows.source,
        segments.start,
        segments.base,
        s.active.shape[1],
        rows.position.shape[1],
        num_decodes,
        num_turns,
        turn_quota,
        revive_rows,
        int(marks_always),
        s.num_stages,
        BLOCK=block,
        num_warps=4,
    )


def begin_step_reference(
    s, rows, positions, segments, num_decodes, turns, revive_rows, marks_always
):
    num_turns, turn_quota = turns
    n, batch = num_decodes, num_decodes + segments.count
    real = s.index[:batch] >= 0
    index = s.index[:batch].clamp(min=0).long()
    kept, capacity, prompt_keys = (
        x[index] for x in (s.counts.kept, s.counts.capacity, s.counts.prompt_keys)
    )
    s.num_prompt[:batch] = s.counts.num_prompt[index] * real
    s.state_room[:batch] = s.counts.state_room[index]
    s.revivable[:batch] = s.num_prompt[:batch]
    s.revivable[:num_turns] = s.turn_end[:num_turns]
    s.is_pruned[:batch] = kept[:, -1] < s.num_prompt[:batch]
    pruned = s.is_pruned[:batch].bool()
    for nth in range(segments.count):
        mine = segments.of(nth)
        rows.position[0, mine] = positions[mine]
        rows.request[0, mine] = n + nth if real[n + nth] else -1
    if n == 0:
        return
    position = positions[:n] * real[:n]
    slot = (prompt_keys[:n].T + position - s.num_prompt[:n]).int()
    slot[:, :num_turns] += s.turn_limit[:, :num_turns]
    rows.num_keys[:, :n] = (slot + 1) * real[:n]
    turn_row = s.turn_row[:num_turns]
    is_elsewhere = turn_row >= 0
    rows.num_keys[0, :num_turns] *= ~is_elsewhere
    rows.num_revived[:, :n] = 0
    rows.position[:, :n] = position
    rows.request[:, :n] = torch.arange(n, device=real.device).where(real[:n], -1).int()
    rows.slot[:, :n] = slot
    rows.source[:, :n] = torch.arange(n, device=real.device).int()
    rows.source[1:2, :num_turns] = turn_row.where(is_elsewhere, rows.source[1, :num_turns])
    most = int(s.quota) if revive_rows else 0
    s.limit[1:, :n] = (capacity - prompt_keys)[:n, 1:].T.clamp(0, most)
    if revive_rows:
        s.limit[1:, :num_turns] = s.turn_limit[1:, :num_turns]
    before = torch.arange(n, device=real.device)
    more = before.clamp(max=num_turns) * (turn_quota - s.quota)
    s.first_row[:n] = n + before * s.quota + more
    s.active[1:, :n] = (pruned[:n] & ((s.limit[1:, :n] > 0) | bool(marks_always))).int()
    s.active[0, :n] = s.active[1:, :n].amax(0)
    for tensor, unused in ((rows.request, -1), (rows.position, 0), (rows.source, -1)):
        tensor[1:, n : n + revive_rows] = unused


def begin_step(
    s: Selection,
    rows: Rows,
    positions: torch.Tensor,
    segments: Segments,
    num_decodes: int,
    turns: tuple[int, int],
    revive_rows: int,
    marks_always: bool,
) -> None:
    """Fill what the boundaries of a step go by: ``num_prompt``, ``is_pruned``, ``state_room`` and
    ``revivable`` of ``s``, of decodes ``active`` and ``limit`` too; the decodes' rows in every
    stage; the prefills' position and request in stage 0.

    A turn goes on from what an earlier request left. Its last token is a decode that revives as
    many tokens as ``s.turn_limit`` says, the best of those before ``s.turn_end`` without keys. They
    have the slots before those of the turn's last ``s.turn_tokens`` tokens, all of which see them.
    In stage 0 that token may be a prefill's row, ``s.turn_row``: the decode has no keys there, and
    in stage 1 goes on from that row.

    Args:
        rows: of all stages; revived rows are left to nobody.
        positions: ``[rows]`` int64, of stage 0.
        segments: the prefills' rows in stage 0.
        num_decodes: requests with one row, first in the batch.
        turns: how many of these are the last tokens of turns, the first of all, and the rows set
            aside for what each revives.
        revive_rows: rows set aside for revived tokens; 0: nothing is revived in this step.
        marks_always: decodes select at every boundary, though nothing may be revived.
    """
    run = begin_step_triton if positions.is_cuda else begin_step_reference
    run(s, rows, positions, segments, num_decodes, turns, revive_rows, marks_always)
