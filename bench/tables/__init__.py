"""One module for each table or report: ``python -m bench.tables.NAME``, or ``python -m bench NAME``."""
