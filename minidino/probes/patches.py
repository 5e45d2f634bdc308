"""What single patches know: foreground and colours by PCA, matches between pictures, lengths of tokens, attention.

Numbers alone; minidino/looking.py draws them.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from minidino.model.vit import VisionTransformer
from minidino.probes.features import as_seen, expect_pixels, frozen

Array = np.ndarray | Tensor
PUBLISHED_OUTLIER = 150.0  # length of a token before the last norm, ViT-L and ViT-g
COLOR_RANGE = (1, 99)  # percentiles that become 0 and 1 of a colour


# ---------------------------------------------------------------- principal directions


class PcaBasis(NamedTuple):
    """Where the features lie and the directions in which they differ most; `explained` is each one's share."""

    mean: Float[np.ndarray, "D"]
    components: Float[np.ndarray, "n D"]
    explained: Float[np.ndarray, "n"]


def pca_basis(features: Array, n: int = 3) -> PcaBasis:
    """Find the n directions in which features differ most.

    Args:
        features: (m, D).
        n: how many; at most D.
    Returns:
        Rows of length 1, strongest first. The sign of each is fixed: its entry of largest magnitude is positive.
    """
    x = _float64(features)
    if x.ndim != 2 or not 1 <= n <= x.shape[1]:
        raise ValueError(f"expected features (m, D) and 1 <= n <= D, got {x.shape} and n = {n}")
    mean = x.mean(0)
    variance, directions = np.linalg.eigh((x - mean).T @ (x - mean))  # rising
    components = directions.T[::-1][:n]
    largest = np.abs(components).argmax(1)
    components = components * np.sign(components[np.arange(n), largest])[:, None]
    return PcaBasis(mean, components, variance[::-1][:n] / max(variance.sum(), 1e-300))


def patch_colors(features: Array, grid: tuple[int, int]) -> tuple[Float[np.ndarray, "n Hp Wp 3"], PcaBasis]:
    """Three components as red, green, blue: one basis and one scale (1st to 99th percentile) for all the images.

    Args:
        features: (n, N, D).
        grid: (Hp, Wp) with Hp * Wp = N.
    Returns:
        Colours in [0, 1], and the basis behind them.
    """
    features = _on_grid(features, grid)
    basis = pca_basis(features.reshape(-1, features.shape[2]), 3)
    scores = (features - basis.mean) @ basis.components.T
    return _scaled(scores).reshape(len(features), *grid, 3), basis


class ForegroundPca(NamedTuple):
    """What foreground_pca found on n images of N patches."""

    mask: Bool[np.ndarray, "n N"]  # True = foreground
    rgb: Float[np.ndarray, "n N 3"]  # in [0, 1]; background is black
    first: Float[np.ndarray, "n N"]  # score on the first direction; foreground is above the threshold
    first_basis: PcaBasis  # one direction, of all patches
    basis: PcaBasis  # three directions, of the foreground alone


def foreground_pca(features: Array, grid: tuple[int, int], threshold: float = 0.0) -> ForegroundPca:
    """Cut things out of their background and paint their parts, by two principal component analyses.

        first = (features - mean) . direction in which all patches differ most;  foreground: first > threshold
        rgb   = three directions in which the foreground patches differ most

    Both bases are shared by all images, so that equal colours mean equal parts; give images of one kind. A direction
    has no sign of its own. Here what fills the rim of the pictures is background: the mean of `first` over the
    outermost patches lies below the mean over the others. Where there are no others, or no difference, the largest
    entry of the direction is positive.

    Args:
        features: (n, N, D) patch features after the last norm, D >= 3.
        grid: (Hp, Wp) with Hp * Wp = N.
        threshold: in the units of the features; 0 is the mean of all patches.
    Raises:
        ValueError: shapes that do not fit, a feature that is not finite, or a threshold that leaves fewer than four
            patches of foreground, or no background.
    Source: DINOv2 paper, figure 1 and section 7.5 (PCA of patch features).
    Differs: the sign is chosen by a rule, not by eye; colours run from the 1st to the 99th percentile instead of from
        the smallest to the largest score, so that single patches do not set the scale.
    """
    x = _on_grid(features, grid)
    first_basis = pca_basis(x.reshape(-1, x.shape[2]), 1)
    first = (x - first_basis.mean) @ first_basis.components[0]  # (n, N)
    rim = _rim(grid)
    if not rim.all() and first[:, rim].mean() > first[:, ~rim].mean():
        first, first_basis = -first, first_basis._replace(components=-first_basis.components)
    mask = first > threshold
    if mask.sum() < 4 or mask.all():
        raise ValueError(
            f"expected 4 patches of foreground or more, and some background, got {mask.sum()} of {mask.size} patches "
            f"above the threshold {threshold:g}; scores run from {first.min():.3g} to {first.max():.3g}"
        )
    basis = pca_basis(x[mask], 3)
    rgb = np.zeros((*mask.shape, 3))
    rgb[mask] = _scaled((x[mask] - basis.mean) @ basis.components.T)
    return ForegroundPca(mask, rgb, first, first_basis, basis)


