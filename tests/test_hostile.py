"""Files that are made to do harm. Each reader of the kit answers or raises one short `DataError`, soon, in bounded memory, and does nothing else."""
import io
import json
import os
import pickle
import resource
import struct
import sys
import time
import tracemalloc
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import asdict
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from counting import counted
from videos import watch, watch_in_worker, write_video
from xmic.challenge import read_submission
from xmic.classes import ClassSet
from xmic.encoders import embed_classes, load_weights, read_weights
from xmic.experiments import Profile, _changed
from xmic.features import FeatureStore, read_shard, shard_name, write_shard
from xmic.files import DataError, read_table
from xmic.frames import FrameShard, FrameStore, ShardWriter
from xmic.hands import ARRAYS, Detections, HandBoxes, read_100doh, read_boxes, read_epic_hands, unpickle
from xmic.lavila import LaViLaConfig, fit_weights, read_checkpoint, read_lavila
from xmic.recognizer import _one_encoder, _saved
from xmic.segments import COLUMNS, FOLDER_COLUMNS, read_classes, read_csv, read_ego4d, read_egtea, read_epic
from xmic.config import TrainConfig
from xmic.training import RunResult, Trainer, load_trained
from xmic.video import DecodePool

CASES: dict[str, int] = {}  # by test: how many files it has to try
TRIED = Counter()  # how many it has tried


def cases(number: int):
    "A test of so many generated cases, the same ones each time."
    def of(test):
        CASES[test.__name__] = number
        one = test.hypothesis.inner_test

        @wraps(one)
        def counted(*args, **given):
            TRIED[test.__name__] += 1
            return one(*args, **given)

        test.hypothesis.inner_test = counted
        return settings(max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))(test)
    return of


def attempt(read, *given, says: str = "", seconds: float = 10):
    "What a reader gives; None where it refuses, in a message that can be read and names the place."
    begin = time.process_time()
    try:
        return read(*given)
    except DataError as e:
        assert says in str(e) and 10 < len(str(e)) < 3000, str(e)[:4000]
        return None
    finally:
        assert time.process_time() - begin < seconds


@pytest.fixture(autouse=True)
def watched(request, tmp_path, monkeypatch):
    "The test has tried what it says, has used little memory, and has left nothing where it ran."
    ran = tmp_path / "ran"
    ran.mkdir()
    monkeypatch.chdir(ran)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "linux":
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 8 * 2**30, hard))  # what goes wrong ends here, and not the machine
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (2**20 if sys.platform == "darwin" else 2**10)
    assert grown < 500, f"{grown:.0f} MiB"
    assert not list(ran.iterdir()) and not list(tmp_path.rglob("trace"))
    assert TRIED[request.function.__name__] >= CASES.get(request.function.__name__, 0)


