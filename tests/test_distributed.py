"""One run in one, two and three processes: the same losses and accuracies; extraction in parts; and what happens where one process fails.

Run as a script, it is what the tests start: it imports everything once, reads one JSON list a line, [arguments, ranks, fault], and forks the processes that
torchrun would start, each with an output file of its own."""
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def fail_at(rank: int, epoch: int, how: str) -> None:
    "One process fails before an epoch: it raises, or is killed."
    from xmic.files import DataError
    from xmic.training import Trainer
    run_epoch = Trainer.run_epoch

    def failing(self):
        if self.epoch + 1 == epoch and int(os.environ.get("RANK", 0)) == rank:
            if how == "killed": os.kill(os.getpid(), signal.SIGKILL)
            raise DataError(f"the disk of process {rank} is gone")
        return run_epoch(self)

    Trainer.run_epoch = failing


def free_port() -> int:
    "A port that nothing listens on, below those that the system hands out."
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)): return port
    raise OSError("100 ports were taken")


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).parent))
    from world import register_tiny
    from xmic import distributed, features, frames, training  # noqa: F401

    register_tiny()
    if len(sys.argv) > 1:  # started by torchrun itself
        sys.exit(distributed.main(sys.argv[1:]))
    for line in sys.stdin:
        arguments, ranks, fault, log = json.loads(line)
        port = free_port()
        children = []
        for rank in range(ranks):
            if (child := os.fork()) == 0:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                for out in (1, 2): os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), out)
                if ranks > 1:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                if fault: fail_at(*fault)
                distributed.main(arguments)
                os._exit(0)
            children.append(child)
        codes = {}
        while len(codes) < ranks:
            child, status = os.wait()
            codes[children.index(child)] = os.waitstatus_to_exitcode(status)
            if status:  # as torchrun does
                time.sleep(0.3)
                for rank, other in enumerate(children):
                    if rank not in codes: os.kill(other, signal.SIGKILL)
        print(json.dumps([codes[r] for r in range(ranks)]), flush=True)
    sys.exit()


from test_training import make_dataset  # noqa: E402
from world import contents, extract_config, register_tiny, write_world  # noqa: E402
from xmic import distributed  # noqa: E402
from xmic.distributed import deal, deal_videos, launched, mine  # noqa: E402
from xmic.features import ExtractConfig, FailureLog, FeatureStore  # noqa: E402
from xmic.files import DataError, write_json  # noqa: E402
from xmic.segments import read_csv  # noqa: E402
from xmic.config import TrainConfig
from xmic.training import RunResult  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")


class Ranks:
    "Starts commands in several processes."

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.zygote = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                       env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"})

    def __call__(self,
                 what: str,  # a command of xmic.distributed
                 values: dict,
                 ranks: int = 1,
                 fault: tuple[int, int, str] | None = None,  # rank, epoch, how
                ) -> tuple[list[int], str]:  # exit codes, output of all
        self.count += 1
        place, log = self.folder / f"{self.count}.json", self.folder / f"{self.count}.log"
        write_json(place, values)
        print(json.dumps([[what, str(place)], ranks, fault, str(log)]), file=self.zygote.stdin, flush=True)
        return json.loads(self.zygote.stdout.readline()), log.read_text()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    ranks = Ranks(tmp_path_factory.mktemp("commands"))
    yield ranks
    ranks.zygote.stdin.close()
    ranks.zygote.wait()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_dataset(folder / "csv", folder / "features", "csv")
    return folder


def settings(made: Path, runs: Path, **changes) -> dict:
    return asdict(TrainConfig(**dict(
        dataset="csv", data_root=str(made / "csv"), features_root=str(made / "features"), encoder=register_tiny(), weights="random", runs_root=str(runs),
        device="cpu", frames=8, epochs=4, warmup_epochs=1, batch_size=7, lr=3e-3, progress=False) | changes))


def same(one: RunResult, other: RunResult, tolerance: float) -> None:
    "The same run, to a tolerance: sums of floats in another order differ in their last digits."
    histories = [r.history.drop(columns=["seconds", "data_seconds"], errors="ignore") for r in (one, other)]
    pd.testing.assert_frame_equal(*histories, rtol=tolerance)
    assert one.metrics["segments"] == other.metrics["segments"] and one.metrics["parameters"] == other.metrics["parameters"]
    tables = [pd.read_csv(r.folder / "predictions.csv") for r in (one, other)]
    pd.testing.assert_frame_equal(*tables, rtol=30 * tolerance)
    assert one.metrics["results"] == other.metrics["results"]


