"""Maps of features, the linear head on them, labels that travel, windows and scales, and the scores of all this."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, jaccard_score
from torch import nn

from minidino.images.crops import normalise
from minidino.model.vit import build_vit
from minidino.probes import dense, propagation, segmentation

CLASSES = 3


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return build_vit("vit_tiny", patch_size=8, img_size=32, depth=3, drop_path_rate=0.3, num_register_tokens=2)


def some_images(n=3, height=24, width=40):
    return torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def coloured(n, side=32, seed=0):
    """Masks of 3 classes in 8 px blocks and maps that tell them: one channel a class, with noise."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, CLASSES, (n, side // 8, side // 8), generator=generator)
    maps = F.one_hot(blocks, CLASSES).permute(0, 3, 1, 2).float()
    maps = torch.cat([maps, torch.zeros(n, 2, *maps.shape[2:])], 1)
    maps = maps + 0.1 * torch.randn(maps.shape, generator=generator)
    return maps, blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("used", [CLASSES, CLASSES - 1])
def test_scores_are_those_of_sklearn(used):
    rng = np.random.default_rng(3)
    target, prediction = rng.integers(-1, used, (4, 9, 7)), rng.integers(0, used, (4, 9, 7))
    known = target >= 0
    found = segmentation.mean_iou(prediction, target, CLASSES)
    counts = confusion_matrix(target[known], prediction[known], labels=range(CLASSES))
    assert np.array_equal(segmentation.confusion(prediction, target, CLASSES), counts)
    iou = jaccard_score(target[known], prediction[known], average=None, labels=range(used))
    np.testing.assert_allclose(found["iou"][:used], iou, atol=1e-12)
    assert all(math.isnan(x) for x in found["iou"][used:]) and found["miou"] == pytest.approx(iou.mean())
    assert found["accuracy"] == pytest.approx((target == prediction)[known].mean())
    recall = [(prediction[target == c] == c).mean() for c in range(used)]
    assert found["mean_accuracy"] == pytest.approx(np.mean(recall))


def test_scores_at_the_edges():
    only = segmentation.mean_iou(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), 1)
    assert only == {"miou": 1.0, "accuracy": 1.0, "mean_accuracy": 1.0, "iou": [1.0]}
    called = segmentation.mean_iou([0, 0, 2, 2], [0, 0, 0, -1], 4)  # class 2 is called and never true
    assert called["iou"][:1] + called["iou"][2:3] == [2 / 3, 0.0] and called["miou"] == pytest.approx(1 / 3)
    assert called["mean_accuracy"] == pytest.approx(2 / 3) and math.isnan(called["iou"][1])


@pytest.mark.parametrize(
    "prediction, target, words",
    [
        ([0, 1], [-1, -1], "every pixel is ignored"),
        ([0, 1], [0, 3], "expected labels from 0 to 2, or -1 = ignored, got 0 to 3"),
        ([0, 1], [0, -2], "got -2 to 0"),
        ([0, 3], [0, 1], "expected predictions from 0 to 2"),
        ([0, -1], [0, 1], "expected predictions from 0 to 2"),
        ([0], [0, 1], "one prediction per target"),
        ([0.2, 0.9], [0, 1], "whole numbers, got .0.2"),  # probabilities, which would all be class 0
        ([0, 1], [-0.5, 1], "whole numbers, got .-0.5"),
        ([0, 1], [math.nan, 1], "whole numbers, got .nan"),
    ],
)
def test_impossible_labels_are_refused(prediction, target, words):
    with pytest.raises(ValueError, match=words):
        segmentation.mean_iou(prediction, target, CLASSES)


# ---------------------------------------------------------------- maps


