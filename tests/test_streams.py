"Rows on the device and rows read from disk give the same batches, whatever is sampled."
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from xmic.features import FeatureStore, write_shard
from xmic.files import DataError, write_json
from xmic.streams import Batch, Streams, ahead, free_bytes, sample_rows, shift_twice


@pytest.fixture
def store(tmp_path):
    "Two views of 40 segments in five shards; each row says where it is from."
    store, rng = FeatureStore(tmp_path), np.random.default_rng(0)
    lengths = rng.integers(1, 300, 40)
    for number, view in enumerate(("full", "hand")):
        write_json(tmp_path / view / "manifest.json", {"dim": 4})
        for shard in range(5):
            write_shard(tmp_path / view / f"P01_{shard:02}.safetensors", [
                (f"P01_{shard:02}_{i}", torch.tensor([[number, i, row, shard] for row in range(lengths[i])]).half(), np.arange(lengths[i]))
                for i in range(shard * 8, shard * 8 + 8)])
    store.lengths = lengths
    return store


def names(store):
    return [f"P01_{i // 8:02}_{i}" for i in range(40)]


def both(store, **options):
    views = store.view("hand"), store.view("full")
    return [Streams(views[0], views, names(store), resident=r) for r in (True, False)]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_rows_are_the_ones_asked_for(store, train, shifted):
    rng = np.random.default_rng(1)
    start, order = np.zeros(40, int), rng.permutation(40)
    rows = sample_rows(start, store.lengths, 16, train, rng)
    context = shift_twice(rows, start, store.lengths, store.lengths, train, rng) if shifted else None
    for streams in both(store):
        seen = []
        for positions, batch in streams.batches(order, rows, 7, context):
            seen += positions.tolist()
            ids = torch.from_numpy(positions)[:, None].expand(-1, 16)
            assert torch.equal(batch.video[..., 2], torch.from_numpy(rows[positions]).float())
            assert torch.equal(batch.context[:, :, 0, 2], torch.from_numpy((rows if context is None else context)[positions]).float())
            assert (batch.context[:, :, 0, 0] == 1).all() and (batch.context[:, :, 1, 0] == 0).all()
            assert (batch.video[..., 1] == ids).all() and (batch.context[..., 1] == ids[..., None]).all()
        assert seen == order.tolist()


def test_a_batch_elsewhere_or_in_another_precision():
    both, alone = Batch(torch.ones(2, 3, 4), torch.ones(2, 3, 1, 5)), Batch(torch.ones(2, 3, 4))
    assert len(both) == 2 and both.to("meta").video.device.type == both.to("meta").context.device.type == "meta"
    half = both.to("cpu", torch.float16)
    assert half.video.dtype == half.context.dtype == torch.float16 and half.video.device.type == "cpu"
    assert alone.to("cpu", torch.float64).video.dtype == torch.float64 and alone.to("cpu").context is None


def test_features_may_take_a_share_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    assert free_bytes(torch.device("cuda", 0)) == 600
    monkeypatch.setattr(Path, "read_text", lambda path, **_: "MemTotal: 900 kB\nMemAvailable:  500 kB\n")
    assert free_bytes(torch.device("cpu")) == int(0.6 * 1024 * 500)

    def missing(path, **_): raise FileNotFoundError(path)
    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr("os.sysconf", lambda name: dict(SC_PAGE_SIZE=4096, SC_PHYS_PAGES=1000)[name])
    assert free_bytes(torch.device("cpu")) == int(0.3 * 4096 * 1000)


def test_rows_are_resident_where_they_fit(store, monkeypatch):
    views, size = (store.view("hand"), store.view("full")), 2 * int(store.lengths.sum()) * 4 * 2  # two views of four float16 numbers
    for free, resident in ((size, True), (size - 1, False)):
        monkeypatch.setattr("xmic.streams.free_bytes", lambda device: free)
        assert Streams(views[0], views, names(store)).resident is resident


def test_without_a_conditioning_stream_there_is_none(store):
    rows = sample_rows(np.zeros(40, int), store.lengths)
    for resident in (True, False):
        streams = Streams(store.view("hand"), [], names(store), resident=resident)
        (positions, batch), *_ = streams.batches(np.arange(40), rows, 40)
        assert len(streams) == 40 and batch.context is None and torch.equal(batch.video[..., 2], torch.from_numpy(rows).float())


