"""Build the site into _docs/ with what pip installs: nbdev prepares the pages, MyST-NB reads them, Sphinx writes HTML.

`make docs` runs it, from the root of the repository, where Quarto is missing. Navigation, order and titles are those of
Quarto's build: _quarto.yml and the pages themselves. `Entry` writes what both builds say about a name of the library.
"""
import ast
import inspect
import json
import posixpath
import re
import shutil
import sys
from itertools import groupby
from pathlib import Path

import yaml
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, _nbpath2html
from nbdev.process import Processor
from nbdev.serve import proc_nbs
from nbdev.showdoc import BasicMarkdownRenderer

CALLOUT = re.compile(r"(?m)^(:::+)\s*\{\.callout-(\w+).*\}")  # Quarto's
OPTION = re.compile(r"(?m)^#\|.*\n?")
LINK = re.compile(r"\]\(([^()\s#]+\.(?:ipynb|html))(#[^()\s]+)?\)")
STYLE = """
.content { width: 58em; }
section.entry { border-top: 1px solid var(--color-background-border); margin-top: 2.2rem; }
section.entry > :is(h2, h3) { font-size: 1.35em; margin-top: 1.2rem; }
section.entry > p:has(> a.source), details.source > summary { font-size: 0.8rem; line-height: 1.5; }
section.entry > p:has(> a.source) { float: right; margin: 0; }
details.source { margin-bottom: 1rem; }
details.source > summary { color: var(--color-foreground-muted); cursor: pointer; width: fit-content; }
details.source .highlight { font-size: 0.9em; }
article table.docutils { display: block; margin-left: 0; overflow-x: auto; width: fit-content; max-width: 100%; font-size: 0.9rem; }
article th { text-align: left; }
@media (max-width: 46em) { .genindextable > tbody > tr > td { display: block; width: auto !important; } }
article td:nth-child(n + 2):not(:last-child) { min-width: 7rem; }
.highlight .nn { text-decoration: none !important; }
.cell_output img { background: white; }
mjx-container { overflow-x: auto; overflow-y: hidden; max-width: 100%; }
article mjx-assistive-mml { width: 1px !important; }
"""


# --- For both builds: settings.ini names these to nbdev ---------------------------------------------------------------


def plain(text):
    """Types and defaults as one writes them: no inner modules, no addresses."""
    text = re.sub(r"(?:jax\.)?jaxlib\._jax\.", "jax.", text)
    text = re.sub(r"\b(?:typing|collections\.abc|pathlib|flax\.linen\.module|__main__)\.", "", text)
    return re.sub(r"<(?:function|class) '?([\w.]+)'?(?: at 0x\w+)?>", r"\1", text)


def call(name, sym):
    """The call of a function or class, without what Flax adds to every module."""
    signature = inspect.signature(sym)
    added = {"self"} | ({"parent", "name"} if "_Sentinel" in str(signature) else set())
    params = [plain(str(p)) for p in signature.parameters.values() if p.name not in added]
    returns = signature.return_annotation
    end = "" if inspect.isclass(sym) or returns in (None, signature.empty) else plain(f" -> {inspect.formatannotation(returns)}")
    short = f"{name}({', '.join(params)}){end}"
    return short if len(short) <= 88 else "\n    ".join([f"{name}(", *(f"{p}," for p in params)]) + f"\n){end}"


def table(head, rows):
    rows = [f"| {left} | {right.replace('|', chr(92) + '|')} |" for left, right in rows]
    return "\n".join([f"| {head} | |", "|---|---|", *rows]) if rows else ""


def folded(name, module):
    """The source of a function or class of a module, to be unfolded.

    Both builds pass HTML on and read the Markdown between its blank lines; a browser folds it without a script and
    without a network. (Quarto's and MyST's own folds are each written differently, and MyST's needs one package more.)
    """
    text = (get_config().config_path / module).read_text(encoding="utf-8")
    node = next(node for node in ast.parse(text).body if getattr(node, "name", "") == name)
    first = min(part.lineno for part in (node, *node.decorator_list))
    code = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    return f'<details class="source">\n<summary>source</summary>\n\n```python\n{code}\n```\n\n</details>'


