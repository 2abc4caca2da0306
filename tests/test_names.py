"""The file that somebody means, however its name is written; and what systems leave beside the files of others."""
import os
import pickle
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from videos import numbers_of, write_video
from world import extract_config, register_tiny, write_world
from xmic.checks import check_data
from xmic.classes import ClassSet
from xmic.cli import videos
from xmic.features import FeatureStore, extract_dataset
from xmic.files import DataError
from xmic.hands import HandBoxes, read_boxes
from xmic.mini import build
from xmic.names import VIDEO_ENDINGS, Finder, is_video, plain_name
from xmic.segments import read_classes, read_csv, read_segments
from xmic.video import probe, read_frames

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights", "ignore:no hand boxes")
NFC, NFD = (unicodedata.normalize(form, "crème brûlée") for form in ("NFC", "NFD"))
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have other names")


def csv(folder: Path, text: str) -> Path:
    (folder / "segments.csv").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("ending", [e for ending in VIDEO_ENDINGS for e in (ending, ending.upper(), ending.capitalize())])
def test_every_ending_in_every_case_is_found_by_all(tmp_path, ending):
    (tmp_path / "videos").mkdir()
    file = tmp_path / "videos" / f"IMG_1{ending}"
    file.touch()
    table = read_csv(csv(tmp_path, "video_id,start_sec,stop_sec,noun\nIMG_1,0,1,pan\n"))
    assert table.video_path[0] == str(file) and is_video(file)
    assert read_csv(csv(tmp_path, f"video_path,start_sec,stop_sec,noun\nvideos/IMG_1{ending.swapcase()},0,1,pan\n")).video_path[0] == str(file)
    assert videos([str(tmp_path / "videos")]) == [str(file)]


def test_of_several_videos_of_a_name_the_first_kind_is_taken(tmp_path):
    for name in ("a.mkv", "a.MP4", "a.avi", "a.txt", "a.json"): (tmp_path / name).touch()
    assert read_csv(csv(tmp_path, "video_id,start_sec,stop_sec\na,0,1\n")).video_path[0] == str(tmp_path / "a.MP4")
    (tmp_path / "a.mp4").touch()
    assert read_csv(csv(tmp_path, "video_id,start_sec,stop_sec\na,0,1\n")).video_path[0] == str(tmp_path / "a.mp4")


@linux
@pytest.mark.parametrize("here, there", [(NFC, NFD), (NFD, NFC)])
def test_both_forms_of_a_name_are_one(tmp_path, here, there):
    (tmp_path / "videos" / here).mkdir(parents=True)
    write_video(tmp_path / "videos" / f"{here}.mp4", 20)
    write_video(tmp_path / "videos" / here / f"{here}.mp4", 20)
    table = read_csv(csv(tmp_path, f"video_id,video_path,start_sec,stop_sec,noun\n{there},,0,.4,{there}\nb,videos/{there}/{there}.mp4,0,.4,{here}\n"))
    assert all(map(os.path.exists, table.video_path)) and list(table.noun) == [NFC, NFC] and table.video_id[0] == NFC
    assert read_classes("csv", tmp_path, "noun").names == (NFC,)
    (tmp_path / "nouns.txt").write_text(f"{there}\npan\n", encoding="utf-8")
    assert read_classes("csv", tmp_path, "noun").labels(table.noun).tolist() == [0, 0]
    (tmp_path / "hand_boxes.csv").write_text(f"segment_id,frame,left,top,right,bottom\n{there}_1,0,1,1,9,9\n", encoding="utf-8")
    assert list(read_boxes(tmp_path / "hand_boxes.csv")) == [f"{NFC}_1"]
    assert probe(tmp_path / "videos" / f"{there}.mp4").frames == 20
    assert videos([str(tmp_path / "videos" / f"{there}.mp4")]) == [str(tmp_path / "videos" / f"{here}.mp4")]


@linux
def test_backslashes_of_a_list_that_was_made_on_windows(tmp_path):
    (tmp_path / "videos" / "day 1").mkdir(parents=True)
    file = write_video(tmp_path / "videos" / "day 1" / "a.mp4", 20)
    table = read_csv(csv(tmp_path, "video_path,start_sec,stop_sec,noun,split\nvideos\\day 1\\a.MP4,0,.4,pan,train\n"))
    assert table.video_path[0] == str(file) and table.video_id[0] == "a"
    check = check_data("csv", csv(tmp_path, "video_path,start_sec,stop_sec,noun,split\nD:\\films\\a.mp4,0,.4,pan,train\n"), progress=False)
    assert "path of another computer" in " ".join(str(check).split()) and "D:\\films\\a.mp4" in str(check)


@linux
@pytest.mark.parametrize("name", [b"K\xfcche.mp4", "Küche (2).mp4".encode(), b"a b'c\"d.mp4", b"-rf.mp4", b"12:30.mp4", b"100%d.mp4", b"a#b?c&d.mp4", b"$HOME.mp4",
                                  b"file:x.mp4", b"*.mp4", b"[a].mp4", b"a\\b.mp4", b" a .mp4", b"concat:a|b.mp4"], ids=repr)
def test_strange_names_are_read(tmp_path, monkeypatch, name):
    path = os.fsencode(tmp_path) + b"/" + name
    os.rename(write_video(tmp_path / "made.mp4", 20), path)
    monkeypatch.chdir(tmp_path)
    for given in (os.fsdecode(path), os.fsdecode(name)):
        for backend in ("decord", "pyav"): assert numbers_of(read_frames(given, [3, 19], backend)) == [3, 19]
    assert videos([str(tmp_path)]) == [os.fsdecode(path)] and videos([os.fsdecode(name)]) == [os.fsdecode(name)]


