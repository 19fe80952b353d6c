"""The sections of a run's report that one looks up: exits, classes, scores, training, data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from erde.common.history import Epoch, Health
from erde.evaluation.results import Arm, EntropyHistograms, Results, RuntimeAgreement
from erde.policy.points import ScoreCandidate
from erde.report.html import (
    NONE,
    Group,
    Html,
    Row,
    accuracy,
    badge,
    decimal,
    details,
    dot,
    exit_bar,
    exit_keys,
    flat,
    join,
    limit,
    meter,
    millions,
    pairs,
    percent,
    points_of,
    signed,
    table,
    tag,
)
from erde.report.sections import exit_names, rule_in_words, several, unfolded

# Classes of one table: of more than the first number only those with the largest drop, which are what one looks for.
ALL_CLASSES_SHOWN, CLASSES_SHOWN = 100, 20


# ---------------------------------------------------------------- exits and probabilities


def exits(results: Results) -> Html:
    """Cost and accuracy of every exit."""
    columns = (
        "exit", "MACs\n(million)", "of no\nexits (%)", "parameters", "test\naccuracy (%)", "AUROC\nright",
        "AUROC\nno harm", "answers\n(% of images)", "right of\nthose (%)", "teacher\nwrong (%)",
    )  # fmt: skip
    groups: list[Group] = []
    for index, (name, arm) in enumerate(results.arms.items()):
        rows = []
        for place, (cost, one) in enumerate(zip(arm.cost, arm.exits, strict=True)):
            wrong = arm.teacher_wrong[place] if arm.teacher_wrong and place < len(arm.teacher_wrong) else None
            cells = [
                join(f"{place} ", tag("span", cost.name, class_="soft")), millions(cost.macs),
                points_of(cost.macs / arm.no_exit_macs), f"{cost.parameters:,}",
                accuracy(one.accuracy, one.accuracy_interval), decimal(one.auroc_correctness),
                decimal(one.auroc_harm), points_of(one.answered),
                NONE if one.answered_accuracy is None else points_of(one.answered_accuracy),
                NONE if wrong is None else points_of(wrong, 2),
            ]  # fmt: skip
            rows.append((cells, False))
        groups.append((join(dot(index), name), rows))
    caption = (
        "Every exit on the test split, as if it answered every image; MACs and parameters are cumulative and hold all "
        "heads so far. “Answers” is the share that leaves here at the default operating point."
    )
    return table(caption, columns, groups)


def probabilities(results: Results) -> Html:
    """How good the reported probabilities are, exit by exit."""
    columns = ("exit", "NLL\n(nats)", "Brier", "ECE (%)", "temperature")
    groups: list[Group] = []
    for index, (name, arm) in enumerate(results.arms.items()):
        rows = [
            (
                [
                    f"{place}",
                    decimal(one.nll),
                    decimal(one.brier),
                    points_of(one.ece, 2),
                    decimal(one.temperature, 2),
                ],
                False,
            )
            for place, one in enumerate(arm.exits)
        ]
        groups.append((join(dot(index), name), rows))
    caption = "The reported probabilities of every exit on the test split, after temperature scaling."
    made = table(caption, columns, groups, narrow=True)
    return details("NLL, Brier, ECE and temperature of every exit", made)


def reliability(results: Results) -> Html:
    """The bins behind the diagrams of the exported arm."""
    arm = results.arms[results.exported_arm]
    groups: list[Group] = []
    for place, one in enumerate(arm.exits):
        bins = one.reliability
        rows = []
        for index, (count, sure, right) in enumerate(
            zip(bins.count, bins.confidence, bins.accuracy, strict=True)
        ):
            low, high = index / len(bins.count), (index + 1) / len(bins.count)
            found = (NONE, NONE) if count == 0 else (points_of(sure), points_of(right))
            rows.append(([f"{points_of(low, 0)} to {points_of(high, 0)}", f"{count:,}", *found], False))
        groups.append((join(f"exit {place}"), rows))
    columns = ("confidence (%)", "images", "mean\nconfidence (%)", "right (%)")
    caption = f"Images by the confidence that {results.exported_arm} reports."
    return details(f"Bins of {results.exported_arm}", table(caption, columns, groups, narrow=True))


# ---------------------------------------------------------------- where images leave


def rates(results: Results) -> Html:
    """Exit rates of every arm with early exits at its default operating point."""
    count = max(len(arm.exits) for arm in results.arms.values())
    parts: list[Html] = []
    for index, name, arm in several(results):
        measured = arm.default_point().test
        bar = "not measured" if measured is None else exit_bar(measured.exit_rates, exit_names(arm), count)
        parts += [tag("dt", dot(index), name), tag("dd", bar)]
    if not parts:
        return tag("p", "No arm has more than one exit.", class_="soft")
    return join(exit_keys(count), tag("dl", *parts, class_="rates"))


def classes(results: Results) -> Html:
    """Accuracy, drop and exit rates by class."""
    made = ((name, _class_table(name, arm, results.data.classes)) for _, name, arm in several(results))
    return join(*(details(f"Classes of {name}", part) for name, part in made))


def _class_table(name: str, arm: Arm, names: Sequence[str]) -> Html:
    order = sorted(range(len(arm.classes)), key=lambda index: (-arm.classes[index].drop, index))
    columns = (
        "class", "images", "final exit:\naccuracy (%)", "with early exits:\naccuracy (%)", "drop\n(points)",
        *(f"exit {index}\n(%)" for index in range(len(arm.exits))),
    )  # fmt: skip
    shown = len(order) if len(order) <= ALL_CLASSES_SHOWN else CLASSES_SHOWN
    rows: list[Row] = []
    for index in order[:shown]:
        one = arm.classes[index]
        cells = [
            names[index], f"{one.images:,}", points_of(one.no_exit_accuracy), points_of(one.accuracy),
            signed(100 * one.drop), *map(points_of, one.exit_rates),
        ]  # fmt: skip
        rows.append((cells, False))
    caption = f"Classes of {name} at {arm.default_operating_point}, the largest drop first."
    if len(order) > shown:
        caption += f" {shown} of {len(order):,} classes; the others are in results.json."
    return table(caption, columns, [(None, rows)])


def class_drop_in_words(results: Results) -> str:
    """The class that loses most by early exits, in the exported arm."""
    arm = results.arms[results.exported_arm]
    if len(arm.exits) == 1 or not arm.classes:
        return ""
    worst = max(range(len(arm.classes)), key=lambda index: arm.classes[index].drop)
    one = arm.classes[worst]
    if one.drop <= 0:
        return "No class loses accuracy by leaving early."
    each = percent(1 / max(one.images, 1), 2)
    return (
        f"Leaving early costs class {results.data.classes[worst]} most: {points_of(one.drop)} points of accuracy "
        f"({points_of(one.no_exit_accuracy)} to {points_of(one.accuracy)} %). One of its {one.images:,} images is {each}. "
        "The certificate is about all images together, not about each class."
    )


# ---------------------------------------------------------------- the teacher, scores, training


def teacher_wrong(results: Results) -> Html:
    """How much of the training set ERDE's entropy term acts on."""
    known = [
        (index, name, arm.teacher_wrong)
        for index, (name, arm) in enumerate(results.arms.items())
        if arm.teacher_wrong
    ]
    if not known:
        return tag("p", "No arm of this run recorded it.", class_="soft")
    count = max(len(shares) for _, _, shares in known)
    rows = []
    for index, name, shares in known:
        cells = [join(percent(share, 2), meter(share)) for share in shares]
        rows.append(([join(dot(index), name), *cells, *[NONE] * (count - len(cells))], False))
    caption = (
        "Share of training images, in the last epoch, on which the teacher of each student exit is wrong."
    )
    return table(caption, ("arm", *(f"exit {index}" for index in range(count))), [(None, rows)], narrow=True)


