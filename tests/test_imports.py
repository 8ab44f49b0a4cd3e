"""Which file may import which, that importing changes nothing, and what every file and docstring keeps to."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_longctx

ROOT = Path(hf_longctx.__file__).parent
PATCHES = Path(inspect.getfile(importlib.import_module("hf_longctx.patches"))).parent
FILES = sorted(ROOT.rglob("*.py")) + sorted(PATCHES.glob("*.py"))
OURS = {name for name in vars(hf_longctx.errors) if name.endswith("Error")}

# Package -> the packages that it imports, beside itself. Data flows from top to bottom: a row names rows above it, and
# no other. A new file in a package gets no row; nothing but these stands at the root.
BELOW = {"errors", "config", "io", "layout", "kernels", "prefill", "decode", "eviction", "stores", "cache"}
LAYERS = {
    "errors": set(),
    "assets": {"errors"},
    "config": {"errors", "assets"},
    "io": {"errors", "config"},
    "layout": {"errors", "config"},
    "kernels": {"errors", "config", "layout"},
    "prefill": {"errors", "config", "layout", "kernels"},
    "decode": {"errors", "config", "layout", "kernels"},
    "eviction": {"errors", "config", "layout", "kernels"},
    "stores": {"errors", "config", "io", "layout", "kernels", "eviction"},
    "cache": BELOW - {"cache"},
    "model": BELOW,
    "tasks": {"errors", "config", "io", "cache", "assets"},
    "prompts": BELOW | {"model", "tasks"},
    "identification": BELOW | {"model", "tasks"},
    "planning": BELOW | {"model", "assets"},
    "evaluate": BELOW | {"model", "tasks", "prompts", "identification", "assets"},
    "bench": BELOW | {"model", "tasks", "prompts", "planning", "assets"},
    "serving": BELOW | {"model", "prompts", "assets"},
    "__init__": {"errors", "config", "cache", "model", "prompts", "identification", "evaluate"},
    "patches": {"__init__"},
    "commands": BELOW
    | {"model", "tasks", "prompts", "identification", "planning", "evaluate", "bench", "serving", "assets", "__init__"},
    "__main__": {"commands"},
}
# What a method imports only when it is called, to hand on to: no part of the order, and never at the top of a file.
LATE = {"config": {"planning"}, "assets": {"model"}}
TRANSFORMERS = {"cache", "model", "prompts", "identification", "planning", "evaluate", "bench", "serving", "commands"}
NOT_AT_IMPORT = ("commands", "bench", "serving", "assets", "patches", "planning")


def unit(file: Path) -> str:
    """The line of the table a file belongs to: its folder, or its own name."""
    if file.parent == PATCHES:
        return "patches"
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of every import in the file, those inside functions too; relative ones made absolute."""
    package = (
        ["hf_longctx", "patches"] if file.parent == PATCHES else ["hf_longctx", *file.relative_to(ROOT).parts[:-1]]
    )
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, module, alias.name) for alias in node.names)


def ours(module: str, name: str) -> str | None:
    """The line of the table that an import asks for, None for what is not ours."""
    parts = module.split(".")
    if parts[0] != "hf_longctx":
        return None
    below = parts[1] if len(parts) > 1 else name
    return below if below in LAYERS else "__init__" if len(parts) == 1 else below


def show(file: Path) -> str:
    return f"{unit(file)}/{file.name}" if file.parent != ROOT else file.name


def needs(file: Path, late: bool) -> set[str]:
    """Modules of this package that a file imports, with ``late`` also in its functions; not those of types alone."""
    tree = ast.parse(file.read_text("utf-8"))
    top = {node.lineno for node in tree.body}
    typing = [
        node for node in tree.body if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    ]
    types = {inner.lineno for node in typing for inner in node.body}
    found = [one for one in imported(file) if one[0] not in types and (late or one[0] in top)]
    return {full for _, module, name in found for full in (module, f"{module}.{name}")}


def test_every_package_has_its_row_and_names_only_rows_above_it():
    assert {unit(file) for file in FILES} == set(LAYERS)
    above: set[str] = set()
    for package, below in LAYERS.items():
        assert below <= above, f"{package} may not import {below - above}"
        above.add(package)


@pytest.mark.parametrize("file", FILES, ids=show)
def test_a_file_imports_only_what_its_package_may(file):
    allowed = LAYERS[unit(file)] | ({unit(file)} if file.parent != ROOT else set())
    late = LATE.get(unit(file), set())
    top = {node.lineno for node in ast.parse(file.read_text("utf-8")).body}
    found = [(line, ours(module, name)) for line, module, name in imported(file)]
    found = [(line, asked) for line, asked in found if not (asked in late and line not in top)]
    wrong = [f"line {line}: {asked}" for line, asked in found if asked is not None and asked not in allowed]
    assert not wrong, f"{show(file)} imports {wrong}; tests/test_imports.py allows it {sorted(allowed)}"


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts if ROOT in file.parents else ("patches", file.stem)
    return ".".join(["hf_longctx", *parts]).removesuffix(".__init__")


