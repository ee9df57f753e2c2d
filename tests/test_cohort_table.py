"""The table of a cohort, what counts as done, and which pairs go together. No scan is read."""

import csv
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from algorithm.cohort.bids import write_bids_table
from algorithm.cohort.done import (
    Outcome,
    key,
    outcome_file,
    proof,
    read_outcome,
    settled,
    withdraw_outcome,
    write_outcome,
)
from algorithm.cohort.plan import AT_MOST, Plan, chunk_of, chunks_for, rows_of
from algorithm.cohort.progress import in_words
from algorithm.cohort.settings import Settings
from algorithm.cohort.table import Row, checked_table, missing_files, read_table
from algorithm.errors import InputError
from tests.support.strategies import examples

SETTINGS = Settings("t.csv", "algorithm", "lungreg", "lungreg", "0123", chunks=4)


def table(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_is_read_as_it_stands(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "\ufeffsubject;fixed;moving;age;fixed_labels_vessels;moving_mask\n"
        "a.1;scans/f.mha; /abs/m.mha ;63;;m.nii.gz\n\nB;x;y;;v.nrrd;\n",
    )
    first, second = read_table(path)
    assert (first.subject, first.line, second.line) == ("a.1", 2, 4)
    assert first.path("fixed") == tmp_path / "scans" / "f.mha" and first.path("moving") == Path("/abs/m.mha")
    assert first.cells == {"fixed": "scans/f.mha", "moving": "/abs/m.mha", "moving_mask": "m.nii.gz"}
    assert second.columns("labels", "landmarks") == ["fixed_labels_vessels"] and second.path("moving_mask") is None
    assert not second.has_truth()


def test_all_faults_are_told_at_once_with_their_rows(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "subject,fixed,moving,fixed_mask,fixed_lobes\n"
        "ok,f,m,,\n"
        "OK,f,m,,\n"
        "../up,f,m,,\n"
        ",f,,,\n"
        "both,f,m,mask,lobes\n"
        "same,f,f,,\n"
        "short,f\n",
    )
    rows, faults = checked_table(path)
    assert [row.subject for row in rows] == ["ok", "OK"]
    expected = {
        "row 3": "the subject OK is also that of row 2",
        "row 4": "is no name for a folder",
        "row 6": "both given",
        "row 7": "the same scan",
        "row 8": "has 2 cells, expected 5",
    }
    for row, words in expected.items():
        assert any(fault.startswith(f"{row}:") and words in fault for fault in faults), (row, faults)
    assert [fault for fault in faults if fault.startswith("row 5:")] == [
        "row 5: subject is empty",
        "row 5: moving is empty",
    ]
    assert len(faults) == 7
    with pytest.raises(InputError, match=r"and 6 more faults"):
        read_table(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the column subject is missing"),
        ("subject,fixed\na,b\n", "the column moving is missing"),
        ("subject,fixed,moving,fixed\na,b,c,d\n", "several columns fixed"),
        ("subject,fixed,moving,moving_maks\na,b,c,d\n", "moving_maks is not known"),
        ("subject,fixed,moving\n\n", "has no rows"),
        ('subject,fixed,moving\n"a,b,c\n', "is no table"),
    ],
)
def test_what_is_no_table(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_table(table(tmp_path, text))


def test_a_table_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "table.csv").write_bytes(b"subject,fixed,moving\n\xff,b,c\n")
    with pytest.raises(InputError, match="UTF-8"):
        read_table(tmp_path / "table.csv")


