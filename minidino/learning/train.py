"""The loop: one batch, one update, one record.

`train` is a generator. It learns and tells; probing, saving and drawing are done by whoever watches:

    state = start(config, device)
    for record in train(config, pixels, state):
        ...  # state.teacher, state.step and the record are there to look at
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minidino.config import OptimConfig, RunConfig
from minidino.distributed import (
    Door,
    all_reduce,
    gather,
    gradients_wait,
    mean,
    n_processes,
    rank,
    replicate,
    shard,
    shard_moments,
    whole,
)
from minidino.images.batches import Batch, batches
from minidino.images.crops import crop_seed
from minidino.images.pixels import Pixels
from minidino.learning import doctor
from minidino.learning.objective import (
    Center,
    Targets,
    TeacherLogits,
    first_look,
    imitation_losses,
    make_targets,
    student_losses,
    teacher_logits,
    token_targets,
)
from minidino.learning.optim import (
    Schedule,
    clip_gradients,
    cosine_schedule,
    last_layer_lr,
    linear_schedule,
    parameter_groups,
)
from minidino.learning.prototypes import dense, resolve
from minidino.learning.teacher import Frozen, Imitator, Network, build_student, make_teacher, update_teacher
from minidino.model.attention import resolve as resolve_attention
from minidino.runs import pick_precision

DROPS = -3  # and below, one each process: stand in for an image index in the seed of a step's stochastic depth
PATIENCE = 20  # steps in a row whose loss or gradients may be NaN before the run stops
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class State:
    """All that changes while a run learns; `save` and `load` make it survive the process."""

    student: Network | Imitator
    teacher: Network | Imitator  # the slow average of the student: what a run results in
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: str  # fp32, bf16 or fp16; a resumed run goes on in the one it began with
    center: Center | None = None
    step: int = 0  # updates done
    skipped: int = 0  # updates left out in a row, because loss or gradients were not numbers
    seconds: float = 0.0  # spent learning, over all the processes that took part
    frozen: Frozen | None = None  # teaches instead, in distillation; it does not change and is not saved

    def __post_init__(self) -> None:
        self.ask_student, self.ask_teacher = Door(self.student), Door(self.teacher)

    def save(self) -> dict[str, Any]:
        """The same whatever the number of processes; each of them has to ask."""
        return whole({
            "student": self.student.state_dict(), "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "precision": self.precision, "center": None if self.center is None else tuple(self.center),
            "step": self.step, "skipped": self.skipped, "seconds": self.seconds,
        })  # fmt: skip

    def load(self, saved: dict[str, Any]) -> None:
        """Take back what `save` gave, in place. Raises ValueError where it is of another network."""
        ours, theirs = ({key: w.shape for key, w in of.items()} for of in (self.student.state_dict(), saved["student"]))
        if other := [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]:
            raise ValueError(f"what was saved is of another network, it differs in {other[0]}: was config.json changed?")
        for name in ("student", "teacher", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(saved[name])
        self.center = None if saved["center"] is None else Center(*saved["center"])
        for name in ("precision", "step", "skipped", "seconds"):
            setattr(self, name, saved[name])


def start(config: RunConfig, device: torch.device) -> State:
    """A fresh student, its average and optimizer; the run's seed decides the weights. A frozen teacher comes later.

    Raises:
        ValueError, NotImplementedError: what cannot run here, before anything is built.
    """
    resolve(config.loss.prototypes, device)
    resolve_attention(config.vit.attention, device)
    precision = pick_precision(config.run.precision, device)
    alone = config.run.parallel == "ddp" or n_processes() == 1
    if not alone and (precision == "fp16" or config.optim.freeze_backbone_frac > 0):
        raise ValueError("run.parallel: expected 'ddp' with fp16 or with heads that learn first, got 'fsdp'")
    torch.manual_seed(config.run.seed)
    student = build_student(config).to(device, torch.float32).train()
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    return State(student, make_teacher(student), adamw(student, config.optim), scaler, precision)


def adamw(student: nn.Module, o: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameter groups of a config, fused where the device can."""
    groups = parameter_groups(student, o.layerwise_decay, o.patch_embed_lr_mult, decay_tokens=o.decay_tokens)
    fused = next(student.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, o.beta2), fused=fused)


