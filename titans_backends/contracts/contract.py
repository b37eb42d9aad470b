"""The shape of a contract: an op's arguments, outputs, reference, work, key and cases, as data.

A contract knows no backend and decides nothing about speed. `validate` reads its tables to check a call, `case` to make
inputs, `buckets` to build keys, `library` to register it with torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from titans_backends.contracts.case import Variant

__all__ = ["Argument", "Call", "Contract", "Option", "OptionValue", "Output", "Role", "Work", "arithmetic_dtype", "state_dtype"]

Role = Literal["operand", "gate", "state", "index"]
"""operand: one shared dtype; gate: that dtype or float32; state: float32, or float64 with float64 operands; index: int32 or int64."""

Fill = Literal[
    "query", "key", "value", "beta", "log_decay", "gate", "decay_factor", "state", "transformed_value", "transformed_key",
    "lower_triangular", "mixing", "cu_seqlens", "slots", "position",
]  # fmt: skip
"""What a case generator puts into an argument."""

OptionKind = Literal["int", "float", "bool", "str"]
OptionValue = int | float | bool | str | None


@dataclass(frozen=True, slots=True)
class Argument:
    """A tensor argument. `dims` are the accepted layouts, letters separated by spaces; `*` stands for any leading dimensions."""

    name: str
    dims: tuple[str, ...]
    role: Role
    fill: Fill
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Option:
    """An argument that is no tensor. `minimum` and `choices` limit it; `nullable` lets None stand for "not given"."""

    name: str
    kind: OptionKind
    default: OptionValue
    minimum: int | None = None
    choices: tuple[str, ...] = ()
    nullable: bool = False
    in_key: bool = True


@dataclass(frozen=True, slots=True)
class Output:
    """A result. `like` names the operand whose dtype it has (None: a float32 or float64 state); `when` the option that asks for it."""

    name: str
    dims: str
    like: str | None = None
    when: str | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """What a call cannot avoid: multiply-adds counted as two, and every input read and output written once."""

    flop: float
    bytes: float

    def floor_us(self, flop_per_s: float, bytes_per_s: float) -> float:
        """The least time in microseconds on a machine with these ceilings."""
        return 1e6 * max(self.flop / flop_per_s, self.bytes / bytes_per_s)


class Call(Protocol):
    """One call's arguments: a slotted dataclass per op, whose fields are the op's parameters in order."""

    __slots__ = ()

    def __init__(self, *args: object, **kwargs: object) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Contract:
    """One op.

    `make_call` is the op's argument dataclass; `arguments` and `options` together are its fields; `check`, `reference` and `work`
    take that class. `check(call, dims)` raises ValueError for what the tables cannot say. `reference(call)` returns the outputs,
    differentiable, in float64 for a float64 call. `work(dims, call)` gives FLOP and extra bytes. `grid(call)` is the chunk size of
    the states that a forward may save, None where the op saves none. `variants` are the option sets worth testing. `seq_len_is`
    documents what the bucketed length means. `max_tokens`: a decode op takes no more tokens a call, `step_of` names the op that does. `experimental`: its
    definition may still change, and `tune` measures it only where it is asked for by name.

    Derived once, since a tracer cannot follow what is computed at first use: `parameters`, every parameter's name in the order of the
    op's signature; `operands`, the arguments that share one dtype; `differentiable`, the tensor arguments that take a gradient, which a
    backward's result follows; `rewritten`, the arguments that `inplace=True` changes and hands back; the tensor arguments and the options by name.
    """

    name: str
    summary: str
    make_call: Callable[..., Call]
    arguments: tuple[Argument, ...]
    options: tuple[Option, ...]
    outputs: tuple[Output, ...]
    check: Callable[..., None]
    reference: Callable[..., tuple[Tensor | None, ...]]
    work: Callable[..., tuple[float, float]]
    variants: tuple[Variant, ...]
    grid: Callable[[Call], int] | None = None
    seq_len_is: str = "T; packed: T / N"
    default_seq_lens: tuple[int, ...] = (128, 512, 2048)
    max_tokens: int | None = None
    step_of: str | None = None
    experimental: bool = False
    parameters: tuple[str, ...] = field(init=False, repr=False)
    operands: tuple[str, ...] = field(init=False, repr=False)
    differentiable: tuple[str, ...] = field(init=False, repr=False)
    rewritten: tuple[str, ...] = field(init=False, repr=False)
    argument_by_name: Mapping[str, Argument] = field(init=False, repr=False)
    option_by_name: Mapping[str, Option] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        declared = {a.name for a in self.arguments} | {o.name for o in self.options}
        have = {f.name for f in fields(self.make_call)}  # type: ignore[arg-type]
        if declared != have:
            raise ValueError(f"{self.name}: the tables and the argument dataclass differ in {sorted(declared ^ have)}")
        parameters = tuple(f.name for f in fields(self.make_call))  # type: ignore[arg-type]
        floating = {a.name for a in self.arguments if a.role != "index"}
        derived = {
            "parameters": parameters,
            "operands": tuple(a.name for a in self.arguments if a.role == "operand"),
            "differentiable": tuple(name for name in parameters if name in floating),
            "rewritten": tuple(o.name for o in self.outputs if o.name in parameters) if "inplace" in declared else (),
            "argument_by_name": {a.name: a for a in self.arguments},
            "option_by_name": {o.name: o for o in self.options},
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def values(self, call: Call) -> tuple[object, ...]:
        """What was given for each parameter, in signature order."""
        return tuple(getattr(call, name) for name in self.parameters)

    def tensors(self, call: Call) -> dict[str, Tensor]:
        """The tensors that were given, by name, in signature order."""
        found = {name: getattr(call, name) for name in self.parameters if name in self.argument_by_name}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def with_tensors(self, call: Call, changed: Mapping[str, Tensor]) -> Call:
        """The same call with some tensors exchanged."""
        return self.make_call(**{name: changed.get(name, getattr(call, name)) for name in self.parameters})

    def to(self, call: Call, dtype: torch.dtype) -> Call:
        """The same call with every floating tensor in another dtype, detached from autograd."""
        return self.with_tensors(call, {n: t.detach().to(dtype) for n, t in self.tensors(call).items() if t.is_floating_point()})

    def asked(self, call: Call) -> tuple[bool, ...]:
        """Which outputs this call asks for."""
        return tuple(o.when is None or bool(getattr(call, o.when)) for o in self.outputs)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 operands, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a state that comes back: float64 with float64 operands, else float32."""
    return arithmetic_dtype(dtype)
