"""Every layout lands in the same backbone, and what does not fit is told in words."""

import re

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer as TimmViT
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from minidino.model.vit import build_vit, interpolate_pos_embed
from minidino.model.weights import load_weights, save_backbone

IMAGES = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(patch_size=8, img_size=24, width=48, depth=4, heads=3)
    vit = build_vit("vit_tiny", **{**sizes, **options})
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return vit.eval()


def chunked(state):
    """Four blocks in two chunks: the second number is the absolute one."""
    return {re.sub(r"blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", k): x for k, x in state.items()}


def training(state):
    """An official training checkpoint: student and teacher with their heads, FSDP wrappers."""
    teacher = {f"teacher.backbone._fsdp_wrapped_module.{k}": x for k, x in chunked(state).items()}
    student = {f"student.backbone._fsdp_wrapped_module.{k}": 0 * x for k, x in chunked(state).items()}
    return {"model": student | teacher | {"teacher.dino_head.mlp.0.weight": torch.zeros(2, 2)}, "iteration": 5}


def exported(state):
    """The official export of a teacher."""
    return {"teacher": {f"backbone.{k}": x for k, x in state.items()} | {"dino_head.mlp.0.weight": torch.zeros(2, 2)}}


LAYOUTS = {"hub": dict, "chunked": chunked, "exported": exported, "training": training}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, dict(num_register_tokens=4, ffn="swiglu", layerscale=None)])
def test_official_layouts(layout, options, tmp_path):
    source, target = tiny(0, **options), tiny(1, **options)
    torch.save(LAYOUTS[layout](source.state_dict()), tmp_path / "w.pth")
    assert not torch.allclose(target(IMAGES), source(IMAGES))
    assert load_weights(target, tmp_path / "w.pth") is target
    assert all(torch.equal(x, target.state_dict()[k]) for k, x in source.state_dict().items())


def test_safetensors_round_trip(tmp_path):
    source = tiny(0)
    path = save_backbone(source, tmp_path / "weights.safetensors")
    assert load_file(path).keys() == source.state_dict().keys()
    assert torch.equal(load_weights(tiny(1), path)(IMAGES), source(IMAGES))


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_hugging_face_layouts(registers, ffn, tmp_path):
    config, model = (Dinov2WithRegistersConfig, Dinov2WithRegistersModel) if registers else (Dinov2Config, Dinov2Model)
    extra = dict(num_register_tokens=registers) if registers else {}
    torch.manual_seed(0)
    theirs = model(
        config(
            hidden_size=48, num_hidden_layers=4, num_attention_heads=3, image_size=24, patch_size=8,
            use_swiglu_ffn=ffn == "swiglu", **extra,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)  # its files and its memory use different names
    expected = theirs(IMAGES).last_hidden_state
    for source in (tmp_path, tmp_path / "model.safetensors", theirs.state_dict()):
        vit = load_weights(tiny(1, ffn=ffn, num_register_tokens=registers), source)
        torch.testing.assert_close(vit.norm(vit.forward_features(IMAGES).x_prenorm), expected, rtol=0, atol=1e-5)
        assert torch.equal(vit.mask_token, theirs.embeddings.mask_token)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_timm_layouts(registers, ffn):
    swiglu = dict(mlp_ratio=2.66667 * 2, mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU) if ffn == "swiglu" else {}
    torch.manual_seed(0)
    theirs = TimmViT(
        img_size=24, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=0, init_values=1.0,
        reg_tokens=registers, no_embed_class=registers > 0, **swiglu,
    ).eval()  # fmt: skip
    vit = tiny(1, ffn=ffn, num_register_tokens=registers)
    with pytest.warns(UserWarning, match="no mask_token"):
        load_weights(vit, theirs.state_dict())
    expected = theirs.forward_features(IMAGES)
    torch.testing.assert_close(vit.norm(vit.forward_features(IMAGES).x_prenorm), expected, rtol=0, atol=1e-5)
    assert not vit.mask_token.any()


def test_another_grid_is_resized_and_said():
    source, target = tiny(0), tiny(1, img_size=40)
    with pytest.warns(UserWarning, match="resized from 3 x 3 to 5 x 5"):
        load_weights(target, source.state_dict())
    assert torch.equal(target.pos_embed, interpolate_pos_embed(source.pos_embed, (5, 5), offset=0.0))
    assert torch.equal(target.norm.weight, source.norm.weight)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(depth=3), "depth: weights have 4, backbone has 3"),
        (dict(width=24), "width: weights have 48, backbone has 24"),
        (dict(ffn="swiglu"), "ffn: weights have mlp, backbone has swiglu"),
        (dict(num_register_tokens=4), "registers: weights have 0, backbone has 4"),
        (dict(layerscale=None), "layerscale: weights have True, backbone has False"),
        (dict(patch_size=4, img_size=12), "patch_size: weights have 8, backbone has 4"),
    ],
)
def test_misfits_are_told_in_words_and_change_nothing(options, words):
    target = tiny(1, **options)
    before = {k: x.clone() for k, x in target.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        load_weights(target, tiny(0).state_dict())
    assert all(torch.equal(x, before[k]) for k, x in target.state_dict().items())


def test_missing_and_unexpected_keys_are_named():
    state = tiny(0).state_dict()
    del state["blocks.2.attn.qkv.bias"]
    with pytest.raises(ValueError, match="1 missing: blocks.2.attn.qkv.bias\n  1 not expected: head.weight"):
        load_weights(tiny(1), state | {"head.weight": torch.zeros(1)})


def test_what_is_no_backbone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got keys fc.weight"):
        load_weights(tiny(), {"fc.weight": torch.zeros(1)})
    for path in (tmp_path, tmp_path / "absent.pth"):
        with pytest.raises(FileNotFoundError, match="expected a .pth"):
            load_weights(tiny(), path)
