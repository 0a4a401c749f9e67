"""The whole study of one model, as ``microtome circuit`` runs it.

``options`` · ``sides`` the forms of a task · ``steps`` each from what was found to tables · ``runner`` all of them in
order · ``costs`` foreseen and the ``clock`` that tells what is left · ``ledger`` of finished steps · ``verdict`` on what forms
share · ``command`` models and pairs by name.
"""

from microtome.circuits.study.options import FORMS, Options
from microtome.circuits.study.runner import Study, run
from microtome.circuits.study.sides import Side
from microtome.circuits.study.verdict import shared_more_in_generation

__all__ = ["FORMS", "Options", "Side", "Study", "run", "shared_more_in_generation"]
