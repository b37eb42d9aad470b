"""The command line's words as values: lists with commas, heads, head sizes, dtypes, options of an op. Each error says what would do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch

from titans_backends.cli.failures import MisuseError
from titans_backends.contracts import contract
from titans_backends.contracts.contract import Contract, Option, OptionValue

__all__ = [
    "DTYPES",
    "MOST",
    "computable",
    "default_device",
    "device_named",
    "dtype_named",
    "head_dim",
    "head_dims",
    "heads",
    "heads_list",
    "integers",
    "names",
    "one_of",
    "op_names",
    "options_of",
    "seconds",
]

MOST = 2**31 - 1
"""The largest size that is read: what is longer is a slip, and torch's own words for it are no help."""
_MOST_NUMBERS = 2**48
_LONGEST_S = 1e8
DTYPES = ("float32", "float64", "bfloat16", "float16")


def names(given: Sequence[str] | None) -> list[str] | None:
    """Every name, each once, of an option that may be repeated or hold several with commas between; None where it was not given."""
    if not given:
        return None
    found = [part.strip() for text in given for part in text.split(",")]
    if "" in found:
        raise MisuseError(f"an empty name in {', '.join(map(repr, given))}; separate names with one comma")
    return list(dict.fromkeys(found))


def op_names(given: Sequence[str] | None) -> list[str] | None:
    """`names`, each of which must be an op."""
    found = names(given)
    for name in found or ():
        contract(name)
    return found


def one_of(option: str, given: Sequence[str] | None, accepted: Sequence[str]) -> list[str] | None:
    """`names`, each of which must be one of a few words."""
    found = names(given)
    for name in found or ():
        if name not in accepted:
            raise MisuseError(f"{option} must be {' or '.join(accepted)}, got {name!r}")
    return found


def integers(option: str, given: Sequence[str] | None) -> list[int] | None:
    """Positive whole numbers, as `names`."""
    found = names(given)
    if found is None:
        return None
    values = [_positive(text) for text in found]
    if None in values:
        raise MisuseError(f"{option} must be whole numbers from 1 to {MOST}, like 512 or 512,2048, got {found[values.index(None)]!r}")
    return [value for value in values if value is not None]


def seconds(option: str, value: float | None) -> None:
    """MisuseError for what is no time to wait."""
    if value is not None and not 0 < value <= _LONGEST_S:
        raise MisuseError(f"{option} must be above 0 and at most {_LONGEST_S:g} seconds, got {value:g}")


def computable(seq_len: int, batch: int, head_count: int, dim: int) -> None:
    """MisuseError where one tensor of a call, or all its states, would have more numbers than any machine holds."""
    numbers = batch * head_count * dim * max(seq_len, dim)
    if numbers >= _MOST_NUMBERS:
        raise MisuseError(
            f"batch {batch} x tokens {seq_len} x heads {head_count} x head_dim {dim} come to {numbers:.1e} numbers in one tensor or state; "
            f"below {_MOST_NUMBERS:.0e} can be asked for"
        )


def heads_list(given: Sequence[str] | None) -> list[tuple[int, int]] | None:
    """Pairs of (q and k heads, v heads), as `names`."""
    return None if (found := names(given)) is None else [heads(text) for text in found]


def head_dims(given: Sequence[str] | None) -> list[tuple[int, int]] | None:
    """Pairs of (K, V), as `names`."""
    return None if (found := names(given)) is None else [head_dim(text) for text in found]


def heads(text: str) -> tuple[int, int]:
    """`16` or `16/32`: heads of q and k, then of v."""
    pair = _pair(text, "/")
    if pair is None or pair[1] % pair[0]:
        raise MisuseError(f"--heads must be like 16, or 16/32 for 16 heads of q and k and 32 of v (a multiple), each at most {MOST}, got {text!r}")
    return pair


