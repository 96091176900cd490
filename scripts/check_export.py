#!/usr/bin/env python3
"""Holds an exported model to Hugging Face transformers: it must load there and go on with a text as ferrotron itself does.

    pip install torch transformers safetensors
    ferrotron checkpoint export runs/quickstart/checkpoints/step-00000900 exported --dtype f32
    python scripts/check_export.py exported --prompt "pub fn "

The model is loaded by AutoModelForCausalLM from `exported`, and continues the prompt by `--tokens` greedy steps, in f32. ferrotron does
the same by `generate --temperature 0` from the same folder and, with --from, from the checkpoint that it was exported of. The bytes
must be equal. Where they part, the two likeliest tokens and their logits are printed: a tie within rounding is no error of the export.
Only for models of bytes (data.tokenizer = "bytes"), whose vocabulary has 256 bytes and an end of text.
"""

import argparse
import subprocess
import sys

import torch
import transformers

END_OF_TEXT = 256


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported", help="folder that `ferrotron checkpoint export` wrote")
    parser.add_argument("--from", dest="checkpoint", help="the checkpoint it was exported of")
    parser.add_argument("--prompt", default="pub fn ")
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--program", default="target/release/ferrotron")
    options = parser.parse_args()
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(options.exported, dtype=torch.float32, output_loading_info=True)
    problems = {key: names for key, names in loading.items() if names}
    if problems:
        sys.exit(f"{options.exported} does not fit its own config.json: {problems}")
    text, margins = continued(model.eval(), options.prompt.encode(), options.tokens)
    print(f"transformers {transformers.__version__}: {text!r}")
    equal = True
    for folder in filter(None, (options.exported, options.checkpoint)):
        command = [options.program, "generate", "--from", folder, "--prompt", options.prompt, "--tokens", str(options.tokens),
                   "--temperature", "0"]
        ours = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.removesuffix(b"\n")
        print(f"ferrotron, from {folder}: {'the same' if ours == text else repr(ours)}")
        if ours != text:
            equal = False
            at = next((i for i, (a, b) in enumerate(zip(ours, text)) if a != b), min(len(ours), len(text)))
            print(f"  they part at byte {at}; transformers' two likeliest there: {margins.get(at, 'it had ended')}")
    least = min(margins.values(), key=lambda two: two[0][1] - two[1][1])
    print(f"closest choice on the way: {least}")
    sys.exit(0 if equal else 1)


def continued(model, prompt, count):
    """The prompt and its greedy continuation, and for each place the two likeliest tokens with their logits."""
    text, margins = list(prompt), {}
    with torch.no_grad():
        for _ in range(count):
            window = text[-model.config.max_position_embeddings:]
            top = model(torch.tensor([window])).logits[0, -1].double().topk(2)
            margins[len(text)] = [(token, round(logit, 6)) for token, logit in zip(top.indices.tolist(), top.values.tolist())]
            token = top.indices[0].item()
            if token == END_OF_TEXT:
                break
            text.append(token)
    return bytes(text), margins


if __name__ == "__main__":
    main()
