"""Sphinx's settings for the site; `python -m docs.site.build` starts it."""

import rft

project = html_title = "rft"
release = rft.__version__
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "index"
# `--option` and "quotes" stay as they are typed
smartquotes = False
# blocks without a language are command lines and their output
highlight_language = "text"
# anchors as GitHub makes them, on every level that the pages have
myst_heading_anchors = 6
myst_fence_as_directive: list[str] = []
# annotations are as the source has them, and two modules may have a class of one name
suppress_warnings = ["misc.highlighting_failure", "ref.python"]
add_module_names = False
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_domain_indices = False
