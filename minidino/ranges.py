"""What the values of a config may be, said in their types: `steps: Positive = 1500` refuses 0."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


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
    """A part of the config, whose fields say in their types what they may be.

    Args:
        name: of the part in the config, where a class of it is made.
    """

    def __init_subclass__(cls, name: str):
        cls.stage = name

    def __post_init__(self):
        for name, allowed in ranges_of(type(self)).items():
            if (value := getattr(self, name)) is not None:
                require(value in allowed, f"{self.stage}.{name}", str(allowed), value)


@cache
def ranges_of(stage: type[Stage]) -> dict[str, Range]:
    """{field: what it may be}, of those that have a range, alone or beside None."""
    found = {}
    for name, hint in get_type_hints(stage, include_extras=True).items():
        for kind in (hint, *get_args(hint)):
            if hasattr(kind, "__metadata__"):  # of Annotated
                found[name] = kind.__metadata__[0]
    return found


def convert(value: Any, wanted: Any) -> tuple[Any, bool]:
    """A value of JSON or of a text as a field of this type holds it, and whether it can."""
    origin, options = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        return value, value in options and not isinstance(value, bool)
    if origin is Union or origin is type(int | None):
        return next((found for found in (convert(value, option) for option in options) if found[1]), (value, False))
    if origin is tuple:
        if isinstance(value, (tuple, list)) and options[-1] is ...:
            options = options[:1] * len(value)
        if not isinstance(value, (tuple, list)) or len(value) != len(options):
            return value, False
        parts = [convert(v, option) for v, option in zip(value, options, strict=True)]
        return tuple(p[0] for p in parts), all(p[1] for p in parts)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value), True
    return value, type(value) is wanted


def words_of(wanted: Any) -> str:
    """A type as people write it."""
    if get_origin(wanted) is Literal:
        return "one of " + ", ".join(repr(option) for option in get_args(wanted))
    if get_origin(wanted) is Union:
        return " | ".join(words_of(option) for option in get_args(wanted)).replace("NoneType", "None")
    return wanted.__name__ if isinstance(wanted, type) else str(wanted)
