"""Weights into a backbone and out of it: files, folders, names. How others call the same tensors: `layouts.py`.

    load_weights(vit, source)       into a backbone that is there
    backbone_of(source)             a backbone of the sizes that the weights tell
    export_weights(vit, path, ...)  for torch.hub, timm, Hugging Face, ONNX
"""

import copy
import importlib.util
import json
import math
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minidino.model.layouts import (
    State,
    describe,
    hugging_face_config,
    to_hub_layout,
    to_hugging_face_layout,
    to_timm_layout,
)
from minidino.model.released import RELEASED, fetch
from minidino.model.vit import SIZES, VisionTransformer, build_vit, interpolate_pos_embed
from minidino.runs import atomic_path, disk_errors, named_errors, write_atomically

Source = str | Path | Mapping
FILES = (".safetensors", ".pth")
SUFFIXES = {"hub": FILES, "timm": FILES, "huggingface": None, "onnx": (".onnx",)}  # None: a folder
STRETCH = ("interpolate_offset", "interpolate_antialias")
ONE_FILE = 2**31 - 2**24  # bytes; what is larger, protobuf cannot hold


# ---------------------------------------------------------------------------------------------------------------- in


def load_weights(vit: VisionTransformer, source: Source, cache: str | Path | None = None) -> VisionTransformer:
    """Fill a backbone with weights from any known layout, all of them or none.

    The outputs are those of the model the weights come from, up to how it stretches positions to another grid: official
    models without registers use interpolate_offset=0.1; Hugging Face (without registers) asks by size, offset 0.0; timm
    and all register models add interpolate_antialias=True. Positions stored for another grid than that of the backbone
    are stretched once, here, as the backbone would stretch them while it runs.

    Args:
        vit: a backbone of the right sizes; it is changed in place.
        source: a .pth, .pt or .safetensors file, a Hugging Face folder, the name of a released backbone such as
            "dinov2_vitb14_reg" (downloaded once), or a state dict. A path that exists comes before a name.
        cache: the folder of downloads; None is that of `released.fetch`.
    Returns:
        The same backbone.
    Raises:
        FileNotFoundError: no such file or name, or a folder without model.safetensors.
        OSError: a name that cannot be downloaded; says where to put its file by hand.
        ValueError: the weights are for another backbone, or for none, or damaged, or want to run code; says what.
    Warns:
        UserWarning: positions were resized to another patch grid, or the mask token is missing (timm drops it; it
            becomes zeros, and matters for masked images only).
    """
    state = _backbone_state(_located(source, cache))
    if "mask_token" not in state:
        warnings.warn("the weights have no mask_token (timm drops it): set to zeros", stacklevel=2)
        state["mask_token"] = torch.zeros_like(vit.mask_token, device="cpu")
    stored, wanted = (math.isqrt(pos.shape[1] - 1) for pos in (state["pos_embed"], vit.pos_embed))
    if stored != wanted:
        said = f"position embedding resized from {stored} x {stored} to {wanted} x {wanted} patches"
        warnings.warn(said, stacklevel=2)
        how = vit.interpolate_offset, vit.interpolate_antialias
        state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], (wanted, wanted), *how)
    _check_fit(vit.state_dict(), state)
    vit.load_state_dict(state)
    return vit


