"""The site builds without a warning, needs nothing from elsewhere, leads everywhere it says, and a browser shows it whole."""
import html
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import sitemap  # noqa: E402
from browser import Browser, installed  # noqa: E402

pytestmark = pytest.mark.timeout(900)
ASSET = re.compile(r'<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)="(?:https?:)?//|url\(["\']?https?:')
PAGES = sorted(path.relative_to(ROOT / "nbs").with_suffix("").as_posix() for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
QUARTO = re.compile(r"quarto|nbdev_(?:docs|preview|prepare|readme|proc_nbs|install)", re.IGNORECASE)


def run(*words, cwd=ROOT, timeout=800):
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The built site, made once whatever the number of workers."
    home = tmp_path_factory.getbasetemp()
    home = (home.parent if "PYTEST_XDIST_WORKER" in os.environ else home) / "site"
    with FileLock(f"{home}.lock"):
        if not (home / "whole").exists():
            run("docs/prepare.py", "nbs", home / "pages")
            run("-m", "sphinx", "-q", "-b", "html", "-j", "2", "-W", "--keep-going", "-d", home / "trees", "-c", "docs", home / "pages", home / "html")
            (home / "whole").touch()
    return home / "html"


def read(path: Path) -> str: return path.read_text(encoding="utf-8")


def mapped() -> list[sitemap.Section]: return sitemap.place([page for page in PAGES if page != "index"], sitemap.sections())


def test_every_page_has_one_place():
    placed = [page for section in mapped() for group in section.groups for page in group.pages]
    assert sorted([*placed, "index"]) == PAGES


@pytest.mark.parametrize("pages, entries, wrong", [
    (["a/0"], ["b/*"], "a/0: no place"), (["a/b/0"], ["a/*"], "a/b/0: no place"),
    ([], ["a/0"], "a/0: named, and no such page"), (["a/0"], ["a/*", "a/*"], "a/0: two places")])
def test_a_map_that_does_not_fit_is_refused(pages, entries, wrong):
    groups = [sitemap.Group("", "", [entry], "") for entry in entries]
    with pytest.raises(ValueError, match=re.escape(wrong)): sitemap.place(pages, [sitemap.Section("S", "", groups, [])])


def test_the_most_exact_entry_takes_a_page():
    groups = [sitemap.Group(entry, "", [entry], "") for entry in ("*/*", "a/*", "a/0*", "a/00_x", "b/*")]
    placed = sitemap.place(["a/00_x", "a/00_y", "a/10", "c/0"], [sitemap.Section("S", "", groups, [])])
    assert {group.title: group.pages for group in placed[0].groups} == {"*/*": ["c/0"], "a/*": ["a/10"], "a/0*": ["a/00_y"], "a/00_x": ["a/00_x"]}


def test_every_page_is_in_the_sidebar_once(site):
    text = read(site / "index.html")
    tree = text[text.index('class="sidebar-tree"'):text.index('class="main"')]
    sections, links = mapped(), re.findall(r'href="([^"#]+)\.html"', tree)
    wanted = [name for section in sections for group in section.groups for name in ([group.address] if group.title else []) + group.pages]
    assert sorted(links) == sorted([*wanted, *(name for section in sections for name in section.other)])
    assert re.findall(r'caption-text">([^<]+)<', tree) == [section.title for section in sections]


def test_every_page_is_whole(site):
    assert [page for page in PAGES if not (site / f"{page}.html").exists()] == []
    bare = [page for page in PAGES if len(nbformat.read(ROOT / "nbs" / f"{page}.ipynb", 4).cells) < 3]
    assert bare == []


def test_no_page_loads_anything_from_elsewhere(site):
    found = [path.relative_to(site).as_posix() for kind in ("html", "css") for path in site.rglob(f"*.{kind}") if ASSET.search(read(path))]
    assert found == []
    assert (site / "_static" / "mathjax" / "tex-svg-full.js").stat().st_size > 1_000_000


def test_every_link_and_anchor_works(site):
    @cache
    def text(path: Path) -> str: return read(path)

    @cache
    def anchors(path: Path): return set(re.findall(r'\b(?:id|name)="([^"]+)"', text(path)))

    @cache
    def leads(folder: Path, name: str, anchor: str) -> bool:
        target = (folder / name).resolve()
        return target.is_file() and (not anchor or target.suffix != ".html" or anchor in anchors(target))

    broken = set()
    for path in site.rglob("*.html"):
        for link in set(re.findall(r'<\w+\b[^>]*\s(?:href|src)="([^"]*)"', text(path))):
            if re.match(r"\w+:|//|#svg-", link): continue
            name, _, anchor = unquote(html.unescape(link)).partition("#")
            if not leads(path.parent, name.partition("?")[0] or path.name, anchor): broken.add(f"{path.relative_to(site)}: {link}")
    assert sorted(broken) == []


def test_tables_of_parameters_have_shapes_and_sources(site):
    text = read(site / "06_losses" / "08_prefvec.html")
    entry = text[text.index('id="reprpo.losses.prefvec.prefvec"'):]
    assert all(word in entry for word in ("weight of the weighted terms together", "Float[Tensor", "<em>returns</em>"))
    assert re.search(r"https://github.com/[\w/.-]+/reprpo/losses/prefvec.py#L\d+-L\d+", entry) and "_modules/reprpo/losses/prefvec.html#prefvec" in entry


LOOK = """(async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  const spans = [...document.querySelectorAll(".math")], found = [];
  const undrawn = spans.filter(span => !span.querySelector("mjx-container")).length;
  if (undrawn) found.push(`${undrawn} of ${spans.length} formulas not drawn`);
  const wrong = document.querySelectorAll("[data-mml-node=merror]").length;
  if (wrong) found.push(`${wrong} formulas with an error`);
  const article = document.querySelector("article"), walk = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent, parent = walk.currentNode.parentElement;
    if (!parent.closest("pre, code, script, style, mjx-container") && /\\\\[()\\[\\]]|\\$\\$/.test(text)) found.push(`raw: ${text.trim().slice(0, 60)}`);
  }
  const pictures = [...document.images].filter(each => !each.complete || !each.naturalWidth).length;
  if (pictures) found.push(`${pictures} pictures missing`);
  const width = document.documentElement.scrollWidth;
  if (width > 390) found.push(`${width} pixels wide on a telephone of 390`);
  return found;
})()"""


@pytest.fixture(scope="module")
def browser():
    if not installed(): pytest.skip("no Chromium on this machine: apt-get install chromium")
    with Browser() as process: yield process


def test_a_browser_shows_every_page(site, browser):
    pages = sorted(path.relative_to(site) for path in site.rglob("*.html"))
    listings = [page for page in pages if page.parts[0] == "_modules"]  # of source code, all alike
    pages = [page for page in pages if page.parts[0] != "_modules" or page in listings[::10]]
    tab, found = browser.tab(), []  # one: several windows wait for each other
    tab.width(390)
    for page in pages:
        tab.open((site / page).as_uri())
        found += [f"{page}: {complaint}" for complaint in [*tab.run(LOOK), *tab.complaints()]]
    assert found == []


def test_what_is_wrong_with_a_page_is_seen(tmp_path, browser):
    page = tmp_path / "page.html"
    page.write_text(r'''<article><p>raw \(x\)</p><span class="math">y</span><img src="none.png"><div style="width:900px">wide</div>
                       <script>console.error("boo"); none();</script></article>''', encoding="utf-8")
    tab = browser.tab()
    tab.width(390)
    tab.open(page.as_uri())
    found = " ".join([*tab.run(LOOK), *tab.complaints()])
    wanted = ("formulas not drawn", "raw: ", "pictures missing", "pixels wide", "console: ", "exception: ", "request: ")
    assert [word for word in wanted if word not in found] == []


def test_search_finds_prefvec(site, browser):
    tab = browser.tab()
    tab.open((site / "search.html").as_uri() + "?q=PrefVec")
    first = tab.run("""new Promise(done => {
      const look = () => { const a = document.querySelector("#search-results li a"); a ? done(a.getAttribute("href")) : setTimeout(look, 50); };
      look();
      setTimeout(() => done("nothing found"), 20000);
    })""")
    assert "06_losses/08_prefvec.html" in first
    assert tab.complaints() == []


def test_nothing_wants_quarto(tmp_path):
    files = [ROOT / "Makefile", *(ROOT / ".github").rglob("*.yml"), *(ROOT / ".ci").iterdir(), *(ROOT / ".githooks").iterdir()]
    assert [path for path in files if QUARTO.search(read(path))] == []
    sources = ["#| default_exp one", "#| export\ndef two(): return 2", "assert two() == 2"]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text(read(ROOT / "settings.ini"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "nbs" / "00_one.ipynb")
    refuse = "import nbdev.quarto as q; names = [n for n in dir(q) if 'install' in n or n == '_ensure_quarto']; assert names"
    refuse += "; [setattr(q, n, lambda *a, **k: (_ for _ in ()).throw(SystemExit('Quarto is wanted'))) for n in names]"
    for name in ("export", "clean", "test"): run("-c", f"{refuse}; import sys; sys.argv[1:] = []; from nbdev.cli import nbdev_{name} as do; do()", cwd=tmp_path)
    assert "def two" in read(tmp_path / "reprpo" / "one.py")
