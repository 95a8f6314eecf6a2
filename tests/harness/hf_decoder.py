"""Any Hugging Face causal language model, layer by layer and with attention of our own.

Nothing here knows a family. What surrounds a layer (embedding, rotary, masks, final norm, logits)
is run by the model's own forward, in which the layers are replaced while it runs; what is inside a
layer is the layer's own, up to attention, which Hugging Face lets one register.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "lazyllm_reference"
# attend(query, key, value, sliding_window, sinks) -> output, all fp32.
# query, output: [heads, rows, d], after rotary, the query scaled; key, value: [kv heads, rows, d].
# sliding_window, sinks: see ``attention``.
Attend = Callable[[Tensor, Tensor, Tensor, int | None, Tensor | None], Tensor]


def _registered(module, query, key, value, attention_mask, **kwargs):
    """What the model calls for attention: query [1, heads, rows, d], output [1, rows, heads, d].
    Hugging Face makes no mask for it, since no function that makes masks is registered with it."""
    assert attention_mask is None and kwargs.get("softcap") is None
    attend: Attend = kwargs["lazyllm_attend"]
    out = attend(
        query[0].float() * kwargs["scaling"],
        key[0].float(),
        value[0].float(),
        kwargs.get("sliding_window"),
        kwargs.get("s_aux"),
    )
    return out.transpose(0, 1)[None].to(query.dtype), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _registered)


class HFDecoder:
    """Layers are counted from 0, but in ``full_layers`` from 1, as in the configuration.

    Attributes:
        num_layers: decoder layers.
        full_layers: those without a sliding window; None: all of them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers = model.get_decoder().layers
        self.num_layers = len(self.layers)
        kinds = getattr(model.config, "layer_types", None)
        self.full_layers = kinds and tuple(
            i + 1 for i, kind in enumerate(kinds) if kind == "full_attention"
        )

    def sees_all(self, layer: int) -> bool:
        return self.full_layers is None or layer + 1 in self.full_layers

    def embed(self, tokens: list[int], positions: Tensor) -> Tensor:
        """What enters the first layer, [rows, hidden]."""
        entered = []

        def forward(index: int, own, hidden: Tensor, **kwargs) -> Tensor:
            entered.append(hidden)
            return hidden

        with self._layers_replaced(forward):
            self.model.get_decoder()(
                input_ids=torch.tensor([tokens]), position_ids=positions[None], use_cache=False
            )
        return entered[0][0]

    def layer(self, number: int, hidden: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Rows through one layer, which is called with what the model's own forward calls it with
        at these positions.

        Args:
            hidden: [rows, hidden].
            positions: [rows].
        """
        output = []

        def checked(query, key, value, sliding_window, sinks) -> Tensor:
            assert self.sees_all(number) == (sliding_window is None)
            return attend(query, key, value, sliding_window, sinks)

        def forward(index: int, own, _hidden: Tensor, **kwargs) -> Tensor:
            if index == number:
                output.append(own(hidden[None], lazyllm_attend=checked, **kwargs))
            return _hidden

        with self._layers_replaced(forward):
            self.model.get_decoder()(
                inputs_embeds=hidden[None], position_ids=positions[None], use_cache=False
            )
        return output[0][0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[vocab], for the output of the last layer, [hidden]."""

        def forward(index: int, own, _hidden: Tensor, **kwargs) -> Tensor:
            return hidden[None, None]

        with self._layers_replaced(forward):
            out = self.model(inputs_embeds=hidden[None, None], use_cache=False)
        return out.logits[0, -1]

    @contextmanager
    def _layers_replaced(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        """Meanwhile ``forward(index, the layer's own forward, hidden, **kwargs)`` stands for each
        layer's forward, and attention is ours. Afterwards the model is as it was."""
        config = self.model.config
        before, config._attn_implementation = config._attn_implementation, NAME
        for index, layer in enumerate(self.layers):
            layer.forward = partial(forward, index, layer.forward)
        try:
            yield
        finally:
            config._attn_implementation = before
            for layer in self.layers:
                del layer.forward  # which uncovers the class's


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    attended: Tensor,
    sliding_window: int | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output, [heads, rows, d], and how much each row attends to each key, [heads, rows, keys],
    without what goes to the sink.

    Args:
        query: [heads, rows, d], scaled.
        keys, values: [kv heads, keys, d]; query head h reads kv head h // group.
        positions, attended: [rows] and [keys], where these are in the sequence.
        sliding_window: how many positions a row sees, its own included; None: all up to its own.
        sinks: [heads], one more logit for each softmax; None: there are none.
    """
    group = len(query) // len(keys)
    keys, values = (x.repeat_interleave(group, dim=0) for x in (keys, values))
    distance = positions[:, None] - attended
    unseen = distance < 0
    if sliding_window is not None:
        unseen |= distance >= sliding_window
    logits = (query @ keys.mT).masked_fill_(unseen, -torch.inf)
    if sinks is None:
        weights = logits.softmax(-1)
    else:
        sink = sinks.float()[:, None, None].expand(-1, len(positions), 1)
        weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    return weights @ values, weights
