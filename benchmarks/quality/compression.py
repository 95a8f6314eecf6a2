"""Prompts cut short before the full model is asked: what is kept of one is a prompt of its own, its
positions counted anew.

An engine that compresses looks like a ``vllm.LLM`` to ``answer``. It reads a prompt twice, the
first time to choose by: all of the model does, so that answers can be compared, and time cannot.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lazyllm_vllm.plan.schedule import ceil_share


@dataclass(frozen=True)
class Compression:
    """Attributes:
    rule: a name of ``RULES``.
    keep: share of the prompt.
    first_tokens, last_tokens: so many at either end are always kept.
    depth: of the rule ``last query``, after which share of the layers one chooses.
    min_prompt_tokens: shorter prompts are not compressed.
    """

    rule: str
    keep: float
    first_tokens: int = 0
    last_tokens: int = 0
    depth: float = 0.0
    min_prompt_tokens: int = 512

    def kept(self, scores: torch.Tensor) -> list[int]:
        """The positions that are kept, rising, by a prompt's scores, ``[tokens]``: the highest, of
        equal ones the first."""
        n = len(scores)
        always = torch.zeros(n, dtype=torch.bool)
        always[: self.first_tokens] = True
        always[max(n - self.last_tokens, 0) :] = True
        count = max(ceil_share(self.keep, n), int(always.sum()))
        ranking = scores.cpu().float().masked_fill(always, torch.inf)
        return sorted(ranking.sort(descending=True, stable=True).indices[:count].tolist())


class CompressingLLM:
    """A stock ``vllm.LLM`` that answers compressed prompts."""

    def __init__(self, llm, compression: Compression) -> None:
        self.llm = llm
        self.compression = compression

    @property
    def llm_engine(self):
        return self.llm.llm_engine

    def generate(self, prompts: list[dict], params, use_tqdm: bool) -> list:
        """As ``vllm.LLM.generate``, of ``{"prompt_token_ids": ids}``."""
        ids = self.compressed([prompt["prompt_token_ids"] for prompt in prompts])
        return self.llm.generate([{"prompt_token_ids": p} for p in ids], params, use_tqdm=use_tqdm)

    def compressed(self, prompts: list[list[int]]) -> list[list[int]]:
        """What is kept of each prompt."""
        compression = self.compression
        is_long = [len(prompt) >= compression.min_prompt_tokens for prompt in prompts]
        long = [prompt for prompt, long in zip(prompts, is_long) if long]
        scores = iter(RULES[compression.rule](self.llm, long, compression) if long else ())
        return [
            [prompt[at] for at in compression.kept(next(scores))] if long else prompt
            for prompt, long in zip(prompts, is_long)
        ]


def surprise(llm, prompts: list[list[int]], compression: Compression) -> list[torch.Tensor]:
    """How little the model expects each token after those before it, -log p: what selective context
    (arXiv 2310.06201) and LLMLingua (arXiv 2310.05736) ask a smaller model. Nothing comes before
    the first token, which counts as never expected."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [
        torch.tensor(
            [torch.inf]
            + [-told[token].logprob for token, told in zip(p[1:], output.prompt_logprobs[1:])]
        )
        for p, output in zip(prompts, outputs)
    ]


def last_query(llm, prompts: list[list[int]], compression: Compression) -> list[torch.Tensor]:
    """GemFilter's scores (arXiv 2409.17422), see ``last_query_scores``, in one layer. Prompts run
    one by one, so that what goes into its attention is one prompt's."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    scores = []
    with _watched_attention(llm, compression.depth) as seen:
        for prompt in prompts:
            seen.clear()
            llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
            q, k = seen[-1][0][-1], torch.cat([k for _, k in seen])
            if len(k) != len(prompt):
                raise RuntimeError(f"{len(k)} keys of a prompt of {len(prompt)} tokens")
            scores.append(last_query_scores(q, k))
    return scores


def last_query_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Inner products with the last token's query, without a softmax, summed over heads and averaged
    over five neighbours; beyond either end there are zeros.

    Args:
        q: ``[heads, head_dim]``; k: ``[tokens, kv_heads, head_dim]``.

    Returns:
        ``[tokens]``
    """
    grouped = q.float().unflatten(0, (k.shape[1], -1)).sum(1)  # of the heads that share keys
    products = torch.einsum("kd,jkd->j", grouped, k.float())
    return F.avg_pool1d(products[None], 5, stride=1, padding=2)[0]


@contextmanager
def _watched_attention(llm, depth: float) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Queries and keys, ``[rows, heads, head_dim]``, of each step, in the layer that has this share
    of the layers before it."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(model):
        from vllm.model_executor.layers.attention import Attention

        layers = [module for module in model.modules() if isinstance(module, Attention)]

        def see(layer, given) -> None:
            q, k = (x.detach().clone().flatten(1) for x in given[:2])
            size = layer.head_size
            seen.append((q.unflatten(1, (-1, size)), k.unflatten(1, (-1, size))))

        return layers[round(depth * len(layers))].register_forward_pre_hook(see)

    (hook,) = llm.apply_model(watch)
    try:
        yield seen
    finally:
        hook.remove()


RULES: dict[str, Callable] = {"surprise": surprise, "last query": last_query}
