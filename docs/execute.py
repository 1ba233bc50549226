"""Execute notebooks and keep their outputs: python docs/execute.py [FILE or FOLDER ...], by default all of nbs/"""
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from prepare import directives


class Client(NotebookClient):
    "Leaves out the cells that say `#| eval: false`, as nbdev_test does."

    async def async_execute_cell(self, cell, cell_index, **options):
        if cell.cell_type == "code" and directives(cell.source).get("eval") == "false": return cell
        return await super().async_execute_cell(cell, cell_index, **options)


def execute(path: Path, limit: int = 600) -> float:
    "Run one notebook in its own folder and save it; the seconds it took."
    start, notebook = time.time(), nbformat.read(path, 4)
    where = {"metadata": {"path": str(path.parent)}}
    Client(notebook, timeout=limit, kernel_name="python3", resources=where, record_timing=False).execute()
    nbformat.write(notebook, path)
    return time.time() - start


def main(names: list[str]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    given = [Path(name) for name in names or ["nbs"]]
    for path in given:
        if not path.exists(): sys.exit(f"no notebook or folder {path}")
    paths = [found for path in given for found in ([path] if path.is_file() else sorted(path.rglob("*.ipynb")))]
    for path in paths:
        if ".ipynb_checkpoints" not in path.parts: print(f"{execute(path):6.1f} s  {path}", flush=True)


if __name__ == "__main__": main(sys.argv[1:])
