"""Selection for prefills: which rows of the stage before go on, in order of position."""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.attention import physical_slots
from lazyllm_vllm.kernels.state import PrefillMove, Rows, Selection
from lazyllm_vllm.kernels.top_k import best_mask, home_slot, home_slots, kth_key, take_best


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
                home = home_slot(table, position, valid, BLOCK_SIZE)
                tl.store(level_ptr + home, STAGE + 1, mask=valid)
        return

    num_prompt = tl.load(num_prompt_ptr + batch)
    threshold, ties = kth_key(token_key_ptr, table, num_prompt, k, BLOCK_SIZE, BLOCK)
    met = 0
    num_seen = 0
    num_kept = 0
    for p0 in range(0, num_prompt, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        valid = p < num_prompt
        home = home_slot(table, p, valid, BLOCK_SIZE)
        key = tl.load(token_key_ptr + home, mask=valid, other=-1)
        candidate = key >= 0
        kept, met = take_best(key, threshold, ties, met)
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
            home = home_slots(s, i)
            kept = best_mask(s.token_key[home], dst1 - dst0)[position]
        rows.position[dst0:dst1] = position[kept]
        src.dst_row[src0:src1] = (dst0 + kept.cumsum(0) - 1).where(kept, -1).to(torch.int32)
        if s.is_pruned[i]:
            home = physical_slots(s.position_table[i], position, s.block_size)
            s.level[home] = (stage + kept.to(torch.int8)).to(torch.int8)


def select_prefill(
    s: Selection, rows: Rows, src: PrefillMove, num_decodes: int, stage: int
) -> None:
    """Choose each prefill's rows of ``stage``: fills their part of ``rows``, ``src.dst_row``,
    ``src.request`` and ``level``. How many are kept is ``dst_start``'s to say."""
    run = select_prefill_triton if s.token_key.is_cuda else select_prefill_reference
    run(s, rows, src, num_decodes, stage)
