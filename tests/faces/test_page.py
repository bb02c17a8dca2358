"""qafe/faces/page.py: the page says what the report holds, is harmless, and shows no face unasked."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qafe.faces.page import percent
from qafe.faces.report import Report, findings

from .test_report import cohort, good, written

VOID = {"meta", "img", "br", "link", "input", "hr"}
NASTY = "<script>alert(1)</script> R&D \"naïve\" 'x' 视频"


class Page(HTMLParser):
    """Parses a page and insists on balanced tags; keeps its texts, tags and table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)


def test_the_first_sentence(tmp_path: Path) -> None:
    _, page = written(tmp_path, cohort(v4={"yaw_range_deg": 55}))
    lead = re.search(r'<p class="lead">(.*?)</p>', page)
    assert lead
    assert lead[1] == (
        "24 videos of 8 patients prepared, 1 refused; a face was detected in 99.0 % of all 4\u2009800 frames; "
        "1 warning on 1 video."
    )


def test_clipped_landmarks_stand_out_from_the_cohorts() -> None:
    """Tight crops clip some in every video."""
    tight = [row | {"clipped_points": 0.12} for row in cohort().videos]
    assert findings(Report(videos=tight)) == []
    found = findings(Report(videos=[*tight[1:], tight[0] | {"clipped_points": 0.3}]))
    assert [finding.reason[:6] for finding in found] == ["30.0 %"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"detected": 0.81}, "no face was found in 19.0 % of the frames"),
        ({"sharpness": 9.0}, "blurred: sharpness 9, the cohort's median is 7"),
        ({"face_size_px": 71.0}, "the face is small: 71 px, at least 96"),
        ({"yaw_range_deg": 61.2}, "the head turns over 61°"),
        ({"brightness": 41.0}, "the face is dark: brightness 41"),
        ({"brightness": 231.0}, "the face is bright: brightness 231"),
        ({"longest_gap_frames": 64}, "64 frames in a row (2.6 s) without a face"),
        ({"longest_gap_frames": 64, "source_hz": None}, "64 frames in a row without a face"),
        ({"faces_most": 3}, "up to 3 faces in view"),
        ({"variable_rate": True}, "the frame rate varies"),
        ({"clipped_points": 0.03}, "3.0 % of the landmarks lay outside the crop"),
        ({"clipped_pixels": 0.4}, "40.0 % of the pixels are plain black or white"),
        ({"notes": ["the file's end is damaged"]}, "the file's end is damaged"),
    ],
)
def test_suspicious_videos_are_named_with_reasons(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    assert findings(cohort()) == []
    report = cohort(v7=changes)
    assert {finding.video for finding in findings(report)} == {"clip7"}
    assert any(reason in finding.reason for finding in findings(report))
    _, page = written(tmp_path, report)
    first = page[page.index("Look at these first") : page.index("<h2>Scores")]
    assert reason in "".join(Page(first[first.index("<table") :]).texts)
    assert "clip7" in first
    assert "no face in any of its 212 frames" in first
    assert "clip8" not in first


def test_nothing_suspicious_is_said_so(tmp_path: Path) -> None:
    _, page = written(tmp_path, dataclasses.replace(cohort(), refused=()))
    assert "Nothing stands out" in page
    assert "no warnings." in page


def test_a_patient_in_both_splits_is_named(tmp_path: Path) -> None:
    _, page = written(tmp_path, cohort(v0={"split": "test"}))
    assert "In both train and test: P1." in page
    assert "In both" not in written(tmp_path, cohort())[1]


@pytest.mark.parametrize("place", ["patient", "video", "expression", "split", "source", "notes", "score", "hz"])
def test_every_text_is_escaped(tmp_path: Path, place: str) -> None:
    row = good(1, detected=0.2) | {place: [NASTY] if place == "notes" else NASTY}
    report = Report(
        videos=[row, good(2)],
        refused=[{"patient": NASTY, "video": NASTY, "reason": NASTY}],
        settings={NASTY: NASTY},
        notes=[NASTY],
        totals={NASTY: NASTY},
    )
    data, page = written(tmp_path, report, {NASTY: b"x"})
    assert "<script>alert" not in page
    parsed = Page(page)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1
    assert NASTY in parsed.texts
    assert data["notes"] == [NASTY]


def test_no_picture_without_pictures(tmp_path: Path) -> None:
    _, page = written(tmp_path, cohort())
    assert "<img" not in page
    assert "data:" not in page
    assert "Pictures of faces were left out" in page
    assert "--with-images" in page


def test_pictures_are_embedded(tmp_path: Path) -> None:
    _, page = written(tmp_path, cohort(), {"P1/clip10": b"ten", "P1/clip2": b"two"})
    images = [attributes for tag, attributes in Page(page).tags if tag == "img"]
    assert [image["src"] for image in images] == ["data:image/jpeg;base64,dHdv", "data:image/jpeg;base64,dGVu"]
    assert "left out" not in page


def test_the_page_stands_alone(tmp_path: Path) -> None:
    _, page = written(tmp_path, cohort(v3={"yaw_range_deg": 80}))
    parsed = Page(page)
    assert "://" not in page
    assert not any(tag in ("link", "iframe", "base") for tag, _ in parsed.tags)
    assert not any(name in attributes for _, attributes in parsed.tags for name in ("src", "href", "srcset"))
    assert "prefers-color-scheme:dark" in page
    assert len(page) < 150_000


@pytest.mark.parametrize(
    "scores",
    [
        [0, 1, 2, 3, 4, 4, 4, 2],
        [0.5, 1.0, 2.5, 4.0],
        [0.13, 3.99, 2.2, 4.0],
        [2.7],
        [1.234567] * 3,
        [-3.5, 0, 7.25, 12.125],
        [5, 9, 23],
        [0, 100, 1e6],
        list(np.linspace(0, 4, 200)),
        list(np.random.default_rng(0).normal(0, 1e-4, 50)),
    ],
)
def test_histogram_counts_add_up(tmp_path: Path, scores: list[float]) -> None:
    rows = [good(number, score=float(score)) for number, score in enumerate(scores)]
    _, page = written(tmp_path, Report(videos=[*rows, good(len(rows), score=None)]))
    bars = re.findall(r'data-count="(\d+)"><title>(\w+), (\w+), score (.*?):', page)
    assert sum(int(count) for count, *_ in bars) == len(scores)
    for expression in ("smile", "frown"):
        for split in ("train", "test"):
            wanted = sum(row["expression"] == expression and row["split"] == split for row in rows)
            assert sum(int(n) for n, e, s, _ in bars if (e, s) == (expression, split)) == wanted
    assert len({name for *_, name in bars}) <= 10
    assert "1 video without a score" in page


def test_whole_scores_get_a_bar_each(tmp_path: Path) -> None:
    rows = [
        good(0, score=score, split=split) for score, split in ((0, "train"), (4, "train"), (4, "test"), (2.0, "test"))
    ]
    _, page = written(tmp_path, Report(videos=rows))
    bars = re.findall(r'class="(\w+)" x="([\d.]+)" [^>]* data-count="(\d+)"><title>smile, (\w+), score (\d): ', page)
    assert sorted((kind, split, score, count) for kind, _, count, split, score in bars) == [
        ("test", "test", "2", "1"),
        ("test", "test", "4", "1"),
        ("train", "train", "0", "1"),
        ("train", "train", "4", "1"),
    ]
    train, test = (
        next(float(x) for kind, x, _, _, score in bars if (kind, score) == (name, "4")) for name in ("train", "test")
    )
    assert train < test, "side by side"


def test_every_mark_lies_inside_its_chart(tmp_path: Path) -> None:
    _, page = written(tmp_path, cohort(v3={"sharpness": 900.0, "face_size_px": 5.0, "detected": 0.0}))
    charts = re.findall(r'<svg width="(\d+)" height="(\d+)".*?</svg>', page)
    assert len(charts) == 2 + 2 + 5
    for chart in re.finditer(r'<svg width="(\d+)" height="(\d+)".*?</svg>', page):
        for x, y in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', chart[0]):
            assert 0 <= float(x) <= float(chart[1])
            assert 0 <= float(y) <= float(chart[2])
        assert all(float(tall) >= 0 for tall in re.findall(r'(?:height|width)="([-\d.]+)"', chart[0]))


def test_missing_values_are_a_dash(tmp_path: Path) -> None:
    data, page = written(tmp_path, Report(videos=[{}, {"patient": "P1", "video": "v", "missed_frames": None}]))
    assert len(data["videos"]) == 2
    parsed = Page(page)
    assert parsed.texts.count("-") > 50
    assert "None" not in "".join(parsed.texts)
    assert "nan" not in "".join(parsed.texts)


def test_an_empty_report(tmp_path: Path) -> None:
    data, page = written(tmp_path, Report(videos=[]))
    assert data["totals"]["prepared"] == 0
    assert "0 videos of 0 patients prepared, 0 refused; no warnings." in page
    Page(page)


def test_nearly_all_is_not_all(tmp_path: Path) -> None:
    _, page = written(tmp_path, cohort(1, v0={"detected": 0.9999}))
    assert "99.9 % of all" in page
    shares = (0, 1e-9, 0.0004, 0.25, 0.9999, 1, 1.3)
    assert [percent(share) for share in shares] == ["0 %", "0.1 %", "0.1 %", "25.0 %", "99.9 %", "100 %", "130 %"]


def test_the_table_has_one_row_a_video_and_sorts_by_numbers(tmp_path: Path) -> None:
    _, page = written(tmp_path, cohort(v5={"face_size_range_px": [80, 120.5], "missed_frames": [[3, 4], [9, 9]]}))
    table = page[page.index('<table class="sorts">') : page.index("</table>", page.index('<table class="sorts">'))]
    assert table.count("<tr>") == 2 + 24
    assert 'data-v="40.5">80-120<' in table
    assert 'data-v="3">3-4, 9<' in table
