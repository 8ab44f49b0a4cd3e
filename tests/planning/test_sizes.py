"""Sizes and lengths as people write them."""

from __future__ import annotations

import pytest
from helpers.config_cases import refused
from typer.testing import CliRunner

from hf_longctx.commands._app import app
from hf_longctx.config.bounds import MOST
from hf_longctx.planning.sizes import parse_bytes, parse_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        *(("131072", 131072), ("128k", 131072), ("128K", 131072), ("1M", 1048576), ("1m", 1048576), ("4k", 4096)),
        *(("1.5k", 1536), ("0.5M", 524288), (" 32k ", 32768), ("32 k", 32768), ("128_000", 128000), (7, 7), ("1", 1)),
        (str(MOST), MOST),
    ],
)
def test_tokens(text, tokens):
    assert parse_tokens(text, "--context") == tokens


@pytest.mark.parametrize(
    "text",
    ["", "k", "128kb", "128 tokens", "-1", "0", "1e6", "1.3k", "0.0001", "2g", "9" * 500, "3000M", "nan", "٣k", "1k2"],
)
def test_what_is_no_number_of_tokens(text):
    message = refused(
        lambda: parse_tokens(text, "--context"), "--context: got ", "131072 or 128k (k is 1024, M is 1048576)"
    )
    assert len(message) < 250


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("1.5 gib", 3 * 2**29), ("0.1TB", 10**11), (" 7 MB ", 7 * 10**6), (12, 12)],
)
def test_bytes(text, size):
    assert parse_bytes(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "24", "GB", "-1GB", "1e9GB", "24 G", "٣GB", "9" * 400 + "GB", None, 2.5, True])
def test_what_is_no_size(text):
    message = refused(lambda: parse_bytes(text, "--memory"), "--memory: ", "is no size such as 24GB; units: GB, MB")
    assert len(message) < 200


def test_the_least_is_the_options_own():
    assert parse_tokens("0", "--chunk", 0) == 0
    refused(lambda: parse_tokens("1", "--window", 2), "from 2 to")


@pytest.mark.parametrize(
    ("args", "option"),
    [
        (["plan", "tiny-llama", "--memory", "1GB", "--context", "8x"], "--context"),
        (["plan", "tiny-llama", "--memory", "1GB", "--context", "8k", "--chunk", "x"], "--prefill-chunk-size"),
        (["bench", "memory", "tiny-llama", "--memory", "1GB", "--chunk", "x"], "--prefill-chunk-size"),
        (["bench", "memory", "tiny-llama", "--memory", "1GB", "--check-tokens", "x"], "--check-tokens"),
        (["bench", "decode", "--tokens", "8x"], "--tokens"),
        (["bench", "gpu", "--decode-tokens", "8x"], "--decode-tokens"),
        (["eval", "hf-longctx/tiny-llama", "--out", "o", "--tasks", "needle", "--lengths", "8x"], "--lengths"),
        (
            [
                "eval",
                "hf-longctx/tiny-llama",
                "--out",
                "o",
                "--tasks",
                "needle",
                "--lengths",
                "2k",
                "--prefill-chunk-size",
                "x",
            ],
        )
        + ("--prefill-chunk-size",),
    ],
)
def test_every_option_of_tokens_reads_them_so(args, option):
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 2 and f"{option}: got " in done.output and "128k" in done.output, done.output


def test_a_plan_for_128k():
    words = CliRunner().invoke(
        app, ["plan", "tiny-llama", "--memory", "1GB", "--context", "128k"], env={"COLUMNS": "80"}
    )
    numbers = CliRunner().invoke(
        app, ["plan", "tiny-llama", "--memory", "1GB", "--context", "131072"], env={"COLUMNS": "80"}
    )
    assert words.exit_code == 0 and words.output == numbers.output and "131072 tokens" in words.output
