"""A store of many videos: time to open, verify, repair and train on it, and the most maps that the process holds. See README.md.

    python benchmarks/many_videos.py [--videos 70000] [--segments 1]
    python benchmarks/many_videos.py --videos 495 --segments 136     # the size of EPIC-KITCHENS-100's training list"""
import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parent))
from growth import table, trainer  # noqa: E402
from xmic import features  # noqa: E402
from xmic.clips import Origin, segment_span  # noqa: E402
from xmic.encoders import hash_weights  # noqa: E402
from xmic.features import FeatureStore, shard_name  # noqa: E402
from xmic.files import write_json  # noqa: E402

DIM, ROWS, VIEWS = 32, 4, ("full", "hand")


def fill(root: Path, segments: pd.DataFrame) -> None:
    "Shards as `write_shard` makes them, without waiting for the disk at each."
    rng = np.random.default_rng(0)
    for view in VIEWS:
        write_json(root / view / "manifest.json", dict(dim=DIM, fingerprint="generated", view=view, feature_fps="every frame"))
        for video, part in segments.groupby("video_id"):
            parts = [(s, torch.from_numpy(rng.standard_normal((ROWS, DIM), np.float32)), np.arange(ROWS)) for s in part.segment_id]
            header = features._as_lists(part.segment_id, {r.segment_id: Origin(segment_span(r), f"file 123456789 {abs(hash(video)):016x}"[:48]) for r in part.itertuples()})
            rows, flat = {s: ROWS for s in part.segment_id}, torch.cat([f for _, f, _ in parts]).half()
            frames = torch.from_numpy(np.concatenate([n for _, _, n in parts]).astype(np.int32))
            header = {"segments": rows, "sha256": features._checksum(flat), **header}
            header["places_sha256"] = features._checksum_of_places(header, frames)
            content = save({"features": flat, "frames": frames}, metadata={"shard": features.json.dumps(header)})
            (root / view / shard_name(video)).write_bytes(content)


def maps() -> int:
    path = Path("/proc/self/maps")
    return len(path.read_text().splitlines()) if path.exists() else 0


def timed(what: str, work: Callable[[], object]) -> None:
    begin, cpu = time.perf_counter(), time.process_time()
    work()
    print(f"{what}: {time.perf_counter() - begin:.2f} s, {time.process_time() - cpu:.2f} s of CPU time, {maps():,} maps", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=70_000)
    parser.add_argument("--segments", type=int, default=1, help="of each video")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="many_videos_"))
    try:
        segments = table(options.videos * options.segments, options.segments)
        fill(root, segments)
        opening = lambda: [FeatureStore(root).view(view) for view in VIEWS]
        timed("opening both views without an index", FeatureStore(root).refresh)
        timed("opening both views", opening)
        timed("opening one view", lambda: FeatureStore(root).view("full"))
        timed("comparing both with the annotations", lambda: FeatureStore(root).changed(segments, videos=False))
        timed("verify", lambda: print(FeatureStore(root).verify()))
        timed("repair", lambda: print(len(FeatureStore(root).repair())))
        made: list = []
        timed("reading the features", lambda: made.append(trainer(root, segments)))
        timed("the first epoch", made[0].run_epoch)
        timed("hashing weights", lambda: hash_weights(made[0].method))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
