"""Documents that stay read: forks, streams, what is refused, and memory that goes back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from session_case import DOCUMENT, NEW, QUESTIONS, ask, make
from tiny_models import random_prompts

from ds_offload import InputError, OffloadedGenerator
from ds_offload.errors import MemoryPlanError


@pytest.fixture
def gen(tiny_llama: Path) -> Iterator[OffloadedGenerator]:
    with make(tiny_llama) as generator:
        yield generator


def test_forks_go_their_own_ways(gen: OffloadedGenerator) -> None:
    with gen.prefill(DOCUMENT) as fresh:
        expected = [ask(fresh, question, keep=False) for question in QUESTIONS]
        first = ask(fresh, QUESTIONS[0])
        then = ask(fresh, QUESTIONS[2])
    session = gen.prefill(DOCUMENT)
    forks = [session.fork() for _ in range(2)]
    # 150 tokens are 9 whole segments of 16, and a tenth that each has for itself.
    shared = [fork._conversation.context.store.table.tensors[0][8].data_ptr() for fork in [session, *forks]]
    tails = [fork._conversation.context.store.table.tensors[0][9].data_ptr() for fork in [session, *forks]]
    assert len(set(shared)) == 1 and len(set(tails)) == 3
    assert torch.equal(ask(forks[0], QUESTIONS[0]).logits, first.logits)
    assert torch.equal(ask(session, QUESTIONS[2], keep=False).logits, expected[2].logits)
    again = forks[0].fork()
    forks[0].close()
    session.close()
    gc.collect()
    assert torch.equal(ask(forks[1], QUESTIONS[1]).logits, expected[1].logits)
    assert torch.equal(ask(again, QUESTIONS[2]).logits, then.logits)
    for fork in (forks[1], again):
        fork.close()


def test_nothing_is_asked_of_a_closed_generator(tiny_llama: Path, tmp_path: Path) -> None:
    gen = make(tiny_llama)
    session = gen.prefill(DOCUMENT)
    gen.close()
    for call in (
        lambda: gen.generate(DOCUMENT),
        lambda: gen.stream(DOCUMENT),
        lambda: gen.tokenizer,
        lambda: gen.prefill(DOCUMENT),
        lambda: gen.load_session(tmp_path),
        lambda: session.ask(QUESTIONS[0]),
        lambda: session.fork(),
        lambda: session.save(tmp_path / "saved"),
    ):
        with pytest.raises(InputError, match="the generator is closed; make another"):
            call()
    session.close()


def test_a_fork_of_the_whole_keeps_dense_layers_and_device_stores(tiny_llama: Path) -> None:
    for changes in ({"dense_layers": (0,)}, {"kv_location": "gpu"}, {"prefetch": "exact", "hot_set": 1}):
        with make(tiny_llama, **changes) as gen, gen.prefill(DOCUMENT) as session, session.fork() as fork:
            mine = ask(session, QUESTIONS[0])
            assert torch.equal(ask(fork, QUESTIONS[0]).logits, mine.logits)


def test_shared_segments_are_copied_before_they_are_written(
    gen: OffloadedGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question that changes the document's last tokens writes into segments that a fork shares."""
    with gen.prefill(DOCUMENT) as session, session.fork() as fork:
        expected = ask(session, QUESTIONS[0], keep=False)
        changed = [*DOCUMENT[:100], *QUESTIONS[2]]
        with monkeypatch.context() as patch:
            patch.setattr("ds_offload.session.conversation_ids", lambda *_: changed)
            answer = ask(fork, [])
        assert answer.token_ids == gen.generate(changed, max_new_tokens=NEW).token_ids
        assert torch.equal(ask(session, QUESTIONS[0], keep=False).logits, expected.logits)


def test_a_stream_gives_the_answer_in_pieces(gen: OffloadedGenerator) -> None:
    with gen.prefill(DOCUMENT) as session:
        expected = session.ask(QUESTIONS[0], keep=False, max_new_tokens=NEW)
        pieces = list(session.stream(QUESTIONS[0], max_new_tokens=NEW))
        assert "".join(pieces) == expected.text and len(pieces) > 1
        assert session.last_output is not None and session.last_output.token_ids == expected.token_ids
        assert session.token_ids == DOCUMENT + QUESTIONS[0] + expected.token_ids


