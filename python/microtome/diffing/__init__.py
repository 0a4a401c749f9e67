"""Stage-wise model diffing: which features of a language model's dictionary did multimodal fine-tuning change, and into what.

The order of the paper (Towards Understanding Multimodal Fine-Tuning, 2602.08713, sections 4 to 7):

1. :func:`signals`: per feature, the variance gap, the decoder cosine and the firing frequencies.
2. :func:`select_adapted`: the global two-stage filter, large gap first, low cosine second.
3. :func:`select_spatial`: of those, the features that a shift to spatial questions recruits.
4. :func:`neutral_survivors`: of those, the ones that also fire, on image tokens, under a neutral prompt.
5. :func:`against_controls`: those found against matched random features, on images that they were not chosen by.
6. :func:`microtome.diffing.study.run`: all of it, from two stores to one table.
"""

from microtome.diffing.controls import against_controls, draw_controls
from microtome.diffing.selection import (
    neutral_survivors,
    select_adapted,
    select_spatial,
    sensitivity,
    summary,
)
from microtome.diffing.signals import cosine_table, firing_shift, signals

__all__ = [
    "against_controls",
    "cosine_table",
    "draw_controls",
    "firing_shift",
    "neutral_survivors",
    "select_adapted",
    "select_spatial",
    "sensitivity",
    "signals",
    "summary",
]
