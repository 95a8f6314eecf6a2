"""One long prompt through stock vLLM and then with LazyLLM:  python -m benchmarks.demo

DEMO_VERBOSE=1 shows the log of vLLM as it goes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.cpu import use_cpu_settings
from benchmarks.passkey import passkey_prompt
from benchmarks.smollm2 import checkpoint
from lazyllm_vllm.plan.config import LazyLLMConfig

PROMPT_TOKENS, SEED = 1500, 0
CONFIG, NUM_LAYERS = LazyLLMConfig(preset="balanced"), 30
RESULT = "DEMO_RESULT "  # marks the line of a child's output that is meant for us


def main() -> None:
    console = Console(highlight=False)
    with step(console, "SmolLM2-135M checkpoint"):
        run_child(console, "benchmarks.smollm2")
    results = {}
    for engine, label in (("stock", "stock vLLM"), ("lazyllm", "LazyLLM")):
        with step(console, f"{PROMPT_TOKENS:,} tokens through {label}"):
            line = run_child(console, "benchmarks.demo", "--engine", engine)
        results[label] = json.loads(line)
    console.print()
    console.print(table(results))


@contextmanager
def step(console: Console, label: str) -> Iterator[None]:
    """A spinner while it lasts, a line with the time when it is done."""
    start = time.perf_counter()
    with console.status(f"{label} ..."):
        yield
    console.print(f"[green]done[/] {label} [dim]{time.perf_counter() - start:.0f} s[/]")


def run_child(console: Console, module: str, *args: str) -> str:
    """Run a module in a process of its own, since a vLLM engine does not give all back within
    one; what it printed after ``RESULT``. Its log is shown if it fails, and then we end too."""
    verbose = os.environ.get("DEMO_VERBOSE") == "1"
    log: list[str] = []
    result = ""
    with subprocess.Popen(
        [sys.executable, "-m", module, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as child:
        for line in child.stdout:
            if line.startswith(RESULT):
                result = line.removeprefix(RESULT)
                continue
            log.append(line.rstrip("\n"))
            if verbose:
                console.print(log[-1], style="dim", markup=False)
    if child.returncode:
        if not verbose:
            console.print("\n".join(log[-40:]), style="dim", markup=False)
        console.print(f"[red]failed[/] {module} ended with status {child.returncode}")
        sys.exit(1)
    return result


def run_engine(engine: str) -> dict:
    """Answer the prompt; what the table shows of it."""
    from transformers import AutoTokenizer

    from vllm import LLM, SamplingParams

    path = str(checkpoint())
    prompt, key = passkey_prompt(AutoTokenizer.from_pretrained(path), PROMPT_TOKENS, SEED)
    llm = LLM(
        path,
        max_model_len=4096,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        additional_config={"lazyllm": CONFIG.model_dump()} if engine == "lazyllm" else {},
    )
    sampling = SamplingParams(temperature=0, max_tokens=16)
    (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
    kept, revived, share = [len(prompt)], [], 1.0
    if engine == "lazyllm":
        from lazyllm_vllm import request_stats

        (request,) = request_stats(llm)["requests"]
        kept, revived = request["kept"], request["revived"]
        share = request["share_computed"]
    return {
        "answer": output.outputs[0].text.strip(),
        "right": key in output.outputs[0].text,
        "prompt_tokens": len(prompt),
        "kept": kept,
        "revived": sum(revived),
        "share_computed": share,
        "room": llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens,
    }


def table(results: dict[str, dict]) -> Table:
    """The results side by side, a column for each engine."""
    stages = [0, *(cut.layer for cut in CONFIG.boundaries(NUM_LAYERS)), NUM_LAYERS]
    shown = Table("", title="A pass key hidden in a long text", title_justify="left")
    for label in results:
        shown.add_column(label, justify="right")

    def row(label: str, cell) -> None:
        shown.add_row(label, *(cell(result) for result in results.values()))

    row("answer", lambda r: escape(r["answer"]))
    row("  right", lambda r: "[green]yes[/]" if r["right"] else "[red]no[/]")
    row("prompt tokens", lambda r: f"{r['prompt_tokens']:,}")
    for stage, (start, end) in enumerate(zip(stages, stages[1:], strict=False)):
        row(
            f"  kept in layers {start + 1} to {end}",
            lambda r, stage=stage: f"{r['kept'][min(stage, len(r['kept']) - 1)]:,}",
        )
    row("  revived in decoding", lambda r: f"{r['revived']:,}")
    row("share of prompt computed", lambda r: f"{r['share_computed']:.0%}")
    row("KV cache room, tokens", lambda r: f"{r['room']:,}")
    return shown


if __name__ == "__main__":
    use_cpu_settings()
    # The engine in our own process, where its KV cache's size and its statistics can be read.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("stock", "lazyllm"), help=argparse.SUPPRESS)
    if engine := parser.parse_args().engine:
        print(RESULT + json.dumps(run_engine(engine)), flush=True)
    else:
        main()
