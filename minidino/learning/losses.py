"""The formulas of DINOv2's objective as functions of tensors: two kinds of targets, three losses; one for imitation.

Everything is computed and returned in float32, whatever comes in. Logits are never yet divided by a temperature.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

AllReduce = Callable[..., Tensor]  # (tensor, op="sum" | "max") -> the tensor reduced over all processes

TINY = torch.finfo(torch.float32).tiny


def alone(tensor: Tensor, op: str = "sum") -> Tensor:
    """Reduce over one process: hand the tensor back as it is."""
    return tensor


@torch.no_grad()
def sinkhorn_knopp(
    logits: Float[Tensor, "B K"], teacher_temp: float, n_iterations: int = 3, all_reduce: AllReduce = alone
) -> Float[Tensor, "B K"]:
    """Turn teacher logits into targets that use all prototypes about equally often.

        Q = exp((z - max z) / temp);  repeat: divide each column by its sum, then each row by its sum

    Columns (prototypes) are summed over the images of all processes, rows (images) over the prototypes.

    Args:
        logits: one row for each token of this process; B may be 0, also in only some of the processes.
        teacher_temp: 0.04 to 0.07 in the published recipes.
        n_iterations: passes over columns and rows; 0 leaves the exponentials as they are, which is no distribution.
        all_reduce: called once with "max" and n_iterations times with "sum", by every process.
    Returns:
        Probabilities, float32, without gradient. Rows sum to 1; columns to about (rows of all processes) / K.
    Raises:
        ValueError: logits of other than two axes.
    Source: DINOv2 paper, section 4; Caron et al. 2020 (SwAV); official dinov2/loss/dino_clstoken_loss.py (b8931f7).
    Differs: the global maximum is subtracted, so exp cannot overflow (the official code does from logits of 3.54 at
        temp 0.04). The official factors 1/sum(Q), 1/K, 1/B and B cancel in the last row division and are left out,
        so no count travels between processes. Sums that underflow to 0 are kept from dividing 0 by 0.
    """
    if logits.ndim != 2:
        raise ValueError(f"expected logits (B, K), got {tuple(logits.shape)}: views have to be flattened")
    logits = logits.float()
    peak = logits.max() if logits.numel() else logits.new_tensor(-torch.inf)
    probs = ((logits - all_reduce(peak, op="max")) / teacher_temp).exp()
    for _ in range(n_iterations):
        probs = probs / all_reduce(probs.sum(dim=0, keepdim=True), op="sum").clamp(min=TINY)
        probs = probs / probs.sum(dim=1, keepdim=True).clamp(min=TINY)
    return probs


@torch.no_grad()
def softmax_center(
    logits: Float[Tensor, "*rows K"], center: Float[Tensor, "1 K"], teacher_temp: float
) -> Float[Tensor, "*rows K"]:
    """Turn teacher logits into targets by taking the running mean away before the softmax.

        p = softmax((z - center) / temp)

    Args:
        logits: any number of leading axes.
        center: from `update_center` at the step before: the released one-call lag.
        teacher_temp: 0.04 to 0.07 in the published recipes.
    Returns:
        Probabilities, float32, without gradient.
    Source: Caron et al. 2021 (DINO), section 3.1; official dinov2/loss/dino_clstoken_loss.py (b8931f7).
    """
    return F.softmax((logits.float() - center.float()) / teacher_temp, dim=-1)


@torch.no_grad()
def update_center(
    center: Float[Tensor, "1 K"],
    logits: Float[Tensor, "*rows K"],
    momentum: float = 0.9,
    all_reduce: AllReduce = alone,
) -> Float[Tensor, "1 K"]:
    """Move the running mean of the teacher logits towards this batch; a new tensor, the old one stays.

        center' = momentum * center + (1 - momentum) * mean of the logits over all rows of all processes

    Without a single row anywhere the center stays where it was.

    Args:
        center: the running mean, zeros at the start.
        logits: any number of leading axes; they count as rows.
        momentum: 0.9 in the released code.
        all_reduce: called twice with "sum", by every process.
    Returns:
        The next center, float32, without gradient.
    Source: Caron et al. 2021 (DINO), eq. 4; official dinov2/loss/dino_clstoken_loss.py (b8931f7).
    Differs: the count of rows is reduced too, so processes may hold different numbers of masked patches.
    """
    center, rows = center.float(), logits.float().flatten(0, -2)
    total = all_reduce(rows.sum(dim=0, keepdim=True), op="sum")
    n_rows = all_reduce(center.new_tensor(len(rows)), op="sum")
    moved = momentum * center + (1 - momentum) * total / n_rows.clamp(min=1)
    return torch.where(n_rows > 0, moved, center)


def dino_loss(
    student_logits: Float[Tensor, "V B K"], teacher_probs: Float[Tensor, "G B K"], student_temp: float = 0.1
) -> Float[Tensor, ""]:
    """Let every student view predict the teacher's other views of the same image.

        loss = mean over pairs (g, v), g != v, and over images, of  - sum_k t_g,k log softmax(s_v / temp)_k

    Args:
        student_logits: the first G views are the global crops, in the teacher's order; the rest are local crops.
        teacher_probs: targets of the global crops.
        student_temp: 0.1 in the published recipes.
    Returns:
        Scalar, nats, float32; ln K when the student knows nothing.
    Raises:
        ValueError: fewer student than teacher views, no pair of different views, or shapes that do not fit.
    Source: DINOv2 paper, section 4; official dinov2/loss/dino_clstoken_loss.py and ssl_meta_arch.py (b8931f7).
    Differs: with G = 2 and local crops this is the released sum over pairs / (2 + 2 L). Without local crops the
        released code divides the two pairs by 3, here it is by 2.
    """
    n_teacher, n_student = len(teacher_probs), len(student_logits)
    check_views(n_student, n_teacher)
    if student_logits.ndim != 3 or student_logits.shape[1:] != teacher_probs.shape[1:]:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_probs.shape)}"
        raise ValueError(f"expected student logits (V, B, K) and teacher probabilities (G, B, K), got {shapes}")
    pairs = [(g, v) for g in range(n_teacher) for v in range(n_student) if g != v]
    log_probs = F.log_softmax(student_logits.float() / student_temp, dim=-1)  # (V, B, K)
    targets = teacher_probs.float()
    return -torch.stack([(targets[g] * log_probs[v]).sum(dim=-1).mean() for g, v in pairs]).mean()


def check_views(n_student: int, n_teacher: int) -> None:
    """Raise ValueError where a teacher view has no student view, or there is no pair of different views."""
    if n_student < max(n_teacher, 2) or not n_teacher:
        raise ValueError(
            f"expected at least as many student as teacher views, and two different views; got {n_student} student "
            f"and {n_teacher} teacher views: stack the student's global crops first, then its local crops"
        )


def ibot_loss(
    student_logits: Float[Tensor, "M K"],
    teacher_probs: Float[Tensor, "M K"],
    mask_weights: Float[Tensor, "M"],
    n_crops: int | float,
    student_temp: float = 0.1,
) -> Float[Tensor, ""]:
    """Let the student name the patches it was not shown.

        loss = 1/n_crops  sum_m  w_m * ( - sum_k t_m,k log softmax(s_m / temp)_k )

    Args:
        student_logits: one row for each masked patch of the batch.
        teacher_probs: the targets of the same patches.
        mask_weights: 1 / (number of masked patches in that patch's crop), so each masked crop weighs 1.
        n_crops: all global crops of this process, G * B, the unmasked ones too: the released divisor. Hand in the
            number of masked crops for the mean over those, about twice as much.
        student_temp: 0.1 in the published recipes.
    Returns:
        Scalar, nats, float32; 0 (with a gradient of 0) when nothing is masked.
    Raises:
        ValueError: shapes that do not fit.
    Source: DINOv2 paper, section 4; Zhou et al. 2022 (iBOT); official dinov2/loss/ibot_patch_loss.py (b8931f7).
    """
    shapes = [tuple(x.shape) for x in (student_logits, teacher_probs, mask_weights)]
    if len(shapes[0]) != 2 or shapes[1] != shapes[0] or shapes[2] != shapes[0][:1]:
        raise ValueError(f"expected logits (M, K), probabilities (M, K) and weights (M,), got {shapes}")
    log_probs = F.log_softmax(student_logits.float() / student_temp, dim=-1)
    cross_entropy = -(teacher_probs.float() * log_probs).sum(dim=-1)  # (M,)
    return (mask_weights.float() * cross_entropy).sum() / n_crops


def koleo_loss(x: Float[Tensor, "B D"], eps: float = 1e-8) -> Float[Tensor, ""]:
    """Spread a batch out: minus the mean log-distance to the nearest neighbour.

        loss = -1/B  sum_i  log( || x_i - x_nn(i) + eps || + eps )        (x L2-normalised, distances in [0, 2])

    Args:
        x: class tokens of one global crop of each image, before the head; any length.
        eps: added to the difference and to the distance, so that two equal images cost about 15 nats, not infinity.
    Returns:
        Scalar, nats, float32 whatever the dtype of x. Lower is more spread. The choice of neighbours has no gradient.
    Raises:
        ValueError: fewer than two rows; there is no neighbour.
    Source: DINOv2 paper, section 4; Sablayrolles et al. 2019; official dinov2/loss/koleo_loss.py (b8931f7).
    Differs: computed in float32 always; the official code keeps fp16 under FSDP, where eps is 0. A row is never its
        own neighbour; in the official code it is when its best other dot product is -1.
    """
    if len(x) < 2:
        raise ValueError(f"expected at least 2 rows, got {len(x)}: KoLeo needs a neighbour; raise the batch size")
    x = F.normalize(x.float(), dim=-1, eps=eps)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # autocast would search in half precision
        nearest = (x @ x.T).fill_diagonal_(-torch.inf).argmax(dim=1)
    distance = F.pairwise_distance(x, x[nearest], eps=eps)
    return -(distance + eps).log().mean()


def token_loss(student: Float[Tensor, "*n D"], teacher: Float[Tensor, "*n D"]) -> Float[Tensor, ""]:
    """How far tokens are from those of another network, in direction and in length.

        loss = mean over tokens of (1 - cosine) + mean over their numbers of smooth-L1, with its bend at 1

    Args:
        student: tokens mapped to the teacher's width.
        teacher: its tokens after the last norm, whose numbers are of size 1.
    Returns:
        Scalar, float32; 0 where both are equal.
    Source: ours, of the usual parts; DINOv2 distils through its heads instead (paper, section 5).
    """
    student, teacher = student.float(), teacher.float()
    apart = 1 - F.cosine_similarity(student, teacher, dim=-1)
    return apart.mean() + F.smooth_l1_loss(student, teacher)
