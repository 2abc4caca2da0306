"""CLIP-Adapter against the reference vectors, and what must hold whatever the weights are."""
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from xmic.adapter import EgoSpatioTemporalAttention, ZeroShot, trained_parameters
from xmic.clip_adapter import CLIPAdapter, FeatureAdapter
from xmic.encoders import ClassEmbeddings
from xmic.files import DataError
from xmic.streams import Batch


def some_batch(d: int = 64, b: int = 5, t: int = 16, c: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Batch, ClassEmbeddings]:
    g = torch.Generator().manual_seed(0)
    return (Batch(torch.randn(b, t, d, generator=g, dtype=dtype)),
            ClassEmbeddings(tuple(map(str, range(c))), torch.randn(c, d, generator=g, dtype=dtype)))


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_visual_adapter_equals_the_reference(golden, dtype, frames):
    tensors = load_file(golden / "clip_adapter.safetensors")
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    close = lambda a, b: torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max())))
    method = CLIPAdapter(64, branches="visual", ratio=0.2)
    method.visual.load_state_dict({k.removeprefix("param/adapter."): v for k, v in tensors.items() if k.startswith("param/")})
    method.logit_scale.data = tensors["in/logit_scale"].clone()
    method.to(dtype)
    classes = ClassEmbeddings(tuple("abcdefg"), tensors["in/text_features"].to(dtype))
    batch = Batch((tensors["in/image_features"][:, None] if frames == 1 else tensors["frames/in"]).to(dtype))
    out = "out/" if frames == 1 else "frames/mean_"
    if frames == 4:  # the reference's mean was rounded to float32
        batch = Batch(tensors["frames/mean_in"][:, None].to(dtype))
        torch.testing.assert_close(tensors["frames/in"].to(dtype).mean(1), batch.video[:, 0], rtol=1e-6, atol=1e-6)
    logits = method(batch, classes)
    loss = F.cross_entropy(logits, tensors["in/labels"])
    close(logits, tensors[f"{out}logits"])
    close(loss, tensors[f"{out}loss"])
    if frames == 1:
        close(method.visual.fc(batch.video[:, 0]), tensors["out/adapter"])
        close(method.video(batch.video), tensors["out/blended"])
        loss.backward()
        gradients = {k.removeprefix("grad/adapter."): v for k, v in tensors.items() if k.startswith("grad/")}
        assert set(gradients) == {n for n, _ in method.visual.named_parameters()}
        for name, p in method.visual.named_parameters():
            close(p.grad, gradients[name])


@pytest.mark.parametrize("branches", ["visual", "text", "both"])
@pytest.mark.parametrize("average", ["before", "after"])
def test_ratio_zero_is_zero_shot(branches, average):
    batch, classes = some_batch()
    method = CLIPAdapter(64, branches, ratio=0.0, average=average).double()
    torch.testing.assert_close(method(batch, classes), ZeroShot().double()(batch, classes), rtol=1e-13, atol=1e-12)


def test_no_temporal_block_gives_the_frame_mean():
    batch, _ = some_batch()
    method = CLIPAdapter(64).double()
    assert torch.equal(method.along_time(batch.video), batch.video)
    assert torch.equal(method.video(batch.video), method.visual(batch.video.mean(1)))
    assert not any("temporal" in name for name in method.state_dict())


def test_the_temporal_block_is_x_mics():
    batch, classes = some_batch()
    method = CLIPAdapter(64, temporal_layers=2).double()
    theirs = EgoSpatioTemporalAttention(64, spatial_layers=0, temporal_layers=2).double()
    theirs.load_state_dict({k: v for k, v in method.state_dict().items() if "temporal" in k})
    torch.testing.assert_close(method.video(batch.video), method.visual(theirs(batch.video[:, :, None])), rtol=1e-12, atol=1e-12)


def test_average_after_is_the_mean_of_adapted_frames():
    batch, _ = some_batch()
    method = CLIPAdapter(64, average="after").double()
    literal = torch.stack([torch.stack([method.visual(frame) for frame in video]).mean(0) for video in batch.video])
    torch.testing.assert_close(method.video(batch.video), literal, rtol=1e-12, atol=1e-12)
    one = Batch(batch.video[:, :1])
    before = CLIPAdapter(64, average="before").double()
    before.load_state_dict(method.state_dict())
    torch.testing.assert_close(before.video(one.video), method.video(one.video))


@pytest.mark.parametrize("average", ["before", "after"])
def test_frames_are_scaled_to_length_one_before_the_mean_where_asked(average):
    batch, _ = some_batch()
    method = CLIPAdapter(64, average=average, normalize_frames=True).double()
    frames = batch.video if average == "before" else method.visual(batch.video)
    mean = (frames / frames.norm(dim=-1, keepdim=True)).mean(1)
    torch.testing.assert_close(method.video(batch.video), method.visual(mean) if average == "before" else mean)


def test_the_ratios_belong_to_their_branches():
    batch, classes = some_batch()
    method = CLIPAdapter(64, "both", ratio=0.8, text_ratio=0.1).double()
    a, f = method.visual.fc, batch.video.mean(1)
    torch.testing.assert_close(method.video(batch.video), 0.8 * a(f) + 0.2 * f)
    torch.testing.assert_close(method.text(classes.text), 0.1 * method.text.fc(classes.text) + 0.9 * classes.text)
    assert CLIPAdapter(64, ratio=0.8).text.ratio == 0.8


@pytest.mark.parametrize("branches, adapters", [("visual", 1), ("text", 1), ("both", 2)])
def test_everything_trained_gets_a_gradient_and_is_counted(branches, adapters):
    method = CLIPAdapter(512, branches, temporal_layers=2, train_logit_scale=True)
    assert trained_parameters(method) == adapters * 131_072 + 2_376_960 + 1
    batch, classes = some_batch(512, dtype=torch.float32)
    F.cross_entropy(method(batch, classes), torch.arange(5)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())
    assert trained_parameters(CLIPAdapter(512, "visual")) == 131_072
    assert trained_parameters(CLIPAdapter(768, "visual")) == 294_912


def test_classes_do_not_influence_each_other():
    batch, classes = some_batch()
    method = CLIPAdapter(64).double()
    alone = ClassEmbeddings(classes.names[2:4], classes.text[2:4])
    torch.testing.assert_close(method(batch, classes)[:, 2:4], method(batch, alone), rtol=1e-12, atol=1e-12)


def test_mixed_precision_keeps_the_cosine_in_float32():
    batch, classes = some_batch(dtype=torch.float32)
    method = CLIPAdapter(64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = method(batch, classes)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, method(batch, classes), rtol=0.02, atol=0.3)


@pytest.mark.parametrize("settings, message", [
    (dict(branches="image"), "branches='image'"), (dict(average="mean"), "average='mean'"), (dict(ratio=1.2), "ratio=1.2"),
    (dict(temporal_layers=1, heads=5), "heads=5 does not divide")])
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        CLIPAdapter(64, **settings)


def test_another_number_of_frames_is_refused():
    batch, classes = some_batch(t=8)
    with pytest.raises(DataError, match="built for 16 frames per video and was given 8"):
        CLIPAdapter(64, temporal_layers=1).double()(batch, classes)
    assert CLIPAdapter(64).double()(batch, classes).shape == (5, 7)


def test_the_bottleneck_alone_is_refused_outside_its_range():
    with pytest.raises(DataError, match="between 0 and 1"):
        FeatureAdapter(64, ratio=-0.1)
