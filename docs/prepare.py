"""Turn the executed notebooks into pages that Sphinx renders: python docs/prepare.py nbs docs/_pages

An exported cell becomes one entry per public name (signature, parameter table, source link) with its code folded below it; hidden
cells go; a name in backticks becomes a link to its entry; the index gets one list of pages per folder of `nbs/`.
"""
import ast
import re
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import sitemap
from bs4 import BeautifulSoup

PACKAGE = "reprpo"
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(?P<body>.+?)\s*$")
TICKED = re.compile(r"(?<![`\[\w{}])`([A-Za-z_][\w.]*)`(?!`|\])")
LOCAL = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?\)")
NUMBER = re.compile(r"[-+−±]?\s*[\d.,]+(e[-+]?\d+)?\s*%?|nan|inf|[-+−]?[\d.,]+ \[.*\]|", re.IGNORECASE)
PICTURES = {".png", ".svg", ".jpg", ".gif"}
VOCABULARY = tuple(f"{PACKAGE}.{part}." for part in ("losses", "transforms", "gradients", "directions"))
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


def options(notebook) -> set[str]:
    "The parameters of a page's exported functions: on that page the word means the parameter, whatever else has its name."
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code" and directives(cell.source).keys() & {"export", "exports"}]
    nodes = [node for source in cells for node in ast.walk(ast.parse(without_directives(source))) if isinstance(node, ast.FunctionDef)]
    return {each.arg for node in nodes for each in (*node.args.args, *node.args.kwonlyargs)}


def imported(notebook) -> set[str]:
    "The names that a page's code imports."
    lines = [line for cell in notebook.cells if cell.cell_type == "code" for line in cell.source.splitlines() if re.match(r"\s*from .+ import ", line)]
    return {name for line in lines for name in re.findall(r"\w+", line.partition(" import ")[2])}


def link(text: str, names: dict[str, list[str]], module: str, own: set[str] = frozenset(), used: set[str] = frozenset()) -> str:
    "Backticked names as references: this page's own, and those that mean one thing; a plain word only where the page uses it, or a method may hold it."
    def one(match):
        known, home = names.get(match[1], []), f"{PACKAGE}.{module}.{match[1]}"
        if home in known: return f"{{py:obj}}`{match[1]} <{home}>`"
        if len(known) != 1 or match[1] in own: return match[0]
        word = match[1].isalpha() and match[1].islower() and match[1] not in used and not known[0].startswith(VOCABULARY)
        return match[0] if word else f"{{py:obj}}`{match[1]} <{known[0]}>`"
    parts = re.split(r"(```.*?```|\$\$.*?\$\$)", text, flags=re.S)
    return "".join(part if i % 2 else TICKED.sub(one, part) for i, part in enumerate(parts))


def elsewhere(text: str, folder: Path, root: Path, target: Path) -> str:
    "Pictures of the repository come along; other files of it, which are no pages, are links to where it is published."
    def one(match):
        path = (folder / match[3]).resolve()
        if path.suffix == ".ipynb" or not path.exists() or not path.is_relative_to(root): return match[0]
        name = path.relative_to(root).as_posix()
        if path.suffix not in PICTURES: return f"{match[1]}[{match[2]}]({published(root)}/{'tree' if path.is_dir() else 'blob'}/main/{name}{match[4] or ''})"
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if not (target / name).exists() or (target / name).stat().st_mtime < path.stat().st_mtime: shutil.copy2(path, target / name)
        return f"{match[1]}[{match[2]}](/{name})"
    parts = re.split(r"(```.*?```)", text, flags=re.S)
    return "".join(part if i % 2 else LOCAL.sub(one, part) for i, part in enumerate(parts))


def published(root: Path) -> str:
    "The address of the repository."
    settings = ConfigParser(delimiters=["="])
    settings.read(root / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]["git_url"]


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


