"""Rules of others and near LazyLLM's own, against the same written anew."""

import math

import pytest
import torch
from harness.world import World, make_world

from benchmarks.quality.methods import SCORES
from benchmarks.quality.rivals import FASTKV, UNIPREFILL
from benchmarks.quality.rules import RULES
from benchmarks.quality.scorers import SCORERS
from lazyllm_vllm.kernels.paged import StageKeys, physical_slots
from lazyllm_vllm.kernels.queries import Queries, WindowPart
from lazyllm_vllm.kernels.rank import RankRule, rank_tokens_reference
from lazyllm_vllm.kernels.selection import Selection
from lazyllm_vllm.kernels.top_k import best_mask
from lazyllm_vllm.plan.config import LazyLLMConfig

LAYERS = 6
ONE_CUT = ("FastKV", 1)  # FastKV has no later stage that scores
WINDOWS = {"FastKV": 8, "UniPrefill": 128}
# What tokens are kept by beside their scores.
CONFIGS = {method.scorer: method.config for method in (*SCORES, FASTKV)}
CONFIGS["UniPrefill"] = UNIPREFILL


class Prompts:
    """Random queries and keys of the tokens that each prompt has in a stage, in a few layers."""

    def __init__(self, w: World, window: int) -> None:
        self.w, self.window = w, window
        all_there = [torch.arange(n) for n in w.prompts]
        self.position = w.present if w.stage else all_there
        self.lengths = [len(p) for p in self.position]
        self.keys = [w.keys(self.lengths) for _ in range(LAYERS)]
        heads = w.kv_heads * w.group
        self.q = [[2 * w.rand(n, heads, w.head_dim) for n in self.lengths] for _ in self.keys]
        self.logits = [
            [self._logits(q, keys, i) for i, q in enumerate(queries)]
            for queries, keys in zip(self.q, self.keys)
        ]

    def _logits(self, q: torch.Tensor, keys: StageKeys, i: int) -> torch.Tensor:
        """``[tokens, heads, keys]`` fp64, of all tokens to all up to them."""
        k = keys.gather(i)[0].double().repeat_interleave(self.w.group, 1)
        logits = torch.einsum("nhd,jhd->nhj", q.double(), k) / self.w.head_dim**0.5
        later = torch.ones(len(k), len(k), dtype=torch.bool).triu(1)
        return logits.masked_fill(later[:, None], -math.inf)

    def weights(self, i: int) -> list[torch.Tensor]:
        """By layer, ``[heads, queries, keys]``: the window's attention."""
        softmax = (logits[i].softmax(-1) for logits in self.logits)
        return [weights[-self.window :].transpose(0, 1) for weights in softmax]

    def score(self, scorer, steps: list[list[tuple[int, int]]]) -> Selection:
        """Scores after steps that each have a chunk ``first .. end - 1`` of each prompt."""
        s = self.w.selection([n // 3 for n in self.w.prompts], 0)
        for chunks in steps:
            for layer, keys in enumerate(self.keys):
                keys.length.copy_(self.w.ints([end for _, end in chunks]))
                if scorer.every_layer or layer == LAYERS - 1:
                    queries = self._queries(layer, chunks)
                    scorer.score_prefills(s, queries, keys, range(len(chunks)), layer == 0)
        return s

    def _queries(self, layer: int, chunks: list[tuple[int, int]]) -> Queries:
        w, rows = self.w, [q[first:end] for q, (first, end) in zip(self.q[layer], chunks)]
        last = torch.tensor([len(r) for r in rows]).cumsum(0) - 1
        lse = torch.full((self.window, len(chunks), w.kv_heads * w.group), math.nan)
        parts = []
        for i, ((first, end), n) in enumerate(zip(chunks, self.lengths)):
            window_first = max(n - self.window, 0)
            count = max(end - max(first, window_first), 0)
            for back in range(count):
                lse[back, i] = self.logits[layer][i][end - 1 - back].logsumexp(-1)
            parts.append((count, n - end, first if first > window_first else 0))
        part = WindowPart(*(w.ints(list(numbers)) for numbers in zip(*parts)))
        return Queries(torch.cat(rows), last.int(), lse, w.head_dim**-0.5, part)


def _peak(weights: torch.Tensor, full: int = 4, earlier: float = 0.25) -> torch.Tensor:
    """``[heads, keys]``: the highest over queries, those before the last few for less."""
    queries = list(weights.unbind(1))
    queries = [q if at < full else earlier * q for at, q in enumerate(reversed(queries))]
    return torch.stack(queries).amax(0)


def _blocks(score: torch.Tensor, position: torch.Tensor, size: int, of) -> torch.Tensor:
    parts = [score[position // size == at // size] for at in position.tolist()]
    return torch.stack([of(part) for part in parts])


def _fastkv(layers, position) -> torch.Tensor:
    before = layers[-1][:, :, :-8].sum(1)
    pooled = [before[:, max(j - 3, 0) : j + 4].amax(1).sum() for j in range(before.shape[1])]
    return torch.stack(pooled)


def _uniprefill(layers, position) -> torch.Tensor:
    return _blocks(layers[-1].sum(1).mean(0), position, 64, lambda part: part.sum() / 64)


def _chunks(layers, position, size) -> torch.Tensor:
    return _blocks(_highest(_peak(w).amax(0) for w in layers), position, size, torch.max)


def _highest(layers) -> torch.Tensor:
    return torch.stack(list(layers)).amax(0)


def _decayed(layers) -> torch.Tensor:
    return sum(0.9 ** (LAYERS - 1 - at) * _peak(w).amax(0) for at, w in enumerate(layers))


# From the window's attention in each layer, and the keys' positions.
EXPECTED = {
    "FastKV": _fastkv,
    "UniPrefill": _uniprefill,
    "LazyLLM's rule": lambda layers, _: _highest(_peak(w).amax(0) for w in layers),
    "peak of four layers": lambda layers, _: _highest(_peak(w).amax(0) for w in layers[-4:]),
    "layers decayed": lambda layers, _: _decayed(layers),
    "heads summed": lambda layers, _: _highest(_peak(w).sum(0) for w in layers),
    "window in full": lambda layers, _: _highest(w.amax((0, 1)) for w in layers),
    "last token in full": lambda layers, _: _highest(_peak(w, 1).amax(0) for w in layers),
    "chunks of 16": lambda layers, at: _chunks(layers, at, 16),
    "chunks of 32": lambda layers, at: _chunks(layers, at, 32),
}


def _kept(score: torch.Tensor, count: int, always: torch.Tensor) -> list[int]:
    """Places of the highest, of equal ones the first."""
    by = [(not a, -x) for a, x in zip(always.tolist(), score.tolist())]
    return sorted(sorted(range(len(by)), key=by.__getitem__)[:count])


def _world(stage: int) -> World:
    """Keys in order of position, as prefills have them."""
    w = make_world(1, stage, decoded=(0, 0, 0, 0))
    for i, present in enumerate(w.present):
        w.present[i] = present = present.sort().values
        slots = physical_slots(w.block_table[i], torch.arange(len(present)), w.block_size)
        w.slot_position[slots] = present.int()
    return w


def test_every_rule_is_tested():
    assert EXPECTED.keys() == RULES.keys() <= SCORERS.keys()


@pytest.mark.parametrize(
    "name, stage", [(name, stage) for name in RULES for stage in (0, 1) if (name, stage) != ONE_CUT]
)
def test_rules_keep_what_the_same_written_anew_keeps(name, stage):
    """Of some prompts there are fewer tokens than a window has."""
    w, window = _world(stage), WINDOWS.get(name, 16)
    prompts = Prompts(w, window)
    s = prompts.score(SCORERS[name](0.0), [[(0, n) for n in prompts.lengths]])
    config = LazyLLMConfig(**CONFIGS[name])
    rule = RankRule(*config.score_pool, config.first_tokens, config.last_tokens)
    for i, (n, position) in enumerate(zip(w.prompts, prompts.position)):
        expected = EXPECTED[name](prompts.weights(i), position)
        mine = s.state.score[s.state.at(i, position)][: len(expected)]
        torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-7)
        if rule.before == rule.after == 0 and stage == 0 and n > window:
            count = max(n // 3, window + rule.first_tokens)
            rank_tokens_reference(s, 1, range(i, i + 1), 1, False, rule)
            kept = best_mask(s.state.rank[s.state.at(i, position)], count)
            always = (position < rule.first_tokens) | (position >= n - rule.last_tokens)
            expected = torch.cat([expected, expected.new_zeros(n - len(expected))])
            assert kept.nonzero()[:, 0].tolist() == _kept(expected, count, always)


@pytest.mark.parametrize("name", RULES)
def test_a_window_in_chunks_scores_as_in_one_piece(name):
    """Chunks that end before the window, within it, and a token before its end."""
    w, scorer = _world(0), SCORERS[name](0.0)
    prompts = Prompts(w, WINDOWS.get(name, 16))
    whole = prompts.score(SCORERS[name](0.0), [[(0, n) for n in prompts.lengths]])
    ends = [[n // 2, n - 7, n - 1, n] for n in prompts.lengths]
    steps = [
        list(zip(firsts, ends)) for firsts, ends in zip(zip(*([0] + e for e in ends)), zip(*ends))
    ]
    for _ in range(2):  # and again, for other requests in the same places
        parts = prompts.score(scorer, steps)
        for i in range(4):
            at = whole.state.prompt_at(i, whole.num_prompt)
            torch.testing.assert_close(parts.state.score[at], whole.state.score[at])
    prompts.score(scorer, steps[:3])  # whose last token never comes
    after = prompts.score(scorer, [[(0, n) for n in prompts.lengths]])
    assert torch.equal(after.state.score[at], whole.state.score[at])


def test_others_are_passed_over():
    """Requests that are not pruned, and rows of no request."""
    w, scorer = _world(0), SCORERS["heads summed"](0.0)
    prompts = Prompts(w, 16)
    s = w.selection([n // 3 for n in w.prompts], 0)
    s.is_pruned[1] = 0
    s.index[2] = -1
    before = s.state.score.clone()
    queries = prompts._queries(0, [(0, n) for n in prompts.lengths])
    scorer.score_prefills(s, queries, prompts.keys[0], range(4), True)
    changed = (s.state.score.view(torch.int32) != before.view(torch.int32)).nonzero()[:, 0]
    scored = torch.cat([s.state.prompt_at(i, s.num_prompt) for i in (0, 3)])
    assert sorted(changed.tolist()) == sorted(scored.tolist())
