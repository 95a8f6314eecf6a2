"""Scores of prompts that come in chunks: a window spread over several counts as in one piece."""

from dataclasses import replace

import pytest
import torch
from harness.world import World, close, make_world

from lazyllm_vllm.kernels.queries import Queries, ScoreRule, WindowPart
from lazyllm_vllm.kernels.score import (
    score_tokens_reference,
    score_tokens_triton,
)

RUNS = (score_tokens_triton, score_tokens_reference)
NAN = float("nan")


class Prompts:
    """Each prompt's tokens that score, and keys, in each of a few layers of stage 0."""

    def __init__(self, w: World, window: int, num_layers: int) -> None:
        self.w = w
        self.window = window
        self.batch = len(w.prompts)
        shape = self.batch, window, w.kv_heads * w.group  # a window's tokens in order of position
        self.q = [w.rand(*shape, w.head_dim) for _ in range(num_layers)]
        self.lse = [
            torch.randn(shape, generator=w.random).to(w.device) + 6 for _ in range(num_layers)
        ]
        self.keys = [w.keys(w.prompts) for _ in range(num_layers)]

    def count(self, i: int, first: int, end: int) -> int:
        """Tokens of the window in a chunk ``first .. end - 1``."""
        window_first = max(0, self.w.prompts[i] - self.window)
        return max(0, end - max(first, window_first))

    def queries(self, layer: int, chunks: list[tuple[int, int]]) -> Queries:
        """Of one step; no numbers where there is no token of the window."""
        w, window, q, lse = self.w, self.window, self.q[layer], self.lse[layer]
        rows = torch.full_like(q, NAN)
        row_lse = torch.full((window, self.batch + 1, q.shape[2]), NAN, device=w.device)
        counts, later, scored = [], [], []
        for i, (first, end) in enumerate(chunks):
            count, behind = self.count(i, first, end), w.prompts[i] - end
            for back in range(count):
                rows[i, window - 1 - back] = q[i, window - 1 - behind - back]
                row_lse[back, i] = lse[i, window - 1 - behind - back]
            counts.append(count)
            later.append(behind)
            scored.append(first if first > w.prompts[i] - window else 0)
        part = WindowPart(w.ints(counts), w.ints(later), w.ints(scored))
        last = w.ints([(i + 1) * window - 1 for i in range(self.batch)])
        return Queries(rows.flatten(0, 1), last, row_lse, w.head_dim**-0.5, part)

    def score(self, run, steps: list[list[tuple[int, int]]], peak: bool) -> list[torch.Tensor]:
        """Of each prompt, after steps that have a chunk of each."""
        w, s = self.w, self.w.selection(self.w.prompts, 0)
        for chunks in steps:
            lengths = w.ints([end for _, end in chunks])
            for layer, keys in enumerate(self.keys):
                rule = ScoreRule(peak, accumulates=layer > 0)
                keys = replace(keys, length=lengths)
                active = w.ints([1] * self.batch)
                run(s, self.queries(layer, chunks), keys, range(self.batch), active, rule)
        return [s.state.score[s.state.prompt_at(i, s.num_prompt)] for i in range(self.batch)]

    def expected(self, i: int, peak: bool) -> torch.Tensor:
        """Token by token, in fp64."""
        w, n = self.w, self.w.prompts[i]
        score = torch.zeros(n, dtype=torch.float64)
        for q, lse, keys in zip(self.q, self.lse, self.keys):
            k = keys.gather(i)[0].double().cpu().repeat_interleave(w.group, 1)
            for back in range(min(self.window, n)):
                token, seen = self.window - 1 - back, n - back
                logits = torch.einsum("hd,jhd->jh", q[i, token].double().cpu(), k[:seen])
                p = (logits * w.head_dim**-0.5 - lse[i, token].double().cpu()).exp()
                if peak:
                    p = p.amax(1) * (1 if back < 4 else 0.25)
                    score[:seen] = score[:seen].maximum(p)
                else:
                    score[:seen] += p.mean(1) / self.window
        return score


def _steps(prompts: list[int], sizes: list[list[int]]) -> list[list[tuple[int, int]]]:
    """Chunks of so many tokens at the end of each prompt, after one with all before them; a prompt
    that has fewer chunks than others is passed over in the steps before."""
    num_steps = 1 + max(map(len, sizes))
    steps: list[list[tuple[int, int]]] = [[] for _ in range(num_steps)]
    for n, own in zip(prompts, sizes):
        ends = [n - sum(own[at:]) for at in range(len(own) + 1)]
        firsts = [0, *ends[:-1]]
        idle = num_steps - len(ends)
        assert firsts[-1] >= 0 and ends[-1] == n
        for step, chunk in zip(steps, [(0, 0)] * idle + [*zip(firsts, ends)]):
            step.append(chunk)
    return steps


@pytest.mark.parametrize(
    "sizes",
    (
        [[], [], [], []],  # in one piece
        [[1], [5], [15], [16]],
        [[3, 4], [20, 2], [16, 1], [2]],
        [[17], [16], [16, 30], [1, 1, 1, 1]],  # the window in the last chunk, or almost
    ),
)
@pytest.mark.parametrize("seed, peak, layers", ((0, True, 2), (1, True, 1), (1, False, 1)))
def test_any_split_scores_as_one_piece(seed, sizes, peak, layers, device, dtype):
    """Splits of their own for four prompts; in a world of even seed the last has five tokens."""
    w = make_world(seed, 0, decoded=(0, 0, 0, 0), device=device, dtype=dtype)
    prompts = Prompts(w, 16, layers)
    if w.prompts[3] < 16:
        sizes = [*sizes[:3], [size for size in sizes[3] if size < 4]]
    steps = _steps(w.prompts, sizes)
    for run in RUNS:
        for i, mine in enumerate(prompts.score(run, steps, peak)):
            close(mine.cpu(), prompts.expected(i, peak), dtype, atol=0)


@pytest.mark.parametrize("peak", (True, False))
def test_a_window_that_comes_token_by_token(peak, device, dtype):
    w = make_world(1, 0, decoded=(0, 0, 0, 0), device=device, dtype=dtype)
    prompts = Prompts(w, 6, 2 if peak else 1)
    steps = _steps(w.prompts, [[1] * 7] * 4)
    for run in RUNS:
        for i, mine in enumerate(prompts.score(run, steps, peak)):
            close(mine.cpu(), prompts.expected(i, peak), dtype, atol=0)


@pytest.mark.parametrize("accumulates", (False, True))
def test_chunks_before_the_window_leave_the_state_as_it_is(accumulates, device, dtype):
    """The window of one prompt of four has begun."""
    w = make_world(1, 0, decoded=(0, 0, 0, 0), device=device, dtype=dtype)
    prompts = Prompts(w, 4, 1)
    chunks = [(0, 200), (0, 13), (8, 60), (0, 125)]
    queries = prompts.queries(0, chunks)
    assert queries.part.count.tolist() == [0, 1, 0, 0]
    keys = replace(prompts.keys[0], length=w.ints([end for _, end in chunks]))
    for run in RUNS:
        s = w.selection(w.prompts, 0)
        s.state.score.view(torch.int32)[s.state.prompt_at(1, s.num_prompt)] = 0
        before = s.state.score.view(torch.int32).clone()
        run(s, queries, keys, range(4), w.ints([1] * 4), ScoreRule(True, accumulates))
        changed = (s.state.score.view(torch.int32) != before).nonzero()[:, 0]
        scored = s.state.at(1, torch.arange(13, device=device))
        assert sorted(changed.tolist()) == sorted(scored.tolist())
