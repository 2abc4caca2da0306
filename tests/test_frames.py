"""The store of frames: the frames that features are made of, whole shards, resumed to the byte; and clips with one cut each."""
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors import safe_open

from world import NOUNS, contents, extract_config, register_tiny, write_world
from xmic.encoders import create_encoder, embed_classes
from xmic.features import extract_dataset, hand_boxes
from xmic.files import DataError, whole_file
from xmic.frames import (FrameShard, FrameStore, PixelStreams, ShardWriter, crop_clip, frames_folder, random_crops, store_dataset,
                         store_frames)
from xmic.pixels import Preprocess
from xmic.segments import read_csv
from xmic.streams import Streams, sample_rows
from xmic.video import read_frames
from xmic.vita import VitaCLIP

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    register_tiny()
    return write_world(tmp_path_factory.mktemp("world"), videos=4, frames=60)


config = partial(extract_config, feature_fps=12.5)


# The store

@pytest.mark.parametrize("view", ["full", "hand"])
def test_the_frames_are_those_that_features_are_made_of(world, tmp_path, view):
    features, _ = extract_dataset(config(world, tmp_path))
    store, report = store_dataset(config(world, tmp_path), view)
    segments, encoder = read_csv(world), create_encoder(register_tiny(), "random", "cpu")
    boxes = hand_boxes(config(world, tmp_path)) if view == "hand" else None
    assert report.extracted == 8 and store.verify() == [] and store.missing(segments).empty
    assert store.folder == frames_folder(tmp_path, encoder.preprocess, "csv", view)
    for row in segments.itertuples():
        frames = store.frames(row.segment_id)
        assert frames.tolist() == features.frames(row.segment_id, view).tolist()
        crops = [boxes.for_segment(row).get(int(f)) for f in frames] if boxes else None
        wanted = encoder.preprocess.pixels(read_frames(row.video_path, frames), crops)
        assert np.array_equal(store.pixels(row.segment_id), wanted)
        torch.testing.assert_close(encoder.encode_pixels(wanted), features.segment(row.segment_id, view).float(), rtol=2e-3, atol=2e-3)


def test_segments_that_overlap_share_their_frames(world, tmp_path):
    store, report = store_dataset(config(world, tmp_path))
    rows = sum(n for _, _, n in store.place.values())
    assert report.frames == sum(s.count for s in store.shards) == 4 * len({*store.frames("v0_0"), *store.frames("v0_1")}) < rows


def test_a_shard_is_an_ordinary_safetensors_file(world, tmp_path):
    store, _ = store_dataset(config(world, tmp_path))
    for shard in store.shards:
        with safe_open(shard.path, "np") as file:
            pixels, rows, frames = (file.get_tensor(name) for name in ("pixels", "rows", "frames"))
        assert np.array_equal(pixels, np.concatenate(list(shard.blocks(5))))
        assert np.array_equal(rows, shard.tables[0]) and np.array_equal(frames, shard.tables[1])


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6, unique=True), parts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
       side=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_written_shard_is_read_back(tmp_path_factory, ids, parts, side, seed):
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp("shard") / "v.safetensors"
    blocks = [rng.integers(0, 256, (n, side, side, 3), np.uint8) for n in parts]
    pixels = np.concatenate(blocks)
    tables = {i: (np.sort(rng.integers(0, len(pixels), 3)), rng.integers(0, 10**6, 3)) for i in ids[:rng.integers(1, len(ids) + 1)]}
    with open(path, "wb") as file:
        writer = ShardWriter(file, ids, side)
        for block in blocks: writer.append(block)
        writer.finish(tables)
    shard = FrameShard(path)
    assert list(shard.segments) == list(tables) and shard.count == len(pixels)
    assert np.array_equal(np.concatenate(list(shard.blocks(3))), pixels)
    wanted = rng.integers(0, len(pixels), 7)
    assert np.array_equal(shard.read(wanted), pixels[wanted])
    for part in (0, 1):
        assert np.array_equal(shard.tables[part], np.concatenate([pair[part] for pair in tables.values()]))


