"""Results made by hand for the pages that erde writes, a reader of such pages, and a browser to open them."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erde.common.history import Epoch
from erde.evaluation.results import (
    Agreement,
    Arm,
    ClassMeasures,
    Comparison,
    Curve,
    DataInfo,
    EntropyHistograms,
    ExitCost,
    ExitMeasures,
    Oracle,
    Reliability,
    Results,
    ScoreOutcome,
    SplitInfo,
)
from erde.policy.points import Certificate, LeftOut, Measured, OperatingPoint, ScoreCandidate

CHROMIUM = shutil.which("chromium")
ARMS = ("teacher", "erde", "kd", "ce", "fixed-small")
NO_EXIT_MACS = {"teacher": 253_000_000, "fixed-small": 22_400_000}
BACKBONES = {"teacher": "resnet56", "fixed-small": "resnet20x0.75"}
CERTIFY_IMAGES = TEST_IMAGES = 2_500


def wilson(share: float, count: int = TEST_IMAGES) -> tuple[float, float]:
    half = 1.96 * (share * (1 - share) / count) ** 0.5
    return max(0.0, share - half), min(1.0, share + half)


def certificate(max_risk: float = 0.01) -> Certificate:
    return Certificate(
        guarantee="risk", max_risk=max_risk, confidence=0.9, images=CERTIFY_IMAGES, lost=17, won=4,
        risk=17 / CERTIFY_IMAGES, upper_bound=0.0096, reference="final_exit", method="exact binomial bound",
        assumptions="images in use are drawn like those of the certify split",
    )  # fmt: skip


def along(eagerness: float, macs: np.ndarray, accuracy: np.ndarray, no_exit_macs: int) -> Measured:
    """What a network does whose exits take the share ``eagerness`` of what reaches them."""
    rates = [eagerness * (1 - eagerness) ** place for place in range(len(macs) - 1)]
    rates.append(1 - sum(rates))
    early = float(np.dot(rates, accuracy))
    # Easy images leave first, so the first of them cost no accuracy.
    share = float(accuracy[-1] + (early - accuracy[-1]) * eagerness**2)
    mean = float(np.dot(rates, macs))
    return Measured(
        images=TEST_IMAGES, accuracy=share, accuracy_interval=wilson(share), risk=0.03 * eagerness**2,
        net_drop=0.02 * eagerness**2, macs=mean, macs_saved=1 - mean / no_exit_macs, exit_rates=rates,
    )  # fmt: skip


def curve(path: list[Measured], area: float) -> Curve:
    return Curve(
        macs=[point.macs for point in path], accuracy=[point.accuracy for point in path], risk=[point.risk for point in path],
        exit_rates=[point.exit_rates for point in path], area=area, area_interval=(area - 0.01, area + 0.01),
    )  # fmt: skip


def compared(first: str, second: str, difference: float, at: Any = "default") -> Comparison:
    return Comparison(
        first=first, second=second, at=at, accuracy_difference=difference,
        accuracy_interval=(difference - 0.01, difference + 0.01), macs_difference=-1_250_000.0,
        macs_interval=(-1_400_000.0, -1_100_000.0), only_first_right=211, only_second_right=180, mcnemar_p_value=0.1304,
    )  # fmt: skip


def make_arm(name: str, exits: int, certified: bool, quality: float) -> Arm:
    exits = 1 if name.startswith("fixed") else exits
    no_exit_macs = NO_EXIT_MACS.get(name, 41_000_000)
    macs = no_exit_macs * (np.linspace(0.3, 1.0, exits) if exits > 1 else np.ones(1)) + 100_000 * (exits > 1)
    accuracy = quality - 0.13 * (1 - np.arange(1, exits + 1) / exits) ** 1.5

    def measured(eagerness: float) -> Measured:
        return along(eagerness if exits > 1 else 0.0, macs, accuracy, no_exit_macs)

    def point(
        label: str,
        kind: Any,
        target: float | None,
        eagerness: float,
        proof: Certificate | None,
        note: str | None = None,
    ) -> OperatingPoint:
        thresholds = [0.91 - 0.1 * eagerness] * (exits - 1) if eagerness else [None] * (exits - 1)
        return OperatingPoint(
            name=label, kind=kind, target=target, thresholds=thresholds, certificate=proof, note=note,
            tune=measured(eagerness), test=measured(eagerness),
        )  # fmt: skip

    points = [
        point("no-exit", "no-exit", None, 0, None),
        *([point("risk-1", "risk", 0.01, 0.45, certificate())] if certified else []),
        point("budget-60", "budget", 0.6, 0.62, None, "a budget, not certified"),
    ]
    left_out = [
        LeftOut(
            name=f"risk-{100 * risk:g}",
            target=risk,
            images_needed=4_605,
            note=f"2,500 certify images cannot prove {100 * risk:g} % at 90 % confidence: at least 4,605 would be needed",
        )
        for risk in ((0.0005,) if certified else (0.01, 0.0005))
    ]
    bins = Reliability(
        count=[0, 0, 3, 40, 2457], confidence=[0, 0, 0.45, 0.72, 0.97], accuracy=[0, 0, 0.4, 0.7, 0.95]
    )
    several = exits > 1
    path = [measured(float(eagerness)) for eagerness in np.linspace(0, 1, 60)]
    return Arm(
        role="teacher" if name == "teacher" else "fixed" if exits == 1 else "student",
        loss=name if name in ("erde", "kd") else "ce",
        backbone=BACKBONES.get(name, "resnet20"),
        head="erde" if exits > 1 else "none",
        parameters=272_474 + 10_250 * exits,
        no_exit_macs=no_exit_macs,
        no_exit_parameters=272_474,
        cost=[
            ExitCost(name=f"layer{place + 1}.2", macs=int(cost), parameters=90_000 * (place + 1))
            for place, cost in enumerate(macs)
        ],
        exits=[
            ExitMeasures(
                accuracy=float(rate), accuracy_interval=wilson(float(rate)), nll=1.3 - float(rate),
                brier=0.4321, ece=0.0123, auroc_correctness=0.87, auroc_harm=0.91 if place < exits - 1 else None,
                temperature=1.31, answered=1 / exits, answered_accuracy=0.93, reliability=bins,
            )
            for place, rate in enumerate(accuracy)
        ],
        score="margin",
        sharpness=1.4,
        ensemble="none",
        score_candidates=[
            ScoreCandidate(score=score, sharpness=sharpness, macs_saved=saved - 0.02 * abs(np.log(sharpness / 1.4)))
            for score, saved in (("entropy", 0.2), ("max_probability", 0.21), ("margin", 0.22))
            for sharpness in (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
        ],
        score_outcomes=[
            ScoreOutcome(
                score=score, sharpness=sharpness, ensemble="none", target=target, tune_macs_saved=0.2 + target,
                test_macs_saved=saved + target, test_risk=risk * target, test_accuracy=quality,
            )
            for target in (0.005, 0.01, 0.02)
            for score, sharpness, saved, risk in (("entropy", 1.0, 0.18, 1.17), ("margin", 1.4, 0.21, 0.9))
        ]
        if several
        else [],
        operating_points=points,
        default_operating_point="risk-1" if certified else "no-exit",
        left_out=left_out if several else [],
        curve=curve(path, 0.7012),
        paper_curve=curve(path[::2], 0.6923) if several else None,
        oracle=Oracle(accuracy=quality + 0.09, macs=0.4 * no_exit_macs),
        classes=[
            ClassMeasures(
                images=625, no_exit_accuracy=quality, accuracy=quality - drop, drop=drop, exit_rates=[1 / exits] * exits
            )
            for drop in (0.0, 0.004, 0.0352, -0.008, 0.001)
        ],
        entropies=EntropyHistograms(
            teacher_right=[[90, 10, *[0] * 17, 0]] * exits, teacher_wrong=[[0] * 10 + [50] + [0] * 9] * exits
        )
        if name != "teacher"
        else None,
        teacher_wrong=np.linspace(0.21, 0.08, exits).tolist() if name in ("erde", "kd") else None,
        history=[
            Epoch(
                epoch=epoch, phase="backbone" if epoch < 4 else "joint", learning_rate=0.1 * 0.9**epoch,
                parts={"loss": 4.1 * 0.88**epoch + 0.2 + quality / 4}
                | {part: [0.1 + epoch / 7] * exits for part in ("ce", "kl", "entropy", "teacher_wrong")},
            )
            for epoch in range(30)
        ],
    )  # fmt: skip


def make_results(
    exits: int = 3, names: tuple[str, ...] = ARMS, certified: bool = True, **changes: Any
) -> Results:
    qualities = {"teacher": 0.78, "erde": 0.716, "kd": 0.709, "ce": 0.69}
    exported = "erde" if "erde" in names else names[0]
    values: dict[str, Any] = {
        "name": "cifar10-resnet20",
        "seed": 3,
        "exported_arm": exported,
        "recipe": {"name": "cifar10-resnet20", "train": {"epochs": 30, "learning_rate": 0.1}},
        "data": DataInfo(
            name="cifar10", classes=["airplane", "automobile", "bird", "cat", "deer"], image_shape=(32, 32, 3),
            mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616],
            splits={
                name: SplitInfo(size=size, fingerprint=f"{place:x}" * 64)
                for place, (name, size) in enumerate(
                    {"train": 45_000, "tune": 2_500, "certify": 2_500, "test": 10_000}.items()
                )
            },
        ),
        "arms": {name: make_arm(name, exits, certified, qualities.get(name, 0.67)) for name in names},
        "comparisons": [compared(names[0], other, 0.0234) for other in names[1:]],
        "agreement": Agreement(
            images=10_000, operating_points=["no-exit", "risk-1"], disagreements=0, torch_disagreements=0,
            band=2, band_width=1e-5,
        ),
        "bundle_seal": "5ea1" * 16,
        "environment": {"versions": {"numpy": "2.1.0", "torch": "2.11.0"}, "cpus": 2, "memory_gib": 15.512345678, "gpu": None},
        "timings": {"phase_seconds": {"train": 1234.5678}, "training": {"erde": {"seconds": 98.76}}},
    }  # fmt: skip
    return Results(**(values | changes))


VOID = {"br", "img", "input", "link", "meta"}


class Page(HTMLParser):
    """Text, attributes and scripts of a page, as a browser would read them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = [("", {}, [])]
        self._elements = list(self._open)
        self.feed(source)
        self.text = _joined(self._elements[0][2])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in ("script", "style"):
            (self.scripts if tag == "script" else self.styles).append("")
        if tag not in VOID:
            self._open.append((tag, {name: value or "" for name, value in attrs}, []))
            self._elements.append(self._open[-1])

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1][0] == tag, f"</{tag}> closes <{self._open[-1][0]}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        match self._open[-1][0]:
            case "script":
                self.scripts[-1] += data
            case "style":
                self.styles[-1] += data
            case _:
                for _, _, words in self._open:
                    words.append(data)

    def parts(self, **attributes: str | None) -> list[str]:
        """Texts of the elements with these attributes (``data_arm`` is ``data-arm``); None stands for any value."""
        asked = {name.strip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [
            _joined(words)
            for _, known, words in self._elements
            if all(name in known and value in (None, known[name]) for name, value in asked.items())
        ]

    def part(self, **attributes: str | None) -> str:
        """The text of the only element with these attributes."""
        (text,) = self.parts(**attributes)
        return text

    def values(self, name: str) -> list[str]:
        """The values of an attribute, in the order of the page."""
        return [value for _, known, value in self.attributes if known == name]


def _joined(words: list[str]) -> str:
    return re.sub(r"\s+", " ", " ".join(words)).strip()


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed: nothing to draw the page with"
)


