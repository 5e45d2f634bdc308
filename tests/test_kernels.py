"""The attention kernels against float64, in Triton's interpreter where there is no GPU."""

import contextlib
import importlib.util
import inspect
import io
import itertools
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from minidino.model.attention import attention

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton on this system")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKS = {
    "one token": [1],
    "primes": [2, 3, 5, 7, 11, 13, 61, 67, 127, 131],
    "local of 14 px": [50] * 3,
    "8 x 8 + 1": [65, 65],
    "14 x 14 + 1": [197],
    "16 x 16 + 1": [257, 257],
    "multi-crop": [257, 257, *[50] * 8],
    "forty local crops": [37] * 40,
    "mixed": [37, 197, 1, 64, 65, 128, 129, 37, 36, 10],
    "none": [],
}
HALF = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]  # the interpreter cannot multiply bfloat16


def drawn(seqlens, heads=2, width=32, dtype=torch.float32):
    """q, k, v as the thirds of one projection, and what comes down from above; scores of a few nats."""
    generator = torch.Generator().manual_seed(len(seqlens))
    qkv = 1.5 * torch.randn(sum(seqlens), 3, heads, width, generator=generator, dtype=torch.float64)
    grad = torch.randn(sum(seqlens), heads, width, generator=generator, dtype=torch.float64)
    return qkv.to(dtype).to(DEVICE).requires_grad_(), grad.to(dtype).to(DEVICE)


def answers(attend, qkv, grad):
    """The output and the three gradients."""
    out = attend(*qkv.unbind(1))
    return out.detach(), *torch.autograd.grad(out, qkv, grad)[0].unbind(1)


def eager(seqlens):
    """Scores, softmax, mixture: each as a product in the dtype of its inputs."""

    def attend(q, k, v):
        crops = zip(*(x.transpose(0, 1).split(seqlens, dim=1) for x in (q, k, v)))
        outs = [(qc @ kc.mT * q.shape[2] ** -0.5).softmax(-1) @ vc for qc, kc, vc in crops]
        return torch.cat(outs, dim=1).transpose(0, 1) if outs else q * k * v

    return attend


def errors(found, truth):
    """Norm of the difference from the truth, of each tensor."""
    return [float((f.double() - t).norm()) for f, t in zip(found, truth)]


def check(seqlens, dtype, **shape):
    """Output and gradients err at most twice as much as eager products in the same dtype do."""
    qkv, grad = drawn(seqlens, dtype=dtype, **shape)
    exact = qkv.detach().double().requires_grad_()
    truth = answers(lambda *x: attention(*x, seqlens, "reference"), exact, grad.double())
    limits = errors(answers(eager(seqlens), qkv, grad), truth)
    found = answers(lambda *x: attention(*x, seqlens, "triton"), qkv, grad)
    assert all(f.dtype == dtype and f.shape == t.shape for f, t in zip(found, truth))
    for name, mine, limit in zip(("out", "dq", "dk", "dv"), errors(found, truth), limits):
        assert mine <= 2 * limit, f"{name}: {mine:.2e}, eager {limit:.2e}"


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_output_and_gradients_err_at_most_twice_as_much_as_eager(pack, dtype):
    check(PACKS[pack], dtype)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_every_width_of_a_head(width, dtype):
    check([37, 37, 130, 5], dtype, width=width, heads=3)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_picture_of_518_pixels(dtype):
    check([37 * 37 + 1], dtype, heads=1)


@pytest.mark.parametrize("tiling", range(2))
def test_every_tiling_gives_the_same_answer(tiling, monkeypatch):
    from minidino.kernels import attention as kernels

    monkeypatch.setattr(kernels, "fastest", lambda key, tilings, *rest: tilings[tiling % len(tilings)])
    check([37, 37, 30, 100, 28, 197, 9], torch.float32)


# ---------------------------------------------------------------- what lies where


def test_tensors_may_lie_anywhere():
    seqlens = [37, 5, 70]
    qkv, grad = drawn(seqlens)
    expected = answers(lambda *x: attention(*x, seqlens, "triton"), qkv, grad)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv.detach().unbind(1)]
    widths_first = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in qkv.detach().unbind(1)]
    for given in (heads_first, widths_first):
        given = [x.requires_grad_() for x in given]
        out = attention(*given, seqlens, "triton")
        found = out, *torch.autograd.grad(out, given, grad.permute(2, 0, 1).contiguous().permute(1, 2, 0))
        for mine, theirs in zip(found, expected):
            assert torch.equal(mine, theirs)
    out = attention(*qkv.unbind(1), seqlens, "triton")
    one, other = (torch.autograd.grad(out, qkv, g, retain_graph=True)[0]
                  for g in (torch.ones_like(out), torch.ones((), device=DEVICE).expand_as(out)))  # fmt: skip
    assert torch.equal(one, other)


def test_rows_may_be_more_than_two_billion_numbers_apart():
    far = 2**31 + 64
    ground = torch.empty(far + 3 * 32, dtype=torch.float16, device=DEVICE)  # 4 GiB, of which two pages are touched
    rows = ground.as_strided((2, 3, 1, 32), (far, 32, 32, 1))
    rows.copy_(torch.randn(2, 3, 1, 32))
    near = rows.clone()
    for seqlens in ([2], [1, 1]):
        found, expected = (attention(*x.unbind(1), seqlens, "triton") for x in (rows, near))
        assert torch.equal(found, expected)


