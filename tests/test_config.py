"""Presets, text overrides, their errors, and the published recipes as numbers."""

import dataclasses
import json
import math
from typing import get_args, get_type_hints

import pytest
import torch

from minidino.config import PRESETS, OptimConfig, RunConfig, difference, flatten, from_json, override, preset, to_json
from minidino.learning.teacher import build_student
from minidino.learning.train import schedules
from minidino.ranges import ranges_of
from minidino.runs import Run


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_survive_json(name):
    config = preset(name)
    assert config.preset == name
    again = from_json(to_json(config))
    assert again == config and hash(again) == hash(config)  # tuples came back as tuples
    with torch.device("meta"):
        student = build_student(config)
    assert student.backbone.pos_embed.shape[1] == 1 + (config.crops.global_size // config.vit.patch_size) ** 2
    for name, schedule in schedules(config).items():
        values = [schedule(step) for step in range(0, config.run.steps + 1, config.run.steps // 10)]
        assert all(math.isfinite(value) and value >= 0 for value in values), name


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="'scenes-gpu'.*scenes-cpu.*vitl14-lvd"):
        preset("scenes-gpu")


@pytest.mark.parametrize(
    "change, key, value",
    [
        ("vit.depth=4", "vit.depth", 4),
        (" vit.depth = 4 ", "vit.depth", 4),
        ("vit.depth=None", "vit.depth", None),
        ("vit.ffn=swiglu", "vit.ffn", "swiglu"),
        ("vit.ffn=none", "vit.ffn", None),
        ("heads.tied=true", "heads.tied", True),
        ("heads.mlp_gain=2", "heads.mlp_gain", 2.0),
        ("optim.base_lr=1e-3", "optim.base_lr", 1e-3),
        ("crops.global_scale=(0.3, 1)", "crops.global_scale", (0.3, 1.0)),
        ("crops.global_scale=[0.3, 1]", "crops.global_scale", (0.3, 1.0)),
        ("data.source=/a=b/photographs", "data.source", "/a=b/photographs"),
    ],
)
def test_override_changes_one_field(change, key, value):
    config = override(preset("scenes-cpu"), [change])
    got = flatten(config)[key]
    assert got == value and type(got) is type(value)
    assert set(difference(config, preset("scenes-cpu"))) <= {key}
    hash(config)


def test_override_takes_changes_that_need_each_other():
    config = preset("scenes-cpu")
    changed = override(config, ["optim.batch_size=30", "optim.accumulate=3", "optim.batch_size=60"])
    assert (changed.optim.batch_size, changed.optim.accumulate) == (60, 3)
    assert override(config, []) == config == preset("scenes-cpu")
    assert override(config, "vit.depth=6") == override(config, ["vit.depth=6"]) != config


@pytest.mark.parametrize(
    "change, words",
    [
        ("vit.dept=4", "got 'vit.dept=4'; keys are vit.name, vit.width, vit.depth"),
        ("depth=4", "keys are data.source,.* vit.depth,.* run.workers"),
        ("optim=4", "keys are optim.batch_size"),
        ("preset=other", "keys are data.source"),
        ("vit.depth", "expected key=value"),
        ("vit.depth=4.5", r"vit.depth: expected int \| None, got '4.5'"),
        ("vit.depth=True", r"vit.depth: expected int \| None, got 'True'"),
        ("run.steps=true", "run.steps: expected int, got 'true'"),
        ("optim.base_lr=fast", "optim.base_lr: expected float, got 'fast'"),
        ("optim.base_lr=nan", "optim.base_lr: expected float"),
        ("optim.base_lr=False", "optim.base_lr: expected float"),
        ("optim.base_lr=1e-7", "optim.final_lr: expected at most 2.5e-08, the rate by base_lr and batch_size, got 2e-05"),
        ("heads.tied=1", "heads.tied: expected bool, got '1'"),
        ("vit.ffn=gelu", "vit.ffn: expected .*swiglu.*got 'gelu'"),
        ("loss.targets=softmax", "loss.targets: expected one of 'sinkhorn', 'centering', got 'softmax'"),
        ("crops.global_scale=0.3", "crops.global_scale: expected"),
        ("crops.global_scale=(0.3, 0.5, 1)", "crops.global_scale: expected"),
        ("crops.global_scale=(0.3, x)", "crops.global_scale: expected"),
        ("crops.global_scale=(1, 0.3)", "expected 0 < low <= high <= 1, got"),
        ("crops.hue=0.7", "crops.hue: expected between 0 and 0.5 turns, got 0.7"),
        ("crops.global_size=50", "crops.global_size: expected a multiple of vit.patch_size 8 px, got 50 px"),
        ("crops.local_size=0", "crops.local_size: expected >= 1 px"),
        ("vit.patch_size=0", "vit.patch_size: expected >= 1 px, got 0"),
        ("vit.drop_path_rate=1", "vit.drop_path_rate: expected"),
        ("masks.ratio=(0.5, 1)", "masks.ratio: expected"),
        ("teacher.momentum=1.1", "teacher.momentum: expected between 0 and 1"),
        ("teacher.temp=0", "teacher.temp: expected > 0"),
        ("optim.batch_size=1", "optim.batch_size: expected >= 2"),
        ("optim.accumulate=5", "optim.accumulate: expected a divisor of batch_size 64, got 5"),
        ("optim.accumulate=128", "optim.accumulate: expected a divisor of batch_size 64, got 128"),
        ("optim.warmup_frac=1.5", "optim.warmup_frac: expected between 0 and 1"),
        ("run.steps=0", "run.steps: expected >= 1, got 0"),
    ],
)
def test_override_refuses_in_one_line(change, words):
    with pytest.raises(ValueError, match=words) as told:
        override(preset("scenes-cpu"), [change])
    assert "\n" not in str(told.value)


def test_difference_is_two_sided_and_in_order():
    a, b = preset("vitl16-short"), preset("vitl14-lvd")
    table = difference(a, b)
    assert table["optim.batch_size"] == (2048, 3072) and table["loss.targets"] == ("centering", "sinkhorn")
    assert [key for key in flatten(a) if key in table] == list(table)
    assert difference(b, a) == {key: (right, left) for key, (left, right) in table.items()}
    assert difference(a, a) == {}
    assert "optim.clip" not in table


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda raw: raw["vit"].update(colour=3), "'vit' has unknown fields.*colour"),
        (lambda raw: raw.update(optimiser={"lr": 1}), "unknown stages.*optimiser"),
        (lambda raw: raw["optim"].update(batch_size=1), "optim.batch_size"),
    ],
)
def test_a_config_file_of_another_version_is_refused(change, words):
    raw = json.loads(to_json(preset("scenes-cpu")))
    change(raw)
    with pytest.raises(ValueError, match=words):
        from_json(json.dumps(raw))


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("scenes-cpu").run.steps = 3


