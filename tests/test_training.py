"""Training and evaluation: schedules, seeds, resuming to the bit, what is recorded, and settings that cannot be."""
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file

from world import contents, extract_config, kill_and_resume, register_tiny, write_world
from xmic.encoders import ClassEmbeddings, create_encoder
from xmic.evaluation import accuracy, mean_per_class, restricted_top1, top1
from xmic.features import dataset_store, extract_dataset, shard_name, write_shard
from xmic.files import DataError, settings, write_json
from xmic.recognizer import Recognizer
from xmic.streams import Batch
from xmic.together import train_together
from xmic.config import TrainConfig, build_method, resolve
from xmic.training import EvaluateConfig, RunResult, Trainer, evaluate_run, held_out_videos, learning_rate, run_name, subsample, train

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")
NOUNS, VERBS = ["pan", "knife", "tap", "cup"], ["take", "put", "wash"]


def make_dataset(root: Path, features: Path, name: str, nouns=NOUNS, verbs=VERBS, videos: int = 20, seed: int = 0, rows=(20, 60)) -> Path:
    "A CSV dataset with generated features in both views, in which noun and verb show."
    encoder = create_encoder(register_tiny(), "random", "cpu")
    rng = np.random.default_rng(seed)
    concept = {n: np.random.default_rng(list(n.encode())).normal(size=32) for n in [*nouns, *verbs]}
    lines, store = [], dataset_store(features, encoder, "shortest", name)
    for view in ("full", "hand"):
        write_json(store.root / view / "manifest.json", dict(encoder.describe(), dim=32, view=view))
    for v in range(videos):
        parts = {"full": [], "hand": []}
        for s in range(4):
            noun, verb = nouns[rng.integers(len(nouns))], verbs[rng.integers(len(verbs))]
            lines.append(dict(segment_id=f"v{v}_{s}", video_id=f"v{v}", start_sec=2 * s, stop_sec=2 * s + 2, verb=verb, noun=noun,
                              split="test" if v % 4 == 0 else "train"))
            n = int(rng.integers(*rows))
            for view in parts:
                made = concept[noun] + np.linspace(0, 1, n)[:, None] * concept[verb] + rng.normal(size=(n, 32))
                parts[view].append((f"v{v}_{s}", torch.from_numpy(made), np.arange(n)))
        for view in parts:
            write_shard(store.root / view / shard_name(f"v{v}"), parts[view])
    root.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(lines).to_csv(root / "segments.csv", index=False)
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_dataset(folder / "csv", folder / "features", "csv")
    return folder


@pytest.fixture
def config(made, tmp_path) -> TrainConfig:
    return TrainConfig(dataset="csv", data_root=str(made / "csv"), features_root=str(made / "features"), encoder=register_tiny(),
                       weights="random", runs_root=str(tmp_path / "runs"), device="cpu", epochs=4, warmup_epochs=1, batch_size=8,
                       lr=3e-3, progress=False)


REJECTED = {
    "a merge that does not exist": (dict(merge="nonsense"), "merge"),
    "heads that do not divide the width": (dict(heads=5), None),
    "weights that are missing": (dict(weights="nowhere/clip.pt"), "nowhere"),
    "a dataset that is not there": (dict(data_root="nowhere/csv"), "nowhere"),
    "a target that is unknown": (dict(targets=["epics"]), "epics"),
    "a target that is not there": (dict(targets=["egtea"]), "egtea"),
    "features that are not there": (dict(features_root="{tmp}/featuers"), "featuers"),
    "features of another resize": (dict(resize="squash"), "extract"),
    "all videos held out": (dict(selection="source validation", data_root="{tmp}/one"), "only one"),
    "a device that is none": (dict(device="gpu"), None),
}


@pytest.mark.parametrize("case", REJECTED)
def test_a_run_that_did_not_start_leaves_nothing(config, made, tmp_path, case):
    changes, message = REJECTED[case]
    changes = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in changes.items()}
    lines = pd.read_csv(made / "csv" / "segments.csv")
    (tmp_path / "one").mkdir()
    lines[lines.video_id.isin(["v0", "v1"])].to_csv(tmp_path / "one" / "segments.csv", index=False)
    before, features = contents(tmp_path), contents(made / "features")
    with pytest.raises((DataError, RuntimeError, AssertionError), match=message): train(replace(config, **changes))
    assert contents(tmp_path) == before and not (tmp_path / "runs").exists() and not (tmp_path / "featuers").exists()
    assert {p: b for p, b in contents(made / "features").items() if p in features} == features


