"""Guards on the repository: what the notebooks promise, and what no notebook can check about itself.

Sizes count code lines: neither blank lines nor comments nor docstrings.
"""
import ast
import base64
import configparser
import io
import json
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TOOLS = Path(sys.executable).parent

CELLS_PER_PAGE = 80
LINES_PER_CELL = 60
LINES_PER_FUNCTION = 30
LINES_PER_CLASS = 60
CHARACTERS_PER_LINE = 120  # of the library; pages, tests and tools may go to 140
BYTES_PER_PICTURE, BYTES_PER_FILM = 60_000, 450_000


def repository_files():
    """Every file that is tracked or could be: what `git add --all` would take."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout
    return sorted({Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()})


FILES = repository_files()
PAGES = [f for f in FILES if f.parts[0] == "nbs" and f.suffix == ".ipynb"]
MODULES = [f for f in FILES if f.parts[0] == "ssm_lib" and f.suffix == ".py" and f.name != "_modidx.py"]

each_page = pytest.mark.parametrize("page", PAGES, ids=str)
each_module = pytest.mark.parametrize("module", MODULES, ids=str)


def cells(page, kind=None):
    """The cells of a page as (index, source, outputs), all or those of one kind."""
    found = json.loads((ROOT / page).read_text(encoding="utf-8"))["cells"]
    return [
        (i, "".join(cell["source"]), cell.get("outputs", []))
        for i, cell in enumerate(found)
        if kind in (None, cell["cell_type"])
    ]


def parse(source):
    """The syntax tree of a cell, without its magics."""
    return ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", source))


def code_lines(source):
    """The numbers of the lines that hold code."""
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in empty:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


# --- The package, the notebooks and README.md are in step -------------------------------------------------------------


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """The names of the files that change when a copy of the repository is built again from its notebooks."""
    copy = tmp_path_factory.mktemp("copy")
    for name in FILES:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    before = {name: (copy / name).read_bytes() for name in FILES}
    for module in (copy / "ssm_lib").rglob("*.py"):
        if module.name != "__init__.py":
            module.unlink()
    for command in ["nbdev_export"], ["nbdev_clean"], ["python", "tools/readme.py"]:
        subprocess.run([TOOLS / command[0], *command[1:]], cwd=copy, check=True)
    after = {f.relative_to(copy): f.read_bytes() for f in copy.rglob("*") if f.is_file()}
    return sorted(str(name) for name in before.keys() | after.keys() if before.get(name) != after.get(name))


@pytest.mark.parametrize("what", ["ssm_lib/", "nbs/", "README.md"])
def test_in_step_with_the_notebooks(rebuilt, what):
    changed = [name for name in rebuilt if name.startswith(what)]
    assert not changed, f"{changed} differ from what the notebooks make: run `make export` (or edit the notebook)"


def test_building_touches_nothing_else(rebuilt):
    changed = [name for name in rebuilt if not name.startswith(("ssm_lib/", "nbs/", "README.md"))]
    assert not changed, f"`make export` writes {changed}: ignore them or keep the tool from writing them"


# --- Imports ----------------------------------------------------------------------------------------------------------


def home_of_modules():
    """Which notebook makes which module, by the notebook's `#| default_exp`."""
    homes = {}
    for page in PAGES:
        for _, source, _ in cells(page, "code"):
            for name in re.findall(r"(?m)^#\|\s*default_exp\s+(\S+)", source):
                assert name not in homes, f"{homes[name]} and {page} both export to {name}"
                homes[name] = page
    return homes


def imports(module):
    """(line, dotted name) of everything a module imports, inside functions too; relative names made absolute."""
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["ssm_lib" if node.level else "", node.module]))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def test_imports_point_one_way():
    homes = home_of_modules()
    wrong = []
    for module in MODULES:
        if module.name == "__init__.py":
            continue
        assert module.stem in homes, f"{module} has no notebook: no page says `#| default_exp {module.stem}`"
        for line, name in imports(module):
            if not f"{name}.".startswith("ssm_lib."):
                continue
            target = f"{name}..".split(".")[1]
            if target not in homes:
                wrong.append(f"{module}:{line} imports {name}: import from the module that defines it")
            elif not homes[target].name < homes[module.stem].name:
                wrong.append(f"{module}:{line} imports {name}: {homes[module.stem].name} is below {homes[target].name}")
    assert not wrong, "\n".join(wrong)


