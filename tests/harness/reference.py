"""LazyLLM over a Hugging Face model: one sequence, greedy, slow and plain.

The yardstick for the engine (design section 6). It follows design section 1 line by line and shares
nothing with the engine but the configuration, so that the same mistake is not made twice. Every
cache is indexed by position and starts as NaN: a read of keys that were never computed shows at
once in the output. What is the model's own, whichever its family, is in ``hf_decoder``.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from harness.hf_decoder import HFDecoder, attention
from lazyllm_vllm.plan.config import LazyLLMConfig

Margin = tuple[float | None, float | None]


@dataclass
class Trace:
    """What one run did. S stages, N prompt tokens; boundary s, before stage s, has index s - 1.

    Decode step i processes ``tokens[i]``, so there is one step fewer than there are tokens.

    Attributes:
        tokens: generated ids, the stop token included.
        kept: ``kept[s]``: sorted positions that stage s ran at prefill, all N for stage 0.
        selected: ``selected[step][s - 1]``: sorted prompt positions selected at boundary s.
        revived: ``revived[step][s - 1]``: sorted prompt positions revived into stage s.
        prefill_scores: ``prefill_scores[s - 1]``: pooled scores at boundary s, [N] fp32, -inf for
            tokens that were not candidates.
        scores: ``scores[step][s - 1]``: the same for each decode step.
        prefill_margins: ``prefill_margins[s - 1]``: pooled score of the k_s-th best candidate and
            of the next one, None where there is no such candidate. Always-kept tokens rank above
            every score and so appear here as inf. Two nearly equal numbers are a tie that rounding
            may decide either way.
        margins: ``margins[step][s - 1]``: the same for each decode step.
        logits: for each generated token the logits it was chosen by, [vocab].
        resident: ``resident[s]``: sorted prompt positions with keys in stage s, when a turn that is
            not the first begins; of one that drops tokens of its own with those that it keeps.
        computed: (position, layer) pairs computed, prompt and generated, layers counted from 0.
        prompt_keys: number of prompt tokens with keys in each stage at the end.
        share_computed: share of the (prompt token, layer) pairs that were computed.
    """

    tokens: list[int] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    selected: list[list[list[int]]] = field(default_factory=list)
    revived: list[list[list[int]]] = field(default_factory=list)
    prefill_scores: list[Tensor] = field(default_factory=list)
    scores: list[list[Tensor]] = field(default_factory=list)
    prefill_margins: list[Margin] = field(default_factory=list)
    margins: list[list[Margin]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    resident: list[list[int]] = field(default_factory=list)
    computed: set[tuple[int, int]] = field(default_factory=set)
    prompt_keys: list[int] = field(default_factory=list)
    share_computed: float = 1.0


def generate(
    model: PreTrainedModel,
    prompt: list[int],
    config: LazyLLMConfig,
    max_new_tokens: int,
    stop_token: int | None = None,
) -> Trace:
    """Greedy decoding of at least one token, until ``stop_token`` or ``max_new_tokens``."""
    return generate_turns(model, prompt, config, max_new_tokens, [], stop_token)[0]


def generate_turns(
    model: PreTrainedModel,
    prompt: list[int],
    config: LazyLLMConfig,
    max_new_tokens: int,
    turns: list[list[int]],
    stop_token: int | None = None,
) -> list[Trace]:
    """The same, and then further turns that go on from it: see ``ReferenceSequence.go_on``. After
    each so many more are generated.

    Args:
        turns: the tokens of each, after the last one that was generated.

    Returns:
        What each did, with counts of all so far. But for the first, the first step is that of the
        turn's last token.
    """
    assert prompt and max_new_tokens >= 1
    longest = max_new_tokens + sum(len(turn) + max_new_tokens for turn in turns)
    sequence = ReferenceSequence(model, prompt, config, longest)
    logits, traces = sequence.prefill(), []
    for turn in [*turns, None]:
        trace = sequence.trace
        trace.logits.append(logits)
        trace.tokens.append(int(logits.argmax()))
        while len(trace.tokens) < max_new_tokens and trace.tokens[-1] != stop_token:
            trace.logits.append(sequence.decode(trace.tokens[-1]))
            trace.tokens.append(int(trace.logits[-1].argmax()))

        trace.computed = {(p, layer) for layer, p in sequence.computed.nonzero().tolist()}
        trace.prompt_keys = [sequence.prompt_keys(s) for s in range(sequence.num_stages)]
        computed_prompt = sequence.computed[:, : sequence.num_prompt]
        trace.share_computed = int(computed_prompt.sum()) / computed_prompt.numel()
        traces.append(trace)
        if turn is not None:
            logits = sequence.go_on([trace.tokens[-1], *turn])
    return traces


class ReferenceSequence:
    """One prompt and what it generates, with the state of design section 1.

    Attributes (P = most positions there can be, N = ``num_prompt``, S = ``num_stages``):
        starts: first layer of each stage, then the number of layers.
        kept_count: k_s for each stage; with ``keep_mass`` at most, until its boundary is reached.
        least: tokens that every stage keeps.
        room: most prompt tokens that may ever have keys in each stage.
        state_room: the longest that the prompt may get by long turns.
        keys, values: by layer, [kv heads, P, head dim], by position, NaN until computed.
        level: [P] int64: number of stages in which a position has keys (invariant 1).
        aux: the Aux Cache: position -> (stage, the position's input to that stage, [hidden]).
        computed: [layers, P] bool.
        score: [P] fp32, after the last step.
    """

    def __init__(
        self, model: PreTrainedModel, prompt: list[int], config: LazyLLMConfig, max_new_tokens: int
    ) -> None:
        self.decoder, self.prompt, self.config = HFDecoder(model), prompt, config
        self.num_prompt = n = len(prompt)
        num_layers = self.decoder.num_layers
        self.boundaries = config.boundaries(num_layers, self.decoder.full_layers)
        self.starts = [0, *(b.layer for b in self.boundaries), num_layers]
        self.num_stages = len(self.boundaries) + 1
        self.state_room = 2 * n

        least = max(config.first_tokens + config.last_tokens, config.min_keep_tokens)
        self.least = min(n, least)
        self.kept_count = self._kept_of(n)
        if n < config.min_prompt_tokens:
            self.kept_count = [n] * self.num_stages
        least = 8 * min(config.revive_per_turn, config.revive_budget)
        least = least if config.reuse == "deep" and config.revive_reserve else 0
        rooms = [(n - k, _ceil_share(config.revive_reserve, n - k)) for k in self.kept_count]
        self.room = [n - drop + max(share, min(least, drop)) for drop, share in rooms]

        self.always_kept = self._always_kept(n)

        most = n + max_new_tokens
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.level = torch.zeros(most, dtype=torch.long)
        self.aux: dict[int, tuple[int, Tensor]] = {}
        self.computed = torch.zeros(num_layers, most, dtype=torch.bool)
        self.next_position = 0
        self.score = torch.zeros(most)
        self.trace = Trace()

    def _kept_of(self, count: int) -> list[int]:
        """By stage, how many of so many tokens are kept."""
        least = min(count, self.least)
        return [count] + [max(_ceil_share(b.keep, count), least) for b in self.boundaries]

    def _always_kept(self, n: int) -> Tensor:
        """[N] bool: the tokens at either end of a prompt of ``n``."""
        position = torch.arange(n)
        first, last = self.config.first_tokens, self.config.last_tokens
        return (position < first) | (position >= n - last)

    def prompt_keys(self, stage: int) -> int:
        """How many prompt tokens have keys in ``stage``."""
        return int((self.level[: self.num_prompt] > stage).sum())

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        """Run the prompt, fewer tokens in each stage; return the last token's logits, [vocab]."""
        rows = list(range(self.num_prompt))
        self.next_position = self.num_prompt
        hidden = self.decoder.embed(self.prompt, torch.tensor(rows))
        window = min(self.config.score_window, self.num_prompt)
        before = torch.zeros(len(self.level)) if self.config.score == "peak" else None
        hidden, score = self._run_stage(0, hidden, rows, window, before=before)
        self.trace.kept.append(rows)
        for s in range(1, self.num_stages):
            candidates = self.level[: self.num_prompt] >= s
            ranking, pooled, margin = self._rank(s, score, candidates)
            self._keep_by_mass(s, ranking, pooled)
            kept = sorted(ranking[: self.kept_count[s]])
            hidden = self._exchange(s, hidden, rows, kept)
            rows = kept
            before = score if self.config.score == "peak" else None
            hidden, score = self._run_stage(s, hidden, rows, window, before=before)
            self.trace.kept.append(kept)
            self.trace.prefill_scores.append(pooled)
            self.trace.prefill_margins.append(margin)
            self.score = before if before is not None else self.score
        self._check_invariants()
        return self.decoder.logits(hidden[-1])

    @torch.inference_mode()
    def decode(self, token: int) -> Tensor:
        """One decode step for ``token``; return the logits of the token after it, [vocab]."""
        return self._select_and_run([token], is_turn=False)

    def _select_and_run(self, tokens: list[int], is_turn: bool) -> Tensor:
        """Run tokens through all stages, of which the last one, or in a turn each, says what is
        revived for all. Of a turn as much is as there is room for, whatever its score."""
        trace, config = self.trace, self.config
        for record in (trace.selected, trace.revived, trace.scores, trace.margins):
            record.append([])
        current = list(range(self.next_position, self.next_position + len(tokens)))
        self.next_position += len(tokens)
        rows, carry = current, config.score_carry
        hidden = self.decoder.embed(tokens, torch.tensor(rows))
        is_peak = config.score == "peak"
        before = torch.zeros(len(self.level)) if is_turn and is_peak else None
        window = len(tokens) if is_peak else 1
        hidden, score = self._run_stage(0, hidden, rows, window, before=before)
        if carry and not is_turn:
            score = torch.maximum(score, carry * self.score)
        strict = self.config.decode == "strict"
        is_selected = torch.ones(self.num_prompt, dtype=torch.bool)  # stage 0 attends to all
        for s in range(1, self.num_stages):
            candidates = self.level[: self.num_prompt] >= s
            if strict:
                candidates &= is_selected  # the others got no attention in stage s - 1
            ranking, pooled, margin = self._rank(s, score, candidates)
            selected = ranking[: self.kept_count[s]]
            is_selected = torch.zeros_like(is_selected)
            is_selected[selected] = True

            # The ranking's always-kept head has keys everywhere, so this is in order of score.
            missing = [p for p in (ranking if is_turn else selected) if self.level[p] == s]
            most = config.revive_per_turn
            if not is_turn:
                missing = [p for p in missing if pooled[p] >= config.revive_min_score]
                most = config.revive_per_request
            most = min(config.revive_budget, most)
            limit = min(most, self.room[s] - self.prompt_keys(s))
            revived = sorted(missing[:limit])
            hidden = self._exchange(s, hidden, rows, [*revived, *current])
            rows = [*revived, *current]
            seen = is_selected if strict else None
            if is_turn and strict:
                hidden, of_stage = self._run_strict_turn(s, hidden, rows, len(current), seen)
            elif carry and s == self.num_stages - 1:
                hidden, of_stage = self._run_stage(s, hidden, rows, 1, seen, score, every=3)
            elif is_turn and is_peak:
                hidden, of_stage = self._run_stage(s, hidden, rows, window, seen, score)
            else:
                hidden, of_stage = self._run_stage(s, hidden, rows, 1, seen)
            score = torch.maximum(score, of_stage) if carry else of_stage

            trace.selected[-1].append(sorted(selected))
            trace.revived[-1].append(revived)
            trace.scores[-1].append(pooled)
            trace.margins[-1].append(margin)
        self.score = score
        self._check_invariants()
        return self.decoder.logits(hidden[-1])

    def _run_strict_turn(
        self, s: int, hidden: Tensor, rows: list[int], count: int, is_selected: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``_run_stage`` where ``decode`` is ``strict`` and ``count`` of the rows are a turn's: its
        last token and what comes back attend to the selection, the tokens between to all keys."""
        assert self.config.score == "mean", "the last token alone scores"
        bounds, outs = [0, len(rows) - count, len(rows) - 1, len(rows)], []
        for nth, (first, end) in enumerate(zip(bounds, bounds[1:])):
            seen = None if nth == 1 else is_selected
            if first < end:
                out, score = self._run_stage(s, hidden[first:end], rows[first:end], 1, seen)
                outs.append(out)
        return torch.cat(outs), score

    @torch.inference_mode()
    def go_on(self, tokens: list[int]) -> Tensor:
        """Begin another turn: run these tokens through all stages, one by one, each attending to
        what has keys there, but the last ``score_window`` of them together: they say what is
        revived and see it. Return the logits of the token after them, [vocab]."""
        in_prompt = self.level[: self.num_prompt]
        stages = range(self.num_stages)
        self.trace = Trace(resident=[(in_prompt > s).nonzero()[:, 0].tolist() for s in stages])
        window = min(self.config.score_window, len(tokens))
        if self._drops(len(tokens)):
            return self._go_on_and_drop(tokens)
        for token in tokens[:-window]:
            rows = [self.next_position]
            self.next_position += 1
            hidden = self.decoder.embed([token], torch.tensor(rows))
            for s in stages:
                hidden, _ = self._run_stage(s, hidden, rows, 1)
        return self._select_and_run(tokens[-window:], is_turn=window > 1)

    def _drops(self, own: int) -> bool:
        """Whether a turn of so many tokens drops some of them."""
        config, n = self.config, self.next_position + own
        least = min(512, config.min_prompt_tokens)
        plain = config.decode == "strict" or config.keep_mass is not None
        selects = self.room != self.kept_count
        return selects and not plain and own >= least and n <= self.state_room

    def _go_on_and_drop(self, tokens: list[int]) -> Tensor:
        """A long turn: its tokens are the prompt's, of which the last ``score_window`` say which of
        the others each stage keeps, and what is revived of the prompt before. The others do not see
        what is revived."""
        config, trace, begin, first = self.config, self.trace, self.num_prompt, self.next_position
        window, n = config.score_window, first + len(tokens)
        end = n - window
        own = self._kept_of(len(tokens))
        rooms = [_ceil_share(config.revive_reserve, len(tokens) - k) for k in own]
        added = [first - begin + k for k in own]
        had = [self.prompt_keys(s) for s in range(self.num_stages)]
        self.kept_count = [k + more for k, more in zip(self.kept_count, added)]
        self.room = [k + more + room for k, more, room in zip(self.room, added, rooms)]
        self.num_prompt = self.next_position = n
        self.always_kept = self._always_kept(n)
        for record in (trace.selected, trace.revived, trace.scores, trace.margins):
            record.append([])

        rows, last = list(range(first, n)), list(range(end, n))
        hidden = self.decoder.embed(tokens, torch.tensor(rows))
        is_peak = config.score == "peak"
        before = torch.zeros(len(self.level)) if is_peak else None
        scoring = window if is_peak else 1
        hidden, score = self._run_stage(0, hidden, rows, scoring, before=before)
        for s in range(1, self.num_stages):
            ranking, pooled, margin = self._rank(s, score, self._candidates(s, last))
            count = own[s] - window
            chosen = sorted([p for p in ranking if first <= p < end][:count])
            missing = [p for p in ranking if p < begin and self.level[p] == s]
            most = min(config.revive_budget, config.revive_per_turn)
            limit = max(min(most, self.room[s] - had[s] - added[s]), 0)
            revived = sorted(missing[:limit])
            hidden = self._exchange(s, hidden, rows, [*chosen, *revived, *last])
            of_chosen, _ = self._run_stage(s, hidden[:count], chosen, 1)
            rows = [*revived, *last]
            every = 3 if s == self.num_stages - 1 else 1
            before = score if is_peak and (every == 1 or config.score_carry) else None
            others, of_stage = self._run_stage(
                s, hidden[count:], rows, scoring if every == 1 else 1, None, before, every
            )
            hidden, rows = torch.cat([of_chosen, others]), [*chosen, *rows]
            score = of_stage if before is None else torch.maximum(score, of_stage)
            trace.selected[-1].append(sorted(ranking[: self.kept_count[s]]))
            trace.revived[-1].append(revived)
            trace.scores[-1].append(pooled)
            trace.margins[-1].append(margin)
        self.score = score
        for s in range(self.num_stages):
            revived = trace.revived[-1][s - 1] if s else []
            here = (self.level[:n] > s).nonzero()[:, 0].tolist()
            trace.resident[s] = [p for p in here if p not in revived]
        self._check_invariants()
        return self.decoder.logits(hidden[-1])

    def _candidates(self, s: int, last: list[int]) -> Tensor:
        """[N] bool: which prompt tokens have keys in the stage before ``s``; the last ones have, or
        will have, in all."""
        candidates = self.level[: self.num_prompt] >= s
        candidates[last] = True
        return candidates

    def _rank(self, s: int, score: Tensor, candidates: Tensor) -> tuple[list[int], Tensor, Margin]:
        """Candidates of boundary s from best to worst, by (pooled score descending, position
        ascending) after the always-kept ones; the pooled scores; the margin (see Trace).

        Args:
            score: [P] fp32, of stage s - 1.
            candidates: [N] bool.
        """
        assert candidates[self.always_kept].all()
        score = score[: self.num_prompt].masked_fill(~candidates, -torch.inf)
        before, after = self.config.score_pool
        around = F.pad(score[None], (before, after), value=-torch.inf)
        pooled = F.max_pool1d(around, before + 1 + after, stride=1)[0]
        pooled = pooled.masked_fill(~candidates, -torch.inf)

        rank_by = pooled.masked_fill(self.always_kept, torch.inf).tolist()
        ranking = sorted(candidates.nonzero()[:, 0].tolist(), key=lambda p: (-rank_by[p], p))
        best = [rank_by[p] for p in ranking] + [None] * self.num_prompt
        k = self.kept_count[s]
        return ranking, pooled, (best[k - 1], best[k])

    def _keep_by_mass(self, s: int, ranking: list[int], pooled: Tensor) -> None:
        """With ``keep_mass``: the least k that hold the share, between the floor and the most."""
        n, mass = self.num_prompt, self.config.keep_mass
        if mass is None or n < self.config.min_prompt_tokens or self.kept_count[-1] == n:
            return
        units = [0 if self.always_kept[p] else int(float(pooled[p]) * 2**30) for p in ranking]
        wanted, held, count = math.ceil(sum(units) * mass), 0, 0
        while count == 0 or held < wanted:
            held += units[count]
            count += 1
        most = min(self.kept_count[s - 1 : s + 1])
        self.kept_count[s] = min(max(count, self.least), most)
        self.kept_count[s + 1 :] = [min(k, self.kept_count[s]) for k in self.kept_count[s + 1 :]]

    def _exchange(self, s: int, hidden: Tensor, rows: list[int], next_rows: list[int]) -> Tensor:
        """Boundary s: rows leave stage s - 1 for the Aux Cache, and those that stage s runs come
        out of it: what was just put there for a token that goes straight on, else what an earlier
        step left. Nothing is thrown away, so this also runs with ``revive_budget`` 0.

        Args:
            hidden: [len(rows), hidden], the output of stage s - 1 (= input to stage s).

        Returns:
            [len(next_rows), hidden]
        """
        for p, state in zip(rows, hidden, strict=True):
            assert p not in self.aux
            self.aux[p] = (s, state)
        taken = [self.aux.pop(p) for p in next_rows]
        assert all(stage == s for stage, _ in taken)
        return torch.stack([state for _, state in taken])

    def _run_stage(
        self,
        s: int,
        hidden: Tensor,
        rows: list[int],
        window: int,
        is_selected: Tensor | None = None,
        before: Tensor | None = None,
        every: int = 1,
    ) -> tuple[Tensor, Tensor | None]:
        """Run rows through stage s. Each attends to what has keys there, at or before its position
        and, in a layer with a sliding window, within the window, which counts positions.

        Args:
            hidden: [len(rows), hidden], input to the stage.
            rows: positions, rising; the last is the current token.
            window: the last of them whose attention is the score.
            is_selected: [N] bool, the only prompt tokens to attend to; None: all with keys here.
            before: [P] fp32, scores of earlier stages; those of this one are the highest of them
                and of every layer here. None: the last layer's alone. Only layers that see all
                positions score: those with a sliding window cannot tell what matters.
            every: of these layers only one of so many scores, from the first on.

        Returns:
            The stage's output, [len(rows), hidden], and the score of every position, [P] fp32, 0
            for those that are not attended to; None: no layer scores.
        """
        positions = torch.tensor(rows)
        assert (self.level[positions] == s).all() and (positions.diff() > 0).all()
        self.level[positions] = s + 1
        visible = self.level > s
        if is_selected is not None:
            visible[: self.num_prompt] &= is_selected
        attended = visible.nonzero()[:, 0]
        score = before
        layers = range(self.starts[s], self.starts[s + 1])
        scoring = [layer for layer in layers if self.decoder.sees_all(layer)][::every]
        for layer in layers:
            hidden, weights = self._run_layer(layer, hidden, positions, attended)
            if layer in scoring:
                score = self._score(weights[:, -window:], attended)
                if before is not None:
                    before = score = torch.maximum(before, score)
        return hidden, score

    def _run_layer(
        self, layer: int, hidden: Tensor, positions: Tensor, attended: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One decoder layer: its output and its attention weights, [heads, rows, attended]."""
        assert not self.computed[layer, positions].any(), "computed twice"
        self.computed[layer, positions] = True
        weights = None

        def attend(query, key, value, sliding_window, sinks) -> Tensor:
            nonlocal weights
            for cache, new in ((self.keys, key), (self.values, value)):
                if layer not in cache:
                    cache[layer] = torch.full((len(new), len(self.level), new.shape[-1]), torch.nan)
                cache[layer][:, positions] = new
            keys, values = self.keys[layer][:, attended], self.values[layer][:, attended]
            out, weights = attention(
                query, keys, values, positions, attended, sliding_window, sinks
            )
            return out

        hidden = self.decoder.layer(layer, hidden, positions, attend)
        return hidden, weights

    def _score(self, weights: Tensor, attended: Tensor) -> Tensor:
        """score_i = mean_h softmax_j(q_h . k_g(h),j / sqrt(d))_i (paper 3.2: of the last row), or
        the highest of them, over the heads and the rows, where those before the last four count
        for a quarter; [P] fp32, for the weights of the rows that score."""
        score = torch.zeros(len(self.level))
        if self.config.score == "peak":
            earlier, last = weights[:, :-4] / 4, weights[:, -4:]
            score[attended] = torch.cat([earlier, last], 1).amax((0, 1))
        else:
            score[attended] = weights.mean((0, 1))
        return score

    def _check_invariants(self) -> None:
        """Invariants 1 and 2 of design section 1, between steps; 3 is checked in each layer."""
        for s in range(self.num_stages):
            for layer in range(self.starts[s], self.starts[s + 1]):
                for cache in (self.keys[layer], self.values[layer]):
                    has_keys = ~cache.isnan().any(dim=2).any(dim=0)
                    assert torch.equal(has_keys, self.level > s)
            assert self.kept_count[s] <= self.prompt_keys(s) <= self.room[s]
        level = self.level[: self.next_position].tolist()
        dropped = {p: at for p, at in enumerate(level) if at < self.num_stages}
        assert {p: stage for p, (stage, _) in self.aux.items()} == dropped
        assert all(p < self.num_prompt for p in dropped), "a generated token was pruned"


def _ceil_share(share: float, count: int) -> int:
    """ceil(share * count) for the decimal number that was written: 0.3 of 10 is 3, not 4."""
    return math.ceil(Fraction(str(share)) * count)
