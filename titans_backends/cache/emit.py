"""Values as YAML on one line: scalars, flow lists, flow mappings.

Every string comes back as the same string from any YAML reader, and nothing here ever spans two lines: a cache file is reviewed line
by line.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from yaml.nodes import ScalarNode
from yaml.resolver import Resolver

__all__ = ["flow_list", "flow_mapping", "scalar"]

_PLAIN = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_./+()@-]| (?=[A-Za-z0-9_(@]))*\Z")
_RESOLVER = Resolver()


def scalar(value: str | int | bool | float | None) -> str:
    """One scalar; a string is quoted where it would otherwise be read as something else."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _float(value)
    return _string(value)


def flow_list(values: Iterable[int]) -> str:
    """`[1, 2]`."""
    return f"[{', '.join(scalar(value) for value in values)}]"


def flow_mapping(items: Iterable[tuple[str, str]]) -> str:
    """`{key: value}` from keys and values that are text already (`scalar`, `flow_list`, `flow_mapping`)."""
    return "{" + ", ".join(f"{_string(key)}: {text}" for key, text in items) + "}"


def _float(value: float) -> str:
    if value != value:
        return ".nan"
    if value in (float("inf"), float("-inf")):
        return ".inf" if value > 0 else "-.inf"
    text = repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text  # YAML 1.1 wants the point


@functools.lru_cache(maxsize=4096)
def _string(text: str) -> str:
    if _PLAIN.match(text) and not _looks_like_a_number(text) and _resolves_to_string(text):
        return text
    if text.isprintable():
        return "'" + text.replace("'", "''") + "'"
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _looks_like_a_number(text: str) -> bool:
    """1e5 is a string to YAML 1.1 and a number to YAML 1.2: it is quoted for both."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _resolves_to_string(text: str) -> bool:
    return bool(_RESOLVER.resolve(ScalarNode, text, (True, False)) == "tag:yaml.org,2002:str")  # type: ignore[no-untyped-call]


def _escaped(character: str) -> str:
    code = ord(character)
    if character in '"\\':
        return "\\" + character
    if character == "\n":
        return "\\n"
    if 0xD800 <= code <= 0xDFFF:
        return "?"  # half a surrogate pair, from an undecodable path in a message: no file can hold it
    if character.isprintable():
        return character
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