def entropies(results: Results) -> Html:
    """Mean entropy of every arm's exits where the teacher is right and where it is wrong."""
    groups: list[Group] = []
    for index, name, arm in several(results):
        if arm.entropies is None:
            continue
        rows = [
            ([f"exit {place}", *cells], False) for place, cells in enumerate(_mean_entropies(arm.entropies))
        ]
        groups.append((join(dot(index), name), rows))
    if not groups:
        return tag("p", "This run has no teacher to compare with.", class_="soft")
    columns = ("exit", "teacher right", "teacher wrong", "difference")
    caption = (
        "Mean normalised entropy on test images, from the bins of the figure; 0 is sure, 1 is uniform. ERDE wants "
        "the difference large at its intermediate exits."
    )
    return table(caption, columns, groups, narrow=True)


def _mean_entropies(histograms: EntropyHistograms) -> Iterable[tuple[str, str, str]]:
    for pair in zip(histograms.teacher_right, histograms.teacher_wrong, strict=True):
        means = [
            sum((index + 0.5) / len(bins) * count for index, count in enumerate(bins)) / sum(bins)
            if sum(bins)
            else None
            for bins in pair
        ]
        right, wrong = means
        gap = NONE if right is None or wrong is None else signed(wrong - right, 3)
        yield decimal(right), decimal(wrong), gap


