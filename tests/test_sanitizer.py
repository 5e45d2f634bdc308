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
ATTENTION = {"forward_kernel": {"out", "norm"}, "backward_kernel": {"dq", "dk", "dv"}}  # what each has to write
PROTOTYPES = {"row_sums_kernel": {"parts"}, "column_sums_kernel": {"parts"}, "forward_kernel": {"parts"},
              "student_kernel": {"parts"}, "prototypes_kernel": {"out"}}  # fmt: skip
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
def copy_kernel(source, target, n, reach, shift, step, FAULT: tl.constexpr):
    """Copies n numbers, eight a program; reach, shift and step are faults if they are not n, 0 and 8."""
    place = tl.program_id(0) * step + tl.arange(0, 8)
    value = tl.load(source + place, mask=place < reach, other=0.0)
    if FAULT == "one place":
        tl.store(target + place * 0, value, mask=place < n)
    else:
        tl.store(target + place + shift, value, mask=place < n)
    if FAULT == "look again":
        tl.load(target + place, mask=place < n)
    if FAULT == "atomic":
        tl.atomic_add(target + place, value, mask=place < n)


def copy(source, target, reach=20, shift=0, step=8, fault="", n=20):
    with sanitized() as launches:
        copy_kernel[(3,)](source, target, n, reach, shift, step, FAULT=fault)
    return launches


def test_a_faultless_kernel_passes_and_was_watched():
    source, target = torch.randn(20), torch.zeros(20)
    launches = copy(source, target)
    assert torch.equal(source, target)
    assert launches.written == {"copy_kernel": {"target"}} and launches.accesses == 6


def test_a_view_of_one_number_may_be_read_there_alone():
    one, target = torch.randn(1).expand(20), torch.zeros(20)
    copy(one, target, reach=1)
    assert target[0] == one[0] and not target[1:].any()
    with pytest.raises(InterpreterError, match="outside: a load of 2 numbers"):
        copy(one, target, reach=2)


def test_a_step_beyond_the_end_is_found():
    with pytest.raises(InterpreterError, match="outside: a load of 5 numbers"):
        copy(torch.zeros(20), torch.zeros(20), reach=21)
    with pytest.raises(InterpreterError, match="outside: a store of 8 numbers"):
        copy(torch.zeros(20), torch.zeros(20), shift=-1)
    with pytest.raises(InterpreterError, match="outside"):
        copy(torch.zeros(64)[::2][:20], torch.zeros(20))  # steps of one number through a view of every second


def test_a_step_into_another_tensor_of_the_launch_is_found():
    both = torch.zeros(40)
    with pytest.raises(InterpreterError, match="outside: a load of 8 numbers"):
        copy(both[:16], both[16:36], reach=24)  # all eight of them in the target


def test_races_are_found():
    source, target = torch.randn(20), torch.zeros(20)
    with pytest.raises(InterpreterError, match="race: one store writes numbers of target twice"):
        copy(source, target, fault="one place")
    with pytest.raises(InterpreterError, match="race: two stores write numbers of target"):
        copy(source, target, step=4)
    with pytest.raises(InterpreterError, match="race: target is written and then read"):
        copy(source, target, fault="look again")
    with pytest.raises(InterpreterError, match="race: source is read and then written"):
        copy(source, source)


def test_what_was_left_unwritten_is_found():
    with pytest.raises(AssertionError, match="unwritten: 4 numbers of target"):
        copy(torch.zeros(24), torch.zeros(24))


def test_what_is_not_watched_is_refused():
    with pytest.raises(InterpreterError, match="atomic operations are not watched"):
        copy(torch.zeros(20), torch.zeros(20), fault="atomic")


# ---------------------------------------------------------------- ours have none


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("pack", range(4))
def test_attention(memcheck, tiling, pack, dtype):
    with sanitized() as launches:
        memcheck.attend(memcheck.PACKS[pack], dtype, "cpu")
    assert launches.written == ATTENTION and launches.accesses > 20


@pytest.mark.parametrize("width", [32, 128])
@pytest.mark.parametrize("dtype", FLOATS)
def test_attention_of_narrow_and_wide_heads(memcheck, tiling, width, dtype):
    with sanitized() as launches:
        memcheck.attend([37, 37, 30, 100, 28, 197, 9], dtype, "cpu", width)
    assert launches.written == ATTENTION and launches.accesses > 20


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [*range(4), (3, 70, 512), (5, 67, 13)])
def test_prototypes_and_sinkhorn(memcheck, tiling, size, dtype):
    shape = memcheck.SIZES[size] if isinstance(size, int) else size
    with sanitized() as launches:
        memcheck.lose(*shape, dtype, "cpu", n_teachers=2)
    assert launches.written == PROTOTYPES