CASES = {
    "X-MIC": dict(labels="both"),
    "in parts of a batch, some classes": dict(labels="both", micro_batch=2, class_subsample=3),
    "more processes than segments": dict(batch_size=2, epochs=2),
    "one incomplete batch": dict(batch_size=200, method="clip_adapter", lr=0.1),
    "learned prompts": dict(method="coop", prompt_length=3, lr=0.05, epochs=2, class_subsample=3),
    "prompts of each video": dict(method="cocoop", lr=0.02, epochs=2),
    "A5": dict(method="a5", prompt_length=2, heads=4, epochs=2),
    "the best epoch": dict(selection="source validation", validation_fraction=0.3),
    "no training": dict(method="zero_shot", labels="both"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_two_and_three_processes_train_the_same(start, made, tmp_path, case):
    runs = {}
    for ranks in (1, 2, 3):
        values = settings(made, tmp_path, name=str(ranks), **CASES[case])
        codes, said = start("train", values, ranks)
        assert codes == [0] * ranks, said
        assert said.count(str(tmp_path / str(ranks))) == 1 and not list(tmp_path.rglob("*.part"))
        runs[ranks] = RunResult.read(tmp_path / str(ranks))
        assert runs[ranks].metrics.get("processes", 1) == ranks
    assert case == "no training" or runs[1].history.loss.iloc[-1] < runs[1].history.loss.iloc[0]
    for ranks in (2, 3):
        same(runs[1], runs[ranks], 1e-4)


@pytest.mark.slow
def test_pixels_are_split_with_their_cuts(start, tmp_path):
    from xmic.frames import store_dataset
    world = write_world(tmp_path / "csv")
    store_dataset(ExtractConfig(dataset="csv", data_root=str(world), features_root=str(tmp_path / "features"), encoder=register_tiny(), weights="random",
                                workers=0, progress=False), "hand")
    runs = []
    for ranks in (1, 3):
        values = settings(tmp_path, tmp_path / "runs", name=str(ranks), method="vita_clip", frames=4, epochs=1, batch_size=5, micro_batch=2, lr=1e-2,
                          warmup_epochs=0, crop_scale=0.5, flip=True)
        codes, said = start("train", values, ranks)
        assert codes == [0] * ranks, said
        runs.append(RunResult.read(tmp_path / "runs" / str(ranks)))
    same(*runs, 1e-3)


def test_a_run_goes_on_in_another_number_of_processes(start, made, tmp_path):
    whole, broken = (settings(made, tmp_path, name=name) for name in ("whole", "broken"))
    assert start("train", whole, 1)[0] == [0]
    for ranks, fault in ((3, (1, 2, "killed")), (2, (0, 4, "killed"))):
        codes, _ = start("train", broken, ranks, fault)
        assert all(codes) and (tmp_path / "broken/checkpoint.pt").exists() and not (tmp_path / "broken/metrics.json").exists()
    codes, said = start("train", broken, 1)
    assert codes == [0], said
    same(RunResult.read(tmp_path / "whole"), RunResult.read(tmp_path / "broken"), 1e-4)
    assert not (tmp_path / "broken/checkpoint.pt").exists()
    before = contents(tmp_path / "broken")
    assert start("train", broken, 2)[0] == [0, 0] and contents(tmp_path / "broken") == before


@pytest.mark.parametrize("case", ["X-MIC", "in parts of a batch, some classes", "learned prompts"])
def test_who_goes_on_after_a_stop_makes_no_difference(start, made, tmp_path, case):
    "Stopped behind the first epoch: the same number of processes ends in the same bits, another number as near as one and two processes are."
    runs = {}
    for stages in ((1,), (2,), (1, 1), (2, 2), (2, 1), (1, 2)):
        name = "-".join(map(str, stages))
        values = settings(made, tmp_path, name=name, **CASES[case])
        if len(stages) > 1:
            assert all(start("train", values, stages[0], (0, 2, "killed"))[0]) and (tmp_path / name / "checkpoint.pt").exists()
        codes, said = start("train", values, stages[-1])
        assert not any(codes), said
        runs[name] = RunResult.read(tmp_path / name)
    losses = {name: run.history.loss.to_numpy() for name, run in runs.items()}
    for one, other in (("1", "1-1"), ("2", "2-2")):
        assert (losses[one] == losses[other]).all()
        assert (runs[one].folder / "model.safetensors").read_bytes() == (runs[other].folder / "model.safetensors").read_bytes()
    for name in losses: np.testing.assert_allclose(losses[name], losses["1"], rtol=3e-6, err_msg=name)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_process_that_fails_ends_all_with_one_message(start, made, tmp_path, rank):
    codes, said = start("train", settings(made, tmp_path), 3, (rank, 2, "raises"))
    assert all(codes) and said.count("xmic: ") == 1 and f"xmic: the disk of process {rank} is gone\n(process {rank} of 3)" in said
    assert "Traceback" not in said


def test_what_is_wrong_for_all_is_said_once(start, made, tmp_path):
    for values, words in ((settings(made, tmp_path, method="cop"), "did you mean 'coop'"), (dict(batchsize=3), "did you mean 'batch_size'")):
        codes, said = start("train", values, 3)
        assert all(codes) and said.count("xmic: ") == 1 and words in said and "Traceback" not in said
    assert start("train", settings(made, tmp_path, name="a"), 1)[0] == [0]
    codes, said = start("train", settings(made, tmp_path, name="a", seed=3), 2)
    assert all(codes) and said.count("holds a run with other settings") == 1


@pytest.mark.slow
def test_torchrun_itself(made, tmp_path):
    write_json(tmp_path / "run.json", settings(made, tmp_path, name="two", epochs=2))
    torchrun = lambda *words: subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, *words], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    done = torchrun("train", str(tmp_path / "run.json"))
    assert done.returncode == 0, done.stderr
    assert RunResult.read(tmp_path / "two").metrics["processes"] == 2 and str(tmp_path / "two") in done.stdout
    failed = torchrun("tran", str(tmp_path / "run.json"))
    assert failed.returncode != 0 and failed.stderr.count("xmic: usage") == 1


# The parts

@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("segments, batch_size", [(1, 4), (5, 8), (12, 4), (13, 4), (9, 2)])
def test_the_parts_of_all_processes_are_the_batches(monkeypatch, processes, segments, batch_size):
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "world", lambda: (rank, processes))
        batches, own, size = deal(segments, batch_size)
        parts.append([own[i:i + size].tolist() for i in range(0, len(own), size)])
        assert len(parts[-1]) in (0, len(batches)) and mine(np.arange(5)).tolist() == list(range(rank, 5, processes))
    used = segments if segments < batch_size else segments - segments % batch_size
    assert sum(map(len, batches)) == used
    for number, batch in enumerate(batches):
        assert sorted(i for part in parts if part for i in part[number]) == batch.tolist()


