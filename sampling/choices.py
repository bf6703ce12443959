"""The words that configs choose between; no import of torch, so that a verb's help is instant."""

from typing import Any, Literal

PredictionType = Literal["v_prediction", "epsilon", "sample"]  # named as in diffusers
Spacing = Literal["trailing", "leading", "linspace"]
Attention = Literal["auto", "xformers", "sdpa"]
Dtype = Literal["float32", "float16", "bfloat16"]
AutoDtype = Literal["auto", "float32", "float16", "bfloat16"]  # sampling/precision.py
Tf32 = Literal["auto", True, False]  # the true and false of YAML
PLAIN_FORMATS: dict[str, Any] = {"dtype": "float32", "encoder_dtype": "float32", "tf32": False}
"""What `auto` takes where a GPU offers nothing else, and what results without a record of number
formats were computed in."""
Weights = Literal["ema", "raw"]  # the average of a training checkpoint, or its last step
