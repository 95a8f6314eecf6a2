"""What of a layer's attention is not the same in every model."""

from dataclasses import dataclass

import torch

from vllm.triton_utils import tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is what the hardware has


@dataclass(frozen=True)
class LayerForm:
    """How a layer attends.

    Attributes:
        scale: of the logits.
        window: positions that a token sees, itself included: one at position p attends to the
            positions above ``p - window``, however few of their tokens are kept; None: to all
            before it.
        sinks: ``[heads]``, of each head a logit more in the softmax's denominator, with no value
            (gpt-oss); None: none.
    """

    scale: float
    window: int | None = None
    sinks: torch.Tensor | None = None

    def sees(self, position: torch.Tensor, key_position: torch.Tensor) -> torch.Tensor:
        """``[rows, keys]``: whether rows at the positions attend to keys at others."""
        back = position[:, None] - key_position[None, :]
        return (back >= 0) if self.window is None else (back >= 0) & (back < self.window)

    @property
    def flash_window(self) -> list[int]:
        """The window as FlashAttention takes it: tokens before and after a row's own."""
        return [-1, -1] if self.window is None else [self.window - 1, 0]


@triton.jit
def is_seen(key_position, row_position, WINDOW: tl.constexpr):
    """``LayerForm.sees``, of shapes that broadcast; WINDOW 0: none."""
    seen = key_position <= row_position
    if WINDOW > 0:
        seen &= key_position > row_position - WINDOW
    return seen


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, form: LayerForm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in fp32, the plain way.

    Args:
        q: ``[rows, heads, head_dim]``; k, v: ``[keys, kv_heads, head_dim]``.
        seen: ``[rows, keys]``, what each row attends to.

    Returns:
        The output, shaped as q, and the log of the softmax's denominator, ``[rows, heads]``.
    """
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    logits = torch.einsum("rkgd,jkd->rkgj", grouped, k.float()) * form.scale
    logits.masked_fill_(~seen[:, None, None, :], float("-inf"))
    lse = logits.logsumexp(-1)
    if form.sinks is not None:
        lse = torch.logaddexp(lse, form.sinks.float().view(lse.shape[1:]))
    p = (logits - lse[..., None]).exp()
    return torch.einsum("rkgj,jkd->rkgd", p, v.float()).flatten(1, 2), lse.flatten(1)
