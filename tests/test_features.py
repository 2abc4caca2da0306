"""The feature store and extraction: shards whole, resumable to the byte, faults written down, settings never mixed."""
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from world import contents, extract_config as config, kill_and_resume, register_tiny, write_world
from xmic.encoders import create_encoder
from xmic.features import (ExtractConfig, FailureLog, FeatureStore, StoredView, check_extraction, extract, extract_dataset, hand_boxes, manifest_of,
                           read_shard, resize_policy, shard_name, write_shard)
from xmic.files import DataError, write_json
from xmic.segments import read_csv
from xmic.video import read_frames

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    register_tiny()
    return write_world(tmp_path_factory.mktemp("world"), videos=4, frames=60)


def test_both_views_hold_what_the_encoder_gives(world, tmp_path):
    store, report = extract_dataset(config(world, tmp_path))
    segments = read_csv(world)
    assert (report.extracted, report.present, len(report.failed)) == (8, 0, 0)
    assert store.verify() == [] and store.missing(segments).empty and store.views == ["full", "hand"]
    encoder = create_encoder(register_tiny(), "random", "cpu")
    boxes, squares, without = hand_boxes(config(world, tmp_path)), set(), 0
    for row in segments.itertuples():
        frames = store.frames(row.segment_id, "full").numpy()
        assert frames.tolist() == list(range(round(row.start_sec * 25), round(row.stop_sec * 25)))
        images = read_frames(row.video_path, frames)
        torch.testing.assert_close(store.segment(row.segment_id, "full").float(), encoder.encode_frames(images), rtol=2e-3, atol=2e-3)
        own = boxes.for_segment(row)
        crops = [own.get(int(f)) for f in frames]
        squares |= {(row.video_path, f, None) for f in frames} | {(row.video_path, *pair) for pair in zip(frames, crops)}
        without += crops.count(None)
        torch.testing.assert_close(store.segment(row.segment_id, "hand").float(), encoder.encode_frames(images, boxes=crops), rtol=2e-3, atol=2e-3)
    assert without and (report.frames, report.whole_frames) == (len(squares), without)  # a whole frame is encoded once


def test_workers_and_one_process_write_the_same_bytes(world, tmp_path):
    extract_dataset(config(world, tmp_path / "a"))
    extract_dataset(config(world, tmp_path / "b", workers=2))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_second_call_does_nothing(world, tmp_path):
    extract_dataset(config(world, tmp_path))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    _, report = extract_dataset(config(world, tmp_path))
    assert (report.extracted, report.present, report.frames) == (0, 8, 0)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}


def test_segments_that_come_later_join_the_same_shard(world, tmp_path):
    segments, encoder = read_csv(world), create_encoder(register_tiny(), "random", "cpu")
    store = FeatureStore(tmp_path)
    extract(segments[::2], encoder, store, workers=0, progress=False)
    first = store.segment("v0_0", "full").clone()
    report = extract(segments, encoder, store, workers=0, progress=False)
    assert (report.extracted, report.present) == (4, 4)
    assert store.missing(segments).empty and torch.equal(store.segment("v0_0", "full"), first) and store.verify() == []


def test_a_lower_rate_keeps_a_grid(world, tmp_path):
    store, report = extract_dataset(config(world, tmp_path, feature_fps=5.0))
    assert store.frames("v0_0", "full").tolist() == [5, 10, 15, 20, 25, 30]
    assert report.frames < 8 * 2 * 8


def test_one_decode_feeds_several_encoders(world, tmp_path):
    segments = read_csv(world)
    encoders = [create_encoder(register_tiny(), "random", "cpu", resize=r) for r in ("shortest", "squash")]
    stores = [FeatureStore(tmp_path / e.fingerprint / "csv") for e in encoders]
    extract(segments, encoders, stores, ("full",), workers=0, progress=False)
    assert not torch.equal(stores[0].segment("v0_0", "full"), stores[1].segment("v0_0", "full"))
    alone = FeatureStore(tmp_path / "alone")
    extract(segments, encoders[1], alone, "full", workers=0, progress=False)
    assert torch.equal(alone.segment("v0_0", "full"), stores[1].segment("v0_0", "full"))


