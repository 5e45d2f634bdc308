"""The DPT decoder: released names, and what it reads that a linear head cannot."""

import pytest
import torch
import torch.nn.functional as F

from minidino.probes.depth import linear_depth, predict_depth
from minidino.probes.dpt import DPTHead, dpt_depth


def test_released_names_and_sizes():
    head = DPTHead(384)
    state = head.state_dict()
    assert not [key for key in state if key.startswith("fusion_blocks.0.res_conv_unit1")]
    weights, biases = ({key[: -len(x)] for key in state if key.endswith(x)} for x in (".weight", ".bias"))
    units = [f"fusion_blocks.{i}.res_conv_unit{j}" for i in range(4) for j in (1, 2) if i or j > 1]
    assert weights - biases == {f"convs.{i}.conv" for i in range(4)} | {f"{x}.conv{k}.conv" for x in units for k in (1, 2)}
    assert {key: tuple(state[key].shape) for key in (
        "reassemble_blocks.projects.0.conv.weight", "reassemble_blocks.readout_projects.3.0.weight",
        "reassemble_blocks.resize_layers.0.weight", "reassemble_blocks.resize_layers.3.bias", "convs.1.conv.weight",
        "fusion_blocks.3.res_conv_unit1.conv2.conv.weight", "fusion_blocks.0.project.conv.bias", "project.conv.weight",
        "conv_depth.head.0.weight", "conv_depth.head.4.bias",
    )} == {
        "reassemble_blocks.projects.0.conv.weight": (48, 384, 1, 1),
        "reassemble_blocks.readout_projects.3.0.weight": (384, 768),
        "reassemble_blocks.resize_layers.0.weight": (48, 48, 4, 4),
        "reassemble_blocks.resize_layers.3.bias": (384,),
        "convs.1.conv.weight": (256, 96, 3, 3),
        "fusion_blocks.3.res_conv_unit1.conv2.conv.weight": (256, 256, 3, 3),
        "fusion_blocks.0.project.conv.bias": (256,),
        "project.conv.weight": (256, 256, 3, 3),
        "conv_depth.head.0.weight": (128, 256, 3, 3),
        "conv_depth.head.4.bias": (1,),
    }  # fmt: skip


def rooms(n, seed=0, shift=0):
    """Maps of four blocks, D = 2, whose first channel tells how far the patch `shift` places further right is."""
    generator = torch.Generator().manual_seed(seed)
    far = 1 + 3 * torch.rand(n, 1, 6, 8, generator=generator)
    maps = torch.randn(n, 16, 6, 8, generator=generator) / 10
    maps[:, ::4] = torch.roll(far, -shift, 3) - 2.5
    metres = F.interpolate(far, (48, 64), mode="nearest")[:, 0]
    metres[:, :4] = 0  # not known
    return maps, metres


def test_what_only_a_neighbour_tells_is_for_a_decoder():
    train, test = rooms(24, shift=1), rooms(8, seed=1, shift=1)
    given = {"min_depth": 0.1, "max_depth": 5, "steps": 120, "patch_size": 8}
    blind = linear_depth(*train, *test, **given, lr=0.05)
    found = dpt_depth(*train, *test, **given, channels=16)
    assert blind["rmse"] > 0.9 * blind["constant"]["rmse"]
    assert found["rmse"] < 0.75 * found["constant"]["rmse"]
    whole = torch.cat(list(predict_depth(found["head"], test[0], (48, 64), 8, batch_size=3)))
    assert whole.shape == (8, 48, 64) and whole.max() <= 5


def test_the_same_seed_gives_the_same_head_and_nobody_elses_numbers_change():
    data = *rooms(3), *rooms(3)
    given = {"min_depth": 0.1, "max_depth": 5, "steps": 3, "batch_size": 2, "channels": 4}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, again, other = (dpt_depth(*data, **given, seed=seed) for seed in (2, 2, 3))
    assert torch.rand(1) == expected
    assert one["rmse"] == again["rmse"] != other["rmse"]
    whole = data[1].round()
    rmse = [dpt_depth(data[0], x, data[0], x, **given)["rmse"] for x in (whole, whole.numpy().astype("uint16"))]
    assert rmse[0] == pytest.approx(rmse[1])


def test_padded_pictures_with_an_odd_number_of_patches():
    head = DPTHead(2, 4, max_depth=6.0).eval()
    torch.nn.init.normal_(head.conv_depth.head[4].weight)
    maps = torch.randn(2, 16, 5, 3)
    assert head(maps).shape == (2, 96, 64) and head(maps).std() > 0.1  # the places of 6 x 4 patches, over 5 x 3
    part = torch.cat(list(predict_depth(head, maps, (37, 23), 8)))
    whole = torch.cat(list(predict_depth(head, maps, (40, 24), 8)))
    torch.testing.assert_close(part, whole[:, 1:38, :23])


def test_a_fresh_head_says_its_guess_of_features_of_any_scale_and_can_learn():
    head = DPTHead(8, 8, min_depth=0.5, guess=5.0)
    found = head(1e4 * torch.randn(1, 64, 4, 4))
    assert torch.equal(found, torch.full((1, 64, 64), 5.0))
    found.mean().backward()
    assert head.conv_depth.head[4].bias.grad != 0 and (head.conv_depth.head[4].weight.grad != 0).any()


def test_an_evaluated_head_stays_within_its_range():
    head = DPTHead(8, 8, max_depth=10.0)
    torch.nn.init.constant_(head.conv_depth.head[4].bias, 20.0)
    maps = torch.randn(1, 64, 4, 4)
    assert (head(maps) > 19).all() and (head.eval()(maps) == 10).all()


def test_what_does_not_fit_is_refused():
    maps, metres = rooms(2)
    with pytest.raises(ValueError, match="8 D channels, got 12"):
        dpt_depth(maps[:, :12], metres, maps[:, :12], metres)
    data = maps, metres, maps, metres
    for change, words in (({"steps": 0}, "at least 1"), ({"min_depth": 0.0}, "above 0 m"),
                          ({"pixels": 9}, "only a DepthHead .* got pixels = 9 for a DPTHead")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            dpt_depth(*data, **{"steps": 2, "channels": 4} | change)
    with pytest.raises(ValueError, match="min_depth < guess"):
        DPTHead(8, 8, min_depth=2.0, guess=1.0)  # its ReLU would be dead
