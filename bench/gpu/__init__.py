"""Everything a GPU can tell about this package, in under ten minutes: `make gpu`, or `python -m bench.gpu --help`."""
