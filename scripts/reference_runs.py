#!/usr/bin/env python3
"""Makes tests/reference: short training runs of tiny models by Hugging Face transformers, which tests/oracle.rs must reproduce.

    pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    python scripts/reference_runs.py --out tests/reference [--only llama-tiny] [--check-f64]

The arithmetic that a trainer has to reproduce, with t = 1, 2, ... the step:

    tokens   state = 1234, id = 1234 mod V; again and again: r = splitmix64(state); id = (5 id + 17) mod V if r mod 8 else (r >> 32) mod V
    batch    rows 4 (t - 1) .. 4 t; row n reads tokens[64 n .. 64 n + 64] and must say tokens[64 n + 1 .. 64 n + 65]
    loss     mean cross-entropy over the step's 256 tokens, logits in f32
    clip     g *= min(1, 0.5 / (norm + 1e-6)), norm over all gradients
    AdamW    p -= lr 0.1 p (tensors of two dims only); m += 0.1 (g - m); v = 0.95 v + 0.05 g g
             p -= lr m / (1 - 0.9^t) / (sqrt(v / (1 - 0.95^t)) + 1e-8)
    rate     up to W: 1e-3 t / W; then 1e-4 + 9e-4 (1 + cos(pi (t - 1 - W) / (N - W))) / 2      (N steps in all)

bf16 runs keep f32 weights and moments, and take forward and backward on weights rounded to bf16 in a bf16 model.
--check-f64 writes nothing: it repeats each f32 run in f64 (but for the norms and softmaxes that transformers always takes in
f32) and prints how far apart the two are, which is the least that a tolerance must allow.
"""

import argparse
import copy
import json
import math
import os
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file

ROWS, TIME, CLIP, SEED, TOKEN_SEED = 4, 64, 0.5, 42, 1234
RUNS = [("metrics.jsonl", 5, 2), ("metrics-50.jsonl", 50, 10)]  # file, steps, warm-up steps; tensors are kept of the first

LLAMA = dict(vocab_size=128, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128, rms_norm_eps=1e-5, rope_theta=1e4, initializer_range=0.1, bos_token_id=None, eos_token_id=0)
LLAMA3_ROPE = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
MODELS = {
    "llama-tiny": ("llama", LLAMA),
    "llama-mha-tiny": ("llama", LLAMA | dict(num_key_value_heads=4, rms_norm_eps=1e-6)),
    # A head wider than hidden_size / heads, and a rotary base at which the scaling keeps, blends and divides frequencies.
    "llama32-tiny": ("llama", LLAMA | dict(head_dim=16, max_position_embeddings=1024, rope_theta=5e5, rope_scaling=LLAMA3_ROPE,
                                           tie_word_embeddings=True)),
    "gpt2-tiny": ("gpt2", dict(vocab_size=128, n_positions=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1,
                               resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)),
}
BF16 = ["llama-tiny", "gpt2-tiny"]
NEW_SPELLING = ["llama-mha-tiny"]  # config.json as transformers 5 writes it; the others as the Hub's files of 2023 to 2025


def tokens(count, vocabulary):
    mask, state, token, out = 2**64 - 1, TOKEN_SEED, TOKEN_SEED % vocabulary, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        r = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        r = ((r ^ (r >> 27)) * 0x94D049BB133111EB) & mask
        r ^= r >> 31
        token = (5 * token + 17) % vocabulary if r % 8 else (r >> 32) % vocabulary
        out.append(token)
    return torch.tensor(out)


def new_model(name):
    family, keys = MODELS[name]
    config = transformers.AutoConfig.for_model(family, **copy.deepcopy(keys))
    torch.manual_seed(SEED)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().train()


def learning_rate(step, steps, warmup):
    if step <= warmup:
        return 1e-3 * step / warmup
    return 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (steps - warmup)))


@torch.no_grad()
def adamw(p, m, v, rate, step):
    g = p.grad
    if p.ndim >= 2:
        p.mul_(1 - rate * 0.1)
    m.lerp_(g, 1 - 0.9)
    v.mul_(0.95).addcmul_(g, g, value=1 - 0.95)
    p.addcdiv_(m, (v.sqrt() / math.sqrt(1 - 0.95**step)).add_(1e-8), value=-rate / (1 - 0.9**step))


def gradients(model, narrow, inputs, targets):
    """Leaves d loss / d p in p.grad and returns the loss. `narrow`: a bf16 copy of the model, or None."""
    runner = narrow or model
    if narrow:
        for p, q in zip(model.parameters(), narrow.parameters()):
            q.data.copy_(p.data)
    runner.zero_grad(set_to_none=True)
    logits = runner(input_ids=inputs, use_cache=False).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    if narrow:
        for p, q in zip(model.parameters(), narrow.parameters()):
            p.grad = q.grad.float()
    return loss.item()


