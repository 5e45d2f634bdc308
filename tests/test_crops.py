"""The batched augmentation against torchvision, operation by operation, and against the readable reference."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from scipy.stats import chi2_contingency, ks_2samp
from torchvision.transforms import ColorJitter, GaussianBlur, RandomResizedCrop

from minidino.images import crops

STILL = crops.CropLaw(
    size=16, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip_p=0.0, jitter_p=0.0, gray_p=0.0, blur_p=0.0
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def photograph(height=48, width=64):
    """Coloured waves, an edge and noise: smooth, sharp and rough places. (3, H, W) uint8"""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([0.5 + 0.5 * (5 * x + 2 * y).sin(), 0.2 + 0.6 * y * x, 0.4 + 0.3 * (9 * y).cos()])
    image[:, height // 3 : height // 2, width // 4 : width // 2] *= 0.3
    image += 0.08 * torch.randn(image.shape, generator=generator(7))
    return (image.clamp(0, 1) * 255).to(torch.uint8)


def as_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def unnormalise(views):
    return views * torch.tensor(crops.IMAGENET_STD)[:, None, None] + torch.tensor(crops.IMAGENET_MEAN)[:, None, None]


def batched(image, law, n):
    """n crops of one image by the batched version."""
    views, local = crops.multi_crop(
        image.expand(n, -1, -1, -1), torch.tensor([image.shape[1:]] * n), [law], law, 0, list(range(n))
    )
    assert local.shape == (0, n, 3, law.size, law.size)
    return views[0]


def reference(image, law, n):
    g = generator(3)
    return torch.stack([crops.reference_crop(as_pil(image), law, g) for _ in range(n)])


# ---------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    "height, width, scale", [(48, 64, (0.05, 0.32)), (60, 40, (0.32, 1.0)), (20, 100, (0.5, 1.0)), (7, 5, (0.1, 1.0))]
)
def test_boxes_follow_torchvision(height, width, scale):
    ours = crops.crop_boxes(2000, height, width, scale, generator()).double().numpy()
    image = torch.zeros(1, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theirs = np.array([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(2000)])
    assert (ours == ours.round()).all() and (ours >= 0).all() and (ours[:, 2:] > 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= [height, width]).all()
    for statistic in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert ks_2samp(statistic(ours), statistic(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("height, width", [(10, 101), (101, 10), (33, 33)])
def test_boxes_fall_back_to_the_centre(height, width):
    scale = (4.0, 5.0)  # never fits
    box = crops.crop_boxes(1, height, width, scale, generator())[0]
    expected = RandomResizedCrop.get_params(torch.zeros(1, height, width), scale, (3 / 4, 4 / 3))
    assert tuple(box.tolist()) == tuple(map(float, expected))


# ---------------------------------------------------------------- resize


def one_by_one(lines, box, flip, size):
    return torch.cat(list(crops.resize_each(lines, box, flip, size)))


RESIZE = pytest.mark.parametrize("resize", [crops.resize_boxes, one_by_one])  # as on a GPU, and as on a CPU


@pytest.mark.parametrize(
    "box, size", [((3, 5, 30, 40), 16), ((0, 0, 37, 53), 48), ((10, 20, 5, 7), 24), ((36, 52, 1, 1), 3)]
)
@pytest.mark.parametrize("flip", [False, True])
@RESIZE
def test_resize_is_crop_then_antialiased_bicubic(resize, box, size, flip):
    image = torch.rand(2, 3, 37, 53, generator=generator())
    top, left, height, width = box
    lines = image.permute(0, 2, 1, 3).contiguous()
    ours = resize(lines, torch.tensor([box, box]).float(), torch.tensor([flip, flip]), size)
    cut = image[:, :, top : top + height, left : left + width]
    expected = F.interpolate(cut, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(ours, expected.flip(-1) if flip else expected, rtol=0, atol=1e-4)


@RESIZE
def test_resize_agrees_with_pil_up_to_its_rounding(resize):
    image = photograph()
    box = torch.tensor([[5.0, 3.0, 40.0, 50.0]])
    ours = resize(image.permute(1, 0, 2)[None] / 255, box, torch.tensor([False]), 24)
    torch.testing.assert_close(resize(image.permute(1, 0, 2)[None], box, torch.tensor([False]), 24), ours)  # from bytes
    bicubic = TF.InterpolationMode.BICUBIC
    expected = TF.to_tensor(TF.resized_crop(as_pil(image), 5, 3, 40, 50, [24, 24], interpolation=bicubic))
    torch.testing.assert_close(ours[0], expected, rtol=0, atol=2 / 255)


@RESIZE
def test_resize_is_that_of_pil_in_floats_where_much_is_clipped(resize):
    page = 255 * torch.randint(0, 2, (60, 60), generator=generator()).float()  # black on white, as writing
    ours = resize(page.expand(3, -1, -1).permute(1, 0, 2)[None] / 255, torch.tensor([[5.0, 3.0, 50.0, 50.0]]),
                  torch.tensor([False]), 64)  # fmt: skip
    cut = Image.fromarray(page.numpy()).crop((3, 5, 53, 55))
    floats, eight_bits = (np.asarray(c.resize((64, 64), Image.Resampling.BICUBIC)) for c in (cut, cut.convert("L")))
    assert (floats < -5).any() and np.abs(floats.clip(0, 255) - eight_bits).max() > 5  # clipped once, and twice
    torch.testing.assert_close(ours[0, 0].numpy(), floats.clip(0, 255) / 255, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- colour and focus


@pytest.mark.parametrize(
    "ours, theirs, low, high",
    [
        (crops.brightness, TF.adjust_brightness, 0.0, 2.0),
        (crops.contrast, TF.adjust_contrast, 0.0, 2.0),
        (crops.saturation, TF.adjust_saturation, 0.0, 2.0),
        (crops.hue, TF.adjust_hue, -0.5, 0.5),
        (lambda x, s: crops.blur(x, crops.gaussian_kernel(s)), lambda x, s: TF.gaussian_blur(x, [9, 9], [s, s]), 0.1, 2.0),
        (lambda x, _: crops.solarize(x), lambda x, _: TF.solarize(x, 128 / 255), 0.0, 1.0),
        (lambda x, _: crops.luminance(x), lambda x, _: TF.rgb_to_grayscale(x), 0.0, 1.0),
    ],
    ids=["brightness", "contrast", "saturation", "hue", "blur", "solarize", "luminance"],
)
def test_each_operation_is_torchvisions(ours, theirs, low, high):
    x = torch.rand(7, 3, 11, 11, generator=generator())
    x[0] = 0.25  # grey
    x[1, 0] = x[1, 1]  # ties of the largest channel
    x[2] = x[2].round()  # black, white and pure colours
    x[3, :, 0, 0] = 128 / 255
    parameters = torch.linspace(low, high, 7)
    expected = torch.stack([theirs(row, p.item()) for row, p in zip(x, parameters)])
    torch.testing.assert_close(ours(x, parameters), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_crops_of_less_than_half_a_kernel_are_mirrored_again(size):
    x = torch.rand(3, 3, size, size, generator=generator())
    kernel = crops.gaussian_kernel(torch.tensor([0.1, 1.0, 2.0]))
    expected = np.pad(x, [(0, 0), (0, 0), (4, 4), (4, 4)], mode="reflect")
    for axis in (3, 2):
        windows = np.lib.stride_tricks.sliding_window_view(expected, crops.BLUR_KERNEL, axis)
        expected = np.einsum("nchwk,nk->nchw", windows, kernel)
    np.testing.assert_allclose(crops.blur(x, kernel), expected, atol=1e-6)


@pytest.mark.parametrize("change", [crops.brightness, crops.contrast, crops.saturation, crops.hue])
def test_a_row_alone_is_changed_as_among_others(change):
    x, factors = torch.rand(5, 3, 11, 11, generator=generator()), [-0.5, -0.1, 0.4, 1.0, 1.9]
    factors = [abs(f) for f in factors] if change is not crops.hue else [f / 2 for f in factors]
    alone = torch.cat([change(row, f) for row, f in zip(x.split(1), factors)])
    torch.testing.assert_close(alone, change(x, torch.tensor(factors)), rtol=0, atol=1e-6)


def distorted(x, plan):
    crops.distort(new := x.clone(), plan)
    return new


def distorted_one_by_one(x, plan):
    return torch.cat(list(crops.distort_each(x.split(1), plan)))


@pytest.mark.parametrize("change", [distorted, distorted_one_by_one])  # as on a GPU, and as on a CPU
def test_distort_keeps_the_order_of_each_row_and_spares_the_others(change):
    x = torch.rand(24, 3, 9, 9, generator=generator())
    n, off = len(x), torch.zeros(len(x), dtype=torch.bool)
    law = replace(STILL, jitter_p=0.5, gray_p=0.4, blur_p=0.5, solarize_p=0.5)
    uniforms = torch.rand(n, crops.N_DRAWS, generator=generator(2))
    side = torch.full((n,), 16)
    plan = crops.plan_view(uniforms, side, side, law)
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    expected = x.clone()
    for i in range(n):
        if plan.jitter[i]:
            for kind in plan.order[i].tolist():
                expected[i] = operations[kind](expected[i], plan.factors[i, kind].item())
        if plan.gray[i]:
            expected[i] = TF.rgb_to_grayscale(expected[i], 3)
        if plan.blur[i]:
            expected[i] = TF.gaussian_blur(expected[i], [9, 9], [plan.sigma[i].item()] * 2)
        if plan.solarize[i]:
            expected[i] = TF.solarize(expected[i], 128 / 255)
    ours = change(x, plan)
    # solarize jumps at its threshold, so a rounding error there may flip a pixel: allow none above 1e-5 elsewhere
    assert ((ours - expected).abs() > 1e-5).float().mean() < 1e-3
    untouched = ~(plan.jitter | plan.gray | plan.blur | plan.solarize)
    assert untouched.any() and torch.equal(ours[untouched], x[untouched])
    assert len(set(map(tuple, plan.order.tolist()))) > 10
    idle = plan._replace(jitter=off, gray=off, blur=off, solarize=off)
    assert torch.equal(change(x, idle), x)


def test_plan_follows_the_law():
    law = crops.CropLaw(size=8, scale=(0.3, 0.9), solarize_p=0.2, blur_p=0.9)
    side = torch.full((4000,), 64)
    plan = crops.plan_view(torch.rand(4000, crops.N_DRAWS, generator=generator()), side, side, law)
    for name, p in {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": 0.9, "solarize": 0.2}.items():
        assert getattr(plan, name).float().mean().item() == pytest.approx(p, abs=4 * math.sqrt(0.25 / 4000)), name
    low, high = torch.tensor([0.6, 0.6, 0.8, -0.1]), torch.tensor([1.4, 1.4, 1.2, 0.1])
    torch.testing.assert_close(plan.factors.amin(dim=0), low, rtol=0, atol=2e-3)
    torch.testing.assert_close(plan.factors.amax(dim=0), high, rtol=0, atol=2e-3)
    assert 0.1 <= plan.sigma.min() < 0.11 and 1.99 < plan.sigma.max() <= 2.0
    share = plan.order[:, 0].bincount(minlength=4) / 4000
    assert (share - 0.25).abs().max() < 0.03


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_jitter_and_blur_are_distributed_as_torchvision_draws_them(kind):
    law, n = crops.released_laws(24, 16)[kind], 2000
    side = torch.full((n,), 64)
    plan = crops.plan_view(torch.rand(n, crops.N_DRAWS, generator=generator(4)), side, side, law)
    jitter = ColorJitter(law.brightness, law.contrast, law.saturation, law.hue)
    blur = GaussianBlur(crops.BLUR_KERNEL, law.blur_sigma)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        drawn = [ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(n)]
        sigma = [blur.get_params(*law.blur_sigma) for _ in range(n)]
    for name, column, theirs in zip("bcsh", plan.factors.T, zip(*(one[1:] for one in drawn))):
        assert ks_2samp(column.numpy(), theirs).pvalue > 1e-3, name
    assert ks_2samp(plan.sigma.numpy(), sigma).pvalue > 1e-3
    orders = [[tuple(order.tolist()) for order in some] for some in (plan.order, (one[0] for one in drawn))]
    table = np.array([[some.count(order) for order in sorted(set(orders[0]))] for some in orders])
    assert table.shape == (2, 24) and chi2_contingency(table).pvalue > 1e-3


# ---------------------------------------------------------------- the whole


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_every_view_is_torchvisions_for_the_same_parameters(kind):
    image, n = photograph(), 40
    law = replace(crops.released_laws(24, 16)[kind], solarize_p=0.0)  # it jumps at its threshold, and is tested alone
    ours = unnormalise(batched(image, law, n))
    draws = torch.cat([torch.rand(1, crops.N_DRAWS, generator=generator(seed)) for seed in range(n)])
    plan = crops.plan_view(draws, torch.full((n,), 48), torch.full((n,), 64), law)
    change = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    bicubic, size = TF.InterpolationMode.BICUBIC, [law.size] * 2
    for i, (top, left, height, width) in enumerate(plan.box.int().tolist()):
        expected = TF.resized_crop(image / 255, top, left, height, width, size, bicubic, antialias=True).clamp(0, 1)
        expected = TF.hflip(expected) if plan.flip[i] else expected
        for kind in plan.order[i].tolist() if plan.jitter[i] else ():
            expected = change[kind](expected, plan.factors[i, kind].item())
        expected = TF.rgb_to_grayscale(expected, 3) if plan.gray[i] else expected
        expected = TF.gaussian_blur(expected, [9, 9], [plan.sigma[i].item()] * 2) if plan.blur[i] else expected
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=2e-5)  # the task allows 2/255


@pytest.mark.parametrize("name, factor", [("brightness", 1.3), ("contrast", 0.7), ("saturation", 1.2), ("luminance", 1.0)])
def test_colours_agree_with_pil_up_to_its_rounding(name, factor):
    image = photograph()
    ours, theirs = {
        "brightness": (crops.brightness, TF.adjust_brightness), "contrast": (crops.contrast, TF.adjust_contrast),
        "saturation": (crops.saturation, TF.adjust_saturation),
        "luminance": (lambda x, _: crops.luminance(x).expand_as(x), lambda x, _: TF.rgb_to_grayscale(x, 3)),
    }[name]  # fmt: skip
    square = image[:, :48, :48]
    expected = TF.to_tensor(theirs(as_pil(square), factor))
    torch.testing.assert_close(ours(square[None] / 255, torch.tensor([factor]))[0], expected, rtol=0, atol=2 / 255)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_batched_and_reference_have_the_same_statistics(kind):
    law = crops.released_laws(24, 16, blur="paper" if kind == 0 else "released")[kind]
    image, n = photograph(), 600
    ours, theirs = unnormalise(batched(image, law, n)), unnormalise(reference(image, law, n))
    assert ours.min() > -1e-5 and ours.max() < 1 + 1e-5
    measures = {
        "mean": lambda x: x.mean(dim=(1, 2, 3)),
        "spread": lambda x: x.std(dim=(1, 2, 3)),
        "red": lambda x: x[:, 0].mean(dim=(1, 2)),
        "blue": lambda x: x[:, 2].mean(dim=(1, 2)),
        "colour": lambda x: (x.amax(dim=1) - x.amin(dim=1)).mean(dim=(1, 2)),
        "sharpness": lambda x: x.diff(dim=3).abs().mean(dim=(1, 2, 3)),
        "leftness": lambda x: x[..., : law.size // 2].mean(dim=(1, 2, 3)) - x.mean(dim=(1, 2, 3)),
        "one pixel": lambda x: x[:, 1, 5, 5],
    }
    for name, measure in measures.items():
        assert ks_2samp(measure(ours).numpy(), measure(theirs).numpy()).pvalue > 1e-3, name
    histograms = [torch.histc(TF.rgb_to_grayscale(x), bins=12, min=0, max=1) / x[:, 0].numel() for x in (ours, theirs)]
    torch.testing.assert_close(*histograms, rtol=0, atol=0.02)
    gray = [(x.amax(dim=1) - x.amin(dim=1) < 1 / 255).all(dim=(1, 2)).float().mean().item() for x in (ours, theirs)]
    assert gray == pytest.approx([0.2, 0.2], abs=0.07)


def test_a_law_without_chance_is_a_plain_resize():
    image = photograph(40, 40)
    expected = F.interpolate(image[None] / 255, size=(16, 16), mode="bicubic", antialias=True).clamp(0, 1)[0]
    torch.testing.assert_close(unnormalise(batched(image, STILL, 1))[0], expected, rtol=0, atol=1e-5)
    slow = unnormalise(crops.reference_crop(as_pil(image), STILL, generator()))
    torch.testing.assert_close(slow, expected, rtol=0, atol=2 / 255)


def test_views_of_an_image_depend_on_its_seed_alone():
    first, second = photograph(40, 56), photograph(64, 48)
    padded = torch.full((2, 3, 64, 56), 255, dtype=torch.uint8)
    padded[0, :, :40, :56], padded[1, :, :64, :48] = first, second
    *laws_global, law_local = crops.released_laws(24, 16)
    sizes = torch.tensor([[40, 56], [64, 48]])
    together = crops.multi_crop(padded, sizes, laws_global, law_local, 3, [11, 12])
    swapped = crops.multi_crop(padded.flip(0), sizes.flip(0), laws_global, law_local, 3, [12, 11])
    alone = crops.multi_crop(first[None], sizes[:1], laws_global, law_local, 3, [11])
    other = crops.multi_crop(first[None], sizes[:1], laws_global, law_local, 3, [13])
    for views, turned, single, different in zip(together, swapped, alone, other):
        # a rounding error at the solarize threshold flips a pixel: count the pixels that differ
        assert ((views - turned.flip(1)).abs() > 1e-4).float().mean() < 1e-3
        assert ((views[:, :1] - single).abs() > 1e-4).float().mean() < 1e-3
        assert (views[:, :1] - different).abs().mean() > 0.05
    assert together[0].shape == (2, 2, 3, 24, 24) and together[1].shape == (3, 2, 3, 16, 16)
    assert (together[0][0] - together[0][1]).abs().mean() > 0.05  # the two global views differ
    repeat = crops.multi_crop(padded, sizes, laws_global, law_local, 3, [11, 12])
    assert all(torch.equal(a, b) for a, b in zip(together, repeat))


def test_reference_uses_only_the_generator_it_is_given():
    law, image = crops.released_laws(24, 16)[1], as_pil(photograph())
    before = torch.random.get_rng_state()
    g = generator(5)
    one, two = crops.reference_crop(image, law, g), crops.reference_crop(image, law, g)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(one, two)
    assert torch.equal(crops.reference_crop(image, law, generator(5)), one)


def test_crop_seed_depends_on_all_three_and_stays():
    seeds = {crops.crop_seed(s, t, i) for s in range(5) for t in range(20) for i in range(20)}
    assert len(seeds) == 2000 and all(0 <= seed < 2**63 for seed in seeds)
    assert crops.crop_seed(1, 23, 4) != crops.crop_seed(12, 3, 4)
    assert crops.crop_seed(0, 0, 0) == 4808561972376111626  # runs of today must be repeatable tomorrow


def test_the_switch_of_blur_and_the_errors():
    assert [law.blur_p for law in crops.released_laws(224, 98)] == [0.0, 0.9, 0.5]
    assert [law.blur_p for law in crops.released_laws(224, 98, blur="paper")] == [1.0, 0.1, 0.5]
    assert [law.solarize_p for law in crops.released_laws(224, 98)] == [0.0, 0.2, 0.0]
    with pytest.raises(ValueError, match="got 'nominal'"):
        crops.released_laws(224, 98, blur="nominal")
    images, sizes = photograph()[None], torch.tensor([[48, 64]])
    with pytest.raises(ValueError, match=r"sizes \[16, 17\] px"):
        crops.multi_crop(images, sizes, [STILL, replace(STILL, size=17)], STILL, 0, [0])
    with pytest.raises(ValueError, match="got 1, 1, 2"):
        crops.multi_crop(images, sizes, [STILL], STILL, 0, [0, 1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_cuts_the_same_views():
    *laws_global, law_local = crops.released_laws(24, 16)
    images, sizes = photograph()[None], torch.tensor([[48, 64]])
    on_cpu = crops.multi_crop(images, sizes, laws_global, law_local, 2, [3])
    on_gpu = crops.multi_crop(images.cuda(), sizes, laws_global, law_local, 2, [3])
    for a, b in zip(on_cpu, on_gpu):
        assert b.is_cuda and ((a - b.cpu()).abs() > 1e-3).float().mean() < 1e-3
