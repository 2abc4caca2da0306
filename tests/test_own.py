"""A user's own data: annotate, extract, train, correct, and again; what the checks say of hand-made lists; zero-shot CLIP beside a run."""
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from test_changed_data import same_as_anew
from test_training import make_dataset
from world import extract_config, register_tiny, write_world
from xmic.adapter import ZeroShot
from xmic.checks import check_data
from xmic.config import TrainConfig, resolve
from xmic.evaluation import against_zero_shot
from xmic.features import FeatureStore, extract_dataset, read_shard, write_shard
from xmic.files import DataError, read_json, write_json
from xmic.own import is_placeholder, recording, unit_of
from xmic.segments import own_faults, read_classes, read_csv, read_segments
from xmic.training import RunResult, run_folder, run_name, train

pytestmark = [pytest.mark.filterwarnings("ignore:.*RANDOM weights"), pytest.mark.filterwarnings("ignore:no hand boxes")]


@pytest.fixture
def world(tmp_path) -> Path:
    "Videos and a list without segment_id."
    register_tiny()
    root = write_world(tmp_path / "world", videos=4, frames=60)
    pd.read_csv(root / "segments.csv").drop(columns="segment_id").to_csv(root / "segments.csv", index=False)
    (root / "hand_boxes.csv").unlink()  # of other ids
    return root


def change(root: Path, how) -> pd.DataFrame:
    table = how(pd.read_csv(root / "segments.csv", keep_default_na=False))
    table.to_csv(root / "segments.csv", index=False)
    return table


def listed(tmp_path: Path, *lines: str, head: str = "video_id,start_sec,stop_sec,verb,noun,split", name: str = "mine") -> Path:
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / "segments.csv").write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    return tmp_path / name


# Ids

def test_ids_come_from_videos_and_times(world):
    before = read_csv(world)
    change(world, lambda t: pd.concat([t.iloc[:1].assign(start_sec=0.0, stop_sec=0.4), t.sample(frac=1, random_state=1)]).assign(noun="tap"))
    after = read_csv(world)
    assert set(before.segment_id) < set(after.segment_id) and len(after) == len(before) + 1
    places = lambda t: t.set_index("segment_id")[["video_id", "start_sec", "stop_sec"]].loc[before.segment_id]
    pd.testing.assert_frame_equal(places(before), places(after))


@pytest.mark.parametrize("first, second", [("a,,0,1,,", "a,,0.0,1.000,,"), ("a,x/a.mp4,0,1,,", "a,x/a.mp4,0,1,,")])
def test_the_same_span_twice_is_counted(tmp_path, first, second):
    root = listed(tmp_path, first, second, head="video_id,video_path,start_sec,stop_sec,start_frame,stop_frame")
    assert list(read_csv(root).segment_id) == ["a_0-1", "a_0-1_2"]


def test_other_files_and_other_frames_of_one_video_have_other_ids(tmp_path):
    lines = ["a,x.mp4,0,1,,", "a,y.mp4,0,1,,", "a,y.mp4,0,1,5,9", "a,y.mp4,0,1,6,9"]
    head = "video_id,video_path,start_sec,stop_sec,start_frame,stop_frame"
    one, other = read_csv(listed(tmp_path, *lines, head=head)), read_csv(listed(tmp_path, *lines[::-1], head=head, name="turned"))
    key = lambda t: dict(zip(t.segment_id, zip(t.video_path.map(lambda p: Path(p).name), t.start_frame)))
    assert len(set(one.segment_id)) == 4 and key(one) == key(other)


# Annotate, extract, train; correct; again

def config_of(world: Path, tmp_path: Path, **changes) -> TrainConfig:
    return TrainConfig(dataset="csv", data_root=str(world), features_root=str(tmp_path / "features"), encoder=register_tiny(), weights="random",
                       runs_root=str(tmp_path / "runs"), device="cpu", progress=False, **{"method": "zero_shot"} | changes)


