"""Notebooks, modules and README agree; modules stay small and import one way."""
import ast
import filecmp
import json
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from prepare import directives  # noqa: E402

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
MODULES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "reprpo").rglob("*.py")) if path.name != "_modidx.py"}
ORDER = ["core", "world", "pairs", "states", "decompose", ("transforms", "losses", "gradients", "directions"), "train", "judge", ("stories", "pause"),
         "experiments", "arguments", "commands", "cli"]
CORE = {"errors", "io", "seeds", "models", "plots", "gotchas"}
FRONT = {"__init__", "__main__"}
TENSORS_ONLY = {"transforms", "losses", "gradients", "directions"}


def relative(path: Path) -> str: return path.relative_to(ROOT).as_posix()


def text(cell) -> str: return "".join(cell["source"])


def none_of(found: list[str], advice: str) -> None:
    "Nothing found, or the whole list with what to do."
    assert not found, "\n".join([advice, *found])


def run(*words, cwd=ROOT, **options):
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=240, **options)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    "A copy of the notebooks, exported and cleaned from nothing."
    home = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "nbs", home / "nbs", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "settings.ini", home)
    (home / "reprpo").mkdir()
    for name in ("nbdev_export", "nbdev_clean"):
        done = run("-c", f"from nbdev.cli import {name}; {name}()", cwd=home)
        assert done.returncode == 0, done.stderr
    return home


def test_modules_are_the_notebooks(copied):
    here = {path.relative_to(ROOT) for path in (ROOT / "reprpo").rglob("*.py")}
    there = {path.relative_to(copied) for path in (copied / "reprpo").rglob("*.py")}
    none_of(sorted(map(str, here ^ there)), "modules without a notebook, or not exported: make export")
    differ = [str(path) for path in sorted(here) if (ROOT / path).read_text(encoding="utf-8") != (copied / path).read_text(encoding="utf-8")]
    none_of(differ, "not what the notebooks say: make export")


def test_notebooks_are_clean(copied):
    dirty = [relative(path) for path in NOTEBOOKS if not filecmp.cmp(path, copied / path.relative_to(ROOT), shallow=False)]
    none_of(dirty, "execution counts or metadata left: make export")


def test_readme_is_the_index():
    done = run("docs/readme.py", "--check")
    assert done.returncode == 0, done.stderr


def parsed(source: str):
    "The cell's code, without magics; None where that is no Python."
    try: return ast.parse("\n".join(line for line in source.splitlines() if not line.startswith(("%", "!"))))
    except SyntaxError: return None


def faults(path: Path):
    "What keeps a notebook from being a page of the site."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = "\n".join(text(cell) for cell in cells if cell["cell_type"] == "markdown")
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    if len(re.findall(r"^# ", prose, re.M)) != 1: yield "one title (# …)"
    if not re.search(r"^> \S", prose, re.M): yield "a sentence that says what it is about (> …)"
    if path.stat().st_size > 200_000: yield "under 200 kB: make notebooks ONLY=… makes its pictures small"
    if not outputs: yield "outputs: make notebooks"
    if any(output["output_type"] == "error" for output in outputs): yield "no error left in an output"
    if any(re.search(r"Traceback \(most|Warning:", "".join(output.get("text", []))) for output in outputs): yield "no warning or traceback left in an output"


def test_notebooks_are_pages():
    none_of([f"{relative(path)} needs {fault}" for path in NOTEBOOKS for fault in faults(path)], "a page is not finished:")


