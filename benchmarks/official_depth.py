"""For official_dense.py: how DINOv3's released code trains and judges heads for distances, beside ours.

Heads learn in float64, since a ReLU answers at its kink to the last bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from official_distill import Rows, relative, there
from official_probes import compared, noisy
from recipe import ROOT
from torch import Tensor, nn

from minidino.images.scenes import draw_scenes
from minidino.judge import trained_backbone
from minidino.probes import depth
from minidino.probes.dense import feature_maps
from minidino.probes.heads import load_head
from minidino.runs import Run

NEAR, FAR, STEPS = 0.001, 40.0, 40  # metres, metres, of each training
NOWHERE = 10 * FAR  # bounds nothing: DINOv3 bounds what DPT says after it is resized, DINOv2 before, as we do
LR, DECAY, EXACT = 1e-3, 0.01, 1e-10
ONE_RATE = {"use_beta1": False, "update_momentum": False}  # for their schedules: momentum stays, as here


@contextmanager
def doubles() -> Iterator[None]:
    """All in float64, where float32 is asked for, too."""
    torch.set_default_dtype(torch.float64)
    with patch.object(Tensor, "float", Tensor.double):
        yield
    torch.set_default_dtype(torch.float32)


class Look(nn.Module):
    """In place of a backbone: what one said of the pictures of these numbers, block by block."""

    def __init__(self, blocks: list[Any]):
        super().__init__()
        self.blocks = blocks

    def forward(self, rows: Tensor) -> list[Any]:
        return [tuple(x[rows] for x in block) if isinstance(block, tuple) else block[rows] for block in self.blocks]


@cache
@torch.no_grad()
def scenes() -> tuple[Tensor, Tensor, Tensor]:
    """For 24 scenes the tokens of four blocks (24, 8 D, 6, 6), metres, a tenth unknown, and the classes of their pixels."""
    drawn, vit = draw_scenes(24, 48, seed=5), trained_backbone(Run(ROOT / "data/runs/scenes-cpu"), torch.device("cpu"))
    images = torch.as_tensor(drawn.images).permute(0, 3, 1, 2)
    maps = feature_maps(vit, images, depth.taps(len(vit.blocks)), norm=False, class_token=True, progress=False)
    metres = torch.as_tensor(drawn.depth).clamp(max=0.99 * FAR)
    metres = metres * (torch.rand(metres.shape) > 0.1)
    return (maps / maps.std()).double(), metres.double(), torch.as_tensor(drawn.masks).long()


def depth_heads(kind: str, width: int) -> tuple[nn.Module, nn.Module, list[str]]:
    """Theirs and ours with the same weights, and how ours are called, in the order of theirs."""
    make, four = there("eval.depth.models").make_head, [width] * 4
    if kind == "DPT":
        theirs = noisy(make(four, 1, use_cls_token=True, head_type="dpt", channels=16, post_process_channels=[4, 6, 8, 12]))
        theirs.conv_depth.head[4].bias.data.fill_(5.0)  # so that no ReLU hides what is before it
        return theirs, load_head(theirs.state_dict(), NEAR, NOWHERE), list(theirs.state_dict())
    theirs, bins = make(four, 256, use_batchnorm=True, use_cls_token=True), depth.bins(NEAR, FAR)
    renamed = {name.replace("batchnorm_layer", "bn"): x for name, x in theirs.state_dict().items()}
    return theirs, load_head({"bins": bins} | renamed), list(renamed)


class Batches(list):
    """As many as an epoch has."""

    sampler = SimpleNamespace(set_epoch=lambda epoch: None)


def their_depth(head: nn.Module, gradient_weight: float, steps: int) -> tuple[nn.Module, list[float]]:
    """Their model after their training with 16 scenes, and the rate of each step."""
    configs, losses = there("eval.depth.config"), there("eval.depth.loss")
    config, (maps, metres, _) = configs.DepthConfig(), scenes()
    blocks = [(x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :, 0, 0]) for x in maps.chunk(4, 1)]
    depther = there("eval.depth.models").Depther(Look(blocks), head, NEAR, FAR).train()
    depther.autocast_ctx = nullcontext  # on a CPU it is half precision
    config.scheduler.total_iter, config.transforms.train = steps, configs.TrainTransformConfig()
    loss = losses.MultiLoss({losses.LossType.SIGLOSS: 1.0, losses.LossType.GRADIENT_LOG_LOSS: gradient_weight})
    loss.dict_losses["SIGLOSS"].warm_iter = steps // 10  # of 100: as many as here
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=DECAY)
    scheduler = there("eval.depth.schedulers").build_scheduler(
        "WarmupOneCycleLR", optimizer, LR, steps, ONE_RATE | {"warmup_iters": steps // 3})  # fmt: skip
    trainer = there("eval.depth.train").IterBasedTrainer(config, depther, Batches([0]), None, loss, [], optimizer, scheduler)
    trainer.rank, rates = "cpu", []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        trainer.train_on_batch((torch.arange(16), metres[:16, None].clone()))
    return depther.eval(), rates


def depth_training() -> Rows:
    with doubles():
        for kind, weight, steps in (("linear head", 0.0, STEPS), ("linear head", 0.5, STEPS), ("DPT", 0.0, STEPS // 4)):
            yield from trained_depth(kind, weight, steps)  # DPT, long: its ReLUs make much of a last bit


def trained_depth(kind: str, weight: float, steps: int) -> Rows:
    """Both learn at the same rates; the linear one without the four bins a side that DINOv2 has and DINOv3 has not."""
    maps, metres, _ = scenes()
    theirs, ours, names = depth_heads(kind, maps.shape[1] // 8)
    depther, rates = their_depth(theirs, weight, steps)
    with patch.object(depth, "warmed_cosine", lambda step, _: rates[step] / LR), patch.object(depth, "UPSAMPLE", 1):
        found = depth.fit_depth(lambda *_: ours, maps[:16], metres[:16], maps[16:], metres[16:], NEAR, FAR, LR, steps=steps,
                                batch_size=16, weight_decay=DECAY, gradient_weight=weight)  # fmt: skip
        told = torch.cat(list(depth.predict_depth(ours, maps, metres.shape[1:])))
    what, named = f"{kind}{' with the loss of gradients' * (weight > 0)}", ours.state_dict()
    learned = relative([x.double() for x in theirs.state_dict().values()], [named[name].double() for name in names])
    yield compared("depth", f"{what}: weights after {steps} steps", *learned, EXACT)
    said = F.interpolate(depther(torch.arange(24)), metres.shape[1:], mode="bilinear")[:, 0]
    yield compared("depth", f"{what}: metres of all pixels", said, told, EXACT)
    held_out = [([torch.tensor([i])], (i, [metres[i, None, None]])) for i in range(16, 24)]
    scores, _, _ = there("eval.depth.eval").evaluate_depther_with_dataloader(
        held_out, depther, "cpu", list(there("eval.depth.metrics").DEPTH_METRICS), (NEAR, NOWHERE),
        there("eval.depth.config").ResultConfig(), eval_mask_type="FULL")  # fmt: skip
    yield compared("depth", f"{what}: errors of 8 scenes", [scores[k] for k in ("rmse", "abs_rel", "log_10", "a1")],
                   [found[k] for k in ("rmse", "abs_rel", "log10", "delta1")], 1e-6)  # theirs are kept in float32  # fmt: skip


def depth_rates() -> Rows:
    """The published length; theirs adds a thousandth of the largest rate to the warm-up and is a step ahead after it."""
    config = there("configs.config").OmegaConf.load(f"{there('eval.depth').__path__[0]}/configs/config-nyu.yaml").scheduler
    optimizer, rates = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0), []
    scheduler = there("eval.depth.schedulers").build_scheduler(
        config.type, optimizer, 1.0, config.total_iter, dict(config.constructor_kwargs))  # fmt: skip
    for _ in range(config.total_iter):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    ours = [depth.warmed_cosine(step, config.total_iter) for step in range(config.total_iter)]
    yield compared("depth", "learning rates of 38,400 steps", rates, ours, 2e-3)


def depth_losses() -> Rows:
    kinds = there("eval.depth.loss")
    with doubles():
        truth = (12 * torch.rand(3, 37, 29) - 2).clamp_min(0)
        two = torch.zeros_like(truth).index_fill(0, torch.tensor(0), 1) * (torch.arange(37 * 29).view(37, 29) < 2)
        cases = {
            "SigLoss": (kinds.SigLoss(warm_up=False), depth.silog_loss, truth > 0),
            "SigLoss, two pixels": (kinds.SigLoss(warm_up=False), depth.silog_loss, two > 0),
            "SigLoss, first steps": (kinds.SigLoss(), partial(depth.silog_loss, warm_up=True), truth > 0),
            "GradientLogLoss": (kinds.GradientLogLoss(), depth.gradient_loss, truth > 0),
        }
        for name, (theirs, ours, valid) in cases.items():
            x = (10 * torch.rand(3, 37, 29) + 0.01).requires_grad_()
            found = theirs(x[:, None], truth[:, None], valid[:, None]), ours(x, truth, valid)
            pair = ([loss, *torch.autograd.grad(loss, x)] for loss in found)
            yield compared("depth", f"{name} and its gradient", *relative(*pair), EXACT)


def depth_errors() -> Rows:
    datasets, metrics = there("eval.depth.datasets.datasets_utils"), there("eval.depth.metrics")
    truth = (12 * torch.rand(6, 1, 480, 640) - 2).clamp_min(0)
    found = truth * (0.5 + torch.rand(truth.shape)) + 0.01
    valid = datasets.make_valid_mask(truth, datasets._EvalCropType("NYU_EIGEN"))
    rows = [metrics.calculate_depth_metrics(t[None], p[None], v[None]) for t, p, v in zip(truth, found, valid, strict=True)]
    mean = [torch.stack([getattr(row, name) for row in rows]).mean() for name in ("rmse", "abs_rel", "log_10", "a1")]
    ours = depth.depth_errors(found[:, 0], truth[:, 0], valid[:, 0])
    yield compared("depth", "errors inside Eigen's crop", mean, [ours[k] for k in ("rmse", "abs_rel", "log10", "delta1")], 1e-5)
