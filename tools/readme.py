"""Write README.md from nbs/index.ipynb with what pip installs: nbdev picks the cells, nbconvert writes the Markdown.

(`nbdev_readme` does the same through Quarto.) Run it from the root of the repository; `make export` does.
"""
import posixpath
import re
from pathlib import Path

import nbformat
from execnb.nbio import nb2str
from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, rm_export, rm_header_dash, strip_ansi

IMAGES = Path("nbs/images")  # pictures that index draws are stored here as index_*.png
NOTE = "<!-- Written from nbs/index.ipynb by `make export`; edit the notebook. -->\n\n"
RELATIVE = re.compile(r'(\]\(|src=")([\w./-]+\.(?:ipynb|md|png|gif|jpg|svg))')


def quarto_options(cell):
    """Obey `echo: false` and `output: false`, and drop every `#| key: value` line."""
    if cell.cell_type != "code":
        return
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE)
    if cell.directives_.get("echo:") == ["false"]:
        cell.source = ""
    if cell.directives_.get("output:") == ["false"]:
        cell.outputs = []


def links_from_root(cell):
    """A link that is relative to nbs/ becomes relative to the root, where README.md lives."""
    if cell.cell_type == "markdown":
        cell.source = RELATIVE.sub(lambda m: m[1] + posixpath.normpath(f"nbs/{m[2]}"), cell.source)


def main():
    steps = [strip_ansi, hide_line, filter_stream_, rm_header_dash, rm_export, hide_, clean_magics, quarto_options]
    page = NBProcessor("nbs/index.ipynb", procs=[*steps, links_from_root], process=True).nb
    page.metadata["language_info"] = {"name": "python"}  # nbconvert's word for the fences of code
    resources = {"unique_key": "index", "output_files_dir": IMAGES.as_posix()}
    text, resources = MarkdownExporter().from_notebook_node(nbformat.reads(nb2str(page), 4), resources)
    for stale in IMAGES.glob("index_*"):
        stale.unlink()
    for name, data in resources["outputs"].items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data)
    text = re.sub(r"```python\n\s*```\n", "", text)  # a cell whose code is hidden leaves an empty block behind
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"(?m)^[ \t]+$", "", text)).strip()
    Path("README.md").write_text(f"{NOTE}{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
