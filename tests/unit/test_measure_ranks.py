"""What ranks do together is measured in one prefill and in steps that decode, and nowhere else."""

from collections import Counter
from types import SimpleNamespace

import pytest

from benchmarks.speed import measure_ranks


class Engine:
    """One request, which has its first token after a step; vLLM's answers come a step later.

    Attributes:
        profiled: kernels' milliseconds, by kind, in each profile.
    """

    def __init__(self) -> None:
        self.llm_engine, self.tokens, self.kernels, self.profiled = self, 0, None, []
        self.is_there = False

    def generate(self, prompts, params, use_tqdm) -> None:
        assert len(prompts[0]["prompt_token_ids"]) == 700 and params.max_tokens == 1
        if self.kernels is not None:
            self.kernels.update({"reductions": 40.0, "scores": 3.0, "scores' kernels": 1.0})

    def add_request(self, name, prompt, params) -> None:
        assert len(prompt["prompt_token_ids"]) == 300
        self.is_there, self.most = True, params.max_tokens

    def step(self) -> list:
        self.tokens += 1
        assert self.tokens < self.most, "it ends while it is measured"
        if self.kernels is not None:
            self.kernels.update({"reductions": 0.5, "gathers": 0.25, "scores": 0.125})
        said = SimpleNamespace(token_ids=[0] * max(self.tokens - 1, 0))
        return [SimpleNamespace(outputs=[said])] if self.tokens > 1 else []

    def has_unfinished_requests(self) -> bool:
        return self.is_there

    def abort_request(self, names) -> None:
        self.is_there = False

    def collective_rpc(self, call) -> list:
        found, self.kernels = self.kernels, None
        if call is measure_ranks._start_profile:
            self.kernels = Counter()
        else:
            self.profiled.append(found)
        return [found]


def test_prefill_and_decode_apart():
    engine = Engine()
    found = measure_ranks.collectives(engine, tokens=700, decode_tokens=300)
    assert len(engine.profiled) == 2 and not engine.is_there
    assert engine.profiled[1]["gathers"] == 0.25 * 16
    # Kernels of scores wait for nobody: they are in no sum.
    assert found == pytest.approx(
        {"value": 43.0, "scores": 4.0, "gathers": 0}
        | {"decode": 0.875, "decode_scores": 0.125, "decode_gathers": 0.25}
    )
