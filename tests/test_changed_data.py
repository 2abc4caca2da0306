"""Data that change: corrected times and labels, a replaced video, another class list, inserted rows. Nothing old is served without a word."""
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from test_training import make_dataset
from world import contents, extract_config, register_tiny, write_world
from xmic import reporting
from xmic.analysis import by_frequency, confusions
from xmic.clips import Origin, video_identity
from xmic.experiments import changed_runs, note_annotations, plan, profile
from xmic.features import CannotOpen, FeatureStore, StoredView, extract_dataset, read_shard, shard_name, write_shard
from xmic.files import DataError, write_json
from xmic.frames import store_frames
from xmic.pixels import Preprocess
from xmic.segments import read_csv
from xmic.streams import Streams
from xmic.config import TrainConfig
from xmic.training import EvaluateConfig, evaluate_run, train

pytestmark = [pytest.mark.filterwarnings("ignore:.*RANDOM weights"), pytest.mark.filterwarnings("ignore:no hand boxes")]


@pytest.fixture
def world(tmp_path) -> Path:
    register_tiny()
    return write_world(tmp_path / "world", videos=4, frames=60)


def edit(root: Path, segment: str, **cells) -> None:
    table = pd.read_csv(root / "segments.csv")
    for column, value in cells.items(): table.loc[table.segment_id == segment, column] = value
    table.to_csv(root / "segments.csv", index=False)


def rows(store: FeatureStore) -> dict[str, torch.Tensor]:
    return {i: store.segment(i, "full").clone() for i in store.view("full").place}


def whole(root: Path, tmp_path: Path) -> FeatureStore:
    "What an extraction from nothing gives."
    return extract_dataset(extract_config(root, tmp_path / "anew"))[0]


def same_as_anew(store: FeatureStore, root: Path, tmp_path: Path) -> bool:
    ours, theirs = rows(store), rows(whole(root, tmp_path))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[i], theirs[i]) for i in ours)


# Features

def test_corrected_times_are_extracted_again_and_nothing_else(world, tmp_path):
    store, _ = extract_dataset(extract_config(world, tmp_path / "features"))
    others = {p: p.read_bytes() for p in (tmp_path / "features").rglob("v[123].safetensors")}
    edit(world, "v0_0", start_sec=0.4, stop_sec=1.6)  # as many frames as before: the shard keeps its size
    assert len(store.verify(read_csv(world))) == 2 and "0.2 to 1.4 s, now 0.4 to 1.6 s" in store.verify(read_csv(world))[0] and store.verify() == []
    store, report = extract_dataset(extract_config(world, tmp_path / "features"))
    assert (report.extracted, report.present, list(report.changed)) == (1, 7, ["v0_0"]) and "1 that were there are of other times" in repr(report)
    assert store.frames("v0_0", "full").tolist() == list(range(10, 40)) and store.verify(read_csv(world)) == []
    assert same_as_anew(store, world, tmp_path) and others == {p: p.read_bytes() for p in others}
    assert extract_dataset(extract_config(world, tmp_path / "features"))[1].present == 8


def test_an_index_that_is_lost_or_old_does_not_hide_it(world, tmp_path):
    store, _ = extract_dataset(extract_config(world, tmp_path / "features"))
    index = store.root / "full" / "index.json"
    old = index.read_bytes()
    edit(world, "v0_0", start_sec=0.4, stop_sec=1.6)
    extract_dataset(extract_config(world, tmp_path / "features"))
    index.write_bytes(old)  # of another process, that had read it before
    with pytest.raises(DataError, match="repair"): FeatureStore(store.root).segment("v0_0", "full")
    assert list(FeatureStore(store.root).repair().file) == ["index.json"]
    assert extract_dataset(extract_config(world, tmp_path / "features"))[1].present == 8


