"""Data as people have it: complete, in part, renamed, empty, damaged, numbered otherwise, and in the wrong folder."""
import json
import os
import pickle
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from counting import counted
from generated import link_official_files
from videos import write_video
from world import TINY, extract_config, register_tiny, write_world
from xmic.checks import Check, blob_id, check_data, datasets_in, file_sizes, fitting_encoders, right_root
from xmic.encoders import create_encoder
from xmic.features import ExtractConfig, extract_dataset, hand_boxes
from xmic.files import DataError, read_json, write_json
from xmic.mini import build
from xmic.segments import read_segments

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("rendered"), "tiny", workers=2, progress=False)


@pytest.fixture
def mini(rendered, tmp_path) -> Path:
    return shutil.copytree(rendered, tmp_path / "mini")


@pytest.fixture
def own(tmp_path) -> Path:
    return write_world(tmp_path / "mine", videos=4, frames=60)


def look(dataset: str, root: Path, **options) -> Check:
    return check_data(dataset, root, features_root=root.parent / "features", progress=False, **options)


def texts(check: Check, level: str, section: str | None = None) -> str:
    return "\n".join(f.text for f in check.of(level, section))


@pytest.mark.parametrize("dataset", ["epic", "ego4d", "egtea"])
def test_a_complete_world_has_no_problem_and_all_tables(mini, dataset):
    check = look(dataset, mini / dataset)
    assert check.ok and not check.of("warning") and str(check).startswith(f"{check.title}: all is well\n{mini / dataset}\n")
    counts = read_json(mini / "world.json")["datasets"][dataset]
    assert check.facts["Annotations"]["nouns"] == counts["nouns"]
    assert check.facts["Videos"]["there"] == check.facts["Videos"]["videos"] == {"egtea": 12}.get(dataset, 3)
    numbers = {"epic": "1 2 4 5 6 7 8 9", "ego4d": "1 2 3 4 5 6 7 8 9", "egtea": "3"}[dataset]
    (tables,) = check.of("good", "Tables")
    assert tables.text.split(":")[0].split(" ", 1)[1].replace(",", "") == numbers
    assert {*check.facts["Tables"]} == {*numbers.split()} and json.loads(json.dumps(check.as_dict())) == check.as_dict()


def test_videos_that_are_missing_renamed_or_empty_are_told_apart(mini):
    root = mini / "ego4d"
    train, test = (read_segments("ego4d", root, split) for split in ("train", "test"))
    gone, renamed, empty = *dict.fromkeys(train.video_path), test.video_path[0]
    os.unlink(gone)
    Path(renamed).rename(Path(renamed).with_suffix(".MP4.part"))
    whole = Path(empty).read_bytes()
    Path(empty).write_bytes(b"")
    check = look("ego4d", root)
    assert not check.ok and check.facts["Videos"]["faults"] == {"are not there": 2, "are empty files": 1}
    assert check.facts["Videos"]["without_video"] == {"train": len(train), "test": len(test)}

    Path(empty).write_bytes(whole)
    check = look("ego4d", root)
    assert "2 of 3 are not there" in texts(check, "problem", "Videos")
    assert f"{len(train)} of {len(train)} train segments (100.0%)" in texts(check, "problem", "Videos")
    (finding,) = check.of("problem", "Videos")
    assert "1 of them may be there under another name" in finding.todo and ".MP4.part" in finding.todo
    assert "no train segment has a video" in texts(check, "problem", "Tables")
    assert check.facts["Tables"]["1"]["good"] > 0  # from the other source to this one


def test_the_cells_that_some_missing_videos_affect_are_counted(mini):
    root, train = mini / "epic", read_segments("epic", mini / "epic", "train")
    first = train.video_path[0]
    os.unlink(first)
    check, n = look("epic", root), int((train.video_path == first).sum())
    said = texts(check, "warning", "Tables")
    assert f"{n} of {len(train)} train segments have no video" in said and "Tables 1 (" in said and "Tables 4" not in said
    assert check.facts["Tables"]["4"] == {"good": 12, "warning": 0, "problem": 0}  # EPIC-KITCHENS is only the target there
    assert check.facts["Tables"]["1"]["warning"] == sum(p["kind"] in ("noun", "verb") for p in _trained_cells())