def cell_faults(path: Path):
    "What a reader of the code would stumble over, cell by cell."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for i, cell in enumerate(cells):
        if cell["cell_type"] != "code": continue
        said = directives(text(cell))
        if "default_exp" in said or not (tree := parsed(text(cell))): continue
        lines, exported = sum(bool(line.strip()) for line in text(cell).splitlines()), "export" in said
        imports = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body]
        if exported and lines > 50 and sum(isinstance(node, DEFINITIONS) for node in tree.body) > 1: yield i, f"{lines} exported lines: split at a definition"
        if "hide" in said: continue
        # README's block of Python is one piece to copy.
        if any(imports) and not all(imports) and path.stem != "index": yield i, "imports between other code: the docs build runs cells of imports alone"
        if not exported and tree.body and isinstance(tree.body[-1], ast.Assert): yield i, "ends in an assertion: end with the value worth seeing"
        drawn = any("image/png" in output.get("data", {}) for output in cell["outputs"])
        if drawn and (i + 1 == len(cells) or cells[i + 1]["cell_type"] != "markdown"): yield i, "a picture without the sentence on what to see"


def test_cells_are_one_thing_each():
    none_of([f"{relative(path)} cell {i}: {fault}" for path in NOTEBOOKS for i, fault in cell_faults(path)], "cells to look at again:")


def test_expected_failures_are_tried():
    "`expect_fail` is a context manager: called with a function it would do nothing at all."
    code = [(path, cell) for path in NOTEBOOKS for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    idle = [f"{relative(path)}: {line.strip()}" for path, cell in code for line in text(cell).splitlines()
            if re.search(r"\bexpect_fail\((?!\))", line) and not re.search(r"\bwith\b.*\bexpect_fail\(", line)]
    none_of(idle, "write `with expect_fail(…):`, or test_fail(lambda: …):")


def test_a_backward_has_a_line_of_its_own():
    "nnsight, once imported anywhere, takes a backward on the line of a `with` for a trace of its own, and nothing is computed."
    beside = re.compile(r"^\s*with\b.*: .*\.backward\(", re.M)
    trace = {"nbs/04_decompose/09_trace.ipynb"}  # it shows this
    cells = {path: json.loads(path.read_text(encoding="utf-8"))["cells"] for path in NOTEBOOKS}
    code = {relative(path): "\n".join(text(cell) for cell in found if cell["cell_type"] == "code") for path, found in cells.items()}
    code |= {relative(path): path.read_text(encoding="utf-8") for folder in ("tests", "bench", "docs") for path in (ROOT / folder).glob("*.py")}
    assert trace <= {name for name, source in code.items() if beside.search(source)}
    none_of(sorted(name for name, source in code.items() if beside.search(source) and name not in trace), "give the backward a line of its own:")


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def too_many(node, path: Path) -> bool:
    "More than ten parameters; of a loss or a transform, whose keywords are a method's options, more than twelve of those."
    names, options = [a.arg for a in (*node.args.posonlyargs, *node.args.args)], node.args.kwonlyargs
    count = len(names) - (names[:1] in (["self"], ["cls"]))
    return count > 10 or len(options) > 12 if path.parent.name in ("losses", "transforms") else count + len(options) > 10


def code_lines(path: Path) -> int:
    "Lines that are neither empty, nor a comment, nor a parameter of a signature with what is said of it."
    signatures = sum(node.body[0].lineno - node.lineno - 1 for node in functions(MODULES[path]) if node.body[0].lineno > node.lineno)
    return sum(bool(line.strip()) and not line.startswith("#") for line in path.read_text(encoding="utf-8").splitlines()) - signatures


def test_modules_and_functions_are_small():
    large = [f"{relative(path)}: {code_lines(path)} lines" for path in MODULES if code_lines(path) > 300]
    for path, tree in MODULES.items():
        for node in functions(tree):
            if node.end_lineno - node.lineno >= 50: large.append(f"{relative(path)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines")
            if too_many(node, path): large.append(f"{relative(path)}:{node.lineno} {node.name}: too many parameters")
    none_of(large, "these hold two ideas, split them:")


def test_public_functions_say_what_they_do():
    silent = [f"{relative(path)}:{node.lineno} {node.name}" for path, tree in MODULES.items() for node in tree.body
              if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node)]
    none_of(silent, "public, and without a docstring:")


