"""Sets of pictures that a colour tells apart, for tests of what reads and judges folders."""

from pathlib import Path

import numpy as np
from PIL import Image

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def painted(folder: Path, n: int = 8, **colors: tuple[int, int, int]) -> str:
    """n noisy pictures of 32 px for each colour, in folders "split/class" where the name is "split_class"."""
    generator = np.random.default_rng(0)
    for name, color in colors.items():
        place = folder / name.replace("_", "/")
        place.mkdir(parents=True)
        for i in range(n):
            noisy = generator.integers(0, 30, (32, 32, 3)) + np.array(color)
            Image.fromarray(noisy.astype(np.uint8)).save(place / f"{i}.png")
    return str(folder)
