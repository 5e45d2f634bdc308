"""Every setting of a run, in one place, with its unit or its source.

One frozen keyword-only dataclass per stage, composed in RunConfig. Derived values are properties; nothing is rewritten
later. `preset(name)` gives a config, `override(config, ["vit.depth=4"])` changes it by text, `difference(a, b)` is the
honest table between two of them. Numbers marked [released] are those of the official configs and code (b8931f7).
"""

import ast
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal, get_type_hints

from minidino.ranges import (
    AboveZero,
    AtLeastZero,
    Count,
    Positive,
    Range,
    Share,
    Side,
    Stage,
    convert,
    require,
    words_of,
)

Fidelity = Literal["released", "paper"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Stage, name="data"):
    """Which pictures a run learns from, and which judge it."""

    source: str = "scenes"  # "scenes" (drawn), a path, or a torchvision name such as "cifar10"
    n_scenes: Positive = 8000  # drawn scenes in the training set; ignored for photographs
    n_test_scenes: Positive = 2000  # drawn scenes to judge with, from another world
    scene_seed: Annotated[int, Range(0, 2**62)] = 1  # the world from which they are drawn
    short_side: Annotated[int, Range(8, unit="px")] = 64  # of images as they are stored; drawn scenes are squares of it
    pool: str = ""  # a path such as manifest.csv: learn from these images and judge with those of the source
    channels: Positive = 3  # of a picture: 1 for grey ones, other numbers for arrays of numpy; see `images.decode`

    def __post_init__(self):
        super().__post_init__()
        require(self.channels == 3 or self.source != "scenes", "data.channels", "3 for drawn scenes", self.channels)


@dataclass(frozen=True, kw_only=True)
class CropConfig(Stage, name="crops"):
    """How views are cut of an image, and what is done to their colours."""

    n_local: Count = 8  # small crops of each image [released]
    global_size: Side = 224  # px [released]
    local_size: Side = 96  # px; 98 with patches of 14 px [released]
    global_scale: tuple[float, float] = (0.32, 1.0)  # share of the image's area [released]
    local_scale: tuple[float, float] = (0.05, 0.32)  # [released]
    jitter_probability: Share = 0.8  # [released]
    brightness: AtLeastZero = 0.4  # [released]
    contrast: AtLeastZero = 0.4  # [released]
    saturation: AtLeastZero = 0.2  # [released]
    hue: Annotated[float, Range(0, 0.5, unit="turns")] = 0.1  # turns; 0.5 is the full circle [released]
    grayscale_probability: Share = 0.2  # [released]
    solarize_probability: Share = 0.2  # second global crop only [released]
    # chance of blur: `released` 0 / 0.9 / 0.5 (the official code swaps p and 1 - p), `paper` 1 / 0.1 / 0.5
    blur: Literal["released", "paper", "none"] = "released"

    def __post_init__(self):
        super().__post_init__()
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            require(0 < low <= high <= 1, f"crops.{name}", "0 < low <= high <= 1", (low, high))


@dataclass(frozen=True, kw_only=True)
class MaskConfig(Stage, name="masks"):
    """Which patches of a global crop are hidden from the student."""

    probability: Share = 0.5  # share of the global crops that get holes [released]
    ratio: tuple[float, float] = (0.1, 0.5)  # share of a crop's patches that are hidden [released]
    # largest block: `released` is 0.5 * side // patch * side // patch (666 at 518 px), `fixed` half the grid (684)
    max_patches: Literal["released", "fixed"] = "fixed"

    def __post_init__(self):
        super().__post_init__()
        low, high = self.ratio
        require(0 <= low <= high < 1, "masks.ratio", "0 <= low <= high < 1", self.ratio)


