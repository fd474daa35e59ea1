"""Independent implementations of what the package computes, slow and plain, for the tests to compare with."""
