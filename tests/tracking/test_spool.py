from pathlib import Path

import pytest

from tracking.spool import Spool


def test_entries_come_back_in_order_until_they_are_marked(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "deep" / "spool.jsonl")
    for number in range(5):
        spool.append({"number": number})
    seen = []
    for entry, place in spool.unsent():
        seen.append(entry["number"])
        if entry["number"] == 2:
            spool.mark_sent(place)
            break
    assert seen == [0, 1, 2]
    spool.close()
    again = Spool(spool.path)
    assert [entry["number"] for entry, _ in again.unsent()] == [3, 4]
    assert [entry["number"] for entry in again.entries()] == [0, 1, 2, 3, 4]


def test_a_spool_is_for_its_owner_alone(tmp_path: Path) -> None:
    Spool(tmp_path / "spool.jsonl").append({"uri": "postgresql://user:secret@host/db"})
    assert (tmp_path / "spool.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_line_that_a_dying_process_left_half_written_is_cut_off(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.jsonl")
    spool.append({"number": 0})
    spool.close()
    with open(spool.path, "a") as out:
        out.write('{"number": 1, "tex')
    again = Spool(spool.path)
    again.append({"number": 2})
    assert [entry["number"] for entry in again.entries()] == [0, 2]


@pytest.mark.parametrize(("kept", "cursor"), [(14, 56), (28, 56), (30, 56), (0, 56), (56, 20), (56, 1)])
def test_a_cursor_beyond_what_a_power_cut_left_begins_again(kept: int, cursor: int, tmp_path: Path) -> None:
    """The cursor may be on the disk before the lines that it has passed: it lies beyond the end, or within a line."""
    spool = Spool(tmp_path / "spool.jsonl")
    for number in range(4):
        spool.append({"number": number})
    spool.mark_sent(cursor)
    spool.close()
    assert spool.path.stat().st_size == 56
    with open(spool.path, "rb+") as content:
        content.truncate(kept)
    after = Spool(spool.path)
    after.append({"number": "of a later sweep, longer than what was lost"})
    assert [entry["number"] for entry, _ in after.unsent()][:-1] == list(range(kept // 14))
    assert after.sent == 0


def test_a_cursor_at_the_end_of_a_line_stays(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.jsonl")
    for number in range(3):
        spool.append({"number": number})
    (_, place), *_ = spool.unsent()
    for sent in (place, spool.path.stat().st_size):
        spool.mark_sent(sent)
        spool.close()
        spool = Spool(spool.path)
        assert spool.sent == sent


def test_an_entry_is_set_aside_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.jsonl")
    for reason in ("one", "another"):
        for trial in "ab":
            spool.set_aside({"kind": "trial", "trial": trial, "refused": reason})
    assert [(entry["trial"], entry["refused"]) for entry in spool.refused()] == [("a", "one"), ("b", "one")]
