"""The measures on cases whose answer is known, and the doctor on one made-up run for each illness."""

import json
import math

import numpy as np
import pytest
import torch

from minidino.learning import doctor

LN_K = math.log(256)
CONFIG = {
    "heads": {"n_prototypes": 256},
    "crops": {"n_local": 2},
    "run": {"steps": 1800},
    "optim": {"clip": 3.0, "batch_size": 64},
}


# ---------------------------------------------------------------- measures


def test_entropy_and_prototypes_used_of_known_assignments():
    uniform, one_hot = torch.full((5, 8), 1 / 8), torch.eye(8)[[1, 1, 4, 4, 4, 4]]
    assert doctor.entropy(uniform) == pytest.approx(math.log(8))
    assert doctor.entropy(one_hot) == 0.0
    assert doctor.prototypes_used(uniform).perplexity == pytest.approx(8)
    used = doctor.prototypes_used(one_hot)
    assert used.n_chosen == 2
    assert used.perplexity == pytest.approx(math.exp(-(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3)))


@pytest.mark.parametrize("d", [1, 5, 32])
def test_rankme_counts_directions(d):
    basis, _ = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(d)))
    assert doctor.rankme(basis[:, :d]) == pytest.approx(d, rel=1e-4)  # orthonormal
    assert doctor.rankme(7 * basis[:, :d] @ basis[:d]) == pytest.approx(d, rel=1e-3)  # hidden in 64 dimensions
    assert doctor.rankme(torch.outer(torch.arange(1.0, 41), basis[0])) == pytest.approx(1, rel=1e-3)  # rank 1


def test_rankme_of_a_known_spectrum():
    spectrum = np.array([4.0, 2.0, 1.0, 1.0])
    share = spectrum / spectrum.sum()
    expected = np.exp(-(share * np.log(share)).sum())
    left, _ = torch.linalg.qr(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)))
    features = left * torch.tensor(spectrum)
    assert doctor.rankme(features) == pytest.approx(expected, rel=1e-5)
    assert doctor.rankme(features.float() * 1000) == pytest.approx(expected, rel=1e-5)


def test_feature_spread_by_loops():
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)) + 0.5
    unit = (x / x.norm(dim=1, keepdim=True)).double().numpy()
    pairs = [unit[i] @ unit[j] for i in range(12) for j in range(12) if i != j]
    spread = doctor.feature_spread(x * torch.arange(1.0, 13)[:, None])  # lengths must not matter
    assert spread.mean_cosine == pytest.approx(np.mean(pairs), abs=1e-6)
    assert spread.std == pytest.approx(math.sqrt(5) * unit.std(0).mean(), abs=1e-6)
    point = doctor.feature_spread(torch.ones(9, 5))
    assert point.mean_cosine == pytest.approx(1) and point.std == pytest.approx(0, abs=1e-6)
    round_about = doctor.feature_spread(torch.randn(4000, 16, generator=torch.Generator().manual_seed(2)))
    assert round_about.std == pytest.approx(1, abs=0.02) and abs(round_about.mean_cosine) < 0.01
    with pytest.raises(ValueError, match="at least 2 rows"):
        doctor.feature_spread(x[:1])


def test_ema_horizon():
    assert doctor.ema_horizon(0.992) == pytest.approx(125)
    assert doctor.ema_horizon(0.0) == 1 and doctor.ema_horizon(1.0) == math.inf


@pytest.mark.parametrize(
    ("n_prototypes", "ln_k", "local", "global_", "ibot"),
    [(4096, 8.318, 7.394, 0.924, 4.159), (65536, 11.090, 9.858, 1.232, 5.545), (131072, 11.784, 10.474, 1.309, 5.892)],
)
def test_start_losses_are_those_of_the_released_logs(n_prototypes, ln_k, local, global_, ibot):
    start = doctor.start_loss(n_prototypes, n_local=8)
    expected = {"dino": ln_k, "dino_local": local, "dino_global": global_, "ibot": ibot}
    assert start == {name: pytest.approx(value, abs=6e-4) for name, value in expected.items()}
    assert doctor.start_loss(n_prototypes, n_local=0)["dino_global"] == pytest.approx(ln_k, abs=6e-4)


# ---------------------------------------------------------------- a run for each illness