GOLDEN_LR = {64: 1.0e-3, 128: 1.414e-3, 256: 2.0e-3, 512: 2.828e-3, 1024: 4e-3, 2048: 5.657e-3, 3072: 6.928e-3}


@pytest.mark.parametrize("batch_size, lr", GOLDEN_LR.items())
def test_the_square_root_rule(batch_size, lr):
    assert OptimConfig(batch_size=batch_size).lr == pytest.approx(lr, rel=2e-4)
    assert OptimConfig(batch_size=batch_size, base_lr=2e-4).lr == pytest.approx(lr / 20, rel=2e-4)


# the table of the released configs: vitl16_short.yaml and vitl14.yaml over ssl_default_config.yaml
PUBLISHED = {
    "run.steps": (125_000, 625_000),
    "optim.batch_size": (2048, 3072),
    "optim.base_lr": (4e-3, 2e-4),
    "optim.final_lr": (1e-6, 1e-6),
    "optim.warmup_start": ("released", "released"),
    "optim.weight_decay": (0.04, 0.04),
    "optim.final_weight_decay": (0.4, 0.2),
    "optim.beta2": (0.999, 0.999),
    "optim.clip": (3.0, 3.0),
    "optim.clip_scope": ("module", "module"),
    "optim.layerwise_decay": (0.9, 1.0),
    "optim.patch_embed_lr_mult": (0.2, 0.2),
    "optim.decay_tokens": (True, True),
    "teacher.momentum": (0.992, 0.994),
    "teacher.final_momentum": (1.0, 1.0),
    "teacher.warmup_temp": (0.04, 0.04),
    "teacher.temp": (0.07, 0.07),
    "teacher.patch_temp": (None, None),
    "vit.name": ("vit_large", "vit_large"),
    "vit.patch_size": (16, 14),
    "vit.drop_path_rate": (0.3, 0.4),
    "vit.drop_path": ("subset", "subset"),
    "vit.layerscale": (1e-5, 1e-5),
    "vit.init_std": (0.02, 0.02),
    "vit.interpolate_offset": (0.1, 0.1),
    "vit.interpolate_antialias": (False, False),
    "heads.tied": (True, False),
    "heads.n_prototypes": (65_536, 131_072),
    "heads.bottleneck_dim": (256, 384),
    "heads.hidden_dim": (2048, 2048),
    "heads.n_layers": (3, 3),
    "heads.weight_g": ("released", "released"),
    "heads.mlp_gain": (None, None),
    "heads.prototype_std": (None, None),
    "loss.targets": ("centering", "sinkhorn"),
    "loss.dino": (1.0, 1.0),
    "loss.ibot": (1.0, 1.0),
    "loss.koleo": (0.1, 0.1),
    "loss.student_temp": (0.1, 0.1),
    "loss.koleo_views": ("released", "released"),
    "loss.ibot_divisor": ("released", "released"),
    "loss.dino_divisor": ("released", "released"),
    "masks.probability": (0.5, 0.5),
    "masks.ratio": ((0.1, 0.5), (0.1, 0.5)),
    "masks.max_patches": ("released", "released"),
    "crops.n_local": (8, 8),
    "crops.global_size": (224, 224),
    "crops.local_size": (96, 98),
    "crops.global_scale": ((0.32, 1.0), (0.32, 1.0)),
    "crops.local_scale": ((0.05, 0.32), (0.05, 0.32)),
    "crops.blur": ("released", "released"),
    "run.precision": ("fp16", "fp16"),
}


