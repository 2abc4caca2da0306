"""What the release does otherwise: each setting against its formula, where it is refused, and what earlier runs and stores keep."""
import hashlib
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from world import register_tiny
from test_clips import info, segment
from test_prompting import NAMES, embeddings, make_tower
from xmic import experiments
from xmic.adapter import XMIC
from xmic.clip_adapter import CLIPAdapter
from xmic.clips import wanted_frames
from xmic.config import LEGACY, TrainConfig, as_it_was, build_method, read_config, resolve
from xmic.encoders import ClassEmbeddings, create_encoder
from xmic.features import ExtractConfig, dataset_store, extract_dataset, manifest_of, released_encoder
from xmic.files import DataError, write_json
from xmic.lavila import LaViLa, LaViLaConfig, load_lavila
from xmic.pixels import resize_aliased
from xmic.prompting import A5, CoCoOp
from xmic.streams import Batch, draw_rows, shift_bins
from xmic.training import RunData, Split, run_name

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Frames

def sampled(config: TrainConfig, dataset: str, lengths: list[int], fps: object = "every frame") -> Split:
    "The split that a run makes of segments with so many rows."
    found = pd.DataFrame(dict(segment_id=[str(i) for i in range(len(lengths))], noun="cup"))
    classes = {dataset: {"noun": SimpleNamespace(labels=lambda names: np.zeros(len(names), np.int64))}}
    streams = SimpleNamespace(lengths=np.array(lengths), views=[SimpleNamespace(manifest=dict(feature_fps=fps))], clip_frames=1)
    return RunData._sampled(SimpleNamespace(config=config, kinds=["noun"], classes=classes), found, streams, dataset, len(lengths))


def test_epic_leaves_the_last_frame_as_released(golden):
    cases = [case for case in json.loads((golden / "frame_indices.json").read_text())["epic"] if case["T"] == 16]
    lengths = [case["stop_frame"] - case["start_frame"] for case in cases]
    released, kits = resolve(TrainConfig(dataset="epic")), resolve(TrainConfig(dataset="epic", leave_last_frame=False))
    rows = sampled(released, "epic", lengths).rows(16)[0]
    assert rows.tolist() == [case["test"] for case in cases]
    assert (sampled(kits, "epic", lengths).rows(16)[0] != rows).any(1).all()
    draws = [sampled(released, "epic", lengths).rows(16, np.random.default_rng(seed))[0] for seed in range(2000)]
    assert np.min(draws, 0).tolist() == [case["train_min"] for case in cases] and np.max(draws, 0).tolist() == [case["train_max"] for case in cases]
    for split in (sampled(released, "ego4d", lengths), sampled(released, "epic", lengths, 8.0)):  # other datasets, and stores of fewer frames
        if split.stop[0] == lengths[0]: assert split.stop.tolist() == lengths
    assert sampled(released, "epic", [1]).stop.tolist() == [1]


def test_egtea_shifts_its_test_frames_as_released(golden):
    cases = [case for case in json.loads((golden / "frame_indices.json").read_text())["egtea"] if case["T"] == 16]
    lengths = [case["rows"] for case in cases]
    config = replace(resolve(TrainConfig(dataset="ego4d", targets=["egtea"], egtea_random_shift=True)), seed=3)
    split = sampled(config, "egtea", lengths)
    video, context = split.rows(16)
    for rows in (video, context):
        for found, case in zip(rows, cases): assert set(found - case["eval"]) <= {found[0]} and 0 <= found[0] <= case["shift_max"]
    assert (video != context).any() and np.array_equal(split.rows(16)[0], video)  # a stream each; the same in every evaluation
    zeros, stops = np.zeros(len(lengths), int), np.array(lengths)
    draws = [shift_bins(zeros, stops, 16, np.random.default_rng(seed)) for seed in range(300)]
    assert np.min(draws, 0).tolist() == [case["eval"] for case in cases] and np.max(draws, 0).tolist() == [case["with_largest_shift"] for case in cases]
    assert sampled(replace(config, egtea_random_shift=False), "egtea", lengths).rows(16)[1] is None


def test_free_draws_are_even_over_the_whole_segment():
    start, stop = np.full(4000, 10), np.full(4000, 30)
    rows = draw_rows(start, stop, 16, np.random.default_rng(0))
    assert rows.shape == (4000, 16) and (np.diff(rows) >= 0).all() and set(rows.ravel()) == set(range(10, 30))
    share = np.bincount(rows.ravel())[10:] / rows.size
    assert abs(share - 1 / 20).max() < 5 * np.sqrt(0.05 * 0.95 / rows.size)
    split = sampled(resolve(TrainConfig(dataset="ego4d", central_seconds=0.0, train_frames="random")), "ego4d", [20] * 50)
    assert (np.diff(split.rows(16, np.random.default_rng(0))[0]) == 0).any() and (np.diff(split.rows(16)[0]) > 0).all()  # training alone


