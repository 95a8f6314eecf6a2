"""Say what ``vllm serve`` would make of a model and its flags, before any weights load.

Takes every flag of ``vllm serve`` behind the model. Exit code 0: it would start. 1: it would not,
with the error that says why.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from lazyllm_vllm import __version__
from lazyllm_vllm.hooks.versions import check_version


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="as for vllm serve: a folder or a name; comes first")
    parser.add_argument(
        "--lazyllm-config", metavar="JSON|FILE|PRESET", help="left out: the default preset"
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="prompts to work out; left out: 4096, 32768 and --max-model-len",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, no tables")
    parser.set_defaults(takes_others=True)


def main(args: argparse.Namespace) -> int:
    # Standard output is the result's; vLLM reads these when it is imported.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    found = _find(args)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)
    return 0 if found["error"] is None else 1


def _find(args: argparse.Namespace) -> dict[str, Any]:
    """``diagnosis.diagnose``, if it can be imported."""
    import vllm

    try:
        check_version(vllm.__version__)
    except RuntimeError as error:
        versions = {"vllm": vllm.__version__, "lazyllm-vllm": __version__}
        return {"error": str(error), "versions": versions, "gpu": None}
    from lazyllm_vllm.cli.diagnosis import diagnose

    flags = [] if args.lazyllm_config is None else ["--lazyllm-config", args.lazyllm_config]
    return diagnose([args.model, *flags, *args.others], args.lengths)


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold")
        for at, column in enumerate(columns):
            made.add_column(column, justify="right" if at else "left")
        return made

    # Names and messages are no markup.
    console = Console(markup=False, highlight=False, soft_wrap=True)
    gpu = found["gpu"]
    device = f"{gpu['name']}, {gpu['bytes'] / 2**30:.0f} GiB" if gpu else "no GPU"
    versions = found["versions"]
    console.print(f"vLLM {versions['vllm']}, lazyllm-vllm {versions['lazyllm-vllm']}, {device}")
    if found["error"] is not None:
        console.print(f"would not start: {found['error']}", style="red")
        return
    model, schedule, room = found["model"], found["schedule"], found["kv_cache"]
    console.print(
        f"{Path(model['name']).name}: {model['class']}, {model['layers']} layers, "
        f"{model['dtype']}, at most {model['max_model_len']:,} tokens: would start"
    )
    if not model["tested"]:
        console.print(f"{model['class']} was not tested; allow_untested_model lets it run")
    console.print(f"switched off: {', '.join(found['switched_off']) or 'nothing'}")
    revival = f"{schedule['revive_budget']} rows a step" if schedule["revives"] else "off"
    console.print(
        f"decode: {schedule['decode']}; revival: {revival}; prompts under "
        f"{schedule['min_prompt_tokens']:,} tokens are not pruned"
    )

    stages = table("Schedule", "stage", "layers", "keep", *schedule["choices"])
    for at, stage in enumerate(schedule["stages"]):
        others = (f"{keeps[at]:g}" for keeps in schedule["choices"].values())
        first, last = stage["layers"]
        stages.add_row(str(at), f"{first} to {last}", f"{stage['keep']:g}", *others)
    console.print(stages)

    where = room["of"] + (", less what a step takes" if room["of"] == "this GPU" else "")
    cache = table(f"KV cache, {where}: blocks of {room['block_size']}", "", "tokens")
    cache.add_row("stock vLLM", f"{room['stock_tokens']:,}")
    cache.add_row("LazyLLM", f"{room['tokens']:,}")
    cache.add_row("ratio", f"{room['ratio']:.2f}")
    console.print(cache)

    prompts = table("Prompts", "tokens", "kept by stage", "blocks", "operations", "stock", "saved")
    for one in found["lengths"]:
        prompts.add_row(
            f"{one['tokens']:,}",
            ", ".join(f"{kept:,}" for kept in one["kept"]),
            f"{one['blocks']:,}",
            f"{one['operations']:.3g}",
            f"{one['stock_operations']:.3g}",
            f"{one['ratio']:.2f}x fewer" if one["pruned"] else "not pruned",
        )
    console.print(prompts)
