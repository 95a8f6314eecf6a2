"""CUDA graph pieces where there are none: stages of at most so many rows run the way that pieces
would run them, on rows padded to a size, out of tensors that are always the same."""

import torch

SIZES = (64, 256, 512)


class PiecesOnCPU:
    """``hooks.stage_pieces.StagePieces`` of a Llama.

    Attributes:
        ran: stage and rows of each run.
        runs: whether one runs now: what is captured cuts no rows.
    """

    def __init__(self, model) -> None:
        self.model, self.ran, self.runs = model, [], False
        hidden = model.config.hidden_size
        self.states = [[torch.full((n, hidden), 7.0) for _ in range(2)] for n in SIZES]

    def covers(self, num_rows: int, input_ids: torch.Tensor) -> bool:
        return num_rows <= SIZES[-1]

    def run(self, stage: int, num_rows: int, states: tuple) -> tuple[torch.Tensor, ...]:
        model, self.runs = self.model, True
        self.ran.append((stage, num_rows))
        mine = next(s for n, s in zip(SIZES, self.states) if n >= num_rows)
        for state, given in zip(mine, states):
            state[:num_rows] = 0.0 if given is None else given
        hidden, residual = mine
        size = len(hidden)
        positions = torch.full((size,), -1)  # attention alone knows them
        if stage == 0:
            ids = torch.ones(size, dtype=model.input_ids.dtype)
            ids[:num_rows] = model.input_ids[:num_rows]
            hidden, residual = model.model.embed_tokens(ids), None
        for layer in model.schedule.stage_layers(stage):
            hidden, residual = model.plain_forwards[layer](positions, hidden, residual)
        if stage + 1 == model.schedule.num_stages:
            hidden, _ = model.model.norm(hidden, residual)
        self.runs = False
        mine[0][:], mine[1][:] = hidden, residual
        return tuple(each[:num_rows] for each in mine)


def install(model) -> None:
    """Let a model's stages run so."""
    from lazyllm_vllm.hooks import attention_layer
    from lazyllm_vllm.models import staged

    model.pieces = PiecesOnCPU(model)
    captures_pieces = staged.captures_pieces
    for module in (staged, attention_layer):
        module.captures_pieces = lambda: model.pieces.runs or captures_pieces()
