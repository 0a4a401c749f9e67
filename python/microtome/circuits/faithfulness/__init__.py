"""How much of a model's behaviour a circuit alone keeps.

``nodes`` every node outside is overwritten · ``edges`` every edge outside is cut, in the runs of ``cut`` · ``results``
one circuit's faithfulness, and the curve over sizes with its integrals.
"""

from microtome.circuits.faithfulness.nodes import faithfulness, faithfulness_curve, faithfulness_of
from microtome.circuits.faithfulness.results import EPSILON, Curve, Faithfulness

__all__ = ["EPSILON", "Curve", "Faithfulness", "faithfulness", "faithfulness_curve", "faithfulness_of"]