@linux
def test_a_name_that_is_not_utf8_is_meant_by_its_text(tmp_path):
    (tmp_path / "videos").mkdir()
    os.rename(write_video(tmp_path / "made.mp4", 20), os.fsencode(tmp_path) + b"/videos/K\xfcche.mp4")
    world = csv(tmp_path, "video_id,start_sec,stop_sec,noun,split\nKüche,0,.4,pan,test\n")
    assert plain_name("K\udcfcche") == "Küche" and os.path.exists(read_csv(world).video_path[0])
    register_tiny()
    store, report = extract_dataset(extract_config(world, tmp_path / "features", splits=["test"], views=["full"]))
    assert report.extracted == 1 and store.verify(read_csv(world)) == []
    assert check_data("csv", world, progress=False).facts["Videos"]["there"] == 1


def hide(folder: Path, *names: str) -> None:
    "What macOS leaves beside files on other disks, and more of the kind."
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*names, ".DS_Store"): (folder / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")


def test_hidden_files_are_no_data(tmp_path):
    register_tiny()
    world = write_world(tmp_path / "world", videos=2, frames=60)
    hide(world / "videos", "._v0.mp4", "._v1.mp4", "._v0.MP4")
    assert len(videos([str(world / "videos")])) == 2
    with pytest.raises(DataError, match="neither videos"):
        hide(tmp_path / "none", "._a.mp4", "._frame_0000000001.jpg")
        videos([str(tmp_path / "none")])
    store, report = extract_dataset(extract_config(world, tmp_path / "features", splits=["test"]))
    hide(store.root / "full", "._v0.safetensors", "._manifest.json", "._index.json")
    hide(store.root / ".Trash", "manifest.json")
    again, report = extract_dataset(extract_config(world, tmp_path / "features", splits=["test"]))
    assert report.present == 4 and again.views == ["full", "hand"] and again.verify() == [] and FeatureStore(store.root).views == ["full", "hand"]


def test_hidden_pickles_are_no_boxes(tmp_path):
    with open(tmp_path / "train.pkl", "wb") as file: pickle.dump({"a": {0: (1, 1, 9, 9)}}, file)
    hide(tmp_path, "._train.pkl")
    hide(tmp_path / ".Trashes", "b.pkl")
    assert HandBoxes.from_boxes(tmp_path).segments == ["a"]
    hide(tmp_path / "P01", "._P01_01.pkl")
    assert HandBoxes.from_boxes(tmp_path).segments == ["a"]


def test_hidden_pictures_are_no_frames(tmp_path):
    for n in (1, 2, 3): Image.fromarray(np.full((8, 8, 3), 20 * n, np.uint8)).save(tmp_path / f"frame_{n:010d}.jpg")
    hide(tmp_path, "._frame_0000000001.jpg", "._frame_0000000009.jpg", "._a_1.png")
    assert probe(tmp_path).frames == 3


def test_official_datasets_in_other_containers(tmp_path):
    "Somebody who has converted the videos need not rename anything."
    build(root=str(tmp_path / "mini"), size="tiny", progress=False)
    for dataset in ("epic", "ego4d", "egtea"):
        before = read_segments(dataset, tmp_path / "mini" / dataset, "test").video_path
        for path in map(Path, before.unique()): path.rename(path.with_suffix(".MKV"))
        after = read_segments(dataset, tmp_path / "mini" / dataset, "test").video_path
        assert list(after) == [str(Path(p).with_suffix(".MKV")) for p in before] and all(map(os.path.exists, after))


@pytest.fixture
def open_place() -> Iterator[Path]:
    "A folder that other users may look into, unlike those of pytest."
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


READ_ONLY = """
import os, sys
from xmic.checks import check_data
from xmic.features import FeatureStore
from xmic.segments import read_csv
from xmic.video import read_frames
world, root = sys.argv[1:]
check_data("csv", world, features_root=root + "/../..", progress=False)  # imports what it needs, which the other user may not be able to
os.setuid(65534)
segments = read_csv(world)
assert not os.access(world, os.W_OK) and not os.access(root, os.W_OK)
store = FeatureStore(root)
assert store.verify(segments) == [] and store.missing(segments).empty and len(store.segment("v0_0", "full"))
assert read_frames(segments.video_path[0], [0, 5]).shape[0] == 2
assert check_data("csv", world, features_root=root + "/../..", progress=False).facts["Videos"]["there"] == 2
"""


@linux
def test_read_only_folders(open_place):
    "Data and a store, read by somebody who may not write there."
    if os.getuid() != 0: pytest.skip("only root can give up its rights")
    register_tiny()
    world = write_world(open_place / "world", videos=2, frames=60)
    store, _ = extract_dataset(extract_config(world, open_place / "features", splits=["test"]))
    for path in (p for place in (world, open_place / "features") for p in (place, *place.rglob("*"))): path.chmod(0o555 if path.is_dir() else 0o444)
    done = subprocess.run([sys.executable, "-c", READ_ONLY, str(world), str(store.root)], capture_output=True, text=True, cwd="/",
                          env=os.environ | dict(PYTHONPATH=str(Path(__file__).resolve().parents[1]), HOME="/nonexistent"))
    if "Permission denied" in done.stderr and str(open_place) not in done.stderr: pytest.skip("other users may not read the package here")
    assert done.returncode == 0, done.stderr
