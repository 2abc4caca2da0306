"""X-MIC on all of EPIC-KITCHENS-100: the real annotations, generated features of the true lengths, one epoch. See README.md."""

import argparse
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from xmic.adapter import XMIC, video_embedding
from xmic.encoders import ClassEmbeddings
from xmic.features import StoredView, shard_name, write_shard
from xmic.files import DataError, write_json
from xmic.segments import read_classes, read_segments
from xmic.streams import Batch, Streams, free_bytes
from xmic.config import TrainConfig, build_method, resolve
from xmic.devices import pick_device
from xmic.training import Split, Trainer, peak_memory, provenance

ROOT = Path(__file__).resolve().parents[1]
DIM, VIEWS = 512, ("full", "hand")


# The data: real annotations, generated features

def link_annotations(data: Path, root: Path) -> str:
    "Lays the official files out in `root` as their reader expects them; returns which training list was used."
    official = data / "epic_kitchens_100_annotations"
    trains = [official / "EPIC_100_train.csv", data / "derived" / "EPIC_100_train_reconstructed.csv"]
    train = next((path for path in trains if path.exists()), None)
    if train is None:
        raise DataError(f"{data}: none of {', '.join(map(str, trains))} exists; set XMIC_TEST_DATA to the folder that holds them")
    (root / "EPIC_100_train.csv").symlink_to(train)
    for name in ("EPIC_100_validation.csv", "EPIC_100_noun_classes.csv", "EPIC_100_verb_classes.csv"):
        (root / name).symlink_to(official / name)
    return train.name


def stored_rows(
    segments: pd.DataFrame,
    fps: float | None,  # None: every frame
) -> np.ndarray:  # (S,)
    "How many rows each segment has."
    if fps is None:
        return (segments.stop_frame - segments.start_frame).to_numpy()
    return np.maximum(1, np.ceil((segments.stop_sec - segments.start_sec) * fps)).astype(int).to_numpy()


def generate(store: Path, segments: pd.DataFrame, rows: np.ndarray, fps: float | None, dim: int = DIM) -> None:
    "Writes both views, a shard for each video: each segment is a piece of one random block, from a place of its own."
    rng = np.random.default_rng(0)
    block = torch.from_numpy(rng.standard_normal((8192 + rows.max(), dim), np.float32)).half()
    for view in VIEWS:
        write_json(store / view / "manifest.json", dict(dim=dim, fingerprint="generated", view=view, feature_fps=fps or "every frame"))
        for video, part in tqdm(segments.assign(rows=rows).groupby("video_id"), desc=f"writing {view}", unit="video", mininterval=2, disable=None):
            offsets = rng.integers(0, 8192, len(part))
            write_shard(store / view / shard_name(video), [
                (segment, block[offset:offset + n], np.arange(n))
                for segment, n, offset in zip(part.segment_id, part.rows, offsets)])


def drop_from_cache(folder: Path) -> bool:
    "Asks the system to forget the files that it keeps in memory; False where it cannot be asked."
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.rglob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    return True


def read_into_cache(folder: Path) -> bool:
    "Reads all files once, so that no run profits from the one before it; False where they do not fit the memory."
    if store_bytes(folder) > free_bytes(torch.device("cpu")):
        return False
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    return True


def store_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*.safetensors"))


# The reference: what one writes first

class LiteralXMIC(XMIC):
    "Eq. 1 word for word: every class embedding plus the vector of every video, then the cosine."

    def forward(self, batch: Batch, classes: ClassEmbeddings) -> Tensor:  # (B, C)
        shifted = classes.text[None] + (self.scale * self.vector(batch.context))[:, None]  # (B, C, D)
        video = F.normalize(video_embedding(batch.video), dim=-1)[:, None]
        return self.logit_scale.exp() * (F.normalize(shifted, dim=-1) * video).sum(-1)


class PlainLoader:
    "A loader that takes one segment after the other, between the steps; a stand-in for `Streams`."

    def __init__(self, video: StoredView, context: list[StoredView], segments: list[str], device: torch.device):
        self.video, self.context, self.segments, self.device = video, context, segments, device

    def segment(self, view: StoredView, position: int, rows: np.ndarray) -> Tensor:  # (T, D)
        return view.rows(self.segments[position])[0][torch.from_numpy(rows)].float()

    def batches(self, order, rows, batch_size, context_rows=None, drop_last=False) -> Iterator[tuple[np.ndarray, Batch]]:
        for i in range(0, len(order) - batch_size + 1, batch_size):
            positions = order[i:i + batch_size]
            video = torch.stack([self.segment(self.video, p, rows[p]) for p in positions])
            context = torch.stack([torch.stack([self.segment(v, p, rows[p]) for v in self.context], 1) for p in positions])
            yield positions, Batch(video, context).to(self.device)


# The measurement