@dataclass(frozen=True, kw_only=True)
class VitConfig(Stage, name="vit"):
    """The backbone."""

    name: str = "vit_small"  # vit_tiny, vit_small, vit_base, vit_large, vit_giant2
    width: Positive | None = None  # D; None: the published one of that name
    depth: Positive | None = None  # blocks
    heads: Positive | None = None
    patch_size: Side = 16  # px
    num_register_tokens: Count = 0
    ffn: Literal["mlp", "swiglu"] | None = None  # None: the published choice
    layerscale: AtLeastZero = 1e-5  # start value of gamma [released]; 0: none
    drop_path_rate: Annotated[float, Range(0, 0.99)] = 0.3  # the same in every block [released]
    drop_path: Literal["subset", "scale"] = "subset"  # compute only the kept rows, or scale residuals
    interpolate_offset: Annotated[float, Range(0, 0.99)] = 0.1  # [released]; 0.0 with registers
    interpolate_antialias: bool = False  # [released]; True with registers
    init_std: AtLeastZero = 0.02  # of linear weights at the start [released]; a narrow net wants more
    attention: Literal["auto", "reference", "sdpa", "triton"] = "auto"
    recompute: bool = False  # keep the input of each block alone, and compute the block again in the backward pass


@dataclass(frozen=True, kw_only=True)
class HeadConfig(Stage, name="heads"):
    """What stands between tokens and prototypes."""

    tied: bool = True  # one head for class and patch tokens; vitl14 and vitg14 untie them [released]
    n_prototypes: Annotated[int, Range(2)] = 65536  # K [released]
    ibot_n_prototypes: Annotated[int, Range(2)] | None = None  # None: as n_prototypes; untied heads only
    hidden_dim: Positive = 2048  # [released]
    bottleneck_dim: Positive = 256  # [released]
    ibot_bottleneck_dim: Positive | None = None  # None: as bottleneck_dim; untied heads only
    n_layers: Positive = 3  # [released]
    weight_norm: bool = True  # [released]
    weight_g: Fidelity = "released"  # `released`: the prototypes' lengths train and decay; `paper`: fixed at 1 (DINO)
    mlp_gain: AboveZero | None = None  # None: truncated normal 0.02 [released]; else Xavier normal with this gain
    prototype_std: AboveZero | None = None  # None: torch's default [released]; large: prototypes hardly turn


@dataclass(frozen=True, kw_only=True)
class LossConfig(Stage, name="loss"):
    """What is minimised, and how the targets are made."""

    dino: AtLeastZero = 1.0  # weight [released]
    ibot: AtLeastZero = 1.0  # weight [released]
    koleo: AtLeastZero = 0.1  # weight, each global view [released]
    ibot_start_frac: Share = 0.0  # iBOT enters at this fraction of the run ...
    ibot_full_frac: Share = 0.0  # ... and rises linearly to its weight until this one
    targets: Literal["sinkhorn", "centering"] = "sinkhorn"  # what turns teacher logits into targets
    prototypes: Literal["auto", "reference", "chunked", "triton"] = "auto"  # who computes the losses over prototypes
    student_temp: AboveZero = 0.1  # [released]
    koleo_views: Fidelity = "released"  # `released`: both global crops; `paper`: the first only
    ibot_divisor: Fidelity = "released"  # `released`: all global crops; `paper`: masked crops only (twice the weight)
    dino_divisor: Literal["released", "fixed"] = "fixed"  # without local crops the official code divides by 3, not 2


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Stage, name="teacher"):
    """How slowly the teacher follows, and how sharp it is."""

    momentum: Share = 0.992  # EMA at the start, cosine to final_momentum [released]
    final_momentum: Share = 1.0  # [released]
    temp: AboveZero = 0.07  # after warm-up [released]
    warmup_temp: AboveZero = 0.04  # [released]
    warmup_frac: Share = 0.3  # of the run [released]
    patch_temp: AboveZero | None = None  # None: as temp; a fixed temperature for patch targets otherwise


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Stage, name="optim"):
    """How large a batch, how long a step."""

    batch_size: Annotated[int, Range(2, unit="(KoLeo needs a neighbour)")] = 2048  # images per update [released]
    accumulate: Positive = 1  # the batch is computed in this many parts
    base_lr: AboveZero = 4e-3  # at batch 1024; AdamW [released]
    final_lr: AtLeastZero = 1e-6  # the cosine ends here, not above the rate it comes from [released]
    warmup_frac: Share = 0.1  # of the run [released]
    warmup_start: Literal["released", "fixed"] = "released"  # `released`: lr 0 at step 0; `fixed`: lr / warm-up steps
    beta2: Share = 0.999  # beta1 is 0.9 [released]
    weight_decay: AtLeastZero = 0.04  # cosine to final_weight_decay [released]
    final_weight_decay: AtLeastZero = 0.4  # [released]
    decay_tokens: bool = True  # weight decay on class, mask, register tokens and positions [released]
    layerwise_decay: AtLeastZero = 0.9  # [released]
    patch_embed_lr_mult: AtLeastZero = 0.2  # [released]
    clip: Annotated[float, Range(0, open=True, endless=True)] = 3.0  # largest gradient norm [released]; inf: any
    clip_scope: Literal["module", "global"] = "module"  # `module`: backbone and heads each for itself [released]
    freeze_last_layer_frac: Share = 0.01  # of the run: the prototypes stand still [released]
    freeze_backbone_frac: Share = 0.0  # of the run: heads alone learn, for a backbone that was trained elsewhere

    @property
    def lr(self) -> float:
        """base_lr * sqrt(batch_size / 1024), the released scaling rule."""
        return self.base_lr * (self.batch_size / 1024) ** 0.5

    def __post_init__(self):
        super().__post_init__()
        good = self.batch_size % self.accumulate == 0
        require(good, "optim.accumulate", f"a divisor of batch_size {self.batch_size}", self.accumulate)
        falls, most = self.final_lr <= self.lr, f"at most {self.lr:.3g}, the rate by base_lr and batch_size"
        require(falls, "optim.final_lr", most, self.final_lr)


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Stage, name="distill"):
    """Who teaches, where it is not the average of the student."""

    teacher: str = ""  # a frozen network that teaches: a finished run, or weights; "": the student's own average
    targets: Literal["heads", "features"] = "heads"  # the paper's losses, or the tokens of a teacher without heads
    teacher_width: Count = 0  # D of that teacher's tokens
    prototypes: Literal["teacher", "fresh"] = "teacher"  # which ones the student's heads begin with

    def __post_init__(self):
        super().__post_init__()
        taught = self.teacher != "" or self.targets == "heads"
        require(taught, "distill.targets", "'heads' without a teacher", self.targets)


