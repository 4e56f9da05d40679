"""The simplest peer: Hugging Face transformers with static batches and no server.

    python -m bench.transformers_static MODEL_DIR --concurrency 1,8,16

Prompts, lengths and reported numbers are those of ``bench.serve --ignore-eos``. A batch starts when the previous one
has ended, so all its requests have the same arrival times. Needs the package's `convert` extra.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from bench import machine
from bench.measures import Objectives, summary
from bench.prompts import word_prompts
from bench.serve import header, row
from bench.stream import Outcome, Usage


class StepClock(StoppingCriteria):
    """A stopping criterion that never stops and records the time of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times.append(perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Static:
    """A model and its tokenizer; answers one batch at a time."""

    def __init__(self, path: Path, dtype: str, device: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self.model = model.to(device).eval()

    def prompts(self, count: int, words: int, seed: int) -> list[str]:
        """Return `count` prompts, rendered by the chat template."""
        return [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in word_prompts(count, words, seed=seed)
        ]

    @torch.inference_mode()
    def answer(self, prompts: Sequence[str], output_tokens: int, first: int) -> list[Outcome]:
        """Generate `output_tokens` tokens for each prompt, greedily. Outcomes are numbered from `first`."""
        sent = perf_counter()
        batch = self.tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=False)
        clock = StepClock()
        self.model.generate(
            **batch.to(self.model.device),
            do_sample=False,
            min_new_tokens=output_tokens,
            max_new_tokens=output_tokens,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        return [
            Outcome(
                first + i, sent=sent, arrivals=clock.times, ended=clock.times[-1], finish="length",
                usage=Usage(n, len(clock.times)),
            )
            for i, n in enumerate(lengths)
        ]  # fmt: skip


def measure(static: Static, concurrency: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run `args.requests` requests in batches of `concurrency` and return the summary."""
    count = args.requests or max(16, 4 * concurrency)
    prompts = static.prompts(count, args.prompt_words, args.seed + concurrency)
    outcomes: list[Outcome] = []
    start, cpu = perf_counter(), process_time()
    for at in range(0, count, concurrency):
        outcomes += static.answer(prompts[at : at + concurrency], args.output_tokens, at)
    seconds, cpu = perf_counter() - start, process_time() - cpu
    found = summary(outcomes, seconds=seconds, cpu_seconds=cpu, objectives=Objectives())
    return {"label": "static", "load": f"batches of {concurrency}", **found}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = argparse.ArgumentParser(prog="python -m bench.transformers_static", description=__doc__.split("\n")[0])
    p.add_argument("model", type=Path, help="a Hugging Face model directory")
    p.add_argument("--concurrency", type=lambda s: [int(n) for n in s.split(",")], default=[1, 8, 16])
    p.add_argument("--requests", type=int, default=0, help="in each run; default: four times the batch, at least 16")
    p.add_argument("--prompt-words", type=int, default=100)
    p.add_argument("--output-tokens", type=int, default=64)
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", type=Path, metavar="FILE")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Return exit status 0."""
    args = parser().parse_args(argv)
    found: dict[str, Any] = {"machine": machine.describe(), "runs": []}
    static = Static(args.model, args.dtype, args.device)
    static.answer(static.prompts(2, args.prompt_words, args.seed), 4, 0)
    print(header())
    for concurrency in args.concurrency:
        result = measure(static, concurrency, args)
        found["runs"].append({**result, "round": 0})
        print(row(result), flush=True)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("model", "json")}
        args.json.write_text(json.dumps({**found, "settings": settings}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
