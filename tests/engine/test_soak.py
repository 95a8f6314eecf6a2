"""``python -m benchmarks soak`` in small, on a CPU. Slow: a server of its own, under load."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def soak(out: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks", "soak", "--small", "--out", str(out), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def result(out: Path) -> tuple[dict, dict]:
    """What the file has, and its findings by name."""
    told = json.loads((out / "soak.json").read_text())
    return told, {one["name"]: one["is_good"] for one in told["findings"]}


def test_a_small_soak_is_good(tmp_path):
    """With little room, so that requests wait and snapshots give way."""
    flags = ["--minutes", "0.7", "--rate", "2", "--aborts", "0.3"]
    process = soak(tmp_path, *flags, "--server-flags", "--num-gpu-blocks-override 330")
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    told, findings = result(tmp_path)
    assert [name for name in findings if findings[name]] == [
        "errors",
        "complaints in the server's log",
        "counters",
        "held at the end",
        "exit code",
        "time",
    ]
    sums = told["sums"]
    assert sums["left"] > 0 == sums["failed"] and sums["finished"] > 20
    assert sums["requests"] == sums["finished"] + sums["left"] == sum(told["requests"].values())
    assert told["grown"]["lazyllm_reuses"] > 0 and told["grown"]["prefix_cache_hits"] > 0
    assert len(told["samples"]["rows"]) >= 8 and (tmp_path / "soak.svg").stat().st_size > 10_000


def test_what_there_is_when_it_is_told_to_stop(tmp_path):
    process = soak(tmp_path, "--minutes", "9")
    while "min" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(10)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "it was told to stop" in said
    told, findings = result(tmp_path)
    assert [name for name in findings if findings[name] is False] == ["time"]
    assert told["sums"]["finished"] > 0 and told["minutes_run"] < 9
