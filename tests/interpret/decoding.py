"""How this tier runs a call: through the generated kernel, in KV blocks of 16, on CPU tensors."""

from support import assert_close_to_reference

from flexdecode import DecodeOptions, flex_decode

OPTIONS = ("num_splits", "schedule", "batch_invariant")


def decode(query, key, value, score_mod=None, mask_mod=None, *, block_n=16, **arguments):
    """Gives the output and the lse of the generated kernel."""
    chosen = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
    options = DecodeOptions(backend="triton", block_n=block_n, **chosen)
    return flex_decode(query, key, value, score_mod, mask_mod, return_lse=True, options=options, **arguments)


def check_decode(query, key, value, score_mod=None, mask_mod=None, **arguments):
    """Compares the output and the lse of the generated kernel with the reference, and gives both."""
    out, lse = decode(query, key, value, score_mod, mask_mod, **arguments)
    for name in (*OPTIONS, "block_n", "out"):
        arguments.pop(name, None)
    assert_close_to_reference(out, lse, query, key, value, score_mod, mask_mod, **arguments)
    return out, lse
