"""The comparison page: runs side by side, honest about seeds, test images and recipes."""

from __future__ import annotations

import html
import json
import re
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from erde.evaluation.results import Cascade, CascadeFront, Results, RuntimeAgreement
from erde.report import compare_page
from erde.report.compare_page import render_comparison, seed_groups, write_comparison
from tests.helpers.browser import browsing
from tests.helpers.pages import Page, browse, compared, make_results, needs_browser, root_of

RECIPE: dict[str, Any] = {
    "name": "a",
    "train": {"epochs": 30, "milestones": [0.5, 0.75]},
    "arms": {"erde": {"loss": "erde"}},
}
NAMES = ("erde", "kd", "fixed-small")


def run(seed: int = 0, shift: float = 0.0, **changes: Any) -> Results:
    """A run whose arms are all better by ``shift``, the second one twice as much."""
    results = make_results(names=NAMES, seed=seed, recipe={**RECIPE, "seed": seed}, **changes)
    arms = {}
    for place, (name, arm) in enumerate(results.arms.items()):
        gain = (2 if place == 1 else 1) * shift
        points = [
            point.model_copy(
                update={"test": point.test.model_copy(update={"accuracy": point.test.accuracy + gain})}
            )
            for point in arm.operating_points
            if point.test is not None
        ]
        arms[name] = arm.model_copy(update={"operating_points": points})
    return results.model_copy(update={"arms": arms})


def accuracies(runs: dict[str, Results], arm: str) -> list[float]:
    tests = [results.arms[arm].default_point().test for results in runs.values()]
    return [test.accuracy for test in tests if test is not None]


@pytest.fixture(scope="module")
def seeds() -> dict[str, Results]:
    return {"runs/a": run(0), "runs/b": run(1, 0.006), "runs/c": run(2, 0.009)}


def with_other_images(results: Results, mark: str = "f" * 64) -> Results:
    splits = results.data.splits | {
        "test": results.data.splits["test"].model_copy(update={"fingerprint": mark})
    }
    return results.model_copy(update={"data": results.data.model_copy(update={"splits": splits})})


def test_runs_that_differ_by_seed_or_name_only_are_one_group(seeds: dict[str, Results]) -> None:
    other = run(0).model_copy(update={"recipe": {**RECIPE, "seed": 0, "train": {"epochs": 31}}})
    renamed = run(3).model_copy(update={"recipe": {**RECIPE, "seed": 3, "name": "b"}})
    groups = seed_groups({**seeds, "other": other, "renamed": renamed})
    assert [group.runs for group in groups] == [("runs/a", "runs/b", "runs/c", "renamed"), ("other",)]
    assert [group.label for group in groups] == ["runs/a and 3 more", "other"]


def test_runs_of_two_machines_are_of_one_recipe(seeds: dict[str, Results]) -> None:
    elsewhere = {
        **RECIPE, "seed": 4, "device": "cuda", "threads": 8, "data": {"workers": 8, "memory_limit_gib": 1},
        "teacher": {"cache": "/mnt/cache"}, "train": {**RECIPE["train"], "tensorboard": True, "together": True},
    }  # fmt: skip
    here = {**RECIPE, "seed": 5, "data": {}, "teacher": {}}
    runs = {
        name: run(seed).model_copy(update={"recipe": recipe})
        for name, seed, recipe in (("a", 4, elsewhere), ("b", 5, here))
    }
    assert [group.runs for group in seed_groups(runs)] == [("a", "b")]


def test_mean_and_spread_over_seeds(seeds: dict[str, Results]) -> None:
    page = Page(render_comparison(seeds))
    assert page.values("data-recipes") == ["1"]
    assert "seeds 0, 1, 2" in page.part(id="seeds")
    for name in ("erde", "kd"):
        shares = accuracies(seeds, name)
        row = page.part(data_spread=name)
        assert row.startswith(f"{name} {100 * mean(shares):.2f} ± {100 * stdev(shares):.2f} ")
    # One certified point each, and each kept its promise: 0.61 % seen, 1 % promised.
    assert page.part(data_spread="erde").endswith(" 3 of 3")


