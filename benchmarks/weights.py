"""Weights for a model that has none, whose attention tells tokens apart."""

import torch


def randomize(model: torch.nn.Module) -> None:
    """Fill a vLLM model with weights of a real model's spread. vLLM's dummy weights are so small
    that every score ties and nothing is ever revived."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 1.0 if "embed" in name else weight.shape[-1] ** -0.5)
        elif "norm" in name:
            weight.data.fill_(1)
    for name, weight in model.named_parameters():
        if "qkv" in name:
            weight.data.mul_(1.5)
