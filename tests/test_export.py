"""Weights go out to torch.hub, timm, Hugging Face and ONNX: the features there are ours, and they come back whole."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer as TimmViT
from transformers import AutoImageProcessor, AutoModel

from minidino.cli import main
from minidino.config import override, preset
from minidino.curate import semantic_describer
from minidino.learning.teacher import build_backbone
from minidino.model import layouts, released, weights
from minidino.model.layers import swiglu_hidden
from minidino.model.vit import VisionTransformer, build_vit
from minidino.model.weights import backbone_of, export_weights, load_weights
from minidino.runs import Run

ROOT = Path(__file__).resolve().parents[1]
SIZES = [(224, 224), (98, 98), (112, 224)]  # the stored grid of 16 x 16 patches, a smaller and an oblong one
KINDS = [(ffn, registers) for ffn in ("mlp", "swiglu") for registers in (0, 4)]
kinds = pytest.mark.parametrize("ffn, registers", KINDS)


def net(ffn="mlp", registers=0, offset=0.0, antialias=False, **options) -> VisionTransformer:
    """64 wide with heads of 16: no one may guess them. Every parameter counts, mask token and gains too."""
    sizes = dict(width=64, depth=2, heads=4, img_size=224, interpolate_offset=offset, interpolate_antialias=antialias)
    vit = build_vit("vit_tiny", ffn=ffn, num_register_tokens=registers, **{**sizes, **options}).eval()
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return vit.requires_grad_(False)


def official(registers: int) -> dict:
    """How the released models stretch positions."""
    return dict(offset=0.0 if registers else 0.1, antialias=bool(registers))


def sequence(vit: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """All tokens after the norm, in the order of timm and Hugging Face."""
    return vit.norm(vit.forward_features(images).x_prenorm)


def same_weights(a: VisionTransformer, b: VisionTransformer, but: tuple[str, ...] = ()) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[k]) for k, x in ours.items() if k not in but)


# ------------------------------------------------------------------------------------------------- there and back


@kinds
@pytest.mark.parametrize("layout, name", [("hub", "w.pth"), ("hub", "w.safetensors"), ("huggingface", "w")])
def test_round_trips_are_equal_to_the_bit(layout, name, ffn, registers, tmp_path):
    vit = net(ffn, registers, **official(registers))
    path = export_weights(vit, tmp_path / name, layout)
    assert path == tmp_path / name
    assert same_weights(vit, load_weights(net(ffn, registers), path))
    again = backbone_of(path, heads=4 if name == "w.pth" else None)  # the others tell it
    assert same_weights(vit, again) and again.heads == 4
    assert torch.equal(vit(torch.ones(1, 3, 98, 28)), again(torch.ones(1, 3, 98, 28)))
    if path.is_file():
        before = path.read_bytes()
        assert export_weights(vit, path, layout).read_bytes() == before


@kinds
def test_timm_gives_back_all_but_the_mask_token_and_the_sum_of_two_vectors(ffn, registers, tmp_path):
    vit = net(ffn, registers, **official(registers))
    path = export_weights(vit, tmp_path / "w.safetensors", "timm")
    with pytest.warns(UserWarning, match="no mask_token"):
        again = backbone_of(path)
    lost = ("mask_token", "cls_token", "pos_embed") if registers else ("mask_token",)
    assert same_weights(vit, again, but=lost)
    assert torch.equal(vit.pos_embed[:, 1:], again.pos_embed[:, 1:])  # of cls and its place, the sum remains
    assert torch.equal(vit.cls_token + vit.pos_embed[:, :1], again.cls_token + again.pos_embed[:, :1])
    for size in SIZES:  # a file of ours tells how it was stretched, too
        images = torch.randn(2, 3, *size)
        assert torch.equal(sequence(vit, images), sequence(again, images))


def test_a_net_without_layerscale_gets_gains_of_one_where_they_are_needed(tmp_path):
    vit = net(layerscale=None)
    images = torch.randn(1, 3, 56, 56)
    again = backbone_of(export_weights(vit, tmp_path / "w", "huggingface"))
    assert torch.equal(again.blocks[1].ls2.gamma, torch.ones(64)) and torch.equal(vit(images), again(images))
    again = backbone_of(export_weights(vit, tmp_path / "w.safetensors"))
    assert same_weights(vit, again)


def test_what_was_there_is_replaced_and_the_net_is_left_alone(tmp_path):
    vit = net(registers=4).train().bfloat16()
    before = {k: x.clone() for k, x in vit.state_dict().items()}
    for layout, name in (("hub", "w.pth"), ("timm", "w.pth"), ("huggingface", "w"), ("huggingface", "w")):
        export_weights(vit, tmp_path / name, layout, size=98)
    assert vit.training and all(torch.equal(x, before[k]) for k, x in vit.state_dict().items())
    assert json.loads((tmp_path / "w" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        "config.json", "model.safetensors", "preprocessor_config.json", "w.pth"]  # fmt: skip


# --------------------------------------------------------------------------------------------------- Hugging Face


@kinds
def test_transformers_sees_the_same_at_every_size_where_ours_stretches_as_it_does(ffn, registers, tmp_path):
    vit = net(ffn, registers, offset=0.0, antialias=bool(registers))
    path = export_weights(vit, tmp_path / "w", "huggingface")
    theirs, loading = AutoModel.from_pretrained(path, output_loading_info=True)
    assert type(theirs).__name__ == ("Dinov2WithRegistersModel" if registers else "Dinov2Model")
    assert not any(loading.values())  # no key missing, unexpected or of another shape
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        seen = theirs.eval()(images)
        torch.testing.assert_close(seen.last_hidden_state, sequence(vit, images), rtol=0, atol=1e-5)
        torch.testing.assert_close(seen.pooler_output, vit(images), rtol=0, atol=1e-5)


def test_official_positions_agree_with_transformers_off_the_grid_only_when_they_are_baked(tmp_path):
    vit, images = net(**official(0)), torch.randn(2, 3, 98, 98)
    expected = sequence(vit, images)
    as_stored = AutoModel.from_pretrained(export_weights(vit, tmp_path / "a", "huggingface")).eval()
    baked = AutoModel.from_pretrained(export_weights(vit, tmp_path / "b", "huggingface", size=98)).eval()
    assert (as_stored(images).last_hidden_state - expected).abs().max() > 1e-3  # asks by size, ours by scale
    torch.testing.assert_close(baked(images).last_hidden_state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stored, size, edge, crop", [(224, None, 256, 224), (224, 98, 112, 98), (56, None, 64, 56)])
def test_the_processor_makes_what_the_net_wants(stored, size, edge, crop, tmp_path):
    path = export_weights(net(img_size=stored), tmp_path / "w", "huggingface", size)
    processor = AutoImageProcessor.from_pretrained(path)
    assert (processor.size["shortest_edge"], processor.crop_size["height"], processor.resample) == (edge, crop, 3)
    seen = processor(np.full((300, 400, 3), 51, np.uint8), return_tensors="pt")["pixel_values"]
    assert seen.shape == (1, 3, crop, crop)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet
    torch.testing.assert_close(seen[0, :, 5, 7], (0.2 - mean) / std)


# ----------------------------------------------------------------------------------------------------------- timm


def timm_net(ffn: str, registers: int, img_size: int = 224) -> TimmViT:
    gated = dict(mlp_ratio=2 * swiglu_hidden(64) / 64, mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU)
    ffn_options = gated if ffn == "swiglu" else {}
    return TimmViT(
        img_size=img_size, patch_size=14, embed_dim=64, depth=2, num_heads=4, num_classes=0, init_values=1.0,
        reg_tokens=registers, no_embed_class=registers > 0, dynamic_img_size=True, **ffn_options,
    ).eval()  # fmt: skip


@kinds
def test_timm_sees_the_same_at_every_size_where_ours_stretches_antialiased_and_by_size(ffn, registers, tmp_path):
    vit, theirs = net(ffn, registers, offset=0.0, antialias=True), timm_net(ffn, registers)
    path = export_weights(vit, tmp_path / "w.pth", "timm")
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=True)
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(theirs.forward_features(images), sequence(vit, images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("registers", [0, 4])
def test_timm_sees_the_same_at_the_stored_grid_however_ours_stretches_and_elsewhere_when_baked(registers, tmp_path):
    vit, theirs = net("mlp", registers, **official(registers)), timm_net("mlp", registers)
    timm.models.load_checkpoint(theirs, str(export_weights(vit, tmp_path / "w.safetensors", "timm")), strict=True)
    images, small = torch.randn(2, 3, 224, 224), torch.randn(2, 3, 98, 98)
    torch.testing.assert_close(theirs.forward_features(images), sequence(vit, images), rtol=0, atol=1e-5)
    if not registers:  # register models stretch as timm does
        assert (theirs.forward_features(small) - sequence(vit, small)).abs().max() > 1e-3
    theirs = timm_net("mlp", registers, img_size=98)
    theirs.load_state_dict(torch.load(export_weights(vit, tmp_path / "98.pth", "timm", 98), weights_only=True))
    torch.testing.assert_close(theirs.forward_features(small), sequence(vit, small), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, registers", [("vit_small_patch14_dinov2", 0), ("vit_small_patch14_reg4_dinov2", 4)])
def test_the_published_timm_entries_take_the_file(name, registers, tmp_path):
    vit = net("mlp", registers, **official(registers))
    path = export_weights(vit, tmp_path / "w.safetensors", "timm")
    smaller = dict(img_size=224, embed_dim=64, depth=2, num_heads=4)
    theirs = timm.create_model(name, num_classes=0, checkpoint_path=str(path), **smaller).eval()
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(theirs.forward_features(images), sequence(vit, images), rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- ONNX


def check_onnx(path: Path, vit: VisionTransformer, size: tuple[int, int]) -> None:
    runtime = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = ["x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens"]
    names = [name for name in names if vit.num_register_tokens or name != "x_norm_regtokens"]
    assert [output.name for output in runtime.get_outputs()] == names
    for many in (1, 3):
        images = torch.randn(many, 3, *size)
        tokens = vit.forward_features(images)
        for name, seen in zip(names, runtime.run(None, {"images": images.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(seen), getattr(tokens, name), rtol=0, atol=1e-4)


def test_onnx_sees_the_same_in_an_oblong_window_and_any_batch(tmp_path):
    vit = net("swiglu", 4, **official(4)).train()
    path = export_weights(vit, tmp_path / "w.onnx", "onnx", size=(112, 224))
    assert vit.training and [p.name for p in tmp_path.iterdir()] == ["w.onnx"]
    check_onnx(path, vit.eval(), (112, 224))
    with pytest.raises(ValueError, match="ONNX graph, which is for running"):
        load_weights(vit, path)


def test_the_graph_for_onnx_is_the_backbone(tmp_path):
    for (ffn, registers), size in zip(KINDS, [*SIZES, (14, 14)], strict=True):
        vit, images = net(ffn, registers, **official(registers)), torch.randn(2, 3, *size)
        tokens = vit.forward_features(images)
        expected = [tokens.x_norm_clstoken, tokens.x_norm_regtokens, tokens.x_norm_patchtokens]
        graph = weights._Graph(vit, (size[0] // 14, size[1] // 14))
        for ours, theirs in zip(graph(images), expected if registers else expected[::2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("limit, two_files", [(weights.ONE_FILE, False), (0, True)])
def test_weights_that_protobuf_cannot_hold_go_to_a_second_file(limit, two_files, tmp_path, monkeypatch):
    class Program:
        def save(self, path, external_data):
            assert external_data == two_files
            path.write_bytes(b"graph")

    monkeypatch.setattr(weights, "ONE_FILE", limit)
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: Program())
    path = export_weights(net(), tmp_path / "new" / "w.onnx", "onnx")
    assert path.read_bytes() == b"graph"


def test_without_onnx_the_way_to_get_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match=r"needs onnx and onnxscript: pip install 'minidino\[export\]'"):
        export_weights(net(), tmp_path / "w.onnx", "onnx")


# ------------------------------------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize(
    "name, layout, size, words",
    [
        ("w.pth", "torch", None, "unknown layout 'torch': expected one of hub, timm, huggingface, onnx"),
        ("w.bin", "hub", None, r"goes into a .safetensors or .pth file, got .*w\.bin"),
        ("w.pth", "onnx", None, r"goes into a .onnx file"),
        ("taken", "huggingface", None, "goes into a folder"),
        ("w.pth", "hub", 100, "multiples of patch_size 14 px, got 100"),
        ("w.pth", "hub", (14, 14, 14), "one or two multiples"),
        ("w.pth", "timm", 0, "one or two multiples"),
        ("w.pth", "timm", (98, 112), r"stores positions of a square, got size \(98, 112\)"),
    ],
)
def test_what_cannot_be_written_is_said(name, layout, size, words, tmp_path):
    (tmp_path / "taken").write_text("a letter")
    with pytest.raises(ValueError, match=words):
        export_weights(net(), tmp_path / name, layout, size)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# --------------------------------------------------------------------------------- the command line, and torch.hub


@pytest.fixture
def finished(tmp_path) -> tuple[Path, VisionTransformer]:
    """A run folder with its weights, and the backbone that they belong to."""
    changes = ["vit.width=48", "vit.depth=1", "vit.heads=2", "crops.global_size=32", "crops.local_size=16"]
    config = override(preset("scenes-cpu"), changes)
    run = Run.create(tmp_path / "run", config, torch.device("cpu"))
    vit = build_backbone(config).eval()
    export_weights(vit, run.folder / "weights.safetensors")
    return run.folder, vit


def test_export_of_a_run_and_of_a_file(finished, tmp_path, capsys):
    folder, vit = finished
    assert main(["export", str(folder), "--layout", "huggingface", "--out", str(tmp_path / "hf")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "hf")
    assert main(["export", str(tmp_path / "hf"), "--out", str(tmp_path / "w.pth")]) == 0
    assert same_weights(vit, load_weights(build_backbone(Run(folder).config()), tmp_path / "w.pth"))
    side = 4 * vit.patch_size
    command = ["export", str(folder), "--layout", "onnx", "--size", str(side), str(2 * side)]
    assert main([*command, "--out", str(tmp_path / "w.onnx")]) == 0
    check_onnx(tmp_path / "w.onnx", vit, (side, 2 * side))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere"], "no weights at nowhere"),
        (["run", "--layout", "timm", "--size", "33"], "multiples of patch_size"),
        (["w.pth"], "a width of 48 is no multiple of 64"),
        (["run", "--layout", "huggingface", "--out", "run"], "run has a config.json of something else"),
    ],
)
def test_an_export_that_cannot_be_is_one_line(arguments, words, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_weights(finished[1], "w.pth")
    assert main(["export", "--out", "out.pth", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("minidino export: ") and words in told and len(told.splitlines()) == 1
    assert main(["export", "w.pth", "--heads", "2", "--out", "out.pth"]) == 0


def test_torch_hub_finds_the_official_names_and_runs(finished, tmp_path):
    folder, vit = finished
    there = runpy.run_path(str(ROOT / "hubconf.py"))
    assert {name for name, x in there.items() if callable(x) and name[0] != "_"} == {*released.RELEASED, "run"}
    names = [re.match(r"[\w-]+", line)[0] for line in requires("minidino")]
    needed = {{"pillow": "PIL", "faiss-cpu": "faiss"}.get(name, name) for name in names}
    assert set(there["dependencies"]) <= needed
    absent = f"import sys; sys.modules |= dict.fromkeys({needed - set(there['dependencies'])})"  # as if not installed
    code = f"{absent}; import torch; torch.hub.load({str(ROOT)!r}, 'run', {str(folder)!r}, source='local')"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    again = torch.hub.load(str(ROOT), "run", folder, source="local")
    assert same_weights(vit, again) and not again.training
    (tmp_path / "cut").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "cut")
    with pytest.raises(FileNotFoundError, match="finish it with train --resume"):
        torch.hub.load(str(ROOT), "run", tmp_path / "cut", source="local")
    smaller = dict(width=64, depth=1, heads=4)
    vit = net("mlp", 4, depth=1, img_size=518)
    export_weights(vit, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    again = torch.hub.load(str(ROOT), "dinov2_vits14_reg", source="local", cache=tmp_path, **smaller)
    assert same_weights(vit, again) and again.interpolate_antialias and not again.training
    fresh = torch.hub.load(str(ROOT), "dinov2_vitb14", source="local", pretrained=False, **smaller)
    assert fresh.interpolate_offset == 0.1 and fresh.num_register_tokens == 0


def test_layouts_there_and_back_touch_nothing():
    state = net("swiglu", 4).state_dict()
    before = {k: x.clone() for k, x in state.items()}
    for away in (layouts.to_hugging_face_layout, layouts.to_timm_layout):
        back = layouts.to_hub_layout(away(state))
        assert torch.equal(back["blocks.1.mlp.w12.weight"], before["blocks.1.mlp.w12.weight"])
    assert state.keys() == before.keys() and all(torch.equal(x, state[k]) for k, x in before.items())


def test_a_hugging_face_folder_can_be_the_semantic_network_of_a_curation(tmp_path):
    vit = build_vit("vit_tiny", width=32, depth=1, heads=2, patch_size=8, img_size=32)
    described = semantic_describer(export_weights(vit, tmp_path / "hf", "huggingface"))
    assert (described.kind, described.size) == ("semantic", 224)
