import torch
from harness import registry

if torch.version.cuda is None:
    registry.look_here()
