"""The next layer's query, one layer ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class QueryPredictor:
    """Predicts layer l+1's query from layer l's input.

    The residual stream changes little within a layer, so the next layer's own norm,
    Wq and RoPE applied to it give nearly the query it will have (Double Sparsity,
    arXiv 2408.07092, section 3.3, with the next layer's norm in place of this one's).

    Args:
        project_query: `(layer, hidden [N, hidden], rope) -> [N, H, D]`.
    """

    def __init__(self, project_query: Callable[[int, Tensor, Any], Tensor]) -> None:
        self._project_query = project_query

    def predict(self, layer: int, hidden: Tensor, rope: Any) -> Tensor:
        """Query `[B, H, D]` of layer `layer + 1` from layer `layer`'s input `hidden` `[B, hidden]`."""
        return self._project_query(layer + 1, hidden, rope)
