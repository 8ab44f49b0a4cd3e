"""Which file may import which, that importing changes nothing, and what every file and docstring keeps to."""

from __future__ import annotations

import ast
import functools
import graphlib
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
PATCHES = Path(inspect.getfile(hf_longctx.family.importlib.import_module("hf_longctx.patches"))).parent
FILES = sorted(ROOT.rglob("*.py")) + sorted(PATCHES.glob("*.py"))
OURS = {name for name in vars(hf_longctx.errors) if name.endswith("Error")}

# File or folder -> the files and folders of this package that it imports. A folder may import itself; `__init__` stands
# for the public names. A new file at the top of the package gets a line here; a new store, pattern, selector, kernel or
# family does not.
CONFIG = {"errors", "bounds", "strict_yaml", "registry", "head_map", "config_files", "config_model", "config_sections"}
CONFIG |= {"config"}
LAYERS = {
    "errors": set(),
    "whole_file": set(),
    "bounds": set(),
    "strict_yaml": {"errors"},
    "registry": {"errors", "bounds", "strict_yaml"},
    "head_map": {"errors", "bounds"},
    "config_files": {"errors", "registry", "strict_yaml"},
    "config_model": {"bounds", "registry"},
    "config_sections": {"errors", "bounds", "registry", "head_map", "config_model"},
    "config": CONFIG - {"config"},
    "config_find": CONFIG,
    "family": {"errors"},
    "patches": {"family"},
    "prompt_learning": {"errors"},
    "mask_errors": {"errors", "prompt_learning"},
    "rows": {"mask_errors"},
    "kernels": {"errors"},
    "tensor_file": {"errors"},
    "saved": {"errors", "kernels", "rows", "tensor_file", "bounds"},
    "stores": {"errors", "bounds", "kernels", "rows", "saved", "tensor_file"},
    "prefill": {"errors", "bounds", "kernels", "rows"},
    "decode": {"errors", "kernels", "rows"},
    "layer_plan": {"kernels", "stores", "prefill"},
    "token_ids": set(),
    "finite": {"errors"},
    "devices": set(),
    "weights": set(),
    "fingerprint": {"errors", "config_model", "weights"},
    "cache_file": {"errors", "registry", "rows", "layer_plan", "whole_file", "finite", "tensor_file", "fingerprint"}
    | {"bounds", "cache_layer", "config_model", "devices", "saved"},
    "dense_members": {"errors"},
    "graphs": {"errors"},
    "positions": {"errors", "rows"},
    "cache_layer": {"errors", "kernels", "rows", "stores", "layer_plan", "finite", "dense_members", "saved"}
    | {"tensor_file"},
    "cache": {"errors", "kernels", "rows", "stores", "cache_layer", "token_ids", "cache_file", "dense_members"},
    "seam": {"errors"},
    "rotary": {"errors", "rows"},
    "refusals": {"errors", "attention", "prompt_learning", "seam"},
    "contract": {"errors", "cache_layer", "seam"},
    "as_stock": {"errors"},
    "attention": {"errors", "kernels", "rows", "stores", "prefill", "decode", "layer_plan", "cache_layer", "seam"}
    | {"as_stock"},
    "break_even": {"stores", "cache"},
    "patch_state": {"errors", "config", "rows", "layer_plan", "cache", "break_even"},
    "hooks": {"errors", "rows", "layer_plan", "cache", "attention", "patch_state", "seam", "rotary", "refusals"}
    | {"mask_errors", "graphs", "positions"},
    "overrides": CONFIG,
    "patch": CONFIG
    | {"config_find", "family", "rows", "kernels", "stores", "prefill", "layer_plan", "cache", "attention"}
    | {"patch_state", "hooks", "contract", "overrides"},
    "loading": {"errors", "config", "patch"},
    "report": {"errors", "cache", "patch", "patch_state"},
    "tasks": {"errors", "bounds", "registry", "seam", "devices"},
    "identify": {"errors", "registry", "head_map", "config", "config_find", "kernels", "patch", "tasks", "whole_file"}
    | {"seam", "bounds", "progress", "weights"},
    "identify_prefill": CONFIG
    | {"config_find", "family", "kernels", "prefill", "patch", "tasks", "identify"}
    | {"whole_file"},
    "evaluate": {"errors", "environment", "registry", "config", "cache", "patch", "report", "tasks", "identify"}
    | {"assets", "plots", "whole_file", "progress", "seam", "strict_yaml"},
    "prompt": {"errors", "cache", "tasks", "seam"},
    "prompt_cache": {"errors", "cache", "prompt", "prompt_learning"},
    "__init__": {"errors", "config", "cache", "patch", "loading", "report", "identify", "identify_prefill", "evaluate"}
    | {"prompt_cache"},
    "environment": set(),
    "console": set(),
    "progress": set(),
    "sizes": {"errors", "bounds", "registry"},
    "ladder": CONFIG | {"memory"},
    "plan": CONFIG | {"ladder", "memory", "memory_find", "sizes"},
    "memory": CONFIG | {"stores", "family", "layer_plan", "patch", "sizes"},
    "memory_find": CONFIG | {"assets", "config_find", "family", "memory", "patch", "sizes"},
    "plots": {"errors", "config"},
    # What stands on the public names, which it may also take from the files that define them.
    "assets": {"errors"},
    "identify_commands": {"console", "errors", "registry", "config", "loading", "assets", "identify", "plots", "sizes"},
    "identify_prefill_commands": {
        "console",
        "registry",
        "config",
        "assets",
        "identify_commands",
        "identify_prefill",
        "sizes",
    },
    "compare_commands": {"__init__", "console", "errors", "registry", "assets", "bench", "evaluate"}
    | {"identify_commands"},
    "eval_commands": {"console", "registry", "assets", "identify", "identify_commands", "tasks", "evaluate", "sizes"},
    "plan_commands": {"bench", "config", "console", "environment", "identify_commands", "registry", "sizes"},
    "__main__": {"cli"},
    "demo": {"__init__", "console", "errors", "config", "cache", "patch", "loading", "report", "assets", "tasks"}
    | {"progress", "seam"},
    "bench": CONFIG
    | {"__init__", "environment", "family", "kernels", "prefill", "layer_plan", "cache", "patch", "loading", "report"}
    | {"assets", "plots", "tasks", "console", "progress", "memory", "memory_find", "sizes", "seam"},
    "config_reference": CONFIG,
    "config_list": CONFIG | {"assets"},
    "config_commands": CONFIG | {"config_find", "config_list", "config_reference", "console"},
    "cli": {"__init__", "console", "errors", "assets", "tasks", "demo", "bench", "config_commands", "identify_commands"}
    | {"identify_prefill_commands", "compare_commands", "eval_commands", "evaluate", "plan_commands"}
    | {"progress"},
}
# What a method imports only when it is called, to hand on to: no part of the order, and never at the top of a file.
LATE = {"config": {"plan"}}
TRANSFORMERS = {"cache", "cache_layer", "attention", "hooks", "patch", "loading", "demo", "bench", "identify"}
TRANSFORMERS |= {"as_stock", "identify_commands", "environment", "memory_find", "console", "seam", "contract"}
TRANSFORMERS |= {"config_commands", "refusals"}
COMMANDS = ("cli", "compare_commands", "config_commands", "config_reference", "eval_commands")
COMMANDS += ("identify_commands", "identify_prefill_commands", "plan_commands")
NOT_AT_IMPORT = (
    *COMMANDS,
    "demo",
    "bench",
    "assets",
    "patches",
    "plots",
    "memory",
    "memory_find",
    "sizes",
    "plan",
    "ladder",
    "config_list",
)


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


