"""Numbers as people read them: sizes, durations, shares, passes, counts with their noun."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes in the unit that suits their number, in powers of ten and three digits: `15.5 GB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 999.5 * factor / 1e3:
            return f"{max(1.0, count / factor):.3g} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def percent(share: float) -> str:
    """A share as a percentage: none, all, or with as many digits as it takes to be neither."""
    if share in (0, 1):
        return f"{share:.0%}"
    return f"{share:.1%}" if 0.0005 <= share < 0.9995 else "less than 0.1%" if share < 0.5 else "more than 99.9%"


def passes(count: float) -> str:
    """How often rows are gone through, in three digits or whole numbers: `125 passes`, `12.5% of one pass`."""
    if count < 0.9995:
        return f"{percent(count)} of one pass"
    said = f"{count:,.0f}" if count >= 99.95 else f"{count:.3g}"
    return f"{said} {'pass' if said == '1' else 'passes'}"


def loss(value: float | None) -> str:
    """A loss in three decimals; `none` where it was no number, as of an interval whose steps were all skipped."""
    return "none" if value is None else f"{value:.3f}"


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: `1 row`, `2 rows`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
