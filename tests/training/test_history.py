"""The journal: each point once, whatever was killed and begun again."""

import contextlib
import json

from training.history import HistoryWriter, cut_history, read_history
from training.history_tail import HistoryTail

ROWS = [
    {"iteration": 1, "train_loss": 0.9},
    {"iteration": 2, "train_loss": 0.8},
    {"epoch": 1, "iteration": 2, "val_top1_accuracy": 0.5},
    {"iteration": 3, "train_loss": 0.7},
    {"iteration": 4, "train_loss": 0.6},
    {"epoch": 2, "iteration": 4, "val_top1_accuracy": 0.6},
]


def written(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_come_back_in_order(tmp_path):
    writer = HistoryWriter(tmp_path / "history.jsonl", lambda: None)

    for row in ROWS:
        writer.add(row)
    writer.flush()

    assert read_history(tmp_path / "history.jsonl") == ROWS


def test_a_writer_that_lost_its_right_writes_nothing(tmp_path):
    def may_write():
        raise PermissionError

    writer = HistoryWriter(tmp_path / "history.jsonl", may_write)
    for _ in range(2):
        with contextlib.suppress(PermissionError):
            writer.add(ROWS[0])
    with contextlib.suppress(PermissionError):
        writer.flush()

    assert read_history(tmp_path / "history.jsonl") == []


def test_the_first_row_is_on_disk_at_once(tmp_path):
    writer = HistoryWriter(tmp_path / "history.jsonl", lambda: None)

    writer.add(ROWS[0])

    assert read_history(tmp_path / "history.jsonl") == ROWS[:1]


def test_a_cut_within_an_epoch_drops_what_came_after(tmp_path):
    path = written(tmp_path / "history.jsonl")

    cut_history(path, iteration=3, epochs=1)

    assert read_history(path) == ROWS[:4]


def test_a_cut_between_an_epochs_last_update_and_its_validation_drops_its_epoch_row(tmp_path):
    path = written(tmp_path / "history.jsonl")

    cut_history(path, iteration=4, epochs=1)

    assert read_history(path) == ROWS[:5]


def test_an_unfinished_last_line_and_a_point_written_twice_count_once(tmp_path):
    path = written(tmp_path / "history.jsonl", [*ROWS, ROWS[3]])
    with path.open("a") as file:
        file.write('{"iteration": 5, "trai')

    assert read_history(path) == ROWS


def test_a_reader_gets_whole_lines_only_and_all_again_after_a_cut(tmp_path):
    path = tmp_path / "history.jsonl"
    tail = HistoryTail(path)
    assert tail.new_rows() == []

    written(path, ROWS[:2])
    with path.open("a") as file:
        file.write('{"iteration": 3, ')
    first = tail.new_rows()
    with path.open("a") as file:
        file.write('"train_loss": 0.7}\n')
    second = tail.new_rows()
    cut_history(path, iteration=2, epochs=0)
    third = tail.new_rows()

    assert (first, second, third) == (ROWS[:2], [ROWS[3]], ROWS[:2])
    assert tail.new_rows() == []
