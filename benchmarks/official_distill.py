"""For official_dense.py: a step of distillation by the code that was released with DINOv3, and by ours.

Theirs is built whole, around our backbones, since DINOv3's have rotary positions. What section 5 of the DINOv2 paper asks for
is in both: a frozen teacher with its heads, multi-crop DINO, iBOT on the global crops of which nothing is hidden, KoLeo,
Sinkhorn-Knopp, no stochastic depth, the average of the student. Which patches iBOT compares is up to the batch: all, as here,
or those that masks draw, as in DINOv3's configs.
"""

import tempfile
from collections.abc import Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from official_probes import compared, noisy
from torch import Tensor, nn

from minidino.config import RunConfig, override
from minidino.images.batches import Batch, collate, make_batch
from minidino.images.masks import batch_masks
from minidino.images.scenes import draw_scenes
from minidino.learning.distill import distilled, start_distilled
from minidino.learning.objective import make_targets, teacher_logits
from minidino.learning.teacher import Frozen, build_student
from minidino.learning.train import State, schedules, train

BOTH = (
    "optim.batch_size=8", "optim.base_lr=1.0", "optim.warmup_frac=0", "optim.clip=inf", "optim.freeze_last_layer_frac=0",
    "crops.global_size=48", "crops.local_size=24", "crops.n_local=3", "vit.name=vit_tiny", "vit.width=48", "vit.depth=3",
    "vit.heads=3", "vit.patch_size=8", "vit.num_register_tokens=2", "vit.layerscale=1.0", "heads.tied=false",
    "heads.weight_norm=false", "heads.n_prototypes=96", "heads.ibot_n_prototypes=64", "heads.hidden_dim=64",
    "heads.bottleneck_dim=24", "heads.ibot_bottleneck_dim=16", "run.precision=fp32", "run.log_every=1",
)  # fmt: skip
OURS: list[str] = []  # what is changed in our config alone
ARCHES = {
    "one student": ("ssl_meta_arch", "SSLMetaArch"), "several students": ("multidist_meta_arch", "MultiDistillationMetaArch"),
}  # fmt: skip
Rows = Iterator[dict[str, Any]]


def there(name: str) -> Any:
    return import_module(f"dinov3.{name}")


