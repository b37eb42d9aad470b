"""The options of `tune` that name a grid, as they were typed, and the buckets that they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from titans_backends.buckets import Bucket
from titans_backends.cli import words
from titans_backends.cli.failures import user_input
from titans_backends.cli.show import say, status_console
from titans_backends.contracts import CONTRACTS
from titans_backends.signature import Launch, Regime
from titans_backends.tuning.plan import plan

__all__ = ["TypedGrid"]


@dataclass(frozen=True, slots=True)
class TypedGrid:
    """None: it was not typed, and the default grid says."""

    op: list[str] | None
    seq_lens: list[str] | None
    heads: list[str] | None
    head_dim: list[str] | None
    dtype: list[str] | None
    regime: list[str] | None
    launch: list[str] | None
    batch: int | None

    @property
    def by_option(self) -> dict[str, object]:
        """What was typed by the option's name, for what cannot stand beside it."""
        return {f"--{name.replace('_', '-')}": getattr(self, name) for name in self.__slots__}

    @property
    def value_heads(self) -> int | None:
        """The v heads of every sequence, where one pair of heads was typed."""
        pairs = words.heads_list(self.heads)
        return pairs[0][1] if pairs is not None and len(pairs) == 1 else None

    def buckets(self, kind: str, *, quick: bool) -> tuple[Bucket, ...]:
        """The planned buckets for a kind of device; MisuseError for a word that means nothing. Says where an op cannot have a length that was typed."""
        lengths = words.integers("--seq-lens", self.seq_lens)
        with user_input():
            found = plan(
                kind,
                quick=quick,
                ops=words.op_names(self.op),
                seq_lens=lengths,
                heads=words.heads_list(self.heads),
                head_dims=words.head_dims(self.head_dim),
                dtypes=words.one_of("--dtype", self.dtype, words.DTYPES),
                regimes=cast("Sequence[Regime] | None", words.one_of("--regime", self.regime, ("inference", "training"))),
                launches=cast("Sequence[Launch] | None", words.one_of("--launch", self.launch, ("eager", "graph"))),
                batch=self.batch,
            )
        _say_other_lengths(lengths, found)
        return found


def _say_other_lengths(asked: Sequence[int] | None, buckets: Sequence[Bucket]) -> None:
    """An op that cannot have a length that was asked for is told with what it is measured at instead."""
    for name, made in CONTRACTS.items():
        most = made.max_tokens
        planned = sorted({bucket.seq_len for bucket in buckets if bucket.op == name})
        beyond = [length for length in asked or () if most is not None and length > most]
        if planned and beyond:
            told = f"{name} takes 1 to {most} tokens: it is measured at {', '.join(map(str, planned))}, not at {', '.join(map(str, beyond))}"
            say(status_console(), told, "yellow")
