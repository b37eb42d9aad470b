"""Numbers as people read them, in the terminal and on the report's page: three significant digits and a unit that fits. Exact ones stand in `--json`."""

from __future__ import annotations

__all__ = ["amount", "error", "factor", "gain", "length", "mib", "percent", "rate", "seconds", "time_us"]


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


def gain(slower_us: float | None, faster_us: float | None) -> str:
    """How many times as fast: `2.31×`; nothing where either is unknown."""
    return factor(slower_us / faster_us) if slower_us and faster_us else ""


def factor(value: float | None) -> str:
    """How many times: `2.31×`; nothing for None."""
    return "" if value is None else f"{_three(value)}×"


def seconds(value: float) -> str:
    """A wait: `0.4 s`, `12 s`, `2 min 05 s`, `1 h 04 min`."""
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def percent(part: float | None) -> str:
    """A share: `12 %`, `0.4 %`; nothing for None."""
    return "" if part is None else f"{100 * part:.0f} %" if part >= 0.0995 else f"{100 * part:.1f} %"


def mib(value: float | None) -> str:
    """Memory in MiB; nothing for None."""
    return "" if value is None else f"{_three(value)} MiB"


def error(value: float | None) -> str:
    """An error against the reference: `3.4e-07`; nothing for None."""
    return "" if value is None else f"{value:.1e}"


def rate(per_s: float, unit: str) -> str:
    """A ceiling: `2.99 TB/s`, `796 TFLOP/s`."""
    return f"{per_s / 1e12:.3g} T{unit}/s" if per_s >= 1e12 else f"{per_s / 1e9:.3g} G{unit}/s"


def length(seq_len: int) -> str:
    """A sequence length as an axis has room for it: `512`, `2k`, `64k`."""
    return f"{seq_len // 1024}k" if seq_len >= 1024 and seq_len % 1024 == 0 else str(seq_len)


def amount(count: int, one: str, many: str = "") -> str:
    """`1 row`, `2,353 timings`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
