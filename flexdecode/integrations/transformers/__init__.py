"""`attn_implementation="flexdecode"` for the models of transformers 5.

>>> from flexdecode.integrations.transformers import register, set_mods
>>> register()
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="flexdecode")
>>> set_mods(model, score_mod=alibi)
>>> model.generate(**inputs)
"""

try:
    from transformers.masking_utils import AttentionMaskInterface as _needed  # noqa: F401
except ImportError as error:
    raise ImportError(
        "flexdecode.integrations.transformers needs transformers 5.0 or later: pip install 'flexdecode[transformers]'"
    ) from error

from .interface import register as register
from .user_mods import set_mods as set_mods

__all__ = ["register", "set_mods"]
