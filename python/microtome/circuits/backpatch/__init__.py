"""Late representations put into early layers, and what that repairs.

``alignment`` of pictures with words, layer by layer · ``patching`` the runs under every setting · ``choice`` of a
setting on some prompts, judged on others. NumPy alone is enough for ``choice``.
"""

from importlib.util import find_spec

if find_spec("torch") is not None:
    from microtome.circuits.backpatch.patching import back_patch, back_patch_iterated

__all__ = ["back_patch", "back_patch_iterated"]