def test_a_rejected_run_changes_no_run_that_is_there(config, monkeypatch, tmp_path):
    def gone(*_): raise DataError("the disk is away")
    def stop(): raise KeyboardInterrupt

    config, run_epoch = replace(config, name="mine", epochs=2), Trainer.run_epoch
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", lambda self: run_epoch(self) if self.epoch < 1 else stop())
        with pytest.raises(KeyboardInterrupt): train(config)
    for finished in (False, True):
        if finished: train(config)
        before = contents(tmp_path / "runs")
        for changes in (dict(seed=1), dict(merge="nonsense"), dict(weights="nowhere/clip.pt"), dict(features_root=str(tmp_path / "none")), dict(targets=["epics"])):
            with pytest.raises((DataError, RuntimeError)): train(replace(config, **changes))
            with pytest.raises((DataError, RuntimeError)): train_together([replace(config, **changes)])
        if not finished:
            with monkeypatch.context() as patch, pytest.raises(DataError, match="away"):
                patch.setattr("xmic.training.RunData.store", gone)
                train(config)
        assert contents(tmp_path / "runs") == before


def test_an_evaluation_that_did_not_start_leaves_nothing(config, tmp_path):
    run = train(replace(config, epochs=1, warmup_epochs=0))
    before = contents(tmp_path)
    for changes in (dict(datasets=["egtea"]), dict(datasets=["epics"]), dict(template="{} {}"), dict(roots={"csv": str(tmp_path / "none")}), dict(features_root=str(tmp_path / "none"))):
        with pytest.raises(DataError): evaluate_run(EvaluateConfig(run=str(run.folder), device="cpu", **changes))
        assert contents(tmp_path) == before and not (run.folder / "evaluations").exists() and not (tmp_path / "none").exists()
    (run.folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError): evaluate_run(EvaluateConfig(run=str(run.folder), device="cpu"))
    assert not (run.folder / "evaluations").exists()


def test_runs_together_that_did_not_start_leave_nothing(config, tmp_path):
    for changes in (dict(merge="nonsense"), dict(weights="nowhere/clip.pt"), dict(targets=["egtea"])):
        for stacked in (False, True):
            with pytest.raises((DataError, RuntimeError)): train_together([replace(config, seed=s, **changes) for s in (0, 1)], stacked)
            assert not (tmp_path / "runs").exists()


def weights(run: RunResult) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "model.safetensors")


def interrupted(config: TrainConfig, monkeypatch, *epochs: int) -> RunResult:
    "A run that is stopped after each of these epochs, and started again."
    from xmic.training import Trainer
    original = Trainer.run_epoch
    for epoch in epochs:
        def until(self):
            if self.epoch == epoch: raise KeyboardInterrupt
            return original(self)
        monkeypatch.setattr(Trainer, "run_epoch", until)
        with pytest.raises(KeyboardInterrupt): train(config)
    monkeypatch.setattr(Trainer, "run_epoch", original)
    return train(config)


def same(a: RunResult, b: RunResult) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_learning_rates_equal_the_reference(golden):
    for case in json.loads((golden / "lr_schedule.json").read_text())["xmic"]:
        c = case["config"]
        ours = [learning_rate(e, c["lr"], max(c["warmup_epoch"], 0), c["warmup_min_lr"]) for e in range(1, c["max_epoch"] + 1)]
        np.testing.assert_allclose(ours, case["lr"], rtol=1e-12)
    for case in json.loads((golden / "lr_schedule.json").read_text())["coop_family"]:
        c = case["config"]
        ours = [learning_rate(e, c["lr"], c["warmup_epoch"], c["warmup_cons_lr"], c["max_epoch"]) for e in range(1, c["max_epoch"] + 1)]
        np.testing.assert_allclose(ours, case["lr"], rtol=1e-12)


