"""The two losses over prototypes without the memory of their logits, and the choice of who computes them.

One head's logits are (rows x K) numbers, 1.3 GB in the published iBOT loss, and the plain losses keep four or five
such tensors at a time. Here the teacher's logits are stored once, its probabilities are two vectors (`Potentials`), and
what the student says is looked at in parts of K and forgotten. The operation exists three times, with one signature:

    reference   full logits, as in the formula
    chunked     plain torch over parts of K; a second look on the way back
    triton      minidino.kernels.prototypes: parts that never leave the chip
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minidino.learning import losses
from minidino.learning.losses import TINY, AllReduce, alone
from minidino.model.attention import autocast_off, no_triton

FLOOR = -150 * math.log(2)  # exp of less is 0 in float32
PART = {"cpu": 1 << 18, "cuda": 1 << 24}  # numbers looked at in one turn
BOOST = 1024.0  # the largest gradient of a logit, before it is rounded to half precision
MOST = 2.0**15  # half of what float16 can hold
SMALLEST = 1e-30


class Potentials(NamedTuple):
    """Teacher probabilities that are not stored; cut like the tensor that they stand for.

        p_ik = exp((l_ik - peak) / temp + row_i + column_k),   0 where (l_ik - peak) / temp is at most floor

    A logit that is not a number gives a probability that is none.

    Source: Cuturi 2013 (Sinkhorn distances): the plan is the kernel between two diagonal matrices.
    """

    index: Int[Tensor, "..."]  # which row of the logits stands where: (G, B) or (M,)
    logits: Float[Tensor, "n K"]
    row: Float[Tensor, "n"]
    column: Float[Tensor, "K"]
    peak: Float[Tensor, ""]
    temp: float
    floor: float

    def unflatten(self, dim: int, sizes: tuple[int, ...]) -> "Potentials":
        return self._replace(index=self.index.unflatten(dim, sizes))

    def chunk(self, n: int, dim: int = 0) -> list["Potentials"]:
        return [self._replace(index=index) for index in self.index.chunk(n, dim)]

    def split(self, sizes: list[int]) -> list["Potentials"]:
        return [self._replace(index=index) for index in self.index.split(sizes)]

    def dense(self) -> Float[Tensor, "... K"]:
        """The tensor that this stands for."""
        return _probabilities(self, self.index, slice(None))


Targets = Float[Tensor, "... K"] | Potentials


def dense(targets: Targets) -> Float[Tensor, "... K"]:
    """The probabilities as a tensor."""
    return targets.dense() if isinstance(targets, Potentials) else targets


# ---------------------------------------------------------------- from logits to potentials


@torch.no_grad()
def sinkhorn_potentials(
    logits: Float[Tensor, "n K"],
    teacher_temp: float,
    n_iterations: int = 3,
    all_reduce: AllReduce = alone,
    impl: str = "auto",
) -> Potentials:
    """The targets of `sinkhorn_knopp`, as two vectors: each pass looks at the logits and writes nothing of their size.

        column -= log of the column's sum;   row -= log of the row's sum

    Args:
        logits, teacher_temp, n_iterations, all_reduce: as there, with as many calls.
        impl: "triton" for the kernels, any other name for plain torch.
    Source: Cuturi 2013 (Sinkhorn distances, arXiv 1306.0895), in logarithms.
    """
    log_row_sums, column_sums = _sums(resolve(impl, logits.device))
    peak = logits.max().float() if logits.numel() else logits.new_tensor(-torch.inf, dtype=torch.float32)
    peak = all_reduce(peak, op="max")
    row = logits.new_zeros(len(logits), dtype=torch.float32)
    column = logits.new_zeros(logits.shape[1], dtype=torch.float32)
    for _ in range(n_iterations):
        sums = column_sums(logits, row, column, peak, teacher_temp, FLOOR)
        column = column - all_reduce(sums, op="sum").clamp(min=TINY).log()
        sums = row + log_row_sums(logits, column, peak, teacher_temp, FLOOR)
        row = row - sums.clamp(min=math.log(TINY))
    index = torch.arange(len(logits), device=logits.device)
    return Potentials(index, logits, row, column, peak, teacher_temp, FLOOR)


@torch.no_grad()
def center_potentials(
    logits: Float[Tensor, "n K"], center: Float[Tensor, "1 K"], teacher_temp: float, impl: str = "auto"
) -> Potentials:
    """The targets of `softmax_center`, as two vectors. One look at the logits."""
    log_row_sums, _ = _sums(resolve(impl, logits.device))
    column, peak = -center.float()[0] / teacher_temp, logits.new_zeros((), dtype=torch.float32)
    row = -log_row_sums(logits, column, peak, teacher_temp, -math.inf)
    index = torch.arange(len(logits), device=logits.device)
    return Potentials(index, logits, row, column, peak, teacher_temp, -math.inf)


def _sums(impl: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    if impl != "triton":
        return _log_row_sums, _column_sums
    from minidino.kernels import sinkhorn as kernels

    return kernels.log_row_sums, kernels.column_sums


def _log_row_sums(logits: Tensor, column: Tensor, peak: Tensor, temp: float, floor: float) -> Tensor:
    sums = logits.new_full((len(logits),), -torch.inf, dtype=torch.float32)
    for part in _parts(logits.shape[1], len(logits), logits.device):
        z = (logits[:, part].float() - peak) / temp
        z = torch.where(z <= floor, -torch.inf, z + column[part])
        sums = torch.logaddexp(sums, z.logsumexp(1))
    return sums


def _column_sums(logits: Tensor, row: Tensor, column: Tensor, peak: Tensor, temp: float, floor: float) -> Tensor:
    every = Potentials(torch.arange(len(logits), device=logits.device), logits, row, column, peak, temp, floor)
    parts = _parts(logits.shape[1], len(logits), logits.device)
    return torch.cat([_probabilities(every, every.index, part).sum(0) for part in parts])


def _probabilities(teacher: Potentials, index: Tensor, part: slice) -> Tensor:
    """Of some rows and a part of the columns."""
    z = (teacher.logits[:, part][index].float() - teacher.peak) / teacher.temp
    shift = teacher.row[index][..., None] + teacher.column[part]
    return torch.where(z <= teacher.floor, 0.0, (z + shift).exp())


def _parts(n: int, n_rows: int, device: torch.device) -> Iterator[slice]:
    """Slices of n columns, of a size that so many rows may look at together."""
    size = max(PART.get(device.type, PART["cpu"]) // max(n_rows, 1), 64)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


# ---------------------------------------------------------------- the operation, three times


def _loss_reference(
    student: Tensor, prototypes: Tensor, teacher: Potentials, index: Tensor, weight: Tensor, student_temp: float
) -> Tensor:
    """Full logits, full targets."""
    with autocast_off(student):
        log_probs = F.log_softmax(F.linear(student, prototypes).float() / student_temp, dim=-1)  # (R, K)
    targets = (weight[..., None] * teacher.dense()[index]).sum(1)  # (R, J, K) -> (R, K)
    return -(targets * log_probs).sum(dim=-1)


def _loss_chunked(
    student: Tensor, prototypes: Tensor, teacher: Potentials, index: Tensor, weight: Tensor, student_temp: float
) -> Tensor:
    return _Chunked.apply(student, prototypes, teacher._replace(index=teacher.index[index]), weight, student_temp)


class _Chunked(torch.autograd.Function):
    """Walk over parts of K: once for the loss, once more for the gradients."""

    @staticmethod
    def forward(ctx, student, prototypes, teacher, weight, student_temp):
        lse = student.new_full((len(student),), -torch.inf, dtype=torch.float32)
        cross, mass = torch.zeros_like(lse), torch.zeros_like(lse)
        for part in _parts(len(prototypes), len(student), student.device):
            z, targets = _scores(student, prototypes[part], student_temp), _targets(teacher, weight, part)
            cross += (targets * z).sum(1)
            mass += targets.sum(1)
            lse = torch.logaddexp(lse, z.logsumexp(1))
        ctx.save_for_backward(student, prototypes, weight, lse, mass)
        ctx.teacher, ctx.student_temp = teacher, student_temp
        return mass * lse - cross

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError("prototype loss 'chunked' has no second derivative; choose 'reference'")
        student, prototypes, weight, lse, mass = ctx.saved_tensors
        d_student, d_prototypes = torch.zeros_like(student, dtype=torch.float32), torch.zeros_like(prototypes)
        largest = (grad[:, None] * weight).abs().amax().clamp(min=SMALLEST) if len(student) else 1.0
        boost = min(BOOST, MOST / max(len(student), 1))  # the sum over all rows is rounded to half precision, too
        gain, unit = grad * boost / largest, largest / boost / ctx.student_temp
        for part in _parts(len(prototypes), len(student), student.device):
            g = _scores(student, prototypes[part], ctx.student_temp)
            g.sub_(lse[:, None]).exp_().mul_(mass[:, None]).sub_(_targets(ctx.teacher, weight, part))
            g = g.mul_(gain[:, None]).to(student.dtype)
            with autocast_off(student):
                d_student += g @ prototypes[part]
                d_prototypes[part] = (g.T @ student) * unit
        return (d_student * unit).to(student.dtype), d_prototypes, None, None, None


def _scores(student: Tensor, prototypes: Tensor, student_temp: float) -> Tensor:
    """Logits over some prototypes, divided by the temperature; a new tensor in float32."""
    with autocast_off(student):
        return (student @ prototypes.T).float() / student_temp


def _targets(teacher: Potentials, weight: Tensor, part: slice) -> Tensor:
    """T of every student row; the teacher's index is (R, J)."""
    columns = zip(teacher.index.unbind(1), weight[..., None].unbind(1))
    first, *others = (w * _probabilities(teacher, index, part) for index, w in columns)
    for other in others:
        first += other
    return first


