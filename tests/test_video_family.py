"""A family of generated videos, compared with what FFmpeg itself shows: containers, rates, cuts and display matrices.

Chosen files run always; all of them with `XMIC_LONG=1`."""
import os
import re
import subprocess
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from videos import numbered_frame
from xmic.clips import frame_at
from xmic.video import iter_frames, probe, read_frames

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="needs FFmpeg itself (imageio-ffmpeg, of the extra dev)")
SIZE, FRAMES, RATE = (96, 64), 75, 25

CODECS = {"mp4": "libx264", "mov": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "ts": "libx264", "m2ts": "libx264",
          "flv": "libx264", "avi": "mpeg4", "mpg": "mpeg2video", "wmv": "wmv2"}
OTHER_CODECS = {"mp4": ("libx265", "libsvtav1", "mpeg4"), "mkv": ("libx265", "mjpeg"), "avi": ("mjpeg", "libx264")}
EXACT = ("mp4", "mov", "mkv", "webm", "flv", "ts", "m2ts")  # containers with a time stamp for each frame
RATES = {  # the time of frame N in seconds
    "constant": f"N/{RATE}",
    "gap": f"N/{RATE}+if(gte(N,30),3,0)",
    "slow": "if(lt(N,40),N/50,0.8+(N-40)*0.5)",
    "jitter": f"N/{RATE}+0.012*mod(7*N,3)",
    "drops": f"(N+floor(N/7))/{RATE}",
    "still": f"N/{RATE}+if(eq(N,{FRAMES - 1}),4,0)",
}
SOUNDS = {  # seconds by which the picture and the sound start later, and the length of the sound
    "none": None, "together": (0, 0, 3), "late picture": (0.5, 0, 3), "late sound": (0, 0.7, 3), "long sound": (0, 0, 6)}
CUTS = {  # of a finished file, without encoding it again
    "none": (), "copied from 1.3 s": ("-ss", "1.3"), "copied to 1.9 s": ("-t", "1.9")}
NEGATIVE = ("-avoid_negative_ts", "disabled", "-output_ts_offset", "-0.6")
MATRICES = [(turn, *flips) for turn in (0, 90, 180, 270) for flips in ((), ("h",), ("v",))]


class Case(NamedTuple):
    container: str
    codec: str
    rate: str = "constant"
    sound: str = "none"
    cut: str = "none"
    matrix: tuple = (0,)
    negative: bool = False
    b_frames: int = 2

    def __str__(self) -> str:
        turn = "" if self.matrix == (0,) else f"turn {''.join(map(str, self.matrix))}"
        parts = [self.codec, self.rate, *(x for x in (self.sound, self.cut) if x != "none"), turn, "negative" * self.negative, f"b{self.b_frames}"]
        return f"{self.container} {' '.join(filter(None, parts))}"


def all_cases() -> list[Case]:
    cases = [Case(container, codec) for container, codec in CODECS.items()]
    cases += [Case(container, codec) for container, codecs in OTHER_CODECS.items() for codec in codecs]
    cases += [Case(container, CODECS[container], rate, b_frames=b) for container, rate, b in product(EXACT, RATES, (0, 2))]
    cases += [Case(container, CODECS[container], rate, sound) for container, rate, sound in product(("mp4", "mov", "mkv", "ts"), ("constant", "gap"), SOUNDS)]
    cases += [Case(container, CODECS[container], rate, sound, cut)
              for container, rate, sound, cut in product(("mp4", "mov", "mkv"), ("constant", "gap"), ("none", "together"), CUTS)]
    cases += [Case(container, CODECS[container], rate, matrix=matrix)
              for container, rate, matrix in product(("mp4", "mov", "mkv"), ("constant", "gap"), MATRICES)]
    cases += [Case(container, CODECS[container], rate, negative=True) for container, rate in product(("mkv", "mp4"), ("constant", "gap"))]
    return list(dict.fromkeys(cases))


ALL = all_cases()
CHOSEN = [case for number, case in enumerate(ALL) if number < 17 or number % 8 == 3]


def ffmpeg(*arguments: object, stdin: bytes | None = None) -> tuple[bytes, str]:
    done = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin" if stdin is None else "-y", "-y", *map(str, arguments)],
                          input=stdin, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout, done.stderr.decode(errors="replace")


RAW = b"".join(numbered_frame(i, SIZE).tobytes() for i in range(FRAMES))


