"""A machine for the few PTX instructions that kernels/product_lookup.py uses: all threads of a program side by side."""

from __future__ import annotations

import re

import numpy as np


class PtxMachine:
    """Runs a block of PTX for threads that go through it together.

    Args:
        threads: Threads of the program.
        memory: The device's memory, uint8; an address is a place in it.
        operands: What `$0`, `$1`, ... hold: int64 [threads] each, or None where the block writes.
    """

    def __init__(self, threads: int, memory: np.ndarray, operands: list[np.ndarray | None]) -> None:
        self.values: dict[str, np.ndarray] = {"%tid.x": np.arange(threads)}
        self.values |= {f"${n}": value for n, value in enumerate(operands) if value is not None}
        self._threads = threads
        self._memory = memory
        self._shared = np.zeros(0, np.uint8)
        # Which bytes of shared memory were written before the last barrier.
        self._written, self._there = self._shared == 1, self._shared == 1

    def run(self, text: str) -> None:
        """Run every line of a block."""
        for line in text.strip().removeprefix("{").removesuffix("}").strip().splitlines():
            self._line(line.strip().rstrip(";"))

    def _line(self, line: str) -> None:
        if line.startswith(".shared"):
            size = int(re.search(r"table\[(\d+)\]", line)[1])  # type: ignore[index]
            self._shared = np.full(size, 0xEE, np.uint8)
            self._written, self._there = np.zeros(size, bool), np.zeros(size, bool)
            self.values["table"] = np.zeros(self._threads, np.int64)
        elif line.startswith("bar.sync"):
            self._there = self._written.copy()
        elif not line.startswith(".reg"):
            active = np.ones(self._threads, bool)
            if line.startswith("@"):
                guard, line = line.split(" ", 1)
                active = self.values[guard[1:]].astype(bool)
            name, operands = line.split(" ", 1)
            self._instruction(name, re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", operands), active)

    def _instruction(self, name: str, operands: list[str], active: np.ndarray) -> None:
        if name in ("ld.global.v4.b32", "ld.shared.b32"):
            shared = ".shared" in name
            addresses = self._address(operands[1])[active]
            memory = self._shared if shared else self._memory
            targets = operands[0].strip("{}").split(", ")
            for n, target in enumerate(targets):
                at = addresses[:, None] + 4 * n + np.arange(4)
                assert not shared or self._there[at].all(), "read before it was written"
                value = np.zeros(self._threads, np.int64)
                value[active] = np.ascontiguousarray(memory[at]).view(np.uint32)[:, 0]
                self.values[target] = value
        elif name == "st.shared.v4.b32":
            addresses = self._address(operands[0])[active]
            for n, source in enumerate(operands[1].strip("{}").split(", ")):
                at = addresses[:, None] + 4 * n + np.arange(4)
                self._shared[at] = self.values[source][active].astype(np.uint32)[:, None].view(np.uint8)
                self._written[at] = True
        else:
            result = self._compute(name, [self._value(operand) for operand in operands[1:]])
            wide = name.startswith("mad.wide") or name == "setp.lt.u32"
            self.values[operands[0]] = result if wide else result & 0xFFFFFFFF

    def _compute(self, name: str, inputs: list[np.ndarray]) -> np.ndarray:
        if name in ("mov.u32", "mov.b32"):
            return inputs[0]
        if name == "add.u32":
            return inputs[0] + inputs[1]
        if name in ("mad.wide.u32", "mad.lo.u32"):
            return inputs[0] * inputs[1] + inputs[2]
        if name == "shr.u32":
            return inputs[0] >> inputs[1]
        if name == "and.b32":
            return inputs[0] & inputs[1]
        if name == "setp.lt.u32":
            return inputs[0] < inputs[1]
        if name == "dp4a.u32.u32":
            return inputs[2] + sum(((inputs[0] >> 8 * n) & 255) * ((inputs[1] >> 8 * n) & 255) for n in range(4))
        assert name == "prmt.b32", f"{name} is not known"
        pair = inputs[0] | (inputs[1] << 32)
        picked = [(pair >> 8 * ((inputs[2] >> 4 * n) & 7)) & 255 for n in range(4)]
        return sum(byte << 8 * n for n, byte in enumerate(picked))

    def _address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[]").partition("+")
        return self.values[base] + int(offset or 0)

    def _value(self, operand: str) -> np.ndarray:
        if operand in self.values:
            return self.values[operand]
        return np.full(self._threads, int(operand, 0), np.int64)
