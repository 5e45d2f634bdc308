"""Instance retrieval: rank a database by cosine, judge the ranking as Revisited Oxford and Paris do.

    read_ground_truth(json) or groups_ground_truth(groups) -> one Query for each query
    mean_average_precision(similarity(queries, database), ground_truth, "medium")
"""

import json
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minidino.images.pixels import Pixels
from minidino.probes.features import in_float32
from minidino.probes.knn import PAIRS_AT_A_TIME, Rows, as_tensor

PROTOCOLS = {  # name: (positives, left out of the ranking)
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
CONVERT = (
    "what pickle reads can run code. Convert a file that you trust, apart from this program, with: python -c "
    "\"import json, pickle; json.dump(pickle.load(open('gnd.pkl', 'rb')), open('gnd.json', 'w'), "
    'default=lambda x: x.tolist())"'
)


Judged = tuple[float, list[float], list[float]]  # of a query: average precision, precisions and recalls at ks


class Query(NamedTuple):
    """What the database holds for one query: row numbers. What is in none of the lists is a negative."""

    easy: Sequence[int]
    hard: Sequence[int] = ()
    junk: Sequence[int] = ()
    bbx: tuple[float, float, float, float] | None = None  # left, top, right, bottom, px of the original picture
    row: int | None = None  # of the query itself, where it is in the database


class GroundTruth(NamedTuple):
    """A ground-truth file: queries, and the names (without a suffix, as a rule) of query and database pictures."""

    queries: list[Query]
    query_files: list[str]
    files: list[str]


# ---------------------------------------------------------------- the measure


@in_float32
def similarity(queries: Rows, database: Rows) -> Float[Tensor, "Q N"]:
    """Cosine of every query with every row of the database, float32."""
    x, bank = (F.normalize(as_tensor(part).float(), dim=1) for part in (queries, database))
    return x @ bank.T


def average_precision(relevant: Bool[Tensor, "n"] | Sequence[bool], interpolation: str = "trapezoid") -> float:
    """Area under precision over recall of one ranking.

        trapezoid: mean over the positives of  (j / rank + (j + 1) / (rank + 1)) / 2      (j / rank = 1 at rank 0)
        step:      mean over the positives of  (j + 1) / (rank + 1)

    where rank counts all that stands before the positive, and j the positives among it.

    Args:
        relevant: best first, without junk; all positives of the query are among them.
        interpolation: "trapezoid" as the official code, "step" as scikit-learn and most papers on other sets.
    Returns:
        In [0, 1]; nan without positives.
    Source: Radenovic et al. 2018; revisitop python/evaluate.py, compute_ap.
    """
    if interpolation not in ("trapezoid", "step"):
        raise ValueError(f"expected interpolation 'trapezoid' or 'step', got {interpolation!r}")
    rank = np.flatnonzero(np.asarray(relevant, dtype=bool))
    if not len(rank):
        return float("nan")
    before = np.arange(len(rank))
    precision = (before + 1) / (rank + 1)
    if interpolation == "trapezoid":
        precision = (np.where(rank == 0, 1.0, before / np.maximum(rank, 1)) + precision) / 2
    return float(precision.mean())


def mean_average_precision(
    similarity: Rows,
    ground_truth: Sequence[Query],
    protocol: str = "medium",
    ks: Sequence[int] = (1, 5, 10),
    interpolation: str = "trapezoid",
) -> dict:
    """Judge the ranking of a database for each query by the protocols of Revisited Oxford and Paris.

    Args:
        similarity: (Q, N), larger is nearer, for instance from `similarity`; equal values rank in order of their rows.
        ground_truth: one Query for each row of `similarity`.
        protocol: "easy" counts the easy and ignores the hard, "medium" counts both, "hard" counts the hard and
            ignores the easy; what is ignored is taken out of the ranking, as junk always is.
        ks: lengths of the lists for precision and recall.
        interpolation: see `average_precision`.
    Returns:
        "map"; "ap" per query, nan for those without positives, which are left out of all means; "n_queries" that were
        counted and "n_left_out"; "precision" {k: share of positives among the first min(k, rank of the last
        positive)}, the official mP@k; "recall" {k: share of the positives among the first k}.
    Raises:
        ValueError: another protocol, not one Query per row, rows that do not exist, rows both positive and ignored,
            NaN, a list shorter than 1, or no query with positives.
    Source: Radenovic et al. 2018; revisitop python/evaluate.py and example_evaluate.py (3bb68d3).
    Differs: equal similarities have a fixed order; the official argsort leaves it open.
    """
    return _means(_judged(similarity, ground_truth, protocol, ks, interpolation), protocol, ks)


def _judged(
    similarity: Rows, ground_truth: Sequence[Query], protocol: str, ks: Sequence[int], interpolation: str
) -> list[Judged | None]:
    """Each query judged, None without positives; raises what `mean_average_precision` does, but for no positives."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"expected protocol {', '.join(map(repr, PROTOCOLS))}, got {protocol!r}")
    values = as_tensor(similarity)
    if values.ndim != 2 or len(values) != len(ground_truth):
        raise ValueError(f"expected similarity ({len(ground_truth)}, N), got {tuple(values.shape)}")
    if values.isnan().any():
        raise ValueError("the similarity holds NaN: the network that made these features is broken")
    if ks and min(ks) < 1:
        raise ValueError(f"expected lists of 1 or more for ks, got {list(ks)}")
    return [_judge(row, query, protocol, ks, interpolation) for row, query in zip(values, ground_truth, strict=True)]


def _means(found: Sequence[Judged | None], protocol: str, ks: Sequence[int]) -> dict:
    """What `mean_average_precision` returns, of all queries."""
    counted = [query for query in found if query is not None]
    if not counted:
        raise ValueError(f"no query has a positive by protocol {protocol!r}: nothing to judge")
    ap, precision, recall = (np.array(column) for column in zip(*counted))
    return {
        "map": float(ap.mean()),
        "ap": [float("nan") if query is None else query[0] for query in found],
        "n_queries": len(counted),
        "n_left_out": len(found) - len(counted),
        "precision": dict(zip(ks, precision.mean(0).tolist())),
        "recall": dict(zip(ks, recall.mean(0).tolist())),
    }


def _judge(
    similarity: Float[Tensor, "N"], query: Query, protocol: str, ks: Sequence[int], interpolation: str
) -> Judged | None:
    """Average precision, precisions and recalls at ks; None without positives."""
    relevant, ignored = (_marked(query, names, len(similarity)) for names in PROTOCOLS[protocol])
    if (relevant & ignored).any():
        both = np.flatnonzero(relevant & ignored)[:5].tolist()
        raise ValueError(f"rows {both} are both positive and ignored by protocol {protocol!r}")
    if not relevant.any():
        return None
    order = similarity.argsort(descending=True, stable=True).cpu().numpy()
    ranked = relevant[order[~ignored[order]]]
    hits = ranked.cumsum()  # positives among the first 1, 2, ...
    last = int(np.flatnonzero(ranked)[-1]) + 1
    shown = [min(k, last) for k in ks]
    precision = [hits[k - 1] / k for k in shown]
    return average_precision(ranked, interpolation), precision, [hits[k - 1] / hits[-1] for k in shown]


def _marked(query: Query, names: Sequence[str], n: int) -> Bool[np.ndarray, "n"]:
    """True at the rows that the named lists hold."""
    rows = np.concatenate([np.asarray(getattr(query, name), dtype=np.int64).reshape(-1) for name in names])
    if len(rows) and (rows.min() < 0 or rows.max() >= n):
        raise ValueError(f"the ground truth speaks of rows {rows.min()} to {rows.max()}, the database has {n}")
    marks = np.zeros(n, dtype=bool)
    marks[rows] = True
    return marks


# ---------------------------------------------------------------- ground truth


def groups_ground_truth(groups: Sequence[Hashable]) -> list[Query]:
    """Make every member of a group a query in turn: the others of its group are its positives, itself is junk.

    Args:
        groups: one name or number per picture; "", None, nan and numbers below 0 mark distractors, no queries.
    Returns:
        Queries in the order of their rows, with all positives easy; a group of one gives a query without positives.
    """
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        group = group.item() if isinstance(group, np.generic | Tensor) else group
        distractor = group in ("", None) or (isinstance(group, int | float) and not group >= 0)  # nan is not
        if not distractor:
            members.setdefault(group, []).append(row)
    pairs = [(row, group) for group in members.values() for row in group]
    return [Query(easy=[i for i in group if i != row], junk=[row], row=row) for row, group in sorted(pairs)]


def leave_one_out(
    features: Rows, groups: Sequence[Hashable], ks: Sequence[int] = (1, 5, 10), interpolation: str = "trapezoid"
) -> dict:
    """Judge features by groups of pictures of the same thing, each picture searching among all others.

    Args:
        features: (n, D), compared by cosine.
        groups: as for `groups_ground_truth`.
    Returns:
        As `mean_average_precision`.
    """
    if len(features) != len(groups):
        raise ValueError(f"expected a group for each of {len(features)} rows, got {len(groups)}")
    queries = groups_ground_truth(groups)
    if not queries:
        raise ValueError("no picture belongs to a group: nothing to judge")
    at_once, found = max(1, PAIRS_AT_A_TIME // len(features)), []
    for start in range(0, len(queries), at_once):
        some = queries[start : start + at_once]
        near = similarity(features[[query.row for query in some]], features)
        found += _judged(near, some, "easy", ks, interpolation)
    return _means(found, "easy", ks)


def read_ground_truth(path: str | Path) -> GroundTruth:
    """Read the ground truth of Revisited Oxford or Paris, or of any set in their format, from JSON.

    The file is {"gnd": [{"easy": [...], "hard": [...], "junk": [...], "bbx": [left, top, right, bottom]}, ...],
    "imlist": [...], "qimlist": [...]}: the contents of the official gnd_*.pkl; "hard", "junk" and "bbx" may be absent.

    Raises:
        ValueError: a pickle (the error says how to convert it), no such JSON, or rows that do not exist.
    """
    raw = Path(path).read_bytes()
    if raw[:1] == b"\x80" or str(path).endswith((".pkl", ".pickle")):
        raise ValueError(f"{path} is a pickle, and {CONVERT}")
    try:
        content = json.loads(raw)
        files, query_files = (_list(content[key], str) for key in ("imlist", "qimlist"))
        queries = [_query(entry, len(files)) for entry in _list(content["gnd"], dict)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected JSON with gnd, imlist and qimlist, got {error!r}") from error
    if len(queries) != len(query_files):
        raise ValueError(f"{path}: {len(queries)} entries in gnd, but {len(query_files)} names in qimlist")
    return GroundTruth(queries, query_files, files)


def _query(entry: dict, n: int) -> Query:
    box = entry.get("bbx")
    rows = (_list(entry[name] if name == "easy" else entry.get(name, []), int) for name in ("easy", "hard", "junk"))
    query = Query(*rows, None if box is None else tuple(_list(box, float, int)))
    if box is not None and len(box) != 4:
        raise ValueError(f"expected a bbx of four numbers, got {box}")
    _marked(query, ("easy", "hard", "junk"), n)
    return query


def _list(value: Any, *kinds: type) -> list:
    """The same. Raises TypeError for what is no list, or not of these kinds alone."""
    if not isinstance(value, list) or any(type(x) not in kinds for x in value):
        raise TypeError(f"expected a list of {kinds[0].__name__}, got {str(value)[:80]}")
    return value


# ---------------------------------------------------------------- the pictures of the queries


def query_pictures(pixels: Pixels, ground_truth: Sequence[Query]) -> Pixels:
    """Cut the box of each query out of its picture.

    The published protocol crops. DINO's code does not (eval_image_retrieval.py), DINOv2's authors do not say, and users
    measure better without (dinov2 issues 44, 50), so a result has to say which it is.

    Args:
        pixels: one picture per query, in the order of the ground truth; shrunk ones are understood.
        ground_truth: boxes in px of the original pictures, rounded as by Pillow; None leaves a picture whole.
    Returns:
        Pixels in memory, to be brought to the size of the network as the database is.
    Raises:
        ValueError: not one picture per query, or a box outside its picture.
    """
    if len(pixels) != len(ground_truth):
        raise ValueError(f"expected a picture for each of {len(ground_truth)} queries, got {len(pixels)}")
    parts, boxes = [], []
    for i, query in enumerate(ground_truth):
        left, top, right, bottom = _stored_box(pixels, i, query.bbx)
        parts.append(np.ascontiguousarray(pixels.image(i)[:, top:bottom, left:right]).reshape(-1))
        boxes.append((bottom - top, right - left))
    sizes = np.array(boxes, dtype=np.int64).reshape(-1, 2)
    n_bytes = pixels.channels * sizes.prod(1)
    data = np.concatenate([np.zeros(0, np.uint8), *parts])
    return replace(pixels, data=data, offsets=np.cumsum(n_bytes) - n_bytes, sizes=sizes, originals=sizes)


def _stored_box(pixels: Pixels, i: int, bbx: tuple[float, float, float, float] | None) -> Int[np.ndarray, "4"]:
    """A box of the original picture in px of the stored one, which was shrunk and, if very long, cut at both ends."""
    stored, original = pixels.sizes[i][::-1], pixels.originals[i][::-1]  # width, height
    if bbx is None:
        return np.array([0, 0, *stored])
    scale = stored.min() / original.min()
    cut = np.maximum((original * scale - stored) / 2, 0).round()  # px at the left and at the top
    corners = np.clip(np.array(bbx, dtype=float).reshape(2, 2) * scale - cut, 0, stored)
    if (corners[1] <= corners[0]).any():
        raise ValueError(f"query {i}: the box {tuple(bbx)} is empty or outside a picture of {tuple(original)} px")
    first = np.minimum(corners[0].round(), stored - 1).astype(np.int64)
    return np.array([*first, *np.maximum(corners[1].round().astype(np.int64), first + 1)])
