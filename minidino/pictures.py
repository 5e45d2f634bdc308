"""Every figure of the project. Each function draws, saves a PNG when given a path, and returns the numbers it drew."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minidino.images.crops import IMAGENET_MEAN, IMAGENET_STD

Array = np.ndarray | Tensor

# Okabe and Ito: told apart by colour-blind eyes too. A colour means the same thing in every figure.
COLORS = {
    "student": "#0072B2",
    "teacher": "#D55E00",
    "trained": "#009E73",
    "random": "#CC79A7",
    "pixels": "#8C8C8C",
    "limit": "#000000",
}
RIGHT, WRONG = COLORS["trained"], COLORS["teacher"]
SEGMENTS = (  # sky, ground, hill, stone, then the ten kinds of object
    *("#88CCEE", "#C8C0A0", "#8DA37A", "#8C8C8C"),
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#332288", "#F0E442", "#882255", "#44AA99", "#000000"),
)
WIDTH = 9.0  # inches, of every figure
DPI = 100


# ---------------------------------------------------------------- paper and pencil


def _figure(rows: int, columns: int, height: float, title: str, layout: str | None = "constrained", **grid):
    """A figure of the one width, its axes as an array (rows, columns), and its title, which is a sentence."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no window, no backend to choose

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid)
    figure.suptitle(title, fontsize=12)
    return figure, axes


def _save(figure, path: str | Path | None) -> None:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", metadata={"Description": figure.get_suptitle()})


def _wall(rows: int, columns: int, title: str, aspect: float = 1.0, right: float = 0.995):
    """A figure of small pictures without ticks, each at most a fifth of it wide; aspect is height over width of one."""
    left, head, gap = 0.035, 0.55, 0.07  # fraction of the width, inches, fraction of a picture
    right = left + (right - left) * min(1, columns / 5)
    height = WIDTH * (right - left) / columns * rows * aspect + head
    margins = {"left": left, "right": right, "top": 1 - head / height, "bottom": 0.005}
    figure, axes = _figure(rows, columns, height, title, layout=None, **margins, wspace=gap, hspace=gap)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)
    return figure, axes


def _array(values: Array) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _colors_last(images: Array) -> np.ndarray:
    """Images as (n, H, W, 3) in [0, 1], from uint8 or [0, 1] floats, channels first or last."""
    images = _array(images)
    if images.ndim != 4 or 3 not in (images.shape[1], images.shape[3]):
        raise ValueError(f"expected images of shape (n, 3, H, W) or (n, H, W, 3), got {images.shape}")
    images = images if images.shape[3] == 3 else images.transpose(0, 2, 3, 1)
    return np.clip(images / 255 if images.dtype == np.uint8 else images, 0, 1)


def _undo_normalise(crops: Array) -> np.ndarray:
    """Crops as the network sees them, back to (n, s, s, 3) in [0, 1]."""
    crops = _array(crops).transpose(0, 2, 3, 1)
    return np.clip(crops * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN), 0, 1)


def _label_rows(axes: np.ndarray, labels: Sequence[str]) -> None:
    for ax, label in zip(axes[:, 0], labels, strict=True):
        ax.set_ylabel(label)


# ---------------------------------------------------------------- what the student sees


def crops_and_masks(
    image: Array, crops_global: Array, crops_local: Array, masks: Array, patch_size: int, path: str | Path | None = None
) -> dict:
    """Draw one image, its crops, and the holes that the student has to fill.

    Args:
        image: (3, H, W) uint8.
        crops_global, crops_local: (G, 3, s, s) and (L, 3, s', s'), normalised as the network gets them.
        masks: (G, N) bool, True = hidden from the student.
        patch_size: pixels.
        path: where the PNG goes; None draws without saving.
    Returns:
        "masked_frac" share of hidden patches per global crop; "n_global", "n_local".
    """
    globals_, locals_ = _undo_normalise(crops_global), _undo_normalise(crops_local)
    masks = _array(masks).astype(bool)
    side = globals_.shape[1] // patch_size
    holes = masks.reshape(-1, side, side).repeat(patch_size, 1).repeat(patch_size, 2)[..., None]
    pictures = [("image", _colors_last(_array(image)[None])[0])]
    pictures += [(f"global {i + 1}: teacher", crop) for i, crop in enumerate(globals_)]
    student = np.where(holes, 0.5, globals_)
    pictures += [(f"global {i + 1}: student", crop) for i, crop in enumerate(student)]
    pictures += [(f"local {i + 1}: student", crop) for i, crop in enumerate(locals_)]
    columns = min(len(pictures), 5)
    title = f"The student sees {len(globals_)} large crops with holes and {len(locals_)} small ones of the same image"
    figure, axes = _wall(math.ceil(len(pictures) / columns), columns, title, aspect=1.2)
    for ax in axes.flat[len(pictures) :]:
        ax.set_visible(False)
    for ax, (name, picture) in zip(axes.flat, pictures, strict=False):
        ax.imshow(picture, interpolation="nearest")
        ax.set_title(f"{name}, {picture.shape[1]} px", fontsize=8)
    _save(figure, path)
    return {"masked_frac": masks.mean(1).tolist(), "n_global": len(globals_), "n_local": len(locals_)}


