"""X-MIC's training step at the size of EPIC-KITCHENS-100 against the plain way, several runs in one pass, and on a GPU whole runs. See README.md."""

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from epic_scale import ROOT, VIEWS, LiteralXMIC, PlainLoader, alone, generate, link_annotations, made_with, stored_rows
from xmic.adapter import cosine_logits, trained_parameters
from xmic.attention import Block, linear
from xmic.costs import PeakMemory
from xmic.encoders import ClassEmbeddings
from xmic.features import StoredView
from xmic.files import DataError, write_json
from xmic.segments import read_segments
from xmic.streams import Streams
from xmic.together import Together
from xmic.config import TrainConfig, build_method, resolve
from xmic.devices import pick_device
from xmic.training import Split, Trainer, peak_memory

FPS = 4.0  # rows a second in the generated store


# The reference: what one writes first

class PlainBlock(Block):
    "A layer by `nn.MultiheadAttention` and `nn.Linear`."

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def made_plain(trainer: Trainer) -> Trainer:
    "The (B, C, D) tensor of Eq. 1, `nn.MultiheadAttention`, AdamW as it comes."
    trainer.method.__class__ = LiteralXMIC
    for module in trainer.method.modules():
        if isinstance(module, Block):
            module.__class__ = PlainBlock
            module.mlp.c_fc.__class__ = module.mlp.c_proj.__class__ = nn.Linear
    c = trainer.config
    trainer.optimizer = torch.optim.AdamW(trainer.trained, lr=c.lr, betas=tuple(c.betas), weight_decay=c.weight_decay)
    return trainer


# What is trained

def make_trainer(root: Path, dim: int, classes: int, batch_size: int, steps: int | None, device: torch.device, way: str = "kit", seed: int = 0,
                 streams: Streams | None = None, graph: bool | None = None) -> Trainer:
    "A run upon the store in `root`; random class embeddings and labels."
    segments = read_segments("epic", root, "train")
    views = {v: StoredView(root / f"store{dim}" / v) for v in VIEWS}
    segments = segments[segments.segment_id.isin(views["full"].place)].reset_index(drop=True)
    config = resolve(TrainConfig(dataset="epic", batch_size=batch_size, seed=seed, progress=False))
    args = views[config.classified_view], [views[v] for v in config.context_views], segments.segment_id.tolist(), device
    streams = streams or (PlainLoader(*args) if way == "plain" else Streams(*args, resident=True))
    lengths = np.array([args[0].place[i][2] for i in args[2]])
    rng = np.random.default_rng(0)
    split = Split(segments, {"noun": rng.integers(0, classes, len(segments))}, streams, np.zeros_like(lengths), lengths, len(segments))
    torch.manual_seed(0)
    text = ClassEmbeddings(tuple(map(str, range(classes))), torch.randn(classes, dim)).to(device)
    torch.manual_seed(seed)
    trainer = Trainer(config, build_method(config, dim, dim, 100.0), {"noun": text}, split, device, graph)
    if steps:
        trainer.usable = np.sort(rng.permutation(trainer.usable)[:steps * batch_size])
    return made_plain(trainer) if way == "plain" else trainer


# The measurement

def waited(device: torch.device) -> float:
    "The time, when the device has come to its end."
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(root: Path, way: str, dim: int, classes: int, batch_size: int, steps: int, runs: int, device_name: str | None, threads: int) -> dict:
    "Four epochs of so many steps: the fastest of the last three, and the least processor time."
    torch.set_num_threads(threads)
    device = pick_device(device_name)
    first = make_trainer(root, dim, classes, batch_size, steps, device, way)
    trainers = [first, *(make_trainer(root, dim, classes, batch_size, steps, device, way, s, first.split.streams) for s in range(1, runs))]
    together = Together(trainers) if way == "together" else None
    epochs = []
    for _ in range(4):
        begin, used = waited(device), time.process_time()
        lines = together.run_epoch() if together else [first.run_epoch()]
        epochs.append((waited(device) - begin, time.process_time() - used, sum(line["data_seconds"] for line in lines)))
    seconds, _, data = min(epochs[1:])
    cpu = min(used for _, used, _ in epochs[1:])
    return dict(way=way, width=dim, classes=classes, batch_size=batch_size, runs=runs, steps=steps, step_ms=1000 * seconds / steps,
                without_loading_ms=1000 * (seconds - data) / steps, cpu_ms=1000 * cpu / steps, loss=lines[0]["loss"], memory_mib=peak_memory(device))


