"""Drawn scenes: a small world with an answer for every pixel.

Each scene shows two to four things of one kind (ten kinds) standing on a ground under a sky. Colour, pattern, pose,
scale, light and camera are nuisance, drawn by one law for all kinds, so that a colour histogram knows nothing and raw
pixels little; what stays is shape and surface. Camera height, pitch and focal length are free, so that the image row
does not tell the depth. A scene depends on (seed, index) alone; numpy only, no download.

    row of the ground at depth z:  y = horizon + focal * camera_height / z        (image heights, 0 = top)
    height of a thing at depth z:  focal * metres / z

Mask classes: 0 sky, 1 ground, 2 hill, 3 stone, 4 + k a thing of kind k. Depth in metres, capped at FAR.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

FAR = 40.0  # metres: sky and hills
N_THINGS = 4  # at most, in a scene
SMALLEST, TALLEST = 0.35, 0.8  # heights of things, fractions of the picture
GRAIN = 0.15  # deviation of the grey grain of every picture: it drowns gradients, not colours
MUTED = (0.42, 0.2)  # landscape colours lie between the first and the sum; things are more vivid
N_UNIFORMS = 320  # random numbers set aside for a scene
TEST_WORLD = 1000  # added to the seed of a world: scenes that no training ever sees
GROUND, HILL, STONE, FIRST_KIND = 1, 2, 3, 4
SLOT_A, SLOT_B, DARK, LIGHT = range(4)  # paints of a thing: two free colours and two accents

Array = np.ndarray
Part = tuple[Array, int]  # signed distance in thing heights (negative inside), paint slot


@dataclass(frozen=True)
class Scenes:
    """n drawn scenes of side S px: images (n, S, S, 3) uint8, labels (n,) int64, masks (n, S, S) uint8,
    depth (n, S, S) float32 in metres."""

    images: Array
    labels: Array
    masks: Array
    depth: Array

    def __len__(self) -> int:
        return len(self.labels)


# -- shapes: signed distances in the thing's own frame, u to the right, v upwards, v = 0 foot, v = 1 top ---------------


def _disc(u: Array, v: Array, cu, cv, radius) -> Array:
    return np.hypot(u - cu, v - cv) - radius


def _box(u: Array, v: Array, cu, cv, half_u, half_v, corner=0.0) -> Array:
    a, b = np.abs(u - cu) - half_u + corner, np.abs(v - cv) - half_v + corner
    return np.hypot(np.maximum(a, 0), np.maximum(b, 0)) + np.minimum(np.maximum(a, b), 0) - corner


def _triangle(u: Array, v: Array, foot, tip, half_width) -> Array:
    height = tip - foot
    side = (height * np.abs(u) + half_width * (v - tip)) / np.hypot(height, half_width)
    return np.maximum(foot - v, side)


def _union(*parts: Array) -> Array:
    return np.minimum.reduce(np.broadcast_arrays(*parts))


def _painted(shape: Array, pattern: Array) -> Part:
    """The second colour where the pattern is negative, kept inside the shape."""
    return np.maximum(shape + 0.02, pattern), SLOT_B


def _waves(x: Array, frequency: float, phase: Array) -> Array:
    return np.sin(frequency * x + 6.283 * phase)


def _turned(u: Array, v: Array, turn: Array) -> tuple[Array, Array]:
    """Coordinates of a surface pattern that lies at any angle."""
    c, s = np.cos(0.8 * turn - 0.4), np.sin(0.8 * turn - 0.4)
    return c * u - s * v, s * u + c * v


def _tree(u: Array, v: Array, p: Array) -> list[Part]:
    crown = _union(_disc(u, v, 0.1 * p[0] - 0.05, 0.68, 0.3), _disc(u, v, -0.24, 0.5 + 0.1 * p[1], 0.2),
                   _disc(u, v, 0.24, 0.6 - 0.1 * p[1], 0.21))  # fmt: skip
    s, t = _turned(u, v, p[4])
    dots = 0.35 - _waves(s, 34, p[2]) * _waves(t, 34, p[3])
    return [(_box(u, v, 0, 0.2, 0.07, 0.22), SLOT_B), (crown, SLOT_A), _painted(crown, 0.03 * dots)]


def _pine(u: Array, v: Array, p: Array) -> list[Part]:
    tiers = _union(_triangle(u, v, 0.14, 0.58, 0.34 + 0.1 * p[0]), _triangle(u, v, 0.38, 0.8, 0.28 + 0.08 * p[0]),
                   _triangle(u, v, 0.62, 1.0, 0.2 + 0.06 * p[1]))  # fmt: skip
    s, t = _turned(u, v, p[4])
    zigzag = _waves(t + 0.35 * np.abs((5 * s + p[2]) % 1 - 0.5), 30, p[3]) - 0.1
    return [(_box(u, v, 0, 0.1, 0.06, 0.1), SLOT_B), (tiers, SLOT_A), _painted(tiers, 0.03 * zigzag)]


def _house(u: Array, v: Array, p: Array) -> list[Part]:
    wall = _box(u, v, 0, 0.28, 0.34 + 0.1 * p[0], 0.28)
    s, t = _turned(u, v, p[4])
    course = 18 * t + 6.283 * p[2]
    shift = 1.57 * (np.floor(course / 3.1416) % 2)
    mortar = np.maximum(np.abs(np.sin(course)), np.abs(np.sin(11 * s + 6.283 * p[3] + shift))) - 0.86
    roof = _triangle(u, v, 0.52, 0.86 + 0.14 * p[1], 0.48 + 0.1 * p[0])
    return [(wall, SLOT_A), _painted(wall, -0.04 * mortar), (roof, SLOT_B),
            (_box(u, v, -0.17, 0.17, 0.09, 0.17), DARK), (_box(u, v, 0.16, 0.32, 0.1, 0.1), LIGHT)]  # fmt: skip


def _mushroom(u: Array, v: Array, p: Array) -> list[Part]:
    cap = np.maximum(_disc(u, v, 0, 0.42, 0.46 + 0.1 * p[0]), 0.42 - v)
    spots = _union(_disc(u, v, -0.3 + 0.1 * p[1], 0.56, 0.1), _disc(u, v, 0.2 + 0.1 * p[2], 0.55, 0.11),
                   _disc(u, v, -0.02, 0.78, 0.09))  # fmt: skip
    return [(_box(u, v, 0, 0.22, 0.09 + 0.07 * p[3], 0.24, 0.05), SLOT_B), (cap, SLOT_A),
            (np.maximum(cap + 0.02, spots), LIGHT)]  # fmt: skip


def _car(u: Array, v: Array, p: Array) -> list[Part]:
    def wheels(radius: float) -> Array:
        return _union(_disc(u, v, -0.36, 0.16, radius), _disc(u, v, 0.36, 0.16, radius))

    body = _box(u, v, 0, 0.33, 0.6, 0.17, 0.07)
    roof = 0.06 * p[0]
    panes = _union(_box(u, v, -0.2 + roof, 0.6, 0.11, 0.1), _box(u, v, 0.12 + roof, 0.6, 0.11, 0.1))
    return [(_box(u, v, roof - 0.04, 0.6, 0.36, 0.2, 0.1), SLOT_B), (body, SLOT_A),
            _painted(body, np.abs(v - 0.28 - 0.1 * p[1]) - 0.035), (panes, LIGHT), (wheels(0.17), DARK),
            (wheels(0.07), LIGHT)]  # fmt: skip


def _flower(u: Array, v: Array, p: Array) -> list[Part]:
    radius, angle = np.hypot(u, v - 0.64), np.arctan2(v - 0.64, u)
    petals = 0.6 * (radius - 0.24 - 0.12 * np.cos(6 * angle + 6.283 * p[0]))
    leaf = np.hypot(0.7 * (u - 0.14), 1.6 * (v - 0.14 - 0.1 * p[1])) - 0.11
    stem = _box(u, v, 0, 0.25, 0.04, 0.25)
    return [(stem, SLOT_B), (leaf, SLOT_B), (petals, SLOT_A), (radius - 0.1 - 0.05 * p[2], SLOT_B)]


def _cactus(u: Array, v: Array, p: Array) -> list[Part]:
    low, high = 0.3 + 0.12 * p[0], 0.42 + 0.12 * p[1]
    body = _union(_box(u, v, 0, 0.48, 0.14, 0.5, 0.14),
                  _box(u, v, 0.25, low, 0.18, 0.07, 0.07), _box(u, v, 0.38, low + 0.17, 0.08, 0.22, 0.08),
                  _box(u, v, -0.25, high, 0.18, 0.07, 0.07), _box(u, v, -0.38, high + 0.15, 0.08, 0.2, 0.08))
    s, _ = _turned(u, v, p[4])
    return [(body, SLOT_A), _painted(body, (np.abs((9 * s + p[2]) % 1 - 0.5) - 0.2) / 9)]


def _ball(u: Array, v: Array, p: Array) -> list[Part]:
    cu, cv = 0.2 * (p[0] - 0.5), 0.45 + 0.2 * (p[1] - 0.5)
    disc = _disc(u, v, 0, 0.45, 0.44)
    wedges = -np.sin(3 * np.arctan2(v - cv, u - cu) + 6.283 * p[2]) * np.hypot(u, v - 0.45) / 3
    return [(disc, SLOT_A), _painted(disc, wedges), (_disc(u, v, cu, cv, 0.07), LIGHT)]


def _flag(u: Array, v: Array, p: Array) -> list[Part]:
    sway = 0.05 * _waves(u, 9, p[0])
    cloth = _box(u - 0.36, v + sway, 0, 0.72, 0.36, 0.2 + 0.06 * p[1])
    s, t = _turned(u, v + sway, p[4])
    checks = _waves(s, 20, p[2]) * _waves(t, 20, p[3])
    return [(cloth, SLOT_A), _painted(cloth, 0.04 * checks), (_box(u, v, 0, 0.5, 0.045, 0.5), DARK),
            (_disc(u, v, 0, 0.97, 0.07), LIGHT)]  # fmt: skip


def _snowman(u: Array, v: Array, p: Array) -> list[Part]:
    body = _union(_disc(u, v, 0, 0.25, 0.24 + 0.06 * p[0]), _disc(u, v, 0, 0.58, 0.2), _disc(u, v, 0, 0.8, 0.14))
    s, t = _turned(u, v, p[4])
    bands = np.maximum(0.02 * _waves(t + 0.03 * _waves(s, 20, p[2]), 40, p[1]), v - 0.66)
    hat = _union(_box(u, v, 0, 0.9, 0.2, 0.025), _box(u, v, 0, 0.97, 0.12, 0.08))
    eyes = _union(_disc(u, v, -0.06, 0.8, 0.03), _disc(u, v, 0.06, 0.8, 0.03))
    return [(body, SLOT_A), _painted(body, bands), (_union(hat, eyes), DARK)]


SHAPES: dict[str, Callable[[Array, Array, Array], list[Part]]] = {
    "tree": _tree, "pine": _pine, "house": _house, "mushroom": _mushroom, "car": _car, "flower": _flower,
    "cactus": _cactus, "ball": _ball, "flag": _flag, "snowman": _snowman,
}  # fmt: skip
KINDS = tuple(SHAPES)
MASK_CLASSES = ("sky", "ground", "hill", "stone", *KINDS)


# -- the law of a scene -----------------------------------------------------------------------------------------------


class _Draw:
    """The random numbers of m scenes, taken column by column, always in the same order."""

    def __init__(self, uniforms: Array):
        self.uniforms, self.used = uniforms, 0

    def __len__(self) -> int:
        return len(self.uniforms)

    def between(self, low: float = 0.0, high: float = 1.0, n: int | None = None) -> Array:
        """Uniform numbers shaped to meet pixels: (m, 1, 1), or (n, m, 1, 1)."""
        columns = self.uniforms[:, self.used : self.used + (n or 1)].T[..., None, None]
        self.used += n or 1
        return low + (high - low) * (columns if n else columns[0])

    def palette(self, n_colors: int, n_candidates: int = 5) -> Array:
        """(n_colors, m, 1, 1, 3): each colour the farthest of five candidates from those chosen before it."""
        numbers = self.between(0.08, 0.95, n=3 * n_colors * n_candidates)
        options = numbers.reshape(n_colors, n_candidates, 3, len(self)).transpose(0, 3, 1, 2)
        chosen = [options[0, :, 0]]
        for color in options[1:]:
            distance = np.min([np.linalg.norm(color - c[:, None], axis=-1) for c in chosen], axis=0)
            chosen.append(color[np.arange(len(self)), distance.argmax(1)])
        return np.stack(chosen)[:, :, None, None]


@dataclass
class _Canvas:
    """m half-drawn scenes and their camera."""

    image: Array  # (m, S, S, 3) float32
    mask: Array  # (m, S, S) uint8
    depth: Array  # (m, S, S) float32, metres
    horizon: Array  # row, image heights
    height: Array  # camera above the ground, metres
    focal: Array  # image heights
    light: Array  # -1 from the left, 1 from the right

    def frame(self, tall: Array, metres: Array, column: Array) -> tuple[Array, Array, Array]:
        """Where each pixel lies in the frame of a thing `tall` image heights high: du, dv; and the thing's depth."""
        ruler = (np.arange(self.mask.shape[1], dtype=np.float32) + 0.5) / self.mask.shape[1]
        foot = self.horizon + self.height * tall / metres
        return (ruler[None, None] - column) / tall, (foot - ruler[None, :, None]) / tall, self.focal * metres / tall

    def paint(self, color: Array, alpha: Array) -> None:
        self.image += alpha[..., None] * (color - self.image)

    def cover(self, inside: Array, label: int, depth: Array) -> None:
        self.mask[inside] = label
        self.depth[inside] = np.broadcast_to(depth, inside.shape)[inside]


