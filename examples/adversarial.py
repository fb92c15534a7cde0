"""Fine-tunes an image classifier to withstand small changes of its images (PGD, arXiv 1706.06083), by the Trainer.

Every batch is attacked before it is learnt, and the test images in ten steps. Images in folders ``<class>/*.png``::

    python examples/adversarial.py --model facebook/dinov2-small --dataset ethz/food101 --epsilon 2 --token-keep 0.7
"""

import argparse

import datasets
import torch
import transformers
from peft import get_peft_model

import wasi_peft

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="google/vit-base-patch16-224-in21k", help="hub id or folder")
parser.add_argument("--dataset", required=True, help="hub id, or folder of images")
parser.add_argument("--epsilon", type=float, default=4, help="largest change of a pixel, of 255")
parser.add_argument("--attack-steps", type=int, default=3, help="while training; 0: ordinary training")
parser.add_argument("--token-keep", type=float, help="share of the patches that a training step sees")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--lr", type=float, default=3e-4)
parser.add_argument("--output", default="outputs/adversarial")
args = parser.parse_args()

images = datasets.load_dataset(args.dataset, split="train")
processor = transformers.AutoImageProcessor.from_pretrained(args.model)
split = images.train_test_split(0.2, seed=0, stratify_by_column="label").with_transform(
    lambda batch: {**processor([image.convert("RGB") for image in batch["image"]]), "labels": batch["label"]}
)
model = transformers.AutoModelForImageClassification.from_pretrained(
    args.model, num_labels=images.features["label"].num_classes, ignore_mismatched_sizes=True
)
model = get_peft_model(model, wasi_peft.WasiConfig(modules_to_save=["classifier"], token_keep=args.token_keep))
mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))


class AdversarialTrainer(transformers.Trainer):
    steps = args.attack_steps

    def attacked(self, inputs):
        """The batch with the change of its images, at most epsilon, that makes the loss large."""
        pixels, labels = (self._prepare_inputs(inputs)[name] for name in ("pixel_values", "labels"))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        low, high, size = ((bound / std).to(pixels.device) for bound in (-mean, 1 - mean, args.epsilon / 255))
        change = (2 * torch.rand_like(pixels) - 1) * size if self.steps else torch.zeros_like(pixels)
        self.model.eval().requires_grad_(False)  # the gradient of the images alone
        for _ in range(self.steps):
            change.requires_grad_()
            with torch.enable_grad(), self.compute_loss_context_manager():
                loss = self.model(pixel_values=pixels + change, labels=labels).loss
            change = change.detach() + 2.5 / self.steps * size * torch.autograd.grad(loss, change)[0].sign()
            change = (pixels + change.clamp(-size, size)).clamp(low, high) - pixels
        for parameter in trained:
            parameter.requires_grad_()
        return {**inputs, "pixel_values": pixels + change}

    def training_step(self, model, inputs, *rest):
        return super().training_step(model, self.attacked(inputs), *rest)

    def prediction_step(self, model, inputs, *rest, **options):
        return super().prediction_step(model, self.attacked(inputs), *rest, **options)


training = transformers.TrainingArguments(
    output_dir=args.output, num_train_epochs=args.epochs, per_device_train_batch_size=args.batch_size,
    learning_rate=args.lr, remove_unused_columns=False, label_names=["labels"], save_strategy="no", report_to="none",
)  # fmt: skip
trainer = AdversarialTrainer(
    model, training, train_dataset=split["train"], eval_dataset=split["test"],
    compute_metrics=lambda answers: {"accuracy": (answers.predictions.argmax(-1) == answers.label_ids).mean()},
)  # fmt: skip
trainer.train()
for title, trainer.steps in (("clean", 0), ("robust", 10)):
    print(f"{title} accuracy after training: {trainer.evaluate()['eval_accuracy']:.3f}")
trainer.save_model()
