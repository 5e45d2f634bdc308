"""What the functions say to whoever imports them, without the checks of shapes that other tests run under."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def plain(module: str) -> ModuleType:
    """A module as everybody else has it: read from its file, past the hook that checks annotations."""
    spec = importlib.util.spec_from_file_location(f"plain_{module}", ROOT / "minidino" / f"{module}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_losses_refuse_shapes_that_would_broadcast():
    losses = plain("learning/losses")
    logits, probs, weights = torch.zeros(2, 4, 5), torch.full((2, 4, 5), 0.2), torch.ones(4)
    with pytest.raises(ValueError, match=r"got \(2, 4, 5\): views have to be flattened"):
        losses.sinkhorn_knopp(logits, 0.05)
    for student, teacher in ((logits, probs[:, :1]), (logits, probs[..., :1]), (logits[:, 0], probs[:, 0])):
        with pytest.raises(ValueError, match=r"student logits \(V, B, K\)"):
            losses.dino_loss(student, teacher)
    for teacher, weight in ((probs[0], weights[:, None]), (probs[0], weights[:1]), (probs[0, :1], weights)):
        with pytest.raises(ValueError, match=r"weights \(M,\), got"):
            losses.ibot_loss(logits[0], teacher, weight, 2)
