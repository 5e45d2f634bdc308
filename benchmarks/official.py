"""Does training here compute what the released code computes? Both learn side by side, from the same weights and batches.

    python benchmarks/official.py run CHECKOUT         data/results/official-step.json; wants omegaconf
    python benchmarks/official.py switches CHECKOUT    data/results/official-switches.json: would a difference be seen?
    python benchmarks/official.py draw                 the tables of these, of official_data.py and of official_probes.py

CHECKOUT is a clone of facebookresearch/dinov2. Its own augmentations and masks make the batches, its own schedules and
optimizer move the weights, all in float32. Each row also has a second run of the released code whose first weights differ
in the last bit: how far apart two runs get by rounding alone.
"""

import argparse
import json
import random
import re
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from recipe import RESULTS, made_on, put, store
from released import borrow
from torch import Tensor, nn
from tqdm import tqdm

from minidino.config import RunConfig, override, preset
from minidino.images.batches import Batch, collate
from minidino.images.crops import crop_seed
from minidino.images.scenes import draw_scenes
from minidino.learning.train import DROPS, start, train

SMALL = {  # what is changed in both, so that a step takes a second on a CPU: (there, here)
    "student.arch": ("vit_small", "vit.name"),
    "train.batch_size_per_gpu": (8, "optim.batch_size"),
    "dino.head_n_prototypes": (512, "heads.n_prototypes"),
    "dino.head_hidden_dim": (256, "heads.hidden_dim"),
    "dino.head_bottleneck_dim": (64, "heads.bottleneck_dim"),
    "optim.base_lr": (0.01, "optim.base_lr"),
    "compute_precision.grad_scaler": (False, None),
    "train.OFFICIAL_EPOCH_LENGTH": (1, None),
}
UNTIED = {
    "ibot.head_n_prototypes": (384, "heads.ibot_n_prototypes"),
    "ibot.head_hidden_dim": (256, None),
    "ibot.head_bottleneck_dim": (32, "heads.ibot_bottleneck_dim"),
}
SHORT = {"crops.global_crops_size": (64, "crops.global_size"), "crops.local_crops_size": (32, "crops.local_size")}
LONG = {"crops.global_crops_size": (56, "crops.global_size"), "crops.local_crops_size": (28, "crops.local_size")}
REGISTERS = {
    "student.drop_path_rate": (0.0, "vit.drop_path_rate"),
    "student.num_register_tokens": (4, "vit.num_register_tokens"),
    "student.interpolate_antialias": (True, "vit.interpolate_antialias"),
    "student.interpolate_offset": (0.0, "vit.interpolate_offset"),
}


class Case(NamedTuple):
    released: str  # config
    preset: str  # ours of it
    changes: dict[str, tuple[Any, str | None]]  # in both
    read: tuple[int, ...] = (1, 10, 100)  # after how many steps the two are compared
    as_published: bool = False  # the first weights; else they are random in every tensor


CASES = {
    "vitl16_short: tied head, centring": Case("vitl16_short", "vitl16-short", SHORT),
    "vitl14: untied heads, Sinkhorn, SwiGLU": Case("vitl14", "vitl14-lvd", UNTIED | LONG),
    "vitl14, 4 registers, no drop path": Case("vitl14", "vitl14-lvd", UNTIED | LONG | REGISTERS),
    "vitl16_short, first weights as published": Case("vitl16_short", "vitl16-short", SHORT, (1,), as_published=True),
}
FIRST = next(iter(CASES))
SWITCHES = (  # of ours alone, each set to another value, in the FIRST case
    "loss.koleo_views=paper", "loss.ibot_divisor=paper", "loss.targets=sinkhorn", "loss.student_temp=0.11",
    "heads.weight_g=paper", "vit.drop_path=scale", "vit.interpolate_offset=0.0", "optim.clip=2.9", "optim.clip_scope=global",
    "optim.warmup_start=fixed", "optim.layerwise_decay=1.0", "optim.patch_embed_lr_mult=1.0", "optim.decay_tokens=false",
    "optim.final_weight_decay=0.04", "teacher.momentum=0.99",
)  # fmt: skip
SWITCHED = 10  # steps
NEAR = 1e-4  # relative: of losses and of each gradient after one step