def logit_memory(dim: int, classes: int, batch_size: int) -> dict:
    "Peak memory of the logits, their loss and its gradient, by PyTorch's own operations, in MiB."
    text, video, labels = torch.randn(classes, dim), torch.randn(batch_size, dim), torch.randint(classes, (batch_size,))
    plain = lambda a: 100 * (F.normalize(text[None] + a[:, None], dim=-1) * F.normalize(video, dim=-1)[:, None]).sum(-1)
    peaks = {}
    for way, logits in dict(kit=lambda a: cosine_logits(text, a, video, 100.0), plain=plain).items():
        vector = torch.randn(batch_size, dim, requires_grad=True)
        with PeakMemory() as memory:
            F.cross_entropy(logits(vector), labels).backward()
        peaks[way] = memory.peak / 2**20
    return dict(width=dim, classes=classes, batch_size=batch_size, kit_mib=peaks["kit"], plain_mib=peaks["plain"], share=peaks["kit"] / peaks["plain"])


class Moved(TorchDispatchMode):
    "Counts operations, and the bytes that they read and write one after the other."

    def __init__(self):
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if not getattr(op, "is_view", False):
            self.operations += 1
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        return out


def rates(device_name: str | None, threads: int) -> dict:
    "Of one large matrix product, in the precision of training, and of one large copy: the best of five."
    torch.set_num_threads(threads)
    device = pick_device(device_name)
    cuda = device.type == "cuda"
    size = 8192 if cuda else 2048
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    x, y = (torch.ones(2**28 if cuda else 2**25, device=device) for _ in range(2))

    def best(action) -> float:
        times = []
        for _ in range(6):
            begin = waited(device)
            action()
            times.append(waited(device) - begin)
        return min(times[1:])

    return dict(tflops=2 * size**3 / best(lambda: linear(a, a)) / 1e12, gb_per_s=2 * x.nbytes / best(lambda: x.copy_(y)) / 1e9)


def floor(root: Path, dim: int, classes: int, batch_size: int, device_name: str | None, threads: int) -> dict:
    "What a step computes and has to move: rows, weights, gradients and AdamW's two moments; and what its operations move one by one."
    torch.set_num_threads(threads)
    device = pick_device(device_name)
    trainer = make_trainer(root, dim, classes, batch_size, 1, device, graph=False)
    given = {k: x[0] for k, x in trainer.epoch_given(*trainer.begin_epoch()).items()}
    trainer.device_step(given)
    with FlopCounterMode(display=False) as counter:
        trainer.device_step(given)
    with Moved() as moved:
        trainer.device_step(given)
    n, rows = trained_parameters(trainer.method), batch_size * 16 * len(VIEWS) * dim * 2
    return dict(batch_size=batch_size, classes=classes, gflop=counter.get_total_flops() / 1e9, needed_mb=(rows + 4 * n * (3 + 7)) / 1e6,
                moved_mb=moved.bytes / 1e6, operations=moved.operations)


# On a GPU

def whole_runs(root: Path, dim: int, classes: int, batch_size: int, runs: int, epochs: int, graph: bool, device_name: str | None) -> dict:
    "All epochs over all segments, with the reading of the store apart; then a look at which operations took the device's time."
    device = pick_device(device_name)
    begin = waited(device)
    first = make_trainer(root, dim, classes, batch_size, None, device, graph=graph)
    opened = waited(device)
    trainers = [first, *(make_trainer(root, dim, classes, batch_size, None, device, "kit", s, first.split.streams, graph) for s in range(1, runs))]
    for t in trainers:
        t.config = replace(t.config, epochs=epochs)
    together = Together(trainers) if runs > 1 else None
    run_epoch = together.run_epoch if together else lambda: [first.run_epoch()]
    seconds, data = [], 0.0
    for _ in range(epochs):
        start = waited(device)
        lines = run_epoch()
        seconds.append(waited(device) - start)
        data += sum(line["data_seconds"] for line in lines)
    steps = len(first.usable) // batch_size
    recorded = (together.steps if together else first.device_steps).recorded is not None
    return dict(batch_size=batch_size, classes=classes, runs=runs, epochs=epochs, steps_an_epoch=steps, cuda_graph=recorded, open_seconds=opened - begin,
                seconds=sum(seconds), first_epoch_seconds=seconds[0], step_ms=1000 * float(np.median(seconds)) / steps, drawing_ms_an_epoch=1000 * data / epochs,
                loss=lines[0]["loss"], memory_mib=peak_memory(device), device_time=device_time(trainers, together, device))


def device_time(trainers: list[Trainer], together: Together | None, device: torch.device) -> dict:
    "Milliseconds of a step that the device is busy, its kernels, and the ten that take the most."
    steps, whole = 50, together.steps if together else trainers[0].device_steps
    whole.at.zero_()
    begin = waited(device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            whole.recorded.replay() if whole.recorded else whole._one()
        seconds = waited(device) - begin
    events = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)
    return dict(busy_ms=sum(e.self_device_time_total for e in events) / 1000 / steps, wall_ms_profiled=1000 * seconds / steps,
                kernels=sum(e.count for e in events) / steps,
                largest=[dict(name=e.key[:80], ms=e.self_device_time_total / 1000 / steps, calls=e.count / steps) for e in events[:10]])


