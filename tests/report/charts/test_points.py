"""Points of others from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from snpc.errors import UserError
from snpc.report.charts.points import PeerPoint, read_points

POINTS = (PeerPoint("wide, deep", 6.1e6, 97.5), PeerPoint("tiny", 2200000, 91))


def test_csv_and_json_say_the_same(tmp_path: Path) -> None:
    table, listing = tmp_path / "points.csv", tmp_path / "points.json"
    table.write_text('name,year,macs,score\n"wide, deep",2024,6.1e6,97.5\ntiny,2025,2200000,91\n')
    listing.write_text(
        '[{"name": "wide, deep", "macs": 6.1e6, "score": 97.5}, {"name": "tiny", "macs": 2.2e6, "score": 91}]'
    )
    assert read_points(table) == read_points(listing) == POINTS


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("p.csv", "name,macs\na,1\n", "point 1 must have name, macs, score"),
        ("p.csv", "name,macs,score\na,1,high\n", "numbers"),
        ("p.csv", "name,macs,score\na,0,1\n", "above 0"),
        ("p.csv", "", "holds no points"),
        ("p.json", "{}", "holds no points"),
        ("p.json", "[1]", "point 1"),
        ("p.json", "[", "is no JSON"),
    ],
)
def test_what_is_no_point_is_refused(name: str, text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_points(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        read_points(tmp_path / "missing.csv")
