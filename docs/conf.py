"""The site: the pages of this folder, files of the repository, and the docstrings (make docs).

The pages are written to be read where the repository is read, so their links lead to its files.
Here they lead to the pages that show those files.
"""
import inspect
import os
import re
import shutil
import types
from pathlib import Path

from sphinx.util import logging

import optcore

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GALLERY = Path("build", "gallery")

project = "optcore"
author = project_copyright = "the optcore developers"
version = release = optcore.__version__

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
root_doc = "index"
nitpicky = True
nitpick_ignore = {("py:class", "numpy.dtype"), ("py:obj", "numpy.show_config")}
default_role = "autolink"       # `name` in a docstring links where there is such a name
highlight_language = "python"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

numpydoc_show_class_members = False         # autodoc lists them
autodoc_default_options = {"no-value": True}
autodoc_member_order = "groupwise"
autodoc_typehints = "none"                  # the docstrings say the types, and what they mean
# What the adapters adapt to: nothing of it is shown, and the pages are the same without it.
autodoc_mock_imports = ["flwr", "mpi4py", "sklearn", "torch"]

html_theme = "furo"
html_title = f"optcore {release}"
html_copy_source = False
html_show_sphinx = False

# A page that begins with a link alone to a file of the repository shows that file.
SHOWS = re.compile(r"\[(?P<title>.+)\]\(\.\./(?P<file>.+)\)\n")
SHOWN = {
    match["file"]: page.stem for page in sorted(DOCS.glob("*.md"))
    if (match := SHOWS.match(page.read_text(encoding="utf-8")))
}
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^][]+)\]\((?P<path>[^()#\s:]+)(?P<id>#[^()\s]*)?\)")


def read(app, docname, source):
    """Put a shown file in the place of its link, and lead all links to the site's pages."""
    folder = DOCS
    match = SHOWS.match(source[0])
    if match:
        file = ROOT / match["file"]
        app.env.note_dependency(str(file))
        folder, text = file.parent, file.read_text(encoding="utf-8")
        if not text.startswith("# "):       # a part of a page, written from ### on
            text = f"# {match['title']}\n\n" + re.sub("^#(?=##)", "", text, flags=re.MULTILINE)
        source[0] = text + source[0][match.end():]
    source[0] = LINK.sub(lambda link: led(link, folder), source[0])


def led(link, folder):
    """Return a link of a file in `folder` as it is on the site."""
    path = Path(os.path.normpath(folder / link["path"]))
    file = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
    target = link["id"] or ""
    if path.is_relative_to(ROOT / GALLERY):
        if not (ROOT / GALLERY / "index.html").is_file():
            return link["text"]
        return f'<a href="{path.relative_to(ROOT / GALLERY.parent).as_posix()}{target}">' \
               f'{link["text"]}</a>'
    shown = [page for name, page in SHOWN.items() if name == file or name.startswith(f"{file}/")]
    if shown:
        target = f"{shown[0]}.md{target}"
    elif file.startswith("examples/"):
        target = f"examples.md#{file.split('/')[1].replace('.', '')}"
    elif path.exists():
        target = f"{os.path.relpath(path, DOCS)}{target}"
    else:
        return link[0]      # nothing of ours: Sphinx will say
    return f"{link['image']}[{link['text']}]({target})"


def signature(app, what, name, thing, options, args, returns):
    """Write what a caller may write: neither `self`, which compiled methods name, nor types."""
    function = thing.__init__ if what == "class" else thing
    if not inspect.isroutine(function) or isinstance(function, types.WrapperDescriptorType):
        return None         # a compiled class's docstring has it
    if not function.__module__.startswith("optcore."):      # what is adapted, or a built-in
        return ("(**params)", "") if what == "class" else None
    written = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in written.parameters.values()
                  if p.name != "self" and not p.name.startswith("_")]
    written = written.replace(parameters=parameters, return_annotation=written.empty)
    return str(written), ""


def finish(app, exception):
    """Take the gallery along, which needs no Sphinx."""
    if exception is None and app.builder.name == "html":
        if (ROOT / GALLERY / "index.html").is_file():
            shutil.copytree(ROOT / GALLERY, Path(app.outdir, GALLERY.name), dirs_exist_ok=True)
        else:
            logging.getLogger(__name__).info("no gallery: `make gallery` builds it")


def setup(app):
    """Connect what is above."""
    app.connect("source-read", read)
    app.connect("autodoc-process-signature", signature, priority=100)   # before numpydoc's
    app.connect("build-finished", finish)