def make(case: Case, folder: Path) -> Path:
    path = folder / f"made.{case.container}"
    late = SOUNDS[case.sound]
    picture = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "{}x{}".format(*SIZE), "-r", RATE, *(("-itsoffset", late[0]) if late else ()), "-i", "-"]
    sound = ["-itsoffset", late[1], "-f", "lavfi", "-t", late[2], "-i", "sine=frequency=440:sample_rate=44100"] if late else []
    timing = ["-vf", f"settb=1/50000,setpts='round(({RATES[case.rate]}+{late[0] if late else 0})/TB)'", "-fps_mode", "passthrough",
              "-enc_time_base", "1:1000" if case.container in EXACT and case.codec != "mpeg4" else f"1:{RATE}"]
    quality = ["-pix_fmt", "yuvj420p" if case.codec == "mjpeg" else "yuv420p", "-g", 12]
    if case.codec in ("libx264", "mpeg4", "mpeg2video"): quality += ["-bf", case.b_frames]
    if case.codec in ("libx264", "libx265"): quality += ["-preset", "veryfast"]
    if case.codec not in ("libx264", "libx265", "libsvtav1", "libvpx-vp9"): quality += ["-q:v", 3]
    ffmpeg(*picture, *sound, *timing, "-c:v", case.codec, *quality, *(NEGATIVE if case.negative else ()), path, stdin=RAW)
    if case.cut != "none":
        path, whole = folder / f"cut.{case.container}", path
        ffmpeg(*CUTS[case.cut], "-i", whole, "-map", 0, "-c", "copy", path)
    if case.matrix != (0,):
        path, plain = folder / f"turned.{case.container}", path
        turn, *flips = case.matrix
        ffmpeg("-display_rotation", turn, *(f"-display_{flip}flip" for flip in flips), "-i", plain, "-c", "copy", path)
    return path


def shown_by_ffmpeg(path: Path) -> tuple[np.ndarray, np.ndarray]:  # (N,) seconds from the file's start, (N, H, W, 3)
    "Of frames with one time stamp the last."
    raw, log = ffmpeg("-i", path, "-map", "0:v:0", "-fps_mode", "passthrough", "-vf", "showinfo", "-pix_fmt", "rgb24", "-f", "rawvideo", "-",
                      "-map", "0:a?", "-map", "0:v:0", "-c", "copy", "-f", "null", os.devnull)  # so that it counts from where the sound starts, too
    stamps = [(float(m[1]), *map(int, m.groups()[1:])) for m in re.finditer(r"pts_time:\s*(\S+).* s:(\d+)x(\d+)", log)]
    width, height = stamps[0][1:]
    images = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
    assert len(images) == len(stamps)
    times = np.array([stamp[0] for stamp in stamps])
    back = np.r_[0, np.flatnonzero(np.diff(times) < 0) + 1][-1]  # times before zero, which Matroska cannot say and FFmpeg makes up
    times, images = times[back:], images[back:]
    last = np.r_[np.diff(times) > 0, True]
    return times[last], images[last]


@pytest.fixture(scope="module", params=ALL if os.environ.get("XMIC_LONG") else CHOSEN, ids=str)
def video(request, tmp_path_factory):
    path = make(request.param, tmp_path_factory.mktemp("family"))
    return request.param, path, *shown_by_ffmpeg(path)


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_frames_are_those_that_ffmpeg_shows(video, backend):
    case, path, times, images = video
    info = probe(path, backend)
    assert info.frames == len(times) and (info.height, info.width) == images.shape[1:3]
    alike = lambda found, number: np.abs(found.astype(int) - images[number].astype(int)).mean() < 1.5
    rng = np.random.default_rng(0)
    for indices in ([0], [info.frames - 1], rng.integers(0, info.frames, 5), np.arange(info.frames)):
        assert all(map(alike, read_frames(path, indices, backend), indices))
    for chunk in (4, 16, 100):
        for indices in (np.arange(3, info.frames, 2), np.arange(info.frames // 2, info.frames)):
            assert all(alike(image, number) for numbers, part in iter_frames(path, indices, chunk, backend) for number, image in zip(numbers, part))


def test_times_are_those_of_ffmpeg(video):
    case, path, times, _ = video
    info = probe(path)
    interval = np.median(np.diff(times))
    if case.container == "avi":  # no times of its own
        times = times - times[0]
    if abs(times[0]) < interval / 2:
        times = times - times[0]
    assert info.times == pytest.approx(times, abs=1.1e-3)
    assert info.end >= times[-1] + 0.01 and (case.rate != "still" or case.container not in ("mp4", "mov") or info.end == pytest.approx(times[-1] + 0.04, abs=0.05))
    if case.sound == "long sound": assert info.end > 5.9
    for t in np.random.default_rng(1).uniform(times[0], times[-1], 50):
        if np.abs(times - t).min() < 2e-3 or info.constant and np.abs(times + interval / 2 - t).min() < 2e-3:
            continue
        latest = np.searchsorted(times, t, "right") - 1
        assert frame_at(t, info) == (np.abs(times - t).argmin() if info.constant else latest)


def test_the_family_is_large():
    assert len(ALL) >= 200 and len(CHOSEN) >= 40
