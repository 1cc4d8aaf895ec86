"""What rounding to nearest and qtip cost the demo model on held-out rows, without an engine.

    python -m benchmarks.trellis_quality [FOLDER ...]

FOLDERs are checkpoints of `batchinfer quantize jobs/demo/model FOLDER --method qtip ...`; calibrate
with at most 512 rows, as the last 256 are scored here. Each checkpoint's weights are decoded into a
float32 copy of the model: mean negative log-likelihood of the tokens of reference summaries and of
all tokens, and KL divergence from the unquantized model on all of them. Minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

from batchinfer.quantization.methods.qtip.dense import Coded, dense
from batchinfer.quantization.methods.qtip.files import format_of, layers_of
from benchmarks.common import DEMO, heading

NUM_ROWS = 256
#: Rounded to nearest: bits, weights that share a scale.
ROUNDED = ((4, 128), (3, 128), (3, 32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="*", type=Path)
    arguments = parser.parse_args()
    plain = Scored({})
    click.echo(f"{heading()}; {plain.num_summary_tokens:,} and {plain.num_tokens:,} tokens\n")
    click.echo("| weights | NLL, summaries | NLL, all | KL from bf16 |\n|---|---|---|---|")
    click.echo(plain.row("bf16", plain))
    for num_bits, group in ROUNDED:
        found = Scored(dict(rounded(plain.model, num_bits, group)))
        click.echo(found.row(f"int{num_bits} in groups of {group}, to nearest", plain))
    for folder in arguments.folders:
        click.echo(Scored(dict(decoded(folder))).row(str(folder), plain))


class Scored:
    """The demo model with other weights, and its log-probabilities on the held-out rows."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
        self.model.eval()
        for name, weight in weights.items():
            self.model.get_submodule(name).weight.data.copy_(weight)
        self._summaries: list[Tensor] = []
        self._all: list[Tensor] = []
        self._logprobs: list[Tensor] = []
        with torch.inference_mode():
            for tokens, num_prompt in held_out():
                logprobs = self.model(tokens[None]).logits[0, :-1].log_softmax(-1)
                of_tokens = -logprobs.gather(1, tokens[1:, None])[:, 0]
                self._all.append(of_tokens)
                self._summaries.append(of_tokens[num_prompt - 1 :])
                self._logprobs.append(logprobs.half())

    @property
    def num_summary_tokens(self) -> int:
        return sum(map(len, self._summaries))

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self._all))

    def row(self, label: str, plain: Scored) -> str:
        pairs = zip(plain._logprobs, self._logprobs, strict=True)
        total = sum(float((p.float().exp() * (p.float() - q.float())).sum()) for p, q in pairs)
        summaries, tokens = torch.cat(self._summaries).mean(), torch.cat(self._all).mean()
        return f"| {label} | {summaries:.4f} | {tokens:.4f} | {total / self.num_tokens:.4f} |"


def held_out() -> Iterator[tuple[Tensor, int]]:
    """Token ids of a row, and how many of them are its prompt's."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    table = pq.read_table(DEMO / "prompts")
    rows = table.slice(len(table) - NUM_ROWS).to_pylist()
    for row in rows:
        prompt = (
            "<|im_start|>user\nSummarize this software package in one line.\n\n"
            f"{row['description']}<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        answer = f"{row['reference_summary']}<|im_end|>"
        more = tokenizer.encode(answer, add_special_tokens=False).ids
        yield torch.tensor(ids + more), len(ids)


def rounded(model: Any, num_bits: int, group: int) -> Iterator[tuple[str, Tensor]]:
    """Symmetric integers, a scale for each group of neighbouring inputs."""
    highest = 2 ** (num_bits - 1)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            groups = module.weight.data.unflatten(1, (-1, group))
            scale = groups.abs().amax(2, keepdim=True) / (highest - 0.5)
            yield name, ((groups / scale).round().clamp(-highest, highest - 1) * scale).flatten(1)


def decoded(folder: Path) -> Iterator[tuple[str, Tensor]]:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    for name, parts in layers_of(load_file(folder / "model.safetensors")).items():
        code = format_of(settings, name, parts).code
        yield (
            name,
            dense(Coded(parts["trellis"], parts["suh"], parts["svh"], code, parts.get("tlut"))),
        )


if __name__ == "__main__":
    main()
