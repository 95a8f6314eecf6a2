"""After the last attention only the rows that are sampled from matter.

All that comes after it runs on those alone, unless the caller reads the hidden state of every
prompt token. The results go back to where vLLM looks for them.
"""

import torch

from lazyllm_vllm.runtime.boundary import Boundary
from lazyllm_vllm.runtime.step import Step


def sampled_rows(step: Step, boundary: Boundary) -> torch.Tensor | slice:
    """Rows of the last stage that matter, in vLLM's order of requests: decodes, then each prefill's
    last. In a step that is padded (``TurnShape``), in the batch's own order."""
    last = boundary.schedule.num_stages - 1
    if step.is_part:  # all that matters is done
        return slice(0, 1)
    if step.batch.wants_all_rows:
        return slice(0, step.num_rows(last))
    if not step.num_prefills:
        return slice(0, step.num_decodes)
    turns = step.batch.turns
    every = turns is None or step.batch.shape is not None  # whose places in a graph are fixed
    return step.query_row(last)[slice(0, step.num_requests) if every else turns.sampled]


def to_token_layout(
    hidden: torch.Tensor, step: Step, boundary: Boundary, num_tokens: int
) -> torch.Tensor:
    """``hidden`` of the rows that matter, in vLLM's order of tokens.

    Args:
        hidden: ``[sampled rows, hidden]``.

    Returns:
        ``[num_tokens, hidden]``; rows that nobody reads are not written.
    """
    if not step.num_prefills and step.num_decodes == num_tokens:
        return hidden
    if not step.batch.wants_all_rows:
        out = hidden.new_empty(num_tokens, hidden.shape[1])
        out[step.batch.sampled_tokens] = hidden
        return out
    # Zeros of prompt tokens that were dropped, which vLLM looks at but does not use.
    num_rows = step.num_rows(0)
    out = hidden.new_zeros(max(num_rows, num_tokens), hidden.shape[1])
    last = boundary.schedule.num_stages - 1
    rows, first, n = boundary.buffers.rows[last], step.num_decode_rows(last), step.num_decodes
    out[:n] = hidden[:n]
    prefill = rows.request[first : step.num_rows(last)].long() - n
    segments, position = step.segments[0], rows.position[first : step.num_rows(last)]
    place = position - segments.first[prefill]  # in this chunk
    is_here = place >= 0
    rows = segments.base + segments.start[prefill] + place
    out[rows[is_here]] = hidden[first:][is_here]
    turns = step.batch.turns
    if turns is None:
        return out
    in_order = out.new_empty(num_tokens, hidden.shape[1])
    in_order[turns.rows[n:]] = out[n:num_rows]
    in_order[turns.rows[:n]] = out[:n]  # the last tokens of turns, which are prefills' rows too
    return in_order