def test_no_circle_of_files():
    """Neither in what is imported with a file, nor in what its functions import, but for what LATE declares."""
    graph = {module_of(file): needs(file, late=unit(file) not in LATE) for file in FILES if unit(file) != "__init__"}
    order = graphlib.TopologicalSorter({name: below & graph.keys() - {name} for name, below in graph.items()})
    assert set(order.static_order()) == set(graph)
    with pytest.raises(graphlib.CycleError):  # a control
        tuple(graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


def test_no_public_name_hides_a_module():
    names = {name for name in hf_longctx.__all__ if importlib.util.find_spec(f"hf_longctx.{name}")}
    assert not names


@pytest.mark.parametrize("file", FILES, ids=show)
def test_only_the_upper_packages_import_transformers(file):
    found = [line for line, module, _ in imported(file) if module.split(".")[0] in ("transformers", "peft")]
    assert unit(file) in TRANSFORMERS or not found, f"{show(file)} imports transformers in lines {found}"


@pytest.mark.parametrize("file", FILES, ids=show)
def test_no_print_and_no_bare_except(file):
    tree = ast.parse(file.read_text("utf-8"))
    prints = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"]
    handlers = [n for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler)]
    bare = [n.lineno for n in handlers if n.type is None or getattr(n.type, "id", "") in ("Exception", "BaseException")]
    assert not prints, f"print in lines {prints}: log, or return a value"
    assert not bare, f"except for everything in lines {bare}: name the errors"


@pytest.mark.parametrize("file", FILES, ids=show)
def test_every_file_says_what_it_is_for(file):
    tree = ast.parse(file.read_text("utf-8"))
    assert ast.get_docstring(tree) or not tree.body


# Importing changes nothing.

SNAPSHOT = """
    import json, logging, os, random, sys, warnings

    import numpy, torch, transformers
    import transformers.cache_utils, transformers.generation, transformers.masking_utils, transformers.modeling_utils
    from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
    from transformers.cache_utils import Cache, DynamicCache
    from transformers.integrations import sdpa_attention
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    def ids(mapping):
        return {str(name): id(value) for name, value in mapping.items()}

    def of_logger(logger):
        return [logger.level, logger.propagate, logger.disabled, [id(h) for h in logger.handlers], len(logger.filters)]

    def snapshot():
        tables = {n: t for n, t in vars(transformers.cache_utils).items() if isinstance(t, dict) and n.isupper()}
        classes = (PreTrainedModel, GenerationMixin, Cache, DynamicCache, AutoModel, AutoModelForCausalLM,
                   torch.nn.Module, torch.Tensor)
        loggers = logging.root.manager.loggerDict
        return {
            "attention functions": [ids(dict(ALL_ATTENTION_FUNCTIONS)), ids(AttentionInterface._global_mapping)],
            "mask functions": [ids(dict(ALL_MASK_ATTENTION_FUNCTIONS)), ids(AttentionMaskInterface._global_mapping)],
            "cache tables": {name: ids(table) for name, table in tables.items()},
            "classes": {str(cls): ids(vars(cls)) for cls in classes},
            "config classes": ids(CONFIG_MAPPING._extra_content),
            "sdpa": ids(vars(sdpa_attention)) | {"torch": id(torch.nn.functional.scaled_dot_product_attention)},
            "loggers": {n: of_logger(l) for n, l in loggers.items() if isinstance(l, logging.Logger)},
            "root logger": of_logger(logging.root),
            "torch": [str(torch.get_default_dtype()), str(torch.get_default_device()), torch.get_num_threads(),
                      torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision(),
                      torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.flash_sdp_enabled(),
                      torch.backends.cuda.math_sdp_enabled(), torch.get_rng_state().sum().item()],
            "random": [hash(random.getstate()), int(numpy.random.get_state()[1].sum())],
            "warnings": [str(one) for one in warnings.filters],
            "environment": dict(os.environ),
            "hooks of python": [sys.path, list(map(str, sys.meta_path)), id(sys.excepthook), sys.getrecursionlimit()],
        }

    def changed(before):
        after = snapshot()
        for name in set(after["loggers"]) - set(before["loggers"]):
            assert after["loggers"].pop(name) == [0, True, False, [], 0], name
        return sorted(name for name in before if before[name] != after[name])

    start = snapshot()
"""


