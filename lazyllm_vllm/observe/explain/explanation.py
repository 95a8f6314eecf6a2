"""What became of each token of one prompt, as data: ``lazyllm explain --json``."""

from pydantic import BaseModel

from lazyllm_vllm.observe.explain.token_texts import Token
from lazyllm_vllm.observe.trace import is_of


class ExplainError(Exception):
    """A prompt that cannot be explained; the message says why and what to do."""


class Step(BaseModel):
    """What one token of the answer did when it was run, to find the next.

    Attributes:
        selected: by stage, sorted positions of the prompt that it chose as most important; empty
            where steps do not choose.
        revived: by stage, those of them that it called back: they had been dropped before it.
    """

    selected: list[list[int]]
    revived: list[list[int]]


class Explanation(BaseModel):
    """One prompt with its answer. Positions count from 0; stage 0 sees all tokens.

    Attributes:
        model: its name.
        layers: by stage, its first and its last layer, counted from 1.
        prompt, answer: their tokens, in order.
        kept: by stage, sorted positions that the prefill took into it.
        places: by stage, of each position its place in the order in which they were chosen for the
            stage, 1 the best, 0: it was not there to be chosen. Empty for stage 0, and for a prompt
            that was not pruned.
        steps: by token of the answer but the last, which was not run.
        share_computed: of (prompt token, layer) pairs, with those revived; the paper's "% of
            prompt tokens computed" (section 5).
    """

    model: str
    layers: list[tuple[int, int]]
    prompt: list[Token]
    answer: list[Token]
    kept: list[list[int]]
    places: list[list[int]]
    steps: list[Step]
    share_computed: float

    def depths(self) -> list[int]:
        """Of each prompt token, in how many stages it has keys when the prefill is over."""
        depth = [0] * len(self.prompt)
        for kept in self.kept:
            for position in kept:
                depth[position] += 1
        return depth


def explain(
    model: str, trace: dict, request: str, prompt: list[Token], answer: list[Token]
) -> Explanation:
    """The explanation of a request.

    Args:
        trace: what ``collective_rpc("lazyllm_trace")`` gives for a worker. From a server's JSON its
            stages are strings.
        request: its id, with or without the ending that vLLM adds.

    Raises:
        ExplainError: the trace does not have it whole.
    """
    ids = [name for name in trace["prefills"] if is_of(name, request)]
    if len(ids) != 1:
        raise ExplainError(f"the trace has {len(ids)} requests of the id {request}; one is needed")
    (request,) = ids
    prefills, starts = trace["prefills"][request], trace["starts"]
    if len(prefills) != 1:
        raise ExplainError(
            "the request was preempted for want of room in the KV cache and pruned anew, so its "
            "prompt has no one story; run it alone, or with more room"
        )
    stages = range(len(starts) - 1)
    num_prompt = prefills[0]["num_prompt"]
    if num_prompt != len(prompt):
        raise ExplainError(f"the trace is of {num_prompt} prompt tokens, not of {len(prompt)}")
    # All are in stage 0, where a trace says nothing of them.
    kept = [list(range(num_prompt)), *_by_stage(prefills[0], stages)[1:]]
    places = _by_stage(trace["places"].get(request, {}), stages)
    if not any(places) and any(len(of_stage) != num_prompt for of_stage in kept):
        raise ExplainError(
            "a part of the prompt was found in the prefix cache, and the trace lacks it; reset the "
            "cache, or run the prompt by itself"
        )
    run = trace["decodes"].get(request, [])[: max(len(answer) - 1, 0)]
    steps = [_step(_by_stage(step, stages)) for step in run]
    pairs = sum(
        (len(kept[s]) + sum(len(step.revived[s]) for step in steps)) * (starts[s + 1] - starts[s])
        for s in stages
    )
    return Explanation(
        model=model,
        layers=[(starts[s] + 1, starts[s + 1]) for s in stages],
        prompt=prompt,
        answer=answer,
        kept=kept,
        places=places,
        steps=steps,
        share_computed=pairs / (len(prompt) * starts[-1]),
    )


def _by_stage(values: dict, stages: range) -> list:
    """``values`` of each stage; empty where there is none."""
    by_stage = {str(stage): value for stage, value in values.items()}
    return [by_stage.get(str(stage), ()) for stage in stages]


def _step(by_stage: list) -> Step:
    of_stages = [dict(of_stage) for of_stage in by_stage]
    return Step(
        selected=[of_stage.get("selected", []) for of_stage in of_stages],
        revived=[of_stage.get("revived", []) for of_stage in of_stages],
    )
