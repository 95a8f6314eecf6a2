"""Stages in the pieces of a capture, of a model that is a list of functions."""

from types import SimpleNamespace

import pytest
import torch

from lazyllm_vllm.hooks import stage_pieces
from lazyllm_vllm.hooks.stage_pieces import StagePieces


class Capture(SimpleNamespace):
    """As vLLM's: what a replay would call, in order."""


@pytest.fixture
def ran(monkeypatch):
    """What segments ran."""
    monkeypatch.setattr(stage_pieces, "weak_ref_tensor", lambda tensor: tensor)
    return []


def capture(pieces, rows, ids, ran, monkeypatch):
    """Three stages of one layer, each two segments; a layer adds hidden states and residual to the
    residual, and gives a hundred of its stage besides."""
    now = Capture(segments=[])
    monkeypatch.setattr(stage_pieces.BreakableCUDAGraphCapture, "current", lambda: now)
    states = [torch.full((rows, 2), -1.0) for _ in range(6)]

    def segment(name, function=lambda: None):
        now.segments.append(lambda: (ran.append((rows, name)), function()))

    def layer(stage, before, after):
        def run():
            after[1].copy_(before[0] + before[1])
            after[0].fill_(100 * stage)

        segment(f"attention {stage}")
        segment(f"layer {stage}", run)

    segment("begin")
    pieces.begin(ids)
    pieces.mark()
    embedded = ids[:, None].expand(rows, 2), torch.zeros(rows, 2)
    layer(0, embedded, states[0:2])
    for stage in (1, 2):
        segment(f"boundary {stage}")
        pieces.mark(*states[2 * stage - 2 : 2 * stage])
        layer(stage, states[2 * stage - 2 : 2 * stage], states[2 * stage : 2 * stage + 2])
    pieces.end(states[5])
    return now


def test_each_stage_runs_its_own_segments_on_its_rows(ran, monkeypatch):
    pieces, ids = StagePieces(), torch.arange(8)
    held = [capture(pieces, rows, ids[:rows], ran, monkeypatch) for rows in (4, 8)]
    assert ran == []
    hidden, residual = pieces.run(0, 3, ())
    assert ran == [(4, "attention 0"), (4, "layer 0")]
    assert hidden.tolist() == [[0, 0]] * 3 and residual.tolist() == [[0, 0], [1, 1], [2, 2]]
    ran.clear()
    hidden, residual = pieces.run(1, 5, (torch.full((5, 2), 3.0), None))
    assert ran == [(8, "attention 1"), (8, "layer 1")], "the pieces that five rows fit in"
    assert hidden.tolist() == [[100, 100]] * 5 and residual.tolist() == [[3, 3]] * 5
    ran.clear()
    (output,) = pieces.run(2, 4, (torch.ones(4, 2), torch.full((4, 2), 4.0)))
    assert ran == [(4, "attention 2"), (4, "layer 2")]
    assert output.tolist() == [[5, 5]] * 4
    assert len(held) == 2


def test_what_is_covered(ran, monkeypatch):
    pieces, ids = StagePieces(), torch.arange(8)
    assert not pieces.covers(1, ids)
    held = [capture(pieces, rows, ids[:rows], ran, monkeypatch) for rows in (4, 8)]
    assert [pieces.covers(rows, ids[:rows]) for rows in (1, 4, 5, 8, 9)] == [True] * 4 + [False]
    assert not pieces.covers(4, torch.arange(8)), "the embedding would read other tokens"
    monkeypatch.undo()
    held.pop()
    assert pieces.covers(4, ids) and not pieces.covers(5, ids), "vLLM let go of the capture"
