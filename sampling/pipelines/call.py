"""The arguments that a pipeline is called with: ours, those of the user, and what is refused."""

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.guidance import Guidance

OURS = {
    "prompt": "prompts",
    "negative_prompt": "negative_prompt",
    "num_inference_steps": "num_steps",
    "height": "height",
    "width": "width",
    "guidance_scale": "guidance_scale",
    "guidance_rescale": "guidance_rescale",
    "generator": "seed",
    "eta": "eta",
    "num_images_per_prompt": "num_images",
    "timesteps": "num_steps",
    "sigmas": "num_steps",
    "latents": "seed",
}
"""Arguments of the call -> the keys that they are made of."""
HIDDEN = ("self", "output_type", "return_dict", "kwargs")
CALLBACKS = ("callback", "embeds", "mask", "image")
"""Parts of the names of arguments that are no settings."""
FIXED = {"num_images_per_prompt": 1, "use_resolution_binning": False}
"""Arguments that are set where a pipeline has them: one image per prompt, at the size that is asked
for."""


class Arguments:
    """The call of a class of pipelines, with the user's arguments `given`.

    Raises UserError for a class that cannot be driven by prompts and latents, and for arguments
    that it does not have.
    """

    def __init__(self, kind: type, given: Mapping[str, Any], source: str) -> None:
        self._parameters = inspect.signature(kind.__call__).parameters
        self._call = getattr(kind.__call__, "__wrapped__", kind.__call__)
        self.given = dict(given)
        self._check_class(kind, source)
        self._check_given()

    def takes(self, name: str) -> bool:
        """Whether the call has an argument."""
        return name in self._parameters

    def listed(self) -> str:
        """Lists the arguments that `pipeline` may set."""
        names = [
            name
            for name in self._parameters
            if name not in OURS and name not in HIDDEN and not any(c in name for c in CALLBACKS)
        ]
        return ", ".join(f"pipeline.{name}" for name in names) or "none"

    def call(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        num_steps: int,
        sides: tuple[int | None, int | None],
        guidance: Guidance,
        negative: str,
        others: Mapping[str, Any],
    ) -> Tensor:
        """Calls a pipeline; returns its output, latents where `others` ask for nothing else."""
        about: dict[str, Any] = {
            "guidance_scale": guidance.scale,
            "guidance_rescale": guidance.rescale,
            "height": sides[0],
            "width": sides[1],
            # "" is what a pipeline takes for itself, or nothing: as it is called by everybody
            "negative_prompt": [negative] * len(prompts) if negative else None,
            **FIXED,
            **self.given,
        }
        known = {k: v for k, v in about.items() if k in self._parameters and v is not None}
        fixed = {"prompt": list(prompts), "num_inference_steps": num_steps, "return_dict": False}
        return self._call(pipeline, **{"output_type": "latent", **known, **fixed, **others})[0]

    def _check_class(self, kind: type, source: str) -> None:
        reasons = {
            "prompt": "takes no prompt (it is given an image, a class or nothing)",
            "latents": "takes no latents, so that no noise can be handed to it",
            "num_inference_steps": "takes no number of steps (a cascade, or a model of one step)",
        }
        for name, reason in reasons.items():
            if name not in self._parameters:
                raise UserError(
                    f"checkpoint={source} is a {kind.__name__}, which {reason}; give a "
                    "text-to-image pipeline of diffusers"
                )

    def _check_given(self) -> None:
        for name, value in self.given.items():
            if name in OURS:
                raise UserError(f"pipeline.{name}={value}: set {OURS[name]} instead")
            if name in HIDDEN or name not in self._parameters:
                near = get_close_matches(name, self._parameters, 1)
                hint = f"; did you mean pipeline.{near[0]}?" if near else ""
                raise UserError(
                    f"pipeline.{name}={value}: this pipeline has no such argument{hint}; it has "
                    f"{self.listed()}"
                )
