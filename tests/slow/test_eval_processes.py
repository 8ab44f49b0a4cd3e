"""``hf-longctx eval`` killed over and over, and on two processes: every result exactly once, and the same summary."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.descendants import descendants

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("eval")]

VARIANTS, CASES = 3, 2 * 2 * 2 * 3
EVAL = ["hf_longctx", "eval", "hf-longctx/tiny-llama", "--tasks", "needle,key_value", "--lengths", "128,384"]
EVAL += ["--depths", "0,1", "--samples", "3", "--sweep", "retrieval_fraction=0.0625"]
# --multi_gpu is what makes accelerate start several processes on one machine; without GPUs they meet over gloo.
LAUNCH = ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TIMES = ("prefill_s", "decode_ms", "started", "processes")


def command(out: Path, processes: int = 1) -> list[str]:
    start = [sys.executable, "-m", *(LAUNCH if processes == 2 else [])]
    return [*start, *(["-m"] if processes == 2 else []), *EVAL, "--out", str(out)]


def run(out: Path, processes: int = 1) -> str:
    done = subprocess.run(command(out, processes), capture_output=True, text=True, env=ENV, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def lines(out: Path) -> list[bytes]:
    return [line for path in out.glob("records-*.jsonl") for line in path.read_bytes().splitlines(keepends=True)]


def untimed(thing):
    if isinstance(thing, dict):
        return {key: untimed(value) for key, value in thing.items() if key not in TIMES}
    return [untimed(one) for one in thing] if isinstance(thing, list) else thing


def outcome(out: Path) -> tuple[dict, list[dict]]:
    """(the summary, all records in one order), without what differs from run to run; every record is there once."""
    records = [record for record in map(json.loads, lines(out)) if "case" in record]
    assert len(records) == VARIANTS * CASES == len({(record["variant"], record["case"]) for record in records})
    summary = json.loads((out / "summary.json").read_text())
    return untimed(summary), sorted(map(untimed, records), key=lambda one: (one["variant"], one["case"]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    run(out)
    return outcome(out)


def kill_after(out: Path, wanted: int, processes: int) -> int:
    """Kill the run, and all its processes, as soon as ``wanted`` lines are there; how many there were then."""
    started = subprocess.Popen(command(out, processes), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 600
    while len(lines(out)) < wanted and started.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert started.poll() is None, "it ended before it was killed"
    family = [started.pid, *descendants(started.pid)]  # the launcher's processes are in groups of their own
    assert len(family) > processes or processes == 1
    for process in family:
        os.kill(process, signal.SIGKILL)
    started.wait()
    return len(lines(out))


def test_killed_over_and_over_nothing_is_lost_or_repeated(whole, tmp_path):
    out, last = tmp_path / "out", 0
    for wanted in (1, 8, 20, 41):
        now = kill_after(out, wanted, 1)
        assert wanted <= now and last <= now < VARIANTS * CASES
        last = now
    # What a kill in the middle of a write leaves.
    path = out / "records-0.jsonl"
    path.write_bytes(path.read_bytes() + b'{"variant": "dense", "case": "needle len')
    run(out)
    assert outcome(out) == whole


def test_two_processes_share_the_work(whole, tmp_path):
    out = tmp_path / "out"
    said = run(out, 2)
    assert said.count("The report:") == 1, "only the main process speaks"
    assert outcome(out) == whole
    headers, shares = [], []
    for rank in range(2):
        header, *records = map(json.loads, (out / f"records-{rank}.jsonl").read_text().splitlines())
        headers.append(header)
        shares.append({record["case"] for record in records})
    assert [header["processes"] for header in headers] == [2, 2]
    assert [len(share) for share in shares] == [CASES // 2] * 2 and not shares[0] & shares[1]


def test_two_processes_go_on_where_one_was_and_one_where_two_were(whole, tmp_path):
    out = tmp_path / "out"
    kill_after(out, 12, 1)
    kill_after(out, 40, 2)
    before = {path.name: path.read_bytes() for path in out.glob("records-*.jsonl")}
    assert set(before) == {"records-0.jsonl", "records-1.jsonl"}
    run(out)
    assert outcome(out) == whole
    assert (out / "records-1.jsonl").read_bytes() == before["records-1.jsonl"], "one process writes to its own file"


@pytest.mark.parametrize("count", [3, 5])
def test_torchrun_and_more_processes_than_cases(count, tmp_path):
    few = ["-m", *EVAL[:4], "needle", "--lengths", "128", "--depths", "0,1", "--samples", "1", "--out"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    found, said = [], []
    for number, start in ((1, []), (count, launch)):
        out = tmp_path / str(number)
        started = [sys.executable, *start, *few, str(out)]
        done = subprocess.run(started, capture_output=True, text=True, env=ENV, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-6000:]
        found.append(untimed(json.loads((out / "summary.json").read_text())))
        said.append(done)
    assert found[0] == found[1]
    assert said[1].stdout.count("The report:") == 1 and said[1].stderr.count("eval: started") == 1
    shares = [len(path.read_bytes().splitlines()) - 1 for path in sorted((tmp_path / str(count)).glob("records-*"))]
    assert shares == [2, 2, *[0] * (count - 2)], "two cases, dense and patched"
