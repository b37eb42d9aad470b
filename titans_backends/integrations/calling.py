"""What a call of `accelerate` or `register_with_fla` is told that it was not written for: keywords that were given by their place, and unknown ones."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["expect_known"]


def expect_known(name: str, before: Sequence[str], misplaced: Sequence[object], unknown: Sequence[str], known: Sequence[str]) -> None:
    """TypeError where something was given beside what `before` names, with the call that was meant where that can be told, or under an unknown keyword."""
    if misplaced:
        words = ["backend" if isinstance(given, str) else "strict" if isinstance(given, bool) else "" for given in misplaced]
        told = all(word in known for word in words) and len(set(words)) == len(words)
        meant = [f"{word}={given!r}" for word, given in zip(words, misplaced, strict=True)] if told else [f"{word}=..." for word in known]
        takes = f"{' and '.join(before)} by place and nothing else" if before else "nothing by place"
        got = ", ".join(repr(given) if isinstance(given, (str, bool, int, float, type(None))) else f"a {type(given).__name__}" for given in misplaced)
        raise TypeError(f"{name}: it takes {takes}, got {got}{' besides' if before else ''}; type {name}({', '.join([*before, *meant])})")
    if unknown:
        raise TypeError(f"{name}: unknown keyword {', '.join(map(repr, unknown))}; known: {', '.join(map(repr, known))}")
