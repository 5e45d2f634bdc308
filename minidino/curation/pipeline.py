"""The stages of curation end to end, and what became of every file.

    pool -> decoded -> distinct -> without copies -> unlike the examination -> chosen        manifest.csv

Each stage keeps its result in the folder, under a key of all that went before: a run that was killed goes on where it
was and ends with the same manifest, byte for byte.
"""

import csv
import hashlib
import io
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from minidino.curation.clusters import balanced_sample, hierarchical_kmeans
from minidino.curation.duplicates import (
    COPY,
    LEAK,
    Components,
    connect,
    find_duplicates,
    hash_duplicates,
    linked_to,
    representatives,
    similarity_to,
)
from minidino.curation.embeddings import PARTS, WHOLE, Describe, Part, embed, thumbnails
from minidino.curation.registration import PROOF, proven_leaks, proven_pairs
from minidino.curation.retrieval import retrieve_by_cluster, retrieve_by_sample
from minidino.curation.search import Index
from minidino.engine import LOCAL, Engine, spans
from minidino.images.archives import MARK, short_hash
from minidino.images.datasets import SIDE_SUFFIXES, open_images, read_quarantine
from minidino.images.named import dataset_names
from minidino.images.pixels import Pixels, load_pixels
from minidino.runs import atomic_path, expanded, write_atomically, write_json

COLUMNS = ("file", "kept", "reason", "component", "duplicate_of", "similarity", "cluster", "query")
THUMBNAIL = 16  # px
SHARPNESS = 64  # px, of the square that sharpness is measured on
SUSPICIOUS = 0.1  # share of the pictures in one group of copies that calls for a word


class Describer(NamedTuple):
    """How pictures become descriptors of one kind."""

    kind: str  # "copy" or "semantic"
    describe: Describe
    size: int  # px
    made_by: str  # fixes the answer, such as the hash of the weights