def undescribed(node, lines: list[str]) -> list[str]:
    "The parameters of a function that have no comment of their own beside them."
    defaults = dict(zip([a.arg for a in (*node.args.posonlyargs, *node.args.args)][::-1], node.args.defaults[::-1], strict=False))
    defaults |= {a.arg: value for a, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if value is not None}
    found = [*node.args.posonlyargs, *node.args.args, *filter(None, [node.args.vararg]), *node.args.kwonlyargs, *filter(None, [node.args.kwarg])]
    ends = [defaults.get(a.arg, a) for a in found]
    alone = [not any(other.lineno == end.end_lineno for other in found[i + 1:]) for i, end in enumerate(ends)]
    said = [re.match(r"\s*,?\s*# *\S", lines[end.end_lineno - 1].encode()[end.end_col_offset:].decode()) for end in ends]
    return [a.arg for a, own, comment in zip(found, alone, said, strict=True) if a.arg not in ("self", "cls") and not (own and comment)]


def test_public_parameters_are_described():
    silent = []
    for path, tree in MODULES.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in (node for node in tree.body if isinstance(node, DEFINITIONS) and not node.name.startswith("_")):
            parts = [part for part in node.body if isinstance(part, DEFINITIONS)] if isinstance(node, ast.ClassDef) else [node]
            parts = [part for part in parts if not isinstance(part, ast.ClassDef) and (not part.name.startswith("_") or part.name == "__init__")]
            silent += [f"{relative(path)}:{part.lineno} {part.name}: {', '.join(names)}" for part in parts if (names := undescribed(part, lines))]
    none_of(silent, "public parameters without a comment beside them (shape, unit, meaning), which is their row in the site's table:")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, tree) -> set[str]:
    "The modules of this package that a module imports, anywhere in it."
    known, found = {name_of(other) for other in MODULES}, set()
    package = name_of(path).split(".") if path.stem == "__init__" else name_of(path).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {name for name in found & known if name != "reprpo" and name != name_of(path)}


GRAPH = {name_of(path): imports(path, tree) for path, tree in MODULES.items() if path.stem != "__init__"}


def section(module: str) -> str:
    part = module.split(".")[1]
    return "core" if part in CORE else part


def rank(module: str) -> int:
    part = section(module)
    return next(i for i, parts in enumerate(ORDER) if part in ((parts,) if isinstance(parts, str) else parts))


def test_imports_have_no_cycle():
    assert GRAPH
    TopologicalSorter(GRAPH).prepare()


def test_imports_run_one_way():
    wrong = [f"{module} imports {other}" for module, others in GRAPH.items() if module.split(".")[1] not in FRONT
             for other in others if section(other) != section(module) and rank(other) >= rank(module)]
    none_of(wrong, "imports go from later parts to earlier ones only:")


def test_transforms_and_losses_know_only_tensors():
    allowed = {"reprpo.errors", "reprpo.io", "reprpo.seeds", "reprpo.states.pool"}
    wrong = [f"{module} imports {other}" for module, others in GRAPH.items() if section(module) in TENSORS_ONLY
             for other in others if section(other) not in (section(module), "decompose") and other not in allowed]
    none_of(wrong, "transforms and losses see tensors, not models or batches:")


def test_decompositions_know_only_tensors():
    allowed = {"reprpo.errors", "reprpo.io", "reprpo.seeds", "reprpo.plots"}
    wrong = [f"{module} imports {other}" for module, others in GRAPH.items() if section(module) == "decompose"
             for other in others if section(other) != "decompose" and other not in allowed]
    none_of(wrong, "decompositions see tensors, not models or batches:")


@pytest.mark.parametrize("module", ["reprpo", "reprpo.cli", "reprpo.commands", "reprpo.experiments.config", "reprpo.pairs.spec"])
def test_light_modules_load_nothing_heavy(module):
    done = run("-c", f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'pandas', 'matplotlib'}} & set(sys.modules)))")
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr
