"""Where data lies, and how progress is said in a terminal, a notebook and a log."""
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from xmic.features import ExtractConfig, hand_boxes
from xmic.files import data_folder, features_folder, from_root, project_root
from xmic.training import TrainConfig, dataset_root

ROOT = Path(__file__).resolve().parents[1]
WORK = """
import time
from xmic.files import progress_bar
with progress_bar(6, "video", 1, "mini world", show={show}, every={every}) as bar:
    for n in range(5):
        time.sleep(0.3)
        bar.set_postfix_str(f"{{n}} failed", refresh=False)
        bar.update()
"""


def said(every: float = 0.5, show: bool = True) -> str:
    done = subprocess.run([sys.executable, "-c", WORK.format(every=every, show=show)], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout + done.stderr


def test_a_log_has_whole_lines_and_few_of_them():
    lines = said().splitlines()
    assert 2 <= len(lines) <= 4 and lines[-1].startswith("mini world: 6 of 6 videos, 00:01 gone") and lines[-1].endswith("4 failed")
    assert not any(mark in line for line in lines for mark in "\r\x1b|")


def test_short_work_and_silent_work_leave_nothing_in_a_log():
    assert said(every=30) == said(show=False) == ""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminals")
def test_a_terminal_has_one_line_that_is_written_over():
    import pty
    ours, theirs = pty.openpty()
    done = subprocess.Popen([sys.executable, "-c", WORK.format(every=30, show=True)], stdout=theirs, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    shown: list[bytes] = []
    with suppress(OSError):  # the terminal is closed
        while part := os.read(ours, 4096): shown.append(part)
    assert done.wait() == 0
    text = b"".join(shown).decode()
    assert text.count("\r") >= 4 and "100%" in text and "6/6" in text and text.strip("\r\n").count("\n") == 0


@pytest.mark.slow
def test_a_notebook_keeps_one_output():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(WORK.format(every=30, show=show)) for show in (True, False)])
    shown, silent = NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}}).execute().cells
    (output,) = shown.outputs
    assert output.output_type == "display_data" and "100%" in output.data["text/plain"] and "4 failed" in output.data["text/plain"]
    assert not silent.outputs


def test_datasets_lie_where_the_environment_says(monkeypatch, tmp_path):
    config = TrainConfig(dataset="epic", targets=["ego4d"])
    assert dataset_root(config, "epic") == project_root() / "data/epic"
    monkeypatch.setenv("XMIC_DATA", str(tmp_path))
    assert dataset_root(config, "epic") == tmp_path / "epic" and dataset_root(config, "ego4d") == tmp_path / "ego4d"
    assert dataset_root(TrainConfig(dataset="epic", data_root="elsewhere/epic", targets=["ego4d"]), "ego4d") == from_root("elsewhere/ego4d")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/hand_boxes.csv").write_text("segment_id,frame,left,top,right,bottom\na,0,1,1,5,5\n")
    assert hand_boxes(ExtractConfig(dataset="csv")) is not None
    monkeypatch.setenv("XMIC_DATA", "")
    assert data_folder("epic") == project_root() / "data/epic"


def test_features_are_kept_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("XMIC_CACHE", raising=False)
    assert features_folder() == features_folder("features") == project_root() / "features"
    monkeypatch.setenv("XMIC_CACHE", str(tmp_path))
    assert features_folder() == features_folder("features") == tmp_path / "features"
    assert features_folder("features/mini") == project_root() / "features/mini" and features_folder("/own") == Path("/own")  # what is named goes before
    monkeypatch.setenv("XMIC_CACHE", "")
    assert features_folder() == project_root() / "features"


def test_outside_a_checkout_the_root_is_where_the_process_stands(tmp_path):
    package = tmp_path / "site/xmic"
    package.mkdir(parents=True)
    for name in ("__init__.py", "files.py"):
        (package / name).write_text((ROOT / "xmic" / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "work").mkdir()
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from xmic.files import from_root; print(from_root('runs'))"
    for more, root in ({}, "work"), ({"XMIC_ROOT": str(tmp_path / "other")}, "other"):
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path / "work", env=os.environ | more, check=True)
        assert done.stdout.strip() == str(tmp_path / root / "runs")
