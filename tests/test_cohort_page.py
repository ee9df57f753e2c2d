"""The report of a cohort: outliers, figures, and the page in a browser."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from algorithm.cohort.page import COLUMNS, cohort_page, outliers, write_report
from algorithm.cohort.pictures import pictures_of
from resultpages.pictures import picture
from tests.support.pages import Reader, browse, needs_chromium


def figures(number: int = 60) -> list[dict[str, Any]]:
    """Made-up pairs: s3 has a large expected error, s5 hardly overlaps, s7 failed, s8 was not come to."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for n in range(number):
        row = {"subject": f"s{n}", "status": "done", "step": "", "error": "", "warnings": 0, "warning": ""}
        row |= {"version": "0.1.0", "weights_sha256": "ab" * 32, "device": "cpu"}
        row |= {"expected_error.mean_mm": 0.8 + 0.1 * rng.random(), "motion_mm.mean": 5 + 5 * rng.random()}
        row |= {"lungs_litres.fixed": 5.0 + rng.random(), "lungs_litres.moving": 3.0 + rng.random()}
        row |= {"quality.after.lung_dice": 0.97 + 0.01 * rng.random(), "jacobian.folded_voxels": 0}
        row |= {"timings_s.total": 20 + 3 * rng.random()}
        rows.append(row)
    rows[3]["expected_error.mean_mm"], rows[3]["warnings"], rows[3]["warning"] = 6.0, 1, "Do not trust it."
    rows[5]["quality.after.lung_dice"] = 0.7
    rows[7] = {"subject": "s7", "status": "failed", "step": "register", "error": "scan <7> is no CT", "warnings": None}
    rows[8] = {"subject": "s8", "status": "not done", "step": "", "error": "", "warnings": None}
    return rows


def pair_page(out: Path, subject: str) -> None:
    """A stand-in for a pair's page, with pictures where that has them."""
    folder = out / "pairs" / subject
    folder.mkdir(parents=True)
    shown = picture(np.full((40, 60, 3), (200, 30, 30), np.uint8), "fixed scan", "Fixed scan, coronal")
    image = f'<img src="{shown.source}" alt="{shown.alt}" width="60" height="40">'
    (folder / "report.html").write_text(
        f'<h2 id="pictures">P</h2><h3>Coronal</h3>{image}<h3>Axial</h3>{image}<h2 id="x">X</h2><h3>Y</h3>{image}'
    )


def test_outliers_are_on_the_bad_side_and_the_farthest_come_first() -> None:
    rows = figures()
    rows[10]["expected_error.mean_mm"] = 0.0  # as good as can be
    rows[11]["motion_mm.mean"] = 100.0  # neither good nor bad
    rows[12]["expected_error.mean_mm"], rows[12]["quality.after.lung_dice"] = 2.0, 0.8
    found = outliers(rows, COLUMNS)
    assert found.keys() == {"s3", "s5", "s12"}
    assert found["s3"][0].words.startswith("Expected error, mean (mm): 6.00, median 0.8")
    assert [one.words.partition(" (")[0] for one in found["s12"]] == ["Lung overlap", "Expected error, mean"]


def test_a_distance_is_that_of_its_formula() -> None:
    rows = [{"subject": str(n), "expected_error.mean_mm": value} for n, value in enumerate([1, 2, 3, 4, 5, 103])]
    (far,) = outliers(rows)["5"]
    assert far.distance == pytest.approx((103 - 3.5) / (1.4826 * 1.5))
    rows = [{"subject": str(n), "expected_error.mean_mm": 1 + (n == 0)} for n in range(9)]
    assert outliers(rows)["0"][0].distance == pytest.approx(1 / 0.2)  # the others are all alike


def test_the_page_tells_failed_ones_first_and_links_every_pair(tmp_path: Path) -> None:
    for subject in ("s0", "s3"):
        pair_page(tmp_path, subject)
    text = cohort_page(figures(), tmp_path)
    reader = Reader(text)
    assert "scan <7> is no CT" in reader.text and "scan <7>" not in text
    links = [has["href"] for tag, has in reader.tags if tag == "a"]
    assert "pairs/s0/report.html" in links and "pairs/s1/report.html" not in links
    rows = re.findall(r'<tr><td data-value="(s\d+)"', text)
    assert rows[0] == "s7" and set(rows[1:3]) == {"s3", "s5"} and len(rows) == 60
    assert len([1 for tag, _ in reader.tags if tag == "img"]) == 1  # s3 has a page, and of it the first plane
    assert "Not come to (1): s8" in " ".join(reader.text.split())
    assert not re.search(r'(?:src|href)="(?:https?:)?//', text)


def test_pictures_come_from_the_first_plane_alone(tmp_path: Path) -> None:
    pair_page(tmp_path, "a")
    (found,) = pictures_of(tmp_path, "a")
    assert (found.caption, found.width, found.height) == ("Fixed scan, coronal", 60, 40)
    assert pictures_of(tmp_path, "none") == []


@pytest.mark.parametrize("status", ["failed", "not done"])
def test_a_cohort_without_any_result_has_a_page(tmp_path: Path, status: str) -> None:
    rows = [{"subject": "a", "status": status, "step": "check", "error": "gone", "warnings": None, "warning": ""}]
    write_report(rows, tmp_path)
    assert "Cohort of 1 registrations" in (tmp_path / "cohort.html").read_text()
    assert pd.read_csv(tmp_path / "cohort.csv")["status"].tolist() == [status]


def test_csv_and_parquet_hold_all_figures(tmp_path: Path) -> None:
    write_report(figures(), tmp_path)
    tables = pd.read_csv(tmp_path / "cohort.csv"), pd.read_parquet(tmp_path / "cohort.parquet")
    for table in tables:
        of = table.set_index("subject")
        assert len(of) == 60 and of.loc["s3", "expected_error.mean_mm"] == 6.0
        assert of.loc["s0", "volume_ratio"] == of.loc["s0", "lungs_litres.moving"] / of.loc["s0", "lungs_litres.fixed"]
        assert of.loc["s7", "error"] == "scan <7> is no CT"


SORTED = """
<script>
const heads = document.querySelectorAll("table.sortable th button");
for (const times of [1, 2]) heads[3].click();
const subjects = Array.from(document.querySelectorAll("table.sortable tbody tr"), row => row.cells[0].textContent);
document.title = subjects[0] + " " + subjects[subjects.length - 1];
</script></body>
"""


@needs_chromium
def test_a_browser_sorts_the_table_and_no_script_fails(tmp_path: Path) -> None:
    page = tmp_path / "cohort.html"
    text = cohort_page(figures(), tmp_path)
    page.write_text(text, encoding="utf-8")
    became, said = browse(page, tmp_path, "--dump-dom")
    assert not [line for line in said if re.search("error|refused|uncaught", line, re.I)], said
    assert "Unusual pairs" in became
    open_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    page.write_text(open_policy.replace("</body>", SORTED), encoding="utf-8")
    became, _ = browse(page, tmp_path, "--dump-dom")
    assert "<title>s3 s" in became  # by the expected error, from the largest down; those without one last
    assert re.search(r"<title>s3 s[78]</title>", became)
