"""A page to fine-tune an image classifier: upload images, choose a model and a budget, compare, download.

It needs gradio, and opens at an address that it prints. `WASI_MODEL` names another model than DINOv2-small::

    pip install 'wasi_peft[page]'
    python examples/page/app.py
"""

import os
from collections import Counter

import gradio as gr
from training import fine_tune
from uploads import RefusedError, read_files, read_zip

MODELS = ["facebook/dinov2-small", "google/vit-base-patch16-224-in21k", "microsoft/swin-tiny-patch4-window7-224"]
MODEL = os.environ.get("WASI_MODEL", MODELS[0])
COLUMNS = ["", "test images right", "peak of a step (batch 16)", "file to share"]


def counted(images):
    classes = Counter(label for _, label in images)
    return ", ".join(f"{label}: {count}" for label, count in classes.items()) or "no images yet"


def add(images, files, label, archive):
    """What is there stays there, whatever is wrong with what comes."""
    try:
        new = read_zip(archive) if archive else read_files(files, label)
    except RefusedError as error:
        return gr.skip(), gr.skip(), f"⚠️ {error}", gr.skip(), gr.skip()
    images = images + new
    return images, images, counted(images), None, None


def train(images, model, budget, steps, with_lora, progress=gr.Progress()):  # noqa: B008  gradio's way
    """A refusal leaves the last result on the page."""
    try:
        rows, compared, archive = fine_tune(images, model, int(budget), int(steps), with_lora, progress)
    except RefusedError as error:
        return gr.skip(), gr.skip(), gr.skip(), f"⚠️ {error}"
    shown = [
        (image, f"{'✓' if after == label else '✗'} {after}, start: {before}")
        for (image, label), before, after in compared
    ]
    return rows, shown, gr.DownloadButton(value=archive, interactive=True), "Done."


with gr.Blocks(title="wasi_peft") as page:
    gr.Markdown("# Fine-tune an image classifier\nin the memory that there is, on this machine, with WASI.")
    images = gr.State([])
    with gr.Row():
        with gr.Column():
            label = gr.Textbox(label="Class", placeholder="cat")
            files = gr.File(label="Images of this class", file_count="multiple", height=140, elem_id="files")
            archive = gr.File(label="or a zip with a folder for each class", height=140, elem_id="zip")
            button = gr.Button("Add")
            status = gr.Markdown(counted([]))
        gallery = gr.Gallery(label="Images", columns=4, height=430, interactive=False)
    button.click(add, [images, files, label, archive], [images, gallery, status, files, archive])
    with gr.Row():
        model = gr.Dropdown(list(dict.fromkeys([MODEL, *MODELS])), value=MODEL, label="Model", allow_custom_value=True)
        budget = gr.Slider(50, 8000, 1000, step=10, label="Memory of a step, MiB")
        steps = gr.Slider(5, 500, 60, step=5, label="Steps")
        with_lora = gr.Checkbox(label="LoRA too")
    start = gr.Button("Fine-tune", variant="primary")
    outcome = gr.Markdown()
    table = gr.Dataframe(headers=COLUMNS, label="Comparison", interactive=False)
    compared = gr.Gallery(label="Test images", columns=4, interactive=False)
    download = gr.DownloadButton("Download the adapter", interactive=False)
    start.click(train, [images, model, budget, steps, with_lora], [table, compared, download, outcome])

if __name__ == "__main__":
    page.launch()