class PeakMemory:
    "Resident memory of this process before and at most while the block ran, in MiB, by kind; sampled by a thread. Empty where there is no /proc."

    kinds = {"VmRSS": "all", "RssAnon": "anonymous", "RssFile": "file_backed"}

    def __enter__(self) -> "PeakMemory":
        self.before = self.peak = self.now()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stopped.set()
        self.thread.join()
        self.look()

    def now(self) -> dict[str, float]:
        try:
            lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
        except OSError:
            return {}
        return {name: round(int(lines[key].split()[0]) / 1024) for key, name in self.kinds.items() if key in lines}

    def look(self) -> None:
        self.peak = {k: max(v, self.peak[k]) for k, v in self.now().items()}

    def watch(self) -> None:
        while not self.stopped.wait(0.05):
            self.look()


def measure(
    root: Path,
    mode: str,  # "streamed", "resident" or "reference"
    batch_size: int,
    steps: int | None,  # None: the whole epoch
    cold: bool,  # drop the store from the system's file cache first; else read it into it
    device_name: str | None,
    threads: int,
) -> dict:
    "One epoch of the kit's Trainer in this process."
    torch.set_num_threads(threads)
    device = pick_device(device_name)
    segments, classes = read_segments("epic", root, "train"), read_classes("epic", root, "noun")
    config = resolve(TrainConfig(dataset="epic", labels="noun", batch_size=batch_size, progress=False))
    done = (drop_from_cache if cold else read_into_cache)(root / "store")
    cache = ("cold" if cold else "warm") if done else "as it was"
    with PeakMemory() as memory:
        begin = time.perf_counter()
        views = {v: StoredView(root / "store" / v) for v in VIEWS}
        opened = time.perf_counter()
        video, context, ids = views[config.classified_view], [views[v] for v in config.context_views], segments.segment_id.tolist()
        streams = PlainLoader(video, context, ids, device) if mode == "reference" else Streams(
            video, context, ids, device, resident=mode == "resident")
        ready = time.perf_counter()
        lengths = np.array([video.place[i][2] for i in ids])
        split = Split(segments, {"noun": classes.labels(segments.noun)}, streams, np.zeros_like(lengths), lengths, len(segments))
        torch.manual_seed(0)
        text = ClassEmbeddings(classes.keys, torch.randn(len(classes), DIM)).to(device)
        method = build_method(config, DIM, DIM, 100.0)
        if mode == "reference":
            method.__class__ = LiteralXMIC
        trainer = Trainer(config, method, {"noun": text}, split, device)
        if steps:
            chosen = np.random.default_rng(0).permutation(trainer.usable)[:steps * batch_size]
            trainer.usable = np.sort(chosen)
        line = trainer.run_epoch()
        if device.type == "cuda":
            torch.cuda.synchronize()
    steps = line["segments"] // batch_size
    return dict(
        mode=mode, batch_size=batch_size, cache=cache, steps=steps, segments=line["segments"], loss=line["loss"],
        seconds=line["seconds"], data_seconds=line["data_seconds"], data_share=line["data_seconds"] / line["seconds"],
        step_ms=1000 * line["seconds"] / steps, data_ms=1000 * line["data_seconds"] / steps,
        load_ms=loading(split, batch_size, min(steps, 100)),
        open_seconds=opened - begin, streams_seconds=ready - opened,
        memory_mib=dict(before=memory.before, peak=memory.peak, **{k: v for k, v in peak_memory(device).items() if k != "process_mib"}))


def loading(split: Split, batch_size: int, steps: int) -> float:
    "Milliseconds to make a batch with nothing else to do, of segments drawn anew."
    rows, _ = split.rows(16, np.random.default_rng(1))
    order = np.random.default_rng(1).permutation(len(split.segments))
    begin = time.perf_counter()
    for _ in islice(split.streams.batches(order, rows, batch_size), steps):
        pass
    return 1000 * (time.perf_counter() - begin) / steps


def same_logits(device: torch.device) -> float:
    "Largest difference between the logits of the reference and the kit's."
    torch.manual_seed(0)
    config = resolve(TrainConfig())
    method = build_method(config, DIM, DIM, 100.0).to(device).eval()
    batch = Batch(torch.randn(8, 16, DIM), torch.randn(8, 16, 2, DIM)).to(device)
    text = ClassEmbeddings(tuple(map(str, range(300))), torch.randn(300, DIM)).to(device)
    with torch.no_grad():
        ours, literal = method(batch, text), LiteralXMIC.forward(method, batch, text)
    torch.testing.assert_close(ours, literal, atol=1e-3, rtol=1e-4)
    return float((ours - literal).abs().max())


def alone(function, *arguments):
    "Calls a function in a process of its own, so that its memory is its own."
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def hardware() -> dict:
    "What the figures depend on besides the versions."
    try:
        cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
        memory = int(next(line.split()[1] for line in open("/proc/meminfo") if line.startswith("MemTotal"))) / 2**20
    except (OSError, StopIteration):
        cpu, memory = platform.processor(), None
    return dict(cpu=cpu, cores=os.cpu_count(), memory_gib=memory and round(memory, 1), load_average=os.getloadavg())