def test_faulty_videos_are_noted_and_the_rest_is_extracted(tmp_path):
    register_tiny()
    world, folder = write_world(tmp_path / "world", videos=2), tmp_path / "world" / "videos"
    rows = pd.read_csv(world / "segments.csv")
    whole = (folder / "v0.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[:len(whole) // 3])
    (folder / "zeros.mp4").write_bytes(bytes(20_000))
    (folder / "text.mp4").write_text("this is no video\n" * 100)
    bad = pd.DataFrame([dict(segment_id=f"{v}_0", video_id=v, start_sec=0.1, stop_sec=2.2, verb="take", noun="pan", split="train")
                        for v in ("cut", "zeros", "text", "missing")])
    past = pd.DataFrame([dict(segment_id="past", video_id="v0", start_sec=50, stop_sec=52, verb="take", noun="pan", split="train")])
    pd.concat([rows, bad, past]).to_csv(world / "segments.csv", index=False)
    store, report = extract_dataset(config(world, tmp_path / "features", workers=1))
    assert report.extracted == 4 and set(report.failed) == {"cut_0", "zeros_0", "text_0", "missing_0", "past"}
    for view in ("full", "hand"):
        lines = [json.loads(line) for line in (store.root / view / "failures.jsonl").read_text().splitlines()]
        assert [r["segment_id"] for r in lines] == ["cut_0", "missing_0", "past", "text_0", "zeros_0"] and all(r["cause"] for r in lines)
    missing = store.missing(read_csv(world))
    assert len(missing) == 10 and "no such file" in missing.set_index("segment_id").cause["missing_0"].iloc[0]
    assert "the video shows something from 0.00 to" in missing.set_index("segment_id").cause["past"].iloc[0]
    _, again = extract_dataset(config(world, tmp_path / "features"))
    assert (again.extracted, len(again.failed), again.frames) == (0, 5, 0)
    shutil.copy(folder / "v1.mp4", folder / "missing.mp4")
    _, mended = extract_dataset(config(world, tmp_path / "features"))
    assert mended.extracted == 1 and "missing_0" not in store.failures("full")


@pytest.mark.parametrize("changes", [
    dict(views=["hnd"]), dict(views=[]), dict(feature_fps=-1.0), dict(feature_fps=0.0), dict(workers=-1), dict(backend="gstreamer"), dict(resize_on="nowhere"),
    dict(boxes="nowhere.csv"), dict(weights="nowhere/clip.pt"), dict(splits=["trian"]), dict(data_root="nowhere"), dict(rank=3), dict(clip_frames=3)])
def test_an_extraction_that_did_not_start_leaves_nothing(world, tmp_path, changes):
    with pytest.raises(DataError): extract_dataset(config(world, tmp_path / "features", **changes))
    assert not list(tmp_path.iterdir())


def test_a_view_that_cannot_be_begun_leaves_no_other(world, tmp_path):
    extract_dataset(config(world, tmp_path, views=["full"], feature_fps=5.0))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="other settings"): extract_dataset(config(world, tmp_path, views=["hand", "full"]))
    assert sorted(tmp_path.rglob("*")) == before


def test_other_settings_are_refused(world, tmp_path):
    extract_dataset(config(world, tmp_path, feature_fps=5.0))
    with pytest.raises(DataError, match="feature_fps: 5.0, now every frame"):
        extract_dataset(config(world, tmp_path))


def test_no_video_at_all_is_an_error_before_any_work(world, tmp_path):
    shutil.copy(world / "segments.csv", tmp_path)
    with pytest.raises(DataError, match="none of the 4 videos"):
        extract_dataset(config(tmp_path, tmp_path / "features"))
    assert not list((tmp_path / "features").rglob("*.safetensors"))


@pytest.mark.parametrize("damage, message", [
    (lambda p: p.write_bytes(p.read_bytes()[:-40]), "not a whole feature shard"),
    (lambda p: p.write_bytes(p.read_bytes()[:-7] + b"\x01\x02\x03\x04\x05\x06\x07"), "checksum"),
    (lambda p: p.write_bytes(b""), "not a whole feature shard"),
])
def test_verify_finds_damage(tmp_path, damage, message):
    store = FeatureStore(tmp_path)
    write_json(tmp_path / "full" / "manifest.json", {"dim": 8})
    write_shard(tmp_path / "full" / "a.safetensors", [("a_0", torch.randn(20, 8), np.arange(20))])
    assert store.verify() == []
    damage(tmp_path / "full" / "a.safetensors")
    faults = store.verify()
    assert len(faults) == 1 and message in faults[0]


