"""Bytes that prefill and a decode step take for a while, from shapes alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from ds_offload.kernels.coded_attention import coded_attention_launch, window_launch
from ds_offload.kernels.kv_codec import REFERENCE_ROWS
from ds_offload.kernels.label_codec import LabelLayout
from ds_offload.kernels.label_scores import REFERENCE_BLOCK
from ds_offload.kernels.label_scores_launch import scores_launch
from ds_offload.kernels.product_code import PART, REFERENCE_TOKENS, WORDS
from ds_offload.kernels.product_scores_launch import weights_bytes
from ds_offload.kernels.select import score_width, select_launch
from ds_offload.kernels.slot_attention_launch import slot_attention_launch

if TYPE_CHECKING:
    from ds_offload.memory.plan import CacheShape

# Workspace of one chunk of tokens in norms and MLP, and of one block of heads in attention.
CHUNK_BYTES = 256 * 2**20
# One of the two buffers through which a streamed prefill reads stored K/V back.
STREAM_BYTES = 64 * 2**20
# One of the two buffers through which a layer's K/V are read back between two decode steps, to be compared with.
_COMPARED_BYTES = 32 * 2**20
# Segments of a prompt's rows that are handed to the writer at a time.
WRITTEN_SEGMENTS = 16
# Tokens whose labels are encoded at a time (`LabelCache.write_prompt`).
_LABEL_TOKENS = 4096
# Weights, expert numbers and permutations of a token's expert: a dozen numbers of up to 8 bytes.
_ROUTING_BYTES = 96
# A channel of K or V on its way to a code, and back, as the CPU's torch does it.
_ENCODED_BYTES, _DECODED_BYTES = 24, 12


def chunk_tokens(hidden_size: int, intermediate_size: int, itemsize: int) -> int:
    """Prompt tokens per chunk such that the MLP's intermediate tensors stay within `CHUNK_BYTES`."""
    per_token = (4 * intermediate_size + 4 * hidden_size) * itemsize
    return max(256, CHUNK_BYTES // per_token // 64 * 64)


PrefillMode = Literal["whole", "streamed"]


def piece_tokens(heads: int, head_dim: int) -> int:
    """Prompt tokens of one piece: the float32 sums of their attention stay within `CHUNK_BYTES`."""
    return max(256, CHUNK_BYTES // (4 * heads * head_dim) // 64 * 64)


def stream_tokens(kv_heads: int, row_bytes: int) -> int:
    """Stored tokens that a piece attends to at a time: their rows fill a buffer of `STREAM_BYTES`."""
    return max(256, STREAM_BYTES // (kv_heads * row_bytes) // 64 * 64)


def compared_tokens(kv_heads: int, row_bytes: int) -> int:
    """Stored tokens that are read back at a time to compare a step's attention with exact attention."""
    return max(256, _COMPARED_BYTES // (kv_heads * row_bytes) // 64 * 64)


def prefill_mode(shape: CacheShape, room: int | None) -> PrefillMode:
    """How prompts are read with `room` bytes of workspace on the device, None for no limit.

    "whole" keeps all tokens' hidden states, queries and two layers' K/V on the device;
    "streamed" keeps them for one piece of the prompt, and reads the K/V of the tokens
    before it back from the store. Whole where it fits, and where streaming takes no less.
    """
    whole = prefill_bytes(shape)
    return "streamed" if room is not None and room < whole and streamed_prefill_bytes(shape) < whole else "whole"


def prefill_bytes(shape: CacheShape) -> int:
    """Workspace of the longest prompt, as `prefill` (ds_offload/prefill.py) takes it with the whole on the device."""
    prompt, itemsize = max(shape.prompts), shape.dtype.itemsize
    group = prompt * shape.heads // shape.kv_heads * shape.head_dim * itemsize
    attention = min(prompt * shape.heads * shape.head_dim * itemsize, max(CHUNK_BYTES, group))
    return _kept_bytes(shape, prompt) + max(_chunk_bytes(shape, prompt), attention) + _writer_bytes(shape, prompt)


def streamed_prefill_bytes(shape: CacheShape) -> int:
    """The same of a streamed prefill: a piece of the prompt and two buffers of stored rows, whatever its length."""
    prompt, itemsize = max(shape.prompts), shape.dtype.itemsize
    piece = min(prompt, piece_tokens(shape.heads, shape.head_dim))
    block = min(prompt, stream_tokens(shape.kv_heads, shape.row_bytes)) * shape.kv_heads
    # Sums of the attention so far, a part of it, and the same as float32; a log-sum-exp of each, and the weights.
    attention = piece * shape.heads * (shape.head_dim * (8 + itemsize) + 16)
    decoded = 0
    if shape.layout is not None:
        decoded = block * shape.plain_row_bytes
        attention += _codec_bytes(shape, shape.kv_heads, block // shape.kv_heads, _DECODED_BYTES)
    elif shape.dtype != shape.kv_dtype:
        attention += block * 2 * shape.head_dim * itemsize
    workspace = max(_chunk_bytes(shape, piece), attention) + 2 * block * shape.row_bytes + decoded
    return _kept_bytes(shape, piece) + workspace + _writer_bytes(shape, piece)


def hidden_state_bytes(shape: CacheShape) -> int:
    """Hidden states of the longest prompt, which a streamed prefill on CUDA keeps on the host."""
    return max(shape.prompts) * shape.hidden_size * shape.dtype.itemsize


def _kept_bytes(shape: CacheShape, tokens: int) -> int:
    """Hidden states, queries, two layers' K/V, RoPE and token ids, numbers of 8 bytes, of `tokens` tokens."""
    per_token = shape.hidden_size + shape.heads * shape.head_dim + 4 * shape.kv_heads * shape.head_dim
    per_token += 2 * shape.head_dim
    return tokens * (per_token * shape.dtype.itemsize + 8)


def _chunk_bytes(shape: CacheShape, tokens: int) -> int:
    """Norms, projections or MLP of one chunk of `tokens` tokens."""
    chunk = chunk_tokens(shape.hidden_size, shape.intermediate_size, shape.dtype.itemsize)
    tokens = min(tokens, chunk)
    if not shape.fused:
        return _layer_bytes(shape, tokens)
    # A norm beside its products: of attention, or gate and up, whose SwiGLU and residual are made in place.
    attention = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    per_token = shape.hidden_size + max(attention, 2 * shape.intermediate_size)
    return tokens * per_token * shape.dtype.itemsize


def _writer_bytes(shape: CacheShape, tokens: int) -> int:
    """What the writer takes while the next layer computes.

    Float32 copies of keys on the way to labels, or rows in the store's dtype; quantised ones
    are there while labels are made.
    """
    labels = _encoding_bytes(shape, tokens)
    written = min(tokens, WRITTEN_SEGMENTS * shape.segment_tokens)
    rows = written * shape.kv_heads * shape.row_bytes
    if shape.layout is not None:
        return rows + max(labels, _codec_bytes(shape, shape.kv_heads, written, _ENCODED_BYTES))
    return labels if shape.dtype == shape.kv_dtype else max(labels, rows)


def _encoding_bytes(shape: CacheShape, tokens: int) -> int:
    """Keys of some of `tokens` tokens on their way to labels: a CUDA kernel makes product codes from keys in place."""
    chunk = shape.kv_heads * min(tokens, _LABEL_TOKENS)
    if isinstance(shape.labels, LabelLayout):
        return 8 * chunk * shape.labels.channels
    stored = chunk * shape.head_dim * shape.kv_dtype.itemsize if shape.dtype != shape.kv_dtype else 0
    if shape.cuda:
        return stored
    # Keys and axes, twice each, and distances to all words with what they are made of.
    return stored + shape.kv_heads * min(tokens, REFERENCE_TOKENS) * shape.head_dim * (16 + 2 * 4 * WORDS // PART)


def _codec_bytes(shape: CacheShape, heads: int, tokens: int, channel: int) -> int:
    """Float32 copies of rows on their way to codes or back, `channel` bytes a channel of K or V; on a CPU only."""
    return 0 if shape.cuda else channel * heads * min(tokens, REFERENCE_ROWS) * shape.head_dim


def decode_bytes(shape: CacheShape) -> int:
    """Workspace of a step at the longest context: scores, selections, places, attention, MLP and logits."""
    rows, sequences = shape.rows, len(shape.capacities)
    places = 2 * rows * (shape.window.forced_slots + shape.most_kept) * 8
    logits = sequences * shape.vocab_size * (4 + shape.dtype.itemsize)
    # Queries and outputs of every layer, and the predicted queries, are there until the next step.
    attended = (3 if shape.predicted else 2) * (shape.layers - shape.dense_layers) * sequences
    attended *= shape.heads * shape.head_dim * shape.dtype.itemsize
    parts = _cuda_step(shape) if shape.cuda else _cpu_step(shape)
    if shape.layout is not None:
        # A layer's new rows, quantised by the writer beside the rest.
        parts += rows * shape.row_bytes + _codec_bytes(shape, rows, 1, _ENCODED_BYTES)
    parts += max(_layer_bytes(shape, sequences), _dense_bytes(shape))
    if shape.cuda:
        # A captured step's memory is its own.
        return attended + places + logits + parts + _comparison_bytes(shape)
    return attended + places + logits + max(parts, _comparison_bytes(shape))


def _comparison_bytes(shape: CacheShape) -> int:
    """What comparing one layer of one sequence takes between two steps: `ds_offload/attention_fidelity.py`."""
    if not shape.monitored or shape.everything:
        return 0
    longest, kv_heads = max(shape.capacities), shape.kv_heads
    one = replace(shape, capacities=[longest], look_ahead=0, predicted=False)
    selecting = _cuda_step(one) if shape.cuda else _cpu_step(one)
    tokens = kv_heads * shape.most_kept * 8
    block = min(longest, compared_tokens(kv_heads, shape.row_bytes))
    # K or V as float32; scores, those less the highest, and weights.
    read = kv_heads * block * (2 * shape.row_bytes + 4 * shape.head_dim) + 3 * 4 * shape.heads * block
    if shape.layout is not None:
        read += kv_heads * block * 2 * shape.head_dim * shape.dtype.itemsize
    # Weights of KV heads and their selection; flags of tokens, places and weights of the chosen ones.
    chosen = 4 * kv_heads * longest + max(selecting, kv_heads * longest + 6 * tokens)
    weights = 4 * shape.heads * longest
    return max(selecting, tokens + max(weights + read, weights + 4 * kv_heads * longest, chosen))


def _layer_bytes(shape: CacheShape, tokens: int) -> int:
    """Norms, projections with RoPE, or MLP of `tokens` tokens of one layer, whichever is more.

    A mixture of experts has its intermediate tensors once for every expert of a token, and
    numbers of the routing besides.
    """
    mlp = (shape.intermediate_size * 4 + shape.hidden_size) * shape.active_experts + 3 * shape.hidden_size
    heads = 5 * (shape.heads + shape.kv_heads) * shape.head_dim + 2 * shape.hidden_size
    routing = _ROUTING_BYTES * shape.active_experts if shape.active_experts > 1 else 0
    return tokens * (max(mlp, heads) * shape.dtype.itemsize + routing)


def _dense_bytes(shape: CacheShape) -> int:
    """Attention of a dense layer of one sequence: its mask, and its rows where they change dtype."""
    if not shape.dense_layers:
        return 0
    longest = max(shape.capacities)
    rows = 2 * shape.kv_heads * shape.head_dim * shape.dtype.itemsize if shape.dtype != shape.kv_dtype else 0
    return longest * (rows + shape.heads * (1 + shape.dtype.itemsize))


def _cuda_step(shape: CacheShape) -> int:
    """What two streams take at most: selection and attention on one; prediction or look-ahead on the other.

    Predicted tokens are lent to the compute stream, and scores to the look-ahead. While a
    graph is captured the allocator takes no lent tensor back, so those of every layer add up.
    """
    rows, heads, sequences, longest = shape.rows, shape.heads, len(shape.capacities), score_width(max(shape.capacities))
    tokens, ahead = rows * shape.most_kept * 8, rows * shape.look_ahead * 8
    scores = selecting = weighing = 0
    if shape.scored:
        launch = select_launch(longest, max(shape.most_kept, shape.look_ahead))
        scores = rows * longest * (2 if shape.whole_scores else 4)
        if not launch.block:
            selecting = rows * (8 + 3 * -(-longest // launch.chunk) + launch.listed) * 4
        if shape.weighed:
            weighing = _weighing_bytes(shape, longest)
        if shape.top_p:
            # A masked copy, the sorted one with its indices, and the sort's own.
            weighing += 10 * scores
    group = heads // shape.kv_heads
    forced = shape.window.forced_slots
    split = slot_attention_launch(group, shape.head_dim, shape.dtype, shape.kv_dtype).split
    splits = -(-(forced + shape.most_kept) // split)
    if shape.layout is not None:
        splits = -(-forced // window_launch(group, shape.head_dim, shape.dtype, shape.kv_dtype).split)
        splits += -(-shape.most_kept // coded_attention_launch(group, shape.layout, shape.dtype).split)
    # Beside the splits' parts the lists of what attention fetches, and its counters.
    attention = sequences * heads * splits * (shape.head_dim + 2) * 4 + 2 * tokens + 128 * (rows + 1)
    # The result of an admission and its scratch memory are four times the tokens.
    selection = scores + tokens + max(weighing, selecting, 4 * tokens)
    step = max(selection, attention)
    if shape.look_ahead:
        step += ahead + max(selecting, 4 * ahead) + (shape.layers - 1) * scores
    if shape.predicted:
        hidden = sequences * shape.hidden_size * shape.dtype.itemsize
        step += selection + shape.layers * (tokens + hidden)
    return step


def _weighing_bytes(shape: CacheShape, longest: int) -> int:
    """What scores of query heads take on CUDA on their way to weights of KV heads."""
    sequences, heads, group = len(shape.capacities), shape.heads, shape.heads // shape.kv_heads
    if isinstance(shape.labels, LabelLayout):
        return sequences * heads * 2 * -(-longest // scores_launch(shape.labels, group).part) * 4
    return weights_bytes(shape.labels, sequences, heads, group, longest)


def _cpu_step(shape: CacheShape) -> int:
    """One selection or one attention at a time; scores are those of every query head."""
    rows, heads, sequences, longest = shape.rows, shape.heads, len(shape.capacities), max(shape.capacities)
    tokens, ahead = rows * shape.most_kept * 8, rows * shape.look_ahead * 8
    scores = scoring = row = 0
    if shape.scored:
        scores = rows * longest * (2 if shape.whole_scores else 4)
        # A row's keys, flags and partition.
        row = 32 * longest
        if shape.whole_scores:
            # As float32 first.
            scoring = rows * longest * 4
        if shape.top_p:
            # A masked copy, the sorted one with its indices, and the sort's own.
            scoring = 5 * scores
        if shape.weighed:
            # Those of every head, and one sequence's softmax of them, not in place.
            scoring = max(scoring, (sequences + 2) * heads * longest * 4 + shape.kv_heads * longest * 4)
        if isinstance(shape.labels, LabelLayout) and shape.labels.bits == 16:
            block = min(longest, REFERENCE_BLOCK)
            scoring += block * (shape.kv_heads * shape.labels.channels * 8 + 2 * heads * 4)
    # Tokens, and the result of an admission: three times the tokens.
    selection = scores + tokens + max(scoring, row, 3 * tokens, ahead + max(row, 3 * ahead))
    attended = rows * (shape.window.forced_slots + shape.most_kept)
    # Rows side by side, taken out of a store first where they lie there, and in the query's dtype.
    attention = attended * (shape.row_bytes * (2 if shape.kv_on_device else 1) + 4 * 8)
    if shape.layout is not None:
        attention = attended * (shape.plain_row_bytes + 4 * 8) + rows * shape.most_kept * shape.row_bytes
        attention += _codec_bytes(shape, rows, shape.most_kept, _DECODED_BYTES)
    elif shape.dtype != shape.kv_dtype:
        attention += attended * 2 * shape.head_dim * shape.dtype.itemsize
    return max(selection, attention) + (tokens if shape.predicted else 0)
