"""What one device holds in a training step, by formula: states, what autograd keeps, what passes.

    Sizes, images, masked patches -> step_memory -> bytes

Memory is what torch hands out for tensors: as torch.cuda.max_memory_allocated counts it, or the profiler of the CPU.
The driver's share, the allocator's waste, cuBLAS' work space and the making of the crops are not in it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from minidino.learning.prototypes import PART
from minidino.scaling import N_GLOBAL, Sizes, block_parameters, parameters

FLOAT = 4  # bytes
USABLE = 0.9  # assumption: share of a device's memory that tensors can have
LACK = "out of memory|allocate memory|not enough memory"  # as torch says it of GPUs, and of CPUs


def step_memory(
    s: Sizes, n_images: int, n_masked: float, parts: int = 1, gpus: int = 1, sharding: str = "ddp"
) -> dict[str, float]:
    """Bytes that one device holds in a step, and the most that it holds at a time.

    Args:
        n_images, n_masked: of an update on this device; M is 0 without iBOT.
        parts: the batch is computed in so many.
        gpus: devices that take part.
        sharding: of several: "ddp" keeps everything on each, the gradients all the time (they lie in its buckets);
            "fsdp" divides weights, gradients, moments and the average by their number, and holds what is computed
            whole: embeddings and heads for the whole pass, two blocks at a time. Neither was measured.
    Returns:
        "weights" (student), "average" (teacher), "moments" (of AdamW), "gradients", "gathered" (whole under fsdp),
        "batch" (crops), "saved" (what autograd keeps of the backbone), "heads" (of the heads, without logits), "logits"
        (kept and passing, and targets), "casts" (16-bit copies of weights), and "peak", the largest of four moments:
        the targets are made, the backward pass starts, it reaches the last block, the update.
    """
    if sharding not in ("ddp", "fsdp") or min(n_images, parts, gpus) < 1:
        raise ValueError("expected sharding 'ddp' or 'fsdp', images, parts and gpus of at least 1; got "
                         f"{sharding!r}, {n_images}, {parts}, {gpus}")  # fmt: skip
    count, share = parameters(s), 1 / gpus if sharding == "fsdp" else 1
    m = {
        "weights": FLOAT * count["student"] * share, "average": FLOAT * count["teacher"] * share,
        "moments": 2 * FLOAT * count["trained"] * share, "gradients": FLOAT * count["trained"] * share,
        "gathered": _gathered_bytes(s, count) if gpus > 1 and sharding == "fsdp" else 0.0,
        "batch": _batch_bytes(s, n_images),
    }  # fmt: skip
    n, masked = n_images / parts, n_masked / parts
    m |= {"saved": _backbone_bytes(s, n), "heads": _heads_bytes(s, n, masked)}
    m["casts"] = 0.0 if m["gathered"] else _cast_bytes(s)
    targets, made, kept, passing = _logit_bytes(s, n_images, n_masked, n, masked)
    states = sum(m[key] for key in ("weights", "average", "moments", "gathered", "batch"))
    always = parts > 1 or gpus > 1 and sharding == "ddp"
    before = m["gradients"] if always else 0.0
    learned = max(before, FLOAT * (count["dino_head"] + count["ibot_head"]) * share)  # gradients of heads come first
    moments = (
        before + made + 12 * FLOAT * s.width * sum(c * t for c, t in s.groups(n_images / parts)[:1]),
        before + targets + kept + passing + m["saved"] + m["heads"] + m["casts"],
        learned + targets + m["saved"] + m["casts"] + max(_passing_block(s, n), _passing_head(s)),
        m["gradients"] + targets,
    )
    return m | {"logits": targets + kept + passing, "peak": states + max(moments)}


def _gathered_bytes(s: Sizes, count: dict[str, int]) -> float:
    """What FSDP puts together, in the precision of the products: weights, their gradients, and the sums in float32."""
    slim, block = 2 if s.half else FLOAT, block_parameters(s)
    root = count["student"] - s.depth * block
    return slim * (root + 2 * block) + slim * (root + block) + FLOAT * root


def _batch_bytes(s: Sizes, n_images: float) -> float:
    pixels = N_GLOBAL * s.global_size**2 + s.n_local * s.local_size**2
    return n_images * (s.channels * FLOAT * pixels + N_GLOBAL * s.n_patches)


def _backbone_bytes(s: Sizes, n_images: float) -> float:
    """What autograd keeps of the backbone, from the crops to the final norm.

    For each token in each residual: the norm's input; what goes into and comes out of the linear layers; of attention
    q, k, v, the answer and one number a head; with stochastic depth an index and a scale. Of blocks that are computed
    again, the input, and all of this of the one whose turn it is.
    """
    d, (first, last), slim = s.width, s.feed_forward, 2 if s.half else FLOAT
    kept, every = s.kept(n_images), sum(crops * n for crops, n in s.groups(n_images))
    rows = sum(crops * n for crops, n in kept)
    attend = FLOAT * d + slim * d + _attention_bytes(s, len(kept) > 1)
    feed = FLOAT * d + slim * (d + first + (2 if s.gated else 1) * last)
    both = 2 * (2 * FLOAT + (slim * d if s.layerscale else 0))
    both += 2 * (12 + FLOAT * d) if s.subset and s.drop_rate else 0  # index_add keeps what it adds
    pairs = FLOAT * s.heads * sum(crops * n**2 for crops, n in kept) if s.attention == "reference" else 0
    pictures = _batch_bytes(s, n_images) / 2 if s.half else 0  # the patch convolution keeps its own copy
    block, whole = rows * (attend + feed + both) + pairs, 1 if s.recompute else s.depth
    return whole * block + FLOAT * every * d * (s.depth if s.recompute else 1) + pictures


def _attention_bytes(s: Sizes, two_sizes: bool) -> float:
    """For each token: q, k, v, the answer, and what is between; the matrices of "reference" are not counted here."""
    d, slim = s.width, 2 if s.half else FLOAT
    if s.attention == "reference":  # q is scaled, and all in float32
        return FLOAT * (3 if s.half else 4) * d + slim * d
    inside = FLOAT if s.half and s.cpu and s.attention == "sdpa" else slim
    copied = s.attention == "sdpa" and (two_sizes or inside != slim)  # two sizes are put end to end
    return inside * 4 * d + (slim * d if copied else 0) + FLOAT * s.heads


def _passing_block(s: Sizes, n_images: float) -> float:
    """What the backward pass of a feed-forward needs for itself: gradients of the stream and of both its layers."""
    slim, (_, last) = 2 if s.half else FLOAT, s.feed_forward
    every, rows = (sum(c * n for c, n in groups) for groups in (s.groups(n_images), s.kept(n_images)))
    return FLOAT * every * s.width + slim * rows * (2 * s.width + last)


def _passing_head(s: Sizes) -> float:
    """A shared head has two gradients of its largest layer and their sum, while they are added."""
    return 0.0 if s.ibot else 2 * FLOAT * max(a * b for a, b in s.dino.layers(s.width))


def _heads_bytes(s: Sizes, n_images: float, n_masked: float) -> float:
    slim, found = 2 if s.half else FLOAT, 0.0
    views = sum(crops for crops, _ in s.groups(n_images))
    for h, rows in zip(s.heads_of(), (views, n_masked), strict=True):
        layers = s.width + sum(2 * out for _, out in h.layers(s.width)[:-1]) + h.bottleneck_dim
        found += rows * (slim * layers + 2 * FLOAT * h.bottleneck_dim + FLOAT * s.width)
        found += 2 * FLOAT * h.n_prototypes * h.bottleneck_dim if h.weight_norm and rows else 0
    return found


def _cast_bytes(s: Sizes) -> float:
    """16-bit copies of the student's linear layers."""
    if not s.half:
        return 0.0
    d, (first, last) = s.width, s.feed_forward
    mlps = sum(a * b for h in (s.dino, s.ibot) if h for a, b in h.layers(d))
    return 2 * (s.depth * d * (4 * d + first + last) + s.channels * s.patch_size**2 * d + mlps)


