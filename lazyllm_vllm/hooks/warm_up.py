"""Steps that nothing at vLLM's start runs, so that no request waits for Triton's compiler."""

import torch

from vllm.forward_context import set_forward_context
from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture

# Requests and tokens of each step: a prompt alone, one that joins a decode, and one that joins a
# decode and a turn's last token.
_STEPS = ((1, 64), (2, 3), (3, 4))


@torch.inference_mode()
def warm_up(
    model, model_state, vllm_config, input_buffers, block_tables, attn_groups, kv_cache_config
) -> None:
    """Prune and revive in a step of requests that there are not; nothing is written for them."""
    model_state.copier.copy([(0, 0)])  # vLLM's null block
    with model_state.warming_up():
        for num_reqs, num_tokens in _STEPS:
            if num_reqs > model_state.max_num_reqs:
                continue
            metadata, slot_mappings = prepare_inputs_to_capture(
                num_reqs,
                num_tokens,
                model_state,
                input_buffers,
                block_tables,
                attn_groups,
                kv_cache_config,
                full_cudagraph=False,
            )
            with set_forward_context(
                metadata, vllm_config, num_tokens=num_tokens, slot_mapping=slot_mappings
            ):
                model(
                    input_ids=input_buffers.input_ids[:num_tokens],
                    positions=input_buffers.positions[:num_tokens],
                )
