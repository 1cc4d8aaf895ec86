"""Every row is admitted exactly once, in an order that depends on the rows alone."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.errors import RowError
from batchinfer.plan import Chunk, plan_buffer, request_seed
from batchinfer.plan.buffer import MAX_MIXED_CHUNKS
from batchinfer.plan.order import PIECE_TOKENS, by_length, find_duplicates

ORDERS = ("length", "prefix", "auto", "input")
prompts_of_few_tokens = st.lists(st.lists(st.integers(0, 2), max_size=3), max_size=12)


def flat(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    token_ids = np.array([token for prompt in prompts for token in prompt], dtype=np.int32)
    lengths = [len(prompt) for prompt in prompts]
    return token_ids, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def chunk_of(
    prompts: list[list[int]],
    is_todo: np.ndarray,
    *,
    failed: set[int] = frozenset(),  # type: ignore[assignment]
    deduplicate: bool = False,
    window: int = 0,
) -> Chunk:
    token_ids, offsets = flat([[] if i in failed else p for i, p in enumerate(prompts)])
    return Chunk(
        shard="a.parquet",
        window=window,
        rows=np.arange(len(prompts), dtype=np.int64) * 3 + 5,
        token_ids=token_ids,
        offsets=offsets,
        carried=pa.table({"id": pa.array(range(len(prompts)), pa.int64())}),
        errors={index: RowError("empty_prompt", "no tokens") for index in failed},
        is_todo=is_todo,
        deduplicate=deduplicate,
    )


@given(st.lists(st.integers(0, 5)))
def test_the_longest_come_first_and_ties_keep_the_order_of_the_file(lengths: list[int]) -> None:
    ordered = by_length(np.array(lengths, dtype=np.int64)).tolist()
    assert ordered == sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


@given(prompts_of_few_tokens)
def test_a_duplicate_names_the_first_row_of_the_same_prompt(prompts: list[list[int]]) -> None:
    leader = find_duplicates(*flat(prompts)).tolist()
    for row, prompt in enumerate(prompts):
        first = prompts.index(prompt)
        assert leader[row] == (first if prompt and first != row else -1)


def test_prompts_of_the_same_bytes_split_elsewhere_are_not_duplicates() -> None:
    assert find_duplicates(*flat([[1, 2], [3], [1], [2, 3], [1, 2]])).tolist() == [-1] * 4 + [0]


@given(
    windows=st.lists(prompts_of_few_tokens.filter(bool), min_size=1, max_size=3),
    num_samples=st.integers(1, 3),
    order=st.sampled_from(ORDERS),
    deduplicate=st.booleans(),
    data=st.data(),
)
def test_work_is_every_row_and_sample_to_do_once_less_errors_and_followers(
    windows: list[list[list[int]]],
    num_samples: int,
    order: str,
    deduplicate: bool,
    data: st.DataObject,
) -> None:
    chunks, due = [], set()
    for window, prompts in enumerate(windows):
        num_rows = len(prompts)
        num_due = num_rows * num_samples
        todo = data.draw(st.lists(st.booleans(), min_size=num_due, max_size=num_due))
        is_todo = np.array(todo, dtype=np.bool_).reshape(num_rows, num_samples)
        failed = data.draw(st.sets(st.integers(0, num_rows - 1)))
        chunk = chunk_of(prompts, is_todo, failed=failed, deduplicate=deduplicate, window=window)
        chunks.append(chunk)
        followers = [f for found in chunk.followers.values() for f in found]
        assert len(followers) == len(set(followers))
        assert not set(followers) & (failed | chunk.followers.keys())
        for leader, found in chunk.followers.items():
            assert all(prompts[f] == prompts[leader] for f in found)
            assert all(leader < f for f in found)
        assert deduplicate or followers == []
        due |= {
            (window, index, sample)
            for index in range(num_rows)
            for sample in range(num_samples)
            if is_todo[index, sample] and index not in failed and index not in followers
        }

    buffer = plan_buffer(chunks, order)

    items = [(item.chunk.window, item.index, item.sample) for item in buffer.items()]
    assert Counter(items) == Counter(due)
    rows = list(dict.fromkeys(item[:2] for item in items))
    assert items == [(*row, s) for row in rows for s in range(num_samples) if (*row, s) in due]
    if order == "input":
        assert rows == sorted(rows)
    if order == "length":
        assert rows == sorted(
            rows, key=lambda row: (row[0], -chunks[row[0]].num_prompt_tokens(row[1]), row[1])
        )


@st.composite
def prompts_with_shared_prefixes(draw: st.DrawFn) -> list[list[int]]:
    """Prompts put together from few pieces, so that many begin alike, and a rest."""
    pieces = [[n] * PIECE_TOKENS for n in range(3)]
    sequences = draw(st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=16))
    return [
        [token for piece in sequence for token in pieces[piece]] + [9] * draw(st.integers(1, 3))
        for sequence in sequences
    ]


def tokens_from_a_cache_of_one_path(prompts: list[list[int]]) -> int:
    """Whole pieces that each prompt has in common with the one before."""
    found = 0
    for before, prompt in pairwise(prompts):
        num_same = next(
            (i for i, (a, b) in enumerate(zip(before, prompt, strict=False)) if a != b),
            min(len(before), len(prompt)),
        )
        found += num_same // PIECE_TOKENS
    return found * PIECE_TOKENS


@given(prompts_with_shared_prefixes())
def test_grouping_computes_no_prefix_twice(
    prompts: list[list[int]],
) -> None:
    """Grouped by prefix no piece is computed twice with a cache of one path."""
    chunk = chunk_of(prompts, np.ones((len(prompts), 1), dtype=np.bool_))
    ordered = [prompts[item.index] for item in plan_buffer([chunk], "prefix").items()]
    paths = {
        tuple(prompt[:end])
        for prompt in prompts
        for end in range(PIECE_TOKENS, len(prompt) + 1, PIECE_TOKENS)
    }
    num_pieces = sum(len(prompt) // PIECE_TOKENS for prompt in prompts)
    ideal = (num_pieces - len(paths)) * PIECE_TOKENS
    assert tokens_from_a_cache_of_one_path(ordered) == ideal


def documents(num_documents: int, num_questions: int, *, system: int = 0) -> list[list[int]]:
    """Questions on long documents, shuffled; `system` tokens before all of them."""
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 1000, (num_documents, 10 * PIECE_TOKENS))
    prompts = [
        [5] * system + text.tolist() + rng.integers(0, 1000, 8).tolist()
        for text in texts
        for _ in range(num_questions)
    ]
    rng.shuffle(prompts)
    return prompts


def order_chosen(*windows: list[list[int]]) -> str:
    chunks = [
        chunk_of(prompts, np.ones((len(prompts), 1), dtype=np.bool_), window=window)
        for window, prompts in enumerate(windows)
    ]
    return plan_buffer(chunks, "auto").order


def test_auto_groups_across_windows_only_if_that_saves_more() -> None:
    """Auto groups over windows only where that saves more than within each."""
    scattered = documents(8, 8)
    assert order_chosen(scattered[:32], scattered[32:]) == "prefix over windows"
    assert order_chosen(documents(4, 8), documents(4, 8, system=32)) == "prefix in windows"
    assert order_chosen(documents(64, 1)) == "input"


def test_rows_of_many_small_shards_are_mixed_in_groups_of_few() -> None:
    """Each shard that is begun costs a part at every flush until it is done."""
    prompts = documents(8, 64)
    chunks = [
        chunk_of(prompts[4 * n : 4 * n + 4], np.ones((4, 1), dtype=np.bool_), window=n)
        for n in range(2 * MAX_MIXED_CHUNKS)
    ]
    buffer = plan_buffer(chunks, "auto")
    assert buffer.order == "prefix over windows"
    windows = [item.chunk.window for item in buffer.items()]
    half = len(windows) // 2
    assert max(windows[:half]) < MAX_MIXED_CHUNKS <= min(windows[half:])


def test_auto_does_not_group_by_a_prefix_that_all_rows_have() -> None:
    assert order_chosen(documents(64, 1, system=320)) == "input"
    assert order_chosen(documents(8, 8, system=320)) == "prefix in windows"


def test_a_majority_prefix_does_not_hide_the_others() -> None:
    """A prefix that half of the rows have does not hide what the others share."""
    one_context = [[7] * (10 * PIECE_TOKENS) + [n] for n in range(64)]
    assert order_chosen(one_context) == "input"
    assert order_chosen(one_context + documents(8, 8)) == "prefix in windows"
    assert order_chosen(documents(8, 7) + one_context) == "prefix in windows"


def test_of_groups_and_of_rows_in_a_group_the_longest_comes_first() -> None:
    a, b = [1] * PIECE_TOKENS, [2] * PIECE_TOKENS
    prompts = [[*a, 7], [3], [*b, 7, 7], [*a, 8, 8, 8], [*b, 8], [4, 4]]
    chunk = chunk_of(prompts, np.ones((len(prompts), 1), dtype=np.bool_))
    assert [item.index for item in plan_buffer([chunk], "prefix").items()] == [3, 0, 2, 4, 5, 1]


def test_a_prompt_is_its_rows_tokens() -> None:
    prompts = [[1, 2], [], [3], [4, 5, 6]]
    chunk = chunk_of(prompts, np.ones((4, 1), dtype=np.bool_))
    assert [chunk.prompt(index).tolist() for index in range(4)] == prompts
    assert [chunk.num_prompt_tokens(index) for index in range(4)] == [2, 0, 1, 3]


def test_a_seed_is_of_the_row_and_sample_and_not_of_its_position() -> None:
    identities = [
        (job_seed, shard, row, sample)
        for job_seed in (0, 1)
        for shard in ("a.parquet", "b.parquet")
        for row in range(20)
        for sample in range(3)
    ]
    seeds = [request_seed(*identity) for identity in identities]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [request_seed(*identity) for identity in identities]
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_seeds_are_the_same_in_every_version() -> None:
    """A resume by a later version repeats what an earlier one would have made."""
    assert request_seed(0, "a.parquet", 0, 0) == 8270517533503184748
