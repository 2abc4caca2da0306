"""Papermill and kernels that are forks: they give what ordinary ones give, end with whoever asked for them, and serve nobody else."""
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Callable, Iterator

import nbformat
import pytest
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_notebook

from xmic import warm

ROOT = Path(__file__).resolve().parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux alone")
HANG = 300  # seconds; no answer takes as long, on a busy machine either
KEEP = "import os, sys; os.umask(int(sys.argv[1])); from xmic.warm import start; print(start(), flush=True); sys.stdin.read()"


def keeper(folder: Path, umask: int = 0o22) -> tuple[subprocess.Popen, dict]:
    "A process with a server, as snakemake is one, and the environment of its jobs."
    environ = os.environ | {"JUPYTER_PATH": str(ROOT / "profiles/jupyter"), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", KEEP, str(umask)], env=environ, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, environ | {warm.ADDRESS: process.stdout.readline().strip()}


@pytest.fixture(scope="module")
def environ(tmp_path_factory) -> Iterator[dict]:
    "With a server, which ends with this module."
    process, environ = keeper(tmp_path_factory.mktemp("t"))
    yield environ
    process.communicate()
    wait_until(lambda: not Path(environ[warm.ADDRESS]).parent.exists())


def wait_until(true: Callable[[], object]) -> None:
    end = time.monotonic() + HANG
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def start(folder: Path, environ: dict, *cells: str) -> subprocess.Popen:
    nbformat.write(new_notebook(cells=[new_code_cell(c) for c in cells], metadata={"kernelspec": {"name": "python3", "display_name": "python3"}}),
                   folder / "in.ipynb")
    return subprocess.Popen([sys.executable, "-m", "xmic.warm", "job.lock", "papermill", "-k", "warm", "--no-progress-bar", "in.ipynb", "out.ipynb"],
                            cwd=folder, env=environ, stdout=(folder / "log").open("w"), stderr=subprocess.STDOUT)


def outputs(folder: Path) -> list[str]:
    return [o.get("text", o.get("data", {}).get("text/plain", "")) for c in nbformat.read(folder / "out.ipynb", 4).cells for o in c.get("outputs", [])]


def alive(pid: int) -> bool:
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().split()[3])


def process_of(folder: Path) -> int:
    "The kernel of a notebook that has written its process id."
    wait_until(lambda: (folder / "pid").exists() and (folder / "pid").read_text())
    return int((folder / "pid").read_text())


def sleeper(folder: Path) -> str:
    return f"import os, time\nopen({str(folder / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep({HANG})"


@linux
def test_a_kernel_has_a_process_a_folder_and_an_environment_of_its_own(tmp_path, environ):
    say = "import os, sys; print(os.getpid(), os.getcwd(), os.environ['WHO'], 'torch' in sys.modules)"
    folders = [tmp_path / name for name in "ab"]
    for folder in folders: folder.mkdir()
    jobs = [start(folder, environ | {"WHO": folder.name}, say, "os.environ['WHO'] = 'changed'; x = 1") for folder in folders]
    assert [job.wait(HANG) for job in jobs] == [0, 0]
    (pid, where, who, there), (pid2, where2, who2, _) = (outputs(folder)[0].split() for folder in folders)
    assert pid != pid2 and (who, who2) == ("a", "b") and there == "True"
    assert (Path(where), Path(where2)) == tuple(f.resolve() for f in folders)
    assert nbformat.read(folders[0] / "out.ipynb", 4).metadata.kernelspec.name == "python3"
    wait_until(lambda: not alive(int(pid)))
    assert "--existing" not in (folders[0] / "log").read_text()


