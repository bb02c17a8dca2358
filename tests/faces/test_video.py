"""qafe/faces/video.py: the right frames at the right times, from real files of every kind, and one-line errors."""

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from qafe.errors import ConfigError, MediaError
from qafe.faces import video
from qafe.faces.video import Video

HEIGHT, WIDTH = 48, 64
UNEVEN_MS = (0, 33, 67, 100, 200, 220, 240, 500, 520, 560, 700, 1000)
ROTATIONS = {
    90: (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30),
    180: (-65536, 0, 0, 0, -65536, 0, 0, 0, 1 << 30),
    270: (0, -65536, 0, 65536, 0, 0, 0, 0, 1 << 30),
    45: (46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30),
}


def picture(number: int, shape: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """RGB: eight blocks spell the number in binary on a bluish ground, so that a codec's losses do not matter."""
    image = np.full((*shape, 3), (0, 0, 80), np.uint8)
    for bit in range(8):
        if number >> bit & 1:
            image[:16, bit * 8 : bit * 8 + 8] = (240, 240, 240)
    image[40:, :16] = (230, 20, 20)
    return image


def number_of(image: np.ndarray) -> int:
    return sum(1 << bit for bit in range(8) if image[4:12, bit * 8 + 2 : bit * 8 + 6].mean() > 130)


def numbers(recording: Video, every: int = 1) -> list[int]:
    return [number_of(frame) for _, frame in recording.frames(every)]


def write_cv(path: Path, count: int, hz: float = 30, codec: str = "mp4v") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), hz, (WIDTH, HEIGHT))
    for number in range(count):
        writer.write(cv2.cvtColor(picture(number), cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def write_av(
    path: Path, times_ms: Sequence[float], codec: str = "mpeg4", hz: int | None = None, **options: str
) -> Path:
    """A file with a frame at each time, ticking in milliseconds or, with hz, in frames."""
    av = pytest.importorskip("av")
    tick = Fraction(1, hz or 1000)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=hz or 30, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = tick
        if "aspect" in options:
            stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for number, time_ms in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = round(Fraction(time_ms) / 1000 / tick), tick
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def write_folder(folder: Path, count: int, suffix: str = ".png") -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        cv2.imwrite(str(folder / f"img_{number}{suffix}"), cv2.cvtColor(picture(number), cv2.COLOR_RGB2BGR))
    return folder


def patch(path: Path, tag: bytes, offset: int, data: bytes) -> Path:
    """Overwrites data behind a tag of an mp4 (offset counts from the tag's end)."""
    whole = bytearray(path.read_bytes())
    at = whole.index(tag) + len(tag) + offset
    whole[at : at + len(data)] = data
    path.write_bytes(whole)
    return path


def refused(match: str, path: Path, **settings: Any) -> None:
    """Making a Video fails with one line that names the place and ends with a next step."""
    with pytest.raises(MediaError, match=match) as caught:
        Video(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert message.endswith(".")


# ---------------------------------------------------------------- frames and times


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "mp4v"), ("a.MOV", "mp4v"), ("a.mkv", "mp4v"), ("a.AVI", "MJPG")]
)
def test_constant_rate(tmp_path: Path, name: str, codec: str) -> None:
    recording = Video(write_cv(tmp_path / name, 60, codec=codec))
    assert len(recording) == 60
    assert (recording.height_px, recording.width_px, recording.rotation_deg) == (HEIGHT, WIDTH, 0)
    assert recording.source_hz == pytest.approx(30, abs=0.03)
    assert recording.hz == recording.source_hz
    assert not recording.variable_rate
    assert recording.duration_s == pytest.approx(2, abs=2e-3)
    assert recording.times_s is not None
    assert recording.times_s.dtype == np.float64
    np.testing.assert_allclose(recording.times_s, np.arange(60) / 30, atol=1e-3)
    assert recording.notes == ()
    frames = list(recording.frames())
    assert [index for index, _ in frames] == list(range(60))
    assert all(frame.shape == (HEIGHT, WIDTH, 3) and frame.dtype == np.uint8 for _, frame in frames)
    assert numbers(recording) == list(range(60))