def test_a_run_learns_and_leaves_what_it_promises(config):
    run = train(replace(config, labels="both", epochs=12, post_mlp=False))  # at width 32 the MLP would have two units
    assert run.history.loss.iloc[-1] < 0.8 * run.history.loss.iloc[0] and len(run.history) == 12
    assert {p.name for p in run.folder.iterdir()} == {"config.json", "metrics.json", "history.csv", "model.safetensors", "predictions.csv"}
    m = run.metrics
    assert set(m["results"]["csv"]) == {"noun", "verb", "action"}
    for kind in ("noun", "verb"):
        value = m["results"]["csv"][kind]["top1"]
        assert value["count"] == 20 and value["low"] <= value["value"] <= value["high"]
    assert m["results"]["csv"]["noun"]["top1"]["value"] > 60  # chance is 25
    assert m["segments"]["csv"] == dict(segments=20, with_features=20, missing=0)
    assert m["versions"]["torch"] == torch.__version__ and m["seed"] == 0 and m["seconds"] > 0 and m["peak_memory"]["process_mib"] > 50
    assert m["selection"] == dict(rule="last") and set(m["features"]["csv"]) and settings(TrainConfig, json.loads((run.folder / "config.json").read_text())) == run.config
    predictions = pd.read_csv(run.folder / "predictions.csv")
    right = predictions[predictions.kind == "noun"]
    assert 100 * (right.predicted == right.label).mean() == pytest.approx(m["results"]["csv"]["noun"]["top1"]["value"])