def _landscape(draw: _Draw, size: int) -> _Canvas:
    """Sky, hills, ground and three stones."""
    ruler = (np.arange(size, dtype=np.float32) + 0.5) / size
    y, x = ruler[None, :, None], ruler[None, None, :]
    # The rows of the farthest and nearest feet are drawn; camera height and horizon follow from them.
    far_row = draw.between(0.45, 0.8)
    near_row = far_row + draw.between(0.1, 1) * (1.08 - far_row)
    height = (near_row - far_row) / (TALLEST - SMALLEST)
    horizon, focal = far_row - height * SMALLEST, draw.between(0.8, 1.3)
    colors = MUTED[0] + MUTED[1] * draw.palette(4)
    ground = y + 0 * x > horizon
    ridge = horizon - draw.between(0.02, 0.16) * (0.6 + 0.4 * _waves(x, 7, draw.between()))
    hill = (y > ridge) & ~ground
    image = np.where(ground[..., None], colors[1], np.where(hill[..., None], colors[2], colors[0]))
    image = image * (1 + draw.between(-0.3, 0.3) * (y - horizon) + 0 * x)[..., None]
    depth = np.where(ground, np.minimum(focal * height / np.maximum(y - horizon, 1e-3), FAR), np.float32(FAR))
    canvas = _Canvas(image, np.where(ground, GROUND, np.where(hill, HILL, 0)).astype(np.uint8), depth, horizon,
                     height, focal, draw.between(-1, 1))  # fmt: skip
    for _ in range(3):
        du, dv, z = canvas.frame(draw.between(0.06, 0.16), np.float32(0.3), draw.between())
        stone = np.hypot(du * draw.between(0.5, 1), dv - 0.2) - 0.5
        alpha = np.clip(0.5 - stone * 0.1 * size, 0, 1) * ground * (dv > 0)
        canvas.paint(colors[3] * (0.8 + 0.4 * np.clip(dv, 0, 1))[..., None], alpha)
        canvas.cover(alpha > 0.5, STONE, z)
    return canvas


