"""Every engine argument of the installed vLLM is known to work, refused, or without effect."""

import dataclasses

from vllm.engine.arg_utils import AsyncEngineArgs

from lazyllm_vllm.hooks.engine_args import WITHOUT_EFFECT, WORKS
from lazyllm_vllm.hooks.refusals import REFUSALS

# Of vLLM's releases that have them.
ONLY_LATER = {"monokernel", "sleep_mode_backend", "watchdog_config"}  # 0.33


def test_every_argument_is_in_one_list():
    refused = {field.split(".")[0] for refusal in REFUSALS for field in refusal.fields}
    # Values of these are refused, others work.
    lists = [WORKS, WITHOUT_EFFECT, refused - WORKS]
    listed = [name for names in lists for name in names]
    assert len(listed) == len(set(listed)), "no argument is in two lists"
    there = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert not there - set(listed), "look at what is new in vLLM, and list it"
    assert not set(listed) - there - ONLY_LATER, "vLLM has no such argument"