def aligned(html: str) -> str:
    "A frame of pandas with its columns of numbers to the right, which pandas leaves to the notebook's own style."
    if 'class="dataframe"' not in html and '<table id="T_' not in html: return html
    soup = BeautifulSoup(html, "html.parser")
    for style in soup.find_all("style", scoped=True): style.decompose()
    for table in soup.find_all("table"):
        rows = [row.find_all("td") for row in table.find_all("tr") if row.find("td")]
        if not rows or len({len(row) for row in rows}) > 1: continue
        heads = table.find("tr").find_all("th")
        for column in zip(heads[-len(rows[0]):], *rows, strict=False):
            if all(NUMBER.fullmatch(cell.get_text().strip()) for cell in column[1:]):
                for cell in column: cell["class"] = [*cell.get("class", []), "text-right"]
    return str(soup)


def page(notebook, names: dict[str, list[str]]):
    "The notebook with each cell as a reader of the site should see it."
    code = [directives(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    module = next((found["default_exp"] for found in code if "default_exp" in found), "")
    if module == "__init__": module = ""
    cells, own, used = [], options(notebook), imported(notebook)
    for cell in notebook.cells:
        found = directives(cell.source) if cell.cell_type == "code" else {}
        if cell.cell_type == "markdown":
            cell.source = link(cell.source, names, module, own, used)
            cells.append(cell)
        elif found.keys() & {"hide", "default_exp"} or found.get("include") == "false": continue
        elif found.keys() & {"export", "exports"}: cells += exported(cell, module)
        elif "exporti" not in found: cells += shown(cell)
    for output in (output for cell in cells for output in cell.get("outputs", ())):
        if "text/html" in output.get("data", {}): output["data"]["text/html"] = aligned(output["data"]["text/html"])
    notebook.cells = [cell for cell in cells if cell.source.strip()]
    notebook.metadata.pop("widgets", None)
    return notebook


def opening(notebook) -> tuple[str, str]:
    "A page's title, and the one sentence under it."
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    title, said = re.search(r"^# (.+)$", prose, re.M), re.search(r"^> (.+(?:\n> .+)*)$", prose, re.M)
    return title[1].strip() if title else "", said[1].replace("\n> ", " ").strip() if said else ""


def write_if_changed(path: Path, text: str) -> None:
    "Leave the file's time alone where nothing changed, so that Sphinx builds only what is new."
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text: path.write_text(text, encoding="utf-8")


def main(source: str, target: str) -> None:
    source, target = Path(source).resolve(), Path(target)
    names, said, notebooks = symbols(source.parent / PACKAGE / "_modidx.py"), {}, {}
    paths = [path.relative_to(source) for path in sorted(source.rglob("*.ipynb"))]
    for path in paths:
        if any(part.startswith((".", "_")) for part in path.parts): continue
        notebook = nbformat.read(source / path, 4)
        name = path.with_suffix("").as_posix()
        said[name], notebooks[name] = opening(notebook), page(notebook, names)
        for cell in notebook.cells:
            if cell.cell_type == "markdown": cell.source = elsewhere(cell.source, (source / path).parent, source.parent, target)
    site = sitemap.place([name for name in notebooks if name != "index"], sitemap.sections())
    notebooks["index"].cells.append(nbformat.v4.new_markdown_cell(sitemap.front(site, said)))
    for name, notebook in notebooks.items():
        for i, cell in enumerate(notebook.cells): cell.id = f"c{i}"
        write_if_changed(target / f"{name}.ipynb", nbformat.writes(notebook))
    texts = {group.address: sitemap.landing(group, said) for section in site for group in section.groups if group.title}
    texts |= {name: (source.parent / f"{name}.md").read_text(encoding="utf-8") for name in ("CONTRIBUTING", "CHANGELOG")}
    for name, text in texts.items(): write_if_changed(target / f"{name}.md", text)
    for path in [*target.rglob("*.ipynb"), *target.rglob("*.md")]:
        if path.relative_to(target).with_suffix("").as_posix() not in {*notebooks, *texts}: path.unlink()


if __name__ == "__main__":
    if len(sys.argv) != 3: sys.exit(__doc__)
    if not Path(sys.argv[1]).is_dir(): sys.exit(f"no folder {sys.argv[1]}")
    try: main(*sys.argv[1:])
    except ValueError as error: sys.exit(str(error))
