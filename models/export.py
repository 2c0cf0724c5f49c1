"""Writes a trained checkpoint as Hugging Face files: `python -m models.export --run DIR --out DIR`.

The result is a stock Qwen3ForCausalLM in safetensors with a tokenizer, for
`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from models.primed import DemoConfig, DemoModel
from models.tokenizer import BOS, BOS_ID, EOS, EOS_ID, PAD, PAD_ID
from models.train import CHECKPOINT_NAME, LOG_NAME, TOKENIZER_NAME


def load_checkpoint(path: Path) -> DemoModel:
    """The network of a checkpoint written by `models.train`, in fp32."""
    state = torch.load(path, weights_only=True)
    model = DemoModel(DemoConfig(**state["config"]))
    model.load_state_dict(state["model"])
    model.eval()
    return model


def to_qwen3(model: DemoModel) -> Qwen3ForCausalLM:
    """The same function as a Hugging Face model, fp32; logits agree to rounding."""
    config = model.config
    qwen3 = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden,
            intermediate_size=config.feed_forward,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.positions_max,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    )
    weights = {f"model.{name}": weight.clone() for name, weight in model.state_dict().items()}
    # The demo network divides its logits by sqrt(hidden); Qwen3 does not, so the norm does it.
    weights["model.norm.weight"] /= math.sqrt(config.hidden)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    qwen3.load_state_dict(weights)
    qwen3.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=False
    )
    return qwen3.eval()


def to_fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The Hugging Face tokenizer; encoding a prompt puts BOS in front of it."""
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=DemoConfig().positions_max,
        clean_up_tokenization_spaces=False,
    )


def export(run: Path, out: Path) -> None:
    """Writes model, tokenizer, generation config and training log of `run` to `out`.

    Raises FileNotFoundError if `run` holds no checkpoint.
    """
    checkpoint = run / CHECKPOINT_NAME
    if not checkpoint.exists():
        raise FileNotFoundError(
            f"{checkpoint} does not exist; train first: python -m models.train --out {run}"
        )
    out.mkdir(parents=True, exist_ok=True)
    to_qwen3(load_checkpoint(checkpoint)).save_pretrained(out)
    to_fast_tokenizer(Tokenizer.from_file(str(run / TOKENIZER_NAME))).save_pretrained(out)
    if (run / LOG_NAME).exists():
        shutil.copyfile(run / LOG_NAME, out / LOG_NAME)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and exports."""
    parser = argparse.ArgumentParser(prog="python -m models.export", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="directory given to models.train")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    given = parser.parse_args(arguments)
    export(given.run, given.out)


if __name__ == "__main__":
    main()