def backbone_of(
    source: Source, heads: int | None = None, cache: str | Path | None = None, **options
) -> VisionTransformer:
    """A backbone of the sizes that the weights themselves tell, filled with them.

    No tensor tells the number of heads. It is, in this order: the argument; what a .safetensors file of this package
    says of itself; the config.json beside the file (Hugging Face, or a run of this package), where it tells the width
    of these weights; one for every 64 channels, as published.

    Args:
        source, cache: as for `load_weights`.
        heads: h.
        options: of `build_vit`, such as attention. Without interpolate_...: what a file of this package says; else as
            published in the hub, 0.1 and False, or 0.0 and True with registers.
    Raises:
        FileNotFoundError, OSError: as `load_weights`.
        ValueError: as `load_weights`; or the width is no multiple of 64 and nothing tells the heads.
    Warns:
        UserWarning: the heads were guessed, at a width that was never published; the config.json beside the file is of
            something else; or as `load_weights`.
    """
    source = _located(source, cache)
    state = _backbone_state(source)
    sizes = describe(state)
    told = {} if isinstance(source, Mapping) else _told(source, sizes["width"])
    registers, side = sizes["registers"], math.isqrt(state["pos_embed"].shape[1] - 1)
    published = {"interpolate_offset": 0.0 if registers else 0.1, "interpolate_antialias": bool(registers)}
    told["heads"] = heads or told.get("heads") or _guess_heads(sizes["width"])
    vit = build_vit(
        "vit_tiny", width=sizes["width"], depth=sizes["depth"], ffn=sizes["ffn"], in_chans=sizes["in_chans"],
        patch_size=sizes["patch_size"], img_size=side * sizes["patch_size"], num_register_tokens=registers,
        layerscale=1.0 if sizes["layerscale"] else None, **{**published, **told, **options},
    )  # fmt: skip
    return load_weights(vit, state)


def read_state(path: Path) -> Mapping:
    """Read tensors from a file or a Hugging Face folder; pickled code is never run.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is no file of tensors, damaged, or holds more than tensors; says what.
    """
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        kinds = f"a .pth, .pt or .safetensors file, a Hugging Face folder, or one of {', '.join(RELEASED)}"
        raise FileNotFoundError(f"no weights at {path}: expected {kinds}")
    if path.suffix == ".onnx":
        raise ValueError(f"{path} is an ONNX graph, which is for running; load the weights it was made from")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # damaged files fail in many ways, a short .pth as OSError without a name
        raise ValueError(_why_unreadable(path, error)) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected tensors by name, got a {type(state).__name__}")
    return state


def _why_unreadable(path: Path, error: Exception) -> str:
    """One line of words for the errors of torch and safetensors."""
    wanted = re.search(r"(?:GLOBAL|unsafe class|unrecognized function) ([\w.]+)", str(error))
    if wanted:
        return (
            f"{path} is refused: it holds more than tensors, to be made by {wanted[1]}, and what makes objects can run "
            "any code; where you trust it, save its state dict alone and load that"
        )
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "weights_only" in said:  # torch advises to run whatever it is
        said = "not written by torch.save"
    if "is not valid UTF-8" in said:  # the path, not the file
        return f"{path} cannot be opened by safetensors: rename it, or a folder above it, to a name that is UTF-8"
    return f"{path} cannot be read as weights, it is damaged or something else: {said}"


def _located(source: Source, cache: str | Path | None) -> Path | Mapping:
    """Where the weights of whatever names them are; a name is downloaded."""
    if isinstance(source, nn.Module):
        raise ValueError(f"expected weights, got a {type(source).__name__}: give its state_dict()")
    if isinstance(source, Mapping):
        return source
    is_name = str(source) in RELEASED and not Path(source).exists()
    return fetch(str(source), cache) if is_name else Path(source)


def _backbone_state(source: Path | Mapping) -> State:
    """Tensors by official names, when they are those of a Vision Transformer at all."""
    source = source if isinstance(source, Mapping) else read_state(source)
    state = to_hub_layout(source)
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
        wanted = "cls_token, pos_embed and patch_embed.proj.weight"
        got = f"keys {_few(state)}" if state else f"no tensors by name, but {_few(source) or 'nothing'}"
        raise ValueError(f"expected Vision Transformer weights with {wanted}, got {got}")
    shape = tuple(state["pos_embed"].shape)
    if len(shape) != 3 or shape[1] < 2 or math.isqrt(shape[1] - 1) ** 2 != shape[1] - 1:
        raise ValueError(f"expected a pos_embed of (1, 1 + M*M, D), positions of a square grid, got {shape}")
    return state