def test_workers_and_one_process_write_the_same_bytes(world, tmp_path):
    store_dataset(config(world, tmp_path / "a"))
    store_dataset(config(world, tmp_path / "b", workers=2))
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != {}


def test_a_second_call_does_nothing(world, tmp_path):
    store_dataset(config(world, tmp_path))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    _, report = store_dataset(config(world, tmp_path))
    assert (report.extracted, report.present, report.frames) == (0, 8, 0)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}


def test_segments_that_come_later_join_the_same_shard(world, tmp_path):
    whole, _ = store_dataset(config(world, tmp_path / "whole"))
    segments, preprocess = read_csv(world), create_encoder(register_tiny(), "random", "cpu").preprocess
    folder = frames_folder(tmp_path / "parts", preprocess, "csv", "full")
    store_frames(segments[::2], folder, preprocess, feature_fps=12.5, workers=0, progress=False)
    store, report = store_frames(segments, folder, preprocess, feature_fps=12.5, workers=0, progress=False)
    assert (report.extracted, report.present) == (4, 4) and store.verify() == [] and len(store.shards) == 4
    for segment in segments.segment_id:
        assert np.array_equal(store.pixels(segment), whole.pixels(segment)) and np.array_equal(store.frames(segment), whole.frames(segment))


def test_faulty_videos_are_noted_and_the_rest_is_stored(tmp_path):
    register_tiny()
    world, folder = write_world(tmp_path / "world", videos=2), tmp_path / "world" / "videos"
    rows = pd.read_csv(world / "segments.csv")
    (folder / "cut.mp4").write_bytes((folder / "v0.mp4").read_bytes()[:3000])
    (folder / "text.mp4").write_text("this is no video\n" * 100)
    bad = pd.DataFrame([dict(segment_id=f"{v}_0", video_id=v, start_sec=0.1, stop_sec=2.2, verb="take", noun="pan", split="train")
                        for v in ("cut", "text", "missing")])
    past = pd.DataFrame([dict(segment_id="past", video_id="v0", start_sec=50, stop_sec=52, verb="take", noun="pan", split="train")])
    pd.concat([rows, bad, past]).to_csv(world / "segments.csv", index=False)
    store, report = store_dataset(config(world, tmp_path / "features", workers=1))
    assert report.extracted == 4 and set(report.failed) == set(store.failures) == {"cut_0", "text_0", "missing_0", "past"}
    assert [s.path.name for s in store.shards] == ["v0.safetensors", "v1.safetensors"]
    missing = store.missing(read_csv(world)).set_index("segment_id").cause
    assert "no such file" in missing["missing_0"] and "the video shows something from 0.00 to" in missing["past"] and len(missing) == 4
    _, again = store_dataset(config(world, tmp_path / "features"))
    assert (again.extracted, len(again.failed), again.frames) == (0, 4, 0)
    shutil.copy(folder / "v1.mp4", folder / "missing.mp4")
    store, mended = store_dataset(config(world, tmp_path / "features"))
    assert mended.extracted == 1 and "missing_0" not in store.failures and "past" in store.failures


def test_killed_at_any_moment_it_ends_in_the_same_bytes(world, tmp_path):
    script = """
import json, os, random, signal, sys, time, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
from world import register_tiny
from xmic.features import ExtractConfig
from xmic.frames import store_dataset
register_tiny()
settings = json.loads(sys.argv[2])

def start():
    child = os.fork()
    if child == 0:
        store_dataset(ExtractConfig(**settings))
        os._exit(0)
    return child

begin = time.perf_counter()
settings["features_root"] += "/whole"
assert os.waitpid(start(), 0)[1] == 0
length = time.perf_counter() - begin
settings["features_root"] = settings["features_root"].removesuffix("whole") + "killed"
rng, met = random.Random(0), 0
for kill in range(8):
    child = start()
    time.sleep(rng.uniform(0.02, 0.1 if kill < 4 else 0.5) * length)
    os.kill(child, signal.SIGKILL)
    met += os.WIFSIGNALED(os.waitpid(child, 0)[1])
assert os.waitpid(start(), 0)[1] == 0
print(met)
"""
    done = subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent), json.dumps(vars(config(world, tmp_path)))],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and int(done.stdout) >= 2, done.stderr
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed") != {}