def test_frames_are_rgb_and_read_only(tmp_path: Path) -> None:
    recording = Video(write_cv(tmp_path / "a.mp4", 3))
    _, frame = next(recording.frames())
    np.testing.assert_allclose(frame[44, 6], [230, 20, 20], atol=25)
    with pytest.raises(ValueError, match="read-only"):
        frame[0, 0] = 0


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.avi", "a.webm"])
def test_variable_rate(tmp_path: Path, name: str) -> None:
    codec = "libvpx" if name.endswith("webm") else "mpeg4"
    recording = Video(write_av(tmp_path / name, UNEVEN_MS, codec))
    assert recording.variable_rate
    assert recording.times_s is not None
    np.testing.assert_allclose(recording.times_s * 1000, UNEVEN_MS, atol=0.6)
    assert numbers(recording) == list(range(12))
    assert recording.notes == ("variable frame rate (20 to 300 ms between frames, 34 ms in the median)",)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_times_start_at_zero(tmp_path: Path, name: str) -> None:
    recording = Video(write_av(tmp_path / name, [500 + time for time in UNEVEN_MS]))
    assert recording.times_s is not None
    np.testing.assert_allclose(recording.times_s * 1000, UNEVEN_MS, atol=0.6)


@pytest.mark.parametrize(
    ("name", "codec", "frames_without"),
    [("a.avi", "mpeg4", 1), ("a.avi", "libx264", 2), ("a.mpg", "mpeg2video", 1), ("a.mpeg", "mpeg1video", 1)],
)
def test_last_frames_without_timestamps(tmp_path: Path, name: str, codec: str, frames_without: int) -> None:
    path = write_av(tmp_path / name, np.arange(60) * 40, codec, hz=25, bf="2")
    recording = Video(path)
    assert recording.notes == (f"the last frames have no timestamps ({frames_without} of them), gone on at 25.00 Hz",)
    assert recording.times_s is not None
    np.testing.assert_allclose(recording.times_s, np.arange(60) / 25, atol=1e-3)
    assert numbers(recording) == list(range(60))


@pytest.mark.parametrize(
    ("name", "codec"), [("a.wmv", "wmv2"), ("a.m4v", "mpeg4"), ("a.MTS", "libx264"), ("a.m2ts", "libx264")]
)
def test_further_containers(tmp_path: Path, name: str, codec: str) -> None:
    recording = Video(write_av(tmp_path / name, np.arange(30) * 40, codec, hz=25))
    assert recording.source_hz == pytest.approx(25, abs=0.03)
    assert numbers(recording) == list(range(30))
    assert recording.notes == ()


def test_path_with_spaces_and_unicode(tmp_path: Path) -> None:
    path = write_cv(tmp_path / "Pä tient 1" / "lächeln é.mp4", 5)
    assert numbers(Video(path)) == list(range(5))


def test_relative_path_that_looks_like_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cv(tmp_path / "http:visit.mp4", 5)
    monkeypatch.chdir(tmp_path)
    assert len(Video(Path("http:visit.mp4"))) == 5


