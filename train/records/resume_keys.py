"""The keys of a run's config that may change where the run is resumed, each with the reason.

Every other key decides what is computed: with another value it is another run. The table is in
docs/resume.md too.
"""

import fnmatch
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple


class When(Enum):
    """Condition on which a key may change."""

    ALWAYS = "always"
    SAME_DATA = "where the data hold the same"
    SAME_BASE = "where the base holds the same"
    SAME_STEP = "where a step takes as many images, without buckets"
    SAME_RATE = "where no step that is done would have had another learning rate"


class Rule(NamedTuple):
    """Keys, with * for any part, and why another value makes no other run."""

    keys: tuple[str, ...]
    when: When
    reason: str


RULES = (
    Rule(("run_dir",), When.ALWAYS, "a run directory may be moved"),
    Rule(
        ("checkpoint", "model.text_encoder", "single_file.*"),
        When.SAME_BASE,
        "the base is known by its content (identity.json), wherever it lies",
    ),
    Rule(
        (
            "data.shards",
            "data.validation_shards",
            "data.mixture.*.shards",
            "data.image_key",
            "data.caption_key",
        ),
        When.SAME_DATA,
        "data are known by their content (identity.json), wherever they lie",
    ),
    Rule(
        ("data.num_workers", "data.cache_dir", "data.cache_gigabytes", "data.allow_shell_urls"),
        When.ALWAYS,
        "who reads the data, and where they are kept; the order is a function of the seed",
    ),
    Rule(
        ("data.max_bad_share",),
        When.ALWAYS,
        "when a run stops; what replaces a bad sample is a function of the seed",
    ),
    Rule(
        ("trainer.devices", "trainer.num_nodes"),
        When.ALWAYS,
        "batch_size counts the images of all processes: a requeued job gets other nodes",
    ),
    Rule(
        ("trainer.strategy",),
        When.ALWAYS,
        "what each process holds; checkpoints of one are read by the other, equal but for rounding",
    ),
    Rule(
        ("batch_size", "trainer.accumulate_grad_batches"),
        When.SAME_STEP,
        "a step takes the same images, in other portions; equal but for rounding",
    ),
    Rule(
        ("trainer.gradient_checkpointing", "trainer.gradient_checkpointing_levels"),
        When.ALWAYS,
        "what is not kept in memory is computed again, to the same bits",
    ),
    Rule(
        ("trainer.max_steps", "trainer.max_epochs"),
        When.SAME_RATE,
        "a longer run begins as the shorter one did; a decay to 0 at its end does not",
    ),
    Rule(
        (
            "trainer.log_every_steps",
            "trainer.validate_every_steps",
            "trainer.checkpoint_every_steps",
            "trainer.keep_checkpoints",
            "trainer.keep_best",
        ),
        When.ALWAYS,
        "when to look at the weights and to save them, which changes none",
    ),
    Rule(("export.*",), When.ALWAYS, "which weights are written for others, which changes none"),
    Rule(("preview.*", "watch.*"), When.ALWAYS, "what is shown and measured of the weights"),
    Rule(("wandb.*",), When.ALWAYS, "where it is shown"),
    Rule(("plan", "card_gib"), When.ALWAYS, "a plan trains nothing"),
)


def rule_of(key: str) -> Rule | None:
    """Returns the rule of a dotted key; None for a key that may not change."""
    for rule in RULES:
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in rule.keys):
            return rule
    return None


def may_change(key: str, when: When) -> bool:
    """Tells whether a key may change on that condition."""
    rule = rule_of(key)
    return rule is not None and rule.when is when


def images_per_step(values: Mapping[str, Any]) -> int:
    """Returns how many images an optimizer step takes, of dotted keys."""
    return values["batch_size"] * values["trainer.accumulate_grad_batches"]