@pytest.mark.parametrize("keep", [True, False])
def test_a_stream_closed_early(gen: OffloadedGenerator, keep: bool) -> None:
    with gen.prefill(DOCUMENT) as session, gen.prefill(DOCUMENT) as other:
        whole = ask(other, QUESTIONS[0], keep=False)
        stream = session.stream(QUESTIONS[0], keep=keep, max_new_tokens=NEW)
        for _ in range(3):
            next(stream)
        with pytest.raises(InputError, match="still answering"):
            session.ask(QUESTIONS[1])
        with pytest.raises(InputError, match="still answering"):
            session.fork()
        stream.close()
        said = DOCUMENT + QUESTIONS[0] + whole.token_ids[:3] if keep else DOCUMENT
        assert session.token_ids == said
        if not keep:
            assert torch.equal(ask(session, QUESTIONS[1]).logits, ask(other, QUESTIONS[1]).logits)


def test_a_stream_that_the_session_has_left_behind(gen: OffloadedGenerator) -> None:
    with gen.prefill(DOCUMENT) as session:
        stream = session.stream(QUESTIONS[0], max_new_tokens=2)
        session.ask(QUESTIONS[1], max_new_tokens=2)
        with pytest.raises(InputError, match="went on"):
            next(stream)


def test_what_cannot_be_asked(gen: OffloadedGenerator) -> None:
    session = gen.prefill(DOCUMENT)
    refusals: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "empty list"),
        (5, {}, "the question is of type int; it must be one text, or one list of token ids"),
        (None, {}, "the question is of type NoneType"),
        (b"Why?", {}, "the question is of type bytes"),
        ({"role": "user"}, {}, "the question is of type dict"),
        ([{"role": "user", "content": "Why?"}], {}, "the question is a list that begins with {'role'"),
        (["Why?", "Who?"], {}, "the question is a list that begins with 'Why.'; it must be one text"),
        ([301], {}, "token id 301"),
        ("text", {}, "no tokenizer"),
        (random_prompts(250)[0], {}, "400 tokens and max_context=400"),
        (QUESTIONS[0], {"temperature": -1}, "temperature"),
    ]
    for question, options, message in refusals:
        with pytest.raises(InputError, match=message) as error:
            session.ask(question, **options)
        assert "\n" not in str(error.value)
    assert len(session.ask(random_prompts(245)[0], max_new_tokens=64).token_ids) == 5
    session.close()
    session.close()
    for call in (lambda: session.ask(QUESTIONS[0]), session.fork, lambda: session.save("x")):
        with pytest.raises(InputError, match="closed"):
            call()


@pytest.mark.parametrize(
    "document", ["", "text without tokenizer", [], [301], ["a", "b"], [[1]], [{"role": "user"}], 5]
)
def test_what_is_no_document(gen: OffloadedGenerator, document: Any) -> None:
    with pytest.raises(InputError) as error:
        gen.prefill(document)
    assert "\n" not in str(error.value)


def test_a_document_that_fills_the_context(gen: OffloadedGenerator) -> None:
    with pytest.raises(InputError, match="the document has 400 tokens and max_context=400"):
        gen.prefill(random_prompts(400)[0])


def test_room_for_all_of_max_context_is_planned(tiny_llama: Path) -> None:
    with make(tiny_llama, max_context=100_000, host_memory="40MiB") as gen:
        assert len(gen.generate(DOCUMENT, max_new_tokens=2).token_ids) == 2
        with pytest.raises(MemoryPlanError, match="100,000 tokens need"):
            gen.prefill(DOCUMENT)


def test_nothing_is_held_behind_the_last_session(gen: OffloadedGenerator) -> None:
    session = gen.prefill(DOCUMENT)
    pool = session._conversation.context._pool
    fork = session.fork()
    blocks = list(fork._conversation.context._pool._blocks.values())
    assert pool.nbytes > 0
    session.close()
    assert pool.nbytes == 0 and all(block.holders == 1 for block in blocks)
    del fork
    gc.collect()
    assert all(block.holders == 0 for block in blocks)


@pytest.mark.gpu
def test_pinned_memory_goes_back(tiny_llama: Path) -> None:
    with make(tiny_llama, "cuda") as gen:
        gen.generate(DOCUMENT, max_new_tokens=4)
        before = torch.cuda.memory_allocated()
        session = gen.prefill(DOCUMENT)
        ask(session, QUESTIONS[0])
        fork = session.fork()
        session.close()
        assert fork._conversation.context.pinned_bytes > 0
        ask(fork, QUESTIONS[1])
        fork.close()
        assert fork._conversation.context.pinned_bytes == 0
        del session, fork
        gc.collect()
        assert torch.cuda.memory_allocated() == before
