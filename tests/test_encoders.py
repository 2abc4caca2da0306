"""Encoders: the same features as open_clip, safe and strict loading, fingerprints, caches, and what goes wrong."""
import copy
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
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from xmic import encoders
from xmic.encoders import ClassEmbeddings, Encoder, build_model, create_encoder, embed_classes, hash_weights, read_weights
from xmic.files import DataError
from xmic.pixels import CLIP_MEAN, CLIP_STD, Preprocess

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
        import json, sys, time, warnings
        warnings.simplefilter("ignore")
        import torch
        from xmic.encoders import create_encoder
        torch.rand(5)
        prints = [create_encoder(name, "random", "cpu").fingerprint for name in ("ViT-B-32-quickgelu", "ViT-B-32")]
        start = time.perf_counter()
        try: create_encoder("ViT-B-16-quickgelu", device="cpu")
        except Exception as e: error = f"{type(e).__name__}: {e}"
        print(json.dumps([prints, error, time.perf_counter() - start]))"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    (quick, plain), error, seconds = json.loads(run.stdout)
    encoder = create_encoder("ViT-B-32-quickgelu", "random", "cpu")
    assert encoder.fingerprint == quick and quick[-10:] != plain[-10:]
    assert encoder.activation == "QuickGELU" and encoder.dim == 512 and encoder.preprocess == Preprocess()
    assert error.startswith("DataError") and error.count("\n") == 0
    for part in ("open_clip_model.safetensors", "huggingface.co/timm/vit_base_patch16_clip_224.openai", "create_encoder('ViT-B-16-quickgelu', weights="):
        assert part in error
    assert seconds < 10


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
    with pytest.raises(DataError, match="not readable as weights alone"): create_encoder(QUICK, path, "cpu")
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
        with pytest.raises(DataError, match="no usable CUDA"): create_encoder(QUICK, "random", "cuda:0")


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
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"xmictest-quickgelu \(absent\).*cannot be downloaded.*xmic/absent.*weights='/path/to/file'"):
        create_encoder(QUICK, "absent", "cpu")
    assert time.perf_counter() - start < 10


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