def _place(canvas: _Canvas, draw: _Draw, kind: int, tall: Array, column: Array, on: Array) -> None:
    """One thing of this kind in each scene where `on` is 1."""
    metres = draw.between(0.85, 1.15)
    du, dv, z = canvas.frame(tall, metres, column)
    shadow = 0.45 * np.exp(-(((du - 0.15 * canvas.light) / 0.4) ** 2) - (dv / 0.08) ** 2)
    canvas.image *= 1 - (shadow * on * (canvas.mask == GROUND))[..., None]
    lean, mirror = draw.between(-0.3, 0.3), np.where(draw.between() < 0.5, np.float32(-1), np.float32(1))
    u = (np.cos(lean) * du - np.sin(lean) * dv) * mirror / draw.between(0.8, 1.2)
    v = np.sin(lean) * du + np.cos(lean) * dv
    shade = (1 + 0.25 * canvas.light * np.clip(2 * du, -1, 1) + 0.12 * (v - 0.5))[..., None]
    dark, light, swap = draw.between(0.05, 0.3), draw.between(0.7, 0.95), draw.between() < 0.5
    grey = np.stack([np.where(swap, light, dark), np.where(swap, dark, light)])[..., None] * np.ones(3, np.float32)
    paints = np.concatenate([draw.palette(2), grey])
    inside = np.zeros_like(canvas.depth)
    for distance, slot in SHAPES[KINDS[kind]](u, v, draw.between(n=5)):
        alpha = np.clip(0.5 - distance * tall * canvas.mask.shape[1], 0, 1) * on
        canvas.paint(np.clip(paints[slot] * shade, 0, 1), alpha)
        np.maximum(inside, alpha, out=inside)
    canvas.cover(inside > 0.5, FIRST_KIND + kind, z)


