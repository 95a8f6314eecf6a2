"""Requests that a server must refuse, each with a 4xx, and unusual ones that it must serve.

What public bug reports of vLLM name: numbers out of range, not numbers, far too many or too long,
text that is no text; and the same for LazyLLM's own fields.
"""

import json

GOOD = {"model": "served", "prompt": [504, 260, 253], "max_tokens": 1, "temperature": 0}
LONGEST, VOCABULARY = 1536, 49152
HUGE = 10**400

# What is changed of the good request, by a name. A text is the whole body.
REFUSED = {
    # Prompts.
    "no prompt": {"prompt": None},
    "no tokens": {"prompt": []},
    "one empty prompt of two": {"prompt": [[504], []]},
    "a token under zero": {"prompt": [504, -1]},
    "a token behind the last": {"prompt": [VOCABULARY]},
    "a token of 33 bits": {"prompt": [2**32]},
    "a token of 65 bits": {"prompt": [2**64]},
    "a fraction of a token": {"prompt": [1.5]},
    "tokens and text": {"prompt": [504, "sky"]},
    "an object": {"prompt": {"text": "sky"}},
    "no room for an answer": {"prompt": [504] * LONGEST},
    "too long": {"prompt": [504] * (LONGEST + 1)},
    "far too long": {"prompt": [504] * 200_000},
    "a long text": {"prompt": "sky " * 100_000},
    "a prompt of embeddings": {"prompt": None, "prompt_embeds": "AAAA"},
    # Counts.
    "max_tokens under zero": {"max_tokens": -1},
    "max_tokens huge": {"max_tokens": HUGE},
    "min_tokens under zero": {"min_tokens": -1},
    "min_tokens over max_tokens": {"min_tokens": 2},
    "n zero": {"n": 0},
    "n under zero": {"n": -3},
    "n of a greedy request": {"n": 2},
    "n huge": {"n": 10**9, "temperature": 1},
    "logprobs under zero": {"logprobs": -5},
    "logprobs too many": {"logprobs": 10**6},
    "prompt_logprobs under zero": {"prompt_logprobs": -7},
    "truncate_prompt_tokens under zero": {"truncate_prompt_tokens": -2},
    "truncate_prompt_tokens too many": {"truncate_prompt_tokens": LONGEST + 1},
    "seed of 70 bits": {"seed": 2**70},
    # Numbers.
    "temperature under zero": {"temperature": -1},
    "temperature NaN": {"temperature": float("nan")},
    "temperature infinite": {"temperature": float("inf")},
    "temperature a word": {"temperature": "warm"},
    "top_p zero": {"top_p": 0},
    "top_p NaN": {"top_p": float("nan")},
    "top_p over one": {"top_p": 1.1},
    "top_k under -1": {"top_k": -2},
    "min_p over one": {"min_p": 2},
    "presence_penalty infinite": {"presence_penalty": float("-inf")},
    "frequency_penalty too high": {"frequency_penalty": 9},
    "repetition_penalty zero": {"repetition_penalty": 0},
    # Lists.
    "logit_bias of no token": {"logit_bias": {"sky": 1}},
    "logit_bias behind the last token": {"logit_bias": {str(VOCABULARY): 1}},
    "allowed_token_ids empty": {"allowed_token_ids": []},
    "allowed_token_ids under zero": {"allowed_token_ids": [-1]},
    "stop empty": {"stop": [""]},
    "stop a number": {"stop": 7},
    "ten thousand stops": {"stop": [f"never {i} said" for i in range(10_000)]},
    "bad_words empty": {"bad_words": [""]},
    # Structured output.
    "a regex that is none": {"structured_outputs": {"regex": "("}},
    "two grammars": {"structured_outputs": {"regex": "a", "choice": ["a"]}},
    "no grammar": {"structured_outputs": {}},
    # Bodies.
    "half a body": '{"model": "served", "prompt": [504',
    "no body": "",
    "null": "null",
    "a list": "[]",
    "very deep": "[" * 100_000,
    "not UTF-8": b'{"model": "served", "prompt": "\xff\xfe"}',
    "half a letter": '{"model": "served", "prompt": "\\ud800", "max_tokens": 1}',
    "a model that is not there": {"model": "\U0001f999" * 1000},
    # LazyLLM's own.
    "vllm_xargs a list": {"vllm_xargs": ["lazyllm"]},
    "vllm_xargs a text": {"vllm_xargs": "lazyllm=off"},
    "lazyllm null": {"vllm_xargs": {"lazyllm": None}},
    "lazyllm a number": {"vllm_xargs": {"lazyllm": 1}},
    "lazyllm a list": {"vllm_xargs": {"lazyllm": ["off"]}},
    "lazyllm empty": {"vllm_xargs": {"lazyllm": ""}},
    "lazyllm in capitals": {"vllm_xargs": {"lazyllm": "OFF"}},
    "lazyllm unknown": {"vllm_xargs": {"lazyllm": "fastest"}},
    "lazyllm of a million letters": {"vllm_xargs": {"lazyllm": "\u00e4" * 10**6}},
    "lazyllm_keep a word": {"vllm_xargs": {"lazyllm_keep": "2"}},
    "lazyllm_keep a list": {"vllm_xargs": {"lazyllm_keep": [2]}},
    "lazyllm_keep zero": {"vllm_xargs": {"lazyllm_keep": 0}},
    "lazyllm_keep under zero": {"vllm_xargs": {"lazyllm_keep": -2.5}},
    "lazyllm_keep under one": {"vllm_xargs": {"lazyllm_keep": 0.999}},
    "lazyllm_keep NaN": {"vllm_xargs": {"lazyllm_keep": float("nan")}},
    "lazyllm_keep infinite": {"vllm_xargs": {"lazyllm_keep": float("inf")}},
    "an argument of a thousand bits": {"vllm_xargs": {"lazyllm_keep": HUGE}},
    "lazyllm_revive a word": {"vllm_xargs": {"lazyllm_revive": "maybe"}},
    "lazyllm_revive a number": {"vllm_xargs": {"lazyllm_revive": 2}},
    "lazyllm_revive a list": {"vllm_xargs": {"lazyllm_revive": ["on"]}},
    "a field misspelt": {"vllm_xargs": {"lazyllm_kep": 2}},
    "a field of a million letters": {"vllm_xargs": {"lazyllm_" + "k" * 10**6: 2}},
    "ten thousand fields": {"vllm_xargs": {f"lazyllm_{i}": i for i in range(10_000)}},
}

# Unusual, and to be answered as the good request is.
SERVED = {
    "ten thousand arguments of nobody's": {"vllm_xargs": {f"x{i}": i for i in range(10_000)}},
    "ten thousand fields of nobody's": {f"x{i}": i for i in range(10_000)},
    "stop tokens": {"stop_token_ids": list(range(40_000, 41_000))},
    "lazyllm_keep more than all": {"vllm_xargs": {"lazyllm_keep": 1e300}},
    "everything of ours": {
        "vllm_xargs": {"lazyllm": "mild", "lazyllm_keep": 2, "lazyllm_revive": "off"}
    },
}


def body_of(case: dict | str | bytes) -> bytes:
    """What is sent: JSON, with ``NaN`` and ``Infinity`` where Python has them."""
    if isinstance(case, dict):
        case = json.dumps(GOOD | case)
    return case.encode() if isinstance(case, str) else case
