"""Trains a small byte-level language model of dual-core layers on the standard library's own sources, on one backend or on each in turn.

    python examples/train_bytes.py [--backend triton] [--steps 300] [--merge scalar] [--checkpoint model.safetensors] [--json curve.json]
    python examples/train_bytes.py --checkpoint model.safetensors --resume --steps 600
    python examples/train_bytes.py --compare [--json FILE] [--picture docs/pictures/train_bytes.svg]

Four causal layers of width 256, 8 heads of 32; 16 pieces of 512 bytes a step; bfloat16 by autocast on a GPU, float32 on a CPU. Seeds decide the parameters and, for each
step by its number, the pieces: a run that was interrupted and resumed is the run that was not. --compare shows the loss curves of every backend that can train
here, from the same start on the same pieces, and the tokens a second of each. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from one_backend import known_backends, lacking, only, refusal, starved, unusable
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from titans_backends.nn import TitansEncoder, TitansEncoderConfig
from titans_backends.nn.forms import Merge, Mode

ROOT = Path(__file__).resolve().parent.parent
CORPUS_BYTES = 8 << 20
HELD_OUT = 20
"""One piece in so many of the corpus is for validation only."""
WARM_STEPS = 10
"""Not timed: kernels are compiled in them. Losses are read as often."""
COMPARED = ("eager", "triton", "cupy")
SIZES = ("width", "heads", "layers", "batch", "tokens", "warmup", "seed")
MODES, MERGES, DTYPES = ("recurrent", "flat"), ("fixed", "scalar", "head", "flux"), ("bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides a run's numbers, the backend's rounding aside; a checkpoint goes on with its own. ValueError names the option that is wrong."""

    mode: str = "recurrent"
    merge: str = "fixed"
    width: int = 256
    heads: int = 8
    layers: int = 4
    batch: int = 16
    tokens: int = 512
    rate: float = 1e-3
    warmup: int = 30
    seed: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in SIZES:
            value, least = getattr(self, name), 0 if name in ("warmup", "seed") else 1
            if not isinstance(value, int) or not least <= value < 1 << 31:
                raise ValueError(f"--{name} {value}: wanted a whole number from {least} to {(1 << 31) - 1}; the default is --{name} {default(name)}")
        if self.width % self.heads:
            nearest = max(self.heads, round(self.width / self.heads) * self.heads)
            raise ValueError(f"--width {self.width} cannot be shared by --heads {self.heads}; type --width {nearest}, or heads that divide the width")
        if not isinstance(self.rate, float) or not 0.0 < self.rate < math.inf:
            raise ValueError(f"--rate {self.rate}: wanted a finite number above 0; the default is --rate {default('rate')}")
        for name, known in (("mode", MODES), ("merge", MERGES), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)}: known are {', '.join(known)}")


def default(name: str) -> Any:
    """A recipe's own value of this option."""
    return Recipe.__dataclass_fields__[name].default


@dataclass(slots=True)
class Curve:
    """A run's losses in nats a byte, by step from `first`; NaN where a figure was not measured."""

    backend: str
    first: int = 0
    losses: list[float] = field(default_factory=list)
    validation: float = math.nan
    tokens_per_s: float = math.nan
    seconds: float = math.nan
    first_steps_s: float = math.nan
    merge: list[list[float]] = field(default_factory=list)
    failed: str = ""

    @staticmethod
    def read(told: Mapping[str, Any]) -> Curve:
        """From JSON, where NaN is null."""
        return Curve(**{name: math.nan if value is None else value for name, value in told.items()})

    @property
    def last(self) -> float:
        """The mean of the last twenty steps."""
        return statistics.fmean(self.losses[-20:]) if self.losses else math.nan

    def clock(self, seconds: float, tokens: int) -> None:
        """Notes that the losses so far took so long, with so many tokens a step; the first ten steps, which compile, are left out of the rate."""
        self.seconds, timed = seconds, len(self.losses) - WARM_STEPS
        if timed <= 0:
            self.first_steps_s = seconds
        else:
            self.tokens_per_s = timed * tokens / (seconds - self.first_steps_s)


class ByteModel(nn.Module):
    """Bytes `[B, T]` to the next byte's logits `[B, T, 256]`, causal."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        config = TitansEncoderConfig(
            vocab_size=256, d_model=recipe.width, num_layers=recipe.layers, num_heads=recipe.heads, d_ff=4 * recipe.width,
            mode=cast(Mode, recipe.mode), merge=cast(Merge, recipe.merge), convolution="causal",  # the other modes' own convolution sees the byte that is to be guessed
        )  # fmt: skip
        self.encoder = TitansEncoder(config)
        self.head = nn.Linear(recipe.width, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids `[B, T]`, int64."""
        logits: Tensor = self.head(self.encoder(ids, pool=False).tokens)
        return logits

    def alphas(self) -> list[list[float]]:
        """Each layer's learned weights of S_fast; empty where they are not learned."""
        found = [layer.mixer.merge for layer in self.encoder.layers]
        return [merge().detach().flatten().tolist() for merge in found if merge is not None]