def test_a_flipped_feature_byte_is_found(tmp_path):
    write_json(tmp_path / "full" / "manifest.json", {"dim": 8})
    path = tmp_path / "full" / "a.safetensors"
    write_shard(path, [("a_0", torch.ones(20, 8), np.arange(20))])
    content = bytearray(path.read_bytes())
    place = content.index(torch.ones(8).half().numpy().tobytes())
    content[place + 9] ^= 1
    path.write_bytes(content)
    assert "checksum" in FeatureStore(tmp_path).verify()[0]


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    save_file({"weights": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="not a whole feature shard"):
        read_shard(tmp_path / "a.safetensors")


@pytest.mark.parametrize("index", [None, "", "{}", '{"a.safetensors": {"bytes": 1, "segments": {"x": 3}}}'])
def test_a_lost_or_stale_index_is_made_anew(tmp_path, index):
    write_json(tmp_path / "manifest.json", {"dim": 8})
    write_shard(tmp_path / "a.safetensors", [("a_0", torch.randn(20, 8), np.arange(20))])
    if index is not None:
        (tmp_path / "index.json").write_text(index)
    view = StoredView(tmp_path)
    assert view.place == {"a_0": (0, 0, 20)}
    view.save_index()
    assert not StoredView(tmp_path).index_is_stale


def test_video_ids_stay_in_their_folder():
    for video_id in ("../../x", "/etc/passwd", ".hidden", "a/b", "ä b", ".."):
        name = shard_name(video_id)
        assert "/" not in name and not name.startswith(".") and (Path("store") / name).resolve().parent == Path("store").resolve()


@pytest.mark.slow
def test_killed_at_ten_random_moments_extraction_ends_in_the_same_bytes(tmp_path):
    world = write_world(tmp_path / "world", videos=12, frames=60)
    settings = {n: asdict(config(world, tmp_path / n, workers=1, batch_size=8)) for n in ("whole", "killed")}

    def nothing_wrong_is_stored():
        for manifest in (tmp_path / "killed").glob("*/csv/full/manifest.json"):
            assert FeatureStore(manifest.parents[1]).verify() == []

    assert kill_and_resume("extract", settings["whole"], settings["killed"], after_each=nothing_wrong_is_stored) >= 5
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


# --- batches --------------------------------------------------------------------------------------------------------

def both_ways(world: Path, tmp_path: Path, monkeypatch, **more) -> tuple[list[int], list[int]]:
    "Extracts with batches that end with their video, and with batches of one size; gives the sizes of the passes of each."
    segments, boxes = read_csv(world), hand_boxes(config(world, tmp_path))
    encoder, sizes = create_encoder(register_tiny(), "random", "cpu"), ([], [])
    encode = type(encoder).encode_pixels
    for across, seen in enumerate(sizes):
        monkeypatch.setattr(type(encoder), "encode_pixels", lambda self, pixels, **k: seen.append(len(pixels)) or encode(self, pixels, **k))
        extract(segments, encoder, FeatureStore(tmp_path / str(across)), ("full", "hand"), boxes, workers=0, batch_size=64, progress=False,
                across_videos=bool(across), **more)
    return sizes


def test_batches_filled_across_videos_hold_the_same_features(world, tmp_path, monkeypatch):
    own, across = both_ways(world, tmp_path, monkeypatch)
    assert len(set(across)) == 1 and across[0] == 64 and len(across) == -(-sum(own) // 64) < len(own)
    stores = [FeatureStore(tmp_path / str(i)) for i in range(2)]
    assert not stores[1].verify() and stores[1].missing(read_csv(world)).empty
    for view in ("full", "hand"):
        assert stores[0].view(view).place == stores[1].view(view).place
        for segment in read_csv(world).segment_id:
            torch.testing.assert_close(stores[1].segment(segment, view), stores[0].segment(segment, view), rtol=2e-3, atol=2e-3)
            assert torch.equal(stores[1].frames(segment, view), stores[0].frames(segment, view))


@pytest.mark.parametrize("across", [False, True])
def test_frames_resized_where_they_are_encoded_give_the_same_features(world, tmp_path, across):
    segments, boxes, encoders = read_csv(world), hand_boxes(config(world, tmp_path)), [create_encoder(register_tiny(), "random", "cpu") for _ in range(2)]
    encoders[1] = encoders[1].with_resize("squash")
    stores = [[FeatureStore(tmp_path / f"{where} {i}") for i in range(2)] for where in ("workers", "device")]
    reports = [extract(segments, encoders, own, ("full", "hand"), boxes, workers=1, batch_size=48, progress=False, across_videos=across, resize_on=where)
               for own, where in zip(stores, ("workers", "device"))]
    assert len({(r.frames, r.whole_frames, r.extracted) for r in reports}) == 1
    for here, there in zip(*stores):
        assert there.verify() == [] and there.manifest == here.manifest
        for view in ("full", "hand"):
            assert here.view(view).place == there.view(view).place
            for segment in segments.segment_id:
                torch.testing.assert_close(there.segment(segment, view), here.segment(segment, view), rtol=2e-3, atol=2e-3)  # batches of other sizes
                assert torch.equal(there.frames(segment, view), here.frames(segment, view))
    with pytest.raises(DataError, match="resize_on='nowhere' is not one of"): extract(segments, encoders, stores[0], resize_on="nowhere")


def test_a_kill_loses_no_more_than_the_batches_that_were_under_way(world, tmp_path, monkeypatch):
    encoder, segments = create_encoder(register_tiny(), "random", "cpu"), read_csv(world)
    calls, encode = [], type(encoder).encode_batch

    def breaks(self, pixels, size, record=None):
        calls.append(len(pixels))
        if len(calls) == 3: raise KeyboardInterrupt
        return encode(self, pixels, size, record)
    monkeypatch.setattr(type(encoder), "encode_batch", breaks)
    settings = dict(view="full", workers=0, batch_size=64, progress=False, across_videos=True)
    with pytest.raises(KeyboardInterrupt): extract(segments, encoder, FeatureStore(tmp_path), **settings)
    store = FeatureStore(tmp_path)
    written = set(store.view("full").place)
    assert written == {"v0_0", "v0_1", "v1_0", "v1_1"} and store.verify() == []  # 128 of 200 crops, 50 a video
    report = extract(segments, encoder, FeatureStore(tmp_path), **settings)
    assert (report.present, report.extracted) == (4, 4) and FeatureStore(tmp_path).missing(segments).empty


def test_a_video_without_a_crop_waits_its_turn(tmp_path):
    register_tiny()
    world = write_world(tmp_path / "world", videos=3, frames=60)
    (world / "videos" / "v1.mp4").write_bytes(bytes(9000))
    store = FeatureStore(tmp_path / "store")
    report = extract(read_csv(world), create_encoder(register_tiny(), "random", "cpu"), store, workers=0, batch_size=512, progress=False,
                     across_videos=True)
    assert (report.extracted, set(report.failed)) == (4, {"v1_0", "v1_1"}) and set(store.failures("full")) == {"v1_0", "v1_1"}


# Damage and repair; tests/faults injects it at random

@pytest.fixture
def store(tmp_path) -> FeatureStore:
    "Three shards of two segments."
    write_json(tmp_path / "full" / "manifest.json", {"dim": 8})
    for n, video in enumerate("abc"):
        parts = [(f"{video}_{s}", torch.full((4, 8), n + s), np.arange(4)) for s in range(2)]
        write_shard(tmp_path / "full" / f"{video}.safetensors", parts)
    made = FeatureStore(tmp_path)
    made.refresh()
    return made


def harm_one(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def test_repair_takes_out_what_is_damaged_and_nothing_else(store):
    folder = store.root / "full"
    harm_one(folder / "a.safetensors", -1), (folder / "c.safetensors").write_bytes((folder / "c.safetensors").read_bytes()[:-9])
    save_file({"weights": torch.ones(3)}, folder / "model.safetensors")
    (folder / "d.safetensors").mkdir(), (folder / ".b.safetensors.7-0.part").touch()
    (folder / "failures.jsonl").write_text('{"segment_id": "x", "cause": "cut short", "bytes": 3}\n{"segment')
    done = store.repair().set_index("file").done
    harmed = {"a.safetensors", "c.safetensors", "model.safetensors", "d.safetensors"}
    assert set(done.index) == harmed | {".b.safetensors.7-0.part", "failures.jsonl", "index.json"}
    assert sorted(p.name for p in (folder / "damaged").iterdir()) == ["a.safetensors", "c.safetensors", "d.safetensors", "model.safetensors"]
    assert store.verify() == [] and list(store.view("full").place) == ["b_0", "b_1"] and set(store.failures("full")) == {"x"}
    assert store.repair().empty


def test_what_is_set_aside_twice_is_kept_twice(store):
    for content in (b"one", b"two"):
        (store.root / "full" / "a.safetensors").write_bytes(content)
        store.repair()
    assert [(store.root / "full" / "damaged" / name).read_bytes() for name in ("a.safetensors", "a.safetensors.1")] == [b"one", b"two"]


def test_each_flipped_byte_is_found_or_changes_nothing(store):
    path, whole = store.root / "full" / "b.safetensors", (store.root / "full" / "b.safetensors").read_bytes()
    features, frames, header = (store.segment("b_1", "full").clone(), store.frames("b_1", "full").clone(), read_shard(path)[2]["segments"])
    found = 0
    for byte in range(len(whole)):
        path.write_bytes(whole)
        harm_one(path, byte)
        try:
            view = StoredView(store.root / "full")
            assert all(torch.equal(a, b) for a, b in zip(view.rows("b_1"), (features, frames))) and read_shard(path)[2]["segments"] == header, byte
        except DataError:
            found += 1
    assert found > 0.9 * len(whole)


def test_segments_in_two_shards_are_refused_and_both_set_aside(store):
    shutil.copy(store.root / "full" / "a.safetensors", store.root / "full" / "copy.safetensors")
    with pytest.raises(DataError, match="so does a.safetensors"):
        FeatureStore(store.root).view("full")
    assert len(store.verify()) == 2
    assert sorted(store.repair().file) == ["a.safetensors", "copy.safetensors", "index.json"]


def test_an_index_that_fits_sizes_and_not_segments_is_not_believed(store):
    index = json.loads((store.root / "full" / "index.json").read_text())
    index["a.safetensors"]["segments"] = {"a_1": 4, "a_0": 4}
    write_json(store.root / "full" / "index.json", index)
    with pytest.raises(DataError, match="elsewhere than"):
        FeatureStore(store.root).segment("a_0", "full")
    assert ["elsewhere" in fault for fault in FeatureStore(store.root).verify()] == [True]
    assert list(store.repair().file) == ["index.json"] and (store.segment("a_0", "full") == 0).all() and FeatureStore(store.root).verify() == []


def test_a_file_that_is_being_written_is_no_leftover(store):
    from xmic.files import whole_file
    with whole_file(store.root / "full" / "d.safetensors") as part:
        part.write_bytes(b"begun")
        assert store.repair().empty and part.exists()


def test_a_failure_that_was_noted_is_on_disk(tmp_path, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    FailureLog(tmp_path / "failures.jsonl").add({"a": dict(segment_id="a", cause="cut short")})
    assert synced == [(tmp_path / "failures.jsonl").stat().st_ino, tmp_path.stat().st_ino]


def test_shards_from_before_there_was_a_second_checksum_are_read(store):
    path = store.root / "full" / "a.safetensors"
    features, frames, header = (x.clone() if isinstance(x, torch.Tensor) else x for x in read_shard(path))
    save_file({"features": features, "frames": frames}, path, metadata={"shard": json.dumps({k: header[k] for k in ("segments", "sha256")})})
    assert store.verify() == [] and (FeatureStore(store.root).segment("a_1", "full") == 1).all()


def test_a_damaged_shard_is_not_added_to(world, tmp_path):
    segments, encoder = read_csv(world), create_encoder(register_tiny(), "random", "cpu")
    store = FeatureStore(tmp_path)
    extract(segments[::2], encoder, store, workers=0, progress=False)
    harm_one(next(tmp_path.rglob("v0.safetensors")), -1)
    with pytest.raises(DataError, match="checksum.*repair"):
        extract(segments, encoder, store, workers=0, progress=False)
    store.repair()
    extract(segments, encoder, store, workers=0, progress=False)
    assert store.verify() == [] and store.missing(segments).empty


# Each of these was added for a change of the code that no other test noticed.

@pytest.mark.parametrize("dataset, places, reader", [
    ("epic", ["hand-objects/P01_01.pkl"], "from_epic"), ("ego4d", ["100doh/a.pkl"], "from_100doh"), ("csv", ["hand_boxes.csv"], "from_boxes"),
    ("egtea", ["annotations/hand_crops/a.pkl", "annotations/hand_crops/b.pkl"], "from_boxes")])
def test_boxes_are_read_from_where_they_lie_with_the_settings(tmp_path, monkeypatch, dataset, places, reader):
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    monkeypatch.setattr(f"xmic.hands.HandBoxes.{reader}", lambda place, **settings: (place, settings))
    place, settings = hand_boxes(ExtractConfig(dataset=dataset, data_root=str(tmp_path), max_gap=7, hand_threshold=0.6, object_threshold=0.2))
    folder = Path(places[0]) if dataset == "csv" else Path(places[0]).parent
    assert place == tmp_path / folder and settings["max_gap"] == 7
    if reader != "from_boxes": assert (settings["hand_threshold"], settings["object_threshold"]) == (0.6, 0.2)


def test_a_rate_below_one_frame_a_second_is_a_rate():
    check_extraction(["full"], 0.5, 0)
    with pytest.raises(DataError, match="above 0"): check_extraction(["full"], 0.0, 0)


def test_encoders_of_clips_of_different_length_are_extracted_one_after_the_other(world, tmp_path):
    short, long = (SimpleNamespace(clip_frames=n) for n in (4, 16))
    with pytest.raises(DataError, match="clips of 4 and 16 frames: extract for one after the other"):
        extract(read_csv(world), [short, long], [FeatureStore(tmp_path / n) for n in "ab"], workers=0, progress=False)


def test_the_device_of_the_settings_is_the_encoder_s(world, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("xmic.features.create_encoder", lambda *names, **settings: asked.append(names) or create_encoder(*names, **settings))
    settings = config(world, tmp_path)
    extract_dataset(settings)
    assert asked == [(settings.encoder, settings.weights, settings.device)] and settings.device == "cpu"


def test_the_manifest_names_the_boxes_of_the_hand_view_alone():
    encoder, boxes = create_encoder(register_tiny(), "random", "cpu"), SimpleNamespace(fingerprint="boxes-1")
    said = {(view, given is None): manifest_of(encoder, view, None, "pyav", given)["boxes"] for view in ("full", "hand") for given in (boxes, None)}
    assert said == {("full", False): "whole frames", ("full", True): "whole frames", ("hand", False): "boxes-1", ("hand", True): "whole frames"}


def test_what_a_shard_s_header_lacks_is_named(tmp_path):
    save_file({"features": torch.zeros(1, 4), "frames": torch.zeros(1, dtype=torch.int64)}, tmp_path / "v.safetensors", {"shard": "[1]"})
    with pytest.raises(DataError, match="its header"): read_shard(tmp_path / "v.safetensors")


def test_notes_of_failures_that_are_in_order_are_not_written_anew(tmp_path):
    log = FailureLog(tmp_path / "failures.jsonl")
    log.add({"a": dict(segment_id="a", cause="cut short")})
    log.tidy()
    before = log.path.stat().st_ino, log.path.stat().st_mtime_ns
    assert log.tidy() == 0 and (log.path.stat().st_ino, log.path.stat().st_mtime_ns) == before


def test_the_release_s_way_of_resizing_is_one_of_the_dataset():
    assert {d: resize_policy("as released", d) for d in ("epic", "ego4d", "egtea")} == dict(epic="shortest", ego4d="squash", egtea="squash")
    assert resize_policy("squash", "epic") == "squash"