def run(steps=1800, every=6, **changes):
    """A healthy run in the shape of a real one; `changes` replace a key by a function of the done fraction t."""
    rng = np.random.default_rng(0)
    laws = {
        "dino": lambda t: LN_K - 3.2 * (1 - math.exp(-5 * t)),
        "ibot": lambda t: 0.0 if t < 0.4 else 0.6 * min(1, (t - 0.4) / 0.3),  # its weight rises late
        "koleo": lambda t: 0.1 - 0.05 * t,
        "lr": lambda t: 2e-3 * min(1, t * 36) * (0.505 + 0.495 * math.cos(math.pi * t)),
        "momentum": lambda t: 1 - 0.4 * (0.5 + 0.5 * math.cos(math.pi * t)),
        "teacher_entropy": lambda t: LN_K - 3.9 * (1 - math.exp(-6 * t)),
        "prototypes_used": lambda t: 200 + 40 * t,
        "rankme": lambda t: 8 + 30 * t,
        "feature_std": lambda t: 0.5 + 0.4 * t,
        "mean_cosine": lambda t: 0.7 * math.exp(-4 * t),
        "grad_norm_backbone": lambda t: 2.0,
        "grad_norm_dino_head": lambda t: 1.2,
        "grad_norm_ibot_head": lambda t: 0.4,
    } | changes
    records = []
    for step in range(0, steps, every):
        t = step / steps
        record = {key: law(t) * (1 + 0.005 * rng.standard_normal()) for key, law in laws.items()}
        record |= {"momentum": laws["momentum"](t), "lr": laws["lr"](t)}
        record["loss"] = record.get("loss", record["dino"] + record["ibot"] + record["koleo"])
        records.append(record | {"step": step, "images": 64 * step, "seconds": step / 10})
        if "knn" not in changes and step % 300 == 0:
            records[-1]["knn"] = 0.15 + 0.5 * t
    return records


ILLNESSES = {
    "Uniform collapse": run(
        dino=lambda t: LN_K,
        teacher_entropy=lambda t: 0.995 * LN_K,
        rankme=lambda t: 1.2,
        grad_norm_backbone=lambda t: 1e-3,
    ),
    "Point collapse": run(
        dino=lambda t: LN_K * math.exp(-20 * t),
        teacher_entropy=lambda t: LN_K * math.exp(-20 * t),
        rankme=lambda t: 1.0 + 20 * math.exp(-20 * t),
        mean_cosine=lambda t: 1 - 0.5 * math.exp(-20 * t),
        feature_std=lambda t: 0.01,
        prototypes_used=lambda t: 1.0,
        knn=lambda t: 0.1,
    ),
    "Few prototypes": run(prototypes_used=lambda t: 4.0),
    "The teacher is too slow": run(momentum=lambda t: 0.9992, dino=lambda t: LN_K * (1 - 0.06 * t)),
    "The teacher is too fast": run(
        momentum=lambda t: 0.1, teacher_entropy=lambda t: 3 + math.sin(1e4 * t) + 0.1 * math.cos(7e3 * t)
    ),
    "The learning rate is too large": run(
        dino=lambda t: 3.5 + 3 * (math.sin(700 * t) > 0.985),
        grad_norm_backbone=lambda t: 40.0,
    ),
    "The learning rate is too small": run(
        dino=lambda t: LN_K,
        teacher_entropy=lambda t: 4.0,
        lr=lambda t: 1e-8,
        grad_norm_backbone=lambda t: 0.01,
        grad_norm_dino_head=lambda t: 0.01,
        grad_norm_ibot_head=lambda t: 0.01,
    ),
    "It had learned more": run(knn=lambda t: 0.2 + 0.4 * t - 1.6 * max(0, t - 0.7)),
}


@pytest.mark.parametrize("illness", ILLNESSES)
def test_each_illness_is_the_top_finding_and_is_told_with_numbers(illness):
    findings = doctor.diagnose(ILLNESSES[illness], CONFIG)
    assert findings[0].title.startswith(illness)
    assert findings[0].severity in ("critical", "warning")
    for finding in findings:
        assert any(character.isdigit() for character in finding.evidence) and finding.advice
    ranks = [doctor.SEVERITIES.index(finding.severity) for finding in findings]
    assert ranks == sorted(ranks)


@pytest.mark.parametrize("illness", sorted(set(ILLNESSES) - {"Point collapse"}))
def test_a_single_fault_is_not_called_by_other_names(illness):
    grave = [finding for finding in doctor.diagnose(ILLNESSES[illness], CONFIG) if finding.severity != "info"]
    assert len(grave) == 1


@pytest.mark.parametrize("every", [1, 6, 50])
def test_a_healthy_run_gets_nothing_above_info(every):
    (finding,) = doctor.diagnose(run(every=every), CONFIG)
    assert finding.severity == "info" and finding.title.startswith("Learning")
    assert "k-NN 0.150 -> 0.567" in finding.evidence


def test_ibot_that_enters_fast_is_no_large_rate():
    flat, enters = (lambda t: LN_K), (lambda t: 0.3 * LN_K * min(1, max(0, t - 0.4) / 0.3))
    findings = doctor.diagnose(run(steps=350, every=10, dino=flat, teacher_entropy=flat, ibot=enters), CONFIG)
    grave = [finding.title for finding in findings if finding.severity != "info"]
    assert len(grave) == 1 and grave[0].startswith("Uniform collapse")


