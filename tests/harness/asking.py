"""Requests that a test sends, and what it reads of those that go on from others."""

NEW_TOKENS = 8
GREEDY = {"temperature": 0, "ignore_eos": True}


def asked(prompt: list[int], **fields) -> dict:
    """As ``harness.engine.serve`` takes it; ``params`` beside those of a greedy answer of
    ``NEW_TOKENS``."""
    params = GREEDY | {"max_tokens": NEW_TOKENS} | fields.pop("params", {})
    return {"prompt": prompt, "params": params} | fields


def goes_on(result: dict, i: int = 0) -> bool:
    """Whether a traced request went on from a snapshot, when it last began."""
    return "resident" in result["prefills"][i][-1]
