"""EPIC's challenge: files as published, refused where they would be refused, scored as published, and made from finished runs."""
import json
from dataclasses import replace
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from test_segments import epic_files, link
from test_training import NOUNS, VERBS, make_dataset
from world import register_tiny
from xmic.challenge import (Scores, challenge_measures, join_scores, read_submission, score_submission, scores_of_run, submission_of_runs,
                            top_actions, validation_truth, write_submission)
from xmic.files import DataError
from xmic.config import TrainConfig
from xmic.training import RunResult, train

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")
V, M, N = 12, 15, 30
IDS = [f"P{1 + n % 3:02d}_01_{n}" for n in range(N)]


@pytest.fixture
def scores() -> Scores:
    rng = np.random.default_rng(0)
    return Scores(IDS, dict(verb=rng.normal(size=(N, V)).astype(np.float32), noun=rng.normal(size=(N, M)).astype(np.float32)))


# actions

def slow_actions(verb: np.ndarray, noun: np.ndarray, top: int) -> dict[tuple[int, int], float]:
    "All products of one segment, sorted."
    def chances(x):
        best = sorted(range(len(x)), key=lambda i: -x[i])[:top]
        e = {i: np.exp(float(x[i]) - float(max(x))) for i in best}
        return {i: v / sum(e.values()) for i, v in e.items()}
    v, n = chances(verb), chances(noun)
    pairs = sorted(((a * b, i, j) for i, a in v.items() for j, b in n.items()), key=lambda t: -t[0])[:top]
    return {(i, j): p for p, i, j in pairs}


@pytest.mark.parametrize("shape", [(97, 300, 100), (14, 40, 100), (3, 5, 100), (120, 7, 100), (5, 5, 3)])
def test_the_likeliest_actions_are_those_of_all_products(shape):
    rng = np.random.default_rng(0)
    verb, noun = rng.normal(size=(4, shape[0])) * 3, rng.normal(size=(4, shape[1])) * 3
    pairs, chance = top_actions(verb, noun, shape[2])
    for row in range(4):
        wanted = slow_actions(verb[row], noun[row], shape[2])
        assert len(wanted) == min(shape[2], shape[0] * shape[1]) == pairs.shape[1]
        assert [tuple(p) for p in pairs[row].tolist()] == list(wanted) and np.allclose(chance[row], list(wanted.values()))


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float64, (2, 9), elements=st.integers(-2, 2).map(float)), hnp.arrays(np.float64, (2, 11), elements=st.integers(-2, 2).map(float)))
def test_ties_do_not_lose_an_action(verb, noun):
    pairs, chance = top_actions(verb, noun, 20)
    for row in range(2):
        assert len({tuple(p) for p in pairs[row].tolist()}) == 20
        assert np.allclose(sorted(chance[row]), sorted(slow_actions(verb[row], noun[row], 20).values())) and (np.diff(chance[row]) <= 1e-12).all()


# files

def test_the_file_is_the_published_one(scores, tmp_path):
    path = write_submission(tmp_path / "own" / "submission.zip", scores, (5, 3, 2))
    with ZipFile(path) as archive:
        assert archive.namelist() == ["test.json"] and archive.infolist()[0].compress_type == ZIP_DEFLATED
        content = json.loads(archive.read("test.json"))
    assert {k: v for k, v in content.items() if k != "results"} == dict(version="0.2", challenge="action_recognition", sls_pt=5, sls_tl=3, sls_td=2)
    assert list(content["results"]) == IDS
    for row, entry in enumerate(content["results"].values()):
        assert list(entry) == ["verb", "noun", "action"]
        assert list(entry["verb"]) == [str(i) for i in range(V)] and list(entry["noun"]) == [str(i) for i in range(M)]
        assert [np.float32(v) for v in entry["noun"].values()] == list(scores.scores["noun"][row])
        wanted = slow_actions(scores.scores["verb"][row], scores.scores["noun"][row], 100)
        assert [tuple(map(int, key.split(","))) for key in entry["action"]] == list(wanted)
        assert np.allclose(list(entry["action"].values()), list(wanted.values()))
    assert path.read_bytes() == write_submission(tmp_path / "again.zip", scores, (5, 3, 2)).read_bytes()


