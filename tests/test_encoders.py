"""Encoders: the same features as open_clip, safe and strict loading, fingerprints, caches, and what goes wrong."""
import copy
import argparse
import json
import logging
import math
import os
import pickle
import random
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image
from safetensors.torch import load_file, save_file

from xmic import encoders
from xmic.encoders import (DINOV2_NAMES, ClassEmbeddings, Encoder, build_model, create_encoder, embed_classes, has_text, hash_weights, read_weights,
                           set_image_size, timm_name)
from xmic.files import DataError
from xmic.pixels import CLIP_MEAN, CLIP_STD, Preprocess
from xmic.text import TextTower
from xmic.towers import fast_tower

pytestmark = [pytest.mark.filterwarnings("ignore:.*RANDOM weights"),
              pytest.mark.filterwarnings("ignore:.*(deprecated|TracerWarning):"),
              pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]
ROOT = Path(__file__).resolve().parents[1]
QUICK, PLAIN = "xmictest-quickgelu", "xmictest"
CONFIG = {"embed_dim": 24, "quick_gelu": True,
          "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 64, "patch_size": 16},
          "text_cfg": {"context_length": 10, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}}
NAMES = ["wash plate", "cut", "open the fridge door"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    "A folder with one tiny CLIP's weights in every layout; its logit scale is OpenAI's."
    folder = tmp_path_factory.mktemp("weights")
    configs = {QUICK: CONFIG, PLAIN: {**CONFIG, "quick_gelu": False},
               "xmictest-heads": {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "head_width": 32}},
               "xmictest-large": {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "image_size": 48}}}
    (folder / "configs").mkdir()
    for name, config in configs.items():
        (folder / "configs" / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "configs")
    model = build_model(QUICK, seed=7).eval()
    with torch.no_grad(): model.logit_scale.fill_(math.log(100))
    state = model.state_dict()
    save_file(state, folder / "plain.safetensors")
    torch.save(state, folder / "plain.pt")
    torch.save({"epoch": 3, "name": "x", "state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "train.pt")
    archive(model, folder / "archive.pt")
    return folder


def archive(model: torch.nn.Module, path: Path, half: bool = False, scalars: bool = True) -> None:
    "A TorchScript archive in the layout that OpenAI published CLIP in."
    model = copy.deepcopy(model)
    mask = model._buffers.pop("attn_mask")
    model.attn_mask = mask  # OpenAI's is an attribute: in the archive, but in no state dict
    if half: open_clip.convert_weights_to_fp16(model)
    if scalars:
        for name, value in (("input_resolution", 32), ("context_length", 10), ("vocab_size", 49408)):
            if name in model.__dict__: del model.__dict__[name]
            model.register_buffer(name, torch.tensor(value))
    dtype = torch.float16 if half else torch.float32
    traced = torch.jit.trace_module(model, {"encode_image": torch.zeros(1, 3, 32, 32, dtype=dtype)}, check_trace=False)
    torch.jit.save(traced, path)


@pytest.fixture(scope="module")
def encoder(files) -> Encoder:
    return create_encoder(QUICK, files / "plain.safetensors", "cpu")


def frames(n: int = 5, height: int = 50, width: int = 70, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)


# --- features -------------------------------------------------------------------------------------------------------

def test_features_are_open_clips(files, encoder):
    model, transform, _ = open_clip.create_model_and_transforms(QUICK)
    transform = open_clip.image_transform(32, is_train=False)
    model.load_state_dict(load_file(files / "plain.safetensors"))
    model.eval()
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(Image.fromarray(frame)) for frame in frames()]))
        texts = model.encode_text(open_clip.get_tokenizer(QUICK)(NAMES))
    torch.testing.assert_close(encoder.encode_frames(frames()), images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.encode_text(NAMES), texts, rtol=1e-5, atol=1e-5)
    assert encoder.dim == 24 == images.shape[1] and encoder.logit_scale == pytest.approx(100, abs=1e-3)
    assert not torch.allclose(texts.norm(dim=1), torch.ones(3), atol=0.1)


def test_normalisation_is_open_clips_to_the_last_bit(encoder):
    frame = frames(1, 32, 32)
    expected = open_clip.image_transform(32, is_train=False)(Image.fromarray(frame[0]))
    assert (encoder.normalise(frame)[0] - expected).abs().max() <= 1e-6


def test_batches_and_boxes(encoder):
    shots, boxes = frames(7), [(0, 0, 40, 50), None, (5, 5, 69, 49), None, (1, 1, 9, 9), (0, 0, 70, 50), (30, 0, 70, 20)]
    whole = encoder.encode_frames(shots, 64, boxes)
    for size in (1, 3, 7):
        torch.testing.assert_close(encoder.encode_frames(shots, size, boxes), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.encode_text(NAMES, 1), encoder.encode_text(NAMES), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole[1], encoder.encode_frames(shots)[1], rtol=1e-4, atol=1e-5)
    assert (whole[0] - encoder.encode_frames(shots)[0]).abs().max() > 1e-3
    assert encoder.encode_frames(shots, 64, np.array([box or (0, 0, 70, 50) for box in boxes])).shape == (7, 24)
    with pytest.raises(DataError, match="6 boxes for 7 frames"): encoder.encode_frames(shots, 2, boxes[:6])


def test_empty_input(encoder):
    assert encoder.encode_frames(frames(0)).shape == (0, 24) and encoder.encode_text([]).shape == (0, 24)


@pytest.mark.parametrize("pixels", [np.zeros((1, 31, 32, 3), np.uint8), np.zeros((1, 32, 32, 3), np.float32),
                                    np.zeros((32, 32, 3), np.uint8), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)])
def test_other_pixels_are_refused(encoder, pixels):
    with pytest.raises(DataError, match="uint8 pixels of shape"): encoder.encode_pixels(pixels)


def test_texts_must_be_a_list(encoder):
    with pytest.raises(DataError, match="list of strings"): encoder.encode_text("cup")
    with pytest.raises(DataError, match="list of strings"): encoder.encode_text([1, 2])


def test_long_texts_are_cut_and_keep_their_end(encoder):
    long = " ".join(["onion"] * 30)
    with pytest.warns(UserWarning, match="1 of 2 texts have more than 8 tokens"):
        text = encoder.encode_text([long, "cup"])
    assert encoder.tokenizer([long])[0, -1] == 49407
    torch.testing.assert_close(text[0], encoder.encode_text([" ".join(["onion"] * 8)])[0])


def test_eight_tokens_fit_without_a_warning(encoder, recwarn):
    encoder.encode_text([" ".join(["onion"] * 8), "a" * 9])
    assert not recwarn.list


def test_frozen(encoder):
    holder = torch.nn.ModuleDict({"encoder": encoder, "head": torch.nn.Linear(24, 24)}).train()
    assert holder["head"].training and not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    for features in (encoder.encode_frames(frames(2)), encoder.encode_text(NAMES), encoder.encode_pixels(frames(2, 32, 32))):
        assert features.dtype == torch.float32 and not features.is_inference() and not features.requires_grad
        (holder["head"](features) * features).sum().backward()
    assert holder["head"].weight.grad.abs().sum() > 0


