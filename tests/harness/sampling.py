"""vLLM's sampling kernel takes two thirds of an engine's time in Triton's interpreter. Where all
requests of a batch are greedy, the token is the likeliest."""

from vllm.v1.worker.gpu.sample import sampler


def install() -> None:
    """From now on, in this process and those forked from it."""
    vllms = sampler.gumbel_sample

    def sample(logits, expanded_idx_mapping, temperature, *args, **kwargs):
        if (temperature[expanded_idx_mapping] == 0).all():
            return logits.argmax(-1)
        return vllms(logits, expanded_idx_mapping, temperature, *args, **kwargs)

    sampler.gumbel_sample = sample
