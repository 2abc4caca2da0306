"""make and snakemake as users meet them: interrupted, on a full disk, beside another, without flock, and cleaning up."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator

import pytest
from filelock import FileLock

from faults.places import mounted
from xmic.experiments import WORLDS, failures, plan, profile
from xmic.mini import build

ROOT = Path(__file__).resolve().parents[1]
HANG = 600  # seconds; nothing here takes as long, on a busy machine either
STORE = "features/mini-tiny/jobs/egtea-test-mini-clip"
pytestmark = pytest.mark.skipif(not shutil.which("make") or sys.platform == "win32", reason="needs make")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("world"), "tiny", workers=2, progress=False)


@pytest.fixture
def project(tmp_path) -> Path:
    "A copy of the project in the environment of the tests, without data."
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("Makefile", "Snakefile", "settings.ini", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    for name in ("xmic", "nbs", "profiles", "data/paper", "data/mini/weights"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@pytest.fixture(scope="module")
def environ(tmp_path_factory) -> dict:
    "Every program of this machine but flock, which macOS has not."
    programs = tmp_path_factory.mktemp("bin")
    for folder in filter(os.path.isdir, os.environ["PATH"].split(os.pathsep)):
        for program in os.scandir(folder):
            if program.name != "flock" and not os.path.lexists(programs / program.name):
                (programs / program.name).symlink_to(program.path)
    return os.environ | dict(PATH=f"{Path(sys.executable).parent}:{programs}", OMP_NUM_THREADS="1")


def call(project: Path, *choices: str) -> list[str]:
    return ["make", "-C", str(project), "-o", ".venv/.ready", "reproduce", "SIZE=tiny", "TABLES=4", *choices]


def begin(project: Path, environ: dict, *choices: str) -> subprocess.Popen:
    return subprocess.Popen(call(project, *choices), env=environ | dict(PYTHONPATH=str(project)), stdout=(project / "said").open("w"), stderr=subprocess.STDOUT,
                            start_new_session=True)


def wait_for(process: subprocess.Popen, project: Path, words: str) -> None:
    end = time.monotonic() + HANG
    while words not in (project / "said").read_text():
        assert process.poll() is None and time.monotonic() < end, (project / "said").read_text()
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("place, sent, whole_group", [
    ("the mini world", signal.SIGINT, True), ("features:", signal.SIGINT, True), ("features:", signal.SIGTERM, False)])
def test_an_interruption_is_said_once_and_is_no_failure(project, environ, world, place, sent, whole_group):
    if place == "features:":
        shutil.copytree(world, project / "data/mini-tiny")
    process = begin(project, environ, "CORES=1")
    wait_for(process, project, place)
    time.sleep(1)  # into the job; wherever it is met, the same is said
    (os.killpg if whole_group else os.kill)(process.pid, sent)
    assert process.wait(HANG) != 0
    said = (project / "said").read_text()
    assert said.count("Interrupted") == 1 and "the same command goes on from here" in said
    after = said.split("Interrupted")[1].lower()
    assert "failed" not in after and "traceback" not in after and "error in" not in after
    plan_again = subprocess.run(call(project, "DRY=1"), env=environ | dict(PYTHONPATH=str(project)), capture_output=True, text=True, timeout=HANG)
    assert plan_again.returncode == 0 and "Job stats" in plan_again.stdout + plan_again.stderr


@pytest.mark.slow
def test_one_make_reproduce_at_a_time(project, environ):
    with FileLock(project / ".snakemake/reproduce.lock"):
        process = begin(project, environ, "DRY=1")
        wait_for(process, project, "Another process is at work here (.snakemake/reproduce.lock); waiting for it.")
        assert "Job stats" not in (project / "said").read_text()
    assert process.wait(HANG) == 0 and "Job stats" in (project / "said").read_text()


@pytest.fixture
def full(tmp_path) -> Iterator[Path]:
    "A small disk, full of a ballast."
    with mounted(tmp_path / "disk", "8m") as disk:
        if disk is None:
            pytest.skip("no file system may be mounted here")
        fill(disk, 0)
        yield disk


def fill(disk: Path, left: int) -> None:  # bytes
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - left))


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 60_000])  # for not even a log; for a notebook and no features
def test_a_full_disk_is_said_and_then_the_same_command_goes_on(project, environ, world, tmp_path, left):
    shutil.copytree(world, project / "data/mini-tiny")
    command = ["snakemake", "--nolock", "--cores", "1", f"{STORE}/done", "--config", "size=tiny", "tables=4"]
    own = environ | dict(PYTHONPATH=str(project))
    with mounted(project / "features", "8m") as disk:
        if disk is None:
            pytest.skip("no file system may be mounted here")
        fill(disk, left)
        failed = subprocess.run(command, cwd=project, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=HANG)
        assert failed.returncode != 0 and not (project / STORE / "done").exists()
        words = failed.stdout.split("These jobs failed:")[1]
        assert "No space left on device" in words and "ran out of memory" not in words
        (disk / "ballast").unlink()
        again = subprocess.run(command, cwd=project, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=HANG)
        assert again.returncode == 0 and (project / STORE / "done").exists(), again.stdout


@pytest.mark.parametrize("log", ["", "Executing notebook with kernel"])
def test_the_cause_of_a_failure_is_a_full_disk_only_while_it_is_full(full, log, monkeypatch):
    monkeypatch.setenv("XMIC_ROOT", str(full))
    made = plan(profile(size="tiny"), "4")
    folder = full / made.folder(next(iter(made.runs)))
    (full / "ballast").unlink()
    folder.mkdir(parents=True)
    (folder / "job.log").write_text(log)
    fill(full, 0)
    assert "No space left on device" in failures(made).cause.item()
    (full / "ballast").unlink()
    assert failures(made).cause.item() == (log or "the process ended without a word: it was killed, or ran out of memory")


def test_a_full_disk_that_only_the_log_names_is_the_cause(tmp_path, monkeypatch):
    monkeypatch.setenv("XMIC_ROOT", str(tmp_path))
    made = plan(profile(size="tiny"), "4")
    folder = tmp_path / made.folder(next(iter(made.runs)))
    folder.mkdir(parents=True)
    (folder / "job.log").write_text("Executing\nOSError: [Errno 28] No space left on device\nException ignored in: <stdout>\n")
    assert failures(made).cause.item() == "OSError: [Errno 28] No space left on device"


def test_each_size_has_folders_of_its_own_and_the_committed_report_is_of_none_but_the_default():
    made = {size: profile(size=size) for size in WORLDS}
    for field in ("data", "features_root", "runs_root", "reports"):
        assert len({getattr(p, field) for p in made.values()}) == len(WORLDS)
    assert [size for size, p in made.items() if p.reports == "reports/mini"] == ["default"]
    others = [f"{p.reports}/index.html" for size, p in made.items() if size != "default"]
    ignored = subprocess.run(["git", "check-ignore", *others, "reports/mini/index.html"], cwd=ROOT, capture_output=True, text=True)
    if ignored.returncode == 128:
        pytest.skip("not a git repository")
    assert ignored.stdout.split() == others


@pytest.mark.parametrize("choices, page", [
    ((), "reports/mini/index.html"), (("SIZE=default",), "reports/mini/index.html"), (("SIZE=tiny",), "reports/mini-tiny/index.html"),
    (("PROFILE=paper",), "reports/paper/index.html")])
def test_make_names_the_report_that_was_made(choices, page):
    said = subprocess.run(["make", "--dry-run", "-o", ".venv/.ready", "reproduce", *choices], cwd=ROOT, capture_output=True, text=True)
    assert f"The report: {page}" in said.stdout


def test_clean_removes_what_the_kit_made_and_nothing_else(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = ["data/EPIC/P01/P01_01.MP4", "data/EPIC backup/x/__pycache__/a.pyc", "data/mini/world.json", "features/a/__pycache__/b", "runs/a/metrics.json",
            "reports/mini/index.html", "reports/.ipynb_checkpoints/a", "my work/__pycache__/a", "nbs/notes of mine/a.ipynb", "xmic/adapter.py", "EPIC", "backup",
            "mine.egg-info/PKG-INFO", "elsewhere/a", "notes\nof mine/__pycache__/a", "nbs/-rf"]
    gone = [".venv/bin/python", "build/a", "dist/a", "xmic.egg-info/PKG-INFO", ".pytest_cache/a", ".hypothesis/a", "_docs/html/a", ".snakemake/a",
            "xmic/__pycache__/a.pyc", "nbs/tables/.ipynb_checkpoints/a", "nbs/notes of mine/.ipynb_checkpoints/a", "tests/faults/__pycache__/a", "docs/__pycache__/a",
            "benchmarks/__pycache__/a"]
    for name in kept + gone:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "nbs/linked").symlink_to(tmp_path / "my work")
    done = subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [n for n in kept if not (tmp_path / n).exists()] == [] and [n for n in gone if (tmp_path / n).exists()] == []
    assert subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True).returncode == 0
