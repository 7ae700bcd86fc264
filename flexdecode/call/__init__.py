"""From the arguments of a call to plain numbers.

In: tensors, options and the facts of a device.
Out: checked `Inputs`, their `Signature`, sizes and `Schedule`.
"""
