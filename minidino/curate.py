"""The curation stage: the networks that the pipeline asks for, then its pictures and its report.

    pool -> CopyNet, trained on it -> curation/pipeline.py -> manifest.csv, funnel.png, walls, report.html
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm import tqdm

from minidino import pictures
from minidino.curation.duplicates import COPY, LEAK, component_sizes
from minidino.curation.embeddings import network, seen
from minidino.curation.pipeline import Curation, Describer
from minidino.engine import pick_engine
from minidino.images.pixels import Pixels, some
from minidino.judge import is_run, trained_backbone
from minidino.learning.copies import CopyDescriptor, CopyNet, train_copies
from minidino.model.weights import backbone_of
from minidino.probes.features import state_hash
from minidino.ranges import require
from minidino.report import Section, write_report
from minidino.runs import Run, alone_in, expect_no_run, pick_device, write_atomically

COPY_SIZE, COPY_STEPS, COPY_BATCH = 64, 600, 96
WHITENING = 20_000  # pictures that the whitening is learned from
SHORT_SIDE = 112  # px, of decoded pictures at least
SSCD_SIZE = 288  # px, of the squares that the published models were evaluated on, trained at 224


def curate(
    pool: str | Path,
    out: str | Path,
    queries: str | Path | None = None,
    protect: Sequence[str | Path] = (),
    budget: int | None = None,
    features: str | Path | None = None,
    copies: str | Path | None = None,
    n_neighbours: int = 4,
    n_clusters: int | None = None,
    copy_steps: int = COPY_STEPS,
    seed: int = 0,
    short_side: int | None = None,
    copy_threshold: float | None = None,
    leak_threshold: float | None = None,
    say: Callable[[str], None] = print,
    engine: str = "local",
) -> Path:
    """Choose the pictures of a pool that are worth learning from, and show why.

    Args:
        pool: folder, archive or named set.
        out: folder of the manifest, the pictures and the report.
        queries: a curated set; pictures like these are kept.
        protect: evaluation sets; what is too close to one of their pictures goes.
        budget: pictures to keep where there are no queries, balanced over clusters; None keeps all that are left.
        features: the semantic network: a run folder or a weights file. Needed for queries and a budget.
        copies: a TorchScript copy-detection model such as SSCD; None trains a small one on the pool.
        n_neighbours: pool pictures for each query.
        n_clusters: of the pool; given, whole clusters with more than 3 queries are retrieved.
        copy_steps: of training the small one.
        seed: of everything left to chance.
        short_side: px, of decoded pictures; None takes 112, or as much as a given network looks at.
        copy_threshold, leak_threshold: cosines above which two pictures are copies, and above which one is too close
            to a picture of an evaluation set. None takes the published 0.6 and 0.45 for a given model; what the small
            one proposes is proven by laying the two upon each other.
        say: where a line after each stage goes.
        engine: "local" or "ray", where pictures are decoded, described, searched and compared; the copy network is
            taught, and clusters are found, in this process. The manifest is the same.
    Returns:
        Where the manifest is.
    Raises:
        ValueError: queries and a budget, one of them without features, an impossible number, a file of copies that is
            no model, an engine that is not there, or a folder that is the pool.
        FileExistsError: the folder holds a run.
        BlockingIOError: another process is at work in the folder.
    """
    if queries is not None and budget is not None:
        raise ValueError("expected queries or a budget, got both: queries already say how many pictures are wanted")
    if features is None and (queries is not None or budget is not None):
        raise ValueError("queries and budgets need --features: a run folder or weights that know what pictures show")
    for name, number, least in (("budget", budget, 1), ("copy_steps", copy_steps, 0), ("neighbours", n_neighbours, 1)):
        require(number is None or number >= least, name, f">= {least}", number)
    for name, cosine in (("copy_threshold", copy_threshold), ("leak_threshold", leak_threshold)):
        require(cosine is None or -1 <= cosine <= 1, name, "a cosine from -1 to 1", cosine)
    expect_no_run(out)
    given = copy_model(copies) if copies else None
    semantic = semantic_describer(features) if features is not None else None
    picked = pick_engine(engine)
    Path(out).mkdir(parents=True, exist_ok=True)
    with alone_in(Path(out), Path(out) / "stages"):
        side = short_side or max([SHORT_SIDE, *(each.size for each in (given, semantic) if each)])
        curation = Curation(pool, out, side, seed, say, engine=picked)
        curation.drop_same()
        distinct = curation.pixels.select(np.flatnonzero(curation.kept))
        describer = given or trained_describer(distinct, curation.folder, copy_steps, seed)
        if copies:
            copy_threshold = COPY if copy_threshold is None else copy_threshold
            leak_threshold = LEAK if leak_threshold is None else leak_threshold
        curation.drop_copies(describer, copy_threshold)
        for protected in protect:
            curation.drop_leaks(protected, leak_threshold)
        if queries is not None:
            curation.retrieve(queries, semantic, n_neighbours, n_clusters)
        elif budget is not None:
            curation.balance(budget, semantic)
        manifest = curation.write()
        draw(curation)
        return manifest


def trained_describer(
    pixels: Pixels, folder: Path, steps: int = COPY_STEPS, seed: int = 0, progress: bool = True
) -> Describer:
    """A small copy-detection network, taught on these pictures; kept in the folder for the next time."""
    path = folder / f"copies-{pixels.fingerprint()[:16]}-{steps}-{seed}.safetensors"
    torch.manual_seed(seed)
    descriptor = CopyDescriptor(CopyNet()).to(pick_device()).eval()
    describe = network(descriptor)
    if weights := _stored(path):
        descriptor.load_state_dict(weights)
    elif len(pixels) > 1:
        batch_size = min(COPY_BATCH, len(pixels))
        total, words = steps * batch_size, "learning to know copies"
        with tqdm(total=total, unit="images", desc=words, disable=not progress) as bar:
            for record in train_copies(pixels, descriptor.net, steps, batch_size, COPY_SIZE, seed=seed):
                bar.set_postfix(loss=f"{record['loss']:.2f}", refresh=False)
                bar.update(batch_size)
        shown = some(len(pixels), WHITENING)
        parts = np.array_split(shown, len(shown) // 256 + 1)
        descriptor.whiten(torch.cat([describe(seen(pixels.select(part), COPY_SIZE, "copy")) for part in parts]))
        write_atomically(path, save({key: value.cpu().contiguous() for key, value in descriptor.state_dict().items()}))
    return Describer("copy", describe, COPY_SIZE, f"CopyNet {state_hash(descriptor)[:16]}")


def _stored(path: Path) -> dict[str, torch.Tensor] | None:
    """The weights that an earlier run wrote, where they are whole."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def copy_model(path: str | Path) -> Describer:
    """A published copy-detection model in TorchScript, such as sscd_disc_mixup.

    Differs: it sees what lies inside of plain bars, made small bicubically; SSCD's evaluation all of it, bilinearly.
    """
    try:
        module = torch.jit.load(str(path), map_location=pick_device()).eval()
    except RuntimeError as error:
        raise ValueError(f"copies: expected a TorchScript model such as sscd_disc_mixup, got {path}") from error
    return Describer("copy", network(module), SSCD_SIZE, f"{Path(path).name} {state_hash(module)[:16]}")


