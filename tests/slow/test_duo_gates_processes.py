"""Gates trained by two processes are those of one that reads the same documents.

torchrun, which ``accelerate launch`` calls for several GPUs, runs this file as a script, once per process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.gate_cases import SHORT, probe_of, random_model
from safetensors.torch import load_file, save_file

from hf_longctx import ConfigError, LongCtxConfig
from hf_longctx.identification.methods.duo_gates import FILE, DuoGates

pytestmark = pytest.mark.slow

RANKS = 2
METHOD = {**SHORT, "checkpoint_every": 3}


def worker(folder: Path) -> None:
    """One process: train without a work folder, with one, go on from what is there, and meet a foreign file."""
    torch.set_num_threads(1)
    seen = {}
    rank = int(os.environ["RANK"])
    for name in ("nothing saved", "saved", "resumed", "foreign"):
        works = {"nothing saved": None, "saved": "saved", "resumed": "resumed", "foreign": "foreign"}
        # A process that is not the main one sees another disk.
        work = works[name] and folder / (works[name] if rank == 0 else "elsewhere")
        probe = probe_of(random_model(), work=work)
        try:
            seen[name] = {"scores": DuoGates(**METHOD).scores(probe).tolist(), "measured": probe.measured}
        except ConfigError as error:
            seen[name] = {"error": str(error)}
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_ranks(folder: Path) -> list[dict]:
    """What every process saw."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += [__file__, str(folder)]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def test_accelerate_launch_runs_the_command_on_several_processes(tmp_path):
    # --multi_gpu is what makes accelerate start several processes on one machine; without GPUs they meet over gloo.
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    launch += [
        "--num_processes",
        str(RANKS),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    identify = ["-m", "hf_longctx", "identify", "hf-longctx/tiny-llama", "--method", "duo_gates", "--set", "steps=3"]
    identify += ["--set", "length=256", "--sink", "4", "--recent", "64", "--out", str(tmp_path / "my.yaml")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launch + identify, capture_output=True, text=True, env=env, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("Use it:") == 1
    config = LongCtxConfig.from_yaml(tmp_path / "my.yaml")
    assert config.heads.measured["documents"] == 3 * RANKS
    assert (tmp_path / "my.work" / FILE).exists()


def train(documents: int, work: Path | None = None) -> tuple[torch.Tensor, dict]:
    probe = probe_of(random_model(), work=work)
    return DuoGates(**METHOD, documents_per_step=documents).scores(probe), probe.measured


def test_two_processes_train_the_gates_of_one(tmp_path):
    want, measured = train(RANKS)
    alone, _ = train(1)
    for name in ("saved", "resumed", "foreign"):
        (tmp_path / name).mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "foreign" / FILE)
    state = tmp_path / "resumed" / FILE
    train(RANKS, tmp_path / "resumed")
    before = load_file(state)

    ranks = run_ranks(tmp_path)
    assert ranks[0] == ranks[1]
    got = torch.tensor(ranks[0]["nothing saved"]["scores"], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert (alone - want).abs().max() > 1e-4, "a control: the second document must matter"
    told = ranks[0]["nothing saved"]["measured"]
    assert told.pop("lengths") == measured.pop("lengths")
    assert told == pytest.approx(measured, abs=2e-6)
    assert ranks[0]["saved"]["scores"] == ranks[0]["nothing saved"]["scores"]
    assert ranks[0]["resumed"]["scores"] == want.tolist(), "two processes go on from what one left"
    assert "no state of a duo_gates run" in ranks[0]["foreign"]["error"]
    saved = load_file(tmp_path / "saved" / FILE)
    assert saved["gates"].double().tolist() == ranks[0]["saved"]["scores"]
    assert len(saved["losses"]) == len(before["losses"]) == METHOD["steps"]
    assert not (tmp_path / "elsewhere").exists(), "only the main process writes"


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
