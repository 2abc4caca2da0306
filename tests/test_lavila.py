"""LaViLa: parity with the public release, the step from CLIP, and a loader that refuses everything but the weights."""
import json
import math
import os
import pickle
import warnings
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from world import extract_config, write_world
from xmic.classes import ClassSet
from xmic.clips import Clip, ClipTask, Pixels, clip_pixels
from xmic.encoders import create_encoder, embed_classes, embed_prompts
from xmic.features import ExtractConfig, FeatureStore, dataset_store, extract, extract_dataset
from xmic.files import DataError
from xmic.lavila import (LAVILA_MEAN, LAVILA_STD, SIZES, DividedAttention, LaViLa, LaViLaConfig, convert_checkpoint, from_clip, load_lavila, prepare_clip,
                         read_checkpoint, read_lavila, resize_temporal, silence_time, tokenize)
from xmic.recognizer import Recognizer
from xmic.segments import read_segments
from xmic.config import TrainConfig, resolve
from xmic.training import RunData, RunResult, run_name, train
from xmic.video import frame_indices, read_frames

ROOT = Path(__file__).resolve().parents[1]
TINY = LaViLaConfig(image=32, patch=8, width=32, blocks=2, heads=2, text_width=32, text_layers=1, text_heads=2, vocab_size=60, dim=8)


@pytest.fixture(scope="module")
def released(golden) -> tuple[dict[str, Tensor], dict[str, Tensor], LaViLaConfig]:
    "Weights and everything else of the reference numbers, and their sizes."
    tensors, c = load_file(golden / "lavila.safetensors"), json.loads((golden / "lavila.json").read_text())["config"]
    config = LaViLaConfig(c["image"], c["patch"], c["vision_width"], c["vision_blocks"], c["vision_heads"], c["configured_frames"], c["text_width"],
                          c["text_layers"], c["text_heads"], c["vocab_size"], c["context_length"], c["project_embed_dim"])
    return {k.removeprefix("param/"): v for k, v in tensors.items() if k.startswith("param/")}, tensors, config


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


def test_image_tower_is_the_releases_for_four_two_and_one_frames(released):
    state, tensors, config = released
    model = load_lavila(state, config).double()
    for frames in (4, 2, 1):
        clip = tensors["in/clip"].double()[:, :, :frames]
        same(model.visual(clip), tensors[f"out/F{frames}/vision_features"])
        same(model.encode_image(clip), tensors[f"out/F{frames}/image_embed"])
    same(model.encode_image(tensors["in/clip"].double(), normalize=True), tensors["out/F4/image_embed_normalised"])


def test_text_tower_is_the_releases(released):
    state, tensors, config = released
    model = load_lavila(state, config).double()
    same(model.encode_text(tensors["in/token_ids"]), tensors["out/text_embed"])
    same(model.encode_text(tensors["in/token_ids"], normalize=True), tensors["out/text_embed_normalised"])
    same(model.logit_scale.exp(), tensors["out/logit_scale_exp"])


def test_gated_variant_is_the_releases(released):
    state, tensors, config = released
    gates = {k.removeprefix("gated/param/"): v for k, v in tensors.items() if k.startswith("gated/param/")}
    model = load_lavila(state | gates, config).double()
    assert model.config.gated
    same(model.encode_image(tensors["in/clip"].double()), tensors["gated/image_embed"])


@pytest.mark.parametrize("frames", [2, 3, 8, 16])
def test_other_numbers_of_frames_are_the_releases(released, frames):
    state, tensors, config = released
    table = resize_temporal(state["visual.temporal_embed"].double(), frames)
    same(table, tensors[f"resized/F{frames}/temporal_embed"])
    model = load_lavila(state, config).double()
    model.visual.temporal_embed = torch.nn.Parameter(table)
    same(model.encode_image(tensors["in/clip"].double().repeat(1, 1, 4, 1, 1)[:, :, :frames]), tensors[f"resized/F{frames}/image_embed"])


