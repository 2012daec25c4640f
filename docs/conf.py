"""Sphinx configuration of the documentation site: `make docs`."""

import base64
import inspect
import json
import operator
import os
import pathlib
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
myst_enable_extensions = ["colon_fence", "smartquotes"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # committed with outputs; the tests execute them
nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type"]

default_role = "code"  # docstrings are Markdown: `single backticks` are code
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_custom_sections = ["Reference"]
napoleon_use_rtype = False
add_module_names = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "hkr_keras"
html_theme_options = {"top_of_page_buttons": []}
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# ---- notebooks, and a picture of each for the gallery ----------------------------------------------------

PICTURES = {"01": 3, "02": 5, "03": 0, "04": 2, "05": 1, "06": 0, "07": 0, "08": 0}  # which output of a notebook


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


def setup(app) -> None:
    """Connects the three."""
    app.connect("source-read", link_notebooks)
    app.connect("autodoc-process-signature", keras_signature)
    app.connect("env-check-consistency", check_coverage)
