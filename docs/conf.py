"""The site of `make docs`: these pages as they are, read by myst-parser and dressed by furo."""

project = "saga"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "saga"
html_copy_source = False
myst_heading_anchors = 3  # links to headings are written as on GitHub
nitpicky = True
