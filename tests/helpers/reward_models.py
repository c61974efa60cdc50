"""Tiny random reward models, as transformers saves them."""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification


def save_reward_model(folder: Path, base: Path, num_labels: int = 1, pad: int | None = 0) -> Path:
    """A sequence classification model of the base's sizes, as transformers saves it; a tokenizer, if it has one."""
    config = AutoConfig.from_pretrained(base)
    config.num_labels, config.pad_token_id = num_labels, pad
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if parameter.dim() == 1 else 0.08)
    model.save_pretrained(folder)
    for path in base.glob("*token*"):
        shutil.copy(path, folder)
    return folder
