"""An exported directory in plain transformers: `python -I reload.py MODEL DTYPE IN OUT`. Imports nothing of ftdist.

Reads `input_ids` (1, L) from the safetensors file IN; writes the logits (L, V) in float32 to OUT and prints, as JSON,
what it greedily goes on with.
"""

import json
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main(directory: str, dtype: str, given: str, output: str) -> None:
    """Load, run, answer."""
    logging.disable_progress_bar()
    trust = "--trust-remote-code" in sys.argv
    ids = load_file(given)["input_ids"]
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), trust_remote_code=trust, local_files_only=True
    ).eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        prompt = ids[:, : max(1, ids.shape[1] // 2)]
        answer = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )[0, prompt.shape[1] :]
    save_file({"logits": logits.contiguous()}, output)
    print(json.dumps({"tokens": len(answer), "text": tokenizer.decode(answer)}))


if __name__ == "__main__":
    main(*sys.argv[1:5])
