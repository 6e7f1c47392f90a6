"""Follow every link of _docs/ and of the Markdown at the root with a parser, without a browser or a network: `make docs-links`.

An address of this repository on its forge is looked up here, line number included; other addresses are not followed.
"""
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin
from nbdev.config import get_config

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_docs"
PAGES = sorted(page for page in SITE.rglob("*.html") if "_static" not in page.parts)
TEXTS = sorted(ROOT.glob("*.md"))
CFG = get_config()
HERE = {f"{CFG.git_url}/{kind}/{CFG.branch}/": ROOT for kind in ("blob", "tree")} | {f"{CFG.doc_host}{CFG.doc_baseurl}/": SITE}
MARKDOWN = MarkdownIt().enable("table").use(anchors_plugin, max_level=6)  # which names headings as forges do


class Page(HTMLParser):
    """The links of a page, and what in it can be linked to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        self.links |= {attributes[name] for name in ("href", "src") if attributes.get(name)}


@cache
def read(file):
    text = file.read_text(encoding="utf-8")
    return Page(MARKDOWN.render(text) if file.suffix == ".md" else text)


def place(link, file):
    """The file that a link in another one names, and the folder that holds all such; None where it is not ours."""
    parts = urlsplit(link)
    for address, folder in HERE.items():
        if f"{link}/".startswith(address):
            return folder / unquote(parts.path[len(urlsplit(address).path) :]), folder
    if parts.scheme or parts.netloc:
        return None
    return file.parent / unquote(parts.path) if parts.path else file, SITE if file.is_relative_to(SITE) else ROOT


def leads_somewhere(link, file):
    """Whether what a link names is there: the file, and in it the anchor or the line."""
    found, anchor = place(link, file), urlsplit(link).fragment
    if not found:
        return True
    target, home = found[0].resolve(), found[1]
    target = target / "index.html" if home == SITE and target.is_dir() else target
    if not (target.exists() and target.is_relative_to(home)):
        return False
    if not anchor or target.suffix in (".html", ".md"):
        return not anchor or unquote(anchor) in read(target).ids
    line = re.fullmatch(r"L(\d+)", anchor)
    return bool(line) and 0 < int(line[1]) <= len(target.read_text(encoding="utf-8").splitlines())


def test_the_site_is_built():
    assert {"index.html", "genindex.html", "search.html"} <= {page.name for page in PAGES}, "run `make docs QUARTO=` first"


@pytest.mark.parametrize("file", [*PAGES, *TEXTS], ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    assert not [link for link in sorted(read(file).links) if not leads_somewhere(link, file)]


@pytest.mark.parametrize("link", [
    "s5.html", "#api-s5-s5ssm", "convolution.html#api-convolution-kernel-poles", "tutorials/../s5.html?v=1#", "https://example.org/nowhere",
    f"{CFG.git_url}/blob/{CFG.branch}/Makefile#L1", f"{CFG.git_url}/tree/{CFG.branch}/nbs", f"{CFG.doc_host}{CFG.doc_baseurl}",
])
def test_right_links_pass(link):
    assert leads_somewhere(link, SITE / "s5.html")


@pytest.mark.parametrize("link", [
    "nowhere.html", "#nowhere", "convolution.html#nowhere", "../README.md", "nowhere/s5.html", f"{CFG.doc_host}{CFG.doc_baseurl}/nowhere",
    *(f"{CFG.git_url}/blob/{CFG.branch}/{path}" for path in ("nowhere.py", "Makefile#L99999", "Makefile#L0", "Makefile#LNone")),
])
def test_broken_links_are_found(link):
    assert not leads_somewhere(link, SITE / "s5.html")