def _told(path: Path, width: int) -> dict[str, int | float | bool | None]:
    """What a file says of itself, or the config.json beside it of a backbone this wide, in the words of build_vit; {}
    when nothing does."""
    path = path / "model.safetensors" if path.is_dir() else path
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
        if "build_vit" in said:
            return json.loads(said["build_vit"])
    home = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    config = home / "config.json"
    if not config.is_file():
        return {}
    try:
        said = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:  # no JSON, or no text
        said = None
    said = said if isinstance(said, dict) else {}
    for part in ("vit", "backbone_config"):  # of a run of this package; of a Hugging Face model around a backbone
        said = said[part] if isinstance(said.get(part), dict) else said
    named_width, _, named_heads, _ = SIZES.get(str(said.get("name")), (None,) * 4)
    if (said.get("width") or said.get("hidden_size") or named_width) != width:
        warnings.warn(f"{config} tells of no backbone {width} wide, as these weights are: left aside", stacklevel=3)
        return {}
    heads = said.get("heads") or said.get("num_attention_heads") or named_heads
    return {"heads": heads, **{key: said[key] for key in STRETCH if key in said}}


def _guess_heads(width: int) -> int:
    """Heads 64 wide, as published."""
    how = "give heads=, or have it told by: minidino export WEIGHTS --heads H --layout huggingface --out FOLDER"
    if width % 64:
        raise ValueError(f"a width of {width} is no multiple of 64 and nothing tells the number of heads: {how}")
    if width not in {size[0] for size in SIZES.values()}:
        said = f"nothing tells the number of heads of this backbone {width} wide: {width // 64}, 64 wide each, assumed"
        warnings.warn(f"{said}; where that is wrong {how}", stacklevel=3)
    return width // 64


def _check_fit(ours: Mapping[str, Tensor], state: State) -> None:
    """Weights and backbone have the same names and shapes, or the difference is told in words."""
    missing, unexpected = ours.keys() - state.keys(), state.keys() - ours.keys()
    reshaped = {key for key in ours.keys() & state.keys() if ours[key].shape != state[key].shape}
    if not (missing or unexpected or reshaped):
        return
    theirs, mine = describe(state), describe(ours)
    lines = ["the weights do not fit this backbone:"]
    for what in mine:
        if theirs[what] != mine[what]:
            lines.append(f"  {what}: weights have {theirs[what]}, backbone has {mine[what]}")
    for kind, keys in (("missing", missing), ("not expected", unexpected), ("of another shape", reshaped)):
        if keys:
            lines.append(f"  {len(keys)} {kind}: {_few(keys)}")
    advice = "build the backbone with the sizes of the weights (see build_vit)"
    if not (missing or reshaped) and theirs == mine:
        advice = "leave out what is no part of a backbone, such as the head of a classifier"
    raise ValueError("\n".join([*lines, advice]))


def _few(keys: Collection[str]) -> str:
    """The first names of many."""
    names = sorted(map(str, keys))
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


# --------------------------------------------------------------------------------------------------------------- out


