"""qafe/faces/labels.py: every row finds its video or is told of in one line."""

import os
from pathlib import Path

import pytest

from qafe.errors import ManifestError
from qafe.faces.labels import Problem, Recording, read_labels, scores_by_patient


class Cohort:
    """A folder of empty recordings and a labels file."""

    def __init__(self, root: Path) -> None:
        self.videos, self.labels = root / "videos", root / "labels.csv"
        self.videos.mkdir()

    def put(self, *paths: str) -> None:
        for path in paths:
            (self.videos / path).parent.mkdir(parents=True, exist_ok=True)
            (self.videos / path).touch()

    def read(
        self, *lines: str, trim: tuple[str, str] = ("start", "end"), header: str = "patient,video,expression,score"
    ) -> tuple[list[Recording], list[Problem]]:
        self.labels.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
        return read_labels(self.labels, self.videos, trim)

    def problem(self, *lines: str, header: str = "patient,video,expression,score") -> str:
        """The one problem of labels that have nothing else to tell."""
        good, problems = self.read(*lines, header=header)
        assert not good
        assert len(problems) == 1
        assert "\n" not in str(problems[0])
        return str(problems[0])


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return Cohort(tmp_path)


def test_a_whole_row(cohort: Cohort) -> None:
    cohort.put("in/smile.mp4")
    good, problems = cohort.read(
        "P1,in/smile.mp4,smile,2.5,1.5,4,29.97", header="patient,video,expression,score,start,end,fps"
    )
    assert not problems
    assert good == [Recording("P1", "smile-1.5-4", "in/smile.mp4", "smile", 2.5, 1.5, 4.0, 29.97, "P1")]
    assert good[0].id == "smile-1.5-4_P1"


@pytest.mark.parametrize(
    ("path", "row", "source"),
    [
        ("a.mp4", "P1,a.mp4", "a.mp4"),
        ("P1/a.mp4", "P1,a.mp4", "P1/a.mp4"),
        ("P1/a.mp4", "P1,P1/a.mp4", "P1/a.mp4"),
        ("P1/a.mp4", ",P1/a.mp4", "P1/a.mp4"),
        ("P1/a.MOV", "P1,a", "P1/a.MOV"),
        ("P1/a.01.avi", "P1,a.01", "P1/a.01.avi"),
        ("P1/day 1/a.mkv", "P1,./day 1/a", "P1/day 1/a.mkv"),
        ("P1/a/img_1.png", "P1,a", "P1/a"),
        ("P1/a/img_1.JPG", ",P1/a/", "P1/a"),
    ],
)
def test_where_a_video_is_looked_for(cohort: Cohort, path: str, row: str, source: str) -> None:
    cohort.put(path)
    good, problems = cohort.read(f"{row},smile,1")
    assert not problems
    assert [(recording.patient, recording.source) for recording in good] == [("P1", source)]


def test_patient_from_the_folder_needs_no_column(cohort: Cohort) -> None:
    cohort.put("P1/a.mp4", "P2/a.mp4", "b.mp4")
    good, problems = cohort.read("P1/a.mp4,smile,1", "P2/a,smile,0", "b.mp4,smile,0", header="video,expression,score")
    assert [recording.id for recording in good] == ["a_P1", "a_P2"]
    assert len(problems) == 1
    assert "a video must have a patient" in problems[0].reason
    assert "labels.csv line 4" in problems[0].reason


def test_two_files_of_one_stem_need_their_suffix(cohort: Cohort) -> None:
    cohort.put("P1/a.mp4", "P1/a.avi")
    good, problems = cohort.read("P1,a,smile,1")
    assert not good
    assert [problem.video for problem in problems] == ["a", "P1/a.avi", "P1/a.mp4"]
    # With it both would have the same name.
    _, problems = cohort.read("P1,a.mp4,smile,1", "P1,a.avi,smile,1")
    assert [problem.video for problem in problems] == ["P1/a.mp4", "P1/a.avi"]


@pytest.mark.parametrize(
    ("start", "end", "name"),
    [("", "", "a"), ("2", "", "a-2-end"), ("", "3.25", "a-0-3.25"), ("0", "3", "a-0-3"), ("0", "", "a-0-end")],
)
def test_a_trim_names_the_video(cohort: Cohort, start: str, end: str, name: str) -> None:
    cohort.put("a.mp4")
    good, _ = cohort.read(f"P1,a.mp4,smile,1,{start},{end}", header="patient,video,expression,score,start,end")
    assert good[0].video == name
    assert (good[0].start_s, good[0].end_s) == (float(start) if start else None, float(end) if end else None)


def test_one_source_may_have_several_trims(cohort: Cohort) -> None:
    cohort.put("a.mp4")
    header = "patient,video,expression,score,Start,End"
    good, problems = cohort.read("P1,a.mp4,smile,1,0,4", "P1,a.mp4,frown,2,4,8", header=header)
    assert not problems
    assert [recording.id for recording in good] == ["a-0-4_P1", "a-4-8_P1"]
    good, problems = cohort.read("P1,a.mp4,smile,1,0,4", "P1,a.mp4,frown,2,0,4.0", header=header)
    assert not good
    assert [problem.video for problem in problems] == ["a.mp4", "a.mp4"]
    assert all("labels.csv lines 2, 3" in problem.reason for problem in problems)


