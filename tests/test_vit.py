"""The backbone and the head against independent implementations, published counts and properties."""

import math
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from minidino.model.heads import DINOHead
from minidino.model.layers import swiglu_hidden
from minidino.model.vit import build_vit, interpolate_pos_embed
from minidino.model.weights import load_weights

TINY = dict(patch_size=4, img_size=16, width=24, depth=3, heads=3)


def shake(model, seed=0):
    """Give every parameter a part in the output: fresh models have zero biases and near-zero gains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(0.5 + 0.1 * noise if "gamma" in name or "lambda" in name else p + 0.05 * noise)
    return model.eval()


def ours_from(theirs, name, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm has no mask token
        return load_weights(build_vit(name, **options), theirs.state_dict()).eval()


def assert_same_tokens(vit, reference, sizes):
    """reference(images) -> normed (B, T, D)."""
    generator = torch.Generator().manual_seed(1)
    for size in sizes:
        images = torch.randn(1, 3, *size, generator=generator)
        with torch.no_grad():
            tokens, expected = vit.forward_features(images), reference(images)
        got = torch.cat([tokens.x_norm_clstoken[:, None], tokens.x_norm_regtokens, tokens.x_norm_patchtokens], dim=1)
        assert expected.std() > 0.5
        assert (got - expected).abs().max() <= 1e-5, size
        torch.testing.assert_close(vit(images), tokens.x_norm_clstoken)


SIZES = [(224, 224), (98, 98), (224, 448)]


# timm asks for positions by size with antialias; that is our offset 0.0, antialias True.
@pytest.mark.parametrize("timm_name, registers", [("dinov2", 0), ("reg4_dinov2", 4)])
def test_small_equals_timm(timm_name, registers):
    theirs = shake(timm.create_model(f"vit_small_patch14_{timm_name}", num_classes=0, dynamic_img_size=True))
    positions = dict(interpolate_offset=0.0, interpolate_antialias=True)
    vit = ours_from(theirs, "vit_small", num_register_tokens=registers, **positions)
    assert_same_tokens(vit, theirs.forward_features, SIZES)


# Hugging Face asks by size, without antialias except in the register models.
@pytest.mark.parametrize("registers", [0, 4])
def test_small_equals_transformers(registers):
    config = Dinov2WithRegistersConfig if registers else Dinov2Config
    theirs = (Dinov2WithRegistersModel if registers else Dinov2Model)(
        config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, attn_implementation="eager")
    )
    vit = ours_from(
        shake(theirs),
        "vit_small",
        num_register_tokens=registers,
        interpolate_offset=0.0,
        interpolate_antialias=bool(registers),
    )
    assert_same_tokens(vit, lambda images: theirs(images).last_hidden_state, SIZES)


def test_swiglu_equals_timm_and_transformers():
    small = dict(width=96, depth=3, heads=4, interpolate_offset=0.0)
    theirs = TimmViT(
        img_size=518, patch_size=14, embed_dim=96, depth=3, num_heads=4, num_classes=0, init_values=1e-5,
        mlp_ratio=2.66667 * 2, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, dynamic_img_size=True,
    )  # fmt: skip
    vit = ours_from(shake(theirs), "vit_giant2", interpolate_antialias=True, **small)
    assert_same_tokens(vit, theirs.forward_features, SIZES)

    config = Dinov2Config(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=518, patch_size=14, use_swiglu_ffn=True
    )
    theirs = shake(Dinov2Model(config))
    vit = ours_from(theirs, "vit_giant2", **small)
    assert_same_tokens(vit, lambda images: theirs(images).last_hidden_state, SIZES)


# name: patch 14 at 518, the same with 4 registers, patch 16 at 224
COUNTS = {
    "vit_small": (22_056_576, 22_058_112, 21_675_264),
    "vit_base": (86_580_480, 86_583_552, 85_817_856),
    "vit_large": (304_368_640, 304_372_736, 303_351_808),
    "vit_giant2": (1_136_480_768, 1_136_486_912, 1_134_955_520),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        builds = [build_vit(name), build_vit(name, num_register_tokens=4), build_vit(name, patch_size=16, img_size=224)]
    assert tuple(sum(p.numel() for p in vit.parameters()) for vit in builds) == COUNTS[name]
    assert all(p.is_meta for p in builds[0].parameters())


@pytest.mark.parametrize(
    "patch, size, registers, n_patches",
    [(14, 224, 0, 256), (14, 98, 4, 49), (14, 518, 4, 1369), (16, 224, 0, 196), (16, 96, 0, 36)],
)
def test_token_counts(patch, size, registers, n_patches):
    with torch.device("meta"):
        vit = build_vit("vit_small", patch_size=patch, img_size=size, num_register_tokens=registers, depth=1)
        tokens = vit.forward_features(torch.empty(2, 3, size, size))
    assert tokens.x_norm_patchtokens.shape == (2, n_patches, 384)
    assert tokens.x_norm_regtokens.shape == (2, registers, 384)
    assert tokens.x_prenorm.shape == (2, 1 + registers + n_patches, 384)


def test_swiglu_widths():
    assert [swiglu_hidden(d) for d in (384, 768, 1024, 1536)] == [1024, 2048, 2736, 4096]


def test_fresh_weights_follow_the_released_draw():
    torch.manual_seed(0)
    vit = build_vit("vit_small", depth=2, num_register_tokens=4, layerscale=1e-5)
    assert vit.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.01)
    assert 0 < vit.cls_token.abs().max() < 1e-5 and 0 < vit.register_tokens.abs().max() < 1e-5
    assert vit.mask_token.shape == (1, 384) and not vit.mask_token.any() and not vit.blocks[1].mlp.fc2.bias.any()
    assert (vit.blocks[1].ls2.gamma == 1e-5).all() and vit.norm.eps == vit.blocks[0].norm1.eps == 1e-6
    assert vit.patch_embed.proj.weight.abs().max() <= 1 / math.sqrt(3 * 14 * 14)  # torch's own draw is uniform
    assert not any("ls1" in key for key in build_vit("vit_tiny", **TINY, layerscale=None).state_dict())


def bicubic_matrix(n_out, n_in, scale):
    """Keys' cubic (a = -0.75) sampled at (i + 1/2) / scale - 1/2, edges repeated: (n_out, n_in)."""
    a, matrix = -0.75, np.zeros((n_out, n_in))
    for i in range(n_out):
        x = (i + 0.5) / scale - 0.5
        for j in range(math.floor(x) - 1, math.floor(x) + 3):
            t = abs(x - j)
            weight = (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * (t**3 - 5 * t**2 + 8 * t - 4)
            matrix[i, min(max(j, 0), n_in - 1)] += weight
    return matrix


@pytest.mark.parametrize("offset", [0.1, 0.0])
@pytest.mark.parametrize("grid", [(3, 3), (9, 5), (2, 18)])
def test_positions_are_sampled_as_released(grid, offset):
    pos = torch.randn(1, 37, 5, generator=torch.Generator().manual_seed(0))
    rows, cols = (bicubic_matrix(n, 6, (n + offset) / 6) for n in grid)
    expected = np.einsum("im,jn,mnd->ijd", rows, cols, pos[0, 1:].reshape(6, 6, 5).numpy())
    got = interpolate_pos_embed(pos, grid, offset)
    np.testing.assert_allclose(got[0, 1:].numpy(), expected.reshape(-1, 5), atol=1e-5)
    assert torch.equal(got[:, 0], pos[:, 0])


def test_positions_untouched_antialiased_and_refused():
    pos = torch.randn(1, 17, 3, generator=torch.Generator().manual_seed(0))
    assert interpolate_pos_embed(pos, (4, 4)) is pos
    assert interpolate_pos_embed(pos, (2, 8)).shape == pos.shape  # as many patches, another shape: not the stored grid
    assert not torch.allclose(interpolate_pos_embed(pos, (2, 8)), pos)
    smooth = F.interpolate(pos[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2), (2, 2), mode="bicubic", antialias=True)
    got = interpolate_pos_embed(pos, (2, 2), offset=0.0, antialias=True)
    assert torch.equal(got[:, 1:], smooth.flatten(2).mT)
    with pytest.raises(ValueError, match="interpolate_offset 1.5"):
        interpolate_pos_embed(pos, (3, 3), offset=1.5)


def test_masked_patches_are_the_mask_token():
    vit = shake(build_vit("vit_tiny", **TINY))
    images, masks = torch.randn(2, 3, 16, 16), torch.zeros(2, 16, dtype=torch.bool)
    masks[0, [1, 7]] = True
    scribbled = images.clone()
    scribbled[0, :, 0:4, 4:8] = 9.0  # patch 1
    scribbled[0, :, 4:8, 12:16] = -9.0  # patch 7
    seen = vit.forward_features(images, masks)
    assert torch.equal(seen.x_prenorm, vit.forward_features(scribbled, masks).x_prenorm)
    assert not torch.allclose(seen.x_prenorm[0], vit.forward_features(images).x_prenorm[0])
    assert torch.allclose(seen.x_prenorm[1], vit.forward_features(images).x_prenorm[1], atol=1e-6)
    assert seen.masks is masks
    seen.x_norm_clstoken.sum().backward()
    assert vit.mask_token.grad.abs().min() > 0


def test_intermediate_layers_ascend():
    vit = shake(build_vit("vit_tiny", **TINY, num_register_tokens=2))
    images = torch.randn(2, 3, 8, 16)
    tokens = vit.forward_features(images)
    backwards, last_two = vit.get_intermediate_layers(images, n=[2, 0]), vit.get_intermediate_layers(images, n=2)
    assert len(backwards) == len(last_two) == 2
    assert torch.equal(backwards[1], tokens.x_norm_patchtokens) and torch.equal(last_two[1], backwards[1])
    assert not torch.allclose(backwards[0], last_two[0])
    ((maps, cls),) = vit.get_intermediate_layers(images, reshape=True, return_class_token=True)
    assert maps.shape == (2, 24, 2, 4) and torch.equal(cls, tokens.x_norm_clstoken)
    assert torch.equal(maps[:, :, 1, 3], tokens.x_norm_patchtokens[:, 7])
    (raw,) = vit.get_intermediate_layers(images, norm=False)
    assert torch.equal(raw, tokens.x_prenorm[:, 3:])
    for n in ([3], [-1], 4, []):
        with pytest.raises(ValueError, match="blocks from 0 to 2"):
            vit.get_intermediate_layers(images, n=n)


def test_code_for_the_official_models_may_ask_in_its_words():
    vit = build_vit("vit_tiny", **TINY)
    tokens = vit.forward_features(torch.randn(2, 3, 8, 16))
    assert all(tokens[name] is value for name, value in zip(tokens._fields, tokens))
    assert tokens[0] is tokens.x_norm_clstoken and tokens[-1] is None and len(tokens[1:]) == 4
    with pytest.raises(KeyError):
        tokens["x_norm"]
    assert (vit.embed_dim, vit.n_blocks, vit.num_heads) == (vit.width, vit.depth, vit.heads)


def test_attention_maps_equal_torch_multihead_attention():
    vit = shake(build_vit("vit_tiny", **TINY, num_register_tokens=2))
    images = torch.randn(2, 3, 16, 8)
    (patches,), block = vit.get_intermediate_layers(images, n=[0], norm=False), vit.blocks[1]
    attn, entering = block.attn, []
    block.norm1.register_forward_hook(lambda module, args, out: entering.append(out.unflatten(0, (2, -1))))
    maps = vit.attention_maps(images, block=1)
    normed = F.layer_norm(patches, (24,), block.norm1.weight, block.norm1.bias, 1e-6)
    torch.testing.assert_close(entering[0][:, 3:], normed)  # what the attention of block 1 sees
    x = entering[0].transpose(0, 1)  # (T, B, D)
    _, expected = F.multi_head_attention_forward(
        x, x, x, 24, 3, attn.qkv.weight, attn.qkv.bias, None, None, False, 0.0, attn.proj.weight, attn.proj.bias,
        average_attn_weights=False,
    )  # fmt: skip
    assert maps.shape == (2, 3, 11, 11)
    torch.testing.assert_close(maps, expected)
    assert torch.equal(vit.attention_maps(images), vit.attention_maps(images, block=2))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(name="vit_huge"), "unknown backbone 'vit_huge'"),
        (dict(ffn="relu"), "unknown ffn 'relu'"),
        (dict(drop_path="linear"), "unknown drop_path 'linear'"),
        (dict(drop_path_rate=1.0), r"drop_path_rate in \[0, 1\), got 1.0"),
        (dict(img_size=30), "img_size 30 px is not a multiple of patch_size 4 px"),
        (dict(heads=5), "width 24 is not a multiple of heads 5"),
        (dict(attention="flash"), "unknown attention 'flash'"),
        (dict(depth=0), "depth of at least 1, got 0"),  # not the depth of the name
        (dict(heads=-3), "heads of at least 1, got -3"),
        (dict(patch_size=0), "patch_size of at least 1, got 0"),
        (dict(num_register_tokens=-1), "num_register_tokens of at least 0, got -1"),
    ],
)
def test_impossible_builds_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_vit(**{"name": "vit_tiny", **TINY, **options})


