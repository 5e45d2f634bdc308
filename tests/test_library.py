"""What the functions say to whoever imports them, without the checks of shapes that other tests run under."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
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


@pytest.mark.parametrize("n", [np.int64(2), np.array([2, 1]), torch.tensor(2), [torch.tensor(1), 2]])
def test_blocks_are_numbers_of_any_kind(n):
    vit = plain("model/vit").build_vit("vit_tiny", patch_size=4, img_size=16, width=24, depth=3, heads=3)
    images = torch.randn(2, 3, 8, 16)
    found = vit.get_intermediate_layers(images, n)
    assert len(found) == 2 and all(map(torch.equal, found, vit.get_intermediate_layers(images, 2)))
