"""Where data lies, and how progress is said in a terminal, a notebook and a log."""
import errno
import os
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from xmic.features import ExtractConfig, hand_boxes
from xmic.files import (DataError, cache_folder, data_folder, expand, features_folder, from_root, one_at_a_time, project_root, read_table, remove_leftovers,
                        whole_file, write_json)
from xmic.config import TrainConfig, dataset_root

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


WRITER = """
import sys
from xmic.files import whole_file
with whole_file(sys.argv[1]) as part:
    part.write_text("begun")
    print("writing", flush=True)
    sys.stdin.read()
"""


def writer(path: Path) -> subprocess.Popen:
    "A process that has begun to write a file, and ends when its standard input does."
    process = subprocess.Popen([sys.executable, "-c", WRITER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "writing\n"
    return process


def test_leftovers_of_killed_writers_go_and_files_being_written_stay(tmp_path):
    killed, alive = writer(tmp_path / "a.txt"), writer(tmp_path / "b.txt")
    killed.kill(), killed.wait()
    (tmp_path / ".c.txt.7-0.part.lock").touch()  # of a writer that was killed before its first byte
    (removed,) = remove_leftovers(tmp_path)
    assert removed.name.startswith(".a.txt.") and all(p.name.startswith(".b.txt.") for p in tmp_path.iterdir()) and len([*tmp_path.iterdir()]) == 2
    alive.communicate()
    assert alive.returncode == 0 and os.listdir(tmp_path) == ["b.txt"] and (tmp_path / "b.txt").read_text() == "begun"


def test_one_process_at_a_time_changes_a_file(tmp_path):
    count = """
import sys
from pathlib import Path
from xmic.files import one_at_a_time
file = Path(sys.argv[1], "count")
for _ in range(20):
    with one_at_a_time(sys.argv[1]): file.write_text(str(int(file.read_text()) + 1))
"""
    (tmp_path / "count").write_text("0")
    workers = [subprocess.Popen([sys.executable, "-c", count, tmp_path], cwd=ROOT) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0] and (tmp_path / "count").read_text() == "60"
    assert sorted(os.listdir(tmp_path)) == [".lock", "count"]


def test_a_file_system_without_locks_can_be_written_to(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_): raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for refusal in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        with one_at_a_time(tmp_path), whole_file(tmp_path / "a.txt") as part:
            part.write_text("new")
            assert not remove_leftovers(tmp_path) and part.exists()
        assert (tmp_path / "a.txt").read_text() == "new" and {p.name for p in tmp_path.iterdir()} <= {".lock", "a.txt"}


def test_a_rename_is_on_disk_when_it_is_done(tmp_path, monkeypatch):
    done: list = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.fstat(handle)), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("renamed"), replace(old, new)))
    with whole_file(tmp_path / "new" / "a.txt") as part: part.write_text("text")
    made, file, renamed, folder = done
    assert renamed == "renamed" and stat.S_ISREG(file.st_mode) and file.st_ino == (tmp_path / "new/a.txt").stat().st_ino
    assert [made.st_ino, folder.st_ino] == [tmp_path.stat().st_ino, (tmp_path / "new").stat().st_ino]


def test_names_as_long_as_the_file_system_allows_can_be_written(tmp_path):
    for name in ("a" * 251 + ".txt", "é" * 124 + ".txt"):
        with whole_file(tmp_path / name) as part: part.write_text("text")
        assert (tmp_path / name).read_text() == "text"


def test_a_home_that_is_not_there_is_said(monkeypatch, tmp_path):
    monkeypatch.delenv("XMIC_CACHE", raising=False)
    with pytest.raises(DataError, match="no such home folder"): expand("~nobody-of-this-name/data")
    with pytest.raises(DataError, match="no such home folder"): from_root("~nobody-of-this-name/data")

    def nobody(path):
        if str(path).startswith("~"): raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.setattr(Path, "expanduser", nobody)
    assert cache_folder() == project_root() / ".cache/xmic"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_home_without_room_for_folders_is_said():
    with pytest.raises(DataError, match="cannot be written"): write_json("/proc/.cache/a.json", {})


def test_a_name_that_is_not_utf8_is_not_written_as_json(tmp_path):
    with pytest.raises(DataError, match=r"K\\udcfcche.*not UTF-8"): write_json(tmp_path / "a.json", {"data_root": "/data/K\udcfcche"})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("text", [
    "video_id;start_sec;stop_sec;verb;noun\na;0,1;1,9;mix;bowl, red\n", "video_id\tstart_sec\tstop_sec\tverb\tnoun\na\t0,1\t1.9\tmix\tbowl, red\n",
    '"video_id";"start_sec";"stop_sec";"verb";"noun"\r\n"a";"0,1";"1,9";"mix";"bowl, red"\r\n', 'video_id,start_sec,stop_sec,verb,noun\na,0.1,1.9,mix,"bowl, red"\n'])
def test_tables_with_semicolons_tabs_and_decimal_commas(tmp_path, text):
    (tmp_path / "segments.csv").write_bytes(text.encode())
    assert read_table(tmp_path / "segments.csv", ["video_id", "noun"]).values.tolist() == [["a", "0.1", "1.9", "mix", "bowl, red"]]


@pytest.mark.parametrize("text, words", [
    ("video_id,start_sec,stop_sec\na,0,1,1,9\n", "separated by commas, so decimals need points"), ("video_id;start_sec\na;1;2\n", "separated by semicolons"),
    ("# Exported using VGG Image Annotator\n# CSV_HEADER = metadata_id,file_list\nx,y\n", "export of VIA.*xmic convert"), ("# a note\nvideo_id,start_sec\n", "must name the columns"),
    ("video;start\na;1\n", "no column video_id; found: video, start; fields are separated by semicolons")])
def test_tables_that_are_something_else_say_what(tmp_path, text, words):
    (tmp_path / "segments.csv").write_text(text)
    with pytest.raises(DataError, match=words): read_table(tmp_path / "segments.csv", ["video_id"])