@dataclass(frozen=True, kw_only=True)
class RunSettings(Stage, name="run"):
    """How long, on what, and how often it is saved and told."""

    steps: Positive = 125_000  # optimizer updates
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    device: str = "auto"  # auto: cuda, then mps, then cpu
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where it is native; losses are fp32
    parallel: Literal["ddp", "fsdp"] = "ddp"  # with torchrun: each process has all weights, or its share of each
    checkpoint_every: Positive = 1000  # steps
    keep_checkpoints: Positive = 2
    log_every: Positive = 10  # steps between lines of metrics.jsonl
    knn_every: Positive = 1000  # steps between online k-NN readings
    workers: Count = 0  # processes that decode and crop; 0: in line


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run: its stages, and the preset that it began from."""

    preset: str = "vits16-in1k"
    data: DataConfig = field(default_factory=DataConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    vit: VitConfig = field(default_factory=VitConfig)
    heads: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self):
        patch, colours = self.vit.patch_size, self.data.channels == 3
        for name, side in (("global_size", self.crops.global_size), ("local_size", self.crops.local_size)):
            require(side % patch == 0, f"crops.{name}", f"a multiple of vit.patch_size {patch} px", f"{side} px")
        for name in ("saturation", "hue", "grayscale_probability"):
            value = getattr(self.crops, name)
            require(colours or value == 0, f"crops.{name}", "0 where data.channels is not 3", value)


def _scenes_cpu() -> RunConfig:
    """Drawn scenes in a few minutes on two cores. Chosen by benchmarks/recipe.py; the README says why."""
    return RunConfig(
        preset="scenes-cpu",
        crops=CropConfig(n_local=2, global_size=48, local_size=24, global_scale=(0.4, 1.0), local_scale=(0.08, 0.4),
                         brightness=0.2, contrast=0.2, hue=0.5, grayscale_probability=0.0, solarize_probability=0.0,
                         blur="none"),
        vit=VitConfig(name="vit_tiny", width=64, depth=4, heads=2, patch_size=8, layerscale=1.0, init_std=0.08,
                      drop_path_rate=0.0),
        heads=HeadConfig(tied=False, n_prototypes=256, hidden_dim=256, bottleneck_dim=32, mlp_gain=1.4,
                         prototype_std=1.0, weight_g="paper"),
        loss=LossConfig(ibot=0.3, ibot_start_frac=0.4, ibot_full_frac=0.7, ibot_divisor="paper"),
        teacher=TeacherConfig(momentum=0.6, temp=0.015, warmup_temp=0.015, warmup_frac=0.0, patch_temp=0.04),
        optim=OptimConfig(batch_size=64, base_lr=8e-3, final_lr=2e-5, warmup_frac=0.03, warmup_start="fixed",
                          final_weight_decay=0.04, layerwise_decay=1.0, patch_embed_lr_mult=1.0,
                          freeze_last_layer_frac=0.0),
        run=RunSettings(steps=1500, checkpoint_every=200, knn_every=200),
    )  # fmt: skip


def _imagenette_cpu() -> RunConfig:
    """Photographs in an hour on two cores, the last third by `adapt` at 64 px: small crops teach more in their time."""
    small = _scenes_cpu()
    return replace(
        small, preset="imagenette-cpu", data=DataConfig(source="imagenette"),
        crops=replace(small.crops, global_size=32, local_size=16, global_scale=(0.32, 1.0), brightness=0.4,
                      contrast=0.4, saturation=0.4, hue=0.1, grayscale_probability=0.2, solarize_probability=0.2),
        vit=replace(small.vit, width=96, heads=3, init_std=0.05), teacher=replace(small.teacher, momentum=0.9),
        run=replace(small.run, steps=12_000, checkpoint_every=1000, knn_every=500),
    )  # fmt: skip


def _imagenette_gpu() -> RunConfig:
    """Photographs on one GPU, not yet measured: ViT-S/16 with the published crops and a head that fits 9,469 images."""
    return RunConfig(
        preset="imagenette-gpu", data=DataConfig(source="imagenette", short_side=256),
        heads=HeadConfig(tied=False, n_prototypes=4096), vit=VitConfig(layerscale=1e-5, drop_path_rate=0.1),
        optim=OptimConfig(batch_size=256, layerwise_decay=1.0, final_weight_decay=0.2),
        run=RunSettings(steps=15_000, workers=8),
    )  # fmt: skip


def _imagenet100_gpu() -> RunConfig:  # ImageNet-100 (127k images in folders) on one GPU, not yet measured
    small = _imagenette_gpu()
    return replace(
        small, preset="imagenet100-gpu", data=DataConfig(source="imagenet100", short_side=256),
        heads=HeadConfig(tied=False, n_prototypes=16384), optim=replace(small.optim, batch_size=512),
        run=replace(small.run, steps=50_000),
    )  # fmt: skip


def _vits16_in1k() -> RunConfig:  # the short published recipe with a ViT-S/16 in place of the ViT-L/16
    return RunConfig(preset="vits16-in1k", data=DataConfig(source="imagenet1k", short_side=256))


def _vitl16_short() -> RunConfig:
    """configs/train/vitl16_short.yaml: ImageNet-1k, 125k steps of 2,048 images, centring, tied heads [released]."""
    return RunConfig(
        preset="vitl16-short", data=DataConfig(source="imagenet1k", short_side=256),
        vit=VitConfig(name="vit_large"), masks=MaskConfig(max_patches="released"),
        loss=LossConfig(targets="centering", dino_divisor="released"), run=RunSettings(precision="fp16"),
    )  # fmt: skip


def _vitl14_lvd() -> RunConfig:
    """configs/train/vitl14.yaml: 625k steps of 3,072 images, Sinkhorn, untied heads of 131,072 [released]."""
    short = _vitl16_short()
    return replace(
        short, preset="vitl14-lvd", data=DataConfig(source="lvd142m", short_side=256), crops=CropConfig(local_size=98),
        vit=VitConfig(name="vit_large", patch_size=14, ffn="swiglu", drop_path_rate=0.4),
        heads=HeadConfig(tied=False, n_prototypes=131_072, bottleneck_dim=384, ibot_bottleneck_dim=256),
        loss=LossConfig(dino_divisor="released"), teacher=TeacherConfig(momentum=0.994, warmup_frac=0.06),
        optim=OptimConfig(batch_size=3072, base_lr=2e-4, warmup_frac=0.16, final_weight_decay=0.2,
                          layerwise_decay=1.0, freeze_last_layer_frac=0.002),
        run=RunSettings(steps=625_000, precision="fp16"),
    )  # fmt: skip


PRESETS = {
    "scenes-cpu": _scenes_cpu,
    "imagenette-cpu": _imagenette_cpu,
    "imagenette-gpu": _imagenette_gpu,
    "imagenet100-gpu": _imagenet100_gpu,
    "vits16-in1k": _vits16_in1k,
    "vitl16-short": _vitl16_short,
    "vitl14-lvd": _vitl14_lvd,
}


def preset(name: str) -> RunConfig:
    """The named config. Raises ValueError with the list of names."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]()


