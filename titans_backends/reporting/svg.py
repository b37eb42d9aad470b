"""A matplotlib figure as a small SVG: colours become classes that a style sheet sets for light and dark, text stays text, names do not clash.

Two forms: a part of a page, which has the classes; and a file of its own, which brings them. Neither asks for anything from elsewhere.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure

from titans_backends.reporting.palette import styles

__all__ = ["FONT", "inlined", "standalone", "style_sheet"]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_ROLES = {style.light: style.role for style in styles()}
_DEFAULTS = {"stroke-linejoin": "round", "stroke-linecap": ("square", "butt"), "fill-opacity": "1", "stroke-opacity": "1"}


def inlined(figure: Figure, name: str, title: str, notes: Mapping[str, Sequence[str]] | None = None) -> str:
    """The figure as an element of an HTML page; `name` starts every id in it, `title` is what a screen reader says.

    `notes`: by the gid of a line, what its marks say when they are pointed at.
    """
    return _text(_tidy(figure, name, title, notes or {}))


def standalone(figure: Figure, title: str) -> str:
    """The figure as a file of its own, with its own style sheet for light and dark."""
    root = _tidy(figure, "p", title, {})
    root.set("xmlns", _SVG)
    width, height = root.get("viewBox", "0 0 1 1").split()[2:]
    root.set("width", width)
    root.set("height", height)
    sheet = ElementTree.Element("style")
    sheet.text = style_sheet()
    paper = ElementTree.Element("rect", {"class": "f-paper", "width": width, "height": height})
    root.insert(1, sheet)
    root.insert(2, paper)
    return _text(root) + "\n"


def style_sheet() -> str:
    """The classes of every colour, for a light page and a dark one."""
    light = "".join(f".s-{s.role}{{stroke:{s.light}}}.f-{s.role}{{fill:{s.light}}}" for s in styles())
    dark = "".join(f".s-{s.role}{{stroke:{s.dark}}}.f-{s.role}{{fill:{s.dark}}}" for s in styles())
    return f"text{{font-family:{FONT}}}{light}@media(prefers-color-scheme:dark){{{dark}}}"


def _tidy(figure: Figure, name: str, title: str, notes: Mapping[str, Sequence[str]]) -> ElementTree.Element:
    root = ElementTree.fromstring(_drawn(figure))
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
    for child in list(root):
        if child.tag not in ("g", "defs"):  # matplotlib's licence and date
            root.remove(child)
    for gid, said in notes.items():
        _note(root, gid, said)
    _rename(root, name)
    for parent in list(root.iter()):
        _recolour(parent)
        for child in list(parent):
            if child.tag == "style" or (child.tag == "path" and child.get("d") is None):
                parent.remove(child)
    _unwrap(root)
    for key in ("width", "height", "version", "xmlns"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", title)
    told = ElementTree.Element("title")
    told.text = title
    root.insert(0, told)
    return root


def _drawn(figure: Figure) -> str:
    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "titans_backends"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return stream.getvalue()


def _note(root: ElementTree.Element, gid: str, said: Sequence[str]) -> None:
    """A tooltip for every mark of a line, in the order of its points."""
    group = next((element for element in root.iter("g") if element.get("id") == gid), None)
    marks = [] if group is None else list(group.iter("use"))
    for mark, text in zip(marks, said, strict=False):
        ElementTree.SubElement(mark, "title").text = text


def _rename(root: ElementTree.Element, name: str) -> None:
    """Only what is referred to keeps an id, and it begins with the figure's own name."""
    wanted = {element.get(_LINK, "").removeprefix("#") for element in root.iter()}
    wanted |= {found for element in root.iter() for found in re.findall(r"url\(#([^)]+)\)", element.get("clip-path", ""))}
    short = {old: f"{name}-{index}" for index, old in enumerate(sorted(wanted - {""}))}
    for element in root.iter():
        old = element.attrib.pop("id", "")
        if old in short:
            element.set("id", short[old])
        link = element.attrib.pop(_LINK, "").removeprefix("#")
        if link:
            element.set("href", f"#{short[link]}")
        clip = re.fullmatch(r"url\(#([^)]+)\)", element.get("clip-path", ""))
        if clip:
            element.set("clip-path", f"url(#{short[clip[1]]})")


def _recolour(element: ElementTree.Element) -> None:
    """Colours of the palette become classes; what is a default anyway goes."""
    style = dict(pair.strip().split(": ", 1) for pair in element.attrib.pop("style", "").split(";") if ": " in pair)
    classes = []
    for paint, letter in (("stroke", "s"), ("fill", "f")):
        role = _ROLES.get(style.get(paint, ""))
        if role is not None:
            classes.append(f"{letter}-{role}")
            del style[paint]
    if element.tag == "text":
        style.pop("font-family", None)
        font = style.pop("font", "")
        size, weight = re.search(r"([\d.]+)px", font), re.search(r"\b([5-9]00|bold)\b", font)
        style |= {"font-size": f"{float(size[1]):g}px"} if size else {}
        style |= {"font-weight": "600"} if weight else {}
    style = {key: value for key, value in style.items() if value not in _DEFAULTS.get(key, ())}
    if classes:
        element.set("class", " ".join(classes))
    if style:
        element.set("style", ";".join(f"{key}:{value}" for key, value in style.items()))
    for key in ("d", "transform", "x", "y", "width", "height"):
        if key in element.attrib:
            element.set(key, re.sub(r"-?\d+\.\d{2,}", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), element.attrib[key]))
    if element.text is not None and not element.text.strip():
        element.text = None
    element.tail = None


def _unwrap(parent: ElementTree.Element) -> None:
    """Groups that say nothing give way to what they hold."""
    for child in list(parent):
        _unwrap(child)
        if child.tag == "g" and not child.attrib:
            at = list(parent).index(child)
            parent.remove(child)
            for offset, inner in enumerate(list(child)):
                parent.insert(at + offset, inner)


def _text(root: ElementTree.Element) -> str:
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)
