"""Released heads: their files, their names, and Hugging Face's DPT with the same numbers."""

import importlib.util

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from minidino.images.crops import normalise
from minidino.model.vit import build_vit
from minidino.model.weights import load_weights
from minidino.probes.dense import feature_maps
from minidino.probes.depth import DepthHead, bins, taps
from minidino.probes.dpt import DPTHead
from minidino.probes.features import extract
from minidino.probes.heads import load_head
from minidino.probes.segmentation import LinearHead

HEADS = [DPTHead(6, 8, max_depth=80.0), DepthHead(48, bins(max_depth=80.0, n=20)),
         DepthHead(48, bins(max_depth=80.0), batch_norm=True), LinearHead(48, 5), nn.Linear(48, 7)]  # fmt: skip


@pytest.fixture
def theirs():
    """Hugging Face's DINOv2 with a DPT head for distances, drawn at random."""
    if not importlib.util.find_spec("transformers"):
        pytest.skip("no transformers on this system")
    from transformers import Dinov2Config, DPTConfig, DPTForDepthEstimation

    backbone = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, patch_size=14,
                            image_size=70, out_indices=[1, 2, 3, 4], apply_layernorm=False,
                            reshape_hidden_states=False)  # fmt: skip
    config = DPTConfig(backbone_config=backbone, is_hybrid=False, neck_hidden_sizes=[4, 8, 16, 32],
                       readout_type="project", add_projection=True, hidden_act="gelu",
                       use_bias_in_fusion_residual=False)  # fmt: skip
    model = DPTForDepthEstimation(config).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():  # so that no part says little
            if not name.startswith("backbone.") and x.dim() > 1:
                torch.nn.init.kaiming_normal_(x)
            else:
                x.add_(0.03 * torch.randn_like(x))
        model.head.head[4].bias.fill_(3.0)
    return model


@pytest.mark.parametrize("size", [(56, 84), (70, 42)])  # even and odd numbers of patches
def test_hugging_face_says_the_same_distances(theirs, size):
    state = theirs.state_dict()
    vit = build_vit("vit_tiny", width=32, depth=4, heads=2, patch_size=14, img_size=70, interpolate_offset=0.0).eval()
    load_weights(vit, {k.removeprefix("backbone."): x for k, x in state.items() if k.startswith("backbone.")})
    head = load_head(state, min_depth=0.0, max_depth=1e3)  # theirs knows no bounds
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    maps = feature_maps(vit, images, taps(4), norm=False, class_token=True, progress=False)
    with torch.no_grad():
        expected = theirs(normalise(images)).predicted_depth
        found = head(maps)
    assert found.shape == expected.shape and expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [".pth", ".safetensors"])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_a_head_comes_back_from_a_file_with_released_names(head, kind, tmp_path):
    for x in head.parameters():
        x.data.add_(0.1 * torch.randn_like(x))
    prefix = "" if isinstance(head, nn.Linear) else "decode_head."
    state = {prefix + key: x for key, x in head.state_dict().items() if key != "bins"}
    if kind == ".pth":
        torch.save({"state_dict": state, "meta": {}}, tmp_path / "head.pth")
    else:
        save_file(state, tmp_path / "head.safetensors")
    again = load_head(tmp_path / f"head{kind}", max_depth=80.0)
    maps = torch.randn(2, 48) if isinstance(head, nn.Linear) else torch.randn(2, 48, 2, 3)
    assert type(again) is type(head) and not again.training
    found = again(maps)
    assert torch.equal(found, head.eval()(maps)) and found.std() > 0.01


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("convs.2.conv.weight"), "convs.2.conv.weight"),
        (lambda s: s.pop("project.conv.weight"), "Missing key.*project.conv.weight"),
        (lambda s: s.pop("conv_depth.head.0.weight"), "expected a head for classes"),
        (lambda s: s.pop("fusion_blocks.1.project.conv.bias"), "Missing key.*fusion_blocks.1.project.conv.bias"),
        (lambda s: s.update(more=torch.ones(1)), "Unexpected key.*more"),
        (lambda s: s.update({"conv_depth.head.4.bias": torch.ones(2)}), "size mismatch for conv_depth.head.4.bias"),
    ],
)
def test_a_file_that_is_no_such_head_is_refused(change, words):
    state = DPTHead(16, 8).state_dict()
    change(state)
    with pytest.raises(ValueError, match=words):
        load_head(state)


def test_a_name_is_not_downloaded():
    with pytest.raises(FileNotFoundError, match="no head at dinov2_vits14: expected a file"):
        load_head("dinov2_vits14")


def test_a_released_classifier_reads_what_extract_gives():
    vit = build_vit("vit_tiny", width=32, depth=5, heads=2, patch_size=14, img_size=28).eval()
    images = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    layers = vit.get_intermediate_layers(normalise(images), 4, return_class_token=True)
    expected = torch.cat([*(cls for _, cls in layers), layers[-1][0].mean(1)], 1)  # as in the official hub
    x = extract(vit, images, progress=False, blocks=4)
    read = torch.cat([x["cls_blocks"].flatten(1), x["mean_patch"]], 1)
    torch.testing.assert_close(read, expected, rtol=1e-5, atol=1e-5)
    head = load_head({"weight": torch.randn(10, 160), "bias": torch.zeros(10)})
    assert head(read).shape == (3, 10)
