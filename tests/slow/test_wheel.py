"""A wheel holds everything: the data folders, the embedded model, the type marker and the command."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]  # one worker, one wheel

ROOT = Path(__file__).parents[2]
FOLDERS = {"hf_longctx.configs": "configs", "hf_longctx.patches": "patches", "hf_longctx": "hf_longctx"}
NOT_SHIPPED = {"__pycache__"}


def pip(*args: str, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", *args, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def in_the_tree(folder: str) -> set[str]:
    """Files that git tracks or would track below a folder, relative to it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if listed.returncode == 0:
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        paths = [path for path in (ROOT / folder).rglob("*") if not NOT_SHIPPED & set(path.parts)]
    return {path.relative_to(ROOT / folder).as_posix() for path in paths if path.is_file()}


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    """The wheel, installed alone into a folder."""
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy of the tree, so that nothing is left in it and no stale build folder is picked up.
    copy = folder / "tree"
    for name in FOLDERS.values():
        for path in in_the_tree(name):
            (copy / name / path).parent.mkdir(parents=True, exist_ok=True)
            (copy / name / path).write_bytes((ROOT / name / path).read_bytes())
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    pip("wheel", str(copy), "--no-deps", "--wheel-dir", str(folder), cwd=folder)
    (wheel,) = folder.glob("hf_longctx-*.whl")
    pip("install", str(wheel), "--no-deps", "--target", str(folder / "target"), cwd=folder)
    return folder / "target"


def ask(target: Path, script: str):
    """What a script prints as JSON in a process that can import the installed wheel, not this tree."""
    code = f"import sys; sys.path.insert(0, {str(target)!r})\n" + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=target, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("package", FOLDERS)
def test_the_wheel_has_every_file(target, package):
    places = ask(
        target,
        f"""
        import importlib, json
        print(json.dumps(importlib.import_module({package!r}).__file__))
        """,
    )
    folder = Path(places).parent
    assert folder == target / package.replace(".", "/")
    want = in_the_tree(FOLDERS[package])
    assert want, "no files found to compare with"
    got = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert not want - got, "missing in the wheel"
    if package != "hf_longctx":
        return
    assert "py.typed" in got
    extra = {path for path in got - want if not path.startswith(("configs/", "patches/")) and "__pycache__" not in path}
    assert not extra, "in the wheel, not in the tree"


def test_the_installed_package_finds_its_families_configs_and_model(target):
    seen = ask(
        target,
        """
        import json
        import hf_longctx
        from hf_longctx.assets import asset
        from hf_longctx.config.config import load_shipped
        from hf_longctx.config.files import shipped
        from hf_longctx.model.family import families, find_family
        for name in shipped():
            load_shipped(name)
        model = hf_longctx.AutoModelForCausalLM.from_pretrained(asset("tiny-llama"), longctx="auto")
        print(json.dumps({
            "file": hf_longctx.__file__,
            "families": [find_family(name).model_type for name in families()],
            "configs": list(shipped()),
            "retrieval": hf_longctx.report(model).retrieval_heads,
        }))
        """,
    )
    assert Path(seen["file"]).is_relative_to(target)
    assert seen["families"] == sorted(p.stem for p in (ROOT / "patches").glob("[a-z]*.py"))
    assert seen["configs"] == sorted(p.stem for p in (ROOT / "configs").glob("*.yaml"))
    assert seen["retrieval"] > 0


def test_the_metadata_has_the_command_the_licence_and_the_range(target):
    seen = ask(
        target,
        """
        import json
        from importlib.metadata import distributions
        (ours,) = (one for one in distributions(path=[sys.path[0]]) if one.name == "hf-longctx")
        print(json.dumps({
            "commands": {one.name: one.value for one in ours.entry_points if one.group == "console_scripts"},
            "licence": ours.metadata["License-Expression"],
            "files": ours.metadata.get_all("License-File"),
            "requires": ours.requires,
            "python": ours.metadata["Requires-Python"],
            "version": ours.version,
            "author": ours.metadata["Author"],
            "urls": ours.metadata.get_all("Project-URL"),
            "classifiers": ours.metadata.get_all("Classifier"),
            "described": [ours.metadata["Description-Content-Type"], ours.metadata.get_payload()],
        }))
        """,
    )
    import hf_longctx

    assert seen["commands"] == {"hf-longctx": "hf_longctx.commands._app:main"}
    assert (seen["licence"], seen["files"], seen["python"]) == ("Apache-2.0 AND MIT", ["LICENSE", "NOTICE"], ">=3.10")
    assert seen["version"] == hf_longctx.__version__
    assert (seen["author"], seen["urls"]) == ("hf_longctx contributors", None)
    assert "Operating System :: POSIX :: Linux" in seen["classifiers"]
    kind, text = seen["described"]
    assert kind == "text/markdown" and text.startswith("# hf_longctx\n") and "patch_model(model)" in text
    assert "![" not in text and "](docs/" not in text, "pictures and links of the checkout show nothing outside of it"
    assert any(one.startswith("transformers") and ">=5.0" in one and "!=5.2.*" in one for one in seen["requires"])


def test_the_command_prints_its_help(target):
    script = f"import sys; sys.path.insert(0, {str(target)!r}); sys.argv = ['hf-longctx', '--help']\n"
    script += "from hf_longctx.commands._app import main; main()"
    command = [sys.executable, "-I", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=target, check=False)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
