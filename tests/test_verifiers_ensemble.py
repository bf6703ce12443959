"""Ensembles: what each rule ranks first, ties, weights, and that NaN never wins."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.verifiers.ensemble import combined
from blackpoint.sampling.verifiers.load import VerifierConfig

RULES = ["mean_rank", "z_score", "minimum", "weighted_sum"]
groups = st.integers(1, 6).flatmap(
    lambda k: st.lists(st.lists(st.integers(-5, 5), min_size=k, max_size=k), min_size=1, max_size=9)
).map(lambda rows: torch.tensor(rows, dtype=torch.float64))  # fmt: skip
law = settings(max_examples=50, deadline=None)
rules = st.sampled_from(RULES)


@law
@given(groups)
def test_mean_rank_is_scipys(scores: torch.Tensor) -> None:
    expected = -stats.rankdata(-scores.numpy(), axis=0).mean(axis=1)
    assert_close(combined(scores), torch.from_numpy(expected))


@pytest.mark.filterwarnings("ignore:Precision loss")  # scipy, where all scores are equal
@law
@given(groups)
def test_z_scores_are_scipys(scores: torch.Tensor) -> None:
    z = torch.from_numpy(stats.zscore(scores.numpy(), axis=0)).nan_to_num()
    assert_close(combined(scores, "z_score"), z.mean(dim=1), atol=1e-9, rtol=0)
    assert_close(combined(scores, "minimum"), z.amin(dim=1), atol=1e-9, rtol=0)


@law
@given(groups)
def test_weighted_sum_is_the_sum(scores: torch.Tensor) -> None:
    weights = [(-1.0) ** k * (k + 1) for k in range(scores.shape[1])]
    expected = (scores * torch.tensor(weights).double()).sum(dim=1)
    assert_close(combined(scores, "weighted_sum", weights), expected)


@law
@given(groups, rules)
def test_one_better_in_everything_is_ranked_above(scores: torch.Tensor, rule: str) -> None:
    best = scores.amax(dim=0, keepdim=True) + 1
    assert combined(torch.cat([scores, best]), rule).argmax() == len(scores)  # type: ignore[arg-type]


@law
@given(groups, rules, st.integers(0, 8))
def test_order_of_the_candidates_does_not_matter(scores, rule, shift) -> None:
    moved = combined(scores.flip(0).roll(shift, 0), rule)
    assert_close(moved, combined(scores, rule).flip(0).roll(shift, 0), atol=1e-9, rtol=0)


@law
@given(groups, rules, st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_what_is_not_finite_never_wins_and_moves_no_one(scores, rule, bad) -> None:
    broken = torch.full((1, scores.shape[1]), 100.0, dtype=torch.float64)
    broken[0, -1] = bad
    found = combined(torch.cat([broken, scores]), rule)
    assert found[0] == -torch.inf
    assert_close(found[1:], combined(scores, rule), atol=1e-9, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_all_not_finite_leaves_none(rule) -> None:
    assert combined(torch.full((3, 2), torch.nan), rule).tolist() == [-torch.inf] * 3
    assert combined(torch.zeros(0, 2), rule).shape == (0,)


@pytest.mark.parametrize("rule", RULES)
def test_near_ties_are_ties(rule) -> None:
    scores = torch.tensor([[0.5, 1.0], [0.500004, 1.0], [0.2, 0.3]])
    first, second, last = combined(scores, rule)
    assert first == second > last


def test_weights_move_the_ranking() -> None:
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for rule in ("mean_rank", "z_score"):
        assert combined(scores, rule, [3, 1]).argmax() == 0
        assert combined(scores, rule, [1, 3]).argmax() == 1
    assert combined(scores, "minimum", [1, 0]).argmax() == 0  # weight 0 leaves one out


@pytest.mark.parametrize("rule", RULES)
def test_a_weight_of_0_decides_nothing_whatever_the_score(rule) -> None:
    scores = torch.tensor([[1.0, torch.nan], [0.0, 5.0], [torch.inf, 1.0]]).double()
    assert torch.equal(combined(scores, rule, [1, 0]), combined(scores[:, :1], rule))


def test_wrong_weights_are_refused() -> None:
    scores = torch.zeros(3, 2)
    with pytest.raises(UserError, match="must be finite numbers, not all 0"):
        combined(scores, weights=[0, 0])
    with pytest.raises(UserError, match="must be finite numbers, not all 0"):
        combined(scores, weights=[1, float("nan")])
    with pytest.raises(UserError, match="must be 0 or more for ensemble=mean_rank"):
        combined(scores, weights=[1, -1])


@pytest.mark.parametrize(
    ("weights", "rule", "message"),
    [((1, -1), "mean_rank", "must be 0 or more"), ((0, 0), "weighted_sum", "not all 0")],
)
def test_a_search_refuses_wrong_weights_before_it_pays(weights, rule, message: str) -> None:
    both = {f"v{w}{k}": VerifierConfig("luminance", weight=w) for k, w in enumerate(weights)}
    with pytest.raises(UserError, match=message):
        SearchConfig("model", "a cat", "out", budget_nfe=9, verifiers=both, ensemble=rule)
