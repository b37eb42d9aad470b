"""transformers' gated delta models before and after `accelerate`, on every backend: logits, 100 greedy tokens, gradients, bfloat16, static caches.

    python benchmarks/drop_in_check.py [--device cuda] [--backends eager,triton,cupy] [--families qwen3_5,...] [--jobs 5] [--budget 140] [--json FILE]

Small models with random weights, nothing downloaded. "Before" is transformers' plain torch path: FLA is hidden from it. float32 at full precision:
logits within 1e-4, tokens the same, gradients within 1e-3 of each parameter's norm, in batches padded on the left and on the right; bfloat16: a layer's
error against float64, prompt and decode, at most 1.1 times that before. Exit status 1 where one of these fails. "refused" is a backend that has no backward or
no such dtype, by its own words; "not run" is what the budget left no time for, and fails too.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from drop_in_models import FAMILIES, VOCABULARY, delta_layers, small_model
from torch import Tensor

import titans_backends as tb
from titans_backends.cli.show import Column, Group, console, facts, table
from titans_backends.errors import BackendRefusedError

MISSING = "transformers is not installed. Type: pip install -c constraints.txt transformers"
CHECKS = (
    "logits",
    "left",
    "right",
    "tokens left",
    "tokens right",
    "gradients",
    "bf16 prompt",
    "bf16 decode",
    "continued",
    "static",
    "fullgraph",
    "generate static",
)
LIMITS = {"gradients": 1e-3, "bf16 prompt": 1.1, "bf16 decode": 1.1, "tokens left": 0.0, "tokens right": 0.0, "generate static": 0.0}
LOGITS = 1e-4
PROMPT, ROWS, DECODED = 150, 2, 8


@dataclass(frozen=True, slots=True)
class Row:
    """One check. `value`: the difference in logits, the tokens that differ, the gradients' relative error, or error after over error before."""

    family: str
    backend: str
    check: str
    status: str
    value: float = math.nan
    note: str = ""
    seconds: float = 0.0


