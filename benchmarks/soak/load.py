"""The run: jobs arrive, samples are taken, and at the end the server's counts are compared."""

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

import aiohttp

from benchmarks.serving.metrics import Metrics
from benchmarks.serving.server import Server
from benchmarks.soak import verdict, watch
from benchmarks.soak.client import FAILED, Client, Ledger
from benchmarks.soak.counts import compare, shown
from benchmarks.soak.jobs import GIANT, KINDS, Job, Jobs
from benchmarks.soak.latency import Latencies
from benchmarks.soak.records import Records
from benchmarks.soak.report import Report
from benchmarks.soak.verdict import Finding
from lazyllm_vllm.plan.schedule import Schedule

_DRAIN = 180  # seconds that requests may take to end once none arrives any more
_IDLE = 60  # seconds until the server's counts must have settled
_WARM_UP = 3  # jobs of each kind


@dataclass(frozen=True)
class Pace:
    """Attributes:
    seconds: of load.
    rate: jobs a second; most: jobs at a time, those above arrive later.
    giants: seconds between the longest prompts.
    """

    seconds: float
    rate: float
    most: int
    giants: float


class Load:
    """On a server that is up, whose schedule is given."""

    def __init__(self, server: Server, jobs: Jobs, pace: Pace, schedule: Schedule) -> None:
        self.server, self.jobs, self.pace, self.schedule = server, jobs, pace, schedule
        self.records = Records(Ledger(Latencies(pace.seconds)))
        self._playing: set[asyncio.Task] = set()
        self._log_begins = 0

    async def run(self, report: Report) -> bool:
        """Whether all is good. Ends early, with what there is, on SIGTERM and SIGINT, or when the
        server ends."""
        self._stop, self._cut = asyncio.Event(), ""
        self._on_signal(self._end, "it was told to stop")
        async with Client(self.server.address) as self.client:
            before = await self._warm_up()
            self._log_begins = self.server.log.stat().st_size
            self._began = self.records.ledger.began = monotonic()
            tasks = [
                asyncio.create_task(each)
                for each in (self._arrive(), self._arrive_giants(), self._watch(report))
            ]
            for task in tasks:
                task.add_done_callback(self._over)
            try:
                await asyncio.wait_for(self._stop.wait(), self.pace.seconds)
            except TimeoutError:
                pass
            minutes = (monotonic() - self._began) / 60
            self._on_signal(lambda: None)  # who stops it now waits for the last answers
            *arriving, watching = tasks
            for task in arriving:
                task.cancel()
            await self._drain()
            watching.cancel()
            findings = self._findings() + await self._settle(before)
        findings += self._goodbye()
        report.write(self.records, minutes, findings)
        report.draw()
        report.show(findings)
        return verdict.is_good(findings)

    @staticmethod
    def _on_signal(do: Callable, *arguments) -> None:
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, do, *arguments)

    def _end(self, why: str) -> None:
        self._cut = self._cut or why
        self._stop.set()

    async def _warm_up(self) -> Metrics:
        """Some jobs of each kind at once, of which errors alone count; what the server counts after
        them."""
        warm = self.client.ledger = Ledger(Latencies(1.0))
        for kind in (*KINDS, GIANT):
            for _ in range(_WARM_UP if kind != GIANT else 1):
                self._begin(self.jobs.of_kind(kind))
        await asyncio.wait(self._playing)
        self.records.ledger.errors.update(warm.errors)
        self.client.ledger = self.records.ledger
        try:
            return await watch.scrape_idle(self.client.session, self.server.address, _IDLE)
        except (aiohttp.ClientError, TimeoutError) as error:
            self._end(f"the server did not survive the warm-up: {error!r}")
            return {}

    def _begin(self, job: Job) -> None:
        task = asyncio.create_task(self.client.play(job))
        self._playing.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task) -> None:
        self._playing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.records.ledger.fail(f"the load itself: {error!r}")

    async def _arrive(self) -> None:
        while True:
            await asyncio.sleep(self.jobs.pause(self.pace.rate))
            self.records.held += len(self._playing) >= self.pace.most
            while len(self._playing) >= self.pace.most:
                await asyncio.wait(self._playing, return_when=asyncio.FIRST_COMPLETED)
            self._begin(self.jobs.next())

    async def _arrive_giants(self) -> None:
        while True:
            await asyncio.sleep(self.pace.giants / 2)
            self._begin(self.jobs.of_kind(GIANT))
            await asyncio.sleep(self.pace.giants / 2)

    async def _watch(self, report: Report) -> None:
        said = 0
        while True:
            at = monotonic() - self._began
            if (code := self.server.process.poll()) is not None:
                return self._end(f"the server ended with {code}")
            try:
                found = await watch.scrape(self.client.session, self.server.address)
                self.records.samples.append(watch.sample(self.server, found, at))
            except (aiohttp.ClientError, TimeoutError) as error:
                self.records.ledger.fail(f"/metrics: {error!r}")
            if at >= 60 * said:
                said += 1
                report.line(self.records, at / 60)
                report.write(self.records, at / 60, self._findings())
            await asyncio.sleep(max(watch.PERIOD - (monotonic() - self._began - at), 0))

    async def _drain(self) -> None:
        self.client.is_closing = True
        if self._playing:
            await asyncio.wait(self._playing, timeout=_DRAIN)
        for task in list(self._playing):
            self.records.ledger.fail(f"did not end within {_DRAIN} s")
            task.cancel()
        await asyncio.gather(*self._playing, return_exceptions=True)

    def _findings(self) -> list[Finding]:
        """What can be said while it runs."""
        complaints = watch.complaints(self.server.log, self._log_begins)
        errors = [f"{text} ({count} times)" for text, count in self.records.ledger.errors.items()]
        if not errors and (failed := self.records.ledger.ended[FAILED]):
            errors.append(f"{failed} requests failed")
        return [
            verdict.nothing("errors", errors),
            verdict.nothing("complaints in the server's log", complaints),
            *verdict.memory(self.records.samples),
            *verdict.latency(self.records.ledger.latencies.first_and_last(), self.pace.seconds),
        ]

    async def _settle(self, before: Metrics) -> list[Finding]:
        """What the server counted, and whether it holds anything, now that nothing runs."""
        try:
            after = await watch.scrape_idle(self.client.session, self.server.address, _IDLE)
        except (aiohttp.ClientError, TimeoutError) as error:
            return [Finding("counters", False, f"not read: {error!r}")]
        grown = {key: value - before.get(key, 0.0) for key, value in after.items()}
        self.records.counts = compare(self.records.ledger.sent, grown, self.schedule)
        self.records.grown = shown(grown)
        names = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
        held = {name: after[name, None] for name in (*names, "lazyllm_aux_cache_blocks")}
        left = [f"{name} {value:g}" for name, value in held.items() if value]
        return [verdict.counters(self.records.counts), verdict.nothing("held at the end", left)]

    def _goodbye(self) -> list[Finding]:
        code = self.server.stop()
        return [
            Finding("exit code", code == 0, "it had to be killed" if code is None else str(code)),
            Finding("time", not self._cut, self._cut or "all of it"),
        ]
