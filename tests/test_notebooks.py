"""Every notebook runs from top to bottom."""
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_notebook

CFG = get_config()


def notebooks() -> list[Path]:
    "Later sections train, so they start first and no worker is left alone with them at the end."
    return sorted((Path(path).absolute() for path in nbglob(CFG.nbs_path)), key=lambda path: str(path.relative_to(CFG.nbs_path)), reverse=True)


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: str(path.relative_to(CFG.nbs_path)))
@pytest.mark.timeout(300)
def test_notebook_runs(path):
    ok, _ = run_notebook(path, skip_flags=CFG.tst_flags.split(), basepath=CFG.config_path)
    assert ok, "the cell and its traceback are printed below"
