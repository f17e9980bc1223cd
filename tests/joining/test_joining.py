"""The sums of low-rank deltas against dense algebra."""

from __future__ import annotations

import pytest
import torch
from peft.utils import merge_utils

from spectral_diffusion.joining import FUSERS, RHO, Inputs, LowRank, aligned_sum, weighted_sum
from spectral_diffusion.joining.aligned import SHRINKAGE, least_squares_sum, regression_mean
from spectral_diffusion.joining.gradient import ITERATIONS, gradient_fusion
from spectral_diffusion.joining.merges import DENSITY, SEED, dare, svd, ties
from spectral_diffusion.joining.routing import signal_routing

OUT, IN, RANKS, WEIGHTS = 9, 12, (2, 3), (1.0, 0.6)


@pytest.fixture
def deltas() -> list[LowRank]:
    """Two deltas in float64."""
    return [LowRank(up=normal(OUT, rank, seed=rank), down=normal(IN, rank, seed=10 + rank)) for rank in RANKS]


@pytest.fixture
def activations() -> list[torch.Tensor]:
    """Thin factors of two Gram matrices of trace `IN`, as the measurement scales them, that share directions."""
    factors = [normal(IN, 5, seed=20), normal(IN, 4, seed=21)]
    return [factor * (IN**0.5 / factor.norm()) for factor in factors]


