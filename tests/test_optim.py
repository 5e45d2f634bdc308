"""Schedules against the released numpy arrays, groups against the published multipliers, clipping against the norm."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from minidino.learning.optim import clip_gradients, cosine_schedule, last_layer_lr, linear_schedule, parameter_groups
from minidino.model.heads import DINOHead
from minidino.model.vit import build_vit


def released_schedule(base, final, total, warmup=0, start=0.0, frozen=0):
    """The array that the released CosineScheduler and build_schedulers hold, past the end included."""
    line = np.linspace(start, base, warmup)
    wave = final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(total - warmup) / (total - warmup)))
    values = np.concatenate([line, wave, np.full(5, final)])
    values[:frozen] = 0
    return values


@pytest.mark.parametrize(
    "base, final, total, warmup, start", [(4e-3, 1e-6, 50, 10, 0.0), (0.04, 0.4, 31, 0, 0.0), (1.0, 0.5, 9, 1, 0.2)]
)
def test_cosine_schedule_is_the_released_array(base, final, total, warmup, start):
    schedule = cosine_schedule(base, final, total, warmup, start)
    expected = released_schedule(base, final, total, warmup, start)
    np.testing.assert_allclose([schedule(i) for i in range(total + 5)], expected, rtol=1e-12)
    frozen = last_layer_lr(schedule, freeze_steps=3)
    expected = released_schedule(base, final, total, warmup, start, frozen=3)
    np.testing.assert_allclose([frozen(i) for i in range(total + 5)], expected, rtol=1e-12)


def test_schedules_at_named_steps():
    momentum = cosine_schedule(0.992, 1.0, 125_000)
    assert (momentum(0), momentum(62_500), momentum(10**9)) == (0.992, pytest.approx(0.996), 1.0)
    temp = linear_schedule(0.04, 0.07, 37_500)
    np.testing.assert_allclose([temp(i) for i in range(37_500)][::100], np.linspace(0.04, 0.07, 37_500)[::100])
    assert temp(0) == 0.04 and temp(37_500) == temp(10**9) == 0.07
    assert linear_schedule(0.04, 0.07, 0)(0) == 0.07
    with pytest.raises(ValueError, match="warmup_steps=11, steps=10"):
        cosine_schedule(1.0, 0.0, 10, warmup_steps=11)


class Student(nn.Module):
    def __init__(self, name, tied):
        super().__init__()
        self.backbone = build_vit(name, patch_size=16, img_size=32, num_register_tokens=4)
        self.dino_head = DINOHead(self.backbone.norm.weight.numel(), 32, hidden_dim=16, bottleneck_dim=8)
        width = self.backbone.norm.weight.numel()
        self.ibot_head = self.dino_head if tied else DINOHead(width, 32, hidden_dim=16, bottleneck_dim=8)


def by_name(groups):
    return {name: group for group in groups for name in group["names"]}


def test_layer_decay_of_vit_large():
    with torch.device("meta"):
        model = Student("vit_large", tied=True)
    groups = by_name(parameter_groups(model, layerwise_decay=0.9, patch_embed_lr_mult=0.2))
    golden = {
        "backbone.cls_token": 0.07179,
        "backbone.pos_embed": 0.07179,
        "backbone.mask_token": 0.07179,
        "backbone.register_tokens": 0.07179,
        "backbone.patch_embed.proj.weight": 0.014358,
        "backbone.patch_embed.proj.bias": 0.014358,
        "backbone.blocks.0.attn.qkv.weight": 0.9**24,
        "backbone.blocks.9.ls1.gamma": 0.9**15,
        "backbone.blocks.23.mlp.fc1.weight": 0.9,
        "backbone.norm.weight": 1.0,
        "dino_head.mlp.0.weight": 1.0,
        "dino_head.last_layer.weight_g": 1.0,
    }
    for name, value in golden.items():
        assert groups[name]["lr_mult"] == pytest.approx(value, rel=1e-4), name
    bare = by_name(parameter_groups(model.backbone, layerwise_decay=0.9, patch_embed_lr_mult=0.2))
    assert {name: group["lr_mult"] for name, group in bare.items()} == {
        name.removeprefix("backbone."): group["lr_mult"] for name, group in groups.items() if "backbone" in name
    }


def test_weight_decay_and_last_layer():
    with torch.device("meta"):
        model = Student("vit_tiny", tied=False)
    groups = by_name(parameter_groups(model))
    for part in ("blocks.0.norm1.weight", "blocks.0.attn.qkv.bias", "blocks.3.ls2.gamma", "norm.bias"):
        assert groups[f"backbone.{part}"]["wd_mult"] == 0, part
    tokens = [f"backbone.{part}" for part in ("pos_embed", "cls_token", "mask_token", "register_tokens")]
    for name in [*tokens, "backbone.patch_embed.proj.weight", "dino_head.last_layer.weight_g"]:
        assert groups[name]["wd_mult"] == 1, name
    spared = by_name(parameter_groups(model, decay_tokens=False))
    assert {name for name in groups if groups[name]["wd_mult"] != spared[name]["wd_mult"]} == set(tokens)
    last = {name for name, group in groups.items() if group["is_last_layer"]}
    assert last == {f"{head}.last_layer.weight_{x}" for head in ("dino_head", "ibot_head") for x in "gv"}


@pytest.mark.parametrize("tied", [True, False])
def test_each_trainable_parameter_is_in_exactly_one_group(tied):
    model = Student("vit_tiny", tied)
    model.backbone.patch_embed.requires_grad_(False)
    groups = parameter_groups(model, layerwise_decay=0.8, patch_embed_lr_mult=0.2)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    parameters = dict(model.named_parameters())
    for group in groups:
        assert len(group["names"]) == len(group["params"])
        assert all(parameters[name] is p for name, p in zip(group["names"], group["params"]))
    keys = [(group["lr_mult"], group["wd_mult"], group["is_last_layer"]) for group in groups]
    assert len(set(keys)) == len(keys)
    assert len(torch.optim.AdamW(groups).param_groups) == len(groups)  # AdamW refuses duplicates


def two_parts():
    parts = {"backbone": nn.Linear(1, 1, bias=False), "dino_head": nn.Linear(1, 1, bias=False)}
    parts["backbone"].weight.grad, parts["dino_head"].weight.grad = torch.tensor([[4.0]]), torch.tensor([[-3.0]])
    return parts, lambda: [part.weight.grad.item() for part in parts.values()]


def test_clipping_by_part_and_by_all():
    parts, gradients = two_parts()
    norms = clip_gradients(parts, max_norm=3.5)
    assert {name: norm.item() for name, norm in norms.items()} == {"backbone": 4.0, "dino_head": 3.0}
    assert gradients() == [pytest.approx(3.5, rel=1e-5), -3.0]
    parts, gradients = two_parts()
    parts["ibot_head"] = parts["dino_head"]  # tied: counts once
    norms = clip_gradients(parts, max_norm=1.0, mode="global")
    assert {name: norm.item() for name, norm in norms.items()} == {"global": 5.0}
    assert gradients()[:2] == [pytest.approx(0.8, rel=1e-5), pytest.approx(-0.6, rel=1e-5)]
    clip_gradients(parts, max_norm=math.inf)
    assert gradients()[0] == pytest.approx(0.8, rel=1e-5)
    with pytest.raises(ValueError, match="got 'released'"):
        clip_gradients(parts, 1.0, mode="released")
