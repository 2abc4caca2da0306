"""Names of devices: what is there is used, and what is not is one error before anything is loaded."""
import pytest
import torch

from xmic.config import TrainConfig
from xmic.devices import pick_device
from xmic.encoders import create_encoder
from xmic.files import DataError
from xmic.training import EvaluateConfig, evaluate_run, train


@pytest.fixture
def machine(monkeypatch):
    def made(gpus: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    return made


@pytest.mark.parametrize("gpus, mps, name, device", [
    (0, False, None, "cpu"), (0, True, None, "mps"), (2, True, None, "cuda"), (2, False, "gpu", "cuda"), (0, True, "GPU", "mps"), (0, False, "CPU", "cpu"), (0, False, " cpu ", "cpu"),
    (0, False, "cpu:0", "cpu"), (2, False, "Cuda:1", "cuda:1"), (2, False, "cuda", "cuda"), (0, True, "MPS", "mps"), (1, False, torch.device("cuda", 0), "cuda:0"), (2, False, "cpu", "cpu"),
    (0, False, "", "cpu")])
def test_a_name_means_what_is_there(machine, gpus, mps, name, device):
    machine(gpus, mps)
    assert pick_device(name) == torch.device(device)


@pytest.mark.parametrize("gpus, mps, name, words", [
    (0, False, "gpu", "finds no GPU"), (0, False, "cuda", "no CUDA GPU"), (0, True, "cuda:1", "choose mps or cpu"), (0, False, "mps", "no Apple GPU"), (2, False, "mps", "choose cuda or cpu"),
    (1, False, "cuda:7", "has 1 CUDA GPU: cuda:0$"), (4, False, "cuda:4", "has 4 CUDA GPUs: cuda:0 to cuda:3"), (0, False, "tpu", "none that torch knows"), (0, False, "cuda:one", "none that torch knows"),
    (0, False, "xpu", "cannot be used with this build"), (0, False, 3, "none that torch knows|no CUDA GPU|cannot be used")])
def test_what_is_not_there_is_one_sentence(machine, gpus, mps, name, words):
    machine(gpus, mps)
    with pytest.raises(DataError, match=words) as error: pick_device(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_it_is_refused_before_anything_is_read(machine, tmp_path, monkeypatch):
    machine()
    with monkeypatch.context() as patch:
        patch.setattr("xmic.encoders._own_model", lambda *_: pytest.fail("looked for a model"))
        with pytest.raises(DataError, match="no Apple GPU"): create_encoder("mini-clip", device="mps")
    for device in ("gpu", "cuda:7"):
        with pytest.raises(DataError, match="GPU"): train(TrainConfig(dataset="epic", data_root=str(tmp_path), device=device, runs_root=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_evaluation_refuses_it_too(machine, tmp_path):
    machine()
    with pytest.raises(DataError): evaluate_run(EvaluateConfig(run=str(tmp_path), device="tpu"))
