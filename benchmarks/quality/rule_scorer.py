"""A scorer that goes by a rule, in plain PyTorch: slow, to compare answers by."""

import torch
import torch.nn.functional as F

from benchmarks.quality.rules import Rule
from lazyllm_vllm.kernels.paged import StageKeys
from lazyllm_vllm.kernels.queries import Queries
from lazyllm_vllm.kernels.selection import Selection
from lazyllm_vllm.runtime.scorers import AttentionScorer


class RuleScorer(AttentionScorer):
    """Scores prefills by a rule; decodes, which only revive by it, as LazyLLM does."""

    def __init__(self, rule: Rule, carry: float) -> None:
        super().__init__(carry)
        self.rule = rule
        self.every_layer = rule.layers != 1
        # By request and layer, what a window's tokens in earlier chunks made of its keys.
        self._chunks: dict[tuple[int, int], torch.Tensor] = {}
        # By request, what the layers so far gave.
        self._layers: dict[int, list[torch.Tensor]] = {}

    def score_prefills(
        self,
        s: Selection,
        queries: Queries,
        keys: StageKeys,
        batch: range,
        is_first_layer: bool,
    ) -> None:
        for i in batch:
            request, count = int(s.index[i]), int(queries.part.count[i])
            if request < 0 or not s.is_pruned[i] or not count:
                continue
            weights = self._over_queries(queries, keys, i, (request, id(keys)))
            if queries.part.later[i]:
                continue  # the rest of the window is to come
            num_prompt = int(s.num_prompt[i])
            position = keys.positions(i)
            is_before_window = position < num_prompt - queries.window
            score = weights.new_zeros(num_prompt)
            score[position] = self._over_heads(weights, is_before_window)
            score = self._over_layers(request, score, is_first_layer)[position]
            s.state.score[s.state.at(i, position)] = self._over_block(score, position)

    def _over_queries(
        self, queries: Queries, keys: StageKeys, i: int, layer: tuple[int, int]
    ) -> torch.Tensor:
        """``[heads, keys]``, of the window's tokens in this step and in those before."""
        weights = attention(queries, keys, i)
        later = int(queries.part.later[i])
        is_sum = self.rule.queries == "sum"
        if not is_sum:
            weights[max(self.rule.in_full - later, 0) :] *= self.rule.earlier
        over = weights.sum(0) if is_sum else weights.amax(0)
        before = self._chunks.pop(layer, None)
        if before is not None and queries.part.scored[i]:
            before = F.pad(before, (0, over.shape[1] - before.shape[1]))
            over = over + before if is_sum else over.maximum(before)
        if later:
            self._chunks[layer] = over
        return over

    def _over_heads(self, weights: torch.Tensor, is_before_window: torch.Tensor) -> torch.Tensor:
        """``[keys]``, of ``[heads, keys]``."""
        if (pool := self.rule.pool) > 1:
            weights = weights.where(is_before_window, 0)
            weights = F.max_pool1d(weights[None], pool, stride=1, padding=pool // 2)[0]
        if self.rule.heads == "peak":
            return weights.amax(0)
        return weights.sum(0) if self.rule.heads == "sum" else weights.mean(0)

    def _over_layers(self, request: int, score: torch.Tensor, is_first: bool) -> torch.Tensor:
        """``[tokens]``, of this layer's ``[tokens]`` and what there was before."""
        rule = self.rule
        if not self.every_layer:
            return score
        before = [] if is_first else self._layers[request]
        if rule.decay is not None:
            before = [sum((rule.decay * earlier for earlier in before), score)]
        elif rule.layers is None:
            before = [torch.stack([*before, score]).amax(0)]
        else:
            before = [*before, score][-rule.layers :]
        self._layers[request] = before
        return torch.stack(before).amax(0)

    def _over_block(self, score: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """``[keys]``; neighbours without keys hold nothing."""
        if (size := self.rule.block) == 1:
            return score
        block = position // size
        blocks = score.new_zeros(int(block.max()) + 1)
        if self.rule.block_score == "mean":
            return blocks.index_add(0, block, score)[block] / size
        return blocks.scatter_reduce(0, block, score, "amax")[block]


def attention(queries: Queries, keys: StageKeys, i: int) -> torch.Tensor:
    """Attention weights of a request's tokens of the window that are in this step, the last one
    first: ``[tokens, heads, keys]`` fp32."""
    count, (k, _) = int(queries.part.count[i]), keys.gather(i)
    back = torch.arange(count, device=k.device)
    q = queries.q[queries.row[i] - back].float().unflatten(1, (k.shape[1], -1))
    logits = torch.einsum("nkgd,jkd->nkgj", q, k.float()).flatten(1, 2) * queries.scale
    weights = (logits - queries.lse[:count, i, :, None]).exp()
    seen = torch.arange(len(k), device=k.device) < len(k) - back[:, None]
    return weights.where(seen[:, None], 0.0)
