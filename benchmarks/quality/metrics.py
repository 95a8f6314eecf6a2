"""How good an answer is, 0 to 1. F1, ROUGE-L, accuracy and edit similarity are those of LongBench
(arXiv 2308.14508), the match of several answers that of RULER (arXiv 2404.06654)."""

import re
import string
from collections import Counter
from collections.abc import Callable
from difflib import SequenceMatcher

Metric = Callable[[str, list[str]], float]


def _words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    text = "".join(" " if c in string.punctuation else c for c in text.lower())
    return [word for word in text.split() if word not in ("a", "an", "the")]


def f1(output: str, answers: list[str]) -> float:
    """Word overlap with the closest answer, as of SQuAD."""
    return max(_f1(_words(output), _words(answer)) for answer in answers)


def _f1(output: list[str], answer: list[str]) -> float:
    shared = sum((Counter(output) & Counter(answer)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(output), shared / len(answer)
    return 2 * precision * recall / (precision + recall)


def rouge_l(output: str, answers: list[str]) -> float:
    """Longest common subsequence of words, as F1, with the closest answer."""
    return max(_rouge_l(output.lower().split(), answer.lower().split()) for answer in answers)


def _rouge_l(output: list[str], answer: list[str]) -> float:
    if not output or not answer:
        return 0.0
    above = [0] * (len(answer) + 1)
    for word in output:
        row = [0]
        for j, other in enumerate(answer):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        above = row
    precision, recall = above[-1] / len(output), above[-1] / len(answer)
    return 2 * precision * recall / (precision + recall) if above[-1] else 0.0


def all_found(output: str, answers: list[str]) -> float:
    """Share of the answers that the output contains."""
    return sum(answer.lower() in output.lower() for answer in answers) / len(answers)


def any_found(output: str, answers: list[str]) -> float:
    """Whether the output contains one of the answers."""
    return float(any(answer.lower() in output.lower() for answer in answers))


def first_word(output: str, answers: list[str]) -> float:
    """Whether the first word is the answer."""
    word = re.search(r"\w+", output)
    return float(word is not None and word[0].lower() in (a.lower() for a in answers))


def edit_similarity(output: str, answers: list[str]) -> float:
    """Of the first line that is code, with the closest answer."""
    lines = [line for line in output.split("\n") if line.strip() and not _is_fence(line)]
    line = lines[0].strip() if lines else ""
    return max(SequenceMatcher(None, line, answer.strip()).ratio() for answer in answers)


def _is_fence(line: str) -> bool:
    return line.lstrip().startswith(("```", "#", "//"))


def numbers(output: str, answers: list[str]) -> float:
    """Share of the numbers in the output that are the answer's first."""
    wanted = re.search(r"\d+", answers[0])
    numbers = re.findall(r"\d+", output)
    if not (wanted and numbers):
        return 0.0
    return numbers.count(wanted[0]) / len(numbers)


def _of_first_line(metric: Metric) -> Metric:
    return lambda output, answers: metric(output.lstrip("\n").split("\n")[0], answers)


METRICS: dict[str, Metric] = {
    function.__name__: function
    for function in (f1, rouge_l, all_found, any_found, first_word, edit_similarity, numbers)
}
METRICS |= {f"first_line_{m.__name__}": _of_first_line(m) for m in (f1, rouge_l, any_found)}
