"""Exports of annotation tools: what each format means, and files that mean harm."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from videos import write_video
from world import contents
from xmic.annotation_tools import convert, read_exports, read_marks
from xmic.files import DataError
from xmic.segments import read_csv

BIN = Path(sys.executable).parent


def put(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    if isinstance(content, bytes): path.write_bytes(content)
    else: path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def rows(path: Path, **reading) -> list[list]:
    return read_exports([path], **reading).values.tolist()


# ELAN

def eaf(slots: str, tiers: str, media: str = '<MEDIA_DESCRIPTOR MEDIA_URL="file:///C:/films/my%20kitchen.mp4" MIME_TYPE="video/mp4"/>') -> str:
    return (f'\ufeff<?xml version="1.0" encoding="UTF-8"?><ANNOTATION_DOCUMENT AUTHOR="" DATE="" FORMAT="3.0" VERSION="3.0"><HEADER TIME_UNITS="milliseconds">{media}'
            f"</HEADER><TIME_ORDER>{slots}</TIME_ORDER>{tiers}</ANNOTATION_DOCUMENT>")


def slots(*times: int | None) -> str:
    return "".join(f'<TIME_SLOT TIME_SLOT_ID="ts{i}"{"" if t is None else f" TIME_VALUE={chr(34)}{t}{chr(34)}"}/>' for i, t in enumerate(times))


def tier(name: str, *annotations: tuple[str, str, str], parent: str = "") -> str:  # id, "ts0 ts1" or the id of another, text
    made = []
    for one, at, text in annotations:
        refs = at.split()
        kind = "ALIGNABLE" if len(refs) == 2 else "REF"
        where = f'TIME_SLOT_REF1="{refs[0]}" TIME_SLOT_REF2="{refs[1]}"' if len(refs) == 2 else f'ANNOTATION_REF="{at}"'
        made.append(f'<ANNOTATION><{kind}_ANNOTATION ANNOTATION_ID="{one}" {where}><ANNOTATION_VALUE>{text}</ANNOTATION_VALUE></{kind}_ANNOTATION></ANNOTATION>')
    return f'<TIER LINGUISTIC_TYPE_REF="default-lt" TIER_ID="{name}"{f" PARENT_REF={chr(34)}{parent}{chr(34)}" if parent else ""}>{"".join(made)}</TIER>'


def test_elan_with_a_referring_tier_and_the_origin_of_the_video(tmp_path):
    tiers = tier("verb", ("a1", "ts0 ts1", "cut\n up"), ("a2", "ts2 ts3", "mix")) + tier("noun", ("a3", "a1", "onion"), ("a4", "a3", "garlic"), parent="verb")
    media = '<MEDIA_DESCRIPTOR MEDIA_URL="file:///a.wav" MIME_TYPE="audio/x-wav"/><MEDIA_DESCRIPTOR MEDIA_URL="" RELATIVE_MEDIA_URL="./b.mp4" MIME_TYPE="video/mp4" TIME_ORIGIN="250"/>'
    path = put(tmp_path, "a.eaf", eaf(slots(500, 2000, 3000, 3500), tiers, media))
    assert rows(path) == [["b", 0.75, 2.25, "cut up", "onion"], ["b", 0.75, 2.25, "", "garlic"], ["b", 3.25, 3.75, "mix", ""]]
    assert rows(put(tmp_path, "c.eaf", eaf(slots(500, 2000), tier("verb", ("a1", "ts0 ts1", "cut")), "")))[0][0] == "c"
    assert rows(put(tmp_path, "d.eaf", eaf(slots(500, 2000), tier("verb", ("a1", "ts0 ts1", "cut")))))[0][0] == "my kitchen"


def test_elan_spreads_points_without_a_time(tmp_path):
    path = put(tmp_path, "a.eaf", eaf(slots(0, None, None, 3000), tier("verb", ("a1", "ts0 ts1", "a"), ("a2", "ts1 ts2", "b"), ("a3", "ts2 ts3", "c"))))
    assert [row[1:3] for row in rows(path)] == [[0, 1], [1, 2], [2, 3]]


@pytest.mark.parametrize("tiers, words", [
    (tier("verb", ("a1", "a2", "cut"), ("a2", "a1", "mix")), "refers to 'a[12]', which has no times"), (tier("verb", ("a1", "none", "cut")), "refers to 'none'"),
    (tier("verb", ("a1", "ts0 ts9", "cut")), "not an export of ELAN"), (tier("verb", ("a1", "ts1 ts0", "cut")), "must stop after it starts"), ("", "no labelled stretch"),
    (tier("Handlung", ("a1", "ts0 ts1", "cut")), "no layer is called verb or noun; it has 'Handlung' \\(1 label\\).*--verb LAYER")])
def test_elan_with_faults(tmp_path, tiers, words):
    with pytest.raises(DataError, match=words): read_exports([put(tmp_path, "a.eaf", eaf(slots(0, 1000), tiers))])


# CVAT

def cvat(body: str, meta: str = "<task><id>7</id><source>kitchen.mp4</source></task>") -> str:
    return f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version><meta>{meta}</meta>{body}</annotations>'


def track(label: str, frames: dict[int, str | None], task: str = "") -> str:  # frame -> value of the attribute noun; None: outside
    boxes = "".join(f'<box frame="{n}" outside="{int(v is None)}" keyframe="1" xtl="0" ytl="0" xbr="1" ybr="1"><attribute name="noun">{v or "x"}</attribute></box>' for n, v in frames.items())
    return f'<track id="0" label="{label}"{task}>{boxes}</track>'


def test_cvat_stretches_end_where_a_track_or_a_value_does(tmp_path):
    body = track("cut", {10: "pan", 11: "pan", 12: "cup", 13: "cup", 14: None, 20: "cup", 21: None})
    path = put(tmp_path, "annotations.xml", cvat(body))
    assert rows(path, noun="noun", fps=10) == [["kitchen", 1.0, 1.2, "pan"], ["kitchen", 1.2, 1.4, "cup"], ["kitchen", 2.0, 2.1, "cup"]]
    assert rows(path, verb="label", fps=10) == [["kitchen", 1.0, 1.2, "", "pan"], ["kitchen", 1.0, 1.4, "cut", ""], ["kitchen", 1.2, 1.4, "", "cup"], ["kitchen", 2.0, 2.1, "cut", "cup"]]


def test_cvat_frames_with_a_step_several_tasks_and_tags(tmp_path):
    meta = "<task><id>7</id><source>a.mp4</source><frame_filter>step=5</frame_filter></task>"
    assert rows(put(tmp_path, "a.xml", cvat(track("cut", {0: "p", 5: "p", 10: None}), meta)), verb="label", fps=10)[0][:4] == ["a", 0.0, 1.0, "cut"]
    meta = "<project><tasks><task><id>1</id><source>a.mp4</source></task><task><id>2</id><source>x/b.mp4</source></task></tasks></project>"
    body = track("cut", {0: "p", 1: None}, ' task_id="1"') + track("mix", {0: "p", 1: None}, ' task_id="2"')
    assert [row[0] for row in rows(put(tmp_path, "b.xml", cvat(body, meta)), verb="label", fps=10)] == ["a", "b"]
    images = "".join(f'<image id="{n}" name="frame_{n:06}" width="9" height="9">{"<tag label=" + chr(34) + "cut" + chr(34) + "></tag>" if n not in (2, 3) else ""}</image>' for n in range(6))
    assert [row[1:] for row in rows(put(tmp_path, "c.xml", cvat(images)), verb="label", fps=1)] == [[0, 2, "cut"], [4, 6, "cut"]]


def test_frames_are_those_of_the_video(tmp_path):
    write_video(tmp_path / "kitchen.mp4", frames=20, fps=25)
    path = put(tmp_path, "annotations.xml", cvat(track("cut", {5: "p", 6: "p", 7: None}) + track("mix", {18: "p", 19: "p"})))
    with pytest.raises(DataError, match="19 frames|20 frames"): rows(put(tmp_path, "long.xml", cvat(track("cut", {500: "p"}))), verb="label")
    table = convert([path], tmp_path / "segments.csv", verb="label")
    assert np.allclose(table[["start_sec", "stop_sec"]], [[0.2, 0.28], [0.72, 0.8]])
    from xmic.clips import wanted_frames
    from xmic.video import probe
    found = read_csv(tmp_path / "segments.csv")
    assert [wanted_frames(probe(row.video_path), row).tolist() for row in found.itertuples()] == [[5, 6], [18, 19]]
    with pytest.raises(DataError, match="other.mp4 was not found: name the folder with the videos, --videos"):
        rows(put(tmp_path, "o.xml", cvat(track("cut", {5: "p"}), "<task><source>other.mp4</source></task>")), verb="label")


# VIA

VIA = {"project": {}, "config": {}, "file": {"1": {"fid": "1", "fname": "a.wav", "type": 8}, "2": {"fid": "2", "fname": "kitchen.mp4", "type": 4, "src": ""}},
       "view": {"1": {"fid_list": ["1", "2"]}},
       "attribute": {"1": {"aname": "Verbs", "anchor_id": "FILE1_Z2_XY0", "type": 4, "options": {"0": "cut", "1": "mix"}},
                     "2": {"aname": "Object", "anchor_id": "FILE1_Z2_XY0", "type": 2, "options": {"0": "pan", "1": "cup"}},
                     "3": {"aname": "Region", "anchor_id": "FILE1_Z1_XY1", "type": 1, "options": {}}},
       "metadata": {"1_a": {"vid": "1", "flg": 0, "z": [0.5, 2.0], "xy": [], "av": {"1": "1", "2": "0,1"}},
                    "1_b": {"vid": "1", "flg": 0, "z": [0.7], "xy": [2, 1, 1, 5, 5], "av": {"3": "hand"}}}}
VIA_CSV = '''# Exported using VGG Image Annotator (http://www.robots.ox.ac.uk/~vgg/software/via)
# ATTRIBUTE = {"1":{"aname":"verb","anchor_id":"FILE1_Z2_XY0","type":4,"desc":"","options":{"0":"cut","1":"mix"},"default_option_id":""}}
# CSV_HEADER = metadata_id,file_list,flags,temporal_coordinates,spatial_coordinates,metadata
"1_a","[""kitchen.mp4""]",0,"[0.5,2]","[]","{""1"":""1""}"
"1_b","[""kitchen.mp4""]",0,"[0.7]","[2,1,1,5,5]","{}"
'''


def test_via_projects_and_csv(tmp_path):
    assert rows(put(tmp_path, "via.json", VIA)) == [["kitchen", 0.5, 2.0, "mix", "pan"], ["kitchen", 0.5, 2.0, "", "cup"]]
    assert rows(put(tmp_path, "via.csv", VIA_CSV)) == [["kitchen", 0.5, 2.0, "mix"]]
    with pytest.raises(DataError, match="VIA 2"): read_marks(put(tmp_path, "via2.json", {"_via_settings": {}, "_via_img_metadata": {}}))


# Label Studio

def task(result: list, video: str = "/data/upload/1/1a2b3c4d-kitchen.mp4", **more) -> dict:
    return {"id": 1, "data": {"video": video}, "annotations": [{"was_cancelled": False, "result": result} | more]}


def region(start: int, end: int, text: str, name: str = "verb") -> dict:
    return {"id": text, "type": "timelinelabels", "from_name": name, "to_name": "video", "value": {"ranges": [{"start": start, "end": end}], "timelinelabels": [text]}}


def test_label_studio_frames_count_from_1_with_the_last(tmp_path):
    path = put(tmp_path, "project.json", [task([region(1, 24, "cut"), region(25, 25, "mix"), region(1, 24, "pan", "noun")])])
    assert rows(path, fps=24) == [["kitchen", 0.0, 1.0, "cut", "pan"], ["kitchen", 1.0, 1.041667, "mix", ""]]
    with pytest.raises(DataError, match="frameRate of the <Video> tag.*--fps 24"): rows(path)


def test_label_studio_minimal_seconds_and_annotators(tmp_path):
    assert rows(put(tmp_path, "min.json", [{"id": 1, "video": "/data/local-files/?d=films/kitchen.mp4", "verb": [{"ranges": [{"start": 1, "end": 24}], "timelinelabels": ["cut"]}]}]),
                fps=24) == [["kitchen", 0.0, 1.0, "cut"]]
    sound = {"type": "labels", "from_name": "verb", "value": {"start": 0.5, "end": 2, "labels": ["cut"], "channel": 0}}
    assert rows(put(tmp_path, "sound.json", [task([sound])])) == [["kitchen", 0.5, 2.0, "cut"]]
    two = task([sound])
    two["annotations"] += [{"was_cancelled": False, "result": [sound | {"value": {"start": 1, "end": 2, "labels": ["mix"]}}]}, {"was_cancelled": True, "result": [sound]}]
    with pytest.raises(DataError, match="task 1 has 2 annotations, and none of them is marked as ground truth"): rows(put(tmp_path, "two.json", [two]))
    two["annotations"][1]["ground_truth"] = True
    assert rows(put(tmp_path, "two.json", [two])) == [["kitchen", 1.0, 2.0, "mix"]]


# Files that mean harm

LAUGHS = "<!DOCTYPE a [<!ENTITY x0 'ha'>" + "".join(f"<!ENTITY x{i} '{f'&x{i - 1};' * 10}'>" for i in range(1, 12)) + "]><ANNOTATION_DOCUMENT>&x11;</ANNOTATION_DOCUMENT>"


@pytest.mark.parametrize("content, words", [
    (LAUGHS, "declares a document type"), ('<!DOCTYPE a SYSTEM "http://localhost:1/x.dtd"><annotations/>', "declares a document type"),
    ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotations>&x;</annotations>', "declares a document type"),
    ("<annotations>" * 100_000, "nested more than 100 deep"), ("<annotations><a></annotations>", "not readable as XML"), ("<html></html>", "no export of Label Studio"),
    ("[" * 100_000, "nested too deep"), ("{}", "no export"), ("[1]", "no export"), ("", "no export"), (b"PK\x03\x04", "zip archive"), (b"\x00\x01", "no export"),
    ([{"data": {"video": "a.mp4"}, "annotations": [{"result": [{"value": {"ranges": [{"start": 10**400, "end": 2}], "labels": ["a"]}}]}]}], "not an export of Label Studio"),
    ([{"data": {"video": "a.mp4"}, "annotations": 5}], "not an export of Label Studio"), (VIA | {"metadata": {"a": {"z": [0, 1], "av": {"1": "0"}, "vid": "9"}}}, "not an export of VIA"),
    (VIA | {"metadata": {"a": {"z": ["nan", 1], "av": {"1": "0"}, "vid": "1"}}}, "not an export of VIA")])
def test_hostile_files_do_nothing(tmp_path, content, words):
    path = put(tmp_path, "export", content)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=words): convert([path], tmp_path / "out.csv")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", r"C:\secret\passwd", "file:///etc/passwd", "https://example.com/a/passwd?x=1", "/data/local-files/?d=../../etc/passwd"])
def test_paths_of_others_are_names_of_files_alone(tmp_path, name):
    (tmp_path / "mine").mkdir()
    convert([put(tmp_path, "p.json", [task([{"type": "labels", "from_name": "verb", "value": {"start": 0, "end": 1, "labels": ["cut"]}}], name)])], tmp_path / "mine/segments.csv")
    row = read_csv(tmp_path / "mine").iloc[0]
    assert row.video_id == "passwd" and Path(row.video_path).is_relative_to(tmp_path / "mine")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["data", "annotations", "result", "value", "ranges", "start", "end", "labels", "video", "metadata",
                                                                                                 "attribute", "file", "view", "z", "av", "vid", "fid_list", "1"]), inner, max_size=6), max_leaves=25)


@given(JSON)
def test_any_json_is_read_or_refused(tmp_path_factory, content):
    path = put(tmp_path_factory.getbasetemp(), "any.json", json.dumps(content))
    try: read_marks(path)
    except DataError: pass


def test_videos_that_differ_in_their_ending_alone_are_refused(tmp_path):
    made = [put(tmp_path, f"{i}.json", [task([region(1, 9, "cut")], f"kitchen.{end}")]) for i, end in enumerate(("mp4", "mkv"))]
    with pytest.raises(DataError, match="same name but for the ending"): read_exports(made, fps=24)


# The command

def test_the_command(tmp_path):
    call = lambda *words: subprocess.run([BIN / "xmic", "convert", *map(str, words)], capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    path, out = put(tmp_path, "via.json", VIA), tmp_path / "mine" / "segments.csv"
    done = call(path, "--to", out)
    assert done.returncode == 0 and "2 segments of 1 videos, 1 verbs, 2 nouns" in done.stderr and f"xmic check-data csv {out.parent}" in done.stderr
    pd.testing.assert_frame_equal(pd.read_csv(out, keep_default_na=False), read_exports([path]))
    before = out.read_bytes()
    assert "--overwrite" in (done := call(path, "--to", out, "--verb", "Verbs")).stderr and done.returncode == 1 and out.read_bytes() == before
    assert call(path, "--to", out, "--overwrite").returncode == 0
    assert "inputs are never overwritten" in (done := call(path, "--to", path, "--overwrite")).stderr and done.returncode == 1
    assert json.loads(path.read_text()) == VIA
    assert "no layer 'Verb' for verb; did you mean 'Verbs'?" in (done := call(path, "--to", tmp_path / "x.csv", "--verb", "Verb")).stderr and done.returncode == 1
