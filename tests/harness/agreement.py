"""Whether a run of the engine, with its trace, is that of the slow reference.

Both run in fp32, but add up in different orders, so two scores closer than ``TIE`` may rank either
way round. From a place where the reference itself shows such a tie the two runs are different
computations, and that request is followed no further.
"""

from dataclasses import dataclass, field, replace

import pytest

from harness import reference
from lazyllm_vllm.plan.config import LazyLLMConfig, parse_config

TIE = 1e-4  # relative


@dataclass
class Agreement:
    """Attributes:
    compared, total: sets that agreed, of those that there are.
    ties: where requests stopped being followed.
    revived: tokens that the reference revived.
    """

    compared: int = 0
    total: int = 0
    ties: list[str] = field(default_factory=list)
    revived: int = 0

    def check(self, least_compared: float, most_ties: int) -> None:
        """That enough was compared for the agreement to mean something."""
        print(f"{self.compared} of {self.total} sets, ties: {self.ties}, {self.revived} revived")
        assert self.revived > 0, "nothing was revived: the test shows too little"
        assert self.compared >= least_compared * self.total and len(self.ties) <= most_ties


def compare(model, prompts: list[list[int]], config: dict, quota: int, result: dict) -> Agreement:
    """What the engine made of ``prompts``, all there from the start, against the reference.

    Args:
        model: a Hugging Face model.
        config: LazyLLM's, but for ``revive_budget``.
        quota: tokens that each request may revive at a boundary of a step: all decode together
            from the first step to the last, so that each has an equal part throughout.
        result: of ``harness.engine.generate`` in an engine with a trace.

    Raises:
        AssertionError: they differ where no tie explains it.
    """
    alone = parse_config(config | {"revive_budget": quota})
    total = Agreement()
    for i, prompt in enumerate(prompts):
        ref = reference.generate(model, prompt, alone, len(result["tokens"][i]))
        if len(prompt) < alone.min_prompt_tokens:  # nothing is chosen
            assert result["tokens"][i] == ref.tokens
            continue
        (prefill,), decodes = result["prefills"][i], result["decodes"][i]
        seen = _follow(prefill, decodes, result["tokens"][i], ref)
        total.compared += seen.compared
        total.ties += [f"{len(prompt)} tokens, {where}" for where in seen.ties]
        stages = len(ref.kept) - 1
        total.total += stages + 2 * stages * (len(ref.tokens) - 1)
        total.revived += sum(len(r) for step in ref.revived for r in step)
        if not seen.ties:
            _check_counts(alone, prompt, result, i, ref)
    return total


def compare_turns(
    model, prompt: list[int], turns: list[list[int]], config: dict, quota: int, results: list[dict]
) -> Agreement:
    """What the engine made of a conversation, in which each turn goes on from the one before.

    Args:
        turns: as ``reference.generate_turns`` has them.
        config, quota: as in ``compare``.
        results: of ``harness.engine.generate`` for each prompt of the conversation alone.
    """
    alone = parse_config(config | {"revive_budget": quota})
    new_tokens = len(results[0]["tokens"][0])
    refs = reference.generate_turns(model, prompt, alone, new_tokens, turns)
    num_stages, total = len(refs[0].kept), Agreement()
    for turn, (ref, result) in enumerate(zip(refs, results, strict=True)):
        total.total += 2 * (num_stages - 1) * len(ref.selected) + len(ref.prefill_scores)
        total.revived += sum(len(r) for step in ref.revived for r in step)
        if total.ties:
            continue
        prefill, decodes, tokens = result["prefills"][0][-1], result["decodes"][0], result["tokens"]
        if turn:
            of_stages = range(1, num_stages)
            assert [prefill["resident"][s] for s in of_stages] == ref.resident[1:], f"turn {turn}"
            seen = _follow_turn(decodes, tokens[0], ref, num_stages)
        else:
            seen = _follow(prefill, decodes, tokens[0], ref)
        total.compared += seen.compared
        total.ties += [f"turn {turn}, {where}" for where in seen.ties]
    return total


def _check_counts(config: LazyLLMConfig, prompt, result, i: int, ref) -> None:
    assert result["tokens"][i] == ref.tokens
    stats = result["stats"][i]
    assert stats["share_computed"] == pytest.approx(ref.share_computed)
    assert [k + r for k, r in zip(stats["kept"], stats["revived"])] == ref.prompt_keys


def _same_set(seen: Agreement, mine, theirs, scores, where: str) -> bool:
    """Whether the sets agree; if not, it must be a tie between tokens left and taken."""
    seen.compared += 1
    if mine == theirs:
        return True
    wrong = [scores[p].item() for p in set(mine) ^ set(theirs)]
    assert len(mine) == len(theirs), where
    assert max(wrong) - min(wrong) <= TIE * max(wrong), (where, wrong)
    seen.ties.append(where)
    return False


def _follow(prefill, decodes, tokens, ref) -> Agreement:
    seen, num_stages = Agreement(), len(ref.kept)
    for s in range(1, num_stages):
        where = f"prefill, boundary {s}"
        if not _same_set(seen, prefill[s], ref.kept[s], ref.prefill_scores[s - 1], where):
            return seen
    return _follow_decodes(seen, decodes, tokens, ref, num_stages)


def _follow_turn(decodes, tokens, ref, num_stages: int) -> Agreement:
    """The same of a turn that goes on, whose last token is decoded before the first new one."""
    seen = Agreement()
    if not _same_step(seen, decodes[0], ref, 0, num_stages):
        return seen
    rest = replace(
        ref, **{what: getattr(ref, what)[1:] for what in ("selected", "revived", "scores")}
    )
    return _follow_decodes(seen, decodes[1:], tokens, rest, num_stages)


def _same_step(seen: Agreement, decode, ref, step: int, num_stages: int) -> bool:
    for s in range(1, num_stages):
        scores = ref.scores[step][s - 1]
        for what in ("selected", "revived"):
            theirs = getattr(ref, what)[step][s - 1]
            where = f"step {step}, boundary {s}, {what}"
            if not _same_set(seen, decode[s][what], theirs, scores, where):
                return False
    return True


def _follow_decodes(seen: Agreement, decodes, tokens, ref, num_stages: int) -> Agreement:
    for step, token in enumerate(tokens):
        if token != ref.tokens[step]:
            best, second = ref.logits[step].topk(2).values
            assert best - second < 1e-3, f"token {step}: {token}, reference {ref.tokens[step]}"
            seen.ties.append(f"token {step}")
            return seen
        if step == len(tokens) - 1:
            return seen
        if not _same_step(seen, decodes[step], ref, step, num_stages):
            return seen
    return seen


def drifts_between(mine: dict, theirs: dict) -> list[float]:
    """How far two engines' log-probabilities are apart, on the tokens of each answer before the
    first that differs; and a zero, so that there is one.

    Args:
        mine, theirs: what ``engine.generate`` returns, with log-probabilities.
    """
    drifts = [0.0]
    for i, tokens in enumerate(zip(mine["tokens"], theirs["tokens"])):
        same = next((at for at, (x, y) in enumerate(zip(*tokens)) if x != y), len(tokens[0]))
        for x, y in zip(mine["logprobs"][i][:same], theirs["logprobs"][i][:same]):
            drifts += (abs(x[t] - y[t]) for t in x.keys() & y.keys())
    return drifts
