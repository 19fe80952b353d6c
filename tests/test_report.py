"""The report: all that it must say, safely, in one file that a browser draws without the network."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erde.bundle import Certificate, Measured, OperatingPoint, ScoreCandidate
from erde.report import render, write_report
from erde.results import (
    Agreement,
    Arm,
    Curve,
    DataInfo,
    Epoch,
    ExitCost,
    ExitMeasures,
    Results,
    SplitInfo,
)

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
        max_risk=max_risk, confidence=0.9, images=CERTIFY_IMAGES, errors=17, risk=17 / CERTIFY_IMAGES,
        upper_bound=0.0096, reference="final_exit", method="exact binomial bound",
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
        macs=mean, macs_saved=1 - mean / no_exit_macs, exit_rates=rates,
    )  # fmt: skip


def make_arm(name: str, exits: int, certified: bool, quality: float) -> Arm:
    exits = 1 if name.startswith("fixed") else exits
    no_exit_macs = NO_EXIT_MACS.get(name, 41_000_000)
    macs = no_exit_macs * (np.linspace(0.3, 1.0, exits) if exits > 1 else np.ones(1)) + 100_000 * (exits > 1)
    accuracy = quality - 0.13 * (1 - np.arange(1, exits + 1) / exits) ** 1.5

    def measured(eagerness: float) -> Measured:
        return along(eagerness if exits > 1 else 0.0, macs, accuracy, no_exit_macs)

    def point(
        label: str, kind: Any, target: float | None, eagerness: float, proof: Certificate | None, note=None
    ):
        thresholds = [0.91 - 0.1 * eagerness] * (exits - 1) if eagerness else [None] * (exits - 1)
        return OperatingPoint(
            name=label, kind=kind, target=target, thresholds=thresholds, certificate=proof, note=note,
            tune=measured(eagerness), test=measured(eagerness),
        )  # fmt: skip

    missing = "not certified, so no early exit: 2,500 certify images cannot prove a risk of 0.05 % at 90 % confidence"
    points = [
        point("no-exit", "no-exit", None, 0, None),
        point("risk-1", "risk", 0.01, 0.45, certificate())
        if certified
        else point("risk-1", "risk", 0.01, 0, None, missing),
        point("risk-0.05", "risk", 0.0005, 0, None, missing),
        point("budget-60", "budget", 0.6, 0.62, None, "a budget, not certified"),
    ]
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
            ExitCost(name=f"layer{place + 1}.2", macs=int(one), parameters=90_000 * (place + 1))
            for place, one in enumerate(macs)
        ],
        exits=[
            ExitMeasures(
                accuracy=float(one), accuracy_interval=wilson(float(one)), nll=1.3 - float(one), ece=0.0123,
                auroc_correctness=0.87, auroc_harm=0.91 if place < exits - 1 else None, temperature=1.31,
            )
            for place, one in enumerate(accuracy)
        ],
        score="margin",
        sharpness=1.4,
        score_candidates=[
            ScoreCandidate(score=score, sharpness=sharpness, macs_saved=saved - 0.02 * abs(np.log(sharpness / 1.4)))
            for score, saved in (("entropy", 0.2), ("max_probability", 0.21), ("margin", 0.22))
            for sharpness in (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
        ],
        operating_points=points,
        default_operating_point="risk-1",
        curve=Curve(
            macs=[one.macs for one in path], accuracy=[one.accuracy for one in path],
            risk=[one.risk for one in path], exit_rates=[one.exit_rates for one in path],
        ),
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
            name="cifar10", classes=["airplane", "automobile", "bird", "cat"], image_shape=(32, 32, 3),
            mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616],
            splits={
                name: SplitInfo(size=size, fingerprint=f"{place:x}" * 64)
                for place, (name, size) in enumerate(
                    {"train": 45_000, "tune": 2_500, "certify": 2_500, "test": 10_000}.items()
                )
            },
        ),
        "arms": {name: make_arm(name, exits, certified, qualities.get(name, 0.67)) for name in names},
        "agreement": Agreement(
            images=10_000, operating_points=["no-exit", "risk-1"], disagreements=0, torch_disagreements=0,
            band=2, band_width=1e-5,
        ),
        "bundle_seal": "5ea1" * 16,
        "environment": {"versions": {"numpy": "2.1.0", "torch": "2.11.0"}, "cpus": 2, "memory_gib": 15.512345678, "gpu": None},
        "timings": {"phase_seconds": {"train": 1234.5678}, "training": {"erde": {"seconds": 98.76}}},
    }  # fmt: skip
    return Results(**(values | changes))


class Page(HTMLParser):
    """Text, attributes and scripts of a page, as a browser would read them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.words: list[str] = []
        self._open = ""
        self.feed(source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open == "style":
            self.styles.append(data)
        else:
            self.words.append(data)


@pytest.fixture(scope="module")
def results() -> Results:
    return make_results()


@pytest.fixture(scope="module")
def page(results: Results) -> Page:
    return Page(render(results))


def test_verdict_and_certificate_come_first(results: Results, page: Page) -> None:
    point = results.arms["erde"].operating_points[1]
    assert point.test is not None
    assert point.certificate is not None
    share = f"{100 * point.test.accuracy:.1f} % of the test images right at {100 - 100 * point.test.macs_saved:.0f} %"
    assert f"The erde student answers {share} of the MACs of the same network without exits" in page.text
    assert "(the final exit alone gets 71.6 %)" in page.text
    sentence = page.text.index(point.certificate.sentence())
    assert page.text.index(share) < sentence < page.text.index("Accuracy against MACs")
    assert "Images in use are drawn like those of the certify split." in page.text


def test_verdict_names_the_same_network_without_exits_where_it_was_trained() -> None:
    plain = make_arm("fixed-full", 1, certified=True, quality=0.722)
    arms = make_results().arms | {"fixed-full": plain}
    assert "(that network, arm fixed-full, gets 72.2 %)" in Page(render(make_results(arms=arms))).text


def test_without_certificate_it_says_so_and_why() -> None:
    text = Page(render(make_results(certified=False))).text
    assert "No certificate. Operating point risk-1: not certified" in text
    assert "2,500 certify images cannot prove a risk of 0.05 % at 90 % confidence" in text
    assert "There is no early exit here: every image goes to the final exit." in text
    assert "With 90 % confidence" not in text


def test_every_arm_point_and_exit_is_in_a_table(results: Results, page: Page) -> None:
    for name, arm in results.arms.items():
        assert name in page.text
        if len(arm.exits) > 1:
            assert f"Operating points of {name}" in page.text
        for point in arm.operating_points:
            assert point.name in page.text
        for cost in arm.cost:
            assert cost.name in page.text
            assert f"{cost.parameters:,}" in page.text
    assert page.tags.count("table") == page.tags.count("caption")
    assert "off, off" in page.text
    assert {value for _, name, value in page.attributes if name == "scope"} == {"col", "row", "rowgroup"}


def test_numbers_have_sane_digits(page: Page) -> None:
    shown = re.sub(r"0\.0005|[0-9a-f]{12,}", "", page.text)
    assert re.findall(r"\d\.\d{5,}", shown) == []
    assert "1,234.6 s" in page.text
    assert "71.6 69.8 to 73.4" in page.text


def test_risk_above_the_promise_is_marked() -> None:
    results = make_results(names=("erde",))
    arm = results.arms["erde"]
    point = arm.operating_points[1]
    assert point.test is not None
    worse = point.model_copy(update={"test": point.test.model_copy(update={"risk": 0.0123})})
    changed = arm.model_copy(update={"operating_points": [arm.operating_points[0], worse]})
    assert "1.23 above the promise" in Page(render(make_results(arms={"erde": changed}))).text
    assert "above the promise" not in Page(render(results)).text


def test_agreement_is_stated_both_ways() -> None:
    agreed = Page(render(make_results())).text
    assert (
        "The torch-free runtime agreed with this evaluation on 10,000 of 10,000 test images; 2 lie within 1e-05"
        in agreed
    )
    broken = make_results().agreement.model_copy(update={"disagreements": 7})
    text = Page(render(make_results(agreement=broken))).text
    assert "The torch-free runtime disagreed with this evaluation on 7 of 20,000 answers" in text


HOSTILE = '</script><script>document.documentElement.dataset.broken="yes"</script><img src=x onerror=boom()><b>bold</b>&"\''


def hostile_results() -> Results:
    """The same hostile text wherever a text can stand."""
    results = make_results(names=("teacher", "erde"))
    arm = results.arms["erde"]
    texts = {"name": HOSTILE, "note": HOSTILE, "certificate": None}
    points = [arm.operating_points[0], arm.operating_points[1].model_copy(update=texts)]
    costs = [cost.model_copy(update={"name": HOSTILE}) for cost in arm.cost]
    changed = arm.model_copy(
        update={"operating_points": points, "default_operating_point": HOSTILE, "cost": costs, "loss": HOSTILE,
                "backbone": HOSTILE, "score": HOSTILE}
    )  # fmt: skip
    split = SplitInfo(size=1, fingerprint=HOSTILE)
    data = results.data.model_copy(
        update={"name": HOSTILE, "classes": [HOSTILE, "b"], "splits": {HOSTILE: split}}
    )
    return make_results(
        name=HOSTILE, exported_arm=HOSTILE, recipe={HOSTILE: HOSTILE}, data=data, bundle_seal=HOSTILE,
        environment={HOSTILE: HOSTILE}, timings={HOSTILE: 1.0},
        agreement=results.agreement.model_copy(update={"operating_points": [HOSTILE]}),
    ).model_copy(update={"arms": {"teacher": results.arms["teacher"], HOSTILE: changed}})  # fmt: skip


def test_text_from_the_data_stays_text() -> None:
    source = render(hostile_results())
    clean, page = Page(render(make_results())), Page(source)
    assert len(page.scripts) == len(clean.scripts) == 3
    assert "img" not in page.tags
    assert not [one for one in page.attributes if one[1].startswith("on")]
    assert HOSTILE not in source.replace(html.escape(HOSTILE), "")
    assert json.loads(page.scripts[1])["exported"] == HOSTILE
    assert page.text.count("onerror=boom()><b>bold</b>") > 20


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    loading = {"src", "href", "srcset", "data", "action", "poster", "background", "formaction"}
    targets = [value for _, name, value in page.attributes if name in loading]
    assert targets
    assert all(value.startswith("#") for value in targets)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    ours = page.styles + page.scripts[1:]
    assert not re.search(r"https?://|@import|url\(", "".join(ours))
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value)
    assert policy.startswith("default-src 'none';")


