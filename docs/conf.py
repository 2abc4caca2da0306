"""The site: pages of docs/ and data/, and the notebooks as they are committed. `make docs` builds it into _docs/html; nothing is executed."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import xmic  # noqa: E402
from pages import committed_tables, contents, measurements  # noqa: E402

project, author, copyright = "xmic", "The xmic developers", "2026 The xmic developers"
version = release = xmic.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "pages"]
root_doc = "docs/index"
# The root of the repository is the source, so that links between its files lead to the same places here and on GitHub.
include_patterns = ["docs/*.md", "nbs/**.ipynb", "data/README.md", "data/paper/README.md", "benchmarks/README.md", "tests/faults/README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
WALKED = {"docs", "nbs", "data", "benchmarks", "tests"}
exclude_patterns = [p.name for p in ROOT.iterdir() if p.is_dir() and p.name not in WALKED]
exclude_patterns += [f"data/{p.name}" for p in (ROOT / "data").iterdir() if p.is_dir() and p.name != "paper"]
exclude_patterns += ["**/.ipynb_checkpoints", "nbs/index.ipynb", "nbs/report_template"]

nb_execution_mode = "off"
nb_code_prompt_show = nb_code_prompt_hide = "{type}"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "substitution", "colon_fence"]
myst_heading_anchors = 4
NBS = ROOT / "nbs"
PIPELINE = ["extract", "store_frames", "train", "evaluate"]  # come first; then tables and whatever else is run
ELSEWHERE = {"index", "method", "explore"}
RUN = [p for p in NBS.glob("[!0-9]*.ipynb") if p.stem not in ELSEWHERE] + list((NBS / "tables").glob("*.ipynb"))
RUN.sort(key=lambda p: (p.stem not in PIPELINE, p.parent == NBS, PIPELINE.index(p.stem) if p.stem in PIPELINE else 0, p.stem))
myst_substitutions = measurements(ROOT / "reports" / "bench") | dict(
    cpu_extraction="ViT-B-16-quickgelu, 456x256, cpu",
    notebooks=contents([p for p in sorted(NBS.rglob("*.ipynb")) if p.relative_to(NBS).parts[0][0].isdigit()]), run_notebooks=contents(RUN),
    tutorials=contents(sorted((NBS / "tutorials").glob("*.ipynb"), key=lambda p: ("method" not in p.stem, p.stem))),
    explorer=contents(list(NBS.glob("explore.ipynb"))), mini_tables=committed_tables(ROOT / "reports" / "mini"))

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # pages.py writes them beside what the comments say
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
autodoc_class_signature = "mixed"
add_module_names = False
default_role = "literal"
python_maximum_signature_line_length = 90
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!xmic\.).*")]  # names of other projects: their sites cannot be asked without a network

html_theme = "furo"
html_title = f"xmic {version}"
html_math_renderer = "mathml"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
html_theme_options = dict(
    light_css_variables={"color-brand-primary": "#1b6f5a", "color-brand-content": "#1b6f5a"},
    dark_css_variables={"color-brand-primary": "#67c7ab", "color-brand-content": "#67c7ab"},
)
pygments_style, pygments_dark_style = "friendly", "github-dark"
