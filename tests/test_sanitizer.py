"""The kernels keep to their own memory: every load and store, in Triton's interpreter."""

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("no Triton on this system", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("on a GPU it is benchmarks/memcheck.py that asks", allow_module_level=True)

import triton
import triton.language as tl
from sanitizer import sanitized
from triton.runtime.errors import InterpreterError

from minidino.kernels import attention, prototypes, sinkhorn

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FLOATS = [torch.float32, torch.float16]  # the interpreter cannot multiply bfloat16


@pytest.fixture
def memcheck(monkeypatch):
    """The small runs that compute-sanitizer watches on a GPU."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("memcheck")


@pytest.fixture(params=[0, 1])
def tiling(request, monkeypatch):
    """One of the choices of tuning, in every kernel."""
    for kernels in (attention, prototypes, sinkhorn):
        monkeypatch.setattr(kernels, "fastest", lambda key, tilings, *rest: tilings[request.param % len(tilings)])


# ---------------------------------------------------------------- kernels with a fault are found


@triton.jit
def copy_kernel(source, target, n, reach, shift, twice: tl.constexpr):
    """Copies n numbers, eight a program; reach and shift are faults if they are not n and 0."""
    place = tl.program_id(0) * 8 + tl.arange(0, 8)
    value = tl.load(source + place, mask=place < reach, other=0.0)
    tl.store(target + place + shift, value, mask=place < n)
    if twice:
        tl.store(target + place * 0, value, mask=place < n)


def copy(source, target, reach=20, shift=0, twice=False, n=20):
    with sanitized() as launches:
        copy_kernel[(3,)](source, target, n, reach, shift, twice=twice)
    return launches


def test_a_faultless_kernel_passes_and_was_watched():
    source, target = torch.randn(20), torch.zeros(20)
    launches = copy(source, target)
    assert torch.equal(source, target)
    assert launches.kernels == {"copy_kernel"} and launches.accesses == 6


def test_a_step_beyond_the_end_is_found():
    both = torch.zeros(64)
    halves = both[:20], both[32:52]  # the step ends within the same allocation, so nothing crashes
    with pytest.raises(InterpreterError, match="outside: a load of 5 numbers"):
        copy(*halves, reach=21)
    with pytest.raises(InterpreterError, match="outside: a store of 8 numbers"):
        copy(*halves, shift=-1)
    with pytest.raises(InterpreterError, match="outside"):
        copy(both[::2][:20], halves[1])  # steps of one number through a view of every second


def test_a_step_into_another_tensor_of_the_launch_is_found():
    both = torch.zeros(40)
    with pytest.raises(InterpreterError, match="outside: a load of 8 numbers"):
        copy(both[:20], both[20:], reach=24)


def test_races_are_found():
    source, target = torch.randn(20), torch.zeros(20)
    with pytest.raises(InterpreterError, match="race: numbers of target are written twice"):
        copy(source, target, twice=True)
    with pytest.raises(InterpreterError, match="race: source is read and written"):
        copy(source, source)


def test_what_was_left_unwritten_is_found():
    with pytest.raises(AssertionError, match="unwritten: 4 numbers of target"):
        copy(torch.zeros(24), torch.zeros(24))


# ---------------------------------------------------------------- ours have none


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("pack", range(4))
def test_attention(memcheck, tiling, pack, dtype):
    with sanitized() as launches:
        memcheck.attend(memcheck.PACKS[pack], dtype, "cpu")
    assert launches.kernels == {"forward_kernel", "backward_kernel"} and launches.accesses > 20


@pytest.mark.parametrize("width", [32, 128])
@pytest.mark.parametrize("dtype", FLOATS)
def test_attention_of_narrow_and_wide_heads(memcheck, tiling, width, dtype):
    with sanitized() as launches:
        memcheck.attend([37, 37, 30, 100, 28, 197, 9], dtype, "cpu", width)
    assert launches.accesses > 20


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [*range(4), (3, 70, 512), (5, 67, 13)])
def test_prototypes_and_sinkhorn(memcheck, tiling, size, dtype):
    shape = memcheck.SIZES[size] if isinstance(size, int) else size
    with sanitized() as launches:
        memcheck.lose(*shape, dtype, "cpu", n_teachers=2)
    sums = {"row_sums_kernel", "column_sums_kernel"}
    assert launches.kernels == sums | {"forward_kernel", "student_kernel", "prototypes_kernel"}
