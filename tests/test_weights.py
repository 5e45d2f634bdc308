"""Every layout lands in the same backbone, and what does not fit is told in words."""

import argparse
import hashlib
import io
import json
import os
import re
import sys

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer as TimmViT
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DPTConfig,
    DPTForDepthEstimation,
)

from minidino.config import override, preset
from minidino.learning.teacher import build_backbone
from minidino.learning.train import start
from minidino.model import released
from minidino.model.layouts import to_hugging_face_layout, to_timm_layout
from minidino.model.vit import build_vit, interpolate_pos_embed
from minidino.model.weights import backbone_of, export_weights, load_weights
from minidino.runs import Run

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


def prefixed(prefix):
    """As wrappers of torch save it: torch.compile, DDP, FSDP; the head beside it is left behind."""
    return lambda state: {f"{prefix}{k}": x for k, x in state.items()} | {"module.fc.weight": 0, "epoch": 3}


LAYOUTS = {"hub": dict, "chunked": chunked, "exported": exported, "training": training}
LAYOUTS |= {prefix: prefixed(prefix) for prefix in ("_orig_mod.", "module.", "module.backbone.", "module._orig_mod.",
            "_fsdp_wrapped_module.", "teacher.backbone._orig_mod.")}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, dict(num_register_tokens=4, ffn="swiglu", layerscale=None)])
def test_official_layouts(layout, options, tmp_path):
    source, target = tiny(0, **options), tiny(1, **options)
    torch.save(LAYOUTS[layout](source.state_dict()), tmp_path / "w.pth")
    assert not torch.allclose(target(IMAGES), source(IMAGES))
    assert load_weights(target, tmp_path / "w.pth") is target
    assert all(torch.equal(x, target.state_dict()[k]) for k, x in source.state_dict().items())


def test_a_checkpoint_of_our_own_gives_the_teacher(tmp_path):
    changes = ["vit.width=48", "vit.depth=2", "vit.heads=2", "vit.interpolate_offset=0", "crops.global_size=32",
               "crops.local_size=16", "heads.hidden_dim=8", "heads.bottleneck_dim=8",
               "heads.n_prototypes=16"]  # fmt: skip
    config = override(preset("scenes-cpu"), changes)
    run = Run.create(tmp_path / "run", config, torch.device("cpu"))
    state = start(config, torch.device("cpu"))
    with torch.no_grad():
        for p in state.student.parameters():
            p.add_(1)
    path = run.save(0, state.save(), keep=1)
    teacher = state.teacher.backbone.state_dict()
    for vit in (load_weights(build_backbone(config), path), backbone_of(path)):  # its heads stand in config.json
        assert vit.heads == 2 and vit.interpolate_offset == 0.0
        assert all(torch.equal(x, teacher[key]) for key, x in vit.state_dict().items())


def test_safetensors_round_trip(tmp_path):
    source = tiny(0)
    path = export_weights(source, tmp_path / "weights.safetensors")
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


SIZE = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=3, image_size=24, patch_size=8)


@pytest.mark.parametrize("registers", [0, 4])
def test_a_backbone_inside_a_model_of_hugging_face_is_found(registers, tmp_path):
    if registers:
        theirs = Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**SIZE, num_register_tokens=4))
    else:
        theirs = Dinov2ForImageClassification(Dinov2Config(**SIZE))
    theirs.eval().save_pretrained(tmp_path)
    inner = theirs.dinov2_with_registers if registers else theirs.dinov2
    vit = backbone_of(tmp_path).eval()
    assert vit.heads == 3
    torch.testing.assert_close(vit(IMAGES), inner(IMAGES).pooler_output, rtol=0, atol=1e-5)


