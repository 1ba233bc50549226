"""Sphinx settings of the site; pages are made by prepare.py from the executed notebooks, and nothing is run here."""
import importlib
import inspect
import re
import sys
from pathlib import Path

from fastcore.docments import docments
from myst_parser.mdit_to_docutils.base import DocutilsRenderer

sys.path.insert(0, str(Path(__file__).parent))
from prepare import symbols  # noqa: E402

modidx = importlib.import_module("reprpo._modidx")
NAMES = {short: full[0] for short, full in symbols(Path(modidx.__file__)).items() if len(full) == 1}

project = modidx.d["settings"].get("lib_path", "reprpo")
author = "The reprpo authors"
copyright = "2026, the reprpo authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.mathjax", "sphinx_copybutton"]
root_doc = "index"
templates_path = []
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables in outputs, which commonmark leaves as text
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
mathjax_path = "mathjax/tex-svg-full.js"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
add_module_names = False
html_theme = "furo"
html_title = "reprpo"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5c8f", "color-brand-content": "#0b5c8f"},
    "dark_css_variables": {"color-brand-primary": "#7cc4ef", "color-brand-content": "#7cc4ef"},
}


def type_name(annotation) -> str:
    "A type as one would write it."
    if annotation in (inspect.Parameter.empty, None): return ""
    if isinstance(annotation, str): return annotation
    if hasattr(annotation, "__metadata__"): annotation = annotation.__origin__
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", inspect.formatannotation(annotation))


def literal(text: str) -> str:
    "Marks of reStructuredText as themselves, but for backticks and what stands between them."
    parts = re.split(r"(`+[^`]+`+)", text)
    return "".join(part if i % 2 else re.sub(r"([\\*|]|_(?=\W|$))", r"\\\1", part) for i, part in enumerate(parts))


def parameter_rows(obj):
    "Name, type, default and meaning of each parameter, from the comments beside the signature."
    for name, found in docments(obj, full=True, returns=True).items():
        if name in ("self", "cls", "args", "kwargs"): continue
        default, meaning = found.get("default"), " ".join((found.get("docment") or "").split())
        shown = "" if name == "return" or default is inspect.Parameter.empty else getattr(default, "__name__", repr(default))
        if name != "return" or meaning: yield name, type_name(found.get("anno")), shown, literal(meaning)


def parameter_table(app, what, name, obj, options, lines):
    "Append the table of parameters to a docstring, where any parameter is described."
    lines[:] = [literal(line) for line in lines]
    if what not in ("function", "method", "class"): return
    try: rows = list(parameter_rows(obj))
    except (OSError, TypeError, ValueError): return
    if not any(meaning for *_, meaning in rows): return
    code = lambda text: f"``{text}``" if text else ""
    lines += ["", ".. list-table::", "   :header-rows: 1", "   :class: parameters", "", "   * - Parameter", "     - Type", "     - Default", "     - Meaning"]
    for parameter, kind, default, meaning in rows:
        first = "*returns*" if parameter == "return" else code(parameter)
        lines += [f"   * - {first}", f"     - {code(kind)}", f"     - {code(default)}", f"     - {meaning}"]
    lines.append("")


def ticks(app, what, name, obj, options, lines):
    "A single backtick in a docstring is a link where it names a symbol, else code, as in nbdev."
    def one(match): return f":py:obj:`{match[1]} <{NAMES[match[1]]}>`" if match[1] in NAMES else f"``{match[1]}``"
    lines[:] = [re.sub(r"(?<!`)(?<!:)`([^`<>]+)`(?!`)(?!_)", one, line) for line in lines]


def start_at_line_zero(render):
    """myst-parser puts as many empty lines before an eval-rst block as there are above it, and myst-nb counts 10,000 lines a cell:
    docutils then reads 35 million empty lines for 50 pages, most of the time of a build."""
    def inner(self, token):
        token.token.map = [0, 0]
        return render(self, token)
    return inner


def setup(app):
    DocutilsRenderer.render_restructuredtext = start_at_line_zero(DocutilsRenderer.render_restructuredtext)
    app.connect("autodoc-process-docstring", parameter_table)
    app.connect("autodoc-process-docstring", ticks, priority=900)
