from pathlib import Path

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