def test_the_heads_of_a_backbone_under_a_decoder_are_its_own(tmp_path):
    config = DPTConfig(
        backbone_config=Dinov2Config(**SIZE, out_indices=[1, 2, 3, 4], reshape_hidden_states=False), hidden_size=48,
        neck_hidden_sizes=[4, 4, 4, 4], reassemble_factors=[4, 2, 1, 0.5], fusion_hidden_size=4,
    )  # fmt: skip
    theirs = DPTForDepthEstimation(config).eval()
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_attention_heads"] == 12  # of no backbone
    vit = backbone_of(tmp_path)
    assert vit.heads == 3
    expected = theirs.backbone(IMAGES, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(vit.forward_features(IMAGES).x_prenorm, expected, rtol=0, atol=1e-5)


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
    images = torch.randn(2, 3, 40, 40)
    for stretch in (dict(), dict(interpolate_offset=0.0, interpolate_antialias=True)):
        source, target = tiny(0, **stretch), tiny(1, img_size=40, **stretch)
        with pytest.warns(UserWarning, match="resized from 3 x 3 to 5 x 5"):
            load_weights(target, source.state_dict())
        how = source.interpolate_offset, source.interpolate_antialias
        assert torch.equal(target.pos_embed, interpolate_pos_embed(source.pos_embed, (5, 5), *how))
        assert torch.equal(target(images), source(images))  # as it is stretched at run time


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


FOREIGN = {"hub": dict, "training": training, "timm": to_timm_layout, "huggingface": to_hugging_face_layout}


@pytest.mark.filterwarnings("ignore:the weights have no mask_token")
@pytest.mark.parametrize("layout", FOREIGN)
def test_missing_and_unexpected_keys_are_named_as_here(layout):
    state = tiny(0).state_dict()
    del state["blocks.2.norm1.bias"]
    with pytest.raises(ValueError, match="1 missing: blocks.2.norm1.bias\n  1 not expected: head.weight\nbuild"):
        load_weights(tiny(1), FOREIGN[layout](state | {"head.weight": torch.zeros(1)}))


@pytest.mark.filterwarnings("ignore:the weights have no mask_token")
@pytest.mark.parametrize("layout", FOREIGN)
def test_another_patch_size_is_refused_in_words(layout):
    words = "patch_size: weights have 8, backbone has 12\n  1 of another shape: patch_embed.proj.weight"
    with pytest.raises(ValueError, match=words):
        load_weights(tiny(1, patch_size=12, img_size=36), FOREIGN[layout](tiny(0).state_dict()))


def test_what_is_no_backbone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got keys fc.weight"):
        load_weights(tiny(), {"fc.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"positions of a square grid, got \(1, 8, 48\)"):
        load_weights(tiny(), tiny().state_dict() | {"pos_embed": torch.zeros(1, 8, 48)})
    for path in (tmp_path, tmp_path / "absent.pth", "dinov2_vitx14"):
        with pytest.raises(FileNotFoundError, match="expected a .pth.* or one of dinov2_vits14, "):
            load_weights(tiny(), path)


class Evil:
    """What a pickle can do to whoever reads it."""

    def __reduce__(self):
        return os.mkdir, ("was-here",)


def test_a_file_that_wants_to_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(tiny().state_dict() | {"extra": Evil()}, "evil.pth")
    with pytest.raises(ValueError, match="^evil.pth is refused: it holds more than tensors, to be made by .*mkdir"):
        load_weights(tiny(), "evil.pth")
    assert not os.path.exists("was-here")
    torch.save({"model": tiny().state_dict(), "args": argparse.Namespace(lr=1)}, "old.pth")
    with pytest.raises(ValueError, match="to be made by argparse.Namespace, .* save its state dict alone"):
        load_weights(tiny(), "old.pth")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
def test_a_path_that_safetensors_does_not_open_is_not_called_damaged(tmp_path):
    path = export_weights(tiny(), tmp_path / os.fsdecode(b"caf\xe9") / "w.safetensors")
    with pytest.raises(ValueError, match="cannot be opened by safetensors: rename it"):
        load_weights(tiny(), path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>log in</html>", b"PK\x03\x04 and then nothing", bytes(64)])
def test_what_is_damaged_or_something_else_is_one_line(suffix, content, tmp_path):
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as weights, it is damaged or something else: ") as caught:
        load_weights(tiny(), tmp_path / f"w{suffix}")
    assert len(str(caught.value).splitlines()) == 1 and "weights_only" not in str(caught.value)


def test_a_file_cut_short_and_a_bare_tensor(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "w.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged"):
        load_weights(tiny(), tmp_path / "cut.pth")
    torch.save(torch.zeros(3), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="expected tensors by name, got a Tensor"):
        load_weights(tiny(), tmp_path / "bare.pth")


# ------------------------------------------------------------------------------------- a backbone from its weights


@pytest.mark.parametrize("options", [{}, dict(ffn="swiglu", num_register_tokens=2, layerscale=None, in_chans=1)])
def test_a_backbone_of_any_width_tells_its_own_sizes(options, tmp_path):
    source = tiny(0, interpolate_offset=0.0, **options)
    again = backbone_of(export_weights(source, tmp_path / "w.safetensors"))
    assert again.heads == 3 and again.interpolate_offset == 0.0 and not again.interpolate_antialias
    assert all(torch.equal(x, again.state_dict()[k]) for k, x in source.state_dict().items())
    assert len(again.state_dict()) == len(source.state_dict())
    images = torch.randn(2, source.patch_embed.proj.in_channels, 16, 32)
    assert torch.equal(source(images), again.eval()(images))


def test_heads_are_given_told_or_64_wide_and_else_asked_for(tmp_path):
    state = tiny(0).state_dict()
    with pytest.raises(ValueError, match="width of 48 is no multiple of 64 .* give heads="):
        backbone_of(state)
    assert backbone_of(state, heads=3).heads == 3
    with pytest.warns(UserWarning, match="128 wide: 2, 64 wide each, assumed"):
        assert backbone_of(tiny(0, width=128, heads=4, depth=1).state_dict()).heads == 2
    small = tiny(0, width=384, heads=6, depth=1)
    assert backbone_of(small.state_dict()).heads == 6  # published: nothing to warn of
    assert backbone_of(export_weights(small, tmp_path / "w.safetensors"), heads=12).heads == 12
    vit = backbone_of(state, 3, interpolate_antialias=True, attention="reference")
    assert vit.interpolate_antialias and vit.blocks[0].attn.impl == "reference"
    with pytest.raises(ValueError, match="got keys blocks"):
        backbone_of({"blocks.0.norm1.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    "content",
    [b'{"hidden_size": 192, "num_attention_heads": 3}', b'{"vit": {"name": "vit_small"}}',
     b'{"num_attention_heads": 6}', b'{"vit": {"name": ["vit_small"]}}', b"[1]", b"null", b"{", b"\xff\xfe{"],
)  # fmt: skip
def test_a_config_of_something_else_is_left_aside_and_that_is_said(content, tmp_path):
    torch.save(tiny(0, width=768, heads=12, depth=1).state_dict(), tmp_path / "w.pth")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.warns(UserWarning, match="config.json tells of no backbone 768 wide"):
        vit = backbone_of(tmp_path / "w.pth")
    assert vit.heads == 12 and vit.interpolate_offset == 0.1


# ---------------------------------------------------------------------------------------------- official, by name

PARAMETERS = {"vits14": 22_056_576, "vitb14": 86_580_480, "vitl14": 304_368_640, "vitg14": 1_136_480_768}


@pytest.mark.parametrize("name", released.RELEASED)
def test_official_names_have_official_sizes(name):
    with torch.device("meta"):
        vit = build_vit(**released.RELEASED[name])
    registers = 4 * vit.width if name.endswith("_reg") else 0
    assert sum(p.numel() for p in vit.parameters()) == PARAMETERS[name[7:13]] + registers
    assert vit.pos_embed.shape[1] == 1 + 37**2 and vit.interpolate_antialias == (registers > 0)


@pytest.fixture
def server(tmp_path):
    """A folder laid out like the official server, with two nets on it that are much smaller."""
    for name, registers in (("dinov2_vits14", 0), ("dinov2_vits14_reg4", 4)):
        folder = tmp_path / "server" / "dinov2_vits14"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(tiny(7, num_register_tokens=registers).state_dict(), folder / f"{name}_pretrain.pth")
    return tmp_path / "server"


@pytest.mark.parametrize("name, registers", [("dinov2_vits14", 0), ("dinov2_vits14_reg", 4)])
def test_a_name_is_downloaded_once_and_checked_ever_after(name, registers, server, tmp_path, monkeypatch):
    path = released.fetch(name, tmp_path / "cache", server.as_uri())
    assert path.name == ("dinov2_vits14_reg4_pretrain.pth" if registers else "dinov2_vits14_pretrain.pth")
    assert path.read_bytes() == (server / "dinov2_vits14" / path.name).read_bytes()
    record = tmp_path / "cache" / f"{path.name}.sha256"
    assert record.read_text() == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    assert sorted(tmp_path.joinpath("cache").iterdir()) == [path, record]

    monkeypatch.setattr(released, "urlopen", None)  # nobody asks again
    source = tiny(7, num_register_tokens=registers)
    vit = load_weights(tiny(1, num_register_tokens=registers), name, cache=tmp_path / "cache")
    assert torch.equal(vit(IMAGES), source(IMAGES))
    vit = backbone_of(name, heads=3, cache=tmp_path / "cache")
    assert all(torch.equal(x, vit.state_dict()[k]) for k, x in source.state_dict().items())

    torch.save(tiny(8, num_register_tokens=registers).state_dict(), path)
    with pytest.raises(ValueError, match="has changed: expected SHA-256 .* delete the file to download it again"):
        load_weights(tiny(1, num_register_tokens=registers), name, cache=tmp_path / "cache")


def test_a_file_put_there_by_hand_needs_no_internet(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 5}')  # of something else
    cache = tmp_path / ".cache" / "minidino" / "weights"
    cache.mkdir(parents=True)
    (server / "dinov2_vits14" / "dinov2_vits14_pretrain.pth").rename(cache / "dinov2_vits14_pretrain.pth")
    monkeypatch.setattr(released, "urlopen", None)
    assert backbone_of("dinov2_vits14", heads=3).interpolate_offset == 0.1
    assert (cache / "dinov2_vits14_pretrain.pth.sha256").exists()


class Answer(io.BytesIO):
    """What a server sends; `headers` says how much it means to send."""

    def __init__(self, content, length):
        super().__init__(content)
        self.headers = {"Content-Length": str(length)} if length else {}


@pytest.mark.parametrize(
    "answer, words",
    [
        (OSError("no route to host"), "no route to host"),
        (Answer(b"PK" + bytes(10), 99), "the connection ended after 12 of 99 bytes"),
        (Answer(b"", 0), "the connection ended after 0 of 0 bytes"),
        (Answer(b"<html>log in", 0), "no file of torch.save: b'<html>log in'"),
    ],
)
def test_a_failed_download_leaves_nothing_and_says_what_to_do(answer, words, tmp_path, monkeypatch):
    def urlopen(url, timeout):
        assert timeout > 0 and url == f"{released.BASE_URL}/dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth"
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(released, "urlopen", urlopen)
    with pytest.raises(OSError, match="^cannot download https://dl.fbaipublicfiles.com/dinov2/") as caught:
        load_weights(tiny(), "dinov2_vitg14_reg", cache=tmp_path / "cache")
    told = str(caught.value)
    assert words in told and told.endswith(f"put it at {tmp_path / 'cache' / 'dinov2_vitg14_reg4_pretrain.pth'}")
    assert list(tmp_path.rglob("*.*")) == []
    with pytest.raises(ValueError, match="no released weights 'dinov2_vitx14': expected one of dinov2_vits14"):
        released.fetch("dinov2_vitx14")


def test_downloads_lie_where_the_system_keeps_its_copies(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there = tmp_path / "cache" / "minidino" / "weights" / "dinov2_vits14_pretrain.pth"
    there.parent.mkdir(parents=True)
    there.write_bytes(b"PK by hand")
    assert released.fetch("dinov2_vits14", base_url="file:///nowhere") == there
