"""qafe/faces/report.py: what is written and found is right, and the same each time; landmarks are drawn in place."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from qafe.errors import FaceError
from qafe.faces.report import COLOURS, MISSED_COLOUR, Report, contact_sheet, findings, totals, write_report
from qafe.markup import ALL_COUNT, GROUPS


def good(number: int, **changes: Any) -> dict[str, Any]:
    """A row in which nothing is suspicious."""
    patient = number // 3 + 1
    return {
        "patient": f"P{patient}",
        "video": f"clip{number}",
        "expression": ("smile", "frown")[number % 2],
        "score": number % 5,
        "split": "test" if patient % 4 == 0 else "train",
        "source": f"P{patient}/clip{number}.mp4",
        "frames": 200,
        "hz": None,
        "source_hz": 25.0,
        "variable_rate": False,
        "duration_s": 8.0,
        "width_px": 1280,
        "height_px": 720,
        "rotation_deg": 0,
        "detected": 0.99,
        "missed_frames": [[3, 4]],
        "longest_gap_frames": 2,
        "full_frame_detections": 0.05,
        "window_detections": 0.95,
        "faces_most": 1,
        "face_size_px": 250.0 + number,
        "face_size_range_px": 20.0,
        "clipped_points": 0.0,
        "sharpness": 60.0 + number,
        "sharpness_low": 40.0,
        "brightness": 120.0,
        "brightness_range": 8.0,
        "clipped_pixels": 0.01,
        "pitch_range_deg": 8.0,
        "yaw_range_deg": 12.0,
        "roll_range_deg": 5.0,
        "notes": [],
    } | changes


def cohort(count: int = 24, **changes: dict[str, Any]) -> Report:
    """Good rows; ``v7={...}`` changes the row of number 7."""
    rows = [good(number, **changes.get(f"v{number}", {})) for number in range(count)]
    refused = [{"patient": "P90", "video": "lost", "reason": "no face in any of its 212 frames"}]
    return Report(videos=rows, refused=refused, settings={"hz": 25, "crop": {"margin": 0.25}})


def written(folder: Path, report: Report, pictures: dict[str, bytes] | None = None) -> tuple[dict[str, Any], str]:
    write_report(folder, report, pictures)
    return json.loads((folder / "report.json").read_text()), (folder / "report.html").read_text()


def test_json_round_trip(tmp_path: Path) -> None:
    report = cohort(v3={"sharpness": float("nan"), "yaw_range_deg": np.float32("inf"), "frames": np.int64(200)})
    data, _ = written(tmp_path, report)
    assert set(data) >= {"version", "settings", "totals", "videos", "refused"}
    assert data["version"] == 1
    assert data["settings"] == report.settings
    assert data["refused"] == list(report.refused)
    by_video = {row["video"]: row for row in data["videos"]}
    assert by_video["clip3"] == report.videos[3] | {"sharpness": None, "yaw_range_deg": None}
    assert by_video["clip5"] == report.videos[5]


def test_json_holds_what_was_found(tmp_path: Path) -> None:
    report = cohort(v3={"detected": 0.5}, v7={"notes": ["a remark"]})
    data, _ = written(tmp_path, report)
    assert [(found["video"], found["weight"] >= 1) for found in data["findings"]] == [("clip3", True), ("clip7", False)]
    assert data["findings"] == [found._asdict() for found in findings(report)]
    assert data["limits"]["detected"] == [0.95, None]
    assert data["limits"]["sharpness"] == [pytest.approx(0.4 * 71.5), None]


def test_rows_are_sorted_as_people_count(tmp_path: Path) -> None:
    report = cohort()
    shuffled = dataclasses.replace(report, videos=report.videos[::-1])
    data, _ = written(tmp_path, shuffled)
    assert [row["video"] for row in data["videos"]] == [f"clip{number}" for number in range(24)]


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    report = cohort(v2={"yaw_range_deg": 70, "notes": ["a", "b"]}, v9={"detected": 0.5})
    mixed = dataclasses.replace(report, videos=[dict(reversed(row.items())) for row in reversed(report.videos)])
    for folder, given in (("one", report), ("two", report), ("three", mixed)):
        write_report(tmp_path / folder, given, {"P1/clip1": b"jpeg"})
    for name in ("report.json", "report.html"):
        assert len({(tmp_path / folder / name).read_bytes() for folder in ("one", "two", "three")}) == 1


def test_nothing_is_left_beside(tmp_path: Path) -> None:
    write_report(tmp_path / "deep" / "er", cohort(), None)
    write_report(tmp_path / "deep" / "er", cohort(3), None)
    assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir()) == ["report.html", "report.json"]
    assert len(json.loads((tmp_path / "deep" / "er" / "report.json").read_text())["videos"]) == 3


def test_no_absolute_path_is_written(tmp_path: Path) -> None:
    settings = {"raw": Path("/home/clinic/raw"), "out": "C:\\clinic\\o"}
    report = Report(videos=[good(0, source="/home/clinic/raw/a.mp4")], settings=settings)
    data, page = written(tmp_path, report)
    assert data["videos"][0]["source"] == "a.mp4"
    assert data["settings"] == {"raw": "raw", "out": "o"}
    assert "/home" not in page


def test_totals() -> None:
    report = cohort(3, v0={"frames": 100, "detected": 1.0}, v1={"frames": 300, "detected": 0.8}, v2={"detected": None})
    found = totals(report)
    assert (found["prepared"], found["refused"], found["patients"], found["frames"]) == (3, 1, 1, 600)
    assert found["detected"] == pytest.approx(0.85)
    assert (found["warnings"], found["videos_with_warnings"]) == (1, 1)
    assert totals(dataclasses.replace(report, totals={"frames": 7, "spare": 1}))["frames"] == 7
    assert totals(Report(videos=[]))["detected"] is None


def test_the_most_suspicious_comes_first() -> None:
    report = cohort(
        v3={"variable_rate": True}, v9={"detected": 0.3, "longest_gap_frames": 90}, v5={"notes": ["a remark"]}
    )
    assert list(dict.fromkeys(finding.video for finding in findings(report))) == ["clip9", "clip3", "clip5"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = b"caf\xe9.mp4".decode("utf-8", "surrogateescape")
    data, page = written(tmp_path, cohort(2, v0={"video": name}))
    assert name in [row["video"] for row in data["videos"]]
    assert "caf\\udce9.mp4" in page


# ---------------------------------------------------------------- contact sheets


def decoded(data: bytes) -> np.ndarray:
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def groups_apart(side: int) -> np.ndarray:
    """Each group's points in a clump of its own; the pupils last, as they are drawn last."""
    points = np.zeros((ALL_COUNT, 2))
    for place, members in enumerate(GROUPS.values()):
        points[list(members)] = np.array([place % 3 + 0.5, place // 3 + 0.5]) * side / 3
    return points


@pytest.mark.parametrize(("count", "size"), [(1, (160, 160)), (3, (160, 480)), (5, (320, 640)), (40, (480, 640))])
def test_contact_sheet_size(count: int, size: tuple[int, int]) -> None:
    crops = [np.full((256, 256, 3), 90, np.uint8)] * count
    sheet = decoded(contact_sheet(crops, [groups_apart(256)] * count))
    assert sheet.shape == (*size, 3)


def test_landmarks_are_drawn_in_their_colours_and_places() -> None:
    crop = np.full((256, 256, 3), 40, np.uint8)
    sheet = decoded(contact_sheet([crop], [groups_apart(256)], side_px=240)).astype(int)
    for place, group in enumerate(GROUPS):
        x, y = (place % 3) * 80 + 40, (place // 3) * 80 + 40
        assert np.abs(sheet[y, x] - COLOURS[group]).max() < 40, group
    assert np.abs(sheet[200, 200] - 40).max() < 20
    assert set(COLOURS) == set(GROUPS)


def test_missed_frames_are_framed_in_red() -> None:
    crops = [np.full((128, 128, 3), 40, np.uint8)] * 2
    sheet = decoded(contact_sheet(crops, [groups_apart(128)] * 2, missed=[False, True], numbers=[7, 8])).astype(int)
    assert np.abs(sheet[80, 160 + 2] - MISSED_COLOUR).max() < 40
    assert np.abs(sheet[80, 2] - 40).max() < 20


def test_evenly_spaced_crops_are_chosen() -> None:
    crops = [np.full((64, 64, 3), value, np.uint8) for value in range(0, 200, 2)]
    sheet = decoded(contact_sheet(crops, [np.full((ALL_COUNT, 2), np.nan)] * 100, most=3, side_px=32))
    assert sheet.shape == (32, 96, 3)
    np.testing.assert_allclose(sheet[16, [16, 48, 80], 0], [0, 100, 198], atol=4)


def test_contact_sheet_refuses_what_does_not_fit() -> None:
    with pytest.raises(FaceError, match="at least one crop"):
        contact_sheet([], [])
    crop = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(FaceError, match=r"got 2 crops and lists of \[1\]"):
        contact_sheet([crop, crop], [groups_apart(64)])
