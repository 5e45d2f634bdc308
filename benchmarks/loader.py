"""What a loader does beside what one would use instead: crops on one core, decoding, and the whole way to a batch.

    python benchmarks/loader.py run [--data PATH] [--toy]     data/results/loader.json; --toy prints and stores nothing
    python benchmarks/loader.py draw                          the table of the stored result

PATH holds JPEG photographs, of which 64 are taken, spread over the set; without it scenes are drawn. All start from the
same decoded pictures, their shorter side brought to 256 px, and end with 2 x 224 + 8 x 96 normalised float crops under one
law; one thread each, batches of 8, in turns whose order rotates. Ours ends with the views of a batch in two tensors; the
others are spared the stacking of theirs. Peak memory is that of a process of its own, libraries and pictures included.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from recipe import RESULTS, made_on, put, store

from minidino.config import override, preset
from minidino.images.batches import make_batch
from minidino.images.crops import CropLaw, crop_seed, multi_crop, reference_view, released_laws
from minidino.images.datasets import open_images
from minidino.images.decode import decode, shrink
from minidino.images.pixels import Pixels
from minidino.images.scenes import draw_scenes
from minidino.runs import keep_freed_memory, peak_memory_mb

N_IMAGES, BATCH, REPEATS = 64, 8, 24
SHORT_SIDE, GLOBAL, LOCAL, N_LOCAL = 256, 224, 96, 8  # px, px, px
CROPPERS = ("ours", "torchvision on PIL", "torchvision v2 on tensors", "lightly DINOTransform")
DECODERS = ("ours", "PIL", "torchvision")


class Pictures(NamedTuple):
    """The same pictures as files and decoded."""

    files: list[bytes]
    pixels: Pixels
    words: str


Work = Callable[[int], Any]  # of the batch of this number


# ---------------------------------------------------------------- pictures


def pictures(data: str | None, toy: bool = False) -> Pictures:
    """JPEG files and what they hold, spread over a set; drawn scenes without one."""
    n, side = (4, 48) if toy else (N_IMAGES, SHORT_SIDE)
    if data is None:
        files = [_jpeg(image) for image in draw_scenes(n, side).images]
        words = f"{n} drawn scenes of {side} px"
    else:
        images = open_images(data)
        jpegs = [i for i, name in enumerate(images.files) if name.lower().endswith((".jpg", ".jpeg"))]
        if len(jpegs) < n:
            raise ValueError(f"{data}: expected at least {n} JPEG files, got {len(jpegs)}; leave --data out for scenes")
        files = [images.read(i) for i in jpegs[:: len(jpegs) // n][:n]]
        width, height = Image.open(io.BytesIO(files[0])).size
        words = f"{n} photographs of {images.name}, the first {width} x {height} px, shorter side at most {side} px"
    return Pictures(files, _pixels([shrink(decode(file), side) for file in files]), words)


def _jpeg(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return file.getvalue()


def _pixels(images: list[Image.Image]) -> Pixels:
    """Pictures of any size end to end."""
    arrays = [np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)) for image in images]
    sizes = np.array([array.shape[1:] for array in arrays], dtype=np.int64)
    lengths = np.array([array.size for array in arrays])
    labels, names = np.full(len(arrays), -1), [str(i) for i in range(len(arrays))]
    return Pixels(np.concatenate([a.reshape(-1) for a in arrays]), np.cumsum(lengths) - lengths, sizes, sizes, labels, [],
                  names)  # fmt: skip


# ---------------------------------------------------------------- who cuts


def cropper(name: str, found: Pictures, toy: bool = False) -> Work:
    """Batch k of these pictures, cut: everything that this one does for each step."""
    pixels, n_local = found.pixels, 2 if toy else N_LOCAL
    sizes = (32, 16) if toy else (GLOBAL, LOCAL)
    laws, batch = released_laws(*sizes), min(BATCH, len(pixels))

    def rows(k: int) -> list[int]:
        return [(k * batch + i) % len(pixels) for i in range(batch)]

    if name == "ours":

        def cut(k: int) -> Any:
            images, heights = pixels.batch(rows(k))
            seeds = [crop_seed(0, k, i) for i in rows(k)]
            return multi_crop(images, heights, laws[:2], laws[2], n_local, seeds)

        return cut
    images = [pixels.image(i) for i in range(len(pixels))]
    if name == "torchvision v2 on tensors":
        views, given = [_v2_view(law) for law in laws], [torch.from_numpy(image.copy()) for image in images]
    else:
        given = [Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))) for image in images]
        views = [reference_view(law) for law in laws]
    if name == "lightly DINOTransform":
        transform = _lightly(*sizes, n_local)
        return lambda k: [transform(given[i]) for i in rows(k)]
    views = [*views[:2], *views[2:] * n_local]
    return lambda k: [[view(given[i]) for view in views] for i in rows(k)]


def _lightly(global_size: int, local_size: int, n_local: int) -> Callable[[Image.Image], Any]:
    """lightly's transform under our law; its blur is PIL's, wider than 9 px and faster than torchvision's."""
    from lightly.transforms import DINOTransform

    return DINOTransform(
        global_crop_size=global_size, global_crop_scale=(0.32, 1.0), local_crop_size=local_size,
        local_crop_scale=(0.05, 0.32), n_local_views=n_local, gaussian_blur=(0.0, 0.9, 0.5), solarization_prob=0.2,
    )  # fmt: skip


