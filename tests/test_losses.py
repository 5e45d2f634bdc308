"""Losses and targets against float64 loops written from the formulas, lightly, and published start values."""

import math
from threading import Barrier, Thread

import lightly.loss
import pytest
import torch
import torch.nn.functional as F

from minidino.learning import losses

HALVES = [torch.float16, torch.bfloat16]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Processes:
    """An all_reduce that really meets: each process is a thread, and each call waits for all of them."""

    def __init__(self, n):
        self.barrier, self.inbox = Barrier(n), [None] * n

    def all_reduce(self, rank):
        def reduce(tensor, op="sum"):
            self.inbox[rank] = tensor
            self.barrier.wait(timeout=20)
            stacked = torch.stack(self.inbox)
            self.barrier.wait(timeout=20)
            return stacked.sum(dim=0) if op == "sum" else stacked.amax(dim=0)

        return reduce

    @classmethod
    def run(cls, function, parts):
        group, results = cls(len(parts)), [None] * len(parts)

        def work(rank):
            results[rank] = function(parts[rank], group.all_reduce(rank))

        threads = [Thread(target=work, args=(rank,)) for rank in range(len(parts))]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return results


# ---------------------------------------------------------------- Sinkhorn


def naive_sinkhorn(logits, temp, n_iterations=3):
    """The released formula, (K, B) and with all its factors, in float64."""
    q = (logits.double() / temp).exp().T
    n_prototypes, n_samples = q.shape
    q = q / q.sum()
    for _ in range(n_iterations):
        for k in range(n_prototypes):
            q[k] = q[k] / q[k].sum() / n_prototypes
        for b in range(n_samples):
            q[:, b] = q[:, b] / q[:, b].sum() / n_samples
    return (q * n_samples).T


@pytest.mark.parametrize("shape", [(1, 7), (5, 3), (8, 16), (7, 33)])
def test_sinkhorn_is_the_released_formula(shape):
    logits = randn(*shape).tanh()
    probs = losses.sinkhorn_knopp(logits, 0.05)
    torch.testing.assert_close(probs.double(), naive_sinkhorn(logits, 0.05), rtol=1e-5, atol=1e-7)


def test_sinkhorn_marginals():
    logits = randn(24, 6).tanh()
    torch.testing.assert_close(losses.sinkhorn_knopp(logits, 0.07).sum(dim=1), torch.ones(24))
    balanced = losses.sinkhorn_knopp(logits, 0.2, n_iterations=100)
    torch.testing.assert_close(balanced.sum(dim=0), torch.full((6,), 24 / 6), rtol=1e-3, atol=0)
    unbalanced = F.softmax(logits / 0.2, dim=1).sum(dim=0)
    assert (unbalanced - 4).abs().max() > 0.5  # a softmax alone does not balance


def test_sinkhorn_ignores_a_common_constant_and_does_not_overflow():
    logits = randn(9, 5).tanh()
    shifted = losses.sinkhorn_knopp(logits + 100, 0.04)  # exp(2500) is infinite
    torch.testing.assert_close(shifted, losses.sinkhorn_knopp(logits, 0.04), rtol=1e-3, atol=1e-5)
    rows_shifted = losses.sinkhorn_knopp(logits + randn(9, 1), 0.5)
    assert (rows_shifted - losses.sinkhorn_knopp(logits, 0.5)).abs().max() > 1e-3  # as the theory of 3 steps says


def test_sinkhorn_of_a_dead_prototype_is_finite():
    logits = torch.zeros(4, 3)
    logits[:, 2] = -50.0  # underflows for every row
    probs = losses.sinkhorn_knopp(logits, 0.04)
    assert probs.isfinite().all()
    torch.testing.assert_close(probs, torch.tensor([0.5, 0.5, 0.0]).expand(4, 3))


@pytest.mark.parametrize("split", [(4, 5), (9, 0), (1, 3, 5)])
def test_sinkhorn_over_processes_equals_one_process(split):
    logits = randn(9, 7).tanh()
    parts = Processes.run(lambda x, r: losses.sinkhorn_knopp(x, 0.04, all_reduce=r), logits.split(split))
    torch.testing.assert_close(torch.cat(parts), losses.sinkhorn_knopp(logits, 0.04))


