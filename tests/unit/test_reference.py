"""The reference against Hugging Face, against a dense recomputation, and against its invariants.

The dense recomputation (``replay``) shares no code with the reference. No token is computed twice,
so a whole run is one pass over all tokens in which each layer's mask says who saw whom: row i sees
column j if j is not after i, nor too far before it for a layer with a sliding window, and had its
keys by the time that i was computed.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from harness import families
from harness.hf_decoder import attention
from harness.reference import ReferenceSequence, Trace, generate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lazyllm_vllm.plan.config import LazyLLMConfig

VOCAB = 97
LAYERS = 6
NEVER = 10**9


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """With tensors this small, a second thread makes the tests ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(seed: int = 0) -> LlamaForCausalLM:
    """A tiny random Llama whose attention is far from even, so that scores differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.25,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


MODEL = make_model()


def make_prompt(length: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def make_config(*prune: tuple[int, float], **fields) -> LazyLLMConfig:
    fields = {
        "min_prompt_tokens": 1,
        "first_tokens": 2,
        "last_tokens": 3,
        "score": "mean",
        "score_window": 1,
        "score_pool": 1,
    } | fields
    return LazyLLMConfig(prune=[{"layer": layer, "keep": keep} for layer, keep in prune], **fields)


@pytest.fixture(scope="module", params=families.NAMES)
def family(request, tmp_path_factory) -> tuple[str, PreTrainedModel]:
    folder = families.save_tiny(request.param, tmp_path_factory.mktemp("family"))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return request.param, model


def stage_starts(config: LazyLLMConfig, num_layers: int = LAYERS) -> list[int]:
    return [0, *(b.layer for b in config.prune), num_layers]


def sliding_window(model: PreTrainedModel, layer: int) -> float:
    """How many positions a layer sees."""
    kinds = getattr(model.config, "layer_types", None)
    sliding = kinds is not None and kinds[layer] == "sliding_attention"
    return model.config.sliding_window if sliding else math.inf


def expected_counts(config: LazyLLMConfig, n: int) -> list[int]:
    """k_s as the design says it."""
    if n < config.min_prompt_tokens:
        return [n] * (len(config.prune) + 1)
    always = min(n, config.first_tokens + config.last_tokens)
    return [n] + [max(math.ceil(Fraction(str(b.keep)) * n), always) for b in config.prune]


@torch.inference_mode()
def hf_greedy(prompt: list[int], max_new_tokens: int) -> tuple[list[int], list[Tensor]]:
    out = MODEL.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), [row[0] for row in out.logits]


def arrivals(trace: Trace, n: int, num_stages: int) -> list[list[int]]:
    """[s][p]: when position p got its keys in stage s: 0 at prefill, i + 1 in decode step i."""
    steps = len(trace.tokens) - 1
    table = []
    for s in range(num_stages):
        at = [NEVER] * n + [step + 1 for step in range(steps)]
        for p in trace.kept[s]:
            at[p] = 0
        for step in range(steps if s else 0):
            for p in trace.revived[step][s - 1]:
                assert at[p] == NEVER, f"position {p} came to stage {s} twice"
                at[p] = step + 1
        table.append(at)
    return table


@dataclass
class Replay:
    logits: Tensor  # [T, vocab]
    weights: list[Tensor]  # a layer: [heads, T, T]
    keys: list[Tensor]  # a layer: [kv heads, T, d]
    values: list[Tensor]


@torch.inference_mode()
def replay(
    model: PreTrainedModel, prompt: list[int], config: LazyLLMConfig, trace: Trace
) -> Replay:
    """The run that ``trace`` records, as one dense pass of Hugging Face's own forward, in which
    every layer gets another mask."""
    n, layers = len(prompt), model.model.layers
    starts = stage_starts(config, len(layers))
    ids = torch.tensor([prompt + trace.tokens[:-1]])
    size = ids.shape[1]
    table = arrivals(trace, n, len(starts) - 1)
    cache, weights, hooks = DynamicCache(), [], []
    for s, at in enumerate(table):

        def sees(i: int, j: int) -> bool:
            if at[i] == NEVER:
                return i == j  # a row nobody reads; without this its softmax would be NaN
            if config.decode == "strict" and s > 0 and at[i] > 0 and j < n:
                if j not in trace.selected[at[i] - 1][s - 1]:
                    return False
            return j <= i and at[j] <= at[i]

        seen = torch.tensor([[sees(i, j) for j in range(size)] for i in range(size)])
        for number in range(starts[s], starts[s + 1]):
            distance = torch.arange(size)[:, None] - torch.arange(size)
            near = distance < sliding_window(model, number)
            mask = torch.zeros(size, size).masked_fill(~(seen & near), -torch.inf)[None, None]

            def use_mask(_module, args, kwargs, mask=mask):
                return args, kwargs | {"attention_mask": mask}

            def keep_weights(_module, _inputs, out):
                weights.append(out[1][0])

            hooks += [
                layers[number].register_forward_pre_hook(use_mask, with_kwargs=True),
                layers[number].self_attn.register_forward_hook(keep_weights),
            ]
    logits = model(ids, past_key_values=cache, use_cache=True).logits[0]
    for hook in hooks:
        hook.remove()
    return Replay(
        logits=logits,
        weights=weights,
        keys=[layer.keys[0] for layer in cache.layers],
        values=[layer.values[0] for layer in cache.layers],
    )


def expected_pooled(
    score: list[float], candidates: set[int], around: tuple[int, int]
) -> list[float]:
    before, after = around
    return [
        max(score[q] for q in candidates if p - before <= q <= p + after)
        if p in candidates
        else -math.inf
        for p in range(len(score))
    ]


def expected_ranking(pooled: list[float], candidates: set[int], config: LazyLLMConfig) -> list[int]:
    """Best first, found one by one: a later position wins only with a higher score."""
    n = len(pooled)
    left = sorted(candidates)
    ranking = [p for p in left if p < config.first_tokens or p >= n - config.last_tokens]
    left = [p for p in left if p not in ranking]
    while left:
        best = left[0]
        for p in left:
            if pooled[p] > pooled[best]:
                best = p
        ranking.append(best)
        left.remove(best)
    return ranking


def check_run(
    prompt: list[int], config: LazyLLMConfig, trace: Trace, model: PreTrainedModel = MODEL
) -> None:
    """Everything a trace claims, from the replay of it and from the rules of design section 1."""
    n, steps = len(prompt), len(trace.tokens) - 1
    starts = stage_starts(config, len(model.model.layers))
    num_stages = len(starts) - 1
    counts = expected_counts(config, n)
    dense = replay(model, prompt, config, trace)
    table = arrivals(trace, n, num_stages)

    torch.testing.assert_close(
        torch.stack(trace.logits), dense.logits[n - 1 :], atol=2e-4, rtol=1e-4
    )
    assert trace.tokens == [int(row.argmax()) for row in trace.logits]
    assert len(trace.selected) == len(trace.revived) == len(trace.scores) == steps

    def attention(layers: range | list[int], first: int, end: int) -> torch.Tensor:
        """[heads of all layers that see everything, rows, positions]"""
        seen = [layer for layer in layers if sliding_window(model, layer) == math.inf]
        return torch.cat([dense.weights[layer][:, first:end] for layer in seen])

    carry = config.score_carry
    highest = torch.zeros(n)  # so far in this step, or left of the steps before
    for when in range(steps + 1):  # 0: prefill, i + 1: decode step i
        highest = carry * highest
        for s in range(1, num_stages):
            candidates = {p for p in range(n) if table[s - 1][p] <= when}
            if config.decode == "strict" and when > 0 and s > 1:
                candidates &= set(trace.selected[when - 1][s - 2])
            window = 1 if when else min(config.score_window, n)
            peak = config.score == "peak"
            scoring = range(starts[s]) if peak and not when else [starts[s] - 1]
            queries = attention(scoring, n + when - window, n + when)
            if peak:
                for row in range(window - 4):
                    queries[:, row] /= 4
            score = (queries.amax((0, 1)) if peak else queries.mean((0, 1)))[:n]
            if carry:
                score = highest = highest.maximum(score)
            score = score.tolist()
            pooled = trace.scores[when - 1][s - 1] if when else trace.prefill_scores[s - 1]
            torch.testing.assert_close(
                pooled,
                torch.tensor(expected_pooled(score, candidates, config.score_pool)),
                atol=1e-5,
                rtol=1e-4,
            )
            # From here on with the run's own scores: exact, so that ties are ties.
            pooled = pooled.tolist()
            ranking = expected_ranking(pooled, candidates, config)
            chosen = ranking[: counts[s]]
            ranked_scores = [
                math.inf if p < config.first_tokens or p >= n - config.last_tokens else pooled[p]
                for p in ranking
            ] + [None] * (n + 1)
            margin = trace.margins[when - 1][s - 1] if when else trace.prefill_margins[s - 1]
            assert margin == (ranked_scores[counts[s] - 1], ranked_scores[counts[s]])
            if when == 0:
                assert trace.kept[s] == sorted(chosen)
                continue
            assert trace.selected[when - 1][s - 1] == sorted(chosen)
            reserve = math.ceil(Fraction(str(config.revive_reserve)) * (n - counts[s]))
            present = sum(at < when for at in table[s][:n])
            room = max(0, counts[s] + reserve - present)
            missing = [p for p in chosen if table[s][p] >= when]
            missing = [p for p in missing if pooled[p] >= config.revive_min_score]
            expected = missing[: min(config.revive_budget, room)]
            assert trace.revived[when - 1][s - 1] == sorted(expected)
        behind = range(starts[-2], starts[-1])
        behind = [layer for layer in behind if sliding_window(model, layer) == math.inf][::3]
        if when and carry and behind:
            last = attention(behind, n + when - 1, n + when)
            highest = highest.maximum(last.amax((0, 1))[:n])

    check_invariants(n, config, trace, table, starts)


def check_invariants(
    n: int, config: LazyLLMConfig, trace: Trace, table: list[list[int]], starts: list[int]
) -> None:
    steps = len(trace.tokens) - 1
    counts = expected_counts(config, n)
    always = {p for p in range(n) if p < config.first_tokens or p >= n - config.last_tokens}
    assert trace.kept[0] == list(range(n))
    for s in range(1, len(counts)):
        assert set(trace.kept[s]) <= set(trace.kept[s - 1])
        assert len(trace.kept[s]) == counts[s] <= counts[s - 1]
        assert always <= set(trace.kept[s])
        # Level grows by one stage at a time: keys in a stage never come before those in the last.
        assert all(before <= at for before, at in zip(table[s - 1], table[s]))
        room = counts[s] + math.ceil(Fraction(str(config.revive_reserve)) * (n - counts[s]))
        assert trace.prompt_keys[s] == sum(at < NEVER for at in table[s][:n]) <= room
        for step in range(steps):
            selected, revived = trace.selected[step][s - 1], trace.revived[step][s - 1]
            assert always <= set(selected) and len(selected) <= counts[s]
            if config.decode == "resident" or s == 1:
                assert len(selected) == counts[s]
            assert set(revived) <= set(selected)
            assert len(revived) <= config.revive_budget
    assert trace.prompt_keys[0] == n

    # Every pair that the trace claims, and no other: generated tokens are computed everywhere.
    pairs = [
        (p, layer)
        for s, at in enumerate(table)
        for p in range(n + steps)
        if at[p] < NEVER
        for layer in range(starts[s], starts[s + 1])
    ]
    assert trace.computed == set(pairs)
    of_prompt = [pair for pair in pairs if pair[0] < n]
    assert trace.share_computed == pytest.approx(len(of_prompt) / (n * starts[-1]))


@st.composite
def schedules(draw) -> tuple[tuple[int, float], ...]:
    count = draw(st.sampled_from([3, 2, 1, 0]))  # Hypothesis leans to the front
    layers = sorted(draw(st.permutations(range(1, LAYERS)))[:count])
    shares = st.sampled_from([0.5, 0.4, 0.3, 0.6, 0.25, 0.7, 0.2, 0.8, 0.1, 0.05, 1.0])
    keeps = sorted((draw(shares) for _ in layers), reverse=True)
    return tuple(zip(layers, keeps))


@settings(max_examples=300, deadline=None)
@given(
    length=st.one_of(st.integers(15, 45), st.integers(1, 45)),
    seed=st.integers(0, 1000),
    schedule=schedules(),
    budget=st.sampled_from([3, 100, 1, 0]),
    reserve=st.sampled_from([0.3, 1.0, 0.1, 0.0]),
    decode=st.sampled_from(["resident", "strict"]),
    pool=st.sampled_from([1, 1, 3, (5, 1)]),
    window=st.sampled_from([1, 1, 2, 4]),
    score=st.sampled_from(["mean", "peak"]),
    carry=st.sampled_from([0.5, 0.0, 0.9]),
    least=st.sampled_from([0.0, 0.1, 0.3]),
    first=st.integers(0, 3),
    last=st.integers(1, 4),
    shortest=st.sampled_from([1, 1, 1, 20]),
    max_new_tokens=st.sampled_from([6, 4, 2, 1]),
)
def test_any_run_obeys_the_rules(
    length,
    seed,
    schedule,
    budget,
    reserve,
    decode,
    pool,
    window,
    score,
    carry,
    least,
    first,
    last,
    shortest,
    max_new_tokens,
):
    config = make_config(
        *schedule,
        min_prompt_tokens=shortest,
        first_tokens=first,
        last_tokens=last,
        score_pool=pool,
        score_window=min(window, last),
        score=score,
        score_carry=carry if score == "peak" else 0,
        decode=decode,
        revive_min_score=least,
        revive_budget=budget,
        revive_reserve=reserve,
    )
    prompt = make_prompt(length, seed)
    trace = generate(MODEL, prompt, config, max_new_tokens)
    assert len(trace.tokens) == max_new_tokens
    check_run(prompt, config, trace)
    if budget == 0 or reserve == 0:
        assert not any(p for step in trace.revived for p in step)
        assert trace.prompt_keys == expected_counts(config, length)


@pytest.mark.parametrize(
    "config",
    [
        make_config(),
        make_config((2, 1.0), (4, 1.0)),
        make_config((2, 1.0), (4, 1.0), decode="strict", score_pool=5),
        make_config((2, 0.3), (4, 0.1), min_prompt_tokens=38),
        make_config((2, 0.3), (4, 0.1), first_tokens=20, last_tokens=17, decode="strict"),
    ],
    ids=["no boundary", "keep all", "keep all, strict", "too short to prune", "always kept"],
)
def test_unpruned_equals_hugging_face(config):
    prompt = make_prompt(37)
    trace = generate(MODEL, prompt, config, 12)
    tokens, logits = hf_greedy(prompt, 12)
    assert trace.tokens == tokens
    assert len(set(tokens)) > 3  # a run that says something
    torch.testing.assert_close(torch.stack(trace.logits), torch.stack(logits), atol=2e-4, rtol=1e-4)
    assert trace.share_computed == 1 and trace.prompt_keys == [37] * len(trace.kept)


def test_unpruned_is_the_model_itself_in_every_family(family):
    name, model = family
    prompt = make_prompt(200, vocab=1000)
    config = make_config(*((layer, 1.0) for layer in families.boundaries(name)))
    trace = generate(model, prompt, config, 4)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + trace.tokens[:-1]]), use_cache=False).logits[0, 199:]
    torch.testing.assert_close(torch.stack(trace.logits), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decode", ["resident", "strict"])
def test_a_pruned_run_obeys_the_rules_in_every_family(family, decode):
    """With a prompt longer than a window, and the paper's scores in strict decoding."""
    name, model = family
    config = make_config(
        *zip(families.boundaries(name), (0.5, 0.25)),
        decode=decode,
        revive_budget=8,
        **{"score": "peak", "score_window": 3} if decode == "resident" else {},
    )
    prompt = make_prompt(150, vocab=1000)
    trace = generate(model, prompt, config, 5)
    assert any(revived for step in trace.revived for revived in step)
    check_run(prompt, config, trace, model)


