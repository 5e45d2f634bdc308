"""Is it learning or collapsing? What to measure on the way, and what the measurements of a run say."""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# ---------------------------------------------------------------- what to measure


class PrototypesUsed(NamedTuple):
    """How many prototypes share the work: softly (exp of the entropy of the mean) and as somebody's first choice."""

    perplexity: float
    n_chosen: int


class FeatureSpread(NamedTuple):
    """How far apart features lie: mean cosine over pairs (one point: 1), deviation (one point: 0, all round: 1)."""

    mean_cosine: float
    std: float


def entropy(probs: Float[Tensor, "n K"]) -> float:
    """Tell how undecided the rows are: mean of -sum p ln p, in nats, from 0 (one prototype) to ln K (all alike)."""
    return torch.special.entr(probs.double()).sum(-1).mean().item()


def prototypes_used(probs: Float[Tensor, "n K"]) -> PrototypesUsed:
    """Count the prototypes that a batch is spread over.

        perplexity = exp( H( mean over rows of p ) )        from 1 to K
    """
    mean = probs.double().mean(0)
    return PrototypesUsed(torch.special.entr(mean).sum().exp().item(), len(probs.argmax(1).unique()))


def rankme(features: Float[Tensor, "n D"], eps: float = 1e-7) -> float:
    """Count the directions that features really use.

        exp( -sum_k p_k ln p_k ),   p_k = s_k / sum(s) + eps,   s the singular values

    Args:
        features: any length, not centred.
    Returns:
        From 1 (all on one line) to min(n, D) (all directions alike).
    Source: Garrido et al. 2023, RankMe, equation 1.
    """
    spectrum = torch.linalg.svdvals(features.detach().float()).double()
    share = spectrum / spectrum.sum().clamp_min(1e-12) + eps
    return torch.special.entr(share).sum().exp().item()


def feature_spread(features: Float[Tensor, "n D"]) -> FeatureSpread:
    """Measure how far apart features lie, whatever their length.

        mean_cosine = mean over pairs i != j of u_i . u_j
        std         = sqrt(D) * mean over d of std over i of u_id        (u = x / ||x||)
    """
    n, width = features.shape
    if n < 2:
        raise ValueError(f"expected at least 2 rows to compare, got {n}")
    unit = F.normalize(features.detach().double(), dim=1)
    mean_cosine = (unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1))
    return FeatureSpread(mean_cosine.item(), math.sqrt(width) * unit.std(0, correction=0).mean().item())


def ema_horizon(momentum: float) -> float:
    """How many steps a moving average remembers: 1 / (1 - momentum)."""
    return math.inf if momentum >= 1 else 1 / (1 - momentum)


def start_loss(n_prototypes: int, n_local: int = 8, mask_probability: float = 0.5) -> dict[str, float]:
    """What each loss is while the outputs are still near uniform: ln K times the weight of its pairs.

    Args:
        n_prototypes: K.
        n_local: local crops; with two global ones there are 2 n_local + 2 pairs.
        mask_probability: share of the global crops that are masked; iBOT divides by all of them.
    Returns:
        Nats: "dino_local" and "dino_global" add up to "dino"; "ibot" at weight 1.
    """
    uniform, pairs = math.log(n_prototypes), 2 * n_local + 2
    return {
        "dino_local": uniform * 2 * n_local / pairs,
        "dino_global": uniform * 2 / pairs,
        "dino": uniform,
        "ibot": uniform * mask_probability,
    }


# ---------------------------------------------------------------- what a run's measurements say