def _trained_cells() -> list[dict]:
    from xmic.experiments import cells, profile
    table = cells(1, profile())
    return table[(table.source == "epic") & (table.method != "ZS CLIP")].to_dict("records")


def test_a_damaged_video_is_found_where_it_is_opened(mini):
    videos = sorted((mini / "epic").rglob("*.MP4"), key=lambda p: p.stat().st_size)
    videos[0].write_bytes(videos[0].read_bytes()[:-5000])
    check = look("epic", mini / "epic")
    assert "1 of 3 cannot be read" in texts(check, "problem") and videos[0].name in texts(check, "problem")


@pytest.mark.slow
def test_a_thorough_look_opens_all_and_a_quick_one_the_smallest(own):
    for i in range(14): write_video(own / "videos" / f"w{i}.mp4", 30 + i)
    rows = pd.read_csv(own / "segments.csv")
    more = [dict(segment_id=f"w{i}_0", video_id=f"w{i}", start_sec=0.0, stop_sec=9.0 if i == 13 else 1.0, verb="take", noun="pan", split="train")
            for i in range(14)]
    pd.concat([rows, pd.DataFrame(more)]).to_csv(own / "segments.csv", index=False)
    (own / "hand_boxes.csv").unlink()
    (own / "videos" / "w12.mp4").write_bytes(np.random.default_rng(0).bytes(200_000))
    quick = look("csv", own)
    assert quick.facts["Videos"]["opened"] == 3 and "--thorough opens every one" in texts(quick, "good") and quick.ok
    thorough = look("csv", own, thorough=True, workers=1)
    assert thorough.facts["Videos"]["opened"] == 17 and [*thorough.facts["Videos"]["damaged"]] == [str(own / "videos" / "w12.mp4")]
    assert thorough.facts["Videos"]["behind_the_end"] == ["w13_0"]


@pytest.mark.parametrize("dataset,name,split", [("epic", "EPIC_100_train.csv", "train"), ("ego4d", "fho_lta_val.json", "test"),
                                                ("egtea", "test_split2.txt", "test")])
def test_a_missing_list_says_which_tables_it_stops(mini, dataset, name, split):
    next((mini / dataset).rglob(name)).unlink()
    check = look(dataset, mini / dataset)
    assert f"{name} is missing" in texts(check, "problem", "Annotations") and f"{name} is missing" in texts(check, "problem", "Tables")
    if name == "EPIC_100_train.csv":
        assert check.facts["Tables"]["4"]["good"] == 12 and check.facts["Tables"]["1"]["problem"] == len(_trained_cells())
    else:
        assert split not in check.facts["Annotations"]


def test_a_list_of_classes_that_is_cut_or_missing(mini):
    path = next((mini / "epic").rglob("EPIC_100_noun_classes.csv"))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-5]))
    check = look("epic", mini / "epic")
    assert "35 nouns, rendered were 40" in texts(check, "problem") and not check.of("good", "Tables")
    path.unlink()
    assert "noun_classes.csv is missing" in texts(look("epic", mini / "epic"), "problem", "Tables")


def test_rows_that_are_cut_are_counted(mini):
    path = next((mini / "epic").rglob("EPIC_100_validation.csv"))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    check = look("epic", mini / "epic")
    assert "9 segments of 1 video" in texts(check, "problem") and "rendered were 12" in texts(check, "problem")
    assert "9 segments, rendered were 12" in texts(check, "warning", "Tables")


@pytest.mark.parametrize("fault,words", [(lambda t: t.replace("start_sec", "start"), "no column start_sec"),
                                         (lambda t: t.replace("v0_0", "v0_1"), "repeated"), (lambda t: t.encode("utf-16"), "UTF-16"),
                                         (lambda t: t.replace("pan", "crêpe").encode("latin1"), "UTF-8")])
