"""Runs trained in one pass against the same runs trained alone."""
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from test_training import config, made, make_dataset, same, weights  # noqa: F401
from xmic import together
from xmic.files import DataError
from xmic.together import Together, alike
from xmic.config import TrainConfig, resolve
from xmic.training import RunData, Trainer, train

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")
train_together = partial(together.train_together, stacked=True)
DIFFERENT = [dict(), dict(seed=1, lr=1e-3, betas=[0.9, 0.999], weight_decay=0.3), dict(scale=1.0, schedule="cosine", warmup_epochs=2, warmup_lr=1e-5)]


def variants(config: TrainConfig, where: str, **changes) -> list[TrainConfig]:
    return [replace(config, name=f"{where}{i}", **changes | own) for i, own in enumerate(DIFFERENT)]


def is_as_alone(run, alone) -> None:
    assert {p.name for p in run.folder.iterdir()} == {p.name for p in alone.folder.iterdir()}
    assert replace(run.config, name=None) == replace(alone.config, name=None) and run.metrics.keys() == alone.metrics.keys()
    ours, theirs = weights(run), weights(alone)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith("in_proj_bias"):  # that of the keys changes nothing: its gradient is rounding alone, which AdamW makes large
            ours[name], theirs[name] = (torch.cat([b[:len(b) // 3], b[-len(b) // 3:]]) for b in (ours[name], theirs[name]))
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5, msg=name)
    for column in ("epoch", "lr", "segments"):
        assert (run.history[column] == alone.history[column]).all()
    np.testing.assert_allclose(run.history.loss, alone.history.loss, rtol=1e-4)
    predictions = [pd.read_csv(r.folder / "predictions.csv") for r in (run, alone)]
    assert (predictions[0][["segment_id", "label"]] == predictions[1][["segment_id", "label"]]).all(axis=None)
    np.testing.assert_allclose(predictions[0].confidence, predictions[1].confidence, atol=1e-3)


@pytest.mark.parametrize("changes", [dict(), dict(labels="both", post_mlp=False), dict(context_views=["full"], merge="concat", pool="max"),
                                     dict(method="clip_adapter_temporal", lr=3e-3), dict(method="clip_adapter", optimizer="adamw", lr=0.03)],
                         ids=["xmic", "both kinds", "one view", "CLIP-Adapter*", "CLIP-Adapter"])
def test_each_run_is_what_it_is_alone(config, changes):
    if changes.get("method"):
        changes = dict(changes, betas=[0.9, 0.98])
    for run, settings in zip(train_together(variants(config, "together", **changes)), variants(config, "alone", **changes)):
        is_as_alone(run, train(settings))


def test_runs_differ_from_each_other(config):
    runs = train_together(variants(config, "run"))
    assert not any(same(a, b) for i, a in enumerate(runs) for b in runs[:i])


def stopped(configs, monkeypatch, epoch: int, saves: int) -> None:
    "Stops after this epoch, when so many of the runs have been saved."
    original, done = Trainer.save, []

    def save(self, path, *more):
        if self.epoch == epoch and len(done) == saves: raise KeyboardInterrupt
        done.extend([self] if self.epoch == epoch else [])
        original(self, path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save)
        with pytest.raises(KeyboardInterrupt): train_together(configs)


def test_killed_between_epochs_they_go_on_to_the_same_weights(config, monkeypatch):
    whole, broken = variants(config, "whole"), variants(config, "broken")
    stopped(broken, monkeypatch, 3, 0)
    assert all(torch.load(Path(config.runs_root) / c.name / "checkpoint.pt", weights_only=True)["epoch"] == 2 for c in broken)
    assert all(same(a, b) for a, b in zip(train_together(whole), train_together(broken)))


def test_killed_while_some_were_saved_the_others_come_up_to_them(config, monkeypatch):
    broken = variants(config, "broken")
    stopped(broken, monkeypatch, 2, 2)
    for run, settings in zip(train_together(broken), variants(config, "alone")):
        is_as_alone(run, train(settings))


def test_a_checkpoint_holds_one_run(config, monkeypatch):
    broken = variants(config, "broken")
    stopped(broken, monkeypatch, 3, 0)
    with monkeypatch.context() as patch:
        patch.setattr(together, "alike", lambda configs: [[c] for c in configs])
        stopped(alone := variants(config, "alone")[:1], monkeypatch, 3, 0)
    sizes = [(Path(config.runs_root) / c.name / "checkpoint.pt").stat().st_size for c in (broken[0], alone[0])]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_finished_runs_are_left_as_they_are(config, monkeypatch):
    runs = variants(config, "run")
    first = train(runs[0])
    changed = (first.folder / "metrics.json").stat().st_mtime_ns
    counts, original = [], Together.__init__
    monkeypatch.setattr(Together, "__init__", lambda self, trainers: counts.append(len(trainers)) or original(self, trainers))
    assert train_together(runs)[0].metrics == first.metrics and (first.folder / "metrics.json").stat().st_mtime_ns == changed
    train_together(runs)
    assert counts == [len(runs) - 1]


def test_what_cannot_be_stacked_is_trained_alone(config, monkeypatch):
    monkeypatch.setattr(Together, "__init__", None)
    for changes in (dict(resident=False), dict(selection="source validation", validation_fraction=0.3), dict(method="zero_shot")):
        configs = [replace(config, seed=s, **changes) for s in (0, 1)]
        assert all((run.folder / "metrics.json").exists() for run in train_together(configs))


def test_on_a_cpu_runs_follow_each_other_and_read_once(config, monkeypatch):
    monkeypatch.setattr(Together, "__init__", None)
    configs, read, original = variants(config, "run"), [], together.RunData.split
    monkeypatch.setattr(together.RunData, "split", lambda self, *which: read.append(which) or original(self, *which))
    assert all(same(run, train(alone)) for run, alone in zip(together.train_together(configs), variants(config, "alone")))
    assert len(read) == 2 + 2 * len(configs)  # train and test: once for the group, and once for each alone


def test_groups_share_data_and_shapes(config):
    c = resolve(config)
    assert [len(g) for g in alike([c, replace(c, seed=3), replace(c, frames=8), replace(c, labels="verb"), replace(c, scale=1.0)])] == [3, 1, 1]


def test_two_runs_of_one_folder_are_refused(config):
    with pytest.raises(DataError, match="two runs of one folder"):
        train_together([config, config])
    assert not Path(config.runs_root).exists()


# On a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
def test_a_recorded_step_trains_as_a_step_by_itself(config, monkeypatch):
    config = replace(config, device="cuda", precision="fp32")
    recorded = train(replace(config, name="recorded")), *train_together(variants(config, "recorded"))
    monkeypatch.setenv("XMIC_CUDA_GRAPHS", "0")
    for run, settings in zip(recorded, [replace(config, name="alone"), *variants(config, "alone")]):
        is_as_alone(run, train(settings))


@gpu
@pytest.mark.parametrize("runs", [1, 3])
def test_nothing_in_an_epoch_waits_for_the_device(config, runs):
    config = resolve(replace(config, device="cuda"))
    data = RunData(config, torch.device("cuda"))
    trainers = [Trainer(config, data.method(), data.text["csv"], data.split("csv", "train"), data.device, graph=False) for _ in range(runs)]
    stacked = Together(trainers) if runs > 1 else None
    given = [t.epoch_given(*t.begin_epoch()) for t in trainers]
    steps = stacked.steps if stacked else trainers[0].device_steps
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps.run({k: torch.stack([g[k] for g in given], 1) for k in given[0]} if stacked else given[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_a_step_is_recorded(config):
    config = resolve(replace(config, device="cuda"))
    data = RunData(config, torch.device("cuda"))
    trainer = Trainer(config, data.method(), data.text["csv"], data.split("csv", "train"), data.device)
    trainer.run_epoch()
    assert trainer.device_steps.recorded is not None