SEVERITIES = ("critical", "warning", "info")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to know about a run; `strength` ranks findings of the same severity."""

    severity: str
    title: str
    evidence: str
    advice: str
    strength: float = 1.0


class _History:
    """The records of a run whose numbers are all finite, read key by key."""

    def __init__(self, records: Sequence[dict], config: dict):
        self.config = config
        self.records = [record for record in records if not _not_finite(record)]
        self.last_step = self.records[-1]["step"] if self.records else 0
        self.steps = config.get("run", {}).get("steps") or self.last_step
        self.settled = max(100, self.steps // 100)  # steps after which a run must have left its start
        loss, n_local = config.get("loss", {}), config.get("crops", {}).get("n_local")
        two_thirds = loss.get("dino_divisor") == "released" and n_local == 0
        self.dino_weight = loss.get("dino", 1.0) * (2 / 3 if two_thirds else 1) or 1.0
        first_dino = self.early("dino")
        n_prototypes = config.get("heads", {}).get("n_prototypes")
        self.uniform = math.log(n_prototypes) if n_prototypes else first_dino or 1.0  # ln K
        self.clip = max(config.get("optim", {}).get("clip") or 3.0, 3.0)  # a tighter one says nothing of the rate

    def series(self, key: str, after: int = 0) -> np.ndarray:
        """What was recorded under this key; the DINO loss without its weight, in nats."""
        values = [r[key] for r in self.records if r.get(key) is not None and r["step"] >= after]
        return np.array(values, dtype=float) / (self.dino_weight if key == "dino" else 1.0)

    def early(self, key: str) -> float | None:
        """Median of the first five records."""
        values = self.series(key)[:5]
        return float(np.median(values)) if len(values) else None

    def late(self, key: str) -> float | None:
        """Median of the last quarter, once the run is past its start."""
        values = self.series(key)[-max(1, len(self.series(key)) // 4) :]
        return float(np.median(values)) if len(values) and self.last_step >= self.settled else None

    def gradient_norms(self) -> dict[str, np.ndarray]:
        names = ("grad_norm_backbone", "grad_norm_dino_head", "grad_norm_ibot_head")
        found = {name: self.series(name, after=min(self.settled, self.last_step // 2)) for name in names}
        return {name: values for name, values in found.items() if len(values)}

    def flat(self) -> bool:
        """The entropy and the DINO loss are both within 3 % of ln K: nobody has an opinion."""
        teacher, dino = self.late("teacher_entropy"), self.late("dino")
        return teacher is not None and dino is not None and min(teacher, dino) >= 0.97 * self.uniform


def diagnose(records: Sequence[dict], config: dict) -> list[Finding]:
    """Read the metrics of a run and say in plain words what is wrong and what to change.

    Args:
        records: one dict per logged step, in order (the lines of metrics.jsonl); "step" is needed, all else may lack.
        config: the run's configuration as nested dicts; of heads, run, optim, loss and crops something is read.
    Returns:
        The findings, the gravest and best supported first; a healthy run gets "info" only.
    Raises:
        ValueError: there is no record.
    """
    if not records:
        raise ValueError("expected at least one record of a run, got none; has metrics.jsonl been written?")
    history = _History(records, config)
    checks: list[Callable[[_History], Finding | None]] = [
        _uniform_collapse,
        _point_collapse,
        _few_prototypes,
        _slow_teacher,
        _fast_teacher,
        _large_rate,
        _small_rate,
        _forgetting,
    ]
    findings = [_not_a_number(records)] + [check(history) for check in checks if history.records]
    findings = [finding for finding in findings if finding]
    if all(finding.severity == "info" for finding in findings):
        findings.append(_all_good(history))
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), -f.strength))


def prescription(findings: Sequence[Finding], width: int = 100) -> str:
    """Set the findings as numbered text for a terminal."""
    lines = []
    for number, finding in enumerate(findings, 1):
        lines.append(f"{number}. [{finding.severity}] {finding.title}")
        for label, text in (("seen", finding.evidence), ("do", finding.advice)):
            lines += textwrap.wrap(text, width, initial_indent=f"   {label + ':':<6}", subsequent_indent=" " * 9)
    return "\n".join(lines)


# ---------------------------------------------------------------- one check for each illness


def _not_finite(record: dict) -> list[str]:
    return [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]


BROKEN_ADVICE = {
    "koleo": "KoLeo breaks on equal rows: look for duplicate images in a batch and compute it in float32.",
    "ibot": "iBOT breaks on overflowing logits or weights: check the masks and compute its head and loss in float32.",
    "dino": "DINO breaks on overflowing logits: raise the teacher temperature or compute heads and losses in float32.",
    "grad_norm": "The gradients went before any loss: halve the learning rate, lengthen the warm-up, check the clip.",
}


def _not_a_number(records: Sequence[dict]) -> Finding | None:
    broken = [i for i, record in enumerate(records) if _not_finite(record)]
    if not broken:
        return None
    record, before = records[broken[0]], records[broken[0] - 1] if broken[0] else {}
    bad = _not_finite(record)
    first = next((kind for kind in BROKEN_ADVICE if any(key.startswith(kind) for key in bad)), bad[0])
    what = ", ".join(f"{key} = {record[key]}" for key in bad)
    earlier = f"; {first} was {before[first]:.4g} just before" if before.get(first) is not None else ""
    if broken[-1] == len(records) - 1:
        severity, end = "critical", "the run ended so"
    else:  # steps that are left out do little harm while they are rare
        severity, end = "warning" if len(broken) > 0.01 * len(records) else "info", "the run recovered"
    return Finding(
        severity=severity,
        title=f"Not a number: {first} went first",
        evidence=f"At step {record['step']}: {what}{earlier}; {len(broken)} of {len(records)} records are so, {end}.",
        advice=BROKEN_ADVICE.get(first, "Halve the learning rate and go on from the last checkpoint before this step."),
        strength=10.0,
    )


def _uniform_collapse(h: _History) -> Finding | None:
    if not h.flat():
        return None
    teacher, dino, first = h.late("teacher_entropy"), h.late("dino"), h.series("teacher_entropy")[0]
    cure = (
        f"Divide the learning rate by 10: the teacher was sharp at the start ({first:.2f} nats), and training undid it."
        if first < 0.6 * h.uniform
        else "Sharpen the teacher: a lower, constant teacher temperature (0.015 to 0.02 for a short run). Then fewer "
        "prototypes, a later and lighter iBOT, and only then a higher learning rate."
    )
    return Finding(
        severity="critical",
        title="Uniform collapse: the teacher calls everything equally likely",
        evidence=f"By step {h.last_step} the teacher's entropy is {teacher:.2f} nats and the DINO loss {dino:.2f}, "
        f"both at ln K = {h.uniform:.2f}; they must have left it within the first {h.settled} steps.",
        advice=cure,
        strength=1 + teacher / h.uniform,
    )


def _point_collapse(h: _History) -> Finding | None:
    signs = {
        "effective rank {:.2f} (1 = a line)": (h.late("rankme"), lambda v: v <= 1.5),
        "mean cosine between images {:.3f}": (h.late("mean_cosine"), lambda v: v >= 0.99),
        "feature deviation {:.3f}": (h.late("feature_std"), lambda v: v <= 0.05),
        "teacher entropy {:.3f} nats": (h.late("teacher_entropy"), lambda v: v <= 0.05 * h.uniform),
        "DINO loss {:.3f}": (h.late("dino"), lambda v: v <= 0.05 * h.uniform),
    }
    measured = {text: (value, bad(value)) for text, (value, bad) in signs.items() if value is not None}
    seen = [text.format(value) for text, (value, bad) in measured.items() if bad]
    if h.flat() or not seen or len(seen) < min(2, len(measured)):
        return None
    of_features = [measured[text][1] for text in list(signs)[:3] if text in measured]
    if of_features and not any(of_features):
        evidence = f"By step {h.last_step}: {', '.join(seen)} (ln K = {h.uniform:.2f}), while features are spread out."
        return Finding(severity="critical", title="One prototype for every image: the targets say nothing",
                       evidence=evidence, advice="Raise the teacher temperature; use Sinkhorn targets.")  # fmt: skip
    return Finding(
        severity="critical",
        title="Point collapse: every image gets the same feature",
        evidence=f"By step {h.last_step}: {', '.join(seen)} (ln K = {h.uniform:.2f}).",
        advice="Put the counterweight back: Sinkhorn or centering of the teacher's targets, KoLeo above 0, no gradient "
        "into the teacher, a higher teacher temperature; check that the crops of one image differ.",
        strength=float(len(seen)),
    )


def _few_prototypes(h: _History) -> Finding | None:
    used, teacher = h.late("prototypes_used"), h.late("teacher_entropy")
    if used is None:
        return None
    batch = h.config.get("optim", {}).get("batch_size") or 64
    # a batch of sharp rows cannot reach every prototype, however well they are spread
    reach = min(math.exp(h.uniform), 2 * batch * math.exp(teacher or 0.0))
    if used >= 0.1 * reach:
        return None
    return Finding(
        severity="warning",
        title="Few prototypes are used",
        evidence=f"The mean assignment spreads over {used:.1f} prototypes; this batch could reach {reach:.0f} of "
        f"{math.exp(h.uniform):.0f}.",
        advice="Use Sinkhorn targets (3 iterations) or a larger batch, or ask for fewer prototypes.",
        strength=min(2.0, 0.1 * reach / max(used, 1e-9) / 10),
    )


def _slow_teacher(h: _History) -> Finding | None:
    momentum = h.early("momentum")
    if momentum is None or h.last_step < h.settled or ema_horizon(momentum) <= 0.1 * h.steps:
        return None
    horizon, fallen = ema_horizon(momentum), _fallen(h)
    return Finding(
        severity="info" if fallen > 0.1 else "warning",
        title="The teacher is too slow for this run",
        evidence=f"Momentum {momentum:.4f} remembers {horizon:.0f} steps of a run of {h.steps}: the teacher stays near "
        f"its random start; the DINO loss has fallen by {fallen:.1%}.",
        advice=f"Start at a momentum of about {max(0.5, 1 - 500 / h.steps):.3g} and let it rise to 1, or train longer.",
        strength=1 + min(1.0, horizon / h.steps),
    )


def _fast_teacher(h: _History) -> Finding | None:
    momentum, teacher = h.early("momentum"), h.series("teacher_entropy", after=h.settled)
    if momentum is None or len(teacher) < 8 or ema_horizon(momentum) >= max(1.5, 1e-4 * h.steps):
        return None
    swing = float(np.median(np.abs(np.diff(teacher))))
    return Finding(
        severity="warning" if swing > 0.05 * h.uniform else "info",
        title="The teacher is too fast: it is nearly the student of the same step",
        evidence=f"Momentum {momentum:.3f} remembers {ema_horizon(momentum):.1f} of {h.steps} steps; the teacher's "
        f"entropy swings by {swing:.2f} nats between records (ln K = {h.uniform:.2f}).",
        advice=f"Start at a momentum of about {min(0.996, max(0.6, 1 - 500 / h.steps)):.3g}.",
        strength=min(2.0, swing / (0.05 * h.uniform)),
    )


def _large_rate(h: _History) -> Finding | None:
    loss = h.series("dino")  # the whole loss climbs while iBOT enters
    spikes = sum(_is_spike(loss[i - 20 : i], loss[i], 0.2 * h.uniform) for i in range(20, len(loss)))
    over = {name: float((norms > 3 * h.clip).mean()) for name, norms in h.gradient_norms().items()}
    worst = max(over, key=over.get, default=None)
    clipped = over[worst] if worst else 0.0
    if spikes < max(3, 0.01 * len(loss)) and clipped <= 0.5:
        return None
    seen = [f"{spikes} of {len(loss)} records of the DINO loss jump above their neighbourhood"] if spikes else []
    if clipped > 0.5:
        seen.append(f"{worst} is over {3 * h.clip:g} in {clipped:.0%} of the records")
    peak = h.series("lr").max(initial=0.0)
    return Finding(
        severity="warning",
        title="The learning rate is too large",
        evidence="; ".join(seen) + (f"; the rate peaks at {peak:.2g}." if peak else "."),
        advice="Divide the learning rate by 2 to 4 and lengthen the warm-up; keep the clip.",
        strength=len(seen) + clipped,
    )


def _is_spike(before: np.ndarray, value: float, least: float) -> bool:
    middle = np.median(before)
    usual = np.median(np.abs(before - middle))
    return bool(value - middle > max(least, 6 * usual))


def _small_rate(h: _History) -> Finding | None:
    if h.late("dino") is None or h.flat() or abs(_fallen(h)) > 0.01 or _large_rate(h):
        return None
    peak = h.series("lr").max(initial=0.0)
    norms = {name: float(np.median(values)) for name, values in h.gradient_norms().items()}
    gradients = "".join(f", {name} {norm:.2g}" for name, norm in norms.items())
    return Finding(
        severity="warning",
        title="The learning rate is too small: nothing has moved",
        evidence=f"By step {h.last_step} the DINO loss is {h.late('dino'):.3f}, at the start {h.early('dino'):.3f}"
        f"{gradients}; the rate peaks at {peak:.2g}.",
        advice="Multiply the learning rate by 10 (AdamW 1e-3 to 2e-3 suits small models at batch 64), shorten the "
        "warm-up, and check that the backbone's parameters are in the optimizer.",
        strength=1.5 if not norms or max(norms.values()) < 0.1 * h.clip else 1.0,
    )


def _fallen(h: _History) -> float:
    """Share of the first DINO loss that is gone."""
    first, last = h.early("dino"), h.late("dino")
    return 0.0 if not first or last is None else 1 - last / first


def _forgetting(h: _History) -> Finding | None:
    knn = h.series("knn")
    if len(knn) < 2 or knn.max() - knn[-1] <= 0.05:
        return None
    return Finding(
        severity="warning",
        title="It had learned more than it knows now",
        evidence=f"k-NN was {knn.max():.3f} at its best and is {knn[-1]:.3f} now (first: {knn[0]:.3f}).",
        advice="Look at what changed after the best value: a rising iBOT weight, teacher temperature or learning rate.",
        strength=1 + float(knn.max() - knn[-1]),
    )


def _all_good(h: _History) -> Finding:
    if h.last_step < h.settled:
        return Finding(
            severity="info",
            title="Too early to tell",
            evidence=f"{h.last_step} steps; this run must show its direction after {h.settled}.",
            advice="Go on.",
        )
    facts = [f"DINO loss {h.early('dino'):.2f} -> {h.late('dino'):.2f}"] if h.late("dino") is not None else []
    if h.late("teacher_entropy") is not None:
        facts.append(f"teacher entropy {h.late('teacher_entropy'):.2f} of ln K = {h.uniform:.2f} nats")
    if h.late("rankme") is not None:
        facts.append(f"effective rank {h.late('rankme'):.1f}")
    knn = h.series("knn")
    if len(knn):
        facts.append(f"k-NN {knn[0]:.3f} -> {knn[-1]:.3f}")
    rising = len(knn) > 2 and knn[-1] >= knn.max() - 0.005
    return Finding(
        severity="info",
        title="Learning, and no sign of collapse",
        evidence=f"Over {h.last_step} steps: {', '.join(facts) or 'only the loss was recorded'}.",
        advice="k-NN is still rising: a longer run would gain." if rising else "Nothing to change.",
    )
