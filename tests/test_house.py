"""The house stands: who may import whom, where heavy libraries live, what a file may do and how long it may be."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from minidino.learning.losses import koleo_loss

ROOT = Path(__file__).resolve().parents[1]
ORDER = """
    ranges config runs distributed engine
    images.scenes images.decode images.archives images.named images.datasets images.pixels
    images.resize images.crops images.masks images.batches images.attacks images.corruptions images.pools
    images.layouts images.pairs
    curation.embeddings curation.search curation.duplicates curation.registration curation.clusters
    curation.retrieval curation.pipeline
    kernels.tuning kernels.plans kernels.sinkhorn kernels.attention kernels.prototypes
    model.attention model.layers model.heads model.vit
    model.layouts model.released model.weights
    learning.losses learning.prototypes learning.teacher learning.objective learning.optim learning.doctor learning.train
    learning.adapt learning.distill learning.copies
    probes.features probes.patches probes.knn probes.dense probes.segmentation probes.propagation probes.depth
    probes.dpt probes.heads probes.linear probes.grid probes.finetune probes.logistic probes.slices probes.retrieval
    pictures looking report scaling memory notebook stages judge subjects questions robust evaluate curate chain tour plan cli
""".split()  # a module imports only modules before it: so there are no cycles
HOMES = {
    "triton": ("kernels",),
    "torch.distributed": ("distributed",),
    "matplotlib": ("pictures", "looking"),
    "faiss": ("curation", "probes"),
    "PIL": ("images",),
    "torchvision": ("images",),
    "ray": ("engine",),
    "ipywidgets": ("notebook",),
}
LAZY = ("faiss", "ray", "ipywidgets")  # imported in the function that needs it
PACKAGES = {"PIL": "pillow", "faiss": "faiss-cpu", "skimage": "scikit-image", "sklearn": "scikit-learn"}  # import: name
CONDA = {"torch": "pytorch", "triton": None}  # pip: conda; None comes along with another
VAGUE = {"utils", "common", "base", "helpers", "misc"}
MAX_LINES = 420
REGISTRATION = re.compile(r"\w+\.register_\w+\(|torch\.library\.(define|impl|register_\w+)\(")  # of what is defined
ASSERTING = re.compile(r"assert|^raises$|^warns$|^fail$")
LOCAL = re.compile(r"(?<![\w.])/(?:work|home|root|Users)/\w|\b[s]essions?\b|--(?:extra-)?[i]ndex-url", re.IGNORECASE)

FILES = sorted((ROOT / "minidino").rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
MODULES = {
    ".".join(path.relative_to(ROOT / "minidino").with_suffix("").parts): path
    for path in FILES
    if path.name != "__init__.py"
}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(node: ast.AST) -> list[str]:
    """Full names that an import statement or an attribute of torch brings in; packages count as what is taken."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        return [f"torch.{node.attr}"]
    return []


def requirements(*extras: str) -> dict[str, str]:
    """{name: version bound} of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    pairs = (re.match(r"([\w-]+)([^;]*)", line).groups() for line in lines)
    return {name: bound.strip() for name, bound in pairs}


# ------------------------------------------------------------------------------------------------ rules for the package


def faults(module: str, tree: ast.Module) -> list[str]:
    """Every rule that a module of the package breaks, in words."""
    return _import_faults(module, tree) + _call_faults(tree) + _start_faults(tree)


def _import_faults(module: str, tree: ast.Module) -> list[str]:
    found, above = [], ORDER[: ORDER.index(module)]
    room, packages = module.split(".")[0], requirements("ray", "interactive")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or node.names[0].name == "*"):
            found.append(f"line {node.lineno}: relative or star import")
            continue
        for name in imported(node):
            for library, rooms in HOMES.items():
                if f"{name}.".startswith(f"{library}.") and room not in rooms:
                    found.append(f"line {node.lineno}: {library} lives in {' and '.join(rooms)}")
            if isinstance(node, ast.Attribute):
                continue
            top = name.split(".")[0]
            if top == "minidino":
                inside = name.removeprefix("minidino.")
                if not any(inside == m or inside.startswith(f"{m}.") for m in above):
                    found.append(f"line {node.lineno}: {name} is not above {module}")
            elif top not in sys.stdlib_module_names and PACKAGES.get(top, top) not in packages:
                found.append(f"line {node.lineno}: {top} is no dependency in pyproject.toml")
            if top in LAZY and node in tree.body:
                found.append(f"line {node.lineno}: {top} is imported in the function that needs it")
    return found


def _call_faults(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if {"pickle", "marshal", "shelve"} & {name.split(".")[0] for name in imported(node)}:
            found.append(f"line {node.lineno}: what pickle reads can run code")
        if not isinstance(node, ast.Call):
            continue
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if ast.unparse(node.func) == "torch.load" and options.get("weights_only") != "True":
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if options.get("allow_pickle", "False") != "False":
            found.append(f"line {node.lineno}: allow_pickle")
    return found


def _start_faults(tree: ast.Module) -> list[str]:
    """Importing does nothing: at the top there are only definitions, and the start of a script."""
    plain = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)
    found = []
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_registration = isinstance(node, ast.Expr) and REGISTRATION.match(ast.unparse(node))
        is_start = isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
        if not isinstance(node, plain) and not is_docstring and not is_registration and not is_start:
            found.append(f"line {node.lineno}: importing would do something: {ast.unparse(node)[:60]}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_module_keeps_the_rules(module):
    assert module in ORDER, f"{module} has no place in ORDER: who may import it?"
    assert not VAGUE & set(module.split(".")), "a name that says nothing collects everything"
    assert faults(module, parse(MODULES[module])) == []


@pytest.mark.parametrize(
    "module, source, words",
    [
        ("model.vit", "from minidino.model.weights import load_weights", "not above model.vit"),
        ("model.vit", "def f():\n    from minidino import tour", "not above model.vit"),
        ("model.vit", "import minidino.model.vit", "not above model.vit"),
        ("model.vit", "from .heads import DINOHead", "relative"),
        ("model.vit", "from minidino.model.heads import *", "star"),
        ("model.vit", "import triton.language as tl", "triton lives in kernels"),
        ("model.vit", "import torch\ndef f():\n    torch.distributed.barrier()", "lives in distributed"),
        ("model.vit", "from torch import distributed", "lives in distributed"),
        ("model.vit", "import timm", "timm is no dependency"),
        ("probes.knn", "import faiss", "in the function that needs it"),
        ("engine", "import ray.data", "in the function that needs it"),
        ("curation.search", "def f():\n    import ray", "ray lives in engine"),
        ("runs", "import torch\ndef f(p):\n    return torch.load(p)", "weights_only"),
        ("runs", "import torch\ndef f(p, w):\n    return torch.load(p, weights_only=w)", "weights_only"),
        ("runs", "import numpy as np\ndef f(p):\n    return np.load(p, allow_pickle=True)", "allow_pickle"),
        ("runs", "import pickle", "run code"),
        ("runs", "import torch\ntorch.manual_seed(0)", "importing would do something"),
        ("runs", "for i in range(3):\n    print(i)", "importing would do something"),
        ("runs", "import torch\ntorch.hub.register_all()", "importing would do something"),
        ("runs", "register_autograd(print)", "importing would do something"),
    ],
)
def test_a_broken_rule_is_noticed(module, source, words):
    found = faults(module, ast.parse(source))
    assert len(found) == 1 and words in found[0]


def test_what_keeps_the_rules_passes():
    good = '"""Doc."""\nimport math\nfrom minidino.model.heads import DINOHead\nHALF_PI: float = math.pi / 2\n'
    assert faults("model.vit", ast.parse(good)) == []
    assert faults("probes.knn", ast.parse("def f():\n    import faiss\n    return faiss")) == []
    assert faults("kernels.attention", ast.parse("_forward.register_autograd(_gradients, setup_context=_keep)")) == []


def test_init_files_are_empty():
    assert [path for path in FILES if path.name == "__init__.py" and path.stat().st_size] == []


def test_importing_does_nothing(tmp_path):
    names = [f"minidino.{m}" for m in MODULES if importlib.util.find_spec("triton") or not m.startswith("kernels")]
    code = f"""