def test_the_whole_loop(world, tmp_path):
    extract = lambda: extract_dataset(extract_config(world, tmp_path / "features"))
    config = config_of(world, tmp_path, epochs=1, warmup_epochs=0, batch_size=4, method="xmic")
    _, report = extract()
    first = train(config)
    assert report.extracted == 8 and first.folder == run_folder(resolve(config))

    change(world, lambda t: t.assign(noun=t.noun.map(dict(zip(sorted(set(t.noun)), sorted(set(t.noun))[::-1])))))  # labels
    _, report = extract()
    assert (report.extracted, report.present) == (0, 8)
    with pytest.warns(UserWarning, match="the nouns of the te.*have changed since"): second = train(config)
    assert second.metrics["data"] != first.metrics["data"]

    change(world, lambda t: t.assign(stop_sec=[0.9, *t.stop_sec[1:]]))  # times
    with pytest.warns(UserWarning, match="1 of the . t.* segments of csv have no features and are left out"): train(replace(config, name="early"))
    store, report = extract()
    assert (report.extracted, report.present) == (1, 7) and same_as_anew_of(store, world, tmp_path)

    change(world, lambda t: pd.concat([t.iloc[:3], t.iloc[:1].assign(start_sec=0.0, stop_sec=0.4), t.iloc[3:]]))  # a row
    store, report = extract()
    assert (report.extracted, report.present) == (1, 8) and same_as_anew_of(store, world, tmp_path)
    with pytest.warns(UserWarning, match="ids or times"): run = train(config)
    fresh = train(replace(config, name="fresh"))
    assert run.metrics["results"] == fresh.metrics["results"] and run.metrics["segments"] == fresh.metrics["segments"]


def same_as_anew_of(store: FeatureStore, world: Path, tmp_path: Path) -> bool:
    "What the list names is as an extraction from nothing has it."
    shutil.rmtree(tmp_path / "anew", ignore_errors=True)
    anew = extract_dataset(extract_config(world, tmp_path / "anew"))[0]
    return all(torch.equal(store.segment(i, "full"), anew.segment(i, "full")) for i in read_csv(world).segment_id)


def count_rows(root: Path, world: Path, origins: bool = True) -> None:
    "Stores features under the ids that earlier versions gave."
    counted = read_csv(world)
    counted = dict(zip(counted.segment_id, counted.video_id + "_" + (counted.groupby("video_id").cumcount() + 1).astype(str)))
    for path in root.rglob("*.safetensors"):
        features, frames, header = read_shard(path)
        rows = list(header["segments"].values())
        parts = zip(header["segments"], features.clone().split(rows), np.split(frames.numpy().copy(), np.cumsum(rows)[:-1]))
        from xmic.features import _origins
        known = {counted[i]: o for i, o in _origins(header).items()} if origins else {}
        write_shard(path, [(counted[i], f, n) for i, f, n in parts], known)
    for path in root.rglob("index.json"): path.unlink()


def test_stored_ids_that_count_rows_are_renamed_where_the_times_say_so(world, tmp_path):
    extract_dataset(extract_config(world, tmp_path / "features"))
    count_rows(tmp_path / "features", world)
    change(world, lambda t: pd.concat([t.iloc[:1].assign(start_sec=0.0, stop_sec=0.4), t]))  # v0_1 would be this one now
    with pytest.raises(DataError, match="under ids that count rows, such as 'v._1', which may be those of other rows by now"): train(config_of(world, tmp_path))
    store, report = extract_dataset(extract_config(world, tmp_path / "features"))
    assert (report.renamed, report.present, report.extracted) == (8, 8, 1) and "8 were there under ids that counted rows" in repr(report)
    assert same_as_anew(store, world, tmp_path) and store.verify(read_csv(world)) == []
    assert extract_dataset(extract_config(world, tmp_path / "features"))[1].renamed == 0


def test_stored_ids_that_count_rows_of_unknown_origin_are_never_read(world, tmp_path):
    extract_dataset(extract_config(world, tmp_path / "features"))
    count_rows(tmp_path / "features", world, origins=False)
    store, report = extract_dataset(extract_config(world, tmp_path / "features"))
    assert (report.renamed, report.present, report.extracted) == (0, 0, 8) and same_as_anew_of(store, world, tmp_path)
    train(config_of(world, tmp_path))


def test_boxes_under_ids_that_count_rows_are_refused(world, tmp_path):
    (world / "hand_boxes.csv").write_text("segment_id,frame,left,top,right,bottom\nv0_1,0,1,1,9,9\n")
    with pytest.raises(DataError, match="hand_boxes.csv: names segments by their rows, such as 'v0_1'.*such as 'v"):
        extract_dataset(extract_config(world, tmp_path / "features", views=["full", "hand"]))