def test_differences_over_seeds_are_paired_and_hold_a_t_interval(seeds: dict[str, Results]) -> None:
    page = Page(render_comparison(seeds))
    gaps = [a - b for a, b in zip(accuracies(seeds, "erde"), accuracies(seeds, "kd"), strict=True)]
    # 4.3027: the 97.5 % quantile of Student's t with two degrees of freedom.
    half = 4.302652729911275 * stdev(gaps) / 3**0.5
    values = f"{100 * mean(gaps):+.2f} {100 * (mean(gaps) - half):+.2f} to {100 * (mean(gaps) + half):+.2f}"
    rows = page.parts(data_first="erde", data_second="kd")
    assert rows[0].startswith(f"erde – kd {values}".replace("-", "−"))
    # Pairs without the exported arm come last, folded.
    assert page.part(id="seeds").index("erde – fixed-small") < page.part(id="seeds").index("kd – fixed-small")
    assert any("kd – fixed-small" in text for text in page.parts(class_="table")[2:])


def test_the_same_difference_in_all_seeds_has_no_interval() -> None:
    same = {f"runs/{seed}": run(0).model_copy(update={"recipe": {**RECIPE, "seed": seed}}) for seed in (0, 1)}
    gap = accuracies(same, "erde")[0] - accuracies(same, "kd")[0]
    row = Page(render_comparison(same)).parts(data_first="erde", data_second="kd")[0]
    assert re.match(rf"erde – kd {100 * gap:+.2f} [^ ]+ [^ ]+$".replace("-", "−").replace("+", r"\+", 1), row)


def test_without_two_seeds_there_is_no_spread() -> None:
    other = run(0).model_copy(update={"recipe": {**RECIPE, "train": {"epochs": 31}}})
    page = Page(render_comparison({"a": run(0), "b": other}))
    assert page.values("data-spread") == ["none"]
    assert page.values("data-recipes") == ["2"]


def test_every_arm_of_every_run_is_in_the_matrix() -> None:
    bare = make_results(names=("ce", "fixed-small"), exported_arm="ce", recipe=RECIPE)
    page = Page(render_comparison({"a": run(0), "b": bare}))
    # The exported arms come first; a dash where a run has no such arm.
    assert page.values("data-arm") == ["erde", "ce", "kd", "fixed-small"]
    assert re.fullmatch(r"erde 7[\d.]+ [\d.]+.% saved –", page.part(data_arm="erde"))
    assert re.fullmatch(r"ce – 6[\d.]+ [\d.]+.% saved", page.part(data_arm="ce"))
    assert re.fullmatch(r"fixed-small ([\d.]+) 22.4 M MACs \1 22.4 M MACs", page.part(data_arm="fixed-small"))


def test_chains_with_the_teacher_are_listed_where_there_are_any(seeds: dict[str, Results]) -> None:
    assert Page(render_comparison(seeds)).parts(id="chains") == []
    points = seeds["runs/a"].arms["kd"].operating_points
    front = CascadeFront(
        exit_names=[], exit_macs=[], score="margin", operating_points=points,
        default_operating_point=points[-1].name, left_out=[],
    )  # fmt: skip
    agreement = RuntimeAgreement(images=1, operating_points=[], disagreements=0, band=0, band_width=0)
    chain = Cascade(
        fallback="teacher",
        front="kd",
        bundle_seal="",
        agreement=agreement,
        no_exit_macs=9,
        fronts={"kd": front},
    )
    page = Page(render_comparison({**seeds, "runs/b": seeds["runs/b"].model_copy(update={"cascade": chain})}))
    test = points[-1].test
    assert test is not None
    (row,) = page.parts(data_chains="kd")
    assert re.fullmatch(
        rf"kd runs/b – {100 * test.risk:.2f} {100 * test.accuracy:.1f} .*{100 * test.macs_saved:.1f}", row
    )


def test_paired_comparisons_are_shown_with_their_runs(seeds: dict[str, Results]) -> None:
    given = [
        compared("runs/a/erde", "runs/b/erde", 0.0234),
        compared("runs/a/erde", "runs/b/erde", 0.001, "no-exit"),
    ]
    page = Page(render_comparison(seeds, given))
    default, no_exit = page.parts(data_first="runs/a/erde", data_second="runs/b/erde")
    assert default.startswith("runs/a/erde – runs/b/erde +2.34 +1.34 to +3.34 ")
    assert default.endswith("runs/a/erde is better")
    assert "better" not in no_exit
    assert page.values("data-within") == list(seeds)
    assert page.parts(data_comparisons="none") == []
    assert len(Page(render_comparison(seeds)).parts(data_comparisons="none")) == 1


