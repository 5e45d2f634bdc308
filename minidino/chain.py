"""pretrain -> adapt -> distill -> probe, in one go: one config, one folder, one report.

    chain.json + pictures -> DIR/pretrain, DIR/adapt, DIR/distill -> DIR/probe -> DIR/report.html

Each stage is the one that its own command runs. What is finished is left alone and what was killed goes on, so the same
command resumes. Source: DINOv2 paper, sections 4 and 5, appendix B.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from minidino import pictures
from minidino.config import RunConfig, override, preset
from minidino.evaluate import TASKS, evaluate
from minidino.judge import n_parameters
from minidino.learning.adapt import adapted
from minidino.learning.distill import distilled
from minidino.model.vit import SIZES as VIT_SIZES
from minidino.ranges import Positive, Stage, convert, require, words_of
from minidino.report import Section, write_report
from minidino.runs import Run, expect_no_run, write_json
from minidino.stages import adapt, distill, guard_of, pretrain, student_folders

Say = Callable[[str], None]
PLAN = "chain.json"
TRACES = ("pretrain/config.json", "adapt/config.json", "distill/**/config.json", "probe/*/results.json")  # of a beginning
LAST = "heads.safetensors"  # what a run writes when all else is there


@dataclass(frozen=True, kw_only=True)
class Chain(Stage, name="chain"):
    """All four stages; the texts in `...changes` are those that the commands take."""

    preset: str = "scenes-cpu"
    changes: tuple[str, ...] = ("run.steps=600",)  # of pretraining; what follows inherits them
    adapt_size: Positive = 64  # px of a global crop
    adapt_steps: Positive = 40
    adapt_changes: tuple[str, ...] = ()
    students: tuple[str, ...] = ("vit_tiny,width=32,depth=4,heads=1",)
    distill_steps: Positive = 200
    distill_changes: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("knn", "linear")  # of `minidino probe`
    size: Positive | None = None  # px that probes look at; None: the global crop of each run
    baselines: tuple[str, ...] = ("random",)

    def __post_init__(self):
        for name, wanted in get_type_hints(Chain).items():
            good = convert(getattr(self, name), wanted)[1]
            require(good, f"chain.{name}", words_of(wanted), repr(getattr(self, name)))
        super().__post_init__()
        known = [name for name in TASKS if name != "shift"]  # which needs more pictures than a chain has
        if unknown := set(self.tasks) - set(known):
            raise ValueError(f"tasks: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
        if not self.students or not self.tasks:
            raise ValueError("students, tasks: expected at least one of each, such as vit_tiny and knn")
        if set(self.baselines) - {"random", "pixels"}:
            raise ValueError(f"baselines: expected random or pixels, got {', '.join(self.baselines)}")
        configs = self.configs()  # says what is impossible before anything has begun
        if len({config.vit for config in configs[2:]}) < len(self.students):
            raise ValueError(f"students: expected different ones, got {', '.join(self.students)}")
        patch = configs[0].vit.patch_size
        good = self.size is None or self.size % patch == 0
        require(good, "chain.size", f"a multiple of vit.patch_size {patch} px", f"{self.size} px")
        shallow = min((config.vit.depth or VIT_SIZES[config.vit.name][1]) for config in configs)
        require("dpt" not in self.tasks or shallow >= 4, "tasks", "networks of 4 blocks or more for dpt", shallow)
        grouped = "retrieval" not in self.tasks or configs[0].data.source != "scenes"
        require(grouped, "tasks", "pictures in groups for retrieval, by data.source in changes", "drawn scenes")

    def configs(self) -> list[RunConfig]:
        """Of pretraining, of the phase at a higher resolution, and of each student."""
        first = override(preset(self.preset), list(self.changes))
        second = override(adapted(first, self.adapt_size, self.adapt_steps), list(self.adapt_changes))
        taught = [distilled(second, "", student, self.distill_steps) for student in self.students]
        return [first, second, *(override(config, list(self.distill_changes)) for config in taught)]


def read_chain(path: str | Path) -> Chain:
    """A chain from JSON. Raises ValueError for what is no field, with those that are."""
    known = {field.name for field in fields(Chain)}
    try:
        said = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(said, dict) or set(said) - known:
        strange = sorted(set(said) - known) if isinstance(said, dict) else [f"a {type(said).__name__}"]
        raise ValueError(f"{path}: expected fields of {', '.join(sorted(known))}, got {', '.join(strange)}")
    return Chain(**{key: tuple(value) if isinstance(value, list) else value for key, value in said.items()})


def run_chain(plan: Chain, folder: Path, say: Say = print) -> dict[str, Any]:
    """Run what is not finished yet.

    Args:
        plan: all four stages.
        folder: where each stage has its own folder.
        say: where the words go.
    Returns:
        {network: {"parameters", "images", "seconds", task: {subject: score}}}; results.json holds it too.
    Raises:
        FileExistsError: the folder holds a run.
        ValueError: the folder holds another chain, which has begun.
    """
    expect_no_run(folder)
    begun = any(any(folder.glob(trace)) for trace in TRACES)
    if begun and (folder / PLAN).exists() and read_chain(folder / PLAN) != plan:
        raise ValueError(f"{folder} holds another chain: give it back its {PLAN}, or choose another folder with --out")
    write_json(folder / PLAN, asdict(plan))
    runs = {"pretrained": folder / "pretrain", "adapted": folder / "adapt"}
    _go(runs["pretrained"], say, lambda place: pretrain(plan.configs()[0], place))
    _go(runs["adapted"], say, lambda place: adapt(
        runs["pretrained"], place, plan.adapt_size, plan.adapt_steps, plan.adapt_changes))  # fmt: skip
    students = student_folders(folder / "distill", plan.students)
    if not all((place / LAST).exists() for place in students):
        say(f"distilling into {', '.join(plan.students)}")
        changes = plan.distill_changes
        distill(runs["adapted"], folder / "distill", plan.students, plan.distill_steps, changes, resume=True)
    runs |= {f"distilled {name}": place for name, place in zip(plan.students, students, strict=True)}
    found = {name: _described(Run(place)) | _asked(plan, place, folder, say) for name, place in runs.items()}
    write_json(folder / "results.json", found)
    say(str(report(plan, folder, found, {name: Run(place) for name, place in runs.items()})))
    return found


def _go(place: Path, say: Say, begin: Callable[[Path], Any]) -> None:
    """Begin a run, go on with it, or leave it alone."""
    if (place / LAST).exists():
        return
    killed = Run(place).config_path.exists()
    say(f"{place}: {'going on' if killed else 'beginning'}")
    if killed:
        pretrain(None, place, resume=True)
    else:
        begin(place)


def _described(run: Run) -> dict[str, Any]:
    last, config = run.records()[-1], run.config()
    return {"parameters": n_parameters(config), "size_px": config.crops.global_size, "images": last["images"],
            "seconds": last["seconds"]}  # fmt: skip


def _asked(plan: Chain, place: Path, folder: Path, say: Say) -> dict[str, dict[str, float]]:
    """The number of each task, of the network and of what it is measured against."""
    found = {}
    for task in plan.tasks:
        out = folder / "probe" / f"{place.relative_to(folder)}-{task}".replace("/", "-")
        if not (out / "report.html").exists():
            told = evaluate(place, task, None, plan.size, plan.baselines, out, cache=folder / "features")
            say(told["row"])
        answers = json.loads((out / "results.json").read_text())["answers"]
        found[task] = {who: answer[TASKS[task].score] for who, answer in answers.items()}
    return found


def report(plan: Chain, folder: Path, found: dict[str, Any], runs: dict[str, Run]) -> Path:
    """report.html: what each stage made of it."""
    task = plan.tasks[0]
    kinds = {name: "student" if name.startswith("distilled") else "teacher" for name in found}
    shown = {name: (kinds[name], row["parameters"], row[task]["trained"], 0.0) for name, row in found.items()}
    pictures.against_parameters(shown, folder / "sizes.png", f"{task}: {TASKS[task].unit}")
    table: list[Sequence[object]] = [("network", "parameters", "px", "looks", "minutes", *plan.tasks)]
    table += [(name, f"{row['parameters']:,}", row["size_px"], f"{row['images']:,}", row["seconds"] / 60,
               *(row[task]["trained"] for task in plan.tasks)) for name, row in found.items()]  # fmt: skip
    rest = [("never trained", *plan.tasks)]
    for who in [name for name in found["adapted"][task] if name != "trained"]:
        rest.append((f"{who}, as the adapted", *(found["adapted"][t].get(who, "") for t in plan.tasks)))
    guard = guard_of(runs["adapted"])
    words = f"Did the phase at {plan.adapt_size} px help? {guard['verdict']}"
    if "after" in guard:
        words += f": k-NN {guard['before']:.3f} before and {guard['after']:.3f} after, at that size"
    hashed = json.loads((next(reversed(runs.values())).folder / "teacher.json").read_text())["sha256"]
    settings = [(key, " ".join(x) if isinstance(x, tuple) else str(x)) for key, x in asdict(plan).items()]
    sections = [
        Section("Size and worth", f"{TASKS[task].unit} of frozen features. One run.", folder / "sizes.png", table),
        Section("What they should beat", table=rest),
        Section("Checks", f"{words}.\n\nThe teacher's weights have the same hash before and after: {hashed[:16]}..."),
        Section("The config", f"All of it stands in {PLAN}; each run's own folder has its config.json.",
                table=[("field", "value"), *settings]),
    ]  # fmt: skip
    return write_report(folder / "report.html", "minidino chain: pretrain, adapt, distill, probe", sections)
