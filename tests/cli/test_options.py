"""What the words of the command line mean."""

from __future__ import annotations

import pytest

from erde.calibration.settings import Settings
from erde.cli.options import parse_milliseconds, parse_share, settings_of
from tests.helpers.checks import user_error


@pytest.mark.parametrize(
    ("text", "share"), [("0.5%", 0.005), (" 1 %", 0.01), ("0.005", 0.005), ("99%", 0.99)]
)
def test_shares(text: str, share: float) -> None:
    assert parse_share(text, "--max-risk") == pytest.approx(share)


@pytest.mark.parametrize("text", ["0", "100%", "1", "-1%", "nan", "inf%"])
def test_shares_out_of_range(text: str) -> None:
    with user_error("--max-risk is '.*': expected more than 0 % and less than 100 %"):
        parse_share(text, "--max-risk")


def test_words_that_are_no_numbers() -> None:
    with user_error("--max-risk is 'low': expected a share such as 0.5% or 0.005"):
        parse_share("low", "--max-risk")
    with user_error("--latency-budget is 'fast': expected milliseconds such as 2ms"):
        parse_milliseconds("fast", "--latency-budget")
    assert parse_milliseconds("2.5ms", "--latency-budget") == 2.5
    settings = settings_of(
        {"max_risks": ["1%", "2%"], "confidence": "95%", "budgets": None, "latency_budgets": ["3ms"]}
    )
    assert settings == Settings(max_risks=(0.01, 0.02), confidence=0.95, latency_budgets=(3.0,))
