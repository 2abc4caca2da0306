"""What Windows, macOS and odd environments lack: the library imports and the command predicts without it, or says in one line what to do."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from videos import write_video

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "data/mini/recognizer")
linux = pytest.mark.skipif(sys.platform != "linux", reason="locales and home folders as on Linux")
# Before anything is imported: what Windows does not have, as far as Python itself starts without it.
AS_ON_WINDOWS = """
import importlib, os, pkgutil, signal, sys, warnings
warnings.filterwarnings("ignore", "only soft file lock")
for name in ("fcntl", "resource", "pwd", "grp", "termios"): sys.modules[name] = None
for module, names in ((os, ("posix_fadvise", "sysconf", "getuid", "fork", "killpg", "sched_getaffinity")), (signal, ("SIGKILL", "SIGALRM", "alarm"))):
    for name in names: delattr(module, name)
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("clips") / "Küche.mp4", 20, 10)


def python(code: str, *arguments: object, folder: Path = ROOT, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, encoding="utf-8", cwd=folder, env=os.environ | environ)


def predict(clip: Path | bytes, environ: dict[str, str], *more: str, cache: Path) -> subprocess.CompletedProcess:
    "The command with this environment and nothing else in it."
    code = "from xmic.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, "predict", clip, "--model", MODEL, "--nouns", "pan,Löffel", *more], capture_output=True, cwd=cache,
                          env=dict(PYTHONPATH=str(ROOT), XMIC_CACHE=str(cache), OMP_NUM_THREADS="1") | environ)


def test_every_module_that_users_need_imports_without_what_windows_lacks(tmp_path):
    code = AS_ON_WINDOWS + """
import xmic
for module in pkgutil.iter_modules(xmic.__path__):
    if module.name != "warm": importlib.import_module(f"xmic.{module.name}")
assert "xmic.warm" not in sys.modules
import torch
from xmic.files import one_at_a_time, remove_leftovers, whole_file
from xmic.streams import free_bytes
from xmic.training import peak_memory
with one_at_a_time(sys.argv[1]), whole_file(os.path.join(sys.argv[1], "a.txt")) as part:
    part.write_text("text")
    assert not remove_leftovers(sys.argv[1])
assert peak_memory(torch.device("cpu")) == {} and free_bytes(torch.device("cpu")) > 0
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.txt").read_text() == "text"


def test_the_command_predicts_without_what_windows_lacks(clip, tmp_path):
    code = AS_ON_WINDOWS + "from xmic.cli import main\nmain()"
    done = python(code, "predict", clip, "--model", MODEL, "--nouns", "pan,Löffel", "--json", "--html", tmp_path / "a.html", PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.isascii() and {n["name"] for n in json.loads(line)["nouns"]} == {"pan", "Löffel"} and (tmp_path / "a.html").exists()


def test_free_memory_is_told_where_there_is_no_proc(monkeypatch):
    from xmic.streams import free_bytes
    read = Path.read_text

    def nowhere(path, *args, **kwargs):
        if str(path).startswith("/proc"): raise FileNotFoundError(path)
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", nowhere)
    assert free_bytes(torch.device("cpu")) > 2**28
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert free_bytes(torch.device("cpu")) == 2 << 30


@linux
@pytest.mark.parametrize("environ", [
    {}, {"HOME": "/proc"}, {"HOME": "/dev/null"}, {"HOME": ""}, {"PATH": ""},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C.UTF-8"}, {"PYTHONIOENCODING": "ascii"}], ids=str)
def test_the_command_predicts_in_a_bare_environment(clip, tmp_path, environ):
    done = predict(clip, environ, "--json", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.decode().splitlines()
    assert json.loads(line)["video"] == str(clip) and {n["name"] for n in json.loads(line)["nouns"]} == {"pan", "Löffel"}


@linux
@pytest.mark.parametrize("home", ["/proc", "/dev/null"])
def test_a_cache_that_cannot_be_written_is_said_and_not_needed(clip, tmp_path, home):
    done = predict(clip, {"HOME": home, "XMIC_CACHE": ""}, cache=tmp_path)
    said = done.stderr.decode()
    assert done.returncode == 0 and said.startswith("xmic: text features are not kept") and len(said.splitlines()) == 1 and "Löffel" in done.stdout.decode()


@linux
def test_a_file_name_that_is_not_utf8_is_shown_escaped(clip, tmp_path):
    name = os.fsencode(tmp_path) + b"/K\xfcche.mp4"
    with open(name, "wb") as file: file.write(clip.read_bytes())
    done = predict(name, {"LC_ALL": "C.UTF-8"}, "--backend", "pyav", "--html", "a.html", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert rb"K\udcfcche.mp4" in done.stdout and "Löffel" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_a_home_that_does_not_exist_is_one_line():
    done = python("from xmic.cli import main; main()", "check-data", "csv", "~nobody-of-this-name/data")
    assert done.returncode == 1 and done.stderr.startswith("xmic: ") and "no such home folder" in done.stderr and len(done.stderr.splitlines()) == 1
