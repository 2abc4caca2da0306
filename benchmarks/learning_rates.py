"""Learning rates of the mini profile: for each method, its published rate times 1, 4 and 16, judged on held-out videos of the source.

    python benchmarks/learning_rates.py [--methods xmic,coop] [--factors 1,4,16]

Neither test segments nor any target dataset is looked at. What is best goes into MINI_METHODS of xmic.experiments by hand."""
import argparse
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from epic_scale import made_with
from xmic.experiments import METHODS, prepare, profile, run
from xmic.files import read_json, settings, write_json
from xmic.config import TrainConfig, resolve
from xmic.training import train

OUT = Path(__file__).resolve().parents[1] / "reports" / "bench" / "learning_rates.json"
TASKS = (("ego4d", "noun"), ("epic", "verb"))


def judge(method: str, source: str, kind: str, factor: float, fraction: float) -> tuple[float, float]:
    "The rate, and top-1 on the held-out videos after the last epoch, in per cent."
    c = settings(TrainConfig, run(profile(), source, kind, METHODS[method]).parameters)
    c = replace(c, lr=factor * resolve(replace(c, lr=None)).lr, targets=[], target_roots={}, name=None, runs_root="runs/learning_rates",
                selection="source validation", validation_fraction=fraction)
    return c.lr, float(train(prepare(c)).history.selection_top1.iloc[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(m for m in METHODS if m != "ZS CLIP"))
    parser.add_argument("--factors", default="1,4,16")
    parser.add_argument("--fraction", type=float, default=0.25, help="share of the training videos that is held out")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    for method in args.methods.split(","):
        for factor in map(float, args.factors.split(",")):
            rows = [dict(method=method, factor=factor, source=s, kind=k, **dict(zip(("lr", "top1"), judge(method, s, k, factor, args.fraction))))
                    for s, k in TASKS]
            print(*rows, sep="\n", flush=True)
            known = [r for r in (read_json(OUT)["rows"] if OUT.exists() else []) if (r["method"], r["factor"]) != (method, factor)]
            write_json(OUT, dict(made_with(), rows=known + rows))
    print(pd.DataFrame(read_json(OUT)["rows"]).pivot_table(index=["method", "lr"], columns=["source", "kind"], values="top1", margins=True).round(1))


if __name__ == "__main__":
    main()