# ---------------------------------------------------------------- the released code, without what it wants


class BlockDiagonalMask:
    """Of xFormers: which rows of a packed (1, T, ...) belong together."""

    def __init__(self, seqlens: list[int], batch_sizes: list[int] | None = None):
        self.seqlens, self._batch_sizes = seqlens, batch_sizes or [1] * len(seqlens)

    @classmethod
    def from_seqlens(cls, seqlens: list[int]) -> "BlockDiagonalMask":
        return cls(seqlens)

    @classmethod
    def from_tensor_list(cls, tensors: list[Tensor]) -> tuple["BlockDiagonalMask", Tensor]:
        sizes = [len(x) for x in tensors]
        mask = cls([x.shape[1] for x in tensors for _ in range(len(x))], sizes)
        return mask, torch.cat([x.reshape(1, -1, *x.shape[2:]) for x in tensors], dim=1)

    def split(self, packed: Tensor) -> list[Tensor]:
        ends = np.cumsum([0, *self._batch_sizes])
        rows = [sum(self.seqlens[low:high]) for low, high in zip(ends, ends[1:])]
        parts = packed.split(rows, dim=1)
        return [part.reshape(size, -1, *packed.shape[2:]) for size, part in zip(self._batch_sizes, parts)]


def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: BlockDiagonalMask | None = None) -> Tensor:
    """Of xFormers, (B, N, h, d): softmax(q k / sqrt(d)) v inside of each block, written out."""
    if attn_bias is None:
        scores = torch.einsum("bihd,bjhd->bhij", q * q.shape[-1] ** -0.5, k)
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    blocks = zip(*(x.split(attn_bias.seqlens, dim=1) for x in (q, k, v)))
    return torch.cat([memory_efficient_attention(*block) for block in blocks], dim=1)


def scaled_index_add(x: Tensor, index: Tensor, source: Tensor, scaling: Tensor, alpha: float) -> Tensor:
    return x.index_add(0, index, scaling * source, alpha=alpha)


def index_select_cat(sources: list[Tensor], indices: list[Tensor]) -> Tensor:
    return torch.cat([source[index].flatten() for source, index in zip(sources, indices)])


STAND_INS = {
    "xformers.ops": {
        "fmha": SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask), "unbind": torch.unbind,
        "memory_efficient_attention": memory_efficient_attention, "scaled_index_add": scaled_index_add,
        "index_select_cat": index_select_cat,
    }
}  # fmt: skip


def modules(checkout: Path) -> SimpleNamespace:
    """What of the released code is asked, without FSDP."""
    commit = borrow(checkout, STAND_INS)
    there = SimpleNamespace(arch=import_module("dinov2.train.ssl_meta_arch"), train=import_module("dinov2.train.train"),
                            config=import_module("dinov2.utils.config"), data=import_module("dinov2.data"),
                            checkout=checkout, commit=commit)  # fmt: skip
    there.arch.get_fsdp_modules = lambda module: [SimpleNamespace(params=list(module.parameters()))]
    there.arch.reshard_fsdp_model = lambda module: None
    return there


