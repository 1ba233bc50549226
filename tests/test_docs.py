"""The site builds without a warning and needs nothing from elsewhere."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ASSET = re.compile(r'<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//')


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    home = tmp_path_factory.mktemp("site")
    for words in (["docs/prepare.py", "nbs", home / "pages"],
                  ["-m", "sphinx", "-q", "-b", "html", "-W", "--keep-going", "-c", "docs", home / "pages", home / "html"]):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
    return home / "html"


def test_every_notebook_has_a_page(site):
    notebooks = {path.relative_to(ROOT / "nbs").with_suffix("") for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert {str(page) for page in notebooks if not (site / page).with_suffix(".html").exists()} == set()


def test_every_page_is_in_the_list(site):
    index = (site / "index.html").read_text(encoding="utf-8")
    pages = [path.relative_to(site).as_posix() for path in site.glob("[0-9]*/*.html")]
    assert pages and [page for page in pages if f'href="{page}"' not in index] == []


def test_no_page_loads_anything_from_elsewhere(site):
    assert [path.name for path in site.rglob("*.html") if ASSET.search(path.read_text(encoding="utf-8"))] == []
    assert (site / "_static" / "mathjax" / "tex-svg-full.js").stat().st_size > 1_000_000
