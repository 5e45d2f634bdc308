"""The heads that were released beside the backbones: classes of pictures and pixels, distances.

    load_head(source) -> the module, with its weights

What they read, of a backbone `vit`:

    classes of pictures, dinov2_*_linear_head and _linear4_head
        x = extract(vit, images, blocks=n)      x["cls"] (n = 1) or x["cls_blocks"].flatten(1) (n = 4), and behind it
                                                x["mean_patch"]
    classes of pixels, dinov2_*_ade20k_linear_head and _ms_head
        feature_maps(vit, images, n)            through `predict`, or `segmenter` and `predict_windows`
    distances, dinov2_*_nyu_linear_head, _linear4_head and _dpt_head
        feature_maps(vit, images, taps(vit.depth, "lin1" or "lin4"), norm=False, class_token=True)
                                                through `predict_depth`; as released without patch_size

Source: official dinov2/hub/classifiers.py, dinov2/hub/depthers.py and dinov2/eval/segmentation.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from minidino.model.weights import read_state
from minidino.probes.depth import DepthHead, bins
from minidino.probes.dpt import DPTHead
from minidino.probes.segmentation import LinearHead

PREFIX = "decode_head."  # of released files
HUGGING_FACE = (  # what it calls the parts of DPT; the first residual unit of its coarsest fusion is never used
    (r"neck\.reassemble_stage\.readout_projects\.", "reassemble_blocks.readout_projects."),
    (r"neck\.reassemble_stage\.layers\.(\d)\.projection\.", r"reassemble_blocks.projects.\1.conv."),
    (r"neck\.reassemble_stage\.layers\.(\d)\.resize\.", r"reassemble_blocks.resize_layers.\1."),
    (r"neck\.convs\.(\d)\.", r"convs.\1.conv."),
    (r"neck\.fusion_stage\.layers\.(\d)\.projection\.", r"fusion_blocks.\1.project.conv."),
    (r"neck\.fusion_stage\.layers\.(\d)\.residual_layer(\d)\.convolution(\d)\.",
     r"fusion_blocks.\1.res_conv_unit\2.conv\3.conv."),
    (r"head\.projection\.", "project.conv."),
    (r"head\.head\.", "conv_depth.head."),
)  # fmt: skip
UNUSED = "fusion_blocks.0.res_conv_unit1."


def load_head(source: str | Path | Mapping, min_depth: float = 1e-3, max_depth: float = 10.0) -> nn.Module:
    """Make a released head from its file; the keys tell which kind it is, the shapes how large.

    Args:
        source: a .pth, .pt or .safetensors file, a Hugging Face folder (DPTForDepthEstimation on DINOv2, of which the
            head is taken) or a state dict.
        min_depth, max_depth: metres of a head for distances, which no released file tells: 10 of the NYU heads, 80 of
            KITTI's. A file of ours with the bins of a DepthHead has its own.
    Returns:
        Linear, LinearHead, DepthHead or DPTHead, for evaluation.
    Raises:
        FileNotFoundError: no such file; released heads are not downloaded.
        ValueError: none of the four, keys that are missing or too many, shapes that do not fit.
    """
    if not isinstance(source, Mapping) and not Path(source).exists():
        raise FileNotFoundError(f"no head at {source}: expected a file, such as dinov2_vits14_nyu_dpt_head.pth of the "
                                "official downloads, or a Hugging Face folder")  # fmt: skip
    state = source if isinstance(source, Mapping) else read_state(Path(source))
    state = _released_names(state.get("state_dict", state))
    try:
        head = _empty(state, min_depth, max_depth)
        head.load_state_dict({"bins": head.bins} | state if isinstance(head, DepthHead) else state)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"a head that lacks something or does not fit: {error}") from error
    return head.eval()


def _empty(state: Mapping[str, Tensor], min_depth: float, max_depth: float) -> nn.Module:
    """A head of this kind and these sizes."""
    if "conv_seg.weight" in state:
        n_classes, width = state["conv_seg.weight"].shape[:2]
        return LinearHead(width, n_classes)
    if "conv_depth.weight" in state:
        n_bins, width = state["conv_depth.weight"].shape[:2]
        return DepthHead(width, bins(min_depth, max_depth, n_bins), batch_norm="bn.weight" in state)
    if "conv_depth.head.0.weight" in state:
        convs = [state[f"convs.{i}.conv.weight"] for i in range(4)]
        width = state["reassemble_blocks.projects.0.conv.weight"].shape[1]
        sizes = tuple(x.shape[1] for x in convs)
        return DPTHead(width, len(convs[0]), min_depth, max_depth, sizes=sizes)
    if set(state) == {"weight", "bias"}:
        n_classes, width = state["weight"].shape
        return nn.Linear(width, n_classes)
    raise ValueError(f"expected a head for classes (weight, bias), pixels (conv_seg) or distances (conv_depth), got "
                     f"keys {sorted(state)[:4]}")  # fmt: skip


def _released_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if any(key.startswith("neck.") for key in state):
        heads = {key: x for key, x in state.items() if key.startswith(("neck.", "head."))}
        for theirs, ours in HUGGING_FACE:
            heads = {re.sub(f"^{theirs}", ours, key): x for key, x in heads.items()}
        return {key: x for key, x in heads.items() if not key.startswith(UNUSED)}
    return {key.removeprefix(PREFIX): x for key, x in state.items()}
