"""Every engine argument of the installed vLLM is known to work, refused, or without effect."""

import dataclasses
import pickle

import pytest

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

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


@pytest.mark.parametrize("others", [[], ["--additional-config", '{"another": 1}']])
def test_the_flag_reaches_front_ends_that_load_plugins_late(others, tmp_path):
    """With ``--api-server-count`` vLLM hands the arguments on to processes that read them first."""
    load_general_plugins()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--model", str(tmp_path), "--lazyllm-config", '{"first_tokens": 7}', *others]
    args = parser.parse_args(flags)
    first = AsyncEngineArgs.from_cli_args(args).additional_config
    without_plugins = AsyncEngineArgs.from_cli_args.__func__.__wrapped__
    there = without_plugins(AsyncEngineArgs, pickle.loads(pickle.dumps(args))).additional_config
    assert there == first == ({"another": 1} if others else {}) | {"lazyllm": {"first_tokens": 7}}