def test_crop_side_must_be_whole_patches():
    with pytest.raises(ValueError, match="crop side 30 px is not a multiple of patch_size 4 px"):
        build_vit("vit_tiny", **TINY)(torch.zeros(1, 3, 16, 30))


@pytest.mark.parametrize(
    "width, prototypes, bottleneck, count",
    [
        (384, 65536, 256, 22_352_128), (1024, 65536, 256, 23_662_848), (1024, 131072, 384, 57_545_088),
        (1024, 131072, 256, 40_505_600), (1536, 131072, 384, 58_593_664), (1536, 131072, 256, 41_554_176),
        (192, 4096, 256, 6_168_832), (384, 8192, 256, 7_614_720),
    ],
)  # fmt: skip
def test_head_counts_are_the_published_ones(width, prototypes, bottleneck, count):
    with torch.device("meta"):
        head = DINOHead(width, prototypes, bottleneck_dim=bottleneck)
    assert sum(p.numel() for p in head.parameters()) == count
    assert list(head.state_dict()) == [f"mlp.{i}.{leaf}" for i in (0, 2, 4) for leaf in ("weight", "bias")] + [
        "last_layer.weight_g",
        "last_layer.weight_v",
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_head_equals_torch_weight_norm():
    torch.manual_seed(0)
    head = DINOHead(8, 12, hidden_dim=16, bottleneck_dim=6).double()
    nn.init.uniform_(head.last_layer.weight_g, 0.5, 2.0)
    mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 6)).double()
    last = nn.utils.weight_norm(nn.Linear(6, 12, bias=False).double())
    oracle = nn.ModuleDict({"mlp": mlp, "last_layer": last})
    oracle.load_state_dict(head.state_dict())  # strict: the keys are those of the deprecated torch.nn.utils.weight_norm
    x, weights = torch.randn(2, 5, 8, dtype=torch.double), torch.randn(2, 5, 12, dtype=torch.double)
    expected = last(F.normalize(mlp(x), dim=-1))
    torch.testing.assert_close(head(x), expected, rtol=0, atol=1e-12)
    (head(x) * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = dict(oracle.named_parameters())
    for name, p in head.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name].grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(head.bottleneck(x) @ head.prototypes().T, expected, rtol=0, atol=1e-12)


