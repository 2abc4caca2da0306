"""Small videos whose frames carry their own number, so that a test can tell which frame it was given."""
import os
import signal
import struct
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Sequence

import av
import numpy as np

BITS = 16


def numbered_frame(number: int, size: tuple[int, int] = (160, 120)) -> np.ndarray:
    "A uint8 (H, W, 3) frame: the number as 8 x 2 black and white blocks above, a moving pattern of colours below."
    width, height = size
    frame = np.empty((height, width, 3), np.uint8)
    bits = (number >> np.arange(BITS)) & 1
    rows, columns = np.arange(height // 2) * 4 // height, np.arange(width) * 8 // width
    frame[:height // 2] = np.where(bits[rows[:, None] * 8 + columns], 220, 30)[..., None]
    y, x = np.mgrid[height // 2:height, :width]
    waves = [np.sin(x / 9 + number / 5), np.cos(y / 7 - number / 4), np.sin((x + y) / 11 + number / 3)]
    frame[height // 2:] = np.stack([128 + 90 * wave for wave in waves], -1)
    return frame


def number_of(frame: np.ndarray) -> int:
    "The number that a decoded frame carries."
    top = frame[:frame.shape[0] // 2].astype(float).mean(-1)
    blocks = [block for row in np.array_split(top, 2) for block in np.array_split(row, 8, axis=1)]
    middles = [block[block.shape[0] // 4:-block.shape[0] // 4, block.shape[1] // 4:-block.shape[1] // 4] for block in blocks]
    return sum(int(middle.mean() > 125) << i for i, middle in enumerate(middles))


def numbers_of(frames: np.ndarray) -> list[int]:
    "The numbers that decoded frames (T, H, W, 3) carry."
    return [number_of(frame) for frame in frames]


def write_video(
    path: str | Path,  # the suffix chooses the container: .mp4, .mkv
    frames: int = 60,
    fps: float = 25,
    size: tuple[int, int] = (160, 120),  # width, height
    b_frames: int = 2,
    gop: int = 12,  # frames from one keyframe to the next
    variable: bool = False,  # irregular distances between the frames, 20 to 120 ms
    codec: str = "libx264",
    images: Sequence[np.ndarray] | None = None,  # instead of the numbered frames
    faststart: bool = True,  # the index in front, so that a file that is cut short still opens
    open_gop: bool = False,  # pictures may refer to the keyframe behind them
    color: int | None = None,  # colour matrix written into the stream, 1 = BT.709
    title: str = "",  # in the metadata of the file
) -> Path:
    "Writes a video without sound and gives its path."
    path = Path(path)
    images = images if images is not None else (numbered_frame(i, size) for i in range(frames))
    steps = np.random.default_rng(0).choice([20, 40, 120], frames) if variable else None
    x26 = f"open-gop={int(open_gop)}:keyint={gop}:bframes={b_frames}:scenecut=0"
    options = {"libx264": {"preset": "veryfast", "crf": "20", "x264-params": f"{x26}:threads=1:sync-lookahead=0"},
               "libx265": {"preset": "veryfast", "x265-params": f"{x26}:log-level=error"}}.get(codec, {})
    movflags = {"movflags": "faststart"} if faststart and path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=movflags) as container:
        if title: container.metadata["title"] = title
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options={**options, "g": str(gop)})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.thread_count = 1
        if color: stream.codec_context.colorspace = color
        if variable: stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if variable: frame.pts, frame.time_base = int(steps[:i].sum()), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_jpegs(folder: str | Path, frames: int = 20, size: tuple[int, int] = (160, 120)) -> Path:
    "Writes a folder `frame_0000000001.jpg` ... of numbered frames: the first file carries 0."
    from PIL import Image
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(frames):
        Image.fromarray(numbered_frame(i, size)).save(folder / f"frame_{i + 1:010d}.jpg", quality=92)
    return folder


def cut_short(path: str | Path, share: float = 0.5) -> Path:
    "Keeps the first `share` of the file's bytes."
    path = Path(path)
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * share)])
    return path


def overwrite(path: str | Path, start: float, stop: float, seed: int = 0) -> Path:
    "Replaces the bytes between two shares of the file by noise."
    path = Path(path)
    content = bytearray(path.read_bytes())
    a, b = int(len(content) * start), int(len(content) * stop)
    content[a:b] = np.random.default_rng(seed).bytes(b - a)
    path.write_bytes(content)
    return path


def remux(source: str | Path, path: str | Path, drop: int = 0, hide: float = 0.0) -> Path:
    "Copies the packets without the first `drop`; the first `hide` seconds are hidden by an edit list, as in a cut without re-encoding."
    with av.open(str(source)) as old, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        shift = round(hide / stream.time_base)
        for number, packet in enumerate(p for p in old.demux(stream) if p.dts is not None):
            if number >= drop:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                new.mux(packet)
    return Path(path)


def trim_end(path: str | Path, seconds: float) -> Path:
    "Makes the edit list of an MP4 end after `seconds`, as telephones do when they trim; all packets stay."
    content = bytearray(Path(path).read_bytes())
    at = content.index(b"elst") + 12
    content[at:at + 4] = struct.pack(">I", round(seconds * 1000))
    Path(path).write_bytes(content)
    return Path(path)


def turn(path: str | Path) -> Path:
    "Writes a quarter turn into the header of an MP4, as telephones held upright do."
    one = 1 << 16
    plain, quarter = (struct.pack(">9i", *m, 1 << 30) for m in ((one, 0, 0, 0, one, 0, 0, 0), (0, one, 0, -one, 0, 0, 0, 0)))
    content = Path(path).read_bytes()
    at = content.index(plain, content.index(b"tkhd"))
    Path(path).write_bytes(content[:at] + quarter + content[at + 36:])
    return Path(path)


def count(task: int):
    "A task: as many numbers."
    yield from range(task)


def wait_or_write(task: tuple[str, str]):
    "Makes forty chunks and then a file, or waits for that file."
    what, path = task
    if what == "write":
        yield from range(40)
        Path(path).touch()
        return
    until = time.monotonic() + 60
    while not Path(path).exists() and time.monotonic() < until: time.sleep(0.05)
    yield "the other is made" if Path(path).exists() else "the other was never begun"


def large(task: int):
    "A task that writes down what it has made: (file, number of chunks of 1 MB)."
    path, chunks = task
    for number in range(chunks):
        Path(path).write_text(str(number + 1))
        yield np.full(1 << 20, number, np.uint8)


def misbehave(task: str):
    "A task that yields its process id, and then does what it is told."
    yield os.getpid()
    if task == "hang":
        time.sleep(1000)
    if task == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task == "bug":
        raise KeyError("a bug")
    if task == "torch":
        yield "torch" in sys.modules
    yield task


def watch(path: str, backend: str) -> None:
    "Reads of a video what extraction and the recogniser read."
    from xmic.video import frame_times, iter_frames, probe, read_frames
    info = probe(path, backend)
    assert 0 < info.duration < 1e7 and info.frames == len(frame_times(path, backend))
    read_frames(path, np.linspace(0, info.frames - 1, 4).astype(int), backend)
    for _ in iter_frames(path, np.arange(min(info.frames, 40)), 16, backend): pass


def watch_in_worker(task):
    watch(task.path, "decord")
    yield task.path


def add_sound(
    source: str | Path,
    path: str | Path,  # the suffix chooses the container
    codec: str = "aac",
    late: float = 0.0,  # seconds by which the pictures begin behind the sound
    seconds: float = 6.0,  # of sound
    streams: int = 1,
    rate: int = 44_100,
) -> Path:
    "Copies the pictures and adds sound: silence with a beep of 0.1 s at each whole second of the pictures' time."
    time = np.arange(round(seconds * rate)) / rate - late
    beeps = np.where((time % 1 < 0.1) & (time > -0.05), np.sin(2 * np.pi * 1000 * time), 0).astype(np.float32)
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        before = old.streams.video[0]
        pictures = new.add_stream_from_template(before)
        sounds = [new.add_stream(codec, rate=rate, layout="mono") for _ in range(streams)]
        for packet in old.demux(before):
            if packet.dts is None: continue
            shift = round(late / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, pictures
            new.mux(packet)
        for sound in sounds:
            frame = av.AudioFrame.from_ndarray(beeps[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, 0
            new.mux(sound.encode(frame))
            new.mux(sound.encode())
    return Path(path)


def beeps_of(path: str | Path, stream: int = 0) -> np.ndarray:
    "When the beeps of `add_sound` begin, in seconds from the first picture."
    with av.open(str(path)) as container:
        pictures = container.streams.video[0]
        begin = min(packet.pts for packet in container.demux(pictures) if packet.size and not packet.is_discard) * float(pictures.time_base)
    heard: list[tuple[float, np.ndarray]] = []
    with av.open(str(path)) as container:
        for frame in container.decode(container.streams.audio[stream]):
            sound = frame.to_ndarray().astype(float)
            sound = sound[0] if frame.format.is_planar else sound[0, ::len(frame.layout.channels)]
            heard.append((frame.pts * float(frame.time_base), np.abs(sound) / (1.0 if frame.format.name.startswith("flt") else np.iinfo(frame.to_ndarray().dtype).max)))
    times = np.concatenate([start + np.arange(len(sound)) / frame.sample_rate for start, sound in heard])
    loud = times[np.concatenate([sound for _, sound in heard]) > 0.3]
    return loud[np.r_[True, np.diff(loud) > 0.3]] - begin
