"""Injects faults and counts what became of them: `python -m tests.faults --long`. See README.md."""
import argparse
import json
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from .cases import CASES, inject
from .places import make_place
from .soak import soak
from .tally import LOST, counts, hardware, summary
from xmic.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--long", action="store_true", help="many of each kind, make reproduce among them: a quarter of an hour on two cores")
    parser.add_argument("--count", type=int, help="how many of each kind, in place of the mode's; of the soak, kills (200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=f"some of: {', '.join(CASES)}")
    parser.add_argument("--soak", type=int, metavar="VIDEOS", help="instead: extract so many videos in a loop of kills")
    parser.add_argument("--folder", type=Path, help="where to work; default: the folder for temporary files")
    parser.add_argument("--out", type=Path, default=ROOT / "reports/bench/faults.json", help="where the counts are written, beside those that are there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*RANDOM weights")
    report = read_json(given.out) if given.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="xmic-faults-", dir=given.folder) as folder:
        folder, begin = Path(folder), time.perf_counter()
        if given.soak:
            count = soak(folder, given.soak, random.Random(given.seed), given.count or 200)
            report["soak"] = dict(count, seed=given.seed, hardware=hardware())
            lost = any(count[name] for name in ("wrong", "lost", "files_that_differ", "faults_found_by_verify"))
        else:
            place, faults = make_place(folder / "place"), []
            for name in given.only:
                case = CASES[name]
                own = list(inject(name, place, folder / name, given.seed, given.count or (case.long if given.long else case.short)))
                print(f"{name}: {counts(own)}", flush=True)
                for fault in own:
                    if fault.outcome == LOST: print(f"{fault.place}, {fault.kind}:\n{fault.detail}", flush=True)
                faults += own
            report["faults"] = dict(summary(faults), mode="long" if given.long else "short", seed=given.seed,
                                    seconds=round(time.perf_counter() - begin), hardware=hardware())
            lost = any(f.outcome == LOST for f in faults)
        text = json.dumps(report).replace(str(folder), "...").replace(str(ROOT), ".")
        write_json(given.out, json.loads(text))
    print(json.dumps(report["soak" if given.soak else "faults"], indent=1, ensure_ascii=False)[:3000])
    sys.exit(lost)
