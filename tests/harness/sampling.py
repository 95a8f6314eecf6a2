"""What vLLM samples with, without Triton's interpreter: where all requests of a batch are greedy
the token is the likeliest, and log-probabilities are PyTorch's."""

import torch

from vllm.v1.worker.gpu.sample import logprob, sampler

from harness.in_numpy import replace


def install() -> None:
    """From now on, in this process and those forked from it."""
    kernels = {"_topk_log_softmax_kernel": take_logprobs, "_ranks_kernel": take_ranks}
    replace(logprob, kernels)
    vllms = sampler.gumbel_sample

    def sample(logits, expanded_idx_mapping, temperature, *args, **kwargs):
        if (temperature[expanded_idx_mapping] == 0).all():
            return logits.argmax(-1)
        return vllms(logits, expanded_idx_mapping, temperature, *args, **kwargs)

    sampler.gumbel_sample = sample


def take_logprobs(grid, output_ptr, logits_ptr, topk_ids_ptr, **others) -> None:
    logits = logits_ptr[: grid[0]].float()
    output_ptr[: grid[0]] = logits.gather(1, topk_ids_ptr[: grid[0]])
    output_ptr[: grid[0]] -= torch.logsumexp(logits, 1, keepdim=True)


def take_ranks(grid, output_ptr, logits_ptr, token_ids_ptr, **others) -> None:
    logits, tokens = logits_ptr[: grid[0]], token_ids_ptr[: grid[0]].view(-1, 1)
    output_ptr[: grid[0]] = (logits >= logits.gather(1, tokens)).sum(1)
