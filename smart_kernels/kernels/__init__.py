"""Bodies of Triton kernels; importing one of these modules imports Triton."""