@pytest.mark.parametrize("turn_deg", [90, 180, 270])
def test_rotation_metadata(tmp_path: Path, turn_deg: int) -> None:
    path = write_cv(tmp_path / "a.mp4", 6)
    as_stored = [frame for _, frame in Video(path).frames()]
    patch(path, b"tkhd", 40, struct.pack(">9i", *ROTATIONS[turn_deg]))
    recording = Video(path)
    assert recording.rotation_deg == turn_deg
    assert recording.notes == (f"rotated by {turn_deg} degrees as its metadata say, shown upright",)
    assert (recording.height_px, recording.width_px) == ((HEIGHT, WIDTH) if turn_deg == 180 else (WIDTH, HEIGHT))
    for (_, frame), stored in zip(recording.frames(), as_stored, strict=True):
        np.testing.assert_array_equal(frame, np.rot90(stored, -turn_deg // 90))


def test_a_turn_that_is_no_quarter_turn_is_told(tmp_path: Path) -> None:
    path = patch(write_cv(tmp_path / "a.mp4", 6), b"tkhd", 40, struct.pack(">9i", *ROTATIONS[45]))
    recording = Video(path)
    assert recording.rotation_deg == 0
    assert recording.notes == ("its metadata ask for a turn by 45 degrees, only quarter turns are done",)
    assert numbers(recording) == list(range(6))


def test_pixels_that_are_not_square_are_told(tmp_path: Path) -> None:
    recording = Video(write_av(tmp_path / "a.mp4", np.arange(10) * 40, hz=25, aspect="4:3"))
    assert recording.notes == ("its pixels are not square (4:3), frames are given as stored",)


def test_given_rate_replaces_timestamps(tmp_path: Path) -> None:
    recording = Video(write_av(tmp_path / "a.mkv", UNEVEN_MS), source_hz=10)
    assert recording.source_hz == recording.hz == 10
    assert not recording.variable_rate
    np.testing.assert_allclose(recording.times_s, np.arange(12) / 10)
    assert recording.duration_s == pytest.approx(1.2)
    assert any("own timestamps say" in note and "read at 10 Hz as given" in note for note in recording.notes)
    assert Video(write_cv(tmp_path / "b.mp4", 10), source_hz=30).notes == ()


# ---------------------------------------------------------------- resampling, trim, every


def test_30_to_25_hz(tmp_path: Path) -> None:
    recording = Video(write_cv(tmp_path / "a.mp4", 30), resample_hz=25)
    # One second; 40 ms steps over 33.3 ms frames leave out every sixth frame's turn.
    expected = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 18, 19, 20, 21, 22, 24, 25, 26, 27, 28]
    assert len(recording) == 25
    assert numbers(recording) == expected
    assert recording.hz == 25
    assert recording.source_hz == pytest.approx(30)
    np.testing.assert_allclose(recording.times_s, np.arange(25) / 25)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_variable_rate_to_25_hz(tmp_path: Path, name: str) -> None:
    recording = Video(write_av(tmp_path / name, UNEVEN_MS), resample_hz=25)
    # Shown at 0, 40, 80, ... ms; the last frame (1000 ms) lasts one usual interval (35 ms).
    expected = [0, 1, 2, 3, 3, 4, 6, 6, 6, 6, 6, 6, 6, 8, 9, 9, 9, 9, 10, 10, 10, 10, 10, 10, 10, 11]
    assert numbers(recording) == expected


def test_10_to_25_hz_decodes_each_frame_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Video(write_cv(tmp_path / "a.avi", 10, hz=10, codec="MJPG"), resample_hz=25)
    converted: list[int] = []
    convert = cv2.cvtColor
    monkeypatch.setattr(video.cv2, "cvtColor", lambda *args: (converted.append(1), convert(*args))[1])
    frames = list(recording.frames())
    assert len(converted) == 10
    # 0, 40, 80 | 120, 160 | 200, 240, 280 | 320, 360 ms ...
    assert [number_of(frame) for _, frame in frames] == [
        source for pair in range(5) for source in (2 * pair,) * 3 + (2 * pair + 1,) * 2
    ]


def test_same_rate_keeps_every_frame_despite_rounded_times(tmp_path: Path) -> None:
    recording = Video(write_cv(tmp_path / "a.mkv", 90), resample_hz=30)
    assert numbers(recording) == list(range(90))


def test_trim(tmp_path: Path) -> None:
    path = write_cv(tmp_path / "a.mp4", 60)
    recording = Video(path, start_s=0.5, end_s=1.0)
    assert numbers(recording) == list(range(15, 30))
    np.testing.assert_allclose(recording.times_s, np.arange(15, 30) / 30)
    assert recording.duration_s == pytest.approx(0.5)
    assert numbers(Video(path, start_s=1.9)) == [57, 58, 59]
    assert numbers(Video(path, end_s=0.1)) == [0, 1, 2]


def test_trim_with_rounded_times(tmp_path: Path) -> None:
    # Frame 20 is at 666.7 ms, which Matroska writes as 667.
    recording = Video(write_cv(tmp_path / "a.mkv", 60), start_s=20 / 30, end_s=23 / 30)
    assert numbers(recording) == [20, 21, 22]


def test_trim_and_resample(tmp_path: Path) -> None:
    recording = Video(write_cv(tmp_path / "a.mp4", 60), start_s=0.55, end_s=0.75, resample_hz=10)
    # 0.55 s is within frame 16 (0.533), 0.65 within 19 (0.633).
    assert numbers(recording) == [16, 19]
    np.testing.assert_allclose(recording.times_s, [0.55, 0.65])
    assert recording.duration_s == pytest.approx(0.2)


@pytest.mark.parametrize("memory_mb", [0, 512])
@pytest.mark.parametrize("hz", [None, 10])
def test_a_part(tmp_path: Path, memory_mb: int, hz: float | None) -> None:
    whole = Video(write_cv(tmp_path / "a.mp4", 60), start_s=0.5, end_s=1.5, resample_hz=hz, memory_mb=memory_mb)
    shown = numbers(whole)
    part = whole.part(2, 6)
    for _ in range(2):
        assert [(index, number_of(frame)) for index, frame in part.frames()] == list(enumerate(shown[2:7]))
    assert [index for index, _ in part.frames(3)] == [0, 3, 4]
    assert (len(part), part.hz, part.source_hz) == (5, whole.hz, whole.source_hz)
    assert whole.hz is not None
    assert part.duration_s == pytest.approx(5 / whole.hz)
    np.testing.assert_allclose(part.times_s, 0.5 + np.arange(2, 7) / whole.hz)
    assert numbers(whole) == shown
    assert whole.duration_s == pytest.approx(1)


def test_end_beyond_the_recording_is_told(tmp_path: Path) -> None:
    recording = Video(write_cv(tmp_path / "a.mp4", 30), end_s=60)
    assert len(recording) == 30
    assert recording.duration_s == pytest.approx(1)
    assert recording.notes == ("end_s is 60 s, and the recording ends at 1.000 s",)


@pytest.mark.parametrize(("every", "indices"), [(1, range(10)), (3, [0, 3, 6, 9]), (4, [0, 4, 8, 9]), (99, [0, 9])])
def test_every(tmp_path: Path, every: int, indices: Sequence[int]) -> None:
    recording = Video(write_cv(tmp_path / "a.mp4", 20), start_s=0.3, end_s=19 / 30, memory_mb=0)
    got = [(index, number_of(frame)) for index, frame in recording.frames(every)]
    assert got == [(index, index + 9) for index in indices]


def test_every_below_one(tmp_path: Path) -> None:
    recording = Video(write_cv(tmp_path / "a.mp4", 5))
    with pytest.raises(ConfigError, match="every must be at least 1, got 0"):
        recording.frames(0)


# ---------------------------------------------------------------- passes and memory


@pytest.mark.parametrize("make", [lambda path: write_cv(path / "a.mp4", 20), lambda path: write_folder(path / "f", 20)])
def test_a_pass_from_memory_equals_one_from_disk(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    from_disk, from_memory = Video(path, memory_mb=0), Video(path)
    passes = [list(source.frames()) for source in (from_disk, from_disk, from_memory, from_memory)]
    for one in passes[1:]:
        assert [index for index, _ in one] == list(range(20))
        np.testing.assert_array_equal(np.stack([f for _, f in one]), np.stack([f for _, f in passes[0]]))
    assert all(first is second for (_, first), (_, second) in zip(passes[2], passes[3], strict=True))
    assert not any(first is second for (_, first), (_, second) in zip(passes[0], passes[1], strict=True))
    moved = path.rename(tmp_path / "elsewhere")
    assert [index for index, _ in from_memory.frames(7)] == [0, 7, 14, 19]
    with pytest.raises(MediaError):
        next(from_disk.frames())
    assert moved.exists()


def test_only_a_complete_pass_that_fits_is_kept(tmp_path: Path) -> None:
    path = write_cv(tmp_path / "a.mp4", 120)
    assert 120 * HEIGHT * WIDTH * 3 > 2**20
    recording = Video(path, memory_mb=1)
    assert len(list(recording.frames())) == 120
    path.rename(tmp_path / "b.mp4")
    with pytest.raises(MediaError):
        next(recording.frames())

    recording = Video(tmp_path / "b.mp4")
    next(recording.frames())
    list(recording.frames(2))
    (tmp_path / "b.mp4").rename(path)
    with pytest.raises(MediaError):
        next(recording.frames())


def test_passes_side_by_side(tmp_path: Path) -> None:
    recording = Video(write_cv(tmp_path / "a.mp4", 20))
    pairs = [
        (number_of(one), number_of(other))
        for (_, one), (_, other) in zip(recording.frames(), recording.frames(), strict=True)
    ]
    assert pairs == [(number, number) for number in range(20)]


@pytest.mark.parametrize(("count", "match"), [(12, "first 20 and now 12"), (25, "first 20 and now more than 20")])
def test_file_that_changed_between_passes(tmp_path: Path, count: int, match: str) -> None:
    path = write_cv(tmp_path / "a.avi", 20, codec="MJPG")
    recording = Video(path)
    write_cv(path, count, codec="MJPG")
    with pytest.raises(MediaError, match=f"same frames each time.*{match}"):
        list(recording.frames())


def test_file_that_changed_its_size(tmp_path: Path) -> None:
    path = write_cv(tmp_path / "a.mp4", 6)
    recording = Video(path)
    patch(path, b"tkhd", 40, struct.pack(">9i", *ROTATIONS[90]))
    with pytest.raises(MediaError, match=r"must be 48x64 px RGB, got 64x48 px for frame 0"):
        list(recording.frames())


# ---------------------------------------------------------------- damaged and wrong files


def test_missing_file(tmp_path: Path) -> None:
    refused("there is none at", tmp_path / "none.mp4")


def test_unknown_suffix(tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    path.write_text("text")
    refused(r"must end in one of \.mp4, .* got \.txt", path)


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.touch()
    refused("must not be empty, got 0 bytes", path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path: Path) -> None:
    path = write_cv(tmp_path / "a.mp4", 3)
    path.chmod(0)
    refused("must be readable, got Permission denied", path)


def test_text_named_mp4(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("not a video\n" * 100)
    refused("pictures that FFmpeg can decode, found none", path)


def test_mp4_without_its_end(tmp_path: Path) -> None:
    path = write_cv(tmp_path / "a.mp4", 60)
    path.write_bytes(path.read_bytes()[:-600])
    refused("pictures that FFmpeg can decode, found none", path)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "aac"), ("a.mkv", "pcm_s16le")])
def test_audio_only(tmp_path: Path, name: str, codec: str) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / name
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), format="s16", layout="mono")
        sound.sample_rate, sound.pts = 16000, 0
        for frame in av.AudioResampler(format=stream.format, layout="mono", rate=16000).resample(sound):
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    refused("found none in .* sound only", path)