def test_own_lists_with_faults(own, fault, words):
    text = fault((own / "segments.csv").read_text())
    (own / "segments.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    check = look("csv", own)
    assert not check.ok and words in texts(check, "problem")


def test_own_videos(own):
    check = look("csv", own)
    assert check.ok and check.facts["Annotations"]["train"]["segments"] == 2 and "Tables" not in check.facts
    rows = pd.read_csv(own / "segments.csv")
    rows.assign(split=["train", "test"] * 4).to_csv(own / "segments.csv", index=False)
    assert "4 videos are in training and in test" in texts(look("csv", own), "warning")
    rows.drop(columns=["noun"]).to_csv(own / "segments.csv", index=False)
    check = look("csv", own)
    assert check.ok and "No nouns" in texts(check, "note")
    (own / "verbs.txt").write_text("take\n")
    assert "1 verb of its segments is not in the list of verbs: 'put'" in texts(look("csv", own), "problem")


def test_features_stand_in_for_videos(own):
    settings = extract_config(own, own.parent / "features", feature_fps=5.0)
    extract_dataset(settings)
    shutil.rmtree(own / "videos")
    check = look("csv", own)
    assert "Not one of the 4 videos" in texts(check, "problem")
    assert f"{TINY} (full and hand): 2 of 2 train, 6 of 6 test segments" in texts(check, "good", "Features")


def test_tables_can_be_run_from_features_of_all_encoders(mini):
    from xmic.experiments import _store, profile
    from dataclasses import replace
    p = replace(profile(size="tiny"), data=str(mini), features_root=str(mini / "features"))
    for role in ("clip", "dino"): extract_dataset(ExtractConfig(**_store(p, "epic", "test", role, False).parameters))
    for video in (mini / "epic").rglob("*.MP4"): video.unlink()
    check = look("epic", mini / "epic")
    assert check.facts["Tables"]["4"] == {"good": 12, "warning": 0, "problem": 0}
    assert check.facts["Tables"]["5"]["problem"] == 16 and "no test segment has a video or features" in texts(check, "problem", "Tables")
    assert "the rows of Vita-CLIP need stored frames" in texts(check, "note", "Tables")


def test_detections_that_are_missing_empty_or_damaged(mini):
    files = sorted((mini / "ego4d/100doh").glob("*.pkl"))
    files[0].unlink()
    files[1].write_bytes(b"")
    files[2].write_bytes(files[2].read_bytes()[:300])
    check = look("ego4d", mini / "ego4d")
    assert not check.ok and check.facts["Hands"]["without"] == {"train": 24, "test": 12}
    shutil.rmtree(mini / "ego4d/100doh")
    check = look("ego4d", mini / "ego4d")
    assert check.ok and "No hand boxes" in texts(check, "warning") and "100doh" in check.of("warning")[0].todo


def test_detections_lie_as_the_official_download_leaves_them(mini):
    "`P01/hand-objects/P01_01.pkl`; or hand-objects/P01 is a link to that."
    root = mini / "epic"
    for folder in (root / "hand-objects").iterdir():
        shutil.move(folder, root / folder.name / "hand-objects")
    (root / "hand-objects").rmdir()
    before = hand_boxes(ExtractConfig("epic", data_root=str(root)))
    check = look("epic", root)
    assert check.ok and not check.of("warning") and check.facts["Hands"]["files"] == 3
    (root / "hand-objects").mkdir()
    for person in {p.parent.name for p in root.glob("P*/hand-objects")}: (root / "hand-objects" / person).symlink_to(root / person / "hand-objects")
    check, linked = look("epic", root), hand_boxes(ExtractConfig("epic", data_root=str(root)))
    assert check.ok and check.facts["Hands"]["files"] == 3 and (before.place, linked.place) == (str(root), str(root / "hand-objects"))
    shutil.rmtree(root / "hand-objects")
    (root / "EPIC-KITCHENS").mkdir()
    for person in root.glob("P*"): shutil.move(person, root / "EPIC-KITCHENS")
    within = look("epic", root)
    assert within.ok and not within.of("warning") and within.facts["Hands"]["files"] == within.facts["Videos"]["there"] == 3
    segment = read_segments("epic", root, "test").iloc[0]
    assert before.places(segment.video_id)[1] == root / segment.video_id[:3] / "hand-objects" / f"{segment.video_id}.pkl"


@pytest.mark.parametrize("rate,wrong", [(60, True), (50, False)])
def test_the_two_videos_whose_first_detections_are_wrong(mini, rate, wrong):
    root = mini / "epic"
    folder = next(root.rglob("EPIC_100_train.csv")).parent
    table = pd.read_csv(folder / "EPIC_100_train.csv")
    old = next(v for v in table.video_id.unique() if len(v) == 7)
    table.assign(video_id=table.video_id.replace(old, "P01_109")).to_csv(folder / "EPIC_100_train.csv", index=False)
    (root / "P01/videos").mkdir(parents=True, exist_ok=True)
    shutil.move(next(root.rglob(f"{old}.MP4")), root / "P01/videos/P01_109.MP4")
    next((root / "hand-objects").rglob(f"{old}.pkl")).unlink()
    (root / "hand-objects/P01").mkdir(exist_ok=True)
    seconds = 120.0
    (root / "hand-objects/P01/P01_109.pkl").write_bytes(pickle.dumps([b""] * int(rate * seconds), protocol=4))
    (folder / "EPIC_100_video_info.csv").write_text(f"video_id,duration,fps,resolution\nP01_109,{seconds},50,1920x1080\n")
    found = [f for f in look("epic", root).of("problem", "Hands") if "first published" in f.text]
    assert bool(found) is wrong and all("--errata" in f.todo for f in found)


def test_detections_by_session_do_not_fit_clips(mini):
    (mini / "egtea/hand_boxes.csv").unlink()
    shutil.copytree(mini / "ego4d/100doh", mini / "egtea/100doh")
    assert "detections by session" in texts(look("egtea", mini / "egtea"), "problem", "Hands")


def test_frames_instead_of_videos(mini):
    root = mini / "epic"
    table = pd.concat([read_segments("epic", root, split) for split in ("train", "test")])
    image = Image.fromarray(np.zeros((72, 128, 3), np.uint8))
    for video, part in table.groupby("video_id"):
        folder = root / video[:3] / "rgb_frames" / video
        folder.mkdir(parents=True)
        for n in range(1, part.stop_frame.max() + 1): image.save(folder / f"frame_{n:010d}.jpg")
        shutil.rmtree(root / video[:3] / "videos")
    check = look("epic", root)
    assert check.ok and "3 of 3 folders of frames are there" in texts(check, "good", "Videos"), str(check)
    (folder / "frame_0000000001.jpg").unlink()
    assert "1 of 3 lack frames" in texts(look("epic", root), "problem", "Videos")
    shutil.rmtree(folder)
    folder.with_name(f"{folder.name}.tar").touch()
    assert "unpack it into a folder of its name" in look("epic", root).of("problem", "Videos")[0].todo


def boxes_of(root: Path, shift: int = 0, scale: float = 1.0, relative: bool = False, leave: int = 0) -> Path:
    "Boxes for every frame of the segments of `write_world`, at 25 a second."
    rows = []
    for segment in pd.read_csv(root / "segments.csv").itertuples():
        start, stop = round(segment.start_sec * 25), round(segment.stop_sec * 25)
        numbers = range(stop - start) if relative else range(start + shift, stop + shift)
        rows += [dict(segment_id=segment.segment_id, frame=n, left=30 * scale, top=20 * scale, right=120 * scale, bottom=90 * scale) for n in numbers]
    rows = [r for r in rows if int(r["segment_id"][1]) >= leave]
    pd.DataFrame(rows).to_csv(root / "hand_boxes.csv", index=False)
    return root / "hand_boxes.csv"


@pytest.mark.parametrize("settings,level,words", [
    ({}, None, ""), (dict(shift=1), "problem", "one too high"), (dict(shift=-1), "problem", "one too low"),
    (dict(shift=70), "warning", "none on their own frames"),
    (dict(scale=3.0), "problem", "frames of another size"), (dict(scale=0.5), None, ""), (dict(leave=1), "problem", "v0_0, v0_1 have no box")])
def test_ready_boxes(own, settings, level, words):
    place = boxes_of(own, **settings)
    for check in (look("csv", own), check_data("boxes", place)):
        hands = [f for f in check.findings if f.section == "Hands" and f.level in ("problem", "warning")]
        assert [f.level for f in hands] == [level] * bool(level) and all(words in f.text for f in hands), str(check)
    assert str(check).startswith("Hand boxes: ") and str(place) in str(check)


def test_boxes_numbered_within_each_segment(own):
    rows = pd.read_csv(own / "segments.csv")
    rows.assign(start_sec=rows.start_sec.clip(lower=1.3), stop_sec=2.2).to_csv(own / "segments.csv", index=False)
    boxes_of(own, relative=True)
    assert "from the beginning of each segment" in texts(look("csv", own), "problem", "Hands")


def test_boxes_of_another_dataset_and_beyond_the_frame(own):
    boxes = pd.read_csv(boxes_of(own))
    boxes.loc[3, ["right"]] = 170
    boxes.to_csv(own / "hand_boxes.csv", index=False)
    assert "1 segment has boxes beyond the frame of 128 x 96 pixels, such as v0_0" in texts(look("csv", own), "warning", "Hands")
    boxes.assign(segment_id="x" + boxes.segment_id).to_csv(own / "hand_boxes.csv", index=False)
    assert "names them like 'xv0_0', the dataset like 'v0_0'" in texts(look("csv", own), "problem", "Hands")
    (own / "segments.csv").rename(own.parent / "elsewhere.csv")
    with pytest.raises(DataError, match="--data"): check_data("boxes", own / "hand_boxes.csv")


def test_costs_are_of_the_segments_that_are_there(mini):
    root, test = mini / "epic", read_segments("epic", mini / "epic", "test")
    for video in read_segments("epic", root, "train").video_path.unique(): os.unlink(video)
    cost = look("epic", root, encoder="ViT-B-16-quickgelu", feature_fps=5.0).facts["Disk and GPU"]
    (rate, there), = cost["ViT-B/16"].items()
    hours = (test.stop_sec - test.start_sec).sum() / 3600
    assert rate == "5 a second" and there["hours"] == pytest.approx(hours, abs=1e-3)
    assert there["million rows"] == pytest.approx(hours * 3600 * 5 / 1e6, abs=1e-3) and there["GB"] <= 0.001
    assert not {"ViT-L/14", "DINOv2 ViT-L/14"} & cost.keys() and cost["needed_GB"] < cost["free_GB"]


def test_official_boxes_of_epic_count_from_1_at_the_official_rate_in_two_files(mini):
    "As the release has them: one pickle for each split."
    root = mini / "epic"
    folder = root / "annotations" / "hand_crops"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        boxes = {s.segment_id: {n: (10, 10, 200, 140) for n in range(s.start_frame, s.stop_frame)} for s in read_segments("epic", root, split).itertuples()}
        (folder / f"hand_{split}.pkl").write_bytes(pickle.dumps(boxes))
    check = look("epic", root)
    assert check.ok and not check.of("warning", "Hands") and check.facts["Hands"]["share_of_frames"] == 1.0 and check.facts["Hands"]["with_box"] == 36
    for file in folder.iterdir():
        shifted = {s: {n - 1: box for n, box in own.items()} for s, own in pickle.loads(file.read_bytes()).items()}
        file.write_bytes(pickle.dumps(shifted))
    assert "one too low: 100%" in texts(look("epic", root), "problem", "Hands")


@pytest.fixture(scope="module")
def tiny():
    return create_encoder(register_tiny(), "random", "cpu")


def test_each_kind_of_weight_file(tmp_path, tiny):
    state = {k: v.clone().contiguous() for k, v in tiny.model.state_dict().items() if "attn_mask" not in k}
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "b.pt")
    check = check_data("weights", tmp_path, encoder=TINY)
    size = (tmp_path / "a.safetensors").stat().st_size
    assert check.ok and check.facts["a.safetensors"] == dict(bytes=size, format="safetensors", tensors=len(state), fits=TINY)
    assert check.facts["b.pt"]["format"] == "PyTorch state dict" and TINY in fitting_encoders(state)