class Released:
    """The released training, one step at a time, as its do_train takes them."""

    def __init__(self, there: SimpleNamespace, cfg: Any, weights: dict[str, Tensor]):
        self.there = there
        self.model = there.arch.SSLMetaArch(cfg)
        self.model.need_to_synchronize_fsdp_streams = False
        for network in (self.model.student, self.model.teacher):
            network.load_state_dict({chunked(name, cfg): value for name, value in weights.items()})
        for part in self.model.student.values():
            part.clip_grad_norm_ = partial(nn.utils.clip_grad_norm_, list(part.parameters()))
        self.model.train()
        self.clip = cfg.optim.clip_grad
        self.optimizer = there.train.build_optimizer(cfg, self.model.get_params_groups())
        self.schedules = there.train.build_schedulers(cfg)

    def step(self, i: int, collated: dict[str, Any], config: RunConfig) -> dict[str, float]:
        torch.manual_seed(crop_seed(config.run.seed, i, DROPS))  # what a step here drops, it drops there
        lr, wd, momentum, temperature, last_layer_lr = (schedule[i] for schedule in self.schedules)
        self.there.train.apply_optim_scheduler(self.optimizer, lr, wd, last_layer_lr)
        self.optimizer.zero_grad(set_to_none=True)
        told = self.model.forward_backward(dict(collated), teacher_temp=temperature)
        for part in self.model.student.values():
            part.clip_grad_norm_(self.clip)
        self.optimizer.step()
        self.model.update_teacher(momentum)
        return {"dino": (told["dino_local_crops_loss"] + told["dino_global_crops_loss"]).item(),
                "koleo": 2 * told["koleo_loss"].item(), "ibot": 2 * told["ibot_loss"].item()}  # fmt: skip


def chunked(name: str, cfg: Any) -> str:
    """The released name of a parameter: blocks are in chunks, in which they keep their number."""
    chunks = cfg.student.block_chunks
    return re.sub(r"blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // (12 // chunks)}.{m[1]}.", name) if chunks else name


# ---------------------------------------------------------------- the same in both


def configs(there: SimpleNamespace, case: Case) -> tuple[Any, RunConfig]:
    """The config of a case, there and here."""
    changes = SMALL | case.changes
    args = SimpleNamespace(config_file=there.checkout / f"dinov2/configs/train/{case.released}.yaml", output_dir="",
                           opts=[f"{name}={value}" for name, (value, _) in changes.items()])  # fmt: skip
    cfg = there.config.apply_scaling_rules_to_cfg(there.config.get_cfg_from_args(args))
    ours = [f"{name}={value}" for value, name in changes.values() if name]
    run = [f"run.steps={cfg.optim.epochs}", "run.precision=fp32", "run.log_every=1"]  # an epoch is one step
    return cfg, override(preset(case.preset), [*ours, *run])


