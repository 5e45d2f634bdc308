"""What every test relies on: checked shapes, fixed seeds, the photographs if they are there."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]
CHECKED = ["minidino.learning.losses", "minidino.learning.prototypes", "minidino.images.masks", "minidino.images.crops",
           "minidino.images.resize", "minidino.model"]  # fmt: skip

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels run step by step on the CPU
install_import_hook(CHECKED, "beartype.beartype")  # before any of them is imported: an annotation cannot lie
torch.set_num_threads(min(2, torch.get_num_threads()))  # the same sums in the same order, also on large machines


@pytest.fixture(autouse=True)
def seeds() -> Iterator[None]:
    """Every test starts from the same seeds, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield


@pytest.fixture
def dying_at_save(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """A block whose run is killed when it wants to write its checkpoint number n, from 0."""
    from minidino.runs import Run

    @contextmanager
    def dying(moment: int) -> Iterator[None]:
        save, saved = Run.save, []

        def save_or_die(run: Run, *arguments) -> Path:
            if len(saved) == moment:
                raise KeyboardInterrupt
            saved.append(run)
            return save(run, *arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Run, "save", save_or_die)
            yield

    return dying


@pytest.fixture
def shared_data() -> Path:
    """The folder of photographs that lies beside the repository, or a skip with the reason."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.exists():
        pytest.skip(f"no photographs at {folder}")
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
