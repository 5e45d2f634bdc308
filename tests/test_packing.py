"""Crops of many sizes in one pass: attention, packing and stochastic depth."""

import importlib.util
import inspect
import sys

import pytest
import torch
import torch.nn.functional as F

from minidino.model.attention import attention, attention_weights, resolve, suits_triton
from minidino.model.layers import DROP_PATH, drop_path_subset
from minidino.model.vit import VisionTransformer, build_vit

LENGTHS = [3, 5, 5, 1, 3, 3, 7]  # equal ones apart and together, one token, odd sizes


def dense(q, k, v, seqlens):
    """The oracle: one attention over all T tokens with a block-diagonal mask."""
    crop = torch.repeat_interleave(torch.arange(len(seqlens)), torch.tensor(seqlens))
    mask = crop[:, None] == crop[None, :]
    return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask).transpose(0, 1)


@pytest.mark.parametrize("impl", ["reference", "sdpa", "auto"])
@pytest.mark.parametrize("seqlens", [LENGTHS, [4] * 5, [1]])
def test_attention_and_gradients_equal_dense_masked_attention(impl, seqlens):
    torch.manual_seed(0)
    qkv = [torch.randn(sum(seqlens), 3, 8, dtype=torch.double, requires_grad=True) for _ in range(3)]
    got, expected = attention(*qkv, seqlens, impl), dense(*qkv, seqlens)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(got)
    for mine, theirs in zip(torch.autograd.grad(got, qkv, upstream), torch.autograd.grad(expected, qkv, upstream)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_errs_no_more_than_twice_eager(autocast):
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), 3, 8, dtype=torch.bfloat16) for _ in range(3))
    truth = dense(q.double(), k.double(), v.double(), LENGTHS)
    eager = []
    for qc, kc, vc in zip(*(x.split(LENGTHS) for x in (q, k, v))):
        scores = torch.einsum("ihd,jhd->hij", qc, kc) / 8**0.5
        eager.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), vc))
    worst = (torch.cat(eager).double() - truth).abs().max()
    for impl in ("reference", "sdpa"):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = attention(q, k, v, LENGTHS, impl)
        assert got.dtype == torch.bfloat16
        assert (got.double() - truth).abs().max() <= 2 * worst


def test_attention_weights_are_distributions_that_make_the_output():
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), 2, 4, dtype=torch.double) for _ in range(3))
    maps = attention_weights(q, k, LENGTHS)
    assert [tuple(m.shape) for m in maps] == [(2, n, n) for n in LENGTHS]
    for m, vc, out in zip(maps, v.split(LENGTHS), dense(q, k, v, LENGTHS).split(LENGTHS)):
        torch.testing.assert_close(m.sum(-1), torch.ones_like(m[..., 0]))
        torch.testing.assert_close((m @ vc.transpose(0, 1)).transpose(0, 1), out)


def test_attention_refuses_what_it_cannot_do():
    x = torch.zeros(4, 1, 2)
    for seqlens in ([3], [5], [4, 0], []):
        for impl in ("reference", "sdpa"):
            with pytest.raises(ValueError, match="sum to 4 packed tokens"):
                attention(x, x, x, seqlens, impl)
    with pytest.raises(ValueError, match="unknown attention 'flash'"):
        resolve("flash", "cpu")
    assert resolve("auto", "cpu") == "sdpa" and resolve("reference", "cuda") == "reference"


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton on this system")
def test_auto_takes_triton_on_a_gpu_where_it_is_faster(monkeypatch):
    assert resolve("auto", "cuda") == resolve("triton", "cuda") == "triton" and resolve("auto", "mps") == "sdpa"
    half = torch.zeros(300, 2, 64, dtype=torch.bfloat16)
    assert suits_triton(half, [257, 43]) and suits_triton(half[:0], [])
    assert not suits_triton(half.float(), [257, 43]) and not suits_triton(half[:, :, :48], [300])
    assert not suits_triton(torch.zeros(1370, 2, 64, dtype=torch.bfloat16), [1370])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match="needs a GPU, got cpu.*choose 'sdpa'"):
        resolve("triton", "cpu")


def test_without_triton_auto_takes_sdpa_and_the_name_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "minidino.kernels.attention", None)  # what an import then raises: ImportError
    assert resolve("auto", "cuda") == "sdpa"
    with pytest.raises(NotImplementedError, match="needs Triton, which is not installed here; choose 'sdpa'"):
        resolve("triton", "cuda")


def tiny(ffn="mlp", registers=2, impl="auto", **options):
    torch.manual_seed(0)
    vit = build_vit(
        "vit_tiny", patch_size=4, img_size=12, width=16, depth=2, heads=2, ffn=ffn, num_register_tokens=registers,
        attention=impl, **options,
    )  # fmt: skip
    return vit.double()


