"""The soak's load, without a server."""

import asyncio
import os
import signal
from types import SimpleNamespace

import pytest

from benchmarks.soak.jobs import SMALL, Jobs
from benchmarks.soak.load import Load, Pace


class Report:
    """Keeps the findings and the minutes."""

    def write(self, records, minutes, findings):
        self.minutes = minutes

    def show(self, findings):
        self.bad = [one.why for one in findings if one.is_good is False]

    def line(self, *arguments): ...

    def draw(self): ...


class Loaded(Load):
    """A signal comes after so many seconds, or else while the last answers are waited for."""

    after: float | None

    async def _warm_up(self):
        if self.after is not None:
            asyncio.get_running_loop().call_later(self.after, os.kill, os.getpid(), signal.SIGINT)
        return {}

    async def _drain(self):
        if self.after is None:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.05)

    async def _settle(self, before):
        return []

    async def _watch(self, report):
        await asyncio.sleep(60)


@pytest.mark.parametrize(
    "seconds, after, bad", [(60, 0.05, ["it was told to stop"]), (0.1, None, [])]
)
def test_only_a_signal_that_cuts_the_load_counts(tmp_path, seconds, after, bad):
    log = tmp_path / "log"
    log.touch()
    server = SimpleNamespace(address="http://nobody", log=log, stop=lambda: 0)
    load = Loaded(server, Jobs(0, SMALL, [({}, 1.0)], 1000, 0), Pace(seconds, 0.001, 1, 60), None)
    load.after, report = after, Report()
    assert asyncio.run(load.run(report)) == (not bad)
    assert report.bad == bad and 60 * report.minutes < 10
