"""The methods: how each turns the same image tower, whose weights stay as they are, into patch embeddings."""

from rfclip.methods.registry import COMMON, METHODS, OWN, RF_CLIP, MethodCard, Protocol, find_method, find_protocol

__all__ = ["COMMON", "METHODS", "OWN", "RF_CLIP", "MethodCard", "Protocol", "find_method", "find_protocol"]