def test_weights_that_are_damaged_wrong_or_could_run_code(tmp_path, tiny):
    state = {k: v.clone().contiguous() for k, v in tiny.model.state_dict().items() if "attn_mask" not in k}
    save_file(state, tmp_path / "good.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:5000])
    save_file(state | {"visual.proj": state["visual.proj"] * float("nan")}, tmp_path / "nan.safetensors")
    save_file({k: v for k, v in state.items() if k != "ln_final.weight"}, tmp_path / "lacks.safetensors")
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "page.pt").write_bytes(b"<!DOCTYPE html><title>Sign in</title>")
    (tmp_path / "pointer.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"state_dict": state, "hook": os.getcwd}, tmp_path / "code.pt")
    check = check_data("weights", tmp_path)
    wrong = {f.section: f.text for f in check.of("problem")}
    for name, words in {"cut.safetensors": "Refused", "nan.safetensors": "not finite", "lacks.safetensors": "missing: ln_final.weight",
                        "other.safetensors": "no encoder",
                        "page.pt": "a web page", "pointer.pt": "Git LFS", "empty.pt": "empty", "code.pt": "nothing in it was run"}.items():
        assert words in wrong.pop(name), name
    assert not wrong


def test_the_kits_own_weights_and_a_checkpoint_of_lavila(tmp_path):
    check = check_data("weights", ROOT / "data/mini/weights")
    names = ("mini-clip", "mini-clip-large", "mini-dino", "mini-lavila")
    assert check.ok and {s: f["fits"] for s, f in check.facts.items()} == {f"{n}.safetensors": n for n in names}
    torch.save({"epoch": 5, "state_dict": {"module.visual.temporal_embed": torch.zeros(1, 4, 768), "module.visual.cls_token": torch.zeros(1, 1, 768)},
                "args": Namespace(model="x")}, tmp_path / "checkpoint.pt")
    check = check_data("weights", tmp_path / "checkpoint.pt")
    assert check.facts["checkpoint.pt"]["format"] == "training checkpoint of LaViLa" and "Does not fit lavila-base" in texts(check, "problem")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]  # nothing was converted


