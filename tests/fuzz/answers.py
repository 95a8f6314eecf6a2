"""What each answer must be: that of the same request alone.

Who was preempted, or reset while it ran, goes on from what it had. If others took that, it is
prefilled anew with what it had said. So its answer may be in parts, and each is what a request says
alone whose prompt is all that was prefilled. Where it was not pruned, since it, or others (``reuse:
deep``), had left keys of all stages, it is what such a request says that asks not to be.

In bf16 a token depends on who else is in the batch: on a GPU only how answers end is looked at.
"""

from collections.abc import Callable

from fuzz.model import CHOICES, MOST_TOKENS


def check_answers(asked: dict[str, dict], said: dict[str, list[dict]], do: Callable | None) -> int:
    """Returns how many were compared.

    Args:
        asked: of the requests that were not aborted, ``prompt`` and ``params``, by name.
        said: what ``Driver.finish`` returns.
        do: calls the driver; None: tokens are not compared.

    Raises:
        AssertionError: an answer is missing, or another one than it must be.
    """
    assert asked.keys() == said.keys(), f"{asked.keys() ^ said.keys()} were lost, or not forgotten"
    for name, request in asked.items():
        assert len(said[name]) == request["params"].get("n", 1), name
        for answer in said[name]:
            if "grammar" in request["params"]:
                _check_choice(name, answer)
            else:
                _check(name, request, answer, do)
    return sum(map(len, said.values()))


def _check_choice(name: str, answer: dict) -> None:
    assert answer["reason"] == "stop" and tuple(answer["tokens"]) in CHOICES, (name, answer)


def _check(name: str, request: dict, answer: dict, do: Callable | None) -> None:
    prompt, params, tokens = request["prompt"], request["params"], answer["tokens"]
    if answer["went_on"] or do is None:  # which may answer otherwise
        return _check_end(name, params, answer)
    starts = [length - len(prompt) for length, _ in answer["prefills"]]
    assert starts[0] == 0 and starts == sorted(starts), (name, starts)
    ends, unpruned = [*starts[1:], len(tokens)], [of_one for _, of_one in answer["prefills"]]
    for start, end, is_unpruned in zip(starts, ends, unpruned):
        own = (params["extra_args"] or {}) | {"lazyllm_reuse": "exact"}
        own |= {"lazyllm": "off"} if is_unpruned else {}
        alone = {"max_tokens": MOST_TOKENS - start, "extra_args": own}
        expected = do("alone", prompt=prompt + tokens[:start], params=alone)
        part = tokens[start:end]
        if part != expected[: len(part)]:
            raise AssertionError(f"{name}: {part} and not {expected[: len(part)]}, {answer}")
    _check_end(name, params, answer)


def _check_end(name: str, params: dict, answer: dict) -> None:
    """It ends where it must and no sooner."""
    tokens, why = answer["tokens"], (name, answer)
    stops = params.get("stop_token_ids", ())
    strings = params.get("stop", ())
    assert not set(tokens[:-1]) & set(stops), why
    text = " ".join(f"w{token}" for token in tokens[:-1])
    assert not any(string in text for string in strings), why
    if answer["reason"] == "length":
        assert len(tokens) == params["max_tokens"], why
    else:
        whole = " ".join(f"w{token}" for token in tokens)
        ended = tokens[-1] in stops or any(string in whole for string in strings)
        assert answer["reason"] == "stop" and ended, why
