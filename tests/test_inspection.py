"""Single clips: a run that is asked again answers as it did, angles are those of the vectors, and won and lost mean what they say."""
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from world import register_tiny, write_world  # noqa: E402
from xmic.classes import ClassSet  # noqa: E402
from xmic.experiments import prepare  # noqa: E402
from xmic.files import DataError  # noqa: E402
from xmic.inspection import Look, look, plot_answers, plot_attention, plot_degrees, turned, won_and_lost  # noqa: E402
from xmic.features import ExtractConfig  # noqa: E402
from xmic.config import TrainConfig
from xmic.devices import pick_device  # noqa: E402
from xmic.training import restore, train  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    "One X-MIC run and one zero-shot run on filmed clips."
    world = write_world(tmp_path_factory.mktemp("world"), videos=6, frames=60)
    common = dict(dataset="csv", data_root=str(world), encoder=register_tiny(), weights="random", features_root=str(world / "features"),
                  runs_root=str(world / "runs"), device="cpu", progress=False, frames=4)
    settings = dict(xmic=dict(epochs=2, warmup_epochs=0), zero_shot=dict(method="zero_shot"))
    return {name: train(prepare(TrainConfig(**common, **own))) for name, own in settings.items()}


@pytest.mark.parametrize("name", ["xmic", "zero_shot"])
def test_a_run_answers_as_it_did(runs, name):
    run = runs[name]
    seen, said = look(run.folder), pd.read_csv(run.folder / "predictions.csv").set_index("segment_id")
    assert seen.segments.segment_id.tolist() == said.index.tolist()
    assert seen.logits.argmax(-1).tolist() == said.predicted.tolist() and (seen.right == (said.predicted == said.label)).all()
    assert np.allclose(seen.logits.softmax(-1).amax(-1), said.confidence, atol=1e-5)


def test_angles_and_attention_are_those_of_the_adapter(runs):
    seen = look(runs["xmic"].folder, batch_size=3)
    data, method = restore(runs["xmic"], pick_device("cpu"))
    split, classes = data.split("csv", "test"), data.text["csv"]["noun"]
    (_, batch), = split.streams.batches(np.arange(len(split.segments)), split.rows(4)[0], 99)
    with torch.inference_mode():
        vector = method.scale * method.vector(batch.context.float())
        for row in range(len(vector)):
            cosine = F.cosine_similarity(classes.text.double(), classes.text.double() + vector[row].double())
            assert torch.allclose(seen.degrees[row].double(), torch.rad2deg(cosine.clamp(-1, 1).acos()), atol=0.05)
        expected = method.adapter.attention(F.normalize(batch.context.float(), dim=-1))
    assert seen.views == ("hand", "full")
    for name, size in (("spatial", (4, 2, 2)), ("temporal", (4, 4))):
        assert seen.attention[name].shape[1:] == size and torch.allclose(seen.attention[name], expected[name], atol=1e-5)


def test_methods_without_a_vector_have_no_angle(runs):
    seen = look(runs["zero_shot"].folder)
    assert seen.degrees is None and seen.attention == {}


@pytest.mark.parametrize("where", [dict(dataset="epic"), dict(kind="verb")])
def test_what_a_run_was_not_evaluated_on_is_refused(runs, where):
    with pytest.raises(DataError, match="evaluated on csv"):
        look(runs["xmic"].folder, **where)


def test_a_vector_of_nothing_turns_nothing_and_a_long_one_turns_to_itself():
    text = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert turned(text, torch.zeros(1, 8)).abs().max() < 0.1
    far = 1e6 * text[:1]
    assert torch.allclose(turned(text, far)[0], torch.rad2deg(F.cosine_similarity(text, far).acos()), atol=0.1)


def made_look(logits: list, labels: list) -> Look:
    segments = pd.DataFrame(dict(segment_id=[f"s{i}" for i in range(len(labels))], video_path="/nowhere.mp4"))
    return Look("csv", segments, ClassSet.from_names(["pan", "cup", "tap"]), np.array(labels), torch.tensor(logits))


def test_won_and_lost_clearest_first():
    before = made_look([[0., 5, 0], [0, 1, 0], [9, 0, 0], [0, 0, 3], [9, 0, 0], [1, 0, 0]], [0, 0, 0, 2, 0, -1])
    after = made_look([[1., 0, 0], [1, 0, 0], [9, 0, 0], [0, 3, 0], [0, 0, 5], [0, 1, 0]], [0, 0, 0, 2, 0, -1])
    assert won_and_lost(before, after) == ([0, 1], [4, 3])  # the last has no label
    assert won_and_lost(before, after, 1) == ([0], [4]) and won_and_lost(before, before) == ([], [])
    share = torch.tensor([0., 5, 0]).softmax(-1)
    assert abs(before.margin[0] - float(share[0] - share[1])) < 1e-6 and (before.margin[[2, 3]] > 0).all()
    assert before.best(0, 2).name.tolist() == ["cup", "pan"] and before.best(0).right.sum() == 1
    other = made_look([[1., 0, 0]], [0])
    with pytest.raises(DataError, match="other segments"):
        won_and_lost(before, other)


def test_figures_of_what_was_seen(runs):
    after, before = look(runs["xmic"].folder), look(runs["zero_shot"].folder)
    config = ExtractConfig(dataset="csv", data_root=runs["xmic"].config.data_root)
    assert plot_answers(before, after, [], config) is None
    figure = plot_answers(before, after, [0, 1], config)
    assert len(figure.axes) == 2 * 6 and figure.axes[0].get_title(loc="left") == after.classes.names[after.labels[0]]
    assert len(figure.axes[0].images) == 1 and figure.axes[5].get_title().startswith("X-MIC, ")
    assert len(plot_degrees({"a": after, "b": after}).axes) == 2 and len(plot_attention({"a": after}).axes) == 2
    gone = made_look([[1., 0, 0]], [0])
    assert len(plot_answers(gone, gone, [0], config).axes) == 6  # frames that cannot be read are grey
    plt.close("all")