def _v2_view(law: CropLaw) -> Callable[[torch.Tensor], torch.Tensor]:
    """The law in torchvision's second transforms, on uint8 tensors, whose resize is the fastest it has."""
    from torchvision.transforms import v2

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return v2.Compose([
        v2.RandomResizedCrop(law.size, law.scale, law.ratio, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(law.flip_p),
        v2.RandomApply([v2.ColorJitter(law.brightness, law.contrast, law.saturation, law.hue)], law.jitter_p),
        v2.RandomGrayscale(law.gray_p), v2.RandomApply([v2.GaussianBlur(9, law.blur_sigma)], law.blur_p),
        v2.RandomSolarize(128, law.solarize_p), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std),
    ])  # fmt: skip


# ---------------------------------------------------------------- decoding and the whole way


def decoders(found: Pictures) -> dict[str, Work]:
    """Picture k from bytes to upright RGB pixels; ours also refuses what is damaged."""
    from torchvision.io import ImageReadMode, decode_jpeg

    def of(k: int) -> bytes:
        return found.files[k % len(found.files)]

    return {
        "ours": lambda k: decode(of(k)),
        "PIL": lambda k: Image.open(io.BytesIO(of(k))).convert("RGB"),
        "torchvision": lambda k: decode_jpeg(torch.frombuffer(bytearray(of(k)), dtype=torch.uint8), ImageReadMode.RGB),
    }


def loaders(found: Pictures, toy: bool = False) -> dict[str, Work]:
    """Batch k as training takes it, crops and masks; from decoded pixels as in a run, and from files each time."""
    size = ["crops.global_size=32", "crops.local_size=16"] if toy else []
    config, batch = override(preset("vits16-in1k"), size), min(BATCH, len(found.pixels))

    def rows(k: int) -> torch.Tensor:
        return (torch.arange(batch) + k * batch) % len(found.pixels)

    def from_files(k: int) -> Any:
        pixels = _pixels([shrink(decode(found.files[i]), SHORT_SIDE) for i in rows(k)])
        return make_batch(config, k, *pixels.batch(range(batch)), rows(k))

    return {"from pixels": lambda k: make_batch(config, k, *found.pixels.batch(rows(k)), rows(k)),
            "from files": from_files}  # fmt: skip


# ---------------------------------------------------------------- measuring


def in_turns(works: dict[str, Work], repeats: int = REPEATS) -> dict[str, dict[str, float]]:
    """Seconds of each, done in rounds whose order rotates: quartiles; also of how often as long as the first it took."""
    names, times = list(works), []
    for repeat in range(repeats + 1):
        taken = {}
        for i in range(len(names)):
            name = names[(i + repeat) % len(names)]
            begun = time.perf_counter()
            works[name](repeat)
            taken[name] = time.perf_counter() - begun
        times.append(taken)
    found = {}
    for name in names:  # the first round warms up
        found[name] = _quartiles([taken[name] for taken in times[1:]])
        found[name]["ratio"] = _quartiles([taken[name] / taken[names[0]] for taken in times[1:]])
    return found


def _quartiles(values: list[float]) -> dict[str, Any]:
    """Of three values or more: of two, they would lie outside of what was seen, for a time even below zero."""
    if len(values) < 3:
        raise ValueError(f"quartiles of {len(values)} turns; expected 3 or more")
    low, middle, high = statistics.quantiles(values, n=4)
    return {"low": low, "median": middle, "high": high}


def rates(works: dict[str, Work], n_images: int, repeats: int = REPEATS) -> dict[str, dict[str, Any]]:
    """Images a second of each, and how many times as fast as each the first is, with quartiles."""
    return {name: {"per_s": n_images / s["median"], "seconds": s, "first_is_faster": s.pop("ratio")}
            for name, s in in_turns(works, repeats).items()}  # fmt: skip


