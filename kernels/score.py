"""Score of each key: the attention that a request's current token pays to it.

    score_j = mean_h exp(q_h . k_g(h),j * scale - lse_h)

in fp32, with ``lse`` the log-denominator of the current token's own attention (paper, section 3.2).
One query row a request is scored, so nothing of size N x N exists.
"""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.attention import gather_keys, physical_slots


@triton.jit
def _score_kernel(
    token_score_ptr,  # [physical slots of stage 0] fp32
    q_ptr,  # [rows, heads, head_dim]
    q_stride_row,
    query_row_ptr,  # [batch]
    lse_ptr,  # [batch, heads] fp32
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
    scale,
    splits,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IDENTITY: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = tl.program_id(0)
    if tl.load(active_ptr + batch) == 0:
        return
    key_len = tl.load(key_len_ptr + batch)
    num_prompt = tl.load(num_prompt_ptr + batch)
    q_row = q_ptr + tl.load(query_row_ptr + batch).to(tl.int64) * q_stride_row
    g = tl.arange(0, GROUP_PAD)
    g_valid = g < GROUP
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
        for kv_head in range(NUM_HEADS // GROUP):
            head = kv_head * GROUP + g
            q = tl.load(
                q_row + head[None, :] * HEAD_DIM + d[:, None],
                mask=g_valid[None, :] & d_valid[:, None],
                other=0.0,
            )
            lse = tl.load(lse_ptr + batch * NUM_HEADS + head, mask=g_valid, other=0.0)
            k = tl.load(
                k_at[:, None] + kv_head * kv_stride_head + d[None, :],
                mask=j_valid[:, None] & d_valid[None, :],
                other=0.0,
            )
            logits = tl.dot(k, q, input_precision="ieee") * scale
            p = tl.where(g_valid[None, :], tl.exp(logits - lse[None, :]), 0.0)
            score += tl.sum(p, 1)
        in_prompt = j_valid & (position < num_prompt)
        home = tl.load(
            position_table_ptr + batch * position_table_stride + position // BLOCK_SIZE,
            mask=in_prompt,
            other=0,
        ).to(tl.int64)
        tl.store(
            token_score_ptr + home * BLOCK_SIZE + position % BLOCK_SIZE,
            score / NUM_HEADS,
            mask=in_prompt,
        )


def score_tokens_triton(
    token_score, q, query_row, lse, kv_cache, block_table, position_table, key_len, num_prompt,
    active, slot_position, batch, scale, stage,
):  # fmt: skip
    num_heads, head_dim = q.shape[1:]
    _, num_kv_heads, block_size, _ = kv_cache.shape
    group = num_heads // num_kv_heads
    assert q.stride(1) == head_dim and q.stride(2) == 1 and kv_cache.stride(3) == 1
    assert lse.is_contiguous()
    splits = max(1, 528 // batch)
    _score_kernel[(batch, splits)](
        token_score, q, q.stride(0), query_row, lse,
        kv_cache, kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
        block_table, block_table.stride(0), position_table, position_table.stride(0),
        key_len, num_prompt, active, slot_position, scale, splits,
        NUM_HEADS=num_heads, GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim, HEAD_PAD=triton.next_power_of_2(head_dim), BLOCK_SIZE=block_size,
        IDENTITY=stage == 0, BLOCK_N=64, num_warps=4,
    )  # fmt: skip


def score_tokens_reference(
    token_score, q, query_row, lse, kv_cache, block_table, position_table, key_len, num_prompt,
    active, slot_position, batch, scale, stage,
):  # fmt: skip
    block_size = kv_cache.shape[2]
    group = q.shape[1] // kv_cache.shape[1]
    for i in range(batch):
        if not active[i]:
            continue
        slots = torch.arange(int(key_len[i]), device=q.device)
        position = slots
        if stage > 0:
            position = slot_position[physical_slots(block_table[i], slots, block_size)].long()
        k, _ = gather_keys(kv_cache, block_table[i], len(slots))
        grouped = q[query_row[i]].float().unflatten(0, (-1, group))
        logits = torch.einsum("kgd,jkd->kgj", grouped, k.float()) * scale
        score = (logits.flatten(0, 1) - lse[i][:, None]).exp().mean(0)
        in_prompt = position < num_prompt[i]
        token_score[physical_slots(position_table[i], position[in_prompt], block_size)] = score[
            in_prompt
        ]


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
    batch: int,
    scale: float,
    stage: int,
) -> None:
    """Write the score of every prompt token that has keys in ``stage``.

    Args:
        token_score: ``[physical slots]`` fp32, written at each position's slot in stage 0.
        q: ``[rows, heads, head_dim]`` of the stage's last layer.
        query_row: ``[batch]`` int32, row of each request's current token.
        lse: ``[batch, heads]`` fp32.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        block_table, position_table: ``[batch, width]`` int32, of the stage and of stage 0.
        key_len, num_prompt: ``[batch]`` int32.
        active: ``[batch]`` int32, of the boundary after the stage; requests with 0 are passed
            over.
        slot_position: ``[physical slots]`` int32 (unused in stage 0).
    """
    run = score_tokens_triton if q.is_cuda else score_tokens_reference
    run(
        token_score, q, query_row, lse, kv_cache, block_table, position_table, key_len,
        num_prompt, active, slot_position, batch, scale, stage,
    )  # fmt: skip


def last_row_lse(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Log-denominator of one query ``[heads, head_dim]`` over keys ``[n, kv_heads, head_dim]``:
    ``[heads]`` fp32."""
    grouped = q.float().unflatten(0, (k.shape[1], -1))
    return (torch.einsum("kgd,jkd->kgj", grouped, k.float()) * scale).logsumexp(-1).flatten()
