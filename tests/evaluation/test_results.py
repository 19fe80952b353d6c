from __future__ import annotations

import json
from pathlib import Path

import pytest

from erde.evaluation.results import SCHEMA_FILE, Quantised, Results, RuntimeAgreement, schema_text
from tests.helpers.checks import user_error
from tests.helpers.pages import make_results

QUANTISED = Quantised(
    arm="erde-int8",
    bundle_seal="5ea2" * 16,
    agreement=RuntimeAgreement(
        images=10_000, operating_points=["no-exit"], disagreements=0, band=3, band_width=1e-5
    ),
    kept_in_float=["first"],
    tune_images=2_500,
    fp32_tune_accuracy=[0.6, 0.7],
    tune_accuracy=[0.601, 0.698],
    label_agreement=[0.98, 0.99],
    fp32_bytes=500_000,
    bytes=170_000,
)


def test_the_shipped_schema_is_that_of_the_types() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text()


@pytest.mark.parametrize("quantised", [None, QUANTISED])
def test_results_come_back(quantised: Quantised | None, tmp_path: Path) -> None:
    results = make_results(quantised=quantised)
    results.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results


def test_a_file_from_before_int8_is_read(tmp_path: Path) -> None:
    results = make_results()
    value = results.model_dump(mode="json")
    assert value.pop("quantised") is None
    for arm in value["arms"].values():
        assert arm.pop("precision") == "fp32"
    path = tmp_path / "results.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    assert Results.read(path) == results


@pytest.mark.parametrize("change", [{"quantised": {}}, {"format_version": 3}, {"new": 1}])
def test_another_file_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**make_results().model_dump(mode="json"), **change}), encoding="utf-8")
    with user_error("is not a results file of this erde"):
        Results.read(path)
