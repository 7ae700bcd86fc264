"""An attention backend for vLLM, with a user's own mods for each layer.

>>> def mods(layer):  # in my_mods.py
...     return LayerMods(score_mod=my_score_mod) if layer.index % 2 == 0 else None

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"flexdecode": {"mods": "my_mods:mods"}}'

vLLM finds the backend by the entry point `flexdecode` of `vllm.general_plugins`, which calls `register`.
"""

from .attend import LayerMods as LayerMods
from .factory import Layer as Layer
from .plugin import register as register

__all__ = ["Layer", "LayerMods", "register"]