def test_extra_seconds_end_with_the_video():
    for start, stop, frames in ((1.0, 4.0, range(30, 147)), (5.0, 9.5, range(150, 300)), (8.0, 10.0, range(240, 300))):
        assert wanted_frames(info(), segment(start=start, stop=stop), extra_seconds=0.9).tolist() == list(frames)
    folder = segment(start_frame=11, stop_frame=31)
    assert wanted_frames(info(fps=60.0, folder=True), folder, extra_seconds=0.9).tolist() == list(range(10, 30))


# Pixels and stores

def test_released_pixels_have_features_of_their_own():
    encoder = create_encoder(register_tiny(), "random", "cpu")
    before = encoder.fingerprint
    frame = np.random.default_rng(0).integers(0, 256, (1, 90, 160, 3), np.uint8)
    side = encoder.preprocess.size
    ego4d, egtea, epic = (released_encoder(encoder, "as released", d) for d in ("ego4d", "egtea", "epic"))
    assert np.array_equal(ego4d.preprocess.pixels(frame)[0], resize_aliased(frame[0], (side, side)))
    x = F.interpolate(torch.from_numpy(frame).permute(0, 3, 1, 2).double(), (side, side), mode="bilinear", align_corners=False, antialias=False)
    assert abs(ego4d.preprocess.pixels(frame)[0] - x[0].permute(1, 2, 0).numpy()).max() <= 0.51
    hand = ego4d.with_resize("shortest").preprocess
    assert hand.interpolation == "bilinear-aliased" and hand.resize == "shortest"
    pixels = torch.from_numpy(egtea.preprocess.pixels(frame))
    mean, std = torch.tensor([108.3273, 116.7460, 104.0937]), torch.tensor([68.5005, 66.6322, 70.3232])
    expected = (pixels.float() - mean) / std
    torch.testing.assert_close(egtea.normalise(pixels).permute(0, 2, 3, 1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(egtea.encode_pixels(pixels), egtea.encode_pixels(pixels, plain=True), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(egtea.encode_pixels(pixels), encoder.encode_pixels(pixels), atol=1e-3)
    assert encoder.fingerprint == epic.fingerprint == before and encoder.preprocess.mean != egtea.preprocess.mean
    for dataset in ("ego4d", "egtea"):
        by_size = released_encoder(encoder, "by dataset", dataset).fingerprint
        assert by_size == encoder.with_resize("squash").fingerprint != released_encoder(encoder, "as released", dataset).fingerprint


def test_longer_spans_have_a_store_of_their_own(tmp_path):
    encoder = create_encoder(register_tiny(), "random", "cpu")
    usual, longer = (dataset_store(tmp_path, encoder, "shortest", "ego4d", extra) for extra in (0.0, 0.9))
    assert usual.root == tmp_path / encoder.fingerprint / "ego4d" and longer.root == tmp_path / f"{encoder.fingerprint}-plus0.9s" / "ego4d"
    assert dataset_store(tmp_path, encoder, "shortest", "epic", 0.9).root == tmp_path / encoder.fingerprint / "epic"
    assert "extra_seconds" not in manifest_of(encoder, "full", None, "pyav", None)
    made = manifest_of(encoder, "full", None, "pyav", None, 0.9)
    assert made["extra_seconds"] == 0.9 and tmp_path / made["fingerprint"] / "ego4d" == longer.root
    with pytest.raises(DataError, match="for Ego4D alone"): extract_dataset(ExtractConfig(dataset="epic", extra_seconds=0.9))


# Methods, in float64

def test_the_raw_mean_is_blended():
    method = CLIPAdapter(24, ratio=0.3, temporal_layers=2, frames=6, heads=4, blend="raw").double()
    frames, text = torch.randn(3, 6, 24, dtype=torch.float64), torch.randn(5, 24, dtype=torch.float64)
    attended = method.temporal(frames + method.temporal_embedding).mean(1)
    adapted = (attended @ method.visual.fc[0].weight.T).relu() @ method.visual.fc[2].weight.T
    video = 0.3 * adapted.relu() + 0.7 * frames.mean(1)
    torch.testing.assert_close(method.video(frames), video, rtol=1e-12, atol=1e-12)
    method.blend = "attended"
    assert not torch.allclose(method.video(frames), video)
    for odd in (dict(temporal_layers=0), dict(temporal_layers=2, branches="text"), dict(temporal_layers=2, average="after")):
        with pytest.raises(DataError, match="blend='raw'"): CLIPAdapter(24, blend="raw", **odd)


def test_cocoop_reads_the_mean_as_it_is():
    tower = make_tower()
    tower.text.double()
    method, frames = CoCoOp(tower, 24, 4, "random", normalize_meta=False).double(), 7 * torch.randn(2, 6, 24, dtype=torch.float64)
    read = []
    method.meta_net.register_forward_hook(lambda module, args, out: read.append(args[0]))
    method(Batch(frames), embeddings(NAMES))
    method.normalize_meta = True
    method(Batch(frames), embeddings(NAMES))
    assert torch.equal(read[0], frames.mean(1)) and torch.equal(read[1], F.normalize(frames.mean(1), dim=-1))


def test_a5_of_the_release():
    tower = make_tower()
    tower.text.double()
    method = A5(tower, 24, 6, 4, 4, 2, 8, 0.01, bottleneck=4.0, sides="front", train_logit_scale=True).double()
    assert [b.mlp.c_fc.out_features for b in method.temporal.resblocks] == [6, 6] and method.prompts.vectors.shape == (4, tower.width)
    (prompt, *_), (ids, *_) = method.prompts.prompts_of(tower, NAMES), tower.tokens(list(NAMES))
    assert prompt == [~0, ~1, ~2, ~3, *ids]  # in front alone, and no period
    frames = torch.randn(3, 6, 24, dtype=torch.float64)
    video = F.normalize(method.temporal(frames + method.temporal_embedding).mean(1), dim=-1)
    logits = method(Batch(frames), embeddings(NAMES))
    torch.testing.assert_close(logits, 100 * video @ F.normalize(method.prompts(NAMES), dim=-1).T, rtol=1e-6, atol=1e-6)
    logits.logsumexp(1).sum().backward()
    assert method.logit_scale.grad is not None and method.prompts.vectors.grad.abs().sum() > 0
    assert "logit_scale" not in A5(tower, 24).state_dict() and A5(tower, 24).temporal.resblocks[0].mlp.c_fc.out_features == 96
    config = resolve(TrainConfig(method="a5", prompt_sides="front", bottleneck=4.0, temperature=0.0, train_logit_scale=True))
    built = build_method(config, 24, 24, 100.0, make_tower())
    assert abs(built.logit_scale.exp().item() - 100) < 1e-3 and built.temporal.resblocks[0].mlp.c_fc.out_features == 6


def test_xmic_by_its_codes_defaults():
    config = resolve(TrainConfig(last_relu=False, bottleneck=0.25, vector_prompt=True, frames=6))
    tower = make_tower()
    tower.text.double()
    method = build_method(config, 24, 64, 100.0, tower).double()
    assert [type(layer) for layer in method.mlp] == [nn.Linear, nn.ReLU, nn.Linear] and method.mlp[2].out_features == tower.width
    assert {b.mlp.c_fc.out_features for part in (method.adapter.spatial, method.adapter.temporal) for b in part.resblocks} == {256}
    batch = Batch(torch.randn(3, 6, 24, dtype=torch.float64), torch.randn(3, 6, 2, 64, dtype=torch.float64))
    tokens = method.mlp(method.adapter(F.normalize(batch.context, dim=-1)))
    own = [torch.cat([method.text_prompt.vectors, token[None]]) for token in tokens]  # 16 learned vectors, then the video's
    expected = torch.cat([tower.features([[~i for i in range(17)]], vectors) for vectors in own])
    torch.testing.assert_close(method.vector(batch.context), expected, rtol=1e-10, atol=1e-10)
    classes = ClassEmbeddings(NAMES, torch.randn(len(NAMES), 24, dtype=torch.float64))
    logits = method(batch, classes)
    sums = F.normalize(classes.text + 2 * expected[:, None], dim=-1)
    torch.testing.assert_close(logits, 100 * (sums @ F.normalize(batch.video.mean(1), dim=-1)[..., None])[..., 0], rtol=1e-6, atol=1e-6)
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    assert not any("tower" in name for name in method.state_dict())


def test_a_lavila_keeps_no_memory_of_its_input():
    config = LaViLaConfig(image=32, patch=8, width=32, blocks=2, heads=2, text_width=32, text_layers=1, text_heads=2, vocab_size=60, dim=8)
    state = {name: tensor.clone() for name, tensor in LaViLa(config).state_dict().items()}
    model = load_lavila(state, config)
    ours = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert not ours & {p.untyped_storage().data_ptr() for p in model.parameters()}
    before = {name: p.clone() for name, p in model.named_parameters()}
    for tensor in state.values(): tensor.fill_(7)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# Where they are refused

@pytest.mark.parametrize("changes, message", [
    (dict(leave_last_frame=True, dataset="ego4d"), "EPIC-KITCHENS, which takes no part"), (dict(egtea_empty_class=True), "egtea_empty_class.*takes no part"),
    (dict(egtea_random_shift=True), "egtea_random_shift.*takes no part"), (dict(extra_seconds=0.9), "Ego4D, which takes no part"),
    (dict(extra_seconds=-1.0), "extra_seconds=-1"), (dict(extra_seconds=0.9, targets=["ego4d"], method="vita_clip"), "vita_clip does not read"),
    (dict(train_frames="random", method="zero_shot"), "not trained"), (dict(train_frames="random", double_shift=True, dataset="ego4d"), "choose one"),
    (dict(train_frames="often"), "train_frames"), (dict(last_relu=False, method="coop"), "coop has not"), (dict(last_relu=False, post_mlp=False), "this run has not"),
    (dict(bottleneck=0.25, method="coop"), "xmic and a5 alone"), (dict(bottleneck=0.0), "bottleneck=0"), (dict(vector_prompt=True, method="a5"), "xmic alone"),
    (dict(prompt_sides="front"), "a5 alone"), (dict(prompt_sides="back", method="a5"), "prompt_sides"), (dict(normalize_meta=False), "cocoop alone"),
    (dict(adapter_blend="raw"), "clip_adapter_temporal alone"), (dict(adapter_blend="raw", method="clip_adapter_temporal", adapter_average="after"), "clip_adapter_temporal alone"),
    (dict(resize="as released", method="vita_clip", targets=["egtea"]), "by dataset"),
])
def test_a_setting_is_refused_where_it_does_nothing(changes, message):
    with pytest.raises(DataError, match=message): resolve(TrainConfig(**dict(dataset="epic") | changes))


# What was there before

def test_recipes_and_earlier_runs(tmp_path):
    released = resolve(TrainConfig(dataset="ego4d", targets=["epic"], method="clip_adapter_temporal"))
    assert released.leave_last_frame and released.adapter_blend == "raw"
    paper = resolve(TrainConfig(dataset="ego4d", targets=["epic"], method="clip_adapter_temporal", recipe="paper"))
    assert paper.leave_last_frame is False and paper.adapter_blend == "attended"
    old = {k: v for k, v in asdict(released).items() if k not in LEGACY or k == "code"}
    write_json(tmp_path / "config.json", old | dict(resize="as released"))
    read = read_config(tmp_path / "config.json")
    assert (read.leave_last_frame, read.adapter_blend, read.bottleneck, read.resize) == (False, "attended", 4.0, "by dataset")
    assert as_it_was(dict(method="a5"))["bottleneck"] == 0.25
    assert run_name(read) != run_name(replace(read, resize="as released")) and run_name(read) != run_name(replace(read, adapter_blend="raw"))


def test_names_of_runs_without_epic_stay(tmp_path):
    for method in ("xmic", "a5", "clip_adapter", "zero_shot"):
        config = resolve(TrainConfig(dataset="ego4d", targets=["egtea"], method=method))
        apart = {"name", "runs_root", "progress", "tensorboard", "resident", "device", "data_root", "target_roots", "features_root"}
        key = json.dumps({k: v for k, v in asdict(config).items() if k not in apart | LEGACY.keys()}, sort_keys=True)
        assert run_name(config).endswith(hashlib.sha256(key.encode()).hexdigest()[:8])


def test_the_plan_says_what_it_classifies(monkeypatch):
    monkeypatch.setenv("XMIC_DATA", "/data")
    for made in (experiments.profile("mini"), experiments.profile("paper")):
        row = experiments.VIEWS["F"]
        assert experiments.run(made, "ego4d", "noun", row).parameters["classified_view"] == "hand"
        other = replace(made, classified={"F": "full", "Vita-CLIP": "full"})
        assert experiments.run(other, "ego4d", "noun", row).parameters["classified_view"] == "full"
        assert experiments.run(other, "ego4d", "noun", row).name != experiments.run(made, "ego4d", "noun", row).name
        assert experiments.run(other, "ego4d", "noun", {}).name == experiments.run(made, "ego4d", "noun", {}).name
        for p, view in ((made, "hand"), (other, "full")):
            vita = experiments.run(p, "ego4d", "noun", dict(method="vita_clip"))
            assert vita.parameters["classified_view"] == view and {tuple(s.parameters["views"]) for s in vita.stores} == {(view,)}
    assert all(r.parameters["leave_last_frame"] is False for r in experiments.plan(experiments.profile("mini")).runs.values())
    for r in experiments.plan(experiments.profile("paper")).runs.values():
        assert resolve(TrainConfig(**{k: v for k, v in r.parameters.items() if k in ("dataset", "targets", "recipe", "method")})).leave_last_frame \
            == r.parameters["leave_last_frame"]