def test_loading_for_more_frames_stretches_the_table_and_for_fewer_keeps_it(released):
    state, tensors, config = released
    assert load_lavila(state, config, frames=2).config.frames == 4
    stretched = load_lavila(state, config, frames=16)
    assert stretched.config.frames == 16
    torch.testing.assert_close(stretched.visual.temporal_embed.double(), tensors["resized/F16/temporal_embed"], rtol=1e-5, atol=1e-6)


def test_silent_time_attention_is_the_releases_initial_state(released):
    state, tensors, config = released
    model = load_lavila(state, config).double()
    silence_time(model.visual)
    same(model.encode_image(tensors["in/clip"][:, :, 0].double()), tensors["time_attention_at_initialisation/image_embed_F1"])


def test_published_checkpoint_converts_to_the_same_features(released, golden, tmp_path):
    _, tensors, config = released
    to = tmp_path / "converted.safetensors"
    model = load_lavila(load_file(convert_checkpoint(golden / "lavila_checkpoint.pt", config, to)), config).double()
    same(model.encode_image(tensors["in/clip"].double()), tensors["out/F4/image_embed"])
    about = json.loads(to.with_suffix(".json").read_text())
    assert about["epoch"] == 5 and about["args"]["clip_length"] == 4 and about["config"]["frames"] == 4
    written = to.stat().st_mtime_ns
    assert convert_checkpoint(golden / "lavila_checkpoint.pt", config, to) == to and to.stat().st_mtime_ns == written
    to.write_bytes(to.read_bytes()[:-4])  # not what was written: damaged, or somebody else's
    with pytest.raises(DataError, match="exists already"): convert_checkpoint(golden / "lavila_checkpoint.pt", config, to)
    convert_checkpoint(golden / "lavila_checkpoint.pt", config, to, overwrite=True)
    assert len(load_file(to)) == 75


@pytest.mark.parametrize("name, count, parameters, extra", [("lavila-base", 375, 177_662_977, 12), ("lavila-large", 591, 527_513_857, 24)])
def test_counts_of_the_published_sizes(name, count, parameters, extra):
    with torch.device("meta"):
        state, gated = LaViLa(SIZES[name]).state_dict(), LaViLa(replace(SIZES[name], gated=True)).state_dict()
    assert len(state) == count and sum(t.numel() for t in state.values()) == parameters
    assert len(gated) == count + extra
    vision = {k: v for k, v in state.items() if k.startswith("visual.")}
    time = [v for k, v in vision.items() if "timeattn" in k or "norm3" in k or "temporal_embed" in k]
    assert (len(vision), sum(map(torch.numel, vision.values())), sum(map(torch.numel, time))) == \
        {"lavila-base": (224, 114_169_344, 28_369_920), "lavila-large": (440, 403_994_624, 100_814_848)}[name]


def test_one_frame_with_silent_time_attention_is_clip():
    torch.manual_seed(0)
    clip = open_clip.model.CLIP(24, {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8},
                                {"context_length": 12, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}, quick_gelu=True).eval().double()
    ours = LaViLa(LaViLaConfig(32, 8, 64, 3, 4, 4, 32, 2, 2, 60, 12, 24)).eval().double()
    silence_time(ours.visual)
    with torch.no_grad(): ours.visual.temporal_embed.zero_()  # CLIP has none
    left = ours.load_state_dict(from_clip(clip.state_dict()) | {"image_projection": clip.visual.proj}, strict=False)
    assert not left.unexpected_keys and all(not k.startswith("visual.") or "time" in k or "norm3" in k or "temporal" in k for k in left.missing_keys)
    for module in ours.visual.modules():
        if isinstance(module, torch.nn.LayerNorm): module.eps = 1e-5
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours.encode_image(x), clip.encode_image(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.encode_image(x[:, :, None]), ours.encode_image(x), rtol=0, atol=0)


