"""Plans to serving engines, timelines to Perfetto."""

from __future__ import annotations

from moesim.export.engines import EXPORTERS, ExportReport, export, export_plan
from moesim.export.perfetto import timeline, write_timeline

__all__ = ["EXPORTERS", "ExportReport", "export", "export_plan", "timeline", "write_timeline"]
