"""README.md is nbs/index.ipynb as Markdown, its picture an output of nbs/method.ipynb; --write renders both anew, without Quarto."""
import base64
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


def picture() -> bytes:
    cells = nbformat.read(ROOT / "nbs" / "method.ipynb", as_version=4).cells
    (cell,) = (c for c in cells if "readme-figure" in c.metadata.get("tags", []))
    return base64.b64decode(next(o.data["image/jpeg"] for o in cell.outputs if "image/jpeg" in o.get("data", {})))


if __name__ == "__main__":
    made = {ROOT / "README.md": render().encode(), ROOT / "docs" / "images" / "method.jpg": picture()}
    for path, content in made.items():
        if "--write" in sys.argv:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        elif not path.is_file() or path.read_bytes() != content:
            sys.exit(f"{path.relative_to(ROOT)} is not what nbs/index.ipynb and nbs/method.ipynb give: make readme")