def spread(config: RunConfig, state: State) -> None:
    """Let all processes learn this state together; alone, nothing changes. Each has the whole of it when it is called.

    Raises:
        ValueError: the processes are at different steps.
    """
    if n_processes() == 1:
        return
    steps = torch.tensor([state.step, -state.step], device=next(state.student.parameters()).device)
    if all_reduce(steps, op="max").sum() != 0:
        raise ValueError(f"one process is at step {state.step}, another is not: do all see the same run folder?")
    if config.run.parallel == "ddp":
        state.ask_student = replicate(state.ask_student)
        return
    moments = state.optimizer.state_dict()
    for door in (state.ask_student, state.ask_teacher):
        shard(door, bf16=state.precision == "bf16")
    state.optimizer = adamw(state.student, config.optim)
    state.optimizer.load_state_dict(moments)
    shard_moments(state.optimizer)


def resolved(config: RunConfig, device: torch.device) -> str:
    """What a config leaves open and this machine decides, and what follows from several of its numbers, in words."""
    o = config.optim
    horizon = doctor.ema_horizon(config.teacher.momentum)
    return (f"{pick_precision(config.run.precision, device)} on {device}, lr {o.lr:.2e}, weight decay {o.weight_decay} to "
            f"{o.final_weight_decay}, EMA horizon {horizon:.1f} steps or {horizon * o.batch_size:,.0f} images at the start, "
            f"attention {resolve_attention(config.vit.attention, device)}, prototype loss "
            f"{resolve(config.loss.prototypes, device)}")  # fmt: skip


def schedules(config: RunConfig) -> dict[str, Schedule]:
    """Every number that moves during a run, as a function of the step."""
    o, t, w, steps = config.optim, config.teacher, config.loss, config.run.steps
    warmup = round(o.warmup_frac * steps)
    first = 0.0 if o.warmup_start == "released" else o.lr / max(warmup, 1)
    lr = cosine_schedule(o.lr, o.final_lr, steps, warmup, first)

    def ibot(step: int) -> float:
        done, enters, full = step / steps, w.ibot_start_frac, w.ibot_full_frac
        if done < enters:
            return 0.0
        return w.ibot * min(1.0, (done - enters) / (full - enters)) if full > enters else w.ibot

    return {
        "lr": lr,
        "last_layer_lr": last_layer_lr(lr, round(o.freeze_last_layer_frac * steps)),
        "weight_decay": cosine_schedule(o.weight_decay, o.final_weight_decay, steps),
        "momentum": cosine_schedule(t.momentum, t.final_momentum, steps),
        "teacher_temp": linear_schedule(t.warmup_temp, t.temp, round(t.warmup_frac * steps)),
        "ibot_weight": ibot,
    }


def train(
    config: RunConfig, pixels: Pixels, state: State, stream: Iterable[Batch] | None = None
) -> Iterator[dict[str, Any]]:
    """Learn from the state's step to the run's last; one record a step, with readings every run.log_every steps.

    Each step seeds torch's global generator anew.

    Args:
        config: the whole run.
        pixels: decoded training images.
        state: changed in place; fresh from `start`, or loaded.
        stream: the batches from the state's step on, where several students share them; None makes them.
    Yields:
        {"step", "images", "seconds"} and, when read: the losses, the schedules, what the doctor watches.
        `seconds` counts from step 0, without the time the watcher takes.
    Raises:
        FloatingPointError: loss or gradients were not finite for 20 steps in a row.
        ValueError: called under torch.autocast, no_grad or inference_mode.
    """
    device = next(state.student.parameters()).device
    plan, clock = schedules(config), time.perf_counter()
    for batch in batches(config, pixels, device, state.step) if stream is None else stream:
        now = {name: schedule(state.step) for name, schedule in plan.items()}
        read = state.step % config.run.log_every == 0 or state.step == config.run.steps - 1
        readings = _update(config, state, batch, now, read)
        record = {"step": state.step, "images": (state.step + 1) * config.optim.batch_size, **readings}
        state.step += 1
        state.seconds += time.perf_counter() - clock
        yield record | {"seconds": round(state.seconds, 3)}
        clock = time.perf_counter()


