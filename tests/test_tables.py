"""Tables and the files they are written to."""

import json

import numpy as np
import pytest

import rslora_jax as rl
from rslora_jax.files import whole_file
from rslora_jax.tables import Table

TABLE = Table.of([{"rank": 4, "loss": 1.25}, {"rank": np.int32(8), "loss": float("nan"), "n": "x"}])


def test_the_columns_are_all_keys_in_order_of_appearance():
    assert TABLE.columns == ("rank", "loss", "n")
    assert TABLE.rows[0] == (4, 1.25, None)


def test_scalar_arrays_become_python_numbers():
    assert type(TABLE.column("rank")[1]) is int


def test_an_unknown_column_names_the_nearest():
    with pytest.raises(rl.AdapterError, match=r"no column 'los'.*nearest are 'loss'"):
        TABLE.select(los=1.0)


def test_csv_holds_a_header_and_one_line_a_row(tmp_path):
    TABLE.to_csv(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().splitlines() == ["rank,loss,n", "4,1.25,", "8,nan,x"]


def test_every_line_of_json_can_be_read_by_a_strict_reader(tmp_path):
    TABLE.to_jsonl(tmp_path / "t.jsonl")
    lines = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "t.jsonl").read_text().splitlines()
    ]
    assert lines == [
        {"rank": 4, "loss": 1.25, "n": None},
        {"rank": 8, "loss": "nan", "n": "x"},
    ]


def test_a_frame_holds_the_same_rows():
    frame = TABLE.to_frame()
    assert list(frame.columns) == ["rank", "loss", "n"]
    assert frame["rank"].tolist() == [4, 8]


def test_a_frame_without_pandas_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(rl.AdapterError, match=r"needs pandas.*Run `pip install 'pandas'`"):
        TABLE.to_frame()


def test_a_file_that_fails_half_way_leaves_the_old_one_untouched(tmp_path):
    path = tmp_path / "loss.png"
    path.write_text("old")

    def fail():
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [
        ("loss.png", "old")
    ]