def test_divided_attention_is_full_attention_under_its_mask():
    torch.manual_seed(0)
    frames, patches, attention = 3, 4, DividedAttention(16, 2).double()
    x = torch.randn(2, 1 + frames * patches, 16, dtype=torch.float64)
    q, k, v = attention.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    frame, place = np.divmod(np.arange(frames * patches), patches)
    for along, axis in (("time", place), ("space", frame)):
        mask = torch.ones(1 + frames * patches, 1 + frames * patches, dtype=torch.bool)
        mask[1:, 1:] = torch.from_numpy(axis[:, None] == axis)
        full = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention(x, frames, along), attention.proj(full), rtol=1e-12, atol=1e-12)


def test_patches_that_are_not_kept_do_not_count():
    torch.manual_seed(0)
    model, clips, kept = LaViLa(TINY).eval(), torch.randn(2, 3, 4, 32, 32), torch.tensor([0, 5, 6, 15])
    blanked = clips.clone()
    blanked[..., 24:, :8] = 9  # patch 12
    assert torch.equal(model.encode_image(clips, kept=kept), model.encode_image(blanked, kept=kept))
    torch.testing.assert_close(model.encode_image(clips, kept=torch.arange(16)), model.encode_image(clips))


def test_more_frames_than_rows_and_other_sides_are_refused():
    model = LaViLa(TINY)
    with pytest.raises(DataError, match="5 frames.*4 rows.*resize_temporal"): model.encode_image(torch.zeros(1, 3, 5, 32, 32))
    with pytest.raises(DataError, match=r"\[40, 40\].*32 x 32"): model.encode_image(torch.zeros(1, 3, 4, 40, 40))


# --- the loader -----------------------------------------------------------------------------------------------------

def checkpoint(path: Path, state: dict | None = None, prefix: str = "module.", **more) -> Path:
    "A checkpoint in the published form."
    torch.manual_seed(0)
    state = LaViLa(TINY).state_dict() if state is None else state
    torch.save({"epoch": 5, "state_dict": {prefix + k: v for k, v in state.items()}, "args": Namespace(clip_length=4, model="x"),
                "best_acc1": np.float64(0.3), **more}, path)
    return path


def refused(path: Path, what: str) -> None:
    with pytest.raises(DataError, match=what): load_lavila(read_lavila(path, TINY), TINY, path)
    assert not path.with_suffix(".safetensors").exists()


def test_a_good_checkpoint_loads_with_its_settings(tmp_path):
    state, plain = read_checkpoint(checkpoint(tmp_path / "a.pt"))
    assert plain == {"epoch": 5, "args": {"clip_length": 4, "model": "x"}} and len(state) == len(LaViLa(TINY).state_dict())
    again = load_lavila(read_lavila(tmp_path / "a.pt", TINY), TINY)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in state.items()) and not again.training


def test_numpy_scalars_under_the_old_module_name_are_read(golden):
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(golden / "lavila_checkpoint.pt")
    assert "numpy.core.multiarray.scalar" in unsafe
    assert read_checkpoint(golden / "lavila_checkpoint.pt")[1]["epoch"] == 5


@pytest.mark.parametrize("fault, what", [
    ("extra", r"unexpected: visual\.more"), ("missing", r"missing: visual\.blocks\.1\.timeattn\.qkv\.bias"), ("shape", r"shape: image_projection is \(32, 9\)"),
    ("nan", r"not finite: text_projection"), ("half gated", r"missing: visual\.blocks\.1\.alpha_timeattn"), ("other size", r"shape: visual\.pos_embed")])
def test_weights_that_do_not_fit_are_refused(tmp_path, fault, what):
    state = LaViLa(TINY).state_dict()
    if fault == "extra": state["visual.more"] = torch.zeros(1)
    if fault == "missing": del state["visual.blocks.1.timeattn.qkv.bias"]
    if fault == "shape": state["image_projection"] = torch.zeros(32, 9)
    if fault == "nan": state["text_projection"][0, 0] = math.nan
    if fault == "half gated": state["visual.blocks.0.alpha_timeattn"] = torch.zeros(())
    if fault == "other size": state = LaViLa(replace(TINY, image=40)).state_dict()
    refused(checkpoint(tmp_path / "a.pt", state), what)


