"""`compiled.report`: the report's dictionary, which also shows itself as tables."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

# What is shown of each part, in this order; the report has more (docs/report.md).
_COLUMNS = {
    "layers": ("name", "kind", "status", "weight_bits", "activation_bits", "kernel", "reason"),
    "sites": (
        *("name", "bits", "outlier_bits", "reverse"),
        *("scale_min", "scale_median", "scale_max", "outlier_share"),
    ),
    "kernels": ("op", "kernel", "nodes", "reason"),
    "bytes": ("part", "fp16", "stored"),
    "summary": ("what", "value"),
}
TABLES = tuple(_COLUMNS)


@dataclass(frozen=True)
class ReportTable:
    """Rows of one part of a report. None where a value does not apply."""

    name: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """One column's values. Raises KeyError for a name that is not in `columns`."""
        if name not in self.columns:
            raise KeyError(f"{self.name} has no column {name}: it has {', '.join(self.columns)}")
        place = self.columns.index(name)
        return [row[place] for row in self.rows]

    def records(self) -> list[dict[str, Any]]:
        """Rows as dictionaries: what `pandas.DataFrame` and `csv.DictWriter` take."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def to_csv(self) -> str:
        """Comma-separated text under a line of columns; what does not apply is empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()

    def __str__(self) -> str:
        """Text for a terminal: columns padded with blanks."""
        shown = [self.columns, *([_shown(value) for value in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in shown
        )
        return "\n".join(line.rstrip() for line in lines)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(*self.columns, title=self.name)
        for row in self.rows:
            table.add_row(*(Text(_shown(value)) for value in row))  # names are no markup
        return table

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(one)}</th>" for one in self.columns)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(_shown(value))}</td>' for value in row)}</tr>"
            for row in self.rows
        )
        caption = f"<caption>{html.escape(self.name)}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class ReportView(dict[str, Any]):
    """The documented report (docs/report.md), as a dictionary, with tables of its parts.

    `rich.print(report)` and a notebook show it; `report.table("layers")` is one part.
    """

    def table(self, name: str) -> ReportTable:
        """One of `TABLES`. Raises KeyError for another name."""
        if name not in _COLUMNS:
            raise KeyError(f"a report has no table {name}: it has {', '.join(TABLES)}")
        columns = _COLUMNS[name]
        rows = [tuple(row.get(key) for key in columns) for row in self._records(name)]
        return ReportTable(name, columns, rows)

    def tables(self) -> list[ReportTable]:
        """All of them."""
        return [self.table(name) for name in TABLES]

    def _records(self, name: str) -> Sequence[Mapping[str, Any]]:
        if name == "layers":
            return self["layers"]["rows"]
        if name == "bytes":
            return [{"part": part, **row} for part, row in self["bytes"]["by_part"].items()]
        if name == "summary":
            return [{"what": what, "value": value} for what, value in self._facts()]
        return self[name]

    def _facts(self) -> list[tuple[str, Any]]:
        size, layers, accuracy = self["bytes"], self["layers"], self["accuracy"]
        calibration = self["calibration"]
        return [
            ("layers", f"{layers['quantized']} of {layers['total']} quantized"),
            ("bytes", f"{size['fp16']} as fp16, {size['stored']} stored"),
            ("calibration", calibration and calibration["description"]),
            ("logits SNR (dB)", self["logits_snr_db"]),
            ("measured on", self["snr_data"]),
            ("accuracy before", accuracy["before"]),
            ("accuracy after", accuracy["after"]),
            ("outlier share", self["outlier_share"]),
        ]

    def __rich__(self) -> Group:
        from rich.console import Group

        return Group(*(table.__rich__() for table in self._shown()))

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self._shown())

    def _shown(self) -> list[ReportTable]:
        """The summary first, and no table that has no rows."""
        order = ("summary", "bytes", "layers", "sites", "kernels")
        return [table for table in map(self.table, order) if len(table)]


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
