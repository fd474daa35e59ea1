"""What CLIP attends to in a picture, and what refocusing changes."""

from rfclip.explanation.explanation import Explanation, View, explain

__all__ = ["Explanation", "View", "explain"]
