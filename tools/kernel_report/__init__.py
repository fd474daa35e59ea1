"""Compiles every kernel for real GPUs, without one, and counts what each launch computes and moves."""
