"""Which picture belongs to which target: the layouts that sets with an answer for each pixel come in, told by names.

    index.csv    columns rgb (or image), depth (or mask), split
    CamVid       <split>/x.jpg, <split>annot/x.png; 11 is ignored
    VOC          JPEGImages/, SegmentationClass/, ImageSets/Segmentation/<split>.txt; 255 is ignored
    Pet          images/, annotations/trimaps/, annotations/{trainval,test}.txt; 3 (not classified) is ignored
    ADE20K       images/{training,validation}/, annotations/{training,validation}/; 1 is the first class, 0 is ignored
    plain        images/ or rgb/ beside masks/, labels/, annotations/ or depth/ (NYU), within or around train/, val/,
                 test/, or with train.txt, val.txt, test.txt beside them; 255 is ignored
    names        classes.csv (index, name), classes.txt (a name a line) or objectInfo150.txt, beside or above all this
"""

import csv
import io
import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from minidino.images.datasets import IMAGE_SUFFIXES

SPLITS = {"train": "train", "training": "train", "trainval": "train", "val": "val", "valid": "val",
          "validation": "val", "test": "test", "testing": "test"}  # fmt: skip
CAMVID = "Sky Building Pole Road Pavement Tree SignSymbol Fence Car Pedestrian Bicyclist Unlabelled"
VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
)
NO_CLASS = re.compile("unlabel|void|ignore|unknown", re.IGNORECASE)  # how sets call what shall not count


class Layout(NamedTuple):
    """Where a set keeps its files; patterns are of names without suffix, with groups root, key and perhaps split."""

    name: str
    kind: str
    pattern: str  # of pictures
    targets: tuple[str, ...]  # what the name of a picture becomes; the first that is there counts
    lists: str = ""  # the list of a split: names, one a line; where there is none, the folders tell the split
    partial: bool = False  # pictures without a target are normal
    first: int = 0  # value of the first class
    classes: tuple[str, ...] = ()
    ignored: tuple[int, ...] = ()  # values


class Found(NamedTuple):
    """What the names tell: (picture, target, split) of each pair; values with a name; values that do not count."""

    layout: str
    pairs: list[tuple[str, str, str]]
    classes: dict[int, str]  # empty: the set names none
    ignored: tuple[int, ...]


ROOT = r"(?P<root>(?:.*/)?)"
PLAIN = ROOT + r"(?:images|rgb)/(?P<key>.+)"
LAYOUTS = (
    Layout("camvid", "segmentation", ROOT + r"(?P<split>train|val|test)/(?P<key>[^/]+)", ("{root}{split}annot/{key}",),
           classes=tuple(CAMVID.split()), ignored=(11,)),
    Layout("voc", "segmentation", ROOT + r"JPEGImages/(?P<key>.+)", ("{root}SegmentationClass/{key}",),
           "{root}ImageSets/Segmentation/{split}.txt", partial=True, classes=tuple(VOC.split()), ignored=(255,)),
    Layout("pet", "segmentation", ROOT + r"images/(?P<key>[^/]+)", ("{root}annotations/trimaps/{key}",),
           "{root}annotations/{split}.txt", first=1, classes=("animal", "background"), ignored=(3,)),
    Layout("ade20k", "segmentation", ROOT + r"images/(?P<split>training|validation)/(?P<key>.+)",
           ("{root}annotations/{split}/{key}",), first=1, classes=tuple(f"class {i}" for i in range(150)),
           ignored=(0,)),
    Layout("plain", "segmentation", PLAIN, ("{root}masks/{key}", "{root}labels/{key}", "{root}annotations/{key}"),
           "{root}{split}.txt", ignored=(255,)),
    Layout("plain", "depth", PLAIN, ("{root}depth/{key}",), "{root}{split}.txt"),
)  # fmt: skip

Read = Callable[[str], str]  # the text of a file


def find_pairs(kind: str, files: Collection[str], read: Read) -> Found | None:
    """Recognise the layout of a set by the names of its files.

    Args:
        kind: "segmentation" or "depth".
        files: every name in the set, with / between folders.
        read: gives the text of one of them (lists, names of classes).
    Returns:
        The pairs in the order of their names; None where no layout fits.
    Raises:
        ValueError: pictures without target or targets without picture (the first are named), two pictures of one name.
    """
    files = {f for f in files if "__MACOSX" not in f and not f.rsplit("/", 1)[-1].startswith("._")}
    if found := _from_index(kind, files, read):
        return found
    fitting = (_from_layout(layout, files, read) for layout in LAYOUTS if layout.kind == kind)
    return next((found for found in fitting if found), None)


def _from_index(kind: str, files: Collection[str], read: Read) -> Found | None:
    """Pairs of an index.csv that has the columns for this kind."""
    column = "depth" if kind == "depth" else "mask"
    for index in sorted(f for f in files if f.rsplit("/", 1)[-1] == "index.csv"):
        rows = list(csv.DictReader(io.StringIO(read(index))))
        picture = next((c for c in ("rgb", "image") if rows and {c, column} <= rows[0].keys()), None)
        if picture:
            if blank := [i for i, row in enumerate(rows, 2) if not (row[picture] and row[column])]:
                raise ValueError(f"{index}: line {blank[0]} lacks its {picture} or its {column}")
            root = index.removesuffix("index.csv")
            splits = [(r.get("split") or "train").lower() for r in rows]
            pairs = [(root + r[picture], root + r[column], SPLITS.get(s, s)) for r, s in zip(rows, splits, strict=True)]
            _refuse_missing([f for *names, _ in pairs for f in names if f not in files])
            layout = Layout("index", kind, "", (), ignored=() if kind == "depth" else (255,))
            return Found("index", sorted(pairs), *_meaning(layout, root, files, read))
    return None


