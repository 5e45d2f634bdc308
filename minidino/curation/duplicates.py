"""Which pictures are copies of each other, or of a picture that is to be kept for the examination.

    thumbnails -> pca_hash -> hash_duplicates      the same picture in other bytes
    descriptors -> find_duplicates                 copies: cropped, recoloured, written upon
    descriptors, reference -> relative_duplicates  too close to an evaluation set

The descriptors of the last two must be of the copy-detection kind, as SSCD's are: they fall apart for two photographs
of one dog. Semantic ones do not, and would delete all dogs but one.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8, UInt64

from minidino.curation.search import Index, Rows, chunks, unit_rows
from minidino.engine import LOCAL, Engine

COPY, LEAK = 0.6, 0.45  # cosine above which two pictures are copies; above which one gives an evaluation picture away
N_NEIGHBOURS = 64
PCA_ROWS = 50_000  # thumbnails that the directions of a hash are learned from
SAME = 2.0  # mean difference, in grey levels of 255, up to which two thumbnails of one hash are the same picture


class Components(NamedTuple):
    """Groups of rows that are one picture."""

    labels: Int[np.ndarray, "N"]  # which component each row is in, numbered by their first rows
    representatives: Int[np.ndarray, "C"]  # the row of each component that is kept


class Pairs(NamedTuple):
    """Rows that resemble each other, each pair once or twice."""

    left: Int[np.ndarray, "E"]
    right: Int[np.ndarray, "E"]


def find_duplicates(
    descriptors: Rows,
    threshold: float = COPY,
    k: int = N_NEIGHBOURS,
    quality: Float[np.ndarray, "N q"] | None = None,
    floor: float | None = None,
    engine: Engine = LOCAL,
) -> Components:
    """Group the copies of one picture: connected components of the graph of near neighbours.

        i ~ j  if j is among the k nearest of i and cos(x_i, x_j) > threshold

    Args:
        descriptors: (N, D) of the copy-detection kind.
        threshold: 0.6 as published for SSCD.
        k: neighbours looked at, 64 as published.
        quality: what makes a picture worth keeping, the first column first, larger is better; None or a draw keeps
            the first row.
        floor: a component may be a chain whose ends have nothing in common (a ~ b ~ c). Members whose cosine to the
            representative is below the floor leave it and form components of their own. None: as published.
        engine: where neighbours are searched.
    Raises:
        ValueError: a threshold that is no cosine, k below 1, or not one row of quality for each picture.
    Source: DINOv2 paper, appendix A.3.
    Differs: the floor; the paper's rule for the representative is not published.
    """
    pairs = similar_pairs(descriptors, threshold, k, engine)
    labels = connect(len(descriptors), pairs)
    kept = representatives(labels, quality)
    while floor is not None:
        leader = kept[labels]
        far = (similarity_to(descriptors, leader) < floor) & (leader != np.arange(len(leader)))  # zeros: far from all
        if not far.any():
            break
        stays = np.flatnonzero(~far)
        among = far[pairs.left] & far[pairs.right] & (labels[pairs.left] == labels[pairs.right])
        left, right = np.append(pairs.left[among], stays), np.append(pairs.right[among], kept[labels[stays]])
        labels = connect(len(descriptors), Pairs(left, right))
        kept = representatives(labels, quality)
    return Components(labels, kept)


def relative_duplicates(
    descriptors: Rows, reference: Rows, threshold: float = LEAK, k: int = N_NEIGHBOURS
) -> Bool[np.ndarray, "N"]:
    """Find what is too close to a reference picture, so that an evaluation on these stays honest.

    Args:
        descriptors: (N, D) of the pool, of the copy-detection kind.
        reference: (M, D) of training and test pictures of an evaluation set, by the same network.
        threshold: 0.45 as published: lower than for copies, so it removes more.
        k: neighbours in the pool, through which a whole component goes with the member that was found.
    Returns:
        True = too close, or linked to one that is.
    Source: DINOv2 paper, appendix A.3: components with at least one reference picture are discarded.
    """
    if not len(reference):
        return np.zeros(len(descriptors), dtype=bool)
    touched = Index(reference, 1).search(descriptors).similarity[:, 0] > threshold
    return linked_to(touched, descriptors, threshold, k)


def linked_to(
    touched: Bool[np.ndarray, "N"],
    descriptors: Rows,
    threshold: float = LEAK,
    k: int = N_NEIGHBOURS,
    engine: Engine = LOCAL,
) -> Bool[np.ndarray, "N"]:
    """These rows and all that are linked to one of them; `engine` as for `find_duplicates`, the rest as above."""
    labels = connect(len(descriptors), similar_pairs(descriptors, threshold, k, engine))
    return np.isin(labels, labels[touched])


def similar_pairs(descriptors: Rows, threshold: float, k: int = N_NEIGHBOURS, engine: Engine = LOCAL) -> Pairs:
    """Edges of the neighbour graph above a cosine."""
    if not -1 <= threshold <= 1:
        raise ValueError(f"expected a cosine from -1 to 1 as threshold, got {threshold}")
    if k < 1:
        raise ValueError(f"expected k of at least 1 neighbour, got {k}")
    if len(descriptors) < 2:
        return Pairs(*np.zeros((2, 0), dtype=np.int64))
    similarity, rows = Index(descriptors, min(k, len(descriptors) - 1) + 1, engine=engine).graph()
    left, column = np.nonzero(similarity > threshold)
    return Pairs(left, rows[left, column])


def connect(n: int, pairs: Pairs) -> Int[np.ndarray, "n"]:
    """Number the connected components of n rows by the order of their first rows."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(pairs.left), dtype=bool), pairs), shape=(n, n))
    _, labels = connected_components(edges, directed=False)
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[labels]


