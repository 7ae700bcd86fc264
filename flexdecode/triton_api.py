"""All that depends on the version of Triton: compiling ahead of time, launching, tensor descriptors, Gluon.

Triton's public interface is `kernel[grid](...)`. It specialises integers by value and costs more than a launch, so
flexdecode compiles and launches by what lies below, which differs between versions. The differences that matter:

- From 3.8 on a `CompiledKernel` unloads its machine code when it is collected. `Launch` keeps it.
- From 3.8 on the function that encodes a tensor descriptor takes one argument more.
- Gluon is experimental. `templates/latent.py` is written for the Gluon of 3.6 and later.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import CompileError, TritonVersionError
from .switch import check_allowed

OLDEST, NEWEST = (3, 5), (3, 9)  # versions of Triton that the tests ran with


@functools.cache
def triton_version() -> tuple[int, int] | None:
    """Major and minor version of the installed Triton; None where it is installed under another name."""
    try:
        major, minor = importlib.metadata.version("triton").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return None
    return int(major), int(minor)


@functools.cache
def triton_release() -> str:
    """The whole version of the installed Triton."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        import triton

        return triton.__version__


def cuda_headers() -> Path:
    """The folder with `cuda.h`, which Triton brings along.

    Raises:
        CompileError: it does not.
    """
    found = importlib.util.find_spec("triton")
    places = [] if found is None else found.submodule_search_locations or []
    for place in places:
        folder = Path(place) / "backends" / "nvidia" / "include"
        if (folder / "cuda.h").is_file():
            return folder
    raise CompileError("a folder of kernels needs cuda.h, which this Triton does not have: install Triton from PyPI")


def _spelled(version: tuple[int, int] | None) -> str:
    return "of an unknown version" if version is None else f"{version[0]}.{version[1]}"


def version_error(problem: str) -> TritonVersionError:
    """The error for a Triton that flexdecode cannot launch kernels with; it names the version and the remedy."""
    return TritonVersionError(
        f"{problem}\n  Installed is Triton {_spelled(triton_version())}; flexdecode is tested with Triton "
        f"{_spelled(OLDEST)} to {_spelled(NEWEST)}.\n"
        "  Install the torch and Triton that belong together (`pip install torch` brings its Triton), or update "
        "flexdecode."
    )


@functools.cache
def check_version() -> None:
    """Refuses a Triton that is too old, before anything is compiled.

    Raises:
        TritonVersionError: it is older than 3.5.
    """
    version = triton_version()
    if version is not None and version < OLDEST:
        raise version_error(f"flexdecode needs Triton {_spelled(OLDEST)} or later.")


def has_gluon() -> bool:
    """Whether the installed Triton has Gluon as `templates/latent.py` uses it; under another name, compiling shows."""
    version = triton_version()
    return version is None or version >= (3, 6)


def triton_folder() -> str:
    """Where Triton keeps machine code; empty if it cannot be imported."""
    try:
        from triton import knobs
    except ImportError:
        return ""
    return str(knobs.cache.dir)