def test_conditioning_views_have_one_width(store, tmp_path):
    write_json(tmp_path / "wide" / "manifest.json", {"dim": 6})
    write_shard(tmp_path / "wide" / "P01_00.safetensors", [("P01_00_0", torch.zeros(2, 6).half(), np.arange(2))])
    with pytest.raises(DataError, match="conditioning views differ in width: .*full: 4.*wide: 6"):
        Streams(store.view("full"), [store.view("full"), store.view("wide")], ["P01_00_0"])


def test_a_view_of_clips_has_a_row_for_several_frames(store, tmp_path):
    "A row of the other view stands for as many frames as its manifest says, and is found by its share of the segment."
    write_json(tmp_path / "clips" / "manifest.json", {"dim": 4, "clip_frames": 4})
    few = -(-store.lengths // 4)
    for shard in range(5):
        write_shard(tmp_path / "clips" / f"P01_{shard:02}.safetensors", [
            (name, torch.tensor([[2, i, row, shard] for row in range(few[i])]).half(), np.arange(few[i]))
            for i, name in list(enumerate(names(store)))[shard * 8:shard * 8 + 8]])
    rows = sample_rows(np.zeros(40, int), store.lengths)
    for resident in (True, False):
        streams = Streams(store.view("full"), [store.view("clips"), store.view("full")], names(store), resident=resident)
        assert streams.clip_frames == 1 and streams.lengths.tolist() == store.lengths.tolist()
        (_, batch), *_ = streams.batches(np.arange(40), rows, 40)
        assert torch.equal(batch.video[..., 2], torch.from_numpy(rows).float()) and torch.equal(batch.context[:, :, 1], batch.video)
        assert batch.context[:, :, 0, 2].tolist() == [[row * int(few[i]) // int(store.lengths[i]) for row in rows[i].tolist()] for i in range(40)]


def test_last_batch_may_be_left_out(store):
    rows = sample_rows(np.zeros(40, int), store.lengths)
    for streams in both(store):
        assert [len(p) for p, _ in streams.batches(np.arange(40), rows, 12, drop_last=True)] == [12, 12, 12]
        assert [len(p) for p, _ in streams.batches(np.arange(40), rows, 12)] == [12, 12, 12, 4]


@pytest.mark.parametrize("read_before, says", [(False, "P01_04.*not a whole feature shard"), (True, "P01_04.*cut short since it was opened")])
def test_a_shard_cut_short_while_open_is_an_error(store, read_before, says):
    streams = both(store)[1]
    batches = lambda: list(streams.batches(np.arange(40), sample_rows(np.zeros(40, int), store.lengths), 8))
    if read_before:
        batches()
    path = store.root / "hand" / "P01_04.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])
    with pytest.raises(DataError, match=says):
        batches()


def test_views_of_different_rates_are_refused(store):
    segments = [(f"P01_00_{i}", torch.zeros(2, 4).half(), np.arange(2)) for i in range(8)]
    write_shard(store.root / "full" / "P01_00.safetensors", segments)
    with pytest.raises(DataError, match="different numbers of frames for .* segments, 'P01_00_0' first"):
        both(store)


def test_reading_ahead_ends_with_its_consumer():
    before = threading.active_count()
    endless = iter(int, 1)
    for _ in ahead(endless):
        break
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_nothing_is_lost_while_the_consumer_is_slow():
    found = []
    for item in ahead(range(5), depth=1):
        time.sleep(0.3)  # longer than one attempt to put an item into the line
        found.append(item)
    assert found == list(range(5))


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_is_read_ahead_than_the_line_holds(depth):
    made = []
    items = ahead((made.append(i) or i for i in range(100)), depth)
    next(items)
    time.sleep(0.5)  # longer is no harm
    assert len(made) <= depth + 2  # the one taken, those in the line, and the one that waits for it
    items.close()


def test_an_error_ahead_is_raised_here():
    def broken():
        yield 1
        raise KeyError("gone")

    items = ahead(broken())
    assert next(items) == 1
    with pytest.raises(KeyError, match="gone"):
        next(items)
