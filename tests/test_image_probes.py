"""Image-level evaluations: the published 52 heads, logistic regression, a few labels, retrieval."""

import csv
import io
import json
import math
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from minidino.images.pixels import Pixels
from minidino.model.vit import build_vit
from minidino.probes import features, grid, linear, logistic, retrieval


def blobs(n, n_classes, width, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_classes, width, generator=generator)
    y = torch.randint(0, n_classes, (n,), generator=generator)
    return centres[y] + spread * torch.randn(n, width, generator=generator), y


def some_features(n=200, width=6, n_classes=4, spread=1.0, seed=0):
    """As `features.extract(..., blocks=4)` gives, and labels."""
    x, y = blobs(n, n_classes, 5 * width, spread, seed)
    return {"cls_blocks": x[:, : 4 * width].unflatten(1, (4, width)), "mean_patch": x[:, 4 * width :]}, y


def part(found, rows):
    return {name: value[rows] for name, value in found.items()}


# ---------------------------------------------------------------- 52 heads


def published_input(found, n_blocks, avgpool):
    """The official way: concatenate the class tokens, then the mean patch token of the last block."""
    tokens = [found["cls_blocks"][:, -n_blocks:].flatten(1)] + [found["mean_patch"]] * avgpool
    return torch.cat(tokens, 1)