def test_maps_are_the_intermediate_layers(vit):
    images = some_images()
    vit.train()
    found = dense.feature_maps(vit, images, blocks=(-1, 0), class_token=True, batch_size=2, progress=False)
    assert vit.training and all(part.training for part in vit.modules())
    vit.eval()
    with torch.no_grad():
        pairs = vit.get_intermediate_layers(normalise(images), [0, 2], return_class_token=True)
    parts = [x for p, c in pairs for x in (p, c[:, None].expand_as(p))]
    expected = torch.cat(parts, 2).mT.unflatten(2, (3, 5))
    torch.testing.assert_close(found, expected)
    last = dense.feature_maps(vit, images, norm=False, dtype=torch.float16, progress=False)
    assert last.dtype == torch.float16 and last.shape == (3, 192, 3, 5)
    assert not torch.allclose(last.float(), expected[:, 384:576], atol=0.1)


def test_pictures_are_padded_with_zeros_in_the_centre_and_cut_back(vit):
    vit.eval()
    images = some_images(1, 19, 32)
    assert dense.borders((19, 32), 8) == (0, 0, 2, 3)
    padded = torch.cat([torch.zeros(1, 3, 2, 32), normalise(images), torch.zeros(1, 3, 3, 32)], 2)
    with torch.no_grad():
        expected = vit.get_intermediate_layers(padded, reshape=True)[0]
    found = dense.feature_maps(vit, images, progress=False)
    torch.testing.assert_close(found, expected)
    whole = F.interpolate(found, (24, 32), mode="bilinear", align_corners=False)
    assert torch.equal(dense.upsample(found, (19, 32), 8), whole[:, :, 2:21])
    with pytest.raises(ValueError, match=r"have a map of \(3, 4\), got \(4, 4\)"):
        dense.upsample(torch.zeros(1, 1, 4, 4), (19, 32), 8)


