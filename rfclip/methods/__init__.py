"""The methods: how each turns the same image tower, whose weights stay as they are, into patch embeddings."""

from rfclip.methods.registry import METHODS, RF_CLIP, MethodCard, Protocol, find_method

__all__ = ["METHODS", "RF_CLIP", "MethodCard", "Protocol", "find_method"]
