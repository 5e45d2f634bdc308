"""One batch in, the weighted losses out: the one place where all pieces meet.

    teacher(whole global crops)                       -> targets
    student(global crops with holes, local crops)     -> DINO on class tokens + iBOT on hidden patches + KoLeo
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from minidino.images.batches import Batch
from minidino.learning import prototypes
from minidino.learning.losses import (
    AllReduce,
    alone,
    koleo_loss,
    sinkhorn_knopp,
    softmax_center,
    token_loss,
    update_center,
)
from minidino.learning.prototypes import Potentials, center_potentials, sinkhorn_potentials
from minidino.learning.teacher import Imitator, Network
from minidino.model.vit import Tokens, VisionTransformer

Temperatures = float | tuple[float, float]  # of class tokens and of patches


class Center(NamedTuple):
    """Running means of the teacher's logits, for targets="centering"."""

    dino: Float[Tensor, "1 K"] | None  # None: nothing has been seen yet
    ibot: Float[Tensor, "1 K"] | None


class Targets(NamedTuple):
    """Of the teacher: tensors of probabilities, or what stands for them."""

    dino: Float[Tensor, "G B K"] | Potentials
    ibot: Float[Tensor, "M K"] | Potentials | None  # None: iBOT is off


class TeacherLogits(NamedTuple):
    """Before Sinkhorn or centring, and before the temperature."""

    dino: Float[Tensor, "G B K"]
    ibot: Float[Tensor, "M K"] | None


class TokenTargets(NamedTuple):
    """Of a teacher without heads: its normed tokens of the global crops."""

    class_tokens: Float[Tensor, "G B D"]
    patch_tokens: Float[Tensor, "G B N D"]


@torch.no_grad()
def teacher_logits(teacher: Network, batch: Batch, ibot: bool = True) -> TeacherLogits:
    """What the teacher says of the whole global crops: of each image, and of the patches that the student won't see."""
    n_global, n_images = batch.crops_global.shape[:2]
    tokens = teacher.backbone.forward_features(batch.crops_global.flatten(0, 1))
    dino = teacher.dino_head(tokens.x_norm_clstoken).unflatten(0, (n_global, n_images))
    if not ibot:
        return TeacherLogits(dino, None)
    return TeacherLogits(dino, teacher.ibot_head(tokens.x_norm_patchtokens[batch.masks.flatten(0, 1)]))


def make_targets(
    logits: TeacherLogits,
    teacher_temp: Temperatures,
    all_reduce: AllReduce = alone,
    targets: str = "sinkhorn",
    center: Center | None = None,
    impl: str = "reference",
) -> tuple[Targets, Center | None]:
    """Turn logits into targets; the views of a batch are balanced together. Also the next center, if centring.

    Args:
        impl: of the prototype loss: "reference" gives probabilities, the others potentials.
    Raises:
        ValueError: targets neither "sinkhorn" nor "centering".
    """
    if targets not in ("sinkhorn", "centering"):
        raise ValueError(f"expected targets 'sinkhorn' or 'centering', got {targets!r}")
    dino_temp, ibot_temp = teacher_temp if isinstance(teacher_temp, tuple) else (teacher_temp, teacher_temp)
    impl = prototypes.resolve(impl, logits.dino.device)

    def targets_of(rows: Tensor, temp: float, mean: Tensor | None) -> tuple[Tensor | Potentials, Tensor | None]:
        """Targets of some rows, and the next running mean, if centring."""
        if targets == "sinkhorn":
            if impl == "reference":
                return sinkhorn_knopp(rows, temp, all_reduce=all_reduce), None
            return sinkhorn_potentials(rows, temp, all_reduce=all_reduce, impl=impl), None
        mean = rows.new_zeros(1, rows.shape[-1]) if mean is None else mean
        told = softmax_center(rows, mean, temp) if impl == "reference" else center_potentials(rows, mean, temp, impl)
        return told, update_center(mean, rows, all_reduce=all_reduce)

    before = center or Center(None, None)
    dino, dino_center = targets_of(logits.dino.flatten(0, 1), dino_temp, before.dino)
    ibot, ibot_center = (None, before.ibot) if logits.ibot is None else targets_of(logits.ibot, ibot_temp, before.ibot)
    found = Targets(dino.unflatten(0, logits.dino.shape[:2]), ibot)
    return found, None if targets == "sinkhorn" else Center(dino_center, ibot_center)


