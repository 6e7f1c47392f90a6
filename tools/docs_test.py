"""Open every page of _docs/ in Chromium, wide and narrow, light and dark: `make docs-test`. Pictures go to runs/docs/.

Chromium is the one on the PATH, or the one that the variable CHROMIUM names.
"""
import os
import re
import shutil
import threading
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urljoin

import pytest
from nbdev.config import get_config
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_docs"
PICTURES = ROOT / "runs/docs"  # what the eye should see, too: five pages at two widths, light and dark
PAGES = sorted(page.relative_to(SITE).as_posix() for page in SITE.rglob("*.html") if "_static" not in page.parts)
SHOWN = ["index.html", "discretization.html", "hippo.html", "s5.html", "plots.html"]
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic"]

# What a reader must never see outside code: LaTeX, and the directives of Quarto, MyST and nbdev.
RAW = re.compile(r"(?m)\$\$|\\[(\[)\]]|\\[a-zA-Z]{2,}|:::|\{\{<|\{\{?(?:[#.]\w|\w+=)|\]\(|^#\||0x[0-9a-f]{8}")
TEXT = """() => {
    const article = document.querySelector('article').cloneNode(true);
    for (const e of article.querySelectorAll('pre, code, script, style, mjx-assistive-mml, .headerlink')) e.remove();
    return article.textContent;
}"""
NO_LINK = """git => [...document.querySelectorAll('section.entry')].filter(
    e => !e.querySelector(`:scope > p > a.source[href^="${git}/blob/"]`)?.href.match(/[.]py#L\\d+$/)).map(e => e.id)"""
NO_CODE = """() => [...document.querySelectorAll('section.entry')].filter(e => {
    const name = e.querySelector('h2, h3').firstChild.textContent;
    const fold = e.querySelector(':scope > details.source'), code = fold?.querySelector('pre');
    if (!code || code.checkVisibility()) return true;
    fold.querySelector('summary').click();
    const shown = code.checkVisibility() && code.clientHeight > 0;
    fold.querySelector('summary').click();
    return !shown || !RegExp(`^(def|class) ${name}\\\\b`, 'm').test(code.textContent) || !code.querySelector('.k');
}).map(e => e.id)"""
UNSET = """() => [...document.querySelectorAll('article .math, mjx-merror, .problematic')].filter(
    e => !e.matches('.math') || !e.querySelector('mjx-container')).map(e => e.textContent)"""
BLANK = """() => [...document.querySelectorAll('article img')].filter(img => {
    if (!img.complete || !img.naturalWidth) return true;
    const canvas = Object.assign(document.createElement('canvas'), {width: 64, height: 64});
    const context = canvas.getContext('2d');
    context.drawImage(img, 0, 0, 64, 64);
    const data = new Uint32Array(context.getImageData(0, 0, 64, 64).data.buffer);
    return data.every(pixel => pixel === data[0]);
}).map(img => img.src)"""
WIDER = """() => [...document.querySelectorAll('article *')].filter(e => {
    if (e.getBoundingClientRect().right <= innerWidth + 1) return false;
    for (let p = e; p.tagName !== 'ARTICLE'; p = p.parentElement) if (getComputedStyle(p).overflowX !== 'visible') return false;
    return true;
}).map(e => e.tagName + ': ' + e.textContent.slice(0, 60))"""