def _from_layout(layout: Layout, files: Collection[str], read: Read) -> Found | None:
    pictures = {f.rsplit(".", 1)[0]: f for f in sorted(files) if f.lower().endswith(IMAGE_SUFFIXES)}
    partner: dict[str, tuple[str, str]] = {}  # stem of a picture: stem of its target, root
    alone = []
    for stem in pictures:
        if match := re.fullmatch(layout.pattern, stem):
            wanted = [target.format(**match.groupdict()) for target in layout.targets]
            if target := next((t for t in wanted if t in pictures), None):
                partner[stem] = target, match["root"]
            else:
                alone.append(pictures[stem])
    if not partner:
        return None
    targets = {target for target, _ in partner.values()}
    _refuse_twins({*partner, *targets}, files)
    folders = {_folder(t) for t in targets}
    orphans = [f for s, f in pictures.items() if _folder(s) in folders and s not in targets and s not in partner]
    roots = sorted({root for _, root in partner.values()})
    pairs, has_lists = [], False
    for root in roots:
        stems = [s for s, (_, r) in partner.items() if r == root]
        lists = {split: layout.lists.format(root=root, split=split) for split in SPLITS if layout.lists}
        lists = {split: read(f) for split, f in lists.items() if f in files}
        has_lists = has_lists or bool(lists)
        splits = _listed(lists, stems) if lists else ((s, _split_of(s)) for s in stems)
        pairs += [(pictures[s], pictures[partner[s][0]], split) for s, split in splits]
    _refuse_missing(orphans + ([] if layout.partial or has_lists else alone))
    return Found(layout.name, sorted(pairs), *_meaning(layout, roots[0], files, read))


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _split_of(stem: str) -> str:
    """The split that the innermost folder of that name tells; "train" where none does."""
    words = [SPLITS[word] for word in stem.lower().split("/")[:-1] if word in SPLITS]
    return words[-1] if words else "train"


def _listed(lists: dict[str, str], stems: list[str]) -> Iterator[tuple[str, str]]:
    """The pictures that the lists name, each with its split; a picture in train and trainval counts once."""
    by_name = {stem.rpartition("/")[2]: stem for stem in stems}
    seen: set[str] = set()
    for split in sorted(lists, key=lambda split: split == "trainval"):
        lines = [line.split()[0] for line in lists[split].splitlines() if line.strip() and line[0] != "#"]
        names = [line.rsplit("/", 1)[-1].split(".", 1)[0] if line not in by_name else line for line in lines]
        missing = [name for name in names if name not in by_name]
        if len(missing) < len(names):  # of a part that was never published, nothing is there
            _refuse_missing(missing)
            yield from ((by_name[name], SPLITS[split]) for name in names if name not in seen)
            seen |= set(names)


def _refuse_missing(missing: list[str]) -> None:
    if missing:
        raise ValueError(
            f"{len(missing)} files without their partner, such as {', '.join(sorted(missing)[:3])}: every picture "
            "needs a target of the same name and every target a picture"
        )


def _refuse_twins(stems: Collection[str], files: Collection[str]) -> None:
    seen: dict[str, str] = {}
    for f in sorted(files):
        stem = f.rsplit(".", 1)[0]
        if stem in stems and f.lower().endswith(IMAGE_SUFFIXES) and seen.setdefault(stem, f) != f:
            raise ValueError(f"{seen[stem]} and {f} have one name: which of them belongs to the pair? Remove the other")


def _meaning(layout: Layout, root: str, files: Collection[str], read: Read) -> tuple[dict[int, str], tuple[int, ...]]:
    """Values with a name, and values that do not count."""
    if layout.kind == "depth":
        return {}, ()
    named = _named(root, layout.first, files, read)
    ignored = [v for v in layout.ignored if v not in named] + [v for v in named if NO_CLASS.match(named[v])]
    if not named:
        named = {layout.first + i: name for i, name in enumerate(layout.classes)}
    return {v: named[v] for v in sorted(named) if v not in ignored}, tuple(sorted(ignored))


def _named(root: str, first: int, files: Collection[str], read: Read) -> dict[int, str]:
    """The names of classes that are written down beside or above the pictures."""
    parts = root.split("/")
    for n in range(len(parts), 0, -1):
        place = "/".join([*parts[: n - 1], ""])
        if f"{place}classes.csv" in files:
            rows = csv.DictReader(io.StringIO(read(f"{place}classes.csv")))
            if not {"index", "name"} <= set(rows.fieldnames or ()):
                raise ValueError(f"{place}classes.csv: expected columns index and name, got {rows.fieldnames}")
            return {int(row["index"]): row["name"] for row in rows}
        if f"{place}classes.txt" in files:
            lines = [line.strip() for line in read(f"{place}classes.txt").splitlines() if line.strip()]
            return {first + i: line for i, line in enumerate(lines)}
        if f"{place}objectInfo150.txt" in files:
            rows = csv.DictReader(io.StringIO(read(f"{place}objectInfo150.txt")), delimiter="\t")
            return {int(row["Idx"]): row["Name"].split(",")[0].strip() for row in rows}
    return {}