def relative(theirs: list[Tensor], ours: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Both, each tensor in units of the largest number of theirs, where that is not 0."""
    sizes = [x.abs().max().item() or 1.0 for x in theirs]
    return [x / n for x, n in zip(theirs, sizes, strict=True)], [x / n for x, n in zip(ours, sizes, strict=True)]


class Backbone(nn.Module):
    """Our network, which answers as theirs is asked."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit

    def forward(self, x: Any, masks: Any = None, is_training: bool = True) -> Any:
        tokens = self.vit.forward_packed(x, masks) if isinstance(x, list) else [self.vit.forward_features(x, masks)]
        told = [{"x_norm_clstoken": t.x_norm_clstoken, "x_norm_patchtokens": t.x_norm_patchtokens,
                 "x_storage_tokens": t.x_norm_regtokens} for t in tokens]  # fmt: skip
        return told if isinstance(x, list) else told[0]


def parts(theirs: nn.ModuleDict, ours: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Backbones and heads, side by side."""
    return [(part.vit if name == "backbone" else part, getattr(ours, name)) for name, part in theirs.items()]


def load(theirs: nn.ModuleDict, ours: nn.Module) -> None:
    for a, b in parts(theirs, ours):
        a.load_state_dict(b.state_dict())


def built(kind: str, config: RunConfig, state: State) -> Any:
    """Their whole architecture, with the weights of ours."""
    arch, cfg, h = there("train.ssl_meta_arch"), there("configs").get_default_config(), config.heads
    sizes = {"head_n_prototypes": h.n_prototypes, "head_hidden_dim": h.hidden_dim, "head_bottleneck_dim": h.bottleneck_dim}
    ibot = {"head_n_prototypes": h.ibot_n_prototypes, "head_bottleneck_dim": h.ibot_bottleneck_dim, "separate_head": True}
    cfg.merge_with({
        "train": {"centering": "sinkhorn_knopp"}, "crops": {"local_crops_number": config.crops.n_local}, "dino": sizes,
        "ibot": sizes | ibot, "student": {"patch_size": config.vit.patch_size},
    })  # fmt: skip

    def networks(of: Any, only_teacher: bool = False) -> tuple[Any, ...]:
        vit = (state.student if of is cfg else state.frozen.network).backbone
        return *(Backbone(deepcopy(vit)) for _ in range(1 if only_teacher else 2)), vit.width

    with tempfile.TemporaryDirectory() as folder, patch.object(arch, "build_model_from_cfg", networks):
        there("configs.config").OmegaConf.save(cfg, f"{folder}/teacher.yaml")
        cfg.distillation = {"enabled": True, "full_cfg_path": f"{folder}/teacher.yaml", "checkpoint_path": "ignore"}
        module, name = ARCHES[kind]
        model = getattr(there(f"train.{module}"), name)(cfg)
    load(model.student, state.student), load(model.model_ema, state.teacher), load(model.teacher, state.frozen.network)
    model.train()
    return model


def gradient(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def distillation() -> Rows:
    of_teacher = override(RunConfig(), BOTH)
    asked = distilled(of_teacher, "teacher", "vit_tiny,width=32,depth=2,heads=2", 10)
    config, momentum = override(asked, OURS), schedules(asked)["momentum"](0)
    drawn = torch.as_tensor(draw_scenes(8, 64, seed=3).images).permute(0, 3, 1, 2)
    whole = make_batch(config, 0, drawn, torch.full((8, 2), 64), torch.arange(8))
    some = batch_masks(16, (6, 6), torch.Generator().manual_seed(0)).view(2, 8, -1)
    for what, batch in (("all patches", whole), ("drawn patches", collate(*whole[:2], some, whole.index))):
        for kind in ARCHES:
            torch.manual_seed(0)
            teacher = noisy(build_student(of_teacher)).requires_grad_(False)
            state = start_distilled(config, torch.device("cpu"), Frozen(teacher, ""))
            noisy(state.student).train()
            state.teacher.load_state_dict(state.student.state_dict())
            yield from step(f"{what}, {kind}", config, batch, state, built(kind, config, state), momentum)


def step(what: str, config: RunConfig, batch: Batch, state: State, model: Any, momentum: float) -> Rows:
    """Targets, losses, gradients, and what becomes of the student's average and of the teacher."""
    flat, temperature = batch.masks.flatten(0, 1), schedules(config)["teacher_temp"](0)
    before = [p.clone() for network in (state.teacher, state.frozen.network) for p in network.parameters()]
    n, indices = int(flat.sum()), flat.flatten().nonzero()[:, 0]
    data = {"collated_global_crops": batch.crops_global.flatten(0, 1), "collated_local_crops": batch.crops_local.flatten(0, 1),
            "collated_masks": flat, "mask_indices_list": indices, "masks_weight": batch.mask_weights, "upperbound": n,
            "n_masked_patches": torch.tensor([n]), "global_batch_size": len(batch.index)}  # fmt: skip
    size = {"global_batch_size": len(batch.index)} if "several" in what else {}
    said = model.get_teacher_output(batch.crops_global, upperbound=n, mask_indices_list=indices, teacher_temp=temperature,
                                    n_masked_patches_tensor=torch.tensor([n]), **size)  # fmt: skip
    told, _ = make_targets(teacher_logits(state.frozen.network, batch), temperature)
    yield compared("distillation", f"{what}: targets", [said["cls_centered"], said["masked_patch_centered"]], told)
    _, losses = model.forward_backward(data, teacher_temp=temperature)
    record, n_local = next(train(config, None, state, iter([batch]))), config.crops.n_local
    dino = (losses["dino_global_crops_loss"] + n_local * losses["dino_local_crops_loss"]) / (1 + n_local)
    theirs = [dino, losses["ibot_loss"], 0.1 * 2 * losses["koleo_loss"]]  # as its compute_losses weighs them
    mine = [torch.tensor(record[name]) for name in ("dino", "ibot", "koleo")]
    yield compared("distillation", f"{what}: losses", *relative(theirs, mine))
    sides = [[gradient(p) for x in parts(model.student, state.student) for p in x[i].parameters()] for i in (0, 1)]
    learned = relative(*sides)
    yield compared("distillation", f"{what}: gradients of {len(learned[0])} tensors", *learned)
    load(model.student, state.student)  # as our step left it
    model.update_ema(momentum)
    moved = [[p.detach() - q for p, q in zip(ps, before)] for ps in (model.model_ema.parameters(), state.teacher.parameters())]
    yield compared("distillation", f"{what}: way of the student's average", *moved, 1e-3)  # of the last bits of weights
    taught = before[len(moved[1]) :]
    kept = [[p for x in parts(model.teacher, state.frozen.network) for p in x[i].parameters()] for i in (0, 1)]
    yield compared("distillation", f"{what}: the teacher stays", [taught, taught], kept, 0)
