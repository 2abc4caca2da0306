"""Folders and files from others: code that they name is shown and not run, settings out of all proportion are refused, and their paths lead nowhere else."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from world import CONFIG, TINY, contents, register_tiny, write_world
from xmic.analysis import confusions
from xmic.challenge import scores_of_run
from xmic.experiments import prepare, profile
from xmic.files import DataError, check_trust, read_json, settings, write_json
from xmic.inspection import look
from xmic.recognizer import Recognizer
from xmic.reporting import plot_segments
from xmic.config import TrainConfig, resolve, resolve_saved
from xmic.training import EvaluateConfig, RunResult, evaluate_run, restore, train

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")
ROOT = Path(__file__).resolve().parents[1]
EVIL = """
from pathlib import Path
Path({trace!r}).touch()
import pandas as pd

def read(root, split):
    return pd.read_csv({segments!r}).query("split == @split")

class Method:
    def __new__(cls, config, backbone):
        from xmic.adapter import ZeroShot
        return ZeroShot(backbone.logit_scale)

class Seer:
    size = 32
    def __call__(self, frames): return frames.reshape(len(frames), -1)[:, :32].astype("float32")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> RunResult:
    "A run as someone sends it."
    world = write_world(tmp_path_factory.mktemp("world"), videos=6, frames=60)
    return train(prepare(TrainConfig(dataset="csv", data_root=str(world), encoder=register_tiny(), weights="random", features_root=str(world / "features"),
                                     runs_root=str(world / "runs"), device="cpu", progress=False, frames=4, epochs=1, warmup_epochs=0)))


@pytest.fixture
def sent(trained, tmp_path):
    "Makes a copy of the run that differs in some settings; gives its folder."
    def make(**changes) -> Path:
        shutil.copytree(trained.folder, tmp_path / "sent", dirs_exist_ok=True)
        write_json(tmp_path / "sent/config.json", read_json(tmp_path / "sent/config.json") | changes)
        return tmp_path / "sent"
    return make


@pytest.fixture
def evil(trained, tmp_path) -> Path:
    path = tmp_path / "evil.py"
    path.write_text(EVIL.format(trace=str(tmp_path / "trace"), segments=f"{trained.config.data_root}/segments.csv"))
    for video in Path(trained.config.data_root, "videos").iterdir():
        (tmp_path / "videos").mkdir(exist_ok=True)
        (tmp_path / "videos" / video.name).symlink_to(video)
    return path


def refused(use, evil: Path, *says: str) -> None:
    "Nothing has run or been written, and the message shows what would run."
    folder = evil.parent
    before = contents(folder)
    with pytest.raises(DataError, match="nothing is run because a file names it") as e: use()
    for word in (str(evil), hashlib.sha256(evil.read_bytes()).hexdigest(), "config.json", "trust_code=True", "--trust-code", *says): assert word in str(e.value)
    assert not (folder / "trace").exists() and contents(folder) == before


WAYS = {"evaluate": lambda folder: evaluate_run(EvaluateConfig(run=str(folder), device="cpu")), "look": lambda folder: look(folder),
        "restore": lambda folder: restore(RunResult.read(folder), torch.device("cpu")), "scores": lambda folder: scores_of_run(folder)}
RECOGNISE = {"recognise": lambda folder: Recognizer.from_pretrained(folder, "cpu")}
READERS = {"segments": lambda folder: plot_segments(RunResult.read(folder)), "confusions": lambda folder: confusions(of_before(folder))}


def of_before(folder: Path) -> Path:
    "Predictions as earlier versions wrote them, without names: these are looked up in the data."
    path = folder / "predictions.csv"
    table = pd.read_csv(path, keep_default_na=False)
    if "label_name" in table:
        table.drop(columns=["label_name", "predicted_name"]).to_csv(path, index=False)
    return folder


@pytest.mark.parametrize("way", [*WAYS, *READERS])
def test_a_reader_that_a_run_names(sent, evil, way):
    folder = sent(data_root=f"{evil}:read")
    of_before(folder)
    refused(lambda: (WAYS | READERS)[way](folder), evil, "data of csv", "read of")