def _scaled(scores: Float[np.ndarray, "*m 3"]) -> Float[np.ndarray, "*m 3"]:
    """Each component over all patches from 0 to 1, cut at the percentiles of COLOR_RANGE."""
    low, high = np.percentile(scores, COLOR_RANGE, axis=tuple(range(scores.ndim - 1)))
    return np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)


def _rim(grid: tuple[int, int]) -> Bool[np.ndarray, "N"]:
    """The outermost patches of a grid."""
    rim = np.ones(grid, bool)
    rim[1:-1, 1:-1] = False
    return rim.ravel()


# ---------------------------------------------------------------- which patch is which


class Matches(NamedTuple):
    """Patch i of one picture belongs to patch j of the other; the most similar pair first."""

    i: Int[np.ndarray, "m"]
    j: Int[np.ndarray, "m"]
    similarity: Float[np.ndarray, "m"]  # cosine


def match_patches(
    a: Array,
    b: Array,
    method: Literal["mutual", "assignment"] = "mutual",
    foreground_a: Array | None = None,
    foreground_b: Array | None = None,
) -> Matches:
    """Find the patches of two pictures that show the same part.

    Args:
        a, b: (N, D) and (M, D) patch features; the pictures may differ in size.
        method: "mutual" keeps the pairs of which each is the other's nearest by cosine; "assignment" gives every patch
            of the smaller side a partner of its own, so that the sum of the Euclidean distances is smallest.
        foreground_a, foreground_b: (N,) and (M,) bool; only these patches are matched. None takes all.
    Returns:
        Indices into a and b, by falling cosine. Rows of zeros have cosine 0 to everything.
    Raises:
        ValueError: an unknown method, shapes that do not fit, no foreground, or a feature that is not finite.
    Source: DINOv2 paper, section 7.5 (patch matching): foreground by PCA, distances, linear assignment, then
        non-maximum suppression, which is `thinned_matches` here.
    """
    from scipy.optimize import linear_sum_assignment

    if method not in ("mutual", "assignment"):
        raise ValueError(f"unknown method {method!r}: expected 'mutual' or 'assignment'")
    a, b = _float64(a), _float64(b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"expected patch features (N, D) and (M, D) of one width, got {a.shape} and {b.shape}")
    rows, columns = _chosen(foreground_a, len(a), "foreground_a"), _chosen(foreground_b, len(b), "foreground_b")
    a, b = a[rows], b[columns]
    cosine = _unit(a) @ _unit(b).T
    if method == "mutual":
        back = cosine.argmax(0)
        i = np.flatnonzero(back[cosine.argmax(1)] == np.arange(len(a)))
        j = cosine[i].argmax(1)
    else:
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        i, j = linear_sum_assignment(np.sqrt(np.maximum(squares, 0)))
    order = np.argsort(-cosine[i, j], kind="stable")
    i, j = i[order], j[order]
    return Matches(rows[i], columns[j], cosine[i, j])


def thinned_matches(
    found: Matches, grid: tuple[int, int], radius: int = 1, grid_b: tuple[int, int] | None = None
) -> Matches:
    """Keep the best match of every neighbourhood (non-maximum suppression).

    From the most similar on, a match is dropped if a kept one begins or ends within `radius` of it.

    Args:
        found: from match_patches.
        grid: (Hp, Wp) of the first picture.
        radius: patches, along rows and columns alike; 0 drops nothing of "mutual" and "assignment".
        grid_b: of the second picture; None means the same grid.
    Raises:
        ValueError: a match outside its grid, or a radius below 0.
    """
    if radius < 0:
        raise ValueError(f"expected a radius of 0 patches or more, got {radius}")
    sides = (found.i, grid), (found.j, grid_b or grid)
    for index, side in sides:
        if len(index) and not 0 <= index.min() <= index.max() < math.prod(side):
            raise ValueError(f"expected patches from 0 to {math.prod(side) - 1} on the grid {side}, got {index.max()}")
    ends = [np.stack(np.unravel_index(index, side), 1) for index, side in sides]
    kept: list[int] = []
    for m in np.argsort(-found.similarity, kind="stable"):
        near = [np.abs(end[kept] - end[m]).max(1) <= radius for end in ends]
        if not kept or not (near[0] | near[1]).any():
            kept.append(int(m))
    return Matches(found.i[kept], found.j[kept], found.similarity[kept])


