"""Small folders of published models, as transformers writes them, with random weights."""

import torch
from transformers import PerceiverConfig, PerceiverImageProcessor, PerceiverTokenizer
from transformers.models.perceiver import modeling_perceiver

TINY = {
    "num_latents": 6,
    "d_latents": 16,
    "num_blocks": 2,
    "num_self_attends_per_block": 3,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 2,
    "attention_probs_dropout_prob": 0.1,
    "attn_implementation": "eager",
}
TINY_TEXT = {"d_model": 24, "qk_channels": 8, "v_channels": 16, "max_position_embeddings": 40}
SIZE, CLASSES = 16, 5
MODELS = {  # name: transformers' class, a small configuration of it
    "fourier": ("PerceiverForImageClassificationFourier", {"d_model": 261, "num_cross_attention_heads": 1}),
    "learned": ("PerceiverForImageClassificationLearned", {"d_model": 512, "image_size": SIZE}),
    "conv": ("PerceiverForImageClassificationConvProcessing", {"d_model": 322, "self_attention_widening_factor": 2}
             | {"cross_attention_widening_factor": 2}),
    "language": ("PerceiverForMaskedLM", TINY_TEXT),
    "text": ("PerceiverForSequenceClassification", TINY_TEXT | {"num_blocks": 1}),
}  # fmt: skip
IMAGES = ("fourier", "learned", "conv")


def randomised(module):
    """The module with no parameter or statistic left at a value, such as a bias of 0, that could hide a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
    return module


def write_models(root, names=tuple(MODELS)):
    """A folder for each of MODELS below root."""
    for seed, (name, (architecture, changes)) in enumerate(MODELS.items()):
        if name not in names:
            continue
        torch.manual_seed(seed)
        config = PerceiverConfig(**TINY | {"num_labels": CLASSES} | changes)
        randomised(getattr(modeling_perceiver, architecture)(config)).save_pretrained(root / name)
        if name in IMAGES:
            PerceiverImageProcessor(size={"height": SIZE, "width": SIZE}, crop_size={"height": 20, "width": 20}
                                    ).save_pretrained(root / name)  # fmt: skip
        else:
            PerceiverTokenizer(model_max_length=TINY_TEXT["max_position_embeddings"]).save_pretrained(root / name)
