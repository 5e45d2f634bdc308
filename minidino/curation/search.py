"""Nearest neighbours by cosine at every size: exact while that is cheap, approximate and measured beyond.

    plan_index(n, D)                   which kind of index, and how fine
    Index(bank, k).search(queries)  -> the k most similar rows of the bank for each query

faiss does the work. The bank may be a memory map: no kind of index but `ivf-flat` holds it in memory, and that one
only where it fits. What an approximate index loses is measured against the exact answer before its first use.

A large bank is cut into shards, each with the same lists and with its own rows in them; every shard is searched, and
the best are taken. Shards and chunks are fixed by their place, so that an engine changes nothing in the answer.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from minidino.engine import LOCAL, Engine, Span, spans

Rows = np.ndarray  # (n, D), float16, float32 or float64; in memory or memory-mapped
EXACT_ROWS = 100_000  # up to here every pair is compared: 2 minutes for all against all of 256 numbers on 2 cores
CHUNK = 16_384  # rows held as float32 at a time
SHARD = 64 * CHUNK  # rows of a bank that are searched as one; whole chunks, so that shards sum as one bank does
SAMPLE = 1_000  # queries that recall is measured on
POINTS_PER_LIST = 64  # rows for each list that the lists are learned from
RERANK = 4  # candidates for each wanted neighbour, compared again by their true rows, where codes are kept


class Plan(NamedTuple):
    """What is built over a bank."""

    kind: str  # "flat": every pair; "ivf-flat": the nearest lists; "ivf-pq": lists of codes, then true rows
    n_lists: int = 0
    code_bytes: int = 0  # of a row


class Neighbours(NamedTuple):
    """Falling along each row; where fewer than k were found, similarity -inf and row -1."""

    similarity: Float[np.ndarray, "n k"]
    rows: Int[np.ndarray, "n k"]


def plan_index(n: int, width: int, memory_mb: int = 2048) -> Plan:
    """Choose an index by the size of the bank.

        n <= 100,000                     flat
        n * D * 4 bytes <= memory_mb     ivf-flat, 4 sqrt(n) lists
        more                             ivf-pq, the same lists, at most one byte for 4 numbers

    Args:
        n, width: rows of the bank and their length D.
        memory_mb: what the rows may take in memory.
    """
    if n <= EXACT_ROWS:
        return Plan("flat")
    n_lists = int(4 * n**0.5)
    if n * width * 4 <= memory_mb * 2**20:
        return Plan("ivf-flat", n_lists)
    return Plan("ivf-pq", n_lists, max(b for b in range(1, max(width // 4, 1) + 1) if width % b == 0))


class Index:
    """Find neighbours in one bank, always k of them."""

    def __init__(
        self,
        bank: Rows,
        k: int,
        recall: float = 0.95,
        plan: Plan | None = None,
        say: Callable[[str], None] = print,
        engine: Engine = LOCAL,
    ):
        """Build what the plan says and measure it.

        Args:
            bank: rows of any length; they are brought to length 1 here.
            k: neighbours of each query; at most the rows of the bank are found.
            recall: share of the true neighbours that an approximate index must find on a sample of the bank; it looks
                into as many lists as that takes.
            plan: None asks `plan_index`.
            say: where the measured recall goes; an exact index says nothing.
            engine: where shards are filled and searched.
        Raises:
            ValueError: an empty bank, k below 1, or a row that is not finite.
        """
        if bank.ndim != 2 or not len(bank) or k < 1:
            raise ValueError(f"expected a bank (n, D) with n > 0 and k >= 1, got {bank.shape} and k = {k}")
        self.bank, self.k, self.recall = bank, k, 1.0
        self.plan, self.engine = plan or plan_index(*bank.shape), engine
        self.n_probe, self._shards = 0, spans(len(bank), SHARD)
        if self.plan.kind != "flat":
            empty = _lists(bank, self.plan)
            self._shards = [(shard,) for shard in engine.keep(partial(_filled, empty, bank), self._shards)]
            self._tune(recall)
            say(f"{self.plan.kind} over {len(bank):,} rows: looking into {self.n_probe} of {self.plan.n_lists} "
                f"lists finds {self.recall:.3f} of the true {k} neighbours of {SAMPLE} rows")  # fmt: skip

    def search(self, queries: Rows) -> Neighbours:
        """The most similar rows of the bank for each query, by cosine."""
        if queries.ndim != 2 or queries.shape[1] != self.bank.shape[1]:
            raise ValueError(f"expected queries (n, {self.bank.shape[1]}) like the bank, got {queries.shape}")
        import faiss

        threads = faiss.omp_get_max_threads()  # they decide in which order is summed
        if self.plan.kind == "flat":
            work = partial(_exact_span, self.bank, queries, self.k, threads)
        else:
            n = RERANK * self.k if self.plan.kind == "ivf-pq" else self.k
            work = partial(_approximate_span, queries, n, self.n_probe, threads)
        parts = spans(len(queries), CHUNK)
        answers = self.engine.map(work, [(*part, *shard) for part in parts for shard in self._shards])
        found = [self._merged(queries, part, [next(answers) for _ in self._shards]) for part in parts]
        return Neighbours(*map(np.concatenate, zip(*found))) if found else _nothing(0, self.k)

    def graph(self) -> Neighbours:
        """The k - 1 nearest rows of every row of the bank itself, which is not its own neighbour."""
        similarity, rows = self.search(self.bank)
        own = rows == np.arange(len(rows))[:, None]
        own[~own.any(1), -1] = True  # so many equal rows that it did not find itself: the last one goes
        kept = np.argsort(own, axis=1, kind="stable")[:, :-1]
        return Neighbours(np.take_along_axis(similarity, kept, 1), np.take_along_axis(rows, kept, 1))

    def _merged(self, queries: Rows, part: Span, found: list[Neighbours]) -> Neighbours:
        """The best of what the shards found for a chunk of queries; of equals the one of the first shard."""
        best = found[0]
        for other in found[1:]:
            best = _best_of(best, other, best.rows.shape[1])
        if self.plan.kind != "ivf-pq":
            return best
        return _ranked_again(self.bank, unit_rows(queries[slice(*part)]), best.rows, self.k)

    def _tune(self, wanted: float) -> None:
        """Look into twice as many lists until the sample says that it is enough."""
        n_sample = min(SAMPLE, len(self.bank))
        sample = np.sort(np.random.default_rng(0).choice(len(self.bank), n_sample, replace=False))
        queries = unit_rows(self.bank[sample])
        truth = exact_neighbours(self.bank, queries, self.k).rows
        truth[truth == sample[:, None]] = -1  # a row finds itself: that says nothing
        n_probe = 1
        while True:
            self.n_probe = min(n_probe, self.plan.n_lists)
            found = self.search(queries).rows
            hits = sum(len(np.intersect1d(t[t >= 0], f)) for t, f in zip(truth, found))
            self.recall = hits / max((truth >= 0).sum(), 1)
            if self.recall >= wanted or n_probe >= self.plan.n_lists:
                return
            n_probe *= 2


def exact_neighbours(bank: Rows, queries: Rows, k: int) -> Neighbours:
    """Compare every query with every row of the bank, both in chunks; what approximate answers are measured by."""
    import faiss

    parts = []
    for _, some in unit_chunks(queries):
        best = _nothing(len(some), k)
        for start, chunk in unit_chunks(bank):
            similarity, rows = faiss.knn(some, chunk, min(k, len(chunk)), metric=faiss.METRIC_INNER_PRODUCT)
            best = _best_of(best, Neighbours(similarity, rows + start), k)
        parts.append(best)
    return Neighbours(*map(np.concatenate, zip(*parts))) if parts else _nothing(0, k)


def _exact_span(
    bank: Rows, queries: Rows, k: int, threads: int, start: int, stop: int, first: int, last: int
) -> Neighbours:
    """What queries start to stop find in the shard of rows first to last."""
    import faiss

    faiss.omp_set_num_threads(threads)
    similarity, rows = exact_neighbours(bank[first:last], queries[start:stop], k)
    return Neighbours(similarity, np.where(rows < 0, -1, rows + first))


def _approximate_span(queries: Rows, n: int, n_probe: int, threads: int, start: int, stop: int, shard) -> Neighbours:
    """What queries start to stop find in lists; by codes, where the shard keeps codes."""
    import faiss

    faiss.omp_set_num_threads(threads)
    shard.nprobe = n_probe
    similarity, rows = shard.search(unit_rows(queries[start:stop]), n)
    return Neighbours(np.where(rows < 0, -np.inf, similarity).astype(np.float32), rows)


def float_rows(x: Rows) -> Float[np.ndarray, "n D"]:
    """Rows as faiss takes them, float32. Raises ValueError for NaN or infinity."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    broken = np.flatnonzero(~np.isfinite(x).all(1))
    if len(broken):
        raise ValueError(f"descriptor {broken[0]} of {len(x)} holds NaN or infinity")
    return x