def test_head_logits_stay_float32_under_autocast():
    torch.manual_seed(0)
    head = DINOHead(8, 12, hidden_dim=16, bottleneck_dim=6)
    with torch.autocast("cpu", torch.bfloat16):
        z, logits = head.bottleneck(torch.randn(4, 8)), head(torch.randn(4, 8))
    assert logits.dtype == z.dtype == torch.float32
    assert (z.norm(dim=-1) - 1).abs().max() < 1e-6  # half precision would be off by about 1e-3
    assert logits.abs().max() <= 1


def test_head_draws():
    torch.manual_seed(0)
    released, tuned = DINOHead(64, 512, 512), DINOHead(64, 512, 512, mlp_gain=2.0, prototype_std=0.3, freeze_g=True)
    assert released.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert released.last_layer.weight_v.std().item() == pytest.approx(1 / math.sqrt(3 * 256), rel=0.01)
    assert tuned.mlp[2].weight.std().item() == pytest.approx(2 * math.sqrt(2 / 1024), rel=0.01)
    assert tuned.last_layer.weight_v.std().item() == pytest.approx(0.3, rel=0.01)
    assert not released.mlp[0].bias.any() and (released.last_layer.weight_g == 1).all()
    assert released.last_layer.weight_g.requires_grad and not tuned.last_layer.weight_g.requires_grad
    plain = DINOHead(64, 32, n_layers=1, weight_norm=False)
    assert list(plain.state_dict()) == ["mlp.0.weight", "mlp.0.bias", "last_layer.weight"]
    assert plain.prototypes() is plain.last_layer.weight
    for options, message in ((dict(n_layers=0), "n_layers"), (dict(weight_norm=False, freeze_g=True), "freeze_g")):
        with pytest.raises(ValueError, match=message):
            DINOHead(64, 32, **options)
