"""Writes a new backend that passes the conformance suite on one op at once: real files, to be changed into a kernel of one's own."""

from __future__ import annotations

from titans_backends.scaffold.backend_name import checked_name
from titans_backends.scaffold.kinds import KINDS, Kind, kind_named
from titans_backends.scaffold.project import Project, in_tree, plugin

__all__ = ["KINDS", "Kind", "Project", "checked_name", "in_tree", "kind_named", "plugin"]