def _update(config: RunConfig, state: State, batch: Batch, now: dict[str, float], read: bool) -> dict[str, Any]:
    """One update of the student, then of the teacher."""
    if torch.is_autocast_enabled(batch.crops_global.device.type) or not torch.is_grad_enabled():
        raise ValueError("expected train outside of no_grad, inference_mode and torch.autocast, which would keep old "
                         "copies of weights; run.precision says what is computed in half precision")  # fmt: skip
    _seed(config, state)
    state.optimizer.zero_grad(set_to_none=True)
    state.student.backbone.requires_grad_(state.step >= round(config.optim.freeze_backbone_frac * config.run.steps))
    losses, targets, class_tokens, center = _backward(config, state, batch, now)
    losses = dict(zip(losses, mean(torch.stack(list(losses.values()))), strict=True))
    loss = sum(losses.values()).item()
    norms = _step_optimizer(config, state, now) if math.isfinite(loss) else {}
    good = len(norms) > 0 and all(map(math.isfinite, norms.values()))
    state.skipped = 0 if good else state.skipped + 1
    if state.skipped >= PATIENCE:
        raise FloatingPointError(f"no finite loss or gradient in {PATIENCE} steps up to step {state.step}: see doctor")
    if good:
        update_teacher(state.teacher, state.student, now["momentum"])
        state.center = center
    if good and not read:
        return {}
    schedule = {name: value for name, value in now.items() if name != "last_layer_lr"}
    parts = {name: value.item() for name, value in losses.items()}
    signs = _vital_signs(targets, class_tokens) if good else {}
    return {"loss": loss, **parts, **schedule, **norms, **signs}


def _seed(config: RunConfig, state: State) -> None:
    """Let a step draw what it drops from its own seed, each process another."""
    torch.manual_seed(crop_seed(config.run.seed, state.step, DROPS - rank()))


Lesson = Callable[[], tuple[dict[str, Tensor], Tensor]]  # of a part of the batch: losses, class tokens


def _backward(
    config: RunConfig, state: State, batch: Batch, now: dict[str, float]
) -> tuple[dict[str, Tensor], Targets | None, Tensor, Center | None]:
    """Gradients of a batch, computed in parts; what it decides as a whole does not depend on their number."""
    n_parts, device = config.optim.accumulate, batch.crops_global.device
    autocast = torch.autocast(device.type, DTYPES[state.precision], enabled=state.precision != "fp32")
    size = len(batch.index) // n_parts
    parts = [batch.rows(slice(i * size, (i + 1) * size)) for i in range(n_parts)] if n_parts > 1 else [batch]
    with autocast:
        if config.distill.targets == "features":
            lessons, targets, center = _imitation(state, batch, parts), None, None
        else:
            lessons, targets, center = _objective(config, state, batch, parts, now)
    losses, class_tokens = {}, []
    for lesson in lessons:
        with gradients_wait(state.ask_student, lesson is not lessons[-1]):
            with autocast:
                shares, tokens = lesson()
            state.scaler.scale(sum(shares.values()) / n_parts).backward()
        class_tokens.append(tokens.detach())
        losses = {name: losses.get(name, 0) + share.detach() / n_parts for name, share in shares.items()}
    return losses, targets, torch.cat(class_tokens, dim=1), center