def export_weights(
    vit: VisionTransformer, path: str | Path, layout: str = "hub", size: int | Sequence[int] | None = None
) -> Path:
    """Write a backbone for others to use.

        hub          official names, for the official code with strict=True, and for this package
        timm         for timm's VisionTransformer with strict=True
        huggingface  a folder for .from_pretrained of Dinov2Model or Dinov2WithRegistersModel, or AutoModel, and of
                     AutoImageProcessor
        onnx         a graph for any runtime: images (B, 3, H, W), normalised -> x_norm_clstoken (B, D),
                     x_norm_regtokens (B, R, D) where there are registers, x_norm_patchtokens (B, N, D); any B

    Features are those of this backbone at images of the stored patch grid. Elsewhere each stretches the positions in
    its own way, and differs a little where ours is another: official code as it was built, Hugging Face
    interpolate_offset=0.0, antialiased with registers only; timm 0.0 and antialiased always (and only with
    dynamic_img_size=True). `size` does the stretching here, once, our way: then all agree at that size.

    timm keeps no mask_token, and with registers the sum of cls_token and its position only: features are the same to
    the bit, the three parameters cannot be had back. Hugging Face keeps all, and adds gains of one where there is no
    LayerScale.

    Args:
        path: a .pth or .safetensors file (hub, timm), a folder (huggingface), an .onnx file; an older export there is
            replaced.
        layout: "hub", "timm", "huggingface" or "onnx".
        size: px of the images, S or (H, W); None keeps the stored grid. Only ONNX takes oblong ones, and accepts no
            other size afterwards. For Hugging Face also the crop that the processor takes out of a shorter edge of
            8/7 of it; without size 224 of 256, as published, or less where the stored grid is smaller.
    Returns:
        The path.
    Raises:
        ValueError: an unknown layout, a path or a size that does not suit it.
        NotImplementedError: ONNX needs the extra: pip install 'minidino[export]'.
    Source: the names are those of timm (aa4b585), transformers and official dinov2/models/vision_transformer.py.
    Differs: a timm model for a SwiGLU of a width that was not published needs mlp_ratio = 2 * hidden / width.
    """
    path = Path(path)
    grid = _check_request(vit, path, layout, size)
    if layout == "onnx":
        return _write_onnx(vit, path, grid)
    state = {name: x.detach().cpu().contiguous().clone() for name, x in vit.state_dict().items()}  # tied ones, too
    how = vit.interpolate_offset, vit.interpolate_antialias
    state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], grid, *how)
    said = {key: getattr(vit, key) for key in ("heads", *STRETCH)}
    if layout == "huggingface":
        return _write_hugging_face(state, path, said, None if size is None else grid[0] * vit.patch_size)
    write_state(to_timm_layout(state) if layout == "timm" else state, path, {"build_vit": json.dumps(said)})
    return path


def _check_request(
    vit: VisionTransformer, path: Path, layout: str, size: int | Sequence[int] | None
) -> tuple[int, int]:
    """The patch grid (Hp, Wp) that is asked for, or what is wrong with the request."""
    if layout not in SUFFIXES:
        raise ValueError(f"unknown layout {layout!r}: expected one of {', '.join(SUFFIXES)}")
    suffixes = SUFFIXES[layout]
    wrong = path.is_file() if suffixes is None else path.suffix not in suffixes or path.is_dir()
    if wrong:
        kind = "a folder" if suffixes is None else f"a {' or '.join(suffixes)} file"
        raise ValueError(f"layout {layout!r} goes into {kind}, got {path}")
    if suffixes is None and (path / "config.json").exists() and not (path / "model.safetensors").exists():
        raise ValueError(f"{path} has a config.json of something else, such as a run; choose another folder")
    side = math.isqrt(vit.pos_embed.shape[1] - 1) * vit.patch_size
    sides = [side] if size is None else [size] if isinstance(size, int) else list(size)
    if len(sides) not in (1, 2) or any(px < 1 or px % vit.patch_size for px in sides):
        raise ValueError(f"size: expected one or two multiples of patch_size {vit.patch_size} px, got {size}")
    grid = sides[0] // vit.patch_size, sides[-1] // vit.patch_size
    if layout != "onnx" and grid[0] != grid[1]:
        raise ValueError(f"layout {layout!r} stores positions of a square, got size {size}; oblong ones: 'onnx'")
    return grid


def write_state(state: State, path: Path, said: dict[str, str] | None = None) -> None:
    """Tensors in one file, whole or not at all; .safetensors, which also holds what is said of it, or .pth.

    Args:
        said: one text by its name; several would stand in any order, and the same weights would give other bytes.
    Raises:
        OSError: it cannot be written, as on a full disk; names the file.
    """
    with atomic_path(path) as beside, disk_errors(path):
        if path.suffix == ".safetensors":
            save_file(state, beside, said)
        else:
            with open(beside, "wb") as file:  # a path would be named within
                torch.save(state, file)


