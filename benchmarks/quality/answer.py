"""What an engine is asked to do: answer prompts, and say what it expects to come next."""

from itertools import zip_longest

from vllm import LLM, SamplingParams

_ROOM = 8  # prompts' worth of KV cache for each that comes after others, which must last till then
_PLACES = 4  # in a batch, for each of them: as if it were alone, one that goes on may need three


def answers(
    llm: LLM,
    prompts: list[list[int]],
    max_tokens: list[int],
    stop: list[int],
    before: list[list[list[int]]] | None = None,
) -> list[list[int]]:
    """Greedy answers, as token ids, of at most so many, to the first of ``stop``.

    Args:
        before: of each prompt those that are asked before it, one after the other.
    """
    answers: list[list[int]] = []
    at_once = _at_once(llm, prompts) if before else max(len(prompts), 1)
    for first in range(0, len(prompts), at_once):
        some = range(first, min(first + at_once, len(prompts)))
        for earlier in zip_longest(*(before[i] for i in some)) if before else ():
            _generate(llm, [p for p in earlier if p], _greedy(1))
        params = [_greedy(max_tokens[i]) for i in some]
        outputs = _generate(llm, [prompts[i] for i in some], params)
        answers += [list(output.token_ids) for output in outputs]
    return [
        tokens[: next((i for i, t in enumerate(tokens) if t in stop), None)] for tokens in answers
    ]


def _at_once(llm: LLM, prompts: list[list[int]]) -> int:
    """How many prompts that come after others are asked together."""
    config = llm.llm_engine.engine_core.engine_core.vllm_config
    room = config.cache_config.kv_cache_size_tokens // (_ROOM * max(map(len, prompts)))
    return max(min(room, config.scheduler_config.max_num_seqs // _PLACES), 1)


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False)


def reuses(llm: LLM) -> int:
    """Requests so far that went on from others; 0: stock vLLM."""
    from lazyllm_vllm import request_stats
    from lazyllm_vllm.hooks.engine_config import lazyllm_config

    if lazyllm_config(llm.llm_engine.vllm_config) is None:
        return 0
    return request_stats(llm)["total"]["reuses"]


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
