"""The chain SDP's iterations: alternating directions (ADMM) between spectra and entries, with cuts."""

from __future__ import annotations

from concurrent.futures import Executor

import numpy as np

from moesim.placement.bounds.chain_sdp_spectrum import FULL_EVERY, Spectrum

_RELAX = 1.6  # over-relaxation (Eckstein and Bertsekas, Math. Programming 55, 1992: any value below 2)
_PENALTY = 2.0  # of the augmented Lagrangian, in units of `_spread`; tried: 0.4 to 6 on the benchmark's instances
_CUT_STEP = 1.0  # of a cut's weight, in units of the penalty; above 2 the weights swing
_CUT_ABOVE = 0.05  # violation from which a cut is worth its memory


class ChainSDP:
    """Relaxed co-location matrices of neighbouring layers, and the multipliers that prove a bound.

    For layers l, l + 1 of a plan with c experts per place (rank or node) and one slot per expert let U_l, Y_l be the
    0/1 matrices of "same place" within layer l and between l and l + 1. Then ``Z_l = [[U_l, Y_l], [Y_l', U_(l+1)]]``
    is 2 c times a projector of rank R = E / c. The relaxation asks for

    - eigenvalues of Z_l in 0 ... 2 c, trace 2 E, row sums c in each of its blocks (so ``Z 1 = 2 c 1``);
    - entries in 0 ... 1, diagonals of U 1, the U shared by neighbouring pairs;
    - cuts (Groetschel and Wakabayashi, Math. Programming 47, 1990, 2-partition inequalities): for an expert i and two
      or three others, ``sum_t Z[i, t] - sum_(t < t') Z[t, t'] <= 1``.

    ``max sum <T_l, Y_l>`` over these is at least what any plan keeps. `iterate` is one step of the alternating direction
    method of multipliers: every Z_l to the nearest matrix with such a spectrum, then all entries into their boxes.
    Pairs are independent within a step, so an executor may run them at once. Nothing here proves anything: the
    multipliers do, in `chain_sdp_proof`, however far from convergence.
    """

    def __init__(self, counts: np.ndarray, capacity: int, pool: Executor, *, cuts_per_pair: int = 0) -> None:
        self.num_pairs, self.num_experts = counts.shape[:2]
        self.capacity, self.pool = capacity, pool
        self.num_places = self.num_experts // capacity
        self.scale = float(counts.mean())
        self.counts = (counts / self.scale).astype(np.float32)
        self.penalty = max(_PENALTY * _spread(counts) / self.scale, 2.0**-20)
        shape, even = (self.num_experts, self.num_experts), capacity / self.num_experts
        self.cross = np.full((self.num_pairs, *shape), even, np.float32)
        self.same = np.full((self.num_pairs + 1, *shape), even, np.float32)
        joint = (self.num_pairs, 2 * self.num_experts, 2 * self.num_experts)
        self.dual = np.zeros(joint, np.float32)
        self.cuts_per_pair = cuts_per_pair
        self.cut_total = np.zeros(joint if cuts_per_pair else (self.num_pairs, 1, 1), np.float32)
        if not cuts_per_pair:
            self.cut_total = np.broadcast_to(np.float32(0.0), joint)
        self.cuts = [np.zeros((0, 4), np.int32)] * self.num_pairs
        self.weights = [np.zeros(0)] * self.num_pairs
        cap = 2.0 * capacity
        self.spectra = [Spectrum(cap, cap * (self.num_places - 1)) for _ in range(self.num_pairs)]
        self.rounds = 0

    def iterate(self) -> None:
        """Do one step on every pair and layer."""
        list(self.pool.map(self._spectrum, range(self.num_pairs)))
        list(self.pool.map(self._entries, range(self.num_pairs + 1)))
        if self.cuts_per_pair:
            list(self.pool.map(self._weigh, range(self.num_pairs)))
        self.rounds += 1

    def find_cuts(self) -> None:
        """Drop cuts without weight and add those that the entries violate most."""
        list(self.pool.map(self._find, range(self.num_pairs)))

    def _spectrum(self, pair: int) -> None:
        """Add the nearest matrix with a plan's kind of spectrum to the pair's dual."""
        from moesim.placement.kernels import affinity_sdp as kernels

        size = self.num_experts
        target = np.empty((2 * size, 2 * size), np.float32)
        first, cross, second = self.same[pair], self.cross[pair], self.same[pair + 1]
        kernels.centred_difference(first, cross, second, self.dual[pair], target)
        spectrum = self.spectra[pair]
        if (self.rounds + pair) % FULL_EVERY == 0 or not spectrum.follow(target):
            spectrum.decompose(target)
        basis = spectrum.root()
        nearest = basis @ basis.T
        nearest += np.float32(self.capacity / size)
        kernels.relax(self.dual[pair], nearest, first, cross, second, _RELAX)

    def _entries(self, layer: int) -> None:
        from moesim.placement.kernels import affinity_sdp as kernels

        before, after = max(0, layer - 1), min(layer, self.num_pairs - 1)
        kernels.entries(self.dual[before], self.dual[after], self.cut_total[before], self.cut_total[after],
                        self.counts[after], self.penalty, self.same[layer], self.cross[after], layer > 0,
                        layer < self.num_pairs)

    def joint(self, pair: int) -> np.ndarray:
        """Return float32[2 E, 2 E], the entries of one pair."""
        return np.block([[self.same[pair], self.cross[pair]], [self.cross[pair].T, self.same[pair + 1]]])

    def _weigh(self, pair: int) -> None:
        from moesim.placement.kernels import affinity_sdp as kernels

        if len(self.cuts[pair]):
            kernels.weigh_cuts(self.joint(pair), self.cuts[pair], self.weights[pair],
                               _CUT_STEP * float(self.penalty), self.cut_total[pair])

    def _find(self, pair: int) -> None:
        from moesim.placement.kernels import affinity_sdp as kernels

        found, excess = kernels.find_cuts(self.joint(pair), _CUT_ABOVE, 16 * self.cuts_per_pair)
        found[:, 1:] = np.sort(found[:, 1:], axis=1)[:, ::-1]  # the absent member (-1) last
        order = np.argsort(-excess, kind="stable")[:2 * self.cuts_per_pair]
        live = self.weights[pair] > 0
        cuts = np.concatenate([self.cuts[pair][live], found[order]])
        weights = np.concatenate([self.weights[pair][live], np.zeros(len(order))])
        _, first = np.unique(cuts, axis=0, return_index=True)
        keep = np.sort(first)[:max(self.cuts_per_pair, int(live.sum()))]
        self.cuts[pair], self.weights[pair] = np.ascontiguousarray(cuts[keep]), weights[keep]


def _spread(counts: np.ndarray) -> float:
    """Return the standard deviation of counts less their rows' and columns' means: what a plan can win."""
    rows, columns = counts.mean(axis=2, keepdims=True), counts.mean(axis=1, keepdims=True)
    return float((counts - rows - columns + rows.mean(axis=1, keepdims=True)).std())
