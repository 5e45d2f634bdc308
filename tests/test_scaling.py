"""Formulas of size and cost against what networks have, what a step computes and what it holds."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from minidino.config import PRESETS, RunConfig, override, preset
from minidino.images.batches import Batch
from minidino.images.masks import batch_masks
from minidino.learning.teacher import build_student
from minidino.learning.train import State, start, train
from minidino.memory import step_memory
from minidino.plan import GIB, KNOWN, WHERE, describe, make_plan, plan_table, remedies, sizes_of
from minidino.scaling import (
    DEVICES,
    Device,
    HeadSizes,
    Sizes,
    energy,
    expected_masked,
    fit_power_law,
    matrix_tflops,
    parameters,
    step_flops,
    training_seconds,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
measured = importlib.import_module("plan")  # benchmarks/plan.py counts and feeds real steps in the same way
TINY = [
    "crops.global_size=32", "crops.local_size=16", "vit.width=32", "vit.depth=2", "heads.hidden_dim=48",
    "heads.bottleneck_dim=24", "heads.n_prototypes=80", "heads.ibot_n_prototypes=72", "optim.batch_size=6",
    "run.precision=fp32", "run.device=cpu", "loss.ibot_start_frac=0", "loss.ibot_full_frac=0",
]  # fmt: skip
TIED = ["heads.tied=true", "heads.ibot_n_prototypes=none"]


# ---------------------------------------------------------------- parameters


def counted(config: RunConfig) -> dict[str, int]:
    with torch.device("meta"):
        student = build_student(config)
    size = {name: sum(p.numel() for p in part.parameters()) for name, part in student.parts().items()}
    total = sum(p.numel() for p in student.parameters())
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return {"ibot_head": 0} | size | {"student": total, "teacher": total, "trained": trained}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_presets(name):
    assert parameters(sizes_of(preset(name), "cpu")) == counted(preset(name))


@pytest.mark.parametrize(
    "changes",
    [
        ["vit.ffn=swiglu", "vit.num_register_tokens=4"],
        ["vit.layerscale=0", *TIED],
        ["heads.weight_norm=false", "heads.weight_g=released"],
        ["heads.n_layers=1", "heads.ibot_bottleneck_dim=8", "vit.depth=1"],
        ["heads.weight_g=released", "crops.n_local=0"],
        ["vit.name=vit_giant2", "vit.width=none", "vit.depth=none", "vit.heads=none", "heads.weight_g=paper", *TIED],
    ],
    ids=lambda changes: changes[0],
)
def test_parameters_of_odd_networks(changes):
    config = override(preset("scenes-cpu"), [*TINY, *changes])
    assert parameters(sizes_of(config, "cpu")) == counted(config)


def test_parameters_of_the_literature():
    """Tables of the paper's networks and heads."""
    vit = {"patch_size": 14, "global_size": 518, "local_size": 98}
    small = Sizes(width=384, depth=12, heads=6, dino=HeadSizes(n_prototypes=65536), **vit)
    assert parameters(small)["backbone"] == 22_056_576 and parameters(small)["dino_head"] == 22_352_128
    giant = Sizes(width=1536, depth=40, heads=24, hidden=4096, gated=True, registers=4,
                  dino=HeadSizes(n_prototypes=131_072, bottleneck_dim=384), **vit)  # fmt: skip
    assert parameters(giant)["backbone"] == 1_136_486_912 and parameters(giant)["dino_head"] == 58_593_664


# ---------------------------------------------------------------- a real step, counted and weighed


