"""Pages from templates. All that comes from data is escaped, and nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from erde.evaluation.results import Arm
from erde.policy.points import Certificate, Measured
from erde.policy.rule import ExitRule
from erde.report import numbers

FILTERS = (
    "between", "confidence", "decimal", "images", "limit", "millions", "p_value", "percent", "points", "signed",
    "signed_between", "significant", "thousands",
)  # fmt: skip

# The share that a promise limits, by its guarantee.
PROMISED = {
    "risk": "risk", "expected_risk": "risk", "net_drop": "accuracy drop", "disagreement": "other answers",
}  # fmt: skip


def page(template: str, scripts: Sequence[str], figures: Any, **values: Any) -> str:
    """A whole page: ``values`` and ``figures`` are data, the scripts and the style are files of ``assets``."""

    def asset(name: str) -> str:
        return (resources.files("erde.report") / "assets" / name).read_text(encoding="utf-8")

    shared = {
        "plotly": Markup(packed(get_plotlyjs())),
        "style": Markup(asset("report.css")),
        "script": Markup("".join(map(asset, scripts))),
        "figures": figures,
    }
    return environment().get_template(template).render(shared | values)


def packed(text: str) -> str:
    """``text`` for the page to unpack: zlib's format in base64, 40 % of plotly's size. Every browser since 2023 reads it."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode("ascii")


def environment() -> Environment:
    """Templates with autoescape, and the filters that write numbers."""
    made = Environment(
        loader=PackageLoader("erde.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    # Jinja's tojson escapes what could close a <script>.
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    made.filters |= {name: _or_dash(getattr(numbers, name)) for name in FILTERS}
    made.globals |= {
        "NONE": numbers.NONE,
        "rule": rule_in_words,
        "promised_on": promised_on,
        "PROMISED": PROMISED,
    }
    return made


def _or_dash(write: Callable[..., str]) -> Callable[..., str]:
    return lambda value, *more, **named: numbers.NONE if value is None else write(value, *more, **named)


def rule_in_words(arm: Arm) -> str:
    """The score that an arm's exits decide on."""
    return ExitRule(arm.score, arm.sharpness, arm.ensemble).in_words()


def promised_on(certificate: Certificate, measured: Measured) -> float | None:
    """The measured share that the certificate limits; None for a disagreement, of which test has no number."""
    if certificate.guarantee == "disagreement":
        return None
    return measured.net_drop if certificate.guarantee == "net_drop" else measured.risk
