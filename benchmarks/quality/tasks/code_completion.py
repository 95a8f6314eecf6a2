"""The next line of a source of the standard library."""

import random

from benchmarks.quality import text
from benchmarks.quality.sample import Sample, Task, Writer


def _make(random: random.Random, writer: Writer, num_tokens: int) -> Sample:
    while True:
        lines = text.code(random, 6 * num_tokens).splitlines(keepends=True)
        source = iter(lines)
        before = writer.fill(lambda: next(source), num_tokens)
        # Ends before a line of some substance, which is not a comment.
        while before and not _is_statement(lines[len(before)]):
            before.pop()
        if len(before) > 10:
            answer = lines[len(before)].strip()
            return Sample(writer.plain("".join(before)), [answer])


def _is_statement(line: str) -> bool:
    return len(line.strip()) >= 12 and not line.lstrip().startswith(("#", '"', "'"))


TASKS = (Task("code completion", _make, "edit_similarity", 32),)