@pytest.mark.parametrize("way", [*WAYS, *READERS])
def test_a_reader_behind_a_detour(sent, evil, way):
    "What becomes code only where the path is put together."
    folder = sent(data_root=f"{evil}:read/x/..")
    of_before(folder)
    refused(lambda: (WAYS | READERS)[way](folder), evil, "data of csv")


@pytest.mark.parametrize("way", [*WAYS, *RECOGNISE])
@pytest.mark.parametrize("setting, name", [("method", "Method"), ("encoder", "Seer"), ("context_encoder", "Seer")])
def test_methods_and_encoders_that_a_run_names(sent, evil, way, setting, name):
    folder = sent(**{setting: f"{evil}:{name}"})
    refused(lambda: (WAYS | RECOGNISE)[way](folder), evil, setting, f"{name} of")


@pytest.mark.parametrize("way", [*WAYS, *RECOGNISE])
def test_code_that_a_run_keeps(sent, evil, way):
    "Its hash is from the same folder, and vouches for nothing."
    sha256 = hashlib.sha256(evil.read_bytes()).hexdigest()
    folder = sent(method="mine/evil.py:Method", code={"mine/evil.py:Method": sha256})
    kept = folder / "code" / f"evil-{sha256[:8]}.py"
    kept.parent.mkdir()
    shutil.copy(evil, kept)
    with pytest.raises(DataError, match="nothing is run") as e: (WAYS | RECOGNISE)[way](folder)
    assert str(kept) in str(e.value) and sha256 in str(e.value) and not (evil.parent / "trace").exists()


@pytest.mark.parametrize("sha256", ["../../../", "x" * 64, ""])
def test_a_hash_that_is_none(sent, evil, sha256):
    folder = sent(method=f"{evil}:Method", code={f"{evil}:Method": sha256})
    for way in (*WAYS.values(), *RECOGNISE.values()):
        with pytest.raises(DataError, match="no SHA-256|nothing is run"): way(folder)
    assert not (evil.parent / "trace").exists()


def test_target_roots_and_saved_recognizers(trained, sent, evil, tmp_path):
    folder = sent(targets=["kitchen"], target_roots={"kitchen": f"{evil}:read"})
    refused(lambda: evaluate_run(EvaluateConfig(run=str(folder), device="cpu")), evil, "data of kitchen")
    Recognizer.from_pretrained(trained.folder, "cpu").save_pretrained(tmp_path / "saved")
    kept = read_json(tmp_path / "saved/config.json")
    kept["adapters"]["noun"]["method"] = f"{evil}:Method"
    write_json(tmp_path / "saved/config.json", kept)
    refused(lambda: Recognizer.from_pretrained(tmp_path / "saved", "cpu"), evil, "method")


def test_what_is_trusted_runs(trained, sent, evil):
    answer = evaluate_run(EvaluateConfig(run=str(sent(data_root=f"{evil}:read")), device="cpu", trust_code=True))
    assert (evil.parent / "trace").exists() and answer.metrics["results"] == trained.metrics["results"]
    assert look(sent(data_root=f"{evil}:read"), trust_code=True).logits.shape == look(trained.folder).logits.shape


def test_what_the_user_names_runs_without_a_word(trained, evil):
    answer = evaluate_run(EvaluateConfig(run=str(trained.folder), roots={"csv": f"{evil}:read"}, device="cpu"))
    assert (evil.parent / "trace").exists() and answer.metrics["results"] == trained.metrics["results"]


def test_own_runs_go_on_and_are_trusted_by_a_word(trained, evil, tmp_path):
    config = replace(trained.config, method=f"{evil}:Method", runs_root=str(tmp_path / "runs"), name="own", code={})
    run, again = train(config), train(config)
    assert run.metrics == again.metrics
    evil.write_text(evil.read_text() + "\n# another version")
    restored = restore(run, torch.device("cpu"), trust_code=True)[1]
    assert type(restored).__name__ == "ZeroShot"
    recognizer = Recognizer.from_pretrained(run.folder, "cpu", trust_code=True)
    answer = recognizer.predict(Path(trained.config.data_root, "videos/v0.mp4"), nouns=["pan", "knife"])
    assert set(answer.nouns.name) == {"pan", "knife"}
    kept = next((run.folder / "code").iterdir())
    kept.write_text(kept.read_text() + "\n# changed")
    with pytest.raises(DataError, match="not the file that the run was trained with"): restore(run, torch.device("cpu"), trust_code=True)


