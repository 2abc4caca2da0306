"""Segment readers: the official files unchanged, every layout, and everything that can be wrong with them."""
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counting import counted
from xmic.files import DataError
from xmic.segments import (COLUMNS, FOLDER_COLUMNS, central_window, epic_frame_rate, head_classes, read_classes, read_code, read_csv, read_egtea, read_ego4d,
                           read_epic, read_epic_tail, read_epic_unseen, read_segments)


def link(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in files.items():
        (folder / name).symlink_to(target)
    return folder


def epic_files(shared_data):
    official = {path.name: path for path in (shared_data / "epic_kitchens_100_annotations").glob("EPIC_100_*.csv")}
    return official | {"EPIC_100_train.csv": shared_data / "derived/EPIC_100_train_reconstructed.csv"}


@pytest.fixture(scope="module")
def epic(shared_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("epic")
    link(root / "annotations", epic_files(shared_data))
    return root


@pytest.fixture(scope="module")
def ego4d(shared_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("ego4d")
    samples = shared_data / "ego4d_fho_sample_entries"
    link(root / "v2/annotations", {f"fho_lta_{split}.json": samples / f"fho_lta_{split}.sample.json" for split in ("train", "val")}
         | {"fho_lta_taxonomy.json": shared_data / "ego4d_lta_taxonomy/fho_lta_taxonomy.json"})
    return root


@pytest.fixture(scope="module")
def egtea(shared_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("egtea")
    (root / "action_annotation").symlink_to(shared_data / "egtea_gaze_plus_annotations")
    return root


def well_formed(table):
    assert [c for c in table if c not in FOLDER_COLUMNS] == COLUMNS and isinstance(table.index, pd.RangeIndex)
    assert table["segment_id"].is_unique and (table["stop_sec"] > table["start_sec"]).all()
    assert [table[c].dtype.kind for c in ("start_sec", "stop_sec", "start_frame", "stop_frame")] == list("ffii")
    assert table[["segment_id", "video_id", "video_path", "verb", "noun", "narration", "split"]].map(lambda v: isinstance(v, str)).all(axis=None)
    return table


# EPIC-KITCHENS-100

@pytest.mark.parametrize("split, rows, verbs, nouns, mean, hours", [
    ("train", 67217, 97, 289, 3.12, 58.2), ("validation", 9668, 78, 211, 3.68, 9.9)])
def test_real_epic(epic, split, rows, verbs, nouns, mean, hours):
    table = well_formed(read_epic(epic, split))
    seconds = table["stop_sec"] - table["start_sec"]
    assert len(table) == rows and set(table["split"]) == {split}
    assert (table["verb"].nunique(), table["noun"].nunique()) == (verbs, nouns)
    assert (round(seconds.mean(), 2), round(seconds.sum() / 3600, 1)) == (mean, hours)
    for kind in ("verb", "noun"):
        assert (read_classes("epic", epic, kind).labels(table[kind]) >= 0).all()


def test_the_real_challenge_list_has_times_and_no_labels(epic):
    table = well_formed(read_segments("epic", epic, "challenge"))
    assert len(table) == 13092 and set(table["split"]) == {"test"} and (table[["verb", "noun", "narration"]] == "").all(axis=None)
    first = table.iloc[0]
    assert (first.segment_id, first.start_frame, first.stop_frame, first.start_sec, first.stop_sec) == ("P01_101_0", 143, 193, 2.86, 3.87)


def test_real_epic_labels_and_times_are_those_of_the_file(epic):
    table, raw = read_epic(epic, "val"), pd.read_csv(epic / "annotations/EPIC_100_validation.csv")
    for kind in ("verb", "noun"):
        assert np.array_equal(read_classes("epic", epic, kind).labels(table[kind]), raw[f"{kind}_class"])
    for end in ("start", "stop"):
        assert np.array_equal(table[f"{end}_frame"], raw[f"{end}_frame"])
        np.testing.assert_allclose(table[f"{end}_sec"], pd.to_timedelta(raw[f"{end}_timestamp"]).dt.total_seconds(), atol=1e-9)
    assert list(table["narration"]) == list(raw["narration"])


def test_real_epic_frames_follow_the_official_rate_and_not_the_videos(epic):
    table = pd.concat([read_epic(epic, split) for split in ("train", "validation")])
    rate = table["video_id"].map(epic_frame_rate)
    for end in ("start", "stop"):
        assert (table[f"{end}_frame"] - np.floor(table[f"{end}_sec"] * rate)).abs().max() < 2.4
    fps = pd.read_csv(epic / "annotations/EPIC_100_video_info.csv", index_col="video_id")["fps"]
    wrong = (table["stop_frame"] - table["stop_sec"] * table["video_id"].map(fps)).abs() > 10
    assert wrong.mean() > 0.05


def test_reading_the_real_epic_takes_a_few_calls_for_each_row(epic):
    read_epic(epic, "validation")  # imports
    for split, rows in dict(validation=9_668, train=67_217).items():
        with counted() as work: assert len(read_epic(epic, split)) == rows
        assert work.calls < 40 * rows


def test_real_unseen_participants_are_those_without_a_training_segment(epic, shared_data):
    tables = {split: read_epic(epic, split) for split in ("train", "validation")}
    people = {split: set(table.video_id.str.split("_").str[0]) for split, table in tables.items()}
    assert read_epic_unseen(epic) == ["P18", "P32"] == sorted(people["validation"] - people["train"])
    assert read_epic_unseen(epic, "test") == ["P33", "P34", "P36"]
    official = pd.read_csv(epic / "annotations/EPIC_100_validation.csv")
    assert (official.participant_id == official.narration_id.str.split("_").str[0]).all()


@pytest.mark.parametrize("kind, tail, absent", [("verb", 86, 0), ("noun", 228, 11)])
def test_the_real_tail_follows_from_the_training_counts(epic, kind, tail, absent):
    classes = read_classes("epic", epic, kind)
    counts = np.bincount(classes.labels(read_epic(epic, "train")[kind]), minlength=len(classes))
    official = read_epic_tail(epic, kind)
    assert len(official) == tail and (counts == 0).sum() == absent
    assert official.tolist() == np.flatnonzero(~head_classes(counts) & (counts > 0)).tolist()


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any), st.floats(0.05, 0.95))
def test_the_head_is_the_fewest_classes_that_hold_their_share(counts, share):
    counts = np.array(counts)
    head = head_classes(counts, share)
    assert head.any() and counts[head].min() > 0
    assert not (~head).any() or counts[head].min() >= counts[~head].max()
    assert counts[head].sum() >= share * counts.sum() - 1e-9
    assert counts[head].sum() - counts[head].min() < share * counts.sum()


@pytest.mark.parametrize("name, text, message", [
    ("EPIC_100_unseen_participant_ids_validation.csv", "participant\nP18\n", "no column participant_id"),
    ("EPIC_100_unseen_participant_ids_validation.csv", "participant_id\nP18\nP18\n", "participant_id is empty or repeated (2 rows)"),
    ("EPIC_100_tail_nouns.csv", "noun\n1\n2\n", "noun is not one of the 2 classes (1 row)"),
    ("EPIC_100_tail_nouns.csv", "noun\nplate\n", "noun is not a whole number")])
def test_wrong_lists_of_epic_are_refused(tmp_path, name, text, message):
    root = small_epic(tmp_path / "root")
    assert read_epic_unseen(root) is None and read_epic_tail(root, "noun") is None
    (root / name).write_text(text)
    with pytest.raises(DataError) as e:
        read_epic_unseen(root), read_epic_tail(root, "noun")
    assert message in str(e.value)


@pytest.mark.parametrize("place", [
    "root", "root/annotations", "root/epic-kitchens-100-annotations", "root/annotations/epic-kitchens-100-annotations",
    "annotations", "epic-kitchens-100-annotations", "root/EPIC-KITCHENS/annotations"])
def test_epic_annotations_in_below_or_beside_the_root(shared_data, tmp_path, place):
    (tmp_path / "root").mkdir()
    link(tmp_path / place, epic_files(shared_data))
    assert len(read_epic(tmp_path / "root", "val")) == 9668


EPIC_HEAD = ("narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
             "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n")
EPIC_ROWS = ('P01_01_0,P01,P01_01,00:00:00.560,00:00:00.00,00:00:01.89,1,113,take plate,take,0,plate,1,"[\'plate\', \'tap\']","[1, 0]"\n'
             "P01_101_0,P01,P01_101,00:00:00.560,00:00:02.00,00:00:03.00,100,150,null,take,0,tap,0,['tap'],[0]\n")


def small_epic(root, head=EPIC_HEAD, rows=EPIC_ROWS):
    root.mkdir(exist_ok=True)
    (root / "EPIC_100_train.csv").write_text(head + rows)
    (root / "EPIC_100_verb_classes.csv").write_text("id,key\n0,take\n1,put\n")
    (root / "EPIC_100_noun_classes.csv").write_text("id,key\n0,tap:water\n1,plate\n")
    return root


@pytest.mark.parametrize("there, media, found", [
    ([], "auto", "P01/videos/P01_01.MP4"), ([], "frames", "P01/rgb_frames/P01_01"),
    (["P01/videos/P01_01.MP4"], "auto", "P01/videos/P01_01.MP4"), (["P01/videos/P01_01.mp4"], "auto", "P01/videos/P01_01.mp4"),
    (["videos/P01_01.MP4"], "auto", "videos/P01_01.MP4"), (["videos/P01_01.mp4"], "video", "videos/P01_01.mp4"),
    (["P01/rgb_frames/P01_01/"], "auto", "P01/rgb_frames/P01_01"), (["rgb_frames/P01_01/"], "auto", "rgb_frames/P01_01"),
    (["P01/rgb_frames/P01_01/", "P01/videos/P01_01.MP4"], "auto", "P01/videos/P01_01.MP4"),
    (["P01/rgb_frames/P01_01/", "P01/videos/P01_01.MP4"], "frames", "P01/rgb_frames/P01_01"),
    (["P01/rgb_frames/P01_01/"], "video", "P01/videos/P01_01.MP4"),
    (["EPIC-KITCHENS/P01/videos/P01_01.MP4"], "auto", "EPIC-KITCHENS/P01/videos/P01_01.MP4")])
def test_epic_media(tmp_path, there, media, found):
    root = small_epic(tmp_path / "root")
    for name in there:
        path = root / name
        path.mkdir(parents=True) if name.endswith("/") else (path.parent.mkdir(parents=True, exist_ok=True), path.touch())
    table = well_formed(read_epic(root, media=media))
    assert table["video_path"][0] == str(root / found)
    assert list(table["narration"]) == ["take plate", "null"] and list(table["noun"]) == ["plate", "tap:water"]


def test_epic_paths_are_absolute(tmp_path, monkeypatch):
    small_epic(tmp_path / "root")
    monkeypatch.chdir(tmp_path)
    assert read_epic("root")["video_path"][0] == str(tmp_path / "root/P01/videos/P01_01.MP4")


def test_epic_frame_rates():
    assert [epic_frame_rate(video) for video in ("P01_01", "P32_10", "P01_101", "P37_103")] == [60, 60, 50, 50]
    for video in ("P01", "P01_1", "P01_1011", "breakfast", ""):
        with pytest.raises(DataError, match="EPIC-KITCHENS"):
            epic_frame_rate(video)


@pytest.mark.parametrize("old, new, says", [
    ("start_timestamp", "begin", ["no column start_timestamp", "found: narration_id"]),
    (",noun_class,", ",nouns,", ["no column noun_class"]),
    ("plate,1,", "plate,2,", ["noun_class is not one of the 2 classes (1 row)", "row 1", "'P01_01_0'", "'2'"]),
    ("take,0,tap", "take,-1,tap", ["verb_class is not one of the 2", "row 2"]),
    ("plate,1,", "plate,one,", ["noun_class is not a whole number", "'one'"]),
    ("plate,1,", "plate,0.5,", ["noun_class is not a whole number"]),
    ("plate,1,", "plate,,", ["noun_class is not a whole number"]),
    ("00:00:01.89", "1.89", ["stop_timestamp is not HH:MM:SS.SS", "'1.89'"]),
    ("00:00:01.89", "00:00:61.89", ["stop_timestamp is not HH:MM:SS.SS"]),
    ("00:00:01.89", "nan", ["stop_timestamp is not HH:MM:SS.SS"]),
    ("00:00:01.89", "00:00:00.00", ["must stop after it starts (1 row)", "stop_sec '0.0'"]),
    ("00:00:03.00", "00:00:01.00", ["must stop after it starts (1 row)", "row 2"]),
    (",100,150,", ",150,100,", ["must stop after it starts", "start_frame '150'"]),
    (",100,150,", ",-3,150,", ["start_frame '-3'"]),
    (",100,150,", ",100,1e999,", ["stop_frame is not a whole number"]),
    ("P01_101_0", "P01_01_0", ["segment_id is repeated (2 rows)", "row 1", "row 2"]),
    ("P01_101_0", "", ["segment_id is empty (1 row)"])])
def test_bad_epic_rows(tmp_path, old, new, says):
    head, rows = (EPIC_HEAD.replace(old, new), EPIC_ROWS) if old in EPIC_HEAD else (EPIC_HEAD, EPIC_ROWS.replace(old, new, 1))
    assert head + rows != EPIC_HEAD + EPIC_ROWS
    with pytest.raises(DataError) as e:
        read_epic(small_epic(tmp_path, head, rows))
    assert "EPIC_100_train.csv" in str(e.value) and all(part in str(e.value) for part in says), str(e.value)


def test_bad_rows_are_counted_and_the_first_shown(tmp_path):
    rows = "".join(f"P01_01_{i},P01,P01_01,,00:00:09.00,00:00:0{i % 10}.50,1,9,x,take,0,tap,0,[],[]\n" for i in range(100))
    with pytest.raises(DataError) as e:
        read_epic(small_epic(tmp_path, rows=rows))
    assert "(90 rows)" in str(e.value) and "row 1: segment_id 'P01_01_0', start_sec '9.0', stop_sec '0.5'" in str(e.value)
    assert "and 85 more" in str(e.value) and str(e.value).count("\n") == 6


@pytest.mark.parametrize("content, says", [
    ((EPIC_HEAD + EPIC_ROWS.replace("plate", "caf\xe9")).encode("latin-1"), "line 2 is not UTF-8 (byte 0xe9)"),
    ((EPIC_HEAD + EPIC_ROWS).encode("utf-16"), "NUL byte in line 1"), (EPIC_HEAD.encode() + b"\0" * 64, "NUL byte in line 2"),
    (b"", "not readable as CSV"), (EPIC_HEAD.encode(), "no segment in it"),
    ((EPIC_HEAD + 'P01_01_0,P01,"P01_01').encode(), "not readable as CSV"), ((EPIC_HEAD + EPIC_ROWS + "a," * 40).encode(), "not readable as CSV")])
def test_unreadable_epic_files(tmp_path, content, says):
    root = small_epic(tmp_path)
    (root / "EPIC_100_train.csv").write_bytes(content)
    with pytest.raises(DataError) as e:
        read_epic(root)
    assert says in str(e.value) and "EPIC_100_train.csv" in str(e.value)


def test_a_list_cut_in_the_middle_of_a_row(tmp_path):
    text = EPIC_HEAD + EPIC_ROWS
    with pytest.raises(DataError, match="row 2"):
        read_epic(small_epic(tmp_path, "", text[:text.index("00:00:03.00")]))


@pytest.mark.parametrize("call, says", [
    (lambda root: read_epic(root, "tset"), "did you mean 'test'"), (lambda root: read_epic(root, media="film"), "'film'"),
    (lambda root: read_ego4d(root, "test"), "public labels"), (lambda root: read_egtea(root, "test4"), "did you mean 'test1'|'test"),
    (lambda root: read_segments("ego4d", root, "val"), "split is 'train' or 'test', not 'val'"),
    (lambda root: read_segments("epik", root), "did you mean 'epic'"), (lambda root: read_classes("epic", root, "nouns"), "did you mean 'noun'")])
def test_options_that_do_not_exist(tmp_path, call, says):
    with pytest.raises(DataError, match=says):
        call(small_epic(tmp_path))


@pytest.mark.parametrize("read, expected", [
    (read_epic, ["EPIC_100_train.csv", "epic-kitchens-100-annotations"]), (read_ego4d, ["fho_lta_train.json", "v2/annotations", "--benchmarks FHO"]),
    (read_egtea, ["noun_idx.txt|test_split1.txt", "action_annotation"]), (read_csv, ["segments.csv"])])
def test_a_root_that_holds_nothing(tmp_path, read, expected):
    with pytest.raises(DataError) as e:
        read(tmp_path)
    assert all(any(p in str(e.value) for p in part.split("|")) for part in expected) and f"\n  {tmp_path}" in str(e.value)
    with pytest.raises(DataError, match="no such file or folder"):
        read(tmp_path / "absent")


# Ego4D

def test_real_ego4d(ego4d):
    train, val = well_formed(read_ego4d(ego4d, "train")), well_formed(read_ego4d(ego4d, "val"))
    clip = "5f4558be-ecb4-4597-871f-cf1221301f91"
    assert list(train["segment_id"]) == [f"train_{clip}_0", f"train_{clip}_1"] and set(train["video_id"]) == {clip}
    assert list(train["noun"]) == ["dough", "tray"] and list(val["split"]) == ["val"]
    np.testing.assert_allclose(pd.concat([train, val]).eval("stop_sec - start_sec"), 8)
    assert train.loc[0, ["start_frame", "stop_frame"]].tolist() == [143, 383]
    assert train["video_path"][0] == str(ego4d / f"v2/clips/{clip}.mp4")
    for kind in ("noun", "verb"):
        assert (read_classes("ego4d", ego4d, kind).labels(train[kind]) >= 0).all()


ACTION = {"clip_uid": "c", "action_idx": 0, "action_clip_start_sec": 1.0, "action_clip_end_sec": 9.0,
          "action_clip_start_frame": 30, "action_clip_end_frame": 270, "verb": "cut", "noun": "dough"}


def small_ego4d(root, clips, place="v2/annotations"):
    (root / place).mkdir(parents=True, exist_ok=True)
    (root / place / "fho_lta_train.json").write_text(json.dumps({"split": "train", "clips": clips}))
    return root


@pytest.mark.parametrize("annotations, clips", [("v2/annotations", "v2/clips"), ("annotations", "clips"), (".", "."), ("../annotations", "clips")])
def test_ego4d_layouts(tmp_path, annotations, clips):
    root = tmp_path / "root"
    (root / clips).mkdir(parents=True)
    (root / clips / "c.mp4").touch()
    table = well_formed(read_ego4d(small_ego4d(root, [ACTION | {"clip_id": 7, "narration_text": "C cuts"}], annotations)))
    assert table["video_path"][0] == str(root / clips / "c.mp4") and table["narration"][0] == "C cuts"


def test_ego4d_classes_without_the_taxonomy(tmp_path):
    root = small_ego4d(tmp_path, [ACTION | {"noun_label": 1}, ACTION | {"noun": "arm", "noun_label": 0}])
    (root / "v2/annotations/fho_lta_val.json").write_text(json.dumps({"clips": [ACTION | {"noun": "zip", "noun_label": 2}]}))
    assert read_classes("ego4d", root, "noun").names == ("arm", "dough", "zip")


@pytest.mark.parametrize("clips, says", [
    ([], "list 'clips'"), (["c"], "list 'clips'"), ([ACTION, ACTION], "segment_id is repeated (2 rows)"),
    ([ACTION, {**ACTION, "clip_uid": None}], "row 2: no clip_uid"), ([{k: v for k, v in ACTION.items() if k != "noun"}], "row 1: no noun"),
    ([ACTION | {"action_clip_end_sec": 0.5}], "must stop after it starts (1 row)"), ([ACTION | {"action_clip_start_sec": -2}], "negative time (1 row)"),
    ([ACTION | {"action_clip_start_sec": "one"}], "action_clip_start_sec is not a number"),
    ([ACTION | {"action_clip_end_sec": float("nan")}], "action_clip_end_sec is not a number"),
    ([ACTION | {"action_clip_start_frame": 30.5}], "action_clip_start_frame is not a whole number"),
    ([ACTION | {"action_clip_end_frame": 30}], "must stop after it starts"),
    ([ACTION | {"action_clip_end_frame": 2**53 + 1}], "action_clip_end_frame is not a")])  # beyond what a float holds exactly
def test_bad_ego4d_rows(tmp_path, clips, says):
    with pytest.raises(DataError) as e:
        read_ego4d(small_ego4d(tmp_path, clips))
    assert says in str(e.value) and "fho_lta_train.json" in str(e.value), str(e.value)


@pytest.mark.parametrize("content", [b"", b'{"clips": [{"clip_u', b"\0\0\0\0", b"[]", b'{"clips": {}}', b'\xff\xfe{"clips": []}'])
def test_unreadable_ego4d_files(tmp_path, content):
    root = small_ego4d(tmp_path, [ACTION])
    (root / "v2/annotations/fho_lta_train.json").write_bytes(content)
    with pytest.raises(DataError, match="fho_lta_train.json"):
        read_ego4d(root)


def test_central_window_is_the_releases(golden):
    cases = json.loads((golden / "frame_indices.json").read_text())["ego4d"]
    assert len(cases) > 5
    for case in cases:
        assert list(central_window(case["rows"], case["L"])) == case["range"]


@given(st.lists(st.integers(0, 5000), min_size=1), st.integers(2, 12))
def test_central_window_stays_inside_and_is_central(rows, seconds):
    start, stop = central_window(np.array(rows, np.int32), seconds)
    for n, a, b in zip(rows, start, stop):
        assert central_window(n, seconds) == (a, b) and 0 <= a <= b <= n
        assert start.dtype == stop.dtype == np.int64
        assert b > a or n == 0
        per_second = n // 8
        if seconds < 8 and per_second:
            assert b - a == 2 * (per_second * (seconds // 2)) and a + b == 2 * (n // 2)


@pytest.mark.parametrize("seconds", [0, 1, -4, 2.5])
def test_central_windows_that_are_none(seconds):
    with pytest.raises(DataError, match="central window"):
        central_window(240, seconds)


# EGTEA Gaze+

@pytest.mark.parametrize("split, rows", [("test", 6065), ("test1", 2022), ("test2", 2022), ("test3", 2021),
                                         ("train1", 8299), ("train2", 8299), ("train3", 8300), ("train", 10321 - 6065)])
def test_real_egtea(egtea, split, rows):
    table = well_formed(read_egtea(egtea, split))
    assert len(table) == rows and (table["start_sec"] == 0).all() and (table["start_frame"] == 0).all()
    assert table["split"].str.startswith(split).all()
    assert (table["stop_frame"] - 1.2 * 24 * table["stop_sec"]).abs().quantile(0.99) < 3
    for kind in ("noun", "verb"):
        assert (read_classes("egtea", egtea, kind).labels(table[kind]) >= 0).all()


def test_real_egtea_rows(egtea, shared_data):
    table = read_egtea(egtea)
    lines = [line.split() for line in (shared_data / "derived/egtea_test_split_all.txt").read_text().splitlines()]
    assert list(table["segment_id"]) == [line[0] for line in lines]
    for kind, place in (("verb", 2), ("noun", 3)):
        for empty in (False, True):
            labels = read_classes("egtea", egtea, kind, empty_class=empty).labels(table[kind])
            assert list(labels) == [int(line[place]) - 1 + empty for line in lines]
    first = table.iloc[0]
    assert (first["video_id"], first["stop_sec"], first["stop_frame"]) == ("P04-R06-GreekSalad", 1.77, 51)
    assert first["video_path"] == str(egtea / f"cropped_clips/P04-R06-GreekSalad/{first['segment_id']}.mp4")
    everything = pd.concat([table, read_egtea(egtea, "train")])
    assert everything["segment_id"].is_unique and round(everything["stop_sec"].mean(), 2) == 3.48 and everything["noun"].nunique() == 51


CLIP = "OP01-R01-Pizza-1000-3500-F000024-F000084"


def small_egtea(root, line=f"{CLIP} 1 1 1 2\n"):
    (root / "action_annotation").mkdir(parents=True)
    (root / "action_annotation/noun_idx.txt").write_text("plate 1\nbowl 2\n")
    (root / "action_annotation/verb_idx.txt").write_text("Turn on 1\n")
    (root / "action_annotation/test_split1.txt").write_text(line)
    return root


def test_egtea_sessions_beside_the_annotations_and_clips_without_noun(tmp_path):
    root = small_egtea(tmp_path, f"{CLIP} 1 1\n\n")
    (root / "OP01-R01-Pizza").mkdir()
    table = well_formed(read_egtea(root, "test1"))
    assert table.loc[0, ["verb", "noun", "video_path"]].tolist() == ["Turn on", "", str(root / f"OP01-R01-Pizza/{CLIP}.mp4")]
    assert [read_classes("egtea", root, kind).names for kind in ("noun", "verb")] == [("plate", "bowl"), ("turn on",)]


@pytest.mark.parametrize("line, says", [
    (f"{CLIP} 1 2 1", "line 1"), (f"{CLIP} 1 1 3", "nouns 1 to 2"), (f"{CLIP} 1 0 1", "line 1"), (f"{CLIP} 1 1 0", "line 1"), (f"{CLIP} 1 1 x", "line 1"),
    (f"{CLIP}", "line 1"), ("OP01-R01-Pizza 1 1 1", "line 1"), (CLIP.replace("3500", "900") + " 1 1 1", "must stop after it starts"),
    (CLIP.replace("F000084", "F000024") + " 1 1 1", "must stop after it starts"), (f"{CLIP} 1 1 1\n{CLIP} 1 1 2", "repeated (2 rows)"), ("", "no segment")])
def test_bad_egtea_lines(tmp_path, line, says):
    with pytest.raises(DataError) as e:
        read_egtea(small_egtea(tmp_path, line + "\n"), "test1")
    assert says in str(e.value)


# one's own videos

def test_real_clips(shared_data):
    folder = shared_data / "real_clips"
    table = well_formed(read_csv(folder))
    raw = pd.read_csv(folder / "segments.csv")
    assert len(table) == len(raw) == 80 and list(table["segment_id"]) == list(raw["segment_id"])
    assert np.array_equal(table["start_sec"], raw["start_sec"]) and (table[["start_frame", "stop_frame"]] == -1).all(axis=None)
    assert all((folder / "videos" / f"{row.video_id}.mp4").samefile(row.video_path) for row in table.itertuples())
    assert table.groupby("video_id")["split"].nunique().max() == 1
    tests = table.query("split == 'test'")["video_id"].nunique()
    assert tests == round(0.25 * table["video_id"].nunique())
    train, test = (read_segments("csv", folder, split) for split in ("train", "test"))
    assert len(train) + len(test) == 80 and not set(train["video_id"]) & set(test["video_id"])
    nouns = read_classes("csv", folder, "noun")
    assert nouns.keys == tuple(sorted(set(raw["noun"]))) and (nouns.labels(train["noun"]) >= 0).all()


def own(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "segments.csv").write_text(text)
    return folder


@pytest.mark.parametrize("there, path", [
    ("videos/a.mp4", ""), ("videos/a.MP4", ""), ("videos/a.mkv", ""), ("videos/a.mov", ""), ("a.webm", ""), ("videos/a/0.jpg", ""),
    ("elsewhere/b.avi", "elsewhere/b.avi"), ("frames/a/0.jpg", "frames/a")])
def test_own_video_places(tmp_path, there, path):
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).touch()
    row = read_csv(own(tmp_path, f"video_id,video_path,start_sec,stop_sec\na,{path},0,1\n")).iloc[0]
    found = tmp_path / (there.rsplit("/", 1)[0] if there.endswith("jpg") else there)
    assert row["video_path"] == str(found) and row["video_id"] == "a" and row["segment_id"] == "a_0-1"


def test_own_csv_with_paths_only_and_other_columns(tmp_path):
    table = well_formed(read_csv(own(tmp_path, "start_sec, stop_sec ,video_path,mood,start_frame,stop_frame\n0,1, /data/a.mp4,good,0,25\n1,2,b.mp4,bad,,\n2,3,b.mp4,,,\n")
                                 / "segments.csv"))
    assert list(table["segment_id"]) == ["a_0-1_f0-25", "b_1-2", "b_2-3"]
    assert list(table["video_path"]) == ["/data/a.mp4", str(tmp_path / "b.mp4"), str(tmp_path / "b.mp4")]
    assert table[["start_frame", "stop_frame"]].values.tolist() == [[0, 25], [-1, -1], [-1, -1]]


@given(videos=st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=1, max_size=30), fraction=st.floats(0.01, 0.99), seed=st.randoms())
def test_own_split_is_by_video_and_stable(tmp_path_factory, videos, fraction, seed):
    folder = tmp_path_factory.mktemp("own")
    lines = [f"{video},{i},{i + 1}" for i, video in enumerate(videos)]

    def splits(lines):
        table = read_csv(own(folder, "video_id,start_sec,stop_sec\n" + "\n".join(lines) + "\n"), fraction)
        pairs = set(zip(table["video_id"], table["split"]))
        assert len(pairs) == len(set(videos))
        return dict(pairs)

    before = splits(lines)
    assert set(before.values()) == ({"train", "test"} if len(before) > 1 else {"train"})
    seed.shuffle(lines)
    assert splits(lines) == before


def test_own_split_column_and_class_files(tmp_path):
    folder = own(tmp_path, "video_id,start_sec,stop_sec,noun,split\na,0,1,cup,train\na,1,2,pan,val\n")
    assert list(read_csv(folder)["split"]) == ["train", "val"]
    with pytest.raises(DataError, match="no segment with split 'test'; found: train, val"):
        read_segments("csv", folder, "test")
    assert read_classes("csv", folder / "segments.csv", "noun").names == ("cup", "pan")
    train = read_segments("csv", folder, "train")
    assert train[["start_sec", "noun", "split"]].values.tolist() == [[0.0, "cup", "train"]]
    with pytest.raises(DataError, match="no verb in it, and no verbs.txt"):
        read_classes("csv", folder, "verb")
    (folder / "nouns.txt").write_text("pan\r\ncup\r\nmug\r\n")
    assert read_classes("csv", folder, "noun").names == ("pan", "cup", "mug")
    (folder / "nouns.txt").write_text("pan\n\ncup\n")
    with pytest.raises(DataError, match="name 2"):
        read_classes("csv", folder, "noun")


READER = """import pandas as pd

def read(root, split):
    if split == "test": return pd.DataFrame(dict(video_id=[], start_sec=[], stop_sec=[], noun=[]))
    return pd.DataFrame(dict(video_id=["a", "b"], start_sec=[0, 1.5], stop_sec=[2, 3], noun=["cup", None]), index=[7, 7])

def one_column(root, split): return pd.DataFrame(dict(video_id=["a"], start_sec=[0]))

def no_table(root, split): return {"video_id": ["a"]}
"""


def test_a_reader_of_ones_own(tmp_path):
    (tmp_path / "reader.py").write_text(READER)
    reference = f"{tmp_path / 'reader.py'}:read"
    table = well_formed(read_code(reference))
    assert table[["segment_id", "video_id", "start_sec", "stop_sec", "noun", "split"]].values.tolist() == [
        ["train_a_0-2", "a", 0.0, 2.0, "cup", "train"], ["train_b_1.5-3", "b", 1.5, 3.0, "", "train"]]
    pd.testing.assert_frame_equal(read_segments("mine", reference, "train"), table)
    assert read_classes("mine", reference, "noun").names == ("cup",)
    with pytest.raises(DataError, match="reader.py:read: no segment with split 'test'"): read_code(reference, "test")
    with pytest.raises(DataError, match="reader.py:one_column: no column stop_sec in its table; found: video_id, start_sec"):
        read_code(f"{tmp_path / 'reader.py'}:one_column")
    with pytest.raises(DataError, match="its result for split 'train' is a dict, not a pandas.DataFrame"):
        read_code(f"{tmp_path / 'reader.py'}:no_table")


@pytest.mark.parametrize("text, says", [
    ("video_id,start_sec\na,0\n", "no column stop_sec; found: video_id, start_sec"), ("start_sec,stop_sec\n0,1\n", "needs a column video_id or video_path"),
    ("video_id,start_sec,stop_sec\n", "no segment in it"),
    ("video_id,start_sec,stop_sec\na,0,1\na,2,1\n", "must stop after it starts (1 row)"), ("video_id,start_sec,stop_sec\na,-1,1\n", "negative time (1 row)"),
    ("video_id,start_sec,stop_sec\na,0:01,1\n", "start_sec is not a number"), ("video_id,start_sec,stop_sec\na,0,inf\n", "stop_sec is not a number"),
    ("video_id,start_sec,stop_sec\n,0,1\n", "without video_id"), ("segment_id,video_id,start_sec,stop_sec\nx,a,0,1\nx,b,0,1\n", "repeated (2 rows)"),
    ("segment_id,video_id,start_sec,stop_sec\n,a,0,1\n", "segment_id is empty"), ("video_id,start_sec,stop_sec,split\na,0,1,train\nb,0,1,\n", "without split"),
    ("video_path,start_sec,stop_sec\nx/a.mp4,0,1\ny/a.mp4,0,1\n", "same file name"), ("video_id,start_sec,stop_sec,start_frame,stop_frame\na,0,1,9,9\n", "start_frame '9'"),
    ("video_id,start_sec,stop_sec,start_frame,stop_frame\na,0,1,9.5,12\n", "start_frame is not a whole number")])
def test_bad_own_lists(tmp_path, text, says):
    with pytest.raises(DataError) as e:
        read_csv(own(tmp_path, text))
    assert says in str(e.value) and "segments.csv" in str(e.value), str(e.value)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 25])
def test_own_test_fraction(tmp_path, fraction):
    with pytest.raises(DataError, match="test_fraction"):
        read_csv(own(tmp_path, "video_id,start_sec,stop_sec\na,0,1\nb,0,1\n"), fraction)


def test_one_dispatcher_for_all(epic, ego4d, egtea):
    with pytest.raises(DataError, match="EPIC_100_train.csv"):
        read_segments("epic", ego4d)
    assert [len(read_segments(name, root, "test")) for name, root in (("epic", epic), ("ego4d", ego4d), ("egtea", egtea))] == [9668, 1, 6065]
    assert read_segments("epic", epic, "test", media="frames")["video_path"][0].endswith("P01/rgb_frames/P01_11")
    assert [len(read_classes(name, root, kind)) for name, root in (("epic", epic), ("ego4d", ego4d), ("egtea", egtea)) for kind in ("noun", "verb")] \
        == [300, 97, 521, 117, 53, 19]
