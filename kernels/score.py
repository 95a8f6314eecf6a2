"""Score of each key: the attention that a request's last tokens pay to it.

    p_h,j = exp(q_h . k_g(h),j * scale - lse_h)

in fp32, with ``lse`` the log-denominator of the token's own attention. The paper (section 3.2)
takes the mean over the heads h of the current token. Here a few tokens at the end of the prompt may
be asked, each of which has seen what comes before it (the observation window of SnapKV, arXiv
2404.14469), and the peak over tokens, heads and the layers so far may stand for the mean. In a peak
the last four tokens count in full and those before them for a quarter: what the prompt ends with
says most of what comes next, but a question may stand before a chat template's closing tokens. A
handful of query rows a request are scored, so nothing of size N x N exists.
"""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.paged import StageKeys, load_positions
from lazyllm_vllm.kernels.prompt_pages import state_at
from lazyllm_vllm.kernels.queries import Queries, ScoreRule
from lazyllm_vllm.kernels.selection import Selection

LAST = tl.constexpr(4)  # tokens that count in full
EARLIER = tl.constexpr(0.25)  # what the others of the window count for


@step_jit
def _score_kernel(
    q_ptr,  # [rows, heads, head_dim]
    q_stride_row,
    query_row_ptr,  # [batch]
    lse_ptr,  # [window, max batch, heads] fp32
    lse_stride,
    scale,
    count_ptr,
    later_ptr,
    scored_ptr,
    kv_ptr,
    kv_stride_block,
    kv_stride_head,
    kv_stride_slot,
    keys_table_ptr,
    keys_table_stride,
    num_keys_ptr,
    slot_position_ptr,
    score_ptr,  # a plane of the prompt state, fp32
    state_table_ptr,
    state_table_stride,
    page_stride,
    block_stride,
    num_prompt_ptr,
    active_ptr,
    first_request,
    splits,
    carry,
    PEAK: tl.constexpr,
    ACCUMULATES: tl.constexpr,  # the scores so far count too, by their maximum
    CARRIES: tl.constexpr,  # a share of them does
    KV_HEADS: tl.constexpr,  # of one program, the third index
    WINDOW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,  # of a KV head, so many at a time
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IDENTITY: tl.constexpr,
    PAGES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    SLOT_SIZE: tl.constexpr,
    PER_SLOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = first_request + tl.program_id(0)
    if tl.load(active_ptr + batch) == 0:
        return
    count = tl.load(count_ptr + batch)
    if count == 0:
        return
    later = tl.load(later_ptr + batch)
    scored = tl.load(scored_ptr + batch)
    num_keys = tl.load(num_keys_ptr + batch)
    num_prompt = tl.load(num_prompt_ptr + batch)
    keys_table = keys_table_ptr + batch * keys_table_stride
    state_table = state_table_ptr + batch * state_table_stride
    query_row = tl.load(query_row_ptr + batch)
    d = tl.arange(0, HEAD_PAD)
    d_valid = d < HEAD_DIM

    for j0 in range(tl.program_id(1) * BLOCK_N, num_keys, splits * BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        j_valid = j < num_keys
        block, position = load_positions(
            keys_table, slot_position_ptr, j, j_valid, BLOCK_SIZE, IDENTITY
        )
        k_at = kv_ptr + block * kv_stride_block + (j % BLOCK_SIZE) * kv_stride_slot
        score = tl.zeros([BLOCK_N], tl.float32)
        for kv_head in range(tl.program_id(2) * KV_HEADS, (tl.program_id(2) + 1) * KV_HEADS):
            k = tl.load(
                k_at[:, None] + kv_head * kv_stride_head + d[None, :],
                mask=j_valid[:, None] & d_valid[None, :],
                other=0.0,
            ).to(q_ptr.dtype.element_ty)
            for first in range(0, WINDOW * GROUP, QUERIES):
                # The heads of the KV head's group, of the current token, the one before, ...
                c = first + tl.arange(0, QUERIES)
                back = c // GROUP
                c_valid = back < tl.minimum(count, WINDOW)
                head = kv_head * GROUP + c % GROUP
                q_row = q_ptr + (query_row - back).to(tl.int64) * q_stride_row
                q = tl.load(
                    (q_row + head * HEAD_DIM)[None, :] + d[:, None],
                    mask=c_valid[None, :] & d_valid[:, None],
                    other=0.0,
                )
                lse = tl.load(
                    lse_ptr + back * lse_stride + batch * NUM_HEADS + head, mask=c_valid, other=0.0
                )
                logits = tl.dot(k, q, input_precision="ieee") * scale
                seen = c_valid[None, :] & (j[:, None] < (num_keys - back)[None, :])
                p = tl.where(seen, tl.exp(logits - lse[None, :]), 0.0)
                if PEAK:
                    p = tl.where((back + later < LAST)[None, :], p, p * EARLIER)
                    score = tl.maximum(score, tl.max(p, 1))
                else:
                    score += tl.sum(p, 1) / (NUM_HEADS * WINDOW)
        in_prompt = j_valid & (position < num_prompt)
        at = score_ptr + state_at(
            state_table,
            position,
            in_prompt,
            page_stride,
            block_stride,
            PAGES,
            PER_PAGE,
            SLOT_SIZE,
            PER_SLOT,
        )
        if ACCUMULATES:
            # Bits of numbers that are not negative are in their order.
            at = at.to(tl.pointer_type(tl.int32), bitcast=True)
            tl.atomic_max(at, score.to(tl.int32, bitcast=True), mask=in_prompt, sem="relaxed")
        else:
            if CARRIES:
                before = tl.load(at, mask=in_prompt, other=0.0) * carry
            else:
                before = tl.load(at, mask=in_prompt & (position < scored), other=0.0)
            score = tl.maximum(score, before) if PEAK else score + before
            tl.store(at, score, mask=in_prompt)


def queries_at_once(queries: int, head_pad: int, element_size: int) -> int:
    """Of so many queries of a KV head, those that a program has at a time: 32 KiB of them, which
    Triton copies ahead into shared memory up to three times over."""
    return max(16, min(triton.next_power_of_2(queries), 32768 // (head_pad * element_size)))


def score_tokens_triton(s, queries, keys, batch, active, rule):
    q, lse = queries.q, queries.lse
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = keys.num_heads
    group = num_heads // num_kv_heads
    assert q.stride(1) == head_dim and q.stride(2) == 1 and lse.is_contiguous()
    splits = max(1, 528 // len(batch))
    # Programs that add to what is there may share a key's heads.
    kv_heads = num_kv_heads
    if rule.accumulates:
        kv_heads = next(n for n in range(max(1, num_kv_heads // 8), 99) if num_kv_heads % n == 0)
    window, pages = queries.window, s.state.pages
    head_pad = triton.next_power_of_2(head_dim)
    _score_kernel[(len(batch), splits, num_kv_heads // kv_heads)](
        q,
        q.stride(0),
        queries.row,
        lse,
        lse.stride(0),
        queries.scale * keys.k_scale,
        queries.part.count,
        queries.part.later,
        queries.part.scored,
        *keys.kernel_args,
        s.state.score,
        *pages.kernel_args,
        s.num_prompt,
        active,
        batch.start,
        splits,
        rule.carry,
        PEAK=rule.peak,
        ACCUMULATES=rule.accumulates,
        CARRIES=rule.carry > 0,
        KV_HEADS=kv_heads,
        WINDOW=window,
        NUM_HEADS=num_heads,
        GROUP=group,
        QUERIES=queries_at_once(window * group, head_pad, q.element_size()),
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad,
        BLOCK_N=64,
        num_warps=4,
        **keys.kernel_constants,
        **pages.kernel_constants,
    )


def score_tokens_reference(s, queries, keys, batch, active, rule):
    q, state, part = queries.q, s.state, queries.part
    group = q.shape[1] // keys.num_heads
    for i in batch:
        count, later, scored = (int(x[i]) for x in (part.count, part.later, part.scored))
        if not active[i] or not count:
            continue
        position = keys.positions(i)
        slots = torch.arange(len(position), device=q.device)
        k, _ = keys.gather(i)
        attended = []
        for back, row_lse in enumerate(queries.lse[:count, i]):
            grouped = q[queries.row[i] - back].float().unflatten(0, (-1, group))
            logits = torch.einsum("kgd,jkd->kgj", grouped, k.float()) * queries.scale
            p = (logits.flatten(0, 1) - row_lse[:, None]).exp()
            if rule.peak and back + later >= LAST.value:
                p *= EARLIER.value
            attended.append(p.where(slots < len(slots) - back, 0.0))
        attended = torch.cat(attended)
        score = attended.amax(0) if rule.peak else attended.sum(0) / (q.shape[1] * queries.window)
        in_prompt = position < s.num_prompt[i]
        at = state.at(i, position[in_prompt])
        score, before = score[in_prompt], state.score[at]
        if rule.carry:
            before = before * rule.carry
        elif not rule.accumulates:
            before = before.where(position[in_prompt] < scored, 0.0)
        is_max = rule.peak or rule.accumulates
        state.score[at] = score.maximum(before) if is_max else score + before


def score_tokens(
    s: Selection,
    queries: Queries,
    keys: StageKeys,
    batch: range,
    active: torch.Tensor,
    rule: ScoreRule,
) -> None:
    """Write the score of every prompt token that has keys in the stage, for the active requests of
    ``batch``, to the prompt state.

    Args:
        queries: of the stage's last layer, or, where scores accumulate, of any.
        active: ``[batch]`` int32; requests with 0 are passed over.
    """
    run = score_tokens_triton if queries.q.is_cuda else score_tokens_reference
    run(s, queries, keys, batch, active, rule)