def test_missing_files_are_told_with_row_and_column(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    rows = read_table(table(tmp_path, "subject,fixed,moving,fixed_labels\na,f,gone,f\n"))
    assert missing_files(rows) == [f"row 2, a: moving is not there: {tmp_path / 'gone'}"]


# --- what counts as done ---------------------------------------------------------------------------------------------


@pytest.fixture
def row(tmp_path: Path) -> Row:
    for name in ("f", "m", "mask", "labels"):
        (tmp_path / name).write_text(name)
    return read_table(table(tmp_path, "subject,fixed,moving,fixed_mask,moving_labels\na,f,m,mask,labels\n"))[0]


def keys(row: Row, settings: Settings = SETTINGS) -> dict[str, str]:
    return {step: key(row, step, settings) for step in ("check", "register", "apply", "evaluate")}


@pytest.mark.parametrize(
    ("changed", "steps"),
    [
        ("content", {"check", "register", "apply", "evaluate"}),
        ("time", {"check", "register", "apply", "evaluate"}),
        ("mask gone", {"check", "register", "apply", "evaluate"}),
        ("labels", {"apply", "evaluate"}),
        ("weights", {"register", "apply", "evaluate"}),
        ("refine", {"register", "apply", "evaluate"}),
        ("device", set()),
        ("threads", set()),
        ("chunks", set()),
        ("copied elsewhere", set()),
    ],
)
def test_keys_change_with_what_the_result_follows_from_and_nothing_else(
    tmp_path: Path, row: Row, changed: str, steps: set[str]
) -> None:
    before, settings = keys(row), SETTINGS
    if changed == "content":
        (tmp_path / "f").write_text("longer")
    elif changed == "time":
        os.utime(tmp_path / "m", ns=(1, 1))
    elif changed == "mask gone":
        (tmp_path / "mask").unlink()
    elif changed == "labels":
        (tmp_path / "labels").write_text("other labels")
    elif changed == "copied elsewhere":
        shutil.copytree(tmp_path, tmp_path / "copy")
        row = read_table(tmp_path / "copy" / "table.csv")[0]
    else:
        value = {"weights": {"weights_sha256": "4567"}, "refine": {"refine": "off"}, "device": {"device": "cuda"}}
        settings = replace(SETTINGS, **value.get(changed, {changed: 8}))  # type: ignore[arg-type]
    after = keys(row, settings)
    assert {step for step in before if before[step] != after[step]} == steps


def test_of_a_dicom_folder_every_file_counts(tmp_path: Path, row: Row) -> None:
    series = tmp_path / "series"
    series.mkdir()
    for name in ("1.dcm", "2.dcm"):
        (series / name).write_text(name)
    dicom = replace(row, cells={"fixed": "series", "moving": "m"})
    found = [key(dicom, "register", SETTINGS)]
    (series / "2.dcm").write_text("other")
    found.append(key(dicom, "register", SETTINGS))
    (series / "3.dcm").touch()
    found.append(key(dicom, "register", SETTINGS))
    assert len(set(found)) == 3 and key(dicom, "register", SETTINGS) == found[-1]


def test_an_outcome_stands_while_its_key_and_its_result_do(tmp_path: Path, row: Row) -> None:
    of = key(row, "register", SETTINGS)
    assert settled(tmp_path, "register", row, SETTINGS) is None
    write_outcome(tmp_path, "register", "a", Outcome(of, "done"))
    result = proof(tmp_path, "register", "a")
    assert result is not None and settled(tmp_path, "register", row, SETTINGS) is None  # nothing was written
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    assert settled(tmp_path, "register", row, SETTINGS) == Outcome(of, "done")
    assert settled(tmp_path, "register", row, replace(SETTINGS, refine="off")) is None
    write_outcome(tmp_path, "register", "a", Outcome(of, "failed", "no CT"))
    assert settled(tmp_path, "register", row, SETTINGS) == Outcome(of, "failed", "no CT")
    write_outcome(tmp_path, "register", "a", Outcome(of, "again", "no memory"))
    assert settled(tmp_path, "register", row, SETTINGS) is None
    assert read_outcome(tmp_path, "register", "a") == Outcome(of, "again", "no memory")
    outcome_file(tmp_path, "register", "again", "a").write_text("{half")
    assert read_outcome(tmp_path, "register", "a") is None
    withdraw_outcome(tmp_path, "register", "a")
    assert not list((tmp_path / "steps").rglob("*.json"))


# --- which pairs go together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "workers", "chunks"), [(1, 2, 1), (3, 2, 4), (40, 2, 8), (10_000, 2, 512), (10_000, 64, 512)]
)
def test_numbers_of_chunks(pairs: int, workers: int, chunks: int) -> None:
    assert chunks_for(pairs, workers) == chunks
    assert chunks_for(pairs, workers, size=pairs) == 1 and chunks_for(pairs, workers, size=1) >= pairs / 1.5


@given(pairs=st.integers(1, 10**6), workers=st.integers(1, 256))
def test_chunks_are_neither_many_nor_large(pairs: int, workers: int) -> None:
    chunks = chunks_for(pairs, workers)
    assert chunks & (chunks - 1) == 0 and 1 <= chunks < 2 * pairs
    assert pairs / chunks < 1.5 * AT_MOST


@examples(20)
@given(
    subjects=st.sets(st.from_regex(r"[a-z0-9]{1,6}", fullmatch=True), min_size=2, max_size=60),
    chunks=st.sampled_from([1, 4, 16]),
)
def test_a_row_that_goes_touches_no_other_chunk(subjects: set[str], chunks: int) -> None:
    rows = [Row(n, subject, {"fixed": "f", "moving": "m"}, Path()) for n, subject in enumerate(sorted(subjects))]
    names = {chunk_of(row.subject, chunks) for row in rows}
    assert sorted(row.subject for name in names for row in rows_of(rows, name)) == sorted(subjects)
    for name in names - {chunk_of(rows[0].subject, chunks)}:
        assert rows_of(rows[1:], name) == rows_of(rows, name)
    assert all(
        chunk_of(s, chunks).split("of")[0] == str(int(chunk_of(s, 2 * chunks).split("of")[0]) % chunks)
        for s in subjects
    )


def plan(folder: Path, text: str, settings: Settings = SETTINGS) -> Plan:
    return Plan(replace(settings, table=str(table(folder, text))), read_table(folder / "table.csv"), folder)


