"""Figures of a run, and what all figures share. Each draws, saves a PNG when given a path, and returns its numbers.

What features know has its figures in looking.py.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from torch import Tensor

from minidino.images.crops import mean_and_std
from minidino.runs import atomic_path

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


def figure_of(rows: int, columns: int, height: float, title: str, layout: str | None = "constrained", **grid):
    """A figure of the one width, its axes as an array (rows, columns), and its title, which is a sentence."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no window, no backend to choose

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid)
    figure.suptitle(title, fontsize=12, parse_math=False)
    return figure, axes


def save(figure, path: str | Path | None) -> None:
    """Write a figure as PNG, its title inside the file as its description; None saves nothing."""
    if path is not None:
        with atomic_path(Path(path)) as beside:
            figure.savefig(beside, format="png", metadata={"Description": figure.get_suptitle()})


def tiles(rows: int, columns: int, title: str, aspect: float = 1.0, right: float = 0.995):
    """A figure of small pictures without ticks, each at most a fifth of it wide; aspect is height over width of one."""
    left, head, gap = 0.035, 0.55, 0.07  # fraction of the width, inches, fraction of a picture
    right = left + (right - left) * min(1, columns / 5)
    height = WIDTH * (right - left) / columns * rows * aspect + head
    margins = {"left": left, "right": right, "top": 1 - head / height, "bottom": 0.005}
    figure, axes = figure_of(rows, columns, height, title, layout=None, **margins, wspace=gap, hspace=gap)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)
    return figure, axes


def array_of(values: Array) -> np.ndarray:
    """The numbers of an array or of a tensor on any device."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def colors_last(images: Array) -> np.ndarray:
    """Images as (n, H, W, 3) in [0, 1], from uint8 or [0, 1] floats, channels first or, if three, last.

    Of more channels the first three are red, green and blue; of fewer the first is the grey.
    """
    images = array_of(images)
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(f"expected images of shape (n, C, H, W) or (n, H, W, 3), got {images.shape}")
    images = images if images.shape[3] == 3 else images.transpose(0, 2, 3, 1)
    images = images[..., :3] if images.shape[3] >= 3 else images[..., :1].repeat(3, axis=3)
    return np.clip(images / 255 if images.dtype == np.uint8 else images, 0, 1)


def _undo_normalise(crops: Array) -> np.ndarray:
    """Crops as the network sees them, back to (n, s, s, 3) in [0, 1]."""
    crops = array_of(crops)
    mean, std = mean_and_std(crops.shape[1], "cpu")
    return colors_last(crops * std.numpy() + mean.numpy())


def label_rows(axes: np.ndarray, labels: Sequence[str]) -> None:
    """Say at the left of each row of pictures what it shows."""
    for ax, label in zip(axes[:, 0], labels, strict=True):
        ax.set_ylabel(label)


def plain_numbers(axis) -> None:
    """Ticks of a logarithmic axis as 2, 5, 10 and not as powers; more of them within one power of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def wall(images: Array, title: str, path: str | Path | None = None, columns: int = 10) -> dict:
    """Draw many pictures side by side, row by row; returns how many."""
    figure, axes = tiles(math.ceil(len(images) / columns), columns, f"{title}: {len(images)} of them")
    for ax, picture in zip(axes.flat, colors_last(images)):
        ax.imshow(picture, interpolation="nearest")
    save(figure, path)
    return {"n": len(images)}


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
    Returns:
        "masked_frac" share of hidden patches per global crop; "n_global", "n_local".
    """
    globals_, locals_ = _undo_normalise(crops_global), _undo_normalise(crops_local)
    masks = array_of(masks).astype(bool)
    side = globals_.shape[1] // patch_size
    holes = masks.reshape(-1, side, side).repeat(patch_size, 1).repeat(patch_size, 2)[..., None]
    pictures = [("image", colors_last(array_of(image)[None])[0])]
    pictures += [(f"global {i + 1}: teacher", crop) for i, crop in enumerate(globals_)]
    student = np.where(holes, 0.5, globals_)
    pictures += [(f"global {i + 1}: student", crop) for i, crop in enumerate(student)]
    pictures += [(f"local {i + 1}: student", crop) for i, crop in enumerate(locals_)]
    columns = min(len(pictures), 5)
    title = f"The student sees {len(globals_)} large crops with holes and {len(locals_)} small ones of the same image"
    figure, axes = tiles(math.ceil(len(pictures) / columns), columns, title, aspect=1.2)
    for ax in axes.flat[len(pictures) :]:
        ax.set_visible(False)
    for ax, (name, picture) in zip(axes.flat, pictures, strict=False):
        ax.imshow(picture, interpolation="nearest")
        ax.set_title(f"{name}, {picture.shape[1]} px", fontsize=8)
    save(figure, path)
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
    Returns:
        "classes_seen" the values in the masks, "share" of the pixels of each, "depth_m" (nearest, farthest).
    """
    from matplotlib.colors import LogNorm, to_rgb

    pictures, masks, depth = colors_last(images), array_of(masks).astype(int), array_of(depth).astype(float)
    palette = np.array([to_rgb(color) for color in SEGMENTS])
    near, far = float(depth.min()), float(depth.max())
    figure, axes = tiles(3, len(pictures), "Every image comes with its class, its segments and its depth", right=0.92)
    for i, name in enumerate(classes):
        axes[0, i].set_title(name, fontsize=8)
        axes[0, i].imshow(pictures[i], interpolation="nearest")
        axes[1, i].imshow(palette[masks[i] % len(palette)], interpolation="nearest")
        shown = axes[2, i].imshow(depth[i], cmap="viridis_r", norm=LogNorm(near, far), interpolation="nearest")
    label_rows(axes, ("image", "segments", "depth"))
    last = axes[2, -1].get_position()
    figure.colorbar(shown, cax=figure.add_axes((last.x1 + 0.01, last.y0, 0.012, last.height)), label="depth (m)")
    save(figure, path)
    seen, counts = np.unique(masks, return_counts=True)
    return {"classes_seen": seen.tolist(), "share": (counts / masks.size).tolist(), "depth_m": (near, far)}


