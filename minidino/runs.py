"""The run folder: what a run is, what it measured, and how it goes on after it was killed.

    config.json   environment.json   metrics.jsonl   checkpoints/step_00000200.pt   weights.safetensors   report.html

A checkpoint is written beside its place, flushed to the disk and renamed: it is whole or it is not there. Metrics are
cut back to the checkpoint on resume, so that no step is told twice.
"""

import ctypes
import glob
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from minidino.config import RunConfig, from_json, to_json

PACKAGES = ("minidino", "torch", "torchvision", "numpy", "einops", "faiss-cpu", "pillow", "matplotlib")
BEFORE = ("pixels", "curation")  # what may stand in a run folder before the run
NOTES = ("guard.json", "teacher.json", "environment.json")  # written before config.json, which makes the folder a run
RESULTS = ("weights.safetensors", "heads.safetensors", "results.json", "report.html", "guard.json", "teacher.json",
           "pictures.json")  # fmt: skip


def pick_device(name: str = "auto") -> torch.device:
    """The named device, or the first of cuda, mps, cpu that is there.

    Raises:
        ValueError: the device asked for is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, available in there.items() if available))
    if not there.get(name.split(":")[0], False):
        raise ValueError(f"run.device: expected one of {[k for k, v in there.items() if v]} here, got {name!r}")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """The named precision, or for "auto" bf16 where the device multiplies it natively and fp32 where not.

    What a device does not have it emulates, many times slower than fp32; torch calls that supported, too.
    """
    if name != "auto":
        return name
    native = {
        "cuda": partial(torch.cuda.is_bf16_supported, including_emulation=False),
        "cpu": torch.cpu._is_avx512_bf16_supported,
    }
    return "bf16" if device.type in native and native[device.type]() else "fp32"


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory instead of giving it back to the kernel; True where that worked.

    A training step frees and asks again for the same hundred megabytes, and each page that comes back from the
    kernel is zeroed first: with the default settings that can cost more than the arithmetic.
    """
    return _tell_malloc(mmap_max=0, trim_threshold=2**31 - 1, top_pad=64 << 20)


def give_back_memory() -> None:
    """Return to glibc's own ways after training, and hand what is free to the kernel."""
    if _tell_malloc(mmap_max=65536, trim_threshold=128 << 10, top_pad=128 << 10):  # the defaults of mallopt(3)
        ctypes.CDLL(None).malloc_trim(0)


def _tell_malloc(**settings: int) -> bool:
    """Set options of glibc's malloc; True where that worked."""
    options = {"trim_threshold": -1, "top_pad": -2, "mmap_max": -4}  # M_... of malloc.h
    if platform.system() != "Linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    return all(libc.mallopt(options[name], value) for name, value in settings.items())


def peak_memory_mb() -> float | None:
    """The most memory that this process has held so far, MiB; None where the system does not tell."""
    with suppress(OSError, StopIteration):  # Linux; its ru_maxrss begins with what the parent held
        lines = Path("/proc/self/status").read_text().splitlines()
        return round(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024**2 if platform.system() == "Darwin" else 1024), 1)


