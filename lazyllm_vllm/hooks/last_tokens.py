"""The last token of a request that goes on, as a decode beside the rest of its chunk.

That token tells what is to be revived, as in decoding. vLLM has it among the rows of the request's
chunk; here the request comes twice in the batch, with that row among the decodes and with the
others among the prefills.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch

from lazyllm_vllm.runtime.step import Order


def split(
    batch: InputBatch, num_decodes: int, which: Sequence[int], block_tables: Sequence[torch.Tensor]
) -> tuple[InputBatch, Order]:
    """Args:
        batch: vLLM's, decodes first.
        which: indices of requests whose chunk ends with such a token and has others.
        block_tables: ``[max_num_reqs, blocks]`` each, of this batch; they are put in its new order.

    Returns:
        The batch, of which only what a step's plan reads is right.
    """
    n, k, count = num_decodes, len(which), batch.num_reqs
    which = np.array(which)
    last_rows = batch.query_start_loc_np[which + 1] - 1
    others = np.delete(np.arange(n, batch.num_tokens), last_rows - n)
    rows = np.concatenate([np.arange(n), last_rows, others])
    members = np.concatenate([np.arange(n), which, np.arange(n, count)])
    sampled = np.concatenate([np.arange(n), np.arange(n, count) + k])
    sampled[which] = np.arange(n, n + k)
    packed = np.concatenate([rows, sampled, members])
    packed = async_tensor_h2d(packed, device=batch.positions.device)
    rows, sampled, on_device = packed.split([len(rows), count, count + k])
    for table in block_tables:
        assert count + k <= len(table), "the scheduler leaves room for them"
        table[n : count + k] = table[on_device[n:]]
    decodes = slice(n, n + k)
    scheduled = batch.num_scheduled_tokens[members]
    scheduled[decodes] = 1
    scheduled[which + k] -= 1
    computed = batch.num_computed_prefill_tokens_np[members]
    computed[decodes] = batch.prefill_len_np[which] - 1
    is_prefilling = batch.is_prefilling_np[members]
    is_prefilling[decodes] = False
    again = replace(
        batch,
        req_ids=[batch.req_ids[i] for i in members],
        num_reqs=count + k,
        num_reqs_after_padding=count + k,
        idx_mapping=batch.idx_mapping[on_device],
        idx_mapping_np=batch.idx_mapping_np[members],
        num_scheduled_tokens=scheduled,
        num_computed_prefill_tokens_np=computed,
        prefill_len_np=batch.prefill_len_np[members],
        is_prefilling_np=is_prefilling,
        positions=batch.positions[rows],
    )
    return again, Order(rows, sampled)