@pytest.fixture(scope="session")
def site():
    """The address at which _docs/ is served on this machine."""
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):  # browsers ask for an icon of their own accord
            if self.path != "/favicon.ico":
                return super().do_GET()
            self.send_response(204)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        pytest.exit("no Chromium found: install it (Debian: apt-get install chromium) or name one, CHROMIUM=/path/to/it", 2)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=QUIET, chromium_sandbox=False)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def opened(site, browser):
    """Open a page and wait until its mathematics stands; what went wrong on the way is in `page.wrong`."""
    tabs = {}

    def new_tab(size, theme):
        width, height = WIDTHS[size]
        page = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme).new_page()
        page.wrong = []
        page.on("console", lambda m: page.wrong.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.wrong.append(f"script: {error}"))
        page.on("requestfailed", lambda r: page.wrong.append(f"failed: {r.url}"))
        page.on("response", lambda r: page.wrong.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
        here = site, SITE.as_uri(), "data:", "blob:"
        page.on("request", lambda r: page.wrong.append(f"leaves: {r.url}") if not r.url.startswith(here) else None)
        return page

    def open_page(address, size="desktop", theme="light"):
        page = tabs[size, theme] = tabs.get((size, theme)) or new_tab(size, theme)
        page.wrong.clear()
        page.goto(urljoin(site, address), wait_until="load")
        page.evaluate("async () => { await window.MathJax?.startup?.promise; await document.fonts.ready; }")
        return page

    return open_page


@pytest.fixture(scope="session")
def seen(opened):
    """What each page shows, looked at once, when it is first asked for."""
    @cache
    def look(name):
        page = opened(name)
        return {
            "wrong": list(page.wrong), "text": page.evaluate(TEXT), "blank": page.evaluate(BLANK),
            "unset": page.evaluate(UNSET), "unlinked": page.evaluate(NO_LINK, get_config().git_url), "uncoded": page.evaluate(NO_CODE),
        }

    return look


each_page = pytest.mark.parametrize("name", PAGES)


@each_page
def test_opens_without_errors(seen, name):
    assert not seen(name)["wrong"]


@each_page
def test_shows_no_source(seen, name):
    text = seen(name)["text"]
    assert not [text[max(0, m.start() - 40) : m.end() + 40] for m in RAW.finditer(text)]


@each_page
def test_formulas_are_set(seen, name):
    assert not seen(name)["unset"]


@each_page
def test_entries_link_to_their_source(seen, name):
    assert not seen(name)["unlinked"]


@each_page
def test_entries_unfold_their_source(seen, name):
    """Folded at first; then the function or class of that name, in colour."""
    assert not seen(name)["uncoded"]


def test_every_public_name_has_an_entry(opened):
    import ssm_lib

    public = {name for name, value in vars(ssm_lib).items() if name[0] != "_" and callable(value)}
    listed = set(opened("genindex.html").locator("article a").all_inner_texts())
    assert not public - listed and len(public) > 50


@each_page
def test_pictures_are_not_blank(seen, name):
    assert not seen(name)["blank"]


@each_page
def test_fits_a_phone(opened, name):
    page = opened(name, "phone", "dark")
    assert not page.evaluate(WIDER)
    assert page.evaluate("() => Math.max(...['html', '.content'].map(s => document.querySelector(s).scrollWidth))") <= WIDTHS["phone"][0]


@pytest.mark.parametrize(
    "query, target", [("S5SSM", "s5.html#api-s5-s5ssm"), ("rollout", "rollout.html"), ("linear_scan", "scan.html#linear-scan")]
)
def test_search_finds(opened, query, target):
    page = opened(f"search.html?q={query}")
    page.wait_for_selector(f"#search-results a[href*='{target}']")
    assert not page.wrong


@pytest.mark.parametrize("address", ["s5.html", "search.html?q=S5SSM"])
def test_works_from_a_folder(opened, address):
    """The same pages, read from the disk without a server."""
    page = opened(f"{SITE.as_uri()}/{address}")
    page.wait_for_selector("article mjx-container" if "?" not in address else "#search-results a[href*='s5.html#api-s5-s5ssm']")
    assert not page.wrong


def test_dark_is_dark(opened):
    shade = "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    assert opened("index.html", theme="dark").evaluate(shade) < 200 < 600 < opened("index.html").evaluate(shade)


@pytest.mark.parametrize("name", SHOWN)
def test_photograph(opened, name):
    PICTURES.mkdir(parents=True, exist_ok=True)
    for size in WIDTHS:
        for theme in "light", "dark":
            file = PICTURES / f"{Path(name).stem}_{size}_{theme}.png"
            opened(name, size, theme).screenshot(path=file, full_page=True)
            assert file.stat().st_size > 10_000
