"""How cost grows with segments, classes and frames: time and peak memory of everything around the encoder, and the exponents. See README.md."""

import argparse
import gc
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent))
from epic_scale import made_with  # noqa: E402
from xmic.classes import ClassSet  # noqa: E402
from xmic.distributed import deal_videos  # noqa: E402
from xmic.encoders import ClassEmbeddings, create_encoder, embed_prompts  # noqa: E402
from xmic.evaluation import summarise  # noqa: E402
from xmic.features import ExtractReport, FeatureStore, _left_to_do, shard_name, write_shard  # noqa: E402
from xmic.files import write_json  # noqa: E402
from xmic.streams import Streams  # noqa: E402
from xmic.config import TrainConfig, build_method, resolve
from xmic.training import Split, Trainer, evaluate  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
VIEWS, DIM, PER_VIDEO = ("full", "hand"), 32, 136  # as many segments a video as EPIC-KITCHENS has
SEGMENTS, CLASSES, FRAMES = (1_000, 4_000, 16_000, 67_000), (100, 1_000, 5_000, 20_000), (8, 16, 32, 64)


# What is measured on

def table(segments: int, per_video: int = PER_VIDEO, classes: int = 100) -> pd.DataFrame:
    "Segments of three seconds; every class occurs about equally often."
    number = np.arange(segments)
    videos = [f"v{v:06}" for v in number // per_video]
    return pd.DataFrame(dict(segment_id=[f"s{n:06}" for n in number], video_id=videos, video_path=[f"/nowhere/{v}.mp4" for v in videos],
                             start_sec=3.0 * (number % per_video), stop_sec=3.0 * (number % per_video + 1), noun=number % classes))


def fill(root: Path, segments: pd.DataFrame, rows: int) -> FeatureStore:
    "A store of random features, with as many rows for each segment."
    rng, store = np.random.default_rng(0), FeatureStore(root)
    for view in VIEWS:
        write_json(root / view / "manifest.json", dict(dim=DIM, fingerprint="generated", view=view, feature_fps="every frame"))
        for video, part in segments.groupby("video_id"):
            block = torch.from_numpy(rng.standard_normal((len(part), rows, DIM), np.float32))
            write_shard(root / view / shard_name(video), [(s, f, np.arange(rows)) for s, f in zip(part.segment_id, block)])
    store.refresh()
    return store


def trainer(root: Path, segments: pd.DataFrame, classes: int = 100, frames: int = 16) -> Trainer:
    config = resolve(TrainConfig(frames=frames, batch_size=128, warmup_epochs=0, progress=False, device="cpu"))
    store = FeatureStore(root)
    views = [store.view(view) for view in VIEWS]
    streams = Streams(views[1], views[::-1], segments.segment_id.tolist(), "cpu", True)
    split = Split(segments, {"noun": segments.noun.to_numpy(copy=True)}, streams, np.zeros(len(segments), int), streams.lengths, len(segments))
    torch.manual_seed(0)
    text = {"noun": ClassEmbeddings([f"class {c}" for c in range(classes)], torch.randn(classes, DIM))}
    return Trainer(config, build_method(config, DIM, DIM, 100.0), text, split, torch.device("cpu"))


# One measurement in a process of its own

def _inside(pipe, make: Callable) -> None:
    work = make()
    gc.collect(), gc.freeze()  # what was imported and prepared is not gone through again
    Path("/proc/self/clear_refs").write_text("5")  # peak memory counts from here
    status = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
    before, begin, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
    work()
    pipe.send(dict(seconds=time.perf_counter() - begin, cpu_seconds=time.process_time() - cpu, mib=max(0.0, status("VmHWM") - before)))


def measure(
    make: Callable[[], Callable[[], object]],  # prepares, and gives what is measured
) -> dict[str, float]:  # seconds, cpu_seconds, mib above what there was before
    "Time and peak memory of a piece of work; if it is short, the best of three."
    found: list[dict[str, float]] = []
    while len(found) < 3 and not (found and found[-1]["cpu_seconds"] > 1):
        ours, theirs = get_context("fork").Pipe()
        child = get_context("fork").Process(target=_inside, args=(theirs, make))
        child.start()
        theirs.close()
        found.append(ours.recv())
        child.join()
    return min(found, key=lambda f: f["cpu_seconds"])


def exponent(sizes: list[int], values: list[float]) -> float:
    "Slope of the logarithms over the upper three sizes: what is there at any size is not growth."
    return float(np.polyfit(np.log(sizes[-3:]), np.log(np.maximum(values[-3:], 1e-9)), 1)[0])


# What grows

def bookkeeping(folder: Path, segments: pd.DataFrame) -> Callable:
    store = FeatureStore(folder)
    return lambda: lambda: _left_to_do(segments, [store], VIEWS, ExtractReport(segments))


def noting(segments: pd.DataFrame) -> Callable:
    "Every video is missing, and each has one segment, as in EGTEA."
    def work():
        with tempfile.TemporaryDirectory() as folder:
            store = FeatureStore(folder)
            for row in segments.itertuples():
                store.note_failures("full", {row.segment_id: dict(segment_id=row.segment_id, video_id=row.video_id, video_path=row.video_path,
                                                                  cause=f"no such file: {row.video_path}", bytes=None)}, set())
            store._failure_log("full").tidy()
    return lambda: work


def evaluation(root: Path, segments: pd.DataFrame, classes: int) -> Callable:
    def make():
        t = trainer(root, segments, classes)
        return lambda: summarise(evaluate(t.method, t.split, t.text, {}, t.config))
    return make


def growth_of_segments(folder: Path, sizes: tuple[int, ...]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for size in sizes:
        segments, root = table(size), folder / str(size)
        fill(root, segments, 4)
        empty = folder / f"{size}-empty"
        for view in VIEWS: write_json(empty / view / "manifest.json", dict(dim=DIM))
        for name, make in {
            "what is left to do, all stored": bookkeeping(root, segments),
            "what is left to do, nothing stored": bookkeeping(empty, segments),
            "noting that every video is missing": noting(table(size, 1)),
            "dealing videos to 8 parts": lambda: lambda: deal_videos(segments, 3, 8),
            "opening the store": lambda: lambda: [FeatureStore(root).view(view) for view in VIEWS],
            "opening it without its index": lambda: lambda: _without_index(root),
            "one epoch of X-MIC": lambda: trainer(root, segments).run_epoch,
            "evaluation": evaluation(root, segments, 100),
        }.items():
            found.setdefault(name, []).append(dict(size=size, **measure(make)))
            print(f"{size:>7,} segments  {name}: {found[name][-1]}", flush=True)
    return found


def _without_index(root: Path) -> None:
    for view in VIEWS: (root / view / "index.json").unlink(missing_ok=True)
    FeatureStore(root).refresh()


def growth_of_classes(folder: Path, sizes: tuple[int, ...]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    root, plain = folder / "classes", table(4_000)
    fill(root, plain, 4)
    words = [f"{a} {b} {c}" for a in ("red", "blue", "large", "small", "old", "new", "wet", "dry") for b in ("tin", "wood", "glass", "steel", "clay")
             for c in (f"thing{i}" for i in range(500))]
    for size in sizes:
        segments, names = table(4_000, classes=size), ClassSet.from_names(words[:size])
        for name, make in {
            "text embeddings": lambda: _embedding(names),
            "one epoch of X-MIC": lambda: trainer(root, segments, size).run_epoch,
            "evaluation": evaluation(root, segments, size),
        }.items():
            found.setdefault(name, []).append(dict(size=size, **measure(make)))
            print(f"{size:>7,} classes  {name}: {found[name][-1]}", flush=True)
    return found


def _embedding(names: ClassSet) -> Callable:
    encoder = create_encoder("mini-clip", device="cpu")
    return lambda: embed_prompts(encoder, names, "{}", Path(tempfile.mkdtemp()))


def growth_of_frames(folder: Path, sizes: tuple[int, ...]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    root, segments = folder / "frames", table(4_000)
    fill(root, segments, 64)
    for size in sizes:
        found.setdefault("one epoch of X-MIC", []).append(dict(size=size, **measure(lambda: trainer(root, segments, 100, size).run_epoch)))
        print(f"{size:>7,} frames  {found['one epoch of X-MIC'][-1]}", flush=True)
    return found


def figure(results: dict[str, dict[str, list[dict]]], path: Path) -> None:
    "Seconds against size on logarithmic axes, a panel for each thing that grows."
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), dpi=72, width_ratios=[2, 1, 1])
    for axis, (what, found) in zip(axes, results.items()):
        for name, points in found.items():
            slope = exponent([p["size"] for p in points], [p["cpu_seconds"] for p in points])
            axis.loglog([p["size"] for p in points], [p["cpu_seconds"] for p in points], marker="o", ms=3, label=f"{name} ({slope:.2f})")
        sizes = [p["size"] for p in points]
        axis.set_xticks(sizes, [f"{s:,}" for s in sizes], fontsize=7)
        axis.tick_params(axis="x", which="minor", labelbottom=False)
        axis.set_xlabel(what), axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=6, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.2))
    axes[0].set_ylabel("CPU seconds (exponent)")
    fig.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=int, default=67_000, help="leave out larger numbers of segments")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where the stores are made")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "bench" / "growth.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = dict(made_with(), dim=DIM, segments_a_video=PER_VIDEO)
    with tempfile.TemporaryDirectory(prefix="growth_", dir=options.work) as place:
        folder = Path(place)
        results = {"segments": growth_of_segments(folder, tuple(s for s in SEGMENTS if s <= options.largest)),
                   "classes": growth_of_classes(folder, CLASSES), "frames": growth_of_frames(folder, FRAMES)}
    lines = [dict(what=what, work=name, time=exponent([p["size"] for p in points], [p["cpu_seconds"] for p in points]),
                  memory=exponent([p["size"] for p in points], [p["mib"] + 1 for p in points]),
                  largest_cpu_seconds=points[-1]["cpu_seconds"], largest_mib=points[-1]["mib"])
             for what, found in results.items() for name, points in found.items()]
    report |= dict(load_average_after=os.getloadavg(), peak_of_parent_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                   exponents=lines, results=results)
    write_json(options.out, report)
    figure(results, options.out.with_suffix(".png"))
    print(f"\n{pd.DataFrame(lines).round(2).to_string(index=False)}\n\n{options.out}")


if __name__ == "__main__":
    main()
