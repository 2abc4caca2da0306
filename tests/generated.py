"""The workflow on the real annotation files, with generated features: every class list, split and shape of the paper's tables, and no result.

    python tests/generated.py FOLDER [--train 320] [--test 100000] [--tables all] [--seeds 1]

writes FOLDER/data/report/index.html. It needs the licensed annotation files (XMIC_TEST_DATA). Of Ego4D only the class lists are public, so the rows of its
annotation files are generated, too."""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from xmic.experiments import MINI_ENCODERS, Plan, Store, plan, profile
from xmic.encoders import create_encoder
from xmic.features import dataset_store, manifest_of, shard_name, write_shard
from xmic.files import write_json
from xmic.frames import ShardWriter, frames_folder
from xmic.segments import read_classes, read_segments

ROOT = Path(__file__).resolve().parents[1]
NOTE = ("THE FEATURES BEHIND THIS PAGE ARE GENERATED AT RANDOM, with a trace of each label. No video was read and no number here is a result. The page shows "
        "that every class list, split and count of the real tables goes through the code.")
ROWS, SIDE_ROWS = 16, 8  # stored for each segment: features, frames of pixels


def link_official_files(shared_data: Path, root: Path) -> Path:
    "EPIC-KITCHENS' and EGTEA's official annotation files in their official places."
    for place, source in {"epic/epic-kitchens-100-annotations": "epic_kitchens_100_annotations", "egtea/action_annotation": "egtea_gaze_plus_annotations"}.items():
        (root / place).mkdir(parents=True)
        for path in (shared_data / source).rglob("*"):
            if path.is_file() and not (root / place / path.name).exists():
                (root / place / path.name).symlink_to(path)
    (root / "epic/epic-kitchens-100-annotations/EPIC_100_train.csv").symlink_to(shared_data / "derived/EPIC_100_train_reconstructed.csv")
    return root


def write_ego4d(shared_data: Path, root: Path, train: int, test: int) -> None:
    "Annotation files like the sample's, over the whole taxonomy."
    folder, rng = root / "ego4d/v2/annotations", np.random.default_rng(0)
    folder.mkdir(parents=True)
    taxonomy = next(shared_data.rglob("fho_lta_taxonomy.json"))
    (folder / taxonomy.name).symlink_to(taxonomy)
    sample = json.loads(next(shared_data.rglob("fho_lta_train.sample.json")).read_text())
    names = json.loads(taxonomy.read_text())
    for split, count in (("train", train), ("val", test)):
        clips = []
        for i in range(count):
            labels = {kind: int(rng.integers(len(names[kind + "s"]))) for kind in ("verb", "noun")}
            clips.append(sample["clips"][0] | dict(clip_uid=f"{split}{i // 40:05d}", action_idx=i % 40) | {k: names[k + "s"][n] for k, n in labels.items()}
                         | {f"{k}_label": n for k, n in labels.items()})
        write_json(folder / f"fho_lta_{split}.json", sample | dict(split=split, clips=clips))


def write_profile(root: Path) -> None:
    "The paper's profile with small encoders, one short epoch, and places beside the data."
    write_json(root / "profile.json", dict(
        encoders={role: dict(encoder=name) for role, name in MINI_ENCODERS.items()}, features_root="features", runs_root="runs",
        reports="report", note=NOTE, threads=1, gpus=0, extract=dict(device="cpu"),
        train=dict(epochs=1, warmup_epochs=0, device="cpu", progress=False), methods=dict(vita_clip=dict(batch_size=32, frames=4))))


def generate(made: Plan, store: Store, train: int, test: int) -> None:
    "The features, or frames, of one store, as extraction would have left them."
    p = store.parameters
    dataset, split = p["dataset"], p["splits"][0]
    segments = read_segments(dataset, p["data_root"], split).head(train if split == "train" else test)
    encoder = create_encoder(p["encoder"], device="cpu")
    rng = np.random.default_rng(len(store.name))
    if store.notebook == "store_frames":
        _write_frames(segments, frames_folder(p["features_root"], encoder.preprocess, dataset, "hand"), encoder.preprocess.size, rng)
    else:
        _write_features(segments, dataset_store(p["features_root"], encoder, "shortest", dataset), encoder, _traces(p, segments), rng)
    done = Path(made.folder(store.name)) / "done"
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()