def test_no_decodable_frame(tmp_path: Path) -> None:
    path = write_cv(tmp_path / "a.mp4", 20)
    data = path.read_bytes()
    size = struct.unpack(">I", data[data.index(b"mdat") - 4 : data.index(b"mdat")])[0]
    patch(path, b"mdat", 0, bytes(size - 8))
    refused("must have frames that can be decoded, none of 20 can be", path)


def test_avi_header_only(tmp_path: Path) -> None:
    path = write_cv(tmp_path / "a.avi", 20, codec="MJPG")
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"movi") + 4])
    refused("must have frames that can be decoded, none of 20 can be", path)


def test_one_frame(tmp_path: Path) -> None:
    refused("must have at least 2 frames, got 1", write_cv(tmp_path / "a.mp4", 1))


def test_truncated_avi_gives_what_it_holds_and_says_so(tmp_path: Path) -> None:
    path = write_cv(tmp_path / "a.avi", 110, codec="MJPG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    recording = Video(path)
    assert 40 < len(recording) < 70
    assert recording.notes == (f"the file says 110 frames, {len(recording)} could be decoded",)
    assert numbers(recording)[:-1] == list(range(len(recording) - 1))


def test_truncated_avi_with_too_little_left(tmp_path: Path) -> None:
    path = write_cv(tmp_path / "a.avi", 60, codec="MJPG")
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"00dc", data.index(b"movi")) + 300])
    refused(r"at least 2 frames, got 1|frames that can be decoded, none of 60", path)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_equal_timestamps(tmp_path: Path, name: str) -> None:
    path = remuxed(tmp_path, name, lambda number: (0, 0))
    refused(r"timestamps.*must increase, and 19 of 20 do not, first frame 1 .*column fps of the labels file", path)
    recording = Video(path, source_hz=25)
    np.testing.assert_allclose(recording.times_s, np.arange(20) / 25)
    assert numbers(recording) == list(range(20))


