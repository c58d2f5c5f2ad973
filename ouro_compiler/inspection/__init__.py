"""Looking at graphs: rows of nodes, drawings, a page, and what differs between two of them."""

from __future__ import annotations

from ouro_compiler.inspection.compare import Diff as Diff
from ouro_compiler.inspection.compare import diff as diff
