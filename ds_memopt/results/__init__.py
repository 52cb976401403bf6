"""What a run writes, and how runs are compared: records, tables, plots, the report."""
