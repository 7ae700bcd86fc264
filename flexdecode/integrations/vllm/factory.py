"""Finds the function that makes a user's mods, and calls it for each layer; imports nothing of vLLM."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...frontend.parameters import check_parameters
from .attend import NO_MODS, LayerMods

VARIABLE = "FLEXDECODE_VLLM_MODS"
_HOW = (
    '--additional-config \'{"flexdecode": {"mods": "my_mods:mods"}}\', or the environment variable '
    f"{VARIABLE}=my_mods:mods"
)


@dataclass(frozen=True)
class Layer:
    """What is known of an attention layer of vLLM when its mods are made.

    Attributes:
        name: vLLM's name of it, for example `model.layers.3.self_attn.attn`.
        index: the number of the layer, or None if its name has none.
        num_heads: query heads on this rank.
        num_kv_heads: KV heads on this rank; 1 if the layer keeps latents.
        head_dim: D of queries and keys.
        first_head: the number, among all of the model, of head 0 of this rank. Without tensor parallelism it is 0. In a
            mod, `h` counts the heads of the rank, so a table of all heads is read at `first_head + h`.
        window: tokens that a token sees in this layer, or None.
        device: of the cache.
        dtype: of queries.
    """

    name: str
    index: int | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    first_head: int
    window: int | None
    device: torch.device
    dtype: torch.dtype


class Settings(NamedTuple):
    """What the configuration says.

    Attributes:
        factory: the name of the factory, or None for none.
        debug: whether calls are checked as with `DecodeOptions(debug=True)`.
    """

    factory: str | None = None
    debug: bool = False


def read_settings(additional_config: Any) -> Settings:
    """Reads what `--additional-config` has for flexdecode; without a factory there, the environment variable names it.

    Raises:
        TypeError, ValueError: the configuration is not as described, or has a key that is nearly right.
    """
    config = additional_config if isinstance(additional_config, dict) else {}
    for key in config:
        if key == "mods" or (key != "flexdecode" and get_close_matches(str(key).lower(), ["flexdecode"], cutoff=0.8)):
            raise ValueError(f"the additional config has the key {key!r}; write {_HOW}")
    ours = config.get("flexdecode", {"mods": None})
    if not isinstance(ours, dict):
        raise TypeError(f'"flexdecode" in the additional config must be an object, got {ours!r}; write {_HOW}')
    if not ours or (unknown := sorted(map(str, ours.keys() - {"mods", "debug"}))):
        got = unknown if ours else "none"
        raise ValueError(
            f'"flexdecode" in the additional config has the keys "mods" and "debug", got {got}; write {_HOW}'
        )
    name, debug = ours.get("mods"), ours.get("debug", False)
    if "flexdecode" in config and "mods" in ours and (not isinstance(name, str) or not name):
        raise TypeError(f'"mods" in the additional config must be a text, "module:function", got {name!r}')
    if not isinstance(debug, bool):
        raise TypeError(f'"debug" in the additional config must be true or false, got {debug!r}')
    return Settings(name or os.environ.get(VARIABLE) or None, debug)


def find_factory(name: str) -> Callable[[Layer], LayerMods | None]:
    """Imports a factory.

    Args:
        name: `module:function`, or `path/of/a/file.py:function`. The module is found as `import` finds it, and in the
            current folder.

    Raises:
        ValueError: the name has another form, or there is no such file, module or function; the message says which.
        TypeError: it is no function.
    """
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise ValueError(f'the factory of mods must be named "module:function", got {name!r}; write {_HOW}')
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    found = module
    for part in function.split("."):
        if not hasattr(found, part):
            public = [known for known, value in vars(module).items() if _is_own(known, value, module)]
            raise ValueError(f"{place} has no {function!r} to make mods with; it has {', '.join(public) or 'nothing'}")
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{name} must be a function from a layer to its mods, got {type(found).__name__}")
    return found


def _is_own(name: str, value: Any, module: Any) -> bool:
    """Whether a module defines a function that others may call."""
    return callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__


def _load_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and needs another one
    path = Path(*name.split(".")).with_suffix(".py")
    if path.is_file():
        return _load_file(path)
    raise ValueError(
        f"there is no module {name!r} to make mods with, neither where Python looks nor in {Path.cwd()}; put its "
        "folder into PYTHONPATH, or name the file: path/of/my_mods.py:mods"
    )


def _load_file(path: Path) -> Any:
    """A file as a module, which is loaded again if it has changed."""
    if not path.is_file():
        raise ValueError(f"there is no file {path} to make mods with (the current folder is {Path.cwd()})")
    path = path.resolve()
    name, changed = f"flexdecode_mods_of_{path.stem}", path.stat().st_mtime_ns
    known = sys.modules.get(name)
    if known is not None and (known.__file__, known.__dict__.get("__changed__")) == (str(path), changed):
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__changed__"] = changed
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def make_mods(name: str | None, layer: Layer) -> LayerMods:
    """Calls the factory for a layer, and checks what it gives.

    Args:
        name: of the factory, or None for none.
        layer: the layer.

    Returns:
        The mods; where the factory gives None, those that change nothing.

    Raises:
        RuntimeError: the factory raised an error; it is the cause.
        TypeError, ValueError: there is no such factory, or what it gives cannot be the mods of the layer.
    """
    if name is None:
        return NO_MODS
    factory = find_factory(name)
    try:
        given = factory(layer)
    except Exception as error:  # any error of the user's code; the message names the factory and the layer
        raise RuntimeError(f"{name} raised {type(error).__name__} for layer {layer.name}: {error}") from error
    of = f"{name}, for layer {layer.name},"
    if given is None:
        return NO_MODS
    _check(given, layer, of)
    return NO_MODS if tuple(given[:3]) == (None, None, None) and given.causal else given


def _check(given: Any, layer: Layer, of: str) -> None:
    """Refuses what cannot be the mods of a layer; `of` names the factory and the layer."""
    if not isinstance(given, LayerMods):
        raise TypeError(
            f"{of} must give a flexdecode.integrations.vllm.LayerMods or None, got {_name_of(given)}"
            + ("; put the function into it: LayerMods(score_mod=...)" if _is_function(given) else "")
        )
    for kind, mod in (("score_mod", given.score_mod), ("mask_mod", given.mask_mod)):
        if mod is not None:
            try:
                check_parameters(mod, kind)
            except TypeError as error:
                raise TypeError(f"{of} gives a wrong {kind}: {error}") from None
    if not isinstance(given.causal, bool):
        raise TypeError(f"{of} must give a bool as `causal`, got {given.causal!r}")
    sinks: Any = given.sinks
    if sinks is not None:
        right = isinstance(sinks, torch.Tensor) and sinks.is_floating_point() and sinks.shape == (layer.num_heads,)
        if not right:
            got = f"{sinks.dtype} {list(sinks.shape)}" if isinstance(sinks, torch.Tensor) else type(sinks).__name__
            raise ValueError(f"{of} must give floating sinks [num_heads] = [{layer.num_heads}], got {got}")
        if sinks.device != layer.device:
            raise ValueError(f"{of} must give sinks on {layer.device}, got {sinks.device}")


def _is_function(given: Any) -> bool:
    return callable(given) and not isinstance(given, type)


def _name_of(given: Any) -> str:
    return f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
