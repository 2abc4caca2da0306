"""CoOp, CoCoOp and A5 against the reference vectors, and what must hold whatever the weights are."""
import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, TextTransformer
from safetensors.torch import load_file

from xmic.adapter import ZeroShot, trained_parameters
from xmic.encoders import ClassEmbeddings
from xmic.files import DataError
from xmic.prompting import A5, CoCoOp, CoOp, LearnedPrompts, a5_prompts, coop_prompts, paired_logits, text_once
from xmic.streams import Batch
from xmic.text import TextTower

TOKENIZER = open_clip.get_tokenizer("ViT-B-16")
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_tower(width: int = 32, layers: int = 2, dim: int = 24, seed: int = 0) -> TextTower:
    "A small text tower with random weights, in float32."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = TextTransformer(77, 49408, width, 2, layers, output_dim=dim, act_layer=QuickGELU)
    return TextTower(text.requires_grad_(False), TOKENIZER)


def embeddings(names, dim: int = 24) -> ClassEmbeddings:
    return ClassEmbeddings(names, torch.zeros(len(names), dim))


NAMES = ("cup", "chopping board", "turn on", "turn off", "knife")


# The reference

def reference_tower(tensors: dict, config: dict, dtype: torch.dtype) -> TextTower:
    "The reference's frozen text tower."
    width = config.get("text_width", config.get("width"))
    text = TextTransformer(77, 49408, width, config["text_heads"], config["text_layers"], output_dim=config["joint_dim"], act_layer=QuickGELU)
    state = {k.removeprefix("text/"): v for k, v in tensors.items() if k.startswith("text/") and "vocab" not in k and "logit_scale" not in k}
    rows = torch.zeros(49408, width).index_copy(0, tensors["text/vocab_ids"], tensors["text/vocab_rows"])
    text.load_state_dict(state | {"token_embedding.weight": rows})
    return TextTower(text.to(dtype).requires_grad_(False), TOKENIZER)


def read(golden, name: str) -> tuple[dict, dict]:
    return load_file(golden / f"{name}.safetensors"), json.loads((golden / f"{name}.json").read_text())["config"]


def close(found: torch.Tensor, expected: torch.Tensor, floor: float | None = None) -> None:
    "1e-10 relative in float64, 1e-5 in float32, where small numbers are compared with the largest (float32: at least with one)."
    tolerance = 1e-10 if found.dtype == torch.float64 else 1e-5
    floor = floor or (1e-3 if found.dtype == torch.float64 else 1.0)
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance * float(expected.abs().max().clamp_min(floor)))


def said(prompts: list[list[int]], tower: TextTower, words: str = "X") -> torch.Tensor:
    "The token ids of prompts, with words for the learned vectors, as the reference has them."
    words = tower.tokens([words])[0]
    rows = [[tower.sot, *(words[~s % len(words)] if s < 0 else s for s in p), tower.eot] for p in prompts]
    return torch.tensor([row + [0] * (77 - len(row)) for row in rows])


@PRECISIONS
@pytest.mark.parametrize("case", ["end_P4", "end_P16", "init_a_photo_of_a", "middle_P5", "front_P4", "csc_P3"])
@pytest.mark.parametrize("memory", [1.0, 1e-5], ids=["whole", "parts"])
def test_coop_equals_the_reference(golden, case, dtype, memory):
    tensors, config = read(golden, "coop")
    c, names = config["cases"][case], config["class_names"]
    tower = reference_tower(tensors, config, dtype)
    tower.memory = memory
    method = CoOp(tower, c["P"], "random" if c["init"] == "random" else c["init"], c["class_position"],
                  owners=names if c["class_specific"] else (), logit_scale=float(tensors["text/logit_scale"].double().exp())).to(dtype)
    method.logit_scale.data.copy_(tensors["text/logit_scale"])
    if c["init"] != "random":
        close(method.prompts.vectors.detach(), tensors[f"{case}/ctx"])
    method.prompts.vectors.data.copy_(tensors[f"{case}/ctx"])
    if c["class_position"] == "end":
        assert torch.equal(said(method.prompts.prompts_of(tower, names), tower, "X" if c["init"] == "random" else c["init"]), tensors[f"{case}/token_ids"])
    close(method.prompts(names), tensors[f"{case}/text_features"])
    logits = method(Batch(tensors["in/image_features"].to(dtype)[:, None]), embeddings(names))
    loss = F.cross_entropy(logits, tensors["in/labels"])
    loss.backward()
    close(logits, tensors[f"{case}/logits"])
    close(loss, tensors[f"{case}/loss"])
    close(method.prompts.vectors.grad, tensors[f"{case}/grad_ctx"])