def test_videos_are_dealt_out_whole_disjoint_and_even():
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 100, 5000)
    segments = pd.DataFrame(dict(segment_id=map(str, range(5000)), video_id=rng.choice([f"v{i}" for i in range(300)], 5000),
                                 start_sec=start, stop_sec=start + rng.exponential(3, 5000)))
    for world in (1, 2, 8, 299, 400):
        parts = [deal_videos(segments, rank, world) for rank in range(world)]
        assert sorted(pd.concat(parts).index) == list(range(5000)) and all(p.index.is_monotonic_increasing for p in parts)
        assert len({(v, r) for r, p in enumerate(parts) for v in p.video_id}) == segments.video_id.nunique()
        again = deal_videos(segments.sample(frac=1, random_state=1), world - 1, world)
        assert {*again.segment_id} == {*parts[-1].segment_id}
    seconds = [(p.stop_sec - p.start_sec).sum() for p in (deal_videos(segments, r, 8) for r in range(8))]
    assert max(seconds) / min(seconds) < 1.02


@pytest.mark.parametrize("rank, world", [(None, 4), (4, 4), (-1, 4), (1, 1), (0, 0)])
def test_a_part_that_is_none_is_refused(rank, world):
    with pytest.raises(DataError, match="rank says which of the parts"):
        deal_videos(pd.DataFrame(), rank, world)


