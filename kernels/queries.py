"""Which tokens score the keys, and by what rule; see ``kernels.score``."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Queries:
    """The query rows that score.

    Attributes:
        q: ``[rows, heads, head_dim]``.
        row: ``[batch]`` int32, row of each request's current token; those before it come before.
        lse: ``[window, max batch, heads]`` fp32, log-denominator of the attention of the current
            token, of the one before it, ...
        scale: of the logits.
        part: which tokens of the window there are.
    """

    q: torch.Tensor
    row: torch.Tensor
    lse: torch.Tensor
    scale: float
    part: "WindowPart"

    @property
    def window(self) -> int:
        return len(self.lse)


@dataclass(frozen=True)
class WindowPart:
    """The window of a prompt that is prefilled in chunks may be spread over several; all three
    ``[batch]`` int32.

    Attributes:
        count: tokens of the window in this step, at most as many as ``Queries.window``; 0: the
            request is passed over.
        later: tokens of the window that come in later steps.
        scored: positions that earlier steps have scored, 0 .. scored - 1; their scores count too.
    """

    count: torch.Tensor
    later: torch.Tensor
    scored: torch.Tensor


@dataclass(frozen=True)
class ScoreRule:
    """Attributes:
    peak: whether the highest attention counts, that of earlier tokens a quarter; else the mean.
    accumulates: whether a score that is there already stays if it is higher.
    carry: without ``accumulates``, whether this share of it stays if that is higher.
    """

    peak: bool
    accumulates: bool
    carry: float = 0.0


def last_rows_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    window: int,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-denominators of a prompt's last tokens in causal attention, the last one first.

    Args:
        q: ``[n, heads, head_dim]``, the last n of those who have keys.
        k: ``[keys, kv_heads, head_dim]``.
        sinks: ``[heads]``, a logit more in each head's denominator.

    Returns:
        ``[window, heads]`` fp32, zeros where the prompt is shorter.
    """
    n, num_heads, _ = q.shape
    window_rows = min(window, n)
    grouped = q[n - window_rows :].float().unflatten(1, (k.shape[1], -1))
    logits = torch.einsum("rkgd,jkd->rkgj", grouped, k.float()) * scale
    row, key = torch.arange(len(k) - window_rows, len(k)), torch.arange(len(k))
    logits = logits.masked_fill((key > row[:, None])[:, None, None], -torch.inf)
    last = logits.logsumexp(-1).flatten(1).flip(0)
    lse = torch.zeros(window, num_heads)
    lse[:window_rows] = last if sinks is None else torch.logaddexp(last, sinks.float())
    return lse