@PRECISIONS
@pytest.mark.parametrize("memory", [1.0, 1e-5], ids=["whole", "parts"])
def test_cocoop_equals_the_reference(golden, dtype, memory):
    tensors, config = read(golden, "cocoop")
    tower, names = reference_tower(tensors, config, dtype), config["class_names"]
    tower.memory = memory
    method = CoCoOp(tower, config["joint_dim"], config["P"], "random").to(dtype)
    method.logit_scale.data.copy_(tensors["text/logit_scale"])
    ours = dict(method.named_parameters())
    renamed = {k: "prompts.vectors" if k == "ctx" else k for k in (n.removeprefix("param/") for n in tensors if n.startswith("param/"))}
    assert set(renamed.values()) == {n for n, p in ours.items() if p.requires_grad}
    for theirs, name in renamed.items():
        ours[name].data.copy_(tensors[f"param/{theirs}"])
    assert torch.equal(said(method.prompts.prompts_of(tower, names), tower), tensors["in/token_ids"])
    images = tensors["in/image_features"].to(dtype)
    shift = method.meta_net(F.normalize(images, dim=-1))
    close(shift, tensors["out/meta_net"])
    close(method.prompts(names, shift), tensors["out/text_features"])
    logits = method(Batch(images[:, None]), embeddings(names))
    loss = F.cross_entropy(logits, tensors["in/labels"])
    loss.backward()
    close(logits, tensors["out/logits"])
    close(loss, tensors["out/loss"])
    for theirs, name in renamed.items():
        close(ours[name].grad, tensors[f"grad/{theirs}"])


@PRECISIONS
@pytest.mark.parametrize("case", ["p16_x_16_two_layers", "p5_x_3_one_layer", "p0_x_0_no_temporal"])
def test_a5_equals_the_reference(golden, case, dtype):
    tensors, config = read(golden, "a5")
    c, tower, names = config["cases"][case], reference_tower(tensors, config, dtype), config["class_names"]
    method = A5(tower, config["width"], config["T"], c["prefix"], c["postfix"], c["temporal_layers"], config["temporal_heads"]).to(dtype)
    assert torch.equal(said(tower.tokens(names), tower), tensors["in/token_ids"])
    ours, renamed = dict(method.named_parameters()), {}
    for theirs in (n.removeprefix(f"{case}/param/") for n in tensors if n.startswith(f"{case}/param/")):
        renamed[theirs] = theirs.replace("embedding.weight", "prompts.vectors").replace("temporalEmbedding.weight", "temporal_embedding").replace("temporalModelling.", "temporal.")
    if not c["temporal"]:
        del renamed["temporalEmbedding.weight"]  # not used there
    assert set(renamed.values()) == set(ours)
    for theirs, name in renamed.items():
        ours[name].data.copy_(tensors[f"{case}/param/{theirs}"])
    prompts = method.prompts.prompts_of(tower, names)
    assert [len(p) + 1 for p in prompts] == tensors[f"{case}/eot_position"].tolist()
    frames = tensors["in/frames"].to(dtype)
    close(method.video(frames), tensors[f"{case}/video_features"])
    close(method.prompts(names), tensors[f"{case}/text_features"])
    logits = method(Batch(frames), embeddings(names))
    loss = F.cross_entropy(logits, tensors["in/labels"])
    loss.backward()
    close(logits, tensors[f"{case}/logits"])
    close(loss, tensors[f"{case}/loss"])
    for theirs, name in renamed.items():
        gradient, expected = ours[name].grad, tensors[f"{case}/grad/{theirs}"] if f"{case}/grad/{theirs}" in tensors else None
        if expected is None:
            assert not c["temporal"] and name != "prompts.vectors"
            continue
        if name.endswith("in_proj_bias"):  # the key third is zero in exact arithmetic
            width = len(expected) // 3
            assert gradient[width:2 * width].abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)
            keep = [*range(width), *range(2 * width, 3 * width)]
            gradient, expected = gradient[keep], expected[keep]
        close(gradient, expected)
    rows = json.loads((golden / "a5.json").read_text())["checks"][f"{case}_rows_of_embedding_with_gradient"]
    assert method.prompts.vectors.grad.abs().sum(1).nonzero()[:, 0].tolist() == rows


