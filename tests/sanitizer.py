"""Does a Triton kernel touch what is not its own? Asked in Triton's interpreter, so without a GPU.

    with sanitized() as launches: ...      # a kernel with a fault raises in here and names it

NVIDIA's compute-sanitizer (memcheck, initcheck, racecheck) looks at compiled kernels, this at their source:

    outside     every load and store lies within one tensor of the launch. All are copied far apart for it, so that no
                step leads from one into another, also where they are thirds of one projection
    race        no number is written twice, and what a launch writes it does not read
    unwritten   no number of what a launch writes is left as it was
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

APART = 1 << 16  # numbers between two tensors


class Ground:
    """A copy of one tensor, far from all others: where its numbers lie, and which of them were written."""

    def __init__(self, name: str, tensor: Tensor):
        places = torch.zeros(tensor.shape, dtype=torch.int64)
        for axis, (n, step) in enumerate(zip(tensor.shape, tensor.stride())):
            places += (torch.arange(n) * step).view(-1, *[1] * (tensor.dim() - axis - 1))
        span = int(places.max()) + 1 if places.numel() else 0
        self.around = tensor.new_zeros(span + 2 * APART)
        self.around[APART : APART + span] = tensor.as_strided((span,), (1,))
        self.name, self.original = name, tensor
        self.tensor = self.around.as_strided(tensor.shape, tensor.stride(), APART)
        self.addresses = np.unique(self.tensor.data_ptr() + places.flatten().numpy() * tensor.itemsize)
        self.read, self.written = False, np.zeros(len(self.addresses), bool)

    def find(self, addresses: np.ndarray) -> np.ndarray | None:
        """Which numbers these are; None where one of them is none of this tensor."""
        found = np.searchsorted(self.addresses, addresses)
        if found.max() >= len(self.addresses) or (self.addresses[found] != addresses).any():
            return None
        return found


class Launches:
    """What was watched: how many tiles were loaded and stored, and what each kernel wrote."""

    def __init__(self):
        self.accesses, self.written = 0, {}
        self.grounds: list[Ground] = []  # of the launch that goes on

    def begin(self, kernel: str, arguments: dict) -> dict:
        """Put a copy in the place of each tensor; a view that is given twice has one copy."""
        grounds: dict[tuple, Ground] = {}
        for name, x in arguments.items():
            if isinstance(x, Tensor):
                view = x.data_ptr(), x.shape, x.stride()
                if view not in grounds:
                    grounds[view] = Ground(name, x)
                arguments[name] = grounds[view].tensor
        self.kernel, self.grounds = kernel, list(grounds.values())
        return arguments

    def access(self, pointers, mask, what: str) -> tuple[Ground, np.ndarray] | None:
        """The tensor that a tile of addresses lies in, and the numbers of it that are asked for, if any."""
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        self.accesses += 1
        if not addresses.size:
            return None
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for ground in self.grounds:
            if ground.tensor.itemsize == size and (found := ground.find(addresses)) is not None:
                return ground, found
        raise AssertionError(f"outside: a {what} of {addresses.size} numbers lies in no tensor of the launch")

    def load(self, pointers, mask) -> None:
        if found := self.access(pointers, mask, "load"):
            ground, _ = found
            assert not ground.written.any(), f"race: {ground.name} is written and then read"
            ground.read = True

    def store(self, pointers, mask) -> None:
        if found := self.access(pointers, mask, "store"):
            ground, numbers = found
            assert len(np.unique(numbers)) == len(numbers), f"race: one store writes numbers of {ground.name} twice"
            assert not ground.written[numbers].any(), f"race: two stores write numbers of {ground.name}"
            assert not ground.read, f"race: {ground.name} is read and then written"
            ground.written[numbers] = True

    def finish(self) -> None:
        for ground in self.grounds:
            if ground.written.any():
                left = np.count_nonzero(~ground.written)
                assert not left, f"unwritten: {left} numbers of {ground.name}"
                ground.original.copy_(ground.tensor)
                self.written.setdefault(self.kernel, set()).add(ground.name)


@contextmanager
def sanitized() -> Iterator[Launches]:
    """Watch every launch. Raises AssertionError or, from inside of a kernel, an InterpreterError with its words."""
    seen, builder = Launches(), interpreter.InterpreterBuilder
    launch, load, store = interpreter.GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store

    def watched_launch(self, *args, **options):
        given = {name: x for name, x in options.items() if name in inspect.signature(self.fn).parameters}
        arguments = seen.begin(self.fn.__name__, inspect.getcallargs(self.fn, *args, **given))
        launch(self, **arguments)
        seen.finish()

    def watched_load(self, pointers, mask, *rest):
        seen.load(pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        seen.store(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def unwatched(self, *_):
        raise NotImplementedError("atomic operations are not watched yet: say here what they may touch")

    with (
        patch.object(interpreter.GridExecutor, "__call__", watched_launch),
        patch.object(builder, "create_masked_load", watched_load),
        patch.object(builder, "create_masked_store", watched_store),
        patch.object(builder, "create_atomic_rmw", unwatched),
        patch.object(builder, "create_atomic_cas", unwatched),
    ):
        yield seen