def test_tensorboard_is_told_what_the_history_says(config, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plain, told = replace(config, labels="both", name="plain"), replace(config, labels="both", name="told", tensorboard=True)
    assert run_name(resolve(told)) == run_name(resolve(plain))
    run = interrupted(told, monkeypatch, 1, 3)
    assert same(run, train(plain))
    assert len(list(run.folder.glob("events.out.tfevents.*"))) == 1 and not list((run.folder.parent / "plain").glob("events*"))
    events = accumulator.EventAccumulator(str(run.folder)).Reload()
    for column in run.history.columns.drop("epoch"):
        found = [(e.step, e.value) for e in events.Scalars(f"train/{column}")]
        assert [step for step, _ in found] == run.history.epoch.tolist()
        np.testing.assert_allclose([value for _, value in found], run.history[column], rtol=1e-6)
    for kind, measured in run.metrics["results"]["csv"].items():
        for name, measure in measured.items():
            (event,) = events.Scalars(f"csv {kind}/{name}")
            assert event.step == 4 and event.value == pytest.approx(measure["value"])


def test_without_tensorboard_a_run_that_asks_for_it_is_refused_before_any_work(config, monkeypatch):
    monkeypatch.setattr("xmic.config.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"TensorBoard is not installed here: pip install 'xmic\[tensorboard\]'"):
        train(replace(config, tensorboard=True))
    assert not Path(config.runs_root).exists()


def test_a_finished_run_is_not_trained_again(config):
    run = train(config)
    changed = (run.folder / "model.safetensors").stat().st_mtime_ns
    assert train(config).metrics == run.metrics and (run.folder / "model.safetensors").stat().st_mtime_ns == changed


def test_the_same_seed_gives_the_same_weights_and_another_does_not(config):
    a, b = (train(replace(config, name=n)) for n in ("a", "b"))
    assert same(a, b) and a.metrics["results"] == b.metrics["results"]
    assert not same(a, train(replace(config, seed=1, name="c")))


def test_rows_from_disk_give_the_weights_of_resident_rows(config):
    assert same(*(train(replace(config, resident=r, name=str(r))) for r in (True, False)))


def test_the_global_generators_are_left_alone(config):
    torch.manual_seed(5), np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5), np.random.seed(5)
    train(config)
    assert torch.equal(torch.rand(3), expected[0]) and (np.random.rand(3) == expected[1]).all()


@pytest.mark.parametrize("selection", ["last", "source validation"])
def test_interrupted_after_any_epoch_it_goes_on_to_the_same_weights(config, selection, monkeypatch):
    config = replace(config, selection=selection, validation_fraction=0.3)
    whole = train(replace(config, name="whole"))
    from xmic.training import Trainer
    original, stop_after = Trainer.run_epoch, [1, 1, 1]

    def stopping(self):
        if self.epoch - stopping.begun >= 1 and stop_after:
            stop_after.pop()
            raise KeyboardInterrupt
        return original(self)

    while True:
        try:
            checkpoint = Path(config.runs_root) / "broken" / "checkpoint.pt"
            stopping.begun = torch.load(checkpoint, weights_only=True)["epoch"] if checkpoint.exists() else 0
            monkeypatch.setattr(Trainer, "run_epoch", stopping)
            broken = train(replace(config, name="broken"))
            break
        except KeyboardInterrupt:
            assert not (checkpoint.parent / "metrics.json").exists()
    assert not stop_after and same(whole, broken) and whole.metrics["selection"] == broken.metrics["selection"]
    assert (whole.history.drop(columns=["seconds", "data_seconds"]) == broken.history.drop(columns=["seconds", "data_seconds"])).all(axis=None)


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_in_the_same_weights(config):
    settings = {n: asdict(replace(config, epochs=40, name=n)) for n in ("whole", "killed")}
    assert kill_and_resume("train", settings["whole"], settings["killed"]) >= 5
    whole, killed = (Path(config.runs_root) / n for n in settings)
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert RunResult.read(whole).metrics["results"] == RunResult.read(killed).metrics["results"]


def test_source_validation_keeps_whole_videos_apart(made, config):
    segments = pd.read_csv(made / "csv/segments.csv")
    held = held_out_videos(segments, 0.25)
    assert 0 < held.sum() < len(held) and not set(segments.video_id[held]) & set(segments.video_id[~held])
    run = train(replace(config, selection="source validation"))
    assert run.metrics["selection"]["epoch"] == run.history.selection_top1.idxmax() + 1


def test_zero_shot_trains_nothing(config):
    run = train(replace(config, method="zero_shot"))
    assert run.metrics["parameters"] == 0 and run.history.empty and run.metrics["results"]["csv"]["noun"]["top1"]["count"] == 20


def test_shared_and_novel_classes_of_a_target(made, config, monkeypatch):
    "Two CSV datasets stand for two others: the readers are the same for all."
    from xmic import training
    make_dataset(made / "ego4d", made / "features", "ego4d", nouns=["pan", "cup", "drill"], verbs=["take", "screw"], seed=3)
    segments, classes = training.read_segments, training.read_classes
    monkeypatch.setattr(training, "read_segments", lambda d, root, split: segments("csv", root, split))
    monkeypatch.setattr(training, "read_classes", lambda d, root, kind: classes("csv", root, kind))
    run = train(replace(config, targets=["ego4d"], labels="both", central_seconds=0.0, selection="target (as released)"))
    found = run.metrics["results"]["ego4d"]
    table = pd.read_csv(made / "ego4d/segments.csv").query("split == 'test'")
    assert found["noun"]["novel"]["count"] == (table.noun == "drill").sum()
    assert found["noun"]["shared"]["count"] == table.noun.isin(["pan", "cup"]).sum()
    assert found["noun"]["novel"]["value"] == 100.0  # one novel noun competes with itself alone
    assert set(run.metrics["harmonic_means"]["noun"]) == {"csv+ego4d", "ego4d shared+novel"}
    elsewhere = evaluate_run(EvaluateConfig(run=str(run.folder), datasets=["ego4d"], device="cpu"))
    assert elsewhere.metrics["results"]["ego4d"] == found
    assert evaluate_run(EvaluateConfig(run=str(run.folder), template="a photo of a {}", device="cpu")).folder != elsewhere.folder


def test_segments_without_features_are_counted(made, config, tmp_path):
    import shutil
    shutil.copytree(made, tmp_path / "copy")
    table = pd.read_csv(tmp_path / "copy/csv/segments.csv")
    extra = table.tail(3).assign(segment_id=["x", "y", "z"], video_id="other", split="test")
    pd.concat([table, extra]).to_csv(tmp_path / "copy/csv/segments.csv", index=False)
    run = train(replace(config, data_root=str(tmp_path / "copy/csv"), features_root=str(tmp_path / "copy/features")))
    assert run.metrics["segments"]["csv"] == dict(segments=23, with_features=20, missing=3)


def test_no_features_at_all_says_what_to_run(config, tmp_path):
    with pytest.raises(DataError, match="run nbs/extract.ipynb"):
        train(replace(config, features_root=str(tmp_path / "nothing")))


@pytest.mark.parametrize("changes, message", [
    (dict(dataset="epci"), "did you mean 'epic'"), (dict(labels="nouns"), "labels='nouns'"), (dict(recipe="papier"), "did you mean 'paper'"),
    (dict(context_views=[]), "context_views is empty"), (dict(context_views=["foot"]), "'foot' is neither"),
    (dict(warmup_epochs=4), "leaves none of the 4 epochs"), (dict(targets=["csv"]), "always evaluated"),
    (dict(selection="target (as released)"), "needs a target"), (dict(template="photo"), "must contain {}"),
    (dict(double_shift=True), "takes no part"), (dict(frames=0), "frames=0"), (dict(lr=-1.0), "lr=-1.0"),
    (dict(method="zero_shot", context_encoder="x"), "no conditioning stream"), (dict(encoder="dinov2_vitl14"), "has no text tower"),
    (dict(encoder="mini-dino"), "name a CLIP there"), (dict(resize="stretch"), "'as trained'")])
def test_contradicting_settings_are_refused_before_any_work(config, changes, message):
    with pytest.raises(DataError) as e:
        train(replace(config, **changes))
    assert message in str(e.value) and not Path(config.runs_root).exists()


def test_all_faults_are_listed_at_once(config):
    with pytest.raises(DataError) as e:
        resolve(replace(config, dataset="epci", labels="y", frames=0))
    assert all(part in str(e.value) for part in ("dataset='epci'", "labels='y'", "frames=0"))


def test_recipes_differ_and_can_be_mixed():
    release, paper = (resolve(TrainConfig(recipe=r)) for r in ("release", "paper"))
    assert (release.lr, release.betas, release.scale, release.post_mlp, release.classified_view, release.central_seconds) == (5e-4, [0.9, 0.98], 2.0, True, "hand", 4.0)
    assert (paper.lr, paper.betas, paper.scale, paper.post_mlp, paper.classified_view, paper.central_seconds) == (1e-6, [0.9, 0.999], 1.0, False, "full", 0.0)
    assert resolve(TrainConfig(recipe="paper", lr=5e-4)).lr == 5e-4
    assert run_name(release) != run_name(paper) != run_name(resolve(TrainConfig(recipe="paper", lr=5e-4)))


def test_a_folder_with_another_run_is_refused(config):
    train(replace(config, name="mine"))
    with pytest.raises(DataError, match="batch_size: 8, now 16"):
        train(replace(config, name="mine", batch_size=16))


def test_a_loss_that_is_not_finite_stops_the_run(config):
    with pytest.raises(DataError, match="lower lr"):
        train(replace(config, lr=1e30, warmup_epochs=0))


def test_every_switch_trains(config):
    for changes in (dict(post_mlp=False, scale=1.0), dict(merge="concat", positions="as released"), dict(pool="max"), dict(context_views=["full"]),
                    dict(context_views=["hand"], classified_view="full"), dict(norm_input=False, norm_vector=True, norm_text=True), dict(recipe="paper", warmup_epochs=0),
                    dict(precision="bf16"), dict(train_scale=True), dict(normalize_frames=True), dict(context_encoder=register_tiny(), context_weights="random")):
        run = train(replace(config, epochs=2, **changes))
        assert np.isfinite(run.history.loss).all()


# Methods that learn prompts

PROMPTED = {  # at a size that the tiny text tower of 16 tokens can read
    "coop": dict(method="coop", prompt_length=4, optimizer="adamw", betas=[0.9, 0.999], lr=0.03), "cocoop": dict(method="cocoop", lr=0.1),
    "a5": dict(method="a5", prompt_length=3, heads=2, temporal_layers=1, lr=3e-3)}
prompted = pytest.mark.parametrize("settings", PROMPTED.values(), ids=PROMPTED)


@prompted
def test_prompts_learn_and_are_all_that_is_saved(config, settings):
    run = train(replace(config, epochs=20, **settings))
    assert run.history.loss.iloc[-1] < 0.9 * run.history.loss.iloc[0]
    assert run.metrics["parameters"] == {"coop": 4 * 32, "cocoop": 4 * 32 + 32 * 2 + 2 + 2 * 32 + 32, "a5": (16 + 16) * 32 + 12 * 32 * 32 + 13 * 32}[run.config.method]
    frozen = 0 if run.config.method == "a5" else 1  # the logit scale
    assert sum(w.numel() for w in weights(run).values()) == run.metrics["parameters"] + frozen
    assert run.metrics["results"]["csv"]["noun"]["top1"]["count"] == 20


@prompted
@pytest.mark.parametrize("more", [dict(), dict(labels="both", class_subsample=3, micro_batch=3, selection="source validation", validation_fraction=0.3)], ids=["plain", "all switches"])
def test_prompts_interrupted_go_on_to_the_same_weights(config, settings, more, monkeypatch):
    config = replace(config, **settings, **more)
    whole, broken = train(replace(config, name="whole")), interrupted(replace(config, name="broken"), monkeypatch, 1, 3)
    assert same(whole, broken) and whole.metrics["results"] == broken.metrics["results"]
    assert same(whole, train(replace(config, name="again"))) and not same(whole, train(replace(config, name="other", seed=1)))


@prompted
def test_prompts_are_said_around_the_names_of_a_target(made, config, settings, monkeypatch):
    from xmic import training
    make_dataset(made / "ego4d", made / "features", "ego4d", nouns=["pan", "cup", "cordless drill"], verbs=["take", "screw"], seed=3)
    segments, classes = training.read_segments, training.read_classes
    monkeypatch.setattr(training, "read_segments", lambda d, root, split: segments("csv", root, split))
    monkeypatch.setattr(training, "read_classes", lambda d, root, kind: classes("csv", root, kind))
    run = train(replace(config, targets=["ego4d"], central_seconds=0.0, **settings))
    assert run.metrics["results"]["ego4d"]["noun"]["novel"]["count"] > 0
    elsewhere = evaluate_run(EvaluateConfig(run=str(run.folder), datasets=["ego4d"], device="cpu"))
    assert elsewhere.metrics["results"] == run.metrics["results"]
    with pytest.raises(DataError, match="leave it at '{}'"):
        evaluate_run(EvaluateConfig(run=str(run.folder), template="a photo of a {}", device="cpu"))


@prompted
def test_prompts_train_in_parts_and_in_bf16(config, settings):
    whole, parts = (train(replace(config, name=n, micro_batch=m, **settings)) for n, m in (("whole", 0), ("parts", 3)))
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], weight, rtol=1e-2, atol=1e-3, msg=name)
    assert np.allclose(whole.history.loss, parts.history.loss, rtol=1e-3)
    mixed = train(replace(config, precision="bf16", text_memory=1e-6, **settings))
    assert np.isfinite(mixed.history.loss).all() and all(w.dtype == torch.float32 for w in weights(mixed).values())