# Counts and identities

def test_trained_parameters_at_the_size_of_vit_b_16():
    tower = make_tower(512, 1, 512)
    assert trained_parameters(CoOp(tower)) == 8_192 and trained_parameters(CoOp(tower, init="a photo of a")) == 2_048
    assert trained_parameters(CoOp(tower, owners=list(map(str, range(300))))) == 2_457_600
    assert trained_parameters(CoCoOp(tower, 512)) == 35_360 and trained_parameters(CoCoOp(tower, 512, 16, "random")) == 41_504
    assert [trained_parameters(A5(tower, 512, temporal_layers=n)) for n in (1, 2)] == [3_200_000, 6_352_384]
    assert trained_parameters(CoOp(tower, train_logit_scale=True)) == 8_193


def test_an_empty_meta_network_leaves_coop():
    tower = make_tower()
    coop, cocoop = CoOp(tower, init="a photo of a").double(), CoCoOp(tower, 24).double()
    tower.text.double()
    for parameter in cocoop.meta_net.linear2.parameters():
        parameter.data.zero_()
    batch = Batch(torch.randn(4, 6, 24, dtype=torch.float64))
    torch.testing.assert_close(cocoop(batch, embeddings(NAMES)), coop(batch, embeddings(NAMES)), rtol=1e-11, atol=1e-11)


def test_four_vectors_from_a_photo_of_a_are_the_hand_prompt():
    tower = make_tower()
    tower.text.double()
    by_hand = tower.text(TOKENIZER([f"a photo of a {name}." for name in NAMES]))
    batch = Batch(torch.randn(4, 6, 24, dtype=torch.float64))
    torch.testing.assert_close(CoOp(tower, init="a photo of a").double()(batch, embeddings(NAMES)),
                               ZeroShot().double()(batch, ClassEmbeddings(NAMES, by_hand)), rtol=1e-11, atol=1e-11)


def test_without_temporal_layers_a5_averages_the_frames():
    frames = torch.randn(3, 16, 24)
    assert torch.equal(A5(make_tower(), 24, temporal_layers=0).video(frames), frames.mean(1))
    method = A5(make_tower(), 24, temporal_layers=2)
    with torch.no_grad():
        method.temporal_embedding.zero_()
        for block in method.temporal.resblocks:
            for parameter in (*block.attn.out_proj.parameters(), *block.mlp.c_proj.parameters()):
                parameter.zero_()
    torch.testing.assert_close(method.video(frames), frames.mean(1))


def test_logits_of_each_video_with_its_own_texts():
    text, video = torch.randn(3, 5, 24, dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64)
    torch.testing.assert_close(paired_logits(text, video, 7.0), 7 * torch.cosine_similarity(text, video[:, None], dim=-1))
    assert paired_logits(text.bfloat16(), video.bfloat16(), 7.0).dtype == torch.float32


