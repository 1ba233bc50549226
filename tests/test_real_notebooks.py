"""The notebooks take a model and pairs from outside, or say that they don't; a few of them run on a random model with a chat template."""
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import execute  # noqa: E402
from execute import demonstrations, found, takes  # noqa: E402

NOTEBOOKS = found([str(ROOT / "nbs")])
FETCHES = re.compile(r"\b(load_model|load_tokenizer|load_pairs|load_data|pref_set|world_folder)\(|^from reprpo\.world\b", re.MULTILINE)
NAMED = re.compile(r"environ[^\n]*REPRPO_(MODEL|PAIRS)")
QUICK = ("02_pairs/04_show.ipynb", "03_states/06_score.ipynb", "08_train/03_feed.ipynb", "10_experiments/00_prepare.ipynb",
         "15_gallery/04_layers.ipynb")


def write(path: Path, cells: list) -> None: nbformat.write(v4.new_notebook(cells=cells), path)


def name(path: Path) -> str: return path.relative_to(ROOT / "nbs").as_posix()


def test_every_notebook_takes_a_model_or_says_that_it_does_not():
    silent = [name(path) for path in NOTEBOOKS if not takes(path) and FETCHES.search(demonstrations(path))]
    assert silent == [], "take them from reprpo.pairs.pages, or say on the page: runs on the embedded world only"


def test_pages_on_the_world_only_ignore_the_variables():
    world = [path for path in NOTEBOOKS if takes(path) == "world"]
    assert {name(path) for path in world} >= {"index.ipynb", "01_world/07_gates.ipynb", "10_experiments/09_verdicts.ipynb"}
    assert [name(path) for path in world if re.search(r"\bpage_\w+\(", demonstrations(path))] == []


def test_the_variables_are_read_in_one_place():
    assert [name(path) for path in NOTEBOOKS if NAMED.search(demonstrations(path)) and name(path) != "02_pairs/07_pages.ipynb"] == []


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    "A random Qwen3-shaped checkpoint with a chat template, and pairs as a user may have them."
    from shapes import qwen3_shaped
    from tiny import tiny_rows
    home = tmp_path_factory.mktemp("mine")
    rows = [row | {"prompt": f"{row['prompt']} {i}"} for i, row in enumerate(tiny_rows(240))]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return qwen3_shaped(home / "random-for-tests"), home / "pairs.jsonl"


@pytest.fixture
def mine(chat, cache, monkeypatch):
    "The variables, until the test is over."
    for key, value in zip(("REPRPO_MODEL", "REPRPO_PAIRS"), chat): monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("REPRPO_DEVICE", "cpu")
    return chat


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", QUICK)
def test_a_notebook_runs_on_a_model_of_ones_own(path, mine):
    from nbdev.config import get_config
    from nbdev.test import test_nb as run_notebook
    config = get_config()
    ok, _ = run_notebook(ROOT / "nbs" / path, skip_flags=config.tst_flags.split(), basepath=config.config_path)
    assert ok, "the cell and its traceback are printed below"


@pytest.mark.timeout(300)
def test_make_notebooks_goes_on_after_a_failure_and_keeps_copies(mine, monkeypatch, tmp_path, capsys):
    "Three notebooks of its own: one runs, one fails, one is about the world."
    cells = {"good": ["from reprpo.pairs.pages import page_tokenizer\nprint(len(page_tokenizer()))"],
             "bad": ["page_pairs = lambda s: s\nx = 1", "page_pairs('s')\nassert x == 2, 'not two'"]}
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    (tmp_path / "nbs").mkdir()
    for stem, sources in cells.items(): write(tmp_path / "nbs" / f"{stem}.ipynb", [v4.new_code_cell(x, id=f"cell-{i}") for i, x in enumerate(sources)])
    write(tmp_path / "nbs" / "world.ipynb", [v4.new_markdown_cell("This page runs on the embedded\nworld only.")])
    with pytest.raises(SystemExit) as left: execute.on_a_model(*map(str, mine), [])
    told = capsys.readouterr().out.splitlines()
    assert left.value.code == 1
    assert [line.split()[2:] for line in told[:2]] == [[str(tmp_path / "nbs" / "bad.ipynb"), "FAILED"], [str(tmp_path / "nbs" / "good.ipynb")]]
    assert told[2].endswith("world.ipynb  runs on the embedded world only") and "2 notebooks ran" in told[3] and "1 failed" in told[3]
    assert told[4].endswith("bad.ipynb, cell-1: assert x == 2, 'not two': AssertionError: not two")
    copies = tmp_path / "notebooks-random-for-tests"
    assert "outputs" in nbformat.read(copies / "good.ipynb", 4).cells[0] and (copies / "bad.ipynb").exists()
    assert nbformat.read(tmp_path / "nbs" / "good.ipynb", 4).cells[0].outputs == []


def test_a_wrong_model_or_wrong_pairs_is_one_line(mine, tmp_path, capsys):
    model, pairs = mine
    few = tmp_path / "few.jsonl"
    few.write_text("".join(pairs.read_text(encoding="utf-8").splitlines(True)[:9]))
    wrong = {(tmp_path / "nowhere", pairs): "no such folder", (model, tmp_path / "none.jsonl"): "no file",
             (model, few): "need 240 or more", ("", pairs): "PAIRS without MODEL"}
    for (name, address), says in wrong.items():
        with pytest.raises(SystemExit) as left: execute.check(str(name), str(address))
        said = capsys.readouterr()
        assert left.value.code == 2 and says in said.err and len(said.err.splitlines()) == 1 and not said.out