import importlib, os, random, socket, sys
import numpy, torch, torchvision  # the last sets a variable of the environment and imports Triton

def state():
    numbers = numpy.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes(), random.getstate()
    return numbers, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ)

def no_network(*args, **kwargs):
    raise AssertionError("importing opens a connection")

socket.socket.connect = no_network
before, loaded = state(), set(sys.modules)
for name in {names}:
    importlib.import_module(name)
assert state() == before, "importing changes seeds, threads, the default type or the environment"
assert not torch.cuda.is_initialized(), "importing starts CUDA"
heavy = {{"faiss", "ray", "ipywidgets", "triton", "matplotlib.pyplot", "timm", "transformers"}} & (set(sys.modules) - loaded)
assert not heavy, f"importing brings in {{heavy}}"
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout + done.stderr == "" and done.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_shapes_are_checked_while_testing():
    with pytest.raises(TypeCheckError):
        koleo_loss(torch.zeros(3))


# ------------------------------------------------------------------------------------------------ rules for all files


@pytest.mark.parametrize("path", FILES + TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", [p for p in TESTS if p.name.startswith("test_")], ids=lambda path: path.name)
def test_every_test_asserts_something(path):
    functions = {node.name: node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef)}
    asserting: set[str] = set()
    for _ in functions:  # a test may leave the asserting to a function of its file, and that to another
        asserting |= {name for name, node in functions.items() if _asserts(node, asserting)}
    assert [name for name in functions if name.startswith("test_") and name not in asserting] == []


def _asserts(function: ast.FunctionDef, asserting: set[str]) -> bool:
    for node in ast.walk(function):
        called = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Assert) or called in asserting or ASSERTING.search(called):
            return True
    return False


def test_tests_import_only_what_is_installed_for_them():
    packages, strange = requirements("notebooks", "test"), []
    ours = {"minidino", *(path.stem for path in TESTS)}
    for path in TESTS:
        names = {name.split(".")[0] for node in ast.walk(parse(path)) for name in imported(node)}
        for name in names - sys.stdlib_module_names - ours:
            if PACKAGES.get(name, name) not in packages:
                strange.append(f"{path.name}: {name}")
    assert strange == []


def test_files_speak_of_no_machine():
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    found = []
    for path in paths:
        if path.is_file():
            text = path.read_bytes().decode("utf-8", "ignore")
            found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in LOCAL.finditer(text)]
    assert len(paths) > 20 and found == []


def test_conda_and_pip_install_the_same():
    wanted = {CONDA.get(name, name): bound for name, bound in requirements("notebooks", "test").items()}
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    wanted = {name: bound for name, bound in wanted.items() if name} | {"python": python, "pip": ""}
    listed = re.findall(r"^  - ([\w-]+)(>=[\d.]+)?$", (ROOT / "environment.yml").read_text(), re.MULTILINE)
    listed = [pair for pair in listed if pair[0] != "conda-forge"]
    assert dict(listed) == wanted and len(listed) == len(wanted)