def test_what_a_killed_run_left_is_removed_and_what_is_being_written_stays(world, tmp_path):
    store, _ = store_dataset(config(world, tmp_path))
    left = store.folder / ".v9.safetensors.1.part"
    left.write_bytes(b"0")
    with whole_file(store.folder / "v8.safetensors") as part:
        part.write_bytes(b"0")
        os.utime(part, (time.time() - 4000,) * 2)
        store_dataset(config(world, tmp_path))
        assert not left.exists() and part.exists()
        part.write_bytes(store.shards[0].path.read_bytes())


@pytest.mark.parametrize("damage, message", [
    (lambda p: p.write_bytes(p.read_bytes()[:-40]), "not a whole shard of frames"),
    (lambda p: p.write_bytes(b"\xff" * 5000), "not a whole shard of frames"),
    (lambda p: p.write_bytes(b""), "not a whole shard of frames")])
def test_a_damaged_shard_is_an_error_that_names_it(world, tmp_path, damage, message):
    store, _ = store_dataset(config(world, tmp_path))
    damage(store.shards[2].path)
    with pytest.raises(DataError, match=f"v2.safetensors is {message}"):
        FrameStore(store.folder)


def test_changed_pixels_are_found(world, tmp_path):
    store, _ = store_dataset(config(world, tmp_path))
    shard = store.shards[1]
    with open(shard.path, "r+b") as file:
        file.seek(shard.pixels_at + 100)
        byte = file.read(1)
        file.seek(shard.pixels_at + 100)
        file.write(bytes([byte[0] ^ 1]))
    (fault,) = FrameStore(store.folder).verify()
    assert "v1.safetensors" in fault and "checksum" in fault


def test_other_settings_are_refused(world, tmp_path):
    store_dataset(config(world, tmp_path))
    with pytest.raises(DataError, match="feature_fps: 12.5, now 5.0"):
        store_dataset(config(world, tmp_path, feature_fps=5.0))
    squashed, _ = store_dataset(config(world, tmp_path, resize="squash"))
    assert "pixels-squash-32px" in str(squashed.folder)


def test_too_small_a_disk_is_an_error_before_any_work(world, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 299_999))
    with pytest.raises(DataError, match=r"8 seconds at 12.5 frames of 32 x 32 pixels are 0.0 GB, and 0.0 GB are free: choose a lower feature_fps"):
        store_dataset(config(world, tmp_path))
    for changes in (dict(feature_fps=-1.0), dict(workers=-1), dict(backend="gstreamer"), dict(weights="nowhere/clip.pt")):
        with pytest.raises(DataError): store_dataset(config(world, tmp_path, **changes))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 308_000))  # 4 videos, 2 s, 12.5 a second
    with pytest.raises(DataError, match="8 seconds at 24 frames"):
        store_dataset(config(world, tmp_path / "every", feature_fps=None))
    assert store_dataset(config(world, tmp_path))[1].extracted == 8


def test_no_video_at_all_and_no_frames_are_errors(world, tmp_path):
    shutil.copy(world / "segments.csv", tmp_path)
    with pytest.raises(DataError, match="none of the 4 videos"):
        store_dataset(config(tmp_path, tmp_path / "features"))
    with pytest.raises(DataError, match="holds no frames: store them first"):
        FrameStore(tmp_path / "features" / "nothing")
    store, _ = store_dataset(config(world, tmp_path))
    with pytest.raises(DataError, match="holds no frames of segment 'v9_0'"):
        store.pixels("v9_0")


