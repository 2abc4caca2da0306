"""LaViLa: parity with the public release, the step from CLIP, and a loader that refuses everything but the weights."""
import json
import math
import os
import pickle
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from xmic.files import DataError
from xmic.lavila import (LAVILA_MEAN, LAVILA_STD, SIZES, DividedAttention, LaViLa, LaViLaConfig, convert_checkpoint, from_clip, load_lavila, prepare_clip,
                         read_checkpoint, read_lavila, resize_temporal, silence_time, tokenize)

TINY = LaViLaConfig(image=32, patch=8, width=32, blocks=2, heads=2, text_width=32, text_layers=1, text_heads=2, vocab_size=60, dim=8)


@pytest.fixture(scope="module")
def released(golden) -> tuple[dict[str, Tensor], dict[str, Tensor], LaViLaConfig]:
    "Weights and everything else of the golden vectors, and their sizes."
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
    to.write_bytes(to.read_bytes()[:-4])
    convert_checkpoint(golden / "lavila_checkpoint.pt", config, to)
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