def test_prompts_of_single_classes_serve_the_source(made, config):
    run = train(replace(config, labels="both", **PROMPTED["coop"], prompt_per_class=True))
    assert weights(run)["prompts.vectors"].shape == (7, 4, 32)
    assert evaluate_run(EvaluateConfig(run=str(run.folder), device="cpu")).metrics["results"] == run.metrics["results"]


def test_every_layout_of_coop_trains(config):
    for changes in (dict(prompt_position="front"), dict(prompt_position="middle"), dict(prompt_init="a photo of a"), dict(prompt_period=False, train_logit_scale=True),
                    dict(optimizer="sgd", schedule="constant"), dict(normalize_frames=True)):
        run = train(replace(config, **{**PROMPTED["coop"], "prompt_length": None if "prompt_init" in changes else 4, "epochs": 2, **changes}))
        assert np.isfinite(run.history.loss).all()


def test_subsampled_classes_hold_those_of_the_batch():
    rng = np.random.default_rng(0)
    for size in (1, 5, 40, 100, 300):
        given = rng.integers(0, 100, 16)
        chosen = subsample(given, 100, size, rng)
        assert set(given) <= set(chosen) and len(chosen) == min(100, max(size, len(set(given)))) and (np.diff(chosen) > 0).all()
        assert (chosen[np.searchsorted(chosen, given)] == given).all()


