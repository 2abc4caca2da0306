"""Accuracies, against counting by hand."""
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from xmic.encoders import ClassEmbeddings
from xmic.evaluation import (accuracy, harmonic_means, mean_per_class, predict, restrict, restricted_top1, split_logits, sum_classes, summarise,
                             top1)
from xmic.streams import Batch

LOGITS = torch.tensor([[3.0, 2.0, 1.0], [0.0, 2.0, 5.0], [4.0, 1.0, 6.0], [1.0, 2.0, 0.0]])
LABELS = torch.tensor([0, 1, 0, 1])


def test_top1_counts_in_per_cent():
    assert top1(LOGITS, LABELS) == 50.0 and top1(LOGITS[:1], LABELS[:1]) == 100.0
    assert math.isnan(top1(LOGITS[:0], LABELS[:0]))


def test_only_the_classes_of_a_subset_compete():
    assert restrict(LOGITS, torch.tensor([0, 1])).tolist() == [[3.0, 2.0, -math.inf], [0.0, 2.0, -math.inf], [4.0, 1.0, -math.inf], [1.0, 2.0, -math.inf]]
    assert restricted_top1(LOGITS, LABELS, torch.tensor([0, 1])) == 100.0
    assert restricted_top1(LOGITS, LABELS, torch.tensor([1, 2])) == 50.0  # of the two segments of class 1
    assert math.isnan(restricted_top1(LOGITS, LABELS, torch.tensor([2])))


class Given(nn.Module):
    "Logits that lie in the features; nouns and verbs side by side."

    def forward(self, batch, classes): return batch.video[:, 0, :len(classes)]


def classes(nouns: int, verbs: int) -> dict[str, ClassEmbeddings]:
    made = dict(noun=(nouns, torch.zeros(nouns, 1)), verb=(verbs, torch.ones(verbs, 1)))
    return {kind: ClassEmbeddings([f"{kind[0]}{i}" for i in range(count)], text) for kind, (count, text) in made.items()}


def test_kinds_are_put_side_by_side_and_taken_apart():
    both = sum_classes(classes(3, 2))
    assert list(both.names) == ["n0", "n1", "n2", "v0", "v1"] and both.text.flatten().tolist() == [0, 0, 0, 1, 1]
    parts = split_logits(torch.arange(10.0).view(2, 5), classes(3, 2))
    assert parts["noun"].tolist() == [[0, 1, 2], [5, 6, 7]] and parts["verb"].tolist() == [[3, 4], [8, 9]]


def test_predictions_are_lines_of_what_the_logits_say():
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(10, 9, generator=g), dict(noun=np.array([0, 1, 2, 3, 4, 5, 6, -1, 1, 6]), verb=np.array([0, 1, -1, 0, 1, 0, 1, 0, 1, 1]))
    method = Given().train()
    batches = [(np.array([4, 1, 7]), Batch(logits[[4, 1, 7]][:, None])), (np.array([0, 2, 3, 5, 6, 8, 9]), Batch(logits[[0, 2, 3, 5, 6, 8, 9]][:, None]))]
    subsets = dict(noun=dict(shared=np.array([0, 1, 2, 3]), novel=np.array([4, 5])))
    found = predict(method, batches, classes(7, 2), labels, subsets)
    assert not method.training and list(found) == ["noun", "verb"]
    nouns, verbs = logits[:, :7], logits[:, 7:]
    assert found["noun"].position.tolist() == [4, 1, 0, 2, 3, 5, 6, 8, 9] and found["verb"].position.tolist() == [4, 1, 7, 0, 3, 5, 6, 8, 9]
    for line in found["noun"].itertuples():
        own, label = nouns[line.position], labels["noun"][line.position]
        order = own.argsort(descending=True).tolist()
        assert (line.label, line.predicted, line.top5) == (label, order[0], label in order[:5])
        assert line.confidence == pytest.approx(own.softmax(0).max().item(), rel=1e-6)
        subset = "shared" if label < 4 else "novel" if label < 6 else ""
        members = dict(shared=[0, 1, 2, 3], novel=[4, 5]).get(subset)
        assert line.subset == subset and line.restricted == (max(members, key=lambda c: own[c].item()) if members else -1)
    for line in found["verb"].itertuples():
        assert (line.predicted, line.top5, line.subset, line.restricted) == (verbs[line.position].argmax().item(), True, "", -1)


