"""How fast and how large RF-CLIP is beside plain CLIP: `python -m bench`, and `pytest bench` for single kernels."""
