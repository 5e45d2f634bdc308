"""`minidino <stage> ...`: parse, call, print."""

import argparse
import os
import subprocess
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from minidino.config import PRESETS, RunConfig, difference, override, preset
from minidino.engine import ENGINES


def main(argv: list[str] | None = None) -> int:
    """Run one stage; 0 when it worked, 2 with a line of words when not, 130 after Ctrl-C, 141 when nobody reads."""
    parser = argparse.ArgumentParser(prog="minidino", description="DINOv2, small, readable, tested and fast.")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for add in (_tour, _curate, _train, _adapt, _distill, _chain, _probe, _export, _plan, _bench, _doctor, _data):
        add(stages)
    options, later = parser.parse_known_args(argv)
    unknown = [word for word in later if not hasattr(options, "changes") or "=" not in word or word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if later:  # argparse takes key=value words before an option only
        options.changes += later
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed: progress bars would fail
    if getattr(sys.stdout, "errors", None) == "strict":  # names that cannot be shown are no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _together(options.stage), warnings.catch_warnings():
            for kind in (DeprecationWarning, FutureWarning):  # of what we use; not for whoever uses us
                warnings.simplefilter("ignore", kind)
            warnings.showwarning = lambda message, *_: print(f"minidino {options.stage}: {message}", file=sys.stderr)
            code = options.run(options) or 0
            print(end="", flush=True)  # while there are words for a full disk
            return code
    except BrokenPipeError:  # `| head` has read enough; what is left to print would fail again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as what SIGPIPE ends
    except (ValueError, OSError, FloatingPointError, NotImplementedError, MemoryError) as error:
        print(f"minidino {options.stage}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"minidino {options.stage}: interrupted; what is saved stays, and --help says how to go on", file=sys.stderr)
        return 130


def _together(stage: str) -> AbstractContextManager:
    """The company of the processes that torchrun has started; in one that it did not start, nothing."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return nullcontext()
    if stage not in ("train", "adapt", "distill"):
        raise ValueError("one process is enough: torchrun is for train, adapt and distill")
    from minidino.distributed import together

    return together()


def _stage(stages, name: str, words: str, example: str, run) -> argparse.ArgumentParser:
    parser = stages.add_parser(name, help=words, description=words, epilog=f"example:  {example}")
    parser.set_defaults(run=run)
    return parser


def _tour(stages) -> None:
    def run(options) -> None:
        from minidino.tour import tour

        tour(options.data, options.minutes, options.out)

    parser = _stage(stages, "tour", "learn to see without labels in a few minutes, and report",
                    "minidino tour --data my-photographs.zip --minutes 4", run)  # fmt: skip
    parser.add_argument("--data", help="folder, archive or torchvision name; without it scenes are drawn")
    parser.add_argument("--minutes", type=float, help="of training; without it what the preset asks, at most 4")
    parser.add_argument("--out", default="runs/tour", help="run folder (default %(default)s)")


def _curate(stages) -> None:
    def run(options) -> None:
        from minidino.curate import curate

        print(curate(
            options.pool, options.out, options.queries, options.protect, options.budget, options.features,
            options.copies, options.neighbours, options.clusters, options.copy_steps, options.seed,
            copy_threshold=options.copy_threshold, leak_threshold=options.leak_threshold, engine=options.engine,
        ))  # fmt: skip

    parser = _stage(stages, "curate", "choose the pictures of a pool that are worth learning from",
                    "minidino curate pool.zip --protect testset --queries good-ones --features runs/tour --out chosen",
                    run)  # fmt: skip
    parser.add_argument("pool", metavar="POOL", help="folder, archive or torchvision name")
    parser.add_argument("--out", default="runs/curated", help="of manifest.csv and report (default %(default)s)")
    parser.add_argument("--queries", metavar="DIR", help="a curated set: keep what is like its pictures")
    parser.add_argument("--protect", metavar="DIR", action="append", default=[], help="an evaluation set: drop what is "
                        "too close to its pictures; may be given again")  # fmt: skip
    parser.add_argument("--budget", type=int, help="pictures to keep, balanced over clusters, without queries")
    parser.add_argument("--features", metavar="RUN|WEIGHTS", help="semantic network, for --queries and --budget")
    parser.add_argument("--copies", metavar="FILE", help="TorchScript copy-detection model; without it one is trained")
    parser.add_argument("--neighbours", type=int, default=4, help="pool pictures for each query (default %(default)s)")
    parser.add_argument("--clusters", type=int, help="retrieve whole clusters of the pool, of so many")
    parser.add_argument("--copy-steps", type=int, default=600, help="of training that model (default %(default)s)")
    parser.add_argument("--copy-threshold", type=float, metavar="COSINE", help="above which two pictures are copies: "
                        "0.6 with --copies; without, one is laid upon the other")  # fmt: skip
    parser.add_argument("--leak-threshold", type=float, metavar="COSINE", help="above which one is too close to a "
                        "protected picture: 0.45 with --copies; without, one is laid upon the other")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="local", choices=ENGINES, help="where chunks run: in this process, or on "
                        "a Ray cluster, that of RAY_ADDRESS or of this machine alone (default %(default)s)")  # fmt: skip


def _train(stages) -> None:
    def run(options) -> int | None:
        from minidino.distributed import interrupted
        from minidino.learning.adapt import going_on
        from minidino.learning.train import resolved
        from minidino.model.weights import backbone_of
        from minidino.runs import pick_device
        from minidino.stages import go_on, pretrain

        if options.resume is not None:
            given = (options.changes, options.data, options.weights, options.out, options.preset, options.heads_first)
            if any(given) or not options.resume:
                raise ValueError("a resumed run keeps its config and its folder: give --resume RUN alone")
            return _go_on(Path(options.resume))
        if options.heads_first is not None and not options.weights:
            raise ValueError("fresh heads learn alone where a backbone is given: --heads-first goes with --weights")
        options.preset = options.preset or "scenes-cpu"
        folder = Path(options.out or f"runs/{options.preset}")
        if interrupted(folder):
            return _go_on(folder)
        _expect_new(folder)
        vit = backbone_of(options.weights) if options.weights else None
        patch = [f"vit.patch_size={vit.patch_size}"] if vit else []
        config = override(_base(options), patch + options.changes)
        if vit:
            asked = {change.partition("=")[0].strip() for change in options.changes}
            if lost := asked & set(difference(config, going_on(config, vit, 0.0))):
                raise ValueError(f"the backbone of --weights stays as it is, and cannot change {', '.join(sorted(lost))}")
        print(f"preset {options.preset}; against vitl14-lvd:")
        for key, (here, published) in difference(config, preset("vitl14-lvd")).items():
            print(f"  {key} = {here}  (published: {published})")
        print(f"resolved: {resolved(config, pick_device(config.run.device))}")
        if vit:
            heads_first = 0.2 if options.heads_first is None else options.heads_first
            return _told(go_on(vit, folder, config, heads_first)[0])
        pretrain(config, folder)

    parser = _stage(stages, "train", "pretrain a backbone", "minidino train --preset scenes-cpu vit.depth=6", run)
    parser.add_argument("--preset", help=", ".join(PRESETS) + " (default scenes-cpu)")
    parser.add_argument("--data", metavar="PATH", help="folder, archive, torchvision name, or manifest.csv of curate")
    parser.add_argument("--out", help="run folder (default runs/PRESET)")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run folder where it was killed")
    parser.add_argument("--weights", metavar="WEIGHTS", help="go on from this backbone, with fresh heads: a file, or a "
                        "name such as dinov2_vits14; fails when k-NN falls by it")  # fmt: skip
    parser.add_argument("--heads-first", type=float, metavar="FRACTION", help="of the steps, in which those heads learn "
                        "alone (default 0.2)")  # fmt: skip
    parser.add_argument("changes", nargs="*", metavar="key=value", help="fields of the config")


def _named(path: str) -> Path:
    """The path, of which the last part is a name; that of `.` and `..` is not."""
    return Path(path) if Path(path).name.strip(".") else Path(path).resolve()


def _base(options) -> RunConfig:
    """The preset, with the pictures that --data names."""
    config = preset(options.preset)
    return replace(config, data=replace(config.data, source=options.data)) if options.data else config


def _adapt(stages) -> None:
    def run(options) -> int:
        from minidino.distributed import interrupted
        from minidino.stages import adapt

        source = _named(options.source)
        folder = Path(options.out or source.with_name(f"{source.name}-{options.size}px"))
        if interrupted(folder):
            return _go_on(folder)
        _expect_new(folder)
        return _told(adapt(source, folder, options.size, options.steps, options.changes, options.fit_memory)[0])

    parser = _stage(stages, "adapt", "go on with a finished run at a higher resolution",
                    "minidino adapt runs/scenes-cpu --size 96 --steps 300", run)  # fmt: skip
    parser.add_argument("source", metavar="RUN", help="a finished run folder")
    parser.add_argument("--size", type=int, required=True, help="px of a global crop, a multiple of the patch")
    parser.add_argument("--steps", type=int, required=True, help="updates; the paper takes 10,000 after 625,000")
    parser.add_argument("--fit-memory", action="store_true", help="fewer images a step, so that it takes no more memory "
                        "than before")  # fmt: skip
    parser.add_argument("--out", help="run folder (default RUN-SIZEpx); train --resume goes on with it")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="fields of the config")


def _go_on(folder: Path) -> int:
    """Resume a run, which knows its own config."""
    from minidino.stages import pretrain

    return _told(pretrain(None, folder, resume=True)[0])


def _told(run) -> int:
    """Print whether a run that started from trained weights was worth it; 1 when it was not."""
    from minidino.stages import guard_of

    said = guard_of(run)
    if "after" not in said:
        return 0
    print(f"k-NN {said['before']:.3f} before, {said['after']:.3f} after (standard error {said['standard_error']:.3f}): "
          f"{said['verdict']}")  # fmt: skip
    return int(said["verdict"] == "worse")


def _distill(stages) -> None:
    def run(options) -> None:
        from minidino.distributed import interrupted
        from minidino.stages import distill, student_folders

        if not options.features and (options.data or options.preset != "scenes-cpu"):
            raise ValueError("the teacher's run knows its pictures: --data and --preset go with --features")
        source, base = _named(options.source), _base(options) if options.features else None
        folder = Path(options.out or source.with_name(f"{source.stem}-distilled"))
        resume = options.resume or interrupted(folder)
        for place in student_folders(folder, options.student) if not resume else ():
            _expect_new(place)
        runs, _ = distill(str(source), folder, options.student, options.steps, options.changes, base, resume)
        print("\n".join(str(run.folder) for run in runs))

    parser = _stage(stages, "distill", "teach small students by a larger network that is frozen",
                    "minidino distill runs/tour --student vit_tiny,width=32,depth=4,heads=2 --steps 600", run)  # fmt: skip
    parser.add_argument("source", metavar="RUN", help="the teacher: a finished run; with --features also weights")
    parser.add_argument("--student", action="append", required=True, metavar="NAME[,width=W][,depth=N][,heads=H]",
                        help="may be given again: the teacher looks once for all")  # fmt: skip
    parser.add_argument("--steps", type=int, required=True, help="updates")
    parser.add_argument("--out", help="run folder, or folder of the students' (default RUN-distilled)")
    parser.add_argument("--resume", action="store_true", help="go on with what was killed; all else as it was given")
    parser.add_argument("--features", action="store_true", help="imitate the teacher's tokens, where it has no heads; not "
                        "the paper's way")  # fmt: skip
    parser.add_argument("--preset", default="scenes-cpu", help="with --features: crops, optimizer, pictures")
    parser.add_argument("--data", metavar="PATH", help="with --features: pictures to learn from")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="fields of the config")


def _chain(stages) -> None:
    def run(options) -> None:
        from minidino.chain import Chain, read_chain, run_chain

        run_chain(read_chain(options.plan) if options.plan else Chain(), Path(options.out))

    parser = _stage(stages, "chain", "pretrain, adapt, distill and probe in one go", "minidino chain my-chain.json --out "
                    "runs/my-chain", run)  # fmt: skip
    parser.add_argument("plan", nargs="?", metavar="CHAIN.json", help="the stages; without it a short one of drawn scenes, "
                        "whose file in --out shows the fields")  # fmt: skip
    parser.add_argument("--out", default="runs/chain", help="folder of all stages; the same command goes on after a kill")


def _expect_new(folder: Path) -> None:
    from minidino.distributed import wait
    from minidino.runs import Run

    if Run(folder).config_path.exists():
        raise FileExistsError(f"{folder} holds a run: go on with train --resume {folder}, or choose another with --out")
    wait()


def _probe(stages) -> None:
    def run(o) -> None:
        from minidino.evaluate import evaluate

        size = o.size and (tuple(o.size) if len(o.size) > 1 else o.size[0])
        found = evaluate(o.source, o.task, o.data, size, o.baseline, o.out, o.truth, depth_unit=o.depth_unit,
                         slices=o.slices, shifted=o.shifted)  # fmt: skip
        print(f"{found['row']}\n{found['report']}")

    tasks = "knn linear logreg finetune robustness shift slices retrieval segmentation depth dpt".split()
    parser = _stage(stages, "probe", "judge frozen features",
                    "minidino probe runs/tour --task segmentation --baseline pixels --baseline random", run)  # fmt: skip
    parser.add_argument("source", metavar="RUN|WEIGHTS", help="run folder, weights, or a name: dinov2_vits14")
    parser.add_argument("--task", choices=tasks, default="knn")
    parser.add_argument("--data", help="pictures with what the task needs; without it the run's own")
    parser.add_argument("--size", type=int, nargs="+", metavar="PX", help="side of the evaluated square, or height and "
                        "width for segmentation, depth and dpt; without it the run's global crop, or pictures as they "
                        "are")  # fmt: skip
    parser.add_argument("--baseline", choices=("pixels", "random"), action="append", default=[], help="the same of what "
                        "nobody trained, or of the network before its first step; may be given again")  # fmt: skip
    parser.add_argument("--truth", metavar="JSON", help="queries for retrieval, as of Revisited Oxford and Paris")
    parser.add_argument("--slices", metavar="CSV", help="for slices: columns file and others, such as region or income")
    parser.add_argument("--shifted", metavar="DIR", action="append", default=[], help="for shift: the same classes elsewhere")
    parser.add_argument("--depth-unit", type=float, metavar="M", help="metres per unit; without it integers are mm, floats m")
    parser.add_argument("--out", help="folder of results.json, figure.png, report.html (default runs/probe-DATA-TASK)")


def _export(stages) -> None:
    def run(options) -> None:
        from minidino.judge import is_run, trained_backbone
        from minidino.model.weights import backbone_of, export_weights
        from minidino.runs import Run, pick_device

        out = Path(options.out)
        if out.name in ("weights.safetensors", "heads.safetensors") and is_run(out.parent):
            raise FileExistsError(f"{out} belongs to the run {out.parent}: choose another with --out")
        if is_run(options.source):
            if options.heads is not None:
                raise ValueError("a run knows its heads: --heads goes with weights that do not tell")
            vit = trained_backbone(Run(options.source), pick_device("cpu"))
        else:
            vit = backbone_of(options.source, options.heads)
        print(export_weights(vit, options.out, options.layout, options.size))

    parser = _stage(stages, "export", "write a backbone for torch.hub, timm, Hugging Face or ONNX",
                    "minidino export runs/tour --layout onnx --size 224 --out tour.onnx", run)  # fmt: skip
    parser.add_argument("source", metavar="RUN|WEIGHTS", help="run folder, weights in any known layout, or an official "
                        "name such as dinov2_vits14")  # fmt: skip
    parser.add_argument("--layout", choices=("hub", "timm", "huggingface", "onnx"), default="hub")
    parser.add_argument("--out", required=True, help="a .pth or .safetensors file; a folder for huggingface; .onnx")
    parser.add_argument("--size", type=int, nargs="+", metavar="PX", help="bake the positions for images of this side, "
                        "or height and width (onnx); without it the stored grid")  # fmt: skip
    parser.add_argument("--heads", type=int, help="of weights that do not tell; without it one for 64 channels")


def _plan(stages) -> None:
    def run(options) -> None:
        from minidino.plan import describe, make_plan, plan_table

        o = options
        machine = {"gpus": o.gpus, "device": o.device, "utilisation": o.utilisation}
        if o.preset is None and o.price_per_hour is not None:
            raise ValueError("--price-per-hour goes with a preset")
        if o.preset is None:
            print(plan_table(**machine))
        elif "=" in o.preset:
            raise ValueError(f"expected a preset first, got {o.preset!r}; there are: {', '.join(PRESETS)}")
        else:
            print(describe(make_plan(override(preset(o.preset), o.changes), **machine), o.price_per_hour))

    parser = _stage(stages, "plan", "what a run will take, by formula: parameters, FLOPs, memory, time, cost, energy",
                    "minidino plan vits16-in1k --gpus 8 --device h200 loss.prototypes=triton", run)  # fmt: skip
    parser.add_argument("preset", nargs="?", metavar="PRESET", help="without it a table of all: " + ", ".join(PRESETS))
    parser.add_argument("--gpus", type=int, metavar="N", help="devices; without it as the preset is meant")
    parser.add_argument("--device", metavar="NAME", help="cpu (this machine, timed for a moment), h200, ...: "
                        "a wrong name lists them all")  # fmt: skip
    parser.add_argument("--utilisation", type=float, default=0.3, metavar="FRACTION", help="of the peak rate that "
                        "training reaches: an assumption (default %(default)s, about that of the published runs)")  # fmt: skip
    parser.add_argument("--price-per-hour", type=float, metavar="X", help="of one device; without it no money is named")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="fields of the config")


def _bench(stages) -> None:
    def run(options) -> int:
        script = Path(__file__).resolve().parents[1] / "benchmarks" / f"{options.what}.py"
        if not script.exists():
            raise FileNotFoundError(f"no {script}: benchmarks come with a checkout, installed by `pip install -e .`")
        data = ["--data", options.data] if options.data else []
        toy = ["--toy"] if options.toy else []
        if (data or toy) and options.what not in own_pictures:
            raise ValueError(f"--data and --toy go with {' and '.join(own_pictures)}, not with {options.what}")
        return subprocess.run([sys.executable, str(script), options.how, *data, *toy], check=False).returncode

    own_pictures = ("loader", "step")
    parser = _stage(stages, "bench", "time what is here against what else there is", "minidino bench loader --data "
                    "my-photographs", run)  # fmt: skip
    parser.add_argument("what", choices=("attention", "prototypes", *own_pictures))
    parser.add_argument("how", nargs="?", choices=("run", "draw"), default="run", help="draw: the table of docs/measured.md")
    parser.add_argument("--data", help="JPEG photographs for loader and step; without it scenes are drawn")
    parser.add_argument("--toy", action="store_true", help="loader and step at tiny sizes, which store nothing")


def _doctor(stages) -> None:
    def run(options) -> None:
        from minidino.learning.doctor import diagnose, prescription
        from minidino.runs import Run

        run = Run(options.run_folder)
        print(prescription(diagnose(run.records(), asdict(run.config()))))

    parser = _stage(stages, "doctor", "read a run and say what is wrong", "minidino doctor runs/tour", run)
    parser.add_argument("run_folder", metavar="RUN")


def _data(stages) -> None:
    parser = stages.add_parser("data", help="list, get and check data sets",
                               epilog="example:  minidino data check my-photographs --json check.json")  # fmt: skip
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _stage(actions, "list", "names that can be fetched", "minidino data list", _data_list)
    get = _stage(actions, "get", "fetch a torchvision set", "minidino data get cifar10", _data_get)
    get.add_argument("name")
    get.add_argument("--root", default="data/sets", help="where it goes (default %(default)s)")
    check = _stage(actions, "check", "decode every file, list the bad ones", "minidino data check DIR", _data_check)
    check.add_argument("path")
    check.add_argument("--channels", type=int, default=3, metavar="C", help="of a picture; other than 3: arrays of numpy")
    check.add_argument("--json", metavar="FILE", help="write the counts and reasons there")


def _data_list(options) -> None:
    from minidino.images.named import dataset_names

    print("scenes       drawn, no download\n" + "\n".join(f"{name:12} torchvision" for name in dataset_names()))


def _data_get(options) -> None:
    from minidino.images.named import download

    print(download(options.name, options.root))


def _data_check(options) -> None:
    from minidino.images.datasets import check_images, open_images
    from minidino.runs import write_json

    found = check_images(open_images(options.path), channels=options.channels)
    for row in found["quarantined"]:
        print(f"{row['file']!r}: {row['reason']}")
    print(f"{found['decoded']} decoded, {len(found['quarantined'])} quarantined")
    if options.json:
        write_json(Path(options.json), found)


if __name__ == "__main__":
    sys.exit(main())
