"""From a clip to a table, as a user goes, in the environment that this is run with: `make smoke` makes a fresh one.

    python tests/smoke.py"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from videos import write_video

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def run(*command: object) -> str:
    "The standard output of a command of this environment; the whole of what it said where it fails."
    done = subprocess.run([BIN / str(command[0]), *map(str, command[1:])], capture_output=True, encoding="utf-8", errors="replace", cwd=os.environ["XMIC_ROOT"])
    if done.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def pairs(settings: dict) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def predict(root: Path) -> str:
    write_video(root / "clip.mp4", frames=40, fps=10)
    answers = run("xmic", "predict", root / "clip.mp4", "--model", ROOT / "data/mini/recognizer", "--nouns", "pan,knife,tap", "--json").splitlines()
    names = [{noun["name"] for noun in json.loads(answer)["nouns"]} for answer in answers]
    assert names == [{"pan", "knife", "tap"}] * 2, answers
    return f"{len(answers)} stretches of a clip"


def extract(root: Path) -> str:
    from xmic.experiments import WORLDS, profile
    run("python", "-c", f"if __name__ == '__main__':\n from xmic.mini import build; build({WORLDS['tiny']!r}, 'tiny', progress=False)")
    small = profile("mini", "tiny")
    run("xmic", "extract", *pairs(small.extract | small.encoders["clip"] | dict(
        dataset="epic", data_root=small.root("epic"), splits=["train", "test"], features_root=small.features_root)))
    shards = list((root / small.features_root).rglob("*.safetensors"))
    assert len(shards) >= 4, shards
    return f"{len(shards)} shards of features of the mini world"


def train(root: Path) -> str:
    from xmic.experiments import profile, runs
    (chosen,) = [r for name, r in runs(1, profile("mini", "tiny"), 1).items() if name.startswith("epic-noun-xmic-seed0")]
    run("xmic", "train", *pairs(chosen.parameters | dict(targets=[], target_roots={}, epochs=2, warmup_epochs=1)))
    history = pd.read_csv(root / chosen.parameters["runs_root"] / chosen.name / "history.csv")
    assert history.epoch.nunique() == 2, history
    return "X-MIC for 2 epochs"


def table(root: Path) -> str:
    run("papermill", ROOT / "nbs/tables/table1.ipynb", root / "table1.ipynb", "--no-progress-bar", "-p", "size", "tiny", "-p", "out", root / "tables")
    filled = [line for line in (root / "tables/table1.md").read_text(encoding="utf-8").splitlines() if line.startswith("| X-MIC") and any(map(str.isdigit, line))]
    assert filled, (root / "tables/table1.md").read_text(encoding="utf-8")
    return "Table 1 with the row of that run"


def main() -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "av", "numpy", "pandas"))
    print(f"Python {sys.version.split()[0]}: {packages}", flush=True)
    with tempfile.TemporaryDirectory(prefix="xmic-smoke-") as folder:
        root = Path(folder).resolve()
        os.environ |= dict(XMIC_ROOT=str(root), XMIC_CACHE=str(root / "cache"), OMP_NUM_THREADS="1")
        shutil.copytree(ROOT / "data/mini/weights", root / "data/mini/weights")
        for step in (predict, extract, train, table):
            begin = time.perf_counter()
            print(f"{step.__name__}: {step(root)} ({time.perf_counter() - begin:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
