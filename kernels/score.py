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

from lazyllm_vllm.kernels.attention import gather_keys, physical_slots
from lazyllm_vllm.kernels.jit import step_jit

LAST = tl.constexpr(4)  # tokens that count in full
EARLIER = tl.constexpr(0.25)  # what the others of the window count for


@step_jit
def _score_kernel(
    token_score_ptr,  # [physical slots of stage 0] fp32
    q_ptr,  # [rows, heads, head_dim]
    q_stride_row,
    query_row_ptr,  # [batch]
    lse_ptr,  # [window, max batch, heads] fp32
    lse_stride,
    kv_ptr,
    kv_stride_block,
    kv_stride_head,
    kv_stride_slot,
    block_table_ptr,
    block_table_stride,
    position_table_ptr,
    position_table_stride,
    key_len_ptr,
    num_prompt_ptr,
    active_ptr,
    slot_position_ptr,
    first_request,
    scale,
    splits,
    PEAK: tl.constexpr,
    ACCUMULATES: tl.constexpr,  # the scores so far count too, by their maximum
    KV_HEADS: tl.constexpr,  # of one program, the third index
    WINDOW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IDENTITY: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = first_request + tl.program_id(0)
    if tl.load(active_ptr + batch) == 0:
        return
    key_len = tl.load(key_len_ptr + batch)
    num_prompt = tl.load(num_prompt_ptr + batch)
    # Queries of one KV head: the heads of its group, of the current token, the one before, ...
    c = tl.arange(0, QUERIES_PAD)
    back = c // GROUP
    c_valid = back < WINDOW
    query_row = tl.load(query_row_ptr + batch) - back
    q_row = q_ptr + query_row.to(tl.int64) * q_stride_row
    d = tl.arange(0, HEAD_PAD)
    d_valid = d < HEAD_DIM

    for j0 in range(tl.program_id(1) * BLOCK_N, key_len, splits * BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        j_valid = j < key_len
        block = tl.load(
            block_table_ptr + batch * block_table_stride + j // BLOCK_SIZE, mask=j_valid, other=0
        ).to(tl.int64)
        if IDENTITY:
            position = j
        else:
            position = tl.load(
                slot_position_ptr + block * BLOCK_SIZE + j % BLOCK_SIZE, mask=j_valid, other=0
            )
        k_at = kv_ptr + block * kv_stride_block + (j % BLOCK_SIZE) * kv_stride_slot
        score = tl.zeros([BLOCK_N], tl.float32)
        for kv_head in range(tl.program_id(2) * KV_HEADS, (tl.program_id(2) + 1) * KV_HEADS):
            head = kv_head * GROUP + c % GROUP
            q = tl.load(
                (q_row + head * HEAD_DIM)[None, :] + d[:, None],
                mask=c_valid[None, :] & d_valid[:, None],
                other=0.0,
            )
            lse = tl.load(
                lse_ptr + back * lse_stride + batch * NUM_HEADS + head, mask=c_valid, other=0.0
            )
            k = tl.load(
                k_at[:, None] + kv_head * kv_stride_head + d[None, :],
                mask=j_valid[:, None] & d_valid[None, :],
                other=0.0,
            )
            logits = tl.dot(k, q, input_precision="ieee") * scale
            seen = c_valid[None, :] & (j[:, None] < (key_len - back)[None, :])
            p = tl.where(seen, tl.exp(logits - lse[None, :]), 0.0)
            if PEAK:
                p = tl.where((back < LAST)[None, :], p, p * EARLIER)
                score = tl.maximum(score, tl.max(p, 1))
            else:
                score += tl.sum(p, 1) / (NUM_HEADS * WINDOW)
        in_prompt = j_valid & (position < num_prompt)
        home = tl.load(
            position_table_ptr + batch * position_table_stride + position // BLOCK_SIZE,
            mask=in_prompt,
            other=0,
        ).to(tl.int64)
        at = token_score_ptr + home * BLOCK_SIZE + position % BLOCK_SIZE
        if ACCUMULATES:
            # Bits of numbers that are not negative are in their order.
            at = at.to(tl.pointer_type(tl.int32), bitcast=True)
            tl.atomic_max(at, score.to(tl.int32, bitcast=True), mask=in_prompt, sem="relaxed")
        else:
            tl.store(at, score, mask=in_prompt)


def score_tokens_triton(
    token_score, q, query_row, lse, kv_cache, block_table, position_table, key_len, num_prompt,
    active, slot_position, first_request, num_requests, scale, stage, peak, accumulates,
):  # fmt: skip
    num_heads, head_dim = q.shape[1:]
    _, num_kv_heads, block_size, _ = kv_cache.shape
    group = num_heads // num_kv_heads
    assert q.stride(1) == head_dim and q.stride(2) == 1 and kv_cache.stride(3) == 1
    assert lse.is_contiguous()
    splits = max(1, 528 // num_requests)
    # Programs that add to what is there may share a key's heads.
    kv_heads = num_kv_heads
    if accumulates:
        kv_heads = next(n for n in range(max(1, num_kv_heads // 8), 99) if num_kv_heads % n == 0)
    window = len(lse)
    _score_kernel[(num_requests, splits, num_kv_heads // kv_heads)](
        token_score, q, q.stride(0), query_row, lse, lse.stride(0),
        kv_cache, kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
        block_table, block_table.stride(0), position_table, position_table.stride(0),
        key_len, num_prompt, active, slot_position, first_request, scale, splits,
        PEAK=peak, ACCUMULATES=accumulates, KV_HEADS=kv_heads, WINDOW=window,
        NUM_HEADS=num_heads, GROUP=group,
        QUERIES_PAD=max(16, triton.next_power_of_2(window * group)),
        HEAD_DIM=head_dim, HEAD_PAD=triton.next_power_of_2(head_dim), BLOCK_SIZE=block_size,
        IDENTITY=stage == 0, BLOCK_N=64, num_warps=4,
    )  # fmt: skip


def score_tokens_reference(
    token_score, q, query_row, lse, kv_cache, block_table, position_table, key_len, num_prompt,
    active, slot_position, first_request, num_requests, scale, stage, peak, accumulates,
):  # fmt: skip
    block_size = kv_cache.shape[2]
    group = q.shape[1] // kv_cache.shape[1]
    for i in range(first_request, first_request + num_requests):
        if not active[i]:
            continue
        slots = torch.arange(int(key_len[i]), device=q.device)
        position = slots
        if stage > 0:
            position = slot_position[physical_slots(block_table[i], slots, block_size)].long()
        k, _ = gather_keys(kv_cache, block_table[i], len(slots))
        attended = []
        for back, row_lse in enumerate(lse[:, i]):
            grouped = q[query_row[i] - back].float().unflatten(0, (-1, group))
            logits = torch.einsum("kgd,jkd->kgj", grouped, k.float()) * scale
            p = (logits.flatten(0, 1) - row_lse[:, None]).exp()
            if peak and back >= LAST.value:
                p *= EARLIER.value
            attended.append(p.where(slots < len(slots) - back, 0.0))
        attended = torch.cat(attended)
        score = attended.amax(0) if peak else attended.mean(0)
        in_prompt = position < num_prompt[i]
        home = physical_slots(position_table[i], position[in_prompt], block_size)
        score = score[in_prompt]
        token_score[home] = score.maximum(token_score[home]) if accumulates else score


def score_tokens(
    token_score: torch.Tensor,
    q: torch.Tensor,
    query_row: torch.Tensor,
    lse: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    position_table: torch.Tensor,
    key_len: torch.Tensor,
    num_prompt: torch.Tensor,
    active: torch.Tensor,
    slot_position: torch.Tensor,
    first_request: int,
    num_requests: int,
    scale: float,
    stage: int,
    peak: bool,
    accumulates: bool,
) -> None:
    """Write the score of every prompt token that has keys in ``stage``, for the active requests
    among ``first_request .. first_request + num_requests - 1``.

    Args:
        token_score: ``[physical slots]`` fp32, written at each position's slot in stage 0.
        q: ``[rows, heads, head_dim]`` of the stage's last layer.
        query_row: ``[batch]`` int32, row of each request's current token.
        lse: ``[window, max batch, heads]`` fp32: of the current token, the one before it, ...
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        block_table, position_table: ``[batch, width]`` int32, of the stage and of stage 0.
        key_len, num_prompt: ``[batch]`` int32.
        active: ``[batch]`` int32; requests with 0 are passed over.
        peak: whether the highest attention counts, earlier tokens' a quarter, or the mean.
        accumulates: whether a score that is there already stays if it is higher.
        slot_position: ``[physical slots]`` int32 (unused in stage 0).
    """
    run = score_tokens_triton if q.is_cuda else score_tokens_reference
    run(
        token_score, q, query_row, lse, kv_cache, block_table, position_table, key_len,
        num_prompt, active, slot_position, first_request, num_requests, scale, stage, peak,
        accumulates,
    )  # fmt: skip


def last_rows_lse(q: torch.Tensor, k: torch.Tensor, scale: float, window: int) -> torch.Tensor:
    """Log-denominators of a prompt's last tokens in causal attention, the last one first.

    Args:
        q, k: ``[n, heads, head_dim]`` and ``[n, kv_heads, head_dim]``.

    Returns:
        ``[window, heads]`` fp32, zeros where the prompt is shorter.
    """
    n, num_heads, _ = q.shape
    window_rows = min(window, n)
    grouped = q[n - window_rows :].float().unflatten(1, (k.shape[1], -1))
    logits = torch.einsum("rkgd,jkd->rkgj", grouped, k.float()) * scale
    row, key = torch.arange(n - window_rows, n), torch.arange(n)
    logits = logits.masked_fill((key > row[:, None])[:, None, None], -torch.inf)
    lse = torch.zeros(window, num_heads)
    lse[:window_rows] = logits.logsumexp(-1).flatten(1).flip(0)
    return lse