def test_different_test_images_and_data_sets_are_noted(seeds: dict[str, Results]) -> None:
    assert Page(render_comparison(seeds)).values("data-note") == ["same-images"]
    page = Page(render_comparison({**seeds, "d": with_other_images(run(3))}))
    assert page.values("data-note") == ["test-images"]
    assert "(runs/a, runs/b, runs/c (333333333333); d (ffffffffffff))" in page.part(data_note="test-images")
    other = run(0)
    other = other.model_copy(update={"data": other.data.model_copy(update={"name": "svhn"})})
    page = Page(render_comparison({"a": run(0), "b": other}))
    assert page.values("data-note") == ["data-sets"]
    assert "(cifar10: a; svhn: b)" in page.part(data_note="data-sets")


def test_differences_between_recipes_are_listed_and_nothing_else() -> None:
    recipe = {**RECIPE, "seed": 1, "train": {"epochs": 31, "milestones": [0.6]}, "more": {"x": True}}
    page = Page(render_comparison({"a": run(0), "b": run(1).model_copy(update={"recipe": recipe})}))
    rows = {key: page.part(data_key=key) for key in page.values("data-key")}
    assert rows == {
        "train.epochs": "train.epochs 30 31",
        "train.milestones": "train.milestones [0.5, 0.75] [0.6]",
        "seed": "seed 0 1",
        "more.x": "more.x – True",
    }
    assert Page(render_comparison({"a": run(0), "b": run(0)})).values("data-key") == ["none"]


def test_many_runs_stay_small(tmp_path: Path) -> None:
    results = run(0)
    curve = results.arms["erde"].curve
    long = curve.model_copy(
        update={key: getattr(curve, key) * 3 for key in ("macs", "accuracy", "risk", "exit_rates")}
    )
    arms = {
        name: arm.model_copy(update={"curve": long, "paper_curve": long})
        for name, arm in results.arms.items()
    }
    many = {f"run-{seed}": results.model_copy(update={"arms": arms, "seed": seed}) for seed in range(60)}
    write_comparison(many, tmp_path / "comparison.html")
    assert (tmp_path / "comparison.html").stat().st_size < 3_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.html"]


def test_thinned_curves_keep_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_page, "MAX_POINTS", 100)
    results = run(0)
    data = json.loads(Page(render_comparison({"a": results})).scripts[1])
    drawn = next(series for series in data["series"] if series["arm"] == "erde")["lines"][0]["curve"]["macs"]
    whole = results.arms["erde"].curve.macs
    assert 10 < len(drawn) < 30
    assert drawn[0] == pytest.approx(whole[0], rel=1e-6)
    assert drawn[-1] == pytest.approx(whole[-1], rel=1e-6)


HOSTILE = '</script><script>document.documentElement.dataset.broken="yes"</script><img src=x onerror=boom()><b>bold</b>&"\''


def hostile_runs() -> dict[str, Results]:
    """The same hostile text as run, arm, class, data set, recipe and score."""
    results = run(0)
    arm = results.arms["erde"].model_copy(update={"score": HOSTILE})
    data = results.data.model_copy(update={"name": HOSTILE, "classes": [HOSTILE]})
    changes = {
        "arms": {HOSTILE: arm, "kd": results.arms["kd"]}, "exported_arm": HOSTILE, "name": HOSTILE, "data": data,
        "recipe": {HOSTILE: HOSTILE}, "bundle_seal": HOSTILE, "comparisons": [compared(HOSTILE, "kd", 0.1)],
    }  # fmt: skip
    return {HOSTILE: results.model_copy(update=changes), "b": with_other_images(run(1), HOSTILE)}


def test_text_from_the_data_stays_text() -> None:
    source = render_comparison(hostile_runs(), [compared(f"{HOSTILE}/{HOSTILE}", "b/erde", 0.1)])
    page = Page(source)
    assert len(page.scripts) == 3
    assert "img" not in page.tags
    assert not [attribute for attribute in page.attributes if attribute[1].startswith("on")]
    assert HOSTILE not in source.replace(html.escape(HOSTILE), "")
    assert page.text.count("onerror=boom()><b>bold</b>") > 10


