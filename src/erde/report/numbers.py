"""Numbers in the form that the pages print: shares in per cent, MACs in millions, real minus signs."""

from __future__ import annotations

from typing import Any

NONE = "–"
SPACE = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"


def percent(share: float, digits: int = 1) -> str:
    """A share with its unit."""
    return f"{points(share, digits)}{SPACE}%"


def points(share: float, digits: int = 1) -> str:
    """A share in per cent, for columns that name the unit."""
    text = f"{100 * share:.{digits}f}"
    return text.replace("-", MINUS) if float(text) else text.removeprefix("-")


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign; a zero has none."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", MINUS) if float(text) else text[1:]


def limit(share: float) -> str:
    """A promised share, as it was asked for: no digits that nobody gave."""
    return f"{100 * share:g}{SPACE}%"


def between(bounds: tuple[float, float], digits: int = 1) -> str:
    """A 95 % interval of a share, in per cent."""
    return f"{points(bounds[0], digits)} to {points(bounds[1], digits)}"


def signed_between(bounds: tuple[float, float], scale: float = 1) -> str:
    """An interval of a difference."""
    return f"{signed(scale * bounds[0])} to {signed(scale * bounds[1])}"


def millions(count: float) -> str:
    """A count of operations, in millions."""
    value = count / 1e6
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def thousands(count: int) -> str:
    """A count, with commas."""
    return f"{count:,}"


def images(count: int) -> str:
    """A number of images, with its noun."""
    return f"{count:,} image{'' if count == 1 else 's'}"


def decimal(value: float, digits: int = 3) -> str:
    """A number with so many decimals."""
    return f"{value:.{digits}f}"


def significant(value: float, digits: int = 3) -> str:
    """A number with at most so many digits."""
    return f"{value:.{digits}g}"


def p_value(value: float) -> str:
    """A p-value."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def confidence(share: float) -> str:
    """The confidence of an answer; none is certain, whatever rounding says."""
    if share >= 0.9999:
        return f"> {percent(0.9999, 2)}"
    return percent(share, 0 if share < 0.995 else 2)


def rounded(value: Any, digits: int = 7) -> Any:
    """``value`` with every float at so many significant digits: figures show fewer, and the page stays small."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(inner, digits) for key, inner in value.items()}
    return [rounded(inner, digits) for inner in value] if isinstance(value, (list, tuple)) else value


def flat(value: Any, key: str = "") -> dict[str, str]:
    """Nested values as one level of dotted keys, in words."""
    if isinstance(value, dict) and value:
        parts = [flat(inner, f"{key}.{name}" if key else str(name)) for name, inner in value.items()]
        return {name: text for part in parts for name, text in part.items()}
    if isinstance(value, float):
        return {key: f"{value:,.1f} s" if "seconds" in key else f"{value:.6g}"}
    return {key: NONE if value is None else str(value)}
