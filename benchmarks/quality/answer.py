"""What an engine is asked to do: answer prompts, and say what it expects to come next."""

from vllm import LLM, SamplingParams


def answers(
    llm: LLM, prompts: list[list[int]], max_tokens: list[int], stop: list[int]
) -> list[list[int]]:
    """Greedy answers, as token ids, of at most so many, to the first of ``stop``."""
    params = [
        SamplingParams(temperature=0, max_tokens=most, detokenize=False) for most in max_tokens
    ]
    answers = [list(output.token_ids) for output in _generate(llm, prompts, params)]
    return [
        tokens[: next((i for i, t in enumerate(tokens) if t in stop), None)] for tokens in answers
    ]


def expectations(
    llm: LLM, prompts: list[list[int]], likeliest: int, continued: int
) -> list[tuple[dict[int, float], list[int]]]:
    """The ``likeliest`` next tokens of each prompt, with their log-probabilities, and ``continued``
    tokens of its greedy continuation."""
    params = SamplingParams(
        temperature=0, max_tokens=continued, logprobs=likeliest, detokenize=False, ignore_eos=True
    )
    return [
        (
            {token: entry.logprob for token, entry in output.logprobs[0].items()},
            list(output.token_ids),
        )
        for output in _generate(llm, prompts, params)
    ]


def share_computed(llm: LLM) -> float | None:
    """Share of (prompt token, layer) pairs computed so far; None: stock vLLM."""
    from lazyllm_vllm import request_stats
    from lazyllm_vllm.hooks.engine_config import lazyllm_config

    if lazyllm_config(llm.llm_engine.vllm_config) is None:
        return None

    return request_stats(llm)["total"]["share_computed"]


def _generate(llm: LLM, prompts: list[list[int]], params) -> list:
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]