def _draw_kind(kind: int, draw: _Draw, size: int) -> _Canvas:
    canvas = _landscape(draw, size)
    count = np.floor(draw.between(2, N_THINGS + 1))
    heights = SMALLEST + (TALLEST - SMALLEST) * np.sort(draw.between(n=N_THINGS), axis=0)  # far things first
    spread = 0.382 * np.arange(N_THINGS, dtype=np.float32).reshape(-1, 1, 1, 1)  # keeps things apart
    columns = (draw.between() + spread + draw.between(-0.08, 0.08, n=N_THINGS)) % 1
    for j in range(N_THINGS):
        on = (j >= N_THINGS - count).astype(np.float32)
        _place(canvas, draw, kind, heights[j], columns[j], on)
    ruler = np.linspace(-1, 1, size, dtype=np.float32)
    slant = 1 + draw.between(-0.1, 0.1) * ruler[None, None] + draw.between(-0.1, 0.1) * ruler[None, :, None]
    canvas.image *= (draw.between(0.9, 1.0) * slant)[..., None]
    return canvas


def draw_scenes(
    n: int, size: int = 64, seed: int = 0, start: int = 0, chunk: int = 256, grain: float = GRAIN
) -> Scenes:
    """Draw the scenes start ... start + n - 1 of one world.

    Args:
        n: number of scenes.
        size: side, px; shapes are resolution-free, 32 and more is legible.
        seed: the world; scene i of a seed is the same picture whatever n, start and chunk are.
        start: index of the first scene.
        chunk: scenes drawn together; only memory and speed depend on it.
        grain: deviation of the grey grain, in units of full brightness.
    Raises:
        ValueError: n or size below 1, a negative seed or start.
    """
    if min(n, size) < 1 or min(seed, start) < 0:
        raise ValueError(f"expected n, size >= 1 and seed, start >= 0, got {n}, {size}, {seed}, {start}")
    return draw_some(np.arange(start, start + n), size, seed, chunk, grain)


