"""Reading YAML values with the place they stand at: every complaint names file, line, what was found and what is accepted.

Works on the composed nodes, so that a repeated key is seen and a tag that would build an object is an error, never executed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from dataclasses import dataclass

import yaml
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

__all__ = ["Cursor", "SchemaError", "compose"]

_RESOLVER = Resolver()
_CONSTRUCT = SafeConstructor()
_CANDIDATE = re.compile(r"[^\s/]+/\S+\Z")
_TAG = "tag:yaml.org,2002:"
_LARGE = 2**20
_SCHEMA = re.compile(r"^schema:", re.MULTILINE)
_DEEPEST = 64
"""Our files have eight levels; the parsers recurse, and a hundred thousand brackets would end the process."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The C parser where there is one, ten times faster; and a tag is guessed once per text, as a file repeats its words."""

    @staticmethod
    @functools.lru_cache(maxsize=16384)
    def resolve(kind: type[yaml.Node], value: str | None, implicit: tuple[bool, bool] | bool) -> str:
        return str(_RESOLVER.resolve(kind, value, implicit))  # type: ignore[no-untyped-call]

    depth = 0

    def descend_resolver(self, parent: yaml.Node | None, index: object) -> None:
        """Called at each level on the way down, where nothing is resolved by its path."""
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.composer.ComposerError(
                None, None, f"it nests more than {_DEEPEST} levels deep", parent.start_mark if parent is not None else None
            )

    def ascend_resolver(self) -> None:
        """Called on the way up."""
        self.depth -= 1


class SchemaError(ValueError):
    """A file that is no cache file of this schema; the message opens with file:line."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """One node of a document, and the name of the file it is in."""

    origin: str
    node: yaml.Node

    @property
    def line(self) -> int:
        """Counted from 1."""
        return int(self.node.start_mark.line) + 1

    @property
    def is_list(self) -> bool:
        """Whether a list stands here."""
        return isinstance(self.node, yaml.SequenceNode)

    def error(self, message: str) -> SchemaError:
        """A SchemaError at this place."""
        return SchemaError(f"{self.origin}:{self.line}: {message}")

    def mapping(self) -> list[tuple[Cursor, Cursor]]:
        """Keys and values, in the order of the file; scalar keys only, none twice."""
        if not isinstance(self.node, yaml.MappingNode) or self.node.tag != _TAG + "map":
            raise self.error(f"expected a mapping, found {self.found}")
        pairs, seen = [], set[tuple[str, str]]()
        for key, value in self.node.value:
            cursor = Cursor(self.origin, key)
            if not isinstance(key, yaml.ScalarNode):
                raise cursor.error(f"a key must be a scalar, found {cursor.found}")
            if (key.tag, key.value) in seen:
                raise cursor.error(f"{key.value!r} stands here twice")
            seen.add((key.tag, key.value))
            pairs.append((cursor, Cursor(self.origin, value)))
        return pairs

    def fields(self, known: Collection[str], required: Collection[str] = ()) -> dict[str, Cursor]:
        """A mapping with names from a closed set."""
        fields = {}
        for key, value in self.mapping():
            name = key.text()
            if name not in known:
                raise key.error(f"unknown field {name!r}; known here: {', '.join(sorted(known))}")
            fields[name] = value
        missing = [name for name in required if name not in fields]
        if missing:
            raise self.error(f"{', '.join(missing)} missing")
        return fields

    def items(self) -> list[Cursor]:
        """The elements of a list."""
        if not self.is_list or self.node.tag != _TAG + "seq":
            raise self.error(f"expected a list, found {self.found}")
        return [Cursor(self.origin, node) for node in self.node.value]

    def scalar(self) -> str | int | float | bool | None:
        """Any plain scalar; a date or a tagged value is an error."""
        node = self.node
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(f"expected one value, found {self.found}")
        if node.tag == _TAG + "str":
            return str(node.value)
        try:
            if node.tag == _TAG + "int":
                return int(_CONSTRUCT.construct_yaml_int(node))
            if node.tag == _TAG + "float":
                return float(_CONSTRUCT.construct_yaml_float(node))
            if node.tag == _TAG + "bool":
                return bool(_CONSTRUCT.construct_yaml_bool(node))
        except (ValueError, KeyError, OverflowError) as error:
            raise self.error(f"cannot read {node.value[:40]!r} as {node.tag.removeprefix(_TAG)}") from error
        if node.tag == _TAG + "null":
            return None
        raise self.error(f"expected text, a number, true, false or null, found {self.found}; quote it if it is text")

    def text(self) -> str:
        """A string."""
        value = self.scalar()
        if not isinstance(value, str):
            raise self.error(f"expected text, found {self.found}; put it in quotes if it is text")
        return value

    def candidate(self) -> str:
        """A string of the form backend/variant."""
        value = self.text()
        if not _CANDIDATE.match(value):
            raise self.error(f"expected backend/variant, found {value!r}")
        return value

    def choice(self, accepted: Collection[str]) -> str:
        """A string of a closed set."""
        value = self.text()
        if value not in accepted:
            raise self.error(f"expected one of {', '.join(sorted(accepted))}, found {value!r}")
        return value

    def integer(self, least: int) -> int:
        """A whole number of at least `least`."""
        value = self.scalar()
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(f"expected a whole number{f' of at least {least}' if least >= 0 else ''}, found {self.found}")
        if value >= 2**63:
            raise self.error(f"expected a whole number below 2**63, found {self.found}")
        return value

    def number(self) -> float:
        """Any number, .nan and .inf included."""
        value = self.scalar()
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(f"expected a number, found {self.found}")
        try:
            return float(value)
        except OverflowError as error:
            raise self.error("the number is too large") from error

    def quantity(self) -> float:
        """A finite number, not negative."""
        value = self.number()
        if not 0 <= value < float("inf"):
            raise self.error(f"expected a finite number of at least 0, found {self.found}")
        return value

    def flag(self) -> bool:
        """true or false."""
        value = self.scalar()
        if not isinstance(value, bool):
            raise self.error(f"expected true or false, found {self.found}")
        return value

    @property
    def found(self) -> str:
        """What stands here, in a few words."""
        if isinstance(self.node, yaml.ScalarNode):
            return repr(self.node.value[:60]) if self.node.value else "nothing"
        kind = "a list" if self.is_list else "a mapping"
        return kind if self.node.tag in (_TAG + "map", _TAG + "seq") else f"{kind} tagged {self.node.tag}"


def compose(text: str, origin: str) -> Cursor:
    """The root of a YAML document; SchemaError where the text is none, or is cut off."""
    if len(text) > _LARGE and _SCHEMA.search(text) is None:  # a large file is slow to parse: half a minute for 40 MB that are none of ours
        raise SchemaError(f"{origin}: no line of its {len(text) / 2**20:.0f} MiB begins with `schema:`, as all files of titans_backends have one")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{origin}:{mark.line + 1}" if mark is not None else origin
        problem = getattr(error, "problem", None) or str(error)
        raise SchemaError(f"{place}: not YAML, or cut off: {problem}") from error
    finally:
        loader.dispose()
    if node is None:
        raise SchemaError(f"{origin}:1: the file is empty, or comments alone")
    return Cursor(origin, node)
