"""How large, how long, how dear: parameters and FLOPs of a training step by formula; time; power laws.

    Sizes -> parameters, step_flops -> training_seconds        compute, loss -> fit_power_law

Everything here is arithmetic with plain numbers; memory is in `minidino.memory`. One multiplication and addition are
two FLOPs, as `torch.utils.flop_counter` counts; only matrix products count, and those that cut crops do not.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from minidino.model.layers import Groups

N_GLOBAL = 2  # global crops of an image
PUE, CARBON = 1.1, 0.385  # power of the building over that of its devices; kg CO2e a kWh: assumptions of the paper
UTILISATION = 0.3  # assumption: share of the peak rate; see docs/measured.md, Plan, for the two published runs behind it


class Device(NamedTuple):
    """What the maker publishes: dense half-precision TFLOP/s with float32 sums, GiB of memory, and the largest power."""

    tflops: float
    memory_gib: float
    watts: float | None = None  # None: not known


DEVICES = {
    "a100-40gb": Device(312, 40, 400),
    "a100-80gb": Device(312, 80, 400),
    "h100-sxm": Device(989, 80, 700),
    "h100-pcie": Device(756, 80, 350),
    "h200": Device(989, 141, 700),
    "b200": Device(2250, 180, 1000),
    "l4": Device(121, 24, 72),
    "l40s": Device(362, 48, 350),
    "a10": Device(125, 24, 150),
    "rtx-a6000": Device(155, 48, 300),
    "rtx-3090": Device(71, 24, 350),
    "rtx-4090": Device(165, 24, 450),
    "mi300x": Device(1307, 192, 750),
}


@dataclass(frozen=True, kw_only=True)
class HeadSizes:
    """Of one DINO head."""

    n_prototypes: int  # K
    hidden_dim: int = 2048
    bottleneck_dim: int = 256  # b
    n_layers: int = 3
    weight_norm: bool = True
    train_g: bool = True  # the lengths of the prototypes; they exist with weight norm only

    def layers(self, width: int) -> list[tuple[int, int]]:
        """(in, out) of the linear layers before the prototypes."""
        widths = [width] + [self.hidden_dim] * (self.n_layers - 1) + [self.bottleneck_dim]
        return list(zip(widths[:-1], widths[1:], strict=True))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """All that the cost of a step depends on; letters as in the house: D, h, P, R, L, K."""

    width: int  # D
    depth: int
    heads: int  # h
    dino: HeadSizes
    ibot: HeadSizes | None = None  # None: the head is shared
    hidden: int | None = None  # of the feed-forward; None: 4 D
    gated: bool = False  # SwiGLU
    patch_size: int = 16
    channels: int = 3  # of a picture
    registers: int = 0
    layerscale: bool = True
    drop_rate: float = 0.0
    subset: bool = True  # stochastic depth computes the kept crops alone
    recompute: bool = False  # blocks are computed again in the backward pass
    global_size: int = 224
    local_size: int = 96
    n_local: int = 8
    koleo_views: int = 2  # 0: no KoLeo
    attention: str = "sdpa"  # "reference", "sdpa", "triton"
    prototypes: str = "reference"  # "reference", "chunked", "triton"
    half: bool = False  # autocast to 16 bits
    cpu: bool = False  # attention stays in float32 there, and parts are small

    def __post_init__(self):
        for name in ("width", "depth", "heads", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        for name in ("global_size", "local_size"):
            if (side := getattr(self, name)) % self.patch_size:
                raise ValueError(f"{name}: expected a multiple of patch_size {self.patch_size} px, got {side} px")
        for name, second in (("attention", "sdpa"), ("prototypes", "chunked")):
            if getattr(self, name) not in (known := ("reference", second, "triton")):
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def n_patches(self) -> int:
        """N of a global crop."""
        return (self.global_size // self.patch_size) ** 2

    @property
    def feed_forward(self) -> tuple[int, int]:
        """(numbers out of the first layer, numbers into the last), for each token."""
        hidden = self.hidden or 4 * self.width
        return (2 * hidden if self.gated else hidden), hidden

    def heads_of(self) -> tuple[HeadSizes, HeadSizes]:
        """The head of class tokens, and that of masked patches."""
        return self.dino, self.ibot or self.dino

    def groups(self, n_images: int) -> Groups:
        """(crops, tokens of a crop): the student's views of so many images."""
        views = [(N_GLOBAL, self.global_size)] + ([(self.n_local, self.local_size)] if self.n_local else [])
        return [(n * n_images, 1 + self.registers + (side // self.patch_size) ** 2) for n, side in views]

    def kept(self, n_images: int) -> Groups:
        """The same of the crops that a residual is computed for."""
        if not (self.subset and self.drop_rate):
            return self.groups(n_images)
        return [(max(int(crops * (1 - self.drop_rate)), 1), n) for crops, n in self.groups(n_images)]


# ---------------------------------------------------------------- parameters


def parameters(s: Sizes) -> dict[str, int]:
    """Count the parameters; exact.

    Returns:
        "backbone" (with mask token and positions for a global crop), "dino_head", "ibot_head" (0 when shared),
        "student" their sum, "teacher" the same, "trained" those of the student that have a gradient.
    """
    heads = {"dino_head": _head_parameters(s.dino, s.width)}
    heads["ibot_head"] = _head_parameters(s.ibot, s.width) if s.ibot else 0
    fixed = sum(h.n_prototypes for h in (s.dino, s.ibot) if h and h.weight_norm and not h.train_g)
    d = s.width
    embed = (s.channels * s.patch_size**2 + 1) * d + (1 + 1 + 1 + s.n_patches + s.registers) * d  # cls, mask, positions
    backbone = embed + s.depth * block_parameters(s) + 2 * d
    student = backbone + sum(heads.values())
    return {"backbone": backbone, **heads, "student": student, "teacher": student, "trained": student - fixed}


def block_parameters(s: Sizes) -> int:
    """Of one block."""
    d, (first, last) = s.width, s.feed_forward
    norms, attention = 4 * d, (d + 1) * 3 * d + (d + 1) * d
    return norms + attention + (d + 1) * first + (last + 1) * d + (2 * d if s.layerscale else 0)


def _head_parameters(h: HeadSizes, width: int) -> int:
    mlp = sum((a + 1) * b for a, b in h.layers(width))
    return mlp + h.n_prototypes * (h.bottleneck_dim + h.weight_norm)


# ---------------------------------------------------------------- FLOPs


def expected_masked(n_crops: int, n_patches: int, probability: float, ratio: tuple[float, float]) -> float:
    """M, the masked patches of so many global crops, on average.

        int(n_crops * probability) crops, each with floor(N u) patches, u uniform in ratio

    Differs: `images.masks` stays below its target by 0.2 patches of a crop on average; not counted here.
    """
    low, high = (share * n_patches for share in ratio)
    if high <= low:
        return int(n_crops * probability) * float(math.floor(low))
    whole = range(math.floor(low), math.ceil(high))
    mean = sum(k * (min(k + 1, high) - max(k, low)) for k in whole) / (high - low)
    return int(n_crops * probability) * mean


def step_flops(s: Sizes, n_images: int, n_masked: float, n_parts: int = 1) -> dict[str, float]:
    """Count the FLOPs of one forward and backward pass of the student, and of the teacher's forward pass.

    Args:
        n_images: of one pass: those of an update on one device, divided by its parts.
        n_masked: M, of these images; 0 leaves iBOT out.
        n_parts: of an update, which takes as many passes.
    Returns:
        FLOPs of "patches", "blocks" (linear layers of the student), "attention" (its q k^T and p v), "heads" (its MLPs
        and its prototypes), "teacher", "koleo" (its neighbours; of several parts also the student's first look at them)
        and "total".
        Backward of attention is 2.5 times its forward: the fused kernels make the scores again; 2 for "reference".
        The "chunked" loss makes the scores twice (4 products), "triton" three times (5); "reference" has 3.
    """
    d, kept, (first, last) = s.width, s.kept(n_images), s.feed_forward
    rows = sum(crops * n for crops, n in kept)
    block, embed = 2 * d * (4 * d + first + last), 2 * d * s.channels * s.patch_size**2  # for each token and patch
    patches = sum(crops * (n - 1 - s.registers) for crops, n in s.groups(n_images))
    views = sum(crops for crops, _ in s.groups(n_images))
    dino, ibot = s.heads_of()
    products = {"reference": 3, "chunked": 4, "triton": 5}[s.prototypes]
    global_crops = s.groups(n_images)[:1]
    teacher = _look_flops(s, global_crops, global_crops)
    teacher += _head_flops(dino, d, global_crops[0][0], 1, 1) + _head_flops(ibot, d, n_masked, 1, 1)
    found = {
        "patches": 2 * patches * embed,  # pictures have no gradient
        "blocks": (3 + s.recompute) * s.depth * rows * block,
        "attention": ((3 if s.attention == "reference" else 3.5) + s.recompute) * s.depth * 4 * d
        * sum(c * n**2 for c, n in kept),
        "heads": _head_flops(dino, d, views, 3, products) + _head_flops(ibot, d, n_masked, 3, products),
        "teacher": teacher,
        "koleo": s.koleo_views * 2 * (n_parts * n_images) ** 2 * d,
    }
    if n_parts > 1 and s.koleo_views:
        first = slice(None if s.drop_rate else 1)  # where crops are dropped the local ones come along
        found["koleo"] += _look_flops(s, s.groups(n_images)[first], kept[first])
    return found | {"total": sum(found.values())}


def _look_flops(s: Sizes, groups: Groups, kept: Groups) -> float:
    """Of a backbone's forward pass over groups of (crops, tokens), with those that residuals are computed for."""
    d, (first, last) = s.width, s.feed_forward
    patches = sum(crops * (n - 1 - s.registers) for crops, n in groups)
    blocks = sum(crops * (n * 2 * d * (4 * d + first + last) + 4 * d * n**2) for crops, n in kept)
    return patches * 2 * d * s.channels * s.patch_size**2 + s.depth * blocks


def _head_flops(h: HeadSizes, width: int, rows: float, mlp: int, products: int) -> float:
    layers = sum(a * b for a, b in h.layers(width))
    return 2 * rows * (mlp * layers + products * h.bottleneck_dim * h.n_prototypes)


# ---------------------------------------------------------------- time


def training_seconds(flops: float, tflops: float, gpus: int = 1, utilisation: float = UTILISATION) -> float:
    """How long so much arithmetic takes: flops / (gpus * peak rate * utilisation).

    Args:
        flops: of the whole run.
        tflops: peak rate of one device, 10^12 a second.
        utilisation: share of it that training reaches, an assumption; above 0, at most 1.
    """
    if not 0 < utilisation <= 1 or tflops <= 0 or gpus < 1:
        raise ValueError("expected utilisation in (0, 1], a rate above 0 and 1 or more devices, got "
                         f"{utilisation}, {tflops}, {gpus}")  # fmt: skip
    return flops / (gpus * tflops * 1e12 * utilisation)


def energy(device_hours: float, watts: float) -> tuple[float, float]:
    """What so much work takes out of the socket, and what that leaves in the air.

    Args:
        device_hours: of all devices together.
        watts: of one device, running at its largest power all the time.
    Returns:
        kWh, and kg CO2 equivalent at the average of the United States.
    Source: DINOv2 paper, on its carbon footprint; official MODEL_CARD.md (81b2b64), whose hours give its 7 t so.
    """
    kwh = device_hours * watts * PUE / 1000
    return kwh, kwh * CARBON


def matrix_tflops(dtype: torch.dtype = torch.float32, seconds: float = 0.2) -> float:
    """Measure the rate of this machine's processor: its fastest product of two square matrices, 10^12 a second.

    The fastest of many and of three sizes, since short ones are hardly disturbed by what else runs, and long ones use
    all cores.

    Args:
        seconds: for each size.
    """
    return max(2 * side**3 / _fastest_product(side, dtype, seconds) / 1e12 for side in (256, 512, 1024))


def _fastest_product(side: int, dtype: torch.dtype, seconds: float) -> float:
    a, b = torch.ones(side, side, dtype=dtype), torch.ones(side, side, dtype=dtype)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or best == math.inf:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return best


# ---------------------------------------------------------------- power laws


class PowerLaw(NamedTuple):
    """loss = a * compute ** -b + c"""

    a: float
    b: float
    c: float
    error: float  # root mean square of ln(loss) - ln(fit), at the points that were fitted

    def predict(self, compute: float | np.ndarray) -> float | np.ndarray:
        """The loss at another compute."""
        return self.a * np.asarray(compute, float) ** -self.b + self.c


def fit_power_law(compute: Sequence[float], loss: Sequence[float], floor: bool = False) -> PowerLaw:
    """Find the power law through points; keep the last point out, and predict it, to see what the law is worth.

        ln(loss - c) = ln a - b ln compute        least squares; c is searched from 0 to just under the smallest loss

    Args:
        compute: above 0, of any unit; two different values at least, three with a floor.
        loss: above 0; each must be a finite number.
        floor: look for c, which the loss tends to; else c = 0.
    Returns:
        The law, with the smallest error in ln(loss).
    Source: Kaplan et al. 2020 (scaling laws, arXiv 2001.08361), section 1.2; Hoffmann et al. 2022 for the floor.
    """
    x, y = np.asarray(compute, float), np.asarray(loss, float)
    if x.shape != y.shape or x.ndim != 1 or len(np.unique(x)) < 2 + floor:
        raise ValueError(f"expected a loss for each of {2 + floor} or more different computes, got {len(y)} for {x}")
    if not (np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)).all():
        raise ValueError(f"expected finite compute and loss above 0, got {x} and {y}")
    if not floor:
        return _law(x, y, 0.0)
    low, high = 0.0, float(y.min()) * (1 - 1e-9)
    for _ in range(12):  # each turn looks at an interval a tenth as long
        floors = np.linspace(low, high, 41)
        best = int(np.argmin([_law(x, y, c).error for c in floors]))
        low, high = floors[max(best - 2, 0)], floors[min(best + 2, 40)]
    return _law(x, y, float(floors[best]))


def _law(x: np.ndarray, y: np.ndarray, c: float) -> PowerLaw:
    slope, intercept = np.polyfit(np.log(x), np.log(y - c), 1)
    law = PowerLaw(float(np.exp(intercept)), float(-slope), c, 0.0)
    return law._replace(error=float(np.sqrt(np.mean((np.log(y) - np.log(law.predict(x))) ** 2))))
