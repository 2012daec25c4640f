"""Sphinx configuration of the documentation site: `make docs`."""

import base64
import functools
import inspect
import json
import operator
import os
import pathlib
import re
import shutil

os.environ.setdefault("KERAS_BACKEND", "jax")

import hkr_keras
from hkr_keras import sklearn  # not imported by the package

HERE = pathlib.Path(__file__).parent

project = "hkr_keras"
author = "The hkr_keras authors"
copyright = author
version = release = hkr_keras.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "smartquotes"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # committed with outputs; the tests execute them
nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type"]

default_role = "code"  # docstrings are Markdown: `single backticks` are code
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"Any": "Any"}
napoleon_custom_sections = ["Reference"]
napoleon_use_rtype = False
add_module_names = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "hkr_keras"
REPOSITORY = "https://github.com/hkr-keras/hkr_keras"
OCTOCAT = (
    "M8 0C3.58 0 0 3.58 0 8c0 3.54 2.29 6.53 5.47 7.59.4.07.55-.17.55-.38 0-.19-.01-.82-.01-1.49-2.01.37-2.53-.49-2.69"
    "-.94-.09-.23-.48-.94-.82-1.13-.28-.15-.68-.52-.01-.53.63-.01 1.08.58 1.23.82.72 1.21 1.87.87 2.33.66.07-.52.28"
    "-.87.51-1.07-1.78-.2-3.64-.89-3.64-3.95 0-.87.31-1.59.82-2.15-.08-.2-.36-1.02.08-2.12 0 0 .67-.21 2.2.82.64-.18 "
    "1.32-.27 2-.27s1.36.09 2 .27c1.53-1.04 2.2-.82 2.2-.82.44 1.1.16 1.92.08 2.12.51.56.82 1.27.82 2.15 0 3.07-1.87 "
    "3.75-3.65 3.95.29.25.54.73.54 1.48 0 1.07-.01 1.93-.01 2.2 0 .21.15.46.55.38A8.01 8.01 0 0 0 16 8c0-4.42-3.58-8"
    "-8-8Z"
)
html_theme_options = {
    "top_of_page_buttons": [],
    "footer_icons": [
        {
            "name": "Repository",
            "url": REPOSITORY,
            "html": f'<svg viewBox="0 0 16 16" fill="currentColor"><path d="{OCTOCAT}"/></svg>',
            "class": "",
        }
    ],
}
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# ---- notebooks, and a picture of each for the gallery ----------------------------------------------------

PICTURES = {"01": 4, "02": 1, "03": 0, "04": 2, "05": 1, "06": 0, "07": 0, "08": 0}  # which output of a notebook


def bring_notebooks() -> None:
    """Copies the notebooks below this folder, and one picture out of each."""
    for folder in ("notebooks", "gallery"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
        (HERE / folder).mkdir()
    for path in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
        shutil.copy(path, HERE / "notebooks")
        cells = json.loads(path.read_text())["cells"]
        outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
        pictures = [data["image/png"] for data in outputs if "image/png" in data]
        number = path.name[:2]
        (HERE / "gallery" / f"{number}.png").write_bytes(base64.b64decode(pictures[PICTURES[number]]))


bring_notebooks()


def link_notebooks(app, docname, source) -> None:
    """Links of the guide to notebooks of the repository, to those of the site."""
    source[0] = source[0].replace("(../../notebooks/", "(../notebooks/")


# ---- every public name is documented ---------------------------------------------------------------------


def public_objects() -> dict[str, object]:
    """Public functions and classes of the package, by their full names."""
    modules = [value for name in hkr_keras.__all__ if inspect.ismodule(value := getattr(hkr_keras, name))]
    found = {}
    for module in (hkr_keras, sklearn, *modules):
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            is_own = getattr(value, "__module__", "").startswith(module.__name__)
            if is_own and callable(value) and not name.startswith("_"):
                found[f"{module.__name__}.{name}"] = value
    return found


def check_coverage(app, environment) -> None:
    """Warns of public names that no page documents."""
    from sphinx.util import logging

    documented = {
        id(operator.attrgetter(name.removeprefix("hkr_keras."))(hkr_keras))
        for name, entry in environment.domaindata["py"]["objects"].items()
        if entry.objtype in ("class", "exception", "function")
    }
    missing = [name for name, value in public_objects().items() if id(value) not in documented]
    if missing:
        logging.getLogger(__name__).warning("Expected all public names on a page. Missing: %s", ", ".join(missing))


def keras_signature(app, what, name, value, options, signature, returns):
    """The signature that `help` shows, in place of that of Keras's `__new__`."""
    return (str(inspect.signature(value)), returns) if what == "class" else None


@functools.cache
def references() -> dict[str, str]:
    """Where the public names lead that docstrings write as `code`: by full name, below the package, and alone."""
    found: dict[str, str] = {}
    for full in public_objects():
        parts = full.split(".")
        public = f"hkr_keras.{parts[-1]}" if hasattr(hkr_keras, parts[-1]) else full
        for short in (full, ".".join(parts[1:]), ".".join(parts[-2:]), parts[-1]):
            found.setdefault(short, public)
    return found


def link_names(app, what, name, value, options, lines) -> None:
    """Public names in docstrings become links; examples and the object's own name stay as they are."""
    targets, own = references(), name.rpartition(".")[2]

    def link(match):
        text = match[1]
        target = targets.get(text.removeprefix("hkr_keras."))
        return f":py:obj:`{text} <{target}>`" if target and text.rpartition(".")[2] != own else match[0]

    for i, line in enumerate(lines):
        if ">>>" not in line:
            lines[i] = re.sub(r"(?<![:`])`([A-Za-z_][\w.]*)`(?!`)", link, line)


def setup(app) -> None:
    """Connects these functions."""
    app.connect("source-read", link_notebooks)
    app.connect("autodoc-process-signature", keras_signature)
    app.connect("autodoc-process-docstring", link_names)
    app.connect("env-check-consistency", check_coverage)