def test_every_head_of_the_grid_is_trained_as_if_alone():
    found, y = some_features(96)
    lrs, steps, batch = (1e-2, 0.5), 9, 32
    rows = [torch.arange(96).split(batch)[i % 3] for i in range(steps)]
    heads = grid.train_grid([(part(found, r), y[r]) for r in rows], steps, 4, lrs=lrs, blocks=(1, 4), seed=5)
    generator = torch.Generator().manual_seed(5)
    inputs = [(n, pool) for n in (1, 4) for pool in (False, True)]
    for (n_blocks, avgpool), weights in zip(inputs, heads.weights, strict=True):
        x = published_input(found, n_blocks, avgpool)
        ones = n_blocks * 6  # the bias stands between class tokens and mean patch token
        first = 0.01 * torch.randn(4, x.shape[1] + 1, generator=generator)
        for row, lr in enumerate(lrs):
            net = nn.Linear(x.shape[1], 4)
            net.weight.data = torch.cat([first[:, :ones], first[:, ones + 1 :]], 1).clone()
            net.bias.data = torch.zeros(4)
            sgd = torch.optim.SGD(net.parameters(), lr=lr * batch / 256, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
            for r in rows:
                sgd.zero_grad()
                nn.functional.cross_entropy(net(x[r]), y[r]).backward()
                sgd.step()
                schedule.step()
            got = weights.view(2, 4, -1)[row]
            torch.testing.assert_close(got[:, ones], net.bias.data, atol=1e-5, rtol=1e-4)
            without = torch.cat([got[:, :ones], got[:, ones + 1 :]], 1)
            torch.testing.assert_close(without, net.weight.data, atol=1e-5, rtol=1e-4)
            score = (net(x).argmax(1) == y).double().mean().item()
            (row_of_table,) = [
                h for h in heads.table(found, y) if (h["lr"], h["blocks"], h["avgpool"]) == (lr, n_blocks, avgpool)
            ]
            assert row_of_table["accuracy"] == pytest.approx(score)


def test_linear_grid_chooses_on_held_out_rows_unless_told_otherwise():
    found, y = some_features(400, spread=1.5)
    train, test = part(found, slice(0, 300)), part(found, slice(300, 400))
    honest = grid.linear_grid(train, y[:300], test, y[300:], epochs=4)
    shuffled = grid.linear_grid(train, y[:300], test, (y[300:] + 1) % 4, n_classes=4, epochs=4)
    assert honest["table"] == shuffled["table"] and len(honest["table"]) == 52
    assert honest["accuracy"] > 0.6 and shuffled["accuracy"] < 0.3
    seen = {(h["lr"], h["blocks"], h["avgpool"]) for h in honest["table"]}
    assert seen == {(lr, n, pool) for lr in linear.PUBLISHED_LRS for n in (1, 4) for pool in (False, True)}
    best = max(honest["table"], key=lambda h: h["accuracy"])
    assert (honest["best_lr"], honest["blocks"], honest["avgpool"]) == (best["lr"], best["blocks"], best["avgpool"])
    published = grid.linear_grid(train, y[:300], test, y[300:], epochs=4, choose="test")
    assert published["accuracy"] == max(h["accuracy"] for h in published["table"]) >= honest["accuracy"] - 0.1


def test_linear_grid_uses_what_only_the_mean_patch_or_an_early_block_knows():
    found, y = some_features(300, spread=0.2)
    noise = torch.randn(300, 4, 6)
    for name, value, wanted in (
        ("cls_blocks", noise, {"avgpool": True}),
        ("mean_patch", noise[:, 0], {}),
    ):
        known = found | {name: value}
        if name == "mean_patch":
            known["cls_blocks"] = torch.cat([found["cls_blocks"][:, :1], noise[:, 1:]], 1)  # the oldest block alone
            wanted = {"blocks": 4}
        train, test = part(known, slice(0, 200)), part(known, slice(200, 300))
        got = grid.linear_grid(train, y[:200], test, y[200:], epochs=20, batch_size=32)
        assert got["accuracy"] > 0.9 and all(got[key] == value for key, value in wanted.items())


def test_linear_grid_drops_unknown_rows_and_says_what_is_wrong():
    found, y = some_features(120)
    unknown = y.clone()
    unknown[100:] = -1
    short = grid.linear_grid(part(found, slice(0, 100)), y[:100], found, y, epochs=2)
    assert grid.linear_grid(found, unknown, found, y, epochs=2) == short
    far = torch.tensor([7, 2024, 10**9, 10**12])  # a row of every head for each number below would not fit
    assert grid.linear_grid(part(found, slice(0, 100)), far[y[:100]], found, far[y], epochs=2) == short
    with pytest.raises(ValueError, match="'held-out' or 'test'"):
        grid.linear_grid(found, y, found, y, choose="validation")
    with pytest.raises(ValueError, match="extract with blocks=4"):
        grid.linear_grid({"cls_blocks": found["cls_blocks"][:, :1], "mean_patch": found["mean_patch"]}, y, found, y)
    with pytest.raises(ValueError, match="extract with blocks=4"):
        grid.linear_grid({"cls": found["mean_patch"]}, y, found, y)
    with pytest.raises(ValueError, match="2 labelled training rows"):
        grid.linear_grid(found, torch.full((120,), -1), found, y)
    with pytest.raises(ValueError, match="expected 5 batches, got 2"):
        grid.train_grid([(found, y), (found, y)], 5, 4)
    with pytest.raises(ValueError, match="labels from 0 to 1"):
        grid.train_grid([(found, y)], 1, 2)
    one = grid.linear_grid(part(found, slice(0, 2)), torch.zeros(2), part(found, slice(0, 1)), torch.zeros(1), epochs=1)
    assert one["accuracy"] == 1.0  # one class, one image to learn from


def test_heads_trained_on_cached_features_can_be_judged_on_any_set():
    found, y = some_features(200, spread=0.3)
    unknown = torch.where(torch.arange(200) < 150, y, -1)
    batches = grid.cached_features(found, unknown.numpy(), batch_size=50, seed=3)
    seen = [next(batches) for _ in range(3)]
    rows = torch.cat([part_of["mean_patch"] for part_of, _ in seen])
    assert sorted(rows[:, 0].tolist()) == sorted(found["mean_patch"][:150, 0].tolist())  # an epoch: each known row once
    heads = grid.train_grid(batches, 30, 4, lrs=(0.1, 1.0))
    clean, noisy = heads.table(part(found, slice(150, 200)), y[150:]), heads.table(
        {name: value + 3 * torch.randn_like(value) for name, value in found.items()}, y
    )
    assert max(h["accuracy"] for h in clean) > 0.9 > max(h["accuracy"] for h in noisy)
    with pytest.raises(ValueError, match="no row has a label"):
        next(grid.cached_features(found, torch.full((200,), -1)))


def test_augmented_features_are_those_of_crops_that_depend_on_the_seed_alone():
    torch.manual_seed(0)
    vit = build_vit("vit_tiny", width=16, depth=4, heads=2, patch_size=4, img_size=8, init_std=0.3)
    images = np.random.default_rng(0).integers(0, 256, (6, 12, 10, 3), dtype=np.uint8)
    pixels = Pixels.from_array(images, [0, 1, -1, 2, 3, 0], ["a", "b", "c", "d"])

    def batches(seed, **options):
        stream = grid.augmented_features(vit, pixels, size=8, batch_size=2, seed=seed, **options)
        return [next(stream) for _ in range(4)]

    one, again, other = batches(0), batches(0), batches(1)
    assert all(torch.equal(a[0]["cls_blocks"], b[0]["cls_blocks"]) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0][0]["cls_blocks"], other[0][0]["cls_blocks"])
    assert one[0][0]["cls_blocks"].shape == (2, 4, 16) and one[0][0]["mean_patch"].shape == (2, 16)
    assert sorted(torch.cat([labels for _, labels in one[:2]]).tolist()) in ([0, 0, 1, 2], [0, 0, 1, 3], [0, 1, 2, 3],
                                                                            [0, 0, 2, 3])  # fmt: skip
    assert torch.is_grad_enabled() and vit.training  # nothing is left behind between two batches
    heads = grid.train_grid(iter(one), 4, 4)
    assert len(heads.table(features.extract(vit, pixels.squares(8), progress=False, blocks=4), pixels.labels)) == 52
    with pytest.raises(ValueError, match="no picture has a label"):
        next(grid.augmented_features(vit, pixels.select([2]), size=8))