# ---------------------------------------------------------------- how it went


def training_curves(records: Sequence[dict], path: str | Path | None = None, ln_k: float | None = None) -> dict:
    """Draw what happened during a run, on one clock: the losses, the teacher's entropy against ln K, k-NN.

    Args:
        records: one dict per logged step with "seconds"; keys may lack in some records.
        ln_k: the entropy of a teacher without an opinion, nats.
    Returns:
        {key: (seconds, values)} of every curve: "dino", "ibot", "koleo", "teacher_entropy", "knn" where recorded.
    """
    curves = {}
    for key in ("dino", "ibot", "koleo", "teacher_entropy", "knn"):
        points = [(r["seconds"], r[key]) for r in records if r.get(key) is not None and r.get("seconds") is not None]
        if points:
            curves[key] = tuple(np.array(points, dtype=float).T)
    figure, axes = figure_of(3, 1, 6.5, _curves_title(curves), height_ratios=(2, 2, 1.5))
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
    save(figure, path)
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
        metric: what the axis says, in percent.
    Returns:
        "names", "means", "sds", from the best to the worst.
    """
    ranked = sorted(results.items(), key=lambda item: -item[1][0])
    names, means, sds = [n for n, _ in ranked], [m for _, (m, _) in ranked], [s for _, (_, s) in ranked]
    runner_up = f", {names[1]} {means[1]:.1%}" if len(names) > 1 else ""
    figure, axes = figure_of(1, 1, 0.45 * len(names) + 1.4, f"{names[0]} reaches {means[0]:.1%}{runner_up}")
    ax, places = axes[0, 0], np.arange(len(names))
    colors = [_color_of(name) for name in names]
    ax.barh(places, np.multiply(means, 100), xerr=np.multiply(sds, 100), color=colors, capsize=3)
    for place, mean, sd in zip(places, means, sds, strict=True):
        ax.annotate(f"{mean:.1%}", (100 * (mean + sd), place), (6, 0), textcoords="offset points", va="center")
    ax.set(yticks=places, yticklabels=names, xlabel=f"{metric} (%)", xlim=(0, max(110 * max(np.add(means, sds)), 1)))
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.3)
    save(figure, path)
    return {"names": names, "means": means, "sds": sds}


def shares(rows: Mapping[str, Mapping[str, tuple[float, int]]], path: str | Path | None = None, title: str = "") -> dict:
    """Draw how often features are right on each of several sets of pictures, with the standard error of a share.

    Args:
        rows: {set of pictures: {features: (share, pictures)}}, from the top down; colours as in `baselines_bar`.
        title: a sentence.
    Returns:
        {features: share of each set}.
    """
    found = {who: [row[who][0] for row in rows.values()] for who in next(iter(rows.values()))}
    figure, axes = figure_of(1, 1, 0.32 * len(rows) + 1.5, title)
    ax, places = axes[0, 0], np.arange(len(rows))
    shifts = np.linspace(-0.2, 0.2, len(found)) if len(found) > 1 else [0.0]
    for (who, values), shift, mark in zip(found.items(), shifts, cycle("osD^v")):  # two that nobody trained have one colour
        n = np.array([row[who][1] for row in rows.values()])
        spread = np.sqrt(np.multiply(values, np.subtract(1, values)) / np.maximum(n, 1))
        ax.errorbar(np.multiply(100, values), places + shift, xerr=100 * spread, fmt=mark, color=_color_of(who), label=who,
                    markersize=5, capsize=2)  # fmt: skip
    ax.set(yticks=places, yticklabels=list(rows), xlabel="top-1 (%)", xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    save(figure, path)
    return found


def _color_of(who: str) -> str:
    """Of features by their name; what nobody trained is grey."""
    return COLORS[next((word for word in ("trained", "random") if word in who.lower()), "pixels")]


def against_parameters(
    rows: Mapping[str, tuple[str, int, float, float]], path: str | Path | None = None, metric: str = "k-NN top-1"
) -> dict:
    """Draw what networks reach against how large they are.

    Args:
        rows: {name: (kind, parameters, fraction, its standard deviation or error)}; the kind gives the colour: one of
            those in COLORS, "teacher", "student" (taught by one) or "trained" (that learned alone).
        metric: what the axis says, in percent.
    Returns:
        {name: (parameters, fraction)}.
    """
    best = max(rows, key=lambda name: rows[name][2])
    students = {name: row for name, row in rows.items() if row[0] == "student"}
    taught = max(students or rows, key=lambda name: rows[name][2])
    title = f"{best} reaches {rows[best][2]:.1%}"
    if taught != best:
        fewer = rows[best][1] / rows[taught][1]
        title = f"{taught}: {rows[taught][2]:.1%}, {fewer:.1f} times fewer parameters than {best}, {rows[best][2]:.1%}"
    figure, axes = figure_of(1, 1, 4.2, title)
    ax = axes[0, 0]
    for name, (kind, n, share, sd) in rows.items():
        ax.errorbar(n, 100 * share, 100 * sd, fmt="o", color=COLORS[kind], capsize=3, markersize=8)
        ax.annotate(name, (n, 100 * share), (9, 0), textcoords="offset points", va="center", fontsize=9)
    sizes = [row[1] for row in rows.values()]
    ax.set(xscale="log", xlim=(min(sizes) / 1.3, max(sizes) * 2.2), xlabel="parameters of the backbone",
           ylabel=f"{metric} (%)")  # fmt: skip
    ax.grid(alpha=0.3)
    save(figure, path)
    return {name: (n, share) for name, (_, n, share, _) in rows.items()}


def severity_curves(found: Mapping[str, Mapping[str, Sequence[float]]], path: str | Path | None = None) -> dict:
    """Draw how accuracy falls when pictures are corrupted, kind by kind.

    Args:
        found: {features: {corruption: accuracy at severities 1 to 5}}, fractions; colours as in `baselines_bar`.
    Returns:
        {features: mean accuracy over all corruptions and severities}.
    """
    means = {who: float(np.mean(list(kinds.values()))) for who, kinds in found.items()}
    names = list(next(iter(found.values())))
    columns = min(5, len(names))
    best = max(means, key=means.get)
    title = f"Under corruption {best} reaches {means[best]:.1%} on average"
    rows = math.ceil(len(names) / columns)
    top = 1.05 * max(max(values) for kinds in found.values() for values in kinds.values())
    figure, axes = figure_of(rows, columns, 1.7 * rows + 1.2, title)
    for ax, name in zip(axes.flat, names, strict=False):
        for who, kinds in found.items():
            color = next((color for word, color in COLORS.items() if word in who.lower()), COLORS["limit"])
            ax.plot(range(1, len(kinds[name]) + 1), np.multiply(100, kinds[name]), "o-", color=color, label=who)
        ax.set_title(name.replace("_", " "), fontsize=9)
        ax.set(ylim=(0, 100 * top), xticks=range(1, 6))
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    figure.supxlabel("severity", fontsize=9)
    figure.supylabel("top-1 (%)", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower right", ncols=4, fontsize=8)
    save(figure, path)
    return means


def funnel(counts: dict[str, int], path: str | Path | None = None) -> dict:
    """Draw how many pictures each stage of curation left; returns the share of the first that is left at each."""
    names, left = list(counts), np.array(list(counts.values()))
    title = f"{left[-1]:,} of {left[0]:,} files are left after {names[-1]!r}"
    figure, axes = figure_of(1, 1, 0.45 * len(names) + 1.2, title)
    words = [name.replace("$", r"\$") for name in names]  # the name of a folder is no formula
    bars = axes[0, 0].barh(words, left, color=COLORS["trained"])
    axes[0, 0].bar_label(bars, [f"{n:,}" for n in left], padding=4)
    axes[0, 0].set(xlabel="pictures left", xlim=(0, 1.12 * left[0]))
    axes[0, 0].invert_yaxis()
    save(figure, path)
    return {"share": (left / left[0]).tolist()}


def grid_heatmap(table: Mapping[str, Mapping[float, float]], path: str | Path | None = None) -> dict:
    """Draw the accuracy of a grid of linear classifiers: what they read from, times the learning rate.

    Args:
        table: {what it reads: {learning rate: top-1 fraction}}, `linear_probe(...)["table"]` per row; rates that a row
            lacks stay white.
    Returns:
        "grid" (rows, rates) fractions, nan where there is none, "lrs" rising, "best" (name, learning rate, fraction).
    Raises:
        ValueError: an empty table.
    """
    names, lrs = list(table), sorted({lr for row in table.values() for lr in row})
    if not lrs:
        raise ValueError("expected at least one row with one learning rate, got none")
    grid = np.array([[table[name].get(lr, np.nan) for lr in lrs] for name in names], dtype=float)
    row, column = np.unravel_index(np.nanargmax(grid), grid.shape)
    best = names[row], lrs[column], float(grid[row, column])
    title = f"The best of {np.isfinite(grid).sum()} classifiers reads {best[0]} at a rate of {best[1]:g}: {best[2]:.1%}"
    figure, axes = figure_of(1, 1, 0.45 * len(names) + 1.5, title)
    ax = axes[0, 0]
    shown = ax.imshow(100 * grid, cmap="viridis", aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (y, x), value in np.ndenumerate(grid):
        if np.isfinite(value):
            ink, weight = "white" if value < middle else "black", "bold" if (y, x) == (row, column) else "normal"
            ax.text(x, y, f"{100 * value:.1f}", ha="center", va="center", fontsize=8, color=ink, weight=weight)
    ax.set(xticks=range(len(lrs)), xticklabels=[f"{lr:g}" for lr in lrs], yticks=range(len(names)), yticklabels=names)
    ax.tick_params("x", labelsize=7)  # thirteen rates stand side by side
    ax.set_xlabel("learning rate")
    figure.colorbar(shown, ax=ax, label="top-1 (%)")
    save(figure, path)
    return {"grid": grid, "lrs": lrs, "best": best}