def test_trim_columns_of_other_names(cohort: Cohort) -> None:
    cohort.put("a.mp4")
    header = "patient,video,expression,score,onset,Offset,start"
    good, problems = cohort.read("P1,a.mp4,smile,1,1,2,9", trim=("Onset", "offset"), header=header)
    assert not problems
    assert (good[0].start_s, good[0].end_s) == (1.0, 2.0)
    _, problems = cohort.read("P1,a.mp4,smile,1,1,soon,9", trim=("onset", "offset"), header=header)
    assert "offset must be a number of at least 0 or empty, got 'soon'" in problems[0].reason
    with pytest.raises(ManifestError, match=r"columns of the trim must be in labels\.csv, missing 'apex'"):
        cohort.read("P1,a.mp4,smile,1,1,2,9", trim=("onset", "apex"), header=header)


@pytest.mark.parametrize("column", ["start", "end", "fps"])
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1:05"])
def test_bad_numbers_beside_the_score(cohort: Cohort, column: str, value: str) -> None:
    cohort.put("a.mp4")
    told = cohort.problem(f"P1,a.mp4,smile,1,{value}", header=f"patient,video,expression,score,{column}")
    assert told.startswith(f"a.mp4: {column} must be a number of at least 0 or empty, got {value!r} (labels.csv line 2")


@pytest.mark.parametrize("score", ["severe", "nan", "", "inf", "2,5", "1_5"])
def test_bad_scores(cohort: Cohort, score: str) -> None:
    cohort.put("a.mp4")
    told = cohort.problem(f'P1,a.mp4,smile,"{score}"')
    assert f"a score must be a finite number, got {score!r} (labels.csv line 2, column score)" in told
    assert told.endswith("with a point where commas stand between the cells.")


def test_a_bad_row_leaves_the_others(cohort: Cohort) -> None:
    cohort.put("P1/a.mp4", "P1/b.mp4")
    good, problems = cohort.read("P1,a.mp4,smile,severe", "P1,b.mp4,smile,3")
    assert [recording.id for recording in good] == ["b_P1"]
    assert [(problem.video, problem.patient) for problem in problems] == [("P1/a.mp4", "P1")]


def test_both_duplicates_are_refused(cohort: Cohort) -> None:
    cohort.put("P1/a.mp4", "P1/b.mp4", "P2/a.mp4")
    good, problems = cohort.read("P1,a.mp4,smile,1", "P1,b.mp4,smile,1", "P1,P1/a,smile,2", "P2,a.mp4,smile,1")
    assert [recording.id for recording in good] == ["b_P1", "a_P2"]
    assert len(problems) == 2
    assert all("different names, got 'a' again (labels.csv lines 2, 4)" in problem.reason for problem in problems)


def test_a_file_and_a_folder_of_frames_of_one_name(cohort: Cohort) -> None:
    cohort.put("P1/a.mp4", "P1/a/1.png")
    good, problems = cohort.read("P1,a.mp4,smile,1", "P1,a,smile,1")
    assert not good
    assert len(problems) == 2


def test_names_that_hardly_differ(cohort: Cohort) -> None:
    cohort.put("p1/a.mp4", "P1/b.mp4", "P2/c.mp4", "P2/C.mp4", "P_3/d.mp4", "P-3/e.mp4")
    rows = ["p1,a.mp4", "P1,b.mp4", "P2,c.mp4", "P2,C.mp4", "P_3,d.mp4", "P-3,e.mp4"]
    good, problems = cohort.read(*(f"{row},smile,1" for row in rows))
    assert [recording.id for recording in good] == ["a_p1", "d_P-3"]
    assert [problem.video for problem in problems] == ["P1/b.mp4", "P2/c.mp4", "P2/C.mp4", "P-3/e.mp4"]
    assert "differ in more than case, - and _, got 'P1' and 'p1' (labels.csv line 3)" in problems[0].reason
    assert "got 'P-3' and 'P_3' (labels.csv line 7)" in problems[3].reason


def test_unknown_and_unlabeled_videos(cohort: Cohort) -> None:
    cohort.put("P1/a.mp4", "P1/extra.mp4", "P2/frames/1.png", "P1/notes.txt", ".cache/x.mp4", "P1/.a.mp4", "x.png")
    good, problems = cohort.read("P1,a.mp4,smile,1", "P1,lost.mp4,smile,1")
    assert [recording.id for recording in good] == ["a_P1"]
    assert [str(problem) for problem in problems] == [
        "lost.mp4: a label must have its video, and there is none of that name (labels.csv line 3). "
        "Write its path below the folder of videos.",
        "P1/extra.mp4: a video must have a label, and labels.csv names none. "
        "Add a row to labels.csv, or move the file away.",
        "P2/frames: a video must have a label, and labels.csv names none. "
        "Add a row to labels.csv, or move the file away.",
    ]