@pytest.mark.parametrize("size, patch_size", [((19, 30), 8), ((10, 9), None), ((24, 32), 8)])
def test_values_at_some_pixels_are_those_of_the_whole(size, patch_size):
    maps = torch.randn(2, 5, 3, 4)
    pixels = torch.arange(size[0] * size[1]).expand(2, -1)
    found = dense.at_pixels(maps, pixels, size, patch_size)
    torch.testing.assert_close(found, dense.upsample(maps, size, patch_size).flatten(2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size, patch_size", [((19, 30), 8), ((24, 32), None)])
def test_shares_of_a_patch_are_counted(size, patch_size):
    labels = torch.randint(-1, CLASSES, (2, *size))
    labels[0, :8] = -1
    found = dense.patch_shares(labels, (3, 4), CLASSES, patch_size)
    left, right, top, bottom = dense.borders(size, 8)
    padded = F.pad(labels, (left, right, top, bottom), value=-1)
    for i, row, column in np.ndindex(2, 3, 4):
        values = padded[i, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten()
        values = values[values >= 0]
        share = torch.bincount(values, minlength=CLASSES) / max(len(values), 1)
        torch.testing.assert_close(found[i, :, row, column], share)


def test_wrong_pictures_and_broken_networks_are_refused(vit):
    with pytest.raises(ValueError, match="uint8 pixels"):
        dense.feature_maps(vit, torch.rand(1, 3, 8, 8), progress=False)
    with pytest.raises(ValueError, match="expected blocks from 0 to 2"):
        dense.feature_maps(vit, some_images(), blocks=(7,), progress=False)
    broken = build_vit("vit_tiny", patch_size=8, img_size=32, depth=1)
    nn.init.constant_(broken.norm.weight, 1e30)
    with pytest.raises(ValueError, match="NaN or infinity"):
        dense.feature_maps(broken, some_images(), dtype=torch.float16, progress=False)


# ---------------------------------------------------------------- the linear head


def test_the_head_learns_what_the_maps_tell():
    train, test = coloured(12), coloured(6, seed=1)
    found = segmentation.linear_segmentation(*train, *test, CLASSES, 200, 4, 0.05, patch_size=8, classes=list("abc"))
    again = segmentation.linear_segmentation(*train, *test, CLASSES, 200, 4, 0.05, patch_size=8)
    assert found["miou"] == again["miou"] and list(found["table"]) == list("abc")
    ceiling = dense.upsample(F.one_hot(test[1][:, 4::8, 4::8], CLASSES).permute(0, 3, 1, 2).float(), (32, 32))
    assert found["accuracy"] > (ceiling.argmax(1) == test[1]).double().mean() - 0.03
    assert found["commonest"]["accuracy"] < 0.5 and found["commonest"]["miou"] < 0.2
    whole = torch.cat(list(segmentation.predict(found["head"], test[0], (32, 32), 8)))
    assert segmentation.mean_iou(whole, test[1], CLASSES)["iou"] == found["iou"]


def test_all_pixels_and_some_give_the_same_head_on_average():
    maps, masks = coloured(4)
    heads = [segmentation.train_head(maps, masks, CLASSES, 60, 4, 0.05, pixels=p, seed=1) for p in (None, 4000)]
    a, b = (h.conv_seg.weight.detach().flatten() for h in heads)
    assert F.cosine_similarity(a, b, dim=0) > 0.999


def test_the_head_starts_as_published_and_the_rate_rises_and_falls():
    head = segmentation.LinearHead(400, 50, torch.Generator().manual_seed(0))
    assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.03) and not head.conv_seg.bias.any()
    rates = [segmentation.poly(step, 40_000) for step in (0, 749, 1499, 20_000, 39_999)]
    assert rates == pytest.approx([1 / 1500, 0.5 * (1 - 749 / 40_000), 1 - 1499 / 40_000, 0.5, 1 / 40_000])


def test_training_is_that_of_the_formula_and_ignored_pixels_teach_nothing():
    maps, masks = coloured(4)
    masks[:, :, 16:] = -1
    found = segmentation.train_head(maps, masks, CLASSES, 3, 4, 0.1, pixels=None, seed=5)
    head = segmentation.LinearHead(5, CLASSES, torch.Generator().manual_seed(5))
    search = torch.optim.AdamW(head.parameters(), weight_decay=1e-4)
    for step in range(3):
        search.param_groups[0]["lr"] = 0.1 * (1 - step / 3)
        logits = F.interpolate(head(maps), (32, 32), mode="bilinear").log_softmax(1)[:, :, :, :16]
        loss = -logits.gather(1, masks[:, None, :, :16]).mean()
        search.zero_grad()
        loss.backward()
        search.step()
    torch.testing.assert_close(found.conv_seg.weight, head.conv_seg.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.bn.running_var, head.bn.running_var)
    masks[1:] = -1  # three of four pictures without a label: no NaN from such a batch
    head = segmentation.train_head(maps, masks, CLASSES, 6, 1, pixels=16)
    assert torch.isfinite(head.conv_seg.weight).all()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"train_masks": torch.full((2, 32, 32), -1)}, "every training pixel is ignored"),
        ({"test_masks": torch.full((2, 32, 32), -1)}, "every test pixel is ignored"),
        ({"train_masks": torch.full((2, 32, 32), 3)}, "expected labels from 0 to 2"),
        ({"train_masks": torch.zeros(1, 32, 32)}, "as many targets"),
        ({"test_maps": torch.full((2, 5, 4, 4), torch.nan)}, "the test maps hold NaN"),
        ({"steps": 0}, "of at least 1"),
        ({"classes": ["a"]}, "a name for each of 3 classes"),
        ({"patch_size": 7}, "give patch_size=None"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    maps, masks = coloured(2)
    given = {"train_maps": maps, "train_masks": masks, "test_maps": maps, "test_masks": masks, "n_classes": CLASSES}
    with pytest.raises(ValueError, match=words):
        segmentation.linear_segmentation(**given | {"steps": 1} | change)


def test_one_picture_of_one_class_is_enough():
    maps, masks = torch.randn(1, 4, 2, 2), np.zeros((1, 16, 16), dtype=np.uint8)
    found = segmentation.linear_segmentation(maps.half().numpy(), masks, maps, masks, 1, steps=2)
    assert found["miou"] == found["accuracy"] == 1.0


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", ">i2", "<f4", "mirrored", "torch.uint16"])
def test_masks_may_be_arrays_of_any_kind(kind):
    """A 16-bit PNG is uint16, a file of another machine has its bytes in another order."""
    maps, masks = coloured(2)
    array = masks.numpy().astype("i8" if kind in ("mirrored", "torch.uint16") else kind)
    array = array[:, ::-1][:, ::-1] if kind == "mirrored" else array
    array = masks.to(torch.uint16) if kind == "torch.uint16" else array
    for given in ((maps, masks), (maps.numpy().astype(">f4")[::-1][::-1], array)):
        head = segmentation.linear_segmentation(*given, *given, CLASSES, steps=3)
        near = propagation.knn_segmentation(*given, *given, CLASSES)
        carried = propagation.propagate_labels(*given, given[0], CLASSES)
        found = [{**head, "head": 0}, near, segmentation.mean_iou(carried, given[1], CLASSES)]
        expected = found if given[1] is masks else expected
    assert found == expected and 0 < head["miou"] < 1
    floats = torch.where(masks == 1, 0.5, masks.float())
    with pytest.raises(ValueError, match="whole numbers, got .0.5"):
        segmentation.linear_segmentation(maps, floats, maps, masks, CLASSES, steps=1)
    with pytest.raises(ValueError, match="whole numbers, got .0.5"):
        propagation.knn_segmentation(maps, floats, maps, masks, CLASSES)


def test_classes_of_one_name_keep_a_row_each():
    train = coloured(4)
    found = segmentation.linear_segmentation(*train, *train, CLASSES, 2, patch_size=8, classes=["a", "b", "a"])
    assert list(found["table"]) == ["a (0)", "b", "a (2)"] and list(found["table"].values()) == found["iou"]


# ---------------------------------------------------------------- labels that travel


def test_neighbours_name_patches_as_a_loop_does():
    (maps, masks), (test_maps, test_masks) = coloured(3), coloured(2, seed=1)
    masks[0, :8, :8] = -1  # one patch without a label
    found = propagation.knn_segmentation(maps, masks, test_maps, test_masks, CLASSES, k=3, patch_size=8)
    bank, labels = maps.permute(0, 2, 3, 1).reshape(-1, 5)[1:], masks[:, 4::8, 4::8].reshape(-1)[1:]
    held = torch.zeros(2, CLASSES, 4, 4)
    for i, row, column in np.ndindex(2, 4, 4):
        cosine = F.cosine_similarity(bank, test_maps[i, :, row, column], dim=1)
        near = cosine.topk(3)
        for weight, index in zip(torch.softmax(near.values / 0.07, 0), near.indices):
            held[i, labels[index], row, column] += weight
    expected = F.interpolate(held, (32, 32), mode="bilinear").argmax(1)
    assert found == segmentation.mean_iou(expected, test_masks, CLASSES)
    small = propagation.knn_segmentation(maps, masks, test_maps, test_masks, CLASSES, n_patches=5)
    assert 0 < small["miou"] < found["miou"]
    with pytest.raises(ValueError, match="no patch to compare with"):
        propagation.knn_segmentation(maps, masks * 0 - 1, test_maps, test_masks, CLASSES)
    for temperature in (0, -1):  # of which the softmax names everything class 0, or prefers what is least alike
        with pytest.raises(ValueError, match=f"a temperature above 0, got {temperature}"):
            propagation.knn_segmentation(maps, masks, test_maps, test_masks, CLASSES, temperature=temperature)
        with pytest.raises(ValueError, match=f"a temperature above 0, got {temperature}"):
            propagation.propagate_labels(maps, masks, test_maps, CLASSES, temperature=temperature)


def test_labels_are_carried_to_a_moved_picture():
    maps, masks = coloured(1)
    found = propagation.propagate_labels(maps, masks, maps.flip(3), CLASSES, k=1, patch_size=8)
    blocks = F.one_hot(masks.flip(2)[:, 4::8, 4::8], CLASSES).permute(0, 3, 1, 2).float()
    assert torch.equal(found, dense.upsample(blocks, (32, 32)).argmax(1))
    assert (found == masks.flip(2)).double().mean() > 0.8  # the corners of patches are rounded off


# ---------------------------------------------------------------- windows and scales


def by_pixel(images):
    """Logits from each pixel alone: whatever window it is seen through, it is called the same."""
    return torch.stack([images[:, 0] / 60.0, images[:, 1] / 50.0, images[:, 2] / 40.0], 1)


def test_windows_that_do_not_overlap_give_the_plain_prediction(vit):
    images = some_images(2, 32, 48)
    head = segmentation.LinearHead(192, CLASSES, torch.Generator().manual_seed(0))
    predict = segmentation.segmenter(vit, head)
    found = segmentation.predict_windows(predict, images, 16, 16)
    for top, left in [(0, 0), (16, 32), (0, 16)]:
        here = (..., slice(top, top + 16), slice(left, left + 16))
        torch.testing.assert_close(found[here], predict(images[here]).softmax(1))
    torch.testing.assert_close(segmentation.predict_windows(predict, images, 99, 1), predict(images).softmax(1))
    assert head.training


@pytest.mark.parametrize("window, stride", [(16, 16), (16, 5), (10, 7), (100, 30), (1, 1)])
def test_every_pixel_is_seen_and_overlaps_are_averaged(window, stride):
    images = some_images(2, 21, 33)
    found = segmentation.predict_windows(by_pixel, images, window, stride)
    torch.testing.assert_close(found, by_pixel(images).softmax(1))


def test_the_windows_are_those_of_mmsegmentation():
    for side, window, stride in [(640, 512, 341), (512, 512, 341), (700, 512, 341), (853, 512, 341), (20, 512, 341)]:
        count = max(side - window + stride - 1, 0) // stride + 1
        ends = [min(i * stride + window, side) for i in range(count)]
        assert segmentation._starts(side, window, stride) == [max(end - window, 0) for end in ends]


def test_scales_and_mirrors_are_averaged():
    images = some_images(1, 16, 24)
    found = segmentation.predict_windows(by_pixel, images, 64, 64, scales=(1.0, 2.0))
    large = F.interpolate(images.float(), (32, 48), mode="bilinear").round().to(torch.uint8)
    large = F.interpolate(by_pixel(large), (16, 24), mode="bilinear").softmax(1)
    torch.testing.assert_close(found, (by_pixel(images).softmax(1) + large) / 2)
    mirrored = segmentation.predict_windows(by_pixel, images, 64, 64, flip=True)
    torch.testing.assert_close(mirrored, by_pixel(images).softmax(1))

    def lopsided(images):
        return by_pixel(images) * torch.arange(images.shape[3])

    both = (lopsided(images).softmax(1) + lopsided(images.flip(3)).flip(3).softmax(1)) / 2
    torch.testing.assert_close(segmentation.predict_windows(lopsided, images, 64, 64, flip=True), both)
    assert segmentation.MS_SCALES == (1.0, 1.32, 1.73, 2.28, 3.0)
    full = segmentation.predict_windows(by_pixel, images, 20, 13, segmentation.MS_SCALES, flip=True)
    torch.testing.assert_close(full.sum(1), torch.ones(1, 16, 24))


@pytest.mark.parametrize("options", [{"stride": 17}, {"stride": 0}, {"scales": ()}, {"scales": (0.0,)}])
def test_windows_that_leave_gaps_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        segmentation.predict_windows(by_pixel, some_images(), **{"window": 16, "stride": 16} | options)
