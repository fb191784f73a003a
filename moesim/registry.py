"""Registries: one visible dict per family of plug-ins, open to third parties through entry points."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Generic, TypeVar

from moesim.errors import InputError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to plug-ins. Built-in entries come from the dict; others from the entry-point group."""

    def __init__(self, kind: str, group: str, builtin: dict[str, T]) -> None:
        self.kind, self.group, self._entries = kind, group, dict(builtin)
        self._scanned = False

    def _scan(self) -> None:
        if not self._scanned:
            self._scanned = True
            for point in entry_points(group=self.group):
                self._entries.setdefault(point.name, point.load())

    def names(self) -> list[str]:
        """Return every known name, built-in ones first."""
        self._scan()
        return list(self._entries)

    def add(self, name: str, entry: T) -> None:
        """Register `entry` under a new name; raises InputError where the name belongs to another one."""
        self._scan()
        if self._entries.setdefault(name, entry) is not entry:
            raise InputError(f"the {self.kind} {name!r} exists already; choose another name")

    def __getitem__(self, name: str) -> T:
        """Return the entry called `name`; raises InputError with a suggestion."""
        if name not in self._entries:
            self._scan()
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        return self._entries[name]
