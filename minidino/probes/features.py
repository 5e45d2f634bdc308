"""Frozen features of a vision transformer, the descriptors nobody trained, and a store on disk for both."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial, wraps
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from minidino.images.crops import luminance, normalise
from minidino.runs import named_errors, write_json, writer_is_dead

# ---------------------------------------------------------------- frozen features


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every submodule gets its own training flag back."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, flag in flags:
            part.training = flag


def in_float32(probe: Callable) -> Callable:
    """Let a probe compute as it is written, under the caller's autocast, inference mode and default dtype, too.

    Autocast would round features, and hold on to copies of weights that have moved since.
    """

    @wraps(probe)
    def alone(*args, **options):
        dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(grad))
            for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
                stack.enter_context(torch.autocast(device, enabled=False))
            if dtype != torch.float32:
                torch.set_default_dtype(torch.float32)
                stack.callback(torch.set_default_dtype, dtype)
            return probe(*args, **options)

    return alone


def extract(
    vit: nn.Module,
    images: UInt8[Tensor, "n C H W"],
    batch_size: int = 256,
    progress: bool = True,
    patches: bool = False,
    blocks: int = 1,
) -> dict[str, Tensor]:
    """Look at every image once with a frozen network and keep what it says.

    Args:
        vit: anything with forward_features(images) -> Tokens; its training flags are restored afterwards.
        images: pixels, 0 to 255; normalised here (`mean_and_std`).
        batch_size: images at a time on the device of vit; the answer does not depend on it.
        progress: a bar with images per second.
        patches: also keep every patch token (n x N x D floats: 4 bytes each).
        blocks: above 1, also keep the class tokens of this many last blocks; still one look at each image.
    Returns:
        On the CPU, float32: "cls" (n, D) the class token after the last norm, "mean_patch" (n, D) the mean of the
        patch tokens after the last norm, with patches "patch" (n, N, D), and with blocks above 1 "cls_blocks"
        (n, blocks, D), oldest first, each after that same norm.
    Raises:
        ValueError: the images are not uint8 of shape (n, C, H, W), or there is none; more blocks than vit has.
    Source: DINOv2 paper, section 7 (frozen features); official dinov2/eval/utils.py.
    Differs: computed in the dtype of vit; the official extraction runs under fp16 autocast, which may be put around it.
    """
    expect_pixels(images)
    found: list[dict[str, Tensor]] = []
    with tqdm(total=len(images), unit="images", disable=not progress, leave=False) as bar:
        for batch in images.split(batch_size):
            found.append(look(vit, as_seen(vit, batch), blocks, patches))
            bar.update(len(batch))
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def look(
    vit: nn.Module, images: Float[Tensor, "B C H W"], blocks: int = 1, patches: bool = False
) -> dict[str, Tensor]:
    """Look at one batch of normalised images with a frozen network: what `extract` gives, for this batch."""
    if blocks < 1:
        raise ValueError(f"expected at least 1 block, got {blocks}")
    with frozen(vit):
        if blocks == 1:
            tokens = vit.forward_features(images)
            patch, cls = tokens.x_norm_patchtokens, [tokens.x_norm_clstoken]
        else:
            layers = vit.get_intermediate_layers(images, n=blocks, return_class_token=True)
            patch, cls = layers[-1][0], [layer[1] for layer in layers]
    found = {"cls": cls[-1].float().cpu(), "mean_patch": patch.float().mean(1).cpu()}
    if patches:
        found["patch"] = patch.float().cpu()
    if blocks > 1:
        found["cls_blocks"] = torch.stack(cls, dim=1).float().cpu()  # (B, blocks, D)
    return found


def as_seen(vit: nn.Module, images: UInt8[Tensor, "n C H W"]) -> Float[Tensor, "n C H W"]:
    """Pixels as a network takes them: normalised, on its device, of its type."""
    weight = next(vit.parameters())
    return normalise(images.to(weight.device)).to(weight.dtype)


def dense_patches(
    vit: nn.Module, images: UInt8[Tensor, "n C S S"], patch_size: int, stride: int
) -> Float[Tensor, "n g g D"]:
    """Patch features on a grid finer than the patches: the network looks again at every shifted window.

    Args:
        images: side S = size + patch_size - stride, where size is a multiple of patch_size: what one look sees.
        stride: px between neighbouring features, a divisor of patch_size.
    Returns:
        float32 on the CPU, g = size // stride: entry (y, x) is the patch whose corner is at (y, x) * stride.
    Raises:
        ValueError: sizes that do not fit.
    """
    size = images.shape[-1] - patch_size + stride
    if patch_size % stride or size % patch_size:
        raise ValueError(f"expected stride to divide {patch_size} and {size} to be a multiple of it, got {stride}")
    rows = []
    for top in range(0, patch_size, stride):
        looks = [images[..., top : top + size, left : left + size] for left in range(0, patch_size, stride)]
        seen = [extract(vit, look, progress=False, patches=True)["patch"] for look in looks]
        rows.append(torch.stack([patch.unflatten(1, (size // patch_size, -1)) for patch in seen], dim=3))
    dense = torch.stack(rows, dim=2)  # (n, Hp, fine, Wp, fine, D)
    return dense.flatten(3, 4).flatten(1, 2)


def expect_pixels(images: Tensor, channels: int | None = None) -> None:
    """Raise ValueError unless these are uint8 images (n, C, H, W), at least one; C is what a network says if None."""
    if images.dtype != torch.uint8 or images.ndim != 4 or channels not in (None, images.shape[1]) or len(images) == 0:
        raise ValueError(
            f"expected at least one image as uint8 pixels of shape (n, {channels or 'C'}, H, W), got {images.dtype} of "
            f"shape {tuple(images.shape)}; give pixels from 0 to 255, they are normalised here"
        )


# ---------------------------------------------------------------- a store on disk


def state_hash(module: nn.Module) -> str:
    """Name a network by what it has learned: SHA-256 over names, dtypes, shapes and bytes of its state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def feature_key(weights_hash: str, data_name: str, size: int, layer: str = "last") -> str:
    """Say in one line of JSON what made some features: equal keys, equal features.

    Args:
        weights_hash: from state_hash, or the name of a descriptor without weights ("hog").
        data_name: everything that fixes the images: set, split, count, seed.
        size: side of the images in pixels.
        layer: which tokens of which block.
    """
    made_from = {"weights": weights_hash, "data": data_name, "size_px": size, "layer": layer}
    return json.dumps(made_from, sort_keys=True)


