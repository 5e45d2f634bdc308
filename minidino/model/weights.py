"""Weights into a backbone from the layouts that are about, told apart by their keys alone.

    hub        blocks.0.attn.qkv.weight                      the official release, and this package
    training   teacher.backbone.blocks.0.3.attn.qkv.weight   official runs: nested, blocks in chunks, FSDP wrappers
    timm       as hub, but reg_token, no mask_token, positions of the patches alone, fc1/fc2 for w12/w3
    HF         encoder.layer.0.attention.attention.query.weight, or ...attention.q_proj.weight in memory
"""

import math
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minidino.model.vit import VisionTransformer, interpolate_pos_embed

State = dict[str, Tensor]

NESTED_UNDER = ("teacher", "model", "state_dict")
PREFIXES = ("teacher.backbone.", "backbone.")  # the first that occurs is the backbone, all else is left behind

# Our name for each piece of a foreign key, in this order; what no rule touches is the same everywhere.
RENAMES = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # blocks.{chunk}.{block}: the block number is already absolute
    (r"^reg_token$", "register_tokens"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.w3."),
)
# Pieces that are stacked, rows over rows, into one matrix of ours.
JOINS = (((".attn.q.", ".attn.k.", ".attn.v."), ".attn.qkv."), ((".mlp.gate_proj.", ".mlp.up_proj."), ".mlp.w12."))


def load_weights(vit: VisionTransformer, source: str | Path | Mapping) -> VisionTransformer:
    """Fill a backbone with weights from any known layout, all of them or none.

    The outputs are those of the model the weights come from, up to how it stretches positions to another grid: official
    models without registers use interpolate_offset=0.1; Hugging Face (without registers) asks by size, offset 0.0; timm
    and all register models add interpolate_antialias=True.

    Args:
        vit: a backbone of the right sizes; it is changed in place.
        source: a .pth, .pt or .safetensors file, a Hugging Face folder, or a state dict.
    Returns:
        The same backbone.
    Raises:
        FileNotFoundError: no such file, or a folder without model.safetensors.
        ValueError: the weights are for another backbone, or for none; says what differs.
    Warns:
        UserWarning: positions were resized to another patch grid, or the mask token is missing (timm drops it; it
            becomes zeros, and matters for masked images only).
    """
    state = to_hub_layout(source if isinstance(source, Mapping) else read_state(Path(source)))
    if "cls_token" not in state or "pos_embed" not in state:
        raise ValueError(f"expected Vision Transformer weights with cls_token and pos_embed, got keys {_few(state)}")
    if "mask_token" not in state:
        warnings.warn("the weights have no mask_token (timm drops it): set to zeros", stacklevel=2)
        state["mask_token"] = torch.zeros_like(vit.mask_token, device="cpu")
    stored, wanted = (math.isqrt(pos.shape[1] - 1) for pos in (state["pos_embed"], vit.pos_embed))
    if stored != wanted:
        said = f"position embedding resized from {stored} x {stored} to {wanted} x {wanted} patches"
        warnings.warn(said, stacklevel=2)
        state["pos_embed"] = interpolate_pos_embed(
            state["pos_embed"], (wanted, wanted), offset=0.0, antialias=vit.interpolate_antialias
        )
    _check_fit(vit.state_dict(), state)
    vit.load_state_dict(state)
    return vit


def save_backbone(vit: VisionTransformer, path: str | Path) -> Path:
    """Write the weights of a backbone as one safetensors file with official names; returns its path."""
    save_file({name: x.detach().cpu().contiguous() for name, x in vit.state_dict().items()}, path)
    return Path(path)


