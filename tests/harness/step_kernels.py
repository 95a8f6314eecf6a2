"""vLLM's kernels that every step runs, over a handful of numbers, in NumPy."""

import ctypes

import numpy as np

from vllm.v1.worker.gpu import buffer_utils, input_batch

from harness.in_numpy import replace


def install() -> None:
    """From now on, in this process and those forked from it."""
    replace(buffer_utils, {"_apply_write_kernel": apply_writes})
    replace(
        input_batch,
        {
            "_prepare_prefill_inputs_kernel": prepare_prefill_inputs,
            "_prepare_pos_seq_lens_kernel": prepare_positions,
            "_combine_sampled_and_draft_tokens_kernel": combine_sampled,
            "_get_num_sampled_and_rejected_kernel": count_sampled,
            "_post_update_kernel": post_update,
        },
    )


def apply_writes(
    grid,
    output_ptr,
    output_stride,
    write_indices_ptr,
    write_starts_ptr,
    write_contents_ptr,
    write_cu_lens_ptr,
    write_group_ids_ptr,
    MULTI_GROUP,
    **others,
) -> None:
    rows, starts = write_indices_ptr.tolist(), write_starts_ptr.tolist()
    ends, contents = write_cu_lens_ptr.tolist(), write_contents_ptr.numpy()
    output = None if MULTI_GROUP else output_ptr.numpy().reshape(-1)
    begin = 0
    for i in range(grid[0]):
        content = contents[begin : ends[i]]
        begin = ends[i]
        if MULTI_GROUP:  # the address of each group's tensor, of int32
            group = int(write_group_ids_ptr[i])
            at = int(output_ptr[group]) + 4 * (rows[i] * int(output_stride[group]) + starts[i])
            ctypes.memmove(at, np.ascontiguousarray(content).ctypes.data, 4 * len(content))
        else:
            at = rows[i] * output_stride + starts[i]
            output[at : at + len(content)] = content


def prepare_prefill_inputs(
    grid,
    input_ids_ptr,
    next_prefill_tokens_ptr,
    num_lookahead,
    idx_mapping_ptr,
    query_start_loc_ptr,
    all_token_ids_ptr,
    prefill_lens_ptr,
    num_computed_tokens_ptr,
    **others,
) -> None:
    ids, tokens = input_ids_ptr.numpy(), all_token_ids_ptr.numpy()
    following, computed = next_prefill_tokens_ptr.numpy(), num_computed_tokens_ptr.numpy()
    starts, lengths = query_start_loc_ptr.tolist(), prefill_lens_ptr.numpy()
    for row, request in enumerate(idx_mapping_ptr[: grid[0]].tolist()):
        if computed[request] >= lengths[request]:
            continue
        first = computed[request]
        end = first + starts[row + 1] - starts[row]
        ids[starts[row] : starts[row + 1]] = tokens[request, first:end]
        rest = tokens[request, end : min(end + num_lookahead, lengths[request])]
        following[:num_lookahead, request] = 0
        following[: len(rest), request] = rest


def prepare_positions(
    grid,
    pos_ptr,
    seq_lens_ptr,
    idx_mapping_ptr,
    query_start_loc_ptr,
    num_computed_tokens_ptr,
    max_num_reqs,
    **others,
) -> None:
    positions, seq_lens = pos_ptr.numpy(), seq_lens_ptr.numpy()
    starts, num_requests = query_start_loc_ptr.tolist(), grid[0] - 1
    computed = num_computed_tokens_ptr[idx_mapping_ptr[:num_requests]].tolist()
    seq_lens[num_requests:max_num_reqs] = 0
    for row, first in enumerate(computed):
        end = first + starts[row + 1] - starts[row]
        seq_lens[row] = end
        positions[starts[row] : starts[row + 1]] = np.arange(first, end)


def combine_sampled(
    grid,
    input_ids_ptr,
    idx_mapping_ptr,
    last_sampled_tokens_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    prefill_len_ptr,
    cu_num_logits_ptr,
    logits_indices_ptr,
    NUM_NEW_SAMPLED_TOKENS,
    **others,
) -> None:
    ids, indices, last = (
        each.numpy().reshape(-1)
        for each in (input_ids_ptr, logits_indices_ptr, last_sampled_tokens_ptr)
    )
    cuts, ends = cu_num_logits_ptr.tolist(), query_start_loc_ptr.tolist()[1:]
    seq_lens, lengths = seq_lens_ptr.tolist(), prefill_len_ptr.numpy()
    for row, request in enumerate(idx_mapping_ptr[: grid[0]].tolist()):
        num_logits = cuts[row + 1] - cuts[row]
        assert num_logits == NUM_NEW_SAMPLED_TOKENS == 1, "draft tokens"
        indices[cuts[row]] = ends[row] - 1
        if seq_lens[row] > lengths[request]:
            ids[ends[row] - 1] = last[request]


def count_sampled(
    grid,
    num_sampled_ptr,
    num_rejected_ptr,
    seq_lens_ptr,
    cu_num_logits_ptr,
    idx_mapping_ptr,
    prefill_len_ptr,
) -> None:
    rows = slice(grid[0])
    lengths = prefill_len_ptr[idx_mapping_ptr[rows]].numpy()
    is_chunk = seq_lens_ptr[rows].numpy() < lengths
    sampled, rejected = num_sampled_ptr.numpy()[rows], num_rejected_ptr.numpy()[rows]
    num_logits = np.diff(cu_num_logits_ptr.numpy()[: grid[0] + 1])
    sampled[is_chunk] = 0
    rejected[:] = np.where(is_chunk, 0, num_logits - sampled)


def post_update(
    grid,
    idx_mapping_ptr,
    num_computed_tokens_ptr,
    last_sampled_tokens_ptr,
    output_bin_counts_ptr,
    sampled_tokens_ptr,
    num_sampled_ptr,
    num_rejected_ptr,
    query_start_loc_ptr,
    all_token_ids_ptr,
    total_len_ptr,
    draft_tokens_ptr=None,
    **others,
) -> None:
    assert draft_tokens_ptr is None
    last, tokens = last_sampled_tokens_ptr.numpy().reshape(-1), all_token_ids_ptr.numpy()
    computed, totals = num_computed_tokens_ptr.numpy(), total_len_ptr.numpy()
    said, counts, rejected = (
        each.tolist() for each in (sampled_tokens_ptr, num_sampled_ptr, num_rejected_ptr)
    )
    starts = [0] * (grid[0] + 1) if query_start_loc_ptr is None else query_start_loc_ptr.tolist()
    for row, request in enumerate(idx_mapping_ptr[: grid[0]].tolist()):
        if request < 0:
            continue
        computed[request] += starts[row + 1] - starts[row] - rejected[row]
        new = said[row][: counts[row]]
        if not new:
            continue
        total = int(totals[request])
        tokens[request, total : total + len(new)] = new
        last[request], totals[request] = new[-1], total + len(new)
        if output_bin_counts_ptr is not None:
            np.add.at(output_bin_counts_ptr.numpy()[request], new, 1)
