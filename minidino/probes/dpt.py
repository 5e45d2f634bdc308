"""How far away each pixel is, told by a decoder of convolutions: DPT on four blocks of a frozen backbone.

    DPTHead(width)                 the released decoder, with its names
    dpt_depth(train_maps, ...)     trained and judged as `linear_depth` is

The maps are those of the linear head on four blocks: what a decoder adds is seen by asking both.

Source: Ranftl et al. 2021 (Vision Transformers for Dense Prediction, arXiv 2103.13413); DINOv2 paper, section 7.4;
    official dinov2/eval/depth/models/decode_heads/dpt_head.py and dinov2/hub/depthers.py.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minidino.probes.depth import fit_depth, within
from minidino.probes.features import in_float32
from minidino.probes.knn import Rows, as_tensor

CHANNELS = 256  # of the released decoder
LARGEST_LR = 1.5e-3  # a seventh of the linear head's: this one is deep


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

    def forward(self, blocks: tuple[Float[Tensor, "B D2 Hp Wp"], ...]) -> list[Float[Tensor, "B _ _ _"]]:
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

    def forward(self, x: Float[Tensor, "B c h w"], finer: Tensor | None = None) -> Float[Tensor, "B c h2 w2"]:
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
        guess: metres that an untrained head says; None: half of max_depth.
        sizes: channels of the four maps before; None: D / 8, D / 4, D / 2 and D, as published.
    Differs: the last map begins at 0 and its bias at `guess` instead of both at random: below 0 m the last ReLU learns
        nothing, and where a whole picture is there, it stays there.
    Raises:
        ValueError: not 0 <= min_depth < guess <= max_depth.
    """

    def __init__(
        self,
        width: int,
        channels: int = CHANNELS,
        min_depth: float = 1e-3,
        max_depth: float = 10.0,
        guess: float | None = None,
        sizes: tuple[int, int, int, int] | None = None,
    ):
        super().__init__()
        guess = max_depth / 2 if guess is None else guess
        if not 0 <= min_depth < guess <= max_depth:
            raise ValueError(f"expected 0 <= min_depth < guess <= max_depth (m), got {min_depth}, {guess}, {max_depth}")
        sizes = sizes or tuple(max(width // 2 ** (3 - i), 1) for i in range(4))
        self.min_depth, self.max_depth = min_depth, max_depth
        self.reassemble_blocks = Reassemble(width, sizes)
        self.convs = nn.ModuleList(_conv(n, channels, 3, padding=1, bias=False) for n in sizes)
        self.fusion_blocks = nn.ModuleList(Fusion(channels, coarsest=i == 0) for i in range(4))
        self.project = _conv(channels, channels, 3, padding=1)
        last = nn.Conv2d(32, 1, 1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, guess - min_depth)
        self.conv_depth = _named("head", nn.Sequential(
            nn.Conv2d(channels, channels // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(channels // 2, 32, 3, padding=1), nn.ReLU(), last,
        ))  # fmt: skip

    def forward(self, maps: Float[Tensor, "n C Hp Wp"]) -> Float[Tensor, "n H16 W16"]:
        """Distances in m, at sixteen times the patch grid; at most max_depth where it does not learn."""
        blocks = self.reassemble_blocks(maps.chunk(4, 1))
        *finer, coarsest = (conv(x) for conv, x in zip(self.convs, blocks, strict=True))
        found = self.fusion_blocks[0](coarsest)
        for fuse, x in zip(self.fusion_blocks[1:], reversed(finer), strict=True):
            found = fuse(found, x)
        metres = self.conv_depth(self.project(found).relu())[:, 0].relu() + self.min_depth
        return metres if self.training else metres.clamp(max=self.max_depth)


@in_float32
def dpt_depth(
    train_maps: Rows,
    train_depth: Rows,
    test_maps: Rows,
    test_depth: Rows,
    min_depth: float = 1e-3,
    max_depth: float = 10.0,
    *,
    channels: int = CHANNELS,
    device: torch.device | str = "cpu",
    **options,
) -> dict:
    """Tell distances by a DPT decoder on frozen features.

    Args:
        train_maps, test_maps: (n, 8 D, Hp, Wp) from `feature_maps(blocks=taps(depth), norm=False, class_token=True)`.
        train_depth, test_depth, min_depth, max_depth, options: as for `fit_depth`.
        channels: see `DPTHead`.
    Returns:
        What `fit_depth` does.
    Raises:
        ValueError: as `fit_depth`; maps whose channels are no multiple of 8; min_depth not above 0.
    """

    def make(n_channels: int, generator: torch.Generator) -> DPTHead:
        if n_channels % 8:
            raise ValueError(f"expected maps of four blocks with their class tokens, 8 D channels, got {n_channels}")
        depth = as_tensor(train_depth)
        guess = depth[within(depth, min_depth, max_depth)].median().item()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator.initial_seed())
            return DPTHead(n_channels // 8, channels, min_depth, max_depth, guess).to(device)

    if min_depth <= 0:
        raise ValueError(f"expected min_depth above 0 m, got {min_depth}")
    data = train_maps, train_depth, test_maps, test_depth
    return fit_depth(make, *data, min_depth, max_depth, LARGEST_LR, **options)


def _conv(n_in: int, n_out: int, side: int, padding: int = 0, bias: bool = True) -> nn.Sequential:
    """A convolution, drawn as released."""
    conv = nn.Conv2d(n_in, n_out, side, padding=padding, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if bias:
        nn.init.zeros_(conv.bias)
    return _named("conv", conv)


def _named(name: str, module: nn.Module) -> nn.Sequential:
    """The module alone, under the name that released files have for it."""
    only = nn.Sequential()
    only.add_module(name, module)
    return only