# ---------------------------------------------------------------- centering


def test_center_over_processes_counts_rows_not_processes():
    logits, center = randn(7, 5), randn(1, 5, seed=1)
    expected = 0.9 * center.double() + 0.1 * logits.double().mean(dim=0)
    torch.testing.assert_close(losses.update_center(center, logits).double(), expected, rtol=1e-6, atol=1e-7)
    for part in Processes.run(lambda x, r: losses.update_center(center, x, all_reduce=r), logits.split((2, 5))):
        torch.testing.assert_close(part.double(), expected, rtol=1e-6, atol=1e-7)


def test_centering_follows_lightly_step_by_step():
    oracle = lightly.loss.DINOLoss(output_dim=11, student_temp=0.1, center_momentum=0.9)
    center = torch.zeros(1, 11)
    for step in range(3):
        teacher, student = randn(2, 5, 11, seed=step), randn(6, 5, 11, seed=10 + step)
        probs = losses.softmax_center(teacher, center, 0.05)
        center = losses.update_center(center, teacher)
        ours, theirs = losses.dino_loss(student, probs), oracle(list(teacher), list(student), teacher_temp=0.05)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(center, oracle.center[0])


# ---------------------------------------------------------------- DINO


def naive_dino(student, teacher, temp=0.1):
    terms = []
    for g in range(len(teacher)):
        for v in range(len(student)):
            if g != v:
                for b in range(student.shape[1]):
                    log_p = student[v, b] / temp - torch.logsumexp(student[v, b] / temp, dim=0)
                    terms.append(-(teacher[g, b] * log_p).sum())
    return torch.stack(terms).mean()


def assert_value_and_gradient(ours, naive, x):
    """Ours in float32 against the naive version in float64, value and gradient with respect to x."""
    x32, x64 = x.clone().requires_grad_(), x.double().requires_grad_()
    value32, value64 = ours(x32), naive(x64)
    value32.backward()
    value64.backward()
    torch.testing.assert_close(value32.double(), value64, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x32.grad.double(), x64.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_global, n_views, n_images, k", [(2, 2, 3, 5), (2, 5, 1, 7), (1, 3, 4, 9), (3, 4, 2, 3)])
def test_dino_value_and_gradient(n_global, n_views, n_images, k):
    probs = F.softmax(randn(n_global, n_images, k, seed=1), dim=-1)
    student = randn(n_views, n_images, k)
    assert_value_and_gradient(lambda x: losses.dino_loss(x, probs), lambda x: naive_dino(x, probs.double()), student)


@pytest.mark.parametrize(
    "k, local, across, ibot",
    [(4096, 7.394, 0.924, 4.159), (65536, 9.858, 1.232, 5.545), (131072, 10.474, 1.309, 5.892)],
)
def test_start_values_of_the_published_recipe(k, local, across, ibot):
    student, teacher = 1e-3 * randn(10, 2, k), 1e-3 * randn(2, 2, k, seed=1)
    probs = losses.sinkhorn_knopp(teacher.flatten(0, 1), 0.07).view(2, 2, k)
    assert losses.dino_loss(student, probs).item() == pytest.approx(local + across, abs=2e-3)
    assert losses.dino_loss(student[:2], probs).item() * 2 / 18 == pytest.approx(across, abs=1e-3)
    # two of four crops are masked, with 3 and 1 patches
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1])
    patches = losses.ibot_loss(student[0, :1].expand(4, k), probs[0, :1].expand(4, k), weights, n_crops=4)
    assert patches.item() == pytest.approx(ibot, abs=1e-3)


@pytest.mark.parametrize("n_student, n_teacher", [(1, 1), (1, 2)])
def test_dino_without_enough_views_says_so(n_student, n_teacher):
    with pytest.raises(ValueError, match=f"got {n_student} student"):
        losses.dino_loss(torch.zeros(n_student, 2, 3), torch.full((n_teacher, 2, 3), 1 / 3))


# ---------------------------------------------------------------- iBOT


