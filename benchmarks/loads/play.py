"""Plays a load against a server, and takes the times."""

import asyncio
import contextlib
import io
from dataclasses import dataclass
from time import perf_counter

import aiohttp
import numpy as np

from benchmarks.loads.results import Times
from benchmarks.serving.client import NAME, Answer, ask, open_session


@dataclass(frozen=True)
class Turn:
    """Attributes:
    text: token ids; max_tokens: of its answer.
    thinking: seconds before it comes, after the answer before it.
    """

    text: list[int]
    max_tokens: int
    thinking: float


@dataclass(frozen=True)
class Conversation:
    """``start``: seconds after the load's beginning."""

    start: float
    turns: list[Turn]


async def arrive(
    address: str,
    prompts: list[list[int]],
    max_tokens: int,
    rate: float,
    random: np.random.Generator,
) -> Times:
    """Prompts that arrive as a Poisson process, ``rate`` a second, from ``vllm bench serve``'s own
    load generator. Raises RuntimeError if a request failed."""
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    np.random.seed(int(random.integers(2**31)))  # vLLM's arrivals
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = await benchmark(
            task_type=TaskType.GENERATION,
            endpoint_type="openai",
            api_url=f"{address}/v1/completions",
            base_url=address,
            model_id=NAME,
            model_name=NAME,
            tokenizer=None,
            input_requests=[SampleRequest(p, len(p), max_tokens) for p in prompts],
            logprobs=None,
            request_rate=rate,
            burstiness=1.0,
            disable_tqdm=True,
            num_warmups=0,
            profile=False,
            selected_percentile_metrics=["ttft", "itl"],
            selected_percentiles=[99.0],
            ignore_eos=True,
            goodput_config_dict={},
            max_concurrency=None,
            lora_modules=None,
            extra_headers=None,
            extra_body={"temperature": 0},
            ready_check_timeout_sec=0,  # it would ask the first prompt
        )
    if set(result["output_lens"]) != {max_tokens}:
        errors = [error for error in result["errors"] if error]
        raise RuntimeError(f"{len(errors)} requests failed: {errors[:1]}\n{printed.getvalue()}")
    return Times(
        ttfts=result["ttfts"],
        gaps=[gap for of_request in result["itls"] for gap in of_request],
        tokens=result["total_output_tokens"],
        seconds=result["duration"],
    )


async def converse(address: str, conversations: list[Conversation], seconds: float) -> Times:
    """Conversations whose answers become part of their prompts. After ``seconds`` no turn begins.
    Raises RuntimeError, or aiohttp's own, if a request failed."""
    answers: list[Answer] = []
    began = perf_counter()
    async with open_session() as session, asyncio.TaskGroup() as group:
        for conversation in conversations:
            group.create_task(_talk(session, address, conversation, began + seconds, answers))
    return Times(
        ttfts=[answer.ttft for answer in answers],
        gaps=[gap for answer in answers for gap in answer.gaps],
        tokens=sum(len(answer.tokens) for answer in answers),
        seconds=perf_counter() - began,
    )


async def _talk(
    session: aiohttp.ClientSession,
    address: str,
    conversation: Conversation,
    end: float,
    answers: list[Answer],
) -> None:
    await asyncio.sleep(conversation.start)
    prompt: list[int] = []
    for turn in conversation.turns:
        if prompt:
            await asyncio.sleep(turn.thinking)
        if perf_counter() > end:
            return
        prompt += turn.text
        answer = await ask(session, address, prompt, turn.max_tokens)
        answers.append(answer)
        prompt = prompt + answer.tokens


async def send(address: str, prompt: list[int]) -> None:
    """A prompt whose one token of answer nobody waits for a time of."""
    async with open_session() as session:
        await ask(session, address, prompt, 1)