def test_a_replaced_video_is_extracted_again_and_no_other(world, tmp_path):
    store, _ = extract_dataset(extract_config(world, tmp_path / "features"))
    before = rows(store)
    shutil.copy(world / "videos/v1.mp4", world / "videos/v0.mp4")
    os.utime(world / "videos/v2.mp4")  # a copy has another time and is the same video
    assert {line.split("'")[1] for line in store.verify(read_csv(world))} == {"v0_0", "v0_1"}
    store, report = extract_dataset(extract_config(world, tmp_path / "features"))
    assert set(report.changed) == {"v0_0", "v0_1"} and (report.extracted, report.present) == (2, 6) and "a replaced video" in repr(report)
    assert torch.equal(rows(store)["v0_0"], before["v1_0"]) and same_as_anew(store, world, tmp_path)


def test_a_segment_that_moves_to_another_video(world, tmp_path):
    extract_dataset(extract_config(world, tmp_path / "features"))
    for segment in ("v0_0", "v1_0", "v1_1"): edit(world, segment, video_id="v2")
    store, report = extract_dataset(extract_config(world, tmp_path / "features"))
    assert set(report.changed) == {"v0_0", "v1_0", "v1_1"} and report.extracted == 3 and store.verify(read_csv(world)) == []
    assert not (store.root / "full" / "v1.safetensors").exists() and same_as_anew(store, world, tmp_path)


def test_times_that_cannot_be_read_leave_no_old_rows(world, tmp_path):
    store, _ = extract_dataset(extract_config(world, tmp_path / "features"))
    edit(world, "v0_0", start_sec=50.0, stop_sec=51.0)
    store, report = extract_dataset(extract_config(world, tmp_path / "features"))
    assert set(report.failed) == {"v0_0"} and "v0_0" not in store.view("full").place and "v0_1" in store.view("full").place
    assert extract_dataset(extract_config(world, tmp_path / "features"))[1].frames == 0  # it is known to fail
    edit(world, "v0_0", start_sec=0.2, stop_sec=1.4)
    store, report = extract_dataset(extract_config(world, tmp_path / "features"))
    assert report.extracted == 1 and "v0_0" in store.view("full").place and "v0_0" not in store.failures("full")


def test_old_rows_stay_where_the_video_is_gone(world, tmp_path):
    store, _ = extract_dataset(extract_config(world, tmp_path / "features"))
    edit(world, "v0_0", start_sec=0.4, stop_sec=1.6)
    (world / "videos/v0.mp4").unlink()
    store, report = extract_dataset(extract_config(world, tmp_path / "features"))
    assert set(report.failed) == {"v0_0"} and len(store.view("full").place) == 8


def test_shards_of_earlier_versions_are_neither_refused_nor_made_anew(world, tmp_path):
    store, _ = extract_dataset(extract_config(world, tmp_path / "features"))
    for path in (tmp_path / "features").rglob("*.safetensors"):
        features, frames, header = read_shard(path)
        parts = list(zip(header["segments"], features.clone().split(list(header["segments"].values())), np.split(frames.numpy().copy(), np.cumsum(list(header["segments"].values()))[:-1])))
        write_shard(path, parts)
    edit(world, "v0_0", start_sec=0.4, stop_sec=1.6)
    store, report = extract_dataset(extract_config(world, tmp_path / "features"))
    assert (report.extracted, report.present, report.unknown) == (0, 8, 8) and store.verify(read_csv(world)) == [] and store.unknown(read_csv(world)) == 8


def test_stored_frames_follow_the_annotations(world, tmp_path):
    call = lambda: store_frames(read_csv(world), tmp_path / "pixels-x" / "csv" / "full", Preprocess(size=32), feature_fps=10.0, workers=0, progress=False)
    store, report = call()
    kept = store.pixels("v0_1")
    edit(world, "v0_0", start_sec=0.4, stop_sec=1.6)
    shutil.copy(world / "videos/v2.mp4", world / "videos/v1.mp4")
    store, report = call()
    assert set(report.changed) == {"v0_0", "v1_0", "v1_1"} and report.extracted == 3 and store.verify() == []
    assert (store.pixels("v0_1") == kept).all() and (store.pixels("v1_0") == store.pixels("v2_0")).all()
    assert store.frames("v0_0").min() == 10 and store.frames("v0_0").max() < 40 and call()[1].extracted == 0
    assert store.shards[0].count == len(store.frames("v0_0")) + len(store.frames("v0_1"))  # nothing is left of the old pixels
    edit(world, "v0_0", video_id="v2")
    store, report = call()
    assert report.extracted == 1 and store.shard_of("v0_0") == "v2.safetensors" and "v0_0" not in store.shards[0].segments