def read_state(path: Path) -> Mapping:
    """Read tensors from a file or a Hugging Face folder; pickled code is never run."""
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        kinds = "a .pth, .pt or .safetensors file, or a Hugging Face folder"
        raise FileNotFoundError(f"no weights at {path}: expected {kinds}")
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def to_hub_layout(source: Mapping) -> State:
    """Rename and restack any known layout to the official names; unknown keys pass unchanged."""
    state = _unwrap(source)
    for pattern, name in RENAMES:
        state = {re.sub(pattern, name, key): x for key, x in state.items()}
    for parts, whole in JOINS:
        for first in [key for key in state if parts[0] in key]:
            pieces = [first.replace(parts[0], part) for part in parts]
            if all(piece in state for piece in pieces):
                state[first.replace(parts[0], whole)] = torch.cat([state.pop(piece) for piece in pieces])
    _unpack_timm(state)
    return state


def _unwrap(source: Mapping) -> State:
    """The backbone's own tensors out of a training checkpoint, whatever it is nested in."""
    for name in NESTED_UNDER:
        if isinstance(source.get(name), Mapping):
            return _unwrap(source[name])
    clean = {key.replace("_fsdp_wrapped_module.", ""): x for key, x in source.items() if isinstance(x, Tensor)}
    for prefix in PREFIXES:
        inside = {key.removeprefix(prefix): x for key, x in clean.items() if key.startswith(prefix)}
        if inside:
            return inside
    return clean


def _unpack_timm(state: State) -> None:
    """Undo two habits of timm, in place: no position for cls (already added to it), and w12, w3 called fc1, fc2."""
    pos = state.get("pos_embed")
    if pos is not None and math.isqrt(pos.shape[1]) ** 2 == pos.shape[1]:  # M*M positions, not 1 + M*M
        state["pos_embed"] = torch.cat([torch.zeros_like(pos[:, :1]), pos], dim=1)
    for fc1 in [key for key in state if key.endswith(".mlp.fc1.weight")]:
        stem = fc1.removesuffix("fc1.weight")
        if len(state[fc1]) == 2 * state[f"{stem}fc2.weight"].shape[1]:  # gate and up share fc1: SwiGLU
            for old, new in (("fc1", "w12"), ("fc2", "w3")):
                for leaf in ("weight", "bias"):
                    state[f"{stem}{new}.{leaf}"] = state.pop(f"{stem}{old}.{leaf}")


def _check_fit(ours: Mapping[str, Tensor], state: State) -> None:
    """Weights and backbone have the same names and shapes, or the difference is told in words."""
    missing, unexpected = ours.keys() - state.keys(), state.keys() - ours.keys()
    reshaped = {key for key in ours.keys() & state.keys() if ours[key].shape != state[key].shape}
    if not (missing or unexpected or reshaped):
        return
    theirs, mine = _describe(state), _describe(ours)
    lines = ["the weights do not fit this backbone:"]
    for what in mine:
        if theirs[what] != mine[what]:
            lines.append(f"  {what}: weights have {theirs[what]}, backbone has {mine[what]}")
    for kind, keys in (("missing", missing), ("not expected", unexpected), ("of another shape", reshaped)):
        if keys:
            lines.append(f"  {len(keys)} {kind}: {_few(keys)}")
    raise ValueError("\n".join(lines + ["build the backbone with the sizes of the weights (see build_vit)"]))


def _describe(state: Mapping[str, Tensor]) -> dict[str, object]:
    """The sizes of a backbone as its tensors tell them."""
    blocks = [int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)]
    patch_kernel = state.get("patch_embed.proj.weight")
    return {
        "width": state["cls_token"].shape[-1],
        "depth": 1 + max(blocks, default=-1),
        "patch_size": None if patch_kernel is None else patch_kernel.shape[-1],
        "registers": state["register_tokens"].shape[1] if "register_tokens" in state else 0,
        "ffn": "swiglu" if "blocks.0.mlp.w12.weight" in state else "mlp",
        "layerscale": "blocks.0.ls1.gamma" in state,
    }


def _few(keys: Collection[str]) -> str:
    """The first names of many."""
    names = sorted(map(str, keys))
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
