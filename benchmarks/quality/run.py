"""Run the quality benchmarks and write their results file."""

import argparse
from pathlib import Path

from benchmarks.cpu import use_cpu_settings
from benchmarks.quality import evaluate
from benchmarks.quality.evaluate import Cell, Model
from benchmarks.quality.jobs import Job, Jobs, Setting
from benchmarks.quality.methods import (
    FULL,
    LAZYLLM,
    MASS,
    METHODS,
    OPTIONS,
    POOLS,
    REUSES,
    REVIVAL,
    SCORES,
    Method,
)
from benchmarks.quality.results import FILE, LONGER, REUSE_FILE
from benchmarks.quality.rivals import LIKE, rivals
from benchmarks.quality.sample import Task
from benchmarks.quality.schedules import COMPARED, CURVE, MOST, SWEEP, Schedule
from benchmarks.quality.tasks import AGAIN, TASKS
from benchmarks.quality.tasks.published import Published, longbench, ruler
from lazyllm_vllm.plan.presets import PRESETS

_MEMORY = 40  # GiB of a GPU for the KV caches of all engines
HALVES = {"choosing": evaluate.choosing, "reporting": evaluate.reporting}


def _abilities(schedules: list[Schedule], args: argparse.Namespace) -> list[Job]:
    """The full model alone, up to lengths where it breaks."""
    return [Job("abilities", FULL, agreement=False)]


def _sweep(schedules: list[Schedule], args: argparse.Namespace) -> list[Job]:
    """LazyLLM at every schedule and the other methods at some, or at those asked for."""
    return [
        Job("sweep", method, at)
        for method in METHODS[1:]
        for at in schedules or (SWEEP if method is LAZYLLM else CURVE)
    ]


def _options(schedules: list[Schedule], args: argparse.Namespace) -> list[Job]:
    """One default changed at a time."""
    return [Job("options", method, at) for at in schedules or [COMPARED] for method in OPTIONS]


def _revival(schedules: list[Schedule], args: argparse.Namespace) -> list[Job]:
    """What revival buys."""
    return [Job("revival", method, at) for at in schedules or [COMPARED] for method in REVIVAL]


def _scores(schedules: list[Schedule], args: argparse.Namespace) -> list[Job]:
    """Other ways to score."""
    return [Job("scores", method, at) for at in schedules or [COMPARED] for method in SCORES]


def _pools(schedules: list[Schedule], args: argparse.Namespace) -> list[Job]:
    """Which neighbours are kept."""
    return [Job("pools", method, at) for at in schedules or [COMPARED] for method in POOLS]


def _mass(schedules: list[Schedule], args: argparse.Namespace) -> list[Job]:
    """How much to keep by the prompt."""
    return [Job("mass", method, at) for at in MOST for method in MASS]


def _rivals(schedules: list[Schedule], args: argparse.Namespace) -> list[Job]:
    """Others with cuts of their own, at as many operations as LazyLLM at these schedules."""
    jobs, like = [], schedules or LIKE
    for method, at in rivals(like, _path(args), args.lengths):
        if at is None:
            print(f"left out: {method.name}, which cannot take as few operations")
        else:
            jobs.append(Job("rivals", method, at))
    return jobs


def _presets(schedules: list[Schedule], args: argparse.Namespace) -> list[Job]:
    """As a user gets them, their cuts where they suit the model."""
    return [Job("presets", Method(name, {"preset": name})) for name in PRESETS]


def _longer(schedules: list[Schedule], args: argparse.Namespace) -> list[Job]:
    """The presets' schedules beside the full model, on prompts of other lengths than the rest."""
    at = schedules or [Schedule(cuts) for cuts in PRESETS.values()]
    lazy = [Job(LONGER, LAZYLLM, each, agreement=False) for each in at]
    return [Job(LONGER, FULL, agreement=False), *lazy]


def _reuse(schedules: list[Schedule], args: argparse.Namespace) -> list[Job]:
    """The default preset on what comes after others, with tasks and a results file of its own."""
    return [
        Job(part, method, agreement=False)
        for part, methods in (("full", (FULL,)), (REUSE, REUSES))
        for method in methods
    ]