def test_a_folder_of_frames_is_told_by_its_files(tmp_path):
    for i in range(30): (tmp_path / f"{i:03}.jpg").write_bytes(bytes([i]) * 100)
    first = video_identity(tmp_path)
    assert first == video_identity(tmp_path) and first.startswith("frames 30 ")
    for i in range(30): (tmp_path / f"{i:03}.jpg").write_bytes(bytes([i + 1]) * 100)  # shifted, as some of EPIC-KITCHENS were
    assert video_identity(tmp_path) != first


# Runs

@pytest.fixture
def made(tmp_path) -> Path:
    make_dataset(tmp_path / "csv", tmp_path / "features", "csv", videos=8)
    return tmp_path


@pytest.fixture
def config(made) -> TrainConfig:
    return TrainConfig(dataset="csv", data_root=str(made / "csv"), features_root=str(made / "features"), encoder=register_tiny(), weights="random",
                       runs_root=str(made / "runs"), name="run", device="cpu", epochs=3, warmup_epochs=1, batch_size=8, lr=3e-3, progress=False)


def swap_labels(root: Path, split: str) -> None:
    table = pd.read_csv(root / "segments.csv")
    swapped = table.noun.replace(dict(pan="tap", tap="pan"))
    table.assign(noun=table.noun.where(table.split != split, swapped)).to_csv(root / "segments.csv", index=False)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_run_of_other_labels_is_kept_aside_and_made_anew(config, made, split):
    first = train(config)
    old = {p.name: p.read_bytes() for p in first.folder.iterdir()}
    assert train(config).metrics == first.metrics
    swap_labels(made / "csv", split)
    with pytest.warns(UserWarning, match=f"the nouns of the {split} segments of csv have changed since"): again = train(config)
    fresh = train(replace(config, name="fresh"))
    assert again.metrics["results"] == fresh.metrics["results"] and again.metrics["data"] == fresh.metrics["data"] != first.metrics["data"]
    (aside,) = (made / "runs" / "before").iterdir()
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == old
    assert train(config).metrics == again.metrics


def test_labels_of_another_kind_do_not_matter(config, made):
    first = train(config)
    table = pd.read_csv(made / "csv" / "segments.csv")
    table.assign(verb=table.verb.iloc[::-1].to_numpy(), narration="corrected").sample(frac=1, random_state=0).to_csv(made / "csv" / "segments.csv", index=False)
    assert train(config).metrics == first.metrics and not (made / "runs" / "before").exists()


def test_training_does_not_go_on_from_other_labels(config, made, monkeypatch):
    from xmic.training import Trainer
    original = Trainer.run_epoch

    def stop(self):
        if self.epoch == 1: raise KeyboardInterrupt
        return original(self)
    monkeypatch.setattr(Trainer, "run_epoch", stop)
    with pytest.raises(KeyboardInterrupt): train(config)
    monkeypatch.setattr(Trainer, "run_epoch", original)
    swap_labels(made / "csv", "train")
    with pytest.warns(UserWarning, match="is of other data: the nouns of the train segments"): run = train(config)
    fresh = train(replace(config, name="fresh"))
    assert run.history.loss.tolist() == fresh.history.loss.tolist()
    assert {p.name for p in next((made / "runs" / "before").iterdir()).iterdir()} == {"checkpoint.pt", "history.csv"}