def normal(rows: int, columns: int, *, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_sum(deltas: list[LowRank]) -> torch.Tensor:
    return sum(weight * delta.up @ delta.down.T for delta, weight in zip(deltas, WEIGHTS, strict=True))


def test_the_weighted_sum_is_exact(deltas: list[LowRank]) -> None:
    joined = weighted_sum(deltas, WEIGHTS)
    assert joined.rank == sum(RANKS)
    torch.testing.assert_close(joined.dense(), dense_sum(deltas), rtol=0, atol=1e-14)


def test_as_many_weights_as_deltas_are_needed(deltas: list[LowRank]) -> None:
    with pytest.raises(ValueError, match="shorter"):
        weighted_sum(deltas, [1.0])


@pytest.mark.parametrize("rho", [RHO, 0.5])
def test_the_least_squares_sum_minimises_what_it_says(deltas: list[LowRank], activations: list[torch.Tensor], rho: float) -> None:
    D = least_squares_sum(deltas, WEIGHTS, Inputs(activations), rho).dense().requires_grad_()
    objective = rho * (D - dense_sum(deltas)).square().sum()
    for delta, weight, F in zip(deltas, WEIGHTS, activations, strict=True):
        objective = objective + ((D - weight * delta.dense()) @ F).square().sum()
    (gradient,) = torch.autograd.grad(objective, D)
    # the objective is convex, so a zero gradient is the minimum; float64 round-off of terms around 100
    assert gradient.abs().max() < 1e-12


def test_the_least_squares_sum_is_the_dense_solution(deltas: list[LowRank], activations: list[torch.Tensor]) -> None:
    grams = [F @ F.T + RHO * torch.eye(IN, dtype=torch.float64) for F in activations]
    Q = sum(F @ F.T for F in activations) + RHO * torch.eye(IN, dtype=torch.float64)
    terms = zip(deltas, WEIGHTS, grams, strict=True)
    dense = torch.linalg.solve(Q, sum(weight * delta.dense() @ gram for delta, weight, gram in terms), left=False)
    # float64 round-off times the condition of Q, about 1e4
    torch.testing.assert_close(least_squares_sum(deltas, WEIGHTS, Inputs(activations)).dense(), dense, rtol=0, atol=1e-11)


def test_the_aligned_sum_acts_as_strongly_as_the_concepts_do_alone(
    deltas: list[LowRank], activations: list[torch.Tensor]
) -> None:
    alike = [activations[0], activations[0] + 0.1 * activations[0].roll(1, 0)]  # so that least squares is near the mean
    squares = least_squares_sum(deltas, WEIGHTS, Inputs(alike)).dense()
    aligned = aligned_sum(deltas, WEIGHTS, Inputs(alike)).dense()
    own = sum((w * delta.dense() @ F).square().sum() for delta, w, F in zip(deltas, WEIGHTS, alike, strict=True))
    weaker, now = (sum((D @ F).square().sum() for F in alike) for D in (squares, aligned))
    assert weaker < 0.95 * own
    torch.testing.assert_close(now, own, rtol=1e-12, atol=0)
    torch.testing.assert_close(aligned, squares * (own / weaker).sqrt(), rtol=0, atol=1e-12)


def test_changes_that_undo_each_other_are_not_blown_up(deltas: list[LowRank], activations: list[torch.Tensor]) -> None:
    own, F = deltas[0], activations[0]
    nearly = LowRank(up=-own.up * (1 - 1e-9), down=own.down)
    both = [own, nearly], [1.0, 1.0], Inputs([F, F])
    squares, aligned = (join(*both, rho=1e-2).dense() for join in (least_squares_sum, aligned_sum))
    torch.testing.assert_close(aligned, squares * 2**0.5, rtol=1e-12, atol=1e-15)
    gone = aligned_sum(deltas, (0.0, 0.0), Inputs(activations)).dense()
    assert torch.equal(gone, torch.zeros_like(gone))


def test_on_inputs_that_no_other_concept_has_a_concept_acts_as_alone(deltas: list[LowRank]) -> None:
    directions = torch.linalg.qr(normal(IN, IN, seed=3)).Q
    own = directions[:, :5], directions[:, 5:9]
    joined = aligned_sum(deltas, WEIGHTS, Inputs(own), rho=1e-9).dense()
    for delta, weight, inputs in zip(deltas, WEIGHTS, own, strict=True):
        # what the other delta writes there is damped by rho
        torch.testing.assert_close(joined @ inputs, weight * delta.dense() @ inputs, rtol=0, atol=1e-7)


def test_on_inputs_that_no_concept_has_it_is_the_plain_sum(deltas: list[LowRank]) -> None:
    directions = torch.linalg.qr(normal(IN, IN, seed=3)).Q
    inputs = directions[:, 9:]
    joined = aligned_sum(deltas, WEIGHTS, Inputs((directions[:, :5], directions[:, 5:9])), rho=1e-2).dense()
    # rho takes that part of what is read with others' inputs, by which all is scaled
    torch.testing.assert_close(joined @ inputs, dense_sum(deltas) @ inputs, rtol=1e-2, atol=0)


def test_changes_too_large_to_compute_with_are_said(deltas: list[LowRank], activations: list[torch.Tensor]) -> None:
    huge = [LowRank(up=1e30 * delta.up.float(), down=delta.down.float()) for delta in deltas]
    with pytest.raises(ArithmeticError, match="too large"):
        aligned_sum(huge, WEIGHTS, Inputs(activations))


def test_alignment_keeps_the_rank_the_ups_and_the_precision(deltas: list[LowRank], activations: list[torch.Tensor]) -> None:
    halves = [LowRank(up=delta.up.float(), down=delta.down.float()) for delta in deltas]
    plain, aligned = weighted_sum(halves, WEIGHTS), aligned_sum(halves, WEIGHTS, Inputs(activations))
    assert aligned.rank == plain.rank and torch.equal(aligned.up, plain.up)
    assert aligned.down.dtype == torch.float32 and not torch.allclose(aligned.down, plain.down, atol=1e-2)


def test_one_concept_is_left_as_it_is(deltas: list[LowRank], activations: list[torch.Tensor]) -> None:
    aligned = aligned_sum(deltas[:1], WEIGHTS[:1], Inputs(activations[:1]))
    torch.testing.assert_close(aligned.dense(), deltas[0].dense(), rtol=0, atol=1e-11)


def test_regmean_minimises_what_it_says(deltas: list[LowRank], activations: list[torch.Tensor]) -> None:
    D = regression_mean(deltas, WEIGHTS, Inputs(activations)).dense().requires_grad_()
    objective = torch.zeros(())
    for delta, weight, F in zip(deltas, WEIGHTS, activations, strict=True):
        G = F @ F.T
        shrunk = SHRINKAGE * G + (1 - SHRINKAGE) * torch.diag(G.diagonal())
        left = D - weight * delta.dense()
        objective = objective + ((left @ shrunk) * left).sum()
    (gradient,) = torch.autograd.grad(objective, D)
    assert gradient.abs().max() < 1e-12


def test_signal_routing_is_the_least_squares_answer_within_the_concepts_directions(
    deltas: list[LowRank], activations: list[torch.Tensor]
) -> None:
    ups, downs = (torch.cat([getattr(delta, name) for delta in deltas], dim=1) for name in ("up", "down"))
    wanted = [torch.block_diag(*(w * (own == i) * torch.eye(r) for own, (w, r) in enumerate(zip(WEIGHTS, RANKS, strict=True))))
              .double() @ downs.T @ F for i, F in enumerate(activations)]  # fmt: skip
    signals = torch.cat([downs.T @ F for F in activations], dim=1)
    M = torch.linalg.lstsq(signals.T, torch.cat(wanted, dim=1).T).solution.T
    # the ridge is a millionth of the mean correlation
    torch.testing.assert_close(signal_routing(deltas, WEIGHTS, Inputs(activations)).dense(), ups @ M @ downs.T, rtol=0, atol=1e-3)


def test_signal_routing_separates_concepts_with_inputs_of_their_own(deltas: list[LowRank]) -> None:
    directions = torch.linalg.qr(normal(IN, IN, seed=3)).Q
    own = directions[:, :2], directions[:, 2:5]  # five inputs, five directions that read them
    joined = signal_routing(deltas, WEIGHTS, Inputs(own)).dense()
    for delta, weight, inputs in zip(deltas, WEIGHTS, own, strict=True):
        torch.testing.assert_close(joined @ inputs, weight * delta.dense() @ inputs, rtol=0, atol=1e-3)


def test_singular_normal_equations_are_said(deltas: list[LowRank], activations: list[torch.Tensor]) -> None:
    dead = [factor.index_fill(0, torch.tensor([3]), 0) for factor in activations]
    with pytest.raises(ArithmeticError, match="normal equations are singular"):
        regression_mean(deltas, WEIGHTS, Inputs(dead))
    with pytest.raises(ArithmeticError, match="normal equations are singular"):
        aligned_sum(deltas, WEIGHTS, Inputs([1e200 * factor for factor in activations]))
    with pytest.raises(ArithmeticError, match="normal equations are singular"):
        signal_routing(deltas, WEIGHTS, Inputs([0 * factor for factor in activations]))


def test_gradient_fusion_takes_the_steps_that_it_takes_on_dense_weights(
    deltas: list[LowRank], activations: list[torch.Tensor]
) -> None:
    D, size = torch.zeros(OUT, IN, dtype=torch.float64, requires_grad=True), 0.0
    pairs = [(w * delta.dense(), F) for delta, w, F in zip(deltas, WEIGHTS, activations, strict=True)]
    size = sum((own @ F).square().sum() for own, F in pairs)
    optimizer = torch.optim.LBFGS(
        [D], max_iter=ITERATIONS, history_size=25, line_search_fn="strong_wolfe", tolerance_grad=1e-16, tolerance_change=1e-16
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = sum(((D - own) @ F).square().sum() for own, F in pairs) / size
        value.backward()
        return value

    optimizer.step(loss)
    fused = gradient_fusion(deltas, WEIGHTS, Inputs(activations))
    assert fused.rank == sum(RANKS)
    torch.testing.assert_close(fused.dense(), D.detach(), rtol=0, atol=1e-6)  # 50 steps let rounding grow
    for own, F in pairs:  # nine measured directions leave room to fit both
        assert ((fused.dense() - own) @ F).norm() / (own @ F).norm() < 1e-3


def test_gradient_fusion_that_diverges_is_said(deltas: list[LowRank], activations: list[torch.Tensor]) -> None:
    with pytest.raises(ArithmeticError, match="L-BFGS diverged"):
        gradient_fusion(deltas, WEIGHTS, Inputs([activations[0], activations[1] * float("inf")]))
    zero = gradient_fusion(deltas, (0.0, 0.0), Inputs(activations))
    assert torch.count_nonzero(zero.dense()) == 0


def test_merges_are_those_of_peft(deltas: list[LowRank]) -> None:
    dense, weights = [delta.dense().float() for delta in deltas], torch.tensor(WEIGHTS)
    full = [LowRank(up=matrix, down=torch.eye(IN)) for matrix in dense]  # of full rank, so that nothing is cut off
    torch.testing.assert_close(ties(full, WEIGHTS).dense(), merge_utils.ties(dense, weights, DENSITY), rtol=0, atol=1e-5)
    torch.manual_seed(SEED)
    expected = merge_utils.dare_linear(dense, weights, DENSITY)
    before = torch.random.get_rng_state()
    torch.testing.assert_close(dare(full, WEIGHTS).dense(), expected, rtol=0, atol=1e-5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_cut_merges_keep_the_rank_they_promise(deltas: list[LowRank]) -> None:
    assert svd(deltas, WEIGHTS).rank == max(RANKS)
    assert ties(deltas, WEIGHTS).rank == dare(deltas, WEIGHTS).rank == sum(RANKS)
    values = torch.linalg.svdvals(dense_sum(deltas))
    lost = (svd(deltas, WEIGHTS).dense() - dense_sum(deltas)).norm()
    torch.testing.assert_close(lost, values[max(RANKS) :].norm())  # Eckart and Young


@pytest.mark.parametrize("method", FUSERS)
@pytest.mark.parametrize("weights", [(1.0, -0.5), (1.0, 0.0), (0.0, 0.0)])
def test_negative_and_zero_weights_are_joined(
    method: str, weights: tuple[float, float], deltas: list[LowRank], activations: list[torch.Tensor]
) -> None:
    joined = FUSERS[method].join(deltas, weights, Inputs(activations)).dense()
    assert torch.isfinite(joined).all()
    assert any(weights) == bool(joined.norm() > 1e-9)


def test_a_hundred_concepts_are_joined(activations: list[torch.Tensor]) -> None:
    many = [LowRank(up=normal(OUT, 1, seed=seed), down=normal(IN, 1, seed=100 + seed)) for seed in range(100)]
    for method, fuser in FUSERS.items():
        joined = fuser.join(many, [0.1] * 100, Inputs(activations * 50))
        assert torch.isfinite(joined.dense()).all() and joined.dense().norm() > 0, method
