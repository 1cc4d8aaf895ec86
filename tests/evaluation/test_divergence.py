"""KL divergence from likeliest tokens, and measurements beside a reference's output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.errors import ConfigError
from batchinfer.evaluation.divergence import Tops, kl_divergence, top1_agrees
from batchinfer.evaluation.pair import pair
from batchinfer.evaluation.perplexity import measure
from batchinfer.testing.demands import completion
from tests.evaluation.test_perplexity import request
from tests.support.jobs import MODEL

Floats = npt.NDArray[np.float64]


def tops(logprobs: Floats, scored: npt.NDArray[np.int32], k: int) -> Tops:
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, :k].astype(np.int32)
    top = np.take_along_axis(logprobs, order, axis=1).astype(np.float32)
    return Tops(order, top, logprobs[np.arange(len(scored)), scored].astype(np.float32))


def distributions(seed: int, num_rows: int, vocabulary: int, away: float) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (num_rows, vocabulary))
    others = logits + away * rng.normal(0, 1, logits.shape)
    return tuple(x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (logits, others))


@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 12), away=st.floats(0, 3))
def test_it_is_never_more_than_the_true_divergence_and_with_all_tokens_equal_to_it(
    seed: int, k: int, away: float
) -> None:
    vocabulary = 12
    log_p, log_q = distributions(seed, 5, vocabulary, away)
    scored = np.random.default_rng(seed).integers(0, vocabulary, 5).astype(np.int32)
    true = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    found = kl_divergence(scored, tops(log_p, scored, k), tops(log_q, scored, k))
    assert (found >= 0).all()
    assert (found <= true + 1e-5).all()
    if k == vocabulary:
        np.testing.assert_allclose(found, true, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_a_token_that_one_model_rules_out_is_in_the_rest() -> None:
    """As a mask or a padded vocabulary does. In the true divergence it is infinite, or nothing."""
    log_p = np.log(np.array([[0.5, 0.3, 0.2]]))
    with np.errstate(divide="ignore"):
        masked = np.log(np.array([[0.6, 0.4, 0.0]]))
    scored = np.zeros(1, np.int32)
    full, cut = tops(log_p, scored, 3), tops(masked, scored, 3)
    assert 0 < kl_divergence(scored, full, cut)[0] < 10
    (found,) = kl_divergence(scored, cut, full)
    assert found == pytest.approx(0.6 * np.log(0.6 / 0.5) + 0.4 * np.log(0.4 / 0.3), abs=1e-4)
    assert kl_divergence(scored, cut, cut)[0] == pytest.approx(0, abs=1e-6)


def test_more_tokens_bring_it_nearer_to_the_truth() -> None:
    log_p, log_q = distributions(0, 400, 1000, 0.5)
    scored = np.zeros(400, np.int32)
    true = (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
    found = [
        kl_divergence(scored, tops(log_p, scored, k), tops(log_q, scored, k)).mean()
        for k in (1, 5, 20, 100)
    ]
    assert found == sorted(found)
    assert found[-1] > 0.9 * true


def test_a_token_that_only_one_model_lists_counts_if_it_was_scored() -> None:
    """Both know the scored token's own logprob."""
    log_p = np.log([[0.7, 0.2, 0.05, 0.05]])
    log_q = np.log([[0.7, 0.05, 0.2, 0.05]])
    scored = np.array([1], np.int32)
    found = kl_divergence(scored, tops(log_p, scored, 2), tops(log_q, scored, 2))
    wanted = 0.2 * np.log(0.2 / 0.05) + 0.1 * np.log(0.1 / 0.25)
    assert found == pytest.approx([wanted], rel=1e-5)


def test_models_agree_where_their_likeliest_tokens_are_the_same() -> None:
    log_p, log_q = distributions(1, 200, 50, 1.0)
    scored = np.zeros(200, np.int32)
    agrees = top1_agrees(tops(log_p, scored, 3), tops(log_q, scored, 3))
    assert agrees.tolist() == (log_p.argmax(1) == log_q.argmax(1)).tolist()
    assert 0 < agrees.mean() < 1


