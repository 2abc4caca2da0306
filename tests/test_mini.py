"""The embedded benchmark: official formats that the real readers take, the same files whatever happened on the way, detections as stated."""
import ast
import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from world import register_tiny
from xmic.features import ExtractConfig, extract_dataset, hand_boxes
from xmic.files import DataError, read_json, read_table
from xmic.hands import Hand, Object, read_100doh, read_epic_hands, union_box
from xmic.mini import LISTS, SIZES, Detector, build, contact_sheet, plan, usual, write_video
from xmic.scenes import BACKWARDS, LOOKS, VERBS, SeenHand, Truth, clip
from xmic.segments import epic_frame_rate, head_classes, read_classes, read_epic_tail, read_epic_unseen, read_segments
from xmic.video import probe, read_frames

ROOT = Path(__file__).resolve().parents[1]
REELS = {reel.name: reel for reel in plan("tiny")}
pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")


@pytest.fixture(scope="session")
def mini(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("mini"), "tiny", workers=2, progress=False)


def contents(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file() and p.name != ".lock"}


def segments(mini: Path, dataset: str) -> pd.DataFrame:
    return pd.concat([read_segments(dataset, mini / dataset, split) for split in ("train", "test")], ignore_index=True)


@pytest.mark.parametrize("dataset", LISTS)
def test_the_readers_find_every_segment(mini, dataset):
    train, test, egtea = SIZES["tiny"]
    assert len(read_segments(dataset, mini / dataset, "test")) == (egtea if dataset == "egtea" else test)
    table = segments(mini, dataset)
    assert dataset == "egtea" or len(table) == train + test
    assert table.groupby("video_id").split.nunique().max() == 1 or dataset == "egtea"
    counts = read_json(mini / "world.json")["datasets"][dataset]
    assert sum(counts["segments"].values()) == len(table)
    for kind in ("noun", "verb"):
        classes = read_classes(dataset, mini / dataset, kind)
        assert (classes.labels(table[kind]) >= 0).all() and len(classes) == counts[f"{kind}s"]
        assert set(classes.keys) == set(getattr(LISTS[dataset], f"{kind}s"))


@pytest.mark.parametrize("dataset", LISTS)
def test_segments_lie_within_their_videos(mini, dataset):
    look = LOOKS[dataset]
    for path, rows in segments(mini, dataset).groupby("video_path"):
        info = probe(path, "pyav")
        assert (info.width, info.height, info.fps) == (look.width, look.height, look.fps)
        assert rows.stop_sec.max() <= info.duration + 1e-6
        assert info.frames == REELS[Path(path).stem].frames


@pytest.mark.parametrize("dataset", LISTS)
def test_labels_are_what_is_rendered(mini, dataset):
    lists, table = LISTS[dataset], segments(mini, dataset)
    reels = [reel for reel in REELS.values() if reel.dataset == dataset]
    rendered = {(reel.name, place): action for reel in reels for place, action in enumerate(reel.actions)}
    for row in table.itertuples():
        key = (row.segment_id, 0) if dataset == "egtea" else (row.video_id, int(row.segment_id.rsplit("_", 1)[1]))
        action = rendered.pop(key)
        assert (lists.verbs[row.verb], lists.nouns[row.noun]) == (action.verb, action.noun)
        middle = (action.start + action.frames / 2) / LOOKS[dataset].fps
        assert abs(middle - (row.start_sec + row.stop_sec) / 2) < 0.2
        assert row.start_sec - 0.01 <= action.start / LOOKS[dataset].fps and (action.start + action.frames) / LOOKS[dataset].fps <= row.stop_sec + 0.01
    assert not rendered


def test_epic_frames_follow_the_official_rule(mini):
    table = segments(mini, "epic")
    rates = table.video_id.map(epic_frame_rate)
    assert set(rates) == {50, 60}
    assert (np.abs(table.start_frame - np.maximum(1, np.floor(table.start_sec * rates))) <= 1.34).all()
    assert (np.abs(table.stop_frame - np.floor(table.stop_sec * rates)) <= 1.34).all()