def draw_some(indices: Array, size: int = 64, seed: int = 0, chunk: int = 256, grain: float = GRAIN) -> Scenes:
    """Draw these scenes of one world; arguments as for `draw_scenes`."""
    n = len(indices)
    out = Scenes(np.empty((n, size, size, 3), np.uint8), np.empty(n, np.int64), np.empty((n, size, size), np.uint8),
                 np.empty((n, size, size), np.float32))  # fmt: skip

    def fill(low: int) -> None:
        rows = slice(low, min(low + chunk, n))
        part = _draw_chunk(indices[rows], size, seed, grain)
        for name in ("images", "labels", "masks", "depth"):
            getattr(out, name)[rows] = getattr(part, name)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy lets go of the interpreter while it computes
        list(pool.map(fill, range(0, n, chunk)))
    return out


def scene_kinds(indices: Array, seed: int = 0) -> Array:
    """The labels of scenes that need not be drawn for it."""
    first = [_generator(seed, i).random(1, np.float32)[0] for i in indices]
    return (np.array(first, np.float32) * len(KINDS)).astype(np.int64)


def _generator(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, int(index)]))


def _draw_chunk(indices: Array, size: int, seed: int, grain: float) -> Scenes:
    generators = [_generator(seed, i) for i in indices]
    uniforms = np.stack([g.random(N_UNIFORMS, np.float32) for g in generators])
    noise = grain * np.stack([g.standard_normal((size, size, 1), np.float32) for g in generators])
    labels = (uniforms[:, 0] * len(KINDS)).astype(np.int64)
    images = np.empty((len(indices), size, size, 3), np.uint8)
    masks, depth = np.empty(images.shape[:3], np.uint8), np.empty(images.shape[:3], np.float32)
    for kind in np.unique(labels):
        here = np.flatnonzero(labels == kind)
        canvas = _draw_kind(int(kind), _Draw(uniforms[here, 1:]), size)
        images[here] = np.clip(255 * (canvas.image + noise[here]), 0, 255).astype(np.uint8)
        masks[here], depth[here] = canvas.mask, canvas.depth
    return Scenes(images, labels, masks, depth)