def memory_alone(script: str, words: list[str]) -> dict[str, float]:
    """What a process of its own prints last, as JSON."""
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(script).name} {' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def alone(name: str, data: str | None, toy: bool) -> dict[str, float]:
    """Peak memory before and after a few batches, MiB; with one thread from here on."""
    torch.set_num_threads(1)
    work = cropper(name, pictures(data, toy), toy)
    before = peak_memory_mb()
    for k in range(3):
        work(k)
    return {"before_mb": before, "peak_mb": peak_memory_mb()}


def measure(data: str | None = None, toy: bool = False) -> dict[str, Any]:
    """The whole comparison; toy: a few small pictures, a few turns, no processes of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found, repeats = pictures(data, toy), 3 if toy else REPEATS
        batch = min(BATCH, len(found.pixels))
        result = {
            "pictures": found.words, "batch": batch, "threads": 1, "repeats": repeats,
            "crops": rates({name: cropper(name, found, toy) for name in CROPPERS}, batch, repeats),
            "decoding": rates(decoders(found), 1, 4 if toy else 10 * repeats),
            "loading": rates(loaders(found, toy), batch, repeats),
        }  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for name in () if toy else CROPPERS:
        result["crops"][name] |= memory_alone(__file__, ["alone", "--who", name, *(["--data", data] if data else [])])
    return result


# ---------------------------------------------------------------- the tables


def tables() -> dict[str, str]:
    """The table of docs/measured.md, written from the stored result, with the step's speed beside it where that is stored."""
    step = RESULTS / "step.json"
    return {"loader": table(json.loads((RESULTS / "loader.json").read_text()),
                            json.loads(step.read_text()) if step.exists() else None)}  # fmt: skip


def table(found: dict[str, Any], step: dict[str, Any] | None = None) -> str:
    lines = ["| 2 x 224 + 8 x 96 px crops | images/s | ours is faster | peak memory, MiB |", "|---|---|---|---|"]
    for name, row in found["crops"].items():
        memory = f"{row['peak_mb']:,.0f} ({row['peak_mb'] - row['before_mb']:,.0f} of them for cutting)" if "peak_mb" in row else ""
        lines.append(f"| {name} | {row['per_s']:.1f} | {_times(row, name)} | {memory} |")
    lines += ["", "| decoding a JPEG | images/s | ours is faster |", "|---|---|---|"]
    lines += [f"| {name} | {row['per_s']:.0f} | {_times(row, name)} |" for name, row in found["decoding"].items()]
    loading = ", ".join(f"{row['per_s']:.1f} {name}" for name, row in found["loading"].items())
    beside = f", and the training step takes {step['ours_per_s']:.2f} on {step['environment']['threads']} threads" if step else ""
    lines += ["", f"{found['pictures']}; one thread, batches of {found['batch']}; medians of {found['repeats']} turns, quartiles "
              f"in brackets. Whole batches with masks, images/s: {loading}{beside}. {made_on(found)}"]  # fmt: skip
    return "\n".join(lines)


def _times(row: dict[str, Any], name: str) -> str:
    q = row["first_is_faster"]
    return "" if name == "ours" else f"{q['median']:.2f} times ({q['low']:.2f} to {q['high']:.2f})"


def command(name: str, doc: str, who: Sequence[str], measure: Callable, alone: Callable, table: Callable, tables: Callable) -> None:
    """The command line of a benchmark that has a toy size, and rivals whose memory is measured each in its process."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "draw", "alone"), help="alone: the peak memory of one, as JSON")
    parser.add_argument("--data", help="JPEG photographs; without it scenes are drawn")
    parser.add_argument("--who", choices=who, default="ours")
    parser.add_argument("--toy", action="store_true", help="tiny sizes; nothing is stored")
    options = parser.parse_args()
    keep_freed_memory()
    try:
        if options.what == "draw":
            put(tables())
        elif options.what == "alone":
            print(json.dumps(alone(options.who, options.data, options.toy)))
        else:
            found = measure(options.data, options.toy)
            print(table(found if options.toy else json.loads(store(name, found).read_text())))
    except ImportError as error:
        parser.error(f"needs what it compares with: pip install -e '.[test]' ({error})")
    except (ValueError, OSError) as error:
        parser.error(str(error))


def main() -> None:
    command("loader", __doc__, CROPPERS, measure, alone, table, tables)


if __name__ == "__main__":
    main()
