"""Does a Triton kernel touch what is not its own? Asked in Triton's interpreter, so without a GPU.

    with sanitized() as launches: ...      # a kernel with a fault raises in here and names it

What NVIDIA's compute-sanitizer looks for in compiled kernels (memcheck, initcheck, racecheck) is looked for in their source:

    outside     every load and store lies within one tensor of the launch, view by view: a step from q into k is seen
                even where both are thirds of one projection
    race        no number is written twice, and what a launch writes it does not read
    unwritten   no number of what a launch writes is left as it was
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter


class Ground:
    """Where the numbers of one tensor lie, and which of them were written."""

    def __init__(self, name: str, tensor: Tensor):
        places = torch.zeros(tensor.shape, dtype=torch.int64)
        for axis, (n, step) in enumerate(zip(tensor.shape, tensor.stride())):
            places += (torch.arange(n) * step).view(-1, *[1] * (tensor.dim() - axis - 1))
        self.name, self.size = name, tensor.itemsize
        self.addresses = np.sort(tensor.data_ptr() + places.flatten().numpy() * tensor.itemsize)
        self.read, self.written = False, np.zeros(len(self.addresses), bool)

    def find(self, addresses: np.ndarray) -> np.ndarray | None:
        """Which numbers these are; None where one of them is none of this tensor."""
        found = np.searchsorted(self.addresses, addresses)
        if found.max(initial=-1) >= len(self.addresses) or (self.addresses[found] != addresses).any():
            return None
        return found


@dataclass
class Launches:
    """What was watched, and the tensors of the launch that goes on."""

    kernels: set[str] = field(default_factory=set)
    accesses: int = 0  # loads and stores of whole tiles
    grounds: list[Ground] = field(default_factory=list)

    def access(self, pointers, mask, what: str) -> tuple[Ground, np.ndarray] | None:
        """The tensor that a tile of addresses lies in, and the numbers of it that are asked for, if any."""
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        self.accesses += 1
        if not addresses.size:
            return None
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for ground in self.grounds:
            found = ground.find(addresses)
            if found is not None and ground.size == size:
                return ground, found
        raise AssertionError(f"outside: a {what} of {addresses.size} numbers lies in no tensor of the launch")

    def load(self, pointers, mask) -> None:
        if found := self.access(pointers, mask, "load"):
            ground, _ = found
            assert not ground.written.any(), f"race: {ground.name} is written and read"
            ground.read = True

    def store(self, pointers, mask) -> None:
        if found := self.access(pointers, mask, "store"):
            ground, numbers = found
            twice = len(np.unique(numbers)) < len(numbers) or ground.written[numbers].any()
            assert not twice, f"race: numbers of {ground.name} are written twice"
            assert not ground.read, f"race: {ground.name} is read and written"
            ground.written[numbers] = True

    def finish(self) -> None:
        for ground in self.grounds:
            left = np.count_nonzero(~ground.written)
            assert not ground.written.any() or not left, f"unwritten: {left} numbers of {ground.name}"


@contextmanager
def sanitized() -> Iterator[Launches]:
    """Watch every launch. Raises AssertionError or, from inside of a kernel, an InterpreterError with its words."""
    seen, builder = Launches(), interpreter.InterpreterBuilder
    launch, load, store = interpreter.GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store

    def watched_launch(self, *args, **options):
        given = {name: x for name, x in options.items() if name in inspect.signature(self.fn).parameters}
        named = inspect.getcallargs(self.fn, *args, **given)
        seen.grounds = [Ground(name, x) for name, x in named.items() if isinstance(x, Tensor)]
        seen.kernels.add(self.fn.__name__)
        launch(self, *args, **options)
        seen.finish()

    def watched_load(self, pointers, mask, *rest):
        seen.load(pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        seen.store(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        patch.object(interpreter.GridExecutor, "__call__", watched_launch),
        patch.object(builder, "create_masked_load", watched_load),
        patch.object(builder, "create_masked_store", watched_store),
    ):
        yield seen