def train(model, steps, warmup, narrow=None):
    """Returns the lines of metrics and, by parameter name, the first step's gradients, the last weights and both moments."""
    named = dict(model.named_parameters())
    m, v = ({name: torch.zeros_like(p) for name, p in named.items()} for _ in range(2))
    stream = tokens(steps * ROWS * TIME + 1, model.config.vocab_size)
    lines, first = [], None
    for step in range(1, steps + 1):
        at = (step - 1) * ROWS * TIME
        inputs, targets = (stream[at + shift : at + shift + ROWS * TIME].view(ROWS, TIME) for shift in (0, 1))
        loss = gradients(model, narrow, inputs, targets)
        first = first or {name: p.grad.clone() for name, p in named.items()}
        norm = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in named.values()))
        scale = min(1.0, CLIP / (norm + 1e-6))
        rate = learning_rate(step, steps, warmup)
        for name, p in named.items():
            if scale < 1:
                p.grad.mul_(scale)
            adamw(p, m[name], v[name], rate, step)
        lines.append(dict(step=step, loss=loss, lr=rate, grad_norm=norm, tokens=step * ROWS * TIME))
    return lines, first, {name: p.detach() for name, p in named.items()}, m, v


def public(model, tensors):
    """The tensors under the names, and in the orientation, of a checkpoint on the Hub."""
    twin = copy.deepcopy(model)
    for name, p in twin.named_parameters():
        p.data.copy_(tensors[name])
    with tempfile.TemporaryDirectory() as folder:
        twin.save_pretrained(folder)
        return {name: t.float().clone() for name, t in load_file(f"{folder}/model.safetensors").items()}


def save(tensors, path):
    save_file(tensors, path, {"format": "pt"})


def config_json(model, name):
    keys = json.loads(model.config.to_json_string(use_diff=False)) | dict(transformers_version=transformers.__version__)
    keys = {k: v for k, v in keys.items() if k in MODELS[name][1] or k in
            ("model_type", "rope_parameters", "dtype", "tie_word_embeddings", "hidden_act", "activation_function", "attention_bias",
             "mlp_bias", "layer_norm_epsilon", "head_dim", "n_inner", "transformers_version")}
    keys |= dict(architectures=[type(model).__name__], dtype="float32")
    if name not in NEW_SPELLING:
        keys["torch_dtype"] = keys.pop("dtype")
        keys["transformers_version"] = "4.51.0"
        if rope := keys.pop("rope_parameters", None):
            keys["rope_theta"] = rope.pop("rope_theta")
            keys["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return json.dumps(keys, indent=2, sort_keys=True) + "\n"


def write(name, out):
    folder = f"{out}/{name}"
    os.makedirs(f"{folder}/init", exist_ok=True)
    model = new_model(name)
    save(public(model, dict(model.named_parameters())), f"{folder}/init/model.safetensors")
    with open(f"{folder}/init/config.json", "w") as file:
        file.write(config_json(model, name))
    for precision in ["f32"] + ["bf16"] * (name in BF16):
        os.makedirs(f"{folder}/{precision}", exist_ok=True)
        for file_name, steps, warmup in RUNS if precision == "f32" else RUNS[:1]:
            model = new_model(name)
            narrow = copy.deepcopy(model).bfloat16() if precision == "bf16" else None
            lines, first, weights, m, v = train(model, steps, warmup, narrow)
            with open(f"{folder}/{precision}/{file_name}", "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            print(name, precision, f"{steps} steps: loss {lines[0]['loss']:.6f} -> {lines[-1]['loss']:.6f}")
            if file_name == RUNS[0][0]:
                save(public(model, first), f"{folder}/{precision}/gradients.safetensors")
                save(public(model, weights), f"{folder}/{precision}/weights.safetensors")
                moments = [("exp_avg", m), ("exp_avg_sq", v)]
                named = {f"{kind}.{k}": t for kind, d in moments for k, t in public(model, d).items()}
                save(named, f"{folder}/{precision}/moments.safetensors")


def check_f64(name):
    for _, steps, warmup in RUNS:
        a, b = train(new_model(name), steps, warmup), train(new_model(name).double(), steps, warmup)
        loss = max(abs(x["loss"] - y["loss"]) for x, y in zip(a[0], b[0]))
        norm = max(abs(x["grad_norm"] / y["grad_norm"] - 1) for x, y in zip(a[0], b[0]))
        worst = [max(((x[k].double() - y[k]).norm() / y[k].norm()).item() for k in y if "attn.c_attn.bias" not in k)
                 for x, y in zip(a[1:], b[1:])]
        print(name, f"{steps} steps, f32 from f64: loss {loss:.1e}, norm {norm:.1e}, gradients, weights, moments",
              ", ".join(f"{x:.1e}" for x in worst))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="tests/reference")
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--check-f64", action="store_true")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    for name in [options.only] if options.only else MODELS:
        if options.check_f64:
            check_f64(name)
        else:
            write(name, options.out)


if __name__ == "__main__":
    main()
