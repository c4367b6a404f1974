"""Triton's interpreter, made quicker: `triton.language` is patched once for each launch, and sums are not checked.

As it is, it walks through all of `triton.language` wherever a kernel calls a function of its own, thousands of times a
launch and a third of its time, to find patched what the launch has patched already; and it computes every sum of
integers again, in 64 bits.
"""

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest


@contextmanager
def interpreted_quickly() -> Iterator[None]:
    """Within it a function that a kernel calls patches no module that its launch has patched already."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch_language, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    @cache
    def modules(function: Any) -> frozenset[str]:
        """Those that patching for `function` changes: what it calls the language by."""
        language = (interpreter.tl, interpreter.tl.core)
        values = function.__globals__.values()
        return frozenset(value.__name__ for value in values if inspect.ismodule(value) and value in language)

    def launch_afresh(self: Any, *arguments: Any, **options: Any) -> Any:
        patched.clear()
        return launch(self, *arguments, **options)

    def patch_once(function: Any) -> Any:
        if modules(function) <= patched:
            return interpreter._LangPatchScope()
        patched.update(modules(function))
        return patch_language(function)

    patch = pytest.MonkeyPatch()
    patch.setattr(interpreter.GridExecutor, "__call__", launch_afresh)
    patch.setattr(interpreter, "_patch_lang", patch_once)
    builder = interpreter.interpreter_builder
    patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
    yield
    patch.undo()
