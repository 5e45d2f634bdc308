"""One training step of ViT-S/16 on a CPU, beside the same objective built of lightly's blocks on timm's ViT.

    python benchmarks/step.py run [--data PATH] [--toy]     data/results/step.json; --toy prints and stores nothing
    python benchmarks/step.py draw                          the table of the stored result

Everybody gets the same crops, masks and first weights, 8 images a step, 2 x 224 + 8 x 96 px, 65,536 prototypes, and computes
the same three losses against centred targets (lightly's losses know no Sinkhorn); that the losses agree is checked before
anything is timed. All clip, step by fused AdamW and move their teacher. Ours packs both crop sizes into one pass and leaves
out what stochastic depth drops; lightly has one pass for each crop size and computes what it drops. `lean` is ours with
prototypes looked at in parts, `plain` ours with one pass for each size. Stochastic depth is 0.3 as published, and 0 beside it.

Seconds come from turns whose order rotates, in one process; peak memory from a process of its own. The share of the
machine is (floating-point operations of the step / seconds) / (those of its best matrix product); what stochastic depth
drops is not counted as work, whoever computes it.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from loader import command, in_turns, memory_alone, pictures
from recipe import RESULTS, made_on
from torch import Tensor, nn

from minidino.config import RunConfig, override, preset
from minidino.images.batches import Batch, make_batch
from minidino.learning import train as loop
from minidino.learning.train import start, train
from minidino.model.layouts import to_timm_layout
from minidino.plan import sizes_of
from minidino.runs import peak_memory_mb, pick_precision
from minidino.scaling import matrix_tflops, step_flops

WHO = ("ours", "lightly", "lean", "plain")
TURNS, BATCH, PUBLISHED_DROP = 7, 8, 0.3
TOY = ("vit.width=32", "vit.depth=2", "vit.heads=2", "vit.patch_size=8", "crops.global_size=32", "crops.local_size=16",
       "crops.n_local=2", "heads.n_prototypes=64", "heads.hidden_dim=32", "heads.bottleneck_dim=16",
       "optim.batch_size=4")  # fmt: skip
SHARED = (  # what lightly and timm can do as well; positions as timm stretches them
    "loss.targets=centering", "vit.interpolate_offset=0.0", "vit.interpolate_antialias=true", f"optim.batch_size={BATCH}",
    "run.log_every=1000000", "run.steps=1000000000", "run.precision=fp32", "vit.layerscale=0.1",
    "optim.layerwise_decay=1.0", "optim.patch_embed_lr_mult=1.0",
)  # fmt: skip
CPU = torch.device("cpu")


def settings(toy: bool = False, drop: float = PUBLISHED_DROP, precision: str = "fp32") -> RunConfig:
    """The preset vits16-in1k, changed where the others could not follow, and to a batch of 8."""
    changes = [*SHARED, *(TOY if toy else ()), f"vit.drop_path_rate={drop}", f"run.precision={precision}"]
    return override(preset("vits16-in1k"), changes)


def one_batch(config: RunConfig, data: str | None = None, toy: bool = False) -> tuple[Batch, float]:
    """The batch that everybody gets, and the seconds it takes to cut."""
    index = torch.arange(config.optim.batch_size)
    images, sizes = pictures(data, toy).pixels.batch(index)
    make_batch(config, 0, images, sizes, index)
    begun = time.perf_counter()
    batch = make_batch(config, 1, images, sizes, index)
    return batch, time.perf_counter() - begun


# ---------------------------------------------------------------- who steps


class Ours:
    """The training loop of this package; `plain` goes without packing, `lean` without whole logits."""

    def __init__(self, config: RunConfig, batch: Batch, who: str = "ours"):
        config = override(config, ["loss.prototypes=chunked"]) if who == "lean" else config
        self.state = start(config, CPU)
        student, teacher = self.state.student.backbone, self.state.teacher.backbone
        if who == "plain":
            student.forward_packed = _one_size_at_a_time(student)
        self.records = train(config, None, self.state, stream=repeat(batch))
        self.parts = {
            "teacher forward": (teacher, "forward_features"), "student forward": (student, "forward_packed"),
            "backward": (torch.Tensor, "backward"), "clipping and AdamW": (loop, "_step_optimizer"),
            "EMA": (loop, "update_teacher"),
        }  # fmt: skip

    def step(self) -> dict[str, Any]:
        return next(self.records)


def _one_size_at_a_time(vit: nn.Module) -> Callable[..., list]:
    packed = vit.forward_packed
    return lambda images, masks: [packed([x], [mask])[0] for x, mask in zip(images, masks, strict=True)]


class Lightly:
    """The same objective of lightly's blocks, from the same first weights."""

    def __init__(self, config: RunConfig, batch: Batch):
        from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss

        self.config, self.batch, self.plan, self.done = config, batch, loop.schedules(config), 0
        state = start(config, CPU)
        self.student = _lightly_network(config, state.student).train()
        self.teacher = _lightly_network(config, state.student).requires_grad_(False).eval()  # its head cannot be copied
        groups = loop.parameter_groups(self.student)
        self.optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=(0.9, config.optim.beta2), fused=True)
        k, student_temp = config.heads.n_prototypes, config.loss.student_temp
        self.dino, self.ibot = DINOLoss(k, student_temp=student_temp), IBOTPatchLoss(k, student_temp=student_temp)
        self.koleo = KoLeoLoss()
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.run.precision == "bf16")
        self.parts = {
            "teacher forward": (self.teacher["backbone"], "encode"), "student forward": (self.student["backbone"], "encode"),
            "backward": (torch.Tensor, "backward"), "clipping and AdamW": (self, "update"), "EMA": (self, "follow"),
        }  # fmt: skip

    def losses(self, teacher_temp: float) -> dict[str, Tensor]:
        """The three weighted losses."""
        batch, w = self.batch, self.config.loss
        whole, small = batch.crops_global.flatten(0, 1), batch.crops_local.flatten(0, 1)
        masks, n_global, n_local = batch.masks.flatten(0, 1), len(batch.crops_global), len(batch.crops_local)
        side = whole.shape[-1] // self.config.vit.patch_size
        with torch.no_grad():
            told = self.teacher["backbone"].encode(whole)
            told_images, told_patches = (self.teacher["dino_head"](x) for x in (told[:, 0], told[:, 1:][masks]))
        seen = self.student["backbone"].encode(whole, mask=nn.functional.pad(masks, (1, 0)))
        seen_small = self.student["backbone"].encode(small)
        head = self.student["dino_head"]
        said, said_small, said_patches = head(seen[:, 0]), head(seen_small[:, 0]), head(seen[:, 1:][masks])
        views = [*said.chunk(n_global), *said_small.chunk(n_local)]
        return {
            "dino": w.dino * self.dino(list(told_images.chunk(n_global)), views, teacher_temp),
            "ibot": w.ibot * self.ibot(told_patches, said_patches, masks.unflatten(1, (side, side)), teacher_temp),
            "koleo": w.koleo * sum(self.koleo(x) for x in seen[:, 0].chunk(n_global)),
        }

    def step(self) -> dict[str, Any]:
        now = {name: schedule(self.done) for name, schedule in self.plan.items()}
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            losses = self.losses(now["teacher_temp"])
        sum(losses.values()).backward()
        self.update(now)
        self.follow(now["momentum"])
        self.done += 1
        return {name: loss.item() for name, loss in losses.items()}

    def update(self, now: dict[str, float]) -> None:
        for part in self.student.values():
            nn.utils.clip_grad_norm_(part.parameters(), self.config.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr_mult"] * now["last_layer_lr" if group["is_last_layer"] else "lr"]
            group["weight_decay"] = group["wd_mult"] * now["weight_decay"]
        self.optimizer.step()

    def follow(self, momentum: float) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(self.student, self.teacher, momentum)


def _lightly_network(config: RunConfig, ours: nn.Module) -> nn.ModuleDict:
    """timm's ViT in lightly's wrapper and lightly's head, with the weights of our network."""
    from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
    from lightly.models.utils import update_drop_path_rate
    from timm.models.vision_transformer import VisionTransformer

    b, h = ours.backbone, config.heads
    vit = VisionTransformer(img_size=config.crops.global_size, patch_size=b.patch_size, embed_dim=b.width,
                            depth=len(b.blocks), num_heads=b.heads, num_classes=0, init_values=1.0,
                            dynamic_img_size=True)  # fmt: skip
    vit.load_state_dict(to_timm_layout(b.state_dict()), strict=True)
    update_drop_path_rate(vit, config.vit.drop_path_rate, mode="uniform")
    mask_token = nn.Parameter(b.mask_token.detach().clone()[None])
    backbone = MaskedVisionTransformerTIMM(vit, mask_token, "skip", pos_embed_initialization="skip")
    head = DINOv2ProjectionHead(b.width, h.hidden_dim, h.bottleneck_dim, h.n_prototypes)
    state = {name.replace("mlp.", "layers."): value for name, value in ours.dino_head.state_dict().items()}
    head.load_state_dict(state, strict=True)
    return nn.ModuleDict({"backbone": backbone, "dino_head": head})


def stepper(who: str, config: RunConfig, batch: Batch) -> Ours | Lightly:
    return Lightly(config, batch) if who == "lightly" else Ours(config, batch, who)


# ---------------------------------------------------------------- measuring


def agreement(config: RunConfig, batch: Batch) -> dict[str, dict[str, float]]:
    """The losses of the first step, of each: from equal weights, and without stochastic depth they are equal."""
    config = override(config, ["vit.drop_path_rate=0.0", "run.log_every=1"])
    said = {who: stepper(who, config, batch).step() for who in WHO}
    found = {name: {who: said[who][name] for who in WHO} for name in ("dino", "ibot", "koleo")}
    for name, values in found.items():
        if max(values.values()) - min(values.values()) > 1e-3 * max(abs(min(values.values())), 1e-2):
            raise ValueError(f"expected one {name} loss of all, got {values}: they do not compute the same")
    return found


def breakdown(contestant: Ours | Lightly) -> dict[str, float]:
    """Seconds of the parts of one step; heads and losses are what is left."""
    taken = dict.fromkeys(contestant.parts, 0.0)
    with timed(contestant.parts, taken):
        begun = time.perf_counter()
        contestant.step()
        whole = time.perf_counter() - begun
    return {**taken, "heads and losses": whole - sum(taken.values()), "whole": whole}


@contextmanager
def timed(parts: dict[str, tuple[Any, str]], taken: dict[str, float]) -> Iterator[None]:
    """Add to `taken` what calls of these attributes take, until the block ends."""

    def clocked(label: str, work: Callable) -> Callable:
        def call(*args, **kwargs):
            begun = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                taken[label] += time.perf_counter() - begun

        return call

    before = [(owner, name, vars(owner).get(name)) for owner, name in parts.values()]
    for label, (owner, name) in parts.items():
        setattr(owner, name, clocked(label, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, own in before:
            delattr(owner, name) if own is None else setattr(owner, name, own)


def operations(config: RunConfig, batch: Batch) -> float:
    """Floating-point operations of a step's matrix products, each done once: the work, whoever does more."""
    sizes = replace(sizes_of(config, "cpu"), attention="reference", prototypes="reference")
    return step_flops(sizes, len(batch.index), len(batch.mask_weights))["total"]


def compare(config: RunConfig, batch: Batch, who: tuple[str, ...], turns: int, rate: float) -> dict[str, Any]:
    """Steps in turn: images a second, how many times as fast ours is, parts, share of the machine."""
    contestants = {name: stepper(name, config, batch) for name in who}
    seconds = in_turns({name: lambda _, c=c: c.step() for name, c in contestants.items()}, turns)
    work, n = operations(config, batch), len(batch.index)
    return {name: {"per_s": n / s["median"], "ours_is_faster": s.pop("ratio"), "seconds": s,
                   "mfu": work / s["median"] / rate, "parts_s": breakdown(contestants[name])}
            for name, s in seconds.items()}  # fmt: skip


def measure(data: str | None = None, toy: bool = False) -> dict[str, Any]:
    """Agreement, then turns with and without stochastic depth, bf16 beside, memory of each alone."""
    config = settings(toy)
    batch, crops_s = one_batch(config, data, toy)
    rate, turns = 1e12 * matrix_tflops(), 3 if toy else TURNS
    found = {
        "losses": agreement(config, batch), "n_prototypes": config.heads.n_prototypes, "batch": len(batch.index),
        "threads": torch.get_num_threads(), "turns": turns, "n_masked": len(batch.mask_weights), "matmul_flops": rate,
        "crops_s": crops_s,
        "drop_path": compare(config, batch, WHO, turns, rate),
        "no_drop_path": compare(settings(toy, drop=0.0), batch, WHO[:2], turns, rate),
        "bf16": compare(settings(toy, precision="bf16"), batch, WHO[:2], turns, rate),
        "bf16_is_native": pick_precision("auto", CPU) == "bf16", "memory": {},
    }  # fmt: skip
    found["ours_per_s"] = found["drop_path"]["ours"]["per_s"]
    for who in () if toy else WHO:
        found["memory"][who] = memory_alone(__file__, ["alone", "--who", who, *(["--data", data] if data else [])])
    return found


def alone(who: str, data: str | None, toy: bool) -> dict[str, float]:
    """Peak memory of two steps in this process, MiB; `before` is with libraries, pictures and networks."""
    config = settings(toy)
    contestant = stepper(who, config, one_batch(config, data, toy)[0])
    before = peak_memory_mb()
    contestant.step()
    contestant.step()
    return {"before_mb": before, "peak_mb": peak_memory_mb()}


# ---------------------------------------------------------------- the tables


def tables() -> dict[str, str]:
    """The tables of docs/measured.md, written from what is stored."""
    return {"step": table(json.loads((RESULTS / "step.json").read_text()))}


def table(found: dict[str, Any]) -> str:
    lines = ["| stochastic depth | | images/s | ours is faster | share of the machine | peak memory, MiB |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for words, key in ((f"{PUBLISHED_DROP}", "drop_path"), ("none", "no_drop_path"), (f"{PUBLISHED_DROP}, bf16", "bf16")):
        for who, row in found[key].items():
            q, memory = row["ours_is_faster"], found["memory"].get(who) if key == "drop_path" else None
            faster = "" if who == "ours" else f"{q['median']:.2f} times ({q['low']:.2f} to {q['high']:.2f})"
            lines.append(f"| {words} | {who} | {row['per_s']:.2f} | {faster} | {row['mfu']:.0%} | "
                         f"{format(memory['peak_mb'], ',.0f') if memory else ''} |")  # fmt: skip
    names = list(found["drop_path"]["ours"]["parts_s"])
    lines += ["", f"| seconds of | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for who, row in found["drop_path"].items():
        lines.append(f"| {who} | {' | '.join(format(row['parts_s'][name], '.2f') for name in names)} |")
    native = "" if found["bf16_is_native"] else ", which this processor does not multiply natively"
    lines += ["", f"{found['batch']} images, {found['n_prototypes']:,} prototypes, {found['n_masked']} masked patches; medians of "
              f"{found['turns']} turns, quartiles in brackets; crops and masks of a batch take {found['crops_s']:.2f} s. The share "
              f"is of {found['matmul_flops'] / 1e9:.0f} GFLOP/s of float32, for bf16{native}, too. {found['threads']} threads of "
              f"{made_on(found)}"]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    command("step", __doc__, WHO, measure, alone, table, tables)


if __name__ == "__main__":
    main()