def test_a_long_published_run_in_its_warm_up_is_not_called_collapsed():
    published = CONFIG | {"run": {"steps": 125_000}, "heads": {"n_prototypes": 65536}}
    records = run(
        steps=1000,
        dino=lambda t: math.log(65536) * (1 - 0.01 * t),
        teacher_entropy=lambda t: math.log(65536),
        momentum=lambda t: 0.992,
    )
    assert [finding.title for finding in doctor.diagnose(records, published)] == ["Too early to tell"]


@pytest.mark.parametrize(
    ("bad", "first", "advice"),
    [
        ({"koleo": math.nan, "loss": math.nan}, "koleo", "duplicate"),
        ({"ibot": math.inf, "loss": math.inf}, "ibot", "masks"),
        ({"grad_norm_backbone": math.inf}, "grad_norm", "warm-up"),
    ],
)
def test_not_a_number_is_named_by_what_went_first(bad, first, advice):
    records = run()
    records[120] |= bad
    for record in records[121:]:  # then everything goes
        record |= {key: math.nan for key in ("loss", "dino", "ibot", "koleo")}
    top = doctor.diagnose(records, CONFIG)[0]
    assert top.severity == "critical" and top.title == f"Not a number: {first} went first"
    assert "step 720" in top.evidence and advice in top.advice
    recovered = run()
    recovered[120] |= bad
    assert {finding.severity for finding in doctor.diagnose(recovered, CONFIG)} == {"info"}  # one step in 300
    for record in recovered[120:140]:
        record |= bad
    assert doctor.diagnose(recovered, CONFIG)[0].severity == "warning"
    broken_at_once = [{"step": 0, "loss": math.nan, "dino": math.nan}]
    assert doctor.diagnose(broken_at_once, CONFIG)[0].title == "Not a number: dino went first"


def test_sparse_records_and_an_empty_config_are_enough():
    records = [{"step": step, "loss": 5.0 - step / 500} for step in range(0, 1000, 10)]
    assert [finding.severity for finding in doctor.diagnose(records, {})] == ["info"]
    assert doctor.diagnose([{"step": 3, "loss": 5.0}], {})[0].title == "Too early to tell"
    through_json = [json.loads(json.dumps(record)) for record in ILLNESSES["Uniform collapse"]]
    assert doctor.diagnose(through_json, {})[0].title.startswith("Uniform collapse")  # ln K from the first loss
    with pytest.raises(ValueError, match="at least one record"):
        doctor.diagnose([], CONFIG)


def test_prescription_is_numbered_and_fits_the_terminal():
    findings = doctor.diagnose(ILLNESSES["Point collapse"], CONFIG)
    text = doctor.prescription(findings, width=80)
    assert text.startswith("1. [critical] Point collapse")
    assert all(len(line) <= 80 for line in text.splitlines())
    squeezed = " ".join(text.split())
    for number, finding in enumerate(findings, 1):
        assert f"{number}. [{finding.severity}] {finding.title}" in squeezed
        assert finding.evidence in squeezed and finding.advice in squeezed


@pytest.mark.parametrize("first, cure", [(1.9, "Divide the learning rate by 10"), (4.6, "Sharpen the teacher")])
def test_a_teacher_that_was_sharp_lost_it_to_a_large_rate(first, cure):
    """First entropies of the preset with base_lr 0.5, and with the published temperatures; ln K = 5.55."""
    collapsed = run(dino=lambda t: LN_K, teacher_entropy=lambda t: LN_K * (first / 5.55 if t == 0 else 0.99))
    top = doctor.diagnose(collapsed, CONFIG)[0]
    assert top.title.startswith("Uniform collapse") and top.advice.startswith(cure)


def test_one_prototype_for_all_is_not_one_feature_for_all():
    top = doctor.diagnose(run(dino=lambda t: 0.01, teacher_entropy=lambda t: 0.001), CONFIG)[0]
    assert top.title.startswith("One prototype for every image") and "temperature" in top.advice


def test_a_tight_clip_is_no_large_rate():
    findings = doctor.diagnose(run(), CONFIG | {"optim": {"clip": 0.01}})
    assert {finding.severity for finding in findings} == {"info"}


@pytest.mark.parametrize("loss, n_local", [({"dino": 0.5}, 2), ({"dino_divisor": "released"}, 0)])
def test_a_weighted_loss_is_compared_with_ln_k_without_its_weight(loss, n_local):
    weight = 0.5 if "dino" in loss else 2 / 3
    records = [{"step": step, "dino": weight * LN_K, "teacher_entropy": LN_K} for step in range(0, 1800, 10)]
    plain = [record | {"dino": LN_K} for record in records]
    config = CONFIG | {"loss": {"dino": 1.0} | loss, "crops": {"n_local": n_local}}
    weighted, unweighted = (doctor.diagnose(*each)[0].title for each in ((records, config), (plain, CONFIG)))
    assert weighted == unweighted and "ollapse" in weighted