def _traces(p: dict, segments: pd.DataFrame) -> torch.Tensor:  # (S, D)
    "What is left of the labels in the features."
    encoder = create_encoder(MINI_ENCODERS["clip"] if p["encoder"] == MINI_ENCODERS["dino"] else p["encoder"], device="cpu")
    traces = torch.zeros(len(segments), encoder.dim)
    for kind in ("noun", "verb"):
        classes = read_classes(p["dataset"], p["data_root"], kind)
        traces += F.normalize(encoder.encode_text(classes.names), dim=-1)[torch.from_numpy(classes.labels(segments[kind])).clamp_min(0)]
    return traces


def _write_features(segments: pd.DataFrame, store, encoder, traces: torch.Tensor, rng: np.random.Generator) -> None:
    traces = F.pad(traces, (0, encoder.dim - traces.shape[1])) if traces.shape[1] <= encoder.dim else traces[:, :encoder.dim]
    for view in ("full", "hand"):
        write_json(store.root / view / "manifest.json", manifest_of(encoder, view, None, "decord", None) | dict(decoder="generated", weights="generated"))
        for video, part in segments.reset_index(drop=True).groupby("video_id"):
            noise = torch.from_numpy(rng.normal(size=(len(part), ROWS, encoder.dim)).astype(np.float32)) * 2 / encoder.dim**0.5
            rows = traces[part.index.tolist()][:, None] + noise
            write_shard(store.root / view / shard_name(video), [(i, r, np.arange(ROWS)) for i, r in zip(part.segment_id, rows)])


def _write_frames(segments: pd.DataFrame, folder: Path, side: int, rng: np.random.Generator) -> None:
    write_json(folder / "manifest.json", dict(fingerprint=folder.parents[1].name, view="hand", size=side, interpolation="bicubic", resize="shortest", decoder="generated"))
    for video, part in segments.groupby("video_id"):
        with open(folder / shard_name(video), "wb+") as file:
            writer = ShardWriter(file, part.segment_id, side)
            writer.append(rng.integers(0, 256, (len(part) * SIDE_ROWS, side, side, 3), np.uint8))
            writer.finish({i: (np.arange(SIDE_ROWS) + SIDE_ROWS * n, np.arange(SIDE_ROWS)) for n, i in enumerate(part.segment_id)})


def make(folder: Path, shared_data: Path, train: int, test: int, tables: str = "all", seeds: int = 1, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    "Everything up to the page; a second call goes on."
    root = folder / "data"
    if not (root / "profile.json").exists():
        link_official_files(shared_data, root)
        write_ego4d(shared_data, root, train, min(test, 4000))
        write_profile(root)
    made = plan(profile("paper", data=str(root)), tables, seeds)
    for store in made.stores.values():
        if not (Path(made.folder(store.name)) / "done").exists():
            generate(made, store, train, min(test, 1000) if store.notebook == "store_frames" else test)
    call = ["snakemake", "--nolock", "--cores", "2", *options, "--config", "profile=paper", f"data={root}", f"tables={tables}", f"seeds={seeds}"]
    return subprocess.run([sys.executable, "-m", *call], cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"), capture_output=True, text=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=320)
    parser.add_argument("--test", type=int, default=10**5)
    parser.add_argument("--tables", default="all")
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    done = make(given.folder.resolve(), Path(os.environ.get("XMIC_TEST_DATA", ROOT / "../shared/data")).resolve(), given.train, given.test, given.tables, given.seeds)
    print(done.stderr[-3000:])
    sys.exit(done.returncode)
