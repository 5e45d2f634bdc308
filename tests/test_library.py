"""What the functions say to whoever imports them, without the checks of shapes that other tests run under."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from minidino.config import override, preset
from minidino.curation.clusters import balanced_sample, hierarchical_kmeans
from minidino.curation.duplicates import find_duplicates
from minidino.curation.pipeline import Curation
from minidino.curation.retrieval import retrieve_by_cluster
from minidino.images.batches import collate
from minidino.images.crops import crop_boxes, mean_and_std, multi_crop, released_laws
from minidino.images.masks import batch_masks
from minidino.images.pixels import Pixels
from minidino.images.scenes import draw_scenes
from minidino.learning.train import start, train
from minidino.model.vit import build_vit
from minidino.model.weights import backbone_of, export_weights
from minidino.probes.depth import linear_depth, silog_loss
from minidino.probes.dpt import dpt_depth
from minidino.probes.features import FeatureStore, feature_key
from minidino.probes.finetune import finetune
from minidino.probes.grid import cached_features, linear_grid, train_grid
from minidino.probes.knn import knn_accuracy, knn_predict, neighbours
from minidino.probes.linear import linear_probe, patch_depth_probe, patch_probe
from minidino.probes.retrieval import similarity
from minidino.probes.segmentation import linear_segmentation

ROOT = Path(__file__).resolve().parents[1]


def plain(module: str) -> ModuleType:
    """A module as everybody else has it: read from its file, past the hook that checks annotations."""
    spec = importlib.util.spec_from_file_location(f"plain_{module}", ROOT / "minidino" / f"{module}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_losses_refuse_shapes_that_would_broadcast():
    losses = plain("learning/losses")
    logits, probs, weights = torch.zeros(2, 4, 5), torch.full((2, 4, 5), 0.2), torch.ones(4)
    with pytest.raises(ValueError, match=r"got \(2, 4, 5\): views have to be flattened"):
        losses.sinkhorn_knopp(logits, 0.05)
    for student, teacher in ((logits, probs[:, :1]), (logits, probs[..., :1]), (logits[:, 0], probs[:, 0])):
        with pytest.raises(ValueError, match=r"student logits \(V, B, K\)"):
            losses.dino_loss(student, teacher)
    for teacher, weight in ((probs[0], weights[:, None]), (probs[0], weights[:1]), (probs[0, :1], weights)):
        with pytest.raises(ValueError, match=r"weights \(M,\), got"):
            losses.ibot_loss(logits[0], teacher, weight, 2)


@pytest.mark.parametrize("n", [np.int64(2), np.array([2, 1]), torch.tensor(2), [torch.tensor(1), 2]])
def test_blocks_are_numbers_of_any_kind(n):
    vit = plain("model/vit").build_vit("vit_tiny", patch_size=4, img_size=16, width=24, depth=3, heads=3)
    images = torch.randn(2, 3, 8, 16)
    found = vit.get_intermediate_layers(images, n)
    assert len(found) == 2 and all(map(torch.equal, found, vit.get_intermediate_layers(images, 2)))


# ---------------------------------------------------------------- the caller's own settings


@contextmanager
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == torch.float64
        torch.set_default_dtype(torch.float32)


def judged_by(probe: Callable) -> str:
    """What a probe says of features without sense, in every digit."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 12)).astype(np.float32), np.arange(40) % 3
    maps, labels = x[:32].reshape(4, 12, 2, 4), np.arange(4 * 8 * 16).reshape(4, 8, 16) % 3
    patches, depth = maps.reshape(4, 12, 8).transpose(0, 2, 1), labels[:, 0, :8] + 1.0
    blocks = np.concatenate([maps, maps], 1)[:, :24]
    tokens = {"cls_blocks": x.reshape(40, 2, 6), "mean_patch": x[:, 6:]}
    small = dict(steps=4, batch_size=4)
    pictures = Pixels.from_array(rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8), np.arange(9) % 3, "abc")
    calls = {
        neighbours: lambda: [found.tolist() for found in neighbours(x, x[:5], 3)],
        similarity: lambda: similarity(x[:2], x).tolist(),
        linear_probe: lambda: linear_probe(x, y, x, y, epochs=2, batch_size=8),
        linear_grid: lambda: linear_grid(tokens, y, tokens, y, blocks=(1, 2), epochs=2, batch_size=8),
        train_grid: lambda: train_grid(cached_features(tokens, y, 8), 5, 3, blocks=(1, 2)).table(tokens, y),
        patch_probe: lambda: patch_probe(patches, labels[:, 0, :8], patches, labels[:, 0, :8], 3),
        patch_depth_probe: lambda: patch_depth_probe(patches, depth, patches, depth),
        linear_segmentation: lambda: linear_segmentation(maps, labels, maps, labels, 3, **small)["iou"],
        linear_depth: lambda: linear_depth(maps, labels + 1.0, maps, labels + 1.0, **small)["rmse"],
        dpt_depth: lambda: dpt_depth(blocks, labels + 1.0, blocks, labels + 1.0, channels=8, **small)["rmse"],
        finetune: lambda: [p.tolist() for p in tuned(pictures).parameters()],
    }
    return repr(calls[probe]())