def test_the_command_shows_it_and_takes_a_flag(sent, evil, tmp_path):
    from typer.testing import CliRunner
    from xmic.cli import app
    call = ["evaluate", f"run={sent(data_root=f'{evil}:read')}", "device=cpu"]
    shown = CliRunner().invoke(app, call)
    assert shown.exit_code == 1 and "nothing is run" in shown.output and not (evil.parent / "trace").exists()
    assert CliRunner().invoke(app, [*call, "--trust-code"]).exit_code == 0 and (evil.parent / "trace").exists()
    folder = sent(data_root=None, method=f"{evil}:Method")
    (tmp_path / "x.mp4").touch()
    shown = CliRunner().invoke(app, ["predict", str(tmp_path / "x.mp4"), "--nouns", "pan,cup", "-m", str(folder)])
    assert shown.exit_code == 1 and "nothing is run" in shown.output


def test_the_explorer_leaves_them_out(trained, evil, tmp_path):
    pytest.importorskip("ipywidgets")
    from xmic.explorer import OpenRun, finished_runs
    for name, changes in (("good", {}), ("bad", dict(method=f"{evil}:Method")), ("worse", dict(data_root=f"{evil}:read"))):
        shutil.copytree(trained.folder, tmp_path / "runs" / name)
        write_json(tmp_path / "runs" / name / "config.json", read_json(trained.folder / "config.json") | changes)
    with pytest.warns(UserWarning, match="2 runs in .* name code"): found = finished_runs(tmp_path / "runs")
    assert list(found) == ["good"] and not (tmp_path / "trace").exists()
    refused(lambda: OpenRun(tmp_path / "runs/worse", "cpu"), evil)
    assert set(finished_runs(tmp_path / "runs", trust_code=True)) == {"good", "bad", "worse"}


def test_text_embeddings_are_not_written_where_a_file_says(sent, trained, tmp_path):
    shutil.copytree(trained.config.features_root, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("text"))
    folder = sent(features_root=str(tmp_path / "elsewhere"))
    before = contents(tmp_path / "elsewhere")
    look(folder)
    evaluate_run(EvaluateConfig(run=str(folder), template="a photo of a {}", device="cpu"))
    assert contents(tmp_path / "elsewhere") == before


def test_the_message_names_a_file_that_is_missing():
    with pytest.raises(DataError, match="there is no such file"): check_trust({"config.json, method": "/nowhere/x.py:A"}, False)
    check_trust({"config.json, method": "xmic", "encoder": None}, False)


# Settings out of all proportion

ABSURD = [dict(frames=10**9), dict(temporal_layers=10**7), dict(spatial_layers=10**7), dict(heads=10**9), dict(epochs=10**12), dict(batch_size=10**12),
          dict(prompt_length=10**9, method="coop", prompt_init="random"), dict(vita_global=10**9, method="vita_clip"), dict(seed=-1), dict(lr=float("inf")),
          dict(scale=float("nan")), dict(clip_frames=10**9), dict(betas=[0.9]), dict(validation_fraction=2.0)]
