"""The tutorials as their readers run them: by papermill, in a folder without anything but the kit's small encoders."""
import json
import re
import shlex
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest

from xmic import experiments
from xmic.features import FeatureStore
from xmic.segments import read_classes

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "nbs/tutorials").glob("*.ipynb"))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A project's root of its own, that the tutorials share; their kernels stand in another, empty folder."
    root = tmp_path_factory.mktemp("root")
    (root / "data/mini").mkdir(parents=True)
    (root / "data/mini/weights").symlink_to(ROOT / "data/mini/weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XMIC_ROOT", str(root))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield root


def execute(path: Path, folder: Path, **parameters) -> nbformat.NotebookNode:
    elsewhere = folder.parent / f"{path.stem}-stands-here"
    elsewhere.mkdir()
    done = papermill.execute_notebook(str(path), str(elsewhere / "out.ipynb"), parameters, cwd=str(elsewhere), progress_bar=False, log_output=False)
    assert [p.name for p in elsewhere.iterdir()] == ["out.ipynb"]
    return done


def said(done: nbformat.NotebookNode) -> str:
    "All that a notebook answered, as text."
    outputs = [o for c in done.cells if c.cell_type == "code" for o in c.outputs]
    return "\n".join("".join(o.get("text", "") or o.get("data", {}).get("text/markdown", "") or o.get("data", {}).get("text/plain", "")) for o in outputs)


def metrics(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def commands(path: Path) -> list[list[str]]:
    "The papermill commands of a tutorial, word by word."
    texts = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
    return [shlex.split(line) for t in texts for block in re.findall(r"```sh\n(.*?)```", t, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_commands_name_notebooks_and_parameters_that_exist(path):
    for program, notebook, out, *rest in commands(path):
        assert (program, out) == ("papermill", "out.ipynb")
        known = papermill.inspect_notebook(str(ROOT / notebook))
        names = [rest[i + 1].split(":")[0] for i, word in enumerate(rest) if word in ("-p", "-y")]
        assert names and set(names) <= set(known), (notebook, names)


def test_a_method_in_30_lines_has_its_row_in_table_1(folder):
    execute(ROOT / "nbs/tutorials/your_method.ipynb", folder)
    code = folder / "runs/tutorials/my_method.py"
    assert len(code.read_text().splitlines()) <= 30
    table = pd.read_csv(folder / "runs/tutorials/your_method/table1.csv").query("method == 'Temporal mean'")
    values = table.set_index(["source", "kind", "column"])["mean"]
    assert len(values) == 12 and values.notna().all()
    runs = [path.parent for path in (folder / "runs/mini-tiny").glob("*-TemporalMean-*/metrics.json")]
    assert len(runs) == 4
    for run in runs:
        source, kind = run.name.split("-")[:2]
        target = {"epic": "ego4d", "ego4d": "epic"}[source]
        for dataset in (source, target):
            assert values[source, kind, dataset] == pytest.approx(metrics(run)["results"][dataset][kind]["top1"]["value"], abs=0.01)
        assert (run / "code").is_dir()
    every = pd.read_csv(folder / "runs/tutorials/your_method/table1.csv").set_index("method")["mean"]
    assert every["ZS CLIP"].notna().all() and every["X-MIC"].notna().all() and every["CoOp"].isna().all()
    assert "Temporal mean" not in experiments.METHODS

    (command,) = [words for words in commands(ROOT / "nbs/tutorials/your_method.ipynb") if "table1" in words[1]]
    rows = {"Temporal mean": dict(method="runs/tutorials/my_method.py:TemporalMean", lr=0.002)}
    assert "lr: 0.002" in command[-1]
    execute(ROOT / command[1], folder, size="tiny", rows=rows, out=str(folder / "table"))
    again = pd.read_csv(folder / "table/table1.csv").query("method == 'Temporal mean'")
    assert again["mean"].tolist() == table["mean"].tolist()


def test_a_dataset_by_csv_and_by_reader_with_its_shared_and_novel_classes(folder):
    done = execute(ROOT / "nbs/tutorials/your_dataset.ipynb", folder)
    kitchen, runs = folder / "runs/tutorials/kitchen", folder / "runs/tutorials/runs"
    own, epic = (set(read_classes(name, root, "noun").names) for name, root in (("kitchen", kitchen), ("epic", folder / "data/mini-tiny/epic")))
    counted = {"top1": len(own), "shared": len(own & epic), "novel": len(own - epic)}
    assert 0 < counted["shared"] < counted["top1"]
    trained = {name: metrics(run) for name in ("epic-noun-xmic", "epic-noun-zero_shot", "kitchen-noun-xmic") for run in runs.glob(f"{name}*")}
    assert len(trained) == 3
    for name in ("epic-noun-xmic", "epic-noun-zero_shot"):
        assert trained[name]["classes"]["kitchen"]["noun"] == counted
    assert trained["kitchen-noun-xmic"]["classes"]["epic"]["noun"] == {"top1": len(epic), "shared": len(own & epic), "novel": len(epic - own)}
    assert all(m["segments"]["kitchen"] == {"segments": 12, "with_features": 12, "missing": 0} for m in trained.values())
    assert len(list(runs.glob("epic-noun-xmic*/evaluations/*"))) == 1
    assert "stop after it starts" in said(done)


def test_an_encoder_by_name_by_file_and_by_function(folder):
    done = execute(ROOT / "nbs/tutorials/your_encoder.ipynb", folder)
    features, runs = folder / "features/mini-tiny", folder / "runs/tutorials/runs"
    (thumbnails,), (mirrored,) = features.glob("thumbnail-*"), features.glob("Mirrored-*")
    for store, dim in ((thumbnails, 192), (mirrored, 128)):
        for dataset in ("epic", "ego4d"):
            assert not FeatureStore(store / dataset).verify()
            assert FeatureStore(store / dataset).manifest["hand"]["dim"] == dim
    reads = [json.loads((run / "config.json").read_text()) for run in runs.glob("epic-noun-xmic*")]
    assert "runs/tutorials/my_encoders.py:thumbnail" in [c["context_encoder"] for c in reads]
    assert "runs/tutorials/my_encoders.py:Mirrored" in [c["encoder"] for c in reads]
    assert "RANDOM weights" in said(done)
