"""What the page samples: the checkpoint and its base, each by the process that it was trained for.

One image at a time, whoever asks: the models share a device.
"""

import io
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from blackpoint.data.files.yaml_text import read_yaml_file
from blackpoint.data.images.luminance import WEIGHTS
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.options import SampleConfig
from blackpoint.sampling.report.page import data_uri
from blackpoint.sampling.runtime.pictures import to_picture
from blackpoint.sampling.runtime.precision import set_tf32, settle
from blackpoint.sampling.sample import find_device
from blackpoint.scripts.config import load_values
from blackpoint.scripts.show.config import ShowConfig

log = logging.getLogger(__name__)

NUM_BINS = 32


class Models:
    """The sides of the page, loaded; raises UserError for what cannot be."""

    def __init__(self, config: ShowConfig) -> None:
        device = find_device(config.device)
        formats = settle("show", {"dtype": "auto", "tf32": "auto"}, device, log.warning)
        set_tf32(formats["tf32"])
        file = Path(config.checkpoint) / "config.yaml"
        run = (read_yaml_file(file) or {}) if file.is_file() else {}
        base = config.base or run.get("checkpoint")
        if config.base is None and base and not Path(base).exists():
            base = None  # nothing is downloaded unasked
        self.prompts: list[str] = run.get("preview", {}).get("prompts") or []
        self.titles = ["base", "fine-tune"] if base else [""]
        self._models, self._lock = list[DiffusionModel](), threading.Lock()
        for name in filter(None, [base, config.checkpoint]):
            model = DiffusionModel.load(name, device, getattr(torch, formats["dtype"]))
            model.prepare()
            self._models.append(model)
        self._processes = [model.process for model in self._models]

    def about(self) -> list[str]:
        """Returns a line about each side: what it is, predicts, and how it is sampled."""
        lines = []
        for model, process in zip(self._models, self._processes, strict=True):
            end = "zero" if process.schedule.is_zero_terminal_snr else "non-zero"
            text = f"{process.prediction_type}, {end} terminal SNR, {process.timestep_spacing}"
            lines.append(f"{model.source}: {text} timesteps")
        return lines

    def sample(self, side: int, **asked: Any) -> Mapping[str, Any]:
        """Samples what the page asks of a side; returns the picture and how bright it is.

        asked: keys of `blackpoint sample`. Raises UserError for values that it refuses.
        """
        model, since_s = self._models[side], time.monotonic()
        values = {"checkpoint": model.source, "output": "shown", **asked}
        config = load_values(SampleConfig, values, "the page")
        with self._lock:
            model.process = self._processes[side].respaced(config.timestep_spacing)
            options = config.sampling_options()
            picture = to_picture(model.sample(config.prompts, [config.seed], **options)[0])
        luminance = np.asarray(picture) @ np.array(WEIGHTS) / 255
        return {
            "image": png_uri(picture),
            "luminance": float(luminance.mean()),
            "histogram": (np.histogram(luminance, NUM_BINS, (0, 1))[0] / luminance.size).tolist(),
            "seconds": round(time.monotonic() - since_s, 1),
        }


def png_uri(picture: Image.Image) -> str:
    """Returns a picture as PNG in a data URI."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    return data_uri("png", content.getvalue())