def test_size_with_long_histories_and_many_exits(tmp_path: Path) -> None:
    results = make_results(exits=8)
    arms = {name: arm.model_copy(update={"history": arm.history * 20}) for name, arm in results.arms.items()}
    write_report(results.model_copy(update={"arms": arms}), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 6_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("exits", [2, 5, 8])
def test_one_arm_alone_with_any_number_of_exits(exits: int) -> None:
    text = Page(render(make_results(exits=exits, names=("ce",)))).text
    assert f"layer{exits}.2" in text
    assert f"exit {exits - 1}" in text
    assert "No arm of this run recorded it." in text


def test_unmeasured_points_are_dashes() -> None:
    arm = make_arm("kd", 3, certified=True, quality=0.7)
    bare = [point.model_copy(update={"test": None, "tune": None}) for point in arm.operating_points]
    arms = {"kd": arm.model_copy(update={"operating_points": bare, "score_candidates": [], "history": []})}
    text = Page(render(make_results(exported_arm="kd", arms=arms))).text
    assert "Arm kd was not measured on the test split." in text
    assert "not measured" in text


def browse(tmp_path: Path, source: str, *more: str) -> str:
    """The page's DOM after its scripts ran, with errors noted on its root element."""
    note = "window.onerror = (m) => { document.documentElement.dataset.failed = m; };"
    note += "window.onunhandledrejection = (e) => window.onerror(String(e.reason));"
    note += (
        "document.addEventListener('securitypolicyviolation', (e) => window.onerror(e.violatedDirective));"
    )
    page = tmp_path / "page.html"
    page.write_text(source.replace("<title>", f"<script>{note}</script><title>", 1), encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,900", "--virtual-time-budget=8000",
        *more, "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def drawn_traces(dom: str) -> dict[str, int]:
    """Scatter traces in each figure of a DOM."""
    figures = re.split(r'id="plot-', dom)[1:]
    return {one[: one.index('"')]: len(re.findall(r'class="trace scatter', one)) for one in figures}


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: nothing to draw the page with")
def test_a_browser_draws_every_figure(tmp_path: Path, results: Results) -> None:
    dom = browse(tmp_path, render(results))
    root = dom[dom.index("<html") : dom.index(">", dom.index("<html"))]
    assert 'data-drawn="yes"' in root
    assert "data-failed" not in root
    # Four arms with a line and markers, one single point; five arms; three scores; five histories.
    assert drawn_traces(dom) == {"tradeoff": 9, "exits": 5, "scores": 3, "history": 5}
    assert "erde without exits" in dom
    # Plotly would offer to send the chart to its own servers.
    assert 'data-title="Download plot' in dom
    assert 'data-title="Share' not in dom
    # The teacher is out of the first view, and the choice to see it is there.
    assert re.search(r'class="choices"[^>]*hidden', dom) is None


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: nothing to draw the page with")
def test_a_browser_runs_nothing_from_the_data(tmp_path: Path) -> None:
    dom = browse(tmp_path, render(hostile_results()))
    root = dom[dom.index("<html") : dom.index(">", dom.index("<html"))]
    assert 'data-drawn="yes"' in root
    assert "data-failed" not in root
    assert "data-broken" not in root
    assert re.search(r"<img[^>]*onerror", dom) is None
    # Plotly sets a few tags itself, <b> among them: the name has to be seen as it is.
    legends = re.findall(r'<text class="legendtext".*?</text>', dom, re.DOTALL)
    assert any(
        re.search(r">[^<>]*onerror=boom\(\)&gt;&lt;b&gt;bold&lt;/b&gt;[^<>]*<", one) for one in legends
    )
