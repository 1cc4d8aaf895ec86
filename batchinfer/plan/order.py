"""Orders of admission, and which prompts are the same.

Must not know: what a token means, how rows are read or run. Invariant: an order is a permutation of
the rows it was given, so every row is admitted exactly once whatever the sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

BoolArray = npt.NDArray[np.bool_]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

#: Shared prefixes are measured in pieces of this many tokens: an engine's prefix cache knows whole
#: blocks only (vLLM: 16 tokens on a GPU, 128 on a CPU), and less is not worth an order.
PIECE_TOKENS = 128
_PAIRS_AT_ONCE = 1024  # a megabyte of indices
#: A prefix that this share of the rows begins with stays in the cache in any order.
_HOT_SHARE = 0.5


def by_length(num_tokens: Int64Array) -> Int64Array:
    """Longest expected work first; ties keep their order. [n] -> [n]

    Every row may decode `max_tokens`, so the expected work differs by the prompt alone, unless rows
    have a `max_tokens` of their own. Longest
    first, because the longest rows admitted last would run on alone at the end, an out-of-memory
    shows at once, and an ETA errs to the high side.
    """
    return np.argsort(-num_tokens, kind="stable").astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class PrefixTree:
    """Rows as leaves of a tree of shared prefixes of their prompts, or of such a tree a group.

    `num_shared_tokens`: of prompts, in common with the row before, beyond what stays cached in any
    order. It is what grouping saves.
    """

    sorted_rows: Int64Array  # [n]
    shared: Int64Array  # [n - 1] pieces that sorted row i has in common with i + 1
    expected_tokens: Int64Array  # [n] of sorted row i
    edges: Int64Array  # [number of trees + 1] where each tree begins in sorted_rows
    num_shared_tokens: int

    def depth_first(self) -> Int64Array:
        """Rows in order of admission, tree after tree. [n]

        Walked depth first, each inner node is computed once, with a cache that holds one path of
        the tree (SGLang, arXiv 2312.07104, theorem 3.1). Among the children of a node the longest
        comes first, for the reasons of `by_length`.
        """
        ordered = [
            low + _depth_first(self.shared[low : high - 1], self.expected_tokens[low:high])
            for low, high in zip(self.edges[:-1].tolist(), self.edges[1:].tolist(), strict=True)
        ]
        rows: Int64Array = self.sorted_rows[np.concatenate([np.empty(0, np.int64), *ordered])]
        return rows


def prefix_trees(
    token_ids: Int32Array,
    offsets: Int64Array,
    is_wanted: BoolArray,
    *partitions: Int64Array,
    expected_tokens: Int64Array | None = None,
) -> list[PrefixTree]:
    """For each partition of the rows, the trees of the wanted rows of each of its groups.

    Row i's prompt is token_ids[offsets[i]:offsets[i + 1]]. offsets [n + 1]; is_wanted [n]; of each
    partition [n] the number of row i's group, ascending. `expected_tokens` [n]: what a row may take
    in all; None: by its prompt alone.
    """
    if expected_tokens is None:
        expected_tokens = np.diff(offsets)
    rows = _sorted_rows(token_ids, offsets)
    rows = rows[is_wanted[rows]]
    shared_by_all = _shared_pieces(token_ids, offsets, rows)
    hot = np.zeros(len(is_wanted), dtype=np.int64)
    hot[rows] = _hot_pieces(shared_by_all)
    trees = []
    for group_of in partitions:
        grouped = rows[np.argsort(group_of[rows], kind="stable")]
        is_edge = np.diff(group_of[grouped]) != 0
        shared = shared_by_all
        if is_edge.any():
            shared = _shared_pieces(token_ids, offsets, grouped)
            shared[is_edge] = 0
        ends = [len(grouped)] if len(grouped) else []
        edges = np.array([0, *(np.flatnonzero(is_edge) + 1).tolist(), *ends])
        num_shared = int(np.maximum(0, shared - hot[grouped[1:]]).sum()) * PIECE_TOKENS
        trees.append(PrefixTree(grouped, shared, expected_tokens[grouped], edges, num_shared))
    return trees


def _sorted_rows(token_ids: Int32Array, offsets: Int64Array) -> Int64Array:
    """Rows sorted by their prompts, so that those with a common prefix are neighbours. [n]

    Compared as bytes, by Arrow and without a copy: which of two tokens is less does not matter.
    """
    buffers = [
        None,
        pa.py_buffer(offsets * token_ids.itemsize),
        pa.py_buffer(np.ascontiguousarray(token_ids)),
    ]
    prompts = pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)
    ranks: Int64Array = pc.sort_indices(prompts).to_numpy().astype(np.int64)
    return ranks


def _shared_pieces(token_ids: Int32Array, offsets: Int64Array, rows: Int64Array) -> Int64Array:
    """How many whole pieces each row has in common with the next in `rows`. [n] -> [n - 1]"""
    first, second = offsets[rows[:-1]], offsets[rows[1:]]
    num_tokens = np.diff(offsets)[rows]
    num_pieces = np.minimum(num_tokens[:-1], num_tokens[1:]) // PIECE_TOKENS
    shared = np.zeros(len(first), dtype=np.int64)
    for start in range(0, len(first), _PAIRS_AT_ONCE):
        pairs = slice(start, start + _PAIRS_AT_ONCE)
        shared[pairs] = _common_pieces(token_ids, first[pairs], second[pairs], num_pieces[pairs])
    return shared


def _common_pieces(
    token_ids: Int32Array, first: Int64Array, second: Int64Array, num_pieces: Int64Array
) -> Int64Array:
    """Pieces that are the same from token `first` and from token `second` on, of `num_pieces`. [n]

    A piece of all pairs that still agree at a time; the work is proportional to what is shared.
    """
    common = np.zeros(len(first), dtype=np.int64)
    piece = np.arange(PIECE_TOKENS)
    left = np.flatnonzero(num_pieces > 0)
    depth = 0
    while len(left):
        at = depth * PIECE_TOKENS + piece
        is_same = (token_ids[first[left, None] + at] == token_ids[second[left, None] + at]).all(1)
        left = left[is_same]
        depth += 1
        common[left] = depth
        left = left[num_pieces[left] > depth]
    return common


def _hot_pieces(shared: Int64Array) -> Int64Array:
    """How many pieces each sorted row has of the prefix that stays cached in any order.

    That is the longest one that at least `_HOT_SHARE` of the rows have in common. shared [n - 1]:
    pieces in common with the next row. [n]
    """
    num_rows = len(shared) + 1
    low, high = 0, int(shared.max(initial=0))
    start, stop = 0, num_rows
    while low < high:
        middle = (low + high + 1) // 2
        breaks = np.flatnonzero(np.concatenate([[True], shared < middle, [True]]))
        longest = int(np.diff(breaks).argmax())
        if breaks[longest + 1] - breaks[longest] >= _HOT_SHARE * num_rows:
            low = middle
            start, stop = int(breaks[longest]), int(breaks[longest + 1])
        else:
            high = middle - 1
    hot = np.full(num_rows, low, dtype=np.int64)
    # Rows outside of that run have what they share with it: in sorted order, the least between.
    hot[:start] = np.minimum.accumulate(shared[:start][::-1])[::-1]
    hot[stop:] = np.minimum.accumulate(shared[stop - 1 :])
    return np.minimum(hot, low)


def _depth_first(shared: Int64Array, num_tokens: Int64Array) -> Int64Array:
    """Positions in order of a walk, the child with the longest prompt first.

    shared [n - 1], num_tokens [n] -> [n]
    """
    ordered: list[int] = []
    nodes = [(0, len(num_tokens))]
    while nodes:
        low, high = nodes.pop()
        if high - low == 1:
            ordered.append(low)
            continue
        inner = shared[low : high - 1]
        cuts = np.flatnonzero(inner == inner.min()) + 1
        if len(cuts) == high - low - 1:  # leaves only
            ordered += (low + by_length(num_tokens[low:high])).tolist()
            continue
        edges = np.concatenate([[0], cuts, [high - low]])
        longest = np.maximum.reduceat(num_tokens[low:high], edges[:-1])
        children = by_length(longest)[::-1]  # a stack: the last comes out first
        starts, stops = low + edges[children], low + edges[children + 1]
        nodes += zip(starts.tolist(), stops.tolist(), strict=True)
    return np.array(ordered, dtype=np.int64)


def find_duplicates(
    token_ids: Int32Array, offsets: Int64Array, kinds: Sequence[Hashable] | None = None
) -> Int64Array:
    """For each row the index of the first row with the same prompt, -1 where it is the first.

    `kinds`: only rows of one kind are the same, and those of kind None never. Empty rows (errors)
    are nobody's duplicate. token_ids [offsets[-1]], offsets [n + 1] -> [n]
    """
    num_rows = len(offsets) - 1
    leader = np.full(num_rows, -1, dtype=np.int64)
    first_by_digest: dict[tuple[bytes, Hashable], int] = {}
    prompts = memoryview(pa.py_buffer(np.ascontiguousarray(token_ids)))  # bytes, not copied
    starts = (offsets * token_ids.itemsize).tolist()
    for row in range(num_rows):
        kind = 0 if kinds is None else kinds[row]
        if starts[row] == starts[row + 1] or kind is None:
            continue
        # Its digest, as the prompt itself may be long.
        digest = hashlib.blake2b(prompts[starts[row] : starts[row + 1]], digest_size=16).digest()
        first = first_by_digest.setdefault((digest, kind), row)
        if first != row:
            leader[row] = first
    return leader