def test_baselines_are_trained_as_they_were_published():
    for method in ("coop", "cocoop"):
        for recipe in ("release", "paper"):
            c = resolve(TrainConfig(method=method, recipe=recipe))
            assert (c.optimizer, c.momentum, c.lr, c.schedule, c.warmup_epochs, c.warmup_lr, c.weight_decay) == ("sgd", 0.9, 2e-3, "cosine", 1, 1e-5, 5e-4)
            assert c.train_logit_scale is False and c.classified_view == resolve(TrainConfig(recipe=recipe)).classified_view
    assert resolve(TrainConfig(method="cocoop")).prompt_init == "a photo of a" and resolve(TrainConfig(method="coop", lr=0.1)).lr == 0.1
    c = resolve(TrainConfig(method="a5"))
    assert (c.optimizer, c.lr, c.schedule, c.warmup_epochs, c.weight_decay, c.heads, c.temporal_layers, c.temperature) == ("adamw", 1e-4, "constant", 0, 0.01, 8, 2, 0.07)
    c = resolve(TrainConfig())
    assert (c.optimizer, c.schedule, c.warmup_lr, c.weight_decay, c.heads) == ("adamw", "constant", 1e-7, 0.01, 4)


@pytest.mark.parametrize("changes, message", [
    (dict(method="coop", template="a photo of a {}"), "leave it at '{}'"), (dict(method="coop", prompt_per_class=True, targets=["ego4d"]), "say nothing of those of ego4d"),
    (dict(prompt_length=4), "xmic learns no prompts"), (dict(method="a5", prompt_init="a photo of a"), "start at random"), (dict(method="cocoop", prompt_position="front"), "of coop alone"),
    (dict(method="coop", prompt_length=0), "prompt_length=0"), (dict(method="coop", prompt_position="back"), "prompt_position='back'"), (dict(optimizer="adam"), "did you mean 'adamw'"),
    (dict(method="a5", context_encoder="x"), "no conditioning stream"), (dict(class_subsample=-1), "class_subsample=-1"), (dict(method="cop"), "did you mean 'coop'"),
    (dict(adapter_branches="video"), "adapter_branches='video'"), (dict(adapter_ratio=1.2), "must be between 0 and 1"), (dict(method="clip_adapter_temporal", temporal_layers=0), "is clip_adapter")])
