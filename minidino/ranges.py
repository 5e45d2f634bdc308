"""What the numbers of a config may be, said in their types: `steps: Positive = 1500` refuses 0."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints


@dataclass(frozen=True)
class Range:
    """What a number may be: between two others, both included, or above the first where `open`; finite, or also inf
    where `endless`."""

    low: float
    high: float = math.inf
    open: bool = False
    unit: str = ""
    endless: bool = False

    def __contains__(self, value: float) -> bool:
        least = self.low < value if self.open else self.low <= value
        return least and value <= self.high and (self.endless or value != math.inf)

    def __str__(self) -> str:
        least = f"{'>' if self.open else '>='} {self.low}"
        return f"{least if self.high == math.inf else f'between {self.low} and {self.high}'} {self.unit}".rstrip()


Positive, Count, Side = Annotated[int, Range(1)], Annotated[int, Range(0)], Annotated[int, Range(1, unit="px")]
Share, AtLeastZero = Annotated[float, Range(0, 1)], Annotated[float, Range(0)]
AboveZero = Annotated[float, Range(0, open=True)]


def require(good: bool, name: str, expected: str, got: Any) -> None:
    """Raise ValueError, in the words of all configs, where something is not good."""
    if not good:
        raise ValueError(f"{name}: expected {expected}, got {got}")


class Stage:
    """A part of the config, whose fields say in their types what they may be."""

    stage = ""  # its name in the config

    def __post_init__(self):
        for name, allowed in ranges_of(type(self)).items():
            if (value := getattr(self, name)) is not None:
                require(value in allowed, f"{self.stage}.{name}", str(allowed), value)


@cache
def ranges_of(stage: type[Stage]) -> dict[str, Range]:
    """{field: what it may be}, of those that have a range, alone or beside None."""
    found = {}
    for name, hint in get_type_hints(stage, include_extras=True).items():
        kinds = [kind for kind in (hint, *get_args(hint)) if hasattr(kind, "__metadata__")]
        found |= {name: kind.__metadata__[0] for kind in kinds[:1]}
    return found
