"""What another device, precision or number of threads changes: features, answers and accuracies against float32 on one thread. See README.md."""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent))
from epic_scale import made_with  # noqa: E402
from xmic.experiments import MINI_NOTE, Profile, Run, profile, run  # noqa: E402
from xmic.features import ExtractConfig, FeatureStore, extract_dataset  # noqa: E402
from xmic.files import write_json  # noqa: E402
from xmic.mini import build  # noqa: E402
from xmic.config import TrainConfig
from xmic.training import RunResult, train  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
WAYS: dict[str, dict] = {  # what is extracted, what is trained, on how many threads; the first is what the others are compared with
    "float32, one thread": {},
    "two threads": dict(threads=2),
    "training in bf16": dict(train=dict(precision="bf16")),
    "encoder in bf16": dict(extract=dict(precision="bf16"), train=dict(encoder_precision="bf16")),
    "both in bf16": dict(extract=dict(precision="bf16"), train=dict(encoder_precision="bf16", precision="bf16")),
}
ON_GPU: dict[str, dict] = {
    "GPU, float32": dict(extract=dict(device="cuda", precision="fp32"), train=dict(device="cuda", precision="fp32")),
    "GPU, as it comes": dict(extract=dict(device="cuda"), train=dict(device="cuda")),
}


def extracted(one: Run, way: dict) -> list[FeatureStore]:
    stores = [extract_dataset(ExtractConfig(**store.parameters | way.get("extract", {})))[0] for store in one.stores]
    return list({store.root: store for store in stores}.values())


def distances(stores: list[FeatureStore], reference: list[FeatureStore]) -> torch.Tensor:
    "Of each row the length of the difference over the length of the reference."
    found = []
    for store, other in zip(stores, reference):
        for view in store.views:
            for segment in store.view(view).place:
                a, b = (s.segment(segment, view).float() for s in (store, other))
                found.append((a - b).norm(dim=1) / b.norm(dim=1))
    return torch.cat(found)


def changed(name: str, results: list[RunResult], reference: list[RunResult]) -> dict:
    "Answers that are others, in per cent of all, and by how many points accuracies differ at most."
    answers = [[pd.read_csv(r.folder / "predictions.csv").predicted for r in some] for some in (results, reference)]
    apart = [abs(a.table.top1 - b.table.top1).max() for a, b in zip(results, reference)]
    return {f"{name}_answers_changed": 100 * sum(int((a != b).sum()) for a, b in zip(*answers)) / sum(map(len, answers[1])),
            f"{name}_top1_apart": float(max(apart))}


def in_one_way(way: dict, p: Profile, seeds: int) -> tuple[list[FeatureStore], list[RunResult], list[RunResult]]:
    "Features, and the results of zero-shot CLIP and of X-MIC with each seed."
    torch.set_num_threads(way.get("threads", 1))
    trained = [run(p, "ego4d", "noun", dict(method=method), seed) for method, seed in [("zero_shot", 0), *(("xmic", s) for s in range(seeds))]]
    stores = extracted(trained[-1], way)
    results = [train(TrainConfig(**one.parameters | way.get("train", {}))) for one in trained]
    return stores, results[:1], results[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="default", help="of the mini world: tiny, default or large")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "bench" / "precision.json")
    args = parser.parse_args()
    ways, lines = WAYS | (ON_GPU if torch.cuda.is_available() else {}), []
    p = profile("mini", args.size)
    build(p.data, args.size)
    with tempfile.TemporaryDirectory() as work:
        for number, (name, way) in enumerate(ways.items()):
            here = replace(p, features_root=f"{work}/features{number}", runs_root=f"{work}/runs{number}")
            stores, zero_shot, xmic = in_one_way(way, here, args.seeds)
            if not number:
                reference = stores, zero_shot, xmic
                first = {"zero_shot": zero_shot[0].table.top1.tolist(), "xmic": [r.table.top1.tolist() for r in xmic]}
                seeds = changed("xmic", xmic[1:] + xmic[:1], xmic)
                print(first, seeds, flush=True)
                continue
            apart = 100 * distances(stores, reference[0])
            lines.append(dict(way=name, features_apart_median=float(apart.median()), features_apart_largest=float(apart.max()),
                              **changed("zero_shot", zero_shot, reference[1]), **changed("xmic", xmic, reference[2])))
            print(lines[-1], flush=True)
    answers = (1 + args.seeds) * sum(r.metrics["segments"][d]["with_features"] for r in reference[1] for d in r.metrics["segments"])
    write_json(args.out, dict(note=MINI_NOTE, size=args.size, seeds=args.seeds,
                              answers=answers, reference=next(iter(ways)), top1=first, another_seed=seeds, ways=lines,
                              **made_with("cuda" if torch.cuda.is_available() else "cpu")))


if __name__ == "__main__":
    main()