# Layouts and names

def test_layouts_of_coop():
    tower = make_tower()
    (end,), (middle,), (front,) = (coop_prompts(tower, ["chopping_board"], 3, position) for position in ("end", "middle", "front"))
    a, b, dot = tower.tokens(["chopping board."])[0]
    assert end == [~0, ~1, ~2, a, b, dot] and middle == [~0, a, b, ~1, ~2, dot] and front == [a, b, ~0, ~1, ~2, dot]
    assert len(coop_prompts(tower, ["chopping_board"])[0]) == 16 + len(end) - 3  # CoOp's own number of vectors
    assert coop_prompts(tower, ["chopping_board"], 3, period=False) == [[~0, ~1, ~2, a, b]]
    assert coop_prompts(tower, ["cup", "knife"], 2, owners=["knife", "cup"]) == [[~2, ~3, 1937, dot], [~0, ~1, *tower.tokens(["knife"])[0], dot]]


def test_a5_reads_its_table_by_position():
    for prompt in a5_prompts(make_tower(), NAMES, 4, 3):
        assert all(~s == position for position, s in enumerate(prompt, start=1) if s < 0)
        assert sum(s < 0 for s in prompt) == 7 and min(prompt[4:5]) > 0


@pytest.mark.parametrize("build", [lambda t: CoOp(t), lambda t: CoOp(t, position="front"), lambda t: CoCoOp(t, 24), lambda t: A5(t, 24, 6)])
def test_other_names_at_test_time(build):
    method = build(make_tower())
    batch, new = Batch(torch.randn(3, 6, 24)), ("drill", "screw driver")
    before = method(batch, embeddings(NAMES))
    with torch.inference_mode():
        logits = method(batch, embeddings(new))
    assert logits.shape == (3, 2)
    torch.testing.assert_close(logits, method(batch, embeddings((*new, *NAMES)))[:, :2].detach(), rtol=0, atol=1e-3)  # of a scale of 100
    assert torch.equal(before, method(batch, embeddings(NAMES)))


def test_vectors_of_single_classes_serve_these_alone():
    method, batch = CoOp(make_tower(), 4, owners=NAMES), Batch(torch.randn(3, 6, 24))
    assert method.prompts.vectors.shape == (5, 4, 32) and not torch.equal(method.prompts.vectors[0], method.prompts.vectors[1])
    whole = method(batch, embeddings(NAMES))
    torch.testing.assert_close(method(batch, embeddings((NAMES[3], NAMES[1]))), whole[:, [3, 1]], rtol=0, atol=1e-3)  # of a scale of 100
    with pytest.raises(DataError, match="(?s)learned for other classes.*drill"):
        method(batch, embeddings(("cup", "drill")))


@pytest.mark.parametrize("make, message", [
    (lambda t: CoOp(t, 5, "a photo of a"), "4 tokens, but 5"), (lambda t: CoOp(t, init=""), "0 tokens"), (lambda t: CoOp(t, position="back"), "position='back'"),
    (lambda t: A5(t, 24, heads=5), "heads=5 does not divide"), (lambda t: CoOp(t, 80)(Batch(torch.randn(1, 2, 24)), embeddings(NAMES)), "77 tokens"),
    (lambda t: A5(t, 24, 6)(Batch(torch.randn(1, 5, 24)), embeddings(NAMES)), "built for 6 frames")])
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(DataError, match=message):
        make(make_tower())


# What is saved, when text is encoded, precision

def test_only_what_is_learned_is_saved():
    tower = make_tower()
    assert set(CoOp(tower).state_dict()) == {"prompts.vectors", "logit_scale"}
    assert sum(v.numel() for v in CoCoOp(tower, 24).state_dict().values()) == trained_parameters(CoCoOp(tower, 24)) + 1
    assert all(p.requires_grad for n, p in A5(tower, 24).named_parameters())


