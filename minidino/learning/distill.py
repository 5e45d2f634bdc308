"""Distillation: a small student learns from a larger network that is frozen, heads and all.

    a finished run -> its network, frozen -> `train` with a student of another size -> the average of the student

The loss terms are not modified: multi-crop DINO, iBOT, KoLeo and Sinkhorn-Knopp stay. What changes is who teaches, and
that nothing is hidden or dropped: iBOT compares all patches of both global crops, which the student sees. The student
has heads of its own, with as many prototypes as its teacher's, and its average is the result, as ever.

A teacher that came without heads can only be imitated token by token (`objective.imitation_losses`). That is something
else than the paper's distillation, and has to be asked for.

Source: DINOv2 paper, section 5; it was not released. DINOv3's code (dinov3/train/ssl_meta_arch.py, 6876159) computes the same of
the same batch, and its configs let iBOT compare drawn patches alone: benchmarks/official_dense.py.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from minidino.config import DistillConfig, RunConfig, VitConfig, flatten, override
from minidino.learning.teacher import Frozen, Network, build_student
from minidino.learning.train import State, start
from minidino.model.vit import SIZES, VisionTransformer
from minidino.model.weights import backbone_of, load_weights
from minidino.ranges import require
from minidino.runs import Run

SHARED = ("vit.patch_size", "data.channels", "heads.tied", "heads.n_prototypes", "heads.ibot_n_prototypes")
SHAPE = ("width", "depth", "heads")  # what a student may say of itself besides its name


def student_vit(told: str, like: VitConfig) -> VitConfig:
    """The sizes of a student, from "vit_small" or "vit_tiny,width=32,depth=4,heads=2"; all else as its teacher.

    Raises:
        ValueError: an unknown name, or something else than width, depth and heads.
    """
    name, *words = told.split(",")
    if name not in SIZES:
        raise ValueError(f"student: expected one of {', '.join(SIZES)}, got {name!r}")
    shape: dict[str, int | None] = dict.fromkeys(SHAPE)
    for word in words:
        key, _, value = word.partition("=")
        if key not in SHAPE or not value.isdigit():
            raise ValueError(f"student: expected {name},width=W,depth=N,heads=H or a part of it, got {told!r}")
        shape[key] = int(value)
    return replace(like, name=name, drop_path_rate=0.0, **shape)


def distilled(config: RunConfig, teacher: str | Path, student: str, steps: int) -> RunConfig:
    """The config of a distillation: that of the teacher's run, with another backbone and nothing dropped.

    Args:
        config: of the teacher's run.
        teacher: that run's folder.
        student: its sizes, as `student_vit` reads them.
        steps: updates.
    """
    return replace(
        config,
        vit=student_vit(student, config.vit),
        loss=replace(config.loss, ibot_start_frac=0.0, ibot_full_frac=0.0),  # its patches mean something from the start
        optim=replace(config.optim, freeze_backbone_frac=0.0),  # the student's is fresh
        distill=DistillConfig(teacher=str(teacher)),
        run=replace(config.run, steps=steps),
    )


def imitating(
    config: RunConfig, teacher: str | Path, student: str, steps: int, changes: Sequence[str] = ()
) -> RunConfig:
    """The config of learning the tokens of any backbone: a run, or weights, with or without heads.

    Args:
        config: of data, crops and training; patches and positions follow the teacher.
        changes: "key=value" texts; crops may fit the teacher's patches by them alone.
    """
    net = _backbone(str(teacher))
    followed = f"vit.patch_size={net.patch_size}", f"crops.local_size={net.patch_size}", "crops.n_local=0"
    config = override(config, [*changes, *followed])
    return replace(
        config,
        vit=student_vit(student, config.vit),
        distill=DistillConfig(teacher=str(teacher), targets="features", teacher_width=net.width),
        run=replace(config.run, steps=steps),
    )


def frozen_teacher(config: RunConfig, device: torch.device) -> Frozen:
    """The teacher of a distillation, after a look whether it can teach this student.

    Raises:
        FileNotFoundError: its run or its heads are not there.
        ValueError: another patch size, another number of prototypes, or other heads; says what to do.
    """
    ours, teacher = flatten(config), config.distill.teacher
    if config.distill.targets == "features":
        network: nn.Module = _backbone(teacher)
        channels = network.patch_embed.proj.in_channels
        theirs = {"vit.patch_size": network.patch_size, "distill.teacher_width": network.width, "data.channels": channels}
    else:
        network = network_of(Run(teacher))
        of_run = flatten(Run(teacher).config())
        theirs = {name: of_run[name] for name in SHARED}
    for name, value in theirs.items():
        require(ours[name] == value, name, f"{value}, as the teacher {teacher} has", ours[name])
    return Frozen(network.to(device).requires_grad_(False).eval(), fingerprint(network))


def teacher_again(run: Run, device: torch.device, frozen: Frozen | None = None) -> Frozen:
    """The teacher of a run that goes on, the one it began with.

    Raises:
        FileNotFoundError: it has been moved; says how to go on.
        ValueError: it is another by now.
    """
    try:
        frozen = frozen or frozen_teacher(run.config(), device)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; move the teacher of {run.folder} back, or go on with minidino distill ITS-PLACE "
                                f"--resume, all else as in {run.folder / 'environment.json'}") from error  # fmt: skip
    expect_same_teacher(run, frozen.sha256)
    return frozen


def expect_same_teacher(run: Run, sha256: str) -> None:
    """Raises ValueError when a weight of the teacher is not what it was at the start."""
    path = run.folder / "teacher.json"
    if path.exists() and (said := json.loads(path.read_text()))["sha256"] != sha256:
        raise ValueError(f"the teacher {said['teacher']} of {run.folder} is not the one it began with: start anew")


def start_distilled(config: RunConfig, device: torch.device, frozen: Frozen) -> State:
    """A fresh student with its average, and who teaches it.

    Its heads begin with the teacher's prototypes, where they have the same width: then it has to learn what the teacher
    sees, and not how it names it.
    """
    state = start(config, device)
    state.frozen = frozen
    if config.distill.targets == "heads" and config.distill.prototypes == "teacher":
        for network in (state.student, state.teacher):
            for name in ("dino_head", "ibot_head"):
                ours, theirs = (getattr(net, name).last_layer for net in (network, frozen.network))
                if all(a.shape == b.shape for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)):
                    ours.load_state_dict(theirs.state_dict())
    return state


def network_of(run: Run) -> Network:
    """The average that a finished run results in, with its heads.

    Raises:
        FileNotFoundError: no run, not finished, or no heads beside its weights that know prototypes.
    """
    config, heads = run.config(), run.folder / "heads.safetensors"
    if not (run.folder / "weights.safetensors").exists():
        raise FileNotFoundError(f"{run.folder} has no weights.safetensors: finish it with train --resume")
    if not heads.exists() or config.distill.targets == "features":
        raise FileNotFoundError(
            f"{run.folder} has no heads of prototypes, and the paper's distillation needs the teacher's: keep "
            "heads.safetensors beside weights.safetensors, or ask for --features, which is something else"
        )
    network = build_student(config)
    load_weights(network.backbone, run.folder / "weights.safetensors")
    said = load_file(heads)
    if network.ibot_head is network.dino_head:
        said |= {key.replace("dino_head", "ibot_head", 1): value for key, value in said.items()}
    network.load_state_dict({f"backbone.{k}": v for k, v in network.backbone.state_dict().items()} | said)
    return network


def fingerprint(network: nn.Module) -> str:
    """A hash of all weights: it changes when one of them does, by a bit."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _backbone(teacher: str) -> VisionTransformer:
    run = Run(teacher)
    return backbone_of(run.folder / "weights.safetensors" if (run.folder / "heads.safetensors").exists() else teacher)
