"""Whether `make reproduce` gives the same twice, and with another number of workers. See README.md."""
import argparse
import csv
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

from epic_scale import made_with
from xmic.files import write_json

ROOT = Path(__file__).resolve().parents[1]


def made(folder: Path, cores: int, tables: str, size: str) -> float:
    "A fresh clone with its tables; the seconds they took."
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    for target in (["env"], ["reproduce", f"TABLES={tables}", f"SIZE={size}", f"CORES={cores}"]):
        begin, log = time.perf_counter(), folder / f"{target[0]}.log"
        with open(log, "w") as file:
            if subprocess.run(["make", *target], cwd=folder, stdout=file, stderr=subprocess.STDOUT).returncode:
                sys.exit(f"make {' '.join(target)} failed; its last lines:\n" + "\n".join(log.read_text().splitlines()[-20:]))
    return time.perf_counter() - begin


def leaves(results: dict, path: str = "") -> dict[str, float]:
    "The numbers of a nested dictionary by their path."
    found: dict[str, float] = {}
    for key, value in results.items():
        found |= leaves(value, f"{path}/{key}") if isinstance(value, dict) else {f"{path}/{key}": value}
    return found


def outcome(folder: Path) -> dict[str, dict]:
    "What a clone left behind, by kind and name."
    names = lambda pattern: sorted(folder.glob(pattern))
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    world = next(folder.glob("runs/*")).name  # "mini-tiny"; the clone also holds the committed report of another
    return dict(
        features={str(p.relative_to(folder)): digest(p) for p in names("features/*/*/*/*/*.safetensors")},
        weights={p.parent.name: digest(p) for p in names("runs/*/*/model.safetensors")},
        metrics={p.parent.name: leaves(json.loads(p.read_text())["results"]) for p in names("runs/*/*/metrics.json")},
        tables={p.name: list(csv.reader(p.open())) for p in names(f"reports/{world}/table*.csv")})


def compared(first: Path, second: Path) -> dict[str, dict]:
    "How many things of each kind there are in both, and how many are the same."
    one, other = outcome(first), outcome(second)
    found = {kind: dict(count=len(one[kind]), same=sum(other[kind].get(name) == value for name, value in one[kind].items()), only_in_one=len(
        one[kind].keys() ^ other[kind].keys())) for kind in one}
    apart = [abs(a[k] - b[k]) for name, a in one["metrics"].items() if (b := other["metrics"].get(name)) for k in a if k in b and a[k] != b[k]]
    found["metrics"]["largest_difference"] = max(apart, default=0.0)
    weights = [(load_file(path), load_file(second / path.relative_to(first))) for path in first.glob("runs/*/*/model.safetensors")]
    found["weights"]["largest_difference"] = max((float((a[k].float() - b[k].float()).abs().max()) for a, b in weights for k in a), default=0.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", default="1")
    parser.add_argument("--size", default="tiny", help="of the mini world: tiny, default or large")
    parser.add_argument("--cores", type=int, nargs="+", default=[2, 2, 1, 4], help="one clone each; all are compared with the first")
    parser.add_argument("--out", type=Path, default=ROOT / "reports/bench/determinism.json")
    args = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as work:
        for number, cores in enumerate(args.cores):
            folder = Path(work) / str(number)
            line = dict(cores=cores, seconds=round(made(folder, cores, args.tables, args.size)))
            lines.append(line | (compared(Path(work) / "0", folder) if number else {}))
            print(json.dumps(lines[-1]), flush=True)
    write_json(args.out, dict(made_with(), tables=args.tables, size=args.size, clones=lines))


if __name__ == "__main__":
    main()