def _write_hugging_face(state: State, folder: Path, said: Mapping, crop: int | None) -> Path:
    """config.json, model.safetensors, preprocessor_config.json."""
    config = hugging_face_config(state, said["heads"]) | {key: said[key] for key in STRETCH}  # these are for us alone
    patch_size, channels = config["patch_size"], config["num_channels"]
    crop = crop or min(224, config["image_size"]) // patch_size * patch_size
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": round(crop * 256 / 224)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": crop, "width": crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406] if channels == 3 else [0.5] * channels,
        "image_std": [0.229, 0.224, 0.225] if channels == 3 else [0.25] * channels,
    }
    weights = folder / "model.safetensors"
    with atomic_path(weights) as beside, disk_errors(weights):
        save_file(to_hugging_face_layout(state), beside, {"format": "pt"})
        (folder / "config.json").unlink(missing_ok=True)  # else a crash here leaves it to speak of other weights
    for name, content in (("preprocessor_config.json", processor), ("config.json", config)):
        write_atomically(folder / name, (json.dumps(content, indent=2) + "\n").encode())
    return folder


class _Graph(nn.Module):
    """The backbone for one patch grid, written without packing, so that a tracer sees a batch of any length."""

    def __init__(self, vit: VisionTransformer, grid: tuple[int, int]):
        super().__init__()
        self.vit = vit
        pos = interpolate_pos_embed(vit.pos_embed.detach(), grid, vit.interpolate_offset, vit.interpolate_antialias)
        self.register_buffer("pos", pos)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        vit, many = self.vit, images.shape[0]  # len() would fix it
        tokens = [(vit.cls_token + self.pos[:, :1]).expand(many, -1, -1)]
        if vit.num_register_tokens:
            tokens.append(vit.register_tokens.expand(many, -1, -1))
        x = torch.cat([*tokens, vit.patch_embed(images) + self.pos[:, 1:]], dim=1)  # (B, T, D)
        for block in vit.blocks:
            qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, vit.heads, -1))  # (B, T, 3, h, d)
            mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))  # (B, h, T, d)
            x = x + block.ls1(block.attn.proj(mixed.transpose(1, 2).flatten(2)))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        x, registers = vit.norm(x), vit.num_register_tokens
        patches = x[:, 1 + registers :]
        return (x[:, 0], x[:, 1 : 1 + registers], patches) if registers else (x[:, 0], patches)


def _write_onnx(vit: VisionTransformer, path: Path, grid: tuple[int, int]) -> Path:
    """Trace a float32 copy on the CPU; weights over 2 GiB go to a second file beside it."""
    absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if absent:
        raise NotImplementedError(f"ONNX needs {' and '.join(absent)}: pip install 'minidino[export]'")
    graph = _Graph(copy.deepcopy(vit).cpu().float(), grid).eval()
    in_chans, patch_size = vit.patch_embed.proj.in_channels, vit.patch_size
    example = torch.zeros(2, in_chans, grid[0] * patch_size, grid[1] * patch_size)
    registers = ["x_norm_regtokens"] if vit.num_register_tokens else []
    program = torch.onnx.export(
        graph, (example,), dynamo=True, verbose=False, input_names=["images"],
        output_names=["x_norm_clstoken", *registers, "x_norm_patchtokens"], dynamic_shapes={"images": {0: "batch"}},
    )  # fmt: skip
    if sum(x.nbytes for x in graph.state_dict().values()) > ONE_FILE:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder, named_errors(path):
            program.save(Path(folder) / path.name, external_data=True)  # the graph names the other file
            path.unlink(missing_ok=True)  # else a crash here leaves it to speak of other weights
            for file in sorted(Path(folder).iterdir(), reverse=True):  # the graph comes last
                os.replace(file, path.with_name(file.name))
        return path
    with atomic_path(path) as beside:
        program.save(beside, external_data=False)
    return path