def test_precision(files, encoder):
    half = create_encoder(QUICK, files / "plain.safetensors", "cpu", precision="bf16")
    a, b = encoder.encode_frames(frames()), half.encode_frames(frames())
    assert b.dtype == torch.float32 and not torch.equal(a, b) and torch.cosine_similarity(a, b).min() > 0.999
    assert torch.equal(half.encode_text(NAMES), encoder.encode_text(NAMES))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.encode_frames(frames()), a) and torch.equal(encoder.encode_text(NAMES), half.encode_text(NAMES))
    with pytest.raises(DataError, match="'int4'.*'bf16'"): create_encoder(QUICK, "random", "cpu", precision="int4")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu(files, encoder):
    fast = create_encoder(QUICK, files / "plain.safetensors")
    assert fast.precision == "bf16" and fast.device.type == "cuda"
    similarity = torch.cosine_similarity(fast.encode_frames(frames()).cpu(), encoder.encode_frames(frames()))
    assert similarity.min() > 0.999
    torch.testing.assert_close(fast.encode_text(NAMES).cpu(), encoder.encode_text(NAMES), rtol=1e-3, atol=1e-3)


def test_an_encoder_without_text():
    tower = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 6), torch.nn.GELU())
    images_only = Encoder("dino", tower, Preprocess(8), 6, {"depth": 1})
    assert images_only.encode_frames(frames(3)).shape == (3, 6)
    assert images_only.logit_scale is None and images_only.describe()["activation"] == "GELU"
    with pytest.raises(DataError, match="dino has no text side"): images_only.encode_text(["cup"])


# --- fingerprints ---------------------------------------------------------------------------------------------------

def test_fingerprint_of_every_layout_is_the_same(files, encoder, tmp_path):
    for file in ("plain.pt", "train.pt", "archive.pt"):
        other = create_encoder(QUICK, files / file, "cpu")
        assert other.fingerprint == encoder.fingerprint and torch.equal(other.encode_frames(frames()), encoder.encode_frames(frames()))
    moved = tmp_path / "elsewhere" / "w.safetensors"
    moved.parent.mkdir()
    moved.write_bytes((files / "plain.safetensors").read_bytes())
    assert create_encoder(QUICK, str(moved), "cpu").fingerprint == encoder.fingerprint
    assert Path(encoder.fingerprint).name == encoder.fingerprint and encoder.fingerprint.startswith(QUICK)


def test_fingerprint_changes_with_the_features(files, encoder, tmp_path):
    state = load_file(files / "plain.safetensors")
    values = state["visual.proj"].view(torch.int32)
    values[3, 4] ^= 1
    save_file(state, tmp_path / "one_bit.safetensors")
    same = {"files": files / "plain.safetensors"}
    others = [create_encoder(QUICK, tmp_path / "one_bit.safetensors", "cpu"),
              create_encoder(QUICK, same["files"], "cpu", resize="squash"),
              create_encoder(QUICK, same["files"], "cpu", precision="bf16"),
              create_encoder("xmictest-heads", same["files"], "cpu")]
    with pytest.warns(UserWarning, match="xmictest-quickgelu"):
        others.append(create_encoder(PLAIN, same["files"], "cpu"))
    config = open_clip.get_model_config(QUICK)
    for changes in ({"mean": (0.5, 0.5, 0.5)}, {"std": (0.5, 0.5, 0.5)}, {"interpolation": "bilinear"}):
        others.append(Encoder(QUICK, encoder.model, replace(encoder.preprocess, **changes), 24, config))
    assert Encoder(QUICK, encoder.model, encoder.preprocess, 24, config).fingerprint == encoder.fingerprint
    assert len({encoder.fingerprint, *(other.fingerprint for other in others)}) == len(others) + 1
    for other in others:
        digests = {encoder.fingerprint[-10:], other.fingerprint[-10:]}
        assert len(digests) == 2


def test_hash_sees_names_shapes_and_order():
    a, b = torch.arange(6.0), torch.arange(6.0) + 1
    def holder(**tensors):
        module = torch.nn.Module()
        for name, tensor in tensors.items(): module.register_buffer(name, tensor)
        return hash_weights(module)
    assert holder(a=a, b=b) == holder(b=b, a=a)
    assert len({holder(a=a, b=b), holder(a=b, b=a), holder(a=a, c=b), holder(a=a.view(2, 3), b=b), holder(a=a.double(), b=b),
                holder(a=a), holder(a=a.view(torch.int32), b=b)}) == 7


def test_describe_is_json(encoder):
    described = encoder.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["weights"] == "plain.safetensors" and described["preprocess"]["resize"] == "shortest"
    assert described["open_clip"] == open_clip.__version__ and len(described["weights_sha256"]) == 64


def test_random_weights_are_loud_deterministic_and_leave_the_generators_alone(files):
    torch.manual_seed(11), np.random.seed(11), random.seed(11)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), logging.root.handlers[:]
    with pytest.warns(UserWarning, match="RANDOM weights"): first = create_encoder(QUICK, "random", "cpu")
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), logging.root.handlers[:]
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    torch.rand(3)
    second = create_encoder(QUICK, "random", "cpu")
    assert first.fingerprint == second.fingerprint and "random" in first.fingerprint and first.weights == "random"
    assert torch.equal(first.encode_frames(frames()), second.encode_frames(frames()))


