"""LongBench and RULER, read from a folder in the format that they are published in: one JSON object
a line, one file a task.

Their metrics and longest answers are those published; RULER's prompts are in its files. How
LongBench's questions are put is our own wording, so compare methods by them, not with its tables.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from benchmarks.quality.sample import Sample, Writer

_BRIEFLY = "Answer the question from the text above, in a few words and no more.\nQuestion: "
_SUMMARY = "Write a summary of the text above on one page."
_PARAGRAPH = "Which paragraph above is this about? Answer as: Paragraph 1.\n"
_COUNT = "How many different paragraphs are above, leaving out repeated ones? Answer by a number."

# Of each of LongBench's English tasks: its metric and longest answer (its dataset2maxlen.json and
# eval.py), and what we ask before ``input``. None: the prompt ends where the answer begins.
_LONGBENCH = {
    "narrativeqa": ("f1", 128, _BRIEFLY),
    "qasper": ("f1", 128, _BRIEFLY),
    "multifieldqa_en": ("f1", 64, _BRIEFLY),
    "hotpotqa": ("f1", 32, _BRIEFLY),
    "2wikimqa": ("f1", 32, _BRIEFLY),
    "musique": ("f1", 32, _BRIEFLY),
    "gov_report": ("rouge_l", 512, _SUMMARY),
    "multi_news": ("rouge_l", 512, _SUMMARY),
    "qmsum": ("rouge_l", 512, "Answer from the text above.\nQuestion: "),
    "samsum": ("first_line_rouge_l", 128, None),
    "trec": ("first_line_any_found", 64, None),
    "triviaqa": ("first_line_f1", 32, None),
    "passage_retrieval_en": ("numbers", 32, _PARAGRAPH),
    "passage_count": ("numbers", 32, _COUNT),
    "lcc": ("edit_similarity", 64, None),
    "repobench-p": ("edit_similarity", 64, None),
}
_CODE = ("lcc", "repobench-p")


@dataclass(frozen=True)
class Published:
    """A task that is a file; a seed is a line of it.

    Attributes:
        prompt: a line's prompt, token ids.
        answers: name of the lines' field with the answers.
        shortest: as of a ``Task``.
    """

    name: str
    metric: str
    max_tokens: int
    lines: tuple[dict, ...]
    prompt: Callable[[dict, Writer], list[int]]
    answers: str
    shortest: ClassVar[int] = 0

    def samples(self, seeds: range, writer: Writer, num_tokens: int) -> list[Sample]:
        """As many as there are lines for, with prompts of at most ``num_tokens``, their middle cut
        out if need be."""
        lines = (self.lines[seed] for seed in seeds if seed < len(self.lines))
        return [
            Sample(_without_middle(self.prompt(line, writer), num_tokens), line[self.answers])
            for line in lines
        ]

    def __hash__(self) -> int:
        return hash(self.name)


def longbench(folder: Path) -> Iterator[Published]:
    """Tasks of a folder with LongBench's files, ``TASK.jsonl`` with the fields ``input``,
    ``context`` and ``answers``. Raises ValueError for a line that lacks one of them."""
    for name, (metric, max_tokens, question) in _LONGBENCH.items():
        path = folder / f"{name}.jsonl"
        if path.is_file():
            prompt = partial(_longbench_prompt, question, "" if name in _CODE else "\n\n")
            lines = tuple(_lines(path, ("input", "context", "answers")))
            yield Published(f"LongBench {name}", metric, max_tokens, lines, prompt, "answers")


def _longbench_prompt(question: str | None, between: str, line: dict, writer: Writer) -> list[int]:
    if question is None:
        return writer.plain(line["context"] + between + line["input"])
    return writer.chat(line["context"] + between + question + line["input"])


def ruler(folder: Path) -> Iterator[Published]:
    """Tasks of a folder with RULER's files, ``TASK/validation.jsonl`` with the fields ``input`` and
    ``outputs``. Raises ValueError for a line that lacks one of them."""
    for path in sorted(folder.glob("*/validation.jsonl")):
        name = path.parent.name
        # Questions have several right answers, of which RULER asks for any.
        metric = "any_found" if name.startswith("qa") else "all_found"
        lines = tuple(_lines(path, ("input", "outputs")))
        yield Published(f"RULER {name}", metric, 128, lines, _ruler_prompt, "outputs")


def _ruler_prompt(line: dict, writer: Writer) -> list[int]:
    return writer.plain(line["input"])


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
