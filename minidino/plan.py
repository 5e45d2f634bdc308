"""What a run will take before it is started: parameters, FLOPs, memory, time, cost and energy, by formula.

    RunConfig -> Sizes -> Plan -> words

Each number says where it comes from: formula, published (by the maker of a device), assumption, or measured here.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from minidino.config import PRESETS, RunConfig, override, preset
from minidino.learning.prototypes import AUTO
from minidino.memory import USABLE, step_memory
from minidino.model.attention import LONGEST
from minidino.model.layers import swiglu_hidden
from minidino.model.vit import SIZES
from minidino.runs import pick_precision
from minidino.scaling import (
    CARBON,
    DEVICES,
    PUE,
    UTILISATION,
    Device,
    HeadSizes,
    Sizes,
    energy,
    expected_masked,
    matrix_tflops,
    parameters,
    step_flops,
    training_seconds,
)

WHERE = {  # the machine that a preset is for, where none is named; the last two are the published ones
    "scenes-cpu": ("cpu", 1), "imagenette-cpu": ("cpu", 1), "vitl16-short": ("a100-80gb", 32),
    "vitl14-lvd": ("a100-80gb", 96),
}  # fmt: skip
ELSEWHERE = ("h100-sxm", 1)
KNOWN = {  # what the unchanged preset took, and who says so
    "scenes-cpu": "0.06 h measured, 2 cores",  # data/results/recipe-scenes.json
    "imagenette-cpu": "0.61 h measured to step 10,489, 2 cores",  # docs/measured.md, Photographs
    "vitl16-short": "24 h published",  # official README: about a day
    "vitl14-lvd": "79 h published",  # official README: about 3.3 days
}
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Numbers of a run on a machine."""

    config: RunConfig
    device: str
    gpus: int
    utilisation: float
    counts: dict[str, int]
    flops: dict[str, float]  # of an image, with iBOT
    run_flops: float  # of the whole run; iBOT in its share of the steps
    memory: dict[str, float]  # bytes on one device
    limit: Device  # its peak rate and memory
    seconds: float

    @property
    def fits(self) -> bool:
        """Is the peak below the share of the memory of a device that can be used?"""
        return self.memory["peak"] <= USABLE * self.limit.memory_gib * GIB

    @property
    def device_hours(self) -> float:
        """Hours of all devices together."""
        return self.gpus * self.seconds / 3600


