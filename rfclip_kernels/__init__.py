"""Triton kernels for the steps of `rfclip.reference`, under the same names and signatures.

So far: `distraction_scores`, `distraction_mask` and `redistribute_embeddings` in `rfclip_kernels.distraction`,
`refocused_attention` and `proxy_attention` in `rfclip_kernels.attention`, `key_similarity` and `received_attention` in
`rfclip_kernels.similarity`. The other steps, and the backend that runs a tower on them, are being built.
"""