def test_real_videos(shared_data, tmp_path):
    segments = read_csv(shared_data / "real_clips")[:6]
    preprocess = Preprocess(size=112)
    store, report = store_frames(segments, frames_folder(tmp_path, preprocess, "csv", "full"), preprocess, feature_fps=2.0, workers=0, progress=False)
    assert report.extracted == 6 and store.verify() == []
    for row in segments[::3].itertuples():
        assert np.array_equal(store.pixels(row.segment_id), preprocess.pixels(read_frames(row.video_path, store.frames(row.segment_id))))


# Cuts

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), side=st.integers(4, 300), scale=st.floats(0.01, 1.0), flip=st.booleans(), seed=st.integers(0, 999))
def test_cuts_lie_inside_and_keep_their_bounds(n, side, scale, flip, seed):
    crops = random_crops(n, side, scale, flip, np.random.default_rng(seed))
    top, left, height, width, mirrored = crops.T
    assert crops.shape == (n, 5) and (crops >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= side).all() and (left + width <= side).all()
    assert (height * width >= scale * side**2 - 1.5 * (height + width) - 1).all()
    assert (width / height <= 4 / 3 + 2 / height).all() and (height / width <= 4 / 3 + 2 / width).all()
    assert flip or not mirrored.any()


def test_cuts_are_spread_over_size_place_and_side():
    top, left, height, width, mirrored = random_crops(4000, 224, 0.08, True, np.random.default_rng(0)).T
    share = height * width / 224**2
    assert share.min() < 0.1 and share.max() > 0.97 and abs(share.mean() - 0.5) < 0.03 and abs(mirrored.mean() - 0.5) < 0.03
    room = height < 200
    middle = (top + height / 2)[room].mean(), (left + width / 2)[room].mean()
    assert np.allclose(middle, 112, atol=2)
    whole = random_crops(5, 224, 1.0, False, np.random.default_rng(0))
    assert (whole == [0, 0, 224, 224, 0]).all()


def test_all_frames_of_a_clip_are_cut_alike():
    frame = torch.randint(0, 256, (1, 40, 40, 3), dtype=torch.uint8)
    for crop in random_crops(20, 40, 0.1, True, np.random.default_rng(0)):
        cut = crop_clip(frame.expand(5, -1, -1, -1), crop, 32)
        assert cut.shape == (5, 32, 32, 3) and cut.dtype == torch.uint8 and (cut == cut[:1]).all()


def test_a_cut_shows_the_part_that_it_names():
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    clip = torch.stack([4 * y, 4 * x, 0 * x], -1).to(torch.uint8)[None]
    cut = crop_clip(clip, np.array([16, 32, 24, 16, 0]), 48)[0].float() / 4
    assert abs(cut[0, :, 0].mean() - 16) < 1 and abs(cut[-1, :, 0].mean() - 39) < 1
    assert abs(cut[:, 0, 1].mean() - 32) < 1 and abs(cut[:, -1, 1].mean() - 47) < 1
    mirrored = crop_clip(clip, np.array([16, 32, 24, 16, 1]), 48)[0].float() / 4
    assert torch.equal(mirrored, cut.flip(1))
    assert crop_clip(clip, None, 64) is clip and torch.equal(crop_clip(clip, np.array([0, 0, 64, 64, 1]), 64), clip.flip(2))


# Batches

@pytest.fixture
def stored(world, tmp_path) -> tuple[FrameStore, list[str]]:
    return store_dataset(config(world, tmp_path))[0], read_csv(world).segment_id.tolist()