def test_only_one_leading_module_is_taken_off(tmp_path):
    refused(checkpoint(tmp_path / "a.pt", prefix="module.module."), r"missing: visual\.cls_token|unexpected: module\.")
    refused(checkpoint(tmp_path / "b.pt", prefix=""), "begin with 'module.'")
    state = LaViLa(TINY).state_dict()
    state["transformer.module.x"] = torch.zeros(1)
    refused(checkpoint(tmp_path / "c.pt", state), r"unexpected: transformer\.module\.x")


class Payload:
    "Leaves a file behind when it is unpickled."

    def __init__(self, file: Path): self.file = file

    def __reduce__(self): return (os.mkdir, (str(self.file),))


@pytest.mark.parametrize("place", ["args", "optimizer", "state_dict"])
def test_a_foreign_global_is_refused_and_never_run(tmp_path, place):
    left = tmp_path / "left behind"
    path = checkpoint(tmp_path / "a.pt", **{place: {"x": Payload(left)}})
    refused(path, r"mkdir.*nothing of it was loaded")
    assert not left.exists()
    with open(path, "rb") as file: assert b"mkdir" in file.read()  # the payload was there


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "short.pt").write_bytes(checkpoint(tmp_path / "a.pt").read_bytes()[:5000])
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Payload(tmp_path / "left"), protocol=2))
    for name in ("text", "short", "pickle"): refused(tmp_path / f"{name}.pt", "not readable|refers to")
    assert not (tmp_path / "left").exists()
    with pytest.raises(DataError, match="no such file"): read_lavila(tmp_path / "none.pt", TINY)
    with pytest.raises(DataError, match="not readable as safetensors"): read_lavila(tmp_path / "none.safetensors", TINY)
    torch.save({"epoch": 1}, tmp_path / "empty.pt")
    refused(tmp_path / "empty.pt", "no state_dict")


def test_the_md5_is_held_to_if_it_is_given_or_named(tmp_path):
    refused(checkpoint(tmp_path / "clip.ep_0003.md5sum_c89337.pt"), "MD5.*not c89337")
    path = checkpoint(tmp_path / "a.pt")
    with pytest.raises(DataError, match="MD5.*not abc"): convert_checkpoint(path, TINY, md5="abc")


def test_another_file_of_the_same_name_is_converted_anew(tmp_path):
    path = checkpoint(tmp_path / "a.pt")
    first = read_lavila(path, TINY)["image_projection"]
    changed = {k: v + 1 for k, v in LaViLa(TINY).state_dict().items()}
    assert not torch.equal(read_lavila(checkpoint(path, changed), TINY)["image_projection"], first)


@pytest.mark.parametrize("name", ["a.pt", "link.pt"])
def test_a_checkpoint_is_never_overwritten(tmp_path, name):
    path = checkpoint(tmp_path / "a.pt")
    os.link(path, tmp_path / "link.pt")
    before = path.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(DataError, match="is an input"): convert_checkpoint(path, TINY, tmp_path / name, overwrite=overwrite)
    assert path.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {"a.pt", "link.pt"}


@pytest.mark.parametrize("name", ["a.safetensors", "a.json"])
def test_a_conversion_overwrites_nothing_of_others_unasked(tmp_path, name):
    path = checkpoint(tmp_path / "a.pt")
    (tmp_path / name).write_text('{"notes": "mine"}')
    with pytest.raises(DataError, match=f"{name} exists already.*overwrite=True"): read_lavila(path, TINY)
    assert (tmp_path / name).read_text() == '{"notes": "mine"}' and len(list(tmp_path.iterdir())) == 2
    assert load_file(convert_checkpoint(path, TINY, overwrite=True))


# --- what goes in ---------------------------------------------------------------------------------------------------

