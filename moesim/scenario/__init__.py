"""Names tied together: strict YAML in, the whole pipeline run, its results in one folder."""

from __future__ import annotations

from moesim.scenario.load import load_scenario, scenario_schema
from moesim.scenario.schema import Point, Scenario

__all__ = ["Point", "Scenario", "load_scenario", "scenario_schema"]
