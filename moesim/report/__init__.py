"""Tables, figures and the one-file report; from studies and results only."""

from __future__ import annotations

from moesim.report.figures import result_figures, study_figures
from moesim.report.headline import study_headline
from moesim.report.html import report_folder, write_report
from moesim.report.tables import study_table, study_text, summary_table

__all__ = ["report_folder", "result_figures", "study_figures", "study_headline", "study_table", "study_text",
           "summary_table", "write_report"]
