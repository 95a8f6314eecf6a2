"""The process that an engine has to itself."""

import subprocess

import psutil

from benchmarks.engine import Engine


def start() -> int:
    """A worker that does not end with its engine."""
    return subprocess.Popen(["sleep", "600"], start_new_session=True).pid


def worker(pid: int) -> int:
    return pid


def test_no_worker_outlives_its_engine(tmp_path):
    engine = Engine(start, {}, __name__, tmp_path / "log", has_workers=True)
    engine.ready()
    pid = engine.run("worker")
    assert psutil.pid_exists(pid)
    engine.close()
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
