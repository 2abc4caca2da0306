"""The video vector as a file: what it gives, what is written beside it, and what has none."""
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from world import register_tiny
from xmic import export as export_module
from xmic.config import TrainConfig, build_method, resolve, text_tower
from xmic.encoders import ClassEmbeddings, create_encoder
from xmic.export import BOUND, export_vector
from xmic.files import DataError
from xmic.recognizer import Recognizer
from xmic.streams import Batch

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")


@pytest.fixture(scope="module")
def encoder():
    return create_encoder(register_tiny(), "random", "cpu")


def recognizer_of(encoder, **settings) -> Recognizer:
    torch.manual_seed(0)
    config = resolve(TrainConfig(encoder=register_tiny(), weights="random", labels="noun", **settings))
    method = build_method(config, encoder.dim, encoder.dim, 100.0, text_tower(config, encoder), encoder=encoder)
    with torch.no_grad():
        for value in method.parameters():
            if value.ndim and value.requires_grad: value.add_(torch.randn_like(value) * 0.05)  # away from where it starts
    return Recognizer(encoder, {"noun": method}, {"noun": config})


@pytest.fixture(scope="module")
def classes():
    return ClassEmbeddings(("pan", "knife", "tap"), torch.randn(3, 32, generator=torch.Generator().manual_seed(5)))


def features(shape, seed=99):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(path, x: torch.Tensor) -> tuple[torch.Tensor, dict]:
    "What a file gives, read with nothing of the kit, and what is written in it."
    if path.suffix == ".pt2":
        extra = {"xmic": ""}
        program = torch.export.load(path, extra_files=extra).module()
        return program(x), json.loads(extra["xmic"])
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["vector"], {"features": x.numpy()})[0]), json.loads(session.get_modelmeta().custom_metadata_map["xmic"])


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
@pytest.mark.parametrize("settings, batch", [(dict(), 1), (dict(frames=4, merge="concat", positions="as released", pool="max", norm_vector=True, norm_text=True), 3),
                                             (dict(context_views=["hand"], spatial_layers=0, normalize_frames=True), 2)])
def test_the_vector_of_x_mic_and_the_formula_give_the_logits(encoder, classes, tmp_path, ending, settings, batch):
    if ending == ".onnx": [pytest.importorskip(name) for name in ("onnx", "onnxscript", "onnxruntime")]
    recognizer = recognizer_of(encoder, **settings)
    made = export_vector(recognizer, tmp_path / f"vector{ending}", batch=batch)
    config, method = recognizer.configs["noun"], recognizer.methods["noun"]
    assert made.features == (batch, config.frames, len(config.context_views), 32) and made.vector == (batch, 32) and made.difference <= BOUND
    context, frames = features(made.features), features((batch, config.frames, 32), 98)
    vector, about = run(made.path, context)
    assert about == made.about and about["method"] == "xmic" and about["views"] == config.context_views
    with torch.no_grad():
        wanted = method.scale * method.vector(context)
        assert float((vector - wanted).abs().max() / wanted.abs().max()) <= BOUND
        text = F.normalize(classes.text, dim=-1) if about["norm_text"] else classes.text
        video = (F.normalize(frames, dim=-1) if about["normalize_frames"] else frames).mean(1)
        logits = about["logit_scale"] * F.cosine_similarity(video[:, None], text + vector[:, None], dim=-1)
        torch.testing.assert_close(logits, method(Batch(frames, context), classes), rtol=1e-4, atol=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == [f"vector{ending}"]


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
@pytest.mark.parametrize("method", ["clip_adapter", "clip_adapter_temporal", "a5"])
def test_the_vector_that_stands_for_the_video(encoder, tmp_path, ending, method):
    if ending == ".onnx": [pytest.importorskip(name) for name in ("onnx", "onnxscript", "onnxruntime")]
    recognizer = recognizer_of(encoder, method=method)
    made = export_vector(recognizer, tmp_path / f"vector{ending}", batch=2)
    vector, about = run(made.path, features(made.features))
    assert made.features == (2, 16, 32) and about["use"] == "in place of the mean of the classified frames"
    with torch.no_grad(): wanted = recognizer.methods["noun"].video(features(made.features))
    assert float((vector - wanted).abs().max() / wanted.abs().max()) <= BOUND
    if ending == ".pt2" and method == "a5":  # nothing of the text side is in it
        assert made.path.stat().st_size < 300_000
        assert not [name for name in torch.export.load(made.path).state_dict if "prompts" in name]


@pytest.mark.parametrize("method, why", [("coop", "coop learns prompts"), ("cocoop", "new class embeddings for each video"), ("vita_clip", "reads pixels")])
def test_methods_without_a_vector_say_so(encoder, tmp_path, method, why):
    with pytest.raises(DataError, match=f"of nouns there is no video vector to export: .*{why}.*X-MIC, CLIP-Adapter and A5 have one$"):
        export_vector(recognizer_of(encoder, method=method), tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


class Own(torch.nn.Module):
    pass


def test_own_methods_and_kinds_without_an_adapter_say_so(encoder, tmp_path):
    recognizer = recognizer_of(encoder)
    with pytest.raises(DataError, match="of verbs there is no video vector to export: there is no adapter"): export_vector(recognizer, tmp_path / "x.pt2", "verb")
    own = Recognizer(encoder, {"noun": Own()}, {"noun": replace(recognizer.configs["noun"], method="own.py:Own")})
    with pytest.raises(DataError, match="Own is none of these"): export_vector(own, tmp_path / "x.pt2")


@pytest.mark.parametrize("arguments, message", [(dict(path="x.pt"), "ends in .pt2"), (dict(batch=0), "at least 1"), (dict(batch=2.0), "at least 1"), (dict(kind="action"), "'noun' or 'verb'")])
def test_wrong_arguments_are_said_before_any_work(encoder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message): export_vector(recognizer_of(encoder), **dict(path="x.pt2") | arguments)


def test_nothing_is_overwritten_and_no_package_is_missed_late(encoder, tmp_path, monkeypatch):
    recognizer = recognizer_of(encoder)
    (tmp_path / "x.pt2").write_text("mine")
    with pytest.raises(DataError, match="exists already"): export_vector(recognizer, tmp_path / "x.pt2")
    assert (tmp_path / "x.pt2").read_text() == "mine"
    export_vector(recognizer, tmp_path / "x.pt2", overwrite=True)
    monkeypatch.setattr(export_module, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'xmic\[onnx\]'"): export_vector(recognizer, tmp_path / "x.onnx")


def test_a_file_that_differs_is_not_left_behind(encoder, tmp_path, monkeypatch):
    monkeypatch.setitem(export_module._WRITERS, ".pt2", lambda module, *_: lambda x: module(x) * (1 + 2 * BOUND))
    with pytest.raises(DataError, match="is not written: what was exported differs"):
        export_vector(recognizer_of(encoder), tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


def test_the_recognizer_is_left_as_it_was(encoder, tmp_path):
    recognizer = recognizer_of(encoder, method="clip_adapter_temporal")
    before = {name: value.clone() for name, value in recognizer.methods["noun"].state_dict().items()}
    export_vector(recognizer, tmp_path / "x.pt2")
    method = recognizer.methods["noun"]
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items()) and set(before) == set(method.state_dict())
    assert any(p.requires_grad for p in method.parameters())
