"""Depth from frozen features: bins, losses, errors and the head, against loops and against the released formulas."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minidino.probes import depth


def some_depth(*shape, seed=0, unknown=0.3):
    generator = torch.Generator().manual_seed(seed)
    values = 0.5 + 4 * torch.rand(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < unknown, 0.0, values)


# ---------------------------------------------------------------- blocks and bins


def test_the_published_blocks():
    assert depth.taps(12) == depth.taps(12, mode="fixed") == [2, 5, 8, 11]
    assert depth.taps(24) == [4, 11, 17, 23] and depth.taps(24, mode="fixed") == [5, 11, 17, 23]
    assert depth.taps(40) == depth.taps(40, mode="fixed") == [9, 19, 29, 39]
    assert depth.taps(24, "lin1") == [23] and depth.taps(4) == [0, 1, 2, 3] and depth.taps(1, "lin1") == [0]
    depth.taps(24).append(0)
    assert depth.taps(24) == [4, 11, 17, 23]  # nobody can spoil the table


@pytest.mark.parametrize("call", [(3,), (12, "dpt"), (12, "lin4", "paper"), (0, "lin1")])
def test_impossible_blocks_are_refused(call):
    with pytest.raises(ValueError, match="lin"):
        depth.taps(*call)


def test_bins_are_spread_evenly_or_in_ratios():
    assert torch.equal(depth.bins(), torch.linspace(0.001, 10, 256))
    logs = depth.bins(0.1, 10, 5, "log")
    np.testing.assert_allclose(logs, np.geomspace(0.1, 10, 5), rtol=1e-6)
    for wrong in [(0, 10), (1, 1), (1, 10, 1), (1, math.inf), (1, 2, 3, "sid")]:
        with pytest.raises(ValueError, match="0 < min_depth < max_depth"):
            depth.bins(*wrong)


def test_expected_depth_is_the_mean_of_the_bins():
    logits, bins = 3 * torch.randn(2, 6, 3, 4), depth.bins(0.5, 4, 6)
    found = depth.expected_depth(logits, bins)
    assert found.shape == (2, 3, 4)
    for i, y, x in np.ndindex(2, 3, 4):
        votes = [max(v, 0.0) + 0.1 for v in logits[i, :, y, x].tolist()]
        expected = sum(v * b for v, b in zip(votes, bins.tolist())) / sum(votes)
        assert found[i, y, x].item() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(depth.expected_depth(torch.full((1, 6, 1, 1), -9.0), bins), bins.mean())
    with pytest.raises(ValueError, match=r"expected logits \(B, 6, H, W\)"):
        depth.expected_depth(logits[:, :5], bins)


# ---------------------------------------------------------------- losses


def test_silog_is_the_formula():
    target, prediction = some_depth(2, 5, 6), some_depth(2, 5, 6, seed=1, unknown=0)
    valid = target > 0
    pairs = zip(prediction[valid].double().tolist(), target[valid].double().tolist())
    g = [math.log(p + 0.001) - math.log(t + 0.001) for p, t in pairs]
    mean, var = np.mean(g), np.var(g, ddof=1)
    found = depth.silog_loss(prediction, target, valid)
    assert found.item() == pytest.approx(math.sqrt(var + 0.15 * mean**2), rel=1e-5)
    assert depth.silog_loss(prediction, target, valid, warm_up=True).item() == pytest.approx(
        math.sqrt(0.15 * mean**2), rel=1e-5
    )


def test_silog_forgives_a_common_factor_and_has_a_gradient_at_the_truth():
    target = 1 + torch.rand(2, 4, 4)
    valid = torch.ones_like(target, dtype=torch.bool)
    doubled = depth.silog_loss(2 * target, target, valid).item()
    assert doubled == pytest.approx(math.sqrt(0.15) * math.log(2), rel=1e-2)
    prediction = target.clone().requires_grad_()
    loss = depth.silog_loss(prediction, target, valid)
    loss.backward()
    assert loss.item() == pytest.approx(1e-6) and torch.isfinite(prediction.grad).all()
    one = torch.zeros_like(valid)
    one[0, 0, 0] = True
    assert depth.silog_loss(2 * target, target, one).item() == pytest.approx(math.sqrt(0.15) * math.log(2), rel=1e-2)
    with pytest.raises(ValueError, match="no valid pixel"):
        depth.silog_loss(target, target, ~valid)
    with pytest.raises(ValueError, match="of one shape"):
        depth.silog_loss(target, target[:1], valid)


def released_gradient_loss(prediction, target):
    """The official formula, written down slice by slice, for (B, C, H, W)."""
    total = 0
    for step in (1, 2, 4, 6):
        p, t = prediction[::step, ::step], target[::step, ::step]
        mask = t > 0
        d = ((p + 0.001).log() - (t + 0.001).log()) * mask
        rows = (d[0:-2, :] - d[2:, :]).abs() * (mask[0:-2, :] * mask[2:, :])
        columns = (d[:, 0:-2] - d[:, 2:]).abs() * (mask[:, 0:-2] * mask[:, 2:])
        total = total + (rows.sum() + columns.sum()) / mask.sum()
    return total


def test_the_released_gradient_loss_sees_nothing_in_two_pictures():
    target, prediction = some_depth(2, 13, 16), some_depth(2, 13, 16, seed=1, unknown=0)
    found = depth.gradient_loss(prediction, target, target > 0, "released")
    assert found.item() == released_gradient_loss(prediction[:, None], target[:, None]).item() == 0
    assert depth.gradient_loss(prediction, target, target > 0, "fixed") > 1


@pytest.mark.parametrize("n", [3, 5, 9])
def test_the_released_gradient_loss_compares_pictures(n):
    target, prediction = some_depth(n, 7, 8), some_depth(n, 7, 8, seed=1, unknown=0)
    found = depth.gradient_loss(prediction, target, target > 0, "released")
    assert found.item() == pytest.approx(released_gradient_loss(prediction[:, None], target[:, None]).item(), rel=1e-5)
    assert found > 0


def test_the_fixed_gradient_loss_is_a_loop_over_rows_and_columns():
    target, prediction = some_depth(2, 13, 16), some_depth(2, 13, 16, seed=1, unknown=0)
    expected = 0.0
    for step in (1, 2, 4, 6):
        t, p = target[:, ::step, ::step].double(), prediction[:, ::step, ::step].double()
        d, total = (p + 0.001).log() - (t + 0.001).log(), 0.0
        for i, y, x in np.ndindex(*d.shape):
            for y2, x2 in ((y + 2, x), (y, x + 2)):
                if y2 < d.shape[1] and x2 < d.shape[2] and t[i, y, x] > 0 and t[i, y2, x2] > 0:
                    total += abs(d[i, y, x] - d[i, y2, x2]).item()
        expected += total / (t > 0).sum().item()
    found = depth.gradient_loss(prediction, target, target > 0)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert depth.gradient_loss(3 * target + 0.002, target, target > 0) < 1e-3 < expected  # edges, not distances


def test_the_gradient_loss_at_the_edges():
    target = some_depth(1, 5, 5)
    nothing = torch.zeros_like(target)
    assert depth.gradient_loss(target + 1, nothing, nothing > 0) == 0
    assert depth.gradient_loss(torch.ones(1, 1, 1), torch.ones(1, 1, 1), torch.ones(1, 1, 1) > 0) == 0
    unknown = torch.where(target > 0, target, torch.nan)  # whatever stands for "not known" has no say
    assert torch.isfinite(depth.gradient_loss(target + 1, unknown, target > 0))
    with pytest.raises(ValueError, match="fixed or released"):
        depth.gradient_loss(target, target, target > 0, "paper")
    with pytest.raises(ValueError, match=r"\(B, H, W\)"):
        depth.gradient_loss(target[:, None], target[:, None], target[:, None] > 0)


# ---------------------------------------------------------------- errors


def test_errors_are_means_over_pictures():
    target, prediction = some_depth(3, 6, 7), some_depth(3, 6, 7, seed=1, unknown=0)
    target[1] = 0  # a picture of which nothing is known
    target[2, 1:] = 0  # and one of which little is
    found = depth.depth_errors(prediction, target)
    rows = []
    for i in (0, 2):
        pairs = [(p, t) for p, t in zip(prediction[i].flatten().tolist(), target[i].flatten().tolist()) if t > 0]
        n = len(pairs)
        rows.append([
            math.sqrt(sum((p - t) ** 2 for p, t in pairs) / n), sum(abs(p - t) / t for p, t in pairs) / n,
            sum(abs(math.log10(p) - math.log10(t)) for p, t in pairs) / n,
            sum(max(p / t, t / p) < 1.25 for p, t in pairs) / n,
        ])  # fmt: skip
    expected = np.mean(rows, axis=0)
    assert [found[k] for k in ("rmse", "abs_rel", "log10", "delta1")] == pytest.approx(expected.tolist(), rel=1e-6)
    assert found["n_images"] == 2 and found["n_valid"] == (target > 0).sum()
    target[1] = math.inf  # nor is this a distance
    assert depth.depth_errors(prediction, target) == found
    target[1] = 0
    perfect = depth.depth_errors(target.clamp_min(1), target.clamp_min(1).numpy(), target.numpy() > 0)
    assert (perfect["rmse"], perfect["abs_rel"], perfect["log10"], perfect["delta1"]) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"target": torch.zeros(1, 2, 2)}, "no valid pixel in any picture"),
        ({"prediction": torch.full((1, 2, 2), math.nan)}, "4 predictions are not"),
        ({"prediction": torch.full((1, 2, 2), math.inf)}, "4 predictions are not"),
        ({"prediction": torch.zeros(1, 2, 2)}, "4 predictions are not"),
        ({"target": torch.zeros(1, 2, 2), "valid": torch.ones(1, 2, 2)}, "above 0 m"),
        ({"target": torch.full((1, 2, 2), math.inf), "valid": torch.ones(1, 2, 2)}, "above 0 m"),
        ({"target": torch.ones(1, 2, 3)}, "of one shape"),
        ({"prediction": torch.ones(2, 2), "target": torch.ones(2, 2)}, r"\(n, H, W\)"),
    ],
)
def test_errors_of_nothing_or_of_nonsense_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        depth.depth_errors(**{"prediction": torch.ones(1, 2, 2), "target": torch.ones(1, 2, 2)} | change)


# ---------------------------------------------------------------- the head


def test_upsampling_and_the_linear_map_may_change_places():
    head = depth.DepthHead(6, depth.bins(0.1, 5, 16))
    maps = torch.randn(2, 6, 3, 4)
    features = F.interpolate(maps, scale_factor=4, mode="bilinear", align_corners=False)
    released = depth.expected_depth(head.conv_depth(features), head.bins)
    torch.testing.assert_close(head(maps), released, atol=1e-5, rtol=1e-5)
    assert head(maps).shape == (2, 12, 16)


def rooms(n, seed=0):
    """Maps whose first channel tells the distance of each 8 px block."""
    generator = torch.Generator().manual_seed(seed)
    far = 1 + 3 * torch.rand(n, 1, 3, 4, generator=generator)
    far = F.interpolate(far, (6, 8), mode="bilinear")
    maps = torch.cat([far - 2.5, torch.randn(n, 3, 6, 8, generator=generator) / 10], 1)
    metres = F.interpolate(far, (48, 64), mode="bilinear")[:, 0]
    metres[:, :4] = 0  # not known
    return maps, metres


@pytest.mark.parametrize(
    "options", [{}, {"pixels": None, "steps": 50}, {"gradient_weight": 0.5, "steps": 50}, {"batch_norm": True}]
)
def test_the_head_learns_what_the_maps_tell(options):
    train, test = rooms(10), rooms(4, seed=1)
    given = {"steps": 150, "pixels": 128, "lr": 0.05, "patch_size": 8} | options
    found = depth.linear_depth(*train, *test, 0.1, 5, batch_size=4, **given)
    assert found["rmse"] < 0.5 * found["constant"]["rmse"] and found["delta1"] > 0.9 > found["constant"]["delta1"]
    assert found["n_images"] == 4 and found["n_valid"] == 4 * 44 * 64
    whole = torch.cat(list(depth.predict_depth(found["head"], test[0], (48, 64), 8, batch_size=3)))
    assert depth.depth_errors(whole, test[1])["rmse"] == pytest.approx(found["rmse"])


@pytest.mark.parametrize("steps", [1, 2, 3, 30, 100])
def test_rates_are_those_that_mmcv_makes_of_the_published_configs(steps, monkeypatch):
    rates, move = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or move(self))
    depth.linear_depth(*rooms(2), *rooms(2), 0.1, 5, steps=steps, lr=0.01, pixels=8, patch_size=8)
    for i, rate in enumerate(rates):
        cosine, warmup = 0.01 * (1 + math.cos(math.pi * i / steps)) / 2, steps // 3
        missing = (1 - i / warmup) * (1 - 1e-3) if i < warmup else 0
        assert rate == pytest.approx((1 - missing) * cosine)
    assert len(rates) == steps and max(rates) <= (0.01 if steps < 3 else 0.0076)


def test_the_same_seed_gives_the_same_head_and_memory_maps_and_half_floats_are_taken(tmp_path):
    maps, metres = rooms(3)
    np.save(tmp_path / "maps.npy", maps.half().numpy())
    stored = np.load(tmp_path / "maps.npy", mmap_mode="r")
    found = [depth.linear_depth(stored, metres.numpy(), stored, metres, 0.1, 5, steps=5, seed=2) for _ in range(2)]
    assert torch.equal(*(f["head"].conv_depth.weight for f in found)) and found[0]["rmse"] == found[1]["rmse"]
    other = depth.linear_depth(stored, metres, stored, metres, 0.1, 5, steps=5, seed=3)
    assert other["rmse"] != found[0]["rmse"]


def test_distances_may_be_arrays_of_any_kind():
    maps, metres = rooms(2)
    metres = metres.round()
    expected = depth.linear_depth(maps, metres, maps, metres, 0.1, 5, steps=3)["rmse"]
    for kind in ("uint16", "uint32", ">f4", ">i2"):
        array = metres.numpy().astype(kind)
        assert depth.linear_depth(maps, array, maps, array, 0.1, 5, steps=3)["rmse"] == pytest.approx(expected)
        assert depth.depth_errors(metres + 1, array) == depth.depth_errors(metres + 1, metres)
    mirrored = metres.numpy()[:, ::-1]
    assert depth.depth_errors(mirrored + 1, mirrored) == depth.depth_errors(metres.flip(1) + 1, metres.flip(1))


def test_pictures_of_which_nothing_is_known_are_passed_over():
    maps, metres = rooms(3)
    metres[1:] = 0
    for pixels in (16, None):
        found = depth.linear_depth(maps, metres, maps, metres, 0.1, 5, steps=6, batch_size=1, pixels=pixels)
        assert math.isfinite(found["rmse"]) and found["n_images"] == 1


def test_padded_pictures_are_told_apart_from_whole_ones():
    maps, metres = rooms(2)
    cut = metres[:, 1:46, 2:62]  # 45 x 60 px: one and two px of border before, two after
    whole = depth.linear_depth(maps, metres, maps, metres, 0.1, 5, steps=1, patch_size=8, lr=0.0)
    found = depth.linear_depth(maps, cut, maps, cut, 0.1, 5, steps=1, patch_size=8, lr=0.0)
    part = torch.cat(list(depth.predict_depth(found["head"], maps, (45, 60), 8)))
    all_of_it = torch.cat(list(depth.predict_depth(whole["head"], maps, (48, 64), 8)))
    torch.testing.assert_close(part, all_of_it[:, 1:46, 2:62])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"train_depth": torch.zeros(3, 48, 64)}, "no depth from 0.1 to 5 m"),
        ({"test_depth": torch.full((3, 48, 64), 7.0)}, "no depth from 0.1 to 5 m"),
        ({"train_maps": torch.full((3, 4, 6, 8), math.nan)}, "the training maps hold NaN"),
        ({"test_depth": torch.ones(2, 48, 64)}, "as many targets"),
        ({"steps": 0}, "at least 1"),
        ({"gradient_weight": -1.0}, "at least 0"),
        ({"lr": 1e36, "steps": 9}, "NaN or infinity"),
        ({"max_depth": 0.1}, "no depth from"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    maps, metres = rooms(3)
    given = {"train_maps": maps, "train_depth": metres, "test_maps": maps, "test_depth": metres, "steps": 2}
    with pytest.raises(ValueError, match=words):
        depth.linear_depth(**given | {"min_depth": 0.1, "max_depth": 5} | change)