class FeatureStore:
    """Keep features in a folder, one sub-folder per key: .npy files to map into memory, and a made.json beside them.

    Sub-folders appear under their name only when complete, so an interrupted writer leaves nothing that looks valid.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def get(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, np.memmap]:
        """Hand back the arrays of this key, computing them only when the folder does not hold exactly them.

        Args:
            key: from feature_key.
            compute: called without arguments when nothing valid is stored; returns names and arrays.
        Returns:
            Read-only memory maps by name.
        """
        place = self.folder / self._name(key)
        if not self._valid(place, key):
            self._write(place, key, compute())
        made = json.loads((place / "made.json").read_text())
        return {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in made["arrays"]}

    @staticmethod
    def _name(key: str) -> str:
        """A file name a person can read, made unique by a hash."""
        readable = re.sub(r"[^A-Za-z0-9]+", "-", str(json.loads(key).get("data", "")))[:40]
        return f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    @staticmethod
    def _valid(place: Path, key: str) -> bool:
        """True if the sidecar names this key and every array has the size it says."""
        try:
            made = json.loads((place / "made.json").read_text())
            sizes = {name: (place / f"{name}.npy").stat().st_size for name in made["arrays"]}
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return made.get("key") == key and all(sizes[name] == made["arrays"][name]["bytes"] for name in sizes)

    def _write(self, place: Path, key: str, arrays: dict[str, Tensor]) -> None:
        for left in filter(partial(writer_is_dead, silent_s=3600), self.folder.glob("*.*.unfinished")):
            shutil.rmtree(left, ignore_errors=True)
        unfinished = place.with_name(f"{place.name}.{os.getpid()}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        made = {"key": key, "made_from": json.loads(key), "arrays": {}}
        try:
            for name, value in arrays.items():
                value = value.detach().cpu() if isinstance(value, Tensor) else value
                value = np.asarray(value.float() if value.dtype == torch.bfloat16 else value)  # which numpy has not
                size = _save(unfinished / f"{name}.npy", value)
                made["arrays"][name] = {"shape": list(value.shape), "dtype": str(value.dtype), "bytes": size}
            write_json(unfinished / "made.json", made)
            with suppress(OSError):  # something is there: damaged, or of another process that has been faster
                unfinished.rename(place)
            if not self._valid(place, key):
                shutil.rmtree(place, ignore_errors=True)
                unfinished.rename(place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _save(path: Path, value: np.ndarray) -> int:
    """What np.save writes, and how many bytes that is; np.save does not say of a full disk that it is full."""
    value = np.asarray(value, order="C")
    with named_errors(path), open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(value))
        file.write(value.data)
        return file.tell()


# ---------------------------------------------------------------- descriptors that nobody trained


def pixels(images: UInt8[Tensor, "n C H W"], mean: Float[Tensor, "C H W"] | None = None) -> Float[Tensor, "n F"]:
    """Describe an image by its colours, place by place, less the mean picture.

    Args:
        images: pixels, 0 to 255.
        mean: the mean picture in [0, 1], as a rule that of the bank; None takes the mean of these images.
    Returns:
        One row per image, in [-1, 1].
    """
    expect_pixels(images)
    values = images.float() / 255
    return (values - (values.mean(0) if mean is None else mean)).flatten(1)


def gray_pixels(images: UInt8[Tensor, "n C H W"]) -> Float[Tensor, "n F"]:
    """Describe an image by its luminance, place by place, with mean 0 and deviation 1 within each image."""
    expect_pixels(images)
    gray = luminance(images.float() / 255).flatten(1)
    gray = gray - gray.mean(1, keepdim=True)
    return gray / (gray.std(1, keepdim=True) + 1e-6)


def color_histogram(images: UInt8[Tensor, "n 3 H W"]) -> Float[Tensor, "n 216"]:
    """Describe an image by which colours it holds, wherever they are: 6 x 6 x 6 bins of RGB.

    Returns:
        Square roots of the shares of pixels (their squares sum to 1), so that the cosine of two rows is the
        Bhattacharyya coefficient of the two histograms.
    """
    expect_pixels(images, 3)
    bins = images.flatten(2).long() * 6 // 256  # (n, 3, H*W), 0 to 5
    bins = bins[:, 0] * 36 + bins[:, 1] * 6 + bins[:, 2]
    ones = torch.ones_like(bins, dtype=torch.float32)
    counts = torch.zeros(len(images), 216, device=images.device).scatter_add_(1, bins, ones)
    return (counts / bins.shape[1]).sqrt()


def hog(images: UInt8[Tensor, "n C H W"], chunk: int = 256) -> Float[Tensor, "n F"]:
    """Describe an image by its edges: histograms of oriented gradients.

        cell (8 x 8 px): sum of gradient lengths in 9 bins of 20 degrees, unsigned; the strongest of all channels counts
        block (2 x 2 cells, all overlapping): v / ||v||, cut at 0.2, v / ||v|| again (L2-Hys)

    Returns:
        (n, (H/8 - 1) * (W/8 - 1) * 36), in [0, 1]; a rest of H or W below 8 px is ignored.
    Raises:
        ValueError: a side is under 16 px; there is no block.
    Source: Dalal and Triggs 2005; the same numbers as skimage.feature.hog(block_norm="L2-Hys", channel_axis=-1).
    """
    expect_pixels(images)
    if min(images.shape[2:]) < 16:
        raise ValueError(f"expected sides of at least 16 px (2 x 2 cells), got {tuple(images.shape[2:])} px")
    return torch.cat([torch.from_numpy(_hog(part.numpy())) for part in images.cpu().split(chunk)])


def _hog(images: np.ndarray) -> np.ndarray:
    x = images.astype(np.float64)
    down, right = np.zeros_like(x), np.zeros_like(x)  # borders have no gradient
    down[:, :, 1:-1] = x[:, :, 2:] - x[:, :, :-2]
    right[:, :, :, 1:-1] = x[:, :, :, 2:] - x[:, :, :, :-2]
    strongest = np.argmax(down**2 + right**2, axis=1)[:, None]
    down, right = (np.take_along_axis(g, strongest, 1)[:, 0] for g in (down, right))
    rows, columns = x.shape[2] // 8, x.shape[3] // 8
    down, right = down[:, : rows * 8, : columns * 8], right[:, : rows * 8, : columns * 8]
    angle = np.minimum(np.rad2deg(np.arctan2(down, right)) % 180 // 20, 8).astype(np.int64)
    n, height, width = angle.shape
    cell_row, cell_column = np.arange(height)[:, None] // 8, np.arange(width)[None] // 8
    slot = ((np.arange(n)[:, None, None] * rows + cell_row) * columns + cell_column) * 9 + angle
    cells = np.bincount(slot.ravel(), np.hypot(down, right).ravel(), n * rows * columns * 9)
    cells = cells.reshape(n, rows, columns, 9) / 64
    corners = [cells[:, i : i + rows - 1, j : j + columns - 1] for i in (0, 1) for j in (0, 1)]
    blocks = np.concatenate(corners, -1)  # (n, rows - 1, columns - 1, 36)
    blocks = blocks / np.sqrt((blocks**2).sum(-1, keepdims=True) + 1e-10)
    blocks = np.minimum(blocks, 0.2)
    blocks = blocks / np.sqrt((blocks**2).sum(-1, keepdims=True) + 1e-10)
    return blocks.reshape(n, -1).astype(np.float32)
