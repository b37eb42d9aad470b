"""Numbers as people read them: three significant digits and a unit that fits. Exact values go to `--json`, never through here."""

from __future__ import annotations

__all__ = ["amount", "gain", "mib", "percent", "seconds", "time_us"]


def _three(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"


def time_us(us: float | None) -> str:
    """Microseconds: `8.12 µs`, `812 µs`, `12.3 ms`, `1.20 s`; nothing for None."""
    if us is None:
        return ""
    if us < 999.5:
        return f"{_three(us)} µs"
    return f"{_three(us / 1e3)} ms" if us < 999.5e3 else f"{_three(us / 1e6)} s"


def seconds(value: float) -> str:
    """A wait: `0.4 s`, `12 s`, `2 min 05 s`, `1 h 04 min`."""
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def gain(slower_us: float | None, faster_us: float | None) -> str:
    """How many times as fast: `2.31×`; nothing where either is unknown."""
    return f"{_three(slower_us / faster_us)}×" if slower_us and faster_us else ""


def percent(part: float) -> str:
    """A share: `12 %`, `0.4 %`."""
    value = 100 * part
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.1f} %"


def mib(value: float | None) -> str:
    """Memory in MiB; nothing for None."""
    return "" if value is None else f"{_three(value)} MiB"


def amount(count: int, one: str, many: str = "") -> str:
    """`1 bucket`, `3 buckets`."""
    return f"{count} {one if count == 1 else many or one + 's'}"