VIT = build_vit("vit_tiny", patch_size=4, img_size=8, width=24, depth=1, heads=3)


def tuned(pictures: Pixels) -> torch.nn.Module:
    return finetune(VIT, pictures, pictures, 8, steps=4, batch_size=4, progress=False)["classifier"]


PROBES = [neighbours, similarity, linear_probe, linear_grid, train_grid, patch_probe, patch_depth_probe,
          linear_segmentation, linear_depth, dpt_depth, finetune]  # fmt: skip


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, double, partial(torch.autocast, "cpu")])
@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
def test_probes_say_the_same_in_every_mode(probe, mode):
    before = torch.get_rng_state()
    expected = judged_by(probe)
    with mode():
        assert judged_by(probe) == expected
    assert torch.equal(torch.get_rng_state(), before)  # chance is the caller's, too


# ---------------------------------------------------------------- requests that make no sense


def test_pictures_in_memory_have_whole_numbers_for_labels_and_are_copied():
    images, labels = np.zeros((3, 4, 4, 1), dtype=np.uint8), np.arange(3)
    pictures = Pixels.from_array(images, labels, "abc")
    images[:], labels[:] = 9, -1
    assert pictures.data.max() == 0 and pictures.labels.tolist() == [0, 1, 2]
    assert Pixels.from_array(images, [0.0, -1.0, 2.0], "abc").labels.tolist() == [0, -1, 2]
    for wrong in ([0.0, 0.7, 2.0], [0, np.nan, 1], np.eye(3), ["0", "1", "2"]):  # 0.7 was class 0
        with pytest.raises(ValueError, match="as the numbers of classes"):
            Pixels.from_array(images, wrong, "abc")
    with pytest.raises(ValueError, match="numpy array .* got Tensor of"):
        Pixels.from_array(torch.from_numpy(images), [0] * 3, "a")


def test_probes_refuse_to_learn_nothing_and_to_ask_nobody():
    x, y = torch.randn(40, 12), torch.arange(40) % 3
    tokens = {"cls_blocks": x.view(40, 2, 6), "mean_patch": x[:, 6:]}
    for ks in ((0, 5), (-1, 5), ()):  # a vote of nobody was for class 0, one of -1 neighbours of all but one
        with pytest.raises(ValueError, match="ks of 1 or more"):
            knn_accuracy(x, y, x, y, ks=ks)
    with pytest.raises(ValueError, match="ks of 1 or more"):
        knn_predict(x, y, x, 0)
    nothing = ((dict(epochs=0), "got 0 and 256"), (dict(batch_size=0), "and 0"), (dict(lrs=()), "got none"))
    for options, words in nothing:
        with pytest.raises(ValueError, match=words):
            linear_probe(x, y, x, y, **options)
        with pytest.raises(ValueError, match=words):
            linear_grid(tokens, y, tokens, y, blocks=(1, 2), **options)
    with pytest.raises(ValueError, match="got 12 and 5: not the same features"):
        linear_probe(x, y, x[:, :5], y)
    with pytest.raises(ValueError, match="got 3 and 2: not the same features"):
        patch_probe(x.view(10, 16, 3), y[:16].expand(10, -1), x.view(10, 24, 2), y[:24].expand(10, -1), 3)


def test_training_refuses_the_modes_it_cannot_learn_in():
    config = override(preset("scenes-cpu"), ["run.steps=2", "vit.depth=1", "vit.width=32", "optim.batch_size=2"])
    pictures = Pixels.from_array(np.zeros((4, 48, 48, 3), dtype=np.uint8), [0] * 4, ["black"])
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)):
        with mode(), pytest.raises(ValueError, match="outside of no_grad"):
            next(train(config, pictures, start(config, torch.device("cpu"))))


@pytest.mark.parametrize("change", [torch.Tensor.long, torch.Tensor.byte, lambda masks: masks.unflatten(-1, (2, 2))])
def test_masks_of_another_kind_are_no_batch(change):
    crops, masks = torch.zeros(2, 3, 3, 8, 8), torch.ones(2, 3, 4, dtype=torch.bool)
    assert collate(crops, crops[:0], masks, torch.arange(3)).mask_weights.shape == (24,)
    with pytest.raises(ValueError, match=r"masks \(G, B, N\) of bool, got \(2, 3, "):
        collate(crops, crops[:0], change(masks), torch.arange(3))