def test_tokens_are_clips_and_long_texts_lose_their_end():
    texts = ["#C C takes the cup", "", "Wash  PLATE"]
    assert torch.equal(tokenize(texts), open_clip.get_tokenizer("ViT-B-16")(texts))
    with pytest.warns(UserWarning, match="1 of 2 texts.*end-of-text"): tokens = tokenize(["cup " * 80, "cup"])
    assert 49407 not in tokens[0] and tokens[0].argmax() == 0 and 49407 in tokens[1] and tokens.shape == (2, 77)


def test_clips_are_resized_without_antialiasing_and_shifted_by_the_releases_constants():
    frames = np.zeros((1, 64, 128, 3), np.uint8)
    frames[:, ::2] = 200  # every other row: antialiasing would make it grey
    clip = prepare_clip(frames, 32)  # sample points lie half-way between two rows
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (LAVILA_MEAN, LAVILA_STD))
    torch.testing.assert_close(clip * std + mean, torch.full((3, 1, 32, 32), 100.0), atol=1e-3, rtol=0)
    third = prepare_clip(np.repeat(np.arange(48, dtype=np.uint8)[None, :, None, None], 3, -1).repeat(48, 2), 16)[0, 0, :, 0]
    torch.testing.assert_close(third * LAVILA_STD[0] + LAVILA_MEAN[0], torch.arange(16) * 3 + 1.0, atol=1e-3, rtol=0)


# --- the encoder ----------------------------------------------------------------------------------------------------

random_weights = pytest.mark.filterwarnings("ignore:.*RANDOM weights")


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 50, 70, 3), np.uint8)


@random_weights
def test_features_of_clips_are_the_models():
    encoder, shown = create_encoder("mini-lavila", "random", "cpu", clip_frames=4), frames(8)
    expected = [encoder.model.encode_image(prepare_clip(shown[i:i + 4], 64)[None]) for i in (0, 4)]
    found = encoder.encode_frames(shown)
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=0.02 * found.abs().max().item())  # pixels are rounded to 8 bits
    torch.testing.assert_close(encoder.encode_frames(shown, batch_size=3), found, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="6 frames are no whole number of clips"): encoder.encode_frames(shown[:6])
    assert encoder.encode_frames(shown[:0]).shape == (0, 128)


@random_weights
def test_one_frame_clips_are_read_one_by_one_with_the_first_temporal_row():
    encoder, shown = create_encoder("mini-lavila", "random", "cpu"), frames(3)
    first = encoder.encode_frames(shown)
    assert first.shape == (3, 128)
    with torch.no_grad(): encoder.model.visual.temporal_embed[:, 1:] += 1
    assert torch.equal(encoder.encode_frames(shown), first)


@random_weights
def test_clip_frames_tell_features_apart_and_one_says_nothing():
    one, four, more = (create_encoder("mini-lavila", "random", "cpu", clip_frames=n) for n in (1, 4, 16))
    assert len({one.fingerprint, four.fingerprint, more.fingerprint}) == 3
    assert "clip_frames" not in one.config and "clip_frames" not in one.describe() and four.describe()["clip_frames"] == 4
    assert more.model.visual.temporal_embed.shape[1] == 16 and four.with_resize("squash").clip_frames == 4
    assert one.logit_scale == pytest.approx(1 / 0.07) and one.activation == "QuickGELU" and one.encode_text(["cup", "open door"]).shape == (2, 128)


def test_an_encoder_from_a_checkpoint_is_that_of_the_converted_file(tmp_path):
    torch.manual_seed(1)
    size = LaViLaConfig(**json.loads((ROOT / "data/mini/weights/mini-lavila.json").read_text())["lavila"])
    path = checkpoint(tmp_path / "a.pt", LaViLa(size).state_dict())
    made, again = (create_encoder("mini-lavila", file, "cpu") for file in (path, tmp_path / "a.safetensors"))
    assert made.fingerprint == again.fingerprint and made.weights == "a.pt"
    assert create_encoder("mini-lavila", path, "cpu", clip_frames=16).model.config.frames == 16
    with pytest.raises(DataError, match=r"shape: visual\.pos_embed"):
        create_encoder("mini-lavila", checkpoint(tmp_path / "b.pt", LaViLa(replace(size, image=128)).state_dict()), "cpu")


