"""What the autograd Functions share."""

import inspect


def quick(cls):
    """Keep the signature of `forward` that torch binds at every call: making it anew costs more than most kernels on small tensors."""
    cls.forward.__signature__ = inspect.signature(cls.forward)
    return cls


def save(ctx, *tensors):
    """Save tensors, some of them None, for both modes."""
    ctx.present = [t is not None for t in tensors]
    kept = [t for t in tensors if t is not None]
    ctx.save_for_backward(*kept)
    ctx.save_for_forward(*kept)


def saved(ctx):
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if present else None for present in ctx.present]
