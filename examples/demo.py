"""What `make demo` runs: full fine-tuning, LoRA and WASI of an image classifier by time, memory, accuracy and size::

python examples/demo.py --model facebook/dinov2-small --dataset ylecun/mnist
"""

import argparse
import json
import time
from pathlib import Path

import datasets
import peft
import transformers
from rich import console, progress

import wasi_peft

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="facebook/dinov2-small", help="hub id or folder")
parser.add_argument("--dataset", required=True, help="hub id or folder, with columns 'image' and 'label'")
parser.add_argument("--steps", type=int, default=150, help="of 32 images")
args, output = parser.parse_args(), Path("outputs/demo")
LORA = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", modules_to_save=["classifier"])
WASI = wasi_peft.WasiConfig(modules_to_save=["classifier"])
METHODS = {"full fine-tuning": (None, 2e-5), "LoRA r=16": (LORA, 5e-4), "WASI": (WASI, 2e-4)}  # and learning rates
transformers.logging.set_verbosity_error()  # that the head is new is meant
transformers.logging.disable_progress_bar()
images = datasets.load_dataset(args.dataset)
if missing := {"image", "label"} - set(images["train"].column_names):
    parser.error(f"the dataset must have columns 'image' and 'label', it lacks {', '.join(missing)}")
processor = transformers.AutoImageProcessor.from_pretrained(args.model)
images.set_transform(lambda rows: {**processor([x.convert("RGB") for x in rows["image"]]), "labels": rows["label"]})


class OneBar(transformers.TrainerCallback):
    def on_step_end(self, *_, **__):  # by the seconds that this job's steps are expected to take
        bar.advance(task, seconds.get(job, 0))

    on_prediction_step = on_step_end  # 96 images forward take about as long as 32 there and back


def trainer_of(method, dtype, steps):
    config, lr = METHODS[method]
    transformers.set_seed(0)
    head = {"num_labels": images["train"].features["label"].num_classes, "ignore_mismatched_sizes": True}
    model = transformers.AutoModelForImageClassification.from_pretrained(args.model, **head)
    model = peft.get_peft_model(model, config) if config else model  # the line that is another for each method
    training = transformers.TrainingArguments(
        output / f"{method} {dtype}", max_steps=steps, per_device_train_batch_size=32, per_device_eval_batch_size=96,
        learning_rate=lr, bf16=dtype == "bf16", remove_unused_columns=False, save_strategy="no", disable_tqdm=True,
        label_names=["labels"], report_to="none", use_cpu=not transformers.utils.is_torch_cuda_available(),
    )  # fmt: skip
    trainer = transformers.Trainer(model, training, train_dataset=images["train"], callbacks=[OneBar])
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


peaks, seconds, rows = {}, {}, []
with progress.Progress(console=console.Console(stderr=True)) as bar:
    task = bar.add_task("two steps of each", total=None)
    for job in [(method, dtype) for dtype in ("fp32", "bf16") for method in METHODS]:
        trainer, start = trainer_of(*job, steps=2), time.time()
        held_bytes = sum(x.nbytes for x in [*trainer.model.parameters(), *trainer.model.buffers()])
        peaks[job] = held_bytes + wasi_peft.measure_peak_memory(trainer.train).peak_bytes
        seconds[job] = (time.time() - start) / 2
    jobs = [job for job in peaks if seconds[job] < 1.2 * seconds[job[0], "fp32"]]  # some machines have no fast bf16
    bar.update(task, total=sum(seconds[job] for job in jobs) * (args.steps + len(images["test"]) / 96))
    for job in jobs:
        bar.update(task, description=" ".join(job))
        start, trainer = time.time(), trainer_of(*job, args.steps)
        trainer.train()
        trainer.save_model()
        row = {"method": job[0], "dtype": job[1], "job, s": time.time() - start, "peak, MiB": peaks[job] / 2**20}
        answers = trainer.predict(images["test"])
        row["accuracy, %"] = 100 * float((answers.predictions.argmax(-1) == answers.label_ids).mean())
        files = Path(trainer.args.output_dir).glob("*.safetensors")
        rows.append(row | {"to share, MiB": sum(file.stat().st_size for file in files) / 2**20})
wasi_peft.report.print_table(rows)
(output / "demo.json").write_text(json.dumps(rows, indent=1))
