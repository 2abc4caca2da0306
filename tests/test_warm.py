"""Papermill and kernels that are forks: they give what ordinary ones give, and end with whoever asked for them."""
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux alone")


@pytest.fixture(scope="module")
def environ(tmp_path_factory):
    "A server of its own, which ends fifteen seconds after its last kernel."
    own = os.environ | {"JUPYTER_PATH": str(ROOT / "profiles/jupyter"), "TMPDIR": str(tmp_path_factory.mktemp("t")), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-c", "from xmic.warm import address, serve; serve(address(), 15)"]
    server = subprocess.Popen(call, env=own, cwd=ROOT)
    while not list(Path(own["TMPDIR"]).glob("*.sock")):
        assert server.poll() is None
        time.sleep(0.1)
    yield own
    assert server.wait(60) == 0 and not list(Path(own["TMPDIR"]).glob("*.sock"))


def start(folder: Path, environ: dict, *cells: str) -> subprocess.Popen:
    nbformat.write(new_notebook(cells=[new_code_cell(c) for c in cells], metadata={"kernelspec": {"name": "python3", "display_name": "python3"}}),
                   folder / "in.ipynb")
    return subprocess.Popen([sys.executable, "-m", "xmic.warm", "papermill", "-k", "warm", "--no-progress-bar", "in.ipynb", "out.ipynb"], cwd=folder, env=environ,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def outputs(folder: Path) -> list[str]:
    return [o.get("text", o.get("data", {}).get("text/plain", "")) for c in nbformat.read(folder / "out.ipynb", 4).cells for o in c.get("outputs", [])]


def alive(pid: int) -> bool:
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False


def test_a_kernel_has_a_process_a_folder_and_an_environment_of_its_own(tmp_path, environ):
    say = "import os, sys; print(os.getpid(), os.getcwd(), os.environ['WHO'], 'torch' in sys.modules, os.getppid())"
    folders = [tmp_path / name for name in "ab"]
    for folder in folders: folder.mkdir()
    jobs = [start(folder, environ | {"WHO": folder.name}, say, "os.environ['WHO'] = 'changed'; x = 1") for folder in folders]
    assert [job.wait(100) for job in jobs] == [0, 0]
    (pid, where, who, there, server), (pid2, where2, who2, _, server2) = (outputs(folder)[0].split() for folder in folders)
    assert pid != pid2 and server == server2 and (who, who2) == ("a", "b") and there == "True"
    assert (Path(where), Path(where2)) == tuple(f.resolve() for f in folders)
    assert nbformat.read(folders[0] / "out.ipynb", 4).metadata.kernelspec.name == "python3"
    assert not alive(int(pid))


def test_an_error_ends_the_run_and_is_in_the_notebook(tmp_path, environ):
    assert start(tmp_path, environ, "1 / 0", "print('never')").wait(100) != 0
    names = [o.ename for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert names == ["ZeroDivisionError"]


def test_figures_are_shown(tmp_path, environ):
    code = "import sys; print('matplotlib.pyplot' in sys.modules)\nfrom IPython.display import display\nimport matplotlib.pyplot as plt\nfigure, _ = plt.subplots()"
    assert start(tmp_path, environ, code + "\ndisplay(figure)", "plt.plot([1, 2])").wait(100) == 0
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    assert cells[0].outputs[0].text.strip() == "True"
    assert ["image/png" in o.get("data", {}) for c in cells for o in c.outputs if o.output_type == "display_data"] == [True, True, True]


def test_workers_of_a_kernel_start_as_usual(tmp_path, environ):
    code = "from multiprocessing import get_context\nfrom math import sqrt\nwith get_context('spawn').Pool(1) as pool: print(pool.map(sqrt, [4, 9]))"
    assert start(tmp_path, environ, code).wait(100) == 0 and outputs(tmp_path)[0].strip() == "[2.0, 3.0]"


def test_a_kernel_goes_when_its_papermill_is_killed(tmp_path, environ):
    job = start(tmp_path, environ, f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)")
    end = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < end
        time.sleep(0.1)
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid)
    job.send_signal(signal.SIGKILL)
    job.wait()
    while alive(pid): assert time.monotonic() < end; time.sleep(0.1)


def test_other_code_has_another_address(monkeypatch, tmp_path):
    from xmic import warm
    (tmp_path / "warm.py").write_text("")
    monkeypatch.setattr(warm, "__file__", str(tmp_path / "warm.py"))
    before = warm.address()
    (tmp_path / "other.py").write_text("x = 1")
    assert warm.address() != before


def test_without_a_server_an_ordinary_kernel_takes_its_place(tmp_path, environ):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "cv2.py").write_text("raise ImportError('not here')")
    (tmp_path / "t").mkdir()
    code = "import os, sys; print('torch' in sys.modules)"
    job = start(tmp_path, environ | {"TMPDIR": str(tmp_path / "t"), "PYTHONPATH": str(broken)}, code)
    assert job.wait(100) == 0 and outputs(tmp_path)[0].strip() == "False"