def load_module(path: Path) -> ModuleType:
    """Imports a generated module from its file (Triton reads the source of a kernel from there).

    To identify a kernel, Triton would walk over each of its functions, and it would not see records. The module imports
    nothing else than Triton, so the text of the file identifies all that is in it.
    """
    from triton.runtime.jit import JITFunction

    spec = importlib.util.spec_from_file_location(f"flexdecode_generated_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    text = hashlib.sha256(path.read_bytes()).hexdigest()
    spec.loader.exec_module(module)
    for name, function in vars(module).items():
        if isinstance(function, JITFunction) and function.__globals__ is vars(module):
            function.hash = hashlib.sha256(f"{name} {text}".encode()).hexdigest()
    return module


@functools.cache
def standalone_kernel(path: Path, name: str) -> Any:
    """A kernel of a template that is used as it stands, for Triton's own `kernel[grid](...)`."""
    check_version()
    kernel = getattr(load_module(path), name)
    compile_variant: Any = getattr(kernel, "_do_compile", None)  # of a `JITFunction`; the interpreter has none

    def checked(*arguments: Any, **keywords: Any) -> Any:
        remedy = "Call it once before flexdecode.forbid_compilation(): folders of kernels do not have this one."
        check_allowed(f"the kernel {name} of {path.name}", "", remedy)
        return compile_variant(*arguments, **keywords)

    if compile_variant is not None:
        kernel._do_compile = checked
    return kernel


# --- Compiling --------------------------------------------------------------------------------------------------------


@functools.cache
def _installed() -> str:
    """The installed Triton: its version, its place, and a hash of the sizes and times of the files that compile."""
    import triton

    package, found = os.path.dirname(triton.__file__), []
    for folder in ("_C", "backends", "compiler", "language", "runtime"):
        for place, _, names in os.walk(os.path.join(package, folder)):
            for name in names:
                if name.endswith((".py", ".so")):
                    path = os.path.join(place, name)
                    of = os.stat(path)
                    found.append((path, of.st_size, of.st_mtime_ns))
    return f"{triton_release()} {package} {hashlib.sha256(repr(sorted(found)).encode()).hexdigest()}"


_one_at_a_time = threading.Lock()
_here = threading.local()  # has `compiles` in a thread that compiles a kernel of this library


@functools.cache
def _identify_quickly() -> None:
    """Lets Triton's own store know this Triton by `_installed`, for the kernels of this library.

    For other kernels Triton goes on to hash its own files, several hundred megabytes, once in each process.
    """
    from triton.runtime import cache

    hash_files = getattr(cache, "triton_key", None)
    if hash_files is None:  # another Triton
        return

    @functools.wraps(hash_files)
    def triton_key() -> str:
        return _installed() if getattr(_here, "compiles", False) else hash_files()

    cache.triton_key = triton_key


def compiler_text(target: tuple[str, int | str, int]) -> str | None:
    """What the machine code depends on besides the kernel: Triton, and its settings and variables for a target.

    None if a setting asks Triton to do more than to compile what it has not compiled yet.
    """
    check_version()
    from triton import knobs
    from triton._C import libtriton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    settings = knobs.compilation
    asked = [getattr(settings, name, None) for name in ("override", "dump_ir", "always_compile", "listener")]
    if any([*asked, getattr(knobs.runtime, "add_stages_inspection_hook", None)]):
        return None
    variables = sorted(libtriton.get_cache_invalidating_env_vars().items())
    given = sorted(x for x in os.environ.items() if x[0].startswith("TRITON_") and x[0] != "TRITON_CACHE_DIR")
    options = make_backend(GPUTarget(*target)).parse_options({"enable_fp_fusion": True}).hash()
    chosen = getattr(settings, "knobs", None), getattr(knobs.language, "knobs", None)
    return f"{_installed()}\n{variables}\n{given}\n{options}\n{chosen}"


def ask_for_version(target: tuple[str, int | str, int]) -> None:
    """Asks the assembler of a target for its version, in another process. Triton remembers the answer."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    make_backend(GPUTarget(*target)).hash()


def compile_ahead(
    function: Any,
    types: dict[str, Any],
    constants: dict[str, Any],
    attributes: dict[tuple[int, ...], list],
    target: tuple[str, int | str, int],
    options: dict[str, Any],
    gluon: bool = False,
    when_read: Callable[[float], None] = lambda _: None,
) -> Any:
    """Compiles a kernel from declared types; no GPU is needed.

    Args:
        function: a `triton.jit` function.
        types: Triton type of each argument by name, in order.
        constants: values of the compile-time arguments.
        attributes: divisibility by argument position.
        target: backend, architecture and threads per warp.
        options: of Triton's compiler.
        gluon: whether the kernel's functions are Gluon.
        when_read: called when Triton has read the source, with the seconds that it took. That is most of the work in
            Python. What is left, other threads hardly notice.

    Returns:
        Triton's compiled kernel.

    Raises:
        TritonVersionError: Triton is too old.
        Exception: whatever Triton raises where it does not compile.
    """
    check_version()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(types)
    known = {(names.index(name),): value for name, value in constants.items()}
    if gluon:
        from triton.experimental.gluon import jit
        from triton.experimental.gluon._runtime import GluonASTSource

        source: Any = GluonASTSource(jit(function.fn), types, known, attributes)
    else:
        source = ASTSource(function, types, known, attributes)
    read = type(source).make_ir

    def make_ir(*arguments: Any, **keywords: Any) -> Any:
        begin = time.perf_counter()
        module = read(source, *arguments, **keywords)
        when_read(time.perf_counter() - begin)
        return module

    source.make_ir = make_ir
    _identify_quickly()
    _here.compiles = True
    try:
        return _compile(source, GPUTarget(*target), options)
    finally:
        _here.compiles = False


def _compile(source: Any, target: Any, options: dict[str, Any]) -> Any:
    """Compiles through Triton's own cache; a damaged entry there is compiled again."""
    import triton
    from triton.runtime.cache import FileCacheManager

    try:
        return triton.compile(source, target=target, options=options)
    except RuntimeError:
        # For AMD, Triton 3.6 cannot pipeline some reads of captured tensors ("failed to translate module").
        if target.backend != "hip" or options["num_stages"] == 1:
            raise
        return _compile(source, target, options | {"num_stages": 1})
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        with _one_at_a_time, triton.knobs.cache.scope():  # a scope is of all threads
            manager: Any = triton.knobs.cache.manager_class or FileCacheManager
            overwriting = type("Overwriting", (manager,), {"get_group": lambda self, filename: None})
            triton.knobs.cache.manager_class = overwriting
            return triton.compile(source, target=target, options=options)


def ask_for_shared_memory(compiled: Any, shared: int) -> None:
    """Makes launches of a kernel ask for so many bytes of shared memory, before its machine code is loaded."""
    if shared > compiled.metadata.shared:
        num_warps, num_ctas, _, *others = compiled.packed_metadata
        compiled.metadata = compiled.metadata._replace(shared=shared)
        compiled.packed_metadata = (num_warps, num_ctas, shared, *others)


# --- Launching --------------------------------------------------------------------------------------------------------

_GRID = ["gridX", "gridY", "gridZ", "stream", "function"]  # what Triton's launcher takes first


class Launch:
    """Launches a compiled kernel without Triton's work per call.

    Attributes:
        compiled: Triton's compiled kernel. It owns the machine code on the GPU, so it lives as long as this object.
        encode_descriptors: makes launch arguments of two tensor descriptors, key and value.
    """

    def __init__(self, compiled: Any, num_constants: int, num_descriptors: int = 0) -> None:
        """Loads the machine code.

        Args:
            compiled: what `compile_ahead` gives.
            num_constants: trailing compile-time arguments, which a launch takes as None.
            num_descriptors: tensor descriptors among the arguments, 0 or 2.

        Raises:
            TritonVersionError: this Triton launches kernels in another way.
        """
        self.compiled = compiled
        try:
            self._run = compiled.run  # loads the machine code
            self._head = compiled.function, compiled.packed_metadata, None, None, None
        except AttributeError as error:
            raise version_error(f"Triton's compiled kernel has no `{error.name}`.") from error
        first = list(inspect.signature(self._run).parameters)[: len(_GRID)]
        if first != _GRID and "args" not in first:
            raise version_error(f"Triton's launcher takes ({', '.join(first)}, ...), not ({', '.join(_GRID)}, ...).")
        self._tail = (None,) * num_constants
        self.encode_descriptors: Callable[[object, object], tuple] = lambda key, value: (key, value)
        if num_descriptors:
            self.encode_descriptors = _encoder(self._run) or self.encode_descriptors
        inner = _inner_launch(self._run, self._head)
        self._in_tuple = False
        if inner is not None:
            self._run, self._head, self._in_tuple = inner

    def __call__(self, grid: tuple[int, int], stream: int, arguments: tuple) -> None:
        """Launches on a stream; returns at once."""
        try:
            if self._in_tuple:
                self._run(grid[0], grid[1], 1, stream, *self._head, (*arguments, *self._tail))
            else:
                self._run(grid[0], grid[1], 1, stream, *self._head, *arguments, *self._tail)
        except (TypeError, ValueError, SystemError) as error:  # not what the driver reports, which are RuntimeErrors
            version = triton_version()
            if version is not None and version <= NEWEST:
                raise
            raise version_error(f"Triton did not launch a kernel: {error}.") from error


def _inner_launch(run: Any, head: tuple) -> tuple[Any, tuple, bool] | None:
    """Finds the C function that Triton's launcher calls, and what it gives to it beside grid, stream and arguments.

    The launcher is a Python function that asks for memory of kernels that need some. It takes as long as the launch in
    C. To learn what it gives to the C function, it is called once with another function in that place.

    Args:
        run: Triton's launcher of a kernel.
        head: what it takes between the stream and the arguments.

    Returns:
        The C function; what it takes between the stream and the arguments; and whether it takes the arguments as one
        tuple. None if the kernel needs memory, or if the launcher is built in another way.
    """
    launch = getattr(run, "launch", None)
    if launch is None or any(getattr(run, f"{name}_scratch_size", None) for name in ("global", "profile")):
        return None
    grid, argument = (object(), object(), object(), object()), object()
    given: list[tuple] = []
    run.launch = lambda *arguments: given.append(arguments)
    try:
        run(*grid, *head, argument)
    except Exception:  # it is built in another way, and works as it is
        return None
    finally:
        run.launch = launch
    if len(given) != 1 or given[0][: len(grid)] != grid:
        return None
    *others, last = given[0][len(grid) :]
    in_tuple = last == (argument,)
    return (launch, (*others,), in_tuple) if in_tuple or last is argument else None


def _encoder(run: Any) -> Callable[[object, object], tuple] | None:
    """Makes a launcher take descriptors that are encoded already, so that a repeated launch does not encode again.

    Triton's launcher encodes each descriptor at each launch and copies all arguments in Python (about 15 us). Where it
    is built as in Triton 3.5 to 3.9, its inner launch function is used directly.

    Args:
        run: Triton's launcher of a kernel with two descriptors; changed if the result is not None.

    Returns:
        A function from two descriptors to the launch arguments in their place, or None if `run` is built otherwise.
    """
    from triton.backends.nvidia import driver

    encode: Any = getattr(driver, "make_tensordesc_arg", lambda: None)
    parts = inspect.getclosurevars(run.launch).nonlocals if inspect.isfunction(getattr(run, "launch", None)) else {}
    launch, metas = parts.get("launcher"), parts.get("tensordesc_meta")
    more = len(inspect.signature(encode).parameters) - 2  # of the launch itself, which no encoding looks at
    if launch is None or not metas or len(metas) != 2 or more not in (0, 1):
        return None
    run.launch = launch
    unused = (None,) * more
    return lambda key, value: (*encode(key, metas[0], *unused), *encode(value, metas[1], *unused))


def tensor_descriptor(base: Any, shape: list[int], strides: list[int], block_shape: list[int]) -> object:
    """Triton's description of a tensor that is copied in blocks."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(base, shape, strides, block_shape)