def test_timestamps_that_go_back(tmp_path: Path) -> None:
    path = remuxed(tmp_path, "a.mkv", lambda number: (number * 40 + (800 if 5 < number < 12 else 0), number * 40))
    refused(r"must increase, and 1 of 20 do not, first frame 12 with 0\.480 s after 1\.240 s.*column fps", path)
    assert len(Video(path, source_hz=25)) == 20


def test_frame_rate_of_nearly_zero(tmp_path: Path) -> None:
    path = patch(write_cv(tmp_path / "a.mp4", 60), b"stts", 12, bytes(4))
    refused(r"frame rate must lie within 1 to 1000 Hz, got .* Hz from the timestamps.*column fps", path)
    np.testing.assert_allclose(Video(path, source_hz=25).times_s, np.arange(60) / 25)


def remuxed(folder: Path, name: str, times: Callable[[int], tuple[int, int]]) -> Path:
    """Twenty frames whose (presentation, decoding) times in ms are what times() says."""
    av = pytest.importorskip("av")
    with av.open(str(write_cv(folder / "source.avi", 20))) as source, av.open(str(folder / name), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        assert len(packets) == 20
        for number, packet in enumerate(packets):
            packet.stream, packet.time_base = stream, Fraction(1, 1000)
            packet.pts, packet.dts = times(number)
            file.mux(packet)
    return folder / name


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"resample_hz": 0}, r"resample_hz must be above 0 and at most 1000, got 0 "),
        ({"resample_hz": -25.0}, r"resample_hz must be above 0 .* got -25"),
        ({"resample_hz": float("nan")}, r"resample_hz must be above 0 .* got nan"),
        ({"resample_hz": float("inf")}, r"resample_hz must be above 0 .* got inf"),
        ({"source_hz": 0}, r"source_hz must be above 0 .* column fps"),
        ({"start_s": -1.0}, r"start_s must be a number of seconds from 0 up, got -1"),
        ({"end_s": float("nan")}, r"end_s must be a number of seconds from 0 up, got nan"),
        ({"start_s": 0.5, "end_s": 0.5}, r"end_s must be greater than start_s, got start_s=0\.5 and end_s=0\.5"),
        ({"end_s": 0.0}, r"end_s must be greater than start_s, got start_s=0 and end_s=0"),
        ({"start_s": 1.0}, r"start_s must lie before the recording's end at 1\.000 s, got 1 "),
        ({"start_s": 0.97}, r"at least 2 frames must lie from start_s to end_s, got 0 from 0\.970 to 1\.000 s"),
        ({"start_s": 0.5, "end_s": 0.52}, r"at least 2 frames must lie from start_s to end_s, got 1 "),
        ({"resample_hz": 0.5}, r"at least 2 frames .* got 1 .* raise resample_hz"),
    ],
)
def test_bad_settings(tmp_path: Path, settings: dict[str, float], match: str) -> None:
    refused(match, write_cv(tmp_path / "a.mp4", 30), **settings)


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".jpg"])
def test_folder(tmp_path: Path, suffix: str) -> None:
    folder = write_folder(tmp_path / "Pä tient 1", 12, suffix)
    (folder / f".hidden{suffix}").write_bytes(b"")
    (folder / "note.txt").write_text("kept out")
    recording = Video(folder)
    assert numbers(recording) == list(range(12))
    assert (len(recording), recording.height_px, recording.width_px) == (12, HEIGHT, WIDTH)
    assert recording.times_s is recording.duration_s is recording.hz is recording.source_hz is None
    assert [index for index, _ in recording.frames(5)] == [0, 5, 10, 11]
    np.testing.assert_allclose(next(recording.frames())[1][44, 6], [230, 20, 20], atol=25)


