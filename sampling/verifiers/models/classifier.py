"""Classifier: how sure a network is that an image shows a class.

    score = logit_y                                   (output = "logit")
    score = logit_y - log sum_k exp(logit_k)          (output = "log_prob", 0 is best)
    score = logit_y - log sum_{k != y} exp(logit_k)   (output = "log_odds", which never saturates)
    score = 1 where y is the likeliest class, else 0  (output = "top1": its mean is the accuracy)

with the class y given, or found in the prompt by the names of the classes (Ma et al. 2025 search
with DINO's logits).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.verifiers.kind import VerifierKind, VerifierOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from blackpoint.sampling.verifiers.models.image_model import ImageModel
    from blackpoint.sampling.verifiers.verifier import Images, ImageVerifier


@dataclass
class ClassifierConfig(VerifierOptions):
    """Keys of kind=classifier."""

    label: str | None = None
    """classifier: name or number of the wanted class; found in each prompt if not set."""
    labels: list[str] = field(default_factory=list)
    """classifier: names of its classes in order; the model's own if empty."""
    output: Literal["logit", "log_prob", "log_odds", "top1"] = "log_prob"
    """classifier: the logit of the class, its log-probability, its log-odds, which don't saturate
    as that does, or whether it is the likeliest."""


class Classifier:
    """An image classifier and the class that each prompt asks for."""

    def __init__(self, model: ImageModel, config: ClassifierConfig) -> None:
        self._model, self._output = model, config.output
        self._labels = list(config.labels or model.labels)
        self._given = None if config.label is None else self._number(config.label)
        if self._given is None and not self._labels:
            raise UserError(
                "labels: the classifier does not name its classes, so none can be found in a "
                "prompt; give labels in the order of its outputs, or label, the number of one"
            )

    def label_of(self, prompt: str) -> int:
        """Returns the class that a prompt asks for; raises UserError unless it names just one."""
        return self._given if self._given is not None else label_in(prompt, self._labels)

    def scores(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Returns the output named by `output` for each image's class."""
        classes = [self.label_of(prompt) for prompt in prompts]
        logits = self._model(images)
        num_classes = logits.shape[1]
        if self._labels and len(self._labels) != num_classes:
            raise UserError(
                f"labels: {len(self._labels)} names for a classifier with {num_classes} outputs; "
                "give one name per output, in their order"
            )
        if max(classes) >= num_classes:
            raise UserError(
                f"label={max(classes)} is not one of the classifier's {num_classes} classes, "
                f"0 to {num_classes - 1}"
            )
        wanted = logits.new_tensor(classes).long()
        if self._output == "top1":
            return (logits.argmax(dim=1) == wanted).to(logits.dtype)
        if self._output == "log_prob":
            logits = logits.log_softmax(dim=1)
        score = logits.gather(1, wanted[:, None])[:, 0]
        if self._output == "log_odds":
            others = logits.scatter(1, wanted[:, None], -math.inf)
            score = score - others.logsumexp(dim=1)
        return score

    def _number(self, label: str) -> int:
        if label in self._labels:
            return self._labels.index(label)
        if label.isdigit() and (not self._labels or int(label) < len(self._labels)):
            return int(label)
        raise UserError(
            f"label={label} is not a class of this classifier; its {len(self._labels)} classes "
            f"are {_shown(self._labels)}"
        )


def load(config: ClassifierConfig, device: torch.device, dtype: torch.dtype) -> ImageVerifier:
    """Loads the network; raises UserError for labels that do not fit it."""
    from blackpoint.sampling.verifiers.models.image_model import load_classifier
    from blackpoint.sampling.verifiers.verifier import ImageVerifier

    model = load_classifier(config.checkpoint, config.module, device, dtype)
    classifier = Classifier(model, config)
    return ImageVerifier(config, classifier.scores, model.differentiable, classifier.label_of)


def label_in(prompt: str, labels: Sequence[str]) -> int:
    """Returns the number of the only class that the prompt names, as whole words, in any case.

    A label may list names ("tabby, tabby cat"); a name inside a longer one does not count ("cat"
    in "tiger cat").
    """
    text = _words(prompt)
    matched: list[tuple[int, int, int]] = []  # start, end, class
    for number, label in enumerate(labels):
        for name in filter(None, map(_words, label.split(","))):
            matches = re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text)
            matched += [(match.start(), match.end(), number) for match in matches]
    outer = {
        number
        for start, end, number in matched
        if not any(a <= start and end <= b and b - a > end - start for a, b, _ in matched)
    }
    if len(outer) == 1:
        return outer.pop()
    what = f"several classes, {_shown([labels[n] for n in sorted(outer)])}" if outer else "no class"
    raise UserError(
        f"label: the prompt {prompt!r:.60} names {what} of {_shown(labels)}; give the verifier a "
        "label, or prompts that name one class"
    )


def _words(text: str) -> str:
    return " ".join(re.sub(r"[_\-\s]+", " ", text.lower()).split())


def _shown(labels: Sequence[str]) -> str:
    return ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")


HIGHEST = {"log_prob": 0.0, "top1": 1.0}
"""By output; the others have none."""
KIND = VerifierKind(
    load,
    ClassifierConfig,
    has_model=True,
    highest=lambda config: HIGHEST.get(config.output, math.inf),
)
