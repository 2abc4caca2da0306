"""Mutants of the library that the tests should kill: `python tests/mutation.py --modules adapter hands`. Needs the extra `mutation`.

mutmut writes the mutants of a module into a copy of the repository, and runs the module's own tests against a random sample of them.
The licensed data is hidden, so that the counts are the same in any clone."""
import argparse
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from xmic.files import write_json

ROOT = Path(__file__).resolve().parents[1]
TESTS = {  # the tests of each module
    "adapter": ["adapter"], "attention": ["adapter", "prompting"], "prompting": ["prompting"], "clip_adapter": ["clip_adapter"], "vita": ["vita"],
    "text": ["text", "prompting"], "evaluation": ["evaluation", "training"], "hands": ["hands"], "segments": ["segments"], "features": ["features"],
    "streams": ["streams"], "training": ["training"],
}
PRELOADED = ("torch", "torchvision", "open_clip", "timm", "pandas", "av", "safetensors.torch", "hypothesis", "matplotlib.pyplot")
STATUS = {0: "survived", 1: "killed", 3: "killed", 255: "killed",  # 255: the tests cannot even be collected
          33: "not run", 36: "timeout", -24: "timeout", 24: "timeout", 152: "timeout"}


def settings(module: str, tests: list[str]) -> str:
    "mutmut's part of pyproject.toml. Workers come from a process that ran no test, since autograd does not survive a fork, and that has not imported the kit."
    return f"""
[tool.mutmut]
source_paths = ["xmic"]
only_mutate = ["xmic/{module}.py"]
also_copy = ["data", "nbs", "docs", "settings.ini", "Snakefile", "Makefile"]
pytest_add_cli_args = ["-m", "not slow and not gpu", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
pytest_add_cli_args_test_selection = {json.dumps([f"tests/{name}" for name in tests])}
process_isolation = "forkserver"
forkserver_warmup = "import"
preload_modules_file = "preload.txt"
timeout_constant = 20.0
timeout_multiplier = 5.0
track_dependencies = false
do_not_mutate_patterns = ['^ +"[^"]*"$']  # docstrings
"""


def names_of_mutants(module: str) -> list[str]:
    "All that mutmut makes of a module, in its order."
    code = ("import sys; from pathlib import Path; from mutmut.mutation.file_mutation import mutate_file_contents as f; p = f'xmic/{sys.argv[1]}.py'; "
            "print('\\n'.join(f'xmic.{sys.argv[1]}.{n}' for n in f(p, Path(p).read_text(), None, None).mutant_names))")
    done = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True, check=True)
    return done.stdout.split()


def changed_lines(name: str) -> str:
    "The lines that a mutant takes away and puts in."
    shown = subprocess.run(["mutmut", "show", name], capture_output=True, text=True).stdout
    return "\n".join(line for line in shown.splitlines() if re.match(r"[-+](?![-+]{2} )", line))


def try_mutants(
    module: str,
    count: int,  # at most so many, drawn at random
    seed: int,
    before: dict | None = None,  # what was found of the module: its survivors alone are tried, and the others counted as they were
) -> dict:
    "How many mutants of a module its tests kill, and which survive."
    tests = [f"test_{name}.py" for name in TESTS[module]]
    project = Path("pyproject.toml")
    project.write_text(project.read_text().split("\n[tool.mutmut]")[0] + settings(module, tests))
    names = names_of_mutants(module)
    drawn = sorted(one["mutant"] for one in before["survivors"]) if before else sorted(random.Random(seed).sample(names, min(count, len(names))))
    if before and len(names) != before["mutants"]:
        sys.exit(f"{module} has changed, and its mutants have other names: try it without --again")
    if not drawn:
        return before or {}
    Path("preload.txt").write_text("\n".join(PRELOADED))
    shutil.rmtree("mutants", ignore_errors=True)
    Path("mutants").mkdir()  # a folder on the path that does not exist when Python starts is never looked into
    ran = subprocess.run(["mutmut", "run", "--max-children", "2", *drawn], capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"mutmut failed on {module}:\n{ran.stdout[-6000:]}\n{ran.stderr[-3000:]}")
    codes = json.loads(Path(f"mutants/xmic/{module}.py.meta").read_text())["exit_code_by_key"]
    outcome = {name: STATUS.get(codes[name], f"exit code {codes[name]}") for name in drawn}
    counts = dict(killed=0, survived=0, timeout=0) | Counter(outcome.values())
    left = [dict(mutant=name, outcome=what, change=changed_lines(name)) for name, what in outcome.items() if what != "killed"]
    if before: counts["killed"] += before["killed"]
    return dict(module=module, tests=" ".join(tests), mutants=len(names), tried=sum(counts.values()), **counts, survivors=left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", nargs="+", choices=TESTS, default=list(TESTS), metavar="MODULE", help=f"some of: {', '.join(TESTS)}")
    parser.add_argument("--count", type=int, default=40, help="mutants of a module, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="only those that --out says were not killed, after tests were added")
    parser.add_argument("--out", type=Path, default=ROOT / "reports/bench/mutation.json", help="counts, beside those of other modules that are there")
    given = parser.parse_args()
    out = given.out.resolve()
    os.environ |= dict(OMP_NUM_THREADS="1", XMIC_TEST_DATA="/nonexistent", PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    with tempfile.TemporaryDirectory(prefix="xmic-mutants-") as folder:
        for name in subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]:
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, Path(folder) / name)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = f"{folder}/mutants"
        for module in given.modules:
            report = json.loads(out.read_text()) if out.exists() else {}
            modules = {entry["module"]: entry for entry in report.get("modules", [])}
            modules[module] = found = try_mutants(module, given.count, given.seed, modules[module] if given.again else None)
            write_json(out, dict(
                command="python tests/mutation.py", date=datetime.now(timezone.utc).isoformat(timespec="seconds"), seed=given.seed,
                versions=dict(mutmut=version("mutmut"), pytest=version("pytest"), python=platform.python_version(), torch=torch.__version__),
                modules=[modules[name] for name in TESTS if name in modules]))
            print({k: v for k, v in found.items() if k != "survivors"}, flush=True)
            for one in found["survivors"]: print("{mutant}: {outcome}\n{change}".format(**one), flush=True)
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