class Entry(BasicMarkdownRenderer):
    """Signature, summary, parameters, methods and source of a name, in Markdown that both builds read."""

    def _repr_markdown_(self):
        doc = inspect.getdoc(self.sym) or ""
        doc = "" if doc.startswith(f"{self.nm}(") else doc  # what dataclass writes where nothing is written
        text, *sections = re.split(r"\n(Parameters|Returns)\n-+\n", doc)
        summary, _, more = text.strip().partition("\n\n")
        listed, rest = {}, []
        for section, body in zip(sections[::2], sections[1::2]):
            lines, _, after = body.partition("\n\n")
            listed[section] = dict(row.split(" : ", 1) for row in re.sub(r"\n\s+", " ", lines).splitlines())
            rest.append(after)
        noted = {name: note["docment"] for name, note in self.dm.dm.items() if note.get("docment")}
        returns = noted.pop("return", None)
        named = lambda notes: [(", ".join(f"`{n.strip()}`" for n in names.split(",")), note) for names, note in notes.items()]
        rows = named(noted | listed.get("Parameters", {})) + ([("*returns*", returns)] if returns else [])
        methods = [
            (f'[`{call(name, f)}`]{{id="{self.nm.lower()}.{name}"}}', inspect.getdoc(f).split("\n\n")[0].replace("\n", " "))
            for name, f in (vars(self.sym).items() if inspect.isclass(self.sym) else ())
            if inspect.isfunction(f) and f.__doc__ and (name[0] != "_" or name == "__call__")
        ]
        lookup = NbdevLookup()
        parts = [
            f"{'#' * self.title_level} {self.nm}",
            f"```python\n{call(self.nm, self.sym)}\n```",
            summary,
            more,
            table("parameter", rows),
            table("returns", named(listed.get("Returns", {}))),
            *rest,
            table("method", methods),
            f"[in the repository]({lookup.code(self.fn)}){{.source}}",
            folded(self.nm, lookup[self.fn][1]),
        ]
        return "\n\n".join(filter(None, parts))


class Mend(Processor):
    """Entries in the order of the source; links that work on the web."""

    def begin(self):
        def line(cell):
            return int((NbdevLookup().code(cell.source.split("show_doc(")[1].split(")")[0]) or "#L0").split("#L")[1])

        runs = [(entry, list(run)) for entry, run in groupby(self.nb.cells, lambda cell: "show_doc(" in (cell.source or ""))]
        self.nb.cells = [cell for entry, run in runs for cell in (sorted(run, key=line) if entry else run)]

    def cell(self, cell):
        if cell.cell_type == "markdown":
            cfg = get_config()
            away = r"\]\((?:\.\./)+(?!images/|[\w./-]+\.ipynb)([\w./-]+)"  # it leaves nbs/
            cell.source = re.sub(away, rf"]({cfg.git_url}/blob/{cfg.branch}/\1", cell.source)
            cell.source = re.sub(r"\[\[(`[^`]+`)\]\([^()]*\)\]\(", r"[\1](", cell.source)  # a name that was a link already


# --- From what nbdev prepared to what MyST-NB reads --------------------------------------------------------------------


