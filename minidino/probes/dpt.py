"""How far away each pixel is, told by a decoder of convolutions: DPT on four blocks of a frozen backbone.

    DPTHead(width)                 the released decoder, with its names
    dpt_depth(train_maps, ...)     trained and judged as `linear_depth` is
    load_depth_head(source)        the released heads for distances, linear and DPT, with their weights

The maps are those of the linear head on four blocks: what a decoder adds is seen by asking both.

Source: Ranftl et al. 2021 (Vision Transformers for Dense Prediction, arXiv 2103.13413); DINOv2 paper, section 7.4;
    official dinov2/eval/depth/models/decode_heads/dpt_head.py and dinov2/hub/depthers.py.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minidino.model.weights import read_state
from minidino.probes.depth import PUBLISHED_LR, PUBLISHED_STEPS, DepthHead, Rows, bins, fit_depth

CHANNELS = 256  # of the released decoder
LARGEST_LR = 1e-3
PREFIX = "decode_head."  # of released files
HUGGING_FACE = (  # what it calls the same; the first residual unit of its coarsest fusion is never used
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


class Reassemble(nn.Module):
    """From the tokens of four blocks to maps of 4, 2, 1 and 1/2 places per side of a patch."""

    def __init__(self, width: int, sizes: tuple[int, int, int, int]):
        super().__init__()
        self.projects = nn.ModuleList(_conv(width, n, 1) for n in sizes)
        self.resize_layers = nn.ModuleList([
            nn.ConvTranspose2d(sizes[0], sizes[0], 4, stride=4), nn.ConvTranspose2d(sizes[1], sizes[1], 2, stride=2),
            nn.Identity(), nn.Conv2d(sizes[3], sizes[3], 3, stride=2, padding=1),
        ])  # fmt: skip
        self.readout_projects = nn.ModuleList(nn.Sequential(nn.Linear(2 * width, width), nn.GELU()) for _ in sizes)

    def forward(self, blocks: tuple[Float[Tensor, "B 2D Hp Wp"], ...]) -> list[Float[Tensor, "B _ h w"]]:
        """blocks: the patch tokens of each, and its class token behind every one of them."""
        layers = zip(blocks, self.readout_projects, self.projects, self.resize_layers, strict=True)
        return [resize(project(readout(x.movedim(1, 3)).movedim(3, 1))) for x, readout, project, resize in layers]


class ResidualUnit(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = (_conv(channels, channels, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B c h w"]:
        return x + self.conv2(self.conv1(x.relu()).relu())


class Fusion(nn.Module):
    """Take a finer map into a coarser one, and give it twice the places."""

    def __init__(self, channels: int, coarsest: bool):
        super().__init__()
        self.res_conv_unit1 = None if coarsest else ResidualUnit(channels)
        self.res_conv_unit2 = ResidualUnit(channels)
        self.project = _conv(channels, channels, 1)

    def forward(self, x: Float[Tensor, "B c h w"], finer: Tensor | None = None) -> Float[Tensor, "B c 2h 2w"]:
        if finer is not None:  # of the same size, but for odd numbers of patches
            x = x + self.res_conv_unit1(F.interpolate(finer, x.shape[2:], mode="bilinear", align_corners=False))
        x = F.interpolate(self.res_conv_unit2(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.project(x)


class DPTHead(nn.Module):
    """Maps of four blocks (n, 8 D, Hp, Wp) to metres (n, 16 Hp, 16 Wp), with the parameters of the released head.

    An odd number of patches gives 16 places more, which span the same picture.

    Args:
        width: D of the backbone.
        channels: of all maps that are fused; published 256. The cost is about their square.
        min_depth, max_depth: metres; the second bounds what an evaluated head says.
        guess: metres that an untrained head says, about.
        sizes: channels of the four maps before; None: D / 8, D / 4, D / 2 and D, as published.
    Differs: the last bias begins at `guess`, metres, instead of about 0, below which a ReLU learns nothing.
    """

    def __init__(
        self,
        width: int,
        channels: int = CHANNELS,
        min_depth: float = 1e-3,
        max_depth: float = 10.0,
        guess: float = 1.0,
        sizes: tuple[int, int, int, int] | None = None,
    ):
        super().__init__()
        sizes = sizes or tuple(max(width // 2 ** (3 - i), 1) for i in range(4))
        self.min_depth, self.max_depth = min_depth, max_depth
        self.reassemble_blocks = Reassemble(width, sizes)
        self.convs = nn.ModuleList(_conv(n, channels, 3, padding=1, bias=False) for n in sizes)
        self.fusion_blocks = nn.ModuleList(Fusion(channels, coarsest=i == 0) for i in range(4))
        self.project = _conv(channels, channels, 3, padding=1)
        last = nn.Conv2d(32, 1, 1)
        nn.init.constant_(last.bias, guess)
        self.conv_depth = nn.Sequential(OrderedDict(head=nn.Sequential(
            nn.Conv2d(channels, max(channels // 2, 1), 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(max(channels // 2, 1), 32, 3, padding=1), nn.ReLU(), last,
        )))  # fmt: skip

    def forward(self, maps: Float[Tensor, "n C Hp Wp"]) -> Float[Tensor, "n H16 W16"]:
        *finer, coarsest = (conv(x) for conv, x in zip(self.convs, self.reassemble_blocks(maps.chunk(4, 1))))
        found = self.fusion_blocks[0](coarsest)
        for fuse, x in zip(self.fusion_blocks[1:], reversed(finer), strict=True):
            found = fuse(found, x)
        metres = self.conv_depth(self.project(found).relu())[:, 0].relu() + self.min_depth
        return metres if self.training else metres.clamp(max=self.max_depth)


def dpt_depth(
    train_maps: Rows,
    train_depth: Rows,
    test_maps: Rows,
    test_depth: Rows,
    min_depth: float = 1e-3,
    max_depth: float = 10.0,
    steps: int = 500,
    batch_size: int = 8,
    lr: float | None = None,
    seed: int = 0,
    *,
    channels: int = CHANNELS,
    device: torch.device | str = "cpu",
    **options,
) -> dict:
    """Tell distances by a DPT decoder on frozen features.

    Args:
        train_maps, test_maps: (n, 8 D, Hp, Wp) from `feature_maps(blocks=taps(depth), norm=False, class_token=True)`.
        train_depth, test_depth, min_depth, max_depth, steps, batch_size, seed, options: as for `fit_depth`.
        lr: None: the published 1e-4, times as much as the steps are fewer than the published, at most 0.001.
        channels: see `DPTHead`.
    Returns:
        What `fit_depth` does.
    Raises:
        ValueError: as `fit_depth`, and maps that are not those of four blocks.
    """

    def make(n_channels: int, generator: torch.Generator) -> DPTHead:
        if n_channels % 8:
            raise ValueError(f"expected maps of four blocks with their class tokens, 8 D channels, got {n_channels}")
        depth = torch.as_tensor(train_depth)
        guess = depth[(depth > min_depth) & (depth <= max_depth)].median().item()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            return DPTHead(n_channels // 8, channels, min_depth, max_depth, guess).to(device)

    lr = min(PUBLISHED_LR * PUBLISHED_STEPS / max(steps, 1), LARGEST_LR) if lr is None else lr
    data = train_maps, train_depth, test_maps, test_depth
    return fit_depth(make, *data, min_depth, max_depth, steps, batch_size, lr, seed, **options)


def load_depth_head(source: str | Path | Mapping, min_depth: float = 1e-3, max_depth: float = 10.0) -> nn.Module:
    """A head for distances with its weights, such as the released `dinov2_vits14_nyu_dpt_head.pth`.

        head = load_depth_head("dinov2_vits14_nyu_dpt_head.pth")
        maps = feature_maps(vit, images, taps(vit.depth), norm=False, class_token=True)
        metres = torch.cat(list(predict_depth(head, maps, images.shape[2:], vit.patch_size)))

    Args:
        source: a .pth, .pt or .safetensors file, a Hugging Face folder (DPTForDepthEstimation on DINOv2, of which the
            head is taken) or a state dict; the keys say whether it is linear or DPT, the shapes how large. A linear
            head of one block wants the maps of one: `taps(depth, "lin1")`.
        min_depth, max_depth: metres, which no file tells; 10 for the NYU heads, 80 for KITTI.
    Returns:
        A DepthHead or a DPTHead, for evaluation.
    Raises:
        FileNotFoundError: no such file.
        ValueError: neither of the two, keys that are missing or too many, shapes that do not fit.
    """
    state = source if isinstance(source, Mapping) else read_state(Path(source))
    state = _released_names(state.get("state_dict", state))
    try:
        head = _head_for(state, min_depth, max_depth)
        head.load_state_dict({"bins": head.bins} | state if isinstance(head, DepthHead) else state)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"a head for distances that lacks something or does not fit: {error}") from error
    return head.eval()


def _head_for(state: Mapping[str, Tensor], min_depth: float, max_depth: float) -> nn.Module:
    """An empty head of these sizes."""
    if "conv_depth.weight" in state:
        n_bins, width = state["conv_depth.weight"].shape[:2]
        return DepthHead(width, bins(min_depth, max_depth, n_bins), batch_norm="bn.weight" in state)
    if "project.conv.weight" in state:
        convs = [state[f"convs.{i}.conv.weight"] for i in range(4)]
        width = state["reassemble_blocks.projects.0.conv.weight"].shape[1]
        return DPTHead(width, len(convs[0]), min_depth, max_depth, sizes=tuple(x.shape[1] for x in convs))
    raise ValueError(f"no head for distances: expected conv_depth.weight or project.conv.weight among the keys, got "
                     f"{sorted(state)[:4]}")  # fmt: skip


def _released_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if any(key.startswith("neck.") for key in state):
        heads = {key: x for key, x in state.items() if key.startswith(("neck.", "head."))}
        for theirs, ours in HUGGING_FACE:
            heads = {re.sub(f"^{theirs}", ours, key): x for key, x in heads.items()}
        return {key: x for key, x in heads.items() if not key.startswith(UNUSED)}
    return {key.removeprefix(PREFIX): x for key, x in state.items()}


def _conv(n_in: int, n_out: int, side: int, padding: int = 0, bias: bool = True) -> nn.Sequential:
    """A convolution under the name that released files have for it, drawn as there."""
    conv = nn.Conv2d(n_in, n_out, side, padding=padding, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if bias:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(OrderedDict(conv=conv))
