"""What happens to pictures that travel: turned, framed, pasted, written upon, compressed; a batch at a time.

    attack(crops, generator) -> crops      after `multi_crop` has cropped and recoloured them

The crops are normalised, (n, 3, s, s); every row draws its own fate from the generator. Each attack takes a share of
the rows and leaves the others as they are.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SHARES = {"turn": 0.3, "frame": 0.35, "write": 0.3, "noise": 0.2, "compress": 0.3}  # of rows, each attack alone
TEXTS = 128  # masks of writing to choose from
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 !?&"

Crops = Float[Tensor, "n 3 s s"]


def attack(crops: Crops, generator: torch.Generator) -> Crops:
    """Let each row suffer a random set of attacks, in a fixed order.

    Args:
        crops: normalised, on any device.
        generator: on the CPU; the only source of chance.
    Source: Pizzi et al. 2022 (SSCD), section 4.1 and appendix, names the attacks; the strengths are ours.
    """
    for name, change in (("turn", turn), ("frame", frame), ("write", write), ("noise", noise), ("compress", compress)):
        rows = (torch.rand(len(crops), generator=generator) < SHARES[name]).nonzero()[:, 0]
        if len(rows):
            rows = rows.to(crops.device)
            crops = crops.index_copy(0, rows, change(crops[rows], generator))
    return crops


def turn(crops: Crops, generator: torch.Generator) -> Crops:
    """Rotate by up to 20 degrees, half of the rows by a quarter, half or three quarter turns more; edges mirrored."""
    n = len(crops)
    degrees = 40 * torch.rand(n, generator=generator) - 20
    degrees += 90 * torch.randint(1, 4, (n,), generator=generator) * (torch.rand(n, generator=generator) < 0.5)
    angle = degrees.deg2rad()
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(n)
    return _sampled(crops, torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(n, 2, 3), "reflection")


def frame(crops: Crops, generator: torch.Generator) -> Crops:
    """Shrink to 0.4 to 0.9 of the side, anywhere on a plain ground or, for half of the rows, on another picture."""
    n = len(crops)
    side = 0.4 + 0.5 * torch.rand(n, generator=generator)
    shift = (2 * torch.rand(n, 2, generator=generator) - 1) * (1 - side)[:, None]  # of the centre, in half sides
    zero = torch.zeros(n)
    inverse = torch.stack([1 / side, zero, -shift[:, 0] / side, zero, 1 / side, -shift[:, 1] / side], dim=1)
    inside = _sampled(torch.ones_like(crops[:, :1]), inverse.view(n, 2, 3), "zeros")
    small = _sampled(crops, inverse.view(n, 2, 3), "zeros")
    other = crops.roll(1, dims=0)
    pasted = (torch.rand(n, generator=generator) < 0.5).to(crops.device)[:, None, None, None]
    return small + (1 - inside) * torch.where(pasted, other, _colors(n, generator).to(crops))


def write(crops: Crops, generator: torch.Generator) -> Crops:
    """Put a line or two of words upon it, in any colour."""
    masks = _writing(crops.shape[-1])
    chosen = masks[torch.randint(len(masks), (len(crops),), generator=generator)].to(crops)
    return torch.lerp(crops, _colors(len(crops), generator).to(crops), chosen)


def noise(crops: Crops, generator: torch.Generator) -> Crops:
    """Add Gaussian noise of up to half a deviation."""
    strength = 0.5 * torch.rand(len(crops), 1, 1, 1, generator=generator)
    return crops + (strength * torch.randn(crops.shape, generator=generator)).to(crops)


def compress(crops: Crops, generator: torch.Generator) -> Crops:
    """Round the cosine transform of blocks of 8 x 8 px, the fine detail more coarsely: what JPEG does.

    A rest of the side below 8 px stays as it is.
    """
    n, side = len(crops), crops.shape[-1] // 8 * 8
    basis = _cosines().to(crops)
    blocks = crops[..., :side, :side].unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2)
    frequency = torch.arange(8.0)
    strength = 0.05 + 0.25 * torch.rand(n, 1, 1, 1, 1, 1, generator=generator)
    step = ((1 + frequency[:, None] + frequency) * strength).to(crops)
    rounded = ((basis @ blocks @ basis.T) / step).round() * step
    result = crops.clone()
    result[..., :side, :side] = (basis.T @ rounded @ basis).transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)
    return result


def _sampled(crops: Tensor, inverse: Tensor, outside: str) -> Tensor:
    """Rows seen through affine maps from where they go to where they come from: (n, 2, 3)."""
    grid = F.affine_grid(inverse.to(crops), list(crops.shape), align_corners=False)
    return F.grid_sample(crops, grid, padding_mode=outside, align_corners=False)


def _colors(n: int, generator: torch.Generator) -> Tensor:
    """Plain colours in the range of normalised crops, (n, 3, 1, 1)."""
    return 4.5 * torch.rand(n, 3, 1, 1, generator=generator) - 2


def _cosines() -> Float[Tensor, "8 8"]:
    """The orthonormal cosine transform of 8 numbers."""
    k = torch.arange(8.0)
    basis = torch.cos(torch.pi / 8 * (k + 0.5) * k[:, None]) / 2
    basis[0] /= 2**0.5
    return basis


@lru_cache(maxsize=4)
def _writing(size: int) -> Float[Tensor, "TEXTS 1 size size"]:
    """Masks of random words, 1 = ink; the same for every run."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    masks = torch.zeros(TEXTS, 1, size, size)
    for mask in masks:
        picture = Image.new("L", (size, size))
        pen = ImageDraw.Draw(picture)
        for _ in range(draw(1, 3)):
            words = "".join(LETTERS[draw(0, len(LETTERS))] for _ in range(draw(3, 12)))
            font = ImageFont.load_default(max(size * draw(8, 25) // 100, 6))
            pen.text((draw(-size // 8, size // 2), draw(0, size * 4 // 5)), words, fill=255, font=font)
        mask[0] = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size) / 255
    return masks
