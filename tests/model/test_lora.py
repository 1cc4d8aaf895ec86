"""`model.lora`: what is refused before loading, what the digest holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from batchinfer.errors import ConfigError
from batchinfer.model.lora import check_beside
from batchinfer.quantization import Machine
from tests.support.adapters import write_adapter
from tests.support.headers import Header, change_header
from tests.support.jobs import MODEL
from tests.support.models import read_model


def with_lora(folder: Path | str) -> Any:
    return read_model(str(MODEL), lora=str(folder))


def test_an_adapters_rank_is_its_largest_and_its_content_is_in_the_digest(tmp_path: Path) -> None:
    facts = with_lora(write_adapter(tmp_path / "a", scale=0.1, rank_pattern={"q_proj": 24}))
    assert (facts.lora.rank, facts.lora.num_layers) == (24, 12)
    assert facts.lora.modules == ("down_proj", "q_proj")
    copy = shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert with_lora(copy).digest == facts.digest
    other = with_lora(write_adapter(tmp_path / "b", scale=0.2, rank_pattern={"q_proj": 24}))
    changed = {name for name in facts.digest if facts.digest[name] != other.digest[name]}
    assert changed == {"lora/adapter_model.safetensors"}
    assert facts.digest.keys() - read_model(str(MODEL)).digest.keys() == {
        "lora/adapter_config.json",
        "lora/adapter_model.safetensors",
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3 is not a LoRA adapter"),
        ({"use_dora": True}, "cannot run an adapter with use_dora True: merge it"),
        ({"bias": "all"}, "with bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "with modules_to_save"),
        ({"init_lora_weights": "pissa"}, "with init_lora_weights 'pissa'"),
        ({"r": 0}, "r and rank_pattern must be whole numbers"),
        ({"r": None}, "r and rank_pattern must be whole numbers"),
        ({"rank_pattern": {"q_proj": 600}}, "rank 600 is above vLLM's 512"),
        ({"target_modules": None}, "has no target_modules"),
        ({"lora_alpha": None}, "has no lora_alpha"),
        ({"num_layers": 8}, r"changes model\.layers\.6\.mlp\.down_proj, which the model does"),
        ({"num_layers": 0}, "holds no LoRA weights"),
    ],
)
def test_an_adapter_that_vllm_cannot_run_or_of_another_model_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    rank = {"r": changes.pop("r")} if "r" in changes else {}
    folder = write_adapter(tmp_path / "a", scale=0.1, **changes)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | rank))
    with pytest.raises(ConfigError, match=words) as caught:
        with_lora(folder)
    assert str(folder) in str(caught.value)


def test_another_engine_says_itself_which_adapters_it_runs(tmp_path: Path) -> None:
    """That for tests runs any, of any rank."""
    folder = write_adapter(tmp_path / "a", scale=0.1, use_dora=True, rank_pattern={"q_proj": 600})
    machine = Machine("cpu", engine="batchinfer.testing")
    assert read_model(str(MODEL), machine=machine, lora=str(folder)).lora is not None


def test_an_adapter_of_a_wider_model_is_refused_with_both_sizes(tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))

    def change(header: Header) -> None:
        header["model.layers.1.mlp.down_proj.weight"]["shape"] = [128, 2048]

    change_header(model / "model.safetensors", change)
    with pytest.raises(ConfigError, match=r"down_proj of 256 x 1024, the model's has 128 x 2048"):
        read_model(str(model), lora=str(write_adapter(tmp_path / "a", scale=0.1)))


def test_an_adapter_beside_int8_is_refused_on_a_cpu_and_not_beside_int4() -> None:
    check_beside("int8", Machine("cuda", engine="vllm"))
    for name in ("none", "int4", "nf4", "torchao"):
        check_beside(name, Machine("cpu", engine="vllm"))
    with pytest.raises(ConfigError, match="cannot run here with quantization int8: vLLM's CPU"):
        check_beside("int8", Machine("cpu", engine="vllm"))


def test_a_part_of_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", scale=0.1)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match="save the adapter as safetensors"):
        with_lora(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"adapter_config\.json is missing"):
        with_lora(folder)
    with pytest.raises(ConfigError, match=r"model\.lora: there is no folder"):
        with_lora(tmp_path / "nothing")
    torn = write_adapter(tmp_path / "torn", scale=0.1) / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:5000])
    with pytest.raises(ConfigError, match="truncated"):
        with_lora(torn.parent)
