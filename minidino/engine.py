"""Where chunks of work run: in this process, or on the machines of a Ray cluster.

    engine.map(work, items)    -> work(*item) of each item, in order, one by one as they are asked for
    engine.keep(work, items)   -> handles of work(*item), kept where they were made, for the items of a later `map`

The stages are written once, over chunks that are fixed by their place in the pool; an engine says no more than where a
chunk runs. So both give the same bytes.

Ray Data carries `map`, with an answer for each chunk and not a row for each picture, since batches of rows that depend
on how many workers there are would not be equal to the bit. Plain tasks carry `keep`: a dataset would bring what they
make, such as an index over a million rows, to whoever looks at it.
"""

import logging
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from io import BytesIO
from typing import Any, Protocol

import numpy as np
import torch

ENGINES = ("local", "ray")
RETRIES = 3  # of a chunk whose worker dies: more than bad luck means that the chunk itself kills it
Span = tuple[int, int]  # first row, and the one after the last


class Engine(Protocol):
    """Where chunks run."""

    threads: int  # that a chunk which is not arithmetic, such as decoding, may use

    def map(self, work: Callable[..., Any], items: Iterable[tuple], gpu: bool = False) -> Iterator[Any]:
        """Answers in the order of the items.

        Args:
            work: a function of an item's parts that depends on nothing else. Raises what it raises here.
            items: tuples of what is small; what is large belongs to the work.
            gpu: the work needs the GPU, where this process has one.
        """

    def keep(self, work: Callable[..., Any], items: Iterable[tuple]) -> list[Any]:
        """Handles of the answers; `map` hands the answers themselves to its work."""


class Local:
    """This process, one chunk after the other."""

    threads = min(8, os.cpu_count() or 1)  # Pillow and zlib release the lock

    def map(self, work: Callable[..., Any], items: Iterable[tuple], gpu: bool = False) -> Iterator[Any]:
        return (work(*item) for item in items)

    def keep(self, work: Callable[..., Any], items: Iterable[tuple]) -> list[Any]:
        return [work(*item) for item in items]


LOCAL = Local()


class Ray:
    """The cluster that RAY_ADDRESS names or that `ray start` began here, else one of this machine alone.

    A task takes as many CPUs as torch has threads in this process, since the number of threads decides in which order
    is summed: OMP_NUM_THREADS=1 makes many small tasks. A task whose worker was killed runs again. Memory maps travel
    as the names of their files: pool and folder have to lie under the same path on all machines, and minidino has to
    be installed on each.
    """

    def __init__(self) -> None:
        """Join the cluster, or start one.

        Raises:
            ValueError: Ray is not installed, or no machine has as many CPUs as torch has threads here.
        """
        if find_spec("ray") is None:
            raise ValueError("engine ray: expected the extra of that name: pip install 'minidino[ray]'")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
        import ray
        import ray.data

        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        ray.util.register_serializer(np.memmap, serializer=_named, deserializer=_opened)
        ray.util.register_serializer(torch.jit.RecursiveScriptModule, serializer=_scripted, deserializer=_unscripted)
        self.threads = torch.get_num_threads()
        most = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        if most < self.threads:
            raise ValueError(f"engine ray: expected a machine with {self.threads} CPUs, one for each thread of torch "
                             f"here, got at most {most}; set OMP_NUM_THREADS={max(most, 1)}")  # fmt: skip

    def map(self, work: Callable[..., Any], items: Iterable[tuple], gpu: bool = False) -> Iterator[Any]:
        import ray

        items = list(items)
        if not items:
            return
        job = ray.put((work, items))
        data = ray.data.range(len(items), override_num_blocks=len(items))
        data.context.execution_options.preserve_order = True
        data.context.enable_progress_bars = False
        answers = data.map_batches(
            _Chunk(job, self.threads), batch_size=1, num_cpus=self.threads,
            num_gpus=int(gpu and torch.cuda.is_available()), ray_remote_args_fn=lambda: {"max_retries": RETRIES},
        )  # fmt: skip
        try:
            for row in answers.iter_rows():
                yield row["answer"].value()
        except ray.exceptions.RayError as error:
            raise ChildProcessError(_last_words(error)) from None

    def keep(self, work: Callable[..., Any], items: Iterable[tuple]) -> list[Any]:
        import ray

        job, items = ray.put(work), list(items)
        task = ray.remote(_kept).options(num_cpus=self.threads, num_returns=2, max_retries=RETRIES)
        pairs = [task.remote(job, item, self.threads) for item in items]
        try:
            for said, _ in pairs:
                ray.get(said).value()
        except ray.exceptions.RayError as error:
            raise ChildProcessError(_last_words(error)) from None
        return [made for _, made in pairs]


def pick_engine(name: str) -> Engine:
    """The engine of that name. Raises ValueError for another one, or where it is not installed."""
    if name not in ENGINES:
        raise ValueError(f"expected an engine of {ENGINES}, got {name!r}")
    return LOCAL if name == "local" else Ray()


def spans(n: int, size: int, start: int = 0) -> list[Span]:
    """Cut the rows from `start` to n into chunks of `size`."""
    return [(first, min(first + size, n)) for first in range(start, n, size)]


# ---------------------------------------------------------------- on the workers


@dataclass
class _Answer:
    """What came of a chunk; an error of the work itself is an answer, and is not tried again."""

    found: Any = None
    error: Exception | None = None

    def value(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.found


@dataclass
class _Chunk:
    """Answers the batch of one number that Ray Data hands out."""

    job: Any
    threads: int

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        work, items = _unpacked(self.job)
        answer = np.empty(1, dtype=object)
        answer[0] = _tried(work, items[int(batch["id"][0])], self.threads)
        return {"answer": answer}


def _kept(work: Callable[..., Any], item: tuple, threads: int) -> tuple[_Answer, Any]:
    """The error, if there was one, apart from the answer: so that the first can be read and the second stays."""
    answer = _tried(work, item, threads)
    return _Answer(error=answer.error), answer.found


def _tried(work: Callable[..., Any], item: Sequence[Any], threads: int) -> _Answer:
    import ray

    torch.set_num_threads(threads)
    parts = [ray.get(part) if isinstance(part, ray.ObjectRef) else part for part in item]
    try:
        return _Answer(work(*parts))
    except Exception as error:
        return _Answer(error=error)


@lru_cache(maxsize=1)
def _unpacked(job: Any) -> tuple[Callable[..., Any], list[tuple]]:
    """Work and items, unpacked once for all chunks that a worker gets of them."""
    import ray

    return ray.get(job)


# ---------------------------------------------------------------- how things travel


def _named(array: np.memmap) -> tuple | np.ndarray:
    """The file of a memory map; a part of one goes as bytes."""
    whole = isinstance(array.base, mmap.mmap) and array.filename is not None and array.flags.c_contiguous
    return (str(array.filename), array.dtype.str, array.offset, array.shape) if whole else np.array(array)


def _opened(told: tuple | np.ndarray) -> np.ndarray:
    if isinstance(told, np.ndarray):
        return told
    name, dtype, offset, shape = told
    return np.memmap(name, dtype, "r", offset, shape)


def _scripted(module: torch.jit.ScriptModule) -> bytes:
    file = BytesIO()
    torch.jit.save(module, file)
    return file.getvalue()


def _unscripted(data: bytes) -> torch.jit.ScriptModule:
    return torch.jit.load(BytesIO(data))


def _last_words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"engine ray: gave up on a chunk whose worker died {RETRIES + 1} times, or lost the cluster: {lines[0]}"