class Problem:
    """A family's model, and what it gave before."""

    def __init__(self, family: str, device: str, head_dim: int, tokens: int) -> None:
        self.family, self.device, self.tokens = family, device, tokens
        self.model = small_model(family, ("linear_attention", "linear_attention", FULL[family]), head_dims=(head_dim, head_dim)).to(device)
        torch.manual_seed(1)
        self.ids = torch.randint(1, VOCABULARY, (ROWS, PROMPT), device=device)
        self.masks = {side: self._mask(side) for side in ("none", "left", "right", "mixed")}
        self._before: dict[str, Any] = {}
        self._exact: list[tuple[Tensor, ...]] = []

    def _mask(self, side: str) -> Tensor:
        """Row 0 has 13 tokens of padding; in "mixed" row 1 has 7 on the other side."""
        mask = torch.ones_like(self.ids)
        if side in ("left", "mixed"):
            mask[0, :13] = 0
        if side == "right":
            mask[0, -13:] = 0
        if side == "mixed":
            mask[1, -7:] = 0
        return mask

    # --- what is compared; each is called before and after

    def logits(self, side: str) -> Tensor:
        with torch.no_grad():
            mask = self.masks[side]
            return self.model(self.ids, attention_mask=mask, use_cache=False).logits[mask.bool()]

    def generated(self, side: str, **how: object) -> Tensor:
        options = {"max_new_tokens": self.tokens, "do_sample": False, **how}
        return self.model.generate(self.ids, attention_mask=self.masks[side], **options)[:, PROMPT:].cpu()

    def gradients(self) -> dict[str, Tensor]:
        mask = self.masks["mixed"]
        self.model.zero_grad()
        self.model.train()
        try:
            self.model(self.ids, attention_mask=mask, labels=self.ids.masked_fill(mask == 0, -100), use_cache=False).loss.backward()
        finally:
            self.model.eval()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def continued(self) -> Tensor:
        """Pieces through a dynamic cache: a first one shorter than the convolution, single tokens, a few, many."""
        from transformers import DynamicCache

        return self._through(DynamicCache(config=self.model.config), self.model.forward, (3, 4, 5, 9, 60, 61, 64, PROMPT))

    def static(self, forward: Callable[..., Any]) -> Tensor:
        """A prompt and single tokens through a static cache."""
        from transformers import StaticCache

        return self._through(StaticCache(config=self.model.config, max_cache_len=PROMPT + 8), forward, (PROMPT - 4, *range(PROMPT - 3, PROMPT + 1)))

    def _through(self, cache: object, forward: Callable[..., Any], ends: tuple[int, ...]) -> Tensor:
        found, start = [], 0
        with torch.no_grad():
            for end in ends:
                places = torch.arange(start, end, device=self.device).expand(ROWS, -1)
                found.append(forward(self.ids[:, start:end], past_key_values=cache, position_ids=places).logits)
                start = end
        return torch.cat(found, 1)

    def bf16_layer(self, layer: torch.nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A layer's outputs for a prompt and for single tokens after it."""
        from transformers import DynamicCache

        generator = torch.Generator().manual_seed(2)
        x = torch.randn(ROWS, PROMPT, self.model.config.hidden_size, generator=generator).to(torch.bfloat16).to(self.device, dtype)
        cache, start = DynamicCache(config=self.model.config), PROMPT - DECODED
        with torch.no_grad():
            prompt = layer(x[:, :start], cache_params=cache)
            steps = [layer(x[:, t : t + 1], cache_params=cache) for t in range(start, PROMPT)]
        return prompt, torch.cat(steps, 1)

    def bf16_errors(self) -> tuple[float, float]:
        """Relative errors of prompt and decode against the float64 layer with the same weights, over the model's gated delta layers."""
        layers = delta_layers(self.model)
        exact = self._exact
        found = []
        for layer in layers:
            kept = {name: p.data for name, p in layer.named_parameters()}
            try:
                if len(exact) < len(layers):
                    exact.append(tuple(y.double() for y in self.bf16_layer(_cast(layer, torch.float64, kept), torch.float64)))
                found.append(self.bf16_layer(_cast(layer, torch.bfloat16, kept), torch.bfloat16))
            finally:
                for name, p in layer.named_parameters():
                    p.data = kept[name]
        return tuple(  # type: ignore[return-value]  # two of them
            math.sqrt(sum(float((y[part].double() - e[part]).square().sum() / e[part].square().sum()) for y, e in zip(found, exact, strict=True)))
            for part in range(2)
        )

    def remember(self) -> None:
        """Everything before `accelerate`; what raises there is told by the checks that would compare with it."""
        wanted: dict[str, Callable[[], Any]] = {f"logits {side}": partial(self.logits, side) for side in ("none", "left", "right")}
        wanted |= {f"tokens {side}": partial(self.generated, side) for side in ("left", "right")}
        wanted |= {
            "gradients": self.gradients,
            "bf16": self.bf16_errors,
            "continued": self.continued,
            "static": partial(self.static, self.model.forward),
        }
        for name, compute in wanted.items():
            try:
                self._before[name] = compute()
            except Exception as error:  # a limit of transformers on this machine
                self._before[name] = error

    def before(self, name: str) -> Any:  # a tensor, gradients by name, or two errors
        """What was remembered; what it raised is raised here."""
        found = self._before[name]
        if isinstance(found, Exception):
            raise RuntimeError(f"before accelerate, transformers itself raised {type(found).__name__}: {found}") from found
        return found

    # --- the checks, after it

    def check(self, name: str) -> tuple[float, str]:
        """A value, and what to say about it."""
        if name in ("logits", "left", "right"):
            side = "none" if name == "logits" else name
            return float((self.logits(side) - self.before(f"logits {side}")).abs().max()), ""
        if name in ("tokens left", "tokens right"):
            return self._tokens(name, self.generated(name.split()[1]))
        if name == "generate static":  # on a GPU transformers compiles the steps by itself
            return self._tokens("tokens left", self.generated("left", cache_implementation="static"))
        if name == "gradients":
            return self._gradients()
        if name.startswith("bf16"):
            part = 0 if name.endswith("prompt") else 1
            after, before = self.bf16_errors()[part], self.before("bf16")[part]
            return after / before, f"{after:.2e} after, {before:.2e} before"
        if name == "continued":
            return float((self.continued() - self.before("continued")).abs().max()), ""
        found = self._static_in_graphs() if name == "fullgraph" else self.static(self.model.forward)
        return float((found - self.before("static")).abs().max()), ""

    def _static_in_graphs(self) -> Tensor:
        """`static` with the whole model compiled without a graph break, or each gated delta layer where the rest of the model cannot be."""
        torch._dynamo.reset()
        if self.family != "qwen4_exp":  # its indexer asks how many tokens there are
            return self.static(torch.compile(self.model.forward, fullgraph=True, backend="aot_eager"))
        layers = delta_layers(self.model)
        try:
            for layer in layers:
                layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
            return self.static(self.model.forward)
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    def _tokens(self, before: str, found: Tensor) -> tuple[float, str]:
        differ = found != self.before(before)
        first = int(differ.any(0).nonzero()[0]) if differ.any() else -1
        return float(differ.sum()), f"{found.numel()} tokens, {len(found.unique())} kinds" + (
            f", the first that differs is {first}" if first >= 0 else ""
        )

    def _gradients(self) -> tuple[float, str]:
        before, after = self.before("gradients"), self.gradients()
        if before.keys() != after.keys():
            return math.inf, f"gradients of {', '.join(sorted(before.keys() ^ after.keys()))}"
        errors = {name: float((after[name] - g).norm() / g.norm().clamp_min(1e-12)) for name, g in before.items()}
        worst = max(errors, key=errors.__getitem__)
        return errors[worst], f"worst: {worst}"


FULL = {family: "indexed_attention" if family == "qwen4_exp" else "full_attention" for family in FAMILIES}


def _cast(layer: torch.nn.Module, dtype: torch.dtype, kept: dict[str, Tensor]) -> torch.nn.Module:
    """The layer with its weights rounded to bfloat16, in a dtype."""
    for name, p in layer.named_parameters():
        p.data = kept[name].to(torch.bfloat16).to(dtype)
    return layer


def examine(family: str, asked: argparse.Namespace, tell: Callable[[Row], None]) -> None:
    """Every check of one family on every backend, told as it comes."""
    until = time.monotonic() + asked.budget
    problem = Problem(family, asked.device, asked.head_dim, asked.tokens)
    problem.remember()
    for backend in asked.backends:
        report = tb.accelerate(problem.model, backend=None if backend == "chosen" else backend)
        if len(report.swapped) != len(delta_layers(problem.model)):
            raise SystemExit(f"{family}: {len(report.swapped)} layers swapped of {len(delta_layers(problem.model))}")
        for name in asked.checks:
            started = time.monotonic()
            if started > until:
                tell(Row(family, backend, name, "not run", note="the budget was spent"))
                continue
            try:
                value, note = problem.check(name)
                status = "right" if value <= LIMITS.get(name, LOGITS) else "WRONG"
            except BackendRefusedError as error:
                value, note, status = math.nan, str(error), "refused"
            except Exception as error:  # a check that raises is a result
                value, note, status = math.nan, f"{type(error).__name__}: {error}"[:2000], "RAISED"
            tell(Row(family, backend, name, status, value, note, round(time.monotonic() - started, 2)))
        report.undo()


def shown(row: Row | None) -> str:
    """A cell of the table."""
    if row is None:
        return "-"
    if row.status in ("not run", "refused", "RAISED"):
        return row.status
    value = f"{row.value:.0f} differ" if LIMITS.get(row.check) == 0.0 else f"{row.value:.3f}" if row.check.startswith("bf16") else f"{row.value:.1e}"
    return value if row.status == "right" else f"{value} WRONG"


def show(rows: list[Row], families: list[str], backends: list[str], checks: list[str]) -> None:
    """One line for each family and backend."""
    held = {(row.family, row.backend, row.check): row for row in rows}
    out = console()
    lines = [Group(f, [[b, *(shown(held.get((f, b, c))) for c in checks)] for b in backends]) for f in families]
    table(out, [Column("backend"), *(Column(c, "right") for c in checks)], lines)
    out.print()
    for row in rows:
        if row.status in ("WRONG", "RAISED"):
            out.print(f"{row.family} {row.backend} {row.check}: {row.status}: {row.note[:400]}")


def children(asked: argparse.Namespace) -> list[Row]:
    """A process for each family, `--jobs` at a time; what one has told counts, however it ends."""
    until = time.monotonic() + asked.budget
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        waiting, running, files = list(asked.families), {}, {f: Path(folder) / f"{f}.jsonl" for f in asked.families}
        while waiting or running:
            while waiting and len(running) < asked.jobs:
                family = waiting.pop(0)
                left = max(until - time.monotonic(), 1.0)
                options = [f"--{name}={value}" for name, value in (("device", asked.device), ("backends", ",".join(asked.backends)), ("families", family),
                           ("checks", ",".join(asked.checks)), ("head-dim", asked.head_dim), ("tokens", asked.tokens), ("budget", left))]  # fmt: skip
                running[family] = subprocess.Popen([sys.executable, __file__, *options, "--lines", str(files[family])])
            time.sleep(0.2)
            if time.monotonic() > until + 8:
                for process in running.values():
                    process.kill()
            running = {family: process for family, process in running.items() if process.poll() is None}
        for path in files.values():
            rows += [Row(**json.loads(line)) for line in (path.read_text(encoding="utf-8").splitlines() if path.exists() else [])]
    told = {(row.family, row.backend, row.check) for row in rows}
    missing = [(f, b, c) for f in asked.families for b in asked.backends for c in asked.checks if (f, b, c) not in told]
    return rows + [Row(*key, "not run", note="its process ended before") for key in missing]


def arguments() -> argparse.Namespace:
    """What was asked for."""

    def names(known: tuple[str, ...] | None) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            given = [name for name in text.split(",") if name]
            strange = [name for name in given if known is not None and name not in known]
            if strange or not given:
                raise argparse.ArgumentTypeError(f"{', '.join(strange) or 'nothing'} is not among {', '.join(known or ())}")
            return given

        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backends", type=names(None), default=["eager"], help='names of backends, or "chosen" for what a plain call takes')
    parser.add_argument("--families", type=names(tuple(FAMILIES)), default=list(FAMILIES))
    parser.add_argument("--checks", type=names(CHECKS), default=list(CHECKS))
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Tells, writes, and counts what is wrong."""
    asked = arguments()
    sys.modules.setdefault("fla", None)  # type: ignore[arg-type]  # an import of it fails, and transformers takes its plain torch path
    try:
        import transformers
    except ImportError:
        print(MISSING, file=sys.stderr)
        return 2
    if asked.lines is None:
        rows = children(asked)
    else:
        transformers.logging.set_verbosity_error()
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        with asked.lines.open("w", encoding="utf-8") as file:

            def tell(row: Row) -> None:
                file.write(json.dumps(asdict(row)) + "\n")
                file.flush()

            examine(asked.families[0], asked, tell)
        return 0
    show(rows, asked.families, asked.backends, asked.checks)
    place = torch.cuda.get_device_name() if asked.device.startswith("cuda") else platform.machine()
    told = {"device": place, "torch": torch.__version__, "transformers": transformers.__version__, "titans_backends": tb.__version__}
    facts(console(), list(told.items()))
    if asked.json is not None:
        plain = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(row).items()} for row in rows]
        asked.json.write_text(json.dumps({**told, "rows": plain}, indent=1) + "\n", encoding="utf-8")
    wrong = [row for row in rows if row.status not in ("right", "refused")]
    counts = {status: sum(row.status == status for row in rows) for status in ("right", "refused", "WRONG", "RAISED", "not run")}
    print(f"\n{', '.join(f'{count} {status}' for status, count in counts.items())}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