def test_published_sizes_need_a_file_and_say_which():
    for name in ("lavila-base", "lavila-large"):
        with pytest.raises(DataError, match="d73a9c.*c89337.*create_encoder"): create_encoder(name, device="cpu")
        with pytest.raises(DataError, match="no file 'x.pth'"): create_encoder(name, "x.pth", "cpu")


@random_weights
def test_encoders_without_time_refuse_clips():
    for name in ("mini-clip", "mini-dino", "ViT-B-16-quickgelu"):
        with pytest.raises(DataError, match="clip_frames=4.*knows no time"): create_encoder(name, "random", "cpu", clip_frames=4)
    with pytest.raises(DataError, match="clip_frames=3"): create_encoder("mini-lavila", "random", "cpu", clip_frames=3)


@random_weights
def test_several_prompts_are_averaged_and_one_is_as_before(tmp_path):
    encoder, names = create_encoder("mini-lavila", "random", "cpu"), ClassSet.from_names(["cup", "knife"])
    assert torch.equal(embed_prompts(encoder, names, "a {}", tmp_path).text, embed_classes(encoder, ["a cup", "a knife"], tmp_path).text)
    assert len(list(tmp_path.iterdir())) == 1
    both = embed_prompts(encoder, names, "#C C {} | a {}", tmp_path)
    parts = [torch.nn.functional.normalize(encoder.encode_text([t.format(n) for n in names.names]), dim=-1) for t in ("#C C {}", "a {}")]
    torch.testing.assert_close(both.text, torch.nn.functional.normalize(sum(parts), dim=-1))
    torch.testing.assert_close(embed_prompts(encoder, names, "#C C {} | a {}", tmp_path).text, both.text)
    assert both.names == ("#C C cup | a cup", "#C C knife | a knife")
    with pytest.raises(DataError, match="exactly one"): embed_prompts(encoder, names, "a {} | b")


# --- from videos to accuracies --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("lavila world"), videos=5)


@pytest.fixture(scope="module")
def features(world, tmp_path_factory) -> Path:
    "Features of the world in clips of one, four and sixteen frames."
    root = tmp_path_factory.mktemp("lavila features")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in (1, 4, 16): extract_dataset(extract_config(world, root, encoder="mini-lavila", clip_frames=n))
    return root


