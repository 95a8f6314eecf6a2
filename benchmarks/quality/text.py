"""Real prose and code, from what every machine with Python has: the standard library's sources."""

import ast
import random
import re
import sysconfig
from functools import cache
from pathlib import Path

# Well-commented modules that are much the same in every Python that vLLM runs on.
_MODULES = (
    "argparse",
    "ast",
    "bdb",
    "calendar",
    "cmd",
    "codecs",
    "configparser",
    "contextlib",
    "copy",
    "csv",
    "dataclasses",
    "datetime",
    "difflib",
    "dis",
    "doctest",
    "enum",
    "fileinput",
    "fractions",
    "ftplib",
    "functools",
    "gettext",
    "glob",
    "gzip",
    "heapq",
    "inspect",
    "ipaddress",
    "locale",
    "mailbox",
    "mimetypes",
    "nntplib",
    "optparse",
    "pathlib",
    "pickle",
    "pickletools",
    "platform",
    "plistlib",
    "pprint",
    "pstats",
    "random",
    "sched",
    "selectors",
    "shelve",
    "shlex",
    "shutil",
    "smtplib",
    "socket",
    "socketserver",
    "ssl",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "tokenize",
    "trace",
    "traceback",
    "types",
    "typing",
    "unittest/case",
    "unittest/mock",
    "uuid",
    "warnings",
    "weakref",
    "zipfile",
)


@cache
def code_files() -> tuple[str, ...]:
    """Sources of the modules that there are."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = (folder / f"{name}.py" for name in _MODULES)
    return tuple(path.read_text(encoding="utf-8") for path in paths if path.is_file())


@cache
def paragraphs() -> tuple[str, ...]:
    """Paragraphs of running text from the docstrings: sentences, no tables, prompts or lists."""
    texts = []
    for source in code_files():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                continue
            for part in (ast.get_docstring(node) or "").split("\n\n"):
                text = " ".join(part.split())
                if 80 <= len(text) <= 900 and text.endswith(".") and _is_prose(text):
                    texts.append(text)
    return tuple(dict.fromkeys(texts))


def _is_prose(text: str) -> bool:
    letters = sum(c.isalpha() or c in " ,.'" for c in text)
    return letters > 0.93 * len(text) and not re.search(r">>>|::|\*\*|--|\.\.\.", text)


def prose(random: random.Random, num_chars: int) -> list[str]:
    """Paragraphs in random order, at least so many characters together."""
    chosen, have = [], 0
    while have < num_chars:
        for text in random.sample(paragraphs(), len(paragraphs())):
            chosen.append(text)
            have += len(text) + 2
            if have >= num_chars:
                break
    return chosen


def code(random: random.Random, num_chars: int) -> str:
    """A run of whole lines of one source."""
    long_enough = [source for source in code_files() if len(source) > 1.2 * num_chars]
    source = random.choice(long_enough)
    start = random.randrange(0, len(source) - num_chars)
    start = source.rfind("\n", 0, start) + 1
    return source[start : source.find("\n", start + num_chars) + 1]
