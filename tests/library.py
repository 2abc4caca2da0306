"""The library as its notebooks describe it: which module each exports, and what the modules import from each other."""
import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def notebooks() -> dict[str, Path]:
    "The notebook of each module, such as `methods.coop`, from the lowest layer to the highest: in the order of their paths."
    found = {}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if not re.match(r"\d", path.relative_to(ROOT / "nbs").parts[0]) or ".ipynb_checkpoints" in path.parts:
            continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        (name,) = {name for cell in cells for name in re.findall(r"(?m)^#\|\s*default_exp\s+([\w.]+)", "".join(cell["source"]))}
        assert name not in found, (name, path, found[name])
        found[name] = path
    return found


def source(module: str) -> Path:
    "The exported file of a module."
    return ROOT / "xmic" / (module.replace(".", "/") + ".py")


def modules() -> list[Path]:
    "Every Python file of the package, with the `__init__.py` of each subpackage."
    return sorted((ROOT / "xmic").rglob("*.py"))


def imports(code: str, module: str, known: set[str]) -> set[str]:
    "The modules of the library that a module imports, those within functions and for type checkers included, however it is written."
    package, found = ["xmic", *module.split(".")[:-1]], set()
    for node in ast.walk(ast.parse(code)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[:len(package) + 1 - node.level] if node.level else []
            start = ".".join([*start, *filter(None, [node.module])])
            names = [start, *(f"{start}.{alias.name}" for alias in node.names)]
        found |= {name.removeprefix("xmic.") for name in names if name.removeprefix("xmic.") in known and name.startswith("xmic.")}
    return found - {module}
