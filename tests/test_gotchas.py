"""Every row of the gotchas is guarded by something that exists, every known pain has its row, and errors find theirs."""
import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat
import pytest

from reprpo.cli import call
from reprpo.errors import UserError
from reprpo.gotchas.row import slug
from reprpo.gotchas.table import GOTCHAS, THEMES, address

ROOT = Path(__file__).parent.parent
GUARDS = sorted({(name, guard) for name, g in GOTCHAS.items() for guard in g.guards})
ASSERTS = re.compile(r"^\s*(?:[^#\n]*[:\s])?(?:assert |test_\w+\(|with expect_fail\()", re.MULTILINE)
PAINS = {  # what has hurt, in words: its rows
    "the adapter that was trained is not the one in use": ["wrong-adapter", "not-the-base"],
    "a saved adapter was judged as a fresh one": ["untrained-adapter"],
    "no gradient with quantised weights or checkpointing": ["no-graph"],
    "texts cut without a word": ["silent-truncation"],
    "prompt in the loss, or the wrong half masked": ["prompt-in-mean"],
    "masks and targets one place off": ["off-by-one"],
    "batches weighted by tokens": ["token-weighted-batch"],
    "terms without a common size": ["no-common-unit"],
    "signs": ["wrong-sign", "label-blind"],
    "denominators that can be made small": ["exploited-ratio", "transform-wins"],
    "NaN and inf": ["length-at-zero", "not-finite"],
    "clamps": ["clamped-length"],
    "starts without a gradient": ["starts-at-optimum"],
    "text that no score sees": ["broken-text"],
    "learning rates and numbers of steps": ["untuned-rate", "louder-not-better"],
    "one seed, and the best of many": ["one-seed", "best-of-many"],
    "test sets that chose": ["tuned-on-test", "leaked-rows"],
    "base, instruct or SFT": ["base-not-sft"],
    "sets that are too easy or too hard": ["no-headroom"],
    "percent of percent": ["relative-percent"],
    "memory": ["out-of-memory"],
    "judging inside the trainer": ["reloaded-differs"],
    "options that do nothing": ["dead-option"],
    "configuration in several places": ["ignored-setting"],
    "trackers": ["lost-log"],
    "two accuracies": ["two-scorers"],
    "length": ["length-bias", "giveaway-cue"],
    "generation past the end": ["past-the-end", "no-end-token"],
    "notebook and library apart": ["drifting-numbers"],
    "layers that drift": ["layers-drift"],
    "a direction that is mostly noise": ["noisy-direction"],
    "schedules that miscount": ["miscounted-schedule"],
    "a reference that moves": ["moving-reference"],
    "labels the wrong way round": ["inverted-labels"],
    "tokens that do not pair": ["unpaired-tokens"],
    "packages": ["missing-package"],
}


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@cache
def sections(file: str) -> dict[str, str]:
    "The code under each heading of a notebook."
    found, now = {}, ""
    for cell in nbformat.read(ROOT / file, 4).cells:
        if cell.cell_type == "code": found[now] = found.get(now, "") + "\n" + cell.source
        for line in cell.source.splitlines() if cell.cell_type == "markdown" else ():
            if match := re.match(r"#+ (.+)", line): found.setdefault(now := match[1].strip(), "")
    return found


@pytest.mark.parametrize("name,guard", GUARDS)
def test_guards_exist_and_assert(name, guard):
    file, _, what = guard.partition(": ")
    assert (ROOT / file).exists(), f"{name}: no {file}"
    if file.startswith("tests/"): assert what in functions(file), f"{name}: no {what} in {file}"
    else:
        assert what in sections(file), f"{name}: no heading '{what}' in {file}"
        assert ASSERTS.search(sections(file)[what]), f"{name}: nothing is asserted under '{what}' of {file}"


def test_every_pain_has_its_row():
    assert len(PAINS) == 36 and {name for names in PAINS.values() for name in names} <= set(GOTCHAS)


def test_names_are_anchors_and_pages_show_their_rows():
    names = [g.name for t in THEMES for g in t.rows]
    assert len(set(names)) == len(names) == len(GOTCHAS) and all(slug(name) == name for name in names)
    for theme in THEMES:
        cells = nbformat.read(ROOT / "nbs/14_gotchas" / f"{theme.page}.ipynb", 4).cells
        shown = "".join(o.get("data", {}).get("text/markdown", "") for c in cells for o in c.get("outputs", ()))
        assert [name for name in (g.name for g in theme.rows) if f'<a id="{name}"></a>' not in shown] == [], f"execute {theme.page}"
        assert all("|" not in text for g in theme.rows for text in (g.symptom, g.cause, g.wrong, g.right))


def test_errors_name_rows_that_exist():
    named = [(path, name) for path in (ROOT / "reprpo").rglob("*.py") for name in re.findall(r'gotcha="([^"]+)"', path.read_text(encoding="utf-8"))]
    assert len(named) >= 25 and [(path.name, name) for path, name in named if name not in GOTCHAS] == []


def test_the_command_line_ends_with_the_address(capsys):
    assert call(["train", "hs-none-inner:align=abs"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.endswith(f"(see {address('wrong-sign')})\n")
    assert call(["train", "dop"]) == 2 and "(see" not in capsys.readouterr().err
    assert address("wrong-sign").endswith("/14_gotchas/03_losses.html#wrong-sign") and UserError("x").gotcha is None


def test_nothing_heavy_is_imported():
    code = "import sys, reprpo.gotchas.table; print({'torch', 'transformers', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "set()"
