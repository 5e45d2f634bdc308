"""Frozen features, the store, the untrained descriptors, k-NN and the linear probes, against independent oracles."""

import json
import math
import os
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minidino.model.vit import build_vit
from minidino.probes import features, knn, linear, logistic


class StubTokens(NamedTuple):
    x_norm_clstoken: Tensor
    x_norm_patchtokens: Tensor


class StubVit(nn.Module):
    """Patches of 4 px, their mean colour as the patch token; counts what it is asked."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.drop = nn.Dropout(0.5)
        self.batches = []

    def forward_features(self, images):
        self.batches.append(len(images))
        assert not self.training and not torch.is_grad_enabled()
        patch = self.drop(nn.functional.avg_pool2d(images, 4).flatten(2).mT * self.weight)
        return StubTokens(patch.amax(1), patch)


def some_images(n=7, size=16, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def blobs(n, n_classes, width, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_classes, width, generator=generator)
    y = torch.randint(0, n_classes, (n,), generator=generator)
    return centres[y] + spread * torch.randn(n, width, generator=generator), y


# ---------------------------------------------------------------- features


def test_extract_normalises_and_does_not_depend_on_the_batch():
    images, vit = some_images(), StubVit()
    by_three = features.extract(vit, images, batch_size=3, progress=False, patches=True)
    whole = features.extract(vit, images, progress=False, patches=True)
    assert vit.batches == [3, 3, 1, 7]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normal = (images.numpy().transpose(0, 2, 3, 1) / 255 - mean) / std
    patch = 2 * normal.reshape(7, 4, 4, 4, 4, 3).mean((2, 4)).reshape(7, 16, 3)
    np.testing.assert_allclose(whole["patch"], patch, atol=1e-5)
    np.testing.assert_allclose(whole["mean_patch"], patch.mean(1), atol=1e-5)
    np.testing.assert_allclose(whole["cls"], patch.max(1), atol=1e-5)
    assert all(torch.equal(by_three[name], whole[name]) for name in whole)
    assert set(features.extract(vit, images, progress=False)) == {"cls", "mean_patch"}


def test_extract_gives_every_training_flag_back_even_after_an_error():
    vit = StubVit().train()
    vit.drop.eval()
    features.extract(vit, some_images(), progress=False)
    assert vit.training and not vit.drop.training
    vit.forward_features = None
    with pytest.raises(TypeError):
        features.extract(vit, some_images(), progress=False)
    assert vit.training and not vit.drop.training


@pytest.mark.parametrize("images", [torch.rand(2, 3, 8, 8), some_images()[0], some_images()[:0]])
def test_only_uint8_pixels_are_taken(images):
    with pytest.raises(ValueError, match="uint8 pixels of shape"):
        features.extract(StubVit(), images, progress=False)


def test_state_hash_names_what_was_learned():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    twin = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    twin.load_state_dict(net.state_dict())
    assert features.state_hash(net) == features.state_hash(twin)
    with torch.no_grad():
        twin[0].weight[1, 2] += 1e-6
    assert features.state_hash(net) != features.state_hash(twin)
    assert features.state_hash(net) != features.state_hash(net.bfloat16())


def test_store_computes_once_and_again_after_any_damage(tmp_path):
    store, calls = features.FeatureStore(tmp_path), []
    key = features.feature_key("a" * 64, "scenes, seed 1", 48)
    rows = torch.arange(6.0).view(2, 3)

    def compute():
        calls.append(1)
        return {"cls": rows}

    found = store.get(key, compute)
    assert isinstance(found["cls"], np.memmap) and np.array_equal(found["cls"], rows)
    (place,) = tmp_path.iterdir()
    sidecar = json.loads((place / "made.json").read_text())
    assert sidecar["made_from"] == {"weights": "a" * 64, "data": "scenes, seed 1", "size_px": 48, "layer": "last"}
    store.get(key, compute)
    assert len(calls) == 1
    store.get(features.feature_key("a" * 64, "scenes, seed 1", 64), compute)
    assert len(calls) == 2  # another size is another key
    (place / "made.json").write_text(json.dumps(sidecar | {"key": "something else"}))
    store.get(key, compute)
    (place / "cls.npy").write_bytes((place / "cls.npy").read_bytes()[:-4])  # cut short
    store.get(key, compute)
    (place / "made.json").unlink()  # as an interrupted writer would leave it
    assert np.array_equal(store.get(key, compute)["cls"], rows) and len(calls) == 5


def test_store_keeps_the_old_features_when_the_new_computation_fails(tmp_path):
    store, key = features.FeatureStore(tmp_path), features.feature_key("w", "d", 8)

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.get(key, fail)
    assert not list(tmp_path.iterdir())


def test_store_sweeps_away_what_dead_writers_left(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", ""])
    writer.wait()
    dead, alive = (tmp_path / f"other-0123.{pid}.unfinished" for pid in (writer.pid, os.getppid()))
    for age, kept in ((0, [dead, alive]), (7200, [alive])):  # a dead one may live on another machine
        for folder in (dead, alive):
            folder.mkdir(exist_ok=True)
            os.utime(folder, (time.time() - age,) * 2)
        features.FeatureStore(tmp_path).get(features.feature_key("w", f"d{age}", 8), lambda: {"cls": torch.ones(1)})
        assert [folder for folder in (dead, alive) if folder.exists()] == kept


# ---------------------------------------------------------------- untrained descriptors


@pytest.mark.parametrize("size", [(16, 16), (37, 64), (50, 41)])
def test_hog_is_that_of_skimage(size):
    hog = pytest.importorskip("skimage.feature").hog
    images = torch.randint(0, 256, (4, 3, *size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    images[1] = images[1] // 128 * 255  # equal gradients in many places: ties between channels
    images[2] = 77  # flat: no gradient at all
    expected = [hog(i.permute(1, 2, 0).numpy(), cells_per_block=(2, 2), channel_axis=-1) for i in images]
    found = features.hog(images, chunk=3)
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-6)
    assert found[0].abs().sum() > 1 and found[2].abs().sum() == 0


def test_color_histogram_counts_colours_and_forgets_places():
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    image[0, :, 0] = 255  # a quarter white, the rest black
    found = features.color_histogram(image)
    assert found.shape == (1, 216) and found[0, 215] == 0.5 and found[0, 0] == pytest.approx(math.sqrt(0.75))
    images = some_images()
    torch.testing.assert_close(features.color_histogram(images), features.color_histogram(images.flip(2).mT))
    torch.testing.assert_close(features.color_histogram(images).square().sum(1), torch.ones(7))


def test_pixels_and_gray_pixels():
    images = some_images()
    torch.testing.assert_close(features.pixels(images).mean(0), torch.zeros(768), atol=1e-6, rtol=0)
    bank_mean = images.float().mean(0) / 255
    torch.testing.assert_close(features.pixels(images[:2], bank_mean), features.pixels(images)[:2])
    gray = features.gray_pixels(images)
    torch.testing.assert_close(gray.mean(1), torch.zeros(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(gray.std(1), torch.ones(7), atol=2e-5, rtol=0)  # 1e-6 is added to deviations above 0.1
    darker = features.gray_pixels(images // 2)
    torch.testing.assert_close(darker, features.gray_pixels(images // 2 * 2), rtol=2e-5, atol=1e-6)


# ---------------------------------------------------------------- k-NN


def test_neighbours_are_those_of_faiss(monkeypatch):
    faiss = pytest.importorskip("faiss")
    bank, queries = torch.randn(346, 17, generator=torch.Generator().manual_seed(2)).split((301, 45))
    monkeypatch.setattr(knn, "PAIRS_AT_A_TIME", 301 * 7)  # several chunks, the last one short
    similarity, index = knn.neighbours(bank, queries, 9)
    flat = faiss.IndexFlatIP(17)
    unit = [(x / x.norm(dim=1, keepdim=True)).numpy() for x in (bank, queries)]
    flat.add(unit[0])
    expected, expected_index = flat.search(unit[1], 9)
    assert np.array_equal(index, expected_index)
    np.testing.assert_allclose(similarity, expected, atol=1e-6)


def vote_by_loops(train_x, train_y, query, k, temperature):
    """The published vote, in float64, one neighbour at a time."""
    cosines = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in train_x]
    votes = {}
    for i in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]:
        votes[int(train_y[i])] = votes.get(int(train_y[i]), 0.0) + math.exp(cosines[i] / temperature)
    return max(votes, key=votes.get)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn_is_the_published_vote(temperature):
    x, y = blobs(150, 6, 8, 2.0)
    x = x * torch.linspace(0.1, 5, 150)[:, None]  # lengths must not matter
    bank_x, bank_y, test_x, test_y = x[:100], y[:100], x[100:], y[100:]
    accuracy = knn.knn_accuracy(bank_x, bank_y, test_x.numpy(), test_y.numpy(), ks=(1, 7, 100), temperature=temperature)
    for k in (1, 7, 100):
        expected = [vote_by_loops(bank_x.double().numpy(), bank_y, q, k, temperature) for q in test_x.double().numpy()]
        assert knn.knn_predict(bank_x, bank_y, test_x, k, temperature).tolist() == expected
        assert accuracy[k] == pytest.approx(np.mean(np.array(expected) == test_y.numpy()))
    assert len(set(accuracy.values())) > 1  # the case can tell the ks apart


def test_unknown_labels_neither_vote_nor_count():
    x, y = blobs(60, 3, 5, 0.5)
    unknown = torch.cat([y[:30], torch.full((5,), -1)])
    with_unknown = knn.knn_accuracy(torch.cat([x[:30], x[30:35]]), unknown, x[30:], y[30:], ks=(3,))
    assert with_unknown == knn.knn_accuracy(x[:30], y[:30], x[30:], y[30:], ks=(3,))
    hidden = y[30:].clone()
    hidden[10:] = -1
    assert knn.knn_accuracy(x[:30], y[:30], x[30:], hidden, ks=(3,)) == knn.knn_accuracy(
        x[:30], y[:30], x[30:40], y[30:40], ks=(3,)
    )
    one = x[:1].numpy(), y[:1].numpy()  # numpy takes a mask of one element, if it is a tensor, for a number
    assert knn.knn_accuracy(*one, *one, ks=(1,)) == {1: 1.0}


def test_knn_says_what_is_wrong():
    x, y = blobs(20, 2, 4, 1.0)
    with pytest.raises(ValueError, match="1 <= k <= 20 rows in the bank, got k = 200"):
        knn.knn_accuracy(x, y, x, y)
    with pytest.raises(ValueError, match="NaN"):
        knn.knn_predict(x, y, x * torch.nan, 3)
    with pytest.raises(ValueError, match="not the same features"):
        knn.neighbours(x, x[:, :3], 1)
    with pytest.raises(ValueError, match="a label for each"):
        knn.knn_accuracy(x, y[:5], x, y, ks=(1,))
    words = np.array(["cat", "dog"])[y]
    for labels in (words, words.tolist(), words.astype(object)):
        for probe in (knn.knn_accuracy, linear.linear_probe, logistic.logistic_regression, logistic.low_shot):
            with pytest.raises(ValueError, match="labels as the numbers of classes.*got .'(cat|dog)"):
                probe(x, labels, x, labels)


@pytest.mark.parametrize("labels", [[0, 1.5, 1, 0], [0, float("nan"), 1, 0], np.eye(4), [[0], [1], [1], [0]]])
def test_knn_refuses_what_is_no_label_for_each_row(labels):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for train_y, test_y in ((labels, [0, 1, 1, 0]), ([0, 1, 1, 0], labels)):
        with pytest.raises(ValueError, match="whole numbers, got|expected a label for each of 4"):
            knn.knn_accuracy(x, np.array(train_y), x, np.array(test_y), [1])
    with pytest.raises(ValueError, match="temperature above 0, got 0"):
        knn.knn_accuracy(x, np.zeros(4), x, np.zeros(4), [1], temperature=0)
    with pytest.raises(ValueError, match="no row of the bank has a label"):
        knn.knn_accuracy(x, np.full(4, -1), x, np.zeros(4), [1])


def test_voters_count_classes_and_not_the_largest_label():
    x, y = blobs(60, 3, 5, 0.5)
    numbers = torch.tensor([7, 10**9, 10**12])
    found = knn.knn_predict(x[:30], numbers[y[:30]], x[30:], 5)
    assert torch.equal(found, numbers[knn.knn_predict(x[:30], y[:30], x[30:], 5)])


# ---------------------------------------------------------------- linear probes


def test_grid_of_rates_equals_torch_sgd_one_rate_at_a_time():
    x, y = blobs(96, 4, 6, 1.0)
    generator = torch.Generator().manual_seed(3)
    lrs, epochs, batch = (1e-3, 0.1), 5, 32
    rows = torch.cat([x, torch.ones(96, 1)], 1)
    batches = linear.shuffled(rows, y, batch, generator)
    (weights,) = linear.train_heads(batches, [(0, 7)], 6, 4, lrs, epochs * 3, generator)
    found = weights.view(2, 4, 7)
    for row, lr in enumerate(lrs):
        generator = torch.Generator().manual_seed(3)
        net = nn.Linear(6, 4)
        first = 0.01 * torch.randn(4, 7, generator=generator)
        net.weight.data, net.bias.data = first[:, :6].clone(), torch.zeros(4)
        sgd = torch.optim.SGD(net.parameters(), lr=lr * batch / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, epochs * 3)
        for _ in range(epochs):
            for rows in torch.randperm(96, generator=generator).split(batch):
                sgd.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                # SGD with momentum scales the velocity by the rate of the step, as ours does
                sgd.step()
                schedule.step()
        torch.testing.assert_close(found[row, :, :6], net.weight.data, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[row, :, 6], net.bias.data, atol=1e-5, rtol=1e-4)


def test_linear_probe_is_about_as_good_as_logistic_regression():
    logistic = pytest.importorskip("sklearn.linear_model").LogisticRegression
    x, y = blobs(3000, 8, 20, 2.0)
    x = x * 50 + 7  # an unlucky scale
    found = linear.linear_probe(x[:2000], y[:2000], x[2000:].numpy(), y[2000:].numpy(), epochs=15)
    reference = logistic(max_iter=500).fit((x[:2000] - 7) / 50, y[:2000]).score((x[2000:] - 7) / 50, y[2000:])
    assert 0.6 < reference < 0.99  # a task with room on both sides
    assert abs(found["accuracy"] - reference) < 0.02
    assert tuple(found["table"]) == linear.PUBLISHED_LRS and found["best_lr"] == max(
        found["table"], key=found["table"].get
    )
    again = linear.linear_probe(x[:2000], y[:2000], x[2000:], y[2000:], epochs=15)
    assert again == found


def test_linear_probe_never_chooses_by_the_test_rows():
    x, y = blobs(400, 4, 10, 1.0)
    one = linear.linear_probe(x[:300], y[:300], x[300:], y[300:], epochs=4)
    other = linear.linear_probe(x[:300], y[:300], x[300:], (y[300:] + 1) % 4, n_classes=4, epochs=4)
    assert one["table"] == other["table"] and one["best_lr"] == other["best_lr"]
    assert one["accuracy"] > 0.8 and other["accuracy"] < 0.2


def test_linear_probe_drops_unknown_rows_and_survives_dead_features_and_wild_rates():
    x, y = blobs(200, 3, 5, 0.3)
    x[:, 2] = 4.0  # a feature that never changes
    noise = torch.full((50,), -1)
    rows = torch.cat([x[:150], torch.full((50, 5), 100.0)])
    found = linear.linear_probe(rows, torch.cat([y[:150], noise]), x[150:], y[150:], lrs=(0.1, 1e38), epochs=10)
    clean = linear.linear_probe(x[:150], y[:150], x[150:], y[150:], lrs=(0.1, 1e38), epochs=10)
    assert found == clean and found["accuracy"] > 0.9 and found["best_lr"] == 0.1
    with pytest.raises(ValueError, match="2 labelled training rows"):
        linear.linear_probe(x, torch.full((200,), -1), x, y)


def test_patch_probe_is_the_optimum_that_sklearn_finds():
    logistic = pytest.importorskip("sklearn.linear_model").LogisticRegression
    x, y = blobs(1200, 4, 6, 1.5)
    y[::17] = -1
    patches, masks = x.view(60, 20, 6), y.view(60, 20)
    found = linear.patch_probe(patches[:40], masks[:40], patches[40:], masks[40:], n_classes=5, l2=1e-2)
    train, test = y[:800] >= 0, y[800:] >= 0
    mean, std = x[:800][train].mean(0), x[:800][train].std(0, correction=0)
    z = ((x - mean) / std).double().numpy()
    oracle = logistic(C=1 / (1e-2 * int(train.sum())), max_iter=1000, tol=1e-8).fit(z[:800][train], y[:800][train])
    predicted, truth = oracle.predict(z[800:][test]), y[800:][test].numpy()
    assert found["accuracy"] == pytest.approx((predicted == truth).mean(), abs=0.003)
    iou = [((predicted == c) & (truth == c)).sum() / ((predicted == c) | (truth == c)).sum() for c in range(4)]
    np.testing.assert_allclose(found["iou"][:4], iou, atol=0.01)
    assert math.isnan(found["iou"][4])  # a class that is nowhere is no failure
    assert found["miou"] == pytest.approx(np.mean(found["iou"][:4])) and 0.3 < found["miou"] < 0.95


def test_patch_depth_probe_is_ridge_on_log_metres():
    ridge = pytest.importorskip("sklearn.linear_model").Ridge
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(50, 9, 7, generator=generator)
    depth = torch.exp(x[..., 0] - 0.5 * x[..., 3] + 1 + 0.1 * torch.randn(50, 9, generator=generator))
    holes = depth.clone()
    holes[:, 4], holes[:, 5] = 0.0, torch.nan
    found = linear.patch_depth_probe(x[:30], holes[:30], x[30:].numpy(), depth[30:].numpy(), ridge=10.0)
    seen = (holes[:30] > 0).flatten()
    train, target = x[:30].reshape(-1, 7)[seen], depth[:30].flatten()[seen].log().double().numpy()
    mean, std = train.mean(0), train.std(0, correction=0)
    model = ridge(alpha=10.0).fit(((train - mean) / std).double().numpy(), target)
    error = model.predict(((x[30:].reshape(-1, 7) - mean) / std).double().numpy()) - depth[30:].flatten().log().numpy()
    assert found["log_rmse"] == pytest.approx(np.sqrt((error**2).mean()), abs=1e-5)
    assert found["log_rmse"] < 0.15 < found["constant"]
    guess = np.clip(error + depth[30:].flatten().log().numpy(), target.min(), target.max())
    metres = np.exp(guess) - depth[30:].flatten().double().numpy()
    assert found["rmse"] == pytest.approx(np.sqrt((metres**2).mean()), rel=1e-4)
    with pytest.raises(ValueError, match="one value per patch"):
        linear.patch_depth_probe(x, depth[:, :3], x, depth)


def small_vit(depth=3, registers=0):
    torch.manual_seed(0)
    small = {"width": 16, "depth": depth, "heads": 2, "patch_size": 4, "img_size": 8, "init_std": 0.3}
    return build_vit("vit_tiny", num_register_tokens=registers, **small)


def test_extract_of_several_blocks_is_one_look_and_agrees_with_the_layers():
    vit, images = small_vit(registers=2), some_images(5, 8)
    looks = []
    vit.patch_embed.register_forward_hook(lambda *_: looks.append(1))
    found = features.extract(vit, images, batch_size=2, progress=False, patches=True, blocks=3)
    assert len(looks) == 3 and found["cls_blocks"].shape == (5, 3, 16)  # three batches, one look at each
    layers = vit.get_intermediate_layers(features.normalise(images), n=3, return_class_token=True)
    for block, (_, cls) in enumerate(layers):  # oldest first
        torch.testing.assert_close(found["cls_blocks"][:, block], cls)
    plain = features.extract(vit, images, progress=False, patches=True)
    assert set(found) - set(plain) == {"cls_blocks"}
    assert all(torch.allclose(found[name], plain[name], atol=1e-6) for name in plain)
    torch.testing.assert_close(found["cls_blocks"][:, -1], plain["cls"])
    for blocks, words in ((0, "at least 1 block"), (4, "blocks from 0 to 2")):
        with pytest.raises(ValueError, match=words):
            features.extract(vit, images, progress=False, blocks=blocks)


def test_dense_patches_interleave_the_looks_at_shifted_windows():
    torch.manual_seed(0)
    vit = build_vit("vit_tiny", width=16, depth=1, heads=2, patch_size=4, img_size=8)
    images = torch.randint(0, 256, (2, 3, 10, 10), dtype=torch.uint8)  # 8 + 4 - 2
    dense = features.dense_patches(vit, images, 4, 2)
    assert dense.shape == (2, 4, 4, 16)
    for top, left in ((0, 0), (2, 0), (0, 2), (2, 2)):
        look = features.extract(vit, images[..., top : top + 8, left : left + 8], progress=False, patches=True)["patch"]
        assert torch.allclose(dense[:, top // 2 :: 2, left // 2 :: 2].flatten(1, 2), look, atol=1e-6)
    with pytest.raises(ValueError, match="stride"):
        features.dense_patches(vit, images, 4, 3)


def test_a_linear_probe_asks_for_the_classes_that_occur_whatever_their_numbers():
    x, y = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 3
    x[torch.arange(300), y] += 3
    ids = torch.tensor([7, 1999, 10**12])  # a row of every head for each number up to the largest is more than memory
    one = linear.linear_probe(x[:200], y[:200], x[200:], y[200:], epochs=4)
    assert linear.linear_probe(x[:200], ids[y[:200]], x[200:], ids[y[200:]], epochs=4) == one
