"""The objective against naive float64 loops written from the formulas, and what each network may see."""

import copy
import math
from typing import NamedTuple

import pytest
import torch

from minidino.config import RunConfig, override, preset
from minidino.images.batches import Batch, collate
from minidino.images.masks import batch_masks
from minidino.learning.losses import koleo_loss, softmax_center, update_center
from minidino.learning.objective import (
    Center,
    Targets,
    first_look,
    make_targets,
    ssl_losses,
    student_losses,
    teacher_logits,
)
from minidino.learning.teacher import Network, build_student, make_teacher, update_teacher

TINY = [
    "crops.global_size=32", "crops.local_size=16", "vit.width=16", "vit.depth=2", "vit.heads=2", "heads.tied=False",
    "heads.n_prototypes=12", "heads.ibot_n_prototypes=10", "heads.hidden_dim=16", "heads.bottleneck_dim=8",
    "heads.weight_g=released",
]  # fmt: skip
TIED = ["heads.tied=True", "heads.ibot_n_prototypes=None"]
WEIGHTS = {"dino": 0.7, "ibot": 0.4, "koleo": 0.2}
TEMP = 0.05


class Scene(NamedTuple):
    config: RunConfig
    student: Network
    teacher: Network
    batch: Batch


def scene(*changes, n_images=3, n_local=2):
    """A student and a teacher that differ, and a batch of noise with holes."""
    config = override(preset("scenes-cpu"), [*TINY, f"crops.n_local={n_local}", *changes])
    g = torch.Generator().manual_seed(0)
    student = build_student(config)
    teacher = make_teacher(student)
    for network in (student, teacher):
        for p in network.parameters():
            p.data += 0.15 * torch.randn(p.shape, generator=g)
    grid = (config.crops.global_size // config.vit.patch_size,) * 2
    masks = batch_masks(2 * n_images, grid, g, ratio=(0.2, 0.6)).view(2, n_images, -1)
    crops_global, crops_local = (
        torch.randn(n, n_images, 3, size, size, generator=g) for n, size in ((2, 32), (n_local, 16))
    )
    return Scene(config, student, teacher, collate(crops_global, crops_local, masks, torch.arange(n_images)))


# ---------------------------------------------------------------- the oracle: one crop and one token at a time


def naive_sinkhorn(logits):
    """The released formula with all its factors, in float64."""
    q = (logits.double() / TEMP).exp().T
    q = q / q.sum()
    n_prototypes, n_samples = q.shape
    for _ in range(3):
        q = q / (q.sum(dim=1, keepdim=True) * n_prototypes)
        q = q / (q.sum(dim=0, keepdim=True) * n_samples)
    return (q * n_samples).T


def cross_entropy(target, logits):
    return -(target * torch.log_softmax(logits / 0.1, dim=-1)).sum()


def naive_losses(student, teacher, batch):
    """DINO, iBOT and KoLeo of float64 networks, crop by crop."""
    n_global, n_images = batch.crops_global.shape[:2]
    n_local = len(batch.crops_local)
    crops = {(g, b): batch.crops_global[g, b][None].double() for g in range(n_global) for b in range(n_images)}
    with torch.no_grad():
        told = {key: teacher.backbone.forward_features(crop) for key, crop in crops.items()}
        classes = torch.cat([teacher.dino_head(t.x_norm_clstoken) for t in told.values()])
        hidden = [teacher.ibot_head(told[g, b].x_norm_patchtokens[0][batch.masks[g, b]]) for g, b in crops]
    dino_targets = dict(zip(crops, naive_sinkhorn(classes), strict=True))
    counts = [len(rows) for rows in hidden]
    ibot_targets = dict(zip(crops, naive_sinkhorn(torch.cat(hidden)).split(counts), strict=True))
    seen = {(g, b): student.backbone.forward_features(crop, batch.masks[g, b][None]) for (g, b), crop in crops.items()}
    for v in range(n_local):
        for b in range(n_images):
            local = batch.crops_local[v, b][None].double()
            seen[n_global + v, b] = student.backbone.forward_features(local)
    dino, ibot, koleo = 0.0, 0.0, 0.0
    for (g, b), target in dino_targets.items():
        for v in range(n_global + n_local):
            if v != g:
                dino += cross_entropy(target, student.dino_head(seen[v, b].x_norm_clstoken)[0]) / n_images
    dino = dino / (2 + 2 * n_local)
    for (g, b), targets in ibot_targets.items():
        logits = student.ibot_head(seen[g, b].x_norm_patchtokens[0][batch.masks[g, b]])
        for target, row in zip(targets, logits, strict=True):
            ibot += cross_entropy(target, row) / len(targets) / (2 * n_images)
    for g in range(n_global):
        unit = [seen[g, b].x_norm_clstoken[0] / seen[g, b].x_norm_clstoken[0].norm() for b in range(n_images)]
        for i in range(n_images):
            nearest = min((unit[i] - unit[j]).norm() for j in range(n_images) if j != i)
            koleo -= nearest.log() / n_images
    return {name: WEIGHTS[name] * value for name, value in (("dino", dino), ("ibot", ibot), ("koleo", koleo))}


@pytest.mark.parametrize(
    "changes, n_local",
    [([], 2), (TIED, 2), ([], 0), (["vit.num_register_tokens=2", "heads.weight_norm=False"], 1)],
    ids=["untied", "tied", "no local crops", "registers, plain prototypes"],
)
def test_losses_and_every_gradient_equal_the_naive_loops(changes, n_local):
    _, student, teacher, batch = scene(*changes, n_local=n_local)
    student64, teacher64 = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    ours = ssl_losses(student, teacher, batch, TEMP, WEIGHTS)
    naive = naive_losses(student64, teacher64, batch)
    for name in WEIGHTS:
        assert ours[name].dtype == torch.float32
        assert ours[name].item() == pytest.approx(naive[name].item(), rel=1e-4), name
    sum(ours.values()).backward()
    sum(naive.values()).backward()
    theirs = dict(student64.named_parameters())
    for name, p in student.named_parameters():
        error = (p.grad.double() - theirs[name].grad).norm()
        assert error <= 1e-3 * theirs[name].grad.norm() + 1e-6, name
        assert theirs[name].grad.norm() > 0, name
    assert all(p.grad is None for p in teacher.parameters())


# ---------------------------------------------------------------- who sees what


def test_tied_heads_are_one_module():
    tied, untied = scene(*TIED).student, scene().student
    assert tied.ibot_head is tied.dino_head and list(tied.parts()) == ["backbone", "dino_head"]
    assert list(untied.parts()) == ["backbone", "dino_head", "ibot_head"]
    assert untied.ibot_head.last_layer.weight_v.shape == (10, 8)
    assert untied.dino_head.last_layer.weight_v.shape == (12, 8)
    copied = make_teacher(tied)
    assert copied.ibot_head is copied.dino_head and copied.dino_head is not tied.dino_head


def test_the_teacher_sees_whole_crops_and_is_asked_about_the_holes():
    _, _, teacher, batch = scene()
    logits = teacher_logits(teacher, batch)
    other = batch._replace(masks=~batch.masks)
    torch.testing.assert_close(teacher_logits(teacher, other).dino, logits.dino, rtol=0, atol=0)
    tokens = teacher.backbone.forward_features(batch.crops_global.flatten(0, 1))
    expected = torch.stack([
        teacher.ibot_head(tokens.x_norm_patchtokens[crop, patch])
        for crop, patch in batch.masks.flatten(0, 1).nonzero().tolist()
    ])  # fmt: skip
    torch.testing.assert_close(logits.ibot, expected, rtol=1e-5, atol=1e-5)
    assert not logits.dino.requires_grad and not logits.ibot.requires_grad
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def targets_of(teacher, batch, ibot=True):
    return make_targets(teacher_logits(teacher, batch, ibot), TEMP)[0]


def test_the_students_class_token_comes_from_the_crop_with_holes():
    _, student, teacher, batch = scene()
    _, class_tokens = student_losses(student, batch, targets_of(teacher, batch), WEIGHTS)
    crops, masks = batch.crops_global.flatten(0, 1), batch.masks.flatten(0, 1)
    holed = student.backbone.forward_features(crops, masks).x_norm_clstoken.unflatten(0, (2, 3))
    whole = student.backbone.forward_features(crops).x_norm_clstoken.unflatten(0, (2, 3))
    torch.testing.assert_close(class_tokens, holed, rtol=1e-4, atol=1e-5)
    has_hole = batch.masks.any(-1)
    assert ((holed - whole).abs().amax(-1) > 1e-3).equal(has_hole)


@pytest.mark.parametrize("holes", [True, False])
@pytest.mark.parametrize("changes, passes", [((), "global"), (("vit.drop_path_rate=0.5",), "all")])
def test_a_first_look_has_the_class_tokens_of_the_losses(changes, passes, holes):
    """Also what stochastic depth drops; then local crops are looked at, too, since they draw."""
    _, student, teacher, batch = scene(*changes)
    seen = []
    student.backbone.patch_embed.register_forward_hook(lambda *told: seen.append(len(told[1][0])))
    torch.manual_seed(0)
    first = first_look(student, batch, holes)
    assert seen == [6] if passes == "global" else seen == [6, 3 * len(batch.crops_local)]
    torch.manual_seed(0)
    _, class_tokens = student_losses(student, batch, targets_of(teacher, batch), WEIGHTS, hide=holes)
    torch.testing.assert_close(first.transpose(0, 1), class_tokens, rtol=1e-5, atol=1e-6)
    assert not first.requires_grad


def test_no_view_predicts_itself():
    _, student, teacher, batch = scene(n_local=0)
    pixels = batch.crops_global.requires_grad_()
    targets = targets_of(teacher, batch)
    one_view = targets.dino.clone()
    one_view[1] = 0  # the cross-entropy is linear in its target: only view 0 is told now
    losses, _ = student_losses(student, batch, Targets(one_view, targets.ibot), {"dino": 1.0, "ibot": 0.0, "koleo": 0})
    (gradient,) = torch.autograd.grad(losses["dino"], pixels)
    assert gradient[0].abs().max() == 0 and gradient[1].abs().max() > 0


# ---------------------------------------------------------------- switches


def test_koleo_views():
    _, student, teacher, batch = scene()
    targets = targets_of(teacher, batch)
    both, tokens = student_losses(student, batch, targets, WEIGHTS, koleo_views="released")
    first, _ = student_losses(student, batch, targets, WEIGHTS, koleo_views="paper")
    views = [koleo_loss(view).item() for view in tokens]
    assert both["koleo"].item() == pytest.approx(0.2 * sum(views), rel=1e-5)
    assert first["koleo"].item() == pytest.approx(0.2 * views[0], rel=1e-5)


def test_ibot_divisor():
    _, student, teacher, batch = scene()
    targets = targets_of(teacher, batch)
    released, _ = student_losses(student, batch, targets, WEIGHTS)
    paper, _ = student_losses(student, batch, targets, WEIGHTS, n_ibot_crops=int(batch.masks.any(-1).sum()))
    assert paper["ibot"].item() == pytest.approx(2 * released["ibot"].item(), rel=1e-5)  # half of the crops are masked


@pytest.mark.parametrize("n_local, ratio", [(0, 2 / 3), (1, 1)])
def test_dino_divisor_matters_without_local_crops_alone(n_local, ratio):
    _, student, teacher, batch = scene(n_local=n_local)
    targets = targets_of(teacher, batch)
    fixed, released = (
        student_losses(student, batch, targets, WEIGHTS, dino_divisor=divisor)[0]["dino"].item()
        for divisor in ("fixed", "released")
    )
    assert released == pytest.approx(ratio * fixed, rel=1e-6)


@pytest.mark.parametrize("kind, trains", [("released", True), ("paper", False)])
def test_weight_g(kind, trains):
    _, student, teacher, batch = scene(f"heads.weight_g={kind}")
    sum(ssl_losses(student, teacher, batch, TEMP, WEIGHTS).values()).backward()
    for head in (student.dino_head, student.ibot_head):
        assert (head.last_layer.weight_g.grad is not None) == trains
        assert head.last_layer.weight_v.grad.norm() > 0


def test_a_weight_of_zero_leaves_the_term_out():
    _, student, teacher, batch = scene()
    logits = teacher_logits(teacher, batch, ibot=False)
    assert logits.ibot is None and make_targets(logits, TEMP)[0].ibot is None
    losses = ssl_losses(student, teacher, batch, TEMP, WEIGHTS | {"ibot": 0.0, "koleo": 0.0})
    assert losses["ibot"] == 0 and losses["koleo"] == 0
    losses["dino"].backward()
    assert all(p.grad is None for p in student.ibot_head.parameters())
    assert student.backbone.mask_token.grad is None  # without iBOT there are no holes
    student.zero_grad()
    losses = ssl_losses(student, teacher, batch, TEMP, WEIGHTS | {"dino": 0.0})
    sum(losses.values()).backward()
    assert losses["dino"] == 0 and all(p.grad.abs().max() == 0 for p in student.dino_head.parameters())
    assert student.ibot_head.last_layer.weight_v.grad.norm() > 0


def test_an_image_without_its_like_has_no_koleo():
    _, student, teacher, batch = scene(n_images=1)
    with pytest.raises(ValueError, match="got 1"):
        ssl_losses(student, teacher, batch, TEMP, WEIGHTS)
    assert ssl_losses(student, teacher, batch, TEMP, WEIGHTS | {"koleo": 0.0})["dino"].isfinite()


def test_a_batch_without_holes_costs_nothing_in_ibot():
    _, student, teacher, batch = scene()
    batch = batch._replace(masks=batch.masks & False, mask_weights=torch.zeros(0))
    losses = ssl_losses(student, teacher, batch, TEMP, WEIGHTS)
    sum(losses.values()).backward()
    assert losses["ibot"] == 0
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


# ---------------------------------------------------------------- targets


def test_centering_uses_the_center_of_the_step_before():
    _, _, teacher, batch = scene()
    logits, center = teacher_logits(teacher, batch), None
    ours, running = [], Center(torch.zeros(1, 12), torch.zeros(1, 10))
    for _ in range(3):
        targets, center = make_targets(logits, (0.05, 0.08), targets="centering", center=center)
        torch.testing.assert_close(targets.dino, softmax_center(logits.dino, running.dino, 0.05))
        torch.testing.assert_close(targets.ibot, softmax_center(logits.ibot, running.ibot, 0.08))
        running = Center(
            0.9 * running.dino + 0.1 * logits.dino.flatten(0, 1).mean(0, keepdim=True),
            update_center(running.ibot, logits.ibot),
        )
        torch.testing.assert_close(center.dino, running.dino)
        torch.testing.assert_close(center.ibot, running.ibot)
        ours.append(targets.dino)
    torch.testing.assert_close(ours[0], torch.softmax(logits.dino / 0.05, -1))  # no center yet
    assert (ours[1] - ours[0]).abs().max() > 1e-3


def test_the_center_of_patches_begins_when_ibot_enters():
    _, _, teacher, batch = scene()
    logits = teacher_logits(teacher, batch)
    none, center = make_targets(logits._replace(ibot=None), 0.05, targets="centering")
    assert none.ibot is None and center.ibot is None and center.dino.shape == (1, 12)
    targets, center = make_targets(logits, 0.05, targets="centering", center=center)
    torch.testing.assert_close(targets.ibot, torch.softmax(logits.ibot / 0.05, -1))
    torch.testing.assert_close(center.ibot, 0.1 * logits.ibot.mean(0, keepdim=True))


def test_sinkhorn_balances_the_views_together_and_keeps_its_temperatures_apart():
    _, _, teacher, batch = scene()
    logits = teacher_logits(teacher, batch)
    targets, center = make_targets(logits, (0.05, 0.5))
    assert center is None
    torch.testing.assert_close(
        targets.dino.flatten(0, 1).double(), naive_sinkhorn(logits.dino.flatten(0, 1)), rtol=1e-4, atol=1e-6
    )
    same, _ = make_targets(logits, 0.05)
    torch.testing.assert_close(same.dino, targets.dino, rtol=0, atol=0)
    assert targets.ibot.amax(-1).mean() < same.ibot.amax(-1).mean() - 0.1  # warmer patches are less sure


def test_other_targets_are_refused():
    _, _, teacher, batch = scene()
    with pytest.raises(ValueError, match="expected targets 'sinkhorn' or 'centering', got 'softmax'"):
        make_targets(teacher_logits(teacher, batch), TEMP, targets="softmax")


@pytest.mark.parametrize("targets, n_max, n_sum", [("sinkhorn", 2, 6), ("centering", 0, 4)])
def test_targets_are_reduced_over_all_processes(targets, n_max, n_sum):
    _, student, teacher, batch = scene()
    asked = []

    def all_reduce(tensor, op="sum"):
        asked.append(op)
        return tensor

    ssl_losses(student, teacher, batch, TEMP, WEIGHTS, all_reduce, targets)
    assert (asked.count("max"), asked.count("sum")) == (n_max, n_sum)


# ---------------------------------------------------------------- the teacher


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.996, 1.0])
@pytest.mark.parametrize("changes", [[], TIED], ids=["untied", "tied"])
def test_ema_is_its_formula(changes, momentum):
    _, student, teacher, _ = scene(*changes)
    expected = {
        name: momentum * p.double() + (1 - momentum) * student.get_parameter(name).double()
        for name, p in teacher.named_parameters()
    }
    before = [p.clone() for p in student.parameters()]
    update_teacher(teacher, student, momentum)
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-6, atol=1e-7, msg=name)
        assert not p.requires_grad
    assert all(map(torch.equal, before, student.parameters()))


def test_teacher_starts_as_a_copy_of_its_own():
    student = build_student(scene().config)
    teacher = make_teacher(student)
    assert all(map(torch.equal, teacher.parameters(), student.parameters()))
    student.backbone.cls_token.data += 1
    assert not torch.equal(teacher.backbone.cls_token, student.backbone.cls_token)
    assert student.training and not teacher.training


def test_start_values_are_ln_k():
    """Unsure networks cost ln K, whatever the weights and the views."""
    config, _, _, batch = scene("heads.n_prototypes=4096", "heads.ibot_n_prototypes=None", "heads.mlp_gain=None")
    student = build_student(config)
    for head in (student.dino_head, student.ibot_head):
        head.last_layer.weight_g.data.mul_(1e-4)
    losses = ssl_losses(student, make_teacher(student), batch, 0.07, {"dino": 1.0, "ibot": 1.0, "koleo": 0.0})
    assert losses["dino"].item() == pytest.approx(math.log(4096), abs=2e-3)
    assert losses["ibot"].item() == pytest.approx(math.log(4096) / 2, abs=2e-3)  # divided by unmasked crops too