def test_shapes_tell_the_encoders_of_the_paper():
    for name in ("ViT-B-16", "ViT-L-14"):
        config = open_clip.get_model_config(name)
        with torch.device("meta"): model = open_clip.CLIP(**{k: config[k] for k in ("embed_dim", "vision_cfg", "text_cfg")})
        names = fitting_encoders(model.state_dict())
        assert name in names and f"{name}-quickgelu" in names and all(n.startswith(name) for n in names)
        openai = fitting_encoders(model.state_dict() | dict.fromkeys(("input_resolution", "context_length", "vocab_size")))
        assert f"{name}-quickgelu" in openai and name not in openai
    for width, name in ((1024, "dinov2_vitl14"), (384, "dinov2_vits14")):
        state = {"patch_embed.proj.weight": torch.empty(width, 3, 14, 14, device="meta")}
        assert fitting_encoders(state) == [name] and fitting_encoders(state | {"register_tokens": torch.empty(1, 4, width)}) == [f"{name}_reg"]


def test_the_official_annotations_without_videos(shared_data, tmp_path):
    link_official_files(shared_data, tmp_path)
    with counted() as work: check = look("epic", tmp_path / "epic")
    assert work.calls < 100 * (67_217 + 9_668)
    facts = check.facts["Annotations"]
    assert [facts[s][k] for s in ("train", "test") for k in ("segments", "videos")] == [67_217, 495, 9_668, 138]
    assert (facts["nouns"], facts["verbs"]) == (300, 97)
    assert not check.of("problem", "Annotations") and "EPIC_100_train.csv is not, byte for byte" in texts(check, "warning")  # a substitute: data.md
    assert "Not one of the 633 videos" in texts(check, "problem") and not check.of("good", "Tables")
    assert "From features alone" in texts(check, "note", "Tables")
    assert check.facts["Disk and GPU"]["ViT-B/16"]["every frame"]["hours"] == pytest.approx(68.1, abs=0.1)
    check = look("egtea", tmp_path / "egtea")
    facts = check.facts["Annotations"]
    assert (facts["test"]["segments"], facts["nouns"], facts["verbs"]) == (6_065, 53, 19) and not check.of("problem", "Annotations")


