"""Everything that B sequences keep while they are prefilled and decoded, made and freed together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_offload.calibration import Calibration
from ds_offload.config import OffloadConfig, TokenBudget
from ds_offload.context_stores import ContextStores
from ds_offload.decoder import DecoderStack, Rope
from ds_offload.kernels.coded_attention import coded_attention
from ds_offload.kernels.new_token import HeadNorms, LabelRows, new_token
from ds_offload.kernels.product_code import encode_new
from ds_offload.kernels.slot_attention import slot_attention
from ds_offload.kernels.sparse_attention import sparse_attention
from ds_offload.label_mass import shares_for
from ds_offload.label_setting import make_label_code
from ds_offload.memory.hot_set import HotSet
from ds_offload.memory.kept_blocks import KeptBlocks
from ds_offload.memory.label_cache import LabelCache
from ds_offload.memory.plan import hot_set_capacity
from ds_offload.memory.row_codec import RowCodec
from ds_offload.memory.window import AttentionWindow
from ds_offload.memory.window_buffer import WindowBuffer
from ds_offload.prefetch.scheduler import PrefetchScheduler
from ds_offload.prefetch.selection import Selector, Step
from ds_offload.prefetch.streams import Faults, Streams


@dataclass(frozen=True)
class Attended:
    """A layer's attention in the last step, `[B, H, D]` each: valid until the next step begins.

    Attributes:
        query: The layer's query.
        selected_by: The query whose label scores selected: the same, or a predicted one.
        output: What attention gave.
    """

    query: Tensor
    selected_by: Tensor
    output: Tensor


class KVContext(ContextStores):
    """K/V store, labels, hot set, streams and scheduler of B sequences; use as a context manager.

    Args:
        config: Resolved for the model.
        capacities: Most tokens (prompt and answer) of each sequence.
        faults: For the tests of the hand-overs.
        kept: Where the store's page-locked blocks come from and go to; None: the system.

    Attributes:
        attended: Of every layer in the store, its attention in the last step. The step's own tensors
            are kept, which costs no time: those of a captured step hold each replay's values.
    """

    def __init__(
        self,
        decoder: DecoderStack,
        config: OffloadConfig,
        calibration: Calibration,
        capacities: list[int],
        faults: Faults | None = None,
        kept: KeptBlocks | None = None,
    ) -> None:
        super().__init__(decoder, config, capacities, kept)
        self.window = AttentionWindow(config.sink_tokens, config.recent_tokens)
        self.streams = Streams(decoder.device, faults)
        self.attended: dict[int, Attended] = {}
        self._budget = config.budget
        self._widenings = list(config.widenings)
        self._widest = config.widest_budget
        self._capacities = capacities
        self._scaling = decoder.scaling
        sequences, longest = len(capacities), max(capacities)
        offloaded, rows = self._offloaded, self._format
        heads: dict[str, Any] = {"kv_heads": decoder.kv_heads, "device": decoder.device}
        self.labels = LabelCache(make_label_code(config, calibration, decoder.device), capacities, decoder.device)
        self.codec: RowCodec | None = None
        self.window_buffer: WindowBuffer | None = None
        if rows.layout is not None:
            self.codec = RowCodec(rows.layout, offloaded, calibration.key_factor, decoder.device)
            shape = (sequences, decoder.kv_heads, self.window.forced_slots, 2, decoder.head_dim)
            apart = {n: torch.zeros(shape, dtype=rows.dtype, device=decoder.device) for n in offloaded}
            self.window_buffer = WindowBuffer(self.window, apart)
        self.hot_set: HotSet | None = None
        if config.kv_location == "host":
            self.hot_set = HotSet(
                self.store,
                layers=offloaded,
                sequences=sequences,
                window=self.window,
                capacity=hot_set_capacity(config.hot_set_multiple, self.most_kept, longest, self.window),
                least=self.most_kept,
                context=longest,
                reuse=config.hot_set_multiple > 0,
                apart=self.window_buffer,
                admissions=2 if config.prefetch == "exact" else 1,
                head_dim=rows.store_dim,
                **heads,
            )
            self.window_buffer = self.hot_set.window
        mass = calibration.label_mass if config.label_code == "product" else None
        top_p = config.budget.top_p
        shares = None if top_p is None else shares_for(mass, top_p, decoder.layers)
        everything = config.budget.fraction == 1
        selector = Selector(self.labels, self.window, decoder.scaling, shares, everything)
        self.scheduler = PrefetchScheduler(
            config.prefetch,
            selector=selector,
            store=self.store,
            hot_set=self.hot_set,
            window=self.window,
            window_buffer=self.window_buffer,
            streams=self.streams,
            layers=decoder.layers,
            sequences=sequences,
            kv_heads=decoder.kv_heads,
            device=decoder.device,
        )
        # The new token's K/V of every layer: the writer may still read one layer's while the next one's are made.
        new = (decoder.layers, sequences, decoder.kv_heads, 2, decoder.head_dim)
        self._new_rows = torch.zeros(new, dtype=rows.dtype, device=decoder.device)

    def __enter__(self) -> KVContext:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # A stream that is closed early is no error.
        self.close(keep=error is None or issubclass(error, GeneratorExit))

    def close(self, keep: bool = True) -> None:
        """Wait for the device, then free everything; see `ContextStores.close`."""
        try:
            super().close(keep)
        finally:
            self.attended.clear()
            self.streams.join()

    def write_prompt(self, layer: int, sequence: int, rows: Tensor, *, start: int, staging: int) -> None:
        """Take rows `[Hkv, n, 2, D]` of tokens `start` to `start + n`, made as the hand-over `leaving` of that layer.

        `rows` may be overwritten behind the hand-over `prompt_rows` of index `staging`.
        """
        if layer in self._dense_layers:
            self._dense[sequence].write_prompt(layer, 0, start, rows)
            return
        if self.window_buffer is not None:
            self.window_buffer.fill(layer, sequence, rows, start)
        streams = self.streams
        with streams.on("writer"):
            streams.wait("leaving", layer)
            with streams.producing("prompt_rows", staging):
                stored = rows if self.codec is None else self.codec.encode_prompt(layer, rows)
                self.store.write_prompt(layer, sequence, start, stored)
                self._write_labels(layer, sequence, start, rows)

    def restore_prompt(self, layer: int, sequence: int, rows: Tensor, start: int) -> None:
        """Make labels and window of tokens whose rows `[Hkv, n, 2, D]`, not quantised, are in the store already."""
        if layer in self._dense_layers:
            return
        if self.window_buffer is not None:
            self.window_buffer.fill(layer, sequence, rows, start)
        self._write_labels(layer, sequence, start, rows)

    def keep(self, lengths: list[int]) -> list[int]:
        """Candidates that contexts of `lengths` tokens keep at most."""
        return [self._keep(length) for length in lengths]

    @property
    def longest(self) -> int:
        """Most tokens of any sequence."""
        return max(self._capacities)

    @property
    def most_kept(self) -> int:
        """Most candidates any sequence ever keeps."""
        return max(self.window.selected(self._widest.tokens(capacity), capacity) for capacity in self._capacities)

    @property
    def token_budget(self) -> str:
        """The budget of the next step, as `OffloadConfig.token_budget` writes it."""
        return str(self._budget)

    @property
    def budget_state(self) -> tuple[TokenBudget, tuple[TokenBudget, ...]]:
        """The budget of the next step, and those that it may still be raised to."""
        return self._budget, tuple(self._widenings)

    @budget_state.setter
    def budget_state(self, state: tuple[TokenBudget, tuple[TokenBudget, ...]]) -> None:
        self._budget, self._widenings = state[0], list(state[1])

    def widen(self) -> bool:
        """Raise the budget of all layers by a step, if the plan has room for it, from the next step on."""
        if not self._widenings:
            return False
        self._budget = self._widenings.pop(0)
        return True

    def take(self, layer: int, projected: Tensor, rope: Rope, norms: HeadNorms | None, step: Step) -> Tensor:
        """Take in the current token of each sequence: its K/V, window slot and label.

        Args:
            projected: Queries, keys and values as the linear layers give them, `[B, (H + 2 * Hkv) * D]`.
            rope: cos and sin `[B, D]` at the token's position.

        Returns:
            The rotated queries `[B, H, D]`.
        """
        dense = layer in self._dense_layers
        rows = self._new_rows[layer]
        labels = None if dense else self.labels.layer(layer)
        with self.streams.producing("rows", layer):
            query = new_token(
                projected,
                rope,
                step.positions,
                rows,
                norms=norms,
                window=self.window_buffer.rows(layer) if self.window_buffer is not None and not dense else None,
                labels=labels if isinstance(labels, LabelRows) else None,
            )
        if dense:
            for sequence, store in enumerate(self._dense):
                one = slice(sequence, sequence + 1)
                store.append(layer, step.positions[one], rows[one])
            return query
        if self.window_buffer is None:
            # Attention reads the store in this step.
            self.store.append(layer, step.positions, rows)
        self._give_to_writer(layer, rows, step.positions)
        return query

    def _give_to_writer(self, layer: int, rows: Tensor, positions: Tensor) -> None:
        """Write what nothing reads in this step beside the compute stream: product codes and rows of the store.

        Each layer's rows leave alone. Writes to far-apart pages of the host may drain at 2.5 us each, and no read
        overtakes them: those of half of the layers, in one launch, held up the rows of layers to come.
        """
        streams, labels = self.streams, self.labels.layer(layer)
        coded, stored = not isinstance(labels, LabelRows), self.window_buffer is not None
        if not coded and not stored:
            return
        positions = streams.lend(positions, "writer")
        with streams.on("writer"):
            streams.wait("rows", layer)
            if not isinstance(labels, LabelRows):
                with streams.producing("label", layer):
                    encode_new(rows[:, :, 0], labels, positions)
            if stored:
                with streams.producing("host_write", layer):
                    written = rows if self.codec is None else self.codec.encode_new(layer, rows)
                    self.store.append(layer, positions, written)

    def attend(self, layer: int, query: Tensor, step: Step) -> Tensor:
        """Attention `[B, H, D]` of the current token's query `[B, H, D]` over what its layer keeps."""
        if layer in self._dense_layers:
            each = [self._attend_dense(layer, n, query[n : n + 1], step) for n in range(len(query))]
            return torch.cat(each)
        kept = self.scheduler.keep(layer, query)
        if self.codec is None:
            output = slot_attention(query, kept.rows, kept.places, self._scaling, arriving=kept.arriving)
        else:
            assert self.window_buffer is not None, "quantised rows have their window apart"
            rows = self.window_buffer.tensor(layer), kept.rows, self.codec.layer(layer), kept.places
            output = coded_attention(query, *rows, self._scaling, arriving=kept.arriving)
        self.attended[layer] = Attended(query, kept.selected_by, output)
        return output

    def kept_tokens(self, length: int) -> int:
        """Tokens a KV head attends to at most in a context of `length` tokens."""
        return self.window.forced(length) + self._keep(length)

    def _write_labels(self, layer: int, sequence: int, start: int, rows: Tensor) -> None:
        self.labels.write_prompt(layer, sequence, start, rows[:, :, 0], self._new_rows.dtype)

    def _keep(self, length: int) -> int:
        return self.window.selected(self._budget.tokens(length), length)

    def _attend_dense(self, layer: int, sequence: int, query: Tensor, step: Step) -> Tensor:
        longest = min(step.max_length, self._capacities[sequence])
        rows = self._dense[sequence].rows(layer, 0, longest)[None]
        valid = torch.arange(longest, device=rows.device) < step.lengths[sequence]
        return sparse_attention(query, rows, valid.expand(rows.shape[:3]), self._scaling)
