"""Modules whose constants survive `torch.device("meta")`, to("meta") and to_empty."""

import math

from torch import nn


class KeepsBuffers(nn.Module):
    """Buffers are constants of the model, not weights that are loaded.

    to_empty, which leaves memory as it finds it, keeps their values.

    They are made with values also under `with torch.device("meta")`, and remembered where the
    module moves to the meta device. A buffer whose values nobody knows (it was put there by other
    means) is NaN after to_empty, which every use refuses, until it is loaded.
    """

    def _apply(self, fn, recurse=True):
        before = {name: t for name, t in self._buffers.items() if t is not None}
        super()._apply(fn, recurse)
        remembered = vars(self).setdefault("_remembered", {})
        for name, old in before.items():
            new = self._buffers[name]
            if new.is_meta and not old.is_meta:
                remembered[name] = old.detach().cpu()
            elif _empties(fn) and not new.is_meta:
                known = remembered.get(name) if old.is_meta else old
                new.copy_(known) if known is not None else new.fill_(math.nan)

        return self


def _empties(fn):
    """Whether fn is that of Module.to_empty, whose result has no values."""
    return getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