REUSE = "reuse"  # not together with other parts
PARTS = {
    "abilities": _abilities,
    "presets": _presets,
    "sweep": _sweep,
    "options": _options,
    "revival": _revival,
    "pools": _pools,
    "scores": _scores,
    "mass": _mass,
    "rivals": _rivals,
    LONGER: _longer,
    REUSE: _reuse,
}
_IF_ASKED = (LONGER, REUSE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "parts", nargs="*", metavar="|".join(PARTS), help=f"all but {', '.join(_IF_ASKED)} if none"
    )
    parser.add_argument("--model", type=Path, help="a checkpoint's folder; SmolLM2-135M if none")
    parser.add_argument(
        "--samples", type=int, default=100, help="of each task at each length, a half"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000])
    parser.add_argument("--longbench", type=Path, metavar="FOLDER", help="with its .jsonl files")
    parser.add_argument("--ruler", type=Path, metavar="FOLDER", help="with TASK/validation.jsonl")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument(
        "--schedules",
        type=int,
        nargs="+",
        choices=range(len(SWEEP)),
        default=[],
        metavar="INDEX",
        help=f"of the sweep's, these alone: 0 to {len(SWEEP) - 1}",
    )
    parser.add_argument(
        "--half", nargs="+", choices=HALVES, default=list(HALVES), help="of the seeds; both if none"
    )
    parser.add_argument("--jobs", type=int, default=1, help="engines at once")
    parser.add_argument("--dtype", help="bfloat16 on a GPU, float32 elsewhere, if none")
    parser.add_argument("--out", type=Path, help=f"{FILE.name}, or {REUSE_FILE.name}, if none")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")


def main(args: argparse.Namespace) -> None:
    """Raises SystemExit for a part, method or task that there is not, for lengths that no task has,
    and if a job failed."""
    asked, chosen = jobs(args), tasks(args)
    use_cpu_settings()  # for the engines' processes, before anything imports Triton there
    halves = {half: HALVES[half](args.samples) for half in args.half}
    cells = [
        Cell(task, tokens, seeds, half)
        for half, seeds in halves.items()
        for task in chosen
        for tokens in args.lengths
        if tokens >= task.shortest
    ]
    if not cells:
        least = min(task.shortest for task in chosen)
        raise SystemExit(f"--lengths: these tasks have prompts of {least} tokens and more")
    out = args.out or (REUSE_FILE if _is_reuse(args) else FILE)
    setting = Setting(_model(args), cells, args.lengths, halves, out, args.commit)
    failed = Jobs(asked, setting).run(args.jobs)
    for label, error in failed.items():
        print(f"failed: {label}\n{error}\n")
    if failed:
        raise SystemExit(f"{len(failed)} of {len(asked)} failed: {'; '.join(failed)}")


def tasks(args: argparse.Namespace) -> list[Task | Published]:
    """Ours and those of the folders."""
    tasks = dict(AGAIN if _is_reuse(args) else TASKS)
    for read, folder in ((longbench, args.longbench), (ruler, args.ruler)):
        if folder is not None:
            there = {task.name: task for task in read(folder)}
            if not there:
                raise SystemExit(f"--{read.__name__}: {folder} has none of its files")
            tasks |= there
    if unknown := set(args.tasks or ()) - set(tasks):
        raise SystemExit(f"no such task: {', '.join(unknown)}; there are {', '.join(tasks)}")
    return [tasks[name] for name in args.tasks or tasks]


def jobs(args: argparse.Namespace) -> list[Job]:
    """The full model's first, if there are others to agree with it."""
    if unknown := set(args.parts) - set(PARTS):
        raise SystemExit(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if REUSE in args.parts and not _is_reuse(args):
        raise SystemExit(f"{REUSE} has tasks of its own: ask for it alone")
    schedules = [SWEEP[index] for index in args.schedules]
    parts = args.parts or [part for part in PARTS if part not in _IF_ASKED]
    asked = [job for part in parts for job in PARTS[part](schedules, args)]
    if args.methods:
        names = list(dict.fromkeys(job.method.name for job in asked))
        if unknown := set(args.methods) - set(names):
            raise SystemExit(f"no such method: {', '.join(unknown)}; there are {', '.join(names)}")
        asked = [job for job in asked if job.method.name in args.methods]
    return [Job("full", FULL)] * any(job.agreement for job in asked) + asked


def _is_reuse(args: argparse.Namespace) -> bool:
    return args.parts == [REUSE]


def _path(args: argparse.Namespace) -> Path:
    from benchmarks.checkpoints import smollm2

    return args.model or smollm2()


def _model(args: argparse.Namespace) -> Model:
    import torch
    from transformers import AutoConfig, AutoTokenizer

    path = _path(args)
    config = AutoConfig.from_pretrained(path)
    longest = int(1.2 * max(args.lengths)) + 512  # LongBench's summaries are as long as that
    on_gpu = torch.cuda.is_available()
    options = {
        "dtype": args.dtype or ("bfloat16" if on_gpu else "float32"),
        "max_model_len": min(longest, config.max_position_embeddings),
        "max_num_seqs": 16,
        "enforce_eager": True,
        "max_logprobs": evaluate.LIKELIEST,
        "enable_prefix_caching": _is_reuse(args),
    }
    if on_gpu:
        # Engines side by side: each takes so much, rather than a share of what is free.
        options |= {
            "kv_cache_memory_bytes": min(8 << 30, (_MEMORY << 30) // args.jobs),
            "gpu_memory_utilization": 0.1,
            "max_num_seqs": 256,
        }
    return Model(path, AutoTokenizer.from_pretrained(path), options)
