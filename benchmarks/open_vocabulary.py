"""What a long list of names costs: prediction of one clip with 300 and with 20,000 names, text features kept. See README.md."""

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from epic_scale import made_with  # noqa: E402
from videos import numbered_frame, write_video  # noqa: E402
from xmic.encoders import create_encoder  # noqa: E402
from xmic.files import write_json  # noqa: E402
from xmic.recognizer import Recognizer  # noqa: E402
from xmic.config import TrainConfig, build_method, resolve  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def names(count: int) -> list[str]:
    words = [("red", "blue", "large", "small", "old", "new", "wet", "dry"), ("tin", "wood", "glass", "steel", "clay")]
    return [f"{words[0][i % 8]} {words[1][i // 8 % 5]} thing {i // 40}" for i in range(count)]


def recognizer(encoder: str, weights: str | None) -> Recognizer:
    "X-MIC for nouns with random adapters: what it costs does not hang on what it has learned."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clip = create_encoder(encoder, weights, "cpu")
    torch.manual_seed(0)
    config = resolve(TrainConfig(encoder=encoder, weights=weights, labels="noun"))
    return Recognizer(clip, {"noun": build_method(config, clip.dim, clip.dim, clip.logit_scale)}, {"noun": config})


def measure(encoder: str, weights: str | None, clip: Path, sizes: tuple[int, ...], rounds: int) -> dict:
    "Seconds of `predict`, the sizes in turns; and of the first one of a recognizer that finds its text features on disk."
    first = recognizer(encoder, weights)
    if weights == "random":  # hours of one core; what was kept is what is read, wherever it came from
        first.encoder.encode_text = lambda texts: torch.randn(len(texts), first.encoder.dim)
    lists, found = {size: names(size) for size in sizes}, {"again": {s: [] for s in sizes}, "from disk": {s: [] for s in sizes}}
    made = {}
    for size, given in lists.items():
        begin = time.perf_counter()
        first.predict(clip, given)
        made[size] = time.perf_counter() - begin
    for _ in range(rounds):
        for size, given in lists.items():
            fresh = Recognizer(first.encoder, first.methods, first.configs)
            for kind, one in (("from disk", fresh), ("again", first)):
                begin, cpu = time.perf_counter(), time.process_time()
                one.predict(clip, given)
                found[kind][size].append((time.perf_counter() - begin, time.process_time() - cpu))
    report = dict(encoder=encoder, weights=weights or "its own", width=first.encoder.dim,
                  text="random numbers, kept as text features are" if weights == "random" else "text features", seconds_with_text_made={str(s): round(v, 3) for s, v in made.items()})
    for kind, by_size in found.items():
        wall, cpu = ({str(s): round(statistics.median(v[place] for v in values), 4) for s, values in by_size.items()} for place in (0, 1))
        least = {s: min(v[1] for v in values) for s, values in by_size.items()}
        report[kind] = dict(median_seconds=wall, median_cpu_seconds=cpu, ratio=round(wall[str(sizes[-1])] / wall[str(sizes[0])], 3),
                            cpu_ratio=round(cpu[str(sizes[-1])] / cpu[str(sizes[0])], 3), least_cpu_ratio=round(least[sizes[-1]] / least[sizes[0]], 3))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoders", nargs="+", default=["mini-clip", "ViT-B-32-quickgelu"], help="the last with random weights, the kit's own with theirs")
    parser.add_argument("--sizes", nargs=2, type=int, default=(300, 20_000))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--video", type=Path, help="a clip of ten seconds; default: one is made, 456x256 at 30 frames a second")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "bench" / "open_vocabulary.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XMIC_CACHE"] = folder
        clip = options.video or write_video(Path(folder) / "clip.mp4", 300, 30, images=[np.ascontiguousarray(numbered_frame(i, (456, 256))) for i in range(300)],
                                            size=(456, 256), gop=60)
        results = [measure(e, None if e.startswith("mini") else "random", clip, tuple(options.sizes), options.rounds) for e in options.encoders]
        kept = {p.name.split("-shortest")[0]: p.stat().st_size for p in Path(folder, "text").iterdir() if p.stat().st_size > 1_000_000}
    write_json(options.out, dict(
        **made_with(), threads=options.threads,
        clip=str(options.video.name) if options.video else "made, 456x256, 10 s at 30 frames a second", sizes=list(options.sizes), rounds=options.rounds,
        kept_bytes=kept, results=results))
    for r in results:
        for kind in ("again", "from disk"):
            print(f"{r['encoder']:<22} {kind:<10} seconds {r[kind]['median_seconds']}  ratio {r[kind]['ratio']}  processor {r[kind]['cpu_ratio']}")
    print(options.out)


if __name__ == "__main__":
    main()