def test_epic_files_have_the_official_columns(mini, shared_data):
    ours, real = mini / "epic" / "epic-kitchens-100-annotations", shared_data / "epic_kitchens_100_annotations"
    for name in ("EPIC_100_validation.csv", "EPIC_100_noun_classes.csv", "EPIC_100_verb_classes.csv", "EPIC_100_unseen_participant_ids_validation.csv",
                 "EPIC_100_tail_nouns.csv", "EPIC_100_tail_verbs.csv"):
        assert list(read_table(ours / name)) == list(read_table(real / name))
    row = read_table(ours / "EPIC_100_train.csv").iloc[0]
    assert ast.literal_eval(row.all_nouns) == [row.noun] and ast.literal_eval(row.all_noun_classes) == [int(row.noun_class)]


def test_lists_of_the_challenge_follow_from_the_annotations(mini):
    table = {split: read_segments("epic", mini / "epic", split) for split in ("train", "test")}
    people = {split: set(rows.video_id.str[:3]) for split, rows in table.items()}
    assert read_epic_unseen(mini / "epic") == sorted(people["test"] - people["train"]) != []
    for kind in ("noun", "verb"):
        classes = read_classes("epic", mini / "epic", kind)
        counts = np.bincount(classes.labels(table["train"][kind]), minlength=len(classes))
        assert read_epic_tail(mini / "epic", kind).tolist() == np.flatnonzero(~head_classes(counts) & (counts > 0)).tolist() != []


def test_a_world_of_before_gets_the_lists_and_nothing_else_is_touched(mini):
    folder = mini / "epic" / "epic-kitchens-100-annotations"
    lists = {p: p.read_bytes() for p in folder.glob("EPIC_100_*") if "tail" in p.name or "unseen" in p.name}
    before = {p: p.stat().st_mtime_ns for p in mini.rglob("*") if p.is_file() and p not in lists}
    for path in lists:
        path.unlink()
    build(mini, "tiny")
    assert len(lists) == 3 and lists == {p: p.read_bytes() for p in lists}
    assert before == {p: p.stat().st_mtime_ns for p in mini.rglob("*") if p.is_file() and p not in lists}


def test_names_are_official(shared_data):
    real = {("epic", kind): set(read_table(shared_data / "epic_kitchens_100_annotations" / f"EPIC_100_{kind}_classes.csv").key) for kind in ("noun", "verb")}
    taxonomy = json.loads((shared_data / "ego4d_lta_taxonomy" / "fho_lta_taxonomy.json").read_text())
    real |= {("ego4d", kind): set(taxonomy[f"{kind}s"]) for kind in ("noun", "verb")}
    for kind in ("noun", "verb"):
        lines = (shared_data / "egtea_gaze_plus_annotations" / f"{kind}_idx.txt").read_text().splitlines()
        real["egtea", kind] = {line.rpartition(" ")[0] for line in lines if line.strip()}
    for (dataset, kind), names in real.items():
        assert set(getattr(LISTS[dataset], f"{kind}s")) <= names, (dataset, kind)


def test_ego4d_rows_have_the_official_fields(mini, shared_data):
    real = json.loads((shared_data / "ego4d_fho_sample_entries" / "fho_lta_train.sample.json").read_text())["clips"][0]
    rows = read_json(mini / "ego4d" / "v2" / "annotations" / "fho_lta_train.json")["clips"]
    assert set(rows[0]) == set(real) and all(type(rows[0][key]) is type(real[key]) for key in real)


def test_ego4d_windows_overlap_with_the_action_in_the_middle(mini):
    table = read_segments("ego4d", mini / "ego4d", "train")
    assert (table.stop_sec - table.start_sec == 8).all() and (table.stop_frame - table.start_frame == 240).all()
    for name, rows in table.groupby("video_id"):
        assert (np.diff(rows.start_sec) == 4).all()
        for row, action in zip(rows.itertuples(), REELS[name].actions):
            assert row.start_sec + 2 <= action.start / 8 and (action.start + action.frames) / 8 <= row.start_sec + 6


def test_egtea_splits_are_a_threefold_division(mini):
    folder = mini / "egtea" / "action_annotation"
    lines = {(part, k): set((folder / f"{part}_split{k}.txt").read_text().split("\n")) - {""} for part in ("train", "test") for k in (1, 2, 3)}
    every = lines["train", 1] | lines["test", 1]
    for k in (1, 2, 3):
        assert lines["train", k] | lines["test", k] == every and not lines["train", k] & lines["test", k]
    assert len(lines["test", 1] | lines["test", 2] | lines["test", 3]) == sum(len(lines["test", k]) for k in (1, 2, 3)) == 12


