"""An explanation as one HTML page that needs nothing beside it."""

import base64
import json
import re
import zlib
from importlib.resources import files

from lazyllm_vllm.observe.explain.explanation import Explanation

SCRIPTS = ("story.js", "prompt.js", "strip.js", "details.js", "controls.js")


def render(explanation: Explanation) -> str:
    """The page; write it as UTF-8."""
    parts = {
        "style": _part("page.css"),
        "data": _as_json(_data(explanation)),
        "script": "\n".join(_part(name) for name in SCRIPTS),
    }
    # In one pass, so that nothing in the prompt is taken for a place to fill.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _part("page.html"))


def _part(name: str) -> str:
    return (files(__package__) / "page" / name).read_text(encoding="utf-8")


def _as_json(data: dict) -> str:
    """JSON that no HTML parser sees the end of a script in, of ASCII alone."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _data(e: Explanation) -> dict:
    """What ``page/story.js`` reads. As in ``Explanation``, but for

    ``depth``: of each prompt token, see ``Explanation.depths``;
    ``chosen``: of each step and prompt token a byte, the last stage that the step chose it for;
    by zlib and base64.
    """
    chosen = bytearray(len(e.steps) * len(e.prompt))
    for at, step in enumerate(e.steps):
        for stage, positions in enumerate(step.selected):
            for position in positions:
                chosen[at * len(e.prompt) + position] = stage
    return {
        "model": e.model,
        "layers": e.layers,
        "prompt": [[t.id, t.text, t.piece] for t in e.prompt],
        "answer": [[t.id, t.text, t.piece] for t in e.answer],
        "depth": e.depths(),
        "places": e.places,
        "revived": [step.revived for step in e.steps],
        "chosen": base64.b64encode(zlib.compress(bytes(chosen))).decode(),
    }