# The page's clock runs ahead of its frames on a busy machine: what a frame brings is waited for, not timed.
UNTIL = """
function until(ready, then, tries = 100) {
  if (ready() || tries === 0) then(); else setTimeout(() => until(ready, then, tries - 1), 50);
}
"""


def browse(tmp_path: Path, source: str, *more: str, fragment: str = "", then: str = "") -> str:
    """The page's DOM after its scripts ran, and then ``then``; errors are noted on its root element."""
    note = "window.onerror = (m) => { document.documentElement.dataset.failed = m; };"
    note += "window.onunhandledrejection = (e) => window.onerror(String(e.reason));"
    note += (
        "document.addEventListener('securitypolicyviolation', (e) => window.onerror(e.violatedDirective));"
    )
    # What a test does on the page comes after the figures are there.
    act = f"{UNTIL}setTimeout(() => {{ {then} }}, 1500);" if then else ""
    page = tmp_path / "page.html"
    before, end, after = source.replace("<title>", f"<script>{note}</script><title>", 1).rpartition("</body>")
    page.write_text(f"{before}<script>{act}</script>{end}{after}", encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,900", "--virtual-time-budget=8000",
        *more, "--dump-dom", page.as_uri() + fragment,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def root_of(dom: str) -> str:
    """The opening tag of a DOM."""
    return dom[dom.index("<html") : dom.index(">", dom.index("<html"))]
