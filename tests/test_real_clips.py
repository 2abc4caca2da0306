"""Every method for one epoch on real first-person clips, at the size of CLIP's ViT-B/32 with random weights."""
import numpy as np
import pytest

from xmic.features import ExtractConfig, extract_dataset
from xmic.frames import store_dataset
from xmic.config import METHODS, TrainConfig
from xmic.training import train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*RANDOM weights")]
ENCODER = dict(encoder="ViT-B-32-quickgelu", weights="random")


@pytest.fixture(scope="module")
def made(shared_data, tmp_path_factory) -> dict:
    common = dict(dataset="csv", data_root=str(shared_data / "real_clips"), features_root=str(tmp_path_factory.mktemp("features")), progress=False, **ENCODER)
    extraction = ExtractConfig(**common, feature_fps=2.0, workers=1, device="cpu")
    store, report = extract_dataset(extraction)
    assert not report.failed and store.verify() == []
    _, report = store_dataset(extraction, "hand")
    assert not report.failed
    return common


@pytest.mark.parametrize("method", METHODS)
def test_one_epoch(made, method, tmp_path):
    config = TrainConfig(**made, method=method, frames=4, epochs=1, warmup_epochs=0, batch_size=8, device="cpu", runs_root=str(tmp_path))
    run = train(config)
    top1 = run.metrics["results"]["csv"]["noun"]["top1"]
    assert top1["count"] == 24 and 0 <= top1["value"] <= 100
    if method == "zero_shot": return
    (epoch,) = run.history.to_dict("records")
    assert np.isfinite(epoch["loss"]) and epoch["segments"] == 56 and run.metrics["parameters"] > 0