def in_a_new_process(script: str) -> dict:
    """What the script prints last, as JSON, after a snapshot of everything global was taken as ``start``."""
    code = textwrap.dedent(SNAPSHOT) + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_importing_changes_nothing_in_transformers():
    seen = in_a_new_process("""
        import hf_longctx
        public = {name: getattr(hf_longctx, name) for name in hf_longctx.__all__}
        imported = changed(start)
        loaded = sorted(name for name in sys.modules if name.startswith("hf_longctx."))
        hf_longctx.install()
        installed = changed(start)
        hf_longctx.uninstall()
        uninstalled = changed(start)
        hf_longctx.model.attention.register()
        print(json.dumps({"imported": imported, "installed": installed, "uninstalled": uninstalled,
                          "registered": changed(start), "loaded": loaded}))
    """)
    assert seen["imported"] == []
    assert seen["installed"] == ["classes"], "a control: the snapshot must see it"
    assert seen["uninstalled"] == []
    assert seen["registered"] == ["attention functions", "mask functions"], "a control"
    assert not [name for name in seen["loaded"] if name.split(".")[1] in NOT_AT_IMPORT]


def test_patching_registers_two_names_and_changes_nothing_else():
    seen = in_a_new_process("""
        from transformers import LlamaConfig
        small = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=8)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**small)).eval()
        text = torch.arange(3, 40)[None]
        model.generate(text, max_new_tokens=2, do_sample=False)
        import hf_longctx
        start = snapshot()
        described = hf_longctx.LongCtxConfig.describe(model.config)
        hf_longctx.patch_model(model, {"model": described, "heads": {"roles": ["RS", "SS"]}})
        model.generate(text, max_new_tokens=2, do_sample=False)
        hf_longctx.unpatch_model(model)
        after, tables = snapshot(), ("attention functions", "mask functions")
        new = [sorted(set(after[table][1]) - set(start[table][1])) for table in tables]
        print(json.dumps({"changed": changed(start), "names": new}))
    """)
    assert seen["changed"] == ["attention functions", "mask functions"]
    assert seen["names"] == [["longctx"], ["longctx"]]


# Docstrings.


def functions(file: Path) -> dict[str, ast.FunctionDef]:
    """Functions of a file by name, methods by ``Class.name``."""
    found = {}
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}": one for one in node.body if isinstance(one, ast.FunctionDef)}
    return found


def own_code(node: ast.AST) -> Iterator[ast.AST]:
    """Everything in a function but the functions it defines, which may never run."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.Lambda):
            yield child
            yield from own_code(child)


@functools.cache
def raising() -> dict[str, ast.FunctionDef]:
    """Functions that raise an error of ours, by themselves or through functions they call by name.

    Calls of another object's methods are not followed, so this finds less than everything.
    """
    all_functions = {name: node for file in FILES for name, node in functions(file).items()}
    found: dict[str, ast.FunctionDef] = {}

    def raises(name: str, node: ast.FunctionDef) -> bool:
        for one in own_code(node):
            if isinstance(one, ast.Raise) and one.exc is not None:
                named = {n.id for n in ast.walk(one.exc) if isinstance(n, ast.Name)}
                if named & OURS:
                    return True
            if isinstance(one, ast.Call):
                called = getattr(one.func, "id", None)
                if isinstance(one.func, ast.Attribute) and getattr(one.func.value, "id", "") in ("self", "cls"):
                    called = f"{name.split('.')[0]}.{one.func.attr}"
                if called in found or f"{called}.__init__" in found or f"{called}.__post_init__" in found:
                    return True
        return False

    while new := {n: f for n, f in all_functions.items() if n not in found and raises(n, f)}:
        found |= new
    return found


def public() -> Iterator[tuple[str, str | None, list[str]]]:
    """(name, docstring, the names its code has in ``functions``) of every public name and its public methods."""
    for name in hf_longctx.__all__:
        thing = getattr(hf_longctx, name)
        if inspect.isclass(thing):
            yield name, vars(thing).get("__doc__"), [f"{name}.__init__", f"{name}.__post_init__"]
            owners = [one for one in thing.__mro__ if one.__module__.startswith("hf_longctx.")]
            for owner, method, value in ((one, *item) for one in owners for item in vars(one).items()):
                if not method.startswith("_") and (callable(value) or isinstance(value, (classmethod, property))):
                    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
                    yield f"{name}.{method}", value.__doc__, [f"{owner.__name__}.{method}"]
        else:
            yield name, thing.__doc__, [name]


PUBLIC = {name: (doc, code) for name, doc, code in public()}


def test_all_lists_every_public_name():
    assert hf_longctx.__all__ == sorted(hf_longctx.__all__)
    assert [name for name in dir(hf_longctx) if not name.startswith("__")] == hf_longctx.__all__


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_say_what_they_do_and_what_they_raise(name):
    doc, code = PUBLIC[name]
    inherited = name.startswith("LongCtxCache.") and getattr(hf_longctx.cache.cache.Cache, name.split(".")[1], None)
    assert doc or inherited, f"{name} has no docstring"
    raised = [one for one in code if one in raising()]
    assert not raised or "Raise" in doc or "Error" in doc, f"{name} raises our errors and its docstring does not say so"


def test_the_search_for_raising_functions_finds_them():
    found = set(raising())
    assert {"patch_model", "unwrap", "uninstall", "report", "LongCtxCache.__init__", "RollBack.crop"} <= found
    assert not {"LongCtxCache.seen", "install", "is_file_name"} & found
