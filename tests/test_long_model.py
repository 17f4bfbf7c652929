"""The shipped 64K model finds what its card says it finds, attending to everything and to a sixteenth."""

from __future__ import annotations

from typing import Any

import pytest

from ds_offload import OffloadConfig
from ds_offload.aliases import LONG_MODEL
from ds_offload.evaluation.retrieval import eval_retrieval
from ds_offload.evaluation.subject import EvalSubject, prepare


@pytest.mark.slow
def test_a_fact_of_each_kind_is_found(smollm2: Any) -> None:
    model = {"name": LONG_MODEL, "load_format": "auto", "device": "cpu", "dtype": "auto", "rope_scaling": None}
    with EvalSubject(prepare(model, OffloadConfig(max_context="2k"))) as subject:
        # Seeds that no figure in the documents comes from.
        result = eval_retrieval(subject, ("passkey", "needles", "key-value"), limit=1, seed=1000)
    assert result.density is not None and result.density < 0.1
    for figures in (result.dense, result.sparse):
        assert figures["cases"] == 3 and figures["score"] == 1, figures["answers"]
