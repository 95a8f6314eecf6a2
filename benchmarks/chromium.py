"""The browser that tests of a page and pictures of it use."""

import os
import sys
from pathlib import Path


def chromium() -> Path | None:
    """Its program: what ``CHROMIUM`` in the environment names, or else what
    ``tests/env/make_chromium.sh`` left in this environment of Python. None: there is none."""
    path = Path(os.environ.get("CHROMIUM") or Path(sys.prefix, "chromium", "chromium"))
    return path if path.is_file() else None


def launch(playwright):
    """A headless ``Browser``. Raises RuntimeError if there is none."""
    program = chromium()
    if program is None:
        raise RuntimeError("no Chromium: see tests/env/make_chromium.sh, or set CHROMIUM")
    # It shows our own pages alone, and its sandbox cannot be had in every container.
    return playwright.chromium.launch(executable_path=str(program), args=["--no-sandbox"])