@pytest.mark.parametrize("cell", ["../secret.mp4", "P1/../../secret.mp4", "{outside}", ".", "..", "x" * 300, "b/" * 9])
def test_nothing_outside_the_folder_is_found(cohort: Cohort, tmp_path: Path, cell: str) -> None:
    outside = tmp_path / "secret.mp4"
    outside.touch()
    (tmp_path / "videos.mp4").touch()
    told = cohort.problem(f"P1,{cell.format(outside=outside)},smile,1")
    assert "there is none of that name" in told


def test_a_patient_cannot_lead_outside(cohort: Cohort, tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").touch()
    assert "none of that name" in cohort.problem("..,secret.mp4,smile,1")
    assert "none of that name" in cohort.problem(f"{tmp_path},secret.mp4,smile,1")
    cohort.put("a.mp4")
    for patient in ("..", "a/b", "/", "a\\b", "."):
        assert "a video must have a patient" in cohort.problem(f"{patient},a.mp4,smile,1")


@pytest.mark.parametrize(("field", "told"), [("video", "must name its video"), ("expression", "show an expression")])
def test_empty_cells(cohort: Cohort, field: str, told: str) -> None:
    cohort.put("a.mp4")
    row = {"patient": "P1", "video": "a.mp4", "expression": "smile", "score": "1"} | {field: " "}
    _, problems = cohort.read(",".join(row.values()))
    assert told in problems[0].reason
    assert f"labels.csv line 2, column {field}" in problems[0].reason


@pytest.mark.parametrize("name", ["a/b", "a\\b", "../smile", ".smile", "smile,frown", "all"])
def test_names_that_no_model_can_have(cohort: Cohort, name: str) -> None:
    cohort.put("a.mp4")
    told = cohort.problem(f'P1,a.mp4,"{name}",1')
    assert told.startswith("a.mp4: an expression's name must do for a file and for --expression: no '/', '\\', ',' or")
    assert f", got {name!r} (labels.csv line 2, column expression). Write another name" in told


def test_unicode_spaces_and_underscores(cohort: Cohort) -> None:
    cohort.put("Ünal Ö/lächeln 1.mp4", "study_7_P3/wide_eyes.mp4", "笑/笑.avi")
    good, problems = cohort.read(
        "Ünal Ö, lächeln 1.mp4 ,smile,1", "study_7_P3,wide_eyes,surprise,1", '笑,"笑.avi",smile,0'
    )
    assert not problems
    assert [(recording.patient, recording.video, recording.id) for recording in good] == [
        ("Ünal Ö", "lächeln 1", "lächeln 1_Ünal Ö"),
        ("study-7-P3", "wide_eyes", "wide_eyes_study-7-P3"),
        ("笑", "笑", "笑_笑"),
    ]
    assert good[1].source == "study_7_P3/wide_eyes.mp4"


def test_byte_order_mark_quotes_and_blank_lines(cohort: Cohort) -> None:
    cohort.put("a, b.mp4")
    cohort.labels.write_bytes(
        b'\xef\xbb\xbfScore , VIDEO,patient,expression,remark\r\n\r\n1,"a, b.mp4",P1,smile,"two\r\nlines"\r\n'
    )
    good, problems = read_labels(cohort.labels, cohort.videos)
    assert not problems
    assert [recording.id for recording in good] == ["a, b_P1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,expression,score\na.mp4,smile\n", r"labels\.csv line 2: a row must have 3 values.*got 2"),
        ("video,expression,score\n\na.mp4,smile,1,2\n", r"labels\.csv line 3: .*got 4"),
        ("patient,video\nP1,a.mp4\n", r"missing expression, score"),
        ("video|expression|score\na|b|1\n", r"missing video, expression, score"),
        ("video,expression,score\n", r"at least one row"),
        ("", r"must start with a header"),
    ],
)
def test_a_table_of_another_shape(cohort: Cohort, text: str, message: str) -> None:
    cohort.labels.write_text(text)
    with pytest.raises(ManifestError, match=message):
        read_labels(cohort.labels, cohort.videos)


def test_no_folder_of_videos(cohort: Cohort) -> None:
    with pytest.raises(ManifestError, match=r"the videos must be in a folder, and there is none at .*nowhere"):
        read_labels(cohort.labels, cohort.videos / "nowhere")


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links here")
def test_a_linked_folder_of_videos(cohort: Cohort, tmp_path: Path) -> None:
    cohort.put("P1/a.mp4")
    (tmp_path / "link").symlink_to(cohort.videos)
    cohort.labels.write_text("patient,video,expression,score\nP1,a,smile,1\n")
    good, problems = read_labels(cohort.labels, tmp_path / "link")
    assert not problems
    assert good[0].source == "P1/a.mp4"


def test_scores_by_patient(cohort: Cohort) -> None:
    cohort.put("P1/a.mp4", "P1/b.mp4", "P2/a.mp4")
    good, _ = cohort.read("P1,a,smile,1", "P2,a,smile,4", "P1,b,frown,2")
    assert scores_by_patient(good) == {"P1": [1.0, 2.0], "P2": [4.0]}
