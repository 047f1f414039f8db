"""What is computed: the sizes of molecules, one workload, its tensors, and the suites of them."""
