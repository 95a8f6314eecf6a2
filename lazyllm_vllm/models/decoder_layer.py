"""The form of a decoder layer: what the staged forward asks of it, found out when it is built."""

import inspect

import torch

from vllm.model_executor.layers.attention import Attention

from lazyllm_vllm.plan.config import ConfigError


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder layers of a causal language model.

    Raises:
        ConfigError: it has none where they are looked for, or some have another form.
    """
    inner = getattr(model, "model", None)
    layers = getattr(inner, "layers", None)
    if layers is None or not isinstance(getattr(inner, "norm", None), torch.nn.Module):
        raise _not_plain(model, "has no model.layers and model.norm")
    for index, layer in enumerate(layers):
        parameters = inspect.signature(layer.forward).parameters
        if not {"positions", "hidden_states"} <= set(parameters):
            raise _not_plain(model, f"calls layer {index} without positions and hidden_states")
        count = len(_attention_in(layer))
        if count != 1:
            raise _not_plain(model, f"has {count} attentions of the plain kind in layer {index}")
    return list(layers)


def attention_of(layer: torch.nn.Module) -> Attention:
    """vLLM's attention in a decoder layer."""
    return _attention_in(layer)[0]


def _attention_in(layer: torch.nn.Module) -> list[Attention]:
    return [module for module in layer.modules() if isinstance(module, Attention)]


def _not_plain(model: torch.nn.Module, why: str) -> ConfigError:
    name = type(model).__name__.removeprefix("Lazy")
    return ConfigError(f"lazyllm: {name} cannot be pruned: it {why}")
