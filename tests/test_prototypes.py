"""The prototype losses without their logits, against float64: in parts, and the kernels in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from threading import Lock

import pytest
import torch
import torch.nn.functional as F
from test_kernels import most_spilt
from test_losses import Processes
from test_objective import TEMP, WEIGHTS, scene
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidino.learning import losses
from minidino.learning import prototypes as fused
from minidino.learning.objective import Targets, make_targets, ssl_losses, student_losses, teacher_logits
from minidino.learning.prototypes import Potentials, center_potentials, prototype_loss, resolve, sinkhorn_potentials

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton on this system")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = ["chunked", pytest.param("triton", marks=needs_triton)]
HALF = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]  # the interpreter cannot multiply bfloat16
SHAPES = {  # rows, K, width, teacher rows, teachers of a row
    "one of each": (1, 2, 16, 1, 1),
    "primes": (7, 101, 13, 5, 2),
    "more than a tile": (67, 150, 48, 67, 1),
    "local crops": (40, 331, 32, 8, 2),
    "three teachers": (9, 130, 64, 4, 3),
    "published width": (5, 67, 384, 5, 1),
    "widest": (3, 70, 512, 3, 1),
}


def drawn(n_rows, k, width, n, n_teachers, dtype=torch.float32, seed=0):
    """Unit vectors, prototypes about as long, teacher cosines, which teachers, how much of each, what is above."""
    g = torch.Generator().manual_seed(seed)
    student = F.normalize(torch.randn(n_rows, width, generator=g), dim=-1)
    prototypes = 1.5 * F.normalize(torch.randn(k, width, generator=g), dim=-1)
    logits = torch.randn(n, k, generator=g).tanh()
    index = torch.randint(max(n, 1), (n_rows, n_teachers), generator=g)
    weight, grad = torch.rand(n_rows, n_teachers, generator=g), torch.rand(n_rows, generator=g)
    wide = [x.to(dtype).to(DEVICE).requires_grad_() for x in (student, prototypes)]
    return *wide, *(x.to(DEVICE) for x in (logits, index, weight, grad))


def answers(student, prototypes, logits, index, weight, grad, impl):
    """Loss of each row and both gradients."""
    loss = prototype_loss(student, prototypes, sinkhorn_potentials(logits, TEMP, impl=impl), index, weight, impl=impl)
    return loss.detach(), *torch.autograd.grad(loss, (student, prototypes), grad)


def sinkhorn64(logits, temp=TEMP, n_iterations=3):
    q = ((logits.double() - (logits.double().max() if len(logits) else 0)) / temp).exp()
    for _ in range(n_iterations):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


def truth(student, prototypes, logits, index, weight, grad):
    """The formula in float64."""
    student, prototypes = (x.detach().double().requires_grad_() for x in (student, prototypes))
    targets = (weight.double()[..., None] * sinkhorn64(logits)[index]).sum(1)
    loss = -(targets * F.log_softmax(student @ prototypes.T / 0.1, dim=-1)).sum(-1)
    return loss.detach(), *torch.autograd.grad(loss, (student, prototypes), grad.double())


def check(impl, draws):
    """Loss and gradients err at most twice as much as full logits in the same dtype do: squares over all draws."""
    mine, theirs = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for given in draws:
        exact, found = truth(*given), answers(*given, impl)
        assert found[0].dtype == torch.float32 and all(f.shape == t.shape for f, t in zip(found, exact))
        assert found[1].dtype == found[2].dtype == given[0].dtype
        mine += squares(found, exact)
        theirs += squares(answers(*given, "reference"), exact)
    for name, error, limit in zip(("loss", "student", "prototypes"), mine.sqrt().tolist(), theirs.sqrt().tolist()):
        assert error <= 2 * limit, f"{name}: {error:.2e}, full logits {limit:.2e}"


def squares(found, exact):
    return torch.stack([(f.double() - t).square().sum().cpu() for f, t in zip(found, exact)])


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_err_at_most_twice_as_much_as_full_logits(impl, dtype, shape):
    check(impl, [drawn(*SHAPES[shape], dtype, seed) for seed in range(3)])


@pytest.mark.parametrize("impl", FUSED)
def test_no_row_is_no_loss(impl):
    loss, d_student, d_prototypes = answers(*drawn(0, 9, 16, 0, 1), impl)
    assert loss.shape == (0,) and d_student.shape == (0, 16)
    assert torch.equal(d_prototypes, torch.zeros_like(d_prototypes))


@pytest.mark.parametrize("impl", FUSED)
def test_weights_of_zero_and_a_published_scale_lose_nothing_in_half_precision(impl):
    student, prototypes, logits, index, weight, grad = drawn(6, 200, 16, 6, 2, torch.float16)
    weight[:, 1] = 0
    exact = truth(student, prototypes, logits, index, weight, grad)
    scaled = answers(student, prototypes, logits, index, weight, 0.01 * grad, impl)
    assert squares([100 * x.double() for x in scaled[1:]], exact[1:]).max() < 1e-4 * exact[1].square().sum()
    found = answers(student, prototypes, logits, index, 0 * weight, grad, impl)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found)


@pytest.mark.parametrize("impl", FUSED)
def test_many_rows_that_err_alike_do_not_overflow_in_half_precision(impl):
    n = 1024
    student = F.normalize(torch.ones(n, 16), dim=-1).half().requires_grad_()
    prototypes = F.normalize(torch.eye(16)[:3] + torch.tensor([[9.0], [0.0], [0.0]]), dim=-1).half().requires_grad_()
    given = student, prototypes, torch.tensor([[-1.0, 1.0, -1.0]]), torch.zeros(n, 1, dtype=torch.int64)
    found, expected = (answers(*given, torch.ones(n, 1), torch.ones(n), each) for each in (impl, "reference"))
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("impl", FUSED)
def test_gradients_of_gradients_are_refused(impl):
    student, prototypes, logits, index, weight, _ = drawn(3, 9, 16, 3, 1)
    loss = prototype_loss(student, prototypes, sinkhorn_potentials(logits, TEMP), index, weight, impl=impl)
    with pytest.raises((NotImplementedError, RuntimeError), match="no second derivative|no autograd formula"):
        torch.autograd.grad(loss.sum(), student, create_graph=True)[0].square().sum().backward()


# ---------------------------------------------------------------- potentials


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("temp", [0.015, 0.07])
@pytest.mark.parametrize("shape", [(1, 2), (7, 13), (40, 1100)])
def test_potentials_are_the_targets(impl, temp, shape):
    logits, center = torch.randn(shape, device=DEVICE).tanh(), 0.1 * torch.randn(1, shape[1], device=DEVICE)
    for found, expected in (
        (sinkhorn_potentials(logits, temp, impl=impl), losses.sinkhorn_knopp(logits, temp)),
        (center_potentials(logits, center, temp, impl), losses.softmax_center(logits, center, temp)),
    ):
        torch.testing.assert_close(found.dense(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("n_iterations", [1, 3, 10])
def test_potentials_of_extreme_logits(impl, n_iterations):
    ladder = torch.linspace(-400, 400, 24).view(4, 6)[torch.randperm(4)]
    lonely = torch.zeros(4, 5)
    lonely[:, 2], lonely[3] = -50.0, -60.0  # a column and a row that underflow
    for logits in (ladder, lonely, torch.full((3, 4), 1e4), torch.zeros(5, 3).fill_diagonal_(80.0)):
        logits = logits.to(DEVICE)
        found = sinkhorn_potentials(logits, 0.04, n_iterations, impl=impl).dense()
        assert found.isfinite().all()
        torch.testing.assert_close(found, losses.sinkhorn_knopp(logits, 0.04, n_iterations), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("split", [(4, 5), (9, 0)])
def test_potentials_over_processes_are_those_of_one(impl, split, monkeypatch):
    lock, sums = Lock(), fused._sums(impl)  # the interpreter knows one thread

    def locked(look):
        def one_at_a_time(*args):
            with lock:
                return look(*args)

        return one_at_a_time

    monkeypatch.setattr(fused, "_sums", lambda impl: tuple(map(locked, sums)))
    logits = torch.randn(9, 7, device=DEVICE).tanh()
    parts = Processes.run(lambda x, r: sinkhorn_potentials(x, TEMP, all_reduce=r, impl=impl), logits.split(split))
    found = torch.cat([part.dense() for part in parts])
    torch.testing.assert_close(found, losses.sinkhorn_knopp(logits, TEMP), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("impl", FUSED)
def test_a_logit_that_is_not_a_number_is_not_taken_for_a_probability_of_0(impl):
    student, prototypes, logits, index, weight, _ = drawn(4, 70, 16, 4, 1)
    logits[1, 5] = torch.nan
    found = center_potentials(logits, torch.zeros(1, 70, device=DEVICE), TEMP, impl)
    assert found.dense().isnan().any(1).tolist() == [False, True, False, False]
    for teacher in (found, sinkhorn_potentials(logits, TEMP, impl=impl)):
        loss = prototype_loss(student, prototypes, teacher, torch.ones_like(index), weight, impl=impl)
        assert loss.isnan().all()


def test_potentials_are_cut_like_the_tensor_that_they_stand_for():
    potentials = sinkhorn_potentials(torch.randn(12, 5), TEMP)
    dense = potentials.dense()
    views, views_dense = potentials.unflatten(0, (2, 6)), dense.unflatten(0, (2, 6))
    for mine, theirs in zip(views.chunk(3, dim=1), views_dense.chunk(3, dim=1), strict=True):
        assert torch.equal(fused.dense(mine), theirs)
    for mine, theirs in zip(potentials.split([5, 0, 7]), dense.split([5, 0, 7]), strict=True):
        assert torch.equal(mine.dense(), theirs)
    assert fused.dense(dense) is dense


# ---------------------------------------------------------------- a part of torch


@needs_triton
def test_the_kernels_are_operations_like_those_of_torch():
    from minidino.kernels import prototypes as kernels
    from minidino.kernels import sinkhorn

    student, prototypes, logits, index, weight, _ = drawn(5, 40, 16, 3, 2)
    _, logits, row, column, peak, temp, floor = sinkhorn_potentials(logits, TEMP)
    given = student, prototypes, logits, column, peak, index, row[index], weight, 0.1, temp, floor
    for operation, arguments in (
        (kernels._loss, given),
        (sinkhorn.log_row_sums, (logits, column, peak, temp, floor)),
        (sinkhorn.column_sums, (logits, row, column, peak, temp, floor)),
    ):
        assert set(torch.library.opcheck(operation, arguments).values()) == {"SUCCESS"}


@needs_triton
def test_compile_keeps_one_graph():
    from minidino.kernels import prototypes as kernels

    student, prototypes, logits, index, weight, grad = drawn(5, 40, 16, 3, 2)
    _, *teacher, temp, floor = sinkhorn_potentials(logits, TEMP)

    def loss(student, prototypes):
        found = kernels.prototype_loss(2 * student, prototypes, *teacher, index, weight, 0.1, temp, floor)
        return (found * grad).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    both = [torch.autograd.grad(f(student, prototypes), (student, prototypes)) for f in (loss, compiled)]
    for mine, theirs in zip(*both):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@needs_triton
def test_what_the_kernels_cannot_do_is_refused():
    from minidino.kernels.prototypes import prototype_loss as prototype_loss_of_kernels

    student, prototypes, logits, index, weight, _ = drawn(2, 5, 16, 2, 1)
    teacher = sinkhorn_potentials(logits, TEMP)
    with pytest.raises(TypeError, match="one dtype"):
        prototype_loss(student.half(), prototypes, teacher, index, weight, impl="triton")
    with pytest.raises(TypeError, match="float64"):
        prototype_loss(student.double(), prototypes.double(), teacher, index, weight, impl="triton")
    with pytest.raises(ValueError, match="at most 512, got 520"):
        prototype_loss(torch.zeros(2, 520), torch.zeros(5, 520), teacher, index, weight, impl="triton")
    for beyond in ((prototypes[:, :8], index, weight), (prototypes[:4], index, weight), (prototypes, index[:1], weight[:1]),
                   (prototypes, index, weight.repeat(1, 2))):  # fmt: skip
        with pytest.raises(ValueError, match=r"of shapes \(\(5, 16\), \(2, 1\), \(2, 1\), \(2,\), \(5,\), \(\)\)"):
            prototype_loss_of_kernels(student, beyond[0], *teacher[1:5], *beyond[1:], 0.1, *teacher[5:])


def test_resolve_names_what_runs_or_says_what_to_do(monkeypatch):
    assert resolve("auto", "cpu") == "reference" and resolve("chunked", "cpu") == "chunked"
    with pytest.raises(ValueError, match="'fast': expected 'auto', 'reference', 'chunked', 'triton'"):
        resolve("fast", "cpu")
    monkeypatch.setitem(sys.modules, "minidino.kernels.attention", None)  # what an import then raises: ImportError
    with pytest.raises(NotImplementedError, match="not installed here; choose 'chunked'"):
        resolve("triton", "cuda")


@needs_triton
def test_resolve_says_where_triton_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert resolve("triton", "cuda") == "triton"
    with pytest.raises(NotImplementedError, match="needs a GPU, got cpu.*TRITON_INTERPRET=1.*'chunked' or 'reference'"):
        resolve("triton", "cpu")


# ---------------------------------------------------------------- the whole objective


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("targets, n_local", [("sinkhorn", 2), ("centering", 1), ("sinkhorn", 0)])
def test_the_objective_is_the_same(impl, targets, n_local):
    _, student, teacher, batch = scene(n_local=n_local)
    found = {}
    for name in ("reference", impl):
        parts = ssl_losses(student, teacher, batch, TEMP, WEIGHTS, targets=targets, impl=name)
        gradients = torch.autograd.grad(sum(parts.values()), list(student.parameters()))
        found[name] = [*parts.values(), *gradients]
    for mine, theirs in zip(found[impl], found["reference"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_one_student_view_of_one_is_refused_as_by_the_plain_loss():
    targets = sinkhorn_potentials(torch.randn(2, 5), TEMP).unflatten(0, (1, 2))
    with pytest.raises(ValueError, match="got 1 student"):
        fused.dino_loss(torch.zeros(1, 2, 4), torch.zeros(5, 4), targets, impl="chunked")


def test_no_masked_patch_costs_nothing():
    _, student, teacher, batch = scene()
    batch = batch._replace(masks=torch.zeros_like(batch.masks), mask_weights=torch.zeros(0))
    targets, _ = make_targets(teacher_logits(teacher, batch), TEMP, impl="chunked")
    assert isinstance(targets, Targets) and isinstance(targets.ibot, Potentials)
    parts, _ = student_losses(student, batch, targets, WEIGHTS, impl="chunked")
    sum(parts.values()).backward()
    assert parts["ibot"] == 0 and student.ibot_head.last_layer.weight_v.grad.abs().max() == 0


# ---------------------------------------------------------------- memory


class Memory(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in old | self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def test_memory_is_counted_as_it_comes_and_goes():
    x = torch.zeros(256)  # 1 KiB
    with Memory() as memory:
        y = x + 1
        del y
        z = [x.view(2, 128), x * 2, x * 3]
    assert memory.peak == memory.now == 2048 and len(z) == 3


def test_the_peak_in_parts_is_at_most_a_third():
    """Targets, loss, gradients of 128 rows over the published K; 8 MiB of head and 64 of teacher logits were there."""
    student, prototypes, logits, index, _, _ = drawn(128, 131_072, 16, 128, 1)
    weights, peaks = torch.full((128,), 1 / 128), {}
    for impl in ("reference", "chunked"):
        with Memory() as memory:
            if impl == "reference":
                targets = losses.sinkhorn_knopp(logits, TEMP)
            else:
                targets = sinkhorn_potentials(logits, TEMP, impl=impl)
            loss = fused.ibot_loss(student, prototypes, targets, weights, 1, impl=impl)
            gradients = torch.autograd.grad(loss, (student, prototypes))
        peaks[impl] = memory.peak / 2**20
        assert len(gradients) == 2 and memory.peak > 8 * 2**20  # at least the gradient of the prototypes
    assert peaks["chunked"] <= peaks["reference"] / 3, peaks


# ---------------------------------------------------------------- compiled for chips that are not there

CHIPS = {80: 163, 90: 227, 100: 227}  # compute capability: KiB of shared memory that one program may have


@pytest.fixture(scope="module")
def compilers(tmp_path_factory):
    """One process for each chip, side by side."""
    tests, started = Path(__file__).parent, {}
    for chip in CHIPS:
        cache = str(tmp_path_factory.mktemp("triton"))
        environment = {"TRITON_INTERPRET": "0", "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": cache}
        environment = {**os.environ, **environment, "PYTHONPATH": str(tests.parent)}
        command = [sys.executable, str(tests / "compile_prototypes.py"), str(chip)]
        started[chip] = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
    yield started
    [process.kill() for process in started.values()]


@needs_triton
@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_multiplies_matrices_spills_nothing_and_fits(chip, compilers):
    lines, errors = compilers[chip].communicate()
    assert compilers[chip].returncode == 0, errors[-2000:]
    found = [json.loads(line) for line in lines.splitlines()]
    assert len(found) > 30
    for name, products, spilt, shared, registers in found:
        assert products or "sums" in name, f"{name}: no matrix instruction"
        assert spilt <= most_spilt() and registers, f"{name}: {spilt} bytes spilt, {registers} registers"
        assert shared <= CHIPS[chip], f"{name}: {shared} KiB"
