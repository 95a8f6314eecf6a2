"""What is sampled while the load runs."""

import asyncio
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import aiohttp
import psutil

from benchmarks.serving.metrics import Metrics, parse
from benchmarks.serving.server import Server

PERIOD = 5.0  # seconds
_MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """Attributes:
    at: seconds since the load began.
    host: MiB resident in the server's processes; gpu: MiB used of all GPUs; None: there is none.
    kv_cache: share of the KV cache in use.
    requests, tokens: finished and generated so far, by the server's counters.
    """

    at: float
    host: float
    gpu: float | None
    running: float
    waiting: float
    kv_cache: float
    aux_blocks: float
    preemptions: float
    requests: float
    tokens: float


async def scrape(session: aiohttp.ClientSession, address: str) -> Metrics:
    """Raises ``aiohttp.ClientError`` or TimeoutError."""
    timeout = aiohttp.ClientTimeout(total=30)
    async with session.get(f"{address}/metrics", timeout=timeout) as response:
        response.raise_for_status()
        return parse(await response.text())


async def scrape_idle(session: aiohttp.ClientSession, address: str, patience: float) -> Metrics:
    """As soon as nothing runs and no counter moves any more, but after so many seconds at most."""
    loop, before = asyncio.get_running_loop(), None
    end = loop.time() + patience
    while True:
        found = await scrape(session, address)
        counted = {key: value for key, value in found.items() if key[0].startswith("lazyllm_")}
        idle = found["num_requests_running", None] + found["num_requests_waiting", None] == 0
        if (idle and counted == before) or loop.time() > end:
            return found
        before = counted
        await asyncio.sleep(1)


def sample(server: Server, found: Metrics, at: float) -> Sample:
    return Sample(
        at=round(at, 1),
        host=host_memory(server),
        gpu=gpu_memory(),
        running=found["num_requests_running", None],
        waiting=found["num_requests_waiting", None],
        kv_cache=round(found["kv_cache_usage_perc", None], 4),
        aux_blocks=found.get(("lazyllm_aux_cache_blocks", None), 0.0),
        preemptions=found["num_preemptions", None],
        requests=sum(value for (name, _), value in found.items() if name == "request_success"),
        tokens=found["generation_tokens", None],
    )


def host_memory(server: Server) -> float:
    """MiB resident in all its processes together."""
    total = 0
    try:
        root = psutil.Process(server.process.pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            pass
    return round(total / _MIB, 1)


def gpu_memory() -> float | None:
    """MiB used of the GPUs that the server may use."""
    if (nvml := _nvml()) is None:
        return None
    return round(sum(nvml.nvmlDeviceGetMemoryInfo(one).used for one in _gpus(nvml)) / _MIB, 1)


def complaints(log: Path, begin: int = 0) -> list[str]:
    """Lines of the server's log that tell of an error, from a byte on, without stacks."""
    lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
    return [line[:200] for line in lines if " ERROR " in line and "]   " not in line]


def gpu_name() -> str:
    """Of the first."""
    nvml = _nvml()
    return "no GPU" if nvml is None else nvml.nvmlDeviceGetName(_gpus(nvml)[0])


def _gpus(nvml) -> list:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    which = map(int, chosen.split(",")) if chosen else range(nvml.nvmlDeviceGetCount())
    return [nvml.nvmlDeviceGetHandleByIndex(index) for index in which]


@cache
def _nvml():
    from vllm.third_party import pynvml  # vLLM has a copy

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
