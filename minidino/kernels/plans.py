"""Who works on what: the tiles of a pack of crops, made once for each sequence of lengths."""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import groupby

import torch
from jaxtyping import Int32
from torch import Tensor

from minidino.kernels.tuning import Tiling


class Plan:
    """Which program works on what, for one sequence of lengths on one device; made once, looked up afterwards.

    A tile is (first row, first row of its crop, row behind its crop), and a short tile counts as one crop.

    Args:
        longest: tokens of a crop that a short tile takes.
    """

    def __init__(self, lengths: Sequence[int], longest: int, device: torch.device):
        self.device, self.short, self.long = device, [], []
        first = 0
        for n in lengths:
            (self.short if n <= longest else self.long).append((first, first + n))
            first += n
        self.lengths, self._tiles = torch.tensor(lengths, dtype=torch.int64), {}

    def tiles(self, tiling: Tiling) -> Int32[Tensor, "tiles 3"]:
        if tiling not in self._tiles:
            cut = self._short_tiles(tiling.rows) if not tiling.columns else [
                (start, first, end) for first, end in self.long for start in range(first, end, tiling.rows)
            ]  # fmt: skip
            self._tiles[tiling] = torch.tensor(cut, dtype=torch.int32, device=self.device)
        return self._tiles[tiling]

    def _short_tiles(self, rows: int) -> list[tuple[int, int, int]]:
        """As many whole crops as fit, next to each other."""
        tiles: list[tuple[int, int, int]] = []
        for first, end in self.short:
            if tiles and tiles[-1][2] == first and end - tiles[-1][0] <= rows:
                tiles[-1] = (tiles[-1][0], tiles[-1][0], end)
            else:
                tiles.append((first, first, end))
        return tiles

    @cached_property
    def crops(self) -> Int32[Tensor, "T"]:
        """Number of the crop that each token is in."""
        numbers = torch.arange(len(self.lengths), dtype=torch.int32)
        return torch.repeat_interleave(numbers, self.lengths).to(self.device)


@lru_cache(maxsize=256)
def plan_of(runs: tuple[int, ...], longest: int, device: torch.device) -> Plan:
    """The plan of `runs`: a length, how many crops have it, the next length, ..."""
    return Plan([n for n, count in zip(runs[::2], runs[1::2]) for _ in range(count)], longest, device)


@lru_cache(maxsize=256)
def runs_of(seqlens: tuple[int, ...]) -> list[int]:
    """Lengths as `plan_of` takes them: torch hands a list from layer to layer number by number, so it is kept short."""
    return [x for n, run in groupby(seqlens) for x in (n, len(list(run)))]
