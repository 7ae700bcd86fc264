"""What depends on the version of Triton, on stand-ins for its objects: no GPU, and no Triton, is needed."""

import gc
import importlib.metadata
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import flexdecode
from flexdecode import api, triton_api
from flexdecode.call.device import DeviceFacts
from flexdecode.call.inputs import DecodeOptions, Inputs
from flexdecode.call.signature import NO_AUX
from flexdecode.codegen import kernels as compiled
from flexdecode.errors import TritonVersionError
from flexdecode.runtime.identity import identify
from flexdecode.runtime.prepare import prepare

H100 = DeviceFacts("cuda", 90, num_sms=132, shared_memory=227 * 1024)


class FakeCompiled:
    """A compiled kernel as Triton 3.8 makes it: collecting it unloads its machine code, which `loaded` counts."""

    loaded = 0

    def __init__(self):
        FakeCompiled.loaded += 1
        self.function, self.packed_metadata = 1234, ()
        self.launches = []
        launches = self.launches

        def run(gridX, gridY, gridZ, stream, function, *arguments):
            launches.append(((gridX, gridY, gridZ), stream, function, arguments))

        self.run = run

    def __del__(self):
        FakeCompiled.loaded -= 1


@pytest.fixture(autouse=True)
def fresh():
    flexdecode.clear_cache()
    FakeCompiled.loaded = 0
    yield
    flexdecode.clear_cache()


SECOND = SimpleNamespace(arg_names=["out", "num_splits", "PDL"])


def prepare_a_call(num_keys=4096):
    """Prepares a call for a GPU that is not there; its kernels are stand-ins."""
    query, key, value = (torch.empty(2, h, n, 64, device="meta") for h, n in ((8, 1), (2, num_keys), (2, num_keys)))
    with (
        mock.patch("flexdecode.runtime.prepare.device_facts", lambda _: H100),
        mock.patch.object(compiled, "compile_pass", lambda *_: FakeCompiled()),
        mock.patch.object(compiled, "load_module", lambda path: SimpleNamespace(decode_combine=SECOND)),
        mock.patch.object(triton_api, "_encoder", lambda run: None),
    ):
        mods = identify("score_mod", None), identify("mask_mod", None)
        options = DecodeOptions(backend="triton", num_splits=4)
        _, plan, *_ = prepare(Inputs(query, key, value), mods, NO_AUX, options)
    return plan


def test_a_prepared_call_keeps_the_machine_code_of_its_kernels():
    plan = prepare_a_call()
    gc.collect()
    assert FakeCompiled.loaded == 2  # both passes
    kernel = plan.launcher.first.form.kernel
    kernel.run((3, 4), 5, ("query", "key"))
    ((grid, stream, function, arguments),) = kernel.run.compiled.launches
    assert (grid, stream, function) == ((3, 4, 1), 5, 1234)
    assert arguments[:6] == ((), None, None, None, "query", "key") and set(arguments[6:]) == {None}


def test_the_library_keeps_kernels_that_no_plan_holds():
    """A CUDA graph may launch them after the plan is gone."""
    plan = prepare_a_call()
    kernel = weakref.ref(plan.launcher.first.form.kernel.run.compiled)
    del plan
    gc.collect()
    assert kernel() is not None


def test_clear_cache_gives_the_memory_back():
    prepare_a_call()
    gc.collect()
    assert FakeCompiled.loaded == 2
    flexdecode.clear_cache()
    gc.collect()
    assert FakeCompiled.loaded == 0


@pytest.mark.parametrize("name", ["append", "merge"])
def test_clear_cache_forgets_the_kernels_of_append_and_merge(name, tmp_path):
    path = tmp_path / "module.py"
    path.write_text("class Kernel: pass\nkernel = Kernel()\n")
    kernel = weakref.ref(triton_api.standalone_kernel(path, "kernel"))
    assert kernel() is triton_api.standalone_kernel(path, "kernel")
    api.clear_cache()
    gc.collect()
    assert kernel() is None


@pytest.fixture
def version(monkeypatch):
    """Gives a function that sets the version of Triton."""

    def set_version(text):
        triton_api.triton_version.cache_clear()
        triton_api.check_version.cache_clear()
        missing = importlib.metadata.PackageNotFoundError
        found = mock.Mock(side_effect=missing) if text is None else mock.Mock(return_value=text)
        monkeypatch.setattr(importlib.metadata, "version", found)

    yield set_version
    triton_api.triton_version.cache_clear()
    triton_api.check_version.cache_clear()


REMEDY = "Install the torch and Triton that belong together"


def test_an_old_triton_is_refused_before_anything_is_compiled(version):
    version("3.4.0")
    with pytest.raises(TritonVersionError) as caught:
        triton_api.compile_ahead(None, {}, {}, {}, ("cuda", 90, 32), {})
    text = str(caught.value)
    assert text.startswith(
        "flexdecode needs Triton 3.5 or later.\n  Installed is Triton 3.4; flexdecode is tested with"
    )
    assert "Triton 3.5 to 3.9" in text and REMEDY in text


