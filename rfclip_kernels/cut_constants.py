"""Constants of the filter that cuts the graph, in the kernels and in PyTorch; `rfclip_kernels.cut` has the formula."""

DEGREES = (3, 7, 7)  # of the rounds without a start
SQUARINGS = 12  # of the projected matrix, which leave its leading eigenvector
NEW = 1e-4  # the squared length of what a vector adds to the basis, over its own, is more than this
SHARE = 0.2  # of the largest quotient, which b is at least
LEAST, FIRST = 0.02, 0.1  # b is at least this, and that in the first round without a start
