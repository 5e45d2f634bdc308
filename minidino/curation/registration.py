"""Was a picture made from another one? The proof: lay one upon the other and see whether they agree.

    texture -> all starts on a coarse grid -> the best few refined -> correlation of what both show

    agreement(pixels, originals, pairs)  -> the correlation of each pair
    proven_pairs, proven_leaks           -> of what a describer proposes, what is true

A small network proposes many pairs, strangers among them; those that do not agree anywhere are no copies. Light, tint,
compression, mirrors, crops and small turns do not matter, and an inscription or a bar costs no more than its share.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from minidino.curation.duplicates import Pairs, similar_pairs
from minidino.curation.embeddings import seen
from minidino.curation.search import Index, Rows
from minidino.engine import LOCAL, Engine, spans
from minidino.images.pixels import Pixels

PROPOSALS, PROPOSED = 4, 0.35  # nearest pictures that are tried for each; cosine above which they are
PROOF = 0.7  # correlation above which a picture was made from another one
COARSE, SIDE = 24, 48  # px, of the squares that are laid upon each other: to find a start, and to refine it
BLOCK = 50_000  # pairs whose pictures are held in memory at a time
SCALES = {1.0: 1, 0.88: 3, 0.76: 5}  # share of a side of the original that may be shown: places along it
FAINT = 1e-2  # length below which a texture is that of nothing
HOPE = 0.35  # coarse correlation below which a pair is given up
KEPT, STEPS, STEP_SIZE = 3, 20, 0.03  # starts that are refined; steps of Adam; its rate, in half sides
VISIBLE = 0.6  # share of the picture that has to lie within the original

Pictures = UInt8[Tensor, "n c S S"]
Maps = Float[Tensor, "n 2 3"]


def proven_pairs(pixels: Pixels, descriptors: Rows, progress: bool = True, engine: Engine = LOCAL) -> Pairs:
    """Pictures of which one was made from the other, among the nearest of each.

    Args:
        pixels, descriptors: of the copy-detection kind, row by row.
        progress: show a bar.
        engine: where neighbours are searched and pairs compared.
    """
    pairs = proposed_within(descriptors, engine)
    true = pairs[agreement(pixels, pixels, pairs, progress, engine=engine) > PROOF]
    return Pairs(*true.T)


def proven_leaks(
    pixels: Pixels,
    descriptors: Rows,
    originals: Pixels,
    references: Rows,
    progress: bool = True,
    engine: Engine = LOCAL,
) -> tuple[Float[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """The original that each picture agrees with best, of those that its descriptor is nearest to.

    Args:
        pixels, descriptors: of a pool, of the copy-detection kind, row by row.
        originals, references: of an evaluation set; several descriptors for each, part by part, are as good as one.
        progress: show a bar.
        engine: where neighbours are searched and pairs compared.
    Returns:
        Its correlation, above PROOF where the picture was made from it, and its row; 0 and row 0 where none was near.
    """
    left, part = proposed_between(descriptors, references, engine).T
    pairs = np.unique(np.stack([left, part % len(originals)], axis=1), axis=0)
    found = agreement(pixels, originals, pairs, progress, engine=engine)
    best, nearest = np.zeros(len(pixels), dtype=np.float32), np.zeros(len(pixels), dtype=np.int64)
    rising = np.argsort(found, kind="stable")  # of the pairs of one picture the last, the best, stays
    best[pairs[rising, 0]], nearest[pairs[rising, 0]] = found[rising], pairs[rising, 1]
    return best, nearest


def proposed_within(descriptors: Rows, engine: Engine = LOCAL) -> Int[np.ndarray, "E 2"]:
    """Pairs to be tried among pictures, each both ways round, since either may be the original."""
    near = similar_pairs(descriptors, PROPOSED, PROPOSALS, engine)
    pairs = np.unique(np.sort(np.stack(near, axis=1), axis=1), axis=0)
    return np.concatenate([pairs, pairs[:, ::-1]])


def proposed_between(descriptors: Rows, references: Rows, engine: Engine = LOCAL) -> Int[np.ndarray, "E 2"]:
    """Pairs to be tried of a picture and a reference."""
    similarity, rows = Index(references, PROPOSALS, engine=engine).search(descriptors)
    left, column = np.nonzero(similarity > PROPOSED)
    return np.stack([left, rows[left, column]], axis=1)


def agreement(
    pixels: Pixels,
    originals: Pixels,
    pairs: Int[np.ndarray, "E 2"],
    progress: bool = True,
    chunk: int = 128,
    engine: Engine = LOCAL,
) -> Float[np.ndarray, "E"]:
    """Lay pictures upon originals, both seen inside of bars, and say how well each pair agrees.

    Args:
        pixels, originals: what the two columns of the pairs count.
        pairs: row of a picture, row of an original.
        progress: show a bar.
        chunk: pairs at a time.
        engine: where chunks are compared.
    """
    found = np.zeros(len(pairs), dtype=np.float32)
    with tqdm(total=len(pairs), unit="pairs", desc="proof", disable=not progress, leave=False) as bar:
        for block in np.array_split(np.arange(len(pairs)), len(pairs) // BLOCK + 1):
            (ours, one), (theirs, other) = (np.unique(column, return_inverse=True) for column in pairs[block].T)
            pictures, references = gray_squares(pixels, ours), gray_squares(originals, theirs)
            chunks = spans(len(block), chunk)
            comparing = partial(_register_span, pictures, references, one, other)
            for (start, stop), correlations in zip(chunks, engine.map(comparing, chunks), strict=True):
                found[block[start:stop]] = correlations
                bar.update(stop - start)
    return found


def _register_span(
    pictures: Pictures, references: Pictures, one: np.ndarray, other: np.ndarray, start: int, stop: int
) -> Float[np.ndarray, "n"]:
    part = slice(start, stop)
    return registered(pictures[one[part]], references[other[part]]).numpy()


def gray_squares(pixels: Pixels, rows: Int[np.ndarray, "n"]) -> Pictures:
    """Pictures inside of their bars, squeezed into squares of SIDE px, grey."""
    result = torch.empty(len(rows), 1, SIDE, SIDE, dtype=torch.uint8)
    for start in range(0, len(rows), 256):
        part = seen(pixels.select(rows[start : start + 256]), SIDE, "copy")
        result[start : start + 256] = part.float().mean(1, keepdim=True).round().to(torch.uint8)
    return result


def registered(pictures: Pictures, originals: Pictures) -> Float[Tensor, "n"]:
    """Find for each pair the affine map under which the picture agrees best with the original, mirrored or not.

    Args:
        pictures, originals: squares, row i of both a pair.
    Returns:
        The correlation of their textures under the best map, from 0 to 1; that of the coarse grid where it is proof
        already, or leaves no hope.
    Source: registration by maximising the correlation, Evangelidis and Psarakis 2008.
    """
    start = starts()
    best, place = _coarse(texture(pictures, COARSE), texture(originals, COARSE), start)
    result = best[:, 0].clamp(min=0)
    open_ones = ((result >= HOPE) & (result <= PROOF)).nonzero()[:, 0]
    if len(open_ones):
        one, other = (texture(x[open_ones], SIDE).repeat_interleave(KEPT, 0) for x in (pictures, originals))
        refined = _refined(one, other, start[place[open_ones]].flatten(0, 1))
        result[open_ones] = refined.view(-1, KEPT).amax(1)
    return result


def texture(images: Pictures, size: int) -> Float[Tensor, "n 1 size size"]:
    """Grey with a local mean of 0 and a local deviation of 1, so that only what is drawn counts."""
    gray = F.interpolate(images.float().mean(1, keepdim=True) / 255, size=(size, size), mode="bilinear", antialias=True)
    reach = size // 8
    local = {"kernel_size": 2 * reach + 1, "stride": 1, "padding": reach, "count_include_pad": False}
    detail = gray - F.avg_pool2d(gray, **local)
    return detail / (F.avg_pool2d(detail.square(), **local) + 4e-4).sqrt()


def starts() -> Maps:
    """From places in the picture to places in the original: all SCALES of both sides, everywhere, mirrored and not."""
    along = [(s, x) for s, n in SCALES.items() for x in torch.linspace(s - 1, 1 - s, n).tolist()]
    return torch.tensor([[[mirror * width, 0, x], [0, height, y]]
                         for mirror in (1, -1) for width, x in along for height, y in along])  # fmt: skip


def correlation(
    pictures: Float[Tensor, "n 1 s s"], originals: Float[Tensor, "n 1 s s"], maps: Maps
) -> Float[Tensor, "n"]:
    """How well textures agree where the map stays within the original; 0 where too little of the picture does."""
    grid = F.affine_grid(maps, list(pictures.shape), align_corners=False)
    inside = (grid.abs() <= 1).all(-1)[:, None].float()
    seen = F.grid_sample(originals, grid, align_corners=False)
    share = inside.mean((2, 3), keepdim=True).clamp(min=1e-6)
    one, other = ((x - (x * inside).mean((2, 3), keepdim=True) / share) * inside for x in (pictures, seen))
    cosine = F.cosine_similarity(one.flatten(1), other.flatten(1), eps=FAINT)
    return torch.where(share.flatten() >= VISIBLE, cosine, 0)


def _coarse(pictures: Tensor, originals: Tensor, start: Maps) -> tuple[Tensor, Tensor]:
    """The KEPT best of all starts for each pair: correlations and numbers, (n, KEPT) both."""
    n, m, size = len(pictures), len(start), pictures.shape[-1]
    grid = F.affine_grid(start, [m, 1, size, size], align_corners=False).view(1, m * size, size, 2)
    seen = F.grid_sample(originals, grid.expand(n, -1, -1, -1), padding_mode="border", align_corners=False)
    seen, one = seen.view(n, m, -1), pictures.view(n, 1, -1)
    return F.cosine_similarity(*(x - x.mean(2, keepdim=True) for x in (seen, one)), 2, FAINT).topk(KEPT)


def _refined(pictures: Tensor, originals: Tensor, maps: Maps) -> Float[Tensor, "n"]:
    """The best correlation on the way up from each start."""
    maps = maps.clone().requires_grad_()
    climber = torch.optim.Adam([maps], betas=(0.8, 0.9), maximize=True)
    best = torch.zeros(len(maps))
    for step in range(STEPS):
        found = correlation(pictures, originals, maps)
        best = torch.maximum(best, found.detach())
        climber.param_groups[0]["lr"] = STEP_SIZE * (1 - step / STEPS)
        climber.zero_grad()
        found.sum().backward()
        climber.step()
    return best
