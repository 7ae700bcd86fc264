"""How this tier runs a call: through the generated kernel, in KV blocks of 16, on CPU tensors."""

from support import assert_close_to_reference

from flexdecode import DecodeOptions, flex_decode


def decode(query, key, value, score_mod=None, mask_mod=None, *, num_splits=None, block_n=16, **arguments):
    """Gives the output and the lse of the generated kernel."""
    options = DecodeOptions(backend="triton", num_splits=num_splits, block_n=block_n)
    return flex_decode(query, key, value, score_mod, mask_mod, return_lse=True, options=options, **arguments)


def check_decode(query, key, value, score_mod=None, mask_mod=None, *, num_splits=None, block_n=16, **arguments):
    """Compares the output and the lse of the generated kernel with the reference, and gives both."""
    out, lse = decode(query, key, value, score_mod, mask_mod, num_splits=num_splits, block_n=block_n, **arguments)
    arguments.pop("out", None)
    assert_close_to_reference(out, lse, query, key, value, score_mod, mask_mod, **arguments)
    return out, lse
