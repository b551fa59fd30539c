"""Make vectors of photos by an ONNX model, loaded once per process and given photos in batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from reducer.config.settings import EmbedSettings, PhotoSettings
from reducer.errors import InputError, one_line
from reducer.photos.hashing import opened_photo
from reducer.photos.seen import as_seen
from reducer.storage.codecs import PROBLEMS, as_units

#: Red, green and blue of a photo as a model is to see it, shape (size, size, 3).
Picture = NDArray[np.uint8]
#: Where this process has model files, by their SHA-256; each for as long as a run is under way that brought it.
PATHS: dict[str, list[str]] = {}
#: In what onnxruntime says where memory is short.
NO_MEMORY = "allocate memory"
#: Numbers that a model may take.
NUMBERS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


def picture_of(content: bytes, settings: PhotoSettings) -> Picture:
    """Return the middle square of a photo, scaled to the size that a model takes.

    Parameters
    ----------
    content : bytes
        The whole file.
    settings : PhotoSettings
        ``embed.size`` is the side of the square, in pixels. The photo is scaled by Pillow's bicubic filter. A JPEG is
        decoded at 1/2, 1/4 or 1/8 where that is no smaller than the square, and others are taken `as_seen`, unless
        ``decode`` is ``exact``.

    Raises
    ------
    PhotoError
        For anything that Pillow or the limit refuses, `MemoryError` included.
    """
    assert settings.embed is not None
    side = settings.embed.size
    draft = None if settings.decode == "exact" else ("RGB", (side, side))
    with opened_photo(content, settings.max_pixels, oriented=settings.exif_orientation, draft=draft) as photo:
        image = photo.upright() if settings.decode == "exact" else as_seen(photo.upright())
        return np.asarray(ImageOps.fit(image.convert("RGB"), (side, side), method=Image.Resampling.BICUBIC))


def vectors_of(pictures: Sequence[Picture], settings: EmbedSettings) -> list[bytes | str]:
    """Return unit vectors of pictures, as bytes of float16 numbers; of a picture that has none, the reason."""
    vectors: list[bytes | str] = []
    model = loaded(settings) if pictures else None
    for start in range(0, len(pictures), settings.batch):
        assert model is not None
        batch = pictures[start : start + settings.batch]
        try:
            vectors += model.vectors_of(batch)
        except Exception as error:  # one of them, or all: which one?
            if NO_MEMORY in str(error).lower():
                raise MemoryError(one_line(error)) from None  # of this worker: it says nothing of the photos
            for picture in batch:
                try:
                    vectors += model.vectors_of([picture])
                except Exception as error:
                    vectors.append(f"the model fails: {one_line(error)}")
    return vectors


@lru_cache(maxsize=2)
def loaded(settings: EmbedSettings) -> Model:
    """Return a model, loaded once in this process.

    Raises
    ------
    InputError
        If it cannot be loaded or does not fit its settings.
    """
    path = next((path for path in reversed(PATHS.get(settings.model, [])) if os.path.exists(path)), None)
    if path is None:
        raise InputError(f"the model of --embed ({settings.model[:16]}) is not here")
    return Model(settings, path)


class Model:
    """An ONNX model that makes one vector of each photo.

    Parameters
    ----------
    settings : EmbedSettings
        Pictures and batches that the model takes, and the output that is used.
    path : str
        Path of the model file.

    Attributes
    ----------
    dimensions : int
        Numbers in a vector.

    Raises
    ------
    InputError
        If onnxruntime is missing, the file cannot be loaded, takes or gives something else, or makes vectors that
        depend on the other photos of a batch.

    Notes
    -----
    Every batch is full, the last one of a partition by empty photos, and one thread works on it: so the vector of a
    photo does not depend on the other photos of the batch. Models that look at a batch as a whole are refused.
    """

    def __init__(self, settings: EmbedSettings, path: str) -> None:
        self.settings, self._where = settings, f"--embed {path}"
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(
                f"--embed needs onnxruntime ({one_line(error)}): pip install 'reducer[embed]' where the workers run"
            ) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # as many workers as CPUs run at a time
        options.use_deterministic_compute = True
        options.log_severity_level = 4  # what is wrong is raised too
        try:
            # As bytes, and with no folder to look in: weights in other files would be on no worker, and in no digest.
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
            content = Path(path).read_bytes()
            providers = onnxruntime.get_available_providers()
            self._session = onnxruntime.InferenceSession(content, options, providers=providers)
        except Exception as error:
            advice = ""
            if "external" in str(error).lower():
                advice = ". Its weights lie in another file: save it as one (onnx.save_model(onnx.load(...), ...))"
            raise InputError(f"{self._where} cannot be loaded as an ONNX model: {one_line(error)}{advice}") from None
        self._check_input()
        self._choose_output()
        try:
            alone, together = self._alone_and_together()
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{self._where} does not take photos: {one_line(error)}") from None
        if alone.tobytes() != together.tobytes():
            raise InputError(
                f"{self._where} makes other vectors of a photo in other company, as dynamically quantized models do: "
                "results would hang on which photos are read together. "
                + ("Export it for one photo at a time" if self._fixed else "Give --embed-batch 1")
            )
        self.dimensions = int(alone.shape[1])

    def _alone_and_together(self) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
        """Return two vectors of one picture, each of shape (1, dimensions): alone, and behind others unlike it."""
        side = self.settings.size
        pictures = np.random.default_rng(0).integers(0, 256, (self.batch, side, side, 3), np.uint8)
        pictures[-1] = 100 + pictures[-1] // 16  # one of low contrast
        return self._run(pictures[-1:]), self._run(pictures)[-1:]

    def _check_input(self) -> None:
        inputs = self._session.get_inputs()
        shown = ", ".join(f"{tensor.name} {_shape(tensor)}" for tensor in inputs)
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in NUMBERS:
            raise InputError(
                f"{self._where} takes {shown or 'nothing'}: expected one input of floating-point numbers, (photos, 3, "
                "height, width) or (photos, height, width, 3)"
            )
        tensor = inputs[0]
        self._input, self._numbers = tensor.name, NUMBERS[tensor.type]
        fixed = [side if isinstance(side, int) and side > 0 else None for side in tensor.shape]
        self._channels_last = fixed[1] != 3 and fixed[3] == 3
        batch, *sides = fixed
        channels = sides.pop(2 if self._channels_last else 0)
        if channels not in (None, 3):
            raise InputError(f"{self._where} takes {shown}: expected 3 channels, red, green and blue")
        size = self.settings.size
        if any(side not in (None, size) for side in sides):
            wanted = next(side for side in sides if side not in (None, size))
            advice = f"give --embed-size {wanted}" if len({*sides, wanted} - {None}) == 1 else "it is not square"
            raise InputError(f"{self._where} takes {shown}, and --embed-size is {size}: {advice}")
        self._fixed = batch is not None
        #: Photos per call; a model may take one number of them and no other.
        self.batch = batch or self.settings.batch

    def _choose_output(self) -> None:
        outputs = {tensor.name: tensor for tensor in self._session.get_outputs()}
        shown = ", ".join(f"{name} {_shape(tensor)}" for name, tensor in outputs.items())
        name = self.settings.output
        if name is None and len(outputs) > 1:
            raise InputError(f"{self._where} gives {shown}: say which by --embed-output NAME")
        if name is not None and name not in outputs:
            raise InputError(f"{self._where} has no output {name!r} (--embed-output); it gives {shown}")
        self._output = name or next(iter(outputs))

    def _run(self, pictures: NDArray[np.uint8]) -> NDArray[np.floating[Any]]:
        """Return the output of the model for at most a batch of pictures, shape (pictures, dimensions)."""
        count, side = len(pictures), self.settings.size
        tensor = np.zeros((self.batch, 3, side, side), np.float32)
        for channel, (mean, std) in enumerate(zip(self.settings.mean, self.settings.std, strict=True)):
            plane = tensor[:count, channel]
            np.multiply(pictures[..., channel], np.float32(1 / (255 * std)), out=plane, dtype=np.float32)
            plane -= np.float32(mean / std)
        if self._channels_last:
            tensor = np.ascontiguousarray(tensor.transpose(0, 2, 3, 1))
        (output,) = self._session.run([self._output], {self._input: tensor.astype(self._numbers, copy=False)})
        shape: tuple[int, ...] = output.shape if isinstance(output, np.ndarray) else ()
        sides = [side for side in shape[1:] if side != 1]
        if len(shape) < 2 or shape[:1] != (self.batch,) or len(sides) > 1 or output.dtype.kind != "f":
            raise InputError(
                f"{self._where} gives {self._output} of shape {tuple(shape)} for {self.batch} photos: expected one "
                f"vector each, ({self.batch}, dimensions); --embed-output names another output"
            )
        flat: NDArray[np.floating[Any]] = output.reshape(self.batch, -1)[:count]
        return flat

    def vectors_of(self, pictures: Sequence[Picture]) -> list[bytes | str]:
        """Return unit vectors of at most `EmbedSettings.batch` pictures, or the reasons why there are none."""
        vectors: list[bytes | str] = []
        for start in range(0, len(pictures), self.batch):
            units, problems = as_units(self._run(np.stack(pictures[start : start + self.batch])))
            for unit, problem in zip(units, problems.tolist(), strict=True):
                vectors.append(f"of the model's: {PROBLEMS[problem]}" if problem else unit.tobytes())
        return vectors


def _shape(tensor: Any) -> str:
    return f"({', '.join(str(side or '?') for side in tensor.shape)}) {tensor.type}"


def probe_digest(content: bytes, settings: PhotoSettings) -> str:
    """Return 16 hexadecimal digits that stand for the vector which this process makes of a photo.

    Raises
    ------
    InputError
        If the model cannot be loaded, or does not fit the settings.
    """
    assert settings.embed is not None
    vector = loaded(settings.embed).vectors_of([picture_of(content, settings)])[0]
    return hashlib.sha256(vector.encode() if isinstance(vector, str) else vector).hexdigest()[:16]