@random_weights
@pytest.mark.parametrize("n", [4, 16])
def test_a_segments_rows_are_its_test_frames_in_runs(world, features, n):
    encoder, config = create_encoder("mini-lavila", "random", "cpu", clip_frames=n), ExtractConfig(dataset="csv")
    store = dataset_store(features, encoder, config.resize, "csv")
    every = dataset_store(features, create_encoder("mini-lavila", "random", "cpu"), config.resize, "csv")
    assert store.verify() == [] and store.manifest["full"]["clip_frames"] == n and "clip_frames" not in every.manifest["full"]
    for segment in read_segments("csv", world, "train").itertuples():
        stored = every.frames(segment.segment_id, "full").numpy()
        wanted = stored[frame_indices(0, len(stored), 16)]
        rows = store.segment(segment.segment_id, "full")
        assert rows.shape == (16 // n, 128) and store.frames(segment.segment_id, "full").tolist() == wanted[::n].tolist()
        expected = encoder.encode_frames(read_frames(segment.video_path, wanted))
        torch.testing.assert_close(rows.float(), expected, rtol=2e-3, atol=2e-3)


@random_weights
def test_small_chunks_and_batches_of_overlapping_segments_give_the_same_rows(world, features):
    encoder = create_encoder("mini-lavila", "random", "cpu", clip_frames=4)
    segments = read_segments("csv", world, "test").iloc[:2]  # they overlap
    rows = tuple(SimpleNamespace(**row._asdict()) for row in segments.itertuples(index=False))
    task = ClipTask("v", rows, ("full",), (encoder.preprocess,), chunk=3, clip_frames=4)
    parts = list(clip_pixels(task))
    rows = encoder.encode_pixels(np.concatenate([p.squares[0] for p in parts if isinstance(p, Pixels)]))
    store = dataset_store(features, encoder, "shortest", "csv")
    for clip in (p for p in parts if isinstance(p, Clip)):
        torch.testing.assert_close(rows[clip.rows["full"]].half(), store.segment(clip.segment_id, "full"), rtol=2e-3, atol=2e-3)
    assert all(len(p.squares[0]) == 4 for p in parts if isinstance(p, Pixels)) and len(rows) == 8


@random_weights
def test_encoders_of_different_clips_are_extracted_apart(world, tmp_path):
    encoders = [create_encoder("mini-lavila", "random", "cpu", clip_frames=n) for n in (1, 4)]
    with pytest.raises(DataError, match="clips of 1 and 4 frames"):
        extract(read_segments("csv", world, "test"), encoders, [FeatureStore(tmp_path / str(n)) for n in (1, 4)], progress=False)


@random_weights
@pytest.mark.parametrize("clips, changes", [
    (1, dict(method="zero_shot", template="#C C {} | #C {}")), (16, dict(method="zero_shot")), (4, dict()),
    (4, dict(context_encoder="mini-lavila", context_weights="random")),
    (1, dict(context_encoder="mini-lavila", context_weights="random", context_clip_frames=16)),
    (4, dict(method="coop", prompt_length=2))])
def test_a_run_reads_clips(world, features, tmp_path, clips, changes):
    config = TrainConfig(**dict(dataset="csv", data_root=str(world), features_root=str(features), encoder="mini-lavila", weights="random", clip_frames=clips,
                                runs_root=str(tmp_path), epochs=2, warmup_epochs=0, batch_size=4, device="cpu", progress=False) | changes)
    result = train(config)
    assert result.metrics["results"]["csv"]["noun"]["top1"]["count"] == 6
    found = RunResult.read(result.folder)
    assert found.config.clip_frames == clips and train(config).metrics == result.metrics
    if changes.get("context_clip_frames") == 16:
        recognised = Recognizer.from_pretrained(result.folder, "cpu").predict(world / "videos/v0.mp4", nouns=["pan", "knife"])
        assert len(recognised.nouns) == 2


@random_weights
def test_every_row_of_a_clip_counts_alike(world, features):
    config = resolve(TrainConfig(dataset="csv", data_root=str(world), features_root=str(features), encoder="mini-lavila", weights="random", clip_frames=4,
                                 context_encoder="mini-lavila", context_weights="random", device="cpu"))
    split = RunData(config, torch.device("cpu")).split("csv", "test")
    assert split.streams.clip_frames == 1  # rows are counted on the single frames of the context
    rows, _ = split.rows(16)
    video = split.streams.batch(np.arange(2), rows[:2]).video
    stored = dataset_store(features, create_encoder("mini-lavila", "random", "cpu", clip_frames=4), "shortest", "csv")
    for i in range(2):
        expected = stored.segment(split.segments.segment_id[i], config.classified_view).float().repeat_interleave(4, 0)
        torch.testing.assert_close(video[i], expected, rtol=0, atol=0)


def test_settings_of_clips_that_cannot_be_are_refused():
    with pytest.raises(DataError, match="context_clip_frames=4 belongs to context_encoder"): resolve(TrainConfig(context_clip_frames=4))
    with pytest.raises(DataError, match="in each of its prompts"): resolve(TrainConfig(template="#C C {} | #C"))


def test_new_settings_do_not_rename_runs():
    assert run_name(resolve(TrainConfig(leave_last_frame=False))) == "epic-noun-xmic-seed0-15c44a18"
    assert run_name(resolve(TrainConfig(clip_frames=4))) != run_name(resolve(TrainConfig()))
