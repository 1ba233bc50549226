"""Where each page stands on the site: map.toml read against the pages that there are."""
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent


@dataclass
class Group:
    "Pages under one heading that folds; without a title, those that stand directly under the section's."
    title: str
    about: str
    patterns: list[str]
    address: str  # of its own page, without an ending
    pages: list[str] = field(default_factory=list)


@dataclass
class Section:
    "A heading of the sidebar."
    title: str
    about: str
    groups: list[Group]
    other: list[str]  # pages that are no notebooks

    def __bool__(self): return bool(self.groups or self.other)


def slug(text: str) -> str:
    return "-".join(re.findall(r"\w+", text.lower()))


def sections(path: Path = HERE / "map.toml") -> list[Section]:
    "The map as it is written, without pages."
    found = []
    for one in tomllib.loads(path.read_text(encoding="utf-8"))["section"]:
        head = Group("", one["about"], one.get("pages", []), "")
        groups = [Group(group["title"], group["about"], group["pages"], f"{slug(one['title'])}/{slug(group['title'])}") for group in one.get("group", [])]
        found.append(Section(one["title"], one["about"], [head, *groups], one.get("other", [])))
    return found


def matches(pattern: str, page: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^/]*"), page) is not None


def weight(pattern: str) -> tuple[bool, int]:
    "How exact an entry is: names before patterns, longer before shorter."
    return "*" not in pattern, len(pattern.replace("*", ""))


def place(pages: list[str], written: list[Section]) -> list[Section]:
    "The map with each page (its address under nbs/, without an ending) in one group; a ValueError says what has no place, two, or is missing."
    entries = [(pattern, group) for section in written for group in section.groups for pattern in group.patterns]
    wrong = [f"{pattern}: named, and no such page" for pattern, _ in entries if "*" not in pattern and pattern not in pages]
    held = {(id(group), pattern): [] for pattern, group in entries}
    for page in pages:
        fitting = sorted((entry for entry in entries if matches(entry[0], page)), key=lambda entry: weight(entry[0]), reverse=True)
        if not fitting: wrong.append(f"{page}: no place")
        elif len(fitting) > 1 and weight(fitting[0][0]) == weight(fitting[1][0]): wrong.append(f"{page}: two places, {fitting[0][0]} and {fitting[1][0]}")
        else: held[id(fitting[0][1]), fitting[0][0]].append(page)
    if wrong: raise ValueError("docs/map.toml: " + "; ".join(wrong))
    for section in written:
        for group in section.groups: group.pages = [page for pattern in group.patterns for page in sorted(held[id(group), pattern])]
        section.groups = [group for group in section.groups if group.pages]
    return [section for section in written if section]


def toctree(entries: list[str], caption: str = "") -> str:
    "A hidden list of pages, which is what the sidebar is made of."
    return "\n".join(["```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), "", *entries, "```"])


def listed(pages: list[str], said: dict[str, tuple[str, str]], base: str) -> str:
    "Links to pages, each with its one sentence; `said` is title and sentence by page."
    return "\n".join(f"- [{said[page][0]}]({base}{page}.ipynb): {said[page][1]}" for page in pages)


def landing(group: Group, said: dict[str, tuple[str, str]]) -> str:
    "The page of a group: what is in it."
    return f"# {group.title}\n\n> {group.about}\n\n{listed(group.pages, said, '../')}\n\n{toctree(['/' + page for page in group.pages])}\n"


def front(site: list[Section], said: dict[str, tuple[str, str]]) -> str:
    "The end of the first page: the sections with their ways in, and the lists behind the sidebar."
    lines, trees = ["## The site", ""], []
    for section in site:
        ways, entries = [], []
        for group in section.groups:
            if group.title: ways.append(f"[{group.title}]({group.address}.md)")
            else: ways += [f"[{said[page][0]}]({page}.ipynb)" for page in group.pages]
            entries += [f"/{group.address}"] if group.title else ["/" + page for page in group.pages]
        lines.append(f"- **{section.title}**. {section.about} {' · '.join(ways)}")
        trees.append(toctree([*entries, *section.other], section.title))
    return "\n\n".join(["\n".join(lines), *trees])