def environment(seed: int, device: torch.device) -> dict[str, Any]:
    """What a number depends on besides the config: machine, versions, commit, date."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": _machine(device),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "seed": seed,
        "commit": _commit(),
        "versions": versions,
        "command": command(),
    }


def command() -> list[str]:
    """How this process was called."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str | None:
    ask = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    with suppress(OSError):
        return subprocess.run(ask, capture_output=True, text=True).stdout.strip() or None
    return None


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either whole or not there, whenever the process dies."""
    with atomic_path(path) as beside, open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Any) -> None:
    """The same for what people may read, too."""
    write_atomically(path, json.dumps(content, indent=1).encode())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path to write to; it takes its real name when the block ends well. What killed writers of it have left goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_litter(path.parent, f"{glob.escape(path.name)}.*", silent_s=3600)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named_errors(path):
            beside.touch()
            mode = beside.stat().st_mode  # some writers leave files that only their owner may read
            yield beside
        beside.chmod(mode)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def writer_is_dead(unfinished: Path, silent_s: float = 0) -> bool:
    """Has the process ended whose number stands before the suffix of this name, and is it silent for so long? One on
    another machine, which shares the folder, looks as if it had ended. False where there is no asking."""
    with suppress(OSError, ValueError):  # somebody else's, or just finished; no number
        try:
            if os.name == "posix":  # on Windows this would end the process
                os.kill(int(unfinished.name.split(".")[-2]), 0)  # no signal: an error where there is no such process
        except ProcessLookupError:
            return time.time() - unfinished.stat().st_mtime >= silent_s
    return False


def remove_litter(folder: Path, pattern: str = "*", silent_s: float = 0) -> None:
    """Delete what killed processes have left half-written in a folder, of files that are called so."""
    for file in folder.glob(f".{pattern}.tmp"):
        if writer_is_dead(file, silent_s):
            file.unlink(missing_ok=True)


def expanded(path: str | Path) -> Path:
    """The path with its `~` replaced by the home; one that is nobody's stands as it is, and may be a folder's name."""
    return Path(os.path.expanduser(path))


def home_cache() -> Path:
    """Where downloads and indices are kept for all runs: $XDG_CACHE_HOME/minidino, or else ~/.cache/minidino; where there
    is no home, as in containers that run as a number, a folder for temporary files."""
    cache = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return (Path(tempfile.gettempdir()) if str(cache).startswith("~") else cache) / "minidino"


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Let errors of reading and writing name this file where they name none: a full disk does not say which."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:  # words without a number would be lost
            error.filename = str(path)
        raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Make OSErrors that name this file of what torch and safetensors raise where a disk is full."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        said = (str(error).splitlines() or ["no words"])[0]
        raise OSError(f"{path} could not be written, is the disk full? {said}") from error


@contextmanager
def alone_in(*folders: Path) -> Iterator[None]:
    """Keep other processes that ask for this out of folders meanwhile; Windows, and some disks of a network, lock none.

    What killed processes have left half-written there is removed.

    Raises:
        BlockingIOError: another process is at work there.
    """
    with ExitStack() as stack:
        for folder in folders:
            try:
                import fcntl

                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(f"another process is at work in {folder}: wait, or stop it first") from None
            except (ImportError, OSError):
                pass
            remove_litter(folder)
        yield


def expect_no_run(folder: str | Path) -> None:
    """Raise FileExistsError where something else is to be written into a run folder, which has a report of its own."""
    if Run(folder).config_path.exists():
        raise FileExistsError(f"{folder} holds a run, which has a report of its own: choose another with --out")


class Run:
    """One run folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config_path = self.folder / "config.json"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.checkpoints = self.folder / "checkpoints"

    @classmethod
    def create(
        cls,
        folder: str | Path,
        config: RunConfig,
        device: torch.device,
        first: dict[str, Any] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> "Run":
        """Start a run folder; what an earlier run left there is replaced.

        Args:
            first: the state to start from, where that is not a fresh one: saved before the folder becomes a run, so
                that none which was killed early goes on from fresh weights.
            notes: {file name: what it shall hold as JSON}, there before the folder becomes a run as well.
        Raises:
            FileExistsError: the folder holds something that is not a run.
        """
        run = cls(folder)
        run.expect_room()
        left = [path for _, path in run.saved()] + [run.folder / name for name in RESULTS]
        for path in [run.metrics_path, *left]:
            path.unlink(missing_ok=True)
        if first is not None:
            run.save(0, first, 1)
        for name, said in {**(notes or {}), "environment.json": environment(config.run.seed, device)}.items():
            write_json(run.folder / name, said)
        write_atomically(run.config_path, to_json(config).encode())
        return run

    def expect_room(self) -> None:
        """Raise FileExistsError where something else lives here; what a kill left of a beginning does not."""
        begun = {"checkpoints"} if all(step == 0 for step, _ in self.saved()) else set()
        known = {*BEFORE, *NOTES, *begun}
        strangers = [path for path in self.folder.glob("*") if path.name not in known and path.suffix != ".tmp"]
        if strangers and not self.config_path.exists():
            raise FileExistsError(f"{self.folder} is not empty and not a run folder; choose another with --out")

    def begun(self) -> int | None:
        """When this folder became a run, in ns since 1970; None where it is none."""
        return self.config_path.stat().st_mtime_ns if self.config_path.exists() else None

    @contextmanager
    def taken(self, begun: int | None) -> Iterator[None]:
        """Keep others out while a run begins here: two that open their pictures at once both found room.

        Args:
            begun: what `begun` said when room was found.
        Raises:
            BlockingIOError: another process is at work there.
            FileExistsError: another process has begun a run there since.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone_in(self.folder):
            if self.begun() != begun:
                raise FileExistsError(f"another process has begun a run in {self.folder} meanwhile: choose another folder "
                                      "with --out")  # fmt: skip
            yield

    def config(self) -> RunConfig:
        """Raises FileNotFoundError when the folder is not a run, ValueError when its config is damaged."""
        if not self.config_path.exists():
            raise FileNotFoundError(f"{self.folder} is not a run folder: it has no config.json")
        try:
            return from_json(self.config_path.read_text())
        except ValueError as error:
            raise ValueError(f"{self.config_path}: {error}") from error

    def compare_pictures(self, pixels: Any) -> None:
        """Note which pictures, `Pixels`, are learned from; warn where a run goes on with others than it began with."""
        names = repr(pixels.files).encode("utf-8", "surrogateescape")
        now = {"n": len(pixels.files), "sha256": hashlib.sha256(names + pixels.sizes.tobytes()).hexdigest()}
        path = self.folder / "pictures.json"
        then = json.loads(path.read_text()) if path.exists() else now
        if then != now:
            counts = f"{self.folder} began with {then['n']} pictures and goes on with {now['n']}, some of them others"
            warnings.warn(f"{counts}: what it sees is another order, and may have been held out before", stacklevel=2)
        write_atomically(path, json.dumps(now).encode())

    # -- metrics: one JSON object a line

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with named_errors(self.metrics_path), open(self.metrics_path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """Every whole line; a last line that a kill cut in half is left out."""
        if not self.metrics_path.exists():
            return []
        records = []
        for line in self.metrics_path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def cut_records(self, step: int) -> None:
        """Forget what was measured at this step and later: the run goes on from there."""
        kept = [record for record in self.records() if record["step"] < step]
        write_atomically(self.metrics_path, "".join(json.dumps(record) + "\n" for record in kept).encode())

    # -- checkpoints

    def saved(self) -> list[tuple[int, Path]]:
        """(step, file) of the whole checkpoints, oldest first."""
        files = sorted(self.checkpoints.glob("step_*.pt"))
        steps = [(file.stem.removeprefix("step_"), file) for file in files]
        return [(int(step), file) for step, file in steps if step.isdecimal()]

    def save(self, step: int, state: dict[str, Any], keep: int) -> Path:
        """Write the state before `step`; forget all but the newest `keep`, and what a kill left half-written."""
        path = self.checkpoints / f"step_{step:08d}.pt"
        with atomic_path(path) as beside, disk_errors(path):
            torch.save(state, beside)
            with open(beside, "rb") as file:
                os.fsync(file.fileno())
        # a newer file is one that could not be read: it must not push out those that can
        older = [file for number, file in self.saved() if number <= step][:-keep]
        for file in [*older, *self.checkpoints.glob(".step_*.tmp")]:
            file.unlink()
        return path

    def load(self, device: torch.device, at_most: int | None = None) -> tuple[int, dict[str, Any]] | None:
        """The newest whole checkpoint up to step `at_most`, or None when the run was killed before the first.

        A kill leaves no damaged file, but a disk may: such a checkpoint is passed over with a warning.

        Raises:
            ValueError: there are checkpoints and all are damaged.
        """
        saved = [(step, path) for step, path in self.saved() if at_most is None or step <= at_most]
        for step, path in reversed(saved):
            if damage := _damage(path):
                warnings.warn(f"{path} is damaged and passed over: {damage}", stacklevel=2)
                continue
            return step, torch.load(path, map_location=device, weights_only=True)
        if saved:
            raise ValueError(f"all checkpoints in {self.checkpoints} are damaged; remove them to start from step 0")
        return None


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint file, "" when it is whole; torch.load alone looks at no checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
        torch.load(path, map_location="meta", weights_only=True)  # the structure alone
    except Exception as error:  # both have many ways to fail on random bytes
        return f"{type(error).__name__}: {error}"
    return f"wrong checksum in {part}" if part else ""