def test_features_of_a_video_of_the_same_name_elsewhere_are_refused(world, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(world, other)
    for a, b in ((0, 1), (1, 2), (2, 3), (3, 0)): shutil.copy(world / f"videos/v{a}.mp4", other / f"videos/v{b}.mp4")
    for root in (world, other): extract_dataset(extract_config(root, tmp_path / "features"))
    train(config_of(other, tmp_path))
    with pytest.raises(DataError, match="a replaced video"): train(config_of(world, tmp_path))


# Names of runs

def test_two_folders_have_two_runs(world, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(world, other)
    one, two = (resolve(config_of(root, tmp_path)) for root in (world, other))
    assert run_name(one) != run_name(two) and run_name(one).rsplit("-", 1)[0] == run_name(two).rsplit("-", 1)[0]
    target = resolve(config_of(world, tmp_path, targets=["mine"], target_roots={"mine": str(other)}))
    moved = resolve(config_of(world, tmp_path, targets=["mine"], target_roots={"mine": str(world)}))
    assert run_name(target) != run_name(moved)
    assert run_name(resolve(TrainConfig(leave_last_frame=False))) == "epic-noun-xmic-seed0-15c44a18"  # as ever


def test_a_run_of_an_earlier_version_keeps_its_folder(world, tmp_path):
    extract_dataset(extract_config(world, tmp_path / "features"))
    config = config_of(world, tmp_path)
    made = train(replace(config, name=run_name(resolve(config), by_place=False)))
    write_json(made.folder / "config.json", dict(read_json(made.folder / "config.json"), name=None))
    assert train(config).folder == made.folder and RunResult.read(made.folder).metrics == made.metrics
    other = tmp_path / "other"
    shutil.copytree(world, other)
    assert run_folder(resolve(config_of(other, tmp_path))) != made.folder


# Lists with faults

def test_both_unicode_forms_of_a_name_are_one_class(tmp_path):
    root = listed(tmp_path, "a,0,1,cut,caf\u00e9,train", "b,0,1,cut,cafe\u0301,test")
    assert not [f for f in own_faults(root) if "differ only" in f.text] and read_classes("csv", root, "noun").names == ("caf\u00e9",)


@pytest.mark.parametrize("lines, level, words, rows", [
    (["a,0,1,Cut,pan,train", "b,0,1,cut,pan,test", "c,0,1,cut,pan,test"], "problem", "'Cut', 'cut' differ only in case or spacing", 1),
    (["a,0,1,cut  up,pan,train", "b,0,1,cut up,pan,test"], "problem", "differ only in case or spacing", 1),
    (["a,0,1,n/a,pan,train", "b,0,1,cut,pan,test"], "problem", "'n/a' stands for no name", 1),
    (["a,0,1,cut,pan,training", "b,0,1,cut,pan,test"], "problem", "1 segment has split 'training', which is neither train nor test", 1),
    (["a,0,1,cut,pan,train", "b,0,1,cut,pan,val", "c,0,1,cut,pan,test"], "warning", "1 segment has split 'val'", 1),
    (["a,0,1,cut,pan,train", "a,0,1.0,cut,pan,test"], "problem", "1 segment stands in training and in test", 2),
    (["GX010007,0,1,cut,pan,train", "GX020007,0,1,cut,pan,test"], "warning", "Chapters of one recording are in training and in test: GX010007, GX020007", 2),
    (["a,0,1,cut,pan,train", "a,1,2,cut,pan,test"], "warning", "1 video is in training and in test: a", 2),
    (["a,100,1900,cut,pan,train", "b,100,1900,cut,pan,test"], "warning", "look like milliseconds or frame numbers", 2),
    (["a,0,1,cut_up,pan,train", "b,0,1,cut up,pan,test"], "warning", "differ only in hyphens, underscores", 1),
    (["a,0,1,cut,pan,train", "b,0,1,cut,pan,test", "b,1,2,mix,pan,test"], "warning", "1 verb has one segment only", 1)])
def test_faults_of_own_lists(tmp_path, lines, level, words, rows):
    root = listed(tmp_path, *lines)
    (fault,) = [f for f in own_faults(root) if words in f.text]
    assert fault.level == level and len(fault.rows) == rows and fault.todo and all(row.startswith("row ") for row in fault.rows)
    check = check_data("csv", root, features_root=tmp_path / "features", progress=False)
    (found,) = [f for f in check.findings if words in f.text]
    assert found.level == level and fault.rows[0] in found.text and found.todo == fault.todo
    config = config_of(root, tmp_path, labels="both")
    if level == "problem":
        with pytest.raises(DataError, match="would make the accuracies wrong"): train(config)
        assert not (tmp_path / "runs").exists()
    elif fault.said:
        with pytest.warns(UserWarning, match=words.split(":")[0]), pytest.raises(DataError): train(config)


def test_sound_lists_have_no_fault(tmp_path):
    lines = [f"v{i},{j},{j + 1.5},{verb},{noun},{'Train' if i else 'TEST'}" for i in range(3) for j in range(3) for verb, noun in (("cut", "pan"), ("mix", "bowl"))]
    root = listed(tmp_path, *(line for i, line in enumerate(lines) if i % 2 == i // 2 % 2))
    assert own_faults(root) == [] and set(read_csv(root).split) == {"train", "test"}


def test_a_placeholder_that_is_listed_is_a_class(tmp_path):
    root = listed(tmp_path, "a,0,1,none,pan,train", "a,1,2,none,pan,train", "b,0,1,cut,pan,test", "b,1,2,cut,pan,test")
    assert [f.kind for f in own_faults(root) if f.level == "problem"] == ["verb"]
    assert [f for f in own_faults(root, ["noun"]) if f.level == "problem"] == []  # not of the kind that is trained
    (root / "verbs.txt").write_text("cut\nnone\n")
    assert [f for f in own_faults(root) if f.level == "problem"] == [] and read_classes("csv", root, "verb").names == ("cut", "none")


@pytest.mark.parametrize("name, yes", [("N/A", True), ("unknown", True), ("-", True), ("?", True), ("None ", True), ("NaN", True), ("no", False), ("knife", False), ("nan bread", False)])
def test_placeholders(name, yes):
    assert is_placeholder(name) == yes


@pytest.mark.parametrize("names", [
    ("GX010007", "GX020007"), ("gh010007", "GH120007"), ("GOPR0007", "GP010007", "GP020007"), ("P01_GX010007", "P01_GX020007"), ("GS010007.360", "GS020007.360"),
    ("DJI_0007_001", "DJI_0007_002"), ("DJI_20240102030405_0007_D_001", "DJI_20240102030405_0007_D_002"), ("VID_20240102_030405_00_001", "VID_20240102_030405_10_002"),
    ("kitchen_part1", "kitchen_part2"), ("kitchen (part 1)", "kitchen (part 2)")])
def test_chapters_of_one_recording(names):
    assert len({recording(name) for name in names}) == 1


@pytest.mark.parametrize("names", [("GX010007", "GX010008"), ("DJI_0007", "DJI_0008"), ("VID_20240102_030405_00_001", "VID_20240102_030406_00_001"),
                                   ("P01_01", "P01_02"), ("P01_GX010007", "P02_GX020007"), ("kitchen1", "kitchen2"), ("carpart1x", "carpart2x"), ("apartment1", "apartment2")])
def test_recordings_that_are_not_one(names):
    assert len({recording(name) for name in names}) == len(names)


def test_chapters_stay_together_where_the_kit_splits(tmp_path):
    videos = [f"GX0{chapter}{number:04}" for number in range(8) for chapter in (1, 2, 3)]
    table = read_csv(listed(tmp_path, *(f"{v},0,1,cut,pan" for v in videos), head="video_id,start_sec,stop_sec,verb,noun"))
    assert table.groupby(table.video_id.map(recording)).split.nunique().max() == 1 and (table.split == "test").sum() == 6


def test_a_column_group_decides(tmp_path):
    head = "video_id,group,start_sec,stop_sec,verb,noun"
    table = read_csv(listed(tmp_path, *(f"v{i},{'ab'[i % 2]},0,1,cut,pan" for i in range(8)), head=head))
    assert table.groupby(table.video_id.str[1:].astype(int) % 2).split.nunique().max() == 1 and set(table.split) == {"train", "test"}
    chapters = ["GX010007,{},0,1,cut,pan,train", "GX020007,{},0,1,cut,pan,test"]
    apart = listed(tmp_path, *(line.format(i) for i, line in enumerate(chapters)), head=head + ",split")
    assert [f for f in own_faults(apart) if "hapters" in f.text] == []
    together = listed(tmp_path, *(line.format("same") for line in chapters), head=head + ",split")
    (fault,) = [f for f in own_faults(together) if "group" in f.text]
    assert fault.level == "problem" and "1 group is in training and in test: 'same'" in fault.text


def test_times_in_other_units(world, tmp_path):
    rows = pd.read_csv(world / "segments.csv")
    look = lambda: check_data("csv", world, features_root=tmp_path / "features", progress=False)
    assert look().ok
    rows.assign(start_sec=(rows.start_sec * 1000).astype(int) + 5000, stop_sec=(rows.stop_sec * 1000).astype(int) + 5000).to_csv(world / "segments.csv", index=False)
    said = [f for f in look().of("problem", "Videos")]
    assert "8 segments lie wholly behind the end of their video" in said[0].text and "look like" not in said[0].text  # 5 s are in no unit
    rows.assign(start_sec=(rows.start_sec * 1000).astype(int), stop_sec=(rows.stop_sec * 1000).astype(int)).to_csv(world / "segments.csv", index=False)
    (said,) = look().of("problem", "Videos")
    assert "The times look like milliseconds, not seconds" in said.text and said.todo == "divide start_sec and stop_sec by 1,000"
    assert unit_of([(1900, 2.0, 30.0)]) == "milliseconds" and unit_of([(1900, 70.0, 30.0)]) == "milliseconds or frame numbers" and unit_of([]) == ""


def test_one_segment_behind_the_end_is_a_problem(world, tmp_path):
    change(world, lambda t: pd.concat([t, t.iloc[:1].assign(start_sec=50.0, stop_sec=51.0)]))
    (said,) = check_data("csv", world, features_root=tmp_path / "features", progress=False).of("problem", "Videos")
    assert "1 segment lies wholly behind the end of its video: v0_50-51: 50 to 51 s" in said.text and said.todo.startswith("correct their times")


# Zero-shot beside X-MIC

@pytest.fixture
def made(tmp_path) -> TrainConfig:
    make_dataset(tmp_path / "csv", tmp_path / "features", "csv", videos=8)
    return TrainConfig(dataset="csv", data_root=str(tmp_path / "csv"), features_root=str(tmp_path / "features"), encoder=register_tiny(), weights="random",
                       runs_root=str(tmp_path / "runs"), device="cpu", epochs=3, warmup_epochs=1, batch_size=8, lr=3e-3, progress=False)


def test_a_run_has_zero_shot_beside_it(made):
    run, alone = train(made), train(replace(made, method="zero_shot"))
    lines = pd.read_csv(run.folder / "predictions.csv")
    theirs = pd.read_csv(alone.folder / "predictions.csv")
    assert (lines.segment_id == theirs.segment_id).all() and (lines.zero_shot == theirs.predicted).all() and (lines.zero_shot_name == theirs.predicted_name).all()
    beside = run.metrics["zero_shot"]["csv"]["noun"]
    ours, other = run.metrics["results"]["csv"]["noun"]["top1"]["value"], alone.metrics["results"]["csv"]["noun"]["top1"]["value"]
    assert beside["top1"]["value"] == other and beside["difference"]["difference"] == pytest.approx(ours - other)
    assert beside["difference"]["low"] <= ours - other <= beside["difference"]["high"] and beside["difference"]["count"] == len(lines)
    (row,) = run.beside_zero_shot.to_dict("records")
    assert (row["zero_shot"], row["top1"]) == (other, ours)
    assert "zero_shot" not in alone.metrics and alone.beside_zero_shot.empty
    old = {k: v for k, v in run.metrics.items() if k != "zero_shot"}  # of an earlier version
    write_json(run.folder / "metrics.json", old)
    assert RunResult.read(run.folder).beside_zero_shot.empty and train(made).metrics == old


def test_the_interval_is_paired():
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    ours, theirs = (hard < 0.60).astype(int), (hard < 0.55).astype(int)  # both find the same segments hard
    table = pd.DataFrame(dict(position=range(400), label=1, predicted=ours, zero_shot=theirs))
    apart = against_zero_shot({"noun": table})["noun"]["difference"]
    assert apart["difference"] == pytest.approx(100 * (ours.mean() - theirs.mean()))
    draws = [100 * (ours[i].mean() - theirs[i].mean()) for i in (rng.integers(0, 400, 400) for _ in range(2000))]
    assert (apart["low"], apart["high"]) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.6)
    both = against_zero_shot({"noun": table, "verb": table.assign(predicted=1, zero_shot=0)})["action"]
    assert both["top1"]["value"] == 0 and both["difference"]["difference"] == pytest.approx(100 * ours.mean())
    assert against_zero_shot({"noun": table.iloc[:0]})["noun"]["difference"]["count"] == 0


def test_zero_shot_has_no_part_in_the_trained_numbers(made, monkeypatch):
    with_it = train(made)
    monkeypatch.setattr("xmic.training._zero_shot_beside", lambda *_: None)
    without = train(replace(made, name="without"))
    assert with_it.metrics["results"] == without.metrics["results"] and asdict(with_it.config) | dict(name="without") == asdict(without.config)
    assert isinstance(ZeroShot(), torch.nn.Module) and read_segments("csv", made.data_root, "test").segment_id.is_unique
