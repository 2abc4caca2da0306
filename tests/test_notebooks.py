"""The notebooks as users meet them: parameters, papermill, JupyterLab's rules, and what lies around them."""
import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

import library
from world import register_tiny, write_world
from xmic.features import ExtractConfig
from xmic.config import TrainConfig
from xmic.training import EvaluateConfig

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
UPWARD = {  # imports from a higher layer, within functions: each is to go
    ("distributed", "config"), ("distributed", "features"), ("distributed", "frames"), ("distributed", "training")}
RUN = {"extract": ExtractConfig, "train": TrainConfig, "evaluate": EvaluateConfig}


@pytest.mark.parametrize("name", RUN)
def test_parameters_are_the_fields_of_the_config_with_their_defaults_and_comments(name):
    path = ROOT / "nbs" / f"{name}.ipynb"
    cells = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    found = {n.target.id: ast.literal_eval(n.value) for n in ast.parse(cells[0].source).body}
    defaults = vars(RUN[name]())
    assert found == defaults and list(found) == list(defaults)
    listed = papermill.inspect_notebook(str(path))
    assert set(listed) == set(defaults) and all(p["inferred_type_name"] != "None" for p in listed.values())


def test_nbdev_clean_keeps_the_parameters_tag():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    assert "tags" in settings["DEFAULT"]["allowed_cell_metadata_keys"].split()


def execute(name: str, folder: Path, **parameters) -> nbformat.NotebookNode:
    "Runs a notebook with papermill, with the tiny CLIP made known to its kernel."
    notebook = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4)
    first = next(i for i, c in enumerate(notebook.cells) if c.cell_type == "code")
    notebook.cells.insert(first, nbformat.v4.new_code_cell(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from world import register_tiny; register_tiny()"))
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return papermill.execute_notebook(str(folder / f"{name}.ipynb"), str(folder / f"{name}-out.ipynb"), parameters, cwd=str(ROOT),
                                      progress_bar=False, log_output=False)


@pytest.mark.slow
def test_from_video_to_accuracies_by_papermill(tmp_path):
    world = write_world(tmp_path / "world", videos=8)
    common = dict(dataset="csv", data_root=str(world), encoder=register_tiny(), weights="random", features_root=str(tmp_path / "features"), device="cpu")
    execute("extract", tmp_path, **common, feature_fps=5.0)
    done = execute("train", tmp_path, **common, labels="both", runs_root=str(tmp_path / "runs"), epochs=3, warmup_epochs=1, batch_size=4)
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "metrics.json").exists()
    figures = [o for c in done.cells if c.cell_type == "code" for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(figures) == 3 and not [o for c in done.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    execute("evaluate", tmp_path, run=str(run), template="a photo of a {}", device="cpu")
    assert len(list((run / "evaluations").iterdir())) == 1


@pytest.mark.slow
def test_a_misspelt_parameter_fails_at_once_with_the_right_name(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'batch_size'"):
        execute("train", tmp_path, batchsize=64)


def test_the_readme_is_the_index():
    assert subprocess.run([sys.executable, ROOT / "tests/readme.py"]).returncode == 0


def test_the_library_needs_no_notebook_tools_at_run_time():
    modules = [module for module in library.notebooks() if module.split(".")[-1] != "explorer"]  # which is made of widgets
    absent = ("nbdev", "fastcore", "papermill", "jupyter", "IPython", "ipywidgets", "nbformat")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {', '.join('xmic.' + m for m in modules)}; print('all')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "all", done.stderr


def test_decoding_workers_import_neither_torch_nor_open_clip():
    code = "import sys, xmic.clips; print([m for m in ('torch', 'open_clip', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"


def test_modules_import_only_from_below():
    order = {module: place for place, module in enumerate(library.notebooks())}
    upward = {(module, used) for module in order for used in library.imports(library.source(module).read_text(encoding="utf-8"), module, set(order))
              if order[used] > order[module]}
    assert upward == UPWARD


def test_every_module_has_a_notebook():
    own = {ROOT / "xmic" / "__init__.py", ROOT / "xmic" / "_modidx.py"}  # the first is written by hand, the second by nbdev
    assert {p for p in library.modules() if p not in own and p.name != "__init__.py"} == {library.source(m) for m in library.notebooks()}


def test_imports_of_every_kind_are_seen():
    known = {"base.files", "methods.coop", "methods.base"}
    for line in ("from xmic.base.files import DataError", "from ..base.files import DataError", "import xmic.base.files as f", "from xmic.base import files",
                 "def late():\n    from ..base import files", "from .. import base; from xmic import base; from xmic.base import files"):
        assert library.imports(line, "methods.coop", known) == {"base.files"}, line
    assert library.imports("from .base import Batch", "methods.coop", known) == {"methods.base"}
    assert library.imports("import xmicro.base.files, torch", "methods.coop", known) == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_stay_small(path):
    assert path.stat().st_size < 100_000
