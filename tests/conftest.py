"""A tiny random model and a batch for every entry of `FAMILIES`: no downloads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig

from secateur.families import FAMILIES

BERT = dict(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
)
VIT = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=32,
    patch_size=8,
    num_labels=3,
)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)

# family → (config arguments, class suffix of the task model)
TINY: dict[str, tuple[dict[str, Any], str]] = {
    "bert": (BERT, "SequenceClassification"),
    "roberta": (BERT | SPECIAL, "SequenceClassification"),
    "xlm-roberta": (BERT | SPECIAL, "SequenceClassification"),
    "camembert": (BERT | SPECIAL, "SequenceClassification"),
    "electra": (BERT | dict(embedding_size=16), "SequenceClassification"),
    "mpnet": (BERT | SPECIAL, "SequenceClassification"),
    "distilbert": (
        dict(vocab_size=99, dim=32, n_layers=3, n_heads=4, hidden_dim=48, max_position_embeddings=64),
        "SequenceClassification",
    ),
    "deberta-v2": (
        BERT
        | dict(
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            share_att_key=False,
            pooler_hidden_size=32,
        ),
        "SequenceClassification",
    ),
    "modernbert": (
        BERT | SPECIAL | dict(cls_token_id=1, sep_token_id=2, local_attention=8),
        "SequenceClassification",
    ),
    "vit": (VIT, "ImageClassification"),
    "deit": (VIT | dict(architectures=["DeiTForImageClassification"]), "ImageClassification"),
    "dinov2": (VIT | dict(mlp_ratio=2), "ImageClassification"),
    "dinov2-swiglu": (VIT | dict(mlp_ratio=2, use_swiglu_ffn=True), "ImageClassification"),
    "gpt2": (
        dict(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_inner=48, n_positions=64) | SPECIAL,
        "CausalLM",
    ),
    "llama": (BERT | SPECIAL | dict(num_attention_heads=8, num_key_value_heads=4), "CausalLM"),
    "bart": (
        dict(
            vocab_size=99,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
        )
        | SPECIAL,
        "Seq2SeqLM",
    ),
    "t5": (
        dict(vocab_size=99, d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=48, decoder_start_token_id=0)
        | dict(pad_token_id=0, eos_token_id=1, feed_forward_proj="relu"),
        "Seq2SeqLM",
    ),
    "t5-gated": (
        dict(vocab_size=99, d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=48, decoder_start_token_id=0)
        | dict(pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu"),
        "Seq2SeqLM",
    ),
}

ENCODERS = [name for name, (_, head) in TINY.items() if head == "SequenceClassification"]


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """A tiny random task model in eval mode. Weights are drawn larger than usual so that every unit matters."""
    arguments, head = TINY[family]
    config = AutoConfig.for_model(FAMILIES[family].model_types[0], **{**arguments, **overrides})
    torch.manual_seed(seed)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.25 * noise)
            elif "norm" not in name.lower():
                parameter.copy_(0.1 * noise)
    return model.eval()


def tiny_batch(family: str, batch: int = 3, length: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch that fits `tiny_model(family)`; text batches contain padding."""
    generator = torch.Generator().manual_seed(seed)
    if FAMILIES[family].modality == "image":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    ids = torch.randint(5, 99, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length - 3 :] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if TINY[family][1] == "Seq2SeqLM":
        inputs["decoder_input_ids"] = torch.randint(5, 99, (batch, length - 2), generator=generator)
    return inputs


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(params=sorted(TINY))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and models, or a skip that says why."""
    folder = Path(os.environ.get("SECATEUR_SHARED", Path(__file__).parents[1] / ".." / "shared")).resolve()
    if not (folder / "models").is_dir():
        pytest.skip(f"no real data and models at {folder}: set SECATEUR_SHARED")
    return folder


def in_processes(count: int, code: str, folder: Path, *arguments: str) -> None:
    """Run Python code in so many processes that train together over gloo; it gets the folder and the arguments."""
    script = folder / "train.py"
    script.write_text(code)
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={count}", "--standalone"] if count > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(folder), *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
