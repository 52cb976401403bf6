"""Triton's interpreter, which runs kernels on the CPU, made quicker for tests."""

from __future__ import annotations


def patch_language_once(patch) -> None:
    """It puts its own functions into triton.language anew at each call of a function, for two thirds of its time.

    patch: a `pytest.MonkeyPatch`; nothing in this process may compile kernels any more."""
    from triton.runtime import interpreter

    patch_language, patched = interpreter._patch_lang, set()

    def patch_once(function):
        module = function.__globals__["__name__"]
        if module not in patched:
            patched.add(module)
            patch_language(function)
        return interpreter._LangPatchScope()  # with nothing to restore

    patch.setattr(interpreter, "_patch_lang", patch_once)
