"""Public names are imported when they are asked for, so that the package and the help of every command come at once."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap

import pytest

import hf_longctx
from hf_longctx import _MODULES
from hf_longctx.commands._app import app

HEAVY = ("torch", "transformers", "accelerate", "numpy", "matplotlib")


def in_a_new_process(script: str, **env: str):
    """What the script prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def loaded(script: str) -> set[str]:
    """The modules of ours and the heavy packages that are there after the script."""
    script = f"{textwrap.dedent(script)}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    return {name for name in in_a_new_process(script) if name in HEAVY or name.startswith("hf_longctx")}


def test_importing_the_package_imports_nothing_else():
    assert loaded("import hf_longctx; dir(hf_longctx)") == {"hf_longctx"}
    found = loaded("from hf_longctx import ConfigError, LongCtxConfig")
    assert {"hf_longctx.errors", "hf_longctx.config.config"} <= found and not found & set(HEAVY)


def test_the_help_of_every_command_and_the_version_import_nothing_heavy():
    commands = """
        import typer
        from hf_longctx.commands._app import app
        def every(group, path=()):
            yield [*path, "--help"]
            for name, command in getattr(group, "commands", {}).items():
                if name != "lm-eval":  # its help is lm-eval's own
                    yield from every(command, (*path, name))
        asked = [["--version"], *every(typer.main.get_command(app))]
        for words in asked:
            app(words, standalone_mode=False)
        assert len(asked) > 10, len(asked)
    """
    assert not loaded(commands) & set(HEAVY)


def test_the_shipped_configs_are_shown_without_transformers():
    commands = """
        from hf_longctx.commands._app import app
        for words in (["configs"], ["configs", "show", "llama-3.1-8b-instruct"]):
            app(words, standalone_mode=False)
    """
    found = loaded(commands)
    assert "torch" in found, "the stores say themselves what they keep; a control"
    assert not found & {"transformers", "accelerate", "matplotlib"}


def test_dir_shows_the_public_names():
    found = in_a_new_process("import json, hf_longctx; print(json.dumps(dir(hf_longctx)))")
    assert [name for name in found if not name.startswith("__")] == hf_longctx.__all__
    assert {"__version__", "__doc__", "__all__"} <= set(found)


def test_a_star_import_gives_all_of_them():
    found: dict = {}
    exec("from hf_longctx import *", found)  # as a file's first line
    assert found.keys() - {"__builtins__"} == set(hf_longctx.__all__)


def test_each_name_is_where_the_table_says_and_where_type_checkers_look():
    import ast
    from pathlib import Path

    tree = ast.parse(Path(hf_longctx.__file__).read_text("utf-8"))
    block, getter = (node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert ast.unparse(getter.test) == "not TYPE_CHECKING" and getter.body[0].name == "__getattr__"
    assert block.test.id == "TYPE_CHECKING" and told == _MODULES and sorted(told) == hf_longctx.__all__
    for name in hf_longctx.__all__:
        assert getattr(hf_longctx, name).__module__ == f"hf_longctx.{_MODULES[name]}"


def test_a_name_that_is_not_there_is_an_attribute_error():
    for name in ("nothing", "_nothing", "__wrapped__", "no thing", "config.nothing"):
        assert not hasattr(hf_longctx, name)
    with pytest.raises(AttributeError, match="module 'hf_longctx' has no attribute 'nothing'"):
        hf_longctx.nothing  # noqa: B018


def test_modules_are_there_without_being_imported_first():
    assert in_a_new_process("import json, hf_longctx; print(json.dumps(hf_longctx.errors.__name__))") == (
        "hf_longctx.errors"
    )


def test_functions_pickle_and_a_test_can_replace_them(monkeypatch):
    for name in hf_longctx.__all__:
        assert pickle.loads(pickle.dumps(getattr(hf_longctx, name))) is getattr(hf_longctx, name)
    for name in ("report", "patch_model"):
        before = getattr(hf_longctx, name)
        with monkeypatch.context() as patch:
            patch.setattr(hf_longctx, name, print)
            assert getattr(hf_longctx, name) is print
        assert getattr(hf_longctx, name) is before


# Of the command line.


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("hf-longctx conf", ["configs"]),
        ("hf-longctx identify-", ["identify-prefill"]),
        ("hf-longctx bench d", ["decode"]),
        ("hf-longctx plan --mem", ["--memory"]),
    ],
)
def test_a_shell_completes_commands_and_options(words, found):
    env = {"_HF_LONGCTX_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    script = "from hf_longctx.commands._app import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={**os.environ, **env}
    )
    assert done.stdout.split() == found and not done.stderr


def test_the_version_and_the_short_help():
    from typer.testing import CliRunner

    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).stdout == f"hf-longctx {hf_longctx.__version__}\n"
    for words in ([], ["eval"], ["configs"], ["configs", "show"], ["bench", "gpu"]):
        short, long = (runner.invoke(app, [*words, option]) for option in ("-h", "--help"))
        assert short.exit_code == 0 and short.stdout == long.stdout and "Usage" in short.stdout
    shown = runner.invoke(app, ["--help"]).stdout
    assert "--install-completion" in shown and "--version" in shown