@pytest.mark.parametrize("key", PUBLISHED)
def test_published_recipe(key):
    assert (flatten(preset("vitl16-short"))[key], flatten(preset("vitl14-lvd"))[key]) == PUBLISHED[key]


@pytest.mark.parametrize(
    "name, lr, warmup, temp_warmup",
    [("vitl16-short", 5.657e-3, 12_500, 37_500), ("vitl14-lvd", 3.464e-4, 100_000, 37_500)],
)
def test_published_schedules_in_steps(name, lr, warmup, temp_warmup):
    config = preset(name)
    plan, steps = schedules(config), config.run.steps
    assert plan["lr"](0) == 0  # warm-up from zero: the first step moves nothing
    assert plan["lr"](warmup - 1) == pytest.approx(lr, rel=2e-4) and plan["lr"](warmup - 2) < plan["lr"](warmup - 1)
    assert plan["lr"]((warmup + steps) // 2) == pytest.approx((lr + 1e-6) / 2, rel=1e-3)
    assert plan["last_layer_lr"](1249) == 0 and plan["last_layer_lr"](1250) == plan["lr"](1250) > 0
    assert plan["teacher_temp"](0) == 0.04 and plan["teacher_temp"](temp_warmup) == 0.07
    assert plan["teacher_temp"](temp_warmup // 2) == pytest.approx(0.055, abs=1e-5)
    assert plan["teacher_temp"](temp_warmup - 2) < 0.07
    half = (config.teacher.momentum + 1) / 2
    assert plan["momentum"](steps // 2) == pytest.approx(half) and plan["momentum"](steps) == 1
    assert plan["weight_decay"](0) == pytest.approx(0.04)
    assert plan["weight_decay"](steps) == config.optim.final_weight_decay
    assert plan["ibot_weight"](0) == plan["ibot_weight"](steps) == 1.0


def test_published_sizes():
    with torch.device("meta"):
        short, lvd = build_student(preset("vitl16-short")), build_student(preset("vitl14-lvd"))
        small = build_student(preset("vits16-in1k"))

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(short.backbone) == 303_351_808 and count(small.backbone) == 21_675_264
    assert count(short.dino_head) == 23_662_848 and count(small.dino_head) == 22_352_128
    assert short.ibot_head is short.dino_head and count(short) == 303_351_808 + 23_662_848
    assert count(lvd.dino_head) == 57_545_088 and count(lvd.ibot_head) == 40_505_600
    assert lvd.backbone.blocks[0].mlp.w3.in_features == 2736  # SwiGLU
    assert count(lvd) == count(lvd.backbone) + 57_545_088 + 40_505_600


def test_published_batches_in_images():
    assert preset("vitl16-short").optim.batch_size * preset("vitl16-short").run.steps == 256_000_000
    assert preset("vitl14-lvd").optim.batch_size * preset("vitl14-lvd").run.steps == 1_920_000_000
    assert math.isclose(RunConfig().optim.lr, preset("vitl16-short").optim.lr)


@pytest.mark.parametrize(
    "change",
    ["optim.clip=0", "optim.clip=-1", "teacher.patch_temp=0", "loss.ibot=-1", "loss.koleo=-0.1", "vit.width=0", "vit.depth=0",
     "heads.ibot_n_prototypes=1", "heads.hidden_dim=0", "heads.n_layers=0", "vit.num_register_tokens=-1", "run.workers=-1",
     "crops.jitter_probability=2", "crops.brightness=-1", "data.scene_seed=-1", f"run.seed={10**29}", "run.seed=-1",
     "distill.targets=features"],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused_by_name(change):
    with pytest.raises(ValueError, match=f"^{change.split('=')[0]}: expected "):
        override(preset("scenes-cpu"), change)


def test_no_clipping_is_inf_and_texts_stay_texts():
    assert override(preset("scenes-cpu"), "optim.clip=inf").optim.clip == float("inf")
    assert override(preset("scenes-cpu"), "data.source=2024").data.source == "2024"


@pytest.mark.parametrize("change", ["optim.base_lr=inf", "heads.mlp_gain=1e999", "vit.init_std=inf", "crops.brightness=inf",
                                    "vit.interpolate_offset=5", "data.scene_seed=99999999999999999999999"])  # fmt: skip
def test_what_would_end_in_nan_or_far_inside_is_refused_by_name(change):
    with pytest.raises(ValueError, match=f"^{change.split('=')[0]}: expected "):
        override(preset("scenes-cpu"), change)


def test_every_number_says_what_it_may_be():
    """A number without a range may be anything, which hardly any may."""
    free = set()
    for name, stage in vars(RunConfig()).items():
        hints = get_type_hints(type(stage)) if hasattr(stage, "stage") else {}
        numbers = {key for key, hint in hints.items() if {int, float} & {hint, *get_args(hint)}}
        free |= {f"{name}.{key}" for key in numbers - set(ranges_of(type(stage)))}
    assert free == {"crops.global_scale", "crops.local_scale", "masks.ratio"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "expected a dictionary of stages"),
        ("null", "expected a dictionary of stages"),
        ('{"optim": 3}', "expected a dictionary of fields"),
        ('{"run": {"steps": "6"}}', "run.steps: expected int, got '6'"),
        ('{"run": {"steps": 4.0}}', "run.steps: expected int"),
        ('{"crops": {"global_scale": 0.5}}', "crops.global_scale: expected"),
        ('{"loss": {"targets": "foo"}}', "loss.targets: expected one of 'sinkhorn', 'centering', got 'foo'"),
        ('{"data": {"stage": "x"}}', "unknown fields"),
    ],
)
def test_a_damaged_config_is_refused_in_words(text, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        from_json(text)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json: "):
        Run(tmp_path).config()
