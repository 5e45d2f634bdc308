"""The names that others give to the same weights, there and back; dicts of tensors in, dicts of tensors out.

    hub        blocks.0.attn.qkv.weight                      the official release, and this package
    training   teacher.backbone.blocks.0.3.attn.qkv.weight   official runs: nested, blocks in chunks, FSDP wrappers
    own        {"teacher": {"backbone.blocks.0...": ...}}    checkpoints/step_*.pt of this package
    timm       as hub, but reg_token, no mask_token, positions of the patches alone, fc1/fc2 for w12/w3
    HF         encoder.layer.0.attention.attention.query.weight, or ...attention.q_proj.weight in memory

They are told apart by their keys alone.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

NESTED_UNDER = ("teacher", "model", "state_dict")
WRAPPERS = r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|module)\."  # of torch.compile, FSDP and DDP
# the first that occurs is the backbone, all else is left behind
PREFIXES = ("teacher.backbone.", "backbone.", "dinov2.", "dinov2_with_registers.")

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

# The other way: the names in the files that Hugging Face publishes.
TO_HUGGING_FACE = (
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
)
TO_TIMM = (
    (r"^register_tokens$", "reg_token"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)


# ---------------------------------------------------------------------------------------------------------------- in


def to_hub_layout(source: Mapping) -> State:
    """Rename and restack any known layout to the official names; unknown keys pass unchanged."""
    state = _renamed(_unwrap(source), RENAMES)
    for parts, whole in JOINS:
        for first in [key for key in state if parts[0] in key]:
            pieces = [first.replace(parts[0], part) for part in parts]
            if all(piece in state for piece in pieces):
                state[first.replace(parts[0], whole)] = torch.cat([state.pop(piece) for piece in pieces])
    _unpack_timm(state)
    return state


def _renamed(state: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> State:
    """The same tensors, each key changed by every rule in turn."""
    for pattern, name in rules:
        state = {re.sub(pattern, name, key): x for key, x in state.items()}
    return dict(state)


def _unwrap(source: Mapping) -> State:
    """The backbone's own tensors out of a training checkpoint, whatever it is nested in."""
    for name in NESTED_UNDER:
        if isinstance(source.get(name), Mapping):
            return _unwrap(source[name])
    clean = {re.sub(WRAPPERS, "", str(key)): x for key, x in source.items() if isinstance(x, Tensor)}
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
        fc2 = state.get(f"{stem}fc2.weight")
        if fc2 is not None and len(state[fc1]) == 2 * fc2.shape[1]:  # gate and up share fc1: SwiGLU
            for old, new in (("fc1", "w12"), ("fc2", "w3")):
                for leaf in ("weight", "bias"):
                    if f"{stem}{old}.{leaf}" in state:
                        state[f"{stem}{new}.{leaf}"] = state.pop(f"{stem}{old}.{leaf}")


def describe(state: Mapping[str, Tensor]) -> dict[str, int | str | bool | None]:
    """The sizes of a backbone as its tensors (official names) tell them; how many heads, no tensor tells."""
    blocks = [int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)]
    patch_kernel = state.get("patch_embed.proj.weight")
    return {
        "width": state["cls_token"].shape[-1],
        "depth": 1 + max(blocks, default=-1),
        "patch_size": None if patch_kernel is None else patch_kernel.shape[-1],
        "in_chans": None if patch_kernel is None else patch_kernel.shape[1],
        "registers": state["register_tokens"].shape[1] if "register_tokens" in state else 0,
        "ffn": "swiglu" if "blocks.0.mlp.w12.weight" in state else "mlp",
        "layerscale": "blocks.0.ls1.gamma" in state,
    }


# --------------------------------------------------------------------------------------------------------------- out


def to_timm_layout(state: Mapping[str, Tensor]) -> State:
    """What timm's VisionTransformer takes with strict=True, from official names.

    Without registers timm keeps a position for cls; with them (no_embed_class=True) the two are one vector, their sum.

    Source: timm timm/models/vision_transformer.py (aa4b585), _convert_dinov2.
    """
    state = {key: x for key, x in state.items() if key != "mask_token"}
    if "register_tokens" in state:
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:].clone()
    return _renamed(state, TO_TIMM)


def to_hugging_face_layout(state: Mapping[str, Tensor]) -> State:
    """What Dinov2Model and Dinov2WithRegistersModel read from a file, from official names.

    They always have LayerScale: a backbone without it gets gains of one, which changes no output.

    Source: transformers models/dinov2/convert_dinov2_to_hf.py.
    """
    theirs: State = {}
    for key, x in _renamed(state, TO_HUGGING_FACE).items():
        if ".attn.qkv." in key:
            for part, piece in zip(("query", "key", "value"), x.chunk(3), strict=True):
                theirs[key.replace(".attn.qkv.", f".attention.attention.{part}.")] = piece.clone()
        else:
            theirs[key] = x
    sizes = describe(state)
    if not sizes["layerscale"]:
        for i in range(sizes["depth"]):
            for n in (1, 2):
                theirs[f"encoder.layer.{i}.layer_scale{n}.lambda1"] = torch.ones_like(state["norm.weight"])
    return theirs


def hugging_face_config(state: Mapping[str, Tensor], heads: int) -> dict[str, object]:
    """The config.json for `to_hugging_face_layout`; the models need no code of ours."""
    sizes = describe(state)
    registers = sizes["registers"]
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    return {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        **({"num_register_tokens": registers} if registers else {}),
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": heads,
        "mlp_ratio": 4,
        "use_swiglu_ffn": sizes["ffn"] == "swiglu",
        "patch_size": sizes["patch_size"],
        "image_size": side * sizes["patch_size"],
        "num_channels": sizes["in_chans"],
        "layerscale_value": 1.0,
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "torch_dtype": str(state["norm.weight"].dtype).removeprefix("torch."),
    }
