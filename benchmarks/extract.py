"""Extraction end to end against the bare encoder on ready tensors.

    python benchmarks/extract.py                                          # ViT-B/16, 24 clips of 456x256: some minutes of two cores
    python benchmarks/extract.py --encoder mini-clip --clips 200          # a small encoder: what decoding costs
    python benchmarks/extract.py --device cuda --clips 400 --workers 15 --batch-size 256   # bf16

Short clips are made, with a box for most frames of the hand view. In turns, the bare encoder (the model's own `encode_image` on
normalised tensors that lie ready), the kit's `encode_pixels` on ready bytes, and `extract` into a fresh store are timed. The encoder has
random weights. On the CPU there are also processor times of all processes, which other jobs on the machine disturb less than wall times."""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(Path(__file__).parent))

from epic_scale import made_with  # noqa: E402
from videos import write_video  # noqa: E402
from xmic.clips import ClipTask, Frames, Pixels, clip_pixels  # noqa: E402
from xmic.encoders import PRECISIONS, Encoder, create_encoder  # noqa: E402
from xmic.features import FeatureStore, extract  # noqa: E402
from xmic.files import read_json, write_json  # noqa: E402
from xmic.hands import HandBoxes  # noqa: E402
from xmic.segments import read_csv  # noqa: E402


def rounded(x: float) -> float:
    return float(f"{x:.4g}")


