"""Rivals through the real engine, against what a plain model makes of the same rule."""

import tempfile
from pathlib import Path

import pytest
import torch
from harness.hf_decoder import HFDecoder, attention
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.engine import Engine
from benchmarks.passkey import passkey_prompt
from benchmarks.quality.compression import Compression
from benchmarks.quality.methods import SCORES, Method
from benchmarks.quality.rivals import FASTKV, GEMFILTER_DEPTH, uniprefill
from benchmarks.quality.schedules import COMPARED
from benchmarks.quality.start import start

LAYERS = 30
LIKELIEST = 5
CUTS = COMPARED.prune(LAYERS)


@pytest.fixture(scope="module")
def prompts(smollm2) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [passkey_prompt(tokenizer, n, seed=n)[0] for n in (200, 330)]


@pytest.fixture(scope="module")
def model(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ask(smollm2):
    """``ask(method, prompts)``: the likeliest next tokens and two greedy ones of each prompt, and
    the share of the prompts that was computed."""

    def ask(method: Method, prompts, prune=None, **options):
        config = method.config
        if config is not None:
            config = {"prune": prune, "min_prompt_tokens": 100} | config
        options = {"max_model_len": 1024, "max_num_seqs": 16} | options
        options |= {"dtype": "float32", "enforce_eager": True, "max_logprobs": LIKELIEST}
        given = {"model": str(smollm2), "config": config, "scorer": method.scorer}
        log = Path(tempfile.mkstemp(suffix=".log")[1])
        functions = "benchmarks.quality.answer"
        engine = Engine(start, given | {"options": options}, functions, log)
        try:
            engine.ready()
            expected = engine.run("expectations", prompts=prompts, likeliest=LIKELIEST, continued=2)
            return expected, engine.run("share_computed")
        finally:
            engine.close()
            log.unlink()

    return ask


def _assert_close(mine: dict[int, float], logits: torch.Tensor) -> None:
    log_p = logits.log_softmax(-1)
    assert set(mine) == set(log_p.topk(LIKELIEST).indices.tolist())
    assert max(abs(log_p[token] - p) for token, p in mine.items()) < 1e-3


def _run(decoder: HFDecoder, hidden, positions, layers: range):
    """Hidden states after the layers; queries, keys and weights of the last of them."""
    seen = None

    def attend(query, key, value, window, sinks):
        nonlocal seen
        output, weights = attention(query, key, value, positions, positions, window, sinks)
        seen = query, key, weights
        return output

    for layer in layers:
        hidden = decoder.layer(layer, hidden, positions, attend)
    return hidden, seen


@torch.inference_mode()
def test_fastkv_is_that_of_a_plain_model(ask, model, prompts):
    """Half of the layers run on all tokens, half on those that FastKV chooses."""
    answers, share = ask(FASTKV, prompts, [{"layer": 15, "keep": 0.2}])
    decoder = HFDecoder(model)
    for prompt, (mine, continued) in zip(prompts, answers):
        n, position = len(prompt), torch.arange(len(prompt))
        hidden, (_, _, weights) = _run(
            decoder, decoder.embed(prompt, position), position, range(15)
        )
        pooled = F.max_pool1d(weights[:, -8:, :-8].sum(1), 7, stride=1, padding=3)
        best = pooled.sum(0).sort(descending=True, stable=True).indices
        count = -(-n // 5)
        kept = torch.cat([best[: count - 8].sort().values, position[-8:]])
        hidden, _ = _run(decoder, hidden[kept], kept, range(15, LAYERS))
        _assert_close(mine, decoder.logits(hidden[-1]))
        assert len(continued) == 2
    assert share == pytest.approx(0.6, abs=0.01)


@torch.inference_mode()
def test_gemfilter_is_that_of_a_plain_model(ask, model, prompts):
    """A prompt that comes in chunks, and one that is too short, among them."""
    how = Compression("last query", 0.3, depth=GEMFILTER_DEPTH, min_prompt_tokens=240)
    answers, _ = ask(Method("", None, how), prompts, max_num_batched_tokens=256)
    decoder = HFDecoder(model)
    for prompt, (mine, _) in zip(prompts, answers):
        kept = torch.tensor(prompt)
        if len(prompt) >= 240:
            position = torch.arange(len(prompt))
            _, (query, key, _) = _run(decoder, decoder.embed(prompt, position), position, range(13))
            products = (query[:, -1:] @ key.repeat_interleave(3, 0).mT).sum((0, 1))
            sums = F.conv1d(products[None, None], torch.ones(1, 1, 5), padding=2)[0, 0]
            count = -(-len(prompt) * 3 // 10)
            kept = kept[sums.topk(count).indices.sort().values]
        _assert_close(mine, model(kept[None]).logits[0, -1])


@torch.inference_mode()
def test_prompt_compression_is_that_of_a_plain_model(ask, model, prompts):
    """Of a prompt cut short, since vLLM's log-probabilities take long on a CPU."""
    prompt = torch.tensor(prompts[0][:60])
    how = Compression("surprise", 0.5, first_tokens=4, last_tokens=8, min_prompt_tokens=50)
    ((mine, _),), share = ask(Method("", None, how), [prompt.tolist()])
    log_p = model(prompt[None]).logits[0].log_softmax(-1)
    surprise = -log_p[:-1].gather(1, prompt[1:, None])[:, 0]
    between = surprise[3 : 60 - 8 - 1].topk(30 - 12).indices + 4
    kept = torch.cat([torch.arange(4), between.sort().values, torch.arange(52, 60)])
    _assert_close(mine, model(prompt[kept][None]).logits[0, -1])
    assert share is None


def test_lazyllms_rule_is_lazyllms_own(ask, prompts):
    """Over two boundaries, of prompts that come in chunks: the first one's ends in its window."""
    like = next(method for method in SCORES if method.name == "LazyLLM's rule")
    chunk = len(prompts[0]) - 5
    answers, own = (
        ask(method, prompts, CUTS, max_num_batched_tokens=chunk)
        for method in (like, Method("own", like.config))
    )
    for (mine, continued), (other, same) in zip(answers[0], own[0]):
        assert mine == pytest.approx(other, abs=1e-3) and continued == same
    assert answers[1] == own[1]


def test_chunks_answer(ask, prompts):
    method = next(method for method in SCORES if method.name == "chunks of 16")
    answers, share = ask(method, prompts, CUTS)
    assert [len(continued) for _, continued in answers] == [2] * 2
    assert 0.4 < share < 0.6


def test_uniprefill_keeps_less_for_less_mass(ask, prompts):
    method, schedule = uniprefill()[-1]
    answers, share = ask(method, prompts, schedule.prune(LAYERS))
    assert [len(continued) for _, continued in answers] == [2] * 2
    assert share < 1
