"""Records: what was appended is there, a torn end is not, and another run's files are refused."""

from __future__ import annotations

import os

import pytest

from hf_longctx import ConfigError
from hf_longctx.evaluate.records import Records

pytestmark = pytest.mark.quick

HEADER = {"settings": {"lengths": [64, 128], "seed": 0}, "environment": {"threads": 1}}
LINES = [
    {"variant": way, "case": f"needle {i}", "score": i / 3, "text": 'a "b"\n\r\u2028 é'} for i in (1, 2) for way in "dp"
]


def fill(folder, lines=LINES, rank=0, header=HEADER):
    with Records(folder, header).open(rank) as writer:
        for line in lines:
            writer.append(line)
    return folder / f"records-{rank}.jsonl"


def test_what_was_appended_is_read_back(tmp_path):
    fill(tmp_path / "new" / "folder", LINES[:1])
    fill(tmp_path / "new" / "folder", LINES[1:2])
    fill(tmp_path / "new" / "folder", LINES[2:], rank=3)
    headers, records = Records(tmp_path / "new" / "folder", HEADER).read()
    assert records == LINES
    assert headers == [{"format": 1, **HEADER}] * 2, "one per file"


def test_every_record_is_on_the_disk_before_the_next(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.fstat(number).st_size), real(number)))
    path = fill(tmp_path)
    ends = [i + 1 for i, byte in enumerate(path.read_bytes()) if byte == 10]
    assert synced == ends and len(ends) == 1 + len(LINES)


def test_a_file_cut_off_anywhere_goes_on(tmp_path):
    path = fill(tmp_path)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in {*range(0, len(whole), 23), *range(ends[-2] - 2, len(whole) + 1, 3), *ends}:
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        _, records = Records(tmp_path, HEADER).read()
        assert records == LINES[: max(0, kept - 1)]
        fill(tmp_path, LINES[len(records) :])
        assert path.read_bytes() == whole


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("lengths", [64]), ("new", 2)])
def test_other_settings_are_refused_by_name(tmp_path, name, value):
    path = fill(tmp_path)
    other = {**HEADER, "settings": {**HEADER["settings"], name: value}}
    with pytest.raises(ConfigError, match=rf"^out: .*other settings: {name} \(was .*Remove it"):
        Records(tmp_path, other).read()
    Records(tmp_path, {**HEADER, "environment": {"threads": 2}}).read()
    assert path.exists()


@pytest.mark.parametrize("bad", [b"{broken}\n", b"[1]\n", b'{"variant": "d"}\n', b"\n"])
def test_a_line_that_is_no_record_is_refused(tmp_path, bad):
    path = fill(tmp_path)
    path.write_bytes(path.read_bytes() + bad)
    with pytest.raises(ConfigError, match=rf"line {len(LINES) + 2} of .*is no record"):
        Records(tmp_path, HEADER).read()
    path.write_bytes(bad)
    with pytest.raises(ConfigError, match="line 1 of"):
        Records(tmp_path, HEADER).read()


def test_a_result_that_is_there_twice_is_refused(tmp_path):
    fill(tmp_path)
    fill(tmp_path, LINES[1:2], rank=1)
    with pytest.raises(ConfigError, match="p on needle 1 twice"):
        Records(tmp_path, HEADER).read()


def test_a_file_that_a_process_still_writes_to_is_refused(tmp_path):
    with Records(tmp_path, HEADER).open(0) as writer:
        writer.append(LINES[0])
        for refused in (Records(tmp_path, HEADER).read, lambda: Records(tmp_path, HEADER).open(0)):
            with pytest.raises(ConfigError, match="another process is writing"):
                refused()
        Records(tmp_path, HEADER).open(1).__exit__()
    assert Records(tmp_path, HEADER).read()[1] == LINES[:1]


def test_a_file_that_cannot_be_written(tmp_path):
    records = Records(tmp_path, HEADER)
    (tmp_path / "records-0.jsonl").mkdir()
    with pytest.raises(ConfigError, match="^out: .*records-0.jsonl cannot be written"):
        records.open(0)
    with pytest.raises(ConfigError, match="^out: .*records-0.jsonl cannot be read"):
        records.read()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="^out: .*cannot be made"):
        Records(tmp_path / "file" / "out", HEADER)
