"""The built wheel: what is in it, and that it works outside a clone without the notebooks' tools."""
import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import library
from world import CONFIG, TINY, write_world

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TOOLS = ("jupyter", "jupyter_core", "jupyterlab", "papermill", "nbdev", "fastcore", "nbformat", "nbconvert", "snakemake", "pytest", "IPython", "ipywidgets",
         "tensorboard")
GUARD = f"""
import sys

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {TOOLS}: raise ModuleNotFoundError(f"{{name}} is a tool of the notebooks", name=name)

sys.meta_path.insert(0, Guard())
sys.path.insert(0, sys.argv[1])
import xmic
assert xmic.__file__.startswith(sys.argv[1]), xmic.__file__
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "Built from the files that git tracks or would, so that nothing else that lies about can be in it."
    if find_spec("build") is None:
        pytest.skip("needs the package build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if name.split("/")[0] in ("xmic", "tests") or name.startswith("data/paper/") or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (built,) = out.glob("*.whl")
    (packed,) = out.glob("*.tar.gz")
    assert packed.stat().st_size < 1_000_000
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    installer = [sys.executable, "-m", *(["uv", "pip"] if find_spec("uv") else ["pip"])]
    if not find_spec("uv") and not find_spec("pip"):
        with zipfile.ZipFile(wheel) as archive: archive.extractall(folder)
    else:
        subprocess.run([*installer, "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel], check=True, cwd=folder)
    return folder


def outside(folder: Path, installed: Path, code: str, **environ: str) -> subprocess.CompletedProcess:
    "Runs code in an isolated interpreter that has the installed package, and none of the tools."
    plain = {k: v for k, v in os.environ.items() if not k.startswith("XMIC_")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-I", "-c", GUARD + code, str(installed)], capture_output=True, text=True, cwd=folder, env=plain | environ)


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive: names = set(archive.namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in library.modules()}
    printed = {f"xmic/_paper/{p.name}" for p in (ROOT / "data/paper").glob("*.csv")}
    about = {name for name in names if name.startswith(f"xmic-{PROJECT.get('version', '')}") or ".dist-info/" in name}
    assert len(printed) == 8 and names - about == modules | printed | {"xmic/py.typed"}
    assert {Path(name).name for name in about} >= {"METADATA", "RECORD", "LICENSE"} and wheel.stat().st_size < 1_000_000


def test_every_module_imports_without_the_tools(installed, tmp_path):
    extra = ("mini", "pretraining", "scenes", "shapes", "explorer")  # the first four draw with OpenCV, the last has widgets: extras of their own
    code = f"""
import importlib, pkgutil
names = [m.name for m in pkgutil.walk_packages(xmic.__path__, "xmic.")]
assert len(names) > 30
for name in names:
    if name.split(".")[-1] not in {extra}: importlib.import_module(name)
print("cv2" in sys.modules)
from xmic.paper import printed
assert all(len(printed(table)) for table in (*range(1, 8), "poster"))
"""
    done = outside(tmp_path, installed, code)
    assert done.returncode == 0 and done.stdout.strip() == "False", done.stderr


def test_an_empty_folder_of_the_same_name_does_not_hide_the_package(tmp_path):
    "As in the folder above a clone, with the package installed as `make env` does."
    (tmp_path / "xmic").mkdir()
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", "import xmic; print(xmic.__file__, xmic.__version__)"], capture_output=True, text=True, cwd=tmp_path, env=plain)
    assert done.returncode == 0 and done.stdout.split()[0].endswith("__init__.py"), done.stderr


@pytest.mark.slow
def test_from_video_to_a_prediction_in_an_empty_folder(installed, tmp_path):
    write_world(tmp_path / "mine", videos=6)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f"{TINY}.json").write_text(json.dumps(CONFIG))
    code = f"""
if __name__ == "__main__":
    import warnings
    warnings.simplefilter("ignore")
    import open_clip
    open_clip.add_model_config("models")
    from xmic.features import ExtractConfig, extract_dataset
    from xmic.recognizer import Recognizer
    from xmic.config import TrainConfig
    from xmic.training import train
    common = dict(dataset="csv", data_root="mine", encoder={TINY!r}, weights="random", device="cpu")
    extract_dataset(ExtractConfig(**common, workers=0, feature_fps=5.0))
    run = train(TrainConfig(**common, epochs=2, warmup_epochs=0, batch_size=4, frames=4))
    found = Recognizer.from_pretrained(run.folder, device="cpu").predict("mine/videos/v0.mp4", nouns=["pan", "knife"])
    assert sorted(found.nouns.name) == ["knife", "pan"], found
    print(run.folder.parent)
"""
    done = outside(tmp_path, installed, code, XMIC_CACHE=str(tmp_path / "disk"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "runs") and {p.name for p in tmp_path.iterdir()} == {"mine", "models", "disk", "runs"}
    assert {p.name for p in (tmp_path / "disk").iterdir()} == {"features", "text"} and list((tmp_path / "disk").rglob("text/*"))


def test_the_mini_world_without_its_extra_and_its_encoders_says_what_to_install(installed, tmp_path):
    code = """
from xmic.experiments import prepare
from xmic.files import DataError
from xmic.config import TrainConfig
sys.modules["cv2"] = None
try: prepare(TrainConfig())
except DataError as e: print(e)
"""
    done = outside(tmp_path, installed, code)
    assert "pip install 'xmic[mini]'" in done.stdout and not list(tmp_path.iterdir()), done.stderr


def test_extras_name_what_the_kit_imports_and_the_tools_are_in_no_dependency():
    assert {"notebooks", "mini", "workflow", "cluster", "tensorboard", "dev"} <= set(PROJECT["optional-dependencies"])
    needed = {re.match(r"[\w.-]+", d)[0].lower().replace("-", "_") for d in PROJECT["dependencies"]}
    assert not needed & {tool.lower() for tool in TOOLS}
    names = {"open_clip": "open_clip_torch", "PIL": "pillow", "google": "protobuf", "matplotlib": "seaborn", "cv2": "opencv_python_headless", "yaml": "pyyaml"}
    optional = {"cv2", "ipywidgets"}
    extra = {re.match(r"[\w.-]+", d)[0].lower().replace("-", "_") for e in PROJECT["optional-dependencies"].values() for d in e}
    for path in library.modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # imported with the module
            for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []):
                top = name.split(".")[0]
                if top in sys.stdlib_module_names or top == "xmic": continue
                assert names.get(top, top.lower()) in (needed | extra if top in optional else needed), (path.name, name)


def test_the_conda_environment_installs_the_same():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    python = tuple(map(int, re.search(r"python=(\d+)\.(\d+)", text).groups()))
    low, high = (tuple(map(int, v.split("."))) for v in re.findall(r"\d+\.\d+", PROJECT["requires-python"]))
    assert low <= python < high
    assert re.findall(r"- (-\S+ \S+)", text) == ["-r requirements.lock", "-e ."]
