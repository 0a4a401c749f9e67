"""What a feature means: its top samples, a label from words or from a language model, a sheet to judge it on."""

from microtome.interpret.cues import SPATIAL_CUES, cue_counts, cues_in, function_words, ngram_lift
from microtome.interpret.evidence import Evidence, collect, windows
from microtome.interpret.labels import Label, label_features, label_offline
from microtome.interpret.maps import evidence_from, patch_grid
from microtome.interpret.provider import ChatProvider, estimate
from microtome.interpret.review import agreement, read_verdicts, write_review_sheet

__all__ = [
    "SPATIAL_CUES",
    "ChatProvider",
    "Evidence",
    "Label",
    "agreement",
    "collect",
    "cue_counts",
    "cues_in",
    "estimate",
    "evidence_from",
    "function_words",
    "label_features",
    "label_offline",
    "ngram_lift",
    "patch_grid",
    "read_verdicts",
    "windows",
    "write_review_sheet",
]
