"""What all tables of the paper cost on one GPU, extrapolated from counted operations. See README.md."""
import argparse
import os
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from epic_scale import made_with  # noqa: E402
from generated import link_official_files, write_ego4d  # noqa: E402
from xmic.costs import ANNOTATED, VITS, step_gflop, vit_gflop  # noqa: E402
from xmic.encoders import ClassEmbeddings, create_encoder  # noqa: E402
from xmic.experiments import TABLES, plan, profile  # noqa: E402
from xmic.files import settings, write_json  # noqa: E402
from xmic.segments import read_classes  # noqa: E402
from xmic.streams import Batch  # noqa: E402
from xmic.config import CONDITIONED, PIXELS, UNTRAINED, TrainConfig, build_method, resolve, text_tower  # noqa: E402

SPLITS = {("epic", "train"): "EPIC-KITCHENS train", ("epic", "test"): "EPIC-KITCHENS test", ("ego4d", "train"): "Ego4D train",
          ("ego4d", "test"): "Ego4D test", ("egtea", "test"): "EGTEA test"}
TOWERS = {"ViT-B-16-quickgelu": ("ViT-B/16", 1), "ViT-L-14-quickgelu": ("ViT-L/14", 1), "dinov2_vitl14": ("DINOv2 ViT-L/14", 1),
          "lavila-large": ("ViT-L/14", 2)}  # of `VITS`, and the attentions of a layer: LaViLa has one over time, too
DIMS = {"ViT-B-16-quickgelu": 512, "ViT-L-14-quickgelu": 768, "dinov2_vitl14": 1024, "lavila-large": 256}


@cache
def clip():
    return create_encoder("ViT-B-16-quickgelu", "random", "cpu", precision="fp32")


@cache
def names(root: str, dataset: str, kind: str, template: str) -> tuple[str, ...]:
    return tuple(read_classes(dataset, Path(root) / dataset, kind).prompts(template))


@cache
def counted(method: str, views: int, dims: tuple[int, int], prompts: tuple[str, ...], frames: int, videos: int, trained: bool) -> float:
    "GFLOP of a training step, or of a forward pass."
    c = resolve(settings(TrainConfig, dict(dataset="epic", method=method, encoder="ViT-B-16-quickgelu", weights="random", frames=frames)))
    built = build_method(c, *dims, 100.0, text_tower(c, clip()), list(prompts), clip()).train(trained)
    if not trained: built.requires_grad_(False)
    video = torch.randint(0, 256, (videos, frames, 224, 224, 3), dtype=torch.uint8) if method in PIXELS else torch.randn(videos, frames, dims[0])
    context = torch.randn(videos, frames, views, dims[1]) if method in CONDITIONED else None
    return step_gflop(built, Batch(video, context), ClassEmbeddings(list(prompts), torch.randn(len(prompts), dims[0])), trained)


@cache
def extrapolated(method: str, views: int, dims: tuple[int, int], prompts: tuple[str, ...], frames: int, videos: int, trained: bool) -> float:
    "GFLOP for all classes and so many videos, from counts of one and two videos with two and four of the longest names: linear in either, so bilinear."
    longest = tuple(sorted(prompts, key=len))
    at = lambda n, v: counted(method, views, dims, longest[-n:], frames, v, trained)
    classes, more = (len(prompts) - 2) / 2, videos - 1
    few, many = (at(n, 1) * (1 - more) + at(n, 2) * more for n in (2, 4))
    return few + (many - few) * classes


def run_cost(c: TrainConfig, root: str) -> dict[str, float]:
    "Steps of a run, and PFLOP of its training and of its last evaluation."
    dims = DIMS[c.encoder], DIMS[c.context_encoder or c.encoder]
    kinds = ("noun", "verb") if c.labels == "both" else (c.labels,)
    shape = lambda dataset, kind: (c.method, len(c.context_views), dims, names(root, dataset, kind, c.template), c.frames)
    evaluated = sum(extrapolated(*shape(d, k), videos=int(ANNOTATED.segments[SPLITS[d, "test"]]), trained=False) for d in (c.dataset, *c.targets) for k in kinds)
    if c.method in UNTRAINED: return dict(steps=0, trained=0.0, evaluated=evaluated / 1e6)
    steps = c.epochs * int(ANNOTATED.segments[SPLITS[c.dataset, "train"]]) // c.batch_size
    return dict(steps=steps, trained=steps * extrapolated(*shape(c.dataset, kinds[0]), videos=c.batch_size, trained=True) / 1e6, evaluated=evaluated / 1e6)


def store_cost(parameters: dict, fps: float | None) -> float:
    "PFLOP of the extraction of two views."
    (tower, attentions), (segments, seconds, rate) = TOWERS[parameters["encoder"]], ANNOTATED.loc[SPLITS[parameters["dataset"], parameters["splits"][0]]]
    return segments * seconds * (min(fps, rate) if fps else rate) * 2 * vit_gflop(*VITS[tower][:-1], attentions) / 1e6


def runs_costs(root: str, numbers: str) -> pd.DataFrame:
    configs = [resolve(settings(TrainConfig, r.parameters)) for r in plan(profile("paper", data=root), numbers).runs.values()]
    return pd.DataFrame([dict(method=c.method, **run_cost(c, root)) for c in configs])


def costs(root: str, numbers: str, tflops: float, least_ms: float) -> dict[str, float]:
    made, own = plan(profile("paper", data=root), numbers), runs_costs(root, numbers)
    hours = lambda pflop: pflop * 1e3 / tflops / 3600
    encoded = {name: sum(store_cost(s.parameters, fps) for s in made.stores.values() if s.notebook == "extract") for name, fps in (("every frame", None), ("8 a second", 8.0))}
    short = own.trained * 1e3 / tflops < own.steps * least_ms / 1e3  # steps that are over before they are launched
    return {"runs": len(own), "thousand steps": own.steps.sum() / 1e3,
            "training, PFLOP": own.trained.sum(), "training, hours": hours(own.trained[~short].sum()) + own.steps[short].sum() * least_ms / 1e3 / 3600,
            "evaluation, hours": hours(own.evaluated.sum()), **{f"extraction, {name}, hours": hours(pflop) for name, pflop in encoded.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tflops", type=float, default=100.0, help="that the GPU sustains, in bf16: an assumption")
    parser.add_argument("--least-ms", type=float, default=2.0, help="of a step, however few its operations: an assumption")
    parser.add_argument("--out", type=Path, default=ROOT / "reports/bench/tables.json")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*RANDOM weights")
    with tempfile.TemporaryDirectory() as folder:
        root = link_official_files(Path(os.environ.get("XMIC_TEST_DATA", ROOT.parent / "shared/data")), Path(folder))
        write_ego4d(Path(os.environ.get("XMIC_TEST_DATA", ROOT.parent / "shared/data")), root, 40, 40)
        rows = {str(t): costs(str(root), str(t), given.tflops, given.least_ms) for t in TABLES}
        rows["1 to 7"] = costs(str(root), "1 2 3 4 5 6 7", given.tflops, given.least_ms)
        rows["all"] = costs(str(root), "all", given.tflops, given.least_ms)
        methods = runs_costs(str(root), "all").groupby("method").trained.agg(["count", "sum"]).set_axis(["runs", "training, PFLOP"], axis=1)
    table = pd.DataFrame(rows).T.rename_axis("table")
    print(table.round(2).to_string(), methods.round(2), sep="\n\n")
    write_json(given.out, dict(made_with(), assumed=dict(tflops=given.tflops, least_ms=given.least_ms),
                               tables=rows, methods=methods.to_dict("index")))


if __name__ == "__main__":
    main()