def is_chosen(candidate: ScoreCandidate, arm: Arm) -> bool:
    """Whether a candidate is the score that the arm decides on."""
    mine = (arm.score, arm.sharpness, arm.ensemble)
    return (candidate.score, candidate.sharpness, candidate.ensemble) == mine


def scores(results: Results) -> Html:
    """All candidates of the exported arm on tune."""
    arm = results.arms[results.exported_arm]
    rows = [
        (
            [
                one.score,
                f"{one.sharpness:g}",
                one.ensemble,
                points_of(one.macs_saved, 2),
                percent(one.fragile, 2),
            ],
            is_chosen(one, arm),
        )
        for one in sorted(arm.score_candidates, key=lambda one: -one.macs_saved)
    ]
    columns = ("score", "sharpness", "ensemble", "MACs saved (%)", "near a threshold")
    caption = (
        f"The best first. Chosen: {rule_in_words(arm)}. The last column is the share of tune images so near a threshold "
        "that the last bits of a sum may decide."
    )
    return table(caption, columns, [(None, rows)], text={0, 2}, narrow=True)


def score_outcomes(results: Results) -> Html:
    """What every score does on test at each target risk."""
    made = ((name, _score_outcomes(name, arm)) for _, name, arm in several(results) if arm.score_outcomes)
    return unfolded(results, "Scores on test", made)


def _score_outcomes(name: str, arm: Arm) -> Html:
    columns = (
        "score", "sharpness", "ensemble", "MACs saved\non tune (%)", "MACs saved\non test (%)", "risk on\ntest (%)",
        "test\naccuracy (%)",
    )  # fmt: skip
    groups: list[Group] = []
    for target in sorted({one.target for one in arm.score_outcomes}):
        mine = [one for one in arm.score_outcomes if one.target == target]
        rows: list[Row] = []
        for one in sorted(mine, key=lambda one: -one.test_macs_saved):
            risk = points_of(one.test_risk, 2)
            above = one.test_risk > one.target
            cells = [
                one.score, f"{one.sharpness:g}", one.ensemble, points_of(one.tune_macs_saved),
                points_of(one.test_macs_saved), tag("span", f"{risk} above", class_="warn-text") if above else risk,
                points_of(one.test_accuracy),
            ]  # fmt: skip
            chosen = (one.score, one.sharpness, one.ensemble) == (arm.score, arm.sharpness, arm.ensemble)
            rows.append((cells, chosen))
        groups.append((join(f"Risk of at most {limit(target)} on tune"), rows))
    caption = f"Scores of {name} with thresholds from tune, not certified: test may be above the target. The best on test first."
    return table(caption, columns, groups, text={0, 2})


def history(results: Results) -> Html:
    """First and last training loss, and the health of the heads."""
    rows, heads = [], []
    for name, arm in results.arms.items():
        losses = [loss for epoch in arm.history if isinstance(loss := epoch.parts.get("loss"), float)]
        if losses:
            rows.append(([name, str(len(losses)), f"{losses[0]:.4g}", f"{losses[-1]:.4g}"], False))
        if arm.precision == "fp32":  # in int8 the training is that of the float arm
            heads += [([name, *_health(epoch, epoch.health)], False) for epoch in arm.history if epoch.health]
    columns = ("arm", "epochs", "loss, first epoch", "loss, last epoch")
    parts = [table("Mean training loss of an epoch.", columns, [(None, rows)], narrow=True)]
    if heads:
        parts.append(table(HEALTH_CAPTION, HEALTH_COLUMNS, [(None, heads)], text={0, 1}))
    return join(*parts)