def test_a_submission_overwrites_nothing_unasked(scores, tmp_path):
    path = tmp_path / "submission.zip"
    path.write_text("mine")
    with pytest.raises(DataError, match="exists already.*overwrite=True"): write_submission(path, scores, (5, 3, 2))
    assert path.read_text() == "mine"
    assert write_submission(path, scores, (5, 3, 2), overwrite=True).stat().st_size > 100
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "predictions.csv").write_text("a run's")
    with pytest.raises(DataError, match="is an input"):
        submission_of_runs(tmp_path / "run" / "predictions.csv", tmp_path / "run", tmp_path / "run", (5, 3, 2), overwrite=True)


@pytest.mark.parametrize("actions", [True, False])
def test_what_was_written_is_read(scores, tmp_path, actions):
    path = write_submission(tmp_path / "s.zip", scores, (0, 1, 2), actions)
    backwards = IDS[::-1]
    read = read_submission(path, backwards, V, M)
    assert read.supervision == (0, 1, 2) and read.scores.segment_ids == backwards
    for kind in ("verb", "noun"):
        assert (read.scores.scores[kind].astype(np.float32) == scores.scores[kind][::-1]).all()
    pairs, chance = top_actions(scores.scores["verb"], scores.scores["noun"])
    assert (read.pairs == pairs[::-1]).all() and np.allclose(read.chance, chance[::-1], atol=1e-7)
    with ZipFile(path) as archive:
        (tmp_path / "test.json").write_bytes(archive.read("test.json"))
    assert (read_submission(tmp_path / "test.json", IDS, V, M).pairs == pairs).all()


def change(*keys, to=None, drop=False):
    def do(content):
        *way, last = keys
        for key in way:
            content = content[key]
        if drop: del content[last]
        else: content[last] = to
    return do


FAULTS = [
    (change("version", to="0.1"), "version must be '0.2', not '0.1'"),
    (change("challenge", to="action_anticipation"), "challenge must be 'action_recognition'"),
    (change("sls_td", drop=True), "sls_td must be a whole number from 0 to 5, not None"),
    (change("sls_pt", to=6), "sls_pt must be a whole number from 0 to 5, not 6"),
    (change("sls_pt", to=True), "sls_pt must be a whole number"),
    (change("results", drop=True), "results must be an object"),
    (change("results", IDS[4], drop=True), f"segments are missing (1 row):\n  {IDS[4]}"),
    (change("results", "P99_01_0", to={}), "segments are unknown (1 row):\n  P99_01_0"),
    (change("results", IDS[4], to=[]), f"{IDS[4]}: it must be an object"),
    (change("results", IDS[0], to=3), f"{IDS[0]}: it must be an object"),
    (change("results", IDS[4], "verb", drop=True), f"{IDS[4]}: no verb scores"),
    (change("results", IDS[4], "noun", "14", drop=True), f'{IDS[4]}: noun has 14 scores; there must be 15, from "0" to "14"'),
    (change("results", IDS[4], "noun", "15", to=0.5), "noun has 16 scores"),
    (change("results", IDS[4], "verb", "3", to=float("nan")), f"{IDS[4]}: verb '3' has the score nan"),
    (change("results", IDS[4], "verb", "3", to=float("inf")), "verb '3' has the score inf"),
    (change("results", IDS[4], "verb", "3", to="0.5"), "verb '3' has the score '0.5'"),
    (change("results", IDS[4], "verb", "3", to=None), "verb '3' has the score None"),
    (change("results", IDS[4], "verb", "3", to=10**400), "verb '3' has the score 1000"),
    (change("results", IDS[4], "action", drop=True), f"{IDS[4]}: actions must be there for all segments or for none"),
    (change("results", IDS[4], "action", "0,15", to=0.1), "101 actions; there must be 100"),
    (change("results", IDS[4], "action", to=[1]), "no actions; there must be 100")]


@pytest.mark.parametrize("fault, message", FAULTS, ids=[m[:30] for _, m in FAULTS])
def test_what_the_challenge_would_refuse_is_refused(scores, tmp_path, fault, message):
    with ZipFile(write_submission(tmp_path / "s.zip", scores, (5, 3, 2))) as archive:
        content = json.loads(archive.read("test.json"))
    fault(content)
    (tmp_path / "test.json").write_text(json.dumps(content))
    with pytest.raises(DataError) as e:
        read_submission(tmp_path / "test.json", IDS, V, M)
    assert message in str(e.value) and str(tmp_path / "test.json") in str(e.value)


