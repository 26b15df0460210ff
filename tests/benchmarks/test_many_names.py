"""What a line of the table says, with a few names."""

from __future__ import annotations

from pathlib import Path

from benchmarks.many_names import measured, write_files


def test_every_name_is_served_and_every_figure_is_there(tmp_path: Path) -> None:
    write_files(tmp_path, 8)
    write_files(tmp_path, 12)
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 12
    line = measured(tmp_path, 12)
    assert line.pop("names") == 12
    line.pop("memory, KB a name")  # of a process in which other tests have run
    assert all(value > 0 for value in line.values())