def test_every_file_has_its_line_and_the_table_has_no_circle():
    assert {unit(file) for file in FILES} == set(LAYERS)
    assert set(graphlib.TopologicalSorter(LAYERS).static_order()) == set(LAYERS)


@pytest.mark.parametrize("file", FILES, ids=show)
def test_a_file_imports_only_what_the_table_says(file):
    allowed = LAYERS[unit(file)] | ({unit(file)} if file.parent != ROOT else set())
    late = LATE.get(unit(file), set())
    top = {node.lineno for node in ast.parse(file.read_text("utf-8")).body}
    found = [(line, ours(module, name)) for line, module, name in imported(file)]
    found = [(line, asked) for line, asked in found if not (asked in late and line not in top)]
    wrong = [f"line {line}: {asked}" for line, asked in found if asked is not None and asked not in allowed]
    assert not wrong, f"{show(file)} imports {wrong}; tests/test_imports.py allows it {sorted(allowed)}"


@pytest.mark.parametrize("file", FILES, ids=show)
def test_only_the_files_of_the_seam_import_transformers(file):
    found = [
        line for line, module, _ in imported(file) if module.split(".")[0] in ("transformers", "accelerate", "peft")
    ]
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
        hf_longctx.attention.register()
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
            for method, value in vars(thing).items():
                if not method.startswith("_") and (callable(value) or isinstance(value, (classmethod, property))):
                    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
                    yield f"{name}.{method}", value.__doc__, [f"{name}.{method}"]
        else:
            yield name, thing.__doc__, [name]


PUBLIC = {name: (doc, code) for name, doc, code in public()}


def test_all_lists_every_public_name():
    assert hf_longctx.__all__ == sorted(hf_longctx.__all__)
    assert [name for name in dir(hf_longctx) if not name.startswith("__")] == hf_longctx.__all__


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_say_what_they_do_and_what_they_raise(name):
    doc, code = PUBLIC[name]
    inherited = name.startswith("LongCtxCache.") and getattr(hf_longctx.cache.Cache, name.split(".")[1], None)
    assert doc or inherited, f"{name} has no docstring"
    raised = [one for one in code if one in raising()]
    assert not raised or "Raise" in doc or "Error" in doc, f"{name} raises our errors and its docstring does not say so"


def test_the_search_for_raising_functions_finds_them():
    found = set(raising())
    assert {"patch_model", "unwrap", "uninstall", "report", "LongCtxCache.__init__", "LongCtxCache.crop"} <= found
    assert not {"LongCtxCache.seen", "install", "families"} & found