def _loss_triton(
    student: Tensor, prototypes: Tensor, teacher: Potentials, index: Tensor, weight: Tensor, student_temp: float
) -> Tensor:
    from minidino.kernels import prototypes as kernels

    rows, *tensors, teacher_temp, floor = teacher
    return kernels.prototype_loss(
        student, prototypes, *tensors, rows[index], weight, student_temp, teacher_temp, floor
    )


IMPLEMENTATIONS = {"reference": _loss_reference, "chunked": _loss_chunked, "triton": _loss_triton}
AUTO = "reference"  # what "auto" means, on all devices: see docs/measured.md, Kernels


def resolve(impl: str, device: torch.device | str) -> str:
    """Name the implementation that will run on this device.

    Args:
        impl: "auto", "reference", "chunked" or "triton".
        device: where the tensors will live; only its type matters.
    Raises:
        ValueError: the name is unknown.
        NotImplementedError: the implementation exists by name but cannot run here.
    """
    if impl == "auto":
        return AUTO
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown prototype loss {impl!r}: expected 'auto', {', '.join(map(repr, IMPLEMENTATIONS))}")
    if impl == "triton" and (reason := no_triton(torch.device(device).type)):
        raise NotImplementedError(f"prototype loss 'triton' {reason}; choose 'chunked' or 'reference'")
    return impl


