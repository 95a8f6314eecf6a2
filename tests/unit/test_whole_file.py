"""Where the disk is full no part of a file is left that looks like a whole one.

A disk is made full by a limit on the size of files, which ends a write in its middle as well.
"""

import json
import resource
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from benchmarks import results
from benchmarks.soak import report as soak
from benchmarks.soak.client import Ledger
from benchmarks.soak.latency import Latencies
from benchmarks.soak.records import Records
from lazyllm_vllm.cli import explain
from lazyllm_vllm.cli.main import main
from lazyllm_vllm.cli.whole_file import write_whole

LONG = "new " * 50_000


@contextmanager
def full_disk():
    """No file can be written beyond 64 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_is_full(tmp_path):
    """Without what is tested here a part is left."""
    with full_disk(), pytest.raises(OSError):
        (tmp_path / "file").write_text(LONG)
    assert (tmp_path / "file").stat().st_size == 2**16


@pytest.mark.parametrize("before", (None, "as it was"))
def test_what_was_there_stays(tmp_path, before):
    file = tmp_path / "file"
    if before:
        file.write_text(before)
    with full_disk(), pytest.raises(OSError):
        write_whole(file, LONG)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == (
        [("file", before)] if before else []
    )
    write_whole(file, LONG)
    assert file.read_text() == LONG and len(list(tmp_path.iterdir())) == 1


def test_links_and_devices_stay(tmp_path):
    file, link, device = tmp_path / "file", tmp_path / "link", tmp_path / "device"
    link.symlink_to(file)
    device.symlink_to("/dev/null")
    for path in (link, device):
        write_whole(path, "text")
        assert path.is_symlink()
    assert file.read_text() == "text" and device.resolve().is_char_device()


@dataclass
class Row:
    text: str


def test_results_files_and_pages(tmp_path):
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    results.write(rows, [Row("old")])
    page.write_text("<!-- x: begin -->old<!-- x: end -->")
    with full_disk():
        with pytest.raises(OSError):
            results.write(rows, [Row(LONG), Row(LONG)])
        with pytest.raises(OSError):
            results.replace_section(page, "x", LONG)
    assert results.read(rows, Row) == [Row("old")]
    assert page.read_text() == "<!-- x: begin -->old<!-- x: end -->"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("flag", ("--out", "--json"))
def test_explain_says_it_in_one_line(tmp_path, monkeypatch, capsys, flag):
    """The page has room and the JSON has none, or neither has."""
    told = SimpleNamespace(model_dump_json=lambda: LONG)
    monkeypatch.setattr(explain, "_explain", lambda args: told)
    render = LONG if flag == "--out" else "<!doctype html>"
    monkeypatch.setattr("lazyllm_vllm.observe.explain.render.render", lambda told: render)
    files = {"--out": tmp_path / "page.html", "--json": tmp_path / "told.json"}
    asked = [str(part) for item in files.items() for part in item]
    with full_disk():
        assert main(["explain", "a model", "--prompt-file", "prompt", *asked]) == 1
    said = capsys.readouterr()
    assert said.err == f"lazyllm explain: {files[flag]} is not written: File too large\n"
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"] * (flag == "--json")


def test_a_soak_goes_on(tmp_path, monkeypatch, capsys):
    """It says so every minute, and what it had written before stays."""
    report = soak.Report(tmp_path / "soak.json", {"model": "m"}, "a commit")
    records = Records(Ledger(Latencies(60.0)))
    report.write(records, 1.0, [])
    records.ledger.fail(LONG)
    with full_disk():
        report.write(records, 2.0, [])
    assert "is not written: File too large" in capsys.readouterr().out.replace("\n", " ")
    told = json.loads((tmp_path / "soak.json").read_text())
    assert told["minutes_run"] == 1.0 and told["errors"] == {}
