"""Read a plan and its certificate from disk, count the trace again, and verify what they claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from moesim.artifacts import digest_file
from moesim.errors import InputError
from moesim.placement.certificate import Certificate, read_certificate
from moesim.placement.constraints import parse_constraints
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.plan import PlacementPlan, read_plan
from moesim.placement.verify.verify import Verdict, verify
from moesim.scenario.placing import PlaceRequest, PlaceSetup


def verify_plan_file(path: Path, *, trace: str | None = None, model: str | None = None) -> Verdict:
    """Return the verdict on a plan written by `run_place`.

    Args:
        path: the ``*.plan.json``; its certificate is looked for beside it.
        trace, model: where the trace and the model lie now (None: where the plan says).

    Raises:
        InputError: a plan that was not written by ``moesim place``, another trace than the plan was made from, a
            certificate that is missing or has been changed.
    """
    plan = read_plan(path)
    setup = PlaceSetup(_request(path, plan, trace, model))
    digest = plan.provenance["trace_digest"]
    if setup.trace.digest() != digest:
        raise InputError(f"{setup.request.trace}: not the trace that {path} was made from (its digest is "
                         f"{setup.trace.digest()}, the plan says {digest})")
    name = next((name for name in OBJECTIVES.names()
                 if OBJECTIVES[name].unit == plan.provenance.get("objective_name")), None)
    certificate = _certificate(path, plan)
    with threadpool_limits(1, user_api="blas"):  # many small eigenproblems: threads that wait by spinning only harm
        return verify(setup.problem, plan, name, plan.provenance.get("objective"), certificate)


def _request(path: Path, plan: PlacementPlan, trace: str | None, model: str | None) -> PlaceRequest:
    made: dict[str, Any] = plan.provenance
    try:
        return PlaceRequest(
            trace=trace or made["trace"], model=model or made["model"], hardware=made["hardware"],
            profile=made["profile"], num_nodes=made["num_nodes"], gpus_per_node=made["gpus_per_node"],
            redundant_experts=made["redundant_experts"], holdout=made["holdout"], execution=made["execution"],
            batch_size=made["batch_size"], seed=made["seed"],
            constraints=parse_constraints(made["constraints"]))
    except KeyError as error:
        raise InputError(f"{path}: its provenance has no {error}: only plans written by `moesim place` can be "
                         "verified") from None


def _certificate(path: Path, plan: PlacementPlan) -> Certificate | None:
    known = plan.provenance.get("certificate")
    if known is None:
        return None
    file = path.with_name(known["file"])
    if not file.is_file():
        raise InputError(f"{path}: its certificate {file.name} is not beside it")
    if digest_file(file) != known["digest"]:
        raise InputError(f"{file}: not the certificate that {path.name} names (its digest differs)")
    return read_certificate(file)