def test_a_run_without_hashes_or_data_stays_valid(config, made):
    first = train(config)
    write_json(first.folder / "metrics.json", {k: v for k, v in first.metrics.items() if k != "data"})
    swap_labels(made / "csv", "test")
    assert train(config).metrics["results"] == first.metrics["results"]
    write_json(first.folder / "metrics.json", first.metrics)
    shutil.move(made / "csv", made / "elsewhere")
    write_json(made / "csv" / "empty.json", {})
    from xmic.config import resolve
    from xmic.training import _finished
    assert _finished(replace(resolve(replace(config, data_root=str(made / "elsewhere"))), data_root=str(made / "csv")), first.folder).metrics == first.metrics


def test_a_reordered_class_list_is_noticed_and_names_are_kept(config, made):
    names = ["pan", "knife", "tap", "cup"]
    (made / "csv" / "nouns.txt").write_text("\n".join(names))
    first = train(config)
    lines = pd.read_csv(first.folder / "predictions.csv")
    assert (lines.label_name == [names[i] for i in lines.label]).all() and (lines.predicted_name == [names[i] for i in lines.predicted]).all()
    before = confusions(first.folder)
    (made / "csv" / "nouns.txt").write_text("\n".join(names[::-1]))
    pd.testing.assert_frame_equal(confusions(first.folder), before)
    with pytest.raises(DataError, match="class 0: 'pan' in the run, 'cup' now"): by_frequency(first.folder)
    with pytest.warns(UserWarning, match="the list of noun classes of csv"): again = train(config)
    lines = pd.read_csv(again.folder / "predictions.csv")
    assert (lines.label_name == [names[::-1][i] for i in lines.label]).all()


def test_prompts_of_single_classes_serve_the_list_they_were_learned_for(config, made):
    (made / "csv" / "nouns.txt").write_text("pan\nknife\ntap\ncup")
    run = train(replace(config, method="coop", prompt_per_class=True, prompt_length=4, epochs=1, warmup_epochs=0))
    evaluate_run(EvaluateConfig(run=str(run.folder), device="cpu"))
    (made / "csv" / "nouns.txt").write_text("cup\nknife\ntap\npan")
    with pytest.raises(DataError, match="a prompt for each class.*list of noun classes of csv"): evaluate_run(EvaluateConfig(run=str(run.folder), device="cpu"))


def test_training_refuses_features_of_other_times(world, tmp_path):
    config = TrainConfig(dataset="csv", data_root=str(world), features_root=str(tmp_path / "features"), encoder=register_tiny(), weights="random", method="zero_shot",
                         runs_root=str(tmp_path / "runs"), name="run", device="cpu", progress=False)
    extract_dataset(extract_config(world, tmp_path / "features"))
    train(config)
    edit(world, "v2_0", start_sec=0.4, stop_sec=1.6)
    before = contents(tmp_path / "runs")
    with pytest.raises(DataError, match="changed since: run nbs/extract.ipynb again(.|\n)*v2_0: other times"): train(config)
    assert contents(tmp_path / "runs") == before  # what was there stays until another run can be made
    extract_dataset(extract_config(world, tmp_path / "features"))
    with pytest.warns(UserWarning, match="ids or times"): run = train(config)
    shutil.copy(world / "videos/v1.mp4", world / "videos/v2.mp4")
    extract_dataset(extract_config(world, tmp_path / "features"))
    with pytest.warns(UserWarning, match="the videos of the test segments"): assert train(config).metrics["results"].keys() == run.metrics["results"].keys()


def test_a_cell_of_other_data_says_so(config, made):
    cells = pd.DataFrame([dict(table=1, source="csv", method="X-MIC", variant="", kind="noun", column="csv", dataset="csv", measure="top1", runs=["run"])])
    train(config)
    about = replace(profile(), data=str(made), features_root=str(made / "features"), runs_root=str(made / "runs"))
    assert changed_runs(about, ["run", "none"]) == {}
    swap_labels(made / "csv", "test")
    changed = changed_runs(about, ["run", "none"])
    assert changed == {"run": ["the nouns of the test segments of csv"]}
    table = reporting.tabulate(cells, made / "runs", changed)
    assert table["mean"].isna().all() and "data changed" in reporting.to_markdown(table) and "data changed" not in reporting.to_markdown(reporting.tabulate(cells, made / "runs"))