@pytest.mark.usefixtures("fake")
def test_a_model_is_at_no_distance_from_itself_and_at_some_from_another(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "reference"
    first = measure(request(text, top_k=4), work=work)
    assert first.kl is None
    again = measure(request(text, reference=str(work)), work=tmp_path / "again")
    assert (again.kl, again.kl_top_k, again.top1_agreement) == (0, 4, 1)
    assert again.nll == first.nll
    made = completion.prompt_tops

    def shifted(token_ids: Any, k: int) -> Any:
        ids, logprobs = made(token_ids, k)
        return np.where(ids >= 0, (ids + 1) % 4096, -1).astype(np.int32), logprobs

    monkeypatch.setattr(completion, "prompt_tops", shifted)
    other = measure(request(text, reference=str(work / "output"), top_k=3), work=tmp_path / "other")
    assert other.kl and other.kl > 0
    assert (other.kl_top_k, other.top1_agreement) == (3, 0)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"stride": 5}, "it is of another text, context, stride or number of windows"),
        ({"max_rows": 3}, "number of windows"),
    ],
)
def test_a_reference_of_other_windows_is_refused(
    changes: dict[str, Any], problem: str, text: Path, tmp_path: Path
) -> None:
    measure(request(text, top_k=4), work=tmp_path / "reference")
    asked = request(text, reference=str(tmp_path / "reference"), **changes)
    with pytest.raises(ConfigError, match=problem):
        measure(asked, work=tmp_path / "work")
    assert not (tmp_path / "work/output").exists()


@pytest.mark.usefixtures("fake")
def test_a_reference_without_likeliest_tokens_is_refused(text: Path, tmp_path: Path) -> None:
    measure(request(text), work=tmp_path / "reference")
    with pytest.raises(ConfigError, match="has no likeliest tokens to compare"):
        measure(request(text, reference=str(tmp_path / "reference")), work=tmp_path / "work")


@pytest.mark.usefixtures("fake")
def test_a_reference_with_another_tokenizer_is_refused(text: Path, tmp_path: Path) -> None:
    """Perplexities of other tokens do not compare."""
    measure(request(text, top_k=4), work=tmp_path / "reference")
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    asked = request(text, model=str(model), reference=str(tmp_path / "reference"))
    with pytest.raises(ConfigError, match="has another tokenizer than"):
        measure(asked, work=tmp_path / "work")


def with_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """A copy of the demo model, and of its tokenizer with a change."""
    model = Path(shutil.copytree(MODEL, folder))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    change(tokenizer)
    (model / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))
    return str(model)


def swap_rare_tokens(tokenizer: dict[str, Any]) -> None:
    """Two that no text here has."""
    vocabulary = tokenizer["model"]["vocab"]
    names = {number: name for name, number in vocabulary.items()}
    vocabulary[names[3000]], vocabulary[names[3001]] = 3001, 3000


def write_it_otherwise(tokenizer: dict[str, Any]) -> None:
    """As another version of the library does; and what pads and cuts is of no account."""
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [
        m.split(" ") if isinstance(m, str) else " ".join(m) for m in merges
    ]
    tokenizer["model"] = {**dict(reversed(tokenizer["model"].items())), "ignore_merges": False}
    tokenizer["truncation"] = None


@pytest.mark.usefixtures("fake")
def test_tokenizers_are_one_if_they_make_the_same_tokens(
    text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the scored text would not show that they are two."""
    measure(request(text, top_k=4), work=tmp_path / "reference")
    changed = with_tokenizer(tmp_path / "swapped", swap_rare_tokens)
    asked = request(text, model=changed, top_k=4)
    with pytest.raises(ConfigError, match="has another tokenizer than"):
        of_it = asked.model_copy(update={"reference": str(tmp_path / "reference")})
        measure(of_it, work=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    measure(asked, work=tmp_path / "other")
    with pytest.raises(ConfigError, match="has another tokenizer than"):
        pair(str(tmp_path / "reference"), str(tmp_path / "other"))

    same = with_tokenizer(tmp_path / "same", write_it_otherwise)
    (Path(same) / "chat_template.jinja").write_text("another")
    asked = request(text, model=same, top_k=4, reference=str(tmp_path / "reference"))
    assert measure(asked, work=tmp_path / "fine").kl == 0
    assert pair(str(tmp_path / "reference"), str(tmp_path / "fine")).scored
    assert not [r for r in caplog.records if "tokenizer" in r.message]
    shutil.rmtree(same)
    pair(str(tmp_path / "reference"), str(tmp_path / "fine"))
    assert any("if it has other tokens" in r.message for r in caplog.records)


@pytest.mark.usefixtures("fake")
def test_a_reference_with_another_vocabulary_is_refused(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = completion.prompt_tops

    def past_the_vocabulary(token_ids: Any, k: int) -> Any:
        ids, logprobs = made(token_ids, k)
        return np.where(ids < 0, -1, 4096).astype(np.int32), logprobs

    monkeypatch.setattr(completion, "prompt_tops", past_the_vocabulary)
    measure(request(text, top_k=1), work=tmp_path / "reference")
    with pytest.raises(ConfigError, match="different vocabularies cannot be compared"):
        measure(request(text, reference=str(tmp_path / "reference")), work=tmp_path / "work")