# ---------------------------------------------------------------- logistic regression


@pytest.mark.parametrize("n_classes", [2, 3, 7])
@pytest.mark.parametrize("c", [1e-4, 1.0, 1e2])
def test_logistic_regression_is_the_optimum_that_sklearn_finds(n_classes, c):
    sklearn = pytest.importorskip("sklearn.linear_model").LogisticRegression
    x, y = blobs(150, n_classes, 9, 1.0)
    x = x * torch.logspace(0, 1, 9) + 3  # neither centred nor of one scale
    y = 2 * y + 1  # classes that never occur
    model = logistic.logistic_path(x, y, [1e-6, c])[1]
    oracle = sklearn(C=c, solver="newton-cg", tol=1e-10, max_iter=10000).fit(x.double().numpy(), y.numpy())
    np.testing.assert_allclose(model.logits(x).softmax(1), oracle.predict_proba(x.double().numpy()), atol=1e-4)
    assert np.array_equal(model.predict(x), oracle.predict(x.double().numpy()))
    assert model.classes.tolist() == oracle.classes_.tolist()


def test_logistic_regression_with_fewer_rows_than_features():
    sklearn = pytest.importorskip("sklearn.linear_model").LogisticRegression
    x, y = blobs(12, 3, 40, 1.0)
    (model,) = logistic.logistic_path(x, y, [1.0])
    oracle = sklearn(C=1.0, tol=1e-10, max_iter=10000).fit(x.double().numpy(), y.numpy())
    np.testing.assert_allclose(model.weight, oracle.coef_, atol=1e-5)
    np.testing.assert_allclose(model.bias - model.bias.mean(), oracle.intercept_ - oracle.intercept_.mean(), atol=1e-5)


def test_logistic_regression_chooses_c_on_held_out_rows_and_fits_again_on_all():
    x, y = blobs(400, 3, 10, 2.0)
    y[::7] = -1
    assert len(logistic.PUBLISHED_CS) == 45 and logistic.PUBLISHED_CS[::44] == pytest.approx((1e-6, 1e5))
    found = logistic.logistic_regression(x[:300], y[:300], x[300:].numpy(), y[300:].numpy(), cs=(1e-6, 1e-2, 1.0))
    assert found["best_c"] == max(found["table"], key=found["table"].get)
    (model,) = logistic.logistic_path(x[:300], y[:300], [found["best_c"]])
    known = y[300:] >= 0
    right = (model.predict(x[300:]) == y[300:])[known]
    assert found["accuracy"] == pytest.approx(right.double().mean().item()) and found["accuracy"] > 0.5
    per_class = [right[y[300:][known] == k].double().mean().item() for k in range(3)]
    assert found["mean_class_accuracy"] == pytest.approx(np.mean(per_class))


def test_logistic_regression_at_the_edges():
    x, y = blobs(20, 2, 3, 1.0)
    (model,) = logistic.logistic_path(x, torch.full((20,), 4), [1.0])
    assert model.predict(x).tolist() == [4] * 20  # one class
    (model,) = logistic.logistic_path(x[:1], torch.tensor([2]), [1.0])
    assert model.predict(x[:2]).tolist() == [2, 2]  # one image
    with pytest.raises(ValueError, match="0 rows"):
        logistic.logistic_path(x, torch.full((20,), -1), [1.0])
    with pytest.raises(ValueError, match="C above 0"):
        logistic.logistic_path(x, y, [0.0])
    with pytest.raises(ValueError, match="2 labelled training rows and 1 test row, got 1 and 20"):
        logistic.logistic_regression(x[:1], y[:1], x, y)