def test_an_accuracy_has_the_interval_of_its_bootstrap():
    right = np.array([True] * 30 + [False] * 70)
    found = accuracy(right, np.random.default_rng(0), 200_000)
    assert (found["value"], found["count"]) == (30.0, 100)
    assert (found["low"], found["high"]) == (21.0, 39.0)  # quantiles of the binomial distribution of 100 and 0.3
    assert accuracy(np.zeros(0, bool), np.random.default_rng(0)) == dict(value=None, count=0, low=None, high=None)
    again = [accuracy(right, np.random.default_rng(5)) for _ in range(2)]
    assert again[0] == again[1]


def test_classes_count_the_same_however_many_segments_they_have():
    labels = np.array([0] * 90 + [3] * 10)
    right = np.array([True] * 90 + [True] * 5 + [False] * 5)
    found = mean_per_class(right, labels, np.random.default_rng(0), 100_000)
    assert (found["value"], found["count"], found["classes"]) == (75.0, 100, 2)
    assert (found["low"], found["high"]) == (60.0, 90.0)  # half of 0.2 and of 0.8, the quantiles of ten draws of 0.5, and half of one
    assert mean_per_class(right[:0], labels[:0], np.random.default_rng(0)) == dict(value=None, count=0, low=None, high=None, classes=0)


def lines(label, predicted, **more) -> pd.DataFrame:
    return pd.DataFrame(dict(position=range(len(label)), label=label, predicted=predicted, top5=[True] * len(label), subset="", restricted=-1) | more)


def test_a_summary_has_every_accuracy():
    noun = lines([0, 0, 1, 2], [0, 1, 1, 0], top5=[True, True, True, False], subset=["shared", "shared", "novel", ""], restricted=[0, 0, 3, -1])
    verb = lines([1, 1, 1], [1, 0, 1], position=[0, 2, 3])
    found = summarise(dict(noun=noun, verb=verb))
    value = lambda kind, measure: (found[kind][measure]["value"], found[kind][measure]["count"])
    assert list(found) == ["noun", "verb", "action"] and set(found["noun"]) == {"top1", "top5", "mean_per_class", "shared", "novel"}
    assert value("noun", "top1") == (50.0, 4) and value("noun", "top5") == (75.0, 4) and value("noun", "mean_per_class") == (50.0, 4)
    assert value("noun", "shared") == (100.0, 2) and value("noun", "novel") == (0.0, 1)
    assert value("verb", "top1")[0] == pytest.approx(200 / 3) and set(found["verb"]) == {"top1", "top5", "mean_per_class"}
    assert found["action"]["top1"]["value"] == pytest.approx(100 / 3) and found["action"]["top1"]["count"] == 3  # segments that have both; 0 alone is right
    assert "action" not in summarise(dict(noun=noun)) and summarise(dict(noun=noun)) == summarise(dict(noun=noun), seed=0)
    many = lines([0] * 500, [0] * 200 + [1] * 300)
    assert summarise(dict(noun=many), seed=1) != summarise(dict(noun=many), seed=2)


def test_harmonic_means_pair_source_with_target_and_shared_with_novel():
    results = dict(ego4d=dict(noun=dict(top1=dict(value=60.0)), verb=dict(top1=dict(value=50.0)), action=dict(top1=dict(value=9.0))),
                   epic=dict(noun=dict(top1=dict(value=30.0), shared=dict(value=40.0), novel=dict(value=10.0)),
                             verb=dict(top1=dict(value=None), shared=dict(value=5.0))),
                   egtea=dict(noun=dict(top1=dict(value=20.0))))
    found = harmonic_means(results)
    assert found == dict(noun={"ego4d+epic": pytest.approx(40.0), "ego4d+egtea": pytest.approx(30.0), "epic shared+novel": pytest.approx(16.0)}, verb={})