def test_contradicting_settings_of_baselines_are_refused_before_any_work(config, changes, message):
    with pytest.raises(DataError) as e:
        train(replace(config, **changes))
    assert message in str(e.value) and not Path(config.runs_root).exists()


def test_words_and_length_that_disagree_are_refused(config):
    with pytest.raises(DataError, match="4 tokens, but 5"):
        train(replace(config, method="cocoop", prompt_length=5))


@prompted
def test_a_recognizer_takes_learned_prompts(config, settings, tmp_path):
    run = train(replace(config, labels="both", epochs=2, **settings))
    recognizer = Recognizer.from_pretrained(run.folder, device="cpu")
    recognizer.save_pretrained(tmp_path / "saved")
    again = Recognizer.from_pretrained(tmp_path / "saved", device="cpu")
    batch, classes = Batch(torch.randn(2, 16, 32)), ClassEmbeddings(("drill", "screw driver"), torch.zeros(2, 32))
    with torch.no_grad():
        answers = [r.methods[kind](batch, classes) for r in (recognizer, again) for kind in ("noun", "verb")]
    assert all(torch.equal(a, answers[0]) for a in answers) and answers[0].shape == (2, 2)


# CLIP-Adapter

@pytest.mark.parametrize("method", ["clip_adapter", "clip_adapter_temporal"])
def test_feature_adapters_train_resume_and_meet_a_target(made, config, method, monkeypatch):
    config = replace(config, method=method, lr=0.1 if method == "clip_adapter" else 3e-3, epochs=8)
    run = train(replace(config, name="whole"))
    assert run.history.loss.iloc[-1] < 0.9 * run.history.loss.iloc[0]
    assert run.metrics["parameters"] == 2 * 2 * 32 * 8 + (method == "clip_adapter_temporal") * (2 * (4 * 32 * 32 + 2 * 32 * 8 + 8 + 9 * 32) + 16 * 32)
    assert same(run, interrupted(replace(config, name="broken"), monkeypatch, 5))
    elsewhere = evaluate_run(EvaluateConfig(run=str(run.folder), template="a photo of a {}", device="cpu"))
    assert elsewhere.metrics["results"]["csv"]["noun"]["top1"]["count"] == 20
    c = resolve(TrainConfig(method=method))
    assert (c.optimizer, c.lr, c.train_logit_scale) == (("sgd", 2e-3, False) if method == "clip_adapter" else ("adamw", 5e-4, False))


def test_accuracies_and_their_intervals():
    logits, labels = torch.tensor([[3., 1, 2], [0, 2, 1], [5, 4, 1], [1, 2, 9]]), torch.tensor([0, 2, 1, 2])
    assert top1(logits, labels) == 50 and restricted_top1(logits, labels, torch.tensor([1, 2])) == pytest.approx(200 / 3)
    assert np.isnan(top1(logits[:0], labels[:0]))
    rng = np.random.default_rng(0)
    right = np.arange(2422) < 500
    found = accuracy(right, rng, 20000)
    draws = rng.choice(right, (4000, len(right))).mean(1) * 100  # the bootstrap, literally
    assert found["low"] == pytest.approx(np.quantile(draws, 0.025), abs=0.1) and found["high"] == pytest.approx(np.quantile(draws, 0.975), abs=0.1)
    per_class = mean_per_class(np.array([True, False, True]), np.array([0, 0, 7]), rng)
    assert per_class["value"] == 75.0 and per_class["classes"] == 2
    assert accuracy(right[:0], rng)["value"] is None


# Vita-CLIP, from pixels to metrics