def sizes_of(config: RunConfig, device: str) -> Sizes:
    """What a step depends on, with every "auto" resolved for a device of that name: "cpu", or any GPU.

    Raises:
        ValueError: a network that `build_vit` does not know.
    """
    v, w, c = config.vit, config.loss, config.crops
    if v.name not in SIZES:
        raise ValueError(f"vit.name: expected one of {', '.join(SIZES)}, got {v.name!r}")
    width, depth, heads, ffn = SIZES[v.name]
    width, heads, gated = v.width or width, v.heads or heads, (v.ffn or ffn) == "swiglu"
    cpu = device == "cpu"
    half = (pick_precision(config.run.precision, torch.device("cpu")) if cpu else config.run.precision) != "fp32"
    tokens = 1 + v.num_register_tokens + (c.global_size // v.patch_size) ** 2
    suits_triton = not cpu and half and tokens <= LONGEST and width // heads in (32, 64, 128)
    return Sizes(
        width=width, depth=v.depth or depth, heads=heads, hidden=swiglu_hidden(width) if gated else None, gated=gated,
        dino=_head(config), ibot=None if config.heads.tied else _head(config, ibot=True), patch_size=v.patch_size,
        channels=config.data.channels, registers=v.num_register_tokens, layerscale=bool(v.layerscale),
        drop_rate=v.drop_path_rate, subset=v.drop_path == "subset", recompute=v.recompute, global_size=c.global_size,
        local_size=c.local_size, n_local=c.n_local,
        koleo_views=(2 if w.koleo_views == "released" else 1) if w.koleo else 0,
        attention=v.attention if v.attention != "auto" else "triton" if suits_triton else "sdpa",
        prototypes=w.prototypes if w.prototypes != "auto" else AUTO, half=half, cpu=cpu,
    )  # fmt: skip


def _head(config: RunConfig, ibot: bool = False) -> HeadSizes:
    h = config.heads
    return HeadSizes(
        n_prototypes=(h.ibot_n_prototypes if ibot else None) or h.n_prototypes, hidden_dim=h.hidden_dim,
        bottleneck_dim=(h.ibot_bottleneck_dim if ibot else None) or h.bottleneck_dim, n_layers=h.n_layers,
        weight_norm=h.weight_norm, train_g=h.weight_g == "released",
    )  # fmt: skip


def make_plan(
    config: RunConfig,
    gpus: int | None = None,
    device: str | None = None,
    utilisation: float = UTILISATION,
    limit: Device | None = None,
) -> Plan:
    """Work out what a run takes.

    Args:
        gpus, device: None: what the preset is for. "cpu" is this machine: its memory, its rate by a short measurement.
        utilisation: share of the peak rate, an assumption.
        limit: rate and memory of the device, where it is not in the table or was measured before.
    Raises:
        ValueError: an unknown device, float32 on a GPU (the table has 16-bit rates), a batch that cannot be divided,
            distillation.
    """
    usual, usual_gpus = WHERE.get(config.preset, ELSEWHERE)
    device = device or usual
    gpus = (usual_gpus if device == usual else 1) if gpus is None else gpus
    _check(config, gpus, device, limit)
    s, o, w, n_parts = sizes_of(config, device), config.optim, config.loss, config.optim.accumulate
    masked = expected_masked(2 * o.batch_size, s.n_patches, config.masks.probability, config.masks.ratio)
    share = max(0.0, 1 - w.ibot_start_frac) if w.ibot else 0.0  # of the steps, with iBOT
    each = o.batch_size // gpus
    masked = masked / gpus if share else 0.0
    flops = {k: v / (each / n_parts) for k, v in step_flops(s, each // n_parts, masked / n_parts, n_parts).items()}
    without = step_flops(s, each // n_parts, 0.0, n_parts)["total"] / (each / n_parts)
    run_flops = config.run.steps * o.batch_size * (share * flops["total"] + (1 - share) * without)
    limit = limit or (_this_machine(s.half) if device == "cpu" else DEVICES[device])
    return Plan(
        config=config, device=device, gpus=gpus, utilisation=utilisation, counts=parameters(s),
        flops=flops, run_flops=run_flops, memory=step_memory(s, each, masked, n_parts, gpus, config.run.parallel), limit=limit,
        seconds=training_seconds(run_flops, limit.tflops, gpus, utilisation),
    )  # fmt: skip


def _check(config: RunConfig, gpus: int, device: str, limit: Device | None) -> None:
    if device not in (*DEVICES, "cpu") and limit is None:
        raise ValueError(f"no device {device!r}; there are: cpu (this machine), {', '.join(DEVICES)}")
    if gpus < 1 or device == "cpu" and gpus > 1:
        raise ValueError(f"expected 1 cpu, or 1 or more GPUs, got {gpus} of {device!r}; name a GPU with --device")
    parts = gpus * config.optim.accumulate
    if config.optim.batch_size % parts:
        raise ValueError(f"optim.batch_size: expected a multiple of gpus x accumulate = {parts}, got "
                         f"{config.optim.batch_size}")  # fmt: skip
    if gpus > 1 and config.run.parallel == "fsdp" and config.run.precision == "fp16":
        raise ValueError("run.precision: expected bf16 with fsdp, got 'fp16', whose scaled gradients it cannot take")
    if config.distill.teacher or config.distill.targets != "heads":
        raise ValueError("a plan is of pretraining; distill has another teacher, whose run is needed: unset distill.*")
    if device != "cpu" and config.run.precision == "fp32" and limit is None:
        raise ValueError("run.precision: expected bf16, fp16 or auto on a GPU, got 'fp32': rates are known for 16 bits")


def _this_machine(half: bool) -> Device:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB if hasattr(os, "sysconf") else float("inf")
    return Device(matrix_tflops(torch.bfloat16 if half else torch.float32), memory)


def remedies(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Changes that make a run fit, the least invasive first, each with the plan that it gives."""
    lean = "loss.prototypes=" + ("chunked" if plan.device == "cpu" else "triton")
    of_losses: list[list[str]] = [[]] if plan.config.loss.prototypes in ("chunked", "triton") else [[], [lean]]
    if not plan.config.vit.recompute:
        of_losses.append([*of_losses[-1], "vit.recompute=true"])
    o, run = plan.config.optim, plan.config.run
    shared = ["run.parallel=fsdp"] + (["run.precision=bf16"] if run.precision == "fp16" else [])
    for sharing in [[], shared] if plan.gpus > 1 and run.parallel == "ddp" else [[]]:
        for losses in of_losses:
            for parts in _divisors(o.batch_size // plan.gpus, o.accumulate):
                changes = sharing + losses + ([] if parts == o.accumulate else [f"optim.accumulate={parts}"])
                changed = make_plan(override(plan.config, changes), plan.gpus, plan.device, plan.utilisation, plan.limit)
                if changed.fits:
                    yield " ".join(changes), changed
                    break


def _divisors(n: int, least: int) -> list[int]:
    """Parts that a device's images can be divided into, doubled each time."""
    return [least * 2**i for i in range(12) if n % (least * 2**i) == 0]


# ---------------------------------------------------------------- words


def describe(plan: Plan, price: float | None = None) -> str:
    """A plan in lines, each with its source.

    Args:
        price: of one device for an hour, of any currency.
    Raises:
        ValueError: a price below 0, or without end.
    """
    if price is not None and not 0 <= price < math.inf:
        raise ValueError(f"price per hour: expected a number >= 0, got {price}")
    c, m, o, name = plan.counts, plan.memory, plan.config.optim, plan.config.preset
    steps, limit = plan.config.run.steps, plan.limit
    told = "measured" if plan.device == "cpu" else "published"
    parts = ", ".join(f"{k} {100 * v / plan.flops['total']:.0f} %" for k, v in plan.flops.items() if k != "total")
    holds = ", ".join(f"{k} {_gib(v)}" for k, v in m.items() if v and k != "peak")
    lines = [
        f"{name} on {plan.gpus} x {plan.device}" + (f", {plan.config.run.parallel}" if plan.gpus > 1 else ""),
        f"parameters   student {c['student']:,} = backbone {c['backbone']:,} + dino_head {c['dino_head']:,} + "
        f"ibot_head {c['ibot_head']:,}; trained {c['trained']:,}; teacher as many  [formula, exact]",
        f"FLOPs        {_large(plan.flops['total'])} an image ({parts})  [formula]",
        f"             {_large(plan.run_flops / steps)} a step of {o.batch_size:,} images, {_large(plan.run_flops)} in "
        f"{steps:,} steps  [formula]",
        f"memory       {_gib(m['peak'])} at most on each device  [formula]",
        f"             {holds}",
        f"             of {limit.memory_gib:.0f} GiB [{told}], {USABLE:.0%} of them usable [assumption]: "
        + ("fits" if plan.fits else "does not fit"),
        f"rate         {limit.tflops:.3g} TFLOP/s [{told}] x {plan.utilisation:.2f} [assumption]",
        f"time         {plan.seconds / steps:.3g} s a step, {_hours(plan.seconds)}  [formula of the above; without "
        "loading and cropping]",
        f"cost         {plan.device_hours:,.4g} device-hours"
        + (f", {price * plan.device_hours:,.2f} at {price:g} an hour" if price is not None else ""),
    ]  # fmt: skip
    if limit.watts:
        kwh, carbon = energy(plan.device_hours, limit.watts)
        lines.append(f"energy       {kwh:,.4g} kWh: {limit.watts:g} W [{told}] x {PUE} for the building, {carbon:,.4g} kg CO2e at "
                     f"{CARBON} kg a kWh  [assumptions of the paper]")  # fmt: skip
    if plan.config == preset(name) and (plan.device, plan.gpus) == WHERE.get(name) and name in KNOWN:
        lines.append(f"known        {KNOWN[name]}")
    if not plan.fits:
        found = [f"  {words}: {_gib(changed.memory['peak'])}" for words, changed in remedies(plan)]
        lines += ["it would fit with", *found] if found else ["it would need more devices or a smaller network"]
    return "\n".join(lines)


def plan_table(limit: Device | None = None, precision: str = "auto", **options: Any) -> str:
    """All presets, each on the machine that it is for or on the one named in the options of `make_plan`; markdown.

    Args:
        limit: rate and memory of the cpu, where they were measured before.
        precision: of the cpu; "auto" is what this one multiplies natively.
    """
    words = "preset | on | parameters, M: backbone + heads | GFLOP an image | GiB each | hours | device-hours | known"
    rows = [f"| {words} |", "|---" * 8 + "|"]
    for name in PRESETS:
        usual = WHERE.get(name, ELSEWHERE)
        here = (options.get("device") or usual[0]) == "cpu"
        config = override(preset(name), [f"run.precision={precision}"]) if here else preset(name)
        plan = make_plan(config, limit=limit if here else None, **options)
        limit = plan.limit if here else limit  # one measurement for all rows
        c, meant = plan.counts, (plan.device, plan.gpus) == usual
        cells = (
            f"`{name}`", f"{plan.gpus} x {plan.device}",
            f"{c['backbone'] / 1e6:.2f} + {(c['student'] - c['backbone']) / 1e6:.2f}",
            _round(plan.flops["total"] / 1e9),
            _round(plan.memory["peak"] / GIB) + ("" if plan.fits else ", does not fit"),
            _round(plan.seconds / 3600), _round(plan.device_hours), KNOWN.get(name, "") if meant else "",
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _round(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _gib(n: float) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB / 10 else f"{n / 2**20:.1f} MiB"


def _large(flops: float) -> str:
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flops >= size:
            return f"{flops / size:.4g} {unit}"
    return f"{flops / 1e9:.4g} GFLOP"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
