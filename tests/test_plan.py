"""Every row is admitted exactly once, in an order that depends on the rows alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.errors import RowError
from batchinfer.plan import Chunk, find_duplicates, order_rows, seed_of

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
    order: str = "length",
    deduplicate: bool = False,
) -> Chunk:
    token_ids, offsets = flat([[] if i in failed else p for i, p in enumerate(prompts)])
    return Chunk(
        shard="a.parquet",
        window=0,
        rows=np.arange(len(prompts), dtype=np.int64) * 3 + 5,
        token_ids=token_ids,
        offsets=offsets,
        carried=pa.table({"id": pa.array(range(len(prompts)), pa.int64())}),
        errors={index: RowError("empty_prompt", "no tokens") for index in failed},
        is_todo=is_todo,
        order=order,
        deduplicate=deduplicate,
    )


@given(st.lists(st.integers(0, 10_000)), st.sampled_from(["length", "input"]))
def test_an_order_is_a_permutation(lengths: list[int], order: str) -> None:
    ordered = order_rows(np.array(lengths, dtype=np.int64), order)
    assert sorted(ordered.tolist()) == list(range(len(lengths)))
    if order == "input":
        assert ordered.tolist() == sorted(ordered.tolist())


@given(st.lists(st.integers(0, 5)))
def test_the_longest_come_first_and_ties_keep_the_order_of_the_file(lengths: list[int]) -> None:
    ordered = order_rows(np.array(lengths, dtype=np.int64), "length").tolist()
    assert ordered == sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


@given(prompts_of_few_tokens)
def test_a_duplicate_names_the_first_row_of_the_same_prompt(prompts: list[list[int]]) -> None:
    leader = find_duplicates(*flat(prompts)).tolist()
    for row, prompt in enumerate(prompts):
        first = prompts.index(prompt)
        assert leader[row] == (first if prompt and first != row else -1)


def test_prompts_of_the_same_bytes_split_elsewhere_are_no_duplicates() -> None:
    assert find_duplicates(*flat([[1, 2], [3], [1], [2, 3], [1, 2]])).tolist() == [-1] * 4 + [0]


@given(
    prompts=prompts_of_few_tokens.filter(bool),
    num_samples=st.integers(1, 3),
    order=st.sampled_from(["length", "input"]),
    deduplicate=st.booleans(),
    data=st.data(),
)
def test_work_is_every_row_and_sample_to_do_once_less_errors_and_followers(
    prompts: list[list[int]],
    num_samples: int,
    order: str,
    deduplicate: bool,
    data: st.DataObject,
) -> None:
    num_rows = len(prompts)
    todo = data.draw(
        st.lists(st.booleans(), min_size=num_rows * num_samples, max_size=num_rows * num_samples)
    )
    is_todo = np.array(todo, dtype=np.bool_).reshape(num_rows, num_samples)
    failed = data.draw(st.sets(st.integers(0, num_rows - 1)))
    chunk = chunk_of(prompts, is_todo, failed=failed, order=order, deduplicate=deduplicate)

    items = [(item.index, item.sample) for item in chunk.work()]

    followers = [f for found in chunk.followers.values() for f in found]
    assert len(followers) == len(set(followers))
    assert not set(followers) & (failed | chunk.followers.keys())
    for leader, found in chunk.followers.items():
        assert all(prompts[f] == prompts[leader] for f in found)
        assert all(leader < f for f in found)
    if not deduplicate:
        assert followers == []
    due = {
        (index, sample)
        for index in range(num_rows)
        for sample in range(num_samples)
        if is_todo[index, sample] and index not in failed and index not in followers
    }
    assert Counter(items) == Counter(due)
    rows_in_order = list(dict.fromkeys(index for index, _ in items))
    assert items == [(i, s) for i in rows_in_order for s in range(num_samples) if (i, s) in due]
    lengths = [chunk.num_prompt_tokens(index) for index in rows_in_order]
    assert lengths == sorted(lengths, reverse=True) or order == "input"


def test_a_prompt_is_its_rows_tokens() -> None:
    prompts = [[1, 2], [], [3], [4, 5, 6]]
    chunk = chunk_of(prompts, np.ones((4, 1), dtype=np.bool_))
    assert [chunk.prompt(index).tolist() for index in range(4)] == prompts
    assert [chunk.num_prompt_tokens(index) for index in range(4)] == [2, 0, 1, 3]


def test_an_unknown_order_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        order_rows(np.array([1], dtype=np.int64), "random")


def test_a_seed_is_of_the_row_and_sample_and_not_of_its_position() -> None:
    identities = [
        (job_seed, shard, row, sample)
        for job_seed in (0, 1)
        for shard in ("a.parquet", "b.parquet")
        for row in range(20)
        for sample in range(3)
    ]
    seeds = [seed_of(*identity) for identity in identities]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [seed_of(*identity) for identity in identities]
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_seeds_are_the_same_in_every_version() -> None:
    """A resume by a later version repeats what an earlier one would have made."""
    assert seed_of(0, "a.parquet", 0, 0) == 8270517533503184748