def test_versions_of_ego4d(shared_data, tmp_path):
    folder = tmp_path / "ego4d/v2/annotations"
    folder.mkdir(parents=True)
    taxonomy = read_json(next(shared_data.rglob("fho_lta_taxonomy.json")))
    for split in ("train", "val"): shutil.copy(next(shared_data.rglob(f"fho_lta_{split}.sample.json")), folder / f"fho_lta_{split}.json")
    write_json(folder / "fho_lta_taxonomy.json", taxonomy)
    check = look("ego4d", tmp_path / "ego4d")
    assert (check.facts["Annotations"]["nouns"], check.facts["Annotations"]["verbs"]) == (521, 117)
    assert "2 segments of 1 video, 0.3 min; published were 63,956" in texts(check, "problem") and "the paper has about 33,000" in texts(check, "problem")
    write_json(folder / "fho_lta_taxonomy.json", dict(nouns=taxonomy["nouns"][:478], verbs=taxonomy["verbs"][:115]))
    check = look("ego4d", tmp_path / "ego4d")
    assert "478 nouns: this is version 1 of Ego4D" in texts(check, "problem")
    (tmp_path / "ego4d/v2").rename(tmp_path / "ego4d/v1")
    with pytest.raises(DataError, match="version 1 of Ego4D, and the paper uses version 2"): look("ego4d", tmp_path / "ego4d")


