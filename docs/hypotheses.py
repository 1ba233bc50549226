"""Run the pages of nbs/04_decompose on the embedded world and keep every claim that they judge: python docs/hypotheses.py

A page's claims are its `battery`. With names of pages only those are run again, and the others' lines stay.
"""
import json
import os
import sys
import time
from pathlib import Path

import nbformat
from execute import QUIET, ROOT, Client

PAGES, KEEP = ROOT / "nbs" / "04_decompose", ROOT / "files" / "results"
GATHER = """import json
found = globals().get("battery")
print("HYPOTHESES " + (found.frame().to_json(orient="records") if hasattr(found, "frame") else "[]"))"""


def claims(path: Path) -> list[dict]:
    "The lines of a page's battery, from a run of a copy of it."
    notebook = nbformat.read(path, 4)
    notebook.cells.append(nbformat.v4.new_code_cell(GATHER))
    where = {"metadata": {"path": str(path.parent)}}
    Client(notebook, timeout=600, kernel_name="python3", extra_arguments=QUIET, resources=where, record_timing=False).execute()
    text = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    return json.loads(text.partition("HYPOTHESES ")[2] or "[]")


def main(names: list[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("REPRPO_MODEL", "REPRPO_PAIRS"): os.environ.pop(name, None)
    import pandas as pd

    from reprpo.io import atomic_write, manifest
    paths = sorted(PAGES.glob("*.ipynb"))
    asked = {path.stem for path in paths if not names or path.stem in names}
    if lost := set(names) - asked: sys.exit(f"no page {sorted(lost)[0]} in nbs/04_decompose; there are {', '.join(path.stem for path in paths)}")
    table, start, frames = KEEP / "hypotheses.csv", time.time(), []
    old = pd.read_csv(table) if table.exists() else pd.DataFrame({"page": []})
    for path in paths:
        mine = pd.DataFrame(claims(path)) if path.stem in asked else old[old.page == path.stem].drop(columns="page")
        if len(mine): frames.append(mine.assign(page=path.stem))
        print(f"{time.time() - start:6.1f} s  {path.stem}: {len(mine)} claims", flush=True)
    rows = pd.concat(frames, ignore_index=True)
    atomic_write(table, rows[["page", *rows.columns.drop("page")]].to_csv(index=False, float_format="%.6g"))
    atomic_write(KEEP / "hypotheses.json", json.dumps(manifest({"model": "world"}, claims=len(rows)), indent=1) + "\n")
    return 0


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