def _logit_bytes(
    s: Sizes, n_images: int, n_masked: float, part: float, part_masked: float
) -> tuple[float, float, float, float]:
    """Of the targets; while these are made; kept for backward; passing in the forward or backward of one loss."""
    (dino, ibot), views = s.heads_of(), sum(crops for crops, _ in s.groups(part))
    classes = FLOAT * N_GLOBAL * n_images * dino.n_prototypes
    patches = FLOAT * n_masked * ibot.n_prototypes
    seen = FLOAT * views * dino.n_prototypes, FLOAT * part_masked * ibot.n_prototypes
    targets = classes + patches
    normed = max(4 * FLOAT * h.n_prototypes * h.bottleneck_dim for h in s.heads_of())  # back through weight norm
    if s.prototypes == "reference":  # logits of the parts, and together; Sinkhorn has two at a time
        return targets, 3 * classes + 4 * patches, sum(seen), max(2 * max(seen), normed)
    pieces = 0.0 if s.prototypes == "triton" else 6 * FLOAT * PART["cpu" if s.cpu else "cuda"]
    return targets, 2 * targets + pieces, 0.0, max(pieces, normed)


@contextmanager
def enough_memory() -> Iterator[None]:
    """Make MemoryErrors, which say what to do, of what torch raises where a step takes more than there is."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(LACK, str(error)):
            raise
        raise MemoryError(f"{str(error).splitlines()[0]} A step takes less with optim.accumulate=2 or more, "
                          "vit.recompute=true or smaller crops; minidino plan says how much") from error  # fmt: skip
