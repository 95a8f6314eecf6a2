"""Selection of the k best prompt tokens at a boundary, in order of position.

    key(p) = highest score of the candidates within score_pool // 2 positions of p
    kept   = the k best candidates by (key descending, position ascending)

The first and last tokens of the prompt rank above every score. Scores are never negative, so the
bits of a float32 order as the float does: keys are int32, -1 for a position that is no candidate,
and the k-th largest is found by a radix search, 8 bits a pass. Nothing is sorted.
"""

from dataclasses import dataclass

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.attention import physical_slots

ALWAYS_KEPT = 0x7F800000  # the bits of infinity: above every score
NO_CANDIDATE = -1


@triton.jit
def _home(position_table_row, position, mask, BLOCK_SIZE: tl.constexpr):
    """Physical slot in stage 0 of each position."""
    block = tl.load(position_table_row + position // BLOCK_SIZE, mask=mask, other=0)
    return block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE


@triton.jit
def _is_candidate(level_ptr, selected_ptr, home, mask, STAGE: tl.constexpr, STRICT: tl.constexpr):
    """Whether positions have keys in the stage before the boundary (and, when strict, are in this
    step's selection of that stage). All have keys in stage 0."""
    candidate = mask
    if STAGE > 1:
        candidate &= tl.load(level_ptr + home, mask=mask, other=0) >= STAGE
        if STRICT:
            candidate &= tl.load(selected_ptr + home, mask=mask, other=0) >= STAGE - 1
    return candidate


@triton.jit
def _rank_kernel(
    token_key_ptr,
    token_score_ptr,
    level_ptr,
    selected_ptr,
    position_table_ptr,
    position_table_stride,
    num_prompt_ptr,
    is_pruned_ptr,
    first_tokens,
    last_tokens,
    STAGE: tl.constexpr,
    POOL: tl.constexpr,
    STRICT: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0)
    if tl.load(is_pruned_ptr + batch) == 0:
        return
    num_prompt = tl.load(num_prompt_ptr + batch)
    table = position_table_ptr + batch * position_table_stride
    for p0 in range(tl.program_id(1) * BLOCK, num_prompt, NUM_SPLITS * BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        valid = p < num_prompt
        best = tl.full([BLOCK], -1.0, tl.float32)
        own = valid
        for shift in range(-(POOL // 2), POOL // 2 + 1):
            near = p + shift
            mask = (near >= 0) & (near < num_prompt)
            home = _home(table, near, mask, BLOCK_SIZE)
            candidate = _is_candidate(level_ptr, selected_ptr, home, mask, STAGE, STRICT)
            score = tl.load(token_score_ptr + home, mask=candidate, other=-1.0)
            best = tl.maximum(best, tl.where(score >= 0, score, -1.0))
            if shift == 0:
                own = candidate
        key = tl.maximum(best, 0.0).to(tl.int32, bitcast=True)
        always = (p < first_tokens) | (p >= num_prompt - last_tokens)
        key = tl.where(always, 0x7F800000, key)
        home = _home(table, p, valid, BLOCK_SIZE)
        tl.store(token_key_ptr + home, tl.where(own, key, -1), mask=valid)


@triton.jit
def _threshold(token_key_ptr, table, num_prompt, k, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The k-th largest key, and how many keys equal to it are among the k (all of them, at
    threshold 0, when there are fewer than k)."""
    bins = tl.arange(0, 256)
    prefix = 0
    remaining = k
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([256], tl.int32)
        for p0 in range(0, num_prompt, BLOCK):
            p = p0 + tl.arange(0, BLOCK)
            valid = p < num_prompt
            home = _home(table, p, valid, BLOCK_SIZE)
            key = tl.load(token_key_ptr + home, mask=valid, other=-1)
            if step == 0:
                valid = valid & (key >= 0)
            else:
                valid = valid & (key >= 0) & ((key >> (shift + 8)) == prefix)
            counts += tl.histogram((key >> shift) & 255, 256, mask=valid)
        # Keys in this bin or a higher one.
        suffix = tl.cumsum(counts, 0, reverse=True)
        if step == 0:
            remaining = tl.minimum(remaining, tl.max(suffix, 0))
        digit = tl.maximum(tl.sum((suffix >= remaining).to(tl.int32), 0) - 1, 0)
        remaining -= tl.sum(tl.where(bins > digit, counts, 0), 0)
        prefix = (prefix << 8) | digit
    return prefix, remaining


@triton.jit
def _take(key, threshold, ties, ties_before):
    """Which of a tile's keys are among the k best, and how many ties were met so far."""
    tie = key == threshold
    order = ties_before + tl.cumsum(tie.to(tl.int32), 0)
    taken = (key > threshold) | (tie & (order <= ties))
    return taken, ties_before + tl.sum(tie.to(tl.int32), 0)


@triton.jit
def _select_prefill_kernel(
    token_key_ptr,
    level_ptr,
    position_table_ptr,
    position_table_stride,
    is_pruned_ptr,
    src_start_ptr,  # [prefills + 1] rows of the stage before, within its prefill rows
    dst_start_ptr,  # [prefills + 1] rows of the stage
    src_position_ptr,  # [rows of the stage before] int64
    dst_row_ptr,  # [rows of the stage before]
    src_request_ptr,
    row_position_ptr,
    row_request_ptr,
    row_slot_ptr,
    num_prompt_ptr,
    req_index_ptr,
    src_base,
    dst_base,
    num_decodes,
    STAGE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    nth = tl.program_id(0)
    batch = num_decodes + nth
    real = tl.load(req_index_ptr + batch) >= 0
    request = tl.where(real, batch, -1)
    is_pruned = tl.load(is_pruned_ptr + batch) != 0
    table = position_table_ptr + batch * position_table_stride
    src = src_base + tl.load(src_start_ptr + nth)
    dst = dst_base + tl.load(dst_start_ptr + nth)
    num_src = tl.load(src_start_ptr + nth + 1) - tl.load(src_start_ptr + nth)
    k = tl.load(dst_start_ptr + nth + 1) - tl.load(dst_start_ptr + nth)

    if k == num_src:
        for j0 in range(0, num_src, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            valid = j < num_src
            position = tl.load(src_position_ptr + src + j, mask=valid, other=0)
            tl.store(dst_row_ptr + src + j, dst + j, mask=valid)
            tl.store(src_request_ptr + src + j, request, mask=valid)
            tl.store(row_position_ptr + dst + j, position, mask=valid)
            tl.store(row_request_ptr + dst + j, request, mask=valid)
            tl.store(row_slot_ptr + dst + j, j, mask=valid)
            if is_pruned:
                home = _home(table, position, valid, BLOCK_SIZE)
                tl.store(level_ptr + home, STAGE + 1, mask=valid)
        return

    num_prompt = tl.load(num_prompt_ptr + batch)
    threshold, ties = _threshold(token_key_ptr, table, num_prompt, k, BLOCK_SIZE, BLOCK)
    met = 0
    num_seen = 0
    num_kept = 0
    for p0 in range(0, num_prompt, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        valid = p < num_prompt
        home = _home(table, p, valid, BLOCK_SIZE)
        key = tl.load(token_key_ptr + home, mask=valid, other=-1)
        candidate = key >= 0
        kept, met = _take(key, threshold, ties, met)
        from_row = src + num_seen + tl.cumsum(candidate.to(tl.int32), 0) - 1
        slot = num_kept + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(dst_row_ptr + from_row, tl.where(kept, dst + slot, -1), mask=candidate)
        tl.store(src_request_ptr + from_row, request, mask=candidate)
        tl.store(row_position_ptr + dst + slot, p.to(tl.int64), mask=kept)
        tl.store(row_request_ptr + dst + slot, request, mask=kept)
        tl.store(row_slot_ptr + dst + slot, slot, mask=kept)
        level = tl.where(kept, STAGE + 1, STAGE).to(tl.int8)
        tl.store(level_ptr + home, level, mask=candidate)
        num_seen += tl.sum(candidate.to(tl.int32), 0)
        num_kept += tl.sum(kept.to(tl.int32), 0)


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
        threshold, ties = _threshold(token_key_ptr, table, num_prompt, k, BLOCK_SIZE, BLOCK)
        met = 0
        missing = 0
        for p0 in range(0, num_prompt, BLOCK):
            p = p0 + tl.arange(0, BLOCK)
            valid = p < num_prompt
            home = _home(table, p, valid, BLOCK_SIZE)
            key = tl.load(token_key_ptr + home, mask=valid, other=-1)
            taken, met = _take(key, threshold, ties, met)
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
                threshold, ties = _threshold(
                    token_key_ptr, table, num_prompt, revived, BLOCK_SIZE, BLOCK
                )
                met = 0
                done = 0
                first_row = num_decodes + batch * tl.load(share_ptr)
                for p0 in range(0, num_prompt, BLOCK):
                    p = p0 + tl.arange(0, BLOCK)
                    valid = p < num_prompt
                    home = _home(table, p, valid, BLOCK_SIZE)
                    key = tl.load(token_key_ptr + home, mask=valid, other=-1)
                    taken, met = _take(key, threshold, ties, met)
                    nth = done + tl.cumsum(taken.to(tl.int32), 0) - 1
                    tl.store(row_position_ptr + first_row + nth, p.to(tl.int64), mask=taken)
                    tl.store(row_request_ptr + first_row + nth, batch, mask=taken)
                    tl.store(row_slot_ptr + first_row + nth, own_slot + 1 + nth, mask=taken)
                    tl.store(level_ptr + home, STAGE + 1, mask=taken)
                    done += tl.sum(taken.to(tl.int32), 0)
                tl.store(prompt_keys_at, prompt_keys + revived)
    tl.store(num_revived_ptr + batch, revived)
    tl.store(key_len_ptr + batch, own_slot + 1 + revived)


@dataclass(frozen=True)
class Selection:
    """What every selection kernel of a step is given.

    Attributes:
        token_key: ``[physical slots]`` int32, rank of each prompt position, written.
        token_score: ``[physical slots]`` fp32.
        level: ``[physical slots]`` int8, number of stages in which the position has keys.
        selected: ``[physical slots]`` int8, last boundary at which this step selected it.
        position_table: ``[batch, width]`` int32, block table of stage 0.
        table: ``[requests, 1 + 3 * stages]`` int32, see ``lazyllm_vllm.request_table``.
        req_index: ``[batch]`` int32, row of ``table``; -1: no request.
        num_prompt, is_pruned: ``[batch]`` int32.
        block_size: tokens a block of stage 0.
    """

    token_key: torch.Tensor
    token_score: torch.Tensor
    level: torch.Tensor
    selected: torch.Tensor
    position_table: torch.Tensor
    table: torch.Tensor
    req_index: torch.Tensor
    num_prompt: torch.Tensor
    is_pruned: torch.Tensor
    block_size: int


@dataclass(frozen=True)
class Rows:
    """The rows of one stage: ``[decodes | revived | prefill tokens]``.

    Attributes:
        position: ``[rows]`` int64.
        request: ``[rows]`` int32, batch index; -1: an unused row.
        slot: ``[rows]`` int32, slot in the stage.
        key_len: ``[batch]`` int32, keys of each request in the stage.
        num_revived: ``[batch]`` int32.
    """

    position: torch.Tensor
    request: torch.Tensor
    slot: torch.Tensor
    key_len: torch.Tensor
    num_revived: torch.Tensor


def rank_tokens_triton(
    s, first_request, num_requests, stage, strict, pool, first_tokens, last_tokens
):
    splits = max(1, min(32, 528 // num_requests))
    table = s.position_table[first_request:]
    _rank_kernel[(num_requests, splits)](
        s.token_key, s.token_score, s.level, s.selected, table, table.stride(0),
        s.num_prompt[first_request:], s.is_pruned[first_request:],
        first_tokens, last_tokens, STAGE=stage,
        POOL=pool, STRICT=strict, NUM_SPLITS=splits, BLOCK_SIZE=s.block_size, BLOCK=512,
        num_warps=4,
    )  # fmt: skip


def _candidates(s, i, home, stage, strict):
    if stage == 1:
        return torch.ones_like(home, dtype=torch.bool)
    candidate = s.level[home] >= stage
    if strict:
        candidate &= s.selected[home] >= stage - 1
    return candidate


def _homes(s, i):
    """Physical slots in stage 0 of request i's prompt, in order of position."""
    position = torch.arange(int(s.num_prompt[i]), device=s.token_key.device)
    return physical_slots(s.position_table[i], position, s.block_size)


def rank_tokens_reference(
    s, first_request, num_requests, stage, strict, pool, first_tokens, last_tokens
):
    for i in range(first_request, first_request + num_requests):
        if not s.is_pruned[i]:
            continue
        home = _homes(s, i)
        candidate = _candidates(s, i, home, stage, strict)
        score = s.token_score[home].where(candidate, -1.0)
        score = score.where(score >= 0, -1.0)
        score = torch.nn.functional.max_pool1d(score[None], pool, 1, pool // 2)[0]
        key = score.clamp(min=0).view(torch.int32)
        key[:first_tokens] = ALWAYS_KEPT
        key[max(len(key) - last_tokens, 0) :] = ALWAYS_KEPT
        s.token_key[home] = key.where(candidate, NO_CANDIDATE)


def _best(key: torch.Tensor, k: int) -> torch.Tensor:
    """Mask of the k best keys by (key descending, position ascending), no candidates left out."""
    order = torch.sort(key, descending=True, stable=True).indices[:k]
    best = torch.zeros_like(key, dtype=torch.bool)
    best[order] = True
    return best & (key >= 0)


def select_prefill_triton(s, rows, src, num_decodes, stage):
    num_prefills = len(src.start) - 1
    table = s.position_table
    _select_prefill_kernel[(num_prefills,)](
        s.token_key, s.level, table, table.stride(0), s.is_pruned, src.start, src.dst_start,
        src.position, src.dst_row, src.request, rows.position, rows.request, rows.slot,
        s.num_prompt, s.req_index, src.base, src.dst_base, num_decodes,
        STAGE=stage, BLOCK_SIZE=s.block_size, BLOCK=1024, num_warps=8,
    )  # fmt: skip


def select_prefill_reference(s, rows, src, num_decodes, stage):
    for nth in range(len(src.start) - 1):
        i = num_decodes + nth
        request = i if s.req_index[i] >= 0 else -1
        src0, src1 = (src.base + int(x) for x in src.start[nth : nth + 2])
        dst0, dst1 = (src.dst_base + int(x) for x in src.dst_start[nth : nth + 2])
        src.request[src0:src1] = request
        rows.request[dst0:dst1] = request
        rows.slot[dst0:dst1] = torch.arange(dst1 - dst0, device=rows.slot.device)
        position = src.position[src0:src1]
        kept = torch.ones_like(position, dtype=torch.bool)
        if dst1 - dst0 < src1 - src0:
            home = _homes(s, i)
            kept = _best(s.token_key[home], dst1 - dst0)[position]
        rows.position[dst0:dst1] = position[kept]
        src.dst_row[src0:src1] = (dst0 + kept.cumsum(0) - 1).where(kept, -1).to(torch.int32)
        if s.is_pruned[i]:
            home = physical_slots(s.position_table[i], position, s.block_size)
            s.level[home] = (stage + kept.to(torch.int8)).to(torch.int8)


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
            home = _homes(s, i)
            key = s.token_key[home]
            best = _best(key, k)
            if strict or marks:
                marked = torch.ones_like(best) if stage == 1 else best
                s.selected[home[marked]] = (stage * best[marked]).to(torch.int8)
            absent = best & (s.level[home] == stage)
            revived = min(int(absent.sum()), limit)
            chosen = _best(key.where(absent, NO_CANDIDATE), revived).nonzero()[:, 0]
            first = num_decodes + i * int(share)
            mine = slice(first, first + revived)
            rows.position[mine] = chosen
            rows.request[mine] = i
            rows.slot[mine] = own_slot + 1 + torch.arange(revived, device=rows.slot.device).int()
            s.level[home[chosen]] = stage + 1
            state[1 + 2 * num_stages + stage] += revived
        rows.num_revived[i] = revived
        rows.key_len[i] = own_slot + 1 + revived


@dataclass(frozen=True)
class PrefillMove:
    """How prefill rows go from the stage before a boundary to the stage after it.

    Attributes:
        start, dst_start: ``[prefills + 1]`` int32, first row of each request before and after,
            counted from ``base`` and ``dst_base``.
        position: ``[rows before]`` int64.
        dst_row: ``[rows before]`` int32, written: the row after, -1 if dropped.
        request: ``[rows before]`` int32, written: batch index.
    """

    start: torch.Tensor
    dst_start: torch.Tensor
    base: int
    dst_base: int
    position: torch.Tensor
    dst_row: torch.Tensor
    request: torch.Tensor


def rank_tokens(
    s: Selection,
    first_request: int,
    num_requests: int,
    stage: int,
    strict: bool,
    pool: int,
    first_tokens: int,
    last_tokens: int,
) -> None:
    """Turn scores into keys for the boundary before ``stage``, for the pruned requests among
    ``first_request .. first_request + num_requests - 1``."""
    run = rank_tokens_triton if s.token_key.is_cuda else rank_tokens_reference
    run(s, first_request, num_requests, stage, strict, pool, first_tokens, last_tokens)


def select_prefill(
    s: Selection, rows: Rows, src: PrefillMove, num_decodes: int, stage: int
) -> None:
    """Choose each prefill's rows of ``stage``: fills their part of ``rows``, ``src.dst_row``,
    ``src.request`` and ``level``. How many are kept is ``dst_start``'s to say."""
    run = select_prefill_triton if s.token_key.is_cuda else select_prefill_reference
    run(s, rows, src, num_decodes, stage)


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