# The workflow

def test_changed_annotations_take_back_that_an_extraction_is_done(tmp_path):
    data = tmp_path / "data"
    for file in ("epic/EPIC_100_train.csv", "epic/EPIC_100_validation.csv", "epic/EPIC_100_noun_classes.csv", "epic/EPIC_100_verb_classes.csv",
                 "ego4d/fho_lta_train.json", "ego4d/fho_lta_val.json", "egtea/noun_idx.txt", "egtea/verb_idx.txt", *(f"egtea/test_split{i}.txt" for i in (1, 2, 3))):
        (data / file).parent.mkdir(parents=True, exist_ok=True)
        (data / file).write_text("as published")
    made = plan(replace(profile("paper", data=str(data)), features_root=str(tmp_path / "features")), "5")
    done = {name: Path(made.folder(name)) / "done" for name in made.stores}
    for path in done.values(): path.parent.mkdir(parents=True), path.touch()
    assert note_annotations(made) == [] and all(p.exists() for p in done.values())  # extracted before there was a note
    for path in data.rglob("*"): os.utime(path, (1, 1))
    assert note_annotations(made) == []
    (data / "epic/EPIC_100_validation.csv").write_text("corrected")
    again = note_annotations(made)
    assert again and {name for name, path in done.items() if not path.exists()} == set(again) == {n for n in made.stores if n.startswith("epic-test")}
    assert note_annotations(made) == []


# Many videos

def many(root: Path, videos: int, rows: int = 2, dim: int = 8) -> list[str]:
    "A store of one-segment shards."
    write_json(root / "full" / "manifest.json", dict(dim=dim, fingerprint="generated", view="full"))
    for v in range(videos):
        write_shard(root / "full" / shard_name(f"v{v}"), [(f"v{v}", torch.full((rows, dim), v % 100), np.arange(rows))], {f"v{v}": Origin("0 to 1 s", "file 9 a")})
    return [f"v{v}" for v in range(videos)]


def maps(folder: Path) -> int:
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts maps as Linux lists them")
@pytest.mark.parametrize("resident", [True, False])
def test_a_view_keeps_a_bounded_number_of_shards_mapped(tmp_path, monkeypatch, resident):
    monkeypatch.setattr("xmic.features.OPEN_SHARDS", 8)
    names = many(tmp_path, 60)
    view = StoredView(tmp_path / "full")
    streams = Streams(view, [], names[::-1], resident=resident)
    _, batch = next(streams.batches(np.arange(60), np.tile([0, 1], (60, 1)), 60))
    assert batch.video[:, 0, 0].tolist() == list(range(59, -1, -1))
    assert all((view.rows(name)[0] == number).all() for number, name in enumerate(names)) and maps(tmp_path) <= 2 * 8


@pytest.mark.parametrize("words", ["unable to mmap 48 bytes from file: Cannot allocate memory (12)", "Too many open files (os error 24)"])
def test_what_the_system_refuses_is_no_damage(tmp_path, monkeypatch, words):
    many(tmp_path, 2)

    def refuse(*_):
        raise RuntimeError(words)
    monkeypatch.setattr("xmic.features.safe_open", refuse)
    store = FeatureStore(tmp_path)
    for call in (lambda: read_shard(tmp_path / "full" / "v0.safetensors"), store.verify, store.repair):
        with pytest.raises(CannotOpen, match="says nothing about the shard"): call()
    assert len(list((tmp_path / "full").glob("*.safetensors"))) == 2


def test_opening_a_store_reads_the_index_and_no_shard(tmp_path, monkeypatch):
    names = many(tmp_path, 50)
    FeatureStore(tmp_path).refresh()

    def refuse(*_):
        raise AssertionError("a shard was opened")
    monkeypatch.setattr("xmic.features.safe_open", refuse)
    view = FeatureStore(tmp_path).view("full")
    assert list(view.place) == sorted(names) and view.origins["v7"] == Origin("0 to 1 s", "file 9 a")
    assert (tmp_path / "full" / "index.json").stat().st_size < 50 * 250
