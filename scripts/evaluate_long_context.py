#!/usr/bin/env python3
"""Evaluates a model at one context length under several budgets, each prompt read once: the rows of docs/fidelity.md.

Hidden facts are asked for as `ds-offload eval retrieval` does, with the same cases, and a text's last tokens are
predicted one by one, densely and under every budget. Every text and every answer is a line of JSON on stdout as it
comes, an answer's with the shares of facts found so far; progress is on stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

# The project's packages, where it is not installed.
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from ds_offload.attention_fidelity import FidelitySums, compare_step
from ds_offload.config import OffloadConfig
from ds_offload.errors import InputError
from ds_offload.evaluation.haystack import Haystack, shipped_filler
from ds_offload.evaluation.metrics import found_share
from ds_offload.evaluation.read_once import Answerer
from ds_offload.evaluation.result import counted, mean
from ds_offload.evaluation.retrieval import ANSWER_TOKENS, FOREIGN, make_case, parse_kinds, token_counter
from ds_offload.evaluation.subject import EvalSubject, dense_twin, prepare
from ds_offload.evaluation.teacher_forcing import teacher_force
from ds_offload.evaluation.windows import cut_windows
from ds_offload.kv_context import KVContext
from ds_offload.prefetch.selection import Step


@torch.no_grad()
def retrieval(
    subject: EvalSubject, configs: dict[str, OffloadConfig], kinds: tuple[str, ...], limit: int, seconds: float
) -> None:
    """Ask for facts densely ("dense") and under each of `configs`; no question is begun after so many seconds."""
    deadline = time.monotonic() + seconds
    count = token_counter(subject)
    hay = Haystack(shipped_filler(), count, FOREIGN)
    shares: dict[str, dict[str, list[float]]] = {kind: {} for kind in kinds}
    sizes = subject.context - 1, subject.context
    with ExitStack() as stack:
        dense = stack.enter_context(Answerer(subject, dense_twin(subject.config), *sizes))
        sparse = {name: stack.enter_context(Answerer(subject, config, *sizes)) for name, config in configs.items()}
        for number in counted(range(limit * len(kinds)), limit * len(kinds), "questions"):
            if time.monotonic() > deadline:
                break
            kind, seed = kinds[number % len(kinds)], number // len(kinds)
            case, ids = make_case(subject, kind, hay, count, seed)
            room = min(ANSWER_TOKENS[kind], subject.context - len(ids))
            logits = dense.read(ids)
            for answerer in sparse.values():
                answerer.copy(dense, len(ids))
            texts = {name: one.answer(ids, room, logits).text for name, one in {"dense": dense, **sparse}.items()}
            for name, text in texts.items():
                shares[kind].setdefault(name, []).append(found_share(text, case.answers))
            found = {name: mean(values) for name, values in shares[kind].items()}
            line = {"kind": kind, "case": seed + 1, "tokens": len(ids), "expected": case.answers, "answers": texts}
            write_line({**line, "found": found})


def text_figures(
    subject: EvalSubject, configs: dict[str, OffloadConfig], texts: dict[str, str], positions: int, compared: int
) -> None:
    """Loss of each text's last `positions` tokens, and what attention and hot set did there."""
    for window in cut_windows(subject, texts, positions, 1):
        ids, targets = window.ids[:-1], window.ids[-positions:]
        for name, config in {"dense": dense_twin(subject.config), **configs}.items():
            losses: list[float] = []
            sums = FidelitySums(subject.sparse.decoder.layers)

            def visit(number: int, logits: torch.Tensor, losses: list[float] = losses) -> None:
                target = torch.tensor(targets[number], device=logits.device)  # noqa: B023
                losses.append(F.cross_entropy(logits, target).item())

            def watch(context: KVContext, step: Step, lengths: list[int], sums: FidelitySums = sums) -> None:
                if lengths[0] % compared == 0:
                    compare_step(subject.sparse.decoder, context, step, lengths, sums)

            forced = teacher_force(subject, config, ids, positions, visit, watch=watch if name != "dense" else None)
            attention = sums.figures()
            del attention["layers"]
            kept = ("decode_ms_per_token", "hot_set_hit_rate", "prefetch_recall", "mean_density", "h2d_bytes_per_token")
            figures = {"nll": mean(losses), **{key: forced.stats[key] for key in kept}, **attention}
            write_line({"text": window.text, "budget": name, **figures})


def write_line(line: dict[str, Any]) -> None:
    """Print a line of JSON at once: a run that is stopped keeps what it found."""
    print(json.dumps(line), flush=True)


def main() -> None:
    """Read the arguments, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-64k", help="alias, folder or .gguf file")
    parser.add_argument("--dtype", default="auto", help="of the weights")
    parser.add_argument("--ctx", required=True, help="tokens of a context, such as 32k")
    parser.add_argument("--budgets", default="1/16,1/32,1024", help="token budgets, with commas between them")
    parser.add_argument("--kinds", default="passkey,needles,key-value,tracing", help="of questions, or nothing")
    parser.add_argument("--limit", type=int, default=50, help="questions of each kind")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no question is begun after so many of them")
    parser.add_argument("--text", nargs="*", default=[], help="files whose last tokens are predicted")
    parser.add_argument("--positions", type=int, default=256, help="tokens predicted of each text")
    parser.add_argument("--compare-every", type=int, default=32, help="steps between comparisons of attention")
    parser.add_argument("--hot-set", type=float, default=2, help="rows of the hot set over those of the budget")
    options = parser.parse_args()
    kinds = parse_kinds(options.kinds) if options.kinds else ()
    budgets = options.budgets.split(",")
    config = OffloadConfig(max_context=options.ctx, token_budget=budgets[0], prefetch="off", hot_set=options.hot_set)
    model = {"name": options.model, "load_format": "auto", "device": "auto", "dtype": options.dtype}
    texts = {Path(path).stem: Path(path).read_text(encoding="utf-8") for path in options.text}
    with EvalSubject(prepare({**model, "rope_scaling": None}, config)) as subject:
        configs = {budget: dataclasses.replace(subject.config, token_budget=budget) for budget in budgets}
        write_line({"model": options.model, "ctx": subject.context, "config": subject.config.to_dict()})
        if texts:
            text_figures(subject, configs, texts, options.positions, options.compare_every)
        if kinds:
            retrieval(subject, configs, kinds, options.limit, options.seconds)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
