"""Write README.md from nbs/index.ipynb, without Quarto: python docs/readme.py [--check]"""
import re
import sys
from pathlib import Path

import nbformat
from prepare import directives, without_directives

ROOT = Path(__file__).parent.parent
HIDDEN = {"hide", "default_exp", "export", "exporti"}


def text_of(outputs) -> str:
    "The richest text of each output: Markdown as it is, plain text as a block."
    parts = []
    for output in outputs:
        data = output.get("data", {})
        if "text/markdown" in data: parts.append(data["text/markdown"].strip())
        else:
            plain = (data.get("text/plain") or output.get("text", "")).rstrip()
            if plain: parts.append(f"```text\n{plain}\n```")
    return "\n\n".join(parts)


def readme(notebook) -> str:
    "The index page as Markdown for a repository's front."
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\((?!\w+:|#|/)(\.\./)?", lambda match: "](" if match[1] else "](nbs/", cell.source.strip()))
            continue
        found = directives(cell.source)
        if found.keys() & HIDDEN: continue
        if found.get("echo") != "false": parts.append(f"```python\n{without_directives(cell.source)}\n```")
        if found.get("output") != "false": parts.append(text_of(cell.outputs))
    return "\n\n".join(part for part in parts if part) + "\n"


def main(check: bool) -> int:
    "0 if README.md is, or now is, what the index page says."
    text, path = readme(nbformat.read(ROOT / "nbs" / "index.ipynb", 4)), ROOT / "README.md"
    if path.read_text(encoding="utf-8") == text: return 0
    if check:
        print("README.md differs from nbs/index.ipynb; make export writes it", file=sys.stderr)
        return 1
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__": sys.exit(main("--check" in sys.argv[1:]))
