"""Damaged pictures: what each corruption does to one pixel, that chance is ours, that severity counts."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from minidino.images.corruptions import CORRUPTIONS, corrupt, mean_corruption_error

CHANCE = {"gaussian_noise", "shot_noise", "impulse_noise", "motion_blur"}


def some_images(n=3, height=40, width=32, seed=0):
    """Smooth pictures with every hue."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", antialias=True)
    return (smooth.clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_picture_is_damaged_by_its_seed_and_number_alone(name):
    images = some_images()
    whole = corrupt(images, name, 3, seed=7)
    assert whole.dtype == torch.uint8 and whole.shape == images.shape
    assert not torch.equal(whole, images)
    parts = [corrupt(images[:1], name, 3, 7), corrupt(images[1:], name, 3, 7, first=1)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(corrupt(images, name, 3, seed=8), whole) == (name not in CHANCE)
    assert torch.equal(images, some_images())  # the originals are untouched
    for shape in ((1, 3, 1, 1), (1, 3, 5, 70), (0, 3, 8, 8)):
        assert corrupt(torch.full(shape, 90, dtype=torch.uint8), name, 5).shape == shape


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"saturate"}))
def test_each_severity_is_farther_from_the_original(name):
    images = some_images(8, 96, 96)
    images = (images + torch.randint(0, 40, images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 255)
    images = images.to(torch.uint8)
    errors = [(corrupt(images, name, s).float() - images.float()).square().mean().item() for s in (1, 2, 3, 4, 5)]
    assert errors[0] > 0 and all(b > a for a, b in zip(errors, errors[1:], strict=False))


def test_noise_has_the_published_strength():
    gray = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8)
    values = {name: corrupt(gray, name, 1).float() / 255 for name in CHANCE - {"motion_blur"}}
    assert values["gaussian_noise"].std().item() == pytest.approx(0.08, rel=0.03)
    assert values["shot_noise"].std().item() == pytest.approx((128 / 255 / 60) ** 0.5, rel=0.03)
    assert values["shot_noise"].mean().item() == pytest.approx(128 / 255, rel=0.01)
    impulse = values["impulse_noise"]
    for extreme in (0, 1):
        assert (impulse == extreme).double().mean().item() == pytest.approx(0.015, rel=0.1)


def test_blurs_spread_a_point_as_far_as_they_say():
    ndimage = pytest.importorskip("scipy.ndimage")
    point = torch.zeros(1, 3, 112, 112, dtype=torch.uint8)  # half of the published side
    point[..., 40:72, 40:72] = 255
    found = corrupt(point, "gaussian_blur", 4)[0, 0].numpy() / 255
    expected = ndimage.gaussian_filter(point[0, 0].double().numpy() / 255, 2, mode="nearest")  # 4 px at 224 px
    np.testing.assert_allclose(found, expected, atol=0.003)
    point[..., 0, :] = 255  # an edge, where defocus_blur mirrors what is inside, as OpenCV
    disk = np.hypot(*np.mgrid[-5:6, -5:6]) <= 5  # 10 px at 224 px; without antialiasing
    expected = ndimage.convolve(point[0, 0].double().numpy() / 255, disk / disk.sum(), mode="mirror")
    np.testing.assert_allclose(corrupt(point, "defocus_blur", 5)[0, 0].numpy() / 255, expected, atol=0.04)
    point[..., 0, :] = 0
    moved = corrupt(point, "motion_blur", 5)[0].double().mean(0)
    centre = (moved.sum(0) * torch.arange(112)).sum() / moved.sum()
    assert moved.sum() == pytest.approx(32 * 32 * 255, rel=0.01) and centre < 55  # along a line, to one side


def test_colours_change_as_in_hsv():
    color = pytest.importorskip("skimage.color")
    images = some_images(2)
    images[0, :, :4] = 0
    images[0, :, 4:8] = 120  # black and grey have no hue
    hsv = color.rgb2hsv(images.numpy().transpose(0, 2, 3, 1) / 255)
    for name, channel, change in (
        ("brightness", 2, lambda v, s: v + (0.1, 0.2, 0.3, 0.4, 0.5)[s - 1]),
        ("saturate", 1, lambda v, s: v * (0.3, 0.1, 2, 5, 20)[s - 1] + (0, 0, 0, 0.1, 0.2)[s - 1]),
    ):
        for severity in (1, 2, 3, 4, 5):
            wanted = hsv.copy()
            wanted[..., channel] = np.clip(change(wanted[..., channel], severity), 0, 1)
            wanted = color.hsv2rgb(wanted).transpose(0, 3, 1, 2) * 255
            np.testing.assert_allclose(corrupt(images, name, severity).numpy(), wanted, atol=0.51)
    x = images.numpy() / 255
    mean = x.mean((2, 3), keepdims=True)
    np.testing.assert_allclose(corrupt(images, "contrast", 4).numpy(), (mean + 0.1 * (x - mean)) * 255, atol=0.51)


def test_pixelate_and_jpeg_are_those_of_pillow():
    images = some_images(1)
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    coarse = picture.resize((8, 10), Image.Resampling.BOX).resize((32, 40), Image.Resampling.BOX)
    assert np.array_equal(corrupt(images, "pixelate", 5)[0].permute(1, 2, 0), np.asarray(coarse))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=7)
    assert np.array_equal(corrupt(images, "jpeg_compression", 5)[0].permute(1, 2, 0), np.asarray(Image.open(file)))


def test_corrupt_says_what_is_wrong():
    images = some_images(1)
    for arguments, words in (
        ((images, "snow", 1), "unknown corruption 'snow': expected one of gaussian_noise"),
        ((images, "contrast", 0), "severity 1 to 5, got 0"),
        ((images.float(), "contrast", 1), "expected uint8 pixels"),
        ((images[0], "contrast", 1), "expected uint8 pixels"),
    ):
        with pytest.raises(ValueError, match=words):
            corrupt(*arguments)


def test_mean_corruption_error_is_relative_to_the_baseline():
    ours = {"contrast": [0.1, 0.2, 0.3], "pixelate": [0.2, 0.2, 0.2]}
    theirs = {"contrast": [0.2, 0.4, 0.6], "pixelate": [0.4, 0.8, 0.4]}
    found = mean_corruption_error(ours, theirs)
    assert found["ce"] == pytest.approx({"contrast": 0.5, "pixelate": 0.375}) and found["mce"] == pytest.approx(0.4375)
    assert mean_corruption_error(theirs, theirs)["mce"] == 1.0
    with pytest.raises(ValueError, match="same corruptions and severities"):
        mean_corruption_error(ours, {"contrast": [0.2, 0.4, 0.6]})
    with pytest.raises(ValueError, match="makes no error"):
        mean_corruption_error(ours, {name: [0.0] * 3 for name in ours})


def test_photographs_survive_every_corruption(shared_data):
    with zipfile.ZipFile(shared_data / "imagenette" / "imagenette_val.zip") as file:
        names = [name for name in file.namelist() if name.endswith(".jpg")][::1000]
        photographs = [np.asarray(Image.open(io.BytesIO(file.read(name)))).transpose(2, 0, 1) for name in names]
    images = torch.from_numpy(np.stack(photographs))
    for name in CORRUPTIONS:
        damaged = corrupt(images, name, 1).float()
        rows = torch.stack([images.float().flatten(), damaged.flatten()])
        assert torch.corrcoef(rows)[0, 1] > 0.75  # mildly damaged, and still the same picture
