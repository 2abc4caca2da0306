"""A type checker finds nothing wrong in the package, and finds what is wrong in a user's code."""
import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import library

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    if find_spec("mypy") is None:
        pytest.skip("needs mypy, of the extra dev")
    return tmp_path_factory.mktemp("mypy")


def checked(cache: Path, *files: Path) -> subprocess.CompletedProcess:
    "What mypy says of the package, or of files that use it."
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MYPY")} | {"MYPYPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--cache-dir", cache, *files],
                          capture_output=True, text=True, cwd=ROOT, env=plain)


@pytest.mark.slow
def test_the_package_is_clean(cache):
    done = checked(cache)
    assert done.returncode == 0 and done.stdout.startswith("Success"), done.stdout + done.stderr


@pytest.mark.slow
def test_wrong_uses_are_told(cache, tmp_path):
    code = """from xmic.classes import ClassSet
from xmic.encoders import create_encoder
from xmic.config import TrainConfig
from xmic.video import probe

names: list[int] = ClassSet.from_names(["pan"]).names
probe(3)
create_encoder(["mini-clip"])
TrainConfig(epochs="many")
TrainConfig(epochs=3, data_root="/data")
width: int = create_encoder("mini-clip").dim
"""
    (tmp_path / "own.py").write_text(code)
    done = checked(cache, tmp_path / "own.py")
    wrong = [int(line.split("own.py:")[1].split(":")[0]) for line in done.stdout.splitlines() if "own.py:" in line and " error: " in line]
    assert done.returncode == 1 and wrong == [6, 7, 8, 9], done.stdout + done.stderr


def untyped(function: ast.FunctionDef, method: bool) -> bool:
    given = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    given = given[method and not any(getattr(d, "id", "") == "staticmethod" for d in function.decorator_list):]
    rest = [a for a in (function.args.vararg, function.args.kwarg) if a]
    return any(a.annotation is None for a in given + rest) or function.returns is None and function.name != "__init__"


def test_public_signatures_are_typed():
    shown = lambda name: not name.startswith("_") or name in ("__init__", "__call__")
    found = []
    for path in [library.source(module) for module in library.notebooks()]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and shown(node.name) and untyped(node, False): found.append(f"{path.name}:{node.lineno} {node.name}")
            if isinstance(node, ast.ClassDef) and shown(node.name):
                found += [f"{path.name}:{f.lineno} {node.name}.{f.name}" for f in node.body
                          if isinstance(f, ast.FunctionDef) and shown(f.name) and untyped(f, True)]
    assert not found, "\n".join(found)