def scenes_sheet(
    images: Array, masks: Array, depth: Array, classes: Sequence[str], path: str | Path | None = None
) -> dict:
    """Draw images above the truth that comes with them: what every pixel shows and how far away it is.

    Args:
        images: (n, 3, H, W) or (n, H, W, 3), uint8 or [0, 1].
        masks: (n, H, W) int, the class of each pixel as in images/scenes.py.
        depth: (n, H, W) metres.
        classes: the name to write above each image.
        path: where the PNG goes; None draws without saving.
    Returns:
        "classes_seen" the values in the masks, "share" of the pixels of each, "depth_m" (nearest, farthest).
    """
    from matplotlib.colors import LogNorm, to_rgb

    pictures, masks, depth = _colors_last(images), _array(masks).astype(int), _array(depth).astype(float)
    palette = np.array([to_rgb(color) for color in SEGMENTS])
    near, far = float(depth.min()), float(depth.max())
    figure, axes = _wall(3, len(pictures), "Every image comes with its class, its segments and its depth", right=0.92)
    for i, name in enumerate(classes):
        axes[0, i].set_title(name, fontsize=8)
        axes[0, i].imshow(pictures[i], interpolation="nearest")
        axes[1, i].imshow(palette[masks[i] % len(palette)], interpolation="nearest")
        shown = axes[2, i].imshow(depth[i], cmap="viridis_r", norm=LogNorm(near, far), interpolation="nearest")
    _label_rows(axes, ("image", "segments", "depth"))
    last = axes[2, -1].get_position()
    figure.colorbar(shown, cax=figure.add_axes((last.x1 + 0.01, last.y0, 0.012, last.height)), label="depth (m)")
    _save(figure, path)
    seen, counts = np.unique(masks, return_counts=True)
    return {"classes_seen": seen.tolist(), "share": (counts / masks.size).tolist(), "depth_m": (near, far)}


# ---------------------------------------------------------------- how it went


def training_curves(records: Sequence[dict], path: str | Path | None = None, ln_k: float | None = None) -> dict:
    """Draw what happened during a run, on one clock: the losses, the teacher's entropy against ln K, k-NN.

    Args:
        records: one dict per logged step with "seconds"; keys may lack in some records.
        path: where the PNG goes; None draws without saving.
        ln_k: the entropy of a teacher without an opinion, nats.
    Returns:
        {key: (seconds, values)} of every curve: "dino", "ibot", "koleo", "teacher_entropy", "knn" where recorded.
    """
    curves = {}
    for key in ("dino", "ibot", "koleo", "teacher_entropy", "knn"):
        points = [(r["seconds"], r[key]) for r in records if r.get(key) is not None and r.get("seconds") is not None]
        if points:
            curves[key] = tuple(np.array(points, dtype=float).T)
    figure, axes = _figure(3, 1, 6.5, _curves_title(curves), height_ratios=(2, 2, 1.5))
    losses, target, judge = axes[:, 0]
    for key, style in (("dino", "-"), ("ibot", "--"), ("koleo", ":")):
        if key in curves:
            losses.plot(*curves[key], style, color=COLORS["student"], linewidth=1.2, label=key)
    if "teacher_entropy" in curves:
        target.plot(*curves["teacher_entropy"], color=COLORS["teacher"], linewidth=1.2, label="teacher")
    if ln_k is not None:
        target.axhline(ln_k, color=COLORS["limit"], linestyle=":", label=f"ln K = {ln_k:.2f}")
    if "knn" in curves:
        judge.plot(curves["knn"][0], 100 * curves["knn"][1], "o-", color=COLORS["trained"], markersize=4)
    losses.set_ylabel("loss (nats)")
    target.set(ylabel="entropy (nats)", ylim=(0, None))
    judge.set(ylabel="k-NN top-1 (%)", xlabel="time since the start (s)")
    for ax in axes.flat:
        ax.sharex(losses)
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    _save(figure, path)
    return curves