@each_module
def test_imports_are_declared(module):
    config = configparser.ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini")
    settings = config["DEFAULT"]
    tools = ("dev_requirements", "docs_requirements")
    declared = " ".join(settings[key] for key in settings if key.endswith("requirements") and key not in tools)
    known = {re.split(r"[<>=!~\[]", requirement)[0] for requirement in declared.split()}
    modules = {"pillow": "PIL", "orbax-checkpoint": "orbax"}  # named otherwise than their package
    known |= set(sys.stdlib_module_names) | {"ssm_lib"} | {modules[name] for name in modules.keys() & known}
    wrong = [f"line {line}: {name}" for line, name in imports(module) if name.split(".")[0] not in known]
    assert not wrong, f"{module} imports what settings.ini does not ask for: {wrong}"
    wild = [f"line {line}: {name}" for line, name in imports(module) if name.endswith(".*")]
    assert not wild, f"{module} imports with a wildcard; name what is needed: {wild}"


def test_importing_the_library_is_light():
    heavy = "nbdev fastcore IPython matplotlib pandas orbax tensorstore xarray exponax equinox tqdm PIL scipy pytest"
    script = (
        "import sys, jax, flax.linen, optax; before = set(sys.modules); import ssm_lib;"
        f"print(*sorted(set({heavy.split()}) & (set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    found = run.stdout.split()
    assert not found, f"`import ssm_lib` also imports {found}: import them inside the function that uses them"


# --- Pages ------------------------------------------------------------------------------------------------------------


@each_page
def test_page_opens_with_title_and_summary(page):
    source = cells(page)[0][1]
    title, summary = re.match(r"# \S", source), re.search(r"(?m)^> \S", source)
    assert title and summary, f"the first cell of {page} must hold `# Title` and a one-line `> summary`"


@each_page
def test_page_is_short(page):
    assert len(cells(page)) <= CELLS_PER_PAGE, f"{page} has {len(cells(page))} cells; at most {CELLS_PER_PAGE}"
    for i, source, _ in cells(page, "code"):
        if re.search(r"(?m)^#\|\s*export", source):
            size = len(code_lines(source))
            assert size <= LINES_PER_CELL, f"{page}, cell {i}: {size} exported code lines; at most {LINES_PER_CELL}"


def statements(body):
    """Statements that run when the cell runs: those of the cell, and within its for, with and try."""
    for node in body:
        yield node
        if isinstance(node, ast.For | ast.With | ast.Try):
            yield from statements(node.body)
            yield from (s for handler in getattr(node, "handlers", []) for s in statements(handler.body))


def must_show(source):
    """Whether a cell that was run has an output for certain.

    It has if it calls print or display, if it opens a matplotlib figure and does not close it, or if it ends in an
    expression other than a call (a call may return None) without a semicolon.
    """
    body = parse(source).body
    for node in statements(body):
        value = getattr(node, "value", None)
        if isinstance(node, ast.Expr | ast.Assign) and isinstance(value, ast.Call):
            called = ast.unparse(value.func)
            if called in ("print", "display"):
                return True
            if called in ("plt.subplots", "plt.figure", "plt.plot", "plt.imshow") and "plt.close" not in source:
                return True
    ends_in_value = bool(body) and isinstance(body[-1], ast.Expr) and not isinstance(body[-1].value, ast.Call)
    return ends_in_value and not source.rstrip().endswith(";")


@each_page
def test_page_was_run(page):
    code = cells(page, "code")
    bare = [i for i, source, outputs in code if not outputs and must_show(source)]
    assert not bare, f"{page}: cells {bare} show something but have no output stored: run `make pages PAGES={page}`"
    shown = any(outputs for _, _, outputs in code)
    assert shown or not code, f"{page} shows no output at all: run `make pages PAGES={page}`, or let it show something"


@each_page
def test_outputs_are_small_and_repeatable(page):
    for i, _, outputs in cells(page, "code"):
        for output in outputs:
            where = f"{page}, cell {i}"
            assert output["output_type"] != "error", f"{where} ends in an error"
            assert output.get("name") != "stderr", f"{where} stores a warning or a progress bar (stderr)"
            for mime, data in {"text/plain": output.get("text", ""), **output.get("data", {})}.items():
                data = "".join(data) if isinstance(data, str | list) else json.dumps(data)
                binary = mime.startswith("image/") and mime != "image/svg+xml"
                size = len(base64.b64decode(data) if binary else data.encode())
                assert size <= BYTES_PER_PICTURE, f"{where}: {mime} of {size} bytes; at most {BYTES_PER_PICTURE}"
                address = None if binary else re.search(r"\b0x[0-9a-f]{8,}", data)
                assert not address, f"{where} shows the memory address {address[0]}, which changes from run to run"


def test_committed_pictures_are_small():
    pictures = [f for f in FILES if f.suffix in {".png", ".gif", ".jpg", ".svg"}]
    most = lambda f: BYTES_PER_FILM if f.suffix == ".gif" else BYTES_PER_PICTURE
    large = {str(f): size for f in pictures if (size := (ROOT / f).stat().st_size) > most(f)}
    assert not large, f"{large}: at most {BYTES_PER_PICTURE} bytes a picture, {BYTES_PER_FILM} a film"


def sidebar(contents):
    """Every notebook that the sidebar names, section by section."""
    for entry in contents:
        entry = {"href": entry} if isinstance(entry, str) else entry
        yield from (entry[key] for key in ("href", "file") if str(entry.get(key)).endswith(".ipynb"))
        yield from sidebar(entry.get("contents", []))


def test_sidebar_names_every_page():
    quarto = (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    assert (ROOT / "nbs/_quarto.yml").read_text(encoding="utf-8") == quarto, "nbs/_quarto.yml must link to _quarto.yml"
    named = list(sidebar(yaml.safe_load(quarto)["website"]["sidebar"]["contents"]))
    there = [page.relative_to("nbs").as_posix() for page in PAGES]
    assert sorted(named) == sorted(there), (
        f"the sidebar of _quarto.yml misses {sorted(set(there) - set(named))}, "
        f"names what is not there {sorted(set(named) - set(there))}, "
        f"and names twice {sorted({n for n in named if named.count(n) > 1})}"
    )


# --- Code -------------------------------------------------------------------------------------------------------------


@each_module
def test_functions_and_classes_are_short(module):
    source = (ROOT / module).read_text(encoding="utf-8")
    lines = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            limit = LINES_PER_CLASS if isinstance(node, ast.ClassDef) else LINES_PER_FUNCTION
            size = len(lines & set(range(node.body[0].lineno, node.end_lineno + 1)))
            assert size <= limit, f"{module}:{node.lineno} {node.name} has a body of {size} code lines; at most {limit}"


@each_page
def test_lines_of_the_library_are_short(page):
    exported = [source.splitlines() for _, source, _ in cells(page, "code") if source.startswith("#| export")]
    long = [line.strip() for lines in exported for line in lines if len(line) > CHARACTERS_PER_LINE]
    assert not long, f"{page}: over {CHARACTERS_PER_LINE} characters:\n" + "\n".join(long)


def test_no_paths_of_one_machine():
    path = re.compile(r"(?<![\w.:/+-])/(?:home|root|tmp|work|Users)/|\b[A-Z]:\\Users")
    found = []
    for name in FILES:
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name}:{n} {line.strip()[:80]}" for n, line in enumerate(text.splitlines(), 1) if path.search(line)]
    assert not found, "paths of one machine:\n" + "\n".join(found)
