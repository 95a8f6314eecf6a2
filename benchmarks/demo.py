"""One long prompt through stock vLLM and then with LazyLLM:  python -m benchmarks.demo

DEMO_VERBOSE=1 keeps the engines' logs and says where.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.checkpoints import smollm2
from benchmarks.cpu import use_cpu_settings
from benchmarks.engine import Engine
from benchmarks.passkey import passkey_prompt
from lazyllm_vllm.plan.config import LazyLLMConfig

PROMPT_TOKENS, SEED = 1500, 0
CONFIG = LazyLLMConfig()


def main() -> None:
    from transformers import AutoTokenizer

    console = Console(highlight=False)
    with step(console, "SmolLM2-135M checkpoint"):
        model = str(smollm2())
    prompt, key = passkey_prompt(AutoTokenizer.from_pretrained(model), PROMPT_TOKENS, SEED)
    results = {}
    for label, config in (("stock vLLM", None), ("LazyLLM", CONFIG.model_dump())):
        with step(console, f"{PROMPT_TOKENS:,} tokens through {label}"):
            results[label] = run(console, model, config, prompt)
    console.print()
    console.print(table(results, len(prompt), key))
    page = Path(tempfile.mkstemp(prefix="lazyllm-demo-", suffix=".html")[1])
    page.write_text(results["LazyLLM"]["page"], encoding="utf-8")
    console.print(f"What became of each token, to open in a browser: {page}", soft_wrap=True)


@contextmanager
def step(console: Console, label: str) -> Iterator[None]:
    """A spinner while it lasts, a line with the time when it is done."""
    start = time.perf_counter()
    with console.status(f"{label} ..."):
        yield
    console.print(f"[green]done[/] {label} [dim]{time.perf_counter() - start:.0f} s[/]")


def run(console: Console, model: str, config: dict | None, prompt: list[int]) -> dict:
    """Answer the prompt in an engine of its own; ends the program, with the log's end, if that
    fails."""
    log = Path(tempfile.mkstemp(suffix=".log")[1])
    engine = Engine(start, {"model": model, "config": config}, __spec__.name, log)
    try:
        engine.ready()
        return engine.run("answer", prompt=prompt)
    except RuntimeError as error:
        console.print(str(error), style="dim", markup=False)
        sys.exit(1)
    finally:
        engine.close()
        if os.environ.get("DEMO_VERBOSE") == "1":
            console.print(f"the log of vLLM: {log}", style="dim")
        else:
            log.unlink()


def start(model: str, config: dict | None):
    """A ``vllm.LLM``, with a trace; ``config`` None: stock vLLM."""
    from vllm import LLM

    from lazyllm_vllm.observe.explain.local import start_traced

    options = {"max_model_len": 4096, "max_num_batched_tokens": 4096}
    if config is not None:
        return start_traced(model, config, **options)
    return LLM(model, **options, enforce_eager=True)  # as the other, which leaves as much room


def answer(llm, prompt: list[int]) -> dict:
    """What the table shows of the prompt's answer, and LazyLLM's ``page`` about it."""
    from vllm import SamplingParams

    from lazyllm_vllm import request_stats
    from lazyllm_vllm.hooks.engine_config import lazyllm_config, schedule_of
    from lazyllm_vllm.observe.explain.local import explain_output
    from lazyllm_vllm.observe.explain.render import render

    sampling = SamplingParams(temperature=0, max_tokens=16)
    (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
    config = llm.llm_engine.vllm_config
    result = {"kept": [len(prompt)], "revived": [], "share_computed": 1.0, "starts": ()}
    if lazyllm_config(config) is not None:
        (result,) = request_stats(llm)["requests"]
        page = render(explain_output(llm, "SmolLM2-135M-Instruct", output))
        result |= {"starts": schedule_of(config).starts, "page": page}
    room = config.cache_config.kv_cache_size_tokens
    return result | {"answer": output.outputs[0].text.strip(), "room": room}


def table(results: dict[str, dict], num_prompt: int, key: str) -> Table:
    """The results side by side, a column for each engine."""
    starts = max((result["starts"] for result in results.values()), key=len)
    shown = Table("", title="A pass key hidden in a long text", title_justify="left")
    for label in results:
        shown.add_column(label, justify="right")

    def row(label: str, cell) -> None:
        shown.add_row(label, *(cell(result) for result in results.values()))

    row("answer", lambda r: escape(r["answer"]))
    row("  right", lambda r: "[green]yes[/]" if key in r["answer"] else "[red]no[/]")
    row("prompt tokens", lambda r: f"{num_prompt:,}")
    for stage, (first, end) in enumerate(pairwise(starts)):
        row(
            f"  kept in layers {first + 1} to {end}",
            lambda r, stage=stage: f"{r['kept'][min(stage, len(r['kept']) - 1)]:,}",
        )
    row("  revived in decoding", lambda r: f"{sum(r['revived']):,}")
    row("share of prompt computed", lambda r: f"{r['share_computed']:.0%}")
    row("KV cache room, tokens", lambda r: f"{r['room']:,}")
    return shown


if __name__ == "__main__":
    use_cpu_settings()
    main()