class Curation:
    """One pool on its way from files to chosen pictures; the stages are called in the order they stand here.

    pixels: the decoded pictures; all row numbers count these.
    kept: (n,) bool, the pictures that are still in.
    funnel: {stage: pictures left}, in order.
    careful: what somebody should look at, a sentence each.
    """

    def __init__(
        self,
        pool: str | Path,
        folder: str | Path,
        short_side: int = 112,
        seed: int = 0,
        say: Callable[[str], None] = print,
        progress: bool = True,
        engine: Engine = LOCAL,
    ):
        """Decode the pool; what is no picture is in the quarantine.

        Args:
            pool: anything that `open_images` opens.
            folder: for manifest.csv, decoded pictures and the results of the stages.
            short_side: px, of decoded pictures.
            seed: of clusters and chance.
            say: where a line after each stage goes.
            progress: show bars.
            engine: where chunks of the work run; the manifest is the same.
        Raises:
            FileNotFoundError, ValueError: no file, or none that decodes; the folder is the pool.
        """
        if expanded(pool).resolve() == Path(folder).resolve():
            raise ValueError(f"{folder} is the pool itself: what is made there would count as pictures; choose another "
                             "with --out, such as a folder in it")  # fmt: skip
        self.pool, self.folder, self.short_side, self.seed = pool, Path(folder), short_side, seed
        self.progress, self.engine = progress, engine
        self.say = lambda words: say(_printable(words))
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / MARK).touch()  # in its own pool it is left out, even where it was killed half-way
        images = open_images(pool)
        self.files = images.files
        # what is left out is told by the funnel and the manifest
        self.pixels = load_pixels(images, short_side, self.folder / "pixels", progress, engine, warn=False)
        n = len(self.pixels)
        self.kept, self.reason = np.ones(n, dtype=bool), np.full(n, "", dtype=object)
        self.component, self.cluster = np.full(n, -1), np.full(n, -1)
        self.duplicate_of, self.query = np.full(n, "", dtype=object), np.full(n, "", dtype=object)
        self.similarity = np.full(n, np.nan)
        self.funnel: dict[str, int] = {"files": len(images)}
        self.careful: list[str] = []
        self._key = f"{self.pixels.fingerprint()} {seed}"
        self._count("decoded")

    def drop_same(self) -> None:
        """Keep one of each group of files that show the same picture, by a hash of thumbnails."""
        rows = embed(self.pixels, thumbnails, THUMBNAIL, self._path("hash.npy"), "hash", "thumbnails", "uint8",
                     progress=self.progress, engine=self.engine).rows  # fmt: skip
        quality = self._stage("quality", (), lambda: {"quality": picture_quality(self.pixels, self.engine)})["quality"]
        groups = self._stage("same", (), lambda: hash_duplicates(rows, quality=quality)._asdict())
        self._drop_members(np.arange(len(rows)), Components(**groups), "same picture", np.ones(len(rows)))
        self._quality = quality
        self._count("distinct")

    def drop_copies(self, describer: Describer, threshold: float | None = COPY) -> None:
        """Keep the best of each group of copies.

        Args:
            describer: of the copy-detection kind.
            threshold: cosine above which two pictures are copies, as published; members unlike the one that is kept
                form groups of their own. None: the describer only proposes, and copies are those that agree when one
                is laid upon the other.
        """
        self._expect_after("distinct", "drop_same")
        self._distinct = np.flatnonzero(self.kept)
        self._describer = describer
        distinct = self.pixels.select(self._distinct)
        self._copies = rows = self._embed(distinct, describer, "copy", "copy")
        quality = self._quality[self._distinct]

        def near() -> dict[str, np.ndarray]:
            floor = min(LEAK, threshold)
            return find_duplicates(rows, threshold, quality=quality, floor=floor, engine=self.engine)._asdict()

        def proven() -> dict[str, np.ndarray]:
            labels = connect(len(rows), proven_pairs(distinct, rows, self.progress, self.engine))
            return {"labels": labels, "representatives": representatives(labels, quality)}

        rule = proven if threshold is None else near
        self._groups = Components(**self._stage("copies", (threshold, describer.made_by), rule))
        similarity = similarity_to(rows, self._groups.representatives[self._groups.labels])
        self._drop_members(self._distinct, self._groups, "copy", similarity)
        self.component[self._distinct] = self._groups.labels
        largest = np.bincount(self._groups.labels).max()
        if largest > max(SUSPICIOUS * len(rows), 10):
            self._warn(f"{largest:,} of {len(rows):,} pictures are copies of one; if they are not, {describer.made_by} "
                       "cannot tell pictures apart: train it longer or give another")  # fmt: skip
        self._count("without copies")

    def drop_leaks(self, protected: str | Path, threshold: float | None = LEAK) -> None:
        """Drop every group of copies with a member too close to a picture of an evaluation set, or to a part of it.

        Args:
            protected: the set.
            threshold: cosine that is too close, as published. None: the describer only proposes, and too close is a
                picture that agrees with one of the set when it is laid upon it.
        """
        self._expect_after("without copies", "drop_copies")
        name, pixels = self._outside(protected, "protect nothing")
        views = [self._embed(pixels, self._describer, "copy", f"copy-{name}-{i}", part) for i, part in enumerate(PARTS)]
        reference = np.concatenate(views)

        def near() -> dict[str, np.ndarray]:
            similarity, rows = Index(reference, 1, engine=self.engine).search(self._copies)
            leaks = linked_to(similarity[:, 0] > threshold, self._copies, threshold, engine=self.engine)
            return {"leaks": leaks, "similarity": similarity[:, 0], "nearest": rows[:, 0] % len(pixels)}

        def proven() -> dict[str, np.ndarray]:
            pool = self.pixels.select(self._distinct)
            best, nearest = proven_leaks(pool, self._copies, pixels, reference, self.progress, self.engine)
            return {"leaks": best > PROOF, "similarity": best, "nearest": nearest}

        rule = proven if threshold is None else near
        found = self._stage(f"leaks-{name}", (threshold, pixels.fingerprint()), rule)
        source = self._leak_of_each(found["leaks"], found["similarity"])
        rows, source = self._distinct[source >= 0], source[source >= 0]
        self.kept[rows], self.reason[rows] = False, f"too close to {Path(protected).name}"
        self.duplicate_of[rows] = [f"@{Path(protected).name}/{pixels.files[i]}" for i in found["nearest"][source]]
        self.similarity[rows] = found["similarity"][source]
        self._count(f"unlike {Path(protected).name}")

    def retrieve(self, queries: str | Path, describer: Describer, n: int = 4, n_clusters: int | None = None) -> None:
        """Keep what is like the pictures of a curated set.

        Args:
            queries: the set.
            describer: of the semantic kind.
            n: pool pictures for each query.
            n_clusters: given, whole clusters with more than 3 queries are taken instead.
        """
        left = np.flatnonzero(self.kept)
        if not len(left):
            self._count("retrieved")
            return
        name, pixels = self._outside(queries, "ask for nothing")
        pool = self._embed(self.pixels.select(left), describer, "semantic", "semantic")
        query = self._embed(pixels, describer, "semantic", f"semantic-{name}")

        def ask() -> dict[str, np.ndarray]:
            if n_clusters is None:
                return retrieve_by_sample(query, pool, n, self.engine)._asdict()
            return retrieve_by_cluster(query, pool, min(n_clusters, len(pool)), seed=self.seed)._asdict()

        found = self._stage("retrieved", (n, n_clusters, describer.made_by, pixels.fingerprint()), ask)
        rows = left[found["rows"]]
        if n_clusters is None:
            self.query[rows] = [pixels.files[i] for i in found["source"]]
        else:
            self.cluster[rows] = found["source"]
        self.similarity[rows] = found["similarity"]
        self._keep_only(rows, "like a query", "like no query")
        self.say(f"{int(found['requested']):,} requested, {len(rows):,} unique")
        self._count("retrieved")

    def balance(self, budget: int, describer: Describer, n_clusters: Sequence[int] | None = None) -> None:
        """Keep exactly `budget` pictures, spread evenly over a tree of clusters.

        Args:
            budget: at most what is left.
            describer: of the semantic kind.
            n_clusters: of the levels; None takes one for 10 pictures, and one for 10 of those.
        """
        left = np.flatnonzero(self.kept)
        if budget > len(left):
            raise ValueError(f"expected a budget of at most the {len(left)} pictures left, got {budget}")
        counts = list(n_clusters or [count for count in (len(left) // 10, len(left) // 100) if count] or [1])
        pool = self._embed(self.pixels.select(left), describer, "semantic", "semantic")

        def choose() -> dict[str, np.ndarray]:
            tree = hierarchical_kmeans(pool, counts, seed=self.seed, unit=True)
            rows = balanced_sample(tree, budget, torch.Generator().manual_seed(self.seed))
            return {"rows": rows, "labels": tree[0].labels}

        found = self._stage("balanced", (budget, counts, describer.made_by), choose)
        self.cluster[left] = found["labels"]
        self._keep_only(left[found["rows"]], "balanced over clusters", "its cluster has enough")
        self._count("balanced")

    def write(self) -> Path:
        """Write manifest.csv, one row for each file of the pool, and curation.json beside it."""
        self.reason[self.kept & (self.reason == "")] = "distinct"
        bad = {row["file"]: row["reason"] for row in read_quarantine(self.folder / "pixels" / "quarantine.csv")}
        number = {name: row for row, name in enumerate(self.pixels.files)}
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(COLUMNS)
        for name in self.files:
            row = number.get(name)
            table.writerow([name, 0, f"quarantined: {bad[name]}", *[""] * 5] if row is None else self._row(row))
        path = self.folder / "manifest.csv"
        named = str(self.pool) in dataset_names() and not Path(self.pool).exists()
        pool = str(self.pool if named else expanded(self.pool).resolve())
        note = {"pool": pool, "funnel": self.funnel, "seed": self.seed, "careful": self.careful}
        path.unlink(missing_ok=True)  # else a crash here leaves it to speak of this pool
        write_json(self.folder / "curation.json", note)
        write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))
        return path

    def _row(self, row: int) -> list[object]:
        numbers = ["" if value < 0 else int(value) for value in (self.component[row], self.cluster[row])]
        similarity = "" if np.isnan(self.similarity[row]) else f"{self.similarity[row]:.4f}"
        return [self.pixels.files[row], int(self.kept[row]), self.reason[row], numbers[0], self.duplicate_of[row],
                similarity, numbers[1], self.query[row]]  # fmt: skip

    def _drop_members(self, rows: np.ndarray, groups: Components, reason: str, similarity: np.ndarray) -> None:
        """Of each group only the representative stays."""
        kept = groups.representatives[groups.labels]
        gone = np.flatnonzero(kept != np.arange(len(rows)))
        self.kept[rows[gone]], self.reason[rows[gone]] = False, reason
        self.duplicate_of[rows[gone]] = [self.pixels.files[i] for i in rows[kept[gone]]]
        self.similarity[rows[gone]] = similarity[gone]

    def _leak_of_each(self, leaks: np.ndarray, similarity: np.ndarray) -> np.ndarray:
        """The leak that a picture goes for: itself, or the worst in its group of copies; -1 = it may stay."""
        worst = np.full(len(self._groups.representatives), -1)
        rows = np.flatnonzero(leaks)[np.argsort(similarity[leaks], kind="stable")]
        worst[self._groups.labels[rows]] = rows  # of a group the last, the most similar, stays
        return np.where(leaks, np.arange(len(leaks)), worst[self._groups.labels])

    def _keep_only(self, rows: np.ndarray, reason: str, otherwise: str) -> None:
        gone = np.setdiff1d(np.flatnonzero(self.kept), rows)
        self.kept[gone], self.reason[gone] = False, otherwise
        self.reason[rows] = reason

    def _outside(self, source: str | Path, loss: str) -> tuple[str, Pixels]:
        """A name for the files made of another set, and its decoded pictures; tells how many are lost, and the loss."""
        name = f"{Path(source).stem}-{short_hash(source)}"
        images = open_images(source)
        pixels = load_pixels(images, self.short_side, self._path(name), self.progress, self.engine, warn=False)
        meant = {file for file in images.files if not file.lower().endswith(SIDE_SUFFIXES)}
        if lost := len(meant.difference(pixels.files)):
            self._warn(f"{lost:,} of {len(meant):,} pictures of {Path(source).name} cannot be read and {loss}: see "
                       f"{self._path(name) / 'quarantine.csv'}")  # fmt: skip
        return name, pixels

    def _embed(
        self, pixels: Pixels, describer: Describer, kind: str, name: str, part: Part = WHOLE
    ) -> np.ndarray:
        """Descriptors of the kind that the step needs."""
        return embed(pixels, describer.describe, describer.size, self._path(f"{name}.npy"), describer.kind,
                     describer.made_by, progress=self.progress, part=part, engine=self.engine).expect(kind)  # fmt: skip

    def _path(self, name: str) -> Path:
        return self.folder / "stages" / name

    def _warn(self, words: str) -> None:
        self.careful.append(words)
        self.say(f"careful: {words}")

    def _expect_after(self, stage: str, method: str) -> None:
        if stage not in self.funnel:
            raise ValueError(f"expected {method}() before: each stage goes on from the one above it")

    def _count(self, stage: str) -> None:
        stage = _printable(stage)
        self.funnel[stage] = int(self.kept.sum())
        self.say(f"{stage}: {self.funnel[stage]:,} of {self.funnel['files']:,}")

    def _stage(
        self, name: str, settings: Sequence[object], compute: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """What an earlier run found under the same key, or compute it."""
        self._key = hashlib.sha256(repr((self._key, name, settings)).encode()).hexdigest()
        path = self._path(f"{name}.npz")
        try:
            with np.load(path) as stored:
                if str(stored["key"]) == self._key:
                    return {key: stored[key] for key in stored.files if key != "key"}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            pass
        found = compute()
        with atomic_path(path) as beside, open(beside, "wb") as file:
            np.savez(file, key=self._key, **found)
        return found


def _printable(words: str) -> str:
    """With \\udcff for what a name may hold that is no UTF-8."""
    return words.encode("utf-8", "backslashreplace").decode()


def picture_quality(pixels: Pixels, engine: Engine = LOCAL) -> Float[np.ndarray, "n 2"]:
    """What makes a picture worth keeping: pixels of the original, then sharpness (mean length of the Laplacian)."""
    found = engine.map(partial(_sharpness_span, pixels), spans(len(pixels), 256))
    return np.stack([pixels.originals.prod(axis=1), np.concatenate([*found])], axis=1)


def _sharpness_span(pixels: Pixels, start: int, stop: int) -> Float[np.ndarray, "n"]:
    gray = pixels.select(np.arange(start, stop)).whole(SHARPNESS).float().mean(1)
    laplacian = 4 * gray[:, 1:-1, 1:-1] - gray[:, :-2, 1:-1] - gray[:, 2:, 1:-1] - gray[:, 1:-1, :-2]
    return (laplacian - gray[:, 1:-1, 2:]).abs().mean((1, 2)).numpy()