CHECK = """
import json, resource, sys
from pathlib import Path
import torch
from xmic.files import DataError
from xmic.inspection import look
from xmic.recognizer import Recognizer
from xmic.training import EvaluateConfig, evaluate_run
sys.path.insert(0, sys.argv[1])
from world import register_tiny
register_tiny()
folder, path = Path(sys.argv[2]), Path(sys.argv[2]) / "config.json"
config = json.loads(path.read_text())
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for changes in json.loads(sys.argv[3]):
    path.write_text(json.dumps(config | changes))
    for use in (lambda: Recognizer.from_pretrained(folder, "cpu"), lambda: look(folder), lambda: evaluate_run(EvaluateConfig(run=str(folder), device="cpu"))):
        try: use()
        except DataError as e: assert len(str(e)) < 3000, e
        else: raise SystemExit(f"{changes} was taken")
print("all refused")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_absurd_settings_are_refused_before_memory_is_taken(sent):
    fitting = [dict(frames=4096), dict(temporal_layers=48, frames=4096), dict(temporal_layers=3), dict(spatial_layers=48)]  # within the ranges, not of these weights
    wide = [dict(encoder=name, weights="random") for name in ("ViT-bigG-14", "EVA02-E-14-plus", "nosuch" * 1000)]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHECK, str(ROOT / "tests"), str(sent()), json.dumps([*ABSURD, *fitting])],
                          capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "all refused" in done.stdout, done.stdout + done.stderr
    folder = sent()
    for changes in wide:
        write_json(folder / "config.json", read_json(folder / "config.json") | changes)
        with pytest.raises(DataError, match="not the weights of this run|knows no model"): Recognizer.from_pretrained(folder, "cpu")


@pytest.mark.parametrize("changes", ABSURD, ids=str)
def test_absurd_settings_cannot_be_resolved(changes):
    with pytest.raises(DataError, match="cannot be run"): resolve(TrainConfig(**changes))


@pytest.mark.parametrize("changes", [dict(targets=[[5]]), dict(target_roots={"csv": [5]}), dict(code={"a.py:B": None}), dict(context_views=[None]), dict(betas=["a", "b"])])
def test_lists_and_dicts_hold_what_they_should(changes):
    with pytest.raises(DataError, match=next(iter(changes))): settings(TrainConfig, changes)
    assert settings(TrainConfig, dict(betas=[1, 0.9], targets="epic,ego4d", target_roots={"epic": "a"})).targets == ["epic", "ego4d"]


# profile.json

@pytest.mark.parametrize("changes", [
    {"encoders": {"clip": {"encoder": "{evil}:Seer"}}}, {"methods": {"xmic": {"method": "{evil}:Method"}}}, {"train": {"context_encoder": "{evil}:Seer"}},
    {"features_root": "/tmp/elsewhere"}, {"features_root": "../elsewhere"}, {"features_root": "."}, {"runs_root": "a/../../b"}, {"reports": "/"}, {"reports": ""},
    {"runs_root": "runs; touch trace"}, {"runs_root": "$(touch trace)"}, {"reports": "{x}"}, {"runs_root": "link/runs"},
    {"encoders": {"lavila": {"encoder": "lavila-large", "weights": "/etc/passwd"}}}, {"encoders": {"lavila": {"encoder": "lavila-large", "weights": "../x.pth"}}},
    {"extract": {"data_root": "/etc"}}, {"extract": {"boxes": "/etc"}}, {"train": {"name": "../../x"}}, {"train": {"target_roots": {"epic": "/etc"}}},
    {"methods": {"xmic": {"features_root": "/x"}}}, {"encoders": {"clip": "ViT"}}, {"encoders": {"dino": {}}}, {"methods": {"xmic": 5}}], ids=str)
def test_a_profile_names_neither_code_nor_other_places(tmp_path, changes):
    data, evil = tmp_path / "data", tmp_path / "evil.py"
    data.mkdir()
    (data / "link").symlink_to(tmp_path)
    evil.write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    (data / "profile.json").write_text(json.dumps(changes).replace("{evil}", str(evil)))
    before = contents(tmp_path)
    with pytest.raises(DataError, match="profile.json"): profile("paper", data=str(data))
    assert contents(tmp_path) == before


def test_a_profile_changes_what_it_may(tmp_path):
    write_json(tmp_path / "profile.json", {"encoders": {"lavila": {"encoder": "lavila-large", "weights": "weights/other.pth"}}, "train": {"epochs": 3},
                                           "features_root": "made/features", "runs_root": str(tmp_path / "runs"), "one_seed": ["xmic"], "note": "a | b <c>"})
    made = profile("paper", data=str(tmp_path))
    assert made.encoders["lavila"]["weights"] == str(tmp_path / "weights/other.pth") and made.features_root == str(tmp_path / "made/features")
    assert made.train["epochs"] == 3 and made.runs_root == str(tmp_path / "runs") and made.reports == "reports/paper"
