"""What transformers and PEFT compute with an exported folder, as JSON.

It imports nothing of this project, so that it also runs in an environment with another
transformers. `python transformers_runs.py CALLS OUTPUT` reads calls, as names of
functions below with their arguments, and writes their answers.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    logging,
)

GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "pad_token_id": 0}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def version():
    return transformers.__version__


@torch.inference_mode()
def logits(folder, rows, positions=None):
    kept = slice(None) if positions is None else positions
    return load(folder)(torch.tensor(rows)).logits[:, kept].tolist()


def shapes(folder):
    """The shapes of all tensors, without their weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    return {name: list(tensor.shape) for name, tensor in model.named_parameters()}


@torch.inference_mode()
def read(folder, prompt, num_tokens):
    """Greedy continuations by every kind of cache, and what else `forward` returns."""
    model = load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"]
    whole = model(**inputs, use_cache=False).logits
    outputs = model(ids[:, :-3], output_hidden_states=True)
    past = outputs["cache"] if "cache" in outputs else outputs["past_key_values"]
    name = "cache" if "cache" in outputs else "past_key_values"
    parts = [outputs.logits, model(ids[:, -3:], **{name: past}).logits]
    eager = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, attn_implementation="eager"
    ).eval()

    def differ(other):
        return float((other - whole).abs().max())

    def written(**options):
        made = model.generate(**inputs, max_new_tokens=num_tokens, **GREEDY, **options)
        return made[0, ids.shape[1] :].tolist()

    return {
        "ids": ids[0].tolist(),
        "dtype": str(model.dtype),
        "tied": model.lm_head.weight is model.get_input_embeddings().weight,
        "states": len(outputs.hidden_states),
        "tuple": isinstance(model(ids, return_dict=False), tuple),
        "in parts": differ(torch.cat(parts, dim=1)),
        "eager": differ(eager(**inputs).logits),
        "embeddings": differ(
            model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        ),
        "last": differ(
            torch.cat([whole[:, :-1], model(ids, logits_to_keep=1).logits], dim=1)
        ),
        "cached": written(),
        "uncached": written(use_cache=False),
        "static": written(cache_implementation="static"),
    }


@torch.inference_mode()
def chat(folder, messages, num_tokens):
    """The ids of a conversation by the stored template, and the greedy answer."""
    model = load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    made = model.generate(ids, max_new_tokens=num_tokens, **GREEDY)
    return {"ids": ids[0].tolist(), "answer": made[0, ids.shape[1] :].tolist()}


@torch.inference_mode()
def pad(folder, prompts, num_tokens):
    """Greedy continuations of prompts of unequal lengths, in one padded batch."""
    model, tokenizer = (
        load(folder),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
    )
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    made = model.generate(**batch, max_new_tokens=num_tokens, **GREEDY)
    return {
        "padding": (batch["attention_mask"] == 0).sum(1).tolist(),
        "written": made[:, batch["input_ids"].shape[1] :].tolist(),
    }


@torch.inference_mode()
def search(folder, ids, num_tokens):
    """The best beam of four and its log-probability, with and without a cache."""
    model, found = load(folder), {}
    for use_cache in (True, False):
        beams = model.generate(
            torch.tensor([ids]),
            max_new_tokens=num_tokens,
            num_beams=4,
            length_penalty=0.0,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_scores=True,
            **GREEDY,
        )
        found[f"cache {use_cache}"] = beams.sequences[0].tolist()
        found[f"score {use_cache}"] = beams.sequences_scores[0].item()
    return found


def save(folder, target, rows=None):
    """Save a loaded model; with `rows`, after a change of the embedding's size."""
    model = load(folder)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(
        target
    )
    return sorted(path.name for path in Path(target).iterdir())


def train(folder, target, rows, gradient_checkpointing=False):
    """Two steps of the Trainer; return the losses, and save the model."""
    torch.manual_seed(0)
    trainer = Trainer(
        load(folder),
        TrainingArguments(
            output_dir=f"{target}-run",
            max_steps=2,
            per_device_train_batch_size=len(rows),
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            gradient_checkpointing=gradient_checkpointing,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        # The first token is not predicted; transformers 5.4 would count it.
        train_dataset=[{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows],
    )
    trainer.train()
    trainer.save_model(target)
    return {
        "losses": [x["loss"] for x in trainer.state.log_history if "loss" in x],
        "checkpointed": trainer.model.transformer.checkpointing,
    }


def adapt(folder, adapter, rows):
    """Logits of a base with an adapter of ours, before and after PEFT merges it."""
    from peft import PeftModel

    tokens = torch.tensor(rows)
    with torch.inference_mode():
        model = PeftModel.from_pretrained(load(folder), adapter).eval()
        return {
            "added": model(tokens).logits.tolist(),
            "merged": model.merge_and_unload()(tokens).logits.tolist(),
        }


def train_adapter(folder, target, rows, keys, checkpointing=False):
    """A LoRA of PEFT, trained for two steps; return its logits."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.3,
        target_modules=keys,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load(folder), config).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    tokens = torch.tensor(rows)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(target)
    with torch.inference_mode():
        return model.eval()(tokens).logits.tolist()


def score(folder, pairs):
    """lm-evaluation-harness's own model of Hugging Face folders."""
    from types import SimpleNamespace

    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=folder, trust_remote_code=True, add_bos_token=True, device="cpu"
    )
    requests = [SimpleNamespace(args=tuple(pair)) for pair in pairs]
    return model.loglikelihood(requests, disable_tqdm=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    calls = json.loads(Path(sys.argv[1]).read_text())
    answers = {
        key: globals()[name](**options) for key, (name, options) in calls.items()
    }
    Path(sys.argv[2]).write_text(json.dumps(answers))
