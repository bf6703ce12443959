"""Seeds of every verb are from 0 to what a generator, or a file of rows, can hold."""

import pytest

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.choices import MAX_SEED, check_seed
from blackpoint.scripts.cli import main

VERIFIER = "verifiers.a.kind=luminance"
GIVEN = {
    "sample": ["checkpoint=c", "prompts=a", "output=o"],
    "search": ["checkpoint=c", "prompts=a", "output=o", "budget_nfe=9", VERIFIER],
    "evaluate": ["checkpoint=c", "prompts=a", "output=o"],
    "train": ["checkpoint=c", "data.shards=s", "run_dir=r"],
    "demo": [],
}


@pytest.mark.parametrize("seed", [-1, 2**64])
@pytest.mark.parametrize(
    ("verb", "key"),
    [*((verb, "seed") for verb in GIVEN), ("search", "random.first_seed"), ("train", "model.seed")],
)
def test_seeds_out_of_range_are_refused(verb: str, key: str, seed: int, capsys) -> None:
    pixels = ["checkpoint=null", "model.channels=[64]", "model.blocks=[1]"]
    pixels += ["model.transformer_blocks=[0]", "model.text_encoder=t", "schedule.betas=linear"]
    given = [*verb.split(), *GIVEN[verb], *(pixels if key == "model.seed" else [])]
    assert main([*given, "--print-config"]) == 0
    assert main([*given, f"{key}={seed}", "--print-config"]) == 2
    error = capsys.readouterr().err
    assert f"{key}={seed}" in error and "a seed must be from 0 to" in error


def test_the_last_of_several_seeds_counts(capsys) -> None:
    check_seed("seed", MAX_SEED)
    with pytest.raises(UserError, match="with 2 in a row"):
        check_seed("seed", MAX_SEED, 2)
    given = ["evaluate", *GIVEN["evaluate"]]
    assert main([*given, f"seed={2**63 - 1}", "--print-config"]) == 0
    assert main([*given, f"seed={2**63}", "--print-config"]) == 2
    assert "a seed must be from 0 to 9223372036854775807" in capsys.readouterr().err


def test_seeds_that_rows_cannot_keep_are_refused_before_sampling(tmp_path) -> None:
    from blackpoint.sampling.evaluation.generate import jobs_of
    from blackpoint.sampling.prompts.prompt_set import Prompt

    jobs = jobs_of([Prompt("a")], 2, 2**63 - 2)
    assert [job.seed for job in jobs] == [2**63 - 2, 2**63 - 1]
    with pytest.raises(UserError, match="with 4 in a row"):
        jobs_of([Prompt("a"), Prompt("b", index=1)], 2, 2**63 - 2)
