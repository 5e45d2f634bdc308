"""A descriptor that knows a picture again, whatever was done to it, learned from the pool itself in minutes.

    a picture nearly as it is, and one cropped and attacked -> CopyNet -> InfoNCE + entropy -> CopyDescriptor

    InfoNCE   a view is more like its other view than like any other picture
    entropy   pictures spread over the whole sphere, so that one threshold means the same everywhere

It is the opposite of a semantic descriptor: two photographs of one dog are two pictures.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minidino.images.attacks import attack
from minidino.images.batches import batch_indices, repeats
from minidino.images.crops import CropLaw, crop_seed, multi_crop
from minidino.images.pixels import Pixels
from minidino.learning.losses import koleo_loss
from minidino.learning.optim import cosine_schedule

SHRINKAGE = 0.03  # s, of the mean variance, so that directions of mere noise are not blown up
ATTACKS = -4  # stands in for an image index in the seed of a step's attacks
ORIGINAL = {"scale": (0.8, 1.0), "ratio": (0.9, 1.1), "brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.02,
            "gray_p": 0.0, "blur_p": 0.0}  # fmt: skip
COPY = {"scale": (0.3, 1.0), "ratio": (0.6, 1.67), "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.2,
        "gray_p": 0.2, "blur_p": 0.3}  # fmt: skip


class CopyNet(nn.Module):
    """A small convolutional net: four stages of one residual block, generalised mean, a linear layer, length 1.

    A picture is first brought to mean 0 and deviation 1, so that light and tint do not count; each number of the
    descriptor is standardised over the batch, so that strangers are near cosine 0 from the first step on.

    Args:
        width: channels of the first stage, on a quarter of the side; each stage has twice as many on half of the side.
        dim: D, of the descriptor.
    Source: generalised-mean pooling, Radenovic et al. 2018, as in SSCD.
    Differs: the power of the mean is learned, from 3 on, which is fixed in SSCD; nothing is standardised there.
    """

    def __init__(self, width: int = 32, dim: int = 256):
        super().__init__()
        widths = [width * 2**stage for stage in range(4)]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 4, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        stages = [Residual(below, here, 1 if below == here else 2) for below, here in zip([width, *widths], widths)]
        self.stages = nn.Sequential(*stages)
        self.power = nn.Parameter(torch.tensor(3.0))
        self.project = nn.Sequential(nn.Linear(widths[-1], dim), nn.BatchNorm1d(dim, affine=False))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        variance, mean = torch.var_mean(images, dim=(2, 3), keepdim=True)
        maps = self.stages(self.stem((images - mean) / (variance + 0.01).sqrt())).clamp(min=1e-6)
        pooled = maps.pow(self.power).mean((2, 3)).pow(1 / self.power)
        return F.normalize(self.project(pooled), dim=1)


class CopyDescriptor(nn.Module):
    """A trained net as it is used: what it says of a picture and of its mirror image, together, whitened on a pool.

        z = net(x) + net(mirror x), of length 1      w = V^T (z - mean) / sqrt(lambda + s mean lambda), of length 1

    Whitening takes all directions in which the pool varies for equally important, and so brings strangers to a cosine
    near 0 also after a short training.

    Args:
        net: trained, in evaluation mode.
    Source: whitening of descriptors, Pizzi et al. 2022 (SSCD), section 4.5; Jegou and Chum 2012.
    Differs: mirror images and s are ours; released evaluations of SSCD normalise scores besides.
    """

    def __init__(self, net: CopyNet):
        super().__init__()
        dim = net.project[0].out_features
        self.net = net
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("whitening", torch.eye(dim))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        both = F.normalize(self.net(images) + self.net(images.flip(3)), dim=1)
        return F.normalize((both - self.mean) @ self.whitening, dim=1)

    def whiten(self, rows: Float[Tensor, "n D"]) -> None:
        """Learn the whitening from what the net says of a pool.

        Args:
            rows: what `forward` gave before any whitening, of two pictures at least.
        """
        rows = rows.to(self.mean)
        self.mean = rows.mean(0)
        variance, directions = torch.linalg.eigh((rows - self.mean).double().T.cov())
        scale = (variance.clamp(min=0) + SHRINKAGE * variance.mean()).clamp(min=1e-12).rsqrt()  # a flat pool has 0
        self.whitening = (directions * scale).to(rows)


class Residual(nn.Module):
    """Two convolutions beside a short cut, the first of them with a stride."""

    def __init__(self, below: int, here: int, stride: int):
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(below, here, 3, stride, 1, bias=False), nn.BatchNorm2d(here), nn.ReLU(),
            nn.Conv2d(here, here, 3, 1, 1, bias=False), nn.BatchNorm2d(here),
        )  # fmt: skip
        plain = below == here and stride == 1
        self.short = nn.Identity() if plain else nn.Conv2d(below, here, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        return F.relu(self.path(x) + self.short(x))


def info_nce(one: Float[Tensor, "B D"], other: Float[Tensor, "B D"], temperature: float) -> Float[Tensor, ""]:
    """How badly a view knows its other view among all views of the batch.

        mean_i  -log  exp(z_i . z_i' / t)  /  sum_{j != i} exp(z_i . z_j / t)        over all 2B views

    Args:
        one, other: unit rows; row i of both shows picture i.
        temperature: t, 0.05 in SSCD.
    Source: van den Oord et al. 2018; Chen et al. 2020, NT-Xent.
    Differs: SSCD's released code (9590266) adds 1e-6 to the divisor.
    """
    z = torch.cat([one, other])
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    target = torch.arange(len(z), device=z.device).roll(len(one))
    return F.cross_entropy(logits, target)


def train_copies(
    pixels: Pixels,
    net: CopyNet,
    steps: int = 600,
    batch_size: int = 96,
    size: int = 64,
    lr: float = 3e-3,
    temperature: float = 0.05,
    entropy: float = 0.5,
    seed: int = 0,
) -> Iterator[dict[str, float]]:
    """Teach the net to know pictures again; one record a step.

    Args:
        pixels: the pool; its duplicates need not be known.
        net: changed in place.
        steps, batch_size: pictures are seen in the order of `batch_indices`; at most as many as there are in a batch,
            and none twice: it would be told from itself.
        size: px of a view.
        lr: of AdamW, falling to 0 by a cosine after a tenth of the steps of warm-up.
        temperature: of InfoNCE.
        entropy: weight of the KoLeo term on the first views.
        seed: of order, views and attacks.
    Yields:
        {"step", "loss", "info_nce", "koleo"}.
    Source: Pizzi et al. 2022 (SSCD), section 4; the entropy term is Sablayrolles et al. 2019.
    Differs: a small net, minutes of training; no mixing of two pictures but pasting one onto another; one view of two is
        hardly changed; AdamW, there LARS; the entropy term with weight 0.5 on the first views, there 30 on all.
    """
    if len(pixels) < 2:
        raise ValueError(f"expected at least 2 pictures to tell apart, got {len(pixels)}")
    batch_size = min(batch_size, len(pixels))
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
    schedule = cosine_schedule(lr, 0.0, steps, steps // 10, lr / 10)
    laws = [CropLaw(size=size, **law) for law in (ORIGINAL, COPY)]
    device = next(net.parameters()).device
    net.train()
    for step in range(steps):
        index = batch_indices(len(pixels), batch_size, step, seed)
        index = index[repeats(index) == 0]  # the end of a pass may meet the next
        images, sizes = pixels.batch(index.numpy())
        seeds = [crop_seed(seed, step, int(i)) for i in index]
        (original, copy), _ = multi_crop(images.to(device), sizes, laws, laws[0], 0, seeds)
        chance = torch.Generator().manual_seed(crop_seed(seed, step, ATTACKS))
        one, other = net(torch.cat([original, attack(copy, chance)])).chunk(2)
        parts = {"info_nce": info_nce(one, other, temperature), "koleo": koleo_loss(one)}
        loss = parts["info_nce"] + entropy * parts["koleo"]
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        yield {"step": step, "loss": loss.item()} | {name: part.item() for name, part in parts.items()}
    net.eval()
