"""The Python API as pages, from the docstrings in the source; nothing is imported.

Griffe reads the files; annotations stay as they are written (`Share`, not what it stands for).
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import indent

import griffe

# Title and module of each page. Of rft itself it has the names that rft/__init__.pyi exports, of
# others all public functions and classes, and those of their modules.
PAGES = {
    "model": ("Load a model", "rft"),
    "config": ("Configuration", "rft.config"),
    "recipes": ("Recipes", "rft.recipes"),
    "method": ("The method", "rft.method"),
    "evaluate": ("Evaluation", "rft.evaluate"),
    "statistics": ("Statistics", "rft.statistics"),
}
# modules and members that read a command line
COMMAND_LINE = ("__main__", "command", "main", "Arguments")
HEADINGS = {"parameters": "Arguments", "raises": "Raises", "returns": "Returns", "yields": "Yields"}


def pages(root: Path) -> Iterator[tuple[str, str]]:
    """Yield name and text of each page of the reference."""
    package = griffe.load(
        "rft", search_paths=[str(root)], allow_inspection=False, docstring_parser="google"
    )
    for name, (title, path) in PAGES.items():
        _, _, inner = path.partition(".")
        parts = _module(package[inner]) if inner else _exports(package)
        yield f"api/{name}.md", "\n\n".join([f"# {title}", *parts]) + "\n"
    lines = [f"- [{title}]({name}.md)" for name, (title, _) in PAGES.items()]
    tree = "\n".join(["```{toctree}", ":hidden:", "", *PAGES, "```"])
    about = (
        "`rft.load` is the interface for users. The commands are built from the other modules,\n"
        "whose functions work on tensors, arrays and frozen dataclasses."
    )
    yield "api/index.md", "\n\n".join(["# Python API", about, "\n".join(lines), tree]) + "\n"


def exports(root: Path) -> list[str]:
    """List the public names of rft/__init__.pyi."""
    stub = griffe.visit("rft", root / "rft/__init__.pyi", (root / "rft/__init__.pyi").read_text())
    return [name for name in stub.members if not name.startswith("_")]


def _exports(package: griffe.Object) -> list[str]:
    parts = [_text(package)]
    found = [package[name].final_target for name in exports(Path(str(package.filepath)).parents[1])]
    for member in sorted(found, key=lambda one: not one.is_function):
        parts += list(_member(member, "rft"))
    return parts


def _module(module: griffe.Object) -> list[str]:
    """Document a module and its members, then its modules, each under a heading."""
    parts = [_text(module)]
    own = [
        one
        for one in module.members.values()
        if not (one.is_alias or one.name.startswith("_") or one.name in COMMAND_LINE)
    ]
    for member in sorted(own, key=_order):
        if member.is_module:
            inner = _module(member)
            # a docstring alone, where nothing is public, is left out
            parts += [f"## {member.path}", *inner] if len(inner) > 1 else []
        else:
            parts += list(_member(member, module.path))
    return parts


def _order(member: griffe.Object | griffe.Alias) -> tuple[bool, bool, str]:
    """Order members as in the source, but constants behind them and then modules by name."""
    return member.is_module, member.is_attribute, member.name if member.is_module else ""


def _member(member: griffe.Object | griffe.Alias, module: str) -> Iterator[str]:
    """Document a class, function or constant by a directive of Sphinx's Python domain."""
    if member.is_class:
        inner = [
            part
            for one in member.members.values()
            if not one.name.startswith("_") and not one.is_alias
            for part in _member(one, "")
        ]
        yield _directive("class", member.name, module, [_text(member), *inner], fence=5)
    elif member.is_function:
        kind = "function" if module else "method"
        yield _directive(kind, member.signature(), module, [_text(member)], options=_labels(member))
    elif "property" in member.labels:
        yield _directive("property", member.name, module, [_text(member)], options=_type(member))
    elif not module or member.docstring or str(member.value).startswith("Literal["):
        options = _type(member)
        if member.value is not None and "\n" not in str(member.value):
            options.append(f":value: {json.dumps(str(member.value))}")
        kind = "data" if module else "attribute"
        yield _directive(kind, member.name, module, [_text(member)], options=options)


def _labels(function: griffe.Object | griffe.Alias) -> list[str]:
    return [f":{name}:" for name in ("classmethod", "staticmethod") if name in function.labels]


def _type(attribute: griffe.Object | griffe.Alias) -> list[str]:
    # options are YAML, which would take quotes off
    return [f":type: {json.dumps(str(attribute.annotation))}"] if attribute.annotation else []


def _directive(
    kind: str,
    head: str,
    module: str,
    body: list[str],
    *,
    options: Sequence[str] = (),
    fence: int = 4,
) -> str:
    ticks = "`" * fence
    lines = [f":module: {module}"] if module else [":no-contents-entry:"]
    text = "\n\n".join(part for part in body if part)
    return "\n".join([f"{ticks}{{py:{kind}}} {head}", *lines, *options, "", text, ticks])


def _text(member: griffe.Object | griffe.Alias) -> str:
    """Write a docstring as Markdown, its sections as lists."""
    if member.docstring is None:
        return ""
    parts = []
    for section in member.docstring.parsed:
        if section.kind is griffe.DocstringSectionKind.text:
            parts.append(section.value)
        elif section.kind.value in HEADINGS:
            items = [_item(section.kind.value, one) for one in section.value]
            parts.append("\n".join([f"**{HEADINGS[section.kind.value]}**", "", *items]))
        elif section.kind is griffe.DocstringSectionKind.admonition:
            # any other word with a colon above an indented block
            parts.append(f"{section.title}:\n\n{indent(section.value.contents, '    ')}")
        else:
            raise ValueError(f"{member.path}: a section {section.kind.value} in its docstring")
    return "\n\n".join(parts)


def _item(kind: str, one: griffe.DocstringElement) -> str:
    name = one.name if kind == "parameters" else one.annotation
    text = one.description.replace("\n", "\n  ")
    return f"- `{name}`: {text}" if name else f"- {text}"
