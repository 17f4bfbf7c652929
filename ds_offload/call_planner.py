"""What a generator decides in front of each call: its calibration, what the config leaves open, and whether it fits."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

from ds_offload.calibration import Calibration, find_or_make_calibration
from ds_offload.config import HOT_SETS, OffloadConfig
from ds_offload.decoder import DecoderStack
from ds_offload.dtypes import dtype_name
from ds_offload.errors import InputError
from ds_offload.loading import LoadedModel
from ds_offload.memory.kept_blocks import KeptBlocks
from ds_offload.memory.plan import MemoryPlan
from ds_offload.memory_check import check_request, memory_limits, settle_config
from ds_offload.notices import notice
from ds_offload.planning.request import memory_text, weight_bytes


class CallPlanner:
    """A loaded model and its config, settled anew for each call.

    Attributes:
        loaded: Model, tokenizer and where they came from.
        config: Resolved; what was left open is as the last call had it.
        decoder: The model's layers.
        kept: Page-locked memory that one call leaves for the next; its `release` gives it back.
    """

    def __init__(self, loaded: LoadedModel, config: OffloadConfig) -> None:
        self.loaded = loaded
        self.config = config
        self.decoder = DecoderStack(loaded.model)
        self.kept = KeptBlocks()
        # Where nobody calls `close`.
        weakref.finalize(self, self.kept.close)
        self._calibration: Calibration | None = None
        # Said once the first prompt has passed its checks: a refused one ends in one line.
        self._announcements: list[str] = []
        # Said once, when it is known what the labels are.
        self._promised = config.budget.top_p is not None
        # Chosen anew for each call.
        self._open: dict[str, Any] = {"hot_set": None} if config.hot_set is None else {}
        if config.kv_dtype == "auto":
            self._open["kv_dtype"] = "auto"
        if config.calibration is not None:
            self._calibration = find_or_make_calibration(loaded, self.decoder, config.calibration)

    def check_open(self) -> None:
        """Refuse what needs the weights when they are gone.

        Raises:
            InputError: The generator is closed.
        """
        if "loaded" not in self.__dict__:
            raise InputError("the generator is closed; make another with OffloadedGenerator.from_pretrained")

    def chooses(self, field: str) -> bool:
        """Whether `field` of the config was left open, to be chosen anew for each call."""
        return field in self._open

    def settle(self, lengths: list[int], capacities: list[int], continued: bool, kv_dtype: str | None = None) -> None:
        """Choose the K/V dtype and the hot set of this call, where the user left them open."""
        if not self._open:
            return
        given = {} if kv_dtype is None else {"kv_dtype": kv_dtype}
        asked = dataclasses.replace(self.config, **self._open | given)
        source, device = self.loaded.source, self.loaded.device
        before, kept = self.config.kv_dtype, self.kept.nbytes
        self.config = settle_config(source, asked, device, lengths, capacities, weight_bytes(source), continued, kept)
        stored, own = self.config.kv_dtype, dtype_name(source.dtype)
        if asked.kv_dtype == "auto" and stored not in (before, own):
            self._announcements.append(f"K/V are stored as {stored}: as {own} they do not fit the memory that is there")
        if "hot_set" not in self._open:
            return
        if self.config.kv_location == "host" and self.config.hot_set_multiple < HOT_SETS[0]:
            chosen, best = f"{self.config.hot_set_multiple:g}", f"{HOT_SETS[0]:g}"
            self._announcements.append(f"hot set: {chosen} x the budget, the most that fits; {best} x is faster")

    def plan_call(
        self, lengths: list[int], capacities: list[int], continued: bool = False, kv_dtype: str | None = None
    ) -> MemoryPlan:
        """Choose what the config leaves open, check that a call fits (`check_request`), and say what was chosen.

        Args:
            kv_dtype: What K/V are stored as already; None chooses it where it is open.
        """
        self.settle(lengths, capacities, continued, kv_dtype)
        kept = self.kept.nbytes
        plan = check_request(self.loaded, self.config, lengths, capacities, continued=continued, kept=kept)
        if kept:
            limit = memory_limits(self.config, self.loaded.device, 0, kept).host
            self.kept.trim(limit - plan.host_states)
        if plan.prefill_mode == "streamed":
            self._announcements.append("the prompt does not fit the GPU as a whole: its prefill is streamed")
        if plan.disk_kv:
            self._announcements.append(
                f"K/V are in files in {self.config.kv_dir}, {memory_text(plan.disk_kv)}: a row that is neither on the "
                "device nor in the page cache is a read of the disk"
            )
        while self._announcements:
            notice(self._announcements.pop(0))
        return plan

    def calibrated(self, prompt: list[int]) -> Calibration:
        """The model's calibration, found or made; of `prompt` where the model has no tokenizer."""
        if self._calibration is None:
            self._calibration = find_or_make_calibration(self.loaded, self.decoder, None, prompt)
        if self._promised and (self.config.label_code != "product" or self._calibration.label_mass is None):
            notice(
                f"token_budget={self.config.budget}: nothing is known of what these labels promise, so they are taken "
                "at their word; product codes of a calibration made by this version are corrected"
            )
        self._promised = False
        return self._calibration