def _chosen(mask: Array | None, n: int, name: str) -> Int[np.ndarray, "k"]:
    """Which rows a mask leaves."""
    mask = np.ones(n, bool) if mask is None else _array(mask)
    if mask.shape != (n,) or mask.dtype != bool:
        raise ValueError(f"expected {name} of shape ({n},) and type bool, got {mask.shape} of {mask.dtype}")
    if not mask.any():
        raise ValueError(f"expected at least one patch in {name}, got none: there is nothing to match")
    return np.flatnonzero(mask)


# ---------------------------------------------------------------- how long tokens are


def token_norms(
    vit: VisionTransformer, images: UInt8[Tensor, "n C H W"], batch_size: int = 64
) -> dict[str, Float[np.ndarray, "n *t"]]:
    """Measure how long every token is as it leaves the last block, before the last norm makes them all alike.

    Args:
        vit: its training flags are restored afterwards.
        images: pixels, 0 to 255; normalised here.
        batch_size: images at a time.
    Returns:
        Euclidean lengths: "cls" (n,), "registers" (n, R), "patch" (n, N).
    Raises:
        ValueError: the images are not uint8 of shape (n, C, H, W), or there is none.
    Source: Darcet et al., Vision Transformers Need Registers, section 2; issues 293 and 373 of facebookresearch/dinov2.
    """
    expect_pixels(images)
    n_registers = vit.num_register_tokens
    with frozen(vit):
        tokens = (vit.forward_features(as_seen(vit, batch)).x_prenorm for batch in images.split(batch_size))
        lengths = np.concatenate([np.linalg.norm(_float64(batch), axis=-1) for batch in tokens])  # (n, T)
    return {"cls": lengths[:, 0], "registers": lengths[:, 1 : 1 + n_registers], "patch": lengths[:, 1 + n_registers :]}


class Outliers(NamedTuple):
    """Patches much longer than the others."""

    threshold: float  # longer than this
    share: float  # of all patches
    mask: Bool[np.ndarray, "n N"]
    where: Float[np.ndarray, "N"]  # share of the images in which the patch at this place is one


def outliers(norms: Array, threshold: float | None = None) -> Outliers:
    """Find the patches whose token is much longer than those of the others.

        threshold = exp(median + 6 * max(MAD, 0.01)) of the log lengths;  MAD: median distance from the median

    Lengths of one kind scatter evenly in their logarithm, and six MAD are four deviations of a normal law. The least
    MAD says that what is within 6 % of the median is never one.

    Args:
        norms: (n, N) lengths of patch tokens, `token_norms(...)["patch"]`.
        threshold: a length; None takes the rule above. PUBLISHED_OUTLIER is the paper's, for its large networks.
    Raises:
        ValueError: not (n, N), or lengths that are not above 0.
    Source: Darcet et al. 2023, section 2: 150 for DINOv2 ViT-g, read off a histogram with two humps; 2.4 % of patches.
    Differs: a rule for networks whose lengths are unknown. It always finds a threshold, whether there are two humps or
        a long tail: look at the histogram (looking.norm_histogram) before calling it an artefact.
    """
    norms = _float64(norms)
    if norms.ndim != 2 or norms.size == 0 or norms.min() <= 0:
        raise ValueError(f"expected lengths above 0 of shape (n, N), got shape {norms.shape}")
    if threshold is None:
        log = np.log(norms)
        spread = np.median(np.abs(log - np.median(log)))
        threshold = math.exp(np.median(log) + 6 * max(spread, 0.01))
    mask = norms > threshold
    return Outliers(threshold, float(mask.mean()), mask, mask.mean(0))


# ---------------------------------------------------------------- where tokens look


def attention_to(
    vit: VisionTransformer, images: UInt8[Tensor, "n C H W"], block: int = -1, token: int = 0
) -> Float[Tensor, "n h Hp Wp"]:
    """Tell which patches a token looks at, head by head; what it pays to class token and registers is left out.

    Args:
        vit: its training flags are restored afterwards.
        images: pixels, 0 to 255; normalised here.
        block: which one; -1 is the last.
        token: who looks: 0 the class token, 1 to R the registers, then the patches row by row.
    Returns:
        Float32 on the CPU; a map sums to at most 1.
    Raises:
        ValueError: the images are not uint8 of shape (n, C, H, W), or there is no such block or token.
    """
    expect_pixels(images)
    grid = images.shape[2] // vit.patch_size, images.shape[3] // vit.patch_size
    n_tokens = 1 + vit.num_register_tokens + math.prod(grid)
    if not -vit.depth <= block < vit.depth or not 0 <= token < n_tokens:
        raise ValueError(f"expected a block below {vit.depth} and a token below {n_tokens}, got {block} and {token}")
    with frozen(vit):
        maps = vit.attention_maps(as_seen(vit, images), block)  # (n, h, T, T)
    return maps[:, :, token, -math.prod(grid) :].unflatten(-1, grid).float().cpu()


