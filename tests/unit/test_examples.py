"""The recipes in ``examples/``, which are run by hand: each is listed there, and nothing is broken
that shows without a server. ``test_serve`` runs the one for the OpenAI client."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from lazyllm_vllm.plan.config import parse_config

ROOT = Path(__file__).parents[2] / "examples"
FILES = sorted(path for path in ROOT.rglob("*") if path.is_file() and path.name != "README.md")
FILES = [path for path in FILES if "__pycache__" not in path.parts]


def test_every_recipe_is_listed():
    linked = re.findall(r"\]\((.+?)\)", (ROOT / "README.md").read_text())
    assert sorted(linked) == [str(path.relative_to(ROOT)) for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_recipes_parse(path):
    text = path.read_text()
    if path.suffix == ".py":
        ast.parse(text)
    elif path.suffix == ".sh":
        subprocess.run(["bash", "-n", path], check=True)
        assert path.stat().st_mode & 0o100
    elif path.suffix == ".yaml":
        assert all(yaml.safe_load_all(text))
    elif path.suffix == ".jsonl":
        assert all(json.loads(line) for line in text.splitlines())
    else:
        assert path.name == "Dockerfile" and "lazyllm_vllm-*.whl" in text


def test_the_manifest_is_one_server():
    config, deployment, service = yaml.safe_load_all((ROOT / "kubernetes/server.yaml").read_text())
    ((name, written),) = config["data"].items()
    assert [name for name, _ in parse_config(yaml.safe_load(written)).schedules] == ["mild"]
    pod = deployment["spec"]["template"]
    (server,) = pod["spec"]["containers"]
    mounts = {each["name"]: each["mountPath"] for each in server["volumeMounts"]}
    assert f"--lazyllm-config={mounts['config']}/{name}" in server["args"]
    assert mounts.keys() == {volume["name"] for volume in pod["spec"]["volumes"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": server["ports"][0]["name"]}
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