@pytest.mark.parametrize("train", [False, True])
def test_batches_hold_the_frames_that_features_would_be_taken_from(world, stored, tmp_path, train):
    store, names = stored
    view = extract_dataset(config(world, tmp_path))[0].view("full")
    pixels, features = PixelStreams(store, names, workers=2), Streams(view, [], names)
    assert np.array_equal(pixels.lengths, features.lengths) and len(pixels) == 8
    draws = [sample_rows(np.zeros(8, int), s.lengths, 6, train, np.random.default_rng([0, 1])) for s in (pixels, features)]
    assert np.array_equal(*draws)
    order, encoder = np.random.default_rng(2).permutation(8), create_encoder(register_tiny(), "random", "cpu")
    both = zip(pixels.batches(order, draws[0], 3), features.batches(order, draws[0], 3), strict=True)
    for (p, seen), (q, expected) in both:
        assert np.array_equal(p, q) and seen.video.shape == (len(p), 6, 32, 32, 3) and seen.video.dtype == torch.uint8
        torch.testing.assert_close(encoder.encode_pixels(seen.video.flatten(0, 1)).view(len(p), 6, -1), expected.video, rtol=2e-3, atol=2e-3)


def test_cuts_follow_from_the_generator_alone(stored):
    streams = PixelStreams(*stored, scale=0.3, flip=True, workers=3)
    rows = sample_rows(np.zeros(8, int), streams.lengths, 4)
    epoch = lambda seed, size: torch.cat([b.video for _, b in streams.batches(np.arange(8), rows, size, rng=np.random.default_rng(seed))])
    assert torch.equal(epoch(1, 3), epoch(1, 3)) and torch.equal(epoch(1, 3), epoch(1, 8)) and not torch.equal(epoch(1, 3), epoch(2, 3))
    crops = random_crops(8, 32, 0.3, True, np.random.default_rng(1))
    clip = torch.from_numpy(stored[0].pixels(stored[1][5], rows[5]))
    assert torch.equal(epoch(1, 3)[5], crop_clip(clip, crops[5], 32))


def test_the_last_batch_may_be_left_out_and_sizes_may_differ(stored):
    streams = PixelStreams(*stored, size=16)
    rows = sample_rows(np.zeros(8, int), streams.lengths, 4)
    batches = list(streams.batches(np.arange(8), rows, 3, drop_last=True))
    assert [len(p) for p, _ in batches] == [3, 3] and batches[0][1].video.shape == (3, 4, 16, 16, 3)


def test_wrong_settings_are_refused(stored):
    with pytest.raises(DataError, match="scale=0"):
        PixelStreams(*stored, scale=0)
    rows = np.zeros((8, 4), int)
    with pytest.raises(DataError, match="double_shift has no meaning"):
        PixelStreams(*stored).batches(np.arange(8), rows, 4, rows)


def test_a_shard_cut_short_while_open_is_an_error(stored):
    store, names = stored
    path = store.shards[0].path
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="v0.safetensors was cut short"):
        list(PixelStreams(store, names).batches(np.arange(8), np.full((8, 4), 10), 4))
    store.shards[1].tables
    path = store.shards[1].path
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="v1.safetensors was cut short"):
        store.pixels("v1_1")


def test_vita_clip_learns_from_pixels(world, tmp_path):
    store, _ = store_dataset(config(world, tmp_path))
    encoder = create_encoder(register_tiny(), "random", "cpu")
    segments = read_csv(world)
    labels = torch.tensor([NOUNS.index(n) for n in segments.noun])
    classes = embed_classes(encoder, list(NOUNS))
    streams, losses, ends = PixelStreams(store, segments.segment_id.tolist(), scale=0.5, flip=True), [], []
    for _ in range(2):
        torch.manual_seed(0)
        method = VitaCLIP(encoder, 4, text_prompts=4)
        optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
        for epoch in range(20):
            rng, total = np.random.default_rng([0, epoch]), 0.0
            order, rows = rng.permutation(8), sample_rows(np.zeros(8, int), streams.lengths, 4, True, rng)
            for positions, batch in streams.batches(order, rows, 4, rng=rng):
                loss = F.cross_entropy(method(batch, classes), labels[positions])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item()
            losses.append(total)
        ends.append({k: v.clone() for k, v in method.state_dict().items()})
    assert losses[19] < 0.6 * losses[0]
    assert losses[:20] == losses[20:] and all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values()))
