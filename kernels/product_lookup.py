"""Look-ups of product codes in a table of the query, as PTX: the table is brought to shared memory first.

Triton reads through pointers alone, and an H100 answers half as many reads of 32 bits from its level 1 cache as from
shared memory. So the sums over a label's parts are one block of PTX, in which a program copies its table to shared
memory, then looks up its tokens' words there.
"""

from __future__ import annotations

# The most that a number in a byte of a table may be: four of them are summed in the byte.
LARGEST_IN_BYTE = 63


def sum_words(heads: int) -> int:
    """Words of 32 bits that hold a token's sums of `heads` query heads: two heads to a word, or one head."""
    return 2 if heads > 2 else 1


def lookup_ptx(parts: int, row_words: int, heads: int, tokens: int, threads: int) -> str:
    """A block of PTX that sums what a table gives for the parts of labels.

    Its operands: `sum_words(heads)` results of every token; word 0 of every token's label, then word 1, and so on; the
    address of the table `[P, 16]`, 64 bits, once for every token. All threads of a program run it together, once.

    Args:
        parts: P, parts of a label.
        row_words: Words of a label, of 32 bits.
        heads: Query heads of the table: one or two stand in the halves of its words, three or four in the bytes.
        tokens: Tokens of a thread.
        threads: Threads of a program, whole warps.
    """
    words = sum_words(heads)
    first_label = words * tokens
    lines = [
        f".shared .align 16 .b8 table[{64 * parts}];",
        ".reg .pred inside;",
        ".reg .b64 source;",
        ".reg .b32 base, place, address, numbers, entry, four, pair, sum0, sum1;",
        ".reg .b32 copied<4>, pick<4>;",
        "mov.u32 base, table;",
        *_copy(parts, threads, f"${first_label + row_words * tokens}"),
        *(f"mov.u32 pick{n}, {4 << 8 * n};" for n in range(4)),
    ]
    for token in range(tokens):
        lines += [f"mov.u32 sum{n}, 0;" for n in range(words)]
        for part in range(0, parts, 8):
            label = f"${first_label + part // 8 * tokens + token}"
            for half in range(min(2, parts - part)):
                lines += _half_parts(label, half, range(part + half, min(part + 8, parts), 2), heads)
        lines += [f"mov.u32 ${n * tokens + token}, sum{n};" for n in range(words)]
    return "{\n" + "\n".join(lines) + "\n}"


def _copy(parts: int, threads: int, table: str) -> list[str]:
    """Copy a table of `parts` times 64 bytes, 16 bytes a thread at a time, and wait for all threads."""
    lines = []
    vector = "{copied0, copied1, copied2, copied3}"
    for first in range(0, 4 * parts, threads):
        lines += ["mov.u32 place, %tid.x;", f"add.u32 place, place, {first};"]
        inside = ""
        if first + threads > 4 * parts:
            lines += [f"setp.lt.u32 inside, place, {4 * parts};"]
            inside = "@inside "
        lines += [f"mad.wide.u32 source, place, 16, {table};", "mad.lo.u32 address, place, 16, base;"]
        lines += [f"{inside}ld.global.v4.b32 {vector}, [source];", f"{inside}st.shared.v4.b32 [address], {vector};"]
    return [*lines, "bar.sync 0;"]


def _half_parts(label: str, half: int, parts: range, heads: int) -> list[str]:
    """Add up to four parts of a word of a label, those in half `half` of its bytes.

    An entry's address takes one instruction: of four numbers `dp4a` picks one, times the 4 bytes of an entry, and
    adds it to the table's.
    """
    lines = [f"shr.u32 numbers, {label}, {4 * half};", "and.b32 numbers, numbers, 0x0F0F0F0F;"]
    for n, part in enumerate(parts):
        lines += [f"dp4a.u32.u32 address, numbers, pick{n}, base;", f"ld.shared.b32 entry, [address+{64 * part}];"]
        lines += ["add.u32 four, four, entry;" if n else "mov.b32 four, entry;"]
    if heads <= 2:
        return [*lines, "add.u32 sum0, sum0, four;"]
    # The bytes of even heads, and of odd ones, as halves.
    for n, bytes_ in enumerate(("0x4240", "0x4341")):
        lines += [f"prmt.b32 pair, four, 0, {bytes_};", f"add.u32 sum{n}, sum{n}, pair;"]
    return lines