def flatten(config: RunConfig) -> dict[str, Any]:
    """{"vit.depth": 4, ...}: one entry a field."""
    flat = {}
    for name, value in asdict(config).items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def difference(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """{field: (value in a, value in b)} for every field that differs, in the order of the config."""
    left, right = flatten(a), flatten(b)
    return {key: (left[key], right[key]) for key in left if left[key] != right[key]}


def override(config: RunConfig, changes: str | list[str]) -> RunConfig:
    """A config changed by a text or texts such as "vit.depth=4", "crops.global_scale=(0.3, 1)", "vit.ffn=swiglu".

    Raises:
        ValueError: not key=value, an unknown key (the fields that exist are listed), a wrong type or impossible value.
    """
    stages: dict[str, dict[str, Any]] = {}
    for change in [changes] if isinstance(changes, str) else changes:
        key, equals, text = change.partition("=")
        stage, _, name = key.strip().partition(".")
        known = flatten(config)
        if not equals or key.strip() not in known or not name:
            dotted = [k for k in known if "." in k]
            near = [k for k in dotted if k.startswith(f"{stage}.")] or dotted
            raise ValueError(f"expected key=value, got {change!r}; keys are {', '.join(near)}")
        wanted = get_type_hints(type(getattr(config, stage)))[name]
        stages.setdefault(stage, {})[name] = _parse(key.strip(), text.strip(), wanted)
    # stages are replaced together: two changes may be possible only with each other
    new = {stage: replace(getattr(config, stage), **changed) for stage, changed in stages.items()}
    return replace(config, **new)


def _parse(key: str, text: str, wanted: Any) -> Any:
    try:
        value = text if wanted is str else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None, "inf": math.inf}.get(text.lower(), text)
    converted, good = convert(value, wanted)
    if not good:
        raise ValueError(f"{key}: expected {words_of(wanted)}, got {text!r}")
    return converted


def to_json(config: RunConfig) -> str:
    """The text of a run folder's config.json."""
    return json.dumps(asdict(config), indent=1)


def from_json(text: str) -> RunConfig:
    """The config of a run folder.

    Raises:
        ValueError: not JSON, fields that this version does not know, or values that it cannot take.
    """
    raw, default = json.loads(text), RunConfig()
    require(isinstance(raw, dict), "config", "a dictionary of stages", raw)
    stages: dict[str, Any] = {}
    if unknown := set(raw) - {f.name for f in fields(default)}:
        raise ValueError(f"config has unknown stages {sorted(unknown)}")
    for name, value in raw.items():
        if name == "preset":
            stages[name] = value
            continue
        require(isinstance(value, dict), f"config stage {name!r}", "a dictionary of fields", value)
        stage = type(getattr(default, name))
        known = get_type_hints(stage)
        if unknown := set(value) - set(known):
            raise ValueError(f"config stage {name!r} has unknown fields {sorted(unknown)}; known: {sorted(known)}")
        for key, given in value.items():
            value[key], good = convert(given, known[key])
            require(good, f"{name}.{key}", words_of(known[key]), repr(value[key]))
        stages[name] = stage(**value)
    return RunConfig(**stages)