def unit_rows(x: Rows) -> Float[np.ndarray, "n D"]:
    """Rows of length 1 as float32; rows of zeros stay zeros. Raises ValueError for NaN or infinity."""
    x = float_rows(x)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def chunks(n: int) -> list[slice]:
    """Of n rows, as many as are held at a time."""
    return [slice(*span) for span in spans(n, CHUNK)]


def unit_chunks(x: Rows) -> Iterator[tuple[int, Float[np.ndarray, "c D"]]]:
    """First row and unit rows of each chunk, in order: a memory map is never read whole."""
    for part in chunks(len(x)):
        yield part.start, unit_rows(x[part])


def _lists(bank: Rows, plan: Plan):
    """Lists learned from a sample, with nothing in them."""
    import faiss

    width = bank.shape[1]
    coarse = faiss.IndexFlatIP(width)
    if plan.kind == "ivf-flat":
        index = faiss.IndexIVFFlat(coarse, width, plan.n_lists, faiss.METRIC_INNER_PRODUCT)
    else:
        index = faiss.IndexIVFPQ(coarse, width, plan.n_lists, plan.code_bytes, 8, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = 1  # faiss takes 0 for "any"
    index.cp.max_points_per_centroid = POINTS_PER_LIST
    n_points = min(len(bank), POINTS_PER_LIST * plan.n_lists)
    points = np.sort(np.random.default_rng(0).choice(len(bank), n_points, replace=False))
    index.train(unit_rows(bank[points]))
    return index


def _filled(empty, bank: Rows, start: int, stop: int):
    """A copy of the lists with the rows of one shard."""
    import faiss

    index = faiss.clone_index(empty)
    for first, chunk in unit_chunks(bank[start:stop]):
        index.add_with_ids(chunk, np.arange(start + first, start + first + len(chunk)))
    return index


def _ranked_again(bank: Rows, queries: np.ndarray, rows: np.ndarray, k: int) -> Neighbours:
    """The k best of some candidates by their true rows; row -1 is no candidate."""
    best = _nothing(len(queries), k)
    for start in range(0, len(queries), 256):  # candidates are many: a few queries at a time
        part = slice(start, start + 256)
        true = unit_rows(bank[rows[part].clip(0).ravel()]).reshape(*rows[part].shape, -1)
        similarity = np.einsum("qcd,qd->qc", true, queries[part])
        found = Neighbours(np.where(rows[part] < 0, -np.inf, similarity).astype(np.float32), rows[part])
        best.similarity[part], best.rows[part] = _best_of(_nothing(len(true), k), found, k)
    return best


def _best_of(one: Neighbours, other: Neighbours, k: int) -> Neighbours:
    """The k best of two findings for the same queries; of equals the one found first."""
    similarity, rows = (np.concatenate(pair, axis=1) for pair in zip(one, other))
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return Neighbours(np.take_along_axis(similarity, order, 1), np.take_along_axis(rows, order, 1))


def _nothing(n: int, k: int) -> Neighbours:
    return Neighbours(np.full((n, k), -np.inf, np.float32), np.full((n, k), -1, np.int64))