def test_classes_are_shared_and_novel_both_ways(mini):
    sets = {(dataset, kind): read_classes(dataset, mini / dataset, kind) for dataset in LISTS for kind in ("noun", "verb")}
    for kind, least in (("noun", 10), ("verb", 4)):
        for one, two in (("epic", "ego4d"), ("ego4d", "epic")):
            shared, novel = sets[one, kind].shared_with(sets[two, kind])
            assert len(shared) >= least and len(novel) >= least
    assert {verb for lists in LISTS.values() for verb in lists.verbs.values()} == set(VERBS)


def test_counts_are_long_tailed_and_both_sides_of_a_reversal_occur():
    reels = plan("default")
    for dataset, (train, test) in {"epic": ("train", "validation"), "ego4d": ("train", "val")}.items():
        pairs = pd.DataFrame([pair for reel in reels if (reel.dataset, reel.split) == (dataset, train) for pair in reel.keys], columns=["verb", "noun"])
        tests = pd.DataFrame([pair for reel in reels if (reel.dataset, reel.split) == (dataset, test) for pair in reel.keys], columns=["verb", "noun"])
        assert (len(pairs), len(tests)) == (500, 150)
        for kind in ("verb", "noun"):
            counts, classes = pairs[kind].value_counts(), getattr(LISTS[dataset], f"{kind}s")
            assert counts.iloc[0] > 3 * counts.iloc[-1] and counts.iloc[0] < 0.3 * 500
            assert len(counts) >= 0.9 * len(classes)
            assert tests[kind].isin(set(counts.index)).mean() > 0.97
        verbs = set(LISTS[dataset].verbs.values())
        assert any(back in verbs and forward in verbs for back, forward in BACKWARDS.items())
        assert pairs.verb.value_counts().min() >= 8
        lists = LISTS[dataset]
        odd = np.mean([not usual(lists.verbs[verb], lists.nouns[noun]) for verb, noun in pairs.itertuples(index=False)])
        assert 0.04 < odd < 0.17


@pytest.mark.parametrize("dataset", LISTS)
def test_boxes_fall_on_the_true_hands(mini, dataset):
    boxes, ious, empty, frames = hand_boxes(ExtractConfig(dataset=dataset, data_root=str(mini / dataset))), [], 0, 0
    for row in segments(mini, dataset).itertuples():
        reel, info = REELS[row.segment_id if dataset == "egtea" else row.video_id], probe(row.video_path, "pyav")
        footage = reel.footage
        for index in range(round(row.start_sec * info.fps), min(round(row.stop_sec * info.fps), info.frames), 5):
            truth = footage.truth(index)
            touched = [truth.object] if truth.object and any(hand.contact for hand in truth.hands) else []
            if not truth.hands:
                continue
            frames += 1
            box = boxes.box(row, index, info, info.width, info.height)
            if box is None:
                empty += 1
                continue
            every = np.array([hand.box for hand in truth.hands] + touched)
            left, top, right, bottom = [*every[:, :2].min(0), *every[:, 2:].max(0)]
            across, down = min(right, box[2]) - max(left, box[0]), min(bottom, box[3]) - max(top, box[1])
            both = max(across, 0) * max(down, 0)
            ious.append(both / ((right - left) * (bottom - top) + (box[2] - box[0]) * (box[3] - box[1]) - both))
    assert frames > 50 and 0 < empty < 0.25 * frames
    assert np.median(ious) > 0.8 and np.mean(np.array(ious) > 0.3) > 0.85