def put(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    return path


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    "A file that was whole, cut short, or with some bytes changed, taken out or put in."
    def change(at: float, noise: bytes, length: int) -> bytes:
        place = int(at * len(whole))
        return whole[:place] + noise + whole[place + length:]
    return st.builds(change, st.floats(0, 1), st.binary(max_size=8), st.sampled_from([0, 1, 4, 8, 10**9]))


# Pickles

class Touch:
    "Leaves a file behind when it is unpickled."

    def __init__(self, path, how): self.path, self.how = str(path), how

    def __reduce__(self):
        return {"exec": (exec, (f"open({self.path!r}, 'w').close()",)), "eval": (eval, (f"open({self.path!r}, 'w').close()",)),
                "open": (open, (self.path, "w")), "system": (os.system, (f"touch '{self.path}'",)), "mkdir": (os.mkdir, (self.path,)),
                "import": (__import__, ("antigravity",)), "Path": (Path.touch, (Path(self.path),))}[self.how]


GLOBALS = [b"os\nsystem", b"posix\nsystem", b"builtins\nexec", b"builtins\neval", b"builtins\ngetattr", b"builtins\n__import__", b"subprocess\nPopen",
           b"shutil\nrmtree", b"numpy\nload", b"numpy.f2py.crackfortran\ngetlincoef", b"torch\nload", b"torch.hub\nload", b"runpy\nrun_path",
           b"xmic.files\nwrite_json", b"pathlib\nPath", b"collections\nOrderedDict", b"numpy\nndarray", b"torch._utils\n_rebuild_tensor_v2", b"\n", b"os\n" * 9]
CALLS = [b"c%s\n(S'%s'\ntR.", b"(S'%s'\ni%s\n.", b"\x80\x02c%s\n(U\x05%5.5str.", b"\x80\x02c%s\n)\x81}b.", b"\x80\x02c%s\n}(U\x01au\x85R.", b"\x80\x02c%s\n."]
LENGTHS = [b"B", b"T", b"X", b"\x8b"]  # opcodes with four bytes of length
LONG_LENGTHS = [b"\x8e", b"\x8d", b"\x96", b"\x95"]  # with eight


def nest(kind: str, depth: int) -> bytes:
    start, step = {"tuple": (b")", b"\x85"), "key": (b"})", b"\x85"), "list": (b"", b"]"), "dict": (b"", b"}K\x00"), "pair": (b"})", b"2\x86")}[kind]
    end = {"list": b"a" * (depth - 1), "dict": b"Ns" + b"s" * (depth - 1), "key": b"Ns", "pair": b"Ns"}.get(kind, b"")
    return b"\x80\x04" + start + step * depth + end + b"."


def laughs(kind: str, depth: int) -> object:
    "A little that is ten times itself, again and again."
    thing = 0.5
    for _ in range(depth): thing = [thing] * 10 if kind == "list" else (thing,) * 10
    return thing


def bombs(trace: Path) -> st.SearchStrategy[bytes]:
    "Programs that would run code, fill the memory, or overflow the stack."
    def hold(thing, place: str):
        rows = [thing] * 10 if place == "cell" else thing
        return {"top": thing, "message": [b"", thing], "row": {0: {"hand_dets": [rows], "obj_dets": thing}},
                "cell": {0: {"hand_dets": [rows], "obj_dets": None}},
                "box": {"a": {0: thing}}, "corner": {"a": {0: (thing, 1, 2, 3)}}, "state": {"state_dict": {"module.a": thing}}, "plain": {"a": thing},
                "args": {"state_dict": {"module.a": 0}, "args": Namespace(model=thing)}}[place]
    places = st.sampled_from(["top", "message", "row", "cell", "box", "corner", "state", "plain", "args"])
    payload = st.builds(lambda how, place, protocol: pickle.dumps(hold(Touch(trace, how), place), protocol),
                        st.sampled_from(["exec", "eval", "open", "system", "mkdir", "import", "Path"]), places, st.integers(0, 5))
    call = st.builds(lambda form, name: form.replace(b"%5.5s", b"12345").replace(b"%s", name, 1).replace(b"%s", str(trace).encode()),
                     st.sampled_from(CALLS), st.sampled_from(GLOBALS))
    deep = st.builds(nest, st.sampled_from(["tuple", "key", "list", "dict", "pair"]), st.sampled_from([150, 1000, 100_000]))
    huge = st.builds(lambda op, n: b"\x80\x04" + op + struct.pack("<I" if op in LENGTHS else "<Q", n) + b"abc.",
                     st.sampled_from(LENGTHS + LONG_LENGTHS), st.sampled_from([4, 10**6, 2**31 - 1]))
    memo = st.builds(lambda n: b"\x80\x02]r" + struct.pack("<I", n) + b".", st.sampled_from([100, 2**24, 2**31 - 1, 2**32 - 1]))
    many = st.builds(lambda kind, depth, place: pickle.dumps(hold(laughs(kind, depth), place), 4),
                     st.sampled_from(["list", "tuple"]), st.sampled_from([2, 9, 60]), places)
    text = b"X" + struct.pack("<I", 10**6) + b"x" * 10**6
    copies = st.builds(lambda calls: b"\x80\x02c_codecs\nencode\nq\x01" + text + b"U\x06latin1\x86q\x02](" + b"h\x01h\x02R" * calls + b"e.",
                       st.sampled_from([5, 5000]))
    numbers = st.builds(lambda key, value, place: pickle.dumps({"row": {key: {"hand_dets": np.full((1, 10), value), "obj_dets": None}},
                                                                "box": {"a": {key: (value, value, value, value)}}}[place], 4),
                        st.sampled_from([0, -1, 10**400, float("nan"), float("inf"), "9" * 5000, b"1", None, True, (1,)]),
                        st.sampled_from([float("nan"), float("inf"), -1e308, 1e308, 0.0]), st.sampled_from(["row", "box"]))
    message = Detections(video_id="P01_01", hands=[dict(score=1.0, bbox=dict(left=0.2, right=0.4, bottom=0.5))]).SerializeToString()
    whole = [{7: {"hand_dets": np.ones((2, 10), "f4"), "obj_dets": None}}, {"a": {3: (1.0, 2.0, 3.0, 4.0)}}, [message] * 3]
    broken = st.builds(pickle.dumps, st.lists(damaged(message), max_size=3), st.integers(0, 5))
    return st.one_of(payload, call, deep, huge, memo, many, copies, numbers, broken, *[damaged(pickle.dumps(one, 2)) for one in whole])


@st.composite
def programs(draw) -> bytes:
    "Operations in any order, most of which have something to work on."
    steps = [b"]", b"}", b")", b"N", b"K\x07", b"X\x01\x00\x00\x00a", b"C\x02ab", b"(", b"(", b"0", b"1", b"2", b"a", b"e", b"s", b"u", b"t", b"\x85", b"\x86", b"\x87",
             b"l", b"d", b"\x8f", b"\x90", b"\x91", b"R", b"b", b"\x81", b"o", b"\x94", b"h\x00", b"h\x01", b"q\x00", b"Q", b"Pa\n", b"\x82\x01", b"\x97",
             b"ccollections\nOrderedDict\n", b"ccollections\ndefaultdict\n", b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"cfunctools\npartial\n",
             b"cbuiltins\nset\n", b"c_codecs\nencode\n", b"(icollections\ndeque\n", b"X\x02\x00\x00\x00f8\x85R", b"\x93", b"\x8a\x09" + b"\xff" * 8 + b"\x7f"]
    return b"\x80\x04" + b"".join(draw(st.lists(st.sampled_from(steps), max_size=60))) + b"."


def colliding(number: int) -> bytes:
    "A dict whose keys all have one hash."
    return b"\x80\x02}" + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little", signed=True) + b"Ns" for k in range(number)) + b"."


def repeated_key(depth: int, times: int) -> bytes:
    "A tuple that holds itself ten times at each depth, as a key again and again."
    return b"\x80\x02}q\x00)" + b"".join(b"q\x01(" + b"h\x01" * 10 + b"t" for _ in range(depth)) + b"q\x02" + b"0h\x00" + b"h\x02Ns" * times + b"."


NUMBERS = {"digits": b"I" + b"9" * 5000 + b"\n.", "bytes": b"\x80\x02\x8b" + struct.pack("<I", 10**6) + b"\x7f" * 10**6 + b".",
           "key": b"}\x80\x02\x8b" + struct.pack("<I", 3000) + b"\x7f" * 3000 + b"Ns.", "frame": pickle.dumps({10**4400 // 7: None}, 4),
           "box": pickle.dumps({"a": {0: (10**4400, 1, 2, 3)}}, 4), "row": pickle.dumps({0: {"hand_dets": [[10**4400] * 10], "obj_dets": None}}, 4)}


@pytest.mark.parametrize("program", [*NUMBERS.values(), repeated_key(40, 2000), repeated_key(2, 100_000), colliding(5000), colliding(100_000),
                                     b"\x80\x02}X" + struct.pack("<I", 10**6) + b"x" * 10**6 + b"q\x00Ns" + b"h\x00Ns" * 10**5 + b".",
                                     b"\x80\x02cbuiltins\nset\nq\x00](" + b"K\x01" * 10**5 + b"e\x85q\x010" + b"h\x00h\x01R0" * 10**4 + b"N.",
                                     b"\x80\x02ccollections\ndeque\nq\x00](" + b"K\x01" * 10**5 + b"e\x85q\x010" + b"h\x00h\x01R" * 10**4 + b"."],
                         ids=lambda program: f"{len(program)}-{program[:6].hex()}")
def test_work_that_a_few_bytes_ask_for(tmp_path, program):
    "Each took a minute, more memory than there is, or ended with an error of another kind."
    path = put(tmp_path / "P01_01.pkl", program)
    for read in (read_epic_hands, read_100doh, read_boxes, box_of("epic"), box_of("100doh"), box_of("boxes")):
        assert attempt(read, path, says="P01_01.pkl", seconds=120) is None
    for form in ("new", "script", "old", "alone"):
        attempt(read_weights, put(tmp_path / "weights.pt", as_checkpoint(program, form)), says="weights.pt", seconds=120)
        attempt(read_checkpoint, tmp_path / "weights.pt", says="weights.pt", seconds=120)


@cases(400)
@given(program=programs())
def test_programs_of_any_operations(tmp_path, program):
    before = {key: repr(value) for key, value in ARRAYS.items()}, vars(ARRAYS["numpy", "dtype"]).copy()
    for read in (read_epic_hands, read_100doh, read_boxes):
        attempt(read, put(tmp_path / "P01_01.pkl", program), says="P01_01.pkl")
    assert before == ({key: repr(value) for key, value in ARRAYS.items()}, dict(vars(ARRAYS["numpy", "dtype"])))


@pytest.mark.parametrize("name", ["numpy dtype", "_codecs encode", "numpy.core.multiarray _reconstruct", "functools partial", "collections defaultdict"])
@pytest.mark.parametrize("state", [b"}U\x04readNs", b"N}U\x04readNs\x86", b"N}U\x09set_stateNs\x86"])
def test_what_a_file_names_is_never_changed(tmp_path, name, state):
    "BUILD on a class or function changed it for the whole process."
    good = put(tmp_path / "good.pkl", pickle.dumps({1: {"hand_dets": np.ones((1, 10)), "obj_dets": None}}, 2))
    path = put(tmp_path / "P01_01.pkl", b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n" + state + b"b.")
    for read in (read_epic_hands, read_100doh, read_boxes): assert attempt(read, path, says="P01_01.pkl") is None
    assert len(read_100doh(good)[1][0]) == 1


@pytest.mark.parametrize("tag", [b"\x1a\x00", b"\x22\x00", b"\x1a\x02\x0a\x00"])
def test_four_megabytes_of_empty_detections(tmp_path, tag):
    "Two bytes stand for a message that takes three hundred. The memory is bounded by the fixture."
    path = put(tmp_path / "P01_01.pkl", pickle.dumps([tag * (4 * 2**20 // len(tag)), tag * (2**16 // len(tag) - 1)], 4))
    found = read_epic_hands(path)
    with pytest.raises(DataError, match="frame 1 are damaged"): found[0]
    assert len(found[1][0]) + len(found[1][1]) > 15_000
    assert attempt(box_of("epic"), path, says="P01_01.pkl") is None


def test_a_message_that_is_meant_a_million_times(tmp_path):
    path = put(tmp_path / "P01_01.pkl", b"\x80\x04]\x94(B" + struct.pack("<I", 60_000) + b"\x1a\x00" * 30_000 + b"\x94" + b"h\x01" * 10**6 + b"e.")
    assert attempt(read_epic_hands, path, says="repeats its detections") is None


def test_containers_that_scripts_write(tmp_path):
    boxes = {"a": {0: (1.0, 2.0, 3.0, 4.0), 1: None}, "b": {7: (0.0, 0.0, 5.0, 5.0)}}
    nested = defaultdict(partial(defaultdict, list), {name: defaultdict(tuple, frames) for name, frames in boxes.items()})
    plain = [boxes, defaultdict(dict, boxes), OrderedDict((name, OrderedDict(frames)) for name, frames in boxes.items()), nested,
             defaultdict(OrderedDict, {name: defaultdict(None, frames) for name, frames in boxes.items()})]
    for content in plain:
        for protocol in range(6):
            assert read_boxes(put(tmp_path / "a.pkl", pickle.dumps(content, protocol))) == boxes
    detections = defaultdict(dict, {np.int64(3): OrderedDict(hand_dets=np.ones((2, 10), "f4"), obj_dets=None)})
    for protocol in range(2, 6):
        assert len(read_100doh(put(tmp_path / "b.pkl", pickle.dumps(detections, protocol)))[3][0]) == 2
    others = [{1, 2.5, "a", b"b"}, frozenset([None, True]), deque([1, (2, 3)]), Counter("aab"), bytearray(b"ab"), 2**100, -2**900]
    for thing, protocol in ((thing, protocol) for thing in others for protocol in range(6)):
        found = unpickle(put(tmp_path / "c.pkl", pickle.dumps(thing, protocol)))
        assert found == (list(thing) if isinstance(thing, deque) else thing), (thing, protocol)


def test_a_million_boxes_are_read_in_memory_that_grows_with_their_file(tmp_path):
    boxes = {f"P01_{i}": {n: (1.5 * n, 2.0, 3.0 * n + i, 4.0) for n in range(100)} for i in range(1000)}
    path = put(tmp_path / "a.pkl", pickle.dumps(boxes, 4))
    tracemalloc.start()
    found = unpickle(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == boxes and peak < 30 * path.stat().st_size


def box_of(source: str):
    "The box of a frame, as extraction asks for it."
    def read(path: Path) -> None:
        boxes = HandBoxes.from_boxes(path, max_gap=2) if source == "boxes" else HandBoxes(source, str(path.parent))
        boxes.box(SimpleNamespace(segment_id="a", video_id="P01_01", start_sec=0.0), 7, SimpleNamespace(fps=60.0, folder=False), 456, 256)
    return read


@cases(400)
@given(data=st.data())
def test_pickles_of_hands(tmp_path, data):
    path = put(tmp_path / "P01_01.pkl", data.draw(bombs(tmp_path / "trace")))
    for read in (read_epic_hands, read_100doh, read_boxes, box_of("epic"), box_of("100doh"), box_of("boxes")):
        attempt(read, path, says="P01_01.pkl")


def as_checkpoint(program: bytes, form: str, compression: int = zipfile.ZIP_STORED) -> bytes:
    "A program where torch keeps its own: in a ZIP of torch.save, in one of torch.jit.save, in a file of old, or alone."
    if form == "alone": return program
    if form == "old":
        buffer = io.BytesIO()
        torch.save({}, buffer, _use_new_zipfile_serialization=False)
        parts, old = [], io.BytesIO(buffer.getvalue())
        for _ in range(5):
            begin = old.tell()
            pickle.load(old)
            parts.append(buffer.getvalue()[begin:old.tell()])
        return b"".join([*parts[:3], program, parts[4]])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(8))
        if form == "script": archive.writestr("archive/constants.pkl", pickle.dumps((), 2))
    return buffer.getvalue()


def a_trainer() -> Trainer:
    "As far as `load` looks at it."
    method = torch.nn.Linear(2, 2)
    trainer = Trainer.__new__(Trainer)
    trainer.method, trainer.device, trainer.optimizer = method, torch.device("cpu"), torch.optim.AdamW(method.parameters())
    return trainer


@cases(250)
@given(data=st.data())
def test_pickles_of_weights(tmp_path, data):
    program, form = data.draw(bombs(tmp_path / "trace")), data.draw(st.sampled_from(["new", "script", "old", "alone"]))
    path = put(tmp_path / "weights.pt", as_checkpoint(program, form, data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))))
    for read in (read_weights, read_checkpoint, a_trainer().load):
        attempt(read, path, says="weights.pt")


def tensors_in_a_script(share: int, depth: int) -> bytes:
    "Modules that hold one another twice, so that they have 2^depth names."
    module = b"c__torch__.M\nM\n)\x81}"
    program = b"\x80\x02" + module + b"U\x01aNsb"
    for level in range(depth):
        parts = [b"U\x01" + bytes([97 + i]) + b"h" + bytes([level]) for i in range(share)]
        program += b"q" + bytes([level]) + b"0" + module + b"(" + b"".join(parts) + b"ub"
    return program + b"."


@cases(9)
@given(share=st.integers(1, 3), depth=st.sampled_from([1, 5, 60]))
def test_modules_within_modules(tmp_path, share, depth):
    attempt(read_weights, put(tmp_path / "weights.pt", as_checkpoint(tensors_in_a_script(share, depth), "script")), says="weights.pt")


@cases(12)
@given(size=st.sampled_from([(1,), (10**9,), (1, 10**9, 8), (10**5, 10**5)]), kind=st.sampled_from(["state", "visual.temporal_embed", "bare"]))
def test_tensors_that_are_larger_than_their_file(tmp_path, size, kind):
    tensor = torch.zeros(1).expand(size)
    torch.save({"state_dict": {f"module.{kind}": tensor}} if kind != "bare" else {"a": tensor}, tmp_path / "weights.pt")
    state = attempt(read_weights, tmp_path / "weights.pt", says="weights.pt")
    assert (state is None) == (len(size) > 1 or size[0] > 1)
    if state: attempt(load_weights, torch.nn.Linear(1, 1), state, "weights.pt", says="weights.pt")
    read = attempt(read_checkpoint, tmp_path / "weights.pt", says="weights.pt")
    if read: attempt(fit_weights, read[0], LaViLaConfig(), "weights.pt", says="weights.pt")


# safetensors

def safetensors(header: str | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    header = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + body


ODD = st.sampled_from([-1, 0, 1, 3, 6, 24, 2**31, 2**63, 10**30, 1.5, True, None, "6", [], {}, float("nan")])
SHAPES = st.one_of(st.sampled_from([[2, 3], [2], [], [0, 10**12], [10**12], [-2, -3], [2**32, 2**32], "2", None, [[2]], [2, 3, 0, 10**18]]),
                   st.lists(ODD, max_size=3))
OFFSETS = st.one_of(st.sampled_from([[0, 12], [12, 20], [0, 20], [12, 0], [0, 2**40], [-8, 4], [0, 8], [2**63, 2**64], "all"]), st.lists(ODD, max_size=3))
SEGMENTS = st.one_of(st.sampled_from([{"a": 1, "b": 1}, {"a": -1, "b": 3}, {"a": 2}, {"a": True, "b": 1}, {"a": 1.5, "b": 0.5}, {}, [], None, {"a": "2"},
                                      {"a": 10**30}]),
                     st.dictionaries(st.text(max_size=4), ODD, max_size=3))
SHARD = st.one_of(st.builds(lambda s, h: json.dumps(dict(segments=s, sha256=h)), SEGMENTS, st.sampled_from(["0" * 64, None, 5, [], "é"])),
                  st.sampled_from(["[" * 50_000, "{}", "[]", "5", "", '{"segments": {"a": 1, "a": 1}, "sha256": ""}', '"\\ud800"', "9" * 6000]))


@st.composite
def shards(draw) -> bytes:
    "A shard whose header may lie in any place."
    entry = lambda: dict(dtype=draw(st.sampled_from(["F16", "I32", "U8", "F64", "BOOL", "F8_E4M3", "BF16", "F99", None])), shape=draw(SHAPES),
                         data_offsets=draw(OFFSETS))
    honest = {"features": dict(dtype="F16", shape=[2, 3], data_offsets=[0, 12]), "frames": dict(dtype="I32", shape=[2], data_offsets=[12, 20])}
    header = {"__metadata__": {"shard": draw(SHARD)}} | honest
    if draw(st.booleans()): header[draw(st.sampled_from(["features", "frames", "pixels", "rows", "extra", "__metadata__", "x" * 300, "\0"]))] = entry()
    if draw(st.integers(0, 9)) == 0: header = draw(st.sampled_from([{}, [], "text", {"features": honest["features"]}, {"__metadata__": {"shard": 5}}]))
    text = draw(st.sampled_from([json.dumps(header)] * 12 + [json.dumps(header).replace('"frames"', '"features"'), json.dumps(header)[:-1], "[" * 100_000,
                                                             "{" + " " * 10**6 + "}"]))
    body = draw(st.sampled_from([bytes(20)] * 4 + [bytes(8), b"", bytes(4000), b"\xff" * 20]))
    return safetensors(text, body, draw(st.sampled_from([None] * 10 + [0, 8, 10**9, 2**63, 2**64 - 1])))


def read_store(path: Path) -> None:
    "What training reads of a store."
    (path.parent / "manifest.json").write_text('{"dim": 3}')
    store = FeatureStore(path.parent.parent)
    store.verify()
    for segment in list(store.view(path.parent.name).place)[:3]: store.segment(segment, path.parent.name).sum()


def read_frames_of(path: Path) -> None:
    shard = FrameShard(path)
    for _ in shard.tables: shard.read(np.arange(min(2, shard.count)))


WEIGHTS = {"read_weights": read_weights, "load_trained": lambda path: load_trained(torch.nn.Linear(3, 2), path),
           "read_lavila": lambda path: read_lavila(path, LaViLaConfig()), "read_shard": read_shard, "read_store": read_store, "frames": read_frames_of}


@cases(400)
@given(data=shards(), read=st.sampled_from(list(WEIGHTS)))
def test_safetensors(tmp_path, data, read):
    attempt(WEIGHTS[read], put(tmp_path / "store" / "full" / "v.safetensors", data), says="v.safetensors")


@cases(60)
@given(data=st.data(), read=st.sampled_from(list(WEIGHTS)))
def test_damaged_safetensors(tmp_path, data, read):
    path = tmp_path / "store" / "full" / "v.safetensors"
    write_shard(path, [("a", torch.ones(2, 3), np.arange(2)), ("b", torch.ones(1, 3), np.arange(1))])
    if read == "frames":
        with open(path, "wb+") as file:
            writer = ShardWriter(file, ["a"], 4)
            writer.append(np.ones((2, 4, 4, 3), np.uint8))
            writer.finish({"a": (np.arange(2), np.arange(2))})
    put(path, data.draw(damaged(path.read_bytes())))
    attempt(WEIGHTS[read], path, says="v.safetensors")


# Tables

CELLS = st.one_of(
    st.sampled_from(["=cmd|' /C calc'!A0", "=HYPERLINK(\"http://a\")", "+1", "-1", "@SUM(1)", "1e400", "nan", "inf", "-inf", "1e300", "-5", "0", "1", "2.5",
                     "١٢", "1_000",
                     "9" * 5000, "x" * 300_000, "", " ", "\t", "\"", "'", "a\"b", "\"open", "a,b", "a\nb", "a\rb", "a\0b", "../../etc/passwd", "..",
                     "/etc/passwd", "..\\..\\a",
                     "C:\\a", "a/../../b", "~root", "$HOME", "%2e%2e%2f", "\u202eevil", "👩‍👩‍👧‍👦", "\ufeffa", "P01_01", "P01_01_0", "00:00:01.00", "99:99:99",
                     "00:00:01",
                     "9" * 40 + ":00:00", "\x1b[31m", "con", "a" * 256, "a|b", "{}", "{0.__class__}", "%s%n"]),
    st.text(max_size=12))
ENCODINGS = st.sampled_from(["utf-8"] * 6 + ["utf-16", "utf-16-le", "utf-8-sig", "latin-1", "utf-32", "cp1252", "shift_jis"])


@st.composite
def tables(draw, columns: dict[str, str]) -> bytes:
    "Two rows of such columns with sound cells, some of them changed; raw, so that quotes need not close."
    names = list(columns)
    rows = [[cell.replace("#", str(row)) for cell in columns.values()] for row in range(2)]
    for _ in range(draw(st.integers(0, 3))):
        cell = draw(CELLS)
        rows[draw(st.integers(0, 1))][draw(st.integers(0, len(names) - 1))] = draw(st.sampled_from([cell, '"' + cell.replace('"', '""') + '"']))
    change = draw(st.sampled_from(["none"] * 4 + ["drop", "twice", "ragged", "short", "rename", "empty", "open", "order"]))
    if change == "drop": names, rows = names[1:], [row[1:] for row in rows]
    if change == "twice": names, rows = [*names, " " + names[0]], [[*row, row[0]] for row in rows]
    if change == "ragged": rows[0] += ["1"] * draw(st.integers(1, 3))
    if change == "short": rows[1] = rows[1][:draw(st.integers(0, len(names)))]
    if change == "rename": names[0] = draw(CELLS)
    if change == "empty": rows = []
    if change == "open": rows[1][0] = '"' + rows[1][0]
    if change == "order": rows.reverse()
    separator = draw(st.sampled_from([",", ",", ",", ",", ";", "\t"]))
    return draw(st.sampled_from(["\n", "\r\n", "\r"])).join(separator.join(row) for row in [names, *rows]).encode(draw(ENCODINGS), "replace")


OWN = dict(segment_id="s#", video_id="v#", start_sec="#", stop_sec="5", verb="cut", noun="onion", narration="", split="train")
EPIC = dict(narration_id="P01_01_#", video_id="P01_01", start_timestamp="00:00:0#.10", stop_timestamp="00:00:09.00", start_frame="#", stop_frame="500",
            narration="cut",
            verb_class="0", noun_class="#")
CLASSES = "id,key\n0,onion\n1,pan\n"


def own_table(folder: Path) -> pd.DataFrame:
    "As extraction will use it: every path is below the folder unless the table names it, and every shard is in its store."
    table = read_csv(folder)
    assert [c for c in table if c not in FOLDER_COLUMNS] == COLUMNS and (table.stop_sec > table.start_sec).all() and np.isfinite(table.stop_sec).all()
    for video in table.video_id:
        assert Path(os.path.normpath(folder / "videos" / video)).is_relative_to(folder)
        assert Path(os.path.normpath(folder / "store" / shard_name(video))).parent == folder / "store"
    if (table.noun != "").any(): read_classes("csv", folder, "noun")
    return table


@cases(400)
@given(data=st.data())
def test_tables(tmp_path, data):
    kind = data.draw(st.sampled_from(["own", "paths", "epic", "classes", "boxes", "plain"]))
    if kind in ("own", "paths"):
        columns = OWN if kind == "own" else {k: v for k, v in OWN.items() if k not in ("segment_id", "video_id", "split")} | dict(video_path="videos/v#.mp4")
        put(tmp_path / "segments.csv", data.draw(tables(columns)))
        attempt(own_table, tmp_path, says="segments.csv")
    elif kind == "epic":
        for word in ("verb", "noun"): put(tmp_path / f"EPIC_100_{word}_classes.csv", CLASSES)
        put(tmp_path / "EPIC_100_train.csv", data.draw(tables(EPIC)))
        attempt(read_epic, tmp_path, says="EPIC_100_train.csv")
    elif kind == "classes":
        attempt(ClassSet.from_epic, put(tmp_path / "noun.csv", data.draw(tables(dict(id="#", key="onion#")))))
    elif kind == "boxes":
        path = put(tmp_path / "boxes.csv", data.draw(tables(dict(segment_id="s#", frame="#", left="1", top="2", right="3", bottom="4"))))
        attempt(read_boxes, path, says="boxes.csv")
    else:
        attempt(read_table, put(tmp_path / "a.csv", data.draw(st.one_of(st.binary(max_size=200), damaged(CLASSES.encode())))), ["id", "key"], says="a.csv")


@cases(120)
@given(lines=st.lists(st.one_of(CELLS, st.sampled_from(["2", "9" * 5000, "0", "1 1"])), max_size=4), encoding=ENCODINGS,
       name=st.sampled_from(["noun_idx.txt", "test_split1.txt", "nouns.txt"]))
def test_lists(tmp_path, lines, encoding, name):
    put(tmp_path / "segments.csv", ",".join(OWN) + "\n" + ",".join(OWN.values()).replace("#", "1"))
    for kind in ("verb", "noun"): put(tmp_path / f"{kind}_idx.txt", "cut 1\ntake 2\n")
    sound = {"noun_idx.txt": "pan {}", "test_split1.txt": "OP01-R01-Pasta-10-20-F{}-F30 1 {} 1", "nouns.txt": "{}"}[name]
    put(tmp_path / name, "\n".join(sound.replace("{}", line) for line in ["1", *lines]).encode(encoding, "replace"))
    attempt({"noun_idx.txt": lambda: read_classes("egtea", tmp_path, "noun"), "test_split1.txt": lambda: read_egtea(tmp_path, "test1"),
             "nouns.txt": lambda: read_classes("csv", tmp_path, "noun")}[name])


# JSON

VALUES = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-10, 10), st.floats(), st.text(max_size=5),
                                st.sampled_from([10**400, -10**30, 1e308, "../..", "/etc", "\0", "x" * 10**5])),
                      lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)), max_leaves=6)
TEXTS = st.sampled_from(["[" * 100_000, '{"a":' * 100_000, "[" * 900 + "]" * 900, "9" * 5000, "1e999", '{"a": 1, "a": 2}', "NaN", '"\\ud800"', "", "\ufeff{}",
                         "null", '{"\\u0000": 0}', "{}", "[]"])


def spoilt(whole: object) -> st.SearchStrategy[bytes]:
    "JSON of which one value was changed, or that is none."
    def places(value, way=()):
        yield way
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, part in items: yield from places(part, (*way, key))

    @st.composite
    def change(draw) -> bytes:
        value = json.loads(json.dumps(whole))
        for _ in range(draw(st.integers(1, 2))):
            *way, last = draw(st.sampled_from([way for way in places(value) if way] or [(None,)]))
            if last is None: break
            part = value
            for key in way: part = part[key]
            if draw(st.booleans()): part[last] = draw(VALUES)
            elif isinstance(part, dict): part[draw(st.text(max_size=5))] = part.pop(last)
            else: part.append(draw(VALUES))
        return json.dumps(value).encode()
    return st.one_of(change(), change(), change(), TEXTS.map(lambda text: text.encode()), damaged(json.dumps(whole).encode()))


EGO4D = {"clips": [dict(clip_uid=f"c{i}", action_idx=i, action_clip_start_sec=0.5, action_clip_end_sec=8.0, action_clip_start_frame=1,
                        action_clip_end_frame=240,
                        verb="cut_(slice)", noun="onion", verb_label=0, noun_label=0, narration_text="C cuts") for i in range(2)]}
CONFIG = asdict(TrainConfig(dataset="csv", encoder="ViT-B-32"))
METRICS = {"results": {"csv": {"noun": {"top1": {"value": 50.0, "low": 40.0, "high": 60.0, "count": 10}}}}, "seed": 0}
MANIFEST = {"dim": 3, "size": 32, "view": "full", "fingerprint": "x"}


@cases(150)
@given(data=st.data())
def test_ego4d(tmp_path, data):
    put(tmp_path / "fho_lta_train.json", data.draw(spoilt(EGO4D)))
    table = attempt(read_ego4d, tmp_path, says="fho_lta_train.json")
    if table is not None: assert all(Path(os.path.normpath(path)).is_relative_to(tmp_path) for path in table.video_path)
    attempt(ClassSet.from_ego4d, tmp_path / "fho_lta_train.json", "noun")
    put(tmp_path / "fho_lta_taxonomy.json", data.draw(spoilt({"nouns": ["onion", "pan_(frying)"], "verbs": ["cut"]})))
    attempt(ClassSet.from_ego4d, tmp_path / "fho_lta_taxonomy.json", "noun")


@cases(200)
@given(data=st.data())
def test_runs(tmp_path, data):
    what = data.draw(st.sampled_from(["config", "metrics", "saved", "history", "profile"]))
    config = data.draw(spoilt(CONFIG)) if what == "config" else json.dumps(CONFIG).encode()
    if what == "saved": config = data.draw(spoilt({"adapters": {"noun": CONFIG, "verb": CONFIG}}))
    put(tmp_path / "config.json", config)
    put(tmp_path / "metrics.json", data.draw(spoilt(METRICS)) if what == "metrics" else json.dumps(METRICS))
    put(tmp_path / "history.csv", data.draw(tables(dict(epoch="#", loss="0.5"))) if what == "history" else "epoch,loss\n1,0.5\n")
    if what == "profile":
        put(tmp_path / "profile.json", data.draw(spoilt({"train": {"epochs": 3}, "features": "features", "gpus": 1})))
        attempt(_changed, Profile("paper", "", str(tmp_path), "features", "runs", "reports", {}, {}, {}, {}, {}, "", 1, 1))
    elif what == "saved":
        attempt(lambda: _one_encoder(tmp_path, found) if (found := _saved(tmp_path)) and all(path.parent == tmp_path for _, path in found.values()) else None)
    else:
        attempt(RunResult.read, tmp_path)


@cases(150)
@given(data=st.data())
def test_stores(tmp_path, data):
    folder, what = tmp_path / "store" / "full", data.draw(st.sampled_from(["manifest", "index", "failures", "frames"]))
    write_shard(folder / "v.safetensors", [("a", torch.ones(2, 3), np.arange(2))])
    size = (folder / "v.safetensors").stat().st_size
    index, line = {"v.safetensors": {"bytes": size, "segments": {"a": 2}}}, dict(segment_id="b", video_id="v", video_path="v.mp4", cause="cut short", bytes=5)
    put(folder / "manifest.json", data.draw(spoilt(MANIFEST)) if what in ("manifest", "frames") else json.dumps(MANIFEST))
    put(folder / "index.json", data.draw(spoilt(index)) if what == "index" else json.dumps(index))
    put(folder / "failures.jsonl", data.draw(spoilt(line)) + b"\n" if what == "failures" else json.dumps(line))

    def use():
        store = FeatureStore(tmp_path / "store")
        for segment in store.view("full").place: store.view("full").rows(segment)
        store.missing(pd.DataFrame(dict(segment_id=["a", "b", "c"])))

    if what == "frames": (folder / "v.safetensors").unlink()
    attempt(FrameStore if what == "frames" else use, *[folder] * (what == "frames"), says="store")


# Submissions

def submission(segments: int = 2, verbs: int = 3, nouns: int = 4) -> dict:
    entry = dict(verb={str(i): 0.5 for i in range(verbs)}, noun={str(i): 0.5 for i in range(nouns)},
                 action={f"{v},{n}": 0.1 for v in range(verbs) for n in range(nouns)})
    return dict(version="0.2", challenge="action_recognition", sls_pt=1, sls_tl=2, sls_td=3, results={f"P01_01_{i}": entry for i in range(segments)})


@cases(150)
@given(data=st.data())
def test_submissions(tmp_path, data):
    text, form = data.draw(spoilt(submission())), data.draw(st.sampled_from(["json", "zip", "zip", "damaged"]))
    path = tmp_path / ("test.json" if form == "json" else "s.zip")
    if form == "json":
        put(path, text)
    else:
        method = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr(data.draw(st.sampled_from(["test.json"] * 4 + ["../test.json", "/test.json", "test.json/"])), text)
        if form == "damaged": put(path, data.draw(damaged(path.read_bytes())))
    attempt(read_submission, path, ["P01_01_0", "P01_01_1"], 3, 4, says=path.name)


@cases(8)
@given(megabytes=st.sampled_from([5, 400]), lie=st.booleans(), byte=st.sampled_from([b" ", b"["]))
def test_submissions_that_unpack_to_more_than_they_should(tmp_path, megabytes, lie, byte):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("test.json", "w") as entry:
        for _ in range(megabytes): entry.write(byte * 2**20)
    content = buffer.getvalue()
    if lie: content = content.replace(struct.pack("<I", megabytes * 2**20), struct.pack("<I", 1000))
    assert attempt(read_submission, put(tmp_path / "s.zip", content), ["P01_01_0"], 3, 4, says="s.zip") is None


# Videos

@pytest.fixture(scope="module")
def film(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("film")
    return {"mp4": write_video(folder / "a.mp4", 30, size=(64, 48)).read_bytes(), "mkv": write_video(folder / "a.mkv", 30, size=(64, 48)).read_bytes(),
            "still": write_video(folder / "b.mp4", 1, size=(64, 48), fps=10_000).read_bytes(),
            "avi": write_video(folder / "c.avi", 3, size=(64, 48), codec="mpeg4").read_bytes()}


BOXES = ["mvhd", "tkhd", "mdhd", "stsd", "stts", "stsz", "stsc", "stco", "ctts", "stss", "elst", "avcC", "moov", "mdat", "ftyp"]


@st.composite
def films(draw, film: dict[str, bytes]) -> tuple[str, bytes]:
    "A file's ending, and what is in it."
    kind = draw(st.sampled_from(["box", "box", "box", "damaged", "mkv", "avi", "text", "still", "noise", "picture"]))
    if kind == "box":  # a number in the header is another one
        content, name = bytearray(film["mp4"]), draw(st.sampled_from(BOXES)).encode()
        at = content.find(name) + 4 + 4 * draw(st.integers(-2, 12))
        content[at:at + 4] = struct.pack(">I", draw(st.sampled_from([0, 1, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1])))
        return ".mp4", bytes(content)
    if kind in ("damaged", "mkv", "avi"):
        whole = film["mp4" if kind == "damaged" else kind]
        return {"damaged": ".mp4", "mkv": ".mkv", "avi": ".avi"}[kind], draw(damaged(whole))
    text = ["#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "ffconcat version 1.0\nfile '/etc/passwd'\n", "no video", "v=0\nc=IN IP4 127.0.0.1\nm=video 5 RTP/AVP 96\n",
            "", "<MPD></MPD>", "\x1b[2J" * 500]
    return {"text": lambda: (draw(st.sampled_from([".mp4", ".m3u8", ".txt", ".sdp", ".mpd"])), draw(st.sampled_from(text)).encode()),
            "still": lambda: (".mp4", film["still"]),
            "noise": lambda: (".mp4", draw(st.binary(max_size=300))), "picture": lambda: (".mp4", b"\x89PNG\r\n\x1a\n" + draw(st.binary(max_size=50)))}[kind]()


@cases(200)
@given(data=st.data())
def test_videos(tmp_path, film, data):
    ending, content = data.draw(films(film))
    path = put(tmp_path / f"a{ending}", content)
    attempt(watch, str(path), "pyav", says=path.name, seconds=20)




def test_videos_in_a_worker(tmp_path, film):
    "decord may die of a file; then its worker does, and the others are read."
    CASES["test_videos_in_a_worker"], found = 60, []

    @settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(content=films(film))
    def draw(content): found.append(put(tmp_path / f"{len(found)}{content[0]}", content[1]))

    draw()
    found.append(put(tmp_path / "sound.mp4", film["mp4"]))
    resource.setrlimit(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS)[1:] * 2)
    with DecodePool(1, timeout=20) as pool:
        items = list(pool.map(watch_in_worker, [SimpleNamespace(path=str(path)) for path in found]))
    done = [item for item in items if item.done]
    TRIED["test_videos_in_a_worker"] = len(done) - 1
    assert len(done) == len(found) and all(isinstance(item.error, DataError | None) for item in done), [item.error for item in done if item.error]
    assert done[-1].error is None


@pytest.mark.parametrize("limit, value, says",
                         [("MOST_PIXELS", 64 * 48 - 1, "64 x 48 pixels"), ("MOST_FRAMES", 20, "more frames than"), ("LONGEST", 1, "seconds apart")])
@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_videos_beyond_the_limits(tmp_path, monkeypatch, film, limit, value, says, backend):
    "A sound file stands for one whose header claims more than any video has."
    monkeypatch.setattr(f"xmic.video.{limit}", value)
    assert attempt(watch, str(put(tmp_path / f"{limit}.mp4", film["mp4"])), backend, says=says) is None


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_a_playlist_names_no_other_file(tmp_path, film, backend):
    put(tmp_path / "secret.mp4", film["mp4"])
    for name, text in (("a.mp4", "ffconcat version 1.0\nfile secret.mp4\n"),
                       ("a.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n")):
        assert attempt(watch, str(put(tmp_path / name, text)), backend, says="no video can be found") is None


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_things_that_are_no_files(tmp_path, backend):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    put(tmp_path / "empty.mp4", b"")
    put(tmp_path / "gap.mp4" / "frame_9999999999.jpg", b"")
    (tmp_path / "odd.mp4" / "frame_0000000001.jpg").mkdir(parents=True)
    for name in ("folder.mp4", "loop.mp4", "pipe.mp4", "empty.mp4", "gap.mp4", "odd.mp4", "x" * 1000 + ".mp4", "a\0b.mp4", "https://127.0.0.1/a.mp4"):
        assert attempt(watch, str(tmp_path / name) if "//" not in name else name, backend) is None


# Names

NAMES = st.one_of(CELLS,
                  st.sampled_from(["x" * 20_000, "ab " * 5000, " | ", "{}", "{name}", "a\u0000", "\ud800", "👩‍👩‍👧‍👦" * 30, "\u202eabc", "ﷺ" * 100,
                                   "a\u0301" * 200, "​", "İ"]), st.text())


class Letters:
    "As much of an encoder as names go through."
    device, fingerprint, dim, context = torch.device("cpu"), "letters", 4, 77

    def encode_text(self, texts):
        import open_clip
        return torch.zeros(len(texts), 4) + open_clip.tokenize(texts)[:, :1]


@cases(200)
@given(names=st.one_of(st.lists(NAMES, max_size=6), st.builds(lambda name: ["pan", name, "knife"], NAMES)),
       template=st.one_of(*[st.just("a photo of a {}")] * 4, NAMES))
def test_names(tmp_path, names, template):
    def use():
        classes = ClassSet.from_names(names)
        classes.labels([*classes.names, *names])
        classes.shared_with(ClassSet.from_names(["pan"]))
        embed_classes(Letters(), classes.prompts(template), tmp_path / "texts")
        repr(classes)
    attempt(use)
    try: ClassSet.from_names(["pan", "knife"]).labels(names)
    except DataError as e: assert len(str(e)) < 3000


def use_names(count: int) -> None:
    names = [f"thing {i} 🍳" for i in range(count)]
    classes, others = ClassSet.from_names(names), ClassSet.from_names([f"other {name}" for name in names[1:]] + names[:1])
    assert [len(part) for part in classes.shared_with(others)] == [1, count - 1]
    assert (classes.labels(names) == np.arange(count)).all()
    with pytest.raises(DataError, match=f"{count:,} rows"): classes.labels([f"thinge {i}" for i in range(count)])
    assert len(classes.prompts("a {}")) == count


def test_fifty_thousand_names():
    use_names(50_000)
    with counted() as few: use_names(2_000)
    with counted() as many: use_names(10_000)
    assert many.calls < 7 * few.calls  # five times the names


@cases(100)
@given(video=st.one_of(CELLS, st.text(max_size=300)).filter(lambda text: "\0" not in text))
def test_shards_stay_in_their_store(tmp_path, video):
    path = tmp_path / "store" / attempt(shard_name, video.encode("utf-8", "ignore").decode())
    assert Path(os.path.normpath(path)).parent == tmp_path / "store" and len(path.name) < 250
    write_shard(path, [(video, torch.ones(1, 2), np.zeros(1))])
    assert list((tmp_path / "store").iterdir()) == [path]
    path.unlink()


def test_there_are_a_thousand_cases():
    assert sum(CASES.values()) >= 1000