def test_real_clips_and_their_boxes(shared_data, tmp_path):
    check = check_data("csv", shared_data / "real_clips", features_root=tmp_path)
    assert check.ok and check.facts["Videos"]["there"] == check.facts["Videos"]["videos"] == 24 and check.facts["Hands"]["with_box"] >= 78
    assert not [f for f in check.findings if f.section == "Hands" and "too high" in f.text]


def test_bad_roots_name_the_right_one(mini, tmp_path, own):
    for root, words in {mini / "epik": "no such folder; did you mean 'epic'",
                        mini: f"is not the folder of EPIC-KITCHENS-100, {mini / 'epic'} is: xmic check-data epic",
                        mini / "world.json": "is a file", mini / "ego4d": "holds Ego4D, not EPIC-KITCHENS-100: xmic check-data ego4d"}.items():
        with pytest.raises(DataError, match=words): check_data("epic", root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is empty"): check_data("egtea", tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(DataError, match="holds nothing of EGTEA"): check_data("egtea", tmp_path / "other")
    for name, right in {"ego4": "ego4d", "EPIC-KITCHENS": "epic", "weight": "weights"}.items():
        with pytest.raises(DataError, match=f"did you mean {right!r}"): check_data(name, mini / "ego4d")
    with pytest.raises(DataError, match="no such file"): check_data("weights", tmp_path / "none.pt")
    with pytest.raises(DataError, match="what it costs is known of ViT-B/16"): check_data("csv", own, encoder="ResNet")
    assert datasets_in(mini / "epic") == ["epic"] and right_root("csv", own / "segments.csv") == own
    below = check_data("epic", mini / "epic/epic-kitchens-100-annotations")
    assert f"they are in {mini / 'epic'}" in below.of("problem", "Videos")[0].todo


@pytest.mark.parametrize("width", [60, 80, 120])
def test_text_keeps_to_the_width(mini, width):
    (mini / "epic/EPIC").mkdir()
    lines = look("epic", mini / "epic").text(width).splitlines()
    assert max(map(len, lines)) <= max(width, max(len(word) for line in lines for word in line.split()) + 8)
    assert all(line == "" or line[0] != " " or line.startswith(("  ✓ ", "  · ", "  ! ", "  ✗ ", "    ")) for line in lines)


def test_files_are_listed_once_for_each_folder(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    calls, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda p: calls.append(p) or scandir(p))
    sizes = file_sizes([str(tmp_path / n) for n in ("a", "folder", "broken", "b")] + [str(tmp_path / "none/x")])
    assert [*sizes.values()] == [3, -1, None, None, None] and len(calls) == 2
    assert blob_id(b"what is up, doc?") == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"


def test_boxes_of_videos_with_different_rates_are_numbered_right(tmp_path):
    (tmp_path / "videos").mkdir()
    rates, rows = [10, 10, 10, 25], []
    for v, rate in enumerate(rates):
        write_video(tmp_path / f"videos/v{v}.mp4", 3 * rate, rate)
        rows += [f"v{v}_0,{n},40,30,120,100" for n in range(rate, 2 * rate)]
    (tmp_path / "segments.csv").write_text("\n".join(["segment_id,video_id,start_sec,stop_sec,verb,noun", *(f"v{v}_0,v{v},1,2,cut,pan" for v in range(4))]))
    (tmp_path / "hand_boxes.csv").write_text("\n".join(["segment_id,frame,left,top,right,bottom", *rows]))
    check = check_data("csv", tmp_path, features_root=tmp_path / "features", progress=False)
    assert check.facts["Hands"]["share_of_frames"] == 1 and not check.of("warning", "Hands") and not check.of("problem", "Hands")
