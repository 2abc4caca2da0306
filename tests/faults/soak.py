"""A long extraction in a loop of kills, and not a byte of difference in the end."""
import csv
import json
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import psutil

from videos import numbered_frame, write_video
from world import extract_config, jobs

from .places import store_bytes, stores

FRAMES, SIZE = 12, (64, 48)


def write_soak_world(root: Path, videos: int) -> Path:
    "Tiny videos of which no two are alike, with two overlapping segments each."
    (root / "videos").mkdir(parents=True, exist_ok=True)
    rows, boxes = [], []
    for v in range(videos):
        write_video(root / "videos" / f"v{v:05d}.mp4", FRAMES, size=SIZE, images=[numbered_frame(v + 7 * i, SIZE) for i in range(FRAMES)])
        for s, (start, stop) in enumerate(((0.0, 0.3), (0.2, 0.48))):
            rows.append(dict(segment_id=f"v{v:05d}_{s}", video_id=f"v{v:05d}", start_sec=start, stop_sec=stop, verb="take", noun="pan", split="train"))
            boxes.append(dict(segment_id=f"v{v:05d}_{s}", frame=5, left=10, top=8, right=50, bottom=40))
    for name, lines in (("segments.csv", rows), ("hand_boxes.csv", boxes)):
        with open(root / name, "w", newline="") as f:
            writer = csv.DictWriter(f, lines[0])
            writer.writeheader()
            writer.writerows(lines)
    return root


def soak(folder: Path, videos: int, rng: random.Random, seconds_between: float = 0.25) -> dict:  # seconds of processor time, which other work does not stretch
    "Extracts the videos undisturbed, and once more with kills; counts kills, and shards that were wrong, lost or different."
    world = write_soak_world(folder / "world", videos)
    settings = {name: [asdict(extract_config(world, folder / name, workers=workers, splits=["train"])) for workers in (0, 1)] for name in ("whole", "killed")}
    count = dict(videos=videos, segments=2 * videos, shards=2 * videos, kills=0, kills_of_workers=0, wrong=0, lost=0)
    with jobs() as job:
        job.run("extract", settings["whole"][0], 0.0)  # the process that starts the others has imported everything then
        begin = time.perf_counter()
        assert job.run("extract", settings["whole"][0])[0] == 0
        count["undisturbed_seconds"] = round(time.perf_counter() - begin, 1)
        whole, held, begin = _stamps(folder / "whole"), {}, time.perf_counter()
        while True:
            workers = int(rng.random() < 0.3)
            after = rng.uniform(0, 2 * seconds_between) + workers * rng.uniform(0, 3)  # a worker takes its time to start
            code = _killed(job, settings["killed"][workers], after, workers and rng.random() < 0.5, count)
            there = _stamps(folder / "killed")
            count["lost"] += sum(name not in there for name in held)
            count["wrong"] += sum((folder / "killed" / name).read_bytes() != (folder / "whole" / name).read_bytes()
                                  for name in there if held.get(name) != there[name])
            held = there
            if code == 0 and set(there) == set(whole) and not any(store.failures(view) for store in stores(folder / "killed") for view in store.views):
                break
            assert code in (0, -signal.SIGKILL), f"exit code {code}"
    count["seconds_with_kills"] = round(time.perf_counter() - begin, 1)
    one, other = (store_bytes(folder / name) for name in ("whole", "killed"))
    count["files"], count["files_that_differ"] = len(one), sum(one.get(name) != other.get(name) for name in set(one) | set(other))
    count["faults_found_by_verify"] = sum(len(store.verify()) for store in stores(folder / "killed"))
    return count


def _stamps(features: Path) -> dict[str, tuple]:
    return {str(p.relative_to(features)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in features.glob("*/*/*/[!.]*.safetensors")}


def _killed(job, settings: dict, after: float, worker_instead: bool, count: dict) -> int:  # exit code
    "Runs an extraction and kills it; or its decoding worker, once or more, and lets it go on to its end or to a kill some time later."
    print(json.dumps(["extract", settings]), file=job.zygote.stdin, flush=True)
    child = int(job.zygote.stdout.readline())
    _spend(child, after)
    if worker_instead:
        for process in _decoders(child):
            with suppress(psutil.NoSuchProcess):
                process.kill()
                count["kills_of_workers"] += 1
        _spend(child, after)
    with suppress(ProcessLookupError): os.kill(child, signal.SIGKILL)
    while not (line := job.zygote.stdout.readline()).startswith("exit"): assert line == "end\n", line
    code = int(line.split()[1])
    count["kills"] += code == -signal.SIGKILL
    return code


def _spend(child: int, seconds: float) -> None:
    "Waits until a process and its children have spent so much more processor time, or are over."
    def spent() -> float:
        process = psutil.Process(child)
        if process.status() == psutil.STATUS_ZOMBIE: raise psutil.NoSuchProcess(child)
        return sum(sum(p.cpu_times()[:2]) for p in [process, *process.children()])

    with suppress(psutil.NoSuchProcess):
        begin, until = spent(), time.monotonic() + 30
        while spent() < begin + seconds and time.monotonic() < until: time.sleep(0.01)


def _decoders(parent: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [p for p in psutil.Process(parent).children() if "spawn_main" in " ".join(p.cmdline())]
    return []