def test_a_sliding_window_counts_positions_and_not_the_kept():
    """Keys that are all alike get equal parts, so that a part tells how many there were."""
    positions, attended = torch.tensor([6, 9]), torch.tensor([0, 3, 4, 6, 9])
    query, keys = torch.ones(2, 2, 1), torch.zeros(1, 5, 1)
    values = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])[None, :, None]

    def parts(sliding_window, sinks):
        return attention(query, keys, values, positions, attended, sliding_window, sinks)

    out, weights = parts(None, None)
    torch.testing.assert_close(weights[0], torch.tensor([[1 / 4] * 4 + [0], [1 / 5] * 5]))
    torch.testing.assert_close(out[0], torch.tensor([[1111 / 4], [11111 / 5]]))
    third, half = 1 / 3, 1 / 2
    out, weights = parts(4, None)  # row 6 sees 3 to 6, and row 9 sees 6 to 9
    expected = torch.tensor([[0, third, third, third, 0], [0, 0, 0, half, half]])
    torch.testing.assert_close(weights, expected.expand(2, -1, -1))
    torch.testing.assert_close(out[1], torch.tensor([[1110 / 3], [11000 / 2]]))

    # The first head's sink is one more key like the others, and the second's is ten.
    _, weights = parts(4, torch.tensor([0, math.log(10)]))
    torch.testing.assert_close(weights.sum(-1), torch.tensor([[3 / 4, 2 / 3], [3 / 13, 2 / 12]]))


