"""Room."""
from microtome.circuits.faithfulness.nodes import faithfulness

__all__ = ["faithfulness"]