def unhealthy_heads(results: Results) -> Html:
    """A line for each arm whose heads ended in trouble."""
    ends = {
        name: health
        for name, arm in results.arms.items()
        if (health := next((epoch.health for epoch in reversed(arm.history) if epoch.health), None))
    }
    lines = [
        tag("p", badge("heads", "warn"), f" {name}: {health.line()}.")
        for name, health in ends.items()
        if not health.is_good
    ]
    return join(*lines)


HEALTH_CAPTION = (
    "Health of the heads at the end of training, and after their refit. A dead unit gives the same for every image. "
    "A healthy first exit is no worse than a linear probe on the same features, on train images. Gradient norms are "
    "means over the epoch, before clipping."
)
HEALTH_COLUMNS = (
    "arm", "after", "dead units", "first exit, %", "linear probe, %", "gradient norm, heads", "trunk",
)  # fmt: skip


def _health(epoch: Epoch, health: Health) -> list[str]:
    dead = [f"{dead} of {units}" for dead, units in zip(health.dead_units, health.units, strict=True)]
    norms, trunk = epoch.parts.get("gradient_norm_heads", []), epoch.parts.get("gradient_norm_trunk")
    probe = health.probe_accuracy
    return [
        "refit" if epoch.phase == "refit" else "training",
        " / ".join(dead),
        f"{100 * health.first_exit_accuracy:.1f}",
        NONE if probe is None else f"{100 * probe:.1f}",
        " / ".join(f"{norm:.2g}" for norm in norms) if isinstance(norms, list) else NONE,
        f"{trunk:.2g}" if isinstance(trunk, float) else NONE,
    ]


# ---------------------------------------------------------------- agreement, data


def agreement(results: Results) -> Html:
    """The runtime and torch against the evaluation, for each bundle."""
    torch = _agreed("The network in torch", results.agreement.torch_disagreements, results.agreement)
    parts = [_runtime_agreed("The torch-free runtime", results.agreement), tag("p", f"{torch}.")]
    if results.quantised is not None:
        parts.append(
            _runtime_agreed("The bundle in int8, by its own thresholds,", results.quantised.agreement)
        )
    points = ", ".join(results.agreement.operating_points) or NONE
    return join(*parts, tag("p", f"Operating points compared: {points}.", class_="soft small"))


def _runtime_agreed(who: str, found: RuntimeAgreement) -> Html:
    mark = badge("disagrees", "warn") if found.disagreements else badge("agrees", "good")
    near = f"{found.band:,} lie within {found.band_width:g} of a threshold."
    return tag("p", mark, f" {_agreed(who, found.disagreements, found)}; {near}")


def _agreed(who: str, disagreements: int, found: RuntimeAgreement) -> str:
    if disagreements:
        answers = found.images * len(found.operating_points)
        return f"{who} disagreed with this evaluation on {disagreements:,} of {answers:,} answers"
    return f"{who} agreed with this evaluation on {found.images:,} of {found.images:,} test images"


def data_tables(results: Results) -> Html:
    """The data set and its splits."""
    data = results.data
    splits: list[Row] = [
        ([name, f"{one.size:,}", tag("code", one.fingerprint[:12], title=one.fingerprint)], False)
        for name, one in data.splits.items()
    ]
    facts = {
        "name": data.name,
        "image shape (H, W, C)": " × ".join(map(str, data.image_shape)),
        "mean": ", ".join(f"{value:.4g}" for value in data.mean),
        "standard deviation": ", ".join(f"{value:.4g}" for value in data.std),
    }
    caption = "The splits; a fingerprint is a hash of their images and labels."
    return join(
        table(caption, ("split", "images", "fingerprint"), [(None, splits)], narrow=True),
        pairs("The data set.", facts),
        details(f"{len(data.classes):,} classes", tag("p", ", ".join(data.classes))),
    )


def environment(results: Results) -> Html:
    """Where the run was made."""
    return pairs("Where the run was made.", flat(results.environment))


def timings(results: Results) -> Html:
    """What took how long."""
    return pairs("What took how long.", flat(results.timings))