def representatives(
    labels: Int[np.ndarray, "N"], quality: Float[np.ndarray, "N q"] | None = None
) -> Int[np.ndarray, "C"]:
    """The best row of each component; of equals the first."""
    if quality is not None and (np.ndim(quality) != 2 or len(quality) != len(labels)):
        raise ValueError(f"expected quality of shape ({len(labels)}, q), got {np.shape(quality)}")
    columns = [] if quality is None else [-column for column in np.asarray(quality, dtype=np.float64).T]  # bytes have no minus
    order = np.lexsort([np.arange(len(labels)), *columns[::-1], labels])  # the last key counts first
    _, first = np.unique(labels[order], return_index=True)
    return order[first]


def similarity_to(descriptors: Rows, others: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Cosine of each row to one other row."""
    result = np.empty(len(others), dtype=np.float32)
    for part in chunks(len(others)):
        pair = unit_rows(descriptors[part]), unit_rows(descriptors[others[part]])
        result[part] = np.einsum("nd,nd->n", *pair)
    return result


def component_sizes(labels: Int[np.ndarray, "N"]) -> dict[int, int]:
    """How many components there are of each size: {members: components}, rising; a long tail means chains."""
    sizes, counts = np.unique(np.bincount(labels), return_counts=True)
    return dict(zip(sizes.tolist(), counts.tolist()))


# ---------------------------------------------------------------- the same picture in other bytes


def pca_hash(thumbnails: UInt8[np.ndarray, "N F"], n_bits: int = 64) -> UInt64[np.ndarray, "N"]:
    """Name each thumbnail by the signs of its principal components: equal pictures, equal names.

    Args:
        thumbnails: flattened small pictures, such as 16 x 16 x 3.
        n_bits: signs, at most 64 and at most F.
    Source: DINOv2 paper, section 3, names a PCA hash and gives no detail; these are ours.
    """
    if not 1 <= n_bits <= min(64, thumbnails.shape[1]):
        raise ValueError(f"expected 1 to {min(64, thumbnails.shape[1])} bits, got {n_bits}")
    step = max(len(thumbnails) // PCA_ROWS, 1)
    sample = thumbnails[::step].astype(np.float64)
    mean = sample.mean(0)
    variance, directions = np.linalg.eigh((sample - mean).T @ (sample - mean))  # rising
    directions[:, variance <= 1e-7 * variance[-1]] = 0  # where nothing varies, rounding would decide
    bits = np.zeros((len(thumbnails), 64), dtype=np.uint8)
    for part in chunks(len(thumbnails)):
        bits[part, :n_bits] = (thumbnails[part] - mean) @ directions[:, -n_bits:] > 0
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def hash_duplicates(
    thumbnails: UInt8[np.ndarray, "N F"], n_bits: int = 64, quality: Float[np.ndarray, "N q"] | None = None
) -> Components:
    """Group thumbnails of equal hash that also look the same as the first of their group: equal hashes may be chance.

    Args:
        thumbnails: as for `pca_hash`.
        n_bits: of the hash.
        quality: as for `find_duplicates`.
    """
    _, bucket = np.unique(pca_hash(thumbnails, n_bits), return_inverse=True)
    first, open_rows = np.arange(len(thumbnails)), np.arange(len(thumbnails))
    while len(open_rows):  # those unlike the first of their bucket are compared among themselves
        _, at, inverse = np.unique(bucket[open_rows], return_index=True, return_inverse=True)
        leader = open_rows[at[inverse]]
        apart = np.empty(len(open_rows))
        for part in chunks(len(open_rows)):
            pair = thumbnails[open_rows[part]].astype(np.int16), thumbnails[leader[part]]
            apart[part] = np.abs(np.subtract(*pair)).mean(1)
        same = apart <= SAME
        first[open_rows[same]] = leader[same]
        open_rows = open_rows[~same]
    labels = connect(len(thumbnails), Pairs(np.arange(len(thumbnails)), first))
    return Components(labels, representatives(labels, quality))
