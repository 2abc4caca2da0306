"""The recogniser on real and made videos, with class lists of its own."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from world import register_tiny, write_world
from xmic.classes import ClassSet
from xmic.encoders import create_encoder
from xmic.features import ExtractConfig, extract_dataset
from xmic.files import DataError
from xmic.hands import HandBoxes
from xmic.recognizer import Recognizer
from xmic.training import TrainConfig, train
from xmic.video import VideoError

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def make_run(folder, **changes):
    world = write_world(folder / "world", videos=6)
    common: dict = dict(dataset="csv", data_root=str(world), encoder=register_tiny(), weights="random", features_root=str(folder / "features"),
                  device="cpu", progress=False) | changes
    extract_dataset(ExtractConfig(**common, workers=0))
    return train(TrainConfig(**common, runs_root=str(folder / "runs"), epochs=2, warmup_epochs=1, batch_size=4))


def test_real_clips_with_the_whole_epic_class_list(run, shared_data):
    recognizer = Recognizer.from_pretrained(run.folder, device="cpu")
    annotations = shared_data / "epic_kitchens_100_annotations"
    nouns, verbs = (ClassSet.from_epic(annotations / f"EPIC_100_{k}_classes.csv") for k in ("noun", "verb"))
    for name in ("epic_P01_01_take_salt", "epic_wall_r0c0", "ego4d_site_tokyo"):
        found = recognizer.predict(shared_data / f"real_clips/videos/{name}.mp4", nouns=nouns, verbs=verbs, top=5)
        assert len(found.nouns) == len(found.verbs) == len(found.actions) == 5 and len(found.frames) == 16
        assert set(found.nouns.name) <= set(nouns.names) and found.nouns.score.is_monotonic_decreasing
        assert any("zero-shot" in note for note in found.notes) and any("no hand boxes" in note for note in found.notes)


@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_it_gives_what_evaluation_predicts(run, tmp_path, resize):
    if resize != "shortest":
        run = make_run(tmp_path, resize=resize)
    world = Path(run.config.data_root)
    predictions = pd.read_csv(run.folder / "predictions.csv")
    recognizer = Recognizer.from_pretrained(run.folder, device="cpu")
    segments = pd.read_csv(world / "segments.csv").set_index("segment_id")
    boxes = HandBoxes.from_boxes(world / "hand_boxes.csv")
    names = sorted(set(segments.noun))
    for row in predictions.itertuples():
        s = segments.loc[row.segment_id]

        class Named:  # the recogniser names a segment after its file; here the boxes are under the segment's own name
            box = staticmethod(lambda segment, *rest: boxes.box(replace_id(segment, row.segment_id), *rest))

        found = recognizer.predict(world / f"videos/{s.video_id}.mp4", nouns=names, start=s.start_sec, stop=s.stop_sec, boxes=Named)
        assert found.nouns.name[0] == names[row.predicted]
        np.testing.assert_allclose(found.nouns.score[0] / 100, row.confidence, rtol=2e-2)


def replace_id(segment, segment_id):
    segment.segment_id = segment_id
    return segment


def test_saved_and_loaded_it_answers_the_same(run, tmp_path):
    video = next(Path(run.config.data_root, "videos").glob("*.mp4"))
    recognizer = Recognizer.from_pretrained(run.folder, device="cpu")
    recognizer.save_pretrained(tmp_path / "saved")
    a, b = (r.predict(video, nouns=["pan", "cup"]) for r in (recognizer, Recognizer.from_pretrained(tmp_path / "saved", device="cpu")))
    assert a.nouns.equals(b.nouns)


@pytest.mark.parametrize("arguments, error, message", [
    (dict(), DataError, "give a list of nouns"), (dict(nouns=[]), DataError, "no names|name"), (dict(nouns=["a"], start=99.0), DataError, "no stretch"),
    (dict(nouns=["a"], start=1.0, stop=0.5), DataError, "no stretch"), (dict(nouns=["pan", "pan"]), DataError, "pan")])
def test_wrong_questions_are_refused(run, arguments, error, message):
    video = next(Path(run.config.data_root, "videos").glob("*.mp4"))
    with pytest.raises(error, match=message):
        Recognizer.from_pretrained(run.folder, device="cpu").predict(video, **arguments)


def test_a_file_that_is_no_video_is_refused(tmp_path):
    (tmp_path / "x.mp4").write_text("no video")
    with pytest.raises(VideoError, match="x.mp4"):
        Recognizer(create_encoder(register_tiny(), "random", "cpu"), {}, {}).predict(tmp_path / "x.mp4", nouns=["pan"])


def test_a_folder_without_a_model_is_refused(run, tmp_path):
    (tmp_path / "config.json").write_text((run.folder / "config.json").read_text())
    with pytest.raises(DataError, match="neither a finished run"):
        Recognizer.from_pretrained(tmp_path, device="cpu")