def collated_batches(there: SimpleNamespace, cfg: Any, steps: int) -> list[dict[str, Any]]:
    """Batches of drawn scenes, made by the released augmentations, masks and collate function."""
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    n, c = cfg.train.batch_size_per_gpu, cfg.crops
    side = c.global_crops_size // cfg.student.patch_size
    augment = there.data.DataAugmentationDINO(tuple(c.global_crops_scale), tuple(c.local_crops_scale), c.local_crops_number,
                                              c.global_crops_size, c.local_crops_size)  # fmt: skip
    masks = there.data.MaskingGenerator((side, side), max_num_patches=side * side // 2)
    pictures = [Image.fromarray(image) for image in draw_scenes(n * steps).images]
    return [
        there.data.collate_data_and_cast(
            [(augment(picture), ()) for picture in pictures[n * i : n * (i + 1)]], tuple(cfg.ibot.mask_ratio_min_max),
            cfg.ibot.mask_sample_probability, torch.float32, side * side, masks,
        )
        for i in tqdm(range(steps), desc="batches")
    ]  # fmt: skip


def as_batch(batch: dict[str, Any]) -> Batch:
    """A released batch in the order of minidino: view by view, as there."""
    n = len(batch["collated_global_crops"]) // 2
    crops = [batch[f"collated_{name}_crops"].unflatten(0, (-1, n)) for name in ("global", "local")]
    return collate(*crops, batch["collated_masks"].unflatten(0, (2, n)), torch.arange(n))


def first_weights(config: RunConfig, as_published: bool) -> dict[str, Tensor]:
    """Random in every tensor, if not as published: there zeros would hide a bias that is forgotten, and LayerScale
    leaves pictures so alike that rounding alone decides which are neighbours for KoLeo."""
    g = torch.Generator().manual_seed(1)
    weights = {name: p.detach() for name, p in start(config, torch.device("cpu")).student.named_parameters()}
    if as_published:
        return weights
    return {name: torch.rand(p.shape, generator=g) if "gamma" in name else p + 0.02 * torch.randn(p.shape, generator=g)
            for name, p in weights.items()}  # fmt: skip


# ---------------------------------------------------------------- how far they are apart


class Reading(NamedTuple):
    """Of one training, tensors in the order of our names."""

    losses: dict[str, float]
    gradients: list[Tensor]  # of the student, clipped
    student: list[Tensor]
    teacher: list[Tensor]


def read(losses: dict[str, float], training: Any, names: list[str]) -> Reading:
    student, teacher = (dict(network.named_parameters()) for network in (training.student, training.teacher))
    grads = [torch.zeros_like(student[n]) if student[n].grad is None else student[n].grad for n in names]  # held fixed: none
    taken = [grads, [student[n] for n in names], [teacher[n] for n in names]]
    return Reading(losses, *([x.detach().double() for x in tensors] for tensors in taken))


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """Length of the difference of all tensors, over the length of those in b."""
    return float(sum((x - y).square().sum() for x, y in zip(a, b)) / sum(y.square().sum() for y in b)) ** 0.5


def distances(a: Reading, b: Reading, first: list[Tensor]) -> dict[str, float | None]:
    """How far training a is from training b, relative: the worst of losses and of gradients, and all that was learned."""

    def learned(network: str) -> float | None:
        ways = [[now - then for now, then in zip(getattr(x, network), first)] for x in (a, b)]
        return apart(*ways) if apart(getattr(b, network), first) > 1e-6 else None  # the first step has a rate of 0

    return {
        "losses": max(abs(a.losses[name] / b.losses[name] - 1) for name in b.losses),
        "gradients": max(apart([x], [y]) for x, y in zip(a.gradients, b.gradients)),
        "student": learned("student"), "teacher": learned("teacher"),
    }  # fmt: skip


def compare(there: SimpleNamespace, name: str, case: Case, change: str = "") -> Iterator[dict[str, Any]]:
    """One row after each number of steps; `change` is one of our config alone."""
    cfg, config = configs(there, case)
    config = override(config, [change] if change else [])
    batches = collated_batches(there, cfg, case.read[-1])
    first, g = first_weights(config, case.as_published), torch.Generator().manual_seed(2)
    state = start(config, torch.device("cpu"))
    for network in (state.student, state.teacher):
        network.load_state_dict(first, strict=False)  # tied heads have a second name
    last_bits = {key: p * (1 + 2.0**-23 * torch.randint(-1, 2, p.shape, generator=g)) for key, p in first.items()}
    released, nudged = Released(there, cfg, first), Released(there, cfg, last_bits)
    ours = train(config, None, state, map(as_batch, batches))
    begun = [p.double() for p in first.values()]
    for i, (batch, record) in enumerate(tqdm(zip(batches, ours), total=len(batches), desc=name)):
        told = [training.step(i, batch, config) for training in (released, nudged)]
        if i + 1 not in case.read:
            continue
        names = [chunked(key, cfg) for key in first]
        b, c = (read(x, training.model, names) for x, training in zip(told, (released, nudged)))
        a = read({key: record[key] for key in b.losses}, state, list(first))
        yield {"case": name, "steps": i + 1, "weights": sum(p.numel() for p in begun), "losses": b.losses,
               "moved": apart(b.student, begun), "apart": distances(a, b, begun),
               "apart_by_rounding": distances(c, b, begun)}  # fmt: skip


def run(there: SimpleNamespace) -> None:
    rows = []
    for name, case in CASES.items():
        for row in compare(there, name, case):
            rows.append(row)
            tqdm.write(json.dumps(row))
    store("official-step", {"released": there.commit, "rows": rows})
    far = [row for row in rows if row["steps"] == 1 and max(row["apart"]["losses"], row["apart"]["gradients"]) > NEAR]
    if far:
        sys.exit(f"{len(far)} of {len(CASES)} first steps are further than {NEAR} from the released code: see the rows")


def switches(there: SimpleNamespace) -> None:
    rows = []
    for change in ("", *SWITCHES):
        rows += [{"change": change} | row for row in compare(there, FIRST, CASES[FIRST]._replace(read=(SWITCHED,)), change)]
        tqdm.write(f"{change}: {rows[-1]['apart']}")
    store("official-switches", {"released": there.commit, "rows": rows})


# ---------------------------------------------------------------- the tables, of this and of the two benchmarks beside it


def tables() -> dict[str, str]:
    """What was run beside the released code: training, data, probes."""
    made = {"step": _step_table, "switches": _switches_table, "data": _data_table, "probes": _probes_table}
    return {f"official-{name}": table() for name, table in made.items()}


def _table(heads: list[str], rows: list[list[Any]], stored: dict[str, Any], note: str) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join([*(f"| {' | '.join(map(str, line))} |" for line in lines), "", f"{note}; {made_on(stored)}"])


def _stored(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"official-{name}.json").read_text())


