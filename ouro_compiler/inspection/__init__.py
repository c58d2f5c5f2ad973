"""Looking at graphs: rows of nodes for tables and JSON."""