def student_losses(
    student: Network,
    batch: Batch,
    targets: Targets,
    weights: Mapping[str, float],
    student_temp: float = 0.1,
    koleo_views: str = "released",
    n_ibot_crops: float | None = None,
    dino_divisor: str = "fixed",
    impl: str = "reference",
    hide: bool = True,
    gather: Callable[[Tensor], Tensor] = alone,
) -> tuple[dict[str, Tensor], Float[Tensor, "G B D"]]:
    """The student's weighted losses, and its class tokens of the global crops.

    Args:
        weights: of "dino", "ibot" and "koleo"; with targets.ibot None there are no holes either.
        hide: False lets the student see the patches that it answers for, as in distillation.
        koleo_views: "released" spreads both global views, "paper" the first alone.
        n_ibot_crops: what the sum over masked crops is divided by; None: all global crops, as released.
        dino_divisor: without local crops "released" divides the two pairs by 3, "fixed" by 2.
        impl: of the prototype loss, as it was for the targets.
        gather: (B, G, D) -> class tokens of all processes and parts, among which KoLeo looks for neighbours.
    """
    n_global, n_images = batch.crops_global.shape[:2]
    n_local = len(batch.crops_local)
    masks = None if targets.ibot is None else batch.masks.flatten(0, 1)
    tokens = _look(student, batch, masks if hide else None)
    class_tokens = torch.cat([t.x_norm_clstoken for t in tokens])  # (V * B, D)
    head, shape = student.dino_head, (n_global + n_local, n_images)
    seen = head.bottleneck(class_tokens).unflatten(0, shape)  # (V, B, b)
    dino = prototypes.dino_loss(seen, head.prototypes(), targets.dino, student_temp, impl)
    if n_local == 0 and dino_divisor == "released":
        dino = dino * 2 / 3
    losses = {"dino": weights["dino"] * dino, "ibot": dino.new_zeros(()), "koleo": dino.new_zeros(())}
    if masks is not None:
        head, n_crops = student.ibot_head, len(masks) if n_ibot_crops is None else n_ibot_crops
        hidden = head.bottleneck(tokens[0].x_norm_patchtokens[masks])  # (M, b)
        losses["ibot"] = weights["ibot"] * prototypes.ibot_loss(
            hidden, head.prototypes(), targets.ibot, batch.mask_weights, n_crops, student_temp, impl
        )
    class_tokens = class_tokens[: n_global * n_images].unflatten(0, (n_global, n_images))
    if weights["koleo"]:
        spread = gather(class_tokens.transpose(0, 1))[:, : 2 if koleo_views == "released" else 1]
        losses["koleo"] = weights["koleo"] * torch.stack([koleo_loss(view) for view in spread.unbind(1)]).sum()
    return losses, class_tokens


def _look(student: Network, batch: Batch, masks: Tensor | None, local: bool = True) -> list[Tokens]:
    """The student's tokens of the global crops, with holes where masks say so, and of the local ones."""
    crops = [batch.crops_global, batch.crops_local] if local and len(batch.crops_local) else [batch.crops_global]
    return student.backbone.forward_packed([views.flatten(0, 1) for views in crops], [masks, None][: len(crops)])


@torch.no_grad()
def first_look(student: Network, batch: Batch, holes: bool) -> Float[Tensor, "B G D"]:
    """The class tokens that `student_losses` is going to have of the global crops, where it draws the same.

    Args:
        holes: hide the masked patches.
    """
    draws = any(block.drop_path_rate for block in student.backbone.blocks)  # of the local crops too, which then come along
    tokens = _look(student, batch, batch.masks.flatten(0, 1) if holes else None, local=draws)[0]
    return tokens.x_norm_clstoken.unflatten(0, batch.crops_global.shape[:2]).transpose(0, 1)


@torch.no_grad()
def token_targets(teacher: VisionTransformer, batch: Batch) -> TokenTargets:
    """What a teacher without heads says of the whole global crops: its tokens."""
    shape = batch.crops_global.shape[:2]
    tokens = teacher.forward_features(batch.crops_global.flatten(0, 1))
    return TokenTargets(tokens.x_norm_clstoken.unflatten(0, shape), tokens.x_norm_patchtokens.unflatten(0, shape))


def imitation_losses(
    student: Imitator, batch: Batch, targets: TokenTargets
) -> tuple[dict[str, Tensor], Float[Tensor, "G B D"]]:
    """How far a student's mapped tokens are from its teacher's, and its class tokens of the global crops.

    This is not the paper's distillation, which goes through the teacher's heads: see `student_losses`.
    """
    shape = batch.crops_global.shape[:2]
    tokens = student.backbone.forward_features(batch.crops_global.flatten(0, 1))
    losses = {
        "class": token_loss(student.class_map(tokens.x_norm_clstoken), targets.class_tokens.flatten(0, 1)),
        "patch": token_loss(student.patch_map(tokens.x_norm_patchtokens), targets.patch_tokens.flatten(0, 1)),
    }
    return losses, tokens.x_norm_clstoken.unflatten(0, shape)


def ssl_losses(
    student: Network,
    teacher: Network,
    batch: Batch,
    teacher_temp: Temperatures,
    weights: Mapping[str, float],
    all_reduce: AllReduce = alone,
    targets: str = "sinkhorn",
    center: Center | None = None,
    impl: str = "reference",
) -> dict[str, Tensor]:
    """DINOv2's objective of one batch: {"dino", "ibot", "koleo"}, already weighted; their sum is what is minimised.

    Args:
        student, teacher: anything with `backbone`, `dino_head` and `ibot_head`.
        teacher_temp: one temperature, or (of class tokens, of patches).
        weights: of "dino", "ibot" and "koleo". A weight of 0 leaves the term out; without iBOT there are no holes.
        center: from the step before, for targets="centering"; None starts from zeros. The train loop, which keeps
            it, calls the three steps of this function itself.
        impl: of the prototype loss: "reference", "chunked" or "triton".
    Returns:
        Scalars, nats, float32; "koleo" is weight * (sum over the two global views).
    Source: DINOv2 paper, section 4; official dinov2/train/ssl_meta_arch.py forward_backward (b8931f7).
    """
    logits = teacher_logits(teacher, batch, ibot=weights["ibot"] > 0)
    probs, _ = make_targets(logits, teacher_temp, all_reduce, targets, center, impl)
    return student_losses(student, batch, probs, weights, impl=impl)[0]
