"""The scenario key ``balancer`` of expert parallelism: a name, or a mapping with its parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

if TYPE_CHECKING:  # schemas load without numpy
    from moesim.lowering.balancers import BalancerOptions

_ONLY = {"method": ("lplb",), "alpha": ("llep",), "min_tokens": ("llep",), "gate": ("llep",), "gate_on": ("llep",),
         "solve_s": ("lp", "lplb", "llep")}


class BalancerChoice(BaseModel):
    """Who decides, batch by batch, what each rank computes (`moesim.lowering.balancers`).

    `solve_s` None: the lowering's stated default.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Literal["none", "lp", "lplb", "llep"] = "none"
    solve_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    method: Literal["exact", "interior_point"] = "exact"
    alpha: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    min_tokens: Annotated[int, Field(ge=1)] = 1024
    gate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.3
    gate_on: Literal["ranks", "experts"] = "ranks"

    @model_validator(mode="after")
    def _check_parameters(self) -> BalancerChoice:
        for key in sorted(self.model_fields_set - {"name"}):
            if self.name not in _ONLY[key]:
                raise ValueError(f"{key!r} belongs to balancer {' or '.join(_ONLY[key])}, not to {self.name}")
        return self

    def check(self, execution: str) -> None:
        """Raise ValueError if this execution knows no such balancer."""
        if self.name != "none" and execution == "coherent":
            raise ValueError(f"balancer: {self.name} belongs to execution: home, not to coherent")

    @property
    def options(self) -> BalancerOptions:
        """What the lowering takes."""
        from moesim.lowering.balancers import BalancerOptions

        return BalancerOptions(**{key: value for key, value in self.model_dump().items() if value is not None})


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Balancer = Annotated[BalancerChoice, BeforeValidator(_named)]