@pytest.mark.parametrize(("text", "gluon"), [("3.5.1", False), ("3.6.0", True), ("3.10.0+git1", True), (None, True)])
def test_versions_that_may_work(version, text, gluon):
    version(text)
    triton_api.check_version()
    assert triton_api.has_gluon() is gluon


def test_a_launcher_of_another_kind_is_refused_by_name(version):
    version("4.0.0")
    kernel = SimpleNamespace(run=lambda grid, stream, kernel_args: None, function=1, packed_metadata=())
    with pytest.raises(TritonVersionError, match=r"takes \(grid, stream, kernel_args, \.\.\.\)") as caught:
        triton_api.Launch(kernel, 3)
    assert "Installed is Triton 4.0" in str(caught.value) and REMEDY in str(caught.value)


def test_a_compiled_kernel_without_handles_is_refused_by_name(version):
    version("4.0.0")
    with pytest.raises(TritonVersionError, match="compiled kernel has no `run`"):
        triton_api.Launch(SimpleNamespace(function=1), 3)


def test_a_launch_that_a_newer_triton_refuses_names_the_version(version):
    kernel = FakeCompiled()
    launch = triton_api.Launch(kernel, 0)
    launch._run = mock.Mock(side_effect=TypeError("function takes 9 arguments (4 given)"))
    version("3.10.0")
    with pytest.raises(TritonVersionError, match=r"9 arguments[^$]*Installed is Triton 3\.10"):
        launch((1, 1), 0, ())
    version("3.9.0")  # a version that is known: the error is not one of the version
    with pytest.raises(TypeError, match="9 arguments"):
        launch((1, 1), 0, ())


def test_both_forms_of_the_function_that_encodes_descriptors(monkeypatch):
    """From Triton 3.8 on it takes one argument more."""
    pytest.importorskip("triton")
    from triton.backends.nvidia import driver

    def wrapped(launcher, tensordesc_meta):
        def inner(*args):
            return launcher(*args, tensordesc_meta)

        return inner

    for encode in (lambda arg, meta: [arg, meta], lambda arg, meta, base_args: [arg, meta, base_args]):
        monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
        launcher = mock.Mock()
        run = SimpleNamespace(launch=wrapped(launcher, ["k", "v"]))
        encoder = triton_api._encoder(run)
        assert run.launch is launcher
        assert [x for x in encoder("key", "value") if x is not None] == ["key", "k", "value", "v"]


def test_every_other_module_leaves_versions_of_triton_to_this_one():
    package = Path(flexdecode.__file__).parent
    for path in package.rglob("*.py"):
        if path.name != "triton_api.py":
            assert not re.search(r"^ *(import|from) triton\b", path.read_text(), re.MULTILINE), path


# --- The C function that launches -------------------------------------------------------------------------------------


class Launcher:
    """Triton's launcher as 3.6 (flat) and 3.9 (with a tuple) build it."""

    def __init__(self, in_tuple, **sizes):
        self.in_tuple, self.launched, self.called = in_tuple, [], 0
        self.launch = lambda *arguments: self.launched.append(arguments)
        self.__dict__.update(sizes)

    def __call__(self, gridX, gridY, gridZ, stream, function, *args):
        self.called += 1
        head, arguments = args[:4], args[4:]
        more = (arguments,) if self.in_tuple else arguments
        self.launch(gridX, gridY, gridZ, stream, function, "cooperative", *head, *more)


@pytest.mark.parametrize("in_tuple", [False, True])
def test_the_c_function_is_called_with_what_the_launcher_gives_it(in_tuple):
    run = Launcher(in_tuple, global_scratch_size=0, profile_scratch_size=0)
    compiled_kernel = SimpleNamespace(run=run, function=1234, packed_metadata=(4, 1))
    launch = triton_api.Launch(compiled_kernel, 2)
    calls, run.launched = run.called, []
    launch((3, 4), 5, ("query", "key"))
    run(3, 4, 1, 5, 1234, (4, 1), None, None, None, "query", "key", None, None)
    by_launch, by_triton = run.launched
    assert by_launch == by_triton and run.called == calls + 1


@pytest.mark.parametrize("sizes", [{"global_scratch_size": 8}, {"profile_scratch_size": 8}])
def test_a_kernel_that_needs_memory_is_launched_by_triton(sizes):
    run = Launcher(True, **sizes)
    launch = triton_api.Launch(SimpleNamespace(run=run, function=1234, packed_metadata=(4, 1)), 0)
    launch((3, 4), 5, ("query",))
    assert run.called == 1 and run.launched[0][:4] == (3, 4, 1, 5)


def test_a_launcher_that_is_built_in_another_way_is_left_as_it_is():
    def run(gridX, gridY, gridZ, stream, function, *args):
        if not isinstance(gridX, int):
            raise ValueError("grids are numbers")
        launched.append(args)

    launched = []
    run.launch = None
    triton_api.Launch(SimpleNamespace(run=run, function=1, packed_metadata=()), 0)((3, 4), 5, ("query",))
    run.launch = other = lambda *args: None
    triton_api.Launch(SimpleNamespace(run=run, function=1, packed_metadata=()), 0)((3, 4), 5, ("query",))
    assert [args[-1] for args in launched] == ["query"] * 2 and run.launch is other
