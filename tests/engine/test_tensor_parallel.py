"""Two ranks, each with half of the heads, do what one process does: the same tokens are kept,
selected and revived, and they are the reference's. With a trace the ranks compare what they choose
at every boundary. Four and eight ranks do so in the slow tests."""

import random

import pytest
import torch
from harness import agreement, families, reference
from transformers import AutoModelForCausalLM, LlamaConfig

from lazyllm_vllm.plan.config import parse_config

LENGTHS = (40, 300, 700, 1100)
NEW_TOKENS = 6
QUOTA = 8
CONFIG = {
    "min_prompt_tokens": 256,
    "first_tokens": 4,
    "last_tokens": 32,
    "revive_per_request": QUOTA,
    "revive_per_turn": QUOTA,
    "revive_min_score": 0,
    "reuse": "deep",
}
MODES = {
    # The peak over heads; keys of one of two heads on each rank.
    "resident": {"prune": [{"layer": 2, "keep": 0.5}, {"layer": 4, "keep": 0.25}]},
    # Their mean; one head of keys, which both ranks have.
    "strict": {
        "prune": [{"layer": 1, "keep": 0.8}, {"layer": 3, "keep": 0.5}, {"layer": 4, "keep": 0.3}],
        "decode": "strict",
        "score": "mean",
        "keep_mass": 0.9,
        "min_keep_tokens": 90,
    },
}
KV_HEADS = {"resident": 2, "strict": 1}
# Tokens a step, such that a chunk ends within a window.
SMALL_STEPS = {"resident": 144, "strict": 147}
OPTIONS = {
    "skip_tokenizer_init": True,
    "block_size": 16,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 8,
}
RNG = random.Random(0)
PROMPTS = [[RNG.randrange(3, 1000) for _ in range(n)] for n in LENGTHS]


class Ranks:
    """The same engine on one rank and on several.

    Attributes:
        folder: of the model.
        config: LazyLLM's, but for the budget.
        small_steps: tokens of steps in which a window is split.
    """

    def __init__(self, mode: str, folder, open_engine, ranks: int = 2, **options) -> None:
        options = OPTIONS | options
        self.small_steps = SMALL_STEPS[mode]
        self.folder, self.config = folder, CONFIG | MODES[mode]
        budget = {"revive_budget": QUOTA * len(PROMPTS)}
        arguments = folder, self.config | budget, {"trace": True}
        # Workers as vLLM starts them on a CPU take as long as it does to import vLLM.
        forks = {"forks_workers": ranks > 2 or mode == "resident"}
        self.several = open_engine(
            *arguments[:2], arguments[2] | forks, tensor_parallel_size=ranks, **options
        )
        self.one = open_engine(*arguments, **options)

    def close(self) -> None:
        self.one.close()
        self.several.close()

    def run(self, function: str, **arguments) -> list:
        return [engine.run(function, **arguments) for engine in (self.one, self.several)]

    def generate(self, *args, **kwargs) -> dict:
        """What both make of it, which is the same."""
        one, two = (engine.generate(*args, **kwargs) for engine in (self.one, self.several))
        for what in ("prefills", "decodes", "tokens", "stats", "cached"):
            one_what, two_what = one[what], two[what]
            if what == "stats":
                one_what, two_what = (_without_names(each) for each in (one_what, two_what))
            assert one_what == two_what, what
        assert two["free_blocks"][0] == two["free_blocks"][1]
        return two


def _without_names(stats: list[dict]) -> list[dict]:
    return [entry | {"request_id": None} for entry in stats]


def _make_model(folder, **shape) -> None:
    """Hidden states of 128 fill a page of one rank, and two of each of two, with two KV heads."""
    torch.manual_seed(3)
    shape = families.SHAPE | {"hidden_size": 128} | shape
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.float32)
    families.randomize(model)
    model.save_pretrained(folder)


@pytest.fixture(scope="module", params=MODES)
def ranks(request, tmp_path_factory, open_engine):
    mode = request.param
    folder = tmp_path_factory.mktemp(mode)
    _make_model(folder, num_key_value_heads=KV_HEADS[mode])
    ranks = Ranks(mode, folder, open_engine)
    yield ranks
    ranks.close()


def test_two_ranks_are_the_reference(ranks):
    result = ranks.generate(PROMPTS, NEW_TOKENS)
    assert max(len(p[-1]["chunks"]) for p in result["prefills"]) > 1
    model = AutoModelForCausalLM.from_pretrained(ranks.folder, dtype=torch.float32)
    seen = agreement.compare(model, PROMPTS, ranks.config, QUOTA, result)
    seen.check(least_compared=0.5, most_ties=2)