@pytest.mark.slow
def test_other_processes_offline_and_the_full_size(tmp_path):
    code = """if True:
        import json, socket, warnings
        warnings.simplefilter("ignore")
        import torch
        from xmic.encoders import create_encoder
        torch.rand(5)
        prints = [create_encoder(name, "random", "cpu").fingerprint for name in ("ViT-B-32-quickgelu", "ViT-B-32")]
        errors, connected = [], []
        socket.socket.connect = lambda _, place: connected.append(place)
        for name, weights in (("ViT-B-16-quickgelu", None), ("dinov2_vits14", None), ("RN50-quickgelu", "yfcc15m"), ("vit_small_patch16_224.augreg_in1k", None)):
            try: create_encoder(name, weights, "cpu")
            except Exception as e: errors.append(f"{type(e).__name__}: {e}")
        print(json.dumps([prints, errors, connected]))"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HOME": str(tmp_path), "OMP_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    (quick, plain), errors, connected = json.loads(run.stdout)
    encoder = create_encoder("ViT-B-32-quickgelu", "random", "cpu")
    assert encoder.fingerprint == quick and quick[-10:] != plain[-10:]
    assert encoder.activation == "QuickGELU" and encoder.dim == 512 and encoder.preprocess == Preprocess()
    named = [("open_clip_model.safetensors", "huggingface.co/timm/vit_base_patch16_clip_224.openai", "create_encoder('ViT-B-16-quickgelu', weights="),
             ("model.safetensors", "huggingface.co/timm/vit_small_patch14_dinov2", "dinov2_vits14_pretrain.pth", "create_encoder('dinov2_vits14', weights="),
             ("https://", "create_encoder('RN50-quickgelu', weights="),
             ("model.safetensors", "huggingface.co/timm/vit_small_patch16_224.augreg_in1k", "weights=")]
    assert len(errors) == len(named)
    for error, parts in zip(errors, named):
        assert error.startswith("DataError") and error.count("\n") == 0 and "HF_HUB_OFFLINE is set" in error
        assert all(part in error for part in parts), error
    assert connected == []


# --- weight files ---------------------------------------------------------------------------------------------------

def test_an_openai_archive_is_read_as_torch_reads_it(files, tmp_path):
    model = build_model(QUICK, seed=3).eval()
    with torch.no_grad(): model.logit_scale.fill_(math.log(100))
    archive(model, tmp_path / "ViT.pt", half=True)
    theirs, ours = torch.jit.load(tmp_path / "ViT.pt", map_location="cpu").state_dict(), read_weights(tmp_path / "ViT.pt")
    assert theirs["visual.proj"].dtype == torch.float16
    assert theirs.keys() <= ours.keys() and all(torch.equal(theirs[k], ours[k]) and theirs[k].dtype == ours[k].dtype for k in theirs)
    reference = open_clip.load_openai_model(str(tmp_path / "ViT.pt"), precision="fp32", device="cpu")
    encoder = create_encoder(QUICK, tmp_path / "ViT.pt", "cpu")
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_frames(frames()), reference.encode_image(
            encoder.normalise(encoder.preprocess.pixels(frames()))), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(encoder.encode_text(NAMES), reference.encode_text(encoder.tokenizer(NAMES)), rtol=1e-5, atol=1e-5)


def test_an_openai_archive_needs_quickgelu(files):
    with pytest.raises(DataError, match="trained with QuickGELU.*'xmictest-quickgelu'"): create_encoder(PLAIN, files / "archive.pt", "cpu")


def test_an_openai_archive_has_openais_logit_scale(files, tmp_path):
    archive(build_model(QUICK).eval(), tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"logit scale is 14.29, but 100"): create_encoder(QUICK, tmp_path / "a.pt", "cpu")
    archive(build_model(QUICK).eval(), tmp_path / "b.pt", scalars=False)
    assert create_encoder(QUICK, tmp_path / "b.pt", "cpu").logit_scale == pytest.approx(14.2857, abs=1e-3)


def test_a_configuration_beside_the_file_is_heeded(files, tmp_path, recwarn):
    (tmp_path / "w.safetensors").write_bytes((files / "plain.safetensors").read_bytes())
    config = {"model_cfg": {**CONFIG}, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "interpolation": "bilinear"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    encoder = create_encoder(QUICK, tmp_path / "w.safetensors", "cpu")
    assert encoder.preprocess == Preprocess(32, "shortest", "bilinear", (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    with pytest.raises(DataError, match="trained with QuickGELU"): create_encoder(PLAIN, tmp_path / "w.safetensors", "cpu")
    del config["model_cfg"]["quick_gelu"]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="trained with the exact GELU.*'xmictest'$"): create_encoder(QUICK, tmp_path / "w.safetensors", "cpu")
    create_encoder(PLAIN, tmp_path / "w.safetensors", "cpu")
    assert not recwarn.list


def change(state: dict, fault: str) -> str:
    "Spoils `state`; returns what the error must say."
    if fault == "missing": del state["visual.ln_pre.bias"]; return "missing: visual.ln_pre.bias"
    if fault == "extra": state["visual.extra"] = torch.zeros(2); return "unexpected: visual.extra"
    if fault == "shape": state["visual.proj"] = torch.zeros(64, 25); return r"shape: visual.proj is \(64, 25\), the model's \(64, 24\)"
    if fault == "nan": state["ln_final.weight"][5] = float("nan"); return "not finite: ln_final.weight"
    if fault == "positions": state["visual.positional_embedding"] = torch.zeros(10, 64); return "shape: visual.positional_embedding"
    if fault == "doubled": state.update({f"visual.{k}": state.pop(k) for k in list(state)}); return "missing: "
    raise AssertionError(fault)


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "nan", "positions", "doubled"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_strict(files, tmp_path, fault, suffix):
    state = load_file(files / "plain.safetensors")
    message, path = change(state, fault), tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with pytest.raises(DataError, match=message): create_encoder(QUICK, path, "cpu")


def test_another_image_size_is_refused(files):
    with pytest.raises(DataError, match="positional_embedding is"): create_encoder("xmictest-large", files / "plain.pt", "cpu")


class Payload:
    "Pickled, it is a call that leaves a file behind."
    def __init__(self, target: Path): self.target = target
    def __reduce__(self): return open, (str(self.target), "w")


class Setter(torch.nn.Module):
    "A TorchScript module that leaves a file behind when torch.jit.load restores it."
    def __init__(self, target: str):
        super().__init__()
        self.target = target
        self.w = torch.nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self): return (self.target, self.w, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]):
        self.target = state[0]
        self.w = state[1]
        self.training = state[2]
        torch.save(state[1], state[0])

    def forward(self, x): return x + self.w


def hostile(kind: str, path: Path, target: Path, files: Path) -> None:
    "Writes a weight file to `path` that leaves `target` behind when a careless reader loads it."
    if kind == "pickle": path.write_bytes(pickle.dumps({"w": Payload(target)}))
    elif kind == "zip": torch.save({"w": torch.ones(2), "x": Payload(target)}, path)
    elif kind == "script": torch.jit.save(torch.jit.script(Setter(str(target))), path)
    elif kind == "archive":
        with zipfile.ZipFile(files / "archive.pt") as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.namelist():
                new.writestr(entry, pickle.dumps({"w": Payload(target)}) if entry.endswith("/data.pkl") else old.read(entry))


@pytest.mark.parametrize("kind", ["pickle", "zip", "script", "archive"])
def test_hostile_weights_run_nothing(files, tmp_path, kind):
    path, target = tmp_path / "weights.pt", tmp_path / "left_behind"
    hostile(kind, path, target, files)
    with pytest.raises(DataError, match="not readable as weights alone|holds an object of"): create_encoder(QUICK, path, "cpu")
    assert not target.exists()
    if kind == "script": torch.jit.load(path)
    elif kind == "zip": torch.load(path, weights_only=False)
    else: pickle.loads(path.read_bytes() if kind == "pickle" else zipfile.ZipFile(path).read(next(
        name for name in zipfile.ZipFile(path).namelist() if name.endswith("/data.pkl"))))
    assert target.exists(), "the payload does not work, so this test proves nothing"


@pytest.mark.parametrize("file", ["plain.safetensors", "plain.pt", "archive.pt"])
def test_damaged_files(files, tmp_path, file):
    whole = (files / file).read_bytes()
    for length in (0, 7, 1000, len(whole) // 2, len(whole) - 30):
        (tmp_path / file).write_bytes(whole[:length])
        with pytest.raises(DataError, match=file): create_encoder(QUICK, tmp_path / file, "cpu")


def test_other_files(files, tmp_path):
    for value in ({"a": 1}, [torch.ones(2)], {}, torch.ones(3)):
        torch.save(value, tmp_path / "w.pt")
        with pytest.raises(DataError, match="holds no state dict"): create_encoder(QUICK, tmp_path / "w.pt", "cpu")
    (tmp_path / "w.bin").write_text("a text file\n" * 50)
    with pytest.raises(DataError, match="w.bin: not readable"): read_weights(tmp_path / "w.bin")
    with pytest.raises(DataError, match="no such file"): read_weights(tmp_path / "none.safetensors")
    with pytest.raises(DataError, match="no such file"): read_weights(tmp_path / "none.pt")


# --- names, tags, downloads -----------------------------------------------------------------------------------------

def test_names_and_devices(files):
    with pytest.raises(DataError, match="no model 'ViT-B16-quickgelu'; did you mean .*'ViT-B-16-quickgelu'"): create_encoder("ViT-B16-quickgelu")
    with pytest.raises(DataError, match="neither a file nor a pretrained tag.*its tags: none"): create_encoder(QUICK, "no/such/file.pt")
    with pytest.raises(DataError, match="no weights under the tag 'openai'"): create_encoder(QUICK)
    with pytest.raises(DataError, match="laion400m_e32"): create_encoder("ViT-B-16-plus-240")
    with pytest.raises(DataError, match="'stretch'.*'squash'"): create_encoder(QUICK, "random", resize="stretch")
    if not torch.cuda.is_available():
        with pytest.raises(DataError, match="no CUDA GPU"): create_encoder(QUICK, "random", "cuda:0")


@pytest.fixture
def hub(files, tmp_path, monkeypatch) -> Path:
    "A hub cache that holds the tiny model, which two tags of open_clip's table name; returns the cached file."
    cached = tmp_path / "models--xmic--tiny" / "snapshots" / ("a" * 40) / "open_clip_model.safetensors"
    cached.parent.mkdir(parents=True)
    cached.write_bytes((files / "plain.safetensors").read_bytes())
    (tmp_path / "models--xmic--tiny" / "refs").mkdir()
    (tmp_path / "models--xmic--tiny" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    base = {"url": "", "mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    table = {"openai": {**base, "hf_hub": "xmic/tiny/", "quick_gelu": True},
             "gray": {**base, "hf_hub": "xmic/tiny/", "mean": (0.5,) * 3, "quick_gelu": True},
             "absent": {**base, "hf_hub": "xmic/absent/"}}
    for name in (QUICK, PLAIN): monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, table)
    return cached


def test_a_cached_tag_needs_no_network(hub, encoder, monkeypatch):
    monkeypatch.setattr(encoders, "get_session", lambda: pytest.fail("asked the network"))
    default, gray = create_encoder(QUICK, device="cpu"), create_encoder(QUICK, "gray", "cpu")
    assert default.fingerprint == encoder.fingerprint and default.weights == "openai"
    assert gray.preprocess.mean == (0.5, 0.5, 0.5) and gray.fingerprint != default.fingerprint


def test_a_tag_that_needs_quickgelu(hub, monkeypatch):
    monkeypatch.setattr(encoders, "fetch_weights", lambda *_: pytest.fail("downloaded before looking"))
    for weights in (None, "openai", "gray"):
        with pytest.raises(DataError, match="Use the name 'xmictest-quickgelu'$"): create_encoder(PLAIN, weights, "cpu")


def test_real_openai_tags_point_to_quickgelu():
    with pytest.raises(DataError, match="Use the name 'ViT-B-32-quickgelu'$"): create_encoder("ViT-B/32", device="cpu")


def test_the_openai_tag_checks_the_logit_scale(hub, files):
    state = load_file(files / "plain.safetensors")
    state["logit_scale"] = torch.tensor(math.log(99.8))
    save_file(state, hub)
    with pytest.raises(DataError, match="logit scale is 99.80"): create_encoder(QUICK, "openai", "cpu")
    assert create_encoder(QUICK, "gray", "cpu").logit_scale == pytest.approx(99.8, abs=1e-2)


def test_an_unreachable_hub_fails_fast(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *_: "http://127.0.0.1:9/file")
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(DataError, match=r"xmictest-quickgelu \(absent\).*cannot be downloaded.*xmic/absent.*weights='/path/to/file'"):
        create_encoder(QUICK, "absent", "cpu")
    assert sum(waited) < 10  # seconds between attempts


# --- DINOv2 ---------------------------------------------------------------------------------------------------------

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = dict(depth=2, embed_dim=48, num_heads=3)


def official(state: dict) -> dict:
    "timm's weights in the layout of DINOv2's authors."
    state = {"mask_token": torch.randn(1, state["cls_token"].shape[-1]), **state}
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        first = torch.randn_like(state["cls_token"])
        state |= {"cls_token": state["cls_token"] - first, "pos_embed": torch.cat([first, state["pos_embed"]], 1)}
    if "blocks.0.mlp.fc1.weight" in state and state["blocks.0.mlp.fc1.weight"].shape[0] != 2 * state["blocks.0.mlp.fc2.weight"].shape[1]:
        return state
    return {k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in state.items()}


@pytest.fixture
def small_dinov2(monkeypatch, tmp_path):
    "DINOv2s of two narrow blocks; gives a function that writes the official file of one, and its path."
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", partial(real, **SMALL))

    def write(architecture: str) -> Path:
        torch.manual_seed(5)
        state = {k: (2 if k == "pos_embed" else 0.4) * torch.randn_like(v) for k, v in timm.create_model(architecture, num_classes=0).state_dict().items()}
        torch.save(official(state), tmp_path / f"{architecture}.pth")
        save_file(state, tmp_path / f"{architecture}.safetensors")
        return tmp_path / f"{architecture}.pth"
    return write


@pytest.mark.parametrize("name, parameters, tensors, width", [
    ("dinov2_vits14", 22_056_576, 175, 384), ("dinov2_vitb14", 86_580_480, 175, 768), ("dinov2_vitl14", 304_368_640, 343, 1024),
    ("dinov2_vits14_reg", 22_058_112, 176, 384), ("dinov2_vitg14", 1_136_480_768, 567, 1536)])
def test_official_files_have_the_published_number_of_weights(name, parameters, tensors, width):
    with torch.device("meta"): state = official(timm.create_model(timm_name(name)[0], num_classes=0).state_dict())
    assert (sum(t.numel() for t in state.values()), len(state)) == (parameters, tensors)
    assert state["cls_token"].shape == (1, 1, width) and state["pos_embed"].shape == (1, 1370, width)
    assert ("blocks.0.mlp.w12.weight" in state) == ("vitg" in name) and ("register_tokens" in state) == name.endswith("_reg")


def test_names_of_dinov2():
    assert len(DINOV2_NAMES) == 8 and {timm_name(name)[0] for name in DINOV2_NAMES} == set(timm.list_models("*_dinov2"))
    assert timm_name("vit_small_patch14_dinov2.lvd142m") == ("vit_small_patch14_dinov2", "lvd142m")
    assert not any(map(has_text, [*DINOV2_NAMES, "vit_small_patch14_dinov2.lvd142m", "mini-dino"]))
    assert all(map(has_text, ["ViT-B-16-quickgelu", "ViT-B-16-SigLIP", "mini-clip", "convnext_base", "unknown"]))


@pytest.mark.parametrize("hub", ["dinov2_vits14", "dinov2_vitb14_reg", "dinov2_vitg14", "dinov2_vitg14_reg"])
def test_dinov2_is_timms(small_dinov2, hub):
    name, file = timm_name(hub)[0], small_dinov2(timm_name(hub)[0])
    encoder = create_encoder(name, file, "cpu")
    model = timm.create_model(name, img_size=224, num_classes=0, pretrained=True, pretrained_cfg_overlay=dict(file=str(file))).eval()
    shots = frames(3, 300, 400)
    with torch.no_grad(): expected = model(encoder.normalise(encoder.preprocess.pixels(shots)))
    torch.testing.assert_close(encoder.encode_frames(shots), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == (3, 48) and encoder.dim == 48 and encoder.logit_scale is None and encoder.logit_bias == 0
    assert encoder.preprocess == Preprocess(224, "shortest", "bicubic", *IMAGENET, short_side=256)
    with pytest.raises(DataError, match="has no text side"): encoder.encode_text(["cup"])

    copied, tagged, theirs = (create_encoder(n, f, "cpu") for n, f in (
        (name, file.with_suffix(".safetensors")), (f"{name}.lvd142m", file), (hub, file)))
    assert tagged.fingerprint == encoder.fingerprint
    torch.testing.assert_close(copied.encode_frames(shots), encoder.encode_frames(shots), rtol=1e-4, atol=1e-5)
    if hub.endswith("_reg"):
        assert theirs.fingerprint == encoder.fingerprint and "position_interpolation" not in theirs.describe()
    else:
        assert copied.fingerprint == encoder.fingerprint != theirs.fingerprint
        assert (encoder.describe()["position_interpolation"], theirs.describe()["position_interpolation"]) == ("timm", "hub")
        assert theirs.fingerprint == create_encoder(name, file, "cpu", position_interpolation="hub").fingerprint
        assert encoder.fingerprint == create_encoder(hub, file, "cpu", position_interpolation="timm").fingerprint
        assert (theirs.encode_frames(shots) - encoder.encode_frames(shots)).norm() > 2e-3 * expected.norm()


def bicubic(before: int, after: int, scale: float) -> np.ndarray:
    "The matrix (after, before) of bicubic sampling (A = -0.75, border repeated) at steps of `1 / scale`."
    matrix = np.zeros((after, before))
    for i in range(after):
        at = (i + 0.5) / scale - 0.5
        for k in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            d, a = abs(at - k), -0.75
            weight = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[i, min(max(k, 0), before - 1)] += weight
    return matrix


def test_the_authors_positions():
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **SMALL)
    table = torch.randn(1, 1370, 48, dtype=torch.float64).float()
    model.pos_embed = torch.nn.Parameter(table.clone())
    set_image_size(model, 224, "hub")
    m = bicubic(37, 16, 16.1 / 37)
    expected = np.einsum("ir,js,rsw->ijw", m, m, table[0, 1:].double().numpy().reshape(37, 37, 48)).reshape(256, 48)
    np.testing.assert_allclose(model.pos_embed[0, 1:].detach().numpy(), expected, atol=2e-4)
    assert torch.equal(model.pos_embed[:, :1], table[:, :1]) and model.patch_embed.grid_size == (16, 16)
    with pytest.raises(DataError, match="225 pixels is no whole number of patches of 14"): set_image_size(model, 225)


def test_the_authors_positions_with_registers_are_timms():
    tables = []
    for how in ("hub", "timm"):
        torch.manual_seed(0)
        model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, **SMALL)
        set_image_size(model, 224, how)
        tables.append(model.pos_embed)
    assert torch.equal(*tables) and tables[0].shape == (1, 256, 48)


def spoil(state: dict, fault: str) -> str:
    "Spoils official weights with registers; returns what the error must say."
    if fault == "mask": state["mask_token"] = torch.zeros(1, 47); return r"shape: mask_token is \(1, 47\)"
    if fault == "grid": state["pos_embed"] = torch.zeros(1, 257, 48); return r"shape: pos_embed is \(1, 257, 48\), the model's \(1, 1370, 48\)"
    if fault == "ragged": state["pos_embed"] = torch.zeros(1, 1300, 48); return "shape: pos_embed"
    if fault == "patch": state["patch_embed.proj.weight"] = torch.zeros(48, 3, 16, 16); return "shape: patch_embed.proj.weight"
    if fault == "cls": del state["cls_token"]; return "missing: cls_token"
    if fault == "block": del state["blocks.1.ls2.gamma"]; return "missing: blocks.1.ls2.gamma"
    if fault == "extra": state["head.weight"] = torch.zeros(2, 48); return "unexpected: head.weight"
    if fault == "nan": state["blocks.0.norm1.bias"][3] = float("nan"); return "not finite: blocks.0.norm1.bias"
    if fault == "nan mask": state["mask_token"][0, 0] = float("inf"); return "not finite: mask_token"
    if fault == "none": del state["register_tokens"]; return "missing: register_tokens"
    raise AssertionError(fault)


@pytest.mark.parametrize("fault", ["mask", "grid", "ragged", "patch", "cls", "block", "extra", "nan", "nan mask", "none"])
def test_official_files_are_read_strictly(small_dinov2, tmp_path, fault):
    state = torch.load(small_dinov2("vit_small_patch14_reg4_dinov2"))
    message = spoil(state, fault)
    torch.save(state, tmp_path / "spoilt.pth")
    with pytest.raises(DataError, match=message): create_encoder("dinov2_vits14_reg", tmp_path / "spoilt.pth", "cpu")


def test_files_of_other_models_are_refused(small_dinov2):
    with_registers, plain = map(small_dinov2, ("vit_small_patch14_reg4_dinov2", "vit_small_patch14_dinov2"))
    with pytest.raises(DataError, match="unexpected: register_tokens"): create_encoder("dinov2_vits14", with_registers, "cpu")
    with pytest.raises(DataError, match="missing: register_tokens"): create_encoder("dinov2_vits14_reg", plain, "cpu")
    with pytest.raises(DataError, match="mlp.fc1.*is|unexpected"): create_encoder("dinov2_vitg14", plain, "cpu")
    with pytest.raises(DataError, match="pos_embed is"): create_encoder("dinov2_vits14", with_registers.with_suffix(".safetensors"), "cpu")


def test_settings_that_dinov2_does_not_have(small_dinov2):
    for name, arguments, message in (
            ("dinov2_vits14", dict(weights="imagenet"), "neither a file nor a pretrained tag of dinov2_vits14; its tags: lvd142m"),
            ("vit_small_patch14_dinov2.other", dict(weights="random"), "no weights 'other' of vit_small_patch14_dinov2; it has lvd142m"),
            ("dinov2_vits14", dict(weights="random", position_interpolation="bicubic"), "'bicubic' is not one of 'timm', 'hub'"),
            (QUICK, dict(weights="random", position_interpolation="hub"), "a choice for DINOv2"),
            ("dinov2_vits16", dict(weights="random"), "did you mean.*dinov2_vits14")):
        with pytest.raises(DataError, match=message): create_encoder(name, device="cpu", **arguments)


def test_dinov2_by_its_tag(small_dinov2, tmp_path, monkeypatch):
    file = small_dinov2("vit_small_patch14_dinov2")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub, "hf_hub_url", lambda *_: "http://127.0.0.1:9/file")
        with pytest.raises(DataError) as e: create_encoder("dinov2_vits14", device="cpu")
    for part in ("dinov2_vits14 (lvd142m)", "create_encoder('dinov2_vits14', weights=", "huggingface.co/timm/vit_small_patch14_dinov2.lvd142m (file model.safetensors)",
                 "dinov2_vits14_pretrain.pth"):
        assert part in str(e.value)
    folder = tmp_path / "cache" / "models--timm--vit_small_patch14_dinov2.lvd142m"
    (folder / "snapshots" / ("b" * 40)).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("b" * 40)
    (folder / "snapshots" / ("b" * 40) / "model.safetensors").write_bytes(file.with_suffix(".safetensors").read_bytes())
    monkeypatch.setattr(encoders, "get_session", lambda: pytest.fail("asked the network"))
    named = [create_encoder(name, weights, "cpu") for name, weights in (
        ("vit_small_patch14_dinov2", None), ("vit_small_patch14_dinov2.lvd142m", None), ("vit_small_patch14_dinov2", "lvd142m"))]
    assert {e.fingerprint for e in named} == {create_encoder("vit_small_patch14_dinov2", file, "cpu").fingerprint}
    assert named[0].weights == "lvd142m"


def test_the_first_dino_is_a_tag_of_timm(monkeypatch):
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **SMALL))
    encoder = create_encoder("vit_base_patch16_224.dino", "random", "cpu")
    assert encoder.preprocess == Preprocess(224, "shortest", "bicubic", *IMAGENET, short_side=256)
    assert create_encoder("vit_base_patch16_224", "random", "cpu").preprocess.short_side is None
    assert encoder.encode_frames(frames(2)).shape == (2, 48)


# --- larger CLIPs, and SigLIP ---------------------------------------------------------------------------------------

def test_the_larger_clip_is_openais():
    with torch.device("meta"): model = CLIP(**open_clip.get_model_config("ViT-L-14-quickgelu"))
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == (427_616_513, 446)
    assert encoders.activations(model) == "QuickGELU" and open_clip.is_pretrained_cfg("ViT-L-14-quickgelu", "openai")
    assert open_clip.get_model_config("ViT-L-14-quickgelu")["embed_dim"] == 768


SIGLIP = "xmictest-siglip-like"
SIGLIP_CONFIG = {"embed_dim": 64, "init_logit_bias": -10, "custom_text": True,
                 "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "none"},
                 "text_cfg": {"context_length": 10, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2, "no_causal_mask": True,
                              "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}}


@pytest.fixture
def siglip(tmp_path, monkeypatch) -> tuple[Path, torch.nn.Module]:
    "A file of weights of a small model built like SigLIP, which a tag of open_clip's table names too; and open_clip's own model."
    (tmp_path / f"{SIGLIP}.json").write_text(json.dumps(SIGLIP_CONFIG))
    open_clip.add_model_config(tmp_path / f"{SIGLIP}.json")
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda *_: open_clip.SimpleTokenizer(context_length=10))
    model = build_model(SIGLIP, seed=3).eval()
    with torch.no_grad(): model.logit_scale.fill_(math.log(117)), model.logit_bias.fill_(-12.9)
    save_file(model.state_dict(), tmp_path / "siglip.safetensors")
    tag = {"url": "", "hf_hub": "xmic/siglip/", "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, SIGLIP, {"webli": tag})
    monkeypatch.setattr(encoders, "fetch_weights", lambda *_: tmp_path / "siglip.safetensors")
    return tmp_path / "siglip.safetensors", model


def test_siglip_is_open_clips(siglip):
    file, model = siglip
    encoder = create_encoder(SIGLIP, "webli", "cpu", resize="as trained")
    transform = open_clip.image_transform(160, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="squash", interpolation="bicubic")
    with torch.no_grad():
        expected, _ = model.get_logits(torch.stack([transform(Image.fromarray(frame)) for frame in frames()]), encoder.tokenizer(NAMES))
    images, texts = (torch.nn.functional.normalize(x, dim=-1) for x in (encoder.encode_frames(frames()), encoder.encode_text(NAMES)))
    logits = encoder.logit_scale * images @ texts.T
    torch.testing.assert_close(logits + encoder.logit_bias, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(logits.softmax(-1), expected.softmax(-1), rtol=1e-3, atol=1e-4)
    assert encoder.logit_bias == pytest.approx(-12.9) and encoder.logit_scale == pytest.approx(117, rel=1e-5)
    assert encoder.describe()["logit_bias"] == encoder.logit_bias and encoder.describe()["preprocess"]["resize"] == "squash"
    assert create_encoder(SIGLIP, file, "cpu", resize="as trained").fingerprint == encoder.fingerprint


def test_how_frames_are_resized_is_a_choice(siglip):
    shortest = create_encoder(SIGLIP, "webli", "cpu")
    assert shortest.preprocess == Preprocess(160, "shortest", "bicubic", (0.5,) * 3, (0.5,) * 3)
    assert shortest.with_resize("as trained").preprocess.resize == "squash"
    assert shortest.with_resize("as trained").with_resize("shortest").fingerprint == shortest.fingerprint


def test_a_clip_without_bias_is_as_before(encoder):
    assert encoder.logit_bias == 0.0 and "logit_bias" not in encoder.describe() and "short_side" not in encoder.describe()["preprocess"]
    assert encoder.with_resize("as trained").fingerprint == encoder.fingerprint


def test_siglips_bias_is_loaded_strictly_and_counts(siglip, tmp_path):
    file, model = siglip
    state = load_file(file)
    (tmp_path / "more").mkdir()
    save_file({k: v for k, v in state.items() if k != "logit_bias"}, tmp_path / "more" / "without.safetensors")
    with pytest.raises(DataError, match="missing: logit_bias"): create_encoder(SIGLIP, tmp_path / "more" / "without.safetensors", "cpu")
    save_file(state | {"logit_bias": torch.tensor([-1.0])}, tmp_path / "more" / "other.safetensors")
    other = create_encoder(SIGLIP, tmp_path / "more" / "other.safetensors", "cpu")
    assert other.logit_bias == -1 and other.fingerprint != create_encoder(SIGLIP, file, "cpu").fingerprint


def test_prompts_cannot_be_learned_for_siglip(siglip):
    encoder = create_encoder(SIGLIP, siglip[0], "cpu")
    with pytest.raises(DataError, match="its tokens see those that follow"): TextTower(encoder.model, encoder.tokenizer)


def test_a_tokenizer_that_cannot_be_had_is_said_before_anything_is_built(monkeypatch):
    def unreachable(*_): raise OSError("We couldn't connect to\n'https://huggingface.co'")
    monkeypatch.setattr(open_clip, "get_tokenizer", unreachable)
    monkeypatch.setattr(encoders, "build_model", lambda *_: pytest.fail("built"))
    with pytest.raises(DataError, match=r"tokenizer of ViT-B-16-SigLIP.*couldn't connect.*huggingface.co/timm/ViT-B-16-SigLIP: install transformers"):
        create_encoder("ViT-B-16-SigLIP", "random", "cpu")


def test_texts_cut_by_other_tokenizers_are_said_too(encoder):
    class Words:  # as Hugging Face's: words and one end
        def num_special_tokens_to_add(self): return 1
        def __call__(self, text, add_special_tokens): return type("", (), {"input_ids": text.split()})

    class Wrapped:
        context_length, tokenizer, clean_fn = 10, Words(), staticmethod(str.strip)
        def __call__(self, texts): return open_clip.SimpleTokenizer(context_length=10)(texts)

    other = copy.copy(encoder)
    other.tokenizer = Wrapped()
    with pytest.warns(UserWarning, match="1 of 2 texts have more than 9 tokens"): other.encode_text([" ".join(["cup"] * 10), " ".join(["cup"] * 8)])


# --- class embeddings -----------------------------------------------------------------------------------------------

def test_class_embeddings():
    nouns, verbs = ClassEmbeddings(["cup", "pan"], torch.ones(2, 4)), ClassEmbeddings(("cut",), torch.zeros(1, 4))
    both = nouns + verbs
    assert both.names == ("cup", "pan", "cut") and len(both) == 3 and both.text.tolist() == [[1] * 4, [1] * 4, [0] * 4]
    assert both.to("cpu").names == both.names and both.to("meta").text.device.type == "meta"
    with pytest.raises(DataError, match="2 names"): ClassEmbeddings(("a", "b"), torch.ones(3, 4))
    with pytest.raises(DataError, match="widths 4 and 5"): nouns + ClassEmbeddings(("a",), torch.ones(1, 5))


def test_embed_classes_keeps_order_repeats_and_empty_names(encoder):
    classes = embed_classes(encoder, ["cup", "", "cup", "pan"])
    assert classes.names == ("cup", "", "cup", "pan")
    torch.testing.assert_close(classes.text[0], classes.text[2])
    assert torch.equal(classes.text, encoder.encode_text(["cup", "", "cup", "pan"]))
    for prompts in ("cup", [], ["a", 3]):
        with pytest.raises(DataError, match="prompts"): embed_classes(encoder, prompts)


def test_the_cache_is_used(encoder, tmp_path, monkeypatch, recwarn):
    first = embed_classes(encoder, NAMES, tmp_path / "cache")
    monkeypatch.setattr(Encoder, "encode_text", lambda *_: pytest.fail("encoded again"))
    again = embed_classes(encoder, NAMES, tmp_path / "cache")
    assert again.names == first.names and torch.equal(again.text, first.text)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"] and not recwarn.list


def test_the_cache_tells_lists_and_encoders_apart(files, encoder, tmp_path):
    other = create_encoder(QUICK, "random", "cpu")
    for who, prompts in ((encoder, NAMES), (encoder, NAMES[::-1]), (encoder, [*NAMES, "x"]), (other, NAMES)):
        assert torch.equal(embed_classes(who, prompts, tmp_path).text, who.encode_text(prompts))
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("fault", ["cut", "empty", "names", "shape", "nan", "type", "metadata"])
def test_a_bad_cache_file_is_made_again(encoder, tmp_path, fault):
    first = embed_classes(encoder, NAMES, tmp_path)
    (path,) = tmp_path.iterdir()
    good = {"names": json.dumps(NAMES), "fingerprint": encoder.fingerprint}
    text = first.text.clone()
    if fault == "cut": path.write_bytes(path.read_bytes()[:-9])
    if fault == "empty": path.write_bytes(b"")
    if fault == "names": save_file({"text": text}, path, {**good, "names": json.dumps(["a", "b", "c"])})
    if fault == "shape": save_file({"text": text[:, :-1].contiguous()}, path, good)
    if fault == "nan": text[0, 0] = float("nan"); save_file({"text": text}, path, good)
    if fault == "type": save_file({"text": text.half()}, path, good)
    if fault == "metadata": save_file({"text": text}, path)
    with pytest.warns(UserWarning, match="made again"): again = embed_classes(encoder, NAMES, tmp_path)
    assert torch.equal(again.text, first.text)
    assert torch.equal(load_file(path)["text"], first.text)


# --- the fast way ---------------------------------------------------------------------------------------------------

def eye(heads: int = 2, **more) -> torch.nn.Module:
    "A small vision transformer of open_clip with weights that matter everywhere."
    torch.manual_seed(0)
    tower = VisionTransformer(32, 8, 64, 3, heads, 4.0, output_dim=24, **more).eval().double().requires_grad_(False)
    for name, weight in tower.named_parameters():
        if "bias" in name or "ln_" in name or "ls_" in name: weight.normal_(0.5, 0.3)
    return tower


def vit(name: str = "vit_tiny_patch16_224", **more) -> torch.nn.Module:
    torch.manual_seed(0)
    tower = timm.create_model(name, **dict(dict(num_classes=0, depth=3, img_size=32, patch_size=8, embed_dim=48, num_heads=3), **more)).eval().double().requires_grad_(False)
    for weight in tower.parameters(): weight.normal_(0, 0.2)
    return tower


@pytest.mark.parametrize("tower", [
    eye(), eye(act_layer=QuickGELU), eye(no_ln_pre=True, ls_init_value=0.1), eye(final_ln_after_pool=True),
    vit(), vit("vit_small_patch14_dinov2", init_values=0.1), vit("vit_small_patch14_reg4_dinov2"), vit(qkv_bias=False),
    vit(qk_norm=True), vit(pre_norm=True), vit("vit_giant_patch14_dinov2", depth=2)], ids=lambda t: type(t).__module__)
def test_the_fast_tower_is_the_tower(tower):
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)))
    pixels = torch.from_numpy(frames(5, 32, 32)).permute(0, 3, 1, 2).double()
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    with torch.inference_mode():
        expected, found = tower((pixels / 255 - mean) / std), fast_tower(tower, mean, std)(pixels - 128)
    assert expected.std() > 0.1 and (found - expected).abs().max() < 1e-12 * expected.abs().max()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())


@pytest.mark.parametrize("tower", [eye(pool_type="avg"), eye(attentional_pool=True), eye(output_tokens=True), eye(qk_norm=True), vit(global_pool="avg"),
                                   vit(global_pool="map", class_token=False), torch.nn.Linear(3, 2)], ids=lambda t: type(t).__module__)
def test_towers_that_read_more_than_the_class_token_stay_as_they_are(tower):
    assert fast_tower(tower, torch.zeros(1, 3, 1, 1).double(), torch.ones(1, 3, 1, 1).double()) is None


@pytest.mark.parametrize("name", ["mini-clip", "mini-clip-large", "mini-dino"])
def test_the_kits_encoders_take_the_fast_way_with_weights_shared(name):
    encoder = create_encoder(name, device="cpu")
    side, fast = encoder.preprocess.size, encoder._fast_tower()
    pixels = frames(5, side, side)
    torch.testing.assert_close(encoder.encode_pixels(pixels), encoder.encode_pixels(pixels, plain=True), rtol=1e-4, atol=1e-5)
    own = {p.data_ptr() for p in encoder.model.parameters()}
    assert sum(p.data_ptr() not in own for p in fast.parameters()) == 2  # the patch convolution's weight and bias
    assert encoder.with_resize("squash").model is encoder.model and copy.deepcopy(encoder).fingerprint == encoder.fingerprint


@pytest.mark.parametrize("name", ["mini-clip", "mini-dino"])
def test_the_fast_way_is_no_less_exact_in_bfloat16(name):
    encoder, half = create_encoder(name, device="cpu"), create_encoder(name, device="cpu", precision="bf16")
    side = encoder.preprocess.size
    pixels = np.kron(frames(12, side // 8, side // 8), np.ones((1, 8, 8, 1), np.uint8))
    truth = encoder.encode_pixels(pixels, plain=True)
    plain, fast = (float((half.encode_pixels(pixels, plain=p) - truth).norm() / truth.norm()) for p in (True, False))
    assert 0 < fast < 1.25 * plain < 0.02


def test_batches_of_one_size_are_filled_up_and_give_the_same_bits_at_every_place(encoder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several share a matrix by its rows, and a row's place then decides how it is summed
    try:
        pixels = frames(21, 32, 32)
        whole = encoder.encode_batch(pixels, 8, record=False)
        assert whole.shape == (21, 24) and not whole.is_inference()
        torch.testing.assert_close(whole, encoder.encode_pixels(pixels), rtol=1e-4, atol=1e-5)
        order = np.random.default_rng(0).permutation(21)
        assert torch.equal(encoder.encode_batch(pixels[order], 8, record=False), whole[torch.from_numpy(order)])
        assert torch.equal(encoder.encode_batch(pixels[3:7], 8, record=False), whole[3:7])
        assert encoder.encode_batch(pixels[:0], 8).shape == (0, 24)
    finally:
        torch.set_num_threads(threads)


def test_where_no_graph_can_be_recorded_encoding_goes_on(encoder, monkeypatch):
    def no_stream(*_): raise RuntimeError("no capture here")
    monkeypatch.setattr(torch.cuda, "Stream", no_stream)
    with pytest.warns(UserWarning, match="no capture here"):
        features = encoder.encode_batch(frames(3, 32, 32), 5, record=True)
    torch.testing.assert_close(features, encoder.encode_pixels(frames(3, 32, 32)), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_pass_gives_what_the_plain_way_gives(files):
    fast, pixels = create_encoder(QUICK, files / "plain.safetensors"), frames(21, 32, 32)
    recorded = fast.encode_batch(pixels, 8)
    assert next(iter(fast._passes.values())).graph is not None
    torch.testing.assert_close(recorded, fast.encode_batch(pixels, 8, record=False), rtol=1e-2, atol=1e-2)
    assert torch.cosine_similarity(recorded, fast.encode_pixels(pixels, plain=True)).min() > 0.999
    torch.testing.assert_close(fast.encode_batch(pixels, 8), recorded, rtol=0, atol=0)


def test_small_encoders_outside_a_clone_say_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setenv("XMIC_ROOT", str(tmp_path))
    for name in ("mini-clip", "mini-dino", "mini-lavila"):
        monkeypatch.setattr(open_clip, "list_models", lambda: [])
        with pytest.raises(DataError, match=f"no data/mini/weights/{name}.json in .*clone of the kit.*XMIC_ROOT"):
            create_encoder(name, device="cpu", clip_frames=4 if name == "mini-lavila" else 1)


# What is wrapped around a state dict

@pytest.mark.parametrize("wrapped", [
    lambda s: {"_orig_mod." + k: v for k, v in s.items()}, lambda s: {"module._orig_mod." + k: v for k, v in s.items()}, lambda s: {"_orig_mod.module." + k: v for k, v in s.items()},
    lambda s: {"model": {"model." + k: v for k, v in s.items()}}, lambda s: {"state_dict": {"model.module." + k: v for k, v in s.items()}, "epoch": 3},
    lambda s: {"state_dict_ema": s}, lambda s: {"model": {"state_dict": s}}, lambda s: {"model_state_dict": {"module.model._orig_mod." + k: v for k, v in s.items()}},
    lambda s: {k.replace("visual.", "visual._orig_mod."): v for k, v in s.items()}])
def test_wrappers_around_a_state_dict_are_taken_off(wrapped, tmp_path):
    encoder = create_encoder("mini-clip", device="cpu")
    torch.save(wrapped(encoder.model.state_dict()), tmp_path / "c.pt")
    assert create_encoder("mini-clip", tmp_path / "c.pt", "cpu").fingerprint == encoder.fingerprint


def test_the_same_tensors_under_two_names_are_refused(tmp_path):
    torch.save({"a.weight": torch.ones(2), "module.a.weight": torch.zeros(2)}, tmp_path / "c.pt")
    with pytest.raises(DataError, match="several names"): read_weights(tmp_path / "c.pt")


def test_names_that_are_missing_and_names_that_are_unexpected_are_both_shown(tmp_path):
    state = create_encoder("mini-clip", device="cpu").model.state_dict()
    torch.save({"teacher." + k: v for k, v in state.items()}, tmp_path / "c.pt")
    with pytest.raises(DataError, match=r"\d+ missing, \d+ unexpected, 0 unfit") as error: create_encoder("mini-clip", tmp_path / "c.pt", "cpu")
    assert "unexpected: teacher." in str(error.value) and "missing: " in str(error.value)


@pytest.mark.parametrize("beside", [argparse.Namespace(lr=1.0), np.float64(3.0)], ids=["settings", "number"])
def test_an_object_beside_the_tensors_is_named_without_advice_to_load_it(beside, tmp_path):
    state = create_encoder("mini-clip", device="cpu").model.state_dict()
    torch.save({"state_dict": state, "args": beside}, tmp_path / "c.pt")
    with pytest.raises(DataError, match=r"holds an object of (argparse\.Namespace|numpy[\w.]*) besides") as error: create_encoder("mini-clip", tmp_path / "c.pt", "cpu")
    assert not any(word in str(error.value) for word in ("weights_only", "trust", "\x1b", "option"))
