"""README.md is nbs/index.ipynb as Markdown; --write renders it anew, without Quarto."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]


def render() -> str:
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.cells = [c for c in notebook.cells if not re.match(r"#\|\s*(hide|default_exp)", c.source)]
    for cell in notebook.cells:
        cell.source = re.sub(r"(?m)^#\|.*\n", "", cell.source)
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv:
        (ROOT / "README.md").write_text(render(), encoding="utf-8")
    elif (ROOT / "README.md").read_text(encoding="utf-8") != render():
        sys.exit("README.md is not what nbs/index.ipynb renders to: make readme")
