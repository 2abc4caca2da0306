"""A small dataset of made videos in the layout of people's own videos, and a tiny CLIP to encode it."""
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator

import numpy as np
import open_clip

sys.path.insert(0, str(Path(__file__).parent))
from videos import write_video  # noqa: E402

if TYPE_CHECKING:
    from xmic.features import ExtractConfig

TINY = "xmicworld-quickgelu"
CONFIG = {"embed_dim": 32, "quick_gelu": True,
          "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
          "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}
NOUNS, VERBS = ("pan", "knife", "tap"), ("take", "put")


def register_tiny() -> str:
    "Makes the tiny CLIP known to open_clip; gives its name."
    if TINY not in open_clip.list_models():
        folder = Path(tempfile.mkdtemp())
        (folder / f"{TINY}.json").write_text(json.dumps(CONFIG))
        open_clip.add_model_config(folder)
    return TINY


def write_world(
    root: Path,
    videos: int = 8,
    frames: int = 60,  # of each video, at 25 a second
) -> Path:
    "segments.csv, hand_boxes.csv and videos/; two overlapping segments a video, whose noun shows in the colour."
    (root / "videos").mkdir(parents=True, exist_ok=True)
    rng, segments, boxes = np.random.default_rng(0), [], []
    for v in range(videos):
        noun, verb = v % len(NOUNS), v // 2 % len(VERBS)
        image = np.full((96, 128, 3), 60, np.uint8)
        image[20:80, 30:100] = np.eye(3, dtype=np.uint8)[noun] * 200
        images = [np.roll(image, (3 if verb else -3) * i, axis=1) for i in range(frames)]
        images = [np.clip(i + rng.integers(-15, 15, i.shape), 0, 255).astype(np.uint8) for i in images]
        write_video(root / "videos" / f"v{v}.mp4", frames, size=(128, 96), images=images)
        for s, (start, stop) in enumerate(((0.2, 1.4), (1.0, 2.2))):
            segments.append(dict(segment_id=f"v{v}_{s}", video_id=f"v{v}", start_sec=start, stop_sec=stop,
                                 verb=VERBS[verb], noun=NOUNS[noun], narration="", split="test" if v >= videos - 3 else "train"))
            boxes += [dict(segment_id=f"v{v}_{s}", frame=f, left=30, top=20, right=100, bottom=80) for f in range(5, 40)]
    for name, rows in (("segments.csv", segments), ("hand_boxes.csv", boxes)):
        with open(root / name, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return root


class Jobs:
    "Runs extractions and trainings in processes that can be killed."

    def __init__(self, zygote: subprocess.Popen):
        self.zygote = zygote

    def run(self,
            what: str,  # "extract" or "train"
            settings: dict,
            kill_after: float | None = None,  # seconds
           ) -> tuple[int, float]:  # exit code, seconds
        "Runs one job to its end, or kills it."
        print(json.dumps([what, settings]), file=self.zygote.stdin, flush=True)
        child, begin = int(self.zygote.stdout.readline()), time.perf_counter()
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        while not (line := self.zygote.stdout.readline()).startswith("exit"):
            assert line == "end\n", line
        return int(line.split()[1]), time.perf_counter() - begin


@contextmanager
def jobs() -> Iterator[Jobs]:
    "A process that has imported everything and starts jobs by forking."
    here = Path(__file__).parent
    with subprocess.Popen([sys.executable, str(here / "zygote.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parent)}) as zygote:
        try:
            yield Jobs(zygote)
        finally:
            zygote.stdin.close()


def kill_and_resume(
    what: str,  # "extract" or "train"
    whole: dict,  # settings of the run that is left alone
    killed: dict,  # of the one that is killed
    kills: int = 10,
    after_each: Callable[[], None] = lambda: None,
) -> int:
    "Runs one job whole, another with `kill -9` at random moments until it ends; gives how many kills met a living process."
    with jobs() as start:
        code, length = start.run(what, whole)
        assert code == 0
        rng, met = random.Random(1), 0
        for kill in range(kills):  # early ones first: what is resumed comes to its end sooner each time
            part = rng.uniform(0.02, 0.15) if kill < 0.7 * kills else rng.uniform(0.2, 0.6)
            code, _ = start.run(what, killed, kill_after=part * length)
            met += code == -signal.SIGKILL
            after_each()
        assert start.run(what, killed)[0] == 0
        return met


def extract_config(
    world: Path,
    features: Path,
    **changes,
) -> "ExtractConfig":
    "How a world is extracted in this process."
    from xmic.features import ExtractConfig
    return ExtractConfig(**dict(dataset="csv", data_root=str(world), encoder=register_tiny(), weights="random", features_root=str(features),
                                device="cpu", workers=0, progress=False) | changes)


def contents(
    root: Path,
) -> dict[str, bytes]:
    "Every file below a folder but those being written."
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file() and not p.name.startswith(".")}
