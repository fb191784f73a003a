"""Measured phases as a fixed time plus rising terms of what the busiest rank has to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.units import s_from_ns

TRIM = 0.05
PAUSE = 5.0
ROUNDS = 4
FLOOR_S = s_from_ns(1)


@dataclass(frozen=True)
class PhaseFit:
    """Seconds of a phase: ``scale * max over ranks of (terms @ coefficients)``.

    Attributes:
        coefficients: float64[term], not negative; the first term of every sample is what does not grow.
        scales: float64[repetition], how slow the machine was in each.
        ends: float64[2, term], the least and the most of each term that was measured.
        samples: how many phases were measured.
    """

    coefficients: np.ndarray
    scales: np.ndarray
    ends: np.ndarray
    samples: int


def fit_phase(terms: Sequence[np.ndarray], seconds: Sequence[np.ndarray]) -> PhaseFit:
    """Fit one phase of all repetitions.

    The machine drifts from one repetition to the next by more than placements differ. So the coefficients come from all
    repetitions, each divided by its own scale, and the scale of a repetition from its own samples alone.

    Args:
        terms: of each repetition, float64[sample, rank, term].
        seconds: of each repetition, float64[sample].
    """
    scales = np.array([np.median(own) for own in seconds])
    for _ in range(ROUNDS):
        level = np.concatenate([own / scale for own, scale in zip(seconds, scales, strict=True)])
        coefficients = busiest_fit(np.concatenate(terms), level)
        scales = np.array([_ratio(own, predicted_seconds(load, coefficients))
                           for load, own in zip(terms, seconds, strict=True)])
    everything = np.concatenate(terms).reshape(-1, terms[0].shape[2])
    return PhaseFit(coefficients, scales, np.stack([everything.min(axis=0), everything.max(axis=0)]), sum(map(len, seconds)))


def predicted_seconds(terms: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """Return float64[sample] from float64[sample, rank, term]: the busiest rank's."""
    return (terms @ coefficients).max(axis=1)


def _ratio(measured: np.ndarray, predicted: np.ndarray) -> float:
    """Return the sum of what was measured over the sum of what was predicted.

    A run's time is a sum, so its expectation is a sum of means, slow tail and all; only what took `PAUSE` times as long as
    usual is left out: there the whole machine stood still.
    """
    ratio = measured / predicted
    kept = ratio <= PAUSE * np.median(ratio)
    return float(measured[kept].sum() / predicted[kept].sum())


def _trimmed(values: np.ndarray) -> np.ndarray:
    """bool: the values within the middle nine tenths."""
    low, high = np.quantile(values, [TRIM, 1 - TRIM])
    return (values >= low) & (values <= high)


def busiest_fit(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Return coefficients float64[term] of phases that last as long as their busiest rank.

    Which rank that is follows from the fit itself, so it goes round.
    """
    every = np.arange(len(terms))
    busiest = terms.sum(axis=2).argmax(axis=1)
    for _ in range(ROUNDS):
        found = rising_fit(terms[every, busiest], seconds)
        again = (terms @ found).argmax(axis=1)
        if np.array_equal(again, busiest):
            break
        busiest = again
    return found


def rising_fit(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Return non-negative coefficients float64[term] of ``seconds = terms @ coefficients``.

    Non-negative least squares (Lawson, Hanson, "Solving Least Squares Problems", 1974, chapter 23), twice: the second time
    without the samples that lie furthest above and below the first fit.
    """
    kept = _trimmed(seconds - terms @ _nnls(terms, seconds))
    return _nnls(terms[kept], seconds[kept])


def _nnls(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    from scipy.optimize import nnls

    scale = np.maximum(np.abs(terms).max(axis=0), FLOOR_S)
    found = np.asarray(nnls(terms / scale, seconds / seconds.max())[0]) * seconds.max() / scale
    return found if found.any() else np.eye(terms.shape[1])[0] * seconds.mean()