def test_detections_of_epic_are_one_message_an_official_frame(mini):
    for name, reel in REELS.items():
        if reel.dataset == "epic":
            found = read_epic_hands(mini / "epic" / reel.detections)
            rate = epic_frame_rate(name)
            assert len(found) == reel.frames * rate // LOOKS["epic"].fps
            truth = reel.found()
            for frame in (0, 17, reel.frames - 1):
                hands, objects = found[frame * rate // LOOKS["epic"].fps]
                assert len(hands) == len(truth[frame][0]) and len(objects) == len(truth[frame][1])
                for hand, wanted in zip(hands, truth[frame][0]):
                    assert np.allclose(np.array(hand.box) * (256, 144, 256, 144), wanted.box, atol=0.01) and hand[1:4] == pytest.approx(wanted[1:4])


def test_100doh_rows_give_back_the_detections(mini):
    reel = next(reel for reel in REELS.values() if reel.dataset == "ego4d")
    read = read_100doh(mini / "ego4d" / reel.detections)
    assert len(read) == reel.frames
    for frame, (hands, objects) in enumerate(reel.found()):
        assert [hand[1:4] for hand in read[frame][0]] == [pytest.approx(hand[1:4]) for hand in hands]
        assert np.allclose([[*hand.box, *hand.offset] for hand in read[frame][0]], [[*hand.box, *hand.offset] for hand in hands], atol=0.05)
        assert np.allclose([thing.box for thing in read[frame][1]], [thing.box for thing in objects], atol=0.01)


def test_the_detector_errs_as_stated():
    rng, detector, n = np.random.default_rng(0), Detector(), 6000
    hand, thing = SeenHand((100.0, 80.0, 150.0, 130.0), 1, 3, True), (60.0, 40.0, 110.0, 90.0)
    runs = [detector(Truth([hand], thing), 256, 144, rng) for _ in range(n)]
    near = [[h for h in hands if abs(h.box[0] - 100) < 12 and abs(h.box[1] - 80) < 12 and abs(h.box[2] - 150) < 12] for hands, _ in runs]
    found = [h[0] for h in near if h]

    def share(part: float, of: int, wanted: float, slack: float = 0.0) -> bool:
        return abs(part / of - wanted) < 4 * (wanted * (1 - wanted) / of) ** 0.5 + slack

    assert share(n - len(found), n, detector.missed_hands)
    assert share(sum(len(hands) for hands, _ in runs) - len(found), n, detector.false_hands, 0.002)
    assert share(sum(h.score < 0.8 for h in found), len(found), detector.doubted, 0.004)
    assert share(sum(h.side != 1 for h in found), len(found), detector.wrong_side, 0.004)
    assert share(sum(h.state != 3 for h in found), len(found), detector.wrong_state * 0.75, 0.004)
    objects = [[o for o in objects if np.abs(np.subtract(o.box, thing)).max() < 12] for _, objects in runs]
    assert share(sum(not o for o in objects), n, detector.missed_objects, 0.005)
    assert abs(sum(len(objects) for _, objects in runs) / n - (1 - detector.missed_objects) - detector.false_objects) < 0.03
    assert np.std([h.box[0] for h in found]) == pytest.approx(detector.jitter * 50, rel=0.1)
    assert all(isinstance(h, Hand) for hands, _ in runs for h in hands) and all(isinstance(o, Object) for _, objects in runs for o in objects)


def test_a_faultless_detector_gives_the_truth():
    exact = Detector(0, 0, 0, 0, 0, 0, 0, 0)
    truth = Truth([SeenHand((10.0, 20.0, 50.0, 60.0), 0, 3, True), SeenHand((100.0, 20.0, 140.0, 60.0), 1, 0, True)], (40.0, 30.0, 90.0, 70.0))
    for seed in range(20):
        assert union_box(*exact(truth, 256, 144, np.random.default_rng(seed)), 0.8, 0.01) == (10, 20, 140, 70)


@pytest.mark.parametrize("dataset", LISTS)
def test_both_views_are_extracted_without_a_failure(mini, dataset, tmp_path):
    config = ExtractConfig(dataset=dataset, data_root=str(mini / dataset), encoder=register_tiny(), weights="random", features_root=str(tmp_path),
                           device="cpu", workers=0, progress=False)
    store, report = extract_dataset(config)
    assert not report.failed and report.extracted == len(segments(mini, dataset))
    assert store.missing(report.segments).empty and not store.verify()
    assert 0 < report.whole_frames < 0.7 * report.frames


def test_frames_on_disk_are_the_rendered_ones(mini):
    for reel in list(REELS.values())[::5]:
        path, indices = mini / reel.dataset / reel.path, [0, reel.frames // 2, reel.frames - 1]
        for index, image in zip(indices, read_frames(path, indices, "pyav")):
            assert np.abs(image.astype(int) - reel.footage.image(index)).mean() < 6


def test_contact_sheet_shows_a_row_for_each_segment(mini):
    table = read_segments("ego4d", mini / "ego4d", "test").iloc[:2]
    sheet = contact_sheet(table, columns=3, width=96)
    assert sheet.shape == (2 * 72, 3 * 96, 3) and sheet.dtype == np.uint8 and sheet.std() > 10
    boxed = contact_sheet(table, hand_boxes(ExtractConfig(dataset="ego4d", data_root=str(mini / "ego4d"))), columns=3, width=96)
    assert (sheet != boxed).any()


def test_a_killed_build_ends_in_the_same_files(mini, tmp_path):
    code = "import sys; from xmic.mini import build; build(sys.argv[1], 'tiny', workers=2, progress=False)"
    root, rng, met = tmp_path / "mini", random.Random(0), 0
    for kill in range(2):
        job = subprocess.Popen([sys.executable, "-c", code, str(root)], cwd=ROOT)
        while job.poll() is None and not (root / ".building.json").exists():
            time.sleep(0.02)
        begun = len([p for p in root.rglob("*") if p.suffix.lower() == ".mp4"])
        while job.poll() is None and len([p for p in root.rglob("*") if p.suffix.lower() == ".mp4"]) < begun + 3:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        if job.poll() is None:
            os.kill(job.pid, signal.SIGKILL)
            met += 1
        job.wait()
        assert (root / "world.json").exists() == (job.returncode == 0)
    assert met == 2
    build(root, "tiny", workers=2, progress=False)
    assert contents(root) == contents(mini)


def test_the_number_of_workers_makes_no_difference_and_lost_videos_are_made_again(mini, tmp_path):
    root = build(tmp_path / "one", "tiny", workers=0, progress=False)
    assert contents(root) == contents(mini)
    lost = sorted(root.rglob("*.MP4"))[0]
    lost.unlink()
    build(root, "tiny", workers=0, progress=False)
    assert contents(root) == contents(mini)


def test_a_world_is_not_built_into_datasets_that_are_there(tmp_path):
    (tmp_path / "epic/epic-kitchens-100-annotations").mkdir(parents=True)
    (tmp_path / "epic/epic-kitchens-100-annotations/EPIC_100_train.csv").write_text("the official one")
    before = contents(tmp_path)
    with pytest.raises(DataError, match="no part of a world of this kit"): build(tmp_path, "tiny", workers=0, progress=False)
    assert contents(tmp_path) == before and not (tmp_path / "world.json").exists() and len(list(tmp_path.iterdir())) == 1


def test_a_drawn_video_overwrites_nothing_unasked(tmp_path):
    (tmp_path / "kitchen.mp4").write_text("mine")
    footage = clip("mix", "bowl", "epic", seed=23, seconds=0.2)
    with pytest.raises(DataError, match="exists already"): write_video(tmp_path / "kitchen.mp4", footage)
    assert (tmp_path / "kitchen.mp4").read_text() == "mine"
    write_video(tmp_path / "kitchen.mp4", footage, overwrite=True)
    assert probe(tmp_path / "kitchen.mp4").frames > 1


def test_a_finished_world_is_not_touched(mini, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in mini.rglob("*") if p.is_file()}
    monkeypatch.setattr("xmic.mini.DecodePool", None)  # no process is started
    assert build(mini, "tiny") == mini
    assert before == {p: p.stat().st_mtime_ns for p in mini.rglob("*") if p.is_file()}


@pytest.mark.parametrize("other", [dict(size="default"), dict(size="tiny", seed=1)])
def test_another_world_is_refused(mini, tmp_path, other):
    with pytest.raises(DataError, match="world.json there, or choose another root"):
        build(mini, **other)
    (tmp_path / ".building.json").write_text((mini / "world.json").read_text())
    with pytest.raises(DataError, match="beginnings of a world"):
        build(tmp_path, **other)


def test_unknown_sizes_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match="size is 'tiny', 'default', 'large', not 'huge'"):
        build(tmp_path / "new", "huge")
    assert not (tmp_path / "new").exists()


def test_sizes_differ_by_four_and_seeds_differ():
    assert tuple(4 * n for n in SIZES["default"]) == SIZES["large"]
    one, two = ({reel.seed for reel in plan("tiny", seed)} for seed in (0, 1))
    assert not one & two


def test_rows_of_hand_boxes_fit_their_clips(mini):
    with open(mini / "egtea" / "hand_boxes.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == sum(reel.frames for reel in REELS.values() if reel.dataset == "egtea")
    assert {row["segment_id"] for row in rows} == {name for name, reel in REELS.items() if reel.dataset == "egtea"}