def test_folder_with_a_rate(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", 10)
    recording = Video(folder, source_hz=10, resample_hz=25, start_s=0.2, end_s=0.5)
    # From 0.2 s on: 200, 240, 280 | 320, 360 | 400, 440, 480 ms.
    assert numbers(recording) == [2, 2, 2, 3, 3, 4, 4, 4]
    assert recording.duration_s == pytest.approx(0.3)
    np.testing.assert_allclose(Video(folder, source_hz=10).times_s, np.arange(10) / 10)


def test_folder_frames_are_turned_upright(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "f"
    folder.mkdir()
    for number in range(2):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(picture(number)).save(folder / f"{number}.jpg", exif=exif)
    assert (Video(folder).height_px, Video(folder).width_px) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("settings", [{"resample_hz": 25}, {"start_s": 1.0}, {"end_s": 1.0}])
def test_folder_without_a_rate_cannot_be_resampled_or_cut(tmp_path: Path, settings: dict[str, float]) -> None:
    refused("need a frame rate, .* column fps of the labels file", write_folder(tmp_path / "f", 3), **settings)


def test_empty_folder(tmp_path: Path) -> None:
    refused(r"must hold images \(\.jpg, .*\), found none", tmp_path)


def test_folder_with_one_image(tmp_path: Path) -> None:
    refused("at least 2 frames, got 1", write_folder(tmp_path / "f", 1))


def test_folder_with_different_sizes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", 3)
    cv2.imwrite(str(folder / "img_1.png"), np.zeros((10, 20, 3), np.uint8))
    refused(r"size of the first, 48x64 px, got 10x20 px in .*img_1\.png", folder)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
@pytest.mark.parametrize("keep", [0, 60, 0.5])
def test_folder_with_a_damaged_image(tmp_path: Path, suffix: str, keep: float) -> None:
    folder = write_folder(tmp_path / "f", 3, suffix)
    path = folder / f"img_1{suffix}"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if keep < 1 else int(keep)])
    refused(f"must be a whole image, and .*img_1{suffix} is damaged", folder)