def test_few_per_class_and_low_shot():
    x, y = blobs(200, 4, 8, 0.5)
    y[:20] = -1
    rows = logistic.few_per_class(y, 3, seed=1)
    assert y[rows].bincount().tolist() == [3, 3, 3, 3] and len(rows.unique()) == 12
    assert torch.equal(rows, logistic.few_per_class(y.numpy(), 3, seed=1))
    assert not torch.equal(rows, logistic.few_per_class(y, 3, seed=2))
    with pytest.raises(ValueError, match="at least 100 rows of each class"):
        logistic.few_per_class(y, 100)
    found = logistic.low_shot(x[:150], y[:150], x[150:], y[150:], ns=(1, 10), seeds=3)
    for kind in ("knn", "logistic"):
        assert found[10][kind]["mean"] > 0.9 and found[10][kind]["mean"] >= found[1][kind]["mean"] - 0.02
        assert found[1][kind]["n"] == 3 and found[1][kind]["sd"] >= 0
    rows = logistic.few_per_class(y[:150], 1, 0)
    one = logistic.low_shot(x[:150], y[:150], x[150:], y[150:], ns=(1,), seeds=1)[1]["knn"]
    nearest = nn.functional.normalize(x[150:]) @ nn.functional.normalize(x[rows]).T
    assert one["mean"] == pytest.approx((y[rows][nearest.argmax(1)] == y[150:]).double().mean().item())
    assert math.isnan(one["sd"])


# ---------------------------------------------------------------- retrieval


def map_by_loops(similarity, queries, protocol, ks):
    """The official measure, one picture of the ranking at a time, in float64."""
    scores, precisions = [], []
    for values, query in zip(similarity.tolist(), queries, strict=True):
        lists = {name: set(getattr(query, name)) for name in ("easy", "hard", "junk")}
        good = {"easy": lists["easy"], "hard": lists["hard"], "medium": lists["easy"] | lists["hard"]}[protocol]
        bad = lists["junk"] | {"easy": lists["hard"], "hard": lists["easy"], "medium": set()}[protocol]
        if not good:
            continue
        ranked = [i for i in sorted(range(len(values)), key=lambda i: (-values[i], i)) if i not in bad]
        area, hits, places = 0.0, 0, []
        for rank, i in enumerate(ranked):
            if i in good:
                left = 1.0 if rank == 0 else hits / rank
                hits += 1
                area += (left + hits / (rank + 1)) / 2 / len(good)
                places.append(rank + 1)
        scores.append(area)
        precisions.append([sum(p <= min(k, max(places)) for p in places) / min(k, max(places)) for k in ks])
    return np.mean(scores), np.mean(precisions, axis=0), len(scores)


@pytest.mark.parametrize("protocol", ["easy", "medium", "hard"])
def test_map_is_the_revisited_protocol(protocol):
    random = np.random.default_rng(0)
    queries = []
    for i in range(12):
        rows = random.permutation(40)[: random.integers(3, 20)]
        easy, hard, junk = np.split(rows, np.sort(random.integers(0, len(rows), 2)))
        queries.append(retrieval.Query(easy.tolist() if i else [], hard.tolist() if i else [], junk))
    similarity = random.integers(0, 12, (12, 40)) / 12  # many ties
    found = retrieval.mean_average_precision(similarity, queries, protocol, ks=(1, 5, 10))
    expected, precision, n = map_by_loops(similarity, queries, protocol, (1, 5, 10))
    assert found["map"] == pytest.approx(expected) and found["n_queries"] == n
    assert found["n_left_out"] == 12 - n >= 1 and math.isnan(found["ap"][0])
    np.testing.assert_allclose(list(found["precision"].values()), precision)
    assert all(0 <= found["recall"][a] <= found["recall"][b] <= 1 for a, b in ((1, 5), (5, 10)))