def test_a_slurm_array_says_the_part():
    array = lambda number, count, last: {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": str(count), "SLURM_ARRAY_TASK_MAX": str(last)}
    assert launched(array(3, 8, 7)) == (3, 8) and launched(array(3, 1, 3), parts=8) == (3, 8) and launched({}, 8) == (None, 8)
    assert launched(array(3, 8, 7) | dict(RANK="0", WORLD_SIZE="2")) == (0, 2)
    with pytest.raises(DataError, match="count from 0"):
        launched(array(3, 1, 3))


# Extraction

@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    "Seven videos, two of which cannot be read."
    world = write_world(tmp_path_factory.mktemp("world"), videos=7, frames=60)
    for name in ("v2", "v5"): (world / f"videos/{name}.mp4").write_bytes(bytes(5000))
    return world


@pytest.fixture(scope="module")
def alone(videos, start, tmp_path_factory) -> Path:
    "What one process extracts."
    root = tmp_path_factory.mktemp("alone")
    assert start("extract", asdict(extract_config(videos, root)))[0] == [0]
    return root


def test_parts_by_torchrun_are_the_whole(videos, alone, start, tmp_path):
    codes, said = start("extract", asdict(extract_config(videos, tmp_path)), 3)
    assert codes == [0, 0, 0], said
    assert contents(tmp_path) == contents(alone) and [said.count(f"part {r} of 3: ") for r in range(3)] == [1, 1, 1]
    (store,) = (FeatureStore(p) for p in tmp_path.glob("*/csv"))
    assert store.verify() == [] and len(store.missing(read_csv(videos), ["full"])) == 4


@pytest.mark.slow
def test_parts_that_are_killed_and_run_again_are_the_whole(videos, alone, tmp_path):
    "Processes of their own, all at once on one store, as in a slurm array."
    parts, killed, rng = [Ranks(tmp_path) for _ in range(3)], 0, random.Random(0)
    for attempt in range(5):
        for rank, part in enumerate(parts):
            place, log = str(tmp_path / f"{rank}.json"), str(tmp_path / f"{rank}.log")
            write_json(place, asdict(replace(extract_config(videos, tmp_path / "features"), rank=rank, world=3, batch_size=8)))
            print(json.dumps([["extract", place], 1, None, log]), file=part.zygote.stdin, flush=True)
        if attempt < 4:
            time.sleep(rng.uniform(0.1, 0.8) + 10 * (attempt == 0))  # the first time they import everything
            children = [int(c) for p in parts for c in Path(f"/proc/{p.zygote.pid}/task/{p.zygote.pid}/children").read_text().split()]
            for child in children: os.kill(child, signal.SIGKILL)
            killed += len(children)
        codes = [json.loads(p.zygote.stdout.readline()) for p in parts]
    for part in parts: part.zygote.stdin.close()
    assert codes == [[0]] * 3 and killed >= 3
    (store,) = (FeatureStore(p) for p in (tmp_path / "features").glob("*/csv"))
    assert store.verify() == []
    store.refresh()  # whoever wrote the index last may not have seen the last shard
    assert contents(tmp_path / "features") == contents(alone)


def test_more_parts_than_videos_and_a_part_without_number(videos, start, tmp_path):
    config = replace(extract_config(videos, tmp_path), world=9)
    assert start("extract", asdict(replace(config, rank=8)))[0] == [0] and not list(tmp_path.rglob("*.safetensors"))
    codes, said = start("extract", asdict(config))
    assert codes == [1] and "rank says which of the parts" in said


def test_stored_frames_in_parts_are_the_whole(videos, start, tmp_path):
    for ranks, name in ((1, "alone"), (2, "parts")):
        codes, said = start("store_frames", asdict(extract_config(videos, tmp_path / name, feature_fps=5.0)), ranks)
        assert codes == [0] * ranks, said
    assert contents(tmp_path / "alone") == contents(tmp_path / "parts") and len(list((tmp_path / "parts").rglob("failures.jsonl"))) == 2


# Failures that several processes note

def _note(path: Path, writer: int, ready) -> None:
    ready.wait()
    log = FailureLog(path)
    for number in range(60):
        name = f"{writer}-{number:03}"
        log.add({name: dict(segment_id=name, cause="cut short", bytes=number)}, mended=[f"{writer}-{number - 1:03}"] if number % 3 == 2 else [])
        if number % 20 == 19: log.tidy()


def test_lines_of_several_processes_are_never_lost(tmp_path):
    from multiprocessing import get_context
    context, path = get_context("fork"), tmp_path / "failures.jsonl"
    ready = context.Barrier(4)
    writers = [context.Process(target=_note, args=(path, w, ready)) for w in range(4)]
    for w in writers: w.start()
    for w in writers: w.join()
    assert [w.exitcode for w in writers] == [0] * 4
    log = FailureLog(path)
    log.tidy()
    assert [*log.read()] == sorted(f"{w}-{n:03}" for w in range(4) for n in range(60) if n % 3 != 1)
    assert [json.loads(line)["segment_id"] for line in path.read_text().splitlines()] == [*log.read()]


@pytest.mark.parametrize("rubbish", ["\n", "{}\n", "[1]\n", '{"segment_id": "x", "cau', "\x00\x00\n", '{"segment_id": 3}\n'])
def test_lines_that_are_none_are_passed_over(tmp_path, rubbish):
    path = tmp_path / "failures.jsonl"
    path.write_text('{"segment_id": "a", "cause": "b"}\n' + rubbish)
    log = FailureLog(path)
    log.add({"c": dict(segment_id="c", cause="d")})
    assert {*FailureLog(path).read()} == {"a", "c"}
    log.tidy()
    assert path.read_text() == '{"segment_id": "a", "cause": "b"}\n{"segment_id": "c", "cause": "d"}\n'


def test_a_parameter_without_a_gradient_keeps_none(monkeypatch):
    "A gradient of zero would let its weight decay, where one process leaves it alone."
    reached, left = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))
    reached.grad = torch.full((2, 3), 0.5)
    monkeypatch.setattr(distributed, "world", lambda: (0, 2))
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda message: message.mul_(2))  # another process with the same numbers
    loss, = distributed.sum_gradients([left, reached], torch.tensor(3.0))
    assert left.grad is None and loss == 6 and (reached.grad == 1).all() and reached.grad.shape == (2, 3)
