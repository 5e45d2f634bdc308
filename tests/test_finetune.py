"""Training the backbone on labels: what learns, what stays, and that it pays where features cannot be read linearly."""

import numpy as np
import pytest
import torch

from minidino.images.pixels import Pixels
from minidino.model.vit import build_vit
from minidino.probes.features import extract, state_hash
from minidino.probes.finetune import finetune
from minidino.probes.linear import linear_probe


def network():
    torch.manual_seed(0)
    return build_vit("vit_tiny", width=32, depth=2, heads=2, patch_size=8, img_size=16, init_std=0.1).eval()


def quarters(n, seed=0):
    """Four quarters, each light or dark: the class says whether an odd number is light. Two are not labelled."""
    rng = np.random.default_rng(seed)
    light = rng.integers(0, 2, (n, 2, 2))
    clean = 98 + 60 * light.repeat(8, 1).repeat(8, 2)[..., None].repeat(3, 3)
    images = np.clip(clean + rng.normal(0, 20, clean.shape), 0, 255).astype(np.uint8)
    labels = light.sum((1, 2)) % 2
    labels[:2] = -1
    return Pixels.from_array(images, labels, ["even", "odd"])


def test_it_learns_what_no_linear_head_can_read():
    vit, train, test = network(), quarters(256), quarters(200, seed=1)
    before = state_hash(vit)
    tokens = [extract(vit, part.squares(16), progress=False)["cls"] for part in (train, test)]
    linear = linear_probe(tokens[0], train.labels, tokens[1], test.labels, epochs=20)["accuracy"]
    found = finetune(vit, train, test, 16, steps=150, batch_size=32, scale=(0.6, 1.0), progress=False)
    assert linear < 0.7 and found["accuracy"] > 0.95
    assert state_hash(vit) == before and not vit.training
    images = test.squares(16)
    said = found["classifier"].head(extract(found["classifier"].backbone, images, progress=False)["cls"]).argmax(1)
    known = torch.from_numpy(test.labels) >= 0
    assert (said[known] == torch.from_numpy(test.labels)[known]).double().mean().item() == found["accuracy"]


def test_a_decay_of_nothing_lets_the_last_norm_and_the_head_learn_alone():
    vit = network()
    found = finetune(vit, quarters(64), quarters(32), 16, steps=5, layerwise_decay=0.0, progress=False)["classifier"]
    changed = {name for name, x in found.backbone.state_dict().items() if not torch.equal(x, vit.state_dict()[name])}
    assert changed == {"norm.weight", "norm.bias"} and found.head.bias.abs().max() > 0


def test_earlier_blocks_change_less():
    vit = network()
    how = {"steps": 5, "layerwise_decay": 0.3, "weight_decay": 0.0, "progress": False}
    after = finetune(vit, quarters(64), quarters(32), 16, **how)["classifier"].backbone.state_dict()
    first, last = (float((after[name] - vit.state_dict()[name]).abs().max())
                   for name in ("blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"))  # fmt: skip
    assert first == pytest.approx(0.3 * last, rel=0.2)  # AdamW steps are as long as the rate


def test_matrices_decay_and_norms_biases_and_tokens_do_not():
    vit = network()
    how = {"steps": 1, "lr": 1e-3, "layerwise_decay": 1.0, "weight_decay": 500.0, "progress": False}
    after = finetune(vit, quarters(64), quarters(32), 16, **how)["classifier"].backbone.state_dict()
    for name, x in vit.state_dict().items():
        decays = name.endswith("weight") and "norm" not in name
        assert (after[name] - x * (0.5 if decays else 1.0)).abs().max() <= 1.1e-3, name


def test_the_same_seed_gives_the_same_classifier_whatever_was_drawn_before():
    def head(seed, before):
        vit = build_vit("vit_tiny", width=32, depth=2, heads=2, patch_size=8, img_size=16, drop_path_rate=0.4)
        load = network().state_dict()
        vit.load_state_dict(load)
        torch.manual_seed(before)
        found = finetune(vit, quarters(64), quarters(32), 16, steps=3, seed=seed, progress=False)
        return found["classifier"].head.weight, torch.rand(1)

    torch.manual_seed(7)
    untouched = torch.rand(1)
    (one, drawn), (again, _), (other, _) = head(0, 7), head(0, 8), head(1, 7)
    assert torch.equal(one, again) and not torch.equal(one, other) and drawn == untouched


@pytest.mark.parametrize(
    "change, words",
    [
        ({"steps": 0}, "of at least 1, got 30, 0 and 64"),
        ({"batch_size": 0}, "of at least 1"),
        ({"n_classes": 1}, "labels below n_classes = 1, got 1"),
        ({"test": quarters(2)}, "labelled test pictures"),
        ({"train": quarters(2)}, "nothing to learn from"),
        ({"lr": 1e30, "steps": 9}, "lower the rate"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(change, words):
    given = {"train": quarters(64), "test": quarters(32), "size": 16, "steps": 2, "progress": False}
    with pytest.raises(ValueError, match=words):
        finetune(network(), **given | change)


def test_a_network_in_half_precision_learns_in_float32_and_stays_as_it_is():
    vit = network().bfloat16()
    found = finetune(vit, quarters(64), quarters(32), 16, steps=3, progress=False)
    assert vit.cls_token.dtype == torch.bfloat16 and found["classifier"].backbone.cls_token.dtype == torch.float32
    same = finetune(network().bfloat16().float(), quarters(64), quarters(32), 16, steps=3, progress=False)
    assert torch.equal(found["classifier"].head.weight, same["classifier"].head.weight)