def _parts(stored: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows by their part."""
    parts = {}
    for row in stored["rows"]:
        parts.setdefault(row["part"], []).append(row)
    return parts


def _brief(x: float) -> str:
    return f"{x:.0e}".replace("e-0", "e-").replace("e+00", "")


DISTANCES = ["losses", "gradients", "what the student learned", "what the teacher learned"]


def _step_table() -> str:
    """Each case after each number of steps; in brackets the released code against itself."""
    stored, rows = _stored("step"), []
    for row in stored["rows"]:
        pairs = zip(row["apart"].values(), row["apart_by_rounding"].values())
        rows.append([row["case"], row["steps"], *("" if a is None else f"{_brief(a)} ({_brief(b)})" for a, b in pairs)])
    return _table(["config", "steps", *DISTANCES], rows, stored, f"Float32; released code at {stored['released'][:7]}")


def _switches_table() -> str:
    stored = _stored("switches")
    rows = [[f"`{row['change']}`" if row["change"] else "as released", *map(_brief, row["apart"].values())]
            for row in stored["rows"]]  # fmt: skip
    words = f"{FIRST}, after {SWITCHED} steps; released code at {stored['released'][:7]}"
    return _table(["here", *DISTANCES], rows, stored, words)


def _data_table() -> str:
    """Of what is drawn at random: how much was compared, and the least likely of it if the laws are the same."""
    stored, rows = _stored("data"), []
    for part, found in _parts(stored).items():
        if random := [row for row in found if "p" in row]:
            least, draws = min(random, key=lambda row: row["p"]), max(max(row["n"]) for row in random)
            rows.append([part, len(random), f"{draws:,}", f"{least['p']:.3f}", least["what"]])
    heads = ["", "laws", "draws of each, at most", "smallest p-value", "of"]
    words = f"{stored['pictures']}; an error would be a p-value below {stored['alpha']} / {stored['n_tests']}"
    return _table(heads, rows, stored, words)


def _probes_table() -> str:
    stored, rows = _stored("probes"), []
    for part, found in _parts(stored).items():
        largest = max(row["difference"] / row["scale"] for row in found)
        rows.append([part, len(found), f"{sum(row['n'] for row in found):,}", f"{largest:.1e}" if largest else "0"])
    heads = ["", "comparisons", "numbers", "largest difference, as a share of the largest number"]
    return _table(heads, rows, stored, f"Float32; released code at {stored['released'][:7]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "switches", "draw"))
    parser.add_argument("checkout", type=Path, nargs="?", help="of facebookresearch/dinov2, for run and switches")
    options = parser.parse_args()
    if options.what == "draw":
        return put(tables())
    if options.checkout is None:
        parser.error(f"{options.what}: expected the folder of a checkout of facebookresearch/dinov2")
    warnings.filterwarnings("ignore", category=UserWarning, module="dinov2")  # whether xFormers is there
    there = modules(options.checkout.resolve())
    return run(there) if options.what == "run" else switches(there)


if __name__ == "__main__":
    main()
