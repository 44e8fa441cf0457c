"""Pages of one file without a network: one look (base.css), everything of others escaped."""

import base64
from collections.abc import Sequence
from pathlib import Path

import jinja2

from rft.text import plain


def environment(folders: Sequence[Path] = ()) -> jinja2.Environment:
    """Return what renders the templates of this folder, and of others; texts are escaped.

    The filter `plain` escapes control characters, which jinja does not. base.css wants the colours
    `rft.report.colors` as `grounds`.
    """
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        # a misspelt name in a template is an error, not an empty text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["plain"] = plain
    return made


def data_url(kind: str, content: bytes) -> str:
    """Return an image of a kind that browsers show, as the address of an `img` element."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
