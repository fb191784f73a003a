"""Lower bounds on the sampled step time: one plan has to serve every step, balance and traffic at once."""

from __future__ import annotations

import time

import numpy as np

from moesim.errors import InputError
from moesim.placement.bounds.colocation import colocation_multipliers
from moesim.placement.bounds.step_forms import MEAN, StepForms
from moesim.placement.certificate import Certificate
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress

METHOD = "co-location"
_ITERATIONS = 40


def prove_step_time(problem: PlacementProblem, *, seed: int, time_limit_s: float,
                    incumbent: PlacementPlan | None = None, progress: Progress | None = None) -> Certificate:
    """Return a proven lower bound on the mean over steps of experts and exchanges, ns.

    Let U[e, f] = 1 where experts e and f share a rank (one slot per expert). Every step's kernel and traffic are at
    least a constant, or linear in U (`step_forms` has the forms): the rank of a chosen expert e computes e and all that
    shares its rank, and its port receives their tokens; all ports together receive every use, less the pairs of one
    token that share a rank. Summed over the steps of a layer: ``constant + <M, U>``, where sharing that saves traffic
    costs balance in the same sum. Its least value over all U is bounded by `colocation` (eigenvalues and counting).

    Anytime: layers that the clock does not reach have their constants alone.
    With replicas U has no such form: then the mean rank and node, and the hottest expert over its copies, of all
    steps together. Certificates: int8[step, layer] ``kernel_form``, ``traffic_form``; int16[step, layer]
    ``kernel_expert``, ``traffic_expert``; float32[layer, E, E] ``pairs`` and float64[layer, E] ``diagonal`` (one slot
    per expert only).
    """
    until_s = time.perf_counter() + time_limit_s
    if problem.steps is None or problem.step_cost is None:
        raise InputError("the step-time bound needs the steps of a trace and the costs of a machine")
    total, arrays = 0.0, _empty(problem)
    for layer in range(problem.num_layers):
        forms = StepForms(problem, layer)
        late = layer > 0 and time.perf_counter() > until_s  # constants alone, from here on
        if late or problem.num_slots > problem.num_experts or not problem.step_cost.exact:
            total += forms.floor_ns()
            continue
        budget_s = time.perf_counter() + (until_s - time.perf_counter()) / (problem.num_layers - layer)
        total += _prove_layer(forms, layer, arrays, budget_s)
    bound = total / problem.steps.num_steps * (1 - 2.0**-40)
    if progress is not None:
        progress.proved(bound)
    if problem.num_slots > problem.num_experts or not problem.step_cost.exact:
        arrays = {}
    return Certificate("step_time", METHOD, bound, {"layers": problem.num_layers}, arrays)


def _empty(problem: PlacementProblem) -> dict[str, np.ndarray]:
    assert problem.steps is not None
    shape, size = (problem.steps.num_steps, problem.num_layers), problem.num_experts
    return {"kernel_form": np.zeros(shape, np.int8), "kernel_expert": np.zeros(shape, np.int16),
            "traffic_form": np.zeros(shape, np.int8), "traffic_expert": np.zeros(shape, np.int16),
            "pairs": np.zeros((problem.num_layers, size, size), np.float32),
            "diagonal": np.zeros((problem.num_layers, size))}


def _prove_layer(forms: StepForms, layer: int, arrays: dict[str, np.ndarray], until_s: float) -> float:
    """Return the layer's bound, ns over all steps, and enter its choices; the better of two kinds of traffic forms."""
    kernel_form, kernel_expert = forms.best_kernels()
    quick, chosen = -np.inf, None
    for traffic_form, traffic_expert in forms.traffic_choices():
        constant, matrix = forms.assemble(kernel_form, kernel_expert, traffic_form, traffic_expert)
        half = min(until_s, time.perf_counter() + (until_s - time.perf_counter()) / 2)
        found = colocation_multipliers(-matrix, forms.per_rank, half, _ITERATIONS)
        if constant - found[2] > quick:
            quick, chosen = constant - found[2], (traffic_form, traffic_expert, found)
    assert chosen is not None
    floor = forms.floor_ns()
    if floor > quick:  # no expert is worth naming: the constants of every step
        kernel_form = np.full(len(kernel_form), MEAN)
        nothing = (np.zeros_like(chosen[2][0]), np.zeros_like(chosen[2][1]), 0.0)
        quick, chosen = floor, (kernel_form, np.zeros_like(kernel_expert), nothing)
    arrays["kernel_form"][:, layer], arrays["kernel_expert"][:, layer] = kernel_form, kernel_expert
    arrays["traffic_form"][:, layer], arrays["traffic_expert"][:, layer] = chosen[0], chosen[1]
    arrays["pairs"][layer], arrays["diagonal"][layer] = chosen[2][0], chosen[2][1]
    return quick