@pytest.fixture(scope="module")
def filmed(tmp_path_factory) -> Path:
    from xmic.features import ExtractConfig
    from xmic.frames import store_dataset
    folder = tmp_path_factory.mktemp("filmed")
    segments = pd.read_csv(write_world(folder / "csv") / "segments.csv")
    segments.assign(split=np.where(segments.video_id.isin(["v0", "v1", "v2"]), "test", "train")).to_csv(folder / "csv/segments.csv", index=False)
    store_dataset(ExtractConfig(dataset="csv", data_root=str(folder / "csv"), features_root=str(folder / "features"), encoder=register_tiny(),
                                weights="random", workers=0, progress=False), "hand")
    return folder


def test_vita_clip_trains_resumes_and_is_recognised_with(filmed, tmp_path, monkeypatch):
    config = TrainConfig(dataset="csv", data_root=str(filmed / "csv"), features_root=str(filmed / "features"), encoder=register_tiny(),
                         weights="random", runs_root=str(tmp_path / "runs"), device="cpu", epochs=20, batch_size=5, micro_batch=2, frames=4, lr=3e-2,
                         crop_scale=0.5, flip=True, method="vita_clip", progress=False)
    run = train(replace(config, name="whole"))
    assert run.history.loss.iloc[-3:].mean() < 0.8 * run.history.loss.iloc[0] and run.metrics["results"]["csv"]["noun"]["top1"]["count"] == 6
    assert run.metrics["parameters"] == sum(v.numel() for k, v in weights(run).items() if "cls_proj" not in k)
    assert same(run, interrupted(replace(config, name="broken"), monkeypatch, 7))
    answer = Recognizer.from_pretrained(run.folder, "cpu").predict(filmed / "csv/videos/v0.mp4", nouns=["pan", "knife", "spoon"])
    assert set(answer.nouns.name) == {"pan", "knife", "spoon"} and not np.allclose(answer.nouns.score, answer.nouns.zero_shot)


def test_the_adapter_reads_a_dino_of_another_width(filmed, tmp_path, monkeypatch):
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=2, embed_dim=48, num_heads=3))
    for encoder in (register_tiny(), "dinov2_vits14"):
        extract_dataset(extract_config(filmed / "csv", tmp_path / "features", encoder=encoder, feature_fps=5.0))
    config = TrainConfig(dataset="csv", data_root=str(filmed / "csv"), features_root=str(tmp_path / "features"), runs_root=str(tmp_path / "runs"),
                         encoder=register_tiny(), weights="random", context_encoder="dinov2_vits14", context_weights="random", device="cpu",
                         frames=4, epochs=30, warmup_epochs=1, batch_size=5, lr=3e-3, post_mlp=False, progress=False)
    run = train(config)
    assert run.history.loss.iloc[-3:].mean() < 0.7 * run.history.loss.iloc[0]
    assert sorted({m["dim"] for m in run.metrics["features"]["csv"].values()}) == [32, 48]
    assert sum("vit_small_patch14_dinov2-random" in name for name in run.metrics["features"]["csv"]) == 2
    again = train(replace(config, name="clip alone", context_encoder=None, context_weights=None))
    assert again.metrics["parameters"] < run.metrics["parameters"]
    answer = Recognizer.from_pretrained(run.folder, "cpu").predict(filmed / "csv/videos/v0.mp4", nouns=["pan", "knife"])
    assert set(answer.nouns.name) == {"pan", "knife"} and not np.allclose(answer.nouns.score, answer.nouns.zero_shot)


@pytest.mark.parametrize("dim, context", [(512, 512), (768, 768), (768, 1024), (512, 384), (512, 1536)])
def test_xmic_upon_larger_backbones(dim, context):
    method = build_method(resolve(TrainConfig()), dim, context, 100.0)
    batch = Batch(torch.randn(3, 16, dim), torch.randn(3, 16, 2, context))
    logits = method(batch, ClassEmbeddings(["cup"] * 5, torch.randn(5, dim)))
    logits.logsumexp(1).sum().backward()
    assert logits.shape == (3, 5) and all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_vita_clip_without_frames_says_what_to_run(filmed, tmp_path):
    config = TrainConfig(dataset="csv", data_root=str(filmed / "csv"), features_root=str(tmp_path), encoder=register_tiny(), weights="random",
                         runs_root=str(tmp_path / "runs"), device="cpu", method="vita_clip", progress=False)
    with pytest.raises(DataError, match="holds no frames"): train(config)
    with pytest.raises(DataError, match="double_shift moves the conditioning stream"): resolve(replace(config, dataset="ego4d", double_shift=True))
    with pytest.raises(DataError, match="crop_scale=0 is a share"): resolve(replace(config, crop_scale=0))
