"""The folder in which a checkpoint is prepared: what is done stays done, and the result appears as a whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files.folders import discard, flush_all, move_into_place
from ..files.whole import whole_file

STATE_FORMAT = 1
_STATE = "state.json"
_BEGUN = f".{_STATE}."  # begins the name of all that an interrupt may leave before there is a state


class WorkingFolder:
    """The folder `output + ".partial"`: parts of the result, what is kept on the way, and which steps are done.

    Args:
        output: Where the result goes.
        fingerprint: What must be the same in every run of one preparation, as JSON has it.
        overwrite: Whether a folder that is there may be replaced.

    Attributes:
        path: The folder.
        result: Folder of the result in it.
        steps: By the name of every step that is done, what it left to know.

    Raises:
        ValueError: If there is an output already, or the folder is of other arguments or damaged.
    """

    def __init__(self, output: str | os.PathLike[str], fingerprint: Mapping[str, Any], overwrite: bool) -> None:
        self.output, self.overwrite = os.path.abspath(output), overwrite
        self.path = f"{self.output}.partial"
        self.result = os.path.join(self.path, "result")
        self.steps: dict[str, Any] = {}
        self._fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))
        check_output(self.output, overwrite)
        if os.path.isfile(self.at(_STATE)):
            self.steps = self._read_state()
            if not os.path.isdir(self.result):  # it is in its place, or there was nothing in it yet
                discard(Path(self.path))
                self._begin()
        elif os.path.lexists(self.path) and not self._only_begun():
            raise ValueError(f"{self.path!r}: must be of an interrupted preparation or not exist; it has no {_STATE}.")
        else:
            self._begin()

    def _begin(self) -> None:
        self.steps = {}
        os.makedirs(self.path, exist_ok=True)
        self._write_state()
        os.makedirs(self.result)

    def _only_begun(self) -> bool:
        """Whether all that is there is what an interrupt left before there was a state."""
        return os.path.isdir(self.path) and all(name.startswith(_BEGUN) for name in os.listdir(self.path))

    def at(self, *parts: str) -> str:
        """A path in the folder."""
        return os.path.join(self.path, *parts)

    def _read_state(self) -> dict[str, Any]:
        path = self.at(_STATE)
        try:
            with open(path, encoding="utf-8") as file:
                state = json.load(file)
            known, steps, form = state["arguments"], state["steps"], state["format"]
            assert isinstance(known, dict) and isinstance(steps, dict)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(
                f"{path} must be the state of a preparation, got {error!r}. Remove {self.path!r}."
            ) from error
        if form != STATE_FORMAT:
            raise ValueError(f"{path}: the state must have format {STATE_FORMAT}, got {form!r}. Remove {self.path!r}.")
        for what in {**known, **self._fingerprint}:
            if known.get(what) != self._fingerprint.get(what):
                raise ValueError(
                    f"{self.path!r} holds an interrupted preparation with {what} {_short(known.get(what))}, got "
                    f"{_short(self._fingerprint.get(what))}. Give the same arguments, or remove that folder."
                )
        return steps

    def finish(self, step: str, left: Any = None) -> None:
        """A step is done; everything that it wrote is on the disk."""
        self.steps[step] = left
        self._write_state()

    def _write_state(self) -> None:
        state = {"format": STATE_FORMAT, "arguments": self._fingerprint, "steps": self.steps}
        write_json(self.at(_STATE), state)

    def publish(self) -> None:
        """The result becomes the output; one that was there is whole until then, and again if this fails."""
        check_output(self.output, self.overwrite)
        flush_all(Path(self.result))
        move_into_place(Path(self.result), Path(self.output), workplace=Path(self.path))


class TensorFiles:
    """A list of tensors, each in a file of its own: hidden states of the batches between two blocks.

    Args:
        folder: Of the files; created.
        count: How many there are already.
    """

    def __init__(self, folder: str, count: int = 0) -> None:
        self.folder = folder
        self._count = count
        os.makedirs(folder, exist_ok=True)

    def __len__(self) -> int:
        return self._count

    def append(self, value: Tensor) -> None:
        """Add one."""
        self._count += 1
        self[self._count - 1] = value

    def __setitem__(self, index: int, value: Tensor) -> None:
        write_tensors(self._path(index), {"value": value.detach()})

    def __getitem__(self, index: int) -> Tensor:
        try:
            return load_file(self._path(index))["value"].clone()
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{self._path(index)} must hold hidden states, got {error}. Remove the folder."
            ) from error

    def remove(self) -> None:
        """Delete the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> str:
        return os.path.join(self.folder, f"{index:05d}.safetensors")


def check_output(output: str, overwrite: bool) -> None:
    """Refuse an output that may not be written.

    Raises:
        ValueError: If it exists and is not to be replaced, is no folder, or its parent does not exist.
    """
    parent = os.path.dirname(os.path.abspath(output))
    if not os.path.isdir(parent):
        raise ValueError(f"{output}: the folder in which it is to be must exist.")
    if os.path.lexists(output) and (not overwrite or os.path.islink(output) or not os.path.isdir(output)):
        kind = "one that exists needs overwrite=True, or --overwrite" if os.path.isdir(output) else "it is no folder"
        raise ValueError(f"{output}: the output must not exist yet; {kind}.")


def write_tensors(path: str, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, whole and on the disk, or none."""
    with whole_file(path) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"}
        )


def write_json(path: str, content: Any) -> None:
    """A JSON file, whole and on the disk, or none."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 120 else f"{text[:100]}..."