def test_what_is_no_pack_of_heads_is_refused():
    from minidino.kernels.attention import packed_attention

    x = torch.zeros(4, 2, 32, device=DEVICE)
    with pytest.raises(ValueError, match="sum to 4 packed tokens"):
        attention(x, x, x, [3], "triton")
    with pytest.raises(ValueError, match=r"d of \(32, 64, 128\)"):
        packed_attention(*[torch.zeros(4, 2, 48, device=DEVICE)] * 3, [4])
    with pytest.raises(ValueError, match="one shape"):
        packed_attention(x, x[:3], x, [4])
    with pytest.raises(TypeError, match="one dtype"):
        packed_attention(x, x.half(), x, [4])
    with pytest.raises(TypeError, match="float64"):
        packed_attention(x.double(), x.double(), x.double(), [4])


# ---------------------------------------------------------------- as a part of torch


def test_it_is_an_operation_like_those_of_torch():
    import minidino.kernels.attention  # noqa: F401  # which defines it

    qkv, _ = drawn([5, 37])
    given = *(x.detach().requires_grad_() for x in qkv.unbind(1)), [5, 1, 37, 1]
    assert set(torch.library.opcheck(torch.ops.minidino.packed_attention, given).values()) == {"SUCCESS"}


def test_gradients_of_gradients_are_refused():
    q = drawn([5, 37])[0].unbind(1)[0].detach().requires_grad_()
    with pytest.raises(NotImplementedError, match="no second derivative; choose 'reference'"):
        torch.autograd.grad(attention(q, q, q, [5, 37], "triton").sum(), q, create_graph=True)


def test_compile_keeps_one_graph_and_checkpointing_works():
    from minidino.kernels.attention import packed_attention

    seqlens = [5, 37, 70]
    qkv, grad = drawn(seqlens)

    def attend(q, k, v):
        return packed_attention(2 * q, k, v, seqlens) + 1

    expected = answers(attend, qkv, grad)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    again = lambda *x: torch.utils.checkpoint.checkpoint(attend, *x, use_reentrant=False)  # noqa: E731
    for other in (compiled, again):
        for mine, theirs in zip(answers(other, qkv, grad), expected):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_a_whole_vit_sees_no_difference():
    from minidino.model.vit import build_vit

    outputs = []
    for impl in ("reference", "triton"):
        torch.manual_seed(0)
        vit = build_vit("vit_tiny", patch_size=4, img_size=12, width=64, depth=2, heads=2, attention=impl).to(DEVICE)
        images = [torch.randn(2, 3, 12, 12, device=DEVICE), torch.randn(3, 3, 8, 20, device=DEVICE)]
        masks = [torch.rand(2, 9, device=DEVICE) < 0.4, None]
        tokens = torch.cat([x.flatten() for group in vit.forward_packed(images, masks) for x in group[:2]])
        tokens.square().mean().backward()
        outputs.append([tokens.detach(), *(p.grad for p in vit.parameters())])
    for mine, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- compiled for chips that are not there

CHIPS = {80: 163, 90: 227, 100: 227}  # compute capability: KiB of shared memory that one program may have
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}  # what holds for bfloat16 holds for float16


def compile_all(chip: int) -> None:
    """Compile each kernel in each tiling for a chip and print what it needs; started without the interpreter."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minidino.kernels import attention as kernels

    for dtype, width, kernel in itertools.product(TYPES, kernels.WIDTHS, kernels.TILINGS):
        kinds = {name: kind_of(name, TYPES[dtype]) for name in inspect.signature(kernel.fn).parameters}
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind[0] in "*i"}
        for tiling in kernels.tilings_of(kernel, width, dtype):
            constants = {"D": width, "ROWS": tiling.rows, "COLUMNS": tiling.columns, "PRECISION": "tf32"}
            constants = {name: value for name, value in constants.items() if name in kinds}
            with contextlib.redirect_stdout(io.StringIO()) as log:
                made = compile(ASTSource(kernel, kinds, constants, aligned), GPUTarget("cuda", chip, 32),
                               {"num_warps": tiling.warps, "num_stages": tiling.stages})  # fmt: skip
            spilt = sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
            products = len(re.findall(r"\b(?:mma|wgmma|tcgen05)\.", made.asm["ptx"]))
            name = f"{kernel.fn.__name__} {TYPES[dtype]} {width} {tuple(tiling)}"
            print(json.dumps([name, products, spilt, made.metadata.shared / 1024]), flush=True)


def kind_of(name: str, dtype: str) -> str:
    """What Triton calls the type of an argument of this name."""
    if name.isupper():
        return "constexpr"
    if name in ("power", "scale"):
        return "fp32"
    if name.endswith(("_step", "_head")):
        return "i32"
    return {"tiles": "*i32", "crops": "*i32", "norm": "*fp32"}.get(name, f"*{dtype}")


def most_spilt() -> int:
    """Bytes. The tilings are such that Triton 3.8 spills nothing; 3.6, which comes with torch 2.11, spills up to 380."""
    return 0 if tuple(map(int, version("triton").split(".")[:2])) >= (3, 8) else 512


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_multiplies_matrices_spills_nothing_and_fits(chip, tmp_path):
    changes = {"TRITON_INTERPRET": "0", "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    environment = os.environ | changes
    run = subprocess.run([sys.executable, __file__, str(chip)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == 19  # 2 kernels, 2 types, 3 widths, 1 or 2 tilings
    for name, products, spilt, shared in found:
        assert products and spilt <= most_spilt() and shared <= CHIPS[chip], (name, products, spilt, shared)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
