"""Figures of what features know: patches, attention, neighbours, segments, depth.

Each draws, saves a PNG when given a path, and returns the numbers it drew.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minidino.pictures import (
    COLORS,
    RIGHT,
    SEGMENTS,
    WRONG,
    array_of,
    colors_last,
    figure_of,
    label_rows,
    plain_numbers,
    save,
    tiles,
)
from minidino.probes.patches import ForegroundPca, Matches, outliers, patch_colors

Array = np.ndarray | Tensor
TOKENS = {"patch": "#56B4E9", "registers": "#E69F00", "cls": "#332288"}  # colours that pictures.COLORS leaves free
LINES = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")  # Okabe and Ito
UNKNOWN = (1.0, 1.0, 1.0)  # pixels of which the truth is not known


# ---------------------------------------------------------------- patches in colour


def foreground_rgb(
    images: Array, found: ForegroundPca, grid: tuple[int, int], path: str | Path | None = None
) -> dict[str, np.ndarray | float]:
    """Draw images, what of them is foreground, and its parts in colour: figure 1 of the paper.

    Args:
        images: (n, 3, H, W) or (n, H, W, 3), uint8 or [0, 1]; what is no foreground is drawn pale.
        found: from probes.patches.foreground_pca.
        grid: (Hp, Wp) of the patches.
    Returns:
        "rgb" (n, Hp, Wp, 3) in [0, 1], "mask" (n, Hp, Wp) bool, "share" of the patches that are foreground, "explained"
        share of the variance of the foreground per colour.
    """
    pictures = colors_last(images)
    mask, rgb = found.mask.reshape(-1, *grid), found.rgb.reshape(-1, *grid, 3)
    row, column = (np.arange(side) * n // side for side, n in zip(pictures.shape[1:3], grid))  # the patch of a pixel
    cut = np.where(mask[:, row][:, :, column, None], pictures, 1 - (1 - pictures) / 5)
    share, explained = float(mask.mean()), found.basis.explained
    title = f"{share:.0%} of the patches are foreground; three directions hold {explained.sum():.0%} of its variance"
    _picture_rows([("image", pictures), ("foreground", cut), ("its parts", rgb)], title, path)
    return {"rgb": rgb, "mask": mask, "share": share, "explained": explained}


def pca_rgb(patch_features: Array, grid: tuple[int, int], images: Array, path: str | Path | None = None) -> dict:
    """Paint every patch by the three directions in which patch features differ most: equal colour, equal feature.

    Args:
        patch_features: (n, N, D).
        grid: (Hp, Wp) with Hp * Wp = N.
        images: (n, 3, H, W) or (n, H, W, 3), uint8 or [0, 1].
    Returns:
        "rgb" (n, Hp, Wp, 3) in [0, 1], "components" (3, D), "explained" share of variance per component.
    Source: DINOv2 paper, figure 1.
    Differs: three components over all patches; the paper first cuts out the foreground with the first component.
    """
    rgb, basis = patch_colors(patch_features, grid)
    title = f"Three directions hold {basis.explained.sum():.0%} of what tells patches apart"
    _picture_rows([("image", colors_last(images)), ("patch features", rgb)], title, path)
    return {"rgb": rgb, "components": basis.components, "explained": basis.explained}


def pca_before_after(
    images: Array, before: Array, after: Array, grid: tuple[int, int], path: str | Path | None = None
) -> dict:
    """Paint patch features of the same images before and after training, each network in its own three directions.

    Args:
        images: (n, 3, H, W) or (n, H, W, 3), uint8 or [0, 1].
        before, after: (n, N, D) patch features of the untrained and of the trained network.
        grid: (Hp, Wp) with Hp * Wp = N.
    Returns:
        "before", "after": (n, Hp, Wp, 3) in [0, 1]; "explained_before", "explained_after": share per component.
    Source: DINOv2 paper, figure 1.
    """
    old, old_basis = patch_colors(before, grid)
    new, new_basis = patch_colors(after, grid)
    rows = [("image", colors_last(images)), ("random", old), ("trained", new)]
    shares = old_basis.explained.sum(), new_basis.explained.sum()
    title = "Three directions hold {:.0%} of what tells patches apart before training, {:.0%} after it".format(*shares)
    _picture_rows(rows, title, path)
    return {
        "before": old,
        "after": new,
        "explained_before": old_basis.explained,
        "explained_after": new_basis.explained,
    }


def _picture_rows(rows: Sequence[tuple[str, np.ndarray]], title: str, path: str | Path | None) -> None:
    n, height, width, _ = rows[0][1].shape
    figure, axes = tiles(len(rows), n, title, aspect=height / width)
    for line, (_, pictures) in zip(axes, rows, strict=True):
        for ax, picture in zip(line, pictures, strict=True):
            ax.imshow(picture, interpolation="nearest")
    label_rows(axes, [name for name, _ in rows])
    save(figure, path)


# ---------------------------------------------------------------- where it looks, what it finds alike


def attention_maps(images: Array, attn: Float[Array, "n h Hp Wp"], path: str | Path | None = None) -> dict:
    """Draw where the class token looks, head by head.

    Args:
        images: (n, 3, H, W) or (n, H, W, 3), uint8 or [0, 1].
        attn: (n, h, Hp, Wp) attention of the class token to the patches.
    Returns:
        "entropy" (n, h) nats of each map scaled to sum 1, and "uniform", the entropy of looking everywhere alike.
    """
    pictures, attn = colors_last(images), array_of(attn).astype(np.float64)
    shares = attn / attn.sum((2, 3), keepdims=True)
    spread = -(shares * np.log(np.maximum(shares, 1e-300))).sum((2, 3))
    uniform = math.log(attn.shape[2] * attn.shape[3])
    title = f"A head looks at {np.exp(spread).mean():.0f} of {attn.shape[2] * attn.shape[3]} patches on average"
    figure, axes = tiles(1 + attn.shape[1], len(pictures), title, aspect=pictures.shape[1] / pictures.shape[2])
    for i, picture in enumerate(pictures):
        axes[0, i].imshow(picture, interpolation="nearest")
        for head in range(attn.shape[1]):
            axes[1 + head, i].imshow(shares[i, head], cmap="magma", vmin=0, interpolation="nearest")
    label_rows(axes, ["image"] + [f"head {head + 1}" for head in range(attn.shape[1])])
    save(figure, path)
    return {"entropy": spread, "uniform": uniform}


def neighbours_wall(
    queries: Array,
    bank: Array,
    index: Int[Array, "q k"],
    query_labels: Int[Array, "q"],
    bank_labels: Int[Array, "m"],
    path: str | Path | None = None,
) -> dict[str, Bool[np.ndarray, "q k"] | float]:
    """Draw queries and their nearest neighbours, framed green where the class agrees and red where it does not.

    Args:
        queries: (q, 3, H, W) or (q, H, W, 3) images.
        bank: all the images that index points into.
        index: (q, k) positions in the bank, nearest first.
        query_labels, bank_labels: classes.
    Returns:
        "right" (q, k) bool and "share" of the neighbours that agree.
    """
    index = array_of(index)
    right = array_of(bank_labels)[index] == array_of(query_labels)[:, None]
    title = f"{right.mean():.0%} of the {index.shape[1]} nearest neighbours show the class of the query"
    figure, axes = tiles(len(index), 1 + index.shape[1], title)
    for row, query in enumerate(colors_last(queries)):
        axes[row, 0].imshow(query, interpolation="nearest")
        for column, picture in enumerate(colors_last(array_of(bank)[index[row]])):
            ax = axes[row, 1 + column]
            ax.imshow(picture, interpolation="nearest")
            for spine in ax.spines.values():
                spine.set(visible=True, linewidth=3, color=RIGHT if right[row, column] else WRONG)
    axes[0, 0].set_title("query", fontsize=8)
    save(figure, path)
    return {"right": right, "share": float(right.mean())}


# ---------------------------------------------------------------- which patch is which


def matches(
    image_a: Array,
    image_b: Array,
    found: Matches,
    grid: tuple[int, int],
    path: str | Path | None = None,
    most: int = 30,
    grid_b: tuple[int, int] | None = None,
) -> dict[str, np.ndarray | int]:
    """Draw lines between the patches of two pictures that belong together.

    Args:
        image_a, image_b: (3, H, W) or (H, W, 3), uint8 or [0, 1]; the two may differ in size.
        found: from probes.patches.match_patches, the most similar first.
        grid: (Hp, Wp) of the first picture.
        most: lines, the most similar ones; neighbouring lines differ in colour.
        grid_b: of the second picture; None means the same grid.
    Returns:
        "n" lines drawn, "a" and "b" (n, 2) their ends as x, y in pixels of each picture, "similarity" (n,).
    Raises:
        ValueError: there is no match.
    """
    from matplotlib.patches import ConnectionPatch
    from matplotlib.patheffects import Normal, Stroke

    n = min(most, len(found.i))
    if n < 1:
        raise ValueError("expected at least one match to draw, got none")
    pictures = [colors_last(array_of(image)[None])[0] for image in (image_a, image_b)]
    ends = [
        _patch_centres(index[:n], side, picture.shape[:2])
        for index, side, picture in zip((found.i, found.j), (grid, grid_b or grid), pictures)
    ]
    similarity = found.similarity[:n]
    title = f"The best {n} of {len(found.i)} matches: cosines from {similarity[0]:.2f} down to {similarity[-1]:.2f}"
    ratios = [picture.shape[1] / picture.shape[0] for picture in pictures]
    figure, axes = figure_of(1, 2, 8.0 / sum(ratios) + 0.6, title, width_ratios=ratios)
    for ax, picture, name in zip(axes[0], pictures, ("first picture", "second picture")):
        ax.imshow(picture, interpolation="nearest")
        ax.set(xticks=[], yticks=[], xlabel=name)
    for place, m in enumerate(np.lexsort((ends[0][:, 0], ends[0][:, 1]))):  # from top to bottom
        color, (a, b) = LINES[place % len(LINES)], (end[m] for end in ends)
        halo = [Stroke(linewidth=3.2, foreground="black", alpha=0.6), Normal()]
        line = ConnectionPatch(a, b, "data", axesA=axes[0, 0], axesB=axes[0, 1], color=color, linewidth=1.6)
        line.set(path_effects=halo, in_layout=False)
        figure.add_artist(line)
        for ax, end in zip(axes[0], (a, b)):
            ax.plot(*end, "o", color=color, markersize=5, markeredgecolor="black")
    save(figure, path)
    return {"n": n, "a": ends[0], "b": ends[1], "similarity": similarity}


def _patch_centres(
    index: Int[np.ndarray, "m"], grid: tuple[int, int], size: tuple[int, int]
) -> Float[np.ndarray, "m 2"]:
    """x, y of patches in the pixels of their picture."""
    row, column = np.divmod(index, grid[1])
    return np.stack([(column + 0.5) * size[1] / grid[1] - 0.5, (row + 0.5) * size[0] / grid[0] - 0.5], axis=1)


# ---------------------------------------------------------------- how long tokens are


def norm_histogram(
    norms: Mapping[str, Array], path: str | Path | None = None, grid: tuple[int, int] | None = None
) -> dict[str, float | np.ndarray]:
    """Draw how long tokens are before the last norm, and where in the pictures the long ones lie.

    Args:
        norms: from probes.patches.token_norms; kinds without tokens are left out.
        grid: (Hp, Wp) of the patches; None takes a square.
    Returns:
        "median" of the patches, "threshold" above which a patch is an outlier by the rule of `outliers`, their
        "share", "mean_map" (Hp, Wp), and "counts" {kind: tokens per bin} with the "edges" of the bins.
    Raises:
        ValueError: the patches form no square and no grid is given.
    """
    kinds = {name: array_of(norms[name]).astype(float) for name in TOKENS if name in norms}
    kinds = {name: values for name, values in kinds.items() if values.size}
    patch = kinds["patch"]
    side = math.isqrt(patch.shape[1])
    grid = grid or (side, side)
    if grid[0] * grid[1] != patch.shape[1]:
        raise ValueError(f"expected a grid of {patch.shape[1]} patches, got {grid[0]} x {grid[1]}: give grid")
    found, median, mean_map = outliers(patch), float(np.median(patch)), patch.mean(0).reshape(grid)
    every = np.concatenate([values.ravel() for values in kinds.values()])
    edges = np.geomspace(0.95 * every.min(), 1.05 * max(every.max(), found.threshold), 61)
    title = f"{found.share:.2%} of the patch tokens are longer than {found.threshold:.3g}; half are below {median:.3g}"
    figure, axes = figure_of(1, 2, 3.6, title, width_ratios=(5, 3))
    left, right = axes[0]
    counts = {}
    for name, values in kinds.items():
        label = f"{name} ({values.size:,})"
        counts[name], *_ = left.hist(
            values.ravel(), edges, label=label, color=TOKENS[name], histtype="step", linewidth=1.8
        )
    left.axvline(found.threshold, color=COLORS["limit"], linestyle=":", label="outlier: longer than this")
    left.set(xscale="log", yscale="log", xlabel="length of the token before the last norm", ylabel="tokens")
    left.set_ylim(bottom=0.7)
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, frameon=False)
    plain_numbers(left.xaxis)
    shown = right.imshow(mean_map, cmap="magma", interpolation="nearest")
    right.set(xlabel="column of patches", ylabel="row of patches")
    for axis in (right.xaxis, right.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.colorbar(shown, ax=right, label="mean length at this place")
    save(figure, path)
    return {"median": median, "threshold": found.threshold, "share": found.share, "mean_map": mean_map,
            "counts": counts, "edges": edges}  # fmt: skip


# ---------------------------------------------------------------- truth and prediction


def segmentation_sheet(
    images: Array,
    truth: Array,
    predicted: Array,
    class_names: Sequence[str],
    path: str | Path | None = None,
    ignore: int = -1,
) -> dict[str, float | list]:
    """Draw images, what every pixel shows, and what it was taken for, with the names of the classes that occur.

    Args:
        images: (n, 3, H, W) or (n, H, W, 3), uint8 or [0, 1].
        truth, predicted: (n, h, w) int classes, of one shape; h and w may be smaller than H and W.
        class_names: one name per class.
        ignore: truth of this class is unknown; it is drawn white and not judged.
    Returns:
        "accuracy" share of the known pixels shown that are named rightly, "per_image" the same for each (nan where
        nothing is known), "classes_seen" the classes in truth and prediction.
    Raises:
        ValueError: shapes that do not fit, a class without a name, or nothing known.
    """
    pictures, truth, predicted = colors_last(images), array_of(truth).astype(int), array_of(predicted).astype(int)
    _expect_maps(pictures, truth, predicted)
    known = truth != ignore
    if not known.any():
        raise ValueError(f"all pixels are {ignore}, which says unknown: nothing to judge")
    seen, counts = np.unique(np.concatenate([truth[known], predicted[predicted != ignore]]), return_counts=True)
    if seen[0] < 0 or seen[-1] >= len(class_names):
        raise ValueError(f"expected classes from 0 to {len(class_names) - 1}, got {seen[0]} to {seen[-1]}")
    right = (truth == predicted) & known
    accuracy, palette = float(right.sum() / known.sum()), _class_colors(len(class_names))
    title = f"{accuracy:.1%} of the pixels of these {len(pictures)} pictures are named rightly"
    figure, axes = tiles(3, len(pictures), title, aspect=pictures.shape[1] / pictures.shape[2], right=0.84)
    painted = [np.where((x == ignore)[..., None], UNKNOWN, palette[x]) for x in (truth, predicted)]
    for line, row in zip(axes, (pictures, *painted)):
        for ax, picture in zip(line, row):
            ax.imshow(picture, interpolation="nearest")
    label_rows(axes, ("image", "truth", "prediction"))
    _class_legend(figure, axes, [(class_names[k], palette[k]) for k in seen], counts, not known.all())
    save(figure, path)
    with np.errstate(invalid="ignore"):
        per_image = right.sum((1, 2)) / known.sum((1, 2))
    return {"accuracy": accuracy, "per_image": per_image.tolist(), "classes_seen": seen.tolist()}


def depth_sheet(
    images: Array, truth: Array, predicted: Array, path: str | Path | None = None
) -> dict[str, float | tuple[float, float]]:
    """Draw images, how far away every pixel is, and how far it was thought to be, in the same colours.

    Args:
        images: (n, 3, H, W) or (n, H, W, 3), uint8 or [0, 1].
        truth, predicted: (n, h, w) metres, of one shape; truth that is no number above 0 is unknown and drawn white.
    Returns:
        "rmse_m" root mean square error over the known pixels shown, "known" their share, "depth_m" (nearest, farthest)
        of the truth, which are the ends of the colours.
    Raises:
        ValueError: shapes that do not fit, nothing known, or a prediction that is not finite.
    """
    from matplotlib.colors import LogNorm

    pictures, truth, predicted = colors_last(images), array_of(truth).astype(float), array_of(predicted).astype(float)
    _expect_maps(pictures, truth, predicted)
    known = np.isfinite(truth) & (truth > 0)
    if not known.any() or not np.isfinite(predicted).all():
        raise ValueError(f"expected finite predictions and some truth above 0 m, got {known.sum()} known pixels")
    near, far = float(truth[known].min()), float(truth[known].max())
    rmse = float(np.sqrt(np.mean((predicted - truth)[known] ** 2)))
    title = f"The predicted distances are {rmse:.2g} m off (RMSE); the true ones go from {near:.2g} to {far:.2g} m"
    figure, axes = tiles(3, len(pictures), title, aspect=pictures.shape[1] / pictures.shape[2], right=0.9)
    scale = LogNorm(near, max(far, 1.001 * near), clip=True)
    for i, picture in enumerate(pictures):
        axes[0, i].imshow(picture, interpolation="nearest")
        for row, depth in ((1, np.ma.array(truth[i], mask=~known[i])), (2, predicted[i])):
            shown = axes[row, i].imshow(depth, cmap="viridis_r", norm=scale, interpolation="nearest")
    label_rows(axes, ("image", "truth", "prediction"))
    low, high = axes[2, -1].get_position(), axes[1, -1].get_position()
    place = figure.add_axes((low.x1 + 0.012, low.y0 + 0.02, 0.012, high.y1 - low.y0 - 0.02))  # room for its last tick
    figure.colorbar(shown, cax=place, label="depth (m)")
    plain_numbers(place.yaxis)
    save(figure, path)
    return {"rmse_m": rmse, "known": float(known.mean()), "depth_m": (near, far)}


def _expect_maps(pictures: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> None:
    if truth.ndim != 3 or truth.shape != predicted.shape or len(truth) != len(pictures):
        raise ValueError(
            f"expected truth and prediction (n, h, w) for {len(pictures)} images, got {truth.shape} and "
            f"{predicted.shape}; bring both to one size first"
        )


def _class_colors(n: int) -> Float[np.ndarray, "n 3"]:
    """One colour per class: those of the drawn scenes, then hues that keep their distance."""
    from matplotlib.colors import hsv_to_rgb, to_rgb

    more = [hsv_to_rgb((0.618 * k % 1, (0.85, 0.5)[k % 2], (0.9, 0.65, 0.4)[k % 3])) for k in range(n - len(SEGMENTS))]
    return np.array([*map(to_rgb, SEGMENTS[:n]), *more])


def _class_legend(
    figure, axes: np.ndarray, entries: Sequence[tuple[str, np.ndarray]], counts: np.ndarray, with_unknown: bool
) -> None:
    """A column of names at the right of the pictures; where it is too short, the classes with the most pixels."""
    from matplotlib.patches import Patch

    top = axes[0, -1].get_position()
    most = int(top.y1 * figure.get_figheight() / 0.17) - 2  # a line of the legend is 0.17 inches high
    kept = sorted(np.argsort(-counts, kind="stable")[:most])
    words = [name.replace("$", r"\$") for name, _ in entries]  # the name of a class is no formula
    handles = [Patch(facecolor=entries[k][1], edgecolor=COLORS["pixels"], label=words[k]) for k in kept]
    if with_unknown:
        handles.append(Patch(facecolor=UNKNOWN, edgecolor=COLORS["pixels"], label="unknown"))
    if len(kept) < len(entries):
        handles.append(Patch(alpha=0, label=f"and {len(entries) - len(kept)} more"))
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(top.x1 + 0.005, top.y1), fontsize=8,
                  frameon=False, borderaxespad=0)  # fmt: skip
