"""LongBench and RULER, read from a folder in the format that they are published in: one JSON object
a line, one file a task."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.sample import Sample, Writer

# LongBench's metric and longest answer of each of its English tasks (its config/dataset2maxlen.json
# and eval.py), and how it asks.
_LONGBENCH = {
    "narrativeqa": ("f1", 128), "qasper": ("f1", 128), "multifieldqa_en": ("f1", 64),
    "hotpotqa": ("f1", 32), "2wikimqa": ("f1", 32), "musique": ("f1", 32),
    "gov_report": ("rouge_l", 512), "qmsum": ("rouge_l", 512), "multi_news": ("rouge_l", 512),
    "samsum": ("rouge_l", 128), "trec": ("any_found", 64), "triviaqa": ("f1", 32),
    "passage_retrieval_en": ("any_found", 32), "passage_count": ("first_word", 32),
    "lcc": ("edit_similarity", 64), "repobench-p": ("edit_similarity", 64),
}  # fmt: skip
_CODE = ("lcc", "repobench-p")
_EXAMPLES = ("trec", "triviaqa", "samsum")  # asked in the form of their examples, not as a chat


@dataclass(frozen=True)
class Published:
    """A task that is a file.

    Attributes:
        samples: with prompts of at most the length asked for, their middle cut out if need be.
    """

    name: str
    metric: str
    max_tokens: int
    samples: list[Sample]


def longbench(folder: Path, writer: Writer, most_tokens: int) -> Iterator[Published]:
    """Tasks of a folder with LongBench's files, ``TASK.jsonl`` with the fields ``input``,
    ``context`` and ``answers``. Raises ValueError for a line that lacks one of them."""
    for name, (metric, max_tokens) in _LONGBENCH.items():
        path = folder / f"{name}.jsonl"
        if not path.is_file():
            continue
        samples = []
        for line in _lines(path, ("input", "context", "answers")):
            prompt = line["context"] + ("" if name in _CODE else "\n\n") + line["input"]
            ids = writer.plain(prompt) if name in _CODE + _EXAMPLES else writer.chat(prompt)
            samples.append(Sample(_without_middle(ids, most_tokens), line["answers"]))
        yield Published(f"LongBench {name}", metric, max_tokens, samples)


def ruler(folder: Path, writer: Writer, most_tokens: int) -> Iterator[Published]:
    """Tasks of a folder with RULER's files, ``TASK/validation.jsonl`` with the fields ``input`` and
    ``outputs``. Raises ValueError for a line that lacks one of them."""
    for path in sorted(folder.glob("*/validation.jsonl")):
        name = path.parent.name
        samples = [
            Sample(_without_middle(writer.plain(line["input"]), most_tokens), line["outputs"])
            for line in _lines(path, ("input", "outputs"))
        ]
        # Questions have several right answers, of which RULER asks for any.
        metric = "any_found" if name.startswith("qa") else "all_found"
        yield Published(f"RULER {name}", metric, 128, samples)


def _lines(path: Path, fields: tuple[str, ...]) -> Iterator[dict]:
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = json.loads(text)
        if missing := [field for field in fields if field not in line]:
            raise ValueError(f"{path}, line {number}: no field {', '.join(missing)}")
        yield line


def _without_middle(ids: list[int], most: int) -> list[int]:
    """As LongBench cuts: the question stands at an end."""
    if len(ids) <= most:
        return ids
    return ids[: most // 2] + ids[len(ids) - (most - most // 2) :]