def test_nothing_is_loaded_from_elsewhere(seeds: dict[str, Results]) -> None:
    page = Page(render_comparison(seeds))
    targets = [value for _, name, value in page.attributes if name in {"src", "href", "srcset", "action"}]
    assert targets
    assert all(value.startswith("#") for value in targets)
    assert not re.search(r"https?://|@import|url\(", "".join(page.styles + page.scripts[1:]))
    policy = next(value for tag, _, value in page.attributes if tag == "meta" and "default-src" in value)
    assert policy.startswith("default-src 'none';")
    assert page.tags.count("table") == page.tags.count("caption")


@needs_browser
def test_a_browser_draws_the_arms_that_are_chosen(tmp_path: Path, seeds: dict[str, Results]) -> None:
    count = (
        "const place = document.getElementById('plot-tradeoff'), names = () => place.data.length;"
        "const found = [names()], boxes = document.querySelectorAll('#choose-arms input');"
        "const next = (what, after) => { what.click(); setTimeout(() => { found.push(names()); after(); }, 400); };"
        "next(boxes[1], () => next(document.getElementById('choose-paper'), () => {"
        "  document.documentElement.dataset.traces = found.join(' '); }));"
    )
    dom = browse(tmp_path, render_comparison(seeds), then=count)
    root = root_of(dom)
    assert 'data-drawn="yes"' in root
    assert "data-failed" not in root
    # Three lines of erde, three of the paper's rule, markers, the points of fixed-small; then kd too; then
    # without the paper's rule.
    assert 'data-traces="8 15 9"' in root
    boxes = re.findall(r'<label><input type="checkbox">([\w-]+)</label>', dom)
    assert boxes == ["erde", "kd", "fixed-small"]


LEGEND = """(() => {
  const place = document.getElementById("plot-tradeoff"), box = (kind) => place.querySelector(kind).getBoundingClientRect();
  const rows = [...place.querySelectorAll(".legend .traces")].map((row) => Math.round(row.getBoundingClientRect().top));
  return { rows: new Set(rows).size, bottom: box(".legend").bottom, top: box(".nsewdrag").top, plot: box(".nsewdrag").height,
    dashes: place.data.filter((trace) => trace.mode === "lines").map((trace) => [trace.line.width, trace.line.dash]) };
})()"""


@needs_browser
def test_on_screens_of_any_width_the_legend_stands_above_the_plot(
    tmp_path: Path, seeds: dict[str, Results]
) -> None:
    other = {**RECIPE, "train": {"epochs": 31}}
    runs = {**seeds, "runs/other": run(3).model_copy(update={"recipe": {**other, "seed": 3}})}
    (tmp_path / "page.html").write_text(render_comparison(runs), "utf-8")
    with browsing(tmp_path) as browser:
        browser.look(390)
        browser.open((tmp_path / "page.html").as_uri())
        browser.until("document.documentElement.dataset.drawn")
        browser.read("document.querySelectorAll('#choose-arms input')[1].click()")
        browser.until("document.querySelectorAll('#plot-tradeoff .legend .traces').length >= 4")
        legend = browser.read(LEGEND)
        # A screen that is turned, and turned back.
        turned = []
        for width in (1280, 390):
            browser.look(width)
            time.sleep(1.5)
            turned.append(browser.read(LEGEND))
    assert legend["rows"] == turned[1]["rows"] > turned[0]["rows"] >= 2
    for drawn in (legend, *turned):
        assert drawn["bottom"] <= drawn["top"]
        assert drawn["plot"] > 200
    # Dotted, and thin, is the paper's rule; of the arms none is.
    assert {width for width, dash in legend["dashes"] if dash == "dot"} == {1}
    assert "dot" not in {dash for width, dash in legend["dashes"] if width > 1}


@needs_browser
def test_a_browser_runs_nothing_from_the_data(tmp_path: Path) -> None:
    dom = browse(tmp_path, render_comparison(hostile_runs()))
    assert 'data-drawn="yes"' in root_of(dom)
    assert "data-failed" not in root_of(dom)
    assert "data-broken" not in root_of(dom)
    assert re.search(r"<img", re.sub(r'"[^"]*"', '""', dom)) is None
