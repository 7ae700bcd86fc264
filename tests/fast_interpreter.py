"""Makes Triton's interpreter faster, for tests.

At each call of a device function it wraps all of `triton.language` anew, which is already wrapped while a kernel runs:
a third of the time of the tests. Here a module that is wrapped is left as it is.
"""

from types import SimpleNamespace


def install() -> None:
    """Replaces the function of the interpreter that does it, where this Triton has it."""
    import triton.language as tl
    from triton.runtime import interpreter

    wrap = getattr(interpreter, "_patch_lang", None)
    if wrap is None or getattr(wrap, "only_once", False):
        return
    wrapped: set[int] = set()

    def wrap_once(fn):
        modules = {id(x) for x in fn.__globals__.values() if x is tl or x is tl.core} - wrapped
        if not modules and wrapped:
            return SimpleNamespace(restore=lambda: None)
        scope = wrap(fn)
        wrapped.update(modules)

        def restore():  # not asked for where Triton never undoes it
            scope.restore()
            wrapped.difference_update(modules)

        return SimpleNamespace(restore=restore)

    wrap_once.only_once = True
    interpreter._patch_lang = wrap_once