@linux
def test_an_error_ends_the_run_and_is_in_the_notebook(tmp_path, environ):
    assert start(tmp_path, environ, "1 / 0", "print('never')").wait(HANG) != 0
    names = [o.ename for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert names == ["ZeroDivisionError"]


@linux
def test_a_job_that_cannot_write_its_error_does_not_succeed(tmp_path, environ):
    (tmp_path / "out.ipynb").mkdir()
    nbformat.write(new_notebook(), tmp_path / "in.ipynb")
    with open("/dev/full", "w") as full:
        job = subprocess.run([sys.executable, "-m", "xmic.warm", "job.lock", "papermill", "-k", "warm", "in.ipynb", "out.ipynb"], cwd=tmp_path, env=environ,
                             stdout=full, stderr=full, timeout=HANG)
    assert job.returncode != 0


@linux
def test_figures_are_shown(tmp_path, environ):
    code = "import sys; print('matplotlib.pyplot' in sys.modules)\nfrom IPython.display import display\nimport matplotlib.pyplot as plt\nfigure, _ = plt.subplots()"
    assert start(tmp_path, environ, code + "\ndisplay(figure)", "plt.plot([1, 2])").wait(HANG) == 0
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    assert cells[0].outputs[0].text.strip() == "True"
    assert ["image/png" in o.get("data", {}) for c in cells for o in c.outputs if o.output_type == "display_data"] == [True, True, True]


@linux
def test_workers_of_a_kernel_start_as_usual(tmp_path, environ):
    code = "from multiprocessing import get_context\nfrom math import sqrt\nwith get_context('spawn').Pool(1) as pool: print(pool.map(sqrt, [4, 9]))"
    assert start(tmp_path, environ, code).wait(HANG) == 0 and outputs(tmp_path)[0].strip() == "[2.0, 3.0]"


@linux
def test_an_environment_of_a_megabyte_arrives(tmp_path, environ):
    large = {f"LONG{i}": "é" * 50_000 for i in range(10)}
    code = "import os, sys; print(sum(len(v) for k, v in os.environ.items() if k.startswith('LONG')), 'torch' in sys.modules)"
    assert start(tmp_path, environ | large, code).wait(HANG) == 0 and outputs(tmp_path)[0].split() == ["500000", "True"]


@linux
def test_a_client_that_says_nothing_holds_nobody_up(tmp_path, environ):
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as broken:
        silent.connect(environ[warm.ADDRESS])
        broken.connect(environ[warm.ADDRESS])
        socket.send_fds(broken, [struct.pack("!Q", 2**40)], [0, 1, 2])
        assert start(tmp_path, environ, "import sys; print('torch' in sys.modules)").wait(HANG) == 0 and outputs(tmp_path)[0].strip() == "True"


@linux
def test_a_kernel_goes_when_its_papermill_is_killed(tmp_path, environ):
    job = start(tmp_path, environ, sleeper(tmp_path))
    pid = process_of(tmp_path)
    assert alive(pid)
    job.send_signal(signal.SIGKILL)
    job.wait()
    wait_until(lambda: not alive(pid))


@linux
def test_nothing_is_left_when_the_parent_is_killed(tmp_path):
    (tmp_path / "t").mkdir()
    process, environ = keeper(tmp_path / "t")
    job = start(tmp_path, environ, sleeper(tmp_path))
    kernel = process_of(tmp_path)
    attendant = parent(kernel)
    server = parent(attendant)
    assert parent(server) == process.pid
    process.kill()
    assert job.wait(HANG) != 0
    wait_until(lambda: not any(map(alive, (kernel, attendant, server))))
    assert list((tmp_path / "t").glob("xmic-*")) == []


@linux
def test_the_socket_is_closed_to_others_whatever_the_umask(tmp_path):
    process, environ = keeper(tmp_path, umask=0)
    folder = Path(environ[warm.ADDRESS]).parent
    assert folder.stat().st_mode & 0o777 == 0o700 and folder.parent == tmp_path and warm.private(folder)
    process.kill()
    process.wait()
    wait_until(lambda: not folder.exists())


@linux
@pytest.mark.parametrize("case", ["open to the group", "open to all", "a link", "another's", "not there"])
def test_a_folder_that_others_can_open_is_refused(tmp_path, monkeypatch, case):
    folder = tmp_path / "s"
    folder.mkdir(mode=0o700)
    place = folder
    if case == "open to the group":
        folder.chmod(0o710)
    elif case == "open to all":
        folder.chmod(0o777)
    elif case == "a link":
        place = tmp_path / "link"
        place.symlink_to(folder)
    elif case == "another's":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    else:
        folder.rmdir()
    assert not warm.private(place)
    with socket.socket(socket.AF_UNIX) as listener:
        if folder.exists():
            listener.bind(str(folder / "socket"))
            listener.listen()
        assert warm._ask(str(place / "socket"), {}) is None


@linux
def test_another_user_is_told_nothing(tmp_path, monkeypatch):
    "The kernel says who listens; here it says that somebody else does."
    tmp_path.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        monkeypatch.setattr(warm, "private", lambda folder: True)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert warm._ask(str(tmp_path / "socket"), dict(environ=dict(SECRET="x"))) is None
        other, _ = listener.accept()
        with other:
            assert other.recv(1) == b""


@linux
def test_another_user_is_given_nothing(monkeypatch):
    "A message that would be answered, if it were this user's."
    ours, theirs = socket.socketpair()
    with ours, theirs:
        warm.send(theirs, dict(cwd="/", environ={}, program="this", arguments=[], lock=None))
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        warm._attend(ours)
        ours.close()
        with suppress(ConnectionResetError):
            assert theirs.recv(1) == b""


@linux
@pytest.mark.parametrize("size", [0, 10, 3 * 10**6])
def test_messages_of_any_size_arrive(size):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=warm.send, args=(ours, dict(text="x" * size)))
        sender.start()
        message, streams = warm.receive(theirs)
        sender.join()
    assert message == dict(text="x" * size) and len(streams) == 3
    for stream in streams:
        os.close(stream)


