"""Execute notebooks: python docs/execute.py [FILE or FOLDER ...], by default all of nbs/, and keep their outputs.

With --model and --pairs the notebooks that take a model run on those instead, and the executed copies go to notebooks-NAME/.
"""
import argparse
import base64
import io
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image
from prepare import directives

ROOT = Path(__file__).parent.parent
TAKES = re.compile(r"\bpage_(model|tokenizer|pairs|run|setting|activations)\(")
WORLD = re.compile(r"runs on the embedded world only", re.IGNORECASE)
QUIET = ["--log-level=40"]  # newer kernels warn of every start
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Client(NotebookClient):
    "Leaves out the cells that say `#| eval: false`, as nbdev_test does."

    async def async_execute_cell(self, cell, cell_index, **options):
        if cell.cell_type == "code" and directives(cell.source).get("eval") == "false": return cell
        return await super().async_execute_cell(cell, cell_index, **options)


def smaller(png: str) -> str:
    "A picture in base64 with at most 256 colours: a third of the bytes, the same to the eye. As it was if that saves nothing, or parts are transparent."
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode == "P" or image.convert("RGBA").getextrema()[3][0] < 255: return png
    buffer = io.BytesIO()
    image.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return min(base64.b64encode(buffer.getvalue()).decode(), png, key=len)


def with_small_pictures(notebook):
    "The notebook with its pictures made smaller, in place."
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data: data["image/png"] = smaller(data["image/png"])
    return notebook


def execute(path: Path, out: Path | None = None, limit: int | None = 600) -> float:
    "Run one notebook in its own folder and save it, or what came of it, under `out` (the notebook itself if None); the seconds it took."
    start, notebook = time.time(), nbformat.read(path, 4)
    where = {"metadata": {"path": str(path.parent)}}
    try: Client(notebook, timeout=limit, kernel_name="python3", extra_arguments=QUIET, resources=where, record_timing=False).execute()
    finally:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(with_small_pictures(notebook), out)
    if out is None: nbformat.write(with_small_pictures(notebook), path)
    return time.time() - start


def demonstrations(path: Path) -> str:
    "The code of a notebook's cells that are not exported."
    cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    return "\n".join(source for source in cells if "export" not in directives(source))


def takes(path: Path) -> str:
    "What a notebook runs on: `model` (REPRPO_MODEL and REPRPO_PAIRS), `world`, or nothing."
    prose = " ".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    return "world" if WORLD.search(" ".join(prose.split())) else "model" if TAKES.search(demonstrations(path)) else ""


def found(names: list[str]) -> list[Path]:
    "The notebooks under some files and folders, in the order of the site."
    given = [Path(name) for name in names or [ROOT / "nbs"]]
    for path in given:
        if not path.exists(): sys.exit(f"no notebook or folder {path}")
    paths = [each for path in given for each in ([path] if path.is_file() else sorted(path.rglob("*.ipynb")))]
    return [path for path in paths if ".ipynb_checkpoints" not in path.parts]


def check(model: str, pairs: str) -> tuple[str, str]:
    "Load model and pairs once, so that a wrong one is said before anything runs; both with whole paths."
    from transformers.utils import logging

    from reprpo.errors import UserError
    from reprpo.models import load_model, pick_device
    from reprpo.pairs.pages import own_parts, page_setting
    from reprpo.pairs.spec import PairSpec, split_files
    from reprpo.pairs.tokenize import context_length, tokenize_pairs
    logging.disable_progress_bar()
    try:
        if not model: raise UserError("PAIRS without MODEL: the embedded world's model reads no language but its own; name a model too")
        pick_device(page_setting("DEVICE", "auto"))
        if Path(model).exists(): model = str(Path(model).absolute())
        if pairs and (spec := PairSpec.parse(pairs)).kind == "file":
            pairs = str(replace(spec, path="+".join(str(Path(path).absolute()) for path in split_files(spec.path))))
        os.environ |= {"REPRPO_MODEL": model, "REPRPO_PAIRS": pairs}
        parts = own_parts() if pairs else ()
        loaded, tokenizer = load_model(model, "cpu")
        for part in parts: tokenize_pairs(part, tokenizer, context_length(tokenizer, loaded.config))
    except UserError as e:
        print(f"notebooks: {e}", file=sys.stderr)
        sys.exit(2)
    return model, pairs


def reason(copy: Path, error: Exception) -> str:
    "The cell that failed, the line in it, and the last line of its error."
    for cell in nbformat.read(copy, 4).cells:
        for output in cell.get("outputs", ()):
            if output.output_type != "error": continue
            trace = COLOURS.sub("", "\n".join(output.traceback)).splitlines()
            line = next((text.split(maxsplit=2)[-1] for text in trace if text.startswith("---->")), "")
            return f"{cell.id}: {line.strip()[:120]}: {output.ename}: {(output.evalue.strip().splitlines() or [''])[0][:200]}"
    return type(error).__name__


def on_a_model(model: str, pairs: str, names: list[str]) -> None:
    "Run every notebook that takes a model on this one, and go on after a failure."
    kinds = {path: takes(path) for path in found(names)}
    model, pairs = check(model, pairs)
    short = Path(model).name if Path(model).exists() else model
    out, failed = ROOT / ("notebooks-" + re.sub(r"[^A-Za-z0-9.-]+", "-", short).strip("-.")), []
    for path in (path for path, kind in kinds.items() if kind == "model"):
        start, copy = time.time(), out / path.resolve().relative_to(ROOT / "nbs")
        try: execute(path, copy, limit=None)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error: failed.append(f"{path}, {reason(copy, error)}")
        print(f"{time.time() - start:6.1f} s  {path}{'  FAILED' if failed and failed[-1].startswith(f'{path},') else ''}", flush=True)
    for path in (path for path, kind in kinds.items() if kind == "world"): print(f"       -  {path}  runs on the embedded world only")
    ran, none = sum(kind == "model" for kind in kinds.values()), sum(not kind for kind in kinds.values())
    print(f"{ran} notebooks ran on {model}, {len(failed)} failed; {none} need no model. Executed copies: {out.name}/")
    for line in failed: print(f"FAILED {line}")
    sys.exit(bool(failed))


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="FILE or FOLDER")
    parser.add_argument("--model", default="", help="a folder or a hub name")
    parser.add_argument("--pairs", default="", help="an address of pairs, such as pairs.jsonl")
    given = parser.parse_args(words)
    if given.model or given.pairs: on_a_model(given.model, given.pairs, given.names)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for path in found(given.names): print(f"{execute(path):6.1f} s  {path}", flush=True)


if __name__ == "__main__": main(sys.argv[1:])