def pictures(frames: int, size: tuple[int, int], seed: int):
    "Moving shapes with some grain, so that a decoder has something to do."
    width, height = size
    rng = np.random.default_rng(seed)
    scene = np.kron(rng.integers(0, 256, (-(-height // 16) + 4, -(-width // 16) + 8, 3)), np.ones((16, 16, 1), int))
    grain = rng.integers(-12, 13, (height, width, 3))
    for i in range(frames):
        yield np.clip(scene[i:i + height, 2 * i:2 * i + width] + np.roll(grain, 7 * i, 1), 0, 255).astype(np.uint8)


def make_world(root: Path, clips: int, frames: int, size: tuple[int, int]) -> Path:
    "A dataset of short clips with a segment each, and boxes for three frames of four."
    segments, boxes, (width, height) = [], [], size
    (root / "videos").mkdir(parents=True)
    for c in range(clips):
        if c < 8: write_video(root / "videos" / f"c{c}.mp4", frames, 30, size, gop=30, images=list(pictures(frames, size, c)))
        else: shutil.copy(root / "videos" / f"c{c % 8}.mp4", root / "videos" / f"c{c}.mp4")
        segments.append(dict(segment_id=f"c{c}", video_id=f"c{c}", start_sec=0, stop_sec=frames / 30, verb="take", noun="pan", narration="", split="train"))
        boxes += [dict(segment_id=f"c{c}", frame=f, left=width // 5 + f, top=height // 4, right=4 * width // 5, bottom=height) for f in range(frames) if f % 4]
    pd.DataFrame(segments).to_csv(root / "segments.csv", index=False)
    pd.DataFrame(boxes).to_csv(root / "hand_boxes.csv", index=False)
    return root


def processor_seconds() -> float:
    "Of this process and all workers that have ended."
    return sum(r.ru_utime + r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def timed(function, device: torch.device) -> tuple[float, float]:
    "Wall and processor seconds."
    wall, cpu = time.perf_counter(), processor_seconds()
    function()
    if device.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - wall, processor_seconds() - cpu


def bare(encoder: Encoder, ready: torch.Tensor) -> None:
    dtype = PRECISIONS[encoder.precision]
    with torch.inference_mode(), torch.autocast(encoder.device.type, dtype, enabled=dtype is not None):
        encoder.model.encode_image(ready) if hasattr(encoder.model, "encode_image") else encoder.model(ready)


def one_extraction(args: argparse.Namespace, world: Path, encoder: Encoder, clips: int | None = None):
    segments = read_csv(world)[:clips]
    with tempfile.TemporaryDirectory(dir=world.parent) as folder:
        return extract(segments, encoder, FeatureStore(Path(folder) / "csv"), ("full", "hand"), HandBoxes.from_boxes(world / "hand_boxes.csv"),
                       workers=args.workers, batch_size=args.batch_size, progress=False, resize_on=args.resize_on)


def decoding(world: Path, encoder: Encoder, clips: int, resize_on: str) -> dict:
    "What one core decodes, and cuts and resizes where that is the workers' part: crops a second of its own time."
    boxes, begin, crops = HandBoxes.from_boxes(world / "hand_boxes.csv"), time.process_time(), 0
    for row in read_csv(world)[:clips].itertuples(index=False):
        for part in clip_pixels(ClipTask(row.video_id, (row,), ("full", "hand"), (encoder.preprocess,), boxes=boxes, whole_frames=resize_on == "device")):
            if isinstance(part, Pixels): crops += len(part.squares[0])
            elif isinstance(part, Frames): crops += sum(map(len, part.crops.values()))
    return dict(crops=crops, crops_per_core_second=rounded(crops / (time.process_time() - begin)))


def peak_of_this_program() -> float:
    "MiB. Unlike `ru_maxrss`, without what the process was before it became this program."
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def peak_mib(args: argparse.Namespace, world: Path, clips: int) -> float:
    "Peak memory of a process that extracts so many videos with the small encoder."
    command = [sys.executable, __file__, "--only-memory", str(clips), "--world", str(world), "--encoder", "mini-clip", "--device", "cpu",
               "--workers", str(args.workers), "--resize-on", args.resize_on]
    return rounded(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="ViT-B-16-quickgelu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--frames", type=int, default=16, help="of each clip")
    parser.add_argument("--size", type=int, nargs=2, default=(456, 256), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--threads", type=int, help="of the encoder; default: torch's own choice")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--resize-on", default="auto", choices=["auto", "workers", "device"], help="where frames are cut and resized")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-clips", type=int, default=100, help="N: peak memory is measured for N and 4 N videos; 0: not at all")
    parser.add_argument("--world", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only-memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "bench" / "extract.json")
    parser.add_argument("--name", help="of the entry in the JSON; default: encoder and device")
    args = parser.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", ".*RANDOM weights")
    device = torch.device(args.device)
    encoder = create_encoder(args.encoder, None if args.encoder.startswith("mini-") else "random", device)
    if args.only_memory:
        one_extraction(args, args.world, encoder, args.only_memory)
        return print(peak_of_this_program())

    side, cuda = encoder.preprocess.size, device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder) / "world", max(args.clips, 4 * args.memory_clips), args.frames, tuple(args.size))
        pixels = np.random.default_rng(0).integers(0, 256, (args.batch_size, side, side, 3), np.uint8)
        ready = encoder.normalise(pixels).contiguous()
        sizes = [args.batch_size] if cuda else sorted({args.batch_size, min(8, args.batch_size)})
        ours = lambda: encoder.encode_batch(pixels, args.batch_size) if cuda else encoder.encode_pixels(pixels)
        for _ in range(3 if cuda else 1): bare(encoder, ready[:sizes[0]]), ours()

        times: dict[str, list[tuple[float, float]]] = {}
        reports, repeats = [], 20 if cuda else 1
        for _ in range(args.rounds):
            for size in sizes:
                passes = args.batch_size // size * repeats
                t = timed(lambda: [bare(encoder, ready[:size]) for _ in range(passes)], device)
                times.setdefault(f"bare, batches of {size}", []).append(tuple(x / (passes * size) for x in t))
            t = timed(lambda: [ours() for _ in range(repeats)], device)
            times.setdefault("encode_pixels", []).append(tuple(x / (repeats * len(pixels)) for x in t))
            t = timed(lambda: reports.append(one_extraction(args, world, encoder, args.clips)), device)
            times.setdefault("extract", []).append(tuple(x / reports[-1].frames for x in t))
        decoded = {where: decoding(world, encoder, min(args.clips, 24), where) for where in ("workers", "device")}
        memory = {str(n): peak_mib(args, world, n) for n in (args.memory_clips, 4 * args.memory_clips) if n}

    per_second = {name: {"wall": rounded(1 / statistics.median(w for w, _ in t)), "processor": rounded(1 / statistics.median(c for _, c in t))}
                  for name, t in times.items()}
    bare_rates = [name for name in per_second if name.startswith("bare")]
    fractions = {kind: {name: rounded(per_second[name][kind] / max(per_second[b][kind] for b in bare_rates)) for name in ("encode_pixels", "extract")}
                 for kind in ("wall", "processor")}
    rate = max(per_second[b]["wall"] for b in bare_rates)
    result = dict(
        settings={k: getattr(args, k) for k in ("encoder", "device", "clips", "frames", "workers", "batch_size", "resize_on", "rounds")} | dict(
            size=list(args.size), precision=encoder.precision, threads=torch.get_num_threads()),
        crops=reports[-1].frames, crops_per_second=per_second,
        all_seconds_per_crop={name: [[rounded(x) for x in pair] for pair in t] for name, t in times.items()},
        fraction_of_bare=fractions,
        waiting_for_decode=rounded(sum(r.waiting for r in reports) / sum(r.seconds for r in reports)),
        decoding={f"resize on {where}": found | dict(cores_to_keep_up_with_bare=rounded(rate / found["crops_per_core_second"]))
                  for where, found in decoded.items()},
        peak_mib_by_videos=memory, **made_with(device))
    results = read_json(args.out) if args.out.exists() else {}
    name = args.name or f"{args.encoder}, {args.size[0]}x{args.size[1]}, {args.device}"
    write_json(args.out, results | {name: result})
    print(name, per_second, fractions, result["waiting_for_decode"], result["decoding"], memory, sep="\n")


if __name__ == "__main__":
    main()