@pytest.mark.parametrize("key", ["12,0", "0,15", "a,b", "1", "01,2", "1,2,3", "-1,2", "1, 2"])
def test_names_that_are_no_action_are_refused(scores, tmp_path, key):
    with ZipFile(write_submission(tmp_path / "s.zip", scores, (5, 3, 2))) as archive:
        content = json.loads(archive.read("test.json"))
    actions = content["results"][IDS[7]]["action"]
    actions.pop(next(iter(actions)))
    actions[key] = 0.5
    (tmp_path / "test.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="is no action"):
        read_submission(tmp_path / "test.json", IDS, V, M)


def test_damaged_files_are_refused(scores, tmp_path):
    path = write_submission(tmp_path / "s.zip", scores, (5, 3, 2))
    data = path.read_bytes()
    with ZipFile(path) as archive:
        text = archive.read("test.json").decode()
    with ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("results.json", text)
    (tmp_path / "cut.zip").write_bytes(data[:len(data) // 2])
    (tmp_path / "cut.json").write_text(text[:len(text) // 2])
    (tmp_path / "twice.json").write_text(text.replace(f'"{IDS[1]}"', f'"{IDS[0]}"', 1))
    for name, message in (("cut.zip", "cut short or damaged"), ("cut.json", "cut short or damaged"), ("other.zip", "no test.json in it"),
                          ("absent.zip", "cannot be read"), ("twice.json", f"'{IDS[0]}' stands twice")):
        with pytest.raises(DataError, match=message):
            read_submission(tmp_path / name, IDS, V, M)


@pytest.mark.parametrize("fault, message", [
    (lambda s: Scores(s.segment_ids, dict(s.scores, verb=np.where(np.arange(N)[:, None] == 3, np.nan, s.scores["verb"]))),
     f"verb is not finite (1 row):\n  {IDS[3]}"),
    (lambda s: Scores(s.segment_ids[1:], s.scores), "for 29 segments it must be (29, classes)"),
    (lambda s: Scores([IDS[0], *IDS[:-1]], s.scores), "a segment stands twice"),
    (lambda s: write_submission("never.zip", replace(s, scores=dict(verb=s.scores["verb"])), (5, 3, 2)), "no score of a noun"),
    (lambda s: write_submission("never.zip", s, (5, 3, 7)), "sls_td must be a whole number from 0 to 5, not 7"),
    (lambda s: s.of([*IDS, "P50_01_0"]), "segments without scores (1 row):\n  P50_01_0"),
    (lambda s: join_scores(s, s.of(IDS[1:])), f"scores of one kind alone (1 row):\n  {IDS[0]}"),
    (lambda s: join_scores(replace(s, scores=dict(verb=s.scores["verb"])), s), "there are no noun scores")])
def test_scores_that_cannot_be_submitted_are_refused(scores, fault, message):
    with pytest.raises(DataError) as e:
        fault(scores)
    assert message in str(e.value)


# measures

@pytest.mark.slow
def test_the_published_measures_on_the_real_lists(shared_data, tmp_path):
    "A file for all 9,668 real segments, against counting in the official tables."
    link(tmp_path / "epic", epic_files(shared_data))
    folder = shared_data / "epic_kitchens_100_annotations"
    official = pd.read_csv(folder / "EPIC_100_validation.csv")
    rng = np.random.default_rng(0)
    made = {kind: rng.normal(size=(len(official), n)).astype(np.float32) for kind, n in (("verb", 97), ("noun", 300))}
    for kind in made:  # nouns are easier than verbs, and both easier for participants that were seen
        sure = rng.random(len(official)) * np.where(official.participant_id == "P18", 3, 6)
        made[kind][np.arange(len(official)), official[f"{kind}_class"]] += sure
    shuffled = rng.permutation(len(official))
    path = write_submission(tmp_path / "s.zip", Scores(official.narration_id.iloc[shuffled].tolist(), {k: v[shuffled] for k, v in made.items()}), (5, 3, 3))
    found = score_submission(path, tmp_path / "epic").set_index("measure")
    hits = {}
    for kind in made:
        order = [np.argsort(-row)[:5].tolist() for row in made[kind]]
        hits[kind] = [best[0] == label for best, label in zip(order, official[f"{kind}_class"])]
        hits[f"{kind}5"] = [label in best for best, label in zip(order, official[f"{kind}_class"])]
    hits["action"] = np.array(hits["verb"]) & np.array(hits["noun"])  # the best action is the best verb with the best noun
    unseen = official.participant_id.isin(pd.read_csv(folder / "EPIC_100_unseen_participant_ids_validation.csv").participant_id).to_numpy()
    tail = {kind: official[f"{kind}_class"].isin(pd.read_csv(folder / f"EPIC_100_tail_{kind}s.csv")[kind]).to_numpy() for kind in made}
    tail["action"] = tail["verb"] | tail["noun"]
    for kind in ("verb", "noun", "action"):
        hit = np.array(hits[kind])
        assert found.loc[f"all_{kind}_accuracy_at_1", "value"] == pytest.approx(100 * hit.mean())
        assert found.loc[f"unseen_{kind}_accuracy_at_1", "value"] == pytest.approx(100 * hit[unseen].mean())
        assert found.loc[f"tail_{kind}_accuracy_at_1", "value"] == pytest.approx(100 * hit[tail[kind]].mean())
        assert found.loc[f"tail_{kind}_accuracy_at_1", "count"] == tail[kind].sum()
    for kind in made:
        assert found.loc[f"all_{kind}_accuracy_at_5", "value"] == pytest.approx(100 * np.mean(hits[f"{kind}5"]))
    assert found.loc["all_action_accuracy_at_1", "value"] < found.loc["all_action_accuracy_at_5", "value"] < found.loc["all_verb_accuracy_at_5", "value"]
    assert found.loc["unseen_verb_accuracy_at_1", "count"] == 1065 and len(found) == 12


def test_top_five_actions_by_hand():
    rng = np.random.default_rng(0)
    verb, noun = rng.normal(size=(200, V)), rng.normal(size=(200, M))
    truth = pd.DataFrame(dict(verb=rng.integers(V, size=200), noun=rng.integers(M, size=200), unseen=False, tail_verb=False, tail_noun=False))
    found = challenge_measures(verb, noun, *top_actions(verb, noun), truth).set_index("measure")
    hits = [(v, n) in list(slow_actions(a, b, 100))[:5] for a, b, v, n in zip(verb, noun, truth.verb, truth.noun)]
    assert 0 < np.mean(hits) and found.loc["all_action_accuracy_at_5", "value"] == pytest.approx(100 * np.mean(hits))
    assert found.loc["unseen_verb_accuracy_at_1", "count"] == 0 and np.isnan(found.loc["tail_action_accuracy_at_1", "value"])


def test_of_equal_scores_the_first_class_wins():
    truth = pd.DataFrame(dict(verb=[0, 1], noun=[0, 0], unseen=[True, True], tail_verb=[False, True], tail_noun=[False, False]))
    verb, noun = np.zeros((2, 3)), np.zeros((2, 2))
    found = challenge_measures(verb, noun, *top_actions(verb, noun), truth).set_index("measure").value
    assert found["all_verb_accuracy_at_1"] == 50 and found["all_action_accuracy_at_1"] == 50 and found["tail_verb_accuracy_at_1"] == 0


def test_without_the_official_lists_there_is_no_scoring(shared_data, tmp_path):
    files = {name: path for name, path in epic_files(shared_data).items() if "tail_nouns" not in name}
    with pytest.raises(DataError, match="no EPIC_100_tail_nouns.csv"):
        validation_truth(link(tmp_path / "epic", files))


# from runs

@pytest.fixture(scope="module")
def epic(tmp_path_factory):
    "A dataset of generated features, as EPIC's files have it."
    folder = tmp_path_factory.mktemp("challenge")
    root = make_dataset(folder / "epic", folder / "features", "epic", videos=12)
    table = pd.read_csv(root / "segments.csv")
    for kind, names in (("noun", NOUNS), ("verb", VERBS)):
        (root / f"EPIC_100_{kind}_classes.csv").write_text("id,key\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names)))
        (root / f"EPIC_100_tail_{kind}s.csv").write_text(f"{kind}\n2\n")
        table[f"{kind}_class"] = table[kind].map({name: i for i, name in enumerate(names)})
    (root / "EPIC_100_unseen_participant_ids_validation.csv").write_text("participant_id\nv4\n")
    table = table.rename(columns={"segment_id": "narration_id"}).assign(narration="", start_frame=60, stop_frame=120)
    for end in ("start", "stop"):
        table[f"{end}_timestamp"] = table[f"{end}_sec"].map(lambda s: f"00:00:{s:05.2f}")
    for split, name in (("train", "train"), ("test", "validation")):
        table[table.split == split].to_csv(root / f"EPIC_100_{name}.csv", index=False)
    table[table.split == "test"].drop(columns=["noun", "verb", "noun_class", "verb_class", "narration"]).to_csv(root / "EPIC_100_test_timestamps.csv", index=False)
    return folder


def run(epic, **changes) -> RunResult:
    places = dict(dataset="epic", data_root=str(epic / "epic"), features_root=str(epic / "features"), runs_root=str(epic / "runs"))
    return train(TrainConfig(**places | dict(encoder=register_tiny(), weights="random", device="cpu", epochs=2, warmup_epochs=0, batch_size=8, lr=3e-3,
                                             progress=False) | changes))


@pytest.mark.parametrize("changes", [dict(labels="both"), dict(method="zero_shot", labels="both"), dict(method="coop", labels="verb", lr=2e-3, prompt_length=4)])
def test_scores_are_those_behind_the_predictions(epic, changes):
    made = run(epic, **changes)
    scores = scores_of_run(made.folder)
    lines = pd.read_csv(made.folder / "predictions.csv")
    assert set(scores.scores) == set(lines.kind) and len(scores.segment_ids) == lines.segment_id.nunique() == 12
    for kind, own in lines.groupby("kind"):
        logits = scores.of(own.segment_id.tolist()).scores[kind]
        assert (logits.argmax(1) == own.predicted).all()
        chance = np.exp(logits - logits.max(1, keepdims=True))
        assert np.allclose(1 / chance.sum(1), own.confidence, atol=1e-5)


def test_from_two_runs_to_the_measures(epic, tmp_path):
    noun, verb = run(epic, labels="noun"), run(epic, labels="verb")
    path = submission_of_runs(tmp_path / "s.zip", noun.folder, verb.folder, (5, 3, 3))
    found = score_submission(path, epic / "epic").set_index("measure")
    for kind, made in (("noun", noun), ("verb", verb)):
        top1 = made.metrics["results"]["epic"][kind]["top1"]
        own = found.loc[f"all_{kind}_accuracy_at_1"]
        assert own["value"] == pytest.approx(top1["value"]) and own["count"] == 12
    lines = {kind: pd.read_csv(made.folder / "predictions.csv").set_index("segment_id") for kind, made in (("noun", noun), ("verb", verb))}
    hits = pd.DataFrame({kind: own.label == own.predicted for kind, own in lines.items()}).all(axis=1)
    assert found.loc["all_action_accuracy_at_1", "value"] == pytest.approx(100 * hits.mean())
    assert found.loc["unseen_action_accuracy_at_1", "value"] == pytest.approx(100 * hits[hits.index.str.startswith("v4_")].mean())


def test_a_submission_for_the_challenges_own_list_needs_no_label(epic, tmp_path):
    both = run(epic, labels="both")
    known, unknown = (submission_of_runs(tmp_path / f"{split}.zip", both.folder, both.folder, (5, 3, 3), split=split) for split in ("test", "challenge"))
    assert known.read_bytes() == unknown.read_bytes()  # the same segments, told without their labels


def test_a_submission_lacks_no_segment(epic, tmp_path):
    made, lists = run(epic, labels="both"), epic / "epic" / "EPIC_100_test_timestamps.csv"
    before = lists.read_text()
    lists.write_text(before + before.splitlines()[-1].replace("v", "w") + "\n")
    try:
        with pytest.raises(DataError, match="without scores.*w"):
            submission_of_runs(tmp_path / "s.zip", made.folder, made.folder, (5, 3, 3), split="challenge")
    finally:
        lists.write_text(before)
    assert not (tmp_path / "s.zip").exists()


def test_runs_without_scores_are_refused(epic, tmp_path):
    with pytest.raises(DataError, match="must hold metrics.json"):
        scores_of_run(tmp_path)
    with pytest.raises(DataError, match="knows nothing of 'ego4d'; it was evaluated on epic"):
        scores_of_run(run(epic, labels="noun").folder, "ego4d")