def _curves_title(curves: dict) -> str:
    if "knn" in curves and len(curves["knn"][1]) > 1:
        (seconds, values) = curves["knn"]
        return f"In {seconds[-1] - seconds[0]:.0f} s k-NN went from {values[0]:.1%} to {values[-1]:.1%}"
    if "dino" in curves:
        return f"The DINO loss went from {curves['dino'][1][0]:.2f} to {curves['dino'][1][-1]:.2f} nats"
    return "Nothing but the clock was recorded"


def baselines_bar(
    results: dict[str, tuple[float, float]], path: str | Path | None = None, metric: str = "k-NN top-1"
) -> dict:
    """Draw what the trained features reach beside what needs no training.

    Args:
        results: {name: (mean, standard deviation)} as fractions; the colour follows the word "trained" or "random"
            in the name, everything else is a descriptor that nobody trained.
        path: where the PNG goes; None draws without saving.
        metric: what the axis says, in percent.
    Returns:
        "names", "means", "sds", from the best to the worst.
    """
    ranked = sorted(results.items(), key=lambda item: -item[1][0])
    names, means, sds = [n for n, _ in ranked], [m for _, (m, _) in ranked], [s for _, (_, s) in ranked]
    runner_up = f", {names[1]} {means[1]:.1%}" if len(names) > 1 else ""
    figure, axes = _figure(1, 1, 0.45 * len(names) + 1.4, f"{names[0]} reaches {means[0]:.1%}{runner_up}")
    ax, places = axes[0, 0], np.arange(len(names))
    colors = [COLORS[next((word for word in ("trained", "random") if word in n.lower()), "pixels")] for n in names]
    ax.barh(places, np.multiply(means, 100), xerr=np.multiply(sds, 100), color=colors, capsize=3)
    for place, mean, sd in zip(places, means, sds, strict=True):
        ax.annotate(f"{mean:.1%}", (100 * (mean + sd), place), (6, 0), textcoords="offset points", va="center")
    ax.set(yticks=places, yticklabels=names, xlabel=f"{metric} (%)", xlim=(0, 110 * max(np.add(means, sds))))
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.3)
    _save(figure, path)
    return {"names": names, "means": means, "sds": sds}


def funnel(counts: dict[str, int], path: str | Path | None = None) -> dict:
    """Draw how many pictures each stage of curation left; returns the share of the first that is left at each."""
    names, left = list(counts), np.array(list(counts.values()))
    title = f"{left[-1]:,} of {left[0]:,} files are left after {names[-1]!r}"
    figure, axes = _figure(1, 1, 0.45 * len(names) + 1.2, title)
    bars = axes[0, 0].barh(names, left, color=COLORS["trained"])
    axes[0, 0].bar_label(bars, [f"{n:,}" for n in left], padding=4)
    axes[0, 0].set(xlabel="pictures left", xlim=(0, 1.12 * left[0]))
    axes[0, 0].invert_yaxis()
    _save(figure, path)
    return {"share": (left / left[0]).tolist()}


# ---------------------------------------------------------------- what the features know


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
    x = _array(features).astype(np.float64)
    if x.ndim != 2 or not 1 <= n <= x.shape[1]:
        raise ValueError(f"expected features (m, D) and 1 <= n <= D, got {x.shape} and n = {n}")
    mean = x.mean(0)
    variance, directions = np.linalg.eigh((x - mean).T @ (x - mean))  # rising
    components = directions.T[::-1][:n]
    largest = np.abs(components).argmax(1)
    components = components * np.sign(components[np.arange(n), largest])[:, None]
    return PcaBasis(mean, components, variance[::-1][:n] / max(variance.sum(), 1e-300))


def _rgb(patch_features: Array, grid: tuple[int, int]) -> tuple[np.ndarray, PcaBasis]:
    """Three components as red, green, blue: one basis and one scale (1st to 99th percentile) for all the images."""
    features = _array(patch_features).astype(np.float64)
    n, n_patches, width = features.shape
    if n_patches != grid[0] * grid[1]:
        raise ValueError(f"expected {grid[0]} x {grid[1]} = {grid[0] * grid[1]} patches, got {n_patches}")
    basis = pca_basis(features.reshape(-1, width), 3)
    scores = (features - basis.mean) @ basis.components.T
    low, high = np.percentile(scores, (1, 99), axis=(0, 1))
    scaled = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    return scaled.reshape(n, *grid, 3), basis