# ---------------------------------------------------------------- silence

READ_ALL = """
import sys
from pathlib import Path
from qafe.errors import MediaError
from qafe.faces.video import Video
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        for _ in Video(path).frames():
            pass
    except MediaError:
        pass
"""


def test_broken_files_print_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("text\n" * 50)
    for name, codec in (("noise.avi", "MJPG"), ("noise.mp4", "mp4v"), ("cut.avi", "mp4v"), ("cut.mp4", "mp4v")):
        data = bytearray(write_cv(tmp_path / name, 40, codec=codec).read_bytes())
        if name.startswith("cut"):
            del data[len(data) // 2 :]
        else:
            for at in np.random.default_rng(0).integers(len(data) // 4, len(data) * 3 // 4, 40):
                data[at] ^= 0x55
        (tmp_path / name).write_bytes(data)
    for suffix in (".png", ".jpg", ".bmp", ".tif"):
        path = write_folder(tmp_path / f"folder{suffix[1:]}", 3, suffix) / f"img_1{suffix}"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert len(list(tmp_path.iterdir())) == 10
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_log_level_is_left_as_it_was(tmp_path: Path) -> None:
    level = cv2.utils.logging.getLogLevel()
    (tmp_path / "a.mp4").write_text("text")
    refused("found none", tmp_path / "a.mp4")
    assert cv2.utils.logging.getLogLevel() == level
