"""Which kernel computes a call: the first that supports the device, dtype and head_dim at hand, or the one asked for.

A kernel is a module of this folder with the functions of `reference.py` and

- ``NAME: str``, its word in a config (the file name),
- ``PREFERENCE: int``, higher is tried first by ``auto`` (reference 0, cpu 10, native 20; leave room between;
  below 0: by name alone),
- ``supports(device, dtype, head_dim, needs_grad) -> str | None``, None or the reason why not;
  where a function does less than the others, ``supports_<function>`` of the same form answers for it.

Of these functions only `sparse_prefill` may be missing: whoever needs it asks `pick` for a kernel that has it. One more
is for kernels that decode all roles of a layer at once: ``decode_layer(q, parts: list[HeadKV], scale)``. And one for
those that read packed keys without unpacking them first: ``decode_packed(q, segments, scale)``, or None. A kernel
must import on every machine, or fail with ImportError: `pick` then reports that as the reason. Nothing lists kernels by
hand.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from functools import cache
from types import ModuleType

import torch

from .. import errors

AUTO = "auto"
_NOT_KERNELS = ("layout", "dispatch", "base")


@cache
def names() -> tuple[str, ...]:
    """The kernels there are, from the folder's listing, in alphabetical order."""
    package = importlib.import_module(__package__)
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(name for name in found if name not in _NOT_KERNELS and not name.startswith("_")))


def pick(
    word: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    needs_grad: bool,
    function: str | None = None,
) -> ModuleType:
    """The kernel module for one call.

    Args:
        word: ``auto`` or one of `names`.
        device: where q, k and v are.
        dtype: their dtype.
        head_dim: their last dimension.
        needs_grad: whether gradients must flow through the call.
        function: kernels without a function of this name are passed over.

    Raises:
        ConfigError: there is no such kernel.
        UnsupportedModeError: the kernel asked for does not compute this case, or none does.
    """
    if word != AUTO and word not in names():
        near = difflib.get_close_matches(word, [AUTO, *names()], n=1)
        hint = f", did you mean {near[0]!r}?" if near else ";"
        raise errors.ConfigError(f"unknown kernel {word!r}{hint} known: {', '.join([AUTO, *names()])}")
    case, reasons = (device, dtype, head_dim, needs_grad), {}
    for name, module, failure in _candidates([word] if word != AUTO else names()):
        reasons[name] = failure if module is None else _refusal(module, function, case)
        if reasons[name] is None:
            return module
    asked = f"{dtype} on {device.type}, head_dim {head_dim}, {'with' if needs_grad else 'without'} gradients"
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise errors.UnsupportedModeError(
        f"kernel {word!r} does not compute {asked} ({why}). {_advice(word, function, case)}"
    )


def require(word: str, function: str, wanted: str) -> None:
    """Refuse early, before a model runs, a kernel that does not have the function that ``wanted`` (words) needs.

    Raises:
        UnsupportedModeError: the message names the kernels that have it.
    """
    if word not in names():
        return
    found = {name: module for name, module, _ in _candidates(names()) if module is not None}
    if word in found and not hasattr(found[word], function):
        can = [name for name, module in found.items() if hasattr(module, function)]
        raise errors.UnsupportedModeError(
            f"{wanted} needs a kernel with {function!r}, which kernel {word!r} does not have. Use kernel: {AUTO} or "
            f"one of: {', '.join(can)}"
        )


def _candidates(words: tuple[str, ...] | list[str]) -> list[tuple[str, ModuleType | None, str | None]]:
    """(name, module, why it cannot be imported) of these kernels, preferred ones first."""
    found = []
    for name in words:
        full = f"{__package__}.{name}"
        try:  # import_module takes a lock even for what is there, and this runs per layer and token
            found.append((name, sys.modules.get(full) or importlib.import_module(full), None))
        except ImportError as error:
            found.append((name, None, f"cannot be imported ({error})"))
    return sorted(found, key=lambda entry: -(entry[1].PREFERENCE if entry[1] else 0))


def _refusal(module: ModuleType, function: str | None, case: tuple[torch.device, torch.dtype, int, bool]) -> str | None:
    """Why this kernel does not compute the case; None if it does."""
    if function is not None and not hasattr(module, function):
        return f"has no {function}"
    return getattr(module, f"supports_{function}", module.supports)(*case)


def _advice(word: str, function: str | None, case: tuple[torch.device, torch.dtype, int, bool]) -> str:
    """What works instead, as the last sentence of the error."""
    works = [
        name
        for name, module, _ in _candidates(names())
        if name != word and module and _refusal(module, function, case) is None
    ]
    return f"Use kernel: {AUTO} or one of: {', '.join(works)}" if works else "Use a floating point dtype."
