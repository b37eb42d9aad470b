"""A call's arguments in the order of the op's parameters, without an argument object: what a repeated call needs of them."""

from __future__ import annotations

from dataclasses import fields

from titans_backends.contracts.contract import Contract

__all__ = ["Places"]


class Places:
    """Where an op's arguments go."""

    def __init__(self, op: Contract) -> None:
        made = fields(op.make_call)  # type: ignore[arg-type]  # a dataclass by contract
        self._places = {field.name: place for place, field in enumerate(made)}
        self._blank: list[object] = [field.default for field in made]
        self._most = sum(not field.kw_only for field in made)

    def __call__(self, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[object, ...] | None:
        """The values, defaults filled in, something that is no value where one is missing; None where a name is unknown, an argument given twice, or one too
        many: the argument class says which."""
        given = len(args)
        if given > self._most:
            return None
        values = self._blank.copy()
        values[:given] = args
        places = self._places
        for name, value in kwargs.items():
            place = places.get(name)
            if place is None or place < given:
                return None
            values[place] = value
        return tuple(values)