def test_small_chunks_and_shared_prefixes(ranks):
    """The window of a prompt is spread over chunks, and scores wait in the prompt state. Where none
    is kept by its mass, later stages are spread over steps."""
    ranks.run("reset_prefix_cache")
    ranks.run("set_budget", tokens=ranks.small_steps)
    result = ranks.generate(PROMPTS, 3)
    window_is_split = [
        any(0 < n - end < 16 for _, end in p[-1]["chunks"])
        for n, p in zip(LENGTHS, result["prefills"])
    ]
    assert any(window_is_split[1:])
    assert any(ranks.generate([p[:-9] for p in PROMPTS], 3)["cached"])
    ranks.run("set_budget", tokens=512)


def test_the_next_turns_go_on(ranks):
    """The second is a long turn, where there are any: the ranks' scores become one once, though its
    last token chooses by them and so does the rest."""
    ranks.run("reset_prefix_cache")
    prompt, turns = PROMPTS[1], [PROMPTS[0][:20]]
    turns += [PROMPTS[2][:257]] * (ranks.config.get("decode") != "strict")
    results, said = [ranks.generate([prompt], NEW_TOKENS)], list(prompt)
    for turn in turns:
        said += results[-1]["tokens"][0]
        results.append(ranks.generate([said + turn], NEW_TOKENS))
        (stats,) = results[-1]["stats"]
        assert stats["reused"] == len(said) - 1
        said += turn
        drops = stats["prompt_tokens"] == len(said)
        assert drops == (len(turn) > 256)
    model = AutoModelForCausalLM.from_pretrained(ranks.folder, dtype=torch.float32)
    seen = agreement.compare_turns(model, prompt, turns, ranks.config, QUOTA, results)
    seen.check(least_compared=0.9, most_ties=0)


def test_aborted_requests_leave_nothing_behind(ranks):
    ranks.run("reset_prefix_cache")
    prompts = [PROMPTS[2][i : 300 + i] for i in range(5)]
    one, two = ranks.run("abort", prompts=prompts, max_tokens=6)
    assert two["tokens"] == one["tokens"] and len(two["tokens"]["r4"]) == 6
    assert two["free_blocks"][0] == two["free_blocks"][1]


def test_preempted_requests_finish_right(ranks):
    """Tokens are the reference's for the prompt; where it had to be pruned anew, for it and what
    had been generated."""
    prompts = [PROMPTS[3][i : 300 + i] for i in range(3)]
    need = ranks.several.run("blocks_needed", num_tokens=300)
    ranks.several.run("set_room", blocks=3 * need + 2)
    result = ranks.several.generate(prompts, 20)
    ranks.several.run("set_room", blocks=None)
    assert result["preemptions"] > 0, "nothing was preempted: the test shows nothing"
    assert result["free_blocks"][0] == result["free_blocks"][1]
    model = AutoModelForCausalLM.from_pretrained(ranks.folder, dtype=torch.float32)
    config = parse_config(ranks.config | {"revive_budget": QUOTA})
    for prompt, tokens, prefills in zip(prompts, result["tokens"], result["prefills"], strict=True):
        starts = [p["num_prompt"] - len(prompt) for p in prefills if "resident" not in p]
        assert starts[0] == 0 and len(tokens) == 20
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            ref = reference.generate(model, prompt + tokens[:start], config, end - start)
            assert tokens[start:end] == ref.tokens


def test_requests_are_counted_once(ranks):
    first, other = ranks.several.run("call_worker", method="lazyllm_stats")
    assert first["total"]["requests"] > 0 and other["total"]["requests"] == 0
    assert ranks.several.log.count("LazyLLM is on") == 1


def test_ranks_that_disagree_say_so(ranks):
    """If scores are not reduced, other tokens are chosen. The last test: the engine ends."""
    ranks.several.run("forget_reduction")
    with pytest.raises(RuntimeError, match="at the boundary before stage 1, ranks .1. chose other"):
        ranks.several.generate(PROMPTS[1:2], 2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", (4, 8))
def test_more_ranks_than_kv_heads(tmp_path, open_engine, mode, count):
    """Eight query heads, so with eight ranks one on each, and two of keys, each on several."""
    _make_model(tmp_path, num_attention_heads=8, num_key_value_heads=2)
    # Each rank has a KV cache of its own in this machine's memory: small ones.
    ranks = Ranks(mode, tmp_path, open_engine, count, num_gpu_blocks_override=4000)
    result = ranks.generate(PROMPTS[1:3], 3)
    ranks.close()
    assert all(len(p[-1][1]) < p[-1]["num_prompt"] for p in result["prefills"])
