"""Documentation that is true to the day."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.loads.results import FILE as LOADS
from benchmarks.quality.results import FILE as QUALITY
from benchmarks.soak.plot import FILE as SOAK
from benchmarks.speed.results import FILE as SPEED
from lazyllm_vllm import __version__
from lazyllm_vllm.hooks import patches
from lazyllm_vllm.hooks.refusals import REFUSALS
from lazyllm_vllm.hooks.versions import SUPPORTED
from lazyllm_vllm.models.families import FAMILIES
from lazyllm_vllm.observe.metrics import METRICS, PREFIX
from lazyllm_vllm.plan.config import LazyLLMConfig, parse_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_every_field_of_the_configuration_is_explained():
    rows = re.findall(r"^\| (`.+?) \| .+ \| (.+) \|$", _read("docs/configuration.md"), flags=re.M)
    shown = {}
    for names, defaults in rows:
        names = re.findall(r"`(\w+)`", names)
        defaults = defaults.replace(",", "").replace("`", "")
        shown |= dict(zip(names, defaults.split(" ") if len(names) > 1 else [defaults]))
    fields = LazyLLMConfig.model_fields
    assert shown.keys() == fields.keys()
    for name in fields.keys() - {"prune", "preset", "schedules"}:  # whose default is told in words
        default = fields[name].default
        told = str(list(default) if isinstance(default, tuple) else default)
        assert shown[name] == told.replace(",", ""), name


def test_every_metric_is_explained_and_shown():
    """In words of the table in the code, and by the dashboard, which asks for no other."""
    rows = re.findall(rf"^\| `{PREFIX}(\w+)` \| (\S*) ?\|", _read("docs/operations.md"), flags=re.M)
    suffix = {True: "", False: "_total"}
    expected = {m.name + suffix[m.is_gauge]: f"`{m.label}`" if m.label else "" for m in METRICS}
    assert dict(rows) == expected
    panels = json.loads(_read("docs/grafana.json"))["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    assert set(re.findall(rf"{PREFIX}(\w+)", " ".join(asked))) == expected.keys()


def test_every_patch_has_a_proposal(monkeypatch):
    """``docs/upstream.md`` names what is wrapped, in a section that proposes what would end it."""
    wrapped = [f"WorkerBase.{name}" for name in patches._WORKER_METHODS]

    def note(owner, name, *args, **kwargs) -> None:
        wrapped.append(f"{owner.__name__.split('.')[-1]}.{name}")

    monkeypatch.setattr(patches, "_wrap", note)
    patches.install()
    patches.install_in_worker()
    sections = _read("docs/upstream.md").split("\n## ")[1:]
    assert all("*Proposal.*" in section for section in sections)
    named = [line for section in sections for line in section.split("\n")[2:3]]
    assert sorted(re.findall(r"`([\w.]+)`", " ".join(named))) == sorted(wrapped)


def test_every_refusal_is_explained():
    rows = re.findall(r"^\| (.+?) \| (`--.+?) \| .+ \|$", _read("docs/operations.md"), flags=re.M)
    assert [(what, re.findall(r"`--(.+?)`", flags)) for what, flags in rows] == [
        (refusal.what.rstrip(","), [field.replace("_", "-") for field in refusal.fields])
        for refusal in REFUSALS
    ]


def test_what_works_is_said():
    readme, versions = _read("README.md"), _read("docs/vllm-versions.md")
    assert f"| vLLM | {', '.join(SUPPORTED)} " in readme
    assert re.findall(r"^\| (\d\S+) \|", versions, flags=re.M) == list(SUPPORTED)
    (models,) = re.findall(r"^\| \[models\]\S+ \| (.+?) \|", readme, flags=re.M)
    names = [family.name for family in FAMILIES]
    assert re.findall(r"`(\w+)`", models) == names
    assert re.findall(r"^\| `(\w+ForCausalLM)` \|", _read("docs/models.md"), flags=re.M) == names
    assert _read("CHANGELOG.md").split("## ")[1].startswith(__version__)


def test_configurations_that_are_shown_are_valid():
    shown = [text for page in PAGES for text in re.findall(r"'(\{.+?\})'", page.read_text())]
    assert shown
    for text in shown:
        assert parse_config(json.loads(text)).prune


def test_figures_are_those_of_the_results_files(tmp_path, monkeypatch):
    """``python -m benchmarks report`` would change no page."""
    pages = "README.md", "docs/benchmarks.md", "docs/quality.md", "docs/endurance.md"
    for page in pages:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    plots = {
        p: p.read_bytes()
        for file in (SPEED, QUALITY, LOADS, SOAK)
        for p in file.parent.glob("*.svg")
    }
    try:
        monkeypatch.setattr(benchmarks, "ROOT", tmp_path)
        benchmarks.report()
        for page in tmp_path.rglob("*.md"):
            assert page.read_text() == _read(page.relative_to(tmp_path)), page.name
    finally:
        for path, content in plots.items():
            path.write_bytes(content)


def _read(page: str | Path) -> str:
    return (ROOT / page).read_text()
