"""What an engine is asked to do: answer prompts, and say what it expects to come next."""

from vllm import LLM, SamplingParams


def answers(
    llm: LLM, prompts: list[list[int]], max_tokens: int, stop: list[int]
) -> list[list[int]]:
    """Greedy answers, as token ids, to the first of ``stop`` at most."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    found = [list(output.outputs[0].token_ids) for output in outputs]
    return [
        tokens[: next((i for i, t in enumerate(tokens) if t in stop), None)] for tokens in found
    ]


def share_computed(llm: LLM) -> float | None:
    """Share of (prompt token, layer) pairs computed so far; None: stock vLLM."""
    if "lazyllm" not in (llm.llm_engine.vllm_config.additional_config or {}):
        return None
    from lazyllm_vllm.stats import request_stats

    return request_stats(llm)["total"]["share_computed"]


def next_tokens(llm: LLM, prompts: list[list[int]], most: int) -> list[dict[int, float]]:
    """The ``most`` likeliest next tokens of each prompt, with their log-probabilities."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=most, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [
        {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}
        for output in outputs
    ]
