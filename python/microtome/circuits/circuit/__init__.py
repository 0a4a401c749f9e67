"""What a circuit is, and how much two of them share. NumPy alone.

``nodes`` sets of heads and neurons by position · ``scores`` of all nodes, and the circuits selected from them ·
``edges`` graphs of edges · ``positions`` of one prompt form in those of another · ``overlap`` IoU beyond chance.
"""

from microtome.circuits.circuit.nodes import Circuit, CircuitShape, NodeKind

__all__ = ["Circuit", "CircuitShape", "NodeKind"]
