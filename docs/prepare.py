"""Turn the executed notebooks into pages that Sphinx renders: python docs/prepare.py nbs docs/_pages

An exported cell becomes one entry per public name (signature, parameter table, source link) with its code folded below it; hidden
cells go; a name in backticks becomes a link to its entry; the index gets one list of pages per folder of `nbs/`.
"""
import ast
import re
import sys
from pathlib import Path

import nbformat

PACKAGE = "reprpo"
CAPTIONS = {
    ".": "Start here",
    "00_core": "Foundations",
    "01_world": "The embedded world",
    "02_pairs": "Pairs of answers",
    "03_states": "Hidden states",
    "04_decompose": "Looking inside",
    "05_transforms": "Transforms",
    "06_losses": "Losses",
    "07_gradients": "Gradient rules",
    "08_train": "Training",
    "09_judge": "Judging",
    "10_experiments": "Experiments",
    "11_stories": "Stories",
    "12_pause": "Pause tokens",
    "13_speed": "Speed",
}
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(?P<body>.+?)\s*$")
TICKED = re.compile(r"(?<![`\[\w{}])`([A-Za-z_][\w.]*)`(?!`|\])")
ROLES = {ast.ClassDef: "autoclass", ast.FunctionDef: "autofunction"}


def directives(source: str) -> dict[str, str]:
    "The `#|` lines at the top of a cell."
    found = {}
    for line in source.splitlines():
        if match := DIRECTIVE.match(line):
            name, _, value = match["body"].replace(":", " ", 1).partition(" ")
            found[name] = value.strip()
        elif line.strip(): break
    return found


def without_directives(source: str) -> str:
    return "\n".join(line for line in source.splitlines() if not DIRECTIVE.match(line)).strip()


def symbols(modidx: Path) -> dict[str, list[str]]:
    "Short and full name -> the full names it may mean."
    space, found = {}, {}
    exec(modidx.read_text(encoding="utf-8"), space)
    for module, names in space["d"]["syms"].items():
        for full in names:
            for name in {full, full.removeprefix(module + ".")}: found.setdefault(name, []).append(full)
    return found


def link(text: str, names: dict[str, list[str]], module: str) -> str:
    "Backticked names as references, where the name is this page's own or means one thing only."
    def one(match):
        known = names.get(match[1], [])
        here = [full for full in known if full == f"{PACKAGE}.{module}.{match[1]}"]
        target = here or known if len(known) == 1 or here else []
        return f"{{py:obj}}`{match[1]} <{target[0]}>`" if target else match[0]
    parts = re.split(r"(```.*?```|\$\$.*?\$\$)", text, flags=re.S)
    return "".join(part if i % 2 else TICKED.sub(one, part) for i, part in enumerate(parts))


def entries(source: str, module: str) -> list:
    "One block with each public function and class of a cell."
    found = []
    for node in ast.parse(source).body:
        if type(node) in ROLES and not node.name.startswith("_"):
            members = "   :members:\n" if isinstance(node, ast.ClassDef) else ""
            found.append(f".. {ROLES[type(node)]}:: {PACKAGE}.{module}.{node.name}\n{members}")
    return [nbformat.v4.new_markdown_cell("```{eval-rst}\n" + "\n".join(found) + "```")] if found else []


def is_imports(source: str) -> bool:
    "Nothing but imports?"
    try: return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)
    except SyntaxError: return False


def exported(cell, module: str) -> list:
    "The entries of an exported cell, then its code, folded where there are entries."
    cell.source = without_directives(cell.source)
    if is_imports(cell.source): return []
    before = entries(cell.source, module)
    if before: cell.metadata["tags"] = ["hide-input"]
    return [*before, cell]


def shown(cell) -> list:
    "A cell of the demonstration, with nbdev's display directives as tags."
    found, tags = directives(cell.source), []
    cell.source = without_directives(cell.source)
    if found.get("echo") == "false": tags.append("remove-input")
    if found.get("output") == "false": tags.append("remove-output")
    if found.get("code-fold") in ("true", "show") or is_imports(cell.source): tags.append("hide-input")
    if tags: cell.metadata["tags"] = tags
    return [cell] if cell.source else []


def page(notebook, names: dict[str, list[str]]):
    "The notebook with each cell as a reader of the site should see it."
    code = [directives(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    module = next((found["default_exp"] for found in code if "default_exp" in found), "")
    if module == "__init__": module = ""
    cells = []
    for cell in notebook.cells:
        found = directives(cell.source) if cell.cell_type == "code" else {}
        if cell.cell_type == "markdown":
            cell.source = link(cell.source, names, module)
            cells.append(cell)
        elif found.keys() & {"hide", "default_exp"} or found.get("include") == "false": continue
        elif found.keys() & {"export", "exports"}: cells += exported(cell, module)
        elif "exporti" not in found: cells += shown(cell)
    notebook.cells = [cell for cell in cells if cell.source.strip()]
    notebook.metadata.pop("widgets", None)
    return notebook


def navigation(pages: list[Path]) -> str:
    "A hidden list of pages per folder, in the order of their numbers."
    blocks = []
    pages = [path for path in pages if path != Path("index.ipynb")]
    for folder in sorted({path.parent for path in pages}):
        caption = CAPTIONS.get(folder.as_posix()) or folder.name.partition("_")[2].capitalize()
        rows = "\n".join(path.with_suffix("").as_posix() for path in pages if path.parent == folder)
        blocks.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{rows}\n```")
    return "\n\n".join([*blocks, "```{toctree}\n:hidden:\n:caption: Project\n\nCONTRIBUTING\nCHANGELOG\n```"])


def write_if_changed(path: Path, text: str) -> None:
    "Leave the file's time alone where nothing changed, so that Sphinx builds only what is new."
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text: path.write_text(text, encoding="utf-8")


def main(source: str, target: str) -> None:
    source, target = Path(source), Path(target)
    names = symbols(source.parent / PACKAGE / "_modidx.py")
    pages = [path.relative_to(source) for path in sorted(source.rglob("*.ipynb"))]
    pages = [path for path in pages if not any(part.startswith((".", "_")) for part in path.parts)]
    for path in pages:
        notebook = page(nbformat.read(source / path, 4), names)
        if path == Path("index.ipynb"): notebook.cells.append(nbformat.v4.new_markdown_cell(navigation(pages), id="navigation"))
        for i, cell in enumerate(notebook.cells): cell.id = f"c{i}"
        write_if_changed(target / path, nbformat.writes(notebook))
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"): write_if_changed(target / name, (source.parent / name).read_text(encoding="utf-8"))
    kept = {target / path for path in pages}
    for path in target.rglob("*.ipynb"):
        if path not in kept: path.unlink()


if __name__ == "__main__":
    if len(sys.argv) != 3: sys.exit(__doc__)
    if not Path(sys.argv[1]).is_dir(): sys.exit(f"no folder {sys.argv[1]}")
    main(*sys.argv[1:])
