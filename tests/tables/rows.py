"""The rows of all `table_*.py` files: every public function that is not a loss on (logits, labels)."""

import importlib
import pathlib

from tests.tables.functions import Row

TABLES = sorted(path.stem for path in pathlib.Path(__file__).parent.glob("table_*.py"))
ROWS: tuple[Row, ...] = tuple(row for table in TABLES for row in importlib.import_module(f"tests.tables.{table}").ROWS)