def crops():
    """Stored grid, non-square with and without masks, one single patch."""
    sizes = [(3, 12, 12), (2, 8, 20), (4, 8, 8), (1, 4, 4)]
    images = [torch.randn(b, 3, h, w, dtype=torch.double) for b, h, w in sizes]
    masks = [torch.rand(b, h * w // 16) < 0.4 for b, h, w in sizes]
    return images, [masks[0], masks[1], None, None]


def loss_of(tokens):
    """A scalar in which every output has its own weight."""
    generator = torch.Generator().manual_seed(5)
    outputs = [x for group in tokens for x in group[:4]]
    return sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)


def gradients(vit, tokens):
    vit.zero_grad()
    loss_of(tokens).backward()
    return {name: p.grad.clone() for name, p in vit.named_parameters()}


@pytest.mark.parametrize("ffn, registers", [("mlp", 2), ("swiglu", 0)])
def test_packed_equals_separate(ffn, registers):
    vit, (images, masks) = tiny(ffn, registers), crops()
    packed = vit.forward_packed(images, masks)
    separate = [vit.forward_features(x, m) for x, m in zip(images, masks)]
    for one, other in zip(packed, separate):
        for mine, theirs in zip(one[:4], other[:4]):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
        assert one.masks is other.masks
    expected = gradients(vit, separate)
    for name, grad in gradients(vit, packed).items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
        assert grad.abs().max() > 0, name


def test_model_is_the_same_with_reference_and_sdpa():
    images, masks = crops()
    slow, fast = tiny(impl="reference"), tiny(impl="sdpa")
    assert slow.blocks[0].attn.impl == "reference" and fast.blocks[0].attn.impl == "sdpa"
    expected = gradients(slow, slow.forward_packed(images, masks))
    for name, grad in gradients(fast, fast.forward_packed(images, masks)).items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-9)


def test_a_crop_sees_no_other_crop():
    vit, (images, masks) = tiny(), crops()
    before = vit.forward_packed(images, masks)
    images[1][0] += 100.0
    after = vit.forward_packed(images, masks)
    for i, (old, new) in enumerate(zip(before, after)):
        same = (old.x_prenorm == new.x_prenorm).flatten(1).all(1).tolist()
        assert same == ([False, True] if i == 1 else [True] * len(same))


def test_packed_wants_a_mask_per_group():
    images, _ = crops()
    with pytest.raises(ValueError, match="4 groups, 1 masks"):
        tiny().forward_packed(images, [None])
    with pytest.raises(ValueError, match="at least one group of images"):
        tiny().forward_packed([], [])


@pytest.mark.parametrize(
    "shape, dtype", [((2, 1), torch.bool), ((1, 4), torch.bool), ((4,), torch.bool), ((2, 4), torch.long)]
)
def test_masks_of_another_shape_or_type_are_never_spread(shape, dtype):
    embed = inspect.unwrap(VisionTransformer.embed)  # in the tests, annotations would refuse some of them first
    with pytest.raises(ValueError, match=r"expected masks \(B, N\) = \(2, 4\) of bool, got"):
        embed(tiny(), torch.randn(2, 3, 8, 8).double(), torch.ones(shape, dtype=dtype))


GROUPS = [(6, 3), (1, 2), (5, 4)]


def crop_mean(x, groups):
    """A residual in which the tokens of a crop mix, as in attention: torn crops would show."""
    parts = x.split([b * n for b, n in groups])
    parts = [p.unflatten(0, g) for p, g in zip(parts, groups)]
    return torch.cat([(p.mean(1, keepdim=True) + p.sin()).flatten(0, 1) for p in parts])


@pytest.mark.parametrize("kind", DROP_PATH)
def test_drop_path_is_unbiased(kind):
    torch.manual_seed(0)
    x, rate, n_draws = torch.randn(40, 2, dtype=torch.double), 0.4, 4000
    residual = crop_mean(x, GROUPS)
    draws = torch.stack([((DROP_PATH[kind](x, crop_mean, GROUPS, rate) - x) / residual)[:, 0] for _ in range(n_draws)])
    gain = draws.mean(0)  # how much of its residual each token got, on average; 1 is unbiased
    error = draws.std(0) / n_draws**0.5
    assert ((gain - 1).abs() <= 4 * error + 1e-9).all()
    # the gain is one of two values, and all tokens of a crop share it
    kept = {"scale": [1 / 0.6] * 3, "subset": [6 / 3, 1.0, 5 / 3]}[kind]
    for (b, n), part, value in zip(GROUPS, draws.split([b * n for b, n in GROUPS], dim=1), kept):
        per_crop = part.unflatten(1, (b, n))
        torch.testing.assert_close(per_crop, per_crop[:, :, :1].expand_as(per_crop))
        assert ((per_crop.abs() < 1e-9) | ((per_crop - value).abs() < 1e-9)).all()
    torch.testing.assert_close(DROP_PATH[kind](x, crop_mean, GROUPS, 0.0), x + residual)


def test_subset_computes_only_what_it_keeps():
    seen = []

    def residual(x, groups):
        seen.append((len(x), groups))
        return x

    drop_path_subset(torch.randn(40, 2), residual, GROUPS, 0.4)
    drop_path_subset(torch.randn(40, 2), residual, GROUPS, 0.99)
    assert seen == [(9 + 2 + 12, [(3, 3), (1, 2), (3, 4)]), (3 + 2 + 4, [(1, 3), (1, 2), (1, 4)])]


@pytest.mark.parametrize("kind", DROP_PATH)
def test_the_model_drops_only_in_training(kind):
    vit, plain, (images, masks) = tiny(drop_path_rate=0.4, drop_path=kind), tiny(), crops()
    vit.load_state_dict(plain.state_dict())
    expected = plain.forward_packed(images, masks)[0].x_prenorm

    def run(seed):
        torch.manual_seed(seed)
        return vit.forward_packed(images, masks)[0].x_prenorm

    assert not torch.allclose(run(0), expected) and not torch.equal(run(0), run(1)) and torch.equal(run(1), run(1))
    vit.eval()
    torch.testing.assert_close(run(0), expected)
