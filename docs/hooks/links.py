"""Pages of the repository on the site: README, CONTRIBUTING and the like become pages, and links that leave docs/ lead to them.

A page is written for GitHub, with links relative to its own place; here each is turned into the place on the site. What is linked in benchmarks/results/ is
copied along. A link to anything else outside docs/ stays as it is, and the strict build names it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "benchmarks/README.md": "benchmarks.md"}
"""Where the repository's own pages stand on the site."""
_LINK = re.compile(r'(!?\[[^\]]*\]\(|<(?:img|source) [^>]*?src(?:set)?=")([^)#\s"]+)')
"""A link or a picture of Markdown, or a picture written as HTML."""
_RESULTS = "benchmarks/results/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the repository's own pages, and the results that any page links to."""
    linked: set[str] = set()
    for source, target in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=_relocated(text, source)))
        linked |= _results(text, source)
    for page in Path(config.docs_dir).glob("*.md"):
        linked |= _results(page.read_text(encoding="utf-8"), f"docs/{page.name}")
    for name in sorted(linked):
        files.append(File.generated(config, f"results/{posixpath.basename(name)}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links of a page in docs/ that leave it."""
    return markdown if page.file.generated_by else _relocated(markdown, f"docs/{page.file.src_uri}")


def _results(text: str, source: str) -> set[str]:
    names = {posixpath.normpath(posixpath.join(posixpath.dirname(source), link)) for _, link in _LINK.findall(text) if "://" not in link}
    return {name for name in names if name.startswith(_RESULTS)}


def _relocated(text: str, source: str) -> str:
    """A page's text with its links as they must be on the site; what stands in a block of code stays."""
    return "".join(
        part if index % 2 else _LINK.sub(lambda found: found[1] + _place(found[2], source), part)
        for index, part in enumerate(re.split(r"(^ *```.*?^ *```)", text, flags=re.DOTALL | re.MULTILINE))
    )


def _place(link: str, source: str) -> str:
    if "://" in link:
        return link
    name = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    target = PAGES.get(name, name.removeprefix("docs/") if name.startswith("docs/") else name)
    if name.startswith(_RESULTS):
        target = f"results/{posixpath.basename(name)}"
    here = posixpath.dirname(PAGES.get(source, source.removeprefix("docs/")))
    return posixpath.relpath(target, here or ".")