# All of it

def ratios(results: list[dict]) -> list[dict]:
    "How many times longer the plain way takes."
    at = lambda r: (r["width"], r["classes"], r["batch_size"])
    kit = {at(r): r for r in results if r["way"] == "kit"}
    return [dict(classes=p["classes"], batch_size=p["batch_size"], **{k: p[k] / kit[at(p)][k] for k in ("step_ms", "without_loading_ms", "cpu_ms")})
            for p in results if p["way"] == "plain" and at(p) in kit]


def one_pass(results: list[dict]) -> list[dict]:
    "A step of several runs in one pass, in steps of a single run."
    at = lambda r: (r["width"], r["classes"], r["batch_size"])
    kit = {at(r): r for r in results if r["way"] == "kit"}
    return [dict(width=r["width"], classes=r["classes"], batch_size=r["batch_size"], runs=r["runs"],
                 **{k: r[k] / kit[at(r)][k] for k in ("step_ms", "cpu_ms")}) for r in results if r["way"] == "together" and at(r) in kit]


def on_floor(floors: list[dict], rate: dict, results: list[dict]) -> None:
    "Adds the least time that a step can take, and by what a measured step is longer."
    for f in floors:
        f["floor_ms"] = max(f["gflop"] / rate["tflops"], f["needed_mb"] / rate["gb_per_s"])
        f["moving_ms"] = f["moved_mb"] / rate["gb_per_s"]
        for r in results:
            if r.get("way", "kit") == "kit" and r["runs"] == 1 and (r["batch_size"], r["classes"]) == (f["batch_size"], f["classes"]) and r.get("width", 512) == 512:
                r["times_the_floor"] = r["step_ms"] / f["floor_ms"]


def make_stores(root: Path, widths: dict[int, int | None]) -> str:
    "Generated features of the true lengths, by width the first so many segments; returns which training list was used."
    name = link_annotations(Path(os.environ.get("XMIC_TEST_DATA", ROOT / "../shared/data")).resolve(), root)
    segments = read_segments("epic", root, "train")
    for width, count in widths.items():
        part = segments[:count]
        generate(root / f"store{width}", part, stored_rows(part, FPS), FPS, width)
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--classes", type=int, nargs="+", default=[300, 521], help="nouns of EPIC-KITCHENS-100 and of Ego4D")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed at a batch of 32; at others as many segments (default: 20)")
    parser.add_argument("--runs", type=int, default=5, help="runs in one pass")
    parser.add_argument("--epochs", type=int, default=15, help="of whole runs, on a GPU")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where the store is made")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "bench" / "train.json")
    options = parser.parse_args()
    device, where = pick_device(options.device), (options.device, options.threads)
    root = Path(tempfile.mkdtemp(prefix="train_", dir=options.work))
    report = dict(made_with(device), threads=options.threads)
    try:
        report["annotations"] = make_stores(root, {512: None, 128: 960})
        report["rates"] = rate = alone(rates, *where)
        report["logit_memory"] = [logit_memory(512, c, b) for b in options.batch_sizes for c in options.classes]
        report["steps"] = steps = []
        plan = [(way, 512, c, b, 1) for b in options.batch_sizes for c in options.classes for way in ("kit", "plain")]
        plan += [("together", 512, options.classes[-1], b, options.runs) for b in options.batch_sizes]
        plan += [("kit", 128, 30, 32, 1), ("together", 128, 30, 32, options.runs)]  # the size of the mini world
        for way, width, classes, size, runs in plan:
            steps.append(alone(measure, root, way, width, classes, size, max(3, options.steps * 32 // size), runs, *where))
            print(pd.DataFrame(steps[-1:]).drop(columns="memory_mib").round(2).to_string(index=False), flush=True)
        report["floors"] = floors = [floor(root, 512, c, b, *where) for b in options.batch_sizes for c in options.classes]
        on_floor(floors, rate, steps)
        report |= dict(times_faster=ratios(steps), one_pass=one_pass(steps))
        if device.type == "cuda":
            report["whole_runs"] = whole = []
            for size in options.batch_sizes:
                for runs, graph in ((1, True), (1, False), (options.runs, True)):
                    whole.append(alone(whole_runs, root, 512, options.classes[0], size, runs, options.epochs, graph, options.device))
                    print({k: v for k, v in whole[-1].items() if k != "device_time"}, flush=True)
            on_floor(floors, rate, whole)
        report["hardware"]["load_average_at_the_end"] = os.getloadavg()
        write_json(options.out, report)
        for part in ("logit_memory", "times_faster", "one_pass", "floors"):
            print(f"\n{part}\n{pd.DataFrame(report[part]).round(3).to_string(index=False)}")
        print(f"\n{options.out}")
    except DataError as e:
        sys.exit(f"train: {e}")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