def pca_rgb(patch_features: Array, grid: tuple[int, int], images: Array, path: str | Path | None = None) -> dict:
    """Paint every patch by the three directions in which patch features differ most: equal colour, equal feature.

    Args:
        patch_features: (n, N, D).
        grid: (Hp, Wp) with Hp * Wp = N.
        images: (n, 3, H, W) or (n, H, W, 3), uint8 or [0, 1].
        path: where the PNG goes; None draws without saving.
    Returns:
        "rgb" (n, Hp, Wp, 3) in [0, 1], "components" (3, D), "explained" share of variance per component.
    Source: DINOv2 paper, figure 1.
    Differs: three components over all patches; the paper first cuts out the foreground with the first component.
    """
    rgb, basis = _rgb(patch_features, grid)
    title = f"Three directions hold {basis.explained.sum():.0%} of what tells patches apart"
    _picture_rows([("image", _colors_last(images)), ("patch features", rgb)], title, path)
    return {"rgb": rgb, "components": basis.components, "explained": basis.explained}


def pca_before_after(
    images: Array, before: Array, after: Array, grid: tuple[int, int], path: str | Path | None = None
) -> dict:
    """Paint patch features of the same images before and after training, each network in its own three directions.

    Args:
        images: (n, 3, H, W) or (n, H, W, 3), uint8 or [0, 1].
        before, after: (n, N, D) patch features of the untrained and of the trained network.
        grid: (Hp, Wp) with Hp * Wp = N.
        path: where the PNG goes; None draws without saving.
    Returns:
        "before", "after": (n, Hp, Wp, 3) in [0, 1]; "explained_before", "explained_after": share per component.
    Source: DINOv2 paper, figure 1.
    """
    old, old_basis = _rgb(before, grid)
    new, new_basis = _rgb(after, grid)
    rows = [("image", _colors_last(images)), ("random", old), ("trained", new)]
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
    figure, axes = _wall(len(rows), len(rows[0][1]), title)
    for line, (_, pictures) in zip(axes, rows, strict=True):
        for ax, picture in zip(line, pictures, strict=True):
            ax.imshow(picture, interpolation="nearest")
    _label_rows(axes, [name for name, _ in rows])
    _save(figure, path)


def attention_maps(images: Array, attn: Float[Array, "n h Hp Wp"], path: str | Path | None = None) -> dict:
    """Draw where the class token looks, head by head.

    Args:
        images: (n, 3, H, W) or (n, H, W, 3), uint8 or [0, 1].
        attn: (n, h, Hp, Wp) attention of the class token to the patches.
        path: where the PNG goes; None draws without saving.
    Returns:
        "entropy" (n, h) nats of each map scaled to sum 1, and "uniform", the entropy of looking everywhere alike.
    """
    pictures, attn = _colors_last(images), _array(attn).astype(np.float64)
    shares = attn / attn.sum((2, 3), keepdims=True)
    spread = -(shares * np.log(np.maximum(shares, 1e-300))).sum((2, 3))
    uniform = math.log(attn.shape[2] * attn.shape[3])
    title = f"A head looks at {np.exp(spread).mean():.0f} of {attn.shape[2] * attn.shape[3]} patches on average"
    figure, axes = _wall(1 + attn.shape[1], len(pictures), title)
    for i, picture in enumerate(pictures):
        axes[0, i].imshow(picture, interpolation="nearest")
        for head in range(attn.shape[1]):
            axes[1 + head, i].imshow(shares[i, head], cmap="magma", vmin=0, interpolation="nearest")
    _label_rows(axes, ["image"] + [f"head {head + 1}" for head in range(attn.shape[1])])
    _save(figure, path)
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
        path: where the PNG goes; None draws without saving.
    Returns:
        "right" (q, k) bool and "share" of the neighbours that agree.
    """
    index = _array(index)
    right = _array(bank_labels)[index] == _array(query_labels)[:, None]
    title = f"{right.mean():.0%} of the {index.shape[1]} nearest neighbours show the class of the query"
    figure, axes = _wall(len(index), 1 + index.shape[1], title)
    for row, query in enumerate(_colors_last(queries)):
        axes[row, 0].imshow(query, interpolation="nearest")
        for column, picture in enumerate(_colors_last(_array(bank)[index[row]])):
            ax = axes[row, 1 + column]
            ax.imshow(picture, interpolation="nearest")
            for spine in ax.spines.values():
                spine.set(visible=True, linewidth=3, color=RIGHT if right[row, column] else WRONG)
    axes[0, 0].set_title("query", fontsize=8)
    _save(figure, path)
    return {"right": right, "share": float(right.mean())}


def wall(images: Array, title: str, path: str | Path | None = None, columns: int = 10) -> dict:
    """Draw many pictures side by side, row by row; returns how many."""
    figure, axes = _wall(math.ceil(len(images) / columns), columns, f"{title}: {len(images)} of them")
    for ax, picture in zip(axes.flat, _colors_last(images)):
        ax.imshow(picture, interpolation="nearest")
    _save(figure, path)
    return {"n": len(images)}