def made_with(device: torch.device | str = "cpu") -> dict:
    "What the JSON of each benchmark says of how it was made."
    return dict(command=" ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]), date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                hardware=hardware(), versions=provenance(torch.device(device)))


def ratios(results: list[dict]) -> list[dict]:
    "How many times longer the reference takes than the kit on the same steps, both with what they read in the file cache as far as it fits."
    kit = {r["batch_size"]: r for r in results if r["mode"] == "streamed" and r["cache"] != "cold"}
    rows = []
    for r in results:
        if r["mode"] == "reference" and (k := kit.get(r["batch_size"])):
            compute = lambda x: x["step_ms"] - x["data_ms"]
            rows.append(dict(batch_size=r["batch_size"], step=r["step_ms"] / k["step_ms"], compute=compute(r) / compute(k),
                             waiting=r["data_ms"] / k["data_ms"], loading=r["load_ms"] / k["load_ms"],
                             peak_anonymous=r["memory_mib"]["peak"].get("anonymous", 0) / max(1, k["memory_mib"]["peak"].get("anonymous", 1))))
    return rows


def table(results: list[dict]) -> str:
    peak = lambda r, kind: r["memory_mib"]["peak"].get(kind)
    return pd.DataFrame([{
        "mode": r["mode"], "cache": r["cache"], "batch": r["batch_size"], "steps": r["steps"],
        "step ms": round(r["step_ms"], 1), "waiting ms": round(r["data_ms"], 2), "waiting %": round(100 * r["data_share"], 2),
        "loading alone ms": round(r["load_ms"], 1), "anonymous MiB": peak(r, "anonymous"), "file-backed MiB": peak(r, "file_backed"),
        "open s": round(r["open_seconds"], 2)} for r in results]).to_string(index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fps", default="4", help="rows a second of video, or 'every': every frame, as released (default: 4)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--steps", type=int, help="steps of the streamed and the resident epoch (default: the whole epoch)")
    parser.add_argument("--reference-steps", type=int, default=200, help="steps of the comparison with the plain reference; 0: none")
    parser.add_argument("--modes", nargs="+", choices=["streamed", "resident"], default=["streamed", "resident"])
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where the store is made")
    parser.add_argument("--store", type=Path, help="a folder that --keep has left, to be used again")
    parser.add_argument("--keep", action="store_true", help="leave the store")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "bench" / "epic_scale.json")
    options = parser.parse_args()
    fps = None if options.fps == "every" else float(options.fps)
    data = Path(os.environ.get("XMIC_TEST_DATA", ROOT / "../shared/data")).resolve()
    device = pick_device(options.device)
    root = options.store or Path(tempfile.mkdtemp(prefix="epic_scale_", dir=options.work))
    report = dict(made_with(device), threads=options.threads, feature_fps=options.fps)
    try:
        if not options.store:
            report["annotations"] = link_annotations(data, root)
        segments = pd.concat([read_segments("epic", root, s) for s in ("train", "test")], ignore_index=True)
        rows = stored_rows(segments, fps)
        needed, free = len(VIEWS) * int(rows.sum()) * (2 * DIM + 4), shutil.disk_usage(root).free
        report |= dict(segments=segments.split.value_counts().to_dict(), rows_a_view=int(rows.sum()), store_gib=needed / 2**30)
        if not options.store:
            if needed * 1.05 > free:
                raise DataError(f"{root.parent} has {free / 2**30:.0f} GiB free and the features need {needed / 2**30:.0f}: "
                                f"choose another --work, or fewer rows with --fps 4")
            begin = time.perf_counter()
            generate(root / "store", segments, rows, fps)
            report["write_seconds"] = time.perf_counter() - begin
        report["logit_difference"] = same_logits(device)
        begin = time.perf_counter()
        for view in VIEWS:
            StoredView(root / "store" / view).save_index()
        report["index_seconds"] = time.perf_counter() - begin
        report["results"] = results = []
        for size in options.batch_sizes:
            plan = [(mode, options.steps, mode == "streamed") for mode in options.modes]
            if options.reference_steps:
                plan += [("streamed", options.reference_steps, False), ("reference", options.reference_steps, False)]
            for mode, steps, cold in plan:
                if mode == "resident" and needed > free_bytes(device):
                    print(f"resident, batch {size}: left out, {needed / 2**30:.0f} GiB do not fit", flush=True)
                    continue
                results.append(alone(measure, root, mode, size, steps, cold, options.device, options.threads))
                print(table(results[-1:]), flush=True)
        report["ratios"] = ratios(results)
        write_json(options.out, report)
        print(f"\n{table(results)}\n\nreference / kit:\n{pd.DataFrame(report['ratios']).round(2).to_string(index=False)}\n\n{options.out}")
    except DataError as e:
        sys.exit(f"epic_scale: {e}")
    finally:
        if not (options.keep or options.store):
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
