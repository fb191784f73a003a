"""The engines' own rules, restated from their sources: what was written is read again from its bytes and checked.

Nothing here is shared with the writers in `moesim.export.engines` (a test holds it so): each module has its own reader
of the format, and knows the plan only as plain rows.
"""
