"""Two engines behind one address, ``--data-parallel-size 2``: each answers as one alone does, and
their counters add up to what was asked. vLLM then has two front ends, too."""

import json
import time
from pathlib import Path

import httpx
import pytest
from harness.server import NAME, scrape, serve
from transformers import AutoTokenizer

import vllm

from benchmarks.passkey import passkey_prompt
from lazyllm_vllm.plan.config import parse_config
from lazyllm_vllm.plan.schedule import Schedule

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not vllm.__version__.startswith("0.32")
        and not Path("/sys/devices/system/node/node1").exists(),
        reason="on a CPU, vLLM 0.33 wants a NUMA node for each engine",
    ),
]

CONFIG = {
    "prune": [{"layer": 10, "keep": 0.5}, {"layer": 20, "keep": 0.25}],
    "min_prompt_tokens": 256,
    "schedules": {"mild": [{"layer": 20, "keep": 0.6}]},
}
NEW_TOKENS = 8
# Settings of each prompt's request, and how many tokens it has, about.
ASKED = (({}, 400), ({"lazyllm": "mild"}, 350), ({"lazyllm": "off"}, 300), ({}, 200))


@pytest.fixture(scope="module")
def prompts(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [passkey_prompt(tokenizer, n, seed=n)[0] for _, n in ASKED]


def test_two_engines_are_one_twice(smollm2, prompts, open_engine, tmp_path):
    alone = open_engine(smollm2, CONFIG, max_model_len=1536, max_num_seqs=4)
    settings = [setting for setting, _ in ASKED]
    expected = alone.generate(prompts, NEW_TOKENS, extra_args=settings, together=False)
    alone.close()

    flags = ["--lazyllm-config", json.dumps(CONFIG), "--max-model-len", "1536"]
    flags += ["--max-num-seqs", "4", "--data-parallel-size", "2"]
    with serve(smollm2, tmp_path / "log", *flags) as (address, _):
        for engine in "01":
            for prompt, setting, tokens in zip(prompts, settings, expected["tokens"], strict=True):
                body = {"model": NAME, "prompt": prompt, "temperature": 0, "ignore_eos": True}
                body |= {"max_tokens": NEW_TOKENS, "return_token_ids": True, "vllm_xargs": setting}
                answer = httpx.post(
                    f"{address}/v1/completions",
                    json=body,
                    headers={"X-data-parallel-rank": engine},
                    timeout=300,
                )
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["token_ids"] == tokens
        for _ in range(20):  # counts are there soon after the last answer
            found = scrape(address)
            if sum(value for (_, name, _), value in found.items() if name == "requests") == 8:
                break
            time.sleep(0.5)

    schedule = Schedule.build(parse_config(CONFIG), 30)
    plans = [schedule.plan(len(p), schedule.setting(s)) for p, s in zip(prompts, settings)]
    revived = [sum(one["revived"][stage] for one in expected["stats"]) for stage in range(3)]
    assert revived[1] > 0
    for engine in "01":
        mine = {(name, own): value for (of, name, own), value in found.items() if of == engine}
        assert (mine["requests", "true"], mine["requests", "false"]) == (2, 2)
        assert mine["prompt_tokens", None] == sum(len(prompt) for prompt in prompts)
        for stage in range(3):
            assert mine["kept_tokens", str(stage)] == sum(plan.kept[stage] for plan in plans)
            assert mine["revived_tokens", str(stage)] == revived[stage]
        assert mine["aux_cache_blocks", None] == 0