def to_myst(cell, link, entries, home):
    """One cell: Quarto's options become tags, the entries of `show_doc` text, links those of this build."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "raw":  # the front matter that nbdev made from the title and the summary
        front = yaml.safe_load(source.strip().strip("-"))
        return {**cell, "cell_type": "markdown", "source": f"# {front['title']}\n\n{front.get('description', '')}"}
    if "show_doc(" in source and cell.get("outputs"):
        source = "".join(cell["outputs"][0]["data"]["text/markdown"]).replace('{id="', '{id="api-')
        name = re.match(r"#+ (\S+)", source)[1]
        label = "" if name.lower() in entries else f"(api-{home}-{name.lower()})=\n"  # anchors know no case: nbdev's do not, either
        entries.add(name.lower())
        source = f"```{{index}} {name}\n```\n\n```{{rst-class}} entry\n```\n\n{label}{source}"
        cell = {"cell_type": "markdown", "metadata": {}, "id": cell["id"]}
    if cell["cell_type"] == "markdown":
        return {**cell, "source": CALLOUT.sub(r"\1{\2}", LINK.sub(link, source))}
    tags = [tag for option, tag in (("echo", "remove-input"), ("output", "remove-output")) if f"#| {option}: false" in source]
    return {**cell, "source": OPTION.sub("", source), "metadata": {"tags": tags}}


def convert(page, html, proc, src, base):
    """Write a page under the name that it has on the site, so that both builds have the same addresses."""

    def link(m):
        target, anchor = m[1], m[2] or ""
        if target.startswith(base):  # a name of the library, looked up by nbdev
            return f"](#api-{posixpath.basename(target).removesuffix('.html')}-{anchor[1:]})"  # a name may be in two modules
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        return f"](/{html[target].replace('.html', '.ipynb')}{anchor})" if target in html else m[0]

    nb = json.loads((proc / page).read_text(encoding="utf-8"))
    entries = set()
    home = posixpath.basename(html[page]).removesuffix(".html")
    nb["cells"] = [to_myst(cell, link, entries, home) for cell in nb["cells"] if "AUTOGENERATED" not in "".join(cell["source"])]
    nb["metadata"] = {"language_info": {"name": "python"}}
    file = (src / html[page]).with_suffix(".ipynb")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file, nb


def sidebar(contents, caption=""):
    """The sidebar of _quarto.yml, section by section: caption, [(text or None, page)]."""
    entries = [{"href": entry} if isinstance(entry, str) else entry for entry in contents]
    yield caption, [(entry.get("text"), entry["href"]) for entry in entries if "href" in entry]
    for entry in entries:
        if "contents" in entry:
            yield from sidebar(entry["contents"], entry.get("section", ""))


def toctree(caption, entries):
    """A section of the sidebar for Sphinx, which calls the page that holds it `self`."""
    entries = [(text, "self" if page == "index.html" else page.removesuffix(".html")) for text, page in entries]
    lines = [f"{text} <{name}>" if text else name for text, name in entries]
    return "\n".join(["```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), "", *lines, "```"])


def main():
    from sphinx.application import Sphinx

    cfg, site = get_config(), yaml.safe_load(Path("_quarto.yml").read_text(encoding="utf-8"))["website"]
    proc = proc_nbs(force=True)
    work = proc / "_sphinx"
    src = work / "pages"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(proc, src, ignore=shutil.ignore_patterns("_*", "*.ipynb", "*.yml"))
    sections = list(sidebar(site["sidebar"]["contents"]))
    html = {page: _nbpath2html(Path(page)).as_posix() for _, entries in sections for _, page in entries}
    for page in html:
        file, nb = convert(page, html, proc, src, f"{cfg.doc_host}{cfg.doc_baseurl}/")
        if page == cfg.readme_nb:
            trees = [toctree(caption, [(text, html[page]) for text, page in entries]) for caption, entries in sections]
            trees = "\n\n".join([*trees, toctree("", [("Index of names", "genindex")])])
            nb["cells"].append({"cell_type": "markdown", "metadata": {}, "id": "navigation", "source": trees})
        file.write_text(json.dumps(nb), encoding="utf-8")
    (src / "_static").mkdir()
    (src / "_static/docs.css").write_text(STYLE, encoding="utf-8")
    app = Sphinx(src, None, work / "html", work / "doctrees", "html", warningiserror=True, confoverrides={
        "project": site["title"], "html_title": site["title"], "copyright": cfg.copyright, "language": "en",
        "extensions": ["myst_nb", "sphinx-mathjax-offline"], "nb_execution_mode": "off", "nb_merge_streams": True,
        "myst_enable_extensions": ["amsmath", "attrs_inline", "colon_fence", "dollarmath", "html_image"],
        "myst_heading_anchors": 4, "suppress_warnings": ["myst.header"],  # an entry is H3 wherever it stands
        "html_theme": "furo", "html_static_path": ["_static"], "html_css_files": ["docs.css"],
        "html_show_sourcelink": False, "html_copy_source": False, "smartquotes": False,
        "html_show_search_summary": False,  # summaries are fetched: the search would fail when read from a folder
    })
    app.build()
    if app.statuscode == 0:
        shutil.rmtree(cfg.doc_path, ignore_errors=True)
        shutil.move(work / "html", cfg.doc_path)
    sys.exit(app.statuscode)


if __name__ == "__main__":
    main()