def test_step_interpolation_is_that_of_sklearn():
    oracle = pytest.importorskip("sklearn.metrics").average_precision_score
    random = np.random.default_rng(1)
    for _ in range(5):
        relevant = random.random(30) < 0.3
        values = -np.arange(30.0)
        assert retrieval.average_precision(relevant, interpolation="step") == pytest.approx(oracle(relevant, values))
    assert retrieval.average_precision([True, False]) == 1.0
    assert retrieval.average_precision([False, True]) == pytest.approx((0 + 1 / 2) / 2)
    assert math.isnan(retrieval.average_precision([False, False]))
    with pytest.raises(ValueError, match="'trapezoid' or 'step'"):
        retrieval.average_precision([True], interpolation="linear")


def test_equal_similarities_rank_in_order_of_rows():
    flat = np.zeros((1, 50))
    first = retrieval.mean_average_precision(flat, [retrieval.Query([0])], ks=(1,))
    last = retrieval.mean_average_precision(flat, [retrieval.Query([49])], ks=(1,))
    assert first["map"] == 1.0 and last["map"] == pytest.approx(1 / 100)


def test_map_says_what_is_wrong():
    values, query = np.zeros((1, 4)), retrieval.Query([1])
    for bad, words in (
        (((values, [query]), {"protocol": "extreme"}), "'easy', 'medium', 'hard'"),
        (((values, [query, query]), {}), r"expected similarity \(2, N\)"),
        (((values, [retrieval.Query([4])]), {}), "the database has 4"),
        (((values, [retrieval.Query([1], junk=[1])]), {}), "both positive and ignored"),
        (((values * np.nan, [query]), {}), "NaN"),
        (((values, [retrieval.Query([], junk=[1])]), {}), "no query has a positive"),
    ):
        with pytest.raises(ValueError, match=words):
            retrieval.mean_average_precision(*bad[0], **bad[1])


def test_groups_make_each_member_a_query_and_leave_distractors_alone():
    queries = retrieval.groups_ground_truth(["b", "", "a", "b", None, "c", "b"])
    assert [(q.row, list(q.easy), list(q.junk)) for q in queries] == [
        (0, [3, 6], [0]), (2, [], [2]), (3, [0, 6], [3]), (5, [], [5]), (6, [0, 3], [6]),
    ]  # fmt: skip
    assert len(retrieval.groups_ground_truth(np.array([0, -1, 0, -1]))) == 2
    x = torch.eye(4)[[0, 1, 2, 0, 3, 1, 0]] + 0.01 * torch.arange(7)[:, None]
    found = retrieval.leave_one_out(x, ["b", "", "a", "b", None, "c", "b"])
    assert found["map"] == 1.0 and (found["n_queries"], found["n_left_out"]) == (3, 2)
    assert found["recall"][1] == 0.5 and found["precision"][1] == 1.0
    with pytest.raises(ValueError, match="no picture belongs to a group"):
        retrieval.leave_one_out(x, [""] * 7)
    with pytest.raises(ValueError, match="no query has a positive"):
        retrieval.leave_one_out(x, list("abcdefg"))
    with pytest.raises(ValueError, match="1 or more for ks"):
        retrieval.leave_one_out(x, list("bbbbbbb"), ks=(0, 1))


def test_leave_one_out_never_holds_all_pairs(monkeypatch):
    x, groups = blobs(30, 4, 6, 1.0)
    whole, shapes, near = retrieval.leave_one_out(x, groups), [], retrieval.similarity
    monkeypatch.setattr(retrieval, "PAIRS_AT_A_TIME", 7 * 30)
    monkeypatch.setattr(retrieval, "similarity", lambda *rows: shapes.append(len(rows[0])) or near(*rows))
    assert retrieval.leave_one_out(x, groups) == whole and shapes == [7, 7, 7, 7, 2]


