"""The site: it is built without a warning, and what its pages link to is there."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.shown: set[str] = set()  # fetched with the page, unasked
        self.anchors = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.add(value)
                if tag != "a":
                    self.shown.add(value)
            if value and name == "id":
                self.anchors.add(value)


def broken_links(site: Path) -> list[str]:
    """Links that lead nowhere, and what a page fetches from elsewhere."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # shown at any depth: its links start at the root
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                broken += [f"{path.relative_to(site)}: fetches {link}"] if link in page.shown else []
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file() or (
                target in pages and unquote(parts.fragment) not in pages[target].anchors
            ):
                broken.append(f"{path.relative_to(site)}: {link}")
    return sorted(broken)


def test_the_site_is_built_and_its_links_lead_somewhere() -> None:
    # Nothing is installed here: what is needed comes with the tests.
    tools = f"BIN={Path(sys.executable).parent}"
    done = subprocess.run(
        ["make", "--old-file=.venv/.installed", tools, "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    site = ROOT / "site"
    assert broken_links(site) == []
    # GitHub ends a paragraph where a list begins, the site's Markdown does not: that takes an empty line.
    lists = re.compile(r"<p>(?:(?!</p>).)*\n- ", re.S)
    assert not [path for path in site.rglob("*.html") if lists.search(path.read_text(encoding="utf-8"))]
    method = (site / "docs" / "method.html").read_text(encoding="utf-8")
    # Formulas are MathML, none is left as it was written.
    assert method.count("<math") > 100
    assert "$" not in method
