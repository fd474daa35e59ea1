"""How well a method segments a dataset: metrics, resumable runs, and what is written of them."""