def _objective(
    config: RunConfig, state: State, batch: Batch, parts: list[Batch], now: dict[str, float]
) -> tuple[list[Lesson], Targets, Center | None]:
    """DINOv2's losses of each part, against what the average of the student says, or a frozen teacher."""
    w, n_parts = config.loss, len(parts)
    weights = {"dino": w.dino, "ibot": now["ibot_weight"], "koleo": w.koleo}
    impl = resolve(w.prototypes, batch.crops_global.device)
    patch_temp = now["teacher_temp"] if config.teacher.patch_temp is None else config.teacher.patch_temp

    def say(teacher: Network) -> tuple[Targets, Center | None]:
        logits = [teacher_logits(teacher, part, ibot=weights["ibot"] > 0) for part in parts]
        ibot = torch.cat([part.ibot for part in logits]) if weights["ibot"] > 0 else None
        return make_targets(
            TeacherLogits(torch.cat([part.dino for part in logits], dim=1), ibot), (now["teacher_temp"], patch_temp),
            all_reduce, w.targets, state.center, impl,
        )  # fmt: skip

    frozen = state.frozen
    targets, center = state.ask_teacher(say) if frozen is None else frozen.once(batch, lambda: say(frozen.network))
    # the divisor counts the masked crops of the whole batch: its parts have more and fewer
    n_masked = max(float(mean(batch.masks.any(-1).sum())), 1 / n_processes()) / n_parts if w.ibot_divisor == "paper" else None
    gathers = _neighbours(config, state, parts, holes=targets.ibot is not None and frozen is None)
    dinos, n_patches = targets.dino.chunk(n_parts, dim=1), [len(part.mask_weights) for part in parts]
    ibots = [None] * n_parts if targets.ibot is None else targets.ibot.split(n_patches)
    lessons = [
        partial(state.ask_student, student_losses, part, Targets(dino, ibot), weights, w.student_temp, w.koleo_views,
                n_masked, w.dino_divisor, impl, hide=frozen is None, gather=near)
        for part, dino, ibot, near in zip(parts, dinos, ibots, gathers, strict=True)
    ]  # fmt: skip
    return lessons, targets, center


def _neighbours(
    config: RunConfig, state: State, parts: list[Batch], holes: bool
) -> list[Callable[[Tensor], Tensor]]:
    """For each part, what puts its class tokens (B, G, D) among those of the whole batch, for KoLeo.

    The tokens of the other parts come from a pass of the student without gradients, which draws as the pass to come does.
    Source: Gao et al. 2021 (gradient cache, arXiv 2101.06983), whose second pass has the gradients of the first; here
        each part has its own, since those of the others do not change it.
    """
    if len(parts) == 1 or not config.loss.koleo:
        return [gather] * len(parts)
    seen = [state.ask_student(first_look, part, holes) for part in parts]
    _seed(config, state)

    def among(i: int, own: Tensor) -> Tensor:
        own = own.detach() + len(parts) * (own - own.detach())  # the mean over parts takes their number away again
        return gather(torch.cat([*seen[:i], own, *seen[i + 1 :]]))

    return [partial(among, i) for i in range(len(parts))]


def _imitation(state: State, batch: Batch, parts: list[Batch]) -> list[Lesson]:
    """The distance of each part's tokens to those of a frozen teacher."""
    frozen = state.frozen
    told = frozen.once(batch, lambda: [token_targets(frozen.network, part) for part in parts])
    return [partial(state.ask_student, imitation_losses, part, targets)
            for part, targets in zip(parts, told, strict=True)]  # fmt: skip


def _step_optimizer(config: RunConfig, state: State, now: dict[str, float]) -> dict[str, float]:
    """Clip and step; the gradient norms before clipping. No step when one of them is not finite."""
    state.scaler.unscale_(state.optimizer)
    clipped = clip_gradients(state.student.parts(), config.optim.clip, config.optim.clip_scope)
    norms = {f"grad_norm_{name}": norm.item() for name, norm in whole(clipped).items()}
    for group in state.optimizer.param_groups:
        group["lr"] = group["lr_mult"] * now["last_layer_lr" if group["is_last_layer"] else "lr"]
        group["weight_decay"] = group["wd_mult"] * now["weight_decay"]
    if all(map(math.isfinite, norms.values())):
        state.scaler.step(state.optimizer)
    state.scaler.update()
    return norms


def _vital_signs(targets: Targets | None, class_tokens: Tensor) -> dict[str, float]:
    """What tells learning from collapse: see `minidino.learning.doctor`."""
    features = gather(class_tokens[0].detach().float())
    spread = doctor.feature_spread(features)
    signs = {"rankme": doctor.rankme(features), "feature_std": spread.std, "mean_cosine": spread.mean_cosine}
    if targets is None:
        return signs
    probs = dense(targets.dino).flatten(0, 1)
    undecided = mean(torch.tensor(doctor.entropy(probs), device=probs.device)).item()
    used = doctor.prototypes_used(mean(probs.double().mean(0, keepdim=True))).perplexity
    return {"teacher_entropy": undecided, "prototypes_used": used, **signs}