def test_ground_truth_comes_from_json_and_never_from_a_pickle(tmp_path):
    content = {"gnd": [{"easy": [0], "hard": [2], "junk": [], "bbx": [1, 2, 30.5, 40]}, {"easy": [1]}],
               "imlist": ["x", "y", "z"], "qimlist": ["p", "q"]}  # fmt: skip
    path = tmp_path / "gnd.json"
    path.write_text(json.dumps(content))
    found = retrieval.read_ground_truth(path)
    assert found.queries[0] == retrieval.Query([0], [2], [], (1, 2, 30.5, 40)) and found.queries[1].bbx is None
    assert found.files == ["x", "y", "z"] and found.query_files == ["p", "q"]
    for name in ("gnd.pkl", "renamed.json"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=r"is a pickle.*json\.dump"):
            retrieval.read_ground_truth(tmp_path / name)
    for broken, words in (
        ({"gnd": []}, "imlist"),
        (content | {"qimlist": ["p"]}, "2 entries in gnd, but 1 names"),
        (content | {"imlist": ["x"]}, "the database has 1"),
        ([1], "list indices"),
        (content | {"gnd": {"0": {"easy": [0]}}}, "a list of dict"),
        (content | {"gnd": ["easy"] * 2}, "a list of dict"),
        (content | {"imlist": "xyz"}, "a list of str, got xyz"),
        (content | {"imlist": [1, 2, 3]}, "a list of str"),
        (content | {"gnd": [{"easy": "0"}] * 2}, "a list of int, got 0"),
        (content | {"gnd": [{"easy": [0.5]}] * 2}, "a list of int"),
        (content | {"gnd": [{"easy": [0], "hard": 1}] * 2}, "a list of int"),
        (content | {"gnd": [{"easy": [0], "bbx": [1, 2, 3]}] * 2}, "a bbx of four numbers"),
        (content | {"gnd": [{"easy": [0], "bbx": [1, 2, 3, "4"]}] * 2}, "a list of float"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=f"^{path}: .*{words}"):
            retrieval.read_ground_truth(path)


def test_query_pictures_are_cut_at_the_box_of_the_original():
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    pixels = Pixels.from_array(images, [0, 0, 0], ["a"])
    pixels.originals[1] = (80, 120)  # the second was shrunk to a half
    queries = [retrieval.Query([], bbx=(5, 10, 25, 40)), retrieval.Query([], bbx=(10.4, 20, 50, 80)), retrieval.Query([])]
    cut = retrieval.query_pictures(pixels, queries)
    assert np.array_equal(cut.image(0), images[0, 10:40, 5:25].transpose(2, 0, 1))
    assert np.array_equal(cut.image(1), images[1, 10:40, 5:25].transpose(2, 0, 1))
    assert np.array_equal(cut.image(2), images[2].transpose(2, 0, 1))
    assert cut.squares(16).shape == (3, 3, 16, 16)
    edges = (4.4, 9.5, 24.6, 39.5), (0.5, -3, 60.4, 99), (59.6, 39.7, 59.9, 39.8)  # halves go to even numbers, as in Pillow
    cut = retrieval.query_pictures(Pixels.from_array(images, [0, 0, 0], ["a"]), [retrieval.Query([], bbx=box) for box in edges])
    for i, (left, top, right, bottom) in enumerate([(4, 10, 25, 40), (0, 0, 60, 40), (59, 39, 60, 40)]):
        assert np.array_equal(cut.image(i), images[i, top:bottom, left:right].transpose(2, 0, 1))
    with pytest.raises(ValueError, match="empty or outside"):
        retrieval.query_pictures(pixels, [retrieval.Query([], bbx=(70, 0, 90, 10))] * 3)
    with pytest.raises(ValueError, match="a picture for each"):
        retrieval.query_pictures(pixels, queries[:2])


@pytest.mark.parametrize(
    "name, archive, centred, floor, n",
    [("coil-objects", "coil_objects", False, 0.83, 288), ("instances", "instances", True, 0.58, 137)],
)
def test_thumbnails_find_things_as_well_as_the_cards_say(shared_data, name, archive, centred, floor, n):
    with zipfile.ZipFile(shared_data / name / f"{archive}.zip") as file:
        rows = list(csv.DictReader(io.TextIOWrapper(file.open(f"{name}/groups.csv"), "utf-8")))
        pictures = [Image.open(io.BytesIO(file.read(f"{name}/{row['file']}"))) for row in rows]
        thumbnails = [np.asarray(p.convert("RGB").resize((16, 16), Image.Resampling.BOX)) for p in pictures]
    x = np.stack(thumbnails).reshape(len(rows), -1).astype(np.float32)
    groups = [row["group"] for row in rows]
    found = retrieval.leave_one_out(x - centred * x.mean(0), groups, interpolation="step")
    assert (found["n_queries"], found["n_left_out"]) == (n, 0)
    assert found["map"] == pytest.approx(floor, abs=0.006)
    assert retrieval.leave_one_out(x - centred * x.mean(0), groups)["map"] < found["map"]  # trapezoids are lower