def test_layers_with_a_sliding_window_do_not_score(tmp_path):
    """Not even for a prompt shorter than the window, all of which they see."""
    folder = families.save_tiny("gpt_oss", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    prompt = make_prompt(40, vocab=1000)
    trace = generate(model, prompt, make_config((2, 0.5), score="peak"), 1)
    with torch.inference_mode():
        sliding, full = model(torch.tensor([prompt]), output_attentions=True).attentions[:2]
    by_full, by_sliding = (weights[0, :, -1].amax(0) for weights in (full, sliding))
    torch.testing.assert_close(trace.prefill_scores[0], by_full, atol=1e-6, rtol=1e-4)
    assert (by_sliding > by_full + 0.01).any()


def test_a_prompt_of_min_prompt_tokens_is_pruned():
    config = make_config((3, 0.5), min_prompt_tokens=30)
    assert len(generate(MODEL, make_prompt(29), config, 1).kept[1]) == 29
    assert len(generate(MODEL, make_prompt(30), config, 1).kept[1]) == 15


def test_stops_at_the_stop_token():
    prompt = make_prompt(20)
    full = generate(MODEL, prompt, make_config((3, 0.5)), 8)
    stop = full.tokens[4]
    end = full.tokens.index(stop) + 1
    stopped = generate(MODEL, prompt, make_config((3, 0.5)), 8, stop_token=stop)
    assert stopped.tokens == full.tokens[:end] and len(stopped.logits) == end
    assert len(stopped.selected) == end - 1


def test_shares_are_exact_decimals():
    """In binary floating point 0.07 * 100 is a little over 7."""
    assert math.ceil(0.07 * 100) == 8
    config = make_config((3, 0.07))
    assert len(generate(MODEL, make_prompt(100), config, 1).kept[1]) == 7


@torch.inference_mode()
def test_pruned_prefill_by_hand():
    """One boundary: the score from Hugging Face's own attention weights, and its layers run on the
    kept rows alone, with their original positions."""
    prompt, config = make_prompt(30), make_config((3, 0.4))
    trace = generate(MODEL, prompt, config, 1)

    full = MODEL.model(
        torch.tensor([prompt]), output_attentions=True, output_hidden_states=True, use_cache=False
    )
    score = full.attentions[2][0, :, -1].mean(0)
    torch.testing.assert_close(trace.prefill_scores[0], score, atol=1e-6, rtol=1e-4)
    middle = sorted(range(2, 27), key=lambda p: -score[p])[: 12 - 5]
    kept = sorted([0, 1, *middle, 27, 28, 29])
    assert trace.kept == [list(range(30)), kept]
    assert kept != list(range(30))[-12:] and kept != list(range(12))

    hidden = full.hidden_states[3][:, kept]
    rope = MODEL.model.rotary_emb(hidden, torch.tensor([kept]))
    mask = torch.full((12, 12), -torch.inf).triu(1)[None, None]
    for layer in MODEL.model.layers[3:]:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rope)
    logits = MODEL.lm_head(MODEL.model.norm(hidden[0, -1]))
    torch.testing.assert_close(trace.logits[0], logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("decode", ["resident", "strict"])
def test_revived_keys_come_from_the_right_hidden_state(decode):
    """A revived token's keys and values in every layer, for each way that it can come about."""
    config = make_config((2, 0.5), (4, 0.25), decode=decode, revive_budget=3, revive_reserve=0.8)
    prompt, steps = make_prompt(40, seed=5), 12
    sequence = ReferenceSequence(MODEL, prompt, config, steps + 1)
    trace = sequence.trace
    trace.logits.append(sequence.prefill())
    for _ in range(steps):
        trace.tokens.append(int(trace.logits[-1].argmax()))
        trace.logits.append(sequence.decode(trace.tokens[-1]))
    trace.tokens.append(int(trace.logits[-1].argmax()))

    table = arrivals(trace, 40, 3)
    revived = [set(p for step in trace.revived for p in step[s - 1]) for s in (1, 2)]
    straight_on = {p for p in revived[0] & revived[1] if table[1][p] == table[2][p]}
    back_to_aux = {p for p in revived[0] & revived[1] if table[1][p] < table[2][p]}
    from_prefill = {p for p in revived[1] if table[1][p] == 0}
    stayed_in_aux = revived[0] - revived[1]
    assert straight_on and back_to_aux and from_prefill and stayed_in_aux, "a weak case"

    dense = replay(MODEL, prompt, config, trace)
    starts = stage_starts(config)
    for s, at in enumerate(table):
        there = [p for p, when in enumerate(at) if when < NEVER]
        for layer in range(starts[s], starts[s + 1]):
            for got, want in ((sequence.keys, dense.keys), (sequence.values, dense.values)):
                torch.testing.assert_close(
                    got[layer][:, there], want[layer][:, there], atol=1e-4, rtol=1e-4
                )

    # What waits in the Aux Cache is right as well: the next stage's values, computed from it.
    assert stayed_in_aux <= sequence.aux.keys()
    for p, (stage, hidden) in sequence.aux.items():
        assert table[stage - 1][p] < NEVER == table[stage][p]
        block = MODEL.model.layers[starts[stage]]
        with torch.inference_mode():
            value = block.self_attn.v_proj(block.input_layernorm(hidden)).view(2, -1)
        torch.testing.assert_close(value, dense.values[starts[stage]][:, p], atol=1e-4, rtol=1e-4)


def test_strict_with_everything_selected_equals_resident():
    prompt = make_prompt(30)
    for fields in ({}, {"first_tokens": 15, "last_tokens": 15}):
        keep = 0.2 if fields else 1.0
        resident, strict = (
            generate(MODEL, prompt, make_config((2, keep), (4, keep), decode=decode, **fields), 10)
            for decode in ("resident", "strict")
        )
        assert strict.selected == resident.selected == [[list(range(30))] * 2] * 9
        torch.testing.assert_close(torch.stack(strict.logits), torch.stack(resident.logits))


def test_strict_differs_from_resident_when_pruned():
    """Else the test above would pass with ``decode`` ignored."""
    prompt = make_prompt(30)
    resident, strict = (
        generate(MODEL, prompt, make_config((2, 0.6), (4, 0.3), decode=decode), 10)
        for decode in ("resident", "strict")
    )
    assert torch.equal(strict.logits[0], resident.logits[0])
    assert not torch.allclose(strict.logits[1], resident.logits[1], atol=1e-2)


def test_equal_scores_go_to_the_lower_position():
    """A layer without queries attends to all tokens alike."""
    model = make_model(seed=1)
    queries = model.model.layers[2].self_attn.q_proj.weight
    config = make_config((3, 0.5), revive_budget=4, revive_reserve=1.0)

    sequence = ReferenceSequence(model, make_prompt(40), config, 4)
    logits = sequence.prefill()
    kept = sequence.trace.kept[1]
    assert kept != [*range(17), 37, 38, 39]  # scored: not yet the tie rule's choice
    with torch.no_grad():
        queries.zero_()
    sequence.decode(int(logits.argmax()))
    assert sequence.trace.scores[0][0].unique().numel() == 1
    assert sequence.trace.margins[0][0][0] == sequence.trace.margins[0][0][1]
    assert sequence.trace.selected == [[[*range(17), 37, 38, 39]]]
    missing = [p for p in range(17) if p not in kept]
    assert len(missing) > 4
    assert sequence.trace.revived == [[missing[:4]]]

    trace = generate(model, make_prompt(40), config, 1)
    assert trace.kept[1] == [*range(17), 37, 38, 39]


def test_pooling_reaches_so_far_and_only_from_candidates():
    """Pooled scores are those of a plain loop; a window of 1 leaves them alone."""
    prompt = make_prompt(40)
    plain = generate(MODEL, prompt, make_config((2, 0.5), (4, 0.25)), 1)
    pooled = generate(MODEL, prompt, make_config((2, 0.5), (4, 0.25), score_pool=(3, 1)), 1)
    raw = plain.prefill_scores[0].tolist()
    want = [max(raw[max(0, p - 3) : p + 2]) for p in range(40)]
    assert pooled.prefill_scores[0].tolist() == pytest.approx(want)
    candidates = set(pooled.kept[1])
    scored = {p for p in range(40) if pooled.prefill_scores[1][p] > -math.inf}
    assert scored == candidates != set(range(40))


def test_a_boundary_outside_the_model_is_refused():
    with pytest.raises(ValueError, match="layer 6"):
        generate(MODEL, make_prompt(20), make_config((6, 0.5)), 1)