def attended(maps: Float[Array, "n h Hp Wp"], share: float = 0.6) -> Bool[np.ndarray, "n h Hp Wp"]:
    """Mark the fewest patches that hold `share` of each map, the most looked-at ones.

    Args:
        maps: attention to the patches, at least 0, as from `attention_to`.
        share: between 0 and 1.
    Raises:
        ValueError: not (n, h, Hp, Wp), numbers below 0, a map of zeros, or a share that is not between 0 and 1.
    Source: Caron et al. 2021 (DINO), figure 4: 60 % of the mass; official dino/visualize_attention.py.
    """
    maps = _float64(maps)
    if maps.ndim != 4 or maps.size == 0 or maps.min() < 0 or (maps.sum((2, 3)) == 0).any():
        raise ValueError(f"expected maps (n, h, Hp, Wp) of numbers from 0 on, no map all zeros, got shape {maps.shape}")
    if not 0 < share < 1:
        raise ValueError(f"expected a share between 0 and 1, got {share}")
    flat = maps.reshape(*maps.shape[:2], -1)
    order = np.argsort(-flat, axis=2, kind="stable")
    ranked = np.take_along_axis(flat, order, 2)
    before = ranked.cumsum(2) - ranked  # what the patches looked at more hold already
    marked = np.zeros(flat.shape, bool)
    np.put_along_axis(marked, order, before < share * flat.sum(2, keepdims=True), 2)
    return marked.reshape(maps.shape)


class OnThings(NamedTuple):
    """How well a look and what there is to look at agree, for each picture and each head."""

    mass: Float[np.ndarray, "n h"]  # share of the look that falls on things
    jaccard: Float[np.ndarray, "n h"]  # of things and the patches that hold most of the look: both / either


def on_things(maps: Float[Array, "n h Hp Wp"], things: Bool[Array, "n H W"], share: float = 0.6) -> OnThings:
    """Hold where heads look against where things are, pixel by pixel; a patch counts for all of its pixels.

    Args:
        maps, share: as for `attended`.
        things: True where a pixel belongs to a thing; H and W are multiples of Hp and Wp.
    Returns:
        Looking everywhere alike has as mass the share of the pixels that are things, and so has marking all of them as
        Jaccard index. A picture without things has 0 and 0.
    Raises:
        ValueError: as `attended`; masks that are not bool, not as many as maps, or do not divide into the patches.
    Source: Caron et al. 2021 (DINO), figure 4, and issue 54 of facebookresearch/dino. There the head that agrees best
        with the truth counts, picture by picture: `jaccard.max(1)`.
    """
    marked, maps, things = attended(maps, share), _float64(maps), _array(things)
    n, _, rows, columns = maps.shape
    if things.dtype != bool or things.ndim != 3 or len(things) != n or things.shape[1] % rows or things.shape[2] % columns:
        raise ValueError(f"expected {n} masks (n, H, W) of type bool and a multiple of {rows} x {columns} px, got "
                         f"{things.shape} of {things.dtype}")  # fmt: skip
    height, width = things.shape[1] // rows, things.shape[2] // columns
    of_patch = things.reshape(n, 1, rows, height, columns, width).sum((3, 5))  # pixels of things in each patch
    mass = (maps * of_patch).sum((2, 3)) / (maps.sum((2, 3)) * height * width)
    both = (marked * of_patch).sum((2, 3))
    either = marked.sum((2, 3)) * height * width + of_patch.sum((2, 3)) - both
    return OnThings(mass, both / either)


# ---------------------------------------------------------------- rows


def _array(values: Array) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)


def _float64(features: Array) -> np.ndarray:
    """A float64 array of finite numbers."""
    x = _array(features).astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("the features hold NaN or infinity: the network that made them is broken")
    return x


def _on_grid(features: Array, grid: tuple[int, int]) -> Float[np.ndarray, "n N D"]:
    """Features in float64, N of them on each grid."""
    x = _float64(features)
    if x.ndim != 3 or x.shape[2] < 3:
        raise ValueError(f"expected patch features (n, N, D) with D >= 3, got {x.shape}")
    if x.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"expected {grid[0]} x {grid[1]} = {grid[0] * grid[1]} patches, got {x.shape[1]}")
    return x


def _unit(x: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    """Rows of length 1; rows of zeros stay zeros."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
