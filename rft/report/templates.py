"""Templates of self-contained pages: a common style (base.css), and all texts escaped."""

import base64
from collections.abc import Sequence
from pathlib import Path

import jinja2

from rft.text import plain


def environment(folders: Sequence[Path] = ()) -> jinja2.Environment:
    """Make a jinja environment for the templates of this and other folders; texts are escaped.

    The filter `plain` escapes control characters, which jinja does not. base.css needs the module
    `rft.report.colors` as `grounds`.
    """
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        # a misspelt name in a template raises instead of printing nothing
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["plain"] = plain
    return made


def data_url(kind: str, content: bytes) -> str:
    """Encode an image as the data URL of an `img` element."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