def test_the_last_jobs_are_those_that_are_wanted(tmp_path: Path) -> None:
    head = "subject,fixed,moving,fixed_landmarks,moving_landmarks\n"
    one = replace(SETTINGS, chunks=1)
    assert plan(tmp_path, head + "a,f,m,,\n", one).wanted() == ["chunks/register/0of1.json"]
    found = plan(tmp_path, head + "a,f,m,,\nb,f,m,x,\n", one).wanted()
    assert found == ["chunks/register/0of1.json", "chunks/apply/0of1.json"]
    found = plan(tmp_path, head + "b,f,m,x,y\n", replace(one, function=True)).wanted()
    assert [name.split("/")[1] for name in found] == ["register", "apply", "function", "evaluate"]


def test_a_job_follows_from_its_own_rows_and_what_is_left_to_do(tmp_path: Path) -> None:
    head, rows = "subject,fixed,moving\n", [f"s{n},f,m\n" for n in range(12)]
    before = plan(tmp_path, head + "".join(rows))
    state = {chunk: before.follows_from("register", chunk) for chunk in before.chunks}
    assert len(state) > 1

    rows[3] = "s3,f,other\n"
    after = plan(tmp_path, head + "".join(reversed(rows)))
    touched = chunk_of("s3", SETTINGS.chunks)
    assert after.follows_from("register", touched) != state[touched]
    for chunk in state.keys() - {touched}:
        assert after.follows_from("register", chunk) == state[chunk]

    mine = chunk_of("s0", SETTINGS.chunks)

    def now() -> str:
        return plan(tmp_path, head + "".join(rows)).follows_from("register", mine)

    found = [now()]
    write_outcome(tmp_path, "register", "s0", Outcome("k", "again", "no memory"))
    found.append(now())
    write_outcome(tmp_path, "register", "s0", Outcome("k", "done"))
    found.append(now())  # without its result
    assert len(set(found)) == 3
    result = proof(tmp_path, "register", "s0")
    assert result is not None
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    assert now() == found[0]
    write_outcome(tmp_path, "register", "s0", Outcome("k", "failed", "no CT"))
    assert now() == found[0]


# --- a folder in the manner of BIDS ----------------------------------------------------------------------------------


def bids(folder: Path, *names: str) -> Path:
    root = folder / "study"
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_a_table_of_a_bids_folder(tmp_path: Path) -> None:
    root = bids(
        tmp_path,
        "sub-01/ses-1/ct/sub-01_ses-1_acq-insp_ct.nii.gz",
        "sub-01/ses-1/ct/sub-01_ses-1_acq-exp_ct.nii.gz",
        "sub-01/ses-1/ct/sub-01_ses-1_acq-exp_ct.json",
        "sub-01/ses-2/ct/sub-01_ses-2_acq-insp_ct.nii.gz",
        "derivatives/lobes/sub-01/ses-1/sub-01_ses-1_acq-insp_dseg.nii.gz",
        "derivatives/lobes/sub-01/ses-1/sub-01_ses-1_acq-exp_landmarks.csv",
        "sub-02/ct/sub-02_acq-insp_ct.mha",
        "sub-02/ct/sub-02_acq-exp_ct.mha",
        "sub-02/ct/sub-02_acq-exp_mask.mha",
    )
    path = tmp_path / "tables" / "table.csv"
    path.parent.mkdir()
    said = write_bids_table(root, path, "acq-insp", "acq-exp")
    assert "2 pairs" in said and "without a second scan: sub-01_ses-2" in said
    first, second = read_table(path)
    assert (first.subject, second.subject) == ("sub-01_ses-1", "sub-02")
    assert missing_files([first, second]) == []
    assert first.columns("labels", "landmarks") == ["fixed_labels", "moving_landmarks"]
    assert second.cells["moving_mask"] == "../study/sub-02/ct/sub-02_acq-exp_mask.mha"
    with pytest.raises(InputError, match="is there already"):
        write_bids_table(root, path, "acq-insp", "acq-exp")


@pytest.mark.parametrize(
    ("fixed", "moving", "says"),
    [
        ("ses-2", "acq-1", "one part"),
        ("ses-1", "ses-1", "one part"),
        ("ses", "ses-1", "one part"),
        ("ses-3", "ses-4", "has no"),
        ("ses-1", "ses-2", "is a second fixed of sub-1"),
    ],
)
def test_what_is_no_bids_folder(tmp_path: Path, fixed: str, moving: str, says: str) -> None:
    root = bids(tmp_path, "sub-1_ses-1_ct.mha", "sub-1_ses-2_ct.mha", "again/sub-1_ses-1_ct.nii.gz")
    with pytest.raises(InputError, match=says):
        write_bids_table(root, tmp_path / "t.csv", fixed, moving)
    assert not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 second"),
        (80.0, "80 seconds"),
        (600.0, "10 minutes"),
        (5000.0, "83 minutes"),
        (7200.0, "2 hours"),
        (1e6, "12 days"),
    ],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_cells_with_commas_survive(tmp_path: Path) -> None:
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["subject", "fixed", "moving"], ["a", "one, two.mha", 'a "b".mha']])
    (row,) = read_table(tmp_path / "table.csv")
    assert row.cells == {"fixed": "one, two.mha", "moving": 'a "b".mha'}