def head_dim(text: str) -> tuple[int, int]:
    """`128`, or `128x64` for K = 128 and V = 64."""
    pair = _pair(text.lower(), "x")
    if pair is None:
        raise MisuseError(f"--head-dim must be like 128, or 128x64 for K = 128 and V = 64, each at most {MOST}, got {text!r}")
    return pair


def dtype_named(text: str) -> torch.dtype:
    """A floating dtype by torch's name."""
    if text not in DTYPES:
        raise MisuseError(f"--dtype must be one of {', '.join(DTYPES)}, got {text!r}")
    found = getattr(torch, text)
    assert isinstance(found, torch.dtype)
    return found


def default_device() -> str:
    """The first GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_named(text: str | None) -> str:
    """A device that torch knows and this machine has."""
    name = default_device() if text is None else text
    try:
        device = torch.device(name)
    except RuntimeError:
        raise MisuseError(f"--device must be like cpu, cuda or cuda:1, got {name!r}") from None
    if device.type == "cpu" and device.index is not None:
        raise MisuseError(f"--device must be like cpu, cuda or cuda:1, got {name!r}; a machine's processors are one device, cpu")
    if device.type not in ("cpu", "cuda") and not _is_there(device):
        raise MisuseError(f"--device {name}: torch can compute on no such device here; type --device cpu, or see: titans-backends doctor")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count()
        raise MisuseError(f"--device {name}: torch finds {count} CUDA devices here; type --device cpu, or see: titans-backends doctor")
    return name


def _is_there(device: torch.device) -> bool:
    """Whether a tensor on it holds numbers; on meta it does not."""
    try:
        return bool(torch.ones(1, device=device).item() == 1)
    except (RuntimeError, NotImplementedError, AssertionError, ImportError):
        return False


def options_of(op: Contract, given: Sequence[str] | None) -> dict[str, OptionValue]:
    """`name=value` words as an op's arguments that are no tensors, within what the contract's table accepts."""
    found: dict[str, OptionValue] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        option = op.option_by_name.get(name.strip())
        if not equals or option is None:
            near = difflib.get_close_matches(name, op.option_by_name, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            known = ", ".join(f"{o.name}={_written(o.default)}" for o in op.options) or "none"
            raise MisuseError(f"--option must be name=value with an option of {op.name}, got {text!r}.{hint} It has: {known}")
        if option.name in found:
            raise MisuseError(f"--option {option.name} was given twice; type it once, like --option {text}")
        found[option.name] = _value(op, option, value.strip())
    return found


def _written(value: OptionValue) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _value(op: Contract, option: Option, text: str) -> OptionValue:
    if option.nullable and text.lower() in ("none", "null"):
        return None
    try:
        value = _read(option.kind, text)
    except (ValueError, KeyError):
        what = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}[option.kind]
        raise MisuseError(f"--option {option.name}: {op.name} takes {what}{' or none' if option.nullable else ''} there, got {text!r}") from None
    if option.choices and value not in option.choices:
        raise MisuseError(f"--option {option.name}: {op.name} takes {' or '.join(option.choices)} there, got {text!r}")
    if isinstance(value, int) and abs(value) > MOST:
        raise MisuseError(f"--option {option.name}: {op.name} takes at most {MOST} there, got {text}")
    if option.minimum is not None and isinstance(value, (int, float)) and value < option.minimum:
        raise MisuseError(f"--option {option.name}: {op.name} takes at least {option.minimum} there, got {text}")
    return value


def _read(kind: str, text: str) -> OptionValue:
    """ValueError or KeyError where it is not of its kind."""
    if kind == "bool":
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
    return int(text) if kind == "int" else float(text) if kind == "float" else text


def _positive(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= len(str(MOST)) and 0 < int(text) <= MOST else None


def _pair(text: str, separator: str) -> tuple[int, int] | None:
    numbers = [_positive(part) for part in text.split(separator)]
    first, last = numbers[0], numbers[-1]
    return (first, last) if len(numbers) in (1, 2) and first is not None and last is not None else None