def corpus() -> Tensor:
    """The standard library's sources, one after the other, as bytes `[N]`; tests and installed packages left out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    parts, size = list[bytes](), 0
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(path.relative_to(library).parts):
            continue
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size >= CORPUS_BYTES:
            break
    return torch.frombuffer(bytearray(b"".join(parts)[:CORPUS_BYTES]), dtype=torch.uint8)


def pieces(text: Tensor, recipe: Recipe, step: int) -> Tensor:
    """The step's bytes `[batch, tokens + 1]`; step -1 is validation's. Drawn by the step's number, so that nothing has to be remembered."""
    count = (len(text) - 1) // recipe.tokens
    held_out = torch.arange(0, count, HELD_OUT)
    if step < 0:
        chosen = held_out[: 4 * recipe.batch]
    else:
        source = torch.Generator().manual_seed(1_000_003 * recipe.seed + step)
        drawn = torch.randint(0, count - len(held_out), (recipe.batch,), generator=source)
        chosen = drawn + drawn // (HELD_OUT - 1) + 1
    return torch.stack([text[start : start + recipe.tokens + 1] for start in (chosen * recipe.tokens).tolist()]).long()


class Run:
    """A model in training: its optimizer, its step, and how both are kept in a file."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device, self.step = recipe, device, 0
        self.model = ByteModel(recipe).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.01)

    def loss(self, ids: Tensor) -> Tensor:
        """Nats a byte, 0-d."""
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.recipe.dtype == "bfloat16"):
            logits = self.model(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    def advance(self, text: Tensor) -> Tensor:
        """One step; its loss, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate * min(1.0, (self.step + 1) / max(1, self.recipe.warmup))
        loss = self.loss(pieces(text, self.recipe, self.step).to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def validation(self, text: Tensor) -> float:
        """Nats a byte on pieces that no step draws."""
        with torch.no_grad():
            return statistics.fmean(float(self.loss(ids.to(self.device))) for ids in pieces(text, self.recipe, -1).split(self.recipe.batch))

    def save(self, path: Path) -> None:
        """Parameters, the optimizer's means and the step; through a second file, so that what is there stays whole."""
        from safetensors.torch import save_file

        held = {f"model.{name}": value.detach().contiguous() for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            held |= {f"adam.{name}.{key}": value.contiguous() for key, value in self.optimizer.state[parameter].items()}
        beside = path.with_name(path.name + ".part")
        save_file(held, beside, {"run": json.dumps({"step": self.step, "recipe": asdict(self.recipe)})})
        beside.replace(path)

    @staticmethod
    def load(path: Path, device: str) -> Run:
        """The run that `save` kept, to go on with; ValueError where the file is not one."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as opened:
                kept = json.loads((opened.metadata() or {})["run"])
                held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
            run = Run(Recipe(**kept["recipe"]), device)
            run.step = int(kept["step"])
            run.model.load_state_dict({name.removeprefix("model."): value for name, value in held.items() if name.startswith("model.")})
            for name, parameter in run.model.named_parameters():
                start = f"adam.{name}."
                states = {
                    key.removeprefix(start): value for key, value in held.items() if key.startswith(start) and "." not in key.removeprefix(start)
                }
                if any(value.shape != parameter.shape for key, value in states.items() if key != "step"):
                    raise ValueError(f"{start}* must be {list(parameter.shape)}")
                if states:  # a parameter without a gradient has none
                    run.optimizer.state[parameter] = {key: value if key == "step" else value.to(device) for key, value in states.items()}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if starved(error):
                raise
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(
                f"--checkpoint {path} holds no run of this example ({why}); name another, or leave --resume out to train from the start"
            ) from error
        return run


class Curves(list[Curve]):
    """What a call of this example trains, written to `path` as it comes: a run that is stopped keeps what it had."""

    def __init__(self, recipe: Recipe, device: str, path: Path | None) -> None:
        super().__init__()
        self.recipe, self.path = recipe, path
        self.device = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU"

    def write(self) -> None:
        """As JSON, NaN as null; through a second file."""
        if self.path is None:
            return
        curves = [{name: None if value != value else value for name, value in asdict(curve).items()} for curve in self]
        told = {"device": self.device, "torch": torch.__version__, "recipe": asdict(self.recipe), "curves": curves}
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)


def train(run: Run, steps: int, backend: str, text: Tensor, asked: argparse.Namespace, console: Console, curves: Curves) -> None:
    """Up to `steps`, with a bar, as one more curve; the checkpoint is written every so often and in the end."""
    curve, waiting = Curve(backend, run.step), list[Tensor]()
    curves.append(curve)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[said]}"))
    told = lacking(backend, run.recipe.mode)
    if told:
        console.print(told, markup=False, highlight=False)
    begin = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{backend:8s}", total=steps, completed=run.step, said="")
        while run.step < steps:
            waiting.append(run.advance(text))
            if len(waiting) == WARM_STEPS or run.step == steps:
                curve.losses += [float(loss) for loss in waiting]  # waits for the device
                waiting.clear()
                curve.clock(time.perf_counter() - begin, run.recipe.batch * run.recipe.tokens)
                progress.update(task, completed=run.step, said=f"loss {curve.last:.3f}")
                curves.write()
            if asked.checkpoint is not None and (run.step == steps or (asked.checkpoint_every and run.step % asked.checkpoint_every == 0)):
                run.save(asked.checkpoint)
    curve.validation, curve.merge = run.validation(text), run.model.alphas()
    curves.write()


def compare(text: Tensor, asked: argparse.Namespace, console: Console, curves: Curves) -> None:
    """The same run on every backend that can train here."""
    for backend in COMPARED:
        reason = refused(backend, curves.recipe, asked.device)
        if reason:
            console.print(f"{backend} is left out: {reason}", markup=False, highlight=False)
            continue
        try:
            with only(backend):
                train(Run(curves.recipe, asked.device), asked.steps, backend, text, asked, console, curves)
        except Exception as error:  # the others are compared all the same; the exit status says it
            console.print_exception()
            curves.append(Curve(backend, failed=f"{type(error).__name__}: {str(error)[:300]}"))
            curves.write()


def refused(backend: str, recipe: Recipe, device: str) -> str:
    """Why a backend cannot train the recipe here; empty where it can."""
    return refusal(backend, recipe.mode, device, getattr(torch, recipe.dtype), recipe.width // recipe.heads, training=True)


def picture(curves: Sequence[Curve], title: str) -> str:
    """The loss curves, each point the mean of ten steps."""
    sys.path.insert(0, str(ROOT / "docs" / "pictures"))
    from line_chart import Axis, Panel, Series, draw

    lines = []
    for index, curve in enumerate(curve for curve in curves if curve.losses):
        means = [statistics.fmean(curve.losses[at : at + 10]) for at in range(0, len(curve.losses), 10)]
        lines.append(Series(curve.backend, [(curve.first + 10.0 * at + 5, mean) for at, mean in enumerate(means)], index, index % 3))
    return draw(title, [Panel("Training loss", lines)], Axis("step"), Axis("nats a byte"), columns=1)


def show(curves: Sequence[Curve], console: Console) -> None:
    """The figures, side by side."""
    table = Table(title="Losses in nats a byte", title_justify="left")
    for name in ("backend", "last 20 steps", "validation", "furthest from the first", "tokens/s", "seconds", "of it 10 steps", "merge, by layer"):
        table.add_column(name, justify="left" if name == "backend" else "right")
    first = curves[0]
    for curve in curves:
        gap = max((abs(a - b) for a, b in zip(curve.losses, first.losses, strict=False)), default=math.nan)
        merge = "; ".join(" ".join(f"{alpha:.3f}" for alpha in layer) for layer in curve.merge)
        rate = "–" if math.isnan(curve.tokens_per_s) else f"{curve.tokens_per_s:,.0f}"
        furthest = "–" if curve is first else f"{gap:.4f}"
        if curve.failed:
            console.print(f"{curve.backend} FAILED {curve.failed}", markup=False, highlight=False)
            continue
        table.add_row(
            curve.backend,
            f"{curve.last:.4f}",
            f"{curve.validation:.4f}",
            furthest,
            rate,
            f"{curve.seconds:.1f}",
            f"{curve.first_steps_s:.1f}",
            merge or "–",
        )
    console.print(table)


def checked(asked: argparse.Namespace) -> None:
    """ValueError where the options contradict each other, or name a device or a folder that is not there: before anything is trained."""
    if asked.compare and (asked.checkpoint is not None or asked.resume or asked.backend != "chosen"):
        raise ValueError("--compare trains several models from their start, one on each backend; leave --checkpoint and --resume out, and --backend")
    if asked.steps < 1:
        raise ValueError(f"--steps {asked.steps}: wanted a whole number from 1 on; the default is --steps 300")
    if asked.checkpoint_every < 0:
        raise ValueError(f"--checkpoint-every {asked.checkpoint_every}: wanted a whole number from 0 on; 0 writes it in the end only")
    for option, path in (("--checkpoint", asked.checkpoint), ("--json", asked.json), ("--picture", asked.picture)):
        if path is None:
            continue
        if path.is_dir():
            raise ValueError(f"{option} {path} is a folder; name a file in it")
        if not path.parent.is_dir():
            raise ValueError(f"{option} {path}: there is no folder {path.parent}; type mkdir -p {path.parent} first")
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"{option} {path}: the folder {path.parent} cannot be written to; name a file in another")
    if asked.resume and (asked.checkpoint is None or not asked.checkpoint.exists()):
        raise ValueError(
            f"--resume wants a --checkpoint that is there, got {asked.checkpoint}; name it, or leave --resume out to train from the start"
        )
    told = unusable(asked.device)
    if told:
        raise ValueError(told)


def begun(asked: argparse.Namespace, console: Console) -> tuple[Run, Tensor]:
    """The run to train and its corpus; ValueError where they do not go together."""
    checked(asked)
    run = Run.load(asked.checkpoint, asked.device) if asked.resume else Run(recipe_of(asked), asked.device)
    if asked.resume:
        given = {name: getattr(asked, name) for name in Recipe.__dataclass_fields__}
        kept = [
            f"--{name} {getattr(run.recipe, name)} (not {value})" for name, value in given.items() if value not in (None, getattr(run.recipe, name))
        ]
        if kept:
            console.print(f"taken from {asked.checkpoint}: {', '.join(kept)}", markup=False, highlight=False, soft_wrap=True)
        if asked.steps <= run.step:
            raise ValueError(
                f"--steps {asked.steps}: {asked.checkpoint} has done {run.step} already; type --steps {run.step + 100}, or any more than {run.step}"
            )
    text = corpus()
    most = (len(text) - 1) // 2
    if run.recipe.tokens > most:
        raise ValueError(f"--tokens {run.recipe.tokens}: the corpus has {len(text)} bytes, two pieces at the least; type --tokens {most} or fewer")
    reason = "" if asked.compare else refused(asked.backend, run.recipe, asked.device)
    if reason:
        raise ValueError(reason)
    return run, text


def refuse(error: Exception, device: str) -> int:
    """2, with a line on what was asked for in vain or on the memory that was wanting; anything else is raised again."""
    if starved(error):
        print(f"error: too little memory on {device}; type a smaller --batch, --tokens, --width or --layers", file=sys.stderr)
    elif isinstance(error, ValueError):
        print(f"error: {error}", file=sys.stderr)
    else:
        raise error
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains; 2 where what is asked cannot be had here, 1 where a backend that is compared fails or no loss can be drawn."""
    asked = options(arguments)
    console = Console(stderr=True)
    try:
        run, text = begun(asked, console)
    except (ValueError, RuntimeError, MemoryError) as error:
        return refuse(error, asked.device)
    curves = Curves(run.recipe, asked.device, asked.json)
    if asked.compare:
        compare(text, asked, console, curves)
    else:
        try:
            with only(asked.backend):
                train(run, asked.steps, asked.backend, text, asked, console, curves)
        except (RuntimeError, MemoryError) as error:
            return refuse(error, asked.device)
    if not curves:
        print(f"error: none of {', '.join(COMPARED)} can train this here; type another --dtype, --width or --heads", file=sys.stderr)
        return 2
    show(curves, Console())
    if asked.picture is not None:
        try:
            drawn = picture(curves, f"A byte-level model on {curves.device}, {run.recipe.dtype}")
        except ValueError as error:  # no finite point
            print(f"error: --picture {asked.picture} is not drawn: {error}; type a smaller --rate than {run.recipe.rate:g}", file=sys.stderr)
            return 1
        asked.picture.write_text(drawn, encoding="utf-8")
    return 1 if any(curve.failed for curve in curves) else 0


def recipe_of(asked: argparse.Namespace) -> Recipe:
    """The recipe that the command line asks for."""
    given = {"dtype": "bfloat16" if torch.device(asked.device).type == "cuda" else "float32"}
    return Recipe(**given | {name: getattr(asked, name) for name in Recipe.__dataclass_fields__ if getattr(asked, name) is not None})


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; None for what a recipe has a value of its own for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="chosen", choices=("chosen", *known_backends()), help="chosen: what dispatch takes (default)")
    parser.add_argument("--compare", action="store_true", help=f"train on each of {', '.join(COMPARED)} that can")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="train up to this step (default 300)")
    parser.add_argument("--mode", choices=MODES, help="flat: no memory beyond a chunk (default recurrent)")
    parser.add_argument("--merge", choices=MERGES, help="the share of S_fast: fixed (default), learned, or from the flux")
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"(default {default(name)}{'; 0: none' if name == 'warmup' else ''})")
    parser.add_argument("--rate", type=float, help="AdamW's (default 1e-3)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="safetensors; written every --checkpoint-every steps and in the end")
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="N", help="(default 100; 0: in the end only)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, with its recipe")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the loss curves")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="the loss curves as SVG")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
