"""What a step takes, against what can be reckoned by hand."""
import pytest
import torch
from torch import nn

from world import register_tiny, write_world
from xmic.costs import PeakMemory, count_step, step_costs
from xmic.encoders import ClassEmbeddings, create_encoder
from xmic.experiments import METHODS, profile
from xmic.prompting import CoCoOp, CoOp
from xmic.streams import Batch
from xmic.text import TextTower
from xmic.vita import VitaCLIP

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")


class Linear(nn.Module):
    "Logits by one matrix, from the first frame."

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(32, 16, bias=False)

    def forward(self, batch, classes): return self.map(batch.video[:, 0])


def test_a_matrix_costs_what_it_must():
    got = count_step(Linear(), Batch(torch.randn(8, 1, 32)), ClassEmbeddings(list("abcdefghijklmnop"), torch.zeros(16, 1)))
    assert got["gflop"] == pytest.approx(2 * (2 * 8 * 32 * 16) / 1e9) and got["trained_parameters"] == 512  # forward, and the weight's gradient
    assert 8 * 16 * 4 + 512 * 4 <= got["peak_mib"] * 2**20 < 8 * 16 * 4 * 6 + 512 * 4 + 200


def test_views_share_memory_and_what_is_let_go_does_not_count():
    with PeakMemory() as memory:
        x = torch.ones(1000)
        for _ in range(10): y = x[None].expand(5, -1) + 0
        del y
    assert (memory.now, memory.peak) == (4000, 4000 + 2 * 20000)


@pytest.fixture(scope="module")
def encoder():
    return create_encoder(register_tiny(), "random", "cpu")


def test_prompts_cost_by_the_step_or_by_the_video(encoder):
    tower, classes = TextTower(encoder.model, encoder.tokenizer), ClassEmbeddings(["pan", "knife", "tap"], torch.randn(3, 32))
    def gflop(method, size): return count_step(method, Batch(torch.randn(size, 4, 32)), classes)["gflop"]
    coop, cocoop = CoOp(tower, 4), CoCoOp(tower, 32, 4)
    assert gflop(coop, 16) < 1.1 * gflop(coop, 2) and 7 < gflop(cocoop, 16) / gflop(cocoop, 2) < 8.1


def test_recomputing_trades_operations_for_memory():
    encoder = create_encoder("mini-clip", device="cpu")  # with blocks enough
    classes, batch = ClassEmbeddings(["pan", "knife"], torch.randn(2, 128)), Batch(torch.randint(0, 256, (2, 4, 64, 64, 3), dtype=torch.uint8))
    plain, spared = (count_step(VitaCLIP(encoder, 4, text_prompts=0, recompute=r), batch, classes) for r in (False, True))
    assert spared["peak_mib"] < 0.6 * plain["peak_mib"] and 1.1 < spared["gflop"] / plain["gflop"] < 1.5


def test_every_method_of_the_tables_has_its_costs(tmp_path):
    from dataclasses import replace
    write_world(tmp_path / "csv", videos=4)
    p = replace(profile(), data=str(tmp_path), train=dict(profile().train, frames=4), methods={}, encoders={role: dict(encoder=f"mini-{role}") for role in ("clip", "dino")})
    table = step_costs(p, "csv", batch_size=2)
    assert list(table.index) == list(METHODS) and table.classes.eq(3).all() and (table.drop("ZS CLIP")[["trained_parameters", "gflop", "peak_mib"]] > 0).all(axis=None)
    assert table.gflop.idxmax() == "Vita-CLIP" and table.trained_parameters["ZS CLIP"] == 0
