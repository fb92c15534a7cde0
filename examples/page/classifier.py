"""The classifier of the page: loaded with a head for the user's classes, and asked."""

import torch
import transformers
from uploads import RefusedError

BATCH = 16


def load(model_id, names, images):
    """The model with a head for these classes, and the images as it reads them."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(model_id)
        model = transformers.AutoModelForImageClassification.from_pretrained(
            model_id, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise RefusedError(f"{model_id} is no model for images that can be loaded.") from error
    return model, processor(images, return_tensors="pt")["pixel_values"]


@torch.inference_mode()
def answers(model, pixels):
    return torch.cat([model.eval()(part).logits.argmax(1) for part in pixels.split(BATCH)])
