"""Sphinx settings of the site; pages are made by prepare.py from the executed notebooks, and nothing is run here."""
import importlib
import inspect
import os
import re
import sys
from pathlib import Path

from fastcore.docments import docments
from docutils import nodes
from myst_parser.mdit_to_docutils.base import DocutilsRenderer
from sphinx import addnodes

sys.path.insert(0, str(Path(__file__).parent))
from prepare import symbols  # noqa: E402

modidx = importlib.import_module("reprpo._modidx")
SETTINGS = modidx.d["settings"]
AT = f"{SETTINGS['git_url']}/blob/{os.environ.get('GITHUB_SHA') or SETTINGS['branch']}"  # published pages point at the lines they were made from
NAMES = {short: full[0] for short, full in symbols(Path(modidx.__file__)).items() if len(full) == 1}

project = SETTINGS["lib_path"]
author = "The reprpo authors"
copyright = "2026, the reprpo authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.linkcode", "sphinx.ext.mathjax", "sphinx_copybutton"]
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
html_js_files = ["local.js"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False


def colours(link: str, quiet: str, side: str, top: str) -> dict[str, str]:
    "One colour for what can be followed, greys for the rest."
    named = {"brand-primary": link, "brand-content": link, "brand-visited": link, "api-name": link, "api-pre-name": quiet,
             "sidebar-link-text": side, "sidebar-link-text--top-level": top}
    return {f"color-{name}": colour for name, colour in named.items()}


html_theme_options = {
    "source_view_link": AT + "/nbs/{filename}",
    "top_of_page_buttons": ["view"],
    "light_css_variables": colours("#0b5c8f", "#5a5c63", "#3f4148", "#1f2126"),
    "dark_css_variables": colours("#7cc4ef", "#9ca0a5", "#b4b6bb", "#dcdee2"),
}


def linkcode_resolve(domain: str, info: dict) -> str | None:
    "Where the lines of a function or class stand in the repository."
    obj = importlib.import_module(info["module"])
    try:
        for part in info["fullname"].split("."): obj = getattr(obj, part)
        lines, first = inspect.getsourcelines(inspect.unwrap(obj.fget if isinstance(obj, property) else obj))
    except (AttributeError, OSError, TypeError): return None
    return f"{AT}/{info['module'].replace('.', '/')}.py#L{first}-L{first + len(lines) - 1}"


def tell_apart(app, doctree):
    "Two links stand beside a name: to the source on this site, and to that on GitHub."
    for link in doctree.findall(nodes.reference):
        if link.get("refuri", "").startswith(AT) and link.children and "viewcode-link" in link[0].get("classes", ()): link[0][:] = [nodes.Text("[GitHub]")]


def only_notebooks(app, pagename, templatename, context, doctree):
    "The eye at the top of a page leads to its notebook, so a page that has none goes without."
    if context.get("page_source_suffix") != ".ipynb": context["page_source_suffix"] = ""


def navigation(app, pagename, templatename, context, doctree):
    """The sidebar's lists, which furo asks for once a page. Sphinx copies every heading of every page to make them, half of the time of a build;
    these are made of titles alone, taken once."""
    env = app.env
    if not hasattr(app, "titles_of_pages"): app.titles_of_pages = {"genindex": "Index"}

    def title(page):
        if page not in app.titles_of_pages: app.titles_of_pages[page] = app.builder.render_partial(env.titles[page])["title"]
        return app.titles_of_pages[page]

    def items(pages, depth):
        return "<ul>" + "".join(item(page, depth) for page in pages) + "</ul>" if pages else ""

    def item(page, depth):
        below = items(env.toctree_includes.get(page, ()), depth + 1)
        current = " current" if page == pagename or pagename in env.toctree_includes.get(page, ()) else ""
        link = f'<a class="reference internal{current}" href="{context["pathto"](page)}">{title(page)}</a>'
        return f'<li class="toctree-l{depth}{current}">{link}{below}</li>'

    def toctree(**_):
        lists = env.master_doctree.findall(addnodes.toctree)
        heading = '<p class="caption" role="heading"><span class="caption-text">{}</span></p>'
        return "".join(heading.format(each["caption"]) + items([page for _, page in each["entries"]], 1) for each in lists)

    context["toctree"] = toctree


def type_name(annotation) -> str:
    "A type as one would write it."
    if annotation in (inspect.Parameter.empty, None): return ""
    if isinstance(annotation, str): return annotation
    if hasattr(annotation, "__metadata__"): annotation = annotation.__origin__
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", inspect.formatannotation(annotation))


def literal(text: str) -> str:
    "Marks of reStructuredText as themselves, but for backticks and what stands between them, and what is in bold."
    parts = re.split(r"(`+[^`]+`+|(?<!\S)\*\*\w[^*`]*\w\*\*(?!\w))", text)
    return "".join(part if i % 2 else re.sub(r"([\\*|]|_(?=\W|$))", r"\\\1", part) for i, part in enumerate(parts))


def field_comments(cls) -> dict[str, str]:
    "What is said beside the fields of a class and of those it inherits from, and beside the parameters of its own `__init__`."
    found = {}
    for each in reversed(cls.__mro__):
        try: source = inspect.getsource(each)
        except (OSError, TypeError): continue
        found |= {match[1]: match[2] for line in source.splitlines() if (match := re.match(r"    (\w+):[^#]+#\s*(.+)$", line))}
        if "    def __init__(" in source: found |= {name: said.get("docment") for name, said in docments(each.__init__, full=True, returns=False).items()}
    return found


def parameters_of(obj) -> dict:
    "What docments finds; of a class also what it inherits, of a named tuple its fields."
    found = docments(obj, full=True, returns=True, args_kwargs=True)
    if not inspect.isclass(obj): return found
    said = field_comments(obj)
    if hasattr(obj, "_fields"):
        kinds, defaults, empty = inspect.get_annotations(obj), obj._field_defaults, inspect.Parameter.empty
        found = {name: {"anno": kinds.get(name), "default": defaults.get(name, empty)} for name in obj._fields}
    return {name: dict(row) | {"docment": row.get("docment") or said.get(name)} for name, row in found.items()}


def parameter_rows(obj):
    "Name, type, default and meaning of each parameter, from the comments beside the signature."
    for name, found in parameters_of(obj).items():
        if name in ("self", "cls"): continue
        default, meaning = found.get("default"), " ".join((found.get("docment") or "").split())
        shown = "" if name == "return" or default is inspect.Parameter.empty else getattr(default, "__name__", repr(default))
        kind = type_name(found.get("anno"))
        if meaning: meaning = r"\ " + literal(meaning)  # "(b) -> (b)" would begin a list
        if name != "return" or meaning or kind: yield name, kind, shown, meaning


def parameter_table(app, what, name, obj, options, lines):
    "Append the table of parameters to a docstring, where any has a type or is described."
    lines[:] = [literal(line) for line in lines]
    if what not in ("function", "method", "class"): return
    try: rows = list(parameter_rows(obj))
    except (OSError, TypeError, ValueError): return
    if not any(kind or meaning for _, kind, _, meaning in rows): return
    code = lambda text: f"``{text}``" if text else ""
    cells = [("*returns*" if parameter == "return" else code(parameter), code(kind), code(default), meaning) for parameter, kind, default, meaning in rows]
    columns = [column for column in zip(("Parameter", "Type", "Default", "Meaning"), *cells, strict=True) if any(column[1:])]
    lines += ["", ".. list-table::", "   :header-rows: 1", "   :class: parameters", ""]
    for row in zip(*columns, strict=True): lines += [f"   * - {row[0]}", *(f"     - {cell}" for cell in row[1:])]
    lines.append("")


def ticks(app, what, name, obj, options, lines):
    "A single backtick in a docstring is a link where it names a symbol and no parameter, else code, as in nbdev."
    try: own = set(inspect.signature(obj).parameters)
    except (TypeError, ValueError): own = set()
    def one(match): return f":py:obj:`{match[1]} <{NAMES[match[1]]}>`" if match[1] in NAMES and match[1] not in own else f"``{match[1]}``"
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
    app.connect("doctree-read", tell_apart, priority=900)
    app.connect("html-page-context", only_notebooks, priority=400)
    app.connect("html-page-context", navigation, priority=400)