def test_chance_does_not_depend_on_the_default_dtype():
    laws, images = released_laws(16, 8), torch.randint(256, (2, 3, 20, 24), dtype=torch.uint8)
    tree = hierarchical_kmeans(np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32), [6, 2])
    config = override(preset("scenes-cpu"), ["run.steps=1", "vit.depth=1", "vit.width=32", "optim.batch_size=2"])
    pictures = Pixels.from_array(np.zeros((4, 48, 48, 3), dtype=np.uint8), [0] * 4, ["black"])

    def drawn() -> list[list]:
        mean_and_std.cache_clear()
        seed = torch.Generator().manual_seed(0)
        crops = multi_crop(images, torch.tensor([[20, 24]] * 2), laws[:2], laws[2], 1, [3, 4])
        boxes, masks = crop_boxes(3, 20, 24, (0.3, 1.0), seed), batch_masks(8, (8, 8), seed)
        return [x.tolist() for x in (*crops, boxes, masks, balanced_sample(tree, 10, seed))]

    expected = drawn()
    with double():
        assert drawn() == expected
        state = start(config, torch.device("cpu"))
        (record,) = train(config, pictures, state)
    assert {p.dtype for p in state.student.parameters()} == {torch.float32} and np.isfinite(record["loss"])


def test_a_batch_is_chosen_as_a_selection_is():
    pictures = Pixels.from_array(np.arange(3, dtype=np.uint8)[:, None, None, None].repeat(3, 3), [0] * 3, "a")
    for chosen in ([0, 2], np.array([True, False, True]), torch.tensor([0, -1])):
        assert pictures.batch(chosen)[0][:, 0, 0, 0].tolist() == [0, 2]
        assert len(pictures.select(chosen)) == 2


def test_shares_of_masks_are_no_percentages():
    for wrong in (dict(ratio=(10.0, 50.0)), dict(ratio=(0.5, 0.1)), dict(mask_probability=2.0)):
        with pytest.raises(ValueError, match="from 0 to 1, got"):
            batch_masks(4, (6, 6), torch.Generator(), **wrong)


def test_numbers_are_no_mask():
    prediction, target = torch.rand(2, 2, 6, 6) + 1
    valid = target > 1.5
    assert silog_loss(prediction, target, valid) > 0
    with pytest.raises(ValueError, match="valid as bool, got torch.int64"):
        silog_loss(prediction, target, valid.long())


def test_no_picture_at_all_is_nothing_to_learn_from():
    pictures = Pixels.from_array(np.zeros((2, 8, 8, 3), dtype=np.uint8), [0, 1], "ab")
    with pytest.raises(ValueError, match="nothing to learn from"):
        finetune(VIT, pictures.select([]), pictures, 8, steps=1, progress=False)


@pytest.mark.parametrize("change", [torch.Tensor.bfloat16, torch.Tensor.requires_grad_, torch.Tensor.t])
def test_a_store_keeps_tensors_of_any_kind(change, tmp_path):
    value = change(torch.arange(6.0).view(2, 3))
    (stored,) = FeatureStore(tmp_path).get(feature_key("hash", "set", 8), lambda: {"cls": value}).values()
    assert stored.dtype == np.float32 and stored.tolist() == value.tolist()


# ---------------------------------------------------------------- weights


def test_what_is_no_state_dict_of_a_backbone_is_told():
    weights = plain("model/weights")
    state = VIT.state_dict()
    for source, words in (
        (VIT, r"got a VisionTransformer: give its state_dict\(\)"),
        ({name: x.numpy() for name, x in state.items()}, "got no tensors by name, but blocks.0.attn.proj.bias"),
        ({"epoch": 3, "model_state_dict": state}, "got no tensors by name, but epoch, model_state_dict"),
        ({}, "but nothing"),
        (state | {"head.weight": torch.zeros(3, 24)}, "leave out what is no part of a backbone"),
    ):
        with pytest.raises(ValueError, match=words):
            weights.load_weights(VIT, source)


def test_blocks_that_share_their_weights_are_written_one_by_one(tmp_path):
    vit = build_vit("vit_tiny", patch_size=4, img_size=8, width=24, depth=2, heads=3)
    vit.blocks[1].attn = vit.blocks[0].attn
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(backbone_of(export_weights(vit, tmp_path / "tied.safetensors"))(images), vit(images))


# ---------------------------------------------------------------- curation


def test_curation_refuses_what_has_no_answer():
    x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    x[7] = x[2]
    assert len(find_duplicates(x, 0.99, k=1).representatives) == 39
    with pytest.raises(ValueError, match="k of at least 1 neighbour, got 0"):  # which would find no copy
        find_duplicates(x, 0.99, k=0)
    for quality in (np.arange(40), np.arange(5)[:, None]):
        with pytest.raises(ValueError, match=r"quality of shape \(40, q\), got \("):
            find_duplicates(x, 0.99, quality=quality)
    with pytest.raises(ValueError, match=r"rows \(n, 8\) like the centres, got \(40, 3\)"):
        retrieve_by_cluster(x[:, :3], x, 3)
    with pytest.raises(ValueError, match="min_queries of at least 1, got 0"):
        retrieve_by_cluster(x[:1], x, 3, min_queries=0)


def test_stages_of_a_curation_are_called_in_their_order(tmp_path):
    for i, image in enumerate(draw_scenes(3, 32, 0).images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    curation = Curation(tmp_path, tmp_path / "out", short_side=32, say=lambda words: None, progress=False)
    for stage, before in ((lambda: curation.drop_copies(None), "drop_same"), (lambda: curation.drop_leaks("x"), "drop_copies")):
        with pytest.raises(ValueError, match=rf"expected {before}\(\) before"):
            stage()