def prototype_loss(
    student: Float[Tensor, "R b"],
    prototypes: Float[Tensor, "K b"],
    teacher: Potentials,
    index: Int[Tensor, "R J"],
    weight: Float[Tensor, "R J"],
    student_temp: float = 0.1,
    impl: str = "auto",
) -> Float[Tensor, "R"]:
    """Cross-entropy of each student row with its teacher rows.

        loss_r = -sum_k T_rk log softmax_k(x_r . w_k / temp),   T_rk = sum_j weight_rj p(index_rj, k)

    Args:
        student: bottleneck vectors of the head, at unit length; float16, bfloat16 or float32.
        prototypes: of the same dtype.
        teacher: its probabilities; they have no gradient.
        index: teacher rows of each student row; with fewer than J of them, any row with a weight of 0.
        weight: of each teacher row, at least 0.
        impl: "reference", "chunked", "triton", or "auto" for the choice of `resolve` on this device.
    Returns:
        Nats, float32, without the mean or the sum over rows.
    Source: DINOv2 paper, section 4; Wijmans et al. 2024 (Cut Your Losses, arXiv 2411.09009) for the way in parts.
    """
    return IMPLEMENTATIONS[resolve(impl, student.device)](student, prototypes, teacher, index, weight, student_temp)


# ---------------------------------------------------------------- the losses


def dino_loss(
    student: Float[Tensor, "V B b"],
    prototypes: Float[Tensor, "K b"],
    targets: Targets,
    student_temp: float = 0.1,
    impl: str = "auto",
) -> Float[Tensor, ""]:
    """`minidino.learning.losses.dino_loss` of the logits student . prototypes.

    Args:
        targets: of the global crops, (G, B): a tensor for the plain loss, potentials for `prototype_loss`.
    """
    if not isinstance(targets, Potentials):
        return losses.dino_loss(_logits(student, prototypes), targets, student_temp)
    (n_views, n_images), n_teacher = student.shape[:2], len(targets.index)
    losses.check_views(n_views, n_teacher)
    others = 1 - torch.eye(n_views, n_teacher, device=student.device)  # (V, G)
    weight = (others / others.sum() / n_images)[:, None].expand(-1, n_images, -1).flatten(0, 1)
    rows = torch.arange(n_teacher * n_images, device=student.device).view(n_teacher, n_images)
    index = rows.T.expand(n_views, -1, -1).flatten(0, 1)  # (V B, G)
    targets = targets._replace(index=targets.index.flatten())
    return prototype_loss(student.flatten(0, 1), prototypes, targets, index, weight, student_temp, impl).sum()


def ibot_loss(
    student: Float[Tensor, "M b"],
    prototypes: Float[Tensor, "K b"],
    targets: Targets,
    mask_weights: Float[Tensor, "M"],
    n_crops: int | float,
    student_temp: float = 0.1,
    impl: str = "auto",
) -> Float[Tensor, ""]:
    """`minidino.learning.losses.ibot_loss` of the logits student . prototypes.

    Args:
        targets: of the masked patches, (M,): a tensor for the plain loss, potentials for `prototype_loss`.
    """
    if not isinstance(targets, Potentials):
        return losses.ibot_loss(_logits(student, prototypes), targets, mask_weights, n_crops, student_temp)
    index, weight = torch.arange(len(student), device=student.device)[:, None], mask_weights.float()[:, None] / n_crops
    return prototype_loss(student, prototypes, targets, index, weight, student_temp, impl).sum()


def _logits(student: Tensor, prototypes: Tensor) -> Tensor:
    with autocast_off(student):
        return F.linear(student, prototypes)
