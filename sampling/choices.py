"""The words that configs choose between; no import of torch, so that a verb's help is instant."""

from typing import Literal

PredictionType = Literal["v_prediction", "epsilon", "sample"]  # named as in diffusers
Spacing = Literal["trailing", "leading", "linspace"]
Attention = Literal["auto", "xformers", "sdpa"]
Dtype = Literal["float32", "float16", "bfloat16"]
Weights = Literal["ema", "raw"]  # the average of a training checkpoint, or its last step