class Counted(TextTower):
    def features(self, prompts, vectors):
        self.calls = getattr(self, "calls", 0) + 1
        return super().features(prompts, vectors)


def counted() -> Counted:
    tower = make_tower()
    return Counted(tower.text, TOKENIZER)


def test_an_evaluation_encodes_a_class_list_once_and_again_when_the_vectors_change():
    tower = counted()
    method, batch = CoOp(tower), Batch(torch.randn(3, 6, 24))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(3):
                before = method(batch, embeddings(NAMES))
    assert tower.calls == 1
    with torch.no_grad():
        method(batch, embeddings(NAMES[:2]))
        method.prompts.vectors.mul_(3)
        after = method(batch, embeddings(NAMES))
    assert tower.calls == 3 and not torch.allclose(before, after)
    method.load_state_dict({k: 2 * v for k, v in method.state_dict().items()})
    with torch.no_grad():
        assert not torch.allclose(method(batch, embeddings(NAMES)), after)
        method(batch, embeddings(NAMES))
    assert tower.calls == 4


@pytest.mark.parametrize("build, calls", [(lambda t: CoOp(t), 1), (lambda t: A5(t, 24, 6), 1), (lambda t: CoCoOp(t, 24), 3)])
def test_a_step_in_parts_has_the_gradient_of_the_whole_and_encodes_text_once(build, calls):
    tower = counted()
    torch.manual_seed(0)
    method, video = build(tower), torch.randn(6, 6, 24)
    gradients = []
    for parts in (1, 3):
        method.zero_grad()
        tower.calls = 0
        with text_once(method):
            for part in video.chunk(parts):
                method(Batch(part), embeddings(NAMES)).logsumexp(-1).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None})
    assert tower.calls == calls and gradients[0].keys() == gradients[1].keys() and "prompts.vectors" in gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=name)
    method.zero_grad()
    method(Batch(video), embeddings(NAMES)).logsumexp(-1).sum().backward()  # outside again
    torch.testing.assert_close(method.prompts.vectors.grad, gradients[0]["prompts.vectors"], rtol=1e-4, atol=1e-4)


def test_an_error_inside_a_step_in_parts_leaves_nothing_behind():
    method, batch = CoOp(make_tower()), Batch(torch.randn(2, 6, 24))
    with pytest.raises(RuntimeError), text_once(method):
        method(batch, embeddings(NAMES)).sum().backward()
        raise RuntimeError
    assert method.prompts.vectors.grad is None
    method(batch, embeddings(NAMES)).sum().backward()
    assert method.prompts.vectors.grad.abs().sum() > 0


@pytest.mark.parametrize("build", [lambda t: CoOp(t), lambda t: CoCoOp(t, 24), lambda t: A5(t, 24, 6)])
@pytest.mark.parametrize("memory", [1.0, 1e-6], ids=["whole", "parts"])
def test_under_mixed_precision_what_is_trained_stays_float32(build, memory):
    tower = make_tower()
    tower.memory = memory
    torch.manual_seed(0)
    method, batch = build(tower), Batch(torch.randn(4, 6, 24))
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    exact = method(batch, embeddings(NAMES))
    with torch.autocast("cpu", torch.bfloat16):
        logits = method(batch, embeddings(NAMES))
    assert logits.dtype == torch.float32 and torch.allclose(logits, exact, atol=3)  # of a scale of 100
    before = method.prompts.vectors.clone()
    F.cross_entropy(logits, torch.arange(4)).backward()
    optimizer.step()
    assert all(p.dtype == torch.float32 and (p.grad is None or torch.isfinite(p.grad).all()) for p in method.parameters())
    assert not torch.equal(before, method.prompts.vectors) and torch.isfinite(method.prompts.vectors).all()
    assert isinstance(method.prompts, LearnedPrompts)
