"""The page: a template filled with a view. One file, no script, nothing asked from elsewhere, which its own policy forbids."""

from __future__ import annotations

import importlib.resources

import jinja2

from titans_backends.reporting.palette import styles
from titans_backends.reporting.svg import FONT
from titans_backends.reporting.view import PageView

__all__ = ["page"]


def page(view: PageView) -> str:
    """The HTML of a view."""
    folder = importlib.resources.files("titans_backends.reporting")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(folder.joinpath("page.html.j2").read_text(encoding="utf-8"))
    sheet = folder.joinpath("page.css").read_text(encoding="utf-8")
    return template.render(view=view, sheet=_colours() + sheet)


def _colours() -> str:
    """The palette as custom properties, and the classes that the charts use."""
    light = "".join(f"--{style.role}:{style.light};" for style in styles())
    dark = "".join(f"--{style.role}:{style.dark};" for style in styles())
    rules = (".s-{0}{{stroke:var(--{0})}}", ".f-{0}{{fill:var(--{0})}}", ".c-{0}{{--c:var(--{0})}}", ".d-{0}{{--d:var(--{0})}}")
    classes = "".join(rule.format(style.role) for style in styles() for rule in rules)
    return f":root{{--font:{FONT};{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{classes}\n"
