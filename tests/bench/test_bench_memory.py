"""``hf-longctx bench memory``: what is calculated is what is allocated, byte for byte, and the longest fits just so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers.store_cases import CASES, role_of
from helpers.tiny import config_for, tiny_config, tiny_model
from typer.testing import CliRunner

from hf_longctx import ConfigError, LongCtxConfig, LongCtxError
from hf_longctx.bench import environment, memory_check
from hf_longctx.bench.memory_check import check, fill
from hf_longctx.commands._app import app
from hf_longctx.config.config import load_shipped
from hf_longctx.planning.find import find
from hf_longctx.planning.memory import DENSE, MOST, PATCHED, RESERVED, WAYS, MemoryModel, MemorySettings, longest
from hf_longctx.stores.base import SPARE, Reserve, StoreSpec

SETTINGS = MemorySettings(10**9, "fp32", 1, 64)


def invoke(*args: object):
    done = CliRunner().invoke(app, ["bench", "memory", *map(str, args)], env={"COLUMNS": "200"})
    assert "Traceback" not in done.output
    return done


@pytest.fixture
def folder(tmp_path):
    """Makes a model folder with nothing but a config.json, and the YAML that fits it."""

    def make(family="llama", roles="mixed", sink=4, recent=16, **kwargs):
        config = tiny_config(family, **kwargs)
        config.save_pretrained(tmp_path / family)
        model = tiny_model(family, **kwargs)
        config_for(model, roles, sink, recent).to_yaml(tmp_path / f"{family}.yaml")
        return str(tmp_path / family), str(tmp_path / f"{family}.yaml")

    return make


# Calculated is allocated.


@pytest.mark.spanning
@pytest.mark.parametrize("tokens", [1, 15, 20, 21, 277, 1000, 3000])
@pytest.mark.parametrize("roles", ["retrieval", "streaming", "by layer"])
@pytest.mark.parametrize(("word", "batch"), [("fp32", 1), ("bf16", 3)])
def test_the_calculation_is_what_is_allocated(tokens, roles, word, batch, folder):
    path, config = folder(roles=roles)
    memory_model = find(path, replace(SETTINGS, dtype=word, batch=batch), config)
    number = {"fp32": 4, "bf16": 2}[word]
    head = 2 * 8 * number * batch  # bytes of a slot of one head: k and v, head_dim 8
    letters = "".join(plan.letters for plan in memory_model.plans)
    r, s = letters.count("R"), letters.count("S")
    history = min(255, tokens - 20) + 1 if tokens > 20 else 0  # what generate() has no use for
    want = {
        DENSE: 12 * tokens * head,
        PATCHED: (r * (tokens + max(16, tokens // 8)) + s * min(20, tokens + 16)) * head,
        RESERVED: (r * tokens + s * (min(20, tokens) + history)) * head,
    }
    assert len(letters) == 12 and list(want) == list(WAYS)
    for way in WAYS:
        assert (
            memory_model.kv(way, tokens)
            == want[way]
            == fill(memory_model, way, tokens).most
            == check(memory_model, way, tokens).most
        )


@pytest.mark.spanning
@pytest.mark.parametrize("chunk", [0, 5, 7, 64])
@pytest.mark.parametrize("tokens", [3, 8, 9, 40, 63, 64, 65, 300])
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_windows_of_the_model_s_own_are_counted(family, tokens, chunk, folder):
    path, config = folder(family, sliding=8)
    memory_model = find(path, replace(SETTINGS, chunk=chunk), config)
    sliding = [plan.window is not None for plan in memory_model.plans]
    assert sliding == ([True] * 3 if family == "mistral" else [False, True, False])
    for way in WAYS:
        assert memory_model.kv(way, tokens) == fill(memory_model, way, tokens).most
    if chunk == 5 and tokens == 300:
        head = 2 * 8 * 4 * 4
        windows = sum(sliding)
        assert memory_model.kv(DENSE, tokens) == (windows * (7 + 5) + (3 - windows) * 300) * head


@pytest.mark.spanning
@pytest.mark.parametrize("tokens", [1, 15, 20, 21, 277, 1000, 3000])
@pytest.mark.parametrize(("sink", "recent"), [(4, 16), (0, {"min": 16, "fraction": 0.5}), (900, 16)])
def test_the_calculation_of_a_mean_and_a_window_that_grows_is_what_is_allocated(tokens, sink, recent, folder):
    path, config = folder(roles="streaming")
    store = {"store": "sink_recent_compensated", "sink": sink, "recent": recent}
    LongCtxConfig.from_yaml(config).override(stores={"streaming": store}).to_yaml(config)
    memory_model = find(path, replace(SETTINGS, dtype="bf16", batch=3), config)
    slots, bands = min(tokens, sink), []
    for back in (0, 255):  # what can be taken back: the window of the query before it is held as well
        window = 16 if recent == 16 else max(16, (tokens - back) // 2)
        rest = max(0, min(tokens - sink, window + back))
        bands.append(rest + max(16, rest // 8))
    held = min(sink, slots + max(16, slots // 8)) + (0 if tokens + 16 <= sink else bands[0])
    reserved = slots + min(max(0, tokens - sink), bands[1])
    head = 2 * 8 * 3  # numbers of a slot, and of the two sums, of one head of all rows
    want = {
        DENSE: 12 * tokens * 2 * head,
        PATCHED: 12 * (2 * held + 8) * head,
        RESERVED: 12 * (2 * reserved + 8) * head,
    }
    for way in WAYS:
        assert memory_model.kv(way, tokens) == want[way] == check(memory_model, way, tokens).most


@pytest.mark.parametrize("tokens", [1, 300, 1000, 3000])
@pytest.mark.parametrize(("word", "batch", "bits"), [("fp32", 1, 8), ("bf16", 3, 4)])
def test_packed_bytes_are_what_is_allocated(tokens, word, batch, bits, folder):
    path, config = folder(roles="retrieval")
    made = LongCtxConfig.from_yaml(config).override(
        stores={"retrieval": {"store": "quantized", "bits": bits, "group": 32}}
    )
    made.to_yaml(config)
    memory_model, number = find(path, replace(SETTINGS, dtype=word, batch=batch), config), {"fp32": 4, "bf16": 2}[word]

    def head(exact: int, packed: int) -> int:
        """Bytes of slots of 8 channels: numbers, or codes with two scales a token and two a channel of 32 tokens."""
        return 16 * number * exact + packed * (2 * bits + 2 * number) + packed // 32 * 16 * number

    window, most = 128 + 2 * 32 + 1, 128 + 2 * 32 + 256  # without what can be taken back, and with it
    grown = tokens + max(16, tokens // 8)
    want = {
        PATCHED: head(min(window, tokens + max(16, tokens // 8)), max(0, grown - 128) // 32 * 32),
        RESERVED: head(min(tokens, most), max(0, tokens - 128) // 32 * 32),
    }
    for way, one in want.items():
        assert memory_model.kv(way, tokens) == 12 * batch * one == check(memory_model, way, tokens).most


@pytest.mark.spanning
@pytest.mark.parametrize("tokens", [20, 300])
@pytest.mark.parametrize("case", CASES)
def test_the_calculation_of_every_store_is_what_is_allocated(case, tokens, folder):
    path, config = folder(roles=role_of(case))
    stores = {role_of(case): CASES[case]}
    LongCtxConfig.from_yaml(config).override(stores=stores).to_yaml(config)
    subject = find(path, SETTINGS, config)
    for way in WAYS:
        assert subject.kv(way, tokens) == check(subject, way, tokens).most


def test_a_store_says_its_slots_or_a_test_fails():
    class Twice(StoreSpec):
        def new(self, heads, max_tokens): ...

        def cached_tokens(self, tokens):
            return 2 * tokens

    assert (
        Twice().capacity(3, Reserve()) == 6 + SPARE
        and Twice().capacity(100, Reserve()) == 225
        and Twice().capacity(10_000, Reserve()) == 22_500
        and Twice().capacity(100, Reserve(500)) == 500
    )


@pytest.mark.spanning
@pytest.mark.parametrize("word", ["offloaded", "offloaded_disk"])
@pytest.mark.parametrize("tokens", [1, 20, 359, 360, 361, 1000, 3000])
def test_stores_of_pages_hold_their_window_on_the_device(word, tokens, folder, tmp_path):
    path, config = folder(roles="retrieval")
    data = LongCtxConfig.from_yaml(config).to_dict()
    data["stores"]["retrieval"] = {"store": word, "page": 60, "recent": 300}
    LongCtxConfig.from_dict(data).to_yaml(tmp_path / "paged.yaml")
    memory_model = find(path, replace(SETTINGS, batch=2), str(tmp_path / "paged.yaml"))
    slot = 2 * 8 * 4 * 2 * 12  # k and v, head_dim, float32, rows, heads
    kept = tokens if tokens < 360 else 300 + tokens % 60
    want = {PATCHED: min(kept + max(16, kept // 8), 360) * slot, RESERVED: max(kept, min(tokens, 360)) * slot}
    for way, size in want.items():
        assert (
            memory_model.kv(way, tokens)
            == size
            == fill(memory_model, way, tokens).most
            == check(memory_model, way, tokens).most
        )
    assert memory_model.host(tokens) == (tokens - kept) * slot * (word == "offloaded")
    store = memory_model.plans[0].role("retrieval").store
    assert store.nbytes(tokens, 8, 4).device == kept * 2 * 8 * 4


def test_pages_in_host_memory_must_fit_there(folder, tmp_path, monkeypatch):
    path, config = folder(roles="retrieval")
    data = LongCtxConfig.from_yaml(config).to_dict()
    data["stores"]["retrieval"] = {"store": "offloaded", "page": 64, "recent": 64}
    LongCtxConfig.from_dict(data).to_yaml(tmp_path / "paged.yaml")
    memory_model = find(path, SETTINGS, str(tmp_path / "paged.yaml"))
    monkeypatch.setattr(memory_check, "free_memory", lambda: 2 * memory_model.kv(PATCHED, 2000))
    with pytest.raises(LongCtxError, match="Check a shorter context"):
        check(memory_model, PATCHED, 2000)


def test_a_wrong_calculation_is_an_error(folder, monkeypatch):
    path, config = folder()
    memory_model = find(path, SETTINGS, config)
    for way in WAYS:
        check(memory_model, way, 1000)
    slots = MemoryModel.layer_bytes
    monkeypatch.setattr(MemoryModel, "layer_bytes", lambda *args: slots(*args) + 1)
    for way in WAYS:
        with pytest.raises(LongCtxError, match="was calculated as \\d+ bytes and takes \\d+: the table is wrong"):
            check(memory_model, way, 1000)


def test_nothing_is_allocated_that_the_machine_does_not_have(folder, monkeypatch):
    path, config = folder()
    memory_model = find(path, SETTINGS, config)
    monkeypatch.setattr(memory_check, "fill", lambda *args: pytest.fail("allocated"))
    need = memory_model.kv(PATCHED, 10**6)
    monkeypatch.setattr(memory_check, "free_memory", lambda: need)
    with pytest.raises(LongCtxError, match="this machine has .* GB free. Check a shorter context with --check-tokens"):
        check(memory_model, PATCHED, 10**6)
    monkeypatch.setattr(memory_check, "free_memory", lambda: 10**12)
    with pytest.raises(LongCtxError, match="takes 140737.49 GB, this machine has 1000.00 GB free"):
        check(find("llama-3.1-8b-instruct", MemorySettings(1)), DENSE, 2**30)


def test_free_memory_is_the_smaller_of_machine_and_group(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    1000 kB\n",
        "/sys/fs/cgroup/memory.max": "500000\n",
        "/sys/fs/cgroup/memory.current": "200000\n",
    }
    monkeypatch.setattr(environment, "_read", lambda path: files.get(path, ""))
    assert environment.free_memory() == 300000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert environment.free_memory() == 1024000
    files.clear()
    assert environment.free_memory() is None


# The longest context.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk", [0, 64])
def test_the_longest_context_fits_and_one_token_more_does_not(way, chunk, folder):
    path, config = folder(roles="by layer")
    for size in (10**6, 3 * 10**6, 10**8):
        memory_model = find(path, MemorySettings(size, "bf16", 2, chunk), config)
        tokens = longest(memory_model, way)
        assert memory_model.need(way, tokens).total <= size < memory_model.need(way, tokens + 1).total
        assert all(memory_model.need(way, n).total <= size for n in range(1, tokens, max(1, tokens // 50)))
    assert longest(replace(memory_model, settings=MemorySettings(1)), way) == 0


def test_heads_that_all_stream_have_no_limit(folder):
    path, config = folder(roles="streaming")
    memory_model = find(path, SETTINGS, config)
    assert longest(memory_model, PATCHED) is None and memory_model.need(PATCHED, MOST).total < 10**9
    assert 0 < longest(memory_model, DENSE) < 10**9
    done = invoke(path, "--config", config, "--memory", "1GB")
    assert done.exit_code == 0 and "no limit" in done.output


def test_weights_are_counted_by_the_parameters(folder):
    path, config = folder("qwen3")
    model = tiny_model("qwen3")
    count = sum(p.numel() for p in model.parameters())
    for word, number in (("fp32", 4), ("bf16", 2)):
        assert find(path, replace(SETTINGS, dtype=word), config).weights == count * number
    assert find(path, replace(SETTINGS, weights=5), config).weights == 5
    counts = []
    for tie in (True, False):
        path, config = folder(tie_word_embeddings=tie)
        counts.append(find(path, SETTINGS, config).weights)
    tied, apart = counts
    assert apart - tied == 97 * 32 * 4


def test_shipped_configs_say_what_a_config_cannot():
    eight = find("llama-3.1-8b-instruct", MemorySettings(24 * 10**9))
    assert eight.weights == 2 * 8_030_261_248  # as Meta's checkpoint
    dense, kept = load_shipped("llama-3.1-8b-instruct").kv_bytes(32768)
    history = 128 * 256 * 2 * 128 * 2  # what kv_bytes leaves out: 256 slots of every streaming head
    assert (eight.kv(DENSE, 32768), eight.kv(RESERVED, 32768)) == (dense, kept + history)
    assert "shares the embeddings" in eight.notes[0] and "1.05 GB" in eight.notes[0]
    assert find("hf-longctx/tiny-llama", SETTINGS).notes == ()
    assert find("tiny-llama", SETTINGS).plans == find("hf-longctx/tiny-llama", SETTINGS).plans


def test_a_yaml_that_does_not_say_how_large_the_model_is(folder, tmp_path):
    path, config = folder()
    assert find(config, SETTINGS).kv(PATCHED, 500) == find(path, SETTINGS, config).kv(PATCHED, 500)
    data = LongCtxConfig.from_yaml(config).to_dict()
    del data["model"]["fingerprint"]
    LongCtxConfig.from_dict(data).to_yaml(tmp_path / "bare.yaml")
    with pytest.raises(ConfigError, match="lacks hidden_size, intermediate_size, vocab_size"):
        find(str(tmp_path / "bare.yaml"), SETTINGS)


# The command.


def test_the_command_prints_a_table_and_writes_json(folder, tmp_path):
    path, config = folder()
    out = tmp_path / "out.json"
    args = ("--memory", "2MB", "--dtype", "fp32", "--batch", 2, "--chunk", 64, "--check", "--json", out)
    done = invoke(path, "--config", config, *args)
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    assert data["benchmark"] == "memory" and data["environment"]["torch"] == torch.__version__
    assert data["settings"] == {"memory": 2 * 10**6, "dtype": "fp32", "batch": 2, "chunk": 64, "weights": None}
    memory_model = find(path, MemorySettings(2 * 10**6, "fp32", 2, 64), config)
    assert [result["way"] for result in data["results"]] == list(WAYS)
    for result in data["results"]:
        tokens = longest(memory_model, result["way"])
        assert tokens > 0 and result["longest"] == tokens and str(tokens) in done.output
        assert result["need"] == memory_model.need(result["way"], tokens).as_dict()
        assert result["checked"] == {"tokens": tokens, "bytes": result["need"]["kv"]}
    assert "as calculated" in done.output and "6 of 12 KV heads" in done.output and "4096 tokens" in done.output
    short = json.loads(invoke_json(tmp_path, path, "--config", config, "--memory", "2MB", "--check-tokens", 100))
    assert {result["checked"]["tokens"] for result in short["results"]} == {100}
    unchecked = json.loads(invoke_json(tmp_path, path, "--config", config, "--memory", "2MB", "--weights", "1MiB"))
    assert {result["checked"] for result in unchecked["results"]} == {None}
    assert unchecked["settings"]["weights"] == 2**20 and unchecked["results"][0]["need"]["weights"] == 2**20


def invoke_json(tmp_path, *args: object) -> str:
    done = invoke(*args, "--json", tmp_path / "more.json")
    assert done.exit_code == 0, done.output
    return (tmp_path / "more.json").read_text()


def test_weights_that_do_not_fit_are_said(folder):
    path, config = folder()
    done = invoke(path, "--config", config, "--memory", "1GB", "--weights", "2GB")
    assert done.exit_code == 0 and done.output.count(" none ") == 3
    assert "The weights alone take 2.00 GB." in done.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("llama-3.1-8b-instrct", "--memory", "1GB"), "Did you mean 'llama-3.1-8b-instruct'?"),
        (("no/such-model", "--memory", "1GB"), "config.json cannot be read"),
        (("hf-longctx/none", "--memory", "1GB"), "no embedded model 'none'"),
        (("tiny-llama", "--memory", "1GB", "--config", "tiny-llama"), "tiny-llama is a config itself"),
        (("tiny-llama", "--memory", "0GB"), "memory: got 0, expected a whole number, at least 1"),
        (("tiny-llama", "--memory", "24"), "is no size such as 24GB"),
        (("tiny-llama", "--memory", "24QB"), "is no size such as 24GB"),
        (("tiny-llama", "--memory", "1GB", "--weights", "x"), "is no size such as 24GB"),
        (("tiny-llama", "--memory", "1GB", "--dtype", "fp8"), "--dtype: got 'fp8', expected one of: fp32, bf16"),
        (("tiny-llama", "--memory", "1GB", "--json", "x.txt"), "--json: got 'x.txt'"),
    ],
)
def test_what_cannot_be_counted_is_refused(args, message):
    done = invoke(*args)
    assert done.exit_code == 2 and message in done.output.replace("\n", " "), done.output