def test_ibot_value_and_gradient():
    weights = torch.tensor([0.5, 0.5, 1 / 3, 1 / 3, 1 / 3])
    probs, student = F.softmax(randn(5, 7, seed=1), dim=-1), randn(5, 7)

    def naive(x):
        total = 0.0
        for m in range(5):
            for k in range(7):
                total -= weights[m].double() * probs[m, k].double() * torch.log_softmax(x[m] / 0.1, dim=0)[k]
        return total / 6

    assert_value_and_gradient(lambda x: losses.ibot_loss(x, probs, weights, n_crops=6), naive, student)


def test_ibot_equals_lightly_with_unmasked_crops():
    mask = torch.zeros(4, 3, 3, dtype=torch.bool)
    mask[0, 0], mask[2, 1, 1] = True, True
    teacher, student = randn(4, 9, seed=1), randn(4, 9)
    probs = losses.softmax_center(teacher, torch.zeros(1, 9), 0.04)
    ours = losses.ibot_loss(student, probs, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]), n_crops=4)
    torch.testing.assert_close(ours, lightly.loss.IBOTPatchLoss(output_dim=9)(teacher, student, mask))


def test_no_masked_patch_costs_nothing():
    student = torch.zeros(0, 5, requires_grad=True)
    probs = losses.sinkhorn_knopp(torch.zeros(0, 5), 0.04)
    assert probs.shape == (0, 5)
    loss = losses.ibot_loss(student, probs, torch.zeros(0), n_crops=2)
    loss.backward()
    assert loss.item() == 0 and student.grad.shape == (0, 5)
    center = randn(1, 5)
    torch.testing.assert_close(losses.update_center(center, torch.zeros(0, 5)), center, rtol=0, atol=0)


# ---------------------------------------------------------------- KoLeo


def naive_koleo(x, eps=1e-8):
    rows = [row / row.square().sum().sqrt() for row in x]
    logs = []
    for i, row in enumerate(rows):
        distances = [((row - other + eps) ** 2).sum().sqrt() for j, other in enumerate(rows) if j != i]
        logs.append(torch.log(torch.stack(distances).min() + eps))
    return -torch.stack(logs).mean()


@pytest.mark.parametrize("shape", [(2, 3), (5, 7), (16, 33)])
def test_koleo_value_and_gradient(shape):
    assert_value_and_gradient(losses.koleo_loss, naive_koleo, 3 * randn(*shape))
    torch.testing.assert_close(losses.koleo_loss(randn(*shape)), lightly.loss.KoLeoLoss()(randn(*shape)))


def test_koleo_edges():
    with pytest.raises(ValueError, match="got 1"):
        losses.koleo_loss(torch.ones(1, 4))
    twins = torch.ones(2, 384, requires_grad=True)
    loss = losses.koleo_loss(twins)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8 * math.sqrt(384) + 1e-8), abs=1e-3)
    assert twins.grad.isfinite().all()
    opposite = torch.tensor([[0.6, 0.8], [-0.6, -0.8]])  # the only neighbour has dot product -1
    assert losses.koleo_loss(opposite).item() == pytest.approx(-math.log(2), abs=1e-6)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_in_float32_out(dtype):
    student, teacher = randn(3, 4, 9).to(dtype), randn(2, 4, 9, seed=1).to(dtype)
    center, rows, weights = torch.zeros(1, 9), teacher[0], torch.full((4,), 0.25)
    functions = [
        (losses.sinkhorn_knopp, (rows, 0.04)),
        (losses.softmax_center, (rows, center, 0.04)),
        (losses.update_center, (center, rows)),
        (losses.dino_loss, (student, F.softmax(teacher, dim=-1))),
        (losses.ibot_loss, (student[0], F.softmax(rows, dim=-1), weights, 2)),
        (losses.koleo_loss, (randn(200, 3).to(dtype),)),  # crowded: a search in half precision goes wrong
    ]
    for function, arguments in functions:
        wide = [a.float() if isinstance(a, torch.Tensor) else a for a in arguments]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = function(*arguments)
        assert result.dtype == torch.float32, function.__name__
        torch.testing.assert_close(result, function(*wide), rtol=0, atol=0, msg=function.__name__)