def ready(changes: list[str]) -> tuple[RunConfig, State, Batch]:
    """A state whose moments exist, and a batch of noise."""
    config = override(preset("scenes-cpu"), [*TINY, *changes])
    state, batch = start(config, torch.device("cpu")), measured.noise(config, torch.device("cpu"))
    for p in state.student.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step = 1  # of the first, all is read
    return config, state, batch


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["vit.attention=reference"],
        ["vit.drop_path_rate=0.3", "vit.ffn=swiglu", *TIED],
        ["vit.drop_path_rate=0.3", "vit.drop_path=scale", "vit.num_register_tokens=3"],
        ["loss.prototypes=chunked", "heads.n_prototypes=900"],
        ["optim.accumulate=3", "vit.drop_path_rate=0.2"],
        ["optim.accumulate=3"],
        ["vit.recompute=true", "vit.drop_path_rate=0.2"],
        ["crops.n_local=0", "heads.n_layers=2", "loss.koleo_views=paper"],
        ["loss.ibot=0", "loss.koleo=0", "heads.weight_norm=false", "heads.weight_g=released"],
        ["loss.targets=centering", "masks.probability=1"],
    ],
    ids=lambda changes: " ".join(changes) or "preset",
)
def test_flops_of_a_step(changes):
    config, state, batch = ready(changes)
    with FlopCounterMode(display=False, custom_mapping=measured.FUSED) as counter:
        next(train(config, None, state, [batch]))
    n, parts = config.optim.batch_size, config.optim.accumulate
    masked = len(batch.mask_weights) if config.loss.ibot else 0
    flops = step_flops(sizes_of(config, "cpu"), n // parts, masked / parts, parts)
    assert counter.get_total_flops() == pytest.approx(parts * flops["total"], rel=1e-9 if parts == 1 else 2e-3)


def allocated(config: RunConfig, state: State, batch: Batch) -> int:
    """Most bytes that torch's allocator had handed out during a step, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        next(train(config, None, state, [batch]))
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


@pytest.mark.parametrize(
    "changes",
    [
        ["optim.batch_size=16", "vit.width=64", "vit.depth=4"],
        ["optim.batch_size=16", "vit.drop_path_rate=0.4", "vit.ffn=swiglu", "vit.layerscale=0"],
        ["optim.batch_size=16", "vit.attention=reference", "vit.drop_path=scale", "vit.drop_path_rate=0.2"],
        ["optim.batch_size=16", "heads.n_prototypes=8192", "heads.ibot_n_prototypes=none"],
        ["optim.batch_size=16", "heads.n_prototypes=8192", *TIED, "optim.accumulate=4", "loss.targets=centering"],
        ["optim.batch_size=16", "heads.n_prototypes=20000", "heads.ibot_n_prototypes=none", "loss.prototypes=chunked"],
        ["optim.batch_size=16", "run.precision=bf16", "vit.drop_path_rate=0.3"],
        ["optim.batch_size=16", "vit.recompute=true", "vit.width=64", "vit.depth=6"],
        ["optim.batch_size=16", "run.precision=bf16", "vit.attention=reference", "crops.n_local=0"],
    ],
    ids=lambda changes: " ".join(changes[1:]),
)
def test_memory_of_a_step(changes):
    """What the allocator hands out: activations, gradients, logits. The known states are added to both sides."""
    config, state, batch = ready(changes)
    sizes = sizes_of(config, "cpu")
    memory = step_memory(sizes, config.optim.batch_size, len(batch.mask_weights), config.optim.accumulate)
    own = [*state.student.parameters(), *state.teacher.parameters(), *batch[:3]]
    own += [value for kept in state.optimizer.state.values() for value in kept.values() if value.ndim]
    states = sum(x.nbytes for x in own)
    assert sum(memory[key] for key in ("weights", "average", "moments", "batch")) == pytest.approx(states, rel=1e-3)
    assert memory["peak"] - states == pytest.approx(allocated(config, state, batch), rel=0.15)


def test_memory_of_a_process():
    """Resident memory of a process at its peak, less what it had after a small step; a third of a ViT-S/16."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from test_scaling import ready, train
from minidino.runs import give_back_memory, peak_memory_mb
config, state, batch = ready([])
next(train(config, None, state, [batch]))
give_back_memory()
before = next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
config, state, batch = ready({BIG})
next(train(config, None, state, [batch]))
print(peak_memory_mb() - before, len(batch.mask_weights))
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("resident memory is read from Linux's /proc")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    held, masked = map(float, done.stdout.split())
    config = override(preset("scenes-cpu"), [*TINY, *BIG])
    memory = step_memory(sizes_of(config, "cpu"), config.optim.batch_size, masked)
    assert memory["peak"] / 2**20 == pytest.approx(held, rel=0.15)


BIG = [
    "vit.name=vit_small", "vit.width=none", "vit.heads=none", "vit.depth=4", "vit.patch_size=16",
    "crops.global_size=224", "crops.local_size=96", "vit.drop_path_rate=0.3", "heads.n_prototypes=4096",
    "heads.hidden_dim=2048", "heads.bottleneck_dim=256", *TIED, "optim.batch_size=4",
]  # fmt: skip


@pytest.mark.parametrize("grid, ratio, near", [(6, (0.1, 0.5), 0.03), (14, (0.1, 0.5), 0.01), (14, (0.3, 0.3), 0.02)])
def test_expected_masked(grid, ratio, near):
    g = torch.Generator().manual_seed(0)
    drawn = batch_masks(400, (grid, grid), g, 0.5, ratio).sum().item()
    assert expected_masked(400, grid**2, 0.5, ratio) == pytest.approx(drawn, rel=near)
    assert expected_masked(3, 36, 0.5, (0.25, 0.25)) == 9 and expected_masked(1, 36, 0.5, ratio) == 0


def test_sharing_divides_what_is_shared():
    s = sizes_of(preset("vitl16-short"), "h200")
    ways = ((1, "ddp"), (8, "ddp"), (8, "fsdp"))
    alone, ddp, fsdp = (step_memory(s, 32, 500, gpus=n, sharding=how) for n, how in ways)
    for key in ("weights", "average", "moments", "gradients"):
        assert alone[key] == ddp[key] == 8 * fsdp[key] > 0
    assert alone["saved"] == ddp["saved"] == fsdp["saved"]
    assert alone["peak"] < ddp["peak"] <= alone["peak"] + alone["gradients"] and fsdp["peak"] < alone["peak"]
    assert fsdp["gathered"] > 0 == ddp["gathered"]


@pytest.mark.parametrize(
    "changed, words",
    [({"width": 0}, "width: expected at least 1"), ({"heads": 3}, "width 8 is not a multiple of heads 3"),
     ({"local_size": 97}, "local_size: expected a multiple"),
     ({"attention": "fast"}, "attention: expected one of"), ({"prototypes": "auto"}, "prototypes: expected one of")],
)  # fmt: skip
def test_impossible_sizes(changed, words):
    with pytest.raises(ValueError, match=words):
        Sizes(**{"width": 8, "depth": 1, "heads": 1, "dino": HeadSizes(n_prototypes=4), **changed})


def test_impossible_machines():
    s = sizes_of(preset("scenes-cpu"), "cpu")
    for bad in ({"sharding": "zero"}, {"gpus": 0}, {"parts": 0}):
        with pytest.raises(ValueError, match="expected sharding"):
            step_memory(s, 4, 10, **bad)
    for bad in ((1e9, 0.0, 1, 0.3), (1e9, 1.0, 0, 0.3), (1e9, 1.0, 1, 0.0), (1e9, 1.0, 1, 1.1)):
        with pytest.raises(ValueError, match="expected utilisation"):
            training_seconds(*bad)


# ---------------------------------------------------------------- time


def test_time_is_work_by_rate():
    assert training_seconds(6e15, 100, gpus=2, utilisation=0.3) == pytest.approx(100)
    assert 0 < matrix_tflops(seconds=0.01) < 1000


def test_the_default_utilisation_is_that_of_the_two_published_runs():
    """A day on 32 A100, 3.3 days on 96: what is computed, by our count, in the time that the authors name."""
    for name, days in (("vitl16-short", 1.0), ("vitl14-lvd", 3.3)):
        plan = make_plan(preset(name))
        assert (plan.device, plan.gpus) == WHERE[name] and "published" in KNOWN[name]
        assert plan.seconds / 86400 == pytest.approx(days, rel=0.2)
        assert f"{24 * days:.0f} h" in KNOWN[name]


def test_what_is_known_of_small_runs_is_stored():
    runs = json.loads((ROOT / "data" / "results" / "recipe-scenes.json").read_text())["runs"]
    hours = sum(run["training"]["seconds"] for run in runs) / len(runs) / 3600
    assert KNOWN["scenes-cpu"].startswith(f"{hours:.2f} h measured")
    assert "10,489" in KNOWN["imagenette-cpu"] and "10,489" in (ROOT / "docs" / "measured.md").read_text()


# ---------------------------------------------------------------- plans


def test_ibot_counts_in_its_share_of_the_steps():
    limit = Device(1, 64)
    late, never, always = (
        make_plan(override(preset("scenes-cpu"), changes), limit=limit)
        for changes in ([], ["loss.ibot=0"], ["loss.ibot_start_frac=0"])
    )
    assert late.run_flops == pytest.approx(0.4 * never.run_flops + 0.6 * always.run_flops)
    assert late.memory["peak"] == always.memory["peak"] > never.memory["peak"]
    assert always.run_flops == pytest.approx(1500 * 64 * always.flops["total"])


def test_a_plan_says_where_its_numbers_come_from():
    told = describe(make_plan(preset("vits16-in1k"), gpus=8, device="h200"), price=2.5)
    for words in ("vits16-in1k on 8 x h200, ddp", "backbone 21,675,264", "[formula, exact]", "141 GiB [published]",
                  "989 TFLOP/s [published] x 0.30 [assumption]", "device-hours,", "at 2.5 an hour", "kWh: 700 W [published]"):
        assert words in told
    told = describe(make_plan(preset("scenes-cpu"), limit=Device(0.1, 16)))
    assert "16 GiB [measured]" in told and "measured, 2 cores" in told and "an hour" not in told and "kWh" not in told


def test_the_hours_of_the_official_model_card_give_its_carbon():
    hours = 22_000 + 4_500 + 5_300 + 8_000  # of ViT-g, and of its students S, B and L
    kwh, carbon = energy(hours, DEVICES["a100-40gb"].watts)
    assert kwh == pytest.approx(hours * 0.44) and round(carbon / 1000) == 7  # t CO2e


def test_remedies_fit():
    plan = make_plan(preset("vits16-in1k"), gpus=8, device="l4")
    told = describe(plan)
    assert not plan.fits and "does not fit" in told and "it would fit with" in told
    found = list(remedies(plan))
    assert found and all(changed.fits and words in told for words, changed in found)
    assert all(changed.config.optim.batch_size == 2048 for _, changed in found)
    hopeless = describe(make_plan(override(preset("vitl14-lvd"), ["vit.name=vit_giant2"]), device="l4"))
    assert "more devices or a smaller network" in hopeless
    large = make_plan(override(preset("vitl14-lvd"), ["vit.name=vit_giant2"]), gpus=96, device="a10")
    assert not large.fits and all(changed.fits for _, changed in remedies(large))
    assert any("run.parallel=fsdp run.precision=bf16" in words for words, _ in remedies(large))


@pytest.mark.parametrize(
    "changes, options, words",
    [
        ([], {"device": "abacus"}, "no device 'abacus'; there are: cpu"),
        ([], {"device": "cpu", "gpus": 2}, "expected 1 cpu"),
        ([], {"device": "h200", "gpus": 7}, "a multiple of gpus x accumulate = 7"),
        (["run.precision=fp32"], {"device": "h200"}, "expected bf16, fp16 or auto on a GPU"),
        (["distill.teacher=runs/big"], {}, "distill"),
        (["vit.name=vit_huge"], {}, "vit.name: expected one of vit_tiny"),
        (["run.precision=fp16", "run.parallel=fsdp"], {"device": "h200", "gpus": 2}, "expected bf16 with fsdp"),
    ],
)
def test_what_cannot_be_planned(changes, options, words):
    with pytest.raises(ValueError, match=words):
        make_plan(override(preset("scenes-cpu"), changes), **options)


def test_the_table_has_every_preset_on_its_machine_or_on_one():
    rows = plan_table(Device(0.1, 64)).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(PRESETS)
    for name, row in zip(PRESETS, rows, strict=True):
        plan = make_plan(preset(name), limit=Device(0.1, 64) if "cpu" in name else None)
        assert f"| {plan.gpus} x {plan.device} |" in row and (", does not fit |" in row) == (not plan.fits)
        assert KNOWN.get(name, "|") in row
    on_one = plan_table(device="h200", gpus=1)
    assert on_one.count("| 1 x h200 |") == len(PRESETS) and "published" not in on_one


@pytest.mark.parametrize("kind", ["flops", "bytes"])
def test_stored_steps_are_as_predicted(kind):
    rows = json.loads((ROOT / "data" / "results" / "plan-cpu.json").read_text())["rows"]
    assert len(rows) >= 6
    for row in rows:
        assert row[f"formula_{kind}"] == pytest.approx(row[kind], rel={"flops": 0.02, "bytes": 0.15}[kind])


def test_devices_are_plausible():
    assert all(50 < d.tflops < 5000 and 16 <= d.memory_gib <= 300 for d in DEVICES.values())
    assert DEVICES["h100-sxm"].tflops == DEVICES["h200"].tflops and GIB == 1024**3


# ---------------------------------------------------------------- power laws


@pytest.mark.parametrize("a, b, c", [(20.0, 0.05, 0.0), (3e4, 0.3, 0.0), (50.0, 0.2, 1.7), (2.0, 0.1, 0.4)])
def test_a_known_law_is_found_and_predicts(a, b, c):
    compute = np.geomspace(1e15, 1e20, 8)
    law = fit_power_law(compute[:-1], a * compute[:-1] ** -b + c, floor=c > 0)
    assert law.predict(compute[-1]) == pytest.approx(a * compute[-1] ** -b + c, rel=1e-4)
    assert law.b == pytest.approx(b, rel=1e-2) and law.c == pytest.approx(c, rel=1e-2, abs=1e-9)
    assert law.a == pytest.approx(a, rel=0.3) and law.error < 1e-5


def test_a_noisy_law_against_least_squares_by_hand():
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 1e4, 30)
    y = 5 * x**-0.25 * np.exp(0.02 * rng.standard_normal(30))
    law = fit_power_law(list(x), list(y))
    design = np.stack([np.ones(30), np.log(x)], 1)
    (intercept, slope), *_ = np.linalg.lstsq(design, np.log(y), rcond=None)
    assert (law.a, law.b, law.c) == pytest.approx((math.exp(intercept), -slope, 0), rel=1e-6)
    assert law.error == pytest.approx(np.std(np.log(y) - design @ [intercept, slope]), rel=1e-6)
    assert abs(law.b - 0.25) < 0.01 and law.predict(np.array([1.0, 10.0])).shape == (2,)
    assert fit_power_law(x, y, floor=True).error <= law.error + 1e-12


@pytest.mark.parametrize("compute, loss, floor", [
    ([1.0], [1.0], False), ([1.0, 1.0], [2.0, 3.0], False), ([1.0, 2.0], [2.0, 1.0], True), ([1.0, 2.0], [2.0], False),
    ([0.0, 1.0], [2.0, 1.0], False), ([1.0, 2.0], [2.0, -1.0], False), ([1.0, 2.0], [2.0, math.nan], False),
])  # fmt: skip
def test_points_that_make_no_law(compute, loss, floor):
    with pytest.raises(ValueError, match="expected"):
        fit_power_law(compute, loss, floor)
