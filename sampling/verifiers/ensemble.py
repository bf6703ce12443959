"""Several verifiers' scores made into one by which the candidates of a group are ranked.

    mean_rank     -sum_k w_k rank_k / sum_k w_k        rank 1 is the best, ties share the mean
    z_score        sum_k w_k z_k / sum_k w_k           z = (score - mean) / std within the group
    minimum        min_k z_k                           as good as its weakest side
    weighted_sum   sum_k w_k score_k                   on the scores' own scales

(Ma et al. 2025 use the unweighted mean rank, which no verifier's scale can dominate.) Scores are
rounded to 1e-4 first, so that most near-ties are ties. A candidate with a score that is not finite
gets -inf, whatever its other scores, and does not move the ranks, means and deviations of the
others. A verifier of weight 0 decides nothing, whatever its scores.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.sampling.choices import SCORE_DECIMALS
from blackpoint.sampling.verifiers.kind import EnsembleRule, check_weights


def combined(
    scores: Float[Tensor, "n k"],
    rule: EnsembleRule = "mean_rank",
    weights: Sequence[float] | None = None,
) -> Float[Tensor, " n"]:
    """Returns one ranking score per candidate, the higher the better, in float64.

    scores: one row per candidate of the group that is compared, one column per verifier. Raises
    UserError for weights that the rule cannot take.
    """
    weights = weights or [1.0] * scores.shape[1]
    check_weights(weights, rule)
    weight = torch.tensor(weights).double()
    scores, weight = scores[:, weight != 0], weight[weight != 0]
    usable = torch.isfinite(scores).all(dim=1)
    kept = scores[usable].double().round(decimals=SCORE_DECIMALS)
    match rule:
        case "mean_rank":
            values = -(_ranks(kept) @ weight) / weight.sum()
        case "z_score":
            values = _z_scores(kept) @ weight / weight.sum()
        case "minimum":
            values = _z_scores(kept).amin(dim=1)
        case "weighted_sum":
            values = kept @ weight
    answer = torch.full((len(scores),), -torch.inf, dtype=torch.float64)
    answer[usable] = values
    return answer


def _ranks(scores: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Returns each candidate's rank in each column, from 1 for the highest."""
    above = (scores[None] > scores[:, None]).sum(dim=1)
    equal = (scores[None] == scores[:, None]).sum(dim=1)  # itself included
    return (above + (equal + 1) / 2).double()


def _z_scores(scores: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Returns deviations from the mean in standard deviations; 0 where all are equal."""
    if not len(scores):
        return scores
    std = scores.std(dim=0, correction=0)
    return (scores - scores.mean(dim=0)) / torch.where(std > 0, std, 1.0)