def semantic_describer(source: str | Path) -> Describer:
    """The class token of a run's backbone, or of a weights file, looking at its own training size."""
    run = Run(source)
    if is_run(source):
        vit, size = trained_backbone(run, pick_device()), run.config().crops.global_size
    else:
        vit, size = backbone_of(Path(source)).to(pick_device()).eval(), 224
        size -= size % vit.patch_size
    return Describer("semantic", network(vit), size, f"ViT {state_hash(vit)[:16]}")


def draw(curation: Curation) -> None:
    """The funnel, walls of what was found, and report.html."""
    folder, funnel = curation.folder, curation.funnel
    pictures.funnel(funnel, folder / "funnel.png")
    sections = [Section("What was left", f"{funnel['files']:,} files of {curation.pool}; a line for each of them, with "
                        "its reason, stands in manifest.csv.", folder / "funnel.png",
                        [("stage", "pictures left"), *funnel.items()])]  # fmt: skip
    if curation.careful:
        sections.append(Section("Careful", "\n\n".join(curation.careful)))
    walls = {
        "Copies, each before the picture that was kept": ("copies.png", ("copy",)),
        "Too close to the examination": ("leaks.png", ("too close",)),
        "What else was thrown out": ("thrown-out.png", ("like no query", "its cluster has enough")),
        "What was kept": ("kept.png", ("distinct", "like a query", "balanced")),
    }
    for heading, (name, reasons) in walls.items():
        rows = [row for row, reason in enumerate(curation.reason) if reason.startswith(reasons)]
        if rows:
            _wall(curation, rows, heading, folder / name)
            sections.append(Section(heading, f"{len(rows):,} pictures.", folder / name))
    sizes = component_sizes(curation.component[curation.component >= 0])
    sections.append(Section("How many pictures are one", "Groups of copies by their size, after pictures that are the "
                            "same were put together. A group far larger than all others is suspicious: look at it.",
                            table=[("pictures in a group", "groups"), *sizes.items()]))  # fmt: skip
    counts = Counter(curation.reason) + Counter(quarantined=funnel["files"] - funnel["decoded"])
    sections.append(Section("Why", "", table=[("reason", "files"), *counts.most_common()]))
    write_report(folder / "report.html", f"minidino curate: {Path(curation.pool).name}", sections)


def _wall(curation: Curation, rows: list[int], title: str, path: Path) -> None:
    """Forty pictures of these rows; a copy beside the picture that was kept in its place."""
    number = {name: row for row, name in enumerate(curation.pixels.files)}
    pairs = [[row, number[curation.duplicate_of[row]]] for row in rows if curation.duplicate_of[row] in number]
    units = pairs or [[row] for row in rows]
    chosen = [row for i in some(len(units), 40 // len(units[0])) for row in units[i]]
    pictures.wall(curation.pixels.select(chosen).whole(64), title, path)
