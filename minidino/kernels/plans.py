"""Who works on what: the tiles of a pack of crops, made once for each sequence of lengths."""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import groupby

import torch
from jaxtyping import Int32
from torch import Tensor


class Plan:
    """Which program works on what, for one sequence of lengths on one device."""

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.lengths, self.device = lengths, device
        self._tiles: dict[int, Tensor] = {}

    def tiles(self, rows: int) -> Int32[Tensor, "tiles 3"]:
        """First row of a tile, first row of its crop, row behind its crop; whole crops in one tile count as one crop.

        Parts of long crops come first: they take longest, and the others fill the gaps at the end.
        """
        if rows not in self._tiles:
            cut = self._cut(rows)
            self._tiles[rows] = torch.tensor(cut, dtype=torch.int32, device=self.device).view(-1, 3)
        return self._tiles[rows]

    def _cut(self, rows: int) -> list[tuple[int, int, int]]:
        parts, whole, first = [], [], 0
        for n in self.lengths:
            end = first + n
            if n > rows:
                parts += [(start, first, end) for start in range(first, end, rows)]
            elif whole and whole[-1][2] == first and end - whole[-1][0] <= rows:
                whole[-1] = (whole[-1][0], whole[-1][0], end)
            else:
                whole.append((first, first, end))
            first = end
        return parts + whole

    @cached_property
    def crops(self) -> Int32[Tensor, "T"]:
        """Number of the crop that each token is in."""
        numbers = torch.arange(len(self.lengths), dtype=torch.int32)
        return torch.repeat_interleave(numbers, torch.tensor(self.lengths, dtype=torch.int64)).to(self.device)


@lru_cache(maxsize=256)
def plan_of(runs: tuple[int, ...], device: torch.device) -> Plan:
    """The plan of `runs`: a length, how many crops have it, the next length, ..."""
    return Plan([n for n, count in zip(runs[::2], runs[1::2]) for _ in range(count)], device)


@lru_cache(maxsize=256)
def runs_of(seqlens: tuple[int, ...]) -> list[int]:
    """Lengths as `plan_of` takes them: torch hands a list from layer to layer number by number, so it is kept short."""
    return [x for n, run in groupby(seqlens) for x in (n, len(list(run)))]
