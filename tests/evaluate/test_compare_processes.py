"""``compare --prompts`` on several processes: one result, whatever their number."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.descendants import descendants
from helpers.tiny import config_for, tiny_model
from typer.testing import CliRunner

from hf_longctx import compare_prompts
from hf_longctx.commands._app import MANY, app
from hf_longctx.commands._options import device_of
from hf_longctx.errors import ConfigError
from hf_longctx.evaluate import compare_prompts as module
from hf_longctx.io.launched import RANKS, SIZES, check_rank, launched
from hf_longctx.io.processes import Processes

IDS = [list(range(3, 3 + length)) for length in (40, 9, 61)]


class Ranks:
    """Stands in for `Processes`: threads, each of which is a process."""

    def __init__(self, count: int):
        self.count = count
        self.given = [None] * count
        self.barrier = threading.Barrier(count)
        self.own = threading.local()

    def __call__(self, device):
        return self

    @property
    def rank(self):
        return self.own.rank

    @property
    def main(self):
        return self.rank == 0

    def gather(self, thing):
        self.given[self.rank] = thing
        self.barrier.wait(30)
        return list(self.given)


def run_on(count: int, monkeypatch) -> list:
    ranks = Ranks(count)
    monkeypatch.setattr(module, "Processes", ranks)
    found = [None] * count
    torch.manual_seed(0)
    first = tiny_model(dtype=torch.float64)
    models = [copy.deepcopy(first) for _ in range(count)]

    def one(rank):
        ranks.own.rank = rank
        model = models[rank]
        asked = [{"prompt": "x", "id": str(at)} for at in range(len(IDS))]
        found[rank] = compare_prompts(model, asked, config=config_for(model, "mixed", recent=8), max_new_tokens=3)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@pytest.fixture
def tokens(monkeypatch):
    """Prompts of tokens, without a tokenizer."""

    def asked(model, prompts, tokenizer, chat):
        return [module.Asked(line["id"], torch.tensor([ids]), None) for line, ids in zip(prompts, IDS, strict=True)]

    monkeypatch.setattr(module, "prompt_set", asked)


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_process_gets_what_one_alone_finds(count, monkeypatch):
    """Five have nothing for two of them."""
    (alone,) = run_on(1, monkeypatch)
    for found in run_on(count, monkeypatch):
        assert found.as_dict() == alone.as_dict()
    assert {one.id for one in alone.prompts} == {"0", "1", "2"} and alone.notes == found.notes


def test_how_many_were_launched(monkeypatch):
    for name in SIZES:
        monkeypatch.delenv(name, raising=False)
    assert launched() == 1
    for name in reversed(SIZES):
        monkeypatch.setenv(name, str(2 + SIZES.index(name)))
        assert launched() == 2 + SIZES.index(name)
    for wrong in ("0", "-1", "two", "1.5", "²"):
        monkeypatch.setenv("WORLD_SIZE", wrong)
        with pytest.raises(ConfigError, match=f"WORLD_SIZE is '{wrong}', expected how many processes"):
            launched()


def test_a_command_that_shares_nothing_runs_once(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (["demo"], ["bench", "decode"], ["chat", "hf-longctx/tiny-llama"], ["identify-prefill", "x"]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 2 and f"each would do all of {command[0]}" in done.output, done.output
    assert {"eval", "compare", "identify", "lm-eval"} <= MANY
    assert CliRunner().invoke(app, ["configs"]).exit_code == 0
    text = tmp_path / "one.txt"
    text.write_text("one")
    done = CliRunner().invoke(app, ["compare", "hf-longctx/tiny-llama", "--prompt-file", str(text)])
    assert done.exit_code == 2 and "each would run the one prompt" in done.output
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "each would" not in CliRunner().invoke(app, ["demo", "--length", "64"]).output


def test_a_rank_that_is_none_of_them_is_refused(monkeypatch):
    """Else the others wait for a process that never comes."""
    for name in (*SIZES, *RANKS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK does not say which this is.*unset WORLD_SIZE"):
        Processes(torch.device("cpu"))
    for name in RANKS:
        for wrong in ("2", "-1", "x", "1.0", "²"):
            monkeypatch.setenv(name, wrong)
            with pytest.raises(ConfigError, match=f"variable {name} is '{wrong}', expected 0 to 1: 2 processes were"):
                Processes(torch.device("cpu"))
        for right in ("0", "1"):
            monkeypatch.setenv(name, right)
            check_rank(2)
        monkeypatch.delenv(name)


def test_the_local_rank_picks_the_accelerator(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert device_of(None) == torch.device("cuda:0")
    for local in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert device_of(None) == torch.device("cuda", local)
        assert device_of("cpu") == torch.device("cpu")
    for wrong in ("2", "-1", "one"):
        monkeypatch.setenv("LOCAL_RANK", wrong)
        with pytest.raises(ConfigError, match=f"LOCAL_RANK is '{wrong}', expected 0 to 1: this process sees 2 devices"):
            device_of(None)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"expected 0: this process sees 1 device \(cuda\)"):
        device_of(None)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_launcher_ends_those_that_wait_for_a_dead_one(victim, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"One two {at}"}) + "\n" for at in range(4000)))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hf_longctx"]
    start += ["compare", "hf-longctx/tiny-llama", "--prompts", str(prompts), "--json", str(tmp_path / "out.json")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = tmp_path / "log"
    with log.open("wb") as said:
        launcher = subprocess.Popen(start, env=env, stdout=said, stderr=said)
    try:
        until = time.monotonic() + 120
        while b"compare: started" not in log.read_bytes() and launcher.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        ranks = {rank_of(process): process for process in descendants(launcher.pid)}
        assert {"0", "1"} <= set(ranks), log.read_text()[-2000:]
        os.kill(ranks[str(victim)], signal.SIGKILL)
        assert launcher.wait(120) != 0
        assert not [pid for rank, pid in ranks.items() if rank is not None and rank_of(pid) is not None], "one is left"
        assert not (tmp_path / "out.json").exists(), "half of a result was written"
    finally:
        launcher.terminate()
        launcher.wait(60)


def rank_of(process: int) -> str | None:
    """The RANK that a launcher gave to a process that lives."""
    try:
        found = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((one[5:].decode() for one in found if one.startswith(b"RANK=")), None)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_torchrun(count, tmp_path):
    lines = [{"prompt": f"One two three four {at}", "id": str(at)} for at in range(3)]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = ["-m", "hf_longctx", "compare", "hf-longctx/tiny-llama", "--prompts", str(prompts), "--max-new-tokens", "4"]
    ways = {1: [sys.executable], count: [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]}
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    said, data = [], []
    for number, way in ways.items():
        out = tmp_path / f"{number}.json"
        done = subprocess.run(
            [*way, *start, "--json", str(out)], env=env, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        said.append(done.stdout)
        data.append({name: value for name, value in json.loads(out.read_text()).items() if name != "environment"})
    assert said[0] == said[1] and data[0] == data[1] and len(data[0]["prompts"]) == 3