@linux
@pytest.mark.parametrize("sent", [b"", b"123", struct.pack("!Q", 10) + b"12"])
def test_a_message_that_ends_early_is_an_error(sent):
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            if sent:
                socket.send_fds(ours, [sent], [0, 1, 2])
        with pytest.raises(EOFError):
            warm.receive(theirs)


@linux
def test_neither_side_waits_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(warm, "PATIENCE", 0.2)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(TimeoutError):
        warm._attend(ours)
    tmp_path.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        assert warm._ask(str(tmp_path / "socket"), {}) is None


@linux
def test_without_a_server_an_ordinary_kernel_takes_its_place(tmp_path, environ):
    plain = {k: v for k, v in environ.items() if k != warm.ADDRESS}
    assert start(tmp_path, plain, "import sys; print('torch' in sys.modules)").wait(HANG) == 0 and outputs(tmp_path)[0].strip() == "False"


@linux
def test_a_server_that_cannot_import_leaves_ordinary_kernels(tmp_path):
    for name in ("broken", "t"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken/cv2.py").write_text("raise ImportError('not here')")
    environ = os.environ | {"JUPYTER_PATH": str(ROOT / "profiles/jupyter"), "TMPDIR": str(tmp_path / "t"), "PYTHONPATH": f"{tmp_path / 'broken'}:{ROOT}"}
    process = subprocess.Popen([sys.executable, "-c", KEEP, "18"], env=environ, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    environ[warm.ADDRESS] = process.stdout.readline().strip()
    assert start(tmp_path, environ, "import sys; print('torch' in sys.modules)").wait(HANG) == 0 and outputs(tmp_path)[0].strip() == "False"
    process.communicate()
    assert list((tmp_path / "t").glob("xmic-*")) == []


@linux
def test_a_folder_whose_name_is_too_long_for_a_socket_has_no_server(tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setattr(warm.tempfile, "tempdir", str(folder))
    assert warm.start() is None and list(folder.iterdir()) == []


# One at a time


HOLD = "import sys, time; from xmic.warm import hold; held = hold(sys.argv[1]); print('held', flush=True); time.sleep(600)"


def holder(lock: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_lock_is_waited_for_and_ends_with_its_process(tmp_path):
    lock = tmp_path / "new folder" / "job.lock"
    first = holder(lock)
    assert first.stdout.readline() == "held\n"
    second = holder(lock)
    assert second.stderr.readline() == f"Another process is at work here ({lock}); waiting for it.\n"
    assert second.poll() is None
    first.kill()
    first.wait()
    assert second.stdout.readline() == "held\n"
    second.kill()
    second.wait()


def test_a_lock_follows_no_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "job.lock").symlink_to(precious)
    with pytest.raises(OSError):
        warm.hold(str(tmp_path / "job.lock"))
    assert precious.read_text() == "mine"


def test_a_job_waits_for_one_that_was_left_behind(tmp_path):
    with FileLock(tmp_path / "job.lock"):
        job = start(tmp_path, {k: v for k, v in os.environ.items() if k != warm.ADDRESS}, "1 + 1")
        wait_until(lambda: "waiting for it" in (tmp_path / "log").read_text())
        assert not (tmp_path / "out.ipynb").exists() and job.poll() is None
        job.kill()
        job.wait()
